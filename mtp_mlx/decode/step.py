"""The parts of a speculative step: build the block, verify its drafts, draft the next tokens, commit.

`mtp_mlx.decode.loop.speculative_step` runs them for one sequence, `mtp_mlx.serve.batch` for several that share a
pass. Everything before `commit` is lazy, so a step has one host read, beside those that a drafter itself
needs (a draft model has one).

Legend: R rows of the block, d drafts verified, a of them accepted, V vocabulary, D hidden size, C tokens of history.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import mlx.core as mx

from mtp_mlx.decode.drafter import LazyDrafts, Verified
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.led import led
from mtp_mlx.decode.pick import leading_run
from mtp_mlx.decode.session import Session
from mtp_mlx.decode.tree import DraftTree, depths_of, path_of, walk
from mtp_mlx.errors import MTPError
from mtp_mlx.model.block import Block, BlockShape, block_shape


class Token(NamedTuple):
    """One committed token.

    Attributes:
        token: its id.
        logits: [V] the target's raw logits at this position, which the pass computes anyway; lazy. For a draft
            emitted unverified, the raw logits of its slot.
        from_draft: whether it is a draft that was accepted (the text is the same either way) or emitted unverified.
        depth: index of the draft in its step, from 1; 0 for the target's own pick.
        drafter: who drafted it; "" for the target's own pick.
        choice: its place, from 1 for the likeliest, among the drafts of its pass behind the same draft; 0 for the
            target's own pick, and if it was not verified.
    """

    token: int
    logits: mx.array
    from_draft: bool
    depth: int
    drafter: str = ""
    choice: int = 0


@dataclass(frozen=True)
class StepResult:
    """The outcome of a step, as read by the host.

    Attributes:
        tokens: accepted drafts, then the target's own pick.
        kept: [1 + a] real rows of the pending token and of the accepted drafts, ascending.
        fresh: drafts for the next positions.
        logits: [>= 1 + a, V], row i predicts tokens[i]; lazy.
        rows: rows of the pass, R.
    """

    tokens: list[int]
    kept: list[int]
    fresh: DraftTree
    logits: mx.array
    rows: int

    @property
    def n_accepted(self) -> int:
        """Number of accepted drafts, a."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class LazyStep:
    """A step whose outcome the host has not read yet.

    Attributes:
        verified: the outcome of the pass.
        integers: int32, the number of accepted drafts, the target's picks [1 + d], the rows of the path [1 + d] of a
            tree, the fresh drafts, and their parents if they are a tree.
        confidences: float32, one per fresh draft.
        branches: whether the fresh drafts are a tree.
    """

    verified: Verified
    integers: mx.array
    confidences: mx.array
    branches: bool

    def arrays(self) -> tuple[mx.array, mx.array]:
        """The arrays that the step's one host read evaluates."""
        return self.integers, self.confidences


def shape_of(session: Session, layout: Layout) -> BlockShape:
    """The rows of a layout, including the lead rows of the drafter's slot groups."""
    return block_shape(layout.drafts, layout.slots, session.attached.lead, layout.parents)


def block_of(session: Session, layout: Layout, drafts: list[int], start: int) -> Block:
    """The block of a step that verifies `drafts`, with the pending token at position `start`.

    Raises:
        MTPError: if the layout asks for something that the model's drafter does not do.
    """
    _check(session, layout)
    shape = shape_of(session, layout)
    rows = mx.array([session.tokens[-1], *drafts], dtype=mx.int32)
    block = Block.decode(rows, shape, start, session.attached.vocab_size)
    if session.drafter is None or not layout.slot_rows:
        return block
    return replace(block, uniforms=session.drafter.uniforms(shape, start))


def _check(session: Session, layout: Layout) -> None:
    """Raises MTPError if a layout asks for something that the model's drafter does not do."""
    source = session.attached.speculator
    if layout.slot_rows and (source is None or not source.places_slots):
        raise MTPError("this layout has slots, and this model has no adapter with slots")
    if any(layout.slots[:-1]) and session.attached.why_linear:
        raise MTPError(
            f"this layout has slots behind several rows, and {session.attached.why_linear}: use the linear layout, "
            "whose slots stand behind the last draft only"
        )
    if layout.chain and (source is None or source.places_slots):
        raise MTPError("this layout drafts a chain, and this model has no drafter that makes one")
    if layout.parents and session.why_chains:
        raise MTPError("internal error: this sequence verifies chains only")
    if layout.asks_for_drafts and session.drafter is None:
        raise MTPError("internal error: this layout asks for drafts, and its policy has `own_drafts` 0")


def verify(
    session: Session,
    layout: Layout,
    drafts: list[int],
    start: int,
    hidden: mx.array,
    logits: mx.array,
    head_input: mx.array,
) -> Verified:
    """Verifies `drafts`, lazily: the target's picks, and the path of drafts equal to them.

    Args:
        session: the sequence.
        layout: the pass's layout; a chain may allow more drafts than there are.
        drafts: [d] token ids.
        start: absolute position of the pending token.
        hidden: [R, D] hidden states of the pass.
        logits: [>= 1 + d, V] of its real rows.
        head_input: [1, >= 1 + d, D] hidden states of the real rows, as in `Verified`.
    """
    n_real = 1 + len(drafts)
    logits = logits[:n_real]
    rows = mx.array([session.tokens[-1], *drafts], dtype=mx.int32)
    shape = shape_of(session, layout)
    positions = mx.array(shape.offsets[:n_real] + (start + 1))
    history = session.histories(drafts, layout.parents)
    wanted = _allowed(session, session.processed(logits, drafts, layout.parents), drafts)
    picks, accepted, last, path = _accepted(session, wanted, positions, history, rows, layout.parents)
    head_input = head_input[:, :n_real]
    if path is not None:
        picks, logits, head_input = picks[path], logits[path], head_input[:, path]
    return Verified(
        layout=layout,
        shape=shape,
        hidden=hidden,
        head_input=head_input,
        logits=logits,
        picks=picks,
        accepted=accepted,
        last=last,
        position=positions[last],
        history=None if history is None else history[last],
        tokens=session.tokens,
        path=path,
        caches=session.cache,
    )


def _allowed(session: Session, logits: mx.array, drafts: list[int]) -> mx.array:
    """[1 + d, V] logits, with -inf for tokens that the constraint forbids after the drafts before them."""
    if session.constraint is None:
        return logits
    allowed = mx.array(session.constraint.allowed(drafts))
    return mx.where(allowed, logits, mx.array(-mx.inf, dtype=logits.dtype))


class Accepted(NamedTuple):
    """What verification accepts, lazily.

    Attributes:
        picks: [1 + d] int32, the target's pick after every real row.
        accepted: int32 scalar, number of drafts accepted.
        last: int32 scalar, real row of the last of them, 0 if none was accepted.
        path: of a tree, [1 + D] real rows as in `Walk`; None for a chain.
    """

    picks: mx.array
    accepted: mx.array
    last: mx.array
    path: mx.array | None = None


def _accepted(
    session: Session,
    logits: mx.array,
    positions: mx.array,
    history: mx.array | None,
    tokens: mx.array,
    parents: tuple[int, ...],
) -> Accepted:
    """The target's picks, and the drafts that equal them.

    Args:
        logits: [1 + d, V] of the real rows.
        positions: [1 + d] int32 positions of the picks.
        history: [1 + d, C] for penalties, or None.
        tokens: [1 + d] int32, the pending token and the drafts.
        parents: [d] of a tree; empty for a chain.
    """
    kernels, picker = session.attached.kernels, session.picker
    plainly = session.constraint is None and picker.draws_plainly(logits.shape[-1])
    if kernels is not None and plainly:
        found = kernels.attempt(
            "verify_tail",
            picker.ranked(logits),
            tokens,
            picker.config.temperature,
            picker.noise_keys(positions),
            tuple(parent + 1 for parent in parents),
        )
        if found is not None and parents:
            return Accepted(found[0], *path_of(found[1][1:] == 0, parents))
        if found is not None:
            return Accepted(found[0], found[1].reshape(()), found[1].reshape(()))
    picks = picker.pick(logits, positions, history)
    if parents:
        return Accepted(picks, *walk(picks, tokens[1:], parents))
    count = leading_run(picks, tokens[1:])
    return Accepted(picks, count, count)


def draft(session: Session, verified: Verified) -> LazyStep:
    """Drafts the positions after the target's own pick, lazily, if the layout asks for drafts."""
    layout, fresh = verified.layout, LazyDrafts.none()
    if layout.asks_for_drafts:
        assert session.drafter is not None
        fresh = session.drafter.propose(verified)
    peers = session.attached.peers
    rows = [] if verified.path is None else [verified.path]
    parents = [] if fresh.parents is None else [fresh.parents]
    integers = mx.concatenate([verified.accepted.reshape(1), verified.picks, *rows, fresh.ids, *parents])
    return LazyStep(verified, led(peers, integers), led(peers, fresh.confidences), fresh.parents is not None)


def commit(session: Session, lazy: LazyStep) -> StepResult:
    """Commits the accepted drafts and the target's own pick; the caller must still roll back the caches."""
    verified, layout = lazy.verified, lazy.verified.layout
    n_accepted, *values = cast("list[int]", lazy.integers.tolist())
    n_picks = verified.picks.shape[0]
    tokens, values = values[: n_accepted + 1], values[n_picks:]
    kept = list(range(n_accepted + 1))
    if verified.path is not None:
        kept, values = values[: n_accepted + 1], values[n_picks:]
    session.tokens += tokens
    if session.drafter is not None and layout.asks_for_drafts:
        session.drafter.commit(n_accepted)
    elif session.drafter is not None:
        session.drafter.observe(verified.head_input[:, : n_accepted + 1], session.tokens)
    if session.constraint is not None:
        session.constraint.commit(tokens)
    return StepResult(
        tokens=tokens,
        kept=kept,
        fresh=_fresh(lazy, values, layout.chain or layout.slots[kept[-1]]),
        logits=verified.logits,
        rows=verified.hidden.shape[0],
    )


def _fresh(lazy: LazyStep, values: list[int], positions: int) -> DraftTree:
    """The fresh drafts for the next `positions` positions, from the end of the step's integers."""
    confidences = cast("list[float]", lazy.confidences.tolist())
    if not lazy.branches:
        return DraftTree.chain(values[:positions], confidences[:positions])
    count = len(confidences)
    parents = values[count:]
    meant = [node for node, depth in enumerate(depths_of(parents)) if depth <= positions]
    return DraftTree(tuple(values[:count]), tuple(parents), tuple(confidences)).keep(meant)
