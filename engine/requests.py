"""What a scheduler is asked for, what it answers, and what it keeps of both."""

from __future__ import annotations

import collections.abc
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from r1.engine.errors import UserError
from r1.engine.sampling import Completion, FinishReason, SamplingParameters
from r1.engine.text import TextStream
from r1.parallel.config import ModelConfig


def check_prompt(prompt: list[int], model: ModelConfig) -> None:
    """UserError for a prompt that the model cannot take or leaves no room for a completion."""
    if not 1 <= len(prompt) < model.max_positions:
        raise UserError(f"a prompt has {len(prompt)} tokens; this model takes 1 to {model.max_positions - 1}")
    if bad := [token for token in prompt if not 0 <= token < model.vocab_size]:
        raise UserError(f"a prompt holds token {bad[0]}; this model knows 0 to {model.vocab_size - 1}")


@dataclass
class Request:
    """`copies` completions of a prompt (token ids), under an `id` that no other has now. Copy j is drawn from numbers
    that depend on (seed, j) alone.

    `begun`, one for each copy if given, are completions to go on with; of those that cannot, nothing more is heard.
    What is not finished ends with "deadline" after `deadline`, a time.monotonic(), or once it has `max_new_tokens` more
    than at the beginning.
    """

    id: Any
    prompt: list[int]
    sampling: SamplingParameters
    seed: int = 0
    copies: int = 1
    deadline: float | None = None
    max_new_tokens: int | None = None
    begun: collections.abc.Sequence[Completion] = ()


@dataclass(slots=True)
class Update:
    """What a step added to one completion. `text` is safe to show, and "" without a tokenizer; `completion` is the
    whole one, where it has ended."""

    request: Any
    copy: int
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    text: str = ""
    finish_reason: FinishReason | None = None
    completion: Completion | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    request: Request
    copy: int
    stream: int
    budget: int  # tokens that it may have, and those that it may have now
    limit: int
    completion: Completion
    text: TextStream | None = None
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens, of the prompt and its own; all but the last, while it runs
    draft: int | None = None  # a guess at the next token

    @property
    def tokens(self) -> list[int]:
        return self.completion.tokens


@dataclass(slots=True, eq=False)
class Group:
    """Sequences of one text, which is cached once for all of them."""

    request: Request
    sequences: deque[Sequence]
    text: list[int]
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    hidden_H: Tensor | None = None
