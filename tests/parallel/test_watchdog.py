"""Worlds that hang or fail, of real processes: who is named, how they end, and what is left alone."""

from __future__ import annotations

import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from r1.parallel import hang, watchdog

SCRIPT = Path(__file__).with_name("watched.py")
HOST = socket.gethostname()


def world(scenario: str, size: int = 4, limit: float = 5.0) -> tuple[list[list[int]], str, float]:
    """(exit codes by rank of each world, what was written to stderr, seconds)."""
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(SCRIPT), scenario, str(size), str(limit)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    codes = [json.loads(line)["codes"] for line in result.stdout.splitlines()]
    print(result.stderr)
    return codes, result.stderr, time.monotonic() - began


def test_a_stopped_rank_is_named_with_its_collective_and_the_next_world_meets_on_the_same_store() -> None:
    codes, told, _ = world("stopped+works", limit=10.0)
    assert codes == [[75, 75, -9, 75], [0, 0, 0, 0]]
    report = [line for line in told.splitlines() if "gloo:all_reduce" in line]
    assert len(report) == 1, "one report, not one a rank"
    assert "number 4 of the default pg group (ranks 0-3; [10])" in report[0]
    assert "waiting there: 0-1, 3; not there: 2;" in report[0]
    waited = int(re.search(r"gives no heartbeat for (\d+) s", told)[1])
    assert f"rank 2 (host {HOST}, process " in told and 5 <= waited <= 10, "told within the limit"
    assert "Traceback" not in told


def test_a_rank_stopped_outside_collectives_is_known_by_its_heart() -> None:
    codes, told, _ = world("stopped_outside_collectives", size=3)
    assert codes == [[75, -9, 75]]
    assert "rank 1 (host" in told and "gives no heartbeat for" in told


def test_a_living_rank_that_never_comes_shows_its_stack() -> None:
    codes, told, seconds = world("computes_alone")
    assert codes == [[75] * 4] and seconds < 40
    assert "waiting there: 0, 2-3; not there: 1;" in told
    assert f"rank 1 (host {HOST}, process " in told and "is alive and in no collective; it is in" in told
    assert "in a_very_long_computation" in told


def test_the_root_of_a_chain_comes_first() -> None:
    codes, told, _ = world("crossed")
    assert codes == [[75] * 4]
    stuck = [line for line in told.splitlines() if "stuck in" in line]
    assert "default pg" in stuck[0] and "waiting there: 1; not there: 0, 2-3" in stuck[0]
    assert "tensor model parallel group (ranks 0-1;" in stuck[1] and "waiting there: 0; not there: 1" in stuck[1]
    assert "waiting in another collective: 0" in told and "rank 2 (host" in told and "rank 1 (host" not in told


def test_different_calls_in_one_place_are_told_apart() -> None:
    codes, told, _ = world("different_calls")
    if "stuck in" in told:  # gloo may also notice by itself
        assert "the ranks do not call the same there" in told
    assert 0 not in codes[0]


@pytest.mark.parametrize("scenario", ["raises", "raises_while_others_are_busy"])
def test_the_first_error_is_told_once_and_ends_all(scenario: str) -> None:
    codes, told, seconds = world(scenario)
    assert codes == [[1] * 4] and seconds < 30
    assert told.count("ValueError: a broken sample") == 2, "its traceback, and one line for the host's other ranks"
    assert told.count("Traceback") == 1 and f"[rank 1 {HOST}] Traceback" in told
    assert f"stopped because rank 1 ({HOST}) failed: ValueError: a broken sample" in told


@pytest.mark.parametrize(("scenario", "limit"), [("late", 10.0), ("leaves_early", 5.0)])
def test_a_late_rank_and_one_that_has_left_are_let_be(scenario: str, limit: float) -> None:
    codes, told, _ = world(scenario, limit=limit)
    assert codes == [[0] * 4]
    assert "r1:" not in told


def test_a_world_of_one_is_not_watched() -> None:
    codes, told, _ = world("alone", size=1)
    assert codes == [[0]]


def test_a_tick_is_cheap(pools) -> None:
    """Processor time of what the thread does every few seconds, with the recorder's buffer full; 0.06 ms when idle."""
    assert max(pools[2].run(_seconds_of_a_tick)) < 2e-3


def _seconds_of_a_tick() -> float:
    from r1.parallel.config import ParallelConfig
    from r1.parallel.world import join

    join(ParallelConfig())
    tensor = torch.ones(10)
    for _ in range(2100):
        dist.all_reduce(tensor)
    seconds = []
    for _ in range(50):
        began = time.thread_time()
        watchdog._current._beat()
        assert watchdog._current.alarm() is None and watchdog._current._suspicion() is None
        seconds.append(time.thread_time() - began)
    return statistics.median(seconds)


def place(number: int, kind: str = "nccl:all_reduce", point_to_point: bool = False, ranks: int = 4) -> dict:
    return {
        "group": "7",
        "description": "pipeline model parallel",
        "ranks": list(range(ranks)),
        "kind": kind,
        "sizes": [[10]],
        "point_to_point": point_to_point,
        "number": number,
        "since": time.time() - 5,
    }


def state(reached: int, stands: dict | None = None) -> dict:
    return {"host": "a", "pid": 1, "stands": stands, "reached": {"7": reached}, "stack": ["x.py:3 in reads_a_file"]}


def test_a_rank_that_has_been_through_the_collective_is_not_missing() -> None:
    """The root of a broadcast ends before its receivers."""
    text = hang.report({0: state(5), 1: state(5, place(5)), 2: state(4), 3: state(5, place(5))}, {}, 5)
    assert "waiting there: 1, 3; not there: 2;" in text
    assert "rank 2 (host a" in text and "rank 0 (host a" not in text


def test_a_hang_without_a_missing_rank_points_at_the_network() -> None:
    text = hang.report({rank: state(5, place(5)) for rank in range(4)}, {}, 5)
    assert "not there: none" in text and "no rank is missing: the network or a device hangs" in text


def test_a_point_to_point_call_waits_for_the_ranks_that_are_in_none() -> None:
    states = {0: state(0, place(3, "nccl:recv 0<-1", True)), 1: state(0), 2: state(0, place(9, "nccl:send 2->3", True))}
    text = hang.report(states, {3: "(host b, process 2) gives no heartbeat for 9 s"}, 5)
    assert "stuck in nccl:recv 0<-1 number 3" in text and "rank 1 (host a" in text and "rank 3 (host b" in text


def test_the_report_of_a_thousand_ranks_is_short() -> None:
    states = {rank: state(4 + rank % 2, place(5, ranks=1024) if rank % 2 else None) for rank in range(1024)}
    text = hang.report(states, {}, 600)
    assert len(text.splitlines()) < 30 and len(text) < 2000 and "30, … (512 in all);" in text
    assert "and 504 more of the ranks 0, 2, 4" in text


def test_ranges_are_short() -> None:
    assert hang.ranges([7, 0, 1, 2, 3]) == "0-3, 7"
    assert hang.ranges([]) == ""
    assert hang.ranges({1023: None}) == "1023"
