"""BM25 over Korean morphemes: which passages have the rare words of a question.

Robertson and Zaragoza 2009, as Lucene counts it (bm25s); morphemes by Kiwi. Both packages are loaded when an index is made.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ksat.corpus import Article, clean
from ksat.errors import InputError
from ksat.questions import Question

INSTALL = "pip install bm25s==0.3.16 kiwipiepy==0.24.1"
# Nouns, roots, verbs, adjectives, foreign words, Chinese characters, numbers. Particles and endings say nothing about the
# subject, nor do bound nouns (것, 수), pronouns and adverbs.
_TAGS = ("NNG", "NNP", "XR", "VV", "VA", "SL", "SH", "SN")
# What questions say about themselves, and verbs of no meaning.
_OF_QUESTIONS = frozenset(
    [
        "글",
        "지문",
        "윗글",
        "보기",
        "다음",
        "위",
        "설명",
        "내용",
        "밑줄",
        "빈칸",
        "선택지",
        "고르/V",
        "옳/V",
        "알맞/V",
        "적절",
        "적합",
        "해당",
        "대하/V",
        "관하/V",
        "하/V",
        "되/V",
        "있/V",
        "없/V",
        "않/V",
        "이르/V",
        "들어가/V",
    ]
)


# The passage counts no more than the question and its choices together. On tests/facts.jsonl among 8,056 other texts, with
# another text of 240 characters before each passage, the right text was first for 0.91 of the questions so, for 0.74 without
# a limit, 0.89 with a fourth. Choices at half or no weight were worse with the short passages: 0.93 and 0.80, not 0.98.
_PASSAGE_SHARE = 1.0


class Index:
    """Passages, searchable by the words of a question."""

    def __init__(self, passages: Iterable[Article]) -> None:
        """Reads all passages and keeps them.

        Raises:
            InputError: bm25s or kiwipiepy is not installed.
        """
        try:
            from bm25s import BM25
            from kiwipiepy import Kiwi
        except ImportError as error:
            raise InputError(f"retrieval needs packages that are not installed ({error.name}): {INSTALL}") from error
        self._kiwi: Any = _start(Kiwi)
        self.passages: list[Article] = []
        known: dict[str, str] = {}  # one string object for all places of a word: a tenth of the memory
        words = [[known.setdefault(word, word) for word in passage] for passage in self._read(passages)]
        self._bm25: Any = BM25()
        # bm25s can't take an average length of 0.
        self._bm25.index([passage or [""] for passage in words], show_progress=False)
        indptr = self._bm25.scores["indptr"]
        num_with = {word: int(indptr[i + 1] - indptr[i]) for word, i in self._bm25.vocab_dict.items() if word}
        self._idf = {word: self._inverse_frequency(count) for word, count in num_with.items()}

    def _inverse_frequency(self, num_with: int) -> float:
        return math.log(1 + (len(self.passages) - num_with + 0.5) / (num_with + 0.5))

    def _read(self, passages: Iterable[Article]) -> Iterator[list[str]]:
        def texts() -> Iterator[str]:
            for passage in passages:
                self.passages.append(passage)
                yield f"{passage.title}\n{passage.text}"

        # Kiwi reads ahead in threads of its own.
        for tokens in self._kiwi.tokenize(texts()):
            yield _words(tokens)

    def words(self, text: str) -> list[str]:
        """The distinct words of a question's text that say what it is about, but for those that all questions use.

        Kiwi may split a rare name where it stands alone (결작 in a choice) and keep it whole in a sentence (결작을): so of each
        written word the longest beginning that is a word of the corpus is taken as well.
        """
        text = clean(text)
        found = dict.fromkeys(_words(self._kiwi.tokenize(text)))
        for written in re.findall(r"\w+", text.lower()):
            beginnings = (written[:length] for length in range(len(written), 1, -1))
            if known := next((word for word in beginnings if word in self._idf), None):
                found[known] = None
        return [word for word in found if word not in _OF_QUESTIONS]

    def search(self, question: Question) -> npt.NDArray[np.float32]:
        """(P,) for each passage, how much of the question its words carry: 0 (none of it) to 1 (all, and often).

        A word weighs its rarity; words that no passage has count as the rarest. The words of question and <보기>, of the
        choices and of the passage are added up.

        Args:
            question: what to search for.
        """
        asked = self._score(f"{question.question}\n{question.question_plus}")
        choices = self._score("\n".join(question.choices))
        passage = self._score(question.passage)
        whole = asked[1] + choices[1]
        weight = min(1.0, _PASSAGE_SHARE * whole / passage[1]) if passage[1] else 0.0
        scores: npt.NDArray[np.float32] = asked[0] + choices[0] + np.float32(weight) * passage[0]
        whole += weight * passage[1]
        return (scores / max(whole, 1e-9)).astype(np.float32)  # a question of no words has scores of 0

    def _score(self, text: str) -> tuple[npt.NDArray[np.float32], float]:
        """(P,) each passage's BM25 score for the words of a text, and the weight of those words."""
        words = self.words(text)
        known = [word for word in words if word in self._idf]
        unseen = self._inverse_frequency(0)
        whole = sum(self._idf.get(word, unseen) for word in words)
        # bm25s refuses a list of no words.
        none = np.zeros(len(self.passages), dtype=np.float32)
        return (self._bm25.get_scores(known) if known else none), whole


@cache
def _start(kiwi: type) -> Any:
    """One analyser for all indices: it takes seconds to load."""
    return kiwi()


def _words(tokens: Sequence[Any]) -> list[str]:
    """Morphemes that say what a text is about; verbs and adjectives are marked, since 가다 is not 가."""
    words = []
    for token in tokens:
        tag = token.tag.partition("-")[0]
        if tag in _TAGS:
            words.append(f"{token.form}/V" if tag in ("VV", "VA") else token.form.lower())
    return words
