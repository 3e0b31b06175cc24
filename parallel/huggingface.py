"""Hugging Face's view of our models: config.json both ways, and which of its tensors tile each of ours.

The names are those of the published checkpoints: one tensor an expert, multi-token prediction as layer `num_layers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from r1.parallel.config import Llama3RopeConfig, ModelConfig, YarnConfig

# ------------------------------------------------------------------------------------------------ configurations

_FIELDS = {
    "vocab_size": "vocab_size",
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_positions",
    "intermediate_size": "ffn_hidden_size",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
_DENSE_FIELDS = {"num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}
_LATENT_FIELDS = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "first_k_dense_replace": "num_dense_layers",
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "moe_intermediate_size": "expert_hidden_size",
    "n_group": "num_expert_groups",
    "topk_group": "groups_per_token",
    "routed_scaling_factor": "routed_scaling_factor",
    "num_nextn_predict_layers": "num_mtp_layers",
}
_REQUIRED = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_MAY_BE_MISSING = ("q_lora_rank", "num_nextn_predict_layers")
_REQUIRED_LATENT = tuple(name for name in _LATENT_FIELDS if name not in _MAY_BE_MISSING)
# What our models do; a checkpoint that says otherwise is another model.
_FIXED: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False}
_FIXED_OF: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False},
    "qwen2": {"use_sliding_window": False},
    "deepseek_v3": {
        "rope_interleave": True,
        "norm_topk_prob": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    },
}
_ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_YARN_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}


_LLAMA3_FIELDS = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_positions",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}


def _fields(architecture: str) -> dict[str, str]:
    return _FIELDS | (_LATENT_FIELDS if architecture == "deepseek_v3" else _DENSE_FIELDS)


def model_config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face config.json describes (the published form, or that of transformers >= 5).

    ValueError where it describes something that our models do not do.
    """
    architecture = config.get("model_type")
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"model_type = {architecture!r} must be one of {', '.join(sorted(_ARCHITECTURES))}")
    for name, wanted in (_FIXED | _FIXED_OF[architecture]).items():
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{name} = {config[name]!r} must be {wanted!r} for {architecture}: no other is supported")
    for name in _REQUIRED + (_REQUIRED_LATENT if architecture == "deepseek_v3" else ()):
        if config.get(name) is None:
            raise ValueError(f"{name} is missing: what it would be by default differs from program to program")
    values: dict[str, Any] = {"architecture": architecture}
    for theirs, ours in _fields(architecture).items():
        if config.get(theirs) is not None:
            values[ours] = config[theirs]
    if architecture == "deepseek_v3" and config.get("num_key_value_heads") not in (None, values.get("num_heads")):
        raise ValueError(
            f"num_key_value_heads = {config['num_key_value_heads']} must equal num_attention_heads"
            f" = {values.get('num_heads')} in multi-head latent attention"
        )
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    values["rope_base"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    values |= _context_extension(rope)
    return ModelConfig(**values)


def _context_extension(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "llama3":
        values = {ours: rope[theirs] for theirs, ours in _LLAMA3_FIELDS.items() if rope.get(theirs) is not None}
        return {"llama3_rope": Llama3RopeConfig(**values)}
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope type = {kind!r} must be 'default', 'yarn' or 'llama3': no other is supported")
    return {"yarn": _yarn(rope)} if kind == "yarn" else {}


def _yarn(rope: Mapping[str, Any]) -> YarnConfig:
    if rope.get("attention_factor") is not None or not rope.get("truncate", True):
        raise ValueError("YaRN's attention_factor and truncate = false are not supported; leave them out")
    values = {ours: rope[theirs] for theirs, ours in _YARN_FIELDS.items() if rope.get(theirs) is not None}
    if bool(values.get("mscale")) != bool(values.get("mscale_all_dim")):
        raise ValueError("YaRN's mscale and mscale_all_dim must be given together or both be left out")
    # Without them cos and sin are scaled by 0.1 ln(factor) + 1, and the softmax is not.
    return YarnConfig(**values) if values.get("mscale") else YarnConfig(**{**values, "mscale": 1, "mscale_all_dim": 0})


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config.json of this model, in the published form.

    transformers norms DeepSeek-V3's latents with epsilon 1e-6 whatever `rms_norm_eps` says; we use `rms_norm_eps`.
    """
    architecture = model.architecture
    config: dict[str, Any] = {"architectures": [_ARCHITECTURES[architecture]], "model_type": architecture}
    config |= {theirs: getattr(model, ours) for theirs, ours in _fields(architecture).items()}
    config |= _FIXED | _FIXED_OF[architecture] | {"num_key_value_heads": model.kv_heads, "rope_theta": model.rope_base}
    if architecture == "deepseek_v3":
        config["q_lora_rank"] = model.q_lora_rank or None
        if not model.is_moe:
            config["first_k_dense_replace"] = model.num_layers
    elif model.head_dim is None:
        del config["head_dim"]
    if model.yarn and not model.yarn.changes_nothing:
        yarn = {theirs: getattr(model.yarn, ours) for theirs, ours in _YARN_FIELDS.items()}
        if not (model.yarn.mscale and model.yarn.mscale_all_dim):
            if model.yarn.mscale != 1 or model.yarn.mscale_all_dim:
                raise ValueError(
                    f"yarn.mscale = {model.yarn.mscale} with mscale_all_dim = {model.yarn.mscale_all_dim} has no form"
                    " in a Hugging Face configuration: it wants both, or 1 and 0"
                )
            del yarn["mscale"], yarn["mscale_all_dim"]
        config["rope_scaling"] = {"type": "yarn", **yarn}
    if model.llama3_rope:
        rope = {theirs: getattr(model.llama3_rope, ours) for theirs, ours in _LLAMA3_FIELDS.items()}
        config["rope_scaling"] = {"rope_type": "llama3", **rope}
    return config


# A model may read fewer positions, or leave multi-token prediction out; and the last is for new weights only.
_MAY_DIFFER = {"max_position_embeddings", "num_nextn_predict_layers", "initializer_range"}
# What changes when a model is taught to read longer texts.
_POSITIONS = {"rope_theta", "rope_scaling"}


def differences(theirs: ModelConfig, ours: ModelConfig) -> tuple[list[str], list[str]]:
    """What a checkpoint of `theirs` would compute otherwise in `ours`, in sentences: (of the model, of its rotary
    embedding, which a longer context may be the reason of). In Hugging Face's words."""
    found: tuple[list[str], list[str]] = ([], [])
    left, right = (
        hf_config(model.model_copy(update={"head_dim": None if model.is_moe else model.qk_head_dim}))
        for model in (theirs, ours)
    )
    for name in sorted((left.keys() | right.keys()) - _MAY_DIFFER):
        a, b = left.get(name), right.get(name)
        close = isinstance(a, float) and isinstance(b, float) and abs(a - b) <= 1e-6 * abs(b)  # as float32 keeps it
        if a != b and not close:
            found[name in _POSITIONS].append(f"{name} = {a}, this model has {b}")
    return found


# ------------------------------------------------------------------------------------------------ names


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor inside one of ours: whole[place] is that tensor, or its transpose.

    A copy is written because published checkpoints have it, and is not needed to load.
    """

    name: str
    place: tuple[int | slice, ...]
    transposed: bool = False
    copy: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The Hugging Face tensor's shape."""
        sizes = [p.stop - p.start for p in self.place if isinstance(p, slice)]
        return tuple(reversed(sizes) if self.transposed else sizes)


_LAYER_NAMES = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_q": "self_attn.q_proj",
    "self_attention.linear_k": "self_attn.k_proj",
    "self_attention.linear_v": "self_attn.v_proj",
    "self_attention.linear_q_down": "self_attn.q_a_proj",
    "self_attention.q_norm": "self_attn.q_a_layernorm",
    "self_attention.linear_kv_down": "self_attn.kv_a_proj_with_mqa",
    "self_attention.kv_norm": "self_attn.kv_a_layernorm",
    "self_attention.linear_kv_up": "self_attn.kv_b_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.linear_fc2": "mlp.down_proj",
    "mlp.shared_experts.linear_fc2": "mlp.shared_experts.down_proj",
    "mlp.router": "mlp.gate",
}


def parts(model: ModelConfig, key: str, shape: tuple[int, ...]) -> list[Part]:
    """The Hugging Face tensors that tile our tensor `key` (Megatron's name in the whole model) of this whole shape."""
    everything = tuple(slice(0, n) for n in shape)
    mtp_layers = [f"model.layers.{model.num_layers + i}" for i in range(model.num_mtp_layers)]
    heads = [Part(f"{layer}.shared_head.head.weight", everything, copy=True) for layer in mtp_layers]
    if key == "embedding.word_embeddings.weight":
        found = [Part("model.embed_tokens.weight", everything)]
        found += [Part(f"{layer}.embed_tokens.weight", everything, copy=True) for layer in mtp_layers]
        return found + (heads if model.tie_embeddings else [])
    if key == "output_layer.weight":
        return [Part("lm_head.weight", everything), *heads]
    if key == "decoder.final_layernorm.weight":
        return [Part("model.norm.weight", everything)]
    if match := re.fullmatch(r"mtp\.layers\.(\d+)\.(enorm|hnorm|eh_proj|final_layernorm)\.weight", key):
        name = "shared_head.norm" if match[2] == "final_layernorm" else match[2]
        return [Part(f"{mtp_layers[int(match[1])]}.{name}.weight", everything)]
    match = re.fullmatch(r"(?:decoder|(mtp))\.layers\.(\d+)\.(?:transformer_layer\.)?(.+)", key)
    if match:
        layer = mtp_layers[int(match[2])] if match[1] else f"model.layers.{match[2]}"
        if found := _layer_parts(model, layer, match[3], everything):
            return found
    raise ValueError(f"our tensor {key} has no Hugging Face name in architecture {model.architecture}")


def _layer_parts(model: ModelConfig, layer: str, name: str, everything: tuple[slice, ...]) -> list[Part]:
    stem, _, kind = name.rpartition(".")
    if name == "mlp.experts.gate_up":  # (E, H, 2, F)
        E, H, _, F = everything
        return [
            Part(f"{layer}.mlp.experts.{e}.{projection}.weight", (e, H, i, F), transposed=True)
            for e in range(E.stop)
            for i, projection in enumerate(("gate_proj", "up_proj"))
        ]
    if name == "mlp.experts.down":  # (E, F, H)
        E, F, H = everything
        return [Part(f"{layer}.mlp.experts.{e}.down_proj.weight", (e, F, H), transposed=True) for e in range(E.stop)]
    if name == "mlp.router.expert_bias":
        return [Part(f"{layer}.mlp.gate.e_score_correction_bias", everything)]
    if stem == "self_attention.linear_q_up":
        return [Part(f"{layer}.self_attn.{'q_b_proj' if model.q_lora_rank else 'q_proj'}.{kind}", everything)]
    if stem in ("mlp.linear_fc1", "mlp.shared_experts.linear_fc1"):  # (2 F, H): gate, then up
        rows, H = everything
        half, prefix = rows.stop // 2, f"{layer}.{stem.removesuffix('.linear_fc1')}"
        gate = Part(f"{prefix}.gate_proj.{kind}", (slice(0, half), H))
        return [gate, Part(f"{prefix}.up_proj.{kind}", (slice(half, rows.stop), H))]
    return [Part(f"{layer}.{_LAYER_NAMES[stem]}.{kind}", everything)] if stem in _LAYER_NAMES else []
