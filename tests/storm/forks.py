"""Our scripts as forks of a process that has everything imported: real processes with real kills, without 10 seconds of imports.

The parent never runs a script itself, so every fork starts as a fresh process would. What explore.py and --all start as children
of theirs are forks as well: subprocess.Popen in ksat.children is replaced, all else of it stays.
"""

import ctypes
import gc
import importlib
import json
import mmap
import os
import pkgutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ksat

SCRIPTS = {
    "train.py": "train", "inference.py": "inference", "ensemble.py": "ensemble", "compare.py": "compare", "explore.py": "explore",
    "ksat.retrieve": "ksat.retrieve", "ksat.soup": "ksat.soup",
}  # fmt: skip
# What scripts import only when they need it.
LIBRARIES = (
    "peft", "trl", "datasets", "bitsandbytes", "matplotlib.pyplot", "scipy.stats", "scipy.optimize", "sklearn.model_selection", "pandas",
    "transformers.models.qwen2.modeling_qwen2", "transformers.models.llama.modeling_llama",
)  # fmt: skip
LONGEST_RUN = 900.0  # seconds; a script that hangs is a fault and must not stop the storm
_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}


@dataclass(frozen=True, slots=True)
class Command:
    """A script with its flags."""

    script: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join([self.script, *self.flags])

    def with_flags(self, *flags: str) -> "Command":
        return Command(self.script, (*self.flags, *flags))


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of a process: exit code or minus the signal, what it printed, and how often it was about to change the disk."""

    code: int
    output: str
    num_changes: int
    seconds: float

    @property
    def was_killed(self) -> bool:
        return self.code == -signal.SIGKILL


@dataclass(frozen=True, slots=True)
class Kill:
    """When a process dies: after so many seconds, or right before its `at`-th change of the disk.

    Attributes:
        seconds: from its start; None for a kill at a change.
        at: counted from 1, over the process and its children.
        cut: where that change makes a file complete, cut the file first to this share of what was written, as a kill in
            the middle of a write does; None for the whole.
        child_only: the kill takes only the process that makes the change, as the kernel does when memory runs out.
    """

    seconds: float | None = None
    at: int = 0
    cut: float | None = None
    child_only: bool = False


class _Fuse:
    """Counts in a fork and its children what is about to change files, and kills at the chosen change."""

    def __init__(self, counter: mmap.mmap, kill: Kill) -> None:
        self.counter, self.kill, self.top = counter, kill, os.getpid()
        self.sizes: dict[tuple[int, int], int] = {}  # of files that were complete once: a kill cuts only behind that

    def install(self) -> None:
        import safetensors.torch
        import torch

        sys.addaudithook(self._audit)
        fsync, save, serialize = os.fsync, torch.save, safetensors.torch.serialize_file

        def counted_fsync(file: Any) -> None:
            self._change(file if isinstance(file, int) else file.fileno())
            fsync(file)

        def counted_save(value: Any, file: Any, *rest: Any, **more: Any) -> None:
            save(value, file, *rest, **more)
            self._change(file)

        def counted_serialize(tensors: Any, file: Any, *rest: Any, **more: Any) -> None:
            serialize(tensors, file, *rest, **more)
            self._change(file)

        os.fsync, torch.save, safetensors.torch.serialize_file = counted_fsync, counted_save, counted_serialize

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            )
            if writes and self._is_ours(path):
                self._change(None)
        elif event in _CHANGES and self._is_ours(arguments[0]):
            self._change(None)

    def _is_ours(self, path: Any) -> bool:
        """Whether a path lies in the current folder: relative ones do, those beside a folder's descriptor too."""
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        text = os.fsdecode(path)
        return not text.startswith("/") or text.startswith(os.getcwd())

    def _change(self, written: Any) -> None:
        number = int.from_bytes(self.counter[:8], "little") + 1
        self.counter[:8] = number.to_bytes(8, "little")
        if number == self.kill.at:
            self._die(written)
        if written is not None:
            status = os.stat(written)
            self.sizes[status.st_dev, status.st_ino] = status.st_size

    def _die(self, written: Any) -> None:
        if written is not None and self.kill.cut is not None:
            status = os.stat(written)
            safe = min(self.sizes.get((status.st_dev, status.st_ino), 0), status.st_size)
            os.truncate(written, safe + int(self.kill.cut * (status.st_size - safe)))
        if not self.kill.child_only:
            os.kill(self.top, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


class Process:
    """A script at work in a fork.

    Args:
        command: what.
        folder: where.
        output: takes what it prints.
        kill: when it dies; None lets it end.
        before: called in the fork before the script.
    """

    def __init__(
        self,
        command: Command,
        folder: Path,
        output: Path,
        kill: Kill | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        self.output, self.kill = output, kill or Kill()
        self.counter = mmap.mmap(-1, 8)
        output.touch()  # a kill may come before the fork has opened it
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _end_fork(lambda: self._run(command, folder, before))

    def _run(self, command: Command, folder: Path, before: Callable[[], None] | None) -> int:
        _die_with_parent()
        os.setpgid(0, 0)
        with self.output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(folder)
        if before is not None:
            before()
        _Fuse(self.counter, self.kill).install()
        return run_main(command)

    def wait(self) -> Ended:
        """Kills when it is time, and says what came of it."""
        limit = self.started + (LONGEST_RUN if self.kill.seconds is None else self.kill.seconds)
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        while not pid and time.monotonic() < limit:
            time.sleep(0.002)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self.started
        text = self.output.read_bytes().decode("utf-8", "replace")
        self.output.unlink()
        hung = not pid and self.kill.seconds is None
        changes = int.from_bytes(self.counter[:8], "little")
        return Ended(
            os.waitstatus_to_exitcode(status), text + ("\nTraceback: it hung" if hung else ""), changes, seconds
        )


def run(command: Command, folder: Path, kill: Kill | None = None, before: Callable[[], None] | None = None) -> Ended:
    """A script from its start to its end, beside `folder` what it prints."""
    return Process(command, folder, folder.with_name(f"{folder.name}.output"), kill, before).wait()


def run_main(command: Command) -> int:
    """The exit code of a script's main in this process, as `python SCRIPT FLAGS` would end."""
    import ksat.children
    from ksat.errors import exit_code

    ksat.children.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": _ForkedPopen})  # there alone
    sys.argv = [command.script, *command.flags]
    main = importlib.import_module(SCRIPTS[command.script]).main
    return exit_code(lambda: main(list(command.flags)))


def in_fork(job: Callable[[], object]) -> None:
    """Does a job in a fork, so that this process starts no thread for it.

    Raises:
        RuntimeError: the job failed.
    """

    def done() -> int:
        job()
        return 0

    pid = os.fork()
    if pid == 0:
        _end_fork(done)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("a fork failed; what it printed says why")


def _end_fork(job: Callable[[], int]) -> None:
    """Ends this fork with the job's exit code, as the interpreter would."""
    code = 1
    try:
        code = job()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


class _ForkedPopen:
    """What ksat.children needs of subprocess.Popen: a script of ours as a fork, its output in a pipe."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        preexec_fn: Callable[[], None] | None = None,
        **_: Any,
    ) -> None:
        read, write = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            os.dup2(write, 1)
            os.dup2(write, 2)
            os.environ |= env or {}
            if preexec_fn is not None:
                preexec_fn()
            _end_fork(lambda: run_main(Command(Path(arguments[1]).name, tuple(arguments[2:]))))
        os.close(write)
        self.stdout = os.fdopen(read, encoding="utf-8", errors="replace")

    def wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def prepare() -> None:
    """Makes this process one to fork from: everything imported, one thread."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
    }
    for name in (
        "tiny",
        *LIBRARIES,
        *SCRIPTS.values(),
        *(f"ksat.{each.name}" for each in pkgutil.iter_modules(ksat.__path__)),
    ):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else every collection in a fork would copy what it looks at: a third of a training's time


def in_workers(part: str, cases: Sequence[int], job: Callable[[int], str], num_workers: int, kept: Path) -> None:
    """Computes job(case) for every case in forked workers; the results are lines at the end of `kept`, written as they come.

    A line is {"part", "case", "fault", "seconds"}; for a case whose worker died the fault says so.

    Args:
        part: name of what the cases are of.
        cases: numbers.
        job: returns what went wrong with a case, "" for nothing.
        num_workers: how many at once.
        kept: the file.
    """
    waiting = {n: list(cases[n::num_workers]) for n in range(num_workers)}

    # Else the first line would go on where a kill has cut one.
    if kept.exists() and not kept.read_bytes().endswith(b"\n"):
        with kept.open("a", encoding="utf-8") as file:
            file.write("\n")

    def note(case: int, fault: str, seconds: float) -> None:
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, "case": case, "fault": fault, "seconds": round(seconds, 3)}) + "\n")

    def work(n: int) -> int:
        for case in waiting[n]:
            started = time.monotonic()
            fault = job(case)
            note(case, fault, time.monotonic() - started)
        return 0

    def start(n: int) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _die_with_parent()
            _end_fork(lambda: work(n))
        return pid

    workers = {start(n): n for n, mine in waiting.items() if mine}
    while workers:
        pid, status = os.wait()
        n = workers.pop(pid)
        ended = {entry["case"] for entry in read_kept(kept) if entry["part"] == part}
        waiting[n] = [case for case in waiting[n] if case not in ended]
        if waiting[n]:
            code = os.waitstatus_to_exitcode(status)
            note(waiting[n].pop(0), f"the process that ran it died: {code}", 0.0)
            if waiting[n]:
                workers[start(n)] = n


def read_kept(kept: Path) -> list[dict[str, Any]]:
    """The cases that ended, of the lines of in_workers but for those that a kill has cut."""
    entries = []
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []:
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries
