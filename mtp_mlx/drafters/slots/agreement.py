"""Acceptance of mask-slot drafts on held-out text, measured without decoding; see `mtp_mlx.train.agreement`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.slots.adapter import adapter_of
from mtp_mlx.drafters.slots.layout import SlotLayout, build_layout, candidate_anchors
from mtp_mlx.drafters.slots.two_pass import Prefix, prefix_pass, slot_states
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.agreement import Agreement, Tally
from mtp_mlx.train.data import Example


def draft_picks(attached: AttachedModel, hidden: mx.array, previous: mx.array) -> mx.array:
    """Greedily drafted ids [M] of the slots' hidden states [M, D], given the tokens [M] before them."""
    refined = adapter_of(attached).sampler(attached.embed(previous), hidden)
    column = mx.argmax(attached.draft_head(refined), axis=-1)
    ids = adapter_of(attached).draft_ids
    return column if ids is None else ids[column]


def right_drafts(attached: AttachedModel, layout: SlotLayout, prefix: Prefix) -> np.ndarray:
    """Whether the draft of each slot is the token of the text, bool [blocks, k].

    Args:
        layout: whose blocks all have k slots, all of them supervised, or none.
        prefix: of pass 1 over it.
    """
    hidden = slot_states(attached, layout, prefix)
    right = np.array(draft_picks(attached, hidden, mx.array(layout.previous))) == layout.label
    return right.reshape(-1, layout.slots)


def labelled_anchors(
    examples: Sequence[Example], slots: int, most: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Per example, at most `most` random positions behind which a whole block of `slots` slots has labels."""
    anchors = []
    for example in examples:
        candidates = candidate_anchors(len(example), example.loss_start)
        candidates = candidates[candidates + 1 + slots < len(example)]
        anchors.append(np.sort(random.permutation(candidates)[:most]))
    return anchors


def measure_agreement(
    attached: AttachedModel, batches: Iterable[Sequence[Example]], slots: int, most: int = 24, seed: int = 0
) -> Agreement:
    """Acceptance per depth, teacher-forced.

    Args:
        slots: drafts per block.
        most: blocks per sequence, at random positions.
        seed: of the positions.
    """
    tally = Tally(slots)
    random = np.random.default_rng(seed)
    for examples in batches:
        anchors = labelled_anchors(examples, slots, most, random)
        if not any(len(own) for own in anchors):
            continue
        layout = build_layout(
            [example.tokens for example in examples], anchors, slots, chunk_blocks=min(most, 16)
        )
        tally.add(right_drafts(attached, layout, prefix_pass(attached, layout)))
    return tally.agreement()
