"""Predictions: the probability CSV and the submission CSV; write, read, validate, join by id.

A probability file has the columns `id,answer,prob_1..prob_5`; a choice that the row does not have is an empty cell. A
submission has `id,answer`. In both, `answer` is the prediction, counted from 1; it is never the gold answer.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ksat.errors import InputError, bad_rows
from ksat.files import Outputs, csv_writer, require_name, text_writer, to_json, write_atomic
from ksat.questions import (
    MAX_CHOICES,
    MIN_CHOICES,
    Question,
    is_missing,
    read_questions,
    read_table,
    require_columns,
    require_unique_ids,
)

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

PROB_COLUMNS = tuple(f"prob_{number}" for number in range(1, MAX_CHOICES + 1))
SUM_TOLERANCE = 1e-6
SUBMISSIONS = Path("submissions")


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """Probabilities of each question's choices, in the order of a test file.

    Attributes:
        ids: the N question ids, each once.
        probs: (N, 5), in [0, 1]; NaN where a question has no such choice. A row's choices stand first, at least two of
            them, and sum to 1 within 1e-6.

    Raises:
        ValueError: the caller broke one of these rules.
    """

    ids: tuple[str, ...]
    probs: FloatArray

    def __post_init__(self) -> None:
        if self.probs.shape != (len(self.ids), MAX_CHOICES):
            raise ValueError(f"probs has shape {self.probs.shape}, expected {(len(self.ids), MAX_CHOICES)}")
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("an id stands twice")
        for i, row_id in enumerate(self.ids):
            if fault := _row_fault(self.probs[i]):
                raise ValueError(f"id {row_id!r}: the probabilities {fault[0]}: {fault[1]}")

    @property
    def answers(self) -> IntArray:
        """(N,) the most probable choice, counted from 1; of equals the lowest number."""
        return predicted_answers(self.probs)

    @property
    def num_choices(self) -> IntArray:
        """(N,) how many choices each question has, 2 to 5."""
        return count_choices(self.probs)


def predicted_answers(probs: FloatArray) -> IntArray:
    """(N,) the most probable choice of each row of (N, 5), counted from 1; of equals the lowest number."""
    best: IntArray = np.argmax(np.where(np.isnan(probs), -1.0, probs), axis=1)
    return best + 1


def count_choices(probs: FloatArray) -> IntArray:
    """(N,) the number of choices of each row of (N, 5), which is NaN where there is none."""
    counts: IntArray = np.sum(~np.isnan(probs), axis=1)
    return counts


def sizes_and_answers(questions: Sequence[Question]) -> tuple[IntArray, IntArray]:
    """(n,) the number of choices and (n,) the answer, from 1, of each labelled question; others are passed over."""
    pairs = [(question.num_choices, question.answer) for question in questions if question.answer is not None]
    sizes, answers = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return sizes, answers


@dataclass(frozen=True, slots=True)
class SubmissionPaths:
    """Where a submission goes: beside it the probabilities, and the report that marks the three as complete.

    Attributes:
        probs: NAME.probs.csv.
        submission: NAME.csv.
        report: NAME.probs.json.
    """

    probs: Path
    submission: Path
    report: Path

    @property
    def all(self) -> tuple[Path, Path, Path]:
        """In the order in which they are written."""
        return self.probs, self.submission, self.report


def output_stem(out: str | Path) -> Path:
    """The path of --out without an ending: a name ('blend' goes to submissions/) or a path ('runs/blend').

    Raises:
        InputError: its last part is no name for a file.
    """
    text = re.sub(r"(\.probs)?\.csv$", "", str(out))
    folder, slash, name = text.rpartition("/")
    require_name("--out", name)
    return Path(folder or "/") / name if slash else SUBMISSIONS / name


def submission_paths(out: str | Path) -> SubmissionPaths:
    """Where --out's files go; .csv and .probs.csv are taken off.

    Raises:
        InputError: no name in it.
    """
    stem = output_stem(out)
    probs, submission, report = (stem.with_name(f"{stem.name}.{kind}") for kind in ("probs.csv", "csv", "probs.json"))
    return SubmissionPaths(probs, submission, report)


def write_predictions(
    outputs: Outputs,
    predictions: Predictions,
    report: Mapping[str, Any],
    before_done: Callable[[], None] = lambda: None,
) -> None:
    """Writes probabilities, submission and, last, the report; if one can't be written, none is.

    Args:
        outputs: the three files, claimed.
        predictions: in the test file's order.
        report: what they were made of.
        before_done: see Outputs.write.

    Raises:
        InputError: the disk is full or the folder can't be written.
    """
    rows = [[row_id, str(int(answer))] for row_id, answer in zip(predictions.ids, predictions.answers, strict=True)]
    writers = [probs_writer(predictions), csv_writer(("id", "answer"), rows), text_writer(to_json(report))]
    outputs.write(writers, before_done)


def probs_writer(predictions: Predictions) -> Callable[[Path], None]:
    """Fills a file with `id,answer,prob_1..prob_5`; every float reads back as the same float."""
    rows = [
        [row_id, str(answer), *("" if np.isnan(prob) else repr(float(prob)) for prob in probs)]
        for row_id, answer, probs in zip(predictions.ids, predictions.answers, predictions.probs, strict=True)
    ]
    return csv_writer(("id", "answer", *PROB_COLUMNS), rows)


def write_probs(path: Path, predictions: Predictions) -> None:
    """Writes a probability file atomically.

    Raises:
        InputError: the disk is full or the folder can't be written.
    """
    write_atomic(path, probs_writer(predictions))


def is_probability_table(table: pd.DataFrame) -> bool:
    """Whether a table has a probability column, so that its `answer` is a prediction."""
    return any(str(name).startswith("prob_") for name in table.columns)


def is_competition_table(table: pd.DataFrame) -> bool:
    """Whether a table holds questions (either dialect), not only ids and answers."""
    return "problems" in table.columns or "choices" in table.columns


def read_probs(path: Path | str) -> Predictions:
    """The predictions of a probability CSV, in file order, exactly as written (nothing is renormalised).

    Raises:
        InputError: a column is missing, an id empty or doubled; or a row's probabilities are not numbers in [0, 1], do
            not sum to 1 within 1e-6, leave a gap or fewer than two choices; or `answer` is not the most probable one.
    """
    table = read_table(path)
    require_columns(table, path, ["id", "answer", *PROB_COLUMNS])
    if extra := [name for name in table.columns if name.startswith("prob_") and name not in PROB_COLUMNS]:
        raise InputError(f"{path}: unknown column {extra[0]!r}; expected {PROB_COLUMNS[0]} to {PROB_COLUMNS[-1]}")
    ids = _ids(table, path)
    probs = np.full((len(ids), MAX_CHOICES), np.nan)
    faults: dict[str, list[tuple[str, str]]] = {}
    for i, cells in enumerate(table[list(PROB_COLUMNS)].itertuples(index=False)):
        try:
            probs[i] = [_number(cell) for cell in cells]
            fault = _row_fault(probs[i])
        except ValueError as error:
            fault = ("are not numbers", str(error))
        if fault:
            faults.setdefault(fault[0], []).append((ids[i], fault[1]))
    if faults:
        rule, bad = next(iter(faults.items()))
        raise bad_rows(path, f"have probabilities that {rule}", bad, "write the file again with inference.py")
    written, expected = [value.strip() for value in table["answer"]], predicted_answers(probs)
    pairs = zip(ids, written, expected, strict=True)
    if differing := [(i, f"{found!r}, most probable is {best}") for i, found, best in pairs if found != str(best)]:
        raise bad_rows(
            path,
            "have an answer that is not the most probable choice",
            differing,
            "in a probability file it is the prediction (of equals the lowest number), never the gold answer",
        )
    return Predictions(tuple(ids), probs)


def _number(cell: str) -> float:
    """A cell's number, NaN for an empty one; 'nan' and '1_0', which float() takes, are not numbers here."""
    text = cell.strip()
    if not text:
        return float("nan")
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text, re.ASCII):
        raise ValueError(repr(cell))
    return float(text)


def _row_fault(probs: FloatArray) -> tuple[str, str] | None:
    """What is wrong with one row's probabilities (5,): (the rule it breaks, what was found), or None."""
    there = ~np.isnan(probs)
    count = int(there.sum())
    if not there[:count].all():
        return "leave a gap between the choices", f"choices {', '.join(str(i + 1) for i in np.flatnonzero(there))}"
    if count < MIN_CHOICES:
        return "stand for fewer than two choices", str(count)
    own = probs[:count]
    if not ((own >= 0) & (own <= 1)).all():
        return "lie outside 0 to 1", ", ".join(repr(float(value)) for value in own if not 0 <= value <= 1)
    total = float(own.sum())
    if abs(total - 1) > SUM_TOLERANCE:
        return "do not sum to 1 within 1e-6", repr(total)
    return None


def read_labels(path: Path | str) -> dict[str, int]:
    """Answers by id of a label-only CSV (`id,answer`: a submission, or a list of gold answers), in file order.

    Raises:
        InputError: a probability file or questions instead of labels, probabilities under other names, a column missing, an id
            empty or doubled, or an answer that is not an integer from 1 to 5.
    """
    table = read_table(path)
    if is_probability_table(table):
        raise InputError(f"{path}: a probability file where only `id,answer` is expected; its answers are predictions")
    if is_competition_table(table):
        raise InputError(f"{path}: a file of questions where only `id,answer` is expected; give predictions")
    require_columns(table, path, ["id", "answer"])
    _require_no_foreign_probs(table, path)
    return dict(zip(_ids(table, path), _integers(table, path, list(table["id"])), strict=True))


def _require_no_foreign_probs(table: pd.DataFrame, path: Path | str) -> None:
    """Raises InputError for probabilities or scores of the choices under other names: beside them `answer` may be the gold answer.

    The cells tell them, since every toolkit has names of its own: columns of numbers, one after the other, that add up to 1 (or to 100)
    in every row, two columns of fractions, or one of lists. A comment, an index or one number is nothing of that kind.
    """
    leave_out = "or leave them out if the answers alone are meant"
    columns: list[tuple[str, list[float]]] = []
    for name, cells in table.items():
        if name in ("id", "answer"):
            continue
        if _are_lists(cells):
            raise InputError(
                f"{path}: column {name!r} holds a list of numbers in every cell; if they are probabilities of the choices, write them as "
                f"{_ALL_PROBS}, one column a choice (of scores their softmax), and let 'answer' be the most probable choice; {leave_out}"
            )
        if numbers := _foreign_numbers(cells):
            columns.append((str(name), numbers))
    if found := _adding_up(columns):
        names, total = found
        renamed = ", ".join(f"{name!r} to {prob!r}" for name, prob in zip(names, PROB_COLUMNS, strict=False))
        absent = PROB_COLUMNS[len(names) :]
        raise InputError(
            f"{path}: columns that look like probabilities under other names, since they add up to {total} in every row; "
            + ("divide them by 100, " if total == 100 else "")
            + f"rename {renamed}, "
            + (f"add {' and '.join(map(repr, absent))} with empty cells, " if absent else "")
            + f"and let 'answer' be the most probable choice; {leave_out}"
        )
    fractions = [name for name, numbers in columns if any(number % 1 > 0 for number in numbers)]
    if len(fractions) >= MIN_CHOICES:
        raise InputError(
            f"{path}: columns {', '.join(map(repr, fractions))} hold numbers that do not add up to 1; if they are scores of the choices, "
            f"write their softmax as {_ALL_PROBS}, and let 'answer' be the most probable choice; {leave_out}"
        )


_ALL_PROBS = f"{PROB_COLUMNS[0]!r} to {PROB_COLUMNS[-1]!r}"
_ROUNDED = 0.03  # how far from 1 five numbers of two decimals may add up
_FRACTION = r"[-+]?\d*\.\d+(?:[eE][-+]?\d+)?"
# As Python, JSON, numpy and torch print them; "2024. 1. 2." is a date, and in brackets a word of Korean makes it a comment.
_LIST = re.compile(rf"\s*(?:[a-zA-Z.]*\(?[\[({{][^가-힣]*[\])}}]|{_FRACTION}(?:[,;|\s]+{_FRACTION})+)\s*")


def _are_lists(cells: "pd.Series[str]") -> bool:
    """Whether every cell with anything in it is a list of numbers, at least two of them with a decimal point."""
    filled = [cell for cell in cells if not is_missing(cell)]
    return bool(filled) and all(
        _LIST.fullmatch(cell) and len(re.findall(r"\d\.|\.\d", cell)) >= MIN_CHOICES for cell in filled
    )


def _foreign_numbers(cells: "pd.Series[str]") -> list[float]:
    """A column's numbers, NaN for a cell without one; an empty list where another cell stands there, or no number at all."""
    texts = [cell.strip().removesuffix("%") for cell in cells]
    try:
        numbers = [_number("" if is_missing(text) else text) for text in texts]
    except ValueError:
        return []
    return [] if all(map(math.isnan, numbers)) else numbers


def _adding_up(columns: Sequence[tuple[str, Sequence[float]]]) -> tuple[list[str], int] | None:
    """The names of the most columns one after the other, at most five, that add up to 1 in every row with a number, or to 100; to which."""
    for size in range(min(MAX_CHOICES, len(columns)), MIN_CHOICES - 1, -1):
        for first in range(len(columns) - size + 1):
            some = columns[first : first + size]
            cells = np.array([numbers for _, numbers in some])
            totals = np.nansum(cells, axis=0)[~np.isnan(cells).all(axis=0)]
            for total in (1, 100):
                if np.nanmin(cells) >= 0 and (abs(totals - total) <= _ROUNDED * total).all():
                    return [name for name, _ in some], total
    return None


def read_answers(path: Path | str) -> dict[str, int]:
    """Gold answers by id, counted from 1, of an `id,answer` CSV or a labelled competition CSV.

    Raises:
        InputError: a probability file (its answers are predictions), a row without an answer, or see read_labels.
    """
    table = read_table(path)
    if is_probability_table(table):
        raise InputError(
            f"{path}: a probability file; its 'answer' is a prediction, never the gold answer; give another"
        )
    if is_competition_table(table):
        return {question.id: question.answer_index + 1 for question in read_questions(path, labelled=True)}
    return read_labels(path)


def align_answers(predictions: Predictions, answers: Mapping[str, int], path: Path | str) -> IntArray:
    """(N,) the gold answer of each prediction, counted from 1, joined by id; answers to other questions are left out.

    Args:
        predictions: of N questions.
        answers: by id, from read_answers.
        path: where the answers come from, for the message.

    Raises:
        InputError: an id has no answer, or an answer that its question's choices do not reach.
    """
    if missing := [(row_id, "") for row_id in predictions.ids if row_id not in answers]:
        raise bad_rows(path, "of the predictions are missing", missing, "answers must cover every predicted id")
    gold = [answers[row_id] for row_id in predictions.ids]
    rows = zip(predictions.ids, gold, predictions.num_choices, strict=True)
    if bad := [(row_id, f"{answer} of {count}") for row_id, answer, count in rows if not 1 <= answer <= count]:
        raise bad_rows(
            path, "have an answer beyond the predicted number of choices", bad, "are they the same questions?"
        )
    return np.array(gold, dtype=np.int64)


def check_submission(path: Path | str, questions: Sequence[Question]) -> dict[str, int]:
    """Answers by id of a submission that the leaderboard would take: every question once, in order, in range.

    Args:
        path: the submission, `id,answer`.
        questions: of the test file.

    Raises:
        InputError: other columns, an id doubled, missing or unknown, another order, not an integer, out of range.
    """
    table = read_table(path)
    if list(table.columns) != ["id", "answer"]:
        raise InputError(f"{path}: columns {', '.join(table.columns)}; a submission has exactly id, answer")
    ids, expected = list(table["id"]), [question.id for question in questions]
    require_unique_ids(ids, path)
    given, wanted = set(ids), set(expected)
    if missing := [(row_id, "") for row_id in expected if row_id not in given]:
        raise bad_rows(path, "of the test are missing", missing, "a submission answers every test question")
    if unknown := [(row_id, "") for row_id in ids if row_id not in wanted]:
        raise bad_rows(path, "have an id that the test has not", unknown, "is it another test's submission?")
    places = enumerate(zip(ids, expected, strict=True), start=1)
    if moved := [(found, f"in row {i}, where the test has {want!r}") for i, (found, want) in places if found != want]:
        raise bad_rows(path, "are not in the test's order", moved, "sort the rows as the test file has them")
    answers = _integers(table, path, ids, with_blanks=False)
    rows = zip(questions, answers, strict=True)
    if bad := [(q.id, f"{answer} of {q.num_choices}") for q, answer in rows if answer > q.num_choices]:
        raise bad_rows(path, "have an answer out of range", bad, "answers go from 1 to the row's number of choices")
    return dict(zip(ids, answers, strict=True))


def _ids(table: pd.DataFrame, path: Path | str) -> list[str]:
    ids = [str(value).strip() for value in table["id"]]
    require_unique_ids(ids, path)
    return ids


def _integers(table: pd.DataFrame, path: Path | str, ids: Sequence[Any], *, with_blanks: bool = True) -> list[int]:
    """The column `answer` as integers from 1 to 5; '3.0' is refused, as the leaderboard would, and may be ' 3'."""
    cells = [str(value).strip() if with_blanks else str(value) for value in table["answer"]]
    pairs = zip(ids, cells, strict=True)
    if bad := [(str(row_id), repr(cell)) for row_id, cell in pairs if not re.fullmatch(f"[1-{MAX_CHOICES}]", cell)]:
        raise bad_rows(path, "have an answer that is not an integer from 1 to 5", bad, "write one of the digits 1 to 5")
    return [int(cell) for cell in cells]
