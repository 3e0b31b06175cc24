"""The mla family's Triton kernels against float64, interpreted where there is no GPU, and compiled for Hopper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from r1.bench._ahead_of_time import compiled
from r1.kernels import append_kv, gqa_decode, mla_attention, mla_decode, numerics
from r1.kernels.mla import reference, triton_exact, triton_paged
from r1.kernels.mla import triton as mla
from tests.kernels import interpreter  # noqa: F401 (mends the interpreter)
from tests.kernels.helpers import assert_fits, check_operator, leaf, ragged, same_as_plain

F64, HALF, F32 = torch.float64, torch.bfloat16, torch.float32
NAN = float("nan")


class Problem:
    """q, k, v and perhaps k_rope of a pack, as a model has them: k and v are parts of one tensor."""

    def __init__(
        self, device: str, lengths: list[int], N: int, M: int, own: int, rope: int, value: int,
        dtype: torch.dtype = HALF, queries: Tensor | None = None,
    ) -> None:  # fmt: skip
        S = sum(lengths)
        self.lengths, self.cu, self.scale = lengths, ragged(*lengths).to(device), (own + rope) ** -0.5
        self.index = queries if queries is None else queries.to(device)
        T = S if queries is None else len(queries)
        normal = lambda *size: torch.randn(*size).to(device).to(dtype)
        k, v = normal(S, M, own + value).split([own, value], -1)
        self.leaves = [normal(T, N, own + rope), k, v] + ([normal(S, rope)] if rope else [])
        self.up = normal(T, N, value)

    def run(self, leaves: list[Tensor] | None = None, **options: Any) -> list[Tensor]:
        """out, lse, and the gradients."""
        leaves = [x.detach().requires_grad_() for x in leaves or self.leaves]
        rope = leaves[3] if len(leaves) > 3 else None
        out, lse = mla_attention(
            *leaves[:3], self.cu, max(self.lengths, default=0), self.scale, k_rope_SD=rope, query_index_T=self.index,
            return_lse=True, **options,
        )  # fmt: skip
        return [out.detach(), lse, *torch.autograd.grad(out, leaves, self.up)]

    def eager(self, dtype: torch.dtype) -> list[Tensor]:
        """The whole matrix of scores, in this type."""
        leaves = [x.detach().to(dtype).requires_grad_() for x in self.leaves]
        q, k, v = leaves[:3]
        N, M, S = q.shape[1], k.shape[1], k.shape[0]
        if len(leaves) > 3:
            k = torch.cat([k, leaves[3][:, None].expand(-1, M, -1)], -1)
        k, v = k.repeat_interleave(N // M, 1), v.repeat_interleave(N // M, 1)
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        own = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(q.device)
        row = torch.arange(S, device=q.device)
        index = row if self.index is None else self.index
        seen = (own[index][:, None] == own) & (row <= index[:, None])
        scores = torch.einsum("tnd,snd->nts", q, k).mul(self.scale).masked_fill(~seen, -torch.inf)
        out = torch.einsum("nts,snd->tnd", scores.softmax(-1), v)
        lse = scores.detach().logsumexp(-1).t()
        return [out.detach(), lse, *torch.autograd.grad(out, leaves, self.up.to(dtype))]

    def check(self) -> list[Tensor]:
        got, exact, plain = self.run(), self.eager(F64), self.eager(self.up.dtype)
        # A score's gradient is probability * (up . v - up . out): both products reach this size before they cancel.
        largest = lambda x: x.float().abs().max().item() if x.numel() else 0.0
        product = largest(self.up.float().norm(dim=-1)) * largest(self.leaves[2].float().norm(dim=-1))
        terms = {"dq": self.leaves[1:], "dk": self.leaves[:1], "dk_rope": self.leaves[:1]}
        for name, a, b, c in zip(("out", "lse", "dq", "dk", "dv", "dk_rope"), got, plain, exact, strict=False):
            assert a.shape == c.shape and a.dtype == (F32 if name == "lse" else self.up.dtype), name
            factor = max([largest(x) for x in terms.get(name, [])], default=0.0)
            same_as_plain(a, b, c, name, more=torch.finfo(F32).eps * self.scale * product * factor)
        return got


CASES = [
    # lengths, N, M, own width of k, of its rope part, of v
    ([127, 128, 1, 129, 0, 2], 2, 2, 5, 3, 9),
    ([63, 64, 65, 66], 4, 2, 8, 0, 8),
    ([1], 1, 1, 4, 0, 4),
    ([0, 0], 2, 1, 4, 2, 4),
    ([130], 2, 2, 128, 64, 128),
    ([70, 33], 2, 1, 128, 0, 128),
    ([257], 3, 1, 64, 0, 64),
    ([40, 31], 1, 1, 192, 0, 128),
    ([20], 4, 2, 140, 0, 100),
    ([3], 24, 24, 16, 8, 16),
    ([2] * 70 + [0, 0, 3], 2, 2, 16, 0, 16),
]
GPU_CASES = [([1000, 24, 3073, 4000], 16, 16, 128, 64, 128), ([5000, 3192], 14, 2, 64, 0, 64)]
marked = lambda mark, cases: [pytest.param(*case, marks=mark) for case in cases]
gpu_cases, slow_cases = marked(pytest.mark.gpu, GPU_CASES), marked(pytest.mark.slow, [([3], 128, 128, 16, 8, 16)])


@pytest.mark.parametrize(("lengths", "N", "M", "own", "rope", "value"), [*CASES, *gpu_cases, *slow_cases])
def test_attention(device: str, lengths: list[int], N: int, M: int, own: int, rope: int, value: int) -> None:
    Problem(device, lengths, N, M, own, rope, value).check()


FLOAT_CASES = [case for case in CASES if case[3] <= 32 and len(case[0]) < 9 and case[1] < 9]


@pytest.mark.parametrize(
    ("lengths", "N", "M", "own", "rope", "value"), [*FLOAT_CASES, ([40, 70], 2, 2, 32, 16, 32), ([9], 2, 1, 40, 0, 30)]
)
def test_attention_in_float32(device: str, lengths: list[int], N: int, M: int, own: int, rope: int, value: int) -> None:
    Problem(device, lengths, N, M, own, rope, value, F32).check()


def test_attention_in_float16(device: str) -> None:
    Problem(device, [40, 20], 2, 2, 16, 8, 16, torch.float16).check()


@pytest.mark.parametrize("ways", [2, 4, 1])
def test_queries_of_a_context_parallel_rank(device: str, ways: int) -> None:
    """Any rows of the stream: zigzag parts, or (1) all of them shuffled and some twice. They have the bits that they
    have in the whole stream; the keys' gradients add up to the whole's."""
    lengths = [5, 140, 1, 0, 30]
    S = sum(lengths)
    whole = Problem(device, lengths, 2, 1, 12, 4, 8)
    out, lse, dq, *_ = whole.run()
    chunks = torch.arange(S).chunk(2 * ways)
    parts = [torch.cat([chunks[r], chunks[2 * ways - 1 - r]]) for r in range(ways)]
    if ways == 1:
        parts = [torch.cat([torch.randperm(S), torch.tensor([7, 7])])]
    sums = [torch.zeros(x.shape, dtype=F64, device=device) for x in whole.leaves[1:]]
    for index in parts:
        rank = Problem(device, lengths, 2, 1, 12, 4, 8, queries=index)
        index = index.to(device)
        rank.leaves, rank.up = [whole.leaves[0][index], *whole.leaves[1:]], whole.up[index]
        got = rank.check()
        for name, a, b in zip(("out", "lse", "dq"), got, (out, lse, dq)):
            assert torch.equal(a, b[index]), name
        for total, part in zip(sums, got[3:], strict=True):
            total += part
    if ways > 1:
        for total, exact in zip(sums, whole.eager(F64)[3:], strict=True):
            torch.testing.assert_close(total, exact, atol=3e-2, rtol=2e-2)


def test_queries_of_no_sequence(device: str) -> None:
    problem = Problem(device, [4, 5], 2, 1, 8, 0, 8, queries=torch.tensor([8, -3, 2, 50]))
    out, lse, dq, dk, dv = problem.run()
    for x in (out, lse, dq):
        assert x[[1, 3]].eq(0).all() and x[[0, 2]].ne(0).any()
    some = Problem(device, [4, 5], 2, 1, 8, 0, 8, queries=torch.tensor([8, 2]))
    some.leaves, some.up = [problem.leaves[0][[0, 2]], *problem.leaves[1:]], problem.up[[0, 2]]
    assert all(torch.equal(a, b) for a, b in zip(some.run()[3:], (dk, dv)))
    none = Problem(device, [4, 5], 2, 1, 8, 0, 8, queries=torch.arange(0))
    assert [x.shape[0] for x in none.run()] == [0, 0, 0, 9, 9] and all(x.eq(0).all() for x in none.run())


def test_a_sequence_has_the_same_bits_alone_and_in_every_pack(device: str) -> None:
    """And again when it is run again, and whatever stands in its neighbours, NaN included."""
    lengths = [70, 131, 3]
    problem = Problem(device, lengths, 2, 1, 16, 8, 16)
    got = problem.run()
    assert all(torch.equal(a, b) for a, b in zip(got, problem.run()))
    assert all(torch.equal(a, b) for a, b in zip(got, problem.run(deterministic=False)))
    parts = list(zip(*(x.split(lengths) for x in (*problem.leaves, problem.up))))
    want = list(zip(*(x.split(lengths) for x in got)))
    for order in ([1], [2], [2, 1, 0]):
        pack = Problem(device, [lengths[s] for s in order], 2, 1, 16, 8, 16)
        *pack.leaves, pack.up = (torch.cat(x) for x in zip(*(parts[s] for s in order)))
        pieces = zip(*(x.split([lengths[s] for s in order]) for x in pack.run()))
        for s, piece in zip(order, pieces, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(piece, want[s], strict=True)), (order, s)
    for x in (*problem.leaves, problem.up):
        x[70:201] = NAN
    for a, b in zip(problem.run(), got, strict=True):
        assert torch.equal(a[:70], b[:70]) and torch.equal(a[201:], b[201:]) and a[70:201].isnan().all()


@pytest.mark.parametrize(
    ("lengths", "N", "M", "own", "rope", "value"), [([20, 9], 2, 1, 16, 8, 16), *marked(pytest.mark.gpu, GPU_CASES)]
)
def test_the_same_bits_50_times(
    device: str, lengths: list[int], N: int, M: int, own: int, rope: int, value: int
) -> None:
    problem = Problem(device, lengths, N, M, own, rope, value)
    first = problem.run()
    for _ in range(49):
        assert all(torch.equal(a, b) for a, b in zip(problem.run(), first))


def test_any_strides(device: str) -> None:
    problem = Problem(device, [33, 9], 4, 2, 16, 8, 16)
    got = problem.run()
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in problem.leaves]
    problem.cu = torch.stack([problem.cu.long(), problem.cu.long() * 0 - 1], 1)[:, 0]
    problem.up = problem.up.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(torch.equal(a, b) for a, b in zip(problem.run(turned), got))
    problem.up = problem.up[:, :, :1].expand(-1, -1, 16)
    want = problem.run()
    problem.up = problem.up.contiguous()
    assert all(torch.equal(a, b) for a, b in zip(problem.run(), want))


def test_workspace_grows_with_the_length_alone(device: str) -> None:
    class Total(torch.utils._python_dispatch.TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            result = op(*args, **(kwargs or {}))
            if op.namespace == "aten" and "empty" in op.name():
                self.bytes += result.numel() * result.element_size()
            return result

    totals = []
    for length in (256, 512):
        problem = Problem(device, [length], 1, 1, 16, 8, 16)
        with Total() as total:
            problem.run()
        totals.append(total.bytes)
    per_row = 2 * (16 + 24 + 16 + 16 + 8) + 4 * 3  # out, dq, dk, dv, dk_rope; lse twice, and grad x out
    assert totals[1] - totals[0] <= 256 * per_row + 64, totals


def test_what_the_kernels_do_not_do_is_computed_by_the_torch_backend(device: str) -> None:
    options = [(F64, 0.3, 8, 8), (F32, -0.3, 8, 8), (HALF, 0.0, 8, 8), (HALF, 0.3, 200, 8), (F32, 0.3, 8, 33)]
    for dtype, scale, own, value in options:
        problem = Problem(device, [4, 3], 2, 1, own, 0, value, dtype)
        problem.scale = scale
        out, lse = reference.mla_attention(*problem.leaves, None, problem.cu, 4, None, scale, True)
        rest = (problem.cu, 4, None, scale, True)
        grads = reference.mla_attention_backward(problem.up, *problem.leaves, None, out, lse, *rest)
        assert all(torch.equal(a, b) for a, b in zip(problem.run(), (out, lse, *grads)))


# --------------------------------------------------------------------------------------------------------------- decode


def paged(device: str, lengths: list[int], page: int, dtype: torch.dtype, *inner: int) -> tuple:
    """A cache full of NaN but for the tokens of each sequence in shuffled pages; the table's tail is wild."""
    pages = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(pages) + 3)
    table = torch.full((len(lengths), max(pages) + 2), -77777, dtype=torch.int32)
    cache, rows, used = torch.full((sum(pages) + 3, page, *inner), NAN, dtype=dtype), [], 0
    for b, n in enumerate(lengths):
        table[b, : pages[b]] = order[used : used + pages[b]].int()
        used += pages[b]
        rows.append(torch.randn(n, *inner).to(dtype))
        for i in range(n):
            cache[table[b, i // page], i % page] = rows[b][i]
    return cache.to(device), table.to(device), [x.to(device) for x in rows]


def of_one(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Heads (N, D) against (L, M, D) keys, in q's type."""
    k, v = (x.to(q.dtype).repeat_interleave(len(q) // x.shape[1], 1) for x in (k, v))
    if not len(k):
        return q.new_zeros(len(q), v.shape[2])
    return torch.einsum("nl,lnd->nd", (torch.einsum("nd,lnd->nl", q, k) * scale).softmax(-1), v)


@pytest.mark.parametrize("dtype", [HALF, F32], ids=str)
@pytest.mark.parametrize(
    ("N", "R", "rope", "page", "lengths"),
    [
        (3, 6, 2, 16, [5, 16, 0, 17, 1, 33, 200]),
        (70, 32, 8, 64, [64, 65, 129]),
        (2, 512, 64, 32, [40]),
        pytest.param(128, 512, 64, 64, [5000, 0, 1, 2048, 4097, 64], marks=pytest.mark.gpu),
    ],
)
def test_mla_decode(
    device: str, N: int, R: int, rope: int, page: int, lengths: list[int], dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if device == "cpu":
        monkeypatch.setattr(triton_paged, "SPLIT", 64)
    cache, table, rows = paged(device, lengths, page, dtype, R + rope)
    q, lens = torch.randn(len(lengths), N, R + rope).to(dtype).to(device), torch.tensor(lengths).int().to(device)
    out = mla_decode(q, cache, table, lens, 0.1, R)
    for b, kv in enumerate(rows):
        results = (of_one(q[b].to(kind), kv[:, None], kv[:, None, :R], 0.1) for kind in (dtype, F64))
        same_as_plain(out[b], *results, f"sequence {b}")
    one = slice(1, 2)
    assert torch.equal(mla_decode(q[one], cache, table[one], lens[one], 0.1, R), out[one])
    assert out.dtype == dtype and out[lens == 0].eq(0).all()
    wider = torch.cat([table, torch.full_like(table, 2**30)], 1).long()
    assert torch.equal(mla_decode(q, cache, wider, lens.long(), 0.1, R), out)
    assert mla_decode(q, cache, table, lens * 0, 0.1, R).eq(0).all()
    assert mla_decode(q[:0], cache, table[:0], lens[:0], 0.1, R).shape == (0, N, R)
    assert mla_decode(q, cache, table[:, :0], lens * 0, 0.1, R).eq(0).all()


@pytest.mark.parametrize("dtype", [HALF, F32], ids=str)
@pytest.mark.parametrize(
    ("N", "M", "D", "value", "page"), [(4, 2, 6, 10, 4), (40, 2, 64, 64, 16), (1, 1, 128, 128, 64)]
)
def test_gqa_decode(
    device: str, N: int, M: int, D: int, value: int, page: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_paged, "SPLIT", 128)
    lengths = [9, 0, 64, 150, 129]
    cache, table, rows = paged(device, lengths, page, dtype, M, D + value)
    k_cache, v_cache = cache.split([D, value], -1)
    q, lens = torch.randn(len(lengths), N, D).to(dtype).to(device), torch.tensor(lengths).int().to(device)
    out = gqa_decode(q, k_cache, v_cache, table, lens, 0.2)
    for b, kv in enumerate(rows):
        results = (of_one(q[b].to(kind), *kv.split([D, value], -1), 0.2) for kind in (dtype, F64))
        same_as_plain(out[b], *results, f"sequence {b}")
    one = slice(3, 4)
    assert torch.equal(gqa_decode(q[one], k_cache, v_cache, table[one], lens[one], 0.2), out[one])


EXACT_CASES = [
    # lengths, N, M, width of q and k, of v, whether k and v are one latent
    ([3, 0, 67, 1], 3, 1, 24, 16, True),
    ([3, 0, 67, 1], 4, 2, 12, 20, False),
    pytest.param([2500, 0, 1, 100], 70, 1, 576, 512, True, marks=pytest.mark.gpu),
    pytest.param([2500, 0, 1, 100], 16, 4, 128, 128, False, marks=pytest.mark.gpu),
]


@pytest.mark.parametrize("dtype", [HALF, F32], ids=str)
@pytest.mark.parametrize(("lengths", "N", "M", "D", "value", "latent"), EXACT_CASES)
def test_exact_numerics_trains_as_it_decodes(
    device: str, lengths: list[int], N: int, M: int, D: int, value: int, latent: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every row of the pack, whichever others are computed beside it, has the bits of decoding it over a cache."""
    if device == "cpu":
        monkeypatch.setattr(triton_paged, "SPLIT", 64)
    elif dtype == F32 and value > triton_paged.WIDEST_DECODED[4]:
        pytest.skip("as wide as that only in 16 bits")
    problem = Problem(device, lengths, N, M, D, 0, value, dtype)
    if latent:
        problem.leaves[2] = problem.leaves[1][..., :value]
    (q, k, v), S = problem.leaves, sum(lengths)
    starts = problem.cu[:-1].long()
    some = torch.cat([torch.randperm(S)[: S // 4], torch.tensor([-2, S])]).to(device)

    def attend(queries: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        return mla_attention(
            queries, k, v, problem.cu, max(lengths), problem.scale, query_index_T=index, return_lse=True
        )

    with numerics("exact"):
        out, lse = attend(q, None)
        monkeypatch.setattr(triton_exact, "WORKSPACE", 1)
        few, few_lse = attend(q[some.clamp(0, S - 1)], some)
    assert torch.equal(few[:-2], out[some[:-2]]) and torch.equal(few_lse[:-2], lse[some[:-2]])
    assert few[-2:].eq(0).all() and few_lse[-2:].eq(-torch.inf).all()
    for a, b, c, name in zip((out, lse), problem.eager(dtype), problem.eager(F64), ("out", "lse"), strict=False):
        same_as_plain(a, b, c, name)
    size = 64 if dtype == HALF else 192
    cache, table, _ = paged(device, lengths, size, dtype, M, D + value)
    for b, n in enumerate(lengths):
        rows = torch.cat([k, v], -1)[starts[b] : starts[b] + n]
        for i in range(n):
            cache[table[b, i // size], i % size] = rows[i]
    own = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    lens = (torch.arange(S, device=device) - starts[own] + 1).int()
    with numerics("exact"):
        if latent:
            decoded = mla_decode(q, cache[:, :, 0, :D], table[own], lens, problem.scale, value)
        else:
            k_cache, v_cache = cache.split([D, value], -1)
            decoded = gqa_decode(q, k_cache, v_cache, table[own], lens, problem.scale)
    assert torch.equal(decoded, out)
    with numerics("exact"), pytest.raises(ValueError, match="a page has 32 rows, wanted a multiple of 64"):
        gqa_decode(q, k.new_empty(2, 32, M, D), v.new_empty(2, 32, M, value), table[own], lens, problem.scale)


def test_exact_numerics_has_the_gradients_of_attention(device: str) -> None:
    problem = Problem(device, [20, 0, 3, 33], 4, 2, 12, 4, 20, F32)
    with numerics("exact"):
        problem.check()


def test_decode_of_mixed_types_and_by_the_torch_backend(device: str) -> None:
    cache, table, _ = paged(device, [9, 20], 8, F32, 12)
    q, lens = torch.randn(2, 3, 12).to(HALF).to(device), torch.tensor([9, 20]).int().to(device)
    for a, b, scale in ((q, cache, 0.3), (q.float(), cache.to(HALF), 0.3), (q, cache.double(), 0.3), (q, cache, -0.3)):
        got, want = (f(a, b, table, lens, scale, 8) for f in (mla_decode, reference.mla_decode))
        torch.testing.assert_close(got, want, atol=1e-2 if a.dtype == HALF else 1e-5, rtol=1e-2)
    pages = cache.unsqueeze(2)
    got, want = (f(q, pages, pages, table, lens, 0.0) for f in (gqa_decode, reference.gqa_decode))
    assert torch.equal(got, want)


@pytest.mark.parametrize("inner", [(3,), (2, 5), (1500,)])
def test_append_kv(device: str, inner: tuple[int, ...]) -> None:
    cache = torch.randn(5, 4, *inner).to(device)
    table = torch.tensor([[3, 1], [0, -5], [0, -5], [-9, -9]], dtype=torch.int32, device=device)
    for rows in (torch.randn(4, *inner).to(device), torch.randn(inner[0], 4, *inner[1:]).to(device).transpose(0, 1)):
        if rows.shape != (4, *inner):
            continue
        for positions in ([7, 0, 3, -1], [2, 1, -4, -1]):
            for kind in (F32, HALF):
                got, want = cache.clone(), cache.clone()
                positions_B = torch.tensor(positions, device=device)
                append_kv(got, rows.to(kind), table, positions_B)
                reference.append_kv(want, rows.to(kind), table, positions_B)
                assert torch.equal(got, want) and not torch.equal(got, cache)
    append_kv(cache, rows[:0], table[:0], positions_B[:0])


# ------------------------------------------------------------------------------------------------------------- contract


def test_library_checks_and_compile(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":  # it takes many calls
        for tiles in (mla.FORWARD, mla.GRAD_QUERY, mla.GRAD_KEY):
            monkeypatch.setitem(tiles, 4, {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1})
    cu = ragged(4, 2).to(device)
    tensors = [
        x.detach().to(device).requires_grad_() for x in (leaf(6, 2, 4), leaf(6, 2, 3), leaf(6, 2, 2), leaf(6, 1))
    ]
    check_operator(lambda q, k, v, r: mla_attention(q, k, v, cu, 4, 0.5, k_rope_SD=r), *tensors)
    index = torch.tensor([0, 3, 5], device=device)
    some = [x.detach().to(device).requires_grad_() for x in (leaf(3, 2, 4), leaf(6, 1, 4), leaf(6, 1, 4))]
    check_operator(lambda q, k, v: mla_attention(q, k, v, cu, 4, 0.5, query_index_T=index), *some)
    cache, table, _ = paged(device, [3, 5], 4, F32, 6)
    lens = torch.tensor([3, 5], device=device).int()
    check_operator(lambda q: mla_decode(q, cache, table, lens, 0.5, 4), torch.randn(2, 3, 6, device=device))
    pages = cache.unsqueeze(2)
    check_operator(lambda q: gqa_decode(q, pages, pages, table, lens, 0.5), torch.randn(2, 3, 6, device=device))

    def write(cache: Tensor, rows: Tensor) -> Tensor:
        append_kv(cache, rows, table, lens)
        return cache.nan_to_num().sum()

    check_operator(write, torch.zeros_like(cache), torch.randn(2, 6, device=device))


def test_bad_input_on_a_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("on a GPU values are not looked at")
    bad = lambda match: pytest.raises(ValueError, match=match)
    q = torch.randn(6, 4, 8)
    with bad(r"cu_seqlens is \[0, 4\], wanted 0 first, 6, the keys, last, and no step down"):
        mla_attention(q, q[:, :2], q[:, :2], ragged(4), 6, 1.0)
    cache, table, lens = torch.randn(3, 4, 8), torch.zeros(6, 2).int(), torch.ones(6).int()
    with bad("seq_lens_B holds 9, wanted at most the table's 2 pages x 4 = 8"):
        mla_decode(q, cache, table, lens * 9, 1.0, 8)
    with bad("positions_B holds 8, wanted less than the table's 2 pages x 4 = 8"):
        append_kv(cache, q[:, 0], table, lens.long() * 8)


@pytest.mark.slow
def test_compiles_for_hopper_without_spills() -> None:
    binaries, _ = compiled("mla")
    streaming = {"forward_kernel", "grad_query_kernel", "grad_key_kernel"}
    assert len({b.name for b in binaries}) == 11 and streaming <= {b.name for b in binaries}
    for binary in binaries:
        # A decoded query has few heads a key in grouped attention: it reads, and multiplies 16 rows at a time.
        latents = binary.name in ("decode_kernel", "decode_fp8_kernel") and binary.constants["BLOCK_H"] >= 64
        matrix = binary.name in streaming or latents
        assert_fits(binary, uses_matrix_units=matrix)
        assert binary.name not in streaming or binary.bulk_copies, f"{binary.name} loads its tiles without bulk copies"
