"""Flags that several scripts share, and what their defaults stand for."""

import argparse
import sys
from pathlib import Path

from ksat.errors import InputError
from ksat.memory import parse_memory
from ksat.orders import ChoiceOrders


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


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def not_negative(text: str) -> int:
    """An argparse type: a whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return value


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
