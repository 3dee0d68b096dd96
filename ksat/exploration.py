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
from ksat.files import file_sha256, read_json, require_name, write_json
from ksat.identity import identify_local
from ksat.journal import Journal
from ksat.predictions import Predictions, read_probs
from ksat.prompts import DEFAULT_TEMPLATES
from ksat.run_folders import CHECKPOINTS, next_step, require_replaceable
from ksat.runs import library_versions, read_run


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
        """A file's name; letters of any script are kept."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "base"


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
        device: name of what computes, since rows of two devices are not mixed.
        overwrite: replace what was made of other questions, flags, bases or versions.
    """

    questions: Path
    folder: Path
    flags: tuple[str, ...] = ()
    limit: int | None = None
    train: Path | None = None
    device: str = ""
    overwrite: bool = False


def parse_candidates(text: str) -> list[Candidate]:
    """The candidates of --bases.

    Raises:
        InputError: an empty name, or two that would be written to the same files.
    """
    candidates = [Candidate.parse(part) for part in text.split(",")]
    if any(not candidate.base for candidate in candidates):
        raise InputError(f"--bases {text!r}: an empty name; expected bases with commas between them")
    slugs = [candidate.slug for candidate in candidates]
    if twice := [candidate.name for candidate in candidates if slugs.count(candidate.slug) > 1]:
        raise InputError(
            f"--bases: {' and '.join(twice)} are the same, or would be written to the same files; leave one out"
        )
    for slug in slugs:
        require_name("--bases", slug)
    return candidates


def outputs_of(candidate: Candidate, settings: Settings) -> tuple[Path, ...]:
    """All files of a candidate in the exploration's folder."""
    return _Paths(candidate, settings).files


def require_same(candidate: Candidate, settings: Settings) -> None:
    """Raises InputError if something else than this candidate with these settings lies in its place, or edited scores; with
    `overwrite` the scores or the run of another one are replaced, once the new ones are complete."""
    paths = _Paths(candidate, settings)
    if settings.train is not None:
        require_name("--out and --bases give a run", paths.run.name)
    key, scoring, trained = _score_key(candidate, settings, None), _read(paths.scoring), _read(paths.training)
    if trained is not None:
        trained.pop("replaces", None)
    # An interrupted scoring of other settings has touched no finished scores: these are known by a mark of their own.
    there = [{**mark, "adapter": None} for mark in (_finished_key(paths), scoring) if mark is not None]
    other_scores = bool(there) and key not in there
    other_run = settings.train is not None and (
        trained != _train_key(candidate, settings) if trained is not None else paths.run.exists()
    )
    if (other_scores or other_run) and not settings.overwrite:
        raise InputError(
            f"--out {settings.folder.name}: {candidate.name} was {'trained' if other_run else 'scored'} there with other questions, flags, "
            "files, versions or on another device; choose another --out, or --overwrite"
        )
    if _are_edited(paths) and not settings.overwrite:
        raise InputError(
            f"{paths.probs}: is not as it was when it was scored; put it back, or --overwrite to score these questions again"
        )
    if other_run:
        replaces = {"replaces": True} if require_replaceable([paths.run]) else {}
        write_json(paths.training, {**_train_key(candidate, settings), **replaces})
    if other_scores:
        _begin_scoring(paths, key)


def run_candidate(candidate: Candidate, settings: Settings) -> Outcome:
    """Scores a candidate by inference.py, after train.py where that is asked for; takes what is done from its files.

    Call require_same for every candidate first.
    """
    paths = _Paths(candidate, settings)
    adapter, trained_gib = None, 0.0
    if settings.train is not None:
        if reason := _train(candidate, settings, paths):
            return Outcome(candidate, reason=reason)
        adapter = read_run(paths.run).adapter_sha256
        trained_gib = _peak_memory(read_json(paths.run / "metrics.json"), paths.run / "metrics.json")
    key = _score_key(candidate, settings, adapter)
    finished = _finished_key(paths)
    if finished != key:
        if finished is None:
            paths.done.unlink(missing_ok=True)  # it would call the next scores edited ones
        if _read(paths.scoring) != key:
            _begin_scoring(paths, key)  # with another adapter
        if reason := run_script(_scoring(candidate, settings, paths), paths.log):
            return Outcome(candidate, reason=reason)
        write_json(paths.done, {**key, "probs_sha256": file_sha256(paths.probs)})
    report = read_json(paths.report)
    if report.get("test_sha256") != key["questions"]:
        return Outcome(
            candidate,
            reason=f"{settings.questions} changed while it was scored; run the same command again with --overwrite",
        )
    peak = max(_peak_memory(report, paths.report), trained_gib)
    return Outcome(candidate, read_probs(paths.probs), {**report, "peak_memory_gib": peak})


def _begin_scoring(paths: "_Paths", key: dict[str, Any]) -> None:
    """Drops an interrupted scoring with another key; finished scores stay until the new ones take their place."""
    Journal.remove(paths.journal)
    write_json(paths.scoring, key)


def _finished_key(paths: "_Paths") -> dict[str, Any] | None:
    """The key of the finished scores; None if there are none, or not those that the mark was written for.

    Between the names of new scores and that of their mark a kill leaves the mark of the former ones.
    """
    mark = _read(paths.done)
    if mark is None or not paths.report.exists() or not paths.probs.exists():
        return None
    return mark if mark.pop("probs_sha256", None) == file_sha256(paths.probs) else None


def _are_edited(paths: "_Paths") -> bool:
    """Whether scores differ from those that their mark was written for, and nothing was scored since with another key."""
    mark = _read(paths.done)
    if mark is None or (written := mark.pop("probs_sha256", None)) is None or mark != _read(paths.scoring):
        return False
    return paths.probs.exists() and file_sha256(paths.probs) != written


def _peak_memory(report: dict[str, Any], path: Path) -> float:
    """GiB, as train.py and inference.py noted it."""
    peak = report.get("peak_memory_gib")
    if not isinstance(peak, int | float) or isinstance(peak, bool):
        raise InputError(
            f"{path}: peak_memory_gib is {peak!r:.80}, expected a number; the file was edited: put it back, or choose another --out"
        )
    return float(peak)


class _Paths:
    """Where a candidate's files lie: results beside each other in the exploration's folder, its run with the others."""

    def __init__(self, candidate: Candidate, settings: Settings) -> None:
        self.stem = settings.folder / candidate.slug
        names = ("probs.csv", "probs.json", "done.json", "scoring.json", "training.json", "log", "csv")
        self.files = tuple(self.stem.with_name(f"{self.stem.name}.{name}") for name in names)
        self.probs, self.report, self.done, self.scoring, self.training, self.log, _ = self.files
        self.journal = self.probs.with_name(f".{self.probs.name}.partial")
        self.run = CHECKPOINTS / f"explore-{settings.folder.name}@{candidate.slug}"  # no slug has an @


def _common_key(candidate: Candidate, settings: Settings) -> dict[str, Any]:
    versions = {
        name: version for name, version in library_versions().items() if name in ("torch", "transformers", "peft")
    }
    return {
        "candidate": candidate.name, "files": identify_local(candidate.base), "flags": list(settings.flags), "device": settings.device,
        "wording": {name: template.to_dict() for name, template in DEFAULT_TEMPLATES.items()}, "versions": versions,
    }  # fmt: skip


def _train_key(candidate: Candidate, settings: Settings) -> dict[str, Any]:
    """What a trained run depends on."""
    return {**_common_key(candidate, settings), "train": settings.train and file_sha256(settings.train)}


def _score_key(candidate: Candidate, settings: Settings, adapter: str | None) -> dict[str, Any]:
    """What scores depend on."""
    about = {"questions": file_sha256(settings.questions), "limit": settings.limit, "adapter": adapter}
    return {**_common_key(candidate, settings), **about, "trains": settings.train is not None}


def _read(path: Path) -> dict[str, Any] | None:
    """A mark, None if there is none or it was cut."""
    try:
        return read_json(path)
    except InputError:
        return None


def _base_flags(candidate: Candidate) -> list[str]:
    flags = ["--base", candidate.base]
    if candidate.quantization:
        flags += ["--quantization", candidate.quantization]
    return flags


def _train(candidate: Candidate, settings: Settings, paths: _Paths) -> str:
    """Trains the candidate if it is not trained already, or goes on where it was cut off; returns why it failed, or ""."""
    mark = _read(paths.training) or _train_key(candidate, settings)  # no run of another key is there: see require_same
    how = next_step(paths.run, replaced="replaces" in mark)
    if how is None:
        return ""
    command = ["train.py", "--run", paths.run.name, how]
    if how == "--overwrite":
        write_json(paths.training, mark)
        command += ["--train", str(settings.train), *_base_flags(candidate)]
    if reason := run_script([*command, *settings.flags], paths.log):
        return reason
    write_json(paths.training, _train_key(candidate, settings))
    return ""


def _scoring(candidate: Candidate, settings: Settings, paths: _Paths) -> list[str]:
    command = [
        "inference.py",
        "--test",
        str(settings.questions),
        "--out",
        str(paths.stem),
        "--overwrite",
        *settings.flags,
    ]
    if settings.limit:
        command += ["--limit", str(settings.limit)]
    if settings.train is None:
        return [*command, *_base_flags(candidate)]
    return [*command, "--ckpt", str(paths.run)]
