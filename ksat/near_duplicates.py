"""Passages that are the same text but for some words, or of which one is an excerpt of the other.

What counts as one passage is said here alone, for folds, validation, intervals, shots and training rows to be left out. Candidates
have rare 5-grams of characters in common (MinHash, from the package datasketch); each is then checked exactly by its 3-grams.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ksat.questions import Question, passage_key

# Of 3-grams. A third of the words changed leaves 0.26 or more of unions; texts of Belebele that are not related share 0.07 at the
# most, of KoBEST 0.24, and those two are one text told twice (docs/results.md).
SAME_JACCARD = 0.26
# Of the shorter one's 3-grams, in an excerpt; texts of their own share 0.17 at the most, 0.45 if told twice.
SAME_CONTAINED = 0.6
FEWEST_EXCERPT = 76  # 3-grams of an excerpt; a shorter one may be a phrase that many texts have
# Sentences after one pattern, with other names, share up to 0.67 and contain up to 0.81; so do questions without a passage.
SHORT, SHORT_JACCARD, SHORT_CONTAINED = 50, 0.7, 0.85
FEWEST_LETTERS = 20  # a shorter text says too little: it is the same only if nothing but blanks differs
RARE = 20  # a 5-gram that more passages have is a phrase or a pattern
_NEIGHBOURS_SHARE = 0.1  # of the shorter one's 5-grams
# Of two sets of Jaccard 0.17 at least so many hashes agree with a probability of 0.9999.
_NUM_HASHES, _FEWEST_AGREEING = 128, 6
_FEWEST_GRAMS = 5  # of a text that MinHash sees; near-duplicates share more


@dataclass(frozen=True, slots=True)
class DuplicatePair:
    """Two near-duplicate passages.

    Attributes:
        id_a: first question of the one.
        id_b: first question of the other.
        similarity: share of the shorter one's 3-grams that the longer one has, 0 to 1.
    """

    id_a: str
    id_b: str
    similarity: float


@dataclass(frozen=True, slots=True)
class _Text:
    """letters_of a passage, or of question and choices where there is none."""

    letters: str
    is_passage: bool

    @classmethod
    def of(cls, question: Question) -> "_Text":
        text = question.passage or " ".join([question.question, question.question_plus, *question.choices])
        return cls(letters_of(text), bool(question.passage))


def letters_of(text: str) -> str:
    """Letters and digits alone, without case."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).lower())


def passage_groups(questions: Sequence[Question]) -> list[str]:
    """(N,) what questions have in common whose passages are the same or near-duplicates, joined transitively.

    Rows without a passage are compared by question and choices. A group is named by the smallest passage key in it, so it
    does not depend on the order of the rows.
    """
    texts = _texts(questions)
    parent = {key: key for key in texts}

    def find(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for a, b, _ in _near(texts):
        low, high = sorted((find(a), find(b)))
        parent[high] = low
    return [find(passage_key(question)) for question in questions]


def groups_by_id(questions: Sequence[Question]) -> dict[str, str]:
    """passage_groups by the questions' ids."""
    return dict(zip((question.id for question in questions), passage_groups(questions), strict=True))


def near_rows(rows: Sequence[Question], others: Sequence[Question]) -> list[int]:
    """Indices of the rows whose passage is in one group with that of one of the others, ascending."""
    groups = passage_groups([*rows, *others])
    there = set(groups[len(rows) :])
    return [i for i, group in enumerate(groups[: len(rows)]) if group in there]


def same_questions(rows: Sequence[Question], others: Sequence[Question]) -> list[tuple[str, str]]:
    """Ids of rows of two files that ask the same about the same passage, or nearly the same, in whatever order of choices."""
    groups = passage_groups([*rows, *others])
    keys = [
        (group, letters_of(row.question + row.question_plus), frozenset(map(letters_of, row.choices)))
        for group, row in zip(groups, [*rows, *others], strict=True)
    ]
    there: dict[tuple[str, str, frozenset[str]], list[str]] = {}
    for key, row in zip(keys[len(rows) :], others, strict=True):
        there.setdefault(key, []).append(row.id)
    return [(row.id, other) for key, row in zip(keys[: len(rows)], rows, strict=True) for other in there.get(key, [])]


def near_duplicate_pairs(a: Sequence[Question], b: Sequence[Question] | None = None) -> list[DuplicatePair]:
    """Pairs of near-duplicate passages inside one file, or between two; each passage by its first question.

    Inside a file the questions of one passage are no pair; between two files the same passage is one. Of a text that more
    than RARE passages share, as of a pattern, not every pair is named, but each passage with its neighbours.
    """
    firsts_a = _firsts(a)
    firsts_b = firsts_a if b is None else _firsts(b)
    found = set()
    for key, other, similarity in _near(_texts([*a, *(b or ())])):
        for one, two in ((key, other), (other, key)) if b is not None else ((key, other),):
            if one in firsts_a and two in firsts_b:
                found.add(DuplicatePair(firsts_a[one], firsts_b[two], similarity))
    if b is not None:
        found |= {DuplicatePair(firsts_a[key], firsts_b[key], 1.0) for key in firsts_a.keys() & firsts_b.keys()}
    return sorted(found, key=lambda pair: (-pair.similarity, pair.id_a, pair.id_b))


def are_near(a: Question, b: Question) -> bool:
    """Whether two questions stand on one passage, or on near-duplicates; other passages do not join them here."""
    return passage_key(a) == passage_key(b) or _similarity(_Text.of(a), _Text.of(b)) is not None


def _firsts(questions: Sequence[Question]) -> dict[str, str]:
    return {passage_key(question): question.id for question in reversed(questions)}


def _texts(questions: Sequence[Question]) -> dict[str, _Text]:
    found: dict[str, _Text] = {}
    for question in questions:
        key = passage_key(question)
        if key not in found:
            found[key] = _Text.of(question)
    return found


def _near(texts: dict[str, _Text]) -> list[tuple[str, str, float]]:
    """Pairs of keys, the smaller first, whose texts are near-duplicates, with the share of the shorter one; sorted."""
    keys = sorted(key for key, text in texts.items() if len(text.letters) >= FEWEST_LETTERS)
    found = []
    for i, j in sorted(_candidates([texts[key].letters for key in keys])):
        similarity = _similarity(texts[keys[i]], texts[keys[j]])
        if similarity is not None:
            found.append((keys[i], keys[j], similarity))
    return found


def _candidates(letters: Sequence[str]) -> set[tuple[int, int]]:
    """Pairs of indices, the smaller first, that may be near-duplicates; of one text at most some RARE times the number of its 5-grams.

    A 5-gram that one text has pairs it with nobody, and one that many have would pair all with all. So MinHash sees the
    others alone, in which near-duplicates are far more alike, and what many have pairs a text with its neighbours only.
    """
    if not letters:
        return set()
    hashes = [_hashes(text) for text in letters]
    sizes = np.array([len(each) for each in hashes])
    grams, texts = np.concatenate(hashes), np.repeat(np.arange(len(letters)), sizes)
    del hashes
    order = np.argsort(grams, kind="stable")
    grams, texts = grams[order], texts[order]
    _, counts = np.unique(grams, return_counts=True)
    spread = np.repeat(counts, counts)  # how many texts have the gram
    is_next = (grams[1:] == grams[:-1]) & (spread[1:] > RARE)
    a, b, shared = _count_pairs([texts[:-1][is_next] * len(sizes) + texts[1:][is_next]], len(sizes))
    enough = shared >= _NEIGHBOURS_SHARE * np.minimum(sizes[a], sizes[b])
    found = set(zip(a[enough].tolist(), b[enough].tolist(), strict=True))
    is_rare = (spread > 1) & (spread <= RARE)
    grams, texts = grams[is_rare], texts[is_rare]
    ends = np.cumsum(np.bincount(texts, minlength=len(letters)))[:-1]
    return found | _alike(np.split(grams[np.argsort(texts, kind="stable")], ends))


def _hashes(letters: str) -> NDArray[np.uint32]:
    """The different 5-grams of a text, each as 32 bits of a polynomial of its characters."""
    codes = np.frombuffer(letters.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(codes, 5)
    powers = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(5)], dtype=np.uint64)
    return np.unique(((windows * powers).sum(axis=1, dtype=np.uint64) >> np.uint64(32)).astype(np.uint32))


def _alike(sets: Sequence[NDArray[np.uint32]]) -> set[tuple[int, int]]:
    """Pairs of indices, the smaller first, of sets whose MinHash sketches agree in enough places."""
    from datasketch import MinHash

    texts = np.array([i for i, each in enumerate(sets) if len(each) >= _FEWEST_GRAMS], dtype=np.int64)
    lists = (sets[i].tolist() for i in texts)
    sketches = [each.hashvalues for each in MinHash.generator(lists, num_perm=_NUM_HASHES, seed=1, hashfunc=int)]
    if not sketches:
        return set()
    found = []
    for values in np.array(sketches).T:
        order = np.argsort(values, kind="stable")
        for step in range(1, RARE):  # so many texts at the most have the gram behind a value
            is_same = values[order[step:]] == values[order[:-step]]
            if not is_same.any():
                break
            found.append(texts[order[:-step][is_same]] * len(sets) + texts[order[step:][is_same]])
    a, b, agreeing = _count_pairs(found, len(sets))
    enough = agreeing >= _FEWEST_AGREEING
    return set(zip(a[enough].tolist(), b[enough].tolist(), strict=True))


def _count_pairs(codes: Sequence[NDArray[np.int64]], num_texts: int) -> tuple[NDArray[np.int64], ...]:
    """Of pairs (a, b), each written as a * num_texts + b: the different ones' a, their b, and how often each stands there."""
    each, counts = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *codes]), return_counts=True)
    return (*np.divmod(each, num_texts), counts)


def _grams(letters: str) -> set[str]:
    return {letters[i : i + 3] for i in range(len(letters) - 2)}


def _similarity(a: _Text, b: _Text) -> float | None:
    """Share of the shorter one's 3-grams that both have, None if they are no near-duplicates."""
    if min(len(a.letters), len(b.letters)) < FEWEST_LETTERS:
        return None
    left, right = _grams(a.letters), _grams(b.letters)
    shared, shorter = len(left & right), min(len(left), len(right))
    are_passages = a.is_passage and b.is_passage
    contained, jaccard = shared / shorter, shared / len(left | right)
    is_excerpt = contained >= (SAME_CONTAINED if are_passages and shorter >= FEWEST_EXCERPT else SHORT_CONTAINED)
    is_same = jaccard >= (SAME_JACCARD if are_passages and shorter >= SHORT else SHORT_JACCARD)
    return contained if is_excerpt or is_same else None
