"""Who is ahead on a leaderboard if somebody is here, and which two submissions to select for the end.

The labelled rows at hand are a sample. The half of a board is drawn in two steps: first what the runs are truly worth, as far as
these rows tell (a Bayesian bootstrap over passages: Rubin 1981, https://doi.org/10.1214/aos/1176345338), then the half from there.
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
class Scores:
    """Scores of M runs on drawn boards, each (draws, M).

    Attributes:
        true: on the whole population that was drawn.
        half: on the half of a board from it, public or private.
    """

    true: FloatArray
    half: FloatArray


@dataclass(frozen=True, slots=True)
class Boards:
    """Drawn boards by both scores.

    Attributes:
        accuracy: share of right answers.
        macro_f1: mean F1 of the answers.
    """

    accuracy: Scores
    macro_f1: Scores


def draw_boards(
    tables: Sequence[FloatArray], answers: IntArray, groups: Sequence[str], *, num_questions: int, seed: int = 0
) -> Boards:
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
    rng = np.random.default_rng(seed)
    found: list[list[tuple[FloatArray, FloatArray]]] = [[], []]
    for size in _parts(num_groups):
        shares = rng.dirichlet(np.ones(num_groups), size=size)  # (B, G)
        half = rng.multinomial(num_drawn, shares).astype(np.float64)
        for scores, times in zip(found, (shares, half), strict=True):
            confusion = np.einsum("bg,mgc->bmc", times, sums, optimize=True)  # (B, M, 25)
            square = confusion.reshape(-1, MAX_CHOICES, MAX_CHOICES)
            hits = np.trace(square, axis1=1, axis2=2) / square.sum(axis=(1, 2))
            shape = (size, len(tables))
            scores.append((hits.reshape(shape), macro_f1_scores(square).reshape(shape)))
    accuracy, macro_f1 = (Scores(*(np.concatenate([part[i] for part in each]) for each in found)) for i in range(2))
    return Boards(accuracy, macro_f1)


def _parts(num_groups: int) -> Iterator[int]:
    left = NUM_DRAWS
    while left:
        part = min(left, max(1, 4_000_000 // num_groups))
        yield part
        left -= part


def ahead_again(scores: Scores, better: int, worse: int) -> float:
    """The chance that who is ahead on the rows at hand is ahead on the half of a board as well; a tie there counts half.

    Args:
        scores: of the runs on drawn boards.
        better: index of the one.
        worse: index of the other.
    """
    difference = scores.half[:, better] - scores.half[:, worse]
    return float(np.mean(difference > _ROUNDING) + np.mean(np.abs(difference) <= _ROUNDING) / 2)


def ahead_again_if_equal(num_questions: int, half: int) -> float:
    """What ahead_again gives the better of two equally good runs on average, 0.5 to 1: the figure that says nothing.

    The gap seen on the rows at hand is chance, but the boards are drawn around it. In squared standard errors of the rows it has
    variance 1, and the half's gap 1 from it, 1 of the drawn truth around it, and num_questions / half of its own. The two correlate
    by r = 1 / sqrt(2 + num_questions / half), and have one sign with probability 1/2 + arcsin(r) / pi (Sheppard 1899). Ties are left
    out, which makes it a little too high where the runs seldom differ.

    Args:
        num_questions: compared.
        half: questions in a half.
    """
    return 0.5 + math.asin(1 / math.sqrt(2 + num_questions / half)) / math.pi


@dataclass(frozen=True, slots=True)
class PickedTwo:
    """Two submissions for the end.

    Attributes:
        first: index of the better one.
        second: index of the other.
        expected: mean of the better of the two on a private half, the scores shrunk.
        alone: the same of the best single one.
        kept: share of the runs' differences that shrinking keeps, 0 (chance explains all of them) to 1.
        correlation: of the two's right and wrong answers, -1 to 1; None if one is always right or always wrong.
        changes: share of the questions that the two answer differently.
    """

    first: int
    second: int
    expected: float
    alone: float
    kept: float
    correlation: float | None
    changes: float


def pick_two(tables: Sequence[FloatArray], answers: IntArray, scores: Scores) -> PickedTwo:
    """The pair whose better one scores best on a private half, on average: good ones that err on different questions.

    The best of many looks better than it is. So the scores seen are drawn towards their mean by the share of their variance that
    chance explains (empirical Bayes: Efron and Morris 1975, https://doi.org/10.1080/01621459.1975.10479864).

    Args:
        tables: (N, 5) of at least two runs.
        answers: (N,) gold answers, counted from 1.
        scores: of the runs on drawn boards.

    Raises:
        ValueError: fewer than two runs.
    """
    num_runs = len(tables)
    if num_runs < 2:
        raise ValueError(f"{num_runs} runs; two are picked among at least two")
    seen = scores.true.mean(axis=0)
    apart = scores.true - scores.true.mean(axis=1, keepdims=True)
    by_chance, spread = float(apart.var(axis=0).sum() / (num_runs - 1)), float(seen.var(ddof=1))
    kept = max(0.0, 1 - by_chance / spread) if spread > _ROUNDING else 0.0
    means = seen.mean() + kept * (seen - seen.mean())
    drawn = means + scores.half - scores.true
    pairs = [(i, j) for i in range(num_runs) for j in range(i + 1, num_runs)]
    expected = [float(np.maximum(drawn[:, i], drawn[:, j]).mean()) for i, j in pairs]
    best = int(np.argmax(expected))
    first, second = sorted(pairs[best], key=lambda run: -seen[run])
    right = [predicted_answers(tables[run]) == answers for run in (first, second)]
    varies = all(0 < each.mean() < 1 for each in right)
    return PickedTwo(
        first,
        second,
        expected[best],
        float(means.max()),
        kept,
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
        f"differently{together}; {worth}. Chance explains {1 - pick.kept:.0%} of how far the runs lie apart: their scores are drawn "
        "towards their mean by that much."
    )
