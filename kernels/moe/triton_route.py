"""DeepSeek-V3's router in Triton: one pass over the logits of a few tokens a program, and its backward.

Experts are compared by whole numbers that order as their scores do and, among equals, put the lower id first; a NaN
ranks below everything. So a choice is one maximum, ties need no care, and no input can make the search go astray.
"""

from __future__ import annotations

import triton
import triton.language as tl

GONE = tl.constexpr(-(2**63))  # below the key of every expert


@triton.jit
def _key(x, id):
    bits = (tl.where(x == x, x, float("-inf")) + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - id).to(tl.int64)


@triton.jit
def _id_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _score_of(key):
    ordered = (key >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _chosen_scores(logits_ptr, wide_rows, stride, ids, mask, largest, total, SIGMOID: tl.constexpr):
    x = tl.load(logits_ptr + wide_rows[:, None] * stride + ids, mask=mask, other=0.0).to(tl.float32)
    score = _sigmoid(x) if SIGMOID else tl.exp(x - largest[:, None]) / total[:, None]
    return tl.where(mask, score, 0.0)


@triton.jit
def _softmax_parts(x):
    largest = tl.max(x, 1)
    return largest, tl.sum(tl.exp(x - largest[:, None]), 1)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logits_ptr, stride, bias_ptr, replay_ptr, padding_ptr, ids_ptr, weights_ptr, counts_ptr, T, scale,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, REPLAY: tl.constexpr, PADDING: tl.constexpr,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, GROUP_TOP_K: tl.constexpr, TOP_K: tl.constexpr,
    GROUPS_2: tl.constexpr, GROUP_SIZE_2: tl.constexpr, TOP_K_2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Names in _2 are rounded up to powers of two. The experts stand in their groups, each group rounded up."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < T
    wide_rows = rows.to(tl.int64)
    place = tl.arange(0, GROUPS_2 * GROUP_SIZE_2)
    group, member = place // GROUP_SIZE_2, place % GROUP_SIZE_2
    expert = group * GROUP_SIZE + member
    valid = (group < GROUPS) & (member < GROUP_SIZE)
    mask = live[:, None] & valid[None, :]
    x = tl.load(logits_ptr + wide_rows[:, None] * stride + expert[None, :], mask=mask, other=float("-inf"))
    x = tl.where(live[:, None], x.to(tl.float32), 0.0)
    largest, total = _softmax_parts(x)
    k = tl.arange(0, TOP_K_2)
    if REPLAY:
        mask_k = live[:, None] & (k < TOP_K)[None, :]
        ids = tl.load(replay_ptr + wide_rows[:, None] * TOP_K + k[None, :], mask=mask_k, other=0).to(tl.int32)
    else:
        choice = _sigmoid(x) if SIGMOID else tl.exp(x - largest[:, None]) / total[:, None]
        if BIAS:
            choice += tl.load(bias_ptr + expert, mask=valid, other=0.0).to(tl.float32)[None, :]
        key = tl.where(valid[None, :], _key(choice, expert[None, :]), GONE)
        if GROUP_TOP_K < GROUPS:
            key = tl.reshape(key, (ROWS, GROUPS_2, GROUP_SIZE_2))
            # The score of a group is the sum of its two best experts (DeepSeek-V3, section 2.1.2).
            best = tl.max(key, 2)
            group_score = _score_of(best)
            if GROUP_SIZE > 1:
                group_score += _score_of(tl.max(tl.where(key == best[:, :, None], GONE, key), 2))
            g = tl.arange(0, GROUPS_2)
            group_key = tl.where((g < GROUPS)[None, :], _key(group_score, g[None, :]), GONE)
            kept = tl.zeros((ROWS, GROUPS_2), tl.int32)
            for _ in tl.static_range(GROUP_TOP_K):
                here = group_key == tl.max(group_key, 1)[:, None]
                kept = tl.where(here, 1, kept)
                group_key = tl.where(here, GONE, group_key)
            key = tl.where(kept[:, :, None] != 0, key, GONE)
            key = tl.reshape(key, (ROWS, GROUPS_2 * GROUP_SIZE_2))
        ids = tl.zeros((ROWS, TOP_K_2), tl.int32)
        for i in tl.static_range(TOP_K):
            best = tl.max(key, 1)
            key = tl.where(key == best[:, None], GONE, key)
            ids = tl.where((k == i)[None, :], _id_of(best)[:, None], ids)
    mask_k = live[:, None] & (k < TOP_K)[None, :]
    chosen = _chosen_scores(logits_ptr, wide_rows, stride, ids, mask_k, largest, total, SIGMOID)
    weights = chosen * (scale / (tl.sum(chosen, 1) + 1e-20))[:, None]
    counted = mask_k
    if PADDING:
        padding = tl.load(padding_ptr + rows, mask=live, other=1) != 0
        weights = tl.where(padding[:, None], 0.0, weights)
        counted = mask_k & (padding[:, None] == 0)
    at = wide_rows[:, None] * TOP_K + k[None, :]
    tl.store(ids_ptr + at, ids.to(tl.int64), mask=mask_k)
    tl.store(weights_ptr + at, weights, mask=mask_k)
    one = tl.full((ROWS, TOP_K_2), 1, tl.int64)
    tl.atomic_add(counts_ptr + ids, one, mask=counted)  # whole numbers: any order gives the same


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    grad_ptr, logits_ptr, stride, ids_ptr, padding_ptr, out_ptr, T, E, scale,
    SIGMOID: tl.constexpr, PADDING: tl.constexpr, TOP_K: tl.constexpr, TOP_K_2: tl.constexpr, E_2: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < T
    if PADDING:
        used = live & (tl.load(padding_ptr + rows, mask=live, other=1) == 0)
    else:
        used = live
    wide_rows = rows.to(tl.int64)
    k, expert = tl.arange(0, TOP_K_2), tl.arange(0, E_2)
    mask_k = used[:, None] & (k < TOP_K)[None, :]
    at = wide_rows[:, None] * TOP_K + k[None, :]
    ids = tl.load(ids_ptr + at, mask=mask_k, other=0).to(tl.int32)
    grad = tl.load(grad_ptr + at, mask=mask_k, other=0.0)
    mask = used[:, None] & (expert < E)[None, :]
    x = tl.load(logits_ptr + wide_rows[:, None] * stride + expert[None, :], mask=mask, other=float("-inf"))
    x = tl.where(used[:, None], x.to(tl.float32), 0.0)
    largest, total = _softmax_parts(x)
    chosen = _chosen_scores(logits_ptr, wide_rows, stride, ids, mask_k, largest, total, SIGMOID)
    chosen_sum = tl.sum(chosen, 1) + 1e-20
    shared = tl.sum(grad * chosen, 1) / chosen_sum
    slope = (grad - shared[:, None]) * (scale / chosen_sum)[:, None] * chosen
    if SIGMOID:
        slope *= 1 - chosen
    slope = tl.where(mask_k, slope, 0.0)
    out = tl.zeros((ROWS, E_2), tl.float32)
    for i in tl.static_range(TOP_K):
        pick = (k == i)[None, :]
        id = tl.sum(tl.where(pick, ids, 0), 1)
        out += tl.where(expert[None, :] == id[:, None], tl.sum(tl.where(pick, slope, 0.0), 1)[:, None], 0.0)
    if not SIGMOID:
        out -= tl.exp(x - largest[:, None]) / total[:, None] * tl.sum(slope, 1)[:, None]
    where = out_ptr + wide_rows[:, None] * E + expert[None, :]
    out = tl.where(used[:, None], out, 0.0)
    tl.store(where, out.to(out_ptr.dtype.element_ty), mask=live[:, None] & (expert < E)[None, :])
