"""The choice of a backend, and the form of error messages."""

from __future__ import annotations

import pytest
import torch

import r1.kernels
from r1.kernels.backend import _implementations


def test_every_public_name_is_there() -> None:
    for name in r1.kernels.__all__:
        assert callable(getattr(r1.kernels, name)), name


def test_families_all_have_the_torch_backend() -> None:
    assert set(_implementations) == {"grpo", "moe", "mla", "fp8", "norm", "optim"}
    assert all("torch" in available for available in _implementations.values())


def test_forcing_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 4), torch.ones(4)
    automatic = r1.kernels.rms_norm(x, weight)
    monkeypatch.setenv("R1_KERNELS", "torch")
    torch.testing.assert_close(r1.kernels.rms_norm(x, weight), automatic)
    monkeypatch.setenv("R1_KERNELS", "tritn")
    with pytest.raises(
        ValueError, match=r"R1_KERNELS is 'tritn', wanted one of auto, cuda, triton, flash_attn, cpu, torch"
    ):
        r1.kernels.rms_norm(x, weight)
    if "cuda" not in _implementations["norm"]:
        monkeypatch.setenv("R1_KERNELS", "cuda")
        with pytest.raises(ValueError, match=r"R1_KERNELS is 'cuda', but the norm family has only: .*torch"):
            r1.kernels.rms_norm(x, weight)


def test_forcing_a_backend_for_one_family(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 4), torch.ones(4)
    monkeypatch.setenv("R1_KERNELS", "grpo=triton,norm=torch")
    r1.kernels.rms_norm(x, weight)
    monkeypatch.setenv("R1_KERNELS", "norm=fast")
    with pytest.raises(ValueError, match="R1_KERNELS is 'fast', wanted one of"):
        r1.kernels.rms_norm(x, weight)
    monkeypatch.setenv("R1_KERNELS", "norms=torch")
    with pytest.raises(ValueError, match="R1_KERNELS names the family 'norms', wanted fp8, grpo, mla"):
        r1.kernels.rms_norm(x, weight)
    monkeypatch.setenv("R1_KERNELS", "grpo=triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        r1.kernels.linear_logprob(x, x, torch.tensor([0, 1]))
