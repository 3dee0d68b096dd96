"""Standings by hand: halves that keep passages together, pairs, and a recommendation that says what is significant."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tiny import make_questions

from ksat.errors import InputError
from ksat.exploration import Candidate, Outcome
from ksat.picture import draw
from ksat.predictions import Predictions
from ksat.questions import Question, passage_key
from ksat.standings import (
    Judged,
    Row,
    baseline_rows,
    compare_pairs,
    judge,
    make_row,
    pairs_table,
    part_metrics,
    ranking,
    read_leaderboard,
    recommend,
    standings_records,
    standings_table,
)

QUESTIONS = [
    Question(f"q{i}", f"글 {i // 2}이다. " * 30, "윗글의 내용과 일치하는 것은?" if i % 4 < 2 else "이 시기의 정책은?", ("가", "나", "다", "라"), i % 4 + 1)
    for i in range(120)
]  # fmt: skip
GOLD = {question.id: question.answer_index + 1 for question in QUESTIONS}


def outcome(name: str, num_right: int, *, peak: float = 1.0) -> Outcome:
    """Answers the first `num_right` of the questions correctly, the others wrongly."""
    probs = np.full((len(QUESTIONS), 5), np.nan)
    probs[:, :4] = 0.1
    for i, question in enumerate(QUESTIONS):
        probs[i, (question.answer_index + (i >= num_right)) % 4] = 0.7
    report = {"questions_per_second": 2.5, "peak_memory_gib": peak}
    order = np.random.default_rng(0).permutation(len(QUESTIONS))  # joined by id, not by place
    return Outcome(Candidate(name), Predictions(tuple(QUESTIONS[i].id for i in order), probs[order]), report)


@pytest.fixture(scope="module")
def judged() -> Judged:
    return judge(QUESTIONS, GOLD)


@pytest.fixture(scope="module")
def rows(judged: Judged) -> list[Row]:
    outcomes = [
        outcome("low", 60),
        outcome("top", 90, peak=9.0),
        outcome("near", 88),
        Outcome(Candidate("gone"), reason="no access"),
    ]
    return [make_row(each, judged, {"top": (0.77, 0.74)}) for each in outcomes]


def test_halves_keep_passages_together_and_are_of_a_size(judged: Judged) -> None:
    half_a, half_b = set(judged.parts["A"]), set(judged.parts["B"])
    assert half_a | half_b == set(range(120))
    assert not half_a & half_b
    assert not {judged.groups[i] for i in half_a} & {judged.groups[i] for i in half_b}
    assert abs(len(half_a) - len(half_b)) <= 6
    assert judged.parts["A"] == judge(QUESTIONS, GOLD).parts["A"]
    assert judged.groups[0] == passage_key(QUESTIONS[1])


def test_kinds_are_parts(judged: Judged) -> None:
    assert list(judged.parts["reading"]) == [i for i in range(120) if i % 4 < 2]
    assert list(judged.parts["knowledge"]) == [i for i in range(120) if i % 4 >= 2]
    only = judge([question for i, question in enumerate(QUESTIONS) if i % 4 < 2], GOLD)
    assert "knowledge" not in only.parts


def test_only_labelled_rows_are_judged() -> None:
    some = judge(QUESTIONS, {row_id: answer for row_id, answer in GOLD.items() if row_id < "q5"})
    assert all(question.id < "q5" for question in some.questions)
    with pytest.raises(InputError, match="1 of 120 questions have an answer, on 1 passages"):
        judge(QUESTIONS, {"q0": 1})


def test_figures_by_hand(rows: list[Row], judged: Judged) -> None:
    low, top, _, gone = rows
    assert top.metrics["all"].accuracy.value == 0.75
    assert low.metrics["all"].accuracy.value == 0.5
    assert top.metrics["reading"].accuracy.value == sum(i < 90 for i in judged.parts["reading"]) / 60
    assert (top.public, top.private, top.peak_gib, top.questions_per_second) == (0.77, 0.74, 9.0, 2.5)
    assert (gone.metrics, gone.reason) == ({}, "no access")
    uniform, by_position = baseline_rows(judged, {"4": [5, 0, 9, 0]})  # every fourth answer is 3
    assert uniform.metrics["all"].accuracy.value == 0.25
    assert by_position.metrics["all"].accuracy.value == 0.25
    assert by_position.metrics.keys() == judged.parts.keys()
    assert [row.name for row in ranking(rows)] == ["top", "near", "low"]


def test_pairs_by_hand(rows: list[Row], judged: Judged) -> None:
    pairs = compare_pairs(rows, judged)
    assert [(pair.better, pair.worse) for pair in pairs] == [("top", "near"), ("top", "low"), ("near", "low")]
    first, second, third = pairs
    assert (first.test.only_a, first.test.only_b, first.test.p_value) == (2, 0, 0.5)
    assert (second.test.only_a, second.test.p_value) == (30, pytest.approx(2 / 2**30))
    assert second.corrected == pytest.approx(6 / 2**30)  # the smallest of three
    assert third.corrected == pytest.approx(2 * 2 / 2**28)
    assert first.corrected == 0.5
    assert second.difference[0] == pytest.approx(0.25)
    assert second.difference[1] < 0.25 < second.difference[2]
    assert "30 / 0" in pairs_table(pairs)


def test_the_recommendation_says_what_is_significant(rows: list[Row], judged: Judged) -> None:
    baselines = baseline_rows(judged)
    text = recommend(rows, compare_pairs(rows, judged), baselines)
    assert text.startswith("top answers best, 0.750 [")
    assert "significantly better than low (McNemar" in text
    assert "not distinguishable from near" in text
    assert "of those near takes less memory (1.0 against 9.0 GiB)" in text
    assert text.count(".") == text.count("0.") + text.count("1.0") + text.count("9.0 ") + 1  # one sentence
    assert "may reach as well" not in text
    alone = recommend(rows[:1], [], baselines)
    assert alone.endswith("nothing to compare it with.")
    assert recommend(rows[3:], [], baselines).startswith("No base could be scored")
    guess = make_row(outcome("poor", 32), judged, {})
    assert "which the uniform guess (0.250) may reach as well" in recommend([guess], [], baselines)


def test_the_better_of_both_guesses_is_what_a_base_must_beat() -> None:
    """Half of the answers are 2: 0.42 is far above a uniform guess, and no more than always the same answer."""
    skewed = [replace(question, answer=2 if i % 4 < 2 else i % 4 + 1) for i, question in enumerate(QUESTIONS)]
    found = judge(skewed, {question.id: question.answer_index + 1 for question in skewed})
    uniform, by_position = baseline_rows(found)
    assert by_position.name == "most frequent position"
    assert by_position.metrics["all"].accuracy.value == 0.5
    assert by_position.metrics["knowledge"].accuracy.value == 0.0  # whose answers are 3 and 4
    probs = np.full((120, 5), np.nan)
    probs[:, :4] = 0.1
    for i, answer in enumerate(found.answers):
        probs[i, (answer - 1 + (i % 12 >= 5)) % 4] = 0.7  # right in 5 of 12
    row = Row("poor", "", part_metrics(probs, found), None, None, None, None, probs)
    accuracy = row.metrics["all"].accuracy
    assert accuracy.low is not None and 0.25 < accuracy.low < 0.5
    for baselines in ([uniform, by_position], [by_position, uniform]):
        assert "which the most frequent position (0.500) may reach as well" in recommend([row], [], baselines)
    assert "may reach" not in recommend([row], [], [uniform])
    few = judge(skewed[:8], {question.id: question.answer_index + 1 for question in skewed})
    assert [row.name for row in baseline_rows(few)] == ["uniform guess"]  # four passages for five folds


def test_tables_hold_every_row(rows: list[Row], judged: Judged) -> None:
    uniform = baseline_rows(judged)[0]
    text = standings_table(rows, [uniform])
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")]
    assert names == ["base", "-" * 13, "uniform guess", "top", "near", "low"]
    assert text.endswith("gone: not scored (no access)")
    by_name = {record["base"]: record for record in standings_records([*rows, uniform])}
    assert by_name["top"]["accuracy_all"] == 0.75
    assert by_name["top"]["accuracy_all_low"] < 0.75 < by_name["top"]["accuracy_all_high"]
    assert by_name["gone"]["accuracy_all"] is None
    assert by_name["uniform guess"]["accuracy_all_low"] is None


def test_leaderboard_scores_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "board.csv"
    path.write_text("base,public,private\na,0.7765,0.7448\nb,,1\n")
    assert read_leaderboard(path) == {"a": (0.7765, 0.7448), "b": (None, 1.0)}
    path.write_text("base,public,private\na,77.65,\n")
    with pytest.raises(InputError, match=r"row of base 'a' has public '77.65'; expected a share from 0 to 1"):
        read_leaderboard(path)
    path.write_text("base,public,private\na,0.7,\na,0.6,\n")
    with pytest.raises(InputError, match="base 'a' stands there twice"):
        read_leaderboard(path)
    path.write_text("base,public\na,0.5\n")
    with pytest.raises(InputError, match="no column 'private'"):
        read_leaderboard(path)


def test_labels_of_the_picture_do_not_overlap(judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve bases of about the same memory and accuracy, the worst case."""
    import adjustText

    kept: list[Any] = []
    adjust = adjustText.adjust_text
    monkeypatch.setattr("adjustText.adjust_text", lambda texts, **how: kept.extend(texts) or adjust(texts, **how))
    close = [
        make_row(outcome(f"somebody/base-{n}-of-a-long-name", 80 + n, peak=7 + n % 3), judged, {}) for n in range(12)
    ]
    boxes = []

    savefig = Figure.savefig

    def save(figure: Figure, *where: Any, **how: Any) -> None:
        boxes.extend(text.get_window_extent() for text in kept)
        savefig(figure, *where, **how)

    monkeypatch.setattr(Figure, "savefig", save)
    draw(tmp_path / "x.png", close, uniform=0.25, limit_gib=31.7, memory="V100 32 GB", title="120 questions")
    assert len(boxes) == 12
    overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert overlaps == []
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (1350, 825)


def test_questions_of_the_other_tests_have_parts() -> None:
    questions = make_questions(8)
    parts = judge(questions, {question.id: question.answer_index + 1 for question in questions}).parts
    assert len(parts["A"]) + len(parts["B"]) == len(parts["all"]) == 8
