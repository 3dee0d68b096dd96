"""Temperatures and weights of a blend, fitted to labelled out-of-fold rows, and what they gain on rows not fitted to."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from ksat.blending import blend
from ksat.calibration import fit_temperature, tempered
from ksat.errors import InputError
from ksat.fitted_blend import POOLS, FittedBlend, Pool, apply_blend
from ksat.metrics import (
    FEWEST_PASSAGES,
    SCALE_RANGE,
    SMALLEST_PROB,
    PairedDifference,
    choice_optimism,
    paired_difference,
    row_log_losses,
)
from ksat.predictions import FloatArray, IntArray, predicted_answers

MOST_PICKS = 50
WORTH_IT = "worth it"
SMALLEST_GAIN = 0.001  # nats a question: below that nothing shows in the three decimals that are printed
_SAME_LOSS = 1e-12  # nats: closer than that is rounding
_NO_CHOICE = -1e9  # the log mass of a choice that does not exist: nothing at any sharpness
_SURE = 3.92  # standard errors between the ends of a 95 % interval


@dataclass(frozen=True, slots=True, eq=False)
class NestedGain:
    """What the best of several fitted blends gains over equal weights on passages that none was fitted to.

    Attributes:
        method: of METHODS, the one of least log loss on those passages.
        difference: it minus equal weights, less what choosing the best of them makes look too good; log loss below 0 and accuracy
            and macro F1 above 0 speak for the fitted weights. Its intervals resample the passages and not the fits, whose rows
            the folds share.
        optimism: that too good, of accuracy, macro F1 (both above 0) and log loss (below 0).
        fold_weights: of each fold, (M,): how far they move is how little the rows tell.
        tables: by method, (N, 5) every row by the blend fitted without its fold.
        equal: (N, 5) the same with equal weights, in the pool that fits.
    """

    method: str
    difference: PairedDifference
    optimism: tuple[float, float, float]
    fold_weights: tuple[tuple[float, ...], ...]
    tables: Mapping[str, FloatArray]
    equal: FloatArray

    @property
    def fitted(self) -> FloatArray:
        """(N, 5) by the best method."""
        return self.tables[self.method]

    @property
    def num_changed(self) -> int:
        """Rows whose answer is another one with fitted weights."""
        return int((predicted_answers(self.fitted) != predicted_answers(self.equal)).sum())

    @property
    def verdict(self) -> str:
        """Whether to take the fitted weights, in words."""
        loss, accuracy, macro_f1 = self.difference.log_loss, self.difference.accuracy, self.difference.macro_f1
        if loss.low is None or loss.high is None or loss.low <= 0 <= loss.high:
            return "not distinguishable from equal weights: take equal weights"
        if self.difference.num_groups < FEWEST_PASSAGES:  # so few make the interval too narrow
            few = f"{self.difference.num_groups} passages, fewer than {FEWEST_PASSAGES}"
            return f"not distinguishable from equal weights with {few}: take equal weights"
        # What changes nothing that anybody sees is neither worse nor better, however sure its sign is: a copy of a member is both.
        if not self.num_changed:
            return "no answer changes, only their probabilities do: take equal weights"
        if abs(loss.value) < SMALLEST_GAIN:
            return f"gains less than {SMALLEST_GAIN} nats a question: take equal weights"
        if loss.low > 0:
            return "worse than equal weights: take equal weights"
        # Log loss alone does not tell on which side accuracy ends; docs/results.md has the simulation of this margin.
        if accuracy.low is None or accuracy.high is None or accuracy.value < (accuracy.high - accuracy.low) / _SURE:
            return "its log loss is better and its accuracy not by a standard error: take equal weights"
        if macro_f1.value < 0:
            return "its log loss and accuracy are better and its macro F1 is worse: take equal weights"
        return WORTH_IT

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the figures, without the tables."""
        return {
            "method": self.method,
            "verdict": self.verdict,
            "difference": self.difference.to_dict(),
            "optimism": dict(zip(("accuracy", "macro_f1", "log_loss"), self.optimism, strict=True)),
            "changed_answers": self.num_changed,
            "fold_weights": [list(weights) for weights in self.fold_weights],
        }


def nested_gain(
    tables: Sequence[FloatArray],
    answers: IntArray,
    groups: Sequence[str],
    *,
    methods: Sequence[str] | None = None,
    num_folds: int = 5,
    seed: int = 0,
) -> NestedGain:
    """What fitted weights gain over equal ones: fitted on the other folds, applied to the held-out one.

    Equal weights get temperatures fitted on the same other folds, so that only the weights are judged. Where all members
    are equally good, fitted weights lose about (M - 1) / 2N nats a question, N the rows fitted to (what any M - 1 free
    parameters fitted by maximum likelihood cost on new rows; Akaike 1973), and gain as much on the rows fitted to: that
    gain is no evidence. The test of 200 simulated sets measures both.

    Args:
        tables: (N, 5) of each member, rows of the same questions, NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        groups: (N,) passage keys; a passage lies in one fold.
        methods: names of METHODS; all by default.
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
    fits = {"equal": equal_blend, **{name: METHODS[name] for name in methods or METHODS}}
    pooled = {name: np.full_like(tables[0], np.nan) for name in fits}
    weights: dict[str, list[tuple[float, ...]]] = {name: [] for name in fits}
    splits = GroupKFold(num_folds, shuffle=True, random_state=seed).split(answers, groups=np.asarray(groups))
    for others, held_out in splits:
        given, held = ([table[rows] for table in tables] for rows in (others, held_out))
        for name, fit in fits.items():
            blended = fit(given, answers[others])
            pooled[name][held_out] = apply_blend(blended, held)
            weights[name].append(blended.weights)
    equal = pooled.pop("equal")
    best = min(pooled, key=lambda name: float(row_log_losses(pooled[name], answers).mean()))
    optimism = choice_optimism(list(pooled.values()), equal, answers, groups, seed=seed)
    difference = paired_difference(pooled[best], equal, answers, groups, seed=seed).less(*optimism)
    return NestedGain(best, difference, optimism, tuple(weights[best]), pooled, equal)


def equal_blend(tables: Sequence[FloatArray], answers: IntArray, *, pool: Pool | None = None) -> FittedBlend:
    """The blend of equal weights: each member's temperature, and the pool's.

    Which pool is better depends on how members err, by up to some points of accuracy (docs/results.md): the log pool where their scores
    are off by a little everywhere, the linear one where now and then a member is sure of anything.

    Args:
        tables: (N, 5) of each member, rows of the same questions, NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        pool: "linear" or "log"; by default the one of less log loss on these rows.

    Raises:
        ValueError: see fit_blend.
    """
    pools: tuple[Pool, ...] = ("log", "linear") if pool is None else (pool,)
    temperatures, _ = _temper(tables, answers, pools[0])
    weights = np.full(len(tables), 1 / len(tables))
    blends = [_fitted(tables, answers, temperatures, weights, each) for each in pools]
    return min(blends, key=lambda each: each.log_loss)


def fit_blend(tables: Sequence[FloatArray], answers: IntArray, *, pool: Pool = "log") -> FittedBlend:
    """The blend of least log loss: each member's temperature first, then the weights and the pool's temperature.

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


def fit_weights(tables: Sequence[FloatArray], answers: IntArray, *, pool: Pool = "log") -> FloatArray:
    """(M,) the weights on the simplex at which the pool of the tables, at the temperature that fits it, has the least log loss.

    The log pool's log loss is convex in weights / temperature (a log-sum-exp of linear functions minus a linear one), so the
    least is found. The linear one's is convex in the weights at a temperature of 1, and near it in practice: the search starts
    at equal weights. Members with the same probabilities share their weight equally; equal weights if none gain.

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
    chosen = [tables[keys.index(key)] for key in distinct]
    equal = counts / len(tables)
    start = _temperature(chosen, answers, equal, pool)
    objective = _objective(chosen, answers, pool)
    found = _least(objective, equal, start)
    if objective(found)[0] > objective(np.append(equal, -math.log(start)))[0] - _SAME_LOSS:
        found = np.append(equal, 0.0)
    return np.asarray((found[:-1] / counts)[[distinct.index(key) for key in keys]])


def _least(
    objective: Callable[[FloatArray], tuple[float, FloatArray]], weights: FloatArray, temperature: float
) -> FloatArray:
    """The weights on the simplex and minus the log temperature at which a function, given with its gradient, is least."""
    from scipy.optimize import minimize

    start = np.append(weights, -math.log(temperature))
    if len(weights) == 1:
        return start
    ones = np.append(np.ones(len(weights)), 0.0)
    total = {"type": "eq", "fun": lambda x: x @ ones - 1, "jac": lambda x: ones}
    # 300 problems of 2 to 11 members: within 2e-7 nats of the least at 1e-14, within 2e-5 at 1e-10.
    options = {"ftol": 1e-14, "maxiter": 1000}
    bounds = [*[(0.0, 1.0)] * len(weights), (-math.log(100), math.log(100))]
    found = minimize(objective, start, jac=True, method="SLSQP", bounds=bounds, constraints=total, options=options).x
    clipped = np.clip(found[:-1], 0, None)
    return np.append(clipped / clipped.sum(), found[-1])


def greedy_blend(
    tables: Sequence[FloatArray], answers: IntArray, *, pool: Pool = "log", by_accuracy: bool = False
) -> FittedBlend:
    """The blend of forward selection with replacement: the member that leaves the least log loss, pick by pick.

    Of the 50 nested selections the best counts, of equals the smallest (Caruana et al. 2004,
    https://doi.org/10.1145/1015330.1015432); a weight is a member's share of its picks. To end at the first pick that
    gains nothing would often leave the best member alone: a half of another is too much where a tenth would help. Of
    equal members the first is picked. The members' temperatures are fitted first, as in fit_blend; a pick is judged at the
    temperature that fits the picks before it, and a selection at its own.

    Args:
        tables: (N, 5) of each member, rows of the same questions, NaN where a choice does not exist.
        answers: (N,) gold answers, counted from 1.
        pool: "linear" or "log".
        by_accuracy: the fewest wrong answers count, and log loss among equals.

    Raises:
        ValueError: see fit_blend.
    """
    temperatures, scaled = _temper(tables, answers, pool)
    stacked, is_missing = _members(scaled, pool)
    # (M, 5, N) and (5, N): reductions over five numbers that lie side by side would take most of the time
    members, is_missing = np.ascontiguousarray(stacked.transpose(0, 2, 1)), is_missing.T
    rows = np.arange(len(answers))

    def logs_of(mixed: FloatArray) -> FloatArray:
        """(5, N) log masses less that of the answer; far below it where a choice does not exist."""
        logs = np.log(np.maximum(mixed, SMALLEST_PROB)) if pool == "linear" else mixed
        return np.where(is_missing, _NO_CHOICE, logs - logs[answers - 1, rows])

    def judge(logs: FloatArray, sharpness: float) -> tuple[int, float]:
        scores = sharpness * logs
        top = scores.max(axis=0)
        loss = float((np.log(np.exp(scores - top).sum(axis=0)) + top).mean())
        return int((scores.argmax(axis=0) != answers - 1).sum()) if by_accuracy else 0, loss

    picks, weights, sharpness, total = np.zeros(len(scaled)), np.zeros(len(scaled)), 1.0, np.zeros_like(members[0])
    least = (len(answers) + 1, math.inf)
    for number in range(1, MOST_PICKS + 1):
        judged = [judge(logs_of((total + member) / number), sharpness) for member in members]
        wrong, loss = min(judged)
        picked = next(i for i, each in enumerate(judged) if each <= (wrong, loss + _SAME_LOSS))
        picks[picked] += 1
        total = total + members[picked]
        logs = logs_of(total / number)
        sharpness = _sharpen(logs, sharpness)
        wrong, loss = judge(logs, sharpness)
        if (wrong, loss + _SAME_LOSS) < least:
            least, weights = (wrong, loss), picks / number
    return _fitted(tables, answers, temperatures, weights, pool)


def _sharpen(logs: FloatArray, start: float) -> float:
    """The factor on (5, N) log masses less the answer's at which their log loss is least, by Newton's steps: it is convex."""
    low, high = SCALE_RANGE
    sharpness = start
    for _ in range(50):
        scores = sharpness * logs
        masses = np.exp(scores - scores.max(axis=0))
        masses /= masses.sum(axis=0)
        mean = (masses * logs).sum(axis=0)
        curvature = float(((masses * logs**2).sum(axis=0) - mean**2).mean())
        step = float(mean.mean()) / max(curvature, 1e-300)
        before, sharpness = sharpness, min(max(sharpness - step, sharpness / 4, low), 4 * sharpness, high)
        if abs(sharpness - before) <= 1e-7 * before:
            break
    return sharpness


# The first of equals is taken: docs/results.md has the simulation that ranks them.
METHODS: Mapping[str, Callable[[Sequence[FloatArray], IntArray], FittedBlend]] = {
    f"{name}{how}": partial(fit, pool=pool, **more)  # type: ignore[arg-type]
    for name, pool in (("geometric", "log"), ("linear", "linear"))
    for how, fit, more in (
        ("", fit_blend, {}),
        (", greedy", greedy_blend, {}),
        (", greedy by accuracy", greedy_blend, {"by_accuracy": True}),
    )
}


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


def _temperature(scaled: Sequence[FloatArray], answers: IntArray, weights: FloatArray, pool: Pool) -> float:
    """Of the pool of members that are tempered already."""
    return fit_temperature(blend(scaled, weights.tolist(), POOLS[pool]), answers)


def _members(tables: Sequence[FloatArray], pool: str) -> tuple[FloatArray, Any]:
    """(M, N, 5) what is averaged: probabilities, or their logs, 0 where a choice does not exist; and (N, 5) where."""
    stacked = np.maximum(np.stack(tables), SMALLEST_PROB)
    is_missing = np.isnan(stacked)
    return np.where(is_missing, 0.0, stacked if pool == "linear" else np.log(stacked)), is_missing[0]


def _objective(
    tables: Sequence[FloatArray], answers: IntArray, pool: str
) -> Callable[[FloatArray], tuple[float, FloatArray]]:
    """From weights and minus the log temperature (M + 1,) to the pool's log loss and its gradient (M + 1,)."""
    members, is_missing = _members(tables, pool)
    rows = np.arange(len(answers))

    def objective(x: FloatArray) -> tuple[float, FloatArray]:
        sharpness = math.exp(x[-1])
        mixed = np.tensordot(x[:-1], members, axes=1)  # (N, 5) masses, or their logs
        if pool == "linear":
            mixed = np.where(is_missing, 1.0, np.maximum(mixed, SMALLEST_PROB))
        logs = np.log(mixed) if pool == "linear" else mixed
        scores = np.where(is_missing, -np.inf, sharpness * logs)
        top = scores.max(axis=1, keepdims=True)
        masses = np.exp(scores - top)
        sums = masses.sum(axis=1, keepdims=True)
        loss = float((np.log(sums[:, 0]) + top[:, 0] - scores[rows, answers - 1]).mean())
        slopes = masses / sums  # (N, 5) of the loss by the scores
        slopes[rows, answers - 1] -= 1
        by_mixed = sharpness * (slopes / mixed if pool == "linear" else slopes)
        by_weights = np.tensordot(members, by_mixed, axes=((1, 2), (0, 1))) / len(answers)
        by_sharpness = sharpness * float((slopes * logs).sum(axis=1).mean())
        return loss, np.append(by_weights, by_sharpness)

    return objective


def _fitted(
    tables: Sequence[FloatArray], answers: IntArray, temperatures: tuple[float, ...], weights: FloatArray, pool: Pool
) -> FittedBlend:
    """The blend at the temperature that fits its pool, with its log loss as apply_blend gives it."""
    scaled = [tempered(table, t) for table, t in zip(tables, temperatures, strict=True)]
    pooled = _temperature(scaled, answers, weights, pool)
    fitted = FittedBlend(temperatures, tuple(weights.tolist()), pool, pooled, math.nan)
    return replace(fitted, log_loss=float(row_log_losses(apply_blend(fitted, tables), answers).mean()))
