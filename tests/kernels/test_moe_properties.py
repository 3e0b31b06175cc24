"""What holds of routing and permuting for any input, searched by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1.kernels import moe_layer, permute, route, sequence_balance_loss, unpermute

pytestmark = pytest.mark.usefixtures("on_cpu")


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int, int]]:
    """Logits with many ties, a bias, and (top_k, groups, groups chosen) that fit."""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    chosen = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, size * chosen if groups > 1 else size))
    T, E = draw(st.integers(0, 20)), groups * size
    number = st.integers(-3, 3).map(float)
    logits = draw(st.lists(number, min_size=T * E, max_size=T * E))
    bias = draw(st.lists(number, min_size=E, max_size=E))
    return torch.tensor(logits).view(T, E), torch.tensor(bias), (top_k, groups, chosen)


@settings(max_examples=150, deadline=None)
@given(routings())
def test_route(problem: tuple) -> None:
    logits, bias, (top_k, groups, chosen) = problem
    T, E = logits.shape
    ids, weights, counts = route(logits, bias, top_k, groups, chosen, 2.0)
    assert counts.sum() == T * top_k and counts.tolist() == torch.bincount(ids.flatten(), minlength=E).tolist()
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert all(len({i // (E // groups) for i in row}) <= chosen for row in ids.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.full((T,), 2.0))
    # Best first, and of equals the lower id first.
    score = (logits.sigmoid() + bias).gather(1, ids)
    for row, order in zip(score.tolist(), ids.tolist()):
        assert all(a > b or (a == b and i < j) for a, b, i, j in zip(row, row[1:], order, order[1:]))
    order = torch.randperm(T)
    assert torch.equal(route(logits[order], bias, top_k, groups, chosen, 2.0)[0], ids[order])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(1, 7), st.integers(0, 2**31))
def test_unpermute_undoes_permute(T: int, K: int, E: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, ids = torch.randn(T, 6), torch.randint(0, E, (T, K))  # an expert may be chosen twice
    rows, row_map, counts = permute(x, ids, E)
    assert counts.sum() == T * K and torch.equal(row_map.sort().values, torch.arange(T * K))
    assert torch.equal(ids.flatten()[row_map].sort().values, ids.flatten()[row_map])
    torch.testing.assert_close(unpermute(rows, row_map, T, K, torch.full((T, K), 1 / K)), x)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**31))
def test_the_order_of_tokens_changes_nothing(T: int, K: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, weights = torch.randn(T, 8, dtype=torch.float64), torch.rand(T, K, dtype=torch.float64)
    ids = torch.randint(0, 4, (T, K))
    gate_up, down = torch.randn(4, 8, 6, dtype=torch.float64), torch.randn(4, 3, 8, dtype=torch.float64)
    order = torch.randperm(T)
    whole = moe_layer(x, ids, weights, gate_up, down)
    torch.testing.assert_close(moe_layer(x[order], ids[order], weights[order], gate_up, down), whole[order])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(0, 2**31))
def test_sequence_balance_loss(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    T, E, K = sum(lengths), 6, 2
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    padding = torch.rand(T) < 0.2
    ids = route(logits, None, K, 1, 1, 1.0)[0]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    got = sequence_balance_loss(logits, ids, bounds, padding_mask_T=padding)
    for s, loss in enumerate(got):
        rows = [t for t in range(bounds[s], bounds[s + 1]) if not padding[t]]
        want = logits.new_zeros(())
        for e in range(E):
            if rows:
                f = E / (K * len(rows)) * sum(int(e in ids[t].tolist()) for t in rows)
                share = sum(logits[t, e].sigmoid() / logits[t].sigmoid().sum() for t in rows) / len(rows)
                want = want + f * share
        torch.testing.assert_close(loss, want)
    if T and not padding.all():
        assert torch.autograd.grad(got.sum(), logits)[0].isfinite().all()
