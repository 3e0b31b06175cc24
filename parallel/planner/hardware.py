"""Machines as `r1 plan` sees them: the figures of hardware.toml, typed."""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError

FILE = Path(__file__).with_name("hardware.toml")


class _Figures(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Device(_Figures):
    """One GPU and its share of a node; bytes, bytes a second one way, FLOP/s."""

    memory_bytes: PositiveFloat
    bf16_flops: PositiveFloat
    fp8_flops: PositiveFloat
    memory_bandwidth: PositiveFloat
    nvlink_bandwidth: PositiveFloat
    network_bandwidth: PositiveFloat
    gpus_per_node: PositiveInt
    host_memory_bytes: PositiveFloat
    pcie_bandwidth: PositiveFloat
    dollars_per_hour: PositiveFloat


class Kernels(_Figures):
    """Shares of a peak."""

    fp8_gemm: PositiveFloat
    fp8_grouped_gemm: PositiveFloat
    fp8_wgrad: PositiveFloat
    bf16_gemm: PositiveFloat
    bf16_grouped_gemm: PositiveFloat
    attention_forward: PositiveFloat
    attention_backward: PositiveFloat
    memory: PositiveFloat
    network: PositiveFloat
    traffic_per_kept_byte: PositiveFloat


class Run(_Figures):
    """What whole steps lose, and latencies in seconds."""

    step: PositiveFloat
    exchange_latency: PositiveFloat
    launch_latency: PositiveFloat
    draft_acceptance: PositiveFloat


class Allowance(_Figures):
    """Memory that no tensor shows."""

    fixed_bytes: PositiveFloat
    communication_bytes: PositiveFloat
    fragmentation: PositiveFloat


class Hardware(_Figures):
    devices: dict[str, Device]
    kernels: Kernels
    run: Run
    memory: Allowance

    def device(self, name: str) -> Device:
        """ValueError with the names that there are."""
        if name not in self.devices:
            near = difflib.get_close_matches(name, self.devices, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"device = {name!r}, wanted one of {', '.join(self.devices)}{hint}")
        return self.devices[name]


def load_hardware(file: str | Path = FILE) -> Hardware:
    """The figures of a file; ValueError where it cannot be read or a figure is missing or no positive number."""
    try:
        return Hardware.model_validate(tomllib.loads(Path(file).read_text(encoding="utf-8")))
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"hardware file {file}: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"hardware file {file}: {error}") from None
