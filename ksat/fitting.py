"""Temperatures and weights of a blend, fitted to labelled out-of-fold rows, and what they gain on rows not fitted to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ksat.calibration import fit_temperature, tempered
from ksat.errors import InputError
from ksat.fitted_blend import POOLS, FittedBlend, Pool, apply_blend
from ksat.metrics import FEWEST_PASSAGES, SMALLEST_PROB, PairedDifference, paired_difference, row_log_losses
from ksat.predictions import FloatArray, IntArray

Method = Literal["weights", "greedy"]
MOST_PICKS = 50
SMALLEST_GAIN = 0.001  # nats a question: below that nothing shows in the three decimals that are printed
_SAME_LOSS = 1e-12  # nats: closer than that is rounding


@dataclass(frozen=True, slots=True, eq=False)
class NestedGain:
    """What fitted weights gain over equal ones on passages that they were not fitted to.

    Attributes:
        difference: fitted minus equal; log loss below 0 and accuracy above 0 speak for the fitted weights. Its interval
            resamples the passages and not the fits, whose rows the folds share.
        fold_weights: of each fold, (M,): how far they move is how little the rows tell.
        fitted: (N, 5) every row by the blend fitted without its fold.
        equal: (N, 5) the same with equal weights, at the same temperatures.
    """

    difference: PairedDifference
    fold_weights: tuple[tuple[float, ...], ...]
    fitted: FloatArray
    equal: FloatArray

    @property
    def verdict(self) -> str:
        """Whether to take the fitted weights, in words."""
        loss = self.difference.log_loss
        if loss.low is None or loss.high is None or loss.low <= 0 <= loss.high:
            return "not distinguishable from equal weights: take equal weights"
        if self.difference.num_groups < FEWEST_PASSAGES:  # so few make the interval too narrow
            few = f"{self.difference.num_groups} passages, fewer than {FEWEST_PASSAGES}"
            return f"not distinguishable from equal weights with {few}: take equal weights"
        if loss.low > 0:
            return "worse than equal weights: take equal weights"
        if loss.value > -SMALLEST_GAIN:
            return f"gains less than {SMALLEST_GAIN} nats a question: take equal weights"
        return "worth it"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the figures, without the tables."""
        weights = [list(weights) for weights in self.fold_weights]
        return {"verdict": self.verdict, "difference": self.difference.to_dict(), "fold_weights": weights}


def nested_gain(
    tables: Sequence[FloatArray],
    answers: IntArray,
    groups: Sequence[str],
    *,
    method: Method = "weights",
    pool: Pool = "linear",
    num_folds: int = 5,
    seed: int = 0,
) -> NestedGain:
    """What fitted weights gain over equal ones: fitted on the other folds, applied to the held-out one.

    Equal weights get the temperatures fitted on the same other folds, so that only the weights are judged. Where all members
    are equally good, fitted weights lose about (M - 1) / 2N nats a question, N the rows fitted to (what any M - 1 free
    parameters fitted by maximum likelihood cost on new rows; Akaike 1973), and gain as much on the rows fitted to: that
    gain is no evidence. The test of 200 simulated sets measures both.

    Args:
        tables: (N, 5) of each member, rows of the same questions, NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        groups: (N,) passage keys; a passage lies in one fold.
        method: "weights" for fit_blend, "greedy" for greedy_blend.
        pool: "linear" or "log".
        num_folds: 2 or more.
        seed: of the folds and of the bootstrap.

    Raises:
        InputError: fewer passages than folds.
        ValueError: see fit_blend.
    """
    from sklearn.model_selection import GroupKFold

    if len(set(groups)) < num_folds:
        found = f"{len(set(groups))} passages for {num_folds} folds"
        raise InputError(f"{found}: a passage lies in one fold; give more labelled rows")
    fit = {"weights": fit_blend, "greedy": greedy_blend}[method]
    fitted, equal = np.full_like(tables[0], np.nan), np.full_like(tables[0], np.nan)
    fold_weights = []
    splits = GroupKFold(num_folds, shuffle=True, random_state=seed).split(answers, groups=np.asarray(groups))
    for others, held_out in splits:
        blended = fit([table[others] for table in tables], answers[others], pool=pool)
        level = replace(blended, weights=(1 / len(tables),) * len(tables))
        held = [table[held_out] for table in tables]
        fitted[held_out], equal[held_out] = apply_blend(blended, held), apply_blend(level, held)
        fold_weights.append(blended.weights)
    difference = paired_difference(fitted, equal, answers, groups, seed=seed)
    return NestedGain(difference, tuple(fold_weights), fitted, equal)


def fit_blend(tables: Sequence[FloatArray], answers: IntArray, *, pool: Pool = "linear") -> FittedBlend:
    """The blend of least log loss: each member's temperature first, then the weights (fit_weights).

    The members' order changes nothing. On these rows the blend is never worse than equal weights.

    Args:
        tables: (N, 5) of each member, rows of the same questions, NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        pool: "linear" or "log".

    Raises:
        ValueError: no members, an unknown pool, tables of different questions, or see fit_temperature.
    """
    temperatures, scaled = _temper(tables, answers, pool)
    return _fitted(tables, answers, temperatures, fit_weights(scaled, answers, pool=pool), pool)


def fit_weights(tables: Sequence[FloatArray], answers: IntArray, *, pool: Pool = "linear") -> FloatArray:
    """(M,) the weights on the simplex at which the pool of the tables, as they are, has the least log loss.

    Both pools' log loss is convex in the weights (minus the logarithm of a linear function; a log-sum-exp of linear
    ones minus a linear one), so SLSQP reaches the least. Members with the same probabilities share their weight
    equally; equal weights if none gain.

    Args:
        tables: (N, 5) of each member, NaN where a choice does not exist; one below 1e-15 counts as 1e-15.
        answers: (N,) gold answers, counted from 1.
        pool: "linear" or "log".

    Raises:
        ValueError: no members, an unknown pool, or tables of different questions.
    """
    _require_members(tables, pool)
    keys = [np.nan_to_num(table, nan=-1.0).tobytes() for table in tables]
    distinct = sorted(set(keys))  # an order of their own: the members' order changes no bit
    counts = np.array([keys.count(key) for key in distinct])
    objective = _objective([tables[keys.index(key)] for key in distinct], answers, pool)
    equal = counts / len(tables)
    found = _least(objective, equal)
    if objective(found)[0] > objective(equal)[0] - _SAME_LOSS:
        found = equal
    return np.asarray((found / counts)[[distinct.index(key) for key in keys]])


def _least(objective: Callable[[FloatArray], tuple[float, FloatArray]], start: FloatArray) -> FloatArray:
    """The weights on the simplex at which a convex function, given with its gradient, is least."""
    from scipy.optimize import minimize

    if len(start) == 1:
        return start
    total = {"type": "eq", "fun": lambda weights: weights.sum() - 1, "jac": np.ones_like}
    # 300 problems of 2 to 11 members: within 2e-7 nats of the least at 1e-14, within 2e-5 at 1e-10.
    options = {"ftol": 1e-14, "maxiter": 1000}
    bounds = [(0.0, 1.0)] * len(start)
    found = minimize(objective, start, jac=True, method="SLSQP", bounds=bounds, constraints=total, options=options)
    weights = np.clip(found.x, 0, None)
    return np.asarray(weights / weights.sum())


def greedy_blend(tables: Sequence[FloatArray], answers: IntArray, *, pool: Pool = "linear") -> FittedBlend:
    """The blend of forward selection with replacement: the member that leaves the least log loss, pick by pick.

    Of the 50 nested selections the best counts, of equals the smallest (Caruana et al. 2004,
    https://doi.org/10.1145/1015330.1015432); a weight is a member's share of its picks. To end at the first pick that
    gains nothing would often leave the best member alone: a half of another is too much where a tenth would help. Of
    equal members the first is picked. The temperatures are fitted first, as in fit_blend.

    Args:
        tables: (N, 5) of each member, rows of the same questions, NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        pool: "linear" or "log".

    Raises:
        ValueError: see fit_blend.
    """
    temperatures, scaled = _temper(tables, answers, pool)
    objective = _objective(scaled, answers, pool)
    picks, least, weights = np.zeros(len(scaled)), math.inf, np.zeros(len(scaled))
    for number in range(1, MOST_PICKS + 1):
        losses = [objective((picks + one) / number)[0] for one in np.eye(len(scaled))]
        best = next(i for i, loss in enumerate(losses) if loss <= min(losses) + _SAME_LOSS)
        picks[best] += 1
        if losses[best] < least - _SAME_LOSS:
            least, weights = losses[best], picks / number
    return _fitted(tables, answers, temperatures, weights, pool)


def _require_members(tables: Sequence[FloatArray], pool: str) -> None:
    if not tables or pool not in POOLS:
        raise ValueError(f"{len(tables)} members, pool {pool!r}")
    if any(not np.array_equal(np.isnan(table), np.isnan(tables[0])) for table in tables):
        raise ValueError("the members differ in rows or in a row's number of choices: they are not the same questions")


def _temper(tables: Sequence[FloatArray], answers: IntArray, pool: str) -> tuple[tuple[float, ...], list[FloatArray]]:
    """Each member's temperature, and the tables at them."""
    _require_members(tables, pool)
    temperatures = tuple(fit_temperature(table, answers) for table in tables)
    return temperatures, [tempered(table, t) for table, t in zip(tables, temperatures, strict=True)]


def _objective(
    tables: Sequence[FloatArray], answers: IntArray, pool: str
) -> Callable[[FloatArray], tuple[float, FloatArray]]:
    """From weights (M,) to the pool's log loss and its gradient (M,)."""
    stacked = np.maximum(np.stack(tables), SMALLEST_PROB)  # (M, N, 5)
    gold = stacked[:, np.arange(len(answers)), answers - 1]  # (M, N)

    def linear(weights: FloatArray) -> tuple[float, FloatArray]:
        mixed = weights @ gold
        return float(-np.log(mixed).mean()), np.asarray(-(gold / mixed).mean(axis=1))

    above = np.where(np.isnan(stacked), -1e4, np.log(stacked) - np.log(gold)[:, :, None])  # exp(-1e4) is 0

    def log(weights: FloatArray) -> tuple[float, FloatArray]:
        pooled = np.tensordot(weights, above, axes=1)  # (N, 5)
        top = pooled.max(axis=1, keepdims=True)
        masses = np.exp(pooled - top)
        sums = masses.sum(axis=1, keepdims=True)
        loss = float((np.log(sums) + top).mean())
        return loss, np.asarray((masses / sums * above).sum(axis=2).mean(axis=1))

    return linear if pool == "linear" else log


def _fitted(
    tables: Sequence[FloatArray], answers: IntArray, temperatures: tuple[float, ...], weights: FloatArray, pool: Pool
) -> FittedBlend:
    """The blend with its log loss as apply_blend gives it."""
    fitted = FittedBlend(temperatures, tuple(weights.tolist()), pool, math.nan)
    return replace(fitted, log_loss=float(row_log_losses(apply_blend(fitted, tables), answers).mean()))
