"""The trainer: the loss by hand, steps of exactly so many questions, and what is trained is what is scored."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, base_folder, encode, load_base, make_questions

from ksat.devices import Device
from ksat.encoding import EncodedQuestion
from ksat.errors import InputError
from ksat.language_model import LanguageModel
from ksat.models import LoadSettings, load
from ksat.packing import Pack, build_pack
from ksat.run_folders import seal
from ksat.scoring import _finite_scores, choice_probs, score_questions
from ksat.training import ChoiceTrainer, TrainSettings, check_logger, choice_losses, last_checkpoint, train


def make_settings(**changed: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "epochs": 1, "lr": 0.01, "questions_per_step": 4, "pack_tokens": 600, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0,
        "scale": 1.0, "seed": 0, "report_to": "none", "loss": "choices",
    }  # fmt: skip
    return TrainSettings(**values | changed)


def run(model: LanguageModel, questions: Sequence[EncodedQuestion], folder: Path, **changed: Any) -> list[float]:
    """Trains and returns the loss of every step."""
    train(model, questions, make_settings(**changed), folder=folder, after_epoch=lambda epoch: False)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in log if "loss" in entry]


def answer_losses(
    model: LanguageModel, questions: Sequence[EncodedQuestion], scale: float = 1.0
) -> np.ndarray[Any, Any]:
    """(N,) -log of the probability that inference reports for the right choice."""
    probs = choice_probs(score_questions(model, questions, pack_tokens=600), scale)
    return -np.log(probs[np.arange(len(questions)), [question.answer_index or 0 for question in questions]])


def test_loss_by_hand() -> None:
    scores = torch.tensor([[0.0, np.log(3.0), -torch.inf], [0.0, 0.0, 0.0]])
    answers = torch.tensor([1, 2])
    assert choice_losses(scores, answers, 1.0).tolist() == pytest.approx([-np.log(0.75), -np.log(1 / 3)])
    assert choice_losses(scores, answers, 2.0).tolist() == pytest.approx([-np.log(0.9), -np.log(1 / 3)])


@pytest.mark.parametrize(("score_by", "scale"), [("label", 1.0), ("text", 2.5)])
def test_mistakes_1_and_2_what_is_trained_is_what_is_scored(tmp_path: Path, score_by: str, scale: float) -> None:
    """The first step's loss is the mean of -log of the very probabilities that inference reports."""
    questions = encode(make_questions(4), score_by)
    model = load_base(base_folder(), rank=4)
    expected = answer_losses(model, questions, scale).mean()
    assert run(model, questions, tmp_path, scale=scale)[0] == pytest.approx(expected, rel=1e-5)


def test_mistake_8_every_question_is_in_the_loss_once_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of exactly four questions, the last one short; each question once an epoch, in another order each time."""
    steps: list[list[str]] = []
    step = ChoiceTrainer.training_step

    def recorded(self: ChoiceTrainer, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        steps.append([self.questions[row].id for row in inputs["questions"].tolist()])
        return step(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(ChoiceTrainer, "training_step", recorded)
    questions = encode(make_questions(10), "label")
    model = load_base(base_folder(), rank=4)
    losses = run(model, questions, tmp_path, epochs=2, lr=1e-9)
    assert [len(rows) for rows in steps] == [4, 4, 2, 4, 4, 2]
    ids = sorted(question.id for question in questions)
    first = [row for step in steps[:3] for row in step]
    second = [row for step in steps[3:] for row in step]
    assert sorted(first) == sorted(second) == ids
    assert first != second
    by_id = dict(zip((q.id for q in questions), answer_losses(model, questions), strict=True))
    for rows, loss in zip(steps, losses, strict=True):  # a mean over the step's own questions, also where it is short
        assert loss == pytest.approx(np.mean([by_id[row_id] for row_id in rows]), rel=1e-4)


@pytest.mark.parametrize("score_by", ["label", "text"])
def test_gradients_do_not_depend_on_packing(tmp_path: Path, score_by: str) -> None:
    questions = encode(make_questions(6), score_by)
    found = []
    for pack_tokens in (1, 300, 10_000):
        model = load_base(base_folder(), rank=4, dtype="float64")
        trainer = ChoiceTrainer(model, questions, make_settings(pack_tokens=pack_tokens), tmp_path / str(pack_tokens))
        torch.manual_seed(0)
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:  # at 0 it would keep A's gradient at 0
                torch.nn.init.normal_(parameter, std=0.05)
        trainer.training_step(model.model, {"questions": torch.arange(6)})
        found.append({name: p.grad for name, p in model.model.named_parameters() if p.grad is not None})
    alone, few, together = found
    assert len(alone) == 28
    for name, gradient in alone.items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(few[name], gradient, atol=1e-6, rtol=0)
        torch.testing.assert_close(together[name], gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("nf4", [False, True], ids=["full precision", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_lowers_its_loss(tmp_path: Path, family: str, nf4: bool) -> None:
    questions = encode(make_questions(4), "label")
    model = load_base(base_folder(family), rank=4, nf4=nf4, share_prefixes=family != "lfm2")
    before = answer_losses(model, questions).mean()
    assert run(model, questions, tmp_path, lr=0.003) == pytest.approx([before], rel=1e-4)
    assert answer_losses(model, questions).mean() < before


@pytest.mark.parametrize(("score_by", "nf4"), [("label", False), ("text", False), ("label", True)])
def test_eight_questions_are_learnt_by_heart(tmp_path: Path, score_by: str, nf4: bool) -> None:
    questions = encode(make_questions(8, share_passages=False), score_by)
    model = load_base(base_folder(hidden_size=64), rank=16, nf4=nf4)
    assert answer_losses(model, questions).mean() > 1.0
    run(model, questions, tmp_path, epochs=25, questions_per_step=8, scale=4.0 if score_by == "text" else 1.0)
    scores = score_questions(model, questions, pack_tokens=600)
    assert np.nanargmax(scores, axis=1).tolist() == [question.answer_index for question in questions]


@pytest.mark.parametrize("nf4", [False, True])
def test_a_saved_adapter_scores_as_the_trained_model(tmp_path: Path, nf4: bool) -> None:
    questions = encode(make_questions(8), "label")
    model = load_base(base_folder(hidden_size=64), rank=4, nf4=nf4)
    before = score_questions(model, questions, pack_tokens=600)
    run(model, questions, tmp_path / "trainer", epochs=2)
    model.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    settings = LoadSettings(
        str(base_folder(hidden_size=64)), "transformers", Device("cpu", "test", (0, 0), 0.0), "float32", nf4, 2048
    )
    loaded = score_questions(load(settings, adapter=tmp_path / "adapter"), questions, pack_tokens=600)
    np.testing.assert_allclose(loaded, score_questions(model, questions, pack_tokens=600), atol=1e-5)
    assert np.nanmax(np.abs(loaded - before)) > 0.05


@pytest.mark.parametrize("nf4", [False, True])
def test_the_adapter_stays_fp32_and_the_base_as_it_was(tmp_path: Path, nf4: bool) -> None:
    """TRL casts the adapter of a quantised base to bf16."""
    questions = encode(make_questions(4), "label")
    model = load_base(base_folder(hidden_size=64), rank=4, nf4=nf4)
    base = {name: p.clone() for name, p in model.model.named_parameters() if not p.requires_grad}
    run(model, questions, tmp_path)
    for name, parameter in model.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
        else:
            assert torch.equal(parameter, base[name]), name


def test_mistake_6_the_last_checkpoint_goes_by_number_and_has_its_mark(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, is_complete in ((998, True), (1002, True), (1003, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if is_complete:
            seal(folder)
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-1002"


def test_a_half_written_checkpoint_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    run(load_base(base_folder(), rank=4), encode(make_questions(8), "label"), tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_score_that_is_not_finite_names_its_question_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = encode(make_questions(4), "label")
    score = LanguageModel.choice_scores

    def broken(self: LanguageModel, pack: Pack, **how: bool) -> torch.Tensor:
        scores = score(self, pack)
        hit = torch.from_numpy(pack.rows == 2)[:, None] & (torch.arange(scores.shape[1]) == 0)
        return scores.masked_fill(hit, torch.nan)

    monkeypatch.setattr(LanguageModel, "choice_scores", broken)
    with pytest.raises(
        InputError,
        match=rf"question '{questions[2].id}': the model's score is not finite at step 0 .first in the head.; lower --lr",
    ):
        run(load_base(base_folder(), rank=4), questions, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        ("float16", "use --dtype bfloat16 or float32, or another base"),
        ("bfloat16", "use --dtype float32, or another base"),
        ("float32", "use another base"),
    ],
)
def test_advice_fits_the_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, remedy: str) -> None:
    """float32 is no remedy for a run that computes in it."""
    questions = encode(make_questions(2), "label")
    model = load_base(base_folder(), rank=4)
    trainer = ChoiceTrainer(model, questions, make_settings(), tmp_path)
    model.dtype = dtype
    scores = torch.full((1, 4), torch.nan)
    pack = build_pack(questions, [0])
    for check in (
        lambda: trainer._require_finite(pack, scores),
        lambda: _finite_scores(model, questions, pack, scores.numpy()),
    ):
        with pytest.raises(InputError, match="not finite") as raised:
            check()
        assert re.search(rf"(; |; lower --lr, or ){re.escape(remedy)}$", str(raised.value))


def test_out_of_memory_says_which_flags_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the optimizer, say: what no smaller pack of one question can help."""

    def full(*args: Any, **how: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(
        InputError, match=r"out of memory with the largest pack of --pack-tokens 600 \(CUDA out.*; lower"
    ):
        run(load_base(base_folder(), rank=4), encode(make_questions(4), "label"), tmp_path)
    monkeypatch.setenv("KSAT_CHILD", "1")  # explore.py started it
    with pytest.raises(InputError, match="; lower --pack-tokens and run the same command again$"):
        run(load_base(base_folder(), rank=4), encode(make_questions(4), "label"), tmp_path)


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LanguageModel, pack: Pack, **how: bool) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(LanguageModel, "choice_scores", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        run(load_base(base_folder(), rank=4), encode(make_questions(4), "label"), tmp_path)


def test_loggers() -> None:
    check_logger("none")
    with pytest.raises(InputError, match="--report-to papyrus: .*install it, or leave the flag out"):
        check_logger("papyrus")


@pytest.mark.parametrize(("schedule", "last"), [("constant", 0.01), ("linear", 0.0025), ("cosine", 0.00146)])
def test_schedules(tmp_path: Path, schedule: str, last: float) -> None:
    """Four steps: the last one is taken at a quarter of the way before the end."""
    run(load_base(base_folder(), rank=4), encode(make_questions(8), "label"), tmp_path, schedule=schedule, epochs=2)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(last, rel=0.01)


def test_packs_hold_the_answers_of_their_rows() -> None:
    questions = encode(make_questions(4), "text")
    pack = build_pack(questions, [2, 0])
    assert pack.answer_indices.tolist() == [questions[2].answer_index, questions[0].answer_index]
