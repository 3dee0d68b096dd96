"""Orders of a question's choices: what another order is, and which questions must not be shown in one.

Where the order carries meaning ("①과 ②", "위의 모두"), another order would ask another question. A doubtful case counts as
meaningful: that costs a few orders, while a wrong order teaches or scores a wrong answer.
"""

import argparse
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ksat.questions import Question  # which takes half a second; --help needs none

# Korean tests number their choices ①-⑤; ㉠, ⓐ, (가), ㄱ and A mark parts of a text or of a <보기>.
_CIRCLED = "[①-⑤⑴-⑸⒈-⒌⓵-⓹❶-❺➀-➄➊-➎]"
_NUMBER = r"(?<!\d)(?:\([1-5]\)|[1-5]번|[1-5]\)|[1-5](?!\d))"
_AND = r"(?: ?(?:과|와|하고|이나|[,·&]) ?|,? (?:및|또는|혹은|and|or|nor) )"
_CHOICE = "(?:선택지|선지|답지)"

# By number: in a choice, the question or its <보기>.
_BY_NUMBER = re.compile(
    rf"{_CIRCLED}"
    rf"|(?<!\d)[1-5]번?{_AND}[1-5]번(?!째)"
    rf"|{_NUMBER} ?{_CHOICE}|{_CHOICE} ?{_NUMBER}"
    rf"|(?:(?:첫|두|세|네|다섯) ?번째|첫째|둘째|셋째|넷째|다섯째|첫|마지막) ?{_CHOICE}"
    r"|\b(?:[Oo]ption|[Cc]hoice|[Aa]nswer)s? (?:[1-5]|[A-E]|\([1-5A-E]\))(?!\w)"
)
# By place: only in a choice, since what stands above the question is its passage ("위의 설명에 해당하는 암석은?").
# In Korean only at the choice's beginning: behind a noun 위 and 앞 are places in the world ("도마 위에 모두 올린다").
_BY_PLACE = re.compile(
    r"^(?:바로 )?(?:위|앞|아래|이상|상기)(?:의|에|에는|에서|에 있는)? (?:\S+ ){0,2}?"
    rf"(?:보기|모두|모든|전부|다(?!\S)|[두세네](?: |가지|개)|둘|셋|넷|어느 ?것|아무 ?것|해당 ?없|없[음다]|{_CHOICE})"
    r"|\b(?i:(?:all|any|none|some|of|the) above)\b|\b(?i:above) (?:option|choice|answer)s?\b"
    r"|\b(?i:both|either|neither) (?:[1-5A-E]|\([1-5A-E]\))(?:,| and\b| or\b| nor\b)"
)
# A choice that is a list of numbers ("1과 3", "(2), (4)"), or of letters as English tests letter their choices ("A and C").
_LIST = re.compile(
    rf"{_NUMBER}(?:{_AND}{_NUMBER})+(?: ?(?:모두|둘 ?다|다|만|only))?\.?"
    r"|(?:(?:정)?답은 |보기 ?)?(?:\([1-5]\)|[1-5]번)(?:만|뿐|이다|이 아니다)\.?"
    rf"|보기 ?{_NUMBER}(?:{_AND}{_NUMBER})*\.?"
    r"|[A-E](?:, ?[A-E])+\.?"
    r"|(?:Only )?(?:[A-E]|\([A-E]\))(?:, ?(?:[A-E]|\([A-E]\)))*,? (?:and|or|nor|&) (?:[A-E]|\([A-E]\))(?: only)?\.?"
)


def names_choices(question: "Question") -> bool:
    """Whether the order of the choices carries meaning, so that they must be shown as they stand.

    True where a choice, the question or its <보기> points at a choice by number ("①과 ②", "1번과 3번", "options 1 and 2"), where
    a choice points at others by place ("위의 모두", "none of the above"), and where every choice begins with its own number.
    Words that hold at any place ("모두 옳다", "정답 없음"), other marks (㉠, ㄱ, (가)) and the passage do not count.
    """
    return (
        any(_BY_NUMBER.search(text) for text in (question.question, question.question_plus, *question.choices))
        or any(_BY_PLACE.search(choice) or _LIST.fullmatch(choice) for choice in question.choices)
        or all(_begins_with(str(k + 1), choice) for k, choice in enumerate(question.choices))
    )


def _begins_with(number: str, choice: str) -> bool:
    """'3', '3번', '(3)', '3. 봄', '3) 봄'; but neither '3.5배' nor '3개'."""
    return re.match(rf"[(\[]?{number}(?:번?$|번?[.)\]:](?!\d))", choice) is not None


@dataclass(frozen=True, slots=True)
class ChoiceOrders:
    """Which orders of a question's choices are asked, the row's own always first.

    Attributes:
        kind: "cyclic" turns the list, "reverse" adds its reverse, "random" draws others, seeded by the question's id.
        count: orders altogether; a question has no more than it has different ones.
    """

    kind: Literal["cyclic", "reverse", "random"]
    count: int

    @classmethod
    def parse(cls, text: str) -> "ChoiceOrders":
        """An argparse type: "5", "reverse" or "random:5"."""
        if text == "reverse":
            return cls("reverse", 2)
        kind, colon, count = text.rpartition(":")
        if not re.fullmatch("[1-9][0-9]{0,3}", count) or kind not in ("", "random") or bool(colon) != bool(kind):
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number such as 5, reverse, or random:5")
        return cls("random" if kind else "cyclic", int(count))

    def at_most(self, questions: "Sequence[Question]") -> "ChoiceOrders":
        """The same with no more orders than any of these questions has; says so where that is fewer than were asked for."""
        size = max((question.num_choices for question in questions), default=1)
        most = size if self.kind == "cyclic" else 2 if self.kind == "reverse" else math.factorial(size)
        if self.count <= most:
            return self
        fewer = replace(self, count=most)
        print(
            f"--choice-orders {self.name}: {size} choices have {most} such orders; --choice-orders {fewer.name} is taken"
        )
        return fewer

    @property
    def name(self) -> int | str:
        """As it was asked for."""
        return self.count if self.kind == "cyclic" else "reverse" if self.kind == "reverse" else f"random:{self.count}"

    def of(self, question: "Question") -> list[tuple[int, ...]]:
        """The orders of a question's C choices, each as the choice that is shown at every place, both counted from 0.

        The row's own alone where the order carries meaning (names_choices).
        """
        size = question.num_choices
        if self.count == 1 or names_choices(question):
            return [tuple(range(size))]
        if self.kind == "cyclic":
            return [tuple((place + order) % size for place in range(size)) for order in range(min(self.count, size))]
        if self.kind == "reverse":
            return [tuple(range(size)), tuple(reversed(range(size)))]
        generator = random.Random(question.id)
        found = {tuple(range(size)): None}
        while len(found) < min(self.count, math.factorial(size)):
            found[tuple(generator.sample(range(size), size))] = None
        return list(found)


ONE_ORDER, ALL_ORDERS = ChoiceOrders("cyclic", 1), ChoiceOrders("cyclic", 5)


def reorder(question: "Question", shown: Sequence[int]) -> "Question":
    """The same question with choice shown[j] at place j; its answer follows.

    Args:
        question: C choices, labelled or not.
        shown: every number from 0 to C - 1 once.
    """
    choices = tuple(question.choices[choice] for choice in shown)
    answer = None if question.answer is None else list(shown).index(question.answer_index) + 1
    return replace(question, choices=choices, answer=answer)
