"""Mutants: small faults planted one by one into the rooms that decide a result, and how many of them the tests notice.

python tests/mutants.py [ROOM ...]       # all rooms if none is named; docs/testing.md holds the last run

mutmut (requirements/mutants.txt) makes a room's mutants, on a copy of the project in mutants/<room>. The room's tests are
collected once; each mutant is a fork of that process, in which the tests that call its function run, the quick ones first. What is
there already is kept: only mutants of a room that changed and those that survived are tried again. The survivors go to
mutants/survivors-<room>.txt, each as a diff.
"""

import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "mutants"
TESTS = {
    "questions": ("questions", "questions_exact", "folds", "kinds"),
    "prompts": ("prompts", "prompts_exact"),
    "encoding": ("encoding", "encoding_exact"),
    "packing": ("packing",),
    "scoring": ("scoring", "scoring_exact"),
    "predictions": ("predictions", "predictions_exact"),
    "metrics": ("metrics", "metrics_exact"),
    "blending": ("blending", "blending_exact"),
    "fitting": ("fitting",),
    "runs": ("runs", "runs_exact"),
    "run_folders": ("run_folders", "runs"),
    "sealed": ("runs", "runs_exact", "validation"),
    "files": ("files", "files_exact", "runs", "errors"),
    "journal": ("journal",),
}
# Left out: statistics of hundreds of simulated sets, and snapshots of every known base's prompts, take too long.
LEFT_OUT = {
    "metrics": ("--deselect=tests/test_metrics.py::test_about_95_of_100_intervals_hold_the_truth",),
    "fitting": ("--deselect=tests/test_fitting.py::test_exchangeable_members_gain_nothing_from_fitted_weights",),
    "encoding": ("-k=not base",),
}
NUM_PROCESSES = int(os.environ.get("KSAT_MUTANT_PROCESSES", "2"))
LONGEST = 900  # seconds by the clock
MEMORY = 12 * 2**30
NOTICED = ("killed", "timeout")


def configuration(room: str) -> str:
    """What pyproject.toml says to mutmut."""
    copied = [*sorted(path.name for path in ROOT.iterdir() if path.suffix in (".py", ".md")), "data", "docs", "prompts"]
    return f"""
[tool.mutmut]
source_paths = ["ksat"]
only_mutate = ["ksat/{room}.py"]
also_copy = {json.dumps(copied)}
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


def make_mutants(room: str) -> list[str]:
    """Writes a room with all its mutants in it into mutants/<room>/mutants, where this process goes; returns their names."""
    folder = WORK / room
    for name in project_files():
        content = (ROOT / name).read_bytes()
        if name == "pyproject.toml":
            content += configuration(room).encode()
        target = folder / name
        if not target.exists() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
    os.chdir(folder)
    from mutmut.__main__ import copy_also_copy_files, copy_src_dir, create_file_mutants
    from mutmut.mutation.trampoline import set_mutant_under_test

    set_mutant_under_test("mutant_generation")
    Path("mutants").mkdir(exist_ok=True)
    copy_src_dir()
    copy_also_copy_files()
    create_file_mutants(Path(f"ksat/{room}.py"))
    os.chdir("mutants")
    return list(json.loads(Path(f"ksat/{room}.py.meta").read_text())["exit_code_by_key"])


@dataclass
class Trial:
    """A pytest plugin: instead of running the tests once it runs them on every mutant.

    Attributes:
        names: of the mutants.
        results: by the name: "killed", "timeout", "survived", or "no tests" where no test calls the function.
        kept: file of the results, written as they come.
        source: hash of the room's source, which they belong to.
    """

    names: Sequence[str]
    results: dict[str, str]
    kept: Path
    source: str
    cost: dict[str, float] = field(default_factory=dict)  # CPU seconds of each test
    callers: defaultdict[str, list[pytest.Item]] = field(default_factory=lambda: defaultdict(list))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from mutmut.mutation.trampoline import set_mutant_under_test

        set_mutant_under_test("stats")
        del os.environ["MUTANT_UNDER_TEST"]  # a process that a test starts would look for mutmut's settings
        self._look_who_calls_what(session.items)
        set_mutant_under_test("none")
        self._try_all()
        return True

    def _look_who_calls_what(self, items: Sequence[pytest.Item]) -> None:
        from mutmut.state import state

        for item, following in zip(items, [*items[1:], None], strict=True):
            state()._stats.clear()
            started = time.process_time()
            if _fails(item, following):
                sys.exit(f"{item.nodeid} fails without a mutant")
            self.cost[item.nodeid] = time.process_time() - started
            for function in state()._stats:
                self.callers[function].append(item)

    def _try_all(self) -> None:
        running: dict[int, str] = {}
        for name in [*(name for name in self.names if self.results.get(name) not in NOTICED), None]:
            while running and (name is None or len(running) >= NUM_PROCESSES):
                pid, status = os.wait()
                self._note(running.pop(pid), os.waitstatus_to_exitcode(status))
            if name is None:
                return
            items = self._tests_of(name)
            if not items:
                self.results[name] = "no tests"
                continue
            pid = os.fork()
            if pid == 0:
                self._be(name, items)
            running[pid] = name

    def _tests_of(self, name: str) -> list[pytest.Item]:
        """The tests that call the mutant's function, quick ones first."""
        from mutmut.utils.format_utils import mangled_name_from_mutant_name

        items = self.callers[mangled_name_from_mutant_name(name)]
        return sorted(items, key=lambda item: self.cost[item.nodeid])

    def _be(self, name: str, items: Sequence[pytest.Item]) -> None:
        """Ends this fork with 1 if a test fails on the mutant, with 0 if none does."""
        from mutmut.mutation.trampoline import set_mutant_under_test

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(LONGEST)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        set_mutant_under_test(name)
        code = 1
        try:
            code = int(
                any(self._fails_in_time(item, after) for item, after in zip(items, [*items[1:], None], strict=True))
            )
        finally:
            os._exit(code)

    def _fails_in_time(self, item: pytest.Item, following: pytest.Item | None) -> bool:
        """A mutant that goes round for ever ends here, by SIGXCPU."""
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        seconds = math.ceil(time.process_time() + 10 + 5 * self.cost[item.nodeid])
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, hard))
        return _fails(item, following)

    def _note(self, name: str, code: int) -> None:
        ended_late = code in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM)
        self.results[name] = "survived" if code == 0 else "timeout" if ended_late else "killed"
        self.kept.write_text(json.dumps({"source": self.source, "results": self.results}))


def _fails(item: pytest.Item, following: pytest.Item | None) -> bool:
    from _pytest.runner import runtestprotocol

    return any(report.failed for report in runtestprotocol(item, nextitem=following, log=False))


def try_mutants(room: str) -> None:
    """Tries a room's mutants in this process, prints their score and writes the survivors."""
    names = make_mutants(room)
    kept, source = WORK / f"{room}.json", hashlib.sha256((ROOT / f"ksat/{room}.py").read_bytes()).hexdigest()
    known: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    results = known.get("results", {}) if known.get("source") == source else {}
    trial = Trial(names, results, kept, source)
    files = [f"tests/test_{name}.py" for name in TESTS[room]]
    sys.path[:0] = [str(Path.cwd())]
    flags = [
        "-q",
        "--rootdir=.",
        "--tb=native",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--hypothesis-profile=mutants",
    ]
    code = pytest.main([*flags, "-m", "not slow and not gpu", *LEFT_OUT.get(room, ()), *files], plugins=[trial])
    if code or set(trial.results) != set(names):
        sys.exit(f"{room}: pytest ended with {code}")
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    os.chdir(WORK / room)
    survivors = [name for name in names if trial.results[name] not in NOTICED]
    diffs = [f"# {name}\n{get_diff_for_mutant(name, path=Path(f'ksat/{room}.py'))}\n" for name in survivors]
    (WORK / f"survivors-{room}.txt").write_text("".join(diffs), encoding="utf-8")
    count = Counter(trial.results.values())
    share = 1 - len(survivors) / len(names)
    print(
        f"| {room} | {len(names)} | {count['killed']} | {count['timeout']} | {len(survivors)} | {share:.1%} |",
        flush=True,
    )


def main() -> None:
    """Tries the rooms that are named, or all, each in a process of its own: the mutants of a room are there when it is imported."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    WORK.mkdir(exist_ok=True)
    print(
        "| Room | Mutants | Killed | Timeouts | Survived | Score |\n| --- | --: | --: | --: | --: | --: |", flush=True
    )
    for room in sys.argv[1:] or TESTS:
        pid = os.fork()
        if pid == 0:
            try_mutants(room)
            sys.stdout.flush()
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            sys.exit(1)


if __name__ == "__main__":
    main()
