"""Is a stage's end better than its start? Both answer the same held-out prompts; a paired test says how sure it is.

comparison.json: {MEASURE: {"start", "end": means in 0..1, "p"}, "prompts": how many, "k": completions of each}.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

MEASURES = ("pass@1", "format", "reward")  # what evaluation.json tells of every prompt: means over its k completions


def compare(start: Mapping[str, Any], end: Mapping[str, Any]) -> dict[str, Any]:
    """comparison.json of two evaluations of the same prompts, with as many completions of each."""
    result: dict[str, Any] = {"prompts": len(end["prompts"]["reward"]), "k": end["k"]}
    for name in MEASURES:
        pairs = zip(start["prompts"][name], end["prompts"][name], strict=True)
        # Counts of k completions, or the mean of two such counts: whole numbers of halves, so that the test is exact.
        differences = [round(2 * end["k"] * (after - before)) for before, after in pairs]
        result[name] = {"start": start[name], "end": end[name], "p": sign_flip_test(differences)}
    return result


def sign_flip_test(differences: Sequence[int]) -> float:
    """The exact p-value, one-sided, of a paired permutation test. Where nothing has changed, a difference is as likely
    to have the other sign: of all choices of signs, the share whose sum is no less than this one."""
    ways = Counter({0: 1})
    for difference in differences:
        more: Counter[int] = Counter()
        for total, count in ways.items():
            more[total + difference] += count
            more[total - difference] += count
        ways = more
    return sum(count for total, count in ways.items() if total >= sum(differences)) / 2 ** len(differences)


def told(result: Mapping[str, Any]) -> str:
    """comparison.json in a sentence."""
    parts = [
        f"{name} {100 * result[name]['start']:.1f} → {100 * result[name]['end']:.1f} % (p = {result[name]['p']:.1g})"
        for name in MEASURES
    ]
    return (
        f"start → end on {result['prompts']} held-out prompts, {result['k']} completions each: {', '.join(parts)};"
        " one-sided paired permutation test"
    )
