"""The optim family's Triton kernels against torch's AdamW in float64, and compiled for Hopper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from r1.bench._ahead_of_time import compiled
from r1.kernels import adamw_step, grad_norm
from r1.kernels.optim import reference
from r1.kernels.optim import triton as optim
from tests.kernels import interpreter  # noqa: F401 (mends the interpreter)
from tests.kernels.helpers import assert_fits

HALF, F64 = torch.bfloat16, torch.float64
SETTINGS = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(7, 5), (3,), (), (0, 4), (optim.ADAMW_CHUNK,), (2, 1100, 4), (48, 64), (1,)]


def tensors(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Of many sizes; one in the middle of another, off the addresses that 16 bytes may be read from; one transposed."""
    plain = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]
    middle = torch.full((70,), torch.nan, device=device, dtype=dtype)[3:68].copy_(torch.randn(65))
    return [*plain, middle, torch.randn(9, 6, device=device).to(dtype).t()]


def zeros(like: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [torch.zeros_like(x, dtype=dtype) for x in like]


def error(a: list[Tensor], b: list[Tensor]) -> float:
    return max(((x.double() - y.double()).abs().max().item() for x, y in zip(a, b) if x.numel()), default=0.0)


def test_adamw_against_torch(device: str) -> None:
    """20 steps; at most twice the error of torch's own in float32."""
    params = tensors(device)
    theirs, exact = ([p.detach().clone().to(kind).requires_grad_() for p in params] for kind in (torch.float32, F64))
    optimisers = [
        torch.optim.AdamW(x, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
        for x in (theirs, exact)
    ]
    m, v = zeros(params), zeros(params)
    for step in range(1, 21):
        grads = tensors(device)
        kept = [g.clone() for g in grads]
        for leaves in (theirs, exact):
            for p, g in zip(leaves, grads):
                p.grad = (g.double() * 0.5).to(p.dtype)
        for optimiser in optimisers:
            optimiser.step()
        adamw_step(params, grads, m, v, step, grad_scale=0.5, **SETTINGS)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept)), "gradients must stay as they were"
    assert error(params, exact) <= 2 * error(theirs, exact) + 1e-6


KINDS = [
    # params, gradients, first and second moment, masters
    (torch.float32, torch.float32, torch.float32, torch.float32, None),
    (HALF, torch.float32, HALF, HALF, torch.float32),
    (HALF, HALF, HALF, torch.float32, torch.float32),
    (HALF, HALF, HALF, HALF, None),
    (torch.float16, torch.float16, torch.float32, torch.float32, torch.float32),
]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(str(k).removeprefix("torch.") for k in kinds))
def test_one_step_is_the_torch_backends(device: str, kinds: tuple) -> None:
    """From moments that are not 0. Up to the last bits of float32, which may decide how bfloat16 is rounded."""
    *kinds, master = kinds
    lists = [tensors(device, kind) for kind in kinds]
    lists[3] = [x.abs() for x in lists[3]]
    lists.append([p.float() for p in lists[0]] if master else [])
    want = [[x.clone() for x in xs] for xs in lists]
    numbers = (7, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.7, False, 0)
    optim.adamw_step(*lists, *numbers)
    reference.adamw_step(*want, *numbers)
    for got, expected in zip(lists, want):
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, atol=1e-6, rtol={HALF: 2**-7, torch.float16: 2**-10}.get(a.dtype, 2e-6))
    for p, w in zip(lists[0], lists[4]):
        assert torch.equal(p, w.to(p.dtype))


def test_tensors_are_told_apart_whatever_their_number(device: str) -> None:
    """Of several types and alignments at once, each its own launch; nothing is written beside a tensor."""
    room = torch.full((4000,), torch.nan, device=device)
    places = [(1, 7), (16, 64), (100, 1), (201, 330), (640, 3200), (3900, 99)]
    params = [room[a : a + n].copy_(torch.randn(n)) for a, n in places]
    grads = [torch.randn(n, device=device).to(torch.float32 if i % 2 else HALF) for i, (_, n) in enumerate(places)]
    m, v = zeros(params), zeros(params)
    exact = [p.double().requires_grad_() for p in params]
    for p, g in zip(exact, grads):
        p.grad = g.double()
    torch.optim.AdamW(exact, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).step()
    adamw_step(params, grads, m, v, 1, **SETTINGS)
    assert error(params, exact) < 1e-6
    assert room.isnan().sum() == 4000 - sum(n for _, n in places)


def test_stochastic_rounding(device: str, seed: int) -> None:
    """It keeps the mean; elements, tensors, steps and seeds have noise of their own, which is the same again."""
    below = torch.tensor([1.0, 1.0078125], device=device).expand(20000, 2).reshape(8, 5000)  # even, and odd
    value = below + 2**-10  # an eighth of the way to the next bfloat16

    def rounded(step: int, seed: int, value: Tensor = value) -> list[Tensor]:
        params = [value.to(HALF) for _ in range(2)]
        g, m, v = (zeros(params, torch.float32) for _ in range(3))
        masters = [value.clone(), value.clone()]
        options = {**SETTINGS, "weight_decay": 0.0}
        adamw_step(params, g, m, v, step, masters=masters, stochastic_rounding=True, seed=seed, **options)
        torch.testing.assert_close(masters[0], value, atol=0, rtol=0, equal_nan=True)
        return params

    ups = []
    first = rounded(1, seed)
    for params in (*first, *(rounded(*key)[0] for key in ((2, seed), (1, seed + 1), (1, seed + 2**33)))):
        steps = (params.float() - below) / 2**-7
        assert set(steps.unique().tolist()) == {0.0, 1.0}
        for half in steps.view(-1, 2).unbind(1):
            assert half.mean().item() == pytest.approx(1 / 8, abs=0.013)  # five deviations of a mean of 20,000
        ups.append((steps.flatten().double() - 1 / 8) / (7 / 64) ** 0.5)
    again = rounded(1, seed)
    assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])
    # Correlations at every distance, of noise with itself and between any two, are those of chance.
    spectra = torch.fft.rfft(torch.stack(ups).cpu(), n=2 * value.numel())
    for i, one in enumerate(spectra):
        for j, other in enumerate(spectra[i:], i):
            correlation = torch.fft.irfft(one * other.conj()) / value.numel()
            assert correlation[int(i == j) :].abs().max() < 7 / value.numel() ** 0.5, (i, j)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, torch.nan, -(1.0 + 2**-10), 0.0, -0.0, 1e-40], device=device)
    odd.view(torch.int32)[3] = 0x7FFFFFFF  # the NaN that a GPU makes, one bit from -0
    got = rounded(1, seed, odd)[0]
    assert got[:2].tolist() == [torch.inf, -torch.inf] and got[2:4].isnan().all()
    assert got[4].item() in (-1.0, -1.0078125) and got[5:7].eq(0).all()


@pytest.mark.parametrize(("masters", "beta2", "bound"), [(True, 0.95, 0.002), (True, 0.999, 0.03), (False, 0.95, 0.1)])
def test_bf16_moments_stay_near_float64s_over_1000_steps(seed: int, masters: bool, beta2: float, bound: float) -> None:
    """docs/kernels/optim.md states the bounds. By the torch backend; steps of the kernels are compared above, below."""
    start, aim = torch.randn(64, 32), torch.randn(64, 32)
    exact, m, v = [start.double()], *(zeros([start], F64) for _ in range(2))
    params, weights = [start.to(HALF)], [start.clone()] if masters else None
    m16, v16 = (zeros([start], HALF) for _ in range(2))
    settings = {**SETTINGS, "lr": 1e-3, "beta2": beta2}
    for step in range(1, 1001):
        grads = [exact[0].float() - aim + torch.randn(64, 32)]
        adamw_step(exact, grads, m, v, step, **settings)
        adamw_step(params, grads, m16, v16, step, masters=weights, stochastic_rounding=True, seed=seed, **settings)
    apart, moved = ((weights or params)[0] - exact[0]).norm(), (exact[0] - start).norm()
    assert moved > 0.3 * (aim - start).norm()
    assert apart < bound * moved


def test_bf16_moments_in_the_kernels(device: str) -> None:
    start = torch.randn(64, 32, device=device)
    exact, m, v = [start.double()], *(zeros([start], F64) for _ in range(2))
    params, masters = [start.to(HALF)], [start.clone()]
    m16, v16 = (zeros([start], HALF) for _ in range(2))
    for step in range(1, 61):
        grads = [torch.randn(64, 32, device=device) + 0.3]
        adamw_step(exact, grads, m, v, step, **SETTINGS)
        adamw_step(params, [grads[0].to(HALF)], m16, v16, step, masters=masters, **SETTINGS)
    assert (masters[0] - exact[0]).norm() < 0.05 * (exact[0] - start).norm()


def test_the_same_bits_every_time(device: str) -> None:
    start = [tensors(device, HALF), tensors(device), *(zeros(tensors(device), HALF) for _ in range(2))]
    masters = [p.float() for p in start[0]]

    def run() -> list[Tensor]:
        copies = [[x.clone() for x in xs] for xs in (*start, masters)]
        for step in (1, 2):
            adamw_step(*copies[:4], step, masters=copies[4], stochastic_rounding=True, seed=3, **SETTINGS)
        return [x for xs in copies for x in xs]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), first))


def test_grad_norm(device: str) -> None:
    grads = [*tensors(device), *tensors(device, HALF), torch.randn(3 * optim.NORM_CHUNK + 5, device=device)]
    want = torch.cat([g.double().flatten() for g in grads]).norm()
    got = grad_norm(grads)
    assert got.dtype == torch.float32 and got.shape == ()
    torch.testing.assert_close(got.double(), want, atol=0, rtol=1e-6)
    few = [grads[1], grads[-1]]
    once = grad_norm(few)
    assert all(torch.equal(grad_norm(few), once) for _ in range(50))
    assert grad_norm([]) == 0 and grad_norm([torch.zeros(0, 3, device=device)]) == 0
    for wrong in (torch.nan, torch.inf):
        bad = torch.ones(3, device=device) * wrong
        assert grad_norm([*grads, bad]).isnan() if wrong != wrong else grad_norm([*grads, bad]).isinf()
    assert grad_norm([grads[0].double()]).dtype == F64


def test_grad_norm_of_more_chunks_than_one_pass_adds_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "ROOT_BLOCK", 16)
    grads = [torch.randn(n, device=device) for n in (5 * optim.NORM_CHUNK, *[3] * 30, 7 * optim.NORM_CHUNK + 1)]
    want = torch.cat([g.double() for g in grads]).norm()
    torch.testing.assert_close(grad_norm(grads).double(), want, atol=0, rtol=1e-6)


def test_float64_is_torchs(device: str) -> None:
    params, grads = [torch.randn(5, device=device, dtype=F64)], [torch.randn(5, device=device, dtype=F64)]
    exact = [params[0].clone().requires_grad_()]
    exact[0].grad = grads[0]
    torch.optim.AdamW(exact, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).step()
    adamw_step(params, grads, zeros(params), zeros(params), 1, **SETTINGS)
    assert error(params, exact) < 1e-14
    adamw_step([], [], [], [], 1, **SETTINGS)


def test_library_checks_and_compile(device: str) -> None:
    params = tensors(device)[:2]
    g, m, v = ([torch.rand_like(p) for p in params] for _ in range(3))
    numbers = (1, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, True, 0)
    torch.library.opcheck(torch.ops.r1.adamw_step.default, (params, g, m, v, [], *numbers))
    half = [p.to(HALF) for p in params]
    torch.library.opcheck(torch.ops.r1.adamw_step.default, (half, g, m, v, params, *numbers))
    torch.library.opcheck(torch.ops.r1.grad_norm.default, (g,))


def test_compiles_for_hopper_without_spills() -> None:
    binaries, _ = compiled("optim")
    assert {b.name for b in binaries} == {"adamw_kernel", "square_sum_kernel", "root_kernel"}
    for binary in binaries:
        assert_fits(binary, uses_matrix_units=False)
