"""The static report: every launch has its kernels and its bytes, and a kernel that cannot run fails the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="it compiles, and its wheel brings cuobjdump")

from r1.bench import static
from r1.bench._ahead_of_time import Binary


def test_the_report_of_a_family(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert static.main(["grpo", "--out", str(tmp_path)]) == 0
    records = json.loads((tmp_path / "static-sm90a.json").read_text())["records"]
    kernels = {r["name"]: r for r in records if r["task"] == "kernel"}
    assert kernels["statistics_kernel"]["matrix_instructions"]["HGMMA"] > 0
    launches = [r for r in records if r["task"] == "launch"]
    assert launches and all(set(r["kernels"]) <= kernels.keys() and r["kernels"] and r["bytes"] for r in launches)
    whole = next(r for r in launches if r["operator"] == "statistics" and r["shape"] == "8192 x 7168, bfloat16")
    assert whole["flops"] == 2 * 8192 * 129280 * 7168
    read = 2 * 7168 * (8192 + 129280) + 8 * 8192  # hidden, weight, and the columns wanted
    assert read < whole["bytes"] < read + 5 * 4 * 8192
    assert whole["floor_seconds"] == pytest.approx(whole["flops"] / 989.5e12)
    assert "grpo triton: statistics_kernel" in capsys.readouterr().out


def test_a_kernel_that_spills_or_does_not_fit_is_a_fault() -> None:
    good = Binary("kernel", {}, 255, 0, 232_448, 0, {"HGMMA": 8}, 2)
    assert static.fault(good) is None
    assert "spills" in static.fault(replace(good, spills=2))
    assert "spills" in static.fault(replace(good, stack_bytes=8))
    assert "232449 bytes of shared memory" in static.fault(replace(good, shared_bytes=232_449))


def test_what_a_tile_fetches() -> None:
    product = Binary("gemm_kernel", {"rows": 256, "columns": 128}, 168, 0, 200_000, 0, {"QGMMA": 8}, 14)
    assert static.fetched_per_flop(product) == (256 / 2 + 128) / (2 * 256 * 128)
    tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "PRECISION": "tf32"}
    half = replace(product, name="grouped_gemm_kernel", constants=tile, matrix_instructions={"HGMMA": 4})
    assert static.fetched_per_flop(half) == 2 * (128 + 256) / (2 * 128 * 256)
    assert static.fetched_per_flop(replace(half, matrix_instructions={})) is None
    assert static.fetched_per_flop(replace(half, constants=tile | {"HEAD": 128})) is None


def test_an_unknown_family_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        static.main(["mpe"])
    assert "names 'mpe', wanted some of grpo, moe, fp8, mla" in capsys.readouterr().err
