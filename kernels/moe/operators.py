"""The moe family's operators as torch.library knows them: schemas, shapes, and what is kept for the backward.

Called with every argument, unchecked; the functions that check are the package's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1.kernels.backend import operator, wide


def _route_fake(logits: Tensor, bias: Any, top_k: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    T, E = logits.shape
    ids = logits.new_empty((T, top_k), dtype=torch.int64)
    return ids, logits.new_empty((T, top_k), dtype=wide(logits)), ids.new_empty(E)


def _route_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, _, _, _, _, ctx.scale, ctx.score, _, padding_mask, _ = inputs
    ctx.save_for_backward(logits, output[0], padding_mask)
    ctx.mark_non_differentiable(output[0], output[2])


def _route_backward(ctx: Any, _: Any, grad_TK: Tensor, __: Any) -> tuple:
    return route_backward(grad_TK, *ctx.saved_tensors, ctx.scale, ctx.score), *[None] * 9


route = operator(
    "moe",
    "route(Tensor logits_TE, Tensor? bias_E, SymInt top_k, int num_groups, int group_top_k, float scale, str score, "
    "Tensor? replay_ids_TK, Tensor? padding_mask_T, bool check_values) -> (Tensor, Tensor, Tensor)",
    _route_fake,
    _route_save,
    _route_backward,
)
route_backward = operator(
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
    return unpermute(grad, ctx.saved_tensors[0], ctx.T, ctx.K, None), None, None, None


permute = operator(
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
    grad_y, grad_weights = unpermute_backward(grad, y, row_map, ctx.K, weights)
    return grad_y, None, None, None, None if weights is None else grad_weights


unpermute = operator(
    "moe",
    "unpermute(Tensor y_PH, Tensor row_map_P, SymInt num_tokens, SymInt top_k, Tensor? weights_TK) -> Tensor",
    lambda y, row_map, T, K, weights: y.new_empty((T, y.shape[1])),
    _unpermute_save,
    _unpermute_backward,
)
unpermute_backward = operator(
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
        grouped_gemm(grad, weight.transpose(1, 2), counts) if want_x else None,
        grouped_gemm_wgrad(x, grad, counts) if want_weight else None,
        None,
    )


grouped_gemm = operator(
    "moe",
    "grouped_gemm(Tensor x_PH, Tensor weight_EHF, Tensor tokens_per_expert_E) -> Tensor",
    lambda x, weight, counts: x.new_empty((x.shape[0], weight.shape[2])),
    _gemm_save,
    _gemm_backward,
)
grouped_gemm_wgrad = operator(
    "moe",
    "grouped_gemm_wgrad(Tensor x_PH, Tensor grad_PF, Tensor tokens_per_expert_E) -> Tensor",
    lambda x, grad, counts: x.new_empty((counts.shape[0], x.shape[1], grad.shape[1])),
)
grouped_gemm_wgrad_ = operator(
    "moe",
    "grouped_gemm_wgrad_(Tensor(a!) out_EHF, Tensor x_PH, Tensor grad_PF, Tensor tokens_per_expert_E) -> ()",
    lambda *_: None,
)


def _swiglu_backward(ctx: Any, grad: Tensor) -> tuple:
    gate_up, weights = ctx.saved_tensors
    grad_gate_up, grad_weights = swiglu_backward(grad, gate_up, weights)
    return grad_gate_up, None if weights is None else grad_weights


swiglu = operator(
    "moe",
    "swiglu(Tensor gate_up, Tensor? weights) -> Tensor",
    lambda gate_up, weights: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
    _gemm_save,
    _swiglu_backward,
)
swiglu_backward = operator(
    "moe",
    "swiglu_backward(Tensor grad, Tensor gate_up, Tensor? weights) -> (Tensor, Tensor)",
    lambda grad, gate_up, weights: (
        gate_up.new_empty(gate_up.shape),
        gate_up.new_empty(0) if weights is None else weights.new_empty(weights.shape),
    ),
)


def _weight_gradients(ctx: Any, wanted: tuple[bool, bool], *weights: Tensor) -> tuple[Tensor | None, ...]:
    """Where the backward writes the gradients that are wanted, or adds them if there are main gradients."""
    if torch.is_grad_enabled():
        raise NotImplementedError("the experts' gradient has no gradient")
    fresh = lambda weight: torch.empty_like(weight, memory_format=torch.contiguous_format)
    main = ctx.main_gradients
    return tuple((fresh(w) if m is None else m) if want else None for want, m, w in zip(wanted, main, weights))


def _returned(ctx: Any, gradients: tuple[Tensor | None, ...], *weights: Tensor) -> tuple[Tensor | None, ...]:
    """A gradient that was added to a main gradient already is memory that nobody reads, as Megatron's linears return:
    its hooks want a tensor."""
    return tuple(
        gradient if main is None or gradient is None else torch.empty_like(weight)
        for gradient, main, weight in zip(gradients, ctx.main_gradients, weights)
    )


def _mlp_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    # Not as saved tensors: other micro-batches write to the main gradients between forward and backward.
    ctx.main_gradients = inputs[5:]
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.mark_non_differentiable(output[1])


def _mlp_backward(ctx: Any, grad: Tensor, _: Any) -> tuple:
    saved = ctx.saved_tensors  # once: unpacking may compute them again
    weights, scales = saved[2:4], saved[4]
    gradients = _weight_gradients(ctx, ctx.needs_input_grad[2:4], *weights)
    grad_x, grad_scales = moe_mlp_backward(grad, *saved, *gradients, ctx.main_gradients[0] is not None)
    grad_scales = None if scales is None else grad_scales
    return grad_x, None, *_returned(ctx, gradients, *weights), grad_scales, None, None


moe_mlp = operator(
    "moe",
    "moe_mlp(Tensor x_PH, Tensor tokens_per_expert_E, Tensor gate_up_EHF, Tensor down_EFH, Tensor? weights_P, "
    "Tensor? main_gate_up_EHF, Tensor? main_down_EFH) -> (Tensor, Tensor)",
    lambda x, counts, gate_up, *_: (x.new_empty(x.shape), x.new_empty((x.shape[0], gate_up.shape[2]))),
    _mlp_save,
    _mlp_backward,
)
moe_mlp_backward = operator(
    "moe",
    "moe_mlp_backward(Tensor grad_PH, Tensor x_PH, Tensor tokens_per_expert_E, Tensor gate_up_EHF, Tensor down_EFH, "
    "Tensor? weights_P, Tensor gate_up_PF, Tensor(a!)? grad_gate_up_EHF, Tensor(b!)? grad_down_EFH, bool accumulate) "
    "-> (Tensor, Tensor)",
    lambda grad, x, counts, gate_up, down, weights, *_: (
        x.new_empty(x.shape),
        x.new_empty(0) if weights is None else weights.new_empty(weights.shape),
    ),
)


moe_mlp_masked = operator(
    "moe",
    "moe_mlp_masked(Tensor x_EMH, Tensor tokens_per_expert_E, Tensor gate_up_EHF, Tensor down_EFH, "
    "Tensor? weights_EM) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
)


def _layer_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, _, weights, gate_up, down, _, *ctx.main_gradients = inputs
    ctx.save_for_backward(x, weights, gate_up, down, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _layer_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    saved = ctx.saved_tensors
    weights = saved[2:4]
    gradients = _weight_gradients(ctx, ctx.needs_input_grad[3:5], *weights)
    grad_x, grad_scales = moe_layer_backward(grad, *saved, *gradients, ctx.main_gradients[0] is not None)
    return grad_x, None, grad_scales, *_returned(ctx, gradients, *weights), None, None, None


moe_layer = operator(
    "moe",
    "moe_layer(Tensor x_TH, Tensor ids_TK, Tensor weights_TK, Tensor gate_up_EHF, Tensor down_EFH, bool check_values, "
    "Tensor? main_gate_up_EHF, Tensor? main_down_EFH) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, ids, weights, gate_up, *_: (
        x.new_empty(x.shape),
        ids.new_empty(ids.numel()),
        ids.new_empty(gate_up.shape[0]),
        x.new_empty((ids.numel(), gate_up.shape[2])),
    ),
    _layer_save,
    _layer_backward,
)
moe_layer_backward = operator(
    "moe",
    "moe_layer_backward(Tensor grad_TH, Tensor x_TH, Tensor weights_TK, Tensor gate_up_EHF, Tensor down_EFH, "
    "Tensor row_map_P, Tensor tokens_per_expert_E, Tensor gate_up_PF, Tensor(a!)? grad_gate_up_EHF, "
    "Tensor(b!)? grad_down_EFH, bool accumulate) -> (Tensor, Tensor)",
    lambda grad, x, weights, *_: (x.new_empty(x.shape), weights.new_empty(weights.shape)),
)
