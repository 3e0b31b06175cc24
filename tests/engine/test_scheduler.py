"""Continuous batching gives every completion what it would have alone, whatever happens around it."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1.engine import scheduler as scheduler_module
from r1.engine.config import load_config
from r1.engine.data.tokenizer import Tokenizer, train_tokenizer
from r1.engine.engine import Engine
from r1.engine.errors import UserError
from r1.engine.rollout import generate
from r1.engine.sampling import Completion, Rules, SamplingParameters, draw, streams
from r1.engine.scheduler import Request, Scheduler, Update
from r1.parallel.decode import Chunk
from r1.parallel.paging import SCRATCH, Pages

# ------------------------------------------------------------------------------- against a model that is a plain text

VOCABULARY, LIMIT, CPU = 7, 24, torch.device("cpu")
POISON = -1
NOISE = np.random.default_rng(0).normal(size=VOCABULARY)


def scores(text: Sequence[int]) -> np.ndarray:
    """What this model thinks comes next: anything, but a function of the whole text."""
    return np.random.default_rng([*text, len(text)]).normal(size=VOCABULARY) * 2


class TextModel:
    """A Decoder whose cache holds the tokens themselves, and whose model reads them there. It tells of every read that
    is not what was written for that sequence."""

    exact = False

    def __init__(self, trainer: Any, tokens: int, *, drafts: bool = False) -> None:
        self.pages, self.drafts, self.device, self.in_step = Pages(1 + tokens // 3, 3), drafts, CPU, False
        self.cache = np.full((len(self.pages.holders), 3), POISON)
        self.ahead = np.full((len(self.pages.holders), 3), POISON)  # of the drafting layer: the token that follows
        self.caches: dict = {}
        # A hidden state is the number of a text; of the drafting layer -1 - the number of a text that it guesses at.
        self.texts: list[list[int]] = []
        self.guesses: list[list[int]] = []

    def open(self) -> None: ...

    def no_hidden(self) -> torch.Tensor:
        return torch.empty(0, 1, dtype=torch.float64)

    def agree(self, *flags: bool) -> list[bool]:
        return list(flags)

    one_replica_agrees = agree

    def share(self, x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        assert tuple(x.shape) == shape and x.dtype is dtype
        return x

    def poison(self) -> None:
        self.cache[self.pages.free] = self.ahead[self.pages.free] = POISON

    def _write(self, cache: np.ndarray, pages: Sequence[int], place: int, token: int) -> None:
        page = pages[place // 3]
        assert page != SCRATCH and self.pages.holders[page] == 1, (
            "a page that others read, or nobody holds, was written"
        )
        cache[page, place % 3] = token

    def _read(self, cache: np.ndarray, pages: Sequence[int], count: int) -> list[int]:
        found = [int(cache[pages[place // 3], place % 3]) for place in range(count)]
        assert POISON not in found, "what is free, or was never written, was read"
        return found

    def _states(self, texts: list[list[int]]) -> torch.Tensor:
        self.texts += texts
        return torch.arange(len(self.texts) - len(texts), len(self.texts), dtype=torch.float64)[:, None]

    def prefill(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        for chunk in chunks:
            for place, token in enumerate(chunk.tokens, chunk.start):
                self._write(self.cache, chunk.pages, place, token)
            if self.drafts:
                following = [*chunk.tokens[1:], chunk.next_token]
                for place, token in enumerate(following, chunk.start):
                    if token is not None:
                        self._write(self.ahead, chunk.pages, place, token)
        return self._states([self._read(self.cache, chunk.pages, chunk.end) for chunk in chunks])

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        rows = list(zip(tokens.tolist(), positions.tolist(), table.tolist(), strict=True))
        for token, place, pages in rows:
            self._write(self.cache, pages, place, token)
        return self._states([self._read(self.cache, pages, place + 1) for _, place, pages in rows])

    def draft(self, hidden: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> Any:
        rows = list(zip(hidden[:, 0].tolist(), tokens.tolist(), positions.tolist(), table.tolist(), strict=True))
        texts = []
        for _, token, place, pages in rows:
            self._write(self.ahead, pages, place, token)
        for state, token, place, pages in rows:
            text = [*self.texts[int(state)], token]
            assert len(text) == place + 2 and self._read(self.ahead, pages, place + 1) == text[1:]
            texts.append(text)
        self.guesses += texts
        return -1 - torch.arange(len(self.guesses) - len(texts), len(self.guesses), dtype=torch.float64)[:, None]

    def copy_pages(self, pairs: Sequence[tuple[int, int]]) -> None:
        for source, target in pairs:
            assert self.pages.holders[target] == 1
            self.cache[target], self.ahead[target] = self.cache[source], self.ahead[source]

    def logits(self, hidden: torch.Tensor, vocab_size: int) -> torch.Tensor:
        rows = []
        for state in map(int, hidden[:, 0].tolist()):
            # The drafting layer is right but for some noise.
            rows.append(scores(self.texts[state]) if state >= 0 else scores(self.guesses[-1 - state]) + NOISE)
        return torch.tensor(np.array(rows).reshape(-1, VOCABULARY), dtype=torch.float32)


def alone(request: Request) -> list[Completion]:
    """What each copy is to be: token after token, nothing beside it."""
    completions = []
    for stream in streams(request.seed, range(request.copies)):
        completion, sampling = Completion(finish_reason="length"), request.sampling
        for place in range(min(sampling.max_tokens, LIMIT - len(request.prompt))):
            logits = torch.tensor(scores(request.prompt + completion.tokens), dtype=torch.float32)[None]
            completion.tokens += draw(logits, stream[None], torch.tensor([place]), Rules([sampling], CPU)).tolist()
            if completion.tokens[-1] in sampling.stop_ids:
                completion.finish_reason = "stop"
                break
        completions.append(completion)
    return completions


def over_texts(**options: Any) -> Scheduler:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_module, "Decoder", TextModel)
        config = SimpleNamespace(max_positions=LIMIT, num_mtp_layers=1, vocab_size=VOCABULARY)
        return Scheduler(SimpleNamespace(model_config=config), VOCABULARY, **options)


@pytest.mark.parametrize("speculate", [False, True])
def test_completions_are_drawn_by_their_probabilities(seed: int, speculate: bool) -> None:
    """Chi-square of 20,000 completions of three tokens, 343 kinds, with guesses that are often wrong."""
    draws, prompt = 20_000, [seed % VOCABULARY, 3]
    scheduler = over_texts(max_sequences=1000, cache_tokens=20_000, speculate=speculate)
    scheduler.submit(Request(0, prompt, SamplingParameters(3), seed, copies=draws))
    found = np.zeros((VOCABULARY,) * 3)
    while not scheduler.idle:
        for update in scheduler.step():
            if update.completion:
                found[tuple(update.completion.tokens)] += 1

    def probabilities(text: list[int]) -> np.ndarray:
        weights = np.exp(scores(text))
        return weights / weights.sum()

    wanted = np.zeros_like(found)
    for a, first in enumerate(probabilities(prompt)):
        for b, second in enumerate(probabilities([*prompt, a])):
            wanted[a, b] = draws * first * second * probabilities([*prompt, a, b])
    rare = wanted < 10
    cells, expected = (np.append(x[~rare], x[rare].sum()) for x in (found, wanted))
    statistic, free = ((cells - expected) ** 2 / np.maximum(expected, 10)).sum(), len(cells) - 1
    assert found.sum() == draws and free > 30
    assert statistic <= free + 8 * (2 * free) ** 0.5 + 20, (statistic, free)
    counts = scheduler.statistics()
    assert not speculate or 0.55 < counts["drafts_accepted"] / counts["drafts_proposed"] < 0.95


@st.composite
def requests(draw_from: Any, number: int) -> Request:
    prompt = draw_from(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=22))
    sampling = SamplingParameters(
        draw_from(st.integers(1, 14)),
        draw_from(st.sampled_from([0.0, 0.7, 1.0])),
        stop_ids=draw_from(st.sampled_from([(), (0,), (1, 2)])),
    )
    return Request(number, prompt, sampling, draw_from(st.integers(0, 2**63)), draw_from(st.integers(1, 4)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_schedules(data: st.DataObject) -> None:
    any_schedule(data)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(st.data())
def test_thousands_of_schedules(data: st.DataObject) -> None:
    any_schedule(data)


def any_schedule(data: st.DataObject) -> None:
    """Requests, aborts and pauses at any time, over a cache of any size that holds the largest."""
    scheduler = over_texts(
        max_sequences=data.draw(st.integers(1, 6)),
        cache_tokens=data.draw(st.integers(LIMIT, 4 * LIMIT)),
        prefill_tokens=data.draw(st.sampled_from([1, 2, 5, 100])),
        speculate=data.draw(st.booleans()),
    )
    model = scheduler.decoder
    submitted: dict[int, Request] = {}
    found: dict[tuple[int, int], Completion] = {}
    grown: dict[tuple[int, int], list[int]] = {}
    aborted: set[int] = set()
    for step in range(1000):
        if len(submitted) < 8 and data.draw(st.integers(0, 2)) == 0:
            request = data.draw(requests(len(submitted)))
            submitted[request.id] = request
            scheduler.submit(request)
        elif scheduler.idle:
            break
        event = data.draw(st.integers(0, 19))
        if event == 0 and submitted:
            victim = data.draw(st.sampled_from(sorted(submitted)))
            scheduler.abort(victim)
            if any((victim, copy) not in found for copy in range(submitted[victim].copies)):
                aborted.add(victim)
        if event == 1:
            left = scheduler.pause()
            assert model.pages.used == 0
            assert {(r.id, copy) for r, copy, _ in left} == {
                (r.id, copy) for r in submitted.values() for copy in range(r.copies)
            } - set(found)
        scheduler.weight_version = step
        for update in scheduler.step():
            key = update.request, update.copy
            assert key not in found, "a completion went on after its end"
            grown.setdefault(key, []).extend(update.tokens)
            if update.completion:
                found[key] = update.completion
                assert update.finish_reason == update.completion.finish_reason
        assert len(scheduler.running) <= scheduler.max_sequences
        model.poison()
    assert scheduler.idle and model.pages.used == 0, "a page was lost"
    for request in submitted.values():
        for copy, wanted in enumerate(alone(request)):
            completion = found.pop((request.id, copy))
            assert completion.tokens == grown.get((request.id, copy), []), "updates tell all of it"
            if completion.finish_reason == "abort":
                assert request.id in aborted and wanted.tokens[: len(completion.tokens)] == completion.tokens
            else:
                assert (completion.tokens, completion.finish_reason) == (wanted.tokens, wanted.finish_reason)
            assert completion.weight_versions == sorted(completion.weight_versions)
            assert len(completion.weight_versions) == len(completion.logprobs) == len(completion.tokens)
    assert not found
    counts = scheduler.statistics()
    assert counts["tokens_generated"] == sum(map(len, grown.values()))
    assert 0 <= counts["drafts_accepted"] <= counts["drafts_proposed"]
    assert (counts["running"], counts["waiting"]) == (0, 0)


# ------------------------------------------------------------------------------------------------- with a real model


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    config = load_config(str(Path(__file__).parent / "micro.toml"), ["parallel.numerics=exact"])
    made = Engine(config, train=False, vocab_size=200, seed=seed)
    yield made
    made.close()


SAMPLING = SamplingParameters(30, 1.3, top_p=0.9, stop_ids=tuple(range(0, 200, 29)), top_k=60, min_p=0.01)
WAYS: dict[str, dict[str, Any]] = {
    "few at once": {"max_sequences": 4},
    "prompts in parts": {"prefill_tokens": 5},
    "a small cache": {"cache_tokens": 192},
    "speculation": {"speculate": True},
    "all of it": {"max_sequences": 5, "prefill_tokens": 7, "cache_tokens": 128, "speculate": True},
}


def random_prompts(seed: int) -> list[list[int]]:
    chosen = random.Random(seed)
    return [[chosen.randrange(2, 200) for _ in range(n)] for n in (4, 1, 9, 3, 33, 64)]


exact_only = pytest.mark.skipif(torch.cuda.is_available(), reason="exact numerics by plain torch is for a CPU")


@exact_only
@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_however_it_is_scheduled(seed: int, engine: Engine, way: str) -> None:
    prompts = random_prompts(seed)
    wanted = engine.generate(prompts, SAMPLING, copies=3, seed=seed)
    assert engine.generate(prompts, SAMPLING, copies=3, seed=seed, **WAYS[way]) == wanted


@exact_only
def test_a_completion_does_not_depend_on_its_batch_mates(seed: int, engine: Engine) -> None:
    prompts = random_prompts(seed)
    together = engine.generate(prompts, SAMPLING, copies=3, seed=seed)
    assert {len(group) for group in together} == {3} and len({len(c.tokens) for g in together for c in g}) > 2
    assert engine.generate(prompts[:1], SAMPLING, copies=3, seed=seed)[0] == together[0]
    assert engine.generate(prompts[:2], SAMPLING, copies=2, seed=seed) == [group[:2] for group in together[:2]]
    assert engine.generate(prompts, SAMPLING, copies=3, seed=seed + 1) != together
    for completion in (c for group in together for c in group):
        tokens = completion.tokens
        assert len(completion.logprobs) == len(tokens) <= 30 and all(x <= 0 for x in completion.logprobs)
        assert completion.finished == (tokens[-1] in SAMPLING.stop_ids)
        assert completion.finished or (completion.finish_reason == "length" and len(tokens) == 30)
        assert not set(tokens[:-1]) & set(SAMPLING.stop_ids)


def run(scheduler: Scheduler, *requests: Request) -> dict[tuple[Any, int], Completion]:
    for request in requests:
        scheduler.submit(request)
    found = {}
    while not scheduler.idle:
        found |= {(u.request, u.copy): u.completion for u in scheduler.step() if u.completion}
    assert scheduler.pages.used == 0
    return found


@exact_only
@pytest.mark.parametrize("speculate", [False, True])
def test_requests_of_all_kinds_beside_each_other(seed: int, engine: Engine, speculate: bool) -> None:
    """Each is what it is alone."""
    kinds = [
        SAMPLING,
        SamplingParameters(12, 0.0),
        SamplingParameters(20, 0.6, logprobs="before_temperature", top_logprobs=4),
        SamplingParameters(9, 1.0, logit_bias=((5, 8.0), (6, -50.0))),
    ]
    prompts = random_prompts(seed)
    wanted = [Request(n, prompts[n], kinds[n % 4], seed + n, copies=1 + n % 2) for n in range(6)]

    def scheduler() -> Scheduler:
        return Scheduler(engine.policy, 200, max_sequences=4, cache_tokens=256, speculate=speculate)

    together = run(scheduler(), *wanted)
    for request in wanted:
        for key, completion in run(scheduler(), request).items():
            assert together[key] == completion
    top = together[2, 0].top_logprobs
    assert len(top) == len(together[2, 0].tokens) and {len(row) for row in top} == {4}
    assert all(a[1] >= b[1] for row in top for a, b in zip(row, row[1:]))


@torch.inference_mode()
@pytest.mark.parametrize("options", [{}, {"speculate": True, "max_sequences": 3, "cache_tokens": 192}], ids=str)
def test_what_stands_in_free_pages_is_not_read(seed: int, engine: Engine, options: dict[str, Any]) -> None:
    """NaN in every free page changes no bit."""
    prompts, found = random_prompts(seed), []
    for poisoned in (False, True):
        scheduler = Scheduler(engine.policy, 200, **{"cache_tokens": 1024, **options})
        completions = {}
        for n, prompt in enumerate(prompts):
            scheduler.submit(Request(n, prompt, SAMPLING, seed, copies=2))
        while not scheduler.idle:
            completions |= {(u.request, u.copy): u.completion for u in scheduler.step() if u.completion}
            if poisoned:
                for cache in (cache for layer in scheduler.decoder.caches.values() for cache in layer):
                    cache[scheduler.pages.free] = float("nan")
        found.append(completions)
    assert found[0] == found[1] and len(found[0]) == 2 * len(prompts)


@exact_only
def test_a_completion_goes_on_where_it_was_left(seed: int, engine: Engine) -> None:
    """Under the same weights it becomes what it would have been; each token knows its weights' version."""
    prompts = random_prompts(seed)
    wanted = engine.generate(prompts, SAMPLING, copies=2, seed=seed)
    left = engine.generate(prompts, SAMPLING, copies=2, seed=seed, seconds=0.0, weight_version=3)
    assert all(c.finish_reason == "deadline" and not c.tokens for group in left for c in group)
    scheduler = Scheduler(engine.policy, 200, cache_tokens=2048)
    for n, prompt in enumerate(prompts):
        scheduler.submit(Request(n, prompt, SAMPLING, streams(seed, [n]).item(), copies=2))
    ended = {}
    for _ in range(7):
        ended |= {(u.request, u.copy): u.completion for u in scheduler.step() if u.completion}
    open_ones = {(request.id, copy): completion for request, copy, completion in scheduler.pause()}
    assert scheduler.pages.used == 0 and not scheduler.decoder.caches and len(open_ones) > 3
    begun = [[(ended | open_ones)[n, copy] for copy in range(2)] for n in range(len(prompts))]
    told: list[tuple[int, int]] = []
    done = engine.generate(
        prompts,
        SAMPLING,
        copies=2,
        seed=seed,
        begun=begun,
        weight_version=1,
        finished=lambda i, j, completion: told.append((i, j)),
    )
    assert sorted(told) == sorted(open_ones), "only those that were open are told of"
    for i, (row, group) in enumerate(zip(done, wanted)):
        for j, (completion, whole) in enumerate(zip(row, group)):
            assert (completion.tokens, completion.logprobs) == (whole.tokens, whole.logprobs)
            before = len(begun[i][j].tokens)
            assert completion.weight_versions == [0] * before + [1] * (len(whole.tokens) - before)
            assert (i, j) in told or completion == begun[i][j]
    # The paused scheduler goes on as well.
    while not scheduler.idle:
        ended |= {(u.request, u.copy): u.completion for u in scheduler.step() if u.completion}
    assert [[ended[n, copy].tokens for copy in range(2)] for n in range(len(prompts))] == [
        [c.tokens for c in group] for group in wanted
    ]


def test_new_weights_are_used_after_a_pause(seed: int, engine: Engine) -> None:
    scheduler = Scheduler(engine.policy, 200, cache_tokens=512)
    sampling, prompt = SamplingParameters(20, 0.0), random_prompts(seed)[2]
    scheduler.submit(Request(0, prompt, sampling))
    for _ in range(8):
        scheduler.step()
    ((_, _, completion),) = scheduler.pause()
    before = list(completion.tokens)
    head = engine.policy.chunks[-1].output_layer.weight
    kept = head.detach().clone()
    try:
        with torch.no_grad():
            head[:200] = head[:200].roll(1, 0)  # every token becomes the next one
        scheduler.weight_version = 5
        while not scheduler.idle:
            ended = [update.completion for update in scheduler.step() if update.completion]
        changed = engine.generate([prompt + before], SamplingParameters(20 - len(before), 0.0))[0][0]
    finally:
        with torch.no_grad():
            head.copy_(kept)
    assert completion.tokens == before, "what was handed out at the pause does not grow"
    (completion,) = ended
    assert completion.tokens[: len(before)] == before and completion.tokens[len(before) :] == changed.tokens
    assert completion.weight_versions == [0] * len(before) + [5] * (20 - len(before))


def test_completions_that_may_have_no_more_tokens(engine: Engine) -> None:
    """Begun under a larger limit than there is now: they end as they are."""
    begun = [Completion([5] * n, [-1.0] * n, "deadline", [0] * n) for n in (3, 4, 9)]
    (found,) = engine.generate([[1, 2]], SamplingParameters(4, 0.0), copies=3, begun=[begun])
    assert [len(c.tokens) for c in found] == [4, 4, 9] and {c.finish_reason for c in found} == {"length"}
    assert found[0].tokens[:3] == [5] * 3 and begun[0].finish_reason == "deadline"


def test_deadline_and_abort(seed: int, engine: Engine) -> None:
    scheduler = Scheduler(engine.policy, 200, max_sequences=2, cache_tokens=512)
    sampling = SamplingParameters(100, 1.0)
    scheduler.submit(Request("late", [1, 2], sampling, deadline=time.monotonic() + 0.2))
    scheduler.submit(Request("gone", [3], sampling, copies=3))
    scheduler.submit(Request("stays", [4, 5, 6], SamplingParameters(4)))
    scheduler.step()
    scheduler.abort("gone")
    scheduler.abort("never heard of")
    updates: list[Update] = scheduler.step()
    assert sorted((u.copy, u.finish_reason) for u in updates if u.request == "gone") == [(n, "abort") for n in range(3)]
    time.sleep(0.25)
    ended = {}
    while not scheduler.idle:
        ended |= {u.request: u.completion for u in scheduler.step() if u.completion}
    assert ended["late"].finish_reason == "deadline" and 0 < len(ended["late"].tokens) < 100
    assert ended["stays"].finish_reason == "length" and len(ended["stays"].tokens) == 4
    assert scheduler.pages.used == 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, naïve café 三 四 🏖️ " * 20], vocab_size=300)


def test_stop_strings_end_a_text_before_them(seed: int, engine: Engine, tokenizer: Tokenizer) -> None:
    """Strings of several characters out of what the model says, so that most straddle tokens."""
    chosen = random.Random(seed)
    prompt = random_prompts(seed)[0]
    # Letters and spaces alone: what is no whole character reads otherwise once more tokens follow.
    plain = [t for t in range(tokenizer.vocab_size) if tokenizer.decode([t]).replace(" ", "").isascii()]
    plain = [t for t in plain if tokenizer.decode([t]).replace(" ", "").isalpha()]
    bias = tuple((t, -1e4) for t in range(tokenizer.vocab_size) if t not in plain)

    def texts(sampling: SamplingParameters) -> dict[int, tuple[str, Completion]]:
        scheduler = Scheduler(engine.policy, tokenizer.vocab_size, cache_tokens=2048, tokenizer=tokenizer)
        scheduler.submit(Request(0, prompt, sampling, seed, copies=8))
        text, ended = dict.fromkeys(range(8), ""), {}
        while not scheduler.idle:
            for update in scheduler.step():
                text[update.copy] += update.text
                if update.completion:
                    ended[update.copy] = update.completion
        return {copy: (text[copy], ended[copy]) for copy in ended}

    whole = texts(SamplingParameters(60, 1.5, logit_bias=bias))
    for text, completion in whole.values():
        assert tokenizer.decode(completion.tokens) == text
    stops = []
    for text, _ in whole.values():
        begin = chosen.randrange(len(text) // 2, len(text) - 3)
        stops.append(text[begin : begin + chosen.randint(1, 3)])
    cut = 0
    for copy, (text, completion) in texts(SamplingParameters(60, 1.5, logit_bias=bias, stop=tuple(stops[:4]))).items():
        full, tokens = whole[copy][0], whole[copy][1].tokens
        places = [full.find(stop) for stop in stops[:4] if stop in full]
        if not places:
            assert completion.finish_reason == "length" and completion.tokens == tokens and text == full
            continue
        # Among strings that end at one token the first in the text counts, whichever it is.
        assert completion.finish_reason == "stop" and completion.tokens == tokens[: len(completion.tokens)]
        assert full.startswith(text) and any(full[len(text) :].startswith(stop) for stop in stops[:4])
        assert not any(stop in text for stop in stops[:4])
        assert any(stop in tokenizer.decode(completion.tokens) for stop in stops[:4])
        assert not any(stop in tokenizer.decode(completion.tokens[:-1]) for stop in stops[:4])
        cut += 1
    assert cut >= 4


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0, [], SAMPLING), "a prompt has 0 tokens; this model takes 1 to 191"),
        (Request(0, [1] * 192, SAMPLING), "a prompt has 192 tokens; this model takes 1 to 191"),
        (Request(0, [1, -4], SAMPLING), "a prompt holds token -4"),
        (Request(0, [10**6], SAMPLING), "a prompt holds token 1000000"),
        (Request(0, [1], SAMPLING, copies=0), "copies = 0 must be at least 1"),
        (
            Request(0, [1], SAMPLING, copies=2, begun=[Completion()]),
            "begun has 1 completions, wanted one for each of 2",
        ),
        (Request(0, [1], SamplingParameters(3, logit_bias=((200, 1.0),))), "logit_bias names token 200"),
        (Request(0, [1], SamplingParameters(3, stop=("x",))), "stop strings need a tokenizer"),
        (
            Request(0, [1] * 100, SamplingParameters(90)),
            "100 tokens of prompt and 90 more do not fit into the cache's 128",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_requests_that_can_never_run(engine: Engine, request_: Request, message: str) -> None:
    scheduler = Scheduler(engine.policy, 200, cache_tokens=128)
    with pytest.raises(UserError, match=message):
        scheduler.submit(request_)
    assert scheduler.idle


def test_sizes_that_cannot_work(engine: Engine) -> None:
    for name in ("max_sequences", "cache_tokens", "prefill_tokens"):
        with pytest.raises(UserError, match=f"{name} = 0 must be at least 1"):
            Scheduler(engine.policy, 200, **{name: 0})


def test_the_cache_has_the_size_that_memory_allows(engine: Engine) -> None:
    assert Scheduler(engine.policy, 200, max_sequences=3).pages.total * 64 >= 3 * 192
    scheduler = Scheduler(engine.policy, 200, max_sequences=10**9)
    used = scheduler.pages.total * scheduler.pages.size * 4 * (16 + 8) * 4  # layers and the drafting one, float32
    import psutil

    assert 0.3 < used / psutil.virtual_memory().available < 0.7


def test_progress_and_streamed_completions(seed: int, engine: Engine) -> None:
    done, told = [], []
    prompts = random_prompts(seed)
    sampling = SamplingParameters(8, 1.0, stop_ids=tuple(range(0, 200, 9)))
    completions = generate(
        engine.policy,
        prompts,
        sampling,
        2,
        seed,
        200,
        max_sequences=3,
        progress=done.append,
        finished=lambda i, j, completion: told.append((i, j, completion)),
    )
    assert sum(done) == len(prompts)
    assert sorted(told, key=lambda x: x[:2]) == [
        (i, j, c) for i, group in enumerate(completions) for j, c in enumerate(group)
    ]
    assert [x[:2] for x in told] != sorted(x[:2] for x in told), "as they finish, not in order"
