"""What a leaderboard's public half says about its private one, and which two submissions to select for the end.

A half is drawn from the labelled rows at hand by bootstrap over passages; public and private half independently, as if both
came from the population that those rows stand for. The scores seen are taken for the true ones, so the chances flatter: see
ahead_again_if_equal.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ksat.metrics import macro_f1_scores, sum_by_group
from ksat.predictions import FloatArray, IntArray, predicted_answers
from ksat.questions import MAX_CHOICES

NUM_DRAWS = 4000
_ROUNDING = 1e-12  # scores closer than that are a tie


@dataclass(frozen=True, slots=True)
class Draws:
    """Scores of M runs on the same drawn halves.

    Attributes:
        accuracy: (draws, M).
        macro_f1: (draws, M).
    """

    accuracy: FloatArray
    macro_f1: FloatArray


def draw_halves(
    tables: Sequence[FloatArray], answers: IntArray, groups: Sequence[str], *, num_questions: int, seed: int = 0
) -> Draws:
    """Scores of every run on halves of about `num_questions` questions, drawn with replacement passage by passage.

    Args:
        tables: (N, 5) of each run, rows of the same questions.
        answers: (N,) gold answers, counted from 1.
        groups: (N,) passage keys.
        num_questions: of a half; so many passages are drawn as have that many on average.
        seed: of the draws.
    """
    cells = [np.eye(MAX_CHOICES**2)[(answers - 1) * MAX_CHOICES + predicted_answers(table) - 1] for table in tables]
    sums = np.stack([sum_by_group(each, groups) for each in cells])  # (M, G, 25)
    num_groups = sums.shape[1]
    num_drawn = max(1, round(num_questions * num_groups / len(answers)))
    rng, accuracies, scores = np.random.default_rng(seed), [], []
    for size in _parts(num_groups):
        times = rng.multinomial(num_drawn, np.full(num_groups, 1 / num_groups), size=size).astype(np.float64)  # (B, G)
        confusion = np.einsum("bg,mgc->bmc", times, sums, optimize=True)  # (B, M, 25)
        square = confusion.reshape(-1, MAX_CHOICES, MAX_CHOICES)
        hits = np.trace(square, axis1=1, axis2=2) / square.sum(axis=(1, 2))
        accuracies.append(hits.reshape(size, len(tables)))
        scores.append(macro_f1_scores(square).reshape(size, len(tables)))
    return Draws(np.concatenate(accuracies), np.concatenate(scores))


def _parts(num_groups: int) -> Iterator[int]:
    left = NUM_DRAWS
    while left:
        part = min(left, max(1, 4_000_000 // num_groups))
        yield part
        left -= part


def ahead_again(scores_a: FloatArray, scores_b: FloatArray) -> float:
    """The chance, 0.5 to 1, that whoever of two is ahead on one half is ahead on the other too; a tie counts half.

    With p, q and t the chances that a leads, that b leads and of a tie, it is (p(p + t/2) + q(q + t/2)) / (p + q), since the
    halves are drawn independently; 0.5 where the two always tie.

    Args:
        scores_a: (draws,) of the one.
        scores_b: (draws,) of the other, on the same halves.
    """
    difference = scores_a - scores_b
    p, q = float(np.mean(difference > _ROUNDING)), float(np.mean(difference < -_ROUNDING))
    if p + q == 0:
        return 0.5
    tie = 1 - p - q
    return (p * (p + tie / 2) + q * (q + tie / 2)) / (p + q)


def ahead_again_if_equal(num_questions: int, half: int) -> float:
    """What ahead_again gives two equally good runs on average, 0.5 to 1: the figure that says nothing.

    The gap seen on the rows at hand is chance, but the halves are drawn from those rows. In units of a half's standard error it
    is normal with variance v = half / num_questions, and the mean of 1/2 + (2 Phi(gap) - 1)^2 / 2 over it is
    1/2 + arcsin(v / (1 + v)) / pi (the orthant probability of two normal variables, Sheppard 1899). Ties are left out, which
    makes it a little too high where the runs seldom differ.

    Args:
        num_questions: compared.
        half: questions in a half.
    """
    v = half / num_questions
    return 0.5 + math.asin(v / (1 + v)) / math.pi


@dataclass(frozen=True, slots=True)
class PickedTwo:
    """Two submissions for the end.

    Attributes:
        first: index of the better one.
        second: index of the other.
        expected: mean of the better of the two on a private half.
        alone: the same of the best single one.
        correlation: of the two's right and wrong answers, -1 to 1; None if one is always right or always wrong.
        changes: share of the questions that the two answer differently.
    """

    first: int
    second: int
    expected: float
    alone: float
    correlation: float | None
    changes: float


def pick_two(tables: Sequence[FloatArray], answers: IntArray, halves: FloatArray) -> PickedTwo:
    """The pair whose better one scores best on a private half, on average: good ones that err on different questions.

    Args:
        tables: (N, 5) of at least two runs.
        answers: (N,) gold answers, counted from 1.
        halves: (draws, M) scores of the runs, from draw_halves.

    Raises:
        ValueError: fewer than two runs.
    """
    num_runs = len(tables)
    if num_runs < 2:
        raise ValueError(f"{num_runs} runs; two are picked among at least two")
    means = halves.mean(axis=0)
    pairs = [(i, j) for i in range(num_runs) for j in range(i + 1, num_runs)]
    expected = [float(np.maximum(halves[:, i], halves[:, j]).mean()) for i, j in pairs]
    best = int(np.argmax(expected))
    first, second = sorted(pairs[best], key=lambda run: -means[run])
    right = [predicted_answers(tables[run]) == answers for run in (first, second)]
    varies = all(0 < each.mean() < 1 for each in right)
    return PickedTwo(
        first,
        second,
        expected[best],
        float(means.max()),
        float(np.corrcoef(right[0], right[1])[0, 1]) if varies else None,
        float(np.mean(predicted_answers(tables[first]) != predicted_answers(tables[second]))),
    )


def say_pick(pick: PickedTwo, names: Sequence[str]) -> str:
    """Which two, and why, in two sentences."""
    gain = round(pick.expected - pick.alone, 3) + 0.0  # as printed, and never -0.000
    together = (
        "" if pick.correlation is None else f", their right and wrong answers correlate by {pick.correlation:+.2f}"
    )
    worth = "so the second is a real second chance" if gain >= 0.005 else "so the second adds next to nothing"
    return (
        f"select {names[pick.first]} and {names[pick.second]}: the better of the two is expected at {pick.expected:.3f} on a private "
        f"half, the best alone at {pick.alone:.3f} ({gain:+.3f}). They answer {pick.changes:.1%} of the questions "
        f"differently{together}; {worth}."
    )
