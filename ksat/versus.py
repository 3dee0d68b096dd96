"""Runs against each other on the same questions: figures, pairs, breakdowns, and what a leaderboard would make of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ksat.blending import Member, align_members
from ksat.boards import Boards, ahead_again, ahead_again_if_equal, draw_boards, pick_two, say_pick
from ksat.comparison import mcnemar
from ksat.errors import InputError
from ksat.files import named_twice
from ksat.metrics import format_table, paired_difference
from ksat.picture import use_fonts
from ksat.predictions import align_answers, is_competition_table, predicted_answers, read_answers, read_probs
from ksat.questions import read_questions, read_table
from ksat.standings import Judged, Pair, Row, baseline_rows, compare_pairs, judge, part_metrics, ranking, recommend
from ksat.tables import markdown_table

WIDTH = 9.0  # inches


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that is said of the runs.

    Attributes:
        rows: the runs, the most accurate first.
        baselines: guesses that read nothing.
        pairs: every two of them.
        judged: the questions.
        half: questions in a half of the leaderboard.
        boards: scores on drawn leaderboards, columns as `rows`.
    """

    rows: tuple[Row, ...]
    baselines: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    judged: Judged
    half: int
    boards: Boards

    def ahead_again(self, pair: Pair) -> tuple[float, float]:
        """The chances, by accuracy and by macro F1, that the better one is ahead on a half of the leaderboard as well."""
        place = {row.name: i for i, row in enumerate(self.rows)}
        return ahead_again(self.boards, place[pair.better], place[pair.worse])


def compare(
    files: Sequence[Path],
    answers_path: Path,
    questions_path: Path | None,
    *,
    kinds: str | None = None,
    half: int | None,
) -> Comparison:
    """Compares probability files.

    Args:
        files: one or more, of the same questions in any order.
        answers_path: labelled questions, or `id,answer`.
        questions_path: the questions, where the answers are labels alone.
        kinds: of read_questions.
        half: questions in a half of the leaderboard; None for half of those compared.

    Raises:
        InputError: a file named twice, one of other questions, answers or questions missing, or an answer beyond its choices.
    """
    names = _names(files)
    if questions_path is None and not is_competition_table(read_table(answers_path)):
        raise InputError(
            f"{answers_path}: labels alone, which tell no passages; give the questions with --questions CSV"
        )
    members = [Member(path, read_probs(path), label_only=False) for path in files]
    first = members[0].predictions
    counts = dict(zip(first.ids, first.num_choices.tolist(), strict=True))
    tables = align_members(members, counts, files[0])
    questions = {question.id: question for question in read_questions(questions_path or answers_path, kinds=kinds)}
    answers = read_answers(answers_path)
    if unknown := [row_id for row_id in counts if row_id not in questions or row_id not in answers]:
        raise InputError(
            f"{files[0]}: {len(unknown)} of {len(counts)} rows have no question or no answer (first: id {unknown[0]!r}); give the "
            "file that they were scored from"
        )
    if bad := [i for i in counts if counts[i] != questions[i].num_choices]:
        raise InputError(
            f"{files[0]}: id {bad[0]!r} has {counts[bad[0]]} choices, the question {questions[bad[0]].num_choices}"
        )
    align_answers(first, answers, answers_path)  # refuses an answer that its row's choices do not reach
    judged = _with_sizes(judge([questions[row_id] for row_id in counts], answers))
    rows = [_row(name, table, judged) for name, table in zip(names, tables, strict=True)]
    ranked = ranking(rows)
    half = half or max(1, len(counts) // 2)
    boards = draw_boards([row.probs for row in ranked], judged.answers, judged.groups, num_questions=half)
    pairs = tuple(compare_pairs(rows, judged))
    return Comparison(tuple(ranked), tuple(baseline_rows(judged)), pairs, judged, half, boards)


def _names(files: Sequence[Path]) -> list[str]:
    """Short ones if they differ."""
    if twice := named_twice(files):
        raise InputError(f"{twice[0]} is named twice; leave one out")
    short = [path.name.removesuffix(".csv").removesuffix(".probs") for path in files]
    return short if len(set(short)) == len(short) else [str(path) for path in files]


def _with_sizes(judged: Judged) -> Judged:
    """The parts by kind and by number of choices; the halves A and B are left to the draws."""
    sizes = np.array([question.num_choices for question in judged.questions])
    by_size = {f"{size} choices": np.flatnonzero(sizes == size).tolist() for size in sorted(set(sizes.tolist()))}
    parts = {part: rows for part, rows in judged.parts.items() if part not in ("A", "B")} | by_size
    return replace(judged, parts={p: rows for p, rows in parts.items() if p == "all" or len(rows) < len(sizes)})


def _row(name: str, table: Any, judged: Judged) -> Row:
    return Row(name, "", part_metrics(table, judged), None, None, None, None, table)


def format_comparison(found: Comparison, *, pick: bool) -> str:
    """For the terminal: figures, breakdown, pairs, what is significant, and the two to select if asked."""
    rows = [*found.baselines, *found.rows]
    parts = [format_table([(row.name, row.metrics["all"]) for row in rows])]
    if len(found.judged.parts) > 1:
        parts.append(_breakdown(found))
    if found.pairs:
        parts.append(_pairs_table(found))
        if len(found.judged.parts) > 1:
            parts.append(_pairs_breakdown(found))
    parts.append(recommend(found.rows, found.pairs, found.baselines))
    parts += _same(found.rows)
    if pick:
        names = [row.name for row in found.rows]
        picked = pick_two([row.probs for row in found.rows], found.judged.answers, found.boards.accuracy)
        parts.append(say_pick(picked, names))
        by_f1 = pick_two([row.probs for row in found.rows], found.judged.answers, found.boards.macro_f1)
        if {by_f1.first, by_f1.second} != {picked.first, picked.second}:
            parts.append(f"By macro F1 instead: {say_pick(by_f1, names)}")
    return "\n\n".join(parts)


def _same(rows: Sequence[Row]) -> list[str]:
    """A sentence for every two runs that are the same, or answer the same."""
    said = []
    for one, other in combinations(rows, 2):
        if np.array_equal(one.probs, other.probs, equal_nan=True):
            said.append(f"{one.name} and {other.name} are identical: every probability is the same; they are one run.")
        elif np.array_equal(predicted_answers(one.probs), predicted_answers(other.probs)):
            said.append(
                f"{one.name} and {other.name} give the same answer to every question; only probabilities differ."
            )
    return said


def _breakdown(found: Comparison) -> str:
    names = [part for part in found.judged.parts if part != "all"]
    header = ["accuracy", *(f"{part} ({len(found.judged.parts[part])})" for part in names)]
    body = []
    for row in [*found.baselines, *found.rows]:
        cells = []
        for part in names:
            accuracy = row.metrics[part].accuracy
            around = "" if accuracy.low is None else f" [{accuracy.low:.3f}, {accuracy.high:.3f}]"
            cells.append(f"{accuracy.value:.3f}{around}")
        body.append([row.name, *cells])
    return markdown_table(header, body)


def _pairs_table(found: Comparison) -> str:
    half = f"ahead again on {found.half}"
    header = [
        "better",
        "worse",
        "difference in accuracy",
        "only better / only worse",
        "p",
        "p, Holm",
        half,
        "by macro F1",
    ]
    body = []
    for pair in found.pairs:
        again, again_f1 = found.ahead_again(pair)
        low, high = pair.difference[1:]
        body.append([
            pair.better, pair.worse, f"{pair.difference[0]:+.3f} [{low:+.3f}, {high:+.3f}]",
            f"{pair.test.only_a} / {pair.test.only_b}", f"{pair.test.p_value:.2g}", f"{pair.corrected:.2g}",
            f"{again:.2f}", f"{again_f1:.2f}",
        ])  # fmt: skip
    equal = ahead_again_if_equal(len(found.judged.questions), found.half)
    note = (
        f"ahead again: the chance that the better one here is ahead on a half of {found.half} questions of the leaderboard as well, the true "
        f"difference drawn around the one seen here and one more passage against it: the better of two equally good runs gets {equal:.2f} on "
        "average, or less. p: exact McNemar."
    )
    return f"{markdown_table(header, body, num_texts=2)}\n\n{note}"


def _pairs_breakdown(found: Comparison) -> str:
    """Differences by kind and number of choices, each with its interval and McNemar's p, uncorrected."""
    names = [part for part in found.judged.parts if part != "all"]
    rows = {row.name: row for row in found.rows}
    body = []
    for pair in found.pairs:
        cells = []
        for part in names:
            chosen = list(found.judged.parts[part])
            one, other = (rows[name].probs[chosen] for name in (pair.better, pair.worse))
            answers, groups = found.judged.answers[chosen], [found.judged.groups[i] for i in chosen]
            by = paired_difference(one, other, answers, groups).accuracy
            test = mcnemar(predicted_answers(one) == answers, predicted_answers(other) == answers)
            cells.append(f"{by.value:+.3f} [{by.low:+.3f}, {by.high:+.3f}] p {test.p_value:.2g}")
        body.append([f"{pair.better} - {pair.worse}", *cells])
    note = "p of the parts is not corrected for their number: of twenty such cells one is below 0.05 by chance."
    return f"{markdown_table(['difference', *names], body)}\n\n{note}"


def pair_records(found: Comparison) -> list[dict[str, Any]]:
    """One flat record a pair, for a CSV."""
    records = []
    for pair in found.pairs:
        again, again_f1 = found.ahead_again(pair)
        value, low, high = pair.difference
        records.append({
            "better": pair.better, "worse": pair.worse, "difference": value, "low": low, "high": high,
            "only_better": pair.test.only_a, "only_worse": pair.test.only_b, "p": pair.test.p_value, "p_holm": pair.corrected,
            "half": found.half, "ahead_again": again, "ahead_again_macro_f1": again_f1,
        })  # fmt: skip
    return records


def draw_comparison(path: Path, found: Comparison) -> None:
    """Writes a PNG: accuracy of every run with its interval, and the difference of every pair (one at least), 0 marked."""
    import matplotlib

    matplotlib.use("Agg")  # no display
    import matplotlib.pyplot as plt

    use_fonts()
    pairs = found.pairs
    heights = [len(found.rows) + 1, len(pairs) + 1]
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(WIDTH, 1.6 + 0.4 * sum(heights)), layout="constrained", gridspec_kw={"height_ratios": heights}
    )
    for place, row in enumerate(reversed(found.rows)):
        accuracy = row.metrics["all"].accuracy
        low, high = accuracy.low or 0.0, accuracy.high or 0.0
        top.errorbar(
            accuracy.value,
            place,
            xerr=[[accuracy.value - low], [high - accuracy.value]],
            fmt="o",
            capsize=3,
            color="C0",
        )
    for row, style in zip(found.baselines, (":", "--"), strict=False):  # the second may be missing
        guess = row.metrics["all"].accuracy.value
        top.axvline(guess, color="gray", linestyle=style, label=f"{row.name}, {guess:.3f}")
    top.set(
        xlabel=f"accuracy on {len(found.judged.questions)} questions, 95 % interval", ylim=(-0.6, len(found.rows) - 0.4)
    )
    top.set_yticks(range(len(found.rows)), [row.name for row in reversed(found.rows)])
    top.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)  # above: inside it reads as one more interval
    for place, pair in enumerate(reversed(pairs)):
        value, low, high = pair.difference
        sure = pair.corrected < 0.05
        bottom.errorbar(
            value, place, xerr=[[value - low], [high - value]], fmt="o", capsize=3, color="C0" if sure else "C7"
        )
    bottom.axvline(0.0, color="gray", linewidth=1)
    bottom.set(
        xlabel="difference in accuracy, 95 % interval; grey: p >= 0.05 after Holm",
        ylim=(-0.6, len(pairs) - 0.4),
    )
    bottom.set_yticks(range(len(pairs)), [f"{pair.better} - {pair.worse}" for pair in reversed(pairs)])
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)
