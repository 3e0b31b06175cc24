"""The tokenizer: round trips, single-token tags and digits, determinism, Hugging Face directories, bad input."""

from __future__ import annotations

import json
import random

import pytest

from r1.engine.data.tokenizer import TAGS, Tokenizer, train_tokenizer
from r1.engine.errors import UserError

TEXTS = ["<think>first 9-7=2, 然后 2+1=3, all done.</think><answer>3</answer>", "How do I make tea today?"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


def test_any_text_survives_the_round_trip(tokenizer):
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    print(f"seed {seed}")
    for _ in range(50):
        pool = "abc XYZ 0189 +-=\n\t.,<>/思考然后\u00e9\U0001f600" + "".join(TAGS)
        text = "".join(rng.choice(pool) for _ in range(rng.randrange(60)))
        assert tokenizer.decode(tokenizer.encode(text)) == text, (seed, text)


def test_tags_are_one_token_and_survive_skip_special(tokenizer):
    for tag in TAGS:
        assert len(tokenizer.encode(tag)) == 1
    ids = [tokenizer.bos_id, *tokenizer.encode("<think>so</think>"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids, skip_special=True) == "<think>so</think>"
    assert tokenizer.decode(ids).startswith("<bos>") and tokenizer.decode(ids).endswith("<eos><pad>")


def test_digits_are_single_tokens(tokenizer):
    assert len(tokenizer.encode("4096")) == 4


def test_training_is_deterministic_and_bounded(tokenizer, tmp_path):
    again = train_tokenizer(TEXTS, 320)
    tokenizer.save(tmp_path / "one.json")
    again.save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert 265 <= tokenizer.vocab_size <= 320
    assert max(tokenizer.encode(TEXTS[0])) < tokenizer.vocab_size


def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path / "tokenizer.json", tmp_path):
        loaded = Tokenizer.load(path)
        assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
        assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.pad_id,
        )


def test_reads_what_transformers_writes(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import models
    from transformers import PreTrainedTokenizerFast

    backend = Backend(models.WordLevel({"[UNK]": 0, "hello": 1, "[S]": 2, "[E]": 3, "[P]": 4}, unk_token="[UNK]"))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[S]", eos_token="[E]", pad_token="[P]")
    fast.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (2, 3, 4)
    assert loaded.encode("hello") == fast("hello", add_special_tokens=False)["input_ids"]


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="no file"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(UserError, match="cannot read"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="vocab_size is 100"):
        train_tokenizer(TEXTS, 100)
