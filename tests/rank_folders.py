"""The command line with RANK in its arguments replaced by FOLDER/<rank>/data.jsonl: data that differ by process."""

from __future__ import annotations

import os
import sys

from mtp_mlx.cli import main

folder, *words = sys.argv[1:]
own = f"{folder}/{os.environ['MLX_RANK']}/data.jsonl"
sys.argv = ["mtp-mlx", *(own if word == "RANK" else word for word in words)]
main()
