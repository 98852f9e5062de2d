"""Pass 2 over a whole layout, for tests: the slices of `slot_pass` put together, with gradients."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.slots.layout import SlotLayout
from mtp_mlx.drafters.slots.two_pass import Prefix, slot_pass
from mtp_mlx.model.attach import AttachedModel


def whole_pass(
    attached: AttachedModel,
    layout: SlotLayout,
    prefix: Prefix,
    uniforms: np.ndarray | None = None,
    most_rows: int | None = None,
) -> mx.array:
    """Hidden states of all supervised slot rows, [M, D]."""
    parts = layout.parts(most_rows)
    return mx.concatenate([slot_pass(attached, layout, prefix, part, uniforms) for part in parts])
