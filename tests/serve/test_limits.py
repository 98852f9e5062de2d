"""What a server must not do: read without bound, serve without the key, be steered by a web page, or answer a wrong
request with anything but a sentence."""

from __future__ import annotations

import http.client
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_mlx.serve.app import AppSettings
from mtp_mlx.serve.prompts import Limits
from tests.serve.running import NAME, Server, save_model, serving

pytest.importorskip("starlette")
KEY = "s3cret"
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "The sky"}], "max_tokens": 3}
PATHS = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("limits"))


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    limits = Limits(prompt=60, output=40, default_output=5)
    with serving(root, app=AppSettings(max_body_bytes=20_000), limits=limits) as running:
        yield running
        assert running.ask("/health")[1]["status"] == "ok"  # after everything below


@pytest.fixture(scope="module")
def locked(root: Path) -> Iterator[Server]:
    with serving(root, app=AppSettings(api_key=KEY)) as running:
        yield running


def sentence(status: int, answer: Any) -> str:
    """The message of an error in either form, which is one sentence and no traceback."""
    assert 400 <= status < 500, (status, answer)
    message: str = answer["error"]["message"]
    assert message and "\n" not in message and "Traceback" not in message
    return message


# --- the key ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*PATHS, "/v1/models", "/metrics"])
def test_without_the_key_nothing_is_served(locked: Server, path: str) -> None:
    body = CHAT if path in PATHS else None
    wrong = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"x-api-key": KEY[:-1]}]
    for headers in [*wrong, {"Authorization": f"Basic {KEY}"}, {"x-api-key": "é"}]:
        status, answer = locked.ask(path, body, headers=headers)
        assert status == 401 and "key" in sentence(status, answer)


def test_with_the_key(locked: Server) -> None:
    for headers in (
        {"Authorization": f"Bearer {KEY}"},
        {"x-api-key": KEY},
        {"authorization": f"bearer  {KEY}"},
    ):
        assert locked.ask("/v1/models", headers=headers)[0] == 200
        assert locked.ask("/v1/chat/completions", CHAT, headers=headers)[0] == 200
    assert locked.ask("/health")[0] == 200  # says nothing worth hiding


def test_the_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, locked: Server) -> None:
    seen = []

    def compare(shown: bytes, key: bytes) -> bool:
        seen.append((shown, key))
        return shown == key

    monkeypatch.setattr("mtp_mlx.serve.app.hmac.compare_digest", compare)
    assert locked.ask("/v1/models", headers={"x-api-key": "guess"})[0] == 401
    assert seen == [(b"guess", KEY.encode())]


# --- web pages ----------------------------------------------------------------------------------------------


def test_a_form_or_a_borrowed_name_is_refused(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        status, answer = server.ask("/v1/chat/completions", CHAT, headers={"Content-Type": kind})
        assert status == 415 and "application/json" in sentence(status, answer)
    assert server.ask("/v1/models", headers={"Host": "evil.example"})[0] == 400
    assert server.ask("/v1/models", headers={"Host": f"localhost:{server.port}"})[0] == 200


def test_unknown_paths_and_methods(server: Server) -> None:
    for path in ("/v1", "/../etc/passwd", "/v1/models/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd"):
        assert server.ask(path)[0] == 404
    assert server.ask("/v1/chat/completions", method="GET")[0] == 405
    assert server.ask("/v1/models", CHAT)[0] == 405


# --- bodies -------------------------------------------------------------------------------------------------


def test_a_large_body_is_refused_before_it_is_read(server: Server) -> None:
    """The answer comes though most of the announced body never does."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 900000000000\r\n\r\n".encode() + b"{" * 10)
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_a_body_of_unknown_length_is_bounded_too(server: Server) -> None:
    """Chunks without end: the answer comes after the limit, not after the end."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = "POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(3):  # 24 KiB, over the limit; the last chunk never comes
            connection.sendall(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b'{"messages": NaN}',
        b"[" * 15_000,
        b'{"a":' * 3_000,
        b'{"max_tokens": ' + b"9" * 6_000 + b"}",
    ],
    ids=["empty", "cut", "list", "null", "text", "utf-16", "nan", "deep-list", "deep-object", "digits"],
)
def test_malformed_bodies(server: Server, path: str, raw: bytes) -> None:
    status, answer = server.ask(path, raw=raw)
    assert status == 400 and "body" in sentence(status, answer)


def test_a_client_that_leaves_in_the_middle_of_its_body(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        head = "POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    assert server.ask("/v1/chat/completions", CHAT)[0] == 200


# --- fields -------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [5]}, "messages"),
    ({"messages": [{"role": "function", "content": "x"}]}, "role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "role"),
    ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "tool_calls"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 41}, "at most 40"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"repetition_penalty": -1}, "repetition_penalty"),
    ({"repetition_context_size": 0}, "repetition_context_size"),
    ({"stop": [""]}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 1001}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"model": 5}, "model must be a string"),
    ({"logprobs": 5}, "logprobs"),
    ({"top_logprobs": 3}, "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"n": 5}, "n must be between 1 and 4"),
    ({"n": 0}, "n must be between"),
    ({"logit_bias": [1]}, "logit_bias must be an object"),
    ({"logit_bias": {"x": 2}}, "no token id"),
    ({"logit_bias": {"-1": 2}}, "no token id"),
    ({"logit_bias": {"1": 101}}, "from -100 to 100"),
    ({"logit_bias": {"1": None}}, "from -100 to 100"),
    ({"logit_bias": {"300": 1}}, "logit_bias has the token id 300"),
    ({"tools": [{}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"chat_template_kwargs": 5}, "chat_template_kwargs must be an object"),
    ({"reasoning_effort": "a lot"}, "reasoning_effort must be one of"),
    ({"\ud800": 1}, "the name of a field contains a lone surrogate"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}}, "JSON schema"),
]


@pytest.mark.parametrize(("change", "says"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_wrong_fields(server: Server, change: dict[str, Any], says: str) -> None:
    status, answer = server.ask("/v1/chat/completions", CHAT | change)
    assert says in sentence(status, answer)
    assert status == 400


def test_a_failure_of_the_server_has_the_form_of_its_interface(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In the log with its reason, which the client is not told; and counted."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(server.prompts, "chat", fail)
    with caplog.at_level(logging.ERROR, logger="mtp_mlx.serve"):
        answers = [server.ask(path, CHAT) for path in ("/v1/chat/completions", "/v1/messages")]
    assert (
        [status for status, _ in answers] == [500, 500]
        and len(caplog.records) == 2
        and "secret detail" in caplog.text
    )
    assert [set(answer) for _, answer in answers] == [{"error"}, {"type", "error"}]
    assert all("see its log" in answer["error"]["message"] for _, answer in answers)
    assert 'path="/v1/messages",status="500"} 1' in server.ask("/metrics")[1]


@pytest.mark.parametrize("depth", [60, 120, 400])
def test_deep_schemas_do_no_harm(server: Server, depth: int) -> None:
    """The grammar library compiles them or not; it does not fall over."""
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, answer = server.ask("/v1/chat/completions", CHAT | {"response_format": form})
    assert status == 200 or "JSON schema" in sentence(status, answer)
    assert server.ask("/v1/chat/completions", CHAT)[0] == 200


def test_fields_that_change_nothing_are_let_through(server: Server) -> None:
    extra = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "tools": [],
        "n": 1,
        "stop": None,
        "logit_bias": {},
    }
    assert server.ask("/v1/chat/completions", CHAT | extra)[0] == 200


def test_unknown_fields_have_no_effect_and_are_counted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the response, in the log once, and in the metrics; names that nobody could list are counted as one."""
    with serving(root) as running, caplog.at_level(logging.WARNING, logger="mtp_mlx.serve"):
        plain = running.ask("/v1/chat/completions", CHAT)[1]
        extra = {
            "temprature": 0.5,
            "stream_options": {"odd": 1},
            'a"b\n': [],
            "chat_template_kwargs": {"odd": True},
            "enable_thinking": None,
        }
        for _ in range(2):
            status, answer = running.ask("/v1/chat/completions", CHAT | extra)
            assert status == 200 and answer["choices"] == plain["choices"]
        assert any("'temprature'" in note for note in answer["mtp"]["fallbacks"])
        assert running.ask("/v1/messages/count_tokens", {"messages": CHAT["messages"], "odd": 1})[0] == 200
        for i in range(3):
            many = {f"field{i}_{j}": 1 for j in range(40)}
            assert running.ask("/v1/completions", {"prompt": "a", "max_tokens": 1, **many})[0] == 200
        lines = running.ask("/metrics")[1].splitlines()
    counted = {line for line in lines if line.startswith("mtp_mlx_ignored_fields_total")}
    assert 'mtp_mlx_ignored_fields_total{field="temprature"} 2' in counted
    assert 'mtp_mlx_ignored_fields_total{field="chat_template_kwargs.odd"} 2' in counted
    assert 'mtp_mlx_ignored_fields_total{field="stream_options.odd"} 2' in counted
    assert 'mtp_mlx_ignored_fields_total{field="a\\"b\\n"} 2' in counted
    assert 'mtp_mlx_ignored_fields_total{field="other"} 60' in counted and len(counted) == 65
    assert len([record for record in caplog.records if "temprature" in record.message]) == 1


def test_other_origins_by_option(root: Path) -> None:
    """Web pages of the named origins may read answers, and no others; the key is still asked for."""
    page, other = "http://localhost:3000", "http://evil.example"
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }

    def allowed(running: Server, origin: str, method: str, headers: dict[str, str]) -> tuple[int, str | None]:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
        body = json.dumps(CHAT) if method == "POST" else None
        sent = {"Origin": origin, "Content-Type": "application/json", **headers}
        connection.request(method, "/v1/chat/completions", body, sent)
        response = connection.getresponse()
        response.read()
        connection.close()
        return response.status, response.getheader("access-control-allow-origin")

    with serving(root, app=AppSettings(api_key=KEY, cors_origins=(page,))) as running:
        assert allowed(running, page, "OPTIONS", asks) == (200, page)
        assert allowed(running, page, "POST", {"Authorization": f"Bearer {KEY}"}) == (200, page)
        assert allowed(running, page, "POST", {})[0] == 401
        assert allowed(running, other, "OPTIONS", asks) == (400, None)
        assert allowed(running, other, "POST", {"Authorization": f"Bearer {KEY}"})[1] is None
    with serving(root) as running:
        assert allowed(running, page, "OPTIONS", asks) == (405, None)
        assert allowed(running, page, "POST", {}) == (200, None)


@pytest.mark.parametrize(
    "prompt", [None, "", [], ["a", "b"], [1.5], [-1], [300], [[1], [2]], [True], {"a": 1}]
)
def test_wrong_prompts(server: Server, prompt: Any) -> None:
    status, answer = server.ask("/v1/completions", {"prompt": prompt})
    assert "prompt" in sentence(status, answer)


def test_a_long_prompt(server: Server) -> None:
    status, answer = server.ask("/v1/completions", {"prompt": [5] * 61})
    assert status == 400 and "61 tokens" in sentence(status, answer)
    assert server.ask("/v1/completions", {"prompt": [5] * 60, "max_tokens": 1})[0] == 200


def test_anthropic_wants_max_tokens(server: Server) -> None:
    status, answer = server.ask("/v1/messages", {k: v for k, v in CHAT.items() if k != "max_tokens"})
    assert answer["type"] == "error" and "max_tokens is missing" in sentence(status, answer)


def test_anthropic_s_system_is_no_message(server: Server) -> None:
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        more = {"max_tokens": 1} if path == "/v1/messages" else {}
        status, answer = server.ask(path, {"messages": [], "system": "x", **more})
        assert "messages" in sentence(status, answer)


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}])
def test_a_schema_that_no_text_satisfies(server: Server, schema: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    status, answer = server.ask("/v1/chat/completions", CHAT | {"response_format": form})
    assert status == 400 and "no text satisfies it" in sentence(status, answer)


def test_errors_before_a_stream_have_their_status(server: Server) -> None:
    status, answer = server.ask("/v1/chat/completions", CHAT | {"stream": True, "top_k": -2})
    assert status == 400 and "top_k" in sentence(status, answer)


# --- what monitoring sees -----------------------------------------------------------------------------------


def test_metrics(root: Path) -> None:
    with serving(root) as running:
        for _ in range(2):
            assert running.ask("/v1/chat/completions", CHAT)[0] == 200
        assert running.ask("/v1/chat/completions", raw=b"{")[0] == 400
        running.settle()
        status, text = running.ask("/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert status == 200 and lines["mtp_mlx_generated_tokens_total"] == "6"
    assert lines['mtp_mlx_requests_total{path="/v1/chat/completions",status="200"}'] == "2"
    assert lines['mtp_mlx_requests_total{path="/v1/chat/completions",status="400"}'] == "1"
    assert lines["mtp_mlx_first_token_seconds_count"] == "2" and int(lines["mtp_mlx_prefix_cache_bytes"]) > 0
    assert int(lines["mtp_mlx_cached_prompt_tokens_total"]) > 0
    families = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


def test_health(server: Server) -> None:
    status, answer = server.ask("/health")
    assert status == 200 and answer["status"] == "ok" and answer["model"] == NAME


def test_streams_are_events(server: Server) -> None:
    """As a browser would read them: lines of `data: `, an empty line after each, and the end said."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = json.dumps(CHAT | {"stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.getheader("content-type", "").startswith("text/event-stream")
    events = response.read().decode().split("\n\n")
    connection.close()
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
