"""Proves that a step in slices has the loss and the gradients of one without, for every method of slots, whatever
the size of the slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mtp_mlx.drafters.masks.losses import Apple, SelfDistil
from mtp_mlx.drafters.masks.online_loss import Online
from mtp_mlx.drafters.masks.online_step import OnlineRunner
from mtp_mlx.drafters.masks.step import StepRunner
from mtp_mlx.drafters.ptp.config import PTPConfig
from mtp_mlx.drafters.ptp.loss import PTPLoss
from mtp_mlx.drafters.ptp.step import PTPRunner
from mtp_mlx.drafters.ptp.targets import UniformChoice
from mtp_mlx.drafters.ptp.weights import new_ptp_adapter
from mtp_mlx.drafters.slots.layout import build_layout
from mtp_mlx.drafters.slots.step import BlockChoice
from mtp_mlx.model.attach import attach
from mtp_mlx.train.draft_vocabulary import draft_columns
from mtp_mlx.train.plan import WHOLE, StepPlan
from mtp_mlx.train.step import MicroBatchRunner
from tests.model.naive import random_adapter
from tests.tiny import tiny_model
from tests.train.training import examples

SLOTS = 3
IDS = list(range(0, 150, 2))


def frozen(architecture: str) -> Any:
    model = tiny_model(architecture, seed=3)
    model.freeze()
    return model


def masks(objective: Any, lengths: Any = "fixed") -> Callable[[StepPlan, int], MicroBatchRunner]:
    def runner(plan: StepPlan, chunk_blocks: int) -> MicroBatchRunner:
        model = frozen("qwen3")
        attached = attach(model, random_adapter(model, draft_ids=mx.array(IDS, dtype=mx.int32)))
        choice = BlockChoice(slots=SLOTS, chunk_blocks=chunk_blocks, depth_decay=0.8, lengths=lengths)
        return StepRunner(attached, objective, choice, seed=0, plan=plan)

    return runner


def ptp(loss: PTPLoss, variant: Any) -> Callable[[StepPlan, int], MicroBatchRunner]:
    def runner(plan: StepPlan, chunk_blocks: int) -> MicroBatchRunner:
        model = frozen("llama")
        mx.random.seed(5)
        adapter = new_ptp_adapter(model, PTPConfig(variant=variant, slots=SLOTS, rank=4, alpha=8.0))
        choice = BlockChoice(slots=SLOTS, chunk_blocks=chunk_blocks)
        uniforms = UniformChoice(greedy_share=0.3)  # own uniforms would follow from the rounding of logits
        return PTPRunner(attach(model, adapter), loss, choice, uniforms, seed=0, plan=plan)

    return runner


def online(supervision: Any) -> Callable[[StepPlan, int], MicroBatchRunner]:
    def runner(plan: StepPlan, chunk_blocks: int) -> MicroBatchRunner:
        model = frozen("qwen3")
        attached = attach(model, random_adapter(model, slots=SLOTS, sampler_width=0, shared_mask=True))
        objective = Online(supervision, mx.array(draft_columns(attached)))
        return OnlineRunner(attached, objective, SLOTS + 1, 6, 0, chunk_blocks, plan=plan)

    return runner


METHODS = {
    "self-distill": masks(SelfDistil(lcm_weight=0.3)),
    "apple": masks(Apple(lcm_weight=0.7)),
    "blocks of random length": masks(SelfDistil(lcm_weight=0.3), "random"),
    "o-ptp": ptp(PTPLoss("ce"), "o"),
    "c-ptp": ptp(PTPLoss("kl"), "c"),
    "c-ptp, reverse": ptp(PTPLoss("reverse-kl", 0.8), "c"),
    "conf-adapt, hard": online("hard-teacher"),
    "conf-adapt, soft": online("soft-teacher"),
    "conf-adapt, text": online("ground-truth"),
}


def step(runner: MicroBatchRunner) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Loss with its parts, and gradients, of two micro-batches."""
    rows = examples(4)
    loss, gradients, _ = runner([rows[0:2], rows[2:4]], step=1)
    mx.eval(loss.total, loss.parts, gradients)
    values = {"total": loss.total, **loss.parts}
    return (
        {name: float(value.item()) for name, value in values.items()},
        {name: np.array(value, dtype=np.float64) for name, value in tree_flatten(gradients)},
    )


WITHOUT: dict[str, Any] = {}  # results without slices, by method


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=8, deadline=None)
@given(slice_rows=st.integers(SLOTS, 60), chunk_blocks=st.integers(1, 6))
def test_slices_change_nothing(method: str, slice_rows: int, chunk_blocks: int) -> None:
    if method not in WITHOUT:
        WITHOUT[method] = step(METHODS[method](WHOLE, 16))
    loss, gradients = WITHOUT[method]
    plan = StepPlan(slice_rows)
    found, sliced = step(METHODS[method](plan, chunk_blocks))
    assert found == pytest.approx(loss, rel=1e-5)
    assert sliced.keys() == gradients.keys()
    for name, gradient in gradients.items():
        difference = np.linalg.norm(sliced[name] - gradient)
        assert difference <= 1e-5 * np.linalg.norm(gradient) + 1e-9, name


def test_slices_are_small_and_none_is_missing() -> None:
    """Every supervised row is in one slice, in order; no slice has more rows than allowed, or two sequences."""
    sequences = [list(range(3, 40)), list(range(3, 12)), [5, 6, 7]]
    anchors = [np.arange(2, 30, dtype=np.int32), np.array([1, 4], dtype=np.int32), np.zeros(0, np.int32)]
    layout = build_layout(sequences, anchors, SLOTS, chunk_blocks=4)
    for most in (None, 1, 12, 24, 1000):
        parts = layout.parts(most)
        rows = [row for part in parts for row in range(part.rows.start, part.rows.stop)]
        assert rows == list(range(len(layout.rows)))
        for part in parts:
            assert most is None or part.count * layout.chunk_rows <= max(most, layout.chunk_rows)
            inside = range(part.sequence * layout.chunks, (part.sequence + 1) * layout.chunks)
            assert part.chunks.start in inside and part.chunks.stop - 1 in inside
        assert {part.sequence for part in parts} == {0, 1}, "the third has no anchor"
