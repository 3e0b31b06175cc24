"""The fp8 family: e4m3 values with one float32 scale for 1 x 128 (activations) or 128 x 128 (weights) of them.

DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3). Letters: M rows, K the axis that is summed over, N outputs, P rows
sorted by expert, E experts. scales are amax / 448; 1 for a block of zeros; never 0 or infinite. Values beyond the range
saturate, NaN stays NaN and does not touch the rest of its block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from r1.kernels.backend import register, require
from r1.kernels.fp8 import layers, operators, reference
from r1.kernels.fp8.operators import up

register("fp8", "torch", reference, proven_on=("cpu", "cuda"))
register("fp8", "triton", "r1.kernels.fp8.triton", proven_on=())
register("fp8", "cuda", "r1.kernels.fp8.cuda", proven_on=())

BLOCK = reference.BLOCK
BLOCKS = ((1, BLOCK), (BLOCK, BLOCK))
E4M3 = torch.float8_e4m3fn
MAIN_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Quantized = tuple[Tensor, Tensor, Tensor]


class QuantizedInput(NamedTuple):
    """A linear's input (..., K) that exists in FP8 alone. `x` has its shape and type and takes its gradient, but holds
    no numbers (NaN, if it is read); `copies` are quantize_both's, of which the last two are empty where no gradient
    was wanted."""

    x: Tensor
    copies: tuple[Tensor, Tensor, Tensor, Tensor]


def _input(hollow_MK: Tensor, copies: list[Tensor], like: Tensor) -> QuantizedInput:
    q, s, q_across, s_across = copies
    return QuantizedInput(hollow_MK.view(*like.shape[:-1], hollow_MK.shape[1]), (q, s, q_across, s_across))


def _check_source(name: str, x: Tensor) -> None:
    require(x.dim() == 2 and x.is_floating_point(), name, x, "a floating matrix")


def quantize_1x128(x_MK: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """(q e4m3 (M, K), scales float32 (M, ceil(K / 128))), one scale for 128 neighbours of a row: x ~ q * scale.

    The scales lie column by column and rows of q begin at multiples of 16 bytes, as the products read them; those take
    them in any order. power_of_two rounds the scales up to powers of two. Raises ValueError if x is not a floating
    matrix.
    """
    _check_source("x_MK", x_MK)
    return operators.quantize_1x128(x_MK.detach(), power_of_two)


def quantize_128x128(w_NK: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """(q e4m3 (N, K), scales float32 (ceil(N / 128), ceil(K / 128))), one scale for a square block. Else as above."""
    _check_source("w_NK", w_NK)
    return operators.quantize_128x128(w_NK.detach(), power_of_two)


def quantize_both(x_MK: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantize_1x128 of x and of its transpose, from one read: (q (M, K), scales, q (K, M), scales (K, ceil(M / 128))).

    The first pair is what the forward and dx multiply, the second what a weight gradient does. Else as above.
    """
    _check_source("x_MK", x_MK)
    return operators.quantize_both(x_MK.detach(), power_of_two)


def quantize_weight(weight: Tensor) -> Quantized:
    """quantize_128x128 of a weight (..., N, K) and of its transpose, from one read: (q (..., N, K), scales
    (..., ceil(N / 128), ceil(K / 128)), q (..., K, N)).

    A square transposed is a square: the table of scales, transposed, is the transpose's too. Made once a step it serves
    every micro-batch, forward and backward. Raises ValueError if weight is not floating or has less than two axes.
    """
    require(weight.dim() >= 2 and weight.is_floating_point(), "weight", weight, "a floating (..., N, K) tensor")
    return operators.quantize_weight(weight.detach())


def swiglu_quantize(
    gate_up_MF: Tensor, weights_M: Tensor | None = None, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """quantize_both of silu(gate) * up, times weights if given, for gate_up (M, 2 F) = [gate | up]: what comes between
    an expert's two products never lies in memory but in FP8, and is not rounded to another type before.

    No gradient. Raises ValueError for wrong shapes or types.
    """
    _check_gate_up(gate_up_MF)
    _check_row_weights("weights_M", weights_M, gate_up_MF)
    weights = None if weights_M is None else weights_M.detach()
    return operators.swiglu_quantize(gate_up_MF.detach(), weights, True, power_of_two)


def swiglu_backward_quantize(
    grad_MF: Tensor, gate_up_MF: Tensor, weights_M: Tensor | None = None, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What swiglu_quantize's backward wants: quantize_both of the gradient to gate_up (M, 2 F), which never lies in
    memory in another type, then the gradient to the weights, float32 (M), or nothing (0) without weights.

    grad_MF is the gradient to silu(gate) * up * weights. The weights' gradient is a sum of sums over 128 columns, in
    the same order every time. Raises ValueError for wrong shapes or types.
    """
    _check_gate_up(gate_up_MF)
    shape = (len(gate_up_MF), gate_up_MF.shape[1] // 2)
    require(
        grad_MF.shape == shape and grad_MF.is_floating_point() and grad_MF.device == gate_up_MF.device,
        "grad_MF", grad_MF, f"a floating {shape} tensor on {gate_up_MF.device}",
    )  # fmt: skip
    _check_row_weights("weights_M", weights_M, gate_up_MF)
    weights = None if weights_M is None else weights_M.detach()
    return operators.swiglu_backward_quantize(grad_MF.detach(), gate_up_MF.detach(), weights, power_of_two)


def _check_gate_up(gate_up: Tensor) -> None:
    _check_source("gate_up_MF", gate_up)
    require(gate_up.shape[1] % 2 == 0, "gate_up_MF", gate_up, "an even last axis")


def _check_row_weights(name: str, weights: Tensor | None, x: Tensor) -> None:
    require(
        weights is None
        or (weights.shape == x.shape[:1] and weights.is_floating_point() and weights.device == x.device),
        name, weights, f"a floating ({len(x)},) tensor on {x.device}",
    )  # fmt: skip


def rms_norm_quantize(
    x_MH: Tensor, weight_H: Tensor, eps: float = 1e-6, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """quantize_both of rms_norm(x, weight, eps), which never lies in memory but in FP8 and is not rounded to another
    type before; then 1 / rms(x), float32 (M, 1), which rms_norm's backward takes.

    A row's sum of squares needs the whole row, and a tile 128 rows: x is read twice, once for the sums. No gradient.
    Raises ValueError for wrong shapes or types, or eps < 0.
    """
    _check_source("x_MH", x_MH)
    _check_norm(x_MH, weight_H, eps)
    return operators.rms_norm_quantize(x_MH.detach(), weight_H.detach(), eps, True, power_of_two)


def _check_norm(x: Tensor, weight_H: Tensor, eps: float) -> None:
    require(
        weight_H.shape == x.shape[-1:] and weight_H.is_floating_point() and weight_H.device == x.device,
        "weight_H", weight_H, f"a floating ({x.shape[-1]},) tensor on {x.device}",
    )  # fmt: skip
    require(eps >= 0, "eps", eps, "a number >= 0")


def dequantize(
    q_MK: Tensor, scales: Tensor, block: tuple[int, int] = (1, BLOCK), dtype: torch.dtype = torch.float32
) -> Tensor:
    """q * scale in dtype, for q with one scale a block of (1, 128) or (128, 128)."""
    require(tuple(block) in BLOCKS, "block", block, "(1, 128) or (128, 128)")
    _check("q_MK", q_MK, "scales", scales, block[0])
    return operators.dequantize(q_MK, scales, *block, dtype)


def _check(name: str, q: Tensor, scales_name: str, scales: Tensor, rows: int, lead: tuple[int, ...] = ()) -> None:
    require(q.dim() == 2 + len(lead) and q.dtype == E4M3, name, q, f"a float8_e4m3fn tensor of {2 + len(lead)} axes")
    M, K = q.shape[-2:]
    shape = (*lead, M if rows == 1 else up(M), up(K))
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
    return operators.fp8_gemm(a_q_MK, a_s, b_q_NK, b_s, out_dtype)


def fp8_gemm_wgrad(
    a_q_NM: Tensor, a_s: Tensor, b_q_KM: Tensor, b_s: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """a @ b.T (N, K), the weight gradient: both quantised 1 x 128 along the tokens M, from transposed copies."""
    _check_pair(a_q_NM, a_s, b_q_KM, b_s, 1, ("a_q_NM", "b_q_KM"))
    return operators.fp8_gemm_wgrad(a_q_NM, a_s, b_q_KM, b_s, out_dtype)


def fp8_gemm_wgrad_(out_NK: Tensor, a_q_NM: Tensor, a_s: Tensor, b_q_KM: Tensor, b_s: Tensor) -> None:
    """out += a @ b.T: fp8_gemm_wgrad added to a main gradient, contiguous and floating, float32 say."""
    _check_pair(a_q_NM, a_s, b_q_KM, b_s, 1, ("a_q_NM", "b_q_KM"))
    _check_out("out_NK", out_NK, (len(a_q_NM), len(b_q_KM)), a_q_NM)
    operators.fp8_gemm_wgrad_(out_NK, a_q_NM, a_s, b_q_KM, b_s)


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
    return operators.fp8_grouped_gemm(a_q_PK, a_s, b_q_ENK, b_s, tokens_per_expert_E, out_dtype)


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
    return operators.fp8_grouped_gemm_wgrad(a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E, out_dtype)


def fp8_grouped_gemm_wgrad_(
    out_ENK: Tensor, a_q_NP: Tensor, a_s: Tensor, b_q_KP: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor
) -> None:
    """out += fp8_grouped_gemm_wgrad of the rest: added to a main gradient, contiguous and floating, float32 say."""
    _check_pair(a_q_NP, a_s, b_q_KP, b_s, 1, ("a_q_NP", "b_q_KP"))
    _check_counts(tokens_per_expert_E, a_q_NP)
    _check_out("out_ENK", out_ENK, (len(tokens_per_expert_E), len(a_q_NP), len(b_q_KP)), a_q_NP)
    operators.fp8_grouped_gemm_wgrad_(out_ENK, a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E)


def _quantized(name: str, quantized: Quantized | None, weight: Tensor) -> Quantized:
    """quantize_weight's result: the one given, once it is seen to be this weight's in shape, or a new one."""
    if quantized is None:
        return operators.quantize_weight(weight.detach())
    require(len(quantized) == 3, name, quantized, "the three tensors of quantize_weight")
    q, scales, q_across = quantized
    lead = tuple(weight.shape[:-2])
    _check(f"{name}[0]", q, f"{name}[1]", scales, BLOCK, lead)
    shape = (*lead, weight.shape[-1], weight.shape[-2])
    require(q.shape == weight.shape and q.device == weight.device, f"{name}[0]", q, f"{tuple(weight.shape)} values")
    require(
        q_across.shape == shape and q_across.dtype == E4M3 and q_across.device == weight.device,
        f"{name}[2]", q_across, f"a float8_e4m3fn {shape} tensor on {weight.device}",
    )  # fmt: skip
    return quantized


def fp8_rms_norm(x: Tensor, weight_H: Tensor, eps: float = 1e-6) -> QuantizedInput:
    """rms_norm(x, weight, eps) for x (..., H) as the input of linears: in FP8 alone, never rounded to another type.

    Differentiable in both, as rms_norm is: kept for the backward are x and 1 / rms(x). Raises ValueError for wrong
    shapes or types, or eps < 0.
    """
    require(x.dim() >= 1 and x.is_floating_point(), "x", x, "a floating (..., H) tensor")
    _check_norm(x, weight_H, eps)
    hollow, *copies, _ = layers.fp8_rms_norm(x.reshape(-1, x.shape[-1]), weight_H, eps, torch.is_grad_enabled())
    return _input(hollow, copies, x)


def fp8_swiglu(gate_up: Tensor) -> QuantizedInput:
    """silu(gate) * up for gate_up (..., 2 F) = [gate | up] as the input of a linear: in FP8 alone, not rounded to
    another type before. Differentiable, as swiglu is. Raises ValueError for a wrong shape or type."""
    require(
        gate_up.dim() >= 1 and gate_up.is_floating_point() and gate_up.shape[-1] % 2 == 0,
        "gate_up", gate_up, "a floating (..., 2 F) tensor",
    )  # fmt: skip
    hollow, *copies = layers.fp8_swiglu(gate_up.reshape(-1, gate_up.shape[-1]), torch.is_grad_enabled())
    return _input(hollow, copies, gate_up)


def fp8_linear(
    x: Tensor | QuantizedInput,
    weight_NK: Tensor,
    quantized: Quantized | None = None,
    main_gradient_NK: Tensor | None = None,
) -> Tensor:
    """x @ weight.T for x (..., K), with all three products of training in FP8, in x's type.

    Forward: x 1 x 128, weight 128 x 128. Backward: the gradient 1 x 128 against the same weight for dx, and both
    operands 1 x 128 along the tokens for dweight. x is kept for the backward in FP8; it may come so, from fp8_rms_norm
    or fp8_swiglu, and then serves several linears. quantized is quantize_weight of this weight, if it is made once for
    several calls; the weight's numbers are then not read. Every backward adds the weight's gradient to
    main_gradient_NK, contiguous and floating, and returns memory that holds nothing for it, as moe_mlp does. Raises
    ValueError for wrong shapes or types.
    """
    given: tuple[Tensor | None, ...] = (None,) * 4
    if isinstance(x, QuantizedInput):
        x, given = x
        _check_copies(x, given)
    require(x.dim() >= 1 and x.is_floating_point(), "x", x, "a floating (..., K) tensor")
    require(
        weight_NK.dim() == 2 and weight_NK.shape[1] == x.shape[-1] and weight_NK.is_floating_point()
        and weight_NK.device == x.device,
        "weight_NK", weight_NK, f"a floating (N, {x.shape[-1]}) tensor on {x.device}",
    )  # fmt: skip
    if main_gradient_NK is not None:
        _check_out("main_gradient_NK", main_gradient_NK, tuple(weight_NK.shape), weight_NK)
    keep = torch.is_grad_enabled() and weight_NK.requires_grad
    require(
        not keep or given[2] is None or given[2].numel() == x.numel(),
        "x", given[2], "copies made where gradients are enabled",
    )  # fmt: skip
    values = _quantized("quantized", quantized, weight_NK)
    y_MN = layers.fp8_linear(x.reshape(-1, x.shape[-1]), weight_NK, *values, main_gradient_NK, *given, keep)[0]
    return y_MN.view(*x.shape[:-1], len(weight_NK))


def _check_copies(x: Tensor, copies: tuple[Tensor, ...]) -> None:
    require(len(copies) == 4, "x", copies, "the four tensors of quantize_both")
    rows = (x.numel() // max(x.shape[-1], 1), x.shape[-1])
    _check("x", copies[0], "the scales of x", copies[1], 1)
    require(copies[0].shape == rows and copies[0].device == x.device, "x", copies[0], f"{rows} values on {x.device}")
    if copies[2].numel():
        _check("x", copies[2], "the scales of x", copies[3], 1)
        require(copies[2].shape == rows[::-1], "x", copies[2], f"{rows[::-1]} values")


def fp8_moe_mlp(
    x_PH: Tensor,
    tokens_per_expert_E: Tensor,
    gate_up_EHF: Tensor,
    down_EFH: Tensor,
    weights_P: Tensor | None = None,
    quantized: tuple[Quantized, Quantized] | None = None,
    main_gradients: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """moe_mlp with all six products of training in FP8: (silu(x gate) * (x up) * weights) down, in x's type.

    Everything is as in moe_mlp, but that the sum of the counts must be P: rows beyond it would share scales with
    others along the tokens. quantized is quantize_weight of gate_up_EHF and of down_EFH, if it is made once for several
    calls. Kept for the backward are x and what enters the second product in FP8, and the first product in x's type.
    Raises ValueError for wrong shapes or types.
    """
    require(x_PH.dim() == 2 and x_PH.is_floating_point(), "x_PH", x_PH, "a floating (P, H) tensor")
    _check_counts(tokens_per_expert_E, x_PH)
    E, H, F = len(tokens_per_expert_E), x_PH.shape[1], gate_up_EHF.shape[-1] // 2
    weights = (gate_up_EHF, down_EFH)
    for name, weight, shape in zip(("gate_up_EHF", "down_EFH"), weights, ((E, H, 2 * F), (E, F, H))):
        require(
            weight.shape == shape and weight.dtype == x_PH.dtype and weight.device == x_PH.device,
            name, weight, f"a {shape} tensor of {str(x_PH.dtype).removeprefix('torch.')} on {x_PH.device}",
        )  # fmt: skip
    _check_row_weights("weights_P", weights_P, x_PH)
    for name, pair in (("quantized", quantized), ("main_gradients", main_gradients)):
        require(pair is None or len(pair) == 2, name, pair, "two, for gate_up_EHF and down_EFH")
    for i, main in enumerate(main_gradients or ()):
        _check_out(f"main_gradients[{i}]", main, tuple(weights[i].shape), x_PH)
    first, second = (
        _quantized(f"quantized[{i}]", values, weight)
        for i, (values, weight) in enumerate(zip(quantized or (None, None), weights))
    )
    keep = torch.is_grad_enabled() and (gate_up_EHF.requires_grad or down_EFH.requires_grad)
    return layers.fp8_moe_mlp(
        x_PH, tokens_per_expert_E, gate_up_EHF, down_EFH, weights_P, *first, *second,
        *(main_gradients or (None, None)), keep,
    )[0]  # fmt: skip


__all__ = [
    "QuantizedInput",
    "dequantize",
    "fp8_gemm",
    "fp8_gemm_wgrad",
    "fp8_gemm_wgrad_",
    "fp8_grouped_gemm",
    "fp8_grouped_gemm_wgrad",
    "fp8_grouped_gemm_wgrad_",
    "fp8_linear",
    "fp8_moe_mlp",
    "fp8_rms_norm",
    "fp8_swiglu",
    "quantize_1x128",
    "quantize_128x128",
    "quantize_both",
    "quantize_weight",
    "rms_norm_quantize",
    "swiglu_backward_quantize",
    "swiglu_quantize",
]
