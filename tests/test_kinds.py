"""Reading or knowledge: the source first, then the wording, then the length."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from ksat.kinds import SHORT, find_kind
from ksat.questions import Question, read_questions

ROOT = Path(__file__).parent.parent

LONG = "어느 마을에 오래된 느티나무가 있었다. " * 12


def asked(question: str, *, passage: str = LONG, plus: str = "", source: str = "") -> Question:
    return Question("q", passage, question, ("가", "나", "다", "라"), 1, plus, source)


@pytest.mark.parametrize(
    "question",
    [
        "윗글에 이어질 내용으로 가장 적절한 것은?", "윗글의 내용과 일치하지 않는 것은?", "윗글을 통해 알 수 있는 내용은?",
        "㉠에 들어갈 말로 가장 적절한 것은?", "지문에 따르면, 두 나라의 관계에 영향을 미치지 않은 것은 무엇인가?",
        "그가 던지는 방법을 되돌린 까닭은?", "글쓴이의 주장으로 가장 적절한 것은?", "윗글의 제목은?",
    ],
)  # fmt: skip
def test_questions_about_the_text(question: str) -> None:
    assert find_kind(asked(question)) == "reading"
    assert find_kind(asked(question, passage="짧은 글이다.")) == "reading"


@pytest.mark.parametrize(
    "question",
    [
        "위의 책에 대한 설명으로 옳지 않은 것은?", "이 지역의 기후에 대한 설명으로 옳은 것은?", "위의 비석을 세운 왕의 업적은?",
        "윗글의 사상가가 주장한 내용으로 옳은 것은?", "다음 조약이 맺어진 시기의 모습은?", "밑줄 친 '이 나라'에 대한 설명으로 옳은 것은?",
    ],
)  # fmt: skip
def test_questions_about_what_a_text_points_to(question: str) -> None:
    assert find_kind(asked(question)) == "knowledge"
    assert find_kind(asked(question, passage="짧은 글이다.")) == "knowledge"


def test_without_a_cue_the_length_decides_and_the_box_counts() -> None:
    assert find_kind(asked("이 사람은?", passage="가" * SHORT)) == "reading"
    assert find_kind(asked("이 사람은?", passage="가" * (SHORT - 1))) == "knowledge"
    assert find_kind(asked("이 사람은?", passage="가", plus="나" * SHORT)) == "reading"


def test_how_often_the_rule_errs_on_our_labelled_samples() -> None:
    """The figures of docs/results.md: it was made looking at the training rows, and tried on the test rows."""
    with (ROOT / "tests/sample_kinds.csv").open(encoding="utf-8", newline="") as file:
        labels = {row["id"]: row["kind"] for row in csv.DictReader(file)}
    errors = {}
    for name in ("train", "test"):
        questions = read_questions(ROOT / f"data/sample_{name}.csv")
        for kind in ("reading", "knowledge"):
            own = [question for question in questions if labels[question.id] == kind]
            errors[name, kind] = (sum(find_kind(question) != kind for question in own), len(own))
    assert errors == {
        ("train", "reading"): (6, 101),
        ("train", "knowledge"): (7, 31),
        ("test", "reading"): (3, 75),
        ("test", "knowledge"): (6, 25),
    }


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("KLUE MRC", "reading"),
        ("KMMLU", "knowledge"),
        ("MMMLU (Ko)", "knowledge"),
        ("수능 국어", "reading"),
        ("한국사", "knowledge"),
    ],
)
def test_a_source_that_names_its_kind_decides(source: str, kind: str) -> None:
    for question in ("위의 책에 대한 설명으로 옳은 것은?", "윗글의 내용과 일치하는 것은?"):
        assert find_kind(asked(question, source=source)) == kind
    assert find_kind(asked("윗글의 내용과 일치하는 것은?", source="엄마")) == "reading"


def test_sources_of_the_language_itself_are_no_law() -> None:
    question = Question("a", "가" * 200, "윗글의 내용과 일치하는 것은?", ("가", "나"), 1)
    found = {
        source: find_kind(replace(question, source=source)) for source in ("화법과 작문", "문법", "법과 정치", "형법")
    }
    assert found == {"화법과 작문": "reading", "문법": "reading", "법과 정치": "knowledge", "형법": "knowledge"}
