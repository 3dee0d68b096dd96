"""Question -> chat messages: wording, templates from files, shots, and what a row with four choices is told."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ksat.errors import InputError
from ksat.prompts import (
    DEFAULT_TEMPLATES,
    FIELDS,
    PromptTemplate,
    ScoreBy,
    build_messages,
    continuations,
    digits,
    fill,
    fold_system,
    read_template,
)
from ksat.questions import Question

ROOT = Path(__file__).resolve().parent.parent
FOUR = Question("q4", "강은 바다로 흐른다.", "강이 가는 곳은?", ("산", "바다", "들", "숲"), 2)
FIVE = Question("q5", "해는 동쪽에서 뜬다.", "해가 뜨는 쪽은?", ("서", "남", "북", "동", "위"), 4, "나침반을 본다.")


def user_turn(question: Question, score_by: ScoreBy = "label") -> str:
    return build_messages(DEFAULT_TEMPLATES[score_by], question, score_by)[-1]["content"]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_default_prompt_by_label() -> None:
    assert build_messages(DEFAULT_TEMPLATES["label"], FOUR, "label") == [
        {"role": "system", "content": "지문을 읽고 질문의 답을 고르세요."},
        {
            "role": "user",
            "content": (
                "지문:\n강은 바다로 흐른다.\n\n질문:\n강이 가는 곳은?\n\n1, 2, 3, 4 중에서 정답 하나를 고르세요.\n\n"
                "선택지:\n1 - 산\n2 - 바다\n3 - 들\n4 - 숲\n\n정답:"
            ),
        },
    ]


def test_the_default_prompt_by_text_lists_no_choices() -> None:
    (message,) = build_messages(DEFAULT_TEMPLATES["text"], FIVE, "text")
    assert message == {
        "role": "user",
        "content": "해는 동쪽에서 뜬다.\n\n질문: 해가 뜨는 쪽은?\n\n<보기>\n나침반을 본다.\n답:",
    }


def test_mistake_3_a_row_with_four_choices_is_told_of_four() -> None:
    assert "5" not in user_turn(FOUR)
    assert "1, 2, 3, 4 중에서" in user_turn(FOUR)
    assert "1, 2, 3, 4, 5 중에서" in user_turn(FIVE)
    two = replace(FOUR, choices=("가", "나"), answer=1)
    assert not re.search("[345]", user_turn(two))
    assert [len(continuations(q, by)) for q in (two, FOUR, FIVE) for by in ("label", "text")] == [2, 2, 4, 4, 5, 5]


@pytest.mark.parametrize("score_by", ["label", "text"])
def test_the_box_stands_between_question_and_choices_or_nowhere(score_by: ScoreBy) -> None:
    assert "해가 뜨는 쪽은?\n\n<보기>\n나침반을 본다.\n" in user_turn(FIVE, score_by)
    assert "보기" not in user_turn(FOUR, score_by)


def test_continuations_are_the_rows_own() -> None:
    assert digits(4) == ["1", "2", "3", "4"]
    assert continuations(FIVE, "label") == ["1", "2", "3", "4", "5"]
    assert continuations(FIVE, "text") == ["서", "남", "북", "동", "위"]


def test_braces_in_a_row_stay_as_they_are() -> None:
    passage = "집합 {choices}와 {0}, {{x}}, {labels}, 100%s \\1 \\g<0>"
    question = replace(
        FOUR, passage=passage, question="{passage}는?", choices=("{question}", "{", "}", "{}"), question_plus="{labels}"
    )
    content = user_turn(question)
    assert content.startswith(f"지문:\n{passage}\n\n질문:\n{{passage}}는?\n\n<보기>\n{{labels}}\n\n1, 2, 3, 4 중")
    assert "1 - {question}\n2 - {\n3 - }\n4 - {}\n" in content


def test_fill_knows_every_field_and_takes_the_passage_it_is_given() -> None:
    wording = "|".join(f"{{{field}}}" for field in FIELDS)
    assert fill(wording, FIVE, "잘린 글") == (
        "잘린 글|해가 뜨는 쪽은?|\n\n<보기>\n나침반을 본다.|1 - 서\n2 - 남\n3 - 북\n4 - 동\n5 - 위|1, 2, 3, 4, 5|"
    )


@pytest.mark.parametrize("score_by", ["label", "text"])
def test_a_context_stands_behind_the_passage_or_nowhere(score_by: ScoreBy) -> None:
    told = user_turn(replace(FIVE, context="해는 {별}이다."), score_by)
    assert "해는 동쪽에서 뜬다.\n\n배경 지식:\n해는 {별}이다.\n\n질문:" in told
    assert told.replace("배경 지식:\n해는 {별}이다.\n\n", "") == user_turn(FIVE, score_by)


def test_no_passage_leaves_no_blank_lines_in_front() -> None:
    assert user_turn(replace(FOUR, passage=""), "text") == "질문: 강이 가는 곳은?\n답:"


def test_a_cut_passage_replaces_the_whole_one_everywhere() -> None:
    template = PromptTemplate(system="글: {passage}", user="{passage} {choices}")
    messages = build_messages(template, FOUR, "label", passage="강은")
    assert [message["content"][:7] for message in messages] == ["글: 강은", "강은 1 - "]


@pytest.mark.parametrize(("score_by", "answers"), [("label", ["4", "2"]), ("text", ["동", "바다"])])
def test_shots_are_turns_of_their_own(score_by: ScoreBy, answers: list[str]) -> None:
    asked = replace(FOUR, id="asked", passage="다른 글", answer=None)
    messages = build_messages(DEFAULT_TEMPLATES[score_by], asked, score_by, shots=[FIVE, FOUR])
    turns = messages[1:] if score_by == "label" else messages
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert [turn["content"] for turn in turns[1::2]] == answers
    assert [turn["content"] for turn in turns[::2]] == [user_turn(q, score_by) for q in (FIVE, FOUR, asked)]


def test_an_unlabelled_shot_is_refused() -> None:
    with pytest.raises(ValueError, match="question 'q4' has no answer"):
        build_messages(DEFAULT_TEMPLATES["label"], FIVE, "label", shots=[replace(FOUR, answer=None)])


def test_fold_system() -> None:
    system, user, answer = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))
    folded = {"role": "user", "content": "s\n\nu"}
    assert fold_system([system, user, answer, user]) == [folded, answer, user]
    assert fold_system([user, answer]) == [user, answer]
    assert fold_system([]) == []


def test_a_template_from_a_file(tmp_path: Path) -> None:
    path = write(tmp_path, "\n[system]\n{labels} 중에서 골라라.\n둘째 줄\n\n[user]\n{passage}\n{choices}\n답: \n")
    assert read_template(path, "label") == PromptTemplate(
        system="{labels} 중에서 골라라.\n둘째 줄", user="{passage}\n{choices}\n답: "
    )


def test_a_template_needs_no_system_turn_and_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff[user]\n{question} [user]가 아니다\n답:")
    template = read_template(path, "text")
    assert template == PromptTemplate(system="", user="{question} [user]가 아니다\n답:")
    assert PromptTemplate(**template.to_dict()) == template


def test_windows_line_ends_in_a_template(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("[system]\r\n가\r\n[user]\r\n나\r\n{choices}\r\n".encode())
    assert read_template(path, "label") == PromptTemplate(system="가", user="나\n{choices}")


@pytest.mark.parametrize("path", sorted((ROOT / "prompts").glob("*.txt")), ids=lambda path: path.stem)
def test_the_templates_that_we_ship(path: Path) -> None:
    template = read_template(path, "text")
    assert build_messages(template, FIVE, "text")[-1]["role"] == "user"


@pytest.mark.parametrize(
    ("text", "score_by", "message"),
    [
        ("{choices}", "label", r"prompt.txt: expected a line \[user\]"),
        ("[system]\n{choices}", "label", r"expected a line \[user\]"),
        ("머리말\n[user]\n{choices}", "label", r"expected a line \[user\]"),
        ("", "text", r"expected a line \[user\]"),
        ("[user]\n{choices}\n{answer}", "label", r"unknown field \{answer\}; known: \{passage\}, \{question\}"),
        ("[system]\n{지문}\n[user]\n{choices}", "label", r"unknown field \{지문\}"),
        ("[user]\n{passage1}", "text", r"unknown field \{passage1\}"),
        ("[user]\n{question}", "label", r"the field \{choices\} is missing from \[user\]; --score-by label needs it"),
        ("[system]\n{choices}\n[user]\n{question}", "label", r"\{choices\} is missing from \[user\]"),
        ("[user]\n{choices}", "text", "--score-by text lists no choices"),
        (
            "[user]\n{choices}\n[user]\n{choices}",
            "label",
            r"a line \[system\] or \[user\] stands there twice; keep one of each",
        ),
        ("[system]\n{labels}\n[user]\n{question}", "text", "--score-by text lists no choices"),
    ],
)
def test_bad_templates(tmp_path: Path, text: str, score_by: ScoreBy, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_template(write(tmp_path, text), score_by)


def test_unreadable_templates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--prompt .*none.txt: no such file"):
        read_template(tmp_path / "none.txt", "label")
    with pytest.raises(InputError, match="--prompt .*: a folder where a file is expected"):
        read_template(tmp_path, "label")
    with pytest.raises(InputError, match=r"--prompt .*: can't be read \(File name too long\)"):
        read_template(tmp_path / ("n" * 300), "label")
    with pytest.raises(InputError, match="--prompt .*: has a NUL in its name"):
        read_template("a\0b", "label")
    path = tmp_path / "prompt.txt"
    path.write_bytes("[user]\n지문 {choices}".encode("cp949"))
    with pytest.raises(InputError, match="--prompt .*prompt.txt: not UTF-8"):
        read_template(path, "label")
