"""Rank r of a world that is not there: the engine's own model, schedule and optimiser on tensors without data.

Process groups are torch's fake ones and tensors are on its meta device (shapes and types alone), so one CPU process
walks through the training step of any rank of any cluster in seconds, while a ledger counts. What data would decide is
fixed instead: experts get equal loads, and gradients are finite.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import apply_factories
from megatron.core.pipeline_parallel.utils import ScheduleNode
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from r1.kernels import grpo
from r1.parallel import optimizer
from r1.parallel import world as worlds
from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.fp8 import KeepsQuantized
from r1.parallel.ledger import HOST, KINDS, META, Collective, Ledger
from r1.parallel.loss import Loss, PolicyLoss, PreferenceLoss, SupervisedLoss
from r1.parallel.model import sharded_state
from r1.parallel.packing import MicroBatch
from r1.parallel.trainer import AdamConfig, Trainer

FAKE = "cpu:fake,meta:fake"  # process groups' backends


@dataclass
class DryRun:
    """What one rank of the step did. Bytes are those of tensors, without an allocator's rounding or fragmentation."""

    rank: int
    world_size: int
    pipeline_rank: int
    parameters: int  # of this rank
    tensors: dict[str, int]  # elements of each tensor of the whole model that this rank has a part of
    micro_batches: int
    flops: int
    flops_by_operator: dict[str, int]
    memory: dict[str, int]  # what is live when the step is over
    peak: dict[str, int]  # by kind, at the moment of the largest sum
    kept: int  # most activations that waited for a backward, before one began
    largest: dict[str, int]  # of each kind by itself, at any moment
    host: int  # most bytes in host memory
    collectives: list[Collective] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        return sum(self.peak.values())

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@contextlib.contextmanager
def fake_world(rank: int, size: int) -> Iterator[None]:
    """This process is rank `rank` of `size`, whose other ranks answer at once and with nothing."""
    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process that has not joined a world")
    real_new_group = dist.new_group
    absent = dist.distributed_c10d.GroupMember.NON_GROUP_MEMBER

    def new_group(ranks: Any = None, *rest: Any, **options: Any) -> Any:
        # Every rank makes every group; where it is no member it only has to be told so.
        if ranks is not None and rank not in ranks:
            return absent
        options.pop("timeout", None)
        return real_new_group(ranks, backend=FAKE)

    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(size), "RANK": str(rank)}):
        dist.init_process_group(FAKE, store=FakeStore(), rank=rank, world_size=size)
        with mock.patch.object(dist, "new_group", new_group):
            try:
                yield
            finally:
                worlds.leave()


def dry_run(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    rank: int,
    world_size: int,
    adam: AdamConfig,
    kind: Literal["supervised", "policy", "preference"],
    sequence_length: int,
    tokens_per_micro_batch: int,
    micro_batches: int,
) -> DryRun:
    """One training step of rank `rank` under a loss of this kind (preference: a reward model's, with its head):
    `micro_batches` of `tokens_per_micro_batch` tokens, in sequences of `sequence_length` tokens.

    ValueError where the layout does not fit the world or the model, or asks what only data could answer.
    """
    parallel.data(world_size)
    parallel.check_model(model)
    for axis, wanted in (("numerics", "fast"), ("dispatcher", "alltoall"), ("expert_tensor", 1)):
        value = getattr(parallel, axis)
        if value != wanted and (model.is_moe or axis == "numerics"):
            raise ValueError(f"a dry run cannot have parallel.{axis} = {value}, wanted {wanted}")
    ledger = Ledger(sequence_length, hollow=True)
    with fake_world(rank, world_size):
        world = replace(worlds.join(parallel), device=META)
        ledger.group_names = _names_of(world)
        with _decided(ledger, model), ledger:
            trainer = Trainer(model, parallel, world, adam=None, value_head=kind == "preference")
            chunks = trainer.chunks
            parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
            tensors = _whole_tensors(trainer)
            ledger.kind = "optimizer"
            trainer.adam = adam
            trainer._make_trainable(adam)
            for wrapped in trainer.wrapped:
                for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
                    ledger.relabel(buffer.param_data, "parameters")
                    ledger.relabel(buffer.grad_data, "gradients")
            ledger.begin("activations")
            batches = [_micro_batch(tokens_per_micro_batch, sequence_length, kind) for _ in range(micro_batches)]
            trainer.train_step(batches, _loss(kind, model.vocab_size), 1e-6)
            held = dict(ledger.live)
    return DryRun(
        rank=rank,
        world_size=world_size,
        pipeline_rank=world.pipeline_rank,
        parameters=parameters,
        tensors=tensors,
        micro_batches=micro_batches,
        flops=sum(ledger.flops.values()),
        flops_by_operator=dict(ledger.flops),
        memory={k: held.get(k, 0) for k in KINDS},
        peak={k: ledger.peak.get(k, 0) for k in KINDS},
        largest={k: ledger.largest.get(k, 0) for k in KINDS},
        kept=ledger.kept,
        host=ledger.largest[HOST],
        collectives=ledger.collectives(),
    )


def _whole_tensors(trainer: Trainer) -> dict[str, int]:
    sizes = {}
    for state in sharded_state(trainer.chunks, trainer.world).values():
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor):
                sizes[tensor.key] = math.prod(tensor.global_shape)
    return sizes


def _loss(kind: str, vocab_size: int) -> Loss:
    if kind == "preference":
        return PreferenceLoss()
    return SupervisedLoss(vocab_size) if kind == "supervised" else PolicyLoss(vocab_size, kl_coefficient=0.001)


def _micro_batch(tokens: int, sequence_length: int, kind: str) -> MicroBatch:
    count = -(-tokens // sequence_length)
    bounds = [min(i * sequence_length, tokens) for i in range(count + 1)]
    names = {"supervised": ["weights"], "policy": ["weights", "advantages", "old_logprobs", "reference_logprobs"]}
    fields = {name: torch.zeros(tokens) for name in names.get(kind, [])}
    fields["targets"] = torch.zeros(tokens, dtype=torch.long)
    of_sequences = {}
    if kind == "preference":
        of_sequences = {name: torch.zeros(count) for name in ("label", "sequence_weights")}
        of_sequences["partner"] = torch.zeros(count, dtype=torch.long)
    bounds_S = torch.tensor(bounds, dtype=torch.int32)
    return MicroBatch(torch.zeros(tokens, dtype=torch.long), bounds_S, fields, of_sequences)


def _names_of(world: worlds.World) -> dict[str, str]:
    """Which axis of the layout a process group is for, by torch's name of it."""
    names: dict[str, str] = {dist.distributed_c10d._get_default_group().group_name: "world"}
    # Megatron has several names for some groups, in no order.
    for axis, group in sorted(vars(world.groups).items(), key=lambda item: (len(item[0]), item[0])):
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(group.group_name, axis)
    return names


@contextlib.contextmanager
def _decided(ledger: Ledger, model: ModelConfig) -> Iterator[None]:
    """Fixes what data would decide: every expert is chosen equally often."""

    def preprocess(self: Any, routing_map: Tensor) -> Tensor:
        """As the dispatcher's, for equal loads: the same exchange of counts, then numbers that need no data."""
        rows = routing_map.shape[0] * self.config.moe_router_topk
        gather_from_sequence_parallel_region(routing_map.sum(dim=0).long(), group=self.tp_ep_group)
        with _disable_current_modes():
            share = torch.full((self.num_experts,), rows // self.num_experts)
            share[: rows % self.num_experts] += 1
            own = share[self.local_expert_indices]
            self.num_out_tokens = rows
            self.input_splits = share.view(self.ep_size, -1).sum(1).numpy()
            self.output_splits = own.sum().expand(self.ep_size).numpy()
            self.output_splits_tp = (own.sum() * self.ep_size).expand(self.tp_size).numpy()
            self.num_global_tokens_per_local_expert = own.expand(self.tp_size * self.ep_size, -1)
            return own * (self.tp_size * self.ep_size)

    resize = torch.UntypedStorage.resize_

    def resize_(self: Any, size: int) -> Any:
        ledger.resized(self, size)
        return resize(self, size)

    def sort_chunks(rows: Tensor, *_: Any, probs: Tensor | None = None, **options: Any) -> tuple:
        """The dispatcher's copy of its rows in another order, without the few hundred pieces that it cuts them in."""
        order = torch.zeros(len(rows), dtype=torch.long)
        return rows.index_select(0, order), None if probs is None else probs.index_select(0, order)

    def all_gather_object(objects: list, own: Any, group: Any = None) -> None:
        objects[:] = [own] * len(objects)

    def broadcast_object_list(objects: list, *rest: Any, **options: Any) -> None:
        objects[:] = [[{}] if x is None else x for x in objects]  # the last stage's metrics

    quantized, host_copy = KeepsQuantized.quantized, optimizer.host_copy

    def marked_quantized(self: Any) -> Any:
        with ledger.all_is("quantized"):
            return quantized(self)

    def marked_host_copy(x: Tensor) -> Tensor:
        with ledger.all_is(HOST):
            return host_copy(x)

    def device_copy(x: Tensor, device: torch.device) -> Tensor:
        with ledger.all_is("optimizer"):
            return torch.empty_like(x)

    run_backward = torch.autograd.backward

    def backward(*args: Any, **options: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # not one within another, as recomputation has
            ledger.kept = max(ledger.kept, ledger.live["activations"])
        run_backward(*args, **options)

    piece_backward = ScheduleNode._backward

    def backward_of_piece(self: Any, *gradients: Any) -> Any:  # in the combined schedule
        ledger.kept = max(ledger.kept, ledger.live["activations"])
        return piece_backward(self, *gradients)

    ledger.rows_chosen = lambda mask: mask.shape[1] * model.experts_per_token
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    with (
        mock.patch.object(dispatcher, "preprocess", preprocess),
        mock.patch.object(dispatcher, "_maybe_dtoh_and_synchronize", lambda self, point, counts=None: counts),
        mock.patch.object(torch.autograd, "backward", backward),
        mock.patch.object(ScheduleNode, "_backward", backward_of_piece),
        mock.patch.object(KeepsQuantized, "quantized", marked_quantized),
        mock.patch.object(optimizer, "host_copy", marked_host_copy),
        mock.patch.object(optimizer, "device_copy", device_copy),
        mock.patch.object(token_dispatcher, "sort_chunks_by_idxs", sort_chunks),
        mock.patch.object(torch.UntypedStorage, "resize_", resize_),
        # Nothing to copy.
        mock.patch.object(torch.UntypedStorage, "copy_", lambda self, source, non_blocking=False: self),
        mock.patch.object(grpo, "LOGITS_ON_CPU", grpo.LOGITS_ON_GPU),
        mock.patch.object(dist, "all_gather_object", all_gather_object),
        mock.patch.object(dist, "broadcast_object_list", broadcast_object_list),
    ):
        yield
