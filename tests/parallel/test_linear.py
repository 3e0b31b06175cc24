"""Linears of one rank without Megatron's autograd functions."""

from __future__ import annotations

import pytest
import torch

from r1.parallel.config import ParallelConfig
from r1.parallel.linear import QuickColumnParallelLinear, QuickRowParallelLinear
from r1.parallel.trainer import AdamConfig, Trainer
from r1.parallel.world import join
from tests.parallel.tiny import MODELS

ONE = ParallelConfig()


@pytest.mark.parametrize("model", ["deepseek", "qwen2"])
def test_without_a_gradient_it_is_the_same_function(seed: int, model: str) -> None:
    trainer = Trainer(MODELS[model], ONE, join(ONE), seed=7, adam=AdamConfig())
    kinds, biases = QuickColumnParallelLinear | QuickRowParallelLinear, 0
    linears = [m for m in trainer.chunks[0].modules() if isinstance(m, kinds)]
    assert {type(linear) for linear in linears} == {QuickColumnParallelLinear, QuickRowParallelLinear}
    for linear in linears:
        if linear.bias is not None:
            biases += 1
            linear.bias.data.normal_()
        x = torch.randn(5, 1, linear.weight.shape[1])
        want, _ = linear(x)
        assert want.requires_grad
        with torch.inference_mode():
            got, left = linear(x)
        torch.testing.assert_close(got, want.detach())
        assert left is None
    assert bool(biases) == (model == "qwen2")
