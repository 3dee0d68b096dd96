"""Flags that several scripts share, and what their defaults stand for."""

import argparse
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ksat.errors import EXIT_BAD_INPUT, InputError, error_line
from ksat.kinds import WORDING
from ksat.memory import parse_memory
from ksat.orders import ChoiceOrders

KINDS_HELP = (
    "who says whether a question is reading or knowledge, before the file's columns kind and source: a CSV id,kind; or wording, which "
    "takes the number of choices for no hint (default: where four and five choices tell them apart, their number, else the wording)"
)
LONGEST_PART, LONGEST_PATH = 255, 4095  # bytes, on Linux


class ArgumentParser(argparse.ArgumentParser):
    """The command line of a script: its docstring is the help, and what is wrong with a flag is one line."""

    def __init__(self, doc: str | None, *, prog: str | None = None, allow_abbrev: bool = True) -> None:
        super().__init__(
            prog=prog,
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=allow_abbrev,
        )

    def error(self, message: str) -> NoReturn:
        """Ends the script with the message and where the usage stands; argparse would print the whole usage above it."""
        call = self.prog if self.prog.startswith("python") else f"python {self.prog}"
        self.exit(EXIT_BAD_INPUT, f"{error_line(f'{message}; see {call} --help')}\n")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say how to compute, not what: they may differ between training and inference."""
    group = parser.add_argument_group("engine")
    add = group.add_argument
    add(
        "--engine",
        choices=("auto", "unsloth", "transformers"),
        default="auto",
        help="auto: unsloth on CUDA, but transformers by text and for several choice orders, whose prefixes it shares",
    )
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: CUDA if there is a GPU")
    add(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="auto: bfloat16 from compute capability 8.0, float16 below, float32 on the CPU",
    )
    add(
        "--pack-tokens",
        type=positive,
        metavar="TOKENS",
        help="what one forward pass may hold; takes memory in proportion (default: follows from the free memory; CPU: 2048)",
    )
    add(
        "--gpu-memory",
        type=parse_memory,
        metavar="SIZE",
        help="use no more of the GPU than this, such as 31.7GiB: a big card stands in for a small one (default: all of it)",
    )
    add(
        "--share-prefixes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute what prompts have in common once; --no-share-prefixes gives each a row of its own, for families that "
        "can't share (engine transformers; unsloth never shares)",
    )
    add(
        "--offload-embedding",
        action="store_true",
        help="keep the embedding in the machine's memory: frees 1.45 GiB of the GPU on a 32B (engine transformers; for bases "
        "whose head is a matrix of its own)",
    )
    add("--trust-remote-code", action="store_true", help="run Python code that the base's repository brings along")


def given_engine_flags(args: argparse.Namespace) -> list[str]:
    """The engine flags that differ from their defaults, as another script's command line takes them."""
    flags: list[str] = []
    for name in ("engine", "device", "dtype"):
        if getattr(args, name) != "auto":
            flags += [f"--{name}", getattr(args, name)]
    if args.pack_tokens:
        flags += ["--pack-tokens", str(args.pack_tokens)]
    if args.gpu_memory:
        flags += ["--gpu-memory", f"{args.gpu_memory / 2**30}GiB"]
    if not args.share_prefixes:
        flags.append("--no-share-prefixes")
    if args.offload_embedding:
        flags.append("--offload-embedding")
    if args.trust_remote_code:
        flags.append("--trust-remote-code")
    return flags


def require_read(
    parser: argparse.ArgumentParser, args: argparse.Namespace, job: str, read_by: Mapping[str, Sequence[str]]
) -> None:
    """Raises InputError for a flag that is given, and that the job would take in silence and not read.

    Args:
        parser: knows the defaults.
        args: what was given.
        job: what the script is to do.
        read_by: the jobs that read a flag, by its name in `args`.
    """
    for name, jobs in read_by.items():
        if (value := getattr(args, name)) != parser.get_default(name) and job not in jobs:
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            raise InputError(f"{flag} is for {' and '.join(jobs)}; {job} does not read it: leave it out")


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    return _whole(text, 1)


def not_negative(text: str) -> int:
    """An argparse type: a whole number from 0."""
    return _whole(text, 0)


def _whole(text: str, lowest: int) -> int:
    # int() takes '٣', '1_0' and numbers that no tensor's size can be.
    if not re.fullmatch(r"[0-9]{1,10}", text) or not lowest <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {lowest} to {2**32 - 1}")
    return int(text)


def number(text: str) -> float:
    """An argparse type: a finite number. float() takes 'nan', '1e999', '٣' and '1_0' as well."""
    if not re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", text) or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a number")
    return float(text)


def file_name(text: str) -> str:
    """An argparse type: a path to read that a file system takes, so that nothing fails but that it is not there."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return path_text(text)


def file_path(text: str) -> Path:
    """file_name as a Path."""
    return Path(file_name(text))


def path_text(text: str) -> str:
    """An argparse type: a path that a file system takes; "" where its reader says what is expected."""
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} has a NUL in it")
    try:
        text.encode()
    except UnicodeEncodeError:  # reports name their files, in UTF-8
        if (encoding := sys.getfilesystemencoding()) != "utf-8":  # then it may be UTF-8 that was not read as such
            raise argparse.ArgumentTypeError(
                f"{text!r:.80} can't be read in the locale's {encoding}; set PYTHONUTF8=1"
            ) from None
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not UTF-8; rename it") from None
    if len(os.fsencode(text)) > LONGEST_PATH or any(len(os.fsencode(name)) > LONGEST_PART for name in Path(text).parts):
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r}… is too long; a name has at most {LONGEST_PART} bytes, a path {LONGEST_PATH}"
        )
    return text


def path_list(text: str) -> str:
    """An argparse type: such paths with commas between them."""
    for part in text.split(","):
        path_text(part)
    return text


def kinds_file(kinds: str | None) -> Path | None:
    """The file that --kinds names, if it names one."""
    return None if kinds in (None, WORDING) else Path(kinds)


def require_label(choice_orders: ChoiceOrders, score_by: str) -> None:
    """Raises InputError for several orders of choices that the prompt does not list."""
    if choice_orders.count > 1 and score_by != "label":
        raise InputError(
            f"--choice-orders {choice_orders.name}: --score-by text lists no choices in the prompt, so they have no order; use "
            "--score-by label, or leave the flag out"
        )


def data_file(given: str | None, flag: str, default: Path) -> tuple[Path, bool]:
    """The CSV to read and whether it is a sample: the given one, else the default, else the sample, announced.

    Args:
        given: the flag's value.
        flag: its name, for messages.
        default: data/train.csv or data/test.csv; its sample is sample_<name> beside it.

    Raises:
        InputError: neither the default nor its sample is there.
    """
    if given is not None:
        return Path(given), Path(given).name.startswith("sample_")
    sample = default.with_name(f"sample_{default.name}")
    if default.exists():
        return default, False
    if not sample.exists():
        raise InputError(f"{default}: no such file, and no {sample} either; name the file with {flag}")
    print(f"{default} is missing: taking our own {sample}", file=sys.stderr)
    return sample, True
