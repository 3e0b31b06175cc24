"""The same weights and data give the same losses, gradients and steps in every layout.

One process is the reference. Each layout runs five optimiser steps of SFT and of GRPO, and two of the other losses, on
the same four micro-batches; the metrics of every step, the whole gradient of the first, and all weights after the last
are compared.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch

from r1.parallel.config import ParallelConfig
from r1.parallel.trainer import Trainer
from r1.parallel.world import join
from tests.parallel.tiny import (
    MODELS,
    Problem,
    add_old_logprobs,
    assemble,
    compare,
    make_problem,
    same_metrics,
    several_steps,
)

TOLERANCE = 1e-4
SEED = random.SystemRandom().randrange(2**31)
STEPS = {"supervised": 5, "policy": 5, "policy_sequence": 2, "preference": 2}
ALL = ("supervised", "policy", "policy_sequence", "preference")

# name: (processes, layout, model, losses)
LAYOUTS: dict[str, tuple[int, dict[str, Any], str, tuple[str, ...]]] = {
    "DP2": (2, {}, "deepseek", ALL),
    "DP2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, "deepseek", ("supervised",)),
    "TP2": (2, {"tensor": 2}, "deepseek", ALL),
    "TP2 recompute": (2, {"tensor": 2, "recompute": "full"}, "deepseek", ("supervised",)),
    "TP2 selective recompute": (2, {"tensor": 2, "recompute": "selective"}, "deepseek", ("supervised",)),
    "CP2 selective recompute": (2, {"context": 2, "recompute": "selective"}, "deepseek", ("supervised",)),
    "TP2 latent": (2, {"tensor": 2}, "latent_dense", ("supervised", "preference")),
    "TP2 latent, whole sequences": (2, {"tensor": 2, "sequence": False}, "latent_dense", ("supervised", "policy")),
    "TP2 llama": (2, {"tensor": 2}, "llama", ("policy",)),
    "TP2 llama, whole sequences": (2, {"tensor": 2, "sequence": False}, "llama", ("supervised",)),
    "TP2 qwen2": (2, {"tensor": 2}, "qwen2", ("supervised",)),
    "TP2 qwen2, whole sequences": (2, {"tensor": 2, "sequence": False}, "qwen2", ("supervised", "preference")),
    "PP2": (2, {"pipeline": 2}, "deepseek", ALL),
    "PP2 qwen2": (2, {"pipeline": 2}, "qwen2", ("supervised", "policy")),
    "PP2 uneven": (2, {"pipeline": 2}, "deepseek_3_layers", ("supervised",)),
    "PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, "deepseek", ALL),
    "PP2 VPP2 laid out": (
        2,
        {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "Et|(t|)*2tmL"},
        "deepseek",
        ("supervised", "policy"),
    ),
    "PP2 VPP2, the MTP layer alone": (
        2,
        {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "Et|tt|t|mL"},
        "deepseek",
        ("supervised",),
    ),
    "EP2": (2, {"expert": 2}, "deepseek", ALL),
    "EP2 overlapped": (2, {"expert": 2, "overlap_shared_experts": True}, "deepseek", ("supervised", "policy")),
    "EP2 hidden": (2, {"expert": 2, "overlap_expert_exchange": True}, "deepseek", ALL),
    "EP2 hidden, selective recompute": (
        2,
        {"expert": 2, "overlap_expert_exchange": True, "recompute": "selective"},
        "deepseek",
        ("supervised",),
    ),
    "TP2 EP2 hidden": (
        2,
        {"tensor": 2, "expert": 2, "overlap_expert_exchange": True},
        "deepseek",
        ("supervised", "policy"),
    ),
    "EP2 PP2 VPP2 hidden": (
        4,
        {"expert": 2, "pipeline": 2, "virtual_pipeline": 2, "overlap_expert_exchange": True},
        "deepseek",
        ("supervised", "policy"),
    ),
    "EP2 allgather": (2, {"expert": 2, "dispatcher": "allgather"}, "deepseek", ("supervised", "policy")),
    "TP2 EP2": (2, {"tensor": 2, "expert": 2}, "deepseek", ("supervised", "policy")),
    "ETP2 allgather": (2, {"expert_tensor": 2, "dispatcher": "allgather"}, "deepseek", ("supervised", "policy")),
    "TP2 ETP2": (2, {"tensor": 2, "expert_tensor": 2}, "deepseek", ("supervised",)),
    "CP2": (2, {"context": 2}, "deepseek", ALL),
    "CP2 llama": (2, {"context": 2}, "llama", ("supervised", "policy_sequence")),
    "CP4": (4, {"context": 4}, "deepseek", ("supervised", "policy")),
    "EP2 ETP2 allgather": (
        4,
        {"expert": 2, "expert_tensor": 2, "dispatcher": "allgather"},
        "deepseek",
        ("supervised",),
    ),
    "TP2 PP2": (4, {"tensor": 2, "pipeline": 2}, "deepseek", ("supervised", "policy")),
    "EP2 PP2": (4, {"expert": 2, "pipeline": 2}, "deepseek", ("supervised", "policy")),
    "DP2 EP2": (4, {"expert": 2}, "deepseek", ("supervised", "policy")),
    "CP2 TP2": (4, {"context": 2, "tensor": 2}, "deepseek", ("supervised", "policy_sequence")),
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    """Four ragged micro-batches (a multiple of every replica count and of the pipeline's)."""
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    sizes = [draw.randint(1, 4) for _ in range(4)]
    lengths = [draw.randint(2, 20) for _ in range(sum(sizes))]
    order = list(range(len(lengths)))
    draw.shuffle(order)
    groups = [[order.pop() for _ in range(size)] for size in sizes]
    problem = make_problem(SEED, lengths, groups)
    add_old_logprobs(problem, Trainer(MODELS["deepseek"], ParallelConfig(), join(ParallelConfig()), seed=7), SEED)
    return problem


@pytest.fixture(scope="module")
def one_process(problem: Problem) -> Any:
    @functools.cache
    def run(model: str, loss: str) -> dict[str, Any]:
        result = several_steps(model, ParallelConfig(), loss, problem.batches(), STEPS[loss])
        return result | {name: assemble(result[name]) for name in ("gradients", "before", "after")}

    return run


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str, pools: Any, problem: Problem, one_process: Any) -> None:
    processes, layout, model, losses = LAYOUTS[name]
    for loss in losses:
        wanted = one_process(model, loss)
        got = pools[processes].run(several_steps, model, ParallelConfig(**layout), loss, problem.batches(), STEPS[loss])
        check_steps(f"seed {SEED}, {name}, {loss}", wanted, got)


def check_steps(title: str, wanted: dict[str, Any], got: list[dict[str, Any]]) -> None:
    try:
        compare(wanted["before"], [rank["before"] for rank in got], 0.0)
        gradients = compare(wanted["gradients"], [rank["gradients"] for rank in got], TOLERANCE)
        for rank in got:
            for ours, theirs in zip(rank["metrics"], wanted["metrics"], strict=True):
                same_metrics(ours, theirs, TOLERANCE)
        change = {key: value - wanted["before"][key] for key, value in wanted["after"].items()}
        weights = compare(wanted["after"], [rank["after"] for rank in got], TOLERANCE * 5, change)
    except AssertionError as error:
        raise AssertionError(f"{title}: {error}") from None
    norms = [round(m["grad_norm"], 4) for m in wanted["metrics"]]
    print(f"{title}: gradients {gradients:.1e}, weights {weights:.1e}, gradient norms {norms}")
    assert all(torch.isfinite(torch.tensor(norms)))
