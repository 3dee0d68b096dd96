"""Messages -> token ids: the prompt as the base's family renders it, and each choice as its real continuation."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ksat import chat_template
from ksat.errors import InputError
from ksat.near_duplicates import are_near
from ksat.orders import ONE_ORDER, ChoiceOrders, reorder
from ksat.prompts import Message, PromptTemplate, ScoreBy, build_messages, continuations, fold_system
from ksat.questions import Question


@dataclass(frozen=True, slots=True)
class EncodedQuestion:
    """What the model sees of a question.

    The score of choice k is the sum of the log-probabilities of continuations[k] behind prompt_ids, divided by
    divisors[k]: its number of characters when choices are scored by text, 1 when by label. Training and scoring read
    the same record, so what is trained is what is scored.
    """

    id: str
    prompt_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]  # one a choice, in the row's order
    divisors: tuple[float, ...]
    answer_index: int | None
    num_cut_characters: int = 0  # taken from the middle of the passage
    num_dropped_shots: int = 0  # of those asked for, for want of room or of questions on other passages
    order: int = 0  # of its choices, 0 to num_orders - 1
    num_orders: int = 1  # in which the question is asked; this one counts 1 / num_orders in a mean over questions
    shown: tuple[int, ...] = ()  # the choice at each place of the list, counted from 0
    num_cut_context: int = 0  # characters taken from the end of the context, before any of the passage

    @property
    def key(self) -> str:
        """Its own for every order: the id, and from order 1 on the order behind a control character, which ids do not hold."""
        return self.id if self.order == 0 else f"{self.id}\x1f{self.order}"


class Encoder:
    """Encodes questions for one base.

    Args:
        tokenizer: the base's own.
        template: the prompt's wording.
        score_by: "label" or "text".
        max_tokens: a prompt's limit in tokens; the end of the context, then the middle of the passage is cut to it.
        shots: labelled questions, of which each row gets the first num_shots that are neither on its own passage nor on a near-duplicate.
        num_shots: questions to put before each.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: PromptTemplate,
        score_by: ScoreBy,
        *,
        max_tokens: int,
        shots: Sequence[Question] = (),
        num_shots: int = 0,
    ) -> None:
        self.tokenizer, self.template, self.score_by = tokenizer, template, score_by
        self.max_tokens, self.num_shots = max_tokens, num_shots
        self._shots = shots
        self.has_chat_template = bool(tokenizer.chat_template)
        self._folds_system = self.has_chat_template and not _serves_system(tokenizer)
        first = tokenizer("1").input_ids[:1]
        self._bos = tokenizer.bos_token if first and first[0] == tokenizer.bos_token_id else ""

    def encode(self, question: Question) -> EncodedQuestion:
        """The question as token ids, its choices as they stand.

        Raises:
            InputError: the question does not fit even without its passage, or a digit is not one token.
        """
        return self.encode_orders(question, ONE_ORDER)[0]

    def encode_orders(self, question: Question, orders: ChoiceOrders) -> list[EncodedQuestion]:
        """The question in several orders of its choices, the first as encode() gives it.

        continuations[k] stays that of choice k of the row, namely the digit under which this order shows it, so that scores and
        answer_index mean the same choices in every order. All orders keep the same shots and the same characters of the
        passage, so that up to the choices they share their tokens.

        Raises:
            InputError: as encode(), or several orders of choices that the prompt does not list.
        """
        if orders.count > 1 and self.score_by == "text":
            raise InputError(
                f"--choice-orders {orders.name}: --score-by text lists no choices, so they have no order; use --score-by label"
            )
        return self._encode(question, orders.of(question))

    def _encode(self, question: Question, shown: Sequence[tuple[int, ...]]) -> list[EncodedQuestion]:
        """One question in these orders, all cut alike; the first is the row's own."""
        whole_context, orders = len(question.context), [reorder(question, each) for each in shown]
        shots = usable_shots(question, self._shots, self.num_shots)
        while shots and not self._fits(orders, shots):
            shots.pop(0)
        if question.context and not self._fits(orders, shots):
            orders = self._cut_context(orders, shots)
        num_kept = self._num_fitting_characters(orders, shots)
        passage = question.passage if num_kept == len(question.passage) else _without_middle(question.passage, num_kept)
        encoded = []
        for order, asked in enumerate(orders):
            prompt_ids, branches = self._branches(asked, self.render(asked, shots, passage))
            encoded.append(
                EncodedQuestion(
                    id=question.id,
                    prompt_ids=prompt_ids,
                    continuations=tuple(branches[shown[order].index(choice)] for choice in range(question.num_choices)),
                    divisors=tuple(float(len(c)) if self.score_by == "text" else 1.0 for c in question.choices),
                    answer_index=None if question.answer is None else question.answer_index,
                    num_cut_characters=len(question.passage) - num_kept,
                    num_dropped_shots=self.num_shots - len(shots),
                    order=order,
                    num_orders=len(orders),
                    shown=shown[order],
                    num_cut_context=whole_context - len(asked.context),
                )
            )
        return encoded

    def _branches(self, question: Question, prompt: str) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Prompt ids and the continuations at each place of the list."""
        prompt_ids, branches = self._split(prompt, continuations(question, self.score_by))
        if self.score_by == "label" and any(len(branch) != 1 for branch in branches):
            raise InputError(
                f"question {question.id!r}: a digit is {[len(b) for b in branches]} tokens behind this prompt, expected one "
                "each; end the --prompt template in another way, or use --score-by text"
            )
        return prompt_ids, branches

    def render(self, question: Question, shots: Sequence[Question] = (), passage: str | None = None) -> str:
        """The prompt as text, special tokens included, up to where the answer begins."""
        messages = build_messages(self.template, question, self.score_by, shots=shots, passage=passage)
        if not self.has_chat_template:
            return self._bos + _plain(messages, "" if self.score_by == "label" else " ")
        if self._folds_system:
            messages = fold_system(messages)
        return chat_template.render(self.tokenizer, messages, add_generation_prompt=True)

    def _ids(self, text: str) -> list[int]:
        """Token ids of rendered text; it holds its special tokens already, a second BOS would move everything."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _split(self, prompt: str, texts: Sequence[str]) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
        """Prompt ids and continuation ids, tokenised together: where the border is merged, it moves to the left."""
        blank = " " if self.score_by == "text" and not self.has_chat_template and not prompt[-1:].isspace() else ""
        prompt_ids = self._ids(prompt)
        whole = [self._ids(prompt + blank + text) for text in texts]
        border = min(_common_prefix(prompt_ids, ids) for ids in whole)
        return tuple(prompt_ids[:border]), tuple(tuple(ids[border:]) for ids in whole)

    def _fits(self, orders: Sequence[Question], shots: Sequence[Question], passage: str | None = None) -> bool:
        return all(len(self._ids(self.render(shown, shots, passage))) <= self.max_tokens for shown in orders)

    def _cut_context(self, orders: Sequence[Question], shots: Sequence[Question]) -> list[Question]:
        """The orders with as much of the context's beginning as fits beside the whole passage, none of it at the least."""
        text = orders[0].context

        def cut(num_kept: int) -> list[Question]:
            return [replace(question, context=text[:num_kept].rstrip()) for question in orders]

        low, high = 0, len(text)  # `high` characters do not fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(cut(middle), shots) else (low, middle)
        return cut(low)

    def _num_fitting_characters(self, orders: Sequence[Question], shots: Sequence[Question]) -> int:
        """How many characters of the passage fit in every order: all, or the most when the middle is cut, by bisection."""
        passage = orders[0].passage
        if self._fits(orders, shots):
            return len(passage)
        low, high = -1, len(passage)  # `low` characters fit, `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            if self._fits(orders, shots, _without_middle(passage, middle)):
                low = middle
            else:
                high = middle
        if low < 0:
            raise InputError(
                f"question {orders[0].id!r}: more than --max-tokens {self.max_tokens} even without its passage; raise "
                "--max-tokens (a trained run's is fixed), or shorten the question"
            )
        return low


def usable_shots(question: Question, pool: Sequence[Question], num_shots: int) -> list[Question]:
    """The first of the pool that may stand before a question, at most num_shots: neither itself nor of its passage."""
    others = (shot for shot in pool if shot.id != question.id and not are_near(question, shot))
    return list(itertools.islice(others, num_shots))


_ELLIPSIS = "\n(중략)\n"


def _without_middle(passage: str, num_kept: int) -> str:
    """`num_kept` characters, half from the head and half from the tail."""
    head = (num_kept + 1) // 2
    return passage[:head] + _ELLIPSIS + passage[len(passage) - (num_kept - head) :]


def _plain(messages: Sequence[Message], before_answer: str) -> str:
    """Text for a base without a chat template: turns apart by a blank line, a shot's answer right behind its prompt."""
    text = ""
    for message in messages:
        if message["role"] == "assistant":
            text += ("" if text[-1:].isspace() else before_answer) + message["content"]
        else:
            text += ("\n\n" if text else "") + message["content"]
    return text


def _serves_system(tokenizer: Any) -> bool:
    """Whether the chat template keeps a system turn: some raise, some drop it without a word."""
    marker = "시스템-역할-확인"
    messages = [{"role": "system", "content": marker}, {"role": "user", "content": "1"}]
    try:
        return marker in chat_template.render(tokenizer, messages, add_generation_prompt=False)
    except InputError:  # a template that is broken altogether says so with the first prompt
        return False


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    length = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        length += 1
    return length
