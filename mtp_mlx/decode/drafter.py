"""What drafts, as decoding sees it: a `DraftSource` for a model, and one `Drafter` for every generation.

The decode loop, the planner, shared passes, calibration and unverified emission speak this protocol and nothing
else; none of them asks what kind of drafter it is. In every step

    uniforms  gives what the slot rows of the block carry          before the pass
    propose   drafts, lazily, from what the pass computed          before the step's one host read
    commit    learns how many drafts were accepted                 after it

and `observe` tells of passes behind which nothing is drafted: the prompt's, plain steps, other drafters' blocks.

Legend: R rows of a block, D hidden size, d drafts verified in it, a of them accepted, C tokens of history.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import mlx.core as mx

from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.pick import NoiseName, Picker, SamplingConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import BlockShape
from mtp_mlx.model.speculator import Speculator


@dataclass(frozen=True)
class Verified:
    """What a pass says about the drafts in it. Lazy: the host has read none of its arrays yet.

    Attributes:
        layout: of the pass. It may have room for more drafts than there were.
        shape: its rows.
        hidden: [R, D] latents, after the trunk's last norm.
        head_input: [1, 1 + d, D] the state of the real rows that the source takes (`Speculator.first_hidden`).
        logits: [1 + d, V] of the real rows.
        picks: [1 + d] int32, the target's own pick after each real row.
        accepted: int32 scalar a; picks[:a] are the accepted drafts, picks[a] is the target's own token.
        position: int32 scalar, absolute position of picks[a].
        history: [C] int32 tokens before picks[a], or None without penalties.
        tokens: committed tokens of this generation, its prompt included, the pending one last.
        drafts: [d] token ids that the pass verified.
    """

    layout: Layout
    shape: BlockShape
    hidden: mx.array
    head_input: mx.array
    logits: mx.array
    picks: mx.array
    accepted: mx.array
    position: mx.array
    history: mx.array | None
    tokens: list[int]
    drafts: list[int]

    @property
    def pick(self) -> mx.array:
        """int32 scalar, the target's own token."""
        return self.picks[self.accepted]


@dataclass(frozen=True)
class LazyDrafts:
    """A chain of fresh drafts that the host has not read yet.

    Attributes:
        ids: [n] int32, nearest position first.
        confidences: [n] float32 in [0, 1].
    """

    ids: mx.array
    confidences: mx.array

    @staticmethod
    def none() -> LazyDrafts:
        """No drafts."""
        return LazyDrafts(mx.zeros((0,), dtype=mx.int32), mx.zeros((0,)))


class Drafter:
    """Drafts for one generation, and owns what it needs to remember for that.

    Attributes:
        other_sampling: what differs from the sampling that the source was trained for, for people; "" if nothing.
    """

    other_sampling: str = ""

    def uniforms(self, shape: BlockShape, start: int) -> mx.array | None:
        """[R - n_real] float32, what the slot rows of a block carry; None where they carry nothing.

        Args:
            shape: the block's rows.
            start: absolute position of the pending token.
        """
        return None

    def observe(self, head_input: mx.array, tokens: list[int]) -> None:
        """Takes note of rows behind which it drafts nothing.

        Args:
            head_input: [1, R, D] of the R rows after those seen, the state that the source takes.
            tokens: committed tokens of this generation; the newest may be missing.
        """

    def catch_up(self, tokens: list[int]) -> None:
        """Does what waits, at the end of the prompt."""

    def propose(self, verified: Verified) -> LazyDrafts:
        """Drafts for the positions after the target's own pick; `commit` must follow.

        As many as the largest slot group, or as `layout.chain`, asks for; drafts beyond the size of slot group a
        are meaningless.
        """
        raise NotImplementedError

    def commit(self, n_accepted: int) -> None:
        """Keeps what has become final of the last `propose`, now that the host knows a."""


class DraftSource(Speculator):
    """A speculator that decoding can draft with.

    Attributes:
        name: what `drafter` and statistics call its drafts: "slots", "heads", ...
        title: what sentences call it.
        noise: how noise picks tokens unless the user says; the one that it was trained for.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    noise: ClassVar[NoiseName] = "gumbel"

    def open(
        self, attached: AttachedModel, picker: Picker, drafts: int, start: int, *, verified: bool = True
    ) -> Drafter:
        """The drafter of a generation.

        Args:
            attached: the model that it drafts for, whose speculator this is.
            picker: the target's picker; drafts use the same noise, which couples them to the target.
            drafts: most drafts of a step.
            start: tokens of an earlier prefix in the cache, which the generation has not run itself.
            verified: drafts are verified; otherwise their probabilities must be those among all tokens.

        Raises:
            MTPError: it cannot draft that many.
        """
        raise NotImplementedError

    @property
    def fixed(self) -> bool:
        """The user gave a number of drafts to be made in every step: layout "auto" is then "linear"."""
        return False

    @property
    def most_drafts(self) -> int:
        """Most drafts in a step that can be asked for."""
        return self.drafts

    def check_drafts(self, drafts: int | None) -> None:
        """Raises MTPError for a number of drafts in a step that it cannot make; None is its own number."""
        if drafts is not None and not 1 <= drafts <= self.most_drafts:
            raise MTPError(
                f"with {self.title}, drafts per step must be 1 to {self.most_drafts}; got {drafts}"
            )

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Raises MTPError for sampling whose picks it cannot draft for."""

    def why_not_unverified(self) -> str:
        """Why its drafts cannot be emitted unverified; "" if they can."""
        return f"is for mask tokens, and this model drafts with {self.title}"

    def looped(self, drafts: int) -> str:
        """What statistics say where `drafts` in a step need parts of it more than once; "" where they do not."""
        return ""

    def cost_key(self, columns: int) -> str:
        """Everything about it that the cost of a step depends on.

        Args:
            columns: of the head that drafts are picked with.
        """
        raise NotImplementedError


def source_of(attached: AttachedModel) -> DraftSource | None:
    """What drafts for `attached`, or None."""
    return cast("DraftSource | None", attached.speculator)
