"""Compiles Triton kernels for Hopper (sm_90a) with no GPU, and reads the binaries: registers, spills, instructions.

`compiled("some.test.module", "function")` runs the function in a process of its own, where no kernel is interpreted and
a launch compiles instead of running: Triton's own binder sees the real arguments, so what is compiled is what a GPU
would get. The tensors may be of any size as long as nothing writes to them: they are never touched.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HOPPER_SHARED_BYTES = 232_448  # 227 KiB, what one block may have


@dataclass
class Binary:
    """One compiled kernel. `spills` counts local loads and stores; `matrix_instructions` are HGMMA, QGMMA or HMMA."""

    name: str
    constants: dict[str, Any]
    registers: int
    stack_bytes: int
    shared_bytes: int
    spills: int
    matrix_instructions: list[str]
    bulk_copies: int

    def assert_fit(self, uses_matrix_units: bool) -> None:
        what = f"{self.name} {self.constants}"
        assert self.spills == 0 and self.stack_bytes == 0, f"{what} spills: {self}"
        assert self.shared_bytes <= HOPPER_SHARED_BYTES, f"{what} wants {self.shared_bytes} bytes of shared memory"
        if uses_matrix_units:
            groups = {"HGMMA", "QGMMA", "IGMMA"}
            assert groups.intersection(self.matrix_instructions), f"{what} does without warp-group MMA: {self}"


def compiled(module: str, function: str) -> list[Binary]:
    """Every kernel that `function` of `module` launches, each specialisation once."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", module, function]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return [Binary(**binary) for binary in json.loads(done.stdout.splitlines()[-1])]


def _no_gpu_needed(kernels: dict[int, Any]) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    properties = {"max_shared_mem": HOPPER_SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )
    triton.runtime.driver.set_active(driver)
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        names = {p.num: p.name for p in self.params}
        constants = {names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
        kernels[id(kernel)] = (self.fn.__name__, constants, kernel)
        return kernel

    JITFunction.run = compile_only


def _read(name: str, constants: dict[str, Any], kernel: Any) -> Binary:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = lambda *flags: (
            subprocess.run([cuobjdump, *flags, file.name], capture_output=True, text=True, check=True).stdout
        )
        usage, instructions = dump("-res-usage"), dump("-sass")
    number = lambda key: int(re.search(rf"{key}:(\d+)", usage).group(1))
    return Binary(
        name,
        {k: v for k, v in constants.items() if isinstance(v, (bool, int, str))},
        number("REG"),
        number("STACK"),
        kernel.metadata.shared,
        len(re.findall(r"\b(?:LDL|STL)\b", instructions)),
        sorted(set(re.findall(r"\b[HQI]G?MMA\b", instructions))),
        len(re.findall(r"\bUTMALDG\b", instructions)),
    )


if __name__ == "__main__":
    launched: dict[int, Any] = {}
    _no_gpu_needed(launched)
    with contextlib.redirect_stdout(sys.stderr):
        getattr(importlib.import_module(sys.argv[1]), sys.argv[2])()
    print(json.dumps([asdict(_read(*entry)) for entry in launched.values()]))
