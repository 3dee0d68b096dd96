"""Orders of the choices: which questions stay as they are, and that scores and labels follow the choices."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fetch_tokenizers import SHA256
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_questions, make_tokenizer

from ksat.embedded import EMBEDDED, embedded_path
from ksat.encoding import EncodedQuestion, Encoder
from ksat.errors import InputError
from ksat.orders import ChoiceOrders, names_choices, reorder
from ksat.prompts import DEFAULT_TEMPLATES, PromptTemplate
from ksat.questions import Question

FIVE = Question(
    "five",
    "가야금은 열두 줄을 뜯어 소리를 낸다. 줄 하나에 안족 하나를 받친다.",
    "윗글의 내용과 일치하는 것은?",
    ("줄이 여섯이다.", "줄을 뜯는다.", "활로 켠다.", "물로 씻는다.", "안족이 없다."),
    2,
)
THREE = replace(FIVE, id="three", choices=("산", "들", "바다"), answer=3)
LONG = replace(FIVE, id="long", passage=" ".join(f"{i}째 날에는 바람이 불고 비가 왔다." for i in range(1, 200)))
SHOTS = [replace(THREE, id=f"shot{i}", passage=f"{i}번째 글이다. " + "해가 진다. " * 20) for i in range(3)]


def with_choice(choice: str) -> Question:
    return replace(FIVE, choices=("산", "들", "바다", choice))


@pytest.mark.parametrize(
    "choice",
    [
        "①과 ②", "① 산", "②, ④", "❶, ❸", "⑴과 ⑶", "③과 같은 곳",
        "1번과 3번", "1번, 3번", "2번 또는 3번", "1, 3번", "1번 및 2번", "1·2번 모두",
        "1과 3", "(1)과 (2)", "1), 3)", "1, 2, 3", "2와 3 모두", "1 and 3",
        "선택지 1과 같다", "2번 선택지", "첫 번째 선택지", "마지막 선지", "세 번째 답지와 같다",
        "위의 모두", "위 모두", "위의 모든 것", "위에 있는 것 모두", "위에 있는 모든 것", "위의 것 모두 해당한다", "위 보기 모두 옳다",
        "위의 어느 것도 아니다", "위의 보기 중 없음", "위에는 없다", "위에 해당 없음", "이상 모두", "상기 항목 전부", "아래 모두",
        "위의 둘 다", "앞의 두 가지 모두", "앞의 두가지", "앞의 두 개", "위의 셋", "앞의 세 곳", "바로 위의 선택지와 같다", "위 선지",
        "All of the above", "all the above", "None of the above.", "any of the above", "none above", "The above choices",
        "Both A and B", "both (A) and (C)", "Neither 1 nor 2", "either B or D", "A and C", "Only A and C", "B or D only",
        "A, B, and C", "Options 1 and 2", "option B", "Choice (3)", "the same as answer 2",
        "1번만", "(2)이다", "정답은 1번이다", "3번이 아니다", "위 보기 중 답이 없다", "보기 1, 2", "A, B",
    ],
)  # fmt: skip
def test_a_choice_that_points_at_others(choice: str) -> None:
    assert names_choices(with_choice(choice))


@pytest.mark.parametrize(
    "choice",
    [
        "모두 옳다", "모두 해당한다", "정답 없음", "해당 없음", "둘 다 아니다", "나머지 셋", "None of these", "모두부",
        "㉠과 ㉡", "㉠~㉤", "ⓐ", "ㄱ, ㄴ", "ㄱ과 ㄷ", "(가)와 (다)", "A와 B 모두 (가)", "A", "Ⅰ, Ⅲ",
        "산 위의 모든 나무", "도마 위에 모두 올린다", "언덕 위에 있는 두 집", "역 앞의 두 가게", "이상한 일이 모두 사라진다", "앞의 설명",
        "위도가 모두 같다", "앞서 두 번 말했다", "아래로 흐른다", "위장을 모두 비운다", "The clouds above the sea", "above zero",
        "다리를 3번 건넜다", "3번 출구", "10번과 11번", "1번", "1번째와 2번째", "11번 선수", "두 번째 구역", "첫 번째 문단",
        "1, 600", "1,600", "2,000개 이상", "3·15 의거", "1.5배", "2-3일 후", "1과 30", "12와 3", "1592년과 1597년",
        "both a cat and a dog", "either of them", "answer a question", "optional 2", "I and you", "option 12",
        "2만", "3이다", "12번만", "1번만 읽었다",
    ],
)  # fmt: skip
def test_a_choice_that_points_at_no_other(choice: str) -> None:
    assert not names_choices(with_choice(choice))


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("밑줄 친 ①~⑤ 중 쓰임이 알맞지 않은 것은?", True),
        ("1번과 2번 가운데 옳은 것은?", True),
        ("선택지 3에 대한 설명은?", True),
        ("Which of options 1 and 2 is right?", True),
        # Above a question stands its passage, not its choices.
        ("위의 모든 설명에 해당하는 암석은?", False),
        ("위의 네 덕목을 내세운 자치 규약은?", False),
        ("앞의 두 문단을 요약한 것은?", False),
        ("Which of the above describes the animal?", False),
        ("밑줄 친 ㉠~㉤ 중 쓰임이 알맞지 않은 것은?", False),
        ("(1)에 들어갈 말은?", False),
        ("2번 문단의 중심 내용은?", False),
    ],
)
def test_a_question_that_points_at_choices(question: str, expected: bool) -> None:
    assert names_choices(replace(FIVE, question=question)) is expected
    assert names_choices(replace(FIVE, question_plus=question)) is expected


def test_numbers_of_the_passage_are_its_own() -> None:
    assert not names_choices(replace(FIVE, passage="① 1번과 2번. 위의 모두. Options 1 and 2."))


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (("①", "②", "③", "④"), True),
        (("1", "2", "3"), True),
        (("(1)", "(2)", "(3)"), True),
        (("[1] 산", "[2] 들"), True),
        (("1. 산", "2. 들", "3. 바다"), True),
        (("1) 산", "2) 들"), True),
        (("1번", "2번", "3번"), True),
        # Amounts, though they happen to run from 1; and numbers that are not the choices' own.
        (("1개", "2개", "3개"), False),
        (("1.5배", "2.5배"), False),
        (("1:2", "2:1"), False),
        (("1", "3", "5"), False),
        (("2", "1"), False),
        (("㉠", "㉡", "㉢", "㉣", "㉤"), False),
        (("(가)", "(나)"), False),
        (("A", "B", "C", "D"), False),
    ],
)
def test_choices_that_carry_their_own_numbers(choices: tuple[str, ...], expected: bool) -> None:
    assert names_choices(replace(FIVE, choices=choices, answer=1)) is expected


@pytest.mark.parametrize(
    ("asked", "taken", "said"),
    [
        ("99", 5, "--choice-orders 99: 5 choices have 5 such orders; --choice-orders 5 is taken\n"),
        (
            "random:999",
            "random:120",
            "--choice-orders random:999: 5 choices have 120 such orders; --choice-orders random:120 is",
        ),
        ("5", 5, ""),
        ("reverse", "reverse", ""),
    ],
)
def test_more_orders_than_there_are(
    asked: str, taken: int | str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = make_questions(4)  # of four and five choices
    assert ChoiceOrders.parse(asked).at_most(questions).name == taken
    assert capsys.readouterr().out.startswith(said)
    assert ChoiceOrders.parse("5").at_most(questions[:1]).name == 4


def cyclic(count: int) -> ChoiceOrders:
    return ChoiceOrders("cyclic", count)


def test_reorder_by_hand() -> None:
    assert reorder(THREE, (0, 1, 2)) == THREE
    assert reorder(THREE, (1, 2, 0)) == replace(THREE, choices=("들", "바다", "산"), answer=2)
    assert reorder(THREE, (2, 0, 1)) == replace(THREE, choices=("바다", "산", "들"), answer=1)
    assert reorder(replace(THREE, answer=None), (1, 2, 0)) == replace(THREE, choices=("들", "바다", "산"), answer=None)


def test_orders_by_hand() -> None:
    assert cyclic(2).of(THREE) == [(0, 1, 2), (1, 2, 0)]
    assert ChoiceOrders("reverse", 2).of(THREE) == [(0, 1, 2), (2, 1, 0)]
    assert [ChoiceOrders("reverse", 2).of(replace(THREE, choices=("산", "들"), answer=1))] == [[(0, 1), (1, 0)]]
    six = {(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)}
    drawn = ChoiceOrders("random", 9).of(THREE)
    assert (drawn[0], set(drawn), len(drawn)) == ((0, 1, 2), six, 6)


@given(
    num_choices=st.integers(2, 5),
    answer=st.integers(1, 5),
    spec=st.sampled_from(["1", "3", "9", "reverse", "random:4"]),
)
def test_every_order_keeps_the_right_choice(num_choices: int, answer: int, spec: str) -> None:
    question = replace(FIVE, choices=FIVE.choices[:num_choices], answer=min(answer, num_choices))
    orders = ChoiceOrders.parse(spec).of(question)
    assert orders[0] == tuple(range(num_choices))
    assert len(set(orders)) == len(orders)
    for shown in orders:
        asked = reorder(question, shown)
        assert asked.choices[asked.answer_index] == question.choices[question.answer_index]
        assert sorted(shown) == list(range(num_choices))


def test_random_orders_follow_the_id_and_differ_between_questions() -> None:
    orders = ChoiceOrders("random", 4)
    assert orders.of(FIVE) == orders.of(FIVE)
    assert len({tuple(orders.of(replace(FIVE, id=str(n)))) for n in range(20)}) > 15


def test_which_orders_from_the_command_line() -> None:
    assert [ChoiceOrders.parse(text) for text in ("5", "reverse", "random:3")] == [
        cyclic(5), ChoiceOrders("reverse", 2), ChoiceOrders("random", 3)
    ]  # fmt: skip
    assert [ChoiceOrders.parse(text).name for text in ("5", "reverse", "random:3")] == [5, "reverse", "random:3"]
    for text in ("0", "-1", "cyclic:3", "random", "random:", "random:0", ":3", "reverse:2", "2.0", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a number such as 5, reverse, or random:5"):
            ChoiceOrders.parse(text)


@pytest.fixture(scope="session", params=["tiny", *EMBEDDED, *SHA256])
def tokenizer(request: pytest.FixtureRequest, tokenizer_folder: Callable[[str], Path]) -> Any:
    from transformers import AutoTokenizer

    name = request.param
    if name == "tiny":
        return make_tokenizer()
    return AutoTokenizer.from_pretrained(embedded_path(name) if name in EMBEDDED else tokenizer_folder(name))


def make_encoder(tokenizer: Any, *, max_tokens: int = 100_000, **options: Any) -> Encoder:
    return Encoder(tokenizer, DEFAULT_TEMPLATES["label"], "label", max_tokens=max_tokens, **options)


@cache
def tiny_encoder() -> Encoder:
    return make_encoder(make_tokenizer())


def decode(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def listed(text: str, question: Question) -> dict[str, str]:
    """The digit under which a prompt shows each choice, read off its text."""
    lines = [line.split(" - ") for line in text.split("선택지:\n")[-1].split("\n")[: question.num_choices]]
    return {choice: digit for digit, choice in lines}


def common_prefix(encoded: list[EncodedQuestion]) -> tuple[int, ...]:
    first, *rest = (e.prompt_ids for e in encoded)
    length = next(i for i in range(len(first)) if any(first[i] != other[i] for other in rest))
    return first[:length]


def test_scores_and_labels_follow_the_choices(tokenizer: Any) -> None:
    encoded = make_encoder(tokenizer).encode_orders(FIVE, cyclic(5))
    digits = [[decode(tokenizer, c).strip() for c in e.continuations] for e in encoded]
    # Row o: the digit of choices 1 to 5 of the file in order o; the answer, choice 2, is the second of each.
    assert digits == [
        ["1", "2", "3", "4", "5"],
        ["5", "1", "2", "3", "4"],
        ["4", "5", "1", "2", "3"],
        ["3", "4", "5", "1", "2"],
        ["2", "3", "4", "5", "1"],
    ]
    assert [e.answer_index for e in encoded] == [1] * 5
    for order, row in zip(encoded, digits, strict=True):
        shown = listed(decode(tokenizer, order.prompt_ids), FIVE)
        assert [shown[choice] for choice in FIVE.choices] == row
    # Every choice has stood under every digit once.
    assert all(sorted(column) == list("12345") for column in zip(*digits, strict=True))


def test_an_order_is_the_rotated_question_asked_alone(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer, shots=SHOTS, num_shots=2)
    for encoded in [*encoder.encode_orders(FIVE, cyclic(5)), *encoder.encode_orders(FIVE, ChoiceOrders("random", 4))]:
        alone = encoder.encode(reorder(FIVE, encoded.shown))
        assert alone.answer_index is not None
        assert encoded.prompt_ids == alone.prompt_ids
        assert encoded.continuations[1] == alone.continuations[alone.answer_index]


def test_the_first_order_is_the_question_as_it_stands(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer)
    for question in (FIVE, THREE, replace(FIVE, answer=None)):
        assert encoder.encode_orders(question, cyclic(1)) == [encoder.encode(question)]
        first = encoder.encode_orders(question, cyclic(3))[0]
        assert replace(first, num_orders=1) == encoder.encode(question)


def test_as_many_orders_as_asked_for_but_no_more_than_choices() -> None:
    encoder = tiny_encoder()
    for question, num_orders, expected in ((FIVE, 1, 1), (FIVE, 2, 2), (FIVE, 5, 5), (FIVE, 9, 5), (THREE, 5, 3)):
        encoded = encoder.encode_orders(question, cyclic(num_orders))
        assert [e.order for e in encoded] == list(range(expected))
        assert [e.num_orders for e in encoded] == [expected] * expected
        assert len({e.prompt_ids for e in encoded}) == expected


def test_a_question_that_names_its_choices_is_asked_once() -> None:
    encoder = tiny_encoder()
    question = with_choice("위의 모두")
    assert encoder.encode_orders(question, cyclic(4)) == [encoder.encode(question)]


def test_orders_share_their_tokens_up_to_the_choices(tokenizer: Any) -> None:
    encoder = make_encoder(tokenizer, shots=SHOTS, num_shots=1)
    encoded = encoder.encode_orders(FIVE, cyclic(5))
    head = encoder.render(FIVE, SHOTS[:1]).rpartition("1 - 줄이 여섯이다.")[0]
    assert head.endswith("선택지:\n")
    shared = common_prefix(encoded)
    assert decode(tokenizer, shared).startswith(head + "1")


def test_all_orders_are_cut_alike_and_fit(tokenizer: Any) -> None:
    # Uneven choices: where tokens merge across a line's end, orders differ in length.
    question = replace(LONG, choices=("1", "가나다라마바사", "x.\n", "\u00b7", "  12,000 "))
    encoder = make_encoder(tokenizer)
    whole = len(encoder.encode(question).prompt_ids)
    for limit in (whole // 2, whole // 2 + 1):
        encoded = make_encoder(tokenizer, max_tokens=limit).encode_orders(question, cyclic(5))
        assert len({e.num_cut_characters for e in encoded}) == 1
        assert encoded[0].num_cut_characters > 0
        assert max(len(e.prompt_ids) for e in encoded) <= limit
        passages = {decode(tokenizer, e.prompt_ids).rpartition("선택지:\n")[0] for e in encoded}
        assert len(passages) == 1
        assert "(중략)" in passages.pop()


class LongAtFirst:
    """A tokenizer of characters in which a text that lists 바다 first is forty tokens longer."""

    chat_template = None
    bos_token = bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [ord(c) for c in text]
        return SimpleNamespace(input_ids=[0] * 40 * ("1 - 바다" in text) + ids)


def test_the_order_that_needs_most_decides_on_shots_and_passage() -> None:
    plain = PromptTemplate("", "{passage}\n{question}\n{choices}\n답:")
    question = replace(THREE, passage="비가 온다. " * 30)

    def encode(max_tokens: int, **options: Any) -> list[EncodedQuestion]:
        return Encoder(LongAtFirst(), plain, "label", max_tokens=max_tokens, **options).encode_orders(
            question, cyclic(3)
        )

    whole = encode(1000)
    length = len(whole[0].prompt_ids)
    assert [len(e.prompt_ids) for e in whole] == [length, length, length + 40]  # order 2 lists 바다 first
    assert {e.num_cut_characters for e in encode(length + 40)} == {0}
    # Ten tokens too many in one order: 10 characters and the 6 of the mark go in all of them.
    assert [e.num_cut_characters for e in encode(length + 30)] == [16] * 3
    assert [len(e.prompt_ids) for e in encode(length + 30)] == [length - 10, length - 10, length + 30]
    shot = replace(THREE, id="shot", passage="해", choices=("개", "말", "소"))
    with_shot = len(encode(1000, shots=[shot], num_shots=1)[0].prompt_ids)
    assert [e.num_dropped_shots for e in encode(with_shot + 40, shots=[shot], num_shots=1)] == [0] * 3
    assert [e.num_dropped_shots for e in encode(with_shot + 39, shots=[shot], num_shots=1)] == [1] * 3


def test_text_has_no_orders() -> None:
    encoder = Encoder(make_tokenizer(), DEFAULT_TEMPLATES["text"], "text", max_tokens=4096)
    message = "--choice-orders 3: --score-by text lists no choices, so they have no order; use --score-by label"
    with pytest.raises(InputError, match=message):
        encoder.encode_orders(FIVE, cyclic(3))
    assert encoder.encode_orders(FIVE, cyclic(1)) == [encoder.encode(FIVE)]


PRINTABLE = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=4)


@given(ids=st.lists(PRINTABLE, min_size=2, max_size=4, unique=True))
def test_keys_are_unique_and_the_first_orders_are_the_ids(ids: list[str]) -> None:
    encoded = [e for row_id in ids for e in tiny_encoder().encode_orders(replace(THREE, id=row_id), cyclic(3))]
    assert len({e.key for e in encoded}) == 3 * len(ids)
    assert [e.key for e in encoded if e.order == 0] == ids


def test_key_by_hand() -> None:
    assert [e.key for e in tiny_encoder().encode_orders(THREE, cyclic(3))] == ["three", "three\x1f1", "three\x1f2"]
