"""One token at a time over a cache, through the same modules that train, in every layout that trains.

Sequences of one call advance together. Each pipeline stage runs its layers on all of them in turn; expert-parallel
processes keep step even when one of them has nothing left to do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from r1.kernels import append_kv, linear_logprob, numerics
from r1.kernels.exact import PAGE
from r1.parallel.attention import DecodeStep
from r1.parallel.packing import MicroBatch, PackedSequence, pad_to
from r1.parallel.paging import PagedSequences
from r1.parallel.trainer import Trainer

SMALL_PAGE = 16  # tokens; on a CPU, where pages are gathered whole


class Decoder:
    """A paged cache of `len(prompts)` sequences of at most `max_length` tokens each, and the steps that fill it.

    The MLA models keep the latent alone (kv_lora_rank + rope, a token and a layer). `prompts` are lists of token ids;
    `copies` sequences are made of each, after one prefill, and share the pages that the prompt fills.
    """

    def __init__(self, trainer: Trainer, prompts: list[list[int]], copies: int, max_length: int) -> None:
        trainer.gather_weights()
        self.trainer, self.world = trainer, trainer.world
        self.device = trainer.world.device
        self.chunks = trainer.chunks
        self.max_length = max_length
        self.split = trainer.parallel.tensor if trainer.parallel.sequence else 1
        page_size = PAGE if trainer.parallel.numerics == "exact" or self.device.type == "cuda" else SMALL_PAGE
        self.sequences = PagedSequences([len(p) for p in prompts], copies, max_length, page_size)
        self.table: Tensor | None = None
        self.lengths_B = torch.tensor(self.sequences.lengths, device=self.device)
        self.caches: dict[int, tuple[Tensor, ...]] = {}
        self.last_hidden = self._prefill(prompts, copies)

    @property
    def rows(self) -> int:
        return len(self.sequences.lengths)

    # ------------------------------------------------------------------------------------------------ the steps

    def logits(self, vocab_size: int) -> Tensor | None:
        """Scores (B, vocab_size) float32 of the next token of every sequence; None before the last pipeline stage."""
        if self.last_hidden is None:
            return None
        model = self.chunks[-1]
        logits_BV = model.head(self.last_hidden, lambda h, w: torch.nn.functional.linear(h.float(), w.float()))
        group = model.pg_collection.tp
        if group.size() > 1:
            parts = [torch.empty_like(logits_BV) for _ in range(group.size())]
            dist.all_gather(parts, logits_BV.contiguous(), group=group)
            logits_BV = torch.cat(parts, -1)
        return logits_BV[:, :vocab_size]

    def logprobs(self, tokens_B: Tensor, temperature: float, vocab_size: int) -> Tensor:
        """log p (B) float32 of these tokens after every sequence, made as training makes it. On the last stage."""
        model = self.chunks[-1]
        group = model.pg_collection.tp if model.pg_collection.tp.size() > 1 else None
        with numerics(self.trainer.parallel.numerics):
            return model.head(
                self.last_hidden,
                lambda h, w: linear_logprob(h, w, tokens_B, temperature, tp_group=group, vocab_size=vocab_size),
            )

    def share(self, x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that the last pipeline stage made, on every stage."""
        if self.world.pipeline_size == 1:
            assert x is not None
            return x
        if x is None:
            x = torch.empty(shape, dtype=dtype, device=self.device)
        group = self.world.groups.pp
        dist.broadcast(x.contiguous(), src=dist.get_global_rank(group, self.world.pipeline_size - 1), group=group)
        return x

    def append(self, tokens_B: Tensor) -> None:
        """Put one token (int64) after every sequence and compute the hidden states that follow."""
        rows = self._padded(tokens_B.numel())
        missing = rows - tokens_B.numel()
        changed = self.sequences.append()
        if changed or self.table is None or len(self.table) != rows:
            self.table = self.sequences.table(rows, self.device)
        positions_B = self.lengths_B
        if self.trainer.parallel.expert * self.trainer.parallel.expert_tensor > 1:
            # A finished sequence keeps step with another process's longer ones: its last place is written again.
            positions_B = positions_B.clamp(max=self.max_length - 1)
        positions_B = torch.nn.functional.pad(positions_B, (0, missing))
        step = DecodeStep(
            positions_B=positions_B,
            seq_lens_B=(positions_B + 1).int(),
            block_table_BM=self.table,
            rope=self.trainer.rope_tables(positions_B),
            caches=self.caches,
        )
        hidden = self._run(torch.nn.functional.pad(tokens_B, (0, missing)), step)
        self.lengths_B = self.lengths_B + 1
        self.last_hidden = None if hidden is None else hidden[: self.rows]

    def keep(self, rows: Tensor) -> None:
        """Go on with these sequences only (indices, int64)."""
        self.lengths_B = self.lengths_B[rows]
        self.sequences.keep(rows.tolist())
        self.table = None
        if self.last_hidden is not None:
            self.last_hidden = self.last_hidden[rows]

    # ------------------------------------------------------------------------------------------------ how

    def _padded(self, count: int) -> int:
        """Tokens that go through the model where `count` are wanted: as the layout needs."""
        multiple = self.trainer.parallel.token_multiple
        (common,) = self.trainer.common_lengths([-(-count // multiple) * multiple])
        return common

    def _prefill(self, prompts: list[list[int]], copies: int) -> Tensor | None:
        lengths = torch.tensor([len(p) for p in prompts])
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(self.device)
        tokens_T = torch.tensor([t for p in prompts for t in p], device=self.device)
        batch = MicroBatch(tokens_T, cu_seqlens)
        batch = pad_to(batch, self._padded(tokens_T.numel()))
        positions = torch.cat([torch.arange(n) for n in (batch.cu_seqlens.cpu().diff()).tolist()]).to(self.device)
        packed = PackedSequence(
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=int(batch.cu_seqlens.diff().max()),
            positions_T=positions,
            local_index_T=None,
            gather_order_T=None,
            next_tokens=[],
            padding_mask_BT=None,
            rope=self.trainer.rope_tables(positions),
            caches={},
        )
        hidden = self._run(batch.tokens_T, packed)
        assert packed.caches is not None
        table_TM = self.sequences.table(self.rows, self.device)[::copies].repeat_interleave(lengths.to(self.device), 0)
        self.caches = {
            layer: tuple(self._cache(rows[: tokens_T.numel()], table_TM, positions) for rows in stream)
            for layer, stream in packed.caches.items()
        }
        if hidden is None:
            return None
        return hidden[cu_seqlens[1:].long() - 1].repeat_interleave(copies, 0)

    def _cache(self, rows_T: Tensor, table_TM: Tensor, positions_T: Tensor) -> Tensor:
        """(pages, page size, ...) with these rows of the prompts in their places."""
        sequences = self.sequences
        cache = rows_T.new_empty(len(sequences.pages.holders), sequences.page_size, *rows_T.shape[1:])
        append_kv(cache, rows_T, table_TM, positions_T[: len(rows_T)])
        if sequences.copied:
            sources, targets = torch.tensor(sequences.copied, device=self.device).unbind(1)
            cache.index_copy_(0, targets, cache.index_select(0, sources))
        return cache

    def _run(self, tokens_T: Tensor, packed: Any) -> Tensor | None:
        """Every stage in turn, over every chunk; the hidden states (T, H) on the last stage, None elsewhere."""
        world, group = self.world, self.world.groups.pp
        shape = (tokens_T.numel() // self.split, 1, self.trainer.model_config.hidden_size)
        before = dist.get_global_rank(group, (world.pipeline_rank - 1) % world.pipeline_size)
        after = dist.get_global_rank(group, (world.pipeline_rank + 1) % world.pipeline_size)
        output = None
        for chunk in self.chunks:
            if not chunk.pre_process:
                received = torch.empty(shape, dtype=chunk.config.params_dtype, device=self.device)
                dist.recv(received, src=before, group=group)
                chunk.set_input_tensor(received)
            with numerics(self.trainer.parallel.numerics):
                output = chunk(tokens_T, packed)
            if not chunk.post_process:
                dist.send(output.contiguous(), dst=after, group=group)
        last = self.chunks[-1]
        return last.hidden_of_all_tokens(output) if last.post_process else None
