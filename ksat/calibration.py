"""Does a probability of 0.8 come true in 8 of 10 rows: temperatures, reliability, its expected error, a picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksat.metrics import SMALLEST_PROB, fit_scale, row_log_losses, wilson_interval
from ksat.predictions import FloatArray, IntArray, predicted_answers
from ksat.tables import markdown_table

NUM_BINS = 10
WIDTH, HEIGHT = 6.0, 7.0  # inches
_NO_GAIN = 1e-12  # nats: a flat log loss has its minimum everywhere, and 1 is the temperature that changes nothing


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Rows whose top choice has a probability in (low, high].

    Attributes:
        low: lower edge, not in the bin.
        high: upper edge, in the bin.
        count: rows.
        confidence: mean probability of the top choice; None without rows.
        accuracy: share of the rows whose top choice is the answer; None without rows.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """A table's calibration as it is and at the temperature that fits it.

    The temperature is fitted on the rows that it is judged on: one number, so that "after" is only a little too good.

    Attributes:
        temperature: above 1 for probabilities that are too sure.
        error_before: expected calibration error, 0 to 1.
        error_after: the same at the temperature.
        log_loss_before: nats a question.
        log_loss_after: the same at the temperature.
        before: the bins.
        after: the bins at the temperature.
    """

    temperature: float
    error_before: float
    error_after: float
    log_loss_before: float
    log_loss_after: float
    before: tuple[ReliabilityBin, ...]
    after: tuple[ReliabilityBin, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain numbers, None in a bin without rows."""
        return asdict(self)


def fit_temperature(probs: FloatArray, answers: IntArray) -> float:
    """The temperature T, 0.001 to 100, at which softmax(log(probs) / T) has the least log loss; 1 if none gains.

    Args:
        probs: (N, 5), NaN where a choice does not exist; one below 1e-15 counts as 1e-15.
        answers: (N,) gold answers, counted from 1.

    Raises:
        ValueError: no rows, or an answer that its row's choices do not reach.
    """
    temperature = 1 / fit_scale(np.log(np.maximum(probs, SMALLEST_PROB)), answers - 1)
    as_it_is, fitted = (float(row_log_losses(tempered(probs, t), answers).mean()) for t in (1.0, temperature))
    return temperature if fitted < as_it_is - _NO_GAIN else 1.0


def tempered(probs: FloatArray, temperature: float) -> FloatArray:
    """(N, 5) softmax(log(probs) / temperature) over each row's own choices, NaN beyond; no underflow at any temperature.

    Args:
        probs: (N, 5), NaN where a choice does not exist; one below 1e-15 counts as 1e-15.
        temperature: above 0; above 1 it makes the probabilities less sure.
    """
    scores = np.log(np.maximum(probs, SMALLEST_PROB)) / temperature
    masses = np.exp(scores - np.nanmax(scores, axis=1, keepdims=True))
    return np.asarray(masses / np.nansum(masses, axis=1, keepdims=True))


def reliability(probs: FloatArray, answers: IntArray, num_bins: int = NUM_BINS) -> tuple[ReliabilityBin, ...]:
    """The reliability table of the top choice: bins of equal width from 0 to 1, in order, empty ones too.

    Args:
        probs: (N, 5), NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        num_bins: at least 1.

    Raises:
        ValueError: no rows, not as many answers, or no bins.
    """
    if not len(answers) or len(probs) != len(answers) or num_bins < 1:
        raise ValueError(f"{len(probs)} rows, {len(answers)} answers, {num_bins} bins")
    confidence, hits = np.nanmax(probs, axis=1), predicted_answers(probs) == answers
    edges = np.arange(num_bins + 1) / num_bins  # k / n, and not a multiple of 1 / n: 0.7 is in the bin that ends at 0.7
    index = np.digitize(confidence, edges[1:-1], right=True)
    bins = []
    for number in range(num_bins):
        inside = index == number
        means = (float(confidence[inside].mean()), float(hits[inside].mean())) if inside.any() else (None, None)
        bins.append(ReliabilityBin(float(edges[number]), float(edges[number + 1]), int(inside.sum()), *means))
    return tuple(bins)


def expected_calibration_error(probs: FloatArray, answers: IntArray, num_bins: int = NUM_BINS) -> float:
    """Mean over the rows of their bin's |accuracy - confidence|, 0 to 1 (Naeini et al. 2015, equal-width bins).

    https://doi.org/10.1609/aaai.v29i1.9602, with the top choice's probability as in https://arxiv.org/abs/1706.04599.
    With few rows it is above 0 even for perfect probabilities: a bin's accuracy is noisy, and the noise counts as error.

    Args:
        probs: (N, 5), NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        num_bins: at least 1.

    Raises:
        ValueError: see reliability.
    """
    gaps = [
        bin_.count * abs(bin_.accuracy - bin_.confidence)
        for bin_ in reliability(probs, answers, num_bins)
        if bin_.accuracy is not None and bin_.confidence is not None
    ]
    return sum(gaps) / len(answers)


def calibrate(probs: FloatArray, answers: IntArray) -> Calibration:
    """The calibration of a table before and after the temperature that fits it.

    Args:
        probs: (N, 5), NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.

    Raises:
        ValueError: see fit_temperature.
    """
    temperature = fit_temperature(probs, answers)
    after = tempered(probs, temperature)
    return Calibration(
        temperature=temperature,
        error_before=expected_calibration_error(probs, answers),
        error_after=expected_calibration_error(after, answers),
        log_loss_before=float(row_log_losses(probs, answers).mean()),
        log_loss_after=float(row_log_losses(after, answers).mean()),
        before=reliability(probs, answers),
        after=reliability(after, answers),
    )


def format_calibrations(rows: Sequence[tuple[str, Calibration]]) -> str:
    """A markdown table, one line for each (name, calibration)."""
    header = ["", "temperature", "ECE", "ECE after", "log loss", "log loss after"]
    figures = [
        (c.temperature, c.error_before, c.error_after, c.log_loss_before, c.log_loss_after) for _, c in rows
    ]  # fmt: skip
    body = [[name, *(f"{value:.3f}" for value in row)] for (name, _), row in zip(rows, figures, strict=True)]
    return markdown_table(header, body)


def draw_reliability(path: Path, curves: Sequence[tuple[str, Sequence[ReliabilityBin]]], *, title: str) -> None:
    """Writes a PNG: accuracy over confidence, a curve each with 95 % Wilson intervals, and the rows a bin.

    The intervals count rows as independent; where many share a passage they are a little too narrow.

    Args:
        path: of the file.
        curves: (name, bins), such as before and after the temperature.
        title: above the picture.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    from ksat.picture import use_fonts

    use_fonts()
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(WIDTH, HEIGHT), sharex=True, layout="constrained", gridspec_kw={"height_ratios": [3, 1]}
    )
    top.plot([0, 1], [0, 1], color="gray", linestyle=":", label="calibrated")
    for number, (name, bins) in enumerate(curves):
        _draw_curve(top, bins, name, f"C{number}")
        lows, widths = [bin_.low for bin_ in bins], [(bin_.high - bin_.low) / len(curves) for bin_ in bins]
        lefts = [low + number * width for low, width in zip(lows, widths, strict=True)]
        bottom.bar(lefts, [bin_.count for bin_ in bins], widths, align="edge", color=f"C{number}", alpha=0.7)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy, 95 % interval", title=title)
    bottom.set(xlabel="probability of the top choice", ylabel="rows")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    top.legend(loc="best", frameon=False)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def _draw_curve(axes: Any, bins: Sequence[ReliabilityBin], name: str, color: str) -> None:
    """A point for each bin that has rows, at their mean probability."""
    points = [(b.confidence, b.accuracy, b.count) for b in bins if b.accuracy is not None and b.confidence is not None]
    spans = [wilson_interval(accuracy, count) for _, accuracy, count in points]
    below = [max(0.0, accuracy - low) for (_, accuracy, _), (low, _) in zip(points, spans, strict=True)]
    above = [max(0.0, high - accuracy) for (_, accuracy, _), (_, high) in zip(points, spans, strict=True)]
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    axes.errorbar(xs, ys, yerr=[below, above], fmt="o-", capsize=3, color=color, label=name)
