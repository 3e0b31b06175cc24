"""What every kernel's binary for Hopper says, without a GPU: `python -m r1.bench.static [FAMILY ...]`.

- Launches: each operator at DeepSeek-V3's sizes, whichever kernel it is; FLOPs, bytes of its operands and results,
  bytes per FLOP, and the least time that an H200's data sheet allows, by whichever of the two takes longer.
- Kernels: each binary that Triton makes for those launches, and each of r1._cuda where it was built; registers, spills,
  shared memory, matrix instructions, the copy engine's loads, and the bytes that a tile of a product fetches per FLOP.

Ends with 1 if a kernel spills, or wants more shared memory than a block may have.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from dataclasses import asdict
from pathlib import Path

from r1.bench import _measure
from r1.bench._ahead_of_time import HOPPER_SHARED_BYTES, Binary, Compiled, compiled, of_extension

FAMILIES = ("grpo", "moe", "fp8", "mla", "norm", "optim")
# H200 SXM, NVIDIA's data sheet: dense FLOP/s by the type of the operands, bytes/s.
RATES = {"fp8": 1979e12, "bfloat16": 989.5e12, "float32": 494.7e12}
BANDWIDTH = 4.8e12


def floor_seconds(family: str, launch: Compiled) -> float:
    """float32 products run in TF32, three of them for one where they are to be exact; here as one."""
    kind = "fp8" if family == "fp8" else "float32" if "float32" in launch.shape else "bfloat16"
    return max(launch.flops / RATES[kind], launch.bytes / BANDWIDTH)


def fault(binary: Binary) -> str | None:
    """What is wrong with it on any Hopper, if anything is."""
    if binary.spills or binary.stack_bytes:
        return f"spills ({binary.spills} local loads and stores, a stack of {binary.stack_bytes} bytes)"
    if binary.shared_bytes > HOPPER_SHARED_BYTES:
        return f"wants {binary.shared_bytes} bytes of shared memory, and there are {HOPPER_SHARED_BYTES}"
    return None


def fetched_per_flop(binary: Binary) -> float | None:
    """Bytes of both operands that a block asks the second-level cache for, for a FLOP of its product. Attention's are
    counted in docs/kernels/mla.md."""
    if not binary.matrix_instructions or "HEAD" in binary.constants:
        return None
    get = binary.constants.get
    rows = get("BLOCK_M") or get("BLOCK_T") or get("BLOCK") or get("rows")
    columns = get("BLOCK_N") or get("BLOCK_V") or get("BLOCK") or get("columns")
    if not rows or not columns:
        return None
    size = 1 if "QGMMA" in binary.matrix_instructions else 4 if get("PRECISION") == "tf32x3" else 2
    shared = 2 if binary.name == "gemm_kernel" else 1  # two blocks of a cluster fetch half of the rows for both
    return size * (rows / shared + columns) / (2 * rows * columns)


def _kernel_row(binary: Binary, label: str) -> list[str]:
    matrix = ", ".join(f"{count} {name}" for name, count in sorted(binary.matrix_instructions.items()))
    return [
        f"{label} {binary.name}", str(binary.registers), str(binary.spills), f"{binary.shared_bytes / 1024:.1f}",
        matrix, str(binary.bulk_copies or ""), f"{fetched:.4f}" if (fetched := fetched_per_flop(binary)) else "",
    ]  # fmt: skip


def _launch_row(family: str, launch: Compiled) -> list[str]:
    return [
        f"{family}: {launch.operator}", launch.shape, f"{launch.flops / 1e9:.0f}" if launch.flops else "",
        f"{launch.bytes / 1e6:.0f}", f"{launch.bytes / launch.flops:.4f}" if launch.flops else "",
        f"{floor_seconds(family, launch) * 1e6:.0f}",
    ]  # fmt: skip


def _distinct(rows: list[list[str]]) -> list[list[str]]:
    """Rows that say the same once, with how many there are: specialisations mostly differ in nothing shown."""
    seen: dict[tuple[str, ...], int] = {}
    for row in rows:
        seen[tuple(row)] = seen.get(tuple(row), 0) + 1
    return [[*row, str(count)] for row, count in seen.items()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; all if none is named")
    parser.add_argument("--out", type=Path, default=_measure.RESULTS)
    args = parser.parse_args(arguments)
    if unknown := set(args.families).difference(FAMILIES):
        parser.error(f"families names {min(unknown)!r}, wanted some of {', '.join(FAMILIES)}")
    try:
        importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        print("triton is not installed: there is nothing to compile")
        return 0
    records: list[_measure.Record] = []
    kernel_rows, launch_rows, faults = [], [], []

    def take(family: str, backend: str, binaries: list[Binary]) -> None:
        for binary in binaries:
            records.append({"task": "kernel", "family": family, "backend": backend, **asdict(binary)})
            records[-1]["fetched_bytes_per_flop"] = fetched_per_flop(binary)
            kernel_rows.append(_kernel_row(binary, f"{family} {backend}:"))
            if wrong := fault(binary):
                faults.append(f"{family} {backend} {binary.name} {binary.constants} {wrong}")

    for family in args.families or FAMILIES:
        binaries, launches = compiled(family)
        take(family, "triton", binaries)
        for launch in launches:
            floor = floor_seconds(family, launch)
            record = {"task": "launch", "family": family, **asdict(launch), "floor_seconds": floor}
            record["kernels"] = [binaries[i].name for i in launch.kernels]
            records.append(record)
            launch_rows.append(_launch_row(family, launch))
        if family == "fp8":
            try:
                take(family, "cuda", of_extension())
            except ImportError as error:
                print(f"r1._cuda was not built, its kernels are left out: {error}")
    columns = ["operator", "shape", "GFLOP", "MB", "bytes per FLOP", "H200 floor us"]
    _measure.show("launches at DeepSeek-V3's sizes", columns, launch_rows)
    columns = ["kernel", "registers", "spills", "shared KiB", "matrix instructions", "bulk copies", "bytes per FLOP"]
    columns += ["specialisations"]
    _measure.show("binaries for sm_90a", columns, _distinct(kernel_rows))
    print(_measure.save("static", "cpu", records, args.out, "sm90a"))
    for line in faults:
        print(line)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
