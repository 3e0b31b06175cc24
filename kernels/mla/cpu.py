"""Decoding by r1._cpu (csrc/cpu/attention.h); attention in training by the torch backend."""

from __future__ import annotations

import math

from torch import Tensor

from r1 import _cpu
from r1.kernels.mla import reference_decode
from r1.kernels.mla.reference import mla_attention, mla_attention_backward
from r1.kernels.mla.reference_decode import no_room
from r1.kernels.native import address, computes, threads


def mla_decode(
    q_BND: Tensor, kv_cache: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float, latent_rank: int
) -> Tensor:
    if not computes(q_BND, kv_cache):
        return reference_decode.mla_decode(q_BND, kv_cache, block_table_BM, seq_lens_B, scale, latent_rank)
    cache = kv_cache.contiguous()[:, :, None]
    return _decode(q_BND, cache, cache, latent_rank, block_table_BM, seq_lens_B, scale)


def gqa_decode(
    q_BND: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float
) -> Tensor:
    if not computes(q_BND, k_cache, v_cache):
        return reference_decode.gqa_decode(q_BND, k_cache, v_cache, block_table_BM, seq_lens_B, scale)
    k, v = k_cache.contiguous(), v_cache.contiguous()
    return _decode(q_BND, k, v, v.shape[3], block_table_BM, seq_lens_B, scale)


def _decode(
    q_BND: Tensor, k: Tensor, v: Tensor, value_width: int, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float
) -> Tensor:
    """k and v are contiguous caches (pages, page size, M, width), of v the first value_width numbers."""
    # As int64: what is out of range for int32 must not become a page that exists.
    q_BND, table, lengths = q_BND.contiguous(), block_table_BM.long().contiguous(), seq_lens_B.long().contiguous()
    (B, N, D), (pages, page_size, M, k_width) = q_BND.shape, k.shape
    out = q_BND.new_empty(B, N, value_width)
    beyond = _cpu.decode(
        address(q_BND), address(k), address(v), k_width, v.shape[3], address(table), table.shape[1], page_size, pages,
        address(lengths), B, N, M, D, value_width, scale, address(out), threads(),
    )  # fmt: skip
    if beyond > 0:
        raise no_room("seq_lens_B", beyond, "at most", table, page_size)
    if beyond < 0:
        raise _no_page(table, k)
    return out


def append_kv(kv_cache: Tensor, rows: Tensor, block_table_BM: Tensor, positions_B: Tensor) -> None:
    if not computes(kv_cache):
        return reference_decode.append_kv(kv_cache, rows, block_table_BM, positions_B)
    rows, table, positions = rows.float().contiguous(), block_table_BM.long().contiguous(), positions_B.long()
    positions, (pages, page_size, *shape) = positions.contiguous(), kv_cache.shape
    beyond = _cpu.append(
        address(kv_cache), address(rows), address(table), table.shape[1], page_size, pages, address(positions),
        len(rows), math.prod(shape),
    )  # fmt: skip
    if beyond >= 0:
        raise no_room("positions_B", beyond, "less than", table, page_size)
    if beyond < -1:
        raise _no_page(table, kv_cache)


def _no_page(table: Tensor, cache: Tensor) -> ValueError:
    return ValueError(f"block_table_BM names a page that is not one of the cache's {len(cache)}, in {table.tolist()}")


__all__ = ["append_kv", "gqa_decode", "mla_attention", "mla_attention_backward", "mla_decode"]
