"""Start and end of a stage compared: the test against all choices of signs, one by one."""

from __future__ import annotations

import itertools
import random

import pytest

from r1.engine.comparison import MEASURES, compare, sign_flip_test, told


def test_sign_flips_are_counted_exactly(seed: int) -> None:
    for _ in range(20):
        differences = [random.randint(-8, 8) for _ in range(random.randint(1, 9))]
        sums = [
            sum(sign * d for sign, d in zip(signs, differences, strict=True))
            for signs in itertools.product((1, -1), repeat=len(differences))
        ]
        assert sign_flip_test(differences) == sum(s >= sum(differences) for s in sums) / len(sums)


def test_sign_flips_at_the_ends() -> None:
    assert sign_flip_test([0] * 300) == 1.0
    assert sign_flip_test([-1] * 10) == 1.0
    assert sign_flip_test([3] * 200) == 2.0**-200
    assert sign_flip_test([]) == 1.0


def test_what_has_no_effect_is_seldom_called_significant(seed: int) -> None:
    values = [sign_flip_test([random.randint(-4, 4) for _ in range(40)]) for _ in range(400)]
    assert sum(p <= 0.05 for p in values) <= 400 * 0.05 + 5 * (400 * 0.05 * 0.95) ** 0.5


def evaluation(accuracy: list[float], form: list[float]) -> dict:
    reward = [(a + f) / 2 for a, f in zip(accuracy, form, strict=True)]
    prompts = dict(zip(MEASURES, (accuracy, form, reward), strict=True))
    return {**{name: sum(values) / len(values) for name, values in prompts.items()}, "k": 4, "prompts": prompts}


def test_prompts_are_compared_in_pairs() -> None:
    start, end = evaluation([0.25, 0.5, 0.0], [0.0, 0.25, 1.0]), evaluation([0.5, 0.5, 0.75], [1.0, 1.0, 0.75])
    result = compare(start, end)
    assert (result["prompts"], result["k"]) == (3, 4)
    assert result["pass@1"] == {"start": 0.25, "end": pytest.approx(1.75 / 3), "p": sign_flip_test([2, 0, 6])}
    assert result["format"]["p"] == sign_flip_test([8, 6, -2])
    assert result["reward"]["p"] == sign_flip_test([5, 3, 2])
    assert told(result).startswith(
        "start → end on 3 held-out prompts, 4 completions each: pass@1 25.0 → 58.3 % (p = 0.2)"
    )
