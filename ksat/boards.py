"""Who is ahead on a leaderboard if somebody is here, and which two submissions to select for the end.

The labelled rows at hand are a sample. The half of a board is drawn in two steps: first what the runs are truly worth, as far as
these rows tell (a Bayesian bootstrap over passages: Rubin 1981, https://doi.org/10.1214/aos/1176345338), then the half from there.

Such a bootstrap knows no passage but those at hand: where all of the few that two runs answer otherwise speak for one of them, it never
draws the other ahead. So one more passage is drawn along, not seen yet, and speaks against whoever of two is ahead. On a half without end
that gives what McNemar's exact test gives: the chance is 1 - p / 2.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ksat.metrics import macro_f1_scores, sum_by_group
from ksat.predictions import FloatArray, IntArray, predicted_answers
from ksat.questions import MAX_CHOICES

NUM_DRAWS = 4000
_ROUNDING = 1e-12  # scores closer than that are a tie
_HITS = slice(None, None, MAX_CHOICES + 1)  # of 25 confusion counts those where the prediction is the gold answer


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
        passages: (M, G, 25) confusion counts (gold, predicted) of every run on every passage at hand.
        seen: (draws, M, 25) the same of a half's passages that are among them.
        unseen: (draws,) how often a half holds the passage that is not.
    """

    accuracy: Scores
    macro_f1: Scores
    passages: FloatArray
    seen: FloatArray
    unseen: IntArray


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
    found: list[list[FloatArray]] = [[], []]
    parts: list[tuple[FloatArray, IntArray]] = []
    for size in _parts(num_groups):
        shares = rng.dirichlet(np.ones(num_groups), size=size)  # (B, G)
        share = rng.beta(
            1, num_groups, size=size
        )  # of the unseen passage, so that it and theirs are Dirichlet(1, ..., 1)
        unseen = rng.binomial(num_drawn, share)
        seen = rng.multinomial(num_drawn - unseen, shares)
        half = seen + rng.multinomial(unseen, shares)  # scores of single runs are about the passages at hand alone
        parts.append((_confusion(seen, sums), unseen))
        for scores, times in zip(found, (shares, half), strict=True):
            confusion = _confusion(times, sums)
            scores.append(np.stack([measure(confusion) for measure in _MEASURES]))
    accuracy, macro_f1 = (Scores(*(np.concatenate([part[i] for part in each]) for each in found)) for i in range(2))
    return Boards(accuracy, macro_f1, sums, *(np.concatenate(each) for each in zip(*parts, strict=True)))


def _confusion(times: NDArray[Any], sums: FloatArray) -> FloatArray:
    """(B, M, 25) confusion counts where every passage of sums (M, G, 25) is taken `times` (B, G) often."""
    return np.asarray(np.einsum("bg,mgc->bmc", times.astype(np.float64), sums, optimize=True))


def _accuracies(confusion: FloatArray) -> FloatArray:
    """(B, M) of confusion counts (B, M, 25)."""
    return np.asarray(confusion[..., _HITS].sum(axis=-1) / confusion.sum(axis=-1))


def _macro_f1(confusion: FloatArray) -> FloatArray:
    """(B, M) of confusion counts (B, M, 25)."""
    return macro_f1_scores(confusion.reshape(-1, MAX_CHOICES, MAX_CHOICES)).reshape(confusion.shape[:-1])


_MEASURES = (_accuracies, _macro_f1)


def _parts(num_groups: int) -> Iterator[int]:
    left = NUM_DRAWS
    while left:
        part = min(left, max(1, 4_000_000 // num_groups))
        yield part
        left -= part


def ahead_again(boards: Boards, one: int, other: int) -> tuple[float, float]:
    """The chances, by accuracy and by macro F1, that `one` is ahead of `other` on the half of a board; a tie there counts half.

    Whoever is ahead on the rows at hand gets 0.5 at least; both get 0.5 where neither is.

    Args:
        boards: drawn.
        one: index of a run.
        other: index of another.
    """
    by_accuracy, by_macro_f1 = (_ahead(boards, one, other, measure) for measure in _MEASURES)
    return by_accuracy, by_macro_f1


def _ahead(boards: Boards, one: int, other: int, measure: Callable[[FloatArray], FloatArray]) -> float:
    passages = boards.passages[[one, other]]  # (2, G, 25)
    lead = _leads(passages.sum(axis=1)[None], measure)[0]
    if abs(lead) <= _ROUNDING:
        return 0.5
    if lead < 0:
        return 1 - _ahead(boards, other, one, measure)
    # The unseen passage is like those that the one ahead answers better, with the two runs exchanged.
    apart = passages[0] - passages[1]
    speaks = apart[:, _HITS].sum(axis=1) > 0
    if not speaks.any():  # ahead by macro F1 alone
        speaks = apart.any(axis=1)
    against = passages[::-1, speaks].mean(axis=1)  # (2, 25)
    leads = _leads(boards.seen[:, [one, other]] + boards.unseen[:, None, None] * against, measure)
    return max(0.5, float(np.mean(leads > _ROUNDING) + np.mean(np.abs(leads) <= _ROUNDING) / 2))


def _leads(confusion: FloatArray, measure: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """(B,) by how much the first of two runs is ahead, by confusion counts (B, 2, 25)."""
    scores = measure(confusion)
    return np.asarray(scores[:, 0] - scores[:, 1])


def ahead_again_if_equal(num_questions: int, half: int) -> float:
    """What ahead_again gives the better of two equally good runs on average, 0.5 to 1, at most: the figure that says nothing.

    The gap seen on the rows at hand is chance, but the boards are drawn around it. In squared standard errors of the rows it has
    variance 1, and the half's gap 1 from it, 1 of the drawn truth around it, and num_questions / half of its own. The two correlate
    by r = 1 / sqrt(2 + num_questions / half), and have one sign with probability 1/2 + arcsin(r) / pi (Sheppard 1899). Runs that seldom
    differ get less, since the unseen passage weighs more among few.

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
