"""r1._cuda, read and called where there is no GPU: what the compiler made of the kernels, and what a launch says."""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import torch

cuda = pytest.importorskip("r1._cuda", reason="r1._cuda is built only where nvcc is found")
triton = pytest.importorskip("triton", reason="its wheel brings cuobjdump")


def dump(*flags: str) -> dict[str, str]:
    """What cuobjdump prints of each kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, *flags, cuda.__file__], capture_output=True, text=True, check=True).stdout
    parts: dict[str, str] = defaultdict(str)
    for part in re.split(r"\bFunction\s*:?\s+", text)[1:]:
        parts[re.split(r"[\s:]", part, maxsplit=1)[0]] += part
    return parts


def test_matrix_kernels_use_what_hopper_has_and_do_not_spill() -> None:
    usage, instructions = dump("-res-usage"), dump("-sass")
    products = [name for name in instructions if "gemm_kernel" in name]
    assert products and set(products) == {name for name in usage if "gemm_kernel" in name}
    for name in products:
        code = instructions[name]
        assert re.search(r"\bQGMMA\.64x(64|128)x32\.F32\.E4M3\.E4M3\b", code), name
        assert re.search(r"\bUTMALDG\.2D\.MULTICAST\b", code) and re.search(r"\bUSETMAXREG\b", code), name
        assert not re.search(r"\b(LDL|STL|HMMA)\b", code), f"{name} spills, or uses older matrix instructions"
        assert re.search(r"STACK:0\b", usage[name]), usage[name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_launch_without_a_driver_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"cudaGetDevice: .*(driver|device)"):
        cuda.fp8_gemm(
            groups="none", square=True, accumulate=False, bfloat16=True, rows=1, columns=1, depth=1, a=(0, 16),
            a_scales=(0, 1, 1), b=(0, 16), b_scales=(0, 1, 1), b_scales_per_expert=0, out=0, experts=1,
            tokens_per_expert=0, wide_counts=False, tile=-1, stream=0,
        )  # fmt: skip
