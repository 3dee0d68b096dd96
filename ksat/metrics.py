"""How good probabilities are: accuracy, macro F1 and log loss with 95 % intervals, beside guesses that read nothing.

Questions of one passage stand or fall together, so every interval resamples passages and not rows (a cluster bootstrap
with percentile intervals: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; Cameron, Gelbach &
Miller, https://doi.org/10.1162/rest.90.3.414, on clusters).

Macro F1 is the mean of the labels' F1 over those of the labels 1 to 5 that occur among the answers or the predictions:
a label that occurs in neither has no F1, and counts neither as 0 nor as 1.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ksat.predictions import FloatArray, IntArray, count_choices, predicted_answers
from ksat.questions import MAX_CHOICES
from ksat.tables import markdown_table

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST_PASSAGES = 30  # below that a bootstrap of passages is too narrow, and accuracy gets a Wilson interval
SMALLEST_PROB = 1e-15  # log loss of an answer held impossible: 34.5 nats and not infinity
_NORMAL_QUANTILE = 1.959963984540054  # two-sided 95 %
_CELLS_AT_ONCE = 4_000_000  # resamples x passages held in memory: 32 MB
_LABELS = MAX_CHOICES
_CHOICES = 500  # resamples on which a best table is chosen
SCALE_RANGE = 0.01, 1000.0  # where fit_scale searches
UNIFORM, MOST_FREQUENT = "uniform guess", "most frequent position"  # in tables, the baselines that read nothing
POSITION_FOLDS = 5  # in which the most frequent position is counted where no training rows are known


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; None where it has none (an expectation)."""

    value: float
    low: float | None = None
    high: float | None = None

    def less(self, amount: float) -> "Estimate":
        """With so much taken off the figure and its interval."""
        low, high = (None if end is None else end - amount for end in (self.low, self.high))
        return Estimate(self.value - amount, low, high)

    def to_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Metrics:
    """What a table of probabilities is worth.

    Attributes:
        num_questions: rows.
        num_groups: passages, the unit that the intervals resample.
        accuracy: 0 to 1.
        macro_f1: 0 to 1, over the labels that occur.
        log_loss: nats a question; None where there are no probabilities of its own (label-only predictions).
        accuracy_interval: "bootstrap"; "wilson" for an accuracy of 0 or 1 or fewer than 30 passages, each counted
            as one independent row; "none" for an expectation.
    """

    num_questions: int
    num_groups: int
    accuracy: Estimate
    macro_f1: Estimate
    log_loss: Estimate | None
    accuracy_interval: str = "bootstrap"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, None where there is none."""
        return {
            "num_questions": self.num_questions,
            "num_groups": self.num_groups,
            "accuracy": self.accuracy.to_dict(),
            "macro_f1": self.macro_f1.to_dict(),
            "log_loss": self.log_loss.to_dict() if self.log_loss else None,
            "accuracy_interval": self.accuracy_interval,
        }


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """a minus b on the same questions: accuracy and macro F1 above 0 and log loss below 0 speak for a."""

    num_questions: int
    num_groups: int
    accuracy: Estimate
    macro_f1: Estimate
    log_loss: Estimate

    def less(self, accuracy: float, macro_f1: float, log_loss: float) -> "PairedDifference":
        """With so much taken off each figure and its interval."""
        return replace(
            self,
            accuracy=self.accuracy.less(accuracy),
            macro_f1=self.macro_f1.less(macro_f1),
            log_loss=self.log_loss.less(log_loss),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "num_questions": self.num_questions,
            "num_groups": self.num_groups,
            "accuracy": self.accuracy.to_dict(),
            "macro_f1": self.macro_f1.to_dict(),
            "log_loss": self.log_loss.to_dict(),
        }


def compute_metrics(probs: FloatArray, answers: IntArray, groups: Sequence[str], *, seed: int = 0) -> Metrics:
    """Accuracy, macro F1 and log loss, each with a 95 % interval.

    Args:
        probs: (N, 5), NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        groups: (N,) what a question shares with those that stand or fall with it: its passage's key.
        seed: of the bootstrap.

    Raises:
        ValueError: no rows, lengths that differ, or an answer that its row's choices do not reach.
    """
    from sklearn.metrics import f1_score  # a second to import

    _require_rows(probs, answers, groups)
    predicted, losses = predicted_answers(probs), row_log_losses(probs, answers)
    labels = np.union1d(answers, predicted)
    accuracy = float(np.mean(predicted == answers))
    macro_f1 = float(f1_score(answers, predicted, labels=labels, average="macro"))

    sums = sum_by_group(np.column_stack([_confusion_cells(answers, predicted), losses]), groups)  # (G, 26)
    resampled = np.concatenate(list(_resampled_sums(sums, seed)))  # (resamples, 26)
    confusion = resampled[:, :-1].reshape(-1, _LABELS, _LABELS)
    counts = confusion.sum(axis=(1, 2))
    accuracies = np.trace(confusion, axis1=1, axis2=2) / counts
    interval, kind = _percentiles(accuracies), "bootstrap"
    if accuracy in (0.0, 1.0) or len(sums) < FEWEST_PASSAGES or interval[0] == interval[1]:
        interval, kind = wilson_interval(accuracy, len(sums)), "wilson"
    return Metrics(
        num_questions=len(answers),
        num_groups=len(sums),
        accuracy=Estimate(accuracy, *interval),
        macro_f1=Estimate(macro_f1, *_percentiles(macro_f1_scores(confusion))),
        log_loss=Estimate(float(losses.mean()), *_percentiles(resampled[:, -1] / counts)),
        accuracy_interval=kind,
    )


def _confusion_cells(answers: IntArray, predicted: IntArray) -> FloatArray:
    """(N, 25) with 1 at each row's cell of the confusion matrix (gold, predicted)."""
    cells: FloatArray = np.eye(_LABELS * _LABELS)[(answers - 1) * _LABELS + predicted - 1]
    return cells


def row_log_losses(probs: FloatArray, answers: IntArray) -> FloatArray:
    """(N,) minus the log probability of each row's gold answer, in nats; a probability counts as at least 1e-15.

    Raises:
        ValueError: an answer that its row's choices do not reach.
    """
    gold: FloatArray = probs[np.arange(len(answers)), answers - 1]
    if np.isnan(gold).any():
        raise ValueError(f"row {int(np.argmax(np.isnan(gold)))}: the answer is not among the row's choices")
    losses: FloatArray = -np.log(np.clip(gold, SMALLEST_PROB, 1.0))
    return losses


def random_baseline(num_choices: IntArray, answers: IntArray, *, seed: int = 0) -> Metrics:
    """What a uniform guess among each row's own choices is worth, on average; figures without an interval.

    Accuracy, mean(1/K), and log loss, mean(log K), are exact. Macro F1 has no closed form: it is the mean over 2,000
    seeded guesses of the whole file (standard error about 0.001 at 100 rows).

    Args:
        num_choices: (N,) the number of choices K of each row.
        answers: (N,) gold answers, counted from 1.
        seed: of the guesses.

    Raises:
        ValueError: no rows, or lengths that differ.
    """
    if not len(answers) or len(answers) != len(num_choices):
        raise ValueError(f"{len(num_choices)} rows and {len(answers)} answers; expected as many, and at least one")
    rng = np.random.default_rng(seed)
    scores = []
    for num_guesses in _chunks(len(answers)):
        guesses = np.floor(rng.random((num_guesses, len(answers))) * num_choices).astype(np.int64)
        offsets = np.arange(num_guesses)[:, None] * _LABELS * _LABELS
        cells = (offsets + (answers - 1) * _LABELS + guesses).ravel()
        counted = np.bincount(cells, minlength=num_guesses * _LABELS * _LABELS)
        scores.append(macro_f1_scores(counted.reshape(num_guesses, _LABELS, _LABELS).astype(np.float64)))
    return Metrics(
        num_questions=len(answers),
        num_groups=len(answers),
        accuracy=Estimate(float(np.mean(1 / num_choices))),
        macro_f1=Estimate(float(np.concatenate(scores).mean())),
        log_loss=Estimate(float(np.mean(np.log(num_choices)))),
        accuracy_interval="none",
    )


def count_positions(num_choices: IntArray, answers: IntArray) -> dict[str, list[int]]:
    """How often each position is right, by number of choices; its keys are text, as JSON has them.

    Args:
        num_choices: (N,) the number of choices of each row.
        answers: (N,) gold answers, counted from 1.
    """
    return {
        str(size): np.bincount(answers[num_choices == size], minlength=size + 1)[1:].tolist()
        for size in np.unique(num_choices).tolist()
    }


def position_probs(positions: Mapping[str, Sequence[int]], num_choices: IntArray) -> FloatArray:
    """(N, 5) what the places of the training rows' answers say about other rows: a baseline that reads nothing.

    Its answer is the most frequent position. Every count is taken one larger, so that no place has a probability of 0.

    Args:
        positions: of count_positions, on the training rows; a number of choices that they lack is guessed uniformly.
        num_choices: (N,) of the rows to answer.
    """
    probs = np.full((len(num_choices), _LABELS), np.nan)
    for size in np.unique(num_choices).tolist():
        counts = np.array(positions.get(str(size), [0] * size)) + 1
        probs[num_choices == size, :size] = counts / counts.sum()
    return probs


def held_out_position_probs(num_choices: IntArray, answers: IntArray, folds: IntArray) -> FloatArray:
    """(N, 5) of position_probs, for the rows of every fold (N,) counted on the rows of the others."""
    probs = np.full((len(answers), _LABELS), np.nan)
    for fold in np.unique(folds):
        own = folds == fold
        probs[own] = position_probs(count_positions(num_choices[~own], answers[~own]), num_choices[own])
    return probs


def position_baseline(
    num_choices: IntArray,
    answers: IntArray,
    groups: Sequence[str],
    positions: Mapping[str, Sequence[int]] | None = None,
) -> FloatArray | None:
    """(N, 5) of position_probs for labelled rows, by the training rows where they are known, else out of fold by these very rows.

    Args:
        num_choices: (N,) of the rows.
        answers: (N,) gold answers, counted from 1.
        groups: (N,) passage keys; a passage lies in one fold.
        positions: of count_positions, on the training rows; None where they are not known.

    Returns:
        None where the training rows are not known and there are fewer passages than folds.
    """
    if positions:
        return position_probs(positions, num_choices)
    if len(set(groups)) < POSITION_FOLDS:
        return None
    from sklearn.model_selection import GroupKFold  # a second to import

    folds = np.zeros(len(answers), dtype=np.int64)
    splitter = GroupKFold(POSITION_FOLDS, shuffle=True, random_state=0)
    for fold, (_, held_out) in enumerate(splitter.split(answers, groups=np.asarray(groups))):
        folds[held_out] = fold
    return held_out_position_probs(num_choices, answers, folds)


def baseline_metrics(
    num_choices: IntArray,
    answers: IntArray,
    groups: Sequence[str],
    positions: Mapping[str, Sequence[int]] | None = None,
) -> list[tuple[str, Metrics]]:
    """The first rows of a table: what guesses that read nothing are worth. For the arguments see position_baseline."""
    rows = [(UNIFORM, random_baseline(num_choices, answers))]
    by_position = position_baseline(num_choices, answers, groups, positions)
    if by_position is not None:
        rows.append((MOST_FREQUENT, compute_metrics(by_position, answers, groups)))
    return rows


def paired_difference(
    probs_a: FloatArray, probs_b: FloatArray, answers: IntArray, groups: Sequence[str], *, seed: int = 0
) -> PairedDifference:
    """Accuracy, macro F1 and log loss of a minus those of b, each with a 95 % interval, on the same questions.

    Args:
        probs_a: (N, 5), NaN where a choice does not exist.
        probs_b: (N, 5), rows as in probs_a.
        answers: (N,) gold answers, counted from 1.
        groups: (N,) passage keys.
        seed: of the bootstrap.

    Raises:
        ValueError: see compute_metrics; or the two differ in a row's number of choices.
    """
    _require_rows(probs_a, answers, groups)
    _require_rows(probs_b, answers, groups)
    if (count_choices(probs_a) != count_choices(probs_b)).any():
        raise ValueError("a and b differ in a row's number of choices: they are not the same questions")
    predicted_a, predicted_b = predicted_answers(probs_a), predicted_answers(probs_b)
    hits = (predicted_a == answers).astype(np.float64) - (predicted_b == answers)
    losses = row_log_losses(probs_a, answers) - row_log_losses(probs_b, answers)
    columns = [
        _confusion_cells(answers, predicted_a),
        _confusion_cells(answers, predicted_b),
        hits,
        losses,
        np.ones(len(answers)),
    ]
    sums = sum_by_group(np.column_stack(columns), groups)
    # The first row is the sample itself.
    resampled = np.concatenate([sums.sum(axis=0, keepdims=True), *_resampled_sums(sums, seed)])
    confusions = resampled[:, : 2 * _LABELS * _LABELS].reshape(-1, 2, _LABELS, _LABELS)
    f1 = macro_f1_scores(confusions[:, 0]) - macro_f1_scores(confusions[:, 1])
    return PairedDifference(
        num_questions=len(answers),
        num_groups=len(sums),
        accuracy=Estimate(float(hits.mean()), *_percentiles(resampled[1:, -3] / resampled[1:, -1])),
        macro_f1=Estimate(float(f1[0]), *_percentiles(f1[1:])),
        log_loss=Estimate(float(losses.mean()), *_percentiles(resampled[1:, -2] / resampled[1:, -1])),
    )


def choice_optimism(
    tables: Sequence[FloatArray], other: FloatArray, answers: IntArray, groups: Sequence[str], *, seed: int = 0
) -> tuple[float, float, float]:
    """By how much the table of least log loss looks better against another one than it is, for being chosen on these rows.

    Passages are drawn with replacement, the best table is chosen on those drawn and judged on those left out; the mean of what is
    found there is what a chosen one is worth (Tsamardinos et al. 2018, https://doi.org/10.1007/s10994-018-5714-4).

    Args:
        tables: (N, 5) each, to choose from.
        other: (N, 5) that the chosen one is compared with.
        answers: (N,) gold answers, counted from 1.
        groups: (N,) passage keys.
        seed: of the bootstrap.

    Returns:
        Of accuracy, macro F1 and log loss, chosen minus other: on all rows less on rows that did not choose. (0, 0, 0) for one table.

    Raises:
        ValueError: see compute_metrics.
    """
    if len(tables) == 1:
        return 0.0, 0.0, 0.0
    columns = [
        np.column_stack([_confusion_cells(answers, predicted_answers(table)), row_log_losses(table, answers)])
        for table in (*tables, other)
    ]
    width = _LABELS * _LABELS + 1
    sums = sum_by_group(np.column_stack(columns), groups)  # (G, (C + 1) * 26)
    rng, found = np.random.default_rng(seed), []
    for _ in range(_CHOICES):
        times = np.bincount(rng.integers(len(sums), size=len(sums)), minlength=len(sums))
        if (times > 0).all():
            continue
        drawn = (times @ sums).reshape(-1, width)
        best = int(np.argmin(drawn[:-1, -1]))
        found.append(_differences((times == 0) @ sums, best))
    whole = sums.sum(axis=0)
    apparent = _differences(whole, int(np.argmin(whole.reshape(-1, width)[:-1, -1])))
    accuracy, macro_f1, log_loss = (apparent - np.mean(found, axis=0)).tolist()
    return accuracy, macro_f1, log_loss


def _differences(sums: FloatArray, best: int) -> FloatArray:
    """(3,) accuracy, macro F1 and log loss of table `best` minus those of the last one, from their sums over rows."""
    pair = sums.reshape(-1, _LABELS * _LABELS + 1)[[best, -1]]
    confusion, losses = pair[:, :-1].reshape(2, _LABELS, _LABELS), pair[:, -1]
    count = confusion[0].sum()
    figures = np.array([np.trace(confusion, axis1=1, axis2=2) / count, macro_f1_scores(confusion), losses / count])
    return np.asarray(figures[:, 0] - figures[:, 1])


def wilson_interval(share: float, num_rows: int) -> tuple[float, float]:
    """The 95 % score interval of a share among independent rows (Wilson, https://doi.org/10.2307/2276774).

    Given the number of passages for num_rows, it holds whatever the questions of one passage have in common.
    """
    z2 = _NORMAL_QUANTILE**2
    middle = (share + z2 / (2 * num_rows)) / (1 + z2 / num_rows)
    half = _NORMAL_QUANTILE / (1 + z2 / num_rows) * np.sqrt(share * (1 - share) / num_rows + z2 / (4 * num_rows**2))
    # The share itself is in it: for 0 and 1 rounding may leave it out by the last bit.
    return min(share, max(0.0, float(middle - half))), max(share, min(1.0, float(middle + half)))


def fit_scale(log_scores: FloatArray, answer_index: IntArray) -> float:
    """The scale s > 0 that minimises the log loss of softmax(s * log_scores) over each row's own choices.

    The log loss is convex in s (a log-sum-exp of functions linear in s, minus a linear one), so it has one minimum; the
    search runs over log s, which keeps that, through SCALE_RANGE, and ends at a bound where the minimum lies beyond.

    Args:
        log_scores: (N, 5) a score of each choice, NaN where it does not exist.
        answer_index: (N,) gold answers, counted from 0.

    Raises:
        ValueError: no rows, an infinite score, or an answer that its row's choices do not reach.
    """
    from scipy.optimize import minimize_scalar

    if not len(answer_index) or np.isinf(log_scores).any():
        raise ValueError("a scale needs at least one row, and finite scores")
    gold = log_scores[np.arange(len(answer_index)), answer_index]
    if np.isnan(gold).any():
        raise ValueError(f"row {int(np.argmax(np.isnan(gold)))}: the answer is not among the row's choices")
    above = np.where(np.isnan(log_scores), -np.inf, log_scores - gold[:, None])  # (N, 5), 0 at the answer

    def log_loss(log_scale: float) -> float:
        return float(np.logaddexp.reduce(np.exp(log_scale) * above, axis=1).mean())

    found = minimize_scalar(log_loss, bounds=tuple(map(np.log, SCALE_RANGE)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def format_table(rows: Sequence[tuple[str, Metrics]]) -> str:
    """A markdown table, one line for each (name, metrics), readable in a terminal; notes below what it needs."""
    header = ["", "n", "accuracy", "macro F1", "log loss"]
    body = [[name, str(m.num_questions), *map(_cell, (m.accuracy, m.macro_f1, m.log_loss))] for name, m in rows]
    for cells, (_, metrics) in zip(body, rows, strict=True):
        cells[2] += " w" if metrics.accuracy_interval == "wilson" else ""
    lines = [markdown_table(header, body)]
    if any(metrics.accuracy_interval == "wilson" for _, metrics in rows):
        lines += ["", f"w: Wilson interval; accuracy is 0 or 1, or there are fewer than {FEWEST_PASSAGES} passages."]
    return "\n".join(lines)


def format_difference(name: str, difference: PairedDifference) -> str:
    """One line: by how much `name` differs, each figure with its 95 % interval."""
    parts = [
        f"{label} {estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
        for label, estimate in (
            ("accuracy", difference.accuracy),
            ("macro F1", difference.macro_f1),
            ("log loss", difference.log_loss),
        )
    ]
    return f"  {name}: {', '.join(parts)}"


def scaled_probs(probs: FloatArray, scale: float) -> FloatArray:
    """(N, 5) the probabilities at another scale: a softmax of scores at scale 1, raised to `scale` and renormalised.

    Args:
        probs: (N, 5) at scale 1, NaN where a choice does not exist.
        scale: factor on the scores, as fit_scale gives it.
    """
    powered = probs**scale
    return np.asarray(powered / np.nansum(powered, axis=1, keepdims=True))


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _require_rows(probs: FloatArray, answers: IntArray, groups: Sequence[str]) -> None:
    if not len(answers) or not len(probs) == len(answers) == len(groups):
        found = f"{len(probs)} rows, {len(answers)} answers and {len(groups)} groups"
        raise ValueError(f"{found}; expected as many of each, and at least one")


def sum_by_group(columns: FloatArray, groups: Sequence[str]) -> FloatArray:
    """(G, C) sums over each group's rows of columns (N, C)."""
    _, group_index = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    sums = np.zeros((int(group_index.max()) + 1, columns.shape[1]))
    np.add.at(sums, group_index, columns)
    return sums


def _resampled_sums(sums: FloatArray, seed: int) -> Iterator[FloatArray]:
    """(resamples, C) sums over groups drawn with replacement from sums (G, C): 2,000 in parts that fit in memory."""
    rng, num_groups = np.random.default_rng(seed), len(sums)
    for num_resamples in _chunks(num_groups):
        drawn = rng.integers(num_groups, size=(num_resamples, num_groups))
        drawn += np.arange(num_resamples)[:, None] * num_groups
        times = np.bincount(drawn.ravel(), minlength=num_resamples * num_groups).reshape(num_resamples, num_groups)
        yield times.astype(np.float64) @ sums


def _chunks(width: int) -> Iterator[int]:
    """2,000 resamples of so many cells each, in parts that fit in memory."""
    left = NUM_RESAMPLES
    while left:
        part = min(left, max(1, _CELLS_AT_ONCE // width))
        yield part
        left -= part


def macro_f1_scores(confusion: FloatArray) -> FloatArray:
    """(B,) macro F1 of confusion counts (B, gold, predicted), over the labels that occur in each."""
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    occurs = confusion.sum(axis=1) + confusion.sum(axis=2)  # twice the hits, plus both kinds of error
    f1 = np.divide(2 * hits, occurs, out=np.zeros_like(hits), where=occurs > 0)
    scores: FloatArray = f1.sum(axis=1) / (occurs > 0).sum(axis=1)
    return scores


def _percentiles(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)
