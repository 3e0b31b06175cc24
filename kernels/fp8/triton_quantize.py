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
def put(
    x, row, column, M, K, q_ptr, q_stride, scales_ptr, across_ptr, across_stride, across_scales_ptr,
    POWER_OF_TWO: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores x, the tile of (M, K) that begins at row and column and is 128 wide: one scale for each of its rows.
    ACROSS, it is 128 high: the transposed copy (K, M) too, one scale for a column. Scales lie block by block.

    Where something goes is told within the tile, in 32 bits: 64 would take registers that there are not."""
    i, j = tl.arange(0, x.shape[0]), tl.arange(0, BLOCK)
    in_rows, in_columns = i < (M - row).to(tl.int32), j < (K - column).to(tl.int32)
    mask = in_rows[:, None] & in_columns[None, :]
    size = magnitude(x)
    scale = scale_of(tl.max(size, 1), POWER_OF_TWO)
    q = to_e4m3(x, scale[:, None])
    tl.store(q_ptr + row * q_stride + column + (i[:, None] * q_stride + j[None, :]), q, mask=mask)
    tl.store(scales_ptr + column // BLOCK * M + row + i, scale, mask=in_rows)
    if ACROSS:
        scale = scale_of(tl.max(size, 0), POWER_OF_TWO)
        q = tl.trans(to_e4m3(x, scale[None, :]))
        where = across_ptr + column * across_stride + row + (j[:, None] * across_stride + i[None, :])
        tl.store(where, q, mask=tl.trans(mask))
        tl.store(across_scales_ptr + row // BLOCK * K + column + j, scale, mask=in_columns)


@triton.jit
def quantize_kernel(
    x_ptr, row_stride, column_stride, row_factor_ptr, column_factor_ptr, q_ptr, q_stride, scales_ptr, across_ptr,
    across_stride, across_scales_ptr, M, K,
    SWIGLU: tl.constexpr, ROW_FACTOR: tl.constexpr, COLUMN_FACTOR: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    ACROSS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, or SWIGLU silu(gate) * up of x (M, 2 K) = [gate | up], times a number a row, times a number a column."""
    row, column = tl.program_id(0).to(tl.int64) * ROWS, tl.program_id(1).to(tl.int64) * BLOCK
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, BLOCK)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    where = x_ptr + rows[:, None] * row_stride + columns[None, :] * column_stride
    x = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    if SWIGLU:
        beside = x_ptr + rows[:, None] * row_stride + (columns + K)[None, :] * column_stride
        up = tl.load(beside, mask=mask, other=0.0).to(tl.float32)
        x = x / (1.0 + tl.exp(-x)) * up
    if ROW_FACTOR:
        x *= tl.load(row_factor_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    if COLUMN_FACTOR:
        x *= tl.load(column_factor_ptr + columns, mask=columns < K, other=0.0).to(tl.float32)[None, :]
    put(
        x, row, column, M, K, q_ptr, q_stride, scales_ptr, across_ptr, across_stride, across_scales_ptr, POWER_OF_TWO,
        ACROSS, BLOCK,
    )  # fmt: skip


@triton.jit
def swiglu_backward_quantize_kernel(
    grad_ptr, grad_row_stride, grad_column_stride, x_ptr, row_stride, column_stride, weights_ptr, q_ptr, q_stride,
    scales_ptr, across_ptr, across_stride, across_scales_ptr, sums_ptr, M, F,
    WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient to the gate or to the up of x (M, 2 F) = [gate | up], and of the weights' gradient what
    128 columns give. F is a multiple of 128.

    Two programs that start one after the other read the same tiles, the second from a cache: one alone would want more
    registers than there are.
    """
    half, row, column = tl.program_id(0), tl.program_id(1).to(tl.int64) * BLOCK, tl.program_id(2).to(tl.int64) * BLOCK
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    in_rows = i < (M - row).to(tl.int32)
    mask = in_rows[:, None]
    up_ptr = x_ptr + row * row_stride + (column + F) * column_stride
    x_ptr += row * row_stride + column * column_stride
    grad_ptr += row * grad_row_stride + column * grad_column_stride
    where = i[:, None] * row_stride + j[None, :] * column_stride
    grad_where = i[:, None] * grad_row_stride + j[None, :] * grad_column_stride
    gate = tl.load(x_ptr + where, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + grad_where, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    if half == 0:
        grad *= tl.load(up_ptr + where, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            part = tl.sum(grad * (gate * sigmoid), 1)
            tl.store(sums_ptr + tl.program_id(2).to(tl.int64) * M + row + i, part, mask=in_rows)
        x = grad * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    else:
        x = grad * (gate * sigmoid)
    if WEIGHTED:
        x *= tl.load(weights_ptr + row + i, mask=in_rows, other=0.0).to(tl.float32)[:, None]
    put(
        x, row, column + half * F, M, 2 * F, q_ptr, q_stride, scales_ptr, across_ptr, across_stride,
        across_scales_ptr, POWER_OF_TWO, True, BLOCK,
    )  # fmt: skip


@triton.jit
def inverse_rms_kernel(x_ptr, row_stride, column_stride, out_ptr, H, eps, COLUMNS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of one row."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for column in range(0, H, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row * row_stride + columns * column_stride, mask=columns < H, other=0.0).to(tl.float32)
        squares += x * x
    tl.store(out_ptr + row, tl.rsqrt(tl.sum(squares, 0) / H + eps))


@triton.jit
def quantize_square_kernel(
    x_ptr, matrix_stride, row_stride, column_stride, q_ptr, q_stride, scales_ptr, across_ptr, across_stride, N, K,
    POWER_OF_TWO: tl.constexpr, ACROSS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A 128 x 128 tile of a matrix (N, K) among several, with one scale; ACROSS: the same values transposed too."""
    matrix = tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(0).to(tl.int64) * BLOCK, tl.program_id(1).to(tl.int64) * BLOCK
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    where = x_ptr + matrix * matrix_stride + rows[:, None] * row_stride + columns[None, :] * column_stride
    x = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(magnitude(x), 1), 0, keep_dims=True), POWER_OF_TWO)
    q = to_e4m3(x, scale[:, None])
    tl.store(q_ptr + (matrix * N + rows)[:, None] * q_stride + columns[None, :], q, mask=mask)
    place = (matrix * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scales_ptr + place + tl.arange(0, 1), scale)
    if ACROSS:
        across_where = across_ptr + (matrix * K + columns)[:, None] * across_stride + rows[None, :]
        tl.store(across_where, tl.trans(q), mask=tl.trans(mask))
