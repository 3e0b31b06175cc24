"""Checkpoints: written in one layout and read in another, exact in the same one, and refused when they are damaged."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing

from r1.parallel import checkpoint, folders
from r1.parallel.checkpoint import CheckpointError
from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.packing import MicroBatch
from r1.parallel.trainer import Trainer
from r1.parallel.world import join
from tests.parallel.spawn import ProcessPool
from tests.parallel.tiny import (
    ADAM,
    LEARNING_RATE,
    LOSSES,
    MODELS,
    Problem,
    assemble,
    compare,
    make_problem,
    own_part,
    pieces,
    same_metrics,
)

SEED = random.SystemRandom().randrange(2**31)
ONE = ParallelConfig()

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "DP2": (2, {}),
    "DP2 overlapped": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "EP2": (2, {"expert": 2}),
    "CP2": (2, {"context": 2}),
    "ETP2": (2, {"tensor": 2, "expert_tensor": 2}),
    "EP2 PP2": (4, {"expert": 2, "pipeline": 2}),
}


@pytest.fixture(scope="module")
def problem() -> Problem:
    print(f"seed {SEED}")
    draw = random.Random(SEED)
    return make_problem(SEED, [draw.randint(2, 16) for _ in range(4)], [[0, 1], [2, 3]])


@pytest.fixture(scope="module")
def run(pools: dict[int, ProcessPool]) -> Callable[..., list[Any]]:
    """Calls a collective function in a world of so many processes."""

    def call(processes: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [function(*args)] if processes == 1 else pools[processes].run(function, *args)

    return call


def _trainer(model: str, layout: dict[str, Any], seed: int, loss: str = "supervised") -> Trainer:
    parallel = ParallelConfig(**layout)
    return Trainer(MODELS[model], parallel, join(parallel), seed=seed, adam=ADAM, value_head=loss == "preference")


def _step(trainer: Trainer, batches: list[MicroBatch], loss: str) -> dict[str, float]:
    return trainer.train_step(own_part(batches, trainer.world), LOSSES[loss], LEARNING_RATE)


def two_steps_save_and_a_third(
    model: str, layout: dict[str, Any], batches: list[MicroBatch], loss: str, folder: str
) -> dict[str, Any]:
    """Collective: saves after two steps, then goes on."""
    trainer = _trainer(model, layout, 7, loss)
    for _ in range(2):
        _step(trainer, batches, loss)
    checkpoint.save(trainer, folder, {"step": 2})
    saved = pieces(trainer)
    metrics = _step(trainer, batches, loss)
    return {"saved": saved, "metrics": metrics, "after": pieces(trainer)}


def load_and_a_third_step(
    model: str, layout: dict[str, Any], batches: list[MicroBatch], loss: str, folder: str
) -> dict[str, Any]:
    """Collective: a new model of other weights reads the checkpoint with its optimiser, and takes the third step."""
    trainer = _trainer(model, layout, 99, loss)
    if trainer.world.size == 1:
        _step(trainer, batches, loss)  # an optimiser that has moments of its own must forget them
    state = checkpoint.load(trainer, folder, optimizer=True)
    loaded = pieces(trainer)
    metrics = _step(trainer, batches, loss)
    return {
        "state": state,
        "steps_taken": trainer.steps_taken,
        "saved": loaded,
        "metrics": metrics,
        "after": pieces(trainer),
    }


def load_weights(model: str, layout: dict[str, Any], loss: str, folder: str) -> list[Any]:
    """Collective: weights only."""
    trainer = _trainer(model, layout, 99, loss)
    checkpoint.load(trainer, folder)
    return pieces(trainer)


@pytest.fixture(scope="module")
def saved_by_one(problem: Problem, tmp_path_factory: Any) -> Any:
    """(model, loss) -> (folder, what the run that wrote it did next), on one process."""
    known: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}

    def make(model: str = "deepseek", loss: str = "supervised") -> tuple[str, dict[str, Any]]:
        if (model, loss) not in known:
            folder = str(tmp_path_factory.mktemp("saved") / "checkpoint")
            result = two_steps_save_and_a_third(model, {}, problem.batches(), loss, folder)
            known[model, loss] = (folder, result | {n: assemble(result[n]) for n in ("saved", "after")})
        return known[model, loss]

    return make


CASES = [(name, "deepseek", "supervised") for name in LAYOUTS]
CASES += [("PP2", "deepseek_3_layers", "supervised"), ("PP2", "qwen2", "supervised"), ("TP2", "llama", "supervised")]
CASES += [("TP2", "deepseek", "preference"), ("PP2", "qwen2", "preference")]


@pytest.mark.parametrize(("name", "model", "loss"), CASES)
def test_resume_is_exact_and_the_layout_may_change(
    name: str, model: str, loss: str, problem: Problem, run: Any, saved_by_one: Any, tmp_path: Path
) -> None:
    processes, layout = LAYOUTS[name]
    batches = problem.batches()
    home, wanted = saved_by_one(model, loss)
    change = {key: value - wanted["saved"][key] for key, value in wanted["after"].items()}
    # The same layout: every bit.
    folder = str(tmp_path / "checkpoint")
    straight = run(processes, two_steps_save_and_a_third, model, layout, batches, loss, folder)
    resumed = run(processes, load_and_a_third_step, model, layout, batches, loss, folder)
    for before, after in zip(straight, resumed, strict=True):
        assert after["state"]["step"] == 2 and after["steps_taken"] == 3
        assert after["metrics"] == before["metrics"], f"seed {SEED}"
        for what in ("saved", "after"):
            for (key, _, offset, value), (key_2, _, offset_2, value_2) in zip(before[what], after[what], strict=True):
                assert (key, offset) == (key_2, offset_2)
                assert torch.equal(value, value_2), f"seed {SEED}, {what}: {key}"
    compare(assemble(load_weights(model, {}, loss, folder)), [rank["saved"] for rank in straight], 0.0)
    # From one process to the layout, and from the layout to one process.
    there = run(processes, load_and_a_third_step, model, layout, batches, loss, home)
    back = load_and_a_third_step(model, {}, batches, loss, folder)
    compare(wanted["saved"], [rank["saved"] for rank in there], 0.0)
    for result in (*there, back):
        same_metrics(result["metrics"], wanted["metrics"], 1e-4)
    compare(wanted["after"], [rank["after"] for rank in there], 1e-3, change)
    compare(wanted["after"], [back["after"]], 1e-3, change)


def test_weights_alone_and_their_names_on_disk(run: Any, saved_by_one: Any) -> None:
    folder, wanted = saved_by_one()
    for processes, layout in (LAYOUTS["one process"], LAYOUTS["TP2"]):
        compare(wanted["saved"], run(processes, load_weights, "deepseek", layout, "supervised", folder), 0.0)
    plain = dist_checkpointing.load_plain_tensors(str(Path(folder) / "shards"))
    for key, value in wanted["saved"].items():
        assert torch.equal(plain[key].reshape(value.shape), value), key


def reference_round_trip(folder: str) -> tuple[list[Any], list[Any], list[Any]]:
    """Collective: a policy and its reference go into one checkpoint and come out again."""
    policy, reference = (_trainer("deepseek", {"pipeline": 2, "virtual_pipeline": 2}, seed) for seed in (1, 2))
    checkpoint.save(policy, folder, {}, reference=reference)
    policy_2, reference_2 = (_trainer("deepseek", {"pipeline": 2, "virtual_pipeline": 2}, seed) for seed in (3, 4))
    checkpoint.load(policy_2, folder, optimizer=True, reference=reference_2)
    same = [(pieces(a), pieces(b)) for a, b in ((policy, policy_2), (reference, reference_2))]
    return [torch.equal(x[3], y[3]) for a, b in same for x, y in zip(a, b, strict=True)], same[0][0], same[1][0]


def test_the_reference_travels_with_the_policy(run: Any, tmp_path: Path) -> None:
    for equal, policy, reference in run(2, reference_round_trip, str(tmp_path / "checkpoint")):
        assert equal and all(equal)
        assert not all(torch.equal(a[3], b[3]) for a, b in zip(policy, reference, strict=True))


# --------------------------------------------------------------------------------------------------------- refusals


def _shard(folder: Path) -> Path:
    return max((folder / "shards").glob("*.distcp"), key=lambda path: path.stat().st_size)


def _truncate(folder: Path) -> None:
    with _shard(folder).open("r+b") as file:
        file.truncate(_shard(folder).stat().st_size - 100)


def _flip(folder: Path) -> None:
    path = _shard(folder)
    data = bytearray(path.read_bytes())
    data[random.Random(SEED).randrange(len(data))] ^= 0x10
    path.write_bytes(bytes(data))


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a truncated shard": (_truncate, "bytes where"),
    "a missing shard": (lambda folder: _shard(folder).unlink(), "is missing"),
    "a flipped byte": (_flip, "does not match its checksum"),
    "no metadata": (lambda folder: (folder / "shards" / ".metadata").unlink(), "is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
    "half a manifest": (lambda folder: _half(folder / "manifest.json"), "manifest.json is not readable"),
    "another manifest": (lambda folder: (folder / "manifest.json").write_text("[1]"), "manifest.json is not readable"),
    "no state": (lambda folder: (folder / "state.json").unlink(), "no state.json"),
    "half a state": (lambda folder: _half(folder / "state.json"), "state.json is not JSON"),
    "another state": (lambda folder: (folder / "state.json").write_text('{"step": 1}'), "damaged"),
    "a list for a state": (lambda folder: (folder / "state.json").write_text("[]"), "damaged"),
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "is not a checkpoint"),
    "no folder": (shutil.rmtree, "there is no checkpoint at"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("")), "there is no checkpoint at"),
}


def refused(model: ModelConfig, value_head: bool, layout: dict[str, Any], folder: str, optimizer: bool) -> Any:
    """Collective: (the message, whether the weights are as they were)."""
    parallel = ParallelConfig(**layout)
    trainer = Trainer(model, parallel, join(parallel), seed=5, adam=ADAM, value_head=value_head)
    before = pieces(trainer)
    try:
        checkpoint.load(trainer, folder, optimizer=optimizer)
        message = "it was loaded"
    except CheckpointError as error:
        message = str(error)
    same = all(torch.equal(a[3], b[3]) for a, b in zip(before, pieces(trainer), strict=True))
    return message, same


def _expect_refusal(results: list[tuple[str, bool]], wanted: str) -> None:
    for message, same in results:
        assert wanted in message
        assert "\n" not in message and len(message) < 400, message
        assert same, "the weights changed"


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_refused(kind: str, run: Any, saved_by_one: Any, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved_by_one()[0], folder)
    damage(folder)
    for processes, layout in ((1, {}), (2, {"tensor": 2})):
        _expect_refusal(run(processes, refused, MODELS["deepseek"], False, layout, str(folder), True), message)


@pytest.mark.parametrize(
    ("saved", "changes", "message"),
    [
        ("deepseek", {"hidden_size": 64}, "model.hidden_size = 32, this model has 64"),
        ("deepseek", {"vocab_size": 98}, "model.vocab_size = 96, this model has 98"),
        ("deepseek", {"num_layers": 2}, "model.num_layers = 4, this model has 2"),
        ("deepseek", {"num_experts": 16}, "model.num_experts = 8, this model has 16"),
        ("deepseek", {"num_mtp_layers": 2}, "model.num_mtp_layers = 1, this model has 2"),
        ("deepseek", {"num_mtp_layers": 0}, "model.num_mtp_layers = 1, this model has 0"),
        ("llama", {"head_dim": 16}, "model.head_dim = None, this model has 16"),
        ("llama", {"num_kv_heads": 4}, "model.num_kv_heads = 2, this model has 4"),
        ("llama", {"architecture": "qwen2"}, "model.architecture = llama, this model has qwen2"),
        ("llama", {"tie_embeddings": True}, "model.tie_embeddings = False, this model has True"),
    ],
)
def test_another_models_checkpoint_is_refused(saved: str, changes: dict, message: str, saved_by_one: Any) -> None:
    model = ModelConfig(**(MODELS[saved].model_dump() | changes))
    _expect_refusal([refused(model, False, {}, saved_by_one(saved)[0], False)], message)


def test_other_words_for_the_same_shape_are_accepted(saved_by_one: Any) -> None:
    same = MODELS["llama"].model_copy(update={"head_dim": 8})
    message, unchanged = refused(same, False, {}, saved_by_one("llama")[0], False)
    assert message == "it was loaded" and not unchanged


def test_reward_models_and_language_models_are_not_mixed_up(saved_by_one: Any) -> None:
    _expect_refusal([refused(MODELS["deepseek"], True, {}, saved_by_one()[0], False)], "holds a language model")
    reward = saved_by_one("deepseek", "preference")[0]
    _expect_refusal([refused(MODELS["deepseek"], False, {}, reward, False)], "holds a reward model")


def test_weights_without_their_optimiser_cannot_be_resumed(tmp_path: Path) -> None:
    trainer = _trainer("llama", {}, 1)
    checkpoint.save(trainer, tmp_path / "weights", {}, optimizer=False)
    results = [refused(MODELS["llama"], False, {}, str(tmp_path / "weights"), True)]
    _expect_refusal(results, "has no optimiser state to resume from")


# ----------------------------------------------------------------------------------------------------- killed saves


def save_and_be_killed(folder: str, moving: str) -> None:
    """Replaces a checkpoint and is killed when it is about to rename the folder `moving`."""
    trainer = _trainer("llama", {}, 1)
    checkpoint.save(trainer, folder, {"step": 1})
    rename = Path.rename

    def dying(self: Path, target: Any) -> Any:
        if self.name == moving:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = dying  # type: ignore[method-assign]
    checkpoint.save(trainer, folder, {"step": 2})


@pytest.mark.parametrize(("moving", "step"), [("checkpoint", 1), ("checkpoint.r1-partial", 2)])
def test_a_save_that_was_killed_leaves_a_whole_checkpoint(moving: str, step: int, tmp_path: Path) -> None:
    """The old one, or between the two renames the new one, which is whole by then."""
    folder = tmp_path / "checkpoint"
    pool = ProcessPool(1)
    try:
        with pytest.raises(RuntimeError, match="the process ended"):
            pool.run(save_and_be_killed, str(folder), moving)
    finally:
        pool.kill()
    assert folder.exists() == (moving == "checkpoint"), "it was killed where it was meant to be"
    trainer = _trainer("llama", {}, 2)
    assert checkpoint.load(trainer, folder, optimizer=True)["step"] == step
    checkpoint.save(trainer, folder, {"step": 3})
    assert json.loads((folder / "state.json").read_text())["step"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"], "nothing is left lying about"


def test_a_state_that_is_not_json_harms_nothing(tmp_path: Path) -> None:
    trainer = _trainer("llama", {}, 1)
    checkpoint.save(trainer, tmp_path / "checkpoint", {"step": 1})
    with pytest.raises(TypeError):
        checkpoint.save(trainer, tmp_path / "checkpoint", {"step": object()})
    assert checkpoint.load(trainer, tmp_path / "checkpoint")["step"] == 1


def _kill_writer(folder: str) -> str:
    trainer = _trainer("llama", {}, 1)
    writing = checkpoint.Writing(trainer, folder, {"step": 2})
    os.kill(writing._process.pid, signal.SIGKILL)
    try:
        writing.finish()
    except CheckpointError as error:
        return str(error)
    return "it was written"


def test_a_writer_that_was_killed_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    trainer = _trainer("llama", {}, 1)
    checkpoint.save(trainer, folder, {"step": 1})
    for _ in range(20):  # the process may have been faster than the kill
        message = _kill_writer(str(folder))
        if message != "it was written":
            break
    assert "ended (-9)" in message and "is whole" in message
    assert checkpoint.load(trainer, folder)["step"] in (1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def no_room_for_metadata(folder: str) -> tuple[str, int]:
    """Collective: a save for whose last part the main process's disk has no room; what the next load finds."""
    trainer = _trainer("deepseek", {"expert": 2}, 1)
    checkpoint.save(trainer, folder, {"step": 1})
    probe, told = folders.probe, "it was written"

    def full(place: Path, nbytes: int = 0) -> None:
        if nbytes:  # the probe before Megatron's metadata
            raise OSError(28, "No space left on device")
        probe(place)

    folders.probe = full  # type: ignore[assignment]
    try:
        checkpoint.save(trainer, folder, {"step": 2})
    except CheckpointError as error:
        told = str(error)
    finally:
        folders.probe = probe  # type: ignore[assignment]
    return told, checkpoint.load(trainer, folder)["step"]


def test_what_one_process_cannot_write_all_are_told(run: Any, tmp_path: Path) -> None:
    for told, step in run(2, no_room_for_metadata, str(tmp_path / "checkpoint")):
        assert "rank 0" in told and "No space left on device" in told and "is whole" in told
        assert step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="thesis exists and has no state.json"):
        checkpoint.save(_trainer("llama", {}, 1), tmp_path / "thesis", {})
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def background_and_kept(folder: str, batches: list[MicroBatch]) -> list[Any]:
    """Collective: three saves in the background, each kept when the next takes its name, with steps in between."""
    trainer, path = _trainer("deepseek", {"expert": 2}, 7), Path(folder)
    saved = []
    for step in range(3):
        writing = checkpoint.Writing(trainer, path, {"step": step}, keep=path.with_name(f"kept-{step - 1}"))
        saved.append(pieces(trainer))
        _step(trainer, batches, "supervised")
        while not writing.done():
            pass
        writing.finish()
    same = []
    for step, name in enumerate(("kept-0", "kept-1", "checkpoint")):
        again = _trainer("deepseek", {"expert": 2}, 99)
        assert checkpoint.load(again, path.with_name(name), optimizer=True)["step"] == step
        same += [torch.equal(a[3], b[3]) for a, b in zip(saved[step], pieces(again), strict=True)]
    return same


def test_saves_in_the_background(problem: Problem, run: Any, tmp_path: Path) -> None:
    for same in run(2, background_and_kept, str(tmp_path / "checkpoint"), problem.batches()):
        assert same and all(same)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "kept-0", "kept-1"]
