"""Our scripts as processes of their own: one that dies takes nobody with it, and its memory goes back."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ksat.files import told_of

ROOT = Path(__file__).parent.parent
_IS_CHILD = "KSAT_CHILD"


def how_to_go_on() -> str:
    """What a user does to go on with an interrupted training; one of several is gone on with by whoever started them."""
    return "run the same command again" if os.environ.get(_IS_CHILD) else "--resume"


def run_script(command: Sequence[str], log: Path) -> str:
    """Why a script failed, "" if it did not; its output goes to stderr and behind what stands in `log`.

    Args:
        command: script and its flags, such as ("train.py", "--run", "a").
        log: a text file.

    Raises:
        InputError: the log can't be opened.
    """
    arguments = [sys.executable, str(ROOT / command[0]), *command[1:]]
    print(f"\n$ python {' '.join(command)}", file=sys.stderr, flush=True)
    lines: list[str] = []
    with told_of(log):
        file = log.open("ab", buffering=0)  # unbuffered: what a full disk refuses is not tried again at the end
    with file:
        # A child that outlives us would score the same base twice once we are started again.
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
            env={**os.environ, _IS_CHILD: "1", "PYTHONIOENCODING": "utf-8"}, preexec_fn=partial(_die_with_parent, os.getpid()),
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            sys.stderr.write(line)
            lines = [*lines[-20:], line.strip()] if line.strip() else lines
            with contextlib.suppress(OSError):  # a full disk, which the child will name
                file.write(line.encode())
        code = process.wait()
    if code == 0:
        return ""
    if code < 0:
        return f"killed by signal {signal.Signals(-code).name}; SIGKILL mostly means that the machine's memory ran out"
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or lines or [f"exit code {code}"])[-1]


def _die_with_parent(parent: int) -> None:
    """Linux: SIGKILL when the parent ends. Elsewhere the child ends on its own, writing to a closed pipe."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os.kill(os.getpid(), signal.SIGKILL)
