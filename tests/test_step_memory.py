"""The memory plan at work in the trainer: packs that do not fit are repeated, and the gradients stay what they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import make_settings
from tiny import base_folder, encode, load_base, make_questions

from ksat import step_memory
from ksat.errors import InputError
from ksat.language_model import LanguageModel
from ksat.memory import GIB, Calibration, MemoryPlan, ModelShape, StepSettings, kept_bytes
from ksat.packing import Pack, build_pack
from ksat.step_memory import StepMemory, default_pack_tokens, memory_plan
from ksat.training import ChoiceTrainer, train

SETTINGS = StepSettings(rank=4, compute_bytes=4, nf4=False, attention="segments")


@pytest.fixture
def no_gpu_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(step_memory, "measured_peak", lambda: 3 * GIB)


def make_trainer(folder: Path, *, keeps: int | None, budget: int = 600, share_prefixes: bool = True) -> ChoiceTrainer:
    """A trainer over a tiny model whose LoRA does something; its plan allows `keeps` of two layers for a pack of 600 tokens."""
    model = load_base(base_folder(), rank=4, share_prefixes=share_prefixes)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    plan = None
    if keeps is not None:
        shape = ModelShape.from_config(model.decoder.config)
        plan = MemoryPlan(shape, SETTINGS, 0)
        plan.limit = plan.estimate(budget, keeps).total * 1.05 + 1
    questions = encode(make_questions(8), "text")
    return ChoiceTrainer(model, questions, make_settings(pack_tokens=budget), folder, StepMemory(model, plan))


def step_gradients(trainer: ChoiceTrainer) -> dict[str, torch.Tensor]:
    model = trainer.language_model.model
    trainer.training_step(model, {"questions": torch.arange(8)})
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_plan_sets_the_layers() -> None:
    pack = build_pack(encode(make_questions(4), "label"), range(4))
    model = load_base(base_folder(), rank=4)
    plan = MemoryPlan(ModelShape.from_config(model.decoder.config), SETTINGS, 0)
    # Keeping one layer costs what keeping none does: it is the last, and the first to go.
    for keeps, expected in ((2, [False, False]), (1, [True, False])):
        plan.limit = plan.estimate(pack.num_tokens, keeps).total * 1.05 + 1
        assert StepMemory(model, plan).prepare(pack) == keeps
        assert [layer.gradient_checkpointing for layer in model.layers] == expected
    assert StepMemory(model).prepare(pack) == 2
    assert StepMemory(model).to_dict() == {}


class OutOfMemoryOnce:
    """Runs out of memory in the backward pass of the n-th pack, when gradients have been added already."""

    def __init__(self, patch: pytest.MonkeyPatch, times: list[int]) -> None:
        self.times, self.num_packs, self.sizes = times, 0, []
        score = LanguageModel.choice_scores

        def choice_scores(model: LanguageModel, pack: Pack, **how: bool) -> torch.Tensor:
            scores = score(model, pack, **how)
            self.sizes.append(len(pack.rows))
            self.num_packs += 1
            if self.num_packs in self.times:
                first = next(p for name, p in model.model.named_parameters() if "layers.0" in name and "lora_A" in name)
                first.register_hook(self.fail)
            return scores

        patch.setattr(LanguageModel, "choice_scores", choice_scores)

    def fail(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.num_packs in self.times:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return gradient


@pytest.mark.parametrize("keeps", [2, 0])
def test_a_step_that_ran_out_of_memory_has_the_same_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: int, no_gpu_peaks: None
) -> None:
    """Once with layers left to recompute (bit for bit), once with none (the pack is halved)."""
    expected = step_gradients(make_trainer(tmp_path / "a", keeps=2))
    trainer = make_trainer(tmp_path / "b", keeps=2)
    if keeps == 0:
        assert trainer.memory.plan is not None
        trainer.memory.plan.limit = 0.0
    packs = OutOfMemoryOnce(monkeypatch, [2])
    found = step_gradients(trainer)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        tolerance = 0.0 if keeps == 2 else 1e-5
        torch.testing.assert_close(gradient, expected[name], rtol=tolerance, atol=tolerance, msg=name)
    if keeps == 2:
        assert [layer.gradient_checkpointing for layer in trainer.language_model.layers] == [True, False]
        assert packs.sizes[2:] == [*packs.sizes[:2], *packs.sizes[4:]]  # from the first pack of the step on
    else:
        assert sum(packs.sizes[2:]) == 8  # each question once, in one pack more


def train_planned(folder: Path, *, limit: float) -> StepMemory:
    """Trains four questions with a plan of so many bytes, probes first."""
    model = load_base(base_folder(), rank=4)
    memory = StepMemory(model, MemoryPlan(ModelShape.from_config(model.decoder.config), SETTINGS, limit))
    questions = encode(make_questions(4), "label")
    train(model, questions, make_settings(), folder=folder, after_epoch=lambda n: False, memory=memory)
    return memory


@pytest.mark.parametrize("limit", [0.0, 1e12])
def test_one_question_that_does_not_fit_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu_peaks: None, limit: float
) -> None:
    """With a plan that has nothing left to lower, and with one that is lowered to its end, in the probes already."""
    OutOfMemoryOnce(monkeypatch, list(range(1, 100)))
    with pytest.raises(
        InputError, match=r"question 'q-\d+': out of memory with this question alone \(\d+ tokens\); start another"
    ):
        train_planned(tmp_path, limit=limit)


def test_without_a_plan_one_question_that_does_not_fit_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OutOfMemoryOnce(monkeypatch, list(range(1, 100)))
    questions = encode(make_questions(4), "label")
    with pytest.raises(
        InputError, match=r"question 'q-\d+': out of memory with this question alone \(\d+ tokens\); start another"
    ):
        train(
            load_base(base_folder(), rank=4), questions, make_settings(), folder=tmp_path, after_epoch=lambda n: False
        )


def test_a_probe_that_does_not_fit_is_made_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_gpu_peaks: None
) -> None:
    """Packs of more than two questions never fit: the probes and the steps go on with fewer."""
    score, sizes = LanguageModel.choice_scores, []

    def choice_scores(model: LanguageModel, pack: Pack, **how: bool) -> torch.Tensor:
        if len(pack.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        sizes.append(len(pack.rows))
        return score(model, pack, **how)

    monkeypatch.setattr(LanguageModel, "choice_scores", choice_scores)
    assert train_planned(tmp_path, limit=1e12).plan.calibration is not None  # type: ignore[union-attr]
    assert sizes == [1, 2, 2, 2]  # the short probe, the full one, the step


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_two_probes_correct_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """A simulated card whose kernels keep 1.3 times what is counted, with 100 kB of buffers that nobody counted."""
    trainer = make_trainer(tmp_path, keeps=2, share_prefixes=layout == "tree")
    assert trainer.language_model.layout == layout
    memory, plan = trainer.memory, trainer.memory.plan
    assert plan is not None
    before = {name: p.detach().clone() for name, p in trainer.language_model.model.named_parameters()}

    card = Calibration(1.3 * kept_bytes(plan.shape, SETTINGS), 100e3)
    truth = MemoryPlan(plan.shape, SETTINGS, plan.limit, card)

    def peak() -> int:
        num_kept = sum(not layer.gradient_checkpointing for layer in trainer.language_model.layers)
        return int(truth.estimate(memory._tokens, num_kept, memory._longest).allocated)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(step_memory, "measured_peak", peak)
    trainer.calibrate()
    assert plan.calibration is not None
    assert plan.calibration.extra_bytes == pytest.approx(card.extra_bytes, rel=0.01)
    assert plan.calibration.kept_bytes == pytest.approx(card.kept_bytes, rel=0.01)
    assert capsys.readouterr().out.count("layers kept: predicted") == 2
    assert memory._predicted == 0  # the log tells of steps, not of the probes
    for name, parameter in trainer.language_model.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None or not parameter.grad.any()


def test_the_log_holds_predicted_and_measured_peaks(tmp_path: Path, no_gpu_peaks: None, monkeypatch: Any) -> None:
    trainer = make_trainer(tmp_path, keeps=2)
    step_gradients(trainer)
    predicted = trainer.memory._predicted
    assert predicted > 0
    assert trainer.memory.to_dict() == {"predicted_gib": round(predicted / GIB, 2), "peak_gib": 3.0}
    assert trainer.memory._predicted == 0


def test_nothing_is_planned_on_the_cpu() -> None:
    model = load_base(base_folder(), rank=4)
    assert memory_plan(model, rank=4, training=True, over_vocabulary=False) is None
    assert default_pack_tokens(None, [], "tree") == step_memory.CPU_PACK_TOKENS
