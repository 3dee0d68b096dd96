"""Blends by hand: every member with its own weight, on tables where another axis would fit as well."""

import math

import numpy as np
import pytest

from ksat.blending import blend, check_weights

# Five members of five rows with five choices: a weight taken along any other axis has a place there too.
MEMBERS = [np.random.default_rng(number).dirichlet(np.ones(5), size=5) for number in range(5)]
WEIGHTS = check_weights([5, 4, 3, 2, 1], 5)


def by_hand(method: str, row: int, choice: int) -> float:
    """A choice's mass before the row is normalised."""
    each = [(weight, member[row]) for weight, member in zip(WEIGHTS, MEMBERS, strict=True)]
    if method == "soft":
        return math.fsum(weight * probs[choice] for weight, probs in each)
    if method == "geometric":
        return math.prod(probs[choice] ** weight for weight, probs in each)
    return math.fsum(weight for weight, probs in each if probs.argmax() == choice)


@pytest.mark.parametrize(("method", "tolerance"), [("soft", 1e-12), ("geometric", 1e-12), ("hard", 1e-5)])
def test_weights_belong_to_members_and_not_to_rows_or_choices(method: str, tolerance: float) -> None:
    blended = blend(MEMBERS, WEIGHTS, method)
    for row in range(5):
        masses = [by_hand(method, row, choice) for choice in range(5)]
        np.testing.assert_allclose(blended[row], np.array(masses) / sum(masses), atol=tolerance)
