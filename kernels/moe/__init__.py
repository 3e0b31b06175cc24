"""The moe family: routing, permutation, grouped GEMM and SwiGLU for mixtures of experts.

Letters: T tokens, H hidden, E experts, K experts a token, P rows sorted by expert (T K of them), F width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.kernels.backend import register, require, wide
from r1.kernels.moe import operators, reference

register("moe", "torch", reference, proven_on=("cpu", "cuda"))
register("moe", "cpu", "r1.kernels.moe.cpu", proven_on=("cpu",))
register("moe", "triton", "r1.kernels.moe.triton", proven_on=())

SCORES = ("sigmoid", "softmax")


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    num_groups: int,
    group_top_k: int,
    scale: float,
    score: str = "sigmoid",
    replay_ids_TK: Tensor | None = None,
    padding_mask_T: Tensor | None = None,
    check_values: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2): (ids_TK int64, weights_TK, tokens_per_expert_E int64).

    Scores are sigmoid (or softmax) of the logits in float32. The choice is by score + bias: the group_top_k best of
    num_groups groups (a group's score is the sum of its two best), then the top_k best experts in them, best first,
    ties to the lower id. Weights are the chosen scores without bias over their sum (+ 1e-20), times scale, in float32.
    replay_ids_TK int64 takes the place of the choice (routing replay). Gradients go through the weights to the logits;
    bias_E has none. Where padding_mask_T is true a token gets ids, but weights of 0, and is not counted.

    Raises ValueError for wrong shapes, types or devices, and counts that do not fit; with check_values also for a NaN
    among the logits, which otherwise ranks last, and for replayed ids out of range, which are otherwise
    looked at on a CPU only: on a GPU the host would have to wait.
    """
    require(logits_TE.dim() == 2 and logits_TE.is_floating_point(), "logits_TE", logits_TE, "a floating (T, E) tensor")
    T, E = logits_TE.shape
    if bias_E is not None:
        require(
            bias_E.shape == (E,) and bias_E.device == logits_TE.device,
            "bias_E", bias_E, f"a ({E},) tensor on {logits_TE.device}",
        )  # fmt: skip
        bias_E = bias_E.detach()
    require(num_groups >= 1 and E % num_groups == 0, "num_groups", num_groups, f"a divisor of the {E} experts")
    require(1 <= group_top_k <= num_groups, "group_top_k", group_top_k, f"1..{num_groups}")
    reach = E // num_groups * group_top_k if num_groups > 1 else E
    require(1 <= top_k <= reach, "top_k", top_k, f"1..{reach}, the experts that can be chosen")
    require(score in SCORES, "score", score, f"one of {', '.join(SCORES)}")
    if replay_ids_TK is not None:
        require(
            replay_ids_TK.shape == (T, top_k)
            and replay_ids_TK.dtype == torch.int64
            and replay_ids_TK.device == logits_TE.device,
            "replay_ids_TK", replay_ids_TK, f"an int64 ({T}, {top_k}) tensor on {logits_TE.device}",
        )  # fmt: skip
    require(
        padding_mask_T is None
        or (padding_mask_T.shape == (T,) and padding_mask_T.dtype == torch.bool
            and padding_mask_T.device == logits_TE.device),
        "padding_mask_T", padding_mask_T, f"a bool ({T},) tensor on {logits_TE.device}",
    )  # fmt: skip
    return operators.route(
        logits_TE, bias_E, top_k, num_groups, group_top_k, float(scale), score, replay_ids_TK, padding_mask_T,
        check_values,
    )  # fmt: skip


def sequence_balance_loss(
    logits_TE: Tensor,
    ids_TK: Tensor,
    cu_seqlens: Tensor,
    score: str = "sigmoid",
    padding_mask_T: Tensor | None = None,
) -> Tensor:
    """DeepSeek-V3's complementary sequence-wise balance loss (arXiv 2412.19437, equations 17-20), one a sequence (S).

    sum over experts i of f_i P_i, with f_i = E / (K L) x the sequence's tokens that chose i, and P_i the mean of
    score_i / sum of scores; 1 where the load is even. cu_seqlens is int (S + 1); multiply by the paper's alpha, 1e-4.
    Differentiable in the logits. Tokens that are padding do not count; a sequence of none has 0.
    """
    require(score in SCORES, "score", score, f"one of {', '.join(SCORES)}")
    require(cu_seqlens.dim() == 1 and len(cu_seqlens) >= 1, "cu_seqlens", cu_seqlens, "an integer (S + 1,) tensor")
    require(
        ids_TK.dim() == 2 and len(ids_TK) == len(logits_TE), "ids_TK", ids_TK, f"an int64 ({len(logits_TE)}, K) tensor"
    )
    (T, E), K, S = logits_TE.shape, ids_TK.shape[1], len(cu_seqlens) - 1
    logits = logits_TE.to(wide(logits_TE))
    scores_TE = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    share_TE = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20)
    counted_T = logits.new_ones(T) if padding_mask_T is None else (~padding_mask_T).to(logits.dtype)
    token = torch.arange(T, device=logits.device)
    sequence_T = torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True).clamp(max=max(S - 1, 0))
    length_S1 = logits.new_zeros(S).index_add(0, sequence_T, counted_T).clamp(min=1)[:, None]
    mean_SE = logits.new_zeros(S, E).index_add(0, sequence_T, share_TE * counted_T[:, None]) / length_S1
    chosen_TE = torch.zeros_like(scores_TE).scatter(1, ids_TK, 1.0) * counted_T[:, None]
    load_SE = logits.new_zeros(S, E).index_add(0, sequence_T, chosen_TE) * (E / K) / length_S1
    return (load_SE.detach() * mean_SE).sum(-1)


def permute(
    x_TH: Tensor, ids_TK: Tensor, num_experts: int, check_values: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies each token once for each of its experts, sorted by expert: (x_PH, row_map_P, tokens_per_expert_E).

    The sort is stable, P = T K, and row_map_P int64 holds t K + k of every row. ids_TK is int64. Differentiable in x.
    Raises ValueError for wrong shapes or types, and on a CPU or with check_values for an id outside
    0..num_experts - 1: on a GPU the host would have to wait for that.
    """
    require(x_TH.dim() == 2, "x_TH", x_TH, "a (T, H) tensor")
    require(
        ids_TK.dim() == 2 and ids_TK.shape[0] == x_TH.shape[0] and ids_TK.dtype == torch.int64
        and ids_TK.device == x_TH.device,
        "ids_TK", ids_TK, f"an int64 ({x_TH.shape[0]}, K) tensor on {x_TH.device}",
    )  # fmt: skip
    require(num_experts >= 1, "num_experts", num_experts, "an integer >= 1")
    return operators.permute(x_TH, ids_TK, num_experts, check_values)


def unpermute(y_PH: Tensor, row_map_P: Tensor, num_tokens: int, top_k: int, weights_TK: Tensor | None = None) -> Tensor:
    """The sum of each token's rows, times weights_TK if given: y_TH (num_tokens, H). Undoes permute.

    row_map_P int64 gives t K + k of every row, each at most once; a pair without a row adds nothing. Differentiable in
    y and weights. Raises ValueError for wrong shapes or types.
    """
    require(y_PH.dim() == 2, "y_PH", y_PH, "a (P, H) tensor")
    require(
        row_map_P.shape == y_PH.shape[:1] and row_map_P.dtype == torch.int64 and row_map_P.device == y_PH.device,
        "row_map_P", row_map_P, f"an int64 ({y_PH.shape[0]},) tensor on {y_PH.device}",
    )  # fmt: skip
    require(
        y_PH.shape[0] <= num_tokens * top_k, "num_tokens", num_tokens, f"at least {y_PH.shape[0]} rows / top_k {top_k}"
    )
    require(
        weights_TK is None or (weights_TK.shape == (num_tokens, top_k) and weights_TK.device == y_PH.device),
        "weights_TK", weights_TK, f"a ({num_tokens}, {top_k}) tensor on {y_PH.device}",
    )  # fmt: skip
    return operators.unpermute(y_PH, row_map_P, num_tokens, top_k, weights_TK)


def _check_experts(name: str, weight: Tensor, counts: Tensor, width: int, x: Tensor) -> None:
    require(
        counts.dim() == 1 and counts.dtype in (torch.int64, torch.int32) and counts.device == x.device,
        "tokens_per_expert_E", counts, f"an int32 or int64 (E,) tensor on {x.device}",
    )  # fmt: skip
    require(
        weight.dim() == 3 and weight.shape[:2] == (len(counts), width)
        and weight.dtype == x.dtype and weight.device == x.device,
        name, weight, f"a ({len(counts)}, {width}, ...) tensor of {str(x.dtype).removeprefix('torch.')} on {x.device}",
    )  # fmt: skip


def grouped_gemm(x_PH: Tensor, weight_EHF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """y_PF = x @ weight[e] for the rows of each expert e; rows are sorted by expert, weight is (E, in, out).

    Any group sizes, 0 too, whose sum is P. Same type for x and weight. Differentiable in both; the weight gradient of
    an expert without rows is 0. Raises ValueError for wrong shapes or types, and on a CPU for counts whose sum is not
    P: on a GPU the host would have to wait. There, no row beyond P is touched, and rows beyond the sum hold anything.
    """
    require(x_PH.dim() == 2 and x_PH.is_floating_point(), "x_PH", x_PH, "a floating (P, H) tensor")
    _check_experts("weight_EHF", weight_EHF, tokens_per_expert_E, x_PH.shape[1], x_PH)
    return operators.grouped_gemm(x_PH, weight_EHF, tokens_per_expert_E)


def grouped_gemm_wgrad_(out_EHF: Tensor, x_PH: Tensor, grad_PF: Tensor, tokens_per_expert_E: Tensor) -> None:
    """out[e] += x.T @ grad for the rows of each expert e: a weight gradient added to a main gradient, without a copy.

    out is (E, H, F) in any floating type, float32 for Megatron's main gradients; x and grad share theirs; the products
    are accumulated in float32. Raises ValueError for wrong shapes or types.
    """
    require(x_PH.dim() == 2 and x_PH.is_floating_point(), "x_PH", x_PH, "a floating (P, H) tensor")
    require(
        grad_PF.dim() == 2 and len(grad_PF) == len(x_PH) and grad_PF.dtype == x_PH.dtype
        and grad_PF.device == x_PH.device,
        "grad_PF", grad_PF, f"a ({len(x_PH)}, F) tensor of {str(x_PH.dtype).removeprefix('torch.')}",
    )  # fmt: skip
    shape = (len(tokens_per_expert_E), x_PH.shape[1], grad_PF.shape[1])
    require(
        out_EHF.shape == shape and out_EHF.is_contiguous() and out_EHF.is_floating_point()
        and out_EHF.device == tokens_per_expert_E.device == x_PH.device,
        "out_EHF", out_EHF, f"a contiguous floating {shape} tensor",
    )  # fmt: skip
    operators.grouped_gemm_wgrad_(out_EHF, x_PH, grad_PF, tokens_per_expert_E)


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """silu(gate) * up, times weights if given, for gate_up (..., 2 F) = [gate | up] and weights (...): (..., F).

    arXiv 2002.05202. Computed in float32 (float64 for float64), differentiable in both; the activation is recomputed in
    the backward. Raises ValueError for wrong shapes or types.
    """
    require(
        gate_up.dim() >= 1 and gate_up.shape[-1] % 2 == 0 and gate_up.is_floating_point(),
        "gate_up", gate_up, "a floating (..., 2 F) tensor",
    )  # fmt: skip
    require(
        weights is None or (weights.shape == gate_up.shape[:-1] and weights.device == gate_up.device),
        "weights", weights, f"a tensor of shape {tuple(gate_up.shape[:-1])} on {gate_up.device}",
    )  # fmt: skip
    return operators.swiglu(gate_up, weights)


def _check_mlp(x: Tensor, counts: Tensor, gate_up: Tensor, down: Tensor) -> None:
    H = x.shape[-1]
    _check_experts("gate_up_EHF", gate_up, counts, H, x)
    require(gate_up.shape[2] % 2 == 0, "gate_up_EHF", gate_up, "an even last axis")
    _check_experts("down_EFH", down, counts, gate_up.shape[2] // 2, x)
    require(down.shape[2] == H, "down_EFH", down, f"a last axis of {H}")


def moe_mlp(
    x_PH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_P: Tensor | None = None,
    main_gradients: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """All experts' MLPs at once: (silu(x gate) * (x up) * weights) down, for rows sorted by expert: y_PH.

    gate_up_EHF is (E, H, 2 F) with [gate | up] along the last axis, down_EFH (E, F, H), weights_P one number a row.
    Differentiable in all four; only x and the first product are kept for the backward. main_gradients are two
    contiguous floating tensors, float32 say, of the weights' shapes: every backward adds the gradients of weights that
    require one to them, and what it returns for these is memory that holds nothing (Megatron's gradient accumulation
    fusion). Under torch.compile only one call of a graph may then wait for its backward. Raises what
    grouped_gemm does.
    """
    require(x_PH.dim() == 2 and x_PH.is_floating_point(), "x_PH", x_PH, "a floating (P, H) tensor")
    P = len(x_PH)
    _check_mlp(x_PH, tokens_per_expert_E, gate_up_EHF, down_EFH)
    require(
        weights_P is None or (weights_P.shape == (P,) and weights_P.device == x_PH.device),
        "weights_P", weights_P, f"a ({P},) tensor on {x_PH.device}",
    )  # fmt: skip
    main = _checked_main_gradients(main_gradients, gate_up_EHF, down_EFH)
    return operators.moe_mlp(x_PH, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_P, *main)[0]


def _checked_main_gradients(main: tuple[Tensor, Tensor] | None, *weights: Tensor) -> tuple[Tensor | None, ...]:
    if main is None:
        return None, None
    require(len(main) == 2, "main_gradients", main, "two tensors")
    for i, (gradient, weight) in enumerate(zip(main, weights)):
        require(
            gradient.shape == weight.shape and gradient.is_contiguous() and gradient.is_floating_point()
            and gradient.device == weight.device,
            f"main_gradients[{i}]", gradient, f"a contiguous floating {tuple(weight.shape)} tensor on {weight.device}",
        )  # fmt: skip
    return main


def moe_mlp_masked(
    x_EMH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_EM: Tensor | None = None,
) -> Tensor:
    """moe_mlp for rollout, where each expert has room for M rows and the first tokens_per_expert_E[e] are its own:
    y_EMH, in which the other rows hold anything, and have no part in the result.

    The layout in which low-latency dispatchers (DeepEP's) receive tokens. In Triton no shape depends on the routing, so
    that a CUDA graph can hold it, and a row has the bits that moe_mlp gives it; torch waits for the counts. It has no
    gradient. Raises what grouped_gemm does; on a CPU also for counts beyond M, which are otherwise taken for M.
    """
    require(x_EMH.dim() == 3 and x_EMH.is_floating_point(), "x_EMH", x_EMH, "a floating (E, M, H) tensor")
    E, M, H = x_EMH.shape
    _check_mlp(x_EMH, tokens_per_expert_E, gate_up_EHF, down_EFH)
    require(len(gate_up_EHF) == E, "x_EMH", x_EMH, f"a ({len(gate_up_EHF)}, M, H) tensor")
    require(
        weights_EM is None or (weights_EM.shape == (E, M) and weights_EM.device == x_EMH.device),
        "weights_EM", weights_EM, f"a ({E}, {M}) tensor on {x_EMH.device}",
    )  # fmt: skip
    return operators.moe_mlp_masked(x_EMH, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_EM)


def moe_layer(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    check_values: bool = False,
    main_gradients: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The routed experts of one layer, all on this device: permute, moe_mlp, unpermute, as out_TH.

    ids_TK and weights_TK are route's; the rest, main_gradients too, is as in moe_mlp. Kept for the backward are x_TH
    and the first product (P, 2 F): the sorted rows of x are copied again, and the weights act before the second
    product, so that neither its input nor its output is needed. Raises ValueError for wrong shapes, types or ids.
    """
    require(x_TH.dim() == 2 and x_TH.is_floating_point(), "x_TH", x_TH, "a floating (T, H) tensor")
    T, H = x_TH.shape
    require(
        ids_TK.dim() == 2 and len(ids_TK) == T and ids_TK.dtype == torch.int64 and ids_TK.device == x_TH.device,
        "ids_TK", ids_TK, f"an int64 ({T}, K) tensor on {x_TH.device}",
    )  # fmt: skip
    require(
        weights_TK.shape == ids_TK.shape and weights_TK.device == x_TH.device,
        "weights_TK", weights_TK, f"a {tuple(ids_TK.shape)} tensor on {x_TH.device}",
    )  # fmt: skip
    _check_mlp(x_TH, ids_TK.new_empty(gate_up_EHF.shape[0]), gate_up_EHF, down_EFH)
    main = _checked_main_gradients(main_gradients, gate_up_EHF, down_EFH)
    return operators.moe_layer(x_TH, ids_TK, weights_TK, gate_up_EHF, down_EFH, check_values, *main)[0]


__all__ = [
    "grouped_gemm",
    "grouped_gemm_wgrad_",
    "moe_layer",
    "moe_mlp",
    "moe_mlp_masked",
    "permute",
    "route",
    "sequence_balance_loss",
    "swiglu",
    "unpermute",
]
