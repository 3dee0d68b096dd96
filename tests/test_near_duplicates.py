"""What MinHash proposes misses nothing that the exact check would join, also where an excerpt is a small part of a passage."""

import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from ksat import near_duplicates
from ksat.near_duplicates import RARE, are_near, near_duplicate_pairs, near_rows, passage_groups
from ksat.questions import Question, read_questions

SAMPLES = read_questions(Path(__file__).parent.parent / "data" / "sample_train.csv", labelled=True)
SENTENCES = [sentence.strip() for q in SAMPLES for sentence in q.passage.split(". ") if len(sentence.strip()) > 20]


def edited_excerpts(seed: int, num_passages: int, length: int, every: int) -> list[Question]:
    """Passages of `length` characters, each followed by 300 characters of it with one word in `every` changed."""
    generator = random.Random(seed)
    rows = []
    for i in range(num_passages):
        passage = ". ".join(generator.sample(SENTENCES, len(SENTENCES)))[:length]
        start = generator.randrange(length - 300)
        words = passage[start : start + 300].split(" ")
        for place in generator.sample(range(len(words)), len(words) // every + 1):
            words[place] = "달리"
        rows += [replace(SAMPLES[0], id=f"{i}-whole", passage=passage)]
        rows += [replace(SAMPLES[0], id=f"{i}-part", passage=" ".join(words))]
    return rows


def grams(text: str) -> set[str]:
    letters = "".join(letter for letter in text if letter.isalnum()).lower()
    return {letters[i : i + 3] for i in range(len(letters) - 2)}


@pytest.mark.parametrize(("length", "every"), [(1500, 25), (1500, 12), (1000, 12)])
def test_an_edited_excerpt_of_a_long_passage_is_found(length: int, every: int) -> None:
    for seed in range(2):
        rows = edited_excerpts(seed, 40, length, every)
        groups = dict(zip((row.id for row in rows), passage_groups(rows), strict=True))
        assert [i for i in range(40) if groups[f"{i}-whole"] != groups[f"{i}-part"]] == []


def test_pairs_are_those_of_comparing_all_with_all() -> None:
    rows = edited_excerpts(7, 15, 1500, 12)
    sets = {row.id: grams(row.passage) for row in rows}
    expected = set()
    for a, b in combinations(sets, 2):
        shared = len(sets[a] & sets[b])
        shorter = min(len(sets[a]), len(sets[b]))
        if shared / shorter >= 0.6 or shared / len(sets[a] | sets[b]) >= 0.26:
            expected.add(frozenset((a, b)))
    assert {frozenset((pair.id_a, pair.id_b)) for pair in near_duplicate_pairs(rows)} == expected
    assert len(expected) >= 15


def edited(text: str, share: float, generator: random.Random) -> str:
    """A share of the words replaced by words of other passages."""
    words = text.split(" ")
    for place in generator.sample(range(len(words)), round(len(words) * share)):
        words[place] = generator.choice(generator.choice(SENTENCES).split(" "))
    return " ".join(words)


def test_with_three_words_in_ten_changed_a_passage_is_still_the_same() -> None:
    generator = random.Random(3)
    firsts = list({row.passage: row for row in SAMPLES}.values())
    copies = [replace(row, id=f"copy-{row.id}", passage=edited(row.passage, 0.3, generator)) for row in firsts]
    groups = dict(zip((row.id for row in [*firsts, *copies]), passage_groups([*firsts, *copies]), strict=True))
    missed = [row.id for row in firsts if groups[row.id] != groups[f"copy-{row.id}"]]
    assert len(firsts) > 100 and len(missed) <= len(firsts) // 30
    assert len(set(groups.values())) >= len(firsts)  # none is joined with another one


@pytest.mark.parametrize("count", [3, RARE + 5, 10 * RARE])
def test_many_copies_of_one_passage_are_one_group(count: int) -> None:
    generator = random.Random(0)
    passage = " ".join(generator.sample(SENTENCES, 12))
    copies = [replace(SAMPLES[0], id=str(i), passage=edited(passage, 0.1, generator)) for i in range(count)]
    assert len(set(passage_groups([*copies, *SAMPLES]))) == 1 + len(set(passage_groups(SAMPLES)))


def test_texts_of_one_pattern_are_compared_in_proportion_to_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one was compared with every other: four times as often for twice as many."""
    compare, count = near_duplicates._similarity, 0

    def counted(*texts: Any) -> float | None:
        nonlocal count
        count += 1
        return compare(*texts)

    monkeypatch.setattr(near_duplicates, "_similarity", counted)

    def comparisons(num_rows: int) -> int:
        nonlocal count
        count = 0
        generator = random.Random(0)
        frame = " ".join(generator.sample(SENTENCES, 4))
        names = ["".join(generator.choices("가나다라마바사아자차카타파하", k=5)) for _ in range(12 * num_rows)]
        texts = [f"{frame} {' '.join(names[12 * i : 12 * i + 12])}" for i in range(num_rows)]
        passage_groups([replace(SAMPLES[0], id=str(i), passage=text) for i, text in enumerate(texts)])
        return count

    few = comparisons(200)
    assert 0 < few < 10 * 200
    assert comparisons(600) < 1.2 * 3 * few


def test_a_copy_is_found_among_texts_of_one_pattern() -> None:
    generator = random.Random(0)
    names = ["".join(generator.choices("가나다라마바사아자차카타파하", k=8)) for _ in range(4 * 60)]
    pattern = "{}에서 태어난 {}은 {}을 만들고 {}으로 떠났다"  # too short for its pattern to make it one text
    texts = [pattern.format(*names[4 * i : 4 * i + 4]) for i in range(60)]
    rows = [replace(SAMPLES[0], id=str(i), passage=text) for i, text in enumerate([*texts, f"{texts[7]} 그랬다"])]
    groups = passage_groups(rows)
    assert groups[7] == groups[60] and len(set(groups)) == 60


def test_what_many_questions_without_a_passage_say_joins_none_of_them() -> None:
    generator = random.Random(0)
    rows = []
    for i in range(40):
        choices = tuple(generator.choice(SENTENCES)[:14] for _ in range(4))
        rows.append(
            Question(str(i), "", "다음 중 이 시기에 있었던 일에 대한 설명으로 옳은 것을 고르면 무엇인가?", choices, 1)
        )
    assert len(set(passage_groups(rows))) == 40


def test_a_few_letters_are_the_same_only_letter_by_letter() -> None:
    rows = [replace(SAMPLES[0], id=str(i), passage=f"passage number {i}") for i in range(30)]
    assert len(set(passage_groups(rows))) == 30


def test_rows_near_to_those_of_another_file() -> None:
    generator = random.Random(5)
    firsts = list({row.passage: row for row in SAMPLES}.values())
    there = [replace(firsts[i], id=f"there-{i}", passage=edited(firsts[i].passage, 0.3, generator)) for i in (4, 9)]
    assert near_rows(firsts[:12], there) == [4, 9]
    assert near_rows(firsts[:4], there) == near_rows([], there) == near_rows(firsts, []) == []
    assert are_near(firsts[4], there[0]) and not are_near(firsts[4], there[1])
    assert are_near(replace(firsts[4], passage="짧다"), replace(there[0], passage="짧 다"))


def test_rows_without_a_passage_are_told_by_what_they_ask_and_not_by_their_ids() -> None:
    """Two files may count from 1 each; their first rows were one passage, and a short question was never found again."""
    short = replace(
        SAMPLES[0],
        id="1",
        passage="",
        question="대한민국의 수도는?",
        question_plus="",
        choices=("서울", "부산", "대구", "인천"),
    )
    long = replace(short, id="2", question="조선을 세운 왕이 도읍을 옮긴 곳으로 알맞은 것은 무엇인가?")
    other = replace(short, id="1", question="물의 끓는점은?", choices=("0도", "50도", "100도", "150도"))
    turned = tuple(reversed(short.choices))
    assert near_rows([short, long], [other]) == []
    assert near_rows([short, long], [other, replace(long, id="9")]) == [1]
    assert near_rows([other, short], [replace(short, id="8", choices=turned)]) == [1]
    assert near_duplicate_pairs([short], [other]) == []
    pairs = near_duplicate_pairs([short, long], [other, replace(short, id="7", choices=turned)])
    assert [(pair.id_a, pair.id_b, pair.similarity) for pair in pairs] == [("1", "7", 1.0)]
    assert len(set(passage_groups([short, replace(short, id="3"), replace(short, id="4", choices=turned)]))) == 1
