"""The moe family: routing, permutation, grouped GEMM and SwiGLU for mixtures of experts.

Letters: T tokens, H hidden, E experts, K experts a token, P rows sorted by expert (T K of them), F width of an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1.kernels.backend import operator, register, require, wide
from r1.kernels.moe import reference

register("moe", "torch", reference, proven_on=("cpu", "cuda"))
register("moe", "triton", "r1.kernels.moe.triton", proven_on=())

SCORES = ("sigmoid", "softmax")


def _route_fake(logits: Tensor, bias: Any, top_k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    T, E = logits.shape
    ids = logits.new_empty((T, top_k), dtype=torch.int64)
    return ids, logits.new_empty((T, top_k), dtype=wide(logits)), ids.new_empty(E)


def _route_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, _, _, ctx.scale, ctx.score, _, padding_mask, _ = inputs
    ctx.save_for_backward(logits, output[0], padding_mask)
    ctx.mark_non_differentiable(output[0], output[2])


def _route_backward(ctx: Any, _: Any, grad_TK: Tensor, __: Any) -> tuple:
    return _route_backward_op(grad_TK, *ctx.saved_tensors, ctx.scale, ctx.score), *[None] * 9


_route = operator(
    "moe",
    "route(Tensor logits_TE, Tensor? bias_E, SymInt top_k, int num_groups, int group_top_k, float scale, str score, "
    "Tensor? replay_ids_TK, Tensor? padding_mask_T, bool check_values) -> (Tensor, Tensor, Tensor)",
    _route_fake,
    _route_save,
    _route_backward,
)
_route_backward_op = operator(
    "moe",
    "route_backward(Tensor grad_TK, Tensor logits_TE, Tensor ids_TK, Tensor? padding_mask_T, float scale, str score) "
    "-> Tensor",
    lambda grad, logits, *_: logits.new_empty(logits.shape),
)


def _permute_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.T, ctx.K = inputs[1].shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1], output[2])


def _permute_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    return _unpermute(grad, ctx.saved_tensors[0], ctx.T, ctx.K, None), None, None, None


_permute = operator(
    "moe",
    "permute(Tensor x_TH, Tensor ids_TK, int num_experts, bool check_values) -> (Tensor, Tensor, Tensor)",
    lambda x, ids, E, _: (x.new_empty((ids.numel(), x.shape[1])), ids.new_empty(ids.numel()), ids.new_empty(E)),
    _permute_save,
    _permute_backward,
)


def _unpermute_save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, row_map, _, ctx.K, weights = inputs
    ctx.save_for_backward(None if weights is None else y, row_map, weights)


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple:
    y, row_map, weights = ctx.saved_tensors
    grad_y, grad_weights = _unpermute_backward_op(grad, y, row_map, ctx.K, weights)
    return grad_y, None, None, None, None if weights is None else grad_weights


_unpermute = operator(
    "moe",
    "unpermute(Tensor y_PH, Tensor row_map_P, SymInt num_tokens, SymInt top_k, Tensor? weights_TK) -> Tensor",
    lambda y, row_map, T, K, weights: y.new_empty((T, y.shape[1])),
    _unpermute_save,
    _unpermute_backward,
)
_unpermute_backward_op = operator(
    "moe",
    "unpermute_backward(Tensor grad_TH, Tensor? y_PH, Tensor row_map_P, SymInt top_k, Tensor? weights_TK) "
    "-> (Tensor, Tensor)",
    lambda grad, y, row_map, K, weights: (
        grad.new_empty((row_map.shape[0], grad.shape[1])),
        grad.new_empty(0) if weights is None else weights.new_empty(weights.shape),
    ),
)


def _gemm_save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gemm_backward(ctx: Any, grad: Tensor) -> tuple:
    x, weight, counts = ctx.saved_tensors
    want_x, want_weight, _ = ctx.needs_input_grad
    return (
        _grouped_gemm(grad, weight.transpose(1, 2), counts) if want_x else None,
        _grouped_gemm_wgrad(x, grad, counts) if want_weight else None,
        None,
    )


_grouped_gemm = operator(
    "moe",
    "grouped_gemm(Tensor x_PH, Tensor weight_EHF, Tensor tokens_per_expert_E) -> Tensor",
    lambda x, weight, counts: x.new_empty((x.shape[0], weight.shape[2])),
    _gemm_save,
    _gemm_backward,
)
_grouped_gemm_wgrad = operator(
    "moe",
    "grouped_gemm_wgrad(Tensor x_PH, Tensor grad_PF, Tensor tokens_per_expert_E) -> Tensor",
    lambda x, grad, counts: x.new_empty((counts.shape[0], x.shape[1], grad.shape[1])),
)
_grouped_gemm_wgrad_ = operator(
    "moe",
    "grouped_gemm_wgrad_(Tensor(a!) out_EHF, Tensor x_PH, Tensor grad_PF, Tensor tokens_per_expert_E) -> ()",
    lambda *_: None,
)


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple:
    gate_up, weights = ctx.saved_tensors
    grad_gate_up, grad_weights = _swiglu_backward_op(grad, gate_up, weights)
    return grad_gate_up, None if weights is None else grad_weights


_swiglu = operator(
    "moe",
    "swiglu(Tensor gate_up, Tensor? weights) -> Tensor",
    lambda gate_up, weights: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    _gemm_save,
    _swiglu_backward,
)
_swiglu_backward_op = operator(
    "moe",
    "swiglu_backward(Tensor grad, Tensor gate_up, Tensor? weights) -> (Tensor, Tensor)",
    lambda grad, gate_up, weights: (
        gate_up.new_empty(gate_up.shape),
        gate_up.new_empty(0) if weights is None else weights.new_empty(weights.shape),
    ),
)


def _mlp_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


def _mlp_backward(ctx: Any, grad: Tensor, _: Any) -> tuple:
    weights = ctx.saved_tensors[4]
    grad_x, grad_gate_up, grad_down, grad_weights = _moe_mlp_backward(grad, *ctx.saved_tensors)
    return grad_x, None, grad_gate_up, grad_down, None if weights is None else grad_weights


_moe_mlp = operator(
    "moe",
    "moe_mlp(Tensor x_PH, Tensor tokens_per_expert_E, Tensor gate_up_EHF, Tensor down_EFH, Tensor? weights_P) "
    "-> (Tensor, Tensor)",
    lambda x, counts, gate_up, down, weights: (x.new_empty(x.shape), x.new_empty((x.shape[0], gate_up.shape[2]))),
    _mlp_save,
    _mlp_backward,
)
_moe_mlp_backward = operator(
    "moe",
    "moe_mlp_backward(Tensor grad_PH, Tensor x_PH, Tensor tokens_per_expert_E, Tensor gate_up_EHF, Tensor down_EFH, "
    "Tensor? weights_P, Tensor gate_up_PF) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, x, counts, gate_up, down, weights, _: (
        x.new_empty(x.shape),
        gate_up.new_empty(gate_up.shape),
        down.new_empty(down.shape),
        x.new_empty(0) if weights is None else weights.new_empty(weights.shape),
    ),
)


def _layer_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, _, weights, gate_up, down, _ = inputs
    ctx.save_for_backward(x, weights, gate_up, down, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _layer_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    grad_x, grad_weights, grad_gate_up, grad_down = _moe_layer_backward(grad, *ctx.saved_tensors)
    return grad_x, None, grad_weights, grad_gate_up, grad_down, None


_moe_layer = operator(
    "moe",
    "moe_layer(Tensor x_TH, Tensor ids_TK, Tensor weights_TK, Tensor gate_up_EHF, Tensor down_EFH, bool check_values) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, ids, weights, gate_up, down, _: (
        x.new_empty(x.shape),
        ids.new_empty(ids.numel()),
        ids.new_empty(gate_up.shape[0]),
        x.new_empty((ids.numel(), gate_up.shape[2])),
    ),
    _layer_save,
    _layer_backward,
)
_moe_layer_backward = operator(
    "moe",
    "moe_layer_backward(Tensor grad_TH, Tensor x_TH, Tensor weights_TK, Tensor gate_up_EHF, Tensor down_EFH, "
    "Tensor row_map_P, Tensor tokens_per_expert_E, Tensor gate_up_PF) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, x, weights, gate_up, down, *_: tuple(y.new_empty(y.shape) for y in (x, weights, gate_up, down)),
)


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
    among the logits, which otherwise ranks last or first, and for replayed ids out of range, which are otherwise
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
    return _route(
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
    return _permute(x_TH, ids_TK, num_experts, check_values)


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
    return _unpermute(y_PH, row_map_P, num_tokens, top_k, weights_TK)


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
    return _grouped_gemm(x_PH, weight_EHF, tokens_per_expert_E)


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
    _grouped_gemm_wgrad_(out_EHF, x_PH, grad_PF, tokens_per_expert_E)


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
        weights is None or weights.shape == gate_up.shape[:-1],
        "weights", weights, f"a tensor of shape {tuple(gate_up.shape[:-1])}",
    )  # fmt: skip
    return _swiglu(gate_up, weights)


def moe_mlp(
    x_PH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_P: Tensor | None = None,
) -> Tensor:
    """All experts' MLPs at once: (silu(x gate) * (x up) * weights) down, for rows sorted by expert: y_PH.

    gate_up_EHF is (E, H, 2 F) with [gate | up] along the last axis, down_EFH (E, F, H), weights_P one number a row.
    Differentiable in all four; only x and the first product are kept for the backward. Raises what grouped_gemm does.
    """
    require(x_PH.dim() == 2 and x_PH.is_floating_point(), "x_PH", x_PH, "a floating (P, H) tensor")
    P, H = x_PH.shape
    _check_experts("gate_up_EHF", gate_up_EHF, tokens_per_expert_E, H, x_PH)
    require(gate_up_EHF.shape[2] % 2 == 0, "gate_up_EHF", gate_up_EHF, "an even last axis")
    _check_experts("down_EFH", down_EFH, tokens_per_expert_E, gate_up_EHF.shape[2] // 2, x_PH)
    require(down_EFH.shape[2] == H, "down_EFH", down_EFH, f"a last axis of {H}")
    require(
        weights_P is None or (weights_P.shape == (P,) and weights_P.device == x_PH.device),
        "weights_P", weights_P, f"a ({P},) tensor on {x_PH.device}",
    )  # fmt: skip
    return _moe_mlp(x_PH, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_P)[0]


def moe_layer(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    check_values: bool = False,
) -> Tensor:
    """The routed experts of one layer, all on this device: permute, moe_mlp, unpermute, as out_TH.

    ids_TK and weights_TK are route's; the rest is as in moe_mlp. Kept for the backward are x_TH and the first product
    (P, 2 F): the sorted rows of x are copied again, and the weights act before the second product, so that neither its
    input nor its output is needed. Raises ValueError for wrong shapes, types or ids.
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
    counts = ids_TK.new_empty(gate_up_EHF.shape[0])
    _check_experts("gate_up_EHF", gate_up_EHF, counts, H, x_TH)
    require(gate_up_EHF.shape[2] % 2 == 0, "gate_up_EHF", gate_up_EHF, "an even last axis")
    _check_experts("down_EFH", down_EFH, counts, gate_up_EHF.shape[2] // 2, x_TH)
    require(down_EFH.shape[2] == H, "down_EFH", down_EFH, f"a last axis of {H}")
    return _moe_layer(x_TH, ids_TK, weights_TK, gate_up_EHF, down_EFH, check_values)[0]


__all__ = [
    "grouped_gemm",
    "grouped_gemm_wgrad_",
    "moe_layer",
    "moe_mlp",
    "permute",
    "route",
    "sequence_balance_loss",
    "swiglu",
    "unpermute",
]
