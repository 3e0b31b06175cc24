"""Where the kernels' tests run: Triton's interpreted on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def backend() -> str:
    return "triton"


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, seed: int, backend: str) -> Iterator[str]:
    """Where the tensors lie. Every operator called runs the backend's kernels, and memory they get is full of NaN."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no GPU")
    if request.param == "cpu" and backend == "cuda":
        pytest.skip("CUDA C++ runs on a GPU; tests/csrc runs its bodies on a CPU")
    monkeypatch.setenv("R1_KERNELS", backend)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All families by the torch backend, as FP8 operators are on a CPU: only then are results bit for bit theirs."""
    monkeypatch.setenv("R1_KERNELS", "torch")


@pytest.fixture(scope="module", params=["torch", "cpu"])
def on_cpu(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that runs the families of a layer on a CPU."""
    if request.param == "cpu":
        pytest.importorskip("r1._cpu", reason="r1._cpu is built only where a C++ compiler is found")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("R1_KERNELS", ",".join(f"{family}={request.param}" for family in ("norm", "moe", "mla")))
        yield request.param
