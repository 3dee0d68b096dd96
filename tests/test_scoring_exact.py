"""Scoring with a model that looks its scores up: what is scored in which pack, what is averaged, what the bar shows."""

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ksat import processes, scoring
from ksat.encoding import EncodedQuestion
from ksat.errors import InputError
from ksat.packing import Pack
from ksat.scoring import average_orders, choice_probs, finite_remedy, progress_bar, score_questions

NAN = float("nan")


def question(row_id: str, num_tokens: int, scores: list[float], order: int = 0) -> EncodedQuestion:
    """Its choices are one token each; TABLE keeps what the model says of it."""
    TABLE[(row_id, order)] = scores
    prompt = tuple(range(1000 * len(TABLE), 1000 * len(TABLE) + num_tokens))  # nothing is shared
    labels = tuple((9 - k,) for k in range(len(scores)))
    return EncodedQuestion(row_id, prompt, labels, (1.0,) * len(scores), None, order=order, num_orders=2)


TABLE: dict[tuple[str, int], list[float]] = {}


class Looked:
    """Takes packs of at most `most` tokens, notes their questions, and says what TABLE says."""

    layout, dtype, is_run = "tree", "float16", False

    def __init__(self, questions: list[EncodedQuestion], most: int = 10**9) -> None:
        self.questions, self.most = questions, most
        self.packs: list[list[str]] = []
        self.model = SimpleNamespace(eval=lambda: self.packs.append(["eval"]))
        self.overflow: str | None = None

    def choice_scores(self, pack: Pack) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        rows = [self.questions[row] for row in pack.rows]
        self.packs.append([row.key for row in rows])
        if pack.num_tokens > self.most:
            raise torch.OutOfMemoryError("out of memory")
        width = max(len(row.continuations) for row in rows)
        scores = [TABLE[(row.id, row.order)] for row in rows]
        return torch.tensor([own + [-float("inf")] * (width - len(own)) for own in scores], dtype=torch.float32)

    def first_overflow(self, pack: Pack) -> str | None:
        return self.overflow


@pytest.fixture
def questions() -> list[EncodedQuestion]:
    TABLE.clear()
    return [
        question("a", 10, [0.5, 1.5]),
        question("b", 30, [1.0, 2.0, 3.0, 4.0, 5.0]),
        question("c", 20, [-1.0, -2.0, -3.0]),
        question("d", 40, [0.25, 0.75]),
    ]


EXPECTED = [
    [0.5, 1.5, NAN, NAN, NAN],
    [1.0, 2.0, 3.0, 4.0, 5.0],
    [-1.0, -2.0, -3.0, NAN, NAN],
    [0.25, 0.75, NAN, NAN, NAN],
]


def score(model: Looked, questions: list[EncodedQuestion], pack_tokens: int = 50, **how: Any) -> np.ndarray[Any, Any]:
    return score_questions(model, questions, pack_tokens=pack_tokens, **how)  # type: ignore[arg-type]


def test_packs_are_scored_largest_first_and_scores_stand_with_their_questions(questions: list[EncodedQuestion]) -> None:
    model, heard = Looked(questions), []
    np.testing.assert_array_equal(score(model, questions, on_scored=heard.append), EXPECTED)
    assert model.packs == [["eval"], ["a", "d"], ["b", "c"]]
    assert heard == [{"a": EXPECTED[0][:2], "d": EXPECTED[3][:2]}, {"b": EXPECTED[1], "c": EXPECTED[2][:3]}]
    np.testing.assert_array_equal(score(Looked(questions), questions), EXPECTED)  # nobody needs to hear


def test_out_of_memory_halves_this_pack_and_all_that_wait(questions: list[EncodedQuestion]) -> None:
    model = Looked(questions, most=49)
    np.testing.assert_array_equal(score(model, questions, pack_tokens=100), EXPECTED)
    assert model.packs == [["eval"], ["a", "b", "c", "d"], ["a", "b"], ["c", "d"], ["c"], ["d"]]
    model = Looked(questions, most=29)
    with pytest.raises(
        InputError,
        match=r"^question 'd': out of memory with this question alone \(40 tokens\); lower --max-tokens, or use a smaller base$",
    ):
        score(model, questions, pack_tokens=50)
    assert model.packs == [["eval"], ["a", "d"], ["a"], ["d"]]


def test_halves_by_hand() -> None:
    error = torch.OutOfMemoryError("")
    waiting = [[3, 4], [5], [6, 7, 8, 9]]
    assert scoring._halved([], [0, 1, 2], waiting, error) == [[0, 1], [2], [3], [4], [5], [6, 7], [8, 9]]


def test_a_pack_that_is_done_is_left_out_and_one_that_is_half_done_is_scored_whole(
    questions: list[EncodedQuestion], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[Any] = []

    class Bar:
        def __init__(self, *seen: Any) -> None:
            bars.append(self)
            self.seen: list[Any] = [seen]

        def set_postfix(self, shown: dict[str, str], refresh: bool = True) -> None:
            self.seen.append((shown, refresh))

        def update(self, number: int) -> None:
            self.seen.append(number)

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None:
            self.seen.append("closed")

    monkeypatch.setattr(scoring, "progress_bar", Bar)
    monkeypatch.setattr(scoring, "peak_memory_gib", lambda: 1.25)
    done = {"a": (7.0, 8.0), "d": [9.0, 10.0], "b": [0.0] * 5, "unknown": [1.0]}
    model = Looked(questions)
    found = score(model, questions, done=done)
    # "b" was scored, but not with "c": both are scored again, and the new score counts.
    np.testing.assert_array_equal(found, [[7, 8, NAN, NAN, NAN], EXPECTED[1], EXPECTED[2], [9, 10, NAN, NAN, NAN]])
    assert model.packs == [["eval"], ["b", "c"]]
    assert bars[0].seen == [("scoring", 4, 3), ({"memory": "1.2 GiB"}, False), 1, "closed"]
    score(Looked(questions), questions, progress="validation")
    assert bars[1].seen[0] == ("validation", 4, 0)
    assert bars[1].seen[1::2] == [({"memory": "1.2 GiB"}, False)] * 2 + ["closed"]
    assert bars[1].seen[2::2] == [2, 2]


def test_orders_of_a_question_count_as_one_in_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    TABLE.clear()
    rows = [question("a", 2, [0.0] * 2, order) for order in range(2)] + [
        question("b", 2, [0.0] * 2, k) for k in range(2)
    ]
    seen: list[Any] = []

    class Bar(contextlib.nullcontext):  # type: ignore[type-arg]
        def __init__(self, *about: Any) -> None:
            super().__init__(self)
            seen.append(about)

        def set_postfix(self, *_: Any, **how: Any) -> None:
            pass

        def update(self, number: int) -> None:
            seen.append(number)

    monkeypatch.setattr(scoring, "progress_bar", Bar)
    score(Looked(rows), rows)
    assert seen[0] == ("scoring", 2, 0) and sum(seen[1:]) == 2
    seen.clear()
    score(Looked(rows), rows, done={rows[0].key: [0.0] * 2, rows[1].key: [0.0] * 2, rows[2].key: [0.0] * 2})
    assert seen == [("scoring", 2, 1), 1]


@pytest.mark.parametrize(("overflow", "where"), [(None, "the head"), ("layer 3", "layer 3")])
def test_a_score_that_is_not_finite_is_named(
    questions: list[EncodedQuestion], overflow: str | None, where: str
) -> None:
    TABLE[("c", 0)] = [-1.0, NAN, -3.0]
    model = Looked(questions)
    model.overflow = overflow
    message = (
        rf"^question 'c': the model's score is not finite \(\[-1.0, nan, -3.0\], first in {where}\); use --dtype bfloat16 or "
        r"float32, or another base$"
    )
    with pytest.raises(InputError, match=message):
        score(model, questions)


def test_what_helps_follows_from_the_dtype() -> None:
    assert finite_remedy("float16") == "use --dtype bfloat16 or float32, or another base"
    assert finite_remedy("bfloat16") == "use --dtype float32, or another base"
    assert finite_remedy("float32") == "use another base"


def test_a_run_is_not_told_to_take_another_base_or_limit_of_tokens(questions: list[EncodedQuestion]) -> None:
    """inference.py refuses both with --ckpt."""
    model = Looked(questions, most=1)
    model.is_run = True
    with pytest.raises(InputError, match=r"alone \(\d+ tokens\); use a GPU with more memory, or another run$"):
        score(model, questions)
    model.most, TABLE[("c", 0)] = 10**9, [-1.0, NAN, -3.0]
    with pytest.raises(InputError, match=r"; use --dtype bfloat16 or float32, or another run$"):
        score(model, questions)


def test_orders_are_averaged_by_their_log_probabilities() -> None:
    TABLE.clear()
    rows = [question("a", 3, [0, 0]), question("a", 3, [0, 0], 1), question("b", 3, [0, 0, 0])]
    scores = np.array(
        [[math_log(1), math_log(3), NAN], [math_log(9), math_log(1), NAN], [1000.0, 1000.0 + math_log(2), 1000.0]]
    )
    first = (math_log(1 / 4) + math_log(9 / 10)) / 2, (math_log(3 / 4) + math_log(1 / 10)) / 2
    expected = [[*first, NAN], [math_log(1 / 4), math_log(2 / 4), math_log(1 / 4)]]
    np.testing.assert_allclose(average_orders(rows, scores), expected, atol=1e-12)


def math_log(value: float) -> float:
    return float(np.log(value))


def test_probabilities_of_a_row_are_over_its_own_choices() -> None:
    scores = np.array([[0.0, math_log(3), NAN], [-2000.0, -2000.0, -2000.0 + math_log(2) / 2]])
    np.testing.assert_allclose(choice_probs(scores, 2.0), [[0.1, 0.9, NAN], [0.25, 0.25, 0.5]], atol=1e-12)


@pytest.mark.parametrize(("terminal", "pause"), [(True, 0.1), (False, 30.0)])
def test_the_bar_says_what_goes_on_and_from_where(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, pause: float
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(scoring, "tqdm", lambda **how: made.append(how))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    for main in (True, False):
        monkeypatch.setattr(processes, "is_main", lambda main=main: main)
        progress_bar("scoring", 10, 3)
        assert made.pop() == {
            "total": 10,
            "initial": 3,
            "desc": "scoring",
            "unit": "question",
            "mininterval": pause,
            "smoothing": 0.1,
            "disable": not main,
        }
