"""Acceptance of MTP heads on held-out text, measured without decoding; see `mtp_mlx.train.agreement`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.draft_heads import DraftHeads, heads_of
from mtp_mlx.drafters.heads.layout import padded
from mtp_mlx.drafters.heads.trunk_states import TrunkStates
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.agreement import Agreement, Tally
from mtp_mlx.train.data import Example

CHUNK = 512  # rows whose logits are in memory at once


def check_plain(heads: DraftHeads, name: str) -> None:
    """Refuses heads whose inputs are not those that training and this measurement give them.

    Args:
        name: where the heads are from, for the message.

    Raises:
        MTPError: not a cascade on the trunk's normed state that shares embedding and LM head with the base model.
    """
    convention = heads.convention
    if (
        not isinstance(heads, MTPHeads)
        or convention.first_hidden != "post-norm"
        or "own" in (convention.embedding, convention.lm_head)
    ):
        raise MTPError(
            f"{name}: its heads are of kind {convention.kind!r} on the state {convention.first_hidden!r}, with "
            f"{convention.embedding} embedding and {convention.lm_head} LM head; only a cascade on the state "
            "'post-norm' that shares both with the base model can be trained, or measured without decoding"
        )


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
    embeddings = attached.embed(mx.array(tokens))
    found = heads.cascade(embeddings, states(examples).astype(embeddings.dtype), depths)
    right = np.zeros((len(places), depths), dtype=bool)
    for depth, z in enumerate(found, start=1):
        rows = z[mx.array(sequence), mx.array(position)].astype(embeddings.dtype)  # [blocks, D]
        right[:, depth - 1] = _drafts(attached, rows) == tokens[sequence, position + depth + 1]
    return right


def _drafts(attached: AttachedModel, states: mx.array) -> np.ndarray:
    """Greedily drafted ids [M] of hidden states [M, D]."""
    pieces = []
    for start in range(0, states.shape[0], CHUNK):
        pieces.append(mx.argmax(attached.draft_head(states[start : start + CHUNK]), axis=-1))
        mx.eval(pieces[-1])
    column = np.array(mx.concatenate(pieces))
    ids = attached.draft_ids
    return column if ids is None else np.array(ids)[column]
