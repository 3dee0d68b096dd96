"""Fitted blends: optimal, the same in every order, honest about their gain on simulated sets, stored and read back."""

import json
import math
from dataclasses import replace
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from ksat.blending import blend
from ksat.calibration import fit_temperature, tempered
from ksat.errors import InputError
from ksat.files import read_json, write_json
from ksat.fitted_blend import FittedBlend, Pool, apply_blend, from_dict, margin_fallback
from ksat.fitting import METHODS, NestedGain, equal_blend, fit_blend, fit_weights, greedy_blend, nested_gain
from ksat.metrics import Estimate, PairedDifference, paired_difference, row_log_losses
from ksat.predictions import FloatArray, IntArray, count_choices, predicted_answers

NAN = float("nan")
POOLS: list[Pool] = ["linear", "log"]
FITTED = FittedBlend((1.0, 2.0), (0.75, 0.25), "linear", 0.9, 1.25)


def softmax(scores: FloatArray) -> FloatArray:
    """(N, 5) over each row's own choices."""
    masses = np.exp(scores - np.nanmax(scores, axis=1, keepdims=True))
    return np.asarray(masses / np.nansum(masses, axis=1, keepdims=True))


def draw_answers(rng: np.random.Generator, probs: FloatArray) -> IntArray:
    """(N,) answers counted from 1, each drawn from its row."""
    draws = rng.random((len(probs), 1)) > np.nancumsum(probs, axis=1)
    return np.minimum(draws.sum(axis=1), count_choices(probs) - 1) + 1


def make_members(
    rng: np.random.Generator, num_rows: int, noises: tuple[float, ...]
) -> tuple[list[FloatArray], IntArray]:
    """Members that see the same scores through noise of their own, each at a sharpness of its own, and the answers.

    A third of the rows have four choices. With equal noises the members are exchangeable.
    """
    scores = 1.5 * rng.normal(size=(num_rows, 5))
    scores[::3, 4] = NAN
    answers = draw_answers(rng, softmax(scores))
    seen = [scores + noise * rng.normal(size=scores.shape) for noise in noises]
    return [softmax(member * np.exp(0.5 * rng.normal())) for member in seen], answers


def two_a_passage(num_rows: int) -> list[str]:
    return [f"p{i // 2}" for i in range(num_rows)]


def log_loss(probs: FloatArray, answers: IntArray) -> float:
    return float(row_log_losses(probs, answers).mean())


def pooled_losses(
    tables: list[FloatArray], answers: IntArray, weights: FloatArray, pool: Pool, temperature: float = 1.0
) -> float:
    """The log loss written out: a mean of probabilities, or of log probabilities, and a softmax at a temperature."""
    if pool == "linear":
        logs = np.log(sum(w * table for w, table in zip(weights, tables, strict=True)))  # type: ignore[arg-type]
    else:
        logs = sum(w * np.log(t) for w, t in zip(weights, tables, strict=True))  # type: ignore[assignment]
    return log_loss(softmax(logs / temperature), answers)


@pytest.mark.parametrize(("tails", "pool"), [(40.0, "log"), (2.5, "linear")])
def test_equal_weights_take_the_pool_that_suits_the_members_errors(tails: float, pool: Pool) -> None:
    """The log pool was taken whatever they were: 1.5 points of accuracy less where now and then a member is sure of anything."""
    rng = np.random.default_rng(0)

    def draw(num_rows: int) -> tuple[list[FloatArray], IntArray]:
        answers = rng.integers(1, 6, num_rows)
        shared, tables = rng.normal(size=(num_rows, 5)), []
        for _ in range(4):
            noise = shared + (0.7 if tails < 9 else 1) * rng.standard_t(tails, size=(num_rows, 5))
            scores = 2 * (1.5 * np.eye(5)[answers - 1] + np.sqrt(0.5) * noise)
            masses = np.exp(scores - scores.max(axis=1, keepdims=True))
            tables.append(masses / masses.sum(axis=1, keepdims=True))
        return tables, answers

    tables, answers = draw(1500)
    fresh, right = draw(20_000)
    found = equal_blend(tables, answers)
    assert found.pool == pool
    other = equal_blend(tables, answers, pool="linear" if pool == "log" else "log")
    losses = [float(row_log_losses(apply_blend(each, fresh), right).mean()) for each in (found, other)]
    hits = [float(np.mean(predicted_answers(apply_blend(each, fresh)) == right)) for each in (found, other)]
    assert losses[0] < losses[1] - 0.01 and hits[0] > hits[1] + 0.002


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("seed", range(5))
def test_the_weights_satisfy_the_kkt_conditions(pool: Pool, seed: int) -> None:
    """Convex on the simplex: least if, and only if, no direction to a corner descends and those in use are level."""
    rng = np.random.default_rng(seed)
    scores, shared = (1.5 * rng.normal(size=(300, 5)) for _ in range(2))
    answers = draw_answers(rng, softmax(scores))
    # The second sees the first one's noise doubled: the less of it the better.
    tables = [softmax(scores + share * shared) for share in (0.4, 0.8)]
    tables += [softmax(scores + noise * rng.normal(size=scores.shape)) for noise in (0.7, 1.0, 2.0)]
    fitted = fit_blend(tables, answers, pool=pool)
    scaled = [tempered(table, t) for table, t in zip(tables, fitted.temperatures, strict=True)]
    weights, step = np.array(fitted.weights), 1e-6
    here = pooled_losses(scaled, answers, weights, pool, fitted.temperature)
    assert fitted.log_loss == pytest.approx(here, abs=1e-12)
    moved = [(1 - step) * weights + step * e for e in np.eye(5)]
    slopes = np.array([(pooled_losses(scaled, answers, w, pool, fitted.temperature) - here) / step for w in moved])
    for other in (0.999, 1.001):
        assert pooled_losses(scaled, answers, weights, pool, fitted.temperature * other) > here - 1e-12
    assert (slopes > -1e-5).all(), slopes  # to no corner does it descend
    assert (np.abs(slopes[weights > 0.01]) < 1e-4).all(), slopes  # the members in use are level
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1, abs=1e-12)
    assert weights.min() < 0.01 < weights[0]  # both sides of the conditions were met


def test_known_weights_are_recovered_in_the_linear_pool() -> None:
    rng = np.random.default_rng(3)
    tables = [softmax(2 * rng.normal(size=(20_000, 5))) for _ in range(3)]
    answers = draw_answers(rng, blend(tables, [0.6, 0.3, 0.1], "soft"))
    np.testing.assert_allclose(fit_weights(tables, answers, pool="linear"), [0.6, 0.3, 0.1], atol=0.03)
    np.testing.assert_allclose(fit_weights(tables[::-1], answers, pool="linear"), [0.1, 0.3, 0.6], atol=0.03)


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_of_members_that_have_little_in_common_is_sharpened(pool: Pool) -> None:
    """Three calibrated members that err apart: their mean says 0.6 where it is right more often, and weights alone can't mend it."""
    rng = np.random.default_rng(8)
    answers = rng.integers(1, 6, 4000)
    tables = [softmax(2 * (2 * np.eye(5)[answers - 1] + rng.normal(size=(4000, 5)))) for _ in range(3)]
    fitted = equal_blend(tables, answers, pool=pool)
    assert fitted.temperature < (0.7 if pool == "linear" else 0.5)
    assert fitted.log_loss < log_loss(apply_blend(replace(fitted, temperature=1.0), tables), answers) - 0.03
    assert fitted.weights == (1 / 3,) * 3


def test_the_temperature_of_a_sharpened_member_is_found() -> None:
    rng = np.random.default_rng(4)
    probs = softmax(1.5 * rng.normal(size=(5000, 5)))
    answers = draw_answers(rng, probs)
    fitted = fit_blend([probs, tempered(probs, 1 / 3), tempered(probs, 2)], answers)
    np.testing.assert_allclose(fitted.temperatures, [1, 3, 0.5], rtol=0.06)
    assert fitted.temperatures[1] == pytest.approx(3 * fitted.temperatures[0], rel=1e-4)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("method", [fit_blend, greedy_blend])
def test_of_one_member_only_the_temperature_is_fitted(pool: Pool, method: type) -> None:
    tables, answers = make_members(np.random.default_rng(0), 100, (1.0,))
    fitted = method(tables, answers, pool=pool)
    assert fitted.weights == (1.0,)
    np.testing.assert_allclose(apply_blend(fitted, tables), tempered(tables[0], fitted.temperatures[0]), atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_equal_members_share_the_weight_equally(pool: Pool) -> None:
    (good, poor), answers = make_members(np.random.default_rng(1), 200, (0.5, 3.0))
    alone, shared = fit_blend([good, poor], answers, pool=pool), fit_blend([good, poor, good], answers, pool=pool)
    assert shared.weights[0] == shared.weights[2] == pytest.approx(alone.weights[0] / 2, abs=1e-3)
    assert shared.log_loss == pytest.approx(alone.log_loss, abs=1e-6)
    assert fit_blend([good] * 3, answers, pool=pool).weights == (1 / 3,) * 3


@given(seed=st.integers(0, 2**32 - 1), num_members=st.integers(1, 4), pool=st.sampled_from(POOLS))
@settings(max_examples=25)
def test_properties_of_a_fitted_blend(seed: int, num_members: int, pool: Pool) -> None:
    rng = np.random.default_rng(seed)
    tables, answers = make_members(rng, 40, tuple(rng.exponential(size=num_members)))
    fitted = fit_blend(tables, answers, pool=pool)
    blended = apply_blend(fitted, tables)
    np.testing.assert_allclose(np.nansum(blended, axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(np.isnan(blended), np.isnan(tables[0]))
    assert fitted.log_loss <= equal_blend(tables, answers, pool=pool).log_loss + 1e-9
    assert fitted == fit_blend(tables, answers, pool=pool)
    for order in permutations(range(num_members)):
        moved = fit_blend([tables[i] for i in order], answers, pool=pool)
        assert moved.weights == tuple(fitted.weights[i] for i in order)
        assert moved.temperatures == tuple(fitted.temperatures[i] for i in order)
        np.testing.assert_array_equal(apply_blend(moved, [tables[i] for i in order]), blended)


def test_zeros_and_members_that_are_always_right_or_wrong_give_finite_weights() -> None:
    right = np.tile([1.0, 0.0, NAN, NAN, NAN], (40, 1))
    wrong, unsure = right[:, [1, 0, 2, 3, 4]], np.tile([0.6, 0.4, NAN, NAN, NAN], (40, 1))
    answers = np.ones(40, dtype=np.int64)
    for pool in POOLS:
        fitted = fit_blend([wrong, right, unsure], answers, pool=pool)
        assert fitted.log_loss == pytest.approx(0, abs=1e-6)
        assert greedy_blend([wrong, right, unsure], answers, pool=pool).weights == (0.0, 1.0, 0.0)


def greedy_reference(tables: list[FloatArray], answers: IntArray, *, by_accuracy: bool) -> list[float]:
    """Forward selection as the paper words it: the mean of a bag with each member added, and the best of the bags; each at the
    temperature of the bag before it, and a bag that is kept at its own."""

    def judge(bag: list[int], temperature: float) -> tuple[int, float]:
        pooled = np.mean([tables[k] for k in bag], axis=0)
        wrong = int((np.nanargmax(pooled, axis=1) + 1 != answers).sum()) if by_accuracy else 0
        return wrong, log_loss(tempered(pooled, temperature), answers)

    bag: list[int] = []
    bags: list[tuple[tuple[int, float], list[int]]] = []
    temperature = 1.0
    while len(bag) < 50:
        judged = [judge([*bag, i], temperature) for i in range(len(tables))]
        bag = [*bag, judged.index(min(judged))]
        temperature = fit_temperature(np.mean([tables[k] for k in bag], axis=0), answers)
        bags.append((judge(bag, temperature), bag))
    (wrong, loss), _ = min(bags)
    best = next(found for judged, found in bags if judged <= (wrong, loss + 1e-12))
    return [best.count(i) / len(best) for i in range(len(tables))]


@pytest.mark.parametrize("by_accuracy", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_selection_equals_the_reference(seed: int, by_accuracy: bool) -> None:
    tables, answers = make_members(np.random.default_rng(seed), 150, (0.8, 0.9, 1.0, 3.0))
    fitted = greedy_blend(tables, answers, pool="linear", by_accuracy=by_accuracy)
    scaled = [tempered(table, t) for table, t in zip(tables, fitted.temperatures, strict=True)]
    expected = greedy_reference(scaled, answers, by_accuracy=by_accuracy)
    assert list(fitted.weights) == pytest.approx(expected, abs=1e-15)
    best = fit_blend(tables, answers, pool="linear")
    assert fitted.temperatures == best.temperatures
    if by_accuracy:
        assert share_right(apply_blend(fitted, tables), answers) >= max(share_right(t, answers) for t in tables)
    else:
        assert best.log_loss - 1e-9 <= fitted.log_loss <= min(log_loss(table, answers) for table in scaled)


def test_of_equal_members_greedy_selection_picks_the_first() -> None:
    (table,), answers = make_members(np.random.default_rng(2), 100, (1.0,))
    assert greedy_blend([table, table, table], answers).weights == (1.0, 0.0, 0.0)


def test_greedy_selection_passes_a_pick_that_gains_nothing() -> None:
    """A half of the second member is worse than none, and a tenth of it is better."""
    rng = np.random.default_rng(7)
    tables = [softmax(2 * rng.normal(size=(4000, 5))) for _ in range(2)]
    answers = draw_answers(rng, blend(tables, [0.9, 0.1], "soft"))
    fitted = greedy_blend(tables, answers, pool="linear")
    scaled = [tempered(table, t) for table, t in zip(tables, fitted.temperatures, strict=True)]
    assert log_loss(blend(scaled, [0.5, 0.5], "soft"), answers) > log_loss(scaled[0], answers) > fitted.log_loss + 1e-4
    assert fitted.log_loss == pytest.approx(fit_blend(tables, answers, pool="linear").log_loss, abs=1e-3)
    share = Fraction(fitted.weights[0]).limit_denominator(50)  # of at most 50 picks
    assert fitted.weights[0] == pytest.approx(float(share), abs=1e-12)


def test_exchangeable_members_gain_nothing_from_fitted_weights() -> None:
    """200 sets of 200 rows in which three members are equally good: there is nothing to gain.

    Fitted weights lose (M - 1) / 2n nats a question on new rows, n = 160 the rows fitted to, since they miss the best
    ones: less than zero, by the price of two free parameters. So the nested gain and that price are zero together. The
    gain on the rows fitted to is of the same size with the other sign: what a report without nesting would boast of.
    """
    gains, boasts, verdicts = [], [], []
    for seed in range(200):
        tables, answers = make_members(np.random.default_rng(seed), 200, (1.0, 1.0, 1.0))
        found = nested_gain(tables, answers, two_a_passage(200), methods=["geometric"])
        gains.append(-found.difference.log_loss.value)
        boasts.append(equal_blend(tables, answers, pool="log").log_loss - fit_blend(tables, answers).log_loss)
        verdicts.append(found.verdict)
    mean, error = np.mean(gains), np.std(gains, ddof=1) / math.sqrt(200)
    price = (3 - 1) / (2 * 160)
    assert abs(mean + price) < 3 * error, (mean, price, error)
    assert mean < 3 * error and error < 0.001  # no gain; and the test would see one of 0.003
    assert np.mean(boasts) > 0.002
    assert verdicts.count("worth it") <= 5  # 2.5 % of the intervals would lie on that side if there were no price


@pytest.mark.parametrize("method", METHODS)
def test_a_poor_member_under_three_names_makes_fitted_weights_worth_it(method: str) -> None:
    """Equal weights count it three times. Poor members alone do not: each is tempered to what it knows."""
    rng = np.random.default_rng(0)
    scores = 1.5 * rng.normal(size=(600, 5))
    answers = draw_answers(rng, softmax(scores))
    poor = scores + 1.5 * rng.normal(size=scores.shape)
    tables = [softmax(scores + 0.3 * rng.normal(size=scores.shape))]
    tables += [softmax(poor + 0.1 * rng.normal(size=scores.shape)) for _ in range(3)]
    found = nested_gain(tables, answers, two_a_passage(600), methods=[method])
    assert found.verdict == "worth it"
    assert found.difference.log_loss.high is not None and found.difference.log_loss.high < -0.05
    assert all(weights[0] > 0.85 for weights in found.fold_weights) and len(found.fold_weights) == 5
    for figure, worth in (("log_loss", log_loss), ("accuracy", share_right)):
        expected = worth(found.fitted, answers) - worth(found.equal, answers)
        assert getattr(found.difference, figure).value == pytest.approx(expected, abs=1e-12)
    changed = sum(a.argmax() != b.argmax() for a, b in zip(found.fitted, found.equal, strict=True))
    accuracy, macro_f1, loss = found.optimism
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == {
        "method": method,
        "verdict": "worth it",
        "difference": found.difference.to_dict(),
        "optimism": {"accuracy": accuracy, "macro_f1": macro_f1, "log_loss": loss},
        "changed_answers": changed,
        "fold_weights": [list(weights) for weights in found.fold_weights],
    }


def share_right(probs: FloatArray, answers: IntArray) -> float:
    return float(np.mean(np.nanargmax(probs, axis=1) + 1 == answers))


def test_no_answer_of_a_fold_touches_its_own_rows() -> None:
    """All three rows of a passage get other answers: its rows stay as they are, and other folds' rows change."""
    tables, answers = make_members(np.random.default_rng(5), 120, (0.5, 1.0))
    groups = [f"p{i // 3}" for i in range(120)]
    changed = answers.copy()
    changed[30:33] = changed[30:33] % 4 + 1
    before, after = (nested_gain(tables, given, groups, methods=["geometric"]) for given in (answers, changed))
    np.testing.assert_array_equal(before.fitted[30:33], after.fitted[30:33])
    np.testing.assert_array_equal(before.equal[30:33], after.equal[30:33])
    rows_moved = (np.nan_to_num(before.fitted) != np.nan_to_num(after.fitted)).any(axis=1)
    assert 90 <= rows_moved.sum() <= 99  # the four other folds, of 24 rows each but for the size of a passage
    np.testing.assert_array_equal(rows_moved.reshape(40, 3).any(axis=1), rows_moved.reshape(40, 3).all(axis=1))


def test_the_seed_alone_decides_the_folds() -> None:
    tables, answers = make_members(np.random.default_rng(6), 100, (0.5, 1.0))
    groups = two_a_passage(100)
    first, same, other = (nested_gain(tables, answers, groups, methods=["linear"], seed=seed) for seed in (0, 0, 1))
    assert first.to_dict() == same.to_dict() != other.to_dict()


def test_equal_members_gain_exactly_nothing() -> None:
    (table,), answers = make_members(np.random.default_rng(6), 100, (1.0,))
    found = nested_gain([table, table], answers, two_a_passage(100), methods=["geometric"])
    assert found.difference.log_loss == Estimate(0.0, 0.0, 0.0)
    assert found.num_changed == 0
    assert found.verdict == "not distinguishable from equal weights: take equal weights"


def test_more_folds_than_passages_are_refused() -> None:
    tables, answers = make_members(np.random.default_rng(6), 8, (0.5, 1.0))
    with pytest.raises(InputError, match="4 passages for 5 folds: .* give more labelled rows"):
        nested_gain(tables, answers, two_a_passage(8))


@pytest.mark.parametrize(
    ("interval", "num_groups", "verdict"),
    [
        ((-0.02, -0.03, -0.01), 100, "worth it"),
        ((-0.02, -0.05, 0.01), 100, "not distinguishable from equal weights: take equal weights"),
        ((-0.02, -0.05, 0.0), 100, "not distinguishable from equal weights: take equal weights"),
        ((0.02, 0.01, 0.03), 100, "worse than equal weights: take equal weights"),
        ((-0.0005, -0.0008, -0.0002), 100, "gains less than 0.001 nats a question: take equal weights"),
        ((0.0005, 0.0002, 0.0008), 100, "gains less than 0.001 nats a question: take equal weights"),
        ((0.001, 0.0005, 0.0015), 100, "worse than equal weights: take equal weights"),
        (
            (-0.02, -0.03, -0.01),
            29,
            "not distinguishable from equal weights with 29 passages, fewer than 30: take equal weights",
        ),
    ],
)
def test_verdicts(interval: tuple[float, float, float], num_groups: int, verdict: str) -> None:
    figures = Estimate(0.03, 0.01, 0.05), Estimate(0.02, -0.1, 0.1), Estimate(*interval)
    assert gain_of(PairedDifference(200, num_groups, *figures)).verdict == verdict


def gain_of(difference: PairedDifference, *, changes: bool = True) -> NestedGain:
    """A gain whose figures are given, and which changes the one answer or not."""
    equal, other = np.array([[0.6, 0.4, NAN, NAN, NAN]]), np.array([[0.4, 0.6, NAN, NAN, NAN]])
    tables = {"geometric": other if changes else equal}
    return NestedGain("geometric", difference, (0.0, 0.0, 0.0), ((0.5, 0.5),), tables, equal)


@pytest.mark.parametrize(
    ("accuracy", "macro_f1", "changes", "verdict"),
    [
        ((0.03, 0.01, 0.05), 0.0, True, "worth it"),
        ((0.011, -0.009, 0.031), 0.0, True, "worth it"),  # a standard error is 0.0102
        (
            (0.01, -0.01, 0.03),
            0.0,
            True,
            "its log loss is better and its accuracy not by a standard error: take equal weights",
        ),
        (
            (-0.03, -0.05, -0.01),
            0.1,
            True,
            "its log loss is better and its accuracy not by a standard error: take equal weights",
        ),
        (
            (0.03, 0.01, 0.05),
            -0.001,
            True,
            "its log loss and accuracy are better and its macro F1 is worse: take equal weights",
        ),
        ((0.0, 0.0, 0.0), 0.0, False, "no answer changes, only their probabilities do: take equal weights"),
    ],
)
def test_log_loss_alone_makes_nothing_worth_it(
    accuracy: tuple[float, float, float], macro_f1: float, changes: bool, verdict: str
) -> None:
    loss = Estimate(-0.02, -0.03, -0.01)
    difference = PairedDifference(200, 100, Estimate(*accuracy), Estimate(macro_f1, -0.1, 0.1), loss)
    assert gain_of(difference, changes=changes).verdict == verdict


@pytest.mark.parametrize("interval", [(0.0001, 0.00001, 0.0002), (0.02, 0.01, 0.03), (-0.0005, -0.0008, -0.0002)])
def test_blends_that_change_no_answer_are_neither_worse_nor_better(interval: tuple[float, float, float]) -> None:
    """A copy of a member was called worse, beside a gain of 0.000 and no answer that changes."""
    nothing = Estimate(0.0, 0.0, 0.0)
    difference = PairedDifference(200, 100, nothing, nothing, Estimate(*interval))
    assert gain_of(difference, changes=False).verdict.startswith("no answer changes")


def test_the_best_of_all_is_named_and_what_choosing_makes_look_too_good_is_taken_off() -> None:
    tables, answers = make_members(np.random.default_rng(3), 300, (0.6, 1.0, 1.5))
    groups = two_a_passage(300)
    found = nested_gain(tables, answers, groups)
    losses = {name: log_loss(table, answers) for name, table in found.tables.items()}
    assert list(losses) == list(METHODS)
    assert losses[found.method] == min(losses.values())
    apparent = paired_difference(found.fitted, found.equal, answers, groups)
    assert found.difference == apparent.less(*found.optimism)
    assert found.optimism[2] <= 0
    assert all(abs(amount) < 0.02 for amount in found.optimism)


def gained_on_fresh_rows(seed: int, accuracies: tuple[float, ...]) -> tuple[str, float]:
    """The verdict on 800 rows about members that err partly together, and what it gains in accuracy on 8,000 further ones."""
    rng = np.random.default_rng(seed)

    def draw(num_rows: int) -> tuple[list[FloatArray], IntArray]:
        answers = rng.integers(1, 6, num_rows)
        shared = rng.normal(size=(num_rows, 5))
        edges = [norm.ppf(a) * 1.35 + 1.15 for a in accuracies]  # about these accuracies of five choices
        seen = [edge * np.eye(5)[answers - 1] + (shared + rng.normal(size=(num_rows, 5))) / 2**0.5 for edge in edges]
        return [softmax(2 * scores) for scores in seen], answers

    tables, answers = draw(800)
    found = nested_gain(tables, answers, two_a_passage(800), methods=["geometric", "linear"])
    fresh, right = draw(8000)
    fitted, equal = (fit(tables, answers) for fit in (METHODS[found.method], equal_blend))
    fitted_hits, equal_hits = (share_right(apply_blend(each, fresh), right) for each in (fitted, equal))
    return found.verdict, fitted_hits - equal_hits


def test_what_is_worth_it_keeps_its_accuracy_on_fresh_rows() -> None:
    """Two strong members and a weak one that err partly together: weights of a pool that is not tempered were "worth it" each time, and
    lost accuracy two times of three."""
    found = [gained_on_fresh_rows(seed, (0.765, 0.765, 0.5)) for seed in range(12)]
    gains = [gain for verdict, gain in found if verdict == "worth it"]
    assert len(gains) >= 4
    assert np.mean(gains) > 0
    assert sum(gain < 0 for gain in gains) <= 1


def test_unsure_rows_fall_back_on_the_surest_member() -> None:
    one = np.array([[0.50, 0.30, 0.20, NAN, NAN], [0.55, 0.45, NAN, NAN, NAN], [0.9, 0.1, NAN, NAN, NAN]])
    other = np.array([[0.20, 0.45, 0.35, NAN, NAN], [0.40, 0.60, NAN, NAN, NAN], [0.1, 0.9, NAN, NAN, NAN]])
    blended = blend([one, other], [0.5, 0.5], "soft")  # margins 0.025, 0.05 and 0
    np.testing.assert_array_equal(margin_fallback([one, other], blended, 0.0), blended)
    found = margin_fallback([one, other], blended, 0.03)
    np.testing.assert_array_equal(found, [one[0], blended[1], one[2]])  # of equal margins the first member's
    np.testing.assert_array_equal(margin_fallback([other, one], blended, 1.0), [one[0], other[1], other[2]])
    for margin in (-0.1, 1.1, NAN):
        with pytest.raises(InputError, match=r"margin .* lies in 0 to 1; give one such as 0.05"):
            margin_fallback([one, other], blended, margin)


def test_faults_of_the_caller_are_refused() -> None:
    tables, answers = make_members(np.random.default_rng(0), 30, (1.0, 1.0))
    with pytest.raises(ValueError, match="0 members"):
        fit_blend([], answers)
    with pytest.raises(ValueError, match="pool 'mean'"):
        fit_blend(tables, answers, pool="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not the same questions"):
        fit_blend([tables[0], tables[1][:29]], answers)
    with pytest.raises(ValueError, match="not the same questions"):
        greedy_blend([tables[0], tables[1][::-1]], answers)
    with pytest.raises(ValueError):
        apply_blend(FITTED, tables[:1])
    with pytest.raises(ValueError):
        FITTED.to_dict(["one.csv"])


def test_json_round_trip(tmp_path: Path) -> None:
    tables, answers = make_members(np.random.default_rng(0), 100, (0.5, 1.0, 2.0))
    fitted, files = fit_blend(tables, answers, pool="linear"), ("가.probs.csv", "b.probs.csv", "c.probs.csv")
    write_json(tmp_path / "blend.json", fitted.to_dict(files))
    assert from_dict(read_json(tmp_path / "blend.json"), tmp_path / "blend.json") == (fitted, files)  # to the last bit


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("pool",), None, "fields missing or unknown: pool"),
        (("extra",), 1, "fields missing or unknown: extra"),
        (("members", 0, "weight"), None, "fields missing or unknown: weight"),
        (("members", 1, "scale"), 2.0, "fields missing or unknown: scale"),
        (("format",), 1, "format 1, expected 2"),
        (("format",), True, "format True, expected 2"),
        (("format",), None, "format None, expected 2"),
        (("temperature",), None, "fields missing or unknown: temperature"),
        (("temperature",), 0, "temperature 0.0, expected 0.001 to 100"),
        (("temperature",), "1", "'1' where a finite number is expected"),
        (("pool",), "mean", "pool 'mean', expected linear or log"),
        (("pool",), ["linear"], r"pool \['linear'\], expected linear or log"),
        (("members",), [], "'members' must be a list of objects"),
        (("members",), {"a": 1}, "'members' must be a list of objects"),
        (("members", 0), "a.csv", "'members' must be a list of objects"),
        (("members", 0, "file"), 3, "a member's 'file' is not a text"),
        (("members", 0, "weight"), "0.75", "'0.75' where a finite number is expected"),
        (("members", 0, "weight"), True, "True where a finite number is expected"),
        (("members", 0, "weight"), 0.8, "weights sum to 1.05, expected 1"),
        (("members", 0, "weight"), -0.75, "weight -0.75, expected at least 0"),
        (("log_loss",), -0.5, "log_loss -0.5, expected at least 0"),
        (("members", 0, "temperature"), 0, "temperature 0.0, expected 0.001 to 100"),
        (("members", 1, "temperature"), 1e300, "temperature 1e.300, expected 0.001 to 100"),
        (("members", 0, "temperature"), 10**400, "10+ where a finite number is expected"),
        (("members", 0, "temperature"), math.inf, "inf where a finite number is expected"),
        (("log_loss",), None, "fields missing or unknown: log_loss"),
        (("log_loss",), "low", "'low' where a finite number is expected"),
    ],
)
def test_an_edited_file_is_refused(path: tuple[str | int, ...], value: object, message: str) -> None:
    stored = FITTED.to_dict(["a.csv", "b.csv"])
    inner = stored
    for key in path[:-1]:
        inner = inner[key]  # type: ignore[index]
    if value is None:
        del inner[path[-1]]  # type: ignore[arg-type]
    else:
        inner[path[-1]] = value  # type: ignore[index]
    with pytest.raises(InputError, match=rf"^blend\.json: {message}.*fit the blend"):
        from_dict(stored, "blend.json")


def test_the_method_that_is_named_has_the_least_log_loss() -> None:
    """Members that are now and then sure of anything, which the geometric mean takes for a veto."""
    rng = np.random.default_rng(5)
    answers, shared = rng.integers(1, 6, 600), rng.normal(size=(600, 5))
    own = [0.7 * rng.standard_t(1.5, size=(600, 5)) for _ in range(3)]
    tables = [softmax(2 * (1.6 * np.eye(5)[answers - 1] + (shared + noise) / 2**0.5)) for noise in own]
    found = nested_gain(tables, answers, two_a_passage(600), methods=["geometric", "linear"])
    losses = {name: log_loss(table, answers) for name, table in found.tables.items()}
    assert losses["linear"] < losses["geometric"] - 0.001
    assert found.method == "linear"
