"""Loss and gradient do not depend on how a step's samples are packed, ordered, split or padded."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from r1.parallel.config import ParallelConfig
from r1.parallel.packing import MicroBatch, context_split, empty_like, pack, pad_to
from r1.parallel.trainer import Trainer
from r1.parallel.world import World, join
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

TOLERANCE = 1e-5
SEED = random.SystemRandom().randrange(2**31)
PAIRS = [[0, 1], [2, 3], [4, 5], [6, 7], [8]]  # a chosen and a rejected answer stay in one micro-batch


@pytest.fixture(scope="module")
def problem() -> Problem:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    problem = make_problem(SEED, [draw.randint(2, 24) for _ in range(9)], [list(range(9))])
    add_old_logprobs(problem, Trainer(MODELS["deepseek"], ParallelConfig(), join(ParallelConfig()), seed=7), SEED)
    return problem


def splits() -> dict[str, list[list[int]]]:
    draw = random.Random(SEED)
    alone = [pair[:] for pair in PAIRS]
    shuffled = [pair[:] for pair in PAIRS]
    draw.shuffle(shuffled)
    for pair in shuffled:
        draw.shuffle(pair)
    return {
        "pair by pair": alone,
        "reversed": [list(range(9))[::-1]],
        "shuffled": [shuffled[0] + shuffled[1], shuffled[2], shuffled[3] + shuffled[4]],
    }


@pytest.mark.parametrize("loss", ["supervised", "policy", "policy_sequence", "preference"])
def test_one_step_however_it_is_packed(loss: str, problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _one_step(loss, problem.batches())
    for name, groups in splits().items():
        _same(whole, _one_step(loss, problem.batches(groups)), f"seed {SEED}, {loss}, {name}")
    batches = problem.batches(PAIRS)
    _same(whole, _one_step(loss, [*batches, empty_like(batches[0])]), f"seed {SEED}, {loss}, with an empty one")
    # Padding as a layout would ask for it: every micro-batch to a multiple of 31 tokens.
    monkeypatch.setattr("r1.parallel.trainer.stream_multiple", lambda parallel: 31)
    _same(whole, _one_step(loss, batches), f"seed {SEED}, {loss}, padded")


@pytest.mark.parametrize("model", ["llama", "latent_dense"])
def test_one_step_of_a_dense_model_however_it_is_packed(model: str, problem: Problem) -> None:
    whole = _one_step("supervised", problem.batches(), model)
    for name, groups in splits().items():
        _same(whole, _one_step("supervised", problem.batches(groups), model), f"seed {SEED}, {model}, {name}")


def _one_step(loss: str, batches: list[MicroBatch], model: str = "deepseek") -> dict[str, Any]:
    return several_steps(model, ParallelConfig(), loss, batches, steps=1)


def _same(whole: dict[str, Any], other: dict[str, Any], title: str) -> None:
    try:
        same_metrics(other["metrics"][0], whole["metrics"][0], TOLERANCE)
        error = compare(assemble(whole["gradients"]), [other["gradients"]], TOLERANCE)
        # The experts' bias moves by the load, which padding must not change.
        bias = {key: value for key, value in assemble(whole["after"]).items() if key.endswith("expert_bias")}
        compare(bias, [[piece for piece in other["after"] if piece[0] in bias]], 0.0)
    except AssertionError as failure:
        raise AssertionError(f"{title}: {failure}") from None
    print(f"{title}: {error:.1e}")


def test_positions_and_next_tokens() -> None:
    world = join(ParallelConfig())
    tokens = torch.tensor([5, 6, 7, 8, 9, 10])
    batch = MicroBatch(tokens, torch.tensor([0, 3, 4, 6], dtype=torch.int32))
    packed = pack(batch, world, lambda positions: (positions, positions), mtp_depth=2)
    assert packed.positions_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert packed.max_seqlen == 3
    assert [x.tolist() for x in packed.next_tokens] == [[6, 7, 0, 0, 10, 0], [7, 0, 0, 0, 0, 0]]


def test_context_split_covers_the_stream_evenly() -> None:
    world = join(ParallelConfig())
    ways, T = 3, 24
    ranks: list[World] = [dataclasses.replace(world, context_size=ways, context_rank=r) for r in range(ways)]
    parts = [context_split(T, rank)[0] for rank in ranks]
    order = context_split(T, ranks[0])[1]
    assert torch.cat(parts)[order].tolist() == list(range(T))
    # Causal attention's work of a token grows with its position: the sums must be equal.
    assert len({int(part.sum()) for part in parts}) == 1
    with pytest.raises(ValueError, match="22 tokens does not divide by 2 x context = 6"):
        context_split(22, ranks[0])
    assert context_split(22, world) == (None, None)


def test_padding_is_one_more_sequence_of_zeros() -> None:
    batch = MicroBatch(torch.tensor([1, 2]), torch.tensor([0, 2], dtype=torch.int32), {"weights": torch.ones(2)})
    padded = pad_to(batch, 5)
    assert padded.tokens_T.tolist() == [1, 2, 0, 0, 0]
    assert padded.cu_seqlens.tolist() == [0, 2, 5] and padded.cu_seqlens.dtype == torch.int32
    assert padded.fields["weights"].tolist() == [1, 1, 0, 0, 0]
    assert pad_to(batch, 2) is batch
    with pytest.raises(ValueError, match="length = 1 is shorter than the micro-batch's 2 tokens"):
        pad_to(batch, 1)
