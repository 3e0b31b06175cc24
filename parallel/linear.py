"""The linear that is whole on every tensor-parallel rank, and how a backward adds to Megatron's gradients itself."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class ReplicatedLinear(MegatronModule):
    """y = x Wᵀ with W (out, in) whole on every tensor-parallel rank. Under sequence parallelism each rank sees its own
    tokens, and Megatron sums the gradients over the ranks because the weight is marked so."""

    def __init__(self, config: Any, in_size: int, out_size: int) -> None:
        super().__init__(config)
        weight = torch.empty(out_size, in_size, dtype=config.params_dtype, device=parameter_device())
        self.weight = torch.nn.Parameter(weight)
        if config.perform_initialization:
            config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight)


def parameter_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def main_gradients(*parameters: torch.nn.Parameter) -> tuple[Tensor, ...] | None:
    """Where Megatron's DistributedDataParallel adds up gradients, if it does: the backward adds to them itself.

    Whatever gradient_accumulation_fusion says, which is for Megatron's linears and wants Apex.
    """
    if not torch.is_grad_enabled() or not all(hasattr(p, "main_grad") and p.requires_grad for p in parameters):
        return None
    return tuple(p.main_grad for p in parameters)


def mark_as_added(out: Tensor, *parameters: torch.nn.Parameter) -> None:
    """Tell Megatron that `out`'s backward adds these gradients: when it runs, before the hooks that would add what it
    returns. They clear the mark every step."""

    def mark(_: Tensor) -> None:
        for parameter in parameters:
            parameter.grad_added_to_main_grad = True

    if out.requires_grad:
        out.register_hook(mark)
