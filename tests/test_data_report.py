"""What the data report says of kinds and of answers that stand in one place too often; no base is needed for it."""

import random

from ksat.data_report import _kinds_text, _skew_text
from ksat.questions import Question


def rows_of(size: int, counts: list[int]) -> list[Question]:
    answers = [place for place, count in enumerate(counts, start=1) for _ in range(count)]
    return [
        Question(f"{size}-{i}", f"글 {i}", "q", tuple("가나다라마"[:size]), answer) for i, answer in enumerate(answers)
    ]


def test_a_position_that_is_right_too_often_is_named_with_its_share() -> None:
    skewed = [*rows_of(4, [25, 26, 24, 25]), *rows_of(5, [60, 10, 10, 10, 10])]
    assert _skew_text("train.csv", skewed) == (
        "**train.csv: answer 1 is right in 0.600 of the 100 rows of 5 choices**, more than chance. A model may learn the place and not "
        "the content: train with --choice-orders K, K the number of choices, so that every place is right as often.\n"
    )
    assert _skew_text("train.csv", rows_of(5, [4, 0, 0, 0, 0])) != ""  # 0.2 ** 4 in five tests: 0.008
    assert _skew_text("train.csv", rows_of(5, [3, 0, 0, 0, 0])) == ""  # 0.04
    assert _skew_text("test.csv", [Question("a", "글", "q", ("가", "나"), None)]) == ""


def test_answers_by_chance_are_seldom_warned_of() -> None:
    """The level is 0.01 for a file, whatever its numbers of choices."""
    rng = random.Random(0)
    warned = 0
    for _ in range(300):
        answers = [[rng.randrange(size) for _ in range(200)] for size in (4, 5)]
        rows = [
            row
            for size, own in zip((4, 5), answers, strict=True)
            for row in rows_of(size, [own.count(i) for i in range(size)])
        ]
        warned += _skew_text("train.csv", rows) != ""
    assert warned <= 8  # more than 8 of 300 at 0.01: p = 0.004


def test_the_report_says_where_the_number_of_choices_decides() -> None:
    row = Question("a", "글", "q", tuple("가나다라"), 1)
    assert _kinds_text("train.csv", [row]) == ""
    hinted = Question("b", "글", "q", tuple("가나다라"), 1, kind_hint="knowledge")
    assert _kinds_text("train.csv", [row, hinted]).startswith(
        "train.csv: where no column tells, four choices count as knowledge"
    )
