"""The optim family in Triton: one launch for all tensors of the same types, however many they are.

A table on the device has a row for each tensor: its number in the lists, its size, the number of its first chunk, and
the addresses of its numbers. A program does one chunk of one tensor, which it finds in the table. float64 is computed
by the torch backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.optim import reference

KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ADAMW_CHUNK, NORM_CHUNK, ROOT_BLOCK = 2048, 8192, 16384
HEAD = tl.constexpr(3)  # columns of the table before the addresses


@triton.jit
def find(table_ptr, tensors, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """(the table's row, where in the tensor it begins, the tensor's size) of this program's chunk."""
    chunk = tl.program_id(0)
    low, high = chunk * 0, tensors
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table_ptr + middle * COLUMNS + 2) <= chunk
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    row_ptr = table_ptr + low * COLUMNS
    size = tl.load(row_ptr + 1)
    if ALIGNED:
        size = tl.multiple_of(size, 16)
    return row_ptr, (chunk - tl.load(row_ptr + 2)) * CHUNK, size


@triton.jit
def address(row_ptr, which: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row_ptr + HEAD + which).to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def random_16_bits(seed, step, number, first, COUNT: tl.constexpr):
    """For COUNT elements of tensor `number` from `first` on, which is a multiple of 4: a call of Philox makes four."""
    call = first // 4 + tl.arange(0, COUNT // 4)
    nothing = tl.zeros((COUNT // 4,), tl.uint32)
    a, b, c, d = tl.philox(
        seed, call.to(tl.uint32), (call >> 32).to(tl.uint32), nothing + number.to(tl.uint32),
        nothing + step.to(tl.uint32), 7,
    )  # fmt: skip
    bits = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (COUNT,))
    return (bits & 0xFFFF).to(tl.int32)


@triton.jit
def rounded_stochastically(x, noise):
    """As in reference.py."""
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, ((bits + noise) & -65536).to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit(do_not_specialize=["tensors", "step", "seed"])
def adamw_kernel(
    table_ptr, tensors, step, seed, grad_scale, decay, new_1, beta_2, new_2, root_of_correction, eps, rate,
    PARAM: tl.constexpr, GRAD: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row_ptr, first, size = find(table_ptr, tensors, COLUMNS, CHUNK, ALIGNED)
    where = first + tl.arange(0, CHUNK)
    mask = where < size
    param_ptr = address(row_ptr, 0, PARAM, ALIGNED) + where
    grad_ptr = address(row_ptr, 1, GRAD, ALIGNED) + where
    m_ptr = address(row_ptr, 2, FIRST, ALIGNED) + where
    v_ptr = address(row_ptr, 3, SECOND, ALIGNED) + where
    weight_ptr = param_ptr
    if MASTER is not None:
        weight_ptr = address(row_ptr, 4, MASTER, ALIGNED) + where
    grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(m_ptr, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr, mask=mask, other=0.0).to(tl.float32)
    m += new_1 * (grad - m)
    v = v * beta_2 + new_2 * grad * grad
    weight = weight * decay + rate * (m / (tl.sqrt(v) / root_of_correction + eps))
    tl.store(m_ptr, m.to(FIRST), mask=mask)
    tl.store(v_ptr, v.to(SECOND), mask=mask)
    if MASTER is not None:
        tl.store(weight_ptr, weight.to(MASTER), mask=mask)
    if STOCHASTIC and PARAM == tl.bfloat16:
        noise = random_16_bits(seed, step, tl.load(row_ptr), first, CHUNK)
        tl.store(param_ptr, rounded_stochastically(weight, noise), mask=mask)
    else:
        tl.store(param_ptr, weight.to(PARAM), mask=mask)


@triton.jit(do_not_specialize=["tensors", "begin"])
def square_sum_kernel(
    table_ptr, tensors, sums_ptr, begin, KIND: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    row_ptr, first, size = find(table_ptr, tensors, COLUMNS, CHUNK, ALIGNED)
    where = first + tl.arange(0, CHUNK)
    x = tl.load(address(row_ptr, 0, KIND, ALIGNED) + where, mask=where < size, other=0.0).to(tl.float32)
    tl.store(sums_ptr + begin + tl.program_id(0), tl.sum(x * x, 0))


@triton.jit(do_not_specialize=["count"])
def root_kernel(sums_ptr, out_ptr, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        where = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + where, mask=where < count, other=0.0)
    tl.store(out_ptr, tl.sqrt_rn(tl.sum(total, 0)))


class Group(NamedTuple):
    """Tensors that one launch does."""

    table: Tensor
    kinds: list[Any]
    chunks: int
    aligned: bool

    @property
    def constants(self) -> dict[str, Any]:
        return {"ALIGNED": self.aligned, "COLUMNS": self.table.shape[1], "num_warps": 8}


def _groups(lists: list[list[Tensor]], chunk: int) -> Iterator[Group]:
    """By their types, and by whether 16 bytes can be moved at once everywhere. Written for a host that the GPU waits
    for: a few numbers of each tensor, and the rest for all at once."""
    sizes = torch.tensor([x.numel() for x in lists[0]], device="cpu")
    addresses = torch.tensor([[x.data_ptr() for x in tensors] for tensors in lists], device="cpu")
    aligned = ((addresses % 16 == 0).all(0) & (sizes % 16 == 0)).tolist()
    kinds = list(zip(aligned, *([x.dtype for x in tensors] for tensors in lists)))
    device = lists[0][0].device
    for kind in dict.fromkeys(kinds):
        numbers = torch.tensor([i for i, other in enumerate(kinds) if other == kind], device="cpu")
        chunks = (sizes[numbers] + chunk - 1) // chunk
        ends = chunks.cumsum(0)
        if total := int(ends[-1]):
            table = torch.stack([numbers, sizes[numbers], ends - chunks, *addresses[:, numbers]], 1)
            if device.type == "cuda":  # from memory that is not pinned the copy would wait for the GPU
                table = table.pin_memory().to(device, non_blocking=True)
            yield Group(table, [KINDS[dtype] for dtype in kind[1:]], total, kind[0])


def _left_to_torch(*lists: list[Tensor]) -> bool:
    device = lists[0][0].device
    return not {x.dtype for tensors in lists for x in tensors} <= KINDS.keys() or any(
        x.device != device for x in lists[0]
    )


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    masters: list[Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
    stochastic_rounding: bool,
    seed: int,
) -> None:
    """As in reference.py but for the noise of stochastic rounding, which is another: Philox of seed, step, and an
    element's place in the lists."""
    lists = [params, grads, exp_avgs, exp_avg_sqs] + ([masters] if masters else [])
    if not params or _left_to_torch(*lists):
        reference.adamw_step(
            params, grads, exp_avgs, exp_avg_sqs, masters, step, lr, beta1, beta2, eps, weight_decay, grad_scale,
            stochastic_rounding, seed,
        )  # fmt: skip
        return
    dense = [[x.contiguous() for x in tensors] for tensors in lists]
    for group in _groups(dense, ADAMW_CHUNK):
        param, grad, first, second, *master = group.kinds
        adamw_kernel[(group.chunks,)](
            group.table, len(group.table), step, seed, grad_scale, 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2,
            math.sqrt(1 - beta2**step), eps, -lr / (1 - beta1**step), PARAM=param, GRAD=grad, FIRST=first,
            SECOND=second, MASTER=master[0] if master else None, STOCHASTIC=stochastic_rounding, CHUNK=ADAMW_CHUNK,
            **group.constants,
        )  # fmt: skip
    for which, tensors in enumerate(lists):
        for copy, x in zip(dense[which], tensors):
            if copy is not x and which != 1:  # gradients are only read
                x.copy_(copy)


def grad_norm(grads: list[Tensor]) -> Tensor:
    """As in reference.py: a sum a chunk, then one of these, each in a fixed order."""
    if not grads or _left_to_torch(grads):
        return reference.grad_norm(grads)
    dense = [x.contiguous() for x in grads]
    groups = list(_groups([dense], NORM_CHUNK))
    count = sum(group.chunks for group in groups)
    sums = torch.empty(count, dtype=torch.float32, device=grads[0].device)
    begin = 0
    for group in groups:
        square_sum_kernel[(group.chunks,)](
            group.table, len(group.table), sums, begin, KIND=group.kinds[0], CHUNK=NORM_CHUNK, **group.constants
        )
        begin += group.chunks
    out = sums.new_empty(())
    root_kernel[(1,)](sums, out, count, BLOCK=ROOT_BLOCK, num_warps=32)
    return out


__all__ = ["adamw_step", "grad_norm"]
