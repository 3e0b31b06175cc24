"""The choice of a backend, and the form of error messages."""

from __future__ import annotations

import pytest
import torch

import r1.kernels
from r1.kernels.backend import _implementations, backend, backends, register


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


def test_the_backends_of_a_device() -> None:
    assert backends("grpo", "cpu") == ["torch"]
    assert backends("mla", "cpu") == ["torch"] + ["cpu"] * ("cpu" in _implementations["mla"])
    for family in ("norm", "moe", "mla"):
        found = backends(family, "cuda")
        assert found[0] == "torch" and not {"cpu", "flash_attn"} & set(found)


def test_tensors_elsewhere_are_not_for_the_cpus_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("r1._cpu", reason="built only where a C++ compiler is found")
    monkeypatch.setenv("R1_KERNELS", "norm=cpu")
    with pytest.raises(ValueError, match="R1_KERNELS is 'cpu', but the tensors are on cuda"):
        backend("norm", torch.device("cuda"))


def test_kernels_that_were_built_and_do_not_load_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("r1._cpu", reason="built only where a C++ compiler is found")
    monkeypatch.setitem(_implementations, "some", {})

    def fails(name: str) -> None:
        raise ImportError("GLIBCXX_3.4.99 not found")

    monkeypatch.setattr("r1.kernels.backend.importlib.import_module", fails)
    with pytest.warns(UserWarning, match="r1._cpu was built and does not load .GLIBCXX_3.4.99"):
        register("some", "cpu", "r1.kernels.norm.cpu", proven_on=("cpu",))
    assert _implementations["some"] == {}
