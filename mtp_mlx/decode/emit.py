"""Unverified emission, static and ConfAdapt (arXiv 2602.06019, decoding): the lossy loop.

One pass encodes the block that was emitted last as real rows, together with fresh mask slots, so that mask rows
never stay in the cache and every emitted token is encoded exactly once:

    emitted last: a b c      rows: a b c M M M      next token from row c, drafts from the slots behind it

The keys and values of the slots are dropped at once. The pass costs n_last + k rows, at most 2k + 1.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import cast

import mlx.core as mx

from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.led import led
from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.session import Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.step import Token
from mtp_mlx.drafters.ptp.draft import PTPSlotDrafter
from mtp_mlx.errors import MTPError

CLEAR_EVERY = 256  # tokens between releases of MLX's buffer cache, as in mlx-lm


class EmitLoop:
    """The state of one unverified generation.

    Args:
        session: its picker is greedy, its drafter the adapter's.
        emission: how many tokens of a pass are emitted.
        slots: k, most drafts of a pass.
        sampler: picks the token of a pass that emits one, or None to take the likeliest there too.
        stats: filled while decoding.
        max_tokens: exactly so many at most; negative for no limit.

    Attributes:
        n_yielded: tokens yielded so far.

    Raises:
        MTPError: there is nothing to draft with, or slots that are no mask tokens.
    """

    def __init__(
        self,
        session: Session,
        emission: Emission,
        slots: int,
        sampler: Picker | None,
        stats: DecodeStats,
        max_tokens: int,
    ) -> None:
        if session.drafter is None or not slots:
            raise MTPError(
                f"emission '{emission.name}' emits the drafts of mask tokens, and this model has none: give an "
                "adapter with --adapter, or use --emit verified"
            )
        if isinstance(session.drafter, PTPSlotDrafter):
            raise MTPError(
                f"emission '{emission.name}' is for mask tokens, and this adapter's slots are of Parallel Token "
                "Prediction: use --emit verified"
            )
        self._drafter = session.drafter
        self._session, self._emission, self._slots = session, emission, slots
        self._sampler, self._stats, self._max_tokens = sampler, stats, max_tokens
        self._stats.lossless = False
        self.n_yielded = 0

    def tokens(self) -> Generator[Token, None, None]:
        """Passes until max_tokens; the consumer closes the generator to stop earlier, inside a block too."""
        while self._left() > 0:
            for token in self._step():
                self.n_yielded += 1
                if self.n_yielded % CLEAR_EVERY == 0:
                    mx.clear_cache()
                yield token

    def _left(self) -> int:
        return self._max_tokens - self.n_yielded if self._max_tokens >= 0 else 1 << 30

    def _step(self) -> list[Token]:
        """One pass: re-encodes the last block, drafts, and commits what is emitted."""
        session, slots = self._session, min(self._slots, self._left() - 1)
        hidden, shape = session.open_pass(slots)  # [R, D]
        last = shape.n_real - 1
        position = mx.array([session.cached])  # of the first new token
        history = session.history()
        logits = session.attached.head(hidden[None, last : last + 1])[0]  # [1, V]
        pick, sure = session.picker.pick_with_confidence(logits, position, history)
        fresh, confidences = self._drafter.propose(
            hidden, shape, mx.array(last), pick[0], position[0], None if history is None else history[0]
        )
        alone = pick if self._sampler is None else self._sampler.pick(logits, position, history)
        integers = led(session.attached.peers, mx.concatenate([alone, pick, fresh]))
        confidences = led(session.attached.peers, mx.concatenate([sure, confidences]))
        mx.eval(integers, confidences)  # the pass's one host read
        own, *run = cast("list[int]", integers.tolist())
        count = self._emission.count(cast("list[float]", confidences.tolist()))
        emitted = [own] if count == 1 else run[:count]
        session.tokens += emitted
        self._stats.record_emitted(shape.n_real, slots, count)
        drafted = session.attached.head(hidden[None, last + 1 :])[0] if slots else logits  # [k, V], lazy
        return [
            Token(token, drafted[index - 1] if index else logits[0], index > 0, index)
            for index, token in enumerate(emitted)
        ]
