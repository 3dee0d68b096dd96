"""Errors that a user can mend, and the one door where scripts turn them into a line and an exit code."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

EXIT_DONE, EXIT_BUG, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


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


def exit_code(main: Callable[[], None]) -> int:
    """Runs a script's main and returns its exit code: 0 done, 2 bad input (one line on stderr), 130 for Ctrl-C."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; inference goes on with the same command, training with --resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DONE
