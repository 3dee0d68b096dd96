"""Atomic files: complete or untouched."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from ksat.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED, InputError, exit_code
from ksat.files import file_sha256, read_json, write_atomic, write_json, write_text


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
