"""Checkpoints in DeepSeek's published form, made here: FP8 blocks, one tensor an expert, MTP, shards and an index."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# No matrix side but the head's is a multiple of 128, several are larger.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 144,
    "initializer_range": 0.02,
    "intermediate_size": 280,
    "kv_lora_rank": 48,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 136,
    "moe_layer_freq": 1,
    "n_group": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 56,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 32,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 96,
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """{name: (shape, "fp8", "bf16" or "f32")} of every tensor of a published DeepSeek-V3 checkpoint, scales aside."""
    c = config
    H, heads, V = c["hidden_size"], c["num_attention_heads"], c["vocab_size"]
    qk, R = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["kv_lora_rank"]
    found: dict[str, tuple[tuple[int, ...], str]] = {
        "model.embed_tokens.weight": ((V, H), "bf16"),
        "model.norm.weight": ((H,), "bf16"),
        "lm_head.weight": ((V, H), "bf16"),
    }

    def mlp(prefix: str, width: int) -> None:
        for name, shape in (("gate_proj", (width, H)), ("up_proj", (width, H)), ("down_proj", (H, width))):
            found[f"{prefix}.{name}.weight"] = (shape, "fp8")

    for layer in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
        at = f"model.layers.{layer}"
        for name, shape, kind in (
            ("input_layernorm", (H,), "bf16"),
            ("post_attention_layernorm", (H,), "bf16"),
            ("self_attn.q_a_proj", (c["q_lora_rank"], H), "fp8"),
            ("self_attn.q_a_layernorm", (c["q_lora_rank"],), "bf16"),
            ("self_attn.q_b_proj", (heads * qk, c["q_lora_rank"]), "fp8"),
            ("self_attn.kv_a_proj_with_mqa", (R + c["qk_rope_head_dim"], H), "fp8"),
            ("self_attn.kv_a_layernorm", (R,), "bf16"),
            ("self_attn.kv_b_proj", (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), R), "fp8"),
            ("self_attn.o_proj", (H, heads * c["v_head_dim"]), "fp8"),
        ):
            found[f"{at}.{name}.weight"] = (shape, kind)
        if layer < c["first_k_dense_replace"]:
            mlp(f"{at}.mlp", c["intermediate_size"])
        else:
            found[f"{at}.mlp.gate.weight"] = ((c["n_routed_experts"], H), "bf16")
            found[f"{at}.mlp.gate.e_score_correction_bias"] = ((c["n_routed_experts"],), "f32")
            mlp(f"{at}.mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
            for expert in range(c["n_routed_experts"]):
                mlp(f"{at}.mlp.experts.{expert}", c["moe_intermediate_size"])
        if layer >= c["num_hidden_layers"]:
            for name, shape in (
                ("enorm", (H,)),
                ("hnorm", (H,)),
                ("eh_proj", (H, 2 * H)),
                ("shared_head.norm", (H,)),
                ("shared_head.head", (V, H)),
                ("embed_tokens", (V, H)),
            ):
                found[f"{at}.{name}.weight"] = (shape, "bf16")
    return found


def tensors(config: dict[str, Any], seed: int, fp8: bool = True) -> dict[str, torch.Tensor]:
    """Random weights. Scales are any numbers, not what some rule would make of the block's largest value, and the
    values have zeros of both signs, denormals and the largest."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for name, (shape, kind) in shapes(config).items():
        if kind == "fp8" and fp8:
            q = torch.randn(shape, generator=generator).mul_(90).clamp_(-448, 448).to(torch.float8_e4m3fn)
            flat = q.view(torch.uint8).view(-1)
            flat[torch.randint(flat.numel(), (40,), generator=generator)] = torch.tensor(
                [0x00, 0x80, 0x01, 0x81, 0x07, 0x7E, 0xFE, 0x08], dtype=torch.uint8
            ).repeat(5)
            blocks = [-(-size // 128) for size in shape]
            found[name] = q
            found[f"{name}_scale_inv"] = (torch.rand(blocks, generator=generator) + 0.3) * 1e-3
        elif name.endswith("norm.weight"):
            found[name] = (1 + 0.3 * torch.randn(shape, generator=generator)).bfloat16()
        else:
            value = 0.1 * torch.randn(shape, generator=generator)
            found[name] = value if kind == "f32" else value.bfloat16()
    for name in list(found):  # the published MTP layer repeats the embedding and the head
        for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            if name.startswith("model.layers.") and name.endswith(f".{copy}.weight"):
                found[name] = found[f"{original}.weight"].clone()
    return found


def write(folder: Path, config: dict[str, Any], found: dict[str, torch.Tensor], seed: int, shards: int = 4) -> None:
    """The folder: tensors dealt at random over so many shards, the index, the configuration, a tokenizer's files."""
    folder.mkdir(parents=True)
    names = sorted(found)
    random.Random(seed).shuffle(names)
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:06}.safetensors"
        part = {name: found[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in found.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.6}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}", "eos_token": "e"}))
