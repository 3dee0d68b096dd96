"""Who answers best: figures of every base on the same questions, pairwise tests, and what may be concluded."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksat.comparison import McNemar, holm, mcnemar
from ksat.errors import InputError, bad_rows
from ksat.exploration import Outcome
from ksat.folds import split_validation
from ksat.kinds import find_kind
from ksat.metrics import (
    MOST_FREQUENT,
    UNIFORM,
    Estimate,
    Metrics,
    compute_metrics,
    paired_difference,
    position_baseline,
    random_baseline,
)
from ksat.near_duplicates import passage_groups
from ksat.predictions import FloatArray, IntArray, predicted_answers
from ksat.questions import Question, read_table, require_columns
from ksat.tables import markdown_table

SEED = 0  # of the halves A and B
PARTS = ("all", "A", "B", "reading", "knowledge")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the result: a candidate's figures, or its reason.

    Attributes:
        name: of the candidate.
        reason: why there are no figures; "" if there are.
        metrics: by part of the rows: "all", the halves "A" and "B", and the kinds "reading" and "knowledge" that occur.
        questions_per_second: of scoring, without loading; None if not known.
        peak_gib: memory at the peak.
        public: leaderboard accuracy that the user entered; None if none.
        private: on the private half.
        probs: (n, 5) of the judged questions; (0, 5) without figures.
    """

    name: str
    reason: str
    metrics: Mapping[str, Metrics]
    questions_per_second: float | None
    peak_gib: float | None
    public: float | None
    private: float | None
    probs: FloatArray


@dataclass(frozen=True, slots=True)
class Judged:
    """The questions with a known answer, and the parts in which they are judged.

    Attributes:
        questions: n of them.
        answers: (n,) counted from 1.
        groups: (n,) passage keys.
        parts: indices by part; see Row.metrics.
    """

    questions: tuple[Question, ...]
    answers: IntArray
    groups: tuple[str, ...]
    parts: Mapping[str, Sequence[int]]


def judge(questions: Sequence[Question], answers: Mapping[str, int]) -> Judged:
    """The rows to judge on.

    The halves A and B are what a public and a private board might be: a fixed split of the passages.

    Args:
        questions: all that are scored.
        answers: by id, counted from 1.

    Raises:
        InputError: fewer than two passages have answers.
    """
    chosen = tuple(question for question in questions if question.id in answers)
    pairs = [(question, answers[question.id]) for question in chosen]
    if bad := [(q.id, f"{answer} of {q.num_choices}") for q, answer in pairs if not 1 <= answer <= q.num_choices]:
        raise bad_rows("the answers", "lie beyond their question's choices", bad, "are they to the same questions?")
    groups = tuple(passage_groups(chosen))
    if len(set(groups)) < 2:
        raise InputError(
            f"{len(chosen)} of {len(questions)} questions have an answer, on {len(set(groups))} passages; bases are compared "
            "on two passages at least: give labelled rows, or --answers"
        )
    half_a, half_b = split_validation(chosen, 0.5, seed=SEED, groups=groups)
    parts: dict[str, Sequence[int]] = {"all": range(len(chosen)), "A": half_a, "B": half_b}
    kinds = [find_kind(question) for question in chosen]
    for kind in ("reading", "knowledge"):
        if rows := [i for i, found in enumerate(kinds) if found == kind]:
            parts[kind] = rows
    return Judged(chosen, np.array([answers[question.id] for question in chosen], dtype=np.int64), groups, parts)


def make_row(outcome: Outcome, judged: Judged, board: Mapping[str, tuple[float | None, float | None]]) -> Row:
    """The figures of a candidate.

    Args:
        outcome: of run_candidate.
        judged: questions and answers.
        board: leaderboard scores (public, private) by candidate or base.
    """
    name = outcome.candidate.name
    public, private = board.get(name, board.get(outcome.candidate.base, (None, None)))
    if outcome.predictions is None or outcome.report is None:
        return Row(name, outcome.reason, {}, None, None, public, private, np.zeros((0, 5)))
    place = {row_id: i for i, row_id in enumerate(outcome.predictions.ids)}
    probs = outcome.predictions.probs[[place[question.id] for question in judged.questions]]
    report = outcome.report
    speed, memory = report["questions_per_second"], report["peak_memory_gib"]
    return Row(name, "", part_metrics(probs, judged), speed, memory, public, private, probs)


def part_metrics(probs: FloatArray, judged: Judged) -> dict[str, Metrics]:
    """By part of the questions, what (N, 5) probabilities are worth."""
    return {
        part: compute_metrics(probs[list(rows)], judged.answers[list(rows)], [judged.groups[i] for i in rows])
        for part, rows in judged.parts.items()
    }


def baseline_rows(judged: Judged, positions: Mapping[str, Sequence[int]] | None = None) -> list[Row]:
    """What guesses that read nothing are worth on the same rows: uniform ones, then the most frequent position.

    Args:
        judged: questions and answers.
        positions: of ksat.metrics.count_positions, on the rows that were trained on; None: see ksat.metrics.position_baseline.
    """
    counts = np.array([question.num_choices for question in judged.questions])
    metrics = {
        part: random_baseline(counts[list(rows)], judged.answers[list(rows)]) for part, rows in judged.parts.items()
    }
    found = {UNIFORM: metrics}
    by_position = position_baseline(counts, judged.answers, judged.groups, positions)
    if by_position is not None:
        found[MOST_FREQUENT] = part_metrics(by_position, judged)
    return [Row(name, "", each, None, None, None, None, np.zeros((0, 5))) for name, each in found.items()]


def read_leaderboard(path: Path) -> dict[str, tuple[float | None, float | None]]:
    """Scores that the user entered, by base: a CSV `base,public,private`, cells may be empty.

    Raises:
        InputError: another header, or a cell that is no share between 0 and 1.
    """
    table = read_table(path)
    require_columns(table, path, ["base", "public", "private"])

    def share(row: int, column: str) -> float | None:
        cell = str(table[column][row]).strip()
        if not cell:
            return None
        if not re.fullmatch(r"0(\.[0-9]+)?|1(\.0+)?", cell):
            raise InputError(
                f"{path}: row of base {table['base'][row]!r} has {column} {cell!r}; expected a share from 0 to 1, or nothing"
            )
        return float(cell)

    names = [str(name).strip() for name in table["base"]]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"{path}: base {twice[0]!r} stands there twice; keep one row")
    return {str(table["base"][i]).strip(): (share(i, "public"), share(i, "private")) for i in range(len(table))}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two rows on the same questions, the better one first.

    Attributes:
        better: name.
        worse: name.
        difference: of the accuracies, with low and high (95 %, bootstrap over passages).
        test: McNemar's, better against worse.
        corrected: its p-value after Holm's correction over all pairs.
    """

    better: str
    worse: str
    difference: tuple[float, float, float]
    test: McNemar
    corrected: float


def compare_pairs(rows: Sequence[Row], judged: Judged) -> list[Pair]:
    """Every pair of rows with figures, in the order of their accuracies."""
    ranked = ranking(rows)
    pairs = list(itertools.combinations(ranked, 2))
    correct = {row.name: predicted_answers(row.probs) == judged.answers for row in ranked}
    tests = [mcnemar(correct[a.name], correct[b.name]) for a, b in pairs]
    corrected = holm([test.p_value for test in tests])
    found = []
    for (a, b), test, p_value in zip(pairs, tests, corrected, strict=True):
        accuracy = paired_difference(a.probs, b.probs, judged.answers, judged.groups).accuracy
        low, high = accuracy.low or 0.0, accuracy.high or 0.0
        found.append(Pair(a.name, b.name, (accuracy.value, low, high), test, p_value))
    return found


def ranking(rows: Sequence[Row]) -> list[Row]:
    """Those with figures, the most accurate first."""
    return sorted((row for row in rows if row.metrics), key=lambda row: -row.metrics["all"].accuracy.value)


def recommend(rows: Sequence[Row], pairs: Sequence[Pair], baselines: Sequence[Row]) -> str:
    """One sentence: which base to take, what is significant, and what is not; beside the better of the baselines."""
    ranked = ranking(rows)
    if not ranked:
        return "No base could be scored; the reasons stand in the table."
    best = ranked[0]
    accuracy = best.metrics["all"].accuracy
    low = f" [{accuracy.low:.3f}, {accuracy.high:.3f}]" if accuracy.low is not None else ""
    said = f"{best.name} answers best, {accuracy.value:.3f}{low} of {best.metrics['all'].num_questions} questions"
    guess = max(baselines, key=lambda row: row.metrics["all"].accuracy.value)
    reached = guess.metrics["all"].accuracy.value
    if accuracy.low is not None and accuracy.low <= reached:
        said += f", which the {guess.name} ({reached:.3f}) may reach as well"
    if len(ranked) == 1:
        return f"{said}; nothing to compare it with."
    against = [pair for pair in pairs if pair.better == best.name]
    beaten = [pair.worse for pair in against if pair.corrected < 0.05]
    level = [pair.worse for pair in against if pair.corrected >= 0.05]
    parts = []
    if beaten:
        parts.append(f"significantly better than {_listed(beaten)} (McNemar with Holm's correction, p < 0.05)")
    if level:
        parts.append(f"not distinguishable from {_listed(level)}" + ("" if beaten else " on so few questions"))
    cheaper = [row for row in ranked[1:] if row.name in level and (row.peak_gib or 0) < (best.peak_gib or 0)]
    if cheaper:
        smallest = min(cheaper, key=lambda row: row.peak_gib or 0)
        parts.append(
            f"of those {smallest.name} takes less memory ({smallest.peak_gib:.1f} against {best.peak_gib:.1f} GiB)"
        )
    return f"{said}: {'; '.join(parts)}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def standings_table(rows: Sequence[Row], baselines: Sequence[Row]) -> str:
    """The markdown table: guessing first, then by accuracy, with 95 % intervals; below it who has no figures, and why."""
    header = [
        "base",
        "all",
        "half A",
        "half B",
        "reading",
        "knowledge",
        "macro F1",
        "questions/s",
        "peak GiB",
        "public",
        "private",
    ]
    body = []
    for row in [*baselines, *ranking(rows)]:
        accuracies = [_cell(row.metrics[part].accuracy if part in row.metrics else None) for part in PARTS]
        body.append([
            row.name, *accuracies, _cell(row.metrics["all"].macro_f1), _number(row.questions_per_second, 2),
            _number(row.peak_gib, 1), _number(row.public, 4), _number(row.private, 4),
        ])  # fmt: skip
    table = markdown_table(header, body)
    failed = [f"{row.name}: not scored ({row.reason})" for row in rows if not row.metrics]
    return "\n".join([table, *([""] if failed else []), *failed])


def pairs_table(pairs: Sequence[Pair]) -> str:
    """The markdown table of all pairs."""
    header = ["better", "worse", "difference in accuracy", "only better / only worse", "p", "p, Holm"]
    body = [
        [
            pair.better, pair.worse, f"{pair.difference[0]:+.3f} [{pair.difference[1]:+.3f}, {pair.difference[2]:+.3f}]",
            f"{pair.test.only_a} / {pair.test.only_b}", f"{pair.test.p_value:.2g}", f"{pair.corrected:.2g}",
        ]
        for pair in pairs
    ]  # fmt: skip
    return markdown_table(header, body, num_texts=2)


def standings_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One flat record a row, for a CSV: every accuracy with its interval, None where there is none."""
    records = []
    for row in rows:
        record: dict[str, Any] = {"base": row.name, "reason": row.reason}
        for part in PARTS:
            record |= _flat(f"accuracy_{part}", row.metrics[part].accuracy if part in row.metrics else None)
        record |= _flat("macro_f1", row.metrics["all"].macro_f1 if row.metrics else None)
        record |= _flat("log_loss", row.metrics["all"].log_loss if row.metrics else None)
        record |= {"questions": row.metrics["all"].num_questions if row.metrics else None}
        record |= {"questions_per_second": row.questions_per_second, "peak_gib": row.peak_gib}
        records.append(record | {"public": row.public, "private": row.private})
    return records


def _flat(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    found = estimate.to_dict() if estimate else {"value": None, "low": None, "high": None}
    return {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return f"{estimate.value:.3f}" + (f" [{estimate.low:.3f}, {estimate.high:.3f}]" if estimate.low is not None else "")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
