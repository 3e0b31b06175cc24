"""The mla benchmark on small shapes: every contender runs, is right, and leaves numbers that can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from r1.bench import _measure, mla


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(
        sys, "argv", ["mla", "--device", "cpu", "--longest", "256", "--repeats", "1", "--out", str(tmp_path)]
    )
    mla.main()
    records = json.loads((tmp_path / "mla-cpu.json").read_text())["records"]
    assert (tmp_path / "mla-cpu.png").stat().st_size > 0
    assert {r["task"] for r in records} == {"training", "decode"}
    assert {r["name"] for r in records if r["task"] == "training"} == {"SDPA", *_measure.ours("mla", "cpu")}
    sizes = {
        r["name"]: r["gigabytes_per_second"] * r["seconds_forward"] for r in records if r["shape"] == "latents of 128"
    }
    assert sizes["r1 torch, FP8 cache"] * 160 * 4 == pytest.approx(sizes["r1 torch"] * (128 + 4 + 64))
    for record in records:
        assert "failed" not in record, record
        assert record["seconds_forward"] > 0 and record["tflops_forward"] > 0
        room = 4e-2 if "FP8" in record["name"] else 1e-5  # e4m3 has four bits
        assert record["relative_errors"] and all(e < room for e in record["relative_errors"].values()), record
        assert record["task"] == "decode" or record["seconds_forward_backward"] > 0
    assert "training: r1 torch" in capsys.readouterr().out
