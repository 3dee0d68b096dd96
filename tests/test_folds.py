"""Near-duplicates and folds: nothing of a passage on both sides, folds alike, and the same ones for whoever asks."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_questions

from ksat.errors import InputError
from ksat.folds import assign_folds, fold_rows, split_validation, write_folds
from ksat.kinds import find_kind
from ksat.near_duplicates import near_duplicate_pairs, passage_groups
from ksat.questions import Question, passage_key, read_questions

SAMPLES = read_questions(Path(__file__).parent.parent / "data" / "sample_train.csv", labelled=True)
LONG = [question for question in {passage_key(q): q for q in SAMPLES}.values() if len(question.passage) > 100]


def other_words(text: str, generator: random.Random) -> str:
    words = text.split(" ")
    for place in generator.sample(range(len(words)), max(1, len(words) // 10)):
        words[place] = "달리"
    return " ".join(words)


def without_a_sentence(text: str, generator: random.Random) -> str:
    sentences = text.split(". ")
    if len(sentences) > 2:
        sentences.pop(generator.randrange(len(sentences)))
    return ". ".join(sentences)


def excerpt(text: str, generator: random.Random) -> str:
    length = max(105, len(text) // 2)
    start = generator.randrange(max(1, len(text) - length))
    return text[start : start + length]


def other_marks(text: str, generator: random.Random) -> str:
    return text.replace(" ", "\u00a0\n").replace(".", " !").replace("'", "’")


PLANTERS = [other_words, without_a_sentence, excerpt, other_marks]


@pytest.mark.parametrize("plant", PLANTERS)
def test_a_planted_near_duplicate_never_falls_on_both_sides(plant: Callable[[str, random.Random], str]) -> None:
    generator = random.Random(0)
    planted = [replace(q, id=f"planted-{q.id}", passage=plant(q.passage, generator)) for q in LONG]
    questions = [*SAMPLES, *planted]
    groups = dict(zip((q.id for q in questions), passage_groups(questions), strict=True))
    assert all(groups[q.id] == groups[f"planted-{q.id}"] for q in LONG)
    folds = assign_folds(questions, 5)
    fold_of = dict(zip(folds.ids, folds.folds, strict=True))
    assert all(fold_of[q.id] == fold_of[f"planted-{q.id}"] for q in LONG)


@pytest.mark.parametrize("plant", PLANTERS)
def test_no_validation_row_has_a_near_duplicate_in_training(plant: Callable[[str, random.Random], str]) -> None:
    generator = random.Random(0)
    planted = [replace(q, id=f"planted-{q.id}", passage=plant(q.passage, generator)) for q in LONG]
    questions = [*SAMPLES, *planted]
    train, valid = split_validation(questions, 0.2, seed=0)
    trained = {questions[i].id.removeprefix("planted-") for i in train}
    assert valid and not trained & {questions[i].id.removeprefix("planted-") for i in valid}


def test_passages_of_their_own_stay_apart() -> None:
    assert len(set(passage_groups(SAMPLES))) == len({passage_key(question) for question in SAMPLES})
    assert near_duplicate_pairs(SAMPLES) == []


def test_near_duplicates_are_joined_over_a_third() -> None:
    """The two halves of a passage have nothing in common but the passage."""
    whole = max(LONG, key=lambda question: len(question.passage))
    middle = len(whole.passage) // 2
    halves = [
        replace(whole, id=str(i), passage=part)
        for i, part in enumerate((whole.passage[:middle], whole.passage[middle:]))
    ]
    assert len(set(passage_groups(halves))) == 2
    assert len(set(passage_groups([halves[0], whole, halves[1]]))) == 1


def test_pairs_inside_a_file_and_between_two() -> None:
    one, other = LONG[0], LONG[1]
    near = replace(one, id="near", passage=one.passage.replace(" ", ""))
    again = replace(one, id="again")
    assert [(p.id_a, p.id_b, p.similarity) for p in near_duplicate_pairs([one, again, other])] == []
    (pair,) = near_duplicate_pairs([one, other], [again])
    assert (pair.id_a, pair.id_b, pair.similarity) == (one.id, "again", 1.0)
    inside = near_duplicate_pairs([one, other, replace(one, id="cut", passage=one.passage[:-9])])
    assert [{pair.id_a, pair.id_b} for pair in inside] == [{one.id, "cut"}]
    # The key of a passage leaves blanks out already: it is the same one.
    assert near_duplicate_pairs([one, near]) == []


def test_short_sentences_after_one_pattern_stay_apart() -> None:
    questions = make_questions(18)  # "세종은(는) 1400년에 한양에서 …을 만들었다."
    assert len(set(passage_groups(questions))) == len({passage_key(question) for question in questions}) == 14


def test_rows_without_a_passage_are_compared_by_question_and_choices() -> None:
    def bare(row_id: str, question: str) -> Question:
        return Question(
            row_id, "", question, ("광개토 대왕의 업적", "장수왕의 업적", "소수림왕의 업적", "고국천왕의 업적"), 1
        )

    same, near, other = (bare("a", "고구려의 전성기를 이끈 왕은 누구인가?"), bare("b", "고구려의 전성기를 이끈 왕은 누구일까?"), Question("c", "", "물의 어는점은 몇 도인가?", ("0도", "100도"), 1))  # fmt: skip
    groups = passage_groups([same, near, other])
    assert groups[0] == groups[1] != groups[2]


@settings(max_examples=12)
@given(seed=st.integers(0, 1000), num_folds=st.integers(2, 7))
def test_folds_hold_every_row_once_in_whatever_order(seed: int, num_folds: int) -> None:
    questions = SAMPLES[:30]
    folds = assign_folds(questions, num_folds)
    held_out = [row for fold in range(num_folds) for row in fold_rows(folds, fold)[1]]
    assert sorted(held_out) == list(range(30))
    for fold in range(num_folds):
        train, held = fold_rows(folds, fold)
        assert {folds.groups[row] for row in train}.isdisjoint(folds.groups[row] for row in held)
    mixed = random.Random(seed).sample(questions, 30)
    again = assign_folds(mixed, num_folds)
    assert dict(zip(again.ids, again.folds, strict=True)) == dict(zip(folds.ids, folds.folds, strict=True))
    assert again.sha256 == folds.sha256


def test_folds_are_alike() -> None:
    folds = assign_folds(SAMPLES, 5)
    for name in (
        lambda q: q.num_choices,
        lambda q: find_kind(q),
        lambda q: q.answer,
    ):  # fmt: skip
        whole = Counter(name(q) for q in SAMPLES)
        for fold in range(5):
            held = Counter(name(SAMPLES[row]) for row in fold_rows(folds, fold)[1])
            for value, count in whole.items():
                assert held[value] == pytest.approx(count / 5, abs=3.5)
    sizes = Counter(folds.folds)
    assert max(sizes.values()) - min(sizes.values()) <= 2


def test_a_stratum_too_small_for_the_folds_is_no_trouble() -> None:
    rare = [replace(question, choices=question.choices[:2], answer=1) for question in SAMPLES[:2]]
    folds = assign_folds([*rare, *SAMPLES[2:]], 5)
    assert sorted(Counter(folds.folds)) == [0, 1, 2, 3, 4]


def test_the_hash_is_of_the_assignment() -> None:
    folds = assign_folds(SAMPLES[:30], 3)
    moved = replace(folds, folds=tuple((fold + 1) % 3 for fold in folds.folds))
    assert len({folds.sha256, moved.sha256, assign_folds(SAMPLES[:30], 4).sha256}) == 3


def test_the_file(tmp_path: Path) -> None:
    folds = assign_folds(SAMPLES[:10], 2)
    write_folds(tmp_path / "folds.csv", folds)
    lines = (tmp_path / "folds.csv").read_text().splitlines()
    assert lines[0] == "id,fold,group"
    assert lines[1] == f"{SAMPLES[0].id},{folds.folds[0]},{folds.groups[0]}"
    assert len(lines) == 11


@pytest.mark.parametrize(
    ("questions", "num_folds", "match"),
    [
        (SAMPLES, 1, "--folds 1: expected at least 2"),
        ([replace(SAMPLES[0], id=str(i)) for i in range(4)], 2, "4 questions on 1 passages .* expected at least 2"),
    ],
)
def test_what_can_t_be_cut(questions: list[Question], num_folds: int, match: str) -> None:
    with pytest.raises(InputError, match=match):
        assign_folds(questions, num_folds)
