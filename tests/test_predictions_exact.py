"""What is said of probability files and submissions, to the last character, and what is written, to the last byte."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ksat.errors import InputError
from ksat.files import claim_outputs
from ksat.predictions import (
    Predictions,
    align_answers,
    check_submission,
    count_choices,
    is_competition_table,
    is_probability_table,
    output_stem,
    predicted_answers,
    read_answers,
    read_labels,
    read_probs,
    sizes_and_answers,
    submission_paths,
    write_predictions,
)
from ksat.questions import Question

NAN = float("nan")
HEADER = "id,answer,prob_1,prob_2,prob_3,prob_4,prob_5\n"
TWO = Predictions(("b", "a"), np.array([[0.25, 0.75, NAN, NAN, NAN], [0.5, 0.25, 0.25, NAN, NAN]]))
QUESTIONS = [Question("b", "p", "q", ("x", "y"), None), Question("a", "p", "q", ("x", "y", "z"), None)]


def said(read: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        read()
    return str(caught.value)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (
            read_probs,
            HEADER + "a,1,0.6,0.40001,,,\n",
            "1 of the rows have probabilities that do not sum to 1 within 1e-6 (id 'a': 1.00001); write the file again with inference.py",
        ),
        (
            read_probs,
            HEADER + "a,1,1.4,-0.4,,,\nb,1,0.5,0.5,,,\n",
            "1 of the rows have probabilities that lie outside 0 to 1 (id 'a': 1.4, -0.4); write the file again with inference.py",
        ),
        (
            read_probs,
            HEADER + "a,1,1,,,,\n",
            "1 of the rows have probabilities that stand for fewer than two choices (id 'a': 1); write the file again with inference.py",
        ),
        (
            read_probs,
            HEADER + "a,1,0.6,,0.4,,\n",
            "1 of the rows have probabilities that leave a gap between the choices (id 'a': choices 1, 3); write the file again with inference.py",
        ),
        (
            read_probs,
            HEADER + "a,1,0.6,x,,,\n",
            "1 of the rows have probabilities that are not numbers (id 'a': 'x'); write the file again with inference.py",
        ),
        (
            read_probs,
            HEADER + "a,2,0.6,0.4,,,\nb,1,0.6,0.4,,,\n",
            "1 of the rows have an answer that is not the most probable choice (id 'a': '2', most probable is 1); in a probability "
            "file it is the prediction (of equals the lowest number), never the gold answer",
        ),
        (
            read_labels,
            HEADER + "a,1,0.6,0.4,,,\n",
            "a probability file where only `id,answer` is expected; its answers are predictions",
        ),
        (
            read_labels,
            "id,choices\na,1\n",
            "a file of questions where only `id,answer` is expected; give predictions",
        ),
        (
            read_labels,
            "id,answer\na,6\n",
            "1 of the rows have an answer that is not an integer from 1 to 5 (id 'a': '6'); write one of the digits 1 to 5",
        ),
        (
            read_labels,
            "id,answer\na,1\na,2\n",
            "1 of the rows repeat an id that stands above (id 'a'); keep one of each",
        ),
        (
            read_labels,
            "id,answer,p1,P_2,p3,p4\na,1,0.5,0.3,0.1,0.1\n",
            "columns that look like probabilities under other names, since they add up to 1 in every row; rename 'p1' to 'prob_1', 'P_2' to "
            "'prob_2', 'p3' to 'prob_3', 'p4' to 'prob_4', add 'prob_5' with empty cells, and let 'answer' be the most probable choice; or "
            "leave them out if the answers alone are meant",
        ),
        (
            read_labels,
            "id,answer,a,b\nx,1,30,70\n",
            "columns that look like probabilities under other names, since they add up to 100 in every row; divide them by 100, rename 'a' to "
            "'prob_1', 'b' to 'prob_2', add 'prob_3' and 'prob_4' and 'prob_5' with empty cells, and let 'answer' be the most probable "
            "choice; or leave them out if the answers alone are meant",
        ),
        (
            read_labels,
            "id,answer,a,b\nx,1,-0.5,0.5\n",
            "columns 'a', 'b' hold numbers that do not add up to 1; if they are scores of the choices, write their softmax as 'prob_1' to "
            "'prob_5', and let 'answer' be the most probable choice; or leave them out if the answers alone are meant",
        ),
        (
            read_labels,
            'id,answer,all\nx,1,"[0.5, 0.5]"\n',
            "column 'all' holds a list of numbers in every cell; if they are probabilities of the choices, write them as 'prob_1' to 'prob_5', "
            "one column a choice (of scores their softmax), and let 'answer' be the most probable choice; or leave them out if the answers "
            "alone are meant",
        ),
        (
            read_probs,
            "id,prob_1\na,1\n",
            "no column 'answer', 'prob_2', 'prob_3', 'prob_4', 'prob_5'; found 'id', 'prob_1'; expected id, answer, prob_1, prob_2, "
            "prob_3, prob_4, prob_5",
        ),
        (
            read_probs,
            HEADER + "a,1,0.6,0.4,,,\na,1,0.6,0.4,,,\n",
            "1 of the rows repeat an id that stands above (id 'a'); keep one of each",
        ),
        (
            read_probs,
            HEADER + "a,1,1.5,0.0,1.0,-1.5,\n",
            "1 of the rows have probabilities that lie outside 0 to 1 (id 'a': 1.5, -1.5); write the file again with inference.py",
        ),
        (
            read_probs,
            HEADER + "a,1,1.5,0.5,,,\n",
            "1 of the rows have probabilities that lie outside 0 to 1 (id 'a': 1.5); write the file again with inference.py",
        ),
        (read_labels, "id,label\na,6\n", "no column 'answer'; found 'id', 'label'; expected id, answer"),
        (
            read_answers,
            HEADER + "a,1,0.6,0.4,,,\n",
            "a probability file; its 'answer' is a prediction, never the gold answer; give another",
        ),
    ],
)
def test_what_is_said_of_a_file(tmp_path: Path, read: Callable[[Path], object], text: str, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    assert said(lambda: read(path)) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "id,answer\nb,2\n",
            "1 of the rows of the test are missing (id 'a'); a submission answers every test question",
        ),
        (
            "id,answer\nb,2\na,1\nd,1\n",
            "1 of the rows have an id that the test has not (id 'd'); is it another test's submission?",
        ),
        (
            "id,answer\nb,2\nb,2\n",
            "1 of the rows repeat an id that stands above (id 'b'); keep one of each",
        ),
        ("id,answer,\nb,2,\na,1,\n", "columns id, answer, ; a submission has exactly id, answer"),
        (
            "id,answer\nb, 2\na,1\n",
            "1 of the rows have an answer that is not an integer from 1 to 5 (id 'b': ' 2'); write one of the digits 1 to 5",
        ),
        (
            "id,answer\na,1\nb,2\n",
            "2 of the rows are not in the test's order (first id 'a': in row 1, where the test has 'b'; id 'b': in row 2, where the "
            "test has 'a'); sort the rows as the test file has them",
        ),
        (
            "id,answer\nb,3\na,3\n",
            "1 of the rows have an answer out of range (id 'b': 3 of 2); answers go from 1 to the row's number of choices",
        ),
    ],
)
def test_what_is_said_of_a_submission(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text, encoding="utf-8")
    assert said(lambda: check_submission(path, QUESTIONS)) == f"{path}: {message}"


def test_what_is_said_of_answers_that_do_not_fit() -> None:
    assert said(lambda: align_answers(TWO, {"b": 1}, "gold.csv")) == (
        "gold.csv: 1 of the rows of the predictions are missing (id 'a'); answers must cover every predicted id"
    )
    assert said(lambda: align_answers(TWO, {"b": 3, "a": 0}, "gold.csv")) == (
        "gold.csv: 2 of the rows have an answer beyond the predicted number of choices (first id 'b': 3 of 2; id 'a': 0 of 3); "
        "are they the same questions?"
    )
    aligned = align_answers(TWO, {"a": 3, "b": 2, "other": 9}, "gold.csv")
    assert (aligned.tolist(), aligned.dtype) == ([2, 3], np.int64)


def test_what_a_bug_is_told() -> None:
    with pytest.raises(ValueError, match=r"^probs has shape \(1, 2\), expected \(1, 5\)$"):
        Predictions(("a",), np.array([[0.5, 0.5]]))
    with pytest.raises(ValueError, match=r"^an id stands twice$"):
        Predictions(("a", "a"), np.tile(TWO.probs[:1], (2, 1)))
    with pytest.raises(ValueError, match=r"^id 'a': the probabilities do not sum to 1 within 1e-6: 0.5$"):
        Predictions(("b", "a"), np.array([TWO.probs[0], [0.25, 0.25, NAN, NAN, NAN]]))


@pytest.mark.parametrize(
    ("total", "fits"), [(1 + 0.9e-6, True), (1 + 1.1e-6, False), (1 - 0.9e-6, True), (1 - 1.1e-6, False)]
)
def test_a_row_sums_to_one_within_a_millionth(total: float, fits: bool) -> None:
    probs = np.array([[0.5, total - 0.5, NAN, NAN, NAN]])
    if fits:
        assert Predictions(("a",), probs).answers.tolist() == [1 + (total > 1)]
    else:
        with pytest.raises(ValueError, match="do not sum"):
            Predictions(("a",), probs)


@pytest.mark.parametrize(
    ("cell", "value"),
    [("1", 1), ("+1", 1), ("1.", 1), ("1.0", 1), (" 1e0 ", 1), ("10E-1", 1), ("1e+0", 1), (".1e1", 1), ("0.01e02", 1)],
)
def test_numbers_as_they_are_written(tmp_path: Path, cell: str, value: float) -> None:
    (tmp_path / "x.csv").write_text(f"{HEADER}a,1,{cell},0,,,\n")
    assert read_probs(tmp_path / "x.csv").probs[0, 0] == value


@pytest.mark.parametrize("cell", ["1_0", "０.5", "1e", "e1", ".", "+", "0x1", "1 0", "1,0", "--1"])
def test_what_float_would_take_and_nobody_means(tmp_path: Path, cell: str) -> None:
    (tmp_path / "x.csv").write_text(f'{HEADER}a,1,"{cell}",0,,,\n', encoding="utf-8")
    assert f"are not numbers (id 'a': {cell!r})" in said(lambda: read_probs(tmp_path / "x.csv"))


def test_answers_and_counts_of_a_table() -> None:
    probs = np.array([[0.0, 0.0, NAN, NAN, NAN], [0.2, 0.4, 0.4, NAN, NAN], [0.1, 0.1, 0.1, 0.1, 0.6]])
    assert predicted_answers(probs).tolist() == [1, 2, 5]
    assert count_choices(probs).tolist() == [2, 3, 5]


def test_sizes_and_answers_are_of_labelled_questions() -> None:
    questions = [
        replace(question, answer=answer)
        for question, answer in zip([*QUESTIONS, QUESTIONS[0]], (2, None, 1), strict=True)
    ]
    sizes, answers = sizes_and_answers(questions)
    assert (sizes.tolist(), answers.tolist(), answers.dtype) == ([2, 2], [2, 1], np.int64)
    assert [len(column) for column in sizes_and_answers(QUESTIONS)] == [0, 0]


def test_kinds_of_tables() -> None:
    for columns, probability, competition in (
        (["id", "prob_9"], True, False),
        (["id", "Prob_1"], False, False),
        (["id", "problems"], False, True),
        (["id", "choices"], False, True),
        (["id", "answer"], False, False),
    ):
        table = pd.DataFrame(columns=columns)
        assert (is_probability_table(table), is_competition_table(table)) == (probability, competition), columns


def test_a_probability_column_too_many(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(HEADER.strip() + ",prob_6\na,1,1,0,,,,\n")
    assert said(lambda: read_probs(tmp_path / "x.csv")).endswith(": unknown column 'prob_6'; expected prob_1 to prob_5")


@pytest.mark.parametrize(
    ("out", "stem"),
    [
        ("blend", "submissions/blend"),
        ("a.csv.csv", "submissions/a.csv"),
        ("a.probs.csv", "submissions/a"),
        ("a.CSV", "submissions/a.CSV"),
        ("folder/a/b.csv", "folder/a/b"),
        ("/b", "/b"),
    ],
)
def test_where_outputs_go(out: str, stem: str) -> None:
    assert output_stem(out) == Path(stem)
    paths = submission_paths(out)
    assert paths.all == (paths.probs, paths.submission, paths.report)
    assert [str(path) for path in paths.all] == [f"{stem}.probs.csv", f"{stem}.csv", f"{stem}.probs.json"]


def test_a_name_that_is_none_is_named_by_its_flag() -> None:
    assert said(lambda: output_stem("folder/.csv")) == "--out '': expected a name, without blanks around it"


def test_all_that_is_written(tmp_path: Path) -> None:
    paths = submission_paths(tmp_path / "x")
    heard: list[list[str]] = []
    with claim_outputs(paths.all, inputs=[], overwrite=False, command="c") as outputs:
        write_predictions(outputs, TWO, {"이름": 1}, lambda: heard.append(sorted(p.name for p in tmp_path.glob("x*"))))
    assert paths.probs.read_bytes() == (HEADER + "b,2,0.25,0.75,,,\na,1,0.5,0.25,0.25,,\n").encode()
    assert paths.submission.read_bytes() == b"id,answer\nb,2\na,1\n"
    assert paths.report.read_bytes() == '{\n "이름": 1\n}\n'.encode()
    assert heard == [["x.csv", "x.probs.csv", "x.probs.json"]]  # called when all have their names
    with claim_outputs(paths.all, inputs=[], overwrite=True, command="c") as outputs:
        write_predictions(outputs, TWO, {})
    assert paths.report.read_bytes() == b"{}\n"
