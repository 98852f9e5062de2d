"""One sequence being decoded: its tokens, its KV cache, and the forward passes that extend both.

Invariant between steps: the cache holds every committed token but the last, the *pending* token, whose key and value
are written by the next pass. Rejected rows and slot rows are removed by one `keep` (`mtp_mlx.decode.rollback`).

mlx-lm quantises its cache right after the pass that reaches `quantized_kv_start`. Here this waits until just before
the next pass, with the same result: rows may be rolled back in between, which quantised rows cannot be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache

from mtp_mlx.decode.cache_check import check_prompt_cache, check_quantisation
from mtp_mlx.decode.constraint import Constraint, LogitsProcessor, processed
from mtp_mlx.decode.drafter import Drafter
from mtp_mlx.decode.led import led
from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.rollback import LayerCaches
from mtp_mlx.errors import MTPError
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.model.block import Block, BlockShape, block_shape
from mtp_mlx.model.branches import why_no_branches
from mtp_mlx.token_ids import check_ids

PROGRESS_SECONDS = 1.0  # between two reports inside a chunk of the prompt


@dataclass(frozen=True)
class CacheSettings:
    """KV-cache options with mlx-lm's names and meanings. `kv_bits` None leaves the cache unquantised."""

    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    prefill_step_size: int = 2048


class Session:
    """Forward passes over one sequence.

    Args:
        attached: the model.
        picker: the target's picker.
        prompt: token ids not yet in the cache, at least one.
        cache: mlx-lm prompt cache, possibly holding an earlier prefix; updated in place.
        settings: cache options.
        open_drafter: opens the model's own drafter, given the number of tokens in the cache; None for no drafter.
        constraint: constrains every token; None for no constraint. Cannot be used with `plain_pass`, which runs
            ahead.
        processors: change the target's logits, before penalties and warps.
        n_known: tokens in `cache`, for one that does not count them.

    Attributes:
        tokens: tokens committed after the cache's earlier prefix, the pending token last.
        start: number of tokens in that prefix.
        drafter: the model's own drafter, or None.

    Raises:
        MTPError: if the prompt is empty or has ids outside the vocabulary, if the cache cannot be rolled back or
            belongs to another model, or if it is to be quantised and has a sliding window or other group sizes.
    """

    def __init__(
        self,
        attached: AttachedModel,
        picker: Picker,
        prompt: list[int],
        cache: list[Any],
        settings: CacheSettings,
        open_drafter: Callable[[int], Drafter] | None = None,
        constraint: Constraint | None = None,
        processors: Sequence[LogitsProcessor] = (),
        n_known: int = 0,
    ) -> None:
        if not prompt:
            raise MTPError("the prompt is empty: give at least one token")
        check_ids(prompt, attached.vocab_size, "the prompt")
        check_prompt_cache(attached, cache)
        self._caches = LayerCaches(cache, getattr(attached.model, "model_type", "?"), n_known)
        self.attached, self.picker, self.constraint = attached, picker, constraint
        self.processors = list(processors)
        self.cache, self._settings = cache, settings
        self.start = self.cached
        check_quantisation(attached, cache, settings.kv_bits, settings.kv_group_size)
        self.drafter = None if open_drafter is None else open_drafter(self.start)
        self._has_run = self._settled = False
        self.tokens = list(prompt)
        self._n_prompt = len(prompt)

    @property
    def cached(self) -> int:
        """Tokens in the cache."""
        return self._caches.length

    def prefill(
        self,
        progress: Callable[[int, int], None] | None = None,
        states_at: dict[int, list[Any]] | None = None,
    ) -> None:
        """Runs the prompt except its last token, in chunks; calls `progress(tokens done, tokens in all)`.

        It is called after every chunk, and inside a chunk that takes long after about every second, with its tokens
        counted by the share of its layers that are done. `states_at` is filled in as `mtp_generate_step` describes.
        """
        wanted = {} if states_at is None else states_at
        for done in self.prefill_chunks(progress, sorted(wanted)):
            if done in wanted:
                wanted[done] = self.copied_states()
            if progress is not None:
                progress(done, len(self.tokens))
        if progress is not None:
            progress(len(self.tokens), len(self.tokens))

    def prefill_chunks(
        self, progress: Callable[[int, int], None] | None = None, ends: Sequence[int] = ()
    ) -> Iterator[int]:
        """As `prefill`, but yields the number of prompt tokens done after every chunk; `progress` only inside one.

        Args:
            ends: numbers of tokens behind which a chunk ends, whatever its size.
        """
        total = len(self.tokens)
        done = 0
        while done < total - 1:
            end = min([total - 1, done + self._settings.prefill_step_size, *(n for n in ends if n > done)])
            chunk = self.tokens[done:end]
            self.forward(Block.real(mx.array([chunk])))
            for tokens in self._layer_by_layer(done, len(chunk)):
                if progress is not None:
                    progress(tokens, total)
            self._observe()  # only now: a drafter may evaluate what it is given, and all that this depends on
            done += len(chunk)
            mx.clear_cache()
            yield done
        if self.drafter is not None:
            self.drafter.catch_up(self.tokens)

    def forward(self, block: Block) -> mx.array:
        """[B, R, D] hidden states of a pass, which appends the block's rows to the cache."""
        n_rows = block.ids.shape[1]
        self._caches.mark(n_rows)  # first: quantised rows cannot be rolled back
        if self._has_run:  # mlx-lm never quantises before the first pass
            self._quantize()
        self._has_run = True
        hidden = self.attached.forward(block, self.cache)
        self._caches.check_pass(n_rows)
        return hidden

    def _observe(self) -> None:
        """Reports the newest pass, after which nothing is drafted, to the drafter."""
        if self.drafter is not None:
            self.drafter.observe(self.attached.head_input, self.tokens)

    def _evaluate_cache(self) -> None:
        """Evaluates the cache: a lazy array belongs to its thread, and the cache may be passed to another."""
        mx.eval([layer.state for layer in self.cache])

    def _layer_by_layer(self, done: int, rows: int) -> Iterator[int]:
        """Evaluates the newest pass and yields how far it is, about every `PROGRESS_SECONDS`.

        Layer by layer, because Ctrl-C waits for the end of an evaluation; smaller chunks would round differently
        from mlx-lm's.

        Args:
            done: prompt tokens before this pass.
            rows: tokens of this pass.
        """
        said = time.monotonic()
        for count, layer in enumerate(self.cache, start=1):
            mx.eval(layer.state)
            if count < len(self.cache) and time.monotonic() - said >= PROGRESS_SECONDS:
                said = time.monotonic()
                yield done + rows * count // len(self.cache)

    def _quantize(self) -> None:
        settings = self._settings
        maybe_quantize_kv_cache(
            self.cache, settings.quantized_kv_start, settings.kv_group_size, settings.kv_bits
        )

    def draft_limit(self) -> int | None:
        """Most drafts that the next block may verify, or None for no limit.

        mlx-lm quantises the cache once it reaches `quantized_kv_start`. A block must not straddle that point: its
        later rows would see an unquantised prefix where plain decoding sees a quantised one.
        """
        settings = self._settings
        if settings.kv_bits is None:
            return None
        if self.cached >= settings.quantized_kv_start:
            quantised_by_then = self._has_run or not any(hasattr(c, "to_quantized") for c in self.cache)
            return None if quantised_by_then else 0
        return settings.quantized_kv_start - self.cached - 1

    def plain_pass(self, pending: mx.array, n_ahead: int) -> tuple[mx.array, mx.array]:
        """One plain pass over the pending token, lazily, so that it can run one step ahead of the host.

        Args:
            pending: [1] int32, possibly not read by the host yet.
            n_ahead: tokens before the pick that the host has not read yet (0 or 1).

        Returns:
            pick [1] int32 and logits [1, V].
        """
        position = self.cached + 1
        hidden = self.forward(Block.real(pending[None]))
        self._observe()
        logits = self.attached.head(hidden)[0]  # [1, V]
        history = None
        if self.picker.history_size:
            known = self._recent(self.tokens, self.picker.history_size - n_ahead)
            unread = [pending] if n_ahead else []
            history = mx.concatenate([mx.array(known, dtype=mx.int32), *unread])[None]
        wanted = logits
        if self.processors:
            text = mx.array(self.tokens, dtype=mx.int32)
            text = mx.concatenate([text, pending]) if n_ahead else text
            wanted = processed(self.processors, logits, [text])
        pick = self.picker.pick(wanted, mx.array([position]), history)
        return led(self.attached.peers, pick), logits

    def open_pass(self, slots: int) -> tuple[mx.array, BlockShape]:
        """A pass of unverified emission over every committed token not in the cache and `slots` mask slots, lazily.

        The slots' keys and values are removed at once, so the cache then holds every committed token.

        Returns:
            hidden states [R, D] and the block's shape; its last real row is the last committed token.
        """
        pending = self.tokens[self.cached - self.start :]
        shape = block_shape(len(pending) - 1, (0,) * (len(pending) - 1) + (slots,))
        rows = mx.array(pending, dtype=mx.int32)
        hidden = self.forward(Block.decode(rows, shape, self.cached, self.attached.vocab_size))[0]  # [R, D]
        self.trim(slots)
        return hidden, shape

    def history(self) -> mx.array | None:
        """[1, C] the newest committed tokens, or None without penalties."""
        return self.histories([])

    def processed(self, logits: mx.array, drafts: list[int], parents: Sequence[int] = ()) -> mx.array:
        """[1 + d, V] the real rows' logits after the processors; arguments as for `histories`."""
        if not self.processors:
            return logits
        paths: list[list[int]] = [[]]
        for node, token in enumerate(drafts):
            paths.append([*paths[parents[node] + 1 if parents else node], token])
        texts = [mx.array([*self.tokens, *path], dtype=mx.int32) for path in paths]
        return processed(self.processors, logits, texts)

    def keep_path(self, rows: list[int]) -> None:
        """Keeps these rows of the newest pass, in ascending order, in every layer's cache and removes the others."""
        self._caches.keep_path(rows)

    @property
    def why_chains(self) -> str:
        """Why drafts may have no branches; "" if they may."""
        if self.constraint is not None:
            return "drafts without branches: a grammar follows one text"
        reason = why_no_branches(self.attached)
        if not reason and not self._caches.keeps_paths:
            reason = "drafts without branches: this model's caches keep the first rows of a pass only"
        return reason

    def trim(self, rows: int) -> None:
        """Removes the newest `rows` rows, at most those of the newest pass, from every layer's cache."""
        self._caches.keep(self.cached - self._caches.marked - rows)

    @property
    def next_position(self) -> int:
        """Absolute position of the token after the pending one."""
        return self.start + len(self.tokens)

    def copied_states(self) -> list[Any]:
        """Copies of what the cache cannot be trimmed to later, as `LayerCaches.copies`; between two passes."""
        return self._caches.copies()

    def lend_caches(self) -> list[Any]:
        """Hands every layer's cache to another owner, such as a batch; until `take_caches` this session has none."""
        lent = list(self.cache)
        self.cache[:] = self.attached.make_cache()
        return lent

    def take_caches(self, layers: list[Any]) -> None:
        """Takes caches back after steps run elsewhere; they hold all committed tokens but the pending one."""
        self.cache[:] = layers
        self._caches.mark(0)

    @property
    def generated(self) -> list[int]:
        """Committed tokens after the prompt."""
        return self.tokens[self._n_prompt :]

    def settle(self, n_committed: int) -> None:
        """Ends the session; the cache then holds exactly the first `n_committed` of `self.tokens` after its prefix.

        If this is interrupted, as by Ctrl-C, call `rewind`.
        """
        surplus = self.cached - (self.start + n_committed)
        if surplus > 0:
            self.trim(surplus)
        elif surplus < 0:
            self.forward(Block.real(mx.array([self.tokens[n_committed + surplus : n_committed]])))
        if self._has_run:
            self._quantize()
        self._evaluate_cache()
        self._settled = True
        self._caches.hand_back()
        self._evaluate_cache()

    def rewind(self) -> None:
        """Ends a session whose newest pass may have been interrupted, as by Ctrl-C, without running another.

        The cache then holds what it held before that pass; if the session was already settled, it is left alone.
        """
        if not self._settled:
            self._caches.keep(0)
        self._caches.hand_back()

    def histories(self, drafts: list[int], parents: Sequence[int] = ()) -> mx.array | None:
        """[1 + d, C] the tokens before each real row's pick, or None without penalties; `parents` as in `Layout`."""
        size = self.picker.history_size
        if not size:
            return None
        rows = [self._recent(self.tokens, size)]
        for draft, parent in zip(drafts, parents or range(-1, len(drafts) - 1), strict=True):
            rows.append([*rows[parent + 1][1:], draft])
        return mx.array(np.array(rows, dtype=np.int32))

    @staticmethod
    def _recent(tokens: list[int], size: int) -> list[int]:
        """The last `size` tokens, padded on the left with -1."""
        recent = tokens[-size:] if size else []
        return [-1] * (size - len(recent)) + recent
