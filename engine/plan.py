"""`r1 plan`: what a stage of a configuration will need and cost on a cluster, before anybody pays for it."""

from __future__ import annotations

import itertools
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.progress import track
from rich.table import Table

from r1.engine.config import with_settings
from r1.engine.errors import UserError
from r1.engine.settings import Config, EvaluateStage, GrpoStage, RejectionSamplingStage, RewardModelStage, SftStage
from r1.parallel.config import ModelConfig
from r1.parallel.planner.hardware import FILE, Hardware, load_hardware
from r1.parallel.planner.plan import ROLES, Plan, Sampled, Workload, check_length, make_plan, search
from r1.parallel.trainer import AdamConfig

RL_REWARD_MODEL = "reward_model"
SHORT = {  # so that all of a rank's memory stands in one line of a terminal
    "parameters": "param", "gradients": "grad", "optimizer": "adam", "FP8 copies": "FP8", "activations": "activ",
    "working": "work", "logits and loss": "loss", "reference": "ref", "reward model": "RM", "KV cache": "KV",
    "communication": "comm", "fragmentation": "frag", "quantized": "FP8", "logits": "loss", "backward": "back",
}  # fmt: skip


def plan(
    config: Config,
    *,
    stage: str | None = None,
    gpus: int | None = None,
    device: str | None = None,
    sequence_length: int | None = None,
    hardware: str | Path | None = None,
    out: str | Path | None = None,
    look: bool = False,
    dry_run: bool = False,
) -> Plan:
    """Prints the plan of a stage, and with `out` writes plan.json and plan.png there; `look` searches for a faster
    layout, and `dry_run` walks one rank of every pipeline stage through a step. Raises UserError where the stage cannot
    run there at all, or the dry run cannot have its layout."""
    stage, gpus, device = stage or config.plan.stage, gpus or config.plan.gpus, device or config.plan.device
    console = Console()
    try:
        figures = load_hardware(hardware or FILE)
        work = workload(config, stage, sequence_length)
        result = make_plan(work, gpus, device, figures)
        if not result.fits:
            result.advice = advice(config, stage, gpus, device, figures, sequence_length)
        _print(result, console)
        document: dict[str, Any] = {"plan": result.as_json()}
        if look:
            found = search(
                work, gpus, device, figures, lambda x: track(x, "searching", console=console, transient=True)
            )
            _print_search(found, result, console)
            document["search"] = [plan.as_json() for _, plan in found]
        if dry_run:
            document["dry_run"] = dry_runs(work, gpus, console)
        if out is not None:
            _write(document, result, work, Path(out), console)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from None
    return result


def advice(
    config: Config, stage: str, gpus: int, device: str, figures: Hardware, sequence_length: int | None = None
) -> list[str]:
    """Settings with which the stage would fit: single ones, else pairs, else three; the fastest few, as --set takes
    them."""
    p, at = config.parallel, f"stages.{stage}"
    changes = [
        ["parallel.recompute=selective"],
        ["parallel.recompute=full"],
        [f"{at}.optimizer.moments=bfloat16"],
        [f"{at}.optimizer.offload=true"],
        [f"parallel.tensor={2 * p.tensor}"],
        [f"parallel.context={2 * p.context}"],
        [f"parallel.pipeline={2 * p.pipeline}", 'parallel.pipeline_layout=""'],
        [f"parallel.expert={2 * p.expert}"],
    ]
    tokens = getattr(getattr(config.stages, stage), "tokens_per_micro_batch", 1)
    if tokens > 1 and sequence_length is None:
        changes.append([f"{at}.tokens_per_micro_batch={tokens // 2}"])
    plain = workload(config, stage, sequence_length)
    for many in (1, 2, 3):
        found = []
        for chosen in itertools.combinations(changes, many):
            settings = [setting for change in chosen for setting in change]
            try:
                work = workload(with_settings(config, settings), stage, sequence_length)
                plan = make_plan(work, gpus, device, figures)
            except (ValueError, UserError):
                continue
            if plan.fits and work != plain:
                text = " ".join(f"--set {setting}" for setting in settings)
                found.append((plan.step_seconds, f"would fit, {plan.worst / 1e9:.1f} GB: {text}"))
        if found:
            return [text for _, text in sorted(found)[:3]]
    return ["no small change of the settings fits: more GPUs, or --search"]


def _write(document: dict[str, Any], plan: Plan, work: Workload, folder: Path, console: Console) -> None:
    from r1.engine.plan_drawing import draw

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draw(plan, work, folder / "plan.png")
    console.print(f"written: {folder / 'plan.json'}, {folder / 'plan.png'}")


# ------------------------------------------------------------------------------------------------------ what a stage is


def workload(config: Config, stage: str, sequence_length: int | None = None) -> Workload:
    """The stage's training step and rollout, counted; ValueError for a stage without either."""
    settings = getattr(config.stages, stage, None)
    if settings is None:
        raise ValueError(f"stage = {stage!r}, wanted one of {', '.join(type(config.stages).model_fields)}")
    model: ModelConfig = (config.student or config.model) if stage == "distill" else config.model
    check_length(model, sequence_length or 0)
    if sequence_length and sequence_length <= config.plan.prompt_tokens:
        raise ValueError(
            f"sequence length {sequence_length} leaves nothing beside a prompt of plan.prompt_tokens ="
            f" {config.plan.prompt_tokens}"
        )
    parallel = config.parallel
    if not model.is_moe:
        parallel = parallel.model_copy(update={"expert": 1, "expert_tensor": 1, "overlap_expert_exchange": False})
    optimizer = settings.optimizer
    adam = AdamConfig(
        beta1=optimizer.betas[0], beta2=optimizer.betas[1], moments=optimizer.moments, offload=optimizer.offload
    )
    mean = config.plan.prompt_tokens + config.plan.completion_tokens
    common: dict[str, Any] = {"name": stage, "model": model, "parallel": parallel, "adam": adam}
    if isinstance(settings, GrpoStage):
        longest = sequence_length or settings.max_completion_tokens
        samples = settings.prompts_per_step * settings.completions_per_prompt
        length = min(longest, mean)
        return Workload(
            **common,
            tokens_per_step=samples * length,
            tokens_per_micro_batch=max(settings.tokens_per_micro_batch, longest),
            sequence_length=length,
            steps=settings.steps,
            reference=settings.kl_coefficient > 0,
            reward_model=any(reward.name == RL_REWARD_MODEL for reward in settings.rewards),
            sampled=Sampled(
                completions=samples,
                prompt_tokens=config.plan.prompt_tokens,
                mean_tokens=length - config.plan.prompt_tokens,
                longest_tokens=min(longest, settings.max_tokens_per_rollout or longest),
                steps_per_rollout=settings.minibatches_per_rollout,
                max_sequences=config.rollout.max_sequences,
                cache_tokens=config.rollout.cache_tokens,
                speculate=config.rollout.speculate and model.num_mtp_layers > 0,
            ),
        )
    if isinstance(settings, RewardModelStage):
        length = min(sequence_length or settings.max_tokens, mean)
        return Workload(
            **common,
            tokens_per_step=2 * settings.pairs_per_step * length,
            # A chosen and a rejected text are one unit.
            tokens_per_micro_batch=max(settings.tokens_per_micro_batch, 2 * (sequence_length or settings.max_tokens)),
            sequence_length=length,
            steps=math.ceil(
                settings.epochs * (settings.pairs + settings.safety_examples / 2) / settings.pairs_per_step
            ),
            value_head=True,
        )
    if isinstance(settings, SftStage):
        longest = sequence_length or settings.max_tokens
        length = min(longest, mean)
        samples = getattr(settings, "max_samples", 0) or config.plan.sft_samples
        return Workload(
            **common,
            tokens_per_step=settings.sequences_per_step * length,
            tokens_per_micro_batch=max(settings.tokens_per_micro_batch, longest),
            sequence_length=length,
            steps=math.ceil(settings.epochs * samples / settings.sequences_per_step),
            uses_mtp=bool(model.num_mtp_layers),
        )
    if isinstance(settings, (RejectionSamplingStage, EvaluateStage)):
        longest = sequence_length or settings.max_completion_tokens
        prompts = settings.prompts if isinstance(settings, RejectionSamplingStage) else config.data.eval_prompts
        samples = prompts * settings.completions_per_prompt
        length = min(longest, mean)
        return Workload(
            **common,
            tokens_per_step=samples * length,
            tokens_per_micro_batch=parallel.token_multiple * 2 * parallel.context,
            sequence_length=length,
            steps=1,
            trains=False,
            sampled=Sampled(
                completions=samples,
                prompt_tokens=config.plan.prompt_tokens,
                mean_tokens=length - config.plan.prompt_tokens,
                longest_tokens=longest,
                steps_per_rollout=1,
                max_sequences=config.rollout.max_sequences,
                cache_tokens=config.rollout.cache_tokens,
                speculate=config.rollout.speculate and model.num_mtp_layers > 0,
            ),
        )
    longest = sequence_length or min(settings.tokens_per_micro_batch, model.max_positions)
    return Workload(
        **common,
        tokens_per_step=settings.tokens_per_step,
        tokens_per_micro_batch=max(settings.tokens_per_micro_batch, longest),
        sequence_length=longest,
        steps=settings.steps,
        uses_mtp=bool(model.num_mtp_layers),
    )


# ---------------------------------------------------------------------------------------------------------- dry runs


def dry_runs(work: Workload, gpus: int, console: Console) -> list[dict[str, Any]]:
    """One rank of every pipeline stage through a step, in two processes; prints and returns what they counted."""
    if not work.trains:
        raise ValueError(f"{work.name} only samples: a dry run is of a training step")
    ranks = [stage * gpus // work.parallel.pipeline for stage in range(work.parallel.pipeline)]
    context = get_context("spawn")
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    with mock.patch.dict(os.environ, quiet), ProcessPoolExecutor(min(2, len(ranks)), mp_context=context) as pool:
        jobs = [pool.submit(run_rank, work, gpus, rank) for rank in ranks]
        results = [job.result() for job in track(jobs, "dry run", console=console, transient=True)]
    table = _narrow("Dry run: one rank of each pipeline stage, counted from its tensors (GB)")
    kinds = [SHORT.get(kind, kind) for kind in results[0]["peak"]]
    for column in ("stage", "count", *kinds, "peak", "micro", "PFLOP", "calls"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in results:
        peak = sum(r["peak"].values())
        table.add_row(
            str(r["pipeline_rank"]), f"{r['parameters'] / 1e9:.2f}", *(f"{v / 1e9:.2f}" for v in r["peak"].values()),
            f"{peak / 1e9:.2f}", str(r["micro_batches"]), f"{r['flops'] / 1e15:.2f}",
            str(sum(c["calls"] for c in r["collectives"])),
        )  # fmt: skip
    console.print(table)
    console.print("count: billions of parameters; micro: micro-batches that ran; calls: of collectives")
    return results


def run_rank(work: Workload, gpus: int, rank: int) -> dict[str, Any]:
    """As many micro-batches as fill the pipeline up to this rank: more change nothing but the counts of calls."""
    from r1.parallel.dry_run import dry_run

    p = work.parallel
    stage = rank // (gpus // p.pipeline)
    planned = work.step(gpus).micro_batches
    wanted = p.pipeline - stage + 1
    if p.virtual_pipeline > 1:
        first = 2 * (p.pipeline - stage - 1) + (p.virtual_pipeline - 1) * p.pipeline + 1
        wanted = -(-first // (p.virtual_pipeline * p.pipeline)) * p.pipeline
    return dry_run(
        work.model,
        p,
        rank=rank,
        world_size=gpus,
        adam=work.adam,
        kind="preference" if work.value_head else "policy" if work.sampled else "supervised",
        sequence_length=work.sequence_length,
        tokens_per_micro_batch=work.tokens_per_micro_batch,
        micro_batches=min(planned, wanted),
    ).as_json()


# ---------------------------------------------------------------------------------------------------------- printing


def _print(plan: Plan, console: Console) -> None:
    p = plan.layout
    console.print(
        f"[bold]{plan.stage} on {plan.gpus} {plan.device}[/bold] (every number is a prediction): tensor {p['tensor']},"
        f" pipeline {p['pipeline']} x {p['virtual_pipeline']}, context {p['context']}, expert {p['expert']}, data"
        f" {p['data']}, recompute {p['recompute']}, FP8 {p['fp8']}"
        + (f"; {plan.micro_batches} micro-batches a step" if plan.training else "")
    )
    for title, rows in (("training", plan.training), ("rollout", plan.rollout)):
        roles = [role for role in ROLES if any(row.get(role) for row in rows)]
        if not rows:
            continue
        table = _narrow(f"Memory of one GPU of each pipeline stage while {title} (GB)")
        for column in ("stage", *(SHORT.get(role, role) for role in roles), "total"):
            table.add_column(column, justify="right", no_wrap=True)
        for rank, row in enumerate(rows):
            table.add_row(
                str(rank), *(f"{row.get(role, 0) / 1e9:.1f}" for role in roles), f"{sum(row.values()) / 1e9:.1f}"
            )
        console.print(table)
    if plan.host_bytes_per_node:
        console.print(f"host memory: {plan.host_bytes_per_node / 1e9:.0f} GB a node")
    table = Table(title="Time of one step (s)")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    for part, seconds in (*((k, v) for k, v in plan.seconds.items() if v >= 0.0005), ("step", plan.step_seconds)):
        table.add_row(part, f"{seconds:.3f}")
    console.print(table)
    console.print(
        f"{plan.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, {plan.tflops_per_gpu:.0f} TFLOP/s/GPU, MFU"
        f" {plan.model_flops_utilization:.1%} of bf16's peak; {plan.steps:,} steps: {plan.gpu_hours:,.0f} GPU-hours,"
        f" {plan.dollars:,.0f} dollars"
    )
    console.print(f"[bold]{plan.verdict}[/bold]")
    for text in plan.advice:
        console.print(f"  {text}")


def _narrow(title: str) -> Table:
    """A table whose many columns stand in 80 characters."""
    return Table(title=title, box=None, padding=(0, 0, 0, 1), pad_edge=False)


def _print_search(found: list[tuple[Workload, Plan]], given: Plan, console: Console) -> None:
    if not found:
        console.print("no layout of this model fits on these GPUs")
        return
    table = Table(title="The fastest layouts that fit (predictions)")
    for column in ("tensor", "pipeline", "virtual", "context", "expert", "recompute", "GB", "s/step", "tokens/s/GPU"):
        table.add_column(column, justify="right")
    for work, plan in found:
        p = work.parallel
        table.add_row(
            *map(str, (p.tensor, p.pipeline, p.virtual_pipeline, p.context, p.expert, p.recompute)),
            f"{plan.worst / 1e9:.1f}", f"{plan.step_seconds:.2f}", f"{plan.tokens_per_second_per_gpu:,.0f}",
        )  # fmt: skip
    console.print(table)
    console.print(f"the given layout: {given.step_seconds:.2f} s a step, {given.worst / 1e9:.1f} GB")
