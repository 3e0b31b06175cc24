"""The grpo family in plain torch: the definition that every other backend is tested against.

Letters: T packed tokens, H hidden, V this rank's rows of the vocabulary, C tokens of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from r1.kernels.backend import wide

LOGITS_PER_CHUNK = 2**21  # 8 MB of float32: stays in the cache of a CPU
MIN_CHUNK = 128  # below this the matrix products starve


def default_chunk(V: int) -> int:
    return max(MIN_CHUNK, LOGITS_PER_CHUNK // max(V, 1))


class _Shard:
    """This rank's rows of the head: `weight_VH` without padding rows, `first` the global id of row 0, and the group."""

    def __init__(self, weight_VH: Tensor, vocab_size: int, group_name: str) -> None:
        name = cast("distributed_c10d.GroupName", group_name)
        self.group = distributed_c10d._resolve_process_group(name) if group_name else None
        rank = self.group.rank() if self.group else 0
        ways = self.group.size() if self.group else 1
        rows = weight_VH.shape[0]
        self.first = rank * rows
        self.vocab_size = vocab_size if vocab_size >= 0 else rows * ways
        self.weight_VH = weight_VH[: max(0, min(rows, self.vocab_size - self.first))]

    def own(self, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """(column of each target, clamped into the shard; whether the shard holds it)."""
        column = targets_C - self.first
        held = (column >= 0) & (column < self.weight_VH.shape[0])
        return column.clamp(0, max(self.weight_VH.shape[0] - 1, 0)), held


def _used_rows(targets_T: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    used_T = targets_T != ignore_index
    outside_T = used_T & ((targets_T < 0) | (targets_T >= vocab_size))
    if outside_T.any():
        at = int(outside_T.nonzero()[0])
        raise ValueError(
            f"targets_T[{at}] is {int(targets_T[at])}, wanted 0 <= target < {vocab_size} or ignore_index {ignore_index}"
        )
    return used_T.nonzero().squeeze(1)


def _logits(hidden_CH: Tensor, weight_VH: Tensor, temperature: float, dtype: torch.dtype, out: Tensor) -> Tensor:
    logits_CV = out[: hidden_CH.shape[0]]
    torch.mm(hidden_CH.to(dtype), weight_VH.t(), out=logits_CV)
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


def linear_logprob(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    temperature: float,
    want_entropy: bool,
    ignore_index: int,
    chunk_tokens: int,
    vocab_size: int,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), entropy or an empty tensor, log-sum-exp of the logits), each (T), in float32 or float64."""
    dtype, T = wide(hidden_TH, weight_VH), hidden_TH.shape[0]
    shard = _Shard(weight_VH, vocab_size, group_name)
    rows = _used_rows(targets_T, ignore_index, shard.vocab_size)
    weight = shard.weight_VH.to(dtype)
    buffer = weight.new_empty(min(chunk_tokens, len(rows)), weight.shape[0])
    results = hidden_TH.new_zeros(3, T, dtype=dtype)
    for chunk in rows.split(chunk_tokens) if len(rows) else ():
        logits_CV = _logits(hidden_TH.index_select(0, chunk), weight, temperature, dtype, buffer)
        column, held = shard.own(targets_T.index_select(0, chunk))
        statistics = _local_statistics(logits_CV, column, held, want_entropy)
        largest, total, target, weighted = _combine(statistics, shard.group)
        lse = total.log() + largest
        results[0].index_copy_(0, chunk, target - lse)
        results[1].index_copy_(0, chunk, lse - weighted / total)
        results[2].index_copy_(0, chunk, lse)
    logprobs, entropy, lse = (r.clone() for r in results)
    return logprobs, entropy if want_entropy else entropy.new_empty(0), lse


def _local_statistics(logits_CV: Tensor, column_C: Tensor, held_C: Tensor, want_entropy: bool) -> Tensor:
    """Rows: the largest logit m, sum exp(x - m), the target's logit (0 if elsewhere), sum x exp(x - m)."""
    C, V = logits_CV.shape
    statistics = logits_CV.new_zeros(4, C)
    if V == 0:
        statistics[0] = -torch.inf
        return statistics
    largest = torch.amax(logits_CV, -1, out=statistics[0])
    statistics[2] = torch.where(held_C, logits_CV.gather(1, column_C[:, None]).squeeze(1), 0)
    if not want_entropy:
        torch.sum(logits_CV.sub_(largest[:, None]).exp_(), -1, out=statistics[1])
        return statistics
    weights_CV = (logits_CV - largest[:, None]).exp_()
    torch.sum(weights_CV, -1, out=statistics[1])
    torch.sum(weights_CV.mul_(logits_CV), -1, out=statistics[3])
    return statistics


def _combine(statistics: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """The statistics of the whole vocabulary, added in rank order so that every rank has the same bits."""
    if group is None:
        return statistics
    parts = [torch.empty_like(statistics) for _ in range(group.size())]
    torch.distributed.all_gather(parts, statistics.contiguous(), group=group)
    all_R4C = torch.stack(parts)
    largest = all_R4C[:, 0].amax(0)
    scale_RC = (all_R4C[:, 0] - largest).exp()
    return torch.stack(
        [largest, (all_R4C[:, 1] * scale_RC).sum(0), all_R4C[:, 2].sum(0), (all_R4C[:, 3] * scale_RC).sum(0)]
    )


def linear_logprob_backward(
    grad_logprobs_T: Tensor,
    grad_entropy_T: Tensor | None,
    grad_lse_T: Tensor | None,
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    entropy_T: Tensor,
    lse_T: Tensor,
    temperature: float,
    ignore_index: int,
    chunk_tokens: int,
    vocab_size: int,
    group_name: str,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight), empty where not wanted. The logits are made again, one chunk at a time."""
    dtype = wide(hidden_TH, weight_VH)
    shard = _Shard(weight_VH, vocab_size, group_name)
    weight = shard.weight_VH.to(dtype)
    used_T = targets_T != ignore_index
    if shard.group is None:
        # Prompt tokens come with gradient 0: no work for them. (Under a group every rank must walk the same chunks.)
        gradients = [g for g in (grad_logprobs_T, grad_entropy_T, grad_lse_T) if g is not None]
        used_T = used_T & torch.stack(gradients).ne(0).any(0)
    rows = used_T.nonzero().squeeze(1)
    buffer = weight.new_empty(min(chunk_tokens, len(rows)), weight.shape[0])
    grad_hidden = hidden_TH.new_zeros(hidden_TH.shape if want_hidden else (0, hidden_TH.shape[1]))
    grad_weight = weight.new_zeros(weight_VH.shape if want_weight else (0, weight_VH.shape[1]))
    for chunk in rows.split(chunk_tokens) if len(rows) else ():
        hidden_CH = hidden_TH.index_select(0, chunk).to(dtype)
        logits_CV = _logits(hidden_CH, weight, temperature, dtype, buffer)
        grad_C = grad_logprobs_T.index_select(0, chunk).to(dtype)
        logits_CV.sub_(lse_T.index_select(0, chunk)[:, None])
        coefficient = -grad_C[:, None]
        if grad_lse_T is not None:
            coefficient = coefficient + grad_lse_T.index_select(0, chunk)[:, None]
        if grad_entropy_T is not None:
            # d entropy / d logit = -p (log p + entropy)
            entropy_C1 = entropy_T.index_select(0, chunk)[:, None]
            coefficient = coefficient - (logits_CV + entropy_C1) * grad_entropy_T.index_select(0, chunk)[:, None]
        grad_CV = logits_CV.exp_().mul_(coefficient)
        if weight.shape[0]:
            column, held = shard.own(targets_T.index_select(0, chunk))
            grad_CV.scatter_add_(1, column[:, None], torch.where(held, grad_C, 0)[:, None])
        if temperature != 1.0:
            grad_CV.div_(temperature)
        if want_hidden:
            grad_CH = grad_CV @ weight
            if shard.group is not None:
                torch.distributed.all_reduce(grad_CH, group=shard.group)
            grad_hidden.index_copy_(0, chunk, grad_CH.to(hidden_TH.dtype))
        if want_weight:
            grad_weight[: weight.shape[0]].addmm_(grad_CV.t(), hidden_CH)
    return grad_hidden, grad_weight.to(weight_VH.dtype)


METRICS = (
    "token_count",
    "ratio_sum",
    "clip_low_count",
    "clip_high_count",
    "clip_dual_count",
    "kl_k1_sum",
    "kl_k2_sum",
    "kl_k3_sum",
    "importance_weight_sum",
    "importance_cap_count",
    "mismatch_abs_sum",
    "mismatch_k3_sum",
)


def grpo_loss(
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    reference_logprobs_T: Tensor | None,
    advantages_T: Tensor,
    token_weights_T: Tensor,
    cu_seqlens: Tensor | None,
    rollout_logprobs_T: Tensor | None,
    clip_low: float,
    clip_high: float,
    ratio_max: float | None,
    importance_cap: float | None,
    kl_coefficient: float,
    kl_estimator: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, the sums named in METRICS, d loss / d logprobs). The ratio is per sequence if cu_seqlens is given."""
    dtype = wide(logprobs_T)
    active = token_weights_T != 0
    if not torch.isfinite(torch.where(active, advantages_T, 0)).all():
        at = int((active & ~torch.isfinite(advantages_T)).nonzero()[0])
        raise ValueError(f"advantages_T[{at}] is {float(advantages_T[at])}, wanted a finite number")

    def masked(x_T: Tensor | None) -> Tensor:
        # Outside the completions anything may stand, NaN included.
        assert x_T is not None
        return torch.where(active, x_T.to(dtype), 0)

    logp, old = masked(logprobs_T), masked(old_logprobs_T)
    advantage, weight = masked(advantages_T), masked(token_weights_T)
    log_ratio = logp - old
    over_sequence: Callable[[Tensor], Tensor] | None = None
    if cu_seqlens is not None:
        over_sequence = _sequence_mean(cu_seqlens, active)
        log_ratio = over_sequence(log_ratio)
    ratio = log_ratio.exp()
    bounded = ratio if ratio_max is None else ratio.clamp(max=ratio_max)
    free, clipped = bounded * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    importance = torch.ones_like(ratio)
    mismatch = old - masked(rollout_logprobs_T) if rollout_logprobs_T is not None else logp.new_zeros(())
    if importance_cap is not None:
        importance = masked(mismatch.exp().clamp(max=importance_cap))

    # d min(free, clipped) / d log ratio
    inside = (ratio >= 1 - clip_low) & (ratio <= 1 + clip_high)
    slope = torch.where(free <= clipped, bounded == ratio, inside) * advantage * ratio
    loss = -torch.minimum(free, clipped) * importance * weight
    gradient = -slope * importance * weight
    if over_sequence is not None:
        # The mean is its own transpose.
        gradient = over_sequence(gradient)

    zero = logp.new_zeros(())
    kl = {"k1": zero, "k2": zero, "k3": zero}
    if reference_logprobs_T is not None:
        toward = masked(reference_logprobs_T) - logp
        growth = toward.expm1()
        kl = {"k1": -toward, "k2": 0.5 * toward.square(), "k3": growth - toward}
        if kl_coefficient:
            slope = {"k1": torch.ones_like(logp), "k2": -toward, "k3": -growth}[kl_estimator]
            loss = loss + kl_coefficient * weight * kl[kl_estimator]
            gradient = gradient + kl_coefficient * weight * slope

    sums = {
        "token_count": active,
        "ratio_sum": masked(ratio),
        "clip_low_count": active & (ratio < 1 - clip_low) & (advantage < 0),
        "clip_high_count": active & (ratio > 1 + clip_high) & (advantage > 0),
        "clip_dual_count": active & (bounded < ratio) & (advantage < 0),
        "kl_k1_sum": kl["k1"],
        "kl_k2_sum": kl["k2"],
        "kl_k3_sum": kl["k3"],
        "importance_weight_sum": masked(importance),
        "importance_cap_count": active & (mismatch.exp() > (importance_cap or torch.inf)),
        "mismatch_abs_sum": mismatch.abs(),
        "mismatch_k3_sum": (-mismatch).expm1() + mismatch,
    }
    metrics = torch.stack([sums[name].sum(dtype=torch.float64) for name in METRICS]).to(dtype)
    return loss.sum(dtype=torch.float64).to(dtype), metrics, gradient.to(logprobs_T.dtype)


def _sequence_mean(cu_seqlens: Tensor, active_T: Tensor) -> Callable[[Tensor], Tensor]:
    """The function that puts the mean over a sequence's active tokens in the place of each of them, 0 elsewhere."""
    lengths_S = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    if int(lengths_S.sum()) != len(active_T) or bool((lengths_S < 0).any()):
        raise ValueError(f"cu_seqlens is {cu_seqlens.tolist()}, wanted 0 first, {len(active_T)} last and no step down")
    sequence_T = torch.repeat_interleave(lengths_S, output_size=len(active_T))

    def total(x_T: Tensor) -> Tensor:
        return x_T.new_zeros(len(lengths_S)).index_add_(0, sequence_T, x_T)

    def mean(x_T: Tensor) -> Tensor:
        count_S = total(active_T.to(x_T.dtype)).clamp(min=1)
        return torch.where(active_T, (total(x_T) / count_S)[sequence_T], 0)

    return mean
