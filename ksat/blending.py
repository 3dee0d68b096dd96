"""Blend the predictions of several models: joined by id, weighted, and the same whatever the members' order."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ksat.errors import InputError, bad_rows
from ksat.predictions import (
    FloatArray,
    IntArray,
    Predictions,
    is_probability_table,
    predicted_answers,
    read_labels,
    read_probs,
)
from ksat.questions import MAX_CHOICES, read_table

METHODS = ("soft", "geometric", "hard")
SMOOTHING = 0.1
_SMALLEST_LOG = math.log(1e-15)  # one member's zero may not veto a choice
_TIE_SHARE = 1e-6  # of the mass of a hard vote: orders ties, and never outweighs a vote
_SAME_VOTES = 1e-9  # vote shares this close are a tie: 0.1 + 0.2 against 0.3


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a blend. `label_only`: it had answers and no probabilities, which were made up (smoothed one-hot)."""

    path: Path
    predictions: Predictions
    label_only: bool


def read_member(path: Path, num_choices: Mapping[str, int] | None) -> Member:
    """A probability file, or a label-only CSV whose answers become smoothed one-hot rows.

    Args:
        path: the file.
        num_choices: of each test question by id; None if no test file was given.

    Raises:
        InputError: see read_probs and read_labels; or a label-only file without num_choices, with an id that the test
            has not, or with an answer beyond its row's choices.
    """
    if is_probability_table(read_table(path)):
        return Member(path, read_probs(path), label_only=False)
    labels = read_labels(path)
    if num_choices is None:
        raise InputError(f"{path}: labels only, which do not tell the number of choices; give --test CSV")
    if unknown := [(row_id, "") for row_id in labels if row_id not in num_choices]:
        raise bad_rows(path, "have an id that --test has not", unknown, "blend files of the same test")
    rows = [(row_id, answer, num_choices[row_id]) for row_id, answer in labels.items()]
    if bad := [(row_id, f"{answer} of {count}") for row_id, answer, count in rows if answer > count]:
        raise bad_rows(path, "have an answer out of range", bad, "answers go from 1 to the row's number of choices")
    probs = smoothed_one_hot(np.array([row[1] for row in rows]), np.array([row[2] for row in rows]))
    return Member(path, Predictions(tuple(labels), probs), label_only=True)


def smoothed_one_hot(answers: IntArray, num_choices: IntArray) -> FloatArray:
    """(N, 5) probabilities for bare labels: 0.9 for the answer, 0.1 spread over the row's other choices, NaN beyond.

    Args:
        answers: (N,) counted from 1, each at most its row's number of choices.
        num_choices: (N,) 2 to 5.
    """
    numbers = np.arange(1, MAX_CHOICES + 1)
    probs = np.where(numbers == answers[:, None], 1 - SMOOTHING, SMOOTHING / (num_choices[:, None] - 1))
    return np.where(numbers <= num_choices[:, None], probs, np.nan)


def align_members(members: Sequence[Member], num_choices: Mapping[str, int], reference: Path) -> list[FloatArray]:
    """Each member's probabilities (N, 5), rows in the order of num_choices; joined by id, never by row.

    Args:
        members: the files.
        num_choices: of each question by id, in the order wanted.
        reference: the file that num_choices is from, for the message.

    Raises:
        InputError: a member lacks an id, has another one, or has another number of choices for one.
    """
    aligned = []
    for member in members:
        rows = {row_id: row for row, row_id in enumerate(member.predictions.ids)}
        if missing := [(row_id, "") for row_id in num_choices if row_id not in rows]:
            raise bad_rows(member.path, f"of {reference} are missing", missing, "members must have the same ids")
        if unknown := [(row_id, "") for row_id in rows if row_id not in num_choices]:
            raise bad_rows(member.path, f"are not in {reference}", unknown, "members must have the same ids")
        pairs = [(row_id, num_choices[row_id], int(count)) for row_id, count in _counts(member.predictions)]
        if bad := [(row_id, f"{count} against {wanted}") for row_id, wanted, count in pairs if count != wanted]:
            raise bad_rows(
                member.path, f"have another number of choices than in {reference}", bad, "are they the same questions?"
            )
        aligned.append(member.predictions.probs[[rows[row_id] for row_id in num_choices]])
    return aligned


def _counts(predictions: Predictions) -> list[tuple[str, int]]:
    return list(zip(predictions.ids, predictions.num_choices.tolist(), strict=True))


def check_weights(weights: Sequence[float] | None, num_members: int) -> list[float]:
    """One weight for each member, summing to 1; equal ones for None.

    Raises:
        InputError: not as many as members, or one that is not positive and finite.
    """
    if weights is None:
        weights = [1.0] * num_members
    if len(weights) != num_members:
        raise InputError(
            f"--weights: {len(weights)} given for {num_members} members; give one for each, in their order"
        )
    if bad := [weight for weight in weights if not (weight > 0 and math.isfinite(weight))]:
        raise InputError(f"--weights {bad[0]}: must be positive and finite; to leave a member out, do not name it")
    exponent = math.frexp(max(weights))[1]  # two of 1e308 have no sum; a power of two changes no bit of the others
    shares = [math.ldexp(weight, -exponent) for weight in weights]
    total = math.fsum(shares)  # the exact sum: the same in every order
    return [share / total for share in shares]


def blend(members: Sequence[FloatArray], weights: Sequence[float], method: str) -> FloatArray:
    """(N, 5) blended probabilities; the members' order does not change a bit of them.

    - soft: the weighted mean.
    - geometric: the weighted geometric mean, renormalised; a probability counts as at least 1e-15.
    - hard: each member votes for its most probable choice (of equals the lowest number); the result is the shares of
      the weighted votes. Most votes win, then the higher weighted mean probability, then the lower number. Two
      millionths of the mass follow the mean probability and the winner, so that the result's most probable choice is
      the winner.

    Args:
        members: (N, 5) each, rows of the same questions, NaN where a choice does not exist.
        weights: one for each member, from check_weights.
        method: of METHODS.

    Raises:
        ValueError: no members, an unknown method, or not as many weights.
    """
    if not members or len(members) != len(weights) or method not in METHODS:
        raise ValueError(f"{len(members)} members, {len(weights)} weights, method {method!r}")
    stacked, shares = np.stack(members), np.array(weights)[:, None, None]  # (M, N, 5), (M, 1, 1)
    mean = _sum_members(shares * stacked)
    if method == "soft":
        return _normalised(mean)
    if method == "geometric":
        logs = _sum_members(shares * np.log(np.maximum(stacked, math.exp(_SMALLEST_LOG))))
        return _normalised(np.exp(logs - np.nanmax(logs, axis=1, keepdims=True)))
    ballots = np.stack([_one_hot(predicted_answers(member)) for member in members])
    votes = np.where(np.isnan(mean), np.nan, _sum_members(shares * ballots))
    leaders = votes > np.nanmax(votes, axis=1, keepdims=True) - _SAME_VOTES
    winner = _one_hot(predicted_answers(np.where(leaders, mean, np.nan)))
    return _normalised(votes + _TIE_SHARE * (mean + winner))


def _normalised(masses: FloatArray) -> FloatArray:
    """(N, 5) rows that sum to 1."""
    probs: FloatArray = masses / np.nansum(masses, axis=1, keepdims=True)
    return probs


def _sum_members(terms: FloatArray) -> FloatArray:
    """(N, 5) sums over the members of (M, N, 5), added in the order of size: the same in every order of members."""
    total: FloatArray = np.sort(terms, axis=0).sum(axis=0)
    return total


def _one_hot(answers: IntArray) -> FloatArray:
    """(N, 5) with 1 at each row's answer, counted from 1, and 0 elsewhere."""
    return np.eye(MAX_CHOICES)[answers - 1]


def agreement(member: FloatArray, blended: FloatArray) -> float:
    """Share of the rows, 0 to 1, in which two (N, 5) tables have the same most probable choice."""
    return float(np.mean(predicted_answers(member) == predicted_answers(blended)))
