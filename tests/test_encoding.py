"""Messages -> token ids on real tokenizers: where the answer begins, how choices are tokenised, what is cut.

The prompts are kept as readable files in tests/snapshots; KSAT_UPDATE_SNAPSHOTS=1 writes them anew. Look at the difference.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_templates import PUBLISHED
from fetch_tokenizers import SHA256
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ksat.embedded import EMBEDDED, embedded_path
from ksat.encoding import EncodedQuestion, Encoder
from ksat.errors import InputError
from ksat.packing import build_pack, visible
from ksat.prompts import DEFAULT_TEMPLATES, PromptTemplate, ScoreBy, build_messages, fold_system
from ksat.questions import Question, read_questions

SNAPSHOTS = Path(__file__).parent / "snapshots"
SCORE_BY: tuple[ScoreBy, ...] = ("label", "text")

FIVE = Question(
    "five",
    "가야금은 열두 줄을 뜯어 소리를 낸다.\n\n'현악기'이며, 줄 하나에 안족(雁足) 하나를 받친다. {choices}",
    "윗글의 내용과 일치하는 것은?",
    ("줄이 여섯이다.", "줄을 뜯는다.", "활로 켠다.", "12현금, 25현금", "안족이 없다."),
    2,
)
FOUR = Question(
    "four",
    "봄에는 밤보다 낮이 길어진다.",
    "<보기>에 이어질 말로 알맞은 것은?",
    ("춥다", "날이 저문다", "3월이 온다", "따뜻해진다"),
    4,
    "해가 오래 떠 있으면 땅은\n차츰 데워진다.",
)
SHOT = Question("shot", "물은 0도에서 언다.", "물이 어는 온도는?", ("100도", "0도", "50도"), 2)
LONG = replace(FOUR, id="long", passage=" ".join(f"{i}째 날에는 바람이 불고 비가 왔다." for i in range(1, 200)))


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of a family from its model card, apart from our code.

    Attributes:
        num_bos: beginning-of-sequence tokens of a prompt.
        tail: what a prompt ends with; None where the base has no chat template.
        system: what introduces a system turn; None where the family has no such role.
        markup: strings that only this markup has.
    """

    num_bos: int
    tail: str | None
    system: str | None
    markup: tuple[str, ...]


CHATML = ("<|im_start|>", "<|im_end|>")
FAMILIES = {
    "qwen2_5": Family(0, "<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>system\n", CHATML),
    "qwen3": Family(
        0, "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>system\n", (*CHATML, "<think>")
    ),
    "gemma2": Family(1, None, None, ()),
    "gemma3": Family(1, "<end_of_turn>\n<start_of_turn>model\n", None, ("<start_of_turn>", "<end_of_turn>")),
    "llama3_1": Family(
        1,
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>system<|end_header_id|>\n\n",
        ("<|start_header_id|>", "<|eot_id|>"),
    ),
    "command_r_plus": Family(
        1,
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|SYSTEM_TOKEN|>",
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    ),
    "embedded": Family(1, None, None, ()),
    # Its bos_token is <|im_start|>, which opens each turn and is not put in front: none, for us.
    "embedded-small": Family(0, "<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>system\n", CHATML),
    "exaone3": Family(0, "\n[|assistant|]", "[|system|]", ("[|user|]", "[|endofturn|]")),
    "exaone4": Family(
        0,
        "[|endofturn|]\n[|assistant|]\n<think>\n\n</think>\n\n",
        "[|system|]\n",
        ("[|user|]", "[|endofturn|]", "<think>"),
    ),
    "eeve": Family(1, "\nAssistant:\n", "<|begin_of_text|>", ("Human: ", "Assistant:")),
    "gemma2_it": Family(1, "<end_of_turn>\n<start_of_turn>model\n", None, ("<start_of_turn>", "<end_of_turn>")),
}
BOS = ("<bos>", "<|begin_of_text|>", "<BOS_TOKEN>")
NAMES = [*SHA256, *EMBEDDED, *PUBLISHED]


@dataclass(frozen=True, slots=True)
class Base:
    """A real tokenizer with its name."""

    name: str
    tokenizer: Any

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    def encoder(self, score_by: ScoreBy, template: PromptTemplate | None = None, **options: Any) -> Encoder:
        options = {"max_tokens": 100_000} | options
        return Encoder(self.tokenizer, template or DEFAULT_TEMPLATES[score_by], score_by, **options)

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def decode(self, ids: tuple[int, ...] | list[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


@pytest.fixture(scope="session")
def load_base(tokenizer_folder: Callable[[str], Path]) -> Callable[[str], Base]:
    @cache
    def load(name: str) -> Base:
        from transformers import AutoTokenizer

        published = PUBLISHED.get(name)
        carrier = published.carrier if published else name
        tokenizer = AutoTokenizer.from_pretrained(
            embedded_path(name) if name in EMBEDDED else tokenizer_folder(carrier)
        )
        if published:
            tokenizer.add_special_tokens({"additional_special_tokens": list(published.markup)})
            tokenizer.chat_template = published.template
        return Base(name, tokenizer)

    return load


@pytest.fixture(scope="session", params=NAMES)
def base(request: pytest.FixtureRequest, load_base: Callable[[str], Base]) -> Base:
    return load_base(request.param)


@pytest.fixture(params=SCORE_BY)
def score_by(request: pytest.FixtureRequest) -> ScoreBy:
    return "label" if request.param == "label" else "text"


@pytest.fixture
def plain(base: Base) -> Iterator[Base]:
    """The same tokenizer as a base without a chat template has it."""
    chat_template, base.tokenizer.chat_template = base.tokenizer.chat_template, None
    yield base
    base.tokenizer.chat_template = chat_template


def rendered_choices(base: Base, encoder: Encoder, question: Question, shots: tuple[Question, ...] = ()) -> list[str]:
    """Prompt and answer as one text, for every choice: what a reader would write down."""
    prompt = encoder.render(question, shots)
    if encoder.score_by == "label":
        return [prompt + digit for digit in "12345"[: question.num_choices]]
    blank = "" if base.tokenizer.chat_template or prompt[-1].isspace() else " "
    return [prompt + blank + choice for choice in question.choices]


def describe(base: Base, encoder: Encoder, question: Question) -> str:
    """A prompt as the model gets it, decoded from its ids up to the mark ▮, then each choice's continuation."""
    encoded = encoder.encode(question)
    lines = [f"{base.decode(encoded.prompt_ids)}▮"]
    for continuation, divisor in zip(encoded.continuations, encoded.divisors, strict=True):
        lines.append(f"▮{base.decode(continuation)}  tokens {list(continuation)}, divided by {divisor:g}")
    last = [f"{i} {base.decode([i])!r}" for i in encoded.prompt_ids[-4:]]
    return "\n".join([*lines, f"({len(encoded.prompt_ids)} prompt tokens, the last: {', '.join(last)})"])


def test_prompt_snapshot(base: Base, score_by: ScoreBy) -> None:
    parts = {
        "five choices": describe(base, base.encoder(score_by), FIVE),
        "four choices, <보기>, one shot": describe(base, base.encoder(score_by, shots=[SHOT], num_shots=1), FOUR),
    }
    text = "\n\n".join(f"===== {title} =====\n{part}" for title, part in parts.items()) + "\n"
    path = SNAPSHOTS / f"{base.name}-{score_by}.txt"
    if os.environ.get("KSAT_UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"no {path.name}; write it with KSAT_UPDATE_SNAPSHOTS=1 and look at it"
    assert text == path.read_text(encoding="utf-8")


def test_no_snapshot_is_left_over() -> None:
    assert {path.name for path in SNAPSHOTS.iterdir()} == {f"{n}-{by}.txt" for n in NAMES for by in SCORE_BY}


def test_a_prompt_begins_once_and_ends_where_the_answer_begins(base: Base, score_by: ScoreBy) -> None:
    encoder = base.encoder(score_by, shots=[SHOT], num_shots=1)
    encoded = encoder.encode(FOUR)
    text = base.decode(encoded.prompt_ids)
    assert text == encoder.render(FOUR, [SHOT])
    assert sum(text.count(bos) for bos in BOS) == base.family.num_bos
    assert text.startswith(BOS) == bool(base.family.num_bos)
    assert text.endswith(base.family.tail or ("\n정답:" if score_by == "label" else "\n답:"))


def test_a_system_turn_or_its_place(base: Base) -> None:
    text = base.encoder("label").render(FOUR)
    wording = DEFAULT_TEMPLATES["label"].system
    assert text.count(wording) == 1
    if base.family.system:
        assert f"{base.family.system}{wording}" in text
    else:  # folded into the first user turn
        assert f"{wording}\n\n지문:\n{FOUR.passage}" in text
        assert "system" not in text.lower()


def test_a_family_that_raises_on_a_system_turn_or_drops_it_gets_it_folded(base: Base) -> None:
    kept = base.tokenizer.chat_template
    raising = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    dropping = "{% for m in messages if m.role != 'system' %}<{{ m.content }}>{% endfor %}"
    expected = fold_system(build_messages(DEFAULT_TEMPLATES["label"], FOUR, "label"))[0]["content"]
    try:
        for template in (raising + dropping, dropping):
            base.tokenizer.chat_template = template
            assert base.encoder("label").render(FOUR) == f"<{expected}>"
    finally:
        base.tokenizer.chat_template = kept


def test_mistake_1_scored_position_is_the_trained_position(base: Base, score_by: ScoreBy) -> None:
    encoder = base.encoder(score_by)
    questions = [FIVE, FOUR]
    pack = build_pack([encoder.encode(q) for q in questions], [0, 1])
    unlabelled = build_pack([encoder.encode(replace(q, answer=None)) for q in questions], [0, 1])
    # One record for training (labelled) and for inference (not): they differ in the label alone.
    assert pack.token_ids.tolist() == unlabelled.token_ids.tolist()
    assert pack.scored_positions.tolist() == unlabelled.scored_positions.tolist()
    assert pack.targets.tolist() == unlabelled.targets.tolist()
    assert (pack.answer_indices.tolist(), unlabelled.answer_indices.tolist()) == ([1, 3], [-1, -1])
    # Seen from each scored position, the text so far and its target are the start of prompt and answer as written.
    sees = visible(pack)
    width = pack.divisors.shape[1]
    whole = {
        n * width + k: base.ids(text)
        for n, question in enumerate(questions)
        for k, text in enumerate(rendered_choices(base, encoder, question))
    }
    first_scored: dict[int, int] = {}
    for position, target, owner in zip(pack.scored_positions, pack.targets, pack.owners, strict=True):
        seen = pack.token_ids[sees[position]].tolist()
        assert [*seen, target] == whole[owner][: len(seen) + 1]
        first_scored.setdefault(owner, len(seen))
    # The first scored token is the first one of the answer: all before it is the prompt, as tokenised alone.
    for owner, num_prompt_tokens in first_scored.items():
        assert whole[owner][:num_prompt_tokens] == base.ids(encoder.render(questions[owner // width]))
    assert set(first_scored) == set(whole)


def test_mistake_2_no_label_stands_on_a_prompt_token(base: Base, score_by: ScoreBy) -> None:
    encoded = base.encoder(score_by).encode(FIVE)
    pack = build_pack([encoded], [0])
    first = len(encoded.prompt_ids) - 1
    # No position before the prompt's last token is scored, and the target is the token that follows, not the one there.
    assert pack.scored_positions.min() == first
    assert (pack.scored_positions == first).sum() == FIVE.num_choices
    assert pack.targets[pack.scored_positions == first].tolist() == [c[0] for c in encoded.continuations]
    if score_by == "label":
        assert pack.token_ids.tolist() == list(encoded.prompt_ids)  # the digit is scored, never read
        assert pack.token_ids[first] not in pack.targets


def cut_to(passage: str, num_kept: int) -> str:
    head, tail = passage[: (num_kept + 1) // 2], passage[len(passage) - num_kept // 2 :]
    return f"{head}\n(중략)\n{tail}"


def test_mistake_4_a_prompt_over_the_limit_loses_the_middle_of_its_passage_and_no_row_is_lost(
    base: Base, score_by: ScoreBy
) -> None:
    whole = base.encoder(score_by)
    limit = len(whole.encode(FOUR).prompt_ids) + 300
    encoder = base.encoder(score_by, max_tokens=limit)
    questions = [FIVE, LONG, FOUR]
    encoded = [encoder.encode(question) for question in questions]
    assert [e.id for e in encoded] == ["five", "long", "four"]
    assert [e.num_cut_characters > 0 for e in encoded] == [False, True, False]
    cut = encoded[1]
    num_kept = len(LONG.passage) - cut.num_cut_characters
    # It fits, and one more character would not.
    assert len(cut.prompt_ids) <= limit < len(base.ids(encoder.render(LONG, (), cut_to(LONG.passage, num_kept + 1))))
    assert num_kept > 100
    # Only the passage is touched; its head and its tail are kept.
    text = base.decode(cut.prompt_ids)
    assert text == encoder.render(LONG).replace(LONG.passage, cut_to(LONG.passage, num_kept))
    assert text.startswith(whole.render(LONG)[: whole.render(LONG).index(LONG.passage) + num_kept // 2])
    assert text.endswith(whole.render(LONG).split(LONG.passage)[1])
    assert cut.continuations == whole.encode(LONG).continuations


def test_a_prompt_of_exactly_the_limit_is_not_cut(base: Base) -> None:
    num_tokens = len(base.encoder("label").encode(LONG).prompt_ids)
    assert base.encoder("label", max_tokens=num_tokens).encode(LONG).num_cut_characters == 0
    shorter = base.encoder("label", max_tokens=num_tokens - 1).encode(LONG)
    assert shorter.num_cut_characters > 0
    assert len(shorter.prompt_ids) <= num_tokens - 1


def test_what_does_not_fit_without_its_passage_is_an_error(base: Base, score_by: ScoreBy) -> None:
    message = "question 'long': more than --max-tokens 20 even without its passage; raise --max-tokens"
    with pytest.raises(InputError, match=message):
        base.encoder(score_by, max_tokens=20).encode(LONG)
    with pytest.raises(InputError, match="question 'four': more than --max-tokens 20"):
        base.encoder(score_by, max_tokens=20).encode(replace(FOUR, passage=""))


def test_the_smallest_limit_that_works_leaves_an_empty_passage(base: Base) -> None:
    limit = len(base.ids(base.encoder("label").render(LONG, (), cut_to(LONG.passage, 0))))
    encoded = base.encoder("label", max_tokens=limit).encode(LONG)
    assert len(encoded.prompt_ids) <= limit
    with pytest.raises(InputError, match="question 'long': more than --max-tokens"):
        base.encoder("label", max_tokens=limit - 1).encode(LONG)


def test_a_passage_in_the_system_turn_is_cut_too(base: Base) -> None:
    template = PromptTemplate(system="{passage}", user="{question}\n{choices}\n정답:")
    encoded = base.encoder("label", template, max_tokens=300).encode(LONG)
    assert len(encoded.prompt_ids) <= 300
    assert encoded.num_cut_characters > 0


def test_mistake_5_the_bases_own_markup_and_no_other(base: Base, score_by: ScoreBy) -> None:
    encoder = base.encoder(score_by, shots=[SHOT], num_shots=1)
    text = encoder.render(FOUR, [SHOT])
    foreign = {mark for family in FAMILIES.values() for mark in family.markup} - set(base.family.markup)
    assert [mark for mark in sorted(foreign) if mark in text] == []
    assert all(mark in text for mark in base.family.markup)
    if base.tokenizer.chat_template:
        # The library's own way from messages to ids; Gemma 3's template folds the system turn as we would.
        messages = build_messages(DEFAULT_TEMPLATES[score_by], FOUR, score_by, shots=[SHOT])
        refuses = "System role not supported" in str(base.tokenizer.chat_template)
        own = base.tokenizer.apply_chat_template(
            fold_system(messages) if refuses else messages,
            tokenize=True,
            add_generation_prompt=True,
            enable_thinking=False,
        )
        assert list(encoder.encode(FOUR).prompt_ids) == own["input_ids"]


def test_mistake_8_every_row_is_in_the_loss_whatever_its_prompt_ends_with(base: Base, score_by: ScoreBy) -> None:
    ends = ("정답:", "", "답은 ", "### Response:", "(", "…")
    listing = "{choices}\n" if score_by == "label" else ""
    questions = [FIVE, FOUR, LONG, SHOT]
    for end in ends:
        encoder = base.encoder(
            score_by, PromptTemplate("", f"{{passage}}\n{{question}}\n{listing}{end}"), max_tokens=500
        )
        pack = build_pack([encoder.encode(question) for question in questions], range(4))
        assert pack.answer_indices.tolist() == [1, 3, 3, 1]
        width = pack.divisors.shape[1]
        assert set(pack.owners.tolist()) == {
            n * width + k for n, q in enumerate(questions) for k in range(q.num_choices)
        }


def test_mistake_9_scores_belong_to_the_rows_own_choices_and_nothing_is_parsed(base: Base, score_by: ScoreBy) -> None:
    doubled = replace(FIVE, choices=("같다", "다르다", "같다", "모른다", "1"))
    encoder = base.encoder(score_by)
    for question in (FIVE, FOUR, SHOT, doubled):
        encoded = encoder.encode(question)
        expected = question.choices if score_by == "text" else "12345"[: question.num_choices]
        assert [base.decode(c).strip() for c in encoded.continuations] == list(expected)
    if score_by == "text":  # choices of the same text stay two choices
        encoded = encoder.encode(doubled)
        assert encoded.continuations[0] == encoded.continuations[2] != encoded.continuations[1]


def test_divisors_and_answers(base: Base) -> None:
    by_text, by_label = (base.encoder(by).encode(FOUR) for by in ("text", "label"))
    assert by_text.divisors == (2, 6, 6, 5)
    assert by_label.divisors == (1, 1, 1, 1)
    assert (by_text.answer_index, by_label.answer_index) == (3, 3)
    assert base.encoder("text").encode(replace(FOUR, answer=None)).answer_index is None


def test_mistake_14_a_digit_is_one_token_taken_from_the_real_continuation(base: Base) -> None:
    encoder = base.encoder("label")
    encoded = encoder.encode(FIVE)
    assert [len(c) for c in encoded.continuations] == [1] * 5
    assert len(set(encoded.continuations)) == 5
    for text, continuation in zip(rendered_choices(base, encoder, FIVE), encoded.continuations, strict=True):
        assert base.ids(text) == [*encoded.prompt_ids, *continuation]


def test_mistake_14_a_digit_that_melts_into_the_prompt(load_base: Callable[[str], Base]) -> None:
    """Llama 3 has tokens of up to three digits: behind "제0" the answer 3 is the token "03", not vocab["3"]."""
    base = load_base("llama3_1")
    chat_template, base.tokenizer.chat_template = base.tokenizer.chat_template, None
    try:
        encoder = base.encoder("label", PromptTemplate("", "{choices}\n정답: 제0"))
        encoded = encoder.encode(FIVE)
    finally:
        base.tokenizer.chat_template = chat_template
    assert [base.decode(c) for c in encoded.continuations] == ["01", "02", "03", "04", "05"]
    assert base.decode(encoded.prompt_ids).endswith("정답: 제")
    assert encoded.continuations[2] != (base.tokenizer.convert_tokens_to_ids("3"),)
    assert [len(c) for c in encoded.continuations] == [1] * 5


class TwoTokenDigits:
    """A tokenizer in which every character is one token but a digit two."""

    chat_template = None
    bos_token = bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[i for c in text for i in ([0, ord(c)] if c.isdigit() else [ord(c)])])


def test_mistake_14_a_digit_of_two_tokens_is_refused() -> None:
    encoder = Encoder(TwoTokenDigits(), DEFAULT_TEMPLATES["label"], "label", max_tokens=4096)
    message = (
        r"question 'four': a digit is \[2, 2, 2, 2\] tokens behind this prompt, expected one each; .*--score-by text"
    )
    with pytest.raises(InputError, match=message):
        encoder.encode(FOUR)


TEXTS = st.text(st.sampled_from("가나다글ㄱ漢 ,.'\"\n019aZ-%()́😀"), min_size=1, max_size=8).filter(
    lambda text: text == text.strip()
)
ENDS = ("답:", "답: ", "답:  ", "답", "(", "0", "1 2", "a", "Answer: ", "\t")


@settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
@given(choices=st.lists(TEXTS, min_size=2, max_size=5), end=st.sampled_from(ENDS), chat=st.booleans())
def test_prompt_and_continuation_are_the_tokens_of_the_whole(
    base: Base, choices: list[str], end: str, chat: bool
) -> None:
    kept = base.tokenizer.chat_template
    base.tokenizer.chat_template = kept if chat else None
    try:
        question = replace(FIVE, choices=tuple(choices), answer=None)
        encoder = base.encoder("text", PromptTemplate("", "{passage}\n{question}\n" + end))
        encoded = encoder.encode(question)
        whole = [base.ids(text) for text in rendered_choices(base, encoder, question)]
        prompt_ids = base.ids(encoder.render(question))
    finally:
        base.tokenizer.chat_template = kept
    assert [[*encoded.prompt_ids, *c] for c in encoded.continuations] == whole
    # Each choice keeps at least one token, and the border lies as far to the right as all choices allow.
    assert all(encoded.continuations)
    assert list(encoded.prompt_ids) == prompt_ids[: len(encoded.prompt_ids)]
    if len(encoded.prompt_ids) < len(prompt_ids):
        assert any(c[0] != prompt_ids[len(encoded.prompt_ids)] for c in encoded.continuations)


def test_a_template_that_ends_in_a_blank_scores_the_same_tokens(plain: Base) -> None:
    """The blank melts into the first word; the border moves to the left, so both wordings see the same tokens."""
    without, with_blank = (
        plain.encoder("text", PromptTemplate("", "{passage}\n{question}\n답:" + blank), shots=[SHOT], num_shots=1)
        for blank in ("", " ")
    )
    assert with_blank.encode(FOUR) == without.encode(FOUR)
    assert with_blank.render(FOUR, [SHOT]) == without.render(FOUR, [SHOT]) + " "


def test_a_shot_is_written_as_its_answer_is_scored(plain: Base, score_by: ScoreBy) -> None:
    """Behind its own prompt a shot's answer has the very tokens that are scored when the shot is asked."""
    alone = plain.encoder(score_by).encode(SHOT)
    with_shot = plain.encoder(score_by, shots=[SHOT], num_shots=1).encode(FOUR)
    answered = [*alone.prompt_ids, *alone.continuations[SHOT.answer_index]]
    assert list(with_shot.prompt_ids[: len(answered)]) == answered


@pytest.fixture(scope="session")
def qwen(load_base: Callable[[str], Base]) -> Base:
    return load_base("qwen2_5")


POOL = [replace(SHOT, id=f"shot{i}", passage=f"{i}번째 글이다.") for i in range(5)]


def passages_seen(base: Base, encoded: EncodedQuestion) -> list[str]:
    return re.findall(r"\d번째 글", base.decode(encoded.prompt_ids))


def test_shots_are_the_first_of_the_pool_but_never_of_the_rows_passage(qwen: Base) -> None:
    encoder = qwen.encoder("label", shots=POOL, num_shots=2)
    assert passages_seen(qwen, encoder.encode(FOUR)) == ["0번째 글", "1번째 글"]
    # The same passage with other blanks, under another id; and the row itself, without a passage.
    same_passage = replace(FOUR, passage=" 0번째  글이다.\n")
    assert passages_seen(qwen, encoder.encode(same_passage)) == ["1번째 글", "2번째 글"]
    itself = replace(POOL[1], passage="")
    assert passages_seen(qwen, encoder.encode(itself)) == ["0번째 글", "2번째 글"]


def test_shots_are_dropped_from_the_front_before_the_passage_is_cut(qwen: Base) -> None:
    roomy = qwen.encoder("label", shots=POOL, num_shots=3)
    lengths = [len(qwen.ids(roomy.render(LONG, POOL[start:3]))) for start in range(4)]
    expected = [
        (lengths[0], ["0번째 글", "1번째 글", "2번째 글"], 0),
        (lengths[0] - 1, ["1번째 글", "2번째 글"], 1),
        (lengths[2], ["2번째 글"], 2),
        (lengths[3], [], 3),
    ]
    for limit, seen, num_dropped in expected:
        encoded = qwen.encoder("label", shots=POOL, num_shots=3, max_tokens=limit).encode(LONG)
        assert passages_seen(qwen, encoded) == seen
        assert (encoded.num_dropped_shots, encoded.num_cut_characters) == (num_dropped, 0)
    cut = qwen.encoder("label", shots=POOL, num_shots=3, max_tokens=lengths[3] - 1).encode(LONG)
    assert cut.num_dropped_shots == 3
    assert cut.num_cut_characters > 0


def test_shots_that_the_pool_lacks_are_counted_as_dropped(qwen: Base) -> None:
    encoded = qwen.encoder("text", shots=POOL[:1], num_shots=3).encode(FOUR)
    assert (passages_seen(qwen, encoded), encoded.num_dropped_shots) == (["0번째 글"], 2)


def test_the_order_of_the_file_does_not_matter(qwen: Base, score_by: ScoreBy) -> None:
    encoder = qwen.encoder(score_by, max_tokens=400)
    questions = [FIVE, FOUR, LONG, SHOT, *POOL]
    expected = {question.id: encoder.encode(question) for question in questions}
    random.Random(0).shuffle(questions)
    assert {question.id: encoder.encode(question) for question in questions} == expected


def test_the_embedded_tokenizer_is_gemmas(load_base: Callable[[str], Base]) -> None:
    """Rebuilt from the GGUF's vocabulary, it gives the ids of the real Gemma 3 tokenizer."""
    ours, real = load_base("embedded"), load_base("gemma3")
    questions = read_questions(Path(__file__).resolve().parent.parent / "data" / "sample_train.csv")
    texts = [text for q in (*questions, FIVE, FOUR) for text in (q.passage, q.question, q.question_plus, *q.choices)]
    texts += [
        "  두 칸\n\n\n세 줄\t탭",
        "f(x) = x² − 3x\n    return {'a': 1}",
        "ㄱ·ㄴ·ㄷ ㉠ⓐ①½℃㎡",
        "😀👩‍👩‍👧 ﷽ 𠮷 \x00",
    ]
    assert [text for text in texts if ours.tokenizer(text).input_ids != real.tokenizer(text).input_ids] == []
