"""Self-attention for Megatron's layers: multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) and grouped-query
attention, over packed sequences, and one token at a time over a cache. Both call r1.kernels for the core."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from r1.kernels import (
    QuantizedInput,
    append_kv,
    apply_rope,
    fp8_rms_norm,
    gqa_decode,
    grouped_gemm,
    mla_attention,
    mla_decode,
    numerics,
    rms_norm,
    yarn_softmax_scale,
)
from r1.parallel.fp8 import fetch_weight, linears, local_product, rounded_input, rounded_weight
from r1.parallel.linear import parameter_device
from r1.parallel.packing import PackedSequence
from r1.parallel.paging import SCRATCH


@dataclass
class ChunkKeys:
    """What the new tokens of a prefill attend to: keys of whole sequences end to end, their bounds cu_seqlens (int32).

    query_index_T (int64) is each new token's row among the keys, and places_S (int64) where a key lies in the cache,
    page times its size plus offset. Both None where the keys are the new tokens themselves, cached before by nobody.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    query_index_T: Tensor | None = None
    places_S: Tensor | None = None


@dataclass
class CachedStep:
    """T new tokens of cached sequences; travels as `packed_seq_params` in place of a PackedSequence.

    Token t goes to place positions_T[t] (int64; -1: it is not cached) of the sequence whose pages are
    block_table_TM[t] (int32). Without `chunks` it attends to the seq_lens_T[t] (int32) tokens cached there, itself the
    last: one new token of a sequence, or the next ones, as many rows. A layer's cache, `shape` = (pages, page size), is
    made when its first rows come.
    """

    positions_T: Tensor
    block_table_TM: Tensor
    seq_lens_T: Tensor
    rope: tuple[Tensor, Tensor]
    caches: dict[int, tuple[Tensor, ...]]
    shape: tuple[int, int]
    chunks: ChunkKeys | None = None
    padding_mask_BT: None = None

    def store(self, layer: int, *streams: Tensor) -> tuple[Tensor, ...]:
        """The layer's caches, (pages, page size, ...) for each of the streams of rows (T, ...), with these in them."""
        if layer not in self.caches:
            self.caches[layer] = tuple(rows.new_empty(*self.shape, *rows.shape[1:]) for rows in streams)
            for cache in self.caches[layer]:
                cache[SCRATCH] = 0
        for cache, rows in zip(self.caches[layer], streams, strict=True):
            append_kv(cache, rows, self.block_table_TM, self.positions_T)
        return self.caches[layer]

    def keys(self, cache: Tensor, rows: Tensor) -> Tensor:
        """(S, ...): what the chunks attend to, of this cache, to which `rows` were the last to go."""
        assert self.chunks is not None
        if self.chunks.places_S is None:
            return rows
        return cache.flatten(0, 1).index_select(0, self.chunks.places_S)


class _WithGradientOf(torch.autograd.Function):
    """The first argument, with the gradient of the second: the same function computed another way."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class RMSNorm(MegatronModule):
    """Root-mean-square norm over the last axis (arXiv 1910.07467); replicated over tensor-parallel ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(config)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=parameter_device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class QuantizingRMSNorm(RMSNorm):
    """The norm whose result exists in FP8 alone."""

    def forward(self, x: Tensor) -> QuantizedInput:  # type: ignore[override]
        return fp8_rms_norm(x, self.weight, self.eps)


def norm_of_linears(config: Any, of_layer: bool = True) -> type[RMSNorm]:
    """The norm for results that nothing but linears reads. Not in FP8 where Megatron handles the result between the
    two: where it gathers sequence-parallel parts, and where it recomputes the layer's own norms."""
    parallel = config.parallel
    recomputed = of_layer and parallel.recompute == "selective"
    fused = parallel.fp8 == "block" and not recomputed and not config.sequence_parallel
    return QuantizingRMSNorm if fused else RMSNorm


class _SelfAttention(MegatronModule):
    """What the two kinds share: context-parallel gathering, the output projection, Megatron's calling convention."""

    def __init__(self, config: Any, layer_number: int, pg_collection: ProcessGroupCollection | None) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.model = config.model
        self.heads = self.model.num_heads // self.groups.tp.size()
        self.linears = linears(config.parallel)
        self.exact = config.parallel.numerics == "exact"

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients; ours are made with the rest."""

    def _column(self, in_size: int, out_size: int, bias: bool = False) -> Any:
        return self.linears.column(
            in_size,
            out_size,
            config=self.config,
            init_method=self.config.init_method,
            bias=bias,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.groups.tp,
        )

    def _row(self, in_size: int, out_size: int) -> Any:
        return self.linears.row(
            in_size,
            out_size,
            config=self.config,
            init_method=self.config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.groups.tp,
        )

    def _whole_stream(self, x_TD: Tensor, packed: PackedSequence) -> Tensor:
        """All tokens of the micro-batch, in stream order, from the parts of the context-parallel ranks."""
        if packed.gather_order_T is None:
            return x_TD
        gathered = gather_from_sequence_parallel_region(x_TD.contiguous(), group=self.groups.cp)
        return gathered.index_select(0, packed.gather_order_T)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, packed_seq_params: Any = None, **unused: Any
    ) -> tuple[Tensor, None]:
        """hidden_states (T, 1, H), sequence-parallel where the layout is; returns the same shape, and no bias."""
        if isinstance(packed_seq_params, CachedStep):
            out_TND = self._attend_cached(hidden_states, packed_seq_params)
        else:
            out_TND = self._attend(hidden_states, packed_seq_params)
        out, _ = self.linear_proj(out_TND.flatten(1).unsqueeze(1))
        return out, None


class MultiHeadLatentAttention(_SelfAttention):
    """MLA: queries and keys of `qk_nope + qk_rope`, values of `v_head_dim`; the cache holds one latent a token.

    The down projections are whole on every tensor-parallel rank and the up projections are split by heads. The rope
    part of the key is shared by all heads, so its gradient is summed over the ranks on the way back.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any = None, pg_collection: Any = None, **unused: Any
    ) -> None:
        super().__init__(config, layer_number, pg_collection)
        m = self.model
        q_width = m.num_heads * m.qk_head_dim
        if m.q_lora_rank:
            self.linear_q_down = self.linears.replicated(config, m.hidden_size, m.q_lora_rank)
            self.q_norm = norm_of_linears(config, of_layer=False)(config, m.q_lora_rank, m.norm_eps)
            self.linear_q_up = self._column(m.q_lora_rank, q_width)
        else:
            self.linear_q_up = self._column(m.hidden_size, q_width)
        self.linear_kv_down = self.linears.replicated(config, m.hidden_size, m.kv_lora_rank + m.qk_rope_head_dim)
        self.kv_norm = RMSNorm(config, m.kv_lora_rank, m.norm_eps)
        self.linear_kv_up = self._column(m.kv_lora_rank, m.num_heads * (m.qk_nope_head_dim + m.v_head_dim))
        self.linear_proj = self._row(m.num_heads * m.v_head_dim, m.hidden_size)
        self.scale = m.qk_head_dim**-0.5
        if m.yarn:
            self.scale *= yarn_softmax_scale(m.yarn.factor, m.yarn.mscale_all_dim)

    def _query_latent(self, hidden: Tensor) -> Tensor:
        return self.linear_q_down(hidden) if self.model.q_lora_rank else hidden

    def _queries(self, latent: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        m = self.model
        x = self.q_norm(latent) if m.q_lora_rank else latent
        q_TND = self.linear_q_up(x)[0].squeeze(1).unflatten(-1, (self.heads, m.qk_head_dim))
        q_nope, q_rope = q_TND.split([m.qk_nope_head_dim, m.qk_rope_head_dim], -1)
        return q_nope, apply_rope(q_rope, *rope, interleaved=True)

    def _latents(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(normalised latent, sequence-parallel as hidden is; rotated key part of all local tokens)."""
        m = self.model
        latent, k_rope = self.linear_kv_down(hidden).split([m.kv_lora_rank, m.qk_rope_head_dim], -1)
        if self.config.sequence_parallel:
            k_rope = gather_from_sequence_parallel_region(k_rope.contiguous(), group=self.groups.tp)
        elif self.groups.tp.size() > 1:
            k_rope = copy_to_tensor_model_parallel_region(k_rope, group=self.groups.tp)
        return self.kv_norm(latent), apply_rope(k_rope, *rope, interleaved=True).squeeze(1)

    def _attend(self, hidden: Tensor, packed: PackedSequence) -> Tensor:
        q_latent = self._query_latent(hidden)
        latent, k_rope_TD = self._latents(hidden, packed.rope)
        if not self.exact:
            return self._attend_expanded(q_latent, latent, k_rope_TD, packed)
        q_TND = self._whole_queries(q_latent, packed)
        with torch.no_grad():
            keys_SD = self._whole_stream(torch.cat([latent.squeeze(1), k_rope_TD], -1), packed)
            out_TND = self._attend_as_decoded(
                q_TND, keys_SD, packed.cu_seqlens, packed.max_seqlen, packed.local_index_T
            )
        if not torch.is_grad_enabled():
            return out_TND
        with numerics("fast"):
            kv = self._keys_and_values(latent, packed)
            return _WithGradientOf.apply(out_TND, self._over_pack(q_TND, kv, k_rope_TD, packed))

    def _attend_expanded(self, q_latent: Tensor, latent: Tensor, k_rope_TD: Tensor, packed: PackedSequence) -> Tensor:
        def expand(q_latent: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
            return self._whole_queries(q_latent, packed), self._keys_and_values(latent, packed)

        if self.config.parallel.recompute != "selective" or not torch.is_grad_enabled():
            return self._over_pack(*expand(q_latent, latent), k_rope_TD, packed)
        # The latents are kept; what the up-projections make of them, ten times as wide, is made again for the backward.
        up = CheckpointWithoutOutput(fp8=self.config.fp8)
        q_TND, kv = up.checkpoint(expand, q_latent, latent)
        out_TND = self._over_pack(q_TND, kv, k_rope_TD, packed)
        up.discard_output_and_register_recompute(out_TND)
        return out_TND

    def _whole_queries(self, q_latent: Tensor, packed: PackedSequence) -> Tensor:
        return torch.cat(self._queries(q_latent, packed.rope), -1)

    def _keys_and_values(self, latent: Tensor, packed: PackedSequence) -> Tensor:
        """Of the whole stream, (S, heads x (Dn + Dv))."""
        if packed.gather_order_T is None:
            return self.linear_kv_up(latent)[0].squeeze(1)
        if self.config.sequence_parallel:
            latent = gather_from_sequence_parallel_region(latent, group=self.groups.tp)
        # The latent is what crosses the network (512 a token, not 128 heads of 256); every rank expands it.
        return self._expand_gathered(self._whole_stream(latent.squeeze(1), packed))

    def _over_pack(self, q_TND: Tensor, kv_SW: Tensor, k_rope_TD: Tensor, packed: PackedSequence) -> Tensor:
        k_rope_SD = self._whole_stream(k_rope_TD, packed)
        return self._over_expanded(q_TND, kv_SW, k_rope_SD, packed.cu_seqlens, packed.max_seqlen, packed.local_index_T)

    def _over_expanded(
        self,
        q_TND: Tensor,
        kv_SW: Tensor,
        k_rope_SD: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        query_index_T: Tensor | None,
    ) -> Tensor:
        m = self.model
        k_SND, v_SND = kv_SW.unflatten(-1, (self.heads, -1)).split([m.qk_nope_head_dim, m.v_head_dim], -1)
        return mla_attention(
            q_TND,
            k_SND,
            v_SND,
            cu_seqlens,
            max_seqlen,
            self.scale,
            k_rope_SD=k_rope_SD,
            query_index_T=query_index_T,
        )

    def _attend_as_decoded(
        self, q_TND: Tensor, keys_SD: Tensor, cu_seqlens: Tensor, max_seqlen: int, query_index_T: Tensor | None
    ) -> Tensor:
        """Over the latents themselves, in the order of decoding: R wide, not expanded for the heads, so that the
        products are 3.4 times as many in V3's attention, and the same bits in rollout and training. The gradient is
        that of the expanded attention, the same function: no backward is that wide."""
        fetch_weight(self.linear_kv_up)
        m, (up_k, up_v) = self.model, self._up()
        q_nope, q_rope = q_TND.split([m.qk_nope_head_dim, m.qk_rope_head_dim], -1)
        out_TNR = mla_attention(
            torch.cat([self._by_head(q_nope, up_k), q_rope], -1),
            keys_SD[:, None],
            keys_SD[:, None, : m.kv_lora_rank],
            cu_seqlens,
            max_seqlen,
            self.scale,
            query_index_T=query_index_T,
        )
        return self._by_head(out_TNR, up_v.transpose(1, 2))

    def _up(self) -> tuple[Tensor, Tensor]:
        """(N, Dn, R) and (N, Dv, R): the up projections of keys and values, as training multiplies by them."""
        up_NDR = rounded_weight(self.linear_kv_up).unflatten(0, (self.heads, -1))
        return up_NDR.split([self.model.qk_nope_head_dim, self.model.v_head_dim], 1)

    def _by_head(self, x_TND: Tensor, weight_NDR: Tensor) -> Tensor:
        """(T, N, R): every head's rows times its own matrix."""
        if not self.exact:
            return torch.einsum("tnd,ndr->tnr", x_TND, weight_NDR)
        T, N, _ = x_TND.shape
        counts = torch.full((N,), T, dtype=torch.int64, device=x_TND.device)
        return grouped_gemm(x_TND.transpose(0, 1).flatten(0, 1), weight_NDR, counts).view(N, T, -1).transpose(0, 1)

    def _expand_gathered(self, latent_TR: Tensor) -> Tensor:
        """The up projection of latents that are already whole: no further gathering, gradient summed over the ranks
        (under sequence parallelism by the gather's reduce-scatter)."""
        if not self.config.sequence_parallel and self.groups.tp.size() > 1:
            latent_TR = copy_to_tensor_model_parallel_region(latent_TR, group=self.groups.tp)
        return local_product(self.linear_kv_up, latent_TR)

    def _attend_cached(self, hidden: Tensor, step: CachedStep) -> Tensor:
        m = self.model
        q_nope, q_rope = self._queries(self._query_latent(hidden), step.rope)
        latent, k_rope_TD = self._latents(hidden, step.rope)
        if self.config.sequence_parallel:
            latent = gather_from_sequence_parallel_region(latent, group=self.groups.tp)
        # Both as the up projection rounds them in training, where keys and values are made of them.
        rows_TD = torch.cat([rounded_input(self.linear_kv_up, latent.squeeze(1)), k_rope_TD], -1)
        (cache,) = step.store(self.layer_number, rows_TD)
        if step.chunks is not None:
            return self._attend_chunks(torch.cat([q_nope, q_rope], -1), step.keys(cache, rows_TD), step.chunks)
        up_k, up_v = self._up()
        out_TNR = mla_decode(
            torch.cat([self._by_head(q_nope, up_k), q_rope], -1),
            cache,
            step.block_table_TM,
            step.seq_lens_T,
            self.scale,
            m.kv_lora_rank,
        )
        return self._by_head(out_TNR, up_v.transpose(1, 2))

    def _attend_chunks(self, q_TND: Tensor, keys_SD: Tensor, chunks: ChunkKeys) -> Tensor:
        where = chunks.cu_seqlens, chunks.max_seqlen, chunks.query_index_T
        if self.exact:
            return self._attend_as_decoded(q_TND, keys_SD, *where)
        latent_SR, k_rope_SD = keys_SD.split([self.model.kv_lora_rank, self.model.qk_rope_head_dim], -1)
        return self._over_expanded(q_TND, local_product(self.linear_kv_up, latent_SR), k_rope_SD, *where)


class GroupedQueryAttention(_SelfAttention):
    """The dense students' attention: `num_heads` queries share `num_kv_heads` keys; Qwen2 has biases on q, k and v."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any = None, pg_collection: Any = None, **unused: Any
    ) -> None:
        super().__init__(config, layer_number, pg_collection)
        m = self.model
        bias = m.architecture == "qwen2"
        self.linear_q = self._column(m.hidden_size, m.num_heads * m.qk_head_dim, bias)
        self.linear_k = self._column(m.hidden_size, m.kv_heads * m.qk_head_dim, bias)
        self.linear_v = self._column(m.hidden_size, m.kv_heads * m.qk_head_dim, bias)
        self.linear_proj = self._row(m.num_heads * m.qk_head_dim, m.hidden_size)
        self.scale = m.qk_head_dim**-0.5

    def _heads_of(self, linear: Any, hidden: Tensor) -> Tensor:
        return linear(hidden)[0].squeeze(1).unflatten(-1, (-1, self.model.qk_head_dim))

    def _qkv(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        q_TND = apply_rope(self._heads_of(self.linear_q, hidden), *rope, interleaved=False)
        k_TMD = apply_rope(self._heads_of(self.linear_k, hidden), *rope, interleaved=False)
        return q_TND, k_TMD, self._heads_of(self.linear_v, hidden)

    def _attend(self, hidden: Tensor, packed: PackedSequence) -> Tensor:
        q_TND, k_TMD, v_TMD = self._qkv(hidden, packed.rope)
        return mla_attention(
            q_TND,
            self._whole_stream(k_TMD, packed),
            self._whole_stream(v_TMD, packed),
            packed.cu_seqlens,
            packed.max_seqlen,
            self.scale,
            query_index_T=packed.local_index_T,
        )

    def _attend_cached(self, hidden: Tensor, step: CachedStep) -> Tensor:
        q_TND, k_TMD, v_TMD = self._qkv(hidden, step.rope)
        k_cache, v_cache = step.store(self.layer_number, k_TMD, v_TMD)
        if step.chunks is None:
            return gqa_decode(q_TND, k_cache, v_cache, step.block_table_TM, step.seq_lens_T, self.scale)
        return mla_attention(
            q_TND,
            step.keys(k_cache, k_TMD),
            step.keys(v_cache, v_TMD),
            step.chunks.cu_seqlens,
            step.chunks.max_seqlen,
            self.scale,
            query_index_T=step.chunks.query_index_T,
        )
