"""`r1 doctor`: whether this machine, or this torchrun world, is fit for a run, and what to do where it is not.

Every rank makes the checks of its machine (doctor_machine.py), all of them together those of the network
(doctor_world.py). What all ranks say is one row; where they differ each answer names its ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from r1.engine.logs import is_main_process, say, world_size, write_json
from r1.engine.settings import Config

Verdict = Literal["ok", "does not apply", "warn", "fail"]
ORDER: tuple[Verdict, ...] = ("ok", "does not apply", "warn", "fail")
COLOURS = {"ok": "green", "does not apply": "dim", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One check's answer. `alike`: whether all ranks must say the same."""

    check: str
    result: str
    verdict: Verdict = "ok"
    advice: str = ""
    alike: bool = False


def does_not_apply(check: str, why: str) -> Finding:
    return Finding(check, why, "does not apply")


def guarded(check: Callable[[], list[Finding]], name: str) -> list[Finding]:
    """The findings of a check; of one that breaks, that it broke: the others still count."""
    try:
        return check()
    except Exception as error:
        name = name.replace("_", " ")
        return [Finding(name, f"{type(error).__name__}: {error}", "warn", "this check itself failed; see the message")]


def examine(config: Config, out: str | Path | None = None) -> int:
    """Make all checks, show the table and write doctor.json to `out`; 1 where something fails, else 0."""
    from r1.engine import doctor_machine, doctor_world

    mine = [finding for check in doctor_machine.CHECKS for finding in guarded(partial(check, config), check.__name__)]
    if world_size() > 1:
        of_all, together = doctor_world.measure(config, mine)
    else:
        of_all = [mine]
        together = [does_not_apply(name, "one process; start it with torchrun") for name in doctor_world.NAMES]
    rows = merged(of_all) + together
    failed = any(finding.verdict == "fail" for finding in rows)
    if is_main_process():
        _show(rows)
        if out is not None:
            write_json(Path(out) / "doctor.json", {"ranks": len(of_all), "checks": [asdict(row) for row in rows]})
            say(f"doctor: {Path(out) / 'doctor.json'}")
    return int(failed)


def merged(of_all: Sequence[Sequence[Finding]]) -> list[Finding]:
    """One finding a check where all ranks agree, else one for each answer, the most frequent first."""
    from r1.parallel.hang import ranges

    answers: dict[str, dict[Finding, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, findings in enumerate(of_all):
        for finding in findings:
            answers[finding.check][finding].append(rank)
    rows = []
    for name, found in answers.items():
        by_number = sorted(found.items(), key=lambda item: -len(item[1]))
        for place, (finding, ranks) in enumerate(by_number):
            result, verdict, advice = finding.result, finding.verdict, finding.advice
            if len(by_number) > 1:
                result = f"ranks {ranges(ranks)}: {result}"
                if finding.alike and place > 0:
                    verdict, advice = "fail", f"ranks {ranges(ranks)} differ from the others: make them alike"
            rows.append(Finding(name, result, verdict, advice))
    return rows


def _show(rows: Sequence[Finding]) -> None:
    table = Table(title="r1 doctor", title_justify="left")
    for column in ("check", "result", "verdict", "what to do"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.check, row.result, f"[{COLOURS[row.verdict]}]{row.verdict}[/]", row.advice)
    console = Console()
    console.print(table)
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ORDER}
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), highlight=False)
