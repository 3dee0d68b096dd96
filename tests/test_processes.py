"""Two processes under `accelerate launch`: the loss curve, the files and the scores of one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import base_folder, make_questions, read_probs, write_questions

import inference
import train
from ksat import processes
from ksat.files import read_json

ROOT = Path(__file__).parent.parent
CPU = ["--device", "cpu", "--engine", "transformers"]
TRAIN = [
    "--train", "train.csv", "--rank", "4", "--lr", "0.01", "--epochs", "2", "--questions-per-step", "5", "--patience", "9", "--valid-fraction",
    "0.25", *CPU,
]  # fmt: skip


def launch(script: str, flags: list[str], *, num_processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs a script as the README says, connected by gloo: this machine has no GPU."""
    how = ["--multi_gpu", "--num_processes", str(num_processes), "--num_machines", "1", "--mixed_precision", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        *how,
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    return subprocess.run(
        [*command, str(ROOT / script), *flags], env=environment, capture_output=True, text=True, check=False
    )


def losses(run: str) -> list[float]:
    log = [json.loads(line) for line in Path(f"checkpoints/{run}/log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the same run trained by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    write_questions(folder / "train.csv", make_questions(20))
    write_questions(folder / "test.csv", make_questions(9, first=60), labelled=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        base = ["--base", str(base_folder())]
        train.main([*base, *TRAIN, "--run", "one"])
        done = launch("train.py", [*base, *TRAIN, "--run", "two", "--pack-tokens", "400"])
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("wrote checkpoints/two") == 1
        yield folder


def test_two_processes_have_the_loss_curve_of_one(here: Path) -> None:
    one, two = losses("one"), losses("two")
    assert len(one) == 8
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)
    epochs = [
        [e["log_loss"]["value"] for e in read_json(Path(f"checkpoints/{run}/metrics.json"))["epochs"]]
        for run in ("one", "two")
    ]
    np.testing.assert_allclose(epochs[1], epochs[0], rtol=1e-4)


def test_two_processes_write_the_files_of_one(here: Path) -> None:
    files = [
        sorted(p.relative_to(f"checkpoints/{r}") for p in Path(f"checkpoints/{r}").rglob("*")) for r in ("one", "two")
    ]
    assert files[0] == files[1]


def test_two_processes_score_into_one_file(here: Path) -> None:
    flags = ["--ckpt", "checkpoints/one", "--test", "test.csv", "--pack-tokens", "300", *CPU]
    inference.main([*flags, "--out", "out/one"])
    done = launch("inference.py", [*flags, "--out", "out/two"])
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in Path("out").glob(".*")) == []
    one, two = read_probs(Path("out/one.probs.csv")), read_probs(Path("out/two.probs.csv"))
    assert list(one) == list(two)
    for row_id, probs in one.items():
        np.testing.assert_allclose(two[row_id], probs, atol=1e-5)


def test_an_interrupted_pair_goes_on_as_one(here: Path) -> None:
    """Each process keeps a journal of its own; whoever goes on reads them all."""
    flags = ["--ckpt", "checkpoints/one", "--test", "test.csv", "--pack-tokens", "300", *CPU, "--out", "out/killed"]
    code = (
        "import os, signal, sys, ksat.journal as r, ksat.processes as p\nadd = r.Journal.add\n"
        "def add_once(self, scores):\n"
        "    add(self, scores); p.wait(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "r.Journal.add = add_once\nimport inference\n"
        f"inference.main({flags!r})\n"
    )
    (here / "killed.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    assert launch(str(here / "killed.py"), []).returncode != 0
    assert sorted(p.name for p in Path("out").glob(".*.partial.*")) == [
        f".killed.probs.csv.partial.{i}" for i in (0, 1)
    ]
    inference.main(flags)
    assert (here / "out/killed.probs.csv").read_bytes() == (here / "out/one.probs.csv").read_bytes()
    assert sorted(p.name for p in Path("out").glob(".*")) == []


def killed_training(run: str, *flags: str, step: int) -> list[str]:
    """Trains with two processes until both are killed at this step; returns the flags."""
    flags = ("--base", str(base_folder()), *TRAIN, "--run", run, *flags)
    code = (
        "import os, signal, ksat.training as t, ksat.processes as p\nt.SECONDS_BETWEEN_SAVES = -1.0\n"
        "end = t.RunCallback.on_step_end\n"
        "def end_or_kill(self, args, state, *r, **k):\n"
        f"    if state.global_step == {step}: p.wait(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return end(self, args, state, *r, **k)\n"
        f"t.RunCallback.on_step_end = end_or_kill\nimport train\ntrain.main({list(flags)!r})\n"
    )
    Path("killed_training.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}")
    assert launch(str(Path("killed_training.py").resolve()), []).returncode != 0
    return list(flags)


def test_two_processes_resume_to_the_curve_of_one(here: Path) -> None:
    flags = killed_training("killed", "--pack-tokens", "400", step=3)
    assert not Path("checkpoints/killed/run.json").exists()
    done = launch("train.py", [*flags, "--resume"])
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    np.testing.assert_allclose(losses("killed"), losses("one"), rtol=1e-4, atol=1e-4)


def test_two_processes_overwrite_a_run_that_was_interrupted(here: Path) -> None:
    """None may see the old run's progress, or what they do together would fall out of step."""
    flags = killed_training("old", step=6)
    assert Path("checkpoints/old/progress.json").exists()
    done = launch("train.py", [*flags, "--overwrite"])
    assert done.returncode == 0, done.stderr
    assert "resuming from" not in done.stderr
    np.testing.assert_allclose(losses("old"), losses("one"), rtol=1e-4, atol=1e-4)


def test_a_scheduler_that_sets_world_size_alone_starts_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert processes.num_processes() == 1
    monkeypatch.setenv("RANK", "1")
    assert processes.num_processes() == 2


def test_bad_input_stops_all_processes_with_one_message(here: Path) -> None:
    done = launch("train.py", ["--base", str(base_folder()), *TRAIN, "--run", "one"])
    assert done.returncode != 0
    assert "checkpoints/one exists" in done.stderr
