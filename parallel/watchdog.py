"""One thread a process that ends a world in which nobody can go on any more, and says why: a hang or a rank's error.

It speaks to the other ranks through torchrun's TCPStore, never through a process group, so it works while every group
hangs. Every `interval` seconds a rank writes its heartbeat, reads its neighbour's, and asks whether there is an alarm:
four small requests. The rest is written and read once there is an alarm.

The alarm is one key: the first that writes it wins. An error ends the others with the same exit code and one line a
host; a hang makes every rank publish where it stands, the rank that raised the alarm print the report, and all end
with EXIT_HANG. Then torchrun ends what does not react any more, and restarts the world where --max-restarts says so.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from r1.parallel import hang

EXIT_HANG = 75  # EX_TEMPFAIL of sysexits.h: try again
# What torch's own limit on a collective is above ours, in case that the report cannot be made.
GRACE_SECONDS = 120.0
LONGEST_INTERVAL_SECONDS = 10.0
ALARM, VERDICT = "alarm", "verdict"

_current: Watchdog | None = None
_ending = threading.Lock()


class Watchdog:
    """Watches this rank and the next one.

    `limit`: seconds within which a hang is reported. Of 600 a collective may take 520, of a short limit some two
    thirds; the rest is for the report.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, limit: float):
        self.store, self.rank, self.size, self.limit = store, rank, size, limit
        self.interval = min(LONGEST_INTERVAL_SECONDS, limit / 20)
        # Waiting is counted in ticks, not by the clock, which runs on while a whole job is suspended.
        # The rest of the limit is for the tick that notices, three in which a stopped rank may answer, a second, and
        # three to spare on a busy machine.
        self.patience = max(1, int((limit - 1) / self.interval) - 7)
        self.name = f"[rank {rank} {socket.gethostname()}]"
        self._beats = 0
        self._busy: dict[str, list[Any]] = {}  # group → [its counters, ticks since they changed]
        self._neighbour: list[Any] = [None, 0]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="r1 watchdog", daemon=True)
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """This rank takes no more part; the others need not wait for its heartbeat."""
        self._stopped.set()
        self._thread.join(timeout=2 * self.interval)
        try:
            self.store.set(f"heartbeat/{self.rank}", json.dumps({"left": True}))
        except RuntimeError:
            pass  # the process that held the store has ended before us

    def raise_alarm(self, alarm: dict[str, Any]) -> dict[str, Any]:
        """The alarm that is in force: this one, or that of a rank that was first."""
        alarm = {"rank": self.rank, "host": socket.gethostname(), "time": time.time(), **alarm}
        return json.loads(self.store.compare_set(ALARM, "", json.dumps(alarm)))

    def alarm(self) -> dict[str, Any] | None:
        return json.loads(self.store.get(ALARM)) if self.store.check([ALARM]) else None

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while not self._stopped.wait(self.interval):
                self._beat()
                alarm = self.alarm() or self._suspicion()
                if alarm and not (alarm["rank"] == self.rank and "error" in alarm):  # of our own, the main thread tells
                    self.obey(alarm)
        except RuntimeError as error:  # torch.distributed's errors are RuntimeErrors
            if not self._stopped.is_set() and os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"r1: {self.name} lost the store of the run; hangs go unseen: {error}", file=sys.stderr)

    def _beat(self) -> None:
        self._beats += 1
        beat = {"beats": self._beats, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        self.store.set(f"heartbeat/{self.rank}", json.dumps(beat))

    def _suspicion(self) -> dict[str, Any] | None:
        """The alarm, raised, if a collective of this rank or the next rank's heart stands still for too long."""
        busy = hang.busy_groups()
        self._busy = {group: _ticked(self._busy.get(group), counters) for group, counters in busy.items()}
        # == : once a standstill. A group whose calls ended out of order also differs; it has no pending entry.
        if any(ticks == self.patience for _, ticks in self._busy.values()):
            pending = hang.pending_collectives()
            if pending:
                return self.raise_alarm({"hang": pending[0]["kind"]})
        key = f"heartbeat/{(self.rank + 1) % self.size}"
        beat = self.store.get(key) if self.store.check([key]) else b""
        self._neighbour = _ticked(self._neighbour, beat)
        if self._neighbour[1] >= self.patience and b"left" not in beat:
            return self.raise_alarm({"hang": "a rank without heartbeat"})
        return None

    # ------------------------------------------------------------------------------------------------ the end

    def obey(self, alarm: dict[str, Any]) -> NoReturn:
        """End this process as the alarm wants it; does not return."""
        _ending.acquire()  # held for good: either the main thread or the watchdog ends the process, not both
        try:
            if "error" in alarm:
                text = f"stopped because rank {alarm['rank']} ({alarm['host']}) failed: {alarm['error']}"
                if alarm["told_by_each_host"]:
                    self._tell_once(text)
                end(alarm["code"], text, alarm["time"] + 1)
            self.store.set(f"state/{self.rank}", json.dumps(hang.state_of_this_process()))
            if alarm["rank"] == self.rank:
                text = self._report()
                print(f"r1: {text}\nr1: all ranks end with exit code {EXIT_HANG}", file=sys.stderr, flush=True)
                self.store.set(VERDICT, text)
                self._wait_for(lambda: False, 2 * self.interval)  # the store may be this process's own
            else:
                self._wait_for(lambda: self.store.check([VERDICT]), 6 * self.interval + 30)
                text = self.store.get(VERDICT).decode() if self.store.check([VERDICT]) else "a hang"
            end(EXIT_HANG, text, alarm["time"] + (alarm["rank"] != self.rank))
        except RuntimeError:  # the store has gone with the process that held it
            end(alarm.get("code", EXIT_HANG), "stopped with the other ranks")
        except Exception:  # a report that cannot be made must not keep the world hanging
            end(EXIT_HANG, f"a hang, whose report failed: {traceback.format_exc()}")

    def _report(self) -> str:
        everyone = range(self.size)
        wanted = [f"state/{rank}" for rank in everyone]
        self._wait_for(lambda: self.store.check(wanted), 3 * self.interval + 1)
        states, silent = {}, {}
        for rank in everyone:
            if self.store.check([f"state/{rank}"]):
                states[rank] = json.loads(self.store.get(f"state/{rank}"))
            else:
                silent[rank] = self._last_sign(rank)
        return hang.report(states, silent, self.limit)

    def _last_sign(self, rank: int) -> str:
        key = f"heartbeat/{rank}"
        beat = json.loads(self.store.get(key)) if self.store.check([key]) else {}
        if beat.get("left"):
            return "has left the run"
        if not beat:
            return "never gave a heartbeat"
        return (
            f"(host {beat['host']}, process {beat['pid']}) gives no heartbeat for {time.time() - beat['time']:.0f} s:"
            " the process is stopped or its machine gone"
        )

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(self.interval / 5)

    def _tell_once(self, text: str) -> None:
        """One line a host: a thousand ranks have the same to say."""
        if self.store.add(f"told/{socket.gethostname()}", 1) == 1:
            print(f"r1: {self.name} {text}", file=sys.stderr, flush=True)


def _ticked(before: list[Any] | None, value: Any) -> list[Any]:
    return [value, before[1] + 1] if before and before[0] == value else [value, 0]


def meet(timeout: float) -> dist.Store:
    """The store of a new torchrun world, empty. RuntimeError where not every rank comes within `timeout` seconds.

    torchrun's store outlives the workers, and torch 2.13 neither clears it nor names its keys by the attempt: restarted
    workers would read where the dead ones listened. Nor is torchrun's count of restarts the same on a node that came
    later. So rank 0 makes up a name, and gives it to whoever shows a token that only a living process can have.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    token = uuid.uuid4().hex
    store.set(f"r1/token/{rank}", token)
    if rank != 0:
        world = store.get(f"r1/world of {token}").decode()
        store.set(f"r1/{world}/here/{rank}", "")
        return dist.PrefixStore(f"r1/{world}", store)
    world, deadline = token, time.monotonic() + timeout
    absent, answered = set(range(1, size)), set()
    while absent:
        for other in sorted(absent):
            if store.check([f"r1/{world}/here/{other}"]):
                absent.discard(other)
            elif store.check([f"r1/token/{other}"]):
                asking = store.get(f"r1/token/{other}").decode()
                if asking not in answered:
                    store.set(f"r1/world of {asking}", world)
                    answered.add(asking)
        if absent and time.monotonic() > deadline:
            raise RuntimeError(f"ranks {hang.ranges(absent)} of {size} did not come within {timeout:.0f} s")
        time.sleep(0.02)
    return dist.PrefixStore(f"r1/{world}", store)


def start(store: dist.Store, rank: int, size: int, limit: float) -> None:
    """Watch this process of the world that met at `store`; `limit`: seconds within which a hang is reported."""
    global _current
    if size > 1:  # else there is nobody to wait for
        _current = Watchdog(store.clone(), rank, size, limit)  # a connection of its own: requests take turns on one


def stop() -> None:
    """Stop watching; before the process groups go."""
    global _current
    if _current is not None:
        _current.stop()
        _current = None


def fail(error: str, code: int, text: str) -> NoReturn:
    """End this rank of a torchrun world, which failed with `error` (one line): prints `text` if it is the first to
    fail, else who was."""
    name = f"[rank {os.environ['RANK']} {socket.gethostname()}] " if os.environ["RANK"] != "0" else ""
    watchdog = _current
    if watchdog is not None:
        try:
            if _blames_another(error):
                watchdog._wait_for(lambda: watchdog.store.check([ALARM]), 3.0 + watchdog.interval)
            # Bad input is one sentence, not one a host.
            alarm = watchdog.raise_alarm({"error": error, "code": code, "told_by_each_host": code == 1})
            if alarm["rank"] != watchdog.rank:
                watchdog.obey(alarm)
        except RuntimeError:
            pass  # no store to ask: tell
        _ending.acquire()
    elif not _first_before_joining():
        time.sleep(3)  # most likely it is the same bad input, and torchrun ends this process meanwhile
    print("\n".join(f"{name}{line}" for line in text.splitlines()), file=sys.stderr, flush=True)
    end(code, text)


def _blames_another(error: str) -> bool:
    """Whether another rank's end is what this one died of: it is given a moment to say why."""
    return any(word in error for word in ("onnection", "gloo", "NCCL", "Broken pipe", "DistBackendError"))


def _first_before_joining() -> bool:
    """Whether this rank is the first to fail of those that have not met yet: all read the same bad input."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return os.environ["RANK"] == "0"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=5)))
        return store.add(f"r1/failed before meeting/{attempt}", 1) == 1
    except RuntimeError:
        return True


def end(code: int, text: str, moment: float | None = None) -> NoReturn:
    """End the process at once, and leave `text` for torchrun's own summary, which takes the failure of the earliest
    `moment` (whole seconds) for the cause. No handshake: the others may be stuck."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        message = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(moment or time.time()))}}
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": message}, file)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
