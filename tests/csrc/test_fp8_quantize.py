"""The bodies of csrc/fp8's quantisers on a CPU, bit for bit what the torch backend gives."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from r1.kernels.fp8 import reference
from tests.csrc.build import build
from tests.kernels.test_fp8 import same
from tests.kernels.test_fp8_triton import awkward


class Job(ctypes.Structure):
    """csrc/fp8/quantize.h's Quantization."""

    _fields_ = [
        ("rows", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("power_of_two", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in ("x_batch", "x_row")),
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("values_batch", "values_row")),
        ("across", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("across_batch", "across_row")),
        *((name, ctypes.c_void_p) for name in ("scales", "across_scales")),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("quantize.cpp", tmp_path_factory.mktemp("csrc"))


def emulate(
    library: ctypes.CDLL, x: Tensor, square: bool, across: bool, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *lead, M, K = x.shape
    values = reference.values_like(x, *lead, M, K).fill_(torch.nan)
    values_across = reference.values_like(x, *lead, K, M).fill_(torch.nan)
    scales, across_scales = reference.row_scales_like(x, M, K), reference.row_scales_like(x, K, M)
    if square:
        scales = x.new_empty((*lead, -(-M // 128), -(-K // 128)), dtype=torch.float32)
    for s in (scales, across_scales):
        s.fill_(torch.nan)
    batch = lambda t: t.stride(0) if lead else 0
    job = Job(
        M, K, power_of_two, batch(x), x.stride(-2), values.data_ptr(), batch(values), values.stride(-2),
        values_across.data_ptr() if across else None, batch(values_across), values_across.stride(-2),
        scales.data_ptr(), across_scales.data_ptr(),
    )  # fmt: skip
    stuck = library.emulate_quantize(
        ctypes.byref(job), ctypes.c_void_p(x.data_ptr()), x.dtype == torch.bfloat16, lead[0] if lead else 1, square
    )
    assert not stuck, "threads waited for each other forever"
    return values, scales, values_across, across_scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 304), (130, 136), (1, 8)], ids=str)
@pytest.mark.parametrize("magnitude", [1e-42, 1e-28, 1.0, 1e30])
def test_rows_and_across(
    library: ctypes.CDLL, seed: int, shape: tuple[int, int], magnitude: float, dtype: torch.dtype
) -> None:
    x = awkward(*shape, magnitude).to(dtype)
    for power_of_two in (False, True):
        got = emulate(library, x, False, True, power_of_two)
        for mine, want in zip(got, reference.quantize_both(x, power_of_two), strict=True):
            assert same(mine, want)
    for mine, want in zip(emulate(library, x, False, False, power_of_two)[:2], got):
        assert same(mine, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 304), (130, 256), (3, 129, 136)], ids=str)
def test_squares(library: ctypes.CDLL, seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = awkward(shape[-2] * (shape[0] if len(shape) == 3 else 1), shape[-1], 1.0).view(shape).to(dtype)
    values, scales, across, _ = emulate(library, x, True, True)
    for mine, want in zip((values, scales, across), reference.quantize_weight(x), strict=True):
        assert same(mine, want)
    if x.dim() == 2:
        for power_of_two in (False, True):
            got = emulate(library, x, True, False, power_of_two)[:2]
            for mine, want in zip(got, reference.quantize_128x128(x, power_of_two), strict=True):
                assert same(mine, want)


def test_quotients_are_the_division(library: ctypes.CDLL, seed: int) -> None:
    """Of any number by any scale: normal ones bit for bit, all in e4m3."""
    count = 4_000_000
    scales = torch.randint(0x00800000, 0x7F7FFFFF, (count,), dtype=torch.int32).view(torch.float32)
    x = (
        (torch.rand(count, dtype=torch.float64) * 2 - 1)
        * 2.0 ** torch.randint(-40, 1, (count,))
        * 448
        * scales.double()
    )
    # Ties of e4m3 too, which a last bit would break.
    halves = (torch.randint(-15, 16, (count // 4,)) / 16 * 2.0 ** torch.randint(-9, 9, (count // 4,))).double()
    x[: count // 4] = halves * scales[: count // 4].double()
    x = x.clamp(-3.4e38, 3.4e38).float()
    x[:5] = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf])
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, scales))
    assert library.wrong_quotients(*pointers, count) == 0
