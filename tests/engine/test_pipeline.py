"""The whole pipeline on a micro model: what every stage leaves, torchrun, and bad input told in one sentence."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from r1.engine.settings import PIPELINE

MICRO = Path(__file__).with_name("micro.toml")
MEASURES = {"pass@1", "cons@k", "format", "language_consistency", "reward", "length", "k", "tasks"}


def r1(*arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "r1.engine", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def configured(run_dir: Path, *settings: str) -> list[str]:
    pairs = [f"run_dir={run_dir}", *settings]
    return ["--config", str(MICRO), *(part for pair in pairs for part in ("--set", pair))]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("pipeline") / "run"
    result = r1("pipeline", *configured(run_dir))
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"report: {run_dir}/report.html" in result.stderr
    return run_dir


def test_every_stage_leaves_its_files(whole_run: Path) -> None:
    for stage in PIPELINE:
        folder = whole_run / stage
        assert json.loads((folder / "timing.json").read_text())["seconds"] > 0, stage
        if stage == "rejection_sampling":
            assert {"prompt", "completion"} <= rows(folder / "data.jsonl")[0].keys()
            continue
        assert (folder / "checkpoint" / "manifest.json").exists(), stage
        steps = [row["step"] for row in rows(folder / "metrics.jsonl")]
        assert steps == list(range(len(steps))) and steps, stage
        if stage == "reward_model":
            assert 0 <= json.loads((folder / "evaluation.json").read_text())["heldout_accuracy"] <= 1
        else:
            evaluation = json.loads((folder / "evaluation.json").read_text())
            assert evaluation.keys() >= MEASURES, stage
            assert all(0 <= evaluation[name] <= 1 for name in ("pass@1", "cons@k", "format", "language_consistency"))
            assert rows(folder / "samples.jsonl"), stage


def test_summary_has_the_promised_form(whole_run: Path) -> None:
    summary = json.loads((whole_run / "summary.json").read_text())
    measured = {"pass@1", "cons@k", "format", "language_consistency", "reward", "length", "seconds"}
    for stage in ("pretrain", "r1_zero", "cold_start", "reasoning_rl", "sft", "all_scenarios_rl", "distill"):
        assert summary["stages"][stage].keys() >= measured, stage
    assert summary["reward_model"].keys() == {"heldout_accuracy"}
    assert summary["seconds"] > 0


def test_reference_model_is_replaced_on_schedule(whole_run: Path) -> None:
    """KL is 0 in the step after the reference became the policy: steps 0 and 2 with an interval of 2."""
    kl = [row["kl"] for row in rows(whole_run / "r1_zero" / "metrics.jsonl")]
    assert kl[0] < 1e-9 and kl[2] < 1e-9 < kl[1]


def test_a_complete_stage_is_not_done_again(whole_run: Path) -> None:
    before = (whole_run / "r1_zero" / "checkpoint" / "manifest.json").stat().st_mtime_ns
    result = r1("run", "r1_zero", *configured(whole_run))
    assert result.returncode == 0 and "complete already" in result.stderr
    assert (whole_run / "r1_zero" / "checkpoint" / "manifest.json").stat().st_mtime_ns == before


def test_generate_writes_text(whole_run: Path) -> None:
    result = r1("generate", str(whole_run / "all_scenarios_rl"), "4+5-2=", "--max-tokens", "8")
    assert result.returncode == 0, result.stderr
    again = r1("generate", str(whole_run / "all_scenarios_rl"), "4+5-2=", "--max-tokens", "8")
    assert result.stdout.strip() and result.stdout == again.stdout


def test_evaluate_measures_any_checkpoint(whole_run: Path, tmp_path: Path) -> None:
    shutil.copy(whole_run / "tokenizer.json", tmp_path / "tokenizer.json")
    result = r1("evaluate", str(whole_run / "distill" / "checkpoint"), *configured(tmp_path))
    assert result.returncode == 0, result.stderr
    ours = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())
    assert ours == json.loads((whole_run / "distill" / "evaluation.json").read_text())


def started(whole_run: Path, folder: Path) -> Path:
    """A run that has only been pretrained."""
    folder.mkdir()
    shutil.copy(whole_run / "tokenizer.json", folder / "tokenizer.json")
    shutil.copytree(whole_run / "pretrain", folder / "pretrain")
    return folder


def truncate_shard(run_dir: Path) -> None:
    shard = max((run_dir / "pretrain" / "checkpoint" / "shards").iterdir(), key=lambda path: path.stat().st_size)
    shard.write_bytes(shard.read_bytes()[:-100])


def remove_checkpoint(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "pretrain" / "checkpoint")


def nothing(run_dir: Path) -> None: ...


LONG_PROMPT = json.dumps({"text": "9 " * 400, "answer": "1"}) + "\n"


@pytest.mark.parametrize(
    ("stage", "spoil", "text", "settings", "told"),
    [
        ("r1_zero", truncate_shard, "", [], "bytes where"),
        ("r1_zero", remove_checkpoint, "", [], "run `r1 run pretrain` first"),
        ("r1_zero", nothing, "", ["parallel.tensor=2"], "world size 1"),
        ("r1_zero", nothing, "", ["parallel.expert=3"], "does not divide model.num_experts = 8"),
        ("r1_zero", nothing, "", ["stages.r1_zero.from=all_scenarios_rl"], "all_scenarios_rl"),
        ("r1_zero", nothing, LONG_PROMPT, ["data.prompts_file={file}"], "tokens"),
        ("sft", nothing, "\n", ["stages.sft.data={file}"], "is empty"),
        ("sft", nothing, '{"prompt": "a", "completion": "b"}\nnot json\n', ["stages.sft.data={file}"], "line 2"),
        ("sft", nothing, '{"prompt": "a"}\n', ["stages.sft.data={file}"], "completion"),
    ],
)  # fmt: skip
def test_bad_input_is_told_and_harms_nothing(
    whole_run: Path, tmp_path: Path, stage: str, spoil, text: str, settings: list[str], told: str
) -> None:
    run_dir = started(whole_run, tmp_path / "run")
    spoil(run_dir)
    file = tmp_path / "data.jsonl"
    if text:
        file.write_text(text)
    settings = [setting.replace("{file}", str(file)) for setting in settings]
    kept = {path: path.read_bytes() for path in (run_dir / "pretrain").rglob("*") if path.is_file()}
    result = r1("run", stage, *configured(run_dir, *settings))
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    sentences = [line for line in result.stderr.splitlines() if line.startswith("r1: ")]
    assert len(sentences) == 1 and told in sentences[0], result.stderr
    assert kept == {path: path.read_bytes() for path in (run_dir / "pretrain").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_torchrun_does_what_one_process_does(whole_run: Path, tmp_path: Path) -> None:
    """Expert and pipeline parallelism on four processes; three layers on two stages."""
    settings = ["parallel.expert=2", "parallel.pipeline=2"]
    run_dir = started(whole_run, tmp_path / "run")
    result = r1("run", "r1_zero", *configured(run_dir, *settings), processes=4)
    assert result.returncode == 0, result.stderr[-4000:]
    ours, theirs = (rows(folder / "r1_zero" / "metrics.jsonl") for folder in (run_dir, whole_run))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("reward", "accuracy", "length", "loss", "grad_norm", "kl", "entropy"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
