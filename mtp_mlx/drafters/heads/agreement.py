"""Acceptance of MTP heads on held-out text, measured without decoding; see `mtp_mlx.train.agreement`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.heads.draft_heads import heads_of
from mtp_mlx.drafters.heads.layout import padded
from mtp_mlx.drafters.heads.trunk_states import TrunkStates, read_states
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.agreement import Agreement, Tally
from mtp_mlx.train.data import Example

CHUNK = 512  # rows whose logits are in memory at once


def measure_heads(
    attached: AttachedModel, batches: Iterable[Sequence[Example]], depths: int, states: TrunkStates
) -> Agreement:
    """Acceptance per depth, teacher-forced, at every position of the responses with `depths` tokens behind it.

    If there are fewer heads than `depths`, they are reused in order, as in decoding.
    """
    tally = Tally(depths)
    for examples in batches:
        tally.add(_right(attached, examples, depths, states))
    return tally.agreement()


def _right(
    attached: AttachedModel, examples: Sequence[Example], depths: int, states: TrunkStates
) -> np.ndarray:
    """Whether each head's greedy draft behind each position is the token of the text, bool [blocks, depths]."""
    heads = heads_of(attached)
    places = []  # (sequence, position), from the last token of the prompt on
    for index, example in enumerate(examples):
        for position in range(max(example.loss_start - 1, 0), len(example) - 1 - depths):
            places.append((index, position))
    if not places:
        return np.zeros((0, depths), dtype=bool)
    sequence, position = np.array(places).T
    tokens = padded(examples)
    ids = mx.array(tokens)
    embeddings = attached.embed(ids)
    read = read_states(attached, states(examples)).astype(embeddings.dtype)
    found = heads.over_text(attached, ids, embeddings, read, depths)
    right = np.zeros((len(places), depths), dtype=bool)
    for depth, z in enumerate(found, start=1):
        rows = z[mx.array(sequence), mx.array(position)].astype(embeddings.dtype)  # [blocks, D]
        right[:, depth - 1] = _drafts(attached, rows, depth) == tokens[sequence, position + depth + 1]
    return right


def _drafts(attached: AttachedModel, states: mx.array, depth: int) -> np.ndarray:
    """Greedily drafted ids [M] of what the head at `depth` made, [M, D]."""
    pieces, heads = [], heads_of(attached)
    for start in range(0, states.shape[0], CHUNK):
        pieces.append(mx.argmax(heads.logits(attached, states[start : start + CHUNK], depth), axis=-1))
        mx.eval(pieces[-1])
    column = np.array(mx.concatenate(pieces))
    ids = attached.draft_ids
    return column if ids is None else np.array(ids)[column]
