"""The grpo family's Triton kernels against float64, interpreted where there is no GPU, and compiled for Hopper."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from r1.bench._ahead_of_time import compiled
from r1.kernels import grpo_loss, linear_cross_entropy, linear_grpo_loss, linear_logprob
from r1.kernels.grpo import reference
from tests.kernels import interpreter  # noqa: F401 (mends the interpreter)
from tests.kernels.helpers import assert_fits, check_operator, leaf, ragged, same_as_plain, spawn_pair

F64 = torch.float64
Result = dict[str, Tensor]


def eager(h: Tensor, w: Tensor, t: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Logits in the inputs' type, as autograd would have them; what follows in float32, or float64 for that."""
    logits = h @ w.t() / temperature
    logp = (logits if logits.dtype == F64 else logits.float()).log_softmax(-1)
    return logp.gather(1, t[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def with_gradients(function: Callable[..., Any], h: Tensor, w: Tensor, up: Tensor, dtype: torch.dtype) -> Result:
    h, w = (x.detach().to(dtype).requires_grad_() for x in (h, w))
    logp, entropy = function(h, w)
    grad_h, grad_w = torch.autograd.grad((logp * up[0]).sum() + (entropy * up[1]).sum(), (h, w))
    return {"logprobs": logp, "entropy": entropy, "dhidden": grad_h, "dweight": grad_w}


def assert_as_good_as(got: Result, plain: Result, exact: Result, floor: float, sizes: dict[str, float]) -> None:
    for name, want in exact.items():
        same_as_plain(got[name], plain[name], want, name, floor, sizes.get(name, 1.0))


SHAPES = [(193, 70, 517), (130, 264, 1031), (1, 8, 3), (129, 64, 256)]
GPU_SHAPES = [(1000, 7168, 129280), (4096, 2048, 151936), (777, 1000, 50257)]


@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.gpu) for s in GPU_SHAPES)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kept", [False, True], ids=["made again", "kept"])
def test_linear_logprob(device: str, shape: tuple[int, int, int], dtype: torch.dtype, kept: bool) -> None:
    T, H, V = shape
    if device == "cuda" and dtype == torch.float32 and T * H * V > 2**36:
        pytest.skip("the float64 reference would take minutes")
    h, w = leaf(T, H).to(device), leaf(V, H, scale=4 / H**0.5).to(device)
    h, w = h.to(dtype), w.to(dtype)
    t = torch.randint(0, V, (T,), device=device)
    up = torch.randn(2, T, device=device)
    chunk = T if kept else 60
    exact = with_gradients(lambda h, w: eager(h, w, t, 0.7), h, w, up.double(), F64)
    plain = with_gradients(lambda h, w: eager(h, w, t, 0.7), h, w, up, dtype)
    got = with_gradients(
        lambda h, w: linear_logprob(h, w, t, 0.7, return_entropy=True, chunk_tokens=chunk), h, w, up, dtype
    )
    assert got["logprobs"].dtype == got["entropy"].dtype == torch.float32 and got["dweight"].dtype == dtype
    # float32: on a GPU a product is three of TF32, 21 bits; and a BLAS adds up in blocks, more exactly than in order.
    floor = 2e-5 if dtype == torch.float32 else 3e-6
    largest = lambda *x: float(torch.stack([y.detach().abs().max().float() for y in x]).prod())
    scales = {"dhidden": largest(up, w), "dweight": largest(up, h)}
    scales |= dict.fromkeys(("logprobs", "entropy"), max(1.0, largest(exact["logprobs"])))
    assert_as_good_as(got, plain, exact, floor, scales)


def test_mixed_types_are_computed_in_float32(device: str) -> None:
    """The head in float32 on hidden states in bfloat16."""
    h, w, t = leaf(70, 40).to(device), leaf(300, 40, scale=0.5).to(device), torch.randint(0, 300, (70,), device=device)
    h = h.detach().bfloat16().requires_grad_()
    w = w.detach().requires_grad_()
    got = linear_logprob(h, w, t)
    want, _ = eager(h.double(), w.double(), t, 1.0)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(got.sum(), (h, w)), torch.autograd.grad(want.sum(), (h, w))):
        torch.testing.assert_close(a.double(), b.double(), atol=1e-2 if a.dtype == torch.bfloat16 else 1e-4, rtol=1e-2)


def test_a_token_has_the_same_bits_in_every_batch(device: str) -> None:
    T, H, V = 512, 72, 517
    h, w = leaf(T, H).to(device).bfloat16(), leaf(V, H, scale=0.5).to(device).bfloat16()
    t = torch.randint(0, V, (T,), device=device)
    whole = torch.stack(linear_logprob(h, w, t, return_entropy=True))
    order = torch.randperm(T, device=device)
    permuted = torch.stack(linear_logprob(h[order], w, t[order], return_entropy=True))
    assert torch.equal(permuted, whole[:, order])
    for rows in (order[:7], order[7:8]):
        assert torch.equal(torch.stack(linear_logprob(h[rows], w, t[rows], return_entropy=True)), whole[:, rows])
    some = t.masked_fill(torch.rand(T, device=device) < 0.5, -100)
    assert torch.equal(linear_logprob(h, w, some), whole[0].masked_fill(some == -100, 0))
    assert torch.equal(linear_logprob(h, w, some, check_values=False), linear_logprob(h, w, some))


def test_kept_logits_do_not_change_the_gradients(device: str) -> None:
    T, H, V = 150, 72, 256  # one span either way
    h, w, t = leaf(T, H).to(device), leaf(V, H).to(device), torch.randint(0, V, (T,), device=device)
    h, w = (x.detach().bfloat16().requires_grad_() for x in (h, w))
    grads = [torch.autograd.grad(linear_logprob(h, w, t, chunk_tokens=c).sum(), (h, w)) for c in (T, T - 1)]
    for kept, made_again in zip(*grads):
        assert torch.equal(kept, made_again)


@pytest.mark.parametrize("check_values", [True, False])
@pytest.mark.parametrize("chunk", [None, 20])
def test_what_must_not_be_read_is_not_read(device: str, check_values: bool, chunk: int | None) -> None:
    """NaN in the rows of ignored tokens and in the head's padding rows."""
    T, H, V, vocab_size = 140, 40, 300, 270
    h, w = leaf(T, H).to(device).detach(), leaf(V, H).to(device).detach()
    t = torch.randint(0, vocab_size, (T,), device=device)
    ignored = torch.rand(T, device=device) < 0.4
    t = t.masked_fill(ignored, -100)
    want = reference_logprob(h, w[:vocab_size], t)
    h[ignored] = torch.nan
    w[vocab_size:] = torch.nan
    h, w = (x.bfloat16().requires_grad_() for x in (h, w))
    got = linear_logprob(h, w, t, vocab_size=vocab_size, check_values=check_values, chunk_tokens=chunk)
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.02)
    grad_h, grad_w = torch.autograd.grad(got.sum(), (h, w))
    assert grad_h[ignored].eq(0).all() and grad_h.isfinite().all()
    assert grad_w[vocab_size:].eq(0).all() and grad_w.isfinite().all()


def reference_logprob(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return reference.linear_logprob(h, w, t, 1.0, False, -100, 10**6, w.shape[0], "", True, False)[0]


def test_no_tokens_and_no_tokens_in_use(device: str) -> None:
    h, w = leaf(0, 16).to(device).bfloat16(), leaf(30, 16).to(device).bfloat16().detach().requires_grad_()
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert torch.autograd.grad(linear_logprob(h, w, none).sum(), w)[0].eq(0).all()
    h = leaf(5, 16).to(device).bfloat16()
    for check_values in (True, False):
        logp = linear_logprob(h, w, torch.full((5,), -100, device=device), check_values=check_values)
        assert logp.eq(0).all() and torch.autograd.grad(logp.sum(), w)[0].eq(0).all()


def test_unchecked_targets_give_nan(device: str) -> None:
    h, w = leaf(4, 16).to(device).bfloat16(), leaf(30, 16).to(device).bfloat16()
    t = torch.tensor([0, 30, -1, 29], device=device)
    assert linear_logprob(h, w, t, check_values=False).isnan().tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match=r"targets_T\[1\] is 30, wanted 0 <= target < 30"):
        linear_logprob(h, w, t)


def test_linear_cross_entropy_with_z_loss(device: str) -> None:
    h, w = leaf(60, 24).to(device), leaf(90, 24).to(device)
    t = torch.randint(0, 90, (60,), device=device)
    t[::3] = -100
    logits = h.double() @ w.double().t()
    used = t >= 0
    want = torch.nn.functional.cross_entropy(logits, t, reduction="none") + 0.01 * logits.logsumexp(-1) ** 2 * used
    for check_values in (True, False):
        got = linear_cross_entropy(h, w, t, z_loss=0.01, check_values=check_values)
        torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
        for a, b in zip(
            torch.autograd.grad(got.sum(), (h, w)), torch.autograd.grad(want.sum(), (h, w), retain_graph=True)
        ):
            torch.testing.assert_close(a, b.float(), atol=1e-4, rtol=1e-4)


def test_nan_is_not_lost(device: str) -> None:
    logp = torch.tensor([-1.0, torch.nan], device=device, requires_grad=True)
    old, ones = torch.tensor([-1.0, -1.0], device=device), torch.ones(2, device=device)
    loss, _ = grpo_loss(logp, old, None, ones, ones)
    assert loss.isnan() and torch.autograd.grad(loss, logp)[0].isnan().tolist() == [False, True]


def test_a_clipped_ratio_may_overflow(device: str) -> None:
    logp = torch.tensor([-1.0, -1.0], device=device, requires_grad=True)
    old, ones = torch.tensor([-100.0, -1.0], device=device), torch.ones(2, device=device)
    loss, _ = grpo_loss(logp, old, None, -ones, ones, ratio_max=3.0)
    torch.testing.assert_close(loss, torch.tensor(4.0, device=device))
    assert torch.autograd.grad(loss, logp)[0].tolist() == [0.0, 1.0]


VARIANTS = list(itertools.product(["token", "sequence"], [None, "k1", "k2", "k3"], [False, True]))


@pytest.mark.parametrize(("ratio", "kl", "extras"), VARIANTS)
def test_grpo_loss(device: str, ratio: str, kl: str | None, extras: bool) -> None:
    lengths = [9, 0, 1, 1400, 600]
    T = sum(lengths)
    logp, old, ref, rollout = (torch.randn(T, device=device) * 0.3 - 2 for _ in range(4))
    ref[:5] = logp[:5] + 1e-4  # where exp(d) - 1 - d cancels
    A, weight = torch.randn(T, device=device), torch.rand(T, device=device) / T
    unused = torch.rand(T, device=device) < 0.3
    weight[unused] = 0
    for x in (logp, old, ref, rollout, A):
        x[unused] = torch.nan
    logp.requires_grad_()
    options: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3, "ratio": ratio}
    options["cu_seqlens"] = ragged(*lengths).to(device)
    if kl:
        options |= {"kl_coefficient": 0.1, "kl_estimator": kl}
    if extras:
        options |= {"ratio_max": 1.6, "importance_cap": 1.2}
    options["rollout_logprobs_T"] = rollout if extras else None
    loss, metrics = grpo_loss(logp, old, ref, A, weight, **options)
    double = lambda x: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
    want, sums, gradient = reference.grpo_loss(
        *(double(x) for x in (logp, old, ref, A, weight)), options["cu_seqlens"] if ratio == "sequence" else None,
        double(options["rollout_logprobs_T"]), 0.2, 0.3, options.get("ratio_max"), options.get("importance_cap"),
        0.1 if kl else 0.0, kl or "k3", True,
    )  # fmt: skip
    torch.testing.assert_close(loss.double(), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0].double(), gradient, atol=1e-9, rtol=1e-4)
    for name, value in zip(reference.METRICS, sums, strict=True):
        torch.testing.assert_close(
            metrics[name].double(), value, atol=1e-3, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_linear_grpo_loss(device: str) -> None:
    T, H, V = 150, 48, 330
    h, w = leaf(T, H).to(device), leaf(V, H, scale=0.5).to(device)
    t = torch.randint(0, V, (T,), device=device)
    exact, entropy = eager(h.detach().double(), w.detach().double(), t, 0.9)
    old, ref = (exact.float() + 0.2 * torch.randn(T, device=device) for _ in range(2))
    A, weight = torch.randn(T, device=device), torch.rand(T, device=device) * (torch.rand(T, device=device) > 0.3)

    def result(h: Tensor, w: Tensor, dtype: torch.dtype, fused: bool) -> Result:
        h, w = (x.detach().to(dtype).requires_grad_() for x in (h, w))
        vectors = [x.double() if dtype == F64 else x for x in (old, ref, A, weight)]
        options: dict[str, Any] = {"kl_coefficient": 0.1, "clip_high": 0.3}
        if fused:
            loss, metrics = linear_grpo_loss(h, w, t, *vectors, temperature=0.9, chunk_tokens=64, **options)
            entropy_sum = metrics["entropy_sum"]
        else:
            logp, entropy = eager(h, w, t, 0.9)
            loss, _ = grpo_loss(logp, *vectors, **options)
            entropy_sum = (entropy * (weight != 0)).sum()
        grad_h, grad_w = torch.autograd.grad(loss, (h, w))
        return {"loss": loss, "entropy": entropy_sum.detach(), "dhidden": grad_h, "dweight": grad_w}

    h16, w16 = h.bfloat16(), w.bfloat16()
    args = (h16, w16)
    assert_as_good_as(
        result(*args, torch.bfloat16, True), result(*args, torch.bfloat16, False), result(*args, F64, False), 1e-5, {}
    )


def test_library_checks_and_compile(device: str) -> None:
    h, w = leaf(6, 8).to(device), leaf(9, 8).to(device)
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    t = torch.randint(0, 9, (6,), device=device)
    vectors = [torch.randn(6, device=device) for _ in range(4)]
    check_operator(lambda h, w, t: linear_logprob(h, w, t, 0.9, return_entropy=True), h, w, t)
    check_operator(lambda h, w, t: linear_logprob(h, w, t, chunk_tokens=2, check_values=False), h, w, t)
    check_operator(lambda h, w, t, *v: linear_grpo_loss(h, w, t, *v, kl_coefficient=0.1), h, w, t, *vectors)


def _tensor_parallel(rank: int) -> None:
    group = torch.distributed.group.WORLD
    T, H, V = 37, 16, 520
    h, w = leaf(T, H), leaf(V, H)
    up = torch.randn(2, T)
    for vocab_size in (520, 411, 200):  # 200: the second rank holds nothing but padding
        t = torch.randint(0, vocab_size, (T,))
        t[4] = -100
        half = V // 2
        shard = w.detach()[rank * half : (rank + 1) * half].clone().requires_grad_()
        options: dict[str, Any] = {"return_entropy": True, "vocab_size": vocab_size, "chunk_tokens": 10}
        got = linear_logprob(h, shard, t, 0.8, tp_group=group, **options)
        want = linear_logprob(h, w, t, 0.8, **options)
        grads = torch.autograd.grad((torch.stack(got) * up).sum(), (h, shard))
        wanted = torch.autograd.grad((torch.stack(want) * up).sum(), (h, w))
        for a, b in zip((*got, *grads), (*want, wanted[0], wanted[1][rank * half : (rank + 1) * half])):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_vocabulary_parallel(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("two ranks of gloo share no GPU here")
    monkeypatch.setenv("R1_KERNELS", "triton")
    spawn_pair(_tensor_parallel, seed)


def test_compiles_for_hopper_without_spills() -> None:
    binaries, _ = compiled("grpo")
    assert {b.name for b in binaries} == {
        "statistics_kernel", "merge_kernel", "grad_logits_kernel", "accumulate_kernel", "grpo_kernel",
    }  # fmt: skip
    for binary in binaries:
        products = binary.name in ("statistics_kernel", "grad_logits_kernel", "accumulate_kernel")
        products = products and not binary.constants.get("KEPT")
        assert_fits(binary, uses_matrix_units=products)
        assert not products or binary.bulk_copies, f"{binary.name} loads its tiles without bulk copies"
