"""Slot rows the slow way: one causal forward pass per slot, sharing no code with `attach`.

    attached = attach(build(), random_adapter(build()))
    naive = NaiveModel(build(), attached.speculator)     a model of its own, of the same weights
    naive.hidden([5, 7, 9], slots=2)                  [5, D]: three real tokens, then slots 1 and 2

LoRA acts on rows by a mask of ones and zeros, slot embeddings are rows of one concatenated table, and the
attention mask and positions are the model's own.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mtp_mlx.drafters.masks.weights import MaskAdapter, MaskAdapterConfig, new_adapter
from mtp_mlx.model.seams import replace_module
from tests.tiny import tiny_model

QUANTIZABLE = {"hidden_size": 64, "intermediate_size": 96}


def quantized_model(architecture: str, bits: int = 4, **overrides: Any) -> nn.Module:
    """A tiny model whose every quantisable layer is quantised."""
    model = tiny_model(architecture, seed=3, **QUANTIZABLE, **overrides)
    nn.quantize(model, group_size=32, bits=bits)
    mx.eval(model.parameters())
    return model


def random_adapter(
    model: nn.Module, seed: int = 0, draft_ids: mx.array | None = None, **config: Any
) -> MaskAdapter:
    """An adapter none of whose tensors is zero, so that every row it touches changes."""
    shape = {"slots": 4, "rank": 3, "alpha": 6.0, "sampler_width": 24, **config}
    adapter = new_adapter(model, MaskAdapterConfig(**shape), draft_ids)
    rng = np.random.default_rng(seed)
    tensors = {
        name: value if name == "draft_ids" else mx.array(rng.normal(0, 0.3, value.shape).astype(np.float32))
        for name, value in adapter.tensors().items()
    }
    adapter.load_tensors(tensors)
    return adapter


class _Gate:
    """Which rows are slots in the pass at hand: [R, 1] of ones and zeros."""

    rows: mx.array


class _NaiveLinear(nn.Module):
    def __init__(self, base: nn.Module, down: mx.array, up: mx.array, scale: float, gate: _Gate) -> None:
        super().__init__()
        self.base, self._update, self._gate = base, scale * (down @ up), gate

    def __call__(self, x: mx.array) -> mx.array:
        return self.base(x) + self._gate.rows * (x @ self._update)

    @property
    def weight(self) -> mx.array:
        return self.base.weight


class _NaiveEmbedding(nn.Module):
    def __init__(self, base: nn.Module, vocab_size: int, slots: mx.array) -> None:
        super().__init__()
        self.base = base
        self._table = mx.concatenate([base(mx.arange(vocab_size)), slots])

    def __call__(self, ids: mx.array) -> mx.array:
        return self._table[ids]


class NaiveModel:
    """A model of its own (not attached) with an adapter's weights put in the slow way."""

    def __init__(self, model: nn.Module, adapter: MaskAdapter) -> None:
        self.gate = _Gate()
        self.trunk = model.model
        config = adapter.config
        for path, low_rank in adapter.low_rank.items():
            base: Any = self.trunk
            for part in path.split("."):
                base = base[int(part)] if isinstance(base, list) else base[part]
            naive = _NaiveLinear(base, low_rank.down, low_rank.up, config.alpha / config.rank, self.gate)
            replace_module(self.trunk, path, naive)
        embed = self.trunk.embed_tokens
        self.vocab_size = embed.weight.shape[0]
        masks = adapter.slot_embeddings.weight
        if config.shared_mask:
            masks = mx.concatenate([masks] * config.slots)
        self.trunk.embed_tokens = _NaiveEmbedding(embed, self.vocab_size, masks)

    def hidden(self, tokens: list[int], slots: int) -> np.ndarray:
        """[T + slots, D] final hidden states of `tokens`, then slots 1..slots, as one causal sequence."""
        ids = [*tokens, *range(self.vocab_size, self.vocab_size + slots)]
        self.gate.rows = mx.array([[0.0]] * len(tokens) + [[1.0]] * slots)
        return np.array(self.trunk(mx.array([ids]))[0])
