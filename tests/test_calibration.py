"""Temperatures, reliability tables and the expected calibration error: by hand, by a reference, and as a picture."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksat.calibration import (
    calibrate,
    draw_reliability,
    expected_calibration_error,
    fit_temperature,
    format_calibrations,
    reliability,
    tempered,
)
from ksat.errors import InputError
from ksat.files import write_atomic
from ksat.metrics import row_log_losses
from ksat.predictions import FloatArray, IntArray, count_choices

NAN = float("nan")
PROBS = np.array(
    [
        [0.7, 0.3, NAN, NAN, NAN],  # right; 0.7 is the upper edge of its bin
        [0.35, 0.65, NAN, NAN, NAN],  # wrong
        [0.1, 0.2, 0.68, 0.02, NAN],  # right
        [0.95, 0.05, NAN, NAN, NAN],  # right
        [0.0, 1.0, NAN, NAN, NAN],  # wrong
        [0.2, 0.2, 0.2, 0.2, 0.2],  # right
    ]
)
ANSWERS = np.array([1, 1, 3, 1, 1, 1])


def make_calibrated(rng: np.random.Generator, num_rows: int) -> tuple[FloatArray, IntArray]:
    """Probabilities (N, 5), a third of the rows with four choices, and answers drawn from them."""
    probs = tempered(rng.dirichlet(np.ones(5), num_rows) + 0.01, 1.0)
    probs[::3, 4] = NAN
    probs /= np.nansum(probs, axis=1, keepdims=True)
    draws = rng.random((num_rows, 1)) > np.nancumsum(probs, axis=1)
    return probs, np.minimum(draws.sum(axis=1), count_choices(probs) - 1) + 1


def reference_error(probs: FloatArray, answers: IntArray, num_bins: int) -> float:
    """The expected calibration error row by row in plain Python, as the paper words it."""
    rows = []
    for row, answer in zip(probs.tolist(), answers.tolist(), strict=True):
        own = [prob for prob in row if not math.isnan(prob)]
        rows.append((max(own), own.index(max(own)) + 1 == answer))
    error = 0.0
    for number in range(num_bins):
        low, high = number / num_bins, (number + 1) / num_bins
        inside = [row for row in rows if low < row[0] <= high]
        if inside:
            confidence = sum(row[0] for row in inside) / len(inside)
            accuracy = sum(row[1] for row in inside) / len(inside)
            error += len(inside) / len(rows) * abs(accuracy - confidence)
    return error


def test_bins_by_hand() -> None:
    bins = reliability(PROBS, ANSWERS)
    assert [bin_.count for bin_ in bins] == [0, 1, 0, 0, 0, 0, 3, 0, 0, 2]
    assert (bins[6].low, bins[6].high, bins[6].accuracy) == (0.6, 0.7, pytest.approx(2 / 3))
    assert bins[6].confidence == pytest.approx((0.7 + 0.65 + 0.68) / 3)
    assert (bins[9].confidence, bins[9].accuracy) == (pytest.approx(0.975), 0.5)
    assert (bins[1].confidence, bins[1].accuracy) == (pytest.approx(0.2), 1.0)
    assert (bins[0].confidence, bins[0].accuracy) == (None, None)


def test_error_by_hand() -> None:
    expected = (3 * abs(2 / 3 - 2.03 / 3) + 2 * abs(0.5 - 0.975) + 1 * abs(1 - 0.2)) / 6
    assert expected_calibration_error(PROBS, ANSWERS) == pytest.approx(expected, abs=1e-15)
    one_bin = abs(4 / 6 - (0.7 + 0.65 + 0.68 + 0.95 + 1 + 0.2) / 6)
    assert expected_calibration_error(PROBS, ANSWERS, num_bins=1) == pytest.approx(one_bin, abs=1e-15)


@given(seed=st.integers(0, 2**32 - 1), num_rows=st.integers(1, 60), num_bins=st.integers(1, 20), coarse=st.booleans())
def test_error_equals_the_reference(seed: int, num_rows: int, num_bins: int, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    probs, answers = make_calibrated(rng, num_rows)
    if coarse:  # multiples of a tenth fall on the edges
        counts = count_choices(probs)
        probs = np.array([np.append(rng.multinomial(10, np.ones(k) / k) / 10, np.full(5 - k, NAN)) for k in counts])
    found = expected_calibration_error(probs, answers, num_bins)
    assert found == pytest.approx(reference_error(probs, answers, num_bins), abs=1e-12)
    assert 0 <= found <= 1
    assert sum(bin_.count for bin_ in reliability(probs, answers, num_bins)) == num_rows


def test_error_of_calibrated_and_of_sharpened_probabilities() -> None:
    probs, answers = make_calibrated(np.random.default_rng(0), 20_000)
    assert expected_calibration_error(probs, answers) < 0.015  # its noise: about 0.8 * sqrt(0.2 / 2,000) a bin
    found = calibrate(tempered(probs, 1 / 3), answers)  # three times as sharp
    assert found.temperature == pytest.approx(3, rel=0.05)
    assert found.error_before > 0.1 and found.error_after < 0.015
    assert found.log_loss_after < found.log_loss_before
    assert found.log_loss_after == pytest.approx(row_log_losses(probs, answers).mean(), abs=1e-3)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["temperature"] == found.temperature
    table = format_calibrations([("a.csv", found)])
    assert table.splitlines()[0].split("|")[1:4] == ["       ", " temperature ", "   ECE "]
    assert f"{found.temperature:.3f} | {found.error_before:.3f} |" in table


def test_temperature_by_hand() -> None:
    """A member that says 0.9 and is right in 3 of 4 rows: log 9 / T = log 3, so T = 2."""
    probs = np.tile([0.9, 0.1, NAN, NAN, NAN], (4, 1))
    assert fit_temperature(probs, np.array([1, 1, 1, 2])) == pytest.approx(2, abs=1e-5)
    np.testing.assert_allclose(tempered(probs, 2.0)[:, 0], 0.75)


def test_a_temperature_that_gains_nothing_is_1() -> None:
    assert fit_temperature(np.tile([0.25, 0.25, 0.25, 0.25, NAN], (4, 1)), np.array([1, 2, 3, 4])) == 1.0


def test_extreme_temperatures_and_zeros_give_probabilities() -> None:
    probs = np.array([[0.25, 0.3, 0.2, 0.25, NAN], [1.0, 0.0, NAN, NAN, NAN]])
    for temperature in (1e-3, 1.0, 100.0):
        found = tempered(probs, temperature)
        np.testing.assert_allclose(np.nansum(found, axis=1), 1, atol=1e-12)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(probs))
    assert fit_temperature(probs, np.array([2, 1])) == pytest.approx(1e-3, rel=1e-3)  # all right: as sure as may be


@given(seed=st.integers(0, 2**32 - 1), first=st.floats(0.1, 10), second=st.floats(0.1, 10))
def test_temperatures_multiply_and_keep_the_order(seed: int, first: float, second: float) -> None:
    probs, _ = make_calibrated(np.random.default_rng(seed), 8)
    once = tempered(probs, first)
    np.testing.assert_array_equal(np.nan_to_num(once, nan=-1).argmax(1), np.nan_to_num(probs, nan=-1).argmax(1))
    if once[~np.isnan(once)].min() > 1e-14:  # above the floor
        np.testing.assert_allclose(tempered(once, second), tempered(probs, first * second), atol=1e-9)


def test_the_picture_is_a_png_or_nothing(tmp_path: Path) -> None:
    from PIL import Image

    probs, answers = make_calibrated(np.random.default_rng(1), 400)
    found = calibrate(tempered(probs, 0.5), answers)
    path = tmp_path / "reliability.png"
    draw_reliability(path, [("before", found.before), ("after", found.after)], title="400 questions")
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("PNG", (900, 1050))
    assert [file.name for file in tmp_path.iterdir()] == ["reliability.png"]
    with pytest.raises(InputError, match="can't be written"):
        write_atomic(
            path / "below.png",
            lambda beside: draw_reliability(
                beside, [("before", found.before)], title="a file where a folder should be"
            ),
        )


@pytest.mark.parametrize(("rows", "num_bins"), [(0, 10), (5, 10), (6, 0)])
def test_no_rows_other_rows_or_no_bins_are_refused(rows: int, num_bins: int) -> None:
    with pytest.raises(ValueError, match="bins"):
        reliability(PROBS[:rows], ANSWERS if rows else ANSWERS[:0], num_bins)
