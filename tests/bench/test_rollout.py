"""The rollout benchmark on a small model and few prompts: its engines agree and leave numbers that can be read."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from r1.bench import rollout
from r1.bench._engines import Emission, Job
from r1.engine.config import load_config

MICRO = Path(__file__).parent.parent / "engine" / "micro.toml"


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    model = load_config(str(MICRO), ["model.max_positions=1024", "model.vocab_size=200"]).model
    tasks = ("mixed", "groups", "long tail", "arrivals")
    monkeypatch.setattr(rollout, "MODELS", {"micro": (model, 100.0, tasks)})
    long = rollout.workloads
    monkeypatch.setattr(
        rollout,
        "workloads",
        lambda *of: {
            task: [replace(job, tokens=1 + job.tokens // 8) for job in jobs] for task, jobs in long(*of).items()
        },
    )
    # vLLM wants an environment of its own, and takes half a minute to start.
    contestants = {name: c for name, c in rollout.CONTESTANTS.items() if not name.startswith("vLLM")}
    monkeypatch.setattr(rollout, "CONTESTANTS", contestants)
    monkeypatch.setattr(sys, "argv", ["rollout", "--sequences", "3", "--repeats", "1", "--out", str(tmp_path)])
    rollout.main()
    (result,) = tmp_path.glob("rollout-*.json")
    assert result.with_suffix(".png").stat().st_size > 0
    records = json.loads(result.read_text())["records"]
    assert {(r["task"], r["name"]) for r in records} == {(task, name) for task in tasks for name in contestants}
    for record in records:
        assert "failed" not in record, record
        assert record["greedy_tokens_equal"] == 1 and record["logprobs_apart"] < 1e-3, record
        assert record["tokens_per_second"] > 0
        first, last = record["seconds_to_first_token"], record["seconds_to_last_token"]
        assert 0 < first["p50"] <= first["p99"] < last["p99"] and last["p50"] <= last["p99"], record
    ours = {r["task"]: r for r in records if r["name"] == "r1"}
    for record in ours.values():
        # Each sequence leaves less than a page of 16 unused, and a group's keep copies of a page that is part full.
        cache = record["cache"]
        assert cache["bytes_of_tokens"] == cache["tokens"] * model.num_layers * (16 + 8) * 4
        assert 0 <= cache["bytes"] - cache["bytes_of_tokens"] <= 8 * 31 * model.num_layers * (16 + 8) * 4, record
    speculative = [r for r in records if r["name"] == "r1, speculative"]
    for record in speculative:
        assert 0 < record["drafts"]["accepted"] < record["drafts"]["proposed"], record
        assert record["completions_unchanged"] > 0.6, record
    assert "arrivals: r1" in capsys.readouterr().out


def test_an_engine_that_computes_another_model_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "transformers": [([3, 4], [-1.0, -2.0])],
        "vLLM": [([3, 5], [-1.0, -2.0])],
        "vLLM, eager": [([3, 4], [-1.0, -2.1])],
        "r1": [([3, 4], [-1.0, -2.00001])],
    }
    field = rollout.Field.__new__(rollout.Field)
    field.label, field.vocab_size, field.failed, field.facts = "", 9, {}, {}
    field.processes = {
        name: type("", (), {"call": lambda *_, answer=answer: answer})() for name, answer in said.items()
    }
    field.compare(random.Random(0))
    assert set(field.failed) == {"vLLM", "vLLM, eager"} and "50%" in field.failed["vLLM"]
    assert field.facts["r1"]["greedy_tokens_equal"] == 1
    said["r1"][0][0][1] = 7
    with pytest.raises(RuntimeError, match="r1: 50% of the greedy tokens"):
        field.compare(random.Random(0))


def test_the_summary_of_known_moments() -> None:
    jobs = [Job([1, 2], 3, copies=2), Job([1], 1, arrival=2.0)]
    moments = [
        (1.0, 0, 0, [5]),
        (1.0, 0, 1, [5, 6]),
        (2.0, 0, 0, [6]),
        (4.0, 0, 0, [7]),
        (3.0, 0, 1, [7]),
        (5.0, 1, 0, [1]),
    ]
    found = rollout.summary(jobs, [Emission(*moment) for moment in moments])
    assert found["tokens"] == 7 and found["tokens_per_second"] == 7 / 5
    assert found["seconds_to_first_token"] == pytest.approx({"p50": 1.0, "p99": 2.96})  # of 1, 1 and 3
    assert found["seconds_between_tokens"]["p50"] == 2.0  # of 1, 2 and 2
    assert found["seconds_to_last_token"]["p50"] == 3.0  # of 4, 3 and 3


def test_workloads_are_what_is_said(seed: int) -> None:
    draw = random.Random(seed)
    for jobs in rollout.workloads(64, 640, 10.0).values():
        assert sum(job.copies for job in jobs) == 64 and all(8 <= len(job.prompt) <= 200 for job in jobs)
        assert all(0 <= token < 640 for job in jobs for token in job.prompt)
    assert rollout.workloads(64, 640, 10.0) == rollout.workloads(64, 640, 10.0)
    tail = [job.tokens for job in rollout.long_tail(20, 640, draw)]
    assert sorted(tail) == [48] * 19 + [8 * 48]
    moments = [job.arrival for job in rollout.arrivals(2000, 640, draw, 10.0)]
    assert moments == sorted(moments) and moments[-1] == pytest.approx(200, rel=0.15)
