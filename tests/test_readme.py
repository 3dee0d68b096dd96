"""Every command of the READMEs runs as pasted, and every --help."""

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compare
import ensemble
import explore
import inference
import train
from ksat import retrieve, soup

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.ko.md")


def commands(readme: str, fence: str) -> list[str]:
    """The lines of a README's fences of this kind, comments taken off."""
    text = (ROOT / readme).read_text(encoding="utf-8")
    blocks = re.findall(rf"^```{fence}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("python ")]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    assert words[0] == "python"
    return subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose data/ holds a four-question competition: the commands are real, the wait is not."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("train.py", "inference.py", "ensemble.py", "explore.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "ksat", folder / "ksat", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "prompts", folder / "prompts")
    (folder / "data").mkdir()
    for name in ("train", "test"):
        with (ROOT / "data" / f"sample_{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: len(row["paragraph"] + row["problems"]))[:4]
        with (folder / "data" / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["id", "paragraph", "problems", "question_plus"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def test_both_readmes_give_the_same_commands() -> None:
    for fence in ("bash", "bash gpu"):
        assert commands("README.md", fence) == commands("README.ko.md", fence)
        assert commands("README.md", fence)


def test_no_readme_has_an_unfilled_placeholder() -> None:
    for readme in READMES:
        assert not re.findall(r"\b[A-Z]+_(?:ROWS|TABLE|MINUTES)\w*", (ROOT / readme).read_text(encoding="utf-8"))


def test_every_readme_command_runs_as_pasted(checkout: Path) -> None:
    for command in commands("README.md", "bash"):
        result = run(command, checkout)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    submission = (checkout / "submissions" / "blend.csv").read_text().splitlines()
    assert submission[0] == "id,answer"
    assert len(submission) == 5


def test_every_gpu_command_of_the_readme_is_a_valid_command_line() -> None:
    """These need a GPU and a hub; here their flags are parsed."""
    parsers = {
        "train.py": train.build_parser(),
        "inference.py": inference.build_parser(),
        "ensemble.py": ensemble.build_parser(),
        "explore.py": explore.build_parser(),
        "compare.py": compare.build_parser(),
        "ksat.soup": soup.build_parser(),
        "ksat.retrieve": retrieve.build_parser(),
    }
    for command in commands("README.md", r"bash gpu"):
        script, *flags = [word for word in shlex.split(command)[1:] if word != "-m"]
        parsers[script].parse_args(flags)


@pytest.mark.parametrize("script", ["train.py", "inference.py", "ensemble.py", "explore.py", "compare.py"])
def test_help_is_instant_and_names_every_default(script: str) -> None:
    code = f"import sys; sys.argv=['{script}', '--help']\ntry:\n import runpy; runpy.run_path('{script}', run_name='__main__')\nfinally:\n assert 'torch' not in sys.modules and 'pandas' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
