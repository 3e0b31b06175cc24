"""The moe family against transformers' DeepSeek-V3 and plain loops over experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

from r1.kernels import grouped_gemm, moe_layer, moe_mlp, moe_mlp_masked, permute, route, swiglu, unpermute
from r1.kernels.moe import reference_route
from tests.kernels.helpers import check_operator, leaf

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize(
    ("E", "K", "groups", "group_top"), [(32, 4, 4, 2), (16, 3, 8, 4), (8, 2, 1, 1), (256, 8, 8, 4)]
)
def test_route_against_transformers(seed: int, E: int, K: int, groups: int, group_top: int) -> None:
    config = DeepseekV3Config(
        hidden_size=E, n_routed_experts=E, num_experts_per_tok=K, n_group=groups, topk_group=group_top,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    router = deepseek.DeepseekV3TopkRouter(config)
    router.weight = torch.nn.Parameter(torch.eye(E))  # the hidden states are the logits
    bias = torch.randn(E) * 0.2
    router.e_score_correction_bias.copy_(bias)
    logits = leaf(97, E)
    _, their_weights, their_ids = router(logits)
    ids, weights, counts = route(logits, bias, K, groups, group_top, 2.5)
    order, theirs = ids.argsort(-1), their_ids.argsort(-1)
    assert torch.equal(ids.gather(1, order), their_ids.gather(1, theirs))
    torch.testing.assert_close(weights.gather(1, order), their_weights.gather(1, theirs), atol=1e-6, rtol=1e-6)
    assert torch.equal(counts, torch.bincount(ids.flatten(), minlength=E)) and counts.sum() == 97 * K
    biased = (logits.sigmoid() + bias).gather(1, ids)
    assert (biased[:, :-1] >= biased[:, 1:]).all()
    up = torch.randn(97, E)
    (got,) = torch.autograd.grad((weights * up.gather(1, ids)).sum(), logits)
    (want,) = torch.autograd.grad((their_weights * up.gather(1, their_ids)).sum(), logits)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_route_gradients_and_replay(seed: int, score: str) -> None:
    logits, bias = leaf(11, 6, dtype=F64), torch.randn(6, dtype=F64)
    ids, weights, _ = route(logits, bias, 2, 1, 1, 1.5, score)
    assert torch.autograd.gradcheck(lambda x: route(x, bias, 2, 1, 1, 1.5, score, ids)[1], logits)
    replayed = torch.stack([torch.randperm(6)[:2] for _ in range(11)])
    again, replay_weights, counts = route(logits, bias, 2, 1, 1, 1.5, score, replayed)
    assert torch.equal(again, replayed) and torch.equal(counts, torch.bincount(replayed.flatten(), minlength=6))
    scores = (logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)).gather(1, replayed)
    torch.testing.assert_close(replay_weights, scores / scores.sum(-1, keepdim=True) * 1.5)
    same = route(logits, bias, 2, 1, 1, 1.5, score, ids)
    assert torch.equal(same[1], weights)


def test_route_ties_extremes_and_nan() -> None:
    assert route(torch.zeros(3, 8), None, 3, 1, 1, 1.0)[0].tolist() == [[0, 1, 2]] * 3
    # Equal groups: the first two of them, and in them the lower ids.
    assert route(torch.zeros(1, 8), torch.zeros(8), 3, 4, 2, 1.0)[0].tolist() == [[0, 1, 2]]
    assert route(torch.zeros(1, 4), torch.tensor([0.0, 1, 1, 0]), 3, 1, 1, 1.0)[0].tolist() == [[1, 2, 0]]
    # A bias below -1 still keeps the choice inside the chosen groups.
    bias = torch.tensor([-5.0, -5, -6, -6])
    assert route(torch.zeros(1, 4), bias, 2, 2, 1, 1.0)[0].tolist() == [[0, 1]]
    ids, weights, _ = route(torch.full((2, 4), -200.0), None, 2, 1, 1, 1.0)
    assert weights.isfinite().all()
    ids, _, counts = route(torch.full((2, 4), float("nan")), None, 2, 1, 1, 1.0)
    assert counts.sum() == 4 and ((ids >= 0) & (ids < 4)).all()
    ids, weights, counts = route(torch.zeros(0, 4), None, 2, 1, 1, 1.0)
    assert ids.shape == weights.shape == (0, 2) and counts.tolist() == [0] * 4


@pytest.mark.parametrize("E", [8, 64])
def test_route_of_few_is_route_of_many(seed: int, E: int) -> None:
    """Small problems are sorted, large ones searched: ties, of which there are many here, end alike."""
    shape = 2 * reference_route.SORTED // E, E
    logits = torch.randint(-1, 2, shape) * torch.tensor([0.0, -0.0, 1.0, 2.0]).repeat(E // 4)
    bias = torch.randint(0, 2, (E,)).float()
    many, _, _ = route(logits, bias, 3, 4, 2, 1.0)
    few = [route(row, bias, 3, 4, 2, 1.0)[0] for row in logits.split(5)]
    assert torch.equal(torch.cat(few), many)


@pytest.mark.parametrize(("T", "H", "E", "K"), [(29, 7, 5, 3), (1, 2, 9, 1), (0, 4, 3, 2), (64, 8, 1, 1)])
def test_permute_and_back(seed: int, T: int, H: int, E: int, K: int) -> None:
    x = leaf(T, H, dtype=F64)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]) if T else torch.zeros(0, K, dtype=torch.int64)
    rows, row_map, counts = permute(x, ids, E)
    flat = ids.flatten()
    assert torch.equal(row_map, flat.argsort(stable=True)) and counts.tolist() == [
        int((flat == e).sum()) for e in range(E)
    ]
    assert torch.equal(rows, x[row_map // K])
    weights = torch.rand(T, K, dtype=F64).requires_grad_()
    torch.testing.assert_close(unpermute(rows, row_map, T, K), x * K)
    torch.testing.assert_close(unpermute(rows, row_map, T, K, weights), x * weights.sum(1, keepdim=True))
    if T:
        y = leaf(T * K, H, dtype=F64)
        assert torch.autograd.gradcheck(lambda x: permute(x, ids, E)[0], x)
        assert torch.autograd.gradcheck(lambda y, w: unpermute(y, row_map, T, K, w), (y, weights))
        missing = unpermute(y[: T * K - 1], row_map[:-1], T, K)
        want = torch.zeros(T * K, H, dtype=F64).index_copy(0, row_map[:-1], y[:-1]).view(T, K, H).sum(1)
        torch.testing.assert_close(missing, want)


def eager_mlp(x: Tensor, counts: list[int], gate_up: Tensor, down: Tensor, weights: Tensor | None) -> Tensor:
    out, start = [], 0
    for e, n in enumerate(counts):
        gate, up = (x[start : start + n] @ gate_up[e]).chunk(2, -1)
        middle = gate * gate.sigmoid() * up
        if weights is not None:
            middle = middle * weights[start : start + n, None]
        out.append(middle @ down[e])
        start += n
    return torch.cat(out)


@pytest.mark.parametrize("counts", [[3, 0, 7, 1, 0], [0, 0, 0, 0, 0], [0, 11, 0, 0, 0], [2, 2, 2, 2, 2]])
@pytest.mark.parametrize("weighted", [True, False])
def test_experts(seed: int, counts: list[int], weighted: bool) -> None:
    E, H, F, P = len(counts), 6, 4, sum(counts)
    x, gate_up, down = leaf(P, H, dtype=F64), leaf(E, H, 2 * F, dtype=F64), leaf(E, F, H, dtype=F64)
    weights = torch.rand(P, dtype=F64).requires_grad_() if weighted else None
    leaves = [x, gate_up, down] + ([weights] if weighted else [])
    n = torch.tensor(counts)
    got, want = moe_mlp(x, n, gate_up, down, weights), eager_mlp(x, counts, gate_up, down, weights)
    torch.testing.assert_close(got, want)
    up = torch.randn(P, H, dtype=F64)
    grads = torch.autograd.grad((got * up).sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad((want * up).sum(), leaves)):
        torch.testing.assert_close(a, b)
    y = grouped_gemm(x, gate_up, n)
    start = 0
    for e, count in enumerate(counts):
        torch.testing.assert_close(y[start : start + count], x[start : start + count] @ gate_up[e])
        start += count
    (grad_weight,) = torch.autograd.grad(y.square().sum(), gate_up)
    assert all(grad_weight[e].eq(0).all() for e, count in enumerate(counts) if count == 0)
    if P:
        assert torch.autograd.gradcheck(lambda x, w: grouped_gemm(x, w, n), (x, gate_up))


def test_swiglu(seed: int) -> None:
    x, w = leaf(5, 3, 8, dtype=F64), leaf(5, 3, dtype=F64)
    gate, up = x.chunk(2, -1)
    torch.testing.assert_close(swiglu(x, w), torch.nn.functional.silu(gate) * up * w[..., None])
    assert torch.autograd.gradcheck(swiglu, x) and torch.autograd.gradcheck(swiglu, (x, w))
    half = x.detach().bfloat16()
    assert swiglu(half).dtype == torch.bfloat16
    torch.testing.assert_close(swiglu(half).double(), swiglu(half.double()), atol=1e-3, rtol=2**-8)
    assert swiglu(torch.zeros(0, 6)).shape == (0, 3)


def test_layer_against_transformers(seed: int) -> None:
    T, H, E, K, F = 23, 8, 6, 2, 5
    config = DeepseekV3Config(
        hidden_size=H, n_routed_experts=E, num_experts_per_tok=K, moe_intermediate_size=F, n_group=1, topk_group=1
    )
    theirs = deepseek.DeepseekV3Experts(config)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    x, logits = torch.randn(T, H), torch.randn(T, E)
    ids, weights, _ = route(logits, None, K, 1, 1, 2.5)
    want = theirs(x, ids, weights)
    rows, row_map, counts = permute(x, ids, E)
    gate_up, down = (p.detach().transpose(1, 2).contiguous() for p in (theirs.gate_up_proj, theirs.down_proj))
    inside = unpermute(moe_mlp(rows, counts, gate_up, down, weights.flatten()[row_map]), row_map, T, K)
    torch.testing.assert_close(inside, want, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        unpermute(moe_mlp(rows, counts, gate_up, down), row_map, T, K, weights), want, atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16], ids=str)
def test_main_gradients_and_masked_rows(seed: int, dtype: torch.dtype) -> None:
    """Main gradients against the ones that autograd returns; rows with room to spare against sorted ones."""
    T, H, E, K, F = 21, 12, 6, 2, 8
    x, gate_up, down = (leaf(*s).detach().to(dtype).requires_grad_() for s in ((T, H), (E, H, 2 * F), (E, F, H)))
    ids, weights = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)]), leaf(T, K)
    leaves, up = (x, weights, gate_up, down), torch.randn(T, H, dtype=dtype)
    want = torch.autograd.grad(moe_layer(x, ids, weights, gate_up, down), leaves, up)
    before = [torch.randn(y.shape, dtype=F64 if dtype == F64 else torch.float32) for y in (gate_up, down)]
    main = tuple(y.clone() for y in before)
    out = moe_layer(x, ids, weights, gate_up, down, main_gradients=main)
    got = torch.autograd.grad(out, leaves, up)
    torch.testing.assert_close(got[:2], want[:2])
    for a, b, c in zip(main, before, want[2:]):
        torch.testing.assert_close(
            (a - b).to(dtype), c, **({} if dtype != torch.float32 else {"atol": 1e-5, "rtol": 1e-4})
        )
        assert torch.equal(a[E - 1], b[E - 1])  # an expert without rows
    with pytest.raises(NotImplementedError, match="gradient has no gradient"):
        torch.autograd.grad(moe_layer(x, ids, weights, gate_up, down), leaves, up, create_graph=True)
    rows, _, counts = permute(x.detach(), ids, E)
    room = torch.full((E, int(counts.max()) + 3, H), torch.nan, dtype=dtype)
    own = torch.arange(room.shape[1]) < counts[:, None]
    room[own] = rows
    torch.testing.assert_close(moe_mlp_masked(room, counts, gate_up, down)[own], moe_mlp(rows, counts, gate_up, down))


def test_experts_under_checkpoint_and_compile(seed: int) -> None:
    """torch's checkpoint (not reentrant: saved tensors are made again) and compile, with main gradients too."""
    T, H, E, K, F = 9, 6, 3, 2, 4
    x, gate_up, down, weights = leaf(T, H), leaf(E, H, 2 * F), leaf(E, F, H), leaf(T, K)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    rows, _, counts = permute(x.detach(), ids, E)
    leaves = (x, weights, gate_up, down)
    main = (torch.zeros_like(gate_up), torch.zeros_like(down))
    layer = lambda x, w, a, b: moe_layer(x, ids, w, a, b)
    into_main = lambda x, w, a, b: moe_layer(x, ids, w, a, b, main_gradients=main)
    experts = lambda x, w, a, b: moe_mlp(x.repeat(K, 1), counts, a, b, w.flatten())
    for function in (layer, experts):
        want = torch.autograd.grad(function(*leaves).sum(), leaves)
        again = torch.utils.checkpoint.checkpoint(function, *leaves, use_reentrant=False)
        torch.testing.assert_close(torch.autograd.grad(again.sum(), leaves), want)
    want = torch.autograd.grad(layer(*leaves).sum(), leaves)
    compiled = torch.compile(into_main, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves).sum(), leaves)[:2], want[:2])
    torch.testing.assert_close(main, tuple(want[2:]))


@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_nan_ranks_last(seed: int, groups: int, dtype: torch.dtype) -> None:
    logits = torch.randn(50, 8, dtype=dtype)
    logits[:, 3], logits[:25, 6] = torch.nan, -torch.nan
    for bias in (None, torch.randn(8)):
        ids, weights, counts = route(logits, bias, 4, groups, groups, 1.0)
        assert counts[3] == 0 and counts[6] == (ids[25:] == 6).sum() and weights.isfinite().all()


def test_library_checks_and_compile(seed: int) -> None:
    T, H, E, K, F = 7, 4, 3, 2, 5

    def layer(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ids, weights, _ = route(logits, torch.zeros(E), K, 1, 1, 2.5)
        rows, row_map, counts = permute(x, ids, E)
        y = moe_mlp(rows, counts, gate_up, down, weights.flatten()[row_map])
        return unpermute(y, row_map, T, K) + unpermute(
            grouped_gemm(rows, gate_up[..., :H], counts), row_map, T, K, weights
        )

    check_operator(layer, leaf(T, H), leaf(T, E), leaf(E, H, 2 * F), leaf(E, F, H))
    check_operator(lambda x, w: swiglu(x, w), leaf(3, 2, 8), leaf(3, 2))
    check_operator(lambda x: route(x, None, 2, 1, 1, 1.0, "softmax")[1], leaf(5, 4))


def test_bad_input() -> None:
    bad = lambda match: pytest.raises(ValueError, match=match)
    x, ids = torch.randn(4, 6), torch.zeros(4, 2, dtype=torch.int64)
    with bad(r"logits_TE is a \(6,\) tensor"):
        route(x[0], None, 2, 1, 1, 1.0)
    with bad(r"bias_E is a \(4,\) tensor.*wanted a \(6,\)"):
        route(x, torch.zeros(4), 2, 1, 1, 1.0)
    with bad("num_groups is 4, wanted a divisor of the 6 experts"):
        route(x, None, 2, 4, 1, 1.0)
    with bad("group_top_k is 4, wanted 1..3"):
        route(x, None, 2, 3, 4, 1.0)
    with bad("top_k is 3, wanted 1..2, the experts that can be chosen"):
        route(x, None, 3, 3, 1, 1.0)
    with bad("score is 'tanh'"):
        route(x, None, 2, 1, 1, 1.0, "tanh")
    with bad("replay_ids_TK holds 6, wanted 0 <= id < 6"):
        route(x, None, 2, 1, 1, 1.0, replay_ids_TK=ids + 6)
    with bad("ids_TK holds -1"):
        permute(x, ids - 1, 3)
    with bad(r"ids_TK is a \(3, 2\)"):
        permute(x, ids[:3], 3)
    with bad("num_tokens is 1, wanted at least 4 rows / top_k 2"):
        unpermute(x, ids[:, 0], 1, 2)
    with bad(r"tokens_per_expert_E is \[1, 2\], wanted numbers >= 0 whose sum is the 4 rows"):
        grouped_gemm(x, torch.randn(2, 6, 3), torch.tensor([1, 2]))
    with bad(r"weight_EHF is a \(2, 5, 3\)"):
        grouped_gemm(x, torch.randn(2, 5, 3), torch.tensor([1, 3]))
    with bad("down_EFH"):
        moe_mlp(x, torch.tensor([1, 3]), torch.randn(2, 6, 8), torch.randn(2, 8, 6))
    with bad("gate_up is"):
        swiglu(torch.randn(3, 5))
