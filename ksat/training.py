"""The trainer: TRL's SFTTrainer owns the loop, resume and logging; one optimizer step sees exactly --questions-per-step
questions, split into as few packs as the token budget allows. Import it after models.import_engine."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ksat.encoding import EncodedQuestion
from ksat.errors import InputError
from ksat.models import LanguageModel, peak_memory_gib
from ksat.packing import Pack, build_pack, plan_packs
from ksat.runs import write_text
from ksat.scoring import progress_bar

SECONDS_BETWEEN_SAVES = 300.0
_COMPLETE = "complete"  # marks a trainer checkpoint whose files are all written


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


def choice_loss(scores: torch.Tensor, answer_indices: torch.Tensor, scale: float) -> torch.Tensor:
    """Sum over the questions of -log p(answer), p the softmax of scale * scores over the row's own choices.

    Args:
        scores: (n, K), -inf where a choice does not exist.
        answer_indices: (n,) counted from 0.
        scale: as in inference.
    """
    return torch.nn.functional.cross_entropy(scale * scores, answer_indices, reduction="sum")


class ChoiceTrainer(SFTTrainer):
    """SFTTrainer whose batch is one step's questions and whose loss is the mean over them, however they are packed."""

    def __init__(
        self, model: LanguageModel, questions: Sequence[EncodedQuestion], settings: TrainSettings, folder: Path
    ) -> None:
        self.language_model, self.questions, self.settings = model, questions, settings
        super().__init__(
            model=model.model,
            args=_trainer_arguments(model, settings, folder, num_questions=len(questions)),
            train_dataset=Dataset.from_dict({"row": list(range(len(questions)))}),
            data_collator=lambda batch: {"rows": torch.tensor([item["row"] for item in batch])},
            processing_class=model.tokenizer,
        )
        # TRL casts the adapter of a quantised base to bf16; the fp16 scaler then fails, and bf16 loses small updates.
        for parameter in model.model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float64:
                parameter.data = parameter.data.float()

    def training_step(
        self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward of one step's questions, pack by pack; returns their mean loss."""
        model.train()
        rows = inputs["rows"].tolist()
        total = torch.zeros((), device=self.language_model.device)
        for pack_rows in plan_packs(
            self.questions,
            self.settings.pack_tokens,
            batch=rows,
            as_padded_rows=not self.language_model.shares_prefixes,
        ):
            pack = build_pack(self.questions, pack_rows)
            scores = self.language_model.choice_scores(pack)
            self._require_finite(pack, scores)
            answers = torch.from_numpy(pack.answer_indices).to(scores.device)
            loss = choice_loss(scores, answers, self.settings.scale) / len(rows)
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _require_finite(self, pack: Pack, scores: torch.Tensor) -> None:
        exists = torch.from_numpy(pack.divisors).isfinite().to(scores.device)
        broken = (~scores.isfinite() & exists).any(dim=1)
        if broken.any():
            row = pack.rows[int(broken.nonzero()[0])]
            raise InputError(
                f"question {self.questions[row].id!r}: the model's score is not finite at step {self.state.global_step}; lower "
                "--lr, or use --dtype bfloat16 or float32"
            )

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
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # with several GPUs in sight the Trainer would take n_gpu times the questions a step
    return arguments


class RunCallback(TrainerCallback):
    """Progress bar, log.jsonl, timed saves, and what happens after each epoch."""

    def __init__(
        self, settings: TrainSettings, num_questions: int, log_path: Path, after_epoch: Callable[[int], bool]
    ) -> None:
        self.settings, self.num_questions, self.log_path, self.after_epoch = (
            settings,
            num_questions,
            log_path,
            after_epoch,
        )
        self.last_save = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        per_epoch = -(-self.num_questions // self.settings.questions_per_step)
        epochs_done, steps = divmod(state.global_step, per_epoch)
        done = epochs_done * self.num_questions + steps * self.settings.questions_per_step
        self.bar = progress_bar("training", self.settings.epochs * self.num_questions, done)
        self.per_epoch, self.last_save = per_epoch, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        short = self.per_epoch * self.settings.questions_per_step - self.num_questions
        is_last = state.global_step % self.per_epoch == 0
        self.bar.update(self.settings.questions_per_step - (short if is_last else 0))
        if time.monotonic() - self.last_save > SECONDS_BETWEEN_SAVES:
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        if "loss" in logs:
            self.bar.set_postfix(
                {"loss": f"{logs['loss']:.3f}", "memory": f"{peak_memory_gib():.1f} GiB"}, refresh=False
            )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.after_epoch(round(state.global_step / self.per_epoch)):
            control.should_training_stop = True
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        write_text(Path(args.output_dir) / f"checkpoint-{state.global_step}" / _COMPLETE, "")
        self.last_save = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest trainer checkpoint that was written to its end, by step number; None if there is none."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / _COMPLETE).exists()]
    return max(complete, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


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
    """Drops the steps that a resumed run will log again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        write_text(path, "".join(line for line in whole if json.loads(line)["step"] <= step))


def train(
    model: LanguageModel,
    questions: Sequence[EncodedQuestion],
    settings: TrainSettings,
    *,
    folder: Path,
    after_epoch: Callable[[int], bool],
) -> None:
    """Trains the model's LoRA in place; goes on from the last complete checkpoint in `folder`, if there is one.

    Args:
        model: from models.load with a LoRA.
        questions: labelled training questions.
        settings: see TrainSettings.
        folder: takes checkpoints and log.jsonl.
        after_epoch: called with the number of epochs done; True stops early.

    Raises:
        InputError: a score is not finite, the disk is full, or one question alone does not fit the GPU's memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = last_checkpoint(folder)
    # What a kill left half-written would only confuse the rotation of checkpoints.
    for path in folder.glob("checkpoint-*"):
        if not (path / _COMPLETE).exists():
            shutil.rmtree(path)
    _forget_log_after(folder / "log.jsonl", int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0)
    trainer = ChoiceTrainer(model, questions, settings, folder)
    expected = (model.dtype == "bfloat16", model.dtype == "float16")
    if (trainer.args.bf16, trainer.args.fp16) != expected:
        raise RuntimeError(
            f"the trainer was patched to another precision than {model.dtype}; what is trained would not be scored"
        )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunCallback(settings, len(questions), folder / "log.jsonl", after_epoch))
    if checkpoint is not None:
        print(f"resuming from {checkpoint}", file=sys.stderr)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of memory with --pack-tokens {settings.pack_tokens} ({str(error).splitlines()[0]}); lower --pack-tokens and "
            "--resume; if one question alone is too long, start another --run with a lower --max-tokens"
        ) from error
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its archive writer.
        if isinstance(error, RuntimeError) and not re.search("inline_container|PytorchStreamWriter", str(error)):
            raise
        raise InputError(
            f"{folder}: can't be written ({str(error).splitlines()[0]}); free space, then --resume"
        ) from error
