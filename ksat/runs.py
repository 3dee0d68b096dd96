"""Atomic files, and run.json: what a finished run tells inference."""

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from importlib import metadata
from pathlib import Path
from typing import Any

from ksat.errors import InputError


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a file beside `path`, then renames it: `path` is complete or untouched.

    Raises:
        InputError: the disk is full or the folder can't be written; the half-written file is removed.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"{path}: can't be written ({reason}); nothing was changed, free or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # where the folder itself is the trouble, nothing was written in it
            beside.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_atomic(path, lambda beside: _write_through(beside, text))


def _write_through(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(text)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; NaN is refused, so that any reader can read it."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error}); the file is cut or was edited") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run, as run.json keeps it: all that inference needs, and where it came from.

    Attributes:
        base: hub name, local folder, or an embedded base.
        score_by: "label" or "text".
        template: the prompt's wording, "system" and "user".
        max_tokens: a prompt's limit.
        scale: factor on the scores before the softmax.
        quantization: "nf4" or "none": the weights that the adapter was trained on.
        adapter_sha256: of adapter/adapter_model.safetensors.
        settings: every setting of the run, by flag.
        data: the training files, each with "file" and "sha256".
        versions: of Python and the libraries.
    """

    base: str
    score_by: str
    template: dict[str, str]
    max_tokens: int
    scale: float
    quantization: str
    adapter_sha256: str
    settings: dict[str, Any]
    data: list[dict[str, Any]]
    versions: dict[str, str]


RUN_FORMAT = 1
ADAPTER_FOLDER, ADAPTER_FILE = "adapter", "adapter_model.safetensors"


def write_run(folder: Path, run: Run) -> None:
    """Writes run.json, the mark of a finished run."""
    write_json(folder / "run.json", {"format": RUN_FORMAT, **asdict(run)})


def read_run(folder: Path) -> Run:
    """The run in a checkpoint folder, its adapter verified byte for byte.

    Raises:
        InputError: no such folder, not finished, written by another version, or its adapter is missing, cut or changed.
    """
    if not folder.is_dir():
        raise InputError(f"--ckpt {folder}: no such folder; expected checkpoints/<run> as train.py writes it")
    path = folder / "run.json"
    if not path.exists():
        raise InputError(
            f"--ckpt {folder}: no run.json; the run is not finished: python train.py --run {folder.name} --resume"
        )
    fields = read_json(path)
    if fields.pop("format", None) != RUN_FORMAT:
        raise InputError(f"{path}: another format than {RUN_FORMAT}; train the run with this version")
    names = {field.name for field in dataclass_fields(Run)}
    if wrong := sorted(names ^ set(fields)):
        raise InputError(
            f"{path}: fields missing or unknown: {', '.join(wrong)}; the file was edited: train the run again"
        )
    run = Run(**fields)
    adapter = folder / ADAPTER_FOLDER / ADAPTER_FILE
    if not adapter.exists():
        raise InputError(f"{adapter}: no such file; the checkpoint was not copied as a whole")
    if (found := file_sha256(adapter)) != run.adapter_sha256:
        raise InputError(
            f"{adapter}: cut or changed (sha256 {found[:12]}…, run.json says {run.adapter_sha256[:12]}…); copy it again or train again"
        )
    read_json(adapter.with_name("adapter_config.json"))  # where it is missing, peft would ask the hub for it
    return run


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result; those not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in (
        "torch",
        "transformers",
        "peft",
        "trl",
        "bitsandbytes",
        "accelerate",
        "unsloth",
        "pandas",
        "scikit-learn",
    ):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


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
