"""The routes: /v1/models, /v1/completions and /v1/chat/completions as OpenAI's clients expect them, and /health.

- A request is read up to a limit, validated, queued, and answered when the engine has completed it, or piece by piece.
- What a client does wrong gets a 4xx with one sentence in OpenAI's form: bad input 400, an unknown model or path 404, a
  body that is too large 413. So do no room in the queue, 429, and a time that is up, 408. A 5xx means that the server
  is at fault: 503 while it shuts down, 500 where the model fails (its logits are not finite).
- A client that goes away is no longer computed for.
- Bodies are parsed and tokenised in other threads: in this one, which serves all connections, nobody else would be
  answered meanwhile.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from inl_core.errors import InlError
from inl_core.inference.generate import Completion, Piece
from inl_core.inference.generate import Request as GenerationRequest
from inl_core.interop.server.answers import ChatAnswers, CompletionAnswers, Usage
from inl_core.interop.server.bodies import BadRequest, Body, ChatBody, CompletionBody, parse
from inl_core.interop.server.chat import chat_request
from inl_core.interop.server.engine import Closed, Engine, Event, QueueFull, Ticket, TokenScores

AnyBody = TypeVar("AnyBody", bound=Body)
Result = TypeVar("Result")

_log = logging.getLogger("inl.server")


@dataclass(frozen=True)
class ServerSettings:
    """What the routes go by."""

    name: str
    """What the model is called."""
    timeout: float = 600.0
    """Seconds that a request may take, the sending of its body and waiting included."""
    largest_body: int = 1 << 20
    """Bytes of a request."""


class TimeIsUp(Exception):
    """A request took longer than it may."""


def build_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The application; the engine is closed when the application ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(
        title="inl serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    created = int(time.time())
    card = {"id": settings.name, "object": "model", "created": created, "owned_by": "inl"}
    loaded = engine.loaded
    longest = loaded.model.config.max_seq_len

    @app.api_route("/health", methods=["GET", "HEAD"])  # load balancers ask with HEAD
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": engine.num_waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, settings)
        return card

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        def prepare(body: CompletionBody) -> list[GenerationRequest]:
            return body.requests(loaded.tokenizer, longest)

        exchange = _Exchange(engine, settings)
        body, requests = await exchange.read(request, CompletionBody, prepare)
        return await _answer(exchange, request, body, requests, CompletionAnswers(settings.name, loaded.tokenizer))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        exchange = _Exchange(engine, settings)
        body, requests = await exchange.read(request, ChatBody, lambda body: [chat_request(loaded, body)])
        return await _answer(exchange, request, body, requests, ChatAnswers(settings.name, loaded.tokenizer))

    _handle_errors(app)
    return app


def refuse_all_but_health(app: Any) -> Any:
    """The application as a connection beyond the last one meets it: /health answers, all else is to come again."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/health":
            return await app(scope, receive, send)
        body = error_body(429, "as many connections are in use as may be; try again later")
        await JSONResponse(body, 429, headers=_headers(429) | {"Connection": "close"})(scope, receive, send)

    return answer


def _handle_errors(app: FastAPI) -> None:
    def answer(status: int, message: str, **more: Any) -> JSONResponse:
        return JSONResponse(error_body(status, message, **more), status, headers=_headers(status))

    @app.exception_handler(BadRequest)
    async def bad(request: Request, error: BadRequest) -> JSONResponse:
        return answer(error.status, str(error), parameter=error.parameter, code=error.code)

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    async def failed(request: Request, error: Exception) -> JSONResponse:
        return answer(*_told(error))

    for kind in (TimeIsUp, QueueFull, Closed, InlError, Exception):
        app.add_exception_handler(kind, failed)


def _told(error: Exception) -> tuple[int, str]:
    """The status and the sentence for what went wrong while a request waited or was computed."""
    if isinstance(error, TimeIsUp):
        return 408, str(error)
    if isinstance(error, QueueFull):
        return 429, "as many requests wait as may; try again later"
    if isinstance(error, Closed):
        return 503, "the server is shutting down"
    if isinstance(error, InlError):
        return 500, str(error)
    _log.error("a request failed", exc_info=error)
    return 500, f"the server failed ({type(error).__name__}); its log says more"


def error_body(status: int, message: str, *, parameter: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def _headers(status: int) -> dict[str, str]:
    if status in (408, 413):  # the rest of the body is not waited for
        return {"Connection": "close"}
    return {"Retry-After": "1"} if status in (429, 503) else {}


def _check_model(name: str, settings: ServerSettings) -> None:
    if name != settings.name:
        message = f"the model {name!r} is not served here; {settings.name!r} is"
        raise BadRequest(message, parameter="model", status=404, code="model_not_found")


async def _received(request: Request, largest: int) -> bytes:
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > largest:
                raise BadRequest(f"a body of more than {largest:,} bytes", status=413)
    except ClientDisconnect:
        raise BadRequest("the connection ended inside the body") from None
    return bytes(data)


@dataclass
class _Exchange:
    """One HTTP request on its way through the engine."""

    engine: Engine
    settings: ServerSettings
    tickets: list[Ticket] = field(default_factory=list)
    events: "asyncio.Queue[tuple[int, Event]]" = field(default_factory=asyncio.Queue)
    began: float = field(default_factory=time.monotonic)
    num_left: int = 0

    async def read(
        self, http: Request, kind: type[AnyBody], prepare: Callable[[AnyBody], list[GenerationRequest]]
    ) -> tuple[AnyBody, list[GenerationRequest]]:
        """The body, and what `prepare` makes of it.

        Raises:
            BadRequest: it cannot be used.
            TimeIsUp: its last byte did not come in time.
        """

        def understand(data: bytes) -> tuple[AnyBody, list[GenerationRequest]]:
            body = parse(kind, data)
            _check_model(body.model, self.settings)
            return body, prepare(body)

        return await self._in_time(self._understood(http, understand))

    async def _understood(self, http: Request, understand: Callable[[bytes], Result]) -> Result:
        return await asyncio.to_thread(understand, await _received(http, self.settings.largest_body))

    async def _in_time(self, awaited: Awaitable[Result]) -> Result:
        left = self.began + self.settings.timeout - time.monotonic()
        try:
            return await asyncio.wait_for(awaited, max(left, 0))
        except TimeoutError:
            raise TimeIsUp(f"not done within {self.settings.timeout:g} seconds") from None

    def submit(self, requests: Sequence[GenerationRequest], num_top: int | None) -> None:
        """Queue all prompts of the request.

        Raises:
            QueueFull: as `Engine.submit`.
        """
        loop = asyncio.get_running_loop()

        def deliverer(index: int) -> Callable[[Event], None]:
            def deliver(event: Event) -> None:
                with suppress(RuntimeError):  # the loop has ended, and nobody waits any more
                    loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

            return deliver

        self.tickets = [Ticket(request, num_top, deliverer(index)) for index, request in enumerate(requests)]
        self.num_left = sum(request.settings.num_samples for request in requests)
        self.engine.submit(self.tickets)

    async def results(self) -> AsyncIterator[tuple[int, Piece | Completion, TokenScores | None]]:
        """Pieces and completions with the numbers of their prompts, until all are complete.

        Raises:
            TimeIsUp: they took too long.
            Exception: what the engine met with.
        """
        try:
            while self.num_left:
                index, event = await self._in_time(self.events.get())
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Piece):
                    yield index, event, None
                else:
                    self.num_left -= 1
                    yield index, *event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for ticket in self.tickets:
            ticket.cancel()


async def _answer(
    exchange: _Exchange,
    http: Request,
    body: Body,
    requests: Sequence[GenerationRequest],
    answers: CompletionAnswers | ChatAnswers,
) -> Any:
    exchange.submit(requests, body.num_top)
    usage = Usage(sum(len(request.prompt_ids) for request in requests))
    samples = body.n or 1
    if body.stream:
        wants_usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(
            _streamed(exchange, answers, usage, samples, wants_usage), media_type="text/event-stream"
        )
    watcher = asyncio.create_task(_cancel_when_gone(http, exchange))
    try:
        choices = []
        async for index, result, scores in exchange.results():
            if isinstance(result, Completion):
                usage.add(result)
                choices.append(answers.choice(index * samples + result.sample_index, result, scores))
    finally:
        watcher.cancel()
    return answers.whole(sorted(choices, key=lambda choice: choice["index"]), usage)


async def _cancel_when_gone(http: Request, exchange: _Exchange) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    exchange.cancel()
    exchange.events.put_nowait((0, BadRequest("the client has gone")))


async def _streamed(
    exchange: _Exchange, answers: CompletionAnswers | ChatAnswers, usage: Usage, samples: int, wants_usage: bool
) -> AsyncIterator[str]:
    """The answer as server-sent events; an error after the first of them can only be one more event."""

    def event(data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data)}\n\n"

    try:
        for first in answers.first_chunks(len(exchange.tickets) * samples):
            yield event(first)
        async for index, result, _ in exchange.results():
            place = index * samples + result.sample_index
            if isinstance(result, Piece):
                yield event(answers.chunk(place, result.text))
            else:
                usage.add(result)
                yield event(answers.last_chunk(place, result))
        if wants_usage:
            yield event(answers.usage_chunk(usage))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield event(error_body(*_told(error)))
    finally:
        exchange.cancel()
