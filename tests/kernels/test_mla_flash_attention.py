"""The mla family by flash-attn: against float64 on a GPU; elsewhere, in flash-attn's place, two operators of its names
and arguments in plain torch show what it is given and what is made of its results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from r1.kernels.backend import _implementations
from r1.kernels.mla import flash_attention, reference
from tests.kernels import interpreter  # noqa: F401 (mends the interpreter)
from tests.kernels.test_mla_triton import F32, HALF, Problem

CASES = [([127, 128, 1, 129, 0, 2], 4, 2, 64), ([40], 2, 2, 128), ([5, 9], 6, 1, 8)]


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "N", "M", "D"), [*CASES, ([5000, 3192], 14, 2, 64)])
def test_attention_by_flash_attn(
    seed: int, lengths: list[int], N: int, M: int, D: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flash_attn")
    monkeypatch.setenv("R1_KERNELS", "mla=flash_attn")
    Problem("cuda", lengths, N, M, D, 0, D).check()


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert causal and dropout_p == 0.0 and cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    out, lse = reference.mla_attention(q, k, v, None, cu_seqlens_k, max_seqlen_k, None, softmax_scale, True)
    return out, lse.t().contiguous(), q.new_empty(0), q.new_empty(2)


def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool,
) -> Tensor:  # fmt: skip
    assert (
        causal and deterministic and (window_size_left, window_size_right, softcap, alibi_slopes) == (-1, -1, 0, None)
    )
    assert softmax_lse.shape == (q.shape[1], q.shape[0]) and softmax_lse.is_contiguous() and dropout_p == 0.0
    grads = reference.mla_attention_backward(
        dout, q, k, v, None, out, softmax_lse.t(), cu_seqlens_k, max_seqlen_k, None, softmax_scale, True
    )
    for into, grad in zip((dq, dk, dv), grads, strict=False):
        into.copy_(grad)
    return softmax_lse


@pytest.fixture
def in_its_place(seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the mla family asked of it."""
    asked: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            asked.append(name)
            return function(*arguments, **options)

        return call

    operators = ModuleType("operators")
    operators._flash_attn_varlen_forward = recorded("forward", varlen_forward)
    operators._flash_attn_varlen_backward = recorded("backward", varlen_backward)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setattr(torch.ops, "flashattn", operators)
    monkeypatch.setenv("R1_KERNELS", "mla=triton")
    monkeypatch.setitem(_implementations["mla"], "triton", flash_attention)
    yield asked


@pytest.mark.parametrize(("lengths", "N", "M", "D"), CASES)
def test_what_flash_attn_is_given(in_its_place: list[str], lengths: list[int], N: int, M: int, D: int) -> None:
    Problem("cpu", lengths, N, M, D, 0, D).check()
    assert in_its_place == ["forward", "backward"]


def test_what_it_cannot_is_computed_by_the_triton_backend(in_its_place: list[str]) -> None:
    for own, rope, value, dtype in ((8, 8, 16, HALF), (16, 0, 8, HALF), (8, 0, 8, F32), (12, 0, 12, HALF)):
        Problem("cpu", [30, 14], 2, 1, own, rope, value, dtype).check()
    Problem("cpu", [25, 14], 4, 1, 8, 0, 8, queries=torch.randperm(39)[:20]).check()
    assert not in_its_place
