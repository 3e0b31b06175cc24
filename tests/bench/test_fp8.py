"""The fp8 benchmark on small shapes: every contender runs, is right, and leaves numbers that can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from r1.bench import fp8


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(fp8, "SHAPES", {"cpu": [(40, 130, 96)]})
    monkeypatch.setattr(fp8, "GROUPED", {"cpu": [(3, 240, 64, 96)]})
    monkeypatch.setattr(fp8, "EXPERTS", {"cpu": [(3, 240, 64, 96)]})
    monkeypatch.setattr(sys, "argv", ["fp8", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)])
    fp8.main()
    records = json.loads((tmp_path / "fp8-cpu.json").read_text())["records"]
    tasks = {"quantise 1x128", "quantise 128x128", "quantise both", "gemm", "wgrad", "path", "grouped", "grouped wgrad"}
    tasks.add("expert path")
    assert {r["task"] for r in records} == tasks
    for record in records:
        assert "failed" not in record, record
        assert record["seconds"] > 0
        assert record["relative_error"] is None or record["relative_error"] < 4e-3, record
    assert "gemm: r1 torch" in capsys.readouterr().out
