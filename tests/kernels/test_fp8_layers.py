"""What writes FP8 for a layer, and the layers: against float64, and moe_mlp in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r1.kernels import (
    QuantizedInput,
    dequantize,
    fp8_gemm,
    fp8_gemm_wgrad,
    fp8_linear,
    fp8_moe_mlp,
    fp8_rms_norm,
    fp8_swiglu,
    moe_mlp,
    quantize_128x128,
    quantize_both,
    quantize_weight,
    rms_norm,
    rms_norm_quantize,
    swiglu,
    swiglu_backward_quantize,
    swiglu_quantize,
)
from tests.kernels.helpers import leaf
from tests.kernels.test_fp8 import same

F64 = torch.float64


def within_a_step(got: tuple[Tensor, ...], want: Tensor) -> None:
    """Both copies of a matrix: e4m3 has 3 bits of mantissa, and 2^-10 of a scale is half its smallest step; float32's
    last bits may be other ones."""
    for (q, scales), exact in ((got[:2], want), (got[2:], want.t())):
        back = dequantize(q, scales, dtype=F64)
        spread = scales.double().repeat_interleave(128, 1)[:, : exact.shape[1]]
        assert back.shape == exact.shape
        error = (back - exact).abs() - exact.abs() * 2**-4 * (1 + 1e-4) - spread * 2**-10 * (1 + 1e-4)
        assert (error <= 0).all(), error.max()


def check_weight(device: str) -> None:
    for shape in ((130, 257), (3, 5, 300), (2, 2, 129, 128), (0, 4), (2, 0, 5), (0, 3, 4)):
        for dtype in (torch.float32, torch.bfloat16):
            weight = torch.randn(*shape, device=device).to(dtype)
            for source in (weight, weight.mT.contiguous().mT):
                q, scales, across = quantize_weight(source)
                assert q.shape == shape and same(across.transpose(-1, -2), q)
                matrices = zip(*(y.reshape(-1, *y.shape[-2:]) for y in (weight, q, scales))) if weight.numel() else ()
                for matrix, got, got_scales in matrices:
                    want, want_scales = quantize_128x128(matrix)
                    assert same(got, want) and torch.equal(got_scales, want_scales)


def check_swiglu_backward(device: str, M: int, F: int) -> None:
    gate_up = torch.randn(M, 2 * F, dtype=F64) * 2.0 ** torch.randint(-4, 5, (M, 1))
    grad, weights = torch.randn(M, F, dtype=F64), torch.rand(M, dtype=F64)
    for dtype, scale, power_of_two in (
        (torch.float32, None, False),
        (torch.bfloat16, None, False),
        (torch.bfloat16, weights, True),
    ):
        x, g = gate_up.to(device, dtype), grad.to(device, dtype)
        w = None if scale is None else scale.to(device, torch.float32)
        exact = [None if y is None else y.double().cpu().requires_grad_() for y in (x, w)]
        leaves = [y for y in exact if y is not None]
        want, *want_weights = torch.autograd.grad(swiglu(*exact), leaves, g.double().cpu())
        for source in (x, x.t().contiguous().t()):
            *copies, grad_weights = swiglu_backward_quantize(g, source, w, power_of_two)
            within_a_step([y.cpu() for y in copies], want)
            assert grad_weights.dtype == torch.float32 and len(grad_weights) == (0 if w is None else M)
            if w is not None:
                terms = (g.double() * swiglu(x.double())).abs().sum(1).cpu()
                assert ((grad_weights.cpu().double() - want_weights[0]).abs() <= 1e-5 * terms).all()
            again = swiglu_backward_quantize(g, source, w, power_of_two)
            assert all(same(a, b) for a, b in zip(again, (*copies, grad_weights)))


def check_rms_norm(device: str, M: int, H: int) -> None:
    x = (torch.randn(M, H) * 2.0 ** torch.randint(-9, 9, (M, 1))).to(device)
    weight = torch.rand(H, device=device) + 0.5
    for source, power_of_two in ((x, False), (x.bfloat16(), True), (x.t().contiguous().t(), False)):
        *copies, inverse_rms = rms_norm_quantize(source, weight, 1e-5, power_of_two)
        wide = source.double()
        exact = (wide.square().mean(1, True) + 1e-5).rsqrt()
        torch.testing.assert_close(inverse_rms.double(), exact, atol=0, rtol=1e-6)
        # What is quantised is made of the inverse that is returned, in float32.
        want = quantize_both(source.float() * inverse_rms * weight, power_of_two)
        assert all(same(a, b) for a, b in zip(copies, want, strict=True))
        within_a_step([y.cpu() for y in copies], (wide * exact * weight).cpu())


def experts(
    device: str, counts: list[int], H: int, F: int, spread: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With a spread every block of the weights has a size of its own: no scale does in the place of another."""
    E, P = len(counts), sum(counts)

    def weight(N: int, K: int) -> Tensor:
        sizes = 2.0 ** torch.randint(-spread, spread + 1, (E, -(-N // 128), -(-K // 128))) * N**-0.5
        return torch.randn(E, N, K) * sizes.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :N, :K]

    leaves = [y.to(device).requires_grad_() for y in (torch.randn(P, H), weight(H, 2 * F), weight(F, H), torch.rand(P))]
    return leaves[0], torch.tensor(counts, device=device), *leaves[1:]


def by_steps(
    x: Tensor, n: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor | None, grad: Tensor
) -> list[Tensor | None]:
    """What fp8_moe_mlp and its backward are, with the quantisers' own numbers multiplied in float64."""
    counts = n.tolist()
    wide = lambda pair: dequantize(*pair, dtype=F64)
    squares = lambda ws: [dequantize(*quantize_128x128(w), (128, 128), F64) for w in ws.detach()]
    rows_by = lambda a, ws: torch.cat([rows @ w for rows, w in zip(wide(a).split(counts), ws)]).to(x.dtype)
    across = lambda a, b: torch.stack([i @ j.t() for i, j in zip(wide(a).split(counts, 1), wide(b).split(counts, 1))])
    first, second = squares(gate_up), squares(down)
    x_copies, grad_copies = quantize_both(x), quantize_both(grad)
    gate_up_PF = rows_by(x_copies[:2], first)
    middle = swiglu_quantize(gate_up_PF, weights)
    grad_middle = rows_by(grad_copies[:2], [w.t() for w in second])
    *grad_first, grad_weights = swiglu_backward_quantize(grad_middle, gate_up_PF, weights)
    return [
        rows_by(middle[:2], second),
        rows_by(grad_first[:2], [w.t() for w in first]),
        across(x_copies[2:], grad_first[2:]),
        across(middle[2:], grad_copies[2:]),
        grad_weights,
    ]


def angle(a: Tensor, b: Tensor) -> float:
    """1 - cosine."""
    a, b = a.double().flatten(), b.double().flatten()
    return float(1 - a @ b / (a.norm() * b.norm())) if b.numel() else 0.0


def results(
    function: Callable[..., Tensor], n: Tensor, leaves: list[Tensor], up: Tensor, **more: object
) -> list[Tensor]:
    out = function(leaves[0], n, *leaves[1:], **more)
    return [out.detach(), *torch.autograd.grad(out, leaves, up)]


def check_experts(device: str, counts: list[int], H: int, F: int, dtype: torch.dtype, weighted: bool) -> None:
    """Against the same steps in float64, where only a rounding at a tie may fall otherwise, then against moe_mlp: an
    e4m3 number is off by 2.6 % on average, so that a product of two has 1 - cosine of 7e-4; two of them follow one
    another forward, and four to the gradient of x."""
    for spread in (3, 0):
        x, n, gate_up, down, weights = experts(device, counts, H, F, spread)
        leaves = [y.detach().to(dtype).requires_grad_() for y in (x, gate_up, down)]
        leaves += [weights.detach().requires_grad_()] if weighted else []
        up = torch.randn(x.shape, device=device).to(dtype)
        got = results(fp8_moe_mlp, n, leaves, up)
        assert got[0].dtype == dtype and all(y.isfinite().all() for y in got)
        steps = by_steps(leaves[0], n, *leaves[1:3], leaves[3] if weighted else None, up)
        for a, b in zip(got, steps):
            assert a.shape == b.shape
            if sum(counts):
                assert angle(a, b) < 3e-4
        if sum(counts) and not spread:
            exact = results(moe_mlp, n, [y.detach().double().requires_grad_() for y in leaves], up.double())
            apart = [angle(a, b) for a, b in zip(got, exact, strict=True)]
            print("1 - cosine", *(f"{y:.1e}" for y in apart))
            assert max(apart[:4]) < 4e-3 and max(apart) < 1e-2  # the weights' is of few numbers
    for gradient in got[2:4]:
        assert gradient[n == 0].eq(0).all()
    quantized = tuple(quantize_weight(y) for y in leaves[1:3])
    with torch.no_grad():
        assert torch.equal(fp8_moe_mlp(leaves[0], n, *leaves[1:], quantized=quantized), got[0])
    before = [torch.randn(y.shape, device=device) for y in leaves[1:3]]
    main = tuple(y.clone() for y in before)
    # The weights' numbers are not read when they come quantised.
    hollow = [torch.full_like(y, torch.nan).requires_grad_() for y in leaves[1:3]]
    others = [leaves[0], *hollow, *leaves[3:]]
    again = results(fp8_moe_mlp, n, others, up, quantized=quantized, main_gradients=main)
    assert all(torch.equal(again[i], got[i]) for i in range(len(got)) if i not in (2, 3))
    for a, b, gradient, returned in zip(main, before, got[2:4], again[2:4]):
        torch.testing.assert_close((a - b).to(dtype), gradient, atol=2e-3 if a.is_cuda else 1e-4, rtol=2**-7)
        assert torch.equal(a[n == 0], b[n == 0])
        assert returned.shape == gradient.shape and returned.dtype == gradient.dtype


def check_linear(device: str) -> None:
    for M in (0, 70):
        x, w = (y.detach().to(device).requires_grad_() for y in (leaf(M, 150), leaf(135, 150)))
        up = torch.randn(M, 135, device=device)
        y = fp8_linear(x, w)
        dx, dw = torch.autograd.grad(y, (x, w), up)
        before = torch.randn(135, 150, device=device)
        main, hollow = before.clone(), torch.full_like(w, torch.nan).requires_grad_()
        again = fp8_linear(x, hollow, quantize_weight(w), main)
        more, returned = torch.autograd.grad(again, (x, hollow), up)
        assert torch.equal(again, y) and torch.equal(more, dx) and returned.shape == dw.shape
        torch.testing.assert_close(main - before, dw, atol=2e-3 if main.is_cuda else 1e-4, rtol=1e-4)
        with pytest.raises(NotImplementedError, match="the gradient of an FP8 layer has no gradient"):
            torch.autograd.grad(fp8_linear(x, w), (x, w), up, create_graph=True)


def check_quantized_input(
    device: str,
    shape: tuple[int, ...],
    make: Callable[..., QuantizedInput],
    copies_of: Callable[..., tuple[Tensor, ...]],
    plain: Callable[..., Tensor],
    *others: Tensor,
) -> None:
    """Two linears on one input that exists in FP8 alone: products of the quantiser's own copies, and the gradient that
    they give it led on as the plain function's in float64 would."""
    sources = [y.detach().to(device).requires_grad_() for y in (leaf(*shape), *others)]
    given = make(*sources)
    width = given.x.shape[-1]
    assert given.x.shape[:-1] == shape[:-1] and given.x.dtype == sources[0].dtype
    assert given.x.isnan().all() and given.x.untyped_storage().nbytes() == given.x.element_size()
    weights = [leaf(n, width).detach().to(device).requires_grad_() for n in (135, 40)]
    ups = [torch.randn(*shape[:-1], len(w), device=device) for w in weights]
    outs = [fp8_linear(given, w) for w in weights]
    got = torch.autograd.grad(outs, [*sources, *weights], ups)
    copies = copies_of(*(y.detach().reshape(-1, shape[-1]) if y is sources[0] else y.detach() for y in sources))
    back = torch.zeros(copies[0].shape, dtype=F64, device=device)
    for w, up, out, dw in zip(weights, ups, outs, got[len(sources) :], strict=True):
        q, scales, across = quantize_weight(w)
        grads = quantize_both(up.reshape(-1, len(w)))
        assert torch.equal(out.reshape(-1, len(w)), fp8_gemm(*copies[:2], q, scales, torch.float32))
        assert torch.equal(dw, fp8_gemm_wgrad(*grads[2:], *copies[2:]))
        back += fp8_gemm(*grads[:2], across, scales.t(), torch.float32).double()
    exact = [y.detach().double().requires_grad_() for y in sources]
    want = torch.autograd.grad(plain(*exact), exact, back.view(given.x.shape))
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
    with torch.no_grad():
        without = make(*sources)
        assert without.copies[2].numel() == 0 and torch.equal(fp8_linear(without, weights[0]), outs[0])
    with pytest.raises(ValueError, match=r"x is a \(0, 0\) tensor.*wanted copies made where gradients are enabled"):
        fp8_linear(without, weights[0])


def check_quantized_inputs(device: str) -> None:
    for shape in ((70, 150), (3, 1, 257)):
        norm = torch.rand(shape[-1]) + 0.5
        copies_of = lambda x, w: rms_norm_quantize(x, w, 1e-5)[:4]
        check_quantized_input(
            device, shape, lambda x, w: fp8_rms_norm(x, w, 1e-5), copies_of, lambda x, w: rms_norm(x, w, 1e-5), norm
        )
        wide = (*shape[:-1], 2 * shape[-1])
        check_quantized_input(device, wide, fp8_swiglu, swiglu_quantize, swiglu)


COUNTS = [[3, 0, 150, 1], [0, 0, 0, 0], [0, 130, 0, 0], [128, 256, 0, 64], [60, 30, 10, 200]]


def test_weight_both_ways(seed: int) -> None:
    check_weight("cpu")


@pytest.mark.parametrize(("M", "F"), [(130, 128), (37, 300), (1, 1), (0, 128), (0, 64), (4, 0), (129, 256)])
def test_swiglu_backward(seed: int, M: int, F: int) -> None:
    check_swiglu_backward("cpu", M, F)


@pytest.mark.parametrize(("M", "H"), [(130, 257), (1, 1), (0, 64), (37, 128)])
def test_rms_norm(seed: int, plain_torch: None, M: int, H: int) -> None:
    check_rms_norm("cpu", M, H)
    x, weight = torch.randn(M, H), torch.rand(H)
    *copies, _ = rms_norm_quantize(x, weight)
    assert all(same(a, b) for a, b in zip(copies, quantize_both(rms_norm(x, weight)), strict=True))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
def test_experts(seed: int, counts: list[int], dtype: torch.dtype, weighted: bool) -> None:
    check_experts("cpu", counts, 140, 131, dtype, weighted)


def test_linear(seed: int) -> None:
    check_linear("cpu")


def test_quantized_inputs(seed: int, plain_torch: None) -> None:
    """In float32 they are what the plain functions and fp8_linear are, bit for bit."""
    check_quantized_inputs("cpu")
    x, norm, w = leaf(70, 150), leaf(150), leaf(135, 150)
    up = torch.randn(70, 135)
    for fused, plain, sources in (
        (fp8_rms_norm, rms_norm, (x, norm)),
        (fp8_swiglu, swiglu, (leaf(70, 300),)),
    ):
        found = []
        for function in (fused, plain):
            y = fp8_linear(function(*sources), w)
            found.append((y, *torch.autograd.grad(y, (*sources, w), up)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_wanted_gradients_alone(seed: int) -> None:
    x, n, gate_up, down, weights = experts("cpu", [30, 0, 100], 70, 60)
    leaves = [x, gate_up, down, weights]
    want = torch.autograd.grad(fp8_moe_mlp(x, n, gate_up, down, weights).sum(), leaves)
    for i in range(4):
        mine = [y if i == j else y.detach() for j, y in enumerate(leaves)]
        (got,) = torch.autograd.grad(fp8_moe_mlp(mine[0], n, *mine[1:]).sum(), [mine[i]])
        assert torch.equal(got, want[i])


def test_checkpoint_compile_and_library_checks(seed: int) -> None:
    x, n, gate_up, down, weights = experts("cpu", [30, 0, 100], 70, 60)
    leaves = (x, gate_up, down, weights)
    main = (torch.zeros_like(gate_up), torch.zeros_like(down))
    plain = lambda x, a, b, w: fp8_moe_mlp(x, n, a, b, w)
    into_main = lambda x, a, b, w: fp8_moe_mlp(x, n, a, b, w, main_gradients=main)
    want = torch.autograd.grad(plain(*leaves).sum(), leaves)
    again = torch.utils.checkpoint.checkpoint(plain, *leaves, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again.sum(), leaves), want)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves).sum(), leaves), want)
    compiled = torch.compile(into_main, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    torch.testing.assert_close((got[0], got[3]), (want[0], want[3]))
    torch.testing.assert_close(main, want[1:3])
    # opcheck's comparison knows no float8; the operators are checked for everything else.
    checks = ("test_autograd_registration", "test_faketensor")
    ops = torch.ops.r1
    w, values = leaf(5, 130), (*quantize_weight(gate_up), *quantize_weight(down))
    for op, arguments in (
        (ops.quantize_weight, (torch.randn(2, 3, 130),)),
        (ops.swiglu_quantize, (torch.randn(3, 260), torch.rand(3), False, False)),
        (ops.swiglu_backward_quantize, (torch.randn(3, 130), torch.randn(3, 260), torch.rand(3), False)),
        (ops.swiglu_backward_quantize, (torch.randn(3, 130), torch.randn(3, 260), None, False)),
        (ops.rms_norm_quantize, (torch.randn(3, 130), torch.rand(130), 1e-6, False, False)),
        (ops.fp8_linear, (leaf(3, 130), w, *quantize_weight(w), None, *[None] * 4, True)),
        (ops.fp8_linear, (leaf(3, 130), w, *quantize_weight(w), torch.zeros(5, 130), *[None] * 4, False)),
        (ops.fp8_linear, (leaf(3, 130), w, *quantize_weight(w), None, *quantize_both(torch.randn(3, 130)), True)),
        (ops.fp8_rms_norm, (leaf(3, 130), leaf(130), 1e-6, True)),
        (ops.fp8_swiglu, (leaf(3, 260), False)),
        (ops.fp8_moe_mlp, (x, n, gate_up, down, weights, *values, *main, True)),
        (ops.fp8_moe_mlp, (x, n, gate_up, down, None, *values, None, None, False)),
    ):  # fmt: skip
        torch.library.opcheck(op.default, arguments, test_utils=checks)


def test_bad_input() -> None:
    bad = lambda match: pytest.raises(ValueError, match=match)
    x, n, gate_up, down = torch.randn(4, 6), torch.tensor([1, 3]), torch.randn(2, 6, 8), torch.randn(2, 4, 6)
    with bad(r"weight is a \(3,\) tensor"):
        quantize_weight(torch.randn(3))
    with bad(r"grad_MF is a \(4, 6\) tensor.*wanted a floating \(4, 3\) tensor"):
        swiglu_backward_quantize(x, x)
    with bad(r"weights_M is a \(3,\) tensor"):
        swiglu_backward_quantize(x[:, :3], x, torch.ones(3))
    with bad(r"weight_H is a \(5,\) tensor"):
        rms_norm_quantize(x, torch.ones(5))
    with bad("eps is -1, wanted a number >= 0"):
        rms_norm_quantize(x, torch.ones(6), -1)
    with bad(r"quantized\[0\] is a \(5, 6\) tensor"):
        fp8_linear(x, torch.randn(3, 6), quantize_weight(torch.randn(5, 6)))
    with bad(r"quantized is \(a .* tensor.*\), wanted the three tensors of quantize_weight"):
        fp8_linear(x, torch.randn(3, 6), quantize_weight(torch.randn(3, 6))[:2])
    with bad(r"weight_H is a \(5,\) tensor"):
        fp8_rms_norm(x, torch.ones(5))
    with bad("eps is -1, wanted a number >= 0"):
        fp8_rms_norm(x, torch.ones(6), -1)
    with bad(r"gate_up is a \(4, 5\) tensor"):
        fp8_swiglu(x[:, :5])
    with bad(r"x is a \(4, 6\) tensor.*wanted \(3, 6\) values"):
        fp8_linear(QuantizedInput(x[:3], quantize_both(x)), torch.randn(3, 6))
    with bad(r"x is a \(6, 3\) tensor.*wanted \(6, 4\) values"):
        fp8_linear(QuantizedInput(x, (*quantize_both(x)[:2], *quantize_both(x[:3])[2:])), torch.randn(3, 6))
    with bad(r"main_gradient_NK is a \(6, 3\) tensor"):
        fp8_linear(x, torch.randn(3, 6), None, torch.zeros(6, 3))
    with bad(r"down_EFH is a \(2, 4, 5\) tensor.*wanted a \(2, 4, 6\) tensor of float32"):
        fp8_moe_mlp(x, n, gate_up, down[..., :5])
    with bad(r"gate_up_EHF is a \(2, 6, 7\) tensor"):
        fp8_moe_mlp(x, n, gate_up[..., :7], down)
    with bad(r"quantized\[1\]\[2\] is a \(2, 4, 6\) tensor"):
        q, s, across = quantize_weight(down)
        fp8_moe_mlp(x, n, gate_up, down, None, (quantize_weight(gate_up), (q, s, q)))
    with bad(r"main_gradients\[0\] is a \(2, 4, 6\) tensor"):
        fp8_moe_mlp(x, n, gate_up, down, main_gradients=(down, down))
    with bad(r"main_gradients is \(a \(2, 4, 6\) tensor.*\), wanted two"):
        fp8_moe_mlp(x, n, gate_up, down, main_gradients=(down,))
    with bad(r"tokens_per_expert_E is \[1, 2\], wanted numbers >= 0 whose sum is the 4 rows"):
        fp8_moe_mlp(x, n - torch.tensor([0, 1]), gate_up, down)
