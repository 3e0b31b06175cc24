"""An exported folder means the same to transformers, to vLLM and to us: log-probabilities of the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from r1.engine.config import parallel_config
from r1.engine.engine import Engine, Sample
from r1.engine.settings import Config
from r1.parallel.config import ModelConfig
from tests.parallel import published

VLLM = Path(sys.prefix).with_name(Path(sys.prefix).name + "-vllm") / "bin" / "python"

# vLLM's experts on a CPU want widths that are multiples of 32.
DEEPSEEK = published.CONFIG | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
}
DENSE = {
    "vocab_size": 96,
    "num_layers": 3,
    "hidden_size": 128,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_hidden_size": 192,
    "max_positions": 128,
    "init_std": 0.1,
}
MODELS = {
    "llama": ModelConfig(architecture="llama", tie_embeddings=True, **DENSE),
    "qwen2": ModelConfig(architecture="qwen2", rope_base=1e6, **DENSE),
}

_SCORE = """
import json, sys
from vllm import LLM, SamplingParams
folder, texts = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(
    folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=128,
    # Its own operator turns interleaved pairs (DeepSeek's) wrongly where there is no YaRN.
    compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
)
sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
outputs = llm.generate([{"prompt_token_ids": text} for text in texts], sampling, use_tqdm=False)
print(json.dumps([[row[token].logprob for row, token in zip(out.prompt_logprobs[1:], text[1:])]
                  for out, text in zip(outputs, texts)]))
"""


def of_vllm(folder: Path, texts: list[list[int]]) -> list[list[float]]:
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_MLA_DISABLE": "1",  # its MLA kernels take DeepSeek-V3's own widths only
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder.parent / "cache"),
    }
    environment.pop("PYTHONPATH", None)
    answer = subprocess.run(
        [str(VLLM), "-c", _SCORE, str(folder), json.dumps(texts)],
        capture_output=True,
        text=True,
        cwd=folder.parent,  # transformers takes a folder `kernels` where it runs for a package of its own
        env=environment,
        timeout=400,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])


@torch.no_grad()
def of_transformers(folder: Path, texts: list[list[int]]) -> list[list[float]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = [model(torch.tensor([text])).logits[0].log_softmax(-1) for text in texts]
    return [[float(row[i, t]) for i, t in enumerate(text[1:])] for row, text in zip(rows, texts, strict=True)]


@pytest.mark.slow
@pytest.mark.skipif(not VLLM.exists(), reason=f"no vLLM at {VLLM}: `make vllm` installs it")
@pytest.mark.parametrize("kind", ["deepseek", *MODELS])
def test_three_engines_agree(kind: str, seed: int, tmp_path: Path) -> None:
    """DeepSeek's goes the whole way: published in FP8, imported, exported in float32."""
    if kind == "deepseek":
        published.write(tmp_path / "in", DEEPSEEK, published.tensors(DEEPSEEK, seed), seed)
        config = Config.model_construct(
            model=Engine.from_pretrained(tmp_path / "in", train=False).model_config, parallel=parallel_config()
        )
        engine = Engine.from_pretrained(tmp_path / "in", config, train=False)
    else:
        engine = Engine(Config.model_construct(model=MODELS[kind], parallel=parallel_config()), train=False, seed=seed)
    engine.export_hf(tmp_path / "out", dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in (50, 7, 100)]
    ours, _ = engine.logprobs([Sample(text) for text in texts])
    others: dict[str, Any] = {
        "transformers": of_transformers(tmp_path / "out", texts),
        "vllm": of_vllm(tmp_path / "out", texts),
    }
    spread = torch.tensor([value for row in ours for value in row]).std()
    assert float(spread) > 0.3, "log-probabilities this alike would prove nothing"
    for name, theirs in others.items():
        worst = max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
        print(f"{kind}: {name} differs by at most {worst:.1e}")
        assert worst < 1e-3, name
