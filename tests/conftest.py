"""What all tests share: one thread a process, and a fresh seed that a failing test prints."""

from __future__ import annotations

import os
import random
import secrets

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    # Must be set before a kernel is defined; then it runs on the CPU, and tests/kernels/interpreter.py sees that it
    # computes as a GPU would.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A new seed each time; every generator is set to it. R1_TEST_SEED=N repeats a run."""
    value = int(os.environ.get("R1_TEST_SEED") or secrets.randbelow(2**31))
    print(f"seed {value} (repeat with R1_TEST_SEED={value})")
    random.seed(value)
    numpy.random.seed(value)  # noqa: NPY002 (reasoning-gym and Megatron draw from the global generators)
    torch.manual_seed(value)
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
