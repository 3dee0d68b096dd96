"""Encoded questions to the last field, on tokenizers that can be read: a character is a token, numbered by its code point."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ksat.encoding import EncodedQuestion, Encoder
from ksat.errors import InputError
from ksat.orders import ChoiceOrders
from ksat.prompts import PromptTemplate
from ksat.questions import Question

PLAIN = PromptTemplate("", "{passage}|{context}{question}|{choices}|")
BY_TEXT = PromptTemplate("", "{passage}|{question}:")
ASKED = Question("q", "abcdefgh", "Q", ("x", "yy", "z"), 2)
SHOT = Question("s", "other", "S", ("no", "yes"), 2)


class Characters:
    """A tokenizer of characters; `bos` stands in front where special tokens are asked for, `merged` are tokens of their own."""

    name_or_path = "characters"

    def __init__(self, chat_template: Any = None, bos: str | None = None, merged: Sequence[str] = ()) -> None:
        self.chat_template, self.bos_token, self.merged = chat_template, bos, merged
        self.bos_token_id = ord(bos) if bos else None
        self.asked: list[dict[str, Any]] = []

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        ids = [ord(self.bos_token)] if self.bos_token and add_special_tokens else []
        while text:
            whole = next((piece for piece in self.merged if text.startswith(piece)), text[0])
            ids.append(sum(ord(c) * 1000**i for i, c in enumerate(whole)))
            text = text[len(whole) :]
        return SimpleNamespace(input_ids=ids)

    def apply_chat_template(self, messages: list[dict[str, str]], **how: Any) -> str:
        self.asked.append(how)
        return str(self.chat_template(messages)) + ("<answer>" if how["add_generation_prompt"] else "")


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def turns(messages: list[dict[str, str]]) -> str:
    return "".join(f"<{message['role']}>{message['content']}" for message in messages)


def without_system(messages: list[dict[str, str]]) -> str:
    return turns([message for message in messages if message["role"] != "system"])


def refusing_system(messages: list[dict[str, str]]) -> str:
    if messages[0]["role"] == "system":
        raise ValueError("no such role")
    return turns(messages)


def make_encoder(
    tokenizer: Any = None, template: PromptTemplate = PLAIN, score_by: Any = "label", **how: Any
) -> Encoder:
    return Encoder(tokenizer or Characters(), template, score_by, **{"max_tokens": 1000} | how)


def test_by_label_to_the_last_field() -> None:
    assert make_encoder().encode(ASKED) == EncodedQuestion(
        id="q",
        prompt_ids=ids("abcdefgh|Q|1 - x\n2 - yy\n3 - z|"),
        continuations=(ids("1"), ids("2"), ids("3")),
        divisors=(1.0, 1.0, 1.0),
        answer_index=1,
        num_cut_characters=0,
        num_dropped_shots=0,
        order=0,
        num_orders=1,
        shown=(0, 1, 2),
        num_cut_context=0,
    )


def test_by_text_to_the_last_field() -> None:
    """Behind a colon a blank belongs to the choice; its divisor is the characters without it."""
    encoded = make_encoder(template=BY_TEXT, score_by="text").encode(replace(ASKED, answer=None))
    assert encoded == EncodedQuestion(
        id="q",
        prompt_ids=ids("abcdefgh|Q:"),
        continuations=(ids(" x"), ids(" yy"), ids(" z")),
        divisors=(1.0, 2.0, 1.0),
        answer_index=None,
        shown=(0, 1, 2),
    )
    assert encoded.key == "q"


@pytest.mark.parametrize(
    ("template", "chat", "blank"),
    [("{question}:", None, " "), ("{question}: ", None, ""), ("{question}:\n\t", None, ""), ("{question}:", turns, "")],
)
def test_a_blank_stands_before_a_choice_s_text_only_behind_a_word_without_chat_template(
    template: str, chat: Any, blank: str
) -> None:
    encoded = make_encoder(Characters(chat), PromptTemplate("", template), "text").encode(ASKED)
    assert encoded.continuations == (ids(f"{blank}x"), ids(f"{blank}yy"), ids(f"{blank}z"))


def test_orders_keep_the_choices_their_digits() -> None:
    first, second, third = make_encoder().encode_orders(ASKED, ChoiceOrders("cyclic", 3))
    assert first == replace(make_encoder().encode(ASKED), num_orders=3)
    assert second == EncodedQuestion(
        id="q",
        prompt_ids=ids("abcdefgh|Q|1 - yy\n2 - z\n3 - x|"),
        continuations=(ids("3"), ids("1"), ids("2")),
        divisors=(1.0, 1.0, 1.0),
        answer_index=1,
        order=1,
        num_orders=3,
        shown=(1, 2, 0),
    )
    assert (third.order, third.shown, third.key) == (2, (2, 0, 1), "q\x1f2")


def test_text_has_one_order() -> None:
    encoder = make_encoder(template=BY_TEXT, score_by="text")
    expected = r"^--choice-orders 2: --score-by text lists no choices, so they have no order; use --score-by label$"
    with pytest.raises(InputError, match=expected):
        encoder.encode_orders(ASKED, ChoiceOrders("cyclic", 2))
    assert encoder.encode_orders(ASKED, ChoiceOrders("cyclic", 1)) == [encoder.encode(ASKED)]


@pytest.mark.parametrize(
    ("bos", "expected"), [("B", "Babcdefgh|Q:"), (None, "abcdefgh|Q:")], ids=["puts its bos in front", "has none"]
)
def test_without_a_chat_template_a_prompt_begins_as_the_tokenizer_begins_a_text(bos: str | None, expected: str) -> None:
    encoder = make_encoder(Characters(bos=bos), BY_TEXT, "text")
    assert encoder.encode(ASKED).prompt_ids == ids(expected)


def test_a_bos_that_the_tokenizer_does_not_put_in_front_is_not_put_there() -> None:
    class Silent(Characters):
        def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
            return super().__call__(text, add_special_tokens=False)

    assert make_encoder(Silent(bos="B"), BY_TEXT, "text").encode(ASKED).prompt_ids == ids("abcdefgh|Q:")
    # Nor one whose bos is another token than the first, or who makes no token of a digit.
    another = Characters(bos="B")
    another.bos_token_id = ord("C")
    assert make_encoder(another, BY_TEXT, "text").render(ASKED) == "abcdefgh|Q:"


def test_shots_without_a_chat_template() -> None:
    """Turns apart by a blank line; an answer by text has a blank before it, a digit none."""
    by_label = make_encoder(shots=[SHOT], num_shots=1)
    shot = "other|S|1 - no\n2 - yes|"
    assert by_label.encode(ASKED).prompt_ids == ids(f"{shot}2\n\nabcdefgh|Q|1 - x\n2 - yy\n3 - z|")
    by_text = make_encoder(template=BY_TEXT, score_by="text", shots=[SHOT], num_shots=1)
    assert by_text.encode(ASKED).prompt_ids == ids("other|S: yes\n\nabcdefgh|Q:")
    spaced = make_encoder(template=PromptTemplate("", "{question}: "), score_by="text", shots=[SHOT], num_shots=1)
    assert spaced.encode(ASKED).prompt_ids == ids("S: yes\n\nQ: ")


def test_a_chat_template_gets_the_turns_and_is_asked_for_the_answer_s_beginning() -> None:
    tokenizer = Characters(turns, bos="B")  # the template writes its own
    template = PromptTemplate("Choose.", "{question}")
    encoder = make_encoder(tokenizer, template, shots=[SHOT], num_shots=1)
    assert encoder.encode(ASKED).prompt_ids == ids("<system>Choose.<user>S<assistant>2<user>Q<answer>")
    assert [how["add_generation_prompt"] for how in tokenizer.asked[:2]] == [False, True]  # the first asks for the role
    assert (
        {how["tokenize"] for how in tokenizer.asked} == {how["enable_thinking"] for how in tokenizer.asked} == {False}
    )


@pytest.mark.parametrize("chat", [without_system, refusing_system])
def test_a_system_turn_that_the_template_drops_or_refuses_is_folded(chat: Any) -> None:
    encoder = make_encoder(Characters(chat), PromptTemplate("Choose.", "{question}"))
    assert encoder.render(ASKED) == "<user>Choose.\n\nQ<answer>"


def test_no_template_is_asked_where_there_is_none() -> None:
    tokenizer = Characters()
    assert make_encoder(tokenizer, PromptTemplate("Choose.", "{question}")).render(ASKED) == "Choose.\n\nQ"
    assert tokenizer.asked == []


def test_a_digit_of_several_tokens_is_refused_with_their_number() -> None:
    tokenizer = Characters(merged=["|1"])
    message = (
        r"^question 'q': a digit is \[1, 2, 2\] tokens behind this prompt, expected one each; end the --prompt template in "
        r"another way, or use --score-by text$"
    )
    with pytest.raises(InputError, match=message):
        make_encoder(tokenizer, PLAIN).encode(ASKED)


def test_a_digit_that_melts_with_the_prompt_for_every_choice_is_one_token() -> None:
    tokenizer = Characters(merged=["|1", "|2", "|3"])
    encoded = make_encoder(tokenizer).encode(ASKED)
    assert encoded.prompt_ids == tuple(tokenizer("abcdefgh|Q|1 - x\n2 - yy\n3 - z").input_ids)  # without its last "|"
    assert encoded.continuations == tuple(tuple(tokenizer(f"|{digit}").input_ids) for digit in "123")


def whole_length(question: Question, **how: Any) -> int:
    return len(make_encoder(**how).encode(question).prompt_ids)


def test_the_middle_of_a_passage_is_cut_to_the_limit() -> None:
    """The mark of six characters counts; of an odd number that stays the head has one more."""
    question = replace(ASKED, passage="abcdefghijklmnopqrst")
    whole = whole_length(question)
    rest = "|Q|1 - x\n2 - yy\n3 - z|"
    for limit, passage in (
        (whole, "abcdefghijklmnopqrst"),
        (whole - 1, "abcdefg\n(중략)\nopqrst"),
        (whole - 2, "abcdef\n(중략)\nopqrst"),
        (whole - 13, "a\n(중략)\n"),
        (whole - 14, "(중략)\n"),  # a prompt never begins with a line break
        (whole - 15, "(중략)\n"),
    ):
        encoded = make_encoder(max_tokens=limit).encode(question)
        assert encoded.prompt_ids == ids(passage + rest), limit
        assert encoded.num_cut_characters == 20 - len(passage.replace("\n(중략)\n", "").replace("(중략)\n", ""))
    with pytest.raises(
        InputError,
        match=rf"^question 'q': more than --max-tokens {whole - 16} even without its passage; raise --max-tokens "
        r"\(a trained run's is fixed\), or shorten the question$",
    ):
        make_encoder(max_tokens=whole - 16).encode(question)


def test_a_context_loses_its_end_before_the_passage_loses_its_middle() -> None:
    question = replace(ASKED, context="one two three")
    heading = "배경 지식:\n"
    whole = whole_length(question)
    rest = "Q|1 - x\n2 - yy\n3 - z|"

    def encode(limit: int) -> EncodedQuestion:
        return make_encoder(max_tokens=limit).encode(question)

    assert encode(whole).prompt_ids == ids(f"abcdefgh|{heading}one two three\n\n{rest}")
    assert encode(whole - 1).prompt_ids == ids(f"abcdefgh|{heading}one two thre\n\n{rest}")
    assert (encode(whole - 1).num_cut_context, encode(whole - 1).num_cut_characters) == (1, 0)
    # Five off leave "one two " and no blank at its end.
    assert encode(whole - 5).prompt_ids == ids(f"abcdefgh|{heading}one two\n\n{rest}")
    assert encode(whole - 5).num_cut_context == 6
    assert encode(whole - 12).prompt_ids == ids(f"abcdefgh|{heading}o\n\n{rest}")
    # Where not one character of it fits, neither does its heading stay.
    for limit in (whole - 13, whole_length(ASKED)):
        assert encode(limit).prompt_ids == ids(f"abcdefgh|{rest}")
        assert (encode(limit).num_cut_context, encode(limit).num_cut_characters) == (13, 0)
    shorter = encode(whole_length(ASKED) - 1)
    assert (shorter.num_cut_context, shorter.num_cut_characters) == (13, 7)


def test_shots_go_from_the_front_until_it_fits() -> None:
    shots = [replace(SHOT, id=f"s{i}", passage=f"p{i}") for i in range(3)]
    whole = whole_length(ASKED, shots=shots, num_shots=2)
    one = whole_length(ASKED, shots=shots[1:2], num_shots=1)

    def encode(limit: int) -> EncodedQuestion:
        return make_encoder(max_tokens=limit, shots=shots, num_shots=2).encode(ASKED)

    assert encode(whole).num_dropped_shots == 0
    assert (encode(whole - 1).num_dropped_shots, len(encode(whole - 1).prompt_ids)) == (1, one)
    assert encode(whole - 1).prompt_ids[:2] == ids("p1")
    assert encode(one - 1) == replace(make_encoder().encode(ASKED), num_dropped_shots=2)


def test_a_question_is_never_its_own_shot() -> None:
    shots = [replace(SHOT, id="q", passage="mine"), replace(SHOT, id="same passage", passage="abcd efgh"), SHOT]
    encoded = make_encoder(shots=shots, num_shots=2).encode(ASKED)
    assert encoded.prompt_ids[:7] == ids("other|S")
    assert encoded.num_dropped_shots == 1
