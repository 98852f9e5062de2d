"""What a sample of a base's weights notices: the table in docs/training.md.

The LoRA of the bundled adapter is merged into the embedded model at several sizes. The table has the share of sampled
weights, in copies of the result in several precisions, that differ from the base by more than rounding explains.

    python benchmarks/base_sample.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import click
import mlx.core as mx
import mlx.nn as nn

from mtp_mlx import load
from mtp_mlx.drafters.masks.conf_adapt import merged
from mtp_mlx.drafters.masks.weights import MaskAdapter
from mtp_mlx.model.base_sample import BaseSample
from mtp_mlx.model.fingerprint import sample_base

SIZES = (0.0, 0.03, 0.1, 0.3, 1.0)


def _as(dtype: mx.Dtype, bits: int = 0) -> Callable[[nn.Module], nn.Module]:
    def cast(model: nn.Module) -> nn.Module:
        out = copy.deepcopy(model)
        out.set_dtype(dtype)
        if bits:
            nn.quantize(out, 64, bits)
        return out

    return cast


COPIES = {
    "bfloat16": _as(mx.bfloat16),
    "8-bit": _as(mx.float32, 8),
    "4-bit": _as(mx.float32, 4),
    "8-bit of bfloat16": _as(mx.bfloat16, 8),
    "4-bit of bfloat16": _as(mx.bfloat16, 4),
}


def tuned(model: nn.Module, adapter: MaskAdapter, size: float) -> tuple[nn.Module, float]:
    """The model with `size` times the adapter's LoRA merged, and the update's mean norm relative to the weights'."""
    scaled = copy.deepcopy(adapter)
    for low_rank in scaled.low_rank.values():
        low_rank.up = size * low_rank.up
    modules = dict(model.model.named_modules())
    norms = [
        mx.linalg.norm(low_rank.product()) / mx.linalg.norm(modules[path].weight)
        for path, low_rank in scaled.low_rank.items()
    ]
    return merged(model, scaled), float(mx.mean(mx.stack(norms)).item())


def row(own: dict[str, BaseSample], model: nn.Module, norm: float) -> str:
    """A line of the table; the last column compares two 4-bit copies of bfloat16."""
    copies = {name: sample_base(make(model)) for name, make in COPIES.items()}
    shares = [own["float32"].share_outside(sample) for sample in copies.values()]
    shares.append(own["4-bit of bfloat16"].share_outside(copies["4-bit of bfloat16"]))
    return f"| {100 * norm:.1f} % | " + " | ".join(f"{100 * share:.1f}" for share in shares) + " |"


@click.command()
def main() -> None:
    """Print the table."""
    attached, _ = load("smollm2-135m")
    adapter = attached.speculator
    assert isinstance(adapter, MaskAdapter)
    with attached.unwrapped() as model:
        own = {name: sample_base(make(model)) for name, make in COPIES.items()} | {
            "float32": sample_base(model)
        }
        click.echo(
            "| update | " + " | ".join(COPIES) + " | two of 4-bit |\n|---|" + "---|" * (len(COPIES) + 1)
        )
        for size in SIZES:
            click.echo(row(own, *tuned(model, adapter, size)))


if __name__ == "__main__":
    main()
