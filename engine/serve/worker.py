"""The loop that owns the scheduler: between two steps it takes what came in, after a step it hands out what was made.

The scheduler is not thread-safe, and where several processes hold one model they must submit and abort the same before
the same step. So each process runs this loop on one thread, rank 0 alone takes commands (from any thread), and tells
them to the others before every step.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from r1.engine.errors import UserError
from r1.engine.scheduler import Request, Scheduler, Update
from r1.parallel.world import World

HEARTBEAT = 10.0  # seconds at most until an idle rank 0 calls again, so that no process's collective times out


@dataclass
class Refusal:
    """A request that the scheduler did not take."""

    request: Hashable
    message: str


class Worker:
    """`deliver` gets what happened, on the loop's thread: updates and refusals, after each step.

    `submit`, `abort` and `stop` may be called from every thread, and from signal handlers.
    """

    def __init__(self, scheduler: Scheduler, world: World) -> None:
        self.scheduler, self.world = scheduler, world
        self.deliver: Callable[[list[Update | Refusal]], None] | None = None
        self.statistics = scheduler.statistics()
        self.stopping = False
        self._commands: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()  # its put may interrupt its get
        self._heartbeat = min(HEARTBEAT, scheduler.trainer.parallel.timeout_seconds / 3)
        self._unfinished: dict[Hashable, int] = {}  # completions, by request
        self._abort_at = math.inf

    def submit(self, request: Request) -> None:
        self._commands.put(("submit", request))

    def abort(self, request: Hashable) -> None:
        self._commands.put(("abort", request))

    def stop(self, seconds: float) -> None:
        """Let `run` return when what was submitted has finished; what has not after so many seconds is aborted."""
        self.stopping = True
        self._commands.put(("stop", seconds))

    def run(self) -> None:
        """Steps until `stop`, on rank 0 and, as it goes, on the others. Raises what a step raises."""
        while True:
            commands = self._told(self._taken() if self.world.is_main else [])
            happened: list[Update | Refusal] = []
            for verb, what in commands:
                if verb == "leave":
                    return
                if verb == "abort":
                    self.scheduler.abort(what)
                    continue
                if not self.world.is_main and what.deadline is not None:
                    what.deadline = math.inf  # a clock of rank 0's machine, which decides
                try:
                    self.scheduler.submit(what)
                    self._unfinished[what.id] = what.copies
                except UserError as error:
                    happened.append(Refusal(what.id, str(error)))
            if not self.scheduler.idle:
                updates = self.scheduler.step()
                self._count(updates)
                happened += updates
                self.statistics = self.scheduler.statistics()
            if self.deliver and happened:
                self.deliver(happened)

    def _taken(self) -> list[tuple[str, Any]]:
        """Commands that came in; where there is nothing to step, waits for one."""
        waiting = self.scheduler.idle and self._abort_at == math.inf
        taken = []
        try:
            if waiting:
                taken.append(self._commands.get(timeout=self._heartbeat if self.world.size > 1 else None))
            while True:
                taken.append(self._commands.get_nowait())
        except queue.Empty:
            pass
        commands = []
        for verb, what in taken:
            if verb == "stop":
                self._abort_at = min(self._abort_at, time.monotonic() + what)
            else:
                commands.append((verb, what))
        if time.monotonic() >= self._abort_at:
            commands += [("abort", request) for request in self._unfinished]
        if self._abort_at < math.inf and self.scheduler.idle and not commands:
            commands.append(("leave", None))
        return commands

    def _told(self, commands: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
        """The same on every process."""
        if self.world.size == 1:
            return commands
        told = [commands]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def _count(self, updates: list[Update]) -> None:
        for update in updates:
            if update.finish_reason is not None:
                self._unfinished[update.request] -= 1
                if not self._unfinished[update.request]:
                    del self._unfinished[update.request]
