"""grpo_loss in Triton: one pass over the tokens, or with a ratio per sequence three, one program a sequence.

What is added up over tokens is left to torch.sum in float64, whose order is fixed. float64 input is computed by the
torch backend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from r1.kernels.backend import wide
from r1.kernels.grpo import reference

GRPO_BLOCK = 1024


@triton.jit
def _kl(toward):
    """(k3, exp(toward) - 1) of reference log-probability - log-probability, without the cancellation near 0."""
    series = 1.0 + toward / 10
    for i in tl.static_range(7):
        series = 1.0 + toward / (9 - i) * series
    k3 = tl.where(tl.abs(toward) < 0.5, 0.5 * toward * toward * series, tl.exp(toward) - 1 - toward)
    return k3, k3 + toward


@triton.jit
def _load(pointer, at, active):
    # Where no weight is, anything may stand, NaN included.
    return tl.load(pointer + at, mask=active, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def grpo_kernel(
    logp_ptr, old_ptr, reference_ptr, advantage_ptr, weight_ptr, rollout_ptr, bounds_ptr, terms_ptr, gradient_ptr, T,
    clip_low, clip_high, ratio_max, importance_cap, kl_coefficient,
    SEQUENCE: tl.constexpr, REFERENCE: tl.constexpr, ROLLOUT: tl.constexpr, CAPPED: tl.constexpr, KL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program does BLOCK tokens, or with SEQUENCE one sequence. A token leaves its loss and its metrics, (13, T)."""
    program = tl.program_id(0)
    if SEQUENCE:
        begin, end = tl.load(bounds_ptr + program), tl.minimum(tl.load(bounds_ptr + program + 1), T)
    else:
        begin, end = program * BLOCK, tl.minimum(program * BLOCK + BLOCK, T)
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    slopes = tl.zeros((BLOCK,), tl.float32)
    if SEQUENCE:
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            active = tl.load(weight_ptr + at, mask=at < end, other=0.0) != 0
            total += _load(logp_ptr, at, active) - _load(old_ptr, at, active)
            count += active.to(tl.float32)
    tokens = tl.maximum(tl.sum(count, 0), 1.0)
    mean = tl.sum(total, 0) / tokens
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        live = at < end
        weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
        active = weight != 0
        logp, old = _load(logp_ptr, at, active), _load(old_ptr, at, active)
        advantage = _load(advantage_ptr, at, active)
        log_ratio = logp - old
        if SEQUENCE:
            log_ratio = tl.where(active, mean, 0.0)
        ratio = tl.exp(log_ratio)
        bounded = tl.minimum(ratio, ratio_max)
        free = bounded * advantage
        clipped = tl.minimum(tl.maximum(ratio, 1 - clip_low), 1 + clip_high) * advantage
        importance = tl.full((BLOCK,), 1.0, tl.float32)
        mismatch = tl.zeros((BLOCK,), tl.float32)
        if ROLLOUT:
            mismatch = old - _load(rollout_ptr, at, active)
        if CAPPED:
            importance = tl.minimum(tl.exp(mismatch), importance_cap)
        inside = (ratio >= 1 - clip_low) & (ratio <= 1 + clip_high)
        moves = tl.where(free <= clipped, bounded == ratio, inside)
        slope = tl.where(moves, -advantage * ratio * importance * weight, 0.0)
        loss = -tl.minimum(free, clipped) * importance * weight
        # A GPU's minimum drops a NaN.
        loss, slope = tl.where(ratio == ratio, loss, ratio), tl.where(ratio == ratio, slope, ratio)
        kl_gradient = tl.zeros((BLOCK,), tl.float32)
        toward = tl.zeros((BLOCK,), tl.float32)
        if REFERENCE:
            toward = _load(reference_ptr, at, active) - logp
        k3, growth = _kl(toward)
        if KL == 1:
            loss += -kl_coefficient * weight * toward
            kl_gradient = kl_coefficient * weight
        elif KL == 2:
            loss += kl_coefficient * weight * 0.5 * toward * toward
            kl_gradient = -kl_coefficient * weight * toward
        elif KL == 3:
            loss += kl_coefficient * weight * k3
            kl_gradient = -kl_coefficient * weight * growth
        mismatch_k3, _ = _kl(mismatch)
        one = active.to(tl.float32)
        tl.store(terms_ptr + at, loss, mask=live)
        tl.store(terms_ptr + T + at, one, mask=live)
        tl.store(terms_ptr + 2 * T + at, ratio * one, mask=live)
        tl.store(terms_ptr + 3 * T + at, tl.where((ratio < 1 - clip_low) & (advantage < 0), one, 0.0), mask=live)
        tl.store(terms_ptr + 4 * T + at, tl.where((ratio > 1 + clip_high) & (advantage > 0), one, 0.0), mask=live)
        tl.store(terms_ptr + 5 * T + at, tl.where((bounded < ratio) & (advantage < 0), one, 0.0), mask=live)
        tl.store(terms_ptr + 6 * T + at, -toward, mask=live)
        tl.store(terms_ptr + 7 * T + at, 0.5 * toward * toward, mask=live)
        tl.store(terms_ptr + 8 * T + at, k3, mask=live)
        tl.store(terms_ptr + 9 * T + at, importance * one, mask=live)
        tl.store(terms_ptr + 10 * T + at, tl.where(tl.exp(mismatch) > importance_cap, one, 0.0), mask=live)
        tl.store(terms_ptr + 11 * T + at, tl.abs(mismatch), mask=live)
        tl.store(terms_ptr + 12 * T + at, mismatch_k3, mask=live)
        if SEQUENCE:
            slopes += slope
        else:
            tl.store(gradient_ptr + at, slope + kl_gradient, mask=live)
    if SEQUENCE:
        # The mean is its own transpose: each token of the sequence gets the mean of all slopes.
        slope = tl.sum(slopes, 0) / tokens
        for first in range(begin, end, BLOCK):
            at = first + tl.arange(0, BLOCK)
            live = at < end
            weight = tl.load(weight_ptr + at, mask=live, other=0.0).to(tl.float32)
            active = weight != 0
            gradient = tl.where(active, slope, 0.0)
            if REFERENCE and KL:
                toward = _load(reference_ptr, at, active) - _load(logp_ptr, at, active)
                _, growth = _kl(toward)
                if KL == 1:
                    gradient += kl_coefficient * weight
                elif KL == 2:
                    gradient -= kl_coefficient * weight * toward
                else:
                    gradient -= kl_coefficient * weight * growth
            tl.store(gradient_ptr + at, gradient, mask=live)


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
    """As in reference.py."""
    inputs = (logprobs_T, old_logprobs_T, reference_logprobs_T, advantages_T, token_weights_T)
    if wide(logprobs_T) == torch.float64:
        return reference.grpo_loss(
            *inputs, cu_seqlens, rollout_logprobs_T, clip_low, clip_high, ratio_max, importance_cap, kl_coefficient,
            kl_estimator, check_values,
        )  # fmt: skip
    if check_values:
        reference.check_grpo_values(advantages_T, token_weights_T, cu_seqlens)
    T = logprobs_T.shape[0]
    terms = logprobs_T.new_zeros(1 + len(reference.METRICS), T, dtype=torch.float32)
    gradient = torch.zeros_like(logprobs_T)
    programs = triton.cdiv(T, GRPO_BLOCK) if cu_seqlens is None else len(cu_seqlens) - 1
    if T and programs:
        tensors = [token_weights_T if x is None else x.contiguous() for x in (*inputs, rollout_logprobs_T)]
        grpo_kernel[(programs,)](
            *tensors, terms if cu_seqlens is None else cu_seqlens.contiguous(), terms, gradient, T,
            clip_low, clip_high, float("inf") if ratio_max is None else ratio_max,
            float("inf") if importance_cap is None else importance_cap, kl_coefficient,
            SEQUENCE=cu_seqlens is not None, REFERENCE=reference_logprobs_T is not None,
            ROLLOUT=rollout_logprobs_T is not None, CAPPED=importance_cap is not None,
            KL=int(kl_estimator[1]) if kl_coefficient else 0, BLOCK=GRPO_BLOCK,
        )  # fmt: skip
    sums = terms.sum(1, dtype=torch.float64).float()
    return sums[0].clone(), sums[1:].clone(), gradient
