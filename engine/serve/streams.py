"""What becomes of the requests, on the event loop: each step's updates go to the HTTP request that they are of."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.requests import ClientDisconnect

from r1.engine.scheduler import Request, Update
from r1.engine.serve.errors import ApiError
from r1.engine.serve.metrics import Metrics
from r1.engine.serve.worker import Refusal, Worker

RETRY_SECONDS = 1


@dataclass
class Piece:
    """What one completion grew by, of one or several steps."""

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def add(self, update: Update) -> None:
        if update.text:
            self.texts.append(update.text)
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.top_logprobs += update.top_logprobs
        self.finish_reason = update.finish_reason


class Stream:
    """The completions of one HTTP request, numbered from 0. Steps that its reader has not asked for yet are merged, so
    that a slow one costs no more than the completions themselves."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.began = time.monotonic()
        self.choices = sum(request.copies for request in requests)
        firsts = itertools.accumulate((request.copies for request in requests), initial=0)
        self.first_choice = {request.id: first for request, first in zip(requests, firsts)}
        self.unfinished = self.choices
        self.completion_tokens = 0
        self._times: dict[int, tuple[float, int]] = {}  # of a choice: when its first token came, its tokens
        self._pieces: dict[int, Piece] = {}
        self._changed = asyncio.Event()
        self._error: Exception | None = None

    async def next(self) -> dict[int, Piece]:
        """What has come, by completion, since the last call; waits for something. Empty when all are finished."""
        if not self.unfinished and not self._pieces and self._error is None:
            return {}
        await self._changed.wait()
        if self._error is not None:
            raise self._error
        self._changed.clear()
        pieces, self._pieces = self._pieces, {}
        return pieces

    async def whole(self) -> dict[int, Piece]:
        """All completions, when they are finished."""
        while self.unfinished:
            await self._changed.wait()
            if self._error is not None:
                raise self._error
            self._changed.clear()
        return self._pieces

    def fail(self, error: Exception) -> None:
        """Let the reader see this in place of what is to come."""
        self._error = self._error or error
        self._changed.set()

    def add(self, update: Update, metrics: Metrics) -> None:
        choice = self.first_choice[update.request] + update.copy
        now = time.monotonic()
        if update.tokens:
            if not self.completion_tokens:
                metrics.first_token_seconds.observe(now - self.began)
            first, count = self._times.get(choice, (now, 0))
            self._times[choice] = first, count + len(update.tokens)
            self.completion_tokens += len(update.tokens)
        self._pieces.setdefault(choice, Piece()).add(update)
        if update.finish_reason is not None:
            self.unfinished -= 1
            first, count = self._times.get(choice, (now, 0))
            if count > 1:
                metrics.seconds_per_token.observe((now - first) / (count - 1))
        if update.finish_reason == "abort":
            self.fail(stopping())
        self._changed.set()


class Streams:
    """All streams, at most `capacity` unfinished completions. Its methods are the event loop's, but for two."""

    def __init__(self, worker: Worker, capacity: int, metrics: Metrics) -> None:
        self.worker, self.capacity, self.metrics = worker, capacity, metrics
        self.loop: asyncio.AbstractEventLoop | None = None
        self.failure: ApiError | None = None
        self._held = 0  # completions that are unfinished, and requests that are being read
        self._streams: dict[Hashable, Stream] = {}  # by the scheduler's request
        self._numbers = itertools.count()
        worker.deliver = self.deliver

    @contextmanager
    def place(self) -> Iterator[None]:
        """Room for a request while it is read. Raises ApiError where there is none."""
        self._check(1)
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def open(self, requests: list[Request], deadline: float) -> Stream:
        """Submit these, under numbers of ours, to end at `deadline` (time.monotonic()). Raises ApiError where there is
        no room for them."""
        for request in requests:
            request.id, request.deadline = next(self._numbers), deadline
        stream = Stream(requests)
        if stream.choices > self.capacity:
            raise ApiError(400, f"the request asks for {stream.choices} completions, this server holds {self.capacity}")
        self._check(stream.choices)
        self._held += stream.choices
        for request in requests:
            self._streams[request.id] = stream
            self.worker.submit(request)
        return stream

    def close(self, stream: Stream) -> None:
        """Forget a stream; what of it is not finished is aborted."""
        for request in stream.requests:
            if self._streams.pop(request.id, None) is not None and stream.unfinished:
                self.worker.abort(request.id)
        self._held -= stream.choices
        stream.choices = 0

    def leave(self, stream: Stream) -> None:
        """The client has gone: nobody reads this any more."""
        stream.fail(ClientDisconnect())

    def deliver(self, happened: list[Update | Refusal]) -> None:
        """Called on the worker's thread."""
        self._call(lambda: self._deliver(happened))

    def end(self, failure: ApiError) -> None:
        """Called on the worker's thread when it ends: whoever still waits, waits for nothing."""

        def fail() -> None:
            self.failure = failure
            for stream in set(self._streams.values()):
                if stream.unfinished:
                    stream.fail(failure)

        self._call(fail)

    def _call(self, function: Callable[[], None]) -> None:
        assert self.loop is not None
        try:
            self.loop.call_soon_threadsafe(function)
        except RuntimeError:
            pass  # the loop has ended, and with it every reader

    def _deliver(self, happened: list[Update | Refusal]) -> None:
        for event in happened:
            stream = self._streams.get(event.request)
            if stream is None:
                continue  # of a client that has gone
            if isinstance(event, Refusal):
                stream.fail(ApiError(400, event.message))
            else:
                stream.add(event, self.metrics)

    def _check(self, more: int) -> None:
        if self.failure is not None:
            raise self.failure
        if self.worker.stopping:
            raise stopping()
        if self._held + more > self.capacity:
            message = f"the server holds {self._held} completions of at most {self.capacity}; try again later"
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", kind="server_error", code="stopping")
