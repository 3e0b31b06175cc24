"""The engines of r1.bench.rollout behind one interface: prompts go in, tokens and the moments they came at come out.

Each kind of engine runs in a process of its own (`Process`), because vLLM changes its process's threads and torch, and
because a peer that dies must not cost the other results. The peers read a Hugging Face folder that r1 wrote.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from r1.parallel.config import ModelConfig

MAX_SEQUENCES = 64  # that run at once, in the engines that have such a limit


@dataclass(frozen=True)
class Job:
    """A prompt of which `copies` completions of exactly `tokens` tokens each are wanted; it comes in `arrival` seconds
    after the start."""

    prompt: list[int]
    tokens: int
    copies: int = 1
    arrival: float = 0.0


class Emission(NamedTuple):
    """What one completion got at one moment, in seconds of time.perf_counter."""

    time: float
    job: int
    copy: int
    tokens: list[int]


class Contender(Protocol):
    idle: bool

    def begin(self, seed: int, **how: Any) -> None:
        """Forget earlier runs, caches of prompts included. Not timed."""

    def add(self, number: int, job: Job) -> None: ...

    def step(self) -> list[Emission]:
        """The smallest piece of work that gives control back."""

    def notes(self) -> dict[str, Any]:
        """What is to be known of the run that ended."""

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
        """The likeliest tokens and their log-probabilities, for every prompt."""


# ------------------------------------------------------------------------------------------------ ours


class R1:
    def __init__(self, folder: Path, model: ModelConfig) -> None:
        warnings.filterwarnings("ignore")  # megatron says at length that optional parts are absent
        from r1.engine.config import load_config
        from r1.engine.engine import Engine

        self.engine = Engine(load_config("tiny"), model=model, train=False, seed=0)

    def begin(self, seed: int, speculate: bool = False) -> None:
        from r1.engine.scheduler import Scheduler

        self.scheduler = Scheduler(
            self.engine.policy, self.engine.vocab_size, max_sequences=MAX_SEQUENCES, speculate=speculate
        )
        self.seed, self.speculate = seed, speculate
        self.jobs: dict[int, Job] = {}
        self.made: Counter[tuple[int, int]] = Counter()  # tokens of the completions that have not ended
        self.peak = (0, 0)  # pages in use, and the tokens that were cached then

    def add(self, number: int, job: Job) -> None:
        from r1.engine.sampling import SamplingParameters
        from r1.engine.scheduler import Request

        self.jobs[number] = job
        sampling = SamplingParameters(job.tokens)
        self.scheduler.submit(Request(number, job.prompt, sampling, self.seed + number, job.copies))

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    def step(self) -> list[Emission]:
        updates = self.scheduler.step()
        now = time.perf_counter()
        for update in updates:
            self.made[update.request, update.copy] += len(update.tokens)
            if update.finish_reason:
                del self.made[update.request, update.copy]
        # A prompt counts once for all its completions; a completion's last token is not cached yet.
        prompts = {number for number, _ in self.made}
        tokens = sum(len(self.jobs[number].prompt) for number in prompts) + sum(n - 1 for n in self.made.values())
        self.peak = max(self.peak, (self.scheduler.pages.used, tokens))
        return [Emission(now, u.request, u.copy, u.tokens) for u in updates if u.tokens]

    def notes(self) -> dict[str, Any]:
        statistics, (pages, tokens) = self.scheduler.statistics(), self.peak
        held = sum(cache.nbytes for caches in self.scheduler.decoder.caches.values() for cache in caches)
        used = pages * held / (statistics["pages_total"] + 1)  # a page is never given out
        m = self.engine.model_config
        width = m.kv_lora_rank + m.qk_rope_head_dim
        if m.architecture != "deepseek_v3":
            width = 2 * m.kv_heads * m.qk_head_dim
        latents = tokens * width * (m.num_layers + (1 if self.speculate else 0)) * torch.float32.itemsize
        notes = {"cache": {"tokens": tokens, "bytes": used, "bytes_of_tokens": latents, "overhead": used / latents - 1}}
        if self.speculate:
            proposed, accepted = (statistics[f"drafts_{name}"] for name in ("proposed", "accepted"))
            notes["drafts"] = {"proposed": proposed, "accepted": accepted, "rate": accepted / max(1, proposed)}
        return notes

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
        from r1.engine.sampling import SamplingParameters

        groups = self.engine.generate(prompts, SamplingParameters(tokens, temperature=0.0))
        return [(completion.tokens, completion.logprobs) for (completion,) in groups]


# ------------------------------------------------------------------------------------------------ transformers


class Transformers:
    """transformers.generate over left-padded batches: of all that waits, or of `batch` completions at a time, those of
    the fewest wanted tokens first. A step is a batch; its tokens' moments are taken within it."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=torch.float32).eval().to(device)
        self.waiting: deque[tuple[int, int, Job]] = deque()
        self.batch: int | None = None

    def tune(self, jobs: list[Job]) -> dict[str, Any]:
        """Chooses the implementation of attention (and of experts) whose batch of these jobs ends first; those that are
        near the first are compared again over four times the tokens."""
        experts = ["eager", "grouped_mm", "batched_mm"] if hasattr(self.model.config, "n_routed_experts") else [""]
        ways = [(attention, name) for attention in ("eager", "sdpa") for name in experts]
        self.begin(0)
        took = {way: self._seconds(jobs, *way) for way in ways}
        near = [way for way in ways if took[way] < 2 * min(took.values())]
        longer = [replace(job, tokens=4 * job.tokens) for job in jobs]
        took_longer = {way: min(self._seconds(longer, *way) for _ in range(2)) for way in near}
        self.chosen = min(near, key=lambda way: took_longer[way])
        self._use(*self.chosen)
        return {" ".join(way).strip(): seconds for way, seconds in (took | took_longer).items()}

    def _seconds(self, jobs: list[Job], attention: str, experts: str) -> float:
        self._use(attention, experts)
        for number, job in enumerate(jobs):
            self.add(number, job)
        began = time.perf_counter()
        self.step()
        return time.perf_counter() - began

    def _use(self, attention: str, experts: str) -> None:
        self.model.set_attn_implementation(attention)
        if experts:
            self.model.set_experts_implementation(experts)

    def begin(self, seed: int, batch: int | None = None) -> None:
        torch.manual_seed(seed)
        self.waiting.clear()
        self.batch = batch

    def add(self, number: int, job: Job) -> None:
        self.waiting += [(number, copy, job) for copy in range(job.copies)]

    @property
    def idle(self) -> bool:
        return not self.waiting

    def step(self) -> list[Emission]:
        chosen = list(self.waiting)
        if self.batch:
            chosen = sorted(chosen, key=lambda row: row[2].tokens)[: self.batch]
        for row in chosen:
            self.waiting.remove(row)
        wanted = [job.tokens for _, _, job in chosen]
        moments: list[float] = []

        def ended(input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
            moments.append(time.perf_counter())
            return torch.tensor([tokens <= len(moments) for tokens in wanted], device=input_ids.device)

        rows = self._generate(
            [job.prompt for _, _, job in chosen], max(wanted), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            stopping_criteria=[ended],
        ).sequences[:, -max(wanted) :].tolist()  # fmt: skip
        return [
            Emission(moment, number, copy, [rows[i][step]])
            for step, moment in enumerate(moments)
            for i, (number, copy, job) in enumerate(chosen)
            if step < job.tokens
        ]

    def _generate(self, prompts: list[list[int]], tokens: int, **how: Any) -> Any:
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        return self.model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, return_dict_in_generate=True, **how
        )

    def notes(self) -> dict[str, Any]:
        attention, experts = self.chosen
        return {"attention": attention} | ({"experts": experts} if experts else {})

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
        # One batch of each prompt: no padding is in the reference.
        results = []
        for prompt in prompts:
            out = self._generate([prompt], tokens, do_sample=False, temperature=None, top_p=None, output_logits=True)
            logprobs = torch.cat(out.logits).float().log_softmax(-1)
            results.append((logprobs.argmax(-1).tolist(), logprobs.amax(-1).tolist()))
        return results


# ------------------------------------------------------------------------------------------------ vLLM


class Vllm:
    """vLLM's engine in this process, stepped by hand; compiled by torch.compile as it does by default, or `eager`."""

    def __init__(self, folder: Path, model: ModelConfig, eager: bool = False) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_MLA_DISABLE": "1",  # its MLA kernels take DeepSeek-V3's own widths only
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(folder.parent / "vllm"),
        }
        from vllm import LLM

        self.llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=eager,
            max_num_seqs=MAX_SEQUENCES,
            max_model_len=model.max_positions,
            # Its own operator turns interleaved pairs (DeepSeek's) wrongly where there is no YaRN.
            compilation_config={"custom_ops": ["-rotary_embedding"]},
        )
        self.engine = self.llm.llm_engine
        self.first = 0  # names of requests are not used twice

    def begin(self, seed: int) -> None:
        self.first += 1_000_000
        self.seed = seed
        self.llm.reset_prefix_cache()

    def add(self, number: int, job: Job) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            n=job.copies,
            temperature=1.0,
            max_tokens=job.tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.engine.add_request(str(self.first + number), {"prompt_token_ids": job.prompt}, sampling)

    @property
    def idle(self) -> bool:
        return not self.engine.has_unfinished_requests()

    def step(self) -> list[Emission]:
        outputs = self.engine.step()
        now = time.perf_counter()
        return [
            Emission(now, int(output.request_id) - self.first, part.index, list(part.token_ids))
            for output in outputs
            for part in output.outputs
            if part.token_ids
        ]

    def notes(self) -> dict[str, Any]:
        return {}

    def greedy(self, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, logprobs=0, ignore_eos=True, detokenize=False)
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        found = [output.outputs[0] for output in outputs]
        return [
            (list(x.token_ids), [row[token].logprob for row, token in zip(x.logprobs, x.token_ids, strict=True)])
            for x in found
        ]


# ------------------------------------------------------------------------------------------------ a process each


class Process:
    """A process that holds one engine. RuntimeError (or what it raised) where it fails; `close` ends it."""

    def __init__(self, kind: type, folder: Path, model: ModelConfig, threads: int, **how: Any) -> None:
        # Spawned, not forked: OpenMP's threads do not survive a fork.
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._opened: Future = self._pool.submit(_open, kind, folder, model, threads, how)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._opened.result()
        return self._pool.submit(_with_engine, function, arguments).result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


_engine: Any = None


def _open(kind: type, folder: Path, model: ModelConfig, threads: int, how: dict[str, Any]) -> None:
    global _engine
    os.environ["OMP_NUM_THREADS"] = str(threads)  # vLLM asks for it
    torch.set_num_threads(threads)
    _engine = kind(folder, model, **how)


def _with_engine(function: Callable[..., Any], arguments: tuple) -> Any:
    return function(_engine, *arguments)


def serve(engine: Contender, jobs: list[Job], seed: int, how: dict[str, Any]) -> tuple[list[Emission], dict[str, Any]]:
    """Every job from its arrival to its last token: what came when, in seconds after the start, and the notes.

    ValueError where a completion has another number of tokens than was wanted.
    """
    engine.begin(seed, **how)
    waiting = deque(sorted(enumerate(jobs), key=lambda pair: pair[1].arrival))
    emissions: list[Emission] = []
    start = time.perf_counter()
    while waiting or not engine.idle:
        passed = time.perf_counter() - start
        if engine.idle and waiting[0][1].arrival > passed:
            time.sleep(waiting[0][1].arrival - passed)
            continue
        while waiting and waiting[0][1].arrival <= passed:
            engine.add(*waiting.popleft())
        emissions += engine.step()
    made: Counter[tuple[int, int]] = Counter()
    for emission in emissions:
        made[emission.job, emission.copy] += len(emission.tokens)
    wanted = {(number, copy): job.tokens for number, job in enumerate(jobs) for copy in range(job.copies)}
    if made != wanted:
        number, copy = next(key for key in wanted | made if made[key] != wanted.get(key, 0))
        raise ValueError(
            f"completion {copy} of prompt {number} has {made[number, copy]} tokens, wanted {wanted[number, copy]}"
        )
    return [emission._replace(time=emission.time - start) for emission in emissions], engine.notes()


def export(engine: R1, folder: Path) -> None:
    engine.engine.export_hf(folder)


def greedy(engine: Contender, prompts: list[list[int]], tokens: int) -> list[tuple[list[int], list[float]]]:
    return engine.greedy(prompts, tokens)


def tune(engine: Transformers, jobs: list[Job]) -> dict[str, Any]:
    return engine.tune(jobs)


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
