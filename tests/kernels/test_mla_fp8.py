"""The cache of FP8 latents: its bytes read by hand, what is lost, and decoding against float64 over what it holds."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import Tensor

from r1.kernels import append_kv, fp8_latent_bytes, gqa_decode, mla_decode, numerics
from tests.kernels.helpers import check_operator

F64, F32, HALF = torch.float64, torch.float32, torch.bfloat16
UNUSED = 0xFF  # a NaN in each of the three parts


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent with bias 7, three of mantissa; 0x7F and 0xFF are NaN."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if byte & 0x7F == 0x7F:
        return float("nan")
    return sign * (2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))


def by_hand(tokens: Tensor, latent_rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(e4m3 values (L, R), scales (L, R / 128), rope parts (L, Dr)) of (L, bytes), in float64."""
    values, scales, ropes = [], [], []
    for token in tokens.tolist():
        raw, blocks = bytes(token), latent_rank // 128
        rope_width = (len(raw) - latent_rank - 4 * blocks) // 2
        values.append([e4m3(byte) for byte in raw[:latent_rank]])
        scales.append(struct.unpack_from(f"<{blocks}f", raw, latent_rank))
        halves = struct.unpack_from(f"<{rope_width}H", raw, latent_rank + 4 * blocks)
        # A bfloat16 is the upper half of a float32.
        ropes.append([struct.unpack("<f", struct.pack("<I", half << 16))[0] for half in halves])
    return tuple(torch.tensor(part, dtype=F64) for part in (values, scales, ropes))


def dequantised(tokens: Tensor, latent_rank: int, dtype: torch.dtype) -> Tensor:
    """(L, R + Dr) in dtype."""
    if not len(tokens):
        return torch.zeros(0, latent_rank + (tokens.shape[1] - latent_rank // 32 - latent_rank) // 2, dtype=dtype)
    values, scales, ropes = by_hand(tokens, latent_rank)
    wide = F64 if dtype == F64 else F32
    latents = values.to(wide) * scales.to(wide).repeat_interleave(128, 1)
    return torch.cat([latents.to(dtype), ropes.to(dtype)], 1)


def paged(lengths: list[int], page: int, R: int, rope: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """(cache, table, what was written, the bytes it became) for latents of many sizes in shuffled pages; all that no
    token uses is NaN, the table's tails are wild."""
    pages = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(pages) + 3)
    table = torch.full((len(lengths), max(pages) + 2), -77777, dtype=torch.int32)
    cache = torch.full((sum(pages) + 3, page, fp8_latent_bytes(R, rope)), UNUSED, dtype=torch.uint8)
    rows, tokens, used = [], [], 0
    for b, n in enumerate(lengths):
        table[b, : pages[b]] = order[used : used + pages[b]].int()
        used += pages[b]
        rows.append(torch.randn(n, R + rope) * 2.0 ** torch.randint(-3, 2, (n, 1)))
        append_kv(cache, rows[b], table[b : b + 1].expand(n, -1), torch.arange(n))
        place = torch.arange(n)
        tokens.append(cache[table[b].long()[place // page], place % page])
    return cache, table, rows, tokens


def check_lost(rows: Tensor, tokens: Tensor, R: int) -> None:
    """Scales are amax / 448; a number is off by half a step of e4m3 at most, 16 of the largest one's 448."""
    values, scales, ropes = by_hand(tokens, R)
    blocks = rows[:, :R].unflatten(1, (-1, 128))
    amax = blocks.abs().amax(-1)
    assert torch.equal(scales.float(), amax.float() / torch.tensor(448.0))
    error = (values.unflatten(1, (-1, 128)) * scales[..., None] - blocks.double()).abs()
    assert (error <= amax[..., None].double() * (16 / 448) * (1 + 1e-6)).all()
    assert (error <= blocks.double().abs() * 2**-4 * (1 + 1e-6) + scales[..., None] * 2**-10).all()
    assert torch.equal(ropes, rows[:, R:].to(HALF).double())


def test_a_token_of_deepseek_v3(seed: int) -> None:
    """656 bytes: 512 of latents, 16 of scales, 128 of the rope part."""
    assert fp8_latent_bytes(512, 64) == 656
    rows = torch.randn(7, 576) * torch.tensor([1e-3, 1.0, 1e4, 1.0, 1.0, 1.0, 1.0])[:, None]
    cache = torch.full((3, 4, 656), UNUSED, dtype=torch.uint8)
    append_kv(cache, rows, torch.tensor([[2, 0]]).expand(7, -1), torch.arange(7))
    check_lost(rows, torch.cat([cache[2], cache[0, :3]]), 512)
    assert cache[1].eq(UNUSED).all() and cache[0, 3].eq(UNUSED).all()


def test_bytes_one_by_one() -> None:
    """Numbers that are exact, ties, what saturates, and NaN, which is alone."""
    row = torch.zeros(2, 256 + 2)
    row[:, :8] = torch.tensor([448.0, -1.0, 0.5, 17.0, 19.0, torch.nan, 2.0**-9, 2.0**-10])
    row[1, 0] = torch.inf
    row[:, 256:] = torch.tensor([1.0, -2.0])
    cache = torch.full((1, 2, fp8_latent_bytes(256, 2)), UNUSED, dtype=torch.uint8)
    append_kv(cache, row, torch.tensor([[0], [0]]), torch.tensor([0, 1]))
    first, second = (bytes(token) for token in cache[0].tolist())
    assert first[:8] == bytes([0x7E, 0xB8, 0x30, 0x58, 0x5A, 0x7F, 0x01, 0x00]) and not any(first[8:256])
    assert first[256:] == struct.pack("<ff", 1.0, 1.0) + bytes([0x80, 0x3F, 0x00, 0xC0])
    assert second[0] == 0x7E and second[5] == 0x7F and second[256:260] == struct.pack("<f", torch.finfo(F32).max)


@pytest.mark.parametrize("dtype", [F64, F32, HALF, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["fast", "exact"])
@pytest.mark.parametrize(("N", "R", "rope"), [(3, 128, 2), (2, 384, 6), (1, 256, 0)])
def test_decode(seed: int, plain_torch: None, N: int, R: int, rope: int, kind: str, dtype: torch.dtype) -> None:
    lengths = [5, 16, 0, 17, 1, 70]
    cache, table, rows, tokens = paged(lengths, 16, R, rope)
    q, lens = torch.randn(len(lengths), N, R + rope).to(dtype), torch.tensor(lengths).int()
    with numerics(kind):
        out = mla_decode(q, cache, table, lens, 0.1, R)
        assert out.dtype == dtype and out.shape == (len(lengths), N, R)
        one = slice(3, 4)
        if kind == "exact":
            assert torch.equal(mla_decode(q[one], cache, table[one], lens[one], 0.1, R), out[one])
        assert mla_decode(q, cache, table, lens * 0, 0.1, R).eq(0).all()
        assert mla_decode(q[:0], cache, table[:0], lens[:0], 0.1, R).shape == (0, N, R)
        # The same bits as over a cache that holds the numbers.
        plain = torch.zeros(*cache.shape[:2], R + rope, dtype=dtype)
        for b, token in enumerate(tokens):
            check_lost(rows[b], token, R) if len(token) else None
            append_kv(
                plain, dequantised(token, R, dtype), table[b : b + 1].expand(len(token), -1), torch.arange(len(token))
            )
        assert torch.equal(mla_decode(q, plain, table, lens, 0.1, R), out)
    tolerance = {F64: 1e-12, F32: 2e-5, HALF: 2e-2, torch.float16: 2e-3}[dtype]
    for b, token in enumerate(tokens):
        kv = dequantised(token, R, dtype).double()
        want = (q[b].double() @ kv.t() * 0.1).softmax(-1) @ kv[:, :R] if len(kv) else torch.zeros(N, R, dtype=F64)
        torch.testing.assert_close(out[b].double(), want, atol=tolerance, rtol=tolerance)


def test_rows_of_every_type_and_positions(seed: int) -> None:
    size = fp8_latent_bytes(128, 4)
    table, positions = torch.tensor([[3, 1], [0, -5], [2, 2]], dtype=torch.int32), torch.tensor([3, 1, -1])
    rows = torch.randn(3, 132, dtype=F64)
    for kind in (F64, F32, HALF, torch.float16):
        cache = torch.full((4, 2, size), UNUSED, dtype=torch.uint8)
        append_kv(cache, rows.to(kind), table, positions)
        check_lost(rows.to(kind).float()[:2], torch.stack([cache[1, 1], cache[0, 1]]), 128)
        cache[1, 1] = cache[0, 1] = UNUSED
        assert cache.eq(UNUSED).all()


def check_library(device: str) -> None:
    cache = torch.zeros(3, 4, fp8_latent_bytes(128, 4), dtype=torch.uint8, device=device)
    table, lens = torch.tensor([[2, 0], [1, 1]], device=device).int(), torch.tensor([5, 3], device=device).int()

    def write(cache: Tensor, rows: Tensor) -> Tensor:
        append_kv(cache, rows, table, lens - 1)
        return cache.float().sum()

    check_operator(write, cache, torch.randn(2, 132, device=device))
    assert cache.any()
    check_operator(lambda q: mla_decode(q, cache, table, lens, 0.5, 128), torch.randn(2, 3, 132, device=device))


def test_library_checks_and_compile(seed: int) -> None:
    check_library("cpu")


def test_bad_input() -> None:
    bad = lambda match: pytest.raises(ValueError, match=match)
    for rank, width, match in (
        (96, 2, "latent_rank is 96, wanted a positive multiple of 128"),
        (0, 2, "latent_rank is 0"),
        (128, 3, "rope_width is 3, wanted an even number, 0 or more"),
        (128, -2, "rope_width is -2"),
    ):
        with bad(match):
            fp8_latent_bytes(rank, width)
    size = fp8_latent_bytes(128, 4)
    cache, table, lens = torch.zeros(3, 4, size, dtype=torch.uint8), torch.zeros(2, 2).int(), torch.ones(2).int()
    q, rows = torch.randn(2, 3, 132), torch.randn(2, 132)
    with bad(
        rf"kv_cache is a \(3, 4, {size - 2}\) tensor of uint8 .*wanted a contiguous .*{size}\) tensor of FP8 latents"
    ):
        mla_decode(q, cache[..., 2:].contiguous(), table, lens, 1.0, 128)
    with bad(r"kv_cache is .*wanted a contiguous"):
        mla_decode(q, torch.zeros(3, 4, 2 * size, dtype=torch.uint8)[..., :size], table, lens, 1.0, 128)
    with bad("latent_rank is 100, wanted a positive multiple of 128"):
        mla_decode(q, cache, table, lens, 1.0, 100)
    for wrong in (rows[:, :-1], rows[:, :-2], torch.randn(2, 1, 132), torch.randn(2, 256), rows.to(torch.int32)):
        with bad(rf"rows is a .*wanted a floating \(B, R \+ Dr\) tensor on cpu for {size} = R \+ R / 32 \+ 2 Dr bytes"):
            append_kv(cache, wrong, table, lens)
    with bad("kv_cache is .*wanted .blocks, block size, bytes., as uint8 one of FP8 latents"):
        append_kv(cache.unsqueeze(2), rows, table, lens)
    with bad("positions_B holds 8, wanted less than the table's 2 pages x 4 = 8"):
        append_kv(cache, rows, table, lens.long() * 8)
    with bad("seq_lens_B holds 9, wanted at most the table's 2 pages x 4 = 8"):
        mla_decode(q, cache, table, lens * 9, 1.0, 128)
    pages = torch.zeros(3, 4, 1, 132, dtype=torch.uint8)
    with bad("k_cache is a .* tensor of uint8 .*wanted a floating 4-dimensional tensor"):
        gqa_decode(q, pages, pages, table, lens, 1.0)
