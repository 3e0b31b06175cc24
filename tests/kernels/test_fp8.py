"""Block-scaled FP8: the quantisers bit for bit against numpy-like loops, the products against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1.kernels import (
    dequantize,
    fp8_gemm,
    fp8_gemm_wgrad,
    fp8_gemm_wgrad_,
    fp8_grouped_gemm,
    fp8_grouped_gemm_wgrad,
    fp8_grouped_gemm_wgrad_,
    fp8_linear,
    quantize_1x128,
    quantize_128x128,
    swiglu_quantize,
)
from tests.kernels.helpers import leaf

E4M3 = torch.float8_e4m3fn
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def by_hand(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """One block at a time."""
    M, K = x.shape
    q = torch.zeros(M, K)
    scales = torch.ones(-(-M // rows), -(-K // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * rows, (i + 1) * rows), slice(j * 128, (j + 1) * 128))
            block = x[at].float()
            known = block[~block.isnan()]
            amax = float(known.abs().max()) if known.numel() else 0.0
            if amax:
                scales[i, j] = min(max(float(torch.tensor(amax) / 448), TINY), HUGE)
            q[at] = (block / scales[i, j]).clamp(-448, 448)
    return q.to(E4M3), scales


def same(a: Tensor, b: Tensor) -> bool:
    """The same bytes, but any NaN equals any other."""
    if a.dtype == E4M3:
        a, b = a.float(), b.float()
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("shape", [(3, 128), (5, 300), (1, 1), (130, 257), (0, 64), (4, 0)])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e30])
def test_quantisers_bit_for_bit(seed: int, shape: tuple[int, int], magnitude: float) -> None:
    x = torch.randn(shape) * magnitude
    if x.numel() > 10:
        x.flatten()[torch.randint(0, x.numel(), (x.numel() // 10,))] = 0
        x.flatten()[int(torch.randint(0, x.numel(), ()))] = float("nan")
    for quantise, rows in ((quantize_1x128, 1), (quantize_128x128, 128)):
        q, scales = quantise(x)
        want_q, want_scales = by_hand(x, rows)
        assert same(q, want_q) and torch.equal(scales, want_scales)
        assert (q.float().isnan() == x.isnan()).all()
        back = dequantize(q, scales, (rows, 128))
        spread = want_scales.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
        good = ~x.isnan()
        # e4m3 has 3 bits of mantissa, and 2^-10 is half its smallest step
        assert ((back - x).abs() <= x.abs() * 2**-4 + spread * 2**-10)[good].all()


def test_special_values() -> None:
    x = torch.zeros(6, 128)
    x[1, 3] = float("inf")
    x[1, 4] = 5.0
    x[2] = float("nan")
    x[3, 0], x[3, 1] = float("nan"), 448.0
    x[4, 0] = 1e-45
    x[5, 7] = -HUGE
    q, scales = quantize_1x128(x)
    assert scales.isfinite().all() and (scales >= TINY).all()
    assert scales[0] == 1 and q[0].float().eq(0).all()
    assert q[1, 3].float() == 448
    assert q[2].float().isnan().all() and scales[2] == 1
    assert q[3, 0].float().isnan() and q[3, 1].float() == 448 and scales[3] == 1
    assert q[5, 7].float() == -448
    _, powers = quantize_1x128(torch.tensor([[448.0], [449.0], [1.0], [1e-44], [HUGE]]), power_of_two=True)
    assert powers.flatten().tolist() == [1.0, 2.0, 2.0**-8, TINY, 2.0**120]


def test_quantised_weights_survive(seed: int) -> None:
    w = torch.randn(200, 300)
    q, scales = quantize_128x128(w)
    once = dequantize(q, scales, (128, 128), torch.bfloat16)
    q2, scales2 = quantize_128x128(dequantize(q, scales, (128, 128)))
    assert torch.equal(q2.float(), q.float())
    torch.testing.assert_close(scales2, scales, atol=0, rtol=2**-22)
    assert torch.equal(dequantize(q2, scales2, (128, 128), torch.bfloat16), once)
    powers, by_two = quantize_128x128(w, power_of_two=True)
    exact = dequantize(powers, by_two, (128, 128))
    assert torch.equal(dequantize(*quantize_128x128(exact, power_of_two=True), (128, 128)), exact)


def exact(q: Tensor, scales: Tensor, rows: int) -> Tensor:
    return dequantize(q, scales, (rows, 128), torch.float64)


@pytest.mark.parametrize(("M", "N", "K"), [(5, 130, 300), (1, 1, 1), (0, 4, 7), (64, 128, 256)])
def test_gemms_against_float64(seed: int, M: int, N: int, K: int) -> None:
    a, b = torch.randn(M, K), torch.randn(N, K)
    (aq, a_s), (bq, b_s) = quantize_1x128(a), quantize_128x128(b)
    want = exact(aq, a_s, 1) @ exact(bq, b_s, 128).t()
    torch.testing.assert_close(fp8_gemm(aq, a_s, bq, b_s, torch.float32).double(), want, atol=1e-4, rtol=1e-5)
    assert fp8_gemm(aq, a_s, bq, b_s).dtype == torch.bfloat16
    torch.testing.assert_close(fp8_gemm(aq, a_s, bq, b_s).double(), want, atol=1e-4, rtol=2**-8)
    if M * N > 100:
        plain = (a.double() @ b.double().t()).flatten()
        assert 1 - torch.nn.functional.cosine_similarity(want.flatten(), plain, dim=0) < 1e-3
    y = torch.randn(M, N)
    (yq, y_s), (xq, x_s) = quantize_1x128(y.t().contiguous()), quantize_1x128(a.t().contiguous())
    got = fp8_gemm_wgrad(yq, y_s, xq, x_s)
    assert got.shape == (N, K) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact(yq, y_s, 1) @ exact(xq, x_s, 1).t(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("counts", [[3, 0, 150, 1], [0, 0, 0, 0], [0, 130, 0, 0]])
def test_grouped_gemms(seed: int, counts: list[int]) -> None:
    E, P, N, K = len(counts), sum(counts), 131, 140
    x, w, grad, n = torch.randn(P, K), torch.randn(E, N, K), torch.randn(P, N), torch.tensor(counts)
    xq, x_s = quantize_1x128(x)
    experts = [quantize_128x128(w[e]) for e in range(E)]
    y = fp8_grouped_gemm(xq, x_s, torch.stack([q for q, _ in experts]), torch.stack([s for _, s in experts]), n)
    (gq, g_s), (tq, t_s) = quantize_1x128(grad.t().contiguous()), quantize_1x128(x.t().contiguous())
    dw = fp8_grouped_gemm_wgrad(gq, g_s, tq, t_s, n)
    assert y.shape == (P, N) and dw.shape == (E, N, K)
    main = torch.randn(E, N, K)
    added = main.clone()
    fp8_grouped_gemm_wgrad_(added, gq, g_s, tq, t_s, n)
    torch.testing.assert_close(added, main + dw)
    dense = torch.ones(N, K)
    fp8_gemm_wgrad_(dense, gq, g_s, tq, t_s)
    torch.testing.assert_close(dense, 1 + fp8_gemm_wgrad(gq, g_s, tq, t_s))
    start = 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        want = exact(xq, x_s, 1)[rows] @ exact(*experts[e], 128).t()
        torch.testing.assert_close(y[rows].double(), want, atol=1e-4, rtol=2**-8)
        want = exact(gq, g_s, 1)[:, rows] @ exact(tq, t_s, 1)[:, rows].t()
        torch.testing.assert_close(dw[e].double(), want, atol=1e-3, rtol=1e-4)
        start += count


def test_linear(seed: int) -> None:
    x, w = leaf(2, 70, 150), leaf(135, 150)
    y = fp8_linear(x, w)
    xq, wq = quantize_1x128(x.flatten(0, 1)), quantize_128x128(w)
    torch.testing.assert_close(y.flatten(0, 1).double(), exact(*xq, 1) @ exact(*wq, 128).t(), atol=1e-3, rtol=1e-4)
    up = torch.randn(2, 70, 135)
    dx, dw = torch.autograd.grad((y * up).sum(), (x, w))
    upq, upt = quantize_1x128(up.flatten(0, 1)), quantize_1x128(up.flatten(0, 1).t().contiguous())
    xt = quantize_1x128(x.flatten(0, 1).t().contiguous())
    torch.testing.assert_close(dx.flatten(0, 1).double(), exact(*upq, 1) @ exact(*wq, 128), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(dw.double(), exact(*upt, 1) @ exact(*xt, 1).t(), atol=1e-3, rtol=1e-4)
    plain = torch.autograd.grad((x @ w.t() * up).sum(), (x, w))
    for got, want in zip((dx, dw), plain):
        assert 1 - torch.nn.functional.cosine_similarity(got.flatten(), want.flatten(), dim=0) < 2e-3
    for leaves, want in (((x.detach(), w), dw), ((x, w.detach()), dx)):
        (alone,) = torch.autograd.grad((fp8_linear(*leaves) * up).sum(), [y for y in leaves if y.requires_grad])
        assert torch.equal(alone, want)
    with torch.no_grad():
        assert torch.equal(fp8_linear(x, w), y)
        assert fp8_linear(x[0, 0], w).shape == (135,)


def test_library_checks_and_compile(seed: int) -> None:
    # opcheck's comparison knows no float8; the operators are checked for everything else.
    checks = ("test_autograd_registration", "test_faketensor")
    for op in (torch.ops.r1.quantize_1x128.default, torch.ops.r1.quantize_128x128.default):
        torch.library.opcheck(op, (torch.randn(3, 130), False), test_utils=checks)
    (aq, a_s), (bq, b_s) = quantize_1x128(torch.randn(3, 130)), quantize_128x128(torch.randn(5, 130))
    for op, args in (
        (torch.ops.r1.dequantize.default, (aq, a_s, 1, 128, torch.float32)),
        (torch.ops.r1.dequantize.default, (bq.t(), b_s.t(), 128, 128, torch.float32)),
        (torch.ops.r1.quantize_both.default, (torch.randn(3, 130), False)),
        (torch.ops.r1.swiglu_quantize.default, (torch.randn(3, 260), torch.rand(3), True, False)),
        (torch.ops.r1.fp8_gemm.default, (aq, a_s, bq, b_s, torch.bfloat16)),
        (torch.ops.r1.fp8_gemm_wgrad.default, (aq, a_s, aq, a_s, torch.float32)),
        (
            torch.ops.r1.fp8_grouped_gemm.default,
            (aq, a_s, bq[None], b_s[None], torch.tensor([3]), torch.bfloat16),
        ),
        (
            torch.ops.r1.fp8_grouped_gemm_wgrad.default,
            (aq, a_s, aq, a_s, torch.tensor([30, 100]), torch.float32),
        ),
    ):
        torch.library.opcheck(op, args, test_utils=checks)

    def both(x: Tensor, w: Tensor) -> Tensor:
        return fp8_gemm(*quantize_1x128(x), *quantize_128x128(w), torch.float32)

    x, w = torch.randn(3, 130), torch.randn(5, 130)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), both(x, w))
    x, w = leaf(3, 130), leaf(5, 130)
    linear = torch.compile(fp8_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(linear(x, w), fp8_linear(x, w))
    want = torch.autograd.grad(fp8_linear(x, w).sum(), (x, w))
    torch.testing.assert_close(torch.autograd.grad(linear(x, w).sum(), (x, w)), want)


def test_bad_input() -> None:
    bad = lambda match: pytest.raises(ValueError, match=match)
    q, s = quantize_1x128(torch.randn(3, 130))
    with bad(r"x_MK is a \(3,\) tensor"):
        quantize_1x128(torch.randn(3))
    with bad(r"w_NK is a \(3, 3\) tensor of int64"):
        quantize_128x128(torch.zeros(3, 3, dtype=torch.int64))
    with bad(r"block is \(64, 64\), wanted \(1, 128\) or \(128, 128\)"):
        dequantize(q, s, (64, 64))
    with bad(r"scales is a \(3, 2\) tensor.*wanted a float32 \(1, 2\) tensor"):
        dequantize(q, s, (128, 128))
    with bad(r"a_q_MK is a \(3, 130\) tensor of float32"):
        fp8_gemm(q.float(), s, q, s)
    with bad("b_s is"):
        fp8_gemm(q, s, q, s)
    with bad(r"out_NK is a \(3, 4\) tensor of float32 on cpu, wanted a contiguous floating \(3, 3\) tensor"):
        fp8_gemm_wgrad_(torch.zeros(3, 4), q, s, q, s)
    with bad(r"out_ENK is a \(1, 3, 3\) tensor of int64"):
        fp8_grouped_gemm_wgrad_(torch.zeros(1, 3, 3, dtype=torch.int64), q, s, q, s, torch.tensor([130]))
    with bad(r"b_q_NK is a \(1, 3, 130\) tensor"):
        fp8_gemm(q, s, q[None], s[None])
    with bad(r"b_q_ENK is a \(3, 130\) tensor.*wanted an \(2, N, K\)"):
        fp8_grouped_gemm(q, s, q, s, torch.tensor([1, 2]))
    with bad(r"weights_M is a \(3,\) tensor of int64"):
        swiglu_quantize(torch.randn(3, 4), torch.ones(3, dtype=torch.int64))
    with bad("tokens_per_expert_E is"):
        fp8_grouped_gemm_wgrad(q, s, q, s, torch.tensor([1, 2]))
    with bad(r"weight_NK is a \(2, 5\)"):
        fp8_linear(torch.randn(3, 4), torch.randn(2, 5))
