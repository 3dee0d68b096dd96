"""Mutants: small faults planted one by one into the rooms that decide a result, and how many of them the tests notice.

python tests/mutants.py [ROOM ...]       # all rooms if none is named; docs/testing.md holds the last run

mutmut (requirements/mutants.txt) works in mutants/<room>, on a copy of the project and with that room's tests alone. What
is there already is kept: only mutants of changed functions and those that survived are tried again. The survivors go to
mutants/survivors-<room>.txt, each as a diff.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "mutants"
TESTS = {
    "questions": ("questions", "questions_exact", "folds"),
    "prompts": ("prompts", "prompts_exact"),
    "encoding": ("encoding", "encoding_exact"),
    "packing": ("packing", "packing_exact"),
    "scoring": ("scoring", "scoring_exact"),
    "predictions": ("predictions", "predictions_exact"),
    "metrics": ("metrics", "metrics_exact"),
    "blending": ("blending", "blending_exact"),
    "fitting": ("fitting", "fitting_exact"),
    "runs": ("runs", "runs_exact"),
    "files": ("files", "files_exact", "runs", "errors"),
    "journal": ("journal",),
}
# Left out: statistics of hundreds of simulated sets take too long.
LEFT_OUT = (
    "tests/test_metrics.py::test_about_95_of_100_intervals_hold_the_truth",
    "tests/test_fitting.py::test_exchangeable_members_gain_nothing_from_fitted_weights",
)
NOTICED = {1: "killed", 3: "killed", -24: "timeout", 24: "timeout", 36: "timeout", 152: "timeout", 255: "timeout"}


@dataclass(frozen=True, slots=True)
class Score:
    """How one room's mutants fared."""

    room: str
    killed: int
    timeouts: int
    survivors: tuple[str, ...]

    @property
    def share(self) -> float:
        """0 to 1; a mutant that never ends is noticed as well."""
        noticed = self.killed + self.timeouts
        return noticed / (noticed + len(self.survivors))


def configuration(room: str) -> str:
    """What pyproject.toml says to mutmut."""
    tests = [f"tests/test_{name}.py" for name in TESTS[room] if (ROOT / "tests" / f"test_{name}.py").exists()]
    flags = ["-m", "not slow and not gpu", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    flags += [f"--deselect={test}" for test in LEFT_OUT]
    copied = [*sorted(path.name for path in ROOT.iterdir() if path.suffix in (".py", ".md")), "data", "docs", "prompts"]
    return f"""
[tool.mutmut]
source_paths = ["ksat"]
only_mutate = ["ksat/{room}.py"]
also_copy = {json.dumps(copied)}
pytest_add_cli_args = {json.dumps(flags)}
pytest_add_cli_args_test_selection = {json.dumps(tests)}
timeout_multiplier = 5.0
timeout_constant = 20.0
use_git_change_detection = false
"""


def project_files() -> list[str]:
    """The names of the project's files as they stand, new ones too."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def copy_project(folder: Path, room: str) -> None:
    """The project's files, with mutmut's configuration; those that did not change keep their time."""
    for name in project_files():
        content = (ROOT / name).read_bytes()
        if name == "pyproject.toml":
            content += configuration(room).encode()
        target = folder / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def mutmut(folder: Path, *arguments: str) -> str:
    """What mutmut prints."""
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} in {folder}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return done.stdout


def results(folder: Path, room: str) -> dict[str, int | None]:
    """mutmut's exit code of every mutant, None where it was not tried."""
    path = folder / "mutants" / "ksat" / f"{room}.py.meta"
    codes: dict[str, int | None] = json.loads(path.read_text())["exit_code_by_key"] if path.exists() else {}
    return codes


def try_mutants(room: str) -> Score:
    """Tries a room's mutants, but for those that were killed before."""
    folder = WORK / room
    left = [name for name, code in results(folder, room).items() if code not in NOTICED]
    copy_project(folder, room)
    shutil.rmtree(folder / "mutants" / "tests", ignore_errors=True)  # copied anew
    mutmut(folder, "run", "--max-children", os.environ.get("KSAT_MUTANT_PROCESSES", "2"), *left)
    codes = results(folder, room)
    noticed = [NOTICED[code] for code in codes.values() if code in NOTICED]
    survivors = tuple(name for name, code in codes.items() if code not in NOTICED)
    return Score(room, noticed.count("killed"), noticed.count("timeout"), survivors)


def main() -> None:
    """Tries the rooms that are named, or all; prints a table and writes the survivors."""
    WORK.mkdir(exist_ok=True)
    print("| Room | Mutants | Killed | Timeouts | Survived | Score |\n| --- | --: | --: | --: | --: | --: |")
    for room in sys.argv[1:] or TESTS:
        score = try_mutants(room)
        survived = len(score.survivors)
        total = score.killed + score.timeouts + survived
        print(f"| {room} | {total} | {score.killed} | {score.timeouts} | {survived} | {score.share:.1%} |", flush=True)
        diffs = "\n".join(mutmut(WORK / room, "show", name) for name in score.survivors)
        (WORK / f"survivors-{room}.txt").write_text(diffs, encoding="utf-8")


if __name__ == "__main__":
    main()
