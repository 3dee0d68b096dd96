"""Folds of a file: whole passages, near-duplicates together, alike in choices, kinds and answers; the same for every base."""

import csv
import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ksat.errors import InputError
from ksat.files import write_text
from ksat.kinds import find_kind
from ksat.near_duplicates import passage_groups
from ksat.questions import Question

SEED = 0  # of the cut: never a run's own seed, since runs of different seeds are blended


@dataclass(frozen=True, slots=True)
class Folds:
    """Which fold holds out which question.

    Attributes:
        num_folds: F.
        ids: (N,) of the questions, in the file's order.
        folds: (N,) 0 to F - 1.
        groups: (N,) what may not be torn apart: a passage with its near-duplicates.
    """

    num_folds: int
    ids: tuple[str, ...]
    folds: tuple[int, ...]
    groups: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the assignment; the order of the rows does not matter."""
        lines = sorted(f"{row_id}\x1f{fold}\n" for row_id, fold in zip(self.ids, self.folds, strict=True))
        return hashlib.sha256(f"{self.num_folds}\n{''.join(lines)}".encode()).hexdigest()


def assign_folds(questions: Sequence[Question], num_folds: int) -> Folds:
    """Folds of whole groups of passages, stratified by the number of choices, the kind and the answer together.

    The assignment follows from the rows alone, in whatever order they stand.

    Raises:
        InputError: fewer than two folds, or fewer groups of passages than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # a second to import

    if num_folds < 2:
        raise InputError(f"--folds {num_folds}: expected at least 2")
    groups = passage_groups(questions)
    if len(set(groups)) < num_folds:
        raise InputError(
            f"--folds {num_folds}: {len(questions)} questions on {len(set(groups))} passages (near-duplicates count as one); "
            f"expected at least {num_folds}"
        )
    order = sorted(range(len(questions)), key=lambda row: questions[row].id)
    names = [f"{q.num_choices} {find_kind(q)} {q.answer}" for q in (questions[row] for row in order)]
    counts = Counter(names)
    strata = [name if counts[name] >= num_folds else "rare" for name in names]
    if min(Counter(strata).values()) < num_folds:  # too few even together: they go where their passage goes
        strata = [max(counts, key=lambda name: (counts[name], name)) if name == "rare" else name for name in strata]
    splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=SEED)
    folds = np.full(len(questions), -1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for fold, (_, held_out) in enumerate(splitter.split(order, strata, [groups[row] for row in order])):
            folds[[order[i] for i in held_out]] = fold
    if empty := sorted(set(range(num_folds)) - set(folds.tolist())):
        raise InputError(f"--folds {num_folds}: nothing is left for fold {empty[0]}; cut fewer folds")
    return Folds(num_folds, tuple(q.id for q in questions), tuple(folds.tolist()), tuple(groups))


def fold_rows(folds: Folds, fold: int) -> tuple[list[int], list[int]]:
    """Indices of the rows to train on and of those held out by this fold, each ascending."""
    held_out = [row for row, own in enumerate(folds.folds) if own == fold]
    return [row for row, own in enumerate(folds.folds) if own != fold], held_out


def write_folds(path: Path, folds: Folds) -> None:
    """Writes id,fold,group as a CSV, atomically."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", "fold", "group"])
    writer.writerows(zip(folds.ids, folds.folds, folds.groups, strict=True))
    write_text(path, file.getvalue())
