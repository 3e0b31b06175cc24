"""What the tests of the parallel layer share: small models, ragged samples, and looking at whole gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import apply_factories

from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.loss import PolicyLoss, PreferenceLoss, SupervisedLoss, TokenLogprobs
from r1.parallel.model import data_shape, sharded_state
from r1.parallel.packing import MicroBatch
from r1.parallel.trainer import AdamConfig, Trainer
from r1.parallel.world import World, join

VOCABULARY = 90  # tokens in use; the models' embeddings have 96 rows

# A standard deviation of 0.1 makes attention, routing and gates matter; at 0.02 a tiny model is almost linear.
_SHARED = {"vocab_size": 96, "num_layers": 4, "num_heads": 4, "max_positions": 64, "init_std": 0.1}
_LATENT = _SHARED | {
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
MODELS = {
    "deepseek": ModelConfig(
        **_LATENT,
        num_dense_layers=1,
        num_experts=8,
        experts_per_token=2,
        num_shared_experts=1,
        expert_hidden_size=16,
        num_expert_groups=4,
        groups_per_token=2,
        routed_scaling_factor=2.5,
        expert_bias_update_speed=0.001,
        num_mtp_layers=1,
        mtp_loss_weight=0.3,
    ),
    "latent_dense": ModelConfig(**_LATENT),
    "llama": ModelConfig(**_SHARED, architecture="llama", hidden_size=32, ffn_hidden_size=64, num_kv_heads=2),
    "qwen2": ModelConfig(
        **_SHARED, architecture="qwen2", hidden_size=32, ffn_hidden_size=64, num_kv_heads=2, tie_embeddings=True
    ),
}
MODELS["deepseek_3_layers"] = MODELS["deepseek"].model_copy(update={"num_layers": 3})

LOSSES = {
    "supervised": SupervisedLoss(VOCABULARY),
    "policy": PolicyLoss(VOCABULARY, temperature=0.9, kl_coefficient=0.05, importance_cap=2.0),
    "policy_sequence": PolicyLoss(
        VOCABULARY, clip_low=0.05, clip_high=0.08, kl_coefficient=0.05, ratio="sequence", importance_cap=2.0
    ),
    "preference": PreferenceLoss(),
}

# eps is large beside the gradients of these models, so that an update is almost proportional to the gradient and
# rounding in a gradient near zero is not blown up to a whole step, as Adam's sign-like first steps would.
ADAM = AdamConfig(eps=0.05, weight_decay=0.01)
LEARNING_RATE = 0.02


@dataclass
class Sample:
    """One sequence, what each of its tokens carries, and (a chosen answer) the index of its rejected partner."""

    tokens: torch.Tensor
    fields: dict[str, torch.Tensor]
    partner: int = -1
    label: float = -1.0
    weight: float = 0.0


@dataclass
class Problem:
    """The same step for every layout: samples, and which of them make up each micro-batch."""

    samples: list[Sample]
    groups: list[list[int]] = field(default_factory=list)

    def batches(self, groups: list[list[int]] | None = None) -> list[MicroBatch]:
        return [pack_samples(self.samples, group) for group in groups or self.groups]


def pack_samples(samples: list[Sample], group: list[int]) -> MicroBatch:
    """The micro-batch of these samples in this order; a pair must lie in one group."""
    chosen = [samples[i] for i in group]
    lengths = torch.tensor([s.tokens.numel() for s in chosen])
    where = {index: place for place, index in enumerate(group)}
    return MicroBatch(
        tokens_T=torch.cat([s.tokens for s in chosen]),
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        fields={name: torch.cat([s.fields[name] for s in chosen]) for name in chosen[0].fields},
        sequence_fields={
            "partner": torch.tensor([where[s.partner] if s.partner >= 0 else -1 for s in chosen]),
            "label": torch.tensor([s.label for s in chosen]),
            "sequence_weights": torch.tensor([s.weight for s in chosen]),
        },
    )


def make_problem(seed: int, lengths: list[int], groups: list[list[int]]) -> Problem:
    """Random samples of these lengths. Fields as the losses want them; half of each sequence is prompt."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for length in lengths:
        tokens = torch.randint(0, VOCABULARY, (length,), generator=generator)
        weights = torch.zeros(length)
        weights[length // 2 - 1 : length - 1] = 1.0
        advantage = float(torch.randn((), generator=generator))
        samples.append(
            Sample(
                tokens,
                {
                    "targets": tokens.roll(-1),
                    "weights": weights,
                    "advantages": torch.full((length,), advantage),
                },
            )
        )
    total = sum(float(s.fields["weights"].sum()) for s in samples)
    for s in samples:
        s.fields["weights"] /= total
    for group in groups:
        # Pairs of neighbours; what is left over is judged alone.
        for place, index in enumerate(group):
            s = samples[index]
            s.weight = float(torch.rand((), generator=generator)) / len(samples)
            if place % 2 == 0 and place + 1 < len(group):
                s.partner = group[place + 1]
            elif place == len(group) - 1 and place % 2 == 0:
                s.label = float(index % 3 == 0)
    return Problem(samples, groups)


def add_old_logprobs(problem: Problem, trainer: Trainer, seed: int) -> None:
    """Old, reference and rollout log-probabilities: the model's own (one process), disturbed."""
    generator = torch.Generator().manual_seed(seed + 1)
    for sample in problem.samples:
        sample.fields.update({n: torch.zeros(sample.tokens.numel()) for n in ("old_logprobs",)})
    order = list(range(len(problem.samples)))
    rows_T2 = trainer.read(problem.batches([order]), TokenLogprobs(VOCABULARY))[0]
    parts = rows_T2[:, 0].split([s.tokens.numel() for s in problem.samples])
    for sample, logprobs in zip(problem.samples, parts, strict=True):
        for name, spread in (("old_logprobs", 0.2), ("reference_logprobs", 0.3), ("rollout_logprobs", 0.25)):
            sample.fields[name] = logprobs + spread * torch.randn(logprobs.shape, generator=generator)


def own_part(batches: list[MicroBatch], world: World) -> list[MicroBatch]:
    """This replica's micro-batches of a step."""
    return batches[world.data_rank :: world.data_size]


# ------------------------------------------------------------------------------------------- whole tensors from shards

Piece = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


def pieces(trainer: Trainer) -> list[Piece]:
    """(name in the whole model, whole shape, offset, slice) of every weight of this process."""
    trainer.gather_weights()
    found = []
    for state in sharded_state(trainer.chunks, trainer.world).values():
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and tensor.data is not None:
                data = tensor.data.detach().reshape(data_shape(tensor)).clone()
                found.append((tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset), data))
    return found


@torch.no_grad()
def gradient_pieces(trainer: Trainer) -> list[Piece]:
    """The summed gradients, as `pieces`. They lie in Megatron's buffers, where after the reduction each data-parallel
    process is right about its own part only; the parts are gathered and put in the weights' places for a moment."""
    parameters = [p for chunk in trainer.chunks for p in chunk.parameters()]
    before = [p.detach().clone() for p in parameters]
    for wrapped in trainer.wrapped:
        for group in (*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups):
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                own = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather(list(bucket.grad_data.chunk(ranks.size())), own, group=ranks)
    for p in parameters:
        p.data.copy_(p.main_grad)
    buffers = {name for chunk in trainer.chunks for name, _ in chunk.named_buffers()}
    found = [piece for piece in pieces(trainer) if not any(piece[0].endswith(b.split(".")[-1]) for b in buffers)]
    for p, value in zip(parameters, before, strict=True):
        p.data.copy_(value)
    return found


def assemble(parts: list[Piece]) -> dict[str, torch.Tensor]:
    """Whole tensors from one process that holds everything."""
    whole = {}
    for key, shape, offset, data in parts:
        target = whole.setdefault(key, torch.full(shape, float("nan"), dtype=data.dtype))
        _slice(target, offset, data).copy_(data)
    return whole


def _slice(whole: torch.Tensor, offset: tuple[int, ...], data: torch.Tensor) -> torch.Tensor:
    for axis, (start, size) in enumerate(zip(offset, data.shape, strict=True)):
        whole = whole.narrow(axis, start, size)
    return whole


def compare(reference: dict[str, torch.Tensor], ranks: list[list[Piece]], tolerance: float, scale: Any = None) -> float:
    """Every slice on every process against the whole tensor: |difference| <= tolerance × the tensor's largest value
    (of `scale` where given; then a few units in the last place of the tensor itself are allowed too). All of every
    tensor must be held by someone. Returns the largest relative difference."""
    seen = {key: torch.zeros(value.shape, dtype=torch.bool) for key, value in reference.items()}
    worst, where = 0.0, ""
    for rank, parts in enumerate(ranks):
        for key, shape, offset, data in parts:
            assert key in reference, f"{key} is not in the one-process model"
            assert shape == tuple(reference[key].shape), key
            size = float((scale or reference)[key].abs().max())
            error = float((_slice(reference[key], offset, data).double() - data.double()).abs().max())
            if scale is not None:
                error = max(0.0, error - 4 * torch.finfo(data.dtype).eps * float(reference[key].abs().max()))
            relative = error / size if size else (0.0 if error == 0.0 else float("inf"))
            if not relative <= worst:
                worst, where = relative, f"{key}[{offset}] on rank {rank}: {error} beside {size}"
            _slice(seen[key], offset, data).fill_(True)
    missing = [key for key, mask in seen.items() if not mask.all()]
    assert not missing, f"no process holds all of {missing}"
    assert worst <= tolerance, f"relative difference {worst:.2e} at {where}"
    return worst


def same_metrics(got: dict[str, float], wanted: dict[str, float], tolerance: float) -> None:
    """To a relative tolerance, but of the sum of the terms' sizes where terms of both signs may cancel: a policy's
    loss, whose weights add up to 1, and the k1 estimates, whose sizes the k2 sum bounds (Cauchy-Schwarz)."""
    assert got.keys() == wanted.keys()
    scales = {"loss": 1.0}
    if "kl_k1_sum" in wanted:
        scales["kl_k1_sum"] = (2 * wanted["token_count"] * wanted["kl_k2_sum"]) ** 0.5
    for name, value in wanted.items():
        room = max(tolerance * scales.get(name, 0.0), 1e-7)
        assert got[name] == pytest.approx(value, rel=tolerance, abs=room), name


# ------------------------------------------------------------------------------------------------------ several steps


def several_steps(
    model: str, parallel: ParallelConfig, loss: str, batches: list[MicroBatch], steps: int = 5
) -> dict[str, Any]:
    """Collective: the metrics of some optimiser steps on the same data, the first one's gradients, and the weights
    before and after."""
    world = join(parallel)
    trainer = Trainer(MODELS[model], parallel, world, seed=7, adam=ADAM, value_head=loss == "preference")
    before = pieces(trainer)
    gradients: list[list[Piece]] = []
    trainer.optimizer.step = functools.partial(_step, trainer.optimizer.step, trainer, gradients)
    metrics = [trainer.train_step(own_part(batches, world), LOSSES[loss], LEARNING_RATE) for _ in range(steps)]
    return {"metrics": metrics, "gradients": gradients[0], "before": before, "after": pieces(trainer)}


def _step(step: Any, trainer: Trainer, gradients: list[list[Piece]]) -> Any:
    if not gradients:
        gradients.append(gradient_pieces(trainer))
    return step()
