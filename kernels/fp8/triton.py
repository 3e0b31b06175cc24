"""The fp8 family in Triton, for Hopper. Kernels: triton_quantize.py, triton_gemm.py. Letters are the package's.

Products in float64 and dequantise, which is for tests and checkpoints, are the torch backend's.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from r1.kernels.bulk_copy import descriptor
from r1.kernels.fp8 import reference
from r1.kernels.fp8 import triton_gemm as gemm
from r1.kernels.fp8 import triton_quantize as quantisers
from r1.kernels.fp8.reference import BLOCK, dequantize
from r1.kernels.moe.triton_gemm import plan_kernel

ROWS = 16  # of one program of the 1 x 128 quantiser
GROUP = 8  # tiles of rows that go down b together
TILE = {"BLOCK": BLOCK, "num_warps": 8, "num_stages": 4}


def _quantize(
    x_MK: Tensor,
    power_of_two: bool,
    square: bool = False,
    across: bool = False,
    swiglu: bool = False,
    weights_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x_MK.float() if x_MK.dtype == torch.float64 else x_MK
    M, K = x.shape[0], x.shape[1] // 2 if swiglu else x.shape[1]
    row_blocks, blocks = triton.cdiv(M, BLOCK), triton.cdiv(K, BLOCK)
    values, scales = reference.values_like, reference.row_scales_like
    q = values(x, M, K)
    s = x.new_empty((row_blocks, blocks), dtype=torch.float32) if square else scales(x, M, K)
    q_across, s_across = (values(x, K, M), scales(x, K, M)) if across else (q, s)
    if M * K:
        rows = BLOCK if square or across else ROWS
        quantisers.quantize_kernel[(triton.cdiv(M, rows), blocks)](
            x, x.stride(0), x.stride(1), x if weights_M is None else weights_M.contiguous(), q, q.stride(0), s,
            q_across, q_across.stride(0), s_across, M, K, SWIGLU=swiglu, WEIGHTED=weights_M is not None,
            POWER_OF_TWO=power_of_two, SQUARE=square, ACROSS=across,
            ROWS=rows, BLOCK=BLOCK, num_warps=8 if rows == BLOCK else 4,
        )  # fmt: skip
    else:
        s.fill_(1.0)
        s_across.fill_(1.0)
    return q, s, q_across, s_across


def quantize_1x128(x_MK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return _quantize(x_MK, power_of_two)[:2]


def quantize_128x128(w_NK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return _quantize(w_NK, power_of_two, square=True)[:2]


def quantize_both(x_MK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _quantize(x_MK, power_of_two, across=True)


def swiglu_quantize(
    gate_up_MF: Tensor, weights_M: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _quantize(gate_up_MF, power_of_two, across=True, swiglu=True, weights_M=weights_M)


def _product(
    out: Tensor, a_q: Tensor, a_s: Tensor, b_q: Tensor, b_s: Tensor, square: bool, accumulate: bool = False
) -> Tensor:
    (M, K), N = a_q.shape, b_q.shape[0]
    if out.numel() == 0 or K == 0:
        return out if accumulate else out.zero_()
    gemm.fp8_gemm_kernel[(triton.cdiv(M, BLOCK) * triton.cdiv(N, BLOCK),)](
        descriptor(a_q, [BLOCK, BLOCK]), a_s, *a_s.stride(), descriptor(b_q, [BLOCK, BLOCK]), b_s, *b_s.stride(), out,
        out, out, out, 1, M, N, K, SQUARE=square, GROUPED=False, ACCUMULATE=accumulate, E_2=1, GROUP=GROUP, **TILE,
    )  # fmt: skip
    return out


def fp8_gemm(a_q_MK: Tensor, a_s: Tensor, b_q_NK: Tensor, b_s: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype == torch.float64:
        return reference.fp8_gemm(a_q_MK, a_s, b_q_NK, b_s, out_dtype)
    out = a_q_MK.new_empty((len(a_q_MK), len(b_q_NK)), dtype=out_dtype)
    return _product(out, a_q_MK, a_s, b_q_NK, b_s, square=True)


def fp8_gemm_wgrad(a_q_NM: Tensor, a_s: Tensor, b_q_KM: Tensor, b_s: Tensor, out_dtype: torch.dtype) -> Tensor:
    if out_dtype == torch.float64:
        return reference.fp8_gemm_wgrad(a_q_NM, a_s, b_q_KM, b_s, out_dtype)
    out = a_q_NM.new_empty((len(a_q_NM), len(b_q_KM)), dtype=out_dtype)
    return _product(out, a_q_NM, a_s, b_q_KM, b_s, square=False)


def fp8_gemm_wgrad_(out_NK: Tensor, a_q_NM: Tensor, a_s: Tensor, b_q_KM: Tensor, b_s: Tensor) -> None:
    if out_NK.dtype == torch.float64:
        reference.fp8_gemm_wgrad_(out_NK, a_q_NM, a_s, b_q_KM, b_s)
    else:
        _product(out_NK, a_q_NM, a_s, b_q_KM, b_s, square=False, accumulate=True)


def _plan(tokens_per_expert_E: Tensor, P: int) -> tuple[Tensor, Tensor, Tensor]:
    if tokens_per_expert_E.device.type == "cpu":
        reference.checked_counts(tokens_per_expert_E, P)
    E, counts = len(tokens_per_expert_E), tokens_per_expert_E.contiguous()
    begins, ends, tile_ends = torch.empty(3, E, dtype=torch.int32, device=counts.device).unbind()
    plan_kernel[(1,)](
        counts, begins, ends, tile_ends, E, P, 0, MASKED=False, BLOCK_M=BLOCK, E_2=triton.next_power_of_2(E)
    )
    return begins, ends, tile_ends


def fp8_grouped_gemm(
    a_q_PK: Tensor, a_s: Tensor, b_q_ENK: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor, out_dtype: torch.dtype
) -> Tensor:
    if out_dtype == torch.float64:
        return reference.fp8_grouped_gemm(a_q_PK, a_s, b_q_ENK, b_s, tokens_per_expert_E, out_dtype)
    (P, K), (E, N, _) = a_q_PK.shape, b_q_ENK.shape
    out = a_q_PK.new_empty((P, N), dtype=out_dtype)
    if out.numel() == 0 or K == 0:
        return out.zero_()
    begins, ends, tile_ends = _plan(tokens_per_expert_E, P)
    tiles = (P + min(E, P) * (BLOCK - 1)) // BLOCK  # each of E groups may end in a tile that is not full
    scales = b_s.contiguous().flatten(0, 1)
    gemm.fp8_gemm_kernel[(tiles * triton.cdiv(N, BLOCK),)](
        descriptor(a_q_PK, [BLOCK, BLOCK]), a_s, *a_s.stride(), descriptor(b_q_ENK, [1, BLOCK, BLOCK]), scales,
        *scales.stride(), out, begins, ends, tile_ends, E, P, N, K, SQUARE=True, GROUPED=True,
        ACCUMULATE=False, E_2=triton.next_power_of_2(E), GROUP=GROUP, **TILE,
    )  # fmt: skip
    return out


def fp8_grouped_gemm_wgrad(
    a_q_NP: Tensor, a_s: Tensor, b_q_KP: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor, out_dtype: torch.dtype
) -> Tensor:
    if out_dtype == torch.float64:
        return reference.fp8_grouped_gemm_wgrad(a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E, out_dtype)
    out = a_q_NP.new_empty((len(tokens_per_expert_E), len(a_q_NP), len(b_q_KP)), dtype=out_dtype)
    return _grouped_wgrad(out, a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E, accumulate=False)


def fp8_grouped_gemm_wgrad_(
    out_ENK: Tensor, a_q_NP: Tensor, a_s: Tensor, b_q_KP: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor
) -> None:
    if out_ENK.dtype == torch.float64:
        reference.fp8_grouped_gemm_wgrad_(out_ENK, a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E)
    else:
        _grouped_wgrad(out_ENK, a_q_NP, a_s, b_q_KP, b_s, tokens_per_expert_E, accumulate=True)


def _grouped_wgrad(
    out: Tensor, a_q: Tensor, a_s: Tensor, b_q: Tensor, b_s: Tensor, tokens_per_expert_E: Tensor, accumulate: bool
) -> Tensor:
    (E, N, K), P = out.shape, a_q.shape[1]
    if out.numel() == 0 or P == 0:
        return out if accumulate else out.zero_()
    begins, ends, _ = _plan(tokens_per_expert_E, P)
    gemm.fp8_grouped_wgrad_kernel[(E * triton.cdiv(N, BLOCK) * triton.cdiv(K, BLOCK),)](
        descriptor(a_q, [BLOCK, BLOCK]), a_s, *a_s.stride(), descriptor(b_q, [BLOCK, BLOCK]), b_s, *b_s.stride(), out,
        begins, ends, N, K, ACCUMULATE=accumulate, **TILE,
    )  # fmt: skip
    return out


def fp8_linear(
    x_MK: Tensor, weight_NK: Tensor, keep_x: bool, keep_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As in reference.py; one read of x makes both of its copies."""
    weight = quantize_128x128(weight_NK, False)
    x_q, x_s, *across = _quantize(x_MK, False, across=keep_x)
    y = fp8_gemm(x_q, x_s, *weight, x_MK.dtype)
    x_q_KM, x_s_KM = across if keep_x else reference.nothing(x_MK)
    return y, x_q_KM, x_s_KM, *(weight if keep_weight else reference.nothing(x_MK))


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
