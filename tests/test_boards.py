"""Leaderboards: intervals that hold what they promise, halves against an enumeration, and the two to select."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from ksat import boards, metrics
from ksat.boards import ahead_again, ahead_again_if_equal, draw_halves, pick_two, say_pick
from ksat.comparison import holm, mcnemar
from ksat.metrics import compute_metrics
from ksat.predictions import FloatArray


def table(answers: NDArray[np.int64], right: NDArray[np.bool_], num_choices: int = 4) -> FloatArray:
    """(N, 5) that answers these rows correctly and the others by the next choice."""
    chosen = np.where(right, answers, answers % num_choices + 1)
    probs = np.full((len(answers), 5), np.nan)
    probs[:, :num_choices] = 0.1
    probs[np.arange(len(answers)), chosen - 1] = 1 - 0.1 * (num_choices - 1)
    return probs


def test_95_percent_intervals_cover_95_percent_of_boards(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 boards of 120 passages whose one to three questions stand or fall together, drawn from a known population."""
    monkeypatch.setattr(metrics, "NUM_RESAMPLES", 400)
    generator = np.random.default_rng(0)
    covered = {"accuracy": 0, "rows alone": 0}
    for _ in range(1000):
        sizes = generator.integers(1, 4, 120)
        skill = np.repeat(generator.beta(1.4, 0.6, 120), sizes)  # 0.7 on average, and very uneven
        groups = [str(g) for g in np.repeat(np.arange(120), sizes)]
        answers = generator.integers(1, 5, len(skill))
        found = compute_metrics(table(answers, generator.random(len(skill)) < skill), answers, groups).accuracy
        alone = metrics.wilson_interval(found.value, len(skill))
        assert found.low is not None
        assert found.high is not None
        covered["accuracy"] += found.low <= 0.7 <= found.high
        covered["rows alone"] += alone[0] <= 0.7 <= alone[1]
    assert 930 <= covered["accuracy"] <= 970
    assert covered["rows alone"] < 925  # what an interval over rows would promise and not hold


def test_mcnemar_equals_published_and_other_software_s_figures() -> None:
    """Agresti, Categorical Data Analysis (2002), table 10.1: 150 and 86 discordant pairs. statsmodels' mcnemar(exact=True) and R's
    binom.test give 2 * sum_{k <= 86} C(236, k) / 2^236."""
    from math import comb

    for only_a, only_b in ((150, 86), (9, 1), (6, 3), (0, 5), (4, 4)):
        right_a = np.array([True] * only_a + [False] * only_b + [True] * 7)
        right_b = np.array([False] * only_a + [True] * only_b + [True] * 7)
        n, least = only_a + only_b, min(only_a, only_b)
        expected = min(1.0, 2 * sum(comb(n, k) for k in range(least + 1)) / 2**n)
        found = mcnemar(right_a, right_b)
        assert (found.only_a, found.only_b) == (only_a, only_b)
        assert found.p_value == pytest.approx(expected, rel=1e-9)
    # Written down from statsmodels 0.15.0: mcnemar([[0, 9], [1, 0]], exact=True).pvalue and mcnemar([[0, 6], [3, 0]], ...).
    assert mcnemar(np.arange(10) < 9, np.arange(10) >= 9).p_value == pytest.approx(0.021484375)
    assert mcnemar(np.arange(9) < 6, np.arange(9) >= 6).p_value == pytest.approx(0.5078125)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_halves_against_an_enumeration() -> None:
    """Three passages with 1, 2 and 1 rows; of two drawn passages all nine ordered choices are equally likely."""
    answers = np.array([1, 2, 3, 4])
    groups = ["x", "y", "y", "z"]
    right_a, right_b = np.array([True, False, True, False]), np.array([False, True, True, True])
    halves = draw_halves([table(answers, right_a), table(answers, right_b)], answers, groups, num_questions=3)
    rows = {"x": [0], "y": [1, 2], "z": [3]}
    exact = []
    for drawn in itertools.product("xyz", repeat=2):
        chosen = [row for group in drawn for row in rows[group]]
        exact.append((right_a[chosen].mean(), right_b[chosen].mean()))
    scores_a, scores_b = np.array(exact).T
    assert halves.accuracy.shape == (boards.NUM_DRAWS, 2)
    assert halves.accuracy.mean(axis=0) == pytest.approx([scores_a.mean(), scores_b.mean()], abs=0.02)
    p, q = np.mean(scores_a > scores_b), np.mean(scores_a < scores_b)
    expected = (p * (p + (1 - p - q) / 2) + q * (q + (1 - p - q) / 2)) / (p + q)
    assert ahead_again(halves.accuracy[:, 0], halves.accuracy[:, 1]) == pytest.approx(expected, abs=0.02)


def test_a_half_has_as_many_questions_as_asked_for() -> None:
    """Four passages of two rows, both right or both wrong: two passages are four questions, and 0, 2 or 4 of them right."""
    answers = np.tile([1, 2, 3, 4], 2)
    right = np.repeat([True, False, True, False], 2)
    halves = draw_halves([table(answers, right)], answers, list("wwxxyyzz"), num_questions=4)
    found, times = np.unique(halves.accuracy, return_counts=True)
    assert found.tolist() == [0.0, 0.5, 1.0]
    assert times / boards.NUM_DRAWS == pytest.approx([0.25, 0.5, 0.25], abs=0.03)


def test_a_draw_of_everything_scores_as_the_whole() -> None:
    generator = np.random.default_rng(0)
    answers = generator.choice([1, 2, 3, 4], 50, p=[0.6, 0.2, 0.1, 0.1])
    tables = [table(answers, generator.random(50) < skill) for skill in (0.4, 0.8)]
    halves = draw_halves(tables, answers, ["one passage"] * 50, num_questions=50)
    wanted = [compute_metrics(each, answers, ["one passage"] * 50) for each in tables]
    assert np.unique(halves.accuracy, axis=0) == pytest.approx(np.array([[each.accuracy.value for each in wanted]]))
    assert np.unique(halves.macro_f1, axis=0) == pytest.approx(np.array([[each.macro_f1.value for each in wanted]]))


def test_what_two_equally_good_runs_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not 0.5: the gap that chance made on the rows at hand is taken for a true one."""
    monkeypatch.setattr(boards, "NUM_DRAWS", 400)
    generator = np.random.default_rng(0)
    said = []
    for _ in range(150):
        answers = generator.integers(1, 5, 300)
        tables = [table(answers, generator.random(300) < 0.5) for _ in range(2)]
        scores = draw_halves(tables, answers, [str(row) for row in range(300)], num_questions=150).accuracy
        said.append(ahead_again(scores[:, 0], scores[:, 1]))
    error = np.std(said) / np.sqrt(len(said))
    assert ahead_again_if_equal(300, 150) == pytest.approx(np.mean(said), abs=3 * error)
    assert ahead_again_if_equal(300, 150) == pytest.approx(0.5 + np.arcsin(1 / 3) / np.pi)
    assert np.mean(said) > 0.5 + 3 * error


def test_who_is_ahead_stays_ahead() -> None:
    generator = np.random.default_rng(0)
    answers = generator.integers(1, 5, 400)
    groups = [str(row) for row in range(400)]
    rights = [generator.random(400) < skill for skill in (0.6, 0.6, 0.9)]
    halves = draw_halves([table(answers, right) for right in rights], answers, groups, num_questions=200)
    one, other, better = halves.accuracy.T
    assert ahead_again(one, one) == 0.5
    assert 0.5 <= ahead_again(one, other) < 0.75
    assert ahead_again(one, better) > 0.99
    assert ahead_again(better, one) == ahead_again(one, better)
    assert np.all((halves.macro_f1 > 0.4) & (halves.macro_f1 < 1))


def test_the_two_that_err_on_different_questions_are_picked() -> None:
    """The best and its near copy lose together; a slightly worse one that knows other questions is the second chance."""
    generator = np.random.default_rng(0)
    answers = generator.integers(1, 5, 300)
    best = np.arange(300) < 210
    copy = best.copy()
    copy[0] = False
    other = np.arange(300) >= 100  # 200 right, a hundred of them where the best one errs
    tables = [table(answers, right) for right in (copy, best, other)]
    halves = draw_halves(tables, answers, [str(row) for row in range(300)], num_questions=150)
    pick = pick_two(tables, answers, halves.accuracy)
    assert (pick.first, pick.second) == (1, 2)
    assert pick.alone == pytest.approx(halves.accuracy[:, 1].mean())
    assert pick.expected == pytest.approx(np.maximum(halves.accuracy[:, 1], halves.accuracy[:, 2]).mean())
    assert pick.expected > pick.alone + 0.01
    assert pick.changes == pytest.approx(190 / 300)  # the first 100 and the last 90
    assert pick.correlation is not None
    assert pick.correlation < 0
    assert "so the second is a real second chance" in say_pick(pick, ["copy", "best", "other"])
    alike = pick_two(tables[:2], answers, halves.accuracy[:, :2])
    assert "so the second adds next to nothing" in say_pick(alike, ["copy", "best"])
    twice = pick_two([tables[1]] * 2, answers, halves.accuracy[:, [1, 1]])
    assert "(+0.000)" in say_pick(twice, ["best", "again"])
    with pytest.raises(ValueError, match="1 runs"):
        pick_two(tables[:1], answers, halves.accuracy[:, :1])
