"""`r1 serve` under many: two processes for one model, a thousand clients at once, ten thousand requests of any kind."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from r1.engine.serve.server import bound
from tests.engine.serving import KEY, ServerProcess, read_until, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "micro"
    save_checkpoint(folder, random.randrange(2**31))
    return folder


def launched(processes: int) -> tuple[str, ...]:
    listener = bound("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    return ("-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_two_processes_serve_one_model(folder: Path, layout: str) -> None:
    answers = []
    for options, launcher in (((), ()), (("--set", f"parallel.{layout}=2"), launched(2))):
        server = ServerProcess(folder, *options, launcher=launcher)
        try:
            found = server.client().completions.create(
                model=server.model, prompt=["tea", "9-7="], n=2, seed=7, max_tokens=20, temperature=0.5
            )
            answers.append([choice.text for choice in found.choices])
            connection = server.begin(
                "/v1/completions", {"prompt": "tea", "max_tokens": 4000, "ignore_eos": True, "n": 3}
            )
            server.wait_until(lambda found: found["r1_scheduler_running"] == 3)
            connection.close()
            server.wait_until_empty()
            time.sleep(11)  # past the heartbeat of an idle server
            assert server.client().completions.create(model=server.model, prompt="x", max_tokens=2).choices
            log = server.stop()[1]
            assert "Finished server process" in log
        finally:
            server.kill()
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_replicas_are_refused(folder: Path) -> None:
    with pytest.raises(AssertionError, match="start one server a replica"):
        ServerProcess(folder, launcher=launched(2))


@pytest.mark.slow
@pytest.mark.parametrize("waiting", [1000, 100])
def test_a_thousand_clients_at_once(folder: Path, waiting: int) -> None:
    """All are answered: those for whom there is no room, with 429."""
    server = ServerProcess(folder, "--max-sequences", "64", "--max-waiting", str(waiting))
    body = {"prompt": "tea", "max_tokens": 50, "ignore_eos": True, "stream": True}
    try:
        clients = [server.begin("/v1/completions", body) for _ in range(1000)]
        at_once = server.wait_until(lambda found: found["r1_scheduler_waiting"] >= min(waiting, 500), 60)
        assert at_once["r1_scheduler_running"] <= 64 and at_once["r1_scheduler_waiting"] <= waiting
        shed = 0
        for client in clients:
            head = client.recv(15)
            shed += head == b"HTTP/1.1 429 To"
            answer = read_until(client, b"}}" if head == b"HTTP/1.1 429 To" else b"[DONE]")
            client.close()
            assert head in (b"HTTP/1.1 200 OK", b"HTTP/1.1 429 To"), answer
        found = server.wait_until_empty()
        assert shed == 0 if waiting == 1000 else 0 < shed <= 1000 - 64 - waiting, shed
        assert found['r1_requests_total{route="completions",status="200"}'] == 1000 - shed
        assert found["r1_completion_tokens_total"] == 50 * (1000 - shed)
        assert server.stop()[0] == 0
    finally:
        server.kill()


JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    2**70,
    1e300,
    -0.5,
    "",
    "x",
    "\u0000",
    "tea" * 50,
    [],
    {},
    [[]],
    [1, "a"],
    {"a": {}},
]


def valid_body(rng: random.Random, kind: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "micro", "max_tokens": rng.randint(1, 12)}
    if kind == "completions":
        tokens = [rng.randrange(320) for _ in range(rng.randint(1, 40))]
        body["prompt"] = rng.choice(["tea", "思考 😀", tokens, [tokens, tokens[:5]], ["a", "b", ""]])
        settings: dict[str, Any] = {"logprobs": rng.randint(0, 5)}
    else:
        body["messages"] = [{"role": "user", "content": "x" * rng.randint(0, 50)}]
        settings = {"logprobs": True, "top_logprobs": rng.randint(0, 20)}
    if rng.random() > 0.5:
        settings = {}
    more = {
        "n": rng.randint(1, 4), "temperature": rng.choice([0, 0.6, 2]), "top_p": rng.uniform(0.1, 1), "seed": 5,
        "top_k": rng.randint(1, 99), "min_p": rng.random(), "stop": rng.choice(["e", ["a", "thi"], "。"]),
        "logit_bias": {str(rng.randrange(320)): rng.uniform(-100, 100)}, "stream": True, "ignore_eos": True,
    }  # fmt: skip
    return {**body, **settings, **{name: value for name, value in more.items() if rng.random() < 0.3}}


def fuzz_request(rng: random.Random) -> tuple[bytes, float | None]:
    """Bytes for a connection, and the seconds after which it is closed unread, if it is."""
    kind = rng.choice(["completions", "chat/completions"])
    body = valid_body(rng, kind)
    choice = rng.random()
    if 0.4 < choice < 0.65:
        for _ in range(rng.randint(1, 2)):
            body[rng.choice([*body, "tools", "echo", "best_of", "zzz", "stream_options", "user"])] = rng.choice(JUNK)
    data = json.dumps(body).encode()
    if 0.65 < choice < 0.75:
        data = bytes(rng.choice([rng.randbytes(rng.randint(0, 300)), data[: rng.randrange(len(data))], b"\xff" + data]))
    method, path, key, length = "POST", f"/v1/{kind}", KEY, len(data)
    if 0.75 < choice < 0.85:
        method = rng.choice(["GET", "PUT", "DELETE", "POST", "HEAD", "OPTIONS"])
        path = rng.choice([path, "/v1/models", "/v1/models/micro", "/health", "/metrics", "/", "/v1/%ff", "/v1//"])
        key = rng.choice([KEY, "wrong", ""])
    if 0.85 < choice < 0.9:
        length += rng.randint(-len(data), 50)
    if 0.9 < choice < 0.93:
        return rng.randbytes(rng.randint(1, 500)) + b"\r\n\r\n", 0.5
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Length: {length}\r\n\r\n"
    leaves = rng.random() * 0.3 if choice > 0.93 else (0.5 if length != len(data) else None)
    return head.encode() + data, leaves


@pytest.mark.slow
def test_ten_thousand_requests_of_any_kind(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    statuses: dict[int, int] = {}

    async def one(server: ServerProcess, data: bytes, leaves: float | None) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(data)
        try:
            async with asyncio.timeout(leaves or 120):
                answer = await reader.read(-1)
        except (TimeoutError, ConnectionError):
            assert leaves is not None, data[:2000]
            return
        finally:
            writer.transport.abort()
        if leaves is None:
            head, _, content = answer.partition(b"\r\n\r\n")
            status = int(head.split()[1])
            statuses[status] = statuses.get(status, 0) + 1
            assert status in (200, 400, 401, 404, 405, 429, 504), (data[:2000], answer[:500])
            if status >= 400 and content:
                assert json.loads(content)["error"]["message"], (data, answer)
            elif b"text/event-stream" in head:
                assert b"[DONE]" in content, (data, answer)

    async def many(server: ServerProcess, count: int) -> None:
        async def worker() -> None:
            while left:
                left.pop()
                await one(server, *fuzz_request(rng))

        left = list(range(count))
        await asyncio.gather(*(worker() for _ in range(100)))

    server = ServerProcess(
        folder, *"--max-sequences 32 --max-waiting 300 --cache-tokens 500 --request-timeout 10".split()
    )
    try:
        ask = lambda: server.client().completions.create(model=server.model, prompt="tea", seed=1, max_tokens=20)
        before = ask().choices[0].text
        asyncio.run(many(server, 1000))
        memory = server.resident_bytes()
        asyncio.run(many(server, 9000))
        assert server.request("GET", "/health")[0] == 200
        found = server.wait_until_empty()
        assert ask().choices[0].text == before
        assert min(statuses.get(status, 0) for status in (200, 400, 401, 404, 405)) > 20, statuses
        assert found["r1_scheduler_tokens_generated_total"] > 10_000 and found["r1_scheduler_evictions_total"] > 0
        assert server.resident_bytes() < memory + 100 * 2**20
        code, log = server.stop()
        assert code == 0 and "Traceback" not in log, log[-4000:]
    finally:
        server.kill()
    print(statuses, found)
