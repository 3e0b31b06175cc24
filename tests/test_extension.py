"""r1._cuda, where it was built: it imports without a driver and answers cleanly."""

from __future__ import annotations

import subprocess
import sys

import pytest

cuda = pytest.importorskip("r1._cuda", reason="r1._cuda is built only where nvcc is found")


def test_a_bad_index_is_named() -> None:
    for index in (-1, cuda.device_count()):
        with pytest.raises(ValueError, match=f"index is {index}, wanted 0 <= index < "):
            cuda.device(index)


def test_no_devices_is_an_answer_and_not_an_error() -> None:
    """In its own process, with every device hidden."""
    script = "import r1._cuda as c; print(c.device_count(), c.status() != 'ok', c.runtime_version() >= 12000)"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.split() == ["0", "True", "True"]


def test_it_links_neither_torch_nor_the_driver() -> None:
    script = "import sys, r1._cuda; print('torch' in sys.modules, 'libcuda.so' in open('/proc/self/maps').read())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.gpu
def test_it_agrees_with_torch() -> None:
    import torch

    assert cuda.device_count() == torch.cuda.device_count() and cuda.status() == "ok"
    ours, theirs = cuda.device(0), torch.cuda.get_device_properties(0)
    assert ours["name"] == theirs.name and ours["memory_bytes"] == theirs.total_memory
    assert ours["compute_capability"] == (theirs.major, theirs.minor)
    assert ours["multiprocessors"] == theirs.multi_processor_count
