"""Decoding over a cache of FP8 latents in Triton, for Hopper, and writing to it, as reference_decode.fp8_parts lays it.

As in triton_decode.py, whose combine_kernel puts the splits together: a latent comes as one byte a number, is taken
times its scales once for all heads of the program, and is then key and value in the queries' type.
"""

from __future__ import annotations

import triton
import triton.language as tl

from r1.kernels.fp8.triton_quantize import magnitude, scale_of, to_e4m3

SCALED = tl.constexpr(128)  # numbers of the latent that share a scale


@triton.jit(do_not_specialize=["splits", "split_pages", "room"])
def decode_fp8_kernel(
    q_ptr, q_row, q_head, latents, scales_ptr, scales_row, ropes, table_ptr, table_row, lens_ptr, out_ptr, part_ptr,
    log2_sum_ptr, splits, split_pages, room, N, width, tail_width, log2_scale,
    PAGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Out where the sequence has one split or none, else this split's share and the log of its sum, in base 2."""
    head_blocks = tl.cdiv(N, BLOCK_H)
    head_block = tl.program_id(0) % head_blocks
    split = tl.program_id(0) // head_blocks % splits
    b = (tl.program_id(0) // head_blocks // splits).to(tl.int64)
    length = tl.minimum(tl.load(lens_ptr + b).to(tl.int32), room)
    begin = split * split_pages * PAGE
    if (begin >= length) & (split > 0):
        return
    head = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    live_head = head < N
    column, tail_column = tl.arange(0, HEAD), tl.arange(0, TAIL if TAIL > 0 else 1)
    where_q = q_ptr + b * q_row + head[:, None] * q_head
    q_tile = tl.load(where_q + column[None, :], mask=live_head[:, None] & (column < width)[None, :], other=0.0)
    q_tail_tile = q_tile
    if TAIL > 0:
        mask_tail = live_head[:, None] & (tail_column < tail_width)[None, :]
        q_tail_tile = tl.load(where_q + width + tail_column[None, :], mask=mask_tail, other=0.0)

    sums = tl.zeros((BLOCK_H, HEAD), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    keys = tl.maximum(tl.minimum(length - begin, split_pages * PAGE), 0)
    page_blocks = tl.cdiv(PAGE, BLOCK_N)
    blocks = keys // PAGE * page_blocks + tl.cdiv(keys % PAGE, BLOCK_N)
    own_table = table_ptr + b * table_row + split * split_pages
    place_n, scale_column = tl.arange(0, BLOCK_N), tl.arange(0, HEAD // SCALED)
    for block in tl.range(0, blocks, disable_licm=True):
        page = tl.load(own_table + block // page_blocks).to(tl.int32)
        # A block ends where the used slots do, as in decode_kernel, and its scales are read for used slots alone.
        slot = block % page_blocks * BLOCK_N
        used = tl.minimum(tl.minimum(PAGE, keys - block // page_blocks * PAGE) - slot, BLOCK_N)
        first = slot + used - BLOCK_N
        live = place_n >= BLOCK_N - used
        where_scales = scales_ptr + (page.to(tl.int64) * PAGE + first + place_n)[:, None] * scales_row
        mask_scales = live[:, None] & (scale_column < width // SCALED)[None, :]
        scales = tl.load(where_scales + scale_column[None, :], mask=mask_scales, other=0.0)
        latent = tl.reshape(latents.load([0, page, first, 0]).to(tl.float32), (BLOCK_N, HEAD // SCALED, SCALED))
        tile = tl.reshape(latent * scales[:, :, None], (BLOCK_N, HEAD)).to(q_tile.dtype)
        scores = tl.dot(q_tile, tile.T, input_precision=PRECISION)
        if TAIL > 0:
            rope_tile = tl.reshape(ropes.load([0, page, first, 0]), (BLOCK_N, TAIL)).to(q_tile.dtype)
            scores = tl.dot(q_tail_tile, rope_tile.T, scores, input_precision=PRECISION)
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1) * log2_scale)
        p = tl.exp2(scores * log2_scale - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(p, 1)
        sums = tl.dot(p.to(tile.dtype), tile, sums * shrink[:, None], input_precision=PRECISION)
        largest = new_largest

    share = sums / tl.where(total == 0.0, 1.0, total)[:, None]  # an empty sequence gives 0
    place = b * N + head
    mask_out = live_head[:, None] & (column < width)[None, :]
    if length <= split_pages * PAGE:
        tl.store(out_ptr + place[:, None] * width + column[None, :], share.to(out_ptr.dtype.element_ty), mask=mask_out)
    else:
        part = place * splits + split
        tl.store(part_ptr + part[:, None] * width + column[None, :], share, mask=mask_out)
        tl.store(log2_sum_ptr + part, largest + tl.log2(total), mask=live_head)


@triton.jit(do_not_specialize=["pages"])
def append_fp8_kernel(
    latents_ptr, scales_ptr, ropes_ptr, size, rows_ptr, row_stride, table_ptr, table_row, positions_ptr, pages,
    page_size, width, tail_width, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One token of `size` bytes. A position below 0, or beyond the table, is left out."""
    b = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + b).to(tl.int64)
    if (position < 0) | (position >= pages.to(tl.int64) * page_size):
        return
    page = tl.load(table_ptr + b * table_row + position // page_size).to(tl.int64)
    slot = page * page_size + position % page_size
    row_ptr = rows_ptr + b * row_stride
    group, column = tl.arange(0, HEAD // SCALED), tl.arange(0, SCALED)
    live = group < width // SCALED
    inner = group[:, None] * SCALED + column[None, :]
    latent = tl.load(row_ptr + inner, mask=live[:, None], other=0.0).to(tl.float32)
    scales = scale_of(tl.max(magnitude(latent), 1), False)
    tl.store(latents_ptr + slot * size + inner, to_e4m3(latent, scales[:, None]), mask=live[:, None])
    tl.store(scales_ptr + slot * (size // 4) + group, scales, mask=live)
    if TAIL > 0:
        tail_column = tl.arange(0, TAIL)
        mask_tail = tail_column < tail_width
        rope = tl.load(row_ptr + width + tail_column, mask=mask_tail, other=0.0).to(tl.float32)
        tl.store(ropes_ptr + slot * (size // 2) + tail_column, rope.to(tl.bfloat16), mask=mask_tail)
