"""Blends by hand: every member with its own weight, on tables where another axis would fit as well."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ksat.blending import Member, align_members, blend, check_weights, read_member, smoothed_one_hot
from ksat.errors import InputError
from ksat.predictions import Predictions

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


def test_members_that_exclude_each_other_s_answer_leave_a_guess() -> None:
    """Every product of probabilities is 0 in floating point."""
    blended = blend([np.eye(3)[[choice]] for choice in range(3)], [1 / 3] * 3, "geometric")
    np.testing.assert_allclose(blended, np.full((1, 3), 1 / 3), rtol=1e-12)


def said(do: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        do()
    return str(caught.value)


NAN = float("nan")
ROW = [0.5, 0.5, NAN, NAN, NAN]


def test_what_is_said_of_weights() -> None:
    assert (
        said(lambda: check_weights([1.0], 2)) == "--weights: 1 given for 2 members; give one for each, in their order"
    )
    for bad in (0.0, -1.0, NAN, math.inf):
        assert said(lambda bad=bad: check_weights([1.0, bad, -5.0], 3)) == (
            f"--weights {bad}: must be positive and finite; to leave a member out, do not name it"
        )
    assert check_weights([1e308, 1e308, 2e307], 3) == pytest.approx([1 / 2.2, 1 / 2.2, 0.2 / 2.2])
    assert check_weights([5e-324, 5e-324], 2) == [0.5, 0.5]


def test_what_is_said_of_members(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,answer\nb,3\na,1\n")
    assert said(lambda: read_member(path, None)) == (
        f"{path}: labels only, which do not tell the number of choices; give --test CSV"
    )
    assert said(lambda: read_member(path, {"a": 2})) == (
        f"{path}: 1 of the rows have an id that --test has not (id 'b'); blend files of the same test"
    )
    assert said(lambda: read_member(path, {"a": 2, "b": 2})) == (
        f"{path}: 1 of the rows have an answer out of range (id 'b': 3 of 2); answers go from 1 to the row's number of choices"
    )
    labels = read_member(path, {"a": 2, "b": 3})
    assert (labels.path, labels.label_only, labels.predictions.ids) == (path, True, ("b", "a"))
    np.testing.assert_allclose(labels.predictions.probs, [[0.05, 0.05, 0.9, NAN, NAN], [0.9, 0.1, NAN, NAN, NAN]])
    path.write_text("id,answer,prob_1,prob_2,prob_3,prob_4,prob_5\na,1,0.5,0.5,,,\n")
    probs = read_member(path, None)
    assert (probs.path, probs.label_only, probs.predictions.ids) == (path, False, ("a",))


def test_what_is_said_of_members_that_do_not_fit() -> None:
    member, test = Member(Path("m"), Predictions(("a", "b"), np.array([ROW, ROW])), False), Path("t")
    assert said(lambda: align_members([member], {"a": 2, "b": 2, "c": 2}, test)) == (
        "m: 1 of the rows of t are missing (id 'c'); members must have the same ids"
    )
    assert said(lambda: align_members([member], {"a": 2}, test)) == (
        "m: 1 of the rows are not in t (id 'b'); members must have the same ids"
    )
    assert said(lambda: align_members([member], {"b": 3, "a": 2}, test)) == (
        "m: 1 of the rows have another number of choices than in t (id 'b': 2 against 3); are they the same questions?"
    )


def test_made_up_probabilities_of_labels() -> None:
    np.testing.assert_allclose(
        smoothed_one_hot(np.array([1, 4]), np.array([2, 5])),
        [[0.9, 0.1, NAN, NAN, NAN], [0.025, 0.025, 0.025, 0.9, 0.025]],
    )


def test_a_hard_blend_to_the_last_digit() -> None:
    """Votes, plus a millionth of the mean and a millionth for the winner, divided by what they sum to."""
    one, other = np.array([[0.6, 0.3, 0.1, NAN, NAN]]), np.array([[0.1, 0.5, 0.4, NAN, NAN]])
    blended = blend([one, other], [0.5, 0.5], "hard")
    expected = np.array([0.5 + 1e-6 * 0.35, 0.5 + 1e-6 * 1.4, 1e-6 * 0.25]) / (1 + 2e-6)
    np.testing.assert_allclose(blended[0, :3], expected, rtol=1e-12)


def test_votes_within_a_billionth_are_a_tie_and_others_are_not() -> None:
    first, second = np.array([[0.51, 0.49, NAN, NAN, NAN]]), np.array([[0.0, 1.0, NAN, NAN, NAN]])
    for excess, winner in ((0.4e-9, 2), (2e-9, 1)):
        blended = blend([first, second], [0.5 + excess / 2, 0.5 - excess / 2], "hard")
        assert np.nanargmax(blended) + 1 == winner


def test_a_zero_counts_as_its_floor_in_a_geometric_blend() -> None:
    one, other = np.array([[1.0, 0.0, NAN, NAN, NAN]]), np.array([[0.5, 0.5, NAN, NAN, NAN]])
    blended = blend([one, other], [0.5, 0.5], "geometric")
    masses = np.array([math.sqrt(0.5), math.sqrt(0.5 * 1e-15)])
    np.testing.assert_allclose(blended[0, :2], masses / masses.sum(), rtol=1e-9)


def test_what_a_bug_is_told() -> None:
    for members, weights, method in (([], [], "soft"), (MEMBERS[:1], [0.5, 0.5], "soft"), (MEMBERS[:1], [1.0], "mean")):
        with pytest.raises(ValueError, match=rf"^{len(members)} members, {len(weights)} weights, method '{method}'$"):
            blend(members, weights, method)
