"""A blend fitted on out-of-fold files: what it is, whether it is worth it, and the file that --apply reads."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ksat.calibration import Calibration, calibrate, draw_reliability, format_calibrations
from ksat.errors import InputError
from ksat.files import Outputs, read_json, text_writer, to_json
from ksat.fitted_blend import FittedBlend, Pool, from_dict
from ksat.fitting import NestedGain, fit_blend, greedy_blend, nested_gain
from ksat.metrics import Metrics, compute_metrics, format_difference, format_table
from ksat.predictions import FloatArray, IntArray

WORTH_IT = "worth it"


@dataclass(frozen=True, slots=True)
class BlendFit:
    """What was fitted, and what it was found to be worth.

    Attributes:
        files: of the members, in order.
        fitted: temperatures and weights, on all rows.
        gain: over equal weights, on rows not fitted to.
        figures: of the members, then of equal and of fitted weights on rows not fitted to.
        calibrations: of the members and of the blend of the held-out rows.
    """

    files: tuple[Path, ...]
    fitted: FittedBlend
    gain: NestedGain
    figures: tuple[tuple[str, Metrics], ...]
    calibrations: tuple[tuple[str, Calibration], ...]

    @property
    def equal(self) -> FittedBlend:
        """The members at the same temperatures with equal weights."""
        return replace(self.fitted, weights=(1 / len(self.files),) * len(self.files))

    @property
    def is_worth_it(self) -> bool:
        return self.gain.verdict == WORTH_IT


def fit_members(
    files: Sequence[Path],
    tables: Sequence[FloatArray],
    answers: IntArray,
    groups: Sequence[str],
    *,
    pool: Pool,
    greedy: bool,
) -> BlendFit:
    """Fits on all rows, and judges on rows not fitted to.

    Args:
        files: of the members.
        tables: (N, 5) of each, rows of the same questions, NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        groups: (N,) passage keys.
        pool: "linear" or "log".
        greedy: forward selection instead of the least log loss.

    Raises:
        InputError: fewer passages than folds of the judgement.
    """
    gain = nested_gain(tables, answers, groups, method="greedy" if greedy else "weights", pool=pool)
    fitted = (greedy_blend if greedy else fit_blend)(tables, answers, pool=pool)
    named = [*((str(file), table) for file, table in zip(files, tables, strict=True)), ("equal weights", gain.equal)]
    named.append(("fitted weights", gain.fitted))
    figures = tuple((name, compute_metrics(table, answers, groups)) for name, table in named)
    calibrations = tuple((name, calibrate(table, answers)) for name, table in named)
    return BlendFit(tuple(files), fitted, gain, figures, calibrations)


def format_fit(fit: BlendFit) -> str:
    """For the terminal: figures, calibration, the gain and the verdict."""
    rows = zip(fit.files, fit.fitted.weights, fit.fitted.temperatures, strict=True)
    lines = [f"{file}: weight {weight:.3f}, temperature {temperature:.2f}" for file, weight, temperature in rows]
    moved = [max(weights) - min(weights) for weights in zip(*fit.gain.fold_weights, strict=True)]
    judged = "fitted minus equal weights, each row by a blend that was not fitted to its passage:"
    recommended = "the fitted weights" if fit.is_worth_it else "equal weights, at the fitted temperatures"
    return "\n".join([
        format_table(fit.figures),
        "",
        format_calibrations(fit.calibrations),
        "",
        *lines,
        f"over the folds the weights move by up to {max(moved):.3f}",
        judged,
        format_difference("gain", fit.gain.difference),
        f"verdict: {fit.gain.verdict}; --apply takes {recommended}",
    ])  # fmt: skip


def write_fit(outputs: Outputs, fit: BlendFit) -> None:
    """Writes the reliability of the blend as NAME.blend.png and, last, NAME.blend.json.

    Args:
        outputs: the picture and the file, claimed.
        fit: what to write.
    """
    names = [str(file) for file in fit.files]
    blends = {"fitted": fit.fitted.to_dict(names), "equal": fit.equal.to_dict(names)}
    value = {**blends, "recommended": "fitted" if fit.is_worth_it else "equal", "gain": fit.gain.to_dict()}
    name, calibration = fit.calibrations[-1 if fit.is_worth_it else -2]
    curves = [("as blended", calibration.before), (f"at temperature {calibration.temperature:.2f}", calibration.after)]
    title = f"{name}, {len(fit.files)} members, out of fold"
    outputs.write([lambda path: draw_reliability(path, curves, title=title), text_writer(to_json(value))])


def read_fit(path: Path, num_members: int, *, as_fitted: bool) -> FittedBlend:
    """The blend that --fit recommends, or the fitted one.

    Args:
        path: of NAME.blend.json.
        num_members: files to blend; they take the places of --fit's, in order.
        as_fitted: the fitted weights even where equal ones are recommended.

    Raises:
        InputError: no such file, not one of --fit's, or for another number of members.
    """
    value = read_json(path)
    if set(value) != {"fitted", "equal", "recommended", "gain"} or value["recommended"] not in ("fitted", "equal"):
        raise InputError(f"{path}: not a file that ensemble.py --fit wrote; fit the blend again")
    chosen = "fitted" if as_fitted else value["recommended"]
    if not isinstance(value[chosen], dict):
        raise InputError(f"{path}: {chosen!r} is no object; fit the blend again")
    fitted, files = from_dict(value[chosen], path)
    if len(files) != num_members:
        raise InputError(
            f"{path} was fitted to {len(files)} members ({', '.join(files)}), {num_members} are given; give one file for each, in "
            "that order"
        )
    print(f"{path}: {chosen} weights, for {', '.join(files)} in this order")
    return fitted
