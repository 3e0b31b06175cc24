"""One token at a time over the cache gives the log-probabilities that the training path gives, in every layout."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from r1.parallel.config import ParallelConfig
from r1.parallel.decode import Decoder
from r1.parallel.loss import TokenLogprobs
from r1.parallel.packing import MicroBatch
from r1.parallel.trainer import Trainer
from r1.parallel.world import join
from tests.parallel.tiny import MODELS, VOCABULARY

SEED = random.SystemRandom().randrange(2**31)
COPIES, NEW = 2, 6
# (prompt, copy) -> tokens to put after the prompt; the same list on every process
Story = tuple[list[list[int]], dict[tuple[int, int], list[int]]]

LAYOUTS: dict[str, tuple[int, dict[str, Any], str]] = {
    "one process": (1, {}, "deepseek"),
    "one process, llama": (1, {}, "llama"),
    "one process, qwen2": (1, {}, "qwen2"),
    "DP2": (2, {}, "deepseek"),
    "TP2": (2, {"tensor": 2}, "deepseek"),
    "TP2 llama": (2, {"tensor": 2}, "llama"),
    "TP2 llama, whole sequences": (2, {"tensor": 2, "sequence": False}, "llama"),
    "TP2 latent, whole sequences": (2, {"tensor": 2, "sequence": False}, "latent_dense"),
    "PP2": (2, {"pipeline": 2}, "deepseek"),
    "PP2 uneven": (2, {"pipeline": 2}, "deepseek_3_layers"),
    "PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, "deepseek"),
    "PP2 qwen2": (2, {"pipeline": 2}, "qwen2"),
    "EP2": (2, {"expert": 2}, "deepseek"),
    "EP2 allgather": (2, {"expert": 2, "dispatcher": "allgather"}, "deepseek"),
    "CP2": (2, {"context": 2}, "deepseek"),
    "CP2 llama": (2, {"context": 2}, "llama"),
    "EP2 PP2": (4, {"expert": 2, "pipeline": 2}, "deepseek"),
    "CP2 TP2": (4, {"context": 2, "tensor": 2}, "deepseek"),
}


@pytest.fixture(scope="module")
def story() -> Story:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    prompts = [[draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 12))] for _ in range(7)]
    tails = {(p, c): [draw.randrange(VOCABULARY) for _ in range(NEW)] for p in range(7) for c in range(COPIES)}
    return prompts, tails


@torch.no_grad()
def decode_and_read(
    model: str, layout: dict[str, Any], story: Story
) -> tuple[dict[tuple[int, int], list[float]], dict[tuple[int, int], list[float]]]:
    """Log-probabilities of the tails: of this process's prompts by decoding, of its replica's by reading."""
    parallel = ParallelConfig(**layout)
    world = join(parallel)
    trainer = Trainer(MODELS[model], parallel, world, seed=3)
    prompts, tails = story
    sharers = world.groups.dp_cp
    return (
        _decode(trainer, story, list(range(len(prompts)))[sharers.rank() :: sharers.size()]),
        _read(trainer, story, list(range(len(prompts)))[world.data_rank :: world.data_size]),
    )


def _decode(trainer: Trainer, story: Story, own: list[int]) -> dict[tuple[int, int], list[float]]:
    prompts, tails = story
    decoder = Decoder(trainer, [prompts[i] for i in own], COPIES, max(len(prompts[i]) for i in own) + NEW)
    rows = [(i, c) for i in own for c in range(COPIES)]
    found: dict[tuple[int, int], list[float]] = {row: [] for row in rows}
    for step in range(NEW):
        # Rows leave at different times; an odd number stays, so that sequence parallelism has to pad.
        if step in (2, 4):
            kept = [place for place in range(len(rows)) if place % 3 != 1 or len(rows) == 1]
            decoder.keep(torch.tensor(kept, device=decoder.device))
            rows = [rows[place] for place in kept]
        logits = decoder.logits(VOCABULARY)
        tokens_B = torch.tensor([tails[row][step] for row in rows], device=decoder.device)
        chosen = None if logits is None else logits.log_softmax(-1).gather(1, tokens_B[:, None]).squeeze(1)
        if chosen is not None:
            as_trained = decoder.logprobs(tokens_B, 1.0, VOCABULARY)
            torch.testing.assert_close(as_trained, chosen, rtol=0, atol=1e-4)
            chosen = as_trained if trainer.parallel.numerics == "exact" else chosen
        chosen = decoder.share(chosen, (len(rows),), torch.float32)
        for row, value in zip(rows, chosen.tolist(), strict=True):
            found[row].append(value)
        if step + 1 < NEW:
            decoder.append(tokens_B)
    return found


def _read(trainer: Trainer, story: Story, own: list[int]) -> dict[tuple[int, int], list[float]]:
    prompts, tails = story
    rows = [(i, c) for i in own for c in range(COPIES)]
    texts = [prompts[i] + tails[i, c] for i, c in rows]
    stream = torch.tensor([token for text in texts for token in text], device=trainer.world.device)
    ends = torch.tensor([0] + [len(text) for text in texts], device=stream.device).cumsum(0)
    batch = MicroBatch(stream, ends.int(), {"targets": stream.roll(-1)})
    (rows_T2,) = trainer.read([batch], TokenLogprobs(VOCABULARY))
    return {row: rows_T2[int(end) - 1 - NEW : int(end) - 1, 0].tolist() for row, end in zip(rows, ends[1:])}


@pytest.mark.parametrize("name", LAYOUTS)
def test_decoding_is_reading(name: str, pools: Any, story: Story) -> None:
    processes, layout, model = LAYOUTS[name]
    results = [decode_and_read(model, layout, story)] if processes == 1 else []
    results = results or pools[processes].run(decode_and_read, model, layout, story)
    join(ParallelConfig())
    wanted = _one_process(model, story)
    decoded = set()
    for rank, (by_decoding, by_reading) in enumerate(results):
        for how, values in (("decoded", by_decoding), ("read", by_reading)):
            for row, logprobs in values.items():
                expected = wanted[row][: len(logprobs)]
                assert logprobs == pytest.approx(expected, abs=1e-4), f"seed {SEED}, {how} {row} on rank {rank}"
        decoded |= {row for row, logprobs in by_decoding.items() if len(logprobs) == NEW}
        assert all(len(logprobs) >= 2 for logprobs in by_decoding.values())
    assert decoded, "some sequence is decoded to its end"
    spread = torch.tensor(list(wanted.values())).std()
    assert spread > 0.3, "log-probabilities that hardly differ would prove nothing"


_known: dict[str, dict[tuple[int, int], list[float]]] = {}


def _one_process(model: str, story: Story) -> dict[tuple[int, int], list[float]]:
    if model not in _known:
        parallel = ParallelConfig()
        trainer = Trainer(MODELS[model], parallel, join(parallel), seed=3)
        with torch.no_grad():
            # One sequence at a time: nothing to pack, nothing to pad.
            _known[model] = {}
            for i in range(len(story[0])):
                _known[model] |= _read(trainer, story, [i])
    return _known[model]


@torch.no_grad()
def finished_beside_a_longer_one(story: Story) -> float:
    """Rank 0's only sequence is full after one token; it keeps step with rank 1, which goes on."""
    parallel = ParallelConfig(expert=2)
    world = join(parallel)
    trainer = Trainer(MODELS["deepseek"], parallel, world, seed=3)
    prompt = story[0][0]
    decoder = Decoder(trainer, [prompt], 1, len(prompt) + (1 if world.rank == 0 else NEW))
    for token in story[1][0, 0][:-1]:
        decoder.append(torch.tensor([token]))
    logits = decoder.logits(VOCABULARY)
    assert logits is not None and bool(torch.isfinite(logits).all())
    return float(logits.log_softmax(-1)[0, story[1][0, 0][-1]])


def test_a_full_sequence_keeps_step_with_longer_ones(pools: Any, story: Story) -> None:
    _, longer = pools[2].run(finished_beside_a_longer_one, story)
    assert longer == pytest.approx(_one_process("deepseek", story)[0, 0][-1], abs=1e-4), f"seed {SEED}"


def test_decoding_does_not_change_the_experts_load() -> None:
    parallel = ParallelConfig()
    trainer = Trainer(MODELS["deepseek"], parallel, join(parallel), seed=3)
    with torch.no_grad():
        decoder = Decoder(trainer, [[1, 2, 3]], 2, 8)
        decoder.append(torch.tensor([4, 5]))
    loads = [b for name, b in trainer.chunks[0].named_buffers() if name.endswith("local_tokens_per_expert")]
    assert loads and all(int(load.sum()) == 0 for load in loads)
