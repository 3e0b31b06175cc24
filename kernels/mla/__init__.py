"""The mla family: packed causal attention for training, and decoding over a paged cache.

Letters: T queries, S keys of the packed stream, N heads, M key heads, D width of q and k, R latent rank; B sequences
that are decoded, each with a row of the block table of M pages.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from r1.kernels.backend import operator, register, require, wide
from r1.kernels.mla import reference, reference_decode

register("mla", "torch", reference, proven_on=("cpu", "cuda"))
register("mla", "cpu", "r1.kernels.mla.cpu", proven_on=("cpu",))
register("mla", "triton", "r1.kernels.mla.triton", proven_on=())
register("mla", "flash_attn", "r1.kernels.mla.flash_attention", proven_on=())


def _attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty(q.shape[:2], dtype=wide(q))


def _attention_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, k_rope, cu_seqlens, ctx.max_seqlen, query_index, ctx.scale, ctx.deterministic = inputs
    ctx.save_for_backward(q, k, v, k_rope, *output, cu_seqlens, query_index)
    ctx.mark_non_differentiable(output[1])


def _attention_backward(ctx: Any, grad: Tensor, _: Any) -> tuple:
    *tensors, cu_seqlens, query_index = ctx.saved_tensors
    dq, dk, dv, dk_rope = _mla_attention_backward(
        grad, *tensors, cu_seqlens, ctx.max_seqlen, query_index, ctx.scale, ctx.deterministic
    )
    return dq, dk, dv, None if tensors[3] is None else dk_rope, *[None] * 5


_mla_attention = operator(
    "mla",
    "mla_attention(Tensor q_TND, Tensor k_SMD, Tensor v_SMD, Tensor? k_rope_SD, Tensor cu_seqlens, SymInt max_seqlen, "
    "Tensor? query_index_T, float scale, bool deterministic) -> (Tensor, Tensor)",
    _attention_fake,
    _attention_save,
    _attention_backward,
)
_mla_attention_backward = operator(
    "mla",
    "mla_attention_backward(Tensor grad_TND, Tensor q_TND, Tensor k_SMD, Tensor v_SMD, Tensor? k_rope_SD, "
    "Tensor out_TND, Tensor lse_TN, Tensor cu_seqlens, SymInt max_seqlen, Tensor? query_index_T, float scale, "
    "bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, k_rope, *_: (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        q.new_empty(0, dtype=wide(q)) if k_rope is None else k_rope.new_empty(k_rope.shape),
    ),
)
_mla_decode = operator(
    "mla",
    "mla_decode(Tensor q_BND, Tensor kv_cache, Tensor block_table_BM, Tensor seq_lens_B, float scale, "
    "SymInt latent_rank) -> Tensor",
    lambda q, cache, table, lens, scale, R: q.new_empty((*q.shape[:2], R)),
)
_gqa_decode = operator(
    "mla",
    "gqa_decode(Tensor q_BND, Tensor k_cache, Tensor v_cache, Tensor block_table_BM, Tensor seq_lens_B, float scale) "
    "-> Tensor",
    lambda q, k, v, *_: q.new_empty((*q.shape[:2], v.shape[3])),
)
_append_kv = operator(
    "mla",
    "append_kv(Tensor(a!) kv_cache, Tensor rows, Tensor block_table_BM, Tensor positions_B) -> ()",
    lambda *_: None,
)


def mla_attention(
    q_TND: Tensor,
    k_SMD: Tensor,
    v_SMDv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    *,
    k_rope_SD: Tensor | None = None,
    query_index_T: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention over sequences packed end to end: out (T, N, Dv), in q's type, softmax in float32.

    q is (T, N, D); k (S, M, D) and v (S, M, Dv) where M divides N (grouped queries). With k_rope_SD, shared by all
    heads (DeepSeek-V2, arXiv 2405.04434), k is (S, M, D - Dr) and the key is [k | k_rope]. cu_seqlens int32 are the
    bounds of the sequences in the key stream, from 0 to S; max_seqlen at least their longest. query_index_T int64 gives
    each query's row in the key stream (default: its own, T = S): a context-parallel rank passes its queries and all
    keys. A query sees the keys of its sequence up to its own row. The result of a row depends on its sequence alone.

    return_lse adds the log-sum-exp of the scaled scores (T, N), which has no gradient. deterministic=False allows a
    backend to add gradients in any order. Raises ValueError for wrong shapes, types or devices.
    """
    require(q_TND.dim() == 3 and q_TND.is_floating_point(), "q_TND", q_TND, "a floating (T, N, D) tensor")
    T, N, D = q_TND.shape
    S = k_SMD.shape[0] if k_SMD.dim() == 3 else -1
    M = k_SMD.shape[1] if k_SMD.dim() == 3 else 0
    if k_rope_SD is not None:
        require(
            k_rope_SD.dim() == 2 and k_rope_SD.shape[0] == S and k_rope_SD.shape[1] < D,
            "k_rope_SD", k_rope_SD, f"a (S, Dr) tensor with S = {S} and Dr < {D}",
        )  # fmt: skip
    own = D - (k_rope_SD.shape[1] if k_rope_SD is not None else 0)
    require(
        k_SMD.dim() == 3 and M > 0 and N % M == 0 and k_SMD.shape[2] == own,
        "k_SMD", k_SMD, f"a (S, M, {own}) tensor whose M divides {N}",
    )  # fmt: skip
    require(v_SMDv.dim() == 3 and v_SMDv.shape[:2] == (S, M), "v_SMDv", v_SMDv, f"a ({S}, {M}, Dv) tensor")
    require(
        cu_seqlens.dim() == 1 and len(cu_seqlens) >= 1 and cu_seqlens.dtype in (torch.int32, torch.int64),
        "cu_seqlens", cu_seqlens, "an int32 (sequences + 1,) tensor",
    )  # fmt: skip
    if query_index_T is None:
        require(T == S, "q_TND", q_TND, f"T = S = {S} without query_index_T")
    else:
        require(
            query_index_T.shape == (T,) and query_index_T.dtype in (torch.int32, torch.int64),
            "query_index_T", query_index_T, f"an int64 ({T},) tensor",
        )  # fmt: skip
    for name, x in (("k_SMD", k_SMD), ("v_SMDv", v_SMDv), ("k_rope_SD", k_rope_SD)):
        require(
            x is None or (x.dtype == q_TND.dtype and x.device == q_TND.device),
            name, x, f"the type and device of q_TND, {q_TND.dtype} on {q_TND.device}",
        )  # fmt: skip
    out, lse = _mla_attention(
        q_TND, k_SMD, v_SMDv, k_rope_SD, cu_seqlens, max_seqlen, query_index_T, float(scale), deterministic
    )
    return (out, lse) if return_lse else out


def _check_decode(q_BND: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor) -> None:
    require(q_BND.dim() == 3 and q_BND.is_floating_point(), "q_BND", q_BND, "a floating (B, N, D) tensor")
    integers = (torch.int32, torch.int64)
    B = q_BND.shape[0]
    require(
        block_table_BM.dim() == 2 and block_table_BM.shape[0] == B and block_table_BM.dtype in integers,
        "block_table_BM", block_table_BM, f"an int32 ({B}, M) tensor",
    )  # fmt: skip
    require(
        seq_lens_B.shape == (B,) and seq_lens_B.dtype in integers, "seq_lens_B", seq_lens_B, f"an int32 ({B},) tensor"
    )
    for name, x in (("block_table_BM", block_table_BM), ("seq_lens_B", seq_lens_B)):
        require(x.device == q_BND.device, name, x, f"a tensor on {q_BND.device}")


def _check_cache(name: str, cache: Tensor, dims: int, q_BND: Tensor) -> None:
    require(
        cache.dim() == dims and cache.shape[-1] == q_BND.shape[2] and cache.is_floating_point()
        and cache.device == q_BND.device,
        name, cache, f"a floating {dims}-dimensional tensor (blocks, block size, ..., {q_BND.shape[2]}) on "
        f"{q_BND.device}",
    )  # fmt: skip


def fp8_latent_bytes(latent_rank: int, rope_width: int) -> int:
    """Bytes of one token in an FP8 cache of latents, a contiguous uint8 tensor (blocks, block size, bytes).

    FlashMLA's format (README of deepseek-ai/FlashMLA, "FP8 with scale"): latent_rank values in float8_e4m3fn, one
    float32 scale for 128 of them, rope_width values in bfloat16; 656 bytes for 512 and 64. Raises ValueError if
    latent_rank is not a positive multiple of 128, or rope_width is odd or negative.
    """
    require(latent_rank > 0 and latent_rank % 128 == 0, "latent_rank", latent_rank, "a positive multiple of 128")
    require(rope_width >= 0 and rope_width % 2 == 0, "rope_width", rope_width, "an even number, 0 or more")
    return latent_rank + latent_rank // 32 + 2 * rope_width


def mla_decode(
    q_BND: Tensor, kv_cache: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float, latent_rank: int
) -> Tensor:
    """One query a sequence against its cached latents (absorbed MLA): out (B, N, R), still in the latent space.

    q is (B, N, R + Dr), the query already taken through the key's up projection, with its rotated part after it.
    kv_cache is (blocks, block size, R + Dr), shared by the heads; R = latent_rank. block_table_BM lists each sequence's
    blocks, seq_lens_B counts its cached tokens, the newest included. What stands beyond them is not read; a length of 0
    gives 0. No gradient. Raises ValueError for wrong shapes or types, and where the Triton backend decodes with exact
    numerics for a block size that is no multiple of 64.

    A contiguous uint8 cache (blocks, block size, fp8_latent_bytes(R, Dr)) is one of FP8 latents. Key and value are then
    the float8 number times its float32 scale, a product in float32 rounded to q's type (float64 for a float64 q), and
    the rope part in q's type; the rest is computed as with a cache that holds these.
    """
    _check_decode(q_BND, block_table_BM, seq_lens_B)
    require(0 < latent_rank <= q_BND.shape[2], "latent_rank", latent_rank, f"1..{q_BND.shape[2]}")
    if kv_cache.dtype == torch.uint8:
        size = fp8_latent_bytes(latent_rank, q_BND.shape[2] - latent_rank)
        require(
            kv_cache.dim() == 3 and kv_cache.shape[2] == size and kv_cache.is_contiguous()
            and kv_cache.device == q_BND.device,
            "kv_cache", kv_cache, f"a contiguous (blocks, block size, {size}) tensor of FP8 latents on {q_BND.device}",
        )  # fmt: skip
    else:
        _check_cache("kv_cache", kv_cache, 3, q_BND)
    return _mla_decode(q_BND, kv_cache, block_table_BM, seq_lens_B, float(scale), latent_rank)


def gqa_decode(
    q_BND: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_BM: Tensor, seq_lens_B: Tensor, scale: float
) -> Tensor:
    """One query a sequence against its cached keys and values: out (B, N, Dv).

    k_cache is (blocks, block size, M, D), v_cache (blocks, block size, M, Dv); M divides N. Else as mla_decode, but
    for FP8: these caches are of floating numbers.
    """
    _check_decode(q_BND, block_table_BM, seq_lens_B)
    _check_cache("k_cache", k_cache, 4, q_BND)
    require(
        v_cache.dim() == 4 and v_cache.shape[:3] == k_cache.shape[:3] and v_cache.is_floating_point(),
        "v_cache", v_cache, f"a floating tensor of shape {(*k_cache.shape[:3], 'Dv')}",
    )  # fmt: skip
    require(q_BND.shape[1] % k_cache.shape[2] == 0, "k_cache", k_cache, f"key heads that divide {q_BND.shape[1]}")
    return _gqa_decode(q_BND, k_cache, v_cache, block_table_BM, seq_lens_B, float(scale))


def append_kv(kv_cache: Tensor, rows: Tensor, block_table_BM: Tensor, positions_B: Tensor) -> None:
    """Writes rows[b] into kv_cache, in place, at position positions_B[b] of the sequence of block_table_BM[b].

    kv_cache is contiguous (blocks, block size, ...), rows (B, ...): latents for MLA, keys or values for GQA.
    Several tokens of one sequence are rows whose table rows are the same. A negative position is left out.
    Raises ValueError for wrong shapes or types, or a position beyond the table.

    Into a uint8 cache, one of FP8 latents (fp8_latent_bytes), go rows (B, R + Dr) of any floating type; R follows from
    their width and a token's bytes. Latents are quantised as by quantize_1x128 (scale amax / 448, 1 for zeros; what is
    infinite saturates, NaN stays and is alone), the rope part is rounded to bfloat16.
    """
    require(kv_cache.dim() >= 3 and kv_cache.is_contiguous(), "kv_cache", kv_cache, "a contiguous (blocks, size, ...)")
    if kv_cache.dtype == torch.uint8:
        _check_fp8_rows(kv_cache, rows)
    else:
        require(
            rows.shape[1:] == kv_cache.shape[2:] and rows.device == kv_cache.device,
            "rows", rows, f"a (B, {', '.join(map(str, kv_cache.shape[2:]))}) tensor on {kv_cache.device}",
        )  # fmt: skip
    B, integers = rows.shape[0], (torch.int32, torch.int64)
    require(
        block_table_BM.dim() == 2 and block_table_BM.shape[0] == B and block_table_BM.dtype in integers,
        "block_table_BM", block_table_BM, f"an int32 ({B}, M) tensor",
    )  # fmt: skip
    require(
        positions_B.shape == (B,) and positions_B.dtype in integers,
        "positions_B",
        positions_B,
        f"an int64 ({B},) tensor",
    )
    for name, x in (("block_table_BM", block_table_BM), ("positions_B", positions_B)):
        require(x.device == kv_cache.device, name, x, f"a tensor on {kv_cache.device}")
    _append_kv(kv_cache, rows.detach(), block_table_BM, positions_B)


def _check_fp8_rows(kv_cache: Tensor, rows: Tensor) -> None:
    require(kv_cache.dim() == 3, "kv_cache", kv_cache, "(blocks, block size, bytes), as uint8 one of FP8 latents")
    size, width = kv_cache.shape[2], rows.shape[1] if rows.dim() == 2 else 0
    R = reference_decode.fp8_latent_rank(width, size)
    require(
        rows.is_floating_point() and rows.device == kv_cache.device
        and 0 < R <= width and R % 128 == 0 and (width - R) % 2 == 0 and fp8_latent_bytes(R, width - R) == size,
        "rows", rows, f"a floating (B, R + Dr) tensor on {kv_cache.device} for {size} = R + R / 32 + 2 Dr bytes of FP8 "
        "latents, R a multiple of 128, Dr even",
    )  # fmt: skip


__all__ = ["append_kv", "fp8_latent_bytes", "gqa_decode", "mla_attention", "mla_decode"]
