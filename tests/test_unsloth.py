"""The Unsloth engine on the CPU: an adapter trained by one engine and scored by the other gives the same probabilities.

Unsloth patches transformers, peft and trl while it is imported, so it runs in processes of its own; and it writes a folder
unsloth_compiled_cache where it stands, so it stands in a temporary one.
"""

import importlib.util
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
from ksat.runs import read_json

ROOT = Path(__file__).parent.parent
CPU = ["--device", "cpu", "--engine"]
RUNS = [("label", "none"), ("text", "none"), ("label", "nf4")]
BASES = ["qwen2", "llama"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None and not os.environ.get("CI"), reason="unsloth is not installed"
)


def training_flags(base: str, engine: str, score_by: str, quantization: str) -> list[str]:
    return [
        "--base", str(base_folder(base, hidden_size=64)), *CPU, engine, "--train", "train.csv", "--run", f"{base}-{engine}-{score_by}-{quantization}",
        "--rank", "4", "--lr", "0.01", "--epochs", "2", "--questions-per-step", "4", "--valid-fraction", "0.25", "--score-by", score_by,
        "--quantization", quantization, "--patience", "9",
    ]  # fmt: skip


def scoring_flags(run: str, engine: str) -> list[str]:
    return ["--ckpt", f"checkpoints/{run}", *CPU, engine, "--test", "test.csv", "--out", f"out/{run}-by-{engine}"]


def in_unsloth_process(folder: Path, calls: list[tuple[str, list[str]]]) -> str:
    """Runs mains of scripts one after the other in one process and returns what it printed."""
    code = "import inference, train\n" + "\n".join(f"{script}.main({flags!r})" for script, flags in calls)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder where each engine has trained its runs and has scored those of both."""
    folder = tmp_path_factory.mktemp("unsloth")
    write_questions(folder / "train.csv", make_questions(12))
    write_questions(folder / "test.csv", make_questions(6, first=40), labelled=False)
    settings = [(base, *run) for base in BASES for run in RUNS]
    names = {e: [training_flags(b, e, s, q) for b, s, q in settings] for e in ("transformers", "unsloth")}
    both = [flags[flags.index("--run") + 1] for engine in names for flags in names[engine]]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for flags in names["transformers"]:
            train.main(flags)
        in_unsloth_process(
            folder,
            [("train", flags) for flags in names["unsloth"]]
            + [("inference", scoring_flags(run, "unsloth")) for run in both],
        )
        for run in both:
            inference.main(scoring_flags(run, "transformers"))
        yield folder


def assert_close(left: Path, right: Path, tolerance: float) -> None:
    one, other = read_probs(left), read_probs(right)
    assert one.keys() == other.keys()
    for row_id, probs in one.items():
        np.testing.assert_allclose(probs, other[row_id], atol=tolerance, err_msg=f"{left.name} {row_id}")


@pytest.mark.parametrize(("score_by", "quantization"), RUNS)
@pytest.mark.parametrize("engine", ["transformers", "unsloth"])
@pytest.mark.parametrize("base", BASES)
def test_both_engines_score_an_adapter_alike(
    trained: Path, base: str, engine: str, score_by: str, quantization: str
) -> None:
    run = f"{base}-{engine}-{score_by}-{quantization}"
    assert read_json(trained / "checkpoints" / run / "run.json")["settings"]["engine"] == engine
    assert read_json(trained / f"out/{run}-by-unsloth.probs.json")["engine"] == "unsloth"
    assert_close(trained / f"out/{run}-by-unsloth.probs.csv", trained / f"out/{run}-by-transformers.probs.csv", 1e-4)


@pytest.mark.parametrize(("score_by", "quantization"), RUNS)
@pytest.mark.parametrize("base", BASES)
def test_both_engines_see_the_same_untuned_base_and_learn(
    trained: Path, base: str, score_by: str, quantization: str
) -> None:
    metrics = {
        engine: read_json(trained / f"checkpoints/{base}-{engine}-{score_by}-{quantization}/metrics.json")
        for engine in ("transformers", "unsloth")
    }
    control = {engine: values["control"]["log_loss"]["value"] for engine, values in metrics.items()}
    assert control["unsloth"] == pytest.approx(control["transformers"], abs=1e-4)
    for values in metrics.values():  # it was trained at all
        assert abs(values["epochs"][0]["log_loss"]["value"] - values["control"]["log_loss"]["value"]) > 1e-5


def test_the_embedded_base_runs_with_unsloth(tmp_path: Path) -> None:
    """Gemma 3: sliding windows, a large vocabulary."""
    write_questions(tmp_path / "train.csv", make_questions(4))
    write_questions(tmp_path / "test.csv", make_questions(2, first=40), labelled=False)
    flags = ["--base", "embedded", "--device", "cpu", "--engine", "unsloth", "--run", "e", "--train", "train.csv"]
    size = ["--limit", "2", "--epochs", "1", "--valid-fraction", "0", "--questions-per-step", "2"]
    in_unsloth_process(tmp_path, [("train", [*flags, *size]), ("inference", scoring_flags("e", "unsloth"))])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        inference.main(scoring_flags("e", "transformers"))
    assert_close(tmp_path / "out/e-by-unsloth.probs.csv", tmp_path / "out/e-by-transformers.probs.csv", 1e-3)
