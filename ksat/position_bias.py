"""Position bias: a model that likes a digit answers by it. How much it does, and PriDe, which divides that out.

PriDe (Zheng et al. 2024, https://arxiv.org/abs/2309.03882): a few questions are asked in all cyclic orders of their choices.
Averaged over the orders every choice has stood under every digit, so what is left in the log-probabilities of the digits is
the prior of the digits themselves. It is divided out of all other questions, which are asked once.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ksat.encoding import EncodedQuestion
from ksat.orders import names_choices
from ksat.predictions import FloatArray, IntArray, predicted_answers
from ksat.questions import MAX_CHOICES, Question
from ksat.tables import markdown_table

PROBED_SHARE = 0.05  # of the questions; the paper takes 2 to 20 %
FEWEST_PROBED = 20  # for every number of choices, as far as there are so many


def probed_rows(questions: Sequence[Question]) -> set[int]:
    """Indices of the questions that are asked in all orders: 5 % of those of every number of choices, at least 20; the same
    in whatever order the file has them."""
    chosen: set[int] = set()
    for size in {question.num_choices for question in questions}:
        rows = [
            i for i, question in enumerate(questions) if question.num_choices == size and not names_choices(question)
        ]
        rows.sort(key=lambda i: questions[i].id)
        random.Random(size).shuffle(rows)
        chosen |= set(rows[: max(FEWEST_PROBED, round(PROBED_SHARE * len(rows)))])
    return chosen


def log_probs(scores: FloatArray) -> FloatArray:
    """(M, 5) logarithms of the softmax over each row's own choices, NaN stays."""
    shifted = scores - np.nanmax(scores, axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.nansum(np.exp(shifted), axis=1, keepdims=True)))


def by_place(encoded: EncodedQuestion, values: FloatArray) -> FloatArray:
    """(C,) values of choices (5,) as they stand in the list: the value of the choice shown at every place."""
    return values[list(encoded.shown)]


def estimate_priors(encoded: Sequence[EncodedQuestion], scores: FloatArray) -> dict[int, FloatArray]:
    """The prior of the places, (C,) summing to 1, for every number of choices C that a probed question has.

    A question's prior is the softmax of the mean over its orders of the places' log-probabilities; the prior is the mean of
    those over the questions.

    Args:
        encoded: orders of all questions; probed are those asked in as many orders as they have choices.
        scores: (M, 5), one row an order, columns in the question's own order of choices.
    """
    logs = log_probs(scores)
    sums: dict[str, list[FloatArray]] = {}
    for row, order in enumerate(encoded):
        if order.num_orders == len(order.shown):
            sums.setdefault(order.id, []).append(by_place(order, logs[row]))
    priors: dict[int, list[FloatArray]] = {}
    for places in sums.values():
        mean = np.mean(places, axis=0)
        prior = np.exp(mean - mean.max())
        priors.setdefault(len(prior), []).append(prior / prior.sum())
    return {size: np.mean(found, axis=0) for size, found in priors.items()}


def debias(encoded: Sequence[EncodedQuestion], scores: FloatArray, priors: dict[int, FloatArray]) -> FloatArray:
    """(M, 5) log-probabilities without the places' prior; of a number of choices that has none, as they were."""
    logs = log_probs(scores)
    for row, order in enumerate(encoded):
        prior = priors.get(len(order.shown))
        if prior is not None:
            logs[row, list(order.shown)] -= np.log(prior)
    return log_probs(logs)


@dataclass(frozen=True, slots=True)
class OrderReport:
    """What the order of the choices does to the answers.

    Attributes:
        num_probed: questions that were asked in more than one order.
        changed: share of those whose answer differs between some two orders; None if there are none.
        before: (5,) share of all questions whose answer, in the file's order alone, stands at each place.
        after: (5,) the same of the final answers.
        gold: (5,) the same of the right answers; None where they are not known.
    """

    num_probed: int
    changed: float | None
    before: FloatArray
    after: FloatArray
    gold: FloatArray | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        lists = {"before": self.before, "after": self.after, "gold": self.gold}
        shares = {
            name: None if value is None else [round(float(share), 4) for share in value]
            for name, value in lists.items()
        }
        return {"num_probed": self.num_probed, "changed": self.changed, **shares}

    def format(self) -> str:
        """A table for the terminal, in the file's order of choices."""
        header = ["place", "answered before", "answered after", *(["right"] if self.gold is not None else [])]
        columns = [self.before, self.after, *([self.gold] if self.gold is not None else [])]
        body = [[str(place + 1), *(f"{column[place]:.3f}" for column in columns)] for place in range(MAX_CHOICES)]
        said = f"{self.num_probed} questions were asked in several orders"
        if self.changed is not None:
            said += f"; the answer depends on the order in {self.changed:.1%} of them"
        return f"{said}.\n\n{markdown_table(header, body)}"


def report_orders(
    encoded: Sequence[EncodedQuestion], scores: FloatArray, probs: FloatArray, gold: IntArray | None
) -> OrderReport:
    """The report of a scoring.

    Args:
        encoded: orders, those of a question behind each other, beginning with order 0.
        scores: (M, 5), one row an order.
        probs: (N, 5) final probabilities of the questions.
        gold: (N,) right answers, counted from 1, or None.
    """
    answers: dict[str, set[int]] = {}
    for row, order in enumerate(encoded):
        if order.num_orders > 1:
            answers.setdefault(order.id, set()).add(int(np.nanargmax(scores[row])))
    first = [row for row, order in enumerate(encoded) if order.order == 0]
    before = np.nanargmax(scores[first], axis=1) + 1
    changed = float(np.mean([len(found) > 1 for found in answers.values()])) if answers else None
    shares = [None if found is None else _shares(found) for found in (before, predicted_answers(probs), gold)]
    assert shares[0] is not None
    assert shares[1] is not None
    return OrderReport(len(answers), changed, shares[0], shares[1], shares[2])


def _shares(answers: IntArray) -> FloatArray:
    return np.asarray(np.bincount(answers, minlength=MAX_CHOICES + 1)[1:] / len(answers))
