"""The HTTP application: routes, access control, size limits, and turning the engine's events into responses."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mtp_mlx.serve import anthropic_answers, anthropic_api, openai_answers, openai_api, responses_api
from mtp_mlx.serve.engine import FAILED, Engine
from mtp_mlx.serve.fields import parse_object
from mtp_mlx.serve.orders import Ticket
from mtp_mlx.serve.prompts import Answer, Prompts
from mtp_mlx.serve.request import Event, Failure, Piece, RequestError

log = logging.getLogger("mtp_mlx.serve")

BODY_SECONDS = 30.0  # time limit for receiving a body
QUIET_SECONDS = 10.0  # after which a stream that shows nothing says that it goes on
STILL_HERE = ": still writing\n\n"  # a comment, which clients skip
CLIENT_CLOSED = 499  # the status logged for a request whose client disconnected
PAGE = Path(__file__).with_name("page.html")  # a chat for people, which needs nothing but this server
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}
LOOPBACK_NAMES = ["localhost", "127.0.0.1", "[::1]", "::1"]

Reader = Callable[[dict[str, Any], Prompts], Answer]
_Indexed = tuple[int, Event]  # an event, and the number of its text in the response
ErrorBody = Callable[[RequestError], dict[str, Any]]


@dataclass(frozen=True)
class AppSettings:
    """Access control and size limits.

    Attributes:
        api_key: the key that clients must send, or None.
        max_body_bytes: largest request body.
        hosts: allowed `Host` headers, or None for any. On loopback this protects against DNS rebinding: a web page
            whose host name resolves to this machine.
        cors_origins: origins whose web pages may use the server, or "*" for all; none by default.
    """

    api_key: str | None = None
    max_body_bytes: int = 4 << 20
    hosts: tuple[str, ...] | None = tuple(LOOPBACK_NAMES)
    cors_origins: tuple[str, ...] = ()


class Application:
    """The routes of an engine. `starlette` is the ASGI application; its lifespan starts and stops the engine.

    Attributes:
        engine: the engine.
    """

    def __init__(self, engine: Engine, prompts: Prompts, settings: AppSettings | None = None) -> None:
        self.engine, self._prompts = engine, prompts
        self._settings = settings or AppSettings()
        self._created = int(time.time())
        # Parsing a request applies templates and tokenises: in one thread, so that the event loop is not blocked.
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="mtp-mlx-reader")
        openai, anthropic = openai_answers.error_body, anthropic_answers.error_body
        routes = [
            self._route("/", self._page, "GET", openai, open_to_all=True),
            self._route("/health", self._health, "GET", openai, open_to_all=True),
            self._route("/metrics", self._metrics, "GET", openai),
            *self._routes("/models", self._models, "GET", openai),
            *self._routes("/models/{name:path}", self._model, "GET", openai),
            *self._routes("/chat/completions", self._answering(openai_api.chat), "POST", openai),
            *self._routes("/completions", self._answering(openai_api.completion), "POST", openai),
            *self._routes("/responses", self._answering(responses_api.response), "POST", openai),
            self._route("/v1/messages", self._answering(anthropic_api.message), "POST", anthropic),
            self._route("/v1/messages/count_tokens", self._count_tokens, "POST", anthropic),
        ]
        self.starlette = Starlette(
            routes=routes,
            middleware=_middleware(self._settings),
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _not_here},
        )

    @property
    def model_name(self) -> str:
        """The model's name in requests."""
        return self._prompts.model_name

    def stop(self) -> None:
        """End all running answers with an error and accept no more requests. Returns when that is done."""
        self.engine.stop()

    def follow(self) -> None:
        """Answer nobody, and run the engine as process 0 says (see `Engine.follow`), despite Ctrl-C."""
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # at once, also while it waits for a lost process
        self.engine.follow()

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.stop)
            self._readers.shutdown(wait=False)

    def _routes(self, path: str, *how: Any) -> list[Route]:
        """A route of OpenAI's API, with and without /v1, which some clients expect in the address and others add."""
        return [self._route(prefix + path, *how) for prefix in ("/v1", "")]

    def _route(
        self,
        path: str,
        handle: Callable[[Request], Awaitable[Response]],
        method: str,
        error_body: ErrorBody,
        open_to_all: bool = False,
    ) -> Route:
        """A route that checks the key, and whose errors have the form of its API."""

        async def answer(request: Request) -> Response:
            try:
                if not open_to_all:
                    self._check_key(request)
                return await handle(request)
            except RequestError as error:
                headers = {"Retry-After": "1"} if error.status == 429 else None
                return JSONResponse(error_body(error), error.status, headers)
            except ClientDisconnect:
                return Response(status_code=CLIENT_CLOSED)

        async def endpoint(request: Request) -> Response:
            try:
                response = await answer(request)
            except Exception:
                log.exception("a request failed")
                error = RequestError(FAILED, 500)
                response = JSONResponse(error_body(error), error.status)
            self.engine.metrics.add("mtp_mlx_requests_total", path=path, status=response.status_code)
            return response

        return Route(path, endpoint, methods=[method])

    # --- access control and size limits ---------------------------------------------------------------------

    def _check_key(self, request: Request) -> None:
        """Raise RequestError 401 unless the request has the key (compared in constant time)."""
        key = self._settings.api_key
        if key is None:
            return
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        shown = bearer.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not hmac.compare_digest(shown.encode("utf-8", "replace"), key.encode("utf-8")):
            raise RequestError("a valid API key is required", 401)

    async def _body(self, request: Request) -> dict[str, Any]:
        """The JSON object in the body; at most the size limit is read."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a form on a web page could send other types
            raise RequestError("the body must be sent as application/json", 415)
        most = self._settings.max_body_bytes
        too_large = RequestError(f"the body has more than {most} bytes (--max-body-bytes)", 413)
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > most:
            raise too_large
        try:
            return parse_object(await asyncio.wait_for(_collect(request, most, too_large), BODY_SECONDS))
        except TimeoutError:
            raise RequestError("the body did not arrive in time", 408) from None

    async def _read(self, read: Callable[[dict[str, Any], Prompts], Any], body: dict[str, Any]) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, read, body, self._prompts)

    # --- routes ---------------------------------------------------------------------------------------------

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=PAGE_HEADERS)

    async def _health(self, _: Request) -> Response:
        waiting, active = self.engine.load
        alive = self.engine.alive
        state = {"status": "ok" if alive else "stopped", "waiting": waiting, "active": active}
        state["batching"] = self.engine.batching
        return JSONResponse({**state, "model": self._prompts.model_name}, 200 if alive else 503)

    async def _metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def _models(self, _: Request) -> Response:
        return JSONResponse(openai_api.models(self._prompts, self._created))

    async def _model(self, request: Request) -> Response:
        if request.path_params["name"] != self.model_name:
            raise RequestError(f"this server serves the model {self.model_name!r}", 404, "model")
        return JSONResponse(openai_api.models(self._prompts, self._created)["data"][0])

    async def _count_tokens(self, request: Request) -> Response:
        return JSONResponse(await self._read(anthropic_api.count_tokens, await self._body(request)))

    def _answering(self, read: Reader) -> Callable[[Request], Awaitable[Response]]:
        """A handler for requests that the engine answers."""

        async def handle(request: Request) -> Response:
            answer: Answer = await self._read(read, await self._body(request))
            for name in self.engine.metrics.ignored(answer.requests[0].ignored):
                log.warning("the field %r of a request is not known here and has no effect", name)
            events: asyncio.Queue[_Indexed] = asyncio.Queue()
            tickets: list[Ticket] = []
            handed_over = False
            try:
                for index, one in enumerate(answer.requests):
                    tickets.append(self.engine.submit(one, _deliverer(events, index)))
                # Wait for the first piece, so that a failure before it still gets its own status.
                first = await _next_or_gone(request, events)
                if answer.stream:
                    handed_over = True
                    return _EventStream(_events(answer, first, events), tickets)
                return JSONResponse(answer.whole(await _texts(request, len(tickets), first, events)))
            finally:
                if not handed_over:
                    for ticket in tickets:
                        ticket.cancel()

        return handle


async def _not_here(request: Request, error: Exception) -> Response:
    """The answer to a path that is not served, or not with this method."""
    assert isinstance(error, HTTPException)
    said = f"this server has no {request.method} {request.url.path}"
    body = openai_answers.error_body(RequestError(said, error.status_code))
    return JSONResponse(body, error.status_code, error.headers)


def _middleware(settings: AppSettings) -> list[Middleware]:
    """Checks of hosts and origins."""
    found = []
    if settings.hosts is not None:
        found.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts)))
    if settings.cors_origins:
        found.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
        )
    return found


async def _collect(request: Request, most: int, too_large: RequestError) -> bytes:
    """The body; raises `too_large` as soon as more than `most` bytes have arrived."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    return bytes(body)


class _EventStream(StreamingResponse):
    """Server-sent events of some tickets; however the response ends, the tickets are cancelled with it."""

    def __init__(self, events: AsyncIterator[str], tickets: list[Ticket]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._tickets = tickets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for ticket in self._tickets:
                ticket.cancel()


def _deliverer(events: asyncio.Queue[_Indexed], index: int) -> Callable[[Event], None]:
    """A function that passes events of the text `index` from the engine's thread to the event loop."""
    loop = asyncio.get_running_loop()

    def deliver(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody is listening
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

    return deliver


def _piece(indexed: _Indexed) -> tuple[int, Piece]:
    index, event = indexed
    if isinstance(event, Failure):
        raise event.error
    return index, event


async def _texts(
    request: Request, count: int, first: tuple[int, Piece], events: asyncio.Queue[_Indexed]
) -> list[list[Piece]]:
    """The pieces of each text, up to the end of all; raises as `_next_or_gone`."""
    texts: list[list[Piece]] = [[] for _ in range(count)]
    index, piece = first
    texts[index].append(piece)
    while not all(pieces and pieces[-1].summary is not None for pieces in texts):
        index, piece = await _next_or_gone(request, events)
        texts[index].append(piece)
    return texts


async def _next_or_gone(request: Request, events: asyncio.Queue[_Indexed]) -> tuple[int, Piece]:
    """The next piece, and the number of its text.

    Raises:
        RequestError: if the engine failed.
        ClientDisconnect: if the client disconnects first.
    """
    if not events.empty():
        return _piece(events.get_nowait())
    coming = asyncio.ensure_future(events.get())
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({coming, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise ClientDisconnect
        return _piece(coming.result())
    finally:
        coming.cancel()
        leaving.cancel()


async def _events(
    answer: Answer, first: tuple[int, Piece], events: asyncio.Queue[_Indexed]
) -> AsyncIterator[str]:
    """The server-sent events as text; while a long tool call shows nothing, comments keep the connection awake."""
    (index, piece), left = first, len(answer.requests)
    quiet_since = time.monotonic()
    try:
        if text := answer.opening():
            yield text
        while True:
            text = answer.events(index, piece)
            if not text and time.monotonic() - quiet_since >= QUIET_SECONDS:
                text = STILL_HERE
            if text:
                yield text
                quiet_since = time.monotonic()
            left -= piece.summary is not None
            if not left:
                return
            index, piece = _piece(await events.get())
    except RequestError as error:
        yield answer.failure(error)
