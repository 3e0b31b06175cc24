"""Linears whose three products are in FP8, 1 x 128 and 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3).

They are Megatron's, with its parameters, checkpoints and communication; only the local product is ours. Weights are
quantised at their first use after a change, by when Megatron's hooks have fetched them, and kept until whoever changes
them calls `forget_quantized`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from r1.kernels import dequantize, fp8_linear, quantize_1x128, quantize_weight
from r1.parallel.linear import ReplicatedLinear, main_gradients, mark_as_added

SQUARE = (128, 128)


class KeepsQuantized:
    """A module that multiplies with an FP8 copy of its weights."""

    _kept: Any = None

    def quantize(self) -> Any:
        raise NotImplementedError

    def quantized(self) -> Any:
        """The copy, made when it is first wanted."""
        if self._kept is None:
            self._kept = self.quantize()
        return self._kept

    def forget(self) -> None:
        self._kept = None


def forget_quantized(chunks: Iterable[torch.nn.Module]) -> None:
    """To be called whenever weights of these have changed: by an optimiser's step, or by loading or copying."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, KeepsQuantized):
                module.forget()


class _BlockLinear(KeepsQuantized):
    weight: torch.nn.Parameter

    def quantize(self) -> tuple[Tensor, Tensor, Tensor]:
        return quantize_weight(self.weight)

    def product(self, x: Tensor) -> Tensor:
        """x times this rank's part of the weight, without communication."""
        main = main_gradients(self.weight)
        out = fp8_linear(x, self.weight, self.quantized(), main[0] if main else None)
        if main:
            mark_as_added(out, self.weight)
        return out

    def _forward_impl(
        self,
        input: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **unused: Any,
    ) -> Tensor:
        """Megatron's hook for the product, and for the communication of its input and of the input's gradient."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        out = self.product(input)
        return out if bias is None else out + bias


class BlockColumnParallelLinear(_BlockLinear, ColumnParallelLinear):
    """Megatron's column-parallel linear with its product in FP8."""


class BlockRowParallelLinear(_BlockLinear, RowParallelLinear):
    """Megatron's row-parallel linear with its product in FP8."""


class BlockReplicatedLinear(_BlockLinear, ReplicatedLinear):
    """The replicated linear with its product in FP8."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Linears(NamedTuple):
    column: type
    row: type
    replicated: type


def linears(fp8: str) -> Linears:
    """The classes of a decoder layer's linears for `ParallelConfig.fp8`."""
    if fp8 == "block":
        return Linears(BlockColumnParallelLinear, BlockRowParallelLinear, BlockReplicatedLinear)
    if fp8 == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return Linears(TEColumnParallelLinear, TERowParallelLinear, ReplicatedLinear)
    return Linears(ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)


# ------------------------------------------------------------------------- for those who multiply outside of the linear


def local_product(linear: Any, x: Tensor) -> Tensor:
    """x times this rank's part of the linear's weight, in the linear's precision, without communication."""
    for hook in linear._forward_pre_hooks.values():
        hook(linear, (x,))  # Megatron fetches weights that are on their way before a module's forward, passed by here
    return linear.product(x) if isinstance(linear, _BlockLinear) else torch.nn.functional.linear(x, linear.weight)


def rounded_weight(linear: Any) -> Tensor:
    """The weight as the linear multiplies it: one that FP8 rounded, in the weight's type."""
    if not isinstance(linear, _BlockLinear):
        return linear.weight
    values, scales, _ = linear.quantized()
    return dequantize(values, scales, SQUARE, linear.weight.dtype)


def rounded_input(linear: Any, x: Tensor) -> Tensor:
    """x as the linear multiplies it. Rounding it again changes nothing."""
    if not isinstance(linear, _BlockLinear):
        return x
    return dequantize(*quantize_1x128(x.flatten(0, -2)), dtype=x.dtype).view_as(x)
