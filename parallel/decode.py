"""The model over a paged cache, through the same modules that train, in every layout that trains.

A prefill takes chunks of texts, a decode step one token of each sequence or the next few. Each pipeline stage runs its
layers on all of them in turn; expert-parallel processes call alike, with nothing of their own where they have nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from r1.kernels import linear_logprob, numerics
from r1.kernels.exact import PAGE
from r1.parallel.attention import CachedStep, ChunkKeys
from r1.parallel.linear import exact_linear
from r1.parallel.paging import SCRATCH, Pages
from r1.parallel.trainer import Trainer

SMALL_PAGE = 8  # tokens; on a CPU, where pages are gathered whole


@dataclass
class Chunk:
    """Tokens of a text whose first `start` are cached, and pages that hold all up to the chunk's end. `next_token` is
    the one that follows, None where it is not known yet."""

    tokens: list[int]
    start: int
    pages: Sequence[int]
    next_token: int | None = None

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


class Decoder:
    """The model's layers over a cache of `tokens` tokens, in whole pages, at least; the memory is taken as layers first
    write to it. The MLA models keep the latent alone (kv_lora_rank + rope, a token and a layer).

    With `drafts` the first multi-token-prediction layer keeps a cache too, and guesses the token after the next.
    """

    def __init__(self, trainer: Trainer, tokens: int, *, drafts: bool = False) -> None:
        if drafts and not trainer.model_config.num_mtp_layers:
            raise ValueError("model.num_mtp_layers is 0, wanted at least 1 to draft tokens")
        self.trainer, self.world = trainer, trainer.world
        self.device = trainer.world.device
        self.chunks = trainer.chunks
        self.drafts = drafts
        self.split = trainer.parallel.tensor if trainer.parallel.sequence else 1
        self.exact = trainer.parallel.numerics == "exact"
        size = PAGE if self.exact or self.device.type == "cuda" else SMALL_PAGE
        self.pages = Pages(1 + -(-tokens // size), size)
        self.caches: dict[int, tuple[Tensor, ...]] = {}
        experts = trainer.parallel.expert * trainer.parallel.expert_tensor
        # Expert-parallel processes exchange tokens in every layer, so all of them run when one does.
        self.in_step = trainer.model_config.is_moe and experts > 1
        self.open()

    @torch.inference_mode(False)
    def open(self) -> None:
        """Before the first step, and the first after the weights have changed. Collective."""
        self.trainer.gather_weights()
        for module in self.trainer.wrapped:
            module.eval()

    @staticmethod
    def room(trainer: Trainer, tokens: int, fraction: float) -> int:
        """How many of `tokens` tokens this fraction of the free memory caches, on the fullest of the processes that
        hold parts of the model. Collective."""
        m, config = trainer.model_config, trainer.chunks[0].config
        width = m.cached_width(trainer.parallel.tensor)
        layers = sum(len(chunk.decoder.layers) for chunk in trainer.chunks) + m.num_mtp_layers
        size = width * layers * config.params_dtype.itemsize
        device, group = trainer.world.device, trainer.world.groups.mp
        if device.type == "cuda":
            # What PyTorch has set aside and nobody uses is free as well.
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + unused
        else:
            free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        found = torch.tensor(min(tokens, int(free * fraction) // size), device=device)
        if group.size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MIN, group=group)
        return max(1, int(found))

    # ------------------------------------------------------------------------------------------------ the steps

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """The chunks into the cache; the hidden state (chunks, H) of the last token of each on the last stage."""
        T = sum(len(chunk.tokens) for chunk in chunks)
        missing = self._padded(T) - T
        tokens_T = self._integers([t for chunk in chunks for t in chunk.tokens], missing)
        positions_T = self._integers([p for chunk in chunks for p in range(chunk.start, chunk.end)], missing, -1)
        step = self._step(positions_T, self._pages_of(chunks, missing)[:, None])
        # A token's table is its own page alone: nothing of a chunk is read through it.
        step.positions_T = torch.where(positions_T < 0, -1, positions_T % self.pages.size)
        step.chunks = self._keys(chunks, missing)
        output, hidden_TH = self._run(tokens_T, step)
        if hidden_TH is None:
            return None
        ends = np.cumsum([len(chunk.tokens) for chunk in chunks], dtype=np.int64)
        if self.drafts:
            ahead_T = tokens_T.roll(-1)
            for end, chunk in zip(ends.tolist(), chunks, strict=True):
                ahead_T[end - 1] = chunk.next_token or 0
            unknown = [e - 1 for e, chunk in zip(ends.tolist(), chunks, strict=True) if chunk.next_token is None]
            written_T = step.positions_T.clone()
            written_T[unknown] = -1
            self._draft(output, ahead_T, replace(step, positions_T=written_T))
        return hidden_TH[torch.from_numpy(ends - 1).to(self.device)]

    def decode(self, tokens_T: Tensor, positions_T: Tensor, block_table_TM: Tensor) -> Tensor | None:
        """Tokens (int64) to these places of their sequences: the hidden states (T, H) that follow, on the last stage.

        Several tokens of one sequence are rows whose places follow one another.
        """
        T = len(tokens_T)
        missing = self._padded(T) - T
        step = self._step(_longer(positions_T, missing), _longer(block_table_TM.int(), missing, SCRATCH))
        _, hidden_TH = self._run(_longer(tokens_T, missing), step)
        return None if hidden_TH is None else hidden_TH[:T]

    def draft(self, hidden_TH: Tensor | None, next_T: Tensor, positions_T: Tensor, table_TM: Tensor) -> Tensor | None:
        """From hidden states at these places and the tokens drawn after them, the hidden states (T, H) that the head
        makes a guess at the token after the next of. On the last stage, and None on the others."""
        T = len(next_T)
        missing = self._padded(T) - T
        if hidden_TH is None:
            return None
        step = self._step(_longer(positions_T, missing), _longer(table_TM.int(), missing, SCRATCH))
        hidden = torch.nn.functional.pad(hidden_TH, (0, 0, 0, missing)).unsqueeze(1)
        if self.split > 1:
            hidden = hidden.chunk(self.split)[self.world.tensor_rank]
        return self._draft(hidden, _longer(next_T, missing), step)[:T]

    @torch.inference_mode()
    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Every layer's page `from` to its page `to`."""
        if pairs:
            sources, targets = torch.tensor(pairs, device=self.device).unbind(1)
            for cache in (cache for layer in self.caches.values() for cache in layer):
                cache.index_copy_(0, targets, cache.index_select(0, sources))

    # ------------------------------------------------------------------------------------------------ what it says

    def logits(self, hidden_TH: Tensor | None, vocab_size: int) -> Tensor | None:
        """Scores (T, vocab_size) float32 of the token that follows; None before the last pipeline stage."""
        if hidden_TH is None:
            return None
        model = self.chunks[-1]
        linear = exact_linear if self.exact else torch.nn.functional.linear
        with numerics(self.trainer.parallel.numerics):
            logits_TV = model.head(hidden_TH, lambda h, w: linear(h.float(), w.float()))
        group = model.pg_collection.tp
        if group.size() > 1:
            parts = [torch.empty_like(logits_TV) for _ in range(group.size())]
            dist.all_gather(parts, logits_TV.contiguous(), group=group)
            logits_TV = torch.cat(parts, -1)
        return logits_TV[:, :vocab_size]

    def logprobs(self, hidden_TH: Tensor, tokens_T: Tensor, temperature: float, vocab_size: int) -> Tensor:
        """log p (T) float32 of these tokens after the hidden states, as training makes it. On the last stage."""
        model = self.chunks[-1]
        group = model.pg_collection.tp if model.pg_collection.tp.size() > 1 else None
        with numerics(self.trainer.parallel.numerics):
            return model.head(
                hidden_TH,
                lambda h, w: linear_logprob(h, w, tokens_T, temperature, tp_group=group, vocab_size=vocab_size),
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

    def agree(self, *flags: bool) -> list[bool]:
        """Which flags are up on any of the processes that run in step."""
        if not self.in_step:
            return list(flags)
        return self._any(flags, self.world.groups.dp_cp)

    def one_replica_agrees(self, *flags: bool) -> list[bool]:
        """Which flags are up on any of the processes that hold parts of this one's model."""
        return self._any(flags, self.world.groups.mp)

    def no_hidden(self) -> Tensor | None:
        """Hidden states (0, H) of nothing, on the last stage."""
        if not self.world.is_last_stage:
            return None
        return torch.empty(
            0, self.trainer.model_config.hidden_size, dtype=self.chunks[-1].config.params_dtype, device=self.device
        )

    # ------------------------------------------------------------------------------------------------ how

    def _any(self, flags: Sequence[bool], group: dist.ProcessGroup) -> list[bool]:
        raised = torch.tensor(flags, dtype=torch.int32, device=self.device)
        if group.size() > 1:
            dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=group)
        return raised.bool().tolist()

    def _padded(self, count: int) -> int:
        """Tokens that go through the model where `count` are wanted: as the layout needs, at least one."""
        multiple = self.trainer.parallel.token_multiple
        (common,) = self.trainer.common_lengths([max(1, -(-count // multiple)) * multiple])
        return common

    def _integers(self, values: Sequence[int], missing: int, fill: int = 0) -> Tensor:
        return torch.tensor([*values, *[fill] * missing], dtype=torch.int64, device=self.device)

    def _pages_of(self, chunks: Sequence[Chunk], missing: int) -> Tensor:
        """(T) int32: the page of every token."""
        parts = [np.asarray(c.pages)[np.arange(c.start, c.end) // self.pages.size] for c in chunks]
        pages = np.concatenate([*parts, np.full(missing, SCRATCH)]).astype(np.int32)
        return torch.from_numpy(pages).to(self.device)

    def _keys(self, chunks: Sequence[Chunk], missing: int) -> ChunkKeys:
        """The padding is one more sequence, of its own keys or as many of the scratch page's."""
        lengths = [chunk.end for chunk in chunks] + ([missing] if missing else [])
        bounds = np.cumsum([0, *lengths])
        keys = ChunkKeys(torch.from_numpy(bounds.astype(np.int32)).to(self.device), max(lengths))
        if any(chunk.start for chunk in chunks):
            size, places, queries = self.pages.size, [], []
            for chunk, bound in zip(chunks, bounds):
                place = np.arange(chunk.end)
                places.append(np.asarray(chunk.pages)[place // size] * size + place % size)
                queries.append(bound + place[chunk.start :])
            places.append(np.full(missing, SCRATCH))
            queries.append(bounds[-1] - missing + np.arange(missing))
            keys.places_S, keys.query_index_T = (
                torch.from_numpy(np.concatenate(x).astype(np.int64)).to(self.device) for x in (places, queries)
            )
        return keys

    def _step(self, positions_T: Tensor, block_table_TM: Tensor) -> CachedStep:
        return CachedStep(
            positions_T=positions_T,
            block_table_TM=block_table_TM,
            seq_lens_T=(positions_T + 1).int(),
            rope=self.trainer.rope_tables(positions_T.clamp(min=0)),
            caches=self.caches,
            shape=(len(self.pages.holders), self.pages.size),
        )

    def _run(self, tokens_T: Tensor, step: CachedStep) -> tuple[Tensor, Tensor | None]:
        """Every stage in turn, over every chunk: (this stage's output, the hidden states (T, H) on the last stage)."""
        world, group = self.world, self.world.groups.pp
        shape = (tokens_T.numel() // self.split, 1, self.trainer.model_config.hidden_size)
        before = dist.get_global_rank(group, (world.pipeline_rank - 1) % world.pipeline_size)
        after = dist.get_global_rank(group, (world.pipeline_rank + 1) % world.pipeline_size)
        output = tokens_T
        for chunk in self.chunks:
            if not chunk.pre_process:
                received = torch.empty(shape, dtype=chunk.config.params_dtype, device=self.device)
                dist.recv(received, src=before, group=group)
                chunk.set_input_tensor(received)
            with torch.inference_mode(), numerics(self.trainer.parallel.numerics):
                output = chunk(tokens_T, step)
            if not chunk.post_process:
                dist.send(output.contiguous(), dst=after, group=group)
        last = self.chunks[-1]
        return output, last.hidden_of_all_tokens(output) if last.post_process else None

    def _draft(self, hidden: Tensor, next_T: Tensor, step: CachedStep) -> Tensor:
        last = self.chunks[-1]
        with torch.inference_mode(), numerics(self.trainer.parallel.numerics):
            return last.hidden_of_all_tokens(last.draft(hidden, next_T, step))


def _longer(x: Tensor, missing: int, fill: int = 0) -> Tensor:
    """`missing` more rows."""
    padding = [0, 0] * (x.dim() - 1) + [0, missing]
    return torch.nn.functional.pad(x, padding, value=fill) if missing else x
