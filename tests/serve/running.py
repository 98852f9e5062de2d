"""A server on loopback in a thread, with a tiny model; and plain HTTP to it, for what clients would never send."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from mtp_mlx.api import load
from mtp_mlx.drafters.masks.folder import mask_header
from mtp_mlx.drafters.masks.folder import save as save_adapter
from mtp_mlx.model.fingerprint import base_fingerprint
from mtp_mlx.serve.app import Application, AppSettings
from mtp_mlx.serve.engine import Engine, EngineSettings
from mtp_mlx.serve.grammar import Grammars
from mtp_mlx.serve.prefix_files import PrefixFiles, made_by
from mtp_mlx.serve.prompts import Limits, Prompts
from mtp_mlx.serve.sequence import DecodeSettings
from tests.decode.fakes import random_adapter
from tests.tiny import save_tiny, tiny_model

NAME = "tiny"
VOCABULARY = 300  # every byte has a token, as a grammar needs


def save_model(root: Path, rows: int = VOCABULARY) -> Path:
    """A folder with `model` and `adapter` in it; the model's embedding has `rows` rows."""
    save_tiny(root / "model", "qwen3", seed=3, vocab_size=rows)
    model = tiny_model("qwen3", seed=3, vocab_size=rows)
    adapter = random_adapter(model)
    save_adapter(root / "adapter", adapter, mask_header(adapter.config, "tiny", base_fingerprint(model)))
    return root


def load_model(root: Path) -> tuple[Any, Any]:
    """The model of `save_model` with its adapter if there is one, and its tokenizer."""
    adapter = root / "adapter"
    return load(str(root / "model"), adapter if adapter.exists() else None)


@dataclass
class Server:
    """A running server."""

    port: int
    engine: Engine
    prompts: Prompts

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
        method: str | None = None,
    ) -> tuple[int, Any]:
        """(status, JSON or text) of one request; `raw` is sent as it is."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = {"Content-Type": "application/json"} | (headers or {})
            connection.request(method or ("GET" if data is None else "POST"), path, data, sent)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    def settle(self, seconds: float = 20.0) -> None:
        """Waits until nothing is waiting or active."""
        end = time.monotonic() + seconds
        while self.engine.load != (0, 0):
            assert time.monotonic() < end, f"still busy: {self.engine.load}"
            time.sleep(0.01)


@contextmanager
def serving(
    root: Path,
    *,
    engine: EngineSettings | None = None,
    app: AppSettings | None = None,
    limits: Limits | None = None,
    strict_model: bool = False,
    port: int = 0,
    folder: Path | None = None,
) -> Iterator[Server]:
    """A server with the model of `save_model`; plain layout unless `engine` says otherwise.

    Args:
        folder: to keep the prefix cache in.
    """
    model, tokenizer = load_model(root)
    grammars = Grammars(tokenizer._tokenizer, model.vocab_size, sorted(tokenizer.eos_token_ids))
    settings = engine or EngineSettings(decode=DecodeSettings(layout="plain"))
    files = None
    if folder is not None:
        files = PrefixFiles(folder, 1 << 24, made_by(model, settings.decode.cache), NAME)
    running = Engine(model, tokenizer, settings, grammars=grammars, files=files)
    limits = limits or Limits(default_output=24)
    ends = running.prefixes.wants_ends(model.make_cache())
    prompts = Prompts(tokenizer, NAME, model.vocab_size, limits, grammars, strict_model, ends)
    with served(Application(running, prompts, app or AppSettings()), port) as found:
        yield Server(found, running, prompts)


@contextmanager
def served(application: Application, port: int = 0) -> Iterator[int]:
    """The port on which an application is served for a while; any free one if `port` is 0."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    server = uvicorn.Server(
        uvicorn.Config(application.starlette, log_level="error", timeout_graceful_shutdown=5)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
    assert not thread.is_alive()
