"""How tokens are drawn: the distribution, against transformers' own, and the numbers behind it."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from r1.engine import sampling as drawing
from r1.engine.sampling import Rules, SamplingParameters, draw, exponentials, reported, streams

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


CPU = torch.device("cpu")


def square(found: torch.Tensor, wanted: torch.Tensor, draws: int) -> tuple[float, int]:
    """(chi-square, degrees of freedom); tokens that are met too rarely for it count as one."""
    rare = draws * wanted < 10
    cells, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (found, draws * wanted))
    return ((cells - expected).square() / expected.clamp(min=10)).sum().item(), len(cells) - 1


@pytest.mark.parametrize("V", [12, 700])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_tokens_are_drawn_by_their_probabilities(seed: int, cuts: dict[str, float], V: int) -> None:
    """Chi-square of 20,000 draws over a vocabulary of one block of the race, and of three."""
    draws = 20_000
    sampling = SamplingParameters(max_tokens=1, **cuts)
    where = streams(seed, range(draws)), torch.full((draws,), seed % 7)
    logits = torch.randn(1, V) * (2 if V < 100 else 4)
    wanted = reference(logits, sampling)[0]
    rules = Rules([sampling] * draws, CPU)
    ids = draw(logits.expand(draws, V), *where, rules)
    found = torch.bincount(ids, minlength=V).double()
    assert found[wanted == 0].sum() == 0, "a token was drawn that is cut off"
    # The limit is far out in the tail.
    statistic, free = square(found, wanted, draws)
    assert statistic <= free + 8 * math.sqrt(2 * free) + 20, (statistic, free)
    logprobs, _, _ = reported(logits.expand(draws, V), ids, rules)
    torch.testing.assert_close(logprobs, (logits[0] / sampling.temperature).log_softmax(-1)[ids])


def test_what_may_be_drawn_is_what_transformers_leaves(seed: int) -> None:
    """In many draws every token is met that has any probability to speak of, and no other."""
    logits = torch.randn(20, 40) * 3
    for cuts in CUTS:
        sampling = SamplingParameters(max_tokens=1, **cuts)
        wanted = reference(logits, sampling)
        met = torch.zeros_like(wanted)
        for row in range(len(logits)):
            ids = draw(
                logits[row].expand(4000, -1),
                streams(seed, range(4000)),
                torch.full((4000,), row),
                Rules([sampling] * 4000, CPU),
            )
            met[row, ids] = 1
        assert (met[wanted > 1 / 200] == 1).all() and (met[wanted == 0] == 0).all(), cuts


def test_rows_have_parameters_of_their_own(seed: int) -> None:
    """A batch of all kinds of rows draws and reports what each row does alone."""
    kinds = [SamplingParameters(max_tokens=1, **cuts) for cuts in CUTS]
    kinds += [
        SamplingParameters(1, temperature=0.0),
        SamplingParameters(1, temperature=0.5, logprobs="before_temperature", top_logprobs=3),
        SamplingParameters(1, logit_bias=((3, 4.0), (7, -100.0)), top_logprobs=20),
    ]
    rows = [kinds[i] for i in torch.randint(len(kinds), (200,)).tolist()]
    logits, where = torch.randn(200, 33) * 3, (streams(seed, range(200)), torch.randint(50, (200,)))
    together = draw(logits, *where, Rules(rows, CPU))
    logprobs, top_ids, top = reported(logits, together, Rules(rows, CPU))
    for i, sampling in enumerate(rows):
        alone = Rules([sampling], CPU)
        assert draw(logits[i : i + 1], *(x[i : i + 1] for x in where), alone).item() == together[i]
        own = reported(logits[i : i + 1], together[i : i + 1], alone)
        assert own[0].item() == logprobs[i]
        n = sampling.top_logprobs
        assert own[1].tolist()[0] == top_ids[i, :n].tolist() and own[2].tolist()[0] == top[i, :n].tolist()


def test_what_is_reported(seed: int) -> None:
    logits = torch.randn(4, 30) * 2
    ids = torch.tensor([3, 0, 29, 7])
    bias = ((3, 5.0), (0, -9.0))
    after, top_ids, top = reported(
        logits, ids, Rules([SamplingParameters(1, 0.5, top_p=0.3, logit_bias=bias, top_logprobs=2)] * 4, CPU)
    )
    wanted = (logits.double() / 0.5).log_softmax(-1)
    torch.testing.assert_close(after.double(), wanted.gather(1, ids[:, None]).squeeze(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top.double(), wanted.topk(2).values, rtol=1e-5, atol=1e-5)
    assert torch.equal(top_ids, wanted.topk(2).indices)
    before, _, none = reported(logits, ids, Rules([SamplingParameters(1, 0.5, logprobs="before_temperature")] * 4, CPU))
    torch.testing.assert_close(before, logits.log_softmax(-1).gather(1, ids[:, None]).squeeze(1))
    assert none.shape == (4, 0)


@pytest.mark.parametrize("coarse", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_a_large_vocabulary_is_cut_as_if_it_were_sorted_whole(
    seed: int, scale: float, coarse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where what may be drawn ends beyond the tokens that are looked at first, or among equals; row by row."""
    logits_BV = scale * torch.randn(8, 5000)
    weights_BV = (logits_BV.round() if coarse else logits_BV).softmax(-1)
    for cuts in ({"top_p": 0.95}, {"top_p": 0.3}, {"top_k": 1024}, {"top_k": 3000}, {"top_k": 100, "top_p": 0.5}):
        rules = Rules([SamplingParameters(1, **cuts)] * 6 + [SamplingParameters(1)] * 2, CPU)
        found_BV = drawing._of_the_likeliest(weights_BV, rules.top_k_B1, rules.top_p_B1)
        with monkeypatch.context() as patch:
            patch.setattr(drawing, "SORTED_FIRST", 5000)
            wanted_BV = drawing._of_the_likeliest(weights_BV, rules.top_k_B1, rules.top_p_B1)
        assert torch.equal(found_BV, wanted_BV) and (found_BV > 0).any(-1).all()


def test_bias_is_added_to_the_scores(seed: int) -> None:
    draws = 20_000
    logits = torch.randn(1, 12)
    sampling = SamplingParameters(1, temperature=0.7, top_p=0.95, logit_bias=((2, 1.5), (5, -1e9)))
    biased = logits.clone()
    biased[0, 2] += 1.5
    biased[0, 5] -= 1e9
    wanted = reference(biased, sampling)[0]
    ids = draw(
        logits.expand(draws, -1),
        streams(seed, range(draws)),
        torch.zeros(draws, dtype=torch.long),
        Rules([sampling] * draws, CPU),
    )
    statistic, free = square(torch.bincount(ids, minlength=12).double(), wanted, draws)
    assert statistic <= free + 8 * math.sqrt(2 * free) + 20 and not (ids == 5).any()


def test_greedy_takes_the_likeliest_and_of_equals_the_lower() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [5.0, 1.0, 5.0, 5.0]])
    where = streams(1, range(2)), torch.tensor([0, 4])
    rules = Rules([SamplingParameters(max_tokens=1, temperature=0.0)] * 2, CPU)
    ids = draw(logits, *where, rules)
    assert ids.tolist() == [1, 0]
    torch.testing.assert_close(reported(logits, ids, rules)[0], logits.log_softmax(-1)[[0, 1], ids])
    assert draw(logits, *where, Rules([SamplingParameters(max_tokens=1, top_k=1)] * 2, CPU)).tolist() == [1, 0]


def test_what_is_impossible_is_never_drawn(seed: int) -> None:
    logits = torch.full((5000, 600), -math.inf)
    logits[:, 300], logits[:, 599] = 0.0, -3.0
    ids = draw(
        logits,
        streams(seed, range(5000)),
        torch.zeros(5000, dtype=torch.long),
        Rules([SamplingParameters(1)] * 5000, CPU),
    )
    assert set(ids.tolist()) == {300, 599}


def test_random_numbers_are_of_seed_number_place_and_token_alone(seed: int) -> None:
    some = streams(seed, range(500))
    assert some.unique().numel() == 500 and torch.equal(streams(seed, [7, 3]), some[[7, 3]])
    assert not set(streams(seed + 1, range(500)).tolist()) & set(some.tolist())
    numbers = torch.arange(-10, 10).expand(500, -1)
    many = torch.stack([exponentials(some, torch.full((500,), place), numbers) for place in range(10)])
    one = exponentials(some[3:4], torch.tensor([4]), torch.tensor([[6]]))
    assert one.item() == many[4, 3, 16]
    assert many.dtype == torch.float32 and 0 < many.min() and many.max() < 17 and many.isfinite().all()
    # Uniform numbers: mean and correlations of 100,000, six deviations wide.
    uniform = (1 - (-many.double()).exp() - 0.5) * 12**0.5
    assert abs(uniform.mean()) < 6 / uniform.numel() ** 0.5 and abs(uniform.square().mean() - 1) < 0.03
    for a, b in ((uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1]), (uniform[..., 1:], uniform[..., :-1])):
        assert abs((a * b).mean()) < 6 / a.numel() ** 0.5


def test_a_guess_by_like_probabilities_is_mostly_right(seed: int) -> None:
    """The race's promise: two distributions p and q win the same token with probability (1 - d) / (1 + d) at least,
    where d is half the sum of |p - q| (of blocks and within one, so each with its own)."""
    V = 700
    logits = torch.randn(4000, V) * 4
    other = logits + 0.5 * torch.randn(4000, V)
    where = streams(seed, range(4000)), torch.zeros(4000, dtype=torch.long)
    same = [draw(x, *where, Rules([SamplingParameters(1)] * 4000, CPU)) for x in (logits, other)]
    distance = (logits.softmax(-1) - other.softmax(-1)).abs().sum(-1).mean() / 2
    assert (same[0] == same[1]).double().mean() > (1 - distance) / (1 + distance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens = 0 must be at least 1"),
        ({"temperature": -1.0}, "temperature = -1.0 must be 0, or 0.001 or more"),
        ({"temperature": math.nan}, "temperature = nan must be 0, or 0.001 or more"),
        ({"top_p": 0.0}, r"top_p = 0.0 must be in \(0, 1\]"),
        ({"top_k": 0}, "top_k = 0 must be at least 1"),
        ({"min_p": 1.5}, r"min_p = 1.5 must be in \[0, 1\]"),
        ({"stop": ("a", "")}, "must not hold an empty string"),
        ({"temperature": 1e-40}, "temperature = 1e-40 must be 0, or 0.001 or more"),
        ({"logit_bias": ((1, math.inf),)}, "must be pairs of a token id and a number up to 1000000000.0"),
        ({"logprobs": "raw"}, "logprobs = 'raw' must be 'after_temperature' or 'before_temperature'"),
        ({"top_logprobs": 21}, r"top_logprobs = 21 must be in 0\.\.20"),
    ],
)
def test_bad_parameters(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParameters(**{"max_tokens": 3, **settings})
