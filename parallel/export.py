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
import torch.distributed as dist
from safetensors.torch import load
from torch import Tensor

from r1.kernels.fp8 import BLOCK, dequantize, quantize_128x128
from r1.parallel.agreement import Rounds, Told
from r1.parallel.config import ModelConfig
from r1.parallel.convert import CARRIED, SCALES, Dtype, Tell, catalogue_of, gathered, nothing
from r1.parallel.folders import CheckpointError, begin, partial_of, publish, recover, unwritten, write_bytes
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
    folder, carried, world = Path(folder).absolute(), carried or {}, trainer.world
    read = json.loads(carried.get("config.json", b"{}"))
    if dtype is None:
        dtype = "fp8" if SCALES in carried else read.get("torch_dtype", trainer.parallel.dtype)
    choice = [dtype]  # the main process knows what was read
    dist.broadcast_object_list(choice, src=0)
    dtype = choice[0]
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype = {dtype!r}, wanted one of {', '.join(get_args(Dtype))}")
    model = trainer.model_config
    config = _config(model, read, dtype)
    plan = [
        _planned(part, dtype) for key, (shape, _) in catalogue_of(trainer).items() for part in parts(model, key, shape)
    ]
    told = Told(lambda error: unwritten(folder, error))
    if world.is_main:
        with told:
            recover(folder, SUMS)
            scales = load(carried[SCALES]) if SCALES in carried and dtype == "fp8" else {}
            power_of_two = config.get("quantization_config", {}).get("scale_fmt") == "ue8m0"
            writer = FolderWriter(begin(folder, SUMS), plan)
    for done, (part, tensor) in enumerate(gathered(trainer, lambda key, shape: parts(model, key, shape))):
        tell(done, len(plan))
        if told.problem is None:
            with told:
                values = _stored(part, tensor, dtype, scales, power_of_two)
                for planned, value in zip(_planned(part, dtype), values, strict=True):
                    writer.write(planned.name, value)
    rounds = Rounds(world)
    if world.is_main and told.problem is None:
        with told:
            writer.finish()
            _write_others(writer.folder, config, tokenizer, carried)
            write_sums(writer.folder, rounds.beat)
            publish(folder)
    if world.is_main and told.problem is not None:
        shutil.rmtree(partial_of(folder), ignore_errors=True)
    rounds.agree(told.problem)


def _planned(part: Part, dtype: Dtype) -> list[Planned]:
    if dtype == "fp8" and _FP8_NAME.fullmatch(part.name):
        blocks = tuple(-(-size // BLOCK) for size in part.shape)
        return [Planned(part.name, "F8_E4M3", part.shape), Planned(part.name + SCALE, "F32", blocks)]
    kept = part.name.endswith("e_score_correction_bias")  # float32 in every published checkpoint
    return [Planned(part.name, "F32" if kept else _TYPES[dtype], part.shape)]


def _stored(part: Part, tensor: Tensor, dtype: Dtype, scales: Mapping[str, Tensor], power_of_two: bool) -> list[Tensor]:
    planned = _planned(part, dtype)
    plain = tensor if len(planned) == 2 else tensor.to(TYPES[planned[0].dtype])
    if not torch.isfinite(plain).all():
        raise CheckpointError(f"{part.name} has values that are not finite in {plain.dtype}: nothing was written")
    if len(planned) == 1:
        return [plain]
    q, scale = quantize_128x128(tensor, power_of_two)
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


def _config(model: ModelConfig, read: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    """config.json: what was read, but where the model is another by now."""
    config, ours = dict(read), hf_config(model)
    before = hf_config(model_config_from_hf(read)) if read else {}
    for name in before.keys() | ours.keys():
        if before.get(name) == ours.get(name) and name in read:
            continue
        config.pop(name, None)
        if name in ours and (not read or before.get(name) != ours[name]):
            config[name] = ours[name]
            if name in ("rope_scaling", "rope_theta"):
                config.pop("rope_parameters", None)
    quantization = config.pop("quantization_config", _FP8_CONFIG)
    if dtype == "fp8":
        config["quantization_config"] = quantization
    return config | {"torch_dtype": "bfloat16" if dtype == "fp8" else dtype}


def _write_others(folder: Path, config: dict[str, Any], tokenizer: Any, carried: Mapping[str, bytes]) -> None:
    """config.json, and what transformers wants to generate text: as it was read, or of our tokenizer."""
    for name in CARRIED:
        if name in carried and name != "config.json":
            write_bytes(folder / name, carried[name])
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
