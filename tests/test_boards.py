"""Leaderboards: intervals that hold what they promise, halves against an enumeration, and the two to select."""

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ksat import boards, metrics
from ksat.boards import Scores, ahead_again, ahead_again_if_equal, draw_boards, pick_two, say_pick
from ksat.comparison import holm, mcnemar
from ksat.metrics import compute_metrics
from ksat.predictions import FloatArray, predicted_answers


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


def test_boards_against_an_enumeration() -> None:
    """Three passages with 1, 2 and 1 rows, of which a half draws two. The population's shares are Dirichlet(1, 1, 1): the same passage
    twice has the probability E[w^2] = 1/6, two others in their order E[wv] = 1/12. With the unseen one the shares
    are Dirichlet(1, 1, 1, 1), the probabilities 1/10 and 1/20."""
    answers = np.array([1, 2, 3, 4])
    groups = ["x", "y", "y", "z"]
    right = np.array([[True, False, True, False], [False, True, True, True]])
    found = draw_boards([table(answers, each) for each in right], answers, groups, num_questions=3)
    assert found.accuracy.true.shape == found.accuracy.half.shape == (boards.NUM_DRAWS, 2)
    rows = {"x": [0], "y": [1, 2], "z": [3]}
    mean = np.zeros(2)
    for one, other in itertools.product("xyz", repeat=2):
        mean += (1 / 6 if one == other else 1 / 12) * right[:, rows[one] + rows[other]].mean(axis=1)
    assert found.accuracy.half.mean(axis=0) == pytest.approx(mean, abs=0.02)
    hits = {name: right[:, own].sum(axis=1) for name, own in rows.items()}
    gains = [name for name, (worse, better) in hits.items() if better > worse]
    hits["unseen"] = np.mean([hits[name][::-1] for name in gains], axis=0)
    ahead = 0.0
    for one, other in itertools.product(hits, repeat=2):
        scores = hits[one] + hits[other]
        ahead += (1 / 10 if one == other else 1 / 20) * (0.5 if scores[0] == scores[1] else scores[1] > scores[0])
    assert ahead > 0.5
    assert ahead_again(found, 1, 0)[0] == pytest.approx(ahead, abs=0.02)
    assert ahead_again(found, 0, 1)[0] == pytest.approx(1 - ahead, abs=0.02)
    # The population: the share of passage y's two rows among all is 2y / (1 + y), y Beta(1, 2).
    grid = (np.arange(100_000) + 0.5) / 100_000
    share = float((2 * grid / (1 + grid) * 2 * (1 - grid)).mean())
    assert found.accuracy.true.mean(axis=0) == pytest.approx([0.5, share + (1 - share) / 2], abs=0.01)


def test_a_half_has_as_many_questions_as_asked_for() -> None:
    """Four passages of two rows, both right or both wrong: two passages are four questions, and 0, 2 or 4 of them right."""
    answers = np.tile([1, 2, 3, 4], 2)
    right = np.repeat([True, False, True, False], 2)
    halves = draw_boards([table(answers, right)], answers, list("wwxxyyzz"), num_questions=4).accuracy
    found, times = np.unique(halves.half, return_counts=True)
    assert found.tolist() == [0.0, 0.5, 1.0]
    # The share of the two passages that are right is Beta(2, 2), whose square has the mean 0.3.
    assert times / boards.NUM_DRAWS == pytest.approx([0.3, 0.4, 0.3], abs=0.03)


def test_a_draw_of_everything_scores_as_the_whole() -> None:
    generator = np.random.default_rng(0)
    answers = generator.choice([1, 2, 3, 4], 50, p=[0.6, 0.2, 0.1, 0.1])
    tables = [table(answers, generator.random(50) < skill) for skill in (0.4, 0.8)]
    drawn = draw_boards(tables, answers, ["one passage"] * 50, num_questions=50)
    wanted = [compute_metrics(each, answers, ["one passage"] * 50) for each in tables]
    for part in ("true", "half"):
        accuracy, macro_f1 = getattr(drawn.accuracy, part), getattr(drawn.macro_f1, part)
        assert accuracy == pytest.approx(np.tile([each.accuracy.value for each in wanted], (boards.NUM_DRAWS, 1)))
        assert macro_f1 == pytest.approx(np.tile([each.macro_f1.value for each in wanted], (boards.NUM_DRAWS, 1)))


def test_what_two_equally_good_runs_get(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not 0.5: the boards are drawn around the gap that chance made on the rows at hand."""
    monkeypatch.setattr(boards, "NUM_DRAWS", 200)
    generator = np.random.default_rng(0)
    said = []
    for _ in range(120):
        answers = generator.integers(1, 5, 300)
        tables = [table(answers, generator.random(300) < 0.5) for _ in range(2)]
        drawn = draw_boards(tables, answers, [str(row) for row in range(300)], num_questions=150)
        said.append(max(ahead_again(drawn, 0, 1)[0], ahead_again(drawn, 1, 0)[0]))
    error = np.std(said) / np.sqrt(len(said))
    assert ahead_again_if_equal(300, 150) - 3 * error < np.mean(said) < ahead_again_if_equal(300, 150) + error
    assert ahead_again_if_equal(300, 150) == pytest.approx(0.5 + np.arcsin(1 / 2) / np.pi)
    assert np.mean(said) > 0.5 + 3 * error


def test_who_is_ahead_stays_ahead() -> None:
    generator = np.random.default_rng(0)
    answers = generator.integers(1, 5, 400)
    groups = [str(row) for row in range(400)]
    rights = [generator.random(400) < skill for skill in (0.6, 0.6, 0.9)]
    drawn = draw_boards([table(answers, right) for right in rights], answers, groups, num_questions=200)
    one, other, better = range(3)
    assert ahead_again(drawn, one, one) == (0.5, 0.5)
    seen = [(each == answers).sum() for each in map(predicted_answers, map(table, [answers] * 3, rights))]
    ahead, behind = (one, other) if seen[one] > seen[other] else (other, one)
    without = sure_of(drawn.accuracy.half[:, ahead] - drawn.accuracy.half[:, behind])  # no unseen passage
    chance = ahead_again(drawn, ahead, behind)[0]
    assert 0.5 <= chance < 0.9
    assert without - 0.04 < chance <= without  # of some 190 that differ one is little
    for by in range(2):
        assert ahead_again(drawn, better, one)[by] > 0.99
        assert ahead_again(drawn, one, better)[by] == pytest.approx(1 - ahead_again(drawn, better, one)[by])
    assert np.all((drawn.macro_f1.half > 0.4) & (drawn.macro_f1.half < 1))


def sure_of(leads: NDArray[Any]) -> float:
    return float((leads > 1e-9).mean() + (np.abs(leads) <= 1e-9).mean() / 2)


def test_a_board_larger_than_the_rows_at_hand_does_not_make_them_sure() -> None:
    """39 rows, p = 0.065: a half of 4,000 questions was said to keep its order with a chance of 1.00."""
    answers = np.tile([1, 2, 3], 13)
    rights = np.arange(39) < 9, (np.arange(39) >= 9) & (np.arange(39) < 11)
    p_value = mcnemar(*rights).p_value
    assert p_value == pytest.approx(0.065, abs=0.001)
    tables, groups = [table(answers, each) for each in rights], [str(row) for row in range(39)]
    drawn = draw_boards(tables, answers, groups, num_questions=100_000)
    assert ahead_again(drawn, 0, 1)[0] == pytest.approx(1 - p_value / 2, abs=0.01)


def two_runs(only_one: int, only_other: int, num_rows: int) -> tuple[list[FloatArray], NDArray[np.int64]]:
    """Tables of two runs that differ in so many rows, and the answers; both are right in three fifths of the other rows."""
    answers = np.arange(num_rows) % 5 + 1
    rights = np.tile(np.arange(num_rows) % 5 < 3, (2, 1))
    rights[:, : only_one + only_other] = [[True], [False]]
    rights[:, only_one : only_one + only_other] = [[False], [True]]
    return [table(answers, right, 5) for right in rights], answers


@pytest.mark.parametrize(("only_one", "only_other"), [(1, 0), (2, 0), (3, 0), (5, 0), (3, 1), (6, 2)])
def test_one_sided_disagreement_is_no_certainty(only_one: int, only_other: int) -> None:
    """Beside p = 1 stood 1.00: a bootstrap of 204 rows, of which one speaks, never draws one that speaks against it."""
    tables, answers = two_runs(only_one, only_other, 204)
    drawn = draw_boards(tables, answers, [str(row) for row in range(204)], num_questions=100_000)
    p_value = mcnemar(*(predicted_answers(each) == answers for each in tables)).p_value
    chance, by_macro_f1 = ahead_again(drawn, 0, 1)
    assert chance == pytest.approx(1 - p_value / 2, abs=0.03)
    assert by_macro_f1 < 1 - p_value / 2 + 0.1
    # Three questions to a passage: the one that speaks is one passage.
    groups = [str(row // 3) for row in range(204)]
    chance, by_macro_f1 = ahead_again(draw_boards(tables, answers, groups, num_questions=100_000), 0, 1)
    assert max(chance, by_macro_f1) < 1 - p_value / 2 + 0.03


def test_ahead_by_macro_f1_alone_is_no_certainty_either() -> None:
    """Both are wrong in the one row that they answer otherwise, which moves macro F1 by a hair: by that it said 0.86."""
    answers = np.tile([1, 1, 1, 2, 3, 4], 20)
    tables = [table(answers, np.arange(120) >= 40) for _ in range(2)]
    tables[0][0, :4] = [0.1, 0.1, 0.7, 0.1]  # 3 instead of 2
    drawn = draw_boards(tables, answers, [str(row) for row in range(120)], num_questions=100_000)
    assert ahead_again(drawn, 0, 1)[0] == 0.5
    lead = drawn.macro_f1.half[:, 0] - drawn.macro_f1.half[:, 1]
    assert abs(sure_of(lead) - 0.5) > 0.3
    assert abs(ahead_again(drawn, 0, 1)[1] - 0.5) < 0.05


def promises(share: float, skill: float, half: int, *, num_sets: int, num_rows: int = 204) -> dict[str, float]:
    """What is said of two runs that differ in a share of the rows, where the first is right in `skill` of those, and what comes.

    Sets in which neither is ahead are left out. "before" is without the unseen passage.
    """
    generator = np.random.default_rng(0)
    differing = generator.binomial(half, share, size=100_000)
    stays = sure_of(2 * generator.binomial(differing, skill) - differing)
    said: dict[tuple[int, int], tuple[float, float]] = {}
    found = []
    for number in generator.binomial(num_rows, share, size=num_sets):
        won = generator.binomial(number, skill)
        if 2 * won == number:
            continue
        counts = max(won, number - won), min(won, number - won)
        if counts not in said:
            tables, answers = two_runs(*counts, num_rows)
            drawn = draw_boards(tables, answers, [str(row) for row in range(num_rows)], num_questions=half)
            before = sure_of(drawn.accuracy.half[:, 0] - drawn.accuracy.half[:, 1])
            said[counts] = before, ahead_again(drawn, 0, 1)[0]
        found.append((*said[counts], stays if 2 * won > number else 1 - stays))
    before, now, comes = np.transpose(found)
    return {
        "at most": ahead_again_if_equal(num_rows, half), "comes": comes.mean(), "before": before.mean(), "now": now.mean(),
        "before, 0.95 or more": (before >= 0.95).mean(), "now, 0.95 or more": (now >= 0.95).mean(),
        "error": (now - comes).std() / len(found) ** 0.5 + 0.01,
    }  # fmt: skip


@pytest.mark.parametrize("half", [102, 435, 100_000])
@pytest.mark.parametrize(("share", "num_sets"), [(0.02, 400), (0.05, 300), (0.2, 50)])
def test_who_is_ahead_by_chance_is_not_promised_to_stay_ahead(
    share: float, num_sets: int, half: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two equally good runs the better one gets what the note says at most, and seldom 0.95; of unequal ones it gets no more than what
    comes, or than that. Run with -s it prints the table of docs/results.md."""
    monkeypatch.setattr(boards, "NUM_DRAWS", 600)
    for skill in (0.5, 0.65, 0.8):
        found = promises(share, skill, half, num_sets=num_sets)
        error = found.pop("error")
        print(f"\n| {share:.0%} | {skill:.2f} | {half:,} |", *(f"{value:.2f} |" for value in found.values()), end="")
        assert found["now"] < max(found["at most"], found["comes"] + 2 * error) + 0.01
        if skill == 0.5:
            assert found["now, 0.95 or more"] <= 0.1


def test_the_two_that_err_on_different_questions_are_picked() -> None:
    """The best and its near copy lose together; a slightly worse one that knows other questions is the second chance."""
    generator = np.random.default_rng(0)
    answers = generator.integers(1, 5, 300)
    best = np.arange(300) < 210
    copy = best.copy()
    copy[0] = False
    other = np.arange(300) >= 100  # 200 right, a hundred of them where the best one errs
    tables = [table(answers, right) for right in (copy, best, other)]
    drawn = draw_boards(tables, answers, [str(row) for row in range(300)], num_questions=150).accuracy
    pick = pick_two(tables, answers, drawn)
    assert (pick.first, pick.second) == (1, 2)
    seen, noise = drawn.true.mean(axis=0), drawn.half - drawn.true
    chance = (drawn.true - drawn.true.mean(axis=1, keepdims=True)).var(axis=0).sum() / 2
    shrunk = seen.mean() + max(0.0, 1 - chance / seen.var(ddof=1)) * (seen - seen.mean())
    assert pick.alone == pytest.approx(shrunk[1])
    assert pick.expected == pytest.approx(np.maximum(shrunk[1] + noise[:, 1], shrunk[2] + noise[:, 2]).mean())
    assert pick.expected > pick.alone + 0.01
    assert pick.changes == pytest.approx(190 / 300)  # the first 100 and the last 90
    assert pick.correlation is not None
    assert pick.correlation < 0
    assert "so the second is a real second chance" in say_pick(pick, ["copy", "best", "other"])
    alike = pick_two(tables[:2], answers, only(drawn, [0, 1]))
    assert "so the second adds next to nothing" in say_pick(alike, ["copy", "best"])
    twice = pick_two([tables[1]] * 2, answers, only(drawn, [1, 1]))
    assert "(+0.000)" in say_pick(twice, ["best", "again"])
    with pytest.raises(ValueError, match="1 runs"):
        pick_two(tables[:1], answers, only(drawn, [0]))


def only(scores: Scores, runs: list[int]) -> Scores:
    return Scores(scores.true[:, runs], scores.half[:, runs])


def test_the_better_of_two_is_expected_at_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight equally good runs of 0.76: the two that look best were promised 0.786 together, and got 0.772."""
    monkeypatch.setattr(boards, "NUM_DRAWS", 150)
    generator = np.random.default_rng(0)
    promised, got, kept = [], [], []
    for _ in range(60):
        answers = generator.integers(1, 5, 400)
        hard = generator.random(400)  # rows that all find hard, or easy: the runs correlate
        tables = [table(answers, generator.random(400) < np.where(hard < 0.5, 0.95, 0.57)) for _ in range(8)]
        groups = [str(row) for row in range(400)]
        pick = pick_two(tables, answers, draw_boards(tables, answers, groups, num_questions=200).accuracy)
        promised.append(pick.expected)
        fresh = np.where(generator.random(200) < 0.5, 0.95, 0.57)
        got.append(max((generator.random(200) < fresh).mean() for _ in range(2)))
        kept.append(pick.kept)
    error = np.std(np.subtract(promised, got)) / np.sqrt(60)
    assert np.mean(promised) == pytest.approx(np.mean(got), abs=2.5 * error)
    assert error < 0.006
    assert np.mean(kept) < 0.35


def test_runs_that_truly_differ_keep_their_distance() -> None:
    generator = np.random.default_rng(0)
    answers = generator.integers(1, 5, 600)
    tables = [table(answers, generator.random(600) < skill) for skill in (0.3, 0.5, 0.8)]
    scores = draw_boards(tables, answers, [str(row) for row in range(600)], num_questions=300).accuracy
    pick = pick_two(tables, answers, scores)
    assert pick.kept > 0.98
    assert pick.alone == pytest.approx(np.mean((np.nan_to_num(tables[2]).argmax(axis=1) + 1) == answers), abs=0.01)
