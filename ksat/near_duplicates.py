"""Passages that are the same text but for a few words, or of which one is an excerpt of the other.

Candidates come from MinHash over character 5-grams (LSH Ensemble, which finds sets contained in larger ones: Zhu et al. 2016,
https://doi.org/10.14778/2994509.2994534, from the package datasketch); each is then checked exactly.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from datasketch import MinHash, MinHashLSHEnsemble

from ksat.questions import Question, passage_key

GRAM = 5  # characters
SAME_JACCARD = (
    0.3  # a sixth of the words changed leaves about 0.45; unrelated passages of Belebele share 0.05 at the most
)
QUOTED = 0.85  # of a shorter excerpt: all of it but for its ends and one seam
SHORT, SHORT_JACCARD = (
    50,
    0.6,
)  # of texts of so few 5-grams: sentences after one pattern, with other names, share up to 0.5
SAME_CONTAINED = 0.6  # of the shorter one's 5-grams, in an excerpt; unrelated ones share 0.1 at the most
FEWEST_CHARACTERS = 80  # of an excerpt; a shorter one may be a phrase that many texts have
# Of the shorter one; far below both, since an estimate is off: 0.35 lost 15 of 414 excerpts with a word in 12 or 25 changed.
_CANDIDATE = 0.2
_NUM_HASHES = 256


@dataclass(frozen=True, slots=True)
class DuplicatePair:
    """Two near-duplicate passages.

    Attributes:
        id_a: first question of the one.
        id_b: first question of the other.
        similarity: share of the shorter one's 5-grams that the longer one has, 0 to 1.
    """

    id_a: str
    id_b: str
    similarity: float


def passage_groups(questions: Sequence[Question]) -> list[str]:
    """(N,) what questions have in common whose passages are the same or near-duplicates, joined transitively.

    Rows without a passage are compared by question and choices. A group is named by the smallest passage key in it, so it
    does not depend on the order of the rows.
    """
    documents = _documents(questions)
    parent = {key: key for key in documents}

    def find(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for a, b, _ in _near(documents, documents):
        low, high = sorted((find(a), find(b)))
        parent[high] = low
    return [find(passage_key(question)) for question in questions]


def near_duplicate_pairs(a: Sequence[Question], b: Sequence[Question] | None = None) -> list[DuplicatePair]:
    """Pairs of near-duplicate passages inside one file, or between two; each passage by its first question.

    Inside a file the questions of one passage are no pair; between two files the same passage is one.
    """
    firsts_a = _firsts(a)
    firsts_b = firsts_a if b is None else _firsts(b)
    documents = _documents(a)
    others = documents if b is None else _documents(b)
    found = {
        DuplicatePair(firsts_a[key], firsts_b[other], similarity) for key, other, similarity in _near(documents, others)
    }
    if b is not None:
        found |= {DuplicatePair(firsts_a[key], firsts_b[key], 1.0) for key in documents.keys() & others.keys()}
    return sorted(found, key=lambda pair: (-pair.similarity, pair.id_a, pair.id_b))


def _firsts(questions: Sequence[Question]) -> dict[str, str]:
    return {passage_key(question): question.id for question in reversed(questions)}


def _documents(questions: Sequence[Question]) -> dict[str, frozenset[str]]:
    """5-grams of every passage, or of question and choices where there is none, by passage key."""
    found: dict[str, frozenset[str]] = {}
    for question in questions:
        key = passage_key(question)
        if key not in found:
            text = question.passage or " ".join([question.question, question.question_plus, *question.choices])
            found[key] = _grams(text)
    return found


def _grams(text: str) -> frozenset[str]:
    """Without case, blanks and punctuation."""
    letters = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", text).lower())
    return frozenset(letters[i : i + GRAM] for i in range(max(1, len(letters) - GRAM + 1)))


def _near(a: dict[str, frozenset[str]], b: dict[str, frozenset[str]]) -> list[tuple[str, str, float]]:
    """Pairs of different keys, one of `a` and one of `b`, that are near-duplicates, with the share of the shorter one."""
    hashes_b = {key: _min_hash(grams) for key, grams in b.items()}
    hashes_a = hashes_b if a is b else {key: _min_hash(grams) for key, grams in a.items()}
    found: dict[tuple[str, str], float] = {}
    # A query finds what contains it: the shorter ones are to be asked for the longer ones, so both sides are.
    for asked, asked_hashes, indexed, indexed_hashes, turned in (
        (a, hashes_a, b, hashes_b, False),
        (b, hashes_b, a, hashes_a, True),
    ):
        if turned and a is b:
            break
        if not asked or not indexed:
            return []
        index = MinHashLSHEnsemble(threshold=_CANDIDATE, num_perm=_NUM_HASHES, num_part=4)
        index.index((key, indexed_hashes[key], len(indexed[key])) for key in sorted(indexed))
        for key in sorted(asked):
            for other in index.query(asked_hashes[key], len(asked[key])):
                # An excerpt finds its whole, but not the other way round: inside a file the pair has no direction.
                pair = (other, key) if turned or (a is b and other < key) else (key, other)
                if key != other and pair not in found:
                    similarity = _similarity(a[pair[0]], b[pair[1]])
                    if similarity is not None:
                        found[pair] = similarity
    return [(key, other, similarity) for (key, other), similarity in sorted(found.items())]


def _min_hash(grams: frozenset[str]) -> MinHash:
    sketch = MinHash(num_perm=_NUM_HASHES, seed=1)
    sketch.update_batch([gram.encode() for gram in grams])
    return sketch


def _similarity(a: frozenset[str], b: frozenset[str]) -> float | None:
    """Share of the shorter one's 5-grams that both have, None if they are no near-duplicates."""
    shared, shorter = len(a & b), min(len(a), len(b))
    contained = shared / shorter
    is_excerpt = contained >= (SAME_CONTAINED if shorter >= FEWEST_CHARACTERS - GRAM + 1 else QUOTED)
    is_same = shared / len(a | b) >= (SHORT_JACCARD if shorter < SHORT else SAME_JACCARD)
    return contained if is_excerpt or is_same else None
