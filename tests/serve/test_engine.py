"""The engine's queue, turns and ends: order, bounds, cancellation, memory, and errors that hit one request only."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mtp_mlx import files
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.errors import MTPError
from mtp_mlx.serve.engine import Engine, EngineSettings
from mtp_mlx.serve.orders import Ticket
from mtp_mlx.serve.request import Event, Failure, GenerationRequest, Piece, RequestError
from mtp_mlx.serve.sequence import DecodeSettings, Sequence
from tests.planning.test_budget import cost_of
from tests.serve.running import load_model, save_model

PLAIN = DecodeSettings(layout="plain", prefill_step_size=4)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    root: Path = save_model(tmp_path_factory.mktemp("engine"))
    model, tokenizer = load_model(root)
    tokenizer.eos_token_ids = set()  # texts are as long as they are asked to be
    return model, tokenizer


@contextmanager
def running(loaded: tuple[Any, Any], **settings: Any) -> Iterator[Engine]:
    engine = Engine(*loaded, EngineSettings(**{"decode": PLAIN, **settings}))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        assert not engine.alive


class Client:
    """Collects the events of one request."""

    def __init__(
        self, engine: Engine, request: GenerationRequest, slow: Callable[[Event], None] | None = None
    ) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self._slow = slow
        self.ticket: Ticket = engine.submit(request, self._deliver)

    def _deliver(self, event: Event) -> None:
        self.events.put(event)
        if self._slow is not None:
            self._slow(event)

    def next(self) -> Event:
        return self.events.get(timeout=30)

    def text(self) -> str:
        found = ""
        while True:
            event = self.next()
            assert isinstance(event, Piece), event
            found += event.text
            if event.summary is not None:
                return found


def asked(start: int = 5, length: int = 6, max_tokens: int = 8, **more: Any) -> GenerationRequest:
    return GenerationRequest([start + i for i in range(length)], max_tokens, **more)


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


class Gate:
    """Holds the engine's thread at the first event of a request."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, _: Event) -> None:
        self.reached.set()
        assert self.open.wait(30)


def test_first_come_first_served_and_429(loaded: Any) -> None:
    with running(loaded, queue=3, concurrent=1) as engine:
        gate, order = Gate(), []
        first = Client(engine, asked(), gate)
        assert gate.reached.wait(30)

        def ends(number: int) -> Callable[[Event], None]:
            return lambda event: order.append(number) if isinstance(event, Piece) and event.summary else None

        others = [Client(engine, asked(6 + n), ends(n)) for n in range(3)]
        with pytest.raises(RequestError, match="3 requests are waiting") as refused:
            Client(engine, asked())
        assert refused.value.status == 429
        others[1].ticket.cancel()  # makes room
        last = Client(engine, asked(20), ends(3))
        gate.open.set()
        for client in (first, others[0], others[2], last):
            assert client.text()
        assert order == [0, 2, 3] and others[1].events.empty()


def test_free_places_are_no_queue(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the engine's thread gets to them, and while it makes the sequence of one, which is in neither list."""
    started, go_on, real = threading.Event(), threading.Event(), Engine._sequence

    def slow(self: Engine, request: GenerationRequest) -> Sequence:
        started.set()
        assert go_on.wait(30)
        return real(self, request)

    monkeypatch.setattr(Engine, "_sequence", slow)
    for queue_length, concurrent in ((0, 1), (1, 3)):
        started.clear()
        go_on.clear()
        with running(loaded, queue=queue_length, concurrent=concurrent) as engine:
            clients = [Client(engine, asked())]
            assert started.wait(30) and engine.load == (0, 1)
            clients += [Client(engine, asked(6 + n)) for n in range(queue_length + concurrent - 1)]
            with pytest.raises(RequestError, match=f"{concurrent} are being answered") as refused:
                Client(engine, asked())
            assert refused.value.status == 429
            go_on.set()
            assert all(client.text() for client in clients)
            wait_for(lambda: engine.load == (0, 0))
            assert Client(engine, asked()).text()


@pytest.mark.parametrize("batch", [True, False])
def test_everybody_gets_a_turn(loaded: Any, batch: bool) -> None:
    """A long text does not keep a short one waiting."""
    with running(loaded, concurrent=2, batch=batch) as engine:
        long = Client(engine, asked(5, max_tokens=400))
        long.next()
        short = Client(engine, asked(30, max_tokens=5))
        short.text()
        assert engine.load[1] == 1, "the long one is still being written"
        long.ticket.cancel()


def test_a_long_prompt_does_not_stop_the_others_text(loaded: Any) -> None:
    with running(loaded, concurrent=2) as engine:
        talking = Client(engine, asked(5, max_tokens=300))
        talking.next()
        before = talking.events.qsize()
        reading = Client(engine, asked(7, length=240, max_tokens=1))  # 60 chunks
        assert isinstance(reading.next(), Piece)
        assert talking.events.qsize() - before >= 40
        talking.ticket.cancel()


def test_a_long_prompt_does_not_stop_a_short_one(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do short ones stop the long one: each gets a chunk in turn."""
    reached, go_on, read, real = threading.Event(), threading.Event(), [], Sequence.prefill

    def counting(self: Sequence) -> bool:
        read.append(len(self.request.prompt))
        reached.set()
        assert go_on.wait(30)
        return real(self)

    with running(loaded, concurrent=4, prefix_cache_bytes=0) as engine:
        monkeypatch.setattr(Sequence, "prefill", counting)
        long = Client(engine, asked(5, length=240, max_tokens=1))  # 60 chunks
        assert reached.wait(30)
        short = [Client(engine, asked(30, max_tokens=1)) for _ in range(3)]
        go_on.set()
        assert all(client.text() for client in [*short, long])
    assert read.count(240) >= 60 and {*read[:20]} == {240, 6} and {*read[20:]} == {240}
    assert read[:20].count(240) >= 5


def test_cancelled_at_the_next_step_and_memory_freed(loaded: Any) -> None:
    with running(loaded, concurrent=2, prefix_cache_bytes=0) as engine:
        Client(engine, asked()).text()
        wait_for(lambda: engine.load == (0, 0))
        gc.collect()
        before = mx.get_active_memory()
        gate = Gate()
        held = Client(engine, asked(5, length=250, max_tokens=100_000), gate)
        assert gate.reached.wait(30) and mx.get_active_memory() > before
        held.ticket.cancel()
        gate.open.set()
        wait_for(lambda: engine.load == (0, 0))
        gc.collect()
        assert held.events.qsize() <= 3
        assert mx.get_active_memory() <= before * 1.01
        assert engine.metrics.value("mtp_mlx_cancelled_total") == 1


def test_cancelled_while_its_prompt_is_read_or_it_waits(loaded: Any) -> None:
    with running(loaded, concurrent=1) as engine:
        long = Client(engine, asked(5, length=280, max_tokens=1))
        waiting = Client(engine, asked(9))
        waiting.ticket.cancel()
        long.ticket.cancel()
        assert Client(engine, asked(11)).text()
        assert long.events.empty() and waiting.events.empty()


def test_one_that_fails_fails_alone(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, while reading and while decoding, in a batch or not; the client is told a sentence, not a traceback."""
    real = Sequence._piece

    def broken(self: Sequence, token: Any) -> Piece:
        if self.request.max_tokens == 77 and self._text.count == 3:
            raise ZeroDivisionError("secret detail")
        return real(self, token)

    monkeypatch.setattr(Sequence, "_piece", broken)
    for batch in (True, False):
        with running(loaded, concurrent=3, batch=batch) as engine:
            right = Client(engine, asked(5, max_tokens=30)).text()
            good = Client(engine, asked(5, max_tokens=30))
            bad = Client(engine, asked(9, max_tokens=77))
            outside = Client(engine, GenerationRequest([5, 10**6], 5))
            while isinstance(event := bad.next(), Piece):
                assert event.summary is None
            assert event.error.status == 500 and "secret" not in event.error.message
            event = outside.next()
            assert isinstance(event, Failure) and event.error.status == 400
            assert "vocabulary" in event.error.message
            assert good.text() == right
            wait_for(lambda: engine.load == (0, 0))


def test_a_failing_batch_fails_its_members_and_the_engine_goes_on(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtp_mlx.serve.batch import Batch

    with running(loaded, concurrent=2) as engine:
        right = Client(engine, asked(5)).text()
        real = Batch.step
        calls = []

        def broken(self: Batch) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            return real(self)

        monkeypatch.setattr(Batch, "step", broken)
        clients = [Client(engine, asked(5 + n, max_tokens=50)) for n in range(2)]
        for client in clients:
            while isinstance(event := client.next(), Piece):
                pass
            assert event.error.status == 500
        assert Client(engine, asked(5)).text() == right


def test_stopping_ends_everything(loaded: Any) -> None:
    engine = Engine(*loaded, EngineSettings(concurrent=1, decode=PLAIN))
    engine.start()
    clients = [Client(engine, asked(5 + n, max_tokens=100_000)) for n in range(3)]
    clients[0].next()
    engine.stop()
    for client in clients:
        while isinstance(event := client.next(), Piece):
            pass
        assert event.error.status == 503
    with pytest.raises(RequestError, match="stopping"):
        Client(engine, asked())
    assert not engine.alive and engine.load == (0, 0)


@pytest.mark.parametrize("layout", ["plain", "linear", "quadratic", "auto"])
def test_sharing_and_taking_turns_write_the_same(
    loaded: Any, layout: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Requests that come while others are being written: in a batch, by turns, and one after another."""
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path))
    requests = [
        asked(
            5 + 3 * n,
            length=1 + 4 * n,
            max_tokens=10 + 7 * n,
            sampling=SamplingConfig(temperature=0.8 * (n % 2), seed=n),
        )
        for n in range(5)
    ]
    decode = DecodeSettings(layout=layout, prefill_step_size=4)
    written: dict[str, list[str]] = {}
    for name, settings in {
        "alone": {"concurrent": 1},
        "turns": {"concurrent": 3, "batch": False},
        "shared": {"concurrent": 3},
    }.items():
        with running(loaded, decode=decode, prefix_cache_bytes=0, **settings) as engine:
            clients = [Client(engine, request) for request in requests]
            written[name] = [client.text() for client in clients]
            passes = engine.metrics.value("mtp_mlx_batched_passes_total")
            assert (passes > 5) == (name == "shared")
    assert written["alone"] == written["turns"] == written["shared"]


def test_planned_batches_begin_with_the_acceptance_that_the_adapter_records(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is made before the first request, so what it begins is what every request goes on with."""
    model = loaded[0]
    monkeypatch.setattr("mtp_mlx.serve.engine.step_cost", lambda _: cost_of(0.1))
    monkeypatch.setattr(model, "info", SimpleNamespace(acceptance=[0.9, 0.3], acceptance_by_precision={}))
    monkeypatch.setattr(model, "experience", None)
    engine = Engine(*loaded, EngineSettings(decode=DecodeSettings(layout="auto"), concurrent=2))
    assert engine._make_batch() is not None
    assert model.experience.acceptance["slots"].summary()[:2] == pytest.approx([0.9, 0.3])


def test_the_prefix_cache_keeps_its_budget_and_changes_no_text(loaded: Any) -> None:
    with running(loaded, concurrent=1, prefix_cache_bytes=0) as engine:
        prompts = [[5 + (i * n) % 90 for i in range(40 + n)] for n in range(1, 8)]
        turns = [*prompts, *[prompt + [7, 8, 9] for prompt in prompts]]
        sampling = SamplingConfig(temperature=0.7, seed=1, repetition_penalty=1.3, presence_penalty=0.3)
        right = [Client(engine, GenerationRequest(turn, 6, sampling)).text() for turn in turns]
        assert len(engine.prefixes) == 0 and engine.prefixes.hits == 0
    # keys and values, layers, heads, size, float32; mlx-lm's caches grow by 256 rows; room for three
    room = 3 * 256 * 2 * 2 * 2 * 16 * 4
    with running(loaded, concurrent=1, prefix_cache_bytes=room) as engine:
        clients = [Client(engine, GenerationRequest(turn, 6, sampling)) for turn in turns]
        assert [client.text() for client in clients] == right
        assert 0 < engine.prefixes.nbytes <= room
        assert 0 < engine.prefixes.hits
        engine.prefixes.clear()
        assert engine.prefixes.nbytes == 0


def test_grammar_without_the_library(loaded: Any) -> None:
    with running(loaded) as engine:
        event = Client(engine, asked(grammar="{}")).next()
    assert isinstance(event, Failure) and "llguidance" in event.error.message


def test_bad_settings_are_found_at_the_request_at_latest(loaded: Any) -> None:
    with running(loaded, decode=DecodeSettings(layout="plain", drafter="heads")) as engine:
        event = Client(engine, asked()).next()
        assert isinstance(event, Failure) and "heads" in event.error.message
    with pytest.raises(MTPError):
        Sequence(*loaded, asked(), DecodeSettings(drafter="magic"), engine.prefixes)


def test_a_prompt_longer_than_the_context_is_warned_of(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In its own answer, and once in the log."""
    monkeypatch.setattr(files, "_warned", {})
    most = loaded[0].model.args.max_position_embeddings
    monkeypatch.setattr(loaded[0].model.args, "max_position_embeddings", 8)
    assert most > 8
    with running(loaded) as engine, caplog.at_level("WARNING", "mtp_mlx"):
        for length in (8, 9, 10):
            client = Client(engine, GenerationRequest([5] * length, 1))
            last = client.next()
            assert isinstance(last, Piece) and last.summary is not None
            said = [note.partition(",")[0] for note in last.summary.mtp["notes"]]
            assert said == ([] if length == 8 else [f"the prompt has {length} tokens"])
            assert not last.summary.mtp["fallbacks"]
    assert caplog.text.count("the model's context is 8") == 1
