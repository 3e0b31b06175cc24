"""Quantisers in Triton: e4m3 values and their scales from one read of the source."""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(448.0)  # of e4m3
SMALLEST_SCALE = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
LARGEST_SCALE = tl.constexpr(3.4028234663852886e38)


@triton.jit
def magnitude(x):
    """|x|, 0 for NaN: it does not touch the rest of its block."""
    return tl.where(x != x, 0.0, tl.abs(x))


@triton.jit
def scale_of(amax, POWER_OF_TWO: tl.constexpr):
    """As reference.scales_of, bit for bit: hence the division that rounds correctly."""
    scale = tl.math.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    scale = tl.minimum(tl.maximum(scale, SMALLEST_SCALE), LARGEST_SCALE)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
        scale = (tl.minimum(exponent, 254) << 23).to(tl.float32, bitcast=True)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def to_e4m3(x, scale):
    """The conversion saturates, infinities too, and keeps NaN."""
    return tl.math.div_rn(x, tl.broadcast_to(scale, x.shape)).to(tl.float8e4nv)


@triton.jit
def quantize_kernel(
    x_ptr, row_stride, column_stride, weights_ptr, q_ptr, q_stride, scales_ptr, across_ptr, across_stride,
    across_scales_ptr, M, K,
    SWIGLU: tl.constexpr, WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr, SQUARE: tl.constexpr,
    ACROSS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x 128, with one scale for each of its rows, or SQUARE one for all of it; ACROSS: the transposed
    copy (K, M) too, with one scale for a column of the tile. But for SQUARE, scales lie block by block.

    SWIGLU: what is quantised is silu(gate) * up of x (M, 2 K) = [gate | up], WEIGHTED times a number a row."""
    row, column = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64) * BLOCK
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, BLOCK)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    where = x_ptr + rows[:, None] * row_stride + columns[None, :] * column_stride
    x = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    if SWIGLU:
        beside = x_ptr + rows[:, None] * row_stride + (columns + K)[None, :] * column_stride
        up = tl.load(beside, mask=mask, other=0.0).to(tl.float32)
        x = x / (1.0 + tl.exp(-x)) * up
        if WEIGHTED:
            x *= tl.load(weights_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    size = magnitude(x)
    amax = tl.max(size, 1)
    if SQUARE:
        amax = tl.broadcast_to(tl.max(amax, 0, keep_dims=True), (ROWS,))
    scale = scale_of(amax, POWER_OF_TWO)
    tl.store(q_ptr + rows[:, None] * q_stride + columns[None, :], to_e4m3(x, scale[:, None]), mask=mask)
    if SQUARE:
        place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1) + tl.arange(0, ROWS)
        tl.store(scales_ptr + place, scale, mask=tl.arange(0, ROWS) == 0)
    else:
        tl.store(scales_ptr + tl.program_id(1).to(tl.int64) * M + rows, scale, mask=rows < M)
    if ACROSS:
        scale = scale_of(tl.max(size, 0), POWER_OF_TWO)
        across = tl.trans(to_e4m3(x, scale[None, :]))
        tl.store(across_ptr + columns[:, None] * across_stride + rows[None, :], across, mask=tl.trans(mask))
        tl.store(across_scales_ptr + tl.program_id(0).to(tl.int64) * K + columns, scale, mask=columns < K)
