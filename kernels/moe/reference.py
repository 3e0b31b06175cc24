"""The moe family in plain torch.

Letters: T tokens, H hidden, E experts, K experts a token, P = T K rows sorted by expert, F width of an expert.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import Tensor

from r1.kernels.backend import wide

THIS = sys.modules[__name__]


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
    T, E = logits_TE.shape
    check_route_values(logits_TE, replay_ids_TK, check_values)
    logits = logits_TE.to(wide(logits_TE))
    scores_TE = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    if replay_ids_TK is not None:
        ids_TK = replay_ids_TK.clone(memory_format=torch.contiguous_format)
    else:
        choice_TE = scores_TE.clone() if bias_E is None else scores_TE + bias_E.to(scores_TE.dtype)
        if num_groups > 1:
            choice_TGE = choice_TE.view(T, num_groups, E // num_groups)
            # The score of a group is the sum of its two best experts (DeepSeek-V3, section 2.1.2).
            group_TG = choice_TGE.topk(min(2, E // num_groups), -1).values.sum(-1)
            keep_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, _best(group_TG, group_top_k), True)
            choice_TGE.masked_fill_(~keep_TG[..., None], -torch.inf)
        ids_TK = _best(choice_TE, top_k)
    chosen_TK = scores_TE.gather(1, ids_TK)
    weights_TK = chosen_TK * (scale / (chosen_TK.sum(-1, keepdim=True) + 1e-20))
    counts_E = torch.zeros(E, dtype=torch.int64, device=ids_TK.device)
    one_TK = torch.ones_like(ids_TK)
    if padding_mask_T is not None:
        weights_TK = weights_TK.masked_fill_(padding_mask_T[:, None], 0)
        one_TK.masked_fill_(padding_mask_T[:, None], 0)
    return ids_TK, weights_TK, counts_E.scatter_add_(0, ids_TK.flatten(), one_TK.flatten())


def check_route_values(logits_TE: Tensor, replay_ids_TK: Tensor | None, check_values: bool) -> None:
    """Raises ValueError for a replayed id that is no expert's, and for a logit that is NaN. Unless check_values, looks
    at ids on a CPU only, where nobody waits for the answer, and at no logits."""
    if check_values:
        wrong = logits_TE.isnan()
        if wrong.any():
            raise ValueError(f"logits_TE{wrong.nonzero()[0].tolist()} is nan, wanted a number")
    if replay_ids_TK is not None and (check_values or logits_TE.device.type == "cpu"):
        checked_ids(replay_ids_TK, logits_TE.shape[1], "replay_ids_TK")


def _best(x_TE: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest of each row, largest first; overwrites x. argmax names the first of equals; topk and
    unstable sorts name any."""
    best = x_TE.new_empty(x_TE.shape[0], count, dtype=torch.int64)
    for k in range(count):
        column = best[:, k : k + 1]
        column.copy_(x_TE.argmax(-1, keepdim=True))
        if k + 1 < count:
            x_TE.scatter_(1, column, -torch.inf)
    return best


def route_backward(
    grad_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, padding_mask_T: Tensor | None, scale: float, score: str
) -> Tensor:
    logits = logits_TE.to(grad_TK.dtype)
    if padding_mask_T is not None:
        grad_TK = grad_TK.masked_fill(padding_mask_T[:, None], 0)
    if score == "sigmoid":
        chosen_TK = logits.gather(1, ids_TK).sigmoid_()
    else:
        scores_TE = logits.softmax(-1)
        chosen_TK = scores_TE.gather(1, ids_TK)
    total_T1 = chosen_TK.sum(-1, keepdim=True) + 1e-20
    shared_T1 = (grad_TK * chosen_TK).sum(-1, keepdim=True) / total_T1
    grad_chosen_TK = (grad_TK - shared_T1) * (scale / total_T1)
    grad_TE = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    if score == "sigmoid":
        grad_TE.scatter_(1, ids_TK, grad_chosen_TK * chosen_TK * (1 - chosen_TK))
    else:
        grad_TE.scatter_(1, ids_TK, grad_chosen_TK)
        grad_TE = torch._softmax_backward_data(grad_TE, scores_TE, -1, scores_TE.dtype)
    return grad_TE.to(logits_TE.dtype)


def checked_ids(ids_TK: Tensor, E: int, name: str) -> Tensor:
    if ids_TK.numel():
        low, high = (int(x) for x in ids_TK.aminmax())
        if low < 0 or high >= E:
            raise ValueError(f"{name} holds {low if low < 0 else high}, wanted 0 <= id < {E}")
    return ids_TK


def permute(x_TH: Tensor, ids_TK: Tensor, num_experts: int, check_values: bool) -> tuple[Tensor, Tensor, Tensor]:
    if check_values or ids_TK.device.type == "cpu":
        checked_ids(ids_TK, num_experts, "ids_TK")
    ids_P = ids_TK.flatten()
    row_map_P = ids_P.argsort(stable=True)
    return gather_rows(x_TH, row_map_P, ids_TK.shape[1]), row_map_P, torch.bincount(ids_P, minlength=num_experts)


def gather_rows(x_TH: Tensor, row_map_P: Tensor, top_k: int) -> Tensor:
    return x_TH.index_select(0, row_map_P.div(top_k, rounding_mode="floor"))


def unpermute(y_PH: Tensor, row_map_P: Tensor, num_tokens: int, top_k: int, weights_TK: Tensor | None) -> Tensor:
    """Sums each token's rows in order of k, so the result does not depend on how experts were laid out."""
    P, H = y_PH.shape
    dtype, pairs = wide(y_PH), num_tokens * top_k
    if P == pairs and y_PH.dtype == dtype and P and H:
        # A bag of rows for each token: one pass, on all cores.
        position_P = torch.empty_like(row_map_P).index_copy_(0, row_map_P, torch.arange(P, device=row_map_P.device))
        weights = None if weights_TK is None else weights_TK.to(dtype)
        return torch.nn.functional.embedding_bag(
            position_P.view(num_tokens, top_k), y_PH, mode="sum", per_sample_weights=weights
        )
    rows = (y_PH.new_empty if P == pairs else y_PH.new_zeros)(pairs, H)
    y_TKH = rows.index_copy_(0, row_map_P, y_PH).view(num_tokens, top_k, H)
    if weights_TK is not None:
        y_TKH = y_TKH * weights_TK.to(dtype)[..., None]
    return y_TKH.sum(1, dtype=dtype).to(y_PH.dtype)


def unpermute_backward(
    grad_TH: Tensor, y_PH: Tensor | None, row_map_P: Tensor, top_k: int, weights_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(d y, d weights or an empty tensor); y is needed for the weights only."""
    grad_PH = gather_rows(grad_TH, row_map_P, top_k)
    if weights_TK is None:
        return grad_PH, grad_TH.new_empty(0)
    assert y_PH is not None
    dtype = wide(y_PH)
    flat = torch.zeros_like(weights_TK.reshape(-1), dtype=dtype)
    flat.index_copy_(0, row_map_P, (grad_PH.to(dtype) * y_PH).sum(-1))
    weights_P1 = weights_TK.reshape(-1).index_select(0, row_map_P)[:, None]
    return (grad_PH * weights_P1).to(y_PH.dtype), flat.view(weights_TK.shape).to(weights_TK.dtype)


def checked_counts(tokens_per_expert_E: Tensor, P: int) -> list[int]:
    counts = tokens_per_expert_E.tolist()
    if sum(counts) != P or min(counts, default=0) < 0:
        raise ValueError(f"tokens_per_expert_E is {counts}, wanted numbers >= 0 whose sum is the {P} rows")
    return counts


def _groups(tokens_per_expert_E: Tensor, P: int, *tensors: Tensor) -> list[tuple]:
    """(expert, then each tensor's rows of that expert) for the experts that have any."""
    counts = checked_counts(tokens_per_expert_E, P)
    parts = zip(*(t.split(counts) for t in tensors))
    return [(e, *rows) for e, (count, rows) in enumerate(zip(counts, parts)) if count]


def grouped_gemm(x_PH: Tensor, weight_EHF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    out_PF = x_PH.new_empty(x_PH.shape[0], weight_EHF.shape[2])
    for e, x, out in _groups(tokens_per_expert_E, len(x_PH), x_PH, out_PF):
        torch.mm(x, weight_EHF[e], out=out)
    return out_PF


def grouped_gemm_wgrad(x_PH: Tensor, grad_PF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """x.T @ grad for every expert (E, H, F); exactly zero for an expert with no rows."""
    weight_EHF = x_PH.new_empty(len(tokens_per_expert_E), x_PH.shape[1], grad_PF.shape[1])
    seen = [False] * len(weight_EHF)
    for e, x, grad in _groups(tokens_per_expert_E, len(x_PH), x_PH, grad_PF):
        torch.mm(x.t(), grad, out=weight_EHF[e])
        seen[e] = True
    for e, was_seen in enumerate(seen):
        if not was_seen:
            weight_EHF[e].zero_()
    return weight_EHF


def grouped_gemm_wgrad_(out_EHF: Tensor, x_PH: Tensor, grad_PF: Tensor, tokens_per_expert_E: Tensor) -> None:
    """Adds x.T @ grad of every expert to out."""
    for e, x, grad in _groups(tokens_per_expert_E, len(x_PH), x_PH, grad_PF):
        out_EHF[e].addmm_(x.t().to(out_EHF.dtype), grad.to(out_EHF.dtype))


def swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate, up = gate_up.to(wide(gate_up)).chunk(2, -1)
    out = torch.nn.functional.silu(gate).mul_(up)
    if weights is not None:
        out.mul_(weights[..., None])
    return out.to(gate_up.dtype).contiguous()


def swiglu_backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(d gate_up, d weights or an empty tensor), with the activation made again rather than kept."""
    dtype = wide(gate_up)
    gate, up = gate_up.to(dtype).chunk(2, -1)
    grad = grad.to(dtype)
    activation = torch.nn.functional.silu(gate)
    grad_weights = gate_up.new_empty(0)
    if weights is not None:
        grad_weights = (grad * up).mul_(activation).sum(-1).to(weights.dtype)
        grad = grad * weights.to(dtype)[..., None]
    grad_gate_up = torch.empty_like(gate_up, dtype=dtype, memory_format=torch.contiguous_format)
    grad_gate, grad_up = grad_gate_up.chunk(2, -1)
    torch.mul(grad, activation, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return grad_gate_up.to(gate_up.dtype), grad_weights


def moe_mlp(
    x_PH: Tensor, tokens_per_expert_E: Tensor, gate_up_EHF: Tensor, down_EFH: Tensor, weights_P: Tensor | None
) -> tuple[Tensor, Tensor]:
    gate_up_PF, y_PH = x_PH.new_empty(x_PH.shape[0], gate_up_EHF.shape[2]), x_PH.new_empty(x_PH.shape)
    if x_PH.dtype != wide(x_PH):
        gate_up_PF = grouped_gemm(x_PH, gate_up_EHF, tokens_per_expert_E)
        return grouped_gemm(swiglu(gate_up_PF, weights_P), down_EFH, tokens_per_expert_E), gate_up_PF
    # One expert after the other, through the same small buffers: what is between the products stays in the cache.
    gate_PF, up_PF = gate_up_PF.chunk(2, -1)
    weights_P1 = _column(weights_P, x_PH)
    rows = _groups(tokens_per_expert_E, len(x_PH), x_PH, gate_up_PF, gate_PF, up_PF, y_PH, weights_P1)
    buffer = _buffers(1, rows, down_EFH)[0]
    first_EHF, second_EFH = gate_up_EHF.unbind(), down_EFH.unbind()
    for e, x, gate_up, gate, up, y, weights in rows:
        torch.mm(x, first_EHF[e], out=gate_up)
        middle = _silu(gate, out=buffer[: len(x)]).mul_(up)
        if weights_P is not None:
            middle.mul_(weights)
        torch.mm(middle, second_EFH[e], out=y)
    return y_PH, gate_up_PF


_silu, _silu_backward = torch.ops.aten.silu.out, torch.ops.aten.silu_backward.grad_input


def _column(weights_P: Tensor | None, x_PH: Tensor) -> Tensor:
    return x_PH.new_empty(len(x_PH), 0) if weights_P is None else weights_P.to(x_PH.dtype)[:, None]


def _buffers(count: int, rows: list[tuple], like_EFH: Tensor) -> Tensor:
    return like_EFH.new_empty(count, max((len(row[1]) for row in rows), default=0), like_EFH.shape[1])


def moe_mlp_backward(
    grad_PH: Tensor,
    x_PH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_P: Tensor | None,
    gate_up_PF: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d x, d gate_up weight, d down weight, d weights_P or an empty tensor)."""
    if x_PH.dtype != wide(x_PH):
        grad_middle_PF = grouped_gemm(grad_PH, down_EFH.transpose(1, 2), tokens_per_expert_E)
        middle_PF = swiglu(gate_up_PF, weights_P)
        grad_down = grouped_gemm_wgrad(middle_PF, grad_PH, tokens_per_expert_E)
        grad_gate_up_PF, grad_weights = swiglu_backward(grad_middle_PF, gate_up_PF, weights_P)
        grad_gate_up = grouped_gemm_wgrad(x_PH, grad_gate_up_PF, tokens_per_expert_E)
        grad_x = grouped_gemm(grad_gate_up_PF, gate_up_EHF.transpose(1, 2), tokens_per_expert_E)
        return grad_x, grad_gate_up, grad_down, grad_weights
    grad_x, grad_gate_up, grad_down = (
        torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x_PH, gate_up_EHF, down_EFH)
    )
    gate_PF, up_PF = gate_up_PF.chunk(2, -1)
    weights_P1 = _column(weights_P, x_PH)
    grad_weights_P1 = torch.empty_like(weights_P1)
    rows = _groups(
        tokens_per_expert_E, len(x_PH), x_PH, grad_PH.contiguous(), gate_PF, up_PF, weights_P1, grad_x, grad_weights_P1
    )
    F = down_EFH.shape[1]
    spare = _buffers(5, rows, down_EFH).view(5, -1)
    first_EFH, second_EHF = gate_up_EHF.transpose(1, 2).unbind(), down_EFH.transpose(1, 2).unbind()
    into_first, into_second = grad_gate_up.unbind(), grad_down.unbind()
    empty = set(range(len(gate_up_EHF)))
    for e, x, grad, gate, up, weights, grad_x_rows, grad_weights in rows:
        empty.discard(e)
        N = len(x)
        grad_middle, activation, middle = spare[:3, : N * F].view(3, N, F).unbind()
        grad_first = spare[3:].view(-1)[: 2 * N * F].view(N, 2 * F)
        grad_gate, grad_up = grad_first.split(F, -1)
        torch.mm(grad, second_EHF[e], out=grad_middle)
        torch.mul(_silu(gate, out=activation), up, out=middle)
        if weights_P is not None:
            torch.sum(torch.mul(grad_middle, middle, out=grad_up), -1, True, out=grad_weights)
            middle.mul_(weights)
            grad_middle.mul_(weights)
        torch.mm(middle.t(), grad, out=into_second[e])
        torch.mul(grad_middle, activation, out=grad_up)
        _silu_backward(grad_middle.mul_(up), gate, grad_input=grad_gate)
        torch.mm(x.t(), grad_first, out=into_first[e])
        torch.mm(grad_first, first_EFH[e], out=grad_x_rows)
    for e in empty:
        grad_gate_up[e].zero_()
        grad_down[e].zero_()
    if weights_P is None:
        return grad_x, grad_gate_up, grad_down, x_PH.new_empty(0)
    return grad_x, grad_gate_up, grad_down, grad_weights_P1[:, 0].to(weights_P.dtype)


def moe_layer(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    check_values: bool,
    *,
    kernels: ModuleType = THIS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out_TH, then what the backward needs: the row map, tokens per expert, the first product)."""
    T, K = ids_TK.shape
    x_PH, row_map_P, counts_E = kernels.permute(x_TH, ids_TK, len(gate_up_EHF), check_values)
    weights_P = weights_TK.reshape(-1).index_select(0, row_map_P)
    y_PH, gate_up_PF = kernels.moe_mlp(x_PH, counts_E, gate_up_EHF, down_EFH, weights_P)
    return kernels.unpermute(y_PH, row_map_P, T, K, None), row_map_P, counts_E, gate_up_PF


def moe_layer_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    weights_TK: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    row_map_P: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_PF: Tensor,
    *,
    kernels: ModuleType = THIS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d x, d weights_TK, d gate_up weight, d down weight). The sorted rows of x are copied again, not kept."""
    T, K = weights_TK.shape
    weights_P = weights_TK.reshape(-1).index_select(0, row_map_P)
    grad_PH, x_PH = gather_rows(grad_TH, row_map_P, K), gather_rows(x_TH, row_map_P, K)
    grad_x_PH, grad_gate_up, grad_down, grad_weights_P = kernels.moe_mlp_backward(
        grad_PH, x_PH, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_P, gate_up_PF
    )
    grad_weights = torch.empty_like(weights_TK, memory_format=torch.contiguous_format)
    grad_weights.view(-1).index_copy_(0, row_map_P, grad_weights_P)
    return kernels.unpermute(grad_x_PH, row_map_P, T, K, None), grad_weights, grad_gate_up, grad_down
