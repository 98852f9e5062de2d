"""Proves that a step of MTP heads in slices has the loss and the gradients of one without, whatever their size."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_mlx.drafters.heads.loss import MTPDistil
from mtp_mlx.train.plan import WHOLE, StepPlan
from tests.drafters.heads.test_step import ROWS, attached_llama, flat, runner

SHAPES: dict[str, dict[str, Any]] = {
    "three heads": {"count": 3},
    "one shared head": {"count": 1, "drafts": 3, "layers": 2, "taps": (1, 2)},
}
WITHOUT: dict[str, Any] = {}  # results without slices, by shape


def step(shape: str, plan: StepPlan) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Loss with its parts, and gradients, of a micro-batch of which some positions are trained."""
    mx.random.seed(0)
    distil = MTPDistil(top_share=0.25, decay=0.8)
    with closing(runner(attached_llama(**SHAPES[shape]), distil, share=0.7, plan=plan)) as steps:
        loss, gradients, _ = steps([[*ROWS, *ROWS[:2]]], 3)
        values = {"total": loss.total, **loss.parts}
        found = {name: float(value.item()) for name, value in values.items()}
        return found, {name: value.astype(np.float64) for name, value in flat(gradients).items()}


@pytest.mark.parametrize("shape", SHAPES)
@settings(max_examples=6, deadline=None)
@given(slice_rows=st.integers(1, 120))
def test_slices_change_nothing(shape: str, slice_rows: int) -> None:
    if shape not in WITHOUT:
        WITHOUT[shape] = step(shape, WHOLE)
    loss, gradients = WITHOUT[shape]
    found, sliced = step(shape, StepPlan(slice_rows))
    assert found == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        difference = np.linalg.norm(sliced[name] - gradient)
        assert difference <= 1e-5 * np.linalg.norm(gradient) + 1e-9, name
