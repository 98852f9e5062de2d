"""What heads take from the command line and from `load`. Needs no mlx."""

from __future__ import annotations

from dataclasses import dataclass

from mtp_mlx.config import setting


@dataclass(frozen=True)
class HeadsLoading:
    """How loaded heads are run.

    Attributes:
        loop: drafts per step; the heads are reused in order where there are fewer.
    """

    loop: int | None = setting(
        None, help="Draft this many tokens a step, reusing MTP heads in order", minimum=1, maximum=16
    )


LOADING = HeadsLoading
