"""One training step: its gradient against the loss's own slope, its update against AdamW written out, its refusals."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from r1.parallel.checkpoint import copy_weights
from r1.parallel.config import ParallelConfig
from r1.parallel.loss import PolicyLoss, SupervisedLoss, TokenLogprobs
from r1.parallel.moe import Experts
from r1.parallel.trainer import AdamConfig, Trainer
from r1.parallel.world import join
from tests.parallel.tiny import (
    LOSSES,
    MODELS,
    VOCABULARY,
    Problem,
    add_old_logprobs,
    assemble,
    gradient_pieces,
    make_problem,
    own_part,
    pieces,
)

SEED = random.SystemRandom().randrange(2**31)
ONE = ParallelConfig()


@pytest.fixture(scope="module")
def problem() -> Problem:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    problem = make_problem(SEED, [draw.randint(4, 20) for _ in range(6)], [[0, 1], [2, 3, 4], [5]])
    add_old_logprobs(problem, Trainer(MODELS["deepseek"], ONE, join(ONE), seed=7), SEED)
    return problem


def _trainer(model: str = "deepseek", **adam: Any) -> Trainer:
    return Trainer(MODELS[model], ONE, join(ONE), seed=7, adam=AdamConfig(**adam))


@pytest.mark.parametrize("overlap", [False, True])
def test_experts_add_to_the_main_gradients(overlap: bool, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the backward, micro-batch by micro-batch, what Megatron's hooks would add after it."""
    parallel = ParallelConfig(overlap_grad_reduce=overlap)

    def gradients() -> list[torch.Tensor]:
        trainer = Trainer(MODELS["deepseek"], parallel, join(parallel), seed=7, adam=AdamConfig(clip_grad=0.0))
        trainer.train_step(problem.batches(), SupervisedLoss(VOCABULARY), 0.0)
        experts = [m for m in trainer.chunks[0].modules() if isinstance(m, Experts)]
        added = {p.grad_added_to_main_grad for m in experts for p in (m.gate_up, m.down)}
        assert added == {bool(experts[0].main_gradients())}
        total = [p.main_grad.clone() for p in trainer.chunks[0].parameters()]
        # Buffers may be cleared between a forward and its backward, as they may with Megatron's linears.
        x = torch.randn(5, MODELS["deepseek"].hidden_size)
        out = experts[0](x, torch.tensor([5, *[0] * (len(experts[0].gate_up) - 1)]), torch.rand(5))[0]
        for wrapped in trainer.wrapped:
            wrapped.zero_grad_buffer()
        out.sum().backward()
        return [*total, experts[0].gate_up.main_grad.clone(), experts[0].down.main_grad.clone()]

    torch.manual_seed(SEED)
    own = gradients()
    torch.manual_seed(SEED)
    monkeypatch.setattr(Experts, "main_gradients", lambda self: None)
    for a, b in zip(own, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_the_slope_of_the_loss(loss: str, problem: Problem) -> None:
    # Every token visits every expert: which ones it visits is a jump that no gradient knows of.
    everywhere = {"experts_per_token": 8, "groups_per_token": 4, "expert_bias_update_speed": 0.0}
    config = MODELS["deepseek"].model_copy(update=everywhere)
    trainer = Trainer(config, ONE, join(ONE), seed=7, adam=AdamConfig(clip_grad=0.0), value_head=loss == "preference")

    function = LOSSES[loss]
    if isinstance(function, PolicyLoss):
        # Where a clip begins the slope jumps; tests/kernels/test_grpo.py knows on which side it is.
        function = dataclasses.replace(function, clip_low=1.0, clip_high=1e6, ratio_max=None, importance_cap=None)

    def objective() -> float:
        metrics = trainer.train_step(problem.batches(), function, 0.0)
        return metrics["loss"] + config.mtp_loss_weight * metrics.get("mtp_loss_1", 0.0)

    objective()
    parameters = list(trainer.chunks[0].parameters())
    slopes = [p.main_grad.clone() for p in parameters]
    norm = torch.stack([g.square().sum() for g in slopes]).sum().sqrt()
    step = 1e-3

    def move(distance: float) -> None:
        for p, g in zip(parameters, slopes, strict=True):
            p.data.add_(g / norm, alpha=distance)

    move(step)
    above = objective()
    move(-2 * step)
    below = objective()
    measured = (above - below) / (2 * step)
    assert measured == pytest.approx(float(norm), rel=2e-3), f"seed {SEED}"
    print(f"{loss}: slope {measured:.5f}, gradient norm {float(norm):.5f}")


def test_the_update_is_adamw_on_the_clipped_gradient(problem: Problem) -> None:
    settings = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1, "clip_grad": 0.5}
    trainer, lr = _trainer(**settings), 0.01
    weights = {key: value.double() for key, value in assemble(pieces(trainer)).items()}
    moments = {key: (torch.zeros_like(w), torch.zeros_like(w)) for key, w in weights.items()}
    step = trainer.optimizer.step
    gradients: list[dict[str, torch.Tensor]] = []

    def stepping() -> Any:
        gradients.append({key: g.double() for key, g in assemble(gradient_pieces(trainer)).items()})
        return step()

    trainer.optimizer.step = stepping
    for count in (1, 2, 3):
        metrics = trainer.train_step(problem.batches(), LOSSES["supervised"], lr)
        norm = torch.stack([g.square().sum() for g in gradients[-1].values()]).sum().sqrt()
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert norm > settings["clip_grad"], "clipping is part of the test"
        after = assemble(pieces(trainer))
        for key, gradient in gradients[-1].items():
            g = gradient * settings["clip_grad"] / (norm + 1e-6)
            m, v = moments[key]
            m.lerp_(g, 1 - settings["beta1"])
            v.lerp_(g * g, 1 - settings["beta2"])
            # Megatron decays matrices, not norms and biases.
            decay = settings["weight_decay"] if weights[key].dim() > 1 else 0.0
            step_size = m / (1 - settings["beta1"] ** count)
            step_size = step_size / ((v / (1 - settings["beta2"] ** count)).sqrt() + settings["eps"])
            weights[key] = weights[key] * (1 - lr * decay) - lr * step_size
            error = float((after[key].double() - weights[key]).abs().max())
            assert error < 2e-6, f"seed {SEED}, step {count}, {key}: {error}"


def test_the_experts_bias_moves_against_the_load(problem: Problem) -> None:
    trainer = _trainer()
    speed = MODELS["deepseek"].expert_bias_update_speed
    trainer.read(problem.batches(), TokenLogprobs(VOCABULARY))
    loads: dict[str, torch.Tensor] = {}
    buffers = dict(trainer.chunks[0].named_buffers())
    counters = {name: b for name, b in buffers.items() if name.endswith("local_tokens_per_expert")}
    assert counters and all(int(b.sum()) == 0 for b in counters.values()), "reading does not count"
    step = trainer._schedule

    def counting(*args: Any, **options: Any) -> Any:
        trainer.chunks[0].config.finalize_model_grads_func, finalize = None, before
        try:
            result = step(*args, **options)
        finally:
            trainer.chunks[0].config.finalize_model_grads_func = finalize
        loads.update({name: b.clone() for name, b in counters.items()})
        finalize(trainer.wrapped, None)
        return result

    before = trainer.chunks[0].config.finalize_model_grads_func
    trainer._schedule = counting
    trainer.train_step(problem.batches(), LOSSES["supervised"], 0.0)
    tokens = sum(s.tokens.numel() for s in problem.samples)
    for name, load in loads.items():
        assert int(load.sum()) == tokens * MODELS["deepseek"].experts_per_token
        bias = buffers[name.replace("local_tokens_per_expert", "expert_bias")]
        torch.testing.assert_close(bias, speed * (load.mean() - load).sign())
    assert any(bool(load.std() > 0) for load in loads.values())


def test_it_learns(problem: Problem) -> None:
    trainer = _trainer(weight_decay=0.0)
    losses = [trainer.train_step(problem.batches(), LOSSES["supervised"], 1e-2)["loss"] for _ in range(30)]
    assert losses[0] > 3.5 and losses[-1] < 0.5, losses


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(recompute: str, problem: Problem) -> None:
    results = []
    for how in ("none", recompute):
        parallel = ParallelConfig(recompute=how)
        trainer = Trainer(MODELS["deepseek"], parallel, join(parallel), seed=7, adam=AdamConfig())
        trainer.train_step(problem.batches(), LOSSES["supervised"], 1e-2)
        results.append(assemble(pieces(trainer)))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=0, atol=0, msg=key)


def test_weights_depend_on_the_seed() -> None:
    world = join(ONE)
    first, again, other = (assemble(pieces(Trainer(MODELS["qwen2"], ONE, world, seed=s))) for s in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    drawn = [key for key in first if not key.endswith(("norm.weight", "bias"))]
    assert drawn and not any(torch.equal(first[key], other[key]) for key in drawn)
    deviation = torch.cat([first[key].flatten() for key in drawn]).std()
    assert float(deviation) == pytest.approx(MODELS["qwen2"].init_std, rel=0.05)


def test_refusals(problem: Problem) -> None:
    reader = Trainer(MODELS["llama"], ONE, join(ONE), seed=7)
    with pytest.raises(RuntimeError, match="built without an optimiser"):
        reader.train_step(problem.batches(), SupervisedLoss(VOCABULARY), 0.1)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        reader.read([], TokenLogprobs(VOCABULARY))


def poisoned_step(problem: Problem) -> tuple[str, bool, float]:
    """Only the last replica's data is bad; every replica must refuse, keep its weights, and be able to go on."""
    world = join(ONE)
    trainer = Trainer(MODELS["deepseek"], ONE, world, seed=7, adam=AdamConfig())
    trainer.train_step(own_part(problem.batches(), world)[:1], LOSSES["supervised"], 1e-2)
    before = assemble(pieces(trainer))
    batches = own_part(problem.batches(), world)[:1]
    if world.data_rank == world.data_size - 1:
        batches[0].fields["weights"] = batches[0].fields["weights"].clone()
        batches[0].fields["weights"][-2] = float("nan")
    try:
        trainer.train_step(batches, LOSSES["supervised"], 1e-2)
        message = "it went through"
    except RuntimeError as error:
        message = str(error)
    after = assemble(pieces(trainer))
    same = all(torch.equal(before[key], after[key]) for key in before)
    good = own_part(problem.batches(), world)[:1]
    return message, same, trainer.train_step(good, LOSSES["supervised"], 1e-2)["loss"]


def test_a_gradient_that_is_not_finite_changes_nothing(problem: Problem, pools: Any) -> None:
    for message, same, next_loss in [poisoned_step(problem), *pools[2].run(poisoned_step, problem)]:
        assert "not finite" in message
        assert same
        assert next_loss == next_loss


def read_after_an_overlapped_step(problem: Problem) -> list[list[float]]:
    """Log-probabilities after one step: read, read by a copy, and (None overlapped) as they should be."""
    found = []
    for overlap in (True, False):
        parallel = ParallelConfig(overlap_grad_reduce=overlap, overlap_param_gather=overlap)
        world = join(parallel)
        trainer = Trainer(MODELS["deepseek"], parallel, world, seed=7, adam=AdamConfig())
        trainer.train_step(own_part(problem.batches(), world)[:1], LOSSES["supervised"], 1e-2)
        copy = Trainer(MODELS["deepseek"], parallel, world, seed=8)
        copy_weights(trainer, copy)
        for model in (copy, trainer):
            rows = model.read(problem.batches(), TokenLogprobs(VOCABULARY))
            found.append(torch.cat(rows)[:, 0].tolist())
    return found


def test_weights_on_their_way_arrive_before_they_are_read(problem: Problem, pools: Any) -> None:
    for rank in pools[2].run(read_after_an_overlapped_step, problem):
        for row in rank[:-1]:
            assert row == pytest.approx(rank[-1], abs=1e-6), f"seed {SEED}"
