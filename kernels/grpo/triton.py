"""The grpo family in Triton, for Hopper: the logits live in registers, one tile of tokens x vocabulary at a time.

Forward: of its logits x a tile leaves behind, per token, the largest m, sum exp(x - m) and sum (x - m) exp(x - m); a
second kernel merges the tiles in a fixed order. No tile knows of another and none depends on how many tokens there are,
so a token's log-probability is the same bits in every batch. Backward: d loss / d logits of one span of the vocabulary
goes to memory in the inputs' type, and two plain products make the gradients: the one of the weight is a finished
product for that span, the one of the hidden states is added up in float32 over the spans. docs/kernels/grpo.md counts
the work.

float64 is computed by the torch backend. Letters are those of reference.py; BLOCK_T, BLOCK_V, BLOCK_H tile T, V and H.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.backend import wide
from r1.kernels.bulk_copy import descriptor
from r1.kernels.grpo import reference
from r1.kernels.grpo.triton_loss import grpo_loss

THIS = sys.modules[__name__]

# Two consumer warp groups of 64 x 256 each: 128 accumulators a thread, the most that leaves room for the epilogue.
HALF_TILE = {"BLOCK_T": 128, "BLOCK_V": 256, "BLOCK_H": 64, "num_warps": 8, "num_stages": 4}
FLOAT_TILE = {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 32, "num_warps": 8, "num_stages": 3}
KEPT_TILE = {"BLOCK_T": 16, "BLOCK_V": 256, "BLOCK_H": 64, "num_warps": 4, "num_stages": 1}  # no product, only a pass
SPAN_UNIT = HALF_TILE["BLOCK_V"]
MERGE_ROWS, MERGE_TILES = 32, 64
NOTHING = tl.constexpr(-1.0e30)  # stands for a logit that is not there: unlike -inf, times probability 0 it is 0


@triton.jit
def _place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row, column) of a tile. GROUP rows are walked column by column, so that programs that run at the same time share
    rows of the hidden states and of the weight in L2."""
    group = tile // (GROUP * column_tiles)
    rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile % (GROUP * column_tiles)
    return group * GROUP + within % rows, within // rows


@triton.jit
def _logits(
    hidden, weight, row, column, H, inverse_temperature,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    accumulator = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for k in range(0, H, BLOCK_H):
        hidden_tile = hidden.load([row, k])
        weight_tile = weight.load([column, k])
        accumulator = tl.dot(hidden_tile, weight_tile.T, accumulator, input_precision=PRECISION)
    return accumulator * inverse_temperature


@triton.jit(do_not_specialize=["N"])
def statistics_kernel(
    hidden, weight, column_ptr, target_ptr, largest_ptr, total_ptr, weighted_ptr, logits_ptr, logits_stride,
    N, V, H, inverse_temperature,
    ENTROPY: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(N, BLOCK_T), tl.cdiv(V, BLOCK_V)
    row_tile, column_tile = _place(tl.program_id(0), row_tiles, column_tiles, GROUP)
    x = _logits(
        hidden, weight, row_tile * BLOCK_T, column_tile * BLOCK_V, H, inverse_temperature,
        BLOCK_T, BLOCK_V, BLOCK_H, PRECISION,
    )  # fmt: skip
    rows = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    live = rows < N
    if KEEP:
        # 32-bit offsets within the tile: 64-bit ones would not fit the registers beside it.
        corner = logits_ptr + (row_tile * BLOCK_T).to(tl.int64) * logits_stride + column_tile * BLOCK_V
        within = tl.arange(0, BLOCK_T)[:, None] * logits_stride + tl.arange(0, BLOCK_V)[None, :]
        tl.store(corner + within, x, mask=live[:, None] & (columns < V)[None, :])
    target = tl.load(column_ptr + rows, mask=live, other=-1)
    here = (target >= column_tile * BLOCK_V) & (target < (column_tile + 1) * BLOCK_V) & (target < V)
    tl.store(target_ptr + rows, tl.sum(tl.where(columns[None, :] == target[:, None], x, 0.0), 1), mask=live & here)
    x = tl.where((columns < V)[None, :], x, NOTHING)
    largest = tl.max(x, 1)
    x -= largest[:, None]
    e = tl.exp(x)
    slot = column_tile.to(tl.int64) * N + rows
    tl.store(largest_ptr + slot, largest, mask=live)
    tl.store(total_ptr + slot, tl.sum(e, 1), mask=live)
    if ENTROPY:
        tl.store(weighted_ptr + slot, tl.sum(x * e, 1), mask=live)


@triton.jit(do_not_specialize=["N"])
def merge_kernel(
    largest_ptr, total_ptr, weighted_ptr, result_ptr, N, tiles,
    ENTROPY: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < N
    largest = tl.full((ROWS,), NOTHING, tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        slot = tile[:, None].to(tl.int64) * N + rows[None, :]
        mask = (tile < tiles)[:, None] & live[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(largest_ptr + slot, mask=mask, other=NOTHING), 0))
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        slot = tile[:, None].to(tl.int64) * N + rows[None, :]
        mask = (tile < tiles)[:, None] & live[None, :]
        below = tl.load(largest_ptr + slot, mask=mask, other=NOTHING) - largest[None, :]
        scale = tl.exp(below)
        part = tl.load(total_ptr + slot, mask=mask, other=0.0)
        total += tl.sum(part * scale, 0)
        if ENTROPY:
            part_weighted = tl.load(weighted_ptr + slot, mask=mask, other=0.0)
            weighted += tl.sum((part_weighted + below * part) * scale, 0)
    tl.store(result_ptr + rows, largest, mask=live)
    tl.store(result_ptr + N + rows, total, mask=live)
    if ENTROPY:
        tl.store(result_ptr + 3 * N + rows, weighted, mask=live)


@triton.jit(do_not_specialize=["N"])
def grad_logits_kernel(
    hidden, weight, column_ptr, lse_ptr, coefficient_ptr, target_grad_ptr, entropy_ptr, entropy_grad_ptr,
    logits_ptr, logits_stride, out_ptr, out_stride, N, V, H, inverse_temperature,
    ENTROPY: tl.constexpr, KEPT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row_tiles, column_tiles = tl.cdiv(N, BLOCK_T), tl.cdiv(V, BLOCK_V)
    row_tile, column_tile = _place(tl.program_id(0), row_tiles, column_tiles, GROUP)
    rows = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    live = rows < N
    mask = live[:, None] & (columns < V)[None, :]
    wide_rows = rows[:, None].to(tl.int64)
    if KEPT:
        x = tl.load(logits_ptr + wide_rows * logits_stride + columns[None, :], mask=mask, other=0.0)
    else:
        x = _logits(
            hidden, weight, row_tile * BLOCK_T, column_tile * BLOCK_V, H, inverse_temperature,
            BLOCK_T, BLOCK_V, BLOCK_H, PRECISION,
        )  # fmt: skip
    logp = x - tl.load(lse_ptr + rows, mask=live, other=0.0)[:, None]
    p = tl.exp(logp)
    grad = p * tl.load(coefficient_ptr + rows, mask=live, other=0.0)[:, None]
    if ENTROPY:
        # d entropy / d logit = -p (log p + entropy)
        entropy = tl.load(entropy_ptr + rows, mask=live, other=0.0)
        entropy_grad = tl.load(entropy_grad_ptr + rows, mask=live, other=0.0)
        grad -= p * (logp + entropy[:, None]) * entropy_grad[:, None]
    target = tl.load(column_ptr + rows, mask=live, other=-1)
    target_grad = tl.load(target_grad_ptr + rows, mask=live, other=0.0)
    grad += tl.where(columns[None, :] == target[:, None], target_grad[:, None], 0.0)
    grad *= inverse_temperature
    tl.store(out_ptr + wide_rows * out_stride + columns[None, :], grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def accumulate_kernel(
    grad, weight, total_ptr, total_stride, N, H, V, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """total_NH += grad_NV @ weight_VH. Here BLOCK_V tiles H, the result's columns, and BLOCK_H tiles V, the sum."""
    row_tiles, column_tiles = tl.cdiv(N, BLOCK_T), tl.cdiv(H, BLOCK_V)
    row_tile, column_tile = _place(tl.program_id(0), row_tiles, column_tiles, GROUP)
    rows = row_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    where = total_ptr + rows[:, None].to(tl.int64) * total_stride + columns[None, :]
    mask = (rows < N)[:, None] & (columns < H)[None, :]
    accumulator = tl.load(where, mask=mask, other=0.0)
    for k in range(0, V, BLOCK_H):
        grad_tile = grad.load([row_tile * BLOCK_T, k])
        weight_tile = weight.load([k, column_tile * BLOCK_V])
        accumulator = tl.dot(grad_tile, weight_tile, accumulator)
    tl.store(where, accumulator, mask=mask)


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the products' operands are rounded to: the inputs' type where they share one of 16 bits, else float32."""
    return hidden.dtype if hidden.dtype == weight.dtype and hidden.element_size() == 2 else torch.float32


def _tile(dtype: torch.dtype) -> dict[str, Any]:
    return FLOAT_TILE if dtype == torch.float32 else HALF_TILE


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "tf32"


def _grid(rows: int, columns: int, tile: dict[str, Any]) -> tuple[int]:
    return (triton.cdiv(rows, tile["BLOCK_T"]) * triton.cdiv(columns, tile["BLOCK_V"]),)


def statistics(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    column_N: Tensor,
    temperature: float,
    want_entropy: bool,
    width: int,
    logits_NV: Tensor | None,
) -> Tensor:
    """As in reference.py; the whole vocabulary in one launch, since no logits reach memory unless they are kept."""
    operand = operand_dtype(hidden_NH, weight_VH)
    N, H = hidden_NH.shape
    V = weight_VH.shape[0]
    result = hidden_NH.new_zeros(4, N, dtype=torch.float32)
    if V == 0:
        result[0] = torch.finfo(torch.float32).min
        return result
    tile = _tile(operand)
    tiles = triton.cdiv(V, tile["BLOCK_V"])
    partial = result.new_empty(3 if want_entropy else 2, tiles, N)
    largest, total, weighted = partial[0], partial[1], partial[-1]
    statistics_kernel[_grid(N, V, tile)](
        descriptor(hidden_NH.to(operand), [tile["BLOCK_T"], tile["BLOCK_H"]]),
        descriptor(weight_VH.to(operand), [tile["BLOCK_V"], tile["BLOCK_H"]]),
        column_N.clamp(-1, V).int(), result[2], largest, total, weighted,
        result if logits_NV is None else logits_NV, 0 if logits_NV is None else logits_NV.stride(0),
        N, V, H, 1.0 / temperature,
        ENTROPY=want_entropy, KEEP=logits_NV is not None, GROUP=16, PRECISION=_precision(operand), **tile,
    )  # fmt: skip
    merge_kernel[(triton.cdiv(N, MERGE_ROWS),)](
        largest, total, weighted, result, N, tiles, ENTROPY=want_entropy, ROWS=MERGE_ROWS, TILES=MERGE_TILES
    )
    return result


def grad_logits(
    hidden_NH: Tensor,
    weight_CH: Tensor,
    logits_NC: Tensor | None,
    lse_N: Tensor,
    entropy_N: Tensor | None,
    grad_logprobs_N: Tensor | None,
    grad_entropy_N: Tensor | None,
    grad_lse_N: Tensor | None,
    column_N: Tensor,
    temperature: float,
    out_NC: Tensor,
) -> Tensor:
    """As in reference.py, in the type of hidden_NH."""
    tile = _tile(hidden_NH.dtype) if logits_NC is None else KEPT_TILE
    N, H = hidden_NH.shape
    C = weight_CH.shape[0]
    zero = torch.zeros_like(lse_N)
    target_grad = zero if grad_logprobs_N is None else grad_logprobs_N.contiguous()
    coefficient = (zero if grad_lse_N is None else grad_lse_N) - target_grad
    grad_logits_kernel[_grid(N, C, tile)](
        descriptor(hidden_NH, [tile["BLOCK_T"], tile["BLOCK_H"]]),
        descriptor(weight_CH, [tile["BLOCK_V"], tile["BLOCK_H"]]),
        column_N.clamp(-1, C).int(), lse_N.contiguous(), coefficient, target_grad,
        zero if entropy_N is None else entropy_N.contiguous(),
        zero if grad_entropy_N is None else grad_entropy_N.contiguous(),
        out_NC if logits_NC is None else logits_NC, 0 if logits_NC is None else logits_NC.stride(0),
        out_NC, out_NC.stride(0), N, C, H, 1.0 / temperature,
        ENTROPY=grad_entropy_N is not None, KEPT=logits_NC is not None, GROUP=16,
        PRECISION=_precision(hidden_NH.dtype), **tile,
    )  # fmt: skip
    return out_NC


def accumulate(total_NH: Tensor, grad_NC: Tensor, weight_CH: Tensor) -> None:
    """total += grad @ weight, the total in float32: cuBLAS through torch adds up only in the type of its operands."""
    if grad_NC.dtype == torch.float32:
        total_NH.addmm_(grad_NC, weight_CH)
        return
    N, C = grad_NC.shape
    H = weight_CH.shape[1]
    accumulate_kernel[_grid(N, H, HALF_TILE)](
        descriptor(grad_NC, [HALF_TILE["BLOCK_T"], HALF_TILE["BLOCK_H"]]),
        descriptor(weight_CH, [HALF_TILE["BLOCK_H"], HALF_TILE["BLOCK_V"]]),
        total_NH, total_NH.stride(0), N, H, C, GROUP=16, **HALF_TILE,
    )  # fmt: skip


def linear_logprob(hidden_TH: Tensor, weight_VH: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    kernels = reference if wide(hidden_TH, weight_VH) == torch.float64 else THIS
    return reference.linear_logprob(hidden_TH, weight_VH, *rest, kernels=kernels)


def linear_logprob_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    kernels = reference if wide(*arguments[3:5]) == torch.float64 else THIS
    return reference.linear_logprob_backward(*arguments, kernels=kernels)


__all__ = ["grpo_loss", "linear_logprob", "linear_logprob_backward"]
