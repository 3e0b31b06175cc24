"""Exact numerics in the driver: rollout and training give the same log-probabilities, and the first ratio is 1."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from r1.engine.config import load_config
from r1.engine.engine import Engine, Sample, SamplingParameters
from r1.engine.scheduler import Request, Scheduler

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="exact numerics is for a CPU")
COPIES, PROMPTS = 8, 64
# Everything that rollout may do: few at once, prompts in parts, a cache that is too small for them, speculation.
FEATURES = {"max_sequences": 96, "prefill_tokens": 160, "cache_tokens": 1536, "speculate": True}


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("numerics", "dtype", "threads"),
    [("exact", "float32", 1), ("exact", "float32", 2), ("exact", "bfloat16", 1), ("fast", "float32", 1)],
    indirect=["threads"],
)
def test_512_completions_of_the_tiny_preset(numerics: str, dtype: str, threads: None) -> None:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    draw = random.Random(seed)
    config = load_config("tiny", [f"parallel.numerics={numerics}", f"parallel.dtype={dtype}", f"seed={seed}"])
    engine = Engine(config, train=True)
    # Some fill a page or almost two, which their copies share, or soon want another.
    prompts = [[draw.randrange(2, 600) for _ in range(draw.choice((2, 10, 58, 64)))] for _ in range(PROMPTS)]
    # A tenth of the vocabulary ends a completion, so that lengths are mixed.
    sampling = SamplingParameters(max_tokens=48, temperature=0.8, stop_ids=tuple(range(0, 640, 10)))
    scheduler, found = Scheduler(engine.policy, engine.vocab_size, **FEATURES), {}
    for i, prompt in enumerate(prompts):
        scheduler.submit(Request(i, prompt, sampling, seed + i, COPIES))
    while not scheduler.idle:
        found |= {(u.request, u.copy): u.completion for u in scheduler.step() if u.completion}
    counts = scheduler.statistics()
    assert counts["evictions"] > 0 and counts["drafts_proposed"] > counts["drafts_accepted"] > 0
    completions = [[found[i, j] for j in range(COPIES)] for i in range(PROMPTS)]
    samples = [
        Sample(prompt + c.tokens, len(prompt), rollout_logprobs=c.logprobs, advantage=draw.uniform(-1, 1))
        for prompt, group in zip(prompts, completions, strict=True)
        for c in group
    ]
    lengths = {len(s.tokens) - s.prompt_length for s in samples}
    assert len(samples) == 512 and len(lengths) > 10
    for sample in samples:
        sample.old_logprobs = sample.rollout_logprobs
    gaps = []
    for order, tokens in ((range(512), 16384), (draw.sample(range(512), 512), 2048), (draw.sample(range(512), 5), 512)):
        read, _ = engine.logprobs([samples[i] for i in order], "policy", 0.8, tokens)
        for i, values in zip(order, read, strict=True):
            gaps += [abs(a - b) for a, b in zip(values, samples[i].rollout_logprobs, strict=True)]
    stage = config.stages.r1_zero.model_copy(update={"temperature": 0.8, "kl_coefficient": 0.0})
    metrics = engine.grpo_step(samples, lr=1e-3, stage=stage)
    engine.close()
    assert torch.tensor(gaps).max() < 1e-4
    if numerics == "exact":
        assert max(gaps) == 0.0
        assert metrics["ratio"] == 1.0 and metrics["clip_low_fraction"] == metrics["clip_high_fraction"] == 0.0
    else:
        assert max(gaps) > 0.0, "if fast numerics were exact this test would prove nothing"
