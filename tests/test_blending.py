"""Blends: by id, weighted, and the same whatever the members' order."""

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_labels

from ksat.blending import (
    METHODS,
    Member,
    agreement,
    align_members,
    blend,
    check_weights,
    read_member,
    smoothed_one_hot,
)
from ksat.errors import InputError
from ksat.predictions import FloatArray, Predictions, predicted_answers, read_probs, write_probs

NAN = float("nan")
A = np.array([[0.6, 0.3, 0.1, NAN, NAN]])
B = np.array([[0.2, 0.5, 0.3, NAN, NAN]])
C = np.array([[0.3, 0.45, 0.25, NAN, NAN]])


def make_members(seed: int, num_members: int, num_rows: int = 12) -> list[FloatArray]:
    """Coarse probabilities (hundredths, zeros among them), so that ties happen; 2 to 5 choices a row."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 6, num_rows)
    return [
        np.array([np.append(rng.multinomial(10, np.ones(k) / k) / 10, np.full(5 - k, NAN)) for k in counts])
        for _ in range(num_members)
    ]


def test_soft_is_the_weighted_mean() -> None:
    np.testing.assert_allclose(
        blend([A, B], check_weights([3, 1], 2), "soft"), [[0.5, 0.35, 0.15, NAN, NAN]], atol=1e-15
    )


def test_geometric_is_the_normalised_weighted_geometric_mean() -> None:
    expected = A**0.75 * B**0.25
    expected /= np.nansum(expected)
    np.testing.assert_allclose(blend([A, B], check_weights([3, 1], 2), "geometric"), expected, atol=1e-15)


def test_geometric_survives_zeros() -> None:
    one, other = np.array([[1.0, 0.0, NAN, NAN, NAN]]), np.array([[0.0, 1.0, NAN, NAN, NAN]])
    np.testing.assert_allclose(blend([one, other], [0.5, 0.5], "geometric")[0, :2], [0.5, 0.5])
    np.testing.assert_allclose(blend([one, one], [0.5, 0.5], "geometric")[0, :2], [1.0, 1e-15])


def test_hard_is_the_share_of_the_weighted_votes() -> None:
    np.testing.assert_allclose(
        blend([A, B, C], check_weights([1, 2, 1], 3), "hard"), [[0.25, 0.75, 0, NAN, NAN]], atol=2e-6
    )


def test_hard_ties_go_to_the_higher_mean_probability() -> None:
    assert predicted_answers(blend([A, B], [0.5, 0.5], "hard")).tolist() == [1]  # means 0.4, 0.4: the lower number
    sure = np.array([[0.0, 1.0, 0.0, NAN, NAN]])
    assert predicted_answers(blend([A, sure], [0.5, 0.5], "hard")).tolist() == [2]
    # 0.1 + 0.2 against 0.3 is a tie, although the floats differ; the mean is 0.55 against 0.45.
    firm, soft = np.array([[0.9, 0.1, NAN, NAN, NAN]]), np.array([[0.2, 0.8, NAN, NAN, NAN]])
    assert predicted_answers(blend([firm, firm, soft], [0.1 / 0.6, 0.2 / 0.6, 0.3 / 0.6], "hard")).tolist() == [1]
    assert predicted_answers(blend([soft, soft, firm], [0.1 / 0.6, 0.2 / 0.6, 0.3 / 0.6], "hard")).tolist() == [1]


def test_hard_votes_outweigh_any_probability() -> None:
    barely, sure = np.array([[0.51, 0.49, NAN, NAN, NAN]]), np.array([[0.0, 1.0, NAN, NAN, NAN]])
    assert predicted_answers(blend([barely, barely, sure], [1 / 3] * 3, "hard")).tolist() == [1]
    assert predicted_answers(blend([barely, sure], check_weights([1.00001, 1], 2), "hard")).tolist() == [1]


def hard_answers(members: list[FloatArray], weights: list[float]) -> list[int]:
    """The plain way, row by row: most votes, then the higher mean, then the lower number."""
    answers = []
    for row in range(len(members[0])):
        count = int((~np.isnan(members[0][row])).sum())
        votes = [0.0] * count
        for member, weight in zip(members, weights, strict=True):
            votes[int(np.argmax(member[row][:count]))] += weight
        mean = [sum(w * m[row][i] for m, w in zip(members, weights, strict=True)) for i in range(count)]
        answers.append(max(range(count), key=lambda i: (round(votes[i], 6), round(mean[i], 12), -i)) + 1)
    return answers


@given(seed=st.integers(0, 2**32 - 1), weights=st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=80, deadline=None)
def test_hard_answers_equal_the_plain_way(seed: int, weights: list[int]) -> None:
    members, shares = make_members(seed, len(weights)), check_weights(weights, len(weights))
    blended = blend(members, shares, "hard")
    mean = blend(members, shares, "soft")
    expected = hard_answers(members, shares)
    for found, want, row in zip(predicted_answers(blended), expected, mean, strict=True):
        assert found == want or row[found - 1] == pytest.approx(row[want - 1], abs=1e-12)  # a tie but for rounding


@given(seed=st.integers(0, 2**32 - 1), weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_a_blend_is_a_valid_prediction(seed: int, weights: list[float]) -> None:
    members = make_members(seed, len(weights))
    for method in METHODS:
        blended = blend(members, check_weights(weights, len(weights)), method)
        Predictions(tuple(map(str, range(len(blended)))), blended)  # refuses sums, gaps and ranges
        np.testing.assert_array_equal(np.isnan(blended), np.isnan(members[0]))


@given(seed=st.integers(0, 2**32 - 1), weights=st.lists(st.floats(0.1, 10), min_size=4, max_size=4))
@settings(max_examples=15, deadline=None)
def test_mistake_10_the_order_of_members_changes_nothing(seed: int, weights: list[float]) -> None:
    members = make_members(seed, 4)
    for method in METHODS:
        bits = {
            blend([members[i] for i in order], check_weights([weights[i] for i in order], 4), method).tobytes()
            for order in permutations(range(4))
        }
        assert len(bits) == 1


def test_mistake_10_weights_are_the_members_and_not_the_choices() -> None:
    five = [np.eye(5)[[i]] for i in range(5)]  # as many members as choices, where a wrong axis would not be noticed
    weights = check_weights([5, 4, 3, 2, 1], 5)
    np.testing.assert_allclose(blend(five, weights, "soft"), [np.array([5, 4, 3, 2, 1]) / 15])


def test_mistake_3_a_blend_gives_nothing_to_a_missing_choice() -> None:
    four = np.array([[0.1, 0.2, 0.3, 0.4, NAN]])
    for method in METHODS:
        blended = blend([four, four], [0.5, 0.5], method)
        assert np.isnan(blended[0, 4]) and predicted_answers(blended).tolist() == [4]


@pytest.mark.parametrize("method", METHODS)
def test_one_member_keeps_its_answers(method: str) -> None:
    member = make_members(0, 1)[0]
    blended = blend([member], [1.0], method)
    assert predicted_answers(blended).tolist() == predicted_answers(member).tolist()
    assert agreement(member, blended) == 1.0


@pytest.mark.parametrize(
    ("members", "weights", "method"), [([], [], "soft"), ([A], [0.5, 0.5], "soft"), ([A], [1], "x")]
)
def test_blend_refuses_what_check_weights_would_not_give(
    members: list[FloatArray], weights: list[float], method: str
) -> None:
    with pytest.raises(ValueError, match=f"{len(members)} members, {len(weights)} weights, method '{method}'"):
        blend(members, weights, method)


def test_weights() -> None:
    assert check_weights(None, 4) == [0.25] * 4
    assert check_weights([3, 1], 2) == [0.75, 0.25]
    with pytest.raises(InputError, match="--weights: 1 given for 2 members; give one for each"):
        check_weights([1], 2)
    for bad in (0.0, -1.0, NAN, float("inf")):
        with pytest.raises(InputError, match=f"--weights {bad}: must be positive and finite"):
            check_weights([1, bad], 2)


def test_agreement_is_the_share_of_equal_answers() -> None:
    assert agreement(np.vstack([A, B, C]), np.vstack([A, A, B])) == pytest.approx(2 / 3)


def test_smoothed_one_hot() -> None:
    np.testing.assert_allclose(
        smoothed_one_hot(np.array([2, 1, 5]), np.array([4, 2, 5])),
        [[0.1 / 3, 0.9, 0.1 / 3, 0.1 / 3, NAN], [0.9, 0.1, NAN, NAN, NAN], [0.025, 0.025, 0.025, 0.025, 0.9]],
    )


def make_member(name: str, ids: str, counts: list[int]) -> Member:
    rows = [[1 / count] * count + [NAN] * (5 - count) for count in counts]
    return Member(Path(name), Predictions(tuple(ids), np.array(rows)), label_only=False)


def test_members_are_aligned_by_id() -> None:
    aligned = align_members([make_member("m", "cab", [4, 2, 3])], {"a": 2, "b": 3, "c": 4}, Path("t"))
    assert (~np.isnan(aligned[0])).sum(axis=1).tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("ids", "counts", "match"),
    [
        ("a", [2], r"m.csv: 1 of the rows of t.csv are missing \(id 'b'\); members must have the same ids"),
        ("abz", [2, 3, 2], r"m.csv: 1 of the rows are not in t.csv \(id 'z'\); members must have the same ids"),
        ("ab", [2, 4], r"m.csv: 1 of the rows have another number of choices than in t.csv \(id 'b': 4 against 3\)"),
    ],
)
def test_members_of_other_questions_are_refused(ids: str, counts: list[int], match: str) -> None:
    with pytest.raises(InputError, match=match):
        align_members([make_member("m.csv", ids, counts)], {"a": 2, "b": 3}, Path("t.csv"))


def test_read_member_of_both_kinds(tmp_path: Path) -> None:
    member = make_member("m", "ab", [2, 3])
    write_probs(tmp_path / "x.probs.csv", member.predictions)
    write_labels(tmp_path / "x.csv", ["b", "a"], [3, 1])
    read = read_member(tmp_path / "x.probs.csv", None)
    assert not read.label_only and read.predictions.ids == read_probs(tmp_path / "x.probs.csv").ids
    labels = read_member(tmp_path / "x.csv", {"a": 2, "b": 3, "c": 5})
    assert labels.label_only and labels.predictions.ids == ("b", "a")
    np.testing.assert_allclose(labels.predictions.probs[1], [0.9, 0.1, NAN, NAN, NAN])


def test_label_only_members_need_the_test(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    write_labels(path, ["b", "a"], [3, 1])
    with pytest.raises(
        InputError, match="x.csv: labels only, which do not tell the number of choices; give --test CSV"
    ):
        read_member(path, None)
    with pytest.raises(InputError, match=r"1 of the rows have an id that --test has not \(id 'b'\)"):
        read_member(path, {"a": 2})
    with pytest.raises(InputError, match=r"1 of the rows have an answer out of range \(id 'b': 3 of 2\)"):
        read_member(path, {"a": 2, "b": 2})
