"""MTP heads: one decoder block each, in a cascade behind the trunk (DeepSeek-V3's form; MTP-D, arXiv 2603.23911).

Head k (from 1) at position i sees the embedding of token i + k and the hidden state that head k - 1 (head 0: the
trunk) made at position i, and predicts token i + k + 1:

    x = fuse([norm_embedding(E[t[i+k]]) ; norm_hidden(h[k-1][i])])
    y = block(x)                          its own attention over the head's earlier positions, its own KV cache
    z = norm_out(y)                       what the LM head reads
    h[k][i] = z, y or h[k-1][i]           `HeadConvention.recycled_hidden`

The block is of the base model's own layer class. Whatever differs between families of heads is in `HeadConvention`.

Legend: B batch, T tokens, D hidden size, K heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.models.base import create_attention_mask

from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.errors import MTPError


class MTPHead(nn.Module):
    """One head.

    Args:
        block: a decoder layer, called as mlx-lm calls its own; or several, at most one of which has attention
            (Nemotron-H).
        hidden_size: D.
        eps: of the norms.
        convention: how it is run.
        vocab_size: V, rows of the head's own embedding or LM head where the convention says that it has one.
        window: rows that the block sees at most, its own included; None for all.

    Raises:
        ValueError: an embedding or LM head of its own without `vocab_size`.
    """

    def __init__(
        self,
        block: nn.Module | list[nn.Module],
        hidden_size: int,
        eps: float,
        convention: HeadConvention,
        vocab_size: int = 0,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if "own" in (convention.embedding, convention.lm_head) and not vocab_size:
            raise ValueError("a head with an embedding or LM head of its own needs the vocabulary's size")
        self.fuse = nn.Linear(2 * hidden_size, hidden_size, bias=False)  # [D, 2D]: embedding, then hidden
        self.norm_embedding = nn.RMSNorm(hidden_size, eps)
        self.norm_hidden = nn.RMSNorm(hidden_size, eps)
        self.block = block
        if convention.output_norm != "identity":
            self.norm_out = nn.RMSNorm(hidden_size, eps)
        if convention.embedding == "own":
            self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        if convention.lm_head == "own":
            self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.window = window
        self._recycled = convention.recycled_hidden

    def embed(self, ids: mx.array, shared: Callable[[mx.array], mx.array]) -> mx.array:
        """[..., D] embeddings of ids [...], by the head's own table or else by `shared`."""
        return self.embed_tokens(ids) if "embed_tokens" in self else shared(ids)

    def mask(self, hidden: mx.array, cache: Any = None) -> mx.array | None:
        """[T, c + T] bool, whom the block's T new rows see behind c cached ones; None where they see all.

        Args:
            hidden: [B, T, D] the rows.
            cache: the head's own KV cache, or None.
        """
        return cast(
            "mx.array | None",
            create_attention_mask(hidden, cache, window_size=self.window, return_array=True),
        )

    def __call__(
        self, embedding: mx.array, hidden: mx.array, mask: Any, cache: Any = None
    ) -> tuple[mx.array, mx.array]:
        """(z, h): what the LM head reads and what the next head takes, both [B, T, D].

        Args:
            embedding: [B, T, D] of the tokens one position further than the last head's.
            hidden: [B, T, D] from the head before, or the trunk.
            mask: as for a decoder layer.
            cache: the head's own KV cache, or None.
        """
        x = mx.concatenate([self.norm_embedding(embedding), self.norm_hidden(hidden)], axis=-1)  # [B, T, 2D]
        y = self._through_block(self.fuse(x), mask, cache)
        z = self.norm_out(y) if "norm_out" in self else y
        return z, {"normed": z, "raw": y, "trunk": hidden}[self._recycled]

    def _through_block(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        """[B, T, D] -> [B, T, D]; of several layers, those without attention ignore mask and cache."""
        for layer in self.block if isinstance(self.block, list) else [self.block]:
            x = layer(x, mask, cache)
        return x


def first_masked(convention: HeadConvention, embeddings: mx.array, first_position: int) -> mx.array:
    """[B, T, D] embeddings as a head takes them: zero at position 0, if the convention says so."""
    if not convention.mask_first_position or first_position > 0:
        return embeddings
    return mx.concatenate([mx.zeros_like(embeddings[:, :1]), embeddings[:, 1:]], axis=1)


def block_like(trunk: nn.Module) -> nn.Module:
    """A copy of the trunk's last decoder layer, quantised weights dequantised: what a new head starts from.

    Raises:
        MTPError: the layer is wrapped (the model is attached).
    """
    layer = trunk.layers[-1]
    if any(name.endswith((".base", ".low_rank")) for name, _ in layer.named_modules()):
        raise MTPError("heads are made from a bare model: detach it first")
    block = copy.deepcopy(layer)
    dense = tree_map_with_path(
        lambda _, module: _dense(module), block.leaf_modules(), is_leaf=nn.Module.is_module
    )
    block.update_modules(dense)
    block.unfreeze()
    return block


def _dense(module: Any) -> Any:
    """An `nn.Linear` with a quantised layer's values; any other module as it is."""
    if not isinstance(module, nn.QuantizedLinear):
        return module
    weight = mx.dequantize(
        module.weight, module.scales, module.get("biases"), module.group_size, module.bits, mode=module.mode
    )
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in module)
    linear.weight = weight
    if "bias" in module:
        linear.bias = module.bias
    return linear


def norm_eps(trunk: nn.Module) -> float:
    """The epsilon of the trunk's last norm, which the norms of heads share."""
    norm = getattr(trunk, "norm", None) or getattr(trunk, "norm_f", None)
    return float(getattr(norm, "eps", 1e-5))
