"""The fp8 family: e4m3 values with one float32 scale for 1 x 128 (activations) or 128 x 128 (weights) of them.

DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3). Letters: M rows, K the axis that is summed over, N outputs, P rows
sorted by expert, E experts. scales are amax / 448; 1 for a block of zeros; never 0 or infinite. Values beyond the range
saturate, NaN stays NaN and does not touch the rest of its block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1.kernels.backend import operator, register, require
from r1.kernels.fp8 import reference

register("fp8", "torch", reference, proven_on=("cpu", "cuda"))
register("fp8", "triton", "r1.kernels.fp8.triton", proven_on=())
register("fp8", "cuda", "r1.kernels.fp8.cuda", proven_on=())

BLOCK = reference.BLOCK
BLOCKS = ((1, BLOCK), (BLOCK, BLOCK))
E4M3 = torch.float8_e4m3fn
MAIN_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _up(n: Any) -> Any:
    return (n + BLOCK - 1) // BLOCK


def _quantize_fake(rows: int) -> Any:
    def fake(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
        M, K = x.shape
        squares = (_up(M), _up(K))
        scales = reference.row_scales_like(x, M, K) if rows == 1 else x.new_empty(squares, dtype=torch.float32)
        return reference.values_like(x, M, K), scales

    return fake


def _both_fake(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_quantize_fake(1)(x, power_of_two), *_quantize_fake(1)(x.t(), power_of_two)


_quantize_1x128 = operator(
    "fp8", "quantize_1x128(Tensor x_MK, bool power_of_two) -> (Tensor, Tensor)", _quantize_fake(1)
)
_quantize_128x128 = operator(
    "fp8", "quantize_128x128(Tensor w_NK, bool power_of_two) -> (Tensor, Tensor)", _quantize_fake(BLOCK)
)
_quantize_both = operator(
    "fp8",
    "quantize_both(Tensor x_MK, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)",
    _both_fake,
)
_swiglu_quantize = operator(
    "fp8",
    "swiglu_quantize(Tensor gate_up_MF, Tensor? weights_M, bool power_of_two) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, weights, power_of_two: _both_fake(x.new_empty((x.shape[0], x.shape[1] // 2)), power_of_two),
)
_dequantize = operator(
    "fp8",
    "dequantize(Tensor q_MK, Tensor scales, int rows, int columns, ScalarType dtype) -> Tensor",
    lambda q, scales, rows, columns, dtype: q.new_empty(q.shape, dtype=dtype),
)
_fp8_gemm = operator(
    "fp8",
    "fp8_gemm(Tensor a_q_MK, Tensor a_s, Tensor b_q_NK, Tensor b_s, ScalarType out_dtype) -> Tensor",
    lambda a, a_s, b, b_s, dtype: a.new_empty((a.shape[0], b.shape[0]), dtype=dtype),
)
_fp8_gemm_wgrad = operator(
    "fp8",
    "fp8_gemm_wgrad(Tensor a_q_NM, Tensor a_s, Tensor b_q_KM, Tensor b_s, ScalarType out_dtype) -> Tensor",
    lambda a, a_s, b, b_s, dtype: a.new_empty((a.shape[0], b.shape[0]), dtype=dtype),
)
_fp8_gemm_wgrad_ = operator(
    "fp8",
    "fp8_gemm_wgrad_(Tensor(a!) out_NK, Tensor a_q_NM, Tensor a_s, Tensor b_q_KM, Tensor b_s) -> ()",
    lambda *_: None,
)
_fp8_grouped_gemm = operator(
    "fp8",
    "fp8_grouped_gemm(Tensor a_q_PK, Tensor a_s, Tensor b_q_ENK, Tensor b_s, Tensor tokens_per_expert_E, "
    "ScalarType out_dtype) -> Tensor",
    lambda a, a_s, b, b_s, counts, dtype: a.new_empty((a.shape[0], b.shape[1]), dtype=dtype),
)
_fp8_grouped_gemm_wgrad = operator(
    "fp8",
    "fp8_grouped_gemm_wgrad(Tensor a_q_NP, Tensor a_s, Tensor b_q_KP, Tensor b_s, Tensor tokens_per_expert_E, "
    "ScalarType out_dtype) -> Tensor",
    lambda a, a_s, b, b_s, counts, dtype: a.new_empty((counts.shape[0], a.shape[0], b.shape[0]), dtype=dtype),
)
_fp8_grouped_gemm_wgrad_ = operator(
    "fp8",
    "fp8_grouped_gemm_wgrad_(Tensor(a!) out_ENK, Tensor a_q_NP, Tensor a_s, Tensor b_q_KP, Tensor b_s, "
    "Tensor tokens_per_expert_E) -> ()",
    lambda *_: None,
)


def _linear_fake(x: Tensor, weight: Tensor, keep_x: bool, keep_weight: bool) -> tuple[Tensor, ...]:
    across = _quantize_fake(1)(x.t(), False) if keep_x else reference.nothing(x)
    kept = _quantize_fake(BLOCK)(weight, False) if keep_weight else reference.nothing(x)
    return x.new_empty((x.shape[0], weight.shape[0])), *across, *kept


def _linear_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _linear_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple:
    x_q_KM, x_s, w_q_NK, w_s = ctx.saved_tensors
    x_dtype, weight_dtype = ctx.dtypes
    for_x, for_weight = ctx.needs_input_grad[:2]
    grad_x = grad_weight = None
    if grad is not None and for_weight:
        g_q, g_s, *across = _quantize_both(grad, False)
        grad_weight = _fp8_gemm_wgrad(*across, x_q_KM, x_s, weight_dtype)
    elif grad is not None:
        g_q, g_s = _quantize_1x128(grad, False)
    if grad is not None and for_x:
        # A 128 x 128 block transposed is a block: the weight's values and scales serve both products.
        grad_x = _fp8_gemm(g_q, g_s, w_q_NK.t().contiguous(), w_s.t().contiguous(), x_dtype)
    return grad_x, grad_weight, None, None


_fp8_linear = operator(
    "fp8",
    "fp8_linear(Tensor x_MK, Tensor weight_NK, bool keep_x, bool keep_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_fake,
    _linear_save,
    _linear_backward,
)


def _check_source(name: str, x: Tensor) -> None:
    require(x.dim() == 2 and x.is_floating_point(), name, x, "a floating matrix")


def quantize_1x128(x_MK: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """(q e4m3 (M, K), scales float32 (M, ceil(K / 128))), one scale for 128 neighbours of a row: x ~ q * scale.

    The scales lie column by column and rows of q begin at multiples of 16 bytes, as the products read them; those take
    them in any order. power_of_two rounds the scales up to powers of two. Raises ValueError if x is not a floating
    matrix.
    """
    _check_source("x_MK", x_MK)
    return _quantize_1x128(x_MK.detach(), power_of_two)


def quantize_128x128(w_NK: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """(q e4m3 (N, K), scales float32 (ceil(N / 128), ceil(K / 128))), one scale for a square block. Else as above."""
    _check_source("w_NK", w_NK)
    return _quantize_128x128(w_NK.detach(), power_of_two)


def quantize_both(x_MK: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantize_1x128 of x and of its transpose, from one read: (q (M, K), scales, q (K, M), scales (K, ceil(M / 128))).

    The first pair is what the forward and dx multiply, the second what a weight gradient does. Else as above.
    """
    _check_source("x_MK", x_MK)
    return _quantize_both(x_MK.detach(), power_of_two)


def swiglu_quantize(
    gate_up_MF: Tensor, weights_M: Tensor | None = None, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantize_both of silu(gate) * up, times weights if given, for gate_up (M, 2 F) = [gate | up]: what comes between
    an expert's two products never lies in memory but in FP8, and is not rounded to another type before.

    No gradient. Raises ValueError for wrong shapes or types.
    """
    _check_source("gate_up_MF", gate_up_MF)
    require(gate_up_MF.shape[1] % 2 == 0, "gate_up_MF", gate_up_MF, "an even last axis")
    require(
        weights_M is None or (weights_M.shape == gate_up_MF.shape[:1] and weights_M.is_floating_point()
                              and weights_M.device == gate_up_MF.device),
        "weights_M", weights_M, f"a floating ({gate_up_MF.shape[0]},) tensor on {gate_up_MF.device}",
    )  # fmt: skip
    return _swiglu_quantize(gate_up_MF.detach(), None if weights_M is None else weights_M.detach(), power_of_two)


def dequantize(
    q_MK: Tensor, scales: Tensor, block: tuple[int, int] = (1, BLOCK), dtype: torch.dtype = torch.float32
) -> Tensor:
    """q * scale in dtype, for q with one scale a block of (1, 128) or (128, 128)."""
    require(tuple(block) in BLOCKS, "block", block, "(1, 128) or (128, 128)")
    _check("q_MK", q_MK, "scales", scales, block[0])
    return _dequantize(q_MK, scales, *block, dtype)


def _check(name: str, q: Tensor, scales_name: str, scales: Tensor, rows: int, lead: tuple[int, ...] = ()) -> None:
    require(q.dim() == 2 + len(lead) and q.dtype == E4M3, name, q, f"a float8_e4m3fn tensor of {2 + len(lead)} axes")
    M, K = q.shape[-2:]
    shape = (*lead, M if rows == 1 else _up(M), _up(K))
    require(
        scales.shape == shape and scales.dtype == torch.float32 and scales.device == q.device,
        scales_name, scales, f"a float32 {shape} tensor on {q.device}",
    )  # fmt: skip


def _check_pair(
    a_q: Tensor, a_s: Tensor, b_q: Tensor, b_s: Tensor, b_rows: int, names: tuple[str, str], lead: tuple[int, ...] = ()
) -> None:
    _check(names[0], a_q, "a_s", a_s, 1)
    _check(names[1], b_q, "b_s", b_s, b_rows, lead)
    require(b_q.shape[-1] == a_q.shape[1] and b_q.device == a_q.device, names[1], b_q, f"a last axis of {a_q.shape[1]}")


def fp8_gemm(
    a_q_MK: Tensor, a_s: Tensor, b_q_NK: Tensor, b_s: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """a @ b.T (M, N) in out_dtype: a quantised 1 x 128, b quantised 128 x 128, accumulated in float32."""
    _check_pair(a_q_MK, a_s, b_q_NK, b_s, BLOCK, ("a_q_MK", "b_q_NK"))
    return _fp8_gemm(a_q_MK, a_s, b_q_NK, b_s, out_dtype)


def fp8_gemm_wgrad(
    a_q_NM: Tensor, a_s: Tensor, b_q_KM: Tensor, b_s: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """a @ b.T (N, K), the weight gradient: both quantised 1 x 128 along the tokens M, from transposed copies."""
    _check_pair(a_q_NM, a_s, b_q_KM, b_s, 1, ("a_q_NM", "b_q_KM"))
    return _fp8_gemm_wgrad(a_q_NM, a_s, b_q_KM, b_s, out_dtype)


def fp8_gemm_wgrad_(out_NK: Tensor, a_q_NM: Tensor, a_s: Tensor, b_q_KM: Tensor, b_s: Tensor) -> None:
    """out += a @ b.T: fp8_gemm_wgrad added to a main gradient, contiguous and floating, float32 say."""
    _check_pair(a_q_NM, a_s, b_q_KM, b_s, 1, ("a_q_NM", "b_q_KM"))
    _check_out("out_NK", out_NK, (len(a_q_NM), len(b_q_KM)), a_q_NM)
    _fp8_gemm_wgrad_(out_NK, a_q_NM, a_s, b_q_KM, b_s)


def _check_out(name: str, out: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    require(
        out.shape == shape and out.is_contiguous() and out.dtype in MAIN_TYPES and out.device == like.device,
        name, out, f"a contiguous floating {shape} tensor on {like.device}",
    )  # fmt: skip


def _check_counts(counts: Tensor, like: Tensor) -> None:
    require(
        counts.dim() == 1 and counts.dtype in (torch.int32, torch.int64) and counts.device == like.device,
        "tokens_per_expert_E", counts, f"an int32 or int64 (E,) tensor on {like.device}",
    )  # fmt: skip


def fp8_grouped_gemm(
    a_q_PK: Tensor,
    a_s: Tensor,
    b_q_ENK: Tensor,
    b_s: Tensor,
    tokens_per_expert_E: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """a[rows of e] @ b[e].T for every expert e: (P, N). b_s is (E, ceil(N / 128), ceil(K / 128)); any group sizes."""
    _check_counts(tokens_per_expert_E, a_q_PK)
    E = len(tokens_per_expert_E)
    require(b_q_ENK.dim() == 3 and len(b_q_ENK) == E, "b_q_ENK", b_q_ENK, f"an ({E}, N, K) tensor")
    _check_pair(a_q_PK, a_s, b_q_ENK, b_s, BLOCK, ("a_q_PK", "b_q_ENK"), (E,))
    return _fp8_grouped_gemm(a_q_PK, a_s, b_q_ENK, b_s, tokens_per_expert_E, out_dtype)


def fp8_grouped_gemm_wgrad(
    a_q_NP: Tensor,
    a_s: Tensor,
    b_q_KP: Tensor,
    b_s: Tensor,
    tokens_per_expert_E: Tensor,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """a[:, rows of e] @ b[:, rows of e].T for every expert e: (E, N, K); zero for an expert without rows.

    Both are quantised 1 x 128 along P as it lies: the 128 neighbours of a scale may belong to two experts, so that no
    padding and no count of blocks an expert is needed.
    """
    _check_pair(a_q_NP, a_s, b_q_KP, b_s, 1, ("a_q_NP", "b_q_KP"))
    _check_counts(tokens_per_expert_E, a_q_NP)
    return _fp8_grouped_gemm_wgrad(a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E, out_dtype)


def fp8_grouped_gemm_wgrad_(
    out_ENK: Tensor, a_q_NP: Tensor, a_s: Tensor, b_q_KP: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor
) -> None:
    """out += fp8_grouped_gemm_wgrad of the rest: added to a main gradient, contiguous and floating, float32 say."""
    _check_pair(a_q_NP, a_s, b_q_KP, b_s, 1, ("a_q_NP", "b_q_KP"))
    _check_counts(tokens_per_expert_E, a_q_NP)
    _check_out("out_ENK", out_ENK, (len(tokens_per_expert_E), len(a_q_NP), len(b_q_KP)), a_q_NP)
    _fp8_grouped_gemm_wgrad_(out_ENK, a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E)


def fp8_linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x @ weight.T for x (..., K), with all three products of training in FP8, in x's type.

    Forward: x 1 x 128, weight 128 x 128. Backward: the gradient 1 x 128 against the same weight for dx, and both
    operands 1 x 128 along the tokens for dweight. x is kept for the backward in FP8. ValueError for wrong shapes.
    """
    require(x.dim() >= 1 and x.is_floating_point(), "x", x, "a floating (..., K) tensor")
    require(
        weight_NK.dim() == 2 and weight_NK.shape[1] == x.shape[-1] and weight_NK.is_floating_point()
        and weight_NK.device == x.device,
        "weight_NK", weight_NK, f"a floating (N, {x.shape[-1]}) tensor on {x.device}",
    )  # fmt: skip
    grad = torch.is_grad_enabled()
    keep_x, keep_weight = grad and weight_NK.requires_grad, grad and x.requires_grad
    y_MN = _fp8_linear(x.reshape(-1, x.shape[-1]), weight_NK, keep_x, keep_weight)[0]
    return y_MN.view(*x.shape[:-1], len(weight_NK))


__all__ = [
    "dequantize",
    "fp8_gemm",
    "fp8_gemm_wgrad",
    "fp8_gemm_wgrad_",
    "fp8_grouped_gemm",
    "fp8_grouped_gemm_wgrad",
    "fp8_grouped_gemm_wgrad_",
    "fp8_linear",
    "quantize_1x128",
    "quantize_128x128",
    "quantize_both",
    "swiglu_quantize",
]
