"""The optim benchmark on few parameters: every contender runs, is right, and leaves numbers that can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from r1.bench import optim


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    size = ["--parameters", "50000"]
    monkeypatch.setattr(sys, "argv", ["optim", "--device", "cpu", *size, "--repeats", "1", "--out", str(tmp_path)])
    optim.main()
    records = json.loads((tmp_path / "optim-cpu.json").read_text())["records"]
    assert {r["task"] for r in records} == {*optim.KINDS, "gradient norm"}
    largest = {"AdamW, float32": 1e-3, "AdamW, masters": 0.01, "AdamW, bf16": 0.5, "gradient norm": 1e-6}
    for record in records:
        assert "failed" not in record, record
        assert record["seconds"] > 0 and record["gigabytes_per_second"] > 0 and record["of_a_copy"] > 0
        assert record["name"] == "copy" or record["relative_error"] < largest[record["task"]], record
    assert "AdamW, masters: r1 torch" in capsys.readouterr().out


def test_the_sizes_are_what_is_said() -> None:
    for parameters, count in optim.SIZES.values():
        sizes = optim.shapes(parameters, count)
        total = sum(a * (b[0] if b else 1) for a, *b in sizes)
        assert len(sizes) == count and abs(total / parameters - 1) < 0.05
