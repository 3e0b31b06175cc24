"""The moe benchmark on small shapes: every contender runs, is right, and leaves numbers that can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from r1.bench import moe


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(
        sys, "argv", ["moe", "--device", "cpu", "--tokens", "64", "--repeats", "1", "--out", str(tmp_path)]
    )
    moe.main()
    records = json.loads((tmp_path / "moe-cpu.json").read_text())["records"]
    assert (tmp_path / "moe-cpu.png").stat().st_size > 0
    assert {r["task"] for r in records} == {"layer", "experts", "route", "permute"}
    assert {r["load"] for r in records if r["task"] == "experts"} == set(moe.LOADS)
    for record in records:
        assert "failed" not in record, record
        assert record["seconds_forward_backward"] > 0
        assert all(error < 1e-5 for error in record.get("relative_errors", {}).values()), record
    assert "experts: r1 torch" in capsys.readouterr().out
