"""The mla family by r1._cpu (csrc/cpu/attention.h, decode.h)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1 import _cpu
from r1.kernels.mla import reference, reference_decode
from r1.kernels.mla.reference import checked_bounds
from r1.kernels.mla.reference_decode import no_room
from r1.kernels.native import address, computes, threads


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
    if not computes(q_TND, k_SMD, v_SMD, k_rope_SD):
        return reference.mla_attention(
            q_TND, k_SMD, v_SMD, k_rope_SD, cu_seqlens, max_seqlen, query_index_T, scale, deterministic
        )
    checked_bounds(cu_seqlens, len(k_SMD))
    T, N, _ = q_TND.shape
    out_TND, lse_TN = q_TND.new_empty(T, N, v_SMD.shape[2]), q_TND.new_empty(T, N)
    tensors = _Pack(q_TND, k_SMD, v_SMD, k_rope_SD, cu_seqlens, query_index_T)
    _cpu.attention(*tensors.arguments(), scale, address(out_TND), address(lse_TN), threads())
    return out_TND, lse_TN


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
    if not computes(grad_TND, q_TND, k_SMD, v_SMD, k_rope_SD, out_TND, lse_TN):
        return reference.mla_attention_backward(
            grad_TND, q_TND, k_SMD, v_SMD, k_rope_SD, out_TND, lse_TN, cu_seqlens, max_seqlen, query_index_T, scale,
            deterministic,
        )  # fmt: skip
    grad_TND, out_TND, lse_TN = grad_TND.contiguous(), out_TND.contiguous(), lse_TN.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q_TND, k_SMD, v_SMD))
    # Every key head's part of the gradient of the keys' shared part.
    parts = q_TND.new_empty(0) if k_rope_SD is None else dk.new_empty(*dk.shape[:2], k_rope_SD.shape[1])
    tensors = _Pack(q_TND, k_SMD, v_SMD, k_rope_SD, cu_seqlens, query_index_T)
    _cpu.attention_backward(
        *tensors.arguments(), scale, address(grad_TND), address(out_TND), address(lse_TN), address(dq), address(dk),
        address(dv), address(parts), threads(),
    )  # fmt: skip
    return dq, dk, dv, parts if k_rope_SD is None else parts.sum(1)


class _Pack:
    """The tensors of an attention, as r1._cpu wants them; they must live until it has run."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, k_rope: Tensor | None, cu_seqlens: Tensor, query_index: Tensor | None
    ) -> None:
        self.q, (self.k, self.v) = q.contiguous(), (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        self.k_rope = k_rope if k_rope is None or k_rope.stride(1) == 1 else k_rope.contiguous()
        self.bounds = cu_seqlens.to(q.device, torch.long).contiguous()  # nobody has looked where these two lie
        self.query_index = None
        if query_index is not None:
            self.query_index = query_index.to(q.device, torch.long).contiguous()
            low, high = (int(x) for x in query_index.aminmax()) if len(query_index) else (0, -1)
            if low < 0 or high >= len(k):
                raise ValueError(f"query_index_T holds {low if low < 0 else high}, wanted 0 <= row < {len(k)}")

    def arguments(self) -> tuple[int, ...]:
        q, k, v, rope = self.q, self.k, self.v, self.k_rope
        return (
            address(q), address(k), address(v), address(rope), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            0 if rope is None else rope.stride(0), address(self.bounds), address(self.query_index),
            len(self.bounds) - 1, len(q), q.shape[1], k.shape[1], k.shape[2], 0 if rope is None else rope.shape[1],
            v.shape[2],
        )  # fmt: skip


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
