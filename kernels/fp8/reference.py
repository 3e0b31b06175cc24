"""The fp8 family in plain torch: e4m3 values with one float32 scale a block (DeepSeek-V3, arXiv 2412.19437, 3.3).

Products are made of the values times their scales in float32: the definition, not a fast path.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1.kernels.moe.reference import checked_counts, swiglu, swiglu_backward
from r1.kernels.norm.reference import rms_norm

BLOCK = 128
LARGEST = 448.0  # of e4m3


def scales_of(amax: Tensor, power_of_two: bool) -> Tensor:
    """amax / 448 as float32, 1 for a block of zeros; never 0, a denormal or infinite."""
    limits = torch.finfo(torch.float32)
    # By a tensor: a GPU multiplies by the reciprocal of a number, which may differ in the last bit.
    scale = (amax / amax.new_full((), LARGEST)).clamp(limits.tiny, limits.max)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        # frexp gives 0.5 <= mantissa < 1: the next power of two, or the number itself.
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(max=127)
        scale = torch.ldexp(torch.ones_like(scale), exponent)
    return torch.where(amax == 0, 1.0, scale)


def values_like(x: Tensor, *shape: int) -> Tensor:
    """Room for (..., M, K) e4m3 values, rows beginning at multiples of 16 bytes: bulk copies want that."""
    *lead, K = shape
    return x.new_empty((*lead, (K + 15) // 16 * 16), dtype=torch.float8_e4m3fn)[..., :K]


def row_scales_like(x: Tensor, M: int, K: int) -> Tensor:
    """Room for the (M, ceil(K / 128)) scales of rows, block by block in memory."""
    return x.new_empty(((K + BLOCK - 1) // BLOCK, M), dtype=torch.float32).t()


def _quantize(x: Tensor, rows: int, columns: int, power_of_two: bool) -> tuple[Tensor, Tensor]:
    *lead, M, K = x.shape
    row_blocks, blocks = -(-M // rows), -(-K // columns)
    padded = torch.nn.functional.pad(x.float(), (0, -K % columns, 0, -M % rows))
    tiles = padded.view(*lead, row_blocks, rows, blocks, columns)
    magnitude = torch.where(tiles.isnan(), 0.0, tiles.abs())
    amax = magnitude.amax((-3, -1)) if x.numel() else padded.new_zeros(*lead, row_blocks, blocks)
    scale = scales_of(amax, power_of_two)
    # Clamp before the cast: it saturates, and NaN passes through.
    q = (tiles / scale[..., :, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return values_like(x, *lead, M, K).copy_(q.view(padded.shape)[..., :M, :K]), scale


def quantize_1x128(x_MK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    q, scales = _quantize(x_MK, 1, BLOCK, power_of_two)
    return q, row_scales_like(x_MK, *x_MK.shape).copy_(scales)


def quantize_128x128(w_NK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return _quantize(w_NK, BLOCK, BLOCK, power_of_two)


def quantize_both(x_MK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _copies(x_MK, True, power_of_two)


def _copies(x: Tensor, across: bool, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    other = quantize_1x128(x.t(), power_of_two) if across else nothing(x)
    return *quantize_1x128(x, power_of_two), *other


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, scales = _quantize(weight, BLOCK, BLOCK, power_of_two=False)
    *lead, N, K = weight.shape
    return q, scales, values_like(weight, *lead, K, N).copy_(q.transpose(-1, -2))


def swiglu_quantize(
    gate_up_MF: Tensor, weights_M: Tensor | None, across: bool, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _copies(swiglu(gate_up_MF.float(), weights_M), across, power_of_two)


def swiglu_backward_quantize(
    grad_MF: Tensor, gate_up_MF: Tensor, weights_M: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = None if weights_M is None else weights_M.float()
    grad_gate_up, grad_weights = swiglu_backward(grad_MF.float(), gate_up_MF.float(), weights)
    return *quantize_both(grad_gate_up, power_of_two), grad_weights


def rms_norm_quantize(
    x_MH: Tensor, weight_H: Tensor, eps: float, across: bool, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    normalised, inverse_rms = rms_norm(x_MH.float(), weight_H.float(), eps)
    return *_copies(normalised, across, power_of_two), inverse_rms


def dequantize(q_MK: Tensor, scales: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    M, K = q_MK.shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    spread = scales.to(wide).repeat_interleave(rows, 0)[:M].repeat_interleave(columns, 1)[:, :K]
    return (q_MK.to(wide) * spread).to(dtype).contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fp8_gemm(a_q_MK: Tensor, a_s: Tensor, b_q_NK: Tensor, b_s: Tensor, out_dtype: torch.dtype) -> Tensor:
    a = dequantize(a_q_MK, a_s, 1, BLOCK, _wide(out_dtype))
    return (a @ dequantize(b_q_NK, b_s, BLOCK, BLOCK, a.dtype).t()).to(out_dtype)


def fp8_gemm_wgrad(a_q_NM: Tensor, a_s: Tensor, b_q_KM: Tensor, b_s: Tensor, out_dtype: torch.dtype) -> Tensor:
    a = dequantize(a_q_NM, a_s, 1, BLOCK, _wide(out_dtype))
    return (a @ dequantize(b_q_KM, b_s, 1, BLOCK, a.dtype).t()).to(out_dtype)


def fp8_gemm_wgrad_(out_NK: Tensor, a_q_NM: Tensor, a_s: Tensor, b_q_KM: Tensor, b_s: Tensor) -> None:
    out_NK.add_(fp8_gemm_wgrad(a_q_NM, a_s, b_q_KM, b_s, _wide(out_NK.dtype)))


def fp8_grouped_gemm(
    a_q_PK: Tensor, a_s: Tensor, b_q_ENK: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor, out_dtype: torch.dtype
) -> Tensor:
    a = dequantize(a_q_PK, a_s, 1, BLOCK, _wide(out_dtype))
    parts = a.split(checked_counts(tokens_per_expert_E, len(a)))
    out = [rows @ dequantize(b_q_ENK[e], b_s[e], BLOCK, BLOCK, a.dtype).t() for e, rows in enumerate(parts)]
    return torch.cat(out or [a.new_empty(0, b_q_ENK.shape[1])]).to(out_dtype)


def fp8_grouped_gemm_wgrad(
    a_q_NP: Tensor, a_s: Tensor, b_q_KP: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor, out_dtype: torch.dtype
) -> Tensor:
    a = dequantize(a_q_NP, a_s, 1, BLOCK, _wide(out_dtype))
    b = dequantize(b_q_KP, b_s, 1, BLOCK, a.dtype)
    counts = checked_counts(tokens_per_expert_E, a.shape[1])
    out = [x @ y.t() for x, y in zip(a.split(counts, 1), b.split(counts, 1))]
    return torch.stack(out).to(out_dtype) if out else a.new_empty(0, len(a), len(b), dtype=out_dtype)


def fp8_grouped_gemm_wgrad_(
    out_ENK: Tensor, a_q_NP: Tensor, a_s: Tensor, b_q_KP: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor
) -> None:
    out_ENK.add_(fp8_grouped_gemm_wgrad(a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E, _wide(out_ENK.dtype)))


def nothing(x: Tensor) -> tuple[Tensor, Tensor]:
    """In the place of a copy that nobody wants."""
    return x.new_empty((0, 0), dtype=torch.float8_e4m3fn), x.new_empty((0, 0), dtype=torch.float32)
