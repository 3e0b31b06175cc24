"""Decoding in plain torch: queries against a paged cache, and what is written to it.

Letters: B sequences of one new token, N heads, M key heads, D width of q and k, L length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from r1.kernels import exact
from r1.kernels.backend import wide
from r1.kernels.fp8.reference import BLOCK, dequantize, quantize_1x128

MAX_DECODED = 2**20  # tokens that are gathered at a time, of several sequences
MIN_DECODED = 64  # tokens, of the longest of several sequences, below which all are decoded in one batch


def no_room(name: str, value: int, bound: str, block_table_BM: Tensor, block_size: int) -> ValueError:
    width = block_table_BM.shape[1]
    room = f"{width} pages x {block_size} = {width * block_size}"
    return ValueError(f"{name} holds {value}, wanted {bound} the table's {room}")


def checked_lengths(seq_lens_B: Tensor, block_table_BM: Tensor, block_size: int) -> int:
    """How many pages the longest has; ValueError if the table has fewer."""
    longest = int(seq_lens_B.max()) if len(seq_lens_B) else 0
    pages = -(-longest // block_size)
    if pages > block_table_BM.shape[1]:
        raise no_room("seq_lens_B", longest, "at most", block_table_BM, block_size)
    return pages


def checked_positions(positions_B: Tensor, block_table_BM: Tensor, block_size: int) -> None:
    last = int(positions_B.max()) if len(positions_B) else -1
    if last >= block_table_BM.shape[1] * block_size:
        raise no_room("positions_B", last, "less than", block_table_BM, block_size)


class _Alike(NamedTuple):
    """Sequences of like length and where their L cached tokens lie. What is not used is of no sequence: it is set to 0,
    so that what stands in free pages, NaN included, takes no part."""

    rows_B: Tensor | None  # which of the batch, None: all of it
    seq_lens_B: Tensor
    pages: Tensor  # (B L / page size)
    unused_BL: Tensor
    unused: Tensor  # rows of (B L)

    def gather(self, cache: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, L, ...)"""
        rows = cache.index_select(0, self.pages).view(*self.unused_BL.shape, *cache.shape[2:]).to(dtype)
        rows.flatten(0, 1).index_fill_(0, self.unused, 0)
        return rows


# The last batch and its parts: the layers of one step ask for the same.
_last_batch: tuple[Tensor, Tensor, int, list[_Alike]] | None = None


def _parts(block_table_BM: Tensor, seq_lens_B: Tensor, block_size: int) -> list[_Alike]:
    """The batch in parts of like length, so that few of the rows that are gathered are beyond a sequence's end, and not
    too many of them exist at a time."""
    global _last_batch
    if _last_batch is not None:
        table, lens, size, found = _last_batch
        if size == block_size and _same(table, block_table_BM) and _same(lens, seq_lens_B):
            return found
    checked_lengths(seq_lens_B, block_table_BM, block_size)
    # Copies: what is kept must not change with the caller's tensors.
    block_table_BM, seq_lens_B = block_table_BM.clone(), seq_lens_B.clone()
    lengths = seq_lens_B.tolist()
    parts: list[list[int]] = []
    for b in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
        longest = lengths[parts[-1][0]] if parts else 0
        if not parts or 2 * lengths[b] < longest >= MIN_DECODED or (len(parts[-1]) + 1) * longest > MAX_DECODED:
            parts.append([])
        parts[-1].append(b)
    found = []
    for part in parts:
        table, lens, rows_B = block_table_BM, seq_lens_B, None
        if len(parts) > 1:
            rows_B = torch.tensor(part, device=seq_lens_B.device)
            table, lens = (x.index_select(0, rows_B) for x in (table, lens))
        width = -(-lengths[part[0]] // block_size)
        unused_BL = torch.arange(width * block_size, device=lens.device) >= lens[:, None]
        # Entries of the table beyond a sequence's end may hold anything.
        pages = table[:, :width].masked_fill(unused_BL[:, ::block_size], 0).flatten()
        found.append(_Alike(rows_B, lens, pages, unused_BL, unused_BL.flatten().nonzero().squeeze(1)))
    _last_batch = block_table_BM, seq_lens_B, block_size, found
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)


def _softmax(scores: Tensor, unused: Tensor) -> Tensor:
    # The most negative number, not -inf: a sequence of length 0 then averages rows of 0.
    return scores.masked_fill_(unused, torch.finfo(scores.dtype).min).softmax(-1)


def fp8_latent_rank(width: int, size: int) -> int:
    """R of rows of R + Dr numbers that have `size` = R + R / 32 + 2 Dr bytes each; no multiple of 128 if none has."""
    return (2 * width - size) * 32 // 31


def fp8_parts(cache: Tensor, latent_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the tokens (..., bytes) of an FP8 cache: latents (..., R) in e4m3, their scales (..., R / 128) in
    float32, rope parts (..., Dr) in bfloat16."""
    scales = latent_rank + latent_rank // BLOCK * 4
    return (
        cache[..., :latent_rank].view(torch.float8_e4m3fn),
        cache[..., latent_rank:scales].view(torch.float32),
        cache[..., scales:].view(torch.bfloat16),
    )


def _to_fp8(rows_BD: Tensor, size: int) -> Tensor:
    """Rows as an FP8 cache holds them: (B, size) bytes."""
    R = fp8_latent_rank(rows_BD.shape[1], size)
    tokens = rows_BD.new_empty(len(rows_BD), size, dtype=torch.uint8)
    latents, scales, ropes = fp8_parts(tokens, R)
    for part, values in zip((latents, scales), quantize_1x128(rows_BD[:, :R], False)):
        part.copy_(values)
    ropes.copy_(rows_BD[:, R:].float())
    return tokens


def _from_fp8(tokens: Tensor, latent_rank: int, dtype: torch.dtype) -> Tensor:
    """(..., R + Dr) in dtype: latents times their scales, rounded once."""
    latents, scales, ropes = fp8_parts(tokens, latent_rank)
    latents = dequantize(latents.flatten(0, -2), scales.flatten(0, -2), 1, BLOCK, dtype).view(latents.shape)
    return torch.cat([latents, ropes.to(dtype)], -1)


def _exact_decode(q_BND: Tensor, k_BLMD: Tensor, v_BLMD: Tensor, seq_lens_B: Tensor, scale: float) -> Tensor:
    """Exact attention over the cached rows of each sequence."""
    more = max(-(-k_BLMD.shape[1] // exact.KEYS), 1) * exact.KEYS - k_BLMD.shape[1]
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, more)) for x in (k_BLMD, v_BLMD))

    def take(x: Tensor, part: slice, first: int) -> Tensor:
        return x[part, first : first + exact.KEYS]

    q_BMGD = (q_BND.to(k.dtype) * scale).unflatten(1, (k.shape[2], -1))
    keys, values = functools.partial(take, k), functools.partial(take, v)
    out, _ = exact.attention(q_BMGD, seq_lens_B, keys, values, v.shape[3])
    return out.flatten(1, 2).to(q_BND.dtype)


def _decode(
    q_BND: Tensor,
    block_table_BM: Tensor,
    seq_lens_B: Tensor,
    block_size: int,
    width: int,
    attend: Callable[[Tensor, _Alike], Tensor],
) -> Tensor:
    """(B, N, width): what `attend` makes of the queries of each part."""
    parts = _parts(block_table_BM, seq_lens_B, block_size)
    out = q_BND.new_empty(*q_BND.shape[:2], width)
    for part in parts:
        if part.rows_B is None:
            return attend(q_BND, part)
        out.index_copy_(0, part.rows_B, attend(q_BND.index_select(0, part.rows_B), part))
    return out


def mla_decode(
    q_BND: Tensor, kv_cache: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float, latent_rank: int
) -> Tensor:
    dtype, fp8 = wide(q_BND), kv_cache.dtype == torch.uint8

    def attend(q_BND: Tensor, part: _Alike) -> Tensor:
        kv_BLD = part.gather(kv_cache, torch.uint8 if fp8 else dtype)
        if fp8:  # bytes of 0 are numbers of 0
            kv_BLD = _from_fp8(kv_BLD, latent_rank, q_BND.dtype).to(dtype)
        if exact.is_exact():
            kv_BLMD = kv_BLD[:, :, None]
            return _exact_decode(q_BND, kv_BLMD, kv_BLMD[..., :latent_rank], part.seq_lens_B, scale)
        scores_BNL = torch.bmm(q_BND.to(dtype) * scale, kv_BLD.transpose(1, 2))
        return torch.bmm(_softmax(scores_BNL, part.unused_BL[:, None]), kv_BLD[..., :latent_rank]).to(q_BND.dtype)

    return _decode(q_BND, block_table_BM, seq_lens_B, kv_cache.shape[1], latent_rank, attend)


def gqa_decode(
    q_BND: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float
) -> Tensor:
    dtype, M = wide(q_BND), k_cache.shape[2]

    def attend(q_BND: Tensor, part: _Alike) -> Tensor:
        k_BLMD, v_BLMD = part.gather(k_cache, dtype), part.gather(v_cache, dtype)
        if exact.is_exact():
            return _exact_decode(q_BND, k_BLMD, v_BLMD, part.seq_lens_B, scale)
        q_BMGD = (q_BND.to(dtype) * scale).unflatten(1, (M, -1))
        out_BMGD = q_BMGD.new_empty(*q_BMGD.shape[:3], v_BLMD.shape[3])
        for m in range(M):
            # One key head at a time is a batch of strided matrices, which bmm takes as it lies.
            scores_BGL = torch.bmm(q_BMGD[:, m], k_BLMD[:, :, m].transpose(1, 2))
            out_BMGD[:, m] = torch.bmm(_softmax(scores_BGL, part.unused_BL[:, None]), v_BLMD[:, :, m])
        return out_BMGD.flatten(1, 2).to(q_BND.dtype)

    return _decode(q_BND, block_table_BM, seq_lens_B, k_cache.shape[1], v_cache.shape[3], attend)


def append_kv(kv_cache: Tensor, rows: Tensor, block_table_BM: Tensor, positions_B: Tensor) -> None:
    kept = (positions_B >= 0).nonzero().squeeze(1)
    if len(kept) < len(positions_B):
        rows, block_table_BM, positions_B = (x.index_select(0, kept) for x in (rows, block_table_BM, positions_B))
    if not len(kept):
        return
    block_size, positions = kv_cache.shape[1], positions_B.long()
    checked_positions(positions, block_table_BM, block_size)
    page = positions.div(block_size, rounding_mode="floor")
    slot = block_table_BM.gather(1, page[:, None]).squeeze(1).long() * block_size + positions % block_size
    if kv_cache.dtype == torch.uint8:
        rows = _to_fp8(rows, kv_cache.shape[2])
    kv_cache.view(-1, *kv_cache.shape[2:]).index_copy_(0, slot, rows.to(kv_cache.dtype))
