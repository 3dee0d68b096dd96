"""All folds of a file, one training run after the other, and their out-of-fold probabilities as one file.

Each fold is train.py in a process of its own, from a fresh adapter. What is done stays done: the same command goes on.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksat.children import run_script
from ksat.errors import InputError
from ksat.files import read_json, write_json
from ksat.folds import assign_folds
from ksat.kinds import find_kind
from ksat.metrics import Metrics, compute_metrics, format_table, random_baseline
from ksat.predictions import SUBMISSIONS, FloatArray, IntArray, Predictions, read_probs, write_probs
from ksat.questions import Question, passage_key, read_questions
from ksat.runs import read_run


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """What --all trains.

    Attributes:
        run: its name; the folds are checkpoints/<run>-fold0 and so on.
        num_folds: F.
        flags: of train.py, all that the folds have in common.
        key: what must be the same for a started one to go on: flags, files and their hashes.
        checkpoints: folder of the runs.
    """

    run: str
    num_folds: int
    flags: tuple[str, ...]
    key: dict[str, Any]
    checkpoints: Path

    def folder(self, fold: int) -> Path:
        """Of a fold's run."""
        return self.checkpoints / f"{self.run}-fold{fold}"

    @property
    def mark(self) -> Path:
        """Says with which settings it was started."""
        return self.checkpoints / f"{self.run}.folds.json"


def cross_validate(plan: CrossValidation, file: Path, *, limit: int | None, overwrite: bool) -> None:
    """Trains every fold, writes submissions/<run>-oof.probs.csv in the order of the file, and prints its figures.

    Args:
        plan: what to train.
        file: the questions that are cut into folds.
        limit: its first so many rows alone.
        overwrite: drop what an earlier call has left.

    Raises:
        InputError: see train_folds and join_folds; or the file can't be cut into so many folds.
    """
    questions = read_questions(file, labelled=True)[:limit]
    assign_folds(questions, plan.num_folds)  # what can't be cut is said before anything is trained
    train_folds(plan, overwrite=overwrite)
    predictions, report = join_folds(plan, questions)
    out = SUBMISSIONS / f"{plan.run}-oof.probs.csv"
    write_probs(out, predictions)
    write_json(out.with_suffix(".json"), report)
    table = format_table(fold_metrics(predictions, questions))
    print(f"\n{table}\n\nwrote {out}: {len(questions)} rows, each scored by the run that did not train on it")


def train_folds(plan: CrossValidation, *, overwrite: bool) -> None:
    """Trains every fold that is not finished.

    Args:
        plan: what to train.
        overwrite: drop what an earlier call has left, finished folds included.

    Raises:
        InputError: an earlier call with other settings has left folds; or a fold fails, with its reason.
    """
    if overwrite:
        plan.mark.unlink(missing_ok=True)
        for fold in range(plan.num_folds):
            shutil.rmtree(plan.folder(fold), ignore_errors=True)
    if plan.mark.exists() and read_json(plan.mark) != plan.key:
        raise InputError(
            f"--run {plan.run}: {plan.mark} was started with other settings or files; choose another --run, or --overwrite"
        )
    if not plan.mark.exists():
        if taken := [str(plan.folder(k)) for k in range(plan.num_folds) if plan.folder(k).exists()]:
            raise InputError(
                f"--run {plan.run}: {taken[0]} exists and is not its fold; choose another --run, or --overwrite"
            )
        write_json(plan.mark, plan.key)
    for fold in range(plan.num_folds):
        folder = plan.folder(fold)
        if (folder / "run.json").exists():
            print(f"fold {fold}: {folder} is finished")
            continue
        # A folder without settings was cut off before its first step.
        how = "--resume" if (folder / "settings.json").exists() else "--overwrite"
        command = ["train.py", *plan.flags, "--run", folder.name, "--fold", str(fold), how]
        if reason := run_script(command, plan.checkpoints / f"{folder.name}.log"):
            raise InputError(
                f"fold {fold} of {plan.run}: {reason}; mend it and run the same command again: finished folds stay"
            )


def join_folds(plan: CrossValidation, questions: Sequence[Question]) -> tuple[Predictions, dict[str, Any]]:
    """The out-of-fold probabilities of all folds in the order of the questions, and where they come from.

    Raises:
        InputError: a fold is damaged, or was held out by another assignment.
    """
    found: dict[str, FloatArray] = {}
    members = []
    assignments = set()
    for fold in range(plan.num_folds):
        run = read_run(plan.folder(fold))
        predictions = read_probs(plan.folder(fold) / "validation.probs.csv")
        if twice := [row_id for row_id in predictions.ids if row_id in found]:
            raise InputError(
                f"{plan.folder(fold)}: id {twice[0]!r} is held out by another fold as well; train with --overwrite"
            )
        found.update(zip(predictions.ids, predictions.probs, strict=True))
        assignments.add(run.settings["folds_sha256"])
        members.append({"run": plan.folder(fold).name, "adapter_sha256": run.adapter_sha256})
    missing = [question.id for question in questions if question.id not in found]
    if missing or len(found) > len(questions) or len(assignments) > 1:
        raise InputError(
            f"--run {plan.run}: the folds hold out {len(found)} rows by {len(assignments)} assignments, {len(missing)} of the file's "
            "are missing; train with --overwrite"
        )
    probs = np.stack([found[question.id] for question in questions])
    report = {
        "out_of_fold": True,
        "base": run.base,
        "folds": plan.num_folds,
        "folds_sha256": assignments.pop(),
        "members": members,
    }
    return Predictions(tuple(question.id for question in questions), probs), report


def fold_metrics(predictions: Predictions, questions: Sequence[Question]) -> list[tuple[str, Metrics]]:
    """Named figures of out-of-fold probabilities: the uniform guess, all rows, and those of either kind."""
    answers: IntArray = np.array([question.answer_index + 1 for question in questions], dtype=np.int64)
    groups = [passage_key(question) for question in questions]
    kinds = np.array([find_kind(question) for question in questions])
    rows = [("uniform guess", random_baseline(predictions.num_choices, answers))]
    rows.append(("out of fold", compute_metrics(predictions.probs, answers, groups)))
    for kind in ("reading", "knowledge"):
        chosen = np.flatnonzero(kinds == kind)
        if 0 < len(chosen) < len(questions):
            rows.append(
                (kind, compute_metrics(predictions.probs[chosen], answers[chosen], [groups[i] for i in chosen]))
            )
    return rows
