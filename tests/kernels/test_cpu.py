"""The kernels of r1._cpu under every instruction set that this processor has, against float64 by the torch backend.

tests/kernels/test_norm.py, test_moe.py and test_mla.py run through the cpu backend as well; here are shapes that are no
multiple of a vector, many rows, threads, and what could be read or written out of place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from r1.kernels import (
    append_kv,
    apply_rope,
    gqa_decode,
    mla_attention,
    mla_decode,
    moe_layer,
    moe_mlp,
    numerics,
    permute,
    rms_norm,
    route,
    swiglu,
)
from r1.kernels.moe import cpu as moe
from tests.kernels.helpers import leaf, ragged

_cpu = pytest.importorskip("r1._cpu", reason="r1._cpu is built only where a C++ compiler is found")

SEEN = 3e-6  # of the largest number: float32, and sums of some hundred products in another order


@pytest.fixture(params=_cpu.instruction_sets(), autouse=True)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[str]:
    """Every operator called runs these kernels, and memory it gets is full of NaN."""
    _cpu.use(request.param)
    monkeypatch.setenv("R1_KERNELS", "norm=cpu,moe=cpu,mla=cpu")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)
    _cpu.use(_cpu.instruction_sets()[-1])


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def close(got: Tensor, want: Tensor, tolerance: float = SEEN, size: float = 0.1) -> None:
    """`size`: of the numbers that the result is the sum of, if it is smaller."""
    got, want = got.detach(), want.detach()
    assert got.dtype == torch.float32 and got.shape == want.shape and got.isfinite().all()
    if want.numel():
        assert (got - want).abs().max() <= tolerance * max(size, float(want.abs().max()))


def compare(function: Callable[..., Any], *inputs: Any, tolerance: float = SEEN, size: float = 1.0) -> None:
    """Result and gradients against the same function in float64, which the torch backend computes. `size`: of the
    numbers that a gradient is the sum of, if it is smaller."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) if _floats(x) else x for x in inputs]
    got, want = function(*inputs), function(*wide)
    close(got, want, tolerance)
    leaves = [(x, y) for x, y in zip(inputs, wide) if _floats(x) and x.requires_grad]
    if leaves:
        # A number for every row is an expanded tensor, as a sum's gradient is.
        up = torch.randn(got.shape) if random.random() < 0.7 else torch.randn(got.shape[:-1])[..., None].expand_as(got)
        ours = torch.autograd.grad(got, [x for x, _ in leaves], up)
        theirs = torch.autograd.grad(want, [y for _, y in leaves], up.double())
        for mine, other in zip(ours, theirs, strict=True):
            close(mine, other, tolerance, size)


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (64, 128), (130, 33), (1500, 80)])
def test_rms_norm(threads: int, rows: int, width: int) -> None:
    x = leaf(rows, width)
    # dx is a difference of numbers of the size of 1 / rms(x); of one number alone, it is nearly all cancelled.
    size = x.detach().square().mean(-1).add(1e-6).rsqrt().max().clamp(min=1).item()
    compare(rms_norm, x, leaf(width), size=size)
    # A view of wider rows, as the latent is of the down projection.
    wider = leaf(rows, 2, width + 5)
    compare(lambda x, w: rms_norm(x[..., :width], w, 1e-2), wider, leaf(width), size=10.0 if width == 1 else 1.0)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(1, 1, 2), (5, 3, 6), (70, 4, 32), (900, 4, 24)])
def test_rope(threads: int, interleaved: bool, tokens: int, heads: int, width: int) -> None:
    angle = torch.randn(tokens, width // 2)
    turn = lambda x: apply_rope(x[..., 3:], angle.to(x).cos(), angle.to(x).sin(), interleaved)
    compare(turn, leaf(tokens, heads, width + 3))


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 5), (64, 64), (600, 100)])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_swiglu(threads: int, rows: int, width: int, scale: float) -> None:
    compare(swiglu, leaf(rows, 2 * width, scale=scale))
    compare(swiglu, leaf(rows, 2 * width, scale=scale), leaf(rows))
    assert swiglu(torch.empty(3, 0)).shape == (3, 0) and swiglu(torch.empty(0, 4)).shape == (0, 2)


def test_the_exponential_over_its_whole_range() -> None:
    """silu(x) = x sigmoid(x), for every size of number and what is none."""
    x = torch.cat([torch.linspace(-110, 110, 200_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38, -3e38])])
    got = swiglu(torch.stack([x, torch.ones_like(x)], -1)).squeeze(-1)
    want = torch.nn.functional.silu(x.double())
    assert ((got - want).abs() <= 4e-7 * want.abs() + 1e-36).all()
    assert swiglu(torch.tensor([[torch.nan, 1.0]])).isnan().all()
    assert swiglu(torch.tensor([[torch.inf, 1.0]])).isposinf().all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    ("T", "E", "K", "groups", "kept"), [(1, 1, 1, 1, 1), (33, 8, 2, 4, 2), (50, 24, 5, 3, 2), (700, 64, 8, 8, 4)]
)
def test_route(threads: int, score: str, T: int, E: int, K: int, groups: int, kept: int) -> None:
    bias, padding = torch.randn(E) * 0.1, torch.rand(T) < 0.2
    logits = leaf(T, E)
    ids, _, counts = route(logits, bias, K, groups, kept, 2.5, score, None, padding)
    # In float32, as a tie of rounding may be none in float64.
    want, _, load = moe.reference.route(
        logits.detach(), bias, K, groups, kept, 2.5, score, None, padding, False
    )  # fmt: skip
    scores = logits.double().sigmoid() if score == "sigmoid" else logits.double().softmax(-1)
    close((scores + bias).gather(1, ids).float(), (scores + bias).gather(1, want))  # rounding may change neighbours
    assert (ids != want).float().mean() < 0.01 and counts.sum() == load.sum() == K * (~padding).sum()
    assert torch.equal(counts, torch.bincount(ids[~padding].flatten(), minlength=E))
    assert all(len(set(row)) == K for row in ids.tolist())
    compare(lambda x: route(x, bias.to(x), K, groups, kept, 2.5, score, ids, padding)[1], logits)


def test_route_chooses_as_the_torch_backend_between_equals_and_what_is_no_number() -> None:
    logits = torch.randint(-2, 3, (400, 16)) * torch.tensor([0.0, -0.0, 1.0, torch.inf]).repeat(4)
    assert logits.isnan().any()  # 0 times infinity
    bias = torch.randint(0, 2, (16,)).float()
    for score in ("sigmoid", "softmax"):
        for groups, kept in ((1, 1), (4, 2), (8, 3)):
            arguments = logits, bias, 3, groups, kept, 1.0, score, None, None, False
            ours, theirs = moe.route(*arguments), moe.reference.route(*arguments)
            same = (ours[0] == theirs[0]).all(1)
            # Where a whole group is minus infinity, or all are, any choice is as good.
            assert same[logits.isfinite().all(1)].all() and same.float().mean() > 0.9
            assert all(len(set(row)) == 3 for row in ours[0].tolist()) and torch.equal(
                ours[2], torch.bincount(ours[0].flatten(), minlength=16)
            )


EXPERTS = [
    (0, 4, 3, 2, 1), (1, 4, 3, 1, 1), (9, 20, 7, 5, 3), (64, 128, 64, 8, 2), (300, 300, 40, 3, 2), (3000, 80, 24, 16, 4)
]  # fmt: skip


@pytest.mark.parametrize("load", ["even", "one"])
@pytest.mark.parametrize(("T", "H", "F", "E", "K"), EXPERTS)
def test_experts(threads: int, T: int, H: int, F: int, E: int, K: int, load: str) -> None:
    ids = torch.rand(T, E).argsort(1)[:, :K].contiguous()
    if load == "one":
        ids = torch.arange(K).expand(T, K).contiguous()
    weights = [leaf(E, H, 2 * F, scale=0.3), leaf(E, F, H, scale=0.3)]
    compare(lambda x, w, *rest: moe_layer(x, ids, w, *rest), leaf(T, H), leaf(T, K), *weights)
    _, _, counts = permute(torch.zeros(T, 1), ids, E)
    compare(lambda x, w, *rest: moe_mlp(x, counts, *rest, w), leaf(T * K, H), leaf(T * K), *weights)
    compare(lambda x, *rest: moe_mlp(x, counts, *rest), leaf(T * K, H), *weights)


def test_experts_add_to_main_gradients_and_none_is_made_for_who_wants_none() -> None:
    T, H, F, E, K = 40, 24, 16, 6, 2
    ids = torch.randint(0, E - 1, (T, 1)) + torch.arange(2)  # two different ones
    ids[ids == 3] = 4  # expert 3 has no rows
    x, w, up = leaf(T, H), leaf(T, K), torch.randn(T, H)
    weights = leaf(E, H, 2 * F), leaf(E, F, H)
    plain = torch.autograd.grad(moe_layer(x, ids, w, *weights), [x, w, *weights], up)
    assert plain[2][3].eq(0).all() and plain[3][3].eq(0).all()
    start = torch.randn(E, H, 2 * F), torch.randn(E, F, H)
    main = tuple(m.clone() for m in start)
    torch.autograd.grad(moe_layer(x, ids, w, *weights, main_gradients=main), [x, *weights], up)
    for got, before, added in zip(main, start, plain[2:]):
        torch.testing.assert_close(got, before + added)
        assert torch.equal(got[3], before[3])
    (alone,) = torch.autograd.grad(moe_layer(x, ids, w, *(y.detach() for y in weights)), [x], up)
    assert torch.equal(alone, plain[0])


def test_rows_do_not_depend_on_others_nor_on_threads(threads: int) -> None:
    """Bit for bit: the products of a row are summed in the same order, wherever it stands."""
    T, H, F, E, K = 500, 72, 40, 5, 2
    x, ids, w = torch.randn(T, H), torch.stack([torch.randperm(E)[:K] for _ in range(T)]), torch.rand(T, K)
    weights = torch.randn(E, H, 2 * F), torch.randn(E, F, H)
    whole = moe_layer(x, ids, w, *weights)
    some = torch.randperm(T)[:37]
    assert torch.equal(moe_layer(x[some], ids[some], w[some], *weights), whole[some])
    assert torch.equal(rms_norm(x[some], x[0]), rms_norm(x, x[0])[some])
    torch.set_num_threads(4 - threads)
    assert torch.equal(moe_layer(x, ids, w, *weights), whole)


def test_callers_in_several_threads_do_not_meet(threads: int) -> None:
    """The lock of the interpreter is open meanwhile; what a kernel keeps belongs to the thread that calls."""
    T, H, F, E, K = 400, 40, 24, 4, 2
    weights = [leaf(E, H, 2 * F, scale=0.3), leaf(E, F, H, scale=0.3)]
    inputs = [(leaf(T, H), leaf(T, K), torch.rand(T, E).argsort(1)[:, :K].contiguous()) for _ in range(8)]

    def both(x: Tensor, w: Tensor, ids: Tensor) -> list[Tensor]:
        out = moe_layer(rms_norm(x, x[0].detach()), ids, w, *weights)
        return [out.detach(), *torch.autograd.grad(out.sum(), [x, w, *weights])]

    alone = [both(*given) for given in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for mine, together in zip(alone, pool.map(lambda given: both(*given), inputs), strict=True):
                assert all(torch.equal(a, b) for a, b in zip(mine, together, strict=True))


HEADS = [(1, 1, 3, 0, 2), (4, 4, 16, 32, 32), (6, 2, 24, 0, 24), (5, 1, 7, 3, 9)]


@pytest.mark.parametrize("lengths", [[1], [5, 0, 17, 130], [33] * 9, [700]])
@pytest.mark.parametrize(("N", "M", "own", "rope", "Dv"), HEADS)
def test_attention(threads: int, N: int, M: int, own: int, rope: int, Dv: int, lengths: list[int]) -> None:
    S, bounds = sum(lengths), ragged(*lengths)
    q, kv = leaf(S, N, own + rope), leaf(S, M, own + Dv)  # keys and values are parts of wider rows
    shared = [leaf(S, rope)] if rope else []
    some = torch.randperm(S)[: S // 2 + 1]  # as a context-parallel rank's queries

    def attend(q: Tensor, kv: Tensor, *shared: Tensor, index: Tensor | None = None) -> Tensor:
        k, v = kv.split([own, Dv], -1)
        k_rope = shared[0] if shared else None
        return mla_attention(q, k, v, bounds, max(lengths), 0.4, k_rope_SD=k_rope, query_index_T=index)

    compare(attend, q, kv, *shared, tolerance=1e-5)
    compare(lambda q, *rest: attend(q[some], *rest, index=some), q, kv, *shared, tolerance=1e-5)


def test_attention_of_a_sequence_is_its_own_and_the_log_of_its_sum(threads: int) -> None:
    lengths, k, v = [40, 3, 95], torch.randn(138, 2, 20), torch.randn(138, 2, 12)
    q = torch.randn(138, 4, 20)
    out, lse = mla_attention(q, k, v, ragged(*lengths), 95, 0.3, return_lse=True)
    alone = [
        mla_attention(*part, ragged(len(part[0])), len(part[0]), 0.3)
        for part in zip(q.split(lengths), k.split(lengths), v.split(lengths))
    ]
    assert torch.equal(torch.cat(alone), out)
    scores = torch.einsum("nd,lnd->nl", q[-1].double(), k[43:].double().repeat_interleave(2, 1)) * 0.3
    close(lse[-1], scores.logsumexp(-1))


def test_attention_refuses_rows_and_bounds_out_of_range() -> None:
    q, k = torch.randn(2, 1, 4), torch.randn(5, 1, 4)
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match=f"query_index_T holds {wrong}, wanted 0 <= row < 5"):
            mla_attention(q, k, k, ragged(5), 5, 1.0, query_index_T=torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="cu_seqlens is"):
        mla_attention(q, k, k, ragged(6), 5, 1.0, query_index_T=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="cu_seqlens is"):
        mla_attention(k, k, k, torch.tensor([0, 4, 2, 5]), 5, 1.0)


def cached(lengths: list[int], size: int, *shape: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(a cache whose unused places are NaN, block table, lengths, each sequence's rows)."""
    needed = [-(-n // size) for n in lengths]
    cache = torch.full((sum(needed) + 3, size, *shape), torch.nan)
    pages = torch.randperm(len(cache)).int().split([*needed, len(cache) - sum(needed)])[: len(lengths)]
    table = torch.full((len(lengths), max(needed) + 1), -7, dtype=torch.int32)
    rows = [torch.randn(n, *shape) for n in lengths]
    for b, n in enumerate(lengths):
        table[b, : needed[b]] = pages[b]
        if n:
            append_kv(cache, rows[b], table[b].expand(n, -1), torch.arange(n))
    return cache, table, torch.tensor(lengths).int(), rows


@pytest.mark.parametrize(("N", "D", "R", "size"), [(1, 3, 2, 1), (4, 64, 32, 8), (6, 40, 23, 5), (3, 80, 80, 64)])
@pytest.mark.parametrize("lengths", [[1], [5, 0, 17, 130], [33] * 40, [20_000]])
def test_mla_decode(threads: int, N: int, D: int, R: int, size: int, lengths: list[int]) -> None:
    cache, table, lens, rows = cached(lengths, size, D)
    q = torch.randn(len(lengths), N, D)
    for scale in (0.3, -0.3):
        out = mla_decode(q, cache, table, lens, scale, R)
        for b, kv in enumerate(rows):
            scores = q[b].double() @ kv.double().t() * scale
            want = (scores.softmax(-1) @ kv[:, :R].double()) if len(kv) else torch.zeros(N, R).double()
            close(out[b], want, 1e-5)  # scores of 10 and more are rounded before the exponential


@pytest.mark.parametrize(("N", "M", "D", "Dv"), [(1, 1, 4, 4), (6, 2, 24, 24), (14, 2, 64, 64), (5, 5, 7, 9)])
def test_gqa_decode(threads: int, N: int, M: int, D: int, Dv: int) -> None:
    lengths = [3, 40, 0, 121]
    k_cache, table, lens, keys = cached(lengths, 8, M, D)
    v_cache = torch.full((*k_cache.shape[:3], Dv), torch.nan)
    values = [torch.randn(n, M, Dv) for n in lengths]
    for b, n in enumerate(lengths):
        append_kv(v_cache, values[b], table[b].expand(n, -1), torch.arange(n))
    q = torch.randn(len(lengths), N, D)
    out = gqa_decode(q, k_cache, v_cache, table, lens, 0.4)
    for b in range(len(lengths)):
        k, v = (x.double().repeat_interleave(N // M, 1) for x in (keys[b], values[b]))
        scores = torch.einsum("nd,lnd->nl", q[b].double(), k) * 0.4
        close(out[b], torch.einsum("nl,lnd->nd", scores.softmax(-1), v))


def test_caches_of_one_token_a_page_in_any_order_of_axes_and_lengths_below_0() -> None:
    """The stride of an axis of one is anything, and the tensor contiguous for torch."""
    cache = torch.randn(1, 6, 8).transpose(0, 1)
    assert cache.is_contiguous() and cache.stride(1) == 48
    table = torch.tensor([[3, 1], [2, 5]])
    q = torch.randn(2, 3, 8)
    out = mla_decode(q, cache, table, torch.tensor([2, -1]), 0.5, 5)
    kv = cache[[3, 1], 0].double()
    close(out[0], (q[0].double() @ kv.t() * 0.5).softmax(-1) @ kv[:, :5])
    assert not out[1].any()
    many = mla_decode(torch.randn(24, 8, 8), cache, table[:1].expand(24, -1), torch.full((24,), -(10**6)), 0.5, 5)
    assert not many.any()


def test_append_leaves_other_places_and_what_has_none() -> None:
    cache, table = torch.zeros(6, 4, 3), torch.tensor([[2, 5], [3, 0], [1, 4]], dtype=torch.int32)
    append_kv(torch.zeros(0, 4, 3), torch.ones(3, 3), table, torch.tensor([-1, -1, -1]))
    append_kv(cache, torch.arange(1.0, 10).view(3, 3), table, torch.tensor([6, -1, 0]))
    assert cache[5, 2].tolist() == [1, 2, 3] and cache[1, 0].tolist() == [7, 8, 9] and cache.count_nonzero() == 6


def test_pages_and_lengths_out_of_range_are_refused_and_nothing_is_written() -> None:
    cache, q = torch.zeros(6, 4, 3), torch.randn(2, 1, 3)
    table = torch.tensor([[2, 5], [3, 6]], dtype=torch.int32)
    lens = lambda *n: torch.tensor(n).int()
    mla_decode(q, cache, table, lens(8, 4), 1.0, 3)  # page 6 is not asked for
    with pytest.raises(ValueError, match="block_table_BM names a page that is not one of the cache's 6"):
        mla_decode(q, cache, table, lens(8, 5), 1.0, 3)
    with pytest.raises(ValueError, match="seq_lens_B holds 9, wanted at most the table's 2 pages x 4 = 8"):
        mla_decode(q, cache, table, lens(1, 9), 1.0, 3)
    with pytest.raises(ValueError, match="block_table_BM names a page"):
        append_kv(cache, torch.ones(2, 3), table, torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="block_table_BM names a page"):
        append_kv(cache, torch.ones(2, 3), -table, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="positions_B holds 8, wanted less than the table's 2 pages x 4 = 8"):
        append_kv(cache, torch.ones(2, 3), table, torch.tensor([0, 8]))
    beyond = 2**32  # 0 in 32 bits
    with pytest.raises(ValueError, match="block_table_BM names a page"):
        append_kv(cache, torch.ones(2, 3), table.long() + beyond, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="block_table_BM names a page"):
        mla_decode(q, cache, table.long() + beyond, lens(1, 1), 1.0, 3)
    with pytest.raises(ValueError, match="seq_lens_B holds 4294967297"):
        mla_decode(q, cache, table, torch.tensor([1, beyond + 1]), 1.0, 3)
    assert not cache.any()


def test_ids_that_are_no_experts_are_refused() -> None:
    for wrong in (-1, 4):
        ids = torch.tensor([[0, 1], [wrong, 2]])
        with pytest.raises(ValueError, match=f"ids_TK holds {wrong}, wanted 0 <= id < 4"):
            permute(torch.randn(2, 3), ids, 4)
        with pytest.raises(ValueError, match=f"ids_TK holds {wrong}, wanted 0 <= id < 4"):
            moe_layer(torch.randn(2, 3), ids, torch.ones(2, 2), torch.randn(4, 3, 4), torch.randn(4, 2, 3))


def test_other_types_large_experts_and_exact_numerics_are_the_torch_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls() -> list[Tensor]:
        torch.manual_seed(0)
        x, gate_up, down = torch.randn(9, 16), torch.randn(2, 16, 64), torch.randn(2, 32, 16)
        ids, w = torch.randint(0, 2, (9, 1)), torch.rand(9, 1)
        half = [t.bfloat16() for t in (x, gate_up, down)]
        out = [rms_norm(half[0], half[0][0]), swiglu(half[0]), moe_layer(half[0], ids, w.bfloat16(), *half[1:])]
        big = torch.randn(1, 256, 512), torch.randn(1, 256, 256)
        out.append(moe_layer(torch.randn(9, 256), ids * 0, w, *big))
        across = gate_up.transpose(1, 2).contiguous().transpose(1, 2), down
        out.append(moe_layer(x, ids, w, *across))
        with numerics("exact"):
            out += [rms_norm(x, x[0]), swiglu(x), moe_layer(x, ids, w, gate_up, down), *route(x, None, 2, 1, 1, 1.0)]
            cache, table = torch.randn(2, 64, 8), torch.tensor([[0], [1]]).int()
            out.append(mla_decode(torch.randn(2, 3, 8), cache, table, torch.tensor([5, 64]).int(), 0.2, 4))
        return out

    ours = calls()
    monkeypatch.setenv("R1_KERNELS", "torch")
    for got, want in zip(ours, calls(), strict=True):
        assert torch.equal(got, want)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="name is 'mmx', wanted one of baseline"):
        _cpu.use("mmx")
