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
from r1.kernels.moe.triton import swiglu_backward
from r1.kernels.moe.triton_gemm import plan_kernel

ROWS = 16  # of one program of the 1 x 128 quantiser
SQUARE_WARPS = 16  # of a tile of 128 x 128: with half as many a thread holds twice as much, and fewer of them fit
GROUP = 8  # tiles of rows that go down b together
TILE = {"BLOCK": BLOCK, "num_warps": 8, "num_stages": 4}

Copies = tuple[Tensor, Tensor, Tensor, Tensor]


def _narrowed(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 else x


def _room(like: Tensor, M: int, K: int, across: bool) -> Copies:
    """For the copies of an (M, K) matrix; a matrix without numbers has scales of 1."""
    values, scales, nothing = reference.values_like, reference.row_scales_like, reference.nothing
    q, s = values(like, M, K), scales(like, M, K)
    q_across, s_across = (values(like, K, M), scales(like, K, M)) if across else nothing(like)
    if M * K == 0:
        s.fill_(1.0)
        s_across.fill_(1.0)
    return q, s, q_across, s_across


def _quantize(
    source: Tensor,
    power_of_two: bool,
    across: bool = False,
    swiglu: bool = False,
    row_factor: Tensor | None = None,
    column_factor: Tensor | None = None,
) -> Copies:
    x = _narrowed(source)
    M, K = x.shape[0], x.shape[1] // 2 if swiglu else x.shape[1]
    q, s, q_across, s_across = copies = _room(x, M, K, across)
    if M * K:
        rows = BLOCK if across else ROWS
        quantisers.quantize_kernel[(triton.cdiv(M, rows), triton.cdiv(K, BLOCK))](
            x, *x.stride(), x if row_factor is None else row_factor.contiguous(),
            x if column_factor is None else column_factor.contiguous(), q, q.stride(0), s, q_across,
            q_across.stride(0), s_across, M, K, SWIGLU=swiglu, ROW_FACTOR=row_factor is not None,
            COLUMN_FACTOR=column_factor is not None, POWER_OF_TWO=power_of_two, ACROSS=across, ROWS=rows, BLOCK=BLOCK,
            num_warps=SQUARE_WARPS if across else 4,
        )  # fmt: skip
    return copies


def quantize_1x128(x_MK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return _quantize(x_MK, power_of_two)[:2]


def quantize_both(x_MK: Tensor, power_of_two: bool) -> Copies:
    return _quantize(x_MK, power_of_two, across=True)


def swiglu_quantize(gate_up_MF: Tensor, weights_M: Tensor | None, across: bool, power_of_two: bool) -> Copies:
    return _quantize(gate_up_MF, power_of_two, across=across, swiglu=True, row_factor=weights_M)


def swiglu_backward_quantize(
    grad_MF: Tensor, gate_up_MF: Tensor, weights_M: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As in reference.py. Not from one read where a block would hold the last of gate and the first of up, nor of
    float32, for which there are not enough registers."""
    grad, x = _narrowed(grad_MF), _narrowed(gate_up_MF)
    M, F = grad.shape
    if F % BLOCK or 4 in (grad.element_size(), x.element_size()):
        weights = None if weights_M is None else weights_M.float()
        grad_gate_up, grad_weights = swiglu_backward(grad.float(), x.float(), weights)
        return *quantize_both(grad_gate_up, power_of_two), grad_weights
    q, s, q_across, s_across = copies = _room(x, M, 2 * F, across=True)
    sums = x.new_empty((0 if weights_M is None else F // BLOCK, M), dtype=torch.float32)
    if M * F:
        quantisers.swiglu_backward_quantize_kernel[(2, triton.cdiv(M, BLOCK), F // BLOCK)](
            grad, *grad.stride(), x, *x.stride(), x if weights_M is None else weights_M.contiguous(), q, q.stride(0),
            s, q_across, q_across.stride(0), s_across, sums, M, F, WEIGHTED=weights_M is not None,
            POWER_OF_TWO=power_of_two, BLOCK=BLOCK, num_warps=SQUARE_WARPS,
        )  # fmt: skip
    return *copies, sums.new_empty(0) if weights_M is None else sums.sum(0)


def rms_norm_quantize(
    x_MH: Tensor, weight_H: Tensor, eps: float, across: bool, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = _narrowed(x_MH)
    M, H = x.shape
    inverse_rms = x.new_empty((M, 1), dtype=torch.float32)
    if M:
        columns = min(triton.next_power_of_2(max(H, 1)), 1024)
        quantisers.inverse_rms_kernel[(M,)](x, *x.stride(), inverse_rms, H, eps, COLUMNS=columns)
    copies = _quantize(x, power_of_two, across=across, row_factor=inverse_rms, column_factor=weight_H)
    return *copies, inverse_rms


def quantize_128x128(w_NK: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return _quantize_squares(w_NK, power_of_two, across=False)[:2]


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _quantize_squares(weight, power_of_two=False, across=True)


def _quantize_squares(weight: Tensor, power_of_two: bool, across: bool) -> tuple[Tensor, Tensor, Tensor]:
    *lead, N, K = weight.shape
    matrices = _narrowed(weight).reshape(-1, N, K) if weight.numel() else weight
    row_blocks, blocks = triton.cdiv(N, BLOCK), triton.cdiv(K, BLOCK)
    q = reference.values_like(weight, *lead, N, K)
    q_across = reference.values_like(weight, *lead, K, N) if across else q
    s = weight.new_empty((*lead, row_blocks, blocks), dtype=torch.float32)
    if weight.numel():
        quantisers.quantize_square_kernel[(row_blocks, blocks, len(matrices))](
            matrices, *matrices.stride(), q, q.stride(-2), s, q_across, q_across.stride(-2), N, K,
            POWER_OF_TWO=power_of_two, ACROSS=across, BLOCK=BLOCK, num_warps=SQUARE_WARPS,
        )  # fmt: skip
    return q, s.fill_(1.0) if weight.numel() == 0 else s, q_across


def _product(
    out: Tensor, a_q: Tensor, a_s: Tensor, b_q: Tensor, b_s: Tensor, square: bool, accumulate: bool = False
) -> Tensor:
    (M, K), N = a_q.shape, b_q.shape[0]
    if out.numel() == 0 or K == 0:
        return out if accumulate else out.zero_()
    gemm.fp8_gemm_kernel[(triton.cdiv(M, BLOCK) * triton.cdiv(N, BLOCK),)](
        descriptor(a_q, [BLOCK, BLOCK]), a_s, *a_s.stride(), descriptor(b_q, [BLOCK, BLOCK]), b_s, 0, *b_s.stride(),
        out, out, out, out, 1, M, N, K, SQUARE=square, GROUPED=False, ACCUMULATE=accumulate, E_2=1, GROUP=GROUP, **TILE,
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
    gemm.fp8_gemm_kernel[(tiles * triton.cdiv(N, BLOCK),)](
        descriptor(a_q_PK, [BLOCK, BLOCK]), a_s, *a_s.stride(), descriptor(b_q_ENK, [1, BLOCK, BLOCK]), b_s,
        *b_s.stride(), out, begins, ends, tile_ends, E, P, N, K, SQUARE=True, GROUPED=True,
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
