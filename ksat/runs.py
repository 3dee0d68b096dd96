"""run.json and settings.json: what a finished run tells inference, and what --resume goes on with; both guard their own content."""

import contextlib
import math
import platform
import sys
from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ksat.context import ContextRule
from ksat.errors import InputError
from ksat.files import file_sha256, read_json
from ksat.kinds import WORDING
from ksat.metrics import SCALE_RANGE
from ksat.run_folders import settle_run
from ksat.sealed import (
    SHA256,
    TEXT,
    TEXTS,
    Rule,
    content_sha256,
    number,
    one_of,
    open_sealed,
    or_none,
    read_sealed,
    whole,
    write_sealed,
)


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run, as run.json keeps it: all that inference needs, and where it came from.

    Attributes:
        base: hub name, local folder, or an embedded base.
        base_identity: which base that was, from ksat.identity; {} if it is not known.
        score_by: "label" or "text".
        template: the prompt's wording, "system" and "user".
        max_tokens: a prompt's limit.
        scale: factor on the scores before the softmax.
        quantization: "nf4" or "none": the weights that the adapter was trained on.
        adapter_sha256: of adapter/adapter_model.safetensors.
        adapter_config_sha256: of adapter/adapter_config.json.
        settings: every setting of the run, by flag.
        data: the training files, each with "file" and "sha256".
        versions: of Python and the libraries.
    """

    base: str
    base_identity: dict[str, str]
    score_by: str
    template: dict[str, str]
    max_tokens: int
    scale: float
    quantization: str
    adapter_sha256: str
    adapter_config_sha256: str
    settings: dict[str, Any]
    data: list[dict[str, Any]]
    versions: dict[str, str]

    @property
    def context_rule(self) -> ContextRule:
        """Which questions got their context in training."""
        return ContextRule(self.settings.get("context_when", "none"))

    @property
    def choices_tell_kinds(self) -> bool | None:
        """Whether the number of choices told kinds in its training; None where an earlier version did not note it."""
        return self.settings.get("choices_tell_kinds", False if self.settings.get("kinds") == WORDING else None)


RUN_FORMAT = 2
ADAPTER_FOLDER, ADAPTER_FILE, CONFIG_FILE = "adapter", "adapter_model.safetensors", "adapter_config.json"


def _is_template(value: Any) -> bool:
    return TEXTS[0](value) and value.keys() == {"system", "user"}


def _is_data(value: Any) -> bool:
    return isinstance(value, list) and all(
        TEXTS[0](entry) and entry.keys() == {"file", "sha256"} and SHA256[0](entry["sha256"]) for entry in value
    )


def _are_files(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(TEXT[0], value))


def _are_positions(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(counts, list) and str(len(counts)) == size and all(whole(0)[0](count) for count in counts)
        for size, counts in value.items()
    )


def _is_context_rule(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(ContextRule.parse(value))
    except ArgumentTypeError:
        return False


def _are_run_settings(value: Any) -> bool:
    """Those of a soup are other ones than train.py's; inference uses these."""
    return (
        isinstance(value, dict)
        and whole(1)[0](value.get("rank"))
        and _is_context_rule(value.get("context_when", "none"))
        and or_none(TEXT)[0](value.get("kinds"))
        and isinstance(value.get("choices_tell_kinds"), bool | None)
        and _are_positions(value.get("answer_positions", {}))
    )


_SHARED_RULES: dict[str, Rule] = {
    "base": (lambda value: isinstance(value, str) and bool(value.strip()), "a base's name"),
    "score_by": one_of("label", "text"),
    "template": (_is_template, "the texts system and user"),
    "max_tokens": whole(1),
    "quantization": one_of("nf4", "none"),
    "data": (_is_data, "a list of files, each with its sha256"),
    "base_identity": TEXTS,
}
RUN_RULES: dict[str, Rule] = _SHARED_RULES | {
    "scale": number(lambda value: SCALE_RANGE[0] <= value <= SCALE_RANGE[1], "0.01 to 1000"),
    "adapter_sha256": SHA256,
    "adapter_config_sha256": SHA256,
    "settings": (_are_run_settings, "settings with a rank from 1, a rule context_when, kinds, choices_tell_kinds and answer_positions"),
    "versions": TEXTS,
}  # fmt: skip
SETTING_RULES: dict[str, Rule] = _SHARED_RULES | {
    "valid_fraction": number(lambda value: 0 <= value <= 0.5, "0 (train on every row) to 0.5"),
    "prompt": or_none(TEXT),
    "limit": or_none(whole(1)),
    "seed": whole(0, 2**32 - 1),
    "report_to": TEXT,
    "rank": whole(1, 8192),
    "alpha": number(lambda value: 0 < value < math.inf, "above 0"),
    "dropout": number(lambda value: 0 <= value < 1, "0 to 1"),
    "rslora": (lambda value: isinstance(value, bool), "true or false"),
    "epochs": whole(1),
    "lr": number(lambda value: 0 < value <= 1, "above 0, at most 1"),
    "schedule": one_of("cosine", "linear", "constant"),
    "warmup": number(lambda value: 0 <= value < 1, "0 to 1"),
    "weight_decay": number(lambda value: 0 <= value < math.inf, "0 or more"),
    "questions_per_step": whole(1),
    "patience": whole(1),
    "loss": one_of("choices", "vocab"),
    "choice_orders": whole(1),
    "folds": or_none(whole(2)),
    "fold": or_none(whole(0)),
    "folds_sha256": or_none(SHA256),
    "valid": or_none((_are_files, "paths of files")),
    "valid_sha256": (lambda value: isinstance(value, list) and all(map(SHA256[0], value)), "a list of sha256"),
    "leave_out": or_none(TEXT),
    "leave_out_sha256": or_none(SHA256),
    "context_when": (_is_context_rule, "a rule of --context-when"),
    "kinds": or_none(TEXT),
    "kinds_sha256": or_none(SHA256),
    "choices_tell_kinds": (lambda value: isinstance(value, bool), "true or false"),
    "answer_positions": (_are_positions, "counts of right answers by number of choices"),
    "dtype": one_of("float32", "float16", "bfloat16"),
    "engine": one_of("unsloth", "transformers"),
    "pack_tokens": whole(1),
}


def write_run(folder: Path, run: Run) -> None:
    """Writes run.json, the mark of a finished run."""
    write_sealed(folder / "run.json", {"format": RUN_FORMAT, **asdict(run)})


def read_run(folder: Path) -> Run:
    """The run in a checkpoint folder, its adapter verified byte for byte.

    Raises:
        InputError: no such folder, not finished, edited, of another version, or its adapter is missing, cut or changed.
    """
    # A kill may have left it beside its place, or others beside it; a whole run is read from where nothing can be written, too.
    with contextlib.suppress(InputError) if folder.is_dir() else contextlib.nullcontext():
        settle_run(folder)
    if not folder.is_dir():
        raise InputError(f"--ckpt {folder}: no such folder; expected checkpoints/<run> as train.py writes it")
    path = folder / "run.json"
    if not path.exists():
        is_started = (folder / "settings.json").exists()
        name = folder.resolve().name
        raise InputError(
            f"--ckpt {folder}: no run.json; "
            + (
                f"the run is not finished: python train.py --run {name} --resume"
                if is_started
                else "expected checkpoints/<run> as train.py writes it"
            )
        )
    fields = read_json(path)
    if fields.get("format") not in (1, RUN_FORMAT):
        raise InputError(f"{path}: another format than {RUN_FORMAT}; train the run with this version")
    adapter = folder / ADAPTER_FOLDER / ADAPTER_FILE
    config = adapter.with_name(CONFIG_FILE)
    for file in (adapter, config):  # where the configuration is missing, peft would ask the hub for it
        if not file.is_file():
            raise InputError(f"{file}: no such file; the checkpoint was not copied as a whole")
    is_old = fields["format"] == 1
    if is_old:
        fields = _upgrade(fields, config)
    fields = open_sealed(fields, path, {"format": whole(1), **RUN_RULES}, "copy it again, or train the run again")
    del fields["format"]
    run = Run(**fields)
    for file, expected in ((adapter, run.adapter_sha256), (config, run.adapter_config_sha256)):
        if (found := file_sha256(file)) != expected:
            raise InputError(
                f"{file}: cut or changed (sha256 {found[:12]}…, run.json says {expected[:12]}…); copy it again or train again"
            )
    if is_old:
        _require_config_of(run, config)
        print(
            f"note: {folder} is of an earlier version: whether its settings were edited can't be told", file=sys.stderr
        )
    return run


def soup_members(run: Run) -> list[str]:
    """Hashes of the adapters whose mean a run's is; none of a run that was trained."""
    members = run.settings.get("soup", [])
    hashes = (
        [each.get("adapter_sha256") for each in members if isinstance(each, dict)] if isinstance(members, list) else []
    )
    return [each for each in hashes if isinstance(each, str)]


def require_same_run(folder: Path, run: Run) -> None:
    """Call it when all of a run has been read.

    Raises:
        InputError: another run has taken its place meanwhile.
    """
    if read_run(folder) != run:
        raise InputError(f"{folder}: another run took its place while it was read; run the same command again")


def _require_config_of(run: Run, config: Path) -> None:
    """Of a run of format 1, which has no digest of the adapter's configuration: what scales the adapter is what was trained.

    Raises:
        InputError: it is not.
    """
    found = read_json(config)
    names = {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora"}  # a soup's settings have the rank alone
    wanted = {names[name]: run.settings[name] for name in names if name in run.settings}
    for name, value in {"peft_type": "LORA", "alpha_pattern": {}, **wanted}.items():
        if found.get(name) != value:
            raise InputError(
                f"{config}: {name} is {found.get(name)!r:.80}, the run was trained with {value!r}; copy it again, or train the run again"
            )


def _upgrade(fields: Mapping[str, Any], config: Path) -> dict[str, Any]:
    """A run.json of format 1 as one of today: what had no digest then counts as it is found.

    Its own fields come last: a file of today that was edited to say format 1 keeps its digest, and is found out.
    """
    upgraded = {"adapter_config_sha256": file_sha256(config), "base_identity": {}, **fields}
    return {"sha256": content_sha256(upgraded), **upgraded}


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes settings.json, what --resume goes on with."""
    if wrong := settings.keys() ^ SETTING_RULES.keys():
        raise ValueError(f"settings without a rule, or rules without a setting: {sorted(wrong)}")
    write_sealed(folder / "settings.json", settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a started run.

    Raises:
        InputError: no such file, edited, or of another version.
    """
    remedy = "resume it with the version that started it, or start it anew with --overwrite"
    return read_sealed(folder / "settings.json", SETTING_RULES, remedy)


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
