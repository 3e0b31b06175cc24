"""The norm benchmark on small shapes: every contender runs, is right, and leaves numbers that can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from r1.bench import _measure, norm


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(norm, "NORMS", {"cpu": [(20, 33)]})
    monkeypatch.setattr(norm, "ROTARY", {"cpu": [(10, 3, 12, 8)]})
    monkeypatch.setattr(sys, "argv", ["norm", "--device", "cpu", "--repeats", "1", "--out", str(tmp_path)])
    norm.main()
    records = json.loads((tmp_path / "norm-cpu.json").read_text())["records"]
    assert {r["task"] for r in records} == {t + w for t in ("RMSNorm", "rotary") for w in ("", " with backward")}
    assert {r["name"] for r in records} == {"copy", "written out", "torch's", *_measure.ours("norm", "cpu")}
    for record in records:
        assert "failed" not in record, record
        assert record["seconds"] > 0 and record["gigabytes_per_second"] > 0 and record["of_a_copy"] > 0
        assert record["name"] == "copy" or record["relative_error"] < 1e-6, record
    assert "RMSNorm: r1 torch" in capsys.readouterr().out
