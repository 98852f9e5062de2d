"""Options of a draft model, for the command line and `load`. Needs no mlx."""

from __future__ import annotations

from dataclasses import dataclass

from mtp_mlx.config import setting

DEFAULT_DRAFTS = 3  # mlx-lm's own default
MOST_DRAFTS = 16


@dataclass(frozen=True)
class DraftModelLoading:
    """The draft model, with the names of mlx-lm's options.

    Attributes:
        draft_model: the embedded model's name, an mlx-lm folder or a hub id.
        num_draft_tokens: drafts per step; None to plan them.
    """

    draft_model: str | None = setting(None, help="Draft with this smaller model of the same vocabulary")
    num_draft_tokens: int | None = setting(
        None,
        help=f"Drafts of the draft model in every step (default: up to {DEFAULT_DRAFTS})",
        minimum=1,
        maximum=MOST_DRAFTS,
    )


LOADING = DraftModelLoading
