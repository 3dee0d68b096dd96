"""Question -> chat messages. The one builder of prompts: training, validation, inference and exploration use it."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ksat.errors import InputError
from ksat.files import read_text
from ksat.questions import Question

ScoreBy = Literal["label", "text"]
Message = dict[str, str]

FIELDS = ("passage", "question", "question_plus", "choices", "labels", "context")
_FIELD = re.compile(r"\{(" + "|".join(FIELDS) + r")\}")
_ANY_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The wording of a prompt: a system turn (may be empty) and a user turn with named fields.

    Fields: {passage}, {context} (the background with its heading and a blank line, or nothing), {question}, {question_plus} (the <보기> box with its heading, or nothing), {choices} (one a line,
    "1 - ..."), {labels} ("1, 2, 3, 4" for a row with four choices).
    """

    system: str
    user: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


DEFAULT_TEMPLATES: dict[ScoreBy, PromptTemplate] = {
    # The choices and the digits stand in the prompt; the continuation is one digit.
    "label": PromptTemplate(
        system="지문을 읽고 질문의 답을 고르세요.",
        user=(
            "지문:\n{passage}\n\n{context}질문:\n{question}{question_plus}\n\n"
            # Before the choices: what stands behind them is computed anew for every choice order.
            "{labels} 중에서 정답 하나를 고르세요.\n\n선택지:\n{choices}\n\n정답:"
        ),
    ),
    # The choices are not listed: each is scored as a continuation.
    "text": PromptTemplate(system="", user="{passage}\n\n{context}질문: {question}{question_plus}\n답:"),
}


def read_template(path: Path | str, score_by: ScoreBy) -> PromptTemplate:
    """A template from a text file: `[system]` and `[user]` on lines of their own, each followed by its wording.

    Raises:
        InputError: no such file, no text, no [user] part or two of them, an unknown field, or a field missing that the way of scoring needs.
    """
    text = read_text(Path(path), f"--prompt {path}").replace("\r\n", "\n").replace("\r", "\n")
    pieces = re.split(r"(?m)^\[(system|user)\][ \t]*\n?", text)
    parts = {name: body.strip("\n") for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}
    if len(parts) < len(pieces) // 2:
        raise InputError(f"--prompt {path}: a line [system] or [user] stands there twice; keep one of each")
    if not parts.get("user", "").strip() or pieces[0].strip():
        raise InputError(
            f"--prompt {path}: expected a line [user] (and [system] if wanted), each followed by its wording"
        )
    if unknown := sorted(set(_ANY_FIELD.findall(text)) - set(FIELDS)):
        raise InputError(
            f"--prompt {path}: unknown field {{{unknown[0]}}}; known: {', '.join(f'{{{f}}}' for f in FIELDS)}"
        )
    if score_by == "label" and "{choices}" not in parts["user"]:
        raise InputError(f"--prompt {path}: the field {{choices}} is missing from [user]; --score-by label needs it")
    if score_by == "text" and ("{choices}" in text or "{labels}" in text):
        raise InputError(f"--prompt {path}: --score-by text lists no choices; take {{choices}} and {{labels}} out")
    return PromptTemplate(system=parts.get("system", ""), user=parts["user"])


def digits(num_choices: int) -> list[str]:
    """The labels of a question's own choices: '1' to the number of its choices."""
    return [str(i + 1) for i in range(num_choices)]


def fill(wording: str, question: Question, passage: str) -> str:
    """The wording with its fields filled in one pass, so braces inside a passage stay as they are.

    Args:
        wording: text with {field}s.
        question: the row.
        passage: its passage, possibly cut.
    """
    values = {
        "passage": passage,
        "context": f"배경 지식:\n{question.context}\n\n" if question.context else "",
        "question": question.question,
        "question_plus": f"\n\n<보기>\n{question.question_plus}" if question.question_plus else "",
        "choices": "\n".join(f"{d} - {c}" for d, c in zip(digits(question.num_choices), question.choices, strict=True)),
        "labels": ", ".join(digits(question.num_choices)),
    }
    return _FIELD.sub(lambda match: values[match.group(1)], wording).strip("\n")


def continuations(question: Question, score_by: ScoreBy) -> list[str]:
    """What is scored behind the prompt: the row's own digits, or the texts of its choices."""
    return digits(question.num_choices) if score_by == "label" else list(question.choices)


def build_messages(
    template: PromptTemplate,
    question: Question,
    score_by: ScoreBy,
    *,
    shots: Sequence[Question] = (),
    passage: str | None = None,
) -> list[Message]:
    """Chat messages that end with the user's turn; the answer is what follows them.

    Args:
        template: the wording.
        question: the row to ask.
        score_by: what a shot answers with, its digit or its choice's text.
        shots: labelled questions put before it, each a user and an assistant turn.
        passage: replaces the row's passage (when it was cut).
    """
    text = question.passage if passage is None else passage
    messages: list[Message] = []
    if template.system:
        messages.append({"role": "system", "content": fill(template.system, question, text)})
    for shot in shots:
        messages.append({"role": "user", "content": fill(template.user, shot, shot.passage)})
        messages.append({"role": "assistant", "content": continuations(shot, score_by)[shot.answer_index]})
    messages.append({"role": "user", "content": fill(template.user, question, text)})
    return messages


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """The same messages with the system turn put in front of the first user turn, for families without that role."""
    if not messages or messages[0]["role"] != "system":
        return list(messages)
    system, first, *rest = messages
    return [{"role": first["role"], "content": f"{system['content']}\n\n{first['content']}"}, *rest]
