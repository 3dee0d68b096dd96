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
from typing import Any

import numpy as np
import pytest
import torch
from tiny import base_folder, encode, load_base, make_questions, read_probs, write_questions

import inference
import train
from ksat.errors import InputError
from ksat.files import read_json
from ksat.language_model import LanguageModel
from ksat.packing import build_pack

ROOT = Path(__file__).parent.parent
CPU = ["--device", "cpu", "--engine"]
RUNS = [("label", "none"), ("text", "none"), ("label", "nf4")]
BASES = ["qwen2", "llama"]
PACKED = ["qwen2", "gemma3", "cohere2"]  # full attention, and sliding windows of two kinds

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


def in_unsloth_process(folder: Path, calls: list[tuple[str, list[str]]], *, also: str = "") -> str:
    """Runs mains of scripts one after the other in one process, then other code; returns what it printed."""
    code = "import inference, train\n" + "\n".join(f"{script}.main({flags!r})" for script, flags in calls)
    code += f"\n{also}"
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def drawn_adapter(family: str, engine: str, **how: Any) -> LanguageModel:
    """A tiny model with the same LoRA whatever the engine, one that does something."""
    model: LanguageModel = load_base(base_folder(family, hidden_size=64), engine=engine, rank=4, **how)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def packed_step(model: LanguageModel, num_kept: int, *, alone: bool = False) -> dict[str, np.ndarray[Any, Any]]:
    """The scores of six questions by text and the gradients of their sum, every question in one pack or in one of its own."""
    questions = encode(make_questions(6), "text")
    model.model.train()
    model.keep_activations(num_kept)
    result: dict[str, Any] = {}
    for n, rows in enumerate([[row] for row in range(6)] if alone else [range(6)]):
        scores = model.choice_scores(build_pack(questions, rows, layout=model.layout))
        scores[scores.isfinite()].sum().backward()  # type: ignore[no-untyped-call]
        result[f"scores {n}"] = scores.detach()[scores.isfinite()]
    result |= {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}
    model.model.zero_grad()
    return {name: value.numpy() for name, value in result.items()}


def write_packs() -> None:
    """Writes what Unsloth makes of a flat pack, by number of layers that keep their activations, and whom it refuses."""
    for family in PACKED:
        model = drawn_adapter(family, "unsloth")
        assert (model.engine, model.layout) == ("unsloth", "flat")
        for num_kept in (0, 1, 2):
            np.savez(f"{family}-{num_kept}.npz", **packed_step(model, num_kept))
    for family in ("gemma2", "lfm2"):
        with pytest.raises(InputError) as caught:
            load_base(base_folder(family), engine="unsloth")
        Path(f"{family}.txt").write_text(str(caught.value))


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
            also="import test_unsloth; test_unsloth.write_packs()",
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


@pytest.mark.parametrize("family", PACKED)
def test_a_flat_pack_equals_separate_prompts(trained: Path, family: str) -> None:
    """Of transformers and PEFT without packs, scores and gradients."""
    found = dict(np.load(trained / f"{family}-2.npz"))
    alone = packed_step(drawn_adapter(family, "transformers", share_prefixes=False), 2, alone=True)
    scores = np.concatenate([alone.pop(f"scores {n}") for n in range(6)])
    np.testing.assert_allclose(found.pop("scores 0"), scores, rtol=1e-4, atol=1e-4)
    assert found.keys() == alone.keys()
    for name, gradient in alone.items():
        scale = max(1.0, np.abs(gradient).max())
        np.testing.assert_allclose(found[name], gradient, rtol=1e-4, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("family", PACKED)
def test_recompute_by_layer_changes_no_bit(trained: Path, family: str) -> None:
    kept = dict(np.load(trained / f"{family}-2.npz"))
    for num_kept in (0, 1):
        found = dict(np.load(trained / f"{family}-{num_kept}.npz"))
        assert found.keys() == kept.keys()
        for name, value in kept.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("family", ["gemma2", "lfm2"])
def test_families_whose_prompts_would_see_each_other_are_refused(trained: Path, family: str) -> None:
    message = (trained / f"{family}.txt").read_text()
    assert f"tiny-{family}" in message
    assert f"Unsloth does not keep the prompts of a pack apart for model type '{family}'" in message
    assert message.endswith("; use --engine transformers")


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
