"""The moe family's Triton kernels against float64, interpreted where there is no GPU, and compiled for Hopper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from r1.bench._ahead_of_time import compiled
from r1.kernels import (
    grouped_gemm,
    grouped_gemm_wgrad_,
    moe_layer,
    moe_mlp,
    moe_mlp_masked,
    permute,
    route,
    swiglu,
    unpermute,
)
from r1.kernels.moe import reference
from r1.kernels.moe import triton as moe
from tests.kernels import interpreter  # noqa: F401 (mends the interpreter)
from tests.kernels.helpers import assert_fits, check_operator, leaf, same_as_plain

F64 = torch.float64
HALF = torch.bfloat16


# ---------------------------------------------------------------------------------------------------------------- route


@pytest.mark.parametrize(
    ("T", "E", "K", "groups", "group_top"),
    [(37, 256, 8, 8, 4), (5, 8, 2, 1, 1), (9, 12, 3, 3, 2), (6, 160, 6, 8, 3), (3, 4, 4, 4, 4), (0, 8, 2, 1, 1)],
)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_route(
    device: str, T: int, E: int, K: int, groups: int, group_top: int, score: str, dtype: torch.dtype
) -> None:
    logits = leaf(T, E).to(device).detach().to(dtype).requires_grad_()
    bias = (torch.randn(E) * 0.05).to(device)
    padding = torch.rand(T, device=device) < 0.3
    options = (K, groups, group_top, 2.5, score, None, padding)
    ids, weights, counts = route(logits, bias, *options)
    exact = logits.detach().double()
    want_ids, want, want_counts = reference.route(exact, bias, *options, False)
    choice = (exact.sigmoid() if score == "sigmoid" else exact.softmax(-1)) + bias.double()
    if groups == 1:
        # Random float32 scores may come closer than float32 tells apart; bfloat16 ones may be equal.
        torch.testing.assert_close(choice.gather(1, ids), choice.gather(1, want_ids), atol=1e-7, rtol=1e-6)
    else:
        # Rows without equal scores: bfloat16 logits are often the same.
        apart = choice.sort(-1).values.diff(dim=-1).abs().amin(-1) > 1e-6
        assert torch.equal(ids[apart], want_ids[apart])
        assert dtype != torch.float32 or not T or E > 100 or apart.any()
    again, want, want_counts = reference.route(exact, bias, K, groups, group_top, 2.5, score, ids, padding, False)
    torch.testing.assert_close(weights.double(), want, atol=1e-6, rtol=1e-6)
    assert weights.dtype == torch.float32 and torch.equal(counts, want_counts)
    up = torch.randn(T, K, device=device)
    (grad,) = torch.autograd.grad((weights * up).sum(), logits)
    want_grad = reference.route_backward(up.double(), exact, ids, padding, 2.5, score)
    assert grad.dtype == dtype
    torch.testing.assert_close(grad.double(), want_grad, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)


def test_route_replays(device: str) -> None:
    logits = leaf(7, 6).to(device)
    replayed = torch.stack([torch.randperm(6)[:2] for _ in range(7)]).to(device)
    ids, weights, counts = route(logits, None, 2, 1, 1, 1.5, "softmax", replayed)
    chosen = logits.softmax(-1).gather(1, replayed)
    assert torch.equal(ids, replayed) and counts.tolist() == torch.bincount(replayed.flatten(), minlength=6).tolist()
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True) * 1.5)
    with pytest.raises(ValueError, match="replay_ids_TK holds 6, wanted 0 <= id < 6"):
        route(logits, None, 2, 1, 1, 1.0, "softmax", replayed * 0 + 6, check_values=True)


def test_route_ties_extremes_and_nan(device: str) -> None:
    zeros = lambda *size: torch.zeros(*size, device=device)
    assert route(zeros(3, 8), None, 3, 1, 1, 1.0)[0].tolist() == [[0, 1, 2]] * 3
    assert route(zeros(1, 8), zeros(8), 3, 4, 2, 1.0)[0].tolist() == [[0, 1, 2]]
    assert route(zeros(1, 4), torch.tensor([0.0, 1, 1, 0], device=device), 3, 1, 1, 1.0)[0].tolist() == [[1, 2, 0]]
    bias = torch.tensor([-5.0, -5, -6, -6], device=device)
    assert route(zeros(1, 4), bias, 2, 2, 1, 1.0)[0].tolist() == [[0, 1]]
    assert route(zeros(1, 2), torch.tensor([-0.0, 0.0], device=device) - 0.5, 1, 1, 1, 1.0)[0].tolist() == [[0]]
    _, weights, _ = route(torch.full((2, 4), -200.0, device=device), None, 2, 1, 1, 1.0)
    assert weights.isfinite().all()
    for groups in (1, 2):
        wrong = torch.full((2, 4), torch.nan, device=device)
        ids, _, counts = route(wrong, None, 2, groups, 1, 1.0)
        assert counts.sum() == 4 and ids.sort(-1).values.tolist() == [[0, 1]] * 2
    wrong = torch.tensor([[0.5, torch.nan, 0.0]], device=device)
    assert route(wrong, None, 2, 1, 1, 1.0)[0].tolist() == [[0, 2]]
    with pytest.raises(ValueError, match=r"logits_TE\[0, 1\] is nan, wanted a number"):
        route(wrong, None, 2, 1, 1, 1.0, check_values=True)


# -------------------------------------------------------------------------------------------------------------- permute


@pytest.mark.parametrize(("T", "H", "E", "K"), [(70, 40, 9, 3), (1, 8, 300, 1), (0, 8, 3, 2), (130, 16, 1, 1)])
def test_permute_and_back(device: str, T: int, H: int, E: int, K: int) -> None:
    x = leaf(T, H).to(device)
    x = x.detach().to(HALF).requires_grad_()
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.zeros(0, K, dtype=torch.int64)
    ids = ids.to(device)
    rows, row_map, counts = permute(x, ids, E)
    want = reference.permute(x.detach(), ids, E, False)
    for a, b in zip((rows, row_map, counts), want):
        assert torch.equal(a, b)
    weights = torch.rand(T, K, device=device).requires_grad_()
    y = leaf(T * K, H).to(device).detach().to(HALF).requires_grad_()
    for w in (None, weights):
        torch.testing.assert_close(
            unpermute(y, row_map, T, K, w).detach(), reference.unpermute(y.detach(), row_map, T, K, w).detach()
        )
        got = torch.autograd.grad(unpermute(y, row_map, T, K, w).float().square().sum(), [y] if w is None else [y, w])
        grad_out = 2 * reference.unpermute(y.detach(), row_map, T, K, w).detach()
        for a, b in zip(got, reference.unpermute_backward(grad_out, y.detach(), row_map, K, w)):
            torch.testing.assert_close(a, b.detach(), atol=1e-3, rtol=2e-2)
    if T:
        up = torch.randn(T * K, H, device=device).to(HALF)
        (grad,) = torch.autograd.grad(rows, x, up)
        assert torch.equal(grad, reference.unpermute(up, row_map, T, K, None))
        part = unpermute(y[: T * K - 1].detach(), row_map[:-1], T, K)
        assert torch.equal(part, reference.unpermute(y[: T * K - 1].detach(), row_map[:-1], T, K, None))
    with pytest.raises(ValueError, match=f"ids_TK holds {E}"):
        permute(leaf(1, 4).to(device), torch.full((1, 1), E, device=device), E, check_values=True)


# ------------------------------------------------------------------------------------------------------------- products


COUNTS = [[130, 0, 1, 77, 0, 128], [0, 0, 300], [5], [0, 0]]
GPU_COUNTS = [[1024, 0, 3000, 1, 129, 17] * 8]


@pytest.mark.parametrize("counts", [*COUNTS, *(pytest.param(c, marks=pytest.mark.gpu) for c in GPU_COUNTS)], ids=str)
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_gemm(device: str, counts: list[int], dtype: torch.dtype, transposed: bool) -> None:
    P, E = sum(counts), len(counts)
    H, F = (72, 40) if device == "cpu" else (1096, 648)
    x = leaf(P, H).to(device).to(dtype)
    weight = leaf(E, F, H).transpose(1, 2) if transposed else leaf(E, H, F)
    weight, n = weight.to(device).to(dtype), torch.tensor(counts, device=device)
    up = torch.randn(P, F, device=device).to(dtype)

    def results(x: Tensor, weight: Tensor, up: Tensor, function: Any) -> tuple[Tensor, ...]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        out = function(x, weight, n)
        return out.detach(), *torch.autograd.grad(out, (x, weight), up)

    exact = results(x.double(), weight.double(), up.double(), loop_gemm)
    plain = results(x, weight, up, loop_gemm)
    for name, a, b, c in zip(("out", "dx", "dweight"), results(x, weight, up, grouped_gemm), plain, exact):
        assert a.dtype == dtype
        same_as_plain(a, b, c, name)
        if name == "dweight":
            assert a[n == 0].eq(0).all()
    main_grad = torch.randn(E, H, F, device=device)
    want = main_grad.double() + exact[2]
    plain_sum = main_grad + plain[2].float()
    grouped_gemm_wgrad_(main_grad, x.detach(), up, n)
    same_as_plain(main_grad, plain_sum, want, "main gradient")


def loop_gemm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    parts = x.split(counts.tolist())
    return torch.cat([part @ weight[e] for e, part in enumerate(parts)])


def test_wrong_counts_reach_no_foreign_memory(device: str) -> None:
    x, weight = torch.randn(100, 16, device=device).to(HALF), torch.randn(2, 16, 24, device=device).to(HALF)
    many = torch.tensor([64, 64], device=device)
    if device == "cpu":
        with pytest.raises(
            ValueError, match=r"tokens_per_expert_E is \[64, 64\], wanted numbers >= 0 whose sum is the 100"
        ):
            grouped_gemm(x, weight, many)
        return
    plain = torch.cat([x[:64] @ weight[0], x[64:] @ weight[1]])
    torch.testing.assert_close(grouped_gemm(x, weight, many), plain, atol=0.1, rtol=0.02)


def test_gradients_of_any_strides(device: str) -> None:
    """Expanded over rows, and transposed."""
    x, weight = leaf(70, 16).to(device), leaf(2, 16, 24).to(device)
    n = torch.tensor([30, 40], device=device)
    for reduce in (lambda y: y.sum(0), lambda y: y.t() @ torch.ones(70, 1, device=device)):
        got = torch.autograd.grad((reduce(grouped_gemm(x, weight, n)) ** 2).sum(), (x, weight))
        want = torch.autograd.grad((reduce(loop_gemm(x.double(), weight.double(), n).float()) ** 2).sum(), (x, weight))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-3)


def test_an_expert_does_not_see_its_neighbours_rows(device: str) -> None:
    counts = torch.tensor([70, 33, 50], device=device)
    x, grad = (torch.randn(153, 24, device=device).to(HALF) for _ in range(2))
    x[70:103] = torch.nan
    grad[70:103] = torch.nan
    weight = torch.randn(3, 24, 24, device=device).to(HALF)
    out, wgrad = grouped_gemm(x, weight, counts), moe.grouped_gemm_wgrad(x, grad, counts)
    assert out[70:103].isnan().all() and out[:70].isfinite().all() and out[103:].isfinite().all()
    assert wgrad[1].isnan().all() and wgrad[0].isfinite().all() and wgrad[2].isfinite().all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(9, 40), (3, 5, 2050), (0, 6)], ids=str)
def test_swiglu(device: str, weighted: bool, shape: tuple[int, ...]) -> None:
    x = leaf(*shape).to(device).detach().to(HALF)
    weights = torch.rand(shape[:-1], device=device) if weighted else None
    up = torch.randn(*shape[:-1], shape[-1] // 2, device=device).to(HALF)

    def results(kind: torch.dtype, function: Any) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_()] + ([weights.double().requires_grad_()] if weighted else [])
        if weighted and kind != F64:
            leaves[1] = weights.detach().clone().requires_grad_()
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, up.to(out.dtype))]

    def plain(x: Tensor, w: Tensor | None = None) -> Tensor:
        gate, up = x.chunk(2, -1)
        out = torch.nn.functional.silu(gate) * up
        return out if w is None else (out * w[..., None]).to(x.dtype)

    for a, b, c in zip(results(HALF, swiglu), results(HALF, plain), results(F64, plain)):
        same_as_plain(a, b, c, "swiglu")


def layer_problem(device: str, T: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    H, F, E, K = 40, 24, 5, 2
    x, gate_up, down = leaf(T, H), leaf(E, H, 2 * F, scale=0.3), leaf(E, F, H, scale=0.3)
    ids = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])  # the last expert gets nothing
    weights = torch.rand(T, K)
    x, weights, gate_up, down = (y.to(device).detach().to(dtype) for y in (x, weights, gate_up, down))
    return x, ids.to(device), weights.float(), gate_up, down


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_moe_layer_and_moe_mlp(device: str, dtype: torch.dtype) -> None:
    problem = layer_problem(device, 90, dtype)
    up = torch.randn(90, 40, device=device).to(dtype)

    def results(function: Any, problem: tuple[Tensor, ...], up: Tensor) -> list[Tensor]:
        leaves = [y.detach().requires_grad_() if y.is_floating_point() else y for y in problem]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, [y for y in leaves if y.requires_grad], up)]

    def in_parts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        rows, row_map, counts = permute(x, ids, len(gate_up))
        y = moe_mlp(rows, counts, gate_up, down, weights.flatten()[row_map])
        return unpermute(y, row_map, *ids.shape)

    def plain(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(len(gate_up)):
            token, k = (ids == e).nonzero(as_tuple=True)
            gate, middle = (x[token] @ gate_up[e]).chunk(2, -1)
            middle = torch.nn.functional.silu(gate) * middle * weights[token, k, None].to(x.dtype)
            out = out.index_add(0, token, middle @ down[e])
        return out

    exact = results(plain, tuple(y.double() if y.is_floating_point() else y for y in problem), up.double())
    inexact = results(plain, problem, up)
    for function in (moe_layer, in_parts):
        for name, a, b, c in zip(
            ("out", "dx", "dw", "dgate_up", "ddown"), results(function, problem, up), inexact, exact
        ):
            same_as_plain(a, b, c, name)


@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_weight_gradients_are_added_to_main_gradients(device: str, dtype: torch.dtype) -> None:
    x, ids, weights, gate_up, down = layer_problem(device, 90, dtype)
    leaves = [y.requires_grad_() for y in (x, weights, gate_up, down)]
    rows, row_map, counts = permute(x.detach(), ids, len(gate_up))
    by_row = [rows.requires_grad_(), weights.detach().flatten()[row_map].requires_grad_(), gate_up, down]
    up = torch.randn(90, 40, device=device).to(dtype)
    up_rows = up.repeat_interleave(2, 0)
    for layer in (True, False):

        def call(main: tuple[Tensor, Tensor] | None, layer: bool = layer) -> list[Tensor]:
            if layer:
                out = moe_layer(x, ids, weights, gate_up, down, main_gradients=main)
                return list(torch.autograd.grad(out, leaves, up))
            out = moe_mlp(by_row[0], counts, gate_up, down, by_row[1], main)
            return list(torch.autograd.grad(out, by_row, up_rows))

        want = call(None)
        before = [torch.randn(y.shape, device=device) for y in (gate_up, down)]
        main = [y.clone() for y in before]
        for calls in (1, 2):
            got = call((main[0], main[1]))
            assert all(torch.equal(a, b) for a, b in zip(got[:2], want))
            for a, b, c in zip(main, before, want[2:]):
                # The sum is rounded to float32 alone, its product not even to the weights' type.
                room = 2.0**-8 if dtype == HALF else 1e-5
                torch.testing.assert_close(a - b, calls * c.float(), rtol=room, atol=room * c.abs().max().item())
    kept = [y.clone() for y in main]
    frozen = moe_layer(x, ids, weights, gate_up.detach(), down.detach(), main_gradients=tuple(main))
    (dx,) = torch.autograd.grad(frozen, (x,), up)
    assert torch.equal(dx, torch.autograd.grad(moe_layer(x, ids, weights, gate_up, down), leaves, up)[0])
    assert all(torch.equal(a, b) for a, b in zip(main, kept))
    with pytest.raises(ValueError, match=r"main_gradients\[1\] is a .* wanted a contiguous floating \(5, 24, 40\)"):
        moe_layer(x, ids, weights, gate_up, down, main_gradients=(main[0], main[0]))


@pytest.mark.parametrize("counts", [[3, 0, 8, 1, 0], [0, 0, 0, 0], [130, 128, 0, 200]], ids=str)
@pytest.mark.parametrize("dtype", [HALF, torch.float32, F64], ids=str)
def test_moe_mlp_masked(device: str, counts: list[int], dtype: torch.dtype) -> None:
    """The bits of moe_mlp, whatever lies in the rows that are nobody's."""
    E, M, H, F = len(counts), max(8, *counts), 40, 24
    x, gate_up, down = (leaf(*s).detach().to(dtype).to(device) for s in ((E, M, H), (E, H, 2 * F), (E, F, H)))
    weights, n = torch.rand(E, M, device=device), torch.tensor(counts, device=device, dtype=torch.int32)
    own = torch.arange(M, device=device) < n[:, None]
    x[~own] = torch.nan
    for w in (None, weights):
        got = moe_mlp_masked(x, n, gate_up, down, w)
        assert torch.equal(got[own], moe_mlp(x[own], n, gate_up, down, None if w is None else w[own]))
    if device == "cpu":
        with pytest.raises(ValueError, match=rf"tokens_per_expert_E is \[.*wanted numbers from 0 to the {M} rows"):
            moe_mlp_masked(x, n + M + 1, gate_up, down)


def test_a_token_has_the_same_bits_in_every_batch_and_order(device: str) -> None:
    x, ids, weights, gate_up, down = layer_problem(device, 200, HALF)
    whole = moe_layer(x, ids, weights, gate_up, down)
    order = torch.randperm(200, device=device)
    assert torch.equal(moe_layer(x[order], ids[order], weights[order], gate_up, down), whole[order])
    for rows in (order[:7], order[7:8]):
        assert torch.equal(moe_layer(x[rows], ids[rows], weights[rows], gate_up, down), whole[rows])


def test_little_is_kept_for_the_backward(device: str) -> None:
    """x (T, H), the first product (P, 2 F), and numbers per pair: what SonicMoE keeps (arXiv 2512.14080)."""
    T, H, K, F = 90, 40, 2, 24
    x, ids, weights, gate_up, down = layer_problem(device, T, HALF)
    for y in (x, gate_up, down):
        y.requires_grad_()
    kept: dict[int, int] = {}

    def pack(y: Tensor) -> Tensor:
        kept[y.data_ptr()] = y.numel() * y.element_size()
        return y

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
        moe_layer(x, ids, weights, gate_up, down)
    parameters = {y.data_ptr() for y in (gate_up, down)}
    activations = sum(size for place, size in kept.items() if place not in parameters)
    assert activations <= 2 * T * H + 4 * T * K * F + 16 * T * K + 8 * len(gate_up)


def test_library_checks_and_compile(device: str) -> None:
    logits, bias = leaf(6, 8).to(device).detach().requires_grad_(), torch.randn(8, device=device)
    check_operator(lambda x: route(x, bias, 2, 4, 2, 1.0)[1], logits)
    x, ids, weights, gate_up, down = layer_problem(device, 6, torch.float32)
    leaves = [y.requires_grad_() for y in (x, weights, gate_up, down)]
    check_operator(lambda x, w, a, b: moe_layer(x, ids, w, a, b), *leaves)
    check_operator(lambda x: permute(x, ids, 5)[0], x)
    rows, row_map, counts = permute(x.detach(), ids, 5)
    rows = rows.t().contiguous().t().requires_grad_()  # a column after the other
    check_operator(lambda x: moe_mlp(x, counts, gate_up, down), rows)
    full = torch.full_like(counts, 6)  # rows that are nobody's differ from call to call
    arguments = (x.detach()[None].repeat(5, 1, 1), full, gate_up.detach(), down.detach())
    torch.library.opcheck(torch.ops.r1.moe_mlp_masked.default, (*arguments, None))
    graph = torch.compile(moe_mlp_masked, fullgraph=True, backend="aot_eager")
    assert torch.equal(graph(*arguments), moe_mlp_masked(*arguments))
    check_operator(lambda x: swiglu(x), rows)
    check_operator(lambda x: unpermute(x, row_map, *ids.shape), rows)
    check_operator(lambda x: route(x, bias, 2, 4, 2, 1.0, replay_ids_TK=ids.t().contiguous().t())[1], logits)


def test_compiles_for_hopper_without_spills() -> None:
    binaries, _ = compiled("moe")
    products = {"grouped_gemm_kernel", "grouped_wgrad_kernel"}
    assert len({b.name for b in binaries}) == 13 and products <= {b.name for b in binaries}
    for binary in binaries:
        assert_fits(binary, uses_matrix_units=binary.name in products)
        assert binary.name not in products or binary.bulk_copies, f"{binary.name} loads its tiles without bulk copies"
