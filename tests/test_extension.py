"""r1._cuda and r1._cpu, where they were built: they import without a driver, or torch, and answer cleanly."""

from __future__ import annotations

import ast
import subprocess
import sys
from types import ModuleType

import pytest


@pytest.fixture
def cuda() -> ModuleType:
    return pytest.importorskip("r1._cuda", reason="r1._cuda is built only where nvcc is found")


def test_a_bad_index_is_named(cuda: ModuleType) -> None:
    for index in (-1, cuda.device_count()):
        with pytest.raises(ValueError, match=f"index is {index}, wanted 0 <= index < "):
            cuda.device(index)


def test_no_devices_is_an_answer_and_not_an_error(cuda: ModuleType) -> None:
    """In its own process, with every device hidden."""
    script = "import r1._cuda as c; print(c.device_count(), c.status() != 'ok', c.runtime_version() >= 12000)"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split() == ["0", "True", "True"]


@pytest.mark.parametrize("name", ["_cuda", "_cpu"])
def test_it_links_neither_torch_nor_the_driver(name: str) -> None:
    pytest.importorskip(f"r1.{name}", reason="built only where a compiler is found")
    script = f"import sys, r1.{name}; print('torch' in sys.modules, 'libcuda.so' in open('/proc/self/maps').read())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_torch_and_the_cpus_kernels_share_their_threads() -> None:
    """Two OpenMP runtimes would each keep a thread for every core. (torch's is GCC's; clang brings another.)"""
    pytest.importorskip("r1._cpu", reason="built only where a C++ compiler is found")
    script = (
        "import torch, r1._cpu; print({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l and '.so' in l})"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(ast.literal_eval(result.stdout)) == 1


@pytest.mark.gpu
def test_it_agrees_with_torch(cuda: ModuleType) -> None:
    import torch

    assert cuda.device_count() == torch.cuda.device_count() and cuda.status() == "ok"
    ours, theirs = cuda.device(0), torch.cuda.get_device_properties(0)
    assert ours["name"] == theirs.name and ours["memory_bytes"] == theirs.total_memory
    assert ours["compute_capability"] == (theirs.major, theirs.minor)
    assert ours["multiprocessors"] == theirs.multi_processor_count
