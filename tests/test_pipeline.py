"""train.py -> inference.py -> ensemble.py, in process, on tiny models: what they write, refuse and survive."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import reseal
from tiny import base_folder, make_questions, read_probs, read_rows, write_questions

import ensemble
import inference
import train
from ksat.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED, exit_code
from ksat.files import file_sha256, read_json
from ksat.identity import identify_base
from ksat.metrics import baseline_metrics, count_positions
from ksat.near_duplicates import passage_groups
from ksat.predictions import sizes_and_answers
from ksat.questions import passage_key, read_questions
from ksat.runs import write_settings

ROOT = Path(__file__).parent.parent
LORA = ("--rank", "8", "--lr", "0.01", "--questions-per-step", "4", "--valid-fraction", "0.25")
PATIENCE = ("--patience", "9")
RUN_FILES = {"adapter", "log.jsonl", "metrics.json", "run.json", "settings.json", "validation.probs.csv"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # as many threads as here: the same bits
CPU = ("--device", "cpu", "--engine", "transformers")


def run_train(*flags: str) -> None:
    patience = () if "--valid-fraction" in flags else PATIENCE  # without validation rows there is none
    train.main(["--base", str(base_folder()), *LORA, *patience, *CPU, *flags])


def run_inference(*flags: str) -> None:
    inference.main([*CPU, *flags])


@pytest.fixture(scope="module")
def competition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, where a full-precision and an nf4 run are trained, scored and blended; the tests stand in it."""
    folder = tmp_path_factory.mktemp("competition")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_questions(Path("data/train.csv"), make_questions(16))
        write_questions(Path("data/test.csv"), make_questions(12, first=40), labelled=False)
        write_questions(Path("data/answers.csv"), make_questions(12, first=40))
        run_train("--run", "full", "--epochs", "3")
        run_train("--run", "small", "--epochs", "1", "--quantization", "nf4", "--score-by", "text")
        for run in ("full", "small"):
            run_inference("--ckpt", f"checkpoints/{run}")
        ensemble.main(["submissions/full.probs.csv", "submissions/small.probs.csv", "--out", "blend"])
    return folder


@pytest.fixture
def here(competition: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The competition's folder as the current one."""
    monkeypatch.chdir(competition)
    return competition


def adapter(run: str) -> bytes:
    return Path("checkpoints", run, "adapter", "adapter_model.safetensors").read_bytes()


def assert_same_probs(left: Path, right: Path, tolerance: float) -> None:
    one, other = read_probs(left), read_probs(right)
    assert one.keys() == other.keys()
    for row_id, probs in one.items():
        np.testing.assert_allclose(probs, other[row_id], atol=tolerance, err_msg=row_id)


def test_a_run_leaves_exactly_these_files(here: Path) -> None:
    for run in ("full", "small"):
        assert {path.name for path in Path("checkpoints", run).iterdir()} == RUN_FILES
        folder = Path("checkpoints", run, "adapter")
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    names = [f"{name}{ending}" for name in ("full", "small") for ending in (".probs.csv", ".probs.json", ".csv")]
    blended = {f"blend{ending}" for ending in (".probs.csv", ".probs.json", ".csv")}
    assert {path.name for path in Path("submissions").iterdir()} == {*names, *blended}


@pytest.mark.parametrize(("run", "score_by", "quantization"), [("full", "label", "none"), ("small", "text", "nf4")])
def test_run_json_says_what_inference_needs(here: Path, run: str, score_by: str, quantization: str) -> None:
    stored = read_json(Path("checkpoints", run, "run.json"))
    assert (stored["base"], stored["score_by"], stored["quantization"]) == (str(base_folder()), score_by, quantization)
    assert stored["adapter_sha256"] == file_sha256(Path("checkpoints", run, "adapter/adapter_model.safetensors"))
    assert stored["adapter_config_sha256"] == file_sha256(Path("checkpoints", run, "adapter/adapter_config.json"))
    assert stored["base_identity"] == identify_base(str(base_folder()))
    assert [entry["sha256"] for entry in stored["data"]] == [file_sha256(Path("data/train.csv"))]
    assert stored["settings"]["rank"] == 8
    assert stored["settings"]["seed"] == 0
    assert {"torch", "transformers", "peft", "trl", "python"} <= stored["versions"].keys()
    fitted = read_json(Path("checkpoints", run, "metrics.json"))["fitted_scale"]
    assert (fitted is None) == (score_by == "label")  # fitted on the validation rows for text only
    assert stored["scale"] == max(1.0, fitted or 1.0)


def test_log_and_metrics_cover_every_step_and_epoch(here: Path) -> None:
    log = [json.loads(line) for line in Path("checkpoints/full/log.jsonl").read_text().splitlines()]
    metrics = read_json(Path("checkpoints/full/metrics.json"))
    num_train = 16 - metrics["control"]["num_questions"]
    num_steps = 3 * -(-num_train // 4)
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, num_steps + 1))
    mean = np.mean([entry["loss"] for entry in log if "loss" in entry])
    assert log[-1] == {"step": num_steps, "epoch": 3.0, "train_loss": pytest.approx(mean)}
    assert [entry["epoch"] for entry in metrics["epochs"]] == [1, 2, 3]


def test_validation_probs_are_those_of_rows_that_were_held_out(here: Path) -> None:
    questions = {question.id: question for question in read_questions("data/train.csv")}
    held_out = read_probs(Path("checkpoints/full/validation.probs.csv"))
    assert 2 <= len(held_out) <= 6
    assert {row_id: len(probs) for row_id, probs in held_out.items()} == {i: questions[i].num_choices for i in held_out}
    passages = {passage_key(questions[row_id]) for row_id in held_out}
    assert all(row_id in held_out for row_id, q in questions.items() if passage_key(q) in passages)


@pytest.mark.parametrize("run", ["full", "small"])
def test_mistake_6_the_fine_tune_is_in_the_prediction(here: Path, tmp_path: Path, run: str) -> None:
    """The run's file scores as the model in memory did when it was trained, and not as its base."""
    run_inference("--ckpt", f"checkpoints/{run}", "--test", "data/train.csv", "--out", str(tmp_path / "tuned"))
    quantization = ("--quantization", "nf4", "--score-by", "text") if run == "small" else ()
    run_inference(
        "--base", str(base_folder()), *quantization, "--test", "data/train.csv", "--out", str(tmp_path / "base")
    )
    tuned, untuned = read_probs(tmp_path / "tuned.probs.csv"), read_probs(tmp_path / "base.probs.csv")
    in_memory = read_probs(Path("checkpoints", run, "validation.probs.csv"))
    for row_id, probs in in_memory.items():
        np.testing.assert_allclose(tuned[row_id], probs, atol=1e-5)
    assert max(np.abs(np.subtract(tuned[row_id], untuned[row_id])).max() for row_id in untuned) > 0.05


def test_mistake_7_every_run_has_its_own_fresh_adapter(here: Path) -> None:
    """A second run in the same process neither goes on with the first one's adapter nor with its random state."""
    run_train("--run", "again", "--epochs", "3")
    assert adapter("again") == adapter("full")
    assert (
        Path("checkpoints/again/validation.probs.csv").read_bytes()
        == Path("checkpoints/full/validation.probs.csv").read_bytes()
    )


def test_mistake_12_the_best_epoch_is_chosen_by_validation_beside_the_untuned_control(here: Path) -> None:
    metrics = read_json(Path("checkpoints/full/metrics.json"))
    losses = [entry["log_loss"]["value"] for entry in metrics["epochs"]]
    assert metrics["best_epoch"] == 1 + int(np.argmin(losses))
    for entry in (metrics["control"], *metrics["epochs"]):
        for name in ("accuracy", "macro_f1", "log_loss"):
            assert entry[name]["low"] <= entry[name]["value"] <= entry[name]["high"]
    assert metrics["random"]["accuracy"]["value"] == pytest.approx(0.22, abs=0.04)
    assert metrics["most_frequent_position"]["accuracy"].keys() == metrics["random"]["accuracy"].keys()
    flags = {flag for action in train.build_parser()._actions for flag in action.option_strings}
    assert not flags & {"--test", "--answers"}  # training never sees the test set


def test_submission_covers_the_test_in_its_order(here: Path) -> None:
    expected = [question.id for question in read_questions("data/test.csv")]
    for name in ("full", "small", "blend"):
        assert [row["id"] for row in read_rows(Path(f"submissions/{name}.csv"))] == expected
        ensemble.main(["--check", f"submissions/{name}.csv", "--test", "data/test.csv"])
    sidecar = read_json(Path("submissions/full.probs.json"))
    assert (sidecar["num_questions"], sidecar["num_cut"]) == (12, 0)
    assert sidecar["adapter_sha256"] == read_json(Path("checkpoints/full/run.json"))["adapter_sha256"]


def test_a_shuffled_test_file_gives_the_same_probabilities(here: Path, tmp_path: Path) -> None:
    questions = read_questions("data/test.csv")
    shuffled = write_questions(tmp_path / "shuffled.csv", [questions[5 * i % 12] for i in range(12)], labelled=False)
    run_inference("--ckpt", "checkpoints/full", "--test", str(shuffled), "--out", str(tmp_path / "s"))
    assert [row["id"] for row in read_rows(tmp_path / "s.csv")] == [questions[5 * i % 12].id for i in range(12)]
    assert_same_probs(tmp_path / "s.probs.csv", Path("submissions/full.probs.csv"), 1e-5)


def test_one_question_a_pack_gives_the_same_probabilities(here: Path, tmp_path: Path) -> None:
    for run in ("full", "small"):
        run_inference("--ckpt", f"checkpoints/{run}", "--pack-tokens", "1", "--out", str(tmp_path / run))
        assert_same_probs(tmp_path / f"{run}.probs.csv", Path(f"submissions/{run}.probs.csv"), 1e-5)


def test_limit_runs_every_stage_on_few_questions(here: Path, tmp_path: Path) -> None:
    run_train("--run", "few", "--limit", "2", "--epochs", "1")
    assert len(read_rows(Path("checkpoints/few/validation.probs.csv"))) == 2
    log = [json.loads(line) for line in Path("checkpoints/few/log.jsonl").read_text().splitlines()]
    assert sum("loss" in entry for entry in log) == 1
    run_inference("--ckpt", "checkpoints/few", "--limit", "2", "--out", str(tmp_path / "few"))
    assert [row["id"] for row in read_rows(tmp_path / "few.csv")] == [q.id for q in read_questions("data/test.csv")[:2]]


@pytest.mark.parametrize("score_by", ["label", "text"])
def test_without_validation_the_last_epoch_is_kept(here: Path, tmp_path: Path, score_by: str) -> None:
    run = f"all-{score_by}"
    run_train("--run", run, "--valid-fraction", "0", "--epochs", "2", "--limit", "4", "--score-by", score_by)
    metrics = read_json(Path("checkpoints", run, "metrics.json"))
    assert (metrics["best_epoch"], metrics["control"]) == (2, None)
    assert (metrics["fitted_scale"] is None) == (score_by == "label")
    assert metrics["scale"] == max(1.0, metrics["fitted_scale"] or 1.0)
    assert not Path("checkpoints", run, "validation.probs.csv").exists()
    run_inference("--ckpt", f"checkpoints/{run}", "--limit", "2", "--out", str(tmp_path / "all"))


def test_validation_rows_come_from_the_first_file_and_their_passages_from_no_other(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = {row["id"] for row in read_rows(Path("checkpoints/full/validation.probs.csv"))}
    questions = read_questions("data/train.csv")
    leaking = [replace(q, id=f"copy-{q.id}", question="같은 지문") for q in questions if q.id in held_out]
    extra = write_questions(tmp_path / "extra.csv", [*leaking, *make_questions(4, first=100)])
    run_train("--train", "data/train.csv", str(extra), "--run", "two", "--epochs", "1")
    printed = capsys.readouterr().out
    assert f"{len(leaking)} rows of other files have a passage too near to a held-out one and are left out" in printed
    found = re.search(
        r"questions: (\d+) to train on, (\d+) to validate on(?:, (\d+) of \S+extra.csv to look at)?,", printed
    )
    assert found
    num_trained, num_valid, num_elsewhere = (int(number or 0) for number in found.groups())
    assert (num_trained + num_elsewhere, num_valid) == (16 - len(held_out) + 4, len(held_out))
    assert {row["id"] for row in read_rows(Path("checkpoints/two/validation.probs.csv"))} == held_out
    assert len(read_json(Path("checkpoints/two/run.json"))["data"]) == 2


def test_shots_stand_before_an_untuned_question_and_change_it(here: Path, tmp_path: Path) -> None:
    base = str(base_folder())
    run_inference("--base", base, "--shots", "2", "--out", str(tmp_path / "two"), "--limit", "3")
    run_inference("--base", base, "--out", str(tmp_path / "none"), "--limit", "3")
    assert read_json(tmp_path / "two.probs.json")["shots"] == 2
    assert read_probs(tmp_path / "two.probs.csv") != read_probs(tmp_path / "none.probs.csv")


def test_another_prompt_is_trained_on_and_inherited(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("[user]\n물음 {question}\n{choices}\n답 {labels}:\n", encoding="utf-8")
    run_train("--run", "worded", "--prompt", str(prompt), "--epochs", "1", "--limit", "4")
    assert "물음 " in capsys.readouterr().out
    run_inference("--ckpt", "checkpoints/worded", "--limit", "2", "--out", str(tmp_path / "worded"))
    template = read_json(tmp_path / "worded.probs.json")["template"]
    assert template == {"system": "", "user": "물음 {question}\n{choices}\n답 {labels}:"}


def test_metrics_are_printed_for_answers_and_for_labelled_input(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_inference("--ckpt", "checkpoints/full", "--answers", "data/answers.csv", "--out", str(tmp_path / "a"))
    run_inference("--ckpt", "checkpoints/full", "--test", "data/answers.csv", "--out", str(tmp_path / "b"))
    printed = capsys.readouterr().out
    assert printed.count("uniform guess") == printed.count("most frequent position") == 2
    assert printed.count("this model") == 2
    assert (tmp_path / "a.probs.csv").read_bytes() == (tmp_path / "b.probs.csv").read_bytes()
    rows = []
    for name, flags in (
        ("c", []),
        ("d", ["--shots", "1"]),
    ):  # of the answers themselves, out of fold; of the shots' file
        run_inference("--base", str(base_folder()), *flags, "--test", "data/answers.csv", "--out", str(tmp_path / name))
        rows += [line for line in capsys.readouterr().out.splitlines() if line.startswith("| most frequent position")]
    known = count_positions(*sizes_and_answers(read_questions("data/train.csv")))
    questions = read_questions("data/answers.csv")
    sizes, gold = sizes_and_answers(questions)
    for row, positions in zip(rows, (None, known), strict=True):
        expected = baseline_metrics(sizes, gold, passage_groups(questions), positions)[1][1]
        assert f" {expected.accuracy.value:.3f} [" in row and f" {expected.log_loss.value:.3f} [" in row  # type: ignore[union-attr]
    assert rows[0] != rows[1]


def test_the_training_example_is_shown_with_what_is_supervised(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_train("--run", "shown", "--limit", "1", "--epochs", "1", "--valid-fraction", "0")
    printed = capsys.readouterr().out
    question = read_questions("data/train.csv")[0]
    assert question.passage in printed
    assert f"<|im_start|>assistant\n⟦{question.answer}⟧" in printed
    assert "cost: " in printed


def test_fresh_names_never_meet(here: Path) -> None:
    flags = ("--limit", "1", "--epochs", "1", "--valid-fraction", "0")
    run_train(*flags)
    run_train(*flags)
    stem = f"{base_folder().name}-label-r8-lr0.01-e1-s0"
    assert (Path("checkpoints", stem) / "run.json").exists()
    assert (Path("checkpoints", f"{stem}-2") / "run.json").exists()


def test_overwrite_replaces_a_run_and_an_output(here: Path, tmp_path: Path) -> None:
    flags = ("--run", "replaced", "--limit", "2", "--epochs", "1")
    run_train(*flags)
    old = adapter("replaced")
    run_train(*flags, "--seed", "1", "--overwrite")
    assert adapter("replaced") != old
    for _ in range(2):
        run_inference("--ckpt", "checkpoints/replaced", "--limit", "1", "--out", str(tmp_path / "o"), "--overwrite")


class KilledError(BaseException):
    """Stands for kill -9 in process: nothing catches it."""


def kill(*_: object, **__: object) -> None:
    raise KilledError


def training_process(run: str, patch: str) -> subprocess.CompletedProcess[str]:
    """train.py in a process of its own that is killed (-9) where `patch` says."""
    flags = ["--base", str(base_folder()), *LORA, *PATIENCE, *CPU, "--run", run, "--epochs", "3"]
    code = f"import os, signal, train\nkill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n{patch}\ntrain.main({flags!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_training_goes_on_after_kill_9_with_the_same_bits(here: Path) -> None:
    """Killed when epoch 1 is done and saved and epoch 2 is half-way."""
    patch = (
        "import ksat.training as t\n"
        "end = t.RunCallback.on_step_end\n"
        "t.RunCallback.on_step_end = lambda self, a, state, *r, **k: kill() if state.global_step == 5 else end(self, a, state, *r, **k)"
    )
    killed = training_process("killed", patch)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [entry["epoch"] for entry in read_json(Path("checkpoints/killed/progress.json"))["epochs"]] == [1]
    run_train("--run", "killed", "--epochs", "3", "--resume")
    assert_unbroken("killed")


def assert_unbroken(run: str) -> None:
    """The run's files are those of the run that nobody killed."""
    folder, whole = Path("checkpoints", run), Path("checkpoints/full")
    assert {path.name for path in folder.iterdir()} == RUN_FILES
    assert adapter(run) == adapter("full")
    assert (folder / "validation.probs.csv").read_bytes() == (whole / "validation.probs.csv").read_bytes()
    one, other = (read_json(path / "metrics.json") for path in (folder, whole))
    assert {**one, "peak_memory_gib": 0} == {**other, "peak_memory_gib": 0}
    assert (folder / "log.jsonl").read_text() == (
        whole / "log.jsonl"
    ).read_text()  # each step once, and their mean loss
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


@pytest.mark.parametrize(
    "place",
    [
        "ksat.validation.Validation.control",  # before anything
        "ksat.training.RunCallback.on_train_begin",
        "ksat.training.seal",  # epoch 1 is in progress.json, its trainer checkpoint has no mark
        "ksat.validation.seal",  # trained for an epoch, its adapter has no mark
        "shutil.copytree",  # trained, not finished
        "ksat.runs.write_run",  # all but the marker
    ],
)
def test_training_goes_on_wherever_it_was_killed(here: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    run = place.replace(".", "-")
    with monkeypatch.context() as patch:
        patch.setattr(place, kill)
        with pytest.raises(KilledError):
            run_train("--run", run, "--epochs", "3")
    run_train("--run", run, "--resume")
    assert_unbroken(run)


def test_a_kill_in_the_validation_loses_no_epoch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With saves due after every step: one behind the epoch's last would count the epoch as done, its validation undone."""
    with monkeypatch.context() as patch:
        patch.setattr("ksat.training.SECONDS_BETWEEN_SAVES", -1.0)
        patch.setattr("ksat.validation.Validation.after_epoch", kill)
        with pytest.raises(KilledError):
            run_train("--run", "behind", "--epochs", "3")
    run_train("--run", "behind", "--resume")
    assert_unbroken("behind")


def test_training_goes_on_in_the_middle_of_an_epoch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ksat import training

    end = training.RunCallback.on_step_end

    def end_then_kill(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:  # the second of epoch 2, after the fifth was saved
            raise KilledError
        end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "SECONDS_BETWEEN_SAVES", -1.0)
        patch.setattr(training.RunCallback, "on_step_end", end_then_kill)
        with pytest.raises(KilledError):
            run_train("--run", "middle", "--epochs", "3")
    checkpoint = training.last_checkpoint(Path("checkpoints/middle/trainer"))
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-5"
    run_train("--run", "middle", "--epochs", "3", "--resume")
    assert_unbroken("middle")


def test_a_resumed_run_keeps_how_it_is_computed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("ksat.validation.Validation.control", kill)
        with pytest.raises(KilledError):
            run_train("--run", "kept", "--pack-tokens", "300", "--limit", "4")
    run_train("--run", "kept", "--resume")
    settings = read_json(Path("checkpoints/kept/run.json"))["settings"]
    assert (settings["pack_tokens"], settings["engine"], settings["dtype"]) == (300, "transformers", "float32")


def test_more_shots_or_orders_than_there_are_are_recorded_as_what_was_done(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--shots", "500", "--choice-orders", "99", "--limit", "1"]
    run_inference("--base", str(base_folder()), *flags, "--out", str(tmp_path / "all"))
    num_rows, size = len(read_questions("data/train.csv")), read_questions("data/test.csv")[0].num_choices
    report = read_json(tmp_path / "all.probs.json")
    assert (report["shots"], report["choice_orders"]) == (num_rows, size)
    out = capsys.readouterr().out
    assert (
        f"--shots 500: of the {num_rows} questions in data/train.csv at most {num_rows} may stand before another one, none"
        in out
    )
    assert f"passage; --shots {num_rows} is taken" in out
    assert f"--choice-orders 99: {size} choices have {size} such orders" in out


def test_a_question_that_is_in_the_pool_gets_one_shot_less_and_that_is_recorded(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pool's size was recorded, which none of its own questions can get."""
    rows = read_questions("data/train.csv")
    own = [passage_key(row) for row in rows]
    most = max(len(rows) - own.count(key) for key in own[:3])
    flags = ["--shots", str(len(rows)), "--test", "data/train.csv", "--limit", "3"]
    run_inference("--base", str(base_folder()), *flags, "--out", str(tmp_path / "own"))
    report = read_json(tmp_path / "own.probs.json")
    assert most < len(rows)
    assert report["shots"] == most
    assert report["num_dropped_shots"] == sum(most - (len(rows) - own.count(key)) for key in own[:3])
    assert f"; --shots {most} is taken" in capsys.readouterr().out


def test_the_sidecar_says_where_the_shots_came_from(here: Path, tmp_path: Path) -> None:
    """The interrupted scores of another file's shots must not go on: source and hash are part of the journal's key."""
    run_inference("--base", str(base_folder()), "--shots", "1", "--out", str(tmp_path / "one"), "--limit", "1")
    report = read_json(tmp_path / "one.probs.json")
    assert (report["shots_from"], report["shots_sha256"]) == ("data/train.csv", file_sha256(Path("data/train.csv")))


def test_inference_goes_on_after_kill_9_with_the_same_bits(here: Path, tmp_path: Path) -> None:
    flags = ["--ckpt", "checkpoints/full", "--pack-tokens", "300", *CPU]
    inference.main([*flags, "--out", str(tmp_path / "whole")])
    code = (
        "import os, signal, inference, ksat.journal as r\nadd, calls = r.Journal.add, []\n"
        "def add_twice(self, scores):\n"
        "    calls.append(1); add(self, scores)\n"
        "    if len(calls) == 2:\n"
        "        with self.path.open('a') as f: f.write('{\"q-')\n"  # a line that the kill cuts
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"r.Journal.add = add_twice\ninference.main({[*flags, '--out', str(tmp_path / 'killed')]!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    journal = tmp_path / ".killed.probs.csv.partial.0"
    assert len(journal.read_text().splitlines()) == 4
    assert not (tmp_path / "killed.csv").exists()
    inference.main([*flags, "--out", str(tmp_path / "killed")])
    for ending in (".csv", ".probs.csv"):
        assert (tmp_path / f"killed{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()
    assert not journal.exists()


def test_an_interrupted_inference_goes_on_whatever_its_name(here: Path, tmp_path: Path) -> None:
    """Brackets and stars are a pattern for a file system, and a lowered budget does not throw scores away."""
    flags = ["--ckpt", "checkpoints/full", *CPU, "--out", str(tmp_path / "run[2]*")]
    packs: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        from ksat.language_model import LanguageModel

        score = LanguageModel.choice_scores

        def count(self: LanguageModel, pack: Any, **how: bool) -> Any:
            packs.append(len(pack.rows))
            if len(packs) == 3:
                raise KilledError
            return score(self, pack, **how)

        patch.setattr(LanguageModel, "choice_scores", count)
        with pytest.raises(KilledError):
            inference.main([*flags, "--pack-tokens", "300"])
        inference.main([*flags, "--pack-tokens", "200"])
    whole = read_probs(Path("submissions/full.probs.csv"))
    assert sum(packs[:2]) + sum(packs[3:]) < len(whole) + max(packs)  # at most what shares a smaller pack with new ones
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    assert_same_probs(tmp_path / "run[2]*.probs.csv", Path("submissions/full.probs.csv"), 1e-5)


def test_inference_starts_anew_when_the_interrupted_one_had_other_settings(here: Path, tmp_path: Path) -> None:
    for run in ("small", "full"):
        journal = tmp_path / ".x.probs.csv.partial.0"
        journal.write_text(f'0000\n{{"q-280": [0, 0, 0, 0]}}\n# {run}\n')
        run_inference("--ckpt", f"checkpoints/{run}", "--out", str(tmp_path / "x"), "--overwrite")
        assert_same_probs(tmp_path / "x.probs.csv", Path(f"submissions/{run}.probs.csv"), 0)


@pytest.mark.parametrize("script", ["train", "inference"])
def test_ctrl_c_exits_130_and_the_work_goes_on(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str
) -> None:
    from ksat.language_model import LanguageModel

    score, calls = LanguageModel.choice_scores, []

    def interrupt(self: LanguageModel, pack: Any, **how: bool) -> Any:
        calls.append(pack)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return score(self, pack, **how)

    def main() -> None:
        if script == "train":
            resume = ["--resume"] if Path("checkpoints/stopped").exists() else []
            run_train("--run", "stopped", "--epochs", "3", *resume)
        else:
            flags = ("--pack-tokens", "1", "--overwrite")
            run_inference("--ckpt", "checkpoints/full", *flags, "--out", str(tmp_path / "stopped"))

    monkeypatch.setattr(LanguageModel, "choice_scores", interrupt)
    assert exit_code(main) == EXIT_INTERRUPTED
    assert capsys.readouterr().err.endswith("\ninterrupted; the same command starts anew\n")
    assert exit_code(main) == EXIT_DONE
    if script == "train":
        assert_unbroken("stopped")
    else:
        assert len(calls) == 13  # no question but the one in flight was scored twice


# Bad input: exit code 2, one line on stderr, nothing written and nothing lost.


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change, but for locks, which stay empty."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def assert_refused(
    script: Any, flags: list[str], match: str, capsys: pytest.CaptureFixture[str], folder: Path | None = None
) -> None:
    """The script exits with 2 and one line that says `match`; the folder stays as it was."""
    import re

    folder = folder or Path.cwd()
    before = tree(folder)
    capsys.readouterr()
    assert exit_code(lambda: script.main(flags)) == EXIT_BAD_INPUT
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert lines[-1] == errors[0]
    assert re.search(match, errors[0]), errors[0]
    assert tree(folder) == before


TRAIN = ["--base", "BASE", *CPU]
TRAIN_REFUSALS = {
    "unlabelled rows": (
        [*TRAIN, "--train", "data/test.csv"],
        r"data/test.csv: 12 of the rows have no answer .*training and metrics need labelled rows",
    ),
    "no such file": ([*TRAIN, "--train", "nowhere.csv"], r"nowhere.csv: no such file"),
    "an id in two files": (
        [*TRAIN, "--train", "data/train.csv", "data/train.csv"],
        r"data/train.csv: 16 of the rows have an id that another file of --train or --valid has .*; put a prefix before the ids of one file, such as 'train-",
    ),
    "unknown base": (["--base", "nowhere/nothing", *CPU], r"--base nowhere/nothing: can't be loaded"),
    "base without config.json": (["--base", "data", *CPU], r"--base data: the folder has no config.json"),
    "no CUDA": ([*TRAIN, "--device", "cuda"], r"--device cuda: torch sees no CUDA GPU"),
    "run exists": ([*TRAIN, "--run", "full"], r"--run full: checkpoints/full exists; choose another --run or --overwrite"),
    "run is a path": ([*TRAIN, "--run", "a/b"], r"--run 'a/b': expected a plain name, without slashes"),
    "run is ..": ([*TRAIN, "--run", ".."], r"--run '..': expected a plain name"),
    "run is nothing": ([*TRAIN, "--run", "", "--overwrite"], r"--run '': expected a name"),
    "all runs are nothing": ([*TRAIN, "--run", "", "--overwrite", "--all", "--folds", "2"], r"--run '': expected a name"),
    "run is blank": ([*TRAIN, "--run", " ", "--overwrite"], r"--run ' ': expected a name"),
    "run is too long": ([*TRAIN, "--run", "가" * 70, "--overwrite"], r"210 bytes long, expected at most 200"),
    "no prompt file": ([*TRAIN, "--prompt", "nowhere.txt"], r"--prompt nowhere.txt: no such file"),
    "prompt too long": ([*TRAIN, "--max-tokens", "9"], r"more than --max-tokens 9 even without its passage"),
    "lr 0": ([*TRAIN, "--lr", "0"], r"--lr 0.0: expected above 0"),
    "dropout 1": ([*TRAIN, "--dropout", "1"], r"--dropout 1.0: expected 0 to 1"),
    "warmup 1": ([*TRAIN, "--warmup", "1"], r"--warmup 1.0: expected 0 to 1"),
    "weight decay": ([*TRAIN, "--weight-decay", "-1"], r"--weight-decay -1.0: expected 0 or more"),
    "alpha 0": ([*TRAIN, "--alpha", "0"], r"--alpha 0.0: expected above 0"),
    "valid fraction": ([*TRAIN, "--valid-fraction", "0.6"], r"--valid-fraction 0.6: expected 0"),
    "logger": ([*TRAIN, "--report-to", "nothing", "--run", "n"], r"--report-to nothing: "),
    "resume without a name": ([*TRAIN, "--resume"], r"--resume: name the interrupted run with --run"),
    "resume and overwrite": ([*TRAIN, "--resume", "--run", "full", "--overwrite"], r"leave --overwrite out"),
    "resume what is done": ([*TRAIN, "--resume", "--run", "full"], r"--resume: checkpoints/full is finished"),
    "resume what never was": ([*TRAIN, "--resume", "--run", "none"], r"checkpoints/none was never started; runs there: .*full"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAIN_REFUSALS)
def test_train_refuses(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if case == "no CUDA":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags, match = TRAIN_REFUSALS[case]
    assert_refused(train, [str(base_folder()) if flag == "BASE" else flag for flag in flags], match, capsys)


INFERENCE_REFUSALS = {
    "no model": ([], r"name what to score with: --ckpt checkpoints/<run>, or --base"),
    "no such run": (["--ckpt", "checkpoints/none"], r"--ckpt checkpoints/none: no such folder"),
    "no run": (["--ckpt", "data"], r"--ckpt data: no run.json; expected checkpoints/<run> as train.py writes it$"),
    "unknown base": (["--base", "nowhere/nothing"], r"--base nowhere/nothing: can't be loaded"),
    "another base": (["--ckpt", "checkpoints/full", "--base", "x"], r"--base x: checkpoints/full/run.json says .*tiny-qwen2"),
    "another scoring": (["--ckpt", "checkpoints/full", "--score-by", "text"], r"--score-by text: .* says label"),
    "another limit": (["--ckpt", "checkpoints/full", "--max-tokens", "9"], r"--max-tokens 9: .* says 4096"),
    "other weights": (["--ckpt", "checkpoints/full", "--quantization", "nf4"], r"--quantization nf4: .* says none"),
    "another prompt": (["--ckpt", "checkpoints/full", "--prompt", "p.txt"], r"--prompt and --shots are for untuned bases"),
    "shots from a file": (["--ckpt", "checkpoints/full", "--train", "data/train.csv"], r"--train is where shots come from; give --shots N"),
    "no shots from a file": (["--base", "embedded", "--train", "data/train.csv"], r"--train is where shots come from; give --shots N"),
    "shots": (["--ckpt", "checkpoints/full", "--shots", "2"], r"--prompt and --shots are for untuned bases"),
    "no test": (["--ckpt", "checkpoints/full", "--out", "new", "--test", "nowhere.csv"], r"nowhere.csv: no such file"),
    "output exists": (["--ckpt", "checkpoints/full", "--out", "full"], r"submissions/full.*csv and .* exist already; .*--overwrite"),
    "default output exists": (["--ckpt", "checkpoints/full"], r"submissions/full.*csv and .* exist already"),
    "no CUDA": (["--ckpt", "checkpoints/full", "--device", "cuda"], r"--device cuda: torch sees no CUDA GPU"),
    "answers to other questions": (
        ["--ckpt", "checkpoints/full", "--out", "new", "--answers", "data/train.csv"],
        r"data/train.csv: 12 of the rows of the predictions are missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INFERENCE_REFUSALS)
def test_inference_refuses(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if case == "no CUDA":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags, match = INFERENCE_REFUSALS[case]
    assert_refused(inference, [*CPU, *flags], match, capsys)


def copy_of_full(folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree("checkpoints/full", folder / "copy"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def edit(**fields: Any) -> Any:
    """Damage: other values in a JSON file, as an editor would put them there."""
    return lambda path: path.write_text(json.dumps(read_json(path) | fields))


def other_base(path: Path) -> None:
    reseal(path.parent, base=str(base_folder(hidden_size=64)))


@pytest.mark.parametrize(
    ("file", "damage", "match"),
    [
        ("run.json", Path.unlink, r"no run.json; the run is not finished"),
        ("run.json", cut, r"copy/run.json: not JSON .*cut or was edited"),
        ("run.json", lambda path: path.write_text('{"format": 0}'), r"another format than 2"),
        (
            "run.json",
            lambda path: path.write_text('{"format": 1}'),
            r"fields missing or unknown: 'adapter_sha256, base",
        ),
        ("run.json", edit(scale=1e9), r"run.json: edited or damaged, its content does not fit its own sha256"),
        ("run.json", edit(quantization="nf4"), r"run.json: edited or damaged"),
        ("run.json", edit(format=1), r"run.json: edited or damaged"),
        ("adapter/adapter_model.safetensors", cut, r"adapter_model.safetensors: cut or changed \(sha256 "),
        ("adapter/adapter_model.safetensors", Path.unlink, r"adapter_model.safetensors: no such file"),
        ("adapter/adapter_config.json", cut, r"adapter_config.json: cut or changed"),
        ("adapter/adapter_config.json", edit(lora_alpha=999), r"adapter_config.json: cut or changed \(sha256 "),
        ("adapter/adapter_config.json", edit(use_rslora=False), r"adapter_config.json: cut or changed \(sha256 "),
        ("adapter/adapter_config.json", edit(peft_type="LOHA"), r"adapter_config.json: cut or changed \(sha256 "),
        ("adapter/adapter_config.json", Path.unlink, r"adapter_config.json: no such file"),
        ("run.json", other_base, r"copy/adapter: does not fit --base .*-64 \(.*is the base the one it was trained on"),
    ],
)
def test_damaged_checkpoints_are_refused(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: Any, match: str
) -> None:
    folder = copy_of_full(tmp_path)
    damage(folder / file)
    assert_refused(inference, [*CPU, "--ckpt", str(folder), "--out", str(tmp_path / "x")], match, capsys, tmp_path)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--lr", "0.5"], r"--resume: lr is 0.5, the interrupted run has 0.01; leave the flag out"),
        (["--rank", "4"], r"--resume: rank is 4, the interrupted run has 8"),
        (["--score-by", "text"], r"--resume: score-by is 'text'"),
        (["--train", "data/answers.csv"], r"--resume: data is "),
        (["--base", "elsewhere"], r"--resume: base is 'elsewhere'"),
    ],
)
def test_resume_refuses_what_contradicts_the_run(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], match: str
) -> None:
    folder = Path("checkpoints/contradicted")
    if not folder.exists():
        folder.mkdir()
        settings = Path("checkpoints/full/settings.json").read_bytes()
        (folder / "settings.json").write_bytes(settings)
    assert_refused(train, [*CPU, "--run", folder.name, "--resume", *flags], match, capsys)


def test_resume_refuses_settings_that_were_edited(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("checkpoints/edited")
    folder.mkdir()
    settings = read_json(Path("checkpoints/full/settings.json"))
    (folder / "settings.json").write_text(json.dumps(settings | {"lr": 0.02}))
    assert_refused(train, [*CPU, "--run", "edited", "--resume"], r"edited/settings.json: edited or damaged", capsys)
    content = {name: value for name, value in settings.items() if name != "sha256"}
    write_settings(folder, content | {"base_identity": {"config.json": "0" * 64}})
    match = r"--resume: --base .* is not the one that the run was started on \(.*config.json differs, .* is new"
    assert_refused(train, [*CPU, "--run", "edited", "--resume"], match, capsys)


def test_a_started_run_is_not_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("checkpoints/started")
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    flags = ["--base", str(base_folder()), *CPU, "--run", "started"]
    assert_refused(train, flags, r"checkpoints/started exists; --resume goes on, --overwrite starts anew", capsys)


def test_a_base_that_can_t_be_loaded_leaves_the_run_that_overwrite_would_replace(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--base", "data", *CPU, "--run", "full", "--overwrite"]
    assert_refused(train, flags, r"--base data: the folder has no config.json", capsys)


@pytest.mark.parametrize(
    ("type_flag", "value"),
    [
        ("--epochs", "0"),
        ("--rank", "x"),
        ("--weight-decay", "inf"),
        ("--alpha", "inf"),
        ("--pack-tokens", "-1"),
        ("--engine", "vllm"),
    ],
)
def test_flags_that_argparse_refuses(
    here: Path, capsys: pytest.CaptureFixture[str], type_flag: str, value: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main([type_flag, value])
    assert stopped.value.code == EXIT_BAD_INPUT
    assert f"error: argument {type_flag}" in capsys.readouterr().err


def test_disk_full_while_inference_writes(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scores so far are kept, the output is not there, and with space again the same command finishes."""

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def main() -> None:
        run_inference("--ckpt", "checkpoints/full", "--out", str(tmp_path / "x"))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        assert exit_code(main) == EXIT_BAD_INPUT
    assert "can't be written (No space left on device)" in capsys.readouterr().err
    assert not list(tmp_path.glob("x*csv"))
    assert exit_code(main) == EXIT_DONE
    assert_same_probs(tmp_path / "x.probs.csv", Path("submissions/full.probs.csv"), 0)


@pytest.mark.parametrize("limit", [1500, 9000, 40000])
def test_disk_full_while_training_then_resumed(here: Path, capsys: pytest.CaptureFixture[str], limit: int) -> None:
    """A file may grow to `limit` bytes: in turn the settings, the adapter and the optimizer's state don't fit."""
    run = f"disk-{limit}"
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        code = exit_code(lambda: run_train("--run", run, "--epochs", "3"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert code == EXIT_BAD_INPUT
    assert len(errors) == 1
    assert "can't be written" in errors[0]
    run_train(
        "--run", run, "--epochs", "3", *(["--resume"] if Path("checkpoints", run, "settings.json").exists() else [])
    )
    assert_unbroken(run)
