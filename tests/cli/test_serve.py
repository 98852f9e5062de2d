"""`mtp-mlx serve`: starts, answers, stops when told; refuses with a sentence what it cannot do."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import mtp_mlx.cli as cli
from mtp_mlx.cli.serve import KEY_VARIABLE, host_names, is_loopback, listen
from tests.serve.running import save_model
from tests.tiny import never_end

pytest.importorskip("starlette")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("serve"))


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.setenv("MTP_MLX_CACHE", str(tmp_path / "cache"))


def serve(*arguments: Any) -> Result:
    return CliRunner().invoke(cli.main, ["serve", *map(str, arguments)])


def refused(*arguments: Any) -> str:
    """The sentence with which it refuses."""
    result = serve(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return result.output


@pytest.mark.parametrize("origin", ["localhost:3000", "http://localhost:3000/", "http://a b", "", "http://"])
def test_origins_are_origins(origin: str) -> None:
    assert "is no origin: write scheme, host and port" in refused("--cors-origin", origin)


def test_options_reach_the_server(tmp_path: Path) -> None:
    """Thinking, strict names and origins, on a model whose template has the switch."""
    from mtp_mlx.cli.serve import ServeSettings, application
    from tests.serve.scripted import save_agent

    folder = str(save_agent(tmp_path) / "model")
    more = {"layout": "plain", "thinking": "off", "strict_model": True, "cors_origin": ("http://a:1",)}
    more |= {"prefix_cache_dir": tmp_path / "kept", "prefix_cache_dir_mb": 3}
    built = application(ServeSettings(model=folder, adapter="none", **more), None)
    assert built._prompts.limits.thinking == "off" and built._prompts.strict_model
    assert built._settings.cors_origins == ("http://a:1",)
    files = built.engine.prefixes.files
    assert files is not None and (files.folder, files.budget) == (tmp_path / "kept", 3 << 20)


def test_help_has_an_example_to_run() -> None:
    result = serve("--help")
    assert result.exit_code == 0 and "mtp-mlx serve" in result.output and "curl" in result.output


def test_the_first_mistakes(root: Path, tmp_path: Path) -> None:
    assert "no model" in refused("-m", tmp_path / "nothing", "--port", 0)
    assert "'linear'" in refused("--layout", "linaer")
    assert "--port must be at most 65535" in refused("--port", 70000)
    model = root / "model"
    assert "needs an adapter" in refused("-m", model, "--layout", "quadratic", "--port", 0)
    without = ("--adapter", "none", "--layout", "plain", "--port", 0, "--prefix-cache-dir")
    assert "--prefix-cache-mb more than 0" in refused("-m", model, *without, tmp_path, "--prefix-cache-mb", 0)
    taken_name = root / "model" / "config.json"
    assert str(taken_name) in refused("-m", model, *without, taken_name)
    assert "heads" in refused("-m", model, "--drafter", "heads", "--layout", "plain", "--port", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "choose another --port" in refused("-m", model, "--port", taken.getsockname()[1])
    with listen("127.0.0.1", 0) as loading:  # another server whose model is not there yet
        assert "choose another --port" in refused("-m", model, "--port", loading.getsockname()[1])
    assert "cannot listen on a..b" in refused("--host", "a..b", "--open-to-all")
    assert "cannot listen on nowhere.invalid" in refused("--host", "nowhere.invalid", "--open-to-all")


def test_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--api-key-file" in refused("--host", "0.0.0.0")
    path = tmp_path / "key"
    for content in ("", "  \n", "two words", "schlüssel"):
        path.write_text(content)
        assert "must hold a key" in refused("--api-key-file", path)
    path.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in refused("--api-key-file", path)
    assert "no such file" in refused("--api-key-file", tmp_path / "missing")
    monkeypatch.setenv(KEY_VARIABLE, "")
    assert KEY_VARIABLE in refused()


def test_loopback() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "localhost", "::1", "127.1.2.3"]))
    assert not any(
        map(is_loopback, ["0.0.0.0", "::", "192.168.0.1", "example.com", "127.0.0.1.evil.example"])
    )


def test_a_loopback_address_is_a_name_of_the_server() -> None:
    """As the middleware reads it; other names stay out."""
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse

    def status(asked: str) -> int:
        found: list[int] = []

        async def send(message: Any) -> None:
            found.extend([message["status"]] if message["type"] == "http.response.start" else [])

        scope = {"type": "http", "method": "GET", "headers": [(b"host", asked.encode())]}
        reached = TrustedHostMiddleware(PlainTextResponse("here"), list(host_names("127.0.0.2") or ()))
        asyncio.run(reached(scope, None, send))  # type: ignore[arg-type]
        return found[0]

    assert [status(name) for name in ("127.0.0.2:8080", "127.0.0.2", "localhost:1")] == [200] * 3
    assert [status(name) for name in ("evil.example", "127.0.0.3")] == [400] * 2
    assert {"[::1]", "::1", "[0:0:0:0:0:0:0:1]"} <= set(host_names("0:0:0:0:0:0:0:1") or ())
    assert host_names("192.168.0.1") is None


@contextmanager
def process_of(root: Path, cache: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running `serve` on a free port, and its address."""
    command = [sys.executable, "-c", "from mtp_mlx.cli import main; main()", "serve", "--port", "0"]
    command += ["-m", str(root / "model"), "--adapter", str(root / "adapter"), *more]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"MTP_MLX_CACHE": str(cache)}
    )
    try:
        assert process.stderr is not None
        yield process, _address(process.stderr)
    finally:
        process.kill()
        process.wait()


def said_at_the_end(process: subprocess.Popen[str]) -> str:
    """Its stderr after it ended well."""
    assert process.wait(30) == 0 and process.stderr is not None
    said = process.stderr.read()
    assert "Traceback" not in said and "stopped" in said
    return said


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_told_to_stop(root: Path, tmp_path: Path, stop: signal.Signals) -> None:
    """A stream that is running when the signal comes is still finished."""
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    kept = ("--prefix-cache-dir", str(tmp_path / "kept"))
    with process_of(root, tmp_path, "--layout", "linear", "--api-key-file", str(key), *kept) as found:
        process, address = found
        body = {"prompt": "The sky", "max_tokens": 150, "stream": True, "temperature": 0}
        headers = {"Content-Type": "application/json", "Authorization": "Bearer s3cret"}
        request = urllib.request.Request(f"{address}/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=60) as response:
            first = response.readline()
            process.send_signal(stop)
            rest = response.read().decode()
        assert first.startswith(b"data: ") and rest.endswith("data: [DONE]\n\n")
        said_at_the_end(process)
        assert len(list((tmp_path / "kept").glob("*.safetensors"))) == 1


def test_answers_longer_than_the_grace_end_with_an_error(root: Path, tmp_path: Path) -> None:
    """An event in a stream and 503 elsewhere, each response whole; the process says nothing of it."""
    endless = tmp_path / "endless"
    shutil.copytree(root, endless)
    never_end(endless / "model")
    options = ["--layout", "plain", "--grace", "1"]
    with process_of(endless, tmp_path, *options) as (process, address), ThreadPoolExecutor(1) as pool:

        def ask(stream: bool) -> Any:
            body = {"prompt": "The sky", "max_tokens": 32768, "stream": stream}
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{address}/completions", json.dumps(body).encode(), headers)
            return urllib.request.urlopen(request, timeout=60)

        def status() -> int:
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(stream=False)
            assert "stopping" in json.loads(refused.value.read())["error"]["message"]
            return refused.value.code

        whole = pool.submit(status)
        with ask(stream=True) as response:
            assert response.readline().startswith(b"data: ")
            while '"active":2' not in urllib.request.urlopen(f"{address[:-3]}/health").read().decode():
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            events = response.read().decode().split("\n\n")
        assert "stopping" in json.loads(events[-2].removeprefix("data: "))["error"]["message"]
        assert events[-1] == "" and whole.result(30) == 503
        said_at_the_end(process)


def _address(lines: Any) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        line = lines.readline()
        if found := re.search(r"serving model on (http://127\.0\.0\.\d:\d+/v1)", line):
            return found[1]
        assert line, "the server ended"
    raise AssertionError("no address")
