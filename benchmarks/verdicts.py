"""What ensemble.py --fit says about simulated members, and what its blends are worth on 8,000 fresh rows.

    python benchmarks/verdicts.py                # 200 sets of 2,031 rows a setting: hours on a slow machine
    python benchmarks/verdicts.py --sets 20 --methods geometric linear
    python benchmarks/verdicts.py --pools        # two pools of equal weights, by hand: a minute

A member scores the right choice higher by an edge that gives its accuracy; half of its noise is shared by all members, so that being
right correlates by about 0.25 to 0.35. Each is too sure or too unsure in its own measure. Two rows are a passage.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ksat.blending import blend
from ksat.fitted_blend import apply_blend
from ksat.fitting import METHODS, WORTH_IT, equal_blend, nested_gain
from ksat.metrics import row_log_losses
from ksat.predictions import FloatArray, IntArray, predicted_answers
from ksat.tables import markdown_table

SETTINGS = {
    "two strong, one weak": (0.765, 0.765, 0.68),
    "five, 0.76 to 0.71": (0.76, 0.75, 0.74, 0.72, 0.71),
    "four equal": (0.74, 0.74, 0.74, 0.74),
    "one good, two poor": (0.78, 0.60, 0.55),
}
NUM_FRESH = 8000
Drawn = tuple[list[FloatArray], IntArray]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one set: the verdict, the method that was named, and by method (accuracy, log loss) on fresh rows, "equal" first."""

    verdict: str
    method: str
    fresh: dict[str, tuple[float, float]]

    def gain(self, method: str) -> tuple[float, float]:
        """Accuracy and log loss of a method minus equal weights'."""
        return tuple(np.subtract(self.fresh[method], self.fresh["equal"]).tolist())  # type: ignore[return-value]


def edge_of(accuracy: float) -> float:
    """By how much the right one of five choices leads, for this accuracy among standard normal noise."""
    noise = np.random.default_rng(0).normal(size=(100_000, 5))
    low, high = 0.0, 6.0
    for _ in range(40):
        middle = (low + high) / 2
        hits = (noise[:, 0] + middle > noise[:, 1:].max(axis=1)).mean()
        low, high = (middle, high) if hits < accuracy else (low, middle)
    return low


def draw(rng: np.random.Generator, edges: Sequence[float], sharpness: FloatArray, num_rows: int) -> Drawn:
    """Members' probabilities and the answers; their noise is normal."""
    answers = rng.integers(1, 6, num_rows)
    shared = rng.normal(size=(num_rows, 5))
    tables = []
    for edge, sharp in zip(edges, sharpness, strict=True):
        scores = edge * np.eye(5)[answers - 1] + np.sqrt(0.5) * (shared + rng.normal(size=(num_rows, 5)))
        tables.append(_softmax(2 * sharp * scores))
    return tables, answers


def try_set(seed: int, edges: Sequence[float], num_rows: int, methods: Sequence[str]) -> Outcome:
    """Fits on rows of a set, and looks at fresh ones."""
    rng = np.random.default_rng(seed)
    sharpness = np.exp(0.3 * rng.normal(size=len(edges)))
    tables, answers = draw(rng, edges, sharpness, num_rows)
    fresh, right = draw(rng, edges, sharpness, NUM_FRESH)
    gain = nested_gain(tables, answers, [f"p{i // 2}" for i in range(num_rows)], methods=methods, seed=seed)
    found = {}
    for name, fit in {"equal": equal_blend, **{name: METHODS[name] for name in methods}}.items():
        blended = apply_blend(fit(tables, answers), fresh)
        found[name] = float(np.mean(predicted_answers(blended) == right)), float(row_log_losses(blended, right).mean())
    return Outcome(gain.verdict, gain.method, found)


def draw_heavy(rng: np.random.Generator, edges: Sequence[float], sharpness: FloatArray, num_rows: int) -> Drawn:
    """The same with noise of heavy tails, Student's t of 2.5 degrees: now and then a member is sure of anything."""
    answers = rng.integers(1, 6, num_rows)
    shared = rng.normal(size=(num_rows, 5))
    tables = []
    for edge, sharp in zip(edges, sharpness, strict=True):
        noise = 0.7 * rng.standard_t(2.5, size=(num_rows, 5))
        tables.append(_softmax(2 * sharp * (edge * np.eye(5)[answers - 1] + np.sqrt(0.5) * (shared + noise))))
    return tables, answers


def draw_knowing(rng: np.random.Generator, shares: Sequence[float], sharpness: FloatArray, num_rows: int) -> Drawn:
    """Members that know this share of the answers, and are as sure of one drawn from all five else."""
    answers = rng.integers(1, 6, num_rows)
    tables = []
    for share, sharp in zip(shares, sharpness, strict=True):
        picked = np.where(rng.random(num_rows) < share, answers - 1, rng.integers(0, 5, num_rows))
        sure = rng.gamma(2.0, 0.8, num_rows)[:, None] * np.eye(5)[picked]
        tables.append(_softmax(2 * sharp * (sure + 0.3 * rng.normal(size=(num_rows, 5)))))
    return tables, answers


def _softmax(scores: FloatArray) -> FloatArray:
    masses = np.exp(scores - scores.max(axis=1, keepdims=True))
    return masses / masses.sum(axis=1, keepdims=True)


def compare_pools(num_sets: int) -> None:
    """Prints what equal weights are worth by either pool, as `ensemble.py A B C` takes them: nothing is tempered."""
    body = []
    for noise, (make, settings) in NOISES.items():
        for members in settings:
            for sharper in (1.0, 2.0):
                outcomes = []
                for seed in range(num_sets):
                    rng = np.random.default_rng(seed)
                    sharpness = sharper * np.exp(0.3 * rng.normal(size=len(members)))
                    tables, answers = make(rng, members, sharpness, NUM_FRESH)
                    weights = [1 / len(members)] * len(members)
                    pooled = [blend(tables, weights, pool) for pool in ("soft", "geometric")]
                    outcomes.append(
                        [(np.mean(predicted_answers(p) == answers), row_log_losses(p, answers).mean()) for p in pooled]
                    )
                (soft, soft_loss), (geometric, geometric_loss) = np.mean(outcomes, axis=0)
                gains = np.diff(outcomes, axis=1)[:, 0, 0]
                error = gains.std(ddof=1) / np.sqrt(num_sets)
                names = [noise, ", ".join(f"{member:.2f}" for member in members), f"{sharper:g}"]
                accuracies = [f"{soft:.4f}", f"{geometric:.4f}", f"{gains.mean():+.4f} ({error:.4f})"]
                body.append([*names, *accuracies, f"{soft_loss:.3f}", f"{geometric_loss:.3f}"])
    header = ["noise", "members", "sharpness", "accuracy, soft", "geometric", "difference (standard error)"]
    print(markdown_table([*header, "log loss, soft", "geometric"], body, num_texts=2))


NOISES = {
    "normal": (draw, ((1.6, 1.6, 1.2), (1.5, 1.5, 1.5, 1.5), (1.7, 0.9, 0.8))),
    "heavy tails": (draw_heavy, ((1.6, 1.6, 1.1), (1.5, 1.5, 1.5, 1.5), (1.7, 0.9, 0.8))),
    "knows or guesses": (draw_knowing, ((0.7, 0.7, 0.6), (0.7, 0.7, 0.7, 0.7), (0.72, 0.4, 0.35))),
}


def main() -> None:
    """Prints a table a setting, and what the verdicts were worth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200, metavar="N", help="of every setting (default: 200)")
    parser.add_argument("--rows", type=int, default=2031, metavar="N", help="to fit on (default: 2031)")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS), help="default: all")
    parser.add_argument("--pools", action="store_true", help="compare the pools of equal weights instead")
    args = parser.parse_args()
    if args.pools:
        compare_pools(args.sets)
        return
    for setting, accuracies in SETTINGS.items():
        edges = [edge_of(accuracy) for accuracy in accuracies]
        outcomes = [try_set(seed, edges, args.rows, args.methods) for seed in range(args.sets)]
        body = []
        for name in ("equal", *args.methods):
            level = np.mean([outcome.fresh[name] for outcome in outcomes], axis=0)
            gains = np.array([outcome.gain(name) for outcome in outcomes])
            body.append(
                [
                    name,
                    *(f"{value:.4f}" for value in level),
                    *(f"{value:+.4f}" for value in gains.mean(axis=0)),
                    f"{(gains[:, 0] < 0).sum()}",
                ]
            )
        header = [
            setting,
            "accuracy",
            "log loss",
            "accuracy, minus equal",
            "log loss, minus equal",
            "sets that lose accuracy",
        ]
        print(f"\n{markdown_table(header, body)}")
        worth = np.array([outcome.gain(outcome.method)[0] for outcome in outcomes if outcome.verdict == WORTH_IT])
        change = f", mean change {worth.mean():+.4f}" if len(worth) else ""
        print(
            f'"{WORTH_IT}": {len(worth)} of {args.sets} sets; of these {(worth < 0).sum()} lose accuracy on {NUM_FRESH:,} fresh rows{change}',
            flush=True,
        )


if __name__ == "__main__":
    main()
