"""`r1 serve` when it has no room, when clients leave or do not read, and when it ends."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from r1.engine.data.tokenizer import Tokenizer
from r1.engine.engine import Engine
from r1.engine.sampling import SamplingParameters
from r1.engine.scheduler import Request, Scheduler, Update
from r1.engine.serve.chat import ChatTemplate
from r1.engine.serve.errors import ApiError
from r1.engine.serve.metrics import Metrics
from r1.engine.serve.protocol import Reader
from r1.engine.serve.server import bound, run
from r1.engine.serve.streams import Streams, stopping
from r1.engine.serve.worker import Worker
from tests.engine.serving import ServerProcess, begun, read_until, read_until_closed, save_checkpoint

MESSAGE = [{"role": "user", "content": "hi"}]
# 300 tokens whose log-probabilities are more than fits into a connection of small buffers.
LONG_ANSWER = {
    "model": "model",
    "messages": MESSAGE,
    "max_tokens": 150,
    "n": 2,
    "ignore_eos": True,
    "logprobs": True,
    "top_logprobs": 20,
    "stream": True,
    "stream_options": {"include_usage": True},
}
LONG = {"prompt": "tea", "max_tokens": 4000, "ignore_eos": True}

Model = tuple[Path, Engine, Tokenizer]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("run") / "micro"
    return folder, *save_checkpoint(folder, random.randrange(2**31))


# ------------------------------------------------------------------------------------------------- little room and time


@contextmanager
def small_server(folder: Path, *options: str) -> Iterator[ServerProcess]:
    """Four completions at once, four that wait, and guesses ahead."""
    server = ServerProcess(folder, "--max-sequences", "4", "--max-waiting", "4", "--speculate", *options)
    try:
        yield server
    finally:
        server.kill()


def fill(server: ServerProcess, stream: bool) -> tuple[socket.socket, socket.socket]:
    """Two requests that take all the room: one runs, one waits."""
    runs = server.begin("/v1/completions", {**LONG, "n": 4, "stream": stream})
    server.wait_until(lambda found: found["r1_scheduler_running"] == 4)
    waits = server.begin("/v1/completions", {**LONG, "n": 4})
    server.wait_until(lambda found: found["r1_scheduler_running"] == found["r1_scheduler_waiting"] == 4)
    return runs, waits


@pytest.fixture(scope="module")
def small(model: Model) -> Iterator[ServerProcess]:
    with small_server(model[0], "--request-timeout", "5", "--cache-tokens", "3000") as server:
        yield server


def test_a_server_with_little_room(small: ServerProcess) -> None:
    client, ask = small.client(), {"model": small.model, "prompt": "tea", "max_tokens": 4}
    with pytest.raises(openai.BadRequestError, match="9 completions"):
        client.completions.create(n=9, **ask)
    with pytest.raises(openai.BadRequestError) as caught:  # more than its cache, less than the model's length
        client.completions.create(**{**ask, "prompt": [5] * 3500})
    assert caught.value.code == "context_length_exceeded"

    runs, waits = fill(small, stream=False)
    with pytest.raises(openai.RateLimitError) as shed:
        client.completions.create(**ask)
    assert shed.value.response.headers["Retry-After"] == "1" and shed.value.code == "rate_limit_exceeded"
    assert client.models.list().data, "what takes no place is answered"
    # Their time ends: what ran is cut off, who was behind got nothing, or little.
    assert b'"finish_reason":"length"' in read_until(runs, b"}}")
    answer = read_until(waits, b"}}")
    assert b" 504 " in answer.splitlines()[0] or b'"finish_reason":"length"' in answer, answer[:300]
    small.wait_until_empty()

    # The client's own retries get it through when there is room again.
    patient, ask = small.client(max_retries=9), {**ask, "n": 4, "extra_body": {"ignore_eos": True}}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: patient.completions.create(**ask), range(4)))
    assert [answer.usage.completion_tokens for answer in found] == [16] * 4
    assert small.metrics()["r1_scheduler_drafts_proposed_total"] > 0


def test_who_leaves_frees_what_was_kept(small: ServerProcess) -> None:
    four = {**LONG, "n": 4}
    chat = {"messages": MESSAGE, **{name: value for name, value in four.items() if name != "prompt"}}
    left = 'r1_requests_total{route="completions",status="499"}'
    before = small.metrics().get(left, 0)
    for path, body in (
        ("/v1/completions", {**four, "stream": True}),
        ("/v1/completions", four),
        ("/v1/completions", {**four, "prompt": ["tea", "x"]}),
        ("/v1/chat/completions", {**chat, "stream": True}),
    ):
        small.wait_until_empty()
        connection = small.begin(path, body)
        if body.get("stream"):
            assert b"200 OK" in connection.recv(1000)
        small.wait_until(lambda found: found["r1_scheduler_running"] == 4 and found["r1_scheduler_pages_used"] > 0)
        began = time.monotonic()
        connection.close()
        small.wait_until_empty()
        assert time.monotonic() - began < 3, "at once, and not when its five seconds are over"
    assert small.metrics()[left] == before + 2


# ------------------------------------------------------------------------------------------------------------- its end


def test_one_signal_lets_what_runs_finish_and_a_second_aborts_it(model: Model) -> None:
    with small_server(model[0], "--stop-timeout", "600") as server:
        ends = server.begin("/v1/completions", {**LONG, "max_tokens": 80})
        server.wait_until(lambda found: found["r1_scheduler_running"] == 1)
        runs = server.begin("/v1/completions", {**LONG, "n": 3, "stream": True})
        server.wait_until(lambda found: found["r1_scheduler_running"] == 4)
        waits = server.begin("/v1/completions", {**LONG, "n": 4})
        server.wait_until(lambda found: found["r1_scheduler_waiting"] == 4)
        server.process.send_signal(signal.SIGTERM)
        status = 200
        while status == 200:
            status = server.request("GET", "/health")[0]
        assert status == 503
        with pytest.raises(openai.InternalServerError) as refused:
            server.client().completions.create(model=server.model, prompt="tea")
        assert refused.value.status_code == 503 and refused.value.code == "stopping"
        answer = read_until(ends, b"}}")
        assert b" 200 OK" in answer and json.loads(answer.split(b"\r\n\r\n")[1])["usage"]["completion_tokens"] == 80

        server.process.send_signal(signal.SIGINT)
        answer = read_until_closed(runs, 60)
        assert b" 200 OK" in answer and b"[DONE]" not in answer and b'"code":"stopping"' in answer, answer[-300:]
        assert b" 503 " in read_until_closed(waits, 60).splitlines()[0]
        code, log = server.wait()
        assert code == 0 and "Traceback" not in log and "tea" not in log, log


# ----------------------------------------------------------------------------------------------------- in this process


@contextmanager
def served(scheduler: Scheduler, template: ChatTemplate, **settings: Any) -> Iterator[tuple[int, list[BaseException]]]:
    """(the port, what ended the server). Connections' buffers are small, so that little fills them."""
    listener = bound("127.0.0.1", 0)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    listener.listen()
    worker = Worker(scheduler, scheduler.trainer.world)
    reader = Reader("model", template.tokenizer, template, scheduler.limit, scheduler.vocab_size)
    raised: list[BaseException] = []

    def serve() -> None:
        try:
            run(worker, reader, listener, max_waiting=9, api_key=None, **settings)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1], raised
    finally:
        worker.stop(0)
        thread.join(60)
        assert not thread.is_alive()


def test_who_reads_late_gets_it_all(model: Model) -> None:
    """What does not fit into the connection waits, merged."""
    _, engine, tokenizer = model
    scheduler = Scheduler(engine.policy, engine.vocab_size, cache_tokens=20_000, tokenizer=tokenizer)
    with served(scheduler, ChatTemplate(tokenizer, model[0]), request_timeout=300) as (port, _):
        late = begun(port, "/v1/chat/completions", LONG_ANSWER, receive_bytes=2048)
        while not scheduler.counts["tokens_generated"] or not scheduler.idle:
            time.sleep(0.05)
        answer = read_until(late, b"data: [DONE]\n\n")
    events = [json.loads(line[6:]) for line in answer.decode().splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    assert [choice["finish_reason"] for choice in choices].count("length") == 2
    counts = [len(choice["logprobs"]["content"]) for choice in choices if choice["logprobs"]]
    assert sum(counts) == events[-1]["usage"]["completion_tokens"] == 300
    assert max(counts) > 50, "nothing waited"


def test_who_never_reads_or_never_sends_is_cut_off(model: Model) -> None:
    """Who does not read has the request's time and then five seconds; who does not send its body has the first."""
    _, engine, tokenizer = model
    scheduler = Scheduler(engine.policy, engine.vocab_size, cache_tokens=20_000, tokenizer=tokenizer)
    limit = 3
    with served(scheduler, ChatTemplate(tokenizer, model[0]), request_timeout=limit) as (port, _):
        began = time.monotonic()
        never = begun(port, "/v1/chat/completions", LONG_ANSWER, receive_bytes=2048)
        halting = socket.create_connection(("127.0.0.1", port))
        halting.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\n{")
        assert b" 408 " in read_until(halting, b"}}").splitlines()[0]
        assert time.monotonic() - began > limit
        counted = 'r1_requests_total{route="chat",status="200"} 1.0'
        while counted not in urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode():
            time.sleep(0.05)
            assert time.monotonic() - began < 60, "who never reads is not cut off"
        assert time.monotonic() - began > limit + 5
        assert b"[DONE]" not in read_until_closed(never, 30)


def test_what_is_finished_is_not_lost_when_the_worker_ends(model: Model) -> None:
    """Though its reader learns of both at once."""
    _, engine, tokenizer = model
    scheduler = Scheduler(engine.policy, engine.vocab_size, cache_tokens=10_000, tokenizer=tokenizer)
    worker = Worker(scheduler, engine.world)
    streams = Streams(worker, 9, Metrics(scheduler.statistics))

    async def ask() -> int:
        streams.loop = asyncio.get_running_loop()
        requests = [Request(0, [5], SamplingParameters(8), seed=1, copies=3)]
        stream = streams.open(requests, time.monotonic() + 60)
        worker.stop(60)
        worker.run()  # meanwhile the event loop stands still
        streams.end(stopping())
        return sum(len(piece.tokens) for piece in (await stream.whole()).values())

    assert asyncio.run(ask()) == 24
    with pytest.raises(ApiError, match="stopping"):
        streams.open([], 0.0)


class Failing(Scheduler):
    """One that breaks at its hundredth step."""

    steps = 0

    def step(self) -> list[Update]:
        self.steps += 1
        if self.steps == 100:
            raise ZeroDivisionError("a bug of ours")
        return super().step()


def test_a_broken_engine_ends_the_server(model: Model, tmp_path: Path) -> None:
    """And before that: a Hugging Face chat template beside the tokenizer, one that opens the reasoning."""
    _, engine, tokenizer = model
    tokenizer.save(tmp_path / "tokenizer.json")
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}<think>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<eos>"}))
    scheduler = Failing(engine.policy, engine.vocab_size, cache_tokens=10_000, tokenizer=tokenizer)
    with served(scheduler, ChatTemplate(tokenizer, tmp_path), request_timeout=60) as (port, raised):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", max_retries=5)
        ask = {"model": "model", "extra_body": {"ignore_eos": True}}
        messages = [{"role": "system", "content": "be brief"}, *MESSAGE]
        stay = {str(tokenizer.token_id("</think>")): -100}
        found = client.chat.completions.create(messages=messages, max_tokens=8, logit_bias=stay, **ask)
        assert found.choices[0].message.content == "" and found.choices[0].message.reasoning_content
        assert found.usage.prompt_tokens == len(tokenizer.encode("system:be brief\nuser:hi\n<think>"))

        with pytest.raises(openai.APIError) as caught:
            for _ in client.completions.create(prompt="tea", max_tokens=400, stream=True, **ask):
                pass
        assert caught.value.code == "engine_failed"
    assert [type(error) for error in raised] == [ZeroDivisionError]
