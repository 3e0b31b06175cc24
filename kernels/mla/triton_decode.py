"""Attention of one query over a paged cache in Triton, for Hopper, and writing to the cache.

A program takes one sequence, a block of the query heads that share a key head, and one split of a fixed number of
pages, so the order of the sums follows from the sequence's own length alone. `combine_kernel` puts the splits together
in order. A latent is key and value at once (absorbed MLA): it is loaded once for all heads of the program.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _slots(cache, head, page, slot, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of one page and head; before the page and beyond it they are 0."""
    return tl.reshape(cache.load([head, page, slot, 0]), (BLOCK, WIDTH))


@triton.jit(do_not_specialize=["splits", "split_pages", "room"])
def decode_kernel(
    q_ptr, q_row, q_head, k, k_tail, v, table_ptr, table_row, lens_ptr, out_ptr, lse_ptr, part_ptr, log2_sum_ptr,
    splits, split_pages, room, N, group, width, tail_width, value_width, log2_scale,
    LATENT: tl.constexpr, LSE: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Out where the sequence has one split or none, else this split's share and the log of its sum, in base 2. With
    LSE the log-sum-exp too, in base e."""
    # The blocks of heads that read the same keys run side by side.
    head_blocks = tl.cdiv(group, BLOCK_H)
    head_block = tl.program_id(0) % head_blocks
    key_head = tl.program_id(0) // head_blocks % (N // group)
    split = tl.program_id(0) // head_blocks // (N // group) % splits
    b = (tl.program_id(0) // head_blocks // (N // group) // splits).to(tl.int64)
    length = tl.minimum(tl.load(lens_ptr + b).to(tl.int32), room)
    begin = split * split_pages * PAGE
    if (begin >= length) & (split > 0):
        return
    row = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    live_row = row < group
    head = key_head * group + row
    column, value_column, tail_column = tl.arange(0, HEAD), tl.arange(0, VALUE), tl.arange(0, TAIL if TAIL > 0 else 1)
    where_q = q_ptr + b * q_row + head[:, None] * q_head
    q_tile = tl.load(where_q + column[None, :], mask=live_row[:, None] & (column < width)[None, :], other=0.0)
    q_tail_tile = q_tile
    if TAIL > 0:
        mask_tail = live_row[:, None] & (tail_column < tail_width)[None, :]
        q_tail_tile = tl.load(where_q + width + tail_column[None, :], mask=mask_tail, other=0.0)

    sums = tl.zeros((BLOCK_H, VALUE), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    keys = tl.maximum(tl.minimum(length - begin, split_pages * PAGE), 0)
    page_blocks = tl.cdiv(PAGE, BLOCK_N)
    blocks = keys // PAGE * page_blocks + tl.cdiv(keys % PAGE, BLOCK_N)
    own_table = table_ptr + b * table_row + split * split_pages
    for block in tl.range(0, blocks, disable_licm=True):
        page = tl.load(own_table + block // page_blocks).to(tl.int32)
        # A block that is not full ends where the used slots do and begins earlier: what is before the page reads as 0,
        # what is earlier in it has its own block. So no slot is read that may hold anything, and none needs zeroing.
        slot = block % page_blocks * BLOCK_N
        used = tl.minimum(tl.minimum(PAGE, keys - block // page_blocks * PAGE) - slot, BLOCK_N)
        first = slot + used - BLOCK_N
        k_tile = _slots(k, key_head, page, first, BLOCK_N, HEAD).to(q_tile.dtype)
        scores = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        if TAIL > 0:
            k_tail_tile = _slots(k_tail, key_head, page, first, BLOCK_N, TAIL).to(q_tile.dtype)
            scores = tl.dot(q_tail_tile, k_tail_tile.T, scores, input_precision=PRECISION)
        if LATENT:
            v_tile = k_tile
        else:
            v_tile = _slots(v, key_head, page, first, BLOCK_N, VALUE).to(q_tile.dtype)
        live = tl.arange(0, BLOCK_N) >= BLOCK_N - used
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * log2_scale)
        p = tl.exp2(scores * log2_scale - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(p, 1)
        sums = tl.dot(p.to(v_tile.dtype), v_tile, sums * shrink[:, None], input_precision=PRECISION)
        largest = new_largest

    share = sums / tl.where(total == 0.0, 1.0, total)[:, None]  # an empty sequence gives 0
    place = b * N + head
    mask_out = live_row[:, None] & (value_column < value_width)[None, :]
    if length <= split_pages * PAGE:
        where = out_ptr + place[:, None] * value_width + value_column[None, :]
        tl.store(where, share.to(out_ptr.dtype.element_ty), mask=mask_out)
        if LSE:
            tl.store(lse_ptr + place, (largest + tl.log2(total)) * LN_2, mask=live_row)
    else:
        part = place * splits + split
        tl.store(part_ptr + part[:, None] * value_width + value_column[None, :], share, mask=mask_out)
        tl.store(log2_sum_ptr + part, largest + tl.log2(total), mask=live_row)


@triton.jit(do_not_specialize=["splits", "split_keys", "room"])
def combine_kernel(
    part_ptr, log2_sum_ptr, lens_ptr, out_ptr, lse_ptr, splits, split_keys, room, N, value_width,
    LSE: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lens_ptr + place // N).to(tl.int32), room)
    if length <= split_keys:
        return
    column = tl.arange(0, VALUE)
    mask = column < value_width
    used = tl.cdiv(length, split_keys)
    largest = tl.load(log2_sum_ptr + place * splits)
    for other in range(1, used):
        largest = tl.maximum(largest, tl.load(log2_sum_ptr + place * splits + other))
    sums = tl.zeros((VALUE,), tl.float32)
    total = tl.zeros((), tl.float32)
    for split in range(0, used):
        weight = tl.exp2(tl.load(log2_sum_ptr + place * splits + split) - largest)
        total += weight
        sums += weight * tl.load(part_ptr + (place * splits + split) * value_width + column, mask=mask, other=0.0)
    out = (sums / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place * value_width + column, out, mask=mask)
    if LSE:
        tl.store(lse_ptr + place, (largest + tl.log2(total)) * LN_2)


@triton.jit(do_not_specialize=["pages"])
def append_kernel(
    cache_ptr, rows_ptr, row_stride, table_ptr, table_row, positions_ptr, pages, page_size, width, BLOCK: tl.constexpr
):
    """A position below 0, or beyond the table, is left out."""
    b = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(positions_ptr + b).to(tl.int64)
    if (position < 0) | (position >= pages.to(tl.int64) * page_size):
        return
    page = tl.load(table_ptr + b * table_row + position // page_size).to(tl.int64)
    slot = page * page_size + position % page_size
    values = tl.load(rows_ptr + b * row_stride + column, mask=column < width, other=0.0)
    tl.store(cache_ptr + slot * width + column, values.to(cache_ptr.dtype.element_ty), mask=column < width)
