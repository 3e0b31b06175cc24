"""The combined schedule: that it runs, a forward beside a backward, and what it refuses. That it changes no loss,
gradient or weight is tested with the other layouts."""

from __future__ import annotations

from typing import Any

import pytest

from r1.parallel import overlap
from r1.parallel.config import ParallelConfig
from r1.parallel.model import decoder_config
from r1.parallel.trainer import AdamConfig, Trainer
from r1.parallel.world import join
from tests.parallel.tiny import LOSSES, MODELS, make_problem, own_part

HIDDEN: dict[str, Any] = {"expert": 2, "overlap_expert_exchange": True}


def pieces_run(loss: str) -> list[tuple[bool, bool]]:
    """Collective: for each call of Megatron's layer schedule in a step, whether it had a forward and a backward."""
    parallel = ParallelConfig(**HIDDEN)
    world = join(parallel)
    trainer = Trainer(MODELS["deepseek"], parallel, world, seed=7, adam=AdamConfig())
    problem = make_problem(3, [8] * 6, [[0], [1], [2], [3], [4], [5]])
    batches = problem.batches()
    for batch in batches:
        for name in ("old_logprobs", "reference_logprobs", "rollout_logprobs"):
            batch.fields[name] = batch.fields["advantages"] * 0
    calls: list[tuple[bool, bool]] = []
    plan = overlap.SchedulePlan
    run = plan.run

    def counted(forward: Any, backward: Any, *rest: Any, **options: Any) -> Any:
        calls.append((forward is not None, backward is not None))
        return run(forward, backward, *rest, **options)

    plan.run = staticmethod(counted)
    try:
        trainer.train_step(own_part(batches, world), LOSSES[loss], 1e-3)
    finally:
        plan.run = staticmethod(run)
    return calls


@pytest.mark.parametrize("loss", ["supervised", "policy"])
def test_a_forward_runs_beside_a_backward(loss: str, pools: Any) -> None:
    """Three micro-batches on each of two replicas: one alone, two beside those before, and the last one's backward."""
    for calls in pools[2].run(pieces_run, loss):
        assert calls == [(True, False), (True, True), (True, True), (False, True)]


def test_a_dense_model_goes_without() -> None:
    """A student of a model that has it: Megatron's pieces of a dense layer leave the last norm out."""
    parallel = ParallelConfig(overlap_expert_exchange=True)
    assert not decoder_config(MODELS["llama"], parallel).overlap_moe_expert_parallel_comm
    assert decoder_config(MODELS["deepseek"], ParallelConfig(**HIDDEN)).overlap_moe_expert_parallel_comm


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expert": 1}, "parallel.expert = 1 is not possible with overlap_expert_exchange, wanted 2 or more"),
        ({"expert": 8}, "parallel.expert = 8 .* less than 8"),
        ({"recompute": "full"}, "parallel.recompute = full .* wanted none or selective"),
        ({"dispatcher": "allgather"}, "parallel.dispatcher = allgather"),
        ({"pipeline": 2}, "parallel.virtual_pipeline = 1"),
        ({"overlap_shared_experts": True}, "parallel.overlap_shared_experts = True"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ParallelConfig(**(HIDDEN | changes)).check_model(MODELS["deepseek"])
