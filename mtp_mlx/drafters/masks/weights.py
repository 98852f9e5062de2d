"""The weights that a mask-token adapter adds to a base model: gated LoRA, slot embeddings, sampler head.

`MaskAdapter` is one module outside the base model's tree, which is trained, saved and attached.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.decode.pick import Picker
from mtp_mlx.drafters.masks.draft import MaskSlotDrafter
from mtp_mlx.drafters.slots.adapter import SlotAdapter, adapted_sizes, embedding_sample
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.rows import RowContext


@dataclass(frozen=True)
class MaskAdapterConfig:
    """Shape of a mask-token adapter (arXiv 2507.11851: k masks, LoRA rank r).

    `shared_mask` with `sampler_width` 0 is the form of arXiv 2602.06019: the same mask token in every slot, and each
    slot predicts by itself. With `rank` 0 as well, the adapter is just the mask, and the model itself was fine-tuned.

    Raises:
        MTPError: if a value is out of range.
    """

    slots: int = 4
    rank: int = 16  # 0 = no LoRA, with a shared mask only
    alpha: float = 32.0
    target_modules: tuple[str, ...] = ()  # last part of the layer's name; empty = every linear of a layer
    sampler_width: int = 1024  # hidden size of the sampler head; 0 = none, with a shared mask only
    draft_vocab_size: int = 0  # 0 = drafts come from the full vocabulary
    shared_mask: bool = False  # all slots are the same mask token

    def __post_init__(self) -> None:
        least_size = 0 if self.shared_mask else 1
        for name, least in (("slots", 1), ("rank", least_size), ("sampler_width", least_size)):
            if getattr(self, name) < least:
                raise MTPError(
                    f"adapter config: `{name}` must be at least {least}; got {getattr(self, name)}"
                )


class MaskAdapter(SlotAdapter):
    """Trained weights of the mask-token method.

    Args:
        config: shape of the adapter.
        linear_sizes: {path of a linear layer below the trunk: (D_in, D_out)}.
        hidden_size: D.
        draft_ids: [N] int32 ids that may be drafted, or None for all.
        initial_slot: [D] initial value of every slot embedding, to which small noise is added; None for noise only.
    """

    title = "mask tokens"

    def __init__(
        self,
        config: MaskAdapterConfig,
        linear_sizes: dict[str, tuple[int, int]],
        hidden_size: int,
        draft_ids: mx.array | None = None,
        initial_slot: mx.array | None = None,
    ) -> None:
        super().__init__(config, linear_sizes, draft_ids)
        masks = SharedMask if config.shared_mask else SlotEmbeddings
        self.slot_embeddings = masks(config.slots, hidden_size, initial_slot)
        width = config.sampler_width
        self.sampler = SamplerHead(hidden_size, width) if width else NoSamplerHead()

    @property
    def slot_module(self) -> nn.Module:
        """See `SlotAdapter`."""
        return self.slot_embeddings

    def embedding_layer(self, base: nn.Module, vocab_size: int, rows: RowContext) -> nn.Module:
        """See `Speculator`."""
        return SlotAwareEmbedding(base, self.slot_embeddings, vocab_size)

    def why_not_unverified(self) -> str:
        """See `DraftSource`: drafts from mask tokens can be, as in arXiv 2602.06019."""
        return ""

    def open(
        self, attached: AttachedModel, picker: Picker, drafts: int, start: int, *, verified: bool = True
    ) -> MaskSlotDrafter:
        """See `DraftSource`."""
        vocabulary = attached.draft_vocabulary if verified else attached.whole_vocabulary
        together = self.config.sampler_width == 0
        return MaskSlotDrafter(attached, picker, self.sampler, vocabulary, together, listed=verified)


class SamplerHead(nn.Module):
    """The sampler head: refines a slot's hidden state with the token before it (arXiv 2507.11851, section 2.3).

    Args:
        hidden_size: D.
        width: width of the hidden layer.
    """

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(2 * hidden_size, width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, hidden_size, bias=False)
        self.second.weight = mx.zeros_like(self.second.weight)

    def __call__(self, previous_embedding: mx.array, hidden: mx.array) -> mx.array:
        """The input of the LM head.

        Args:
            previous_embedding: [..., D] E[y_prev], the embedding of the token just before the predicted one.
            hidden: [..., D] hidden state z of the slot, after the final norm.

        Returns:
            [..., D] in the dtype of `hidden`.
        """
        x = mx.concatenate([_unit_scale(previous_embedding), _unit_scale(hidden)], axis=-1)
        return hidden + self.second(self.norm(nn.silu(self.first(x.astype(hidden.dtype)))))


class NoSamplerHead(nn.Module):
    """Takes the place of a sampler head in an adapter without one: each slot predicts by itself."""

    def __call__(self, previous_embedding: mx.array, hidden: mx.array) -> mx.array:
        """`hidden` unchanged."""
        return hidden


def _unit_scale(x: mx.array) -> mx.array:
    """x divided by its root mean square over the last axis."""
    return mx.fast.rms_norm(x, None, 1e-6)


class SlotEmbeddings(nn.Module):
    """k trained vectors.

    Args:
        count: k.
        hidden_size: D.
        initial: [D] initial value of all of them, to which noise is added; None for noise only.
    """

    def __init__(self, count: int, hidden_size: int, initial: mx.array | None = None) -> None:
        super().__init__()
        noise = mx.random.normal((count, hidden_size)) * 0.02
        self.weight = noise if initial is None else initial.astype(mx.float32)[None] + noise  # [k, D]

    def __call__(self, slots: mx.array) -> mx.array:
        """Embeddings of 0-based slots: [...] int -> [..., D]."""
        return self.weight[slots]


class SharedMask(SlotEmbeddings):
    """One trained vector for all slots, the single mask token of arXiv 2602.06019; `count` is ignored."""

    def __init__(self, count: int, hidden_size: int, initial: mx.array | None = None) -> None:
        super().__init__(1, hidden_size, initial)

    def __call__(self, slots: mx.array) -> mx.array:
        """The same [D] for every slot: [...] int -> [..., D]."""
        return mx.broadcast_to(self.weight[0], (*slots.shape, self.weight.shape[-1]))


class SlotAwareEmbedding(nn.Module):
    """The model's own embedding, extended by `SlotEmbeddings` for slot ids."""

    def __init__(self, base: nn.Module, slots: SlotEmbeddings, vocab_size: int) -> None:
        super().__init__()
        self.base = base
        self.slots = slots
        self._vocab_size = vocab_size

    def __call__(self, ids: mx.array) -> mx.array:
        """[B, R] int ids -> [B, R, D]."""
        ids = ids.astype(mx.int32)  # argmax gives uint32, whose differences wrap around
        real = self.base(mx.minimum(ids, self._vocab_size - 1))
        slot_ids = mx.maximum(ids - self._vocab_size, 0)
        slot = self.slots(slot_ids).astype(real.dtype)
        return mx.where((ids < self._vocab_size)[..., None], real, slot)

    def as_linear(self, hidden: mx.array) -> mx.array:
        """The tied LM head: [..., D] -> [..., V]. Slots are never predicted."""
        return self.base.as_linear(hidden)

    @property
    def weight(self) -> mx.array:
        """The base table, [V, D] (packed if quantised)."""
        return self.base.weight


def new_adapter(
    model: nn.Module, config: MaskAdapterConfig, draft_ids: mx.array | None = None
) -> MaskAdapter:
    """An untrained adapter of `config`'s shape for `model`; slot embeddings start at the mean token embedding.

    Raises:
        MTPError: if the model lacks a seam, or `target_modules` names a layer that it does not have.
    """
    sizes, hidden_size = adapted_sizes(model, config.target_modules, config.rank)
    return MaskAdapter(config, sizes, hidden_size, draft_ids, mx.mean(embedding_sample(model), axis=0))
