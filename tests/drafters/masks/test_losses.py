"""Proves both objectives against loops in float64 numpy: values, gradients, chunks, draft vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.drafters.masks.losses import Apple, SelfDistil, SlotBatch
from mtp_mlx.drafters.masks.step import row_weights, slot_batch, teacher_targets
from mtp_mlx.drafters.slots.layout import build_layout
from mtp_mlx.drafters.slots.two_pass import prefix_pass, slot_pass
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.train.draft_vocabulary import draft_columns
from mtp_mlx.train.loss import LossParts, hard_cross_entropy, soft_cross_entropy
from tests.model.naive import random_adapter
from tests.tiny import VOCABULARY, tiny_model

IDS = sorted(np.random.default_rng(9).permutation(VOCABULARY)[:40].tolist())
ROWS, TEACHERS, SIZE = 13, 6, 48


def attached(name: str = "llama", ids: list[int] | None = None) -> AttachedModel:
    model = tiny_model(name, seed=3)
    model.freeze()
    return attach(
        model, random_adapter(model, draft_ids=None if ids is None else mx.array(ids, dtype=mx.int32))
    )


def random_batch(model: AttachedModel, seed: int = 0) -> SlotBatch:
    """Rows that differ in everything; one teacher row has no slot, some labels cannot be drafted."""
    rng = np.random.default_rng(seed)
    columns = len(draft_columns(model)[draft_columns(model) >= 0])
    probs = rng.dirichlet(np.ones(columns) * 0.1, TEACHERS) * (0.8 if columns < VOCABULARY else 1.0)
    label, teacher_label = rng.integers(0, columns, ROWS), rng.integers(0, columns, TEACHERS)
    label[[2, 7]] = -1
    teacher_label[3] = -1
    teacher_row = np.array([0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4, 1])
    counts = np.bincount(teacher_row, minlength=TEACHERS)
    weight = rng.uniform(0.2, 1, ROWS).astype(np.float32)
    return SlotBatch(
        hidden=mx.array(rng.normal(size=(ROWS, SIZE)).astype(np.float32)),
        weight=mx.array(weight),
        matching=mx.array((1 / counts[teacher_row] / np.count_nonzero(counts)).astype(np.float32)),
        teacher_row=mx.array(teacher_row),
        previous=mx.array(rng.integers(0, VOCABULARY, ROWS)),
        label=mx.array(label),
        teacher_hidden=mx.array(rng.normal(size=(TEACHERS, SIZE)).astype(np.float32)),
        teacher_probs=mx.array(probs.astype(np.float32)),
        teacher_previous=mx.array(rng.integers(0, VOCABULARY, TEACHERS)),
        teacher_label=mx.array(teacher_label),
        real=mx.arange(TEACHERS),
        weight_sum=float(weight.sum()),
        real_count=TEACHERS,
    )


# --- the second implementation: one row at a time, float64 --------------------------------------------------


class Reference:
    """Heads and losses of one attached model in numpy; `weights` are the sampler head's."""

    def __init__(self, model: AttachedModel, batch: SlotBatch) -> None:
        self.batch = {name: np.array(value, dtype=np.float64) for name, value in vars(batch).items()}
        base = model.model
        ids = (
            np.arange(VOCABULARY)
            if model.speculator.draft_ids is None
            else np.array(model.speculator.draft_ids)
        )
        self.capped = base.model_type == "gemma2"
        table = base.model.embed_tokens.base.weight
        self.table = np.array(table, dtype=np.float64)
        self.head = np.array(table if self.capped else base.lm_head.weight, dtype=np.float64)[ids]
        parameters = tree_flatten(model.speculator.sampler.parameters())
        self.weights = {name: np.array(value, dtype=np.float64) for name, value in parameters}

    def log_probs(self, hidden: np.ndarray) -> np.ndarray:
        logits = self.head @ hidden
        if self.capped:
            logits = 30 * np.tanh(logits / 30)
        return logits - logits.max() - np.log(np.sum(np.exp(logits - logits.max())))

    def refined(self, hidden: np.ndarray, previous: int) -> np.ndarray:
        """hidden + W2 LayerNorm(SiLU(W1 [unit E[y_prev]; unit hidden] + b1))."""
        w = self.weights
        unit = [x / np.sqrt(np.mean(x**2) + 1e-6) for x in (self.table[previous], hidden)]
        x = w["first.weight"] @ np.concatenate(unit) + w["first.bias"]
        x = x / (1 + np.exp(-x))
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w["norm.weight"] + w["norm.bias"]
        return hidden + w["second.weight"] @ x

    def self_distil(self, lcm_weight: float) -> dict[str, float]:
        b, total = self.batch, {"base": 0.0, "sampler": 0.0}
        for row in range(ROWS):
            probs = b["teacher_probs"][int(b["teacher_row"][row])]
            heads = {
                "base": b["hidden"][row],
                "sampler": self.refined(b["hidden"][row], int(b["previous"][row])),
            }
            for name, hidden in heads.items():
                total[name] -= b["weight"][row] * float(probs @ self.log_probs(hidden))
        parts = {name: value / b["weight"].sum() for name, value in total.items()}
        lcm = self.matching()
        return {**parts, "lcm": lcm, "total": sum(parts.values()) + lcm_weight * lcm}

    def apple(self, lcm_weight: float) -> dict[str, float]:
        b, base, sampler = self.batch, 0.0, 0.0
        for row in range(ROWS):
            label, hidden = int(b["label"][row]), b["hidden"][row]
            if label >= 0:
                base -= b["weight"][row] * self.log_probs(hidden)[label]
                refined = self.refined(hidden, int(b["previous"][row]))
                sampler -= b["weight"][row] * self.log_probs(refined)[label]
        for row in range(TEACHERS):
            label = int(b["teacher_label"][row])
            if label >= 0:
                refined = self.refined(b["teacher_hidden"][row], int(b["teacher_previous"][row]))
                sampler -= self.log_probs(refined)[label]
        norm = b["weight"].sum() + TEACHERS
        parts = {"base": base / norm, "sampler": sampler / norm, "lcm": self.matching()}
        return {**parts, "total": parts["base"] + parts["sampler"] + lcm_weight * parts["lcm"]}

    def matching(self) -> float:
        b, per_anchor = self.batch, []
        for teacher in range(TEACHERS):
            own = [row for row in range(ROWS) if int(b["teacher_row"][row]) == teacher]
            if own:
                anchor = b["teacher_hidden"][teacher]
                distances = [np.mean((anchor - b["hidden"][row]) ** 2) / np.mean(anchor**2) for row in own]
                per_anchor.append(np.mean(distances))
        return float(np.mean(per_anchor))


OBJECTIVES: dict[str, tuple[Callable[..., Any], Callable[[Reference], dict[str, float]]]] = {
    "self-distill": (
        lambda chunk=2048: SelfDistil(lcm_weight=0.3, chunk_rows=chunk),
        lambda reference: reference.self_distil(0.3),
    ),
    "apple": (lambda chunk=2048: Apple(0.7, chunk_rows=chunk), lambda reference: reference.apple(0.7)),
}
CASES = [("llama", None), ("llama", IDS), ("gemma2", IDS)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("name", "ids"), CASES, ids=["llama", "llama-draft", "gemma2-draft"])
def test_values_against_numpy(name: str, ids: list[int] | None, objective: str) -> None:
    model = attached(name, ids)
    batch = random_batch(model)
    make, reference = OBJECTIVES[objective]
    loss = make()(model, batch)
    expected = reference(Reference(model, batch))
    for part, value in loss.parts.items():
        assert value.item() == pytest.approx(expected[part], rel=1e-5), part
    assert loss.total.item() == pytest.approx(expected["total"], rel=1e-5)


def gradients(
    model: AttachedModel, batch: SlotBatch, objective: Callable[[AttachedModel, SlotBatch], LossParts]
) -> dict[str, mx.array]:
    """Gradients in the latents and in every weight of the sampler head."""
    adapter = model.speculator
    assert adapter is not None
    parameters = adapter.trainable_parameters()
    in_hidden = mx.grad(lambda hidden: objective(model, replace(batch, hidden=hidden)).total)(batch.hidden)
    _, in_adapter = nn.value_and_grad(adapter, lambda: objective(model, batch).total)()
    adapter.update(parameters)
    mx.eval(in_hidden, in_adapter)
    return {"hidden": in_hidden, **dict(tree_flatten(in_adapter["sampler"]))}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("name", "ids"), CASES, ids=["llama", "llama-draft", "gemma2-draft"])
def test_gradients_against_differences_in_float64(name: str, ids: list[int] | None, objective: str) -> None:
    model = attached(name, ids)
    batch = random_batch(model)
    make, reference = OBJECTIVES[objective]
    rng, step = np.random.default_rng(1), 1e-6
    found = gradients(model, batch, make())
    assert found.keys() == {
        "hidden", "first.weight", "first.bias", "norm.weight", "norm.bias", "second.weight"
    }  # fmt: skip
    for part, gradient in found.items():
        direction = rng.normal(size=gradient.shape)

        def moved(step: float, part: str = part, direction: np.ndarray = direction) -> float:
            second = Reference(model, batch)
            owner = second.batch if part == "hidden" else second.weights
            owner[part] = owner[part] + step * direction
            return reference(second)["total"]

        slope = (moved(step) - moved(-step)) / (2 * step)
        assert float(np.sum(np.array(gradient) * direction)) == pytest.approx(slope, rel=2e-3, abs=1e-4), part


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunk_rows", [1, 4, 12])
def test_chunks_change_nothing(objective: str, chunk_rows: int) -> None:
    """Value and every gradient of 13 rows in chunks equal those of all rows at once; the last chunk is short."""
    model = attached("llama", IDS)
    batch = random_batch(model)
    make, _ = OBJECTIVES[objective]
    whole, chunked = make()(model, batch), make(chunk_rows)(model, batch)
    assert chunked.total.item() == pytest.approx(whole.total.item(), rel=1e-6)
    expected, found = gradients(model, batch, make()), gradients(model, batch, make(chunk_rows))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert mx.abs(gradient).max().item() > 0
        np.testing.assert_allclose(np.array(gradient), np.array(expected[name]), rtol=1e-4, atol=1e-6)


def test_a_student_that_is_the_shifted_teacher_has_no_divergence() -> None:
    """Slots with the latents of the real rows they imitate, and a sampler head that adds nothing: KL is 0."""
    model = attached("llama")
    assert model.speculator is not None
    model.speculator.sampler.second.weight = mx.zeros_like(model.speculator.sampler.second.weight)
    layout = build_layout([list(range(3, 20))], [np.arange(2, 10, dtype=np.int32)], 3, 4)
    columns = draft_columns(model)
    prefix = prefix_pass(model, layout)
    (part,) = layout.parts()
    targets, weights = teacher_targets(model, layout, prefix, columns, part), row_weights(layout, 0.5)
    batch = slot_batch(prefix.hidden[mx.array(layout.target)], layout, part, targets, weights, columns)
    loss = SelfDistil()(model, batch)
    probs = np.array(batch.teacher_probs, dtype=np.float64)[np.array(batch.teacher_row)]
    entropy = -np.sum(probs * np.log(np.maximum(probs, 1e-300)), axis=1)
    expected = float(np.average(entropy, weights=np.array(batch.weight)))
    assert loss.parts["base"].item() == pytest.approx(expected, abs=1e-5)
    assert loss.parts["sampler"].item() == pytest.approx(expected, abs=1e-5)
    assert Apple()(model, batch).parts["lcm"].item() == 0
    student = slot_pass(model, layout, prefix, part)
    assert SelfDistil()(model, replace(batch, hidden=student)).parts["base"].item() > expected + 0.1


@pytest.mark.parametrize("ids", [None, IDS], ids=["whole", "draft"])
def test_teacher_is_the_base_model_at_the_row_that_predicts_the_token(ids: list[int] | None) -> None:
    """Softmax over the whole vocabulary, then the draft columns; two sequences, in chunks of three rows."""
    model = attached("qwen3", ids)
    sequences = [[5, 9, 31, 77, 140, 20, 21, 3], [8, 2, 156, 40, 61]]
    layout = build_layout(sequences, [np.array([1, 3]), np.array([0])], 2, 2)
    columns = draft_columns(model)
    prefix, weights = prefix_pass(model, layout), row_weights(layout, 0.5)
    parts = layout.parts()
    assert [(part.rows.start, part.rows.stop) for part in parts] == [(0, 4), (4, 6)]
    every = []
    for part in parts:
        targets = teacher_targets(model, layout, prefix, columns, part, chunk_rows=3)
        count = part.rows.stop - part.rows.start
        batch = slot_batch(mx.zeros((count, SIZE)), layout, part, targets, weights, columns)
        every += [(batch, row) for row in range(count)]
    bare = tiny_model("qwen3", seed=3)
    used = list(range(VOCABULARY)) if ids is None else ids
    expected = [(0, 1, 1), (0, 1, 2), (0, 3, 1), (0, 3, 2), (1, 0, 1), (1, 0, 2)]  # sequence, anchor, slot
    for (batch, row), (sequence, anchor, slot) in zip(every, expected, strict=True):
        position = anchor + slot
        probs = mx.softmax(bare(mx.array([sequences[sequence]]))[0, position])[mx.array(used)]
        teacher = int(batch.teacher_row[row].item())
        np.testing.assert_allclose(
            np.array(batch.teacher_probs[teacher]), np.array(probs), rtol=1e-4, atol=1e-6
        )
        following = sequences[sequence][position + 1]
        column = used.index(following) if following in used else -1
        assert batch.label[row].item() == batch.teacher_label[teacher].item() == column
        assert (
            batch.previous[row].item()
            == batch.teacher_previous[teacher].item()
            == sequences[sequence][position]
        )
        assert batch.weight[row].item() == 0.5 ** (slot - 1)


def test_draft_columns_number_the_draft_vocabulary() -> None:
    columns = draft_columns(attached("llama", IDS))
    assert columns[IDS].tolist() == list(range(len(IDS)))
    assert np.sum(columns == -1) == VOCABULARY - len(IDS)
    assert draft_columns(attached("llama")).tolist() == list(range(VOCABULARY))


def test_row_losses_of_known_answers() -> None:
    """Uniform logits cost log C per unit of teacher mass; a label of -1 costs nothing."""
    logits = mx.zeros((2, 8))
    probs = mx.array([[0.5, 0.5, *[0.0] * 6], [0.25, *[0.0] * 7]])
    np.testing.assert_allclose(
        np.array(soft_cross_entropy(logits, probs)), np.log(8) * np.array([1, 0.25]), rtol=1e-6
    )
    np.testing.assert_allclose(
        np.array(hard_cross_entropy(logits, mx.array([3, -1]))), [np.log(8), 0], rtol=1e-6
    )
