"""What a call of an operator costs, from its arguments' shapes: floating point operations, two for each multiplication
that is added up, in matrix products and in attention; and the memory that a kernel takes and gives back inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

import r1.kernels  # defines the operators

r1 = torch.ops.r1


def flops_of(func: Any, args: tuple, kwargs: dict, out: Any, sequence_length: int) -> int:
    """FLOPs of one call of torch's or r1's operator; 0 for those that are no product. Attention is causal, over
    sequences of `sequence_length` tokens."""
    if (count := OURS.get(func)) is not None:
        return count(*args)
    if (pairs := ATTENTION.get(func)) is not None:
        return pairs(*args) * (sequence_length + 1) // 2
    if (count := flop_registry.get(func._overloadpacket)) is not None:
        return count(*args, **kwargs, out_val=out)
    return 0


def _experts(rows: int, gate_up_EHF: Tensor, down_EFH: Tensor) -> int:
    return 2 * rows * (gate_up_EHF.shape[1] * gate_up_EHF.shape[2] + down_EFH.shape[1] * down_EFH.shape[2])


def _head_backward(*args: Any) -> int:
    """dhidden and dweight, and the logits again where they were not kept."""
    hidden, weight, kept, wanted = args[3], args[4], args[9], sum(args[-2:])
    return 2 * hidden.numel() * weight.shape[0] * (wanted + (kept.shape[0] == 0))


OURS: dict[Any, Callable[..., int]] = {
    r1.grouped_gemm.default: lambda x, w, counts: 2 * x.numel() * w.shape[2],
    r1.grouped_gemm_wgrad.default: lambda x, grad, counts: 2 * x.numel() * grad.shape[1],
    r1.grouped_gemm_wgrad_.default: lambda out, x, grad, counts: 2 * x.numel() * grad.shape[1],
    r1.moe_mlp.default: lambda x, counts, gate_up, down, *_: _experts(len(x), gate_up, down),
    r1.moe_mlp_backward.default: lambda grad, x, counts, gate_up, down, *_: 2 * _experts(len(x), gate_up, down),
    r1.moe_layer.default: lambda x, ids, weights, gate_up, down, *_: _experts(ids.numel(), gate_up, down),
    r1.moe_layer_backward.default: lambda grad, x, weights, gate_up, down, *_: (
        2 * _experts(weights.numel(), gate_up, down)
    ),
    r1.fp8_linear.default: lambda x, w, *_: 2 * x.numel() * w.shape[0],
    r1.fp8_moe_mlp.default: lambda x, counts, gate_up, down, *_: _experts(len(x), gate_up, down),
    r1.fp8_gemm.default: lambda a, a_s, b, *_: 2 * a.numel() * b.shape[0],
    r1.fp8_gemm_wgrad.default: lambda a, a_s, b, *_: 2 * a.numel() * b.shape[0],
    r1.fp8_gemm_wgrad_.default: lambda out, a, a_s, b, *_: 2 * a.numel() * b.shape[0],
    r1.fp8_grouped_gemm.default: lambda a, a_s, b, *_: 2 * a.numel() * b.shape[1],
    r1.fp8_grouped_gemm_wgrad.default: lambda a, a_s, b, *_: 2 * a.numel() * b.shape[0],
    r1.fp8_grouped_gemm_wgrad_.default: lambda out, a, a_s, b, *_: 2 * a.numel() * b.shape[0],
    r1.linear_logprob.default: lambda hidden, weight, *_: 2 * hidden.numel() * weight.shape[0],
    r1.linear_logprob_backward.default: _head_backward,
}
# FLOPs for each key that a query sees. The backward makes the scores again, and gradients of q, k, v and the scores.
ATTENTION: dict[Any, Callable[..., int]] = {
    r1.mla_attention.default: lambda q, k, v, *_: 2 * q.shape[0] * q.shape[1] * (q.shape[2] + v.shape[2]),
    r1.mla_attention_backward.default: lambda grad, q, k, v, *_: (
        2 * q.shape[0] * q.shape[1] * (3 * q.shape[2] + 2 * v.shape[2])
    ),
}


def workspace_of(func: Any, args: tuple) -> int:
    """Bytes that the operator's Triton kernels take beside their results."""
    return WORKSPACE[func](*args) if func in WORKSPACE else 0


def _logits(tokens: int, weight_VH: Tensor, chunk_tokens: int) -> int:
    return 4 * min(tokens, chunk_tokens) * weight_VH.shape[0]


def _middle(rows: Tensor, down_EFH: Tensor) -> int:
    return rows.element_size() * len(rows) * down_EFH.shape[1]


# The logits' chunk; and what lies between the experts' two products, in the backward with both its gradients.
WORKSPACE: dict[Any, Callable[..., int]] = {
    r1.linear_logprob.default: lambda h, w, *rest: _logits(len(h), w, rest[4]),
    r1.linear_logprob_backward.default: lambda *a: _logits(len(a[3]), a[4], a[12]),
    r1.moe_mlp.default: lambda x, counts, gate_up, down, *_: _middle(x, down),
    r1.moe_mlp_backward.default: lambda grad, x, counts, gate_up, down, *_: 4 * _middle(x, down),
}
