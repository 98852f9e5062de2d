"""MTP heads: one decoder block each, in a cascade on the trunk (DeepSeek-V3's form; MTP-D, arXiv 2603.23911).

Head k (from 1) at position i takes the embedding of token i + k and the hidden state of head k - 1 (head 0: the
trunk) at position i, and predicts token i + k + 1:

    x = fuse([norm_embedding(E[t[i+k]]) ; norm_hidden(h[k-1][i])])
    y = block(x)                          with attention over the head's earlier positions and its own KV cache;
                                          one decoder layer or several, one after another
    z = norm_out(y)                       the input of the LM head
    h[k][i] = z, y or h[k-1][i]           `HeadConvention.recycled_hidden`

The block has the base model's own layer class. The differences between families of heads are in `HeadConvention`.

Legend: B batch, T tokens, D hidden size, K heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask

from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.dense import dequantise
from mtp_mlx.drafters.heads.head_cache import HeadCache
from mtp_mlx.drafters.heads.layer_call import LayerCall, layer_call
from mtp_mlx.errors import MTPError
from mtp_mlx.model.seams import EMBEDDING_NAMES, embedding_shape


class MTPHead(nn.Module):
    """One head.

    Args:
        block: a decoder layer of mlx-lm, or several.
        hidden_size: D.
        eps: epsilon of the norms.
        convention: how it is run.
        vocab_size: V, needed if the convention gives the head its own embedding or LM head.
        window: most rows that a row sees in the block, including itself; None for all.

    Raises:
        MTPError: if a layer cannot run apart from its trunk, or none has attention.
        ValueError: if the head has its own embedding or LM head and there is no `vocab_size`.
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
            raise ValueError("a head with its own embedding or LM head needs `vocab_size`")
        self.fuse = nn.Linear(2 * hidden_size, hidden_size, bias=False)  # [D, 2D]: embedding, then hidden
        self.norm_embedding = nn.RMSNorm(hidden_size, eps)
        self.norm_hidden = nn.RMSNorm(hidden_size, eps)
        self.block = block
        self._calls = [call_of_head(layer, hidden_size) for layer in self.layers]
        if not any(call.parts for call in self._calls):
            raise MTPError(
                "a head without attention does not count its rows, and cannot be run (no seam 'cache')"
            )
        if convention.output_norm != "identity":
            self.norm_out = nn.RMSNorm(hidden_size, eps)
        if convention.embedding == "own":
            self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        if convention.lm_head == "own":
            self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.window = window
        self._recycled = convention.recycled_hidden

    def embed(self, ids: mx.array, shared: Callable[[mx.array], mx.array]) -> mx.array:
        """[..., D] embeddings of ids [...], from the head's own table or from `shared`."""
        return self.embed_tokens(ids) if "embed_tokens" in self else shared(ids)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers of the block, in order."""
        return self.block if isinstance(self.block, list) else [self.block]

    def make_cache(self) -> HeadCache:
        """An empty cache of keys and values."""
        return HeadCache(self._calls)

    def block_parameters(self) -> Any:
        """The tree of the block's weights."""
        return self.parameters()["block"]

    def set_block(self, weights: Any) -> None:
        """Sets the block's weights from a tree as `block_parameters` gives it."""
        self.update({"block": weights})

    def mask(self, hidden: mx.array, cache: HeadCache | None = None) -> mx.array | None:
        """[T, c + T] bool mask of T new rows after c cached ones; None if they see all.

        Args:
            hidden: [B, T, D] the rows.
            cache: the head's own KV cache, or None.
        """
        return cast(
            "mx.array | None",
            create_attention_mask(hidden, cache, window_size=self.window, return_array=True),
        )

    def __call__(
        self, embedding: mx.array, hidden: mx.array, mask: Any, cache: HeadCache | None = None
    ) -> tuple[mx.array, mx.array]:
        """(z, h): the inputs of the LM head and of the next head, both [B, T, D].

        Args:
            embedding: [B, T, D] of the tokens one position after those of the head before.
            hidden: [B, T, D] from the head before, or the trunk.
            mask: as for a decoder layer.
            cache: the head's own KV cache, or None.
        """
        x = mx.concatenate([self.norm_embedding(embedding), self.norm_hidden(hidden)], axis=-1)  # [B, T, 2D]
        y = self._through_block(self.fuse(x), mask, cache)
        z = self.norm_out(y) if "norm_out" in self else y
        return z, {"normed": z, "raw": y, "trunk": hidden}[self._recycled]

    def _through_block(self, x: mx.array, mask: Any, cache: HeadCache | None) -> mx.array:
        """[B, T, D] -> [B, T, D]; layers without attention ignore mask and cache."""
        for index, (layer, call) in enumerate(zip(self.layers, self._calls, strict=True)):
            x = call(layer, x, mask, None if cache is None else cache.layers[index])
        return x


def first_masked(convention: HeadConvention, embeddings: mx.array, first_position: int) -> mx.array:
    """[B, T, D] embeddings, with zeros at position 0 if the convention says so."""
    if not convention.mask_first_position or first_position > 0:
        return embeddings
    return mx.concatenate([mx.zeros_like(embeddings[:, :1]), embeddings[:, 1:]], axis=1)


def blocks_like(trunk: nn.Module, layers: int) -> nn.Module | list[nn.Module]:
    """Copies of the trunk's last decoder layers, see `block_like`: one, or a list of several.

    Raises:
        MTPError: if the trunk has fewer such layers (`last_layers`), or the model is attached.
    """
    blocks = [block_like(trunk, index) for index in last_layers(trunk, layers)]
    return blocks if layers > 1 else blocks[0]


def last_layers(trunk: nn.Module, count: int) -> list[int]:
    """Indices, ascending, of the decoder layers whose copies are the block of a new head: the last with attention.

    Layers that cannot run apart from the trunk are passed over, and so are those with recurrent state: a head's
    layers are rolled back by their keys and values.

    Raises:
        MTPError: if there are fewer.
    """
    size, found, why = embedding_shape(trunk[_embedding_name(trunk)])[1], list[int](), ""
    for index in reversed(range(len(trunk.layers))):
        if len(found) == count:
            break
        _check_bare(trunk.layers[index])
        try:
            if layer_call(trunk.layers[index], size).parts:
                found.append(index)
            else:
                why = why or "it has no attention"
        except MTPError as error:
            why = why or str(error)
    if not found and count > 0:
        raise MTPError(
            "MTP heads cannot be made for this model: none of its decoder layers runs apart from the others with a "
            f"cache of keys and values (no seam 'layer'; of the last one: {why}): use prompt lookup or a draft model"
        )
    if not 1 <= count <= len(found):
        raise MTPError(
            f"a head of {count} layers needs as many with attention to copy; this model has {len(found)}"
        )
    return found[::-1]


def _embedding_name(trunk: nn.Module) -> str:
    return next(name for name in EMBEDDING_NAMES if name in trunk)


def call_of_head(layer: nn.Module, hidden_size: int) -> LayerCall:
    """How a head's decoder layer is called.

    Raises:
        MTPError: if it cannot run apart from a trunk.
    """
    try:
        return layer_call(layer, hidden_size)
    except MTPError as error:
        raise MTPError(
            f"a head's decoder layer of the type {type(layer).__name__} does not run apart from a trunk: {error} "
            "(no seam 'layer')"
        ) from error


def _check_bare(layer: nn.Module) -> None:
    if any(name.endswith((".base", ".low_rank")) for name, _ in layer.named_modules()):
        raise MTPError("new heads need a bare model: detach it first")


def block_like(trunk: nn.Module, layer_index: int = -1) -> nn.Module:
    """A copy of a decoder layer of the trunk with dequantised weights: the start of a new head.

    Raises:
        MTPError: if the layer is wrapped, because the model is attached.
    """
    layer = trunk.layers[layer_index]
    _check_bare(layer)
    block = copy.deepcopy(layer)
    dequantise(block)
    block.unfreeze()
    return block


def norm_eps(trunk: nn.Module) -> float:
    """The epsilon of the trunk's final norm, which the heads' norms use too."""
    norm = getattr(trunk, "norm", None) or getattr(trunk, "norm_f", None)
    return float(getattr(norm, "eps", 1e-5))
