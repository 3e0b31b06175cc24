"""The fp8 family's Triton kernels: quantisers bit for bit, products against float64; interpreted, and compiled for
Hopper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from r1.bench._ahead_of_time import compiled
from r1.kernels import (
    dequantize,
    fp8_gemm,
    fp8_gemm_wgrad,
    fp8_gemm_wgrad_,
    fp8_grouped_gemm,
    fp8_grouped_gemm_wgrad,
    fp8_grouped_gemm_wgrad_,
    fp8_linear,
    fp8_moe_mlp,
    quantize_1x128,
    quantize_128x128,
    quantize_both,
    quantize_weight,
    swiglu_quantize,
)
from r1.kernels.fp8 import reference
from r1.kernels.fp8 import triton as fp8
from tests.kernels import interpreter  # noqa: F401 (mends the interpreter)
from tests.kernels.helpers import assert_fits, leaf
from tests.kernels.test_fp8 import E4M3, HUGE, same
from tests.kernels.test_fp8_layers import (
    check_experts,
    check_linear,
    check_quantized_inputs,
    check_rms_norm,
    check_swiglu_backward,
    check_weight,
    experts,
)

F64 = torch.float64


@pytest.fixture(params=["triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> str:
    """On a GPU a second time, with the products in CUDA C++."""
    return request.param


def awkward(M: int, K: int, magnitude: float) -> Tensor:
    """Zeros, NaN and a row of nothing else among numbers of many sizes."""
    x = torch.randn(M, K) * magnitude * 2.0 ** torch.randint(-12, 12, (M, 1))
    if x.numel() > 10:
        x.flatten()[torch.randint(0, x.numel(), (x.numel() // 10,))] = 0
        x.flatten()[torch.randint(0, x.numel(), (3,))] = torch.tensor([torch.nan, torch.inf, -HUGE])
        x[-1] = 0
    return x


@pytest.mark.parametrize("shape", [(3, 128), (37, 300), (1, 1), (130, 257), (0, 64), (4, 0)], ids=str)
@pytest.mark.parametrize("magnitude", [1e-42, 1e-28, 1.0, 1e30])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantisers_bit_for_bit(device: str, shape: tuple[int, int], magnitude: float, power_of_two: bool) -> None:
    x = awkward(*shape, magnitude).to(device)
    for source in (x, x.bfloat16(), x.t().contiguous().t(), x.double()):
        for quantise, want in (
            (quantize_1x128, reference.quantize_1x128),
            (quantize_128x128, reference.quantize_128x128),
            (quantize_both, reference.quantize_both),
        ):
            for got, expected in zip(quantise(source, power_of_two), want(source, power_of_two), strict=True):
                assert got.shape == expected.shape and same(got, expected)


@pytest.mark.parametrize("shape", [(37, 300), (1, 1), (130, 257), (0, 64), (4, 0)], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_swiglu_quantize(device: str, shape: tuple[int, int], power_of_two: bool) -> None:
    """An exponential's last bit may differ: scales by as much, values by one step of e4m3."""
    M, F = shape
    gate_up = (torch.randn(M, 2 * F) * 2.0 ** torch.randint(-4, 5, (M, 1))).to(device)
    weights = torch.rand(M, device=device)
    for source in (gate_up, gate_up.bfloat16(), gate_up.t().contiguous().t()):
        for w in (None, weights):
            gate, up = source.double().chunk(2, -1)
            want = torch.nn.functional.silu(gate) * up * (1 if w is None else w.double()[:, None])
            q, scales, q_across, across_scales = swiglu_quantize(source, w, power_of_two)
            for back, exact, spread in (
                (dequantize(q, scales, dtype=F64), want, scales),
                (dequantize(q_across, across_scales, dtype=F64), want.t(), across_scales),
            ):
                wide = spread.double().repeat_interleave(128, 1)[:, : exact.shape[1]]
                assert back.shape == exact.shape
                assert ((back - exact).abs() <= exact.abs() * 2**-4 * (1 + 1e-4) + wide * 2**-10).all()
            known_scales = reference.swiglu_quantize(source, w, True, power_of_two)[1::2]
            for got, known in zip((scales, across_scales), known_scales):
                torch.testing.assert_close(got, known, rtol=1.0 if power_of_two else 1e-5, atol=0)
    if gate_up.numel():
        gate_up[0, 0] = torch.nan
        q, scales, *_ = swiglu_quantize(gate_up, weights)
        assert scales.isfinite().all() and q.float()[0, 0].isnan()


def test_quantised_both_ways(device: str) -> None:
    check_weight(device)
    weight = awkward(130, 257, 1.0).to(device)
    for got, want in zip(quantize_weight(weight), reference.quantize_weight(weight), strict=True):
        assert same(got, want)


@pytest.mark.parametrize(("M", "F"), [(130, 128), (37, 300), (1, 1), (0, 128), (0, 64), (4, 0), (129, 256)])
def test_swiglu_backward(device: str, M: int, F: int) -> None:
    check_swiglu_backward(device, M, F)


@pytest.mark.parametrize(("M", "H"), [(130, 257), (1, 1), (0, 64), (37, 1100)])
def test_rms_norm(device: str, M: int, H: int) -> None:
    check_rms_norm(device, M, H)


def close(got: Tensor, want: Tensor, terms: Tensor) -> None:
    """Within the rounding of the result's type, and of sums of what the terms' sizes add up to: float32 sums in the
    interpreter, and on a GPU ones in which 128 products were aligned to their largest with some 13 bits."""
    step, sums = torch.finfo(got.dtype).eps, 5e-4 if got.is_cuda else 2e-6
    error = (got.double() - want).abs()
    assert (error <= step * want.abs() + sums * terms + 1e-30).all(), f"{(error / (terms + 1e-30)).max():.1e} of terms"


def test_long_sums_are_not_the_matrix_units(device: str) -> None:
    """Of numbers of one sign: an error that grew with K would be of 1e-2 here."""
    K = 1024 if device == "cpu" else 65536
    a, b = (quantize_1x128(1 + torch.rand(32, K, device=device)) for _ in range(2))
    want = exact(a, 1) @ exact(b, 1).t()
    assert ((fp8_gemm_wgrad(*a, *b).double() - want).abs() / want).max() < 1e-3


def problem(device: str, M: int, N: int, K: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    spread = lambda rows: torch.randn(rows, K) * 2.0 ** torch.randint(-6, 6, (rows, 1))
    return quantize_1x128(spread(M).to(device)), quantize_128x128(spread(N).to(device))


def exact(quantised: tuple[Tensor, Tensor], rows: int) -> Tensor:
    return dequantize(*quantised, (rows, 128), F64)


@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(5, 130, 300), (1, 1, 1), (0, 4, 7), (4, 3, 0), (260, 128, 256)]
    + [pytest.param(*shape, marks=pytest.mark.gpu) for shape in ((4096, 7168, 2048), (1000, 2112, 7168))],
)
def test_gemms(device: str, M: int, N: int, K: int) -> None:
    a, b = problem(device, M, N, K)
    for dtype in (torch.float32, torch.bfloat16):
        x, y = exact(a, 1), exact(b, 128)
        got = fp8_gemm(*a, *b, dtype)
        assert got.dtype == dtype and got.shape == (M, N)
        close(got, x @ y.t(), x.abs() @ y.abs().t())
    grad = torch.randn(N, M, device=device)
    (_, _, *across), g = quantize_both(exact(a, 1).float()), quantize_1x128(grad)
    got = fp8_gemm_wgrad(*g, *across)
    assert got.dtype == torch.float32 and got.shape == (N, K)
    x, y = exact(g, 1), dequantize(*across, (1, 128), F64)
    close(got, x @ y.t(), x.abs() @ y.abs().t())
    for dtype in (torch.float32, torch.bfloat16):
        main = torch.randn(N, K, device=device).to(dtype)
        want, terms = main.double() + x @ y.t(), main.double().abs() + x.abs() @ y.abs().t()
        fp8_gemm_wgrad_(main, *g, *across)
        close(main, want, terms)


COUNTS = [[3, 0, 150, 1], [0, 0, 0, 0], [0, 130, 0, 0], [128, 256, 0, 64], [60, 30, 10, 200]]


@pytest.mark.parametrize("counts", [*COUNTS, pytest.param([1000, 0, 37, 8000], marks=pytest.mark.gpu)], ids=str)
def test_grouped_gemms(device: str, counts: list[int]) -> None:
    E, P, N, K = len(counts), sum(counts), 131, 140
    n = torch.tensor(counts, device=device)
    x, w, grad = (torch.randn(*s).to(device) for s in ((P, K), (E, N, K), (P, N)))
    a, (_, _, *a_across), (_, _, *g_across) = quantize_1x128(x), quantize_both(x), quantize_both(grad)
    experts = [quantize_128x128(w[e]) for e in range(E)]
    b, b_s = (torch.stack(parts) for parts in zip(*experts))
    for dtype in (torch.float32, torch.bfloat16):
        y = fp8_grouped_gemm(*a, b, b_s, n, dtype)
        dw = fp8_grouped_gemm_wgrad(*g_across, *a_across, n, dtype)
        assert y.shape == (P, N) and dw.shape == (E, N, K) and y.dtype == dw.dtype == dtype
        wide_x, wide_g, wide_t = exact(a, 1), exact(tuple(g_across), 1), exact(tuple(a_across), 1)
        begin = 0
        for e, count in enumerate(counts):
            rows = slice(begin, begin + count)
            begin += count
            weight = exact(experts[e], 128)
            close(y[rows], wide_x[rows] @ weight.t(), wide_x[rows].abs() @ weight.abs().t())
            g, t = wide_g[:, rows], wide_t[:, rows]
            close(dw[e], g @ t.t(), g.abs() @ t.abs().t())
            assert count or dw[e].eq(0).all()
        main = torch.randn(E, N, K, device=device)
        added = main.clone()
        fp8_grouped_gemm_wgrad_(added, *g_across, *a_across, n)
        assert torch.equal(added[n == 0], main[n == 0])
        if dtype == torch.float32:
            torch.testing.assert_close(added - main, dw, atol=2e-3 if added.is_cuda else 1e-4, rtol=1e-5)


def test_what_lies_beside_is_not_read(device: str) -> None:
    """Values and scales in the padding of wider tensors, and other experts' rows, are NaN."""
    M, N, K = 70, 40, 200
    a, b = problem(device, M, N, K)
    want = fp8_gemm(*a, *b, torch.float32)

    def within(x: Tensor) -> Tensor:
        raw = x.view(torch.uint8) if x.dtype == E4M3 else x
        wide = torch.full((x.shape[0] + 3, x.shape[1] + 56), 0x7F if x.dtype == E4M3 else torch.nan, device=device)
        wide = wide.to(raw.dtype)
        wide[: x.shape[0], : x.shape[1]] = raw
        return wide.view(x.dtype)[: x.shape[0], : x.shape[1]]

    assert torch.equal(fp8_gemm(*(within(x) for x in (*a, *b)), torch.float32), want)
    counts = torch.tensor([50, 100, 20], device=device)
    x, grad = torch.randn(40, 170, device=device), torch.randn(30, 170, device=device)
    x_q, g_q = quantize_1x128(x), quantize_1x128(grad)
    clean = fp8_grouped_gemm_wgrad(*g_q, *x_q, counts)
    for q in (x_q[0], g_q[0]):
        q.view(torch.uint8)[:, 50:150] = 0x7F
    poisoned = fp8_grouped_gemm_wgrad(*g_q, *x_q, counts)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]]) and poisoned[1].isnan().all()


def test_linear_and_a_row_in_every_batch(device: str) -> None:
    x, w = leaf(2, 70, 150).to(device).detach().requires_grad_(), leaf(135, 150).to(device).detach().requires_grad_()
    y = fp8_linear(x, w)
    up = torch.randn(2, 70, 135, device=device)
    got = (y, *torch.autograd.grad(y, (x, w), up))
    rows, up_rows = x.detach().flatten(0, 1), up.flatten(0, 1)
    (_, _, *x_across), (_, _, *up_across) = quantize_both(rows), quantize_both(up_rows)
    a, b, g = exact(quantize_1x128(rows), 1), exact(quantize_128x128(w), 128), exact(quantize_1x128(up_rows), 1)
    t, u = exact(tuple(x_across), 1), exact(tuple(up_across), 1)
    for have, left, right in zip(got, (a, g, u), (b.t(), b, t.t())):
        close(have.detach().flatten(0, -2), left @ right, left.abs() @ right.abs())
    with torch.no_grad():
        for few in ([3], [100, 3, 7]):
            assert torch.equal(fp8_linear(rows[few], w)[few.index(3)], y.flatten(0, 1)[3])


def test_quantized_inputs(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1_KERNELS", f"fp8={backend}")  # what leads the gradient on is of other families
    check_quantized_inputs(device)


def test_layers(device: str) -> None:
    check_linear(device)
    for counts, dtype, weighted in (
        ([3, 0, 150, 1], torch.bfloat16, True),
        ([0, 0, 0, 0], torch.float32, True),
        ([60, 128, 10], torch.float32, False),
    ):
        check_experts(device, counts, 140, 131, dtype, weighted)
    check_experts(device, [130, 0, 60], 128, 128, torch.bfloat16, weighted=True)


def test_an_expert_row_in_every_batch(device: str) -> None:
    x, _, gate_up, down, weights = experts(device, [40, 60], 130, 128)
    run = lambda rows, counts: fp8_moe_mlp(x[rows], torch.tensor(counts, device=device), gate_up, down, weights[rows])
    with torch.no_grad():
        whole = run(list(range(100)), [40, 60])
        assert torch.equal(run([7, 70, 3], [1, 2])[0], whole[7]) and torch.equal(run([50], [0, 1])[0], whole[50])


def test_wrong_counts_are_refused() -> None:
    q = quantize_1x128(torch.randn(5, 130))
    with pytest.raises(ValueError, match=r"tokens_per_expert_E is \[1, 2\], wanted numbers >= 0 whose sum is the 130"):
        fp8.fp8_grouped_gemm_wgrad(*q, *q, torch.tensor([1, 2]), torch.float32)


def test_compiles_for_hopper_without_spills() -> None:
    binaries, _ = compiled("fp8")
    products = {"fp8_gemm_kernel", "fp8_grouped_wgrad_kernel"}
    quantisers = {"quantize_kernel", "quantize_square_kernel", "swiglu_backward_quantize_kernel", "inverse_rms_kernel"}
    assert {b.name for b in binaries} == {*quantisers, "plan_kernel", *products}
    for binary in binaries:
        assert_fits(binary, uses_matrix_units=binary.name in products)
        if binary.name in products:
            assert "QGMMA" in binary.matrix_instructions and binary.bulk_copies
