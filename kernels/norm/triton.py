"""The norm family in Triton, for Hopper: RMSNorm with its rows in registers, and rotary embedding.

The rows that a program takes, and the order in which it adds up, are a matter of their width alone: a row's result has
the same bits in every batch. float64, and rows wider than LARGEST, are computed by the torch backend, and so are the
rotary tables: a few numbers a token, made once for all layers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.backend import wide
from r1.kernels.norm import reference
from r1.kernels.norm.reference import mscale, rope_tables

LARGEST = 16384
PIECE = 4096  # of a row that is too wide for the backward
# Partial sums of the weight's gradient: two programs for each of Hopper's 132 multiprocessors. A constant: the bits do
# not depend on the GPU.
PARTIALS = 264
ROPE_TILE = 4096  # elements of one program


def _tile(H: int, by_thread: int) -> dict[str, int]:
    """Whole rows of this width, and threads that hold about so many numbers of each tensor."""
    block = triton.next_power_of_2(H)
    rows = max(1, min(32, 4096 // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(4, rows * block // (32 * by_thread)))}


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x_ptr, x_stride, weight_ptr, out_ptr, scale_ptr, T, H, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows, columns = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    mask = (rows < T)[:, None] & (columns < H)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / H + eps)
    out = x * scale[:, None] * weight[None, :]
    tl.store(out_ptr + rows[:, None] * H + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < T)


@triton.jit
def along_kernel(
    grad_ptr, grad_stride, x_ptr, x_stride, weight_ptr, scale_ptr, along_ptr, H, BLOCK: tl.constexpr
):  # fmt: skip
    """How far a row's gradient points along the normalised row, in pieces of the row."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for column in range(0, H, BLOCK):
        columns = column + tl.arange(0, BLOCK)
        mask = columns < H
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + columns, mask=mask, other=0.0).to(tl.float32)
        total += grad * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32) * x
    tl.store(along_ptr + row, tl.sum(total, 0) * tl.load(scale_ptr + row) / H)


@triton.jit(do_not_specialize=["T", "tiles"])
def rms_norm_backward_kernel(
    grad_ptr, grad_stride, x_ptr, x_stride, weight_ptr, scale_ptr, along_ptr, grad_x_ptr, partial_ptr, T, H, tiles,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A program does that many tiles of rows that follow each other, and adds up the weight's gradient over them. The
    tiles hold WHOLE rows, or pieces of rows that along_kernel has seen."""
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < H
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        rows = (tl.program_id(0).to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        mask = (rows < T)[:, None] & inside[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows[:, None] * grad_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + rows, mask=rows < T, other=0.0)[:, None]
        x *= scale
        total += grad * x
        grad *= weight[None, :]
        if WHOLE:
            along = tl.sum(grad * x, 1) / H
        else:
            along = tl.load(along_ptr + rows, mask=rows < T, other=0.0)
        out = ((grad - x * along[:, None]) * scale).to(grad_x_ptr.dtype.element_ty)
        tl.store(grad_x_ptr + rows[:, None] * H + columns[None, :], out, mask=mask)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * H + columns, tl.sum(total, 0), mask=inside)


@triton.jit(do_not_specialize=["count"])
def add_partials_kernel(
    partial_ptr, out_ptr, count, H, STEPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.static_range(STEPS):  # all loads at once
        row = step * ROWS + rows[:, None]
        mask = (row < count) & (columns < H)[None, :]
        total += tl.load(partial_ptr + row * H + columns[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=columns < H)


@triton.jit(do_not_specialize=["T"])
def rope_kernel(
    x_ptr, token_stride, head_stride, cos_ptr, cos_stride, sin_ptr, sin_stride, out_ptr, T, N, HALF,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF_2: tl.constexpr,
):  # fmt: skip
    """A tile of tokens x heads, whole heads: what is read is dense however the pairs lie."""
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, HALF_2)
    mask = (tokens < T)[:, None] & (pairs < HALF)[None, :]
    cos = tl.load(cos_ptr + tokens[:, None] * cos_stride + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + tokens[:, None] * sin_stride + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    cos, sin = cos[:, None, :], sin[:, None, :]
    there = (tokens < T)[:, None, None] & (heads < N)[None, :, None]
    source = x_ptr + tokens[:, None, None] * token_stride + heads[None, :, None] * head_stride
    target = out_ptr + (tokens[:, None, None] * N + heads[None, :, None]) * (2 * HALF)
    kind = out_ptr.dtype.element_ty
    if INTERLEAVED:
        columns = tl.arange(0, 2 * HALF_2)[None, None, :]
        mask = there & (columns < 2 * HALF)
        x = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (TOKENS, HEADS, HALF_2, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        tl.store(target + columns, tl.reshape(turned, (TOKENS, HEADS, 2 * HALF_2)).to(kind), mask=mask)
    else:
        columns = pairs[None, None, :]
        mask = there & (columns < HALF)
        first = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(source + HALF + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(target + columns, (first * cos - second * sin).to(kind), mask=mask)
        tl.store(target + HALF + columns, (second * cos + first * sin).to(kind), mask=mask)


def _rows_of(x: Tensor) -> Tensor:
    """(rows, H). How rows lie in memory says how a load is spread over threads, and that says in which order they are
    added up: rows are copied whose order would not be that of dense ones."""
    x = x.reshape(-1, x.shape[-1])
    H, stride = x.shape[1], x.stride(0)
    as_dense = stride == H if H % 16 else not (stride % 16 or x.data_ptr() % 16)
    return x if x.stride(1) == 1 and as_dense else x.clone(memory_format=torch.contiguous_format)


def _left_to_torch(x: Tensor) -> bool:
    return wide(x) == torch.float64 or x.numel() == 0 or x.shape[-1] > LARGEST


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if _left_to_torch(x):
        return reference.rms_norm(x, weight_H, eps)
    x_TH = _rows_of(x)
    (T, H), tile = x_TH.shape, _tile(x.shape[-1], by_thread=32)
    out, scale = x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    rms_norm_kernel[(triton.cdiv(T, tile["ROWS"]),)](
        x_TH, x_TH.stride(0), weight_H.contiguous(), out, scale, T, H, eps, **tile
    )
    return out, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight_H: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """As in reference.py. The weight's gradient is added up in two steps, each in a fixed order."""
    if _left_to_torch(x):
        return reference.rms_norm_backward(grad, x, weight_H, scale)
    grad_TH, x_TH, weight, scale = _rows_of(grad), _rows_of(x), weight_H.contiguous(), scale.contiguous()
    (T, H), tile = x_TH.shape, _tile(x.shape[-1], by_thread=16)
    grad_x, grad_weight = x.new_empty(x.shape), torch.empty_like(weight)
    along = scale
    # Numbers that are loaded one by one take more registers.
    whole = tile["BLOCK"] <= (PIECE if H % 16 else 2 * PIECE)
    if not whole:
        tile = {"ROWS": 1, "BLOCK": PIECE, "num_warps": 8}
        along = torch.empty_like(scale)
        along_kernel[(T,)](
            grad_TH, grad_TH.stride(0), x_TH, x_TH.stride(0), weight, scale, along, H, BLOCK=PIECE, num_warps=8
        )
    row_tiles = triton.cdiv(T, tile["ROWS"])
    tiles = triton.cdiv(row_tiles, PARTIALS)
    programs = triton.cdiv(row_tiles, tiles)
    partial = x.new_empty((programs, H), dtype=torch.float32)
    rms_norm_backward_kernel[(programs, triton.cdiv(H, tile["BLOCK"]))](
        grad_TH, grad_TH.stride(0), x_TH, x_TH.stride(0), weight, scale, along, grad_x, partial, T, H, tiles,
        WHOLE=whole, STAGES=3, **tile,
    )  # fmt: skip
    add_partials_kernel[(triton.cdiv(H, 64),)](
        partial, grad_weight, programs, H, STEPS=triton.cdiv(programs, 64), ROWS=64, COLUMNS=64, num_warps=8
    )
    return grad_x, grad_weight


def apply_rope(x_TND: Tensor, cos_TD: Tensor, sin_TD: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    if wide(x_TND) == torch.float64:
        return reference.apply_rope(x_TND, cos_TD, sin_TD, interleaved, inverse)
    out = x_TND.new_empty(x_TND.shape)
    if out.numel():
        x, cos, sin = (y if y.stride(-1) == 1 else y.contiguous() for y in (x_TND, cos_TD, sin_TD))
        T, N, D = x.shape
        width = triton.next_power_of_2(D)
        heads = min(triton.next_power_of_2(N), max(1, ROPE_TILE // width))
        tokens = max(1, ROPE_TILE // (heads * width))
        rope_kernel[(triton.cdiv(T, tokens), triton.cdiv(N, heads))](
            x, x.stride(0), x.stride(1), cos, cos.stride(0), sin, sin.stride(0), out, T, N, D // 2,
            INTERLEAVED=interleaved, INVERSE=inverse, TOKENS=tokens, HEADS=heads, HALF_2=width // 2,
        )  # fmt: skip
    return out


__all__ = ["apply_rope", "mscale", "rms_norm", "rms_norm_backward", "rope_tables"]
