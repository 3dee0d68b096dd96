"""run.json: what a finished run tells inference."""

import platform
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from importlib import metadata
from pathlib import Path
from typing import Any

from ksat.errors import InputError
from ksat.files import file_sha256, read_json, write_json
from ksat.run_folders import settle_run


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
        settle_run(folder)  # a kill between two renames may have left it beside its place
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
