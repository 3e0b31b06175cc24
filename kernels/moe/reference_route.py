"""Routing and the sort by expert, in plain torch.

Letters: T tokens, H hidden, E experts, K experts a token, P = T K rows sorted by expert, F width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.kernels.backend import wide
from r1.kernels.exact import sigmoid

SORTED = 2048  # numbers, up to which one stable sort is faster than the search for the best


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
    scores_TE = sigmoid(logits) if score == "sigmoid" else logits.softmax(-1)
    if replay_ids_TK is not None:
        ids_TK = replay_ids_TK.clone(memory_format=torch.contiguous_format)
    else:
        choice_TE = scores_TE.clone() if bias_E is None else scores_TE + bias_E.to(scores_TE.dtype)
        choice_TE.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if num_groups > 1:
            choice_TGE = choice_TE.view(T, num_groups, E // num_groups)
            # The score of a group is the sum of its two best experts (DeepSeek-V3, section 2.1.2).
            if E <= 2 * num_groups:
                group_TG = choice_TGE.sum(-1)
            else:
                first_TG, expert_TG = choice_TGE.max(-1)
                group_TG = first_TG + choice_TGE.scatter(-1, expert_TG[..., None], -torch.inf).amax(-1)
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
    """Ids of the `count` largest of each row, largest first; overwrites x. Of equals the lower id is first: topk and
    unstable sorts name any."""
    E = x_TE.shape[1]
    if x_TE.numel() <= SORTED:  # so few that the number of operations counts, not their size
        return x_TE.sort(dim=1, descending=True, stable=True).indices[:, :count].contiguous()
    best: list[Tensor] = []
    if x_TE.dtype != torch.float32:
        for _ in range(count):
            if best:
                x_TE.scatter_(1, best[-1], -torch.inf)
            best.append(x_TE.argmax(-1, keepdim=True))
        return torch.cat(best, 1)
    # The number's bits, ordered as the numbers are, over the id: no two are equal, and their maximum is found several
    # times as fast as an argmax. (+ 0: minus zero is zero.)
    bits_TE = x_TE.add_(0.0).view(torch.int32)
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    keys_TE = (ordered_TE.long() << 32) | torch.arange(E - 1, -1, -1, device=x_TE.device)
    for _ in range(count):
        if best:
            keys_TE.scatter_(1, best[-1], torch.iinfo(torch.int64).min)
        best.append(E - 1 - (keys_TE.amax(-1, keepdim=True) & 0xFFFFFFFF))
    return torch.cat(best, 1)


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


def sort(ids_TK: Tensor, num_experts: int, check_values: bool) -> tuple[Tensor, Tensor]:
    """(row_map_P, tokens per expert): t K + k of every row, sorted by expert, stable."""
    if check_values or ids_TK.device.type == "cpu":
        checked_ids(ids_TK, num_experts, "ids_TK")
    ids_P = ids_TK.flatten()
    return ids_P.argsort(stable=True), torch.bincount(ids_P, minlength=num_experts)


def token_of(row_map_P: Tensor, ids_TK: Tensor) -> Tensor:
    return row_map_P.div(ids_TK.shape[1], rounding_mode="floor")


def permute(x_TH: Tensor, ids_TK: Tensor, num_experts: int, check_values: bool) -> tuple[Tensor, Tensor, Tensor]:
    row_map_P, counts_E = sort(ids_TK, num_experts, check_values)
    return x_TH.index_select(0, token_of(row_map_P, ids_TK)), row_map_P, counts_E


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
    grad_PH = grad_TH.index_select(0, row_map_P.div(top_k, rounding_mode="floor"))
    if weights_TK is None:
        return grad_PH, grad_TH.new_empty(0)
    assert y_PH is not None
    dtype = wide(y_PH)
    flat = torch.zeros_like(weights_TK.reshape(-1), dtype=dtype)
    flat.index_copy_(0, row_map_P, (grad_PH.to(dtype) * y_PH).sum(-1))
    weights_P1 = weights_TK.reshape(-1).index_select(0, row_map_P)[:, None]
    return (grad_PH * weights_P1).to(y_PH.dtype), flat.view(weights_TK.shape).to(weights_TK.dtype)
