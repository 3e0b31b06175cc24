"""Weights of Hugging Face checkpoints into our models, and ours gathered by their names, in any layout.

A process reads only what lies in its own shards, a band of rows at a time. huggingface.py holds the names, export.py
writes checkpoints.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import apply_factories
from torch import Tensor

from r1.parallel.agreement import Rounds, Told, agree
from r1.parallel.config import ModelConfig
from r1.parallel.folders import CheckpointError, recover
from r1.parallel.fp8 import forget_quantized
from r1.parallel.hf_reader import SUMS, Source, check_sum, checksums
from r1.parallel.huggingface import Part, differences, model_config_from_hf, parts
from r1.parallel.model import data_shape, sharded_state
from r1.parallel.trainer import Trainer

# fp8: the layers' matrices in blocks with scales, as DeepSeek-V3 is published, and the rest in bfloat16.
Dtype = Literal["fp8", "bfloat16", "float16", "float32"]

BYTES_BETWEEN_MEETINGS = 4 << 30
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
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
)

# ------------------------------------------------------------------------------------------------ loading


def is_hugging_face(folder: Path) -> bool:
    """Whether this is a Hugging Face folder, or would be one if it were whole, and no checkpoint of ours."""
    return (recover(folder, SUMS) / "config.json").is_file() and not (folder / "state.json").exists()


def read_config(folder: str | Path) -> tuple[ModelConfig, Dtype]:
    """The model that a Hugging Face folder holds, and how it stores it: the widest type of its weights.

    CheckpointError where the folder is not whole, or the model not one of ours.
    """
    source = Source(recover(Path(folder), SUMS))
    return _model_of(source), _stored_dtype(source)


def _model_of(source: Source) -> ModelConfig:
    assert source.folder is not None
    path = source.folder / "config.json"
    try:
        model = model_config_from_hf(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckpointError(f"{source.folder} has no config.json, which says what model it is") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    if f"model.layers.{model.num_layers}.eh_proj.weight" not in source.shapes:
        model = model.model_copy(update={"num_mtp_layers": 0})  # transformers saves none, whatever config.json says
    return model


def _stored_dtype(source: Source) -> Dtype:
    aside = ("e_score_correction_bias", "inv_freq")
    found = {dtype for name, dtype in source.dtypes.items() if not name.endswith(aside)}
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
    world, catalogue = trainer.world, catalogue_of(trainer)
    told = Told(lambda error: f"the Hugging Face checkpoint cannot be read: {type(error).__name__}: {error}")
    with told:  # another process's disk may have it otherwise
        read = Source(source if isinstance(source, Mapping) else recover(Path(source), SUMS))
        if read.folder is not None and (read.folder / "config.json").is_file():
            _check_config(trainer, read)
        tiles = _tiles(trainer.model_config, catalogue, read)
        sums = sorted(checksums(read.folder).items()) if read.folder is not None else []
    agree(told.problem)
    rounds = Rounds(world)
    with told:
        for file, value in sums[world.rank :: world.size]:
            rounds.beat()
            check_sum(read.folder / file, value)
        if world.is_main:
            _check_copies(tiles, read)
    rounds.agree(told.problem)
    shards = [(s.key, tuple(s.global_offset), s.data.view(data_shape(s))) for s in _shards(trainer)]
    jobs = [
        (read.place(part.name), part, view, both)
        for key, offset, view in shards
        for part in tiles[key]
        if not part.copy and (both := _overlap(part, offset, tuple(view.shape)))
    ]
    with told:
        for number, (_, part, view, (here, there)) in enumerate(sorted(jobs, key=lambda job: job[0])):
            tell(number, len(jobs))
            rounds.beat()
            target = view[here]
            read.copy_to(target.T if part.transposed else target, part.name, _turned(part, there))
    rounds.agree(told.problem)
    if trainer.optimizer is not None:
        trainer.optimizer.reload_model_params()
    forget_quantized(trainer.chunks)
    return _carried(read) if world.is_main and read.folder is not None else {}


def _check_config(trainer: Trainer, read: Source) -> None:
    """CheckpointError where the folder's weights are of a model that computes something else."""
    model, positions = differences(_model_of(read), trainer.model_config)
    if model:
        raise CheckpointError(f"{read.folder}/config.json has {model[0]}")
    if positions and trainer.world.is_main:
        warnings.warn(f"{read.folder}/config.json has {positions[0]}: a longer context?", stacklevel=3)


def _tiles(model: ModelConfig, catalogue: Mapping[str, Any], read: Source) -> dict[str, list[Part]]:
    """{our tensor: the Hugging Face tensors in it}; CheckpointError where these are not the ones of the checkpoint."""
    tiles = {key: parts(model, key, shape) for key, (shape, _) in catalogue.items()}
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


def _check_copies(tiles: dict[str, list[Part]], read: Source) -> None:
    for original, *others in tiles.values():
        for part in others:
            if part.copy and part.name in read.shapes and not read.same(part.name, original.name):
                raise CheckpointError(
                    f"{part.name} is not the same as {original.name}: this model keeps one of them for both"
                )


def _may_be_left_out(model: ModelConfig, name: str, names: Mapping[str, Any]) -> bool:
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.tie_embeddings):
        return True
    # MTP layers that this model does not have, but no main layer.
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= model.num_layers and f"{layer[0]}eh_proj.weight" in names


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
    unwritten = 0
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
            unwritten += prod(part.shape) * slices[0][-1].itemsize
            if unwritten > BYTES_BETWEEN_MEETINGS:  # nobody waits longer than it takes to write so much
                dist.barrier()
                unwritten = 0
