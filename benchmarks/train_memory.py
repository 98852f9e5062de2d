"""Print the memory table of docs/training.md: the trainer's own estimate for a model, by method and settings.

    python benchmarks/train_memory.py --model smollm2-135m

Nothing is trained: `mtp-mlx train` prints the same estimate before its first step. Every row of data is assumed to
be as long as --max-length, which is the worst case.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np

from mtp_mlx.config import option_name
from mtp_mlx.drafters.registry import method_class, settings_class
from mtp_mlx.models import resolve_model
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import gigabytes

# The method, and its settings that differ from the defaults.
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mask-tokens", {}),
    ("mask-tokens", {"max_length": 512}),
    ("mask-tokens", {"batch_size": 1}),
    ("mask-tokens", {"block_share": 0.25}),
    ("mask-tokens", {"grad_checkpoint": True}),
    ("mask-tokens", {"micro_batches": 1}),
    ("mask-tokens", {"block_share": 0.25, "grad_checkpoint": True, "batch_size": 1}),
    ("conf-adapt", {}),
    ("mtp-heads", {}),
    ("ptp", {}),
)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    print(
        "| command | total | weights | adapter | prefix | activations | logits |\n|---|---|---|---|---|---|---|"
    )
    for name, changes in CASES:
        model = mlx_lm.load(str(resolve_model(arguments.model)))[0]
        model.freeze()
        common = {"model": arguments.model, "data": Path("data.jsonl"), "out": Path("adapter")}
        settings = settings_class(name)(**common, **changes)
        vocabulary = int(model.args.vocab_size)
        tokens = np.random.default_rng(0).integers(0, vocabulary, settings.max_length).tolist()
        rows = [Example(tokens, 32)] * 4
        method = method_class(name)(model, rows, settings, lambda message: None)
        found = method.estimate_memory(rows)
        parts = (found.total, found.weights, found.adapter, found.prefix, found.activations, found.logits)
        words = [
            option_name(key) if value is True else f"{option_name(key)} {value}"
            for key, value in changes.items()
        ]
        print(f"| `{' '.join(['train', name, *words])}` | {' | '.join(map(gigabytes, parts))} |", flush=True)


if __name__ == "__main__":
    main()
