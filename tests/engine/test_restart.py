"""Under torchrun: a rank that stops costs a restart and no accuracy; bad input is told once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from r1.engine import cli
from tests.engine.test_resume import MICRO, weights

LIMIT = 20  # seconds within which a hang is named, far above a step's


def launch(run_dir: Path, *settings: str, restarts: int = 0, stage: str = "pretrain") -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", str(restarts)]
    command = ["-m", "r1.engine", "run", stage, "--config", str(MICRO), "--set", f"run_dir={run_dir}"]
    command += [argument for setting in settings for argument in ("--set", setting)]
    log = run_dir.with_suffix(".log").open("w")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, *command], stdout=log, stderr=subprocess.STDOUT, text=True, env=environment
    )


@pytest.mark.slow
def test_a_stopped_rank_costs_a_restart_and_nothing_else(tmp_path: Path) -> None:
    settings = (f"parallel.timeout_seconds={LIMIT}", "parallel.expert=2")
    assert launch(tmp_path / "whole", *settings).wait(timeout=200) == 0, (tmp_path / "whole.log").read_text()

    process = launch(tmp_path / "stopped", *settings, restarts=1)
    deadline = time.monotonic() + 100
    while not (tmp_path / "stopped" / "pretrain" / "checkpoint" / "manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "stopped.log").read_text()
        time.sleep(0.02)
    workers = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "2"]
    assert len(workers) == 1
    workers[0].send_signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    log = tmp_path / "stopped.log"
    while "r1: stuck in" not in log.read_text():
        assert process.poll() is None and time.monotonic() < stopped_at + LIMIT, log.read_text()
        time.sleep(0.1)
    assert time.monotonic() - stopped_at < LIMIT, "named within the limit"
    assert process.wait(timeout=200) == 0, log.read_text()

    told = log.read_text()
    print(told)
    assert told.count("r1: stuck in gloo:") == 1 and "not there: 2" in told, "one report, whatever else waits in turn"
    assert f"process {workers[0].pid}) gives no heartbeat" in told
    assert "pretrain: goes on after" in told
    ours, theirs = (weights(tmp_path / run / "pretrain" / "checkpoint") for run in ("stopped", "whole"))
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(folder: Path) -> int:
        return cli.main(["run", "pretrain", "--config", str(MICRO), "--set", f"run_dir={folder}"])

    assert run(tmp_path / "whole") == 0
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "stop").touch()
    capsys.readouterr()
    assert run(tmp_path / "asked") == 0
    assert "r1: pretrain: stopped after 1 steps, as " in capsys.readouterr().err
    assert not (tmp_path / "asked" / "stop").exists()
    assert not (tmp_path / "asked" / "pretrain" / "complete.json").exists()
    assert run(tmp_path / "asked") == 0
    assert "pretrain: goes on after 1 steps" in capsys.readouterr().err
    ours, theirs = (weights(tmp_path / folder / "pretrain" / "checkpoint") for folder in ("asked", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_bad_input_is_one_sentence_of_one_rank(tmp_path: Path) -> None:
    """Before the ranks have met (a setting), and after (a checkpoint)."""
    for name, setting, words in (
        ("setting", "parallel.expert=3", "parallel.expert"),
        ("checkpoint", f"stages.pretrain.from={tmp_path}", "no state.json"),
    ):
        process = launch(tmp_path / name, setting)
        assert process.wait(timeout=100) == 1  # torchrun's
        told = (tmp_path / f"{name}.log").read_text()
        print(told)
        before_torchrun_speaks = told.split("torch/distributed/elastic")[0]
        sentences = [line for line in before_torchrun_speaks.splitlines() if "r1: " in line]
        assert len(sentences) == 1 and words in sentences[0], told
        assert "exitcode  : 2" in told
