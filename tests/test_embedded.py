"""Embedded bases in their cache: converted once, whole or not there, and nothing of an unfinished conversion stays."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ksat import embedded
from ksat.embedded import EMBEDDED, embedded_path
from ksat.errors import InputError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a conversion that writes one small file."""

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x" * 100)

    def join(model: Any, target: Path) -> Path:
        target.parent.mkdir()
        target.write_bytes(b"gguf")
        return target

    monkeypatch.setenv("KSAT_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded, "_join", join)
    return tmp_path


def names(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if not path.name.endswith(".lock")}


def test_what_a_killed_conversion_left_is_removed_by_the_next(cache: Path) -> None:
    own = f"embedded-{EMBEDDED['embedded'].sha256[:12]}-1"
    for name in (f".{own}.tmp", ".embedded-abc_1234", ".embedded-small-abc_1234", own):
        (cache / name / "converted").mkdir(parents=True)
        (cache / name / "model.gguf").write_bytes(b"half")
    assert embedded_path("embedded") == cache / own
    assert {path.name for path in (cache / own).iterdir()} == {"model.safetensors", "source.json"}
    assert names(cache) == {own, ".embedded-small-abc_1234"}  # which may be at work, under a lock of its own
    embedded_path("embedded-small")
    assert names(cache) == {own, f"embedded-small-{EMBEDDED['embedded-small'].sha256[:12]}-1"}


def test_what_was_left_beside_a_whole_one_goes_too(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded_path("embedded")
    for name in (f".{folder.name}.tmp", ".embedded-abc_1234"):
        (cache / name).mkdir()
        (cache / name / "model.gguf").write_bytes(b"half")

    def refused(_: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(embedded.shutil, "rmtree", refused)
        assert embedded_path("embedded") == folder
    assert embedded_path("embedded") == folder
    assert names(cache) == {folder.name}


@pytest.mark.parametrize("damage", ["cut", "gone", "marker"])
def test_a_converted_base_that_is_not_whole_is_converted_again(cache: Path, damage: str) -> None:
    folder = embedded_path("embedded")
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(b"x" * 99)
    elif damage == "gone":
        weights.unlink()
    else:
        (folder / "source.json").write_text('{"sizes": [')
    assert embedded_path("embedded") == folder
    assert weights.stat().st_size == 100
    before = weights.stat().st_mtime_ns
    embedded_path("embedded")
    assert weights.stat().st_mtime_ns == before


def test_a_full_disk_is_one_line_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tokenizers raises a plain Exception for it."""

    def save(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        raise Exception("No space left on device (os error 28)")

    model = SimpleNamespace(
        config=SimpleNamespace(quantization_config=None, model_type="llama"),
        save_pretrained=lambda folder: folder.mkdir(),
    )
    monkeypatch.undo()
    monkeypatch.setenv("KSAT_CACHE", str(cache))
    monkeypatch.setattr(embedded, "_join", lambda model, target: target.parent.mkdir() or target)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **how: model)
    tokenizer = SimpleNamespace(save_pretrained=save)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **how: tokenizer)
    with pytest.raises(InputError, match=r"the embedded model can't be stored \(Exception: No space left .*KSAT_CACHE"):
        embedded_path("embedded-small")
    assert names(cache) == set()


def test_what_is_asked_of_a_gguf_file_is_read_once_and_only_while_it_is_converted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import gguf

    reads = []
    monkeypatch.setattr(gguf, "GGUFReader", reads.append)
    with pytest.raises(ZeroDivisionError), embedded._read_once():
        gguf.GGUFReader("a")
        gguf.GGUFReader("a")
        raise ZeroDivisionError
    assert reads == ["a"]
    gguf.GGUFReader("a")
    assert reads == ["a", "a"]
