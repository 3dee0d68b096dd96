"""Every dialect of the competition's CSV, every way to get it wrong, and the validation split."""

import ast
import codecs
import csv
import random
import re
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksat.errors import InputError
from ksat.folds import split_validation
from ksat.kinds import find_kind
from ksat.questions import Question, passage_key, read_questions, read_table

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["id", "paragraph", "problems", "question_plus"]


def problems(**fields: Any) -> str:
    return repr({"question": "무엇인가?", "choices": ["가", "나", "다", "라"], "answer": 2} | fields)


def write_rows(path: Path, rows: list[dict[str, str]], encoding: str = "utf-8") -> Path:
    pd.DataFrame(rows).to_csv(path, index=False, encoding=encoding, quoting=csv.QUOTE_ALL)
    return path


def read_one(tmp_path: Path, **fields: str) -> Question:
    row = {"id": "generation-for-nlp-425", "paragraph": "글", "problems": problems(), "question_plus": ""} | fields
    (question,) = read_questions(write_rows(tmp_path / "x.csv", [row]))
    return question


def test_a_competition_row(tmp_path: Path) -> None:
    assert read_one(tmp_path) == Question("generation-for-nlp-425", "글", "무엇인가?", ("가", "나", "다", "라"), 2, "")
    assert read_one(tmp_path).num_choices == 4
    assert read_one(tmp_path).answer_index == 1


def test_file_order_is_kept_and_a_test_has_no_answers(tmp_path: Path) -> None:
    rows = [{"id": f"q{i}", "paragraph": "p", "problems": problems(answer="")} for i in (9, 1, 5)]
    questions = read_questions(write_rows(tmp_path / "x.csv", rows))
    assert [(q.id, q.answer) for q in questions] == [("q9", None), ("q1", None), ("q5", None)]
    with pytest.raises(ValueError, match="question 'q9' has no answer"):
        questions[0].answer_index  # noqa: B018


def test_an_answer_may_be_missing_or_none(tmp_path: Path) -> None:
    assert read_one(tmp_path, problems="{'question': 'q', 'choices': ['a', 'b']}").answer is None
    assert read_one(tmp_path, problems=problems(answer=None)).answer is None


def test_byte_order_mark(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "x.csv", [{"id": "a", "paragraph": "p", "problems": problems()}], "utf-8-sig")
    assert path.read_bytes().startswith(codecs.BOM_UTF8)
    assert read_questions(path)[0].id == "a"


@pytest.mark.parametrize(
    "answer", ["٣", "１", "01", "+1", "1_0", "1.", "0x1", "1e0", "³", "True", "9" * 400, "9" * 5000]
)
def test_flattened_answers_that_only_python_takes_for_numbers(tmp_path: Path, answer: str) -> None:
    row = {"id": "a", "paragraph": "p", "question": "q", "choices": "['x', 'y', 'z']", "answer": answer}
    with pytest.raises(
        InputError, match=r"x.csv: 1 of the rows have an answer of the wrong type \(id 'a': '.*\); expected"
    ):
        read_questions(write_rows(tmp_path / "x.csv", [row]))


@pytest.mark.parametrize("answer", ["0", "4", "4.0", "10"])
def test_flattened_answers_out_of_range(tmp_path: Path, answer: str) -> None:
    row = {"id": "a", "paragraph": "p", "question": "q", "choices": "['x', 'y', 'z']", "answer": answer}
    with pytest.raises(InputError, match=r"have an answer out of range \(id 'a': "):
        read_questions(write_rows(tmp_path / "x.csv", [row]))


def test_long_cells_and_odd_letters_are_read_as_they_are(tmp_path: Path) -> None:
    long = "가나다 라. " * 40_000
    old_hangul, emoji, combined, private = "\u1112\u119e\u11ab", "👨\u200d👩\u200d👧", "e\u0301", "\ue0c7"
    question = read_one(
        tmp_path,
        id="문항-👍🏽-\u1112\u119e\u11ab",
        paragraph=long + "\0끝",
        problems=problems(choices=[old_hangul, emoji, combined, private]),
    )
    assert question.passage == long + "\0끝" and len(question.passage) > 131_072
    assert question.id == "문항-👍🏽-\u1112\u119e\u11ab"
    assert question.choices == (old_hangul, emoji, combined, private)


@pytest.mark.parametrize(
    ("column", "in_dict", "expected"), [("2", 2, 2), ("2.0", 2, 2), ("2", "", 2), ("", 2, 2), ("", "", None)]
)
def test_an_answer_may_stand_in_a_column_too(
    tmp_path: Path, column: str, in_dict: object, expected: int | None
) -> None:
    assert read_one(tmp_path, problems=problems(answer=in_dict), answer=column).answer == expected


@pytest.mark.parametrize("column", ["1", "two", "２"])
def test_two_different_answers_are_refused(tmp_path: Path, column: str) -> None:
    with pytest.raises(InputError, match=rf"have two different answers \(id 'a': column .*{column}.*, problems 2\)"):
        read_one(tmp_path, id="a", problems=problems(answer=2), answer=column)


@pytest.mark.parametrize(
    "choices", ["['가' '나', '다']", "['가', '나' \"다\"]", "('가''나', '다')", "['가', r'나'\n'다']"]
)
def test_a_comma_that_is_missing_is_named(tmp_path: Path, choices: str) -> None:
    """Python would make one choice of two."""
    row = {"id": "a", "paragraph": "p", "question": "q", "choices": choices}
    with pytest.raises(InputError, match="have two texts without a comma between them in 'choices'"):
        read_questions(write_rows(tmp_path / "x.csv", [row]))


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (r"""['it\'s', 'a"b']""", ("it's", 'a"b')),
        (r"""["it's 'a' 'b'", '\\']""", ("it's 'a' 'b'", "\\")),
        (r"""['''가'나''', r'\d', u'라']""", ("가'나", r"\d", "라")),
        (r"""['\(가', '나']""", (r"\(가", "나")),
    ],
)
def test_quotes_in_a_text_are_no_second_text(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, choices: str, expected: tuple[str, ...]
) -> None:
    row = {"id": "a", "paragraph": "p", "question": "q", "choices": choices}
    assert read_questions(write_rows(tmp_path / "x.csv", [row]))[0].choices == expected
    assert not recwarn.list


@pytest.mark.parametrize(
    "unseen", ["\ufffe", "\uffff", "\U0010ffff", "\ufdd0", "\u2065", "\U000e0041", "\u3164", "\u2800\u200b"]
)
def test_choices_that_nobody_can_see_are_refused(tmp_path: Path, unseen: str) -> None:
    with pytest.raises(InputError, match="have a choice that is empty or not text"):
        read_one(tmp_path, problems=problems(choices=["a", unseen]))
    assert read_one(tmp_path, problems=problems(choices=["a", f"{unseen}b"])).choices == ("a", f"{unseen}b")


@pytest.mark.parametrize(("answer", "expected"), [("3", 3), ("3.0", 3), ("", None), (" 1 ", 1)])
def test_flattened_columns(tmp_path: Path, answer: str, expected: int | None) -> None:
    row = {"id": "a", "paragraph": "p", "question": "q", "choices": "['x', \"y's\", 'z']", "answer": answer}
    (question,) = read_questions(write_rows(tmp_path / "x.csv", [row | {"question_plus": "보기"}]))
    assert question == Question("a", "p", "q", ("x", "y's", "z"), expected, "보기")


def test_flattened_columns_without_answers(tmp_path: Path) -> None:
    row = {"id": "a", "paragraph": "p", "question": "q", "choices": "('x', 'y')"}
    assert read_questions(write_rows(tmp_path / "x.csv", [row]))[0].answer is None


def test_json_and_nan_are_read(tmp_path: Path) -> None:
    """As JSON writes a dict, and as pandas prints one."""
    for cell in (
        '{"question": "q", "choices": ["a", "b"], "answer": null, "question_plus": null}',
        "{'question': 'q', 'choices': ['a', 'b'], 'answer': nan, 'question_plus': nan}",
    ):
        question = read_one(tmp_path, problems=cell)
        assert (question.question, question.choices, question.answer, question.question_plus) == (
            "q",
            ("a", "b"),
            None,
            "",
        )


def test_a_flat_file_is_explained_by_its_own_columns(tmp_path: Path) -> None:
    for cell in ("['a'", "3", "['a', 4]", "[]"):
        path = tmp_path / "flat.csv"
        path.write_text(f'id,paragraph,question,choices\na,p,q,"{cell}"\n')
        with pytest.raises(InputError, match=r"'choices' must hold a list of 2 to 5 texts, such as \['하나', '둘'\]"):
            read_questions(path)


def test_question_plus_in_the_column_in_the_dict_and_in_both(tmp_path: Path) -> None:
    assert read_one(tmp_path, question_plus="ㄱ. 보기").question_plus == "ㄱ. 보기"
    assert read_one(tmp_path, problems=problems(question_plus="ㄱ. 보기")).question_plus == "ㄱ. 보기"
    both = read_one(tmp_path, problems=problems(question_plus="ㄱ.\xa0보기 "), question_plus="ㄱ.  보기")
    assert both.question_plus == "ㄱ. 보기"  # the same but for blanks
    assert read_one(tmp_path, problems=problems(question_plus=None)).question_plus == ""


@pytest.mark.parametrize("missing", ["nan", "NaN", "None", "null", " nan\xa0"])
def test_a_missing_question_plus_that_became_text_is_none(tmp_path: Path, missing: str) -> None:
    """As pandas and str() write it; beside a real one it is no second one."""
    assert read_one(tmp_path, question_plus=missing).question_plus == ""
    assert read_one(tmp_path, problems=problems(question_plus=missing)).question_plus == ""
    assert (
        read_one(tmp_path, problems=problems(question_plus="ㄱ. 보기"), question_plus=missing).question_plus
        == "ㄱ. 보기"
    )
    assert read_one(tmp_path, question_plus="None of them").question_plus == "None of them"


def test_blanks_are_made_one_and_line_breaks_stay(tmp_path: Path) -> None:
    question = read_one(
        tmp_path, paragraph=" 첫\xa0\xa0줄\r\n둘째\t 줄\u3000끝 \n", problems=problems(choices=[" 가\xa0나 ", "다  라"])
    )
    assert question.passage == "첫 줄\n둘째 줄 끝"
    assert question.choices == ("가 나", "다 라")


def test_quoting_braces_duplicates_and_extra_columns(tmp_path: Path) -> None:
    question = read_one(
        tmp_path,
        paragraph='"인용", {빈칸}\n둘째 줄',
        problems=problems(choices=["같다", "같다", "다르다"], answer=2),
        explain="NA",
        source="",
    )
    assert question.passage == '"인용", {빈칸}\n둘째 줄'
    assert question.choices == ("같다", "같다", "다르다") and question.answer == 2


def test_equal_choices_are_accepted_and_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The competition's own files have them, so they are no error; but of two equal choices one is often mistyped."""
    rows = [
        {"id": row_id, "paragraph": "p", "problems": problems(choices=choices)}
        for row_id, choices in (
            ("a", ["가 나", "가\xa0 나", "다"]),
            ("b", ["가나", "가 나"]),
            ("c", ["1", "2", "2", "1"]),
        )
    ]
    path = write_rows(tmp_path / "x.csv", rows)
    for _ in range(2):
        assert [question.num_choices for question in read_questions(path)] == [3, 2, 4]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"warning: {path}: 2 of the rows have choices that are equal (first id 'a'; id 'c'); they are kept as they stand; "
        "is one mistyped?"
    )


def test_words_that_pandas_would_take_for_missing_are_text(tmp_path: Path) -> None:
    question = read_one(tmp_path, id="null", paragraph="NA", problems=problems(choices=["None", "nan"]))
    assert (question.id, question.passage, question.choices) == ("null", "NA", ("None", "nan"))


@pytest.mark.parametrize("missing", ["nan", "NaN", "None", "null", " nan\xa0"])
def test_a_missing_cell_that_became_text_is_missing(tmp_path: Path, missing: str) -> None:
    """All such rows were one passage, and their context "nan"; an answer was refused."""
    question = read_one(tmp_path, paragraph=missing, context=missing, source=missing, kind=missing, answer=missing)
    assert (question.passage, question.context, question.source, question.kind) == ("", "", "", "")
    assert find_kind(question) == "knowledge"
    flat = {"id": "a", "paragraph": "글", "question": "q", "choices": "['a', 'b']", "answer": missing}
    (found,) = read_questions(write_rows(tmp_path / "flat.csv", [flat]))
    assert found.answer is None
    with pytest.raises(InputError, match="have no answer"):
        read_questions(tmp_path / "flat.csv", labelled=True)
    assert read_one(tmp_path, paragraph=f"{missing}.").passage  # a text that only begins so


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


cells = text.filter(lambda cell: cell.strip().lower() not in ("nan", "none", "null"))  # these stand for none


@given(data=st.data(), passage=cells, plus=cells, stem=text.map("가".__add__))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives_the_file(tmp_path: Path, data: st.DataObject, passage: str, plus: str, stem: str) -> None:
    choices = data.draw(st.lists(text.map("가".__add__), min_size=2, max_size=5))
    answer = data.draw(st.integers(1, len(choices)))
    cell = repr({"question": stem, "choices": choices, "answer": answer})
    question = read_one(tmp_path, paragraph=passage, problems=cell, question_plus=plus)

    def squeeze(value: str) -> str:
        return "".join(re.sub(r"[ \t\xa0\u3000]+", "", value.replace("\r\n", "\n")).split())

    assert squeeze(question.question) == squeeze(stem)
    assert squeeze(question.passage) == squeeze(passage)
    assert squeeze(question.question_plus) == squeeze(plus)
    assert [squeeze(choice) for choice in question.choices] == [squeeze(choice) for choice in choices]
    assert question.answer == answer


def test_mistake_13_a_cell_is_never_evaluated(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    call = f"__import__('os').system('touch {marker}')"
    for cell in (call, f"{{'question': 'q', 'choices': [{call}, 'b'], 'answer': 1}}"):
        with pytest.raises(InputError, match=r"1 of the rows have a 'problems' that is not a Python literal \(id 'gen"):
            read_one(tmp_path, problems=cell)
    flat = {"id": "a", "paragraph": "p", "question": "q", "choices": f"[{call}]", "answer": "1"}
    with pytest.raises(InputError, match="1 of the rows have a 'choices' that is not a Python literal"):
        read_questions(write_rows(tmp_path / "x.csv", [flat]))
    assert not marker.exists()


def test_mistake_13_no_eval_no_bool_flags_and_no_tokens_in_the_source() -> None:
    sources = [*ROOT.glob("*.py"), *(ROOT / "ksat").glob("*.py")]
    assert len(sources) > 5
    for path in sources:
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"hf_[A-Za-z0-9]{30}|sk-[A-Za-z0-9]{30}|ghp_[A-Za-z0-9]{30}", source), path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "type" and isinstance(node.value, ast.Name):
                assert node.value.id != "bool", f"{path}:{node.value.lineno}: any text is true; use store_true"


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"problems": "{'question': 'q'"}, r"have a 'problems' that is not a Python literal .*'problems' must hold"),
        ({"problems": "{'question': null}"}, "have no 'choices' in 'problems'"),
        ({"problems": "{'question': None, 'choices': [nan, 'a']}"}, "have a question that is not text"),
        ({"problems": "{'question': 'q', 'choices': [nan, 'a']}"}, "have a choice that is empty or not text"),
        ({"problems": "{'question': 'q', 'choices': array(['a', 'b'])}"}, "of a numpy array write its .tolist()"),
        (
            {"problems": "{'question': 'q', 'choices': ['a' 'b'\n 'c']}"},
            "a list that numpy printed has none: write its",
        ),
        ({"problems": "{'question': q, 'choices': ['a', 'b']}"}, "not a Python literal"),
        ({"problems": "(" * 3000 + ")" * 3000}, "not a Python literal"),
        ({"problems": "['q']"}, r"have a 'problems' that is not a dict \(id '.*': list\)"),
        ({"problems": ""}, "not a Python literal"),
        ({"problems": "{'choices': ['a', 'b']}"}, r"have no 'question' in 'problems' \(id '.*': keys \['choices'\]\)"),
        ({"problems": "{'question': 'q'}"}, "have no 'choices' in 'problems'"),
        ({"problems": problems(question=3)}, r"have a question that is not text \(id '.*': int\)"),
        ({"problems": problems(choices="가나다라")}, "have no choices"),
        ({"problems": problems(choices=[])}, "have no choices"),
        ({"problems": problems(choices=["a"])}, r"wrong number of choices \(id '.*': 1\); expected 2 to 5"),
        ({"problems": problems(choices=list("abcdef"))}, r"wrong number of choices \(id '.*': 6\)"),
        ({"problems": problems(choices=["a", 2])}, r"have a choice that is empty or not text \(id '.*': \['a', 2\]\)"),
        ({"problems": problems(choices=["a", " "])}, "have a choice that is empty or not text"),
        (
            {"problems": problems(choices=["a", "\0"])},
            r"have a choice that is empty or not text \(id '.*': \['a', '\\x00'\]\)",
        ),
        ({"problems": problems(choices=["a", "\u200b\u2060"])}, r"have a choice that is empty or not text .*\\u200b"),
        ({"problems": problems(choices=["a", "\ufeff \x1b"])}, "have a choice that is empty or not text"),
        ({"problems": problems(choices=["a", "\u3164\u115f\ufe0f"])}, "have a choice that is empty or not text"),
        (
            {"problems": "{'question': 'q\\ud800', 'choices': ['a', 'b']}"},
            r"have half of a character \(a lone surrogate\) \(id '.*425': '\\ud800' in 'q\\ud800'\); write the character itself",
        ),
        ({"problems": "{'question': 'q', 'choices': ['a', 'b\\udfff']}"}, r"have half of a character .*'\\udfff' in"),
        (
            {"problems": "{'question': 'q', 'choices': ['a', 'b'], 'question_plus': '\\ud83d'}"},
            "have half of a character",
        ),
        (
            {"problems": "{'question': 'a', 'choices': ['a', 'b'], 'question': 'b'}"},
            r"have a key twice in 'problems' \(id '.*': 'question'\); keep one of each",
        ),
        ({"problems": "{'question': 'a', 'choices': ['a', 'b'], 'answer': 1, 'answer': 2}"}, "a key twice .*'answer'"),
        ({"problems": problems(answer=1)[:-1] + ", " + "1" * 5000 + ": 1}"}, "not a Python literal"),
        (
            {"problems": problems(answer=1)[:-1].replace("1", hex(10**5000)) + "}"},
            "out of range .*int with more digits than",
        ),
        ({"problems": f"{{'question': {hex(10**5000)}, 'choices': []}}"}, "a question that is not text"),
        (
            {"problems": f"{{'question': '', 'choices': ['a', {hex(10**5000)}]}}"},
            "a choice that is empty or not text .*more digits",
        ),
        ({"problems": f"{{{hex(10**5000)}: ''}}"}, "have no 'question' .*more digits than can be printed"),
        ({"problems": "[" * 100_000}, "not a Python literal"),
        ({"problems": "{'a':" * 100_000}, "not a Python literal"),
        ({"problems": "-" * 100_000 + "1"}, "not a Python literal"),
        ({"problems": "1+" * 100_000 + "1"}, "not a Python literal"),
        ({"problems": "{'question': 'q\0'}"}, "not a Python literal"),
        ({"problems": problems(answer=5)}, r"have an answer out of range \(id '.*': 5\); answers count from 1"),
        ({"problems": problems(answer=0)}, "have an answer out of range"),
        ({"problems": problems(answer="2")}, r"have an answer of the wrong type \(id '.*': '2'\)"),
        ({"problems": problems(answer=2.0)}, r"have an answer of the wrong type \(id '.*': 2.0\)"),
        ({"problems": problems(answer=True)}, r"have an answer of the wrong type \(id '.*': True\)"),
        ({"problems": problems(question_plus="가"), "question_plus": "나"}, "two different question_plus .*'나'.*'가'"),
        (
            {"problems": problems(question_plus="가" * 50 + "나다"), "question_plus": "가" * 50 + "다"},
            r"they differ at character 51: column '가{10}다', problems '가{10}나다'",
        ),
        ({"problems": problems(question_plus=["가"])}, r"have a question_plus that is not text \(id '.*': list\)"),
        ({"id": " "}, r"1 of the rows have an empty id \(first: data row 1\)"),
        ({"id": "a\x1f1"}, r"1 of the rows have an id with a control character \(id .*a\\x1f1.*\); take it out"),
    ],
)
def test_bad_rows_are_refused(tmp_path: Path, fields: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        read_one(tmp_path, **fields)


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [{"id": f"q{i}", "paragraph": "p", "problems": problems(choices=["a"])} for i in range(7)]
    rows.append({"id": "q7", "paragraph": "p", "problems": "x("})
    with pytest.raises(
        InputError, match=r"x.csv: 7 of the rows have .*\(first id 'q0': 1; .*; 1 more rows break other rules"
    ):
        read_questions(write_rows(tmp_path / "x.csv", rows))


def test_doubled_ids_are_refused(tmp_path: Path) -> None:
    rows = [{"id": row_id, "paragraph": "p", "problems": problems()} for row_id in ("a", "b", "a ", "a")]
    with pytest.raises(
        InputError, match=r"x.csv: 1 of the rows repeat an id that stands above \(id 'a'\); keep one of each"
    ):
        read_questions(write_rows(tmp_path / "x.csv", rows))


def test_unlabelled_rows_are_refused_where_labels_are_needed(tmp_path: Path) -> None:
    rows = [{"id": "a", "paragraph": "p", "problems": problems(answer="")}]
    with pytest.raises(
        InputError, match=r"1 of the rows have no answer \(id 'a'\); training and metrics need labelled rows"
    ):
        read_questions(write_rows(tmp_path / "x.csv", rows), labelled=True)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "the file is empty; expected a header and at least one row"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"id,paragraph,problems\n", "a header but no rows"),
        ("id,paragraph,problems\na,글,x\n".encode("cp949"), r"not UTF-8 \(byte 0xb1 at 24\); save the file as UTF-8"),
        ("id,paragraph\na,글\n".encode("utf-16"), r"not UTF-8 \(byte 0xff at 0\)"),
        (b'id,paragraph,problems\na,"p,q\n', r"not a CSV table \(unexpected end of data\); check the quoting"),
        (b'id,paragraph,problems\na,"p"x,q\n', r"not a CSV table \(',' expected after '\"'\); check the quoting"),
        (b"id,paragraph,problems\na,p,q\nb,p,q,r\n", "data row 2 has 4 fields, the header has 3; check the quoting"),
        (b"id,answer,answer\na,1,2\n", "the header has the column 'answer' twice; take one out, or rename it"),
        (b"id,paragraph,problems,x,problems\na,p,q,r,s\n", "the header has the column 'problems' twice"),
        (b"id,paragraph,problems\na,p,q,r\nb,p,q,r\n", "data row 1 has 4 fields, the header has 3; check the quoting"),
        (b"id,paragraph,problems\na,p,q\nb,p\n", "data row 2 has 2 fields, the header has 3; check the quoting"),
        (
            b"id,problems\na,b\n",
            "no column 'paragraph'; found 'id', 'problems'; give the column of the passages that name",
        ),
        (
            b"id,passage,question,choices\na,b,c,d\n",
            "no column 'paragraph'; found 'id', 'passage', 'question', 'choices'; give",
        ),
        (
            b"id,paragraph,question,A,B,answer\na,b,c,d,e,1\n",
            r"no column 'choices'; found 'id', 'paragraph', 'question', 'A', 'B', 'answer'; 'choices' must hold a list .*: write each row's",
        ),
        (b"id,x\na,b\n", "no column 'paragraph', 'problems'; found 'id', 'x'; expected id, paragraph, problems"),
        (b"id,paragraph,choices\na,b,c\n", "no column 'question'; .*expected id, paragraph, question, choices"),
        (b"a;b\n1;2\n", "no column 'id', 'paragraph', 'problems'; found 'a;b'"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(InputError, match=f"x.csv: {match}"):
        read_questions(tmp_path / "x.csv")


def test_missing_files_folders_and_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="none.csv: no such file; check the path"):
        read_questions(tmp_path / "none.csv")
    with pytest.raises(InputError, match="a folder where a file is expected; name the file in it"):
        read_questions(tmp_path)
    with pytest.raises(InputError, match=r"n.csv: can't be read \(File name too long\); check the path"):
        read_questions(tmp_path / ("n" * 300 + ".csv"))
    with pytest.raises(InputError, match="has a NUL in its name"):
        read_questions(tmp_path / "a\0.csv")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"x.csv: can't be read \(Permission denied\)"):
        read_questions(tmp_path / "x.csv")


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_and_blank_lines(tmp_path: Path, line_end: str) -> None:
    (tmp_path / "x.csv").write_bytes(line_end.join(["id,answer", "a,1", "", "b,", ""]).encode())
    assert read_table(tmp_path / "x.csv").to_dict("list") == {"id": ["a", "b"], "answer": ["1", ""]}


def make_questions(seed: int, num_rows: int = 200, num_passages: int = 120) -> list[Question]:
    rng = random.Random(seed)
    return [
        Question(f"q{i}", f"passage {rng.randrange(num_passages)}", "q", tuple("abcde"[: rng.choice([4, 5, 5])]), 1)
        for i in rng.sample(range(1000), num_rows)
    ]


def test_passage_key_ignores_blanks_and_tells_rows_without_a_passage_by_what_they_ask() -> None:
    one, other = Question("a", "가 나\n다", "q", ("x", "y"), 1), Question("b", "가나 다", "q", ("x", "y"), 1)
    assert passage_key(one) == passage_key(other)
    bare = Question("a", "", "q", ("x", "y"), 1)
    assert passage_key(bare) == passage_key(Question("b", " ", "q ", ("y", "x"), 2)) != passage_key(one)
    others = [replace(bare, question="r"), replace(bare, question_plus="r"), replace(bare, choices=("x", "z"))]
    assert len({passage_key(question) for question in [bare, *others]}) == 4


@given(
    seed=st.integers(0, 2**32 - 1),
    num_rows=st.integers(2, 80),
    spread=st.floats(0.1, 2),
    fraction=st.floats(0.01, 0.5),
)
@settings(max_examples=60, deadline=None)
def test_mistake_7_a_passage_never_stands_on_both_sides(
    seed: int, num_rows: int, spread: float, fraction: float
) -> None:
    questions = make_questions(seed, num_rows, max(1, round(spread * num_rows)))
    if len({question.passage for question in questions}) < 2:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, valid = split_validation(questions, fraction, seed=seed % 100)
    assert sorted(train + valid) == list(range(num_rows)) and train and valid
    assert train == sorted(train) and valid == sorted(valid)
    assert not {questions[i].passage for i in train} & {questions[i].passage for i in valid}


def test_split_has_the_size_and_the_mix_that_were_asked_for() -> None:
    questions = make_questions(0, 1000, 700)
    for fraction in (0.05, 0.1, 0.25, 0.5):
        train, valid = split_validation(questions, fraction, seed=0)
        assert len(valid) / 1000 == pytest.approx(fraction, abs=0.01)
        shares = [Counter(questions[i].num_choices for i in side)[4] / len(side) for side in (train, valid)]
        assert shares[0] == pytest.approx(shares[1], abs=0.03)


@pytest.mark.parametrize("seed", range(5))
def test_split_does_not_depend_on_file_order(seed: int) -> None:
    questions = make_questions(seed)
    shuffled = random.Random(seed).sample(questions, len(questions))
    held_out = {questions[i].id for i in split_validation(questions, 0.2, seed=seed)[1]}
    assert held_out == {shuffled[i].id for i in split_validation(shuffled, 0.2, seed=seed)[1]}
    assert held_out != {questions[i].id for i in split_validation(questions, 0.2, seed=seed + 1)[1]}


def test_split_of_nothing_and_of_too_little() -> None:
    questions = make_questions(0, 10)
    assert split_validation(questions, 0, seed=0) == (list(range(10)), [])
    for fraction in (-0.1, 0.51, float("nan")):
        with pytest.raises(InputError, match=rf"--valid-fraction {fraction}: expected 0 .* to 0.5"):
            split_validation(questions, fraction, seed=0)
    with pytest.raises(InputError, match="--valid-fraction 0.1: 1 passage can't be split; use --valid-fraction 0"):
        split_validation(make_questions(0, 10, 1), 0.1, seed=0)
