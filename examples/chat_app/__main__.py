"""`python -m examples.chat_app --model MODEL --adapter ADAPTER`."""

from __future__ import annotations

import argparse

from examples.chat_app.app import ChatApp

parser = argparse.ArgumentParser(description="A chat window for mtp-mlx.")
parser.add_argument("--model", default="smollm2-135m", help="embedded model, mlx-lm folder or hub id")
parser.add_argument("--adapter", default="auto", help="adapter folder, 'auto' or 'none'")
arguments = parser.parse_args()
ChatApp(arguments.model, None if arguments.adapter == "none" else arguments.adapter).main_loop()
