"""What is said of a file of questions, to the last character, and the validation split beside its rule written out."""

import hashlib
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ksat import questions as room
from ksat.errors import InputError
from ksat.folds import split_validation
from ksat.questions import (
    Question,
    passage_key,
    read_csv_rows,
    read_questions,
    read_table,
    require_columns,
    require_unique_ids,
)

FORM = "'problems' must hold {'question': str, 'choices': [2 to 5 str], 'answer': int or ''}"


def said(do: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        do()
    return str(caught.value)


def problems(**fields: Any) -> str:
    return repr({"question": "q", "choices": ["a", "b"], "answer": 2} | fields)


def write(folder: Path, **cells: str) -> Path:
    pd.DataFrame([{"id": "i", "paragraph": "p", "problems": problems(), **cells}]).to_csv(folder / "x.csv", index=False)
    return folder / "x.csv"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"problems": "x("}, f"have a 'problems' that is not a Python literal (id 'i': 'x('); {FORM}"),
        ({"problems": "y" * 61}, f"have a 'problems' that is not a Python literal (id 'i': '{'y' * 60}'); {FORM}"),
        ({"problems": "[]"}, f"have a 'problems' that is not a dict (id 'i': list); {FORM}"),
        ({"problems": "{'choices': 1}"}, f"have no 'question' in 'problems' (id 'i': keys ['choices']); {FORM}"),
        ({"problems": "{'question': 1}"}, f"have no 'choices' in 'problems' (id 'i': keys ['question']); {FORM}"),
        ({"problems": "{'a': 1, 'b': 2, 'a': 3}"}, "have a key twice in 'problems' (id 'i': 'a'); keep one of each"),
        (
            {"problems": "{'answer': 1, 'b': 2, ' Answer\u200b': 3}"},
            "have a key twice in 'problems' (id 'i': 'answer' and ' Answer\\u200b'); keep one of each",
        ),
        (
            {"problems": "{'question': 'q', 'choices': ['a', 'b'], 1: 2, 'Answer ': 2}"},
            "have a key in 'problems' that is not read (id 'i': 'Answer '); write 'answer'",
        ),
        *(
            (
                {"problems": problems(question=unseen)},
                f"have a question of which nothing shows (id 'i': {unseen!a}); write it, or leave it empty",
            )
            for unseen in ("\0", "\u200b", " \ufeff", "\u3164")
        ),
        (
            {"problems": "{'question': 'q', 'choices': array(['a'])}"},
            f"have a 'problems' that is not a Python literal (id 'i': \"{{'question': 'q', 'choices': array(['a'])}}\"); {FORM}; of a numpy "
            "array write its .tolist()",
        ),
        (
            {"problems": "{'question': 'q', 'choices': ['a' 'b', 'c']}"},
            "have two texts without a comma between them in 'problems' (id 'i': \"'a' 'b'\"); put the comma there; a list that numpy "
            "printed has none: write its .tolist()",
        ),
        (
            {"problems": "{'question': 'q', 'choices': [NaN, nan, null, true, false]}"},
            f"have a choice that is empty or not text (id 'i': [None, None, None, True, False]); {FORM}",
        ),
        (
            {"problems": "{'question': 'q', 'choices': [other]}"},
            f"have a 'problems' that is not a Python literal (id 'i': \"{{'question': 'q', 'choices': [other]}}\"); {FORM}",
        ),
        ({"problems": problems(question=3)}, f"have a question that is not text (id 'i': int); {FORM}"),
        ({"problems": problems(choices="ab")}, f"have no choices (id 'i'); {FORM}"),
        ({"problems": problems(choices=())}, f"have no choices (id 'i'); {FORM}"),
        ({"problems": problems(choices=["a"])}, "have a wrong number of choices (id 'i': 1); expected 2 to 5"),
        ({"problems": problems(choices=list("abcdef"))}, "have a wrong number of choices (id 'i': 6); expected 2 to 5"),
        (
            {"problems": problems(choices=["a", 2])},
            f"have a choice that is empty or not text (id 'i': ['a', 2]); {FORM}",
        ),
        (
            {"problems": problems(answer=2.0)},
            "have an answer of the wrong type (id 'i': 2.0); expected an integer, or '' where there is none",
        ),
        (
            {"problems": problems(answer=3)},
            "have an answer out of range (id 'i': 3); answers count from 1 to the row's number of choices",
        ),
        (
            {"problems": problems(question_plus=3)},
            "have a question_plus that is not text (id 'i': int); write it as text, or leave it out",
        ),
        (
            {"problems": problems(question_plus="x" * 31), "question_plus": "y" * 31},
            f"have two different question_plus (id 'i': they differ at character 1: column '{'y' * 31}', problems '{'x' * 31}'); keep the right one in both places, "
            "or in one",
        ),
        (
            {"problems": problems().replace("'q'", repr("a" * 30 + "Z" + "b" * 30)).replace("Z", "\\ud800")},
            f"have half of a character (a lone surrogate) (id 'i': '\\ud800' in '{'a' * 20}\\ud800{'b' * 19}'); write the character itself",
        ),
    ],
)
def test_what_is_said_of_a_row(tmp_path: Path, cells: dict[str, str], message: str) -> None:
    path = write(tmp_path, **cells)
    assert said(lambda: read_questions(path)) == f"{path}: 1 of the rows {message}"


def test_what_is_said_of_rows_without_an_answer_and_of_other_rules(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = [("a", problems(answer="")), ("b", "1"), ("c", "2"), ("d", problems(answer=9)), ("e", problems())]
    pd.DataFrame([{"id": i, "paragraph": "", "problems": text} for i, text in rows]).to_csv(path, index=False)
    assert said(lambda: read_questions(path, labelled=True)) == (
        f"{path}: 1 of the rows have no answer (id 'a'); training and metrics need labelled rows; 3 more rows break other rules"
    )
    assert said(lambda: read_questions(path)) == (
        f"{path}: 2 of the rows have a 'problems' that is not a dict (first id 'b': int; id 'c': int); {FORM}; 1 more rows break other "
        "rules"
    )


def test_equal_choices_are_named_once_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    room._warn.cache_clear()
    path = write(tmp_path, problems=problems(choices=["a", "b", " a"]))
    assert read_questions(path)[0].choices == read_questions(path)[0].choices == ("a", "b", "a")
    assert capsys.readouterr() == (
        "",
        f"warning: {path}: 1 of the rows have choices that are equal (id 'i'); they are kept as they stand; is one mistyped?\n",
    )


@pytest.mark.parametrize("twin", ["a\u200b", "가", " a\ufe0f "])
def test_choices_that_are_equal_to_the_eye_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], twin: str
) -> None:
    room._warn.cache_clear()
    path = write(tmp_path, problems=problems(choices=["a", "\u1100\u1161", twin]))
    assert read_questions(path)[0].choices == ("a", "\u1100\u1161", twin.strip())
    assert capsys.readouterr().err == (
        f"warning: {path}: 1 of the rows have choices that are equal (id 'i': only to the eye); they are kept as they stand; is one "
        "mistyped?\n"
    )


def test_choices_that_differ_to_the_eye_are_not_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blanks are what a question on spelling asks about; case and width are seen."""
    room._warn.cache_clear()
    read_questions(write(tmp_path, problems=problems(choices=["가나", "가 나", "가\n나", "A", "a"])))
    read_questions(write(tmp_path, problems=problems(choices=["1", "１"])))
    assert capsys.readouterr().err == ""


def test_a_column_that_is_nearly_ours_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other columns are nobody's business, also in another case: 'Question' is none that is read beside 'problems'."""
    room._warn.cache_clear()
    path = write(tmp_path, **{" answer": "1", "Question": "x", "other": "y", "Other one": "z"})
    assert read_questions(path)[0].answer == 2
    assert capsys.readouterr().err == f"warning: {path}: its column ' answer' is not read; 'answer' would be\n"


def test_columns_without_a_name_are_left_out_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """Excel's trailing commas: pandas warned of them in words of its own."""
    path = write(tmp_path)
    path.write_text("".join(f"{line},,\n" for line in path.read_text().splitlines()))
    assert read_questions(path)[0].answer == 2
    assert not recwarn.list


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty; expected a header and at least one row"),
        (" \n\n", "the file is empty; expected a header and at least one row"),
        ("id,a\n", "a header but no rows; expected at least one row"),
        ("id,a,id\n1,2,3\n", "the header has the column 'id' twice; take one out, or rename it"),
        (
            "id,x,y,answer, Answer\n1,2,3,4,5\n",
            "the header has the columns 'answer' and ' Answer'; take one out, or rename it",
        ),
        ("id,\u200bID\n1,2\n", "the header has the columns 'id' and '\\u200bID'; take one out, or rename it"),
        ("id,a\n1,2\n1\n", "data row 2 has 1 fields, the header has 2; check the quoting"),
        ('id,a\n"1,2\n', "not a CSV table (unexpected end of data); check the quoting"),
    ],
)
def test_what_is_said_of_a_table(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    assert said(lambda: read_table(tmp_path / "x.csv")) == f"{tmp_path / 'x.csv'}: {message}"


def test_rows_of_a_table(tmp_path: Path) -> None:
    """Columns without a name may be several; a line of blanks is no row unless the table has more than one column."""
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfid,,\r\n1,"a\r\nb",NA\r\n  \r\n,,\r\n')
    assert read_csv_rows(path) == [["id", "", ""], ["1", "a\r\nb", "NA"], ["", "", ""]]
    path.write_text("id\n1\n  \n2\n")
    table = read_table(str(path))
    assert (list(table.columns), list(table["id"])) == (["id"], ["1", "2"])


def test_what_is_said_of_a_flat_file_with_a_column_for_each_choice(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("id,question,A,B,C,D\na,q,1,2,3,4\n")
    assert said(lambda: read_questions(path)) == (
        f"{path}: no column 'choices'; found 'id', 'question', 'A', 'B', 'C', 'D'; 'choices' must hold a list of 2 to 5 texts, such as "
        "['하나', '둘']: write each row's choices there in their order"
    )


def test_what_is_said_of_columns_and_ids() -> None:
    table = pd.DataFrame(columns=["a", "b"])
    require_columns(table, "x", ["b", "a"])
    assert said(lambda: require_columns(table, "x", ["c", "a", "d"])) == (
        "x: no column 'c', 'd'; found 'a', 'b'; expected c, a, d"
    )
    require_unique_ids(["a", "b", "A"], "x")
    assert said(lambda: require_unique_ids(["a", "", ""], "x")) == (
        "x: 2 of the rows have an empty id (first: data row 2); every row needs its own id"
    )
    assert said(lambda: require_unique_ids(["a", "\u200b"], "x")) == (
        "x: 1 of the rows have an empty id (first: data row 2); every row needs its own id"
    )
    require_unique_ids(["가", "나", "a b", "ab", "1", "１"], "x")
    assert said(lambda: require_unique_ids(["a", "가", "a\u200b", "\u1100\u1161", "a"], "x")) == (
        "x: 3 of the rows repeat an id that stands above (first id 'a\\u200b': looks like 'a'; id '\u1100\u1161': looks like "
        "'\\uac00'; id 'a'); keep one of each"
    )
    assert said(lambda: require_unique_ids(["a\x1f", "b\x7f", "c"], "x")) == (
        "x: 2 of the rows have an id with a control character (first id 'a\\x1f'; id 'b\\x7f'); take it out"
    )
    assert said(lambda: require_unique_ids(["a", "b", "a", "b", "a"], "x")) == (
        "x: 2 of the rows repeat an id that stands above (first id 'a'; id 'b'); keep one of each"
    )


def test_every_column_has_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, id=" i ", paragraph=" p\xa0 p ", question_plus=" + ", source=" s ", context="c  c")
    assert read_questions(path) == [Question("i", "p p", "q", ("a", "b"), 2, "+", "s", "c c")]
    path = write(tmp_path, problems=problems(question_plus=" + "))
    assert read_questions(path) == [Question("i", "p", "q", ("a", "b"), 2, "+", "", "")]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("2", 2), (" 2 ", 2), ("2.0", 2), ("2.00", 2), ("", None)],
)
def test_answers_of_flattened_columns(tmp_path: Path, answer: str, expected: int | None) -> None:
    row = {"id": "i", "paragraph": "p", "question": "q", "choices": "['a', 'b']", "answer": answer}
    pd.DataFrame([row]).to_csv(tmp_path / "x.csv", index=False)
    assert read_questions(tmp_path / "x.csv") == [Question("i", "p", "q", ("a", "b"), expected)]


@pytest.mark.parametrize("answer", ["02", "+2", "2.", "2.5", "٢", "２", "100", "2 2"])
def test_what_int_would_take_and_nobody_means(tmp_path: Path, answer: str) -> None:
    row = {"id": "i", "paragraph": "p", "question": "q", "choices": "['a', 'b']", "answer": answer}
    pd.DataFrame([row]).to_csv(tmp_path / "x.csv", index=False)
    assert f"have an answer of the wrong type (id 'i': {answer!r})" in said(lambda: read_questions(tmp_path / "x.csv"))


@pytest.mark.parametrize("answer", ["0", "3", "10", "99"])
def test_answers_that_are_none_of_the_row(tmp_path: Path, answer: str) -> None:
    row = {"id": "i", "paragraph": "p", "question": "q", "choices": "['a', 'b']", "answer": answer}
    pd.DataFrame([row]).to_csv(tmp_path / "x.csv", index=False)
    assert f"have an answer out of range (id 'i': {answer})" in said(lambda: read_questions(tmp_path / "x.csv"))


def make_rows(counts: list[int]) -> list[Question]:
    """One passage a row."""
    return [Question(f"q{i:03}", f"p{i}", "q", tuple("abcde"[:n]), 1) for i, n in enumerate(counts)]


def split_by_hand(rows: list[Question], fraction: float, seed: int) -> list[int]:
    """The rule, step by step: up to 20 folds of whole passages, of which those come out that are nearest to the share."""
    from sklearn.model_selection import StratifiedGroupKFold

    order = sorted(range(len(rows)), key=lambda i: rows[i].id)
    counts = [rows[i].num_choices for i in order]
    passages = [passage_key(rows[i]) for i in order]
    most = max(counts.count(count) for count in set(counts))
    num_folds = min(20, len(set(passages)), most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
        folds = [held for _, held in splitter.split(order, counts, passages)]
    ends = [sum(len(fold) for fold in folds[: n + 1]) for n in range(len(folds) - 1)]
    number = min(range(len(ends)), key=lambda n: abs(ends[n] - fraction * len(rows))) + 1
    return sorted(order[i] for fold in folds[:number] for i in fold)


@pytest.mark.parametrize("fraction", [0.04, 0.1, 0.26, 0.5])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_split_is_that_of_its_rule(fraction: float, seed: int) -> None:
    rows = make_rows([4, 5, 5, 3] * 15)
    rows = [rows[7 * i % 60] for i in range(60)]  # in another order than their ids
    train, valid = split_validation(rows, fraction, seed=seed)
    assert valid == split_by_hand(rows, fraction, seed)
    assert train == [i for i in range(60) if i not in valid]


def test_a_split_of_few_rows() -> None:
    two = make_rows([2, 5])  # each number of choices once: they can't be stratified
    assert sorted(len(side) for side in split_validation(two, 0.5, seed=0)) == [1, 1]
    assert sorted(len(side) for side in split_validation(two, 0.01, seed=0)) == [1, 1]
    five = make_rows([2, 3, 4, 5, 5])
    assert split_validation(five, 0.4, seed=1)[1] == split_by_hand(five, 0.4, 1)
    assert split_validation(two, 0, seed=0) == ([0, 1], [])


def test_what_is_said_of_a_split() -> None:
    rows = make_rows([4, 4])
    for fraction in (-0.01, 0.51, math.nan):
        assert said(lambda fraction=fraction: split_validation(rows, fraction, seed=0)) == (
            f"--valid-fraction {fraction}: expected 0 (train on everything) to 0.5"
        )
    assert said(lambda: split_validation(rows[:1], 0.5, seed=0)) == (
        "--valid-fraction 0.5: 1 passage can't be split; use --valid-fraction 0"
    )


def test_passages_are_the_same_but_for_blanks() -> None:
    rows = make_rows([2, 2])
    keys = [passage_key(row) for row in (rows[0], Question("x", " p\n 0", "other", ("c", "d"), 2), rows[1])]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] == hashlib.sha256(b"p0").hexdigest()
    assert passage_key(Question("x", " ", "q", ("b", "a"), 1)) == hashlib.sha256(b"\0q\0\0a\0b").hexdigest()


def test_an_answer_is_counted_from_zero_within() -> None:
    assert Question("x", "", "q", ("a", "b", "c"), 3).answer_index == 2
    assert Question("x", "", "q", ("a", "b", "c"), 3).num_choices == 3
    with pytest.raises(ValueError, match=r"^question 'x' has no answer$"):
        Question("x", "", "q", ("a", "b"), None).answer_index  # noqa: B018
