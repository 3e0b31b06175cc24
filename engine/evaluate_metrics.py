"""pass@1 and cons@k from k scored completions a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def pass_at_1(scores: Sequence[Sequence[float]]) -> float:
    """The mean over prompts of the mean score of a prompt's k completions. ValueError if there is nothing to mean."""
    if not scores or any(not row for row in scores):
        raise ValueError(f"scores hold {len(scores)} prompts, some perhaps without completions; wanted at least 1 of 1")
    return sum(sum(row) / len(row) for row in scores) / len(scores)


def cons_at_k(answers: Sequence[Sequence[str | None]], scores: Sequence[Sequence[float]]) -> float:
    """The mean score of each prompt's most frequent answer (white space apart; the first of equals; None never wins
    unless every answer is None)."""
    if not scores or len(answers) != len(scores):
        raise ValueError(f"answers hold {len(answers)} prompts and scores {len(scores)}; wanted the same, at least 1")
    return sum(_majority(a, s) for a, s in zip(answers, scores, strict=True)) / len(scores)


def _majority(answers: Sequence[str | None], scores: Sequence[float]) -> float:
    normal = [None if answer is None else "".join(answer.split()) for answer in answers]
    votes = Counter(answer for answer in normal if answer is not None)
    if not votes:
        return 0.0
    winner = max(votes, key=lambda answer: votes[answer])
    return float(scores[normal.index(winner)])
