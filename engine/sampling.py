"""How a token is drawn: the parameters, the numbers behind it, and what the model said of the token.

A token is the winner of a race (Gumbel-max): of all that may be drawn, the one with the least E / p, where E is an
exponential number made from the completion's stream, the token's place and its id alone; blocks of tokens race first,
then those of the winning block. So a completion depends on nothing beside it, and a guess at the next token that runs
the same race with other probabilities mostly wins the same token (Daliri, Musco, Suresh 2024, arXiv 2408.07978):
speculation changes no token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

LEAST_TEMPERATURE, MOST_BIAS = 1e-3, 1e9  # what scores in float32 bear
BLOCK = 256  # tokens that race among themselves
SORTED_FIRST = 1024  # likeliest tokens that a CPU puts in order before it sorts a whole vocabulary
FinishReason = Literal["stop", "length", "abort", "deadline"]


@dataclass(frozen=True)
class SamplingParameters:
    """How completions are drawn. Lengths are in tokens; temperature 0 is greedy.

    `logit_bias`, pairs of a token and a number, is added to the scores; these are divided by the temperature. Then a
    token is drawn among the top_k likeliest, if that is given, of these among the fewest whose probabilities reach
    top_p of theirs, and of these among those at least min_p times as likely as the likeliest. Of equals the lower id
    counts as the likelier. A completion ends with one of `stop_ids`, or the token with which its text comes to hold one
    of the strings `stop`.

    `logprobs` names what is reported of a drawn token: the model's own log-probability over the whole vocabulary, no
    bias, nothing cut off, of the scores divided by the temperature (as they are where that is 0), or before that. So
    are those of the `top_logprobs` likeliest tokens at its place.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    top_k: int | None = None
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: Literal["after_temperature", "before_temperature"] = "after_temperature"
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens} must be at least 1")
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise ValueError(f"temperature = {self.temperature} must be 0, or {LEAST_TEMPERATURE} or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p} must be in [0, 1]")
        if not all(self.stop):
            raise ValueError(f"stop = {self.stop} must not hold an empty string")
        if not all(token >= 0 and abs(bias) <= MOST_BIAS for token, bias in self.logit_bias):
            raise ValueError(
                f"logit_bias = {self.logit_bias} must be pairs of a token id and a number up to {MOST_BIAS}"
            )
        if self.logprobs not in ("after_temperature", "before_temperature"):
            raise ValueError(f"logprobs = {self.logprobs!r} must be 'after_temperature' or 'before_temperature'")
        if not 0 <= self.top_logprobs <= 20:
            raise ValueError(f"top_logprobs = {self.top_logprobs} must be in 0..20")

    @property
    def reported_temperature(self) -> float:
        return self.temperature if self.temperature and self.logprobs == "after_temperature" else 1.0


@dataclass
class Completion:
    """One sampled output; without a `finish_reason` it is not at its end.

    `logprobs` are as SamplingParameters.logprobs says, `top_logprobs` lists pairs (token, log-probability) where they
    were asked for, and `weight_versions` counts the versions of the weights that drew each token.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    weight_versions: list[int] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """It ended of its own accord: with a stop token, which is its last one, or a stop string."""
        return self.finish_reason == "stop"

    @property
    def open(self) -> bool:
        """It can go on."""
        return self.finish_reason not in ("stop", "length")

    def copy(self) -> Completion:
        return Completion(
            list(self.tokens),
            list(self.logprobs),
            self.finish_reason,
            list(self.weight_versions),
            list(self.top_logprobs),
        )


class Rules:
    """The parameters of B rows as tensors; None where nobody asks for anything."""

    def __init__(self, rows: Sequence[SamplingParameters], device: torch.device) -> None:
        first = rows[0]
        alike = all(row is first for row in rows)

        def column(name: str, nothing: float, dtype: torch.dtype = torch.float64) -> Tensor | None:
            if alike:
                value = getattr(first, name)
                return None if value == nothing else torch.full((len(rows), 1), value, dtype=dtype, device=device)
            values = [getattr(row, name) for row in rows]
            if all(value == nothing for value in values):
                return None
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        self.temperature_B1 = column("temperature", 1.0, torch.float32)
        self.greedy_B: Tensor | None = None
        greedy = [row.temperature == 0 for row in (rows[:1] if alike else rows)]
        self.all_greedy = all(greedy)
        if self.temperature_B1 is not None and any(greedy):
            self.greedy_B = self.temperature_B1.squeeze(1) == 0
            self.temperature_B1[self.greedy_B] = 1.0
        self.reported_B1 = column("reported_temperature", 1.0, torch.float32)
        self.top_p_B1, self.min_p_B1 = column("top_p", 1.0), column("min_p", 0.0)
        self.top_k_B1 = None
        if any(row.top_k for row in (rows[:1] if alike else rows)):
            self.top_k_B1 = torch.tensor([row.top_k or 2**62 for row in rows], device=device)[:, None]
        bias = [(i, *pair) for i, row in enumerate(rows) for pair in row.logit_bias]
        self.bias = [torch.tensor(x, device=device) for x in zip(*bias)] if bias else None
        self.top_logprobs = first.top_logprobs if alike else max(row.top_logprobs for row in rows)


def draw(logits_BV: Tensor, streams_B: Tensor, places_B: Tensor, rules: Rules) -> Tensor:
    """Token ids (B) from scores in float32. streams_B and places_B, int64, choose the random numbers: a token's place
    counts from 0 at the completion's first."""
    scores_BV = logits_BV
    if rules.bias is not None:
        rows, ids, values = rules.bias
        scores_BV = scores_BV.index_put((rows, ids), values.to(scores_BV.dtype), accumulate=True)
    if rules.all_greedy:
        return scores_BV.argmax(-1)
    scaled_BV = scores_BV if rules.temperature_B1 is None else scores_BV / rules.temperature_B1
    weights_BV = scaled_BV.softmax(-1)
    if rules.top_p_B1 is not None or rules.top_k_B1 is not None:
        weights_BV = _of_the_likeliest(weights_BV, rules.top_k_B1, rules.top_p_B1)
    if rules.min_p_B1 is not None:
        weights_BV = weights_BV * (weights_BV >= rules.min_p_B1 * weights_BV.amax(-1, keepdim=True))
    ids = _race(weights_BV, streams_B, places_B)
    return ids if rules.greedy_B is None else torch.where(rules.greedy_B, scores_BV.argmax(-1), ids)


def _of_the_likeliest(weights_BV: Tensor, top_k_B1: Tensor | None, top_p_B1: Tensor | None) -> Tensor:
    """The weights of what top_k and top_p leave, 0 elsewhere."""
    if weights_BV.device.type == "cpu" and weights_BV.shape[1] > SORTED_FIRST:
        # To sort a large vocabulary takes a CPU as long as a small model takes to make it.
        ids_BN = weights_BV.topk(SORTED_FIRST, -1).indices.sort(-1).values
        some_BN, order_BN = weights_BV.gather(1, ids_BN).sort(dim=-1, descending=True, stable=True)
        kept_BN = _kept(some_BN, weights_BV, top_k_B1, top_p_B1)
        result_BV = torch.zeros_like(weights_BV).scatter_(1, ids_BN.gather(1, order_BN), some_BN * kept_BN)
        # Where the last is kept, or another as likely, some that are not here may be kept too.
        unsure_B = (kept_BN & (some_BN == some_BN[:, -1:])).any(-1)
        if unsure_B.any():
            top_k_B1, top_p_B1 = (None if x is None else x[unsure_B] for x in (top_k_B1, top_p_B1))
            result_BV[unsure_B] = _of_all(weights_BV[unsure_B], top_k_B1, top_p_B1)
        return result_BV
    return _of_all(weights_BV, top_k_B1, top_p_B1)


def _of_all(weights_BV: Tensor, top_k_B1: Tensor | None, top_p_B1: Tensor | None) -> Tensor:
    ordered_BV, order_BV = weights_BV.sort(dim=-1, descending=True, stable=True)
    kept_BV = _kept(ordered_BV, weights_BV, top_k_B1, top_p_B1)
    return torch.zeros_like(weights_BV).scatter_(1, order_BV, ordered_BV * kept_BV)


def _kept(ordered_BN: Tensor, weights_BV: Tensor, top_k_B1: Tensor | None, top_p_B1: Tensor | None) -> Tensor:
    """Which of the N likeliest tokens, in order, may be drawn."""
    kept_BN, N = torch.ones_like(ordered_BN, dtype=torch.bool), ordered_BN.shape[1]
    if top_k_B1 is not None:
        kept_BN &= torch.arange(N, device=ordered_BN.device) < top_k_B1
    if top_p_B1 is not None:
        left_BN = ordered_BN * kept_BN
        reached_BN = left_BN.cumsum(-1, dtype=torch.float64)
        all_B1 = weights_BV.sum(-1, keepdim=True, dtype=torch.float64)
        if top_k_B1 is not None:  # top_p is of what top_k leaves
            all_B1 = torch.where(top_k_B1 <= N, reached_BN[:, -1:], all_B1)
        kept_BN &= reached_BN - left_BN < top_p_B1 * all_B1
    return kept_BN


def _race(weights_BV: Tensor, streams_B: Tensor, places_B: Tensor) -> Tensor:
    V = weights_BV.shape[1]
    blocks_BNX = torch.nn.functional.pad(weights_BV, (0, -V % BLOCK)).unflatten(1, (-1, BLOCK))
    numbers = torch.arange(blocks_BNX.shape[1], device=weights_BV.device).expand(len(weights_BV), -1)
    block_B = (blocks_BNX.sum(-1) / exponentials(streams_B, places_B, -1 - numbers)).argmax(-1)
    within_BX = blocks_BNX[torch.arange(len(block_B), device=block_B.device), block_B]
    ids_BX = block_B[:, None] * BLOCK + torch.arange(BLOCK, device=block_B.device)
    place_B = (within_BX / exponentials(streams_B, places_B, ids_BX)).argmax(-1)
    return block_B * BLOCK + place_B


def reported(logits_BV: Tensor, ids_B: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (B) of the tokens, and (ids, log-probabilities) of the likeliest at each place (B, n)."""
    if rules.reported_B1 is not None:
        logits_BV = logits_BV / rules.reported_B1
    logprobs_BV = torch.log_softmax(logits_BV, -1)
    count = min(rules.top_logprobs, logits_BV.shape[1])
    top, ids = logprobs_BV.topk(count, -1) if count else (logprobs_BV[:, :0], ids_B.new_empty(len(ids_B), 0))
    return logprobs_BV.gather(1, ids_B[:, None]).squeeze(1), ids, top


# --------------------------------------------------------------------------------------------------- random numbers


def _signed(x: int) -> int:
    """The int64 with these 64 bits."""
    return x - 2**64 if x >= 2**63 else x


_GOLDEN, _FIRST, _SECOND, _STRIDE = map(
    _signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD1342543DE82EF95)
)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function (Steele, Lea, Flood 2014), in place: a counter becomes 64 random bits, of an int64
    that wraps around."""
    for shift, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        x ^= (x >> shift) & (2 ** (64 - shift) - 1)
        if factor is not None:
            x *= factor
    return x


def streams(seed: int, numbers: Sequence[int]) -> Tensor:
    """An int64 for each number: which of the seed's streams of random numbers it is."""
    base = _mix(torch.tensor([_signed(seed % 2**64)]) + _GOLDEN)
    return _mix(base + torch.tensor(list(numbers), dtype=torch.int64) * _GOLDEN)


def exponentials(streams_B: Tensor, places_B: Tensor, numbers_BN: Tensor) -> Tensor:
    """(B, N) float32, exponentially distributed with mean 1, one for each of these numbers (int64) of a stream's place.
    The least count in a race, and have all their digits; none is above 16.6."""
    bits = _mix(streams_B + (places_B + 1) * _GOLDEN)
    bits = _mix(bits[:, None] + (numbers_BN + 1) * _STRIDE)
    uniform = bits.__irshift__(11).bitwise_and_(2**53 - 1).float().add_(0.5).mul_(2.0**-53)
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_()
