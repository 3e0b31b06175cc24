"""How fast and how right the ranks of a world speak to each other: measurements for `r1 doctor`. All are collective.

Rates are in bytes a second of one rank; times in seconds. Each is the best of a few repetitions after one to warm up.
"""

from __future__ import annotations

import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

REPETITIONS = 5


def best_seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The least time that `work` takes, its kernels on the device included."""
    times = []
    for _ in range(1 + REPETITIONS):
        _synchronize(device)
        began = time.perf_counter()
        work()
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def subgroups(parts: list[list[int]]) -> Any:
    """The group of this rank's part, or None where the part has one rank only. Parts of one size, made by all."""
    mine = None
    for ranks in parts:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks and len(ranks) > 1:
            mine = group
    return mine


def parts_of_hosts() -> tuple[list[list[int]], list[list[int]]]:
    """(the ranks of each host, the ranks that are the i-th of their host for each i)."""
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank, host in enumerate(gather(socket.gethostname())):
        by_host[host].append(rank)
    hosts = list(by_host.values())
    longest = max(map(len, hosts))
    return hosts, [[ranks[i] for ranks in hosts if i < len(ranks)] for i in range(longest)]


def all_reduce(group: Any, device: torch.device, nbytes: int) -> tuple[bool, float]:
    """(whether the sum is right everywhere, bus bandwidth as nccl-tests counts it: 2 (n - 1) / n of the bytes)."""
    size = dist.get_world_size(group)
    rank = dist.get_rank(group)
    # Small whole numbers, another in every place: a float32 sum of them is exact.
    pattern = (torch.arange(nbytes // 4, device=device) % 64).float()
    tensor = pattern + rank
    dist.all_reduce(tensor, group=group)
    right = bool(torch.equal(tensor, pattern * size + size * (size - 1) // 2))
    seconds = best_seconds(lambda: dist.all_reduce(tensor, group=group), device)
    return right, 2 * (size - 1) / size * nbytes / seconds


def all_to_all(device: torch.device, nbytes: int) -> tuple[bool, float]:
    """(whether everyone got what was sent, bytes a second that leave a rank)."""
    size, rank = dist.get_world_size(), dist.get_rank()
    count = max(1, nbytes // 4 // size)
    send = (torch.arange(size, device=device).repeat_interleave(count) + rank * size).float()
    receive = torch.empty_like(send)
    dist.all_to_all_single(receive, send)
    expected = (torch.arange(size, device=device).repeat_interleave(count) * size + rank).float()
    right = bool(torch.equal(receive, expected))
    seconds = best_seconds(lambda: dist.all_to_all_single(receive, send), device)
    return right, (size - 1) * count * 4 / seconds


def to_neighbour(distance: int, device: torch.device, nbytes: int) -> tuple[bool, float]:
    """(whether it came whole, bytes a second): each rank sends to the one `distance` on, and receives at once."""
    size, rank = dist.get_world_size(), dist.get_rank()
    send = torch.full((nbytes // 4,), float(rank), device=device)
    receive = torch.empty_like(send)
    before, after = (rank - distance) % size, (rank + distance) % size

    def exchange() -> None:
        operations = [dist.P2POp(dist.isend, send, after), dist.P2POp(dist.irecv, receive, before)]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    exchange()
    right = bool((receive == before).all())
    return right, nbytes / best_seconds(exchange, device)


def gemm_seconds(device: torch.device, size: int) -> float:
    """One square product, bfloat16 on a GPU."""
    a = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    return best_seconds(lambda: a @ a, device)


def clock_spread() -> float:
    """How far the hosts' clocks lie apart; an upper bound, since no barrier lets go of all at one moment."""
    spreads = []
    for _ in range(REPETITIONS):
        dist.barrier()
        times = gather(time.time())
        spreads.append(max(times) - min(times))
    return min(spreads)


def blind_ranks(folder: Path) -> list[int]:
    """The ranks that do not see what rank 0 has written into `folder`; all where it could not write."""
    path = folder / f".r1-doctor-{os.getpid()}"
    token = [(path.name, os.urandom(8).hex())]
    if dist.get_rank() == 0:
        try:
            path.write_text(token[0][1])
        except OSError:
            token = [(path.name, "")]
    dist.broadcast_object_list(token)
    name, text = token[0]
    deadline = time.monotonic() + 5  # network file systems keep what they knew of a folder for some seconds
    seen = False
    while text and not seen and time.monotonic() < deadline:
        seen = (folder / name).is_file() and (folder / name).read_text() == text
        time.sleep(0.0 if seen else 0.2)
    answers = gather(seen)
    if dist.get_rank() == 0:
        path.unlink(missing_ok=True)
    return [rank for rank, saw in enumerate(answers) if not saw]
