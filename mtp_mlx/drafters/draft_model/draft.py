"""Drafts with another model, which continues the accepted text token by token.

The draft model needs to know how many drafts were accepted before it can continue, so a step has one more host read,
before drafting. The passes of a chain then have one row each and are lazy. Drafts are picked with the target's noise,
which couples them to the target: a model that drafts for itself is always right.

Invariant: the cache holds committed tokens only. Drafts run on a copy of it that is thrown away (`scratch`), so
nothing is rolled back, whatever kinds of cache the draft model has. The price is that accepted drafts run once more,
in one pass with the target's own token.

A prefix that came in a prompt cache is read too, if the caller says what it is. The draft model goes on from the text
of the generation before where that is the same, as it is from turn to turn of a conversation.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import (
    CacheList,
    KVCache,
    can_trim_prompt_cache,
    make_prompt_cache,
    trim_prompt_cache,
)

from mtp_mlx.decode.drafter import Drafter, LazyDrafts, Verified
from mtp_mlx.decode.led import led
from mtp_mlx.decode.pick import Picker
from mtp_mlx.distributed import Peers

CHUNK = 512  # tokens per pass when it reads text


class DraftModelDrafter(Drafter):
    """Drafts with a model for one generation.

    Args:
        model: a bare mlx-lm model.
        picker: the target's picker.
        vocab_size: V; only ids below it are drafted.
        columns: V', ids that the model knows; larger ones of the target are padding.
        peers: the processes that share the target.
        earlier: the drafter of the generation before, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        picker: Picker,
        vocab_size: int,
        columns: int,
        peers: Peers | None = None,
        earlier: DraftModelDrafter | None = None,
    ) -> None:
        self._model, self._picker, self._vocab_size = cast(Any, model), picker, vocab_size
        self._columns, self._peers, self._earlier = columns, peers or Peers(), earlier
        self._cache = make_prompt_cache(model)
        self._prefix: list[int] = []
        self._read: list[int] = []  # committed tokens in the cache, those of the prefix first
        self._passed = 0  # tokens of the prompt that the target has run
        self._prompt_done = False

    def begin(self, prefix: Sequence[int], start: int) -> None:
        """See `Drafter`."""
        self._prefix = list(prefix)
        if len(self._prefix) < start:
            self.note = "the draft model has not read the text in the prompt cache: fewer drafts are right"

    def observe(self, head_input: mx.array, tokens: list[int]) -> None:
        """See `Drafter`: reads the prompt along with the target; later, only what a draft needs."""
        self._passed += head_input.shape[1]
        if not self._prompt_done:
            self._read_until([*self._prefix, *tokens], len(self._prefix) + self._passed)

    def catch_up(self, tokens: list[int]) -> None:
        """See `Drafter`: reads the prompt except its last token."""
        text = [*self._prefix, *tokens]
        self._read_until(text, len(text) - 1)
        self._prompt_done = True

    def _read_until(self, text: list[int], end: int) -> None:
        """Reads committed tokens up to `end`; their logits are never evaluated."""
        if self._earlier is not None:
            self._go_on_from(self._earlier, text)
        while len(self._read) < end:
            chunk = text[len(self._read) : min(end, len(self._read) + CHUNK)]
            self._run(mx.array([chunk]), self._cache)
            for layer in self._cache:  # one after another: Ctrl-C waits for the end of an evaluation
                mx.eval(layer.state)
            self._read += chunk

    def _go_on_from(self, earlier: DraftModelDrafter, text: list[int]) -> None:
        """Takes over what an earlier generation has read, as far as it is the beginning of `text`."""
        self._earlier = None
        same = next(
            (i for i, pair in enumerate(zip(earlier._read, text)) if pair[0] != pair[1]),
            min(len(earlier._read), len(text)),
        )
        same = min(same, len(text) - 1)
        cache = [fork(layer) for layer in earlier._cache]
        surplus = len(earlier._read) - same
        if surplus and not can_trim_prompt_cache(cache):
            return
        trim_prompt_cache(cache, surplus)
        self._cache, self._read = cache, text[:same]

    def _run(self, ids: mx.array, cache: list[Any]) -> mx.array:
        """[1, R, V'] logits of ids [1, R]; the cache grows by R rows."""
        return cast(mx.array, self._model(mx.minimum(ids, self._columns - 1), cache=cache))

    def propose(self, verified: Verified) -> LazyDrafts:
        """See `Drafter`."""
        known = mx.concatenate([verified.accepted.reshape(1), verified.picks])
        accepted, *picks = cast("list[int]", led(self._peers, known).tolist())
        text = [*self._prefix, *verified.tokens, *picks[: accepted + 1]]
        self._read_until(text, len(text) - CHUNK)
        logits = self._run(mx.array([text[len(self._read) :]]), self._cache)[:, -1]  # [1, V']
        self._read = text
        return self._chain(logits, verified, picks[accepted])

    def _scores(self, logits: mx.array) -> mx.array:
        """[1, V] of logits [1, V']: padding of the draft model is cut off, ids that it does not know get -inf."""
        missing = self._vocab_size - logits.shape[-1]
        if missing <= 0:
            return logits[:, : self._vocab_size]
        return mx.concatenate([logits, mx.full((1, missing), -mx.inf, dtype=logits.dtype)], axis=-1)

    def _chain(self, logits: mx.array, verified: Verified, pick: int) -> LazyDrafts:
        """As many drafts as the layout asks for, from the logits [1, V'] after the target's own token `pick`."""
        cache = [scratch(layer) for layer in self._cache]
        history, token = verified.history, mx.array([pick], dtype=mx.int32)
        ids, confidences = [], []
        count = verified.layout.chain
        for depth in range(1, count + 1):
            if history is not None:
                history = mx.concatenate([history[1:], token])
            at = (self._scores(logits), (verified.position + depth).reshape(1))
            before = None if history is None else history[None]
            if verified.layout.width > 1:
                found, sure = self._picker.candidates(*at, before, None, verified.layout.width)
                found, sure = found[0], sure[0]
            else:
                found, sure = self._picker.pick_with_confidence(*at, before)
            ids.append(found)
            confidences.append(sure)
            token = found[:1]
            if depth < count:
                logits = self._run(token[None], cache)[:, -1]
        return LazyDrafts.joined(ids, confidences)


def scratch(layer: Any) -> Any:
    """A copy of a layer's cache that can be extended without changing `layer`.

    The copy of an ordinary cache shares its buffer, since it writes only after the rows that `layer` counts. Other
    caches overwrite rows, so their copy has arrays of its own, which MLX copies on the first write.
    """
    if isinstance(layer, CacheList):
        return CacheList(*[scratch(part) for part in layer.caches])
    return copy.copy(layer) if type(layer) is KVCache else fork(layer)


def fork(layer: Any) -> Any:
    """A copy of a layer's cache that both sides can go on from."""
    if isinstance(layer, CacheList):
        return CacheList(*[fork(part) for part in layer.caches])
    twin = copy.copy(layer)
    twin.__dict__ = {name: _own(value) for name, value in vars(layer).items()}
    return twin


def _own(value: Any) -> Any:
    """`value` with every array in it, also in lists, as a new object."""
    if isinstance(value, mx.array):
        return mx.array(value)
    return [_own(item) for item in value] if isinstance(value, list) else value
