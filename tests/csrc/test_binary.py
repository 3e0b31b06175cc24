"""r1._cuda, read and called where there is no GPU: what the compiler made of the kernels, and what a launch says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from r1.bench._ahead_of_time import Binary, dump, of_extension
from r1.bench.static import fault

cuda = pytest.importorskip("r1._cuda", reason="r1._cuda is built only where nvcc is found")
pytest.importorskip("triton", reason="its wheel brings cuobjdump")


@pytest.fixture(scope="module")
def binaries() -> list[Binary]:
    return of_extension()


def test_matrix_kernels_use_what_hopper_has_and_do_not_spill(binaries: list[Binary]) -> None:
    products = [binary for binary in binaries if binary.name == "gemm_kernel"]
    assert len(products) == 24
    for binary in products:
        assert binary.matrix_instructions.keys() == {"QGMMA"}, f"no QGMMA, or older matrix instructions: {binary}"
        assert fault(binary) is None and binary.bulk_copies and binary.shared_bytes > 100_000, binary


def test_tiles_come_by_multicast_and_registers_are_dealt_out() -> None:
    """What no count says: copies to both blocks of a cluster, products of the right type, registers moved to those who
    multiply."""
    _, instructions = dump(Path(cuda.__file__))
    for name, code in instructions.items():
        if "gemm_kernel" in name:
            assert re.search(r"\bQGMMA\.64x(64|128)x32\.F32\.E4M3\.E4M3\b", code), name
            assert re.search(r"\bUTMALDG\.2D\.MULTICAST\b", code) and re.search(r"\bUSETMAXREG\b", code), name


def test_quantisers_do_not_spill_and_leave_room_for_two_blocks(binaries: list[Binary]) -> None:
    quantisers = [binary for binary in binaries if binary.name == "quantize_kernel"]
    assert len(quantisers) == 8
    for binary in quantisers:
        assert fault(binary) is None and binary.registers <= 128, binary


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_driver_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"cudaGetDevice: .*(driver|device)"):
        cuda.fp8_gemm(
            groups="none", square=True, accumulate=False, bfloat16=True, rows=1, columns=1, depth=1, a=(0, 16),
            a_scales=(0, 1, 1), b=(0, 16), b_scales=(0, 1, 1), b_scales_per_expert=0, out=0, experts=1,
            tokens_per_expert=0, wide_counts=False, tile=-1, stream=0,
        )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_every_operator_reaches_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the arguments in their places, types and numbers: all that fails is the driver."""
    from r1.kernels import quantize_1x128, quantize_both, quantize_weight
    from r1.kernels.fp8 import cuda as fp8

    monkeypatch.setattr(fp8, "_stream", lambda x: 0)
    x, counts = torch.randn(5, 24), torch.tensor([2, 3])
    (q, s, q_across, s_across), (w, w_s, _) = quantize_both(x), quantize_weight(torch.randn(7, 24))
    ws, ws_s, _ = quantize_weight(torch.randn(2, 7, 24))
    wide, wide_s = quantize_1x128(torch.randn(24, 5))
    half = torch.bfloat16
    for call in (
        lambda: fp8.quantize_1x128(x, False),
        lambda: fp8.quantize_128x128(x.to(half), True),
        lambda: fp8.quantize_both(x, False),
        lambda: fp8.quantize_weight(torch.randn(2, 7, 24)),
        lambda: fp8.fp8_gemm(q, s, w, w_s, half),
        lambda: fp8.fp8_gemm(q, s, w, w_s, torch.float16),
        lambda: fp8.fp8_gemm_wgrad(q_across, s_across, wide, wide_s, half),
        lambda: fp8.fp8_gemm_wgrad_(torch.zeros(24, 24), q_across, s_across, wide, wide_s),
        lambda: fp8.fp8_grouped_gemm(q, s, ws, ws_s, counts, half),
        lambda: fp8.fp8_grouped_gemm_wgrad(q_across, s_across, wide, wide_s, counts, torch.float32),
        lambda: fp8.fp8_grouped_gemm_wgrad_(torch.zeros(2, 24, 24), q_across, s_across, wide, wide_s, counts.int()),
    ):
        with pytest.raises(RuntimeError, match="cudaGetDevice: "):
            call()
    with pytest.raises(ValueError, match=r"tokens_per_expert_E is a \(513,\).*wanted 1 to 512 experts"):
        fp8.fp8_grouped_gemm_wgrad(q_across, s_across, wide, wide_s, counts.new_zeros(513), torch.float32)
