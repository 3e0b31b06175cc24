"""The comparison of precisions, shortened: every run learns, and FP8 does not fall behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from r1.bench import fp8_training


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    steps = ["--steps", "60", "--base-steps", "60", "--rl-steps", "2", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["fp8_training", *steps, "--out", str(tmp_path)])
    fp8_training.main()
    (result,) = tmp_path.glob("fp8-training-*.json")
    records = json.loads(result.read_text())["records"]
    losses = {r["name"]: r for r in records if r["task"] == "pretrain"}
    assert losses.keys() == fp8_training.MODES.keys()
    for record in losses.values():
        assert record["loss"] < record["losses"][0] / 2
        assert record["loss"] == pytest.approx(losses["float32"]["loss"], rel=0.1)
    rewards = [r for r in records if r["task"] == "r1_zero"]
    assert len(rewards) == len(losses) and all(len(r["rewards"]) == 2 and r["mismatch"] < 0.1 for r in rewards)
    assert "training in FP8" in capsys.readouterr().out
