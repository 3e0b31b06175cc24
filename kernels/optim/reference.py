"""The optim family in plain torch: AdamW over lists of tensors, and the gradient norm."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    stochastic_rounding: bool,
    seed: int,
) -> None:
    if not params:
        return
    weights = masters or _widened(params)
    dtype = weights[0].dtype
    g = [x.to(dtype) for x in grads]
    if grad_scale != 1.0:
        g = list(torch._foreach_mul(g, grad_scale))
    m, v = _widened(exp_avgs), _widened(exp_avg_sqs)
    torch._foreach_lerp_(m, g, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, g, g, 1 - beta2)
    del g  # scaled, it takes as much memory as the denominator
    if weight_decay:
        torch._foreach_mul_(weights, 1 - lr * weight_decay)
    denominator = torch._foreach_sqrt(v)
    torch._foreach_div_(denominator, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominator, eps)
    torch._foreach_addcdiv_(weights, m, denominator, -lr / (1 - beta1**step))
    _store(exp_avgs, m)
    _store(exp_avg_sqs, v)
    if not stochastic_rounding:
        _store(params, weights)
        return
    generator = torch.Generator(device=params[0].device).manual_seed((seed << 32) + step)
    for p, w in zip(params, weights):
        p.copy_(_rounded_stochastically(w, generator) if p.dtype == torch.bfloat16 else w)


def _widened(tensors: list[Tensor]) -> list[Tensor]:
    return [x if x.dtype in (torch.float32, torch.float64) else x.float() for x in tensors]


def _store(into: list[Tensor], values: list[Tensor]) -> None:
    pairs = [(a, b) for a, b in zip(into, values) if a is not b]
    if pairs:
        torch._foreach_copy_([a for a, _ in pairs], [b for _, b in pairs])


def _rounded_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with a probability that keeps the mean: 16 random bits are added below those
    kept, and the lower 16 dropped."""
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    rounded = ((x.view(torch.int32) + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).bfloat16()


def grad_norm(grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.zeros(())
    wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, dtype=wide) for g in grads]))
