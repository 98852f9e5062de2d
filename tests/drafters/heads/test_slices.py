"""Proves that a step of MTP heads in slices has the loss and the gradients of one without, whatever their size."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_mlx.drafters.heads.loss import MTPDistil
from mtp_mlx.drafters.heads.step import HeadsRunner
from mtp_mlx.drafters.heads.trunk_states import ComputedStates
from mtp_mlx.train.data import Example
from mtp_mlx.train.plan import WHOLE, StepPlan
from tests.drafters.heads.test_step import ROWS, attached_llama, flat

SHAPES: dict[str, dict[str, Any]] = {
    "three heads": {"count": 3, "noise": 0.03, "layers": 2},
    "one shared head": {"count": 1, "noise": 0.03, "drafts": 3, "layers": 2, "taps": (1, 2)},
}


class Alone(ComputedStates):
    """States of every text by a pass of its own, as a cache has them: the same whatever else is in its slice."""

    def __call__(self, examples: Sequence[Example]) -> mx.array:
        longest = max(len(example) for example in examples)
        found = [ComputedStates.__call__(self, [example])[0] for example in examples]
        return mx.stack([mx.pad(own, [(0, longest - len(own)), (0, 0)]) for own in found])


WITHOUT: dict[str, Any] = {}  # results without slices, by shape


def step(shape: str, plan: StepPlan) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Loss with its parts, and gradients, of a micro-batch of which some positions are trained."""
    mx.random.seed(0)
    attached, distil = attached_llama(**SHAPES[shape]), MTPDistil(top_share=0.25, decay=0.8)
    depths = range(1, 1 + attached.speculator.drafts)  # type: ignore[union-attr]
    with closing(HeadsRunner(attached, distil, depths, 0, Alone(attached), share=0.7, plan=plan)) as steps:
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
    assert sliced.keys() == gradients.keys()
    size = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
    difference = np.sqrt(sum(np.sum((sliced[name] - gradients[name]) ** 2) for name in gradients))
    assert difference <= 1e-5 * size
