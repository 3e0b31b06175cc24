"""A run killed anywhere and started again by the same command ends with the same weights, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from r1.engine.settings import PIPELINE

MICRO = Path(__file__).with_name("micro.toml")
TRAINED = [stage for stage in PIPELINE if stage != "rejection_sampling"]


def command(run_dir: Path, processes: int) -> list[str]:
    arguments = ["pipeline", "--config", str(MICRO), "--set", f"run_dir={run_dir}"]
    if processes == 1:
        return [sys.executable, "-m", "r1.engine", *arguments]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    return [sys.executable, *launcher, "-m", "r1.engine", *arguments]


def start(run_dir: Path, processes: int) -> subprocess.Popen:
    log = (run_dir.parent / f"{run_dir.name}.log").open("a")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command(run_dir, processes), stdout=log, stderr=subprocess.STDOUT, env=environment)


def kill(process: subprocess.Popen) -> None:
    """Kill the launcher and its workers, which torchrun starts in sessions of their own, at one moment."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.suspend()
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, optimiser and reference model included."""
    loaded = _load_state_dict_from_keys(storage_reader=FileSystemReader(str(folder / "shards")))
    tensors: dict[str, torch.Tensor] = {}

    def collect(prefix: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            tensors[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                collect(f"{prefix}.{key}", inner)
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                collect(f"{prefix}.{index}", inner)

    collect("", loaded)
    return tensors


def run_to_the_end(run_dir: Path, processes: int) -> None:
    process = start(run_dir, processes)
    assert process.wait(timeout=600) == 0, (run_dir.parent / f"{run_dir.name}.log").read_text()[-4000:]


def kill_in_every_stage(run_dir: Path, processes: int, generator: random.Random) -> int:
    """Kill the run once in each stage, a random moment after the stage has begun; returns how often it was killed."""
    log = run_dir.parent / f"{run_dir.name}.log"
    kills = 0
    for stage in PIPELINE:
        written = log.stat().st_size if log.exists() else 0
        process = start(run_dir, processes)
        deadline = time.monotonic() + 300
        while f"] {stage} (" not in log.read_text()[written:]:
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, f"{stage} did not begin"
            time.sleep(0.02)
        try:
            process.wait(timeout=generator.uniform(0.0, 2.5))
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
    return kills


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_run_ends_the_same(tmp_path: Path, processes: int) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    run_to_the_end(tmp_path / "whole", processes)
    kills = kill_in_every_stage(tmp_path / "killed", processes, random.Random(seed))
    run_to_the_end(tmp_path / "killed", processes)
    assert kills >= len(PIPELINE) - 1
    for stage in TRAINED:
        ours = weights(tmp_path / "killed" / stage / "checkpoint")
        theirs = weights(tmp_path / "whole" / stage / "checkpoint")
        assert ours.keys() == theirs.keys() and ours, stage
        different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not different, f"{stage}: {different[:5]}"
    sets = [(tmp_path / run / "rejection_sampling" / "data.jsonl").read_text() for run in ("whole", "killed")]
    assert sets[0] == sets[1]
