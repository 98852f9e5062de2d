"""PTP's training: slots of a joint layout against one causal pass per block, uniforms that pick the text's tokens,
losses against plain numpy, what is left out of the loss, and draws that repeat."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.drafters.ptp.config import PTPConfig, TeacherSampling
from mtp_mlx.drafters.ptp.inverse_ar import InverseAR, JointLayout, inverse_ar_losses, own_uniforms
from mtp_mlx.drafters.ptp.loss import PTPLoss, divergence
from mtp_mlx.drafters.ptp.own_uniforms import with_own_uniforms
from mtp_mlx.drafters.ptp.step import PTPRunner
from mtp_mlx.drafters.ptp.targets import UniformChoice, slot_targets
from mtp_mlx.drafters.ptp.uniform_embedding import NOTHING, UNIFORM_EMBEDDINGS
from mtp_mlx.drafters.ptp.uniforms import (
    TeacherRows,
    carried_uniforms,
    known_so_far,
    picker_of,
    teacher_rows,
    text_uniforms,
)
from mtp_mlx.drafters.slots.layout import SlotLayout, build_layout
from mtp_mlx.drafters.slots.step import BlockChoice
from mtp_mlx.drafters.slots.two_pass import prefix_pass
from mtp_mlx.metal_kernels.inverse_cdf import interval, inverse_cdf
from mtp_mlx.model.attach import AttachedModel, attach
from mtp_mlx.model.block import Block
from mtp_mlx.train.data import Example
from tests.drafters.ptp.ptp_fakes import random_ptp_adapter
from tests.drafters.slots.passes import whole_pass
from tests.tiny import VOCABULARY, tiny_model

SLOTS = 3
RNG = np.random.default_rng(4)
SEQUENCES = [RNG.integers(3, VOCABULARY, length).tolist() for length in (13, 7, 10)]
ANCHORS = [np.array(own, dtype=np.int32) for own in ([2, 3, 5, 8, 10], [4], [0, 7])]


def dressed(architecture: str, **config: Any) -> AttachedModel:
    model = tiny_model(architecture, seed=3)
    return attach(model, random_ptp_adapter(model, **{"slots": SLOTS, **config}))


def layout_for(lead: int, chunk_blocks: int = 2) -> SlotLayout:
    return build_layout(SEQUENCES, ANCHORS, SLOTS, chunk_blocks, lead)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("variant", ["o", "c"])
def test_slot_rows_are_those_of_decoding(architecture: str, variant: str) -> None:
    """Pass 2's latents equal a decoding step's over each prefix alone, with the uniforms of the same positions."""
    attached = dressed(architecture, variant=variant)
    lead = attached.speculator.config.lead  # type: ignore[union-attr]
    layout = layout_for(lead)
    values = np.random.default_rng(1).random(layout.tokens.shape).astype(np.float32)
    prefix = prefix_pass(attached, layout)
    found = np.array(whole_pass(attached, layout, prefix, carried_uniforms(layout, values)))
    expected, sequence_rows = [], []
    for s, (sequence, own) in enumerate(zip(SEQUENCES, ANCHORS, strict=True)):
        for anchor in own:
            slots = [i for i in range(SLOTS + lead) if anchor + i + 2 - lead < len(sequence)]
            stands = np.array([anchor + i + 1 - lead for i in range(SLOTS + lead)])
            ids = [*sequence[: anchor + 1], *[attached.vocab_size] * len(stands)]
            rows = len(ids)
            block = Block(
                ids=mx.array([ids]),
                n_real=int(anchor) + 1,
                positions=mx.array(np.concatenate([np.arange(anchor + 1), stands]).astype(np.int32)),
                visibility=mx.tril(mx.ones((rows, rows), dtype=mx.bool_)),
                uniforms=mx.array(values[s, np.minimum(stands + lead, values.shape[1] - 1)]),
            )
            hidden = np.array(attached.forward(block, attached.make_cache()))[0, anchor + 1 :]
            expected += [hidden[i] for i in slots]
            sequence_rows += [s * layout.tokens.shape[1] + anchor + i + 1 - lead for i in slots]
    assert layout.target.tolist() == sequence_rows
    np.testing.assert_allclose(found, np.array(expected), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("lead", [0, 1])
def test_layout_of_blocks_with_a_lead(lead: int) -> None:
    """Depth 0 is the lead; labels, previous tokens and targets are those of the token at anchor + depth + 1."""
    layout = layout_for(lead)
    length = layout.tokens.shape[1]
    expected = [
        (s * length + anchor + depth, depth, sequence[anchor + depth], sequence[anchor + depth + 1])
        for s, (sequence, own) in enumerate(zip(SEQUENCES, ANCHORS, strict=True))
        for anchor in own
        for depth in range(1 - lead, SLOTS + 1)
        if anchor + depth + 1 < len(sequence)
    ]
    found = zip(layout.target, layout.depth, layout.previous, layout.label, strict=True)
    assert [tuple(map(int, row)) for row in found] == expected


TEACHERS = [
    TeacherSampling(),
    TeacherSampling(0.7),
    TeacherSampling(0.9, top_k=40, top_p=0.95),
    TeacherSampling(1.3),
]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_uniforms_pick_the_texts_tokens(teacher: TeacherSampling, beta: float) -> None:
    """Decoding's pick with a drawn uniform is the text's token wherever it is reachable: in all of a text that was
    sampled so, and of foreign text wherever the token has mass."""
    attached, picker = dressed("llama"), picker_of(teacher)
    sampled = list(SEQUENCES[0][:2])
    steps = mtp_generate_step(sampled, attached, max_tokens=11, sampling=replace(picker.config, seed=3))
    sampled += [item.token for item in steps]
    layout = build_layout([sampled, *SEQUENCES[1:]], ANCHORS, SLOTS, 2, 1)
    prefix = prefix_pass(attached, layout)
    rows = teacher_rows(attached, layout, prefix, picker)
    text = text_uniforms(layout, rows, beta, (5, 6))
    assert text.reachable[0, 3:].all()
    scores = picker.scores(attached.head(prefix.hidden[mx.array(rows.rows)]))
    uniforms = text.values.reshape(-1)[rows.rows + 1]
    token = layout.tokens.reshape(-1)[rows.rows + 1]
    picked = np.array(inverse_cdf(scores, mx.array(uniforms)))
    reachable = text.reachable.reshape(-1)[rows.rows + 1]
    mass = np.array(mx.take_along_axis(mx.softmax(scores, axis=-1), mx.array(token)[:, None], axis=-1))[:, 0]
    assert (picked == token)[reachable].all()
    assert (mass[~reachable] < 1e-6).all()
    again = text_uniforms(layout, rows, beta, (5, 6))
    other = text_uniforms(layout, rows, beta, (5, 7))
    assert np.array_equal(text.values, again.values) and not np.array_equal(text.values, other.values)


def test_every_row_that_a_slot_matches_is_covered_once() -> None:
    """Teacher rows: from each anchor to the row before the last predicted token, ascending, none of the padding's."""
    attached = dressed("llama")
    for lead in (0, 1):
        layout = layout_for(lead)
        rows = teacher_rows(attached, layout, prefix_pass(attached, layout), picker_of(TeacherSampling()))
        length = layout.tokens.shape[1]
        wanted = {
            s * length + anchor + i
            for s, (sequence, own) in enumerate(zip(SEQUENCES, ANCHORS, strict=True))
            for anchor in own
            for i in range(SLOTS + 1)
            if anchor + i + 1 < length
        }
        assert rows.rows.tolist() == sorted(wanted)
        assert set(layout.target.tolist()) <= wanted


def test_at_temperature_0_any_uniform_picks_the_likeliest() -> None:
    attached, layout = dressed("llama"), layout_for(0)
    rows = teacher_rows(attached, layout, prefix_pass(attached, layout), picker_of(TeacherSampling(0.0)))
    text = text_uniforms(layout, rows, 1.0, (1,))
    assert np.array_equal(text.reachable, text.greedy)
    assert ((rows.right == 1) == (layout.tokens.reshape(-1)[rows.rows + 1] == rows.likeliest)).all()


def test_places_inside_the_interval_follow_beta() -> None:
    """Beta(0.3, 0.3) puts more mass at the edges than Beta(1, 1), which is even."""
    layout = build_layout([list(range(3, 153))] * 20, [np.arange(140, dtype=np.int32)] * 20, 3, 16)
    flat = np.arange(20 * 150 - 1)
    rows = TeacherRows(
        flat, np.full(len(flat), 0.25), np.full(len(flat), 0.75), np.zeros(len(flat), np.int32)
    )

    def outer_share(beta: float) -> float:
        values = text_uniforms(layout, rows, beta, (0,)).values.reshape(-1)[1:]
        assert (values >= 0.25).all() and (values < 0.75).all()
        return float((np.abs(values - 0.5) > 0.2).mean())

    assert abs(outer_share(1.0) - 0.2) < 0.03 < outer_share(0.3) - 0.2


def test_rows_behind_an_unreachable_token_are_left_out() -> None:
    """Against a loop over rows: every token from the anchor to the predicted one must be known."""
    for lead in (0, 1):
        layout = layout_for(lead)
        known = np.random.default_rng(3).random(layout.tokens.shape) < 0.6
        length = layout.tokens.shape[1]
        for own in (True, False):
            expected = []
            for target, depth in zip(layout.target, layout.depth, strict=True):
                s, predicted = target // length, target % length + 1
                anchor = predicted - depth - 1
                expected.append(known[s, anchor + 1 : predicted + own].all())
            assert known_so_far(layout, known, own).tolist() == expected


def test_micro_batches_count_by_the_rows_that_something_is_learnt_from() -> None:
    """Two texts in one micro-batch or in two: the same step, although nothing of the second can be learnt."""
    attached = dressed("llama", teacher=TeacherSampling(top_k=1), independent=True)
    likely = [item.token for item in mtp_generate_step([4, 5], attached, max_tokens=9)]
    reachable = Example([4, 5, *likely], 2)
    unlikely = [item.token for item in mtp_generate_step([6, 7], attached, max_tokens=1)]
    behind = [(unlikely[0] + 1) % VOCABULARY, 9, 8, 9, 8]  # the first token is not the likeliest
    unreachable = Example([6, 7, *behind], 2)
    runner = PTPRunner(attached, PTPLoss("ce", 1.0, 64), BlockChoice(slots=SLOTS), UniformChoice(), seed=1)
    together, gradients, rows = runner([[reachable, unreachable]], 0)
    apart, other_gradients, other_rows = runner([[reachable], [unreachable]], 0)
    assert rows == other_rows > 0
    np.testing.assert_allclose(apart.total.item(), together.total.item(), rtol=1e-5)
    for (name, one), (_, other) in zip(tree_flatten(gradients), tree_flatten(other_gradients), strict=True):
        np.testing.assert_allclose(np.array(other), np.array(one), rtol=1e-3, atol=2e-5, err_msg=name)
    nothing, gradients, rows = runner([[unreachable], [unreachable]], 0)
    assert rows == 0 and nothing.total.item() == 0
    assert not any(np.array(leaf).any() for _, leaf in tree_flatten(gradients))


def test_greedy_and_independent_blocks_carry_nothing() -> None:
    attached, layout = dressed("llama", variant="c"), layout_for(0)
    rows = teacher_rows(attached, layout, prefix_pass(attached, layout), picker_of(TeacherSampling()))
    text = text_uniforms(layout, rows, 1.0, (1,))
    greedy = np.zeros(layout.anchors.shape, dtype=bool)
    greedy[0, 1] = True
    targets = slot_targets(layout, rows, text, PTPConfig(variant="c", slots=SLOTS), greedy, 0.5)
    per_block = targets.carried.reshape(-1, SLOTS)
    assert (per_block[1] == NOTHING).all() and (per_block[[0, 2]] >= 0).all()
    in_block = layout.rows // SLOTS == 1
    assert targets.greedy.tolist() == in_block.tolist()
    likeliest = rows.likeliest[np.searchsorted(rows.rows, layout.target)]
    assert (targets.label[in_block] == likeliest[in_block]).all()
    assert (targets.label[~in_block] == layout.label[~in_block]).all()
    decay = 0.5 ** (layout.depth - 1.0)
    assert np.isin(targets.weight, [0, 1, 0.5, 0.25]).all() and (targets.weight <= decay).all()
    control = slot_targets(layout, rows, text, PTPConfig(variant="c", independent=True), ~greedy, 1.0)
    assert (control.carried == NOTHING).all()


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_losses_against_numpy(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 6, 11)) * 3
    label, greedy = np.array([0, 3, 10, -1, 5, 5]), np.array([False] * 5 + [True])
    p, q = softmax(student / temperature), softmax(teacher / temperature)
    wanted = {
        "ce": np.where(label >= 0, -np.log(p[np.arange(6), label]), 0.0),
        "kl": (q * np.log(q / p)).sum(-1),
        "reverse-kl": (p * np.log(p / q)).sum(-1),
    }
    for name, expected in wanted.items():
        expected[5] = -np.log(softmax(student)[5, 5])  # rows of temperature 0
        loss = PTPLoss(name, temperature)  # type: ignore[arg-type]
        given = None if name == "ce" else mx.array(teacher.astype(np.float32))
        found = loss.rows_loss(mx.array(student.astype(np.float32)), mx.array(label), mx.array(greedy), given)
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "reverse-kl"])
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(name: Any) -> None:
    logits = mx.array(np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32))
    value, gradient = mx.value_and_grad(lambda z: mx.sum(divergence(logits, z, name)))(logits + 2.5)
    assert abs(value.item()) < 1e-5 and mx.abs(gradient).max().item() < 1e-5


@pytest.mark.parametrize("embedding", UNIFORM_EMBEDDINGS)
def test_gradients_reach_the_embedding_of_uniforms(embedding: Any) -> None:
    """Finite differences in the embedding's weight, of a sum over slot rows."""
    attached, layout = dressed("llama", embedding=embedding, variant="o"), layout_for(1)
    adapter = attached.speculator
    assert adapter is not None
    prefix = prefix_pass(attached, layout)
    mx.eval(prefix.arrays())
    values = np.random.default_rng(1).random(layout.tokens.shape).astype(np.float32)
    carried = carried_uniforms(layout, values)
    weights = mx.array(RNG.normal(size=(len(layout.rows), attached.hidden_size)).astype(np.float32))
    attached.model.freeze()
    adapter.unfreeze()
    module = adapter.slot_module
    value = module.weight

    def of(candidate: mx.array) -> mx.array:
        module.weight = candidate
        return mx.sum(weights * whole_pass(attached, layout, prefix, carried))

    gradient = mx.grad(of)(value)
    direction = mx.array(RNG.normal(size=value.shape).astype(np.float32))
    slope = (of(value + 2e-4 * direction) - of(value - 2e-4 * direction)).item() / 4e-4
    assert mx.sum(gradient * direction).item() == pytest.approx(slope, rel=0.03, abs=0.1)


def test_inverse_ar_uniforms_and_losses_against_one_pass_per_block() -> None:
    """A joint pass gives every slot what a causal pass over its own prefix gives; its uniforms pick the text's tokens
    under the model's own distributions, slot after slot."""
    attached = dressed("llama", variant="c")
    layout = JointLayout(12, np.array([0, 3, 7]), 2)
    tokens = np.random.default_rng(2).integers(3, VOCABULARY, (2, 12)).astype(np.int32)
    uniforms = own_uniforms(attached, layout, tokens, (1, 2))
    assert np.array_equal(uniforms, own_uniforms(attached, layout, tokens, (1, 2)))
    real, slots = inverse_ar_losses(attached, layout, mx.array(tokens), mx.array(uniforms))
    found, per_slot = np.array(slots).reshape(2, 3, 2), uniforms.reshape(2, 3, 2)
    for b in range(2):
        plain = np.array(attached.model(mx.array(tokens[b : b + 1]))[0, :-1].astype(mx.float32))
        expected = -np.log(softmax(plain.astype(np.float64))[np.arange(11), tokens[b, 1:]])
        np.testing.assert_allclose(np.array(real)[b], expected, rtol=1e-3, atol=1e-4)
        for n, anchor in enumerate(layout.anchors):
            block = Block(
                ids=mx.array([[*tokens[b, : anchor + 1].tolist(), VOCABULARY, VOCABULARY]]),
                n_real=int(anchor) + 1,
                uniforms=mx.array(per_slot[b, n]),
            )
            logits = attached.head(attached.forward(block, attached.make_cache()))[0, anchor:]  # [3, V]
            probs = softmax(np.array(logits).astype(np.float64))
            label = tokens[b, anchor + 1 : anchor + 4]
            np.testing.assert_allclose(found[b, n], -np.log(probs[[1, 2], label[1:]]), rtol=1e-3, atol=1e-3)
            through = np.concatenate([[0], np.cumsum(probs[0])])
            if probs[0, label[0]] > 1e-5:  # the row before slot 1 gives its uniform's interval
                assert through[label[0]] - 1e-5 <= per_slot[b, n, 0] <= through[label[0] + 1] + 1e-5


def test_joint_layouts_that_do_not_fit_and_other_adapters_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        JointLayout(6, np.array([4]), 2)
    with pytest.raises(ValueError, match="variant 'c'"):
        InverseAR(dressed("llama", variant="o"), slots=2, anchors=2)


def test_own_uniforms_against_one_block_after_another() -> None:
    """The first slot carries the teacher's uniform, every other one a uniform that picks the text's token under the
    slot before it; rows behind a token that cannot be picked so have no weight, greedy blocks stay as they are."""
    attached, layout, seed = dressed("llama", variant="c"), layout_for(0), (1, 2, 3)
    columns = np.arange(VOCABULARY, dtype=np.int32)
    columns[SEQUENCES[0][6]] = -1  # a token that cannot be drafted
    prefix = prefix_pass(attached, layout)
    picker = picker_of(TeacherSampling(4.0))  # hot, so that every token has some mass
    rows = teacher_rows(attached, layout, prefix, picker)
    text = text_uniforms(layout, rows, 1.0, (4,))
    greedy = np.zeros(layout.anchors.shape, dtype=bool)
    greedy[0, 2] = True
    shape = PTPConfig(variant="c", slots=SLOTS)
    targets = slot_targets(layout, rows, text, shape, greedy, 0.5)

    def latents(carried: np.ndarray) -> mx.array:
        return whole_pass(attached, layout, prefix, carried)

    arguments = (attached, layout, targets, text, latents, picker, columns, 0.5)
    found = with_own_uniforms(*arguments, seed)
    assert np.array_equal(found.carried, with_own_uniforms(*arguments, seed).carried)
    assert not np.array_equal(found.carried, with_own_uniforms(*arguments, (1, 2, 4)).carried)
    carried, length = found.carried.reshape(-1, SLOTS), layout.tokens.shape[1]
    weights = {int(row): float(weight) for row, weight in zip(layout.rows, found.weight, strict=True)}
    checked = 0
    for block, anchor in enumerate(layout.anchors.reshape(-1)):
        if block * SLOTS not in weights:
            continue  # padding
        s = block // layout.anchors.shape[1]
        sequence = SEQUENCES[s]
        if greedy.reshape(-1)[block]:
            assert (carried[block] == NOTHING).all()
            continue
        assert carried[block, 0] == text.values.reshape(-1)[s * length + anchor + 1]
        known = bool(text.reachable[s, anchor + 1])
        for slot in range(SLOTS):
            if anchor + slot + 2 >= len(sequence):
                break
            assert weights[block * SLOTS + slot] == (0.5**slot if known else 0.0)
            if slot + 1 == SLOTS:
                break
            own = Block(
                ids=mx.array([[*sequence[: anchor + 1], *[VOCABULARY] * (slot + 1)]]),
                n_real=int(anchor) + 1,
                uniforms=mx.array(carried[block, : slot + 1]),
            )
            scores = picker.scores(attached.head(attached.forward(own, attached.make_cache()))[0, -1:])
            token = sequence[anchor + slot + 2]
            mass = np.array(mx.softmax(scores, axis=-1))[0, token]
            if mass > 1e-4 and columns[token] >= 0:  # else rounding decides whether there is a uniform
                left, right = (float(edge.item()) for edge in interval(scores, mx.array([token])))
                assert left - 1e-5 <= carried[block, slot + 1] <= right + 1e-5
                checked += 1
            known = (
                known
                and columns[token] >= 0
                and (mass > 1e-4 or weights.get(block * SLOTS + slot + 1, 0) > 0)
            )
    assert checked > 5 and 0 < sum(weight == 0 for weight in weights.values()) < len(weights)
