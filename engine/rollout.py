"""Sampling completions from the model that trains, with its own modules and a cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from r1.engine.errors import UserError
from r1.parallel.decode import Decoder
from r1.parallel.trainer import Trainer


@dataclass(frozen=True)
class SamplingParameters:
    """How completions are drawn. Lengths are in tokens; temperature 0 is greedy.

    A token is drawn among the top_k likeliest, if that is given, of these among the fewest whose probabilities reach
    top_p of theirs, and of these among those at least min_p times as likely as the likeliest.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    top_k: int | None = None
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens} must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must be in (0, 1]")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k = {self.top_k} must be at least 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p} must be in [0, 1]")


@dataclass
class Completion:
    """One sampled output. `logprobs` are those of the policy at the sampling temperature (1 where it is greedy), over
    the whole vocabulary; `finished` says that it ended with a stop token, which is its last one."""

    tokens: list[int]
    logprobs: list[float]
    finished: bool


def generate(
    trainer: Trainer,
    prompts: list[list[int]],
    sampling: SamplingParameters,
    copies: int,
    seed: int,
    vocab_size: int,
    max_sequences: int = 1024,
    progress: Callable[[int], None] | None = None,
) -> list[list[Completion]]:
    """`copies` completions of every prompt, the same list on every process.

    Completion j of prompt i is drawn from numbers that depend on (seed, i, j) and the position alone. Prompts are dealt
    to the processes that hold different samples; `max_sequences` bounds how many run at once on one of them.
    """
    limit = trainer.model_config.max_positions
    for prompt in prompts:
        if not prompt or len(prompt) >= limit:
            raise UserError(f"a prompt has {len(prompt)} tokens; this model takes 1 to {limit - 1}")
    group = trainer.world.groups.dp_cp
    share = list(range(len(prompts)))[group.rank() :: group.size()]
    per_wave = max(1, max_sequences // copies)
    waves = -(-len(prompts) // (group.size() * per_wave))
    # Expert-parallel processes exchange tokens at every step, so all of them step until the last one is done.
    in_step = trainer.model_config.is_moe and trainer.parallel.expert * trainer.parallel.expert_tensor > 1
    for module in trainer.wrapped:
        module.eval()
    mine: dict[int, list[Completion]] = {}
    with torch.no_grad():
        for wave in range(waves):
            indices = share[wave * per_wave : (wave + 1) * per_wave]
            if not indices and not in_step:
                continue
            completions = _wave(trainer, prompts, indices, sampling, copies, seed, vocab_size, in_step)
            mine.update(completions)
            if progress:
                progress(len(indices))
    if group.size() == 1:
        return [mine[i] for i in range(len(prompts))]
    parts: list[dict[int, list[Completion]]] = [{} for _ in range(group.size())]
    dist.all_gather_object(parts, mine, group=group)
    gathered = {i: completions for part in parts for i, completions in part.items()}
    return [gathered[i] for i in range(len(prompts))]


def _wave(
    trainer: Trainer,
    prompts: list[list[int]],
    indices: list[int],
    sampling: SamplingParameters,
    copies: int,
    seed: int,
    vocab_size: int,
    in_step: bool,
) -> dict[int, list[Completion]]:
    device = trainer.world.device
    chosen = [prompts[i] for i in indices] or [prompts[0]]
    rooms = [trainer.model_config.max_positions - len(p) for p in chosen for _ in range(copies)]
    budget = torch.tensor(rooms, device=device).clamp(max=sampling.max_tokens)
    streams = _streams(seed, indices or [0], copies)
    decoder = Decoder(trainer, chosen, copies, max(len(p) for p in chosen) + int(budget.max()))
    B = decoder.rows
    tokens = torch.zeros(B, int(budget.max()), dtype=torch.long, device=device)
    logprobs = torch.zeros(B, int(budget.max()), device=device)
    lengths = torch.zeros(B, dtype=torch.long, device=device)
    stopped = torch.zeros(B, dtype=torch.bool, device=device)
    stops = torch.tensor(sampling.stop_ids or (-1,), device=device)
    rows = torch.arange(B, device=device)
    alive = torch.ones(B, dtype=torch.bool, device=device)
    if not indices:
        alive[:] = False
    step = 0
    while True:
        logits_BV = decoder.logits(vocab_size)
        drawn = None
        if logits_BV is not None:
            uniform = _uniform(streams[rows.cpu().numpy()], step).to(device)
            new, new_logprobs = draw(logits_BV, uniform, sampling)
            if trainer.parallel.numerics == "exact":
                new_logprobs = decoder.logprobs(new, sampling.temperature or 1.0, vocab_size)
            drawn = torch.stack([new.double(), new_logprobs.double()])
        drawn = decoder.share(drawn, (2, rows.numel()), torch.float64)
        new, new_logprobs = drawn[0].long(), drawn[1].float()
        live = rows[alive]
        tokens[live, step], logprobs[live, step] = new[alive], new_logprobs[alive]
        lengths[live] += 1
        is_stop = torch.isin(new, stops)
        stopped[rows[alive & is_stop]] = True
        alive = alive & ~is_stop & (lengths[rows] < budget[rows])
        step += 1
        if not _any_alive(alive, trainer, in_step):
            break
        kept = alive.nonzero().squeeze(1)
        if 0 < kept.numel() <= rows.numel() // 2:
            decoder.keep(kept)
            rows, new, alive = rows[kept], new[kept], alive[kept]
        decoder.append(new)
    rows_of = lengths.tolist()
    tokens_list, logprobs_list, finished = tokens.tolist(), logprobs.tolist(), stopped.tolist()
    return {
        index: [
            Completion(tokens_list[b][: rows_of[b]], logprobs_list[b][: rows_of[b]], finished[b])
            for b in range(place * copies, (place + 1) * copies)
        ]
        for place, index in enumerate(indices)
    }


def _any_alive(alive: Tensor, trainer: Trainer, in_step: bool) -> bool:
    if not in_step:
        return bool(alive.any())
    flag = alive.any().int()
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=trainer.world.groups.dp_cp)
    return bool(flag)


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: SamplingParameters) -> tuple[Tensor, Tensor]:
    """(token ids (B), log-probabilities (B)) by inverting the distribution's cumulative sum at `uniform_B`.

    Of equally likely tokens the lower id counts as the likelier. Log-probabilities are at the temperature, over the
    whole vocabulary, before anything is cut off.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float() / (sampling.temperature or 1.0), -1)
    if sampling.temperature == 0:
        ids = logprobs_BV.argmax(-1)
        return ids, logprobs_BV.gather(1, ids[:, None]).squeeze(1)
    weights, order = logprobs_BV.double().exp(), None
    if sampling.top_p < 1 or sampling.top_k is not None:
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        if sampling.top_k is not None:
            weights[:, sampling.top_k :] = 0
        reached = weights.cumsum(-1)
        weights = weights * (reached - weights < sampling.top_p * reached[:, -1:])
    if sampling.min_p > 0:
        weights = weights * (weights >= sampling.min_p * weights.amax(-1, keepdim=True))
    ids = _invert(weights, uniform_B)
    if order is not None:
        ids = order.gather(1, ids[:, None]).squeeze(1)
    return ids, logprobs_BV.gather(1, ids[:, None]).squeeze(1)


def _invert(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    cumulative = weights_BV.cumsum(-1)
    place = torch.searchsorted(cumulative, (uniform_B.double() * cumulative[:, -1])[:, None], right=True).squeeze(1)
    # Rounding may point past the last token of non-zero weight.
    last = (weights_BV > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(place, last)


_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea, Flood 2014): a counter becomes 64 random bits."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
        return x ^ (x >> np.uint64(31))


def _streams(seed: int, indices: list[int], copies: int) -> np.ndarray:
    """A 64-bit stream number for every completion."""
    with np.errstate(over="ignore"):
        base = _mix(np.array(seed % 2**64, dtype=np.uint64) + _GOLDEN)
        prompt = _mix(base + np.repeat(np.array(indices, dtype=np.uint64), copies) * _GOLDEN)
        return _mix(prompt + np.tile(np.arange(copies, dtype=np.uint64), len(indices)) * _MIX_1 + np.uint64(1))


def _uniform(streams: np.ndarray, step: int) -> Tensor:
    """Numbers in [0, 1), float64, one a stream: the `step`-th of each."""
    with np.errstate(over="ignore"):
        bits = _mix(streams + np.uint64(step + 1) * _GOLDEN)
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53)
