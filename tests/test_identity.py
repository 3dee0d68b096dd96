"""Which base it is: another one in its place is named when a run is scored, and never goes on with its scores."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import base_folder, make_questions, make_run, write_questions

import inference
from ksat.embedded import EMBEDDED
from ksat.errors import InputError
from ksat.files import read_json
from ksat.identity import identify_base, identify_files, name_difference
from ksat.journal import Journal

CPU = ["--device", "cpu", "--engine", "transformers", "--pack-tokens", "1"]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a tiny base in the current folder, beside a test file."""
    monkeypatch.chdir(tmp_path)
    write_questions(Path("test.csv"), make_questions(4), labelled=False)
    return Path(shutil.copytree(base_folder(), "base"))


def other_weights(base: Path) -> None:
    """As a model of the same size that was trained otherwise: file names and sizes stay."""
    path = base / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def test_a_folder_is_known_by_its_files(base: Path) -> None:
    known = identify_base("base")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= known.keys()
    assert identify_base(str(base.resolve())) == known == identify_base(str(base_folder()))
    (base / "README.md").write_text("nothing that is loaded")
    assert name_difference(known, identify_base("base")) == ""
    other_weights(base)
    (base / "tokenizer_config.json").unlink()
    (base / "added_tokens.json").write_text("{}")
    (base / "adapter_config.json").write_text("{}")  # of an adapter that transformers puts on the base
    difference = name_difference(known, identify_base("base"))
    assert difference == "adapter_config.json is new, added_tokens.json is new, model.safetensors differs and 1 more"
    (base / "config.json").write_text("{}")
    assert name_difference(known, identify_base("base")).endswith(", config.json differs and 2 more")


def test_a_hub_s_base_is_known_by_its_revision_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert identify_base("some/base") == {}  # not loaded yet
    assert identify_base("no name!") == {}
    for commit in ("a" * 40, "b" * 40):
        snapshot = tmp_path / "models--some--base/snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (tmp_path / "models--some--base/refs").mkdir(exist_ok=True)
        (tmp_path / "models--some--base/refs/main").write_text(commit)
        assert identify_base("some/base") == {"revision": commit}
        assert [entry[:2] for entry in identify_files("some/base")["files"]] == [["config.json", 2]]
    assert name_difference({"revision": "a" * 40}, {"revision": "b" * 40}) == f"revision {'b' * 12}, not {'a' * 12}"
    assert name_difference({}, {"revision": "b" * 40}) == name_difference({"revision": "b" * 40}, {}) == ""


def test_an_embedded_base_is_known_by_its_bytes() -> None:
    assert identify_base("embedded") == {"sha256": EMBEDDED["embedded"].sha256}


def test_scores_of_another_base_are_not_gone_on_with(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(out: str, *flags: str) -> list[list[str]]:
        inference.main([*CPU, "--base", "base", "--test", "test.csv", "--out", f"out/{out}", *flags])
        return [line.split(",") for line in Path(f"out/{out}.probs.csv").read_text().splitlines()]

    kept = Journal.add

    def killed(self: Journal, scores: dict[str, list[float]]) -> None:
        kept(self, scores)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            score("cut")
    other_weights(base)
    with pytest.raises(InputError, match=r"with other settings \(base files\) was interrupted there; .*--overwrite"):
        score("cut")
    assert score("cut", "--overwrite") == score("fresh")
    assert read_json(Path("out/cut.probs.json"))["base_identity"] == identify_base("base")


def test_a_run_on_another_base_is_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(Path("checkpoints/r"), on=Path("base"))
    command = [*CPU, "--ckpt", "checkpoints/r", "--test", "test.csv", "--overwrite"]
    inference.main(command)
    assert "warning" not in capsys.readouterr().err
    other_weights(base)
    inference.main(command)
    told = "warning: --base base is not the one that checkpoints/r was trained on (model.safetensors differs)"
    assert told in capsys.readouterr().err


def test_weights_are_sampled_from_the_first_byte_to_the_last(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for size in (0, 1, 5000, 10**6):
        content = torch.arange(size, dtype=torch.uint8).numpy().tobytes()
        seen: set[Any] = set()
        for place in (None, 0, size - 1) if size else (None,):
            changed = bytearray(content)
            if place is not None:
                changed[place] ^= 1
            path.write_bytes(changed)
            seen.add(identify_base(str(tmp_path))["model.safetensors"])
        assert len(seen) == len({None, 0, size - 1} if size else {None})
