"""Linears with a product of their own behind Megatron's, the one that is whole on every tensor-parallel rank, and how
a backward adds to Megatron's gradients itself."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from r1.kernels import QuantizedInput, grouped_gemm


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


class _Quick:
    """Without Megatron's autograd functions where there is neither a gradient nor another rank: on a small model they
    cost more than the product."""

    def forward(self, input_: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        bias_is_left = self.skip_bias_add and self.bias is not None
        if rest or options or torch.is_grad_enabled() or self.tp_group.size() > 1 or bias_is_left:
            return super().forward(input_, *rest, **options)
        return torch.nn.functional.linear(input_, self.weight, self.bias), None


class QuickColumnParallelLinear(_Quick, ColumnParallelLinear):
    """Megatron's column-parallel linear."""


class QuickRowParallelLinear(_Quick, RowParallelLinear):
    """Megatron's row-parallel linear."""


class LocalLinear:
    """A linear of Megatron's, with its parameters, checkpoints and communication, whose local product is ours."""

    weight: torch.nn.Parameter

    def product(self, x: Any) -> Tensor:
        """x times this rank's part of the weight, without communication."""
        raise NotImplementedError

    def _forward_impl(
        self,
        input: Tensor | QuantizedInput,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **unused: Any,
    ) -> Tensor:
        """Megatron's hook for the product, and for the communication of its input and of the input's gradient, of
        which a row-parallel linear, the one that may be given a quantised input here, has none."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        out = self.product(input)
        return out if bias is None else out + bias


def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ as a product of one group: where the moe family's are exact, a row does not depend on the others."""
    rows = x.flatten(0, -2)
    counts = torch.full((1,), len(rows), dtype=torch.int64, device=x.device)
    return grouped_gemm(rows, weight.t()[None], counts).view(*x.shape[:-1], len(weight))


class _ExactLinear(LocalLinear):
    def product(self, x: Tensor) -> Tensor:
        return exact_linear(x, self.weight)


class ExactColumnParallelLinear(_ExactLinear, ColumnParallelLinear):
    """Megatron's column-parallel linear, a row at a time."""


class ExactRowParallelLinear(_ExactLinear, RowParallelLinear):
    """Megatron's row-parallel linear, a row at a time."""


class ExactReplicatedLinear(_ExactLinear, ReplicatedLinear):
    """The replicated linear, a row at a time."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


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
