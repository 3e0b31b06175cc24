"""Tokens to their experts and back in Triton: a stable counting sort on the device, and copies that read once.

The sort has three steps: every block of pairs counts its experts; sums over blocks, expert by expert, say where each
block's rows of an expert begin; every block puts its pairs there in order. A pair is token x K + k.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAIRS = 128  # of one program of the sort; their comparison with each other gives the order within the block


@triton.jit(do_not_specialize=["P"])
def count_kernel(ids_ptr, counts_ptr, P, E: tl.constexpr, BINS: tl.constexpr, PAIRS: tl.constexpr):
    """counts (blocks, E) int32"""
    block = tl.program_id(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    ids = tl.load(ids_ptr + pair, mask=pair < P, other=E).to(tl.int32)
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + block * E + bins, tl.histogram(ids, BINS), mask=bins < E)


@triton.jit(do_not_specialize=["P", "blocks"])
def place_kernel(ids_ptr, begin_ptr, row_map_ptr, position_ptr, P, blocks, PAIRS: tl.constexpr):
    """begin (E, blocks): where each block's rows of each expert begin."""
    block = tl.program_id(0)
    pair = block * PAIRS + tl.arange(0, PAIRS)
    mask = pair < P
    ids = tl.load(ids_ptr + pair, mask=mask, other=-1).to(tl.int32)
    other = block * PAIRS + tl.arange(0, PAIRS)
    other_ids = tl.load(ids_ptr + other, mask=other < P, other=-2).to(tl.int32)
    before = (other_ids[None, :] == ids[:, None]) & (other[None, :] < pair[:, None])
    rank = tl.sum(before.to(tl.int32), 1)
    position = tl.load(begin_ptr + ids.to(tl.int64) * blocks + block, mask=mask, other=0) + rank
    tl.store(row_map_ptr + position, pair.to(tl.int64), mask=mask)
    tl.store(position_ptr + pair, position.to(tl.int32), mask=mask)


@triton.jit(do_not_specialize=["P"])
def position_kernel(row_map_ptr, position_ptr, P, BLOCK: tl.constexpr):
    """The inverse of the row map."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(row_map_ptr + row, mask=row < P, other=0)
    tl.store(position_ptr + pair, row, mask=row < P)


@triton.jit
def permute_kernel(x_ptr, x_stride, position_ptr, out_ptr, H, K: tl.constexpr, BLOCK: tl.constexpr):
    """A token's row is read once and written to each of its places."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < H
    x = tl.load(x_ptr + token * x_stride + column, mask=mask)
    for k in tl.static_range(K):
        position = tl.load(position_ptr + token * K + k).to(tl.int64)
        tl.store(out_ptr + position * H + column, x, mask=mask)


@triton.jit
def unpermute_kernel(
    y_ptr, y_stride, position_ptr, weights_ptr, out_ptr, H, WEIGHTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr
):
    """A token's rows are added up in order of k, whatever the experts' order was. A position below 0 has no row."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        position = tl.load(position_ptr + token * K + k).to(tl.int64)
        width = tl.where(position >= 0, H, 0)
        y = tl.load(y_ptr + position * y_stride + column, mask=column < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + token * K + k).to(tl.float32)
        total += y
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=column < H)


@triton.jit
def unpermute_backward_kernel(
    grad_ptr, grad_stride, y_ptr, y_stride, row_map_ptr, weights_ptr, grad_y_ptr, grad_weights_ptr, H,
    WEIGHTED: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: its gradient is its token's, times its weight; the weight's is their product."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(row_map_ptr + row)
    token = pair // K
    total = tl.zeros((BLOCK,), tl.float32)
    if WEIGHTED:
        weight = tl.load(weights_ptr + pair).to(tl.float32)
    for first in range(0, H, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = column < H
        grad = tl.load(grad_ptr + token * grad_stride + column, mask=mask, other=0.0)
        if WEIGHTED:
            grad = grad.to(tl.float32)
            total += grad * tl.load(y_ptr + row * y_stride + column, mask=mask, other=0.0).to(tl.float32)
            grad *= weight
        tl.store(grad_y_ptr + row * H + column, grad.to(grad_y_ptr.dtype.element_ty), mask=mask)
    if WEIGHTED:
        tl.store(grad_weights_ptr + pair, tl.sum(total, 0).to(grad_weights_ptr.dtype.element_ty))
