"""The HTTP side: routes, the key, bodies, answers whole or in events, and the clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from r1.engine.serve.answers import Answer, ChatAnswer, CompletionAnswer
from r1.engine.serve.errors import ApiError
from r1.engine.serve.metrics import Metrics
from r1.engine.serve.protocol import Call, Reader
from r1.engine.serve.streams import Piece, Stream, Streams, stopping

MOST_BYTES = 8 * 2**20  # of a body; what is more is read on and thrown away, up to 8 times as much
READERS = 2  # threads that parse bodies, divide texts into tokens and write long answers
MOST_AT_ONCE = 256  # tokens of an answer that are written on the event loop
SEND_SECONDS = 5.0  # what a client that does not read has after its request's time limit
CLIENT_LEFT = 499  # as nginx names it; no one reads this status but the log and the metrics


class Api:
    """The application. `request_seconds` is the time limit of a request, from its first byte on."""

    def __init__(
        self, streams: Streams, reader: Reader, metrics: Metrics, *, api_key: str | None, request_seconds: float
    ) -> None:
        self.streams, self.reader, self.metrics = streams, reader, metrics
        self.request_seconds = request_seconds
        self.created = int(time.time())
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/v1/models/{model}", self.model),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
            ],
            middleware=[Middleware(Gate, metrics=metrics, api_key=api_key)],
            exception_handlers={
                ApiError: _api_error,
                HTTPException: _http_error,
                ClientDisconnect: _client_left,
                Exception: _own_error,
            },
        )

    async def completions(self, request: Request) -> Response:
        return await self._create(request, self.reader.completion, CompletionAnswer)

    async def chat(self, request: Request) -> Response:
        return await self._create(request, self.reader.chat, ChatAnswer)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["model"] != self.reader.name:
            raise ApiError(404, f"this server has the model {self.reader.name!r} alone", code="model_not_found")
        return JSONResponse(self._model())

    async def health(self, request: Request) -> Response:
        if self.streams.failure is not None:
            raise self.streams.failure
        if self.streams.worker.stopping:
            raise stopping()
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _model(self) -> dict[str, Any]:
        return {"id": self.reader.name, "object": "model", "created": self.created, "owned_by": "r1"}

    async def _create(self, request: Request, read: Callable[[bytes], Call], kind: type[Answer]) -> Response:
        limit = time.monotonic() + self.request_seconds
        with self.streams.place():
            try:
                async with asyncio.timeout(self.request_seconds):
                    body = await _body(request)
                    call = await asyncio.get_running_loop().run_in_executor(self.readers, read, body)
            except TimeoutError:
                message = f"the request was not read within {self.request_seconds:g} seconds"
                raise ApiError(408, message, code="timeout") from None
        stream = self.streams.open(call.requests, limit)
        self.metrics.prompt_tokens.inc(call.prompt_tokens)
        return Generation(self, stream, kind(call, self.reader.name, self.reader.tokenizer), limit)


class Generation(Response):
    """The answer to a request that has been submitted: it waits for the completions, and aborts them if the client
    leaves."""

    def __init__(self, api: Api, stream: Stream, answer: Answer, limit: float) -> None:
        super().__init__()
        self.api, self.stream, self.answer, self.limit = api, stream, answer, limit
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        try:
            async with asyncio.timeout(max(0.0, self.limit - time.monotonic()) + SEND_SECONDS):
                if self.answer.call.stream:
                    await self._stream(send)
                else:
                    pieces = await self.stream.whole()
                    self._check_time(pieces)
                    body = await self._rendered(lambda all_: _json(self.answer.whole(all_)).encode(), pieces)
                    await Response(body, media_type="application/json")(scope, receive, send)
        except TimeoutError:  # of a client that does not read
            if not self._begun:
                raise self._too_late() from None
        finally:
            watch.cancel()
            self.api.streams.close(self.stream)
            self.api.metrics.completion_tokens.inc(self.stream.completion_tokens)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.stream.fail(ClientDisconnect())

    async def _stream(self, send: Send) -> None:
        pieces = await self.stream.next()  # before the status is sent: what fails until now has one of its own
        self._check_time(pieces)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        self._begun = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while pieces:
                await _send(send, await self._rendered(lambda some: _events(self.answer.chunks(some)), pieces))
                pieces = await self.stream.next()
        except ApiError as error:
            await _send(send, _events([error.body]))
        except ClientDisconnect:
            return
        else:
            if self.answer.call.include_usage:
                await _send(send, _events([self.answer.last_chunk()]))
            await _send(send, b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _rendered(self, render: Callable[[dict[int, Piece]], bytes], pieces: dict[int, Piece]) -> bytes:
        """What `render` makes of the pieces; of large ones in another thread, so that nobody waits for it."""
        if sum(len(piece.tokens) for piece in pieces.values()) <= MOST_AT_ONCE:
            return render(pieces)
        return await asyncio.get_running_loop().run_in_executor(self.api.readers, render, pieces)

    def _check_time(self, pieces: dict[int, Piece]) -> None:
        if all(piece.finish_reason == "deadline" and not piece.tokens for piece in pieces.values()):
            raise self._too_late()

    def _too_late(self) -> ApiError:
        message = f"no token was made within the time limit of {self.api.request_seconds:g} seconds"
        return ApiError(504, message, kind="server_error", code="timeout")


class Gate:
    """Asks for the key under /v1, and counts what passes."""

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None) -> None:
        self.app, self.metrics = app, metrics
        self.wanted = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.monotonic()
        status = CLIENT_LEFT

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._admits(scope):
                await self.app(scope, receive, count)
            else:
                message = "the API key is missing or wrong; wanted the header Authorization: Bearer KEY"
                error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await _api_error(Request(scope), error)(scope, receive, count)
        except Exception:
            status = 500
            raise
        finally:
            endpoint = scope.get("endpoint")
            route = getattr(endpoint, "__name__", "none")
            self.metrics.requests.labels(route, str(status)).inc()
            self.metrics.request_seconds.labels(route).observe(time.monotonic() - began)

    def _admits(self, scope: Scope) -> bool:
        if self.wanted is None or not scope["path"].startswith("/v1"):
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self.wanted)  # takes as long for a near miss as for a far one


async def _body(request: Request) -> bytes:
    """The body. It is measured as it comes; one that is too long is read on, so that its sender sees the answer."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= MOST_BYTES:
            parts.append(part)
        else:
            parts.clear()
            if size > 8 * MOST_BYTES:
                break
    if size > MOST_BYTES:
        raise ApiError(413, f"the body has more than {MOST_BYTES} bytes", code="body_too_large")
    return b"".join(parts)


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _events(values: list[dict[str, Any]]) -> bytes:
    return "".join(f"data: {_json(value)}\n\n" for value in values).encode()


async def _send(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: no such route, another method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_LEFT)


def _own_error(request: Request, error: Exception) -> Response:
    message = "the server made a mistake; its log says more"
    return JSONResponse(ApiError(500, message, kind="server_error").body, 500)
