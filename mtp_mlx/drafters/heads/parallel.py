"""Meta's parallel heads (arXiv 2404.19737): a decoder layer each, on the hidden states before the trunk's last layer.

The trunk's last layer is the next-token head. Extra head i (from 1) runs its layer over the same hidden states, with
attention over earlier rows and its own KV cache; the trunk's final norm and LM head follow, and row r predicts token
r + 1 + i. Heads take no embeddings, so their rows are final as soon as the trunk's are.
Legend: B batch, T rows, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask

from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.heads.draft_heads import IndependentHeads
from mtp_mlx.drafters.heads.head_cache import HeadCache
from mtp_mlx.drafters.heads.independent import pick_each
from mtp_mlx.drafters.heads.mtp_head import call_of_head
from mtp_mlx.model.attach import AttachedModel

CATCH_UP_AT = 256  # most rows that wait before the heads run over them


class ParallelHead(nn.Module):
    """One head.

    Args:
        block: a decoder layer of mlx-lm.
        hidden_size: D.

    Raises:
        MTPError: if the layer cannot run apart from a trunk.
    """

    def __init__(self, block: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.block = block
        self._call = call_of_head(block, hidden_size)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layer, in a list."""
        return [self.block]

    def make_cache(self) -> HeadCache:
        """An empty cache of keys and values."""
        return HeadCache([self._call])

    def __call__(self, hidden: mx.array, cache: HeadCache | None = None) -> mx.array:
        """[B, T, D] -> [B, T, D], before the trunk's final norm; the cache grows by T."""
        mask = create_attention_mask(hidden, cache, return_array=True)
        return self._call(self.block, hidden, mask, None if cache is None else cache.layers[0])


class ParallelHeads(IndependentHeads):
    """The parallel heads of a model."""

    heads: list[ParallelHead]

    def open(
        self, attached: AttachedModel, picker: Picker, drafts: int, start: int, *, verified: bool = True
    ) -> ParallelDrafter:
        """See `DraftSource`."""
        self.check_drafts(drafts)
        return ParallelDrafter(attached, picker, self, drafts)

    def over_states(self, attached: AttachedModel, head: ParallelHead, states: mx.array) -> mx.array:
        """See `IndependentHeads`."""
        return attached.last_norm(head(states))


@dataclass
class _Lane:
    """One head between steps.

    Attributes:
        head: the head.
        cache: keys and values of the rows that it has run.
        waiting: [1, w, D] each, hidden states of the rows after these.
    """

    head: ParallelHead
    cache: HeadCache
    waiting: list[mx.array] = field(default_factory=list)

    def run(self, new: list[mx.array]) -> mx.array:
        """[1, w + R, D] the head's output for the waiting rows and the new ones; the cache grows by them."""
        rows = [*self.waiting, *new]
        return self.head(mx.concatenate(rows, axis=1) if len(rows) > 1 else rows[0], self.cache)


class ParallelDrafter(Drafter):
    """Drafts with Meta's heads for one generation, and owns their caches. Arguments as `DraftSource.open`.

    A head's rows depend on the trunk's rows only, never on drafts. So between steps its cache holds every row that it
    has run, and the hidden states of the other rows, from passes that did not run it, are kept waiting.
    """

    def __init__(self, attached: AttachedModel, picker: Picker, heads: ParallelHeads, drafts: int) -> None:
        self._attached, self._picker, self._heads = attached, picker, heads
        self._lanes = [_Lane(head, head.make_cache()) for head in heads.heads[:drafts]]
        self._rows = 0  # n
        self._block: mx.array | None = None
        self._ran = 0

    def observe(self, head_input: mx.array, tokens: list[int]) -> None:
        """See `Drafter`."""
        self._rows += head_input.shape[1]
        for lane in self._lanes:
            lane.waiting.append(head_input)
        if any(self._rows - lane.cache.offset >= CATCH_UP_AT for lane in self._lanes):
            self.catch_up(tokens)

    def catch_up(self, tokens: list[int]) -> None:
        """See `Drafter`: runs the waiting rows, all of which are final, in one head after another."""
        for lane in self._lanes:
            if lane.waiting:
                lane.run([])
                lane.waiting = []
                mx.eval(lane.cache.state)  # each by itself: Ctrl-C waits for the end of an evaluation

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter`."""
        hidden, count = verified.head_input, verified.layout.chain
        self._block, self._ran = hidden, count
        refined = []
        for lane in self._lanes[:count]:
            made = lane.run([hidden])
            newest = made.shape[1] - hidden.shape[1] + verified.accepted
            refined.append(self._attached.last_norm(made[0, newest][None]))  # [1, D]
        return pick_each(self._attached, self._picker, self._heads, refined, verified)

    def commit(self, n_accepted: int) -> None:
        """See `Drafter`."""
        assert self._block is not None
        self._rows += n_accepted + 1
        for index, lane in enumerate(self._lanes):
            if index < self._ran:
                lane.cache.trim(lane.cache.offset - self._rows)
                lane.waiting = []
            else:
                lane.waiting.append(self._block[:, : n_accepted + 1])
        self._block, self._ran = None, 0
