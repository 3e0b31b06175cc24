"""Checkpoints on Megatron's distributed format: written in one layout, read in any other.

A checkpoint is a folder: Megatron's shards under `shards/`, the caller's `state.json`, what came with a Hugging Face
checkpoint under `hf/`, and `manifest.json` with the size and CRC-32 of every file. It is written beside its final name
and renamed when the manifest is in place, so a folder with the final name is whole. Reading checks the manifest first;
all is read before any weight changes.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from pydantic import ValidationError

from r1.parallel import folders
from r1.parallel.config import ModelConfig
from r1.parallel.folders import CheckpointError
from r1.parallel.fp8 import forget_quantized
from r1.parallel.huggingface import differences
from r1.parallel.model import checkpoint_metadata, sharded_state
from r1.parallel.saving import MANIFEST, Writing, crc32_of, reference_state, save
from r1.parallel.trainer import Trainer

__all__ = ["CheckpointError", "Writing", "copy_weights", "load", "read_files", "read_state", "recover", "save"]


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


def read_files(folder: str | Path) -> dict[str, bytes]:
    """What a checkpoint has under `hf/`."""
    return {path.name: path.read_bytes() for path in sorted((recover(Path(folder)) / "hf").glob("*"))}


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
        tensors["reference"] = reference_state(reference)
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
    model, positions = differences(theirs, ours)
    if model:
        raise CheckpointError(f"checkpoint {folder} has {model[0]}")
    if positions and trainer.world.is_main:
        warnings.warn(f"checkpoint {folder} has {positions[0]}: a longer context?", stacklevel=2)


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
    return folders.recover(folder, MANIFEST)


def _verify(folder: Path, rank: int, size: int) -> None:
    """CheckpointError, on every process, where a file is missing, short or changed."""
    problem = None
    try:
        manifest = dict(json.loads((folder / MANIFEST).read_text()))
        for name in sorted(manifest)[rank::size]:
            length, crc = manifest[name]
            path = folder / name
            if not path.is_file():
                problem = f"{name} is missing"
            elif path.stat().st_size != length:
                problem = f"{name} has {path.stat().st_size} bytes where {length} were written"
            elif crc32_of(path) != crc:
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
