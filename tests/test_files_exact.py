"""What is said of files, to the last character, and what stands in them, to the last byte."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from ksat.errors import InputError
from ksat.files import (
    LockedError,
    claim_outputs,
    csv_writer,
    file_sha256,
    lock,
    parse_json,
    read_json,
    read_text,
    require_name,
    require_no_input,
    text_writer,
    to_json,
    write_atomic,
)


def said(do: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        do()
    return str(caught.value)


def claim(paths: list[Path], inputs: list[Path | str | None], flag: str = "--out", *, overwrite: bool = False) -> None:
    with claim_outputs(paths, inputs=inputs, overwrite=overwrite, command="c", flag=flag):
        pass


def test_what_is_said_of_outputs(tmp_path: Path) -> None:
    x, y = tmp_path / "x", tmp_path / "y"
    assert (
        said(lambda: claim([y, x], [None, str(x)], "--to")) == f"--to: {x} is the input {x} itself; choose another --to"
    )
    x.mkdir()
    assert said(lambda: claim([y, x], [])) == (
        f"--out: {x} is a folder, where a file is to be written; choose another --out"
    )
    x.rmdir()
    y.write_text("")
    assert said(lambda: claim([y, x], [])) == f"{y} exists already; choose another --out, or replace with --overwrite"
    assert said(lambda: claim([y, x], [], "--to", overwrite=True)) == (
        f"{y} exists already, and without x it is no output of ours; choose another --to, or move it away"
    )
    x.write_text("")
    assert said(lambda: claim([y, x], [])) == (
        f"{y} and {x} exist already; choose another --out, or replace with --overwrite"
    )
    claim([y, x], [], overwrite=True)


def test_what_is_said_of_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x"
    with lock(path, "run"):
        assert (tmp_path / "new" / ".x.lock").exists()
        with pytest.raises(LockedError) as caught, lock(path, "run"):
            pass
    assert str(caught.value) == f"{path}: another process is at work on this run; wait for it, or choose another name"
    assert list(tmp_path.iterdir()) == []  # nor the folder that was made for it
    with lock(path, "run"):  # free again
        pass
    (tmp_path / "file").write_text("")
    message = f"{tmp_path}/file/x: can't be locked (File exists); choose another place"
    with pytest.raises(InputError) as caught_error, lock(tmp_path / "file" / "x", "run"):
        pass
    assert str(caught_error.value) == message


@pytest.mark.parametrize("fault", [FileNotFoundError, FileExistsError])
def test_a_lock_is_got_though_another_process_removes_its_folder_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[OSError]
) -> None:
    """It made the folder for its own lock, and is done: the folder goes between mkdir and the lock, or within mkdir."""
    path, acquire, gone = tmp_path / "new" / "x", FileLock.acquire, []

    def acquire_later(self: FileLock) -> object:
        if len(gone) < 3:
            gone.append(path.parent.rmdir())  # type: ignore[func-returns-value]
            raise fault
        return acquire(self)

    monkeypatch.setattr(FileLock, "acquire", acquire_later)
    with lock(path, "run"):
        assert (tmp_path / "new" / ".x.lock").exists()
    assert (len(gone), list(tmp_path.iterdir())) == (3, [])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "--run '': expected a name, without blanks around it"),
        ("a ", "--run 'a ': expected a name, without blanks around it"),
        ("a/b", "--run 'a/b': expected a plain name, without slashes and without a dot in front"),
        (".a", "--run '.a': expected a plain name, without slashes and without a dot in front"),
        ("a\x07", "--run 'a\\x07': has a character that does not print; take it out"),
        ("\u3164", "--run '\\u3164': nothing of it shows; choose another name"),
        ("\u2800\ufe0f", "--run '\\u2800\\ufe0f': nothing of it shows; choose another name"),
        ("b" * 201, f"--run '{'b' * 40}'…: 201 bytes long, expected at most 200"),
    ],
)
def test_what_is_said_of_a_name(name: str, message: str) -> None:
    assert said(lambda: require_name("--run", name)) == message
    for good in ("b" * 200, "가\u1160", "\u2714\ufe0f"):  # old Hangul and emoji have fillers and selectors in them
        assert require_name("--run", good) == good


def test_what_is_said_of_a_file_that_can_t_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none, bad = tmp_path / "none", tmp_path / "bad"
    bad.write_bytes(b"ab\xff")
    assert said(lambda: read_text(none)) == f"{none}: no such file; check the path"
    assert said(lambda: file_sha256(none)) == f"{none}: no such file; check the path"
    assert said(lambda: read_text(none, "--prompt p")) == "--prompt p: no such file; check the path"
    assert said(lambda: read_text(tmp_path)) == f"{tmp_path}: a folder where a file is expected; name the file in it"
    assert said(lambda: read_text(bad)) == f"{bad}: not UTF-8 (byte 0xff at 2); save the file as UTF-8"
    assert (
        said(lambda: read_text(bad, "--prompt p")) == "--prompt p: not UTF-8 (byte 0xff at 2); save the file as UTF-8"
    )
    assert said(lambda: read_text(Path("a\0b"), "p")) == "p: has a NUL in its name; check the path"

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert said(lambda: read_text(bad)) == f"{bad}: can't be read (Permission denied); check the path and its rights"


def test_text_is_read_as_it_stands_but_for_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes("\ufeff가\r\n\ufeff".encode())
    assert read_text(path) == "가\r\n\ufeff"
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_is_said_of_json(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for text, message in (
        (
            "{",
            "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); the file is cut or was edited",
        ),
        ("[" * 100_000, "not JSON (nested too deeply); the file is cut or was edited"),
        (f'{{"a": {10**309}}}', "not JSON (a number of 310 digits); the file is cut or was edited"),
        ("3", "expected a JSON object, found int"),
    ):
        path.write_text(text)
        assert said(lambda: read_json(path)) == f"{path}: {message}"
    path.write_text('{"a": "\\uD800"}')
    assert said(lambda: read_json(path)).startswith(f"{path}: not JSON ('utf-8' codec can't encode")
    path.write_text('{"a": "\\uD83D\\uDE00 \\ud55c"}')
    assert read_json(path) == {"a": "😀 한"}
    assert parse_json(" [1, 1.5] ") == [1, 1.5]
    assert parse_json(str(-(10**308))) == -(10**308)


def test_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert to_json({"이": [1, None]}) == '{\n "이": [\n  1,\n  null\n ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(float("inf"))
    write_atomic(path, csv_writer(("a", "b"), [("1", 'q"'), ("\r\n", 2)]))
    assert path.read_bytes() == b'a,b\n1,"q"""\n"\r\n",2\n'
    write_atomic(path, csv_writer(("a", "b"), [("1", 2)], quote_all=True))
    assert path.read_bytes() == b'"a","b"\n"1","2"\n'
    write_atomic(path, text_writer("가\r\n"))
    assert path.read_bytes() == "가\r\n".encode()


def test_what_was_written_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append((os.readlink(f"/proc/self/fd/{number}"), (tmp_path / "x").exists()))
    )
    write_atomic(tmp_path / "x", text_writer("new"))
    assert synced == [(str(tmp_path / ".x.tmp"), False)]


def test_an_input_is_known_under_any_name(tmp_path: Path) -> None:
    file, other, link = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    file.write_text("")
    other.write_text("")
    os.link(file, link)
    require_no_input([file], [None, other, str(tmp_path / "none")], "--out")
    require_no_input([tmp_path / "none"], [file, tmp_path / "nothing"], "--out")
    message = f"--to: {link} is the input {file} itself; choose another --to"
    assert said(lambda: require_no_input([other, link], [None, file], "--to")) == message
