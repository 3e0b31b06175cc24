"""Descriptors for Hopper's bulk tensor copies, as Triton takes them."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """For copies of tiles of `block` elements of x; what lies outside x reads as 0.

    The hardware wants the last axis dense and the others' steps in positive multiples of 16 bytes: else x is copied.
    """
    size = x.element_size()
    if x.stride(-1) != 1 or any(s * size % 16 or not s for s in x.stride()[:-1]) or x.data_ptr() % 16:
        unit = 16 // size
        width = -(-x.shape[-1] // unit) * unit
        x = x.new_empty(*x.shape[:-1], width)[..., : x.shape[-1]].copy_(x)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
