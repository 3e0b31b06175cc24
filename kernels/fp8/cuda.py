"""The fp8 family in CUDA for Hopper: csrc/fp8's products and quantisers. What it lacks is the Triton backend's.

Products are made in bfloat16 or float32; other types are converted from float32. Quantisers take bfloat16 and float32
matrices of dense rows that begin at multiples of 16 bytes and are a multiple of 8 wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r1 import _cuda
from r1.kernels.backend import require
from r1.kernels.fp8 import reference, triton
from r1.kernels.fp8.reference import BLOCK
from r1.kernels.fp8.triton import dequantize, rms_norm_quantize, swiglu_backward_quantize, swiglu_quantize

MAX_EXPERTS = 512  # csrc/fp8/schedule.h
MAX_GRID = 65535  # blocks along the second and third axis
TYPES = (torch.float32, torch.bfloat16)


def _takes(x: Tensor) -> bool:
    size = x.element_size()
    aligned = x.stride(-1) == 1 and all(s * size % 16 == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    fits = x.shape[-2] <= MAX_GRID * BLOCK and (x.dim() == 2 or x.shape[0] <= MAX_GRID)
    return x.dtype in TYPES and x.numel() > 0 and x.shape[-1] % 8 == 0 and aligned and fits


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _quantize(
    x: Tensor,
    scales: Tensor,
    power_of_two: bool,
    square: bool,
    across_scales: Tensor | None = None,
    across: bool = False,
) -> tuple[Tensor, Tensor]:
    """The values, and those transposed or nothing, of x (M, K) or (E, M, K); fills the scales."""
    batches, (M, K) = (x.shape[0] if x.dim() == 3 else 1), x.shape[-2:]
    values = reference.values_like(x, *x.shape)
    transposed = reference.values_like(x, *x.shape[:-2], K, M) if across else values[..., :0, :0]
    place = lambda t: (t.data_ptr() if t.numel() else 0, t.stride(0) if t.dim() == 3 else 0, t.stride(-2))
    _cuda.fp8_quantize(
        square=square, power_of_two=power_of_two, bfloat16=x.dtype == torch.bfloat16, batch=batches, rows=M, columns=K,
        x=place(x), values=place(values), across=place(transposed), scales=scales.data_ptr(),
        across_scales=0 if across_scales is None else across_scales.data_ptr(), stream=_stream(x),
    )  # fmt: skip
    return values, transposed


def _square_scales(x: Tensor) -> Tensor:
    *lead, M, K = x.shape
    return x.new_empty((*lead, -(-M // BLOCK), -(-K // BLOCK)), dtype=torch.float32)


def quantize_1x128(x_MK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if not _takes(x_MK):
        return triton.quantize_1x128(x_MK, power_of_two)
    scales = reference.row_scales_like(x_MK, *x_MK.shape)
    return _quantize(x_MK, scales, power_of_two, square=False)[0], scales


def quantize_128x128(w_NK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    if not _takes(w_NK):
        return triton.quantize_128x128(w_NK, power_of_two)
    scales = _square_scales(w_NK)
    return _quantize(w_NK, scales, power_of_two, square=True)[0], scales


def quantize_both(x_MK: Tensor, power_of_two: bool) -> triton.Copies:
    if not _takes(x_MK):
        return triton.quantize_both(x_MK, power_of_two)
    M, K = x_MK.shape
    scales, across_scales = reference.row_scales_like(x_MK, M, K), reference.row_scales_like(x_MK, K, M)
    values, across = _quantize(x_MK, scales, power_of_two, False, across_scales, across=True)
    return values, scales, across, across_scales


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if weight.dim() > 3 or not _takes(weight):
        return triton.quantize_weight(weight)
    scales = _square_scales(weight)
    values, across = _quantize(weight, scales, False, square=True, across=True)
    return values, scales, across


def _aligned(q: Tensor) -> Tensor:
    """q as the copy engine takes it: dense rows that begin at multiples of 16 bytes, experts one after another."""
    dense = q.stride(-1) == 1 and q.stride(-2) % 16 == 0 and q.stride(-2) > 0 and q.data_ptr() % 16 == 0
    if dense and (q.dim() == 2 or q.stride(0) == q.shape[1] * q.stride(1)):
        return q
    return reference.values_like(q, *q.shape).copy_(q)


def _multiply(
    out: Tensor,
    a_q: Tensor,
    a_s: Tensor,
    b_q: Tensor,
    b_s: Tensor,
    groups: str = "none",
    square: bool = True,
    accumulate: bool = False,
    tokens_per_expert_E: Tensor | None = None,
) -> Tensor:
    """out = a @ b.T; `out` is float32 or bfloat16, and float32 for a product that is not square."""
    if out.numel() == 0:
        return out
    if a_q.shape[1] == 0:
        return out if accumulate else out.zero_()
    a, b, counts = _aligned(a_q), _aligned(b_q), tokens_per_expert_E
    if counts is not None:
        require(0 < len(counts) <= MAX_EXPERTS, "tokens_per_expert_E", counts, f"1 to {MAX_EXPERTS} experts")
        counts = counts.contiguous()
    _cuda.fp8_gemm(
        groups=groups, square=square, accumulate=accumulate, bfloat16=out.dtype == torch.bfloat16, rows=a.shape[0],
        columns=b.shape[-2], depth=a.shape[1], a=(a.data_ptr(), a.stride(0)), a_scales=(a_s.data_ptr(), *a_s.stride()),
        b=(b.data_ptr(), b.stride(-2)), b_scales=(b_s.data_ptr(), *b_s.stride()[-2:]),
        b_scales_per_expert=b_s.stride(0), out=out.data_ptr(), experts=1 if counts is None else len(counts),
        tokens_per_expert=0 if counts is None else counts.data_ptr(),
        wide_counts=counts is not None and counts.dtype == torch.int64, tile=-1,
        stream=_stream(out),
    )  # fmt: skip
    return out


def fp8_gemm(a_q_MK: Tensor, a_s: Tensor, b_q_NK: Tensor, b_s: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype == torch.float64:
        return reference.fp8_gemm(a_q_MK, a_s, b_q_NK, b_s, out_dtype)
    out = a_q_MK.new_empty((len(a_q_MK), len(b_q_NK)), dtype=out_dtype if out_dtype in TYPES else torch.float32)
    return _multiply(out, a_q_MK, a_s, b_q_NK, b_s).to(out_dtype)


def fp8_gemm_wgrad(a_q_NM: Tensor, a_s: Tensor, b_q_KM: Tensor, b_s: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype == torch.float64:
        return reference.fp8_gemm_wgrad(a_q_NM, a_s, b_q_KM, b_s, out_dtype)
    out = a_q_NM.new_empty((len(a_q_NM), len(b_q_KM)), dtype=torch.float32)
    return _multiply(out, a_q_NM, a_s, b_q_KM, b_s, square=False).to(out_dtype)


def fp8_gemm_wgrad_(out_NK: Tensor, a_q_NM: Tensor, a_s: Tensor, b_q_KM: Tensor, b_s: Tensor) -> None:
    if out_NK.dtype == torch.float32 and out_NK.data_ptr() % 8 == 0:
        _multiply(out_NK, a_q_NM, a_s, b_q_KM, b_s, square=False, accumulate=True)
    else:
        wide = torch.promote_types(out_NK.dtype, torch.float32)
        out_NK.add_(fp8_gemm_wgrad(a_q_NM, a_s, b_q_KM, b_s, wide))


def fp8_grouped_gemm(
    a_q_PK: Tensor, a_s: Tensor, b_q_ENK: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor, out_dtype: torch.dtype
) -> Tensor:
    if out_dtype == torch.float64:
        return reference.fp8_grouped_gemm(a_q_PK, a_s, b_q_ENK, b_s, tokens_per_expert_E, out_dtype)
    out = a_q_PK.new_empty((len(a_q_PK), b_q_ENK.shape[1]), dtype=out_dtype if out_dtype in TYPES else torch.float32)
    return _multiply(out, a_q_PK, a_s, b_q_ENK, b_s, "rows", tokens_per_expert_E=tokens_per_expert_E).to(out_dtype)


def fp8_grouped_gemm_wgrad(
    a_q_NP: Tensor, a_s: Tensor, b_q_KP: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor, out_dtype: torch.dtype
) -> Tensor:
    if out_dtype == torch.float64:
        return reference.fp8_grouped_gemm_wgrad(a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E, out_dtype)
    out = a_q_NP.new_empty((len(tokens_per_expert_E), len(a_q_NP), len(b_q_KP)), dtype=torch.float32)
    return _multiply(out, a_q_NP, a_s, b_q_KP, b_s, "depth", False, False, tokens_per_expert_E).to(out_dtype)


def fp8_grouped_gemm_wgrad_(
    out_ENK: Tensor, a_q_NP: Tensor, a_s: Tensor, b_q_KP: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor
) -> None:
    if out_ENK.dtype == torch.float32 and out_ENK.data_ptr() % 8 == 0:
        _multiply(out_ENK, a_q_NP, a_s, b_q_KP, b_s, "depth", False, True, tokens_per_expert_E)
    else:
        wide = torch.promote_types(out_ENK.dtype, torch.float32)
        out_ENK.add_(fp8_grouped_gemm_wgrad(a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E, wide))


__all__ = [
    "dequantize",
    "fp8_gemm",
    "fp8_gemm_wgrad",
    "fp8_gemm_wgrad_",
    "fp8_grouped_gemm",
    "fp8_grouped_gemm_wgrad",
    "fp8_grouped_gemm_wgrad_",
    "quantize_1x128",
    "quantize_128x128",
    "quantize_both",
    "quantize_weight",
    "rms_norm_quantize",
    "swiglu_backward_quantize",
    "swiglu_quantize",
]
