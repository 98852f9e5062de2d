"""The decode loop over a known text, without a model's passes.

Legend: B batch, R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from known_text.proposals import Proposals
from mtp_mlx.decode.drafter import Drafter, DraftSource, LazyDrafts, Verified, source_of
from mtp_mlx.decode.loop import mtp_generate_step
from mtp_mlx.decode.policy import LayoutName
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block
from mtp_mlx.model.branches import why_no_branches
from mtp_mlx.planning.choose import plan_drafting
from mtp_mlx.train.data import Example

NOTHING = -1  # what follows the text: no token


class _Known(Drafter):
    """Proposes in the decode loop what is known already."""

    def __init__(self, proposals: Proposals, length: int) -> None:
        self._proposals, self._length = proposals, length

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter`."""
        place = int(verified.position.item()) - 1
        if place + 1 >= self._length:  # the text ends here
            return LazyDrafts.none()
        return self._proposals.behind(place, verified.layout.width)


class _KnownSource:
    """A model's drafter, whose generations propose what is known already."""

    def __init__(self, source: DraftSource, proposals: Proposals, length: int) -> None:
        self._source, self._drafter = source, _Known(proposals, length)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def open(self, *_: Any, **__: Any) -> Drafter:
        """See `DraftSource`."""
        return self._drafter


class KnownText:
    """Takes a model's place in the decode loop, which then writes a known text.

    The hidden state of a row is one number: the token that it picks.

    Args:
        attached: the model, asked for everything but its passes.
        example: the text.
        proposals: what its drafter proposes; None if that is not used.
    """

    def __init__(self, attached: AttachedModel, example: Example, proposals: Proposals | None) -> None:
        why_no_branches(attached)  # found out by a pass, which cannot be made here
        source = source_of(attached)
        self._attached, self._tokens = attached, example.tokens
        self._vocabulary = mx.arange(attached.vocab_size)
        self.head_input: Any = None
        self.speculator: Any = source
        if source is not None and proposals is not None:
            self.speculator = _KnownSource(source, proposals, len(example))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attached, name)

    def make_cache(self, *_: Any) -> list[Any]:
        """A cache that counts rows."""
        return [KVCache()]

    def forward(self, block: Block, cache: list[Any]) -> mx.array:
        """[1, R, 1] int32, the text's token behind each row's position; the cache grows by R rows.

        So a row off the path of the text picks what is right at its position. It cannot be accepted, because a row
        before it is not.
        """
        rows, start = block.ids.shape[1], cache[0].offset
        cache[0].update_and_fetch(mx.zeros((1, 1, rows, 1)), mx.zeros((1, 1, rows, 1)))
        places = start + np.arange(rows) if block.positions is None else np.array(block.positions)
        known = np.array([*self._tokens, *[NOTHING] * (2 + places.max())], dtype=np.int32)
        self.head_input = mx.array(known[places + 1])[None, :, None]
        return self.head_input

    def head(self, hidden: mx.array) -> mx.array:
        """[B, R, V] bool whether a token is the row's pick."""
        return hidden == self._vocabulary


@dataclass(frozen=True)
class Lane:
    """What drafts, and how steps are laid out.

    Attributes:
        drafter: the drafters, as in the `drafter` argument of `stream_generate`.
        layout, rows: as there.
    """

    drafter: str
    layout: LayoutName
    rows: int | None = None


def decode(
    model: AttachedModel | KnownText, example: Example, lane: Lane, most_tokens: int, ends: Sequence[int]
) -> DecodeStats:
    """Counts of writing the answer, greedily, with a model or with a `KnownText` in its place.

    Args:
        most_tokens: the `max_tokens` of a text that ends earlier. One without an end was cut at its length.
        ends: token ids that end a text.

    Raises:
        MTPError: if the model writes something else.
    """
    model, stats = cast(AttachedModel, model), DecodeStats()
    prompt, answer = example.tokens[: example.loss_start], example.tokens[example.loss_start :]
    drafting = plan_drafting(model, lane.layout, None, stats, drafter=lane.drafter, rows=lane.rows)
    most = max(most_tokens, len(answer)) if answer[-1] in ends else len(answer)
    steps = mtp_generate_step(
        prompt, model, max_tokens=most, policy=drafting.policy, lookup=drafting.lookup, stats=stats
    )
    with closing(steps):
        written = [item.token for _, item in zip(answer, steps, strict=False)]
    if written != answer:
        raise MTPError(
            "a text is not what the model writes: use greedy answers of this model, as `mtp-mlx distill` writes them"
        )
    return stats
