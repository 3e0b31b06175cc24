"""The grpo family against float64 autograd, TRL's GRPO loss, and itself in other splits."""

from __future__ import annotations

import types
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from r1.kernels import (
    aggregation_weights,
    group_advantages,
    grpo_loss,
    linear_cross_entropy,
    linear_grpo_loss,
    linear_logprob,
)
from r1.kernels.grpo import reference
from tests.kernels.helpers import check_operator, leaf, ragged, spawn_pair

F64 = torch.float64


def eager_logprob(h: Tensor, w: Tensor, t: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    logits = h.double() @ w.double().t() / temperature
    logp = logits.log_softmax(-1)
    return logp.gather(1, t[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1), logits.logsumexp(-1)


@pytest.mark.parametrize(("T", "H", "V", "chunk"), [(193, 70, 517, None), (50, 16, 33, 7), (1, 4, 5, 1), (0, 8, 9, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_logprob(seed: int, T: int, H: int, V: int, chunk: int | None, dtype: torch.dtype) -> None:
    h, w = leaf(T, H, dtype=dtype), leaf(V, H, dtype=dtype)
    t = torch.randint(0, V, (T,))
    up, up_entropy = torch.randn(T, dtype=F64), torch.randn(T, dtype=F64)
    logp, entropy = linear_logprob(h, w, t, 0.7, return_entropy=True, chunk_tokens=chunk)
    assert logp.dtype == entropy.dtype == (F64 if dtype == F64 else torch.float32)
    grads = torch.autograd.grad((logp * up).sum() + (entropy * up_entropy).sum(), (h, w))
    h64, w64 = h.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    want, want_entropy, _ = eager_logprob(h64, w64, t, 0.7)
    want_grads = torch.autograd.grad((want * up).sum() + (want_entropy * up_entropy).sum(), (h64, w64))
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 1e-4}[dtype]
    torch.testing.assert_close(logp.double(), want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(entropy.double(), want_entropy, atol=tolerance, rtol=tolerance)
    rounding = 1e-2 if dtype == torch.bfloat16 else 10 * tolerance
    for got, expected in zip(grads, want_grads):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, atol=rounding, rtol=rounding)


def test_padding_rows_and_ignored_targets_take_no_part(seed: int) -> None:
    h, w = leaf(20, 6), leaf(16, 6)
    t = torch.randint(0, 11, (20,))
    t[3] = -100
    plain = linear_logprob(h, w[:11], t.clamp(min=0))
    poisoned = w.detach().clone()
    poisoned[11:] = float("nan")
    poisoned.requires_grad_()
    logp = linear_logprob(h, poisoned, t, vocab_size=11)
    kept = torch.arange(20) != 3
    torch.testing.assert_close(logp[kept], plain[kept])
    assert logp[3] == 0
    grad_h, grad_w = torch.autograd.grad(logp.sum(), (h, poisoned))
    assert grad_h[3].eq(0).all() and grad_w[11:].eq(0).all() and grad_w.isfinite().all() and grad_h.isfinite().all()


def test_linear_cross_entropy(seed: int) -> None:
    h, w = leaf(30, 8), leaf(21, 8)
    t = torch.randint(0, 21, (30,))
    t[::5] = -100
    loss = linear_cross_entropy(h, w, t, z_loss=0.03, chunk_tokens=4)
    logits = h @ w.t()
    want = torch.nn.functional.cross_entropy(logits, t, reduction="none") + 0.03 * logits.logsumexp(-1) ** 2 * (t >= 0)
    torch.testing.assert_close(loss, want)
    up = torch.randn(30)
    for a, b in zip(torch.autograd.grad((loss * up).sum(), (h, w)), torch.autograd.grad((want * up).sum(), (h, w))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_only_wanted_gradients_are_made(seed: int) -> None:
    h, w, t = leaf(10, 4), leaf(7, 4), torch.randint(0, 7, (10,))
    both = torch.autograd.grad(linear_logprob(h, w, t).sum(), (h, w))
    torch.testing.assert_close(torch.autograd.grad(linear_logprob(h, w.detach(), t).sum(), h)[0], both[0])
    torch.testing.assert_close(torch.autograd.grad(linear_logprob(h.detach(), w, t).sum(), w)[0], both[1])


def test_logits_are_never_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            nonlocal largest
            out = op(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, Tensor):
                    largest = max(largest, x.numel())
            return out

    T, H, V = 512, 8, 256
    h, w, t = leaf(T, H), leaf(V, H), torch.randint(0, V, (T,))
    watch = Watch()
    for name in ("linear_logprob", "linear_logprob_backward"):
        real = getattr(reference, name)

        def watched(*args: Any, real: Any = real) -> Any:
            with watch:
                return real(*args)

        monkeypatch.setattr(reference, name, watched)
    linear_logprob(h, w, t, chunk_tokens=16, return_entropy=True)[0].sum().backward()
    assert 0 < largest <= max(16 * V, T * H)


def eager_grpo(
    logp: Tensor,
    old: Tensor,
    ref: Tensor | None,
    A: Tensor,
    weight: Tensor,
    lengths: list[int] | None,
    low: float,
    high: float,
    beta: float,
    kl: str,
    ratio_max: float | None,
    rollout: Tensor | None,
    cap: float | None,
) -> Tensor:
    """An independent statement of the loss, one token at a time."""
    total = logp.new_zeros(())
    log_ratio = logp - old
    bounds = [0]
    for n in lengths or []:
        bounds.append(bounds[-1] + n)
    for i in range(len(logp)):
        if weight[i] == 0:
            continue
        r = log_ratio[i].exp()
        if lengths:
            s = max(j for j in range(len(lengths)) if bounds[j] <= i and lengths[j])
            own = [j for j in range(bounds[s], bounds[s + 1]) if weight[j] != 0]
            r = (sum(log_ratio[j] for j in own) / len(own)).exp()
        free = torch.clamp(r, max=ratio_max) if ratio_max is not None else r
        token = -torch.min(free * A[i], torch.clamp(r, 1 - low, 1 + high) * A[i])
        if cap is not None:
            token = token * min(float((old[i] - rollout[i]).exp()), cap)
        if beta:
            d = ref[i] - logp[i]
            token = token + beta * {"k1": -d, "k2": d * d / 2, "k3": d.exp() - d - 1}[kl]
        total = total + weight[i] * token
    return total


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("extras", [False, True])
def test_grpo_loss_against_float64(seed: int, kl: str, ratio: str, extras: bool) -> None:
    lengths = [9, 0, 1, 14, 6]
    T = sum(lengths)
    logp, old, ref, rollout = (torch.randn(T, dtype=F64) * 0.4 - 2 for _ in range(4))
    A = torch.randn(T, dtype=F64)
    weight = torch.rand(T, dtype=F64) * (torch.rand(T) > 0.3)
    logp.requires_grad_()
    options = {"ratio_max": 1.6, "rollout_logprobs_T": rollout, "importance_cap": 1.2} if extras else {}
    loss, metrics = grpo_loss(
        logp, old, ref, A, weight, cu_seqlens=ragged(*lengths), clip_low=0.2, clip_high=0.3, kl_coefficient=0.1,
        kl_estimator=kl, ratio=ratio, **options,
    )  # fmt: skip
    want = eager_grpo(
        logp, old, ref, A, weight, lengths if ratio == "sequence" else None, 0.2, 0.3, 0.1, kl,
        *((1.6, rollout, 1.2) if extras else (None, None, None)),
    )  # fmt: skip
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, logp), torch.autograd.grad(want, logp))
    active = weight != 0
    assert metrics["token_count"] == active.sum()
    d = (ref - logp)[active]
    torch.testing.assert_close(metrics["kl_k3_sum"], (d.exp() - d - 1).sum().detach())
    if extras:  # the old policy's from the rollout's, which sampled: exp(m) - 1 - m estimates their divergence
        m = (old - rollout)[active]
        torch.testing.assert_close(metrics["mismatch_abs_sum"], m.abs().sum())
        torch.testing.assert_close(metrics["mismatch_k3_sum"], (m.exp() - m - 1).sum())
    if ratio == "token":
        r = (logp - old).exp()
        torch.testing.assert_close(metrics["ratio_sum"], r[active].sum().detach())
        assert metrics["clip_low_count"] == (active & (r < 0.8) & (A < 0)).sum()
        assert metrics["clip_high_count"] == (active & (r > 1.3) & (A > 0)).sum()


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 1.5])
def test_grpo_loss_against_trl(seed: int, loss_type: str, level: str, delta: float | None) -> None:
    trl = pytest.importorskip("trl")
    B, L, limit = 6, 12, 20
    lengths = torch.randint(1, L + 1, (B,))
    mask = (torch.arange(L) < lengths[:, None]).long()
    logp = (torch.randn(B, L) * 0.4 - 2).requires_grad_()
    old, ref, A = torch.randn(B, L) * 0.4 - 2, torch.randn(B, L) * 0.4 - 2, torch.randn(B)

    class Trainer(trl.GRPOTrainer):
        """TRL's loss method with given log-probabilities, without a model behind it."""

        def __init__(self) -> None:
            self.loss_type, self.importance_sampling_level = loss_type, level
            self.beta, self.epsilon_low, self.epsilon_high = 0.05, 0.2, 0.28
            self.args = types.SimpleNamespace(delta=delta, use_bias_correction_kl=False)
            self.top_entropy_quantile, self.off_policy_mask_threshold = 1.0, None
            self.use_vllm = self.aux_loss_enabled = self._entropy_bonus_enabled = self.use_liger_kernel = False
            self.vllm_importance_sampling_correction = False
            self.max_completion_length, self.current_gradient_accumulation_steps = limit, 1
            self.model = types.SimpleNamespace(training=True)
            identity = lambda x, **_: x
            self.accelerator = types.SimpleNamespace(gather=identity, reduce=identity, num_processes=1)
            self._metrics = {"train": defaultdict(list)}

        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
            return logp, torch.zeros(B, L), None

    ids = torch.zeros(B, L, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": A, "old_per_token_logps": old, "ref_per_token_logps": ref,
    }  # fmt: skip
    want = Trainer()._compute_loss(None, inputs)
    weights = aggregation_weights(
        lengths, {"grpo": "sequence_mean", "bnpo": "token_mean", "dr_grpo": "constant"}[loss_type],
        constant_length=limit,
    )  # fmt: skip
    packed = mask.bool()
    loss, _ = grpo_loss(
        logp[packed], old[packed], ref[packed], A.repeat_interleave(lengths), weights.repeat_interleave(lengths),
        cu_seqlens=ragged(*lengths.tolist()), clip_low=0.2, clip_high=0.28, kl_coefficient=0.05, ratio=level,
        ratio_max=delta,
    )  # fmt: skip
    torch.testing.assert_close(loss, want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logp)[0], torch.autograd.grad(want, logp)[0], atol=1e-7, rtol=1e-4
    )


def test_grpo_loss_does_not_depend_on_split_order_or_padding(seed: int) -> None:
    lengths = torch.tensor([5, 9, 3, 7])
    T = int(lengths.sum())
    logp = torch.randn(T).sub(2).requires_grad_()
    old, ref, A = torch.randn(T) - 2, torch.randn(T) - 2, torch.randn(4).repeat_interleave(lengths)
    weight = aggregation_weights(lengths).repeat_interleave(lengths)
    whole, sums = grpo_loss(logp, old, ref, A, weight, kl_coefficient=0.1)
    (want,) = torch.autograd.grad(whole, logp)
    rows = list(torch.arange(T).split(lengths.tolist()))
    poison = torch.full((4,), float("nan"))
    split, counted = 0, 0
    for part in (torch.cat([rows[2], rows[0]]), rows[3], rows[1]):
        pad = lambda x, fill=poison, part=part: torch.cat([x[part], fill])
        loss, metrics = grpo_loss(
            pad(logp), pad(old), pad(ref), pad(A), pad(weight, torch.zeros(4)), kl_coefficient=0.1
        )
        split, counted = split + loss, counted + metrics["ratio_sum"]
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(counted, sums["ratio_sum"])
    torch.testing.assert_close(torch.autograd.grad(split, logp)[0], want, atol=1e-7, rtol=1e-5)


def test_linear_grpo_loss_is_the_two_together(seed: int) -> None:
    T, H, V = 40, 8, 19
    h, w = leaf(T, H), leaf(V, H)
    known = torch.randint(0, 17, (T,))
    old, ref, A, weight = torch.randn(T) - 3, torch.randn(T) - 3, torch.randn(T), torch.rand(T) * (torch.rand(T) > 0.4)
    t = torch.where(weight == 0, 10**6, known)  # without a weight the target is never looked at
    loss, metrics = linear_grpo_loss(h, w, t, old, ref, A, weight, temperature=0.8, kl_coefficient=0.2, vocab_size=17)
    logp, entropy = linear_logprob(h, w, known, 0.8, return_entropy=True, vocab_size=17)
    want, _ = grpo_loss(logp, old, ref, A, weight, kl_coefficient=0.2)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(metrics["entropy_sum"], entropy[weight != 0].sum().detach())
    for a, b in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(want, (h, w))):
        torch.testing.assert_close(a, b)


def test_without_old_logprobs_the_ratio_is_one(seed: int) -> None:
    logp, A, weight = torch.randn(9, requires_grad=True), torch.randn(9), torch.rand(9)
    loss, metrics = grpo_loss(logp, None, None, A, weight)
    torch.testing.assert_close(loss, -(A * weight).sum())
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], -A * weight)
    assert metrics["ratio_sum"] == 9
    h, w, t = leaf(9, 4), leaf(7, 4), torch.randint(0, 7, (9,))
    torch.testing.assert_close(linear_grpo_loss(h, w, t, None, None, A, weight)[0], loss)


def test_empty_batch(seed: int) -> None:
    h, w, none = leaf(0, 4), leaf(5, 4), torch.zeros(0)
    loss, metrics = linear_grpo_loss(h, w, torch.zeros(0, dtype=torch.int64), none, None, none, none)
    assert loss == 0 and all(value == 0 for value in metrics.values())
    grads = torch.autograd.grad(loss, (h, w))
    assert grads[0].shape == (0, 4) and grads[1].eq(0).all()


def test_aggregation_weights() -> None:
    lengths = torch.tensor([4, 1, 0, 5])
    assert aggregation_weights(lengths).tolist() == pytest.approx([1 / 16, 1 / 4, 0, 1 / 20])
    assert aggregation_weights(lengths, "token_mean").tolist() == pytest.approx([0.1, 0.1, 0, 0.1])
    constant = aggregation_weights(lengths, "constant", constant_length=8)
    assert constant.tolist() == pytest.approx([1 / 32, 1 / 32, 0, 1 / 32])
    part = aggregation_weights(lengths[:2], num_sequences=4)
    assert part.tolist() == pytest.approx([1 / 16, 1 / 4])
    part = aggregation_weights(lengths[:2], "token_mean", num_tokens=10)
    assert part.tolist() == pytest.approx([0.1, 0.1])


def test_group_advantages(seed: int) -> None:
    rewards = torch.rand(5, 8)
    rewards[2] = 0.1  # not exact in binary: the difference to the mean must still be 0
    want = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    got = group_advantages(rewards)
    assert got[2].eq(0).all()
    torch.testing.assert_close(got[[0, 1, 3, 4]], want[[0, 1, 3, 4]], atol=1e-5, rtol=1e-5)
    order = torch.randperm(40)
    ids = torch.arange(5).repeat_interleave(8)[order]
    torch.testing.assert_close(group_advantages(rewards.flatten()[order], ids), got.flatten()[order])
    centred = group_advantages(rewards, normalize_std=False)
    torch.testing.assert_close(centred, rewards - rewards.mean(1, keepdim=True), atol=1e-6, rtol=1e-5)


def test_gradcheck(seed: int) -> None:
    h, w, t = leaf(5, 3, dtype=F64), leaf(7, 3, dtype=F64), torch.randint(0, 7, (5,))
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, t, 0.9, return_entropy=True), (h, w))
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, t, z_loss=0.1), (h, w))


def test_library_checks_and_compile(seed: int) -> None:
    h, w, t = leaf(6, 4), leaf(9, 4), torch.randint(0, 9, (6,))
    vectors = [torch.randn(6) for _ in range(4)]
    check_operator(lambda h, w, t: linear_logprob(h, w, t, 0.9, return_entropy=True), h, w, t)
    check_operator(lambda h, w, t: linear_cross_entropy(h, w, t, z_loss=0.1), h, w, t)
    check_operator(lambda h, w, t, *v: linear_grpo_loss(h, w, t, *v, kl_coefficient=0.1), h, w, t, *vectors)


def _tensor_parallel(rank: int) -> None:
    group = torch.distributed.group.WORLD
    T, H, V = 37, 12, 26
    h, w = leaf(T, H, dtype=F64), leaf(V, H, dtype=F64)
    up = torch.randn(2, T, dtype=F64)
    for vocab_size in (26, 22, 11):  # 11: the second rank holds nothing but padding
        t = torch.randint(0, vocab_size, (T,))
        t[4] = -100
        shard = w.detach()[rank * 13 : (rank + 1) * 13].clone().requires_grad_()
        options = {"return_entropy": True, "vocab_size": vocab_size, "chunk_tokens": 10}
        got = linear_logprob(h, shard, t, 0.8, tp_group=group, **options)
        want = linear_logprob(h, w, t, 0.8, **options)
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b)
        grads = torch.autograd.grad((torch.stack(got) * up).sum(), (h, shard))
        wanted = torch.autograd.grad((torch.stack(want) * up).sum(), (h, w))
        torch.testing.assert_close(grads[0], wanted[0])
        torch.testing.assert_close(grads[1], wanted[1][rank * 13 : (rank + 1) * 13])
        everyone = [torch.empty_like(got[0]) for _ in range(2)]
        torch.distributed.all_gather(everyone, got[0].detach())
        assert torch.equal(everyone[0], everyone[1])


def test_vocabulary_parallel(seed: int) -> None:
    spawn_pair(_tensor_parallel, seed)


def test_bad_input() -> None:
    h, w, t = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 2, 3])
    v = torch.randn(4)
    bad = lambda match: pytest.raises(ValueError, match=match)
    with bad(r"hidden_TH is a \(4,\) tensor of float32 on cpu, wanted a floating \(T, H\) tensor"):
        linear_logprob(h[:, 0], w, t)
    with bad(r"weight_VH is a \(5, 2\) tensor"):
        linear_logprob(h, w[:, :2], t)
    with bad(r"targets_T is a \(4,\) tensor of int32"):
        linear_logprob(h, w, t.int())
    with bad(r"targets_T\[3\] is 9, wanted 0 <= target < 5"):
        linear_logprob(h, w, torch.tensor([0, 1, 2, 9]))
    with bad(r"targets_T\[0\] is -1"):
        linear_cross_entropy(h, w, torch.tensor([-1, 1, 2, 0]))
    with bad(r"weight_VH is a \(5, 3\) tensor of float32 on meta, wanted the device of hidden_TH, cpu"):
        linear_logprob(h, w.to("meta"), t)
    with bad("temperature is 0"):
        linear_logprob(h, w, t, 0)
    with bad("chunk_tokens is 0"):
        linear_logprob(h, w, t, chunk_tokens=0)
    with bad("vocab_size is 6, wanted 1..5"):
        linear_logprob(h, w, t, vocab_size=6)
    with bad("z_loss is -1"):
        linear_cross_entropy(h, w, t, z_loss=-1)
    with bad("clip_low is -0.1"):
        grpo_loss(v, v, None, v, v, clip_low=-0.1)
    with bad(r"advantages_T\[1\] is nan"):
        grpo_loss(v, v, None, torch.tensor([0, float("nan"), 0, 0]), torch.ones(4))
    with bad("reference_logprobs_T is None, wanted a tensor, since kl_coefficient is 0.1"):
        grpo_loss(v, v, None, v, v, kl_coefficient=0.1)
    with bad("kl_estimator is 'k4', wanted one of k1, k2, k3"):
        grpo_loss(v, v, v, v, v, kl_estimator="k4")
    with bad("ratio is 'group'"):
        grpo_loss(v, v, v, v, v, ratio="group")
    with bad("cu_seqlens is None"):
        grpo_loss(v, v, v, v, v, ratio="sequence")
    with bad("rollout_logprobs_T is None"):
        grpo_loss(v, v, v, v, v, importance_cap=2.0)
    with bad(r"old_logprobs_T is a \(3,\) tensor"):
        linear_grpo_loss(h, w, t, v[:3], None, v, v)
    with bad("aggregation is 'mean'"):
        aggregation_weights(t, "mean")
    with bad("constant_length is None"):
        aggregation_weights(t, "constant")
    with bad("group_ids"):
        group_advantages(v, t[:2])
