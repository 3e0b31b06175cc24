"""Reasoning-oriented RL: Dev1 to Dev2. As R1-Zero, with the language-consistency reward added to accuracy."""

from __future__ import annotations

from r1.engine.grpo import run_grpo
from r1.engine.settings import Config


def run(config: Config) -> None:
    run_grpo(config, "reasoning_rl")
