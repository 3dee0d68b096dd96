"""Training steps against the definition: the same curve whichever layers recompute, the vocabulary's loss as TRL computes
it, and several orders of a question's choices weighing as much as one."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import make_settings, run
from tiny import base_folder, encode, encode_orders, load_base, make_questions

from ksat.encoding import EncodedQuestion
from ksat.language_model import LanguageModel
from ksat.packing import Pack, build_pack
from ksat.questions import Question
from ksat.step_memory import StepMemory
from ksat.training import ChoiceTrainer, as_completion, choice_losses, group_orders, train

NAMED = Question("named", "글이다.", "옳은 것은?", ("가", "나", "①과 ②"), 2)  # its choices have to stay in order


class Keeping(StepMemory):
    """Has as many of the last layers keep their activations as it is told, pack after pack."""

    def __init__(self, model: LanguageModel, num_kept: list[int]) -> None:
        super().__init__(model)
        self.num_kept, self.used = itertools.cycle(num_kept), set[int]()

    def prepare(self, pack: Pack) -> int:
        kept = next(self.num_kept)
        self.model.keep_activations(kept)
        self.used.add(kept)
        return kept


def drawn_adapter(**how: Any) -> LanguageModel:
    """A tiny model whose LoRA does something: at 0, B would keep A's gradient at 0."""
    model: LanguageModel = load_base(base_folder(), rank=4, **how)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.model.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("score_by", ["label", "text"])
def test_the_loss_curve_does_not_depend_on_what_recomputes(tmp_path: Path, score_by: str) -> None:
    """Every layer kept, every layer recomputed, and another number in every pack; the budget differs as well."""
    questions = encode(make_questions(10), score_by)
    curves = []
    for pack_tokens, num_kept in ((100_000, [2]), (300, [0]), (200, [0, 1, 2]), (1, [1])):
        model, folder = load_base(base_folder(), rank=4), tmp_path / str(pack_tokens)
        memory, settings = Keeping(model, num_kept), make_settings(pack_tokens=pack_tokens, epochs=2)
        train(model, questions, settings, folder=folder, after_epoch=lambda epoch: False, memory=memory)
        assert memory.used == set(num_kept)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        curves.append([entry["loss"] for entry in log if "loss" in entry])
    assert len(curves[0]) == 6
    assert max(curves[0]) - min(curves[0]) > 0.1
    np.testing.assert_allclose(curves[1:], [curves[0]] * 3, rtol=0, atol=1e-4)


def test_a_process_without_a_pack_can_unscale_its_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision with more processes than packs in the first step: gradient clipping asks each one's scaler."""
    trainer = ChoiceTrainer(
        load_base(base_folder(), rank=4), encode(make_questions(4), "label"), make_settings(), tmp_path
    )
    trainer.accelerator.scaler = scaler = torch.amp.GradScaler("cpu")
    monkeypatch.setattr("ksat.processes.share", lambda plan: [])
    assert trainer.training_step(trainer.language_model.model, {"questions": torch.arange(4)}) == 0
    optimizer = torch.optim.AdamW([p for p in trainer.language_model.model.parameters() if p.requires_grad])
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


@pytest.mark.parametrize("score_by", ["label", "text"])
def test_loss_over_the_vocabulary_is_that_of_the_plain_model(tmp_path: Path, score_by: str) -> None:
    """The first step: the mean over questions of the loss that transformers computes where all but the answer is -100."""
    questions = encode(make_questions(6), score_by)
    plain = load_base(base_folder(), share_prefixes=False).model
    expected = []
    for question in questions:
        answer = question.continuations[question.answer_index]
        labels = torch.tensor([[-100] * len(question.prompt_ids) + list(answer)])
        with torch.no_grad():
            expected.append(plain(input_ids=torch.tensor([question.prompt_ids + answer]), labels=labels).loss.item())
    losses = run(
        load_base(base_folder(), rank=4),
        questions,
        tmp_path,
        loss="vocab",
        questions_per_step=6,
        epochs=8,
        pack_tokens=300,
    )
    assert losses[0] == pytest.approx(np.mean(expected), abs=1e-4)
    assert losses[-1] < 0.8 * losses[0]


def step(questions: list[EncodedQuestion], folder: Path, **changed: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of one step over all questions."""
    model = drawn_adapter(dtype="float64")
    trainer = ChoiceTrainer(model, questions, make_settings(**changed), folder)
    for parameter in model.model.parameters():
        parameter.data = parameter.data.double()
    loss = trainer.training_step(model.model, {"questions": torch.arange(len(trainer.groups))})
    return loss.item(), {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", ["choices", "vocab"])
def test_orders_of_a_question_weigh_as_much_as_a_question_of_one_order(tmp_path: Path, loss: str) -> None:
    questions = encode_orders([*make_questions(3), NAMED], 4)
    assert [len(rows) for rows in group_orders(questions)] == [4, 4, 4, 1]
    model = drawn_adapter(dtype="float64")
    for parameter in model.model.parameters():
        parameter.data = parameter.data.double()
    means = []
    for rows in group_orders(questions):
        losses = []
        for row in rows:
            scores = model.choice_scores(build_pack(questions, [row]), over_vocabulary=True)
            answer = torch.tensor([questions[row].answer_index])
            losses.append(choice_losses(scores, answer, 1.0)[0] if loss == "choices" else -scores[0, answer[0]])
        means.append(sum(losses) / len(losses))
    expected = sum(means) / 4
    expected.backward()
    gradients = {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}
    for pack_tokens in (1, 300, 100_000):
        found, found_gradients = step(questions, tmp_path / str(pack_tokens), loss=loss, pack_tokens=pack_tokens)
        assert found == pytest.approx(expected.item(), abs=1e-5)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert gradient.abs().max() > 1e-4, name
            torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_the_label_that_is_trained_is_the_digit_of_the_right_choice_in_that_order() -> None:
    """Three orders of a question: the right choice's digit moves down by one, and over the vocabulary it is the target."""
    question = make_questions(1)[0]
    orders = encode_orders([question], 3)
    place = question.answer - 1  # type: ignore[operator]
    digits = [load_base(base_folder()).tokenizer.decode(list(as_completion(o).continuations[0])) for o in orders]
    assert digits == [str((place - o) % 4 + 1) for o in range(3)]
    assert [o.continuations[o.answer_index] for o in orders] == [as_completion(o).continuations[0] for o in orders]
