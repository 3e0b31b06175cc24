"""Rank r of a world that is not there: the engine's own model, schedule and optimiser on tensors without data.

Process groups are torch's fake ones and tensors are fake (shapes and types alone), so one CPU process walks through the
training step of any rank of any cluster in seconds. What it walks through is counted: the bytes that are live, by what
they are for; floating point operations; every collective. What the tensors would decide is fixed instead: experts get
equal loads, and gradients are finite.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import apply_factories
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter, tree_map_only

from r1.kernels import grpo
from r1.parallel import optimizer
from r1.parallel import world as worlds
from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.costs import flops_of, workspace_of
from r1.parallel.fp8 import KeepsQuantized
from r1.parallel.loss import Loss, PolicyLoss, PreferenceLoss, SupervisedLoss
from r1.parallel.model import sharded_state
from r1.parallel.packing import MicroBatch
from r1.parallel.trainer import AdamConfig, Trainer

aten = torch.ops.aten
META = torch.device("meta")
FAKE = "cpu:fake,meta:fake"
KINDS = ("parameters", "gradients", "optimizer", "quantized", "activations", "logits", "backward")
HOST = "host"  # what lies in host memory counts by itself


@dataclass(frozen=True)
class Collective:
    """Calls of one operation over one kind of group, and the bytes of this rank's input to all of them."""

    operation: str
    group: str
    size: int
    calls: int
    bytes: int


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


class Ledger(TorchDispatchMode):
    """Counts what passes: storages by the kind of their first tensor, FLOPs, and collectives by group."""

    def __init__(self, sequence_length: int, hollow: bool = False) -> None:
        super().__init__()
        self.hollow = hollow
        self.sequence_length = sequence_length
        self.kind = "parameters"
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak: dict[str, int] = {}
        self.peak_total = 0
        self.largest: Counter[str] = Counter()
        self.kept = 0
        self.flops: Counter[str] = Counter()
        self.calls: dict[tuple[str, str, int], list[int]] = {}
        self.group_names: dict[str, str] = {}
        self.forced_kind: str | None = None
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.hollow:
            if func is aten._local_scalar_dense.default and args[0].is_meta:
                return _value_of(args[0])
            if "device" in kwargs:
                kwargs = {**kwargs, "device": META}
            args = tree_map_only(Tensor, _hollow, args)
            if func is aten.masked_select.default:
                out = args[0].new_empty(self.rows_chosen(args[1]))
            elif func.namespace == "c10d":
                self._collective(func, args, kwargs)
                return _answered(func, args, kwargs)
            else:
                out = func(*args, **kwargs)
        else:
            if func.namespace == "c10d":
                self._collective(func, args, kwargs)
            out = func(*args, **kwargs)
        if count := flops_of(func, args, kwargs, out, self.sequence_length):
            self.flops[func._schema.name.replace("::", ".")] += count
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        if size := workspace_of(func, args):
            kind = "logits" if "logprob" in func._schema.name else self._kind_now()
            self._add(kind, size)
            self._add(kind, -size)
        return out

    rows_chosen: Callable[[Tensor], int] = staticmethod(lambda mask: mask.numel())

    def note(self, tensor: Tensor, kind: str | None = None) -> None:
        """Counts the tensor's storage, if it is new, until nothing refers to it any more."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        kind = kind or self._kind_now()
        cell = [kind, storage.nbytes()]
        self._known[storage] = cell
        self._add(kind, cell[1])
        weakref.finalize(storage, self._forget, cell)

    def relabel(self, tensor: Tensor | None, kind: str) -> None:
        if tensor is not None:
            cell = self._known[tensor.untyped_storage()]
            self._add(cell[0], -cell[1])
            cell[0] = kind
            self._add(kind, cell[1])

    def begin(self, kind: str) -> None:
        """From here on: what comes is `kind`, and the peaks and counts are those of what follows."""
        self.kind = kind
        self.peak_total, self.peak, self.largest = self.total, dict(self.live), Counter(self.live)
        self.flops.clear()
        self.calls.clear()

    def resized(self, storage: Any, size: int) -> None:
        """A storage that was given up or taken back while tensors refer to it, as Megatron's recomputation does."""
        cell = self._known.get(storage)
        if cell is not None:
            self._add(cell[0], size - cell[1])
            cell[1] = size

    @contextlib.contextmanager
    def all_is(self, kind: str) -> Iterator[None]:
        self.forced_kind = kind
        yield
        self.forced_kind = None

    def _kind_now(self) -> str:
        if self.forced_kind:
            return self.forced_kind
        if self.kind == "activations" and torch._C._current_graph_task_id() != -1:
            return "backward"
        return self.kind

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        if kind == HOST:
            self.largest[HOST] = max(self.largest[HOST], self.live[HOST])
            return
        self.total += size
        self.largest[kind] = max(self.largest[kind], self.live[kind])
        if self.total > self.peak_total:
            self.peak_total, self.peak = self.total, dict(self.live)

    def _forget(self, cell: list) -> None:
        self._add(cell[0], -cell[1])

    def _collective(self, func: Any, args: tuple, kwargs: dict) -> None:
        name = func._schema.name.removeprefix("c10d::").strip("_")
        if name in ("monitored_barrier", "barrier"):
            return
        group = next((_group_of(x) for x in (*args, *kwargs.values()) if isinstance(x, torch.ScriptObject)), None)
        which, size = (self.group_names.get(group.group_name, "?"), group.size()) if group is not None else ("?", 0)
        # The second argument of these is what goes out; all others have one.
        at = (
            1
            if name in ("allgather_base", "reduce_scatter_base", "alltoall_base", "allgather", "reduce_scatter")
            else 0
        )
        sent = sum(x.numel() * x.element_size() for x in tree_iter(args[at]) if isinstance(x, Tensor))
        entry = self.calls.setdefault((name, which, size), [0, 0])
        entry[0] += 1
        entry[1] += sent

    def collectives(self) -> list[Collective]:
        return [Collective(*key, *value) for key, value in sorted(self.calls.items())]


def _hollow(x: Tensor) -> Tensor:
    return x if x.is_meta else x.to(META)


def _answered(func: Any, args: tuple, kwargs: dict) -> Any:
    """What the collective returns when it is over, without data."""
    with _disable_current_modes():
        empty = tree_map_only(Tensor, lambda x: torch.empty(0, dtype=x.dtype), args)
        if func is torch.ops.c10d.alltoall_base_.default:
            empty = (*empty[:3], [], [], *empty[5:])  # sizes of the pieces
        answer = func(*empty, **kwargs)
    return (args[0], answer[-1]) if isinstance(answer, tuple) else answer


def _value_of(tensor: Tensor) -> Any:
    """What a tensor without data says when it is asked for its number."""
    return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


def _group_of(box: Any) -> Any:
    return dist.distributed_c10d.ProcessGroup.unbox(box)


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

    ValueError where the layout does not fit the world or the model.
    """
    parallel.data(world_size)
    parallel.check_model(model)
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

    ledger.rows_chosen = lambda mask: mask.shape[1] * model.experts_per_token
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher
    with (
        mock.patch.object(dispatcher, "preprocess", preprocess),
        mock.patch.object(dispatcher, "_maybe_dtoh_and_synchronize", lambda self, point, counts=None: counts),
        mock.patch.object(torch.autograd, "backward", backward),
        mock.patch.object(KeepsQuantized, "quantized", marked_quantized),
        mock.patch.object(optimizer, "host_copy", marked_host_copy),
        mock.patch.object(optimizer, "device_copy", device_copy),
        mock.patch.object(token_dispatcher, "sort_chunks_by_idxs", sort_chunks),
        mock.patch.object(torch.UntypedStorage, "resize_", resize_),
        # Nothing to copy; and fake tensors would remember the storage for ever.
        mock.patch.object(torch.UntypedStorage, "copy_", lambda self, source, non_blocking=False: self),
        mock.patch.object(grpo, "LOGITS_ON_CPU", grpo.LOGITS_ON_GPU),
        mock.patch.object(dist, "all_gather_object", all_gather_object),
        mock.patch.object(dist, "broadcast_object_list", broadcast_object_list),
    ):
        yield
