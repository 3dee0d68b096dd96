"""Background for a question, retrieved or written, in the column `context`: which questions get it."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ksat.errors import InputError

if TYPE_CHECKING:
    from ksat.questions import Question


@dataclass(frozen=True, slots=True)
class ContextRule:
    """Which questions get their context into the prompt.

    Attributes:
        name: "all", "none", "kind=reading", "kind=knowledge", or "short:N" for passages of fewer than N characters.
    """

    name: str

    @classmethod
    def parse(cls, text: str) -> "ContextRule":
        """An argparse type."""
        if not re.fullmatch(r"all|none|kind=(reading|knowledge)|short:[1-9][0-9]{0,6}", text):
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected all, none, kind=knowledge, kind=reading, or short:N for passages under N characters"
            )
        return cls(text)

    def picks(self, question: "Question") -> bool:
        """Whether the rule gives this question its context."""
        from ksat.kinds import find_kind

        if self.name in ("all", "none"):
            return self.name == "all"
        if self.name.startswith("short:"):
            return len(question.passage) < int(self.name.removeprefix("short:"))
        return find_kind(question) == self.name.removeprefix("kind=")

    def apply(self, questions: "Sequence[Question]") -> "list[Question]":
        """The questions, those that the rule does not pick without their context."""
        return [question if self.picks(question) else replace(question, context="") for question in questions]


NO_CONTEXT = ContextRule("none")


def take_context(
    questions: "Sequence[Question]", rule: ContextRule, user_template: str, source: str
) -> "list[Question]":
    """The questions as the rule wants them, and a line that says how many got what.

    Args:
        questions: as read.
        rule: of --context-when.
        user_template: the prompt's wording.
        source: the file, for messages.

    Raises:
        InputError: the rule picks questions, and none of them has a context, or the wording has no place for it.
    """
    picked = [question for question in questions if rule.picks(question)]
    if picked and "{context}" not in user_template:
        raise InputError(
            f"--context-when {rule.name}: the prompt's wording has no field {{context}}; put it into [user]"
        )
    given = [question for question in picked if question.context]
    if picked and not given:
        raise InputError(
            f"--context-when {rule.name}: none of the {len(picked)} questions of {source} that it picks has a text in the column "
            "'context'; python -m ksat.retrieve fills it, --context-when none does without"
        )
    if given:
        characters = sum(len(question.context) for question in given) / len(given)
        print(
            f"context: {len(given)} of {len(questions)} questions of {source} get theirs, {characters:.0f} characters on average "
            f"({rule.name} picks {len(picked)})"
        )
    elif with_column := sum(bool(question.context) for question in questions):
        print(f"context: {with_column} questions of {source} have one, and none gets it (--context-when {rule.name})")
    return rule.apply(questions)
