"""Looped extension (MTP-D, arXiv 2603.23911): more heads from trained ones, group by group.

New head m + j starts as a copy of head j (j = 1..m: the whole group, never the last head alone). What was trained
before is frozen; the new group goes on from the hidden states of the frozen last head.
"""

from __future__ import annotations

import copy

from mtp_mlx.errors import MTPError
from mtp_mlx.model.mtp_head import MTPHead


def extended_count(extend: str, trained: int) -> int:
    """How many heads "2x" or a number asks for, from `trained` ones.

    Raises:
        MTPError: neither, fewer than one more head, or more than one new group.
    """
    if extend == "2x":
        return 2 * trained
    if not extend.isdecimal():
        raise MTPError(f"--extend is 2x or a number of heads, not {extend!r}")
    count = int(extend)
    if not trained < count <= 2 * trained:
        raise MTPError(
            f"--extend {count}: from {trained} heads, one run trains a new group of up to {trained}, so give "
            f"{' to '.join(map(str, sorted({trained + 1, 2 * trained})))}, and extend the result again for more"
        )
    return count


def extend_heads(trained: list[MTPHead], count: int) -> list[MTPHead]:
    """`count` heads: those trained, now frozen, then copies of them in turn."""
    new = [copy.deepcopy(trained[index % len(trained)]) for index in range(len(trained), count)]
    for head in trained:
        head.freeze()
    return [*trained, *new]
