"""Exact McNemar against hand-made counts, Holm against hand-made figures, both against properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksat.comparison import holm, mcnemar


def answers(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    a = [True] * both + [True] * only_a + [False] * only_b + [False] * neither
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 2 / 2**5),
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (3, 3, 1.0),
    ],
)
def test_mcnemar_by_hand(only_a: int, only_b: int, p_value: float) -> None:
    test = mcnemar(*answers(7, only_a, only_b, 4))
    assert (test.only_a, test.only_b) == (only_a, only_b)
    assert test.p_value == pytest.approx(p_value, rel=1e-12)
    assert mcnemar(*answers(7, only_b, only_a, 4)).p_value == pytest.approx(p_value, rel=1e-12)


def test_mcnemar_errs_as_often_as_it_says() -> None:
    """Two models that are equally good: p below 0.05 in at most 5 % of the sets, and not never."""
    generator = np.random.default_rng(0)
    found = [mcnemar(*(generator.random((2, 300)) < 0.6)).p_value < 0.05 for _ in range(1000)]
    assert 0.02 < np.mean(found) <= 0.06  # binomial error 0.7 points


def test_holm_by_hand() -> None:
    # Smallest times 4, next times 3, and never below one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_corrects_upwards_and_keeps_the_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, corrected, strict=True))
    assert min(corrected) == pytest.approx(min(1.0, min(p_values) * len(p_values)))
    by_p = [q for _, q in sorted(zip(p_values, corrected, strict=True))]
    assert by_p == sorted(by_p)
