"""What is said of a run that can't be read, to the last character, and the versions that are noted."""

import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from test_runs import SETTINGS, folder  # noqa: F401  # a fixture

from ksat.errors import InputError
from ksat.files import file_sha256, read_json, write_json
from ksat.runs import library_versions, read_run, read_settings, require_same_run, soup_members, write_settings
from ksat.sealed import content_sha256


def said(do: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        do()
    return str(caught.value)


def test_what_is_said_of_a_run_that_is_none(folder: Path) -> None:  # noqa: F811
    none = folder / "none"
    assert said(lambda: read_run(none)) == (
        f"--ckpt {none}: no such folder; expected checkpoints/<run> as train.py writes it"
    )
    none.mkdir()
    assert said(lambda: read_run(none)) == (
        f"--ckpt {none}: no run.json; expected checkpoints/<run> as train.py writes it"
    )
    shutil.copy(folder / "settings.json", none)
    assert said(lambda: read_run(none)) == (
        f"--ckpt {none}: no run.json; the run is not finished: python train.py --run none --resume"
    )
    stored = read_json(folder / "run.json")
    for number in (0, 3, None):
        write_json(folder / "run.json", stored | {"format": number})
        assert said(lambda: read_run(folder)) == (
            f"{folder}/run.json: another format than 2; train the run with this version"
        )


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_what_is_said_of_an_adapter(folder: Path, name: str) -> None:  # noqa: F811
    file = folder / "adapter" / name
    before = file_sha256(file)
    file.write_text("other")
    assert said(lambda: read_run(folder)) == (
        f"{file}: cut or changed (sha256 {file_sha256(file)[:12]}…, run.json says {before[:12]}…); copy it again or train again"
    )
    file.unlink()
    file.mkdir()
    assert said(lambda: read_run(folder)) == f"{file}: no such file; the checkpoint was not copied as a whole"


def test_another_run_that_took_the_place_is_named(folder: Path) -> None:  # noqa: F811
    run = read_run(folder)
    require_same_run(folder, run)
    assert said(lambda: require_same_run(folder, replace(run, scale=3.25))) == (
        f"{folder}: another run took its place while it was read; run the same command again"
    )


@pytest.mark.parametrize(
    ("soup", "hashes"),
    [
        ([{"adapter_sha256": "a"}, {"adapter_sha256": "b", "run": "r"}], ["a", "b"]),
        (["a", {"adapter_sha256": 1}, {"run": "r"}, {"adapter_sha256": "b"}], ["b"]),
        ({"adapter_sha256": "a"}, []),
    ],
)
def test_members_of_a_soup_are_their_adapters(folder: Path, soup: Any, hashes: list[str]) -> None:  # noqa: F811
    run = read_run(folder)
    assert soup_members(run) == []
    assert soup_members(replace(run, settings={**run.settings, "soup": soup})) == hashes


def test_what_is_said_of_an_edited_run(folder: Path) -> None:  # noqa: F811
    stored = read_json(folder / "run.json")
    write_json(folder / "run.json", stored | {"scale": 3.25})
    assert said(lambda: read_run(folder)).endswith("copy it again, or train the run again")
    settings = read_json(folder / "settings.json")
    write_json(folder / "settings.json", settings | {"seed": 1})
    assert said(lambda: read_settings(folder)).endswith(
        "resume it with the version that started it, or start it anew with --overwrite"
    )


def test_a_run_of_the_format_before(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    stored = read_json(folder / "run.json")
    assert stored["format"] == 2
    read_run(folder)
    assert capsys.readouterr() == ("", "")
    old = {k: v for k, v in stored.items() if k not in ("sha256", "adapter_config_sha256", "base_identity")}
    write_json(folder / "run.json", old | {"format": 1})
    run = read_run(folder)
    assert (run.base, run.base_identity, run.settings) == (stored["base"], {}, stored["settings"])
    note = f"note: {folder} is of an earlier version: whether its settings were edited can't be told\n"
    assert capsys.readouterr() == ("", note)
    # One of today that was edited to say 1 keeps its digest, and is found out.
    write_json(folder / "run.json", stored | {"format": 1})
    assert "edited or damaged" in said(lambda: read_run(folder))


def test_settings_and_their_rules_are_the_same(tmp_path: Path) -> None:
    message = r"^settings without a rule, or rules without a setting: \['new', 'seed'\]$"
    with pytest.raises(ValueError, match=message):
        write_settings(tmp_path, {k: v for k, v in SETTINGS.items() if k != "seed"} | {"new": 1})
    write_settings(tmp_path, SETTINGS)
    assert read_json(tmp_path / "settings.json") == SETTINGS | {"sha256": content_sha256(SETTINGS)}


def test_versions_of_what_decides_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "unsloth", "pandas", "scikit-learn")

    def version(name: str) -> str:
        if name == "trl":
            raise metadata.PackageNotFoundError(name)
        return f"{name} 1"

    monkeypatch.setattr(metadata, "version", version)
    expected = {name: f"{name} 1" for name in names if name != "trl"}
    assert library_versions() == {"python": platform.python_version(), **expected}
