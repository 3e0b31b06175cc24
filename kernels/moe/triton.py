"""The moe family in Triton, for Hopper. Kernels: triton_route.py, triton_permute.py, triton_gemm.py.

Nothing waits for the device: how many rows an expert has is read by the kernels. float64 is computed by the torch
backend. Letters are those of reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from r1.kernels.backend import wide
from r1.kernels.bulk_copy import descriptor
from r1.kernels.moe import reference
from r1.kernels.moe import triton_gemm as gemm
from r1.kernels.moe import triton_permute as sorting
from r1.kernels.moe import triton_route as routing

ROUTE_ROWS = 4  # tokens of one program of the router: one a warp
HALF_TILE = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4}
FLOAT_TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3}

power_of_2 = triton.next_power_of_2


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
    if wide(logits_TE) == torch.float64:
        return reference.route(
            logits_TE, bias_E, top_k, num_groups, group_top_k, scale, score, replay_ids_TK, padding_mask_T, check_values
        )
    reference.check_route_values(logits_TE, replay_ids_TK, check_values)
    T, E = logits_TE.shape
    logits = logits_TE if logits_TE.stride(-1) == 1 else logits_TE.contiguous()
    ids = logits.new_empty(T, top_k, dtype=torch.int64)
    weights = logits.new_empty(T, top_k, dtype=torch.float32)
    counts = logits.new_zeros(E, dtype=torch.int64)
    if T:
        size = E // num_groups
        routing.route_kernel[(triton.cdiv(T, ROUTE_ROWS),)](
            logits, logits.stride(0), logits if bias_E is None else bias_E.contiguous(),
            ids if replay_ids_TK is None else replay_ids_TK.contiguous(),
            ids if padding_mask_T is None else padding_mask_T.contiguous().view(torch.uint8),
            ids, weights, counts, T, scale,
            SIGMOID=score == "sigmoid", BIAS=bias_E is not None, REPLAY=replay_ids_TK is not None,
            PADDING=padding_mask_T is not None, GROUPS=num_groups, GROUP_SIZE=size, GROUP_TOP_K=group_top_k,
            TOP_K=top_k, GROUPS_2=power_of_2(num_groups), GROUP_SIZE_2=power_of_2(size), TOP_K_2=power_of_2(top_k),
            ROWS=ROUTE_ROWS, num_warps=ROUTE_ROWS,
        )  # fmt: skip
    return ids, weights, counts


def route_backward(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, padding_mask_T: Tensor | None, scale: float, score: str
) -> Tensor:
    if wide(logits_TE) == torch.float64:
        return reference.route_backward(grad_TK, logits_TE, ids_TK, padding_mask_T, scale, score)
    T, E = logits_TE.shape
    K = ids_TK.shape[1]
    logits = logits_TE if logits_TE.stride(-1) == 1 else logits_TE.contiguous()
    out = logits.new_empty(T, E)
    if T:
        routing.route_backward_kernel[(triton.cdiv(T, ROUTE_ROWS),)](
            grad_TK.contiguous(), logits, logits.stride(0), ids_TK.contiguous(),
            ids_TK if padding_mask_T is None else padding_mask_T.contiguous().view(torch.uint8), out, T, E, scale,
            SIGMOID=score == "sigmoid", PADDING=padding_mask_T is not None, TOP_K=K, TOP_K_2=power_of_2(K),
            E_2=power_of_2(E), ROWS=ROUTE_ROWS, num_warps=ROUTE_ROWS,
        )  # fmt: skip
    return out


def permute(x_TH: Tensor, ids_TK: Tensor, num_experts: int, check_values: bool) -> tuple[Tensor, Tensor, Tensor]:
    if check_values or ids_TK.device.type == "cpu":
        reference.checked_ids(ids_TK, num_experts, "ids_TK")
    T, K = ids_TK.shape
    P, H, E = T * K, x_TH.shape[1], num_experts
    ids = ids_TK.contiguous()
    blocks = triton.cdiv(P, sorting.PAIRS)
    out = x_TH.new_empty(P, H)
    row_map = ids.new_empty(P)
    if P == 0:
        return out, row_map, ids.new_zeros(E)
    counts = torch.empty(blocks, E, dtype=torch.int32, device=ids.device)
    bins = max(power_of_2(E + 1), 32)
    sorting.count_kernel[(blocks,)](ids, counts, P, E=E, BINS=bins, PAIRS=sorting.PAIRS)
    by_expert = counts.t().contiguous()
    begin = by_expert.view(-1).cumsum(0).view(E, blocks) - by_expert
    position = torch.empty(P, dtype=torch.int32, device=ids.device)
    sorting.place_kernel[(blocks,)](ids, begin, row_map, position, P, blocks, PAIRS=sorting.PAIRS)
    x = x_TH if x_TH.stride(-1) == 1 else x_TH.contiguous()
    if H:
        block = _columns(H)
        sorting.permute_kernel[(T, triton.cdiv(H, block))](x, x.stride(0), position, out, H, K=K, BLOCK=block)
    return out, row_map, counts.sum(0)


def _columns(H: int) -> int:
    return min(power_of_2(H), 1024)


def unpermute(y_PH: Tensor, row_map_P: Tensor, num_tokens: int, top_k: int, weights_TK: Tensor | None) -> Tensor:
    if wide(y_PH) == torch.float64:
        return reference.unpermute(y_PH, row_map_P, num_tokens, top_k, weights_TK)
    P, H = y_PH.shape
    out = y_PH.new_empty(num_tokens, H)
    if out.numel() == 0:
        return out
    pairs = num_tokens * top_k
    whole = pairs == P
    position = torch.empty(pairs, dtype=torch.int32, device=y_PH.device)
    if not whole:
        position.fill_(-1)
    if P:
        sorting.position_kernel[(triton.cdiv(P, 1024),)](row_map_P.contiguous(), position, P, BLOCK=1024)
    y = y_PH if y_PH.stride(-1) == 1 else y_PH.contiguous()
    block = _columns(H)
    sorting.unpermute_kernel[(num_tokens, triton.cdiv(H, block))](
        y, y.stride(0), position, y if weights_TK is None else weights_TK.contiguous(), out, H,
        WEIGHTED=weights_TK is not None, K=top_k, BLOCK=block,
    )  # fmt: skip
    return out


def unpermute_backward(
    grad_TH: Tensor, y_PH: Tensor | None, row_map_P: Tensor, top_k: int, weights_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    if wide(grad_TH) == torch.float64:
        return reference.unpermute_backward(grad_TH, y_PH, row_map_P, top_k, weights_TK)
    P, H = row_map_P.shape[0], grad_TH.shape[1]
    grad_y = grad_TH.new_empty(P, H)
    grad_weights = grad_TH.new_empty(0) if weights_TK is None else torch.zeros_like(weights_TK.contiguous())
    if P and H:
        grad, y = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_TH, grad_TH if y_PH is None else y_PH))
        sorting.unpermute_backward_kernel[(P,)](
            grad, grad.stride(0), y, y.stride(0), row_map_P.contiguous(),
            grad if weights_TK is None else weights_TK.contiguous(), grad_y, grad_weights, H,
            WEIGHTED=weights_TK is not None, K=top_k, BLOCK=_columns(H),
        )  # fmt: skip
    return grad_y, grad_weights


def _tile(x: Tensor) -> dict[str, Any]:
    return HALF_TILE if x.element_size() == 2 else FLOAT_TILE


def _precision(x: Tensor) -> str:
    return "tf32" if x.element_size() == 2 else "tf32x3"


def _plan(tokens_per_expert_E: Tensor, P: int, block: int, room: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Where each expert's rows begin and end, and its last tile. With room for that many, experts do not follow one
    another."""
    if tokens_per_expert_E.device.type == "cpu" and room is None:
        reference.checked_counts(tokens_per_expert_E, P)
    E, counts = len(tokens_per_expert_E), tokens_per_expert_E.contiguous()
    begins, ends, tile_ends = torch.empty(3, E, dtype=torch.int32, device=counts.device).unbind()
    gemm.plan_kernel[(1,)](
        counts, begins, ends, tile_ends, E, P, room or 0, MASKED=room is not None, BLOCK_M=block, E_2=power_of_2(E)
    )
    return begins, ends, tile_ends


def grouped_gemm(x_PH: Tensor, weight_EHF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    if wide(x_PH) == torch.float64:
        return reference.grouped_gemm(x_PH, weight_EHF, tokens_per_expert_E)
    return _grouped_gemm(x_PH, weight_EHF, tokens_per_expert_E)


def _grouped_gemm(x_PH: Tensor, weight_EHF: Tensor, tokens_per_expert_E: Tensor, room: int | None = None) -> Tensor:
    (P, K), (E, _, N) = x_PH.shape, weight_EHF.shape
    out = x_PH.new_empty(P, N)
    if out.numel() == 0 or K == 0:
        return out.zero_()
    tile = _tile(x_PH)
    begins, ends, tile_ends = _plan(tokens_per_expert_E, P, tile["BLOCK_M"], room)
    transposed = weight_EHF.stride(2) != 1 and weight_EHF.stride(1) == 1
    if transposed:
        weight = descriptor(weight_EHF.transpose(1, 2), [1, tile["BLOCK_N"], tile["BLOCK_K"]])
    else:
        weight = descriptor(weight_EHF, [1, tile["BLOCK_K"], tile["BLOCK_N"]])
    # Of E groups each may end in a tile that is not full.
    tiles = (P + min(E, P) * (tile["BLOCK_M"] - 1)) // tile["BLOCK_M"]
    gemm.grouped_gemm_kernel[(tiles * triton.cdiv(N, tile["BLOCK_N"]),)](
        descriptor(x_PH, [tile["BLOCK_M"], tile["BLOCK_K"]]), weight, out, out.stride(0), begins, ends, tile_ends, E, N,
        K, TRANSPOSED=transposed, PRECISION=_precision(x_PH), E_2=power_of_2(E), **tile,
    )  # fmt: skip
    return out


def grouped_gemm_wgrad(x_PH: Tensor, grad_PF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    if wide(x_PH) == torch.float64:
        return reference.grouped_gemm_wgrad(x_PH, grad_PF, tokens_per_expert_E)
    out = x_PH.new_empty(len(tokens_per_expert_E), x_PH.shape[1], grad_PF.shape[1])
    _wgrad(out, x_PH, grad_PF, tokens_per_expert_E, accumulate=False)
    return out


def grouped_gemm_wgrad_(out_EHF: Tensor, x_PH: Tensor, grad_PF: Tensor, tokens_per_expert_E: Tensor) -> None:
    if torch.float64 in (wide(x_PH), wide(out_EHF)):
        reference.grouped_gemm_wgrad_(out_EHF, x_PH, grad_PF, tokens_per_expert_E)
    else:
        _wgrad(out_EHF, x_PH, grad_PF, tokens_per_expert_E, accumulate=True)


def _wgrad(out: Tensor | None, x: Tensor, grad: Tensor, tokens_per_expert_E: Tensor, accumulate: bool) -> None:
    if out is None:
        return
    E, M, N = out.shape
    if out.numel() == 0:
        return
    if x.shape[0] == 0:
        out.zero_() if not accumulate else None
        return
    tile = _tile(x)
    begins, ends, _ = _plan(tokens_per_expert_E, len(x), tile["BLOCK_M"])
    x, grad = (y if y.stride(-1) == 1 else y.contiguous() for y in (x, grad))
    gemm.grouped_wgrad_kernel[(E * triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)](
        descriptor(x, [tile["BLOCK_K"], tile["BLOCK_M"]]), descriptor(grad, [tile["BLOCK_K"], tile["BLOCK_N"]]),
        x, x.stride(0), grad, grad.stride(0), out, begins, ends, M, N,
        ACCUMULATE=accumulate, PRECISION=_precision(x), **tile,
    )  # fmt: skip


def _rows_of(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    if wide(gate_up) == torch.float64:
        return reference.swiglu(gate_up, weights)
    return _swiglu(gate_up, weights)


def _swiglu(gate_up: Tensor, weights: Tensor | None, counts_E: Tensor | None = None, room: int = 1) -> Tensor:
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], F)
    if out.numel():
        x = _rows_of(gate_up)
        gemm.swiglu_kernel[(len(x), triton.cdiv(F, _columns(F)))](
            x, x.stride(0), x if weights is None else weights.contiguous(), out, x if counts_E is None else counts_E,
            room, F, WEIGHTED=weights is not None, MASKED=counts_E is not None, BLOCK=_columns(F),
        )  # fmt: skip
    return out


def swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    if wide(gate_up) == torch.float64:
        return reference.swiglu_backward(grad, gate_up, weights)
    grad_gate_up, grad_weights, _ = _swiglu_backward(grad, gate_up, weights, again=False)
    return grad_gate_up, grad_weights


def _swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor | None, again: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(d gate_up, d weights or an empty tensor, the forward's result or an empty tensor)."""
    F = gate_up.shape[-1] // 2
    grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
    grad_weights = gate_up.new_empty(0) if weights is None else torch.zeros_like(weights.contiguous())
    made_again = gate_up.new_empty(*gate_up.shape[:-1], F) if again else gate_up.new_empty(0)
    if grad_gate_up.numel():
        x, g = _rows_of(gate_up), _rows_of(grad)
        gemm.swiglu_backward_kernel[(len(x),)](
            g, g.stride(0), x, x.stride(0), x if weights is None else weights.contiguous(), grad_gate_up,
            grad_weights, made_again, F, WEIGHTED=weights is not None, AGAIN=again, BLOCK=_columns(F),
        )  # fmt: skip
    return grad_gate_up, grad_weights, made_again


def moe_mlp(
    x_PH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_P: Tensor | None,
    *main_gradients: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gate_up_PF = grouped_gemm(x_PH, gate_up_EHF, tokens_per_expert_E)
    return grouped_gemm(swiglu(gate_up_PF, weights_P), down_EFH, tokens_per_expert_E), gate_up_PF


def moe_mlp_masked(
    x_EMH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_EM: Tensor | None,
) -> Tensor:
    if wide(x_EMH) == torch.float64:
        return reference.moe_mlp_masked(x_EMH, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_EM)
    counts, room = tokens_per_expert_E.contiguous(), x_EMH.shape[1]
    if counts.device.type == "cpu":
        reference.checked_masked_counts(counts, room)
    gate_up_PF = _grouped_gemm(x_EMH.flatten(0, 1), gate_up_EHF, counts, room)
    middle_PF = _swiglu(gate_up_PF, None if weights_EM is None else weights_EM.flatten(), counts, room)
    return _grouped_gemm(middle_PF, down_EFH, counts, room).view(x_EMH.shape)


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
    """As in reference.py; one pass makes the middle again together with its gradients."""
    gradients = [gradient for gradient in (grad_gate_up_EHF, grad_down_EFH) if gradient is not None]
    if wide(x_PH, *gradients) == torch.float64:
        return reference.moe_mlp_backward(
            grad_PH, x_PH, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_P, gate_up_PF, grad_gate_up_EHF,
            grad_down_EFH, accumulate,
        )  # fmt: skip
    grad_middle_PF = grouped_gemm(grad_PH, down_EFH.transpose(1, 2), tokens_per_expert_E)
    grad_gate_up_PF, grad_weights, middle_PF = _swiglu_backward(grad_middle_PF, gate_up_PF, weights_P, again=True)
    _wgrad(grad_down_EFH, middle_PF, grad_PH, tokens_per_expert_E, accumulate)
    _wgrad(grad_gate_up_EHF, x_PH, grad_gate_up_PF, tokens_per_expert_E, accumulate)
    return grouped_gemm(grad_gate_up_PF, gate_up_EHF.transpose(1, 2), tokens_per_expert_E), grad_weights


def moe_layer(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    check_values: bool,
    *main_gradients: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, K = ids_TK.shape
    x_PH, row_map_P, counts_E = permute(x_TH, ids_TK, len(gate_up_EHF), check_values)
    weights_P = weights_TK.reshape(-1).index_select(0, row_map_P)
    y_PH, gate_up_PF = moe_mlp(x_PH, counts_E, gate_up_EHF, down_EFH, weights_P)
    return unpermute(y_PH, row_map_P, T, K, None), row_map_P, counts_E, gate_up_PF


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
    """As in reference.py. The sorted rows of x are copied again, not kept."""
    T, K = weights_TK.shape
    weights_P = weights_TK.reshape(-1).index_select(0, row_map_P)
    token_P = reference.token_of(row_map_P, weights_TK)
    grad_x_PH, grad_weights_P = moe_mlp_backward(
        grad_TH.index_select(0, token_P), x_TH.index_select(0, token_P), tokens_per_expert_E, gate_up_EHF, down_EFH,
        weights_P, gate_up_PF, grad_gate_up_EHF, grad_down_EFH, accumulate,
    )  # fmt: skip
    grad_weights = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    grad_weights.view(-1).index_copy_(0, row_map_P, grad_weights_P)
    return unpermute(grad_x_PH, row_map_P, T, K, None), grad_weights
