"""The doctor's checks that need all ranks of a torchrun world: clocks, file system, network, slow ranks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from r1.engine.doctor import Finding, does_not_apply
from r1.engine.settings import Config
from r1.parallel.planner.hardware import load_hardware

if TYPE_CHECKING:
    import torch

NAMES = (
    "clocks of the hosts",
    "shared run folder",
    "slow ranks",
    "all-reduce in a host",
    "all-reduce across hosts",
    "all-reduce of all",
    "all-to-all of all",
    "pipeline neighbours",
)
MIB = 1 << 20
LARGEST_CLOCK_SPREAD = 0.5  # seconds; beyond it logs of several hosts cannot be laid side by side
SLOW = 1.3  # times the median
POOR = 0.6  # of the figure in parallel/planner/hardware.toml


def measure(config: Config, mine: Sequence[Finding]) -> tuple[list[list[Finding]], list[Finding]]:
    """(the machine checks of every rank, the findings about the world). Collective."""
    import torch

    from r1.parallel import fabric
    from r1.parallel.config import ParallelConfig
    from r1.parallel.world import join

    world = join(ParallelConfig(timeout_seconds=config.parallel.timeout_seconds))
    of_all = fabric.gather(list(mine))
    hosts, across = fabric.parts_of_hosts()
    nbytes = (512 if world.device.type == "cuda" else 4) * MIB
    nvlink, network = _expected(world.device)
    in_host = fabric.subgroups(hosts)
    between = fabric.subgroups(across)
    rows = []
    rows.append(_clocks(fabric.clock_spread(), len(hosts)))
    rows.append(_shared(fabric.blind_ranks(Path(config.run_dir)), len(hosts), config.run_dir))
    size = 8192 if world.device.type == "cuda" else 512
    rows.append(_slow_ranks(fabric.gather(fabric.gemm_seconds(world.device, size))))
    for name, group, expected, why in (
        ("all-reduce in a host", in_host, nvlink, "one rank a host"),
        ("all-reduce across hosts", between, network, "one host"),
        ("all-reduce of all", torch.distributed.group.WORLD, network if len(hosts) > 1 else nvlink, ""),
    ):
        # Hosts of different sizes: a rank without a partner sits out, and says so.
        mine_found = fabric.all_reduce(group, world.device, nbytes) if group is not None else None
        found = {rank: answer for rank, answer in enumerate(fabric.gather(mine_found)) if answer}
        rows.append(_rate(name, found, expected) if found else does_not_apply(name, why))
    answers = fabric.gather(fabric.all_to_all(world.device, nbytes))
    rows.append(_rate("all-to-all of all", dict(enumerate(answers)), None))
    stages = config.parallel.pipeline
    if stages > 1 and world.size % stages == 0:
        answers = fabric.gather(fabric.to_neighbour(world.size // stages, world.device, nbytes))
        rows.append(_rate("pipeline neighbours", dict(enumerate(answers)), None))
    else:
        why = f"parallel.pipeline = {stages}" + (f", which does not divide {world.size} ranks" if stages > 1 else "")
        rows.append(does_not_apply("pipeline neighbours", why))
    return of_all, rows


def _expected(device: torch.device) -> tuple[float | None, float | None]:
    """Bytes a second over NVLink and over the network of this kind of GPU, where hardware.toml knows it."""
    import torch

    if device.type != "cuda":
        return None, None
    name = torch.cuda.get_device_name(device).lower()
    for known, figures in load_hardware().devices.items():
        if known in name:
            return figures.nvlink_bandwidth, figures.network_bandwidth
    return None, None


def _clocks(spread: float, hosts: int) -> Finding:
    if hosts == 1:
        return does_not_apply(NAMES[0], "one host")
    good = spread <= LARGEST_CLOCK_SPREAD
    advice = "" if good else "run chrony or ntpd on all hosts: times of logs and reports cannot be compared"
    return Finding(NAMES[0], f"at most {spread * 1e3:.0f} ms apart", "ok" if good else "warn", advice)


def _shared(blind: list[int], hosts: int, folder: str) -> Finding:
    from r1.parallel.hang import ranges

    if blind:
        advice = "run_dir must lie on a file system that all hosts mount: checkpoints are written by all ranks together"
        return Finding(NAMES[1], f"{folder}: ranks {ranges(blind)} do not see rank 0's file", "fail", advice)
    return Finding(NAMES[1], f"{folder}: all ranks see it" + (", on one host" if hosts == 1 else f" on {hosts} hosts"))


def _slow_ranks(seconds: Sequence[float]) -> Finding:
    median = statistics.median(seconds)
    slow = {rank: value for rank, value in enumerate(seconds) if value > SLOW * median}
    text = f"a product takes {median * 1e3:.3g} ms (median)"
    if not slow:
        return Finding(NAMES[2], f"{text}, no rank more than {SLOW:g} times that")
    worst = sorted(slow, key=lambda rank: -slow[rank])[:8]
    named = ", ".join(f"rank {rank} {slow[rank] * 1e3:.3g} ms" for rank in worst)
    advice = "one slow rank slows all: look at its clocks, temperature, ECC errors and other processes, or leave it out"
    return Finding(NAMES[2], f"{text}; {named}", "warn", advice)


def _rate(name: str, found: dict[int, tuple[bool, float]], expected: float | None) -> Finding:
    """The verdict on {rank: (right, bytes a second)}."""
    from r1.parallel.hang import ranges

    wrong = [rank for rank, (right, _) in found.items() if not right]
    if wrong:
        advice = "do not train: look at these ranks' GPUs (ECC, dcgmi diag -r 3) and links"
        return Finding(name, f"wrong numbers on ranks {ranges(wrong)}", "fail", advice)
    slowest = min(found, key=lambda rank: found[rank][1])
    rate = found[slowest][1]
    text = f"right; {rate / 1e9:.3g} GB/s on the slowest rank, {slowest}"
    if expected is None:
        return Finding(name, text)
    text += f", {expected / 1e9:.3g} expected at best"
    if rate >= POOR * expected:
        return Finding(name, text)
    advice = "see docs/clusters.md: NCCL_DEBUG=INFO must show NVLS or P2P within a host and NET/IB with GDRDMA between"
    return Finding(name, text, "warn", advice)
