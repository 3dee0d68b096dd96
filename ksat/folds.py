"""Folds of a file, and its validation split: whole passages, near-duplicates together.

Folds are alike in choices, kinds and answers, and the same for every base.
"""

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


def split_validation(
    questions: Sequence[Question], fraction: float, *, seed: int, groups: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Indices of the training and of the validation rows, each ascending.

    Rows of one passage stay together, and near-duplicates with them; the shares of 2- to 5-choice rows are kept (scikit-learn's
    StratifiedGroupKFold). The result depends on the rows, not on their order in the file.

    Args:
        questions: all rows.
        fraction: share of the rows to hold out, 0 (none) to 0.5.
        seed: shuffles the passages.
        groups: passage_groups of the questions, where they are known.

    Raises:
        InputError: fraction out of range, or fewer than two passages to split (near-duplicates count as one).
    """
    if not 0 <= fraction <= 0.5:
        raise InputError(f"--valid-fraction {fraction}: expected 0 (train on everything) to 0.5")
    if fraction == 0:
        return list(range(len(questions))), []
    from sklearn.model_selection import StratifiedGroupKFold  # a second to import

    order = sorted(range(len(questions)), key=lambda i: questions[i].id)
    known = passage_groups(questions) if groups is None else groups
    own = np.array([known[i] for i in order])
    strata = np.array([questions[i].num_choices for i in order])
    num_passages = len(set(own))
    if num_passages < 2:
        raise InputError(f"--valid-fraction {fraction}: {num_passages} passage can't be split; use --valid-fraction 0")
    # Twenty small folds, of which as many are held out as the fraction asks for: finer than one fold of 1/fraction.
    num_folds = min(20, num_passages, max(np.unique(strata, return_counts=True)[1]))
    if num_folds < 2:
        num_folds, strata = min(20, num_passages), np.zeros(len(order), dtype=int)
    with warnings.catch_warnings():
        # A number of choices that few rows have can't be in every fold, and need not be.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        splitter = StratifiedGroupKFold(n_splits=num_folds, shuffle=True, random_state=seed)
        folds = [fold for _, fold in splitter.split(order, strata, own) if len(fold)]
    # Folds differ in size, so as many are held out as come nearest to the fraction of the rows; never all.
    sizes = np.cumsum([len(fold) for fold in folds[:-1]])
    num_held_out = int(np.argmin(np.abs(sizes - fraction * len(order)))) + 1
    held_out = {order[i] for fold in folds[:num_held_out] for i in fold}
    return [i for i in range(len(questions)) if i not in held_out], sorted(held_out)


def write_folds(path: Path, folds: Folds) -> None:
    """Writes id,fold,group as a CSV, atomically."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", "fold", "group"])
    writer.writerows(zip(folds.ids, folds.folds, folds.groups, strict=True))
    write_text(path, file.getvalue())
