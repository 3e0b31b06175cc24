"""The grpo benchmark on a small shape: every contender runs, is right, and leaves numbers that can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from r1.bench import grpo


@pytest.mark.slow  # torch.compile builds C++ for several contenders
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    command = ["grpo", "--device", "cpu", "--shape", "128,32,1000", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    grpo.main()
    result = json.loads((tmp_path / "grpo-cpu.json").read_text())
    assert (tmp_path / "grpo-cpu.png").stat().st_size > 0
    assert result["machine"]["versions"]["torch"] and result["machine"]["device"]
    names = {(r["task"], r["name"]) for r in result["records"]}
    assert {("grpo", "r1 torch"), ("grpo", "eager"), ("logprob", "r1 torch"), ("cross_entropy", "r1 torch")} <= names
    for record in result["records"]:
        assert "failed" not in record, record
        assert record["seconds_forward_backward"] > 0
        assert all(error < 1e-4 for error in record["relative_errors"].values()), record
    assert "grpo: r1 torch" in capsys.readouterr().out
