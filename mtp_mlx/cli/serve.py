"""`mtp-mlx serve`: an HTTP server with OpenAI's and Anthropic's interfaces."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mtp_mlx.cli.options import CacheOptions, DraftingOptions, LoadingOptions, ModelOptions, PrecisionOptions
from mtp_mlx.config import from_yaml, options_for, setting
from mtp_mlx.errors import MTPError

if TYPE_CHECKING:
    from mtp_mlx.model.attach import AttachedModel
    from mtp_mlx.serve.app import Application
    from mtp_mlx.serve.grammar import Grammars

KEY_VARIABLE = "MTP_MLX_API_KEY"
GOODBYE_SECONDS = (
    5  # after the grace: for the engine to end its pass, and for the errors to reach the clients
)
EPILOG = """\b
Examples:
  mtp-mlx serve
  mtp-mlx serve -m ./model --adapter ./adapter --port 8000 --layout auto
  mtp-mlx serve --host 0.0.0.0 --api-key-file key.txt
  curl localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Why is the sky blue?"}]}'
"""


@dataclass(frozen=True)
class ServeSettings(PrecisionOptions, CacheOptions, LoadingOptions, DraftingOptions, ModelOptions):
    """Options of `mtp-mlx serve`."""

    name: str | None = setting(None, help="What requests call the model (default: its name or folder)")
    host: str = setting("127.0.0.1", help="Address to listen on")
    port: int = setting(8080, help="Port to listen on, 0 for any free one", minimum=0, maximum=65535)
    api_key_file: Path | None = setting(
        None, help=f"File with the key that clients must show (or set {KEY_VARIABLE})"
    )
    open_to_all: bool = setting(False, help="Listen beyond this machine without a key")
    temp: float = setting(0.0, help="Temperature where a request gives none", minimum=0)
    max_tokens: int = setting(1024, help="Tokens to write where a request gives no number", minimum=1)
    max_output_tokens: int = setting(32768, help="Most tokens a request may ask for", minimum=1)
    max_prompt_tokens: int = setting(32768, help="Most tokens of a prompt", minimum=1)
    max_body_bytes: int = setting(4 << 20, help="Most bytes of a request", minimum=1000)
    queue: int = setting(32, help="Requests that may wait; more get 429", minimum=0)
    concurrent: int = setting(4, help="Requests answered at once", minimum=1)
    batch: bool = setting(True, help="Requests answered at once share passes, where the model can")
    prefix_cache_mb: int = setting(1024, help="Memory for keys and values of earlier texts", minimum=0)
    grace: int = setting(10, help="Seconds that running answers get when the server stops", minimum=0)


@click.command(epilog=EPILOG, short_help="Answer requests of OpenAI's and Anthropic's clients")
@options_for(ServeSettings)
def command(**options: Any) -> None:
    """Answer requests of OpenAI's and Anthropic's clients with the same text that generate writes.

    POST /v1/chat/completions, /v1/completions, /v1/messages; GET /v1/models, /health, /metrics.
    """
    settings = from_yaml(ServeSettings, None, options)
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise MTPError(f"the server needs {package}: pip install 'mtp-mlx[serve]'")
    key = read_key(settings)
    listener = listen(settings.host, settings.port)
    with listener:
        run(settings, application(settings, key), listener)


def read_key(settings: ServeSettings) -> str | None:
    """The API key, or None for none.

    Raises:
        MTPError: an empty key, one that no header can carry, or none where others than this machine may ask.
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
            f"on {settings.host} everybody in the network could ask: give --api-key-file (or {KEY_VARIABLE}), or say "
            "--open-to-all"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_names(host: str) -> tuple[str, ...] | None:
    """Names by which a server on `host` may be addressed; None for any, beyond loopback."""
    from mtp_mlx.serve.app import LOOPBACK_NAMES

    if not is_loopback(host):
        return None
    try:
        spellings = [host, str(ipaddress.ip_address(host))]
    except ValueError:
        spellings = [host]
    in_brackets = [
        f"[{spelling}]" for spelling in spellings if ":" in spelling
    ]  # as they stand in an address
    return tuple(dict.fromkeys([*LOOPBACK_NAMES, *spellings, *in_brackets]))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before anything takes long; whoever connects before the model is loaded waits for it.

    Raises:
        MTPError: the address cannot be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # two may bind the same port, only one may listen
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MTPError(
            f"cannot listen on {host} port {port} ({reason}): choose another --port or --host"
        ) from error
    return listener


def application(settings: ServeSettings, key: str | None) -> Application:
    """The application with its model loaded."""
    from mtp_mlx.cli.loading import load_model
    from mtp_mlx.decode.stats import DecodeStats
    from mtp_mlx.models import resolve_model
    from mtp_mlx.planning.calibrate import step_cost
    from mtp_mlx.planning.choose import plan_drafting, settled_layout
    from mtp_mlx.serve.app import Application, AppSettings
    from mtp_mlx.serve.engine import Engine, EngineSettings
    from mtp_mlx.serve.prompts import Limits, Prompts
    from mtp_mlx.serve.sequence import DecodeSettings

    resolve_model(settings.model, settings.quantize, tell)
    model, tokenizer = load_model(settings)
    if settled_layout(model, settings.layout, settings.lookup, settings.drafter) == "auto":
        step_cost(model, tell)
    decode = DecodeSettings(
        layout=settings.layout,
        drafts=settings.drafts,
        lookup=settings.lookup,
        drafter=settings.drafter,
        kv_bits=settings.kv_bits,
        kv_group_size=settings.kv_group_size,
        quantized_kv_start=settings.quantized_kv_start,
    )
    plan_drafting(
        model, decode.layout, decode.drafts, DecodeStats(), decode.lookup, decode.drafter
    )  # refuses now
    grammars = _grammars(model, tokenizer)
    engine = Engine(
        model,
        tokenizer,
        EngineSettings(
            settings.queue, settings.concurrent, settings.prefix_cache_mb << 20, settings.batch, decode
        ),
        grammars=grammars,
    )
    limits = Limits(
        settings.max_prompt_tokens, settings.max_output_tokens, settings.max_tokens, settings.temp
    )
    name = settings.name or Path(settings.model).name
    return Application(
        engine,
        Prompts(tokenizer, name, model.vocab_size, limits, grammars),
        AppSettings(key, settings.max_body_bytes, host_names(settings.host)),
    )


def _grammars(model: AttachedModel, tokenizer: Any) -> Grammars | None:
    """What answers in JSON are held to, or None where the tokenizer does not go with that."""
    from mtp_mlx.serve.grammar import Grammars

    try:
        return Grammars(tokenizer._tokenizer, model.vocab_size, sorted(tokenizer.eos_token_ids))
    except MTPError as error:
        tell(f"no JSON schema: {error}")
        return None


def run(settings: ServeSettings, app: Application, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM; running answers then get `grace` seconds, and an error after that."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """uvicorn's own raises the signal again at the end; here being told to stop is no error."""
            before = {name: signal.signal(name, self.handle_exit) for name in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for name, handler in before.items():
                    signal.signal(name, handler)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            """uvicorn's own cancels answers after the grace without a word; here the engine ends them before."""
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
    Server(config).run(sockets=[listener])
    tell("stopped")


def tell(stage: str) -> None:
    """A line on stderr."""
    click.echo(stage, err=True)
