"""Weights of Hugging Face checkpoints into our models, and ours gathered by their names, in any layout.

A process reads only what lies in its own shards, a band of rows at a time. huggingface.py holds the names, export.py
writes checkpoints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import apply_factories
from torch import Tensor

from r1.parallel.config import ModelConfig
from r1.parallel.folders import CheckpointError, recover
from r1.parallel.fp8 import forget_quantized
from r1.parallel.hf_reader import SUMS, Source, checksums, damaged
from r1.parallel.huggingface import Part, hf_config, model_config_from_hf, parts
from r1.parallel.model import data_shape, sharded_state
from r1.parallel.trainer import Trainer

__all__ = [
    "Dtype",
    "gathered",
    "hf_config",
    "is_hugging_face",
    "load_hf",
    "model_config_from_hf",
    "read_config",
]

# fp8: the layers' matrices in blocks with scales, as DeepSeek-V3 is published, and the rest in bfloat16.
Dtype = Literal["fp8", "bfloat16", "float16", "float32"]


Tell = Callable[[int, int], None]


def nothing(done: int, total: int) -> None:
    pass


# What goes with the weights from an import to an export. `SCALES` is ours: those of the FP8 blocks that were read.
SCALES = "scales.safetensors"
CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)

# A model may read fewer positions, or leave multi-token prediction out; and this is for new weights only.
_MAY_DIFFER = {"max_position_embeddings", "num_nextn_predict_layers", "initializer_range"}

# ------------------------------------------------------------------------------------------------ loading


def is_hugging_face(folder: Path) -> bool:
    """Whether this is a Hugging Face folder, or would be one if it were whole, and no checkpoint of ours."""
    return (recover(folder, SUMS) / "config.json").is_file() and not (folder / "state.json").exists()


def read_config(folder: str | Path) -> tuple[ModelConfig, Dtype]:
    """The model that a Hugging Face folder holds, and how it stores it: the widest type of its weights.

    CheckpointError where the folder is not whole, or the model not one of ours.
    """
    folder = recover(Path(folder), SUMS)
    source = Source(folder)
    try:
        model = model_config_from_hf(_json(folder / "config.json"))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    return model, _stored_dtype(source)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}, which says what model it is") from None


def _stored_dtype(source: Source) -> Dtype:
    found = {dtype for name, dtype in source.dtypes.items() if not name.endswith("e_score_correction_bias")}
    if "F8_E4M3" in found:
        return "fp8"
    narrow: dict[str, Dtype] = {"BF16": "bfloat16", "F16": "float16"}
    return narrow.get(found.pop(), "float32") if len(found) == 1 else "float32"


@torch.no_grad()
def load_hf(trainer: Trainer, source: Mapping[str, Tensor] | str | Path, tell: Tell = nothing) -> dict[str, bytes]:
    """Fill this process's shards from a Hugging Face state dict or a folder of safetensors files; returns, on the main
    process, the folder's other files (configuration, tokenizer, the scales of FP8 blocks) for an export to carry.

    Collective, in any layout. CheckpointError, with the weights as they were, where a tensor is missing, is not one
    of this model's, or has another shape, or a file is not what its checksum says; and, when some weights are loaded,
    where a value is not finite. `tell` is called with (tensors done, tensors in all), of this process.
    """
    world = trainer.world
    read = Source(source if isinstance(source, Mapping) else recover(Path(source), SUMS))
    if read.folder is not None and (read.folder / "config.json").is_file():
        _check_config(trainer.model_config, read.folder)
    tiles = _tiles(trainer, read)
    if read.folder is not None:
        sums = sorted(checksums(read.folder).items())
        agree(damaged(read.folder, dict(sums[world.rank :: world.size])))
    agree(_unlike_copy(tiles, read) if world.is_main else None)
    views = [(shard.key, tuple(shard.global_offset), shard.data.view(data_shape(shard))) for shard in _shards(trainer)]
    jobs = [
        (read.place(part.name), part, view, both)
        for key, offset, view in views
        for part in tiles[key]
        if not part.copy and (both := _overlap(part, offset, tuple(view.shape)))
    ]
    problem = None
    try:
        for number, (_, part, view, (here, there)) in enumerate(sorted(jobs, key=lambda job: job[0])):
            tell(number, len(jobs))
            target = view[here]
            read.copy_to(target.T if part.transposed else target, part.name, _turned(part, there))
    except CheckpointError as error:
        problem = str(error)
    agree(problem)
    if trainer.optimizer is not None:
        trainer.optimizer.reload_model_params()
    forget_quantized(trainer.chunks)
    return _carried(read) if world.is_main and read.folder is not None else {}


def _check_config(model: ModelConfig, folder: Path) -> None:
    """CheckpointError where the folder's weights are of a model that computes something else."""
    theirs, ours = hf_config(read_config(folder)[0]), hf_config(model)
    for name in sorted((theirs.keys() | ours.keys()) - _MAY_DIFFER):
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"{folder / 'config.json'} has {name} = {theirs.get(name)}, this model has {ours.get(name)}"
            )


def _tiles(trainer: Trainer, read: Source) -> dict[str, list[Part]]:
    """{our tensor: the Hugging Face tensors in it}; CheckpointError where these are not the ones of the checkpoint."""
    model = trainer.model_config
    tiles = {key: parts(model, key, shape) for key, (shape, _) in catalogue_of(trainer).items()}
    for part in (part for found in tiles.values() for part in found if not part.copy):
        if part.name not in read.shapes:
            raise CheckpointError(f"the Hugging Face checkpoint has no tensor {part.name}, which this model needs")
        if read.shapes[part.name] != part.shape:
            raise CheckpointError(
                f"{part.name} has shape {read.shapes[part.name]} in the Hugging Face checkpoint;"
                f" this model wants {part.shape}"
            )
    known = {part.name for found in tiles.values() for part in found}
    for name in sorted(read.shapes.keys() - known):
        if not _may_be_left_out(model, name, read.shapes):
            raise CheckpointError(f"the Hugging Face checkpoint has a tensor {name}, for which this model has no place")
    return tiles


def _unlike_copy(tiles: dict[str, list[Part]], read: Source) -> str | None:
    for original, *others in tiles.values():
        for part in others:
            if part.copy and part.name in read.shapes and not read.same(part.name, original.name):
                return f"{part.name} is not the same as {original.name}: this model keeps one of them for both"
    return None


def _may_be_left_out(model: ModelConfig, name: str, names: Mapping[str, Any]) -> bool:
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.tie_embeddings):
        return True
    # MTP layers that this model does not have, but no main layer.
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= model.num_layers and f"{layer[0]}eh_proj.weight" in names


def agree(problem: str | None) -> None:
    """CheckpointError on every process for what the first of them found. Collective."""
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found:
            raise CheckpointError(found)


def _overlap(
    part: Part, offset: tuple[int, ...], shape: tuple[int, ...]
) -> tuple[tuple[int | slice, ...], tuple[slice, ...]] | None:
    """Where the part and a shard (of `shape`, at `offset` of the whole tensor) meet: (index in the shard, index in
    the part, its axes as in ours); None where they do not."""
    here: list[int | slice] = []
    there: list[slice] = []
    for place, start, size in zip(part.place, offset, shape, strict=True):
        low, high = (place, place + 1) if isinstance(place, int) else (place.start, place.stop)
        first, last = max(low, start), min(high, start + size)
        if first >= last:
            return None
        if isinstance(place, int):
            here.append(place - start)
        else:
            here.append(slice(first - start, last - start))
            there.append(slice(first - low, last - low))
    return tuple(here), tuple(there)


def _turned(part: Part, index: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(reversed(index)) if part.transposed else index


def _carried(read: Source) -> dict[str, bytes]:
    assert read.folder is not None
    files = {name: (read.folder / name).read_bytes() for name in CARRIED if (read.folder / name).is_file()}
    dtype = _stored_dtype(read)
    config = {k: v for k, v in json.loads(files.get("config.json", b"{}")).items() if k not in ("dtype", "auto_map")}
    config["torch_dtype"] = "bfloat16" if dtype == "fp8" else dtype  # of the tensors, whatever the file said
    files["config.json"] = json.dumps(config).encode()
    if dtype == "fp8":
        files[SCALES] = read.scales()
    return files


# ------------------------------------------------------------------------------------------------ gathering, export


def _shards(trainer: Trainer) -> list[ShardedTensor]:
    if trainer.value_head:
        raise ValueError("a reward model has a value head, which has no Hugging Face name; convert a language model")
    trainer.gather_weights()
    found = []
    for state in sharded_state(trainer.chunks, trainer.world).values():
        apply_factories(state)
        found += [t for t in nested_values(state) if isinstance(t, ShardedTensor) and t.data is not None]
    return found


def catalogue_of(trainer: Trainer) -> dict[str, tuple[tuple[int, ...], list]]:
    """{our tensor: (whole shape, [(rank, offset, slice's shape, type)])} over all processes, replicas left out."""
    mine = [
        (t.key, tuple(t.global_shape), tuple(t.global_offset), data_shape(t), t.data.dtype)
        for t in _shards(trainer)
        if is_main_replica(t.replica_id)
    ]
    everyone: list[Any] = [None] * trainer.world.size
    dist.all_gather_object(everyone, mine)
    catalogue: dict[str, tuple[tuple[int, ...], list]] = {}
    for rank, theirs in enumerate(everyone):
        for key, whole, *place in theirs:
            catalogue.setdefault(key, (whole, []))[1].append((rank, *place))
    return catalogue


@torch.no_grad()
def gathered(trainer: Trainer, parts_of: Callable[[str, tuple[int, ...]], list[Part]]) -> Iterator[tuple[Part, Tensor]]:
    """The parts of our tensors (by name and whole shape), whole, one at a time, on the main process's device; nothing
    on the others. Collective: every process runs it to its end."""
    rank, device = trainer.world.rank, trainer.world.device
    mine = {(t.key, tuple(t.global_offset)): t for t in _shards(trainer) if is_main_replica(t.replica_id)}
    for key, (shape, slices) in catalogue_of(trainer).items():
        for part in parts_of(key, shape):
            whole = torch.empty(part.shape, dtype=slices[0][-1], device=device) if trainer.world.is_main else None
            for owner, offset, size, dtype in slices:
                both = _overlap(part, offset, size)
                if both is None:
                    continue
                here, there = both
                data = mine[key, offset].data.detach().view(size)[here].contiguous() if owner == rank else None
                if whole is None:
                    if data is not None:
                        dist.send(data, dst=0)
                    continue
                if data is None:
                    data = torch.empty([s.stop - s.start for s in there], dtype=dtype, device=device)
                    dist.recv(data, src=owner)
                whole[_turned(part, there)] = data.T if part.transposed else data
            if whole is not None:
                yield part, whole
