"""The thread that owns the model: requests wait in a queue, and those being answered take turns.

Requests are answered in order of arrival, up to `concurrent` at a time. Between two turns of a decoding sequence,
at most one chunk of another request's prompt is processed, so a long prompt does not hold up other texts; prompts
take turns, one chunk each, so it does not hold up a short prompt either. Sequences that decode at the same time
share their passes (`mtp_mlx.serve.batch`) if the model supports it; otherwise they take turns, one token each.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import mlx.core as mx
from mlx_lm.generate import wired_limit
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mtp_mlx.decode.constraint import Constraint
from mtp_mlx.distributed import PeerLost
from mtp_mlx.errors import MTPError, needs_extra
from mtp_mlx.model.attach import AttachedModel
from mtp_mlx.planning.calibrate import step_cost
from mtp_mlx.planning.choose import recorded_acceptance
from mtp_mlx.serve.batch import Batch, Member, why_not_batch
from mtp_mlx.serve.batch_plan import BatchDrafting, BatchPlan, batch_drafting
from mtp_mlx.serve.counts import count_text, gauge
from mtp_mlx.serve.grammar import AfterThinking, Grammars
from mtp_mlx.serve.metrics import Metrics
from mtp_mlx.serve.orders import HEARTBEAT, Order, Ticket, follow, lead
from mtp_mlx.serve.prefix_cache import PrefixCache
from mtp_mlx.serve.prefix_files import PrefixFiles
from mtp_mlx.serve.request import Event, Failure, GenerationRequest, Piece, RequestError
from mtp_mlx.serve.sequence import DecodeSettings, Sequence

log = logging.getLogger("mtp_mlx.serve")

SHARED = "several processes share the model"
FAILED = "the request failed because of an error in the server; see its log"  # details stay out of responses


@dataclass(frozen=True)
class EngineSettings:
    """Limits of the engine, and how it decodes.

    Attributes:
        queue: most requests that wait while `concurrent` are being answered; any more are refused.
        concurrent: most requests answered at the same time.
        prefix_cache_bytes: most bytes of keys and values kept between requests.
        batch: let decoding sequences share passes if the model supports it.
        decode: how texts are decoded.
    """

    queue: int = 32
    concurrent: int = 4
    prefix_cache_bytes: int = 1 << 30
    batch: bool = True
    decode: DecodeSettings = field(default_factory=DecodeSettings)


@dataclass
class _Active:
    """A ticket that is being answered."""

    ticket: Ticket
    sequence: Sequence
    reading: bool = True  # its prompt is still being processed
    member: Member | None = None  # its place in the batch while it shares passes


class Engine:
    """Answers requests with one model.

    Args:
        model, tokenizer: from `mtp_mlx.load`; nothing else may use them while the engine runs.
        settings: limits and decoding settings.
        metrics: the counters to update.
        grammars: compiles grammars; None if the grammar library is not installed.
        files: where the prefix cache is kept on disk, or None.
    """

    def __init__(
        self,
        model: AttachedModel,
        tokenizer: TokenizerWrapper,
        settings: EngineSettings | None = None,
        metrics: Metrics | None = None,
        grammars: Grammars | None = None,
        files: PrefixFiles | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings = settings or EngineSettings()
        self.metrics = metrics or Metrics()
        self.grammars = grammars
        self.prefixes = PrefixCache(self.settings.prefix_cache_bytes, files)
        self._waiting: deque[Ticket] = deque()
        self._active: list[_Active] = []
        self._admitting = 0  # taken out of the queue but not active yet
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._batch: Batch | None = None
        self.batching = "off"  # "off", "on", or the reason why passes cannot be shared
        self.failure: Exception | None = None  # what ended the thread
        self.on_failure: Callable[[], None] | None = None  # called then

    # --- from any thread ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="mtp-mlx-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End running answers with an error, and stop the thread. Returns when it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self.model.text_source is not None:
            self.model.text_source.close()

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of waiting and of active requests."""
        with self._changed:
            return len(self._waiting), len(self._active) + self._admitting

    def submit(self, request: GenerationRequest, deliver: Callable[[Event], None]) -> Ticket:
        """Put a request in the queue.

        Raises:
            RequestError: 429 if the queue is full, 503 if the server is stopping.
        """
        ticket = Ticket(request, deliver)
        with self._changed:
            if self._stopping or not self.alive:
                raise RequestError("the server is stopping", 503)
            self._forget_cancelled()
            queue, concurrent = self.settings.queue, self.settings.concurrent
            active = sum(not active.ticket.cancelled.is_set() for active in self._active)
            if len(self._waiting) + self._admitting + active >= queue + concurrent:
                raise RequestError(
                    f"the queue is full: {queue} requests are waiting and {concurrent} are being answered; try again "
                    "later",
                    429,
                )
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def _forget_cancelled(self) -> None:
        wanted = deque(ticket for ticket in self._waiting if not ticket.cancelled.is_set())
        self.metrics.add("mtp_mlx_cancelled_total", len(self._waiting) - len(wanted))
        self._waiting = wanted

    # --- on the engine's thread -----------------------------------------------------------------------------

    def follow(self) -> None:
        """Does what process 0 says, on this thread, until that stops.

        Raises:
            MTPError: if this engine failed, or another process is lost.
        """
        self._run()
        if self.failure is not None:
            raise MTPError(f"this process cannot go on: {self.failure}") from self.failure

    def _run(self) -> None:
        try:
            with wired_limit(self.model.model):
                self._batch = self._make_batch()
                while not (order := self._next_order()).stopping:
                    with self.model.peers.waiting():
                        self._admit(order.new)
                        self._turn(order.dropped)
                    gauge(self.metrics, self.load, self.prefixes)
        except Exception as error:
            self.failure = error
            unforeseen = None if isinstance(error, MTPError) else error
            log.error("the server can no longer answer requests: %s", error, exc_info=unforeseen)
        finally:
            self._end_all()
            self.prefixes.save_all()
            gauge(self.metrics, self.load, self.prefixes)
            if self.failure is not None and self.on_failure is not None:
                self.on_failure()

    def _next_order(self) -> Order:
        """What to do in the next turn; waits until there is something, and meanwhile saves texts."""
        peers = self.model.peers
        if not peers.leads:
            return follow(peers)
        while True:
            with self._changed:
                patience = self.prefixes.save_after if peers.alone else min(HEARTBEAT, peers.timeout / 4)
                busy = self._changed.wait_for(
                    lambda: bool(self._waiting or self._active or self._stopping), patience
                )
                order = Order(self._take(), self._dropped(), self._stopping)
            if busy or not peers.alone:
                return lead(peers, order)
            self.prefixes.save_one()
            gauge(self.metrics, self.load, self.prefixes)

    def _take(self) -> tuple[Ticket, ...]:
        """Takes out of the queue as many requests as there is room for."""
        self._forget_cancelled()
        room = self.settings.concurrent - len(self._active)
        taken = tuple(self._waiting.popleft() for _ in range(min(room, len(self._waiting))))
        self._admitting = len(taken)
        return taken

    def _dropped(self) -> tuple[int, ...]:
        """Places of the active requests that were cancelled."""
        return tuple(i for i, active in enumerate(self._active) if active.ticket.cancelled.is_set())

    def _make_batch(self) -> Batch | None:
        """The batch in which sequences share passes, or None if they cannot or must not."""
        settings = self.settings.decode
        if not self.settings.batch or self.settings.concurrent < 2:
            return None
        drafting = BatchDrafting("plain")
        reason = SHARED if not self.model.peers.alone else why_not_batch(self.model)
        if not reason and settings.kv_bits is not None:
            reason = "the rows of a quantised KV cache cannot be rolled"
        try:
            drafting = batch_drafting(
                self.model, settings.layout, settings.drafts, settings.lookup, settings.drafter
            )
        except MTPError as error:  # every request gets the same error
            reason = str(error)
        if reason:
            log.warning("requests take turns instead of sharing passes: %s", reason)
            self.batching = reason
            return None
        self.batching = "on"
        cost = step_cost(self.model) if drafting.form == "auto" else None
        if cost is not None:
            recorded_acceptance(self.model)  # fills model.experience
        return Batch(self.model, BatchPlan(drafting, cost, self.model.experience))

    def _admit(self, tickets: Iterable[Ticket]) -> None:
        """Start requests."""
        for ticket in tickets:
            admitted: list[_Active] = []
            with self._guarded(ticket):
                admitted.append(_Active(ticket, self._sequence(ticket.request)))
            with self._changed:
                self._active += admitted
                self._admitting -= 1

    def _sequence(self, request: GenerationRequest) -> Sequence:
        constraint: Constraint | None = None
        if request.grammar is not None:
            if self.grammars is None:
                raise needs_extra("JSON schemas need", "llguidance", "serve")
            constraint = self.grammars.start(request.grammar)
            if request.parts is not None and request.parts.start == "reasoning":
                end = tuple(self.tokenizer.think_end_tokens)
                constraint = AfterThinking(constraint, end, self.model.vocab_size)
        shared = 0 if self._batch is None else self._batch.own_drafts
        return Sequence(
            self.model, self.tokenizer, request, self.settings.decode, self.prefixes, constraint, shared
        )

    def _turn(self, dropped: Iterable[int] = ()) -> None:
        """One turn of all requests: one token each, and one chunk of the prompt that has waited longest.

        Args:
            dropped: places of requests that are not answered any more.
        """
        for active in [self._active[place] for place in dropped]:
            self.metrics.add("mtp_mlx_cancelled_total")
            self._drop(active)
        reading = next((active for active in self._active if active.reading), None)
        if reading is not None:
            with self._guarded(reading.ticket, reading):
                reading.reading = not reading.sequence.prefill()
                self._active = [*(other for other in self._active if other is not reading), reading]
        ready = [active for active in self._active if not active.reading]
        if self._batch is not None and len(ready) > 1:
            self._share(self._batch, ready)
            return
        for active in ready:
            with self._guarded(active.ticket, active):
                self._alone(active)
                self._hand_out(active, active.sequence.advance())

    def _alone(self, active: _Active) -> None:
        """Take the sequence out of the batch, to decode by itself."""
        if active.member is not None and self._batch is not None:
            self._batch.leave(active.member)
            active.member = None

    def _share(self, batch: Batch, ready: list[_Active]) -> None:
        """One pass over all decoding sequences."""
        for active in ready:
            if active.member is None:
                with self._guarded(active.ticket, active):
                    self._hand_out(active, active.sequence.pause())
                    if not active.sequence.done:
                        active.member = batch.join(active.sequence.session, active.sequence.loop)
        sharing = [active for active in self._active if active.member is not None]
        if len(sharing) < 2:
            return
        try:
            committed = batch.step()
        except Exception as error:
            log.exception("a shared pass failed")
            self._batch = self._make_batch()
            for active in sharing:
                active.member = None
                self._fail(active, error)
            return
        self.metrics.add("mtp_mlx_batched_passes_total")
        by_member = {id(member): tokens for member, tokens in zip(batch.members, committed, strict=True)}
        for active in sharing:
            active.sequence.batched_steps += 1
            with self._guarded(active.ticket, active):
                self._hand_out(active, active.sequence.take(by_member[id(active.member)]))

    def _drop(self, active: _Active) -> None:
        """End a sequence without keeping anything."""
        if active.member is not None and self._batch is not None:
            self._batch.forget(active.member)
        active.sequence.drop()
        self._remove(active)

    def _fail(self, active: _Active, error: Exception) -> None:
        self._drop(active)
        active.ticket.deliver(Failure(failure_of(error)))

    def _hand_out(self, active: _Active, pieces: list[Piece]) -> None:
        ticket = active.ticket
        for piece in pieces:
            if not ticket.answered:
                ticket.answered = True
                self.metrics.first_token(time.perf_counter() - ticket.arrived)
            if piece.summary is not None:
                self._alone(active)
                active.sequence.finish()
                self._remove(active)
                count_text(self.metrics, active.sequence, piece.summary)
                gauge(self.metrics, self.load, self.prefixes)  # who has the answer may ask for it
            ticket.deliver(piece)

    def _remove(self, active: _Active) -> None:
        self._active.remove(active)
        mx.clear_cache()

    @contextlib.contextmanager
    def _guarded(self, ticket: Ticket, active: _Active | None = None):  # type: ignore[no-untyped-def]
        """Turn an error into a failure of this request only, or of all if other processes may not have had it."""
        try:
            yield
        except Exception as error:
            if not self.model.peers.alone and (
                isinstance(error, PeerLost) or not isinstance(error, MTPError)
            ):
                raise
            if not isinstance(error, MTPError):
                log.exception("a request failed")
            if active is None:
                ticket.deliver(Failure(failure_of(error)))
            elif active in self._active:
                self._fail(active, error)

    def _end_all(self) -> None:
        with self._changed:
            self._stopping = True
            waiting, self._waiting = list(self._waiting), deque()
        for ticket in [*waiting, *(active.ticket for active in self._active)]:
            ticket.deliver(Failure(RequestError("the server is stopping", 503)))
        for active in list(self._active):
            self._drop(active)


def failure_of(error: Exception) -> RequestError:
    """The error for the client; only messages that were written for users leave the server."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, MTPError):
        return RequestError(str(error), 400)
    return RequestError(FAILED, 500)
