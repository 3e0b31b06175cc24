"""Exact numerics: a row has the same bits in every batch, decoded or read; and is as right as without."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from r1.kernels import (
    apply_rope,
    gqa_decode,
    grouped_gemm,
    linear_logprob,
    mla_attention,
    mla_decode,
    moe_layer,
    numerics,
    rms_norm,
    rope_tables,
    route,
    swiglu,
)
from r1.kernels.exact import product
from tests.kernels.helpers import leaf, ragged

T = 300


def check_rows(function: Callable[[Tensor], Tensor], x: Tensor, exact: Tensor | None = None) -> Tensor:
    """function's rows, alone, few, many and in another order."""
    with numerics("exact"):
        whole = function(x)
        for rows in ([0], [7], list(range(5)), torch.randperm(len(x)).tolist(), torch.randperm(len(x))[:137].tolist()):
            assert torch.equal(function(x[rows]), whole[rows]), len(rows)
    close = function(x.double()) if exact is None else exact
    torch.testing.assert_close(whole.double(), close.double(), rtol=1e-4, atol=1e-5)
    return whole


@pytest.mark.parametrize("width", [5, 64, 130])
def test_products_and_what_is_between(seed: int, width: int) -> None:
    x = torch.randn(T, width)
    weight, gate_up = torch.randn(width, 33), torch.randn(2, width, 48) * width**-0.5
    down = torch.randn(2, 24, width) * 0.2
    one = lambda y: torch.tensor([len(y)])
    check_rows(lambda y: grouped_gemm(y, weight[None].to(y.dtype), one(y)), x)
    check_rows(lambda y: swiglu(torch.cat([y, y.flip(-1)], -1)), x)
    check_rows(lambda y: rms_norm(y, torch.linspace(0.5, 2, width, dtype=y.dtype)), x)
    # Each row takes its choice of experts with it.
    ids, weights = torch.rand(T, 2).argsort(-1), torch.rand(T, 2)
    numbered = torch.cat([x, ids.float(), weights], -1)
    layer = lambda y: moe_layer(
        y[:, :width].contiguous(), y[:, width : width + 2].long(), y[:, width + 2 :].contiguous(),
        gate_up.to(y.dtype), down.to(y.dtype),
    )  # fmt: skip
    check_rows(layer, numbered)


@pytest.mark.parametrize("width", [4, 6, 32])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding(seed: int, width: int, interleaved: bool) -> None:
    x, positions = torch.randn(T, 3, width), torch.randint(0, 5000, (T,))
    numbered = torch.cat([x.flatten(1).double(), positions[:, None].double()], -1)

    def rotated(rows: Tensor) -> Tensor:
        tables = rope_tables(rows[:, -1].long(), width, 1e4)
        return apply_rope(rows[:, :-1].float().unflatten(1, (3, width)), *tables, interleaved)

    check_rows(rotated, numbered, apply_rope(x.double(), *rope_tables(positions, width, 1e4), interleaved))


@pytest.mark.parametrize("experts", [8, 12])
def test_routing(seed: int, experts: int) -> None:
    logits, bias = torch.randn(T, experts), torch.randn(experts) * 0.1
    for score in ("sigmoid", "softmax"):
        check_rows(lambda y, score=score: route(y, bias, 2, 4, 2, 2.5, score)[1], logits)


@pytest.mark.parametrize("vocabulary", [97, 640, 9000])
def test_log_probabilities(seed: int, vocabulary: int) -> None:
    hidden, weight = torch.randn(T, 24), torch.randn(vocabulary, 24)
    targets = torch.randint(vocabulary, (T,)).double()
    numbered = torch.cat([hidden.double(), targets[:, None]], -1)

    def logprobs(rows: Tensor) -> Tensor:
        h = rows[:, :-1].float().contiguous()
        return linear_logprob(h, weight, rows[:, -1].long(), 0.7)

    want = (hidden.double() @ weight.double().t() / 0.7).log_softmax(-1).gather(1, targets.long()[:, None]).squeeze(1)
    whole = check_rows(logprobs, numbered, want)
    with numerics("exact"):  # with the entropy, and without some of the rows, as a loss asks for them
        targets = targets.long()
        both, _ = linear_logprob(hidden, weight, targets, 0.7, return_entropy=True)
        some = linear_logprob(hidden, weight, targets.masked_fill(torch.arange(T) % 3 == 1, -100), 0.7)
    assert torch.equal(both, whole)
    assert torch.equal(some[torch.arange(T) % 3 != 1], whole[torch.arange(T) % 3 != 1])


def stream_of(lengths: list[int], N: int, M: int, D: int, Dv: int) -> tuple[Tensor, Tensor, Tensor]:
    S = sum(lengths)
    return torch.randn(S, N, D), torch.randn(S, M, D), torch.randn(S, M, Dv)


@pytest.mark.parametrize(
    ("N", "M", "D", "Dv"),
    [(4, 1, 36, 24), (4, 2, 16, 16), (3, 3, 8, 5), (2, 1, 64, 64), (6, 2, 16, 21), (2, 2, 65, 64)],
)
def test_attention(seed: int, N: int, M: int, D: int, Dv: int) -> None:
    lengths = [1, 31, 32, 33, 70, 2]
    q, k, v = stream_of(lengths, N, M, D, Dv)
    bounds = ragged(*lengths)
    want = mla_attention(q.double(), k.double(), v.double(), bounds, max(lengths), 0.3)
    with numerics("exact"):
        out, lse = mla_attention(q, k, v, bounds, max(lengths), 0.3, return_lse=True)
        torch.testing.assert_close(out.double(), want, rtol=1e-4, atol=1e-5)
        for s, length in enumerate(lengths):
            part = slice(int(bounds[s]), int(bounds[s + 1]))
            alone, own = mla_attention(q[part], k[part], v[part], ragged(length), length, 0.3, return_lse=True)
            assert torch.equal(alone, out[part]) and torch.equal(own, lse[part])
        # What lies beyond a query is not looked at, in its sequence and in the next.
        spoilt_k, spoilt_v = k.clone(), v.clone()
        spoilt_k[80:], spoilt_v[80:] = torch.nan, torch.inf
        spoilt = mla_attention(q, spoilt_k, spoilt_v, bounds, max(lengths), 0.3)
        assert torch.equal(spoilt[:80], out[:80])
        index = torch.randperm(sum(lengths))[:50]
        few = mla_attention(q[index], k, v, bounds, max(lengths), 0.3, query_index_T=index)
        assert torch.equal(few, out[index])
        # Decoding: the last token of every sequence over pages in any order, of which the free ones hold NaN.
        pages = [-(-length // 16) for length in lengths]
        cache_k, cache_v = (torch.full((40, 16, M, width), torch.nan) for width in (D, Dv))
        table = torch.randint(0, 40, (len(lengths), max(pages) + 1)).int()
        free = torch.randperm(40)
        for s, count in enumerate(pages):
            table[s, :count], free = free[:count].int(), free[count:]
            for i in range(lengths[s]):
                at = int(table[s, i // 16]), i % 16
                cache_k[at], cache_v[at] = k[int(bounds[s]) + i], v[int(bounds[s]) + i]
        last = bounds[1:].long() - 1
        lens = torch.tensor(lengths).int()
        assert torch.equal(gqa_decode(q[last], cache_k, cache_v, table, lens, 0.3), out[last])
        none = gqa_decode(q[last], cache_k, cache_v, table, lens * 0, 0.3)
        assert torch.equal(none, torch.zeros_like(none))


@pytest.mark.parametrize("N", [1, 2, 3, 4, 16])
@pytest.mark.parametrize(("R", "D"), [(32, 48), (17, 21), (128, 160)])
def test_latent_attention_decodes_as_it_reads(seed: int, N: int, R: int, D: int) -> None:
    lengths = [5, 64, 40]
    q, stream = torch.randn(sum(lengths), N, D), torch.randn(sum(lengths), 1, D)
    bounds = ragged(*lengths)
    with numerics("exact"):
        out = mla_attention(q, stream, stream[..., :R], bounds, 64, 0.2)
        cache = torch.zeros(3, 64, D)
        for s, length in enumerate(lengths):
            cache[s, :length] = stream[int(bounds[s]) : int(bounds[s + 1]), 0]
        last = bounds[1:].long() - 1
        table = torch.arange(3).int()[:, None]
        assert torch.equal(mla_decode(q[last], cache, table, torch.tensor(lengths).int(), 0.2, R), out[last])


def test_bad_bounds_and_nothing_at_all() -> None:
    q, k, v = stream_of([10], 2, 1, 8, 8)
    with numerics("exact"):
        for bounds in ([0, 7, 5, 10], [0, 5], [1, 10]):
            with pytest.raises(ValueError, match="cu_seqlens is .*, wanted 0 first, 10, the keys, last"):
                mla_attention(q, k, v, torch.tensor(bounds).int(), 10, 1.0)
        assert mla_attention(q[:0], k[:0], v[:0], torch.tensor([0]).int(), 0, 1.0).shape == (0, 2, 8)
        assert product(q[:0, 0], torch.randn(8, 3)).shape == (0, 3)


def test_gradients_are_those_without(seed: int) -> None:
    lengths = [5, 40, 3]
    q, k, v = (y.requires_grad_() for y in stream_of(lengths, 4, 1, 12, 8))
    hidden, weight, x, gate_up, down = leaf(20, 8), leaf(30, 8), leaf(48, 6), leaf(2, 6, 10), leaf(2, 5, 6)
    targets, counts = torch.randint(30, (20,)), torch.tensor([20, 28])
    calls = [
        (lambda: mla_attention(q, k, v, ragged(*lengths), 40, 0.3), (q, k, v)),
        (lambda: linear_logprob(hidden, weight, targets), (hidden, weight)),
        (lambda: grouped_gemm(swiglu(grouped_gemm(x, gate_up, counts)), down, counts), (x, gate_up, down)),
    ]
    for call, leaves in calls:
        found = []
        for kind in ("fast", "exact"):
            with numerics(kind):
                out = call()
                torch.manual_seed(seed)
                found.append(torch.autograd.grad(out, leaves, torch.randn_like(out)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_kinds() -> None:
    with pytest.raises(ValueError, match="numerics is 'precise', wanted 'fast' or 'exact'"), numerics("precise"):
        pass
    with numerics("exact"), numerics("fast"):
        x = torch.randn(40, 64)
        assert torch.equal(grouped_gemm(x, torch.eye(64)[None], torch.tensor([40])), x @ torch.eye(64))
