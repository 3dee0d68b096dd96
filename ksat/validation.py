"""What the validation rows say: the untuned control before the first step, every epoch, and which epoch was best."""

import contextlib
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksat import processes
from ksat.encoding import EncodedQuestion
from ksat.errors import InputError
from ksat.files import read_json, write_json
from ksat.language_model import LanguageModel
from ksat.metrics import (
    MOST_FREQUENT,
    SCALE_RANGE,
    UNIFORM,
    Metrics,
    compute_metrics,
    fit_scale,
    format_table,
    position_probs,
    random_baseline,
)
from ksat.near_duplicates import passage_groups
from ksat.predictions import Predictions, sizes_and_answers, write_probs
from ksat.questions import Question
from ksat.run_folders import damaged_file, is_sealed, kept_epochs, seal, whole_saves
from ksat.scoring import FloatArray, choice_probs, score_questions
from ksat.sealed import Rule, number, or_none, read_sealed, whole, write_sealed

PROGRESS_FILE = "progress.json"


def _progress_rules(has_rows: bool, elsewhere: Sequence[str]) -> dict[str, Rule]:
    """Of progress.json, with or without validation rows."""
    is_count, _ = whole(0, 2**53)

    def is_metrics(value: Any) -> bool:
        loss = value.get("log_loss") if isinstance(value, dict) else None
        if not isinstance(loss, dict) or not loss.keys() >= {"low", "high"} or not is_count(value.get("num_groups")):
            return False
        is_number = {name: type(loss.get(name)) in (int, float) for name in ("value", "low", "high")}
        return is_number["value"] and all(is_number[name] or loss[name] is None for name in ("low", "high"))

    def are_epochs(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(entry, dict)
            and type(entry.get("epoch")) is int
            and is_metrics(entry) == has_rows
            and of_each_file(is_metrics, entry.get("elsewhere"))
            and entry.get("lost", True) is True
            for entry in value
        )

    def of_each_file(holds: Callable[[Any], bool], value: Any) -> bool:
        return isinstance(value, dict) and value.keys() == set(elsewhere) and all(map(holds, value.values()))

    def is_control(value: Any) -> bool:
        return isinstance(value, dict) and is_metrics(value.get("control")) and is_metrics(value.get("random"))

    metrics: Rule = (is_metrics if has_rows else lambda value: value is None, "metrics" if has_rows else "null")
    return {
        "scale": number(lambda value: 1 <= value <= SCALE_RANGE[1], "1 to 1000"),
        "fitted_scale": or_none(number(lambda value: SCALE_RANGE[0] <= value <= SCALE_RANGE[1], "0.01 to 1000")),
        "control": metrics,
        "control_scale_1": metrics,
        "random": metrics,
        "most_frequent_position": metrics,
        "elsewhere": (lambda value: of_each_file(is_control, value), "metrics of the other files"),
        "epochs": (are_epochs, "epochs with their metrics"),
        "best_epoch": whole(0),
    }


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows of one file that are not trained on.

    Attributes:
        name: the file's.
        questions: N labelled ones.
        encoded: the same, in the same order.
    """

    name: str
    questions: Sequence[Question]
    encoded: Sequence[EncodedQuestion]

    def judge(self) -> Callable[[FloatArray], Metrics]:
        """What (N, 5) probabilities of these rows are worth, as a function: the passages are grouped once."""
        _, answers = sizes_and_answers(self.questions)
        groups = passage_groups(self.questions)
        return lambda probs: compute_metrics(probs, answers, groups)


class Validation:
    """Scores the validation rows and keeps the adapter of the best epoch; goes on where an interrupted run stopped.

    `chooses=False` keeps the last epoch instead and never stops early: the rows are held out to judge, and what judges must
    not choose. `positions` counts where the training rows' answers stand (ksat.metrics.count_positions). Rows of other files,
    `elsewhere`, never choose: each file's figures show what training does to questions of its kind.

    progress.json in `folder` is its memory: scale, the control's metrics, each epoch's. Without validation rows it only
    keeps the last epoch's adapter. Every save of the trainer has a copy, `keep_in`. Where progress.json or the best epoch's adapter is
    damaged, `go_on_from` is the save from which training makes them again; None leaves it to the trainer.

    `scale_set` gives labelled rows to fit the scale on; it is called by text alone, where the validation rows choose nothing or there
    are none.
    """

    def __init__(
        self,
        model: LanguageModel,
        questions: Sequence[Question],
        encoded: Sequence[EncodedQuestion],
        *,
        folder: Path,
        score_by: str,
        pack_tokens: int,
        patience: int,
        positions: Mapping[str, Sequence[int]],
        chooses: bool = True,
        scale_set: Callable[[], Sequence[EncodedQuestion]] = tuple,
        elsewhere: Sequence[HeldOut] = (),
    ) -> None:
        self.model, self.questions, self.encoded, self.folder = model, questions, encoded, folder
        self.elsewhere = [(part, part.judge()) for part in elsewhere]
        self.score_by, self.pack_tokens, self.patience = score_by, pack_tokens, patience
        self.positions = positions
        self.chooses = chooses and bool(questions)
        self.scale_set = scale_set
        self.num_choices, self.answers = sizes_and_answers(questions)
        self._metrics = HeldOut("", questions, encoded).judge()
        self.path = folder / PROGRESS_FILE
        self.progress: dict[str, Any]
        self.go_on_from: Path | None
        self.progress, self.go_on_from = processes.agree(self._recall() if processes.is_main() else None)

    def _recall(self) -> tuple[dict[str, Any], Path | None]:
        """What an interrupted run knew, and the save to go on from where an adapter has to be made again."""
        trainer = self.folder / "trainer"
        if not (self.path.exists() or trainer.exists()):
            return {}, None
        try:
            progress, damage = self._read(self.path), ""
            if self._has_best(progress):
                return progress, None
        except InputError as error:
            progress, damage = {}, str(error)
        saves = list(whole_saves(trainer))
        if damage and saves:
            with contextlib.suppress(InputError):  # a version before this one kept no copy
                progress = self._read(saves[0] / PROGRESS_FILE)
        if progress and saves:
            if self._has_best(progress):
                print(f"{damage}; training goes on from {saves[0].name}", file=sys.stderr)
                return progress, None
            return self._go_back(progress, saves, damage)
        damage = damage or f"{self._kept(progress['best_epoch'])}: damaged"
        print(f"{damage}; training starts again from its first step", file=sys.stderr)
        shutil.rmtree(trainer, ignore_errors=True)
        return {}, None

    def _go_back(self, progress: dict[str, Any], saves: list[Path], damage: str) -> tuple[dict[str, Any], Path]:
        """Where the best epoch's adapter is damaged: what is known at the save from which training makes one again, and that save.

        It is the newest, if the last epoch is kept; else one before the best epoch's end, or at it, so that the epoch gets its adapter
        again, to the same bits. Where there is none the newest has to do, and no epoch before it can be chosen any more: of those
        only the best one's adapter was kept.
        """
        best = progress["best_epoch"]
        usable = [save for save in saves if not self.chooses or _epochs_done(save) <= best]
        save = (usable or saves)[0]
        known = [entry for entry in progress["epochs"] if entry["epoch"] < _epochs_done(save)]
        told = f"{damage and f'{damage}; '}{self._kept(best)}: damaged; training goes on from {save.name}"
        if not usable:
            told += f", and epoch {best} can't be chosen any more; to have it again start the run anew with --overwrite"
        print(told, file=sys.stderr)
        if self.chooses:
            known = [entry | {"lost": True} for entry in known]
        return progress | {"epochs": known, "best_epoch": 0}, save

    def _has_best(self, progress: dict[str, Any]) -> bool:
        """Whether the best epoch's adapter is as it was written, or there is no epoch to choose."""
        epochs = [entry["epoch"] for entry in progress["epochs"] if "lost" not in entry]
        kept = self._kept(progress["best_epoch"])
        return not epochs or (progress["best_epoch"] in epochs and is_sealed(kept) and damaged_file(kept) is None)

    def _kept(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch}"

    def _read(self, path: Path) -> dict[str, Any]:
        rules = _progress_rules(bool(self.questions), [part.name for part, _ in self.elsewhere])
        return read_sealed(path, rules, "it is not used")

    def keep_in(self, save: Path) -> None:
        """Puts a copy of what is known into a save of the trainer; call it in the process that writes."""
        write_sealed(save / PROGRESS_FILE, self.progress)

    @property
    def scale(self) -> float:
        """Factor on the scores in training and inference: 1 by label; by text the one fitted on the untuned base's scores of
        the rows that choose, or else of rows of the training file, but at least 1. A smaller fit says that the scores carry next to
        nothing there (0.01 was seen on 26 rows); trained at it, the loss would hardly depend on the weights."""
        return float(self.progress["scale"])

    @property
    def best_epoch(self) -> int:
        return int(self.progress["best_epoch"])

    @property
    def has_stopped(self) -> bool:
        """Whether patience was at its end in the run that is resumed."""
        return bool(self.progress.get("best_epoch")) and self._patience_ended()

    def control(self) -> None:
        """Scores the untuned base, fits the scale, and prints both beside the baselines that read nothing."""
        if "scale" in self.progress:
            return
        self.progress = {
            "scale": 1.0,
            "fitted_scale": None,
            "control": None,
            "control_scale_1": None,
            "random": None,
            "most_frequent_position": None,
            "elsewhere": {},
            "epochs": [],
            "best_epoch": 0,
        }
        scores = self._scores(self.encoded) if self.questions else None
        fitted = self._fit_scale(scores)
        self.progress |= {"fitted_scale": fitted, "scale": max(1.0, fitted or 1.0)}
        if scores is not None:
            raw, control = (self._metrics(choice_probs(scores, scale)) for scale in (1.0, fitted or 1.0))
            baseline = random_baseline(self.num_choices, self.answers)
            by_position = self._metrics(position_probs(self.positions, self.num_choices))
            rows = [(UNIFORM, baseline), (MOST_FREQUENT, by_position), ("untuned base", raw)]
            rows += [(f"untuned base, scale {fitted:.2f}", control)] if fitted else []
            print(f"\nvalidation before the first step\n{format_table(rows)}\n", flush=True)
            self.progress |= {
                name: m.to_dict()
                for name, m in (
                    ("control", control),
                    ("control_scale_1", raw),
                    ("random", baseline),
                    ("most_frequent_position", by_position),
                )
            }
        found = self._metrics_elsewhere()
        for part, judge in self.elsewhere:
            sizes, answers = sizes_and_answers(part.questions)
            baseline, untuned = random_baseline(sizes, answers), found[part.name]
            by_position = judge(position_probs(self.positions, sizes))
            self.progress["elsewhere"][part.name] = {
                "control": untuned.to_dict(),
                "random": baseline.to_dict(),
                "most_frequent_position": by_position.to_dict(),
            }
            rows = [(UNIFORM, baseline), (MOST_FREQUENT, by_position), ("untuned base", untuned)]
            print(f"{part.name}, which chooses nothing\n{format_table(rows)}\n", flush=True)
        if fitted and fitted < 1:
            print("the untuned scores say next to nothing about these rows: training and inference use scale 1\n")
        self._write()

    def _fit_scale(self, scores: FloatArray | None) -> float | None:
        """By text the scale of the untuned base, on the rows of these scores where they choose; None by label."""
        if self.score_by != "text":
            return None
        if self.chooses and scores is not None:
            return fit_scale(scores, self.answers - 1)
        rows = self.scale_set()
        own = score_questions(self.model, rows, pack_tokens=self.pack_tokens, progress="scale")
        fitted = fit_scale(own, np.array([row.answer_index for row in rows], dtype=np.int64))
        print(f"scale {fitted:.2f}: fitted on {len(rows)} rows of the training file\n", flush=True)
        return fitted

    def after_epoch(self, epoch: int) -> bool:
        """Scores the rows, keeps the adapter if this epoch is the best so far; True when patience has ended."""
        entries = [
            entry for entry in self.progress["epochs"] if entry["epoch"] < epoch
        ]  # a resumed run repeats an epoch
        entry: dict[str, Any] = {"epoch": epoch}
        rows = []
        if self.questions:
            probs = choice_probs(self._scores(self.encoded), self.scale)
            metrics = self._metrics(probs)
            entry |= metrics.to_dict()
            rows.append((f"epoch {epoch}", metrics))
        found = self._metrics_elsewhere()
        entry["elsewhere"] = {name: each.to_dict() for name, each in found.items()}
        rows += [(f"epoch {epoch}, {name}", each) for name, each in found.items()]
        if rows:
            print(f"\nvalidation after epoch {epoch}\n{format_table(rows)}\n", flush=True)
        self.progress["epochs"] = [*entries, entry]
        best = min(
            [entry, *(each for each in entries if "lost" not in each)],
            key=lambda e: _log_loss(e) if self.chooses else -e["epoch"],
        )
        self.progress["best_epoch"] = best["epoch"]
        if self.best_epoch == epoch and processes.is_main():
            beside, kept = (self.folder / name for name in (f".epoch-{epoch}.tmp", f"epoch-{epoch}"))
            shutil.rmtree(beside, ignore_errors=True)
            self._save_adapter(beside)
            if self.questions:
                write_probs(beside / "validation.probs.csv", Predictions(tuple(q.id for q in self.questions), probs))
            seal(beside)
            shutil.rmtree(kept, ignore_errors=True)
            beside.replace(kept)
        self._write()
        if processes.is_main():
            for other in kept_epochs(self.folder):
                if other.name != f"epoch-{self.best_epoch}":
                    shutil.rmtree(other)
        return self._patience_ended()

    def _save_adapter(self, folder: Path) -> None:
        # save_embedding_layers: "auto" would ask the hub whether the vocabulary was resized; it never is.
        self.model.model.save_pretrained(folder, save_embedding_layers=False)
        config = read_json(folder / "adapter_config.json")
        if isinstance(config["target_modules"], list):  # a set in PEFT, whose order differs from process to process
            config["target_modules"].sort()
        write_json(folder / "adapter_config.json", config)

    def _write(self) -> None:
        if processes.is_main():
            write_sealed(self.path, self.progress)

    def warn(self) -> None:
        """The untuned base is often hard to beat, and a fine-tune can hurt elsewhere; a user should hear of it before the test set does."""
        entry = next(entry for entry in self.progress["epochs"] if entry["epoch"] == self.best_epoch)
        if self.questions and (best := _log_loss(entry)) >= (control := _log_loss(self.progress["control"])):
            print(
                f"warning: no epoch beats the untuned base on validation (log loss {best:.3f}, untuned {control:.3f}); "
                "compare both with inference.py before you submit",
                file=sys.stderr,
            )
        if self.questions:
            self._warn_of_guess("validation", entry, self.progress, "lower --lr, or train on more rows")
        for name, before in self.progress["elsewhere"].items():
            remedy = "train on some of them too"
            if _log_loss(before["control"]) < _log_loss(entry["elsewhere"][name]):
                remedy += ", or blend it with the untuned base there"
            self._warn_of_guess(name, entry["elsewhere"][name], before, remedy)

    def _warn_of_guess(self, name: str, after: dict[str, Any], before: dict[str, Any], remedy: str) -> None:
        """Warns where log loss is above a uniform guess's by more than chance: its interval ends above that."""
        low, high, guess = after["log_loss"]["low"], after["log_loss"]["high"], _log_loss(before["random"])
        if low_end(after) > guess:
            print(
                f"warning: {name}: log loss {_log_loss(after):.3f} [{low:.3f}, {high:.3f}] after epoch {self.best_epoch}, untuned "
                f"{_log_loss(before['control']):.3f}, a uniform guess {guess:.3f}; on such rows this run's probabilities are worth less than "
                f"a guess's: {remedy}",
                file=sys.stderr,
            )

    def _patience_ended(self) -> bool:
        return self.chooses and self.progress["epochs"][-1]["epoch"] - self.best_epoch >= self.patience

    def _metrics_elsewhere(self) -> dict[str, Metrics]:
        return {
            part.name: judge(choice_probs(self._scores(part.encoded), self.scale)) for part, judge in self.elsewhere
        }

    def _scores(self, encoded: Sequence[EncodedQuestion]) -> FloatArray:
        return score_questions(self.model, encoded, pack_tokens=self.pack_tokens, progress="validation")


def _epochs_done(save: Path) -> float:
    """How many epochs were done when the trainer saved this: a whole number at an epoch's end."""
    return float(read_json(save / "trainer_state.json")["epoch"])


def _log_loss(metrics: dict[str, Any]) -> float:
    return float(metrics["log_loss"]["value"])


def low_end(metrics: dict[str, Any]) -> float:
    """Where the 95 % interval of a log loss begins, as wide as Student's t makes it: a bootstrap of a few passages is too narrow."""
    from scipy.stats import t

    num_groups, value, low = metrics["num_groups"], _log_loss(metrics), metrics["log_loss"]["low"]
    if low is None or num_groups < 2:
        return -math.inf
    wider = t.ppf(0.975, num_groups - 1) / t.ppf(0.975, math.inf) * math.sqrt(num_groups / (num_groups - 1))
    return float(value - wider * (value - low))
