"""Packed causal attention in Triton, for Hopper: forward, and a backward without atomics.

A program owns a tile of queries (or, for dk and dv, of keys) of one sequence and one head, and walks over what it sees
in blocks that count from the sequence's first key: a row's sums run in the same order whatever else is in the batch.
Blocks that every row of the tile sees whole need no mask. Those at the diagonal and at a sequence's ragged end do, and
what is the next sequence's is zeroed after the load, so that no NaN of its reaches a sum. A head is one tile of a
power-of-two width and, for 192 = 128 + 64, a second one, the tail: the rope part of the key, which heads may share.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["sequences", "tiles"])
def plan_kernel(
    bounds_ptr, row_ptr, sequence_ptr, sequences, tiles,
    BLOCK: tl.constexpr, TILES: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """First row and sequence of every tile of BLOCK rows; row -1 where there are fewer tiles."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    sequence = tl.zeros((TILES,), tl.int32)  # those whose tiles all come before
    first = tl.zeros((TILES,), tl.int32)  # how many tiles those have
    total = tl.zeros((), tl.int32)
    for start in range(0, sequences, SEQUENCES):
        s = start + tl.arange(0, SEQUENCES)
        s_begin = tl.load(bounds_ptr + s, mask=s < sequences, other=0).to(tl.int32)
        s_end = tl.load(bounds_ptr + s + 1, mask=s < sequences, other=0).to(tl.int32)
        count = tl.maximum(s_end - s_begin + BLOCK - 1, 0) // BLOCK
        ends = total + tl.cumsum(count, 0)
        before = (ends[None, :] <= tile[:, None]) & (s < sequences)[None, :]
        sequence += tl.sum(before.to(tl.int32), 1)
        first = tl.maximum(first, tl.max(tl.where(before, ends[None, :], 0), 1))
        total += tl.sum(count, 0)
    live = sequence < sequences
    begin = tl.load(bounds_ptr + sequence, mask=live, other=0).to(tl.int32)
    tl.store(row_ptr + tile, tl.where(live, begin + (tile - first) * BLOCK, -1), mask=tile < tiles)
    tl.store(sequence_ptr + tile, sequence, mask=tile < tiles)


@triton.jit
def _rows(x, head, row, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of one head; beyond its width, and beyond the last row, they are 0."""
    return tl.reshape(x.load([head, row, 0]), (BLOCK, WIDTH))


@triton.jit
def _forward_blocks(
    sums, total, largest, q_tile, q_tail_tile, k, k_tail, v, key_head, tail_head, begin, stop, end, position,
    log2_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    for key in tl.range(begin, stop, BLOCK_N, disable_licm=True):
        k_tile = _rows(k, key_head, key, BLOCK_N, HEAD)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        if TAIL > 0:
            k_tail_tile = _rows(k_tail, tail_head, key, BLOCK_N, TAIL)
            scores = tl.dot(q_tail_tile, k_tail_tile.T, scores, input_precision=PRECISION)
        v_tile = _rows(v, key_head, key, BLOCK_N, VALUE)
        if MASKED:
            keys = key + tl.arange(0, BLOCK_N)
            scores = tl.where(keys[None, :] <= position[:, None], scores, float("-inf"))
            v_tile = tl.where((keys < end)[:, None], v_tile, 0.0)
        new_largest = tl.maximum(largest, tl.max(scores, 1) * log2_scale)
        p = tl.exp2(scores * log2_scale - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(p, 1)
        sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * shrink[:, None], input_precision=PRECISION)
        largest = new_largest
    return sums, total, largest


@triton.jit(do_not_specialize=["tiles"])
def forward_kernel(
    q, q_tail, k, k_tail, v, out_ptr, lse_ptr, position_ptr, q_bounds_ptr, k_bounds_ptr, row_ptr, sequence_ptr,
    tiles, N, group, value_width, log2_scale,
    INDEXED: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    # Programs that run together share a head's keys in L2; the last tile of a sequence is the longest and goes first.
    head = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = tl.load(row_ptr + tile)
    if row < 0:
        return
    sequence = tl.load(sequence_ptr + tile)
    q_end = tl.load(q_bounds_ptr + sequence + 1).to(tl.int32)
    begin = tl.load(k_bounds_ptr + sequence).to(tl.int32)
    end = tl.load(k_bounds_ptr + sequence + 1).to(tl.int32)
    rows = row + tl.arange(0, BLOCK_M)
    last = tl.minimum(row + BLOCK_M, q_end) - 1
    if INDEXED:
        position = tl.load(position_ptr + tl.minimum(rows, last)).to(tl.int32)
        nearest = tl.load(position_ptr + row).to(tl.int32)
        furthest = tl.load(position_ptr + last).to(tl.int32)
    else:
        position, nearest, furthest = rows, row, last
    key_head = head // group
    tail_head = 0 if SHARED else key_head
    q_tile = _rows(q, head, row, BLOCK_M, HEAD)
    q_tail_tile = q_tile
    if TAIL > 0:
        q_tail_tile = _rows(q_tail, head, row, BLOCK_M, TAIL)
    sums = tl.zeros((BLOCK_M, VALUE), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    whole = begin + (nearest + 1 - begin) // BLOCK_N * BLOCK_N
    sums, total, largest = _forward_blocks(
        sums, total, largest, q_tile, q_tail_tile, k, k_tail, v, key_head, tail_head, begin, whole, end, position,
        log2_scale, False, PRECISION, BLOCK_N, HEAD, TAIL, VALUE,
    )  # fmt: skip
    sums, total, largest = _forward_blocks(
        sums, total, largest, q_tile, q_tail_tile, k, k_tail, v, key_head, tail_head, whole, furthest + 1, end,
        position, log2_scale, True, PRECISION, BLOCK_N, HEAD, TAIL, VALUE,
    )  # fmt: skip
    live = rows < q_end
    place = rows.to(tl.int64) * N + head
    tl.store(lse_ptr + place, (largest + tl.log2(total)) * 0.6931471805599453, mask=live)
    column = tl.arange(0, VALUE)
    out = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
    mask = live[:, None] & (column < value_width)[None, :]
    tl.store(out_ptr + place[:, None] * value_width + column[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    out_ptr, grad_ptr, grad_row, grad_head, lse_ptr, log2_lse_ptr, offset_ptr, T, N, value_width,
    ROWS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """For the backward, a head's rows side by side: log-sum-exp in base 2, and the sum of grad x out over a row."""
    head = tl.program_id(0) % N
    rows = tl.program_id(0) // N * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, VALUE)
    live, place = rows < T, rows.to(tl.int64) * N + head
    mask = live[:, None] & (column < value_width)[None, :]
    out = tl.load(out_ptr + place[:, None] * value_width + column[None, :], mask=mask, other=0.0).to(tl.float32)
    where = grad_ptr + rows[:, None].to(tl.int64) * grad_row + head.to(tl.int64) * grad_head + column[None, :]
    grad = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    turned = head.to(tl.int64) * T + rows
    tl.store(offset_ptr + turned, tl.sum(out * grad, 1), mask=live)
    lse = tl.load(lse_ptr + place, mask=live, other=0.0)
    tl.store(log2_lse_ptr + turned, lse * 1.4426950408889634, mask=live)


@triton.jit
def _grad_query_blocks(
    dq, dq_tail, q_tile, q_tail_tile, grad_tile, log2_lse, offset, k, k_tail, v, key_head, tail_head, begin, stop, end,
    position, log2_scale,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    for key in tl.range(begin, stop, BLOCK_N, disable_licm=True):
        keys = key + tl.arange(0, BLOCK_N)
        k_tile = _rows(k, key_head, key, BLOCK_N, HEAD)
        v_tile = _rows(v, key_head, key, BLOCK_N, VALUE)
        if MASKED:
            k_tile = tl.where((keys < end)[:, None], k_tile, 0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        if TAIL > 0:
            k_tail_tile = _rows(k_tail, tail_head, key, BLOCK_N, TAIL)
            if MASKED:
                k_tail_tile = tl.where((keys < end)[:, None], k_tail_tile, 0.0)
            scores = tl.dot(q_tail_tile, k_tail_tile.T, scores, input_precision=PRECISION)
        p = tl.exp2(scores * log2_scale - log2_lse[:, None])
        slope = p * (tl.dot(grad_tile, v_tile.T, input_precision=PRECISION) - offset[:, None])
        if MASKED:
            slope = tl.where(keys[None, :] <= position[:, None], slope, 0.0)
        slope = slope.to(k_tile.dtype)
        dq = tl.dot(slope, k_tile, dq, input_precision=PRECISION)
        if TAIL > 0:
            dq_tail = tl.dot(slope, k_tail_tile, dq_tail, input_precision=PRECISION)
    return dq, dq_tail


@triton.jit(do_not_specialize=["tiles", "T"])
def grad_query_kernel(
    q, q_tail, k, k_tail, v, grad, log2_lse_ptr, offset_ptr, dq_ptr, position_ptr, q_bounds_ptr, k_bounds_ptr, row_ptr,
    sequence_ptr, tiles, T, N, group, head_width, tail_width, scale, log2_scale,
    INDEXED: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    row = tl.load(row_ptr + tile)
    if row < 0:
        return
    sequence = tl.load(sequence_ptr + tile)
    q_end = tl.load(q_bounds_ptr + sequence + 1).to(tl.int32)
    begin = tl.load(k_bounds_ptr + sequence).to(tl.int32)
    end = tl.load(k_bounds_ptr + sequence + 1).to(tl.int32)
    rows = row + tl.arange(0, BLOCK_M)
    last = tl.minimum(row + BLOCK_M, q_end) - 1
    if INDEXED:
        position = tl.load(position_ptr + tl.minimum(rows, last)).to(tl.int32)
        nearest = tl.load(position_ptr + row).to(tl.int32)
        furthest = tl.load(position_ptr + last).to(tl.int32)
    else:
        position, nearest, furthest = rows, row, last
    key_head = head // group
    tail_head = 0 if SHARED else key_head
    q_tile = _rows(q, head, row, BLOCK_M, HEAD)
    q_tail_tile = q_tile
    if TAIL > 0:
        q_tail_tile = _rows(q_tail, head, row, BLOCK_M, TAIL)
    grad_tile = _rows(grad, head, row, BLOCK_M, VALUE)
    live = rows < q_end
    turned = head.to(tl.int64) * T + rows
    log2_lse = tl.load(log2_lse_ptr + turned, mask=live, other=0.0)
    offset = tl.load(offset_ptr + turned, mask=live, other=0.0)
    dq = tl.zeros((BLOCK_M, HEAD), tl.float32)
    dq_tail = tl.zeros((BLOCK_M, TAIL if TAIL > 0 else 1), tl.float32)
    whole = begin + (nearest + 1 - begin) // BLOCK_N * BLOCK_N
    dq, dq_tail = _grad_query_blocks(
        dq, dq_tail, q_tile, q_tail_tile, grad_tile, log2_lse, offset, k, k_tail, v, key_head, tail_head, begin, whole,
        end, position, log2_scale, False, PRECISION, BLOCK_N, HEAD, TAIL, VALUE,
    )  # fmt: skip
    dq, dq_tail = _grad_query_blocks(
        dq, dq_tail, q_tile, q_tail_tile, grad_tile, log2_lse, offset, k, k_tail, v, key_head, tail_head, whole,
        furthest + 1, end, position, log2_scale, True, PRECISION, BLOCK_N, HEAD, TAIL, VALUE,
    )  # fmt: skip
    # Read again: what follows from it would else be kept in registers beside the sums.
    out_rows = tl.load(row_ptr + tile, volatile=True) + tl.arange(0, BLOCK_M)
    out_live = (out_rows < q_end)[:, None]
    corner = dq_ptr + (out_rows.to(tl.int64) * N + head)[:, None] * (head_width + tail_width)
    kind = dq_ptr.dtype.element_ty
    column = tl.arange(0, HEAD)
    tl.store(corner + column[None, :], (dq * scale).to(kind), mask=out_live & (column < head_width)[None, :])
    if TAIL > 0:
        tail_column = tl.arange(0, TAIL)
        mask = out_live & (tail_column < tail_width)[None, :]
        tl.store(corner + head_width + tail_column[None, :], (dq_tail * scale).to(kind), mask=mask)


@triton.jit
def _grad_key_block(
    dk, dk_tail, dv, k_tile, k_tail_tile, v_tile, q, q_tail, grad, log2_lse_ptr, offset_ptr, position_ptr, head, row,
    q_end, keys, T, log2_scale,
    INDEXED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Adds what one block of queries gives. Scores stand on their side, keys x queries: so they are the left operand of
    the products that follow, which takes them from registers."""
    rows = row + tl.arange(0, BLOCK_M)
    live = rows < q_end
    q_tile = _rows(q, head, row, BLOCK_M, HEAD)
    grad_tile = _rows(grad, head, row, BLOCK_M, VALUE)
    turned = head.to(tl.int64) * T + rows
    if MASKED:
        q_tile = tl.where(live[:, None], q_tile, 0.0)
        grad_tile = tl.where(live[:, None], grad_tile, 0.0)
        log2_lse = tl.load(log2_lse_ptr + turned, mask=live, other=0.0)
        offset = tl.load(offset_ptr + turned, mask=live, other=0.0)
    else:
        log2_lse = tl.load(log2_lse_ptr + turned)
        offset = tl.load(offset_ptr + turned)
    scores = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
    if TAIL > 0:
        q_tail_tile = _rows(q_tail, head, row, BLOCK_M, TAIL)
        if MASKED:
            q_tail_tile = tl.where(live[:, None], q_tail_tile, 0.0)
        scores = tl.dot(k_tail_tile, q_tail_tile.T, scores, input_precision=PRECISION)
    p = tl.exp2(scores * log2_scale - log2_lse[None, :])
    if MASKED:
        position = rows
        if INDEXED:
            position = tl.load(position_ptr + rows, mask=live, other=0).to(tl.int32)
        seen = (keys[:, None] <= position[None, :]) & live[None, :]
        p = tl.where(seen, p, 0.0)
    dv = tl.dot(p.to(grad_tile.dtype), grad_tile, dv, input_precision=PRECISION)
    slope = p * (tl.dot(v_tile, grad_tile.T, input_precision=PRECISION) - offset[None, :])
    if MASKED:
        slope = tl.where(seen, slope, 0.0)
    slope = slope.to(q_tile.dtype)
    dk = tl.dot(slope, q_tile, dk, input_precision=PRECISION)
    if TAIL > 0:
        dk_tail = tl.dot(slope, q_tail_tile, dk_tail, input_precision=PRECISION)
    return dk, dk_tail, dv


@triton.jit(do_not_specialize=["tiles", "T"])
def grad_key_kernel(
    q, q_tail, k, k_tail, v, grad, log2_lse_ptr, offset_ptr, dk_ptr, dk_row, dk_head, dk_tail_ptr, tail_row, tail_head,
    dv_ptr, position_ptr, first_ptr, clear_ptr, q_bounds_ptr, k_bounds_ptr, row_ptr, sequence_ptr, tiles, T, M, group,
    head_width, tail_width, value_width, scale, log2_scale,
    INDEXED: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """dk, dv and the tail's dk of one tile of keys and one key head, added up over the heads of its group in order. The
    tail is written head by head, also where all heads share it."""
    key_head = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row = tl.load(row_ptr + tile)
    if row < 0:
        return
    sequence = tl.load(sequence_ptr + tile)
    q_end = tl.load(q_bounds_ptr + sequence + 1).to(tl.int32)
    end = tl.load(k_bounds_ptr + sequence + 1).to(tl.int32)
    keys = row + tl.arange(0, BLOCK_N)
    if INDEXED:  # the first query that sees any of the keys, and the first that sees all of them
        first = tl.load(first_ptr + tile).to(tl.int32)
        clear = tl.load(clear_ptr + tile).to(tl.int32)
    else:
        first, clear = row, row + BLOCK_N - 1
    queries = tl.maximum(q_end - first, 0)
    blocks = tl.cdiv(queries, BLOCK_M)
    whole = queries // BLOCK_M
    diagonal = tl.minimum(tl.cdiv(tl.maximum(clear - first, 0), BLOCK_M), blocks)
    masked = diagonal + (blocks > tl.maximum(diagonal, whole)).to(tl.int32)  # with the ragged last one
    k_tile = _rows(k, key_head, row, BLOCK_N, HEAD)
    v_tile = _rows(v, key_head, row, BLOCK_N, VALUE)
    k_tail_tile = k_tile
    if TAIL > 0:
        k_tail_tile = _rows(k_tail, 0 if SHARED else key_head, row, BLOCK_N, TAIL)
    dk = tl.zeros((BLOCK_N, HEAD), tl.float32)
    dk_tail = tl.zeros((BLOCK_N, TAIL if TAIL > 0 else 1), tl.float32)
    dv = tl.zeros((BLOCK_N, VALUE), tl.float32)
    for member in tl.range(0, group, disable_licm=True):
        head = key_head * group + member
        for i in tl.range(0, masked, disable_licm=True):
            masked_row = first + tl.where(i < diagonal, i, blocks - 1) * BLOCK_M
            dk, dk_tail, dv = _grad_key_block(
                dk, dk_tail, dv, k_tile, k_tail_tile, v_tile, q, q_tail, grad, log2_lse_ptr, offset_ptr, position_ptr,
                head, masked_row, q_end, keys, T, log2_scale, INDEXED, True, PRECISION, BLOCK_M, HEAD, TAIL, VALUE,
            )  # fmt: skip
        for whole_row in tl.range(first + diagonal * BLOCK_M, first + whole * BLOCK_M, BLOCK_M, disable_licm=True):
            dk, dk_tail, dv = _grad_key_block(
                dk, dk_tail, dv, k_tile, k_tail_tile, v_tile, q, q_tail, grad, log2_lse_ptr, offset_ptr, position_ptr,
                head, whole_row, q_end, keys, T, log2_scale, INDEXED, False, PRECISION, BLOCK_M, HEAD, TAIL, VALUE,
            )  # fmt: skip
    out_keys = tl.load(row_ptr + tile, volatile=True) + tl.arange(0, BLOCK_N)  # read again, as in grad_query_kernel
    live = (out_keys < end)[:, None]
    wide_keys = out_keys[:, None].to(tl.int64)
    column, value_column = tl.arange(0, HEAD), tl.arange(0, VALUE)
    where = dk_ptr + wide_keys * dk_row + key_head * dk_head + column[None, :]
    tl.store(where, (dk * scale).to(dk_ptr.dtype.element_ty), mask=live & (column < head_width)[None, :])
    if TAIL > 0:
        tail_column = tl.arange(0, TAIL)
        where_tail = dk_tail_ptr + wide_keys * tail_row + key_head * tail_head + tail_column[None, :]
        mask = live & (tail_column < tail_width)[None, :]
        tl.store(where_tail, (dk_tail * scale).to(dk_tail_ptr.dtype.element_ty), mask=mask)
    where_value = dv_ptr + (wide_keys * M + key_head) * value_width + value_column[None, :]
    mask_value = live & (value_column < value_width)[None, :]
    tl.store(where_value, dv.to(dv_ptr.dtype.element_ty), mask=mask_value)


@triton.jit(do_not_specialize=["S"])
def sum_heads_kernel(part_ptr, out_ptr, S, M, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out (S, width) = the sum over the M heads of part (S, M, width), in order."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    mask = (rows < S)[:, None] & (column < width)[None, :]
    wide_rows = rows[:, None].to(tl.int64)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for head in range(0, M):
        total += tl.load(part_ptr + (wide_rows * M + head) * width + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + wide_rows * width + column[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)
