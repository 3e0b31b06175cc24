"""Compiles Triton kernels for Hopper (sm_90a) with no GPU, and reads binaries: registers, spills, instructions.

`compiled(family)` makes a family's launches (_launches.py) in a process of its own, where no kernel is interpreted and
a launch compiles instead of running: Triton's own binder sees the real arguments, so what is compiled is what a GPU
would get. The tensors may be of any size as long as nothing writes to them: they are never touched.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HOPPER_SHARED_BYTES = 232_448  # 227 KiB, what one block may have


@dataclass
class Binary:
    """One compiled kernel. `spills` counts local loads and stores; `matrix_instructions`, by their names, are HGMMA,
    QGMMA or HMMA; `bulk_copies` are the copy engine's loads."""

    name: str
    constants: dict[str, Any]
    registers: int
    stack_bytes: int
    shared_bytes: int
    spills: int
    matrix_instructions: dict[str, int]
    bulk_copies: int


@dataclass
class Compiled:
    """One launch: what it multiplies (FLOPs), the bytes of its operands and results, each once, and its kernels."""

    operator: str
    shape: str
    flops: float
    bytes: int
    kernels: list[int]


def compiled(family: str) -> tuple[list[Binary], list[Compiled]]:
    """A family's kernels in Triton, each specialisation once, and its launches, which name them by their index."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "r1.bench._ahead_of_time", family]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"the {family} family does not compile for sm_90a:\n{done.stderr[-4000:]}")
    binaries, launches = json.loads(done.stdout.splitlines()[-1])
    return [Binary(**binary) for binary in binaries], [Compiled(**launch) for launch in launches]


def of_extension() -> list[Binary]:
    """The kernels of r1._cuda, named as in csrc; ImportError where it was not built."""
    import r1._cuda

    usage, instructions = dump(Path(r1._cuda.__file__))
    return [
        _read(*_demangled(mangled, r1._cuda.fp8_shared_bytes), usage[mangled], code, None)
        for mangled, code in instructions.items()
    ]


def _demangled(mangled: str, shared_bytes: Any) -> tuple[str, dict[str, Any]]:
    flag = r"Lb([01])E"
    if match := re.search(rf"gemm_kernel.*?Li(\d+)ELi(\d+)ELN\w+?GroupsE(\d)E{flag}{flag}(f|13__nv_bfloat16)", mangled):
        rows, columns, groups, square, accumulate, out = match.groups()
        return "gemm_kernel", {
            "rows": int(rows),
            "columns": int(columns),
            "groups": ("none", "rows", "depth")[int(groups)],
            "square": square == "1",
            "accumulate": accumulate == "1",
            "out": "float32" if out == "f" else "bfloat16",
            "dynamic_shared_bytes": shared_bytes(int(rows), int(columns), square == "1", out != "f"),
        }
    if match := re.search(rf"quantize_kernelI(f|13__nv_bfloat16){flag}{flag}", mangled):
        source, square, across = match.groups()
        types = {"f": "float32"}
        return "quantize_kernel", {
            "source": types.get(source, "bfloat16"),
            "square": square == "1",
            "across": across == "1",
        }
    raise ValueError(f"r1._cuda has a kernel that this report does not know: {mangled}")


def _no_gpu_needed(kernels: dict[int, Any], used: list[int]) -> None:
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
        used.append(id(kernel))
        return kernel

    JITFunction.run = compile_only


def dump(file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What cuobjdump says of each kernel in a binary: its resources, and its instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

    def of_kernels(flag: str) -> dict[str, str]:
        text = subprocess.run([tool, flag, file], capture_output=True, text=True, check=True).stdout
        parts: dict[str, str] = defaultdict(str)
        for part in re.split(r"\bFunction\s*:?\s+", text)[1:]:
            parts[re.split(r"[\s:]", part, maxsplit=1)[0]] += part
        return parts

    return of_kernels("-res-usage"), of_kernels("-sass")


def _read(name: str, constants: dict[str, Any], usage: str, instructions: str, shared_bytes: int | None) -> Binary:
    number = lambda key: int(re.search(rf"\b{key}:(\d+)", usage).group(1))
    dynamic = constants.pop("dynamic_shared_bytes", 0)
    return Binary(
        name,
        {k: v for k, v in constants.items() if isinstance(v, (bool, int, str))},
        number("REG"),
        number("STACK"),
        number("SHARED") + dynamic if shared_bytes is None else shared_bytes,
        len(re.findall(r"\b(?:LDL|STL)\b", instructions)),
        dict(Counter(re.findall(r"\b[HQI]G?MMA\b", instructions))),
        len(re.findall(r"\bUTMALDG\b", instructions)),
    )


def _read_triton(name: str, constants: dict[str, Any], kernel: Any) -> Binary:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, instructions = ("".join(parts.values()) for parts in dump(Path(file.name)))
    return _read(name, constants, usage, instructions, kernel.metadata.shared)


def _main(family: str) -> None:
    from r1.bench import _launches

    kernels: dict[int, Any] = {}
    used: list[int] = []
    launches = []
    _no_gpu_needed(kernels, used)
    with contextlib.redirect_stdout(sys.stderr):
        for launch in getattr(_launches, family)():
            used.clear()
            size = launch.run()
            launches.append(Compiled(launch.operator, launch.shape, launch.flops, size, list(dict.fromkeys(used))))
    order = {key: index for index, key in enumerate(kernels)}
    for done in launches:
        done.kernels = [order[key] for key in done.kernels]
    binaries = [asdict(_read_triton(*entry)) for entry in kernels.values()]
    print(json.dumps([binaries, [asdict(done) for done in launches]]))


if __name__ == "__main__":
    _main(sys.argv[1])
