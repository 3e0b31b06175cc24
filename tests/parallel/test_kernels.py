"""A training step with the Triton kernels in their places, in Triton's interpreter, against one with plain torch."""

from __future__ import annotations

import random

import pytest
import torch

from r1.parallel.config import ParallelConfig
from r1.parallel.trainer import Trainer
from r1.parallel.world import join
from tests.parallel.tiny import (
    MODELS,
    add_old_logprobs,
    assemble,
    compare,
    make_problem,
    same_metrics,
    several_steps,
)

pytest.importorskip("triton")

from tests.kernels import interpreter  # noqa: F401 (mends the interpreter)

SEED = random.SystemRandom().randrange(2**31)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted only where there is no GPU")
@pytest.mark.parametrize("loss", ["supervised", "policy", "policy_sequence"])
def test_a_step_with_the_triton_kernels(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(SEED, [9, 17, 4], [[0, 1, 2]])
    add_old_logprobs(problem, Trainer(MODELS["deepseek"], ParallelConfig(), join(ParallelConfig()), seed=7), SEED)
    plain = several_steps("deepseek", ParallelConfig(), loss, problem.batches(), steps=1)
    monkeypatch.setenv("R1_KERNELS", "grpo=triton,moe=triton,mla=triton,norm=triton,optim=triton")
    triton = several_steps("deepseek", ParallelConfig(), loss, problem.batches(), steps=1)
    same_metrics(triton["metrics"][0], plain["metrics"][0], 1e-5)
    error = compare(assemble(plain["gradients"]), [triton["gradients"]], 1e-4)
    print(f"seed {SEED}, {loss}: {error:.1e}")
