"""DeepSeek-R1-Zero: GRPO on the base model with rule rewards alone, accuracy and format, and no supervised data."""

from __future__ import annotations

from r1.engine.grpo import run_grpo
from r1.engine.settings import Config


def run(config: Config) -> None:
    run_grpo(config, "r1_zero")
