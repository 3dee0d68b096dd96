"""The set-up: which requirements a machine gets, and that each pin stands in one place."""

import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import inference

ROOT = Path(__file__).parent.parent


def requirement_files() -> list[Path]:
    return [*ROOT.glob("requirements*.txt"), *(ROOT / "requirements").glob("*.txt")]


@pytest.mark.parametrize(
    ("printed", "file"),
    [
        ("7.0", "requirements-v100.txt"),
        ("7.5", "requirements.txt"),
        ("9.0", "requirements.txt"),
        ("12.0", "requirements.txt"),
        ("9.0\n7.0", "requirements-v100.txt"),
        ("", "requirements-cpu.txt"),
        ("No devices were found", "requirements-cpu.txt"),
    ],
)
def test_nvidia_smi_decides_which_requirements_are_installed(tmp_path: Path, printed: str, file: str) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\nprintf '%s\\n' '{printed}'\n")
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["sh", "requirements/pick.sh"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == file
    assert file in result.stderr  # it says what it picked


def test_every_requirement_is_pinned_and_no_file_repeats_a_pin() -> None:
    for path in requirement_files():
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith(("#", "-r "))]
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), path
    pins = Counter(
        line for path in requirement_files() for line in path.read_text().splitlines() if re.match(r"[\w.-]+==", line)
    )
    assert all(count == 1 for count in pins.values()), pins


def test_every_included_requirements_file_exists() -> None:
    for path in requirement_files():
        for name in re.findall(r"^-r (.+)$", path.read_text(), flags=re.MULTILINE):
            assert (path.parent / name).exists(), f"{path}: {name}"


def test_shots_are_not_negative(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        inference.build_parser().parse_args(["--shots", "-1"])
    assert "-1 is not a whole number from 0" in capsys.readouterr().err
