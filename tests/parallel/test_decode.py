"""One token at a time over the cache gives the log-probabilities that the training path gives, in every layout."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from r1.kernels.exact import PAGE
from r1.parallel.config import ParallelConfig
from r1.parallel.decode import Chunk, Decoder
from r1.parallel.loss import TokenLogprobs
from r1.parallel.packing import MicroBatch, pack
from r1.parallel.paging import BlockTable
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
    """Prompts in three prefills of other lengths each, in some of which a process has no part; copies that share pages;
    then one or two tokens of a sequence at a time, while rows leave."""
    prompts, tails = story
    decoder = Decoder(trainer, COPIES * sum(len(prompt) + NEW + PAGE for prompt in prompts))
    pages = {i: decoder.pages.take(decoder.pages.for_tokens(len(prompts[i]) + NEW)) for i in own}
    last: dict[int, torch.Tensor | None] = {}
    for part in range(3):
        chunks = {}
        for i in own:
            ends = sorted(
                (0, tails[i, 0][0] % (len(prompts[i]) + 1), prompts[i][0] % (len(prompts[i]) + 1), len(prompts[i]))
            )
            if ends[part] < ends[part + 1]:
                chunks[i] = Chunk(prompts[i][ends[part] : ends[part + 1]], ends[part], pages[i])
        hidden = decoder.prefill(list(chunks.values()))
        last |= {i: None if hidden is None else hidden[n] for n, i in enumerate(chunks)}
    rows, table = [(i, c) for i in own for c in range(COPIES)], BlockTable(8)
    for i, copy in rows:
        whole = len(prompts[i]) // decoder.pages.size
        forked, pairs = decoder.pages.fork(pages[i], whole) if copy else (pages[i], [])
        decoder.copy_pages(pairs)
        table.add([forked])
    found: dict[tuple[int, int], list[float]] = {row: [] for row in rows}
    states = [last[i] for i, _ in rows]
    _note(decoder, None if None in states else torch.stack(states), [(row, 0) for row in rows], tails, found)
    done = 0
    for count in (1, 2, 2):
        if done:
            # An odd number stays, so that sequence parallelism has to pad.
            kept = [place for place in range(len(rows)) if place % 3 != 1 or len(rows) == 1]
            rows = [rows[place] for place in kept]
            table.keep(kept)
        new = [(row, done + n) for row in rows for n in range(count)]
        tokens_T = torch.tensor([tails[row][n] for row, n in new], device=decoder.device)
        positions_T = torch.tensor([len(prompts[row[0]]) + n for row, n in new], device=decoder.device)
        table_TM = torch.from_numpy(table.rows).repeat_interleave(count, 0).to(decoder.device)
        states = decoder.decode(tokens_T, positions_T, table_TM)
        _note(decoder, states, [(row, n + 1) for row, n in new], tails, found)
        decoder.decode(tokens_T[:0], positions_T[:0], table_TM[:0])  # nothing at all changes nothing
        done += count
    return found


def _note(decoder: Decoder, hidden: torch.Tensor | None, wanted: list, tails: dict, found: dict) -> None:
    """What these hidden states say of the tokens `wanted`, (sequence, place in its tail) each."""
    tokens = torch.tensor([tails[row][n] for row, n in wanted], device=decoder.device)
    logits = decoder.logits(hidden, VOCABULARY)
    chosen = None if logits is None else logits.log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    if chosen is not None:
        as_trained = decoder.logprobs(hidden, tokens, 1.0, VOCABULARY)
        torch.testing.assert_close(as_trained, chosen, rtol=0, atol=1e-4)
        chosen = as_trained if decoder.trainer.parallel.numerics == "exact" else chosen
    for (row, _), value in zip(wanted, decoder.share(chosen, (len(wanted),), torch.float32).tolist(), strict=True):
        found[row].append(value)


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
def drafts(layout: dict[str, Any], story: Story) -> list[float]:
    """Log-probabilities of every token but the first two by the multi-token-prediction layer: over its cache, a part
    by prefill, the rest one or two at a time; of the texts of this process."""
    parallel = ParallelConfig(**layout)
    world = join(parallel)
    trainer = Trainer(MODELS["deepseek"], parallel, world, seed=3)
    decoder = Decoder(trainer, 1024, drafts=True)
    sharers, found = world.groups.dp_cp, []
    for prompt in story[0][sharers.rank() : sharers.size() * 3 : sharers.size()]:  # equally many on each process
        text = prompt + story[1][0, 0]
        cut, pages = len(prompt), decoder.pages.take(decoder.pages.for_tokens(len(text)))
        half = cut // 2
        if half:
            decoder.prefill([Chunk(text[:half], 0, pages, next_token=text[half])])
        else:
            decoder.prefill([])
        hidden = decoder.prefill([Chunk(text[half:cut], half, pages)])
        table = torch.tensor([pages], dtype=torch.int32, device=decoder.device)
        begin = cut - 1
        for count in (1, 2, 1):
            places = torch.arange(begin, begin + count, device=decoder.device)
            following = torch.tensor(text, device=decoder.device)[places + 1]
            guess = decoder.draft(hidden, following, places, table.expand(count, -1))
            after = torch.tensor(text, device=decoder.device)[places + 2]
            logits = decoder.logits(guess, VOCABULARY)
            chosen = None if logits is None else logits.log_softmax(-1).gather(1, after[:, None]).squeeze(1)
            found += decoder.share(chosen, (count,), torch.float32).tolist()
            begin += count
            more = torch.arange(begin, begin + (2 if count == 1 else 1), device=decoder.device)
            hidden = decoder.decode(torch.tensor(text, device=decoder.device)[more], more, table.expand(len(more), -1))
    return found


@torch.no_grad()
def drafts_as_trained(story: Story, texts: list[int]) -> list[float]:
    """The same by the path of training: the whole text at once."""
    parallel = ParallelConfig()
    world = join(parallel)
    trainer = Trainer(MODELS["deepseek"], parallel, world, seed=3)
    found = []
    for i in texts:
        text = torch.tensor(story[0][i] + story[1][0, 0])
        packed = pack(MicroBatch(text, torch.tensor([0, len(text)], dtype=torch.int32)), world, trainer.rope_tables, 1)
        (model,) = trainer.chunks
        _, ahead = model(text, packed).chunk(2, 0)
        logits = model.head(model.hidden_of_all_tokens(ahead), torch.nn.functional.linear)[:, :VOCABULARY]
        begin = len(story[0][i]) - 1
        rows = logits[begin : begin + 4].log_softmax(-1)
        found += rows.gather(1, text[begin + 2 : begin + 6, None]).squeeze(1).tolist()
    return found


@pytest.mark.parametrize("name", ["one process", "TP2", "PP2", "PP2 uneven", "EP2", "EP2 PP2"])
def test_drafts_are_the_trained_layers(name: str, pools: Any, story: Story) -> None:
    processes, layout, _ = LAYOUTS[name]
    results = [drafts(layout, story)] if processes == 1 else pools[processes].run(drafts, layout, story)
    share = 2 if "EP2" in name else 1
    for rank, found in enumerate(results):
        # Pipeline stages are the outer axis: rank r holds share r modulo the data-parallel size.
        wanted = drafts_as_trained(story, list(range(len(story[0])))[rank % share : 3 * share : share])
        assert found == pytest.approx(wanted, abs=1e-4), f"seed {SEED}, rank {rank}"


def test_decoding_does_not_change_the_experts_load() -> None:
    parallel = ParallelConfig()
    trainer = Trainer(MODELS["deepseek"], parallel, join(parallel), seed=3)
    decoder = Decoder(trainer, 16)
    pages = decoder.pages.take(1)
    decoder.prefill([Chunk([1, 2, 3], 0, pages)])
    decoder.decode(torch.tensor([4]), torch.tensor([3]), torch.tensor([pages]))
    loads = [b for name, b in trainer.chunks[0].named_buffers() if name.endswith("local_tokens_per_expert")]
    assert loads and all(int(load.sum()) == 0 for load in loads)


def test_drafts_want_a_layer_that_makes_them() -> None:
    trainer = Trainer(MODELS["llama"], ParallelConfig(), join(ParallelConfig()), seed=3)
    with pytest.raises(ValueError, match="num_mtp_layers is 0"):
        Decoder(trainer, 16, drafts=True)
