"""progress.json, the memory of an interrupted training: what is none of it is not used."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tiny import make_questions

from ksat.files import read_json
from ksat.metrics import fit_scale
from ksat.run_folders import seal
from ksat.sealed import write_sealed
from ksat.validation import HeldOut, Validation, low_end

METRICS: dict[str, Any] = {"log_loss": {"value": 1.2, "low": 1.1, "high": None}, "num_groups": 9}
PROGRESS: dict[str, Any] = {
    "scale": 1.0, "fitted_scale": None, "control": METRICS, "control_scale_1": METRICS, "random": METRICS, "most_frequent_position": METRICS, "best_epoch": 2,
    "elsewhere": {}, "epochs": [{"epoch": 1, **METRICS, "elsewhere": {}}, {"epoch": 2, **METRICS, "elsewhere": {}}],
}  # fmt: skip


def recall(folder: Path, fields: dict[str, Any], *, with_rows: bool = True) -> dict[str, Any]:
    """What a training that goes on knows after this progress.json, and an epoch 2 that is whole."""
    (folder / "epoch-2").mkdir(exist_ok=True)
    seal(folder / "epoch-2")
    write_sealed(folder / "progress.json", fields)
    questions = make_questions(2) if with_rows else []
    known: dict[str, Any] = {"folder": folder, "score_by": "label", "pack_tokens": 300, "patience": 2, "positions": {}}
    return Validation(mock.Mock(), questions, [], **known).progress


def test_what_was_written_is_known_again(tmp_path: Path) -> None:
    assert recall(tmp_path, PROGRESS) == PROGRESS
    fitted = {**PROGRESS, "scale": 3.5, "fitted_scale": 3.5}
    assert recall(tmp_path, fitted) == fitted
    no_rows = {
        **PROGRESS,
        "control": None,
        "control_scale_1": None,
        "random": None,
        "most_frequent_position": None,
        "epochs": [{"epoch": 2, "elsewhere": {}}],
    }
    assert recall(tmp_path, no_rows, with_rows=False) == no_rows
    before_the_first_epoch = {**PROGRESS, "epochs": [], "best_epoch": 0}
    assert recall(tmp_path, before_the_first_epoch) == before_the_first_epoch


@pytest.mark.parametrize("score_by", ["text", "label"])
@pytest.mark.parametrize("chooses", [True, False])
@pytest.mark.parametrize("num_rows", [0, 4])
def test_rows_that_only_judge_do_not_fit_the_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, score_by: str, chooses: bool, num_rows: int
) -> None:
    rows = make_questions(num_rows)
    training = [mock.Mock(answer_index=i % 4) for i in range(40)]
    generator = np.random.default_rng(0)
    scores = {num_rows: 0.3 * generator.normal(size=(num_rows, 5)), 40: generator.normal(size=(40, 5))}
    scores[40][np.arange(40), [row.answer_index for row in training]] += 3
    monkeypatch.setattr("ksat.validation.score_questions", lambda _, encoded, **__: scores[len(encoded)])
    known: dict[str, Any] = {
        "folder": tmp_path,
        "score_by": score_by,
        "pack_tokens": 300,
        "patience": 2,
        "positions": {},
    }
    validation = Validation(mock.Mock(), rows, rows, **known, chooses=chooses, scale_set=lambda: training)
    validation.control()
    of_training = fit_scale(scores[40], np.arange(40) % 4)
    of_rows = fit_scale(scores[4], np.array([row.answer_index for row in rows])) if rows else None
    expected = None if score_by == "label" else of_rows if chooses and rows else of_training
    assert validation.progress["fitted_scale"] == expected
    assert validation.scale == max(1.0, expected or 1.0)
    assert of_training > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"scale": 0.5}, {"scale": "1"}, {"scale": True}, {"scale": 1e9}, {"fitted_scale": 0}, {"control": None}, {"control": {"log_loss": 1}},
        {"control": {"log_loss": {"value": "1"}}}, {"epochs": None}, {"epochs": [{"epoch": 2, "elsewhere": {}}]}, {"epochs": [{"epoch": "2", **METRICS, "elsewhere": {}}]},
        {"epochs": [{**METRICS, "elsewhere": {}}]}, {"epochs": [{"epoch": 2, **METRICS}]}, {"epochs": [{"epoch": 2, **METRICS, "elsewhere": {"a": METRICS}}]},
        {"elsewhere": {"a": {"control": METRICS, "random": METRICS}}}, {"elsewhere": None}, {"best_epoch": 1}, {"best_epoch": -1}, {"best_epoch": 7}, {"best_epoch": "2"}, {"random": 1}, {"most_frequent_position": 1}, {"other": 1}, {"random": None},
        {"control": {**METRICS, "log_loss": {"value": 1.2, "low": "1", "high": None}}}, {"control": {**METRICS, "log_loss": {"value": 1.2, "low": 1.1}}},
        {"control": {"log_loss": METRICS["log_loss"]}}, {"control": {**METRICS, "num_groups": "9"}}, {"control": {**METRICS, "num_groups": 10**100}},
    ],
)  # fmt: skip
def test_fields_of_another_kind_are_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any]
) -> None:
    """Though the file has the digest that fits it: another sealed file may have been copied over it."""
    (tmp_path / "trainer").mkdir()
    assert recall(tmp_path, {**PROGRESS, **fields}) == {}
    told = capsys.readouterr().err
    assert told.endswith("; training starts again from its first step\n")
    assert len(told.splitlines()) == 1
    assert not (tmp_path / "trainer").exists()


def test_the_most_frequent_position_stands_beside_the_uniform_guess(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = [replace(question, answer=2) for question in make_questions(4)]
    known: dict[str, Any] = {"folder": tmp_path, "score_by": "label", "pack_tokens": 300, "patience": 2}
    validation = Validation(mock.Mock(), questions, [], positions={"4": [0, 9, 0, 0], "5": [0, 9, 0, 0, 0]}, **known)
    scores = np.array([[0.0] * q.num_choices + [np.nan] * (5 - q.num_choices) for q in questions])
    with mock.patch.object(Validation, "_scores", return_value=scores):
        validation.control()
    names = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert names[2:] == ["uniform guess", "most frequent position", "untuned base"]
    assert read_json(tmp_path / "progress.json")["most_frequent_position"]["accuracy"]["value"] == 1.0


def test_rows_of_other_files_are_told_apart_choose_nothing_and_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch may be the best on the first file and worse than guessing on another."""
    own, others = make_questions(6), [replace(question, id=f"x{question.id}") for question in make_questions(8)]
    now = 0

    def scores(_: object, encoded: list[Any], **__: object) -> Any:
        """Better from epoch to epoch on the first file, and surely wrong on the other."""
        table = np.array([[0.0] * q.num_choices + [np.nan] * (5 - q.num_choices) for q in encoded])
        slope = -2.0 if encoded[0].id.startswith("x") else 0.3
        for row, question in zip(table, encoded, strict=True):
            row[question.answer - 1] = 0.1 + slope * now
        return table

    monkeypatch.setattr("ksat.validation.score_questions", scores)
    known: dict[str, Any] = {
        "folder": tmp_path,
        "score_by": "label",
        "pack_tokens": 300,
        "patience": 5,
        "positions": {"4": [0, 0, 9, 0], "5": [0, 0, 9, 0, 0]},
    }
    model = mock.Mock()
    monkeypatch.setattr(Validation, "_save_adapter", lambda _, folder: folder.mkdir())
    part = HeldOut("other.csv", others, others)  # type: ignore[arg-type]  # what is encoded is only scored
    validation = Validation(model, own, own, **known, elsewhere=[part])  # type: ignore[arg-type]
    validation.control()
    table = capsys.readouterr().out.split("other.csv, which chooses nothing")[1]
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert names[2:] == ["uniform guess", "most frequent position", "untuned base"]
    by_position = validation.progress["elsewhere"]["other.csv"]["most_frequent_position"]
    assert by_position["accuracy"]["value"] == np.mean([question.answer == 3 for question in others])
    for now in (1, 2):
        validation.after_epoch(now)
        assert f"epoch {now}, other.csv" in capsys.readouterr().out
    assert validation.best_epoch == 2
    stored = validation.progress
    before = stored["elsewhere"]["other.csv"]
    after = [entry["elsewhere"]["other.csv"]["log_loss"]["value"] for entry in stored["epochs"]]
    uniform = np.mean([np.log(question.num_choices) for question in others])
    assert before["control"]["log_loss"]["value"] < before["random"]["log_loss"]["value"] == pytest.approx(uniform)
    assert after[1] > after[0] > uniform
    validation.warn()
    told = capsys.readouterr().err
    assert told.startswith(f"warning: other.csv: log loss {after[1]:.3f} [")
    assert (
        f"a uniform guess {uniform:.3f}; on such rows this run's probabilities are worth less than a guess's: " in told
    )
    assert told.endswith("train on some of them too, or blend it with the untuned base there\n")
    assert len(told.splitlines()) == 1
    again = Validation(model, own, own, **known, elsewhere=[part])  # type: ignore[arg-type]
    assert again.progress == stored
    assert Validation(model, own, own, **known).progress == {}  # without the other file it is another training


def told_of(
    folder: Path, capsys: pytest.CaptureFixture[str], *, own: dict[str, Any], other: dict[str, Any], untuned: float
) -> str:
    """What a finished training warns of: log losses of its own rows and of another file's, where a guess has 1.5."""
    control, random = ({"log_loss": {"value": value}} for value in (untuned, 1.5))
    before = {"control": control, "random": random}
    progress = {**PROGRESS, **before, "best_epoch": 1, "elsewhere": {"other.csv": before}}
    progress["epochs"] = [{"epoch": 1, **own, "elsewhere": {"other.csv": other}}]
    known: dict[str, Any] = {"folder": folder, "score_by": "label", "pack_tokens": 300, "patience": 2, "positions": {}}
    validation = Validation(mock.Mock(), make_questions(2), [], **known)
    validation.progress = progress
    validation.warn()
    return capsys.readouterr().err


def loss(value: float, low: float, num_groups: int = 200) -> dict[str, Any]:
    return {"log_loss": {"value": value, "low": low, "high": 2 * value - low}, "num_groups": num_groups}


def test_the_main_file_is_warned_of_as_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It ended at 2.834, a guess at 1.461, and nothing was said but that the untuned base is better, if it was."""
    told = told_of(tmp_path, capsys, own=loss(2.8, 2.5), other=loss(1.2, 1.0), untuned=2.9)
    assert told == (
        "warning: validation: log loss 2.800 [2.500, 3.100] after epoch 1, untuned 2.900, a uniform guess 1.500; on such rows this run's "
        "probabilities are worth less than a guess's: lower --lr, or train on more rows\n"
    )
    assert told_of(tmp_path, capsys, own=loss(1.2, 1.0), other=loss(1.2, 1.0), untuned=1.4) == ""


def test_a_blend_is_advised_only_where_the_untuned_base_is_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The untuned base had 1.810, the run 1.804, and the advice was to blend them."""
    for untuned, advised in ((1.81, False), (1.6, True)):
        told = told_of(tmp_path, capsys, own=loss(1.2, 1.0), other=loss(1.8, 1.7), untuned=untuned)
        assert told.startswith("warning: other.csv: log loss 1.800 [1.700, 1.900]")
        assert "train on some of them too" in told
        assert ("blend it with the untuned base there" in told) == advised


def test_what_chance_explains_is_not_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for other in (loss(1.6, 1.45), loss(1.6, 1.501, 5), loss(2.2, 2.0, 2), loss(9.0, 9.0, 1)):
        assert told_of(tmp_path, capsys, own=loss(1.2, 1.0), other=other, untuned=1.4) == ""
    assert told_of(tmp_path, capsys, own=loss(1.2, 1.0), other=loss(1.6, 1.501, 4000), untuned=1.4)


def test_few_rows_are_seldom_warned_of_by_chance() -> None:
    """A log loss that is a guess's on average: two rows above it were a warning in every fourth file, as a bootstrap has it."""
    generator = np.random.default_rng(0)
    for num_rows in (2, 3, 5, 20):
        above = 0
        for _ in range(300):
            rows = 1.5 + generator.normal(size=num_rows)
            low = np.quantile(generator.choice(rows, (400, num_rows)).mean(axis=1), 0.025)
            above += low_end(loss(rows.mean(), low, num_rows)) > 1.5
        assert above <= 25, num_rows  # the percentiles of two or three rows are narrower still
