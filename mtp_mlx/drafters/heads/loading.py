"""Applies `load(..., loop=8)`, which reuses heads to draft more tokens per step."""

from __future__ import annotations

from mtp_mlx.decode.drafter import DraftSource
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.drafters.heads.options import HeadsLoading
from mtp_mlx.drafters.registry import LoadContext
from mtp_mlx.errors import MTPError


def prepare(source: DraftSource | None, options: HeadsLoading, context: LoadContext) -> DraftSource | None:
    """The heads in `source`, set to `options.loop` drafts per step.

    Raises:
        MTPError: if there are no heads, or they cannot make that many drafts.
    """
    if options.loop is None:
        return source
    if not isinstance(source, DraftHeads):
        raise MTPError(
            "`loop` reuses MTP heads, and there are none here: name them with `heads`, or their folder with `adapter`"
        )
    source.loop(options.loop)
    return source
