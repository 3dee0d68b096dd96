"""A blend fitted on out-of-fold files: what it is, whether it is worth it, and the file that --apply reads."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ksat.calibration import Calibration, calibrate, draw_reliability, format_calibrations
from ksat.errors import InputError
from ksat.files import Outputs, named_twice, read_json, text_writer, to_json
from ksat.fitted_blend import FittedBlend, from_dict
from ksat.fitting import METHODS, WORTH_IT, NestedGain, equal_blend, nested_gain
from ksat.metrics import Metrics, compute_metrics, format_difference, format_table
from ksat.predictions import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class BlendFit:
    """What was fitted, and what it was found to be worth.

    Attributes:
        files: of the members, in order.
        equal: equal weights in the log pool, with temperatures fitted to all rows.
        fitted: temperatures and weights by the best method, fitted to all rows.
        gain: over equal weights, on rows not fitted to.
        figures: of the members, then of equal weights and of every method on rows not fitted to.
        calibrations: of the members, and of equal weights and the best method on rows not fitted to.
    """

    files: tuple[Path, ...]
    equal: FittedBlend
    fitted: FittedBlend
    gain: NestedGain
    figures: tuple[tuple[str, Metrics], ...]
    calibrations: tuple[tuple[str, Calibration], ...]

    @property
    def is_worth_it(self) -> bool:
        return self.gain.verdict == WORTH_IT


def require_out_of_fold(files: Sequence[Path]) -> None:
    """Sees to it by the reports beside them that no member was trained on the rows that it scored; warns of those that tell nothing.

    Raises:
        InputError: one was, or a file is named twice.
    """
    if twice := named_twice(files):
        raise InputError(f"--fit: {twice[0]} is {twice[1]} again: a member counts once; leave one out")
    for file in files:
        report = file.with_suffix(".json")
        about = read_json(report) if report.exists() else {}
        if about.get("out_of_fold") is True or (about.get("adapter_sha256", "") is None and "base" in about):
            continue  # an untuned base was trained on none of our rows
        trained_on = about.get("data")
        if not isinstance(trained_on, list):
            print(
                f"warning: {file} has no report that says whether its rows were held out: a blend fitted to rows that a member was trained "
                "on trusts it too much",
                file=sys.stderr,
            )
        elif about.get("test_sha256") in [entry.get("sha256") for entry in trained_on if isinstance(entry, dict)]:
            raise InputError(
                f"--fit: {file} was scored by a run that was trained on {about.get('test')}, so that it looks better than it is; take "
                "out-of-fold rows: train.py --folds F --all writes them"
            )


def fit_members(
    files: Sequence[Path],
    tables: Sequence[FloatArray],
    answers: IntArray,
    groups: Sequence[str],
) -> BlendFit:
    """Fits on all rows by the method that is best on rows not fitted to, and judges it there.

    Args:
        files: of the members.
        tables: (N, 5) of each, rows of the same questions, NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        groups: (N,) passage keys.

    Raises:
        InputError: fewer passages than folds of the judgement.
    """
    gain = nested_gain(tables, answers, groups)
    named = [*((str(file), table) for file, table in zip(files, tables, strict=True)), ("equal weights", gain.equal)]
    fitted = [(f"fitted, {name}", table) for name, table in gain.tables.items()]
    figures = tuple((name, compute_metrics(table, answers, groups)) for name, table in [*named, *fitted])
    named.append((f"fitted, {gain.method}", gain.fitted))
    calibrations = tuple((name, calibrate(table, answers)) for name, table in named)
    blends = equal_blend(tables, answers), METHODS[gain.method](tables, answers)
    return BlendFit(tuple(files), *blends, gain, figures, calibrations)


def format_fit(fit: BlendFit) -> str:
    """For the terminal: figures, calibration, the gain and the verdict."""
    rows = zip(fit.files, fit.fitted.weights, fit.fitted.temperatures, strict=True)
    lines = [f"{file}: weight {weight:.3f}, temperature {temperature:.2f}" for file, weight, temperature in rows]
    moved = [max(weights) - min(weights) for weights in zip(*fit.gain.fold_weights, strict=True)]
    gain = fit.gain
    accuracy, macro_f1, log_loss = gain.optimism
    judged = (
        f"best of {len(gain.tables)} on rows not fitted to: {gain.method}; minus equal weights, less what choosing it makes look too good "
        f"(accuracy {accuracy:+.4f}, macro F1 {macro_f1:+.4f}, log loss {log_loss:+.4f}):"
    )
    recommended = "the fitted weights" if fit.is_worth_it else "equal weights, at the fitted temperatures"
    return "\n".join([
        format_table(fit.figures),
        "",
        format_calibrations(fit.calibrations),
        "",
        *lines,
        f"their {gain.method} blend: temperature {fit.fitted.temperature:.2f} after pooling",
        f"over the folds the weights move by up to {max(moved):.3f}",
        judged,
        format_difference("gain", gain.difference),
        f"{gain.num_changed} of {len(gain.equal)} answers change",
        f"verdict: {gain.verdict}; --apply takes {recommended}",
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
