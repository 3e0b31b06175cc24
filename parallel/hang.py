"""What a hung world can tell: the collectives that this process is inside of, and the report made of every process's.

torch's flight recorder knows each collective of NCCL and gloo (gloo's point-to-point calls it does not record). Its
counters are cheap to read and ask nothing of the GPU; its entries are read once there is a suspicion.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch._C import _distributed_c10d

# NCCL's groups stand in the first of these where torch has NCCL, and all other groups (gloo) in the second.
_TRACES = [
    getattr(_distributed_c10d, name)
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json")
    if hasattr(_distributed_c10d, name)
]
FRAMES_SHOWN = 6
COLLECTIVES_SHOWN = 3
RANKS_SHOWN = 8
SPANS_SHOWN = 16


def record_collectives() -> None:
    """Switch the recorder on; before the first process group is made."""
    if not {"TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"} & os.environ.keys():
        os.environ["TORCH_FR_BUFFER_SIZE"] = "2000"


def busy_groups() -> dict[str, tuple[str, str]]:
    """{group: (last collective that was started, last that ended)} of the groups where the two differ. Cheap."""
    result = {}
    for source, trace in enumerate(_TRACES):
        status = json.loads(trace(includeCollectives=False)).get("pg_status", {})
        for group, values in status.items():
            started, ended = values["last_enqueued_collective"], values["last_completed_collective"]
            if started != ended:
                result[f"{source}/{group}"] = (started, ended)
    return result


def pending_collectives() -> list[dict[str, Any]]:
    """The collectives that have started and not ended here, oldest first."""
    return sorted((_described(e) for e in _entries() if not _ended(e)), key=lambda c: c["since"])


def state_of_this_process() -> dict[str, Any]:
    """JSON for the report: where this process stands (its oldest pending collective, if any), the last number that it
    reached in each group, and the stack of its main thread, innermost call last."""
    pending = pending_collectives()
    reached: dict[str, int] = defaultdict(int)
    for entry in _entries():
        if not entry["is_p2p"]:
            name = entry["process_group"][0]
            reached[name] = max(reached[name], entry["collective_seq_id"])
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.extract_stack(frame)[-FRAMES_SHOWN:] if frame else []
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "stands": pending[0] if pending else None,
        "reached": reached,
        "stack": [f"{f.filename}:{f.lineno} in {f.name}" for f in stack],
    }


def _entries() -> Iterator[dict[str, Any]]:
    for trace in _TRACES:
        yield from json.loads(trace()).get("entries", [])


def _ended(entry: Mapping[str, Any]) -> bool:
    return entry["retired"] or entry.get("time_discovered_completed_ns", 0) > 0


def _described(entry: Mapping[str, Any]) -> dict[str, Any]:
    name, description = entry["process_group"]
    ranks: list[int] = []
    for group, known in list(dist.distributed_c10d._world.pg_names.items()):  # the main thread adds to it
        if known == name:
            ranks = dist.get_process_group_ranks(group)
    return {
        "group": name,
        "description": description.lower().replace("_", " ").removesuffix(" group") or name,
        "ranks": ranks,
        "kind": entry["profiling_name"],
        "sizes": entry["input_sizes"][:4],
        "point_to_point": entry["is_p2p"],
        "number": entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"],
        "since": entry["time_created_ns"] / 1e9,
    }


def report(states: Mapping[int, Mapping[str, Any]], silent: Mapping[int, str], limit: float) -> str:
    """The report of a hang, in lines; the first says the most.

    `states`: state_of_this_process of the ranks that answered. `silent`: what is known of each that did not.
    """
    places: dict[tuple[str, int, bool], dict[int, dict[str, Any]]] = defaultdict(dict)
    for rank, state in states.items():
        place = state["stands"]
        if place:
            places[place["group"], place["number"], place["point_to_point"]][rank] = place
    outside = {rank for rank, state in states.items() if not state["stands"]}
    missing = {key: _missing(key, ranks, states, silent) for key, ranks in places.items()}
    suspects = {rank for ranks in missing.values() for rank in ranks if rank in silent or rank in outside}
    if not places:
        suspects = set(silent)

    def weight(key: tuple[str, int, bool]) -> tuple[bool, float]:
        # First those that wait for a rank that itself waits for nobody: the others are its consequences.
        return not suspects.intersection(missing[key]), min(place["since"] for place in places[key].values())

    lines = []
    order = sorted(places, key=weight)
    for key in order[:COLLECTIVES_SHOWN]:
        lines += _about_collective(places[key], missing[key], suspects)
    if len(order) > COLLECTIVES_SHOWN:
        lines.append(f"and {len(order) - COLLECTIVES_SHOWN} other collectives that wait in turn")
    for rank in sorted(suspects)[:RANKS_SHOWN]:
        lines += _about_rank(rank, states, silent)
    if len(suspects) > RANKS_SHOWN:
        lines.append(f"and {len(suspects) - RANKS_SHOWN} more of the ranks {ranges(suspects)}")
    others = set(silent) - suspects
    if others:
        lines.append(f"no answer either from {ranges(others)}")
    if not suspects and not any(missing.values()):
        lines.append(
            "no rank is missing: the network or a device hangs (see dmesg for Xid, NCCL_DEBUG=INFO, r1 doctor)"
            if places
            else "no rank is inside a collective that torch records (gloo's point-to-point calls are not)"
        )
    if not lines[0].startswith("stuck"):
        lines.insert(0, "no progress")
    lines[0] += f"; the limit is parallel.timeout_seconds = {limit:g}"
    return "\n".join(lines)


def _missing(
    key: tuple[str, int, bool],
    waiting: Mapping[int, Mapping[str, Any]],
    states: Mapping[int, Mapping[str, Any]],
    silent: Mapping[int, str],
) -> list[int]:
    """The ranks of the group that have not come to this collective."""
    group, number, point_to_point = key
    members = next(iter(waiting.values()))["ranks"]
    result = []
    for rank in members:
        if rank in waiting:
            continue
        if rank in states and point_to_point:
            absent = not states[rank]["stands"]  # which peer it is, its kind says
        else:
            absent = rank in silent or states[rank]["reached"].get(group, 0) < number
        if absent:
            result.append(rank)
    return result


def _about_collective(
    waiting: Mapping[int, Mapping[str, Any]], missing: Sequence[int], suspects: set[int]
) -> list[str]:
    place = next(iter(waiting.values()))
    since = min(p["since"] for p in waiting.values())
    clock = time.strftime("%H:%M:%S", time.localtime(since))
    sizes = " ".join(str(size) for size in place["sizes"])
    line = (
        f"stuck in {place['kind']} number {place['number']} of the {place['description']} group (ranks"
        f" {ranges(place['ranks'])}; {sizes}) since {clock}, {time.time() - since:.0f} s: waiting there:"
        f" {ranges(waiting)}; not there: {ranges(missing) or 'none'}"
    )
    lines = [line]
    kinds: dict[str, set[int]] = defaultdict(set)
    for rank, p in waiting.items():
        # Only sums must have the same size everywhere.
        kinds[p["kind"] + (f" {p['sizes']}" if "reduce" in p["kind"] else "")].add(rank)
    if len(kinds) > 1 and not place["point_to_point"]:
        calls = "; ".join(f"{ranges(ranks)}: {kind}" for kind, ranks in kinds.items())
        lines.append(f"  the ranks do not call the same there: {calls}")
    elsewhere = [rank for rank in missing if rank not in suspects]
    if elsewhere:
        lines.append(f"  waiting in another collective: {ranges(elsewhere)}")
    return lines


def _about_rank(rank: int, states: Mapping[int, Mapping[str, Any]], silent: Mapping[int, str]) -> list[str]:
    if rank in silent:
        return [f"rank {rank} {silent[rank]}"]
    state = states[rank]
    where = f"rank {rank} (host {state['host']}, process {state['pid']}) is alive and in no collective; it is in"
    return [where, *(f"    {line}" for line in state["stack"])]


def ranges(ranks: Sequence[int] | set[int] | Mapping[int, Any]) -> str:
    """'0-3, 7' for the ranks 0, 1, 2, 3 and 7."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans[:SPANS_SHOWN])
    return text if len(spans) <= SPANS_SHOWN else f"{text}, … ({len(ranks)} in all)"
