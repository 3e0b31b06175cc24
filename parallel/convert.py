"""Weights between our models and Hugging Face checkpoints, both ways, in any layout.

A process reads only the slices that lie in its own shards, and an export passes one of our tensors at a time through
the main process. huggingface.py holds the names; the fused experts that transformers >= 5 keeps in memory
(`mlp.experts.gate_up_proj`, (E, 2F, H)) are read as well as the published one tensor an expert.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import apply_factories
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from r1.parallel.checkpoint import CheckpointError
from r1.parallel.config import ModelConfig
from r1.parallel.fp8 import forget_quantized
from r1.parallel.huggingface import Part, hf_config, model_config_from_hf, parts
from r1.parallel.model import data_shape, sharded_state
from r1.parallel.trainer import Trainer

__all__ = ["export_hf", "gathered", "hf_config", "load_hf", "model_config_from_hf", "whole"]

BYTES_PER_FILE = 5 << 30

# ------------------------------------------------------------------------------------------------ loading

_FUSED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")


class _Source:
    """Tensors by their published names, in memory or in a folder of safetensors files, read a slice at a time."""

    def __init__(self, source: Mapping[str, Tensor] | str | Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._tensors: dict[str, tuple[Any, tuple[int, ...], int]] = {}
        for name, tensor in (source if isinstance(source, Mapping) else _open(Path(source))).items():
            shape = tuple(tensor.shape if isinstance(tensor, Tensor) else tensor.get_shape())
            fused = _FUSED.fullmatch(name)
            if not fused:
                self.shapes[name], self._tensors[name] = shape, (tensor, (), 0)
                continue
            projections = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
            rows = shape[1] // len(projections)
            for expert in range(shape[0]):
                for i, projection in enumerate(projections):
                    name = f"{fused[1]}.{expert}.{projection}.weight"
                    self.shapes[name], self._tensors[name] = (rows, shape[2]), (tensor, (expert,), i * rows)

    def read(self, name: str, index: tuple[slice, ...]) -> Tensor:
        tensor, leading, shift = self._tensors[name]
        first = slice(index[0].start + shift, index[0].stop + shift)
        return tensor[(*leading, first, *index[1:])]


def _open(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"there is no Hugging Face folder at {folder}")
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors files")
    tensors: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder} is incomplete: {file.name}, which its index names, is missing")
        try:
            handle = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from None
        tensors |= {name: handle.get_slice(name) for name in handle.keys()}
    return tensors


@torch.no_grad()
def load_hf(trainer: Trainer, source: Mapping[str, Tensor] | str | Path) -> None:
    """Fill this process's shards from a Hugging Face state dict or a folder of safetensors files.

    Collective, in any layout. CheckpointError, with the weights as they were, where a tensor is missing, is not one
    of this model's, or has another shape.
    """
    model, read = trainer.model_config, _Source(source)
    tiles = {key: parts(model, key, shape) for key, (shape, _) in _catalogue(trainer).items()}
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
    for shard in _shards(trainer):
        view = shard.data.view(data_shape(shard))
        for part in tiles[shard.key]:
            if not part.copy:
                _fill(view, shard.global_offset, part, read)
    if trainer.optimizer is not None:
        trainer.optimizer.reload_model_params()
    forget_quantized(trainer.chunks)


def _may_be_left_out(model: ModelConfig, name: str, names: Mapping[str, Any]) -> bool:
    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and model.tie_embeddings):
        return True
    # MTP layers that this model does not have, but no main layer.
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= model.num_layers and f"{layer[0]}eh_proj.weight" in names


def _fill(view: Tensor, offset: tuple[int, ...], part: Part, source: _Source) -> None:
    """Copy what lies in this shard (`view`, at `offset` of the whole tensor) out of one Hugging Face tensor."""
    here: list[int | slice] = []
    there: list[slice] = []
    for place, start, size in zip(part.place, offset, view.shape, strict=True):
        if isinstance(place, int):
            low, high = place, place + 1
        else:
            low, high = place.start, place.stop
        first, last = max(low, start), min(high, start + size)
        if first >= last:
            return
        if isinstance(place, int):
            here.append(place - start)
        else:
            here.append(slice(first - start, last - start))
            there.append(slice(first - low, last - low))
    piece = source.read(part.name, tuple(reversed(there)) if part.transposed else tuple(there))
    view[tuple(here)] = (piece.T if part.transposed else piece).to(view.device, view.dtype)


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


def _catalogue(trainer: Trainer) -> dict[str, tuple[tuple[int, ...], list]]:
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
def gathered(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    """Our tensors whole and on the CPU, one at a time, on the main process; nothing on the others.

    Collective: every process runs it to its end.
    """
    rank, device = trainer.world.rank, trainer.world.device
    mine = {(t.key, tuple(t.global_offset)): t for t in _shards(trainer) if is_main_replica(t.replica_id)}
    for key, (shape, slices) in _catalogue(trainer).items():
        whole = torch.empty(shape, dtype=slices[0][-1]) if trainer.world.is_main else None
        for owner, offset, size, dtype in slices:
            data = mine[key, offset].data.detach().contiguous() if owner == rank else None
            if whole is None:
                if data is not None:
                    dist.send(data, dst=0)
                continue
            if data is None:
                data = torch.empty(size, dtype=dtype, device=device)
                dist.recv(data, src=owner)
            whole[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))] = data.view(size).cpu()
        if whole is not None:
            yield key, whole


def whole(trainer: Trainer) -> dict[str, Tensor]:
    """All of our tensors by name, whole and on the CPU, on the main process; empty on the others. Collective."""
    return dict(gathered(trainer))


def export_hf(trainer: Trainer, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a folder that transformers and vLLM load: config, generation config, safetensors in published names, and
    the tokenizer (anything with `save`, `decode`, `bos_id`, `eos_id`, `pad_id`) where one is given. Collective.

    The folder takes its name when it is whole. An earlier export is replaced; ValueError where it holds other things.
    """
    folder = Path(folder)
    partial, model = folder.with_name(folder.name + ".partial"), trainer.model_config
    config = hf_config(model) | {"torch_dtype": trainer.parallel.dtype}
    # Every process must come to the same answer before the main one changes what they see.
    usable = [not folder.exists() or (folder / "config.json").is_file()]
    dist.broadcast_object_list(usable, src=0)
    if not usable[0]:
        raise ValueError(f"folder = {folder} exists and is not an earlier export; wanted a new name")
    if trainer.world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    names: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = waiting = 0

    def write() -> None:
        save_file(pending, partial / f"{len(names)}.safetensors", metadata={"format": "pt"})
        names.append(list(pending))
        pending.clear()

    for key, tensor in gathered(trainer):
        for part in parts(model, key, tuple(tensor.shape)):
            piece = tensor[part.place]
            piece = (piece.T if part.transposed else piece).clone(memory_format=torch.contiguous_format)
            if pending and waiting + piece.nbytes > BYTES_PER_FILE:
                write()
                waiting = 0
            pending[part.name] = piece
            waiting, total = waiting + piece.nbytes, total + piece.nbytes
    if trainer.world.is_main:
        write()
        _name_files(partial, names, total)
        _write_configs(partial, config, tokenizer)
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def _name_files(folder: Path, names: list[list[str]], total: int) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors and the index of what is where."""
    if len(names) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    index: dict[str, str] = {}
    for i, held in enumerate(names):
        name = f"model-{i + 1:05}-of-{len(names):05}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / name)
        index |= dict.fromkeys(held, name)
    _write(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _write_configs(folder: Path, config: dict[str, Any], tokenizer: Any) -> None:
    # Explicit nulls where there is no tokenizer: transformers' defaults would name some other model's tokens.
    ids = {name: getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    token_ids = {f"{name}_token_id": value for name, value in ids.items()}
    _write(folder / "config.json", config | token_ids)
    _write(folder / "generation_config.json", token_ids | {"do_sample": True, "temperature": 0.6, "top_p": 0.95})
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
        special = {f"{name}_token": tokenizer.decode([value]) for name, value in ids.items() if value is not None}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"]}
        _write(folder / "tokenizer_config.json", kind | special)


def _write(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
