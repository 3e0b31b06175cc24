"""The moe family by r1._cpu (csrc/cpu/moe.h): the router, the sort, SwiGLU, and experts as one operator each way.

Letters: T tokens, H hidden, E experts, K experts a token, P = T K rows sorted by expert, F width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1 import _cpu
from r1.kernels.moe import reference
from r1.kernels.moe.reference import (
    check_route_values,
    checked_counts,
    checked_ids,
    grouped_gemm,
    grouped_gemm_wgrad,
    grouped_gemm_wgrad_,
    moe_mlp_masked,
    token_of,
    unpermute,
    unpermute_backward,
)
from r1.kernels.native import address, computes, rows_of, threads

SMALL = 2**17  # numbers of an expert's weights


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    num_groups: int,
    group_top_k: int,
    scale: float,
    score: str,
    replay_ids_TK: Tensor | None,
    padding_mask_T: Tensor | None,
    check_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not computes(logits_TE):
        return reference.route(
            logits_TE, bias_E, top_k, num_groups, group_top_k, scale, score, replay_ids_TK, padding_mask_T, check_values
        )
    check_route_values(logits_TE, replay_ids_TK, check_values)
    T, E = logits_TE.shape
    logits_TE, bias_E = logits_TE.contiguous(), None if bias_E is None else bias_E.float().contiguous()
    replay_ids_TK, padding_mask_T = (x if x is None else x.contiguous() for x in (replay_ids_TK, padding_mask_T))
    ids_TK, weights_TK = logits_TE.new_empty(T, top_k, dtype=torch.int64), logits_TE.new_empty(T, top_k)
    counts_E = ids_TK.new_empty(E)
    _cpu.route(
        address(logits_TE), address(bias_E), E, top_k, num_groups, group_top_k, scale, score == "softmax",
        address(replay_ids_TK), address(padding_mask_T), T, address(ids_TK), address(weights_TK), address(counts_E),
        threads(),
    )  # fmt: skip
    return ids_TK, weights_TK, counts_E


def route_backward(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, padding_mask_T: Tensor | None, scale: float, score: str
) -> Tensor:
    if not computes(grad_TK, logits_TE):
        return reference.route_backward(grad_TK, logits_TE, ids_TK, padding_mask_T, scale, score)
    grad_TK, logits_TE, ids_TK = grad_TK.contiguous(), logits_TE.contiguous(), ids_TK.contiguous()
    padding_mask_T = None if padding_mask_T is None else padding_mask_T.contiguous()
    (T, E), K = logits_TE.shape, ids_TK.shape[1]
    grad_TE = logits_TE.new_empty(T, E)
    _cpu.route_backward(
        address(grad_TK), address(logits_TE), address(ids_TK), E, K, scale, score == "softmax",
        address(padding_mask_T), T, address(grad_TE), threads(),
    )  # fmt: skip
    return grad_TE


def sort(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(row_map_P, tokens per expert): t K + k of every row, sorted by expert, stable."""
    ids_TK = ids_TK.contiguous()
    row_map_P, counts_E = ids_TK.new_empty(ids_TK.numel()), ids_TK.new_empty(num_experts)
    if not _cpu.sort_by_expert(address(ids_TK), len(row_map_P), num_experts, address(row_map_P), address(counts_E)):
        checked_ids(ids_TK, num_experts, "ids_TK")
    return row_map_P, counts_E


def permute(x_TH: Tensor, ids_TK: Tensor, num_experts: int, check_values: bool) -> tuple[Tensor, Tensor, Tensor]:
    row_map_P, counts_E = sort(ids_TK, num_experts)
    return x_TH.index_select(0, token_of(row_map_P, ids_TK)), row_map_P, counts_E


def swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    if not computes(gate_up, weights) or not gate_up.numel():
        return reference.swiglu(gate_up, weights)
    rows_RF, weights = rows_of(gate_up), None if weights is None else weights.contiguous()
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    _cpu.swiglu(
        address(rows_RF), rows_RF.stride(0), address(weights), len(rows_RF), out.shape[-1], address(out), threads()
    )
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    if not computes(grad, gate_up, weights) or not gate_up.numel():
        return reference.swiglu_backward(grad, gate_up, weights)
    grad, rows_RF = grad.contiguous(), rows_of(gate_up)
    weights = None if weights is None else weights.contiguous()
    grad_gate_up = gate_up.new_empty(gate_up.shape)
    grad_weights = gate_up.new_empty(0) if weights is None else torch.empty_like(weights)
    _cpu.swiglu_backward(
        address(grad), address(rows_RF), rows_RF.stride(0), address(weights), len(rows_RF), grad.shape[-1],
        address(grad_gate_up), 0 if weights is None else address(grad_weights), threads(),
    )  # fmt: skip
    return grad_gate_up, grad_weights


def _forward(
    x: Tensor,
    row_map_P: Tensor | None,
    counts_E: Tensor,
    top_k: int,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(y of every pair (P, H), in the order of pairs; the first product (P, 2 F))."""
    (E, F, H), P = down.shape, len(x) * top_k
    y_PH, first_PF = x.new_empty(P, H), x.new_empty(P, 2 * F)
    _cpu.experts_forward(
        address(x), address(gate_up), address(down), E, H, F, address(row_map_P), address(counts_E), address(weights),
        P, top_k, address(first_PF), address(y_PH), threads(),
    )  # fmt: skip
    return y_PH, first_PF


def _backward(
    grad: Tensor,
    x: Tensor,
    row_map_P: Tensor | None,
    counts_E: Tensor,
    top_k: int,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor | None,
    first_PF: Tensor,
    *gradients: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """(d x of every pair (P, H), in the order of pairs; d weights or an empty tensor)."""
    (E, F, H), P = down.shape, len(first_PF)
    grad_x_PH, between = x.new_empty(P, H), x.new_empty(3 * P * F + 3 * E * H * F)
    grad_weights = x.new_empty(0) if weights is None else torch.empty_like(weights)
    _cpu.experts_backward(
        address(grad), address(x), address(gate_up), address(down), E, H, F, address(row_map_P), address(counts_E),
        address(weights), P, top_k, address(first_PF), address(between), address(grad_x_PH),
        0 if weights is None else address(grad_weights), *map(address, gradients), accumulate, threads(),
    )  # fmt: skip
    return grad_x_PH, grad_weights


def _sum(y_PH: Tensor, T: int, top_k: int) -> Tensor:
    """Of each token's pairs: (T, H)."""
    out_TH = y_PH.new_empty(T, y_PH.shape[1])
    _cpu.sum_pairs(address(y_PH), T, top_k, y_PH.shape[1], address(out_TH), threads())
    return out_TH


def _computes(gate_up: Tensor, down: Tensor, *others: Tensor | None) -> bool:
    """Whether r1._cpu should: its products read an expert's weights from the caches, and a BLAS is faster beyond."""
    small = 3 * down.shape[1] * down.shape[2] <= SMALL
    return small and gate_up.is_contiguous() and down.is_contiguous() and computes(gate_up, down, *others)


def moe_mlp(
    x_PH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_P: Tensor | None,
    *main_gradients: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if not _computes(gate_up_EHF, down_EFH, weights_P):
        return reference.moe_mlp(x_PH, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_P, *main_gradients)
    checked_counts(tokens_per_expert_E, len(x_PH))
    x_PH, counts_E = x_PH.contiguous(), tokens_per_expert_E.long().contiguous()
    weights_P = None if weights_P is None else weights_P.contiguous()
    return _forward(x_PH, None, counts_E, 1, gate_up_EHF, down_EFH, weights_P)


def moe_mlp_backward(
    grad_PH: Tensor,
    x_PH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_P: Tensor | None,
    gate_up_PF: Tensor,
    grad_gate_up_EHF: Tensor | None,
    grad_down_EFH: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    gradients = grad_gate_up_EHF, grad_down_EFH
    if not _computes(gate_up_EHF, down_EFH, weights_P, grad_PH, *gradients):
        return reference.moe_mlp_backward(
            grad_PH, x_PH, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_P, gate_up_PF, *gradients, accumulate
        )
    weights_P = None if weights_P is None else weights_P.contiguous()
    return _backward(
        grad_PH.contiguous(), x_PH.contiguous(), None, tokens_per_expert_E.long().contiguous(), 1, gate_up_EHF,
        down_EFH, weights_P, gate_up_PF, *gradients, accumulate=accumulate,
    )  # fmt: skip


def moe_layer(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    check_values: bool,
    *main_gradients: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _computes(gate_up_EHF, down_EFH, weights_TK):
        return reference.moe_layer(x_TH, ids_TK, weights_TK, gate_up_EHF, down_EFH, check_values, *main_gradients)
    T, K = ids_TK.shape
    row_map_P, counts_E = sort(ids_TK, len(gate_up_EHF))
    x_TH, weights_TK = x_TH.contiguous(), weights_TK.contiguous()
    y_PH, first_PF = _forward(x_TH, row_map_P, counts_E, K, gate_up_EHF, down_EFH, weights_TK)
    return _sum(y_PH, T, K), row_map_P, counts_E, first_PF


def moe_layer_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    row_map_P: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_PF: Tensor,
    grad_gate_up_EHF: Tensor | None,
    grad_down_EFH: Tensor | None,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    gradients = grad_gate_up_EHF, grad_down_EFH
    if not _computes(gate_up_EHF, down_EFH, weights_TK, grad_TH, *gradients):
        return reference.moe_layer_backward(
            grad_TH, x_TH, weights_TK, gate_up_EHF, down_EFH, row_map_P, tokens_per_expert_E, gate_up_PF, *gradients,
            accumulate,
        )  # fmt: skip
    T, K = weights_TK.shape
    grad_x_PH, grad_weights_TK = _backward(
        grad_TH.contiguous(), x_TH.contiguous(), row_map_P, tokens_per_expert_E, K, gate_up_EHF, down_EFH,
        weights_TK.contiguous(), gate_up_PF, *gradients, accumulate=accumulate,
    )  # fmt: skip
    return _sum(grad_x_PH, T, K), grad_weights_TK


__all__ = [
    "grouped_gemm",
    "grouped_gemm_wgrad",
    "grouped_gemm_wgrad_",
    "moe_layer",
    "moe_layer_backward",
    "moe_mlp",
    "moe_mlp_backward",
    "moe_mlp_masked",
    "permute",
    "route",
    "route_backward",
    "swiglu",
    "swiglu_backward",
    "unpermute",
    "unpermute_backward",
]
