"""The server's life: bind, load, serve, and leave when a signal says so."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from r1.engine.errors import UserError
from r1.engine.generate import find_checkpoint, find_tokenizer, open_checkpoint
from r1.engine.logs import is_main_process, say
from r1.engine.scheduler import Scheduler
from r1.engine.serve.app import Api
from r1.engine.serve.chat import ChatTemplate
from r1.engine.serve.errors import ApiError
from r1.engine.serve.metrics import Metrics
from r1.engine.serve.protocol import Reader
from r1.engine.serve.streams import Streams, stopping
from r1.engine.serve.worker import Worker

BACKLOG = 2048  # connections that wait to be accepted
CLOSE_SECONDS = 5  # what connections have to take the rest of their answers, when all is generated
UNREAD_SECONDS = 60  # after which the kernel drops a connection whose peer takes nothing


def serve(
    checkpoint: str | Path,
    *,
    host: str,
    port: int,
    api_key: str | None,
    max_waiting: int,
    max_sequences: int,
    cache_tokens: int | None,
    request_timeout: float,
    stop_timeout: float,
    speculate: bool,
    settings: Sequence[str] = (),
) -> None:
    """Serve a checkpoint until SIGTERM or SIGINT; then what runs has `stop_timeout` seconds to finish.

    Completions beyond `max_sequences` wait, beyond `max_waiting` more they are refused. `request_timeout`, in seconds,
    is that of one HTTP request; `settings` are of the table `parallel`. Every process of a tensor- or pipeline-parallel
    world calls it; rank 0 listens. Raises UserError where the checkpoint, the address, the key or the layout will not
    do.
    """
    api_key = os.environ.get("R1_API_KEY") or None if api_key is None else api_key
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise UserError("--api-key (or R1_API_KEY) is empty or has characters that a header cannot carry")
    if not 0 <= port < 2**16:
        raise UserError(f"--port = {port} must be in 0..65535")
    for name, value, least in (
        ("--max-sequences", max_sequences, 1),
        ("--max-waiting", max_waiting, 0),
        ("--request-timeout", request_timeout, 0.001),
        ("--stop-timeout", stop_timeout, 0),
    ):
        if not least <= value < float("inf"):
            raise UserError(f"{name} = {value} must be at least {least}")
    folder = find_checkpoint(checkpoint)
    listener = bound(host, port) if is_main_process() else None  # before the minutes that loading may take
    engine, tokenizer = open_checkpoint(folder, settings=settings)
    replicas = engine.world.groups.dp_cp.size()
    if replicas > 1:
        raise UserError(
            f"{replicas} replicas of the model would have to share one address: start one server a replica,"
            " each on its own port, with parallel.tensor x pipeline = its processes"
        )
    scheduler = Scheduler(
        engine.policy,
        engine.vocab_size,
        max_sequences=max_sequences,
        cache_tokens=cache_tokens,
        speculate=speculate,
        tokenizer=tokenizer,
    )
    worker = Worker(scheduler, engine.world)
    with _signals(worker, stop_timeout):
        if listener is None:
            return worker.run()
        template = ChatTemplate(tokenizer, find_tokenizer(folder))
        room = int(worker.statistics["pages_total"] * worker.statistics["page_tokens"])
        max_length = min(engine.model_config.max_positions, room)
        reader = Reader(model_name(folder), tokenizer, template, max_length, engine.vocab_size)
        run(worker, reader, listener, max_waiting=max_waiting, api_key=api_key, request_timeout=request_timeout)


def run(
    worker: Worker,
    reader: Reader,
    listener: socket.socket,
    *,
    max_waiting: int,
    api_key: str | None,
    request_timeout: float,
) -> None:
    """Serve on this socket until the worker ends, and then end. Raises what ended it, if that was an error."""
    metrics = Metrics(lambda: worker.statistics)
    streams = Streams(worker, worker.scheduler.max_sequences + max_waiting, metrics)
    front = Front(Api(streams, reader, metrics, api_key=api_key, request_seconds=request_timeout), listener)
    listener.listen(BACKLOG)
    front.start()
    address = "[{}]:{}" if listener.family == socket.AF_INET6 else "{}:{}"
    where = address.format(*listener.getsockname()[:2])
    say(f"serving {reader.name} at http://{where}/v1, {'with' if api_key else 'without'} an API key")
    failure = ApiError(500, "the engine has failed and the server is ending", kind="server_error", code="engine_failed")
    try:
        worker.run()
        failure = stopping()
    finally:
        streams.end(failure)
        front.finish()
    if front.error is not None:
        raise front.error


def model_name(folder: Path) -> str:
    """What clients call the model: the stage's name, or the folder's."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "checkpoint" else folder.name


class Front(threading.Thread):
    """uvicorn and its event loop, in a thread of their own: the main one is the worker's, as the model was made there
    and PyTorch keeps a good deal by thread."""

    def __init__(self, api: Api, listener: socket.socket) -> None:
        super().__init__(name="http", daemon=True)
        self.api, self.listener = api, listener
        config = uvicorn.Config(
            api.app,
            backlog=BACKLOG,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=CLOSE_SECONDS,
            server_header=False,
        )
        self.server = uvicorn.Server(config)
        self.error: Exception | None = None
        self._ready = threading.Event()

    def start(self) -> None:
        super().start()
        self._ready.wait()

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self.error = error
        finally:
            self._ready.set()
            self.api.streams.worker.stop(0)  # where it ended by itself: nobody can be answered any more

    async def _serve(self) -> None:
        self.api.streams.loop = asyncio.get_running_loop()
        self._ready.set()
        await self.server.serve(sockets=[self.listener])

    def finish(self) -> None:
        """Close the address and the connections."""
        self.server.should_exit = True
        self.join(CLOSE_SECONDS + 5)


def bound(host: str, port: int) -> socket.socket:
    """A socket on this address; it takes connections from the moment the server starts. Port 0 is any that is free."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_SECONDS * 1000)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host} port {port}: {error}") from None
    return listener


@contextmanager
def _signals(worker: Worker, stop_timeout: float) -> Iterator[None]:
    """SIGTERM and SIGINT stop rank 0's worker, a second one at once; the other ranks go when it says so."""

    def stop(*_: object) -> None:
        worker.stop(0 if worker.stopping else stop_timeout)

    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main one handle signals
        return
    handler = stop if worker.world.is_main else signal.SIG_IGN
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
