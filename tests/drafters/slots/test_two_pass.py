"""Proves that the two passes give every slot row the hidden state of a causal sequence of its own, computed by
a second implementation, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mtp_mlx.drafters.slots.layout import SlotLayout, build_layout
from mtp_mlx.drafters.slots.two_pass import prefix_pass
from mtp_mlx.model.attach import AttachedModel, attach
from tests.drafters.slots.passes import whole_pass
from tests.model.naive import NaiveModel, quantized_model, random_adapter
from tests.tiny import ARCHITECTURES, VOCABULARY, tiny_model

SLOTS = 3
TOLERANCE = {"rtol": 3e-4, "atol": 3e-4}
RANDOM = np.random.default_rng(4)
SEQUENCES = [RANDOM.integers(3, VOCABULARY, length).tolist() for length in (13, 7, 10)]
ANCHORS = [np.array(own, dtype=np.int32) for own in ([2, 3, 5, 8, 10], [4], [0, 7])]


def build(name: str) -> Any:
    architecture, _, bits = name.partition("-")
    return quantized_model(architecture, int(bits[0])) if bits else tiny_model(architecture, seed=3)


def dressed(name: str) -> AttachedModel:
    model = build(name)
    return attach(model, random_adapter(model))


def two_passes(attached: AttachedModel, layout: SlotLayout) -> np.ndarray:
    """Hidden states of the supervised rows, [M, D]."""
    prefix = prefix_pass(attached, layout)
    mx.eval(prefix.arrays())
    return np.array(whole_pass(attached, layout, prefix))


def naive_rows(naive: NaiveModel, sequences: list[list[int]], anchors: list[np.ndarray]) -> np.ndarray:
    """The same, one forward pass per (anchor, slot)."""
    rows = []
    for sequence, own in zip(sequences, anchors, strict=True):
        for anchor in own:
            for slot in range(1, SLOTS + 1):
                if anchor + slot + 1 < len(sequence):
                    rows.append(naive.hidden(sequence[: anchor + 1], slot)[-1])
    return np.array(rows)


@pytest.mark.parametrize("chunk_blocks", [2, 16])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "llama-4bit", "qwen3-8bit", "gemma2-4bit"])
def test_slot_rows_against_one_forward_per_prefix(name: str, chunk_blocks: int) -> None:
    """Three sequences of different lengths; several chunks of two blocks, or one chunk of all."""
    attached = dressed(name)
    layout = build_layout(SEQUENCES, ANCHORS, SLOTS, chunk_blocks)
    assert layout.chunks == (3 if chunk_blocks == 2 else 1)
    expected = naive_rows(NaiveModel(build(name), attached.speculator), SEQUENCES, ANCHORS)
    np.testing.assert_allclose(two_passes(attached, layout), expected, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_one_sequence_in_one_chunk(name: str) -> None:
    attached = dressed(name)
    layout = build_layout(SEQUENCES[:1], ANCHORS[:1], SLOTS, chunk_blocks=8)
    assert len(layout.positions()) == 1
    expected = naive_rows(NaiveModel(build(name), attached.speculator), SEQUENCES[:1], ANCHORS[:1])
    np.testing.assert_allclose(two_passes(attached, layout), expected, **TOLERANCE)


@pytest.mark.parametrize("chunk_blocks", [2, 16])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_shorter_blocks_give_the_same_rows(name: str, chunk_blocks: int) -> None:
    """Block lengths of 1 to k: every row that is left equals its row of a whole block."""
    attached = dressed(name)
    whole = build_layout(SEQUENCES, ANCHORS, SLOTS, chunk_blocks)
    lengths = [np.array(own) for own in ([3, 1, 2, 1, 2], [2], [1, 3])]
    layout = build_layout(SEQUENCES, ANCHORS, SLOTS, chunk_blocks, lengths=lengths)
    every = {place: row for place, row in zip(places(whole), two_passes(attached, whole), strict=True)}
    assert len(layout.rows) < len(whole.rows)
    expected = np.array([every[place] for place in places(layout)])
    np.testing.assert_allclose(two_passes(attached, layout), expected, **TOLERANCE)


def places(layout: SlotLayout) -> list[tuple[int, int]]:
    """(the real row that predicts the same token, slot) of the supervised rows."""
    return list(zip(layout.target.tolist(), layout.depth.tolist(), strict=True))


def test_pass_one_is_the_base_model() -> None:
    """Its hidden states are the base's, adapter or not."""
    attached = dressed("qwen3")
    layout = build_layout(SEQUENCES, ANCHORS, SLOTS, chunk_blocks=4)
    hidden = prefix_pass(attached, layout).hidden.reshape(3, 13, -1)
    assert mx.array_equal(hidden, build("qwen3").model(mx.array(layout.tokens)))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_padding_has_no_influence(name: str) -> None:
    """Rows of a sequence alone equal its rows beside longer ones, in chunks filled up with padding."""
    attached = dressed(name)
    rows = two_passes(attached, build_layout(SEQUENCES, ANCHORS, SLOTS, chunk_blocks=4))
    counts = [len(naive_labels(sequence, own)) for sequence, own in zip(SEQUENCES, ANCHORS, strict=True)]
    start = 0
    for sequence, own, count in zip(SEQUENCES, ANCHORS, counts, strict=True):
        alone = two_passes(attached, build_layout([sequence], [own], SLOTS, chunk_blocks=1))
        np.testing.assert_allclose(rows[start : start + count], alone, **TOLERANCE)
        start += count
    assert start == len(rows)


def naive_labels(sequence: list[int], anchors: np.ndarray) -> list[int]:
    """Tokens the slots predict; those past the end have none."""
    positions = [int(anchor) + slot + 1 for anchor in anchors for slot in range(1, SLOTS + 1)]
    return [sequence[position] for position in positions if position < len(sequence)]


def test_labels_past_the_end_are_ignored() -> None:
    """The last anchor with a token to predict has one slot with a label; the others are no rows at all."""
    sequence = SEQUENCES[1]
    last = np.array([len(sequence) - 3], dtype=np.int32)
    layout = build_layout([sequence], [last], SLOTS, chunk_blocks=4)
    assert layout.label.tolist() == naive_labels(sequence, last) == [sequence[-1]]
    assert two_passes(dressed("llama"), layout).shape == (1, 48)


@pytest.mark.parametrize("name", ["llama", "qwen3-8bit"])
def test_gradients_reach_the_adapter_through_slot_rows_only(name: str) -> None:
    """Finite differences of a sum over the slot rows, in a slot embedding and in a LoRA factor."""
    attached = dressed(name)
    adapter = attached.speculator
    assert adapter is not None
    layout = build_layout(SEQUENCES, ANCHORS, SLOTS, chunk_blocks=2)
    prefix = prefix_pass(attached, layout)
    mx.eval(prefix.arrays())
    weights = mx.array(RANDOM.normal(size=(len(layout.rows), attached.hidden_size)).astype(np.float32))

    def total() -> mx.array:
        return mx.sum(weights * whole_pass(attached, layout, prefix))

    attached.model.freeze()
    for low_rank in adapter.low_rank.values():
        low_rank.unfreeze()
    adapter.unfreeze()
    path = "layers.1.self_attn.k_proj"
    for owner, key in ((adapter.slot_embeddings, "weight"), (adapter.low_rank[path], "up")):
        value = owner[key]

        def of(candidate: mx.array, owner: Any = owner, key: str = key) -> mx.array:
            owner[key] = candidate
            return total()

        gradient = mx.grad(of)(value)
        direction = mx.array(RANDOM.normal(size=value.shape).astype(np.float32))
        step = 1e-3
        slope = (of(value + step * direction) - of(value - step * direction)).item() / (2 * step)
        assert mx.sum(gradient * direction).item() == pytest.approx(slope, rel=0.02, abs=0.05)
        owner[key] = value
