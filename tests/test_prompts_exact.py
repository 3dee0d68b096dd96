"""What is said of a prompt file, to the last character, and the corners of its form."""

from pathlib import Path

import pytest

from ksat.errors import InputError
from ksat.prompts import PromptTemplate, ScoreBy, build_messages, fold_system, read_template
from ksat.questions import Question

ROW = Question("q", "p", "Q", ("x", "y"), 2)


@pytest.mark.parametrize(
    ("text", "score_by", "message"),
    [
        ("[user]\na\n[user]\n{choices}", "label", "a line [system] or [user] stands there twice; keep one of each"),
        (
            "[system]\na\n[system]\nb\n[user]\n{choices}",
            "label",
            "a line [system] or [user] stands there twice; keep one of each",
        ),
        ("{choices}", "label", "expected a line [user] (and [system] if wanted), each followed by its wording"),
        (
            "x\n[user]\n{choices}",
            "label",
            "expected a line [user] (and [system] if wanted), each followed by its wording",
        ),
        (
            "[user]\n{choices}{b}{a}",
            "label",
            "unknown field {a}; known: {passage}, {question}, {question_plus}, {choices}, {labels}, {context}",
        ),
        ("[user]\n{labels}", "label", "the field {choices} is missing from [user]; --score-by label needs it"),
        ("[user]\n{choices}", "text", "--score-by text lists no choices; take {choices} and {labels} out"),
        ("[user]\n{labels}", "text", "--score-by text lists no choices; take {choices} and {labels} out"),
    ],
)
def test_what_is_said_of_a_template(tmp_path: Path, text: str, score_by: ScoreBy, message: str) -> None:
    path = tmp_path / "p.txt"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_template(path, score_by)
    assert str(caught.value) == f"--prompt {path}: {message}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[user] \t\n\n{question}\n\n", PromptTemplate("", "{question}")),
        ("[user]{question}", PromptTemplate("", "{question}")),
        (" \n[system]\r a \r\n[user]\r\n{question} ", PromptTemplate(" a ", "{question} ")),
        ("[user]\n{question}\n[system]\nlast", PromptTemplate("last", "{question}")),
        (
            "[user]\n{question} {} { question } {Question?}",
            PromptTemplate("", "{question} {} { question } {Question?}"),
        ),
    ],
)
def test_the_corners_of_a_template_file(tmp_path: Path, text: str, expected: PromptTemplate) -> None:
    (tmp_path / "p.txt").write_text(text, newline="")
    assert read_template(tmp_path / "p.txt", "text") == expected
    assert expected.to_dict() == {"system": expected.system, "user": expected.user}


def test_messages_to_the_last_character() -> None:
    template = PromptTemplate("S {passage}{labels}", "\n{passage}:{question}{question_plus}\n{choices}\n")
    shot = Question("s", "other", "O", ("no", "yes"), 1, "box")
    assert build_messages(template, ROW, "text", shots=[shot], passage="") == [
        {"role": "system", "content": "S 1, 2"},
        {"role": "user", "content": "other:O\n\n<보기>\nbox\n1 - no\n2 - yes"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": ":Q\n1 - x\n2 - y"},
    ]
    assert build_messages(template, ROW, "label")[0]["content"] == "S p1, 2"


def test_a_system_turn_is_folded_into_the_turn_behind_it() -> None:
    messages = [{"role": role, "content": content} for role, content in (("system", "s"), ("user", "u"), ("x", "y"))]
    assert fold_system(messages) == [{"role": "user", "content": "s\n\nu"}, messages[2]]
    assert fold_system(tuple(messages[1:])) == messages[1:]
