"""Many bases, one set of questions: each scored (and trained first, if asked) in a process of its own.

A base that can't be scored (no memory, no access, gone) is an outcome with its reason. What is done stays done: the same
command goes on where it was stopped.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksat.children import run_script
from ksat.errors import InputError
from ksat.predictions import Predictions, read_probs
from ksat.runs import file_sha256, read_json, write_json

CHECKPOINTS = Path("checkpoints")  # where train.py puts its runs


@dataclass(frozen=True, slots=True)
class Candidate:
    """A base to score, and how it is loaded where that is said ("base:nf4" or "base:none")."""

    base: str
    quantization: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """One of the names between the commas of --bases."""
        base, colon, last = text.strip().rpartition(":")
        return cls(base, last) if colon and last in ("nf4", "none") else cls(text.strip())

    @property
    def name(self) -> str:
        return f"{self.base}:{self.quantization}" if self.quantization else self.base

    @property
    def slug(self) -> str:
        """A file's name."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip("-.")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a candidate: predictions and inference's report, or the reason why there are none."""

    candidate: Candidate
    predictions: Predictions | None = None
    report: Mapping[str, Any] | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What all candidates have in common.

    Attributes:
        questions: CSV to score.
        folder: takes every candidate's files, and the results.
        flags: of inference.py (and train.py), how to compute.
        limit: score the first so many questions; None for all.
        train: CSV to fine-tune each candidate on first; None scores them untuned.
    """

    questions: Path
    folder: Path
    flags: tuple[str, ...] = ()
    limit: int | None = None
    train: Path | None = None


def parse_candidates(text: str) -> list[Candidate]:
    """The candidates of --bases.

    Raises:
        InputError: an empty name, or one that stands there twice.
    """
    candidates = [Candidate.parse(part) for part in text.split(",")]
    if any(not candidate.base for candidate in candidates):
        raise InputError(f"--bases {text!r}: an empty name; expected bases with commas between them")
    slugs = [candidate.slug for candidate in candidates]
    if twice := sorted({slug for slug in slugs if slugs.count(slug) > 1}):
        raise InputError(f"--bases: {', '.join(twice)} is named twice; leave one out")
    return candidates


def run_candidate(candidate: Candidate, settings: Settings) -> Outcome:
    """Scores a candidate by inference.py, after train.py where that is asked for; takes what is done from its files."""
    stem = settings.folder / candidate.slug
    probs, done = stem.with_name(f"{stem.name}.probs.csv"), stem.with_name(f"{stem.name}.done.json")
    key = {
        "candidate": candidate.name, "questions": file_sha256(settings.questions), "limit": settings.limit,
        "flags": list(settings.flags), "train": settings.train and file_sha256(settings.train), "files": _files(candidate.base),
    }  # fmt: skip
    if not (_says(done, key) and probs.exists()):
        done.unlink(missing_ok=True)
        log = stem.with_name(f"{stem.name}.log")
        log.unlink(missing_ok=True)
        for command in [*_training(candidate, settings, stem, key), _scoring(candidate, settings, stem)]:
            if reason := run_script(command, log):
                return Outcome(candidate, reason=reason)
        write_json(done, key)
    return Outcome(candidate, read_probs(probs), read_json(probs.with_suffix(".json")))


def _files(base: str) -> list[list[Any]]:
    """Name, size and time of a local base's files, so that another one in the same folder is not taken for it."""
    folder = Path(base)
    if not folder.is_dir():
        return []
    found = ((path, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
    return [[path.name, status.st_size, status.st_mtime_ns] for path, status in found]


def _says(path: Path, key: dict[str, Any]) -> bool:
    return path.exists() and read_json(path) == key


def _base_flags(candidate: Candidate) -> list[str]:
    flags = ["--base", candidate.base]
    if candidate.quantization:
        flags += ["--quantization", candidate.quantization]
    return flags


def _run_folder(candidate: Candidate, settings: Settings) -> Path:
    return CHECKPOINTS / f"explore-{settings.folder.name}-{candidate.slug}"


def _training(candidate: Candidate, settings: Settings, stem: Path, key: dict[str, Any]) -> list[list[str]]:
    """The command that trains the candidate: none if it is untuned or trained already, one that resumes if it was cut off."""
    if settings.train is None:
        return []
    folder, begun = _run_folder(candidate, settings), stem.with_name(f"{stem.name}.begun.json")
    command = ["train.py", "--run", folder.name]
    if not _says(begun, key):
        write_json(begun, key)
        overwrite = ["--overwrite"] if folder.exists() else []
        return [[*command, "--train", str(settings.train), *_base_flags(candidate), *overwrite, *settings.flags]]
    if (folder / "run.json").exists():
        return []
    if (folder / "settings.json").exists():
        return [[*command, "--resume", *settings.flags]]
    return [[*command, "--train", str(settings.train), *_base_flags(candidate), "--overwrite", *settings.flags]]


def _scoring(candidate: Candidate, settings: Settings, stem: Path) -> list[str]:
    command = ["inference.py", "--test", str(settings.questions), "--out", str(stem), "--overwrite", *settings.flags]
    if settings.limit:
        command += ["--limit", str(settings.limit)]
    if settings.train is None:
        return [*command, *_base_flags(candidate)]
    return [*command, "--ckpt", str(_run_folder(candidate, settings))]
