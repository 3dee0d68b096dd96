"""A blend fitted on out-of-fold files: what it is, whether it is worth it, and the file that --apply reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ksat.calibration import Calibration, calibrate, draw_reliability, format_calibrations
from ksat.errors import InputError
from ksat.files import Outputs, read_json, text_writer, to_json
from ksat.fitted_blend import FittedBlend, from_dict
from ksat.fitting import METHODS, WORTH_IT, NestedGain, equal_blend, nested_gain
from ksat.metrics import Metrics, baseline_metrics, compute_metrics, format_difference, format_table
from ksat.predictions import FloatArray, IntArray, count_choices
from ksat.provenance import provenance_from_dict, read_provenance, require_order


@dataclass(frozen=True, slots=True)
class BlendFit:
    """What was fitted, and what it was found to be worth.

    Attributes:
        files: of the members, in order.
        equal: equal weights in the pool that fits, with temperatures fitted to all rows.
        fitted: temperatures and weights by the best method, fitted to all rows.
        gain: over equal weights, on rows not fitted to.
        figures: of guesses that read nothing, of the members, then of equal weights and of every method on rows not fitted to.
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
    figures = baseline_metrics(count_choices(tables[0]), answers, groups)
    figures += [(name, compute_metrics(table, answers, groups)) for name, table in [*named, *fitted]]
    named.append((f"fitted, {gain.method}", gain.fitted))
    calibrations = tuple((name, calibrate(table, answers)) for name, table in named)
    blends = equal_blend(tables, answers), METHODS[gain.method](tables, answers)
    return BlendFit(tuple(files), *blends, gain, tuple(figures), calibrations)


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
    members = [read_provenance(file).to_dict() for file in fit.files]
    recommended = "fitted" if fit.is_worth_it else "equal"
    value = {**blends, "recommended": recommended, "gain": fit.gain.to_dict(), "members": members}
    name, calibration = fit.calibrations[-1 if fit.is_worth_it else -2]
    curves = [("as blended", calibration.before), (f"at temperature {calibration.temperature:.2f}", calibration.after)]
    title = f"{name}, {len(fit.files)} members, out of fold"
    outputs.write([lambda path: draw_reliability(path, curves, title=title), text_writer(to_json(value))])


def read_fit(path: Path, files: Sequence[Path], *, as_fitted: bool) -> FittedBlend:
    """The blend that --fit recommends, or the fitted one.

    Args:
        path: of NAME.blend.json.
        files: to blend; they take the places of --fit's, in order.
        as_fitted: the fitted weights even where equal ones are recommended.

    Raises:
        InputError: no such file, not one of --fit's, for another number of members, or for members in another order.
    """
    value = read_json(path)
    names = {"fitted", "equal", "recommended", "gain", "members"}
    if set(value) != names or value["recommended"] not in ("fitted", "equal"):
        raise InputError(f"{path}: not a file that ensemble.py --fit of this version wrote; fit the blend again")
    chosen = "fitted" if as_fitted else value["recommended"]
    if not isinstance(value[chosen], dict):
        raise InputError(f"{path}: {chosen!r} is no object; fit the blend again")
    fitted, fitted_files = from_dict(value[chosen], path)
    if len(fitted_files) != len(files):
        raise InputError(
            f"{path} was fitted to {len(fitted_files)} members ({', '.join(fitted_files)}), {len(files)} are given; give one file for "
            "each, in that order"
        )
    if not isinstance(value["members"], list) or len(value["members"]) != len(fitted_files):
        raise InputError(f"{path}: 'members' must be a list of {len(fitted_files)}; fit the blend again")
    require_order([provenance_from_dict(each, path) for each in value["members"]], fitted_files, files)
    print(f"{path}: {chosen} weights, for {', '.join(fitted_files)} in this order")
    return fitted
