"""The norm family by r1._cpu (csrc/cpu/norm.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from r1 import _cpu
from r1.kernels.native import address, computes, rows_of, threads
from r1.kernels.norm import reference

ROWS = 64  # whose weight gradients are added up by one thread, whatever the number of threads


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if not computes(x, weight_H) or not x.numel():
        return reference.rms_norm(x, weight_H, eps)
    x_RH, weight_H = rows_of(x), weight_H.contiguous()
    rows, H = x_RH.shape
    out, scale = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1)
    _cpu.rms_norm(
        address(x_RH), x_RH.stride(0), address(weight_H), eps, rows, H, address(out), address(scale), threads()
    )
    return out, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    if not computes(grad, x, weight_H, scale) or not x.numel():
        return reference.rms_norm_backward(grad, x, weight_H, scale)
    grad_RH, x_RH, weight_H, scale = rows_of(grad), rows_of(x), weight_H.contiguous(), scale.contiguous()
    rows, H = x_RH.shape
    grad_x, grad_weight_H = x.new_empty(x.shape), torch.empty_like(weight_H)
    parts = x.new_empty(-(-rows // ROWS), H)
    _cpu.rms_norm_backward(
        address(grad_RH), grad_RH.stride(0), address(x_RH), x_RH.stride(0), address(weight_H), address(scale), rows, H,
        address(grad_x), address(grad_weight_H), address(parts), len(parts), threads(),
    )  # fmt: skip
    return grad_x, grad_weight_H


def apply_rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    if not computes(x_TND, cos_TD, sin_TD):
        return reference.apply_rope(x_TND, cos_TD, sin_TD, interleaved, inverse)
    x_TND = x_TND if x_TND.stride(2) == 1 else x_TND.contiguous()
    cos_TD, sin_TD = cos_TD.contiguous(), sin_TD.contiguous()
    T, N, D = x_TND.shape
    out = x_TND.new_empty(T, N, D)
    _cpu.apply_rope(
        address(x_TND), x_TND.stride(0), x_TND.stride(1), address(cos_TD), address(sin_TD), T, N, D // 2, interleaved,
        inverse, address(out), threads(),
    )  # fmt: skip
    return out


__all__ = ["apply_rope", "rms_norm", "rms_norm_backward"]
