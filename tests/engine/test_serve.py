"""What `r1 serve` answers and what it refuses, to the official client: the same as the scheduler itself."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from r1.engine.data.tasks import Prompt, prompt_tokens
from r1.engine.data.tokenizer import Tokenizer
from r1.engine.engine import Engine
from r1.engine.sampling import Completion, SamplingParameters
from r1.engine.scheduler import Request, Scheduler
from tests.engine.serving import ServerProcess, save_checkpoint

QUESTIONS = ["How do I make tea?", "9-7+1=", "思考", "Sort ascending: 4 2 9", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Engine, Tokenizer]:
    """With exact numerics, so that what a completion is given depends on nothing beside it, to the bit."""
    seed = random.randrange(2**31)
    print(f"model seed {seed}")
    folder = tmp_path_factory.mktemp("run") / "micro"
    return folder, *save_checkpoint(folder, seed, "parallel.numerics=exact")


@pytest.fixture(scope="module")
def server(model: tuple[Path, Engine, Tokenizer]) -> Iterator[ServerProcess]:
    server = ServerProcess(model[0], "--set", "parallel.numerics=exact", "--max-sequences", "24")
    yield server
    code, log = server.stop()
    assert code == 0 and "Traceback" not in log, log[-4000:]


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return server.client()


def direct(model: tuple[Path, Engine, Tokenizer], prompt: list[int], seed: int, copies: int, **settings: Any) -> list:
    """(text, completion) of each copy, by a scheduler of our own."""
    _, engine, tokenizer = model
    scheduler = Scheduler(engine.policy, engine.vocab_size, cache_tokens=10_000, tokenizer=tokenizer)
    settings = {"logprobs": "before_temperature", "stop_ids": (tokenizer.eos_id,), **settings}
    scheduler.submit(Request("one", prompt, SamplingParameters(**settings), seed, copies))
    texts, completions = [""] * copies, [Completion()] * copies
    while not scheduler.idle:
        for update in scheduler.step():
            texts[update.copy] += update.text
            if update.completion is not None:
                completions[update.copy] = update.completion
    return list(zip(texts, completions, strict=True))


# ----------------------------------------------------------------------------------------------------- what it answers


def test_completions_are_the_schedulers(model: Any, server: ServerProcess, client: openai.OpenAI, seed: int) -> None:
    tokenizer = model[2]
    text = QUESTIONS[seed % len(QUESTIONS)]
    tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
    greedy = client.completions.create(model=server.model, prompt=text, temperature=0)
    (wanted, completion), *_ = direct(model, tokens, 0, 1, max_tokens=16, temperature=0.0)
    assert greedy.choices[0].text == wanted and greedy.choices[0].finish_reason == completion.finish_reason
    assert greedy.usage.completion_tokens == len(completion.tokens) and greedy.usage.prompt_tokens == len(tokens)

    sampling = {"temperature": 1.3, "top_p": 0.9, "max_tokens": 40}
    more = {"top_k": 60, "min_p": 0.01}
    found = client.completions.create(
        model=server.model, prompt=[tokens], seed=seed, n=3, logprobs=4, extra_body=more, **sampling
    )
    wanted = direct(model, tokens, seed, 3, top_logprobs=4, **sampling, **more)
    assert len({text for text, _ in wanted}) > 1
    for choice, (text, completion) in zip(found.choices, wanted, strict=True):
        assert (choice.text, choice.finish_reason) == (text, completion.finish_reason)
        assert choice.logprobs.token_logprobs == completion.logprobs
        names = [tokenizer.token_bytes(t).decode(errors="replace") for t in completion.tokens]
        for name, token, top, pairs in zip(
            names, choice.logprobs.tokens, choice.logprobs.top_logprobs, completion.top_logprobs, strict=True
        ):
            assert token == name or token.startswith("bytes:\\x")
            assert sorted(top.values())[-4:] == pytest.approx(sorted(value for _, value in pairs), abs=1e-5)
            assert token in top and len(top) in (4, 5)
    assert found.usage.completion_tokens == sum(len(completion.tokens) for _, completion in wanted)


def test_every_form_of_prompt(model: Any, server: ServerProcess, client: openai.OpenAI, seed: int) -> None:
    tokenizer = model[2]
    tokens = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in QUESTIONS[:3]]
    ask = lambda prompt, **more: client.completions.create(
        model=server.model, prompt=prompt, seed=seed, max_tokens=6, **more
    )
    alone = [ask(text).choices[0].text for text in QUESTIONS[:3]]
    assert [choice.text for choice in ask(QUESTIONS[:3]).choices] == alone
    assert [choice.text for choice in ask(tokens).choices] == alone
    assert ask(tokens[1]).choices[0].text == alone[1]
    assert ask("<bos>" + QUESTIONS[0]).choices[0].text == alone[0]
    twice = ask(QUESTIONS[:2], n=2)
    assert [choice.index for choice in twice.choices] == [0, 1, 2, 3]
    assert [twice.choices[0].text, twice.choices[2].text] == alone[:2]
    assert twice.usage.prompt_tokens == len(tokens[0]) + len(tokens[1])


def test_chat_is_the_schedulers(model: Any, server: ServerProcess, client: openai.OpenAI, seed: int) -> None:
    tokenizer = model[2]
    question = QUESTIONS[seed % len(QUESTIONS)]
    tokens = prompt_tokens(tokenizer, Prompt(id="", task="", text=question))
    parts = [{"type": "text", "text": question[:2]}, {"type": "text", "text": question[2:]}]
    unopened = {tokenizer.token_id("<think>"): -100.0}  # what follows it would be reasoning
    for content in (question, parts):
        found = client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": content}],
            seed=seed,
            n=2,
            max_completion_tokens=20,
            logprobs=True,
            top_logprobs=2,
            logit_bias={str(token): bias for token, bias in unopened.items()},
        )
        wanted = direct(model, tokens, seed, 2, max_tokens=20, top_logprobs=2, logit_bias=tuple(unopened.items()))
        for choice, (text, completion) in zip(found.choices, wanted, strict=True):
            assert choice.message.content == text and choice.message.role == "assistant"
            assert choice.finish_reason == completion.finish_reason
            assert [token.logprob for token in choice.logprobs.content] == completion.logprobs
            data = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
            assert data == b"".join(tokenizer.token_bytes(t) for t in completion.tokens)
            assert [[top.logprob for top in token.top_logprobs] for token in choice.logprobs.content] == [
                [value for _, value in pairs] for pairs in completion.top_logprobs
            ]
        assert found.usage.prompt_tokens == len(tokens)


def test_a_stream_says_what_a_whole_answer_says(server: ServerProcess, client: openai.OpenAI, seed: int) -> None:
    ask = {"model": server.model, "seed": seed, "n": 2, "max_tokens": 24, "temperature": 1.5}
    ask["extra_body"] = {"ignore_eos": True}
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    for prompt in QUESTIONS[:3]:
        whole = client.completions.create(prompt=prompt, logprobs=2, **ask)
        chunks = list(client.completions.create(prompt=prompt, logprobs=2, **ask, **streamed))
        assert len(chunks) > 10 and len({chunk.id for chunk in chunks}) == 1
        assert chunks[-1].usage == whole.usage and not chunks[-1].choices
        assert all(chunk.usage is None for chunk in chunks[:-1])
        for choice in whole.choices:
            parts = [c for chunk in chunks[:-1] for c in chunk.choices if c.index == choice.index]
            assert "".join(part.text for part in parts) == choice.text
            assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
            assert parts[-1].finish_reason == choice.finish_reason
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                assert [x for part in parts for x in getattr(part.logprobs, name)] == getattr(choice.logprobs, name)

    messages = [{"role": "user", "content": QUESTIONS[0]}]
    whole = client.chat.completions.create(messages=messages, logprobs=True, **ask)
    chunks = list(client.chat.completions.create(messages=messages, logprobs=True, **ask, **streamed))
    assert chunks[-1].usage == whole.usage
    for choice in whole.choices:
        parts = [c for chunk in chunks[:-1] for c in chunk.choices if c.index == choice.index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        reasoning = "".join((part.delta.model_extra or {}).get("reasoning_content", "") for part in parts)
        assert reasoning == (choice.message.model_extra or {}).get("reasoning_content", "")
        assert parts[-1].finish_reason == choice.finish_reason
        logprobs = [token for part in parts if part.logprobs for token in part.logprobs.content]
        assert logprobs == choice.logprobs.content


def test_seeds_repeat_and_their_absence_does_not(server: ServerProcess, client: openai.OpenAI, seed: int) -> None:
    ask = lambda **more: client.completions.create(model=server.model, prompt="tea", max_tokens=12, **more)
    others = [threading.Thread(target=lambda: ask(n=4)) for _ in range(2)]
    for thread in others:
        thread.start()
    first = ask(seed=seed).choices[0].text
    assert ask(seed=seed).choices[0].text == first != ask(seed=seed + 1).choices[0].text
    for thread in others:
        thread.join()
    assert ask(seed=-(2**63)).choices[0].text and len({ask().choices[0].text for _ in range(4)}) > 1


def test_stop_strings_and_tokens(model: Any, server: ServerProcess, client: openai.OpenAI, seed: int) -> None:
    tokenizer = model[2]
    ask = lambda **more: client.completions.create(
        model=server.model, prompt="tea", seed=seed, max_tokens=30, extra_body={"ignore_eos": True}, **more
    )
    whole = ask().choices[0]
    assert whole.finish_reason == "length"
    place = 5 + seed % (len(whole.text) - 8)
    stop = whole.text[place : place + 3]
    ended = ask(stop=["never to be found", stop]).choices[0]
    assert ended.finish_reason == "stop" and ended.text == whole.text[: whole.text.index(stop)]
    assert ask(stop=stop).choices[0].text == ended.text
    streamed = "".join(chunk.choices[0].text for chunk in ask(stop=stop, stream=True))
    assert streamed == ended.text

    eos = {str(tokenizer.eos_id): 100}
    ended = client.completions.create(model=server.model, prompt="tea", logit_bias=eos, logprobs=0)
    assert ended.choices[0].finish_reason == "stop" and ended.choices[0].text == ""
    assert ended.usage.completion_tokens == 1 and ended.choices[0].logprobs.tokens == ["<eos>"]
    forced = ask(logit_bias={str(tokenizer.encode("3")[0]): 100, **eos, str(tokenizer.eos_id): -100})
    assert forced.choices[0].text == "3" * 30


# ----------------------------------------------------------------------------------------------------- what it refuses

MESSAGE = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("kind", "change", "param"),
    [
        ("completions", {"prompt": None}, "prompt"),
        ("completions", {"prompt": {"a": 1}}, "prompt"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[]]}, "prompt"),
        ("completions", {"prompt": ["a", [1]]}, "prompt"),
        ("completions", {"prompt": [1, "a"]}, "prompt"),
        ("completions", {"prompt": [1, True]}, "prompt"),
        ("completions", {"prompt": [1, -1]}, "prompt"),
        ("completions", {"prompt": [1, 321]}, "prompt"),
        ("completions", {"prompt": [1] * 4096}, "prompt"),
        ("completions", {"prompt": "tea " * 4096}, "prompt"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"max_tokens": "5"}, "max_tokens"),
        ("completions", {"max_tokens": True}, "max_tokens"),
        ("completions", {"max_tokens": 2.5}, "max_tokens"),
        ("completions", {"n": 0}, "n"),
        ("completions", {"n": 129}, "n"),
        ("completions", {"temperature": -0.1}, "temperature"),
        ("completions", {"temperature": 2.1}, "temperature"),
        ("completions", {"temperature": 1e-30}, "temperature"),
        ("completions", {"top_p": 0}, "top_p"),
        ("completions", {"top_p": 1.1}, "top_p"),
        ("completions", {"top_k": 0}, "top_k"),
        ("completions", {"min_p": 2}, "min_p"),
        ("completions", {"stop": ["a"] * 5}, "stop"),
        ("completions", {"stop": ""}, "stop"),
        ("completions", {"stop": [3]}, "stop"),
        ("completions", {"seed": 2**63}, "seed"),
        ("completions", {"logprobs": 6}, "logprobs"),
        ("completions", {"logprobs": True}, "logprobs"),
        ("completions", {"logprobs": 5, "n": 128, "max_tokens": 4000}, "logprobs"),
        ("completions", {"logit_bias": {"a": 1}}, "logit_bias"),
        ("completions", {"logit_bias": {"321": 1}}, "logit_bias"),
        ("completions", {"logit_bias": {"5": 101}}, "logit_bias"),
        ("completions", {"stream": "yes"}, "stream"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ("completions", {"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ("completions", {"echo": True}, "echo"),
        ("completions", {"best_of": 2}, "best_of"),
        ("completions", {"suffix": "x"}, "suffix"),
        ("completions", {"frequency_penalty": 0.5}, "frequency_penalty"),
        ("completions", {"presence_penalty": False}, "presence_penalty"),
        ("completions", {"beams": 4}, "beams"),
        ("completions", {"messages": MESSAGE}, "messages"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": "hi"}, "messages"),
        ("chat/completions", {"messages": [3]}, "messages.0"),
        ("chat/completions", {"messages": [{"role": "user"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": 3, "content": "hi"}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "system", "content": "hi"}]}, "messages"),
        ("chat/completions", {"messages": MESSAGE * 2}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ("chat/completions", {"messages": [{**MESSAGE[0], "tool_calls": [{}]}]}, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "tea " * 4096}]}, "messages"),
        ("chat/completions", {"top_logprobs": 3}, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens"),
        ("chat/completions", {"tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"reasoning_effort": "low"}, "reasoning_effort"),
    ],
    ids=str,
)
def test_bad_parameters_are_named(server: ServerProcess, kind: str, change: dict[str, Any], param: str) -> None:
    valid = {"prompt": "hi"} if kind == "completions" else {"messages": MESSAGE}
    body = {"model": server.model, "max_tokens": 2, **valid, **change}
    status, _, answer = server.request("POST", f"/v1/{kind}", {k: v for k, v in body.items() if v is not None})
    error = json.loads(answer)["error"]
    assert status == 400 and error["param"] == param and error["type"] == "invalid_request_error", answer
    assert param.partition(".")[0] in error["message"] and len(error["message"]) < 400
    too_long = any(len(str(value)) > 4096 for value in change.values())
    assert (error["code"] == "context_length_exceeded") == too_long


def test_parameters_at_rest_pass(server: ServerProcess, client: openai.OpenAI) -> None:
    rest = {"frequency_penalty": 0, "presence_penalty": 0.0, "user": "someone", "logit_bias": {}, "stop": None}
    common = {"model": server.model, "max_tokens": 2, "seed": None, "temperature": None, **rest}
    assert client.completions.create(prompt="hi", best_of=1, echo=False, suffix=None, **common).choices
    more = {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "store": False, "metadata": {}}
    assert client.chat.completions.create(messages=MESSAGE, service_tier="auto", **more, **common).choices


def test_bad_bodies(server: ServerProcess) -> None:
    deep = b"[" * 100_000
    for body in (b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe", b'{"model": NaN}', deep, b'{"a": "\\ud800"}'):
        status, _, answer = server.request("POST", "/v1/completions", body)
        assert status == 400 and json.loads(answer)["error"]["code"] == "invalid_json", body[:20]
    huge = f'{{"model": "{server.model}", "prompt": "x", "n": {"9" * 4000}}}'.encode()
    assert server.request("POST", "/v1/completions", huge)[0] == 400


def test_long_prompts_are_refused_without_holding_up_others(server: ServerProcess) -> None:
    large = {"model": server.model, "prompt": "a" * 10_000_000}
    medium = {"model": server.model, "prompt": "tea " * 1_900_000}
    tokens = {"model": server.model, "prompt": [[7] * 2_000_000]}
    for body, status, code in (
        (large, 413, "body_too_large"),
        (medium, 400, "context_length_exceeded"),
        (tokens, 400, "context_length_exceeded"),
    ):
        slowest = 0.0
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.request, "POST", "/v1/completions", body)
            while not answer.done():
                began = time.monotonic()
                assert server.request("GET", "/health")[0] == 200
                slowest = max(slowest, time.monotonic() - began)
        found, _, text = answer.result()
        assert found == status and json.loads(text)["error"]["code"] == code
        assert slowest < 1, slowest


def test_keys_routes_and_models(server: ServerProcess, client: openai.OpenAI) -> None:
    for key in (None, "", "sesam", "sesamee", "Sesame", "\xe4"):
        status, headers, answer = server.request("POST", "/v1/completions", b"{", key=key)
        assert status == 401 and json.loads(answer)["error"]["code"] == "invalid_api_key", key
        assert headers["www-authenticate"] == "Bearer"
        assert server.request("GET", "/v1/unknown", key=key)[0] == 401
        assert server.request("GET", "/health", key=key)[0] == server.request("GET", "/metrics", key=key)[0] == 200
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").models.list()
    assert [model.id for model in client.models.list()] == [server.model] == ["micro"]
    assert client.models.retrieve(server.model).owned_by == "r1"
    with pytest.raises(openai.NotFoundError, match="model"):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt="hi")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    for method, path, status in (("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/v2", 404)):
        found, _, answer = server.request(method, path)
        assert found == status and json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_metrics_count(server: ServerProcess, client: openai.OpenAI) -> None:
    before = server.wait_until_empty()
    found = client.completions.create(model=server.model, prompt="tea", n=2, max_tokens=9)
    after = server.metrics()
    grown = lambda name: after[name] - before.get(name, 0)
    assert grown('r1_requests_total{route="completions",status="200"}') == 1
    assert grown("r1_prompt_tokens_total") == found.usage.prompt_tokens
    assert grown("r1_completion_tokens_total") == found.usage.completion_tokens
    assert grown("r1_scheduler_tokens_generated_total") == found.usage.completion_tokens
    assert grown("r1_time_to_first_token_seconds_count") == 1
    assert grown("r1_time_per_output_token_seconds_count") == 2
    assert grown('r1_request_seconds_count{route="completions"}') == 1
    assert 0 < grown("r1_time_to_first_token_seconds_sum") < grown('r1_request_seconds_sum{route="completions"}') < 60
