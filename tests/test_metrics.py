"""Accuracy, macro F1 and log loss, their intervals, and the uniform guess beside them."""

import json
import math
import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from ksat.metrics import (
    Estimate,
    Metrics,
    baseline_metrics,
    compute_metrics,
    count_positions,
    fit_scale,
    format_table,
    held_out_position_probs,
    paired_difference,
    position_probs,
    random_baseline,
    row_log_losses,
    wilson_interval,
)
from ksat.predictions import FloatArray, IntArray, count_choices, predicted_answers

NAN = float("nan")
PROBS = np.array(
    [
        [0.5, 0.2, 0.1, 0.1, 0.1],
        [0.1, 0.6, 0.2, 0.1, NAN],
        [0.25, 0.25, 0.5, 0.0, NAN],
        [0.7, 0.3, NAN, NAN, NAN],
    ]
)
ANSWERS = np.array([1, 2, 1, 2])
ALONE = ["a", "b", "c", "d"]


def make_board(rng: np.random.Generator, num_rows: int) -> tuple[FloatArray, IntArray]:
    """Probabilities (N, 5), some with four choices, and answers drawn from them."""
    probs = rng.dirichlet(np.ones(5), num_rows)
    probs[::3, 4] = NAN
    probs /= np.nansum(probs, axis=1, keepdims=True)
    draws = rng.random((num_rows, 1)) > np.nancumsum(probs, axis=1)
    return probs, np.minimum(draws.sum(axis=1), count_choices(probs) - 1) + 1


def test_exact_values_on_four_rows() -> None:
    metrics = compute_metrics(PROBS, ANSWERS, ALONE)
    assert metrics.accuracy.value == 0.5  # predicted 1, 2, 3, 1
    # Label 1: one hit of 2 predicted, 2 gold: 1/2. Label 2: one hit of 1 predicted, 2 gold: 2/3. Label 3: 0. No 4, 5.
    assert metrics.macro_f1.value == pytest.approx((1 / 2 + 2 / 3 + 0) / 3, abs=1e-15)
    assert metrics.log_loss is not None
    assert metrics.log_loss.value == pytest.approx(-np.mean(np.log([0.5, 0.6, 0.25, 0.3])), abs=1e-15)
    assert (metrics.num_questions, metrics.num_groups) == (4, 4)


@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_values_equal_scikit_learn(seed: int, num_rows: int) -> None:
    probs, answers = make_board(np.random.default_rng(seed), num_rows)
    predicted = predicted_answers(probs)
    metrics = compute_metrics(probs, answers, [str(i) for i in range(num_rows)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f1 = sklearn.metrics.f1_score(answers, predicted, average="macro")
        log_loss = sklearn.metrics.log_loss(answers, np.nan_to_num(probs), labels=[1, 2, 3, 4, 5])
    assert metrics.accuracy.value == sklearn.metrics.accuracy_score(answers, predicted)
    assert metrics.macro_f1.value == pytest.approx(f1, abs=1e-12)
    assert metrics.log_loss is not None
    assert metrics.log_loss.value == pytest.approx(log_loss, abs=1e-9)
    for estimate in (metrics.accuracy, metrics.log_loss):
        assert estimate.low is not None and estimate.high is not None
        assert estimate.low <= estimate.value + 1e-12 and estimate.value <= estimate.high + 1e-12


def test_mistake_3_metrics_see_only_a_row_s_own_choices() -> None:
    probs = np.array([[0.1, 0.2, 0.3, 0.4, NAN]])
    assert predicted_answers(probs).tolist() == [4]
    with pytest.raises(ValueError, match="row 0: the answer is not among the row's choices"):
        row_log_losses(probs, np.array([5]))
    assert random_baseline(np.array([4]), np.array([4])).accuracy.value == 0.25


def test_an_impossible_answer_costs_a_finite_log_loss() -> None:
    losses = row_log_losses(np.array([[0.0, 1.0, NAN, NAN, NAN]]), np.array([1]))
    assert losses.tolist() == [pytest.approx(-math.log(1e-15))]


def test_bootstrap_resamples_passages_and_not_rows() -> None:
    rng = np.random.default_rng(5)
    hit = np.repeat(rng.random(100) < 0.6, 4)  # four questions a passage, all right or all wrong
    probs = np.where(hit[:, None], [0.9, 0.1, NAN, NAN, NAN], [0.1, 0.9, NAN, NAN, NAN])
    answers = np.ones(400, dtype=np.int64)
    grouped = compute_metrics(probs, answers, [f"p{i // 4}" for i in range(400)])
    single = compute_metrics(probs, answers, [str(i) for i in range(400)])
    assert (grouped.num_groups, single.num_groups) == (100, 400)
    assert grouped.accuracy.low is not None and grouped.accuracy.high is not None
    assert single.accuracy.low is not None and single.accuracy.high is not None
    ratio = (grouped.accuracy.high - grouped.accuracy.low) / (single.accuracy.high - single.accuracy.low)
    assert ratio == pytest.approx(2.0, rel=0.1)  # as wide as a quarter of the rows makes it
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert grouped.accuracy.high - grouped.accuracy.low == pytest.approx(2 * half, rel=0.1)


def test_intervals_depend_on_the_seed_alone() -> None:
    probs, answers = make_board(np.random.default_rng(1), 90)
    groups = [f"p{i // 2}" for i in range(90)]
    assert compute_metrics(probs, answers, groups) == compute_metrics(probs, answers, groups)
    assert compute_metrics(probs, answers, groups) != compute_metrics(probs, answers, groups, seed=1)
    order = np.random.default_rng(2).permutation(90)
    shuffled = compute_metrics(probs[order], answers[order], [groups[i] for i in order])
    assert shuffled.accuracy == compute_metrics(probs, answers, groups).accuracy


def test_about_95_of_100_intervals_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """300 boards of 60 passages, 1 to 3 questions each, whose hits are correlated within a passage."""
    monkeypatch.setattr("ksat.metrics.NUM_RESAMPLES", 400)
    rng = np.random.default_rng(0)
    boards, covered = 300, np.zeros(3)
    answers_of = {True: [0.8, 0.2, NAN, NAN, NAN], False: [0.3, 0.7, NAN, NAN, NAN]}
    true_loss = -(0.6 * math.log(0.8) + 0.4 * math.log(0.3))
    for _ in range(boards):
        groups = [f"p{i}" for i in range(60) for _ in range(i % 3 + 1)]
        right = {group: rng.random() < 0.6 for group in dict.fromkeys(groups)}
        other = np.array([rng.random() < 0.5 for _ in groups])  # the answer is 1 or 2, so macro F1 is near 0.6 as well
        hits = [right[group] for group in groups]
        probs = np.array([answers_of[hit] for hit in hits])
        answers = np.where(other, 2, 1)
        probs[other, :2] = probs[other, 1::-1]
        metrics = compute_metrics(probs, answers, groups)
        for i, (estimate, truth) in enumerate(
            [(metrics.accuracy, 0.6), (metrics.macro_f1, 0.6), (metrics.log_loss, true_loss)]
        ):
            assert estimate is not None and estimate.low is not None and estimate.high is not None
            covered[i] += estimate.low <= truth <= estimate.high
    assert (covered / boards >= 0.90).all() and (covered / boards <= 0.99).all(), covered / boards


@pytest.mark.parametrize(
    ("share", "num_rows", "low", "high"),
    [
        (1.0, 10, 0.722467, 1.0),  # n / (n + z^2)
        (0.0, 10, 0.0, 0.277533),
        (0.5, 100, 0.403832, 0.596168),
    ],
)
def test_wilson_interval(share: float, num_rows: int, low: float, high: float) -> None:
    assert wilson_interval(share, num_rows) == pytest.approx((low, high), abs=1e-6)


def test_a_perfect_or_tiny_board_gets_a_wilson_interval_and_says_so() -> None:
    probs = np.tile([0.9, 0.1, NAN, NAN, NAN], (80, 1))
    perfect = compute_metrics(probs, np.ones(80, dtype=np.int64), [f"p{i // 2}" for i in range(80)])
    assert perfect.accuracy_interval == "wilson"
    assert (perfect.accuracy.low, perfect.accuracy.high) == wilson_interval(1.0, 40)  # passages, not rows
    tiny = compute_metrics(PROBS, ANSWERS, ALONE)
    assert (tiny.accuracy_interval, tiny.accuracy.low) == ("wilson", wilson_interval(0.5, 4)[0])
    mixed = np.where(np.arange(80) % 2, 1, 2)
    assert compute_metrics(probs, mixed, [str(i) for i in range(80)]).accuracy_interval == "bootstrap"
    table = format_table([("perfect", perfect)])
    assert "| perfect |  80 | 1.000 [0.912, 1.000] w |" in table
    assert table.endswith("\n\nw: Wilson interval; accuracy is 0 or 1, or there are fewer than 30 passages.")


@pytest.mark.parametrize("answers", [np.array([1]), np.array([], dtype=np.int64)])
def test_metrics_refuse_rows_that_do_not_match(answers: IntArray) -> None:
    with pytest.raises(ValueError, match="expected as many of each, and at least one"):
        compute_metrics(PROBS, answers, ALONE)
    with pytest.raises(ValueError, match="expected as many"):
        random_baseline(np.array([4, 4]), answers)


def test_positions_are_counted_on_the_rows_of_other_folds() -> None:
    """Three folds of two rows of four choices: the others' most frequent answer, each count one larger."""
    answers, folds = np.array([1, 1, 2, 2, 3, 2]), np.array([0, 0, 1, 1, 2, 2])
    probs = held_out_position_probs(np.full(6, 4), answers, folds)
    assert probs[0, :4].tolist() == pytest.approx([1 / 8, 4 / 8, 2 / 8, 1 / 8])
    assert probs[2, :4].tolist() == pytest.approx([3 / 8, 2 / 8, 2 / 8, 1 / 8])
    assert np.isnan(probs[:, 4]).all()
    assert (probs[::2] == probs[1::2])[:, :4].all()


def test_the_baselines_of_a_table() -> None:
    """Passages stay whole: one whose rows alone have the answer 3 is not told of it by its own rows."""
    answers = np.array([1, 2] * 20 + [3] * 60)
    groups = [*(str(row) for row in range(40)), *["one"] * 60]
    (name, uniform), (other, by_position) = baseline_metrics(np.full(100, 4), answers, groups)
    assert (name, other) == ("uniform guess", "most frequent position")
    assert uniform.accuracy.value == 0.25 and uniform.accuracy.low is None
    assert by_position.accuracy.value < 0.1  # a few of the 1s and 2s in its fold
    assert by_position.num_groups == 41
    shuffled = np.random.default_rng(0).permutation(100)
    again = baseline_metrics(np.full(100, 4), answers[shuffled], [groups[row] for row in shuffled])
    assert again[1][1].log_loss is not None and by_position.log_loss is not None
    assert again[1][1].log_loss.value == pytest.approx(by_position.log_loss.value)
    known = baseline_metrics(np.full(100, 4), answers, groups, {"4": [0, 0, 7, 0]})
    assert known[1][1].accuracy.value == 0.6
    assert len(baseline_metrics(np.full(100, 4), answers, [str(row % 4) for row in range(100)])) == 1
    assert len(baseline_metrics(np.full(100, 4), answers, [str(row % 5) for row in range(100)])) == 2
    assert len(baseline_metrics(np.full(4, 4), answers[:4], ["x"] * 4, {"4": [1, 0, 0, 0]})) == 2


def test_random_baseline_is_exact_where_it_can_be() -> None:
    counts, answers = np.array([4, 5, 5, 2]), np.array([1, 2, 3, 1])
    baseline = random_baseline(counts, answers)
    assert baseline.accuracy == Estimate(float(np.mean([1 / 4, 1 / 5, 1 / 5, 1 / 2])))
    assert baseline.log_loss == Estimate(float(np.mean(np.log([4, 5, 5, 2]))))
    assert baseline.accuracy_interval == "none"


def test_a_share_lies_in_its_own_interval() -> None:
    for count in range(1, 300):
        for share in (0.0, 1.0, 1 / count):
            low, high = wilson_interval(share, count)
            assert 0 <= low <= share <= high <= 1


def test_the_most_frequent_position_is_that_of_the_training_rows_by_number_of_choices() -> None:
    positions = count_positions(np.array([4, 4, 4, 5, 5]), np.array([2, 2, 1, 5, 5]))
    assert positions == {"4": [1, 2, 0, 0], "5": [0, 0, 0, 0, 2]}
    probs = position_probs(positions, np.array([5, 4, 2]))
    expected = [
        [1 / 7, 1 / 7, 1 / 7, 1 / 7, 3 / 7],
        [2 / 7, 3 / 7, 1 / 7, 1 / 7, np.nan],
        [0.5, 0.5, np.nan, np.nan, np.nan],
    ]
    np.testing.assert_allclose(probs, expected)
    metrics = compute_metrics(probs, np.array([5, 1, 1]), ["a", "b", "c"])
    assert metrics.accuracy.value == pytest.approx(2 / 3)  # right, wrong, and a guess that happens to be right
    assert metrics.log_loss is not None
    assert metrics.log_loss.value == pytest.approx(-np.log([3 / 7, 2 / 7, 1 / 2]).mean())


def test_random_baseline_macro_f1_equals_the_enumerated_expectation() -> None:
    """Two rows of 2 choices, answers 1 and 2: the four guesses have macro F1 1, 1/3, 1/3 and 0."""
    baseline = random_baseline(np.array([2, 2]), np.array([1, 2]))
    assert baseline.macro_f1.value == pytest.approx((1 + 1 / 3 + 1 / 3 + 0) / 4, abs=0.03)
    large = random_baseline(np.full(5000, 4), np.arange(5000) % 4 + 1)
    assert large.macro_f1.value == pytest.approx(0.25, abs=0.001)
    assert large == random_baseline(np.full(5000, 4), np.arange(5000) % 4 + 1)


def test_paired_difference_is_a_minus_b() -> None:
    better = np.tile([0.8, 0.2, NAN, NAN, NAN], (40, 1))
    worse = better.copy()
    worse[::4] = [0.4, 0.6, NAN, NAN, NAN]
    answers, groups = np.ones(40, dtype=np.int64), [str(i) for i in range(40)]
    difference = paired_difference(better, worse, answers, groups)
    assert difference.accuracy.value == 0.25
    assert difference.log_loss.value == pytest.approx(-math.log(2) / 4)
    assert difference.accuracy.low is not None and difference.accuracy.high is not None
    assert 0.05 < difference.accuracy.low < 0.25 < difference.accuracy.high < 0.45
    same = paired_difference(better, better, answers, groups)
    assert same.accuracy == same.macro_f1 == same.log_loss == Estimate(0.0, 0.0, 0.0)
    assert json.loads(json.dumps(difference.to_dict()))["log_loss"]["value"] == difference.log_loss.value


def test_pairing_is_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(4)
    probs, answers = make_board(rng, 300)
    nudged = probs * np.exp(0.1 * rng.standard_normal(probs.shape))
    nudged /= np.nansum(nudged, axis=1, keepdims=True)
    groups = [str(i) for i in range(300)]
    paired = paired_difference(probs, nudged, answers, groups).log_loss
    single = compute_metrics(probs, answers, groups).log_loss
    assert single is not None and single.low is not None and single.high is not None
    assert paired.low is not None and paired.high is not None
    assert paired.high - paired.low < 0.2 * (single.high - single.low)


def test_paired_difference_refuses_other_questions() -> None:
    other = PROBS.copy()
    other[0] = [0.5, 0.5, NAN, NAN, NAN]
    with pytest.raises(ValueError, match="they are not the same questions"):
        paired_difference(PROBS, other, ANSWERS, ALONE)


def mean_log_loss(scale: float, scores: FloatArray, answer_index: IntArray) -> float:
    logits = np.where(np.isnan(scores), -np.inf, scale * scores)
    gold = logits[np.arange(len(scores)), answer_index]
    return float(np.mean(np.logaddexp.reduce(logits, axis=1) - gold))


@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 40), true_scale=st.floats(0.05, 50))
@settings(max_examples=40, deadline=None)
def test_no_scale_on_a_grid_beats_the_fitted_one(seed: int, num_rows: int, true_scale: float) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(num_rows, 5)) / true_scale
    scores[rng.random(num_rows) < 0.4, 4] = NAN
    answer_index = rng.integers(0, 4, num_rows)
    fitted = fit_scale(scores, answer_index)
    best = min(mean_log_loss(scale, scores, answer_index) for scale in np.geomspace(1e-2, 1e3, 300))
    assert 1e-2 <= fitted <= 1e3
    assert mean_log_loss(fitted, scores, answer_index) <= best + 1e-6


def test_fit_scale_finds_the_scale_that_made_the_answers() -> None:
    rng = np.random.default_rng(7)
    scores = rng.normal(size=(20_000, 5))
    scores[::2, 4] = NAN
    gumbel = np.where(np.isnan(scores), -np.inf, 3.0 * scores + rng.gumbel(size=scores.shape))
    assert fit_scale(scores, np.argmax(gumbel, axis=1)) == pytest.approx(3.0, rel=0.03)


def test_fit_scale_ends_at_its_bounds() -> None:
    scores = np.array([[0.0, -1.0, NAN, NAN, NAN]])
    assert fit_scale(scores, np.array([1])) == pytest.approx(1e-2, rel=1e-3)  # wrong: the flatter the better
    assert (
        mean_log_loss(fit_scale(scores, np.array([0])), scores, np.array([0])) < 1e-9
    )  # right: the steeper the better


@pytest.mark.parametrize(
    ("scores", "index", "match"),
    [
        (np.empty((0, 5)), [], "at least one row, and finite scores"),
        (np.array([[-np.inf, 0.0, NAN, NAN, NAN]]), [1], "at least one row, and finite scores"),
        (np.array([[0.0, 0.0, NAN, NAN, NAN]]), [2], "row 0: the answer is not among the row's choices"),
    ],
)
def test_fit_scale_refuses(scores: FloatArray, index: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fit_scale(scores, np.array(index, dtype=np.int64))


def test_table_and_json() -> None:
    guess = Metrics(200, 200, Estimate(0.2), Estimate(0.19), Estimate(1.609), "none")
    labels = Metrics(200, 90, Estimate(0.61, 0.5, 0.7), Estimate(0.6, 0.49, 0.69), None)
    assert format_table([("uniform guess", guess), ("labels", labels)]).splitlines() == [
        "|               |   n |             accuracy |             macro F1 | log loss |",
        "| ------------- | --: | -------------------: | -------------------: | -------: |",
        "| uniform guess | 200 |                0.200 |                0.190 |    1.609 |",
        "| labels        | 200 | 0.610 [0.500, 0.700] | 0.600 [0.490, 0.690] |        - |",
    ]
    assert json.loads(json.dumps(labels.to_dict(), allow_nan=False)) == {
        "num_questions": 200,
        "num_groups": 90,
        "accuracy": {"value": 0.61, "low": 0.5, "high": 0.7},
        "macro_f1": {"value": 0.6, "low": 0.49, "high": 0.69},
        "log_loss": None,
        "accuracy_interval": "bootstrap",
    }
