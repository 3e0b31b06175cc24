"""What the cpu backend's modules share. They call r1._cpu, C++ for tensors of float32 on a CPU (csrc/cpu); what that
does not compute, other types and exact numerics, the torch backend does."""

from __future__ import annotations

import torch
from torch import Tensor

from r1.kernels.exact import is_exact


def computes(*tensors: Tensor | None) -> bool:
    """Whether these floating tensors are what r1._cpu computes, and numerics are fast."""
    return not is_exact() and all(x is None or (x.dtype == torch.float32 and x.is_cpu) for x in tensors)


def address(x: Tensor | None) -> int:
    """Of the first element; 0, C++'s null, without a tensor."""
    return 0 if x is None else x.data_ptr()


def rows_of(x: Tensor) -> Tensor:
    """x (..., W) as (rows, W), each row contiguous; a view if x can be seen so."""
    x_RW = x.reshape(-1, x.shape[-1])
    return x_RW if x_RW.stride(1) == 1 or x_RW.shape[1] == 1 else x_RW.contiguous()


threads = torch.get_num_threads
