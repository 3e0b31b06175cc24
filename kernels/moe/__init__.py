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

SCORES = ("sigmoid", "softmax")


def _route_fake(logits: Tensor, bias: Any, top_k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    T, E = logits.shape
    ids = logits.new_empty((T, top_k), dtype=torch.int64)
    return ids, logits.new_empty((T, top_k), dtype=wide(logits)), ids.new_empty(E)


def _route_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, _, _, ctx.scale, ctx.score, _ = inputs
    ctx.save_for_backward(logits, output[0])
    ctx.mark_non_differentiable(output[0], output[2])


def _route_backward(ctx: Any, _: Any, grad_TK: Tensor, __: Any) -> tuple:
    return _route_backward_op(grad_TK, *ctx.saved_tensors, ctx.scale, ctx.score), *[None] * 7


_route = operator(
    "moe",
    "route(Tensor logits_TE, Tensor? bias_E, SymInt top_k, int num_groups, int group_top_k, float scale, str score, "
    "Tensor? replay_ids_TK) -> (Tensor, Tensor, Tensor)",
    _route_fake,
    _route_save,
    _route_backward,
)
_route_backward_op = operator(
    "moe",
    "route_backward(Tensor grad_TK, Tensor logits_TE, Tensor ids_TK, float scale, str score) -> Tensor",
    lambda grad, logits, *_: logits.new_empty(logits.shape),
)


def _permute_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.T, ctx.K = inputs[1].shape
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1], output[2])


def _permute_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    return _unpermute(grad, ctx.saved_tensors[0], ctx.T, ctx.K, None), None, None


_permute = operator(
    "moe",
    "permute(Tensor x_TH, Tensor ids_TK, int num_experts) -> (Tensor, Tensor, Tensor)",
    lambda x, ids, E: (x.new_empty((ids.numel(), x.shape[1])), ids.new_empty(ids.numel()), ids.new_empty(E)),
    _permute_save,
    _permute_backward,
)


def _unpermute_save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, row_map, _, ctx.K, weights = inputs
    ctx.save_for_backward(y, row_map, weights)


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
    "unpermute_backward(Tensor grad_TH, Tensor y_PH, Tensor row_map_P, SymInt top_k, Tensor? weights_TK) "
    "-> (Tensor, Tensor)",
    lambda grad, y, row_map, K, weights: (
        y.new_empty(y.shape),
        y.new_empty(0) if weights is None else weights.new_empty(weights.shape),
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


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    num_groups: int,
    group_top_k: int,
    scale: float,
    score: str = "sigmoid",
    replay_ids_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek-V3's router (arXiv 2412.19437, section 2.1.2): (ids_TK int64, weights_TK, tokens_per_expert_E int64).

    Scores are sigmoid (or softmax) of the logits in float32. The choice is by score + bias: the group_top_k best of
    num_groups groups (a group's score is the sum of its two best), then the top_k best experts in them, best first,
    ties to the lower id. Weights are the chosen scores without bias over their sum (+ 1e-20), times scale, in float32.
    replay_ids_TK int64 takes the place of the choice. Gradients go through the weights to the logits; bias_E has none.

    Raises ValueError for wrong shapes, types or devices, counts that do not fit, or replayed ids out of range.
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
    return _route(logits_TE, bias_E, top_k, num_groups, group_top_k, float(scale), score, replay_ids_TK)


def permute(x_TH: Tensor, ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies each token once for each of its experts, sorted by expert: (x_PH, row_map_P, tokens_per_expert_E).

    The sort is stable, P = T K, and row_map_P int64 holds t K + k of every row. ids_TK is int64. Differentiable in x.
    Raises ValueError for wrong shapes or types, or an id outside 0..num_experts - 1.
    """
    require(x_TH.dim() == 2, "x_TH", x_TH, "a (T, H) tensor")
    require(
        ids_TK.dim() == 2 and ids_TK.shape[0] == x_TH.shape[0] and ids_TK.dtype == torch.int64
        and ids_TK.device == x_TH.device,
        "ids_TK", ids_TK, f"an int64 ({x_TH.shape[0]}, K) tensor on {x_TH.device}",
    )  # fmt: skip
    require(num_experts >= 1, "num_experts", num_experts, "an integer >= 1")
    return _permute(x_TH, ids_TK, num_experts)


def unpermute(y_PH: Tensor, row_map_P: Tensor, num_tokens: int, top_k: int, weights_TK: Tensor | None = None) -> Tensor:
    """The sum of each token's rows, times weights_TK if given: y_TH (num_tokens, H). Undoes permute.

    row_map_P int64 gives t K + k of every row, each at most once; a pair without a row adds nothing. Differentiable in
    y and weights. Raises ValueError for wrong shapes or types.
    """
    require(y_PH.dim() == 2, "y_PH", y_PH, "a (P, H) tensor")
    require(
        row_map_P.shape == y_PH.shape[:1] and row_map_P.dtype == torch.int64,
        "row_map_P", row_map_P, f"an int64 ({y_PH.shape[0]},) tensor",
    )  # fmt: skip
    require(
        y_PH.shape[0] <= num_tokens * top_k, "num_tokens", num_tokens, f"at least {y_PH.shape[0]} rows / top_k {top_k}"
    )
    require(
        weights_TK is None or weights_TK.shape == (num_tokens, top_k),
        "weights_TK", weights_TK, f"a ({num_tokens}, {top_k}) tensor",
    )  # fmt: skip
    return _unpermute(y_PH, row_map_P, num_tokens, top_k, weights_TK)


def _check_experts(name: str, weight: Tensor, counts: Tensor, width: int, x: Tensor) -> None:
    require(counts.dim() == 1 and counts.dtype in (torch.int64, torch.int32), "tokens_per_expert_E", counts,
            "an integer (E,) tensor")  # fmt: skip
    require(
        weight.dim() == 3 and weight.shape[:2] == (len(counts), width)
        and weight.dtype == x.dtype and weight.device == x.device,
        name, weight, f"a ({len(counts)}, {width}, ...) tensor of {str(x.dtype).removeprefix('torch.')} on {x.device}",
    )  # fmt: skip


def grouped_gemm(x_PH: Tensor, weight_EHF: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """y_PF = x @ weight[e] for the rows of each expert e; rows are sorted by expert, weight is (E, in, out).

    Any group sizes, 0 too, whose sum is P. Same type for x and weight. Differentiable in both; the weight gradient of
    an expert without rows is 0. Raises ValueError for wrong shapes, types or counts.
    """
    require(x_PH.dim() == 2 and x_PH.is_floating_point(), "x_PH", x_PH, "a floating (P, H) tensor")
    _check_experts("weight_EHF", weight_EHF, tokens_per_expert_E, x_PH.shape[1], x_PH)
    return _grouped_gemm(x_PH, weight_EHF, tokens_per_expert_E)


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
    Differentiable in all four; only x and the first product are kept for the backward.
    Raises ValueError for wrong shapes, types or counts.
    """
    require(x_PH.dim() == 2 and x_PH.is_floating_point(), "x_PH", x_PH, "a floating (P, H) tensor")
    P, H = x_PH.shape
    _check_experts("gate_up_EHF", gate_up_EHF, tokens_per_expert_E, H, x_PH)
    require(gate_up_EHF.shape[2] % 2 == 0, "gate_up_EHF", gate_up_EHF, "an even last axis")
    _check_experts("down_EFH", down_EFH, tokens_per_expert_E, gate_up_EHF.shape[2] // 2, x_PH)
    require(down_EFH.shape[2] == H, "down_EFH", down_EFH, f"a last axis of {H}")
    require(weights_P is None or weights_P.shape == (P,), "weights_P", weights_P, f"a ({P},) tensor")
    return _moe_mlp(x_PH, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_P)[0]


__all__ = ["grouped_gemm", "moe_mlp", "permute", "route", "swiglu", "unpermute"]
