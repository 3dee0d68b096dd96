"""Scores of an inference that may be interrupted."""

import glob
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ksat.errors import InputError
from ksat.files import write_text


class Journal:
    """Scores of an inference that may be interrupted: one line a forward pass, on the disk before the next one starts.

    Several processes write a part each, and each reads the parts of all, so that a job may go on with fewer or more of them.

    Attributes:
        scores: by EncodedQuestion.key, what an earlier call with the same settings has scored.
        pack_tokens: that call's; it follows from the free memory, and only the same packs score to the same bits.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, pack_tokens: int, part: int = 0) -> None:
        """Opens part `part` of the journal at `path`; one that was written with other settings is started anew."""
        self.path = path.with_name(f"{path.name}.{part}")
        self.scores: dict[str, list[float]] = {}
        self.pack_tokens = pack_tokens
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        kept: list[str] = []
        for other in sorted(path.parent.glob(f"{glob.escape(path.name)}.*")):
            lines = other.read_text(encoding="utf-8").splitlines(keepends=True)
            if not lines or not re.fullmatch(rf"{key} \d+\n", lines[0]):
                continue
            self.pack_tokens = int(lines[0].split()[1])
            # A kill may cut the last line; only whole lines count, and the file goes on behind them.
            whole = [line for line in lines[1:] if line.endswith("\n")]
            for line in whole:
                self.scores.update(json.loads(line))
            if other == self.path:
                kept = whole
        write_text(self.path, "".join([f"{key} {self.pack_tokens}\n", *kept]))

    @staticmethod
    def remove(path: Path) -> None:
        """Removes all parts of the journal at `path`."""
        for part in path.parent.glob(f"{glob.escape(path.name)}.*"):
            part.unlink()

    def add(self, scores: dict[str, list[float]]) -> None:
        """Appends one forward pass.

        Raises:
            InputError: the disk is full.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(scores) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path}: can't be written ({error.strerror}); free space and run the same command again"
            ) from error
