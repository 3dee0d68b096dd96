"""PriDe and the report of orders: a planted liking for a digit is found, divided out, and told."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from tiny import encode_orders, make_questions

from ksat.encoding import EncodedQuestion
from ksat.orders import ALL_ORDERS, ONE_ORDER
from ksat.position_bias import debias, estimate_priors, log_probs, probed_rows, report_orders
from ksat.predictions import FloatArray
from ksat.questions import Question
from ksat.scoring import average_orders, choice_probs

LIKED = np.array([1.5, 0.0, -0.5, 0.0, -1.0])  # log-odds of the digits themselves


def many(num_questions: int) -> list[Question]:
    return make_questions(num_questions, share_passages=False)


def asked(questions: Sequence[Question], probed: set[int]) -> list[EncodedQuestion]:
    """Orders as inference.py asks them; of the tokens nothing is read here."""
    encoded = []
    for row, question in enumerate(questions):
        shown = (ALL_ORDERS if row in probed else ONE_ORDER).of(question)
        for order, each in enumerate(shown):
            branches = tuple((number,) for number in range(question.num_choices))
            encoded.append(
                EncodedQuestion(f"{row}", (0,), branches, (1.0,) * len(branches), None, 0, 0, order, len(shown), each)
            )
    return encoded


def score(encoded: Sequence[EncodedQuestion], beliefs: FloatArray, liking: FloatArray) -> FloatArray:
    """(M, 5) what a model with these beliefs on the choices (N, 5) and this liking for digits says."""
    scores = np.full((len(encoded), 5), np.nan)
    for row, order in enumerate(encoded):
        for place, choice in enumerate(order.shown):
            scores[row, choice] = beliefs[int(order.id), choice] + liking[place]
    return scores


@pytest.fixture
def beliefs() -> FloatArray:
    return np.random.default_rng(0).normal(0, 1.0, size=(1000, 5))


def test_a_planted_liking_is_divided_out(beliefs: FloatArray) -> None:
    """The corrected answers are as good as those of the same model without the liking, within noise."""
    questions = many(1000)
    truth = np.array(
        [
            np.random.default_rng(row).choice(
                q.num_choices, p=choice_probs(2 * beliefs[row : row + 1, : q.num_choices], 1.0)[0]
            )
            for row, q in enumerate(questions)
        ]
    )
    probed = probed_rows(questions)
    assert len(probed) == 50
    encoded = asked(questions, probed)

    def accuracy(liking: FloatArray, corrected: bool) -> float:
        scores = score(encoded, beliefs, liking)
        if corrected:
            scores = debias(encoded, scores, estimate_priors(encoded, scores))
        kept = [row for row, order in enumerate(encoded) if order.order == 0 and int(order.id) not in probed]
        answers = np.nanargmax(scores[kept], axis=1)
        return float(np.mean(answers == truth[[int(encoded[row].id) for row in kept]]))

    unbiased, biased, mended = accuracy(0 * LIKED, False), accuracy(LIKED, False), accuracy(LIKED, True)
    noise = np.sqrt(unbiased * (1 - unbiased) / 950)
    assert biased < unbiased - 3 * noise
    assert mended == pytest.approx(unbiased, abs=noise)
    # Where there is no bias, the correction costs next to nothing.
    assert accuracy(0 * LIKED, True) == pytest.approx(unbiased, abs=noise)


def test_the_prior_of_a_pure_liking_is_exact(beliefs: FloatArray) -> None:
    questions = many(60)
    encoded = asked(questions, probed_rows(questions))
    priors = estimate_priors(encoded, score(encoded, 0 * beliefs, LIKED))
    for size in (4, 5):
        expected = np.exp(LIKED[:size])
        np.testing.assert_allclose(priors[size], expected / expected.sum(), rtol=1e-12)


def test_over_all_orders_a_liking_cancels(beliefs: FloatArray) -> None:
    questions = many(40)
    encoded = asked(questions, set(range(40)))
    plain, liked = (average_orders(encoded, score(encoded, beliefs, liking)) for liking in (0 * LIKED, LIKED))
    np.testing.assert_allclose(choice_probs(liked, 1.0), choice_probs(plain, 1.0), rtol=1e-9)


def test_a_size_without_a_prior_stays_as_it_is(beliefs: FloatArray) -> None:
    encoded = asked(many(4), set())
    scores = score(encoded, beliefs, LIKED)
    np.testing.assert_allclose(debias(encoded, scores, {}), log_probs(scores))


def test_probed_rows_do_not_depend_on_the_file_s_order() -> None:
    questions = many(300)
    chosen = {questions[i].id for i in probed_rows(questions)}
    turned = questions[::-1]
    assert {turned[i].id for i in probed_rows(turned)} == chosen
    assert len(chosen) == 40  # twenty of either size
    named = [replace(question, choices=("①", "②", "③", "④"), answer=1) for question in questions]
    assert probed_rows(named) == set()


def test_the_report_by_hand() -> None:
    questions = make_questions(2, share_passages=False)
    encoded = encode_orders(questions, 2)
    # Question 0 answers choice 1 in both orders, question 1 choice 1, then choice 2.
    scores = np.full((4, 5), np.nan)
    scores[0, :4] = scores[1, :4] = [3, 0, 0, 0]
    scores[2] = [3, 2.5, 0, 0, 0]
    scores[3] = [0, 3, 0, 0, 0]
    probs = choice_probs(average_orders(encoded, scores), 1.0)
    report = report_orders(encoded, scores, probs, np.array([1, 4]))
    assert (report.num_probed, report.changed) == (2, 0.5)
    assert report.before.tolist() == [1.0, 0, 0, 0, 0]
    assert report.after.tolist() == [0.5, 0.5, 0, 0, 0]
    assert report.gold is not None
    assert report.gold.tolist() == [0.5, 0, 0, 0.5, 0]
    text = report.format()
    assert "2 questions were asked in several orders; the answer depends on the order in 50.0% of them." in text
    assert "| 1     |           1.000 |          0.500 | 0.500 |" in text
