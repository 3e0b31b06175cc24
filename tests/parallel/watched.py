"""Worlds of forked processes that go wrong in one way each, for test_watchdog: `python watched.py SCENARIO SIZE LIMIT`.

The launcher imports torch once and forks, holds the store as torchrun's agent does, and prints {"codes": [...]} when
the ranks have ended; a rank that is stopped is killed, as torchrun would.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from r1.parallel import hang, watchdog


def steps(rank: int) -> torch.Tensor:
    tensor = torch.ones(10)
    for _ in range(3):
        dist.all_reduce(tensor)
    return tensor


def stopped(rank: int) -> None:
    tensor = steps(rank)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(tensor)


def stopped_outside_collectives(rank: int) -> None:
    """gloo's point-to-point calls are not recorded: only the heart of rank 1 can give it away."""
    tensor = steps(rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif rank == 0:
        dist.recv(tensor, 1)
    else:
        time.sleep(60)


def computes_alone(rank: int) -> None:
    tensor = steps(rank)
    if rank == 1:
        a_very_long_computation()
    dist.all_reduce(tensor)


def a_very_long_computation() -> None:
    time.sleep(60)


def crossed(rank: int) -> None:
    """Rank 0 waits for rank 1 in a pair's group, rank 1 for all the others in the world, they for nobody."""
    pair = dist.new_group([0, 1], group_desc="TENSOR_MODEL_PARALLEL_GROUP")
    tensor = steps(rank)
    if rank == 0:
        dist.all_reduce(tensor, group=pair)
    elif rank == 1:
        dist.all_reduce(tensor)
    else:
        a_very_long_computation()


def different_calls(rank: int) -> None:
    """Two ranks gather while two sum: the same number of the same group."""
    tensor = steps(rank)
    if rank < 2:
        dist.all_gather([torch.empty(10) for _ in range(4)], tensor)
        a_very_long_computation()
    dist.all_reduce(tensor)


def raises(rank: int) -> None:
    tensor = steps(rank)
    if rank == 1:
        raise ValueError("a broken sample")
    dist.all_reduce(tensor)


def raises_while_others_are_busy(rank: int) -> None:
    """Nobody's collective breaks, as with NCCL: only the watchdogs learn of it."""
    steps(rank)
    if rank == 1:
        raise ValueError("a broken sample")
    a_very_long_computation()


def works(rank: int) -> None:
    steps(rank)


def late(rank: int) -> None:
    tensor = steps(rank)
    time.sleep(4.0 if rank == 1 else 0.0)
    dist.all_reduce(tensor)


def leaves_early(rank: int) -> None:
    """Rank 0 has work left, longer than the limit, when the others have gone."""
    steps(rank)
    if rank != 0:
        watchdog.stop()
        os._exit(0)
    time.sleep(9)


def alone(rank: int) -> None:
    assert watchdog._current is None, "a world of one has nobody to watch"


def run(scenario: str, rank: int, size: int, limit: float) -> None:
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(size)
    hang.record_collectives()
    try:
        store = watchdog.meet(20)
        watchdog.start(store, rank, size, limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=100))
        globals()[scenario](rank)
    except Exception as error:
        watchdog.fail(f"{type(error).__name__}: {error}".splitlines()[0], 1, traceback.format_exc())
    watchdog.stop()
    os._exit(0)


def main(scenario: str, size: int, limit: float) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.port), TORCHELASTIC_USE_AGENT_STORE="True")
    for part in scenario.split("+"):  # one world after another on the same store
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                run(part, rank, size, limit)
            children.append(child)
        codes: dict[int, int] = {}
        while len(codes) < size:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                codes[children.index(child)] = os.waitstatus_to_exitcode(status)
            living = [children[rank] for rank in range(size) if rank not in codes]
            if codes and all(open(f"/proc/{child}/stat").read().split(")")[1].split()[0] == "T" for child in living):
                for child in living:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        print(json.dumps({"codes": [codes[rank] for rank in range(size)]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
