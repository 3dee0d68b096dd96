"""Files that are complete or untouched: written beside and renamed, locked while in use, and never in an input's place."""

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ksat.errors import InputError
from ksat.visible import is_visible

# Of 255 bytes that a file's name may have; the rest is for our endings and for what we put in front while we write.
LONGEST_NAME = 200


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a file beside `path`, then renames it: `path` is complete or untouched.

    The file beside has a fixed name, so that what a kill leaves is written over and renamed by the next call. Two processes may
    not write the same path: callers hold a lock.

    Raises:
        InputError: the disk is full or the folder can't be written; the half-written file is removed.
    """
    with _removed_unless_done([path]):
        _fill_beside(path, write)
        with told_of(path):
            _beside(path).replace(path)


def _beside(path: Path) -> Path:
    """The name to write under before the rename."""
    return path.with_name(f".{path.name}.tmp")


def _fill_beside(path: Path, write: Callable[[Path], None]) -> None:
    with told_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(_beside(path))
        with _beside(path).open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Turns an OSError into a line that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: can't be written ({error.strerror or error}); nothing was changed, free or choose another place"
        ) from error


@contextlib.contextmanager
def _removed_unless_done(paths: Sequence[Path]) -> Iterator[None]:
    """Removes what was written beside these files if anything goes wrong, Ctrl-C too."""
    try:
        yield
    except BaseException:
        for path in paths:
            with contextlib.suppress(OSError):  # where the folder itself is the trouble, nothing was written in it
                _beside(path).unlink()
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_atomic(path, text_writer(text))


def text_writer(text: str) -> Callable[[Path], None]:
    """Fills a file with UTF-8 text, byte for byte."""

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            file.write(text)

    return write


def csv_writer(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, quote_all: bool = False
) -> Callable[[Path], None]:
    """Fills a file with a CSV table.

    Args:
        header: names of the columns.
        rows: their cells.
        quote_all: quote every cell; those with a lone carriage return would end their row otherwise.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, quoting=csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text_writer(buffer.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; NaN is refused, so that any reader can read it."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """The text of a JSON file of ours."""
    return json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: no such file, a folder, not UTF-8, not JSON, or not an object.
    """
    text = read_text(path)
    try:
        value = parse_json(text)
        if "\\ud" in text.lower():  # a lone surrogate is no text: it could be neither tokenised nor written
            json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); the file is cut or was edited") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON, is nested too deeply for Python, or has an integer that no float holds.
    """
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _whole(digits: str) -> int:
    value = int(digits)
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"a number of {len(digits)} digits") from None
    return value


def read_text(path: Path, place: str = "") -> str:
    """The text of a UTF-8 file, without its byte-order mark, its line ends as they are.

    Args:
        path: the file.
        place: what messages begin with, such as "--prompt FILE"; the path unless given.

    Raises:
        InputError: no such file, a folder, not UTF-8, or it can't be read.
    """
    place = place or str(path)
    try:
        with _open(path, place) as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); save the file as UTF-8"
        ) from error


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes.

    Raises:
        InputError: no such file, a folder, or it can't be read.
    """
    with _open(path, str(path)) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _open(path: Path, place: str) -> Iterator[io.BufferedReader]:
    """A file's bytes; that it can't be read becomes a line."""
    if "\0" in str(path):
        raise InputError(f"{place}: has a NUL in its name; check the path")
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise InputError(f"{place}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"{place}: a folder where a file is expected; name the file in it") from error
    except OSError as error:
        raise InputError(
            f"{place}: can't be read ({error.strerror or error}); check the path and its rights"
        ) from error


def require_name(flag: str, name: str) -> str:
    """`name` if it can be the name of a file or folder of ours.

    Raises:
        InputError: it is empty or blank, shows nothing, is a path, hidden, too long, or has a control character in it.
    """
    if name != name.strip() or not name:
        raise InputError(f"{flag} {name!r}: expected a name, without blanks around it")
    if "/" in name or os.sep in name or name.startswith("."):
        raise InputError(f"{flag} {name!r}: expected a plain name, without slashes and without a dot in front")
    if not name.isprintable():
        raise InputError(f"{flag} {name!r}: has a character that does not print; take it out")
    if not is_visible(name):  # repr() would print it as it is
        raise InputError(f"{flag} {name!a}: nothing of it shows; choose another name")
    if (length := len(name.encode())) > LONGEST_NAME:
        raise InputError(f"{flag} {name[:40]!r}…: {length} bytes long, expected at most {LONGEST_NAME}")
    return name


class LockedError(InputError):
    """Another process is at work on it."""


@contextlib.contextmanager
def lock(path: Path, what: str, *, wait: float = 0.0) -> Iterator[None]:
    """Holds what `path` names: no other process gets it meanwhile. A lock ends with its process, also with one that was killed.

    Args:
        path: the file or folder that is locked; the lock itself is .NAME.lock beside it.
        what: for the message.
        wait: seconds to wait for another process.

    Raises:
        LockedError: another process holds it.
        InputError: its folder can't be written.
    """
    held = path.with_name(f".{path.name}.lock")
    own = FileLock(held, timeout=wait)
    try:
        made = _make_folder_and_acquire(own, held)
    except Timeout as error:
        otherwise = "" if wait else ", or choose another name"  # what is waited for has one name alone
        raise LockedError(f"{path}: another process is at work on this {what}; wait for it{otherwise}") from error
    except OSError as error:
        raise InputError(f"{path}: can't be locked ({error.strerror or error}); choose another place") from error
    try:
        yield
    finally:
        # While it is held: who has opened this file meanwhile sees that it has no name any more, and opens the next one.
        try:
            with contextlib.suppress(OSError):
                held.unlink()
                for folder in made:  # for the lock; refuses where something was written
                    folder.rmdir()
        finally:
            own.release()


def _make_folder_and_acquire(own: FileLock, held: Path) -> list[Path]:
    """The folders that were made for it. Whoever made one, too, may remove it between the two steps: then both are done again."""

    def attempt() -> list[Path]:
        made = [folder for folder in held.parents if not folder.exists()]
        held.parent.mkdir(parents=True, exist_ok=True)
        own.acquire()
        return made

    # With four processes at it one attempt in 80 met such a moment; where a file is in the folder's place, all ten fail.
    for _ in range(9):
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            return attempt()
    return attempt()


@dataclass(frozen=True, slots=True)
class Outputs:
    """Files that belong together, claimed by claim_outputs.

    Attributes:
        paths: in the order in which they get their names; the last is the mark of a complete set.
        command: hash of the flags that write them.
    """

    paths: tuple[Path, ...]
    command: str

    def write(self, writers: Sequence[Callable[[Path], None]], before_done: Callable[[], None] = lambda: None) -> None:
        """Writes all files beside, then gives them their names, the mark last: all of them or none, but for a kill.

        A kill or Ctrl-C between two renames is finished by the next command: a note of what is being renamed lies there until it is
        done.

        Args:
            writers: one a path, each fills the file whose path it gets.
            before_done: removes what only an interrupted command needs.

        Raises:
            InputError: one can't be written; none is then.
        """
        with _removed_unless_done(self.paths):
            for path, write in zip(self.paths, writers, strict=True):
                _fill_beside(path, write)
            hashes = {path.name: file_sha256(_beside(path)) for path in self.paths}
            write_json(self._note, {"command": self.command, "files": hashes})
        try:
            if len(self.paths) > 1:  # no set is ever taken for whole that is half new
                self.paths[-1].unlink(missing_ok=True)
            for path in self.paths:
                _beside(path).replace(path)
            before_done()
            self._note.unlink()
        except OSError as error:
            raise InputError(
                f"{self.paths[-1]}: what is written beside can't get its name ({error.strerror or error}); mend it and run the same "
                "command again"
            ) from error

    @property
    def _note(self) -> Path:
        return self.paths[-1].with_name(f".{self.paths[-1].name}.writing")

    @property
    def are_ours(self) -> bool:
        """Whether what is there was written by us: it has its mark, or the note of a set that was being renamed."""
        return self.paths[-1].exists() or self._note.exists()

    def settle(self) -> set[Path]:
        """Finishes what a kill has left of this set; returns the files that this same command may write again.

        A set of another command, complete but for some renames, gets its names. Of this command's own the named files are
        returned: the command is not done, and does it again.
        """
        note = _read_note(self._note)
        if note is None:
            for path in self.paths:
                _beside(path).unlink(missing_ok=True)
            return set()
        hashes: dict[str, str] = note["files"]
        named = {path for path in self.paths if path.is_file() and file_sha256(path) == hashes.get(path.name)}
        if note["command"] == self.command:
            return named
        waiting = [path for path in self.paths if path not in named]
        if all(_has_hash(_beside(path), hashes.get(path.name)) for path in waiting):
            for path in waiting:
                _beside(path).replace(path)
            self._note.unlink()
        return set()


def _read_note(path: Path) -> dict[str, Any] | None:
    """The note of a set that is being renamed; None if there is none, or it was edited."""
    try:
        note = read_json(path)
    except InputError:
        return None
    return note if isinstance(note.get("files"), dict) and "command" in note else None


def _has_hash(path: Path, sha256: str | None) -> bool:
    return path.is_file() and file_sha256(path) == sha256


@contextlib.contextmanager
def claim_outputs(
    paths: Sequence[Path],
    *,
    inputs: Iterable[Path | str | None],
    overwrite: bool,
    command: object,
    flag: str = "--out",
) -> Iterator[Outputs]:
    """Locks a set of output files from before the work until they are written.

    Args:
        paths: the files, the one that marks a complete set last; its name names the lock.
        inputs: all that the command reads, None for what is not given: an output never takes the place of one.
        overwrite: replace a set of ours that is there.
        command: the flags; a set that a kill left half-named is finished by the same flags.
        flag: that named the output.

    Raises:
        InputError: an output is an input or a folder, or exists without `overwrite`, or is none of ours; or another process is at
            work on it.
    """
    inputs = tuple(inputs)
    outputs = Outputs(tuple(paths), hashlib.sha256(repr(command).encode("utf-8", "backslashreplace")).hexdigest())
    require_no_input(paths, inputs, flag)
    with lock(paths[-1], "output"):
        unfinished = outputs.settle()
        if found := [str(path) for path in paths if path.exists() and path not in unfinished]:
            names = f"{' and '.join(found)} {'exists' if len(found) == 1 else 'exist'} already"
            if not overwrite:
                raise InputError(f"{names}; choose another {flag}, or replace with --overwrite")
            if not outputs.are_ours:
                raise InputError(
                    f"{names}, and without {paths[-1].name} it is no output of ours; choose another {flag}, or move it away"
                )
        yield outputs


def require_no_input(outputs: Iterable[Path], inputs: Iterable[Path | str | None], flag: str) -> None:
    """Sees to it that no output takes the place of an input, by its resolved path or as the same file under another name.

    Args:
        outputs: files.
        inputs: files or folders; None for what is not given.
        flag: that named the output.

    Raises:
        InputError: one does, is a folder, or can't be looked at.
    """
    given = [Path(path) for path in inputs if path is not None]
    for output in outputs:
        try:
            same = [path for path in given if _is_same(output, path)]
        except OSError as error:
            raise InputError(
                f"{flag}: {output} can't be written ({error.strerror or error}); choose another {flag}"
            ) from error
        if same:
            raise InputError(f"{flag}: {output} is the input {same[0]} itself; choose another {flag}")
        if os.path.isdir(output):
            raise InputError(f"{flag}: {output} is a folder, where a file is to be written; choose another {flag}")


def named_twice(paths: Sequence[Path]) -> tuple[Path, Path] | None:
    """The first path that an earlier one leads to as well, and that one."""
    seen: dict[str, Path] = {}
    for path in paths:
        place = os.path.realpath(path)  # unlike Path.resolve it has no error for links in a circle
        if place in seen:
            return path, seen[place]
        seen[place] = path
    return None


def _is_same(output: Path, path: Path) -> bool:
    same = os.path.realpath(output) == os.path.realpath(path)
    return same or (os.path.exists(output) and os.path.exists(path) and output.samefile(path))


def remove(path: Path) -> None:
    """Removes a file, a folder, or a link to one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_all(paths: Iterable[Path]) -> None:
    """Removes those that are there."""
    for path in paths:
        remove(path)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers have left in a folder of ours and below: files that never got their names."""
    remove_all(folder.rglob(".*.tmp"))
