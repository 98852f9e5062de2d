"""Drafts from a cascade of MTP heads: a chain after every pass, before the step's one host read.

Head k (from 1) at row i takes the embedding of token i + k and the hidden state h[k-1][i] (k = 1: the trunk's), and
predicts token i + k + 1. Let m be the newest committed row of the trunk and t[m+1] the target's own pick after it.
Then head k's rows up to m + 1 - k depend on committed tokens only: they are *final*. Its rows m + 2 - k .. m depend
on drafts just made by the heads before it; they are *provisional* and recomputed in every step:

    head  final rows     provisional      row m takes            row m predicts
    1     .. m           none             t[m+1], the pick       draft 1, at m + 2
    2     .. m - 1       m                draft 1                draft 2
    3     .. m - 2       m - 1, m         draft 2                draft 3

So between steps a head's KV cache holds exactly its final rows. The inputs of its next rows (hidden states of the
head before) wait next to it: one row in the steady state, more after steps that ran fewer heads or none (plain
decoding). A step runs head k over the waiting rows and the block. Where the chain starts in the block depends on the
number of accepted drafts, which is still an array: later rows are computed too, but their output is not used, and
they are removed from the caches once the host knows.

Rows count from the first token that this generation ran itself. The hidden states of a prefix that came in a prompt
cache are unknown, so the heads see only what follows it; this makes drafts worse, not the text.

Legend: n rows of the trunk committed before the block; d drafts verified in it; a of them accepted, m = n + a.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import mlx.core as mx

from mtp_mlx.decode.draft_pick import Beams, pick_draft
from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.heads.head_cache import HeadCache
from mtp_mlx.drafters.heads.mtp_head import MTPHead, first_masked
from mtp_mlx.model.attach import AttachedModel

if TYPE_CHECKING:
    from mtp_mlx.drafters.heads.cascade import MTPHeads

CATCH_UP_AT = 256  # most rows that wait before the heads run over them


@dataclass
class _Depth:
    """One depth of the chain between steps.

    Attributes:
        head: the head that makes its drafts.
        cache: keys and values of its final rows; `cache.offset` is their number c.
        waiting: [1, w, D] each, hidden states of the depth before for rows c, c + 1, ...
    """

    head: MTPHead
    cache: HeadCache
    waiting: list[mx.array] = field(default_factory=list)

    @property
    def final(self) -> int:
        """Number of final rows."""
        return self.cache.offset

    def inputs(self, new: mx.array | None = None) -> mx.array:
        """[P, w, D] the waiting rows, followed by the `new` ones [P, R, D] of P paths."""
        paths = 1 if new is None else new.shape[0]
        waiting = [mx.broadcast_to(rows, (paths, *rows.shape[1:])) for rows in self.waiting]
        rows = [*waiting, *([] if new is None else [new])]
        return mx.concatenate(rows, axis=1) if len(rows) > 1 else rows[0]


@dataclass(frozen=True)
class _Ran:
    """The rows that one depth ran in a step whose outcome the host does not know yet.

    Attributes:
        start: the first row.
        inputs, outputs: [1, R, D] hidden states that went in and came out, of rows start, start + 1, ...
    """

    start: int
    inputs: mx.array
    outputs: mx.array


class HeadChain(Drafter):
    """Drafts with a cascade of MTP heads for one generation, and owns the heads' caches.

    Args:
        attached: the model to draft for.
        picker: the target's picker; drafts use the same noise, which couples them to the target.
        heads: all heads of the model.
        depths: the head for each draft of the longest chain.
        first_position: absolute position of row 0.
    """

    def __init__(
        self,
        attached: AttachedModel,
        picker: Picker,
        heads: MTPHeads,
        depths: Sequence[MTPHead],
        first_position: int = 0,
    ) -> None:
        self._attached, self._picker, self._heads = attached, picker, heads
        self._depths = [_Depth(head, head.make_cache()) for head in depths]
        self._first_position = first_position
        self._rows = 0  # n
        self._ran: list[_Ran] = []
        self._block: mx.array | None = None

    def observe(self, head_input: mx.array, tokens: list[int]) -> None:
        """See `Drafter`."""
        self._depths[0].waiting.append(self._heads.first_state(head_input))
        self._rows += head_input.shape[1]
        if self._rows - self._depths[0].final >= CATCH_UP_AT:
            self.catch_up(tokens)

    def catch_up(self, tokens: list[int]) -> None:
        """See `Drafter`: runs every head over the rows that are now final.

        One head after another, because Ctrl-C waits for the end of an evaluation.
        """
        known = min(self._rows, len(tokens) - 1)
        for depth, state in enumerate(self._depths, start=1):
            start, count = state.final, known + 1 - depth - state.final
            if count < 1:
                continue
            inputs = state.inputs()
            following = mx.array(tokens[start + depth : start + depth + count], dtype=mx.int32)
            _, outputs = self._run(state, inputs[:, :count], following[None])
            state.waiting = [inputs[:, count:]] if inputs.shape[1] > count else []
            if depth < len(self._depths):
                self._depths[depth].waiting.append(outputs)
            mx.eval(state.waiting, state.cache.state, outputs)
        # Nothing may stay lazy: such an array belongs to its thread and keeps its whole graph alive.
        mx.eval([state.waiting for state in self._depths])

    def _run(self, state: _Depth, hidden: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """(z, h), both [P, R, D], of one head over the R rows after its final ones; its cache grows by R.

        Args:
            state: the depth.
            hidden: [P, R, D] hidden states of the depth before, of P paths of drafts; the cache keeps the first's.
            tokens: [P, R] int32, the token whose embedding each row takes.
        """
        embeddings = state.head.embed(tokens, self._attached.embed)
        if self._first_position == 0:
            embeddings = first_masked(self._heads.convention, embeddings, state.final)
        with state.cache.repeated(hidden.shape[0]):
            return state.head(embeddings, hidden, state.head.mask(hidden, state.cache), state.cache)

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter`. Of a tree, the heads run over all its paths at once, P of them."""
        hidden, picks = self._heads.first_state(verified.head_input), verified.picks
        accepted, wide = verified.accepted, verified.layout.width > 1
        history, tokens, count = verified.history, verified.tokens, verified.layout.chain
        self._block, self._ran = hidden, []
        n, block = self._rows, hidden.shape[1]
        # Tokens after t[n]: accepted drafts, the target's own pick, then the chain's drafts as they are made.
        following = mx.concatenate([picks, mx.zeros((count - 1,), dtype=mx.int32)])[None]  # [P, ...]
        places = mx.arange(block + count - 1)
        ids, confidences, beams = [], [], Beams(verified)
        new, token = hidden, verified.pick.reshape(1)
        for depth, state in enumerate(self._depths[:count], start=1):
            start, inputs = state.final, state.inputs(new)
            known = mx.array(tokens[start + depth : n + 1], dtype=mx.int32)
            unread = following[:, max(0, start + depth - n - 1) : block - 1 + depth]
            known = mx.broadcast_to(known, (unread.shape[0], known.shape[0]))
            z, outputs = self._run(state, inputs, mx.concatenate([known, unread], axis=1))
            self._ran.append(_Ran(start, inputs[:1], outputs[:1]))  # the final rows are those of any path
            refined = z[:, n - start + accepted]  # [P, D] of row m
            if wide:
                logits = self._heads.logits(self._attached, refined, depth)
                parents = beams.grow(self._picker, logits, self._attached.draft_ids)
                token, following, new = beams.tokens, following[parents], outputs[parents]
            else:
                if history is not None:
                    history = mx.concatenate([history[1:], token])
                token, confidence = pick_draft(
                    self._attached,
                    self._picker,
                    refined,
                    (verified.position + depth).reshape(1),
                    history,
                    self._heads.unembedding(depth),
                )
                ids.append(token)
                confidences.append(confidence)
                new = outputs
            following = mx.where(places == accepted + depth, token[:, None], following)
        return beams.drafts() if wide else LazyDrafts.joined(ids, confidences)

    def commit(self, n_accepted: int) -> None:
        """See `Drafter`: keeps the rows that are now final, and removes the rest."""
        assert self._block is not None
        self._rows += n_accepted + 1
        before = self._rows  # final rows of the depth before
        made = self._block[:, : n_accepted + 1]  # those of them that are new
        self._block = None
        for depth, (state, ran) in enumerate(zip(self._depths, self._ran, strict=False), start=1):
            final = max(0, self._rows + 1 - depth)
            state.cache.trim(state.final - final)
            rest = ran.inputs[:, final - ran.start : before - ran.start]
            state.waiting = [rest] if rest.shape[1] else []
            before, made = final, ran.outputs[:, : final - ran.start]
        if len(self._ran) < len(self._depths) and made.shape[1]:
            self._depths[len(self._ran)].waiting.append(made)
        self._ran = []
