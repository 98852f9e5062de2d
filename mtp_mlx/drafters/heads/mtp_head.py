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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.models.base import create_attention_mask

from mtp_mlx.drafters.heads.convention import HeadConvention
from mtp_mlx.drafters.heads.draft_heads import DraftHeads
from mtp_mlx.errors import MTPError
from mtp_mlx.model.seams import embedding_shape, find_seams


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


class MTPHeads(DraftHeads):
    """A cascade of heads. Where more drafts are asked for than there are heads, they are applied again in turn."""

    heads: list[MTPHead]

    def loop(self, drafts: int) -> None:
        """Drafts so many tokens in each step: all heads in order, then all again, until there are enough.

        Raises:
            MTPError: fewer than there are heads.
        """
        if drafts < len(self.heads):
            raise MTPError(
                f"a loop of {drafts} drafts is shorter than the {len(self.heads)} heads: use slots to draft fewer"
            )
        self._drafts = drafts

    @contextmanager
    def recycling(self, state: str) -> Iterator[None]:
        """Inside the block every head passes this state on, "normed", "raw" or "trunk"."""
        before = [head._recycled for head in self.heads]
        for head in self.heads:
            head._recycled = state
        try:
            yield
        finally:
            for head, own in zip(self.heads, before, strict=True):
                head._recycled = own

    def at_depth(self, depth: int) -> MTPHead:
        """The head that makes draft `depth` (from 1): beyond the last, the heads are applied again in turn."""
        return self.heads[(depth - 1) % len(self.heads)]

    def cascade(
        self, embeddings: mx.array, hidden: mx.array, most_depths: int | None = None
    ) -> list[mx.array]:
        """All heads over known text.

        Args:
            embeddings: [B, T, D] of the tokens; by `MTPHead.embed` where heads have an embedding of their own.
            hidden: [B, T, D] of the trunk, after its final norm.
            most_depths: how many depths, by default one per head; see `at_depth` for more.

        Returns:
            z of every depth: z[k - 1] is [B, T - k, D], and its row i predicts token i + k + 1. Depths for which no
            row is left are absent.
        """
        found = []
        for depth in range(1, 1 + (most_depths or len(self.heads))):
            head = self.at_depth(depth)
            rows = embeddings.shape[1] - depth
            if rows < 1:
                break
            shifted = self.first_masked(embeddings[:, depth:], 0)
            z, hidden = head(shifted, hidden[:, :rows], head.mask(shifted))
            found.append(z)
        return found

    def first_masked(self, embeddings: mx.array, first_position: int) -> mx.array:
        """[B, T, D] as a head takes them: zero at position 0, if the convention says so."""
        if not self._convention.mask_first_position or first_position > 0:
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


def new_heads(
    model: nn.Module, count: int, convention: HeadConvention, draft_ids: mx.array | None = None
) -> MTPHeads:
    """`count` heads for a bare mlx-lm model: blocks start as its last layer, and `fuse` passes the hidden state on.

    Raises:
        MTPError: the model is attached, or count is below 1.
    """
    if count < 1:
        raise MTPError(f"at least one head is needed, got {count}")
    seams = find_seams(model)
    trunk = seams.trunk
    eps = norm_eps(trunk)
    vocab_size, size = embedding_shape(seams.embedding)
    heads = []
    for _ in range(count):
        head = MTPHead(block_like(trunk), size, eps, convention, vocab_size)
        # The embedding's half starts small, the hidden half as the identity: an untrained head repeats the trunk.
        head.fuse.weight = mx.concatenate([0.1 * mx.eye(size), mx.eye(size)], axis=1)
        heads.append(head)
    return MTPHeads(heads, convention, draft_ids)
