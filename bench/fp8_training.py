"""Whether training notices FP8: `python -m r1.bench.fp8_training [--steps N] [--rl-steps N] [--seeds N]`.

Everything in float32, in bfloat16, and in bfloat16 with the products of linears and experts in FP8, for several seeds:

- `pretrain`: the tiny preset's pretraining. A seed's weights and data are the same in the three. The loss is that of
  the trained model on the documents that come next in the corpus, read in the same precision.
- `r1_zero`: GRPO from one base, trained in float32. The reward is the mean of the last quarter of the steps, and of the
  first, over all completions of the rollout, which are sampled in the same precision.

On a CPU products in FP8 are emulated: the results are those of the recipe, the times say nothing. An hour or two there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from r1.bench import _measure
from r1.engine.config import load_config
from r1.engine.logs import read_jsonl
from r1.engine.prompts import encode_example
from r1.engine.settings import Config
from r1.engine.stage import load_tokenizer, open_engine
from r1.engine.stages import pretrain, r1_zero

MODES = {
    "float32": ["parallel.dtype=float32"],
    "bfloat16": ["parallel.dtype=bfloat16"],
    "bfloat16, FP8": ["parallel.dtype=bfloat16", "parallel.fp8=block"],
}
HELD_OUT = 1000  # documents that the loss is measured on
# What is measured is the training; the stages' own evaluation is kept short, and so is a step of GRPO.
SHORT = [
    "data.eval_prompts=8",
    "stages.evaluate.completions_per_prompt=1",
    "stages.r1_zero.prompts_per_step=16",
    "stages.r1_zero.save_interval_steps=1000",
]


def base_model(preset: str, mode: str, seed: int, steps: int, folder: Path) -> Config:
    settings = [*MODES[mode], *SHORT, f"run_dir={folder}", f"seed={seed}", f"stages.pretrain.steps={steps}"]
    config = load_config(preset, settings)
    pretrain.run(config)
    return config


def pretrained(preset: str, mode: str, seed: int, steps: int, folder: Path) -> _measure.Record:
    began = time.perf_counter()
    config = base_model(preset, mode, seed, steps, folder)
    seconds = time.perf_counter() - began
    losses = [row["loss"] for row in read_jsonl(config.stage_dir("pretrain") / "metrics.jsonl")]
    return {
        "task": "pretrain",
        "name": mode,
        "seed": seed,
        "loss": held_out_loss(config),
        "seconds": seconds,
        "losses": losses,
    }


def held_out_loss(config: Config) -> float:
    """Nats a token of the pretrained model, on the documents that training would have read next."""
    tokenizer, settings = load_tokenizer(config), config.stages.pretrain
    samples = [encode_example(tokenizer, d.prompt, d.completion) for d in pretrain.corpus(config, settings.documents)]
    read = pretrain.plan(samples, settings.steps, settings.tokens_per_step)
    held_out = samples[read[-1][-1] + 1 :][:HELD_OUT]
    if not held_out:
        raise ValueError(f"stages.pretrain.documents is {settings.documents}, and training has read them all")
    engine = open_engine(config, "pretrain", tokenizer)
    logprobs, _ = engine.logprobs(held_out, tokens_per_micro_batch=4096)
    engine.close()
    return -math.fsum(map(math.fsum, logprobs)) / sum(map(len, logprobs))


def rewarded(preset: str, mode: str, seed: int, steps: int, base: Config, folder: Path) -> _measure.Record:
    settings = [
        *MODES[mode],
        *SHORT,
        f"run_dir={folder}",
        f"seed={seed}",
        f"tokenizer.path={Path(base.run_dir) / 'tokenizer.json'}",
        f"stages.r1_zero.from={base.stage_dir('pretrain') / 'checkpoint'}",
        f"stages.r1_zero.steps={steps}",
    ]
    config = load_config(preset, settings)
    began = time.perf_counter()
    r1_zero.run(config)
    seconds = time.perf_counter() - began
    rows = read_jsonl(config.stage_dir("r1_zero") / "metrics.jsonl")
    rewards = [row["reward"] for row in rows]
    return {
        "task": "r1_zero",
        "name": mode,
        "seed": seed,
        "reward": statistics.fmean(rewards[-max(1, steps // 4) :]),
        "first_reward": statistics.fmean(rewards[: max(1, steps // 4)]),
        "mismatch": max(row.get("mismatch", 0.0) for row in rows),
        "seconds": seconds,
        "rewards": rewards,
    }


def show(records: list[_measure.Record]) -> None:
    rows = []
    for name in MODES:
        losses, exact, half = (
            {r["seed"]: r["loss"] for r in records if r["task"] == "pretrain" and r["name"] == wanted}
            for wanted in (name, "float32", "bfloat16")
        )
        runs = [r for r in records if r["task"] == "r1_zero" and r["name"] == name]
        rows.append(
            [
                name,
                _spread(list(losses.values()), ".3f"),
                *(
                    _spread([loss / other[seed] - 1 for seed, loss in losses.items()], "+.2%")
                    for other in (exact, half)
                ),
                _spread([r["first_reward"] for r in runs], ".3f"),
                _spread([r["reward"] for r in runs], ".3f"),
                f"{max(r['mismatch'] for r in runs):.1e}",
            ]
        )
    columns = ["mean ± deviation over the seeds", "held-out loss", "beside float32's", "beside bfloat16's"]
    columns += ["GRPO reward, first quarter", "last quarter", "largest mismatch"]
    _measure.show("training in FP8", columns, rows)


def _spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{form}} ± {deviation:{form.removeprefix('+')}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", help="a preset, or a TOML file")
    parser.add_argument("--steps", type=int, default=200, help="of pretraining")
    parser.add_argument("--base-steps", type=int, default=1000, help="of the pretraining that GRPO begins from")
    parser.add_argument("--rl-steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=5, help="of pretraining; of GRPO the first three of them")
    parser.add_argument("--out", type=Path, default=_measure.RESULTS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    records: list[_measure.Record] = [{"task": "settings", **settings}]

    def keep(record: _measure.Record) -> None:
        """Written as it goes: an hour is long enough to be interrupted in."""
        records.append(record)
        _measure.save("fp8-training", device, records, args.out)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in range(args.seeds):
            for mode in MODES:
                keep(pretrained(args.preset, mode, seed, args.steps, folder / f"pretrain {mode} {seed}"))
        base = base_model(args.preset, "float32", 0, args.base_steps, folder / "base")
        for seed in range(min(args.seeds, 3)):
            for mode in MODES:
                keep(rewarded(args.preset, mode, seed, args.rl_steps, base, folder / f"{mode} {seed}"))
    show(records)


if __name__ == "__main__":
    main()
