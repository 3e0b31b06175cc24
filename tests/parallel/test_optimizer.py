"""AdamW, the norm and clipping behind Megatron's optimiser: against torch's in float64 and Megatron's own step, with
moments in bfloat16, and resumed."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer import ChainedOptimizer, clip_grads
from megatron.core.utils import local_multi_tensor_l2_norm

from r1.parallel import checkpoint, optimizer
from r1.parallel.config import ParallelConfig
from r1.parallel.optimizer import AdamW, l2_norm
from r1.parallel.trainer import AdamConfig, Trainer
from r1.parallel.world import join
from tests.parallel.tiny import (
    LEARNING_RATE,
    LOSSES,
    MODELS,
    Problem,
    assemble,
    compare,
    gradient_pieces,
    make_problem,
    own_part,
    pieces,
    same_metrics,
)

SEED = random.SystemRandom().randrange(2**31)
# With eps as large as the gradients an update shows how they were scaled, which Adam's quotient would else cancel.
RULE = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.1}
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "EP2": {"expert": 2},
}
TIGHT, LOOSE, OFF = 0.05, 1e3, 0.0


@pytest.fixture(scope="module")
def problem() -> Problem:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    return make_problem(SEED, [draw.randint(4, 20) for _ in range(4)], [[0, 1], [2, 3]])


def steps(
    layout: dict[str, Any], problem: Problem, clip: float, moments: str = "float32", megatron: bool = False
) -> dict[str, Any]:
    """Collective: gradients, weights and metrics of some steps; with `megatron` they are Megatron's own."""
    parallel = ParallelConfig(**layout)
    world = join(parallel)
    adam = AdamConfig(**RULE, clip_grad=clip, moments=moments)
    trainer = Trainer(MODELS["deepseek"], parallel, world, seed=7, adam=adam)
    assert all(isinstance(part.optimizer, AdamW) for part in trainer.optimizer.chained_optimizers)
    assert clip_grads.l2_norm_impl is l2_norm
    step = functools.partial(ChainedOptimizer.step, trainer.optimizer) if megatron else trainer.optimizer.step
    gradients, touched = [], []

    def stepping() -> Any:
        gradients.append(gradient_pieces(trainer))
        buffers = [b.grad_data for w in trainer.wrapped for b in (*w.buffers, *w.expert_parallel_buffers)]
        before = [x.clone() for x in buffers]
        result = step()
        touched.append(not all(torch.equal(a, b) for a, b in zip(before, buffers, strict=True)))
        return result

    trainer.optimizer.step = stepping
    weights, metrics = [pieces(trainer)], []
    norm = clip_grads.l2_norm_impl
    clip_grads.l2_norm_impl = local_multi_tensor_l2_norm if megatron else norm
    try:
        for _ in range(3):
            metrics.append(trainer.train_step(own_part(problem.batches(), world), LOSSES["supervised"], LEARNING_RATE))
            weights.append(pieces(trainer))
    finally:
        clip_grads.l2_norm_impl = norm
    return {"gradients": gradients, "weights": weights, "metrics": metrics, "touched": any(touched)}


def whole(ranks: list[dict[str, Any]], what: str, step: int) -> dict[str, torch.Tensor]:
    return assemble([piece for rank in ranks for piece in rank[what][step]])


@pytest.mark.parametrize(
    ("layout", "clip"),
    [("one process", TIGHT), ("one process", LOOSE), ("one process", OFF), ("EP2", TIGHT), ("EP2", LOOSE)],
)
def test_steps_are_torchs_in_float64(layout: str, clip: float, problem: Problem, pools: Any) -> None:
    if layout == "one process":
        ranks = [steps({}, problem, clip)]
    else:
        ranks = pools[2].run(steps, LAYOUTS[layout], problem, clip)
    names = whole(ranks, "gradients", 0)
    weights = {key: torch.nn.Parameter(w.double()) for key, w in whole(ranks, "weights", 0).items() if key in names}
    # Megatron decays matrices, not norms and biases.
    groups = [
        {"params": [w for w in weights.values() if (w.dim() > 1) == decayed], "weight_decay": decay}
        for decayed, decay in ((True, RULE["weight_decay"]), (False, 0.0))
    ]
    betas = (RULE["beta1"], RULE["beta2"])
    adamw = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=betas, eps=RULE["eps"])
    worst = 0.0
    for step in range(3):
        for key, gradient in whole(ranks, "gradients", step).items():
            weights[key].grad = gradient.double()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), clip or float("inf"))
        assert TIGHT < 0.5 * norm and norm < LOOSE, f"seed {SEED}: the norm is {norm}"
        adamw.step()
        after = whole(ranks, "weights", step + 1)
        for rank in ranks:
            assert rank["metrics"][step]["grad_norm"] == pytest.approx(float(norm), rel=2e-6)
        for key, wanted in weights.items():
            error = float((after[key].double() - wanted).abs().max()) / max(1.0, float(wanted.abs().max()))
            worst = max(worst, error)
            assert error < 1e-6, f"seed {SEED}, step {step}, {key}: {error}"
    assert not any(rank["touched"] for rank in ranks), "the gradients stay as they were"
    print(f"seed {SEED}, {layout}, clip {clip}: {worst:.1e}")


def ours_and_megatrons(layout: dict[str, Any], problem: Problem, clip: float) -> tuple[dict[str, Any], dict[str, Any]]:
    return steps(layout, problem, clip), steps(layout, problem, clip, megatron=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_megatrons_own(layout: str, problem: Problem, pools: Any) -> None:
    ranks = pools[2].run(ours_and_megatrons, LAYOUTS[layout], problem, TIGHT)
    for ours, theirs in ranks:
        for a, b in zip(ours["metrics"], theirs["metrics"], strict=True):
            same_metrics(a, b, 1e-5)
        assert theirs["touched"] and not ours["touched"]
    before, after = (whole([theirs for _, theirs in ranks], "weights", step) for step in (0, -1))
    change = {key: value - before[key] for key, value in after.items()}
    worst = compare(after, [ours["weights"][-1] for ours, _ in ranks], 1e-4, change)
    print(f"seed {SEED}, {layout}: {worst:.1e}")


# ------------------------------------------------------------------------------------------------- moments in bfloat16


def moment_bytes(trainer: Trainer) -> set[int]:
    states = [s for part in trainer.optimizer.chained_optimizers for s in part.optimizer.state.values()]
    assert states and all(s.keys() == {"exp_avg", "exp_avg_sq"} for s in states)
    return {x.element_size() for s in states for x in s.values()}


def trained(moments: str, problem: Problem, count: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a dense model, which has no choice of experts to jump, and its weights before and after."""
    parallel = ParallelConfig()
    adam = AdamConfig(moments=moments)
    trainer = Trainer(MODELS["latent_dense"], parallel, join(parallel), seed=7, adam=adam)
    assert moment_bytes(trainer) == {2 if moments == "bfloat16" else 4}
    before = assemble(pieces(trainer))
    losses = [trainer.train_step(problem.batches(), LOSSES["supervised"], 3e-3)["loss"] for _ in range(count)]
    assert moment_bytes(trainer) == {2 if moments == "bfloat16" else 4}
    return losses, {key: value - before[key] for key, value in assemble(pieces(trainer)).items()}


def test_bfloat16_moments_train_as_float32_ones(problem: Problem) -> None:
    losses, ways = {}, {}
    for moments in ("float32", "bfloat16"):
        losses[moments], way = trained(moments, problem, 12)
        ways[moments] = torch.cat([x.flatten() for x in way.values()])
    apart = float((ways["bfloat16"] - ways["float32"]).norm() / ways["float32"].norm())
    gap = max(abs(a - b) for a, b in zip(losses["bfloat16"], losses["float32"], strict=True))
    print(f"seed {SEED}: {apart:.2e} of the way gone, losses within {gap:.1e}")
    assert losses["float32"][-1] < 0.7 * losses["float32"][0]
    assert 0 < apart < 0.005 and gap < 1e-3


def resumable(layout: dict[str, Any], moments: str, seed: int) -> Trainer:
    parallel = ParallelConfig(**layout)
    adam = AdamConfig(**RULE, clip_grad=TIGHT, moments=moments)
    return Trainer(MODELS["deepseek"], parallel, join(parallel), seed=seed, adam=adam)


def third_step(trainer: Trainer, problem: Problem) -> dict[str, Any]:
    saved = pieces(trainer)
    metrics = trainer.train_step(own_part(problem.batches(), trainer.world), LOSSES["supervised"], LEARNING_RATE)
    return {"saved": saved, "metrics": metrics, "after": pieces(trainer), "bytes": moment_bytes(trainer)}


def save_and_go_on(layout: dict[str, Any], moments: str, problem: Problem, folder: str) -> dict[str, Any]:
    """Collective: saves after two steps, then takes a third."""
    trainer = resumable(layout, moments, 7)
    for _ in range(2):
        trainer.train_step(own_part(problem.batches(), trainer.world), LOSSES["supervised"], LEARNING_RATE)
    checkpoint.save(trainer, folder, {})
    return third_step(trainer, problem)


def load_and_go_on(layout: dict[str, Any], moments: str, problem: Problem, folder: str) -> dict[str, Any]:
    """Collective: another model reads the checkpoint and takes the third step."""
    trainer = resumable(layout, moments, 99)
    checkpoint.load(trainer, folder, optimizer=True)
    return third_step(trainer, problem)


@pytest.fixture(scope="module")
def home(problem: Problem, tmp_path_factory: Any) -> tuple[str, dict[str, Any]]:
    """(folder, what the run did that wrote it) of one process with moments in bfloat16."""
    folder = str(tmp_path_factory.mktemp("home") / "checkpoint")
    return folder, save_and_go_on({}, "bfloat16", problem, folder)


@pytest.mark.parametrize("name", ["one process", "DP2", "EP2"])
def test_resume_with_bfloat16_moments(name: str, problem: Problem, home: Any, pools: Any, tmp_path: Path) -> None:
    """Bit by bit in the layout that wrote it, and on in another from the same numbers."""
    folder, wanted = str(tmp_path / "checkpoint"), {what: assemble(home[1][what]) for what in ("saved", "after")}
    if name == "one process":
        straight, resumed = [home[1]], [load_and_go_on({}, "bfloat16", problem, home[0])]
    else:
        straight, resumed = (
            pools[2].run(function, LAYOUTS[name], "bfloat16", problem, folder)
            for function in (save_and_go_on, load_and_go_on)
        )
        change = {key: value - wanted["saved"][key] for key, value in wanted["after"].items()}
        there = pools[2].run(load_and_go_on, LAYOUTS[name], "bfloat16", problem, home[0])
        back = load_and_go_on({}, "bfloat16", problem, folder)
        compare(wanted["saved"], [rank["saved"] for rank in there], 0.0)
        on = compare(wanted["after"], [rank["after"] for rank in there], 1e-3, change)
        home_again = compare(wanted["after"], [back["after"]], 1e-2, change)  # moments rounded from other last bits
        print(f"seed {SEED}, {name}: {on:.1e}, {home_again:.1e}")
    for before, after in zip(straight, resumed, strict=True):
        assert before["bytes"] == after["bytes"] == {2}
        assert before["metrics"] == after["metrics"], f"seed {SEED}"
        for what in ("saved", "after"):
            for a, b in zip(before[what], after[what], strict=True):
                assert a[:3] == b[:3] and torch.equal(a[3], b[3]), f"seed {SEED}, {what}: {a[0]}"


def test_a_checkpoint_of_other_moments_is_rounded(problem: Problem, tmp_path: Path) -> None:
    """What was saved in float32 goes on in bfloat16, from the nearest numbers."""
    saved, loaded = resumable({}, "float32", 7), resumable({}, "bfloat16", 99)
    saved.train_step(problem.batches(), LOSSES["supervised"], LEARNING_RATE)
    checkpoint.save(saved, tmp_path / "checkpoint", {})
    checkpoint.load(loaded, tmp_path / "checkpoint", optimizer=True)
    assert (moment_bytes(saved), moment_bytes(loaded)) == ({4}, {2})
    count = 0
    for ours, theirs in zip(loaded.optimizer.chained_optimizers, saved.optimizer.chained_optimizers, strict=True):
        groups = zip(ours.optimizer.param_groups, theirs.optimizer.param_groups, strict=True)
        for p, q in ((p, q) for a, b in groups for p, q in zip(a["params"], b["params"], strict=True)):
            for name, value in theirs.optimizer.state[q].items():
                assert torch.equal(ours.optimizer.state[p][name], value.bfloat16())
                count += int(value.count_nonzero())
    assert count


# ------------------------------------------------------------------------------------------------------- in host memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_offloading_changes_no_bit(dtype: str, problem: Problem, tmp_path: Path, monkeypatch: Any) -> None:
    """Moments and master weights go to host memory between steps, and into checkpoints from there."""
    moved: list[torch.Tensor] = []

    def host_copy(x: torch.Tensor) -> torch.Tensor:
        x, poisoned = x.clone(), x
        poisoned.fill_(torch.nan)  # on a GPU this would be free memory by now
        moved.append(x)
        return x

    monkeypatch.setattr(optimizer, "host_copy", host_copy)
    results = []
    for offload in (False, True):
        parallel = ParallelConfig(dtype=dtype)
        adam = AdamConfig(**RULE, clip_grad=TIGHT, offload=offload)
        trainer, again = (Trainer(MODELS["latent_dense"], parallel, join(parallel), seed=s, adam=adam) for s in (7, 8))
        for _ in range(2):
            metrics = [trainer.train_step(problem.batches(), LOSSES["supervised"], LEARNING_RATE)]
        folder = tmp_path / f"{dtype} {offload}"
        checkpoint.save(trainer, folder, {})
        checkpoint.load(again, folder, optimizer=True)
        assert trainer.optimizer.on_host == again.optimizer.on_host == offload  # for a rollout that comes next
        for one in (trainer, again):
            metrics.append(one.train_step(problem.batches(), LOSSES["supervised"], LEARNING_RATE))
        assert trainer.optimizer.on_host == again.optimizer.on_host == offload
        results.append((metrics, assemble(pieces(trainer)), assemble(pieces(again))))
    masters = 1 if dtype == "bfloat16" else 0
    parameters = len(list(trainer.chunks[0].parameters()))
    assert len(moved) >= 6 * (2 + masters) * parameters
    (metrics, *plain), (metrics_2, *offloaded) = results
    assert metrics == metrics_2
    for key, value in plain[0].items():
        assert all(torch.equal(value, other[key]) for other in (plain[1], *offloaded)), key
