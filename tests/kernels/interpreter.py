"""Makes Triton's interpreter compute with bfloat16 and float8 as a GPU does.

Unpatched it keeps both as raw integers and adds, compares and multiplies those, and it rounds towards zero. Importing
this module mends it. TRITON_INTERPRET=1 must be set before the kernels are imported: tests/conftest.py does so where
there is no GPU. Numerics only: whether a kernel compiles for a GPU is what ahead_of_time.py tells, in its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle

NARROW = {
    tl.bfloat16: (torch.bfloat16, torch.int16, numpy.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, numpy.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.uint8, numpy.uint8),
}
NATIVE = {tl.float16: torch.float16, tl.float32: torch.float32, tl.float64: torch.float64}


def _widen(data: numpy.ndarray, dtype: Any) -> numpy.ndarray:
    """The values as float32, if they are kept as raw bits."""
    if dtype not in NARROW:
        return data
    kind, bits, _ = NARROW[dtype]
    raw = torch.from_numpy(numpy.ascontiguousarray(data).view(numpy.int16 if bits is torch.int16 else numpy.uint8))
    return raw.view(kind).float().numpy().reshape(data.shape)


def _narrow(data: numpy.ndarray, dtype: Any) -> numpy.ndarray:
    """Raw bits of the values rounded to nearest even, and for float8 saturated, as the hardware's conversions do."""
    if dtype not in NARROW:
        return data
    kind, bits, storage = NARROW[dtype]
    values = torch.from_numpy(numpy.ascontiguousarray(data))
    if kind is not torch.bfloat16:
        values = values.clamp(-torch.finfo(kind).max, torch.finfo(kind).max)
    return values.to(kind).view(bits).numpy().view(storage).reshape(data.shape)


def _convert_float(data: numpy.ndarray, source: Any, target: Any, rounding: Any) -> numpy.ndarray:
    wide = _widen(data, source)
    if target in NARROW:
        return _narrow(wide.astype(numpy.float32), target)
    return torch.from_numpy(numpy.ascontiguousarray(wide)).to(NATIVE[target]).numpy()


def _in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """A builder's method on handles, computed in float32 where an operand is narrow, and rounded back once."""

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        handles = [x for x in arguments if isinstance(x, TensorHandle) and x.dtype.scalar in NARROW]
        if not handles:
            return method(self, *arguments, **options)
        kind = handles[0].dtype.scalar
        widened = [
            TensorHandle(_widen(x.data, x.dtype.scalar), tl.float32)
            if isinstance(x, TensorHandle) and x.dtype.scalar in NARROW
            else x
            for x in arguments
        ]
        result = method(self, *widened, **options)
        if result.dtype.scalar == tl.float32 and result.data.dtype == numpy.float32:
            return TensorHandle(_narrow(result.data, kind), kind)
        return result

    return run


def _dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
    """Added up in the same order for every element, as matrix units do; a BLAS treats rows at an edge otherwise."""
    wide_a = _widen(a.data, a.dtype.scalar).astype(numpy.float32)
    wide_b = _widen(b.data, b.dtype.scalar).astype(numpy.float32)
    total = d.data.astype(numpy.float32)
    for k in range(wide_a.shape[-1]):
        total = total + wide_a[..., :, k, None] * wide_b[..., None, k, :]
    return TensorHandle(total.astype(d.data.dtype), d.dtype.scalar)


def _reduced(method: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, value: Any, *arguments: Any, **options: Any) -> Any:
        kind = value.dtype.scalar
        if kind not in NARROW:
            return method(self, value, *arguments, **options)
        wide = self.to_tensor(_widen(value.handle.data, kind), tl.float32)
        result = method(self, wide, *arguments, **options)
        return self.to_tensor(_narrow(numpy.asarray(result.handle.data, dtype=numpy.float32), kind), kind)

    return run


def mend() -> None:
    if getattr(InterpreterBuilder, "mended", False):
        return
    InterpreterBuilder.mended = True
    interpreter._convert_float = _convert_float
    InterpreterBuilder.create_dot = _dot
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(InterpreterBuilder, name, _in_float32(getattr(InterpreterBuilder, name)))
    for name in ("sum", "min_max"):
        setattr(ReduceOps, name, _reduced(getattr(ReduceOps, name)))


mend()
