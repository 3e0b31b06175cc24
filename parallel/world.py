"""Joins (or makes) the torchrun world and lays Megatron's process groups over it."""

from __future__ import annotations

import atexit
import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from r1.parallel import bridge, hang, watchdog
from r1.parallel.config import ParallelConfig

_current: ParallelConfig | None = None


@dataclass(frozen=True)
class World:
    """Where this process stands. Rollout divides its prompts over `groups.dp_cp`, the processes that can hold different
    ones: data-parallel replicas and, since decoding needs no context split, context-parallel ranks."""

    rank: int
    size: int
    device: torch.device
    groups: ProcessGroupCollection
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int
    tensor_size: int
    pipeline_size: int
    context_size: int
    data_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def world_size() -> int:
    """The number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(parallel: ParallelConfig, seed: int = 0) -> World:
    """Join the world in this layout; ValueError where it does not divide. Called again it changes the layout."""
    global _current
    parallel.data(world_size())
    bridge.install()
    on_gpu = torch.cuda.is_available()
    uneven = parallel.expert_tensor > 1 and (parallel.expert > 1 or parallel.expert_tensor > parallel.tensor)
    if not on_gpu and uneven and parallel.dispatcher == "alltoall":
        raise ValueError(
            f"parallel.dispatcher = alltoall with expert_tensor = {parallel.expert_tensor} and expert ="
            f" {parallel.expert} gathers uneven parts, which gloo cannot: on a CPU use dispatcher = allgather"
        )
    if not dist.is_initialized():
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        hang.record_collectives()
        seconds = parallel.timeout_seconds + watchdog.GRACE_SECONDS
        backend = "nccl" if on_gpu else "gloo"
        rank, size = int(os.environ.get("RANK", "0")), world_size()
        store = watchdog.meet(seconds) if "RANK" in os.environ else dist.HashStore()
        watchdog.start(store, rank, size, parallel.timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
        atexit.register(leave)
    if _current is None or not parallel_state.model_parallel_is_initialized() or _layout(parallel) != _layout(_current):
        _forget_layout()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            distributed_timeout_minutes=math.ceil((parallel.timeout_seconds + watchdog.GRACE_SECONDS) / 60),
            create_gloo_process_groups=on_gpu and dist.get_backend() != "gloo",
        )
        _current = parallel.model_copy()
    model_parallel_cuda_manual_seed(seed)
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        context_rank=parallel_state.get_context_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        tensor_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_size=parallel_state.get_context_parallel_world_size(),
        data_size=parallel_state.get_data_parallel_world_size(),
    )


def _forget_layout() -> None:
    """Megatron only drops its groups; each still has a gloo thread that wakes a hundred times a second."""
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def leave() -> None:
    """Give the process groups back; the next `join` makes new ones."""
    global _current
    watchdog.stop()
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    _current = None


def _layout(parallel: ParallelConfig) -> tuple[int, ...]:
    return (
        parallel.tensor,
        parallel.pipeline,
        parallel.virtual_pipeline,
        parallel.context,
        parallel.expert,
        parallel.expert_tensor,
    )
