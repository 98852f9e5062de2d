"""A cascade of MTP heads: which head makes which draft, running it over known text, and new untrained heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.heads.chain import HeadChain
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.drafters.heads.mtp_head import MTPHead, blocks_like, first_masked, norm_eps
from mtp_mlx.drafters.heads.taps import TapFusion
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.seams import embedding_shape, find_seams

MOST_CHAIN = 16  # most drafts per step of a cascade


class MTPHeads(DraftHeads):
    """A cascade of heads, which are reused in order if there are more drafts per step than heads.

    Args:
        heads, convention, draft_ids, drafts: see `DraftHeads`.
        fusion: joins the states of the trunk that the first head reads, if it reads several.
    """

    heads: list[MTPHead]

    def __init__(
        self,
        heads: Sequence[MTPHead],
        convention: HeadConvention,
        draft_ids: mx.array | None = None,
        drafts: int = 0,
        fusion: TapFusion | None = None,
    ) -> None:
        super().__init__(heads, convention, draft_ids, drafts)
        if fusion is not None:
            self.fusion = fusion

    @property
    def tapped_layers(self) -> tuple[int, ...]:
        """See `Speculator`."""
        return self.fusion.layers if "fusion" in self else ()

    def first_state(self, states: mx.array) -> mx.array:
        """The hidden state that the first head takes, [..., D], of what is read from the trunk (`head_input`)."""
        return self.fusion(states) if "fusion" in self else states

    def freeze_fusion(self) -> None:
        """Excludes what joins the states of several layers from training."""
        if "fusion" in self:
            self.fusion.freeze()

    def loop(self, drafts: int) -> None:
        """Sets the drafts per step to `drafts`, reusing the heads in order.

        Raises:
            MTPError: if there are more heads than drafts.
        """
        if drafts < len(self.heads):
            raise MTPError(
                f"`loop` {drafts} is less than the number of heads, {len(self.heads)}: use `drafts` to draft fewer"
            )
        self._drafts = drafts

    @property
    def most_drafts(self) -> int:
        """See `DraftSource`: heads can be reused."""
        return MOST_CHAIN

    def looped(self, drafts: int) -> str:
        """See `DraftSource`."""
        count = len(self.heads)
        return f"{count} head{'s' * (count > 1)} to {drafts} drafts" if drafts > count else ""

    def open(
        self, attached: AttachedModel, picker: Picker, drafts: int, start: int, *, verified: bool = True
    ) -> HeadChain:
        """See `DraftSource`."""
        depths = [self.at_depth(depth) for depth in range(1, 1 + drafts)]
        return HeadChain(attached, picker, self, depths, start)

    @contextmanager
    def recycling(self, state: str) -> Iterator[None]:
        """Temporarily makes every head pass on this state: "normed", "raw" or "trunk"."""
        before = [head._recycled for head in self.heads]
        for head in self.heads:
            head._recycled = state
        try:
            yield
        finally:
            for head, own in zip(self.heads, before, strict=True):
                head._recycled = own

    def over_text(
        self,
        attached: AttachedModel,
        tokens: mx.array,
        embeddings: mx.array,
        states: mx.array,
        depths: int,
    ) -> list[mx.array]:
        """See `DraftHeads`."""
        return self.cascade(embeddings, states, depths, tokens)

    def at_depth(self, depth: int) -> MTPHead:
        """The head that makes draft `depth` (from 1); after the last head, the first is reused."""
        return self.heads[(depth - 1) % len(self.heads)]

    def cascade(
        self,
        embeddings: mx.array,
        hidden: mx.array,
        most_depths: int | None = None,
        tokens: mx.array | None = None,
    ) -> list[mx.array]:
        """Runs all heads over known text.

        Args:
            embeddings: [B, T, D] of the tokens.
            hidden: [B, T, D] or, with tapped layers, [B, T, (n + 1) * D] of the trunk, as `AttachedModel.head_input`.
            most_depths: number of depths, by default one per head; see `at_depth` for more.
            tokens: [B, T] ids, from which heads with an embedding of their own take it; None if `embeddings` are it.

        Returns:
            z of every depth: z[k - 1] is [B, T - k, D], and its row i predicts token i + k + 1. Depths without any
            row are left out.
        """
        found, hidden = [], self.first_state(hidden)
        for depth in range(1, 1 + (most_depths or len(self.heads))):
            head = self.at_depth(depth)
            rows = embeddings.shape[1] - depth
            if rows < 1:
                break
            shifted = embeddings[:, depth:]
            if tokens is not None and "embed_tokens" in head:
                shifted = head.embed_tokens(tokens[:, depth:])
            shifted = first_masked(self.convention, shifted, 0)
            z, hidden = head(shifted, hidden[:, :rows], head.mask(shifted))
            found.append(z)
        return found


def new_heads(
    model: nn.Module,
    count: int,
    convention: HeadConvention,
    draft_ids: mx.array | None = None,
    *,
    layers: int = 1,
    taps: Sequence[int] = (),
    drafts: int = 0,
) -> MTPHeads:
    """`count` untrained heads for a bare mlx-lm model; blocks start as copies of its last layers.

    Args:
        layers: decoder layers of a head.
        taps: numbers (from 1) of the trunk's layers that the first head reads besides its last state.
        drafts: drafts per step, by default one per head.

    Raises:
        MTPError: if the model is attached or has fewer layers, or count is below 1.
    """
    if count < 1:
        raise MTPError(f"at least one head is needed, got {count}")
    seams = find_seams(model)
    trunk = seams.trunk
    eps = norm_eps(trunk)
    vocab_size, size = embedding_shape(seams.embedding)
    heads = []
    for _ in range(count):
        head = MTPHead(blocks_like(trunk, layers), size, eps, convention, vocab_size)
        # The embedding's half starts small and the hidden half as the identity: a new head repeats the trunk.
        head.fuse.weight = mx.concatenate([0.1 * mx.eye(size), mx.eye(size)], axis=1)
        heads.append(head)
    fusion = TapFusion(taps, size, eps) if taps else None
    return MTPHeads(heads, convention, draft_ids, drafts, fusion)
