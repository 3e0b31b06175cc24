"""AdamW and the gradient norm against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from r1.kernels import adamw_step, grad_norm

SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in ((7, 5), (3,), (), (0, 4), (2, 3, 4))]


def zeros(params: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.zeros_like(p, dtype=dtype) for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_against_torch(seed: int, dtype: torch.dtype) -> None:
    params = tensors(dtype)
    theirs = [p.clone().requires_grad_() for p in params]
    optimiser = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    m, v = zeros(params), zeros(params)
    for step in range(1, 21):
        grads = tensors(dtype)
        for p, g in zip(theirs, grads):
            p.grad = g * 0.5
        kept = [g.clone() for g in grads]
        optimiser.step()
        adamw_step(params, grads, m, v, step, grad_scale=0.5, **SETTINGS)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept)), "gradients must stay as they were"
    for a, b in zip(params, theirs):
        torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=1e-5)


def test_bf16_moments_and_masters_follow_float32(seed: int) -> None:
    start = [torch.randn(64, 32)]
    exact, m, v = [start[0].clone()], *(zeros(start) for _ in range(2))
    params, masters = [start[0].bfloat16()], [start[0].clone()]
    m16, v16 = (zeros(start, torch.bfloat16) for _ in range(2))
    for step in range(1, 201):
        grads = [torch.randn(64, 32) + 0.3]
        adamw_step(exact, grads, m, v, step, **SETTINGS)
        adamw_step(params, [grads[0].bfloat16()], m16, v16, step, masters=masters, **SETTINGS)
        assert torch.equal(params[0], masters[0].bfloat16())
    assert m16[0].dtype == v16[0].dtype == torch.bfloat16
    moved = (exact[0] - start[0]).norm()
    assert (masters[0] - exact[0]).norm() < 0.05 * moved


def test_stochastic_rounding_keeps_the_mean(seed: int) -> None:
    value = torch.full((20000,), 1.0 + 2**-10)  # an eighth of the way to the next bfloat16
    params = [value.bfloat16()]
    grads, m, v = zeros([value]), zeros([value]), zeros([value])
    options = {**SETTINGS, "weight_decay": 0.0}
    adamw_step(params, grads, m, v, 1, masters=[value.clone()], stochastic_rounding=True, seed=seed, **options)
    assert set(params[0].tolist()) == {1.0, 1.0078125}
    assert params[0].float().mean() == pytest.approx(1 + 2**-10, abs=1.5e-4)
    again = [value.bfloat16()]
    adamw_step(again, grads, m, v, 1, masters=[value.clone()], stochastic_rounding=True, seed=seed, **options)
    assert torch.equal(params[0], again[0])
    adamw_step(again, grads, m, v, 2, masters=[value.clone()], stochastic_rounding=True, seed=seed, **options)
    assert not torch.equal(params[0], again[0])


def test_grad_norm(seed: int) -> None:
    grads = tensors()
    want = torch.cat([g.double().flatten() for g in grads]).norm()
    torch.testing.assert_close(grad_norm(grads).double(), want, atol=0, rtol=1e-6)
    assert grad_norm([g.bfloat16() for g in grads]).dtype == torch.float32
    assert grad_norm([]) == 0
    assert grad_norm([torch.tensor([float("nan")])]).isnan()


def test_library_checks_and_compile(seed: int) -> None:
    params = tensors()[:2]
    g, m, v = ([torch.rand_like(p) for p in params] for _ in range(3))
    numbers = (1, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, False, 0)
    torch.library.opcheck(torch.ops.r1.adamw_step.default, (params, g, m, v, [], *numbers))
    half = [p.bfloat16() for p in params]
    torch.library.opcheck(torch.ops.r1.adamw_step.default, (half, g, m, v, params, *numbers))
    torch.library.opcheck(torch.ops.r1.grad_norm.default, (g,))

    def step(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor]) -> Tensor:
        adamw_step(p, g, m, v, 3, **SETTINGS)
        return grad_norm(p)

    copies = lambda: [[x.clone() for x in group] for group in (params, g, m, v)]
    plain, traced = copies(), copies()
    want = step(*plain)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*traced)
    torch.testing.assert_close(got, want)
    for a, b in zip(plain, traced):
        torch.testing.assert_close(a, b)


def test_bad_input() -> None:
    bad = lambda match: pytest.raises(ValueError, match=match)
    p = [torch.zeros(3)]
    with bad("grads is '0 tensors', wanted 1, as many as params"):
        adamw_step(p, [], p, p, 1, **SETTINGS)
    with bad(r"exp_avgs\[0\] is a \(2,\) tensor"):
        adamw_step(p, p, [torch.zeros(2)], p, 1, **SETTINGS)
    with bad("step is 0"):
        adamw_step(p, p, p, p, 0, **SETTINGS)
    with bad("beta2 is 1.0"):
        adamw_step(p, p, p, p, 1, **{**SETTINGS, "beta2": 1.0})
    with bad("lr is -1"):
        adamw_step(p, p, p, p, 1, **{**SETTINGS, "lr": -1})
