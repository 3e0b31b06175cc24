"""The supervised loop that pretraining, cold start, SFT and distillation share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from r1.engine.engine import Engine, Sample
from r1.engine.errors import UserError
from r1.engine.logs import StageProgress, say
from r1.engine.prompts import Deck
from r1.engine.stage import StageRun, seed_of


def train(run: StageRun, engine: Engine, start: int, steps: int, batch: Callable[[int], Sequence[Sample]]) -> None:
    """Optimiser steps `start` to `steps`, step s on the samples `batch(s)`; saves on the way and at the end."""
    with StageProgress(run.title, steps, start) as progress:
        for step in range(start, steps):
            settings = run.settings.at_step(step)
            lr = settings.optimizer.lr_at(step, steps)
            began = run.timer.seconds
            with run.timer.phase("train"):
                metrics = engine.sft_step(batch(step), lr=lr, tokens_per_micro_batch=settings.tokens_per_micro_batch)
            seconds = max(run.timer.seconds - began, 1e-9)
            metrics = {**metrics, "lr": lr, "tokens_per_second": metrics["tokens"] / seconds}
            run.record(step, metrics)
            progress.update(step + 1, {"loss": metrics["loss"], "lr": lr})
            run.save(engine, step + 1)
    run.save(engine, steps, force=True)


def fit(run: StageRun, engine: Engine, start: int, samples: Sequence[Sample], steps: int = 0) -> int:
    """Passes over `samples` (as many as the stage's epochs, or `steps`), sequences_per_step a step; the steps done."""
    settings = run.settings
    short = [s for s in samples if len(s.tokens) <= settings.max_tokens]
    if len(short) < len(samples):
        say(f"{run.title}: {len(samples) - len(short)} samples longer than {settings.max_tokens} tokens are left out")
    if not short:
        raise UserError(f"{run.title} has no sample to train on")
    size = min(settings.sequences_per_step, len(short))
    steps = steps or max(1, len(short) * settings.epochs // size)
    deck = Deck(len(short), seed_of(run.config, run.title, "order"))
    train(run, engine, start, steps, lambda step: [short[i] for i in deck.deal(step * size, size)])
    return steps
