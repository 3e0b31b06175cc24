"""The mla family in Triton, for Hopper: training attention without padded values; decoding is triton_paged.py's.

Scores are in base 2 and float32, the softmax is made as the keys go by, and only the log-sum-exp is kept for the
backward, which makes the scores again: workspace grows with the length, not its square. No atomics: dq belongs to a
program over queries, dk and dv to one over keys. docs/kernels/mla.md counts the work.

float64, scales that are not positive, and widths beyond WIDEST are computed by the torch backend. Letters are those of
reference.py; BLOCK_M tiles queries, BLOCK_N keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from r1.kernels.bulk_copy import descriptor
from r1.kernels.exact import is_exact
from r1.kernels.mla import reference
from r1.kernels.mla import triton_attention as attention
from r1.kernels.mla.triton_paged import (
    LOG2_E,
    append_kv,
    either,
    exact_attention,
    gqa_decode,
    mla_decode,
    padded,
    precision,
)

# By bytes an element. Constants: were they chosen by the batch, a row's bits would depend on it.
FORWARD = {
    2: {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2},
    4: {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
}
GRAD_QUERY = {
    2: {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2},
    4: {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1},
}
GRAD_KEY = {
    2: {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1},
}
# Head, tail (half of it) and value. A float32 product is three of TF32, whose operands' halves take registers.
WIDEST = {2: 128, 4: 32}


class _Widths(NamedTuple):
    """A head's width in q and k is head + tail. The tail is 0, the shared rope part, or what is beyond WIDEST."""

    head: int
    tail: int
    value: int
    shared: bool


def _widths(k_SMD: Tensor, v_SMD: Tensor, k_rope_SD: Tensor | None, scale: float) -> _Widths | None:
    """None where the torch backend is to compute it."""
    own, value, most = k_SMD.shape[2], v_SMD.shape[2], WIDEST.get(k_SMD.element_size(), 0)
    if k_rope_SD is not None:
        widths = _Widths(own, k_rope_SD.shape[1], value, True)
    else:
        widths = _Widths(min(own, most), max(own - most, 0), value, False)
    fits = 0 < widths.head <= most and widths.tail <= most // 2 and 0 < value <= most
    return widths if fits and scale > 0 else None


def _tiles(x_TND: Tensor, block: int) -> Any:
    return descriptor(x_TND.transpose(0, 1), [1, block, padded(x_TND.shape[2])])


def _plan(bounds: Tensor, rows: int, block: int) -> tuple[Tensor, Tensor, int]:
    """(first row, sequence) of each tile on the device, and how many tiles there may be: any split of the rows fits."""
    sequences = len(bounds) - 1
    tiles = (rows + min(rows, sequences) * (block - 1)) // block
    row, sequence = torch.empty(2, tiles, dtype=torch.int32, device=bounds.device).unbind()
    attention.plan_kernel[(triton.cdiv(tiles, 64),)](
        bounds, row, sequence, sequences, tiles, BLOCK=block, TILES=64, SEQUENCES=64
    )
    return row, sequence, tiles


class _Queries(NamedTuple):
    """Queries in order of their rows in the key stream, so that each sequence's are together: `bounds` of the
    sequences among them, `position` of each; `order` takes the caller's there. None: they are the stream itself."""

    bounds: Tensor
    position: Tensor | None
    order: Tensor | None

    def take(self, x_T: Tensor) -> Tensor:
        return x_T if self.order is None else x_T.index_select(0, self.order)

    def give(self, x_T: Tensor) -> Tensor:
        return x_T if self.order is None else torch.empty_like(x_T).index_copy_(0, self.order, x_T)

    def room(self, x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """For results; queries of no sequence have no tile."""
        return (x.new_empty if self.order is None else x.new_zeros)(*shape, dtype=dtype or x.dtype)


def _queries(cu_seqlens: Tensor, query_index_T: Tensor | None) -> _Queries:
    if query_index_T is None:
        return _Queries(cu_seqlens, None, None)
    position, order = query_index_T.long().sort(stable=True)
    return _Queries(torch.searchsorted(position, cu_seqlens.long()), position, order)


class _Call(NamedTuple):
    """What the three kernels over packed sequences are given alike."""

    widths: _Widths
    queries: _Queries
    parts: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, its tail, k, its tail, v
    bounds: Tensor

    def tiles(self, tile: dict[str, Any]) -> list[Any]:
        blocks = [tile[name] for name in ("BLOCK_M", "BLOCK_M", "BLOCK_N", "BLOCK_N", "BLOCK_N")]
        return [_tiles(x, block) for x, block in zip(self.parts, blocks)]

    def options(self, tile: dict[str, Any]) -> dict[str, Any]:
        return dict(
            INDEXED=self.queries.order is not None, SHARED=self.widths.shared, PRECISION=precision(self.parts[0]),
            HEAD=padded(self.widths.head), TAIL=padded(self.widths.tail), VALUE=padded(self.widths.value), **tile,
        )  # fmt: skip


def _call(
    widths: _Widths,
    q_TND: Tensor,
    k_SMD: Tensor,
    v_SMD: Tensor,
    k_rope_SD: Tensor | None,
    cu_seqlens: Tensor,
    query_index_T: Tensor | None,
) -> _Call:
    if cu_seqlens.device.type == "cpu":
        reference.checked_bounds(cu_seqlens, len(k_SMD))
    cu_seqlens = cu_seqlens.contiguous()
    queries = _queries(cu_seqlens, query_index_T)
    q = queries.take(q_TND)
    if not widths.tail:
        return _Call(widths, queries, (q, q, k_SMD, k_SMD, v_SMD), cu_seqlens)
    q_tail, k = q[..., widths.head :], k_SMD[..., : widths.head]
    k_tail = k_SMD[..., widths.head :] if k_rope_SD is None else k_rope_SD[:, None]
    return _Call(widths, queries, (q[..., : widths.head], q_tail, k, k_tail, v_SMD), cu_seqlens)


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
    if is_exact():
        return exact_attention(q_TND, k_SMD, v_SMD, k_rope_SD, cu_seqlens, max_seqlen, query_index_T, scale)
    widths = _widths(k_SMD, v_SMD, k_rope_SD, scale)
    if widths is None:
        return reference.mla_attention(
            q_TND, k_SMD, v_SMD, k_rope_SD, cu_seqlens, max_seqlen, query_index_T, scale, deterministic
        )
    call = _call(widths, q_TND, k_SMD, v_SMD, k_rope_SD, cu_seqlens, query_index_T)
    (T, N, _), (S, M, _) = q_TND.shape, k_SMD.shape
    out = call.queries.room(q_TND, T, N, widths.value)
    lse = call.queries.room(q_TND, T, N, dtype=torch.float32)
    if T and S:
        tile = FORWARD[q_TND.element_size()]
        row, sequence, tiles = _plan(call.queries.bounds, T, tile["BLOCK_M"])
        attention.forward_kernel[(tiles * N,)](
            *call.tiles(tile), out, lse, either(call.queries.position, row), call.queries.bounds, call.bounds, row,
            sequence, tiles, N, N // M, widths.value, scale * LOG2_E, **call.options(tile),
        )  # fmt: skip
    return call.queries.give(out), call.queries.give(lse)


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
    """As in reference.py. The shared tail's gradient is added up over the heads from a workspace (S, M, Dr)."""
    widths = _widths(k_SMD, v_SMD, k_rope_SD, scale)
    if widths is None:
        return reference.mla_attention_backward(
            grad_TND, q_TND, k_SMD, v_SMD, k_rope_SD, out_TND, lse_TN, cu_seqlens, max_seqlen, query_index_T, scale,
            deterministic,
        )  # fmt: skip
    call = _call(widths, q_TND, k_SMD, v_SMD, k_rope_SD, cu_seqlens, query_index_T)
    queries = call.queries
    (T, N, D), (S, M, _) = q_TND.shape, k_SMD.shape
    if not T or not S:
        dk_rope = q_TND.new_zeros(0, dtype=torch.float32) if k_rope_SD is None else torch.zeros_like(k_rope_SD)
        return *(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_TND, k_SMD, v_SMD)), dk_rope
    grad, out, lse = (queries.take(x) for x in (grad_TND, out_TND, lse_TN))
    grad = grad if grad.stride(2) == 1 else grad.contiguous()
    log2_lse, offset = torch.empty(2, N, T, dtype=torch.float32, device=q_TND.device).unbind()
    attention.prepare_kernel[(triton.cdiv(T, 32) * N,)](
        out.contiguous(), grad, grad.stride(0), grad.stride(1), lse.contiguous(), log2_lse, offset, T, N, widths.value,
        ROWS=32, VALUE=padded(widths.value),
    )  # fmt: skip

    tile = GRAD_QUERY[q_TND.element_size()]
    row, sequence, tiles = _plan(queries.bounds, T, tile["BLOCK_M"])
    dq = queries.room(q_TND, T, N, D)
    attention.grad_query_kernel[(tiles * N,)](
        *call.tiles(tile), _tiles(grad, tile["BLOCK_M"]), log2_lse, offset, dq, either(queries.position, row),
        queries.bounds, call.bounds, row, sequence, tiles, T, N, N // M, widths.head, widths.tail, scale,
        scale * LOG2_E, **call.options(tile),
    )  # fmt: skip

    tile = GRAD_KEY[q_TND.element_size()]
    row, sequence, tiles = _plan(call.bounds, S, tile["BLOCK_N"])
    first = clear = row
    if queries.position is not None:
        first = torch.searchsorted(queries.position, row.long())
        clear = torch.searchsorted(queries.position, row.long() + (tile["BLOCK_N"] - 1))
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k_SMD, v_SMD))
    if k_rope_SD is not None:
        # One key head writes the result itself.
        dk_tail = k_rope_SD.new_empty(S, M, widths.tail, dtype=torch.float32 if M > 1 else k_rope_SD.dtype)
    else:
        dk_tail = dk[..., widths.head :] if widths.tail else dk
    attention.grad_key_kernel[(tiles * M,)](
        *call.tiles(tile), _tiles(grad, tile["BLOCK_M"]), log2_lse, offset, dk, dk.stride(0), dk.stride(1), dk_tail,
        dk_tail.stride(0), dk_tail.stride(1), dv, either(queries.position, row), first, clear, queries.bounds,
        call.bounds, row, sequence, tiles, T, M, N // M, widths.head, widths.tail, widths.value, scale, scale * LOG2_E,
        **call.options(tile),
    )  # fmt: skip
    if k_rope_SD is None:
        dk_rope = q_TND.new_empty(0, dtype=torch.float32)
    elif M == 1:
        dk_rope = dk_tail[:, 0]
    else:
        dk_rope = k_rope_SD.new_empty(S, widths.tail)
        attention.sum_heads_kernel[(triton.cdiv(S, 16),)](
            dk_tail, dk_rope, S, M, widths.tail, ROWS=16, WIDTH=padded(widths.tail)
        )
    return queries.give(dq), dk, dv, dk_rope


__all__ = ["append_kv", "gqa_decode", "mla_attention", "mla_attention_backward", "mla_decode"]
