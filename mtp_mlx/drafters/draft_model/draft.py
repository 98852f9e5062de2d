"""Drafts with another model, which continues the accepted text token by token.

The draft model needs to know how many drafts were accepted before it can continue, so a step has one more host read,
before drafting. The passes of a chain then have one row each and are lazy. Drafts are picked with the target's noise,
which couples them to the target: a model that drafts for itself is always right.

Invariant: the cache holds committed tokens only. Drafts run on a copy of it that is thrown away (`scratch`), so
nothing is rolled back, whatever kinds of cache the draft model has. The price is that accepted drafts run once more,
in one pass with the target's own token.

As with heads, a prefix that came in a prompt cache is unknown: the draft model reads only the tokens after it.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, make_prompt_cache

from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.pick import Picker

CHUNK = 512  # tokens per pass when it reads text


class DraftModelDrafter(Drafter):
    """Drafts with a model for one generation.

    Args:
        model: a bare mlx-lm model.
        picker: the target's picker.
        vocab_size: V; only ids below it are drafted.
    """

    def __init__(self, model: nn.Module, picker: Picker, vocab_size: int) -> None:
        self._model, self._picker, self._vocab_size = cast(Any, model), picker, vocab_size
        self._cache = make_prompt_cache(model)
        self._read = 0  # committed tokens in the cache

    def catch_up(self, tokens: list[int]) -> None:
        """See `Drafter`: reads the prompt except its last token."""
        self._read_until(tokens, len(tokens) - 1)

    def _read_until(self, tokens: list[int], end: int) -> None:
        """Reads committed tokens up to `end`; their logits are never evaluated."""
        while self._read < end:
            chunk = tokens[self._read : min(end, self._read + CHUNK)]
            self._model(mx.array([chunk]), cache=self._cache)
            mx.eval([layer.state for layer in self._cache])
            self._read += len(chunk)

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter`."""
        known = mx.concatenate([verified.accepted.reshape(1), verified.pick.reshape(1)])
        accepted, pick = cast("list[int]", known.tolist())
        tokens = [*verified.tokens, *verified.drafts[:accepted], pick]
        self._read_until(tokens, len(tokens) - CHUNK)
        rows = mx.array([tokens[self._read :]])
        logits = self._model(rows, cache=self._cache)[:, -1]  # [1, V']
        self._read = len(tokens)
        return self._chain(logits, verified, pick)

    def _chain(self, logits: mx.array, verified: Verified, pick: int) -> LazyDrafts:
        """As many drafts as the layout asks for, from the logits [1, V'] after the target's own token `pick`."""
        cache = [scratch(layer) for layer in self._cache]
        history, token = verified.history, mx.array([pick], dtype=mx.int32)
        ids, confidences = [], []
        count = verified.layout.chain
        for depth in range(1, count + 1):
            if history is not None:
                history = mx.concatenate([history[1:], token])
            token, sure = self._picker.pick_with_confidence(
                logits[:, : self._vocab_size],
                (verified.position + depth).reshape(1),
                None if history is None else history[None],
            )
            ids.append(token)
            confidences.append(sure)
            if depth < count:
                logits = self._model(token[None], cache=cache)[:, -1]
        return LazyDrafts(mx.concatenate(ids), mx.concatenate(confidences))


def scratch(layer: Any) -> Any:
    """A copy of a layer's cache that can be extended without changing `layer`.

    The copy of an ordinary cache shares its buffer, since it writes only after the rows that `layer` counts. Other
    caches overwrite rows, so their copy has arrays of its own, which MLX copies on the first write.
    """
    if isinstance(layer, CacheList):
        return CacheList(*[scratch(part) for part in layer.caches])
    twin = copy.copy(layer)
    if type(layer) is not KVCache:
        twin.__dict__ = {name: _own(value) for name, value in vars(layer).items()}
    return twin


def _own(value: Any) -> Any:
    """`value` with every array in it, also in lists, as a new object."""
    if isinstance(value, mx.array):
        return mx.array(value)
    return [_own(item) for item in value] if isinstance(value, list) else value
