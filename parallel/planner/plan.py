"""A whole plan: memory of each pipeline rank by role, time and cost of a step and a stage, a verdict; and the search
for the layout that is fastest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.model import stream_multiple
from r1.parallel.planner.hardware import Device, Hardware
from r1.parallel.planner.memory import BYTES, Step, memory, stage_counts
from r1.parallel.planner.time import RolloutTime, StepTime, flops_per_token, read_time, rollout_time, step_time
from r1.parallel.trainer import AdamConfig

ROLES = (
    "parameters", "gradients", "optimizer", "FP8 copies", "activations", "working", "logits and loss",
    "reference", "reward model", "KV cache", "communication", "fixed", "fragmentation",
)  # fmt: skip
PINNED = 2  # torch allocates page-locked memory in powers of two: at most twice what is asked for


@dataclass(frozen=True)
class Sampled:
    """The rollout of an RL step; lengths in tokens."""

    completions: int
    prompt_tokens: int
    mean_tokens: int
    longest_tokens: int
    steps_per_rollout: int
    max_sequences: int
    cache_tokens: int | None
    speculate: bool


@dataclass(frozen=True)
class Workload:
    """One stage of a run, as far as memory and time go. Without `trains` it only samples."""

    name: str
    model: ModelConfig
    parallel: ParallelConfig
    adam: AdamConfig
    tokens_per_step: int
    tokens_per_micro_batch: int
    sequence_length: int
    steps: int
    trains: bool = True
    value_head: bool = False
    uses_mtp: bool = False
    reference: bool = False
    reward_model: bool = False
    sampled: Sampled | None = None

    def step(self, world_size: int) -> Step:
        data = self.parallel.data(world_size)
        count = max(1, math.ceil(self.tokens_per_step / data / self.tokens_per_micro_batch))
        if self.parallel.virtual_pipeline > 1:
            count = math.ceil(count / self.parallel.pipeline) * self.parallel.pipeline
        multiple = stream_multiple(self.parallel)  # the trainer pads to it
        tokens = -(-self.tokens_per_micro_batch // multiple) * multiple
        return Step(tokens, self.sequence_length, count, self.value_head, self.uses_mtp)


@dataclass
class Plan:
    """Every number in it is a prediction. Bytes of one GPU of each pipeline rank; seconds of one optimiser step."""

    stage: str
    device: str
    gpus: int
    layout: dict[str, Any]
    micro_batches: int
    training: list[dict[str, float]]
    rollout: list[dict[str, float]]
    host_bytes_per_node: float
    device_bytes: float
    seconds: dict[str, float]
    tokens_per_step: int
    tokens_per_second_per_gpu: float
    model_flops_utilization: float
    tflops_per_gpu: float
    steps: int
    gpu_hours: float
    dollars: float
    fits: bool
    verdict: str
    advice: list[str] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """Bytes of the fullest GPU."""
        return max(sum(row.values()) for row in (*self.training, *self.rollout))

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        return {"prediction": True, **asdict(self), "bytes_of_the_fullest_gpu": self.worst}


def make_plan(work: Workload, gpus: int, device_name: str, hardware: Hardware) -> Plan:
    """ValueError, one sentence that says what would fit, where the layout does not divide the GPUs or the model."""
    device = hardware.device(device_name)
    check(work, gpus)
    step = work.step(gpus)
    training, rollout, host = _memory(work, step, gpus, hardware, device_name)
    seconds, flops = _seconds(work, step, gpus, hardware, device)
    total = sum(seconds.values())
    host_per_node = PINNED * host * device.gpus_per_node
    worst = max(sum(row.values()) for row in (*training, *rollout))
    fits = worst <= device.memory_bytes and host_per_node <= device.host_memory_bytes
    tokens = work.tokens_per_step
    return Plan(
        stage=work.name,
        device=device_name,
        gpus=gpus,
        layout={k: v for k, v in work.parallel.model_dump().items()} | {"data": work.parallel.data(gpus)},
        micro_batches=step.micro_batches,
        training=training,
        rollout=rollout,
        host_bytes_per_node=host_per_node,
        device_bytes=device.memory_bytes,
        seconds=seconds,
        tokens_per_step=tokens,
        tokens_per_second_per_gpu=tokens / total / gpus,
        model_flops_utilization=flops / total / gpus / device.bf16_flops,
        tflops_per_gpu=flops / total / gpus / 1e12,
        steps=work.steps,
        gpu_hours=total * work.steps * gpus / 3600,
        dollars=total * work.steps * gpus / 3600 * device.dollars_per_hour,
        fits=fits,
        verdict=_verdict(worst, host_per_node, device),
    )


def check(work: Workload, gpus: int) -> None:
    """ValueError where this cannot run on so many GPUs, whatever their memory."""
    p = work.parallel
    p.check_model(work.model)
    unit = math.lcm(p.tensor * p.pipeline * p.context, p.expert * p.expert_tensor * p.pipeline)
    if gpus % unit:
        below, above = gpus // unit * unit, (gpus // unit + 1) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"gpus = {gpus} does not divide by {unit}, which tensor {p.tensor} x pipeline {p.pipeline} x context"
            f" {p.context} and expert {p.expert} x expert_tensor {p.expert_tensor} x pipeline {p.pipeline} need:"
            f" {near} would fit"
        )
    check_length(work.model, work.sequence_length)


def check_length(model: ModelConfig, length: int) -> None:
    """ValueError where a sequence of `length` tokens is longer than the model takes."""
    longest = model.max_positions
    if length > longest:
        raise ValueError(
            f"sequence length {length} exceeds the model's max_positions = {longest}: at most {longest} would fit"
        )


def _memory(
    work: Workload, step: Step, gpus: int, hardware: Hardware, device_name: str
) -> tuple[list[dict[str, float]], list[dict[str, float]], float]:
    p, allowance = work.parallel, hardware.memory
    frozen = _frozen(work)
    copies = _copies(work.model, p, mtp_runs=work.sampled is not None and work.sampled.speculate)
    fixed = {"fixed": allowance.fixed_bytes, "communication": allowance.communication_bytes if gpus > 1 else 0.0}
    training: list[dict[str, float]] = []
    rollout: list[dict[str, float]] = []
    host = 0.0
    static: list[dict[str, float]] = []
    if work.trains:
        for own in memory(work.model, p, work.adam, step, gpus):
            static.append(
                {
                    "parameters": own.parameters,
                    "gradients": own.gradients,
                    "optimizer": own.optimizer,
                    "FP8 copies": own.quantized,
                }
            )
            training.append(
                static[-1]
                | {
                    "activations": own.activations,
                    "working": own.working,
                    "logits and loss": own.logits,
                    "fragmentation": allowance.fragmentation * own.moving,
                }
                | fixed
            )
            host = max(host, own.host)
    else:
        static = [{"parameters": x} for x in _weights(work.model, p)]
    room = hardware.device(device_name).memory_bytes
    for rank, row in enumerate(static):
        others = {role: sizes[rank] for role, sizes in frozen.items()}
        if training:
            training[rank] |= others
        if work.sampled:
            held = row | {"FP8 copies": copies[rank]} | others | fixed
            free = max(0.0, room - sum(held.values()))
            rollout.append(held | {"KV cache": min(_cache(work, gpus, rank), free / 2)})
    return training, rollout, host


def _weights(model: ModelConfig, parallel: ParallelConfig, value_head: bool = False) -> list[float]:
    """Bytes of a model's weights, by pipeline rank."""
    counts, p = stage_counts(model, parallel, value_head), parallel.pipeline
    return [BYTES[parallel.dtype] * sum(c.dense + c.experts for c in counts[rank::p]) for rank in range(p)]


def _copies(
    model: ModelConfig, parallel: ParallelConfig, value_head: bool = False, mtp_runs: bool = False
) -> list[float]:
    """Bytes of their FP8 copies, both ways."""
    counts, p = stage_counts(model, parallel, value_head, mtp_runs), parallel.pipeline
    size = 2.0 if parallel.fp8 == "block" else 0.0
    return [size * sum(c.quantized for c in counts[rank::p]) for rank in range(p)]


def _frozen(work: Workload) -> dict[str, list[float]]:
    frozen = {}
    for role, there, value_head in (("reference", work.reference, False), ("reward model", work.reward_model, True)):
        if there:
            parts = (of(work.model, work.parallel, value_head) for of in (_weights, _copies))
            frozen[role] = [sum(pair) for pair in zip(*parts)]
    return frozen


def _cache(work: Workload, gpus: int, rank: int) -> float:
    """The cache that a replica's sequences want at their longest; the engine takes at most half of what is free."""
    m, p, s = work.model, work.parallel, work.sampled
    assert s is not None
    at_once = min(s.max_sequences, math.ceil(s.completions * s.steps_per_rollout / (p.data(gpus) * p.context)))
    layers = sum(letters.count("t") + letters.count("m") for letters in p.stages(m)[rank :: p.pipeline])
    tokens = s.cache_tokens or at_once * (s.prompt_tokens + s.longest_tokens)
    return tokens * BYTES[p.dtype] * m.cached_width(p.tensor) * layers


def _seconds(
    work: Workload, step: Step, gpus: int, hardware: Hardware, device: Device
) -> tuple[dict[str, float], float]:
    """Seconds of a step by part, and its model FLOPs."""
    m, p = work.model, work.parallel
    seconds: dict[str, float] = {}
    flops = 0.0
    if work.trains:
        moments = 2 * BYTES[work.adam.moments]
        t: StepTime = step_time(m, p, step, gpus, hardware, device, moments, work.adam.offload)
        seconds |= {
            "compute": t.compute + t.memory,
            "tensor parallel": t.tensor,
            "context parallel": t.context,
            "expert exchange": t.exchange,
            "pipeline bubble": t.bubble,
            "data parallel": t.data,
            "optimizer": t.optimizer,
        }
        flops += t.flops * work.tokens_per_step
        # Old log-probabilities by the policy, and those of the frozen models.
        reads = (1 if work.sampled else 0) + work.reference + work.reward_model
        if reads:
            seconds["log-probabilities"] = reads * read_time(m, p, step, gpus, hardware, device)
            flops += reads * work.tokens_per_step * flops_per_token(m, work.sequence_length, False, forward=True)
    if work.sampled:
        s = work.sampled
        r: RolloutTime = rollout_time(
            m, p, gpus, hardware, device,
            completions=s.completions, prompt_tokens=s.prompt_tokens, mean_tokens=s.mean_tokens,
            longest_tokens=s.longest_tokens, steps_per_rollout=s.steps_per_rollout, max_sequences=s.max_sequences,
            speculate=s.speculate,
        )  # fmt: skip
        seconds |= {"rollout": r.total - r.sync, "weight sync": r.sync}
        flops += s.completions * (s.prompt_tokens + s.mean_tokens) * flops_per_token(m, s.mean_tokens, False, True)
    return seconds, flops


def _verdict(worst: float, host: float, device: Device) -> str:
    if worst > device.memory_bytes:
        return f"does not fit: {worst / 1e9:.1f} GB on the fullest GPU, which has {device.memory_bytes / 1e9:.0f}"
    if host > device.host_memory_bytes:
        room = device.host_memory_bytes / 1e12
        return f"does not fit: {host / 1e12:.2f} TB of host memory on a node, which has {room:.1f}"
    return f"fits: {worst / 1e9:.1f} of {device.memory_bytes / 1e9:.0f} GB on the fullest GPU"


# ------------------------------------------------------------------------------------------------------------- search


def _changed(work: Workload, **layout: Any) -> Workload:
    return replace(work, parallel=work.parallel.model_copy(update=layout))


def layouts(work: Workload, gpus: int, device: Device) -> Iterator[Workload]:
    """Every layout worth a look: powers of two; tensor parallelism within a node, stages that are not empty."""
    m, powers = work.model, [2**i for i in range(12)]
    for tensor in (x for x in powers if x <= device.gpus_per_node):
        for pipeline in (x for x in powers if x <= min(32, m.num_layers, gpus // tensor)):
            for context in (x for x in powers if x <= min(16, gpus // tensor // pipeline)):
                for expert in [x for x in powers if x <= gpus // pipeline] if m.is_moe else [1]:
                    for virtual in (1, 2, 4) if pipeline > 1 else (1,):
                        for recompute in ("none", "selective", "full"):
                            yield _changed(
                                work, tensor=tensor, pipeline=pipeline, context=context, expert=expert,
                                overlap_expert_exchange=work.parallel.overlap_expert_exchange and recompute != "full",
                                overlap_shared_experts=work.parallel.overlap_shared_experts and expert > 1,
                                expert_tensor=1, virtual_pipeline=virtual, recompute=recompute, pipeline_layout="",
                            )  # fmt: skip


def search(
    work: Workload, gpus: int, device_name: str, hardware: Hardware, progress: Callable[[Any], Any] = iter
) -> list[tuple[Workload, Plan]]:
    """The ten fastest layouts that fit, fastest first. `progress` wraps the candidates, as rich's track does."""
    device = hardware.device(device_name)
    found: list[tuple[Workload, Plan]] = []
    for candidate in progress(list(layouts(work, gpus, device))):
        try:
            plan = make_plan(candidate, gpus, device_name, hardware)
        except ValueError:
            continue
        if plan.fits:
            found.append((candidate, plan))
    found.sort(key=lambda pair: pair[1].step_seconds)
    return found[:10]
