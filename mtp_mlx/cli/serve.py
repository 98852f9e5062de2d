"""`mtp-mlx serve`: an HTTP server with OpenAI- and Anthropic-compatible APIs."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from mtp_mlx.cli.generate import OPEN, recommendation
from mtp_mlx.cli.options import (
    CacheOptions,
    DraftingOptions,
    LearningOptions,
    LoadingOptions,
    ModelOptions,
    PrecisionOptions,
    ThinkingOptions,
)
from mtp_mlx.config import from_yaml, options_for, setting, to_dict
from mtp_mlx.distributed import Peers, join, launched_rank, launched_size, whose
from mtp_mlx.errors import MTPError, needs_extra

if TYPE_CHECKING:
    from mtp_mlx.decode.pick import SamplingConfig
    from mtp_mlx.model.attach import AttachedModel
    from mtp_mlx.serve.app import Application
    from mtp_mlx.serve.grammar import Grammars
    from mtp_mlx.serve.prefix_files import PrefixFiles
    from mtp_mlx.serve.sequence import DecodeSettings

KEY_VARIABLE = "MTP_MLX_API_KEY"
GOODBYE_SECONDS = 5  # after the grace period: time to finish the pass and to send the errors to the clients
EPILOG = """\b
Examples:
  mtp-mlx serve
  mtp-mlx serve -m ./model --adapter ./adapter --port 8000 --layout auto
  mtp-mlx serve --host 0.0.0.0 --api-key-file key.txt
  curl localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
"""


@dataclass(frozen=True)
class ServeSettings(
    PrecisionOptions,
    CacheOptions,
    LearningOptions,
    LoadingOptions,
    DraftingOptions,
    ThinkingOptions,
    ModelOptions,
):
    """Options of `mtp-mlx serve`."""

    name: str | None = setting(None, help="Model name in requests (default: its name or folder)")
    host: str = setting("127.0.0.1", help="Address to listen on")
    port: int = setting(8080, help="Port to listen on; 0 = any free one", minimum=0, maximum=65535)
    api_key_file: Path | None = setting(None, help=f"File with the API key (or set {KEY_VARIABLE})")
    strict_model: bool = setting(False, help="Refuse requests that name another model")
    cors_origin: tuple[str, ...] = setting(
        (), help="Origin whose web pages may use the server; * = any (repeatable)"
    )
    open_to_all: bool = setting(False, help="Accept requests from other machines without a key")
    sampling: Literal["model"] | None = setting(None, help="Sampling of requests: as the model recommends")
    temp: float | None = setting(None, help="Temperature if a request has none (default: 0)", minimum=0)
    top_k: int | None = setting(None, help="Top-k if a request has none (default: off)", minimum=0)
    top_p: float | None = setting(None, help="Top-p if a request has none (default: 1)", minimum=0, maximum=1)
    min_p: float | None = setting(None, help="Min-p if a request has none (default: 0)", minimum=0, maximum=1)
    max_tokens: int = setting(1024, help="Maximum number of tokens if a request has none", minimum=1)
    max_output_tokens: int = setting(32768, help="Largest max_tokens of a request", minimum=1)
    max_prompt_tokens: int = setting(32768, help="Longest prompt, in tokens", minimum=1)
    prefill_step_size: int = setting(
        512, help="Tokens of a prompt in a pass, between which other answers go on", minimum=1
    )
    max_body_bytes: int = setting(4 << 20, help="Largest request body, in bytes", minimum=1000)
    queue: int = setting(32, help="Requests that may wait; any more get a 429", minimum=0)
    concurrent: int = setting(4, help="Requests answered at the same time", minimum=1)
    batch: bool = setting(True, help="Share forward passes between requests if possible")
    prefix_cache_mb: int = setting(
        1024, help="Memory for the KV caches of earlier requests; 0 = off", minimum=0
    )
    prefix_cache_dir: Path | None = setting(
        None, help="Folder to keep these caches in too, for after a restart"
    )
    prefix_cache_dir_mb: int = setting(8192, help="Most room that this folder takes", minimum=1)
    grace: int = setting(10, help="Seconds to finish running answers on shutdown", minimum=0)


@click.command(epilog=EPILOG, short_help="Serve OpenAI- and Anthropic-compatible APIs over HTTP")
@options_for(ServeSettings)
def command(**options: Any) -> None:
    """Serve a model over HTTP to clients of OpenAI and Anthropic; the text is the same as from generate.

    POST /v1/chat/completions, /v1/completions, /v1/responses, /v1/messages; GET /v1/models, /health, /metrics.
    """
    settings = from_yaml(ServeSettings, None, options)
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise needs_extra("the server needs", package, "serve")
    check_origins(settings.cors_origin)
    if launched_size() > 1:
        check_shared(settings)
    if launched_rank() > 0:
        application(settings, None, join()).follow()
        return
    key = read_key(settings)
    listener = listen(settings.host, settings.port)
    with listener:
        run(settings, application(settings, key, join()), listener)


def check_shared(settings: ServeSettings) -> None:
    """Raise MTPError for what several processes cannot do."""
    if settings.prefix_cache_dir is not None:
        raise MTPError("--prefix-cache-dir needs a single process: leave it out, or run without mlx.launch")
    if settings.memory_learn:
        raise MTPError("--memory-learn needs a single process: leave it out, or run without mlx.launch")


def read_key(settings: ServeSettings) -> str | None:
    """The API key, or None if there is none.

    Raises:
        MTPError: if the key is empty, cannot be sent in a header, or is missing although other machines can connect.
    """
    key = os.environ.get(KEY_VARIABLE)
    where = KEY_VARIABLE
    if settings.api_key_file is not None:
        where = str(settings.api_key_file)
        try:
            key = settings.api_key_file.read_text(encoding="utf-8").strip()
        except UnicodeDecodeError:
            raise MTPError(f"{where} is not UTF-8: write the key as plain text") from None
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise MTPError(f"{where} must hold a key of printable ASCII characters without spaces")
    if key is None and not is_loopback(settings.host) and not settings.open_to_all:
        raise MTPError(
            f"anybody on the network could use a server on {settings.host}: give --api-key-file (or set "
            f"{KEY_VARIABLE}), or allow it with --open-to-all"
        )
    return key


def check_origins(origins: tuple[str, ...]) -> None:
    """Raise MTPError unless each of them is * or an origin as browsers send it."""
    for origin in origins:
        scheme, _, rest = origin.partition("://")
        if origin != "*" and (not scheme or not rest or set(rest) & set("/ ?#")):
            raise MTPError(
                f"--cors-origin {origin!r} is no origin: write scheme, host and port, such as "
                "http://localhost:3000, or * for any"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_names(host: str) -> tuple[str, ...] | None:
    """Names that a `Host` header may have for a server on loopback; None (any name) for other hosts."""
    from mtp_mlx.serve.app import LOOPBACK_NAMES

    if not is_loopback(host):
        return None
    try:
        spellings = [host, str(ipaddress.ip_address(host))]
    except ValueError:
        spellings = [host]
    in_brackets = [f"[{spelling}]" for spelling in spellings if ":" in spelling]  # as written in a URL
    return tuple(dict.fromkeys([*LOOPBACK_NAMES, *spellings, *in_brackets]))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the model is loaded; clients that connect early wait.

    Raises:
        MTPError: if the address is not available.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # two processes may bind the same port, but only one may listen
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MTPError(
            f"cannot listen on {host} port {port} ({reason}): choose another --port or --host"
        ) from error
    return listener


def application(settings: ServeSettings, key: str | None, peers: Peers | None = None) -> Application:
    """Load the model, or this process's part of it, and build the application."""
    from mtp_mlx.chat_template import check_template, thinking_options
    from mtp_mlx.cli.loading import load_model
    from mtp_mlx.cli.progress import cost_progress
    from mtp_mlx.decode.cache_check import check_quantisation
    from mtp_mlx.decode.stats import DecodeStats
    from mtp_mlx.models import resolve_model
    from mtp_mlx.planning.calibrate import prepare_costs
    from mtp_mlx.planning.choose import plan_drafting, settled_layout
    from mtp_mlx.serve.app import Application, AppSettings
    from mtp_mlx.serve.engine import Engine, EngineSettings
    from mtp_mlx.serve.prompts import Limits, Prompts
    from mtp_mlx.serve.sequence import DecodeSettings

    resolve_model(settings.model, settings.quantize, tell)
    model, tokenizer = load_model(settings, memory_learn=settings.memory_learn, peers=peers)
    _same_work(model, settings)
    if settings.memory_learn:
        tell(f"answers to all clients are added to {settings.memory}, which then holds pieces of them")
    if settled_layout(model, settings.layout, settings.lookup, settings.drafter) == "auto":
        prepare_costs(model, None, tell, cost_progress())
    shared = {field.name for field in fields(DecodeSettings)} & {field.name for field in fields(settings)}
    decode = DecodeSettings(**{name: getattr(settings, name) for name in shared})
    plan_drafting(
        model, decode.layout, decode.drafts, DecodeStats(), decode.lookup, decode.drafter, rows=decode.rows
    )  # refuses bad settings now, not at the first request
    check_template(tokenizer, model.vocab_size)
    thinking_options(tokenizer, settings.thinking)
    check_quantisation(model, model.make_cache(), decode.kv_bits, decode.kv_group_size)
    grammars = _grammars(model, tokenizer)
    engine = Engine(
        model,
        tokenizer,
        EngineSettings(
            settings.queue, settings.concurrent, settings.prefix_cache_mb << 20, settings.batch, decode
        ),
        grammars=grammars,
        files=_files(settings, model, decode),
    )
    limits = Limits(
        settings.max_prompt_tokens,
        settings.max_output_tokens,
        settings.max_tokens,
        default_sampling(settings, model),
        settings.thinking,
    )
    return Application(
        engine,
        Prompts(
            tokenizer,
            settings.name or Path(settings.model).name,
            model.vocab_size,
            limits,
            grammars,
            settings.strict_model,
            find_ends=engine.prefixes.wants_ends(model.make_cache()),
        ),
        AppSettings(key, settings.max_body_bytes, host_names(settings.host), settings.cors_origin),
    )


def _same_work(model: AttachedModel, settings: ServeSettings) -> None:
    """Raise MTPError if processes that share a model were given different commands."""
    given = {**to_dict(settings), "the adapter's base": model.info and model.info.base_fingerprint}
    for own in ("host", "port", "api_key_file", "name"):  # of process 0 alone, or a path
        given.pop(own)
    model.peers.must_agree(given, "start all of them with the same command")


def _files(settings: ServeSettings, model: AttachedModel, decode: DecodeSettings) -> PrefixFiles | None:
    """The prefix cache on disk, or None if there is none."""
    from mtp_mlx.files import user_path
    from mtp_mlx.serve.prefix_files import PrefixFiles, made_by

    if settings.prefix_cache_dir is None:
        return None
    if not settings.prefix_cache_mb:
        raise MTPError("--prefix-cache-dir needs memory to read into: give --prefix-cache-mb more than 0")
    folder = user_path(str(settings.prefix_cache_dir))
    room = settings.prefix_cache_dir_mb << 20
    files = PrefixFiles(folder, room, made_by(model, decode.cache), settings.model)
    tell(f"{folder} has {len(files)} earlier texts of this model, {files.nbytes / 1e6:.1f} MB")
    return files


def default_sampling(settings: ServeSettings, model: AttachedModel) -> SamplingConfig:
    """How tokens are picked for requests that do not say it."""
    from mtp_mlx.decode.pick import SamplingConfig

    if note := recommendation(settings, model):
        tell(note)
    found = model.recommended_sampling if settings.sampling == "model" else None
    named = {"temperature": settings.temp} | {name: getattr(settings, name) for name in OPEN[1:4]}
    given = {name: value for name, value in named.items() if value is not None}
    return replace(found or SamplingConfig(), **given)


def _grammars(model: AttachedModel, tokenizer: Any) -> Grammars | None:
    """The grammars for JSON answers, or None if the tokenizer does not support them."""
    from mtp_mlx.serve.grammar import Grammars

    try:
        return Grammars(tokenizer._tokenizer, model.vocab_size, sorted(tokenizer.eos_token_ids))
    except MTPError as error:
        tell(f"JSON schemas are not available: {error}")
        return None


def run(settings: ServeSettings, app: Application, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM; running answers then get `grace` seconds, and an error after that."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """uvicorn raises the signal again at the end; here a request to stop is not an error."""
            before = {name: signal.signal(name, self.handle_exit) for name in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for name, handler in before.items():
                    signal.signal(name, handler)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """uvicorn silently cancels answers after the grace period; the engine ends them with an error first."""
            ending = threading.Thread(target=app.stop, daemon=True)
            timer = asyncio.get_running_loop().call_later(settings.grace, ending.start)
            try:
                await super().shutdown(sockets)
            finally:
                timer.cancel()

    host, port = listener.getsockname()[:2]
    tell(f"serving {app.model_name} on http://{f'[{host}]' if ':' in host else host}:{port}/v1")
    most = settings.queue + settings.concurrent
    config = uvicorn.Config(
        app.starlette,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=settings.grace + GOODBYE_SECONDS,
        timeout_keep_alive=30,
        limit_concurrency=4 * most + 64,
        server_header=False,
    )
    server = Server(config)
    if launched_size() > 1:  # the others cannot go on without this process, nor it without them
        app.engine.on_failure = lambda: setattr(server, "should_exit", True)
        threading.Thread(target=_end_anyway, args=(server, settings.grace), daemon=True).start()
    server.run(sockets=[listener])
    if launched_size() > 1 and app.engine.failure is not None:
        raise MTPError(f"the server cannot go on: {app.engine.failure}")
    tell("stopped")


def _end_anyway(server: Any, grace: int) -> None:
    """Ends this process if it does not end by itself after it was told to: its engine may wait for a lost process."""
    while not server.should_exit:
        time.sleep(0.5)
    time.sleep(grace + GOODBYE_SECONDS - 0.5)  # before uvicorn gives up on the answers
    message = f"Error{whose()}: another process of this run does not answer any more, so this one ends\n"
    os.write(sys.stderr.fileno(), message.encode())
    os._exit(2)  # the engine's thread is inside MLX and cannot be ended


def tell(stage: str) -> None:
    """Print a line to stderr, from the first process only."""
    if launched_rank() == 0:
        click.echo(stage, err=True)
