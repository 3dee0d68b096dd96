"""Folders of runs: who may write one, where it is built, how it takes its place, and what a kill leaves is put in order.

checkpoints/<run>        a finished run (it holds run.json), or one in the making where none was before
checkpoints/.<run>.new   a run in the making while another one has the place; complete, it takes the place
checkpoints/.<run>.old   the other one then, on its way out

One rule: the run in the making is .<run>.new if that is there, else <run>. --resume goes on with it, --overwrite starts it
anew, and whatever has the place keeps it until the new run is complete.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ksat.errors import InputError
from ksat.files import (
    LockedError,
    file_sha256,
    lock,
    read_json,
    remove,
    remove_all,
    remove_leftovers,
    require_name,
    write_json,
)
from ksat.sealed import read_sealed

CHECKPOINTS = Path("checkpoints")
CURVES = "tensorboard"  # in a run: what --report-to tensorboard writes
# All that our runs hold; what holds anything else is not ours to delete.
_ONLY_WHILE_TRAINING = r"trainer|progress\.json|epoch-\d+"
_NAMES = rf"run\.json|settings\.json|adapter|metrics\.json|validation\.probs\.csv|log\.jsonl|folds\.csv|{CURVES}|{_ONLY_WHILE_TRAINING}"
_LEFTOVER = rf"\.(?:{_NAMES})\.tmp"  # of a writer that was killed
SEAL = "complete"  # in a sealed folder: the SHA-256 of each other file


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run's place, and what lies beside it.

    Attributes:
        place: checkpoints/<run>.
    """

    place: Path

    @property
    def new(self) -> Path:
        """Where a run is built while another one has the place."""
        return self.place.with_name(f".{self.place.name}.new")

    @property
    def old(self) -> Path:
        """Where the run that is replaced goes."""
        return self.place.with_name(f".{self.place.name}.old")

    @property
    def making(self) -> Path:
        """The run in the making, or the finished one if there is none."""
        return self.new if (self.new / "settings.json").exists() else self.place

    @property
    def is_taken(self) -> bool:
        """Whether something has the place; an empty folder has not."""
        return self.place.is_file() or (self.place.exists() and any(self.place.iterdir()))

    @property
    def has_leftovers(self) -> bool:
        """Whether there is something to settle beside a finished run, or in it."""
        return self.new.exists() or self.old.exists() or (_is_run(self.place) and bool(_training_files(self.place)))

    def settle(self) -> None:
        """Does all that is left to do once a run is complete, or that a kill has left: call it with the run's lock held.

        A complete run that was built beside takes its place, the one that it replaces is deleted, and what only training
        needs goes. It may be killed anywhere, and goes on when it is called again. What is no run stays as it is.

        Raises:
            InputError: what would be replaced is no run, or the disk refuses.
        """
        try:
            if (self.new / "run.json").exists():
                self._take_place()
            elif self.new.exists() and not (self.new / "settings.json").exists():
                remove_run(self.new)  # cut off before its first step
            if self.old.exists() and self.place.exists():
                remove_run(self.old)
            elif self.old.exists():
                self.old.replace(self.place)
            for folder in (self.place, self.new):
                if _is_run(folder):
                    _tidy(folder)
        except OSError as error:
            waits = f", the new run waits in {self.new}" if self.new.exists() else ""
            raise InputError(
                f"{self.place}: can't be put in order ({error.strerror or error}); mend it{waits}"
            ) from error

    def _take_place(self) -> None:
        require_run(self.new)
        if self.place.exists():
            if self.old.exists():
                remove_run(self.old)
            require_run(self.place)
            self.place.replace(self.old)
        self.new.replace(self.place)


@contextlib.contextmanager
def claim_run(name: str, *, flag: str = "--run") -> Iterator[RunFolder]:
    """Locks a run's name, and puts in order what a kill has left there.

    Raises:
        InputError: no name for a folder, or another process is at work on the run.
    """
    run = RunFolder(CHECKPOINTS / require_name(flag, name))
    with _lock(run.place):
        run.settle()
        yield run


@contextlib.contextmanager
def claim_fresh_run(stem: str) -> Iterator[RunFolder]:
    """Locks the first of the names stem, stem-2, stem-3, ... that nobody has and nobody is at work on."""
    with contextlib.ExitStack() as held:
        for name in (stem, *(f"{stem}-{i}" for i in range(2, 1000))):
            try:
                run = held.enter_context(claim_run(name))
            except LockedError:
                continue
            if not run.is_taken and not run.new.exists():
                yield run
                return
            held.close()
        raise InputError(f"--run: {CHECKPOINTS / stem} and 998 more of this name exist; name the run")


def settle_run(place: Path) -> None:
    """Puts in order what a kill has left of a run, if there is something and nobody is at work on it.

    Raises:
        InputError: see RunFolder.settle.
    """
    run = RunFolder(place if place.name not in ("", "..") else place.resolve())  # no names to put something beside
    try:
        needed = run.place.name and run.has_leftovers
    except OSError as error:  # beside a name of 250 bytes there can be none that is longer
        raise InputError(
            f"{place}: what a kill may have left beside it can't be looked at ({error.strerror or error}); give the folder a shorter name, or "
            "mend its rights"
        ) from error
    if needed:
        with contextlib.suppress(LockedError), _lock(run.place):
            run.settle()


def require_replaceable(places: Sequence[Path]) -> list[Path]:
    """Sees to it that runs of other settings can be trained in the places of these; returns those that something has.

    The finished or interrupted runs stay until then; one in the making beside a place is dropped, since it would be gone on with.

    Raises:
        InputError: what has a place is no run, or another process is at work on it; nothing is dropped then.
    """
    runs = [RunFolder(place) for place in places]
    with contextlib.ExitStack() as held:
        for run in runs:
            held.enter_context(_lock(run.place))
            run.settle()
            if run.is_taken:
                require_run(run.place)
        for run in runs:
            if run.new.exists():
                remove_run(run.new)
    return [run.place for run in runs if run.is_taken]


def _lock(place: Path) -> contextlib.AbstractContextManager[None]:
    """Of a run, which may have two names."""
    return lock(Path(os.path.realpath(place)), "run")


def next_step(place: Path, *, replaced: bool) -> str | None:
    """The flag with which train.py goes on with a run, None if it is finished: "--resume" or "--overwrite".

    Args:
        place: checkpoints/<run>.
        replaced: whether what has the place is to be replaced.

    Raises:
        InputError: see RunFolder.settle.
    """
    run = RunFolder(place)
    settle_run(place)
    if (place / "run.json").exists() and not replaced:
        return None
    if replaced and run.making == place:
        return "--overwrite"
    try:
        read_sealed(run.making / "settings.json", None, "start it anew")
    except InputError:  # cut off before its first step, or damaged
        return "--overwrite"
    return "--resume"


def require_run(folder: Path) -> None:
    """Raises InputError unless all in the folder is ours, and it is a run, or nothing was finished in it."""
    _require_ours(folder)
    marks = [folder / name for name in ("run.json", "settings.json") if (folder / name).exists()]
    holds = any(not re.fullmatch(_LEFTOVER, path.name) for path in folder.iterdir())
    if holds and not any(map(_is_our_mark, marks)):
        raise InputError(f"{folder}: is no run of ours, and is not replaced; move it away, or choose another --run")


def _require_ours(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: is no folder of a run, and is not replaced; move it away, or choose another --run")
    if others := sorted(path.name for path in folder.iterdir() if not re.fullmatch(f"{_NAMES}|{_LEFTOVER}", path.name)):
        raise InputError(
            f"{folder}: holds {others[0]!r}, which is not of a run, and is not replaced; move it away, or choose another --run"
        )


def _is_run(folder: Path) -> bool:
    try:
        require_run(folder)
    except InputError:
        return False
    return True


def _is_our_mark(path: Path) -> bool:
    """Whether run.json or settings.json is one of ours; a damaged one counts."""
    try:
        return "base" in read_json(path)
    except InputError:
        return True


def remove_run(folder: Path) -> None:
    """Deletes a run or what is left of one.

    Raises:
        InputError: something in it is not ours; then all of it stays.
    """
    _require_ours(folder)
    remove(folder)


def _tidy(folder: Path) -> None:
    """Gives what was written to its end its name, and removes what else a kill has left, and what only --resume needs."""
    for beside in folder.glob(".epoch-*.tmp"):
        kept = folder / beside.name[1:].removesuffix(".tmp")
        if is_sealed(beside) and not kept.exists():
            beside.replace(kept)
    remove_all(_training_files(folder))
    remove_leftovers(folder)


def _training_files(folder: Path) -> list[Path]:
    """What only --resume needs, in a finished run."""
    if not (folder / "run.json").exists():
        return []
    return [path for path in folder.iterdir() if re.fullmatch(_ONLY_WHILE_TRAINING, path.name)]


def kept_epochs(folder: Path) -> list[Path]:
    """Folders in a run in the making with the adapters of epochs that are or were the best."""
    return [path for path in folder.iterdir() if re.fullmatch(r"epoch-\d+", path.name)]


def seal(folder: Path) -> None:
    """Marks a folder as complete: the mark holds each file's hash, and is written last."""
    write_json(folder / SEAL, _hashes(folder))


def is_sealed(folder: Path) -> bool:
    """Whether a folder was written to its end."""
    return (folder / SEAL).exists()


def whole_saves(folder: Path) -> Iterator[Path]:
    """The trainer's checkpoints in a folder that are as they were written, the newest, by step number, first.

    Those that were damaged since are named on stderr.
    """
    for path in sorted(filter(is_sealed, folder.glob("checkpoint-*")), key=step_of, reverse=True):
        if (file := damaged_file(path)) is None:
            yield path
        else:
            print(f"{path}: {file} is damaged; training goes on from what was saved before", file=sys.stderr)


def step_of(save: Path) -> int:
    """The step behind which a checkpoint of the trainer was written."""
    return int(save.name.rsplit("-", 1)[1])


def damaged_file(folder: Path) -> str | None:
    """The first file of a sealed folder that is not as it was when it was sealed, None if all are."""
    try:
        sealed, found = read_json(folder / SEAL), _hashes(folder)
    except InputError:  # the seal is cut, or a file can't be read
        return SEAL
    return next((name for name in sorted({*sealed, *found}) if sealed.get(name) != found.get(name)), None)


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(files)}
