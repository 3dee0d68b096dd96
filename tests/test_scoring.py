"""Scoring: many are as one by one, the order is the caller's, memory may run out, interruptions change nothing."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny import base_folder, encode, load_base, make_questions

from ksat.encoding import EncodedQuestion
from ksat.errors import InputError
from ksat.language_model import LanguageModel
from ksat.packing import Pack, num_tree_tokens
from ksat.scoring import choice_probs, score_questions


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    loaded: LanguageModel = load_base(base_folder())
    return loaded


@pytest.fixture(scope="module")
def questions() -> list[EncodedQuestion]:
    return encode(make_questions(12), "text")


def log_probs(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.log(choice_probs(scores, 1.0))


@pytest.mark.parametrize("score_by", ["label", "text"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_a_batch_of_many_is_as_one_by_one(family: str, score_by: str, dtype: str, tolerance: float) -> None:
    loaded = load_base(base_folder(family), dtype=dtype)
    encoded = encode(make_questions(12), score_by)
    together = score_questions(loaded, encoded, pack_tokens=10_000)
    few = score_questions(loaded, encoded, pack_tokens=400)
    alone = np.concatenate([score_questions(loaded, [question], pack_tokens=1) for question in encoded])
    np.testing.assert_allclose(log_probs(together), log_probs(alone), atol=tolerance, rtol=0)
    np.testing.assert_allclose(log_probs(few), log_probs(alone), atol=tolerance, rtol=0)


def test_mistake_4_order_is_the_caller_s_whatever_the_lengths(
    model: LanguageModel, questions: list[EncodedQuestion]
) -> None:
    """Packs are longest first; every score still stands with its own question, and none is dropped."""
    scores = score_questions(model, questions, pack_tokens=300)
    order = [5 * i % 12 for i in range(12)]
    shuffled = score_questions(model, [questions[i] for i in order], pack_tokens=300)
    np.testing.assert_allclose(shuffled, scores[order], atol=1e-5)


def test_mistake_3_nan_where_a_choice_does_not_exist_and_rows_sum_to_1(
    model: LanguageModel, questions: list[EncodedQuestion]
) -> None:
    scores = score_questions(model, questions, pack_tokens=10_000)
    counts = [len(question.continuations) for question in questions]
    assert set(counts) == {4, 5}
    assert np.isnan(scores).tolist() == [[k >= count for k in range(5)] for count in counts]
    probs = choice_probs(scores, 3.0)
    assert np.isnan(probs).tolist() == np.isnan(scores).tolist()
    np.testing.assert_allclose(np.nansum(probs, axis=1), 1.0, atol=1e-12)


def test_probabilities_by_hand() -> None:
    scores = np.array([[0.0, np.log(3.0), np.nan, np.nan, np.nan], [-1e4, -1e4, -1e4, -1e4, -1e4]])
    np.testing.assert_allclose(choice_probs(scores, 1.0)[0, :2], [0.25, 0.75])
    np.testing.assert_allclose(choice_probs(scores, 2.0)[0, :2], [0.1, 0.9])
    np.testing.assert_allclose(choice_probs(scores, 2.0)[1], [0.2] * 5)


def out_of_memory_above(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> list[int]:
    """Makes a forward pass of more tokens fail; the returned list takes the size of every pass."""
    score, sizes = LanguageModel.choice_scores, []

    def limited(self: LanguageModel, pack: Pack, **how: bool) -> torch.Tensor:
        sizes.append(pack.num_tokens)
        if pack.num_tokens > num_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return score(self, pack, **how)

    monkeypatch.setattr(LanguageModel, "choice_scores", limited)
    return sizes


def test_out_of_memory_halves_the_budget_and_goes_on(
    model: LanguageModel, questions: list[EncodedQuestion], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = score_questions(model, questions, pack_tokens=10_000)
    total = num_tree_tokens(questions)
    sizes = out_of_memory_above(monkeypatch, total // 3)
    scored: list[str] = []
    found = score_questions(model, questions, pack_tokens=10_000, on_scored=scored.extend)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert sorted(scored) == sorted(question.id for question in questions)  # each once
    assert sizes[0] == total
    assert sum(size > total // 3 for size in sizes) <= 3  # what did not fit once is not tried again and again


def test_a_question_that_alone_does_not_fit_is_named(
    model: LanguageModel, questions: list[EncodedQuestion], monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = max(questions, key=lambda question: num_tree_tokens([question]))
    out_of_memory_above(monkeypatch, num_tree_tokens([longest]) - 1)
    with pytest.raises(
        InputError,
        match=rf"question '{longest.id}': out of memory with this question alone \(\d+ tokens\); lower --max-tokens",
    ):
        score_questions(model, questions, pack_tokens=10_000)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_names_its_question(
    model: LanguageModel, questions: list[EncodedQuestion], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    score = LanguageModel.choice_scores

    def broken(self: LanguageModel, pack: Pack) -> torch.Tensor:
        scores = score(self, pack)
        scores[pack.rows.tolist().index(7), 1] = value
        return scores

    monkeypatch.setattr(LanguageModel, "choice_scores", broken)
    with pytest.raises(InputError, match=rf"question '{questions[7].id}': the model's score is not finite"):
        score_questions(model, questions, pack_tokens=10_000)


def test_what_is_done_is_not_scored_again_and_the_rest_has_the_same_bits(
    model: LanguageModel, questions: list[EncodedQuestion], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, list[float]]] = []
    whole = score_questions(model, questions, pack_tokens=300, on_scored=calls.append)
    assert len(calls) > 3
    again: list[dict[str, list[float]]] = []
    resumed = score_questions(model, questions, pack_tokens=300, done={**calls[0], **calls[1]}, on_scored=again.append)
    assert resumed.tobytes() == whole.tobytes()
    assert again == calls[2:]


def test_a_model_that_trains_is_put_into_evaluation(model: LanguageModel, questions: list[EncodedQuestion]) -> None:
    model.model.train()
    score_questions(model, questions[:1], pack_tokens=300)
    assert not model.model.training
