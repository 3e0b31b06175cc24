"""Products of block-scaled e4m3 in Triton, for Hopper: matrix units add up 128 products, float32 the rest.

The matrix units keep fewer bits of a long sum than float32 has, so that every 128 products (one block of the scales)
are scaled and added to a float32 sum of our own, as DeepSeek-V3 does (arXiv 2412.19437, section 3.3.2).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fp8_gemm_kernel(
    a, a_scales_ptr, a_row_stride, a_step_stride, b, b_scales_ptr, b_expert_stride, b_row_stride, b_step_stride,
    out_ptr, begins_ptr, ends_ptr, tile_ends_ptr, E, M, N, K,
    SQUARE: tl.constexpr, GROUPED: tl.constexpr, ACCUMULATE: tl.constexpr, E_2: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out (M, N) = a (M, K) @ b (N, K).T, or that added to what out holds; b's scales are of SQUARE blocks, or of 128
    in a row as a's are.

    GROUPED: b is (E, N, K), and begins, ends and tile_ends say which rows are an expert's, as in the moe family.
    """
    steps, column_tiles = tl.cdiv(K, BLOCK), tl.cdiv(N, BLOCK)
    program = tl.program_id(0)
    expert = 0
    if GROUPED:
        tile, column_tile = program // column_tiles, program % column_tiles
        every = tl.arange(0, E_2)
        tile_ends = tl.load(tile_ends_ptr + every, mask=every < E, other=2147483647)
        expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
        if expert >= E:
            return
        row = tl.load(begins_ptr + expert)
        end = tl.load(ends_ptr + expert)
        row += (tile - tl.load(tile_ends_ptr + expert - 1, mask=expert > 0, other=0)) * BLOCK
    else:
        # GROUP tiles of rows go down together: what they share of b is still in the second-level cache.
        row_tiles = tl.cdiv(M, BLOCK)
        first = program // (GROUP * column_tiles) * GROUP
        together = tl.minimum(row_tiles - first, GROUP)
        inside = program % (GROUP * column_tiles)
        row, column_tile, end = (first + inside % together) * BLOCK, inside // together, M
    column = column_tile * BLOCK
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    if SQUARE:
        # One scale for the whole tile, from an expert's table if there are some.
        b_scales_ptr += expert * b_expert_stride + column_tile * b_row_stride
    where = out_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    mask = (rows < end)[:, None] & (columns < N)[None, :]
    accumulator = tl.zeros((BLOCK, BLOCK), tl.float32)
    if ACCUMULATE:
        accumulator = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    for step in range(0, steps):
        a_tile = a.load([row, step * BLOCK])
        if GROUPED:
            b_tile = tl.reshape(b.load([expert, column, step * BLOCK]), (BLOCK, BLOCK))
        else:
            b_tile = b.load([column, step * BLOCK])
        scale = tl.load(a_scales_ptr + step * a_step_stride + rows * a_row_stride, mask=rows < end, other=0.0)
        b_scale_ptr = b_scales_ptr + step * b_step_stride
        if SQUARE:
            accumulator += tl.dot(a_tile, b_tile.T) * (scale * tl.load(b_scale_ptr))[:, None]
        else:
            b_scale = tl.load(b_scale_ptr + columns * b_row_stride, mask=columns < N, other=0.0)
            accumulator += tl.dot(a_tile, b_tile.T) * scale[:, None] * b_scale[None, :]
    tl.store(where, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def keep(tile, own):
    """The columns that are own; 0, whatever it held, in the others."""
    return tl.where(own[None, :], tile.to(tl.uint8, bitcast=True), 0).to(tl.float8e4nv, bitcast=True)


@triton.jit
def fp8_grouped_wgrad_kernel(
    a, a_scales_ptr, a_row_stride, a_step_stride, b, b_scales_ptr, b_row_stride, b_step_stride, out_ptr, begins_ptr,
    ends_ptr, N, K, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[e] (N, K) = a (N, rows of e) @ b (K, rows of e).T, or that added to what out holds; scales are of 128
    neighbours along P, wherever experts begin. Of a block that two experts share nothing of the other's enters."""
    row_tiles, column_tiles = tl.cdiv(N, BLOCK), tl.cdiv(K, BLOCK)
    expert = tl.program_id(0) // (row_tiles * column_tiles)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    row, column = tile // column_tiles * BLOCK, tile % column_tiles * BLOCK
    begin, end = tl.load(begins_ptr + expert), tl.load(ends_ptr + expert)
    rows, columns = row + tl.arange(0, BLOCK), column + tl.arange(0, BLOCK)
    a_scales, b_scales = a_scales_ptr + rows * a_row_stride, b_scales_ptr + columns * b_row_stride
    where = out_ptr + (expert.to(tl.int64) * N + rows[:, None]) * K + columns[None, :]
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    accumulator = tl.zeros((BLOCK, BLOCK), tl.float32)
    if ACCUMULATE:
        accumulator = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    first_whole, last_whole = (begin + BLOCK - 1) // BLOCK, end // BLOCK
    for step in range(first_whole, last_whole):
        a_scale = tl.load(a_scales + step * a_step_stride, mask=rows < N, other=0.0)
        b_scale = tl.load(b_scales + step * b_step_stride, mask=columns < K, other=0.0)
        product = tl.dot(a.load([row, step * BLOCK]), b.load([column, step * BLOCK]).T)
        accumulator += product * a_scale[:, None] * b_scale[None, :]
    for edge in range(0, 2):
        # The block in which the expert's rows begin, then the one in which they end, unless it is the same.
        shared = begin // BLOCK if edge == 0 else end // BLOCK
        there = (begin < end) & (begin % BLOCK != 0 if edge == 0 else end % BLOCK != 0)
        if edge == 1:
            there = there & ((begin % BLOCK == 0) | (begin // BLOCK != end // BLOCK))
        if there:
            token = shared * BLOCK + tl.arange(0, BLOCK)
            own = (token >= begin) & (token < end)
            a_tile = keep(a.load([row, shared * BLOCK]), own)
            b_tile = keep(b.load([column, shared * BLOCK]), own)
            edge_a_scale = tl.load(a_scales + shared * a_step_stride, mask=rows < N, other=0.0)
            edge_b_scale = tl.load(b_scales + shared * b_step_stride, mask=columns < K, other=0.0)
            accumulator += tl.dot(a_tile, b_tile.T) * edge_a_scale[:, None] * edge_b_scale[None, :]
    tl.store(where, accumulator.to(out_ptr.dtype.element_ty), mask=mask)
