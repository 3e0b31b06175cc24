"""The norm family: RMSNorm, and rotary position embedding with YaRN.

Letters: T tokens, N heads, D rotary width, H the normalised axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from r1.kernels.backend import operator, register, require, wide
from r1.kernels.norm import reference

register("norm", "torch", reference, proven_on=("cpu", "cuda"))
register("norm", "cpu", "r1.kernels.norm.cpu", proven_on=("cpu",))
register("norm", "triton", "r1.kernels.norm.triton", proven_on=())

YARN_KEYS = ("factor", "original_max_positions", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
LLAMA3_KEYS = ("factor", "original_max_positions", "low_freq_factor", "high_freq_factor")


def _norm_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _norm_backward(ctx: Any, grad: Tensor, _: Any) -> tuple:
    return *rms_norm_backward(grad, *ctx.saved_tensors), None


_rms_norm = operator(
    "norm",
    "rms_norm(Tensor x, Tensor weight_H, float eps) -> (Tensor, Tensor)",
    lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=wide(x))),
    _norm_save,
    _norm_backward,
)
rms_norm_backward = operator(
    "norm",
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight_H, Tensor scale) -> (Tensor, Tensor)",
    lambda grad, x, weight, scale: (x.new_empty(x.shape), torch.empty_like(weight)),
)


def _rope_save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx: Any, grad: Tensor) -> tuple:
    # A rotation's gradient is the rotation back.
    return _apply_rope(grad, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None


_apply_rope = operator(
    "norm",
    "apply_rope(Tensor x_TND, Tensor cos_TD, Tensor sin_TD, bool interleaved, bool inverse) -> Tensor",
    lambda x, *_: x.new_empty(x.shape),
    _rope_save,
    _rope_backward,
)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467), in x's type, computed in float32.

    x is floating with any leading axes, weight_H floating (H). float64 input is computed in float64. Differentiable in
    both. Raises ValueError for a wrong shape, type or device, or eps < 0.
    """
    require(x.dim() >= 1 and x.is_floating_point(), "x", x, "a floating tensor (..., H)")
    require(
        weight_H.shape == x.shape[-1:] and weight_H.device == x.device and weight_H.is_floating_point(),
        "weight_H", weight_H, f"a floating ({x.shape[-1]},) tensor on {x.device}",
    )  # fmt: skip
    require(eps >= 0, "eps", eps, "a number >= 0")
    return _rms_norm(x, weight_H, eps)[0]


def apply_rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool) -> Tensor:
    """Rotates pairs of the last axis by each token's angles (RoFormer, arXiv 2104.09864), in x's type and shape.

    cos_TD and sin_TD are (T, D / 2), from rope_tables; they get no gradient. interleaved=True turns neighbours
    (2i, 2i + 1) and leaves them in place, as DeepSeek's checkpoints are stored; False turns (i, i + D / 2), as Llama
    and Qwen2. Raises ValueError for a wrong shape or device.
    """
    require(
        x_TND.dim() == 3 and x_TND.shape[2] % 2 == 0 and x_TND.is_floating_point(),
        "x_TND", x_TND, "a floating (T, N, D) tensor with an even D",
    )  # fmt: skip
    shape = (x_TND.shape[0], x_TND.shape[2] // 2)
    for name, table in (("cos_TD", cos_TD), ("sin_TD", sin_TD)):
        require(
            table.shape == shape and table.device == x_TND.device, name, table, f"a {shape} tensor on {x_TND.device}"
        )
    return _apply_rope(x_TND, cos_TD.detach(), sin_TD.detach(), interleaved, False)


def rope_tables(
    positions_T: Tensor,
    dim: int,
    base: float,
    *,
    yarn: Mapping[str, float] | None = None,
    llama3: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, dim / 2), of the rotary angles at integer or float positions_T.

    yarn has the keys factor, original_max_positions, beta_fast, beta_slow, mscale, mscale_all_dim (arXiv 2309.00071, as
    in DeepSeek-V3); the tables carry its factor mscale / mscale_all_dim. llama3 has the keys factor,
    original_max_positions, low_freq_factor, high_freq_factor (Llama 3.1, arXiv 2407.21783). Angles are computed in
    float64.
    Raises ValueError for an odd dim, a base <= 1, both extensions at once, or missing or unknown keys of one.
    """
    require(positions_T.dim() == 1, "positions_T", positions_T, "a (T,) tensor")
    require(dim > 0 and dim % 2 == 0, "dim", dim, "an even number > 0")
    require(base > 1, "base", base, "a number > 1")
    if yarn is not None:
        require(set(yarn) == set(YARN_KEYS), "yarn", dict(yarn), f"the keys {', '.join(YARN_KEYS)}")
        require(yarn["factor"] >= 1, "yarn['factor']", yarn["factor"], "a number >= 1")
    if llama3 is not None:
        require(yarn is None, "yarn", yarn, "None beside llama3")
        require(set(llama3) == set(LLAMA3_KEYS), "llama3", dict(llama3), f"the keys {', '.join(LLAMA3_KEYS)}")
        factors = llama3["low_freq_factor"], llama3["high_freq_factor"]
        require(factors[0] < factors[1], "llama3", dict(llama3), "low_freq_factor < high_freq_factor")
    return reference.rope_tables(
        positions_T,
        dim,
        float(base),
        dict(yarn) if yarn is not None else None,
        dict(llama3) if llama3 is not None else None,
        dtype,
    )


def yarn_softmax_scale(factor: float, mscale_all_dim: float) -> float:
    """What DeepSeek-V3 multiplies the softmax scale by under YaRN: (0.1 x mscale_all_dim x ln(factor) + 1)^2."""
    require(factor > 0, "factor", factor, "a number > 0")
    return reference.mscale(factor, mscale_all_dim) ** 2


__all__ = ["apply_rope", "rms_norm", "rope_tables", "yarn_softmax_scale"]
