"""Impossible models and layouts are refused with one clear sentence."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.trainer import Trainer
from r1.parallel.world import join
from tests.parallel.tiny import MODELS


def test_data_parallelism_is_what_remains() -> None:
    assert ParallelConfig(tensor=2, pipeline=2).data(8) == 2
    assert ParallelConfig(expert=4).data(8) == 8
    assert ParallelConfig(context=2, tensor=2, expert=2).data(4) == 1


@pytest.mark.parametrize(
    ("layout", "size", "message"),
    [
        ({"tensor": 3}, 4, "tensor x pipeline x context = 3 x 1 x 1 = 3 must divide the world size 4"),
        ({"tensor": 2, "pipeline": 2, "context": 2}, 4, "= 8 must divide the world size 4"),
        ({"expert": 3}, 4, "expert x expert_tensor x pipeline = 3 x 1 x 1 = 3 must divide the world size 4"),
        ({"expert": 2, "pipeline": 4}, 4, "= 8 must divide the world size 4"),
        ({"expert_tensor": 8}, 4, "= 8 must divide the world size 4"),
    ],
)
def test_layouts_that_do_not_divide_the_world(layout: dict[str, int], size: int, message: str) -> None:
    with pytest.raises(ValueError, match="must divide the world size") as error:
        ParallelConfig(**layout).data(size)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "layout", "message"),
    [
        ("deepseek", {"tensor": 3}, "parallel.tensor = 3 does not divide model.num_heads = 4"),
        ("deepseek", {"expert": 3}, "parallel.expert = 3 does not divide model.num_experts = 8"),
        ("deepseek", {"expert_tensor": 3}, "parallel.expert_tensor = 3 does not divide model.expert_hidden_size = 16"),
        ("deepseek", {"pipeline": 5}, "parallel.pipeline x virtual_pipeline = 5 leaves stages empty"),
        ("deepseek", {"pipeline": 2, "virtual_pipeline": 4}, "leaves stages empty: model.num_layers = 4"),
        ("deepseek", {"tensor": 2, "sequence": False}, "needs sequence parallelism"),
        ("llama", {"tensor": 4}, "parallel.tensor = 4 does not divide model.num_kv_heads = 2"),
        ("llama", {"expert": 2}, "parallel.expert = 2 needs a mixture of experts"),
        ("llama", {"expert_tensor": 2}, "needs a mixture of experts"),
        ("latent_dense", {"expert": 2}, "needs a mixture of experts"),
    ],
)
def test_layouts_that_do_not_divide_the_model(model: str, layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="parallel") as error:
        ParallelConfig(**layout).check_model(MODELS[model])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_layouts_that_fit() -> None:
    for model, layout in (
        ("deepseek", {"tensor": 4, "expert": 8, "pipeline": 2, "virtual_pipeline": 2}),
        ("latent_dense", {"tensor": 2, "sequence": False}),
        ("llama", {"tensor": 2, "sequence": False, "context": 4}),
    ):
        ParallelConfig(**layout).check_model(MODELS[model])


def test_virtual_pipeline_needs_a_pipeline() -> None:
    with pytest.raises(ValueError, match="virtual_pipeline = 2 needs parallel.pipeline > 1"):
        ParallelConfig(virtual_pipeline=2).check_model(MODELS["deepseek"])


def test_joining_refuses_before_anything_changes() -> None:
    world = join(ParallelConfig())
    with pytest.raises(ValueError, match="must divide the world size 1"):
        join(ParallelConfig(tensor=2))
    assert Trainer(MODELS["llama"], ParallelConfig(), world, seed=0).chunks
    assert join(ParallelConfig()).groups.tp.size() == 1


def uneven_gathering() -> str:
    try:
        join(ParallelConfig(expert_tensor=2))
    except ValueError as error:
        return str(error)
    return "joined"


def test_what_gloo_cannot_gather(pools: Any) -> None:
    for message in pools[2].run(uneven_gathering):
        assert "use dispatcher = allgather" in message and "\n" not in message


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ("deepseek", {"kv_lora_rank": 0}, "kv_lora_rank = 0 must be positive"),
        ("deepseek", {"qk_rope_head_dim": 3}, "qk_rope_head_dim = 3 must be even"),
        ("deepseek", {"experts_per_token": 9}, "experts_per_token = 9 must be between 1 and num_experts = 8"),
        ("deepseek", {"expert_hidden_size": 0}, "expert_hidden_size = 0 must be positive"),
        ("deepseek", {"num_expert_groups": 3}, "num_expert_groups = 3 must divide num_experts = 8"),
        ("deepseek", {"groups_per_token": 5}, "groups_per_token = 5 exceeds num_expert_groups = 4"),
        ("deepseek", {"experts_per_token": 5}, "experts_per_token = 5 exceeds the 4 experts"),
        ("deepseek", {"num_dense_layers": 5}, "num_dense_layers = 5 exceeds num_layers = 4"),
        ("llama", {"num_experts": 8}, "num_experts and num_mtp_layers must be 0"),
        ("llama", {"num_kv_heads": 3}, "num_heads = 4 must be a multiple of num_kv_heads = 3"),
        ("llama", {"hidden_size": 30}, "hidden_size = 30 must be a multiple of num_heads = 4"),
        ("llama", {"hidden_width": 30}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_models(model: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        ModelConfig(**(MODELS[model].model_dump() | changes))
    assert message in str(error.value)


def test_unknown_and_impossible_layout_values() -> None:
    for bad in ({"tensors": 2}, {"tensor": 0}, {"dispatcher": "deepep"}, {"timeout_seconds": 0}):
        with pytest.raises(ValidationError):
            ParallelConfig(**bad)
