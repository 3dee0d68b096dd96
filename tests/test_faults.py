"""Faults that once passed all tests together: each is caught here by exact figures. docs/testing.md lists what was planted."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import base_folder, load_base, make_questions, make_run, read_probs, write_questions

import inference
import ksat.training
import ksat.validation
import train
from ksat.devices import Device
from ksat.encoding import EncodedQuestion, Encoder
from ksat.errors import InputError
from ksat.files import read_json
from ksat.language_model import LanguageModel
from ksat.metrics import Estimate, Metrics, compute_metrics
from ksat.models import LoadSettings, load
from ksat.prompts import PromptTemplate
from ksat.questions import Question, read_questions
from ksat.scoring import score_questions
from ksat.validation import Validation

CPU = ("--device", "cpu", "--engine", "transformers")
SCALE = 2.5
MAX_TOKENS = 93  # the long passages need up to 131, and no question more than 75 without its passage
LEARNING_RATE = 0.01
WORDING = "글:\n{passage}\n물음: {question}{question_plus}\n대답:"
# Log loss on the validation rows by epoch, 0 for the untuned base: the second epoch is the best, and two more end the patience.
LOSSES = {0: 2.0, 1: 0.9, 2: 0.5, 3: 0.7, 4: 0.6, 5: 0.1, 6: 0.1}
PATIENCE = 2


@dataclass(frozen=True, slots=True)
class Trained:
    """What was seen of the run "exact" while it was trained, and the folder that it stands in.

    Attributes:
        folder: the current one of all commands.
        encoded: what it was trained on.
        adapters: the LoRA's parameters after every epoch.
    """

    folder: Path
    encoded: Sequence[EncodedQuestion]
    adapters: dict[int, dict[str, torch.Tensor]]

    @property
    def run(self) -> Path:
        return self.folder / "checkpoints" / "exact"

    def model(self) -> LanguageModel:
        """The base with the run's adapter, loaded without the scripts."""
        device = Device("cpu", "test", (0, 0), 0.0)
        settings = LoadSettings(str(base_folder()), "transformers", device, "float32", False, 2048)
        return load(settings, adapter=self.run / "adapter")

    def train_rows(self) -> list[Question]:
        held_out = read_probs(self.run / "validation.probs.csv")
        return [row for row in read_questions(self.folder / "data" / "train.csv") if row.id not in held_out]


def run_train(name: str, *flags: str) -> Path:
    """checkpoints/<name>, trained with one optimizer step an epoch."""
    fixed = ("--base", str(base_folder()), "--rank", "4", "--lr", str(LEARNING_RATE), "--questions-per-step", "99")
    train.main([*fixed, "--schedule", "constant", *CPU, "--run", name, *flags])
    return Path("checkpoints", name)


def trainable(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.model.named_parameters() if p.requires_grad}


def encoder(model: LanguageModel, wording: str = WORDING, max_tokens: int = MAX_TOKENS) -> Encoder:
    return Encoder(model.tokenizer, PromptTemplate("", wording), "text", max_tokens=max_tokens)


def make_rows(num_rows: int, first: int = 0) -> list[Question]:
    """Questions of which every second has a long passage."""
    rows = make_questions(num_rows, first=first, share_passages=False)
    return [replace(row, passage=" ".join([row.passage] * (1 + 2 * (i % 2)))) for i, row in enumerate(rows)]


def probabilities(scores: np.ndarray[Any, Any], scale: float) -> np.ndarray[Any, Any]:
    """(N, 5) the softmax of scale * scores, written out."""
    masses = np.exp(scale * scores)
    return np.asarray(masses / np.nansum(masses, axis=1, keepdims=True))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run by text with its own prompt, scale, limit of tokens and losses on its validation rows."""
    folder = tmp_path_factory.mktemp("faults")
    adapters: dict[int, dict[str, torch.Tensor]] = {}
    encoded: list[EncodedQuestion] = []
    after_epoch, loop = Validation.after_epoch, ksat.training.train

    def record_epoch(self: Validation, epoch: int) -> bool:
        adapters[epoch] = trainable(self.model)
        return after_epoch(self, epoch)

    def record_questions(model: LanguageModel, questions: Sequence[EncodedQuestion], *args: Any, **kwargs: Any) -> None:
        encoded.extend(questions)
        loop(model, questions, *args, **kwargs)

    def scripted(*args: Any, **kwargs: Any) -> Metrics:
        return replace(compute_metrics(*args, **kwargs), log_loss=Estimate(LOSSES[len(adapters)]))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(ksat.validation, "fit_scale", lambda *_: SCALE)
        patch.setattr(ksat.validation, "compute_metrics", scripted)
        patch.setattr(Validation, "after_epoch", record_epoch)
        patch.setattr(ksat.training, "train", record_questions)
        write_questions(Path("data/train.csv"), make_rows(12))
        write_questions(Path("data/test.csv"), make_rows(6, first=40), labelled=False)
        Path("prompt.txt").write_text(f"[user]\n{WORDING}\n", encoding="utf-8")
        prompt = ("--score-by", "text", "--prompt", "prompt.txt", "--max-tokens", str(MAX_TOKENS))
        loss = ("--epochs", "6", "--patience", str(PATIENCE), "--valid-fraction", "0.25", "--warmup", "0.5")
        run_train("exact", *prompt, *loss)
        inference.main([*CPU, "--ckpt", "checkpoints/exact", "--test", "data/test.csv", "--out", "exact"])
    return Trained(folder, encoded, adapters)


def test_inference_asks_with_the_run_s_prompt_scale_and_limit_of_tokens(trained: Trained) -> None:
    """Its probabilities are those of a by-hand softmax of the run's scale times the scores of the run's prompts."""
    model, questions = trained.model(), read_questions(trained.folder / "data" / "test.csv")
    assert model.is_run  # whom nobody tells to take another base
    encoded = [encoder(model).encode(question) for question in questions]
    assert sum(question.num_cut_characters > 0 for question in encoded) >= 2
    expected = probabilities(score_questions(model, encoded, pack_tokens=4096), SCALE)
    written = read_probs(trained.folder / "submissions" / "exact.probs.csv")
    for question, row in zip(questions, expected, strict=True):
        np.testing.assert_allclose(written[question.id], row[: question.num_choices], atol=1e-6, err_msg=question.id)


def test_the_loss_is_of_the_run_s_prompts_at_its_scale(trained: Trained) -> None:
    """The first step's loss, when the LoRA changes nothing yet, by hand: the mean of -log p(answer) at the fitted scale."""
    model, rows = load_base(base_folder()), trained.train_rows()
    scores = score_questions(model, [encoder(model).encode(row) for row in rows], pack_tokens=4096)
    answers = probabilities(scores, SCALE)[np.arange(len(rows)), [row.answer_index for row in rows]]
    first = json.loads((trained.run / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(-np.log(answers).mean(), rel=1e-5)
    assert read_json(trained.run / "run.json")["scale"] == SCALE


def test_prompts_are_cut_to_the_limit_of_tokens_in_training_and_inference(trained: Trained) -> None:
    assert max(len(question.prompt_ids) for question in trained.encoded) <= MAX_TOKENS
    assert sum(question.num_cut_characters > 0 for question in trained.encoded) >= 2
    assert read_json(trained.folder / "submissions" / "exact.probs.json")["num_cut"] >= 2


def test_patience_ends_and_the_best_epoch_s_adapter_is_kept(trained: Trained) -> None:
    metrics = read_json(trained.run / "metrics.json")
    assert [entry["epoch"] for entry in metrics["epochs"]] == [1, 2, 3, 4]
    assert metrics["best_epoch"] == read_json(trained.run / "run.json")["settings"]["best_epoch"] == 2
    kept = load_file(trained.run / "adapter" / "adapter_model.safetensors")
    of_epoch = {
        epoch: {name.replace(".default", ""): values for name, values in adapter.items()}
        for epoch, adapter in trained.adapters.items()
    }
    assert kept.keys() == of_epoch[2].keys()
    assert all(torch.equal(kept[name], of_epoch[2][name]) for name in kept)
    assert not any(torch.equal(of_epoch[4][name], of_epoch[2][name]) for name in kept if "lora_B" in name)


def test_the_rate_rises_for_the_share_of_warm_up(trained: Trained) -> None:
    """Three of six steps: 0, a third and two thirds of the rate, then all of it."""
    log = [json.loads(line) for line in (trained.run / "log.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in log if "loss" in entry]
    assert rates == pytest.approx([0.0, LEARNING_RATE / 3, 2 * LEARNING_RATE / 3, LEARNING_RATE])


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapters of three runs of one step each: one with weight decay, one with dropout, one with a LoRA of its own."""
    folder = tmp_path_factory.mktemp("one-step")
    fixed = ("--epochs", "1", "--valid-fraction", "0", "--warmup", "0", "--score-by", "label")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_questions(Path("data/train.csv"), make_rows(4))
        run_train("decay", *fixed, "--weight-decay", "0.5", "--dropout", "0")
        run_train("dropout", *fixed, "--weight-decay", "0", "--dropout", "0.5")
        run_train("lora", *fixed, "--weight-decay", "0", "--alpha", "3", "--no-rslora", "--seed", "1")
    return {name: folder / "checkpoints" / name / "adapter" for name in ("decay", "dropout", "lora")}


def fresh_lora(seed: int) -> dict[str, torch.Tensor]:
    """The LoRA's parameters before the first step, as a file names them."""
    model = load_base(base_folder(), rank=4, seed=seed)
    return {name.replace(".default", ""): values for name, values in trainable(model).items()}


def test_weight_decay_shrinks_what_has_no_gradient(one_step: dict[str, Path]) -> None:
    """LoRA's A has no gradient while B is 0, so AdamW leaves it but for the decay: times 1 - rate * decay."""
    fresh = fresh_lora(seed=0)
    for run, factor in (("decay", 1 - LEARNING_RATE * 0.5), ("dropout", 1.0)):
        stepped = load_file(one_step[run] / "adapter_model.safetensors")
        names = [name for name in stepped if "lora_A" in name]
        assert len(names) == 14  # seven linear modules in two layers
        for name in names:
            np.testing.assert_allclose(stepped[name], fresh[name] * factor, rtol=1e-6)


def test_dropout_changes_the_gradients(one_step: dict[str, Path]) -> None:
    """Adam's first step is the rate times the gradient's sign: with half of the inputs gone, some signs are others."""
    signs = [
        torch.cat([values.sign().flatten() for name, values in sorted(adapter.items()) if "lora_B" in name])
        for adapter in (load_file(one_step[run] / "adapter_model.safetensors") for run in ("decay", "dropout"))
    ]
    assert (signs[0] != signs[1]).float().mean() > 0.02
    assert read_json(one_step["dropout"] / "adapter_config.json")["lora_dropout"] == 0.5


def test_alpha_and_rslora_reach_the_adapter(one_step: dict[str, Path]) -> None:
    config, default = (read_json(one_step[run] / "adapter_config.json") for run in ("lora", "decay"))
    assert (config["lora_alpha"], config["use_rslora"]) == (3.0, False)
    assert (default["lora_alpha"], default["use_rslora"]) == (4.0, True)  # twice the root of the rank


def test_the_seed_draws_the_fresh_lora(one_step: dict[str, Path]) -> None:
    """A stays as it was drawn: without a gradient in the first step, and without decay."""
    stepped, of_run, of_default = (
        load_file(one_step["lora"] / "adapter_model.safetensors"),
        fresh_lora(1),
        fresh_lora(0),
    )
    names = [name for name in stepped if "lora_A" in name]
    assert len(names) == 14
    for name in names:
        assert torch.equal(stepped[name], of_run[name])
        assert not torch.equal(stepped[name], of_default[name])


def test_a_run_that_is_replaced_while_it_is_read_is_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings would be those of one run and its adapter that of another."""
    monkeypatch.chdir(tmp_path)
    write_questions(Path("data/test.csv"), make_rows(2), labelled=False)
    run, other = (make_run(Path("checkpoints", name), seed=seed) for seed, name in enumerate(("run", "other")))

    def replace_then_load(*args: Any, **kwargs: Any) -> LanguageModel:
        shutil.rmtree(run)
        shutil.copytree(other, run)
        return load(*args, **kwargs)

    monkeypatch.setattr("ksat.models.load", replace_then_load)
    with pytest.raises(InputError, match="checkpoints/run: another run took its place while it was read"):
        inference.main([*CPU, "--ckpt", str(run), "--test", "data/test.csv", "--out", "x"])
    assert not list(Path("submissions").glob("x.*"))
