"""Packed attention and paged decoding against one softmax a row in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1.kernels import append_kv, gqa_decode, mla_attention, mla_decode, numerics
from r1.kernels.mla import reference
from tests.kernels.helpers import check_operator, leaf, ragged

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("on_cpu")
NAN = float("nan")


def eager(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, rope: Tensor | None, index: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Softmax row by row of the whole (T, S) matrix, masked to own sequence and past."""
    N, M, S = q.shape[1], k.shape[1], k.shape[0]
    if rope is not None:
        k = torch.cat([k, rope[:, None].expand(-1, M, -1)], -1)
    k, v = k.repeat_interleave(N // M, 1), v.repeat_interleave(N // M, 1)
    own = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(S) if index is None else index
    seen = (own[index][:, None] == own) & (torch.arange(S) <= index[:, None])
    scores = torch.einsum("tnd,snd->nts", q, k).mul(scale).masked_fill(~seen, -torch.inf)
    return torch.einsum("nts,snd->tnd", scores.softmax(-1), v), scores.logsumexp(-1).t()


CASES = [
    # lengths, N, M, D, Dv, Dr
    ([5, 1, 17, 0, 16, 2], 3, 3, 6, 4, 2),
    ([1], 1, 1, 4, 4, 0),
    ([33, 31, 32, 64, 65], 4, 2, 8, 8, 0),
    ([7, 7, 7], 2, 2, 5, 9, 3),
    ([0, 0], 2, 1, 4, 4, 0),
    ([40], 6, 1, 4, 3, 0),
]


@pytest.mark.parametrize(("lengths", "N", "M", "D", "Dv", "Dr"), CASES)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("small_blocks", [False, True])
def test_attention(
    seed: int, lengths: list[int], N: int, M: int, D: int, Dv: int, Dr: int, dtype: torch.dtype, small_blocks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if small_blocks:
        monkeypatch.setattr(reference, "SCORES_PER_BLOCK", 1)
        monkeypatch.setattr(reference, "MIN_BLOCK", 8)
    S = sum(lengths)
    q, k, v = leaf(S, N, D, dtype=dtype), leaf(S, M, D - Dr, dtype=dtype), leaf(S, M, Dv, dtype=dtype)
    rope = leaf(S, Dr, dtype=dtype) if Dr else None
    leaves = [x for x in (q, k, v, rope) if x is not None]
    out, lse = mla_attention(q, k, v, ragged(*lengths), max(lengths), 0.3, k_rope_SD=rope, return_lse=True)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    want, want_lse = eager(*wide[:3], lengths, 0.3, wide[3] if Dr else None, None)
    tolerance = {"atol": 1e-11, "rtol": 1e-10} if dtype == F64 else {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(out.double(), want, **tolerance)
    torch.testing.assert_close(lse.double(), want_lse, **tolerance)
    up = torch.randn(S, N, Dv, dtype=F64)
    got = torch.autograd.grad((out * up).sum(), leaves)
    for a, b in zip(got, torch.autograd.grad((want * up).sum(), wide)):
        torch.testing.assert_close(a.double(), b, **tolerance)
    again = torch.autograd.grad(
        (mla_attention(*leaves[:3], ragged(*lengths), max(lengths), 0.3, k_rope_SD=rope) * up).sum(), leaves
    )
    assert all(torch.equal(a, b) for a, b in zip(got, again))


@pytest.mark.parametrize("ways", [1, 2, 4])
def test_attention_of_context_parallel_ranks(seed: int, ways: int) -> None:
    """The zigzag parts of all ranks, over all keys, make up the whole: outputs and gradients."""
    lengths = [5, 19, 1, 0, 7]
    S, N, M, D, Dr, Dv = sum(lengths), 4, 2, 6, 2, 5
    q, k, v, rope = (
        leaf(S, N, D, dtype=F64),
        leaf(S, M, D - Dr, dtype=F64),
        leaf(S, M, Dv, dtype=F64),
        leaf(S, Dr, dtype=F64),
    )
    want, want_lse = mla_attention(q, k, v, ragged(*lengths), 19, 0.4, k_rope_SD=rope, return_lse=True)
    chunks = torch.arange(S).chunk(2 * ways) if ways > 1 else (torch.randperm(S), torch.arange(0))
    out, lse = torch.zeros_like(want), torch.zeros_like(want_lse)
    for rank in range(ways):
        index = torch.cat([chunks[rank], chunks[2 * ways - 1 - rank]])
        part, part_lse = mla_attention(
            q[index], k, v, ragged(*lengths), 19, 0.4, k_rope_SD=rope, query_index_T=index, return_lse=True
        )
        out, lse = out.index_add(0, index, part), lse.index_add(0, index, part_lse)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    up = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad((out * up).sum(), (q, k, v, rope)), torch.autograd.grad((want * up).sum(), (q, k, v, rope))
    ):
        torch.testing.assert_close(a, b)


def test_a_sequence_is_alone(seed: int) -> None:
    """NaN in one sequence does not reach the others."""
    lengths = [6, 9, 8]
    q, k, v = (torch.randn(23, 2, 4) for _ in range(3))
    clean = mla_attention(q, k, v, ragged(*lengths), 9, 0.5)
    for x in (k, v):
        x[6:15] = NAN
    dirty = mla_attention(q, k, v, ragged(*lengths), 9, 0.5)
    torch.testing.assert_close(dirty[:6], clean[:6])
    torch.testing.assert_close(dirty[15:], clean[15:])


def test_gradcheck(seed: int) -> None:
    q, k, v, rope = leaf(7, 2, 4, dtype=F64), leaf(7, 1, 3, dtype=F64), leaf(7, 1, 2, dtype=F64), leaf(7, 1, dtype=F64)
    call = lambda q, k, v, rope: mla_attention(q, k, v, ragged(4, 3), 4, 0.7, k_rope_SD=rope)
    assert torch.autograd.gradcheck(call, (q, k, v, rope))


def test_bf16(seed: int) -> None:
    q, k, v = (torch.randn(12, 2, 8).bfloat16() for _ in range(3))
    out = mla_attention(q, k, v, ragged(5, 7), 7, 0.3)
    want, _ = eager(q.double(), k.double(), v.double(), [5, 7], 0.3, None, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), want, atol=2**-8, rtol=2**-7)


def paged(B: int, lengths: list[int], block_size: int, *inner: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A cache full of NaN but for the tokens of B sequences in shuffled blocks; table entries past the end are wild."""
    pages = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(pages) + 3)
    table = torch.full((B, max(pages) + 2), -77777, dtype=torch.int32)
    cache, rows, used = torch.full((sum(pages) + 3, block_size, *inner), NAN), [], 0
    for b, n in enumerate(lengths):
        table[b, : pages[b]] = order[used : used + pages[b]].int()
        used += pages[b]
        rows.append(torch.randn(n, *inner))
        if n:
            append_kv(cache, rows[b], table[b : b + 1].expand(n, -1), torch.arange(n))
    return cache, table, rows


def test_mla_decode(seed: int) -> None:
    lengths, N, R, Dr = [5, 16, 0, 17, 1, 33], 3, 6, 2
    cache, table, rows = paged(len(lengths), lengths, 16, R + Dr)
    q = torch.randn(len(lengths), N, R + Dr)
    out = mla_decode(q, cache, table, torch.tensor(lengths).int(), 0.3, R)
    for b, kv in enumerate(rows):
        want = (q[b] @ kv.t() * 0.3).softmax(-1) @ kv[:, :R] if len(kv) else torch.zeros(N, R)
        torch.testing.assert_close(out[b], want, atol=1e-5, rtol=1e-5)
    empty = mla_decode(q[:0], cache, table[:0], torch.zeros(0, dtype=torch.int32), 0.3, R)
    assert empty.shape == (0, N, R)
    nothing = mla_decode(q, cache, table, torch.zeros(6, dtype=torch.int32), 0.3, R)
    assert nothing.eq(0).all()


def test_a_batch_changed_in_place_is_another_batch(seed: int) -> None:
    """How a batch lies is found once for all layers of a step; it is known by what it holds."""
    lengths, R = [70, 9, 70, 150, 64], 5
    cache, table, _ = paged(5, lengths, 4, R + 3)
    lens, q = torch.tensor(lengths).int(), torch.randn(5, 2, R + 3)
    for change in (lambda: lens.sub_(3), lambda: table.copy_(table[[2, 1, 0, 3, 4]]), lambda: cache.mul_(2)):
        before = mla_decode(q, cache, table, lens, 0.3, R)
        change()
        after = mla_decode(q, cache, table, lens, 0.3, R)  # at once: nothing else has been asked for in between
        alone = [mla_decode(q[b : b + 1], cache, table[b : b + 1], lens[b : b + 1], 0.3, R) for b in range(5)]
        torch.testing.assert_close(after, torch.cat(alone))
        assert not torch.equal(after, before)


def test_what_is_kept_of_a_batch_is_not_the_callers(seed: int) -> None:
    """Exact numerics read the lengths themselves; these have changed when an equal batch comes."""
    lengths, R = [40, 37], 5
    cache, table, _ = paged(2, lengths, 4, R + 3)
    lens, q = torch.tensor(lengths).int(), torch.randn(2, 2, R + 3)
    with numerics("exact"):
        want = mla_decode(q, cache, table, lens, 0.3, R)
        lens.fill_(3)
        assert torch.equal(mla_decode(q, cache, table, torch.tensor(lengths).int(), 0.3, R), want)


def test_gqa_decode_agrees_with_attention(seed: int) -> None:
    lengths, N, M, D = [9, 4, 20], 4, 2, 6
    (k_cache, table, k), (v_cache, v_table, v) = (paged(3, lengths, 4, M, D) for _ in range(2))
    v_cache = torch.full_like(k_cache, NAN)  # the same blocks for values as for keys
    for b, n in enumerate(lengths):
        append_kv(v_cache, v[b], table[b : b + 1].expand(n, -1), torch.arange(n))
    q = torch.randn(3, N, D)
    out = gqa_decode(q, k_cache, v_cache, table, torch.tensor(lengths), 0.3)
    last = torch.tensor(lengths).cumsum(0) - 1
    want = mla_attention(q, torch.cat(k), torch.cat(v), ragged(*lengths), 20, 0.3, query_index_T=last)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_append_kv(seed: int) -> None:
    cache, table = torch.zeros(4, 2, 3), torch.tensor([[3, 1], [0, -5]], dtype=torch.int32)
    rows = torch.randn(2, 3)
    append_kv(cache, rows, table, torch.tensor([3, 1]))
    assert torch.equal(cache[1, 1], rows[0]) and torch.equal(cache[0, 1], rows[1]) and cache.ne(0).sum() == 6
    before = cache.clone()
    append_kv(cache, rows, table, torch.tensor([-1, 0]))
    assert torch.equal(cache[0, 0], rows[1])
    cache[0, 0] = 0
    assert torch.equal(cache, before)


def test_library_checks_and_compile(seed: int) -> None:
    cu = ragged(4, 2)
    tensors = leaf(6, 2, 4), leaf(6, 2, 3), leaf(6, 2, 2), leaf(6, 1)
    check_operator(lambda q, k, v, r: mla_attention(q, k, v, cu, 4, 0.5, k_rope_SD=r), *tensors)
    index = torch.tensor([0, 3, 5])
    check_operator(
        lambda q, k, v: mla_attention(q, k, v, cu, 4, 0.5, query_index_T=index),
        leaf(3, 2, 4),
        leaf(6, 1, 4),
        leaf(6, 1, 4),
    )
    cache, table, _ = paged(2, [3, 5], 4, 6)
    lens = torch.tensor([3, 5]).int()
    check_operator(lambda q: mla_decode(q, cache, table, lens, 0.5, 4), torch.randn(2, 3, 6))
    k_cache, table, _ = paged(2, [3, 5], 4, 1, 6)
    check_operator(lambda q: gqa_decode(q, k_cache, k_cache, table, lens, 0.5), torch.randn(2, 3, 6))

    def write(cache: Tensor, rows: Tensor) -> Tensor:
        append_kv(cache, rows, table, lens)
        return cache.nan_to_num().sum()

    clean = torch.zeros(k_cache.shape)
    check_operator(write, clean.clone(), torch.randn(2, 1, 6))


def test_bad_input() -> None:
    bad = lambda match: pytest.raises(ValueError, match=match)
    q, cu = torch.randn(6, 4, 8), ragged(6)
    kv = q[:, :2]
    with bad(r"k_SMD is a \(6, 3, 8\) tensor .*wanted a \(S, M, 8\) tensor whose M divides 4"):
        mla_attention(q, q[:, :3], q[:, :3], cu, 6, 1.0)
    with bad(r"v_SMDv is a \(5, 2, 8\)"):
        mla_attention(q, kv, kv[:5], cu, 6, 1.0)
    with bad("q_TND is .*wanted T = S = 6 without query_index_T"):
        mla_attention(q[:3], kv, kv, cu, 6, 1.0)
    with bad("query_index_T is"):
        mla_attention(q, kv, kv, cu, 6, 1.0, query_index_T=torch.arange(5))
    with bad("cu_seqlens is a .* tensor of float32"):
        mla_attention(q, kv, kv, cu.float(), 6, 1.0)
    with bad(r"cu_seqlens is \[0, 4\], wanted 0 first, 6, the keys, last, and no step down"):
        mla_attention(q, kv, kv, ragged(4), 6, 1.0)
    with bad("k_SMD is .*wanted the type and device of q_TND"):
        mla_attention(q, kv.double(), kv, cu, 6, 1.0)
    cache, table, lens = torch.randn(3, 4, 8), torch.zeros(6, 2).int(), torch.ones(6).int()
    with bad("latent_rank is 9, wanted 1..8"):
        mla_decode(q, cache, table, lens, 1.0, 9)
    with bad("seq_lens_B holds 9, wanted at most the table's 2 pages x 4 = 8"):
        mla_decode(q, cache, table, lens * 9, 1.0, 8)
    with bad(r"kv_cache is a \(3, 4, 7\)"):
        mla_decode(q, cache[..., :7], table, lens, 1.0, 4)
    with bad("block_table_BM is"):
        mla_decode(q, cache, table[:2], lens, 1.0, 4)
    with bad("positions_B holds 8, wanted less than the table's 2 pages x 4 = 8"):
        append_kv(cache, q[:, 0], table, lens.long() * 8)
    with bad(r"rows is a \(6, 7\)"):
        append_kv(cache, q[:, 0, :7], table, lens)
