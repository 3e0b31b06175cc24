"""The norm family's Triton kernels against float64, interpreted where there is no GPU, and compiled for Hopper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from r1.bench._ahead_of_time import compiled
from r1.kernels import apply_rope, rms_norm, rope_tables
from r1.kernels.norm import triton as norm
from tests.kernels import interpreter  # noqa: F401 (mends the interpreter)
from tests.kernels.helpers import assert_fits, check_operator, leaf, same_as_plain

HALF, F64 = torch.bfloat16, torch.float64
DTYPES = [HALF, torch.float16, torch.float32]
EPS = 1e-5


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As in transformers' models."""
    wide = x if x.dtype == F64 else x.float()
    return (weight * (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)).to(x.dtype)


def our_norm(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def results(function: object, x: Tensor, weight: Tensor, up: Tensor) -> tuple[Tensor, ...]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(x, weight)
    return out.detach(), *torch.autograd.grad(out, (x, weight), up)


SHAPES = [(5, 512), (3, 7168), (70, 1536), (1, 1), (2, 3, 33), (70, 1, 100), (1, 16384), (0, 8), (17,)]
GPU_SHAPES = [(8192, 7168), (70000, 512), (300, 3, 16383)]


@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.gpu) for s in GPU_SHAPES)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for kind in {dtype, torch.float32} if dtype == HALF else {dtype}:
        check_rms_norm(device, shape, dtype, kind)


@pytest.mark.parametrize(("shape", "partials"), [((520, 5), 3), ((21, 1030), 3), ((7, 4100), 3), ((2300, 5), 264)])
def test_rms_norm_of_many_rows(
    device: str, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], partials: int
) -> None:
    """A program has several tiles of rows, the last of them not full; and there are many partial sums to add up."""
    monkeypatch.setattr(norm, "PARTIALS", partials)
    check_rms_norm(device, shape, torch.float32, torch.float32)


def check_rms_norm(device: str, shape: tuple[int, ...], dtype: torch.dtype, kind: torch.dtype) -> None:
    x = (torch.randn(shape) * 2.0 ** torch.randint(-9, 9, (*shape[:-1], 1))).to(device, dtype)
    up, weight = torch.randn(shape).to(device, dtype), (torch.randn(shape[-1]) + 1).to(device, kind)
    scale = (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt()
    exact = results(plain_norm, x.double(), weight.double(), up.double())
    plain, got = results(plain_norm, x, weight, up), results(our_norm, x, weight, up)
    for name, a, b, c in zip(("out", "dx", "dweight"), got, plain, exact):
        assert a.dtype == (kind if name == "dweight" else dtype) and a.is_contiguous()
        terms = up * weight * scale if name == "dx" else c
        same_as_plain(a, b, c, name, 1e-6, terms.abs().max().item() if terms.numel() else 0.0)
    kept = norm.rms_norm(x, weight, EPS)[1]
    assert kept.dtype == torch.float32
    torch.testing.assert_close(kept.double(), scale, atol=0, rtol=1e-6)


@pytest.mark.parametrize("H", [512, 99, 4112])
def test_rms_norm_of_any_strides(device: str, H: int) -> None:
    """Parts of wider rows as latents are, with NaN beside them; gradients expanded and transposed."""
    T = 40 if H < 4096 else 5
    wide = torch.full((T, 1, H + 77), torch.nan, device=device, dtype=HALF)
    x = wide[..., 13 : 13 + H].copy_(torch.randn(T, 1, H)).detach()
    weight = torch.randn(2 * H, device=device)[::2]
    dense, up = x.contiguous(), torch.randn(H, T, device=device).to(HALF)
    for gradient in (up.t()[:, None], up.t()[:1, None].expand(T, 1, H), up[:1, :1].expand(T, H)[:, None]):
        got = results(our_norm, x, weight, gradient)
        want = results(our_norm, dense, weight.contiguous(), gradient.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, want)) and got[0].isfinite().all()
    turned = torch.randn(H, T, device=device).t()
    assert torch.equal(our_norm(turned, weight), our_norm(turned.contiguous(), weight))


def test_zeros_and_not_a_number_stay_in_their_row(device: str) -> None:
    x, weight = torch.randn(70, 48, device=device), torch.ones(48, device=device)
    x[3], x[7, 5] = 0.0, torch.nan
    out, dx, dweight = results(our_norm, x, weight, torch.ones_like(x))
    others = torch.arange(70, device=device) != 7
    assert out[3].eq(0).all() and out[7].isnan().all() and out[others].isfinite().all()
    assert dx[7].isnan().all() and dx[others].isfinite().all() and dweight.isnan().all()


@pytest.mark.parametrize("H", [7168, 512, 33])
def test_a_row_has_the_same_bits_in_every_batch_and_order(device: str, H: int) -> None:
    T = 40 if device == "cpu" else 3000
    x, up = (torch.randn(T, H, device=device).to(HALF) for _ in range(2))
    weight = torch.randn(H, device=device).to(HALF)
    whole = results(our_norm, x, weight, up)
    order = torch.randperm(T, device=device)
    for rows in (order, order[:7], order[7:8]):
        part = results(our_norm, x[rows], weight, up[rows])
        assert torch.equal(part[0], whole[0][rows]) and torch.equal(part[1], whole[1][rows])


def test_the_same_bits_every_time(device: str) -> None:
    shape = (70, 96) if device == "cpu" else (20000, 1536)
    x, up = (torch.randn(shape, device=device).to(HALF) for _ in range(2))
    weight = torch.randn(shape[1], device=device)
    first = results(our_norm, x, weight, up)
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(results(our_norm, x, weight, up), first))


def test_what_torch_computes(device: str) -> None:
    for x in (torch.randn(3, 5, dtype=F64), torch.randn(2, norm.LARGEST + 1)):
        x, weight = x.to(device), torch.ones(x.shape[-1], device=device, dtype=x.dtype)
        torch.testing.assert_close(our_norm(x, weight), plain_norm(x, weight))


# ----------------------------------------------------------------------------------------------------------------- rope


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    wide = x if x.dtype == F64 else x.float()
    first, second = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    parts = first * cos - second * sin, first * sin + second * cos
    return (torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)).to(x.dtype)


# (tokens, heads, rotary width, width before it, width behind it)
PARTS = [
    (5, 128, 64, 128, 0), (70, 1, 64, 512, 0), (3, 5, 6, 1, 2), (2, 3, 128, 0, 0), (1, 200, 30, 0, 1), (4, 2, 2, 3, 3),
    (0, 2, 8, 0, 0), (3, 0, 8, 0, 0),
]  # fmt: skip
GPU_PARTS = [(8192, 128, 64, 128, 0), (70000, 1, 64, 512, 0)]


@pytest.mark.parametrize("part", [*PARTS, *(pytest.param(p, marks=pytest.mark.gpu) for p in GPU_PARTS)], ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_rope(device: str, part: tuple[int, ...], interleaved: bool, dtype: torch.dtype) -> None:
    """The rotated part of a query or a latent: what lies beside it, NaN here, is not read."""
    T, N, D, before, behind = part
    heads = torch.full((T, N, before + D + behind), torch.nan, device=device, dtype=dtype)
    x = heads[..., before : before + D].copy_(torch.randn(T, N, D)).detach()
    positions = torch.randint(0, 100_000, (T,), device=device)
    cos, sin = rope_tables(positions, D, 10000.0, dtype=F64)
    up = torch.full((N, T, D + 3), torch.nan, device=device, dtype=dtype)[..., 1 : D + 1].transpose(0, 1)
    up.copy_(torch.randn(T, N, D))
    tables = cos.float(), sin.float()

    def both(function: object, x: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        out = function(x, *(y.to(F64) if x.dtype == F64 else y for y in tables), interleaved)
        return out.detach(), torch.autograd.grad(out, x, up)[0]

    exact, plain = both(turned, x.double(), up.double()), both(turned, x, up)
    for name, a, b, c in zip(("out", "dx"), both(apply_rope, x, up), plain, exact):
        assert a.dtype == dtype and a.is_contiguous()
        same_as_plain(a, b, c, name, 1e-6)
    alone = apply_rope(x[-1:], *(y[-1:] for y in tables), interleaved)
    assert torch.equal(alone, apply_rope(x, *tables, interleaved)[-1:])


def test_rope_takes_tables_of_any_strides(device: str) -> None:
    x = torch.randn(6, 2, 3, 8, device=device).unbind(2)[1]
    tables = [y.to(device) for y in rope_tables(torch.arange(12), 8, 1e4)]
    want = apply_rope(x.contiguous(), *(y[::2].contiguous() for y in tables), True)
    assert torch.equal(apply_rope(x, *(y[::2] for y in tables), True), want)
    assert torch.equal(apply_rope(x, *(y[::2].t().contiguous().t() for y in tables), True), want)
    assert torch.equal(apply_rope(x, tables[0][::2], tables[1][::2].contiguous(), True), want)
    across = torch.randn(6, 8, 2, device=device).transpose(1, 2)
    small = [y[:6] for y in tables]
    assert torch.equal(apply_rope(across, *small, False), apply_rope(across.contiguous(), *small, False))


def test_library_checks_and_compile(device: str) -> None:
    check_operator(lambda x, w: rms_norm(x, w, EPS), leaf(3, 2, 8).to(device), leaf(8).to(device))
    tables = [y.to(device) for y in rope_tables(torch.arange(5), 6, 100.0)]
    for interleaved in (True, False):
        check_operator(lambda x, c, s, i=interleaved: apply_rope(x, c, s, i), leaf(5, 2, 6).to(device), *tables)


def test_compiles_for_hopper_without_spills() -> None:
    binaries, _ = compiled("norm")
    names = {"rms_norm_kernel", "along_kernel", "rms_norm_backward_kernel", "add_partials_kernel", "rope_kernel"}
    assert {b.name for b in binaries} == names
    for binary in binaries:
        assert_fits(binary, uses_matrix_units=False)
