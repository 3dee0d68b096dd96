"""What MinHash proposes misses nothing that the exact check would join, also where an excerpt is a small part of a passage."""

import random
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from ksat.near_duplicates import near_duplicate_pairs, passage_groups
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
    return {letters[i : i + 5] for i in range(len(letters) - 4)}


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
        if (shorter >= 76 and shared / shorter >= 0.6) or shared / len(sets[a] | sets[b]) >= 0.3:
            expected.add(frozenset((a, b)))
    assert {frozenset((pair.id_a, pair.id_b)) for pair in near_duplicate_pairs(rows)} == expected
    assert len(expected) >= 15
