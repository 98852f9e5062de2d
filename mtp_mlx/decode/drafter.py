"""What the decode loop asks of heads that draft behind a trunk, whatever their form.

Rows count from the first token that this generation ran itself. Legend: n rows of the trunk committed before a block,
d drafts verified in it, a of them accepted, m = n + a its newest committed row.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx


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
