"""Runs: what is read is what was written. Atomic files: complete or untouched."""

import errno
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ksat.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED, InputError, exit_code
from ksat.files import file_sha256, read_json, write_atomic, write_json, write_text
from ksat.run_folders import settle_run
from ksat.runs import (
    RUN_RULES,
    SETTING_RULES,
    Run,
    read_run,
    read_settings,
    require_same_run,
    write_run,
    write_settings,
)
from ksat.sealed import write_sealed


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_is_written_byte_for_byte_and_folders_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "x.txt", "가\r\n나\n")
    assert (tmp_path / "a" / "b" / "x.txt").read_bytes() == "가\r\n나\n".encode()


def test_the_old_file_stands_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write(beside: Path) -> None:
        beside.write_text("new")
        assert path.read_text() == "old"
        assert beside.parent == path.parent  # the same disk, so that the rename is atomic

    write_atomic(path, write)
    assert path.read_text() == "new"


def test_full_disk_while_writing_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write(beside: Path) -> None:
        beside.write_text("half of the n")
        no_space()

    with pytest.raises(InputError, match=r"x.txt: can't be written \(No space left on device\); nothing was changed"):
        write_atomic(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_at_the_flush_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(InputError, match="No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_ctrl_c_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def write(beside: Path) -> None:
        beside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, write)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"


def test_a_file_where_a_folder_is_needed_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/x.txt: can't be written \(File exists\)"):
        write_text(tmp_path / "file" / "x.txt", "new")


def test_a_name_too_long_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"):
        write_text(tmp_path / ("x" * 300), "new")


def test_json_round_trip_and_nan_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"이름": [1, 0.1, None]})
    assert read_json(tmp_path / "x.json") == {"이름": [1, 0.1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "y.json", {"loss": float("nan")})
    assert not (tmp_path / "y.json").exists()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "x.json: no such file"),
        (b'{"a": 1', r"x.json: not JSON \(.*; the file is cut or was edited"),
        (b"\xff", r"x.json: not UTF-8 \(byte 0xff at 0\)"),
        (b"[" * 100_000, r"x.json: not JSON \(nested too deeply\); the file is cut or was edited"),
        (b'{"a": ' + b"9" * 5000 + b"}", r"x.json: not JSON \(Exceeds the limit"),
        (rb'{"a": "\ud800"}', r"x.json: not JSON \('utf-8' codec can't encode character '\\ud800'"),
        (b"[1]", "x.json: expected a JSON object, found list"),
    ],
)
def test_read_json_validates(tmp_path: Path, content: bytes | None, match: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=match):
        read_json(tmp_path / "x.json")


def test_file_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise InputError("x.csv: bad")

    def interrupt() -> None:
        raise KeyboardInterrupt

    assert exit_code(lambda: None) == EXIT_DONE
    assert exit_code(refuse) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == "error: x.csv: bad\n"
    assert exit_code(interrupt) == EXIT_INTERRUPTED
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback, and Python exits with 1
        exit_code(lambda: print(1 // 0))


SHA = "0123456789abcdef" * 4
SETTINGS: dict[str, Any] = {
    "base": "some/base", "base_identity": {"revision": "a1"}, "score_by": "label", "template": {"system": "", "user": "{choices}"},
    "max_tokens": 4096, "quantization": "none", "data": [{"file": "data/train.csv", "sha256": SHA}], "valid_fraction": 0.1, "prompt": None,
    "limit": None, "seed": 0, "report_to": "none", "rank": 8, "alpha": 16.0, "dropout": 0.0, "rslora": True, "epochs": 2, "lr": 1e-4,
    "schedule": "cosine", "warmup": 0.05, "weight_decay": 0.0, "questions_per_step": 4, "patience": 1, "loss": "choices",
    "choice_orders": 1, "folds": None, "fold": None, "folds_sha256": None, "leave_out": None, "leave_out_sha256": None, "valid": ["other.csv"], "valid_sha256": [SHA], "context_when": "short:300", "kinds": "kinds.csv", "kinds_sha256": SHA, "choices_tell_kinds": True, "answer_positions": {"4": [3, 0, 1, 2]}, "dtype": "float32",
    "engine": "transformers", "pack_tokens": 512,
}  # fmt: skip


CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": True, "alpha_pattern": {}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run, whose adapter's weights are a short text."""
    write_text(tmp_path / "adapter/adapter_model.safetensors", "weights")
    write_json(tmp_path / "adapter/adapter_config.json", CONFIG)
    hashes = {
        name: file_sha256(tmp_path / "adapter" / file)
        for name, file in (
            ("adapter_sha256", "adapter_model.safetensors"),
            ("adapter_config_sha256", "adapter_config.json"),
        )
    }
    shared = {name: SETTINGS[name] for name in Run.__slots__ if name in SETTINGS}
    write_run(tmp_path, Run(**shared, **hashes, scale=3.5, settings=SETTINGS, versions={"python": "3.11"}))
    write_settings(tmp_path, SETTINGS)
    return tmp_path


def test_runs_and_settings_are_read_as_they_were_written(folder: Path) -> None:
    run = read_run(folder)
    assert (run.scale, run.base_identity, run.settings) == (3.5, {"revision": "a1"}, SETTINGS)
    assert read_settings(folder) == SETTINGS


def test_what_a_run_says_of_its_kinds_and_one_of_before_does_not(folder: Path) -> None:
    run = read_run(folder)
    found = {
        told: replace(run, settings={"rank": 4, **dict(told)}).choices_tell_kinds
        for told in (
            (("choices_tell_kinds", True), ("kinds", None)),
            (("choices_tell_kinds", False), ("kinds", None)),
            (("kinds", None),),
            (("kinds", "wording"),),
            (),
        )
    }
    assert list(found.values()) == [True, False, None, False, None]


def test_every_edit_of_every_field_is_found_out(folder: Path) -> None:
    """Whatever stands there instead, also what the field's rule would take."""
    for name, read in (("run.json", read_run), ("settings.json", read_settings)):
        path = folder / name
        whole = read_json(path)
        for field in whole:
            for value in (None, 7, -0.5, "label", "text", "", {}, [], {"x": "y"}, True, SHA, 2):
                if value != whole[field] or type(value) is not type(whole[field]):
                    path.write_text(json.dumps(whole | {field: value}))
                    with pytest.raises(InputError, match=f"{name}: (edited or damaged|another format than 2)"):
                        read(folder)
            path.write_text(json.dumps({other: value for other, value in whole.items() if other != field}))
            with pytest.raises(InputError, match=f"{name}: (fields missing or unknown: '{field}'|another format)"):
                read(folder)
        path.write_text(json.dumps(whole | {"new\n": 1}))
        with pytest.raises(InputError, match=r"fields missing or unknown: 'new\\n'"):
            read(folder)
        path.write_text(json.dumps(whole, indent=3, sort_keys=True))  # the same content
        read(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base", ""), ("base", 3), ("base_identity", {"config.json": 1}), ("score_by", "letters"), ("template", {"user": ""}),
        ("template", {"system": 1, "user": ""}), ("max_tokens", 0), ("max_tokens", 512.0), ("scale", 0.001), ("scale", 1e9), ("scale", True),
        ("scale", "1"), ("quantization", "int8"), ("adapter_sha256", SHA[1:]), ("adapter_config_sha256", SHA.upper()), ("settings", {}),
        ("settings", {"rank": 4, "context_when": "some"}), ("settings", {"rank": 4, "answer_positions": {"4": [1]}}), ("data", [{"file": "x"}]), ("data", {}), ("versions", {"torch": 2}),
        ("valid_fraction", 0.6), ("prompt", 1), ("limit", 0), ("seed", -1), ("report_to", None), ("rank", 1.5), ("alpha", 0), ("dropout", 1),
        ("rslora", 1), ("epochs", 0), ("lr", 1.1), ("schedule", "step"), ("warmup", 1), ("weight_decay", -1), ("questions_per_step", 0),
        ("patience", 0), ("loss", "mse"), ("choice_orders", 0), ("folds", 1), ("fold", -1), ("folds_sha256", "x"), ("leave_out", 1), ("leave_out_sha256", "x"), ("valid", []), ("valid", "other.csv"), ("valid_sha256", None), ("valid_sha256", ["x"]), ("context_when", "short:0"), ("kinds", 1), ("choices_tell_kinds", None), ("choices_tell_kinds", 1), ("settings", {"rank": 4, "choices_tell_kinds": 1}), ("settings", {"rank": 4, "kinds": 1}), ("answer_positions", {"2": [1, -1]}),
        ("dtype", "int8"), ("engine", "vllm"), ("pack_tokens", None),
    ],
)  # fmt: skip
def test_fields_have_types_and_ranges(folder: Path, field: str, value: Any) -> None:
    """Also of a file whose digest is right."""
    for name, rules, read in (("run.json", RUN_RULES, read_run), ("settings.json", SETTING_RULES, read_settings)):
        if field in rules:
            content = {key: old for key, old in read_json(folder / name).items() if key != "sha256"}
            write_sealed(folder / name, content | {field: value})
            with pytest.raises(InputError, match=f"{name}: {field} is .*, expected .*"):
                read(folder)


def test_runs_of_the_format_before_are_taken_with_a_note(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = read_json(folder / "run.json")
    new = ("sha256", "adapter_config_sha256", "base_identity")
    write_json(folder / "run.json", {k: v for k, v in stored.items() if k not in new} | {"format": 1})
    for name, value in (
        ("lora_alpha", 999),
        ("use_rslora", False),
        ("r", 4),
        ("peft_type", "IA3"),
        ("alpha_pattern", {"q_proj": 9}),
    ):
        write_json(folder / "adapter/adapter_config.json", CONFIG | {name: value})
        with pytest.raises(InputError, match=f"adapter_config.json: {name} is .*, the run was trained with "):
            read_run(folder)
    write_json(folder / "adapter/adapter_config.json", CONFIG)
    run = read_run(folder)
    assert (run.scale, run.base_identity) == (3.5, {})
    assert run.adapter_config_sha256 == file_sha256(folder / "adapter/adapter_config.json")
    assert f"note: {folder} is of an earlier version" in capsys.readouterr().err
    write_json(folder / "run.json", {k: v for k, v in stored.items() if k not in new} | {"format": 1, "scale": 1e9})
    with pytest.raises(InputError, match="scale is 1000000000.0, expected 0.01 to 1000"):
        read_run(folder)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_that_was_changed_is_refused(folder: Path, file: str) -> None:
    path = folder / "adapter" / file
    path.write_text(path.read_text() + " ")
    with pytest.raises(
        InputError, match=rf"{file}: cut or changed \(sha256 .*, run.json says .*copy it again or train"
    ):
        read_run(folder)
    path.unlink()
    with pytest.raises(InputError, match=f"{file}: no such file; the checkpoint was not copied as a whole"):
        read_run(folder)


def test_leftovers_go_when_a_run_is_read_and_are_in_nobody_s_way_where_nothing_can_be_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder.rename(folder.with_name("r"))
    old = place.with_name(".r.old")
    shutil.copytree(place, old)
    (place / "trainer").mkdir()

    def refused(*_: object, **__: object) -> None:
        raise InputError("can't be locked")

    with monkeypatch.context() as patch:
        patch.setattr("ksat.run_folders.lock", refused)
        assert read_run(place).scale == 3.5
    assert old.exists()
    read_run(place)
    assert not old.exists()
    assert not (place / "trainer").exists()


def test_a_run_whose_name_leaves_no_room_for_leftovers_beside_it_is_read(folder: Path) -> None:
    """Not made by train.py, which takes 200 bytes, but copied or renamed."""
    place = folder.rename(folder.with_name("가" * 84))
    assert read_run(place).scale == 3.5
    require_same_run(place, read_run(place))
    with pytest.raises(InputError, match=r"can't be looked at \(File name too long\); give the folder a shorter name"):
        settle_run(place)


def test_settings_without_a_rule_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="settings without a rule, or rules without a setting: .'new'"):
        write_settings(tmp_path, SETTINGS | {"new": 1})
