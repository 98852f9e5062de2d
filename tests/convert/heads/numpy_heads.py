"""MTP heads in plain numpy, over PyTorch's own tensor names and one table of what families do: an oracle.

`Rules` says what the reference tables say of a family. Tests change one rule at a time to show that it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.convert.heads.numpy_layers import Array, Tensors

LayerFunction = Callable[[Tensors, Array], Array]


@dataclass(frozen=True)
class Names:
    """Stored names of one head, without ".weight"; out "" is the identity. block: prefixes of its layers."""

    fuse: str
    embedding_norm: str
    hidden_norm: str
    out: str
    blocks: tuple[str, ...]
    lm_head: str = "lm_head"
    embed_tokens: str = "model.embed_tokens"


@dataclass(frozen=True)
class Rules:
    """What a family does.

    Attributes:
        hidden_first: the fuse weight's first columns act on the hidden state.
        plus: added to stored norm weights (1 where they are stored around zero).
        first: the trunk's state that goes in: "post-norm", "pre-norm" or "before-last-layer".
        recycled: what the next depth takes: "normed", "raw", or "trunk" (what the first took).
        mask_first: the embedding of row 0 is zero.
        out_norm: the block's output is normalised for the LM head.
    """

    hidden_first: bool = False
    plus: float = 0.0
    first: str = "post-norm"
    recycled: str = "normed"
    mask_first: bool = False
    out_norm: bool = True


def head_logits(
    tensors: dict[str, Array],
    names: list[Names],
    layers: list[list[LayerFunction]],
    rules: Rules,
    tokens: list[int],
    states: dict[str, Array],
    depths: int,
    eps: float = 1e-6,
) -> list[Array]:
    """Logits of every depth k (from 1), [T - k, V]: row i takes token i + k and predicts token i + k + 1.

    Args:
        tensors: as stored.
        names, layers: for each head; beyond the last, heads are used again in turn.
        tokens: T known tokens.
        states: the trunk's states [T, D] by name, see `Rules.first`.
    """
    t = Tensors(tensors, plus=rules.plus, eps=eps)
    state, found = states[rules.first], []
    for depth in range(1, depths + 1):
        head, functions = names[(depth - 1) % len(names)], layers[(depth - 1) % len(names)]
        rows = min(len(tokens) - depth, len(state))
        embedded = t[f"{head.embed_tokens}.weight"][tokens[depth : depth + rows]]
        if rules.mask_first:
            embedded = np.concatenate([np.zeros_like(embedded[:1]), embedded[1:]])
        parts = [t.norm(head.embedding_norm, embedded), t.norm(head.hidden_norm, state[:rows])]
        if rules.hidden_first:
            parts.reverse()
        y = np.concatenate(parts, axis=1) @ t[f"{head.fuse}.weight"].T
        for prefix, function in zip(head.blocks, functions, strict=True):
            y = function(t.below(prefix), y)
        z = t.norm(head.out, y) if head.out and rules.out_norm else y
        found.append(z @ t[f"{head.lm_head}.weight"].T)
        state = {"normed": z, "raw": y, "trunk": state}[rules.recycled]
    return found


def greedy_chain(
    tensors: dict[str, Array],
    names: list[Names],
    layers: list[list[LayerFunction]],
    rules: Rules,
    tokens: list[int],
    states: dict[str, Array],
    depths: int,
    eps: float = 1e-6,
) -> list[int]:
    """The drafts after `tokens`, whose newest row m = len(states) - 1 has token m + 1 as the target's pick."""
    newest = len(states[rules.first]) - 1
    assert len(tokens) == newest + 2
    drafts: list[int] = []
    for depth in range(1, depths + 1):
        logits = head_logits(tensors, names, layers, rules, tokens + drafts, states, depth, eps)
        drafts.append(int(logits[-1][newest].argmax()))
    return drafts
