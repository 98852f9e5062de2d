"""Initial weights of MTP heads: like the trunk's last layer, or copies of trained heads (looped extension).

New heads. The block of a head is a copy of the trunk's last layers, which were trained on the residual stream. `fuse`
would give it a normalised state, tens of times smaller, in which the layer's own output drowns everything else. So
the weights of the final norm are divided out of that state, and it is scaled to the size of the residual stream.
Measured once on SmolLM2-135M (size of the stream 39, of the state 30): loss 9.1 instead of 9.7 after 60 steps.

Looped extension (MTP-D, arXiv 2603.23911). New head m + j starts as a copy of head j, for j = 1..m: the whole group
is copied, never the last head alone. The trained heads are frozen; the new group goes on from the hidden states of
the last of them.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mtp_mlx.drafters.heads.cascade import MTPHeads
from mtp_mlx.drafters.heads.mtp_head import MTPHead, last_layers
from mtp_mlx.errors import MTPError
from mtp_mlx.model.seams import find_seams

SMALLEST = 0.1  # norm weights below this fraction of their typical size are raised to it before dividing
EMBEDDING_SHARE = 0.1  # initial scale of the embedding, relative to the hidden state


def start_like_trunk(heads: MTPHeads, model: nn.Module, tokens: list[int]) -> bool:
    """Sets `fuse` and the norms of new heads; False, and nothing set, if the final norm is not an RMS norm.

    Args:
        model: the base model, not attached.
        tokens: any text, to measure the size of the residual stream on.
    """
    trunk = find_seams(model).trunk
    weight = norm_weight(trunk)
    if weight is None or any("norm_out" not in head for head in heads.heads):
        return False
    first = last_layers(trunk, len(heads.heads[0].layers))[0]
    scale = _size(layer_input(trunk, first, mx.array([tokens], dtype=mx.int32)))
    typical, size = _size(weight), weight.size
    inverse = typical / mx.where(mx.abs(weight) < SMALLEST * typical, SMALLEST * typical, weight)
    halves = [EMBEDDING_SHARE * scale * mx.eye(size), scale * mx.eye(size)]
    for head in heads.heads:
        head.norm_out.weight = mx.array(weight)
        head.norm_hidden.weight = mx.array(inverse)
        head.fuse.weight = mx.concatenate(halves, axis=1)  # [D, 2D]
    mx.eval(heads.parameters())
    return True


def norm_weight(trunk: nn.Module) -> mx.array | None:
    """Weights of the trunk's final norm, float32 [D]; None if it does more than scale a normalised state."""
    norm = getattr(trunk, "norm", None) or getattr(trunk, "norm_f", None)
    if norm is None or "weight" not in norm:
        return None
    size = norm["weight"].size
    weight = norm(mx.ones((1, size)))[0].astype(mx.float32)  # [D]: an RMS norm leaves ones alone
    probe = mx.sin(mx.arange(size) * 0.7)[None] * 3.0
    expected = probe / mx.sqrt(mx.mean(probe * probe)) * weight
    same = mx.allclose(norm(probe).astype(mx.float32), expected, rtol=1e-2, atol=1e-2)
    return weight if same.item() and _size(weight) > 0 else None


def layer_input(trunk: nn.Module, index: int, tokens: mx.array) -> mx.array:
    """The residual stream before decoder layer `index`, [1, T, D]."""
    layer = trunk.layers[index]
    kind, seen = type(layer), []

    def call(self: nn.Module, hidden: mx.array, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden)
        return kind.__call__(self, hidden, *args, **kwargs)

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    try:
        trunk(tokens, cache=None)
    finally:
        layer.__class__ = kind
    return seen[0]


def _size(values: mx.array) -> float:
    """Root mean square per row; of these the median, since the first token's state is often huge."""
    rows = mx.sqrt(mx.mean(mx.square(values.astype(mx.float32)), axis=-1)).reshape(-1)
    return float(mx.sort(rows)[rows.size // 2].item())  # type: ignore[arg-type]


def extended_count(extend: str, trained: int) -> int:
    """Number of heads after extending `trained` heads.

    Args:
        extend: "2x", or the number.

    Raises:
        MTPError: `extend` is neither, adds no head, or adds more than one group.
    """
    if extend == "2x":
        return 2 * trained
    if not extend.isdecimal():
        raise MTPError(f"`extend` must be 2x or a number of heads, not {extend!r}")
    count = int(extend)
    if not trained < count <= 2 * trained:
        raise MTPError(
            f"`extend` is {count}: one run extends {trained} heads by a group of up to {trained}, so give "
            f"{' to '.join(map(str, sorted({trained + 1, 2 * trained})))}; for more, extend the result again"
        )
    return count


def extend_heads(trained: list[MTPHead], count: int) -> list[MTPHead]:
    """`count` heads: the trained ones, now frozen, and copies of them in the same order."""
    new = [copy.deepcopy(trained[index % len(trained)]) for index in range(len(trained), count)]
    for head in trained:
        head.freeze()
    return [*trained, *new]
