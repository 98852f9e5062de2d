"""Quantised heads: linear layers stored and run so, as mlx-lm does it; trained ones in 8 bits.

They take half the bytes of bfloat16, and a draft reads them all. Whether acceptance stays is measured on held-out
text before they are stored so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.errors import MTPError

GROUP_SIZE, BITS = 64, 8
MOST_LOST = 0.005  # acceptance that 8 bits may cost at any depth
Heads = TypeVar("Heads", bound=DraftHeads)


def in_8_bits(heads: Heads) -> Heads:
    """A copy of heads whose linear layers are quantised, except those whose width is no multiple of a group.

    Raises:
        MTPError: if there is none to quantise.
    """
    out = copy.deepcopy(heads)
    out.forget_rows()
    out.set_dtype(mx.bfloat16)  # as they are stored; then the scales are rounded too
    nn.quantize(out, GROUP_SIZE, BITS, class_predicate=lambda _, layer: _can_be_quantised(layer))
    if not is_quantised(out):
        raise MTPError(
            f"`store` 8bit needs layers whose width is a multiple of {GROUP_SIZE}, and these heads have none: store "
            "them in bf16"
        )
    out.set_dtype(mx.float32)
    mx.eval(out.parameters())
    return out


def _can_be_quantised(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Linear | SwitchLinear | MultiLinear) and layer.weight.shape[-1] % GROUP_SIZE == 0
    )


def is_quantised(heads: nn.Module) -> bool:
    """Whether any layer of the heads is quantised."""
    return any("scales" in layer for _, layer in heads.named_modules())


def quantisation_of(heads: nn.Module) -> dict[str, Any]:
    """What the folder of these heads says of their quantisation; empty if they are not quantised."""
    return {"group_size": GROUP_SIZE, "bits": BITS} if is_quantised(heads) else {}


def as_stored(
    heads: Heads,
    store: str,
    acceptance: list[float],
    measure: Callable[[Heads], list[float]],
    tell: Callable[[str], None],
) -> tuple[Heads, list[float]]:
    """Trained heads as they are to be stored, and their acceptance per depth.

    Args:
        heads: float32.
        store: "bf16", "8bit", or "auto": 8 bits if acceptance stays within `MOST_LOST` at every depth.
        acceptance: of `heads` on held-out text; empty if it was not measured.
        measure: gives that of other heads on the same text.
        tell: told what is chosen, and what it was chosen by.

    Raises:
        MTPError: if "8bit" is not possible.
    """
    if store == "bf16":
        return heads, acceptance
    if store == "auto" and not acceptance:
        tell("weights are stored in bf16: there is no held-out text to measure what 8 bits cost")
        return heads, acceptance
    small = in_8_bits(heads)
    found = measure(small) if acceptance else []
    lost = max((before - after for before, after in zip(acceptance, found, strict=True)), default=0.0)
    if store == "auto" and lost > MOST_LOST:
        tell(
            f"weights are stored in bf16: in 8 bits acceptance is {_depths(found)}, not {_depths(acceptance)}"
        )
        return heads, acceptance
    if found:
        tell(f"weights are stored in 8 bits: acceptance is {_depths(found)}, before {_depths(acceptance)}")
    return small, found


def _depths(acceptance: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in acceptance)
