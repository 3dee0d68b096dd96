"""What explore.py and --all start as processes of their own, in this one: a new process takes ten seconds to import its libraries.

test_exploration kills real ones, and the storm has forks.
"""

import contextlib
import importlib
import io
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ksat.errors import exit_code


class ScriptHere:
    """What ksat.children needs of subprocess.Popen: the script has ended when this is made."""

    def __init__(self, arguments: Sequence[str], *, env: dict[str, str], **how: Any) -> None:
        _, script, *flags = arguments
        output = io.StringIO()
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            patch.setenv("KSAT_CHILD", env["KSAT_CHILD"])
            self.code = exit_code(lambda: importlib.import_module(Path(script).stem).main(flags))
        self.stdout = io.StringIO(output.getvalue())

    def wait(self) -> int:
        return self.code


def run_children_here(patch: pytest.MonkeyPatch) -> None:
    """In ksat.children alone."""
    patch.setattr("ksat.children.subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": ScriptHere}))
