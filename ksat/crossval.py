"""All folds of a file, one training run after the other, and their out-of-fold probabilities as one file.

Each fold is train.py in a process of its own, from a fresh adapter. What is done stays done: the same command goes on.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksat.children import run_script
from ksat.errors import InputError, show
from ksat.files import claim_outputs, lock, read_json, text_writer, to_json, write_json
from ksat.folds import assign_folds
from ksat.kinds import find_kind
from ksat.metrics import (
    MOST_FREQUENT,
    UNIFORM,
    Metrics,
    compute_metrics,
    format_table,
    held_out_position_probs,
    random_baseline,
)
from ksat.near_duplicates import passage_groups
from ksat.orders import ONE_ORDER
from ksat.predictions import SUBMISSIONS, FloatArray, IntArray, Predictions, probs_writer, read_probs
from ksat.provenance import training_of
from ksat.questions import Question, read_questions
from ksat.run_folders import next_step, require_replaceable
from ksat.runs import read_run

_FOLDS_OWN = ("fold", "best_epoch", "pack_tokens", "answer_positions")  # settings that may differ from fold to fold


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
        """Says with which settings it was started, and what of an earlier one is still to be replaced."""
        return self.checkpoints / f"{self.run}.folds.json"

    @property
    def oof(self) -> Path:
        """The out-of-fold probabilities."""
        return SUBMISSIONS / f"{self.run}-oof.probs.csv"

    @property
    def sha256(self) -> str:
        """Of the key."""
        return hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()


def cross_validate(
    plan: CrossValidation, file: Path, *, limit: int | None, overwrite: bool, kinds: str | None = None
) -> None:
    """Trains every fold, writes submissions/<run>-oof.probs.csv in the order of the file, and prints its figures.

    Args:
        plan: what to train.
        file: the questions that are cut into folds.
        limit: its first so many rows alone.
        overwrite: replace what an earlier call has left, one by one as the new is complete.
        kinds: of read_questions.

    Raises:
        InputError: see train_folds and join_folds; or the file can't be cut into so many folds, or the out-of-fold file is
            of something else, or another process is at work.
    """
    questions = read_questions(file, labelled=True, kinds=kinds)[:limit]
    folds = assign_folds(questions, plan.num_folds)  # what can't be cut is said before anything is trained
    report_path = plan.oof.with_suffix(".json")
    with lock(plan.mark, "cross-validation"):
        replaced = _start(plan, overwrite=overwrite)
        own = _is_own(report_path, plan)
        with claim_outputs(
            (plan.oof, report_path), inputs=plan.key["files"], overwrite=own or plan.oof.name in replaced,
            command=plan.key, flag="--run",
        ) as outputs:  # fmt: skip
            train_folds(plan, replaced)
            predictions, report = join_folds(plan, questions)
            outputs.write([probs_writer(predictions), text_writer(to_json(report))])
        _note(plan, [])
    table = format_table(fold_metrics(predictions, questions, folds.folds))
    print(f"\n{table}\n\nwrote {plan.oof}: {len(questions)} rows, each scored by the run that did not train on it")


def _start(plan: CrossValidation, *, overwrite: bool) -> list[str]:
    """Names of the folds and outputs that are of an earlier cross-validation, and to be replaced.

    Raises:
        InputError: there is one of other settings without `overwrite`, or what is to be replaced is no run.
    """
    folders = [plan.folder(fold) for fold in range(plan.num_folds)]
    if overwrite:
        replaced = [*(folder.name for folder in require_replaceable(folders)), plan.oof.name]
    elif plan.mark.exists():
        mark = read_json(plan.mark)
        if mark.get("key") != plan.key:
            raise InputError(
                f"--run {plan.run}: {plan.mark} was started with other settings or files; choose another --run, or --overwrite"
            )
        found = mark.get("replaced")
        if not isinstance(found, list):
            raise InputError(f"{plan.mark}: 'replaced' is no list; the file was edited: train all with --overwrite")
        replaced = [str(name) for name in found]
    elif taken := [str(folder) for folder in folders if folder.exists()]:
        raise InputError(
            f"--run {plan.run}: {taken[0]} exists and is not its fold; choose another --run, or --overwrite"
        )
    else:
        replaced = []
    _note(plan, replaced)
    return replaced


def _is_own(report: Path, plan: CrossValidation) -> bool:
    """Whether the out-of-fold file that is there was written with these settings."""
    try:
        return read_json(report).get("cross_validation_sha256") == plan.sha256
    except InputError:  # there is none, or it is damaged
        return False


def _note(plan: CrossValidation, replaced: list[str]) -> None:
    write_json(plan.mark, {"key": plan.key, "replaced": replaced})


def train_folds(plan: CrossValidation, replaced: Sequence[str] = ()) -> None:
    """Trains every fold that is not finished.

    Args:
        plan: what to train.
        replaced: names of folds that are of an earlier cross-validation; each stays until the new one is complete.

    Raises:
        InputError: a fold fails, with its reason, or was trained otherwise than the first.
    """
    replaced = list(replaced)
    for fold in range(plan.num_folds):
        folder = plan.folder(fold)
        if (how := next_step(folder, replaced=folder.name in replaced)) is None:
            print(f"fold {fold}: {folder} is finished")
            _require_same_settings(plan, fold)
            continue
        command = ["train.py", *plan.flags, "--run", folder.name, "--fold", str(fold), how]
        if reason := run_script(command, plan.checkpoints / f"{folder.name}.log"):
            raise InputError(
                f"fold {fold} of {plan.run}: {reason}; mend it and run the same command again, without --overwrite: finished folds stay"
            )
        _require_same_settings(plan, fold)
        if folder.name in replaced:
            replaced.remove(folder.name)
            _note(plan, replaced)


def _require_same_settings(plan: CrossValidation, fold: int) -> None:
    """The same command may mean something else on another day: another card, another base behind the same name.

    Raises:
        InputError: the fold was trained otherwise than the first one.
    """
    if fold == 0:
        return
    first, own = (
        {name: value for name, value in read_run(plan.folder(k)).settings.items() if name not in _FOLDS_OWN}
        for k in (0, fold)
    )
    if differing := [name for name in sorted({*first, *own}) if first.get(name) != own.get(name)]:
        name = differing[0]
        raise InputError(
            f"{plan.folder(fold)}: its {name.replace('_', '-')} is {show(own.get(name))}, that of {plan.folder(0)} {show(first.get(name))}; "
            "probabilities of two kinds of models are no out-of-fold file of one: train with what the first had, or all with --overwrite"
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
        "cross_validation_sha256": plan.sha256,
        "base": run.base,
        "run": plan.run,
        # What tells it from another run on this base, in the names that inference.py gives it.
        "score_by": run.score_by,
        "template": run.template,
        "max_tokens": run.max_tokens,
        "quantization": run.quantization,
        "context_when": run.context_rule.name,
        "shots": 0,
        "choice_orders": ONE_ORDER.name,
        "debias": None,
        "data": run.data,
        "training": training_of(run.settings),
        "folds": plan.num_folds,
        "folds_sha256": assignments.pop(),
        "members": members,
    }
    return Predictions(tuple(question.id for question in questions), probs), report


def fold_metrics(
    predictions: Predictions, questions: Sequence[Question], folds: Sequence[int]
) -> list[tuple[str, Metrics]]:
    """Named figures of out-of-fold probabilities: the guesses that read nothing, all rows, and those of either kind.

    Args:
        predictions: (N, 5) out of fold.
        questions: N labelled ones, in the same order.
        folds: (N,) the fold that holds out each; the others' answers say which position is the most frequent.
    """
    answers: IntArray = np.array([question.answer_index + 1 for question in questions], dtype=np.int64)
    groups = passage_groups(questions)
    kinds = np.array([find_kind(question) for question in questions])
    sizes = predictions.num_choices
    by_position = held_out_position_probs(sizes, answers, np.array(folds))
    rows = [(UNIFORM, random_baseline(sizes, answers))]
    rows.append((MOST_FREQUENT, compute_metrics(by_position, answers, groups)))
    rows.append(("out of fold", compute_metrics(predictions.probs, answers, groups)))
    for kind in ("reading", "knowledge"):
        chosen = np.flatnonzero(kinds == kind)
        if 0 < len(chosen) < len(questions):
            rows.append(
                (kind, compute_metrics(predictions.probs[chosen], answers[chosen], [groups[i] for i in chosen]))
            )
    return rows
