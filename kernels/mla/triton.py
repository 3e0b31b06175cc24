"""The mla family in Triton, for Hopper: training attention without padded values, and decoding in splits of fixed size.

Scores are in base 2 and float32, the softmax is made as the keys go by, and only the log-sum-exp is kept for the
backward, which makes the scores again: workspace grows with the length, not its square. No atomics: dq belongs to a
program over queries, dk and dv to one over keys. docs/kernels/mla.md counts the work.

float64, scales that are not positive, and widths beyond WIDEST are computed by the torch backend. Letters are those of
reference.py; BLOCK_M tiles queries, BLOCK_N keys, BLOCK_H the heads of one decoded query.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from r1.kernels.bulk_copy import descriptor
from r1.kernels.mla import reference
from r1.kernels.mla import triton_attention as attention
from r1.kernels.mla import triton_decode as decode
from r1.kernels.mla import triton_fp8 as fp8_cache

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
SPLIT = 2048  # cached tokens that one program walks over, in whole pages
LATENT = {
    2: {"BLOCK_H": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 3},
    4: {"BLOCK_H": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}
# A tile of bytes is half as large, and free again once it has been taken times its scales. Five stages, of which the
# page's number has its part, keep two tiles on their way; three would keep one.
LATENT_FP8 = {
    2: {"BLOCK_H": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 5},
    4: {"BLOCK_H": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1},
}
GROUPED = {
    2: {"BLOCK_H": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3},
    4: {"BLOCK_H": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2},
}
# Head, tail and value. A float32 product is three of TF32, whose operands' halves take registers; one latent is as much
# to a decoded query as four heads are to attention.
WIDEST = {2: 128, 4: 32}
WIDEST_DECODED = {2: 512, 4: 128}
LOG2_E = 1.4426950408889634


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


def _padded(width: int) -> int:
    """The power of two that a tile of it has; a product wants 16."""
    return max(triton.next_power_of_2(width), 16) if width else 0


def _tiles(x_TND: Tensor, block: int) -> Any:
    return descriptor(x_TND.transpose(0, 1), [1, block, _padded(x_TND.shape[2])])


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
            INDEXED=self.queries.order is not None, SHARED=self.widths.shared, PRECISION=_precision(self.parts[0]),
            HEAD=_padded(self.widths.head), TAIL=_padded(self.widths.tail), VALUE=_padded(self.widths.value), **tile,
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


def _precision(x: Tensor) -> str:
    return "tf32" if x.element_size() == 2 else "tf32x3"


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
            *call.tiles(tile), out, lse, _or(call.queries.position, row), call.queries.bounds, call.bounds, row,
            sequence, tiles, N, N // M, widths.value, scale * LOG2_E, **call.options(tile),
        )  # fmt: skip
    return call.queries.give(out), call.queries.give(lse)


def _or(x: Tensor | None, unused: Tensor) -> Tensor:
    return unused if x is None else x


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
        ROWS=32, VALUE=_padded(widths.value),
    )  # fmt: skip

    tile = GRAD_QUERY[q_TND.element_size()]
    row, sequence, tiles = _plan(queries.bounds, T, tile["BLOCK_M"])
    dq = queries.room(q_TND, T, N, D)
    attention.grad_query_kernel[(tiles * N,)](
        *call.tiles(tile), _tiles(grad, tile["BLOCK_M"]), log2_lse, offset, dq, _or(queries.position, row),
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
        dk_tail.stride(0), dk_tail.stride(1), dv, _or(queries.position, row), first, clear, queries.bounds, call.bounds,
        row, sequence, tiles, T, M, N // M, widths.head, widths.tail, widths.value, scale, scale * LOG2_E,
        **call.options(tile),
    )  # fmt: skip
    if k_rope_SD is None:
        dk_rope = q_TND.new_empty(0, dtype=torch.float32)
    elif M == 1:
        dk_rope = dk_tail[:, 0]
    else:
        dk_rope = k_rope_SD.new_empty(S, widths.tail)
        attention.sum_heads_kernel[(triton.cdiv(S, 16),)](
            dk_tail, dk_rope, S, M, widths.tail, ROWS=16, WIDTH=_padded(widths.tail)
        )
    return queries.give(dq), dk, dv, dk_rope


def _decodes(scale: float, width: int, *tensors: Tensor) -> bool:
    return scale > 0 and width <= WIDEST_DECODED.get(max(x.element_size() for x in tensors), 0)


def mla_decode(
    q_BND: Tensor, kv_cache: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float, latent_rank: int
) -> Tensor:
    if not _decodes(scale, latent_rank, q_BND, kv_cache):
        return reference.mla_decode(q_BND, kv_cache, block_table_BM, seq_lens_B, scale, latent_rank)
    cache = kv_cache.unsqueeze(2)
    return _decode(q_BND, cache, cache, block_table_BM, seq_lens_B, scale, latent_rank, LATENT)


def gqa_decode(
    q_BND: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float
) -> Tensor:
    if not _decodes(scale, max(q_BND.shape[2], v_cache.shape[3]), q_BND, k_cache, v_cache):
        return reference.gqa_decode(q_BND, k_cache, v_cache, block_table_BM, seq_lens_B, scale)
    return _decode(q_BND, k_cache, v_cache, block_table_BM, seq_lens_B, scale, q_BND.shape[2], GROUPED)


def _decode(
    q_BND: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, scale: float, head: int, tiles: dict[int, Any]
) -> Tensor:
    """Both kinds. A head is `head` wide, and what q has beyond that is the tail; latents are k and v at once."""
    latent = tiles is LATENT
    (B, N, D), page_size, M = q_BND.shape, k.shape[1], k.shape[2]
    value, room = head if latent else v.shape[3], table.shape[1] * page_size
    if lens.device.type == "cpu":
        reference.checked_lengths(lens, table, page_size)
    out = q_BND.new_empty(B, N, value)
    if not out.numel():
        return out
    if not room or not k.numel():
        return out.zero_()
    fp8 = k.dtype == torch.uint8
    if not fp8 and not q_BND.dtype == k.dtype == v.dtype:
        q_BND = q_BND.float()
    q = q_BND if q_BND.stride(2) == 1 else q_BND.contiguous()
    table, lens = table if table.stride(1) == 1 else table.contiguous(), lens.contiguous()
    tile = dict((LATENT_FP8 if fp8 else tiles)[q.element_size()])
    # Blocks stay within a page.
    tile["BLOCK_N"] = block = min(tile["BLOCK_N"], max(page_size & -page_size, 16))
    split_pages = max(SPLIT // page_size, 1)
    splits = triton.cdiv(table.shape[1], split_pages)
    part = torch.empty(B, N, splits, value, dtype=torch.float32, device=q.device) if splits > 1 else out
    log2_sum = torch.empty(B, N, splits, dtype=torch.float32, device=q.device) if splits > 1 else out
    pages = lambda x: descriptor(x.permute(2, 0, 1, 3), [1, 1, block, _padded(x.shape[3])])
    grid = (B * splits * M * triton.cdiv(N // M, tile["BLOCK_H"]),)
    if fp8:
        latents, scales, ropes = reference.fp8_parts(k, head)
        ropes = pages(ropes if D > head else latents)
        fp8_cache.decode_fp8_kernel[grid](
            q, q.stride(0), q.stride(1), pages(latents), scales, scales.stride(1), ropes, table, table.stride(0), lens,
            out, part, log2_sum, splits, split_pages, room, N, head, D - head, scale * LOG2_E, PAGE=page_size,
            PRECISION=_precision(q), HEAD=_padded(head), TAIL=_padded(D - head), **tile,
        )  # fmt: skip
    else:
        k_head, k_tail = k[..., :head], k[..., head:] if D > head else k[..., :head]
        decode.decode_kernel[grid](
            q, q.stride(0), q.stride(1), pages(k_head), pages(k_tail), pages(k_head if latent else v), table,
            table.stride(0), lens, out, part, log2_sum, splits, split_pages, room, N, N // M, head, D - head, value,
            scale * LOG2_E, LATENT=latent, PAGE=page_size, PRECISION=_precision(q), HEAD=_padded(head),
            TAIL=_padded(D - head), VALUE=_padded(value), **tile,
        )  # fmt: skip
    if splits > 1:
        decode.combine_kernel[(B * N,)](
            part, log2_sum, lens, out, splits, split_pages * page_size, room, N, value, VALUE=_padded(value)
        )
    return out


def append_kv(kv_cache: Tensor, rows: Tensor, block_table_BM: Tensor, positions_B: Tensor) -> None:
    if positions_B.device.type == "cpu":
        reference.checked_positions(positions_B, block_table_BM, kv_cache.shape[1])
    B, width = len(rows), math.prod(kv_cache.shape[2:])
    if not B or not width:
        return
    rows = rows.flatten(1)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    table = block_table_BM if block_table_BM.stride(1) == 1 else block_table_BM.contiguous()
    if kv_cache.dtype == torch.uint8:
        R = reference.fp8_latent_rank(rows.shape[1], width)
        fp8_cache.append_fp8_kernel[(B,)](
            *reference.fp8_parts(kv_cache, R), width, rows, rows.stride(0), table, table.stride(0),
            positions_B.contiguous(), table.shape[1], kv_cache.shape[1], R, rows.shape[1] - R, HEAD=_padded(R),
            TAIL=_padded(rows.shape[1] - R),
        )  # fmt: skip
        return
    block = min(triton.next_power_of_2(width), 1024)
    decode.append_kernel[(B, triton.cdiv(width, block))](
        kv_cache, rows, rows.stride(0), table, table.stride(0), positions_B.contiguous(), table.shape[1],
        kv_cache.shape[1], width, BLOCK=block,
    )  # fmt: skip
