"""The trainer: TRL's SFTTrainer owns the loop, resume and logging; one optimizer step sees exactly --questions-per-step
questions, split into as few packs as the token budget allows. Import it after models.import_engine."""

import contextlib
import errno
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ksat import processes
from ksat.children import how_to_go_on
from ksat.devices import peak_memory_gib
from ksat.encoding import EncodedQuestion
from ksat.errors import InputError
from ksat.files import write_text
from ksat.language_model import LanguageModel
from ksat.packing import Pack, build_pack, plan_packs
from ksat.run_folders import CURVES, is_sealed, seal, step_of, whole_saves
from ksat.scoring import finite_remedy, progress_bar
from ksat.step_memory import StepMemory, out_of_memory

SECONDS_BETWEEN_SAVES = 300.0


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What the loop needs.

    Attributes:
        epochs: passes over the training questions.
        lr: peak learning rate.
        questions_per_step: questions in one optimizer step.
        pack_tokens: budget of one forward and backward pass, in tokens.
        schedule: "cosine", "linear" or "constant".
        warmup: share of the steps in which the rate rises from 0.
        weight_decay: of AdamW.
        scale: factor on the scores before the softmax; the one that inference uses.
        seed: order of the questions, dropout.
        report_to: "none", or a logger that transformers knows.
        loss: "choices", softmax over the row's own choices, or "vocab", cross-entropy of the answer over the vocabulary.
    """

    epochs: int
    lr: float
    questions_per_step: int
    pack_tokens: int
    schedule: str
    warmup: float
    weight_decay: float
    scale: float
    seed: int
    report_to: str
    loss: str


def choice_losses(scores: torch.Tensor, answer_indices: torch.Tensor, scale: float) -> torch.Tensor:
    """(n,) -log p(answer) of each row, p the softmax of scale * scores over the row's own choices.

    Args:
        scores: (n, K), -inf where a choice does not exist.
        answer_indices: (n,) counted from 0.
        scale: as in inference.
    """
    return torch.nn.functional.cross_entropy(scale * scores, answer_indices, reduction="none")


def as_completion(question: EncodedQuestion) -> EncodedQuestion:
    """The question with nothing behind its prompt but the answer: what `--loss vocab` trains, as TRL and Unsloth do.

    Its score over the vocabulary is the mean log-probability of the answer's tokens.
    """
    if question.answer_index is None:
        raise ValueError(f"question {question.id!r} has no answer to train on")
    tokens = question.continuations[question.answer_index]
    return replace(question, continuations=(tokens,), divisors=(float(len(tokens)),), answer_index=0)


def group_orders(questions: Sequence[EncodedQuestion]) -> list[list[int]]:
    """The rows of each question: an order of its choices is a row of its own, behind the first."""
    groups: list[list[int]] = []
    for row, question in enumerate(questions):
        if question.order == 0:
            groups.append([])
        groups[-1].append(row)
    return groups


class StepSampler(Sampler[list[int]]):
    """Batches of an epoch: each the questions of one optimizer step, in an order that follows from seed and epoch.

    Every process draws the same batches and computes its share of each.
    """

    def __init__(self, num_questions: int, questions_per_step: int, seed: int) -> None:
        self.num_questions, self.questions_per_step, self.seed, self.epoch = num_questions, questions_per_step, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_questions // self.questions_per_step)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_questions, generator=generator).tolist()
        for start in range(0, self.num_questions, self.questions_per_step):
            yield order[start : start + self.questions_per_step]


class _StepLoader(DataLoader[Any]):
    """Tells its sampler the epoch, which the Trainer asks of a loader."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class ChoiceTrainer(SFTTrainer):
    """SFTTrainer whose batch is one step's questions and whose loss is the mean over them, however they are packed and
    however many processes share them."""

    def __init__(
        self,
        model: LanguageModel,
        questions: Sequence[EncodedQuestion],
        settings: TrainSettings,
        folder: Path,
        memory: StepMemory | None = None,
    ) -> None:
        self.language_model, self.settings = model, settings
        self.memory = memory or StepMemory(model)
        self.questions = [as_completion(q) for q in questions] if settings.loss == "vocab" else list(questions)
        self.groups = group_orders(questions)
        super().__init__(
            model=model.model,
            args=_trainer_arguments(model, settings, folder, num_questions=len(self.groups)),
            train_dataset=Dataset.from_dict({"question": list(range(len(self.groups)))}),
            data_collator=lambda batch: {"questions": torch.tensor([item["question"] for item in batch])},
            processing_class=model.tokenizer,
        )
        # TRL casts the adapter of a quantised base to bf16; the fp16 scaler then fails, and bf16 loses small updates.
        for parameter in model.model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float64:
                parameter.data = parameter.data.float()
        # Several processes add up their gradients themselves, once a step; DistributedDataParallel would do so once a pack.
        model.model._is_accelerate_prepared = True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The steps' questions; not split by accelerate, because processes share packs, not questions."""
        sampler = StepSampler(len(self.groups), self.settings.questions_per_step, self.settings.seed)
        dataset: Any = self.train_dataset
        return _StepLoader(dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of one step's questions, pack by pack; returns their mean loss over all processes."""
        model.train()
        batch = [row for question in inputs["questions"].tolist() for row in self.groups[question]]
        weights = {row: 1 / (len(inputs["questions"]) * self.questions[row].num_orders) for row in batch}
        plan = plan_packs(
            self.questions,
            self.settings.pack_tokens,
            batch=batch,
            layout=self.language_model.layout,
            multiple=processes.num_processes(),
        )
        total = self._backward(processes.share(plan), weights)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.scale(total)  # a process without a pack would have none to unscale with
        processes.add_up([total, *self._gradients()])
        return total

    def _backward(self, plan: list[list[int]], weights: dict[int, float]) -> torch.Tensor:
        """The weighted loss of these packs; adds their gradients.

        Out of memory lowers the memory plan, or halves the pack if all its layers recompute already, and repeats the packs of
        the step, all of them: a backward pass that broke off has added a part of its gradients.
        """
        while True:
            total = torch.zeros((), device=self.language_model.device)
            try:
                for n, rows in enumerate(plan):  # noqa: B007  # the error below is that of pack n
                    pack = build_pack(self.questions, rows, layout=self.language_model.layout)
                    total += self._backward_pack(pack, weights)
                return total
            except torch.OutOfMemoryError as error:
                if not self.memory.lower():
                    if len(rows) == 1:
                        raise out_of_memory(self.questions[rows[0]]) from error
                    plan = [*plan[:n], rows[: len(rows) // 2], rows[len(rows) // 2 :], *plan[n + 1 :]]
            self.language_model.model.zero_grad()
            torch.cuda.empty_cache()

    def _backward_pack(self, pack: Pack, weights: dict[int, float]) -> torch.Tensor:
        self.memory.prepare(pack)
        over_vocabulary = self.settings.loss == "vocab"
        scores = self.language_model.choice_scores(pack, over_vocabulary=over_vocabulary)
        self._require_finite(pack, scores)
        answers = torch.from_numpy(pack.answer_indices).to(scores.device)
        losses = -scores[:, 0] if over_vocabulary else choice_losses(scores, answers, self.settings.scale)
        loss = (losses * losses.new_tensor([weights[row] for row in pack.rows.tolist()])).sum()
        self.accelerator.backward(loss)
        return loss.detach()

    def calibrate(self) -> None:
        """Corrects the memory plan by two probe packs before the first step."""
        if self.memory.plan is None:
            return
        self.language_model.model.train()
        trainable = sum(p.numel() for p in self.language_model.model.parameters() if p.requires_grad)
        # In the place of the two 8-bit states of Adam, which the first step will make.
        states = torch.empty(2 * trainable, dtype=torch.uint8, device=self.language_model.device)
        self.memory.calibrate(self.questions, self.settings.pack_tokens, self._probe)
        del states

    def _probe(self, pack: Pack) -> None:
        try:
            self._gradients()  # alive as they are from the second pack of a step on
            scores = self.language_model.choice_scores(pack, over_vocabulary=self.settings.loss == "vocab")
            scores[scores.isfinite()].sum().backward()  # type: ignore[no-untyped-call]
        finally:
            self.language_model.model.zero_grad()

    def _gradients(self) -> list[torch.Tensor]:
        """Every trainable parameter's gradient; zeros where this process had no pack."""
        gradients = []
        for parameter in self.language_model.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        return gradients

    def _require_finite(self, pack: Pack, scores: torch.Tensor) -> None:
        exists = torch.from_numpy(pack.divisors).isfinite().to(scores.device)
        broken = (~scores.isfinite() & exists).any(dim=1)
        if broken.any():
            row = pack.rows[int(broken.nonzero()[0])]
            where = self.language_model.first_overflow(pack) or "the head"
            raise InputError(
                f"question {self.questions[row].id!r}: the model's score is not finite at step {self.state.global_step} (first "
                f"in {where}); lower --lr, or {finite_remedy(self.language_model.dtype)}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, with the mean loss over all steps at the end."""
        if "train_loss" in logs:
            # The Trainer's own figures are of this call: behind a resume they lack the steps before it, and its loss is their
            # sum over the number of all steps. Its history is saved with every checkpoint.
            losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            logs = {"train_loss": sum(losses) / len(losses)}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: run.json describes a run."""


def _trainer_arguments(model: LanguageModel, settings: TrainSettings, folder: Path, *, num_questions: int) -> SFTConfig:
    on_cpu = model.device.type == "cpu"
    num_steps = settings.epochs * -(-num_questions // settings.questions_per_step)
    arguments = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.questions_per_step,
        num_train_epochs=settings.epochs,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        # Rounded down: as a share it is rounded up, and the first of few steps would run at rate 0.
        warmup_steps=int(settings.warmup * num_steps),
        weight_decay=settings.weight_decay,
        optim="adamw_torch" if on_cpu else "adamw_8bit",
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=on_cpu,
        bf16=model.dtype == "bfloat16",
        fp16=model.dtype == "float16",
        gradient_checkpointing=False,  # models.load has set it as the engine wants it
        loss_type="nll",  # the default would patch the model's forward
        max_length=None,
        padding_free=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",  # RunCallback says when
        save_total_limit=2,
        eval_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=settings.report_to,
        disable_tqdm=True,
    )
    if on_cpu:
        # Under gloo accelerate calls it cpu:0, to which torch.load can't restore a checkpoint.
        arguments.__dict__["_setup_devices"] = torch.device("cpu")
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # with several GPUs in sight the Trainer would take n_gpu times the questions a step
    return arguments


class RunCallback(TrainerCallback):
    """Progress bar, log.jsonl, timed saves, and what happens after each epoch."""

    def __init__(
        self,
        settings: TrainSettings,
        num_questions: int,
        log_path: Path,
        after_epoch: Callable[[int], bool],
        on_save: Callable[[Path], None],
        memory: StepMemory,
        *,
        scores_again: bool = False,
    ) -> None:
        self.settings, self.num_questions, self.log_path = settings, num_questions, log_path
        self.after_epoch, self.keep, self.memory, self.scores_again = after_epoch, on_save, memory, scores_again
        self.last_save = time.monotonic()
        self.open_bar = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        per_epoch = -(-self.num_questions // self.settings.questions_per_step)
        epochs_done, steps = divmod(state.global_step, per_epoch)
        done = epochs_done * self.num_questions + steps * self.settings.questions_per_step
        self.bar = self.open_bar.enter_context(
            progress_bar("training", self.settings.epochs * self.num_questions, done)
        )
        self.per_epoch, self.last_save = per_epoch, time.monotonic()
        if self.scores_again and epochs_done and not steps:
            self.after_epoch(epochs_done)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        short = self.per_epoch * self.settings.questions_per_step - self.num_questions
        is_last = state.global_step % self.per_epoch == 0
        self.bar.update(self.settings.questions_per_step - (short if is_last else 0))
        # Not behind an epoch's last step: a checkpoint that counts the epoch as done would skip its validation on --resume.
        if processes.agree(time.monotonic() - self.last_save > SECONDS_BETWEEN_SAVES) and not is_last:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        if not processes.is_main():
            return
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": state.global_step, **logs, **self.memory.to_dict()}) + "\n")
        if "loss" in logs:
            self.bar.set_postfix(
                {"loss": f"{logs['loss']:.3f}", "memory": f"{peak_memory_gib():.1f} GiB"}, refresh=False
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after_epoch(round(state.global_step / self.per_epoch)):
            control.should_training_stop = True
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        processes.wait()  # each process writes the state of its random numbers there
        if processes.is_main():
            save = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.keep(save)
            seal(save)
        self.last_save = time.monotonic()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of the trainer that is as it was written; None if there is none."""
    return next(whole_saves(folder), None)


def check_logger(name: str) -> None:
    """Raises InputError unless `name` is "none" or a logger that transformers knows and that is installed."""
    if name == "none":
        return
    try:
        for callback in get_reporting_integration_callbacks([name]):
            callback()
    except (ImportError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--report-to {name}: {reason}; install it, or leave the flag out") from error


def _forget_log_after(path: Path, step: int) -> None:
    """Drops what a resumed run will log again, the summary included, and what can't be read."""
    if path.exists():
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            raise InputError(
                f"{path}: can't be read ({error.strerror or error}); move it away, then {how_to_go_on()}"
            ) from error
        lines = text.splitlines(keepends=True)
        write_text(path, "".join(line for line in lines if _logged_before(line, step)))


def _logged_before(line: str, step: int) -> bool:
    try:
        entry = json.loads(line)
        return line.endswith("\n") and entry["step"] <= step and "train_loss" not in entry
    except (ValueError, KeyError, TypeError):
        return False


def _write_failure(error: Exception) -> str | None:
    """What a full or broken disk said, None for an error of another kind: each library has its own way to say it."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    by_torch = isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", str(error))
    by_tokenizers = type(error) is Exception and "(os error " in text
    by_disk = (
        isinstance(error, OSError) and error.errno in _DISK_ERRORS
    )  # no server that can't be reached, no file that is missing
    return text if by_disk or isinstance(error, SafetensorError) or by_torch or by_tokenizers else None


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


def train(
    model: LanguageModel,
    questions: Sequence[EncodedQuestion],
    settings: TrainSettings,
    *,
    folder: Path,
    after_epoch: Callable[[int], bool],
    on_save: Callable[[Path], None] = lambda save: None,
    go_on_from: Path | None = None,
    memory: StepMemory | None = None,
) -> None:
    """Trains the model's LoRA in place; goes on from the last complete checkpoint in `folder`, if there is one.

    Args:
        model: from models.load with a LoRA.
        questions: labelled training questions.
        settings: see TrainSettings.
        folder: takes checkpoints and log.jsonl.
        after_epoch: called with the number of epochs done; True stops early.
        on_save: called with every checkpoint's folder before it is marked as complete.
        go_on_from: the checkpoint in `folder` to take instead; if it stands at an epoch's end, `after_epoch` is called for it again.
        memory: says which layers recompute; none do if it is not given.

    Raises:
        InputError: a score is not finite, the disk is full, or one question alone does not fit the GPU's memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    newest = go_on_from or (last_checkpoint(folder) if processes.is_main() else None)
    checkpoint: Path | None = processes.agree(newest)
    step = step_of(checkpoint) if checkpoint else 0
    if processes.is_main():
        # What a kill left half-written, or is damaged, would only confuse the rotation of checkpoints.
        for path in folder.glob("checkpoint-*"):
            if not is_sealed(path) or step_of(path) > step:
                shutil.rmtree(path)
        _forget_log_after(folder / "log.jsonl", step)
    processes.wait()
    trainer = ChoiceTrainer(model, questions, settings, folder, memory)
    expected = (model.dtype == "bfloat16", model.dtype == "float16")
    if (trainer.args.bf16, trainer.args.fp16) != expected:
        raise RuntimeError(
            f"the trainer was patched to another precision than {model.dtype}; what is trained would not be scored"
        )
    trainer.remove_callback(PrinterCallback)
    for (
        logger
    ) in trainer.callback_handler.callbacks:  # by default the curves lie in `folder`, which goes with the run's end
        if isinstance(logger, TensorBoardCallback) and logger.logging_dir is None:
            logger.logging_dir = str(folder.parent / CURVES)
    callback = RunCallback(
        settings, len(trainer.groups), folder / "log.jsonl", after_epoch, on_save, trainer.memory, scores_again=go_on_from is not None
    )  # fmt: skip
    trainer.add_callback(callback)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}", file=sys.stderr)
    try:
        trainer.calibrate()
        with callback.open_bar:  # closed before an error's line
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        # A child's settings are those of whoever started it.
        otherwise = (
            ", or start another --run with a lower --max-tokens or --rank" if how_to_go_on() == "--resume" else ""
        )
        raise InputError(
            f"out of memory with the largest pack of --pack-tokens {settings.pack_tokens} ({str(error).splitlines()[0]}); lower "
            f"--pack-tokens and {how_to_go_on()}{otherwise}"
        ) from error
    except Exception as error:
        if (reason := _write_failure(error)) is None:
            raise
        raise InputError(f"{folder}: can't be written ({reason}); free space, then {how_to_go_on()}") from error
