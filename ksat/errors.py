"""Errors that a user can mend, and the one door where scripts turn them into a line and an exit code."""

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

EXIT_DONE, EXIT_BUG, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130
LONGEST_LINE = 1000  # characters of an error line; a cell or a path in it may have any length


class InputError(Exception):
    """Bad input or usage. The message is one line: place, rule, what was found, what was expected, the remedy."""


def bad_rows(path: Path | str, rule: str, bad: Sequence[tuple[str, str]], remedy: str) -> InputError:
    """One line for all bad rows of a file: how many there are, and the first five with what was found.

    Args:
        path: the file.
        rule: what those rows violate, in the plural ("have no choices").
        bad: (row id, what was found there) in file order, at least one.
        remedy: what to do about it.
    """
    shown = "; ".join(f"id {row_id!r}: {found}" if found else f"id {row_id!r}" for row_id, found in bad[:5])
    first = "" if len(bad) == 1 else "first "
    return InputError(f"{path}: {len(bad)} of the rows {rule} ({first}{shown}); {remedy}")


def show(value: object, longest: int = 80) -> str:
    """repr() of what was found in a file, for a message; cut, and for any value."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits, which Python does not print
        text = f"{type(value).__name__} with more digits than can be printed"
    return text if len(text) <= longest else f"{text[:longest]}…"


def error_line(text: str, kind: str = "error: ") -> str:
    """The line that a user sees: its kind, then the text with what does not print escaped, cut in its middle to 1,000 characters.

    Data stands in messages: a line break or an escape sequence in it must not look like a message of its own. Head and tail stay,
    since a message begins with the place and ends with the remedy.
    """
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in f"{kind}{text}")
    if len(plain) <= LONGEST_LINE:
        return plain
    tail = LONGEST_LINE // 3
    return f"{plain[: LONGEST_LINE - tail - 3]} … {plain[-tail:]}"


def exit_code(main: Callable[[], None], interrupted: str = "the same command starts anew") -> int:
    """Runs a script's main and returns its exit code: 0 done, 2 bad input (one line on stderr), 130 for Ctrl-C.

    Args:
        main: the script's.
        interrupted: what goes on how after Ctrl-C.
    """
    sys.stdout, sys.stderr = _lasting(sys.stdout, sys.__stdout__, 1), _lasting(sys.stderr, sys.__stderr__, 2)
    try:
        main()
    except InputError as error:
        _close_bars()
        print(error_line(str(error)), file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        _close_bars()
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DONE


def _close_bars() -> None:
    """Ends the line of every progress bar that is still open: else the message would stand behind one, and be drawn over."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(tqdm._instances):
            bar.close()


_GONE = (errno.EPIPE, errno.EIO)  # a pipe's reader (`| head -1`), or a terminal
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _LastingFile(io.FileIO):
    """stdout or stderr; once nobody reads it any more, or its disk is full, all that is written goes to the null device."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE + _FULL:
                raise
            failed = error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())  # of libraries and child processes, too
        os.close(null)
        if failed.errno in _FULL and self.fileno() == 1:  # what it holds is cut, and the exit code does not say so
            print(f"note: the output can't be written any more ({failed.strerror}); the work goes on", file=sys.stderr)
        return super().write(data)


def _lasting(stream: TextIO | None, original: TextIO | None, descriptor: int) -> TextIO:
    """A process's own output stream made such that nothing which is printed ends the work; another one (a test's) as it is.

    A console that lacks a character (cp949, latin-1, ascii) shows its escape; a closed pipe or a full disk swallows what comes.
    """
    if stream is not original:
        assert stream is not None
        return stream
    if stream is None:  # closed by the shell (`>&-`); the next file to be opened would be taken for it
        null = os.open(os.devnull, os.O_WRONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)
        os.set_inheritable(descriptor, True)
    elif not isinstance(stream, io.TextIOWrapper):
        return stream
    else:
        stream.flush()
    file = _LastingFile(descriptor, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=stream.line_buffering if stream else False,
        write_through=stream.write_through if stream else False,
    )
