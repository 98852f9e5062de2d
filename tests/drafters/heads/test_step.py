"""Proves loss and gradients of MTP heads against numpy in float64, and that a step is the same however it is cut."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mtp_mlx.drafters.heads.agreement import measure_heads
from mtp_mlx.drafters.heads.cascade import MTPHeads, new_heads
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.layout import build_head_layout, can_supervise
from mtp_mlx.drafters.heads.loss import MTPDistil
from mtp_mlx.drafters.heads.step import HeadsRunner, chunked_loss, head_rows, summary
from mtp_mlx.drafters.heads.teacher import teacher_targets
from mtp_mlx.drafters.heads.trunk_states import ComputedStates
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.train.data import Example
from mtp_mlx.train.draft_vocabulary import draft_columns
from mtp_mlx.train.plan import StepPlan
from tests.drafters.heads import naive_heads
from tests.drafters.heads.naive_heads import Knobs
from tests.tiny import VOCABULARY, tiny_model

DRAFTED = list(range(0, VOCABULARY, 2))
ROWS = [Example([5, 9, 2, 77, 140, 3, 9, 21], 3), Example([8, 30, 12, 8, 30], 1), Example([4, 6, 100], 2)]


def heads_for(
    model: Any, count: int, drafted: list[int] | None = None, seed: int = 0, noise: float = 0.2, **shape: Any
) -> MTPHeads:
    """Heads none of whose weights is symmetric."""
    convention = HeadConvention("test")
    heads = new_heads(
        model, count, convention, None if drafted is None else mx.array(drafted, dtype=mx.int32), **shape
    )
    rng = np.random.default_rng(seed)
    moved = [
        (name, value + mx.array(noise * rng.normal(size=value.shape).astype(np.float32)))
        for name, value in tree_flatten(heads.parameters())
    ]
    heads.load_weights(moved)
    return heads


def attached_llama(count: int, drafted: list[int] | None = DRAFTED, **shape: Any) -> AttachedModel:
    model = tiny_model("llama", seed=3)
    model.freeze()
    return attach(model, heads_for(model, count, drafted, **shape))


def runner(attached: AttachedModel, distil: MTPDistil, **options: Any) -> HeadsRunner:
    assert attached.speculator is not None
    depths = options.pop("depths", range(1, 1 + attached.speculator.drafts))
    return HeadsRunner(attached, distil, depths, 0, ComputedStates(attached), **options)


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(tree)}


def layer_by_layer(trunk: Any, tokens: list[int], taps: tuple[int, ...]) -> np.ndarray:
    """[T, (n + 1) * D] float64: what the layers `taps` (from 1) return, and the trunk's last state."""
    x = trunk.embed_tokens(mx.array([tokens]))
    mask = mx.tril(mx.ones((len(tokens), len(tokens)), dtype=mx.bool_))
    found = []
    for number, layer in enumerate(trunk.layers, start=1):
        x = layer(x, mask, None)
        found += [x] if number in taps else []
    return np.array(mx.concatenate([*found, trunk.norm(x)], axis=-1)[0]).astype(np.float64)


def naive(
    attached: AttachedModel, weights: dict[str, np.ndarray], rows: list[Example], **options: Any
) -> float:
    """The same loss by `naive_heads`; each sequence goes through the trunk alone, without padding."""
    embed = np.array(attached.model.model.embed_tokens.weight).astype(np.float64)
    heads = attached.speculator
    assert heads is not None
    hidden = [layer_by_layer(attached.model.model, row.tokens, heads.tapped_layers) for row in rows]
    return naive_heads.loss(
        weights,
        sequences=[(row.tokens, row.loss_start) for row in rows],
        embeddings=[embed[row.tokens] for row in rows],
        hidden=hidden,
        head=np.array(attached.model.lm_head.weight).astype(np.float64),
        **options,
    )


KNOBS = {
    "mtp-d": Knobs(),
    "ce": Knobs(kl=0.0, decay=0.6),
    "kl": Knobs(ce=0.0, share=1.0, temperature=2.0),
    "mixed": Knobs(ce=0.3, kl=1.5, share=0.05, temperature=0.7, decay=0.8),
}


@pytest.mark.parametrize(
    ("count", "knobs", "chunk_rows"),
    [(1, "mtp-d", 512), (2, "ce", 4), (3, "mixed", 5), (4, "kl", 7), (4, "mtp-d", 3)],
)
def test_loss_and_gradients_equal_numpy_in_float64(count: int, knobs: str, chunk_rows: int) -> None:
    """The gradient of every tensor along a random direction, against central differences of the naive loss."""
    knob = KNOBS[knobs]
    attached = attached_llama(count)
    distil = MTPDistil(knob.ce, knob.kl, knob.share, knob.temperature, knob.decay)
    with closing(runner(attached, distil, chunk_rows=chunk_rows)) as step:
        loss, gradients, rows = step([ROWS], 0)
    assert rows == sum(
        max(0, len(row) - max(row.loss_start, k + 1)) for row in ROWS for k in range(1, count + 1)
    )
    assert attached.speculator is not None
    weights = {
        name: value.astype(np.float64) for name, value in flat(attached.speculator.parameters()).items()
    }
    common = {"count": count, "drafted": DRAFTED, "knobs": knob}
    assert loss.total.item() == pytest.approx(naive(attached, weights, ROWS, **common), rel=1e-5)
    found = flat(gradients)
    assert found.keys() == weights.keys()
    rng = np.random.default_rng(1)
    for name, gradient in found.items():
        direction = rng.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        step_size = 1e-4
        up, down = (
            naive(attached, {**weights, name: weights[name] + sign * step_size * direction}, ROWS, **common)
            for sign in (1, -1)
        )
        expected = (up - down) / (2 * step_size)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=2e-3, abs=2e-5), name


@pytest.mark.parametrize(
    ("count", "drafts", "layers", "taps"), [(1, 3, 1, ()), (2, 2, 2, ()), (1, 3, 2, (1, 2)), (2, 4, 1, (1,))]
)
def test_shapes_equal_numpy_in_float64(count: int, drafts: int, layers: int, taps: tuple[int, ...]) -> None:
    """One head for all drafts, several layers, lower layers' states: each tensor along a random direction."""
    knob = Knobs(share=0.1, decay=0.8)
    attached = attached_llama(count, drafts=drafts, layers=layers, taps=taps)
    distil = MTPDistil(knob.ce, knob.kl, knob.share, knob.temperature, knob.decay)
    with closing(runner(attached, distil, chunk_rows=5)) as step:
        loss, gradients, _ = step([ROWS], 0)
    assert set(loss.parts) == {"ce", "kl", *(f"head {depth}" for depth in range(1, drafts + 1))}
    assert attached.speculator is not None
    weights = {
        name: value.astype(np.float64) for name, value in flat(attached.speculator.parameters()).items()
    }
    common = {"count": drafts, "drafted": DRAFTED, "knobs": knob}
    assert loss.total.item() == pytest.approx(naive(attached, weights, ROWS, **common), rel=1e-5)
    found, rng = flat(gradients), np.random.default_rng(1)
    assert found.keys() == weights.keys()
    for name, gradient in found.items():
        direction = rng.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        up, down = (
            naive(attached, {**weights, name: weights[name] + sign * 1e-4 * direction}, ROWS, **common)
            for sign in (1, -1)
        )
        expected = (up - down) / 2e-4
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=5e-3, abs=5e-5), name


def test_heads_without_a_loss_get_no_gradient() -> None:
    """Later depths alone, the earlier heads frozen, as looped extension trains them."""
    attached = attached_llama(4)
    assert attached.speculator is not None
    for head in attached.speculator.heads[:2]:
        head.freeze()
    knobs = Knobs(decay=0.7)
    with closing(runner(attached, MTPDistil(1.0, 1.0, 0.25, 1.0, 0.7), depths=[3, 4])) as step:
        loss, gradients, _ = step([ROWS], 0)
    weights = {
        name: value.astype(np.float64) for name, value in flat(attached.speculator.parameters()).items()
    }
    expected = naive(attached, weights, ROWS, count=4, drafted=DRAFTED, knobs=knobs, trained_from=3)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert set(loss.parts) == {"ce", "kl", "head 3", "head 4"}
    assert {name.split(".")[1] for name in flat(gradients)} == {"2", "3"}


def test_a_student_equal_to_its_teacher_loses_nothing() -> None:
    """States of the trunk, shifted to the rows of each head, in place of the heads' own: the distillation is 0; at
    any other shift it is not."""
    attached = attached_llama(3)
    distil = MTPDistil(ce_weight=0.0, top_share=0.25)
    hidden = ComputedStates(attached)(ROWS)
    layout = build_head_layout(ROWS, [1, 2, 3])
    rows = head_rows(layout, draft_columns(attached), distil, [1, 2, 3])
    teacher = teacher_targets(attached, hidden, layout, distil)

    def loss(shift: int) -> list[float]:
        length = hidden.shape[1]
        pieces = []
        for depth, own in zip(layout.depths, layout.rows, strict=True):
            sequence, position = np.divmod(own, length - depth)
            pieces.append(hidden[mx.array(sequence), mx.array(position + depth + shift)])
        _, parts = chunked_loss(attached, distil, mx.concatenate(pieces), rows, teacher, 4)
        found = summary(distil, rows, parts)
        return [found.parts[f"head {depth}"].item() for depth in (1, 2, 3)]

    assert max(np.abs(loss(0))) < 1e-5
    assert min(loss(-1)) > 0.1


def test_chunks_workers_and_padding_change_nothing() -> None:
    """The same loss and gradients with few rows of logits at a time, and with the batch on two threads."""
    rows = [[ROWS[0], ROWS[1]], [ROWS[2], ROWS[0]]]
    results = []
    plans = {"plan": StepPlan(workers=2)}, {"plan": StepPlan(1)}, {"plan": StepPlan(20, workers=2)}
    for options in ({}, {"chunk_rows": 2}, *plans):
        with closing(runner(attached_llama(3), MTPDistil(top_share=0.25), **options)) as step:
            loss, gradients, _ = step(rows, 3)
            results.append((loss.total.item(), flat(gradients)))
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(gradient, results[0][1][name], rtol=1e-3, atol=1e-5)


def test_logits_of_one_chunk_at_a_time() -> None:
    """The loss and its gradient over many rows take the memory of a chunk's logits, not of all rows'."""
    attached = attached_llama(2, None)
    distil = MTPDistil()
    examples = [Example(np.random.default_rng(n).integers(0, VOCABULARY, 300).tolist(), 1) for n in range(4)]
    layout = build_head_layout(examples, [1, 2])
    rows = head_rows(layout, draft_columns(attached), distil, [1, 2])
    teacher = teacher_targets(attached, ComputedStates(attached)(examples), layout, distil)
    states = mx.random.normal((layout.count, attached.hidden_size), key=mx.random.key(0))
    mx.eval(states, rows.weight, rows.target, rows.label)

    def peak(chunk_rows: int) -> int:
        def loss(states: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
            return chunked_loss(attached, distil, states, rows, teacher, chunk_rows)

        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.value_and_grad(loss)(states))
        return mx.get_peak_memory() - before

    whole = peak(layout.count)
    assert whole > 2 * layout.count * VOCABULARY * 4
    assert peak(100) < 0.35 * whole


@given(
    rows=st.lists(st.tuples(st.integers(3, 12), st.integers(0, 9)), min_size=1, max_size=3),
    depths=st.sampled_from([[1], [1, 2], [1, 2, 3, 4], [3, 4]]),
    share=st.sampled_from([0.3, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_layout(rows: list[tuple[int, int]], depths: list[int], share: float) -> None:
    """Every supervised row by its definition; with a share, some of them, the same ones for a seed."""
    examples = [
        Example([10 * n + j for j in range(length)], min(start, length - 1))
        for n, (length, start) in enumerate(rows)
    ]
    expected = {
        (n, k, i)
        for n, example in enumerate(examples)
        for k in depths
        for i in range(len(example))
        if example.loss_start <= i + k + 1 < len(example)
    }
    assert bool(expected) == any(can_supervise(example, depths) for example in examples)
    if not expected:
        with pytest.raises(ValueError, match="no supervised row"):
            build_head_layout(examples, depths)
        return

    def laid_out() -> Any:
        return build_head_layout(examples, depths, share, np.random.default_rng(5))

    layout, again = laid_out(), laid_out()
    length = layout.tokens.shape[1]
    found = set()
    for depth, own, target in zip(layout.depths, layout.rows, layout.targets, strict=True):
        for row, teacher in zip(own, target, strict=True):
            n, i = divmod(int(row), length - depth)
            found.add((n, depth, i))
            assert layout.teacher_rows[teacher] == n * length + i + depth
            assert layout.label[teacher] == examples[n].tokens[i + depth + 1]
    assert layout.count == len(found) and np.array_equal(layout.teacher_rows, again.teacher_rows)
    assert found == expected if share == 1 else found <= expected


def test_short_responses_leave_far_heads_out_of_the_parts() -> None:
    """A batch that head 3 has no row in counts for the others, and the mean of head 3 is over batches that have."""
    attached = attached_llama(3)
    with closing(runner(attached, MTPDistil(top_share=0.25))) as step:
        whole, _, _ = step([[ROWS[0]]], 0)
        mixed, _, rows = step([[ROWS[0]], [ROWS[2]]], 0)
    assert rows == 5 + 5 + 4 + 1
    assert mixed.parts["head 3"].item() == pytest.approx(whole.parts["head 3"].item(), rel=1e-5)
    assert mixed.parts["head 1"].item() != pytest.approx(whole.parts["head 1"].item(), rel=1e-3)


@pytest.mark.parametrize("drafted", [None, DRAFTED])
def test_measured_acceptance_is_that_of_a_chain_of_drafts(drafted: list[int] | None) -> None:
    """Against drafting behind every position, head after head on its own drafts, on text that the heads wrote part
    of, so that some drafts are right."""
    attached = attached_llama(3, drafted)
    heads = attached.speculator
    assert heads is not None
    rng = np.random.default_rng(0)
    examples = []
    for start in (1, 2, 4):
        tokens = rng.integers(0, VOCABULARY, 4).tolist()
        for _ in range(4):
            tokens.append(rng.integers(0, VOCABULARY).item())
            tokens += chain(attached, tokens, 2)
        examples.append(Example(tokens, start))
    depths = 5  # more than there are heads: they are applied again in turn
    accepted, submitted = np.zeros(depths), np.zeros(depths)
    for example in examples:
        for i in range(example.loss_start - 1, len(example) - 1 - depths):
            drafts = chain(attached, example.tokens[: i + 2], depths)
            for k in range(depths):
                submitted[k] += 1
                if drafts[k] != example.tokens[i + 2 + k]:
                    break
                accepted[k] += 1
    found = measure_heads(attached, [examples[:2], examples[2:]], depths, ComputedStates(attached))
    assert found.blocks == submitted[0] and accepted[1] > 0
    expected = [a / s if s else 0.0 for a, s in zip(accepted, submitted, strict=True)]
    assert found.acceptance == pytest.approx(expected)


def chain(attached: AttachedModel, tokens: list[int], count: int) -> list[int]:
    """Greedy drafts behind `tokens`, whose last one is the target's own pick: everything anew for every draft."""
    heads = attached.speculator
    assert heads is not None
    hidden = attached.model.model(mx.array([tokens[:-1]]))
    known = list(tokens)
    for depth in range(1, count + 1):
        embeddings = attached.embed(mx.array([known]))
        states = mx.pad(hidden, [(0, 0), (0, embeddings.shape[1] - hidden.shape[1]), (0, 0)])
        z = heads.cascade(embeddings, states, depth)[-1][0, len(tokens) - 2]
        column = mx.argmax(attached.draft_head(z[None])[0]).item()
        known.append(column if heads.draft_ids is None else heads.draft_ids[column].item())
    return known[len(tokens) :]


@pytest.mark.parametrize("depths", [[1], [1, 2, 3], [3, 4]])
def test_a_share_of_the_positions_is_drawn_where_some_head_predicts(depths: list[int]) -> None:
    """However short the response and small the share: what has one supervised position keeps one."""
    for loss_start in range(9):
        for length in range(loss_start + 1, loss_start + 8):
            example = Example(list(range(5, 5 + length)), loss_start)
            if can_supervise(example, depths):
                for seed in range(4):
                    assert build_head_layout([example], depths, 0.01, np.random.default_rng(seed)).count > 0
