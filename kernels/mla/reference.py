"""The mla family in plain torch; decoding is in reference_decode.py.

Letters: T queries and S keys of the packed stream, N heads, M key heads, D width of q and k, G = heads x sequences of
one batch, L length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from r1.kernels import exact
from r1.kernels.backend import wide
from r1.kernels.mla.reference_decode import append_kv, gqa_decode, mla_decode

SCORES_PER_BLOCK = 2**20  # 4 MB of float32: stays in the cache of a CPU
MIN_BLOCK = 32
RAGGED = 0.75  # a batch's shortest sequence over its longest


@lru_cache(maxsize=32)
def _batches(lengths: tuple[int, ...], device: torch.device) -> list[tuple[int, int, Tensor, Tensor | None]]:
    """Sequences of like length, padded on the right into one batch: (sequences, length, rows of the stream (B L),
    places in the batch that are real, or None if all are). The rows of the real places, in order, are distinct."""
    starts, start = [], 0
    for length in lengths:
        starts.append(start)
        start += length
    batches: list[list[int]] = []
    for s in sorted(range(len(lengths)), key=lambda s: (-lengths[s], s)):
        if lengths[s] == 0:
            break
        if not batches or lengths[s] < RAGGED * lengths[batches[-1][0]]:
            batches.append([])
        batches[-1].append(s)
    result = []
    for batch in batches:
        L = lengths[batch[0]]
        first = torch.tensor([starts[s] for s in batch])[:, None]
        length_B1 = torch.tensor([lengths[s] for s in batch])[:, None]
        place = torch.arange(L)
        real = (place < length_B1).flatten()
        rows = (first + torch.minimum(place, length_B1 - 1)).flatten().to(device)
        result.append((len(batch), L, rows, None if real.all() else real.nonzero().squeeze(1).to(device)))
    return result


class _Heads:
    """Packed (T, N, D) tensors to (G, L, D) batches and back. G runs over sequences, then heads."""

    def __init__(self, sequences: int, length: int, rows: Tensor, real: Tensor | None) -> None:
        self.sequences, self.length, self.rows, self.real = sequences, length, rows, real

    def load(self, x_TND: Tensor) -> Tensor:
        x = x_TND.index_select(0, self.rows).unflatten(0, (self.sequences, self.length))
        return x.transpose(1, 2).flatten(0, 1)

    def store(self, x_GLD: Tensor, into_TND: Tensor) -> None:
        x = x_GLD.unflatten(0, (self.sequences, -1)).transpose(1, 2).flatten(0, 1)
        if self.real is None:
            into_TND.index_copy_(0, self.rows, x)
        else:
            into_TND.index_copy_(0, self.rows.index_select(0, self.real), x.index_select(0, self.real))


def checked_bounds(cu_seqlens: Tensor, S: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != S or any(a > b for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"cu_seqlens is {bounds}, wanted 0 first, {S}, the keys, last, and no step down")
    return bounds


def _work(cu_seqlens: Tensor, S: int, query_index_T: Tensor | None) -> Iterator[tuple[_Heads, _Heads, Tensor]]:
    """(queries, keys, place of each query among its sequence's keys) batch by batch."""
    bounds, device = checked_bounds(cu_seqlens, S), cu_seqlens.device
    if query_index_T is None:
        for batch in _batches(tuple(b - a for a, b in zip(bounds, bounds[1:])), device):
            heads = _Heads(*batch)
            yield heads, heads, torch.arange(heads.length, device=device)
        return
    for start, end in zip(bounds, bounds[1:]):
        mine = ((query_index_T >= start) & (query_index_T < end)).nonzero().squeeze(1)
        if len(mine):
            # In order of place, so that a block of queries sees a prefix of the keys.
            place, order = (query_index_T.index_select(0, mine) - start).sort()
            keys = torch.arange(start, end, device=device)
            yield _Heads(1, len(mine), mine[order], None), _Heads(1, end - start, keys, None), place


def _blocks(G: int, place_L: Tensor, keys: int) -> Iterator[tuple[slice, int, int, Tensor]]:
    """(queries, keys that all of them see, keys that any sees, mask of what lies between) block by block."""
    size = max(MIN_BLOCK, SCORES_PER_BLOCK // (G * keys))
    for begin in range(0, len(place_L), size):
        block = slice(begin, min(begin + size, len(place_L)))
        place = place_L[block]
        shared, end = int(place[0]) + 1, int(place[-1]) + 1
        hidden = torch.arange(shared, end, device=place.device) > place[:, None]
        yield block, shared, end, hidden


def _scores(q_GLD: Tensor, k_GLD: Tensor, block: slice, shared: int, end: int, hidden: Tensor, out: Tensor) -> Tensor:
    q = q_GLD[:, block]
    scores = out[: len(q) * q.shape[1] * end].view(len(q), q.shape[1], end)
    torch.bmm(q, k_GLD[:, :end].transpose(1, 2), out=scores)
    if shared < end:
        scores[..., shared:].masked_fill_(hidden, -torch.inf)
    return scores


def _buffer(q_GLD: Tensor, keys: int) -> Tensor:
    G, L = q_GLD.shape[:2]
    return q_GLD.new_empty(G * keys * min(L, max(MIN_BLOCK, SCORES_PER_BLOCK // (G * keys))))


def _full_keys(k_SMD: Tensor, v_SMD: Tensor, k_rope_SD: Tensor | None, N: int, dtype: torch.dtype) -> tuple:
    """Keys and values for all N heads, the shared rope part of the keys beside each head's own."""
    k, v = k_SMD.to(dtype), v_SMD.to(dtype)
    if k_rope_SD is not None:
        k = torch.cat([k, k_rope_SD.to(dtype)[:, None].expand(-1, k.shape[1], -1)], -1)
    repeat = N // k.shape[1]
    return (k, v) if repeat == 1 else (k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1))


def mla_attention(
    q_TND: Tensor,
    k_SMD: Tensor,
    v_SMD: Tensor,
    k_rope_SD: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    query_index_T: Tensor | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """(out (T, N, Dv), log-sum-exp of the scaled scores (T, N) in float32 or float64)."""
    if exact.is_exact():
        return _exact_attention(q_TND, k_SMD, v_SMD, k_rope_SD, cu_seqlens, query_index_T, scale)
    T, N, _ = q_TND.shape
    dtype = wide(q_TND)
    q = q_TND.to(dtype) * scale
    k, v = _full_keys(k_SMD, v_SMD, k_rope_SD, N, dtype)
    out_TND, lse_TN = q.new_zeros(T, N, v.shape[2]), q.new_zeros(T, N)
    for queries, keys, place in _work(cu_seqlens, len(k), query_index_T):
        q_GLD, k_GLD, v_GLD = queries.load(q), keys.load(k), keys.load(v)
        out_GLD, lse_GL = v_GLD.new_empty(*q_GLD.shape[:2], v.shape[2]), q_GLD.new_empty(*q_GLD.shape[:2], 1)
        buffer = _buffer(q_GLD, keys.length)
        for block, shared, end, hidden in _blocks(len(q_GLD), place, keys.length):
            scores = _scores(q_GLD, k_GLD, block, shared, end, hidden, buffer)
            largest = scores.amax(-1, keepdim=True)
            total = scores.sub_(largest).exp_().sum(-1, keepdim=True)
            out_GLD[:, block] = torch.bmm(scores, v_GLD[:, :end]).div_(total)
            lse_GL[:, block] = total.log_().add_(largest)
        queries.store(out_GLD, out_TND)
        queries.store(lse_GL, lse_TN.unsqueeze(-1))
    return out_TND.to(q_TND.dtype), lse_TN


def _exact_attention(
    q_TND: Tensor,
    k_SMD: Tensor,
    v_SMD: Tensor,
    k_rope_SD: Tensor | None,
    cu_seqlens: Tensor,
    query_index_T: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Every query for itself, as decoding sees it."""
    dtype, (S, M, _) = wide(q_TND), v_SMD.shape
    k, v = k_SMD.to(dtype), v_SMD.to(dtype)
    if k_rope_SD is not None:
        k = torch.cat([k, k_rope_SD.to(dtype)[:, None].expand(-1, M, -1)], -1)
    index_T = torch.arange(S, device=q_TND.device) if query_index_T is None else query_index_T
    bounds = torch.tensor(checked_bounds(cu_seqlens, S), device=q_TND.device)
    start_T = bounds[torch.searchsorted(bounds, index_T, right=True) - 1]
    place_K = torch.arange(exact.KEYS, device=q_TND.device)

    def take(x: Tensor, part: slice, first: int) -> Tensor:
        # Its own row in the place of those that a query does not see: what follows may be anything.
        rows = torch.minimum(start_T[part, None] + first + place_K, index_T[part, None])
        return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)

    q_TMGD = (q_TND.to(dtype) * scale).unflatten(1, (M, -1))
    keys, values = functools.partial(take, k), functools.partial(take, v)
    out, lse = exact.attention(q_TMGD, index_T - start_T + 1, keys, values, v.shape[2])
    return out.flatten(1, 2).to(q_TND.dtype), lse.flatten(1, 2)


def mla_attention_backward(
    grad_TND: Tensor,
    q_TND: Tensor,
    k_SMD: Tensor,
    v_SMD: Tensor,
    k_rope_SD: Tensor | None,
    out_TND: Tensor,
    lse_TN: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    query_index_T: Tensor | None,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dk_rope or an empty tensor); the scores are made again."""
    N, dtype = q_TND.shape[1], lse_TN.dtype
    q, grad = q_TND.to(dtype) * scale, grad_TND.to(dtype)
    k, v = _full_keys(k_SMD, v_SMD, k_rope_SD, N, dtype)
    # sum over the value axis of grad x out, what the softmax's gradient takes off
    offset_TN1 = (grad * out_TND).sum(-1, keepdim=True)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, place in _work(cu_seqlens, len(k), query_index_T):
        q_GLD, k_GLD, v_GLD, grad_GLD = queries.load(q), keys.load(k), keys.load(v), queries.load(grad)
        lse_GL1, offset_GL1 = queries.load(lse_TN.unsqueeze(-1)), queries.load(offset_TN1)
        if queries.real is not None:
            # Padding rows repeat a real row: with gradient 0 they add nothing.
            padding = torch.ones(queries.rows.shape, dtype=torch.bool, device=q.device)
            padding = padding.index_fill_(0, queries.real, False).view(queries.sequences, 1, -1, 1)
            for x in (grad_GLD, offset_GL1):
                x.unflatten(0, (queries.sequences, N)).masked_fill_(padding, 0)
        dq_GLD = torch.empty_like(q_GLD)
        dk_GLD, dv_GLD = torch.zeros_like(k_GLD), torch.zeros_like(v_GLD)
        scores_buffer, slope_buffer = _buffer(q_GLD, keys.length), _buffer(q_GLD, keys.length)
        for block, shared, end, hidden in _blocks(len(q_GLD), place, keys.length):
            p = _scores(q_GLD, k_GLD, block, shared, end, hidden, scores_buffer).sub_(lse_GL1[:, block]).exp_()
            dv_GLD[:, :end].baddbmm_(p.transpose(1, 2), grad_GLD[:, block])
            slope = slope_buffer[: p.numel()].view_as(p)
            torch.bmm(grad_GLD[:, block], v_GLD[:, :end].transpose(1, 2), out=slope)
            slope.sub_(offset_GL1[:, block]).mul_(p)
            dq_GLD[:, block] = torch.bmm(slope, k_GLD[:, :end])
            dk_GLD[:, :end].baddbmm_(slope.transpose(1, 2), q_GLD[:, block])
        queries.store(dq_GLD, dq)
        keys.store(dk_GLD, dk)
        keys.store(dv_GLD, dv)
    M = k_SMD.shape[1]
    if N != M:
        dk, dv = dk.unflatten(1, (M, -1)).sum(2), dv.unflatten(1, (M, -1)).sum(2)
    dk_rope = q.new_empty(0)
    if k_rope_SD is not None:
        dk, rope = dk.split([k_SMD.shape[2], k_rope_SD.shape[1]], -1)
        dk_rope = rope.sum(1)
    return (
        dq.mul_(scale).to(q_TND.dtype),
        dk.to(k_SMD.dtype).contiguous(),
        dv.to(v_SMD.dtype),
        dk_rope if k_rope_SD is None else dk_rope.to(k_rope_SD.dtype),
    )


__all__ = [
    "append_kv",
    "gqa_decode",
    "mla_attention",
    "mla_attention_backward",
    "mla_decode",
]
