"""Builds a C++ file of this folder with g++."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

OPTIONS = ["-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-shared", "-fPIC"]


def build(name: str, folder: Path) -> ctypes.CDLL:
    """The library made of it, without a warning; the test is skipped where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    source, library = Path(__file__).parent / name, folder / f"{name}.so"
    built = subprocess.run(["g++", *OPTIONS, "-pthread", source, "-o", library], capture_output=True, text=True)
    assert built.returncode == 0 and not built.stderr, built.stderr
    return ctypes.CDLL(str(library))
