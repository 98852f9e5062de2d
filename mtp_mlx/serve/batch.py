"""Decodes several sequences in one pass, each with its own drafts and its own number of accepted drafts.

The trunk and the LM head run over [B, R] rows with a common layout. Everything else (picks, drafts, penalties,
grammar) belongs to each `Session`, so the text is what the sequence would get alone. Caches are mlx-lm's
`BatchKVCache`, whose rows are right-justified: sequences that kept fewer rows than others are rolled to the right
(which copies the batch's keys and values). This leaves padding on their left, which is masked, and cut off from
time to time.

Sequences with fewer drafts than the layout has room for get filler rows, which are ignored. Non-goals: sliding
windows, recurrent state, quantised caches and exact rows. `why_not_batch` gives the reason, and such sequences are
decoded in turns.

Legend: B sequences, R rows of each, d drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.loop import DecodeLoop
from mtp_mlx.decode.policy import Proposal, preferred
from mtp_mlx.decode.session import Session
from mtp_mlx.decode.step import Token, block_of, commit, draft, verify
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.planning.hindsight import Hindsight
from mtp_mlx.serve.batch_plan import BatchPlan

FILLER = 0  # token id of filler rows
CUT_PADDING_AT = 128  # cut the padding off once every sequence has this many rows of it
# Allowed relative error of states in a shared pass: far above rounding, far below the effect of a wrong mask.
TOLERANCE, HALF_TOLERANCE = 1e-3, 0.05


@dataclass
class Member:
    """One sequence of a batch.

    Attributes:
        session: between two steps; the batch holds its keys and values until it leaves.
        loop: its decoding loop, which does not decode by itself meanwhile.
        hindsight: learns from its drafts, verified or not; None if nobody plans by them.
        padding: rows of padding on its left in the batch's cache.
    """

    session: Session
    loop: DecodeLoop
    hindsight: Hindsight | None = None
    padding: int = 0

    def proposals(self, most: int) -> list[Proposal]:
        """Its drafters' chains, at most `most` drafts each."""
        found = self.loop.proposals(most)
        if self.hindsight is not None:
            self.hindsight.calibrated(found)
        return [proposal.chained() for proposal in found]


class Batch:
    """Sequences that take their steps together.

    Args:
        attached: the model.
        plan: chooses the common layout of a step.
    """

    def __init__(self, attached: AttachedModel, plan: BatchPlan) -> None:
        self._attached, self._plan = attached, plan
        self.own_drafts = plan.own_drafts
        self.members: list[Member] = []
        self._caches: list[BatchKVCache] = []

    def join(self, session: Session, loop: DecodeLoop) -> Member:
        """Add a sequence, between two of its steps."""
        member = Member(session, loop, self._plan.hindsight())
        own = [BatchKVCache.merge([layer]) for layer in session.lend_caches()]
        if not self.members:
            self._caches = own
        else:
            for layer, more in zip(self._caches, own, strict=True):
                layer.extend(more)
        self.members.append(member)
        self._read_padding()
        return member

    def leave(self, member: Member) -> None:
        """Remove a sequence and give its session the keys and values back."""
        index = self.members.index(member)
        member.session.take_caches([layer.extract(index) for layer in self._caches])
        self._drop(index)

    def forget(self, member: Member) -> None:
        """Remove a cancelled sequence; its keys and values are dropped."""
        self._drop(self.members.index(member))

    def _drop(self, index: int) -> None:
        del self.members[index]
        if not self.members:
            self._caches = []
            return
        rest = mx.array([i for i in range(len(self.members) + 1) if i != index])
        self._filter(rest)

    def _filter(self, indices: mx.array) -> None:
        """Keep the sequences at `indices`; padding that all of them have is cut off."""
        for layer in self._caches:
            layer.filter(indices)
        self._read_padding()

    def _read_padding(self) -> None:
        padding: Any = self._caches[0].left_padding.tolist()
        for member, rows in zip(self.members, padding, strict=True):
            member.padding = rows

    # --- one step -------------------------------------------------------------------------------------------

    def step(self) -> list[list[Token]]:
        """Run one pass over all members; returns the tokens that each commits, in the order of `members`."""
        offered = [preferred(member.proposals(self._plan.max_drafts)) for member in self.members]
        starts = [member.session.next_position - 1 for member in self.members]
        layout = self._plan.choose([len(proposal.drafts) for proposal in offered], starts)
        offered = [proposal.cut(layout.drafts) for proposal in offered]
        hidden = self._attached.forward(self._block(layout, offered, starts), self._caches)  # [B, R, D]
        head_input = self._attached.head_input
        logits = self._attached.head(hidden[:, : layout.real_rows])  # [B, 1 + d, V]
        found = []
        for index, (member, proposal, start) in enumerate(zip(self.members, offered, starts, strict=True)):
            session, taken = member.session, head_input[index : index + 1]
            verified = verify(session, layout, proposal.drafts, start, hidden[index], logits[index], taken)
            found.append(draft(session, verified))
        mx.eval([lazy.arrays() for lazy in found])  # one host read, unless a drafter needs more
        committed, kept = [], []
        for member, proposal, lazy in zip(self.members, offered, found, strict=True):
            result = commit(member.session, lazy)
            if member.hindsight is not None:
                member.hindsight.read(result.tokens)
            kept.append(len(result.kept))
            own = Layout(len(proposal.drafts), layout.slots[: len(proposal.drafts) + 1], layout.chain)
            committed.append(list(member.loop.take(proposal, own, result)))
        self._keep(hidden.shape[1], kept)
        return committed

    def _block(self, layout: Layout, offered: list[Proposal], starts: list[int]) -> Block:
        """The rows of all members, [B, R]."""
        blocks = []
        for member, proposal, start in zip(self.members, offered, starts, strict=True):
            filler = [FILLER] * (layout.drafts - len(proposal.drafts))
            blocks.append(block_of(member.session, layout, proposal.drafts + filler, start))
        first = blocks[0]
        return replace(
            first,
            ids=mx.concatenate([block.ids for block in blocks]),
            positions=None if first.positions is None else _stacked([block.positions for block in blocks]),
            uniforms=None if first.uniforms is None else _stacked([block.uniforms for block in blocks]),
        )

    def _keep(self, n_rows: int, kept: list[int]) -> None:
        """Trim the caches so that sequence b keeps the first kept[b] of the pass's rows."""
        surplus = [n_rows - count for count in kept]
        common = min(surplus)
        uneven = [count - common for count in surplus]
        for layer in self._caches:
            layer.trim(common)
            if any(uneven):
                layer.prepare(right_padding=uneven)
                layer.finalize()
        for member, more in zip(self.members, uneven, strict=True):
            member.padding += more
        if min(member.padding for member in self.members) >= CUT_PADDING_AT:
            self._filter(mx.arange(len(self.members)))


def _stacked(arrays: list[mx.array | None]) -> mx.array:
    """Stack arrays into [B, ...]; none may be None."""
    there = [array for array in arrays if array is not None]
    assert len(there) == len(arrays)
    return mx.stack(there)


def why_not_batch(attached: AttachedModel) -> str:
    """Why sequences of this model cannot share passes, or "" if they can. Runs a few rows to find out."""
    if attached.exact:
        return "exact decoding computes every row as if it were alone"
    if attached.speculator is not None and attached.speculator.reads_caches:
        return "its drafter reads the keys and values of one sequence"
    other = next(
        (type(layer).__name__ for layer in attached.make_cache() if type(layer) is not KVCache), None
    )
    if other is not None:
        return f"this model has a {other}, whose rows cannot be rolled"
    prompts = [[token % attached.vocab_size for token in range(1, 1 + count)] for count in (3, 7)]
    try:
        alone = [_last_state(attached, [attached.make_cache()], [prompt]) for prompt in prompts]
        together = _last_state(attached, [attached.make_cache() for _ in prompts], prompts)
        apart = mx.linalg.norm(mx.concatenate(alone) - together, axis=-1)
        off = cast(float, mx.max(apart / mx.linalg.norm(together, axis=-1)).item())
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        return f"this model cannot run a batch of sequences of different lengths ({error})"
    single = attached.embed(mx.zeros((1,), dtype=mx.int32)).dtype == mx.float32
    if off <= (TOLERANCE if single else HALF_TOLERANCE):
        return ""
    return "this model gives other results in a batch of sequences of different lengths"


def _last_state(attached: AttachedModel, caches: list[list[Any]], prompts: list[list[int]]) -> mx.array:
    """[B, D] float32: states of the prompts' last tokens, computed in one pass."""
    for cache, prompt in zip(caches, prompts, strict=True):
        attached.forward(Block.real(mx.array([prompt[:-1]])), cache)
    layers = caches[0] if len(caches) == 1 else [BatchKVCache.merge(list(each)) for each in zip(*caches)]
    last = mx.array([[prompt[-1]] for prompt in prompts])
    return attached.forward(Block.real(last), layers)[:, 0].astype(mx.float32)
