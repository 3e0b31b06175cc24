"""The prompts of a run, the order in which a stage meets them, and texts as tokens."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from r1.engine.data.tasks import (
    Prompt,
    general_prompts,
    load_prompts,
    make_prompts,
    prompt_from_json,
    prompt_tokens,
    read_jsonl,
)
from r1.engine.data.tokenizer import Tokenizer
from r1.engine.engine import Sample
from r1.engine.errors import UserError
from r1.engine.settings import Config, DataConfig

SAFETY_SHARE = 0.25  # of general prompts: wishes that must be refused


def reasoning_prompts(config: Config, split: str = "train") -> list[Prompt]:
    """Prompts with a checkable answer. No held-out prompt ("eval") is among those to train on ("train")."""
    if split == "eval":
        return list(_reasoning(config.data, config.seed, "eval"))
    held_out = {prompt.text for prompt in _reasoning(config.data, config.seed, "eval")}
    prompts = [p for p in _reasoning(config.data, config.seed, "train") if p.text not in held_out]
    if not prompts:
        raise UserError("there is no prompt to train on that is not held out for evaluation")
    return prompts


def everyday_prompts(config: Config, split: str = "train", count: int | None = None, kind: str = "") -> list[Prompt]:
    """General and safety prompts ("" is both): of the prompts file where it has any, else generated."""
    data = config.data
    file = data.prompts_file if split == "train" else data.eval_prompts_file
    if file is not None:
        prompts = [p for p in _file(file) if p.kind != "reasoning" and (not kind or p.kind == kind)]
        return prompts[:count]
    if count is None:
        count = data.general_train_prompts if split == "train" else data.general_eval_prompts
    safety = count if kind == "safety" else 0 if kind == "general" else round(count * SAFETY_SHARE)
    try:
        prompts = general_prompts(count - safety, config.seed, split)
        return prompts + general_prompts(safety, config.seed, split, "safety")
    except ValueError as error:
        raise UserError(f"{count} general prompts ({split}) are wanted: {error}") from None


def answerable(prompts: list[Prompt], what: str) -> list[Prompt]:
    """The everyday prompts, if there are some and good answers to them are known; else a UserError about `what`."""
    if not prompts:
        raise UserError(f"{what}: there is none")
    for prompt in prompts:
        if "activity" not in prompt.metadata:
            raise UserError(f"{what}: there is no known answer to prompt {prompt.id}, which is not one of r1's own")
    return prompts


@functools.lru_cache(maxsize=4)
def _cached(data: str, seed: int, split: str) -> tuple[Prompt, ...]:
    settings = DataConfig.model_validate_json(data)
    file = settings.prompts_file if split == "train" else settings.eval_prompts_file
    if file is not None:
        found = tuple(p for p in _file(file) if p.kind == "reasoning")
        if not found:
            raise UserError(f"{file} has no reasoning prompt")
        return found
    if not settings.tasks:
        raise UserError(f"there are no {split} prompts: give data.tasks or a file of prompts")
    count = settings.train_prompts if split == "train" else settings.eval_prompts
    try:
        return tuple(make_prompts(settings.tasks, count, seed, split))
    except ValueError as error:
        raise UserError(f"data.tasks: {error}") from None


def _reasoning(data: DataConfig, seed: int, split: str) -> tuple[Prompt, ...]:
    return _cached(data.model_dump_json(by_alias=True), seed, split)


@functools.lru_cache(maxsize=4)
def _file(path: str) -> list[Prompt]:
    return load_prompts(path)


class Deck:
    """Endless passes over `count` items, each pass in an order of its own that depends on (seed, pass) alone."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._pass, self._order = -1, list[int]()

    def deal(self, start: int, count: int) -> list[int]:
        """Items number `start` to `start + count` of the endless order."""
        dealt = []
        for position in range(start, start + count):
            lap, place = divmod(position, self.count)
            if lap != self._pass:
                self._pass, self._order = lap, list(range(self.count))
                random.Random(f"{self.seed}/{lap}").shuffle(self._order)
            dealt.append(self._order[place])
        return dealt


class Example(NamedTuple):
    """A prompt and the completion to learn, without eos. As JSONL: {"prompt": text or object, "completion": text}."""

    prompt: Prompt
    completion: str


def example_rows(examples: Iterable[tuple[Prompt, str]]) -> list[dict[str, Any]]:
    return [{"prompt": asdict(prompt), "completion": completion} for prompt, completion in examples]


def load_examples(path: str | Path) -> list[Example]:
    """Examples of a JSONL file; UserError naming file and line for what is not one."""
    examples = []
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(completion, str) or not completion.strip():
            raise UserError(f"{where}: completion is {_short(completion)}; wanted the text to learn")
        if isinstance(prompt, str):
            prompt = {"text": prompt}
        if not isinstance(prompt, dict):
            raise UserError(f"{where}: prompt is {_short(prompt)}; wanted a text or a prompt object")
        examples.append(Example(prompt_from_json(prompt, where, f"{Path(path).stem}/{number}"), completion))
    return examples


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[Prompt], longest: int) -> list[list[int]]:
    """Token ids of prompts; UserError for one that leaves no room for a completion in `longest` tokens."""
    texts = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, texts, strict=True):
        if len(tokens) >= longest:
            raise UserError(
                f"prompt {prompt.id} has {len(tokens)} tokens; this model takes at most {longest - 1} and a completion"
            )
    return texts


def encode_example(tokenizer: Tokenizer, prompt: Prompt, completion: str, whole: bool = False) -> Sample:
    """Prompt, completion and eos; the loss is on the completion, or on the `whole` text."""
    begin = prompt_tokens(tokenizer, prompt)
    tokens = [*begin, *tokenizer.encode(completion), tokenizer.eos_id]
    return Sample(tokens, prompt_length=0 if whole else len(begin))
