"""The server's parts by themselves: the split of reasoning, chat templates, streams of events."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from r1.engine import cli
from r1.engine.data.tokenizer import Tokenizer, train_tokenizer
from r1.engine.errors import UserError
from r1.engine.serve.answers import ChatAnswer, CompletionAnswer
from r1.engine.serve.chat import ChatTemplate, ReasoningSplit
from r1.engine.serve.errors import ApiError
from r1.engine.serve.protocol import Call, Reader
from r1.engine.serve.server import bound, serve
from r1.engine.serve.streams import Piece
from tests.engine.serving import TEXTS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 320)


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>so</think>3", False, "so", "3"),
        ("\n <think>so</think>\n3<think>", False, "so", "\n3<think>"),
        ("<think>so</thin", False, "so</thin", ""),
        ("<think></think>", False, "", ""),
        ("<thin>so</think>", False, "", "<thin>so</think>"),
        ("3 <think>so</think>", False, "", "3 <think>so</think>"),
        ("<thi", False, "", "<thi"),
        ("  ", False, "", "  "),
        ("", False, "", ""),
        ("so</thi</think>3</think>", True, "so</thi", "3</think>"),
        ("<<</think>", True, "<<", ""),
    ],
)
def test_reasoning_is_split_off_wherever_the_text_is_cut(
    text: str, inside: bool, reasoning: str, content: str, seed: int
) -> None:
    for _ in range(100):
        split = ReasoningSplit(inside)
        cuts = sorted(random.choices(range(len(text) + 1), k=random.randrange(6)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = [split.push(part, last=place == len(parts) - 1) for place, part in enumerate(parts)]
        assert ("".join(r for r, _ in found), "".join(c for _, c in found)) == (reasoning, content), parts
    split = ReasoningSplit()
    assert split.push("<think>a") == ("a", "") and split.push("b<") == ("b", ""), "what is sure is not held back"


def call(wants_logprobs: bool = True) -> Call:
    return Call([], stream=True, include_usage=False, wants_logprobs=wants_logprobs)


def test_answers_have_reasoning_beside_the_content(tokenizer: Tokenizer) -> None:
    text = "<think>first 9</think><answer>3</answer>"
    tokens = tokenizer.encode(text)
    texts = [tokenizer.token_bytes(token).decode() for token in tokens]
    piece = Piece([text], tokens, [-1.0] * len(tokens), [], "stop")
    message = ChatAnswer(call(), "m", tokenizer).whole({0: piece})["choices"][0]["message"]
    assert message["reasoning_content"] == "first 9" and message["content"] == "<answer>3</answer>"

    answer, deltas, logprobs = ChatAnswer(call(), "m", tokenizer), [], []
    for place, token in enumerate(tokens):
        last = "stop" if place == len(tokens) - 1 else None
        for chunk in answer.chunks({1: Piece([texts[place]], [token], [-1.0], [], last)}):
            (choice,) = chunk["choices"]
            assert choice["index"] == 1
            deltas.append(choice["delta"])
            logprobs += choice["logprobs"]["content"] if choice["logprobs"] else []
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "first 9"
    assert "".join(delta.get("content", "") for delta in deltas) == "<answer>3</answer>"
    assert [entry["token"] for entry in logprobs] == texts and deltas[-1] == {}


def test_parts_of_characters_have_bytes_and_places(tokenizer: Tokenizer, seed: int) -> None:
    text = "".join(random.choices("aé思😀 <think>3", k=40))
    tokens = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, tokens)) == text.encode()
    answer = CompletionAnswer(call(), "m", tokenizer)
    halves = [tokens[: len(tokens) // 2], tokens[len(tokens) // 2 :]]
    pieces = [Piece([], half, [-1.0] * len(half), [[(5, float("-inf"))]] * len(half), None) for half in halves]
    parts = [answer.chunks({0: piece})[0]["choices"][0]["logprobs"] for piece in pieces]
    offsets = [offset for part in parts for offset in part["text_offset"]]
    names = [name for part in parts for name in part["tokens"]]
    for name, offset, token in zip(names, offsets, tokens, strict=True):
        data = tokenizer.token_bytes(token)
        if name.startswith("bytes:"):
            assert name == "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        else:
            assert text[offset : offset + len(name)] == name
    assert all(min(top.values()) >= -9999 for part in parts for top in part["top_logprobs"])
    assert json.loads(json.dumps(parts, allow_nan=False)) == parts


def test_the_template_beside_the_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    plain = ChatTemplate(tokenizer, tmp_path)
    with pytest.raises(ApiError, match="system, user"):
        plain.text(messages)
    assert plain.tokens(plain.text(messages[1:])) == [
        tokenizer.bos_id, tokenizer.token_id("<user>"), *tokenizer.encode("hi"), tokenizer.token_id("<assistant>")
    ]  # fmt: skip

    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    with pytest.raises(ApiError, match="system, user"):
        ChatTemplate(tokenizer, tmp_path).text(messages)
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    template += "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    published = ChatTemplate(tokenizer, tmp_path)
    text = published.text(messages)
    assert text == "<system>be brief<user>hi<assistant>" and published.tokens(text) == tokenizer.encode(text)
    assert not published.in_reasoning(text) and published.in_reasoning(text + "<think>\n")
    with pytest.raises(ApiError, match="no tools"):
        published.text([{"role": "tool", "content": "x"}])

    # What a template may not do: look behind the values it is given.
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ApiError, match="unsafe"):
        ChatTemplate(tokenizer, tmp_path).text(messages)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        ChatTemplate(tokenizer, tmp_path)


def test_a_completion_may_use_the_room_that_its_prompt_leaves(tokenizer: Tokenizer, tmp_path: Path) -> None:
    reader = Reader("m", tokenizer, ChatTemplate(tokenizer, tmp_path), max_length=64, vocab_size=tokenizer.vocab_size)
    room = lambda call: [(len(request.prompt), request.sampling.max_tokens) for request in call.requests]
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert room(reader.chat(json.dumps(chat).encode())) == [(4, 60)]
    assert room(reader.chat(json.dumps({**chat, "max_tokens": 7}).encode())) == [(4, 7)]
    for prompt, wanted in (([[5] * 63, [5] * 60], [(63, 1), (60, 4)]), ([5] * 9, [(9, 16)])):
        assert room(reader.completion(json.dumps({"model": "m", "prompt": prompt}).encode())) == wanted
    with pytest.raises(ApiError, match="64 tokens or more; this model takes 1 to 63"):
        reader.completion(json.dumps({"model": "m", "prompt": [5] * 64}).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "absent"}, "checkpoint .*absent does not exist"),
        ({"host": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid port 0"),
        ({"port": 70_000}, "--port = 70000 must be in 0..65535"),
        ({"api_key": ""}, "--api-key .* is empty"),
        ({"api_key": "a b"}, "characters that a header cannot carry"),
        ({"max_sequences": 0}, "--max-sequences = 0 must be at least 1"),
        ({"max_waiting": -1}, "--max-waiting = -1 must be at least 0"),
        ({"request_timeout": 0.0}, "--request-timeout = 0.0 must be at least 0.001"),
        ({"stop_timeout": float("nan")}, "--stop-timeout = nan must be at least 0"),
        ({"settings": ["parallel.tensr=2"]}, "did you mean tensor"),
        ({"settings": ["stages.evaluate.k=2"]}, "wanted a setting of the table parallel"),
    ],
)
def test_bad_arguments(tmp_path: Path, change: dict[str, object], message: str) -> None:
    (tmp_path / "state.json").write_text("{}")
    arguments = {
        "checkpoint": tmp_path, "host": "127.0.0.1", "port": 0, "api_key": None, "max_waiting": 1, "max_sequences": 1,
        "cache_tokens": None, "request_timeout": 1.0, "stop_timeout": 1.0, "speculate": False, **change,
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        serve(**arguments)


def test_a_port_that_is_taken() -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1 port {port}"):
            bound("127.0.0.1", port)


def test_without_its_packages_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "r1.engine.serve.server")
    assert cli.main(["serve", "anything"]) == 2
    assert capsys.readouterr().err == "r1: r1 serve needs uvicorn, which is not installed: pip install -e '.[serve]'\n"
