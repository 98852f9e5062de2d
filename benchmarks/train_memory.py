"""Prints the memory table of docs/training.md: the trainer's own estimate for a model, by method and settings.

    python benchmarks/train_memory.py --model smollm2-135m

Nothing is trained: the estimate is what `mtp-mlx train` prints before its first step. Every row of data is
taken to be as long as --max-length, the worst case.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx_lm
import numpy as np

from mtp_mlx.drafters.registry import method_class
from mtp_mlx.models import resolve_model
from mtp_mlx.train.data import Example
from mtp_mlx.train.memory import gigabytes
from mtp_mlx.train.settings import TrainSettings

CASES: dict[str, dict[str, object]] = {
    "": {},
    "--max-length 512": {"max_length": 512},
    "--batch-size 1": {"batch_size": 1},
    "--block-share 0.25": {"block_share": 0.25},
    "--grad-checkpoint": {"grad_checkpoint": True},
    "--micro-batches 1": {"micro_batches": 1},
    "--block-share 0.25 --grad-checkpoint --batch-size 1": {
        "block_share": 0.25,
        "grad_checkpoint": True,
        "batch_size": 1,
    },
    "--method conf-adapt": {"method": "conf-adapt"},
    "--method mtp-heads": {"method": "mtp-heads"},
    "--method ptp": {"method": "ptp"},
}


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    arguments = parser.parse_args()
    print(
        "| options | total | weights | adapter | prefix | activations | logits |\n|---|---|---|---|---|---|---|"
    )
    for name, changes in CASES.items():
        model = mlx_lm.load(str(resolve_model(arguments.model)))[0]
        model.freeze()
        common = {"model": arguments.model, "data": Path("data.jsonl"), "out": Path("adapter")}
        settings = TrainSettings(**common, **changes)  # type: ignore[arg-type]
        vocabulary = int(model.args.vocab_size)
        tokens = np.random.default_rng(0).integers(0, vocabulary, settings.max_length).tolist()
        rows = [Example(tokens, 32)] * 4
        method = method_class(settings.method)(model, rows, settings, lambda message: None)
        found = method.estimate_memory(rows)
        parts = (found.total, found.weights, found.adapter, found.prefix, found.activations, found.logits)
        print(
            f"| {f'`{name}`' if name else 'as they are'} | {' | '.join(map(gigabytes, parts))} |", flush=True
        )


if __name__ == "__main__":
    main()
