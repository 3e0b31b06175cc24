"""Distillation: a small dense student learns the teacher's samples by SFT, no RL. To show what the samples are worth,
the same student also learns, for as many steps, the original documents about the same prompts."""

from __future__ import annotations

from collections.abc import Sequence

from r1.engine.data.documents import original_documents
from r1.engine.data.tokenizer import Tokenizer
from r1.engine.evaluation import evaluate
from r1.engine.prompts import Example, encode_example
from r1.engine.settings import Config
from r1.engine.stage import StageRun, load_tokenizer, seed_of
from r1.engine.stages.sft import examples_of
from r1.engine.supervised import fit


def run(config: Config) -> None:
    stage = StageRun(config, "distill")
    if stage.complete:
        return
    tokenizer = load_tokenizer(config)
    examples = examples_of(config, stage.settings.data)
    steps = teach(stage, examples, tokenizer)
    if stage.settings.compare_undistilled:
        prompts = [e.prompt for e in examples]
        raw = original_documents(prompts, seed_of(config, "distill", "original"))
        other = StageRun(config, "distill", "undistilled")
        teach(other, [Example(d.prompt, d.completion) for d in raw], tokenizer, steps)
        other.finish("checkpoint", "evaluation.json")
    stage.finish("checkpoint", "evaluation.json")


def teach(stage: StageRun, examples: Sequence[Example], tokenizer: Tokenizer, steps: int = 0) -> int:
    """Train and measure one student; the optimiser steps it took."""
    config = stage.config
    engine, state = stage.start(stage.settings.from_, model=config.student or config.model, tokenizer=tokenizer)
    samples = [encode_example(tokenizer, e.prompt, e.completion) for e in examples]
    steps = fit(stage, engine, int(state["step"]), samples, steps)
    evaluate(stage, engine, tokenizer)
    engine.close()
    return steps
