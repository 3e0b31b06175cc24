"""The grpo family in plain torch: the definition that every other backend is tested against.

linear_logprob and its backward walk over the vocabulary. What a backend does for one span of it are three functions,
`statistics`, `grad_logits` and `accumulate`; a backend is a module that has them, and `kernels` below is that module.

Letters: T packed tokens, N those of them that take part, H hidden, V this rank's rows of the vocabulary, C one span.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import cast

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

from r1.kernels.backend import wide
from r1.kernels.exact import is_exact, product

THIS = sys.modules[__name__]
KEPT_SPAN = 8192  # columns of kept logits whose gradient exists at a time


class _Shard:
    """This rank's rows of the head: `weight_VH` without padding rows, `first` the global id of row 0, and the group."""

    def __init__(self, weight_VH: Tensor, vocab_size: int, group_name: str) -> None:
        name = cast("distributed_c10d.GroupName", group_name)
        self.group = distributed_c10d._resolve_process_group(name) if group_name else None
        rows = weight_VH.shape[0]
        self.first = self.group.rank() * rows if self.group else 0
        self.weight_VH = weight_VH[: max(0, min(rows, vocab_size - self.first))]

    def spans(self, width: int) -> list[tuple[int, int]]:
        V = self.weight_VH.shape[0]
        return [(begin, min(begin + width, V)) for begin in range(0, V, width)]


def _rows(targets_T: Tensor, ignore_index: int, vocab_size: int, check_values: bool) -> tuple[Tensor | None, int]:
    """(which rows take part, None for all; how many). With check_values this waits for a GPU, once."""
    T = targets_T.shape[0]
    if not check_values:
        return None, T
    used_T = targets_T != ignore_index
    outside_T = _outside(targets_T, ignore_index, vocab_size)
    count, wrong = torch.stack([used_T.sum(), outside_T.sum()]).tolist()
    if wrong:
        at = int(outside_T.nonzero()[0])
        raise ValueError(
            f"targets_T[{at}] is {int(targets_T[at])}, wanted 0 <= target < {vocab_size} or ignore_index {ignore_index}"
        )
    return _first_rows(used_T, count), count


def _outside(targets_T: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    return (targets_T != ignore_index) & ((targets_T < 0) | (targets_T >= vocab_size))


def _first_rows(used_T: Tensor, count: int) -> Tensor | None:
    """The indices of the `count` rows that are used, without asking a GPU how many they are; None for all."""
    if count == used_T.shape[0]:
        return None
    return torch.argsort((~used_T).to(torch.uint8), stable=True)[:count]


def _take(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


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
    check_values: bool,
    keep_logits: bool,
    *,
    kernels: ModuleType = THIS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log p(target), entropy or an empty tensor, log-sum-exp of the logits, each (T), in float32 or float64; then for
    the backward the number of rows that take part (0-d, on the CPU; -1 if nobody looked), and their logits if kept,
    else an empty tensor."""
    dtype, T = wide(hidden_TH, weight_VH), hidden_TH.shape[0]
    shard = _Shard(weight_VH, vocab_size, group_name)
    rows, N = _rows(targets_T, ignore_index, vocab_size, check_values)
    if not check_values:
        hidden_TH = hidden_TH.masked_fill((targets_T == ignore_index)[:, None], 0)
    V = shard.weight_VH.shape[0]
    kept_TV = hidden_TH.new_empty(T if keep_logits else 0, weight_VH.shape[0], dtype=dtype)
    results_3T = hidden_TH.new_zeros(3, T, dtype=dtype)
    if N:
        hidden_NH, column_N = _take(hidden_TH, rows), _take(targets_T, rows) - shard.first
        logits_NV = kept_TV[:N, :V] if keep_logits else None
        width = _width(chunk_tokens, weight_VH, N, kernels.SPAN_UNIT)
        statistics_4N = kernels.statistics(
            hidden_NH, shard.weight_VH, column_N, temperature, want_entropy, width, logits_NV
        )
        largest, total, target, weighted = _over_ranks(statistics_4N, shard.group)
        log_total = total.log()
        results_3N = torch.stack([target - largest - log_total, log_total - weighted / total, largest + log_total])
        results_3T = results_3N if rows is None else results_3T.index_copy_(1, rows, results_3N)
    logprobs, entropy, lse = results_3T.unbind()
    if not check_values:
        results_3T[:2].masked_fill_(targets_T == ignore_index, 0)
        logprobs.masked_fill_(_outside(targets_T, ignore_index, vocab_size), torch.nan)
    count = torch.tensor(N if check_values else -1)
    return logprobs.clone(), entropy.clone() if want_entropy else entropy.new_empty(0), lse.clone(), count, kept_TV


def _width(chunk_tokens: int, weight_VH: Tensor, N: int, unit: int) -> int:
    """Columns of the vocabulary, in units, whose logits for N tokens take the room of chunk_tokens whole rows; a fixed
    number where a token's sums must not depend on N."""
    if is_exact():
        return KEPT_SPAN
    return max(1, chunk_tokens * weight_VH.shape[0] // N // unit) * unit


def _merge(a_4N: Tensor, b_4N: Tensor) -> Tensor:
    """The statistics of two parts of the vocabulary together."""
    largest_N = torch.maximum(a_4N[0], b_4N[0])
    merged = torch.zeros_like(a_4N)
    merged[0] = largest_N
    for largest, total, target, weighted in (a_4N, b_4N):
        below = largest - largest_N
        scale = below.exp()
        merged[1] += total * scale
        merged[2] += target
        merged[3] += (weighted + below * total) * scale
    return merged


def _over_ranks(statistics_4N: Tensor, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """The statistics of the whole vocabulary, merged in rank order so that every rank has the same bits."""
    if group is None:
        return statistics_4N
    parts = [torch.empty_like(statistics_4N) for _ in range(group.size())]
    torch.distributed.all_gather(parts, statistics_4N.contiguous(), group=group)
    whole = parts[0]
    for part in parts[1:]:
        whole = _merge(whole, part)
    return whole


def linear_logprob_backward(
    grad_logprobs_T: Tensor | None,
    grad_entropy_T: Tensor | None,
    grad_lse_T: Tensor | None,
    hidden_TH: Tensor,
    weight_VH: Tensor,
    targets_T: Tensor,
    entropy_T: Tensor,
    lse_T: Tensor,
    count: Tensor,
    kept_TV: Tensor,
    temperature: float,
    ignore_index: int,
    chunk_tokens: int,
    vocab_size: int,
    group_name: str,
    want_hidden: bool,
    want_weight: bool,
    *,
    kernels: ModuleType = THIS,
) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight), empty where not wanted. Logits that were not kept are made again, a span at a time."""
    shard = _Shard(weight_VH, vocab_size, group_name)
    used_T, N, V = targets_T != ignore_index, int(count), shard.weight_VH.shape[0]
    if N < 0:
        # Rows of ignored tokens may hold anything.
        N, lse_T, hidden_TH = len(used_T), lse_T.masked_fill(~used_T, 0), hidden_TH.masked_fill(~used_T[:, None], 0)
    rows = _first_rows(used_T, N) if int(count) >= 0 else None
    grad_hidden = hidden_TH.new_zeros(
        hidden_TH.shape if want_hidden and (rows is not None or not N) else (0, hidden_TH.shape[1])
    )
    grad_weight = weight_VH.new_empty(weight_VH.shape if want_weight else (0, weight_VH.shape[1]))
    grad_weight[V if N else 0 :] = 0
    if not N:
        return grad_hidden, grad_weight
    grads = [
        None if g is None else _take(g.masked_fill(~used_T, 0), rows)
        for g in (grad_logprobs_T, grad_entropy_T, grad_lse_T)
    ]
    entropy_N = _take(entropy_T, rows) if grad_entropy_T is not None else None
    lse_N, column_N = _take(lse_T, rows), _take(targets_T, rows) - shard.first
    operand = kernels.operand_dtype(hidden_TH, weight_VH)
    hidden_NH = _take(hidden_TH, rows).to(operand)
    total_NH = hidden_NH.new_zeros(N if want_hidden else 0, hidden_NH.shape[1], dtype=wide(hidden_TH, weight_VH))
    width, unit = _width(chunk_tokens, weight_VH, N, kernels.SPAN_UNIT), kernels.SPAN_UNIT
    if len(kept_TV):
        width = min(width, KEPT_SPAN)
    buffer = hidden_NH.new_empty(N, min(width, -(-V // unit) * unit))
    for begin, end in shard.spans(width):
        weight_CH = shard.weight_VH[begin:end].to(operand)
        grad_NC = kernels.grad_logits(
            hidden_NH, weight_CH, kept_TV[:N, begin:end] if len(kept_TV) else None, lse_N, entropy_N, *grads,
            column_N - begin, temperature, buffer[:, : end - begin],
        )  # fmt: skip
        if want_hidden:
            kernels.accumulate(total_NH, grad_NC, weight_CH)
        if want_weight and grad_weight.dtype == operand:
            torch.mm(grad_NC.t(), hidden_NH, out=grad_weight[begin:end])
        elif want_weight:
            grad_weight[begin:end] = grad_NC.t() @ hidden_NH
    if want_hidden:
        if shard.group is not None:
            torch.distributed.all_reduce(total_NH, group=shard.group)
        if rows is None:
            grad_hidden = total_NH.to(hidden_TH.dtype)
        else:
            grad_hidden.index_copy_(0, rows, total_NH.to(hidden_TH.dtype))
    return grad_hidden, grad_weight


operand_dtype = wide
SPAN_UNIT = 1


def statistics(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    column_N: Tensor,
    temperature: float,
    want_entropy: bool,
    width: int,
    logits_NV: Tensor | None,
) -> Tensor:
    """Of the logits x, in rows: the largest m, sum exp(x - m), x at column_N (0 where that is not here), and with
    want_entropy sum (x - m) exp(x - m), else 0. The logits are left in logits_NV if given."""
    dtype = wide(hidden_NH, weight_VH)
    N, V = hidden_NH.shape[0], weight_VH.shape[0]
    result = hidden_NH.new_zeros(4, N, dtype=dtype)
    if V == 0:
        result[0] = torch.finfo(dtype).min
        return result
    hidden_NH = hidden_NH.to(dtype)
    buffer = hidden_NH.new_empty(N, min(width, V)) if logits_NV is None else logits_NV
    for begin in range(0, V, width):
        logits_NC = buffer[:, : min(width, V - begin)]
        product(hidden_NH, weight_VH[begin : begin + width].to(dtype).t(), logits_NC)
        if temperature != 1.0:
            logits_NC.div_(temperature)
        part = _span_statistics(logits_NC, column_N - begin, want_entropy, spare=logits_NV is None)
        result = part if begin == 0 else _merge(result, part)
    return result


def _span_statistics(logits_NC: Tensor, column_N: Tensor, want_entropy: bool, spare: bool) -> Tensor:
    """`statistics` of one span; the logits may be overwritten if they are to spare."""
    N, C = logits_NC.shape
    result = logits_NC.new_zeros(4, N)
    largest = torch.amax(logits_NC, -1, out=result[0])
    here = (column_N >= 0) & (column_N < C)
    result[2] = torch.where(here, logits_NC.gather(1, column_N.clamp(0, C - 1)[:, None]).squeeze(1), 0)
    if spare and not want_entropy:
        torch.sum(logits_NC.sub_(largest[:, None]).exp_(), -1, out=result[1])
        return result
    below_NC = torch.sub(logits_NC, largest[:, None], out=logits_NC if spare else None)
    weights_NC = below_NC.exp()
    torch.sum(weights_NC, -1, out=result[1])
    if want_entropy:
        torch.sum(weights_NC.mul_(below_NC), -1, out=result[3])
    return result


def grad_logits(
    hidden_NH: Tensor,
    weight_CH: Tensor,
    logits_NC: Tensor | None,
    lse_N: Tensor,
    entropy_N: Tensor | None,
    grad_logprobs_N: Tensor | None,
    grad_entropy_N: Tensor | None,
    grad_lse_N: Tensor | None,
    column_N: Tensor,
    temperature: float,
    out_NC: Tensor,
) -> Tensor:
    """d loss / d (hidden @ weight.T) of one span, in out_NC; from the span's logits if they were kept."""
    C = weight_CH.shape[0]
    if logits_NC is None:
        torch.mm(hidden_NH, weight_CH.t(), out=out_NC)
        logits_NC = out_NC if temperature == 1.0 else out_NC.div_(temperature)
    logp_NC = torch.sub(logits_NC, lse_N[:, None], out=out_NC)
    coefficient = lse_N.new_zeros(len(lse_N), 1)
    if grad_logprobs_N is not None:
        coefficient = coefficient - grad_logprobs_N[:, None]
    if grad_lse_N is not None:
        coefficient = coefficient + grad_lse_N[:, None]
    if grad_entropy_N is not None and entropy_N is not None:
        # d entropy / d logit = -p (log p + entropy)
        coefficient = coefficient - (logp_NC + entropy_N[:, None]) * grad_entropy_N[:, None]
    out_NC = logp_NC.exp_().mul_(coefficient)
    if grad_logprobs_N is not None:
        here = (column_N >= 0) & (column_N < C)
        out_NC.scatter_add_(1, column_N.clamp(0, C - 1)[:, None], torch.where(here, grad_logprobs_N, 0)[:, None])
    return out_NC if temperature == 1.0 else out_NC.div_(temperature)


def accumulate(total_NH: Tensor, grad_NC: Tensor, weight_CH: Tensor) -> None:
    """total += grad @ weight"""
    total_NH.addmm_(grad_NC, weight_CH)


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
    check_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, the sums named in METRICS, d loss / d logprobs). The ratio is per sequence if cu_seqlens is given."""
    dtype = wide(logprobs_T)
    active = token_weights_T != 0
    if check_values:
        check_grpo_values(advantages_T, token_weights_T, cu_seqlens)

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
    slope = torch.where(torch.where(free <= clipped, bounded == ratio, inside), advantage * ratio, 0)
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
        "mismatch_k3_sum": mismatch.expm1() - mismatch,
    }
    metrics = torch.stack([sums[name].sum(dtype=torch.float64) for name in METRICS]).to(dtype)
    return loss.sum(dtype=torch.float64).to(dtype), metrics, gradient.to(logprobs_T.dtype)


def check_grpo_values(advantages_T: Tensor, token_weights_T: Tensor, cu_seqlens: Tensor | None) -> None:
    """Raises ValueError for an advantage in use that is not finite, and for cu_seqlens that do not cover the tokens."""
    wrong_T = (token_weights_T != 0) & ~torch.isfinite(advantages_T)
    if wrong_T.any():
        at = int(wrong_T.nonzero()[0])
        raise ValueError(f"advantages_T[{at}] is {float(advantages_T[at])}, wanted a finite number")
    if cu_seqlens is not None:
        bounds, T = cu_seqlens.tolist(), len(advantages_T)
        if bounds[0] != 0 or bounds[-1] != T or any(a > b for a, b in zip(bounds, bounds[1:])):
            raise ValueError(f"cu_seqlens is {bounds}, wanted 0 first, {T} last and no step down")


def _sequence_mean(cu_seqlens: Tensor, active_T: Tensor) -> Callable[[Tensor], Tensor]:
    """The function that puts the mean over a sequence's active tokens in the place of each of them, 0 elsewhere."""
    lengths_S = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    sequence_T = torch.repeat_interleave(lengths_S, output_size=len(active_T))

    def total(x_T: Tensor) -> Tensor:
        return x_T.new_zeros(len(lengths_S)).index_add_(0, sequence_T, x_T)

    def mean(x_T: Tensor) -> Tensor:
        count_S = total(active_T.to(x_T.dtype)).clamp(min=1)
        return torch.where(active_T, (total(x_T) / count_S)[sequence_T], 0)

    return mean
