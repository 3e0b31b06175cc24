"""Configuration: presets, extends, --set, schedules; and one clear sentence for whatever is wrong."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from r1.engine.config import PIPELINE, STAGES, load_config, presets, to_toml
from r1.engine.engine import Engine
from r1.engine.errors import UserError
from r1.engine.settings import OptimizerConfig, StagesConfig
from r1.parallel.trainer import AdamConfig


def refusal(*settings: str, config: str = "tiny") -> str:
    with pytest.raises(UserError) as caught:
        load_config(config, settings)
    message = str(caught.value)
    assert "\n" not in message and "pydantic" not in message
    return message


@pytest.mark.parametrize("name", presets())
def test_every_preset_reads_back_from_its_printed_form(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    printed = tmp_path / "printed.toml"
    printed.write_text(to_toml(config))
    assert load_config(str(printed)) == config


def test_printed_form_survives_awkward_strings_and_lists(tmp_path: Path) -> None:
    awkward = 'a "quoted" \\ back\nslash, 中文, tab\t'
    config = load_config("tiny", ["data.tasks.0.parameters={}"])
    values = config.model_dump(by_alias=True, exclude_none=True)
    values["data"]["tasks"][0]["parameters"] = {awkward: [awkward, {"a b": True, "list": list(range(60))}], "n": -1e-9}
    changed = type(config).model_validate(values)
    printed = tmp_path / "printed.toml"
    printed.write_text(to_toml(changed))
    assert load_config(str(printed)) == changed


def test_set_takes_toml_types_and_bare_words() -> None:
    config = load_config(
        "tiny",
        [
            "run_dir=runs/some-where",
            "parallel.dispatcher=allgather",
            "optimizer.eps=1e-7",
            "optimizer.betas=[0.8, 0.9]",
            "stages.r1_zero.normalize_std=false",
            "data.tasks.1.weight=2.5",
            'stages.r1_zero.rewards=[{name="accuracy", weight=3}]',
        ],
    )
    assert config.run_dir == "runs/some-where" and config.parallel.dispatcher == "allgather"
    assert config.optimizer.eps == 1e-7 and config.optimizer.betas == (0.8, 0.9)
    assert config.stages.r1_zero.normalize_std is False
    assert config.data.tasks[1].weight == 2.5
    assert [(reward.name, reward.weight) for reward in config.stages.r1_zero.rewards] == [("accuracy", 3.0)]


def test_extends_merges_tables_and_replaces_lists(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('extends = "tiny"\nseed = 7\n[parallel]\nexpert = 2\n')
    (tmp_path / "mine.toml").write_text(
        'extends = "base.toml"\n[parallel]\npipeline = 2\n[[data.tasks]]\nname = "chain_sum"\n'
    )
    config = load_config(str(tmp_path / "mine.toml"))
    assert (config.seed, config.parallel.expert, config.parallel.pipeline) == (7, 2, 2)
    assert len(config.data.tasks) == 1 and config.model == load_config("tiny").model


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    assert "extends itself" in refusal(config=str(tmp_path / "a.toml"))


def test_a_stage_inherits_the_optimizer_key_by_key() -> None:
    config = load_config("tiny", ["optimizer.eps=1e-5", "optimizer.lr=0.5", "stages.sft.optimizer.lr=0.25"])
    assert config.stages.sft.optimizer.lr == 0.25 and config.stages.sft.optimizer.eps == 1e-5
    assert config.stages.r1_zero.optimizer.eps == 1e-5


def test_the_optimizer_settings_reach_adamw() -> None:
    settings = ["betas=[0.7,0.8]", "eps=1e-5", "weight_decay=0.2", "clip_grad=0.3", 'moments="bfloat16"']
    engine = Engine(load_config("tiny", [f"optimizer.{setting}" for setting in settings]))
    wanted = {"beta1": 0.7, "beta2": 0.8, "eps": 1e-5, "weight_decay": 0.2, "clip_grad": 0.3, "moments": "bfloat16"}
    assert engine.policy.adam == AdamConfig(**wanted)
    engine.close()
    assert "optimizer.moments" in refusal('optimizer.moments="float16"')
    assert "wanted both at most 0.9961" in refusal('optimizer={moments="bfloat16", betas=[0.9, 0.999]}')
    load_config("tiny", ['optimizer={moments="bfloat16", betas=[0.9, 0.995]}'])


def test_schedule_changes_settings_from_its_step_on() -> None:
    change = (
        'stages.r1_zero.schedule=[{at_step=8, set={max_completion_tokens=64}}, {at_step=3, set={"optimizer.lr"=0.1}}]'
    )
    stage = load_config("tiny", ["stages.r1_zero.max_completion_tokens=32", "stages.r1_zero.optimizer.lr=0.2", change])
    stage = stage.stages.r1_zero
    seen = [
        (stage.at_step(step).optimizer.lr, stage.at_step(step).max_completion_tokens) for step in (0, 2, 3, 7, 8, 99)
    ]
    assert seen == [(0.2, 32), (0.2, 32), (0.1, 32), (0.1, 32), (0.1, 64), (0.1, 64)]


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("stages.r1_zero.prompt_per_step=3", "did you mean prompts_per_step?"),
        ("paralel.expert=2", "did you mean parallel?"),
        ("stages.r1zero.steps=1", "did you mean r1_zero?"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("data.tasks.1.wieght=2", "did you mean weight?"),
        ("stages.r1_zero.ratio=tokens", "did you mean token?"),
        ("stages.r1_zero.from=pretrian", "did you mean pretrain?"),
        ('stages.r1_zero.rewards=[{name="acuracy"}]', "did you mean accuracy?"),
        ("stages.r1_zero.schedule=[{at_step=3, set={max_completion_token=9}}]", "did you mean max_completion_tokens?"),
        ("stages.r1_zero.steps=0", "stages.r1_zero.steps = 0"),
        ('tokenizer.prompt_template="Question:"', "wanted a text with {question} in it, once"),
        ("stages.r1_zero.schedule=[{at_step=3, set={temperature=0.0}}]", "temperature = 0"),
        ("stages.r1_zero.completions_per_prompt=1", "no group"),
        ("stages.r1_zero.max_completion_tokens=100000", "max_positions"),
        ("parallel.expert=3", "parallel.expert = 3"),
        ("optimizer.betas=[0.9, 1.0]", "betas"),
        ("seed=twelve", "seed = 'twelve'"),
        ("stages=3", "wanted a table"),
        ("seed", "wanted a.b=c"),
        ("seed.a=1", "seed"),
        ("data.tasks.9.weight=1", "data.tasks.9.weight"),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(setting: str, wanted: str) -> None:
    assert wanted in refusal(setting)


def test_unknown_preset_names_the_nearest() -> None:
    assert "did you mean tiny?" in refusal(config="tinny")


@pytest.mark.parametrize("content", ["a = ", "[model", "extends = 3\n[model]\nnum_layers=1\n", "\xff\xfe"])
def test_bad_file_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content.encode("latin-1"))
    assert "bad.toml" in refusal(config=str(path))


def test_missing_file_and_missing_table(tmp_path: Path) -> None:
    assert "absent.toml does not exist" in refusal(config=str(tmp_path / "absent.toml"))
    (tmp_path / "empty.toml").write_text("")
    assert "model is required" in refusal(config=str(tmp_path / "empty.toml"))


def test_learning_rate_warms_up_and_ends_at_its_minimum() -> None:
    cosine = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4, schedule="cosine")
    rates = [cosine.lr_at(step, 25) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert math.isclose(rates[-1], 0.1) and all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert math.isclose(rates[14], 0.55)  # half-way
    linear = OptimizerConfig(lr=1.0, min_lr=0.0, schedule="linear")
    assert math.isclose(linear.lr_at(5, 11), 0.5) and linear.lr_at(10, 11) == 0.0 == linear.lr_at(50, 11)
    assert OptimizerConfig(lr=0.3).lr_at(10**6, 10) == 0.3


def test_defaults_are_the_published_settings() -> None:
    stages = StagesConfig()
    zero = stages.r1_zero
    assert (zero.steps, zero.prompts_per_step, zero.completions_per_prompt) == (10400, 32, 16)
    assert zero.prompts_per_rollout * zero.completions_per_prompt == 8192
    assert (zero.kl_coefficient, zero.reference_interval_steps, OptimizerConfig().lr) == (0.001, 400, 3e-6)
    assert (stages.all_scenarios_rl.steps, stages.all_scenarios_rl.temperature) == (1700, 0.7)
    assert [stages.all_scenarios_rl.at_step(step).general_fraction > 0 for step in (1299, 1300)] == [False, True]
    assert set(PIPELINE) == set(STAGES) - {"evaluate"}


def test_reading_a_configuration_needs_no_torch() -> None:
    script = "import sys, r1.engine.cli, r1.engine.config as c; c.load_config('tiny'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
