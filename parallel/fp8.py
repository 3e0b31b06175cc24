"""Linears whose three products are in FP8, 1 x 128 and 128 x 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3).

They are Megatron's, with its parameters, checkpoints and communication; only the local product is ours. Weights are
quantised at their first use after a change, by when Megatron's hooks have fetched them, and kept until whoever changes
them calls `forget_quantized`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, copy_to_tensor_model_parallel_region
from torch import Tensor

from r1.kernels import (
    QuantizedInput,
    dequantize,
    fp8_linear,
    fp8_swiglu,
    quantize_1x128,
    quantize_weight,
    swiglu,
)
from r1.parallel.config import ParallelConfig
from r1.parallel.linear import (
    ExactColumnParallelLinear,
    ExactReplicatedLinear,
    ExactRowParallelLinear,
    LocalLinear,
    QuickColumnParallelLinear,
    QuickRowParallelLinear,
    ReplicatedLinear,
    main_gradients,
    mark_as_added,
)

SQUARE = (128, 128)


class KeepsQuantized:
    """A module that multiplies with an FP8 copy of its weights."""

    _kept: Any = None

    def quantize(self) -> Any:
        raise NotImplementedError

    def quantized(self) -> Any:
        """The copy, made when it is first wanted."""
        if self._kept is None:
            with torch.inference_mode(False), torch.no_grad():  # rollout may be the first, and training reads it too
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


class _BlockLinear(KeepsQuantized, LocalLinear):
    def quantize(self) -> tuple[Tensor, Tensor, Tensor]:
        return quantize_weight(self.weight)

    def product(self, x: Tensor | QuantizedInput) -> Tensor:
        main = main_gradients(self.weight)
        out = fp8_linear(x, self.weight, self.quantized(), main[0] if main else None)
        if main:
            mark_as_added(out, self.weight)
        return out


class BlockColumnParallelLinear(_BlockLinear, ColumnParallelLinear):
    """Megatron's column-parallel linear with its product in FP8."""

    def forward(self, input_: Tensor | QuantizedInput, *rest: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        if not isinstance(input_, QuantizedInput):
            return super().forward(input_, *rest, **options)
        # Nothing of it is communicated but its gradient; attention.norm_of_linears sees to that.
        if self.gather_output or self.sequence_parallel:
            raise NotImplementedError("a quantised input is for a linear that neither gathers its input nor its output")
        x = copy_to_tensor_model_parallel_region(input_.x, group=self.tp_group)
        out = self.product(input_._replace(x=x))
        return out if self.bias is None else out + self.bias, None


class BlockRowParallelLinear(_BlockLinear, RowParallelLinear):
    """Megatron's row-parallel linear with its product in FP8."""


class BlockReplicatedLinear(_BlockLinear, ReplicatedLinear):
    """The replicated linear with its product in FP8."""

    def forward(self, x: Tensor | QuantizedInput) -> Tensor:
        return self.product(x)


def activated(gate_up: Tensor, linear: Any) -> Tensor | QuantizedInput:
    """silu(gate) * up, as the linear that alone reads it wants it."""
    return fp8_swiglu(gate_up) if isinstance(linear, _BlockLinear) else swiglu(gate_up)


class Linears(NamedTuple):
    column: type
    row: type
    replicated: type


def linears(parallel: ParallelConfig) -> Linears:
    """The classes of a decoder layer's linears."""
    if parallel.numerics == "exact":
        return Linears(ExactColumnParallelLinear, ExactRowParallelLinear, ExactReplicatedLinear)
    if parallel.fp8 == "block":
        return Linears(BlockColumnParallelLinear, BlockRowParallelLinear, BlockReplicatedLinear)
    if parallel.fp8 == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TERowParallelLinear

        return Linears(TEColumnParallelLinear, TERowParallelLinear, ReplicatedLinear)
    return Linears(QuickColumnParallelLinear, QuickRowParallelLinear, ReplicatedLinear)


# ------------------------------------------------------------------------- for those who multiply outside of the linear


def local_product(linear: Any, x: Tensor) -> Tensor:
    """x times this rank's part of the linear's weight, in the linear's precision, without communication."""
    fetch_weight(linear)
    return linear.product(x) if isinstance(linear, LocalLinear) else torch.nn.functional.linear(x, linear.weight)


def fetch_weight(linear: Any) -> None:
    """Megatron fetches weights that are on their way before a module's forward, which is passed by here."""
    for hook in linear._forward_pre_hooks.values():
        hook(linear, ())


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
