"""A growing text shows nothing that it has to take back."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1.engine.data.tokenizer import Tokenizer, train_tokenizer
from r1.engine.text import TextStream

SAMPLE = "the cat sat on the mat, naïve café 三个四 🏖️👩‍🚀 aabaabaac "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([SAMPLE * 20], vocab_size=290)


def shown(tokenizer: Tokenizer, text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream, parts = TextStream(tokenizer, stop), []
    for token in tokenizer.encode(text):
        parts.append(stream.push(token))
        if stream.stopped:
            break
    return [*parts, stream.finish()], stream


def test_text_is_whole_characters(tokenizer: Tokenizer) -> None:
    parts, stream = shown(tokenizer, SAMPLE)
    assert "".join(parts) == SAMPLE and not stream.stopped
    assert "" in parts and not any("\ufffd" in part for part in parts), "bytes of a character come as several tokens"


@settings(max_examples=500, deadline=None)
@given(
    st.text(alphabet="ab 三🏖", max_size=30), st.lists(st.text(alphabet="ab 三🏖", min_size=1, max_size=4), max_size=3)
)
def test_the_text_ends_before_the_first_stop_string(tokenizer: Tokenizer, text: str, stops: list[str]) -> None:
    """Strings that end sooner count first; of those that the same token ends, the one that begins first."""
    parts, stream = shown(tokenizer, text, tuple(stops))
    found = "".join(parts)
    assert stream.stopped == any(stop in text for stop in stops)
    assert text.startswith(found) and not any(stop in found for stop in stops)
    if stream.stopped:
        assert any(text[len(found) :].startswith(stop) for stop in stops)
    else:
        assert found == text
        # What is held back is no more than what may begin a stop string.
        whole = "".join(parts[:-1])
        assert any(stop.startswith(text[len(whole) :]) for stop in stops) or whole == text


def test_bytes_that_are_no_character_are_left_out(tokenizer: Tokenizer) -> None:
    beginning = tokenizer.encode("🏖")[:1]
    stream = TextStream(tokenizer)
    assert [stream.push(t) for t in tokenizer.encode("ab")] and stream.push(beginning[0]) == stream.finish() == ""


def test_any_tokens_at_all(tokenizer: Tokenizer) -> None:
    draw = random.Random(1)
    for _ in range(200):
        tokens = [draw.randrange(tokenizer.vocab_size) for _ in range(30)]
        stream = TextStream(tokenizer, ("the", "zz"))
        text = "".join(stream.push(t) for t in tokens if not stream.stopped) + stream.finish()
        assert tokenizer.decode(tokens).startswith(text.rstrip("\ufffd"))
