"""The assistant once more, in numpy and float64, over the whole text at once: no caches, no masks, no drafting.

What it reads of the model comes from mlx-lm's bare model, run over the text from its start with a cache that forgets
nothing.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from tests.drafters.gemma4_assistant.assistants import CLUSTERS, HEADS, KINDS, READS, SCORED, WINDOW, Arrays

EPS = 1e-6


def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """RMSNorm over the last axis."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS) * gain


def rotated(x: np.ndarray, position: int, base: float, share: float) -> np.ndarray:
    """Rotary embedding of x [..., width]; frequencies are those of the whole width, the first `share` are used."""
    half = x.shape[-1] // 2
    angles = position / base ** (np.arange(half) / half)
    angles[int(x.shape[-1] * share) // 2 :] = 0
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU in its approximation by tanh."""
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Oracle:
    """The drafts of an assistant after a text.

    Args:
        made: tensors of the checkpoint.
        model: a bare Gemma 4 of mlx-lm.
        back: how many places before the model's newest token the drafts look back from.
    """

    def __init__(self, made: Arrays, model: Any, back: int) -> None:
        self._back = back
        self._made = {name: value.astype(np.float64) for name, value in made.items()}
        self._model = model

    def logits(self, text: list[int], drafts: list[int]) -> list[np.ndarray]:
        """[V] logits of the draft after `text` and after each of `drafts`, -inf where no cluster is scored.

        Args:
            text: committed tokens, the model's own pick last.
        """
        trunk = self._model.model
        caches = [KVCache() for _ in self._model.make_cache()]
        state = np.array(trunk(mx.array([text[:-1]]), cache=caches)[0, -1]).astype(np.float64)
        known = len(text) - 1
        read = {kind: caches[READS[kind]].state[:2] for kind in READS}
        rows = {kind: tuple(np.array(part[0, :, :known]) for part in parts) for kind, parts in read.items()}
        embedding = np.array(trunk.embed_tokens.weight).astype(np.float64) * trunk.embed_scale
        found = []
        for token in (text[-1], *drafts):
            logits, state = self._step(
                np.concatenate([embedding[token], state]), rows, len(text) - 1 - self._back
            )
            found.append(logits)
        return found

    def _step(self, x: np.ndarray, rows: Any, position: int) -> tuple[np.ndarray, np.ndarray]:
        x = self._made["pre_projection.weight"] @ x
        for index, kind in enumerate(KINDS):
            x = self._layer(x, f"model.layers.{index}", kind, rows[kind], position)
        x = rms(x, self._made["model.norm.weight"])
        logits = self._made["model.embed_tokens.weight"] @ x
        if "masked_embedding.token_ordering" in self._made:
            scores = self._made["masked_embedding.centroids.weight"] @ x
            order = self._made["masked_embedding.token_ordering"].astype(int).reshape(CLUSTERS, -1)
            dropped = order[np.argsort(-scores)[SCORED:]]
            logits[dropped] = -np.inf
        return logits, self._made["post_projection.weight"] @ x

    def _layer(self, x: np.ndarray, name: str, kind: str, rows: Any, position: int) -> np.ndarray:
        weight = {
            key.removeprefix(f"{name}."): value
            for key, value in self._made.items()
            if key.startswith(f"{name}.")
        }
        sliding = kind == "sliding_attention"
        queries = (weight["self_attn.q_proj.weight"] @ rms(x, weight["input_layernorm.weight"])).reshape(
            HEADS, -1
        )
        queries = rms(queries, weight["self_attn.q_norm.weight"])
        queries = rotated(queries, position, *((1e4, 1.0) if sliding else (1e6, 0.25)))
        first = max(0, position - WINDOW + 1) if sliding else 0
        keys, values = (part[:, first:] for part in rows)
        out = []
        for head, query in enumerate(queries):
            group = head // (HEADS // len(keys))
            scores = keys[group] @ query
            chances = np.exp(scores - scores.max())
            out.append(chances / chances.sum() @ values[group])
        attended = weight["self_attn.o_proj.weight"] @ np.concatenate(out)
        x = x + rms(attended, weight["post_attention_layernorm.weight"])
        inner = rms(x, weight["pre_feedforward_layernorm.weight"])
        inner = gelu(weight["mlp.gate_proj.weight"] @ inner) * (weight["mlp.up_proj.weight"] @ inner)
        inner = weight["mlp.down_proj.weight"] @ inner
        return (x + rms(inner, weight["post_feedforward_layernorm.weight"])) * weight["layer_scalar"]
