"""Sixteen clients at once, of all kinds: nothing crashes, nothing leaks, and every answer that completes is the one
that the server gives when asked alone."""

from __future__ import annotations

import gc
import http.client
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mtp_mlx.serve.app import AppSettings
from mtp_mlx.serve.engine import EngineSettings
from mtp_mlx.serve.prompts import Limits
from mtp_mlx.serve.sequence import DecodeSettings
from tests.serve.running import Server, save_model, serving

pytest.importorskip("starlette")
KEY, CLIENTS, REQUESTS, BODY = "s3cret", 16, 6, 50_000
HEADERS = {"Content-Type": "application/json", "x-api-key": KEY}


def body(number: int) -> dict[str, Any]:
    """One of a few dozen requests, of mixed lengths and kinds."""
    rng = random.Random(number)
    words = " ".join(
        rng.choice(["the", "sky", "fox", "dog", "sun", "line"]) for _ in range(rng.randint(1, 30))
    )
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": words}],
        "max_tokens": rng.choice([1, 3, 8, 20, 40]),
        "temperature": rng.choice([0, 0.8]),
        "seed": number,
    }
    if rng.random() < 0.3:
        asked["stop"] = [rng.choice("aeiou")]
    if rng.random() < 0.3:
        asked |= {"presence_penalty": 0.5, "frequency_penalty": 0.3}
    if rng.random() < 0.2:
        asked["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"enum": ["red", "green", "blue"]}},
        }
    return asked


def ask(server: Server, number: int) -> tuple[int, str]:
    status, answer = server.ask("/v1/chat/completions", body(number), headers=HEADERS)
    return status, answer["choices"][0]["message"]["content"] if status == 200 else json.dumps(answer)


def stream(server: Server, number: int) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body(number) | {"stream": True}), HEADERS
        )
        response = connection.getresponse()
        if response.status != 200:
            return response.status, response.read().decode()
        events = [line[6:] for line in response.read().decode().split("\n\n") if line]
    finally:
        connection.close()
    assert events.pop() == "[DONE]"
    return 200, "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)


def leave(server: Server, number: int) -> tuple[int, str]:
    """Asks for much and goes away at some moment."""
    asked = body(number) | {"stream": bool(number % 2), "max_tokens": 2000, "stop": []}
    asked.pop("response_format", None)
    data = json.dumps(asked).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in HEADERS.items()]
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + data)
        connection.settimeout(0.02 * (number % 7))
        try:
            connection.recv(200)
        except (OSError, ValueError):
            pass
    return 499, ""


def oversize(server: Server, number: int) -> tuple[int, str]:
    try:
        status, _ = server.ask("/v1/messages", raw=b" " * (BODY + number), headers=HEADERS)
    except OSError:  # refused while it was still sending
        return 413, ""
    return status, ""


def malformed(server: Server, number: int) -> tuple[int, str]:
    return server.ask("/v1/completions", raw=b'{"prompt": ' * (number % 9 + 1), headers=HEADERS)[0], ""


def wrong_key(server: Server, number: int) -> tuple[int, str]:
    return server.ask("/v1/chat/completions", body(number), headers={"x-api-key": str(number)})[0], ""


KINDS = [ask, stream, ask, stream, leave, oversize, malformed, wrong_key]
RIGHT = {ask: 200, stream: 200, leave: 499, oversize: 413, malformed: 400, wrong_key: 401}


def storm(server: Server, seed: int, answers: dict[int, set[str]], patient: bool = True) -> Counter[int]:
    """Every client asks so many times; texts of completed answers by request."""
    statuses: Counter[int] = Counter()
    problems: list[str] = []
    lock = threading.Lock()

    def client(which: int) -> None:
        rng = random.Random(1000 * seed + which)
        for _ in range(REQUESTS):
            kind, number = rng.choice(KINDS), rng.randrange(40)
            try:
                status, text = kind(server, number)
                while status == 429 and patient:
                    time.sleep(0.02)
                    status, text = kind(server, number)
            except Exception as error:  # a thread must not die in silence
                status, text = 0, repr(error)
            with lock:
                statuses[status] += 1
                if status == 200:
                    answers.setdefault(number, set()).add(text)
                if status not in (RIGHT[kind], 429):
                    problems.append(f"{kind.__name__} {number}: {status} {text[:200]}")

    threads = [threading.Thread(target=client, args=(which,)) for which in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not problems, problems[:5]
    assert not any(thread.is_alive() for thread in threads)
    return statuses


def resident() -> int:
    """Bytes of this process in memory."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


@pytest.mark.parametrize("layout", ["quadratic"])
def test_load(tmp_path: Path, layout: Any) -> None:
    save_model(tmp_path)
    settings = EngineSettings(
        queue=4,
        concurrent=4,
        prefix_cache_bytes=300_000,
        decode=DecodeSettings(layout=layout, prefill_step_size=16),
    )
    limits = Limits(output=4000)
    with serving(tmp_path, engine=settings, app=AppSettings(KEY, BODY), limits=limits) as server:
        alone = {number: ask(server, number)[1] for number in range(40)}
        answers: dict[int, set[str]] = {}
        seen = storm(server, 0, answers)  # buffers and caches reach their sizes
        before = memory(server)
        seen += storm(server, 1, answers)
        after = memory(server)
        seen += storm(server, 2, answers, patient=False)
        assert server.engine.metrics.value("mtp_mlx_batched_passes_total") > 50
        assert server.engine.alive and ask(server, 0)[1] == alone[0]
    assert len(answers) > 25 and all(texts == {alone[number]} for number, texts in answers.items())
    assert {200, 400, 401, 413, 429, 499} <= set(seen), seen
    for kind, then, now in zip(("MLX", "process"), before, after, strict=True):
        assert now <= then * 1.05, f"{kind} memory went from {then} to {now} bytes"


def memory(server: Server) -> tuple[int, int]:
    """Bytes that MLX holds, without the prefix cache which has a budget of its own, and of the process."""
    server.settle()
    server.engine.prefixes.clear()
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory(), resident() if sys.platform.startswith("linux") else 0


def test_overflow_is_answered_429_at_once(tmp_path: Path) -> None:
    save_model(tmp_path)
    settings = EngineSettings(queue=1, concurrent=1, decode=DecodeSettings(layout="plain"))
    with serving(tmp_path, engine=settings, limits=Limits(output=100_000)) as server:
        server.prompts.tokenizer.eos_token_ids = set()  # texts do not end by themselves
        sockets = []
        for _ in range(2):
            data = json.dumps({"prompt": "a", "max_tokens": 100_000, "stream": True}).encode()
            connection = socket.create_connection(("127.0.0.1", server.port))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
            sockets.append(connection)
            sockets[0].recv(100)
        while server.engine.load != (1, 1):
            time.sleep(0.01)
        status, answer = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})
        assert status == 429 and answer["error"]["type"] == "rate_limit_error"
        status, answer = server.ask("/v1/messages", body(1) | {"seed": 1})
        assert status == 429 and answer["error"]["type"] == "rate_limit_error"
        for connection in sockets:
            connection.close()
        server.settle()
        assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})[0] == 200
