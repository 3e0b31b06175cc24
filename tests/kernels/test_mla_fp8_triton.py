"""The kernels over FP8 latents: bytes as the torch backend's, decoding against float64 over what the cache holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from r1.kernels import append_kv, fp8_latent_bytes, mla_decode
from r1.kernels.mla import reference, triton_paged
from tests.kernels import interpreter  # noqa: F401 (mends the interpreter)
from tests.kernels.helpers import same_as_plain
from tests.kernels.test_mla_fp8 import UNUSED, check_library, dequantised, paged
from tests.kernels.test_mla_triton import of_one

F64, HALF, F32 = torch.float64, torch.bfloat16, torch.float32


def awkward(B: int, R: int, rope: int) -> Tensor:
    """Zeros, infinity, NaN in the latents and a row of nothing at all among numbers of many sizes."""
    x = torch.randn(B, R + rope, dtype=F64) * 2.0 ** torch.randint(-140, 120, (B, 1))
    x[torch.rand(x.shape) < 0.1] = 0
    specials = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=F64)
    x[torch.randint(0, B - 1, (3,)), torch.randint(0, R, (3,))] = specials
    x[-1] = 0
    return x


@pytest.mark.parametrize(("R", "rope"), [(128, 2), (256, 0), (384, 66), (512, 64)])
def test_append_kv_bit_for_bit(device: str, R: int, rope: int) -> None:
    table = torch.tensor([[3, 1], [0, -5], [2, -5], [-9, -9], [4, 4], [4, 4]], dtype=torch.int32, device=device)
    positions = torch.tensor([7, 0, 3, -1, 1, 2], device=device)
    for kind in (F64, F32, HALF, torch.float16):
        rows = awkward(6, R, rope).to(kind).to(device)
        for source in (rows, rows.t().contiguous().t()):
            got = torch.full((5, 4, fp8_latent_bytes(R, rope)), UNUSED, dtype=torch.uint8, device=device)
            want = got.clone()
            append_kv(got, source, table, positions)
            reference.append_kv(want, source, table, positions)
            assert torch.equal(got, want)
            assert got.ne(UNUSED).any(-1).sum() == 5
    append_kv(got, rows[:0], table[:0], positions[:0])
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("N", "R", "rope", "page", "lengths", "dtype"),
    [
        (3, 128, 8, 16, [5, 16, 0, 17, 1, 150], HALF),
        (3, 128, 8, 16, [33, 0, 66], F32),
        (70, 128, 2, 64, [65], torch.float16),
        (2, 512, 64, 32, [40], HALF),
        (17, 384, 6, 4, [9, 67], HALF),
        (1, 256, 0, 48, [100, 1], HALF),
        pytest.param(128, 512, 64, 64, [5000, 0, 1, 2048, 4097, 64], HALF, marks=pytest.mark.gpu),
    ],
)
def test_mla_decode(
    device: str, N: int, R: int, rope: int, page: int, lengths: list[int], dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if device == "cpu":
        monkeypatch.setattr(triton_paged, "SPLIT", 64)
    cache, table, _, tokens = paged(lengths, page, R, rope)
    cache, table = cache.to(device), table.to(device)
    q, lens = torch.randn(len(lengths), N, R + rope).to(dtype).to(device), torch.tensor(lengths).int().to(device)
    out = mla_decode(q, cache, table, lens, 0.1, R)
    for b, token in enumerate(tokens):
        kv = dequantised(token, R, dtype)[:, None].to(device)
        results = (of_one(q[b].to(kind), kv, kv[..., :R], 0.1) for kind in (dtype, F64))
        same_as_plain(out[b], *results, f"sequence {b}")
    assert out.dtype == dtype and out[lens == 0].eq(0).all()
    for b in range(min(len(lengths), 2)):  # alone it has the same bits
        one = slice(b, b + 1)
        assert torch.equal(mla_decode(q[one], cache, table[one], lens[one], 0.1, R), out[one])
    wider = torch.cat([table, torch.full_like(table, 2**30)], 1).long()
    assert torch.equal(mla_decode(q, cache, wider, lens.long(), 0.1, R), out)
    assert mla_decode(q, cache, table, lens * 0, 0.1, R).eq(0).all()
    assert mla_decode(q[:0], cache, table[:0], lens[:0], 0.1, R).shape == (0, N, R)
    assert mla_decode(q, cache, table[:, :0], lens * 0, 0.1, R).eq(0).all()


def test_neighbours_and_what_is_unused_change_no_bit(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_paged, "SPLIT", 32)
    lengths = [37, 20, 64]
    cache, table, _, _ = paged(lengths, 16, 128, 4)
    cache, table = cache.to(device), table.to(device)
    q, lens = torch.randn(3, 5, 132).to(HALF).to(device), torch.tensor(lengths, device=device).int()
    out = mla_decode(q, cache, table, lens, 0.2, 128)
    assert out.isfinite().all()
    assert torch.equal(mla_decode(q, cache, table, lens, 0.2, 128), out)
    unused = cache.clone()
    unused[(cache == UNUSED).all(-1)] = 0x3C  # numbers, as likely as others
    assert not torch.equal(unused, cache)
    assert torch.equal(mla_decode(q, unused, table, lens, 0.2, 128), out)
    order = [2, 0]
    assert torch.equal(mla_decode(q[order], cache, table[order], lens[order], 0.2, 128), out[order])
    cache[table[1, :2].long()] = UNUSED
    got = mla_decode(q, cache, table, lens, 0.2, 128)
    assert torch.equal(got[[0, 2]], out[[0, 2]]) and got[1].isnan().all()


def test_what_the_kernel_does_not_do_is_computed_by_the_torch_backend(device: str) -> None:
    lengths = [9, 20]
    lens = torch.tensor(lengths, device=device).int()
    for dtype, scale, R in ((F64, 0.3, 128), (F32, 0.3, 256), (HALF, -0.3, 128), (HALF, 0.3, 640)):
        cache, table, _, _ = paged(lengths, 8, R, 2)
        arguments = (torch.randn(2, 3, R + 2).to(dtype).to(device), cache.to(device), table.to(device), lens, scale, R)
        assert torch.equal(mla_decode(*arguments), reference.mla_decode(*arguments))


def test_library_checks_and_compile(device: str) -> None:
    check_library(device)


def test_bad_input_on_a_cpu(device: str) -> None:
    if device != "cpu":
        pytest.skip("on a GPU values are not looked at")
    cache = torch.zeros(3, 4, fp8_latent_bytes(128, 4), dtype=torch.uint8)
    table, lens = torch.zeros(2, 2).int(), torch.ones(2).int()
    with pytest.raises(ValueError, match="seq_lens_B holds 9, wanted at most the table's 2 pages x 4 = 8"):
        mla_decode(torch.randn(2, 3, 132), cache, table, lens * 9, 1.0, 128)
    with pytest.raises(ValueError, match="positions_B holds 8, wanted less than the table's 2 pages x 4 = 8"):
        append_kv(cache, torch.randn(2, 132), table, lens.long() * 8)
