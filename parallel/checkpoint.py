"""Checkpoints on Megatron's distributed format: written in one layout, read in any other.

A checkpoint is a folder: Megatron's shards under `shards/`, the caller's `state.json`, and `manifest.json` with the
size and CRC-32 of every file. It is written beside its final name and renamed when the manifest is in place, so a
folder with the final name is whole. Reading checks the manifest first; all is read before any weight changes.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from pydantic import ValidationError

from r1.parallel.config import ModelConfig
from r1.parallel.fp8 import forget_quantized
from r1.parallel.model import checkpoint_metadata, sharded_state
from r1.parallel.trainer import Trainer


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another model; the message is one sentence."""


def save(
    trainer: Trainer,
    folder: str | Path,
    state: dict[str, Any],
    optimizer: bool = True,
    reference: Trainer | None = None,
) -> None:
    """Write the weights (and optimiser, and a reference model's weights) of all processes and `state` (JSON) to
    `folder`, replacing what was there.

    Collective: every process calls it with the same arguments. A process killed in the middle leaves the old one.
    """
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    if trainer.world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "shards").mkdir(parents=True)
    dist.barrier()
    trainer.gather_weights()
    tensors = sharded_state(trainer.chunks, trainer.world)
    if optimizer and trainer.optimizer is not None:
        metadata = checkpoint_metadata(trainer.world)
        tensors["optimizer"] = trainer.optimizer.sharded_state_dict(tensors, is_loading=False, metadata=metadata)
    if reference is not None:
        tensors["reference"] = _reference_state(reference)
    # Megatron starts a manager process (which imports the main module again) for a queue that only an asynchronous
    # save needs; in a synchronous one both ends are here.
    filesystem_async._results_queue = queue.Queue()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    dist_checkpointing.save(tensors, str(partial / "shards"), sharded_strategy=strategy)
    dist.barrier()
    if trainer.world.is_main:
        model = trainer.model_config.model_dump()
        contents = {
            "model": model,
            "value_head": trainer.value_head,
            "optimizer": "optimizer" in tensors,
            "reference": reference is not None,
            "steps_taken": trainer.steps_taken,
            **state,
        }
        _write(partial / "state.json", json.dumps(contents, indent=1))
    dist.barrier()
    sums = _checksums(partial, trainer.world.rank, trainer.world.size)
    if trainer.world.is_main:
        _write(partial / "manifest.json", json.dumps(sums, indent=1))
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    if "optimizer" in tensors:
        trainer.optimizer.to_host()
    dist.barrier()


def read_state(folder: str | Path) -> dict[str, Any]:
    """The JSON part of a checkpoint; CheckpointError where there is none."""
    folder = recover(Path(folder))
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint at {folder}")
    try:
        state = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a checkpoint: it has no state.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: state.json is not JSON ({error})") from None
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(f"checkpoint {folder} is damaged: state.json does not name its model")
    return state


def load(
    trainer: Trainer, folder: str | Path, optimizer: bool = False, reference: Trainer | None = None
) -> dict[str, Any]:
    """Read a checkpoint into this trainer, whatever layout wrote it; returns its state.

    Collective. CheckpointError, with the weights as they were, where it is missing, damaged or of another shape.
    """
    folder = Path(folder)
    state = read_state(folder)
    _verify(folder, trainer.world.rank, trainer.world.size)
    _check_shape(folder, state["model"], trainer)
    if bool(state.get("value_head")) != trainer.value_head:
        kind = "a reward model" if state.get("value_head") else "a language model"
        raise CheckpointError(f"checkpoint {folder} holds {kind}, which is not what is being loaded")
    tensors = sharded_state(trainer.chunks, trainer.world)
    if optimizer:
        if not state.get("optimizer") or trainer.optimizer is None:
            raise CheckpointError(f"checkpoint {folder} has no optimiser state to resume from")
        metadata = checkpoint_metadata(trainer.world)
        tensors["optimizer"] = trainer.optimizer.sharded_state_dict(tensors, is_loading=True, metadata=metadata)
    if reference is not None:
        tensors["reference"] = _reference_state(reference)
    loaded = dist_checkpointing.load(tensors, str(folder / "shards"))
    _fill(trainer, loaded)
    if reference is not None:
        _fill(reference, loaded["reference"])
        forget_quantized(reference.chunks)
    if optimizer:
        trainer.optimizer.load_state_dict(loaded["optimizer"])
        trainer.steps_taken = int(state.get("steps_taken", 0))
    elif trainer.optimizer is not None:
        trainer.optimizer.reload_model_params()
    forget_quantized(trainer.chunks)
    return state


def _reference_state(reference: Trainer) -> dict[str, Any]:
    state = sharded_state(reference.chunks, reference.world)
    for part in state.values():
        replace_prefix_for_sharding(part, "", "reference.")
    return state


def _fill(trainer: Trainer, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(trainer.chunks):
        chunk.load_state_dict(loaded["model" if len(trainer.chunks) == 1 else f"model{index}"], strict=True)


def _check_shape(folder: Path, saved: dict[str, Any], trainer: Trainer) -> None:
    ours = trainer.model_config
    try:
        theirs = ModelConfig(**saved)
    except ValidationError as error:
        raise CheckpointError(f"checkpoint {folder} is of no model we know: {error.errors()[0]['msg']}") from None
    for name in _SHAPE_FIELDS:
        if name == "num_mtp_layers" and trainer.value_head:
            continue
        # A field left out and its default spelled out are the same shape.
        meant = {"num_kv_heads": "kv_heads", "head_dim": "qk_head_dim"}.get(name, name)
        if getattr(ours, meant) != getattr(theirs, meant):
            raise CheckpointError(
                f"checkpoint {folder} has model.{name} = {getattr(theirs, name)}, this model has {getattr(ours, name)}"
            )


_SHAPE_FIELDS = (
    "architecture",
    "vocab_size",
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "ffn_hidden_size",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_dense_layers",
    "num_experts",
    "expert_hidden_size",
    "num_shared_experts",
    "num_mtp_layers",
    "tie_embeddings",
)


def recover(folder: Path) -> Path:
    """Undo a replacement that was killed between its two renames."""
    old = folder.with_name(folder.name + ".old")
    if not folder.exists() and old.is_dir() and (old / "manifest.json").exists():
        try:
            old.rename(folder)
        except FileNotFoundError:
            pass  # another process did it
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json")


def _checksums(folder: Path, rank: int, size: int) -> dict[str, list[int]]:
    """{file: [bytes, CRC-32]} of the whole folder; the processes share the reading."""
    mine = {}
    for path in _files(folder)[rank::size]:
        mine[str(path.relative_to(folder))] = [path.stat().st_size, _crc(path)]
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in sorted(part.items())}


def _verify(folder: Path, rank: int, size: int) -> None:
    """CheckpointError, on every process, where a file is missing, short or changed."""
    problem = None
    try:
        manifest = dict(json.loads((folder / "manifest.json").read_text()))
        for name in sorted(manifest)[rank::size]:
            length, crc = manifest[name]
            path = folder / name
            if not path.is_file():
                problem = f"{name} is missing"
            elif path.stat().st_size != length:
                problem = f"{name} has {path.stat().st_size} bytes where {length} were written"
            elif _crc(path) != crc:
                problem = f"{name} does not match its checksum"
            if problem:
                break
    except FileNotFoundError:
        problem = "it has no manifest.json"
    except (json.JSONDecodeError, ValueError, TypeError):
        problem = "manifest.json is not readable"
    problems: list[Any] = [None] * size
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found:
            raise CheckpointError(f"checkpoint {folder} is damaged: {found}")


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@torch.no_grad()
def copy_weights(source: Trainer, target: Trainer) -> None:
    """Make `target` the same model as `source`, on this process's shards (same layout)."""
    source.gather_weights()
    for ours, theirs in zip(target.chunks, source.chunks, strict=True):
        state = theirs.state_dict()
        ours.load_state_dict({k: v.detach().clone() if torch.is_tensor(v) else v for k, v in state.items()})
    if target.optimizer is not None:
        target.optimizer.reload_model_params()
    forget_quantized(target.chunks)
