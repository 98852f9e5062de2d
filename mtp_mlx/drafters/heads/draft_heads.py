"""What MTP heads of all forms have in common. The forms are in

cascade.py     a cascade, each head after the one before it (DeepSeek-V3's form)
medusa.py      independent residual layers on the trunk's last hidden state
parallel.py    independent decoder layers on the hidden state before the trunk's last layer (Meta)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mtp_mlx.decode.drafter import DraftSource
from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.head import select_rows

# Step costs and tuned choices on users' disks are stored under these names, wherever the classes lie now.
_KEY_OF = {
    "MTPHead": "mtp_mlx.model.mtp_head.MTPHead",
    "MTPHeads": "mtp_mlx.model.mtp_head.MTPHeads",
    "MedusaHead": "mtp_mlx.model.medusa_head.MedusaHead",
    "MedusaHeads": "mtp_mlx.model.medusa_head.MedusaHeads",
    "ParallelHead": "mtp_mlx.model.parallel_head.ParallelHead",
    "ParallelHeads": "mtp_mlx.model.parallel_head.ParallelHeads",
}


class DraftHeads(DraftSource):
    """The heads of a model. They draft after the pass and need no rows in it.

    Args:
        heads: K heads, in order.
        convention: how they are run.
        draft_ids: [N] int32 ids that may be drafted, or None for all.
        drafts: drafts per step, by default one per head.
    """

    name = "heads"
    title = "MTP heads"
    heads: list[Any]

    def __init__(
        self,
        heads: Sequence[nn.Module],
        convention: HeadConvention,
        draft_ids: mx.array | None = None,
        drafts: int = 0,
    ) -> None:
        super().__init__()
        self.heads = list(heads)
        self._convention, self._draft_ids = convention, draft_ids
        self._drafts = drafts or len(heads)
        self._unembeddings: dict[int, nn.Module] = {}

    @property
    def drafts(self) -> int:
        """See `Speculator`."""
        return self._drafts

    @property
    def first_hidden(self) -> str:
        """See `Speculator`."""
        return self._convention.first_hidden

    @property
    def convention(self) -> HeadConvention:
        """How the heads are run."""
        return self._convention

    @property
    def draft_ids(self) -> mx.array | None:
        """See `Speculator`."""
        return self._draft_ids

    def cost_key(self, columns: int) -> str:
        """See `DraftSource`."""
        kinds = {type(module) for module in self.modules()}
        blocks = {_KEY_OF.get(kind.__name__, f"{kind.__module__}.{kind.__qualname__}") for kind in kinds}
        tensors = cast("list[tuple[str, mx.array]]", tree_flatten(self.parameters()))
        weights = sum(value.size for _, value in tensors)
        made_of = f"{sorted(blocks)}, {weights} weights"
        return f"{len(self.heads)} heads, {self.drafts} drafts, {made_of}, {columns} columns"

    def loop(self, drafts: int) -> None:
        """Sets the drafts per step to `drafts`, reusing the heads in order.

        Raises:
            MTPError: if heads of this kind cannot be reused, or there are more heads than drafts.
        """
        raise MTPError(
            f"heads of the kind '{self._convention.kind}' cannot be reused in a step: leave `loop` out"
        )

    def over_text(
        self,
        attached: AttachedModel,
        tokens: mx.array,
        embeddings: mx.array,
        states: mx.array,
        depths: int,
    ) -> list[mx.array]:
        """Runs the heads of all depths over known text; differentiable in the heads.

        Args:
            attached: the model that they are attached to.
            tokens: [B, T] the text.
            embeddings: [B, T, D] of it, by the base model.
            states: [B, T, (n + 1) * D] of it, as `AttachedModel.head_input`.
            depths: number of depths.

        Returns:
            The inputs of the LM head at every depth, [B, T - k, D] each, whose row i predicts token i + k + 1; depths
            without any row are left out.
        """
        raise NotImplementedError

    def logits(self, attached: AttachedModel, states: mx.array, depth: int) -> mx.array:
        """[..., C] logits of what the head at `depth` (from 1) made, [..., D], over the draft vocabulary."""
        own = self.unembedding(depth)
        return attached.draft_head(states) if own is None else own(states)

    @property
    def owns_lm_heads(self) -> bool:
        """Whether each head has an LM head of its own."""
        return self._convention.lm_head == "own"

    def freeze_vocabulary(self) -> None:
        """Excludes the heads' own embeddings and LM heads from training, as those of the base are."""
        for head in self.heads:
            for name in ("embed_tokens", "lm_head"):
                if name in head:
                    head[name].freeze()

    def set_heads(self, heads: Sequence[nn.Module], drafts: int) -> None:
        """Replaces the heads, and sets the drafts per step."""
        self.heads, self._drafts = list(heads), drafts
        self.forget_rows()

    def set_draft_ids(self, draft_ids: mx.array | None) -> None:
        """Sets the draft vocabulary, [N] int32 ids, or None for all."""
        self._draft_ids = draft_ids
        self.forget_rows()

    def forget_rows(self) -> None:
        """Forgets the rows that were selected from the heads' own LM heads; call when these change."""
        self._unembeddings = {}

    def unembedding(self, depth: int) -> nn.Module | None:
        """The LM head of the head at `depth` (from 1), [..., D] -> [..., V], or N columns with a draft vocabulary.

        None if the head shares the trunk's.
        """
        index = (depth - 1) % len(self.heads)
        head = self.heads[index]
        if "lm_head" not in head or self._draft_ids is None:
            return head.get("lm_head")
        if index not in self._unembeddings:
            self._unembeddings[index] = select_rows(head.lm_head, self._draft_ids)
        return self._unembeddings[index]


class IndependentHeads(DraftHeads):
    """Heads that do not depend on each other; head i makes draft i, so there are at most as many drafts as heads."""

    @property
    def most_drafts(self) -> int:
        """See `DraftSource`."""
        return len(self.heads)

    def over_text(
        self,
        attached: AttachedModel,
        tokens: mx.array,
        embeddings: mx.array,
        states: mx.array,
        depths: int,
    ) -> list[mx.array]:
        """See `DraftHeads`."""
        rows = states.shape[1]
        return [
            self.over_states(attached, head, states)[:, : rows - depth]
            for depth, head in enumerate(self.heads[:depths], start=1)
            if depth < rows
        ]

    def over_states(self, attached: AttachedModel, head: Any, states: mx.array) -> mx.array:
        """The input of the LM head, [B, T, D], of a head that reads states [B, T, D] from the start of a text."""
        raise NotImplementedError


def heads_of(attached: AttachedModel) -> DraftHeads:
    """The heads of a model whose drafter is MTP heads."""
    heads = attached.speculator
    assert isinstance(heads, DraftHeads)
    return heads
