"""What the server's tests share: a checkpoint of a small random model, a server in a process of its own or in this."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai

from r1.engine.config import load_config
from r1.engine.data.tokenizer import Tokenizer, train_tokenizer
from r1.engine.engine import Engine

KEY = "sesame"
TEXTS = ["<think>first 9-7=2, 然后 2+1=3, all done.</think><answer>3</answer>", "How do I make tea today?"] * 20


def save_checkpoint(folder: Path, seed: int, *settings: str) -> tuple[Engine, Tokenizer]:
    """A random micro model of 4,096 positions and its tokenizer, as a stage leaves them."""
    config = load_config(str(Path(__file__).with_name("micro.toml")), ["model.max_positions=4096", *settings])
    tokenizer = train_tokenizer(TEXTS, 320)
    engine = Engine(config, train=False, vocab_size=tokenizer.vocab_size, seed=seed)
    engine.save(folder / "checkpoint", optimizer=False)
    tokenizer.save(folder / "tokenizer.json")
    return engine, tokenizer


class ServerProcess:
    """`r1 serve` on a free port, ready. Its log is read to the end by `stop`."""

    def __init__(self, checkpoint: Path, *options: str, launcher: Sequence[str] = ()) -> None:
        self.log = checkpoint.with_name(f"{checkpoint.name}-{time.monotonic_ns()}.log")
        command = [sys.executable, *launcher, "-m", "r1.engine", "serve", str(checkpoint), "--port", "0", *options]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "R1_API_KEY": KEY}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        started = self._wait_for(r"serving (\S+) at http://[^:]+:(\d+)/v1", 120)
        self.model, self.port = started[1], int(started[2])

    def _wait_for(self, pattern: str, seconds: float) -> re.Match[str]:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            found = re.search(pattern, self.log.read_text(errors="replace"))
            if found:
                return found
            time.sleep(0.05)
        self.kill()
        raise AssertionError(f"no {pattern!r} in the log:\n{self.log.read_text(errors='replace')[-4000:]}")

    def client(self, **settings: Any) -> openai.OpenAI:
        settings = {"api_key": KEY, "max_retries": 0, "timeout": 120, **settings}
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **settings)

    def request(
        self, method: str, path: str, body: bytes | dict[str, Any] | None = None, key: str | None = KEY
    ) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, body) of plain HTTP."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        finally:
            connection.close()

    def begin(self, path: str, body: dict[str, Any], receive_bytes: int | None = None) -> socket.socket:
        """A socket on which a request has been sent and nothing been read."""
        return begun(self.port, path, {"model": self.model, **body}, receive_bytes)

    def metrics(self) -> dict[str, float]:
        status, _, text = self.request("GET", "/metrics")
        assert status == 200
        lines = [line for line in text.decode().splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def wait_until(self, wanted: Any, seconds: float = 20) -> dict[str, float]:
        """The metrics, when `wanted` holds of them."""
        end = time.monotonic() + seconds
        while True:
            found = self.metrics()
            if wanted(found):
                return found
            assert time.monotonic() < end, found
            time.sleep(0.02)

    def wait_until_empty(self) -> dict[str, float]:
        names = ("running", "waiting", "pages_used")
        return self.wait_until(lambda found: all(found[f"r1_scheduler_{name}"] == 0 for name in names))

    def resident_bytes(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        assert found
        return int(found[1]) * 1024

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """(exit code, log)."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        try:
            code = self.process.wait(60)
        finally:
            self.kill()
        return code, self.log.read_text(errors="replace")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def begun(port: int, path: str, body: dict[str, Any], receive_bytes: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_bytes:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.connect(("127.0.0.1", port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {KEY}\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def read_until(connection: socket.socket, end: bytes) -> bytes:
    connection.settimeout(60)
    answer = b""
    while end not in answer[-200:]:
        part = connection.recv(2**16)
        assert part, answer[-300:]
        answer += part
    return answer


def read_until_closed(connection: socket.socket, seconds: float) -> bytes:
    """What comes on a socket until the other side closes it."""
    end, parts = time.monotonic() + seconds, []
    while (left := end - time.monotonic()) > 0:
        if select.select([connection], [], [], left)[0]:
            try:
                part = connection.recv(2**16)
            except ConnectionError:
                return b"".join(parts)
            if not part:
                return b"".join(parts)
            parts.append(part)
    raise AssertionError("the server did not close the connection")
