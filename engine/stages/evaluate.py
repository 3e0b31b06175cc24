"""Evaluation of any checkpoint on the held-out prompts: pass@1 as the mean over k completions, and cons@k."""

from __future__ import annotations

from r1.engine import evaluation
from r1.engine.logs import say
from r1.engine.settings import Config
from r1.engine.stage import StageRun, load_tokenizer, open_engine


def run(config: Config) -> None:
    stage = StageRun(config, "evaluate")
    stage.log.truncate_after(-1)  # of an earlier evaluation
    tokenizer = load_tokenizer(config)
    engine = open_engine(config, stage.settings.from_, tokenizer)
    result = evaluation.evaluate(stage, engine, tokenizer)
    engine.close()
    say(f"evaluate: pass@1 {result['pass@1']:.3f}, cons@{result['k']} {result['cons@k']:.3f}")
    stage.finish("evaluation.json")
