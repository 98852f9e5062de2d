"""What the decode loop asks of heads that draft behind a trunk, whatever their form.

Rows count from the first token that this generation ran itself. Legend: n rows of the trunk committed before a block,
d drafts verified in it, a of them accepted, m = n + a its newest committed row.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from mtp_mlx.decode.drafters.draft_pick import pick_draft
from mtp_mlx.decode.pick import Picker
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.draft_heads import DraftHeads, IndependentHeads


class HeadDrafter(Protocol):
    """One generation's drafter; owns the heads' caches."""

    def observe(self, hidden: mx.array, tokens: list[int]) -> None:
        """Takes note of trunk rows behind which nothing is drafted, such as the prompt's.

        Args:
            hidden: [1, R, D] of the R rows after those seen, the state that the heads take.
            tokens: committed tokens from row 0 on; the newest may be missing.
        """
        ...

    def catch_up(self, tokens: list[int]) -> None:
        """Runs every head over the rows that have become final."""
        ...

    def propose(
        self,
        hidden: mx.array,
        picks: mx.array,
        accepted: mx.array,
        position: mx.array,
        history: mx.array | None,
        tokens: list[int],
        count: int,
    ) -> tuple[mx.array, mx.array]:
        """Drafts for the positions after the target's own pick, lazily; `commit` must follow.

        Args:
            hidden: [1, 1 + d, D] of the block's real rows.
            picks: [1 + d] int32, the target's picks; picks[i] follows row i.
            accepted: int32 scalar a.
            position: int32 scalar, absolute position of picks[a].
            history: [C] int32 tokens before picks[a], or None without penalties.
            tokens: committed tokens from row 0 on, the pending one last.
            count: how many drafts.

        Returns:
            ids [count] int32 and confidences [count] float32.
        """
        ...

    def commit(self, n_accepted: int) -> None:
        """Keeps what has become final of the last `propose`, now that the host knows a."""
        ...


def drafts_of(heads: IndependentHeads, asked: int | None) -> int:
    """How many tokens independent heads draft in a step: what was asked for, else what they are set to.

    Raises:
        MTPError: more than there are heads.
    """
    drafts = asked or heads.drafts
    if drafts > len(heads.heads):
        raise MTPError(f"{len(heads.heads)} heads of this form cannot draft {drafts} tokens in a step")
    return drafts


def pick_each(
    attached: AttachedModel,
    picker: Picker,
    heads: DraftHeads,
    refined: list[mx.array],
    pick: mx.array,
    position: mx.array,
    history: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Ids and confidences [count] of drafts that do not depend on each other, lazily.

    Args:
        refined: [1, D] what the LM head of each depth reads.
        pick: int32 scalar, the target's own pick, at `position` (a scalar).
        history: [C] int32 tokens before it, or None without penalties.
    """
    ids, confidences = [], []
    token = pick.reshape(1)
    for depth, row in enumerate(refined, start=1):
        if history is not None:
            history = mx.concatenate([history[1:], token])
        token, confidence = pick_draft(
            attached, picker, row, (position + depth).reshape(1), history, heads.unembedding(depth)
        )
        ids.append(token)
        confidences.append(confidence)
    return mx.concatenate(ids), mx.concatenate(confidences)
