"""Decoding over pages in Triton, and training attention in its order: what launches the kernels of triton_decode.py and
triton_fp8.py. Letters are those of reference.py; BLOCK_H tiles the heads of one decoded query, BLOCK_N the cached
tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from r1.kernels.bulk_copy import descriptor
from r1.kernels.exact import is_exact
from r1.kernels.mla import reference, reference_decode
from r1.kernels.mla import triton_decode as decode
from r1.kernels.mla import triton_exact as exact
from r1.kernels.mla import triton_fp8 as fp8_cache

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
# Of a latent, or of a head. One latent is as much to a decoded query as four heads are to attention.
WIDEST_DECODED = {2: 512, 4: 128}
LOG2_E = 1.4426950408889634


def padded(width: int) -> int:
    """The power of two that a tile of it has; a product wants 16."""
    return max(triton.next_power_of_2(width), 16) if width else 0


def precision(x: Tensor) -> str:
    return "tf32" if x.element_size() == 2 else "tf32x3"


def either(x: Tensor | None, unused: Tensor) -> Tensor:
    return unused if x is None else x


def decodes(scale: float, width: int, *tensors: Tensor) -> bool:
    most = WIDEST_DECODED.get(max(x.element_size() for x in tensors), 0)
    fits = scale > 0 and width <= most
    if not fits and is_exact() and tensors[0].is_cuda:
        raise ValueError(
            f"exact numerics on a GPU decodes a scale > 0 and at most {most} columns of {tensors[0].dtype}, and not"
            f" scale {scale} and {width} columns"
        )
    return fits


def mla_decode(
    q_BND: Tensor, kv_cache: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float, latent_rank: int
) -> Tensor:
    if not decodes(scale, latent_rank, q_BND, kv_cache):
        return reference.mla_decode(q_BND, kv_cache, block_table_BM, seq_lens_B, scale, latent_rank)
    if is_exact():
        kv_cache, block_table_BM = exact.in_pages(kv_cache, block_table_BM)
    cache = kv_cache.unsqueeze(2)
    return decode_pages(q_BND, cache, cache, block_table_BM, seq_lens_B, scale, latent_rank, LATENT)


def gqa_decode(
    q_BND: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float
) -> Tensor:
    if not decodes(scale, max(q_BND.shape[2], v_cache.shape[3]), q_BND, k_cache, v_cache):
        return reference.gqa_decode(q_BND, k_cache, v_cache, block_table_BM, seq_lens_B, scale)
    if is_exact():
        v_cache, _ = exact.in_pages(v_cache, block_table_BM)
        k_cache, block_table_BM = exact.in_pages(k_cache, block_table_BM)
    return decode_pages(q_BND, k_cache, v_cache, block_table_BM, seq_lens_B, scale, q_BND.shape[2], GROUPED)


def decode_pages(
    q_BND: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, scale: float, head: int, tiles: dict[int, Any],
    out: Tensor | None = None, lse_BN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Both kinds. A head is `head` wide, and what q has beyond that is the tail; latents are k and v at once. Into
    `out`, and the log-sum-exp of the scaled scores into lse_BN, where these are given."""
    latent = tiles is LATENT
    (B, N, D), page_size, M = q_BND.shape, k.shape[1], k.shape[2]
    value, room = head if latent else v.shape[3], table.shape[1] * page_size
    if lens.device.type == "cpu":
        reference_decode.checked_lengths(lens, table, page_size)
    out = q_BND.new_empty(B, N, value) if out is None else out
    if not out.numel():
        return out
    if not room or not k.numel():
        if lse_BN is not None:
            lse_BN.fill_(-torch.inf)
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
    pages = lambda x: descriptor(x.permute(2, 0, 1, 3), [1, 1, block, padded(x.shape[3])])
    grid = (B * splits * M * triton.cdiv(N // M, tile["BLOCK_H"]),)
    if fp8:
        latents, scales, ropes = reference_decode.fp8_parts(k, head)
        ropes = pages(ropes if D > head else latents)
        fp8_cache.decode_fp8_kernel[grid](
            q, q.stride(0), q.stride(1), pages(latents), scales, scales.stride(1), ropes, table, table.stride(0), lens,
            out, part, log2_sum, splits, split_pages, room, N, head, D - head, scale * LOG2_E, PAGE=page_size,
            PRECISION=precision(q), HEAD=padded(head), TAIL=padded(D - head), **tile,
        )  # fmt: skip
    else:
        k_head, k_tail = k[..., :head], k[..., head:] if D > head else k[..., :head]
        decode.decode_kernel[grid](
            q, q.stride(0), q.stride(1), pages(k_head), pages(k_tail), pages(k_head if latent else v), table,
            table.stride(0), lens, out, either(lse_BN, out), part, log2_sum, splits, split_pages, room, N, N // M, head,
            D - head, value, scale * LOG2_E, LATENT=latent, LSE=lse_BN is not None, PAGE=page_size,
            PRECISION=precision(q), HEAD=padded(head), TAIL=padded(D - head), VALUE=padded(value), **tile,
        )  # fmt: skip
    if splits > 1:
        decode.combine_kernel[(B * N,)](
            part, log2_sum, lens, out, either(lse_BN, out), splits, split_pages * page_size, room, N, value,
            LSE=lse_BN is not None, VALUE=padded(value),
        )  # fmt: skip
    return out


def exact_attention(
    q_TND: Tensor,
    k_SMD: Tensor,
    v_SMD: Tensor,
    k_rope_SD: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    query_index_T: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Every query decoded for itself. Values that are the first columns of the keys are latents, as mla_decode's."""
    (T, N, D), (S, M, value) = q_TND.shape, v_SMD.shape
    latent = M == 1 and k_rope_SD is None and v_SMD.data_ptr() == k_SMD.data_ptr() and v_SMD.stride() == k_SMD.stride()
    if not decodes(scale, value if latent else max(D, value), q_TND, k_SMD):
        return reference.mla_attention(
            q_TND, k_SMD, v_SMD, k_rope_SD, cu_seqlens, max_seqlen, query_index_T, scale, True
        )
    if cu_seqlens.device.type == "cpu":
        reference.checked_bounds(cu_seqlens, S)
    k = k_SMD if k_rope_SD is None else torch.cat([k_SMD, k_rope_SD[:, None].expand(-1, M, -1)], -1)
    index = torch.arange(S, device=q_TND.device) if query_index_T is None else query_index_T
    paged = exact.paged(cu_seqlens, S, max_seqlen, index)
    k_pages = paged.cache(k)
    v_pages = k_pages if latent else paged.cache(v_SMD)
    head, tiles = (value, LATENT) if latent else (D, GROUPED)
    out, lse = q_TND.new_empty(T, N, value), q_TND.new_empty(T, N, dtype=torch.float32)
    splits = triton.cdiv(max_seqlen, SPLIT)
    step = max(exact.WORKSPACE // max(N * splits * value, 1), 1)
    for begin in range(0, T, step):
        part = slice(begin, begin + step)
        table, lens = paged.table_TM[part], paged.lens_T[part]
        decode_pages(q_TND[part], k_pages, v_pages, table, lens, scale, head, tiles, out[part], lse[part])
    return out, lse


def append_kv(kv_cache: Tensor, rows: Tensor, block_table_BM: Tensor, positions_B: Tensor) -> None:
    if positions_B.device.type == "cpu":
        reference_decode.checked_positions(positions_B, block_table_BM, kv_cache.shape[1])
    B, width = len(rows), math.prod(kv_cache.shape[2:])
    if not B or not width:
        return
    rows = rows.flatten(1)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    table = block_table_BM if block_table_BM.stride(1) == 1 else block_table_BM.contiguous()
    if kv_cache.dtype == torch.uint8:
        R = reference_decode.fp8_latent_rank(rows.shape[1], width)
        fp8_cache.append_fp8_kernel[(B,)](
            *reference_decode.fp8_parts(kv_cache, R), width, rows, rows.stride(0), table, table.stride(0),
            positions_B.contiguous(), table.shape[1], kv_cache.shape[1], R, rows.shape[1] - R, HEAD=padded(R),
            TAIL=padded(rows.shape[1] - R),
        )  # fmt: skip
        return
    block = min(triton.next_power_of_2(width), 1024)
    decode.append_kernel[(B, triton.cdiv(width, block))](
        kv_cache, rows, rows.stride(0), table, table.stride(0), positions_B.contiguous(), table.shape[1],
        kv_cache.shape[1], width, BLOCK=block,
    )  # fmt: skip
