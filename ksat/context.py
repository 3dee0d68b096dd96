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

    @property
    def asks_kind(self) -> bool:
        """Whether kinds decide who gets a context."""
        return self.name.startswith("kind=")

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
    questions: "Sequence[Question]",
    rule: ContextRule,
    user_template: str,
    source: str,
    choices_tell: bool | None = None,
) -> "list[Question]":
    """The questions as the rule wants them, and a line that says how many got what.

    Args:
        questions: as read.
        rule: of --context-when.
        user_template: the prompt's wording.
        source: the file, for messages.
        choices_tell: whether the number of choices tells kinds in the run's training; None leaves it to this file, as read.

    Raises:
        InputError: the rule picks questions, and none of them has a context, or the wording has no place for it.
    """
    if rule.asks_kind and choices_tell is not None:
        questions = _carry_hint(questions, choices_tell, source)
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


def _carry_hint(questions: "Sequence[Question]", choices_tell: bool, source: str) -> "list[Question]":
    """The questions with the hint of their number of choices if it holds in the run, else without; a small file can't say so
    itself. Says whose kind changes by it."""
    from ksat.kinds import find_kind, kind_by_choices

    carried = [replace(row, kind_hint=kind_by_choices(row) if choices_tell else "") for row in questions]
    num_other = sum(find_kind(row) != find_kind(other) for row, other in zip(questions, carried, strict=True))
    if num_other:
        tells = "tells" if choices_tell else "does not tell"
        print(
            f"kinds: in the run's training the number of choices {tells} them, so {num_other} of {len(questions)} questions of {source} "
            "are of another kind than by this file alone"
        )
    return carried
