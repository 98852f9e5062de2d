"""Proves that processes which share a model answer over HTTP with the text of one process, and end together."""

from __future__ import annotations

import json
import os
import queue
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import mtp_mlx.cli as cli
from mtp_mlx.answer_parts import PartsSettings
from mtp_mlx.decode.pick import SamplingConfig
from mtp_mlx.distributed import PeerLost, Peers
from mtp_mlx.serve.engine import Engine, EngineSettings
from mtp_mlx.serve.orders import Order, Ticket, follow, lead
from mtp_mlx.serve.request import Failure, GenerationRequest
from mtp_mlx.serve.sequence import DecodeSettings
from tests.launched import Launched, free_ports
from tests.serve.running import load_model, save_model, serving

CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["red", "blue", "green"]}}}
REQUESTS: list[dict[str, Any]] = [
    {"messages": CHAT, "max_tokens": 9},
    {"messages": CHAT, "max_tokens": 9, "temperature": 0.9, "seed": 3, "logit_bias": {"40": 2.5}},
    {"messages": CHAT, "max_tokens": 12, "response_format": SCHEMA, "temperature": 1.0, "seed": 1},
    {"messages": [*CHAT, {"role": "assistant", "content": "Air."}, *CHAT], "max_tokens": 4},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("several"))


def ask(port: int, body: dict[str, Any], path: str = "/v1/chat/completions") -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=240)


def texts(port: int, body: dict[str, Any]) -> list[str]:
    with ask(port, body) as response:
        return [choice["message"]["content"] for choice in json.loads(response.read())["choices"]]


@contextmanager
def launched(root: Path, tmp_path: Path, *options: str) -> Iterator[tuple[Launched, int]]:
    """Two processes that share the model, and the port of their server."""
    port = free_ports(1)
    words = ["serve", "-m", str(root / "model"), "-a", str(root / "adapter"), "--port", str(port), *options]
    processes = Launched(2, ["cli", *words], tmp_path, MTP_MLX_CACHE=str(tmp_path / "cache"))
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=240).close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield processes, port
    finally:
        for rank in (0, 1):
            try:
                os.kill(processes.pid(rank), signal.SIGKILL)
            except ProcessLookupError:
                pass


def test_the_text_of_one_process_and_a_common_end(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        right = [texts(server.port, body) for body in REQUESTS]
    with launched(root, tmp_path, "--layout", "quadratic", "--drafts", "2") as (processes, port):
        with ThreadPoolExecutor(4) as pool:  # at once, beside one that its client leaves in the middle
            with ask(
                port, {"prompt": "The sky", "max_tokens": 4000, "stream": True}, "/v1/completions"
            ) as left:
                left.readline()
            assert list(pool.map(lambda body: texts(port, body), REQUESTS)) == right
        assert texts(port, REQUESTS[3]) == right[3]  # from the prefix cache
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=240) as response:
            metrics = response.read().decode()
        assert "mtp_mlx_cancelled_total 1" in metrics
        cached = next(
            line for line in metrics.splitlines() if line.startswith("mtp_mlx_cached_prompt_tokens_total")
        )
        assert int(cached.split()[1]) > 0
        os.kill(processes.pid(0), signal.SIGTERM)
        _, stderr = processes.finish()
        assert [processes.code(rank) for rank in (0, 1)] == [0, 0], stderr
        assert stderr.count("serving") == stderr.count("stopped") == 1 and "Traceback" not in stderr


class First(Peers):
    """The first of two processes, of which the other one is gone after some orders."""

    orders = 1000

    def told(self, value: Any = None) -> Any:
        self.__dict__["orders"] = self.orders - 1
        if not self.orders:
            raise PeerLost("the connection to another process of this run was lost")

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def broken(_: Any) -> bool:
    raise RuntimeError("perhaps of this process alone")


@pytest.mark.parametrize("why", ["a lost process", "an error with others", "an error alone"])
def test_processes_end_together(root: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """An error that the others may not have had ends the engine, and whoever serves is told."""
    monkeypatch.setattr("mtp_mlx.decode.led.mx.distributed.all_sum", lambda values, group: values)
    model, tokenizer = load_model(root)
    model.peers = Peers() if why == "an error alone" else First(0, 2)
    if why == "a lost process":
        model.peers.__dict__["orders"] = 4
    else:
        monkeypatch.setattr("mtp_mlx.serve.sequence.Sequence.prefill", broken)
    events: queue.Queue[Any] = queue.Queue()
    ended = threading.Event()
    engine = Engine(model, tokenizer, EngineSettings(decode=DecodeSettings(layout="plain")))
    engine.on_failure = ended.set
    engine.start()
    engine.submit(GenerationRequest([5, 6, 7], 500), events.put)
    while not isinstance(event := events.get(timeout=60), Failure):
        pass
    assert event.error.status == (500 if why == "an error alone" else 503)
    assert ended.wait(0 if why == "an error alone" else 60) == (why != "an error alone")
    assert (engine.failure is None) == (why == "an error alone")
    engine.stop()


def test_what_one_process_only_can_do_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_WORLD_SIZE", "2")
    for option in (["--prefix-cache-dir", "x"], ["--memory", "x", "--memory-learn"]):
        result = CliRunner().invoke(cli.main, ["serve", "-m", str(root / "model"), *option])
        assert (
            result.exit_code == 2
            and f"{option[-1 if len(option) > 2 else 0]} needs a single process" in result.output
        )


class Wire(Peers):
    """Two processes in one: what the first tells is what the second hears."""

    said: list[Any] = []

    def told(self, value: Any = None) -> Any:
        if self.leads:
            self.said.append(json.loads(json.dumps(value)))
        return self.said.pop(0) if not self.leads else None


def test_orders_arrive_as_they_were_given() -> None:
    sampling = SamplingConfig(temperature=0.3, seed=2**63, logit_bias=((5, -1.5),))
    parts = PartsSettings("tool", ({"type": "function", "function": {"name": "x"}},), False)
    full = GenerationRequest([1, 2], 5, sampling, ("a",), 3, "{}", parts, ("b",), ("c",), True, True, (1,))
    for order in (
        Order(),
        Order(stopping=True),
        Order((Ticket(full, print), Ticket(GenerationRequest([7], 1), print)), (0, 2)),
    ):
        lead(Wire(0, 2), order)
        heard = follow(Wire(1, 2))
        assert [one.request for one in heard.new] == [one.request for one in order.new]
        assert (heard.dropped, heard.stopping) == (order.dropped, order.stopping)
    assert lead(Peers(), order) is order
