"""The probability CSV and the submission CSV."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import write_labels

from ksat.errors import InputError
from ksat.files import claim_outputs, read_json
from ksat.predictions import (
    Predictions,
    align_answers,
    check_submission,
    read_answers,
    read_labels,
    read_probs,
    submission_paths,
    write_predictions,
    write_probs,
)
from ksat.questions import Question
from ksat.visible import is_visible, looks

NAN = float("nan")
HEADER = "id,answer,prob_1,prob_2,prob_3,prob_4,prob_5\n"


def make_predictions() -> Predictions:
    probs = np.array([[0.1, 0.2, 0.3, 0.15, 0.25], [0.4, 0.1, 0.4, 0.1, NAN], [0.25, 0.75, NAN, NAN, NAN]])
    return Predictions(("b", "a", "c"), probs)


def make_questions() -> list[Question]:
    return [Question(row_id, "p", "q", tuple("abcde"[:n]), None) for row_id, n in (("b", 5), ("a", 4), ("c", 2))]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_answers_count_from_one_and_equals_go_to_the_lowest_number() -> None:
    assert make_predictions().answers.tolist() == [3, 1, 2]
    assert make_predictions().num_choices.tolist() == [5, 4, 2]


def write_all(stem: Path, *, overwrite: bool = False) -> None:
    paths = submission_paths(stem).all
    with claim_outputs(paths, inputs=[], overwrite=overwrite, command="test") as outputs:
        write_predictions(outputs, make_predictions(), {"base": "b"})


def test_probability_file_has_exactly_these_bytes(tmp_path: Path) -> None:
    write_probs(tmp_path / "new" / "x.probs.csv", make_predictions())
    assert (tmp_path / "new" / "x.probs.csv").read_text() == (
        HEADER + "b,3,0.1,0.2,0.3,0.15,0.25\na,1,0.4,0.1,0.4,0.1,\nc,2,0.25,0.75,,,\n"
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.probs.csv"]


def test_submission_has_exactly_these_bytes(tmp_path: Path) -> None:
    write_labels(tmp_path / "x.csv", ["b", 'q,"1'], np.array([3, 1]))
    assert (tmp_path / "x.csv").read_text() == 'id,answer\nb,3\n"q,""1",1\n'


def test_mistake_3_a_four_choice_row_never_has_a_fifth(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    probs = np.column_stack([rng.dirichlet(np.ones(4), 50), np.full(50, NAN)])
    four = Predictions(tuple(map(str, range(50))), probs)
    write_probs(tmp_path / "x.probs.csv", four)
    with (tmp_path / "x.probs.csv").open() as file:
        assert all(row["prob_5"] == "" and row["answer"] in "1234" for row in csv.DictReader(file))
    assert read_probs(tmp_path / "x.probs.csv").num_choices.tolist() == [4] * 50


def test_mistake_11_every_written_row_has_its_probabilities(tmp_path: Path) -> None:
    write_all(tmp_path / "x")
    assert read_json(tmp_path / "x.probs.json") == {"base": "b"}
    with (tmp_path / "x.probs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "answer", "prob_1", "prob_2", "prob_3", "prob_4", "prob_5"]
    for row, count in zip(rows, (5, 4, 2), strict=True):
        assert sum(row[f"prob_{number}"] != "" for number in range(1, 6)) == count
    assert list(read_labels(tmp_path / "x.csv").items()) == [("b", 3), ("a", 1), ("c", 2)]


text_ids = st.lists(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).map(str.strip).filter(is_visible),
    min_size=1,
    max_size=8,
    unique_by=looks,
)


@given(ids=text_ids, data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_reads_back_bit_for_bit(tmp_path: Path, ids: list[str], data: st.DataObject) -> None:
    rows = []
    for _ in ids:
        count = data.draw(st.integers(2, 5))
        masses = np.array(data.draw(st.lists(st.floats(1e-300, 1e6), min_size=count, max_size=count)))
        rows.append(np.append(masses / masses.sum(), [NAN] * (5 - count)))
    written = Predictions(tuple(ids), np.array(rows))
    write_probs(tmp_path / "x.probs.csv", written)
    read = read_probs(tmp_path / "x.probs.csv")
    assert read.ids == written.ids
    assert read.probs.tobytes() == written.probs.tobytes()


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ("a,1,0.6,0.4,,,", None),
        ("a,1,0.6000004,0.4000004,,,", None),
        ("a,1,6e-1,.4,,,", None),
        (
            "a,1,0.6,0.40001,,,",
            r"1 of the rows have probabilities that do not sum to 1 within 1e-6 \(id 'a': 1.00001\)",
        ),
        ("a,1,1.4,-0.4,,,", r"lie outside 0 to 1 \(id 'a': 1.4, -0.4\)"),
        ("a,1,1,,,,", r"fewer than two choices \(id 'a': 1\)"),
        ("a,,,,,,", r"fewer than two choices \(id 'a': 0\)"),
        ("a,1,0.6,,0.4,,", r"leave a gap between the choices \(id 'a': choices 1, 3\)"),
        ("a,2,,0.6,0.4,,", r"leave a gap between the choices \(id 'a': choices 2, 3\)"),
        ("a,1,0.6,nan,,,", r"are not numbers \(id 'a': 'nan'\)"),
        ("a,1,inf,0.4,,,", r"are not numbers \(id 'a': 'inf'\)"),
        ("a,1,0.6,x,,,", r"are not numbers \(id 'a': 'x'\)"),
        ("a,2,0.6,0.4,,,", r"not the most probable choice \(id 'a': '2', most probable is 1\)"),
        ("a,2,0.5,0.5,,,", r"not the most probable choice \(id 'a': '2', most probable is 1\)"),
        ("a,1.0,0.6,0.4,,,", r"not the most probable choice \(id 'a': '1.0'"),
        (",1,0.6,0.4,,,", "1 of the rows have an empty id"),
        ("a,1,0.6,0.4,,,\na,1,0.6,0.4,,,", r"1 of the rows repeat an id that stands above \(id 'a'\)"),
        ("a,1,0.6,0.4,,", "data row 1 has 6 fields, the header has 7"),
    ],
)
def test_read_probs_validates(tmp_path: Path, row: str, match: str | None) -> None:
    path = write(tmp_path / "x.probs.csv", HEADER + row + "\n")
    if match is None:
        assert read_probs(path).answers.tolist() == [1]
    else:
        with pytest.raises(InputError, match=match):
            read_probs(path)


def test_read_probs_counts_all_bad_rows_and_shows_five(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", HEADER + "".join(f"r{i},1,0.6,0.5,,,\n" for i in range(7)))
    with pytest.raises(InputError, match=r"7 of the rows have .*\(first id 'r0'.*id 'r4': 1.1\); write") as caught:
        read_probs(path)
    assert "r5" not in str(caught.value)


def test_read_probs_requires_its_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column 'prob_5'; found 'id', 'answer'"):
        read_probs(write(tmp_path / "x.csv", "id,answer,prob_1,prob_2,prob_3,prob_4\na,1,1,0,,\n"))
    with pytest.raises(InputError, match="unknown column 'prob_6'; expected prob_1 to prob_5"):
        read_probs(write(tmp_path / "x.csv", HEADER.strip() + ",prob_6\na,1,0.6,0.4,,,,\n"))


FOUR_ROWS = ("0.125,0.5,0.25,0.125,0", "0.2,0.2,0.2,0.2,0.2", "0.33,0.33,0.33,nan,", "1,0,0,0,")


def labels_with(names: str, rows: Sequence[str]) -> str:
    lines = [f"r{i},1,k,{row},3" for i, row in enumerate(rows)]
    return "\n".join([f"id,answer,kind,{names},page", *lines]) + "\n"


@pytest.mark.parametrize(
    "names",
    [
        "p1,p2,p3,p4,p5",
        "p0,p1,p2,p3,p4",
        "0,1,2,3,4",
        "A,B,C,D,E",
        "choice_1,choice_2,choice_3,choice_4,choice_5",
        "1번,2번,3번,4번,5번",
        "확률1,확률2,확률3,확률4,확률5",
        "prob[1],prob[2],prob[3],prob[4],prob[5]",
        "softmax_1,softmax_2,softmax_3,softmax_4,softmax_5",
    ],
)
def test_probabilities_under_any_other_names_are_no_labels(tmp_path: Path, names: str) -> None:
    """Such a file, whose 'answer' held the gold answers, was blended as bare labels without a word. The place counts, not a digit."""
    renamed = ", ".join(f"'{name}' to 'prob_{place}'" for place, name in enumerate(names.split(","), start=1))
    with pytest.raises(InputError, match=re.escape(f"add up to 1 in every row; rename {renamed}, and let")):
        read_labels(write(tmp_path / "x.csv", labels_with(names, FOUR_ROWS)))


def test_the_rename_knows_rows_of_four_choices_other_numbers_and_percents(tmp_path: Path) -> None:
    four = labels_with("confidence,a,b,c,d", ["0.7,0.7,0.1,0.1,0.1", "0.4,0.2,0.2,0.2,0.4"])
    renamed = "rename 'a' to 'prob_1', 'b' to 'prob_2', 'c' to 'prob_3', 'd' to 'prob_4', add 'prob_5' with empty cells, and let"
    with pytest.raises(InputError, match=renamed):
        read_labels(write(tmp_path / "x.csv", four))
    percents = labels_with("p1,p2", ["20,80", "50%,50%"])
    with pytest.raises(
        InputError, match="add up to 100 in every row; divide them by 100, rename 'p1' to 'prob_1', 'p2'"
    ):
        read_labels(write(tmp_path / "x.csv", percents))


def test_scores_are_asked_for_their_softmax(tmp_path: Path) -> None:
    scores = labels_with("logit_1,logit_2,logit_3", ["-1.5,2,0.5", "0,3.25,-1e-3"])
    with pytest.raises(
        InputError, match="columns 'logit_1', 'logit_2', 'logit_3' hold .* write their softmax as 'prob_1' to"
    ):
        read_labels(write(tmp_path / "x.csv", scores))


@pytest.mark.parametrize(
    "cell",
    [
        "[0.125, 0.5, 0.375]",
        "(0.5, 0.5)",
        "[0.5 0.5]",
        "[1. 0.]",
        "array([0.5, 0.5])",
        "tensor([0.5, 0.5], device='cuda:0')",
        "[np.float64(0.5), np.float64(0.5)]",
        "{'1': 0.5, '2': 0.5}",
        "0.5 0.5",
        "0.5;0.5;0.0",
    ],
)
def test_a_column_of_lists_is_no_comment(tmp_path: Path, cell: str) -> None:
    with pytest.raises(InputError, match="column 'probs' holds a list of numbers in every cell"):
        read_labels(write(tmp_path / "x.csv", f'id,answer,probs\na,1,"{cell}"\nb,1,\n'))


@pytest.mark.parametrize(
    ("names", "rows"),
    [
        ("confidence", ["0.5", "0.75"]),
        ("index,confidence", ["0,0.5", "1,0.75"]),
        ("index,page", ["0,3", "1,4"]),
        ("p1", ["0.5", ""]),
        ("comment,other", ["0.5 twice,nan", "[0.5],"]),
        ("date", ["2024. 1. 2.", "2024.01.02"]),
        ("comment", ['"(0.5, 0.5 둘 다)"', '"(0.4, 0.6 근소)"']),
        ("second", ['"[1, 2]"', '"[3, 4]"']),
        (",", ["0,x", "1,y"]),  # an index without a name, and another
    ],
)
def test_what_is_harmless_beside_labels_stays(tmp_path: Path, names: str, rows: list[str]) -> None:
    text = "\n".join([f"id,answer,{names}", *(f"r{i},2,{row}" for i, row in enumerate(rows))])
    assert read_labels(write(tmp_path / "x.csv", text + "\n")) == {f"r{i}": 2 for i in range(len(rows))}


@pytest.mark.parametrize(
    ("ids", "row", "match"),
    [
        (("a", "b"), [0.5, 0.5, NAN, NAN, NAN], "shape"),
        (("a",), [0.5, 0.4, NAN, NAN, NAN], "do not sum to 1"),
        (("a",), [0.5, NAN, 0.5, NAN, NAN], "gap"),
        (("a",), [np.inf, 0.5, NAN, NAN, NAN], "outside 0 to 1"),
    ],
)
def test_predictions_refuse_what_no_file_may_hold(ids: tuple[str, ...], row: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Predictions(ids, np.array([row]))


def test_predictions_refuse_a_doubled_id() -> None:
    with pytest.raises(ValueError, match="an id stands twice"):
        Predictions(("a", "a"), np.array([[0.5, 0.5, NAN, NAN, NAN]] * 2))


def test_read_labels_keeps_file_order(tmp_path: Path) -> None:
    assert list(read_labels(write(tmp_path / "x.csv", "\ufeffid,answer\nz,2\na, 5\n")).items()) == [("z", 2), ("a", 5)]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (HEADER + "a,1,0.6,0.4,,,\n", "a probability file where only `id,answer` is expected"),
        (
            "id,paragraph,question,choices,answer\na,p,q,\"['x', 'y']\",1\n",
            "a file of questions where only `id,answer`",
        ),
        ("id,label\na,1\n", "no column 'answer'"),
        ("id,answer\na,1\na,2\n", "repeat an id"),
        ("id,answer\na,no\n", r"not an integer from 1 to 5 \(id 'a': 'no'\)"),
        ("id,answer\na,\n", r"not an integer from 1 to 5 \(id 'a': ''\)"),
        ("id,answer\na,1.0\n", "not an integer from 1 to 5"),
        ("id,answer\na,6\n", "not an integer from 1 to 5"),
        ("id,answer\na,0\n", "not an integer from 1 to 5"),
    ],
)
def test_read_labels_validates(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        read_labels(write(tmp_path / "x.csv", text))


def test_read_answers_of_labels_and_of_questions(tmp_path: Path) -> None:
    problems = "\"{'question': 'q', 'choices': ['x', 'y'], 'answer': 2}\""
    assert read_answers(write(tmp_path / "l.csv", "id,answer\na,2\n")) == {"a": 2}
    assert read_answers(write(tmp_path / "c.csv", f"id,paragraph,problems\na,p,{problems}\n")) == {"a": 2}
    flat = "id,paragraph,question,choices,answer\na,p,q,\"['x', 'y']\",2\n"
    assert read_answers(write(tmp_path / "f.csv", flat)) == {"a": 2}


def test_read_answers_refuses_predictions_and_unlabelled_rows(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a probability file; its 'answer' is a prediction, never the gold answer"):
        read_answers(write(tmp_path / "x.csv", HEADER + "a,1,0.6,0.4,,,\n"))
    unlabelled = "id,paragraph,problems\na,p,\"{'question': 'q', 'choices': ['x', 'y'], 'answer': ''}\"\n"
    with pytest.raises(InputError, match="1 of the rows have no answer"):
        read_answers(write(tmp_path / "x.csv", unlabelled))


def test_answers_are_aligned_by_id() -> None:
    gold = align_answers(make_predictions(), {"a": 4, "c": 1, "other": 5, "b": 5}, "gold.csv")
    assert gold.tolist() == [5, 4, 1]


def test_align_answers_refuses_missing_and_impossible_answers() -> None:
    with pytest.raises(InputError, match=r"gold.csv: 1 of the rows of the predictions are missing \(id 'a'\)"):
        align_answers(make_predictions(), {"b": 1, "c": 1}, "gold.csv")
    with pytest.raises(InputError, match=r"1 of the rows have an answer beyond the predicted .* \(id 'c': 3 of 2\)"):
        align_answers(make_predictions(), {"a": 1, "b": 1, "c": 3}, "gold.csv")


def test_check_submission_takes_a_valid_one(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "id,answer\nb,5\na,4\nc,2\n")
    assert check_submission(path, make_questions()) == {"b": 5, "a": 4, "c": 2}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("id,answer\nb,5\na,4\n", r"1 of the rows of the test are missing \(id 'c'\)"),
        ("id,answer\nb,5\na,4\nc,2\nd,1\n", r"1 of the rows have an id that the test has not \(id 'd'\)"),
        ("id,answer\nb,5\na,4\nc,2\nb,5\n", r"1 of the rows repeat an id that stands above \(id 'b'\)"),
        (
            "id,answer\na,4\nb,5\nc,2\n",
            r"2 of the rows are not in the test's order \(first id 'a': in row 1, .* has 'b'",
        ),
        ("id,answer\nb,5\na,4.0\nc,2\n", r"not an integer from 1 to 5 \(id 'a': '4.0'\)"),
        ("id,answer\nb,5\na,4\nc,\n", r"not an integer from 1 to 5 \(id 'c': ''\)"),
        ("id,answer\nb,5\na,5\nc,2\n", r"1 of the rows have an answer out of range \(id 'a': 5 of 4\)"),
        ("id,answer\nb,0\na,4\nc,2\n", r"not an integer from 1 to 5 \(id 'b': '0'\)"),
        ("id,answer,score\nb,5,1\na,4,1\nc,2,1\n", "columns id, answer, score; a submission has exactly id, answer"),
        ("answer,id\n5,b\n4,a\n2,c\n", "columns answer, id; a submission has exactly id, answer"),
    ],
)
def test_check_submission_refuses(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        check_submission(write(tmp_path / "x.csv", text), make_questions())


@pytest.mark.parametrize(
    ("out", "stem"),
    [
        ("blend", "submissions/blend"),
        ("blend.csv", "submissions/blend"),
        ("blend.probs.csv", "submissions/blend"),
        ("v1.2", "submissions/v1.2"),
        ("folder/blend.csv", "folder/blend"),
        ("./blend", "blend"),
        ("/tmp/deep/blend.probs.csv", "/tmp/deep/blend"),
    ],
)
def test_where_outputs_go(out: str, stem: str) -> None:
    paths = submission_paths(out)
    assert paths.all == (Path(f"{stem}.probs.csv"), Path(f"{stem}.csv"), Path(f"{stem}.probs.json"))
    assert (paths.probs, paths.submission, paths.report) == paths.all


@pytest.mark.parametrize(
    "out", ["", " ", "folder/", ".csv", "folder/.probs.csv", "..", "a/..", "a/.b", "x" * 201, "a\nb"]
)
def test_outputs_need_a_name(out: str) -> None:
    with pytest.raises(InputError, match="--out '.*expected|--out 'a.*does not print"):
        submission_paths(out)


@pytest.mark.parametrize("full", ["x.csv", "x.probs.csv", "x.probs.json"])
def test_of_three_outputs_none_is_written_if_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    write_all(tmp_path / "x")
    paths = submission_paths(tmp_path / "x").all
    before = [path.read_bytes() for path in paths]
    real = Path.open

    def open_(self: Path, *args: object, **kwargs: object) -> object:
        if self.name == f".{full}.tmp":
            raise OSError(28, "No space left on device")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_)
        with pytest.raises(InputError, match=r"can't be written \(No space left on device\)"):
            write_all(tmp_path / "x", overwrite=True)
    assert [path.read_bytes() for path in paths] == before
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths}
