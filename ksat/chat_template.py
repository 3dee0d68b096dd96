"""A base's chat template at work: what it makes of messages, within bounds. It is a program, and comes with the data."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ksat.errors import InputError
from ksat.prompts import Message

LONGEST_FRAME = 100_000  # characters around the messages; templates with tools and a date have some 5,000
ROOM = 2**30  # bytes that a template may take
SECONDS = 10  # of computing, for what takes a millisecond


class _OverrunError(BaseException):
    """Out of time; no Exception, since Jinja goes on after one while it folds constants."""


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    """The messages as the base's chat template writes them, special tokens included.

    Raises:
        InputError: the template is broken, refuses the messages, leaves its sandbox, or takes too much time or memory.
    """
    try:
        with _bounded():
            # enable_thinking=False: Qwen3 would answer with its thoughts; templates that don't know the name ignore it.
            text = str(
                tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=False
                )
            )
            text.encode()  # half a surrogate pair is no text
    except MemoryError:
        raise _broken(tokenizer, f"takes more than {ROOM // 2**30} GiB of memory") from None
    except _OverrunError:
        raise _broken(tokenizer, f"takes more than {SECONDS} seconds") from None
    except Exception as error:  # the template's own code ran, and may have raised anything
        raise _broken(tokenizer, f"fails ({type(error).__name__}: {error})") from error
    if len(text) > sum(len(message["content"]) for message in messages) + LONGEST_FRAME:
        raise _broken(tokenizer, f"writes {len(text):,} characters")
    return text


def _broken(tokenizer: Any, what: str) -> InputError:
    return InputError(
        f"base {tokenizer.name_or_path or '(without a name)'}: its chat template {what}; mend it, or take a base with another one"
    )


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Bounds memory and computing time of what runs inside.

    By the operating system: Jinja's sandbox bounds range() and nothing else, neither `'a' * 10**10` nor loops in loops, and there
    are too many ways to grow to forbid each. Not in a child process: that would check an example, and not every prompt. Linux
    alone counts address space, and only the main thread gets signals; elsewhere nothing is bounded.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        yield
        return
    import resource

    def stop(number: int, frame: FrameType | None) -> None:
        raise _OverrunError

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    bound = taken + ROOM if soft == resource.RLIM_INFINITY else min(soft, taken + ROOM)
    handler = signal.signal(signal.SIGVTALRM, stop)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGVTALRM, handler)
