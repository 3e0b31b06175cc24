"""The mla family by flash-attn: against float64 on a GPU; elsewhere, in flash-attn's place, two operators of its names
and arguments in plain torch show what it is given and what is made of its results."""

from __future__ import annotations

import importlib.util
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


# The schemas that flash-attn 2.8 registers.
FORWARD = """_flash_attn_varlen_forward(Tensor(a0!) q, Tensor(a1!) k, Tensor(a2!) v, Tensor cu_seqlens_q,
Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal,
SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0., Tensor? alibi_slopes=None,
bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None,
bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)"""
BACKWARD = """_flash_attn_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
Tensor(a6!)? dq, Tensor(a7!)? dk, Tensor(a8!)? dv, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,
SymInt max_seqlen_k, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left,
SymInt window_size_right, float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None,
bool zero_tensors=False) -> Tensor"""


def varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: Tensor, bounds_k: Tensor, max_q: int, max_k: int, dropout: float,
    scale: float, causal: bool, left: int = -1, right: int = -1, softcap: float = 0.0, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert causal and (dropout, left, right, softcap) == (0.0, -1, -1, 0.0) and not any(rest)
    assert bounds_q.dtype == torch.int32 and torch.equal(bounds_q, bounds_k) and max_q == max_k
    out, lse = reference.mla_attention(q, k, v, None, bounds_k, max_k, None, scale, True)
    return out, lse.t().contiguous(), q.new_empty(0), q.new_empty(2)


def varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    bounds_q: Tensor, bounds_k: Tensor, max_q: int, max_k: int, dropout: float, scale: float, causal: bool, left: int,
    right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool, *rest: Any,
) -> Tensor:  # fmt: skip
    assert causal and deterministic and (dropout, left, right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous() and torch.equal(bounds_q, bounds_k)
    grads = reference.mla_attention_backward(dout, q, k, v, None, out, lse.t(), bounds_k, max_k, None, scale, True)
    for into, grad in zip((dq, dk, dv), grads, strict=False):
        into.copy_(grad)
    return lse.clone()


@pytest.fixture
def asked(seed: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the mla family asked of the operators in flash-attn's place."""
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn itself is installed")
    calls: list[str] = []

    def recorded(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    with torch.library._scoped_library("flash_attn", "DEF") as library:
        for name, schema, function in (("forward", FORWARD, varlen_forward), ("backward", BACKWARD, varlen_backward)):
            library.define(schema)
            library.impl(f"_flash_attn_varlen_{name}", recorded(name, function), "CompositeExplicitAutograd")
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setenv("R1_KERNELS", "mla=triton")
        monkeypatch.setitem(_implementations["mla"], "triton", flash_attention)
        yield calls


@pytest.mark.parametrize(("lengths", "N", "M", "D"), CASES)
def test_what_flash_attn_is_given(asked: list[str], lengths: list[int], N: int, M: int, D: int) -> None:
    Problem("cpu", lengths, N, M, D, 0, D).check()
    assert asked == ["forward", "backward"]


def test_what_it_cannot_is_computed_by_the_triton_backend(asked: list[str]) -> None:
    for own, rope, value, dtype in ((8, 8, 16, HALF), (16, 0, 8, HALF), (8, 0, 8, F32), (12, 0, 12, HALF)):
        Problem("cpu", [30, 14], 2, 1, own, rope, value, dtype).check()
    Problem("cpu", [25, 14], 4, 1, 8, 0, 8, queries=torch.randperm(39)[:20]).check()
    Problem("cpu", [1, 0, 1, 1], 4, 2, 8, 0, 8).run()
    assert not asked
