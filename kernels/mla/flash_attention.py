"""The mla family with flash-attn's training attention (arXiv 2307.08691) where it computes what is asked: a pack in 16
bits whose values are as wide as its keys, as the dense students' are. All else is the Triton backend's.

Chosen by R1_KERNELS=mla=flash_attn. Not run yet: flash-attn wants a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.kernels.exact import is_exact
from r1.kernels.mla import triton
from r1.kernels.mla.triton import append_kv, gqa_decode, mla_decode

WIDEST = 256


def _takes(
    q_TND: Tensor, v_SMD: Tensor, k_rope_SD: Tensor | None, max_seqlen: int, query_index_T: Tensor | None
) -> bool:
    D = q_TND.shape[2]
    # For sequences of one token flash-attn has a layout of its own, which wants one in each.
    plain = k_rope_SD is None and query_index_T is None and not is_exact() and q_TND.numel() > 0 and max_seqlen > 1
    return plain and q_TND.element_size() == 2 and D == v_SMD.shape[2] and D % 8 == 0 and D <= WIDEST


def _operators() -> tuple:
    import flash_attn  # noqa: F401 (registers them)

    return torch.ops.flash_attn._flash_attn_varlen_forward, torch.ops.flash_attn._flash_attn_varlen_backward


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
    if not _takes(q_TND, v_SMD, k_rope_SD, max_seqlen, query_index_T):
        return triton.mla_attention(
            q_TND, k_SMD, v_SMD, k_rope_SD, cu_seqlens, max_seqlen, query_index_T, scale, deterministic
        )
    bounds = cu_seqlens.int().contiguous()
    out, lse_NT, _, _ = _operators()[0](
        q_TND, k_SMD, v_SMD, bounds, bounds, max_seqlen, max_seqlen, dropout_p=0.0, softmax_scale=scale, causal=True
    )
    return out, lse_NT.t().contiguous()


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
    if not _takes(q_TND, v_SMD, k_rope_SD, max_seqlen, query_index_T):
        return triton.mla_attention_backward(
            grad_TND, q_TND, k_SMD, v_SMD, k_rope_SD, out_TND, lse_TN, cu_seqlens, max_seqlen, query_index_T, scale,
            deterministic,
        )  # fmt: skip
    bounds = cu_seqlens.int().contiguous()
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_TND, k_SMD, v_SMD))
    _operators()[1](
        grad_TND, q_TND, k_SMD, v_SMD, out_TND, lse_TN.t().contiguous(), dq, dk, dv, bounds, bounds, max_seqlen,
        max_seqlen, dropout_p=0.0, softmax_scale=scale, causal=True, window_size_left=-1, window_size_right=-1,
        softcap=0.0, alibi_slopes=None, deterministic=deterministic,
    )  # fmt: skip
    return dq, dk, dv, q_TND.new_empty(0, dtype=torch.float32)


__all__ = ["append_kv", "gqa_decode", "mla_attention", "mla_attention_backward", "mla_decode"]
