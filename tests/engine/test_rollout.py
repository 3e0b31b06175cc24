"""Rollout in every layout: the same completions on every process, whatever the features."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from r1.engine.rollout import generate
from r1.engine.sampling import Completion, SamplingParameters
from r1.parallel.config import ParallelConfig
from r1.parallel.trainer import Trainer
from r1.parallel.world import join
from tests.parallel.conftest import pools  # noqa: F401
from tests.parallel.tiny import MODELS, VOCABULARY

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="exact numerics by plain torch is for a CPU")

LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "DP2": (2, {}, "deepseek"),
    "TP2": (2, {"tensor": 2}, "deepseek"),
    "TP2 llama": (2, {"tensor": 2}, "llama"),
    "PP2": (2, {"pipeline": 2}, "deepseek"),
    "EP2": (2, {"expert": 2}, "deepseek"),
    "EP2 allgather": (2, {"expert": 2, "dispatcher": "allgather"}, "deepseek"),
    "CP2": (2, {"context": 2}, "deepseek"),
    "EP2 PP2": (4, {"expert": 2, "pipeline": 2}, "deepseek"),
}
SAMPLING = SamplingParameters(20, 1.2, stop_ids=(3, 40, 41), top_p=0.95)
FEATURES = {"max_sequences": 3, "prefill_tokens": 5, "cache_tokens": 128}


def roll_out(model: str, layout: dict[str, Any], prompts: list[list[int]], seed: int) -> list[list[list[Completion]]]:
    """Plain, and with everything that may change nothing; then in two parts, the first cut off at once."""
    # Exact numerics are for tensor = 1; without them tokens are the same all the same, but for ties.
    parallel = ParallelConfig(numerics="fast" if "tensor" in layout else "exact", **layout)
    trainer = Trainer(MODELS[model], parallel, join(parallel), seed=3)
    arguments = trainer, prompts, SAMPLING, 2, seed, VOCABULARY
    features = {**FEATURES, "speculate": bool(MODELS[model].num_mtp_layers)}
    cut = generate(*arguments, seconds=0.0)
    assert all(c.finish_reason == "deadline" for group in cut for c in group)
    return [generate(*arguments), generate(*arguments, **features), generate(*arguments, begun=cut)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_features(name: str, pools: Any, seed: int) -> None:  # noqa: F811
    processes, layout, model = LAYOUTS[name]
    chosen = random.Random(seed)
    prompts = [[chosen.randrange(VOCABULARY) for _ in range(chosen.randint(1, 30))] for _ in range(5)]
    results = pools[processes].run(roll_out, model, layout, prompts, seed)
    join(ParallelConfig())
    plain = results[0][0]
    assert len({len(c.tokens) for group in plain for c in group}) > 2
    for rank, found in enumerate(results):
        for how, completions in zip(("plain", "with features", "continued"), found, strict=True):
            if "tensor" not in layout or how == "plain":
                assert completions == plain, f"{how} on rank {rank}"
            for completion, wanted in zip(sum(completions, []), sum(plain, []), strict=True):
                assert completion.tokens == wanted.tokens
                assert completion.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
    if "tensor" not in layout:
        assert roll_out(model, {}, prompts, seed)[0] == plain, "one process"


def test_more_processes_than_prompts(pools: Any, seed: int) -> None:  # noqa: F811
    """One has nothing of its own, and keeps step."""
    results = pools[2].run(roll_out, "deepseek", {"expert": 2}, [[5, 4, 3]], seed)
    join(ParallelConfig())
    assert results[0] == results[1] and results[0][0] == results[0][1]
