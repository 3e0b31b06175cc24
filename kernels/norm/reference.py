"""The norm family in plain torch: RMSNorm and rotary position embedding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r1.kernels.backend import wide
from r1.kernels.exact import is_exact


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * weight, 1 / rms(x)), computed in float32 or float64."""
    x_wide = x.to(wide(x))
    # One pass: the norm's square is H times the mean square.
    norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x_wide * scale).mul_(weight_H).to(x.dtype).contiguous(), scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    H, dtype = x.shape[-1], scale.dtype
    grad_TH, x_TH, scale_T1 = grad.reshape(-1, H).to(dtype), x.reshape(-1, H).to(dtype), scale.reshape(-1, 1)
    weight = weight_H.to(dtype)
    product_TH = grad_TH * x_TH
    grad_weight = torch.mv(product_TH.t(), scale_T1.squeeze(1))
    along_T1 = torch.mv(product_TH, weight)[:, None] * scale_T1.pow(3).mul_(-1.0 / H)
    grad_x = torch.mul(grad_TH, weight, out=product_TH).mul_(scale_T1).addcmul_(x_TH, along_T1)
    return grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight_H.dtype)


def apply_rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    dtype, half = wide(x_TND), x_TND.shape[-1] // 2
    x = x_TND.to(dtype)
    cos, sin = cos_TD.to(dtype)[:, None], sin_TD.to(dtype)[:, None]
    if inverse:
        sin = -sin
    if is_exact():
        return _exact_rope(x, cos, sin, interleaved).to(x_TND.dtype)
    if interleaved:
        # Neighbours (2i, 2i + 1) are one complex number, turned by multiplication.
        x = x.clone() if x.storage_offset() % 2 else x.contiguous()
        pairs = torch.view_as_complex(x.unflatten(-1, (half, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x_TND.dtype)
    first, second = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out.to(x_TND.dtype)


def _exact_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One operation after another: what is fused rounds otherwise for a tensor's last numbers."""
    pairs = x.unflatten(-1, (-1, 2) if interleaved else (2, -1))
    first, second = pairs.unbind(-1 if interleaved else -2)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1 if interleaved else -2).flatten(-2)


def rope_tables(
    positions_T: Tensor,
    dim: int,
    base: float,
    yarn: dict[str, float] | None,
    llama3: dict[str, float] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    # float64 angles: at position 100,000 a float32 angle is off by 0.004 rad.
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=positions_T.device) / dim
    frequency = base**-exponent
    scale = 1.0
    if yarn is not None:

        def turns_at(rotations: float) -> float:
            """The (fractional) pair that turns `rotations` times within the original context."""
            return dim * math.log(yarn["original_max_positions"] / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(turns_at(yarn["beta_fast"])), 0)
        high = min(math.ceil(turns_at(yarn["beta_slow"])), dim - 1)
        pair = torch.arange(dim // 2, dtype=torch.float64, device=positions_T.device)
        stretched = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
        frequency = frequency * (1 - stretched) + frequency / yarn["factor"] * stretched
        scale = mscale(yarn["factor"], yarn["mscale"]) / mscale(yarn["factor"], yarn["mscale_all_dim"])
    if llama3 is not None:
        turns = llama3["original_max_positions"] * frequency / (2 * math.pi)  # within the original context
        low, high = llama3["low_freq_factor"], llama3["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * kept + frequency / llama3["factor"] * (1 - kept)
    angle_TD = positions_T.double()[:, None] * frequency
    return (angle_TD.cos() * scale).to(dtype), (angle_TD.sin() * scale).to(dtype)


def mscale(factor: float, coefficient: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * coefficient * math.log(factor) + 1.0
