"""Plans against published runs, what they refuse, and the search."""

from __future__ import annotations

import dataclasses
import json

import pytest

from r1.engine.config import load_config
from r1.engine.plan import workload
from r1.parallel.config import ParallelConfig
from r1.parallel.planner.hardware import FILE, load_hardware
from r1.parallel.planner.memory import Step
from r1.parallel.planner.plan import Workload, make_plan, search
from r1.parallel.planner.time import flops_per_token, rollout_time, step_time
from r1.parallel.trainer import AdamConfig

HARDWARE = load_hardware()
V3 = load_config("r1-671b-h800-512").model
PUBLISHED = {"dtype": "bfloat16", "fp8": "block", "expert": 64, "dispatcher": "flex", "overlap_grad_reduce": True}
MEGATRON = ParallelConfig(
    **PUBLISHED, tensor=2, pipeline=8, virtual_pipeline=4, pipeline_layout="Et|(tt|)*30mL", recompute="selective"
)
DEEPSEEK = ParallelConfig(**PUBLISHED, pipeline=16, pipeline_layout="Ettttt|(tttt|)*14mL", recompute="selective")


def work_of(layout: ParallelConfig, **changes: object) -> Workload:
    work = Workload(
        name="pretrain", model=V3, parallel=layout, adam=AdamConfig(moments="bfloat16"), tokens_per_step=8192 * 4096,
        tokens_per_micro_batch=4096, sequence_length=4096, steps=1000, uses_mtp=True,
    )  # fmt: skip
    return dataclasses.replace(work, **changes)


# ------------------------------------------------------------------------------------------------------ published runs


@pytest.mark.parametrize(
    ("parallel", "gpus", "device", "sequences", "published"),
    [(MEGATRON, 1024, "h100", 8192, 1412), (DEEPSEEK, 2048, "h800", 15360, 1543)],
    ids=["Megatron-Core", "DeepSeek-V3"],
)
def test_published_pretraining(
    parallel: ParallelConfig, gpus: int, device: str, sequences: int, published: float
) -> None:
    """Both hide the experts' exchange behind computation, which r1's own schedules do not."""
    step = work_of(parallel, tokens_per_step=sequences * 4096).step(gpus)
    time = step_time(V3, parallel, step, gpus, HARDWARE, HARDWARE.device(device), 4, hidden_exchange=True)
    rate = sequences * 4096 / time.total / gpus
    print(f"{rate:.0f} tokens/s/GPU predicted, {published} published")
    assert rate == pytest.approx(published, rel=0.20)
    exposed = step_time(V3, parallel, step, gpus, HARDWARE, HARDWARE.device(device), 4)
    assert exposed.exchange > 0 and exposed.total > 1.2 * time.total


def test_published_flops() -> None:
    """Megatron-Core's 368 TFLOP/s/GPU at 1,412 tokens/s/GPU."""
    assert flops_per_token(V3, 4096, mtp=True) == pytest.approx(368e12 / 1412, rel=0.005)


def test_the_published_layout_fits() -> None:
    plan = make_plan(work_of(MEGATRON.model_copy(update={"dispatcher": "alltoall"})), 1024, "h100", HARDWARE)
    assert plan.fits and plan.worst < 80e9


def test_r1_zeros_step() -> None:
    """68.5 s on 512 H800: nearly all of it is the longest completion of a rollout, 32,768 tokens one after another,
    which 16 steps share."""
    device = HARDWARE.device("h800")
    decode = ParallelConfig(dtype="bfloat16", fp8="block", expert=64, dispatcher="flex")
    rollout = rollout_time(
        V3, decode, 512, HARDWARE, device, completions=512, prompt_tokens=256, mean_tokens=7000, longest_tokens=32768,
        steps_per_rollout=16, max_sequences=1024, speculate=True,
    )  # fmt: skip
    train = DEEPSEEK.model_copy(update={"expert": 32, "context": 4, "recompute": "full"})
    step = Step(
        32768, 7256, work_of(train, tokens_per_step=512 * 7256, tokens_per_micro_batch=32768).step(512).micro_batches
    )
    trained = step_time(V3, train, step, 512, HARDWARE, device, 4, hidden_exchange=True).total
    total = rollout.total + trained * (1 + 2 / 4)  # log-probabilities of policy and reference: a forward each
    print(f"rollout {rollout.total:.1f} s, training {trained:.1f} s, in all {total:.1f} s; published 68.5")
    assert rollout.total > 0.6 * total and total == pytest.approx(68.5, rel=0.20)


# ----------------------------------------------------------------------------------------------------------- refusals


def test_layouts_that_do_not_fit() -> None:
    """Megatron's layout without recomputation and on a quarter of the expert parallelism; V3's; and V3 on one GPU."""
    plain = work_of(MEGATRON.model_copy(update={"recompute": "none", "fp8": "off", "expert": 16}))
    plan = make_plan(plain, 1024, "h100", HARDWARE)
    assert not plan.fits and plan.verdict.startswith("does not fit: ")
    deepseek = DEEPSEEK.model_copy(update={"dispatcher": "alltoall", "recompute": "none"})
    assert not make_plan(work_of(deepseek), 2048, "h800", HARDWARE).fits
    assert make_plan(work_of(deepseek.model_copy(update={"recompute": "full"})), 2048, "h800", HARDWARE).fits
    alone = make_plan(work_of(ParallelConfig(dtype="bfloat16"), tokens_per_step=4096), 1, "h200", HARDWARE)
    assert not alone.fits and alone.worst > 9e12
    offloaded = AdamConfig(offload=True)
    many = work_of(ParallelConfig(dtype="bfloat16", expert=8), adam=offloaded)
    assert make_plan(many, 8, "h200", HARDWARE).host_bytes_per_node > 2e12


@pytest.mark.parametrize(
    ("changes", "gpus", "device", "said"),
    [
        ({}, 1024, "h10", "device = 'h10', wanted one of h100, h800, h200; did you mean h100?"),
        ({}, 1000, "h100", "gpus = 1000 does not divide by 512"),
        ({}, 100, "h100", "512 would fit"),
        ({"sequence_length": 200_000}, 1024, "h100", "exceeds the model's max_positions = 163840"),
        ({"parallel": MEGATRON.model_copy(update={"tensor": 3})}, 1536, "h100", "parallel.tensor = 3 does not divide"),
        ({"parallel": MEGATRON.model_copy(update={"pipeline_layout": "Et|tL"})}, 1024, "h100", "wanted E, 61 t, 1 m"),
    ],
)
def test_what_cannot_run_is_one_sentence(changes: dict, gpus: int, device: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        make_plan(work_of(MEGATRON, **changes), gpus, device, HARDWARE)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_hardware_of_ones_own(tmp_path) -> None:
    text = FILE.read_text()
    file = tmp_path / "own.toml"
    file.write_text(text.replace("[devices.h200]", "[devices.mine]").replace("step = 0.70", "step = 0.35"))
    own = load_hardware(file)
    slow, quick = (make_plan(work_of(MEGATRON), 1024, "h100", hw).step_seconds for hw in (own, HARDWARE))
    assert own.device("mine").memory_bytes == 141e9 and 1.7 * quick < slow < 2.1 * quick
    file.write_text(text.replace("fp8_flops = 1979e12", "fp8_flops = -1"))
    with pytest.raises(ValueError, match=r"devices\.h100\.fp8_flops"):
        load_hardware(file)
    with pytest.raises(ValueError, match="nowhere"):
        load_hardware(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------------------- plans


def test_more_work_takes_longer() -> None:
    device = HARDWARE.device("h100")
    seconds = lambda parallel, tokens, length: (
        step_time(V3, parallel, Step(tokens, length, 64), 1024, HARDWARE, device).total
    )
    base = seconds(MEGATRON, 4096, 4096)
    assert seconds(MEGATRON, 8192, 4096) > 1.9 * base < seconds(MEGATRON, 8192, 8192)
    assert seconds(MEGATRON, 4096, 4096) < seconds(MEGATRON.model_copy(update={"fp8": "off"}), 4096, 4096)
    assert base < seconds(MEGATRON.model_copy(update={"recompute": "full"}), 4096, 4096)
    assert base < seconds(MEGATRON.model_copy(update={"dispatcher": "alltoall"}), 4096, 4096)


def test_a_plan_adds_up_and_is_json() -> None:
    config = load_config("r1-671b-h800-512")
    plan = make_plan(workload(config, "all_scenarios_rl"), 512, "h800", HARDWARE)
    assert plan.fits and json.loads(json.dumps(plan.as_json()))["prediction"] is True
    assert plan.gpu_hours == pytest.approx(plan.step_seconds * 1700 * 512 / 3600)
    assert plan.dollars == pytest.approx(plan.gpu_hours * 2.0)
    assert plan.tokens_per_second_per_gpu == pytest.approx(plan.tokens_per_step / plan.step_seconds / 512)
    assert plan.worst == max(sum(row.values()) for row in (*plan.training, *plan.rollout))
    assert all({"reference", "reward model", "KV cache"} <= row.keys() for row in plan.rollout)


def test_a_rollout_runs_no_more_than_it_may() -> None:
    """Completions beyond rollout.max_sequences wait for a second wave; longer ones only for themselves."""
    common = {"prompt_tokens": 256, "steps_per_rollout": 1, "speculate": False, "completions": 8192}
    rollout = lambda **changes: rollout_time(
        V3, ParallelConfig(dtype="bfloat16", expert=8), 8, HARDWARE, HARDWARE.device("h200"),
        **(common | {"mean_tokens": 1000, "longest_tokens": 4000, "max_sequences": 64} | changes),
    )  # fmt: skip
    base = rollout()
    assert rollout(max_sequences=16).together > 1.5 * base.together
    assert rollout(longest_tokens=7000).longest == pytest.approx(2 * base.longest)
    assert rollout(longest_tokens=1000).longest == 0


def test_search_finds_better_layouts() -> None:
    work = workload(load_config("moonlight-16b"), "sft")
    given = make_plan(work, 32, "h100", HARDWARE)
    found = search(work, 32, "h100", HARDWARE)
    times = [plan.step_seconds for _, plan in found]
    assert len(found) == 10 and times == sorted(times) and times[0] <= given.step_seconds
    assert all(plan.fits for _, plan in found)
    assert search(work_of(ParallelConfig(dtype="bfloat16")), 8, "h100", HARDWARE) == []
