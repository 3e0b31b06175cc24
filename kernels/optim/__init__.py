"""The optim family: AdamW over lists of tensors, in place, and the norm of all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from r1.kernels.backend import operator, register, require
from r1.kernels.optim import reference

register("optim", "torch", reference, proven_on=("cpu", "cuda"))
register("optim", "triton", "r1.kernels.optim.triton", proven_on=())

_adamw_step = operator(
    "optim",
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] masters, int step, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "float grad_scale, bool stochastic_rounding, int seed) -> ()",
    lambda *_: None,
)
_grad_norm = operator(
    "optim",
    "grad_norm(Tensor[] grads) -> Tensor",
    lambda grads: (
        grads[0].new_empty((), dtype=torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32)
        if grads
        else torch.empty(())
    ),
)


def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    masters: Sequence[Tensor] | None = None,
    stochastic_rounding: bool = False,
    grad_scale: float = 1.0,
    seed: int = 0,
) -> None:
    """One AdamW step (arXiv 1711.05101) on lists of tensors, in place: params, both moments, and masters if given.

    Arithmetic is in float32 (float64 for float64 parameters); moments may be bfloat16, and so may parameters, with
    float32 `masters` as the truth from which they are rounded. stochastic_rounding rounds bfloat16 parameters up or
    down at random so that the mean is kept, with noise of (seed, step, place in the lists) that is another in each
    backend. Gradients are taken times grad_scale. `step` counts from 1. Deterministic.

    Raises ValueError for lists that do not match in number, shape or device, and for numbers out of range.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "masters": masters}
    for name, tensors in lists.items():
        if tensors is None:
            continue
        require(len(tensors) == len(params), name, f"{len(tensors)} tensors", f"{len(params)}, as many as params")
        for i, (a, b) in enumerate(zip(tensors, params)):
            if a.shape != b.shape or a.device != b.device:
                require(
                    False, f"{name}[{i}]", a, f"the shape and device of params[{i}], {tuple(b.shape)} on {b.device}"
                )
    require(len({p.dtype for p in params}) <= 1, "params", [p.dtype for p in params], "tensors of one type")
    require(step >= 1, "step", step, "an integer >= 1")
    require(lr >= 0, "lr", lr, "a number >= 0")
    require(0 <= beta1 < 1, "beta1", beta1, "0 <= beta1 < 1")
    require(0 <= beta2 < 1, "beta2", beta2, "0 <= beta2 < 1")
    require(eps >= 0, "eps", eps, "a number >= 0")
    require(weight_decay >= 0, "weight_decay", weight_decay, "a number >= 0")
    with torch.no_grad():
        _adamw_step(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            list(masters or ()),
            step,
            float(lr),
            float(beta1),
            float(beta2),
            float(eps),
            float(weight_decay),
            float(grad_scale),
            stochastic_rounding,
            seed,
        )


def grad_norm(grads: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a 0-d float32 tensor (float64 if any gradient is); 0 for no gradients."""
    return _grad_norm([g.detach() for g in grads])


__all__ = ["adamw_step", "grad_norm"]
