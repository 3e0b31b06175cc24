"""Whether training notices FP8: `python -m r1.bench.fp8_training [--steps N] [--rl-steps N] [--seeds N]`.

Everything in float32, in bfloat16, and in bfloat16 with the products of linears and experts in FP8, for several seeds:

- `pretrain`: the tiny preset's pretraining. A seed's weights and data are the same in the three. The loss is the mean
  of the last 20 steps.
- `r1_zero`: GRPO from one base, trained in float32. The reward is the mean of the last quarter of the steps, over all
  completions of the rollout, which are sampled in the same precision.

On a CPU products in FP8 are emulated: the results are those of the recipe, the times say nothing. About an hour there.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from r1.bench import _measure
from r1.engine.config import load_config
from r1.engine.logs import read_jsonl
from r1.engine.settings import Config
from r1.engine.stages import pretrain, r1_zero

MODES = {
    "float32": ["parallel.dtype=float32"],
    "bfloat16": ["parallel.dtype=bfloat16"],
    "bfloat16, FP8": ["parallel.dtype=bfloat16", "parallel.fp8=block"],
}
LAST = 20  # steps of pretraining that the loss is averaged over
# What is measured is the training; the stages' own evaluation is kept short, and so is a step of GRPO.
SHORT = [
    "data.eval_prompts=8",
    "stages.evaluate.completions_per_prompt=1",
    "stages.r1_zero.prompts_per_step=8",
    "stages.r1_zero.save_interval_steps=1000",
]


def pretrained(preset: str, mode: str, seed: int, steps: int, folder: Path) -> tuple[_measure.Record, Config]:
    settings = [*MODES[mode], *SHORT, f"run_dir={folder}", f"seed={seed}", f"stages.pretrain.steps={steps}"]
    config = load_config(preset, settings)
    began = time.perf_counter()
    pretrain.run(config)
    seconds = time.perf_counter() - began
    losses = [row["loss"] for row in read_jsonl(config.stage_dir("pretrain") / "metrics.jsonl")]
    loss = statistics.fmean(losses[-LAST:])
    return {
        "task": "pretrain",
        "name": mode,
        "seed": seed,
        "loss": loss,
        "seconds": seconds,
        "losses": losses,
    }, config


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
        "mismatch": max(row.get("mismatch", 0.0) for row in rows),
        "seconds": seconds,
        "rewards": rewards,
    }


def show(records: list[_measure.Record]) -> None:
    rows = []
    for name in MODES:
        losses, exact = (
            {r["seed"]: r["loss"] for r in records if r["task"] == "pretrain" and r["name"] == wanted}
            for wanted in (name, "float32")
        )
        runs = [r for r in records if r["task"] == "r1_zero" and r["name"] == name]
        rows.append(
            [
                name,
                _spread(list(losses.values()), ".3f"),
                _spread([loss / exact[seed] - 1 for seed, loss in losses.items()], "+.1%"),
                _spread([r["reward"] for r in runs], ".3f"),
                f"{max(r['mismatch'] for r in runs):.1e}",
            ]
        )
    columns = ["mean ± deviation over the seeds", "loss", "beside float32's", "GRPO reward", "largest mismatch"]
    _measure.show("training in FP8", columns, rows)


def _spread(values: list[float], form: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{form}} ± {deviation:{form.removeprefix('+')}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", help="a preset, or a TOML file")
    parser.add_argument("--steps", type=int, default=200, help="of pretraining")
    parser.add_argument("--base-steps", type=int, default=400, help="of the pretraining that GRPO begins from")
    parser.add_argument("--rl-steps", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
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
                keep(pretrained(args.preset, mode, seed, args.steps, folder / f"pretrain {mode} {seed}")[0])
        _, base = pretrained(args.preset, "float32", 0, args.base_steps, folder / "base")
        for seed in range(args.seeds):
            for mode in MODES:
                keep(rewarded(args.preset, mode, seed, args.rl_steps, base, folder / f"{mode} {seed}"))
    show(records)


if __name__ == "__main__":
    main()
