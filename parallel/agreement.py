"""What one process finds, all must know: the others would wait for it in the next collective."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from r1.parallel.folders import CheckpointError
from r1.parallel.world import World

ROUND_SECONDS = 20.0


def agree(problem: str | None) -> None:
    """CheckpointError on every process for what the first of them found. Collective."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found:
            raise CheckpointError(found)


class Told:
    """`with` it: keeps the first thing that goes wrong inside, for the others to be told before anyone raises. What is
    not a CheckpointError is put into words by `words`."""

    def __init__(self, words: Callable[[Exception], str]) -> None:
        self.problem: str | None = None
        self._words = words

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception) and self.problem is None:
            self.problem = str(error) if isinstance(error, CheckpointError) else self._words(error)
            if not isinstance(error, (CheckpointError, OSError)):  # a mistake of ours, which a sentence would hide
                traceback.print_exception(error)
        return isinstance(error, Exception)


class Rounds:
    """Work on files that takes some processes minutes longer than others: in rounds, since a process that waits in a
    collective for long is taken for hung. `beat` often; `agree` at the end."""

    def __init__(self, world: World) -> None:
        self._device, self._last = world.device, time.monotonic()

    def beat(self) -> None:
        if time.monotonic() - self._last > ROUND_SECONDS:
            self._round(ready=False)

    def agree(self, problem: str | None) -> None:
        while not self._round(ready=True):
            pass
        agree(problem)

    def _round(self, ready: bool) -> bool:
        everyone = torch.tensor(int(ready), device=self._device)
        dist.all_reduce(everyone, dist.ReduceOp.MIN)
        self._last = time.monotonic()
        return bool(everyone)
