"""Figures to the last bit: intervals beside a bootstrap written out in loops, tables and lines character by character."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ksat import metrics
from ksat.metrics import (
    Estimate,
    Metrics,
    PairedDifference,
    choice_optimism,
    compute_metrics,
    fit_scale,
    format_difference,
    format_table,
    macro_f1_scores,
    paired_difference,
    random_baseline,
    row_log_losses,
    scaled_probs,
    sum_by_group,
    wilson_interval,
)
from ksat.predictions import FloatArray, IntArray

NAN = float("nan")
ANSWERS = np.array([1, 2, 1, 3, 2, 1, 4, 2] * 8)
GROUPS = [f"p{i // 2}" for i in range(64)]  # 32 passages: enough for a bootstrap


def make_probs(seed: int) -> np.ndarray[Any, Any]:
    """(64, 5) of four choices each, so that some answers are right and some are not."""
    probs = np.random.default_rng(seed).dirichlet(np.ones(4), 64)
    return np.column_stack([probs, np.full(64, NAN)])


def f1_by_hand(gold: Sequence[int], predicted: Sequence[int]) -> float:
    labels = sorted({*gold, *predicted})
    scores = []
    for label in labels:
        hits = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        scores.append(2 * hits / (list(gold).count(label) + list(predicted).count(label)))
    return sum(scores) / len(scores)


def resamples(seed: int) -> list[list[int]]:
    """Rows of 2,000 draws of 32 passages, two rows a passage; groups in the order of their names."""
    passages = sorted(set(GROUPS))
    rows = {name: [i for i, group in enumerate(GROUPS) if group == name] for name in passages}
    drawn = np.random.default_rng(seed).integers(32, size=(2000, 32))
    return [[row for passage in draw for row in rows[passages[passage]]] for draw in drawn]


def interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.quantile(np.array(values), [0.025, 0.975])
    return float(low), float(high)


def bounds(estimate: Estimate | None) -> tuple[float | None, float | None]:
    assert estimate is not None
    return estimate.low, estimate.high


@pytest.mark.parametrize("seed", [0, 3])
def test_intervals_are_those_of_a_bootstrap_of_passages_written_out(seed: int) -> None:
    probs = make_probs(1)
    predicted = np.argmax(np.nan_to_num(probs), axis=1) + 1
    losses = -np.log(probs[np.arange(64), ANSWERS - 1])
    found = compute_metrics(probs, ANSWERS, GROUPS, seed=seed)
    draws = resamples(seed)
    hits = predicted == ANSWERS
    assert bounds(found.accuracy) == pytest.approx(interval([hits[rows].mean() for rows in draws]), abs=1e-12)
    assert bounds(found.log_loss) == pytest.approx(interval([losses[rows].mean() for rows in draws]), abs=1e-12)
    scores = [f1_by_hand(ANSWERS[rows].tolist(), predicted[rows].tolist()) for rows in draws]
    assert bounds(found.macro_f1) == pytest.approx(interval(scores), abs=1e-12)
    assert found.macro_f1.value == pytest.approx(f1_by_hand(ANSWERS.tolist(), predicted.tolist()), abs=1e-12)
    assert (found.num_questions, found.num_groups, found.accuracy_interval) == (64, 32, "bootstrap")


def test_intervals_of_a_difference_are_those_of_a_bootstrap_of_passages_written_out() -> None:
    one, other = make_probs(1), make_probs(2)
    hits = (np.nanargmax(one, axis=1) + 1 == ANSWERS) * 1.0 - (np.nanargmax(other, axis=1) + 1 == ANSWERS)
    rows = np.arange(64)
    losses = np.log(other[rows, ANSWERS - 1]) - np.log(one[rows, ANSWERS - 1])
    found = paired_difference(one, other, ANSWERS, GROUPS, seed=5)
    draws = resamples(5)
    assert (found.num_questions, found.num_groups) == (64, 32)
    assert found.accuracy.value == pytest.approx(hits.mean(), abs=1e-12)
    assert found.log_loss.value == pytest.approx(losses.mean(), abs=1e-12)
    assert bounds(found.accuracy) == pytest.approx(interval([hits[draw].mean() for draw in draws]), abs=1e-12)
    assert bounds(found.log_loss) == pytest.approx(interval([losses[draw].mean() for draw in draws]), abs=1e-12)
    guesses = [np.nanargmax(table, axis=1) + 1 for table in (one, other)]

    def f1(draw: IntArray) -> float:
        a, b = (f1_by_hand(ANSWERS[draw].tolist(), guess[draw].tolist()) for guess in guesses)
        return a - b

    assert found.macro_f1.value == pytest.approx(f1(np.arange(64)), abs=1e-12)
    assert bounds(found.macro_f1) == pytest.approx(interval([f1(draw) for draw in draws]), abs=1e-12)
    assert paired_difference(one, other, ANSWERS, GROUPS) == paired_difference(one, other, ANSWERS, GROUPS, seed=0)


def test_the_optimism_of_a_choice_is_that_of_a_bootstrap_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """On passages that were drawn the best of three is chosen, on those that were not it is judged."""
    tables, other = [make_probs(seed) for seed in (1, 2, 3)], make_probs(4)
    monkeypatch.setattr(metrics, "_CHOICES", 20)

    def figures(table: FloatArray, rows: IntArray) -> FloatArray:
        guess = np.nanargmax(table, axis=1) + 1
        return np.array([
            np.mean(guess[rows] == ANSWERS[rows]), f1_by_hand(ANSWERS[rows].tolist(), guess[rows].tolist()),
            -np.log(table[rows, ANSWERS[rows] - 1]).mean(),
        ])  # fmt: skip

    def best(rows: IntArray) -> FloatArray:
        return min(tables, key=lambda table: figures(table, rows)[2])

    names, everything = sorted(set(GROUPS)), np.arange(64)
    rng, found = np.random.default_rng(7), []
    for _ in range(20):
        drawn = [names[i] for i in rng.integers(32, size=32)]
        inside = np.array([row for name in drawn for row in everything if GROUPS[row] == name])
        outside = np.array([row for row in everything if GROUPS[row] not in drawn])
        found.append(figures(best(inside), outside) - figures(other, outside))
    apparent = figures(best(everything), everything) - figures(other, everything)
    expected = apparent - np.mean(found, axis=0)
    assert choice_optimism(tables, other, ANSWERS, GROUPS, seed=7) == pytest.approx(expected, abs=1e-12)
    assert choice_optimism(tables[:1], other, ANSWERS, GROUPS) == (0.0, 0.0, 0.0)


def test_resamples_in_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 100 cells at once three resamples of 32 passages are drawn at a time, 666 times, and the two that are left."""
    probs = make_probs(1)
    whole, guess = compute_metrics(probs, ANSWERS, GROUPS), random_baseline(np.full(64, 4), ANSWERS)
    assert list(metrics._chunks(32)) == [2000]
    assert list(metrics._chunks(3000)) == [1333, 667]
    monkeypatch.setattr(metrics, "_CELLS_AT_ONCE", 100)
    assert list(metrics._chunks(32)) == [3] * 666 + [2]
    assert list(metrics._chunks(1000)) == [1] * 2000
    parts = compute_metrics(probs, ANSWERS, GROUPS)
    for name in ("accuracy", "macro_f1", "log_loss"):  # but for the order in which a sum is rounded
        assert bounds(getattr(parts, name)) == pytest.approx(bounds(getattr(whole, name)), abs=1e-12)
    assert random_baseline(np.full(64, 4), ANSWERS).macro_f1.value == pytest.approx(guess.macro_f1.value, abs=1e-12)


def test_the_macro_f1_of_a_uniform_guess_is_the_mean_over_guesses_written_out() -> None:
    counts, answers = np.array([2, 3, 5, 4, 2, 5]), np.array([2, 3, 5, 1, 1, 4])
    for seed in (0, 7):
        rng = np.random.default_rng(seed)
        guesses = np.floor(rng.random((2000, 6)) * counts).astype(int) + 1
        expected = np.mean([f1_by_hand(answers.tolist(), guess.tolist()) for guess in guesses])
        assert random_baseline(counts, answers, seed=seed).macro_f1 == Estimate(pytest.approx(expected, abs=1e-12))
    baseline = random_baseline(counts, answers)
    assert baseline == random_baseline(counts, answers, seed=0)
    assert (baseline.num_questions, baseline.num_groups) == (6, 6)


def test_a_board_of_29_passages_gets_a_wilson_interval_and_one_of_30_does_not() -> None:
    for num_groups, kind in ((29, "wilson"), (30, "bootstrap")):
        groups = [f"p{i % num_groups}" for i in range(64)]
        found = compute_metrics(make_probs(1), ANSWERS, groups)
        assert (found.num_groups, found.accuracy_interval) == (num_groups, kind)
    # Where every resample has the same accuracy, the bootstrap tells nothing.
    half = np.tile([[0.9, 0.1, NAN, NAN, NAN]], (80, 1))
    level = compute_metrics(half, np.array([1, 2] * 40), [f"p{i // 2}" for i in range(80)])
    assert level.accuracy == Estimate(0.5, *wilson_interval(0.5, 40))
    assert level.accuracy_interval == "wilson"


def test_wilson_by_its_formula() -> None:
    z = 1.959963984540054
    for share, rows in ((0.3, 7), (0.75, 41), (0.0, 5), (1.0, 5)):
        middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
        half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
        assert wilson_interval(share, rows) == pytest.approx((middle - half, middle + half), abs=1e-12)


def test_macro_f1_of_confusion_counts() -> None:
    """Rows are gold, columns predicted; a label that is neither counts nowhere."""
    confusion = np.zeros((2, 5, 5))
    confusion[0, 0, 0], confusion[0, 0, 1], confusion[0, 1, 1] = 2, 1, 1
    confusion[1, 3, 4] = 1
    assert macro_f1_scores(confusion).tolist() == pytest.approx([(4 / 5 + 2 / 3) / 2, 0.0])


def test_sums_by_group_are_in_the_order_of_the_names() -> None:
    columns = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    assert sum_by_group(columns, ["b", "a", "b"]).tolist() == [[2.0, 20.0], [5.0, 50.0]]
    assert sum_by_group(columns, [2, 10, 2]).tolist() == [[2.0, 20.0], [5.0, 50.0]]  # type: ignore[list-item]  # as text


def test_losses_are_clipped_at_both_ends() -> None:
    probs = np.array([[1.0 + 1e-7, 0.0], [0.5, 0.5], [0.0, 1.0]])
    assert row_log_losses(probs, np.array([1, 2, 1])).tolist() == pytest.approx([0.0, math.log(2), -math.log(1e-15)])
    with pytest.raises(ValueError, match=r"^row 2: the answer is not among the row's choices$"):
        row_log_losses(np.array([[0.5, 0.5], [0.5, 0.5], [1.0, NAN], [1.0, NAN]]), np.array([1, 1, 2, 2]))


def test_what_does_not_match_is_named() -> None:
    probs = make_probs(1)
    for answers, groups, found in (
        (ANSWERS[:1], GROUPS, "64 rows, 1 answers and 64 groups"),
        (ANSWERS, GROUPS[:2], "64 rows, 64 answers and 2 groups"),
    ):
        message = rf"^{found}; expected as many of each, and at least one$"
        with pytest.raises(ValueError, match=message):
            compute_metrics(probs, answers, groups)
        with pytest.raises(ValueError, match=message):
            paired_difference(probs, probs, answers, groups)
    with pytest.raises(ValueError, match=r"^3 rows, 64 answers and 64 groups; expected as many of each"):
        paired_difference(probs, probs[:3], ANSWERS, GROUPS)
    with pytest.raises(ValueError, match=r"^0 rows, 0 answers and 0 groups"):
        compute_metrics(probs[:0], ANSWERS[:0], [])
    with pytest.raises(ValueError, match=r"^2 rows and 1 answers; expected as many, and at least one$"):
        random_baseline(np.array([4, 4]), np.array([1]))
    with pytest.raises(
        ValueError, match=r"^a and b differ in a row's number of choices: they are not the same questions$"
    ):
        paired_difference(probs, np.column_stack([probs[:, :4], probs[:, 3]]), ANSWERS, GROUPS)
    with pytest.raises(ValueError, match=r"^a scale needs at least one row, and finite scores$"):
        fit_scale(np.array([[np.inf, 0.0]]), np.array([1]))
    with pytest.raises(ValueError, match=r"^row 1: the answer is not among the row's choices$"):
        fit_scale(np.array([[1.0, 0.0, NAN], [1.0, 0.0, NAN]]), np.array([0, 2]))


def test_the_fitted_scale_is_exact() -> None:
    """Of one score a row, 1 above the other, three of four rows right: softmax(s) = 3/4 at s = log 3."""
    scores = np.array([[1.0, 0.0, NAN]] * 4)
    assert fit_scale(scores, np.array([0, 0, 0, 1])) == pytest.approx(math.log(3), rel=1e-5)


def test_scaled_probabilities() -> None:
    probs = np.array([[0.5, 0.25, 0.25, NAN, NAN], [0.9, 0.1, NAN, NAN, NAN]])
    squared = np.array([[0.25, 0.0625, 0.0625, NAN, NAN], [0.81, 0.01, NAN, NAN, NAN]])
    np.testing.assert_allclose(scaled_probs(probs, 2.0), squared / np.array([[0.375], [0.82]]))
    np.testing.assert_array_equal(scaled_probs(probs, 1.0), probs)


def test_dicts_to_the_last_key() -> None:
    figure = Estimate(0.5, 0.25, 0.75)
    as_dict = {"value": 0.5, "low": 0.25, "high": 0.75}
    assert figure.to_dict() == as_dict
    assert Metrics(4, 3, figure, figure, figure).to_dict() == {
        "num_questions": 4,
        "num_groups": 3,
        "accuracy": as_dict,
        "macro_f1": as_dict,
        "log_loss": as_dict,
        "accuracy_interval": "bootstrap",
    }
    assert PairedDifference(4, 3, figure, figure, figure).to_dict() == {
        "num_questions": 4,
        "num_groups": 3,
        "accuracy": as_dict,
        "macro_f1": as_dict,
        "log_loss": as_dict,
    }
    assert figure.less(0.125) == Estimate(0.375, 0.125, 0.625)
    assert Estimate(0.5).less(-0.25) == Estimate(0.75)
    other = PairedDifference(4, 3, figure, figure, figure).less(0.125, 0.25, -0.25)
    assert other == PairedDifference(4, 3, figure.less(0.125), figure.less(0.25), figure.less(-0.25))


def test_a_line_and_a_table_to_the_last_character() -> None:
    macro_f1 = Estimate(0.125, -0.25, 0.375)
    difference = PairedDifference(4, 3, Estimate(0.25, -0.125, 0.5), macro_f1, Estimate(-0.0625, -0.5, 0.25))
    assert format_difference("a", difference) == (
        "  a: accuracy +0.250 [-0.125, +0.500], macro F1 +0.125 [-0.250, +0.375], log loss -0.062 [-0.500, +0.250]"
    )
    wilson = Metrics(9, 3, Estimate(1.0, 0.5, 1.0), Estimate(0.5, None, 1.0), None, "wilson")
    plain = Metrics(10, 3, Estimate(0.5, 0.25, None), Estimate(0.5), Estimate(1.25, 1.0, 1.5))
    assert format_table([("a", wilson), ("b", plain)]).split("\n") == [
        "|     |   n |               accuracy | macro F1 |             log loss |",
        "| --- | --: | ---------------------: | -------: | -------------------: |",
        "| a   |   9 | 1.000 [0.500, 1.000] w |    0.500 |                    - |",
        "| b   |  10 |                  0.500 |    0.500 | 1.250 [1.000, 1.500] |",
        "",
        "w: Wilson interval; accuracy is 0 or 1, or there are fewer than 30 passages.",
    ]
    assert "Wilson" not in format_table([("b", plain)])
