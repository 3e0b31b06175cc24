"""A micro-batch as the model sees it: sequences laid end to end, split over context-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from r1.parallel.world import World


@dataclass
class MicroBatch:
    """S sequences packed end to end into T tokens, on this process's device; what one forward sees.

    tokens_T int64; cu_seqlens int32 (S + 1); `fields` holds further tensors of T elements (targets, weights, …),
    and `sequence_fields` tensors of S elements. The same on every process of one data-parallel replica.
    """

    tokens_T: Tensor
    cu_seqlens: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)
    sequence_fields: dict[str, Tensor] = field(default_factory=dict)


def pad_to(batch: MicroBatch, length: int) -> MicroBatch:
    """The same micro-batch with `length` tokens: the padding is one more sequence whose fields are zero."""
    missing = length - batch.tokens_T.numel()
    if missing == 0:
        return batch
    if missing < 0:
        raise ValueError(f"length = {length} is shorter than the micro-batch's {batch.tokens_T.numel()} tokens")
    end = batch.cu_seqlens.new_tensor([length])
    return MicroBatch(
        tokens_T=torch.nn.functional.pad(batch.tokens_T, (0, missing)),
        cu_seqlens=torch.cat([batch.cu_seqlens, end]),
        fields={name: torch.nn.functional.pad(x, (0, missing)) for name, x in batch.fields.items()},
        sequence_fields=batch.sequence_fields,
    )


def empty_like(batch: MicroBatch) -> MicroBatch:
    """A micro-batch of one token that counts for nothing, with the same fields."""
    fields = {name: x.new_zeros(1) for name, x in batch.fields.items()}
    fields["padding"] = torch.ones_like(batch.tokens_T[:1], dtype=torch.bool)
    # −1: neither a pair nor a labelled text.
    blanks = {name: 0 if name == "sequence_weights" else -1 for name in batch.sequence_fields}
    return MicroBatch(
        tokens_T=batch.tokens_T.new_zeros(1),
        cu_seqlens=batch.cu_seqlens.new_tensor([0, 1]),
        fields=fields,
        sequence_fields={name: x.new_full((1,), blanks[name]) for name, x in batch.sequence_fields.items()},
    )


@dataclass
class PackedSequence:
    """What every layer needs to know of the micro-batch. It travels as Megatron's `packed_seq_params`, which passes
    through the layers untouched; cos and sin are made once for all of them.

    Under context parallelism the stream of T tokens is cut into 2·cp chunks and rank r holds chunks r and 2·cp−1−r,
    so that causal work is even. `local_index_T` gives the stream position of every local token.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    positions_T: Tensor
    local_index_T: Tensor | None
    gather_order_T: Tensor | None
    next_tokens: list[Tensor]
    padding_mask_BT: Tensor | None
    rope: tuple[Tensor, Tensor]

    def local(self, x_T: Tensor) -> Tensor:
        """The part of a whole-stream tensor (T first) that this context-parallel rank holds."""
        return x_T if self.local_index_T is None else x_T.index_select(0, self.local_index_T)


def pack(
    batch: MicroBatch, world: World, rope_tables: Callable[[Tensor], tuple[Tensor, Tensor]], mtp_depth: int = 0
) -> PackedSequence:
    """Positions, context-parallel split and rotary tables of a micro-batch whose length divides by 2·cp."""
    T = batch.tokens_T.numel()
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long()
    starts_T = torch.repeat_interleave(batch.cu_seqlens[:-1].long(), lengths, output_size=T)
    stream_T = torch.arange(T, device=batch.tokens_T.device)
    positions_T = stream_T - starts_T
    local_index, order = context_split(T, world)
    ends_T = starts_T + torch.repeat_interleave(lengths, lengths, output_size=T)
    next_tokens = []
    for depth in range(1, mtp_depth + 1):
        ahead = (stream_T + depth).clamp(max=max(T - 1, 0))
        next_tokens.append(torch.where(stream_T + depth < ends_T, batch.tokens_T[ahead], 0))
    packed = PackedSequence(
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=int(lengths.max()) if lengths.numel() else 0,
        positions_T=positions_T,
        local_index_T=local_index,
        gather_order_T=order,
        next_tokens=next_tokens,
        padding_mask_BT=None,
        rope=(positions_T, positions_T),
    )
    packed.positions_T = packed.local(positions_T)
    packed.next_tokens = [packed.local(x) for x in next_tokens]
    packed.rope = rope_tables(packed.positions_T)
    if "padding" in batch.fields:
        packed.padding_mask_BT = packed.local(batch.fields["padding"].bool())[None]
    return packed


def context_split(T: int, world: World) -> tuple[Tensor | None, Tensor | None]:
    """(stream positions held by this rank, order that restores the stream from all ranks' parts one after another);
    (None, None) without context parallelism."""
    ways = world.context_size
    if ways == 1:
        return None, None
    if T % (2 * ways):
        raise ValueError(f"a micro-batch of {T} tokens does not divide by 2 x context = {2 * ways}")
    chunks = torch.arange(T, device=world.device).view(2 * ways, -1)
    parts = [torch.cat([chunks[r], chunks[2 * ways - 1 - r]]) for r in range(ways)]
    return parts[world.context_rank], torch.cat(parts).argsort()
