"""Layers made of the fp8 family's operators: what is computed, what is kept, and the gradients.

Weights come quantised, both ways (quantize_weight); the weights themselves are there to be given a gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1.kernels.backend import operator
from r1.kernels.fp8 import operators
from r1.kernels.fp8.reference import nothing
from r1.kernels.moe.operators import swiglu_backward
from r1.kernels.norm import rms_norm_backward


def _save(ctx: Any, main_gradients: tuple, dtypes: tuple, kept: tuple, made: tuple) -> None:
    # Not as saved tensors: other micro-batches write to the main gradients between forward and backward.
    ctx.main_gradients, ctx.dtypes = main_gradients, dtypes
    ctx.save_for_backward(*kept, *made)
    ctx.mark_non_differentiable(*made)
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError("the gradient of an FP8 layer has no gradient")
    return ctx.saved_tensors


def _weight_gradient(main: Tensor | None, dtype: torch.dtype, product: Any, product_: Any, *operands: Tensor) -> Tensor:
    """A gradient that was added to a main gradient already is memory that nobody reads, as Megatron's linears return:
    its hooks want a tensor."""
    if main is None:
        return product(*operands, dtype)
    product_(main, *operands)
    return main.new_empty(main.shape, dtype=dtype)


def _quantize(x: Tensor, across: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if across:
        return operators.quantize_both(x, False)
    return *operators.quantize_1x128(x, False), *nothing(x)


def _hollow(x: Tensor, *shape: int) -> Tensor:
    """What a gradient comes back to where the numbers are in FP8 alone: takes no memory, and is NaN if it is read."""
    return x.new_full((), torch.nan).expand(shape)


def _only_first_has_gradient(ctx: Any, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _norm(x_MH: Tensor, weight_H: Tensor, eps: float, across: bool) -> tuple[Tensor, ...]:
    """(hollow, quantize_both of the norm or of its rows alone, 1 / rms(x))."""
    return _hollow(x_MH, *x_MH.shape), *operators.rms_norm_quantize(x_MH, weight_H, eps, across, False)


def _norm_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs[:2], output[-1])
    _only_first_has_gradient(ctx, output)


def _norm_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    gradients = (None, None) if grad is None else rms_norm_backward(grad, *ctx.saved_tensors)
    return *gradients, None, None


fp8_rms_norm = operator(
    None,
    "fp8_rms_norm(Tensor x_MH, Tensor weight_H, float eps, bool across) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _norm,
    _norm_save,
    _norm_backward,
)


def _swiglu(gate_up_MF: Tensor, across: bool) -> tuple[Tensor, ...]:
    """(hollow, quantize_both of silu(gate) * up or of its rows alone)."""
    M, twice = gate_up_MF.shape
    return _hollow(gate_up_MF, M, twice // 2), *operators.swiglu_quantize(gate_up_MF, None, across, False)


def _swiglu_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0])
    _only_first_has_gradient(ctx, output)


def _swiglu_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    return None if grad is None else swiglu_backward(grad, *ctx.saved_tensors, None)[0], None


fp8_swiglu = operator(
    None,
    "fp8_swiglu(Tensor gate_up_MF, bool across) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _swiglu,
    _swiglu_save,
    _swiglu_backward,
)


def _linear(
    x_MK: Tensor, weight_NK: Tensor, w_q_NK: Tensor, w_s: Tensor, w_q_KN: Tensor, main_NK: Tensor | None,
    x_q: Tensor | None, x_s: Tensor | None, given_q_KM: Tensor | None, given_s: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, then for the weight's gradient or empty: x transposed and quantised along M, its scales). x may come
    quantised; its own numbers are then not read."""
    x_q_KM, x_s_across = nothing(x_MK)
    if x_q is None:
        x_q, x_s, x_q_KM, x_s_across = _quantize(x_MK, keep)
    return operators.fp8_gemm(x_q, x_s, w_q_NK, w_s, x_MK.dtype), x_q_KM, x_s_across


def _linear_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _, w_s, w_q_KN, main, _, _, *given, keep = inputs
    if not keep:
        given = [None, None]
    _save(ctx, (main,), (x.dtype, weight.dtype), (w_s, w_q_KN, *given), output[1:])


def _linear_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    w_s, w_q_KN, *given, x_q_KM, x_s = _saved(ctx)
    if given[0] is not None:
        x_q_KM, x_s = given
    x_dtype, weight_dtype = ctx.dtypes
    for_x, for_weight = ctx.needs_input_grad[:2]
    grad_x = grad_weight = None
    if grad is not None:
        g_q, g_s, *across = _quantize(grad, for_weight)
        if for_weight:
            grad_weight = _weight_gradient(
                *ctx.main_gradients, weight_dtype, operators.fp8_gemm_wgrad, operators.fp8_gemm_wgrad_, *across,
                x_q_KM, x_s,
            )  # fmt: skip
        if for_x:
            # A 128 x 128 block transposed is a block: one table of scales serves both products.
            grad_x = operators.fp8_gemm(g_q, g_s, w_q_KN, w_s.t(), x_dtype)
    return grad_x, grad_weight, *[None] * 9


fp8_linear = operator(
    None,
    "fp8_linear(Tensor x_MK, Tensor weight_NK, Tensor w_q_NK, Tensor w_s, Tensor w_q_KN, Tensor? main_NK, "
    "Tensor? x_q, Tensor? x_s, Tensor? x_q_across, Tensor? x_s_across, bool keep) -> (Tensor, Tensor, Tensor)",
    _linear,
    _linear_save,
    _linear_backward,
)


def _experts(
    x_PH: Tensor, tokens_per_expert_E: Tensor, gate_up_EHF: Tensor, down_EFH: Tensor, weights_P: Tensor | None,
    gate_up_q: Tensor, gate_up_s: Tensor, gate_up_q_across: Tensor, down_q: Tensor, down_s: Tensor,
    down_q_across: Tensor, main_gate_up: Tensor | None, main_down: Tensor | None, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(y, the first product, then for the weights' gradients or empty: the operands of both products, transposed and
    quantised along P)."""
    x_q, x_s, *x_across = _quantize(x_PH, keep)
    gate_up_PF = operators.fp8_grouped_gemm(
        x_q, x_s, gate_up_q_across, gate_up_s.transpose(1, 2), tokens_per_expert_E, x_PH.dtype
    )
    middle_q, middle_s, *middle_across = operators.swiglu_quantize(gate_up_PF, weights_P, keep, False)
    y_PH = operators.fp8_grouped_gemm(
        middle_q, middle_s, down_q_across, down_s.transpose(1, 2), tokens_per_expert_E, x_PH.dtype
    )
    return y_PH, gate_up_PF, *x_across, *middle_across


def _experts_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, counts, gate_up, down, weights, gate_up_q, gate_up_s, _, down_q, down_s, _, *main, _ = inputs
    kept = counts, weights, gate_up_q, gate_up_s, down_q, down_s
    _save(ctx, tuple(main), (x.dtype, gate_up.dtype), kept, output[1:])


def _experts_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    counts, weights, gate_up_q, gate_up_s, down_q, down_s, gate_up_PF, *x_across, middle_q, middle_s = _saved(ctx)
    x_dtype, weight_dtype = ctx.dtypes
    main_gate_up, main_down = ctx.main_gradients
    for_x, _, for_gate_up, for_down = ctx.needs_input_grad[:4]
    grad_x = grad_gate_up = grad_down = grad_weights = None
    wgrad = weight_dtype, operators.fp8_grouped_gemm_wgrad, operators.fp8_grouped_gemm_wgrad_
    if grad is not None:
        g_q, g_s, *across = _quantize(grad, for_down)
        grad_middle_PF = operators.fp8_grouped_gemm(g_q, g_s, down_q, down_s, counts, x_dtype)
        if for_down:
            grad_down = _weight_gradient(main_down, *wgrad, middle_q, middle_s, *across, counts)
        g_q, g_s, *across, grad_weights_P = operators.swiglu_backward_quantize(
            grad_middle_PF, gate_up_PF, weights, False
        )
        if for_gate_up:
            grad_gate_up = _weight_gradient(main_gate_up, *wgrad, *x_across, *across, counts)
        if for_x:
            grad_x = operators.fp8_grouped_gemm(g_q, g_s, gate_up_q, gate_up_s, counts, x_dtype)
        grad_weights = None if weights is None else grad_weights_P.to(weights.dtype)
    return grad_x, None, grad_gate_up, grad_down, grad_weights, *[None] * 9


fp8_moe_mlp = operator(
    None,
    "fp8_moe_mlp(Tensor x_PH, Tensor tokens_per_expert_E, Tensor gate_up_EHF, Tensor down_EFH, Tensor? weights_P, "
    "Tensor gate_up_q, Tensor gate_up_s, Tensor gate_up_q_across, Tensor down_q, Tensor down_s, Tensor down_q_across, "
    "Tensor? main_gate_up, Tensor? main_down, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _experts,
    _experts_save,
    _experts_backward,
)
