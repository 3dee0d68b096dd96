"""Scores of an inference that may be interrupted."""

import glob
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksat.errors import InputError
from ksat.files import write_text


class Journal:
    """Scores of an inference that may be interrupted: one line a forward pass, on the disk before the next one starts.

    Several processes write a part each, and each reads the parts of all, so that a job may go on with fewer or more of them.
    The first line of a part holds the settings. Every line begins with a hash of itself and of the settings: a line that was cut,
    garbled or written with other settings is never taken for scores.

    Attributes:
        scores: by EncodedQuestion.key, what an earlier call with the same settings has scored.
        pack_tokens: that call's; it follows from the free memory, and only the same packs score to the same bits.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        pack_tokens: int,
        part: int = 0,
        num_parts: int = 1,
        overwrite: bool = False,
    ) -> None:
        """Opens part `part` of the journal at `path`.

        Args:
            path: of the journal; a part's file is PATH.<part>.
            settings: all that the scores depend on.
            pack_tokens: of this call, for a new journal.
            part: number of this process.
            num_parts: of all processes.
            overwrite: drop what was scored with other settings.

        Raises:
            InputError: other settings have scored something there, and `overwrite` is not given.
        """
        self.path = path.with_name(f"{path.name}.{part}")
        self.scores: dict[str, list[float]] = {}
        self.pack_tokens = pack_tokens
        self._settings = json.loads(json.dumps(settings))  # as they read back: tuples are lists
        self._key = json.dumps(self._settings, sort_keys=True)
        kept: list[str] = []
        for other in _parts(path):
            number = int(other.name.rpartition(".")[2])
            is_own = number == part or (part == 0 and number >= num_parts)
            lines = self._read_part(other, is_own=is_own, overwrite=overwrite)
            if other == self.path:
                kept = lines
        first = json.dumps({"settings": self._settings, "pack_tokens": self.pack_tokens})
        write_text(self.path, "".join([f"{_digest(first, '')} {first}\n", *kept]))

    def _read_part(self, part: Path, *, is_own: bool, overwrite: bool) -> list[str]:
        """Takes the scores of a part; returns the lines that hold them. All processes read, and its own alone sets it aside."""
        try:
            # Bytes that are no text become characters that no line of ours has.
            text = part.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:  # its own process has just set it aside
            return []
        first, *lines = text.splitlines(keepends=True) or [""]
        header = _content(first, "")
        if header is None:
            if first.endswith("\n") and is_own:  # else a kill cut it, and nothing stands behind it
                aside = part.with_name(f"{part.name}.garbled")
                part.replace(aside)
                _say(f"{part} is garbled: it is set aside as {aside.name}, and its questions are scored again")
            return []
        if header["settings"] != self._settings:
            if not overwrite and lines:
                name = _first_difference(header["settings"], self._settings)
                raise InputError(
                    f"{part}: an inference with other settings ({name}) was interrupted there; finish it with its own flags, "
                    "choose another --out, or drop its scores with --overwrite"
                )
            return []
        self.pack_tokens = header["pack_tokens"]
        kept = []
        for line in lines:
            if (scores := _content(line, self._key)) is not None:
                self.scores.update(scores)
                kept.append(line)
        # A kill may cut the last line.
        if garbled := len(lines) - len(kept) - bool(lines and not lines[-1].endswith("\n")):
            _say(f"{part}: {garbled} of its {len(lines)} lines are garbled; their questions are scored again")
        return kept

    @staticmethod
    def remove(path: Path) -> None:
        """Removes all parts of the journal at `path`."""
        for part in [*_parts(path), *path.parent.glob(f"{glob.escape(path.name)}.*.garbled")]:
            part.unlink()

    def add(self, scores: dict[str, list[float]]) -> None:
        """Appends one forward pass.

        Raises:
            InputError: the disk is full.
        """
        line = json.dumps(scores)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{_digest(line, self._key)} {line}\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path}: can't be written ({error.strerror}); free space and run the same command again"
            ) from error


def _parts(path: Path) -> list[Path]:
    """The files of a journal, one a process."""
    found = path.parent.glob(f"{glob.escape(path.name)}.*")
    return sorted(part for part in found if part.name.removeprefix(f"{path.name}.").isdecimal())


def _digest(line: str, key: str) -> str:
    return hashlib.sha256(f"{key}\n{line}".encode()).hexdigest()[:16]


def _content(line: str, key: str) -> dict[str, Any] | None:
    """What a whole line holds, None if it is not one that was written so."""
    digest, _, text = line.removesuffix("\n").partition(" ")
    if not line.endswith("\n") or _digest(text, key) != digest:
        return None
    content: dict[str, Any] = json.loads(text)
    return content


def _first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The name of the first setting that differs."""
    return next(name for name in sorted({*there, *here}) if there.get(name) != here.get(name)).replace("_", " ")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
