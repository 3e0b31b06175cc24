"""SFT: the base model learns the rejection-sampled set, with the loss on completions only: Dev3."""

from __future__ import annotations

from pathlib import Path

from r1.engine.errors import UserError
from r1.engine.evaluation import evaluate
from r1.engine.prompts import Example, encode_example, load_examples
from r1.engine.settings import STAGES, Config
from r1.engine.stage import StageRun, load_tokenizer
from r1.engine.supervised import fit


def run(config: Config) -> None:
    stage = StageRun(config, "sft")
    if stage.complete:
        return
    tokenizer = load_tokenizer(config)
    examples = examples_of(config, stage.settings.data)
    engine, state = stage.start(stage.settings.from_, tokenizer=tokenizer)
    samples = [encode_example(tokenizer, e.prompt, e.completion) for e in examples]
    fit(stage, engine, int(state["step"]), samples)
    evaluate(stage, engine, tokenizer)
    engine.close()
    stage.finish("checkpoint", "evaluation.json")


def examples_of(config: Config, source: str) -> list[Example]:
    """The examples that a stage wrote, or those of a JSONL file."""
    path = config.stage_dir(source) / "data.jsonl" if source in STAGES else Path(source)
    if source in STAGES and not path.exists():
        raise UserError(f"there is no data at {path}; run `r1 run {source}` first")
    return load_examples(path)
