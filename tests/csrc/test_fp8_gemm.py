"""The bodies of csrc/fp8's kernels on a CPU: built by g++, run on the machine of machine.h, against float64.

Everything but the instructions themselves runs here: which tile when, what is copied where, the swizzle, descriptors,
barriers and their phases, scales, masks, and what is stored.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from r1.kernels import dequantize, quantize_1x128, quantize_128x128
from tests.csrc.build import build

TILES = [(256, 128), (128, 128), (128, 64)]
NONE, ROWS, DEPTH = range(3)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return build("gemm.cpp", tmp_path_factory.mktemp("csrc"))


def emulate(
    library: ctypes.CDLL,
    tile: int,
    groups: int,
    out: Tensor,
    a: tuple[Tensor, Tensor],
    b: tuple[Tensor, Tensor],
    counts: Tensor | None = None,
    square: bool = True,
    accumulate: bool = False,
    blocks: int = 4,
) -> None:
    """Fills out; b is (E, N, K) for ROWS, and as quantize_1x128 gives it for a weight's gradient."""
    (a_q, a_s), (b_q, b_s) = a, b
    b_scales = b_s if b_s.dim() == 3 else b_s[None]
    pointer, strides = lambda t: ctypes.c_void_p(t.data_ptr()), lambda t: [ctypes.c_int64(n) for n in t.stride()]
    stuck = library.emulate_gemm(
        tile, groups, square, accumulate, out.dtype == torch.bfloat16, a_q.shape[0],
        b_q.shape[-2], a_q.shape[1], 1 if counts is None else len(counts),
        None if counts is None else pointer(counts), counts is not None and counts.dtype == torch.int64,
        pointer(a_q), strides(a_q)[0], pointer(b_q), strides(b_q)[-2], pointer(a_s), *strides(a_s), pointer(b_scales),
        *strides(b_scales), pointer(out), blocks, int(torch.randint(2**31, ())),
    )  # fmt: skip
    assert not stuck, "threads waited for each other forever"


def double(pair: tuple[Tensor, Tensor], rows: int) -> Tensor:
    return dequantize(*pair, (rows, 128), torch.float64)


def check(out: Tensor, want: Tensor) -> None:
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 4e-3}[out.dtype]
    error = (out.double() - want).abs() / want.abs().amax()
    assert error.max() < tolerance, f"{error.max():.1e}"


SHAPES = [(1, 1, 1), (300, 264, 300), (64, 513, 128), (257, 130, 1100)]


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gemm(library: ctypes.CDLL, seed: int, tile: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    a, b = quantize_1x128(torch.randn(M, K)), quantize_128x128(torch.randn(N, K))
    out = torch.full((M, N), torch.nan, dtype=dtype)
    emulate(library, tile, NONE, out, a, b)
    check(out, double(a, 1) @ double(b, 128).t())


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", [(300, 264, 300), (130, 65, 1), (128, 513, 1100)])
def test_wgrad(library: ctypes.CDLL, seed: int, tile: int, accumulate: bool, shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    a, b = quantize_1x128(torch.randn(M, K)), quantize_1x128(torch.randn(N, K))
    main = torch.randn(M, N)
    out = main.clone() if accumulate else torch.full_like(main, torch.nan)
    emulate(library, tile, NONE, out, a, b, square=False, accumulate=accumulate)
    check(out, double(a, 1) @ double(b, 1).t() + (main.double() if accumulate else 0))


COUNTS = [[0, 129, 0, 3, 256, 0], [300], [0, 0, 1], [128, 128, 1, 127]]


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_gemm(library: ctypes.CDLL, seed: int, tile: int, dtype: torch.dtype, counts: list[int]) -> None:
    P, N, K = sum(counts), 200 if tile else 136, 260
    a, weights = quantize_1x128(torch.randn(P, K)), [quantize_128x128(torch.randn(N, K)) for _ in counts]
    stacked = torch.zeros(len(counts), N, (K + 15) // 16 * 16, dtype=torch.float8_e4m3fn)[..., :K]
    for place, (q, _) in zip(stacked, weights):
        place.copy_(q)
    b = stacked, torch.stack([s for _, s in weights])
    out = torch.full((P, N), torch.nan, dtype=dtype)
    emulate(library, tile, ROWS, out, a, b, torch.tensor(counts, dtype=torch.int32 if tile else torch.int64))
    rows = double(a, 1).split(counts)
    check(out, torch.cat([x @ double(w, 128).t() for x, w in zip(rows, weights)]))


@pytest.mark.parametrize("tile", range(3))
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_grouped_wgrad(library: ctypes.CDLL, seed: int, tile: int, accumulate: bool, counts: list[int]) -> None:
    P, N, K = sum(counts), 130, 200
    g, x = torch.randn(N, P), torch.randn(K, P)
    if counts[0] == 0 and P > 1:
        g[:, 130], x[:, 131] = torch.nan, torch.inf  # one expert's, in a block that it shares with others
    a, b = quantize_1x128(g), quantize_1x128(x)
    main = torch.randn(len(counts), N, K)
    out = main.clone() if accumulate else torch.full_like(main, torch.nan)
    emulate(library, tile, DEPTH, out, a, b, torch.tensor(counts), False, accumulate)
    parts = zip(double(a, 1).split(counts, 1), double(b, 1).split(counts, 1))
    want = torch.stack([x @ y.t() for x, y in parts]) + (main.double() if accumulate else 0)
    finite = want.isfinite().all(-1).all(-1)
    assert finite.sum() == len(counts) - (counts[0] == 0 and P > 1)
    assert torch.equal(out.isnan(), want.isnan())
    check(out[finite], want[finite])


def test_tiles_suit_the_shape(library: ctypes.CDLL) -> None:
    """Large products take large tiles, few rows narrow ones, so that more multiprocessors read the weight."""
    assert TILES[library.choose(4096, 1, 7168, 132)] == (256, 128)
    assert TILES[library.choose(128, 1, 7168, 132)] == (128, 64)
    assert TILES[library.choose(128, 64, 4096, 132)] == (128, 128)
