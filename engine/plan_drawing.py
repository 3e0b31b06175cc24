"""The picture of a plan: memory of each pipeline stage by role, and the pipeline's schedule."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from r1.parallel.planner.plan import ROLES, Plan, Workload
from r1.parallel.planner.schedule import Slot, schedule

SHOWN = 12  # micro-batches of the schedule


def draw(plan: Plan, work: Workload, file: Path) -> None:
    """Writes a PNG."""
    figure, axes = plt.subplots(2, 1, figsize=(12, 9), height_ratios=(3, 2), layout="constrained")
    _memory(axes[0], plan)
    _schedule(axes[1], plan, work)
    figure.suptitle(f"{plan.stage} on {plan.gpus} {plan.device}: predictions. {plan.verdict}")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _memory(axes: plt.Axes, plan: Plan) -> None:
    phases = [(name, rows) for name, rows in (("training", plan.training), ("rollout", plan.rollout)) if rows]
    width = 0.8 / max(1, len(phases))
    colours = dict(zip(ROLES, plt.get_cmap("tab20").colors))  # type: ignore[attr-defined]
    labelled: set[str] = set()
    for number, (_, rows) in enumerate(phases):
        places = [rank - 0.4 + width * (number + 0.5) for rank in range(len(rows))]
        bottom = [0.0] * len(rows)
        for role in ROLES:
            heights = [row.get(role, 0.0) / 1e9 for row in rows]
            if not any(heights):
                continue
            label = role if role not in labelled else None
            labelled.add(role)
            axes.bar(places, heights, width * 0.95, bottom=bottom, color=colours[role], label=label)
            bottom = [a + b for a, b in zip(bottom, heights)]
    axes.axhline(plan.device_bytes / 1e9, color="black", linestyle="--", label="memory of one GPU")
    axes.set_xticks(range(len(phases[0][1])))
    axes.set_xlabel("pipeline stage" + (" (left: training, right: rollout)" if len(phases) == 2 else ""))
    axes.set_ylabel("GB on one GPU")
    axes.legend(ncols=2, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _schedule(axes: plt.Axes, plan: Plan, work: Workload) -> None:
    if not work.trains:
        axes.set_axis_off()
        return
    p = work.parallel
    count = min(plan.micro_batches, max(SHOWN, 2 * p.pipeline))
    if p.virtual_pipeline > 1:
        count = max(p.pipeline, count // p.pipeline * p.pipeline)
    slots = schedule(p.pipeline, p.virtual_pipeline, count)
    for rank, row in enumerate(slots):
        for slot in row:
            axes.barh(
                rank,
                slot.length,
                left=slot.start,
                height=0.9,
                color=_colour(slot, p.virtual_pipeline),
                edgecolor="white",
                linewidth=0.4,
            )
    axes.invert_yaxis()
    axes.set_yticks(range(p.pipeline))
    axes.set_ylabel("pipeline stage")
    axes.set_xlabel(
        f"time, in forwards of a chunk: forward blue, backward orange, darker for later chunks ({count} of"
        f" {plan.micro_batches} micro-batches)"
    )


def _colour(slot: Slot, chunks: int) -> tuple[float, float, float, float]:
    shades = plt.get_cmap("Blues" if slot.forward else "Oranges")
    return shades(0.4 + 0.5 * slot.chunk / max(1, chunks - 1) if chunks > 1 else 0.6)
