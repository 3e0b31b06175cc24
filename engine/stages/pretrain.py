"""Pretraining: a base model from documents with worked solutions, a good part of them wrong, in two languages.

It stands in for DeepSeek-V3-Base: it solves some problems, guesses often, and mixes languages in one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from r1.engine.data.documents import Document, pretraining_documents
from r1.engine.data.tokenizer import Tokenizer, train_tokenizer
from r1.engine.engine import Sample
from r1.engine.evaluation import evaluate
from r1.engine.logs import is_main_process
from r1.engine.prompts import Deck, encode_example, everyday_prompts, reasoning_prompts
from r1.engine.settings import Config
from r1.engine.stage import StageRun, load_tokenizer, seed_of
from r1.engine.supervised import train


def run(config: Config) -> None:
    stage = StageRun(config, "pretrain")
    if stage.complete:
        return
    documents = corpus(config, stage.settings.documents)
    tokenizer = make_tokenizer(config, documents)
    engine, state = stage.start(stage.settings.from_, tokenizer=tokenizer)
    samples = [encode_example(tokenizer, d.prompt, d.completion) for d in documents]
    steps = plan(samples, stage.settings.steps, stage.settings.tokens_per_step)
    train(stage, engine, int(state["step"]), len(steps), lambda step: [samples[i] for i in steps[step]])
    evaluate(stage, engine, tokenizer)
    engine.close()
    stage.finish("checkpoint", "evaluation.json")


def corpus(config: Config, count: int) -> list[Document]:
    """`count` documents about the training prompts (each may be met several times) and everyday questions."""
    reasoning, general = reasoning_prompts(config), everyday_prompts(config)
    deck = Deck(len(reasoning), seed_of(config, "pretrain", "prompts"))
    prompts = [reasoning[i] for i in deck.deal(0, max(1, count - len(general)))]
    mixed = prompts + general
    order = Deck(len(mixed), seed_of(config, "pretrain", "mix")).deal(0, len(mixed))
    return pretraining_documents([mixed[i] for i in order], seed_of(config, "documents"))


def make_tokenizer(config: Config, documents: Sequence[Document]) -> Tokenizer:
    """The configured tokenizer, else one trained on the documents, kept in the run's folder. Training it is
    deterministic, so every process does so: there is no process group to wait for each other in yet."""
    path = Path(config.run_dir) / "tokenizer.json"
    if config.tokenizer.path is not None or path.exists():
        return load_tokenizer(config)
    texts = [d.prompt.text + d.completion for d in documents[:: max(1, len(documents) // 4000)]]
    tokenizer = train_tokenizer(texts, config.tokenizer.vocab_size)
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        tokenizer.save(partial)
        partial.replace(path)
    return tokenizer


def plan(samples: Sequence[Sample], steps: int, tokens_per_step: int) -> list[list[int]]:
    """Which documents each step reads, in the corpus's order (it is a curriculum), until the steps or documents end."""
    result: list[list[int]] = []
    current: list[int] = []
    tokens = 0
    for index, sample in enumerate(samples):
        if current and tokens + len(sample.tokens) > tokens_per_step:
            result.append(current)
            current, tokens = [], 0
            if len(result) == steps:
                return result
        current.append(index)
        tokens += len(sample.tokens)
    return [*result, current]
