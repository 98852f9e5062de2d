"""The interface of drafters: a model has a `DraftSource`, which opens a `Drafter` for each generation.

The decode loop, the planner, batching, calibration and unverified emission use this interface only; none of them asks
what kind of drafter it is. In each step

    uniforms  returns the uniforms that slot rows are given        before the pass
    propose   drafts, lazily, from what the pass computed          before the step's one host read
    commit    is told how many drafts were accepted                after the host read

`observe` reports passes after which nothing is drafted: the prompt's, plain steps, and other drafters' blocks.

Legend: R rows of a block, D hidden size, d drafts on its longest path, a of them accepted, C tokens of history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import mlx.core as mx

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.pick import NoiseName, Picker, SamplingConfig
from mtp_mlx.decode.tree import ROOT
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import BlockShape
from mtp_mlx.model.speculator import Speculator


@dataclass(frozen=True)
class Verified:
    """The outcome of a verifying pass, lazily: the host has not read any of its arrays yet.

    A tree looks like a chain here, that of its accepted path: d is then the length of the longest path, and what
    stands behind the accepted drafts has no meaning.

    Attributes:
        layout: the pass's layout; it may allow more drafts than were verified.
        shape: the pass's rows.
        hidden: [R, D] hidden states after the trunk's final norm.
        head_input: [1, 1 + d, D] hidden states of the path's rows at the point in the trunk that the source reads
            (`Speculator.first_hidden`).
        logits: [1 + d, V] of the path's rows.
        picks: [1 + d] int32, the target's own pick after each row of the path.
        accepted: int32 scalar a; picks[:a] are the accepted drafts, picks[a] is the target's own token.
        last: int32 scalar, real row of the last accepted draft, or of the pending token; a in a chain.
        position: int32 scalar, absolute position of picks[a].
        history: [C] int32 tokens before picks[a], or None without penalties.
        tokens: committed tokens of this generation including the prompt, the pending token last.
        path: [1 + d] int32 real rows of the accepted path, as `Walk.path`; None in a chain, where they are 0 to d.
        caches: the model's, one a layer, whose newest R rows are the pass's own, rejected drafts included; for
            sources that read them (`Speculator.reads_caches`), whose passes are never shared by several sequences.
    """

    layout: Layout
    shape: BlockShape
    hidden: mx.array
    head_input: mx.array
    logits: mx.array
    picks: mx.array
    accepted: mx.array
    last: mx.array
    position: mx.array
    history: mx.array | None
    tokens: list[int]
    path: mx.array | None = None
    caches: Sequence[Any] = ()

    @property
    def pick(self) -> mx.array:
        """int32 scalar, the target's own token."""
        return self.picks[self.accepted]


@dataclass(frozen=True)
class LazyDrafts:
    """New drafts that the host has not read yet, a chain or a tree.

    Attributes:
        ids: [n] int32, nearest position first.
        confidences: [n] float32 in [0, 1], of a draft whose parent is right.
        parents: [n] int32 index of each draft's parent, smaller than its own, -1 for the target's own pick; None for
            a chain.
    """

    ids: mx.array
    confidences: mx.array
    parents: mx.array | None = None

    @staticmethod
    def joined(ids: Sequence[mx.array], confidences: Sequence[mx.array]) -> LazyDrafts:
        """A chain of the first candidates of each position; the others stand beside them, and nothing follows them.

        Args:
            ids: [w] int32 of each position, w the same for all.
            confidences: [w] float32 of each position.
        """
        width, found = ids[0].shape[0], (mx.concatenate(list(ids)), mx.concatenate(list(confidences)))
        if width == 1:
            return LazyDrafts(*found)
        firsts = [ROOT, *range(0, width * (len(ids) - 1), width)]  # the parent of each position's candidates
        return LazyDrafts(*found, mx.repeat(mx.array(firsts, dtype=mx.int32), width))

    @staticmethod
    def none() -> LazyDrafts:
        """No drafts."""
        return LazyDrafts(mx.zeros((0,), dtype=mx.int32), mx.zeros((0,)))


class Drafter:
    """Drafts for one generation, and holds the state that this needs.

    Attributes:
        note: a sentence on how the sampling differs from the one that the source was trained for; "" if it
            does not.
    """

    note: str = ""

    def begin(self, prefix: Sequence[int], start: int) -> None:
        """Learns what the cache holds already.

        Args:
            prefix: token ids in the cache; empty if the caller does not say.
            start: number of tokens in the cache.
        """

    def uniforms(self, shape: BlockShape, start: int) -> mx.array | None:
        """[R - n_real] float32, the uniforms of a block's slot rows; None if the slots take none.

        Args:
            shape: the block's rows.
            start: absolute position of the pending token.
        """
        return None

    def observe(self, head_input: mx.array, tokens: list[int]) -> None:
        """Records rows of a pass after which nothing is drafted.

        Args:
            head_input: [1, R, D] hidden states of the next R rows, as in `Verified`.
            tokens: committed tokens of this generation; the newest may be missing.
        """

    def catch_up(self, tokens: list[int]) -> None:
        """Finishes deferred work at the end of the prompt."""

    def propose(self, verified: Verified) -> LazyDrafts:
        """Drafts the positions after the target's own pick; `commit` must follow.

        Drafts as many positions as the largest slot group has slots, or `layout.chain`, with at most `layout.width`
        candidates each. Those beyond the size of the slot group after row `last` are meaningless.
        """
        raise NotImplementedError

    def commit(self, n_accepted: int) -> None:
        """Keeps the part of the last `propose` that is final, now that the host knows a."""


class DraftSource(Speculator):
    """A speculator that can draft.

    Attributes:
        name: its name in the `drafter` argument and in statistics, such as "slots" or "heads".
        title: its name in messages.
        noise: the sampling method that it was trained for, used unless the user chooses one.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    noise: ClassVar[NoiseName] = "gumbel"

    def open(
        self, attached: AttachedModel, picker: Picker, drafts: int, start: int, *, verified: bool = True
    ) -> Drafter:
        """Opens the drafter of one generation.

        Args:
            attached: the model to draft for; this source is its speculator.
            picker: the target's picker; drafts use the same noise, which couples them to the target.
            drafts: most drafts per step.
            start: tokens that an earlier generation left in the cache.
            verified: whether drafts are verified; if not, their probabilities must be over the full vocabulary.

        Raises:
            MTPError: if it cannot draft that many.
        """
        raise NotImplementedError

    @property
    def fixed(self) -> bool:
        """Whether the user fixed the number of drafts per step; layout "auto" is then "linear"."""
        return False

    @property
    def most_drafts(self) -> int:
        """Most drafts per step that a caller may ask for."""
        return self.drafts

    def check_drafts(self, drafts: int | None) -> None:
        """Raises MTPError if it cannot make `drafts` drafts per step; None is its default number."""
        if drafts is not None and not 1 <= drafts <= self.most_drafts:
            raise MTPError(
                f"with {self.title}, drafts per step must be 1 to {self.most_drafts}; got {drafts}"
            )

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Raises MTPError if it cannot draft for this sampling."""

    def check_caches(self, caches: Sequence[Any]) -> None:
        """Raises MTPError if it reads the model's caches, one a layer, and cannot read one of these."""

    def why_not_unverified(self) -> str:
        """The reason why its drafts cannot be emitted unverified; "" if they can."""
        return f"is for mask tokens, and this model drafts with {self.title}"

    def looped(self, drafts: int) -> str:
        """The note in statistics if `drafts` per step reuse parts of it, such as heads; "" if they do not."""
        return ""

    def cost_key(self, columns: int) -> str:
        """A key of everything about it that the cost of a step depends on.

        Args:
            columns: size of the vocabulary that drafts are picked from.
        """
        raise NotImplementedError


def source_of(attached: AttachedModel) -> DraftSource | None:
    """The drafter of `attached`, or None if it has none."""
    return cast("DraftSource | None", attached.speculator)
