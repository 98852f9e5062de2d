"""Acceptance of MTP heads per depth on held-out text, without decoding; see `agreement.py` for what that means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.draft_heads import DraftHeads, heads_of
from mtp_mlx.drafters.heads.trunk_states import TrunkStates, padded
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.train.agreement import Agreement
from mtp_mlx.train.data import Example

CHUNK = 512  # rows whose logits exist at once


def check_plain(heads: DraftHeads, name: str) -> None:
    """Raises MTPError for heads that take or read something else than what training and measuring give them."""
    convention = heads.convention
    if (
        not isinstance(heads, MTPHeads)
        or convention.first_hidden != "post-norm"
        or "own" in (convention.embedding, convention.lm_head)
    ):
        raise MTPError(
            f"{name}: its heads are of the kind {convention.kind!r} on the state {convention.first_hidden!r}, with "
            f"{convention.embedding} embedding and {convention.lm_head} LM head; only a cascade on the state "
            "'post-norm' that shares both with the base can be trained and measured without decoding"
        )


def measure_heads(
    attached: AttachedModel, batches: Iterable[Sequence[Example]], depths: int, states: TrunkStates
) -> Agreement:
    """Head k at every position of the responses that has all `depths` tokens behind it, given the text before.

    Beyond the number of heads they are applied again in turn, as in decoding.
    """
    accepted, submitted, blocks = np.zeros(depths), np.zeros(depths), 0
    for examples in batches:
        right = _right(attached, examples, depths, states)  # [blocks, depths]
        if not len(right):
            continue
        alive = np.cumprod(right, axis=1)
        accepted += alive.sum(axis=0)
        submitted += np.concatenate([np.ones((len(alive), 1)), alive[:, :-1]], axis=1).sum(axis=0)
        blocks += len(alive)
    return Agreement([float(a / s) if s else 0.0 for a, s in zip(accepted, submitted, strict=True)], blocks)


def _right(
    attached: AttachedModel, examples: Sequence[Example], depths: int, states: TrunkStates
) -> np.ndarray:
    """[blocks, depths] whether head k's greedy draft behind each position is the token of the text."""
    heads = heads_of(attached)
    places = []  # (sequence, position) as in decoding: from the last token of the prompt on
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
    """[M] greedy drafts as ids, of what the LM head reads, [M, D]."""
    pieces = []
    for start in range(0, states.shape[0], CHUNK):
        pieces.append(mx.argmax(attached.draft_head(states[start : start + CHUNK]), axis=-1))
        mx.eval(pieces[-1])
    column = np.array(mx.concatenate(pieces))
    ids = attached.draft_ids
    return column if ids is None else np.array(ids)[column]
