"""Our models as Hugging Face checkpoints, from any layout: one tensor at a time goes through the main process into its
place on the disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load
from torch import Tensor

from r1.kernels.fp8 import BLOCK, dequantize, quantize_128x128
from r1.parallel.config import ModelConfig
from r1.parallel.convert import CARRIED, SCALES, Dtype, Tell, agree, catalogue_of, gathered, nothing
from r1.parallel.folders import CheckpointError, begin, partial_of, publish, recover, unwritten
from r1.parallel.hf_reader import SCALE, SUMS, TYPES
from r1.parallel.hf_writer import FolderWriter, Planned, write_json, write_sums
from r1.parallel.huggingface import Part, hf_config, model_config_from_hf, parts
from r1.parallel.trainer import Trainer

_TYPES = {"fp8": "BF16", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FP8_NAME = re.compile(r".*\.(self_attn|mlp)\.(.*_proj|kv_a_proj_with_mqa)\.weight")
_FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}


def export_hf(
    trainer: Trainer,
    folder: str | Path,
    tokenizer: Any = None,
    *,
    dtype: Dtype | None = None,
    carried: Mapping[str, bytes] | None = None,
    tell: Tell = nothing,
) -> None:
    """Write a folder that transformers and vLLM load: configurations, safetensors in published names, the tokenizer
    (a `carried` one, or anything with `save`, `decode`, `bos_id`, `eos_id`, `pad_id`) and SHA256SUMS. Collective.

    `dtype` None is that of the checkpoint that was read (`carried`, of the main process), else the model's own. In
    fp8 a block that is what was read leaves with the scale it came with, bit for bit. The folder takes its name when
    it is whole; an earlier export is replaced. `tell` is called with (tensors done, tensors in all). CheckpointError,
    on every process, where the folder holds other things or cannot be written.
    """
    folder, carried = Path(folder), carried or {}
    config = json.loads(carried.get("config.json", b"{}"))
    if dtype is None:
        dtype = "fp8" if SCALES in carried else config.get("torch_dtype", trainer.parallel.dtype)
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype = {dtype!r}, wanted one of {', '.join(get_args(Dtype))}")
    model, main = trainer.model_config, trainer.world.is_main
    config = _config(model, config, dtype)
    problem, writer = None, None
    plan = [  # of the whole model, on every process
        _planned(part, dtype) for key, (shape, _) in catalogue_of(trainer).items() for part in parts(model, key, shape)
    ]
    if main:
        # The others must not wait for one that has failed: what goes wrong here is told at the end.
        recover(folder, SUMS)
        try:
            writer = FolderWriter(begin(folder, "config.json"), plan)
        except CheckpointError as error:
            problem = str(error)
        except OSError as error:
            problem = unwritten(folder, error)
    done = 0
    scales = load(carried[SCALES]) if SCALES in carried and dtype == "fp8" else {}
    for part, tensor in gathered(trainer, lambda key, shape: parts(model, key, shape)):
        if writer is not None and problem is None:
            try:
                for planned, value in zip(_planned(part, dtype), _stored(part, tensor, dtype, scales)):
                    writer.write(planned.name, value)
            except OSError as error:
                problem = unwritten(folder, error)
        done += 1
        tell(done, len(plan))
    if writer is not None and problem is None:
        try:
            writer.finish()
            _write_others(writer.folder, config, tokenizer, carried)
            write_sums(writer.folder)
            publish(folder)
        except OSError as error:
            problem = unwritten(folder, error)
    if problem is not None:
        shutil.rmtree(partial_of(folder), ignore_errors=True)
    agree(problem)


def _planned(part: Part, dtype: Dtype) -> list[Planned]:
    if dtype == "fp8" and _FP8_NAME.fullmatch(part.name):
        blocks = tuple(-(-size // BLOCK) for size in part.shape)
        return [Planned(part.name, "F8_E4M3", part.shape), Planned(part.name + SCALE, "F32", blocks)]
    kept = part.name.endswith("e_score_correction_bias")  # float32 in every published checkpoint
    return [Planned(part.name, "F32" if kept else _TYPES[dtype], part.shape)]


def _stored(part: Part, tensor: Tensor, dtype: Dtype, scales: Mapping[str, Tensor]) -> list[Tensor]:
    planned = _planned(part, dtype)
    if len(planned) == 1:
        return [tensor.to(TYPES[planned[0].dtype])]
    q, scale = quantize_128x128(tensor)
    before = scales.get(planned[1].name)
    if before is None or before.shape != scale.shape:
        return [q, scale]
    before = before.to(scale.device)
    rows, columns = (torch.arange(n, device=scale.device) // BLOCK for n in tensor.shape)
    q_before = (tensor.float() / before[rows][:, columns]).to(q.dtype)
    differs = dequantize(q_before, before, (BLOCK, BLOCK), tensor.dtype) != tensor
    padded = torch.nn.functional.pad(differs, (0, -len(columns) % BLOCK, 0, -len(rows) % BLOCK))
    changed = padded.view(scale.shape[0], BLOCK, scale.shape[1], BLOCK).any(3).any(1)
    q = torch.where(changed[rows][:, columns], q.view(torch.uint8), q_before.view(torch.uint8)).view(q.dtype)
    return [q, torch.where(changed, scale, before)]


def _config(model: ModelConfig, carried: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    """config.json: the one that was read, where it still says what the model is."""
    config = hf_config(model)
    if carried and hf_config(model_config_from_hf(carried)) == config:
        config = dict(carried)
    config.pop("quantization_config", None)
    if dtype == "fp8":
        config["quantization_config"] = _FP8_CONFIG
    return config | {"torch_dtype": "bfloat16" if dtype == "fp8" else dtype}


def _write_others(folder: Path, config: dict[str, Any], tokenizer: Any, carried: Mapping[str, bytes]) -> None:
    """config.json, and what transformers wants to generate text: as it was read, or of our tokenizer."""
    for name in CARRIED:
        if name in carried and name != "config.json":
            (folder / name).write_bytes(carried[name])
    # Explicit nulls where there is no tokenizer: transformers' defaults would name some other model's tokens.
    ids = {name: getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    token_ids = {f"{name}_token_id": value for name, value in ids.items()}
    write_json(folder / "config.json", token_ids | config)
    if "generation_config.json" not in carried:
        write_json(
            folder / "generation_config.json", token_ids | {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
        )
    if tokenizer is not None and "tokenizer.json" not in carried:
        tokenizer.save(folder / "tokenizer.json")
        special = {f"{name}_token": tokenizer.decode([value]) for name, value in ids.items() if value is not None}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"]}
        write_json(folder / "tokenizer_config.json", kind | special)
