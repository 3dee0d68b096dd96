"""train.py --folds and --data-report, from the command line to the files; with a tiny base."""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from children_here import run_children_here
from tiny import base_folder, make_questions, write_questions

import inference
import train
from ksat import crossval
from ksat.data_report import find_suspects
from ksat.errors import InputError
from ksat.files import file_sha256, read_json
from ksat.folds import assign_folds, fold_rows
from ksat.metrics import compute_metrics
from ksat.near_duplicates import near_rows
from ksat.predictions import Predictions, read_probs, write_probs
from ksat.questions import read_questions

CPU = ["--device", "cpu", "--engine", "transformers"]
LORA = ["--rank", "4", "--lr", "0.01", "--epochs", "2", "--questions-per-step", "4"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    write_questions(tmp_path / "train.csv", make_questions(18))
    write_questions(tmp_path / "more.csv", make_questions(6, first=100))
    yield tmp_path


def command(*flags: str) -> list[str]:
    return ["--train", "train.csv", "--base", str(base_folder()), *LORA, *CPU, *flags]


def test_all_folds_give_every_row_a_probability_of_a_run_that_did_not_see_it(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_children_here(monkeypatch)
    train.main(command("--folds", "3", "--all", "--run", "cv"))
    out = capsys.readouterr().out
    assert "| most frequent position |" in out
    assert "| out of fold " in out
    assert "wrote submissions/cv-oof.probs.csv: 18 rows" in out
    questions = read_questions("train.csv")
    oof = read_probs("submissions/cv-oof.probs.csv")
    assert oof.ids == tuple(question.id for question in questions)
    folds = assign_folds(questions, 3)
    report = read_json(Path("submissions/cv-oof.probs.json"))
    assert (report["folds"], report["folds_sha256"]) == (3, folds.sha256)
    assert [member["run"] for member in report["members"]] == ["cv-fold0", "cv-fold1", "cv-fold2"]
    for fold in range(3):
        # The run's own adapter scores its held-out rows to the same probabilities: the last epoch's, not a chosen one's.
        run = Path(f"checkpoints/cv-fold{fold}")
        settings = read_json(run / "run.json")["settings"]
        assert (settings["fold"], settings["best_epoch"], settings["folds_sha256"]) == (fold, 2, folds.sha256)
        held_out = [questions[row] for row in fold_rows(folds, fold)[1]]
        write_questions(Path("held.csv"), held_out, labelled=False)
        inference.main(["--ckpt", str(run), "--test", "held.csv", "--out", "out/held", "--overwrite", *CPU])
        scored = read_probs("out/held.probs.csv")
        rows = [oof.ids.index(row_id) for row_id in scored.ids]
        np.testing.assert_allclose(scored.probs, oof.probs[rows], atol=1e-5)
        with (run / "folds.csv").open() as file:
            assert {row["id"]: int(row["fold"]) for row in csv.DictReader(file)} == dict(
                zip(folds.ids, folds.folds, strict=True)
            )

    # Once more: nothing is trained again. One that was cut off is.
    ran: list[str] = []
    monkeypatch.setattr(crossval, "run_script", lambda command, log: ran.append(" ".join(command)) or "stopped here")
    train.main(command("--folds", "3", "--all", "--run", "cv"))
    assert ran == []
    Path("checkpoints/cv-fold1/run.json").unlink()
    with pytest.raises(InputError, match="fold 1 of cv: stopped here; mend it and run the same command again"):
        train.main(command("--folds", "3", "--all", "--run", "cv"))
    assert len(ran) == 1
    assert ran[0].endswith("--run cv-fold1 --fold 1 --resume")
    with pytest.raises(InputError, match="was started with other settings or files"):
        train.main(command("--folds", "3", "--all", "--run", "cv", "--seed", "1"))


def make_fold(plan: crossval.CrossValidation, fold: int, content: str) -> None:
    """A finished fold of two rows, as far as --all looks at it."""
    folder = plan.folder(fold)
    (folder / "adapter").mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "settings.json"):
        (folder / name).write_text(json.dumps({"base": "b", "content": content}))


def read_fold(folder: Path) -> SimpleNamespace:
    """What --all looks at of make_fold's."""
    return SimpleNamespace(settings=read_json(folder / "run.json"))


def test_folds_of_two_kinds_are_not_joined(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another card chose another base in the middle: the first fold that differs is the last that is trained."""
    plan = crossval.CrossValidation("cv", 3, (), {"flags": [], "files": {}}, Path("checkpoints"))
    trained: list[int] = []

    def run_script(command: list[str], log: Path) -> str:
        trained.append(int(command[4][-1]))
        make_fold(plan, trained[-1], f"of fold {trained[-1]}")
        return ""

    monkeypatch.setattr(crossval, "run_script", run_script)
    monkeypatch.setattr(crossval, "read_run", read_fold)
    message = r"cv-fold1: its content is 'of fold 1', that of checkpoints/cv-fold0 'of fold 0'"
    for _ in range(2):  # also where it is finished already
        with pytest.raises(InputError, match=message):
            crossval.train_folds(plan)
    assert trained == [0, 1]


def test_what_is_not_there_is_not_replaced(here: Path) -> None:
    """Else a fold that a kill cut off in its place would be started anew."""
    plan = crossval.CrossValidation("cv", 2, (), {"flags": [], "files": {}}, Path("checkpoints"))
    make_fold(plan, 0, "old")
    assert crossval._start(plan, overwrite=True) == ["cv-fold0", "cv-oof.probs.csv"]
    assert crossval._start(plan, overwrite=False) == ["cv-fold0", "cv-oof.probs.csv"]
    plan.mark.write_text('{"key": {"flags": [], "files": {}}, "replaced": null}')
    with pytest.raises(InputError, match="'replaced' is no list; the file was edited"):
        crossval._start(plan, overwrite=False)


def test_another_prompt_or_base_is_another_cross_validation(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossval, "run_script", lambda *_: "stopped here")
    base = shutil.copytree(base_folder(), "base")
    Path("p.md").write_text("[user]\n{passage}\n{question}{question_plus}\n{choices}\n{labels}\n")
    flags = ["--train", "train.csv", "--base", str(base), "--folds", "2", "--all", "--run", "cv", "--prompt", "p.md"]
    with pytest.raises(InputError, match="stopped here; mend it and run the same command again, without --overwrite"):
        train.main(flags)
    for path in (Path("p.md"), Path(base, "config.json")):
        before = path.read_text()
        path.write_text(before + "\n")
        with pytest.raises(InputError, match="was started with other settings or files"):
            train.main(flags)
        path.write_text(before)
    with pytest.raises(InputError, match="was started with other settings or files"):  # its time is another
        train.main(flags)


def test_overwrite_keeps_every_fold_until_its_new_one_is_complete(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = crossval.CrossValidation("cv", 2, ("--lr", "1"), {"flags": ["--lr", "1"], "files": {}}, Path("checkpoints"))
    ran: list[tuple[str, str]] = []
    ends_at = ["cv-fold0"]

    def run_script(command: list[str], log: Path) -> str:
        ran.append((command[4], command[-1]))
        if command[4] in ends_at:
            return "stopped here"
        make_fold(plan, int(command[4][-1]), "new")
        return ""

    def contents() -> list[str]:
        return [read_json(plan.folder(fold) / "run.json")["content"] for fold in (0, 1)]

    monkeypatch.setattr(crossval, "run_script", run_script)
    monkeypatch.setattr(crossval, "read_run", read_fold)
    for fold in (0, 1):
        make_fold(plan, fold, "old")
    with pytest.raises(InputError, match="checkpoints/cv-fold0 exists and is not its fold"):
        crossval._start(plan, overwrite=False)
    notes = plan.folder(1) / "notes.md"
    notes.write_text("mine")
    with pytest.raises(InputError, match="cv-fold1: holds 'notes.md'"):
        crossval._start(plan, overwrite=True)
    assert not plan.mark.exists()
    notes.unlink()

    with pytest.raises(InputError, match="fold 0 of cv: stopped here"):
        crossval.train_folds(plan, crossval._start(plan, overwrite=True))
    assert contents() == ["old", "old"]
    ends_at[:] = ["cv-fold1"]
    with pytest.raises(InputError, match="fold 1 of cv: stopped here"):
        crossval.train_folds(plan, crossval._start(plan, overwrite=False))  # the same command, without --overwrite
    assert contents() == ["new", "old"]
    ends_at.clear()
    crossval.train_folds(plan, crossval._start(plan, overwrite=False))
    assert contents() == ["new", "new"]
    assert ran == [
        ("cv-fold0", "--overwrite"),
        ("cv-fold0", "--overwrite"),
        ("cv-fold1", "--overwrite"),
        ("cv-fold1", "--overwrite"),
    ]
    assert "fold 0: checkpoints/cv-fold0 is finished" in capsys.readouterr().out


def test_out_of_fold_files_of_something_else_are_kept(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both files or none; replaced unasked only by their own cross-validation."""
    plan = crossval.CrossValidation("cv", 2, (), {"flags": [], "files": {"train.csv": "0"}}, Path("checkpoints"))
    questions = read_questions("train.csv")
    probs = np.full((18, 5), np.nan)
    for row, question in zip(probs, questions, strict=True):
        row[: question.num_choices] = 1 / question.num_choices
    report = {"cross_validation_sha256": plan.sha256}
    joined = (Predictions(tuple(question.id for question in questions), probs), report)
    trained: list[int] = []
    monkeypatch.setattr(crossval, "train_folds", lambda *_: trained.append(1))
    monkeypatch.setattr(crossval, "join_folds", lambda *_: joined)
    plan.oof.parent.mkdir()
    plan.oof.write_text("mine")
    with pytest.raises(InputError, match="submissions/cv-oof.probs.csv exists already"):
        crossval.cross_validate(plan, Path("train.csv"), limit=None, overwrite=False)
    with pytest.raises(InputError, match="without cv-oof.probs.json it is no output of ours"):
        crossval.cross_validate(plan, Path("train.csv"), limit=None, overwrite=True)
    assert (trained, plan.oof.read_text()) == ([], "mine")
    plan.oof.unlink()
    crossval.cross_validate(plan, Path("train.csv"), limit=None, overwrite=True)
    assert read_probs(plan.oof).ids == joined[0].ids
    plan.oof.with_suffix(".json").write_text("cut")
    crossval.cross_validate(plan, Path("train.csv"), limit=None, overwrite=True)
    crossval.cross_validate(plan, Path("train.csv"), limit=None, overwrite=False)  # its own are written again
    assert read_json(plan.oof.with_suffix(".json")) == report
    other = replace(plan, key={"flags": ["--seed", "1"], "files": {}}, checkpoints=Path("others"))
    with pytest.raises(InputError, match=r"cv-oof.probs.csv and submissions/cv-oof.probs.json exist already"):
        crossval.cross_validate(other, Path("train.csv"), limit=None, overwrite=False)


def test_one_fold_and_rows_of_other_files_that_are_too_near(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = read_questions("train.csv")
    held_out = fold_rows(assign_folds(questions, 3), 1)[1]
    near = make_questions(1, first=100)[0]
    planted = [
        replace(near, id="near", passage=questions[held_out[0]].passage.replace(" ", "  ") + "!"),
        replace(
            near,
            id="apart",
            passage="물은 높은 곳에서 낮은 곳으로 흐르고, 불은 위로 타오른다. 바람은 어디로 가는지 아무도 모른다.",
        ),
    ]
    write_questions(Path("more.csv"), planted)
    flags = ["--train", "train.csv", "more.csv", "--base", str(base_folder()), *LORA, *CPU]
    train.main([*flags, "--folds", "3", "--fold", "1", "--run", "one"])
    out = capsys.readouterr().out
    assert "1 rows of other files have a passage too near to a held-out one and are left out" in out
    assert f"questions: {len(questions) - len(held_out) + 1} to train on, {len(held_out)} to validate on" in out
    assert set(read_probs("checkpoints/one/validation.probs.csv").ids) == {questions[row].id for row in held_out}


def test_rows_that_stand_in_another_file_are_left_out_of_training(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = read_questions("train.csv")
    there = [replace(questions[i], id=f"test-{i}", passage=questions[i].passage + "!", answer=None) for i in (4, 9)]
    write_questions(Path("test.csv"), there)
    passages = {questions[i].passage for i in (4, 9)}
    left = [q for q in questions if q.passage not in passages]
    train.main(command("--valid-fraction", "0", "--leave-out", "test.csv", "--run", "apart", "--epochs", "1"))
    out = capsys.readouterr().out
    assert f"--leave-out test.csv: {18 - len(left)} of 18 training rows stand there as well and are left out" in out
    assert f"questions: {len(left)} to train on, 0 to validate on" in out
    settings = read_json(Path("checkpoints/apart/run.json"))["settings"]
    assert settings["leave_out"] == "test.csv" and settings["leave_out_sha256"] == file_sha256(Path("test.csv"))
    with pytest.raises(InputError, match="--leave-out train.csv: all 18 training rows stand there as well"):
        train.main(command("--valid-fraction", "0", "--leave-out", "train.csv", "--run", "none"))
    with pytest.raises(InputError, match="missing.csv: no such file"):
        train.main(command("--leave-out", "missing.csv", "--run", "none"))
    assert not Path("checkpoints/none").exists()


def test_folds_stay_as_they_are_where_rows_are_left_out(here: Path) -> None:
    questions = read_questions("train.csv")
    settings = {"folds": 3, "fold": 1, "folds_sha256": None, "limit": None, "leave_out": None}
    tables = [(Path("train.csv"), questions)]
    rows = train._split(tables, [], settings)
    write_questions(Path("test.csv"), [rows.train[0], rows.valid[0]])
    left = train._split(tables, [], settings | {"leave_out": "test.csv"})
    assert (left.valid, left.folds, left.scale) == (rows.valid, rows.folds, rows.scale)
    passages = {rows.train[0].passage, rows.valid[0].passage}
    assert left.train == [row for row in rows.train if row.passage not in passages] != rows.train


def test_all_folds_fit_their_scale_on_the_same_rows_of_the_first_file(here: Path) -> None:
    """Each fitted its own on its own training rows, and a soup of folds was refused."""
    questions = read_questions("train.csv")
    other = [replace(question, id=f"x{i}", passage=f"{i} 다른 글이다") for i, question in enumerate(questions)]
    tables = [(Path("train.csv"), questions), (Path("other.csv"), other)]
    base = {"folds": 3, "folds_sha256": None, "limit": None, "leave_out": None}
    found = [train._split(tables, [], base | {"fold": fold}) for fold in range(3)]
    assert found[0].scale == found[1].scale == found[2].scale
    assert sorted(row.id for row in found[0].scale) == sorted(row.id for row in questions)
    assert all(rows.elsewhere == {} for rows in found)
    whole = {"folds": None, "valid_fraction": 0.0, "seed": 0, "limit": None, "leave_out": None}
    assert len(train._split(tables, [], whole).scale) == len(questions) + len(other)


def test_rows_of_every_file_are_held_out_and_those_near_to_them_are_not_trained_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = read_questions("train.csv")
    texts = [
        f"{i}번째 마을에는 " + " ".join(f"{chr(0xAC00 + 211 * i + 17 * k)}{k}" for k in range(60)) for i in range(40)
    ]
    other = [replace(questions[i % 18], id=f"x{i}", passage=text) for i, text in enumerate(texts)]
    other += [replace(questions[0], id="shared", passage=questions[0].passage + "!")]
    settings = {"folds": None, "valid_fraction": 0.2, "seed": 0, "limit": None, "leave_out": None}
    tables = [(Path("train.csv"), questions), (Path("other.csv"), other)]
    apart = train._split(tables, [], settings)
    trained = [next(row for row in apart.train if (row in questions) == is_first) for is_first in (True, False)]
    watched = [replace(row, id=f"w{i}", passage=f"{row.passage} 끝.") for i, row in enumerate(trained)]
    watched += [replace(questions[0], id="w2", passage="아무 데도 없는 글 " * 9)]
    rows = train._split(tables, [(Path("watched.csv"), watched)], settings)
    alone = train._split(tables[:1], [], settings)
    assert rows.valid == apart.valid == alone.valid
    assert rows.elsewhere.keys() == {"other.csv", "watched.csv"} and rows.elsewhere["watched.csv"] == watched
    assert 0 < len(rows.elsewhere["other.csv"]) <= len(rows.valid)
    held_out = [row for own in (rows.valid, *rows.elsewhere.values()) for row in own]
    assert not near_rows(rows.train, held_out)
    for seed in range(8):  # a passage of the first file is not held out of another one
        half = settings | {"valid_fraction": 0.5, "seed": seed}
        found = train._hold_out_of_others(questions, tables[1:], 99, half)["other.csv"]
        assert len(found) >= 15 and "shared" not in {row.id for row in found}
    gone = {row.id for row in [*questions, *other]} - {row.id for row in [*rows.train, *held_out]}
    assert gone == {row.id for row in [*questions, *other] if near_rows([row], held_out)} - {row.id for row in held_out}
    num_near = len(near_rows(apart.train, watched))
    assert num_near >= 2 and f"--valid watched.csv: {num_near} of " in capsys.readouterr().out
    assert train._split(tables, [], settings | {"valid_fraction": 0.0}).elsewhere == {}
    with pytest.raises(InputError, match="have an id that another file of --train or --valid has.* 'watched-x0'"):
        train._split(tables, [(Path("watched.csv"), other[:1])], settings)


def test_a_run_shows_what_training_does_to_another_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = [replace(question, id=f"w{question.id}") for question in make_questions(5, first=900)]
    write_questions(Path("watched.csv"), watched)
    train.main(command("--valid", "watched.csv", "--run", "seen", "--epochs", "2"))
    told = capsys.readouterr()
    assert ", 5 of watched.csv to look at, scored by" in told.out
    assert "watched.csv, which chooses nothing" in told.out and "| epoch 2, watched.csv" in told.out
    folder = Path("checkpoints/seen")
    settings, metrics = read_json(folder / "run.json")["settings"], read_json(folder / "metrics.json")
    assert settings["valid"] == ["watched.csv"] and settings["valid_sha256"] == [file_sha256(Path("watched.csv"))]
    after = metrics["epochs"][settings["best_epoch"] - 1]["elsewhere"]["watched.csv"]
    inference.main(["--ckpt", str(folder), "--test", "watched.csv", "--out", "again", "--device", "cpu"])
    predictions = read_probs(Path("submissions/again.probs.csv"))
    own = compute_metrics(predictions.probs, np.array([row.answer for row in watched]), [row.id for row in watched])
    assert after["log_loss"]["value"] == pytest.approx(own.log_loss.value, abs=1e-4)  # type: ignore[union-attr]
    uniform = metrics["elsewhere"]["watched.csv"]["random"]["log_loss"]["value"]
    assert ("warning: watched.csv: log loss" in told.err) == (after["log_loss"]["value"] >= uniform)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--fold", "0"], "--fold and --all need --folds"),
        (["--all", "--run", "x"], "--fold and --all need --folds"),
        (["--folds", "3"], "name one fold with --fold K, or train all"),
        (["--folds", "3", "--fold", "0", "--all", "--run", "x"], "name one fold with --fold K, or train all"),
        (["--folds", "3", "--fold", "3"], "--fold 3: expected 0 to 2 with --folds 3"),
        (["--folds", "1", "--fold", "0"], "--folds 1: expected at least 2"),
        (["--folds", "3", "--all"], "--all needs --run NAME"),
        (["--folds", "3", "--fold", "0", "--valid-fraction", "0.1"], "held-out rows choose no epoch"),
        (["--folds", "3", "--fold", "0", "--patience", "2"], "held-out rows choose no epoch"),
        (["--folds", "40", "--all", "--run", "x"], "--folds 40: 18 questions on "),
        (["--leave-out", "x.csv", "--data-report"], "--leave-out is for training"),
        (["--valid", "x.csv", "--data-report"], "--valid is for training"),
        (["--oof", "x.csv"], "--against and --oof are for --data-report"),
    ],
)
def test_flags_that_do_not_go_together(here: Path, flags: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        train.main(command(*flags))
    assert not Path("checkpoints").exists()


def test_suspects_are_the_same_for_a_model_that_is_too_sure() -> None:
    """900 rows: 23 suspects, and 122 once every probability is sharpened by 4."""
    generator = np.random.default_rng(0)
    questions = {f"r{i}": replace(make_questions(1)[0], id=f"r{i}", answer=1) for i in range(900)}
    size = make_questions(1)[0].num_choices
    rows = np.full((900, 5), np.nan)
    rows[:, :size] = generator.dirichlet(np.full(size, 1.5), size=900)
    first = generator.random(900) < 0.6
    best = rows[:, :size].argmax(axis=1)
    rows[first, 0], rows[np.flatnonzero(first), best[first]] = (
        rows[np.flatnonzero(first), best[first]],
        rows[first, 0].copy(),
    )
    sharp = rows**4 / np.nansum(rows**4, axis=1, keepdims=True)
    found = [find_suspects(Predictions(tuple(questions), each), questions) for each in (rows, sharp)]
    assert [suspect.id for suspect in found[0][0]] == [suspect.id for suspect in found[1][0]]
    assert found[1][1] == pytest.approx(4 * found[0][1], rel=0.01)
    assert 0 < len(found[0][0]) < (sharp[:, 0] < 0.05).sum()


def test_the_report_has_all_duplicates_in_a_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same question apart from the same passage, and how many rows of the test they touch."""
    sentences = [
        "달은 지구를 돌며 밤을 밝힌다.",
        "바다는 달을 따라 하루에 두 번 높아진다.",
        "사람들은 그 때를 책에 적어 두었다.",
    ]
    passage = " ".join(sentences)
    one = make_questions(1)[0]
    rows = [replace(one, id="a", passage=passage), replace(one, id="b", passage=passage, question="지은이는?")]
    tests = [
        replace(one, id="t1", passage=passage + " 끝.", choices=one.choices[::-1], answer=None),
        replace(one, id="t2", passage=passage + " 끝.", question="제목은?", answer=None),
        replace(one, id="t3", passage=" ".join(reversed(sentences)), question="때는?", answer=None),
    ]
    copies = [replace(one, id=f"c{i}", passage=f"{'가나다라마바사아자차카'[i]}{i} " * 30) for i in range(11)]
    write_questions(Path("train.csv"), [*rows, *copies])
    write_questions(Path("test.csv"), [*tests, *[replace(row, id=f"t{row.id}", question="?") for row in copies]])
    base = ["--train", "train.csv", "--base", str(base_folder()), "--data-report", "--max-tokens", "400"]
    train.main([*base, "--against", "test.csv"])
    out = capsys.readouterr().out
    with Path("reports/train-duplicates.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row["file_a"] != row["file_b"]]
    passages = {(row["id_a"], row["id_b"]) for row in found if row["same"] == "passage"}
    assert passages == {("a", "t1"), ("a", "t3"), *((f"c{i}", f"tc{i}") for i in range(11))}
    assert [(row["id_a"], row["id_b"]) for row in found if row["same"] == "question"] == [("a", "t1")]
    (line,) = [line for line in out.splitlines() if line.startswith("| train.csv and test.csv")]
    assert [cell.strip() for cell in line.split("|")[2:5]] == ["13", "14", "1"]
    assert "wrote reports/train.md and reports/train-duplicates.csv" in out


def test_the_data_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions = read_questions("train.csv")
    wrong = questions[3].id
    rows = []
    for question in questions:
        row = np.full(5, np.nan)
        row[: question.num_choices] = 0.01
        row[question.answer_index] = 0 if question.id == wrong else 1
        row[: question.num_choices] /= row[: question.num_choices].sum()
        rows.append(row)
    write_probs(Path("oof.probs.csv"), Predictions(tuple(q.id for q in questions), np.array(rows)))
    report = ["--train", "train.csv", "more.csv", "--base", str(base_folder()), "--data-report", "--max-tokens", "200"]
    train.main([*report, "--against", "more.csv", "--oof", "oof.probs.csv"])
    out = capsys.readouterr().out
    assert "| questions                        |        18 |        6 |        6 |" in out
    assert "1 of 18 given answers have an out-of-fold probability under 0.05 (at temperature " in out
    assert Path("reports/train.md").read_text() in out
    with Path("reports/train-duplicates.csv").open() as file:
        assert list(csv.DictReader(file)) == []
    with Path("reports/train-suspicious.csv").open() as file:
        (suspect,) = csv.DictReader(file)
    assert (suspect["id"], suspect["answer"]) == (wrong, str(questions[3].answer))
    temperature = float(out.split("(at temperature ")[1].split(",")[0])
    size = questions[3].num_choices
    assert float(suspect["prob"]) == pytest.approx(
        1e-15 ** (1 / temperature) / (size - 1) / (1 / (size - 1)) ** (1 / temperature), rel=0.2
    )
    # A list that a reader has worked on is neither removed nor left beside a report of other data, nor read and removed.
    Path("more.csv").replace("reports/train-suspicious.csv")
    before = {path.name: path.read_bytes() for path in Path("reports").iterdir()}
    for against in ([], ["--against", "reports/train-suspicious.csv"]):
        with pytest.raises(
            InputError, match=r"train-suspicious.csv: is of a report with --oof, .*; give --oof, or move the"
        ):
            train.main(["--train", "train.csv", *report[3:], "--overwrite", *against])
    with pytest.raises(InputError, match="reports/train-suspicious.csv is the input"):
        train.main(["--train", "train.csv", *report[3:], "--overwrite", *against, "--oof", "oof.probs.csv"])
    assert {path.name: path.read_bytes() for path in Path("reports").iterdir()} == before
    Path("reports/train-suspicious.csv").replace("more.csv")
    train.main([*report, "--overwrite"])
    assert sorted(os.listdir("reports")) == ["train-duplicates.csv", "train.md"]
    Path("reports/train.md").write_text("[user]\n{passage}{question}{question_plus}{choices}{labels}")
    with pytest.raises(InputError, match="reports/train.md is the input reports/train.md itself"):
        train.main([*report, "--overwrite", "--prompt", "reports/train.md"])
    with pytest.raises(InputError, match="oof.probs.csv: 18 of the rows are no labelled rows of more.csv"):
        train.main(["--train", "more.csv", "--base", str(base_folder()), "--data-report", "--oof", "oof.probs.csv"])
