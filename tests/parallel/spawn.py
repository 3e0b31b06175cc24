"""Worlds of gloo processes that stay up between tests: starting one costs seconds of imports, using it does not.

`run` calls a module-level function on every process and returns the list of results. Everything has a time limit; a
world in which a process died, or waits for one that failed, is killed by its process ids and started again when next
asked for.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

PATIENCE_AFTER_FAILURE = 10.0


class ProcessPool:
    """`size` processes, each with one thread, that `r1.parallel.world.join` can lay out as it likes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 180.0) -> list[Any]:
        """[function(*args) on rank 0, on rank 1, …]; RuntimeError with the traceback where one of them failed."""
        self.send(function, *args)
        results, errors = {}, {}
        deadline = time.monotonic() + timeout
        waiting = dict(zip(self.pipes, range(self.size), strict=True))
        while waiting:
            for pipe in wait(list(waiting), max(0.0, deadline - time.monotonic())):
                rank = waiting.pop(pipe)
                try:
                    good, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    good, value = False, "the process ended"
                (results if good else errors)[rank] = value
                if not good:
                    deadline = min(deadline, time.monotonic() + PATIENCE_AFTER_FAILURE)
            if waiting and time.monotonic() >= deadline:
                break
        if waiting or "the process ended" in errors.values():
            self.kill()
        if errors or waiting:
            last = [text.splitlines()[-1] for _, text in sorted(errors.items())]
            texts = list(errors.values())[:1] + [f"rank {r}: {t}" for r, t in zip(sorted(errors), last, strict=True)]
            texts += [f"rank {rank}: no answer in time" for rank in sorted(waiting.values())]
            raise RuntimeError("\n".join(texts))
        return [results[rank] for rank in range(self.size)]

    def send(self, function: Callable[..., Any], *args: Any) -> None:
        """Let every process begin function(*args)."""
        if not self.processes:
            self._start()
        message = pickle.dumps((function, args))
        for pipe in self.pipes:
            pipe.send_bytes(message)

    def kill(self) -> None:
        """End every process, by its id."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.processes, self.pipes = [], []

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for rank in range(self.size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, rank, self.size, port))
                process.start()
                theirs.close()
                self.processes.append(process)
                self.pipes.append(ours)
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before


def _serve(pipe: Connection, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)  # the tests are over; nobody is left to shake hands with
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))
