"""The log of submissions: nothing twice, scores that come later, and what the leaderboard has to do with out-of-fold scores."""

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from ksat.errors import InputError
from ksat.files import write_json
from ksat.submission_log import Submission, correlation, enter, log_table, read_log

NONE = {"oof_accuracy": None, "oof_macro_f1": None, "public": None, "private": None}


def submission(folder: Path, name: str, text: str = "id,answer\na,1\n") -> Path:
    path = folder / f"{name}.csv"
    path.write_text(text)
    return path


def test_a_submission_is_entered_once_and_scored_later(tmp_path: Path) -> None:
    log, first = tmp_path / "log.csv", submission(tmp_path, "first")
    assert read_log(log) == []
    row, is_new = enter(log, first, NONE | {"oof_accuracy": 0.71})
    assert is_new
    assert (row.file, row.oof_accuracy, row.public, row.members) == (str(first), 0.71, None, "")
    again = submission(tmp_path, "renamed")
    with pytest.raises(InputError, match="the same answers were submitted on 20.* as .*first.csv; do not spend"):
        enter(log, again, NONE)
    row, is_new = enter(log, again, NONE | {"public": 0.75})
    assert not is_new
    assert read_log(log) == [row]
    assert (row.file, row.oof_accuracy, row.public) == (str(first), 0.71, 0.75)
    with pytest.raises(InputError, match=r"public of .*first.csv is 0.75, not 0.8; correct the file"):
        enter(log, first, NONE | {"public": 0.8})
    enter(log, submission(tmp_path, "other", "id,answer\na,2\n"), NONE)
    assert [Path(row.file).stem for row in read_log(log)] == ["first", "other"]


def test_members_come_from_the_report_beside_it(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    blend, run, bare = (
        submission(tmp_path, name, f"id,answer\na,{n}\n") for n, name in enumerate(("blend", "run", "bare"), 1)
    )
    members = [{"file": "a.probs.csv", "weight": 0.75}, {"file": "b, c.probs.csv", "weight": 0.25}]
    write_json(tmp_path / "blend.probs.json", {"members": members})
    write_json(tmp_path / "run.probs.json", {"base": "x/y", "adapter_sha256": "abcdef0123456789"})
    write_json(tmp_path / "bare.probs.json", {"base": "x/y", "adapter_sha256": None})
    for path in (blend, run, bare):
        enter(log, path, NONE)
    assert [row.members for row in read_log(log)] == [
        "0.750 a.probs.csv + 0.250 b, c.probs.csv", "x/y with adapter abcdef012345", "x/y untuned"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "report",
    [
        {"members": [{"file": "x"}]}, {"members": 3}, {"members": {"file": "x"}}, {"members": [{"file": "x", "weight": "1"}]},
        {"members": [{"file": None, "weight": 1.0}]}, {"adapter_sha256": 5}, {"base": 5},
    ],
)  # fmt: skip
def test_an_edited_report_is_named(tmp_path: Path, report: dict[str, Any]) -> None:
    path = submission(tmp_path, "a")
    write_json(tmp_path / "a.probs.json", report)
    with pytest.raises(InputError, match=r"a.probs.json: .* it was edited: move it away"):
        enter(tmp_path / "log.csv", path, NONE)
    assert not (tmp_path / "log.csv").exists()


@pytest.mark.parametrize("cell", ["0.٣", "71", "0,7", "-0.1", "nan", "1.01"])
def test_a_score_that_is_no_share_is_refused(tmp_path: Path, cell: str) -> None:
    log = tmp_path / "log.csv"
    enter(log, submission(tmp_path, "a"), NONE)
    log.write_text(log.read_text().replace(",,,", f',,"{cell}",'))
    with pytest.raises(InputError, match="expected a share from 0 to 1"):
        read_log(log)


def test_a_log_saved_with_other_line_ends_keeps_its_rows(tmp_path: Path) -> None:
    """Excel's "CSV (Macintosh)" ends lines with CR alone: the log was taken for an empty one, and written over."""
    log = tmp_path / "log.csv"
    entered = [enter(log, submission(tmp_path, f"s{n}", f"id,answer\na,{n}\n"), NONE)[0] for n in (1, 2)]
    for end in (b"\r", b"\r\n"):
        log.write_bytes(log.read_bytes().replace(b"\n", end))
        assert read_log(log) == entered
        entered.append(enter(log, submission(tmp_path, "next", f"id,answer\na,3\n{end!r},1\n"), NONE)[0])
        assert read_log(log) == entered


@pytest.mark.parametrize("text", ["my notes: do not delete", "my notes\n", "time,file\n", "a,b\r1,2\r"])
def test_a_file_that_is_no_log_is_kept(tmp_path: Path, text: str) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes(text.encode())
    with pytest.raises(InputError, match="log.csv: no column '.*; expected time, file, sha256, members"):
        enter(log, submission(tmp_path, "a"), NONE)
    assert log.read_bytes() == text.encode()


@pytest.mark.parametrize(
    "text", ["", "\ufeff", "\n", "time,file,sha256,members,oof_accuracy,oof_macro_f1,public,private\n"]
)
def test_a_log_without_rows_takes_the_first(tmp_path: Path, text: str) -> None:
    log = tmp_path / "log.csv"
    log.write_bytes(text.encode())
    row, is_new = enter(log, submission(tmp_path, "a"), NONE)
    assert (is_new, read_log(log)) == (True, [row])


def test_columns_that_the_user_added_are_kept(tmp_path: Path) -> None:
    """Also two without a name (Excel's trailing commas), a lone CR in a note, and a column that has no cell yet."""
    log, first = tmp_path / "log.csv", submission(tmp_path, "a")
    log.write_text("memo,time,file,sha256,members,oof_accuracy,oof_macro_f1,public,private,,\n")
    enter(log, first, NONE)
    lines = log.read_text().splitlines()
    assert lines[0] == "time,file,sha256,members,oof_accuracy,oof_macro_f1,public,private,memo,,"
    log.write_bytes(f'{lines[0]}\n{lines[1][:-2]}"my\r note",x,y\n'.encode())
    enter(log, submission(tmp_path, "b", "id,answer\na,2\n"), NONE)
    enter(log, first, NONE | {"public": 0.75})
    header, *body = csv.reader(io.StringIO(log.read_bytes().decode(), newline=""))
    assert header[-3:] == ["memo", "", ""]
    assert [row[-4:] for row in body] == [["", "my\r note", "x", "y"], ["", "", "", ""]]
    assert [row.public for row in read_log(log)] == [0.75, None]


def rows(*pairs: tuple[float | None, float | None]) -> list[Submission]:
    return [Submission("t", f"{n}.csv", str(n), "", oof, None, public) for n, (oof, public) in enumerate(pairs)]


def test_correlation_by_hand() -> None:
    assert correlation(rows((0.7, 0.8), (0.6, None), (None, 0.9))).startswith("1 of the submissions have both")
    # Ranks 1 2 3 4 5 against 2 1 3 4 5: 1 - 6 * 2 / (5 * 24) = 0.9; exact p of a t-approximation, 0.037.
    text = correlation(rows((0.1, 0.2), (0.2, 0.1), (0.3, 0.3), (0.4, 0.4), (0.5, 0.5)))
    assert "5 submissions: Spearman +0.90 (p = 0.037; it follows)" in text
    text = correlation(rows((0.1, 0.2), (0.2, 0.1), (0.3, 0.5), (0.4, 0.1), (0.5, 0.3)))
    assert "not distinguishable from chance" in text
    assert "no correlation to speak of" in correlation(rows(*[(0.5, 0.5)] * 5))


def test_the_table_names_every_submission() -> None:
    text = log_table(rows((0.7, 0.8), (None, None)))
    assert "| 0.csv" in text
    assert "| 1.csv" in text
    assert "0.7000" in text
