"""compare.py, from the command line to the files."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import make_questions, write_labels, write_questions

import compare
from ksat.errors import InputError
from ksat.predictions import Predictions, read_probs, write_probs
from ksat.questions import Question, read_questions


def write_run(path: str, questions: list[Question], share_right: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    rows = np.full((len(questions), 5), np.nan)
    for row, question in enumerate(questions):
        own = generator.dirichlet(np.ones(question.num_choices))
        best = int(np.argmax(own))
        wanted = (
            question.answer_index
            if generator.random() < share_right
            else (question.answer_index + 1) % question.num_choices
        )
        own[[best, wanted]] = own[[wanted, best]]
        rows[row, : question.num_choices] = own
    order = generator.permutation(len(questions))
    write_probs(Path(path), Predictions(tuple(questions[i].id for i in order), rows[order]))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    questions = make_questions(120)
    write_questions(tmp_path / "gold.csv", questions)
    write_labels(tmp_path / "labels.csv", [q.id for q in questions], [q.answer_index + 1 for q in questions])
    write_labels(tmp_path / "beyond.csv", [q.id for q in questions], [5] * 120)  # half of them have four choices
    (tmp_path / "linked.probs.csv").symlink_to("good-oof.probs.csv")
    for name, share, seed in (("good", 0.9, 0), ("alike", 0.75, 1), ("poor", 0.4, 2)):
        write_run(f"{name}-oof.probs.csv", questions, share, seed)
    write_run("fewer.probs.csv", questions[:100], 0.5, 3)
    return tmp_path


def test_three_runs_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [f"{name}-oof.probs.csv" for name in ("poor", "good", "alike")]
    compare.main([*runs, "--answers", "gold.csv", "--pick-two", "--out", "three"])
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[:7]][2:] == [
        "uniform guess",
        "most frequent position",
        "good-oof",
        "alike-oof",
        "poor-oof",
    ]
    breakdown = out.split("| accuracy      ")[1]
    assert breakdown.index("| most frequent position ") < breakdown.index("| good-oof ")
    assert "4 choices (60)" in out
    assert "5 choices (60)" in out
    assert "significantly better than poor-oof (McNemar with Holm's correction, p < 0.05)" in out
    assert "ahead again on 60" in out
    assert "| good-oof - poor-oof  |" in out
    assert "of twenty such cells one is below 0.05 by chance" in out
    assert "select good-oof and alike-oof: " in out
    assert "By macro F1 instead" not in out  # the same two
    assert "the better of two equally good runs gets 0.67 on average" in out
    folder = here / "comparisons/three"
    assert (folder / "comparison.md").read_text().count("significantly better") == 1
    assert (folder / "comparison.png").stat().st_size > 10_000
    with (folder / "comparison.csv").open() as file:
        records = list(csv.DictReader(file))
    assert len(records) == 3
    assert all(0.5 <= float(record["ahead_again"]) <= 1 for record in records)
    assert float(records[-1]["p_holm"]) < 0.05


def test_a_run_that_was_trained_on_the_rows_is_not_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["good-oof.probs.csv", "alike-oof.probs.csv"]
    (here / "good-oof.probs.json").write_text(json.dumps({"base": "b", "out_of_fold": True}))
    compare.main([*runs, "--answers", "gold.csv"])
    told = capsys.readouterr().err
    assert told.startswith("warning: alike-oof.probs.csv has no report that says whether its rows were held out")
    assert len(told.splitlines()) == 1
    about = {"base": "b", "adapter_sha256": "2", "data": [{"file": "gold.csv", "sha256": "1"}], "test_sha256": "1"}
    (here / "alike-oof.probs.json").write_text(json.dumps(about | {"test": "gold.csv"}))
    for out in ([], ["--out", "trained"]):
        with pytest.raises(
            InputError, match="alike-oof.probs.csv was scored by a run that was trained on gold.csv, so that"
        ):
            compare.main([*runs, "--answers", "gold.csv", *out])
    assert not (here / "comparisons/trained/comparison.md").exists()


def test_labels_with_questions_say_the_same_and_nothing_is_written(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(here.iterdir())
    compare.main(["good-oof.probs.csv", "poor-oof.probs.csv", "--answers", "gold.csv"])
    first = capsys.readouterr().out
    compare.main(["good-oof.probs.csv", "poor-oof.probs.csv", "--answers", "labels.csv", "--questions", "gold.csv"])
    assert capsys.readouterr().out == first
    compare.main(["good-oof.probs.csv", "--answers", "gold.csv"])
    assert "nothing to compare it with" in capsys.readouterr().out
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ("good-oof.probs.csv none.csv --answers gold.csv", "none.csv: no such file"),
        (
            "good-oof.probs.csv fewer.probs.csv --answers gold.csv",
            "fewer.probs.csv: 20 of the rows of good-oof.probs.csv are missing",
        ),
        ("good-oof.probs.csv good-oof.probs.csv --answers gold.csv", "good-oof.probs.csv is named twice"),
        ("good-oof.probs.csv --answers labels.csv", "labels.csv: labels alone, .* give the questions with --questions"),
        (
            "good-oof.probs.csv --answers poor-oof.probs.csv --questions gold.csv",
            "poor-oof.probs.csv: a probability file",
        ),
        ("good-oof.probs.csv --answers gold.csv --pick-two", "--pick-two: two are picked among at least two files"),
        ("good-oof.probs.csv --answers gold.csv --out a/b", "--out 'a/b': expected a plain name"),
        ("good-oof.probs.csv --answers gold.csv --out=", "--out '': expected a name"),
        ("good-oof.probs.csv linked.probs.csv --answers gold.csv", "linked.probs.csv is named twice"),
        (
            "good-oof.probs.csv --answers beyond.csv --questions gold.csv",
            "beyond.csv: 60 of the rows have an answer beyond the predicted number of choices",
        ),
    ],
)
def test_bad_input(here: Path, command: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        compare.main(command.split())
    assert not (here / "comparisons").exists()


def test_one_run_leaves_its_figures_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare.main(["good-oof.probs.csv", "--answers", "gold.csv", "--out", "one"])
    assert [path.name for path in (here / "comparisons/one").iterdir()] == ["comparison.md"]
    assert capsys.readouterr().out.endswith("wrote comparison.md in comparisons/one\n")
    compare.main(["good-oof.probs.csv", "poor-oof.probs.csv", "--answers", "gold.csv", "--out", "one", "--overwrite"])
    assert len(list((here / "comparisons/one").iterdir())) == 3
    compare.main(["good-oof.probs.csv", "--answers", "gold.csv", "--out", "one", "--overwrite"])
    assert [path.name for path in (here / "comparisons/one").iterdir()] == ["comparison.md"]  # no pairs of other runs


def test_runs_that_are_the_same_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_probs(Path("good-oof.probs.csv"))
    write_probs(Path("copy.csv"), found)
    powered = found.probs**2
    write_probs(Path("sharp.csv"), Predictions(found.ids, powered / np.nansum(powered, axis=1, keepdims=True)))
    compare.main(["good-oof.probs.csv", "copy.csv", "sharp.csv", "poor-oof.probs.csv", "--answers", "gold.csv"])
    out = capsys.readouterr().out
    assert "good-oof and copy are identical: every probability is the same; they are one run." in out
    assert out.count(" are identical") == 1
    for name in ("good-oof", "copy"):
        assert f"{name} and sharp give the same answer to every question; only probabilities differ." in out
    assert out.count(" give the same answer") == 2


def test_macro_f1_may_pick_another_two(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 120 answers 90 are 1: to know those alone is as accurate as a mixed run and worth little to macro F1."""
    gold = [1] * 90 + [2] * 10 + [3] * 10 + [4] * 10
    choices = ("a", "b", "c", "d", "e")
    questions = [replace(q, answer=gold[i], choices=choices) for i, q in enumerate(make_questions(120))]
    write_questions(here / "gold.csv", questions)
    mixed = [i < 75 or (i >= 90 and i % 2 == 0) for i in range(120)]
    for name, right in (
        ("mixed", mixed),
        ("ones", [i < 90 for i in range(120)]),
        ("rare", [i >= 60 for i in range(120)]),
    ):
        chosen = [answer if known else 5 for answer, known in zip(gold, right, strict=True)]
        probs = np.where(np.eye(5)[np.array(chosen) - 1] > 0, 0.6, 0.1)
        write_probs(here / f"{name}.csv", Predictions(tuple(q.id for q in questions), probs))
    compare.main(["mixed.csv", "ones.csv", "rare.csv", "--answers", "gold.csv", "--pick-two"])
    out = capsys.readouterr().out
    by_accuracy, by_f1 = out.split("By macro F1 instead: ")
    assert "select mixed and ones: " in by_accuracy or "select ones and mixed: " in by_accuracy
    assert by_f1.startswith("select rare and mixed: ")


def test_a_run_that_always_answers_the_same_is_told_for_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seven of ten answers are 1: 0.700 stood as the best beside a uniform guess of 0.225, and nothing named it."""
    questions = [replace(q, answer=1 if i % 10 < 7 else i % 4 + 1) for i, q in enumerate(make_questions(120))]
    write_questions(here / "gold.csv", questions)
    probs = np.array([[0.6, *[0.1] * (q.num_choices - 1), *[np.nan] * (5 - q.num_choices)] for q in questions])
    write_probs(
        here / "ones.csv", Predictions(tuple(q.id for q in questions), probs / np.nansum(probs, axis=1)[:, None])
    )
    compare.main(["ones.csv", "--answers", "gold.csv", "--out", "ones"])
    out = capsys.readouterr().out
    share = f"{np.mean([q.answer_index == 0 for q in questions]):.3f}"
    assert f"which the most frequent position ({share}) may reach as well" in out
    assert out.count(f" {share} [") == 3  # both rows, and the sentence


def test_answers_to_other_questions(here: Path) -> None:
    write_questions(here / "other.csv", make_questions(120, first=500))
    with pytest.raises(InputError, match=r"good-oof.probs.csv: \d+ of 120 rows have no question or no answer"):
        compare.main(["good-oof.probs.csv", "--answers", "other.csv"])


def test_the_user_s_kinds_are_those_of_the_breakdown(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """compare.py told kinds by the wording, whatever file had told them in training."""
    ids = [question.id for question in read_questions("gold.csv")]
    Path("kinds.csv").write_text(
        "id,kind\n" + "".join(f"{row_id},{'knowledge' if i < 50 else 'reading'}\n" for i, row_id in enumerate(ids))
    )
    compare.main(["good-oof.probs.csv", "--answers", "gold.csv", "--kinds", "kinds.csv"])
    told = capsys.readouterr().out
    assert "knowledge (50)" in told and "reading (70)" in told
    compare.main(["good-oof.probs.csv", "--answers", "gold.csv"])
    assert "knowledge (50)" not in capsys.readouterr().out
