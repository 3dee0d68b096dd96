"""train.py on the way to trouble: runs that are replaced, damaged saves, a full disk, two processes on one run."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pipeline import CPU, ENVIRONMENT, LORA, RUN_FILES, KilledError, assert_refused, kill
from tiny import base_folder, make_questions, write_questions

import train
from ksat import training
from ksat.errors import EXIT_BAD_INPUT, exit_code
from ksat.files import lock, read_json
from ksat.run_folders import claim_run

ROOT = Path(__file__).parent.parent
SHORT = ("--epochs", "1", "--limit", "4")
FOLD = (
    "--base",
    str(base_folder()),
    *CPU,
    "--rank",
    "8",
    "--lr",
    "0.01",
    "--questions-per-step",
    "4",
    "--epochs",
    "2",
    "--folds",
    "4",
    "--fold",
    "0",
)


def run_train(run: str, *flags: str, base: Path | None = None) -> None:
    train.main(["--base", str(base or base_folder()), *LORA, *CPU, "--run", run, *flags])


def bits(run: str) -> tuple[bytes, bytes]:
    """All that a training decides: the adapter, and the loss of every step with their mean."""
    folder = Path("checkpoints", run)
    return (folder / "adapter/adapter_model.safetensors").read_bytes(), (folder / "log.jsonl").read_bytes()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nobody broke, and the same one killed in the second and in the third step of epoch 2 ("later"),
    saved after every step; and a fold, whole and killed in the second step of epoch 2 and when all is trained."""
    folder = tmp_path_factory.mktemp("lost")
    end = training.RunCallback.on_step_end

    def kill_at(step: int) -> Any:
        def end_or_kill(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KilledError
            end(self, args, state, control, **kwargs)

        return end_or_kill

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_questions(Path("data/train.csv"), make_questions(16))
        run_train("whole", "--epochs", "2")
        train.main([*FOLD, "--run", "fold"])
        patch.setattr(training, "SECONDS_BETWEEN_SAVES", -1.0)
        for run, step in (("killed", 5), ("later", 6)):
            patch.setattr(training.RunCallback, "on_step_end", kill_at(step))
            with pytest.raises(KilledError):
                run_train(run, "--epochs", "2")
        for run, step in (("fold-killed", 6), ("fold-trained", 0)):
            patch.setattr(training.RunCallback, "on_step_end", kill_at(step))
            patch.setattr(train, "_finish", kill)
            with pytest.raises(KilledError):
                train.main([*FOLD, "--run", run])
    return folder


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[list[str], Callable[[Path], None], str]] = {
    "optimizer": (["trainer/checkpoint-4/optimizer.pt"], garble, "checkpoint-4: optimizer.pt is damaged"),
    "scheduler, and the save before": (
        ["trainer/checkpoint-4/scheduler.pt", "trainer/checkpoint-3/trainer_state.json"], cut,
        "checkpoint-3: trainer_state.json is damaged",
    ),
    "marks": (["trainer/checkpoint-4/complete", "trainer/log.jsonl"], cut, "checkpoint-4: complete is damaged"),
    "progress": (["progress.json"], garble, "progress.json: .*training goes on from checkpoint-4"),
    "progress is gone": (["progress.json"], Path.unlink, "progress.json: no such file.*training goes on from checkpoint-4"),
    "progress, and all saves": (
        ["progress.json", "trainer/checkpoint-3/optimizer.pt", "trainer/checkpoint-4/progress.json"], cut,
        "progress.json: .*training starts again from its first step",
    ),
    "the best epoch": (["epoch-1/adapter_model.safetensors"], garble, "epoch-1: damaged; training goes on from checkpoint-3"),
    "the best epoch, and progress": (
        ["epoch-1/adapter_model.safetensors", "progress.json"], cut, "epoch-1: damaged; training goes on from checkpoint-3",
    ),
    "the best epoch's mark": (["epoch-1/complete"], Path.unlink, "epoch-1: damaged; training goes on from checkpoint-3"),
    "the best epoch, and all saves": (
        ["epoch-1/adapter_config.json", "trainer/checkpoint-3/rng_state.pth", "trainer/checkpoint-4/optimizer.pt"], cut,
        "epoch-1: damaged; training starts again from its first step",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_save_is_named_and_the_run_goes_on_to_the_same_bits(
    here: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    files, damage, message = DAMAGE[case]
    run = Path("checkpoints/damaged")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree("checkpoints/killed", run)
    assert {path.name for path in (run / "trainer").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    for file in files:
        damage(run / file)
    run_train(run.name, "--resume")
    assert re.search(message, capsys.readouterr().err)
    adapter, log = bits("damaged")
    assert adapter == bits("whole")[0]
    if case != "marks":  # where the log was cut, steps that are not trained again are missing
        assert log == bits("whole")[1]
    assert {path.name for path in run.iterdir()} == RUN_FILES


def test_without_the_best_epoch_and_a_save_before_its_end_training_goes_on_from_the_newest(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hours of training are worth more than one epoch that might have been the best; the first step of epoch 3 is one, too."""
    run = Path("checkpoints/later")
    assert {path.name for path in (run / "trainer").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}
    cut(run / "epoch-1/adapter_model.safetensors")
    for _ in range(2):  # killed again before the next save
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.RunCallback, "on_step_end", kill)
            with pytest.raises(KilledError):
                run_train("later", "--resume")
        told = capsys.readouterr().err
        assert "epoch-1: damaged; training goes on from checkpoint-5, and epoch 1 can't be chosen any more" in told
    run_train("later", "--resume")
    metrics, whole = (read_json(Path("checkpoints", name, "metrics.json")) for name in ("later", "whole"))
    assert metrics["best_epoch"] == whole["best_epoch"] == 2
    assert [entry.pop("lost", False) for entry in metrics["epochs"]] == [True, False]
    assert metrics["epochs"] == whole["epochs"]
    assert bits("later") == bits("whole")


@pytest.mark.parametrize(("killed", "epoch", "save"), [("fold-killed", 1, 5), ("fold-trained", 2, 6)])
def test_a_fold_that_lost_its_epoch_goes_on_from_the_newest_save(
    here: Path, capsys: pytest.CaptureFixture[str], killed: str, epoch: int, save: int
) -> None:
    """The last epoch is kept: one before it is not needed, and the last one's adapter stands in the save at its end."""
    run = shutil.copytree(Path("checkpoints", killed), Path("checkpoints", f"{killed}-damaged"))
    cut(run / f"epoch-{epoch}/adapter_model.safetensors")
    train.main([*FOLD, "--run", run.name, "--resume"])
    assert f"epoch-{epoch}: damaged; training goes on from checkpoint-{save}\n" in capsys.readouterr().err
    assert bits(run.name) == bits("fold")
    for name in ("validation.probs.csv", "metrics.json"):
        ours, whole = (Path("checkpoints", each, name).read_text() for each in (run.name, "fold"))
        assert re.sub('"peak_memory_gib.*', "", ours) == re.sub('"peak_memory_gib.*', "", whole)


def test_a_log_that_can_t_be_read_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = shutil.copytree("checkpoints/killed", Path("checkpoints/folder-for-log"))
    (run / "trainer/log.jsonl").unlink()
    (run / "trainer/log.jsonl").mkdir()
    flags = [*CPU, "--run", run.name, "--resume"]
    assert exit_code(lambda: train.main(flags)) == EXIT_BAD_INPUT
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: {run}/trainer/log.jsonl: can't be read (Is a directory); move it away, then --resume"


def test_damaged_settings_are_refused_with_what_to_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("checkpoints/unset")
    shutil.copytree("checkpoints/killed", run)
    settings = run / "settings.json"
    settings.write_text(settings.read_text().replace('"lr": 0.01', '"lr": 0.02'))
    flags = [*CPU, "--run", run.name, "--resume"]
    assert_refused(
        train,
        flags,
        "unset/settings.json: edited or damaged, its content does not fit .*start it anew with --overwrite",
        capsys,
    )


def nan_base(folder: Path) -> Path:
    """The tiny base with a weight that is not a number."""
    shutil.copytree(base_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_old_run_stays_until_the_new_one_is_complete(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_train("kept", *SHORT)
    old = bits("kept")
    broken = nan_base(tmp_path / "nan")
    flags = ("--overwrite", *SHORT, "--seed", "1")
    assert exit_code(lambda: run_train("kept", *flags, base=broken)) == EXIT_BAD_INPUT
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the model's score is not finite" in error
    assert error.endswith("use another base")  # float32 is what it computes in
    assert bits("kept") == old

    with monkeypatch.context() as patch:
        patch.setattr("ksat.training.RunCallback.on_epoch_end", kill)
        with pytest.raises(KilledError):
            run_train("kept", *flags)
    assert bits("kept") == old
    assert (Path("checkpoints/.kept.new") / "settings.json").exists()
    assert_refused(train, [*CPU, "--run", "kept"], "checkpoints/kept exists; --resume goes on", capsys)
    run_train("kept", "--resume")
    new = bits("kept")
    assert new != old
    assert {path.name for path in Path("checkpoints/kept").iterdir()} == RUN_FILES
    assert not list(Path("checkpoints").glob(".kept.[no]*"))

    with monkeypatch.context() as patch:
        patch.setattr("ksat.training.RunCallback.on_epoch_end", kill)
        with pytest.raises(KilledError):
            run_train("kept", "--overwrite", *SHORT, "--seed", "2")
    run_train("kept", *flags)  # starts anew, with other settings than those of the one in the making
    assert bits("kept") == new


def test_the_curves_of_tensorboard_stay_in_the_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of before an interruption too; an old run with curves can be replaced."""

    class SummaryWriter:
        """Of tensorboard, which is not among our packages: it names its file by the time."""

        def __init__(self, log_dir: str) -> None:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
            self.file = Path(log_dir, f"events.out.tfevents.{len(list(Path(log_dir).iterdir()))}")

        def add_scalar(self, name: str, value: float, step: int) -> None:
            with self.file.open("a") as file:
                file.write(f"{step} {name} {value}\n")

        def add_text(self, *_: object) -> None: ...

        def flush(self) -> None: ...

        close = flush

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", mock.Mock(SummaryWriter=SummaryWriter))
    curves = Path("checkpoints/curves/tensorboard")
    with monkeypatch.context() as patch:
        patch.setattr("ksat.training.RunCallback.on_epoch_end", kill)
        with pytest.raises(KilledError):
            run_train("curves", *SHORT, "--report-to", "tensorboard")
    assert [path.name for path in curves.iterdir()] == ["events.out.tfevents.0"]
    run_train("curves", "--resume")
    assert {path.name for path in Path("checkpoints/curves").iterdir()} == RUN_FILES | {"tensorboard"}
    assert len(list(curves.iterdir())) == 2
    assert "1 train/loss " in (curves / "events.out.tfevents.1").read_text()
    run_train("curves", *SHORT, "--overwrite")
    assert not curves.exists()


def test_a_run_with_somebodys_notes_is_not_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path("checkpoints/noted")
    shutil.copytree("checkpoints/whole", run)
    (run / "notes.md").write_text("mine")
    flags = ["--base", str(base_folder()), *CPU, "--run", "noted", "--overwrite"]
    assert_refused(train, flags, "checkpoints/noted: holds 'notes.md', which is not of a run", capsys)


def test_a_run_that_was_complete_when_it_was_killed_is_put_in_order(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed behind run.json: what only training needs goes with the next command, whatever that is."""
    for overwrite in (False, True):
        finish = train._finish

        def finish_then_kill(*args: Any, finish: Any = finish) -> None:
            finish(*args)
            raise KilledError

        with monkeypatch.context() as patch:
            patch.setattr(train, "_finish", finish_then_kill)
            with pytest.raises(KilledError):
                run_train("complete", *SHORT, *(["--overwrite"] if overwrite else []))
        flags = [*CPU, "--run", "complete", "--resume"]
        assert exit_code(lambda flags=flags: train.main(flags)) == EXIT_BAD_INPUT  # type: ignore[misc]
        assert "--resume: checkpoints/complete is finished" in capsys.readouterr().err
        assert {path.name for path in Path("checkpoints/complete").iterdir()} == RUN_FILES
        assert not list(Path("checkpoints").glob(".complete.[no]*"))


def test_two_trainings_never_write_one_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--base", str(base_folder()), *CPU, "--run", "killed"]
    with claim_run("killed"):
        for how in ("--resume", "--overwrite"):
            assert_refused(train, [*flags, how], "checkpoints/killed: another process is at work on this run", capsys)
    with lock(Path("checkpoints/cv.folds.json"), "cross-validation"):
        folds = [*flags[:-1], "cv", "--folds", "2", "--all"]
        assert_refused(train, folds, "another process is at work on this cross-validation", capsys)


@pytest.mark.parametrize("what", ["tokenizer", "optimizer"])
def test_a_full_disk_while_a_save_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """tokenizers raises a plain Exception of Rust's, torch a RuntimeError of its archive writer: both say what /dev/full says."""
    run, save = f"full-{what}", torch.save

    def save_tokenizer(self: Any, *args: Any, **kwargs: Any) -> None:
        self.backend_tokenizer.save("/dev/full")

    def save_optimizer(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        save(value, "/dev/full" if str(file).endswith("optimizer.pt") else file, *args, **kwargs)

    with monkeypatch.context() as patch:
        if what == "tokenizer":
            patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", save_tokenizer)
        else:
            patch.setattr(torch, "save", save_optimizer)
        assert exit_code(lambda: run_train(run, "--epochs", "2")) == EXIT_BAD_INPUT
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: checkpoints/{run}/trainer: can't be written (")
    assert errors[0].endswith("free space, then --resume")
    run_train(run, "--resume")
    assert bits(run) == bits("whole")


def test_a_fold_says_what_goes_on_with_all(here: Path) -> None:
    """Who started the folds repeats that command; --resume with --all is refused."""
    code = "import ksat.children; print(ksat.children.how_to_go_on())"
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    for child, expected in (({}, "--resume"), ({"KSAT_CHILD": "1"}, "run the same command again")):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | child, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
    script = Path("told.py")
    script.write_text("import os, sys; sys.exit(f'error: {os.environ[\"KSAT_CHILD\"]}')")
    from ksat.children import run_script

    assert run_script([str(script.resolve())], Path("told.log")) == "1"


def test_korean_on_a_console_that_knows_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's lines are UTF-8, whatever the console is."""
    from ksat.children import run_script

    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    script = Path("korean.py")
    script.write_text("import sys; print('⟦가⟧'); sys.exit('error: 나')", encoding="utf-8")
    assert run_script([str(script.resolve())], Path("korean.log")) == "나"
    assert "⟦가⟧" in Path("korean.log").read_text(encoding="utf-8")
