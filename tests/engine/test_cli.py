"""The command line as a person uses it: exit codes, one sentence for bad input, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from r1.engine import cli
from r1.engine.config import PIPELINE, STAGES, Config, load_config
from r1.engine.errors import UserError
from r1.engine.logs import write_json


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "r1.engine", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def replace_stage(monkeypatch: pytest.MonkeyPatch, name: str, run: object) -> None:
    module = types.ModuleType(f"r1.engine.stages.{name}")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_config_prints_what_is_in_force() -> None:
    result = command("config", "--config", "tiny", "--set", "seed=5", "--set", "parallel.expert=2")
    assert result.returncode == 0 and result.stderr == ""
    printed = tomllib.loads(result.stdout)
    assert printed["seed"] == 5 and printed["parallel"]["expert"] == 2
    assert set(printed["stages"]) == set(STAGES)


@pytest.mark.parametrize(
    "arguments",
    [
        ("config", "--config", "tinny"),
        ("config", "--set", "stages.r1_zero.stepz=3"),
        ("config", "--config", "{tmp}/bad.toml"),
        ("run", "r1_zero", "--set", "parallel.expert=3"),
        ("report", "{tmp}/absent"),
        ("generate", "{tmp}/absent", "hello"),
        ("generate", "{tmp}", "hello"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("seed = \n")
    result = command(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert result.returncode == 2
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1 and result.stderr.startswith("r1: ")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.toml"]


def test_unknown_stage_and_command_exit_with_2() -> None:
    for arguments in (("run", "r1_hero"), ("fly",), ()):
        result = command(*arguments)
        assert result.returncode == 2 and "Traceback" not in result.stderr


def test_report_command_writes_both_files(tmp_path: Path) -> None:
    write_json(tmp_path / "reward_model" / "evaluation.json", {"heldout_accuracy": 0.75})
    assert cli.main(["report", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["reward_model"] == {"heldout_accuracy": 0.75}
    assert (tmp_path / "report.html").stat().st_size > 500


def test_pipeline_runs_every_stage_in_order_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def stage(name: str):
        def run(config: Config) -> None:
            ran.append(name)
            write_json(config.stage_dir(name) / "timing.json", {"seconds": 1.0})

        return run

    for name in STAGES:
        replace_stage(monkeypatch, name, stage(name))
    assert cli.main(["pipeline", "--config", "tiny", "--set", f"run_dir={tmp_path}/run"]) == 0
    assert ran == list(PIPELINE)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["seconds"] == len(PIPELINE)
    assert f"report: {tmp_path}/run/report.html" in capsys.readouterr().err
    kept = load_config(str(tmp_path / "run" / "r1_zero" / "config.toml"))
    assert kept == load_config("tiny", [f"run_dir={tmp_path}/run"])


def test_evaluate_takes_the_checkpoint_as_the_stage_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def run(config: Config) -> None:
        seen.append(config.stages.evaluate.from_)
        write_json(config.stage_dir("evaluate") / "timing.json", {"seconds": 1.0})

    replace_stage(monkeypatch, "evaluate", run)
    assert cli.main(["evaluate", "r1_zero", "--set", f"run_dir={tmp_path}"]) == 0
    assert seen == ["r1_zero"]


def test_errors_of_ours_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: Config) -> None:
        raise ZeroDivisionError("a bug")

    replace_stage(monkeypatch, "sft", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "sft", "--set", f"run_dir={tmp_path}"])


@pytest.mark.parametrize(("error", "code"), [(UserError("no\nsuch file"), 2), (KeyboardInterrupt(), 130)])
def test_errors_for_the_user_are_one_line(
    error: BaseException,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(config: Config) -> None:
        raise error

    replace_stage(monkeypatch, "sft", stop)
    assert cli.main(["run", "sft", "--set", f"run_dir={tmp_path}"]) == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
