"""Where the Triton kernels' tests run: interpreted on the CPU, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[str]:
    """Where the tensors lie. Every operator called runs the Triton kernels, and memory they get is full of NaN."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are interpreted only where there is no GPU")
    monkeypatch.setenv("R1_KERNELS", "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(False)
