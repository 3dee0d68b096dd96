"""submissions/log.csv: what was submitted, what it scored out of fold, and what the leaderboard said.

A file that was submitted is known by its bytes, so nothing is submitted twice under another name; and the more rows have both
scores, the better is seen whether the leaderboard follows the out-of-fold score at all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ksat.errors import InputError
from ksat.files import csv_writer, file_sha256, lock, read_json, read_text, write_atomic
from ksat.questions import read_csv_rows, require_columns
from ksat.tables import markdown_table

FEWEST_FOR_CORRELATION = 5


@dataclass(frozen=True, slots=True)
class Submission:
    """A row of the log; scores are shares from 0 to 1, None where they are not known.

    Attributes:
        time: of its entry, UTC, to the second.
        file: the submission as it was named.
        sha256: of its bytes.
        members: what it was made of, as the report beside it says; "" if there is none.
        oof_accuracy: out of fold, of the same members blended in the same way.
        oof_macro_f1: out of fold.
        public: what the leaderboard said.
        private: what it said in the end.
        others: the cells of the columns that the user has added, kept as they stand.
    """

    time: str
    file: str
    sha256: str
    members: str = ""
    oof_accuracy: float | None = None
    oof_macro_f1: float | None = None
    public: float | None = None
    private: float | None = None
    others: tuple[str, ...] = ()


COLUMNS = tuple(field.name for field in fields(Submission))[:-1]
SCORES = COLUMNS[4:]


def read_log(path: Path) -> list[Submission]:
    """The rows of a log, none if there is no such file.

    Raises:
        InputError: it is no log, a column is missing, or a score is no share from 0 to 1.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Submission], list[str]]:
    """The rows of a log, and the names of the columns that are not ours."""
    if not path.exists() or not read_text(path).strip():
        return [], []
    header, *cells = read_csv_rows(path)
    require_columns(pd.DataFrame(columns=header), path, COLUMNS)
    other_places = [i for i, name in enumerate(header) if name not in COLUMNS]
    rows = []
    for row in cells:
        cell = dict(zip(header, row, strict=True))
        ours: dict[str, Any] = {
            name: _share(cell[name], f"{path}: {name} of {cell['file']}") if name in SCORES else cell[name]
            for name in COLUMNS
        }
        rows.append(Submission(**ours, others=tuple(row[i] for i in other_places)))
    return rows, [header[i] for i in other_places]


def _share(cell: str, where: str) -> float | None:
    text = cell.strip()
    if not text:
        return None
    if not re.fullmatch(r"0(\.[0-9]+)?|1(\.0+)?", text):
        raise InputError(f"{where} is {cell!r}; expected a share from 0 to 1, or nothing")
    return float(text)


def enter(path: Path, submission: Path, scores: dict[str, float | None]) -> tuple[Submission, bool]:
    """Notes a submission, or scores of one that is noted already; returns its row and whether it is new.

    Args:
        path: of the log.
        submission: `id,answer`.
        scores: by the names of SCORES; None leaves what is known.

    Raises:
        InputError: the same answers were submitted before under another name, and no score is given to enter; or a score that
            contradicts the one that is noted.
    """
    with lock(path, "log", wait=60.0):
        return _enter(path, submission, scores)


def _enter(path: Path, submission: Path, scores: dict[str, float | None]) -> tuple[Submission, bool]:
    (rows, other_names), digest = _read(path), file_sha256(submission)
    given: dict[str, Any] = {name: score for name, score in scores.items() if score is not None}
    known = next((row for row in rows if row.sha256 == digest), None)
    if known is None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        row = Submission(now, str(submission), digest, _members(submission), **given, others=("",) * len(other_names))
        _write(path, [*rows, row], other_names)
        return row, True
    if not given:
        raise InputError(
            f"{submission}: the same answers were submitted on {known.time} as {known.file}; do not spend a submission on them "
            "(give --public to enter their score)"
        )
    for name, score in given.items():
        if (old := getattr(known, name)) is not None and abs(old - score) > 1e-9:
            raise InputError(
                f"{path}: {name} of {known.file} is {old:g}, not {score:g}; correct the file by hand if that is wrong"
            )
    row = replace(known, **given)
    _write(path, [row if each is known else each for each in rows], other_names)
    return row, False


def _members(submission: Path) -> str:
    """What the report beside a submission says it was made of."""
    report = submission.with_name(f"{submission.stem}.probs.json")
    if not report.exists():
        return ""
    value = read_json(report)
    members, base, adapter = (value.get(name) for name in ("members", "base", "adapter_sha256"))
    if members is not None:
        is_blend = isinstance(members, list) and all(
            isinstance(member, dict)
            and isinstance(member.get("file"), str)
            and type(member.get("weight")) in (int, float)
            for member in members
        )
        if not is_blend:
            raise InputError(
                f"{report}: its members are not those of a blend; it was edited: move it away, and log the file without it"
            )
        return " + ".join(f"{member['weight']:.3f} {member['file']}" for member in members)
    if not (isinstance(base, str | None) and isinstance(adapter, str | None)):
        raise InputError(
            f"{report}: names no base or no adapter; it was edited: move it away, and log the file without it"
        )
    return f"{base or ''}{f' with adapter {adapter[:12]}' if adapter else ' untuned'}"


def _write(path: Path, rows: Sequence[Submission], other_names: Sequence[str]) -> None:
    table = [[*COLUMNS, *other_names], *([*_cells(row), *row.others] for row in rows)]
    # A note may hold a lone carriage return, as Excel on a Mac writes it.
    write_atomic(path, csv_writer(table[0], table[1:], quote_all=any("\r" in cell for row in table for cell in row)))


def _cells(row: Submission) -> list[str]:
    values = (getattr(row, name) for name in COLUMNS)
    return ["" if value is None else str(value) for value in values]


def log_table(rows: Sequence[Submission]) -> str:
    """The log as a table, and how far the public score follows the out-of-fold one."""
    header = ["submission", "members", "oof accuracy", "oof macro F1", "public", "private"]
    body = [
        [Path(row.file).name, row.members, *("-" if (score := getattr(row, name)) is None else f"{score:.4f}" for name in SCORES)]
        for row in rows
    ]  # fmt: skip
    return f"{markdown_table(header, body, num_texts=2)}\n\n{correlation(rows)}"


def correlation(rows: Sequence[Submission]) -> str:
    """One sentence: the rank correlation of public and out-of-fold accuracy, with what it is worth."""
    from scipy.stats import spearmanr

    pairs = [(row.oof_accuracy, row.public) for row in rows if row.oof_accuracy is not None and row.public is not None]
    if len(pairs) < FEWEST_FOR_CORRELATION:
        return (
            f"{len(pairs)} of the submissions have both an out-of-fold and a public score; {FEWEST_FOR_CORRELATION} are the least that a "
            "correlation says anything about."
        )
    oof, public = np.array(pairs, dtype=float).T
    if len(set(oof)) < 2 or len(set(public)) < 2:
        return f"{len(pairs)} submissions have both scores, all the same: no correlation to speak of."
    found = spearmanr(oof, public)
    worth = "it follows" if found.pvalue < 0.05 and found.statistic > 0 else "not distinguishable from chance"
    return (
        f"public against out-of-fold accuracy, {len(pairs)} submissions: Spearman {found.statistic:+.2f} (p = {found.pvalue:.2g}; "
        f"{worth})."
    )
