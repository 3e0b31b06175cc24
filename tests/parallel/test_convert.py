"""Our models are transformers' models: the same logits from the same random weights, and back again through an export.

transformers computes one sequence at a time; ours are packed, or decoded token by token over a cache.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from r1.parallel import hf_writer
from r1.parallel.config import ModelConfig, ParallelConfig
from r1.parallel.convert import gathered, load_hf
from r1.parallel.decode import Chunk, Decoder
from r1.parallel.export import export_hf
from r1.parallel.folders import CheckpointError
from r1.parallel.huggingface import Part, hf_config, model_config_from_hf
from r1.parallel.packing import MicroBatch
from r1.parallel.trainer import AdamConfig, Trainer
from r1.parallel.world import join

TOLERANCE = 1e-4
LENGTHS = [37, 1, 60, 5, 18]
LONGEST = 96  # past the original 32 positions, so that YaRN has something to do

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.7,
    "mscale_all_dim": 1.2,
}
_SHARED = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_SHARED |= {"intermediate_size": 48, "max_position_embeddings": 128, "initializer_range": 0.15}
_DEEPSEEK = _SHARED | {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
    "rope_parameters": _YARN,
}
_DENSE = _SHARED | {"num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
_QWEN_YARN = {k: v for k, v in _YARN.items() if not k.startswith("mscale")} | {"rope_theta": 1e6}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek": ("deepseek_v3", _DEEPSEEK),
    "deepseek no q_lora, no YaRN, no groups": (
        "deepseek_v3",
        _DEEPSEEK | {"q_lora_rank": None, "rope_parameters": None, "n_group": 1, "topk_group": 1},
    ),
    "deepseek tied": ("deepseek_v3", _DEEPSEEK | {"tie_word_embeddings": True}),
    "llama": ("llama", _DENSE | {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama 3.1": ("llama", _DENSE | {"head_dim": 16, "rope_parameters": _LLAMA3}),
    "llama tied, wide heads": ("llama", _DENSE | {"tie_word_embeddings": True, "head_dim": 20}),
    "qwen2": ("qwen2", _DENSE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 tied, YaRN": ("qwen2", _DENSE | {"tie_word_embeddings": True, "rope_parameters": _QWEN_YARN}),
}


@torch.no_grad()
def theirs(case: str, seed: int) -> Any:
    """transformers' model with random weights, in which nothing is left at a value that hides a mistake."""
    kind, settings = CASES[case]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.copy_(1 + 0.3 * torch.randn_like(tensor))
        elif name.endswith("bias"):
            tensor.normal_(0.0, 0.3)
    return model


def sequences(seed: int, model: Any = None) -> list[torch.Tensor]:
    """Ragged random sequences, on which no router of `model` decides by a hair, so that rounding cannot tip it."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = [torch.randint(0, 96, (n,), generator=generator) for n in [*LENGTHS, LONGEST]]
        if model is None or narrowest_choice(model, tokens) > 1e-5:
            return tokens


def narrowest_choice(model: Any, tokens: list[torch.Tensor]) -> float:
    """The smallest gap between the last expert (and group) that transformers' routers choose and the next one."""
    gaps = [1.0]

    def note(router: Any, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        scores_TGE = (output[0].sigmoid() + router.e_score_correction_bias).unflatten(-1, (router.num_group, -1))
        if router.topk_group < router.num_group:
            best_TG, order_TG = scores_TGE.topk(2).values.sum(-1).sort(-1, descending=True)
            gaps.append(float((best_TG[:, router.topk_group - 1] - best_TG[:, router.topk_group]).min()))
            lost_TG1 = order_TG.argsort(-1)[..., None] >= router.topk_group
            scores_TGE = scores_TGE.masked_fill(lost_TG1, float("-inf"))
        best_TE = scores_TGE.flatten(1).sort(-1, descending=True).values
        gaps.append(float((best_TE[:, router.top_k - 1] - best_TE[:, router.top_k]).min()))

    hooks = [m.register_forward_hook(note) for m in model.modules() if hasattr(m, "e_score_correction_bias")]
    their_logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return min(gaps)


@torch.no_grad()
def their_logits(model: Any, tokens: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([model(t[None]).logits[0] for t in tokens])


def scores(model: Any, hidden: list[torch.Tensor], batch: Any, packed: Any, depth: int = 0) -> torch.Tensor:
    """The whole stream's logits (T, V), from a vocabulary that may be split."""
    logits_TV = model.head(hidden[depth], lambda h, w: h @ w.T)
    group = model.pg_collection.tp
    shards = [torch.empty_like(logits_TV) for _ in range(group.size())]
    torch.distributed.all_gather(shards, logits_TV.contiguous(), group=group)
    return torch.cat(shards, -1)


def our_logits(trainer: Trainer, tokens: list[torch.Tensor]) -> torch.Tensor:
    lengths = torch.tensor([t.numel() for t in tokens])
    batch = MicroBatch(torch.cat(tokens), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int())
    return trainer.read([batch], scores)[0]


def our_model(config: Any, parallel: ParallelConfig | None = None, **options: Any) -> Trainer:
    parallel = parallel or ParallelConfig()
    settings = config if isinstance(config, ModelConfig) else model_config_from_hf(config.to_dict())
    return Trainer(settings, parallel, join(parallel), seed=1, **options)


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Our tensors whole, on the main process; nothing on the others. Collective."""
    everything = lambda key, shape: [Part(key, tuple(slice(0, n) for n in shape))]
    return {part.name: tensor for part, tensor in gathered(trainer, everything)}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float(theirs.std()) > 0.3, "logits this small would prove nothing"
    worst = float((ours - theirs).abs().max())
    print(f"largest difference {worst:.1e}, logits up to {float(theirs.abs().max()):.1f}")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_logits_match_transformers(case: str, seed: int) -> None:
    reference = theirs(case, seed)
    tokens = sequences(seed, reference)
    trainer = our_model(reference.config)
    load_hf(trainer, reference.state_dict())
    assert_close(our_logits(trainer, tokens), their_logits(reference, tokens))


@pytest.mark.parametrize("case", ["deepseek", "deepseek no q_lora, no YaRN, no groups", "llama", "qwen2 tied, YaRN"])
def test_decoding_matches_transformers(case: str, seed: int) -> None:
    reference = theirs(case, seed)
    tokens = sequences(seed, reference)
    trainer = our_model(reference.config)
    load_hf(trainer, reference.state_dict())
    rows = [t for t in tokens if t.numel() >= 18]
    prompts, steps = [t[: n % 7 + 1] for n, t in enumerate(rows)], 11
    with torch.no_grad():
        decoder, lengths = Decoder(trainer, len(rows) * LONGEST), torch.tensor([p.numel() for p in prompts])
        pages = [decoder.pages.take(decoder.pages.for_tokens(18)) for _ in rows]
        hidden = decoder.prefill([Chunk(p.tolist(), 0, held) for p, held in zip(prompts, pages)])
        for step in range(steps + 1):
            wanted = [reference(t[None, : p.numel() + step]).logits[0, -1] for t, p in zip(rows, prompts, strict=True)]
            assert_close(decoder.logits(hidden, 96), torch.stack(wanted))
            if step < steps:
                following = torch.stack([t[p.numel() + step] for t, p in zip(rows, prompts, strict=True)])
                hidden = decoder.decode(following, lengths + step, torch.tensor(pages))


@pytest.mark.parametrize("case", CASES)
def test_export_loads_in_transformers(case: str, seed: int, tmp_path: Path) -> None:
    reference = theirs(case, seed)
    tokens = sequences(seed, reference)
    trainer = our_model(reference.config)
    load_hf(trainer, reference.state_dict())
    export_hf(trainer, tmp_path / "ours")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype is torch.float32 and type(loaded) is type(reference)
    for name, tensor in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert_close(their_logits(loaded, tokens), their_logits(reference, tokens))
    # Their own folder has the same tensors under the same names, and both folders load into ours.
    reference.save_pretrained(tmp_path / "theirs")
    published = load_file(tmp_path / "theirs" / "model.safetensors")
    exported = load_file(tmp_path / "ours" / "model.safetensors")
    assert exported.keys() == published.keys()
    for folder in ("ours", "theirs"):
        again = our_model(model_config_from_hf(json.loads((tmp_path / folder / "config.json").read_text())))
        load_hf(again, tmp_path / folder)
        assert_close(our_logits(again, tokens), their_logits(loaded, tokens))


def test_multi_token_prediction(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MTP layers survive the export in the published names and shards, and give transformers' MTP logits."""
    tokens = sequences(seed)[2]
    config = theirs("deepseek", seed).config.to_dict() | {"num_nextn_predict_layers": 2}
    trainer = our_model(model_config_from_hf(config))
    generator = torch.Generator().manual_seed(seed)
    for p in trainer.chunks[0].parameters():
        p.data.add_(0.15 * torch.randn(p.shape, generator=generator))
    for name, buffer in trainer.chunks[0].named_buffers():
        if name.endswith("expert_bias"):
            buffer.normal_(0.0, 0.3, generator=generator)
    monkeypatch.setattr(hf_writer, "BYTES_PER_FILE", 60_000)
    export_hf(trainer, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    extra = {name.removeprefix("model.layers.4.") for name in index["weight_map"] if ".layers.4." in name}
    assert {"eh_proj.weight", "enorm.weight", "hnorm.weight", "shared_head.norm.weight"} <= extra
    assert {"embed_tokens.weight", "shared_head.head.weight", "mlp.gate.e_score_correction_bias"} <= extra
    again = our_model(trainer.model_config)
    load_hf(again, tmp_path / "out")
    first, second = whole(trainer), whole(again)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    # transformers knows which layers are MTP from the published model's number of layers alone.
    monkeypatch.setattr(
        transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\."]
    )
    main = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    depths = MtpModel.from_pretrained(main).eval()

    def of_depth(depth: int) -> torch.Tensor:
        loss = functools.partial(scores, depth=depth)
        batch = MicroBatch(tokens, torch.tensor([0, tokens.numel()], dtype=torch.int32))
        return again._schedule([batch], functools.partial(_finish, function=loss, loss=_UsesMtp), True)[0]

    with torch.no_grad():
        hidden = main.model(tokens[None]).last_hidden_state
        assert_close(of_depth(0), main(tokens[None]).logits[0])
        for depth in (1, 2):
            length = tokens.numel() - depth
            hidden = depths.forward_layer(
                depth - 1, hidden[:, :length], torch.arange(length)[None], None, input_ids=tokens[None, depth:]
            )
            assert_close(of_depth(depth)[:length], main.lm_head(hidden)[0])


class _UsesMtp:
    uses_mtp = True


def _finish(output: torch.Tensor, *, model: Any, batch: Any, packed: Any, function: Any, **unused: Any) -> Any:
    parts = output.chunk(1 + len(packed.next_tokens), 0)
    return function(model, [model.hidden_of_all_tokens(part) for part in parts], batch, packed)


# ------------------------------------------------------------------------------------------------ layouts


def load_and_export(
    parallel: ParallelConfig, config: ModelConfig, state: dict[str, torch.Tensor], tokens: list[torch.Tensor], out: str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Collective: this process's view of the logits, and the whole weights (rank 0), after load and export."""
    trainer = our_model(config, parallel, adam=AdamConfig())
    load_hf(trainer, state)
    export_hf(trainer, out)
    return our_logits(trainer, tokens), whole(trainer)


LAYOUTS = {
    "TP2 deepseek": ("deepseek", {"tensor": 2}),
    "EP2 deepseek": ("deepseek", {"expert": 2}),
    "ETP2 deepseek": ("deepseek", {"expert_tensor": 2, "dispatcher": "allgather"}),
    "PP2 deepseek tied": ("deepseek tied", {"pipeline": 2}),
    "TP2 qwen2 tied": ("qwen2 tied, YaRN", {"tensor": 2}),
    "PP2 VPP2 llama": ("llama", {"pipeline": 2, "virtual_pipeline": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, seed: int, tmp_path: Path, pools: dict[int, Any]) -> None:
    case, ways = LAYOUTS[layout]
    if "pipeline" in ways:
        CASES["four layers"] = (CASES[case][0], CASES[case][1] | {"num_hidden_layers": 4})
        case = "four layers"
    reference = theirs(case, seed)
    tokens = sequences(seed, reference)
    config = model_config_from_hf(reference.config.to_dict())
    state = dict(reference.state_dict())
    answers = pools[2].run(load_and_export, ParallelConfig(**ways), config, state, tokens, str(tmp_path / "out"))
    for logits, _ in answers:
        assert_close(logits, their_logits(reference, tokens))
    assert not answers[1][1]
    alone = our_model(config)
    load_hf(alone, state)
    wanted = whole(alone)
    assert answers[0][1].keys() == wanted.keys()
    assert all(torch.equal(answers[0][1][key], wanted[key]) for key in wanted)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())


# ------------------------------------------------------------------------------------------------ settings, errors


def test_published_config() -> None:
    """DeepSeek-R1's config.json as published, there and back."""
    published = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }
    model = model_config_from_hf(published)
    assert (model.num_layers, model.num_mtp_layers, model.yarn.factor, model.num_expert_groups) == (61, 1, 40, 8)
    assert {k: v for k, v in hf_config(model).items() if k in published} == published


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case: str) -> None:
    kind, settings = CASES[case]
    model = model_config_from_hf(transformers.AutoConfig.for_model(kind, **settings).to_dict())
    assert model_config_from_hf(json.loads(json.dumps(hf_config(model)))) == model


@pytest.mark.parametrize(
    ("case", "change", "word"),
    [
        ("llama", {"model_type": "mamba"}, "mamba"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "longrope"),
        ("llama 3.1", {"rope_parameters": _LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("deepseek", {"scoring_func": "softmax"}, "softmax"),
        ("deepseek", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek", {"rope_parameters": _YARN | {"mscale": 0}}, "mscale"),
    ],
)
def test_other_models_are_refused(case: str, change: dict[str, Any], word: str) -> None:
    kind, settings = CASES[case]
    config = transformers.AutoConfig.for_model(kind, **settings).to_dict()
    with pytest.raises(ValueError, match=word):
        model_config_from_hf(config | change)


def test_wrong_checkpoints_are_refused_by_name(seed: int, tmp_path: Path) -> None:
    reference = theirs("deepseek", seed)
    trainer = our_model(reference.config)
    load_hf(trainer, reference.state_dict())
    before, good = whole(trainer), {k: v + 1 for k, v in reference.state_dict().items()}
    name = "model.layers.1.self_attn.kv_b_proj.weight"

    def refused(state: Any, *words: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            load_hf(trainer, state)
        assert all(word in str(caught.value) for word in words), caught.value
        assert all(torch.equal(before[key], value) for key, value in whole(trainer).items())

    refused({k: v for k, v in good.items() if k != name}, name)
    refused(good | {name: good[name].T}, name, "shape")
    refused(good | {"model.layers.3.mlp.up_proj.weight": good[name]}, "model.layers.3.mlp.up_proj.weight")
    refused(good | {name + "_scale_inv": torch.ones(1)}, name + "_scale_inv")
    refused(tmp_path / "nowhere", "nowhere")
    refused(tmp_path, "safetensors")
    save_file({k: v.contiguous() for k, v in good.items()}, tmp_path / "model.safetensors")
    whole_file = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole_file[: len(whole_file) // 2])
    refused(tmp_path, "model.safetensors", "damaged")
    (tmp_path / "model.safetensors").write_bytes(whole_file)
    load_hf(trainer, tmp_path)  # fused experts in a file are read too
    assert not torch.equal(before["output_layer.weight"], whole(trainer)["output_layer.weight"])


def test_export_replaces_only_exports(seed: int, tmp_path: Path) -> None:
    trainer = our_model(theirs("llama", seed).config)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis"):
        export_hf(trainer, tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    for _ in range(2):
        export_hf(trainer, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "thesis"]


def test_optimizer_starts_from_loaded_weights(seed: int) -> None:
    """A step with learning rate 0 after loading leaves the loaded weights, not those of before (bfloat16, where the
    optimiser has its own float32 copies)."""
    from r1.parallel.loss import SupervisedLoss

    reference, tokens = theirs("llama", seed), sequences(seed)[0]
    trainer = our_model(reference.config, ParallelConfig(dtype="bfloat16"), adam=AdamConfig())
    load_hf(trainer, reference.state_dict())
    loaded = whole(trainer)
    fields = {"targets": tokens.roll(-1), "weights": torch.full((tokens.numel(),), 0.1)}
    batch = MicroBatch(tokens, torch.tensor([0, tokens.numel()], dtype=torch.int32), fields)
    trainer.train_step([batch], SupervisedLoss(96), lr=0.0)
    assert all(torch.equal(loaded[key], value) for key, value in whole(trainer).items())


def test_tokenizer_travels_with_the_export(seed: int, tmp_path: Path) -> None:
    from r1.engine.data.tokenizer import Tokenizer, train_tokenizer

    tokenizer = train_tokenizer(["one and two make three", "four and five make nine"] * 20, vocab_size=300)
    trainer = our_model(theirs("llama", seed).config)
    export_hf(trainer, tmp_path / "out", tokenizer)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "two and five <think>1</think>"
    assert fast.encode(text, add_special_tokens=False) == tokenizer.encode(text)
    assert (fast.eos_token_id, fast.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    config = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.eos_token_id == tokenizer.eos_id
    assert Tokenizer.load(tmp_path / "out").eos_id == tokenizer.eos_id
