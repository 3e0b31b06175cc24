"""How completions are drawn: the distribution, against transformers' own, and what a completion depends on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from r1.engine.config import load_config
from r1.engine.engine import Engine
from r1.engine.rollout import Completion, SamplingParameters, _streams, _uniform, draw, generate

CUTS = [
    {},
    {"temperature": 0.6},
    {"top_k": 4},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 7, "top_p": 0.8},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.95, "min_p": 0.05},
    {"top_k": 100, "min_p": 1.0},
    {"top_k": 1},
]


def reference(logits_BV: torch.Tensor, sampling: SamplingParameters) -> torch.Tensor:
    """The probabilities that transformers' generate would draw by."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(None, logits_BV.double()).softmax(-1)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_tokens_are_drawn_by_their_probabilities(seed: int, cuts: dict[str, float]) -> None:
    """Chi-square of 20,000 draws over a vocabulary of 12, for each of three distributions."""
    V, draws = 12, 20_000
    sampling = SamplingParameters(max_tokens=1, **cuts)
    uniform = _uniform(_streams(seed, list(range(draws)), 1), seed % 7)
    for _ in range(3):
        logits = torch.randn(1, V) * 2
        wanted = reference(logits, sampling)[0]
        ids, logprobs = draw(logits.expand(draws, V), uniform, sampling)
        found = torch.bincount(ids, minlength=V).double()
        assert found[wanted == 0].sum() == 0, "a token was drawn that is cut off"
        # Tokens that are met too rarely for chi-square count as one; the limit is far out in its tail.
        rare = draws * wanted < 10
        cells, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (found, draws * wanted))
        square = ((cells - expected).square() / expected.clamp(min=10)).sum().item()
        free = len(cells) - 1
        assert square <= free + 8 * math.sqrt(2 * free) + 20, (square, free)
        at_temperature = (logits[0] / sampling.temperature).log_softmax(-1)
        torch.testing.assert_close(logprobs, at_temperature[ids])


def test_what_may_be_drawn_is_what_transformers_leaves(seed: int) -> None:
    """Over fine steps of the uniform number every token is met that has any probability to speak of, and no other."""
    logits = torch.randn(20, 40) * 3
    steps = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    for cuts in CUTS:
        sampling = SamplingParameters(max_tokens=1, **cuts)
        wanted = reference(logits, sampling)
        met = torch.zeros_like(wanted)
        for row in range(len(logits)):
            ids, _ = draw(logits[row].expand(len(steps), -1), steps, sampling)
            met[row, ids] = 1
        assert (met[wanted > 1 / 3000] == 1).all() and (met[wanted == 0] == 0).all(), cuts


def test_greedy_takes_the_likeliest_and_of_equals_the_lower() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 1.0, 5.0, 5.0]])
    ids, logprobs = draw(logits, torch.tensor([0.9, 0.9]), SamplingParameters(max_tokens=1, temperature=0.0))
    assert ids.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], ids])
    ids, _ = draw(logits, torch.tensor([0.99, 0.99]), SamplingParameters(max_tokens=1, top_k=1))
    assert ids.tolist() == [1, 0]


def test_the_ends_of_the_uniform_numbers() -> None:
    logits = torch.tensor([[-math.inf, 0.0, -3.0, -math.inf]])
    for uniform, token in ((0.0, 1), (1 - 2.0**-53, 2), (1.0, 2)):
        ids, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), SamplingParameters(max_tokens=1))
        assert ids.item() == token


def test_random_numbers_are_of_seed_prompt_copy_and_step_alone(seed: int) -> None:
    streams = _streams(seed, [3, 8], 4)
    assert len(set(streams.tolist())) == 8
    assert np.array_equal(_streams(seed, [8], 4), streams[4:]) and np.array_equal(_streams(seed, [3], 2), streams[:2])
    assert not np.intersect1d(_streams(seed + 1, [3, 8], 4), streams).size
    many = torch.stack([_uniform(_streams(seed, list(range(500)), 4), step) for step in range(10)])
    assert many.dtype == torch.float64 and 0 <= many.min() and many.max() < 1 and many.unique().numel() == many.numel()
    # Mean and correlations of 20,000 numbers, six deviations wide.
    assert abs(many.mean() - 0.5) < 6 * (1 / 12 / many.numel()) ** 0.5
    centred = (many - 0.5) * 12**0.5
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs((a * b).mean()) < 6 / a.numel() ** 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature = -1.0 must not be negative"),
        ({"top_p": 0.0}, r"top_p = 0.0 must be in \(0, 1\]"),
        ({"top_k": 0}, "top_k = 0 must be at least 1"),
        ({"min_p": 1.5}, r"min_p = 1.5 must be in \[0, 1\]"),
    ],
)
def test_bad_parameters(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParameters(**{"max_tokens": 3, **settings})


@pytest.mark.skipif(torch.cuda.is_available(), reason="exact numerics by plain torch is for a CPU")
def test_a_completion_does_not_depend_on_its_batch_mates(seed: int) -> None:
    """With exact numerics: the same tokens and the same bits, alone, among others, and in waves."""
    config = load_config(str(Path(__file__).parent / "micro.toml"), ["parallel.numerics=exact"])
    engine = Engine(config, train=False, vocab_size=200, seed=seed)
    draw_token = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(2, 200, (n,), generator=draw_token).tolist() for n in (4, 1, 9, 3, 6)]
    sampling = SamplingParameters(12, 1.3, top_p=0.9, stop_ids=tuple(range(0, 200, 9)), top_k=60, min_p=0.01)
    together = engine.generate(prompts, sampling, copies=3, seed=seed)
    assert {len(group) for group in together} == {3} and len({len(c.tokens) for g in together for c in g}) > 2
    assert engine.generate(prompts[:1], sampling, copies=3, seed=seed)[0] == together[0]
    assert engine.generate(prompts[:2], sampling, copies=2, seed=seed) == [group[:2] for group in together[:2]]
    assert generate(engine.policy, prompts, sampling, 3, seed, 200, max_sequences=6) == together
    assert engine.generate(prompts, sampling, copies=3, seed=seed + 1) != together
    for completion in (c for group in together for c in group):
        check(completion, sampling)
    engine.close()


def check(completion: Completion, sampling: SamplingParameters) -> None:
    tokens = completion.tokens
    assert len(completion.logprobs) == len(tokens) <= sampling.max_tokens and all(x <= 0 for x in completion.logprobs)
    assert completion.finished == (tokens[-1] in sampling.stop_ids) or len(tokens) == sampling.max_tokens
    assert not set(tokens[:-1]) & set(sampling.stop_ids)
