"""Unverified emission, static and ConfAdapt (arXiv 2602.06019, decoding): the lossy loop.

Each pass encodes the tokens emitted last as real rows, followed by new mask slots. Mask rows therefore never stay in
the cache, and every emitted token is encoded exactly once:

    emitted last: a b c      rows: a b c M M M      next token from row c, drafts from the slots after it

The keys and values of the slots are dropped immediately. A pass has n_last + k rows, at most 2k + 1.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import cast

import mlx.core as mx

from mtp_mlx.decode.drafter import DraftSource, Verified, source_of
from mtp_mlx.decode.emission import Emission
from mtp_mlx.decode.layout import Layout
from mtp_mlx.decode.led import led
from mtp_mlx.decode.pick import Picker
from mtp_mlx.decode.session import Session
from mtp_mlx.decode.stats import DecodeStats
from mtp_mlx.decode.step import Token
from mtp_mlx.errors import MTPError

CLEAR_EVERY = 256  # tokens between releases of MLX's buffer cache, as in mlx-lm


def check_unverified(source: DraftSource | None, emission: Emission) -> None:
    """Raises MTPError if the model's drafts cannot be emitted unverified."""
    if source is None:
        raise MTPError(
            f"emission '{emission.name}' needs an adapter with mask tokens: name one with `adapter`, or leave "
            "`emission` and `tau` out"
        )
    reason = source.why_not_unverified()
    if reason:
        raise MTPError(f"emission '{emission.name}' {reason}: use `emission` verified")


class EmitLoop:
    """The state of one unverified generation.

    Args:
        session: with a greedy picker and the adapter's drafter.
        emission: how many tokens of a pass are emitted.
        slots: k, most drafts per pass.
        sampler: picks the token of a pass that emits just one; None to pick it greedily too.
        stats: updated while decoding.
        max_tokens: most tokens to emit; negative for no limit.

    Attributes:
        n_yielded: tokens yielded so far.

    Raises:
        MTPError: if the model's drafts cannot be emitted unverified.
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
        source = source_of(session.attached)
        check_unverified(source, emission)
        self._own_pick = source is not None and bool(source.gated_layers())  # else the model was fine-tuned
        if session.drafter is None or not slots:
            raise MTPError(f"emission '{emission.name}' emits drafts, and this policy asks for none")
        self._drafter = session.drafter
        self._session, self._emission, self._slots = session, emission, slots
        self._sampler, self._stats, self._max_tokens = sampler, stats, max_tokens
        self._stats.lossless = False
        self.n_yielded = 0

    def tokens(self) -> Generator[Token, None, None]:
        """Yields tokens up to max_tokens; the consumer closes the generator to stop earlier, even inside a block."""
        while self._left() > 0:
            for token in self._step():
                self.n_yielded += 1
                if self.n_yielded % CLEAR_EVERY == 0:
                    mx.clear_cache()
                yield token

    def _left(self) -> int:
        return self._max_tokens - self.n_yielded if self._max_tokens >= 0 else 1 << 30

    def _step(self) -> list[Token]:
        """One pass: encodes the tokens emitted last, drafts, and commits the tokens it emits."""
        session, slots = self._session, min(self._slots, self._left() - 1)
        hidden, shape = session.open_pass(slots)  # [R, D]
        last = shape.n_real - 1
        position = mx.array([session.cached])  # of the first new token
        history = session.history()
        logits = session.attached.head(hidden[None, last : last + 1])[0]  # [1, V]
        pick, sure = session.picker.pick_with_confidence(logits, position, history)
        committed = mx.array(session.tokens[len(session.tokens) - last :], dtype=mx.int32)
        fresh = self._drafter.propose(
            Verified(
                layout=Layout.linear(last, slots),
                shape=shape,
                hidden=hidden,
                head_input=session.attached.head_input[:, : last + 1],
                logits=logits,
                picks=mx.concatenate([committed, pick]),
                accepted=mx.array(last),
                last=mx.array(last),
                position=position[0],
                history=None if history is None else history[0],
                tokens=session.tokens,
            )
        )
        alone = pick if self._sampler is None else self._sampler.pick(logits, position, history)
        integers = led(session.attached.peers, mx.concatenate([alone, pick, fresh.ids]))
        confidences = led(session.attached.peers, mx.concatenate([sure, fresh.confidences]))
        mx.eval(integers, confidences)  # the pass's one host read
        own, *run = cast("list[int]", integers.tolist())
        count = self._emission.count(cast("list[float]", confidences.tolist()), self._own_pick)
        emitted = [own] if count == 1 else run[:count]
        session.tokens += emitted
        self._stats.record_emitted(shape.n_real, slots, count)
        drafted = session.attached.head(hidden[None, last + 1 :])[0] if slots else logits  # [k, V], lazy
        return [
            Token(token, drafted[index - 1] if index else logits[0], index > 0, index)
            for index, token in enumerate(emitted)
        ]
