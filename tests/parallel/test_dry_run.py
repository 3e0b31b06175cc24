"""Dry runs: parameters of the whole of V3, and for small models the same bytes, FLOPs and collectives as the run itself
on real processes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
import torch.distributed as dist

from r1.engine.config import load_config
from r1.parallel import world as worlds
from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.dry_run import _loss, _micro_batch, _names_of, dry_run
from r1.parallel.ledger import Ledger
from r1.parallel.planner.memory import stage_counts
from r1.parallel.trainer import AdamConfig, Trainer
from tests.parallel.tiny import MODELS

MAIN, BIASES, MTP = 671_026_404_352, 14_848, 11_610_068_224
LENGTH, TOKENS = 8, 32


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process that has joined no world."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


def count_whole_model(
    model: ModelConfig, parallel: ParallelConfig, world_size: int
) -> tuple[dict[str, int], list[int]]:
    """Elements of every tensor that one rank of each pipeline stage has a part of; and each rank's own parameters."""
    tensors, own = {}, []
    for stage in range(parallel.pipeline):
        run = dry_run(
            model, parallel, rank=stage * world_size // parallel.pipeline, world_size=world_size, adam=AdamConfig(),
            kind="supervised", sequence_length=256, tokens_per_micro_batch=256, micro_batches=parallel.pipeline,
        )  # fmt: skip
        assert run.pipeline_rank == stage
        tensors |= run.tensors
        own.append(run.parameters)
    return tensors, own


@pytest.mark.parametrize("preset", ["r1-671b-h800-512", "v3-671b-h100-1024"])
def test_v3_has_all_its_parameters(preset: str, elsewhere: ProcessPoolExecutor) -> None:
    config = load_config(preset)
    tensors, own = elsewhere.submit(count_whole_model, config.model, config.parallel, config.plan.gpus).result()
    mtp = sum(n for name, n in tensors.items() if name.startswith("mtp."))
    biases = sum(n for name, n in tensors.items() if name.endswith("expert_bias") and not name.startswith("mtp."))
    assert (sum(tensors.values()) - mtp - biases, biases, mtp) == (MAIN, BIASES, MTP)
    # And rank by rank what the planner's formulas count.
    counts, p = stage_counts(config.model, config.parallel), config.parallel
    for rank, parameters in enumerate(own):
        assert parameters == sum(c.dense + c.experts for c in counts[rank :: p.pipeline])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dispatcher": "flex"}, "parallel.dispatcher = flex, wanted alltoall"),
        ({"numerics": "exact"}, "parallel.numerics = exact, wanted fast"),
        ({"expert_tensor": 2}, "parallel.expert_tensor = 2, wanted 1"),
        ({"tensor": 3}, "must divide the world size 2"),
    ],
)
def test_what_a_dry_run_cannot_have(changes: dict[str, Any], said: str, elsewhere: ProcessPoolExecutor) -> None:
    with pytest.raises(ValueError, match=said):
        elsewhere.submit(dry, "deepseek", changes, "supervised", 1, 0).result()


def test_bytes_of_the_replicas_collectives(elsewhere: ProcessPoolExecutor) -> None:
    """Each rank gives its whole gradient, in float32, for its half of the sum; and its half of the weights."""
    run = elsewhere.submit(dry, "llama", {}, "supervised", 1, 0).result()
    size = {c.operation: c.bytes for c in run.collectives if c.operation.endswith("coalesced")}
    padded = run.memory["gradients"]
    assert size == {"reduce_scatter_tensor_coalesced": padded, "allgather_into_tensor_coalesced": padded // 2}


# ------------------------------------------------------------------------------------ against the run on real processes

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "PP2 VPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "CP2": {"context": 2},
    "EP2": {"expert": 2},
    "EP2 selective": {"expert": 2, "recompute": "selective"},
    "EP2 hidden": {"expert": 2, "overlap_expert_exchange": True},
    "TP2 full": {"tensor": 2, "recompute": "full"},
    "TP2 EP2 FP8": {"tensor": 2, "expert": 2, "fp8": "block", "dtype": "bfloat16"},
}


def real_run(model: str, layout: dict[str, Any], kind: Any, micro_batches: int) -> dict[str, Any]:
    """Collective: what a ledger counts of a real step."""
    parallel = ParallelConfig(**layout)
    world = worlds.join(parallel)
    ledger = Ledger(LENGTH)
    ledger.group_names = _names_of(world)
    with ledger:
        trainer = Trainer(MODELS[model], parallel, world, adam=AdamConfig(), value_head=kind == "preference")
        ledger.begin("activations")
        built = ledger.total
        batches = [_micro_batch(TOKENS, LENGTH, kind) for _ in range(micro_batches)]
        for number, batch in enumerate(batches):  # else every token would go to the same experts
            batch.tokens_T.random_(0, 90, generator=torch.Generator().manual_seed(number))
        trainer.train_step(batches, _loss(kind, MODELS[model].vocab_size), 1e-6)
    return {"built": built, "peak": ledger.peak_total, "flops": dict(ledger.flops), "collectives": ledger.collectives()}


def dry(model: str, layout: dict[str, Any], kind: Any, micro_batches: int, rank: int) -> Any:
    return dry_run(
        MODELS[model], ParallelConfig(**layout), rank=rank, world_size=2, adam=AdamConfig(), kind=kind,
        sequence_length=LENGTH, tokens_per_micro_batch=TOKENS, micro_batches=micro_batches,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["supervised", "policy", "preference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dry_run_is_the_run(layout: str, kind: str, pools: Any, elsewhere: ProcessPoolExecutor) -> None:
    if kind != "supervised" and layout not in ("PP2", "TP2 EP2 FP8"):
        pytest.skip("the loss changes the last stage alone")
    chosen, model = LAYOUTS[layout], "deepseek"
    real = pools[2].run(real_run, model, chosen, kind, 4)
    for rank in range(2):
        run = elsewhere.submit(dry, model, chosen, kind, 4, rank).result()
        there = real[rank]
        static = sum(run.memory[name] for name in ("parameters", "gradients", "optimizer"))
        assert static == pytest.approx(there["built"], rel=0.01)
        # The real loads are uneven, and what the kernels have inside is only in the dry run's sum.
        assert run.peak_bytes == pytest.approx(there["peak"], rel=0.10)
        named = lambda calls: {(c.operation, c.group, c.size): (c.calls, c.bytes) for c in calls}
        ours, theirs = named(run.collectives), named(there["collectives"])
        theirs.pop(("broadcast", "pp", 2), None)  # of the metrics, as Python objects
        assert ours.keys() == theirs.keys()
        for key, (calls, size) in theirs.items():
            assert ours[key][0] == calls, key
            tolerance = 0.5 if key[0] == "alltoall_base" else 0.0
            assert ours[key][1] == pytest.approx(size, rel=tolerance), key
        for name, count in there["flops"].items():
            tolerance = 0.5 if "moe" in name or "grouped" in name else 0.0  # rows of uneven loads
            assert run.flops_by_operator[name] == pytest.approx(count, rel=tolerance), name
        assert run.flops_by_operator.keys() == there["flops"].keys()


def test_a_process_of_a_world_cannot_dry_run() -> None:
    worlds.join(ParallelConfig())
    assert dist.is_initialized()
    with pytest.raises(RuntimeError, match="has not joined a world"):
        dry("deepseek", {}, "supervised", 1, 0)


def offloaded(offload: bool) -> Any:
    adam = AdamConfig(moments="bfloat16", offload=offload)
    return dry_run(
        MODELS["llama"], ParallelConfig(dtype="bfloat16"), rank=0, world_size=1, adam=adam, kind="supervised",
        sequence_length=LENGTH, tokens_per_micro_batch=TOKENS, micro_batches=1,
    )  # fmt: skip


def test_offloading_is_seen(elsewhere: ProcessPoolExecutor) -> None:
    kept, gone = (elsewhere.submit(offloaded, offload).result() for offload in (False, True))
    assert kept.memory["optimizer"] == pytest.approx(8 * kept.parameters, rel=1e-3) and kept.host == 0
    assert gone.memory["optimizer"] <= 64 and gone.host == pytest.approx(8 * kept.parameters, rel=1e-3)
    # It comes back for the step.
    assert gone.largest["optimizer"] == pytest.approx(gone.host, rel=1e-3)


def test_bytes_of_a_model_that_one_can_count(elsewhere: ProcessPoolExecutor) -> None:
    run = elsewhere.submit(offloaded, False).result()
    m = MODELS["llama"]
    H, F, D = m.hidden_size, m.ffn_hidden_size, m.qk_head_dim
    layer = 2 * H * m.num_heads * D + 2 * H * m.kv_heads * D + 3 * H * F + 2 * H
    parameters = 2 * m.vocab_size * H + H + m.num_layers * layer
    assert run.parameters == parameters and sum(run.tensors.values()) == parameters
    # Megatron's buffers are padded for every parameter to begin at a multiple of 64.
    for kind, size in (("parameters", 2), ("gradients", 4)):
        assert size * parameters <= run.memory[kind] <= size * (parameters + 64 * len(run.tensors))
    forward = 2 * TOKENS * (m.num_layers * (layer - 2 * H) + m.vocab_size * H)
    attention = 2 * TOKENS * (LENGTH + 1) // 2 * m.num_heads * D * m.num_layers
    assert run.flops == 3 * forward + 2 * attention + 5 * attention
    assert torch.is_grad_enabled()
