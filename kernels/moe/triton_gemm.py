"""Grouped products in Triton, for Hopper: any group sizes, known to the device alone, without padding.

A grid that is large enough for every possible split of the rows is launched; a program finds its expert and tile from
the running sums that `plan_kernel` leaves, and those beyond the last tile end at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["P", "room"])
def plan_kernel(
    counts_ptr, begins_ptr, ends_ptr, tile_ends_ptr, E, P, room,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, E_2: tl.constexpr,
):  # fmt: skip
    """Where each expert's rows begin and end, and a running sum of its tiles of BLOCK_M rows. Rows follow one another
    and are never beyond the P that there are; MASKED, each expert has `room` for its own."""
    e = tl.arange(0, E_2)
    counts = tl.maximum(tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int32), 0)
    if MASKED:
        begins = e * room
        ends = begins + tl.minimum(counts, room)
    else:
        sums = tl.cumsum(counts, 0)
        begins, ends = tl.minimum(sums - counts, P), tl.minimum(sums, P)
    tl.store(begins_ptr + e, begins, mask=e < E)
    tl.store(ends_ptr + e, ends, mask=e < E)
    tl.store(tile_ends_ptr + e, tl.cumsum((ends - begins + BLOCK_M - 1) // BLOCK_M, 0), mask=e < E)


@triton.jit
def grouped_gemm_kernel(
    x, weight, out_ptr, out_stride, begins_ptr, ends_ptr, tile_ends_ptr, E, N, K,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, E_2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out rows of expert e = x rows @ weight[e]; weight is (E, K, N), or TRANSPOSED (E, N, K)."""
    column_tiles = tl.cdiv(N, BLOCK_N)
    tile, column = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles * BLOCK_N
    every = tl.arange(0, E_2)
    tile_ends = tl.load(tile_ends_ptr + every, mask=every < E, other=2147483647)
    expert = tl.sum((tile_ends <= tile).to(tl.int32), 0)
    if expert < E:
        first_tile = tl.load(tile_ends_ptr + expert - 1, mask=expert > 0, other=0)
        begin = tl.load(begins_ptr + expert)
        end = tl.load(ends_ptr + expert)
        row = begin + (tile - first_tile) * BLOCK_M
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            # A tile's last rows may be the next expert's: they are computed and not stored.
            x_tile = x.load([row, k])
            if TRANSPOSED:
                weight_tile = tl.reshape(weight.load([expert, column, k]), (BLOCK_N, BLOCK_K)).T
            else:
                weight_tile = tl.reshape(weight.load([expert, k, column]), (BLOCK_K, BLOCK_N))
            accumulator = tl.dot(x_tile, weight_tile, accumulator, input_precision=PRECISION)
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        where = out_ptr + rows[:, None].to(tl.int64) * out_stride + columns[None, :]
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        tl.store(where, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def grouped_wgrad_kernel(
    x, grad, x_ptr, x_stride, grad_ptr, grad_stride, out_ptr, begins_ptr, ends_ptr, M, N,
    ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[e] (M, N) = x rows.T @ grad rows of expert e, or that added to what out holds."""
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (row_tiles * column_tiles)
    tile = tl.program_id(0) % (row_tiles * column_tiles)
    row, column = tile // column_tiles * BLOCK_M, tile % column_tiles * BLOCK_N
    begin = tl.load(begins_ptr + expert)
    end = tl.load(ends_ptr + expert)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    where = out_ptr + (expert.to(tl.int64) * M + rows[:, None]) * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    if ACCUMULATE:
        accumulator = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    else:
        accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    whole = begin + (end - begin) // BLOCK_K * BLOCK_K
    for k in range(begin, whole, BLOCK_K):
        accumulator = tl.dot(x.load([k, row]).T, grad.load([k, column]), accumulator, input_precision=PRECISION)
    if whole < end:
        # The rows that fill no block: the next expert's must not be read with them.
        rest = whole + tl.arange(0, BLOCK_K)
        wide = rest[:, None].to(tl.int64)
        x_mask, grad_mask = (rest < end)[:, None] & (rows < M)[None, :], (rest < end)[:, None] & (columns < N)[None, :]
        x_tile = tl.load(x_ptr + wide * x_stride + rows[None, :], mask=x_mask, other=0.0)
        grad_tile = tl.load(grad_ptr + wide * grad_stride + columns[None, :], mask=grad_mask, other=0.0)
        accumulator = tl.dot(x_tile.T, grad_tile, accumulator, input_precision=PRECISION)
    tl.store(where, accumulator.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_kernel(
    gate_up_ptr, stride, weights_ptr, out_ptr, counts_ptr, room, F,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """MASKED, an expert's rows beyond its count are left alone; each has `room` for its own."""
    row = tl.program_id(0).to(tl.int64)
    if MASKED:
        if row % room >= tl.load(counts_ptr + row // room):
            return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    gate = tl.load(gate_up_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + F + column, mask=mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    if WEIGHTED:
        out *= tl.load(weights_ptr + row).to(tl.float32)
    tl.store(out_ptr + row * F + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(
    grad_ptr, grad_stride, gate_up_ptr, stride, weights_ptr, grad_gate_up_ptr, grad_weights_ptr, again_ptr, F,
    WEIGHTED: tl.constexpr, AGAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With AGAIN the forward's result is written too, from the same read."""
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights_ptr + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, F, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < F
        gate = tl.load(gate_up_ptr + row * stride + column, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + row * stride + F + column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        activation = gate * sigmoid
        total += grad * activation * up
        if AGAIN:
            again = activation * up * weight
            tl.store(again_ptr + row * F + column, again.to(again_ptr.dtype.element_ty), mask=mask)
        grad *= weight
        grad_gate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        kind = grad_gate_up_ptr.dtype.element_ty
        tl.store(grad_gate_up_ptr + row * 2 * F + column, grad_gate.to(kind), mask=mask)
        tl.store(grad_gate_up_ptr + row * 2 * F + F + column, (grad * activation).to(kind), mask=mask)
    if WEIGHTED:
        tl.store(grad_weights_ptr + row, tl.sum(total, 0).to(grad_weights_ptr.dtype.element_ty))
