"""Is one model better than another on the same questions: exact McNemar tests, and Holm's correction for many pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class McNemar:
    """What two models' answers to the same questions say about which is better.

    Attributes:
        only_a: questions that only a answers correctly.
        only_b: questions that only b answers correctly.
        p_value: exact, two-sided: how likely so uneven a split is if both are equally good.
    """

    only_a: int
    only_b: int
    p_value: float


def mcnemar(correct_a: NDArray[np.bool_], correct_b: NDArray[np.bool_]) -> McNemar:
    """The exact McNemar test (a sign test on the questions where the two differ; https://doi.org/10.1007/BF02295996).

    It counts questions as independent; where many share a passage it is a little too sure of itself.

    Args:
        correct_a: (N,) whether a answers each question correctly.
        correct_b: (N,) whether b does.
    """
    from scipy.stats import binomtest

    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    p_value = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return McNemar(only_a, only_b, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, in their order (Holm 1979): below 0.05 together errs in 5 % at most."""
    corrected, largest = [1.0] * len(p_values), 0.0
    for done, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - done)))
        corrected[i] = largest
    return corrected
