"""What the sides of the speed benchmarks share: prompts, flags, timing, the card and its ceiling."""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from build_checkpoint import SIZES, make_config

DIGITS = (16, 17, 18, 19, 20)  # "1" to "5" in Qwen's vocabulary
MAX_REPEATS = 20
RESULT = "RESULT "  # begins the lines by which a child hands its rows to the parent
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Random token ids and the index, from 0, of the digit that answers."""

    token_ids: tuple[int, ...]
    answer: int


def make_prompts(num_prompts: int, vocab_size: int, *, median: int = 700) -> list[Prompt]:
    """Prompts whose lengths are log-normal (sigma 0.55) around the median, clipped at 3/14 and 25/7 of it (150 and 2,500 at
    700); the same on every call."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(math.log(median), 0.55, num_prompts), median * 3 // 14, median * 25 // 7).astype(
        int
    )
    low, high = min(1000, vocab_size // 4), min(150_000, vocab_size // 2 * 2)
    return [Prompt(tuple(rng.integers(low, high, n).tolist()), int(rng.integers(0, 5))) for n in lengths]


def parser_for(doc: str | None, sides: Sequence[str]) -> argparse.ArgumentParser:
    """The flags that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="32b", help="shape of the base")
    add("--layers", type=int, help="fewer layers than the real base has")
    add("--sides", type=_one_of(sides), default=list(sides), help=f"which of {', '.join(sides)} (default: all)")
    add("--rank", type=int, default=16, help="of the LoRA")
    add(
        "--seconds",
        type=float,
        default=40.0,
        help="for each side, warm-up included; one timed repeat is made in any case",
    )
    add("--gpu-memory", metavar="SIZE", help="cap of every side, such as 31.7GiB")
    add("--profile", choices=("card", "sm70"), default="card", help="sm70: fp16, gradient scaler, no flash attention")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: float32, to try the script with --size tiny")
    add("--checkpoint", type=Path, help="take this folder, build it if it is empty (default: a temporary one)")
    add("--out", type=Path, help="folder of the results (default: benchmarks/results; --device cpu: a temporary one)")
    add("--child", help=argparse.SUPPRESS)
    return parser


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of make_prompts."""
    parser.add_argument("--prompts", type=int, default=24, help="number of prompts")
    parser.add_argument("--median-tokens", type=int, default=700, help="median length of a prompt")


def _one_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        unknown = [word for word in text.split(",") if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not one of {', '.join(known)}")
        return text.split(",")

    return parse


def dtype_name(args: argparse.Namespace) -> str:
    """What the sides compute in."""
    return "float32" if args.device == "cpu" else "float16" if args.profile == "sm70" else "bfloat16"


def sync(device: str) -> None:
    """Waits for the GPU."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def timed_passes(one_pass: Callable[[], Any], *, seconds: float, device: str) -> tuple[Any, Row]:
    """What the first pass returned, which is the warm-up, and the times of those behind it, in seconds.

    Args:
        one_pass: computes all prompts once.
        seconds: for all passes together; a pass that would not end in time is not begun, but for the first timed one. At
            most MAX_REPEATS are timed.
        device: "cuda" or "cpu".
    """
    import torch

    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start, times = time.perf_counter(), []
    first = one_pass()
    sync(device)
    warm_up = time.perf_counter() - start
    while not times or (len(times) < MAX_REPEATS and time.perf_counter() - start + times[-1] < seconds):
        begin = time.perf_counter()
        one_pass()
        sync(device)
        times.append(time.perf_counter() - begin)
    row: Row = {"warm_up_s": warm_up, "pass_s": times}
    if device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return first, row


def rates(pass_s: Sequence[float], *, tokens: int, questions: int, flop_per_token: float | None = None) -> Row:
    """Medians over the timed passes; the spread is (slowest - fastest) / median.

    Args:
        pass_s: seconds of every timed pass.
        tokens: real ones of a pass, no pads.
        questions: of a pass.
        flop_per_token: that no engine can do without; the parent makes a share of the matmul rate of it.
    """
    median = statistics.median(pass_s)
    return {
        "tokens_per_s": tokens / median,
        "questions_per_s": questions / median,
        "spread": (max(pass_s) - min(pass_s)) / median,
        "flop_per_token": flop_per_token,
    }


def num_block_weights(config: Any) -> int:
    """Weights of the layers' linear modules, which are what is multiplied; not embedding and head."""
    width, head = (
        config.hidden_size,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    attention = 2 * width * head * (config.num_attention_heads + config.num_key_value_heads)
    return int(config.num_hidden_layers * (attention + 3 * width * config.intermediate_size))


def measure_machine(args: argparse.Namespace) -> Row:
    """Card, versions, and the card's rate of plain matmul, rows x hidden x intermediate, in TFLOP/s."""
    import importlib.metadata

    import torch

    config, cuda = make_config(args.size, args.layers), args.device == "cuda"
    weight = torch.randn(
        config.intermediate_size, config.hidden_size, device=args.device, dtype=getattr(torch, dtype_name(args))
    )
    found = {}
    for rows in (2048, 4096, 8192) if cuda else (64,):
        x = torch.randn(rows, config.hidden_size, device=args.device, dtype=weight.dtype)

        def ten_times(x: Any = x) -> None:
            for _ in range(10):
                torch.nn.functional.linear(x, weight)

        _, row = timed_passes(ten_times, seconds=1.0 if cuda else 0.02, device=args.device)
        found[rows] = 20 * rows * weight.numel() / statistics.median(row["pass_s"]) / 1e12
    packages = ("torch", "transformers", "peft", "bitsandbytes", "unsloth", "liger_kernel", "xformers", "triton")
    installed = {d.metadata["Name"].lower().replace("-", "_"): d.version for d in importlib.metadata.distributions()}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    has_driver = cuda and shutil.which("nvidia-smi")
    return {
        "card": torch.cuda.get_device_name() if cuda else "CPU",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else None,
        "driver": subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        if has_driver
        else None,
        "versions": {name: installed[name] for name in packages if name in installed},
        "matmul_tflops_by_rows": found,
        "matmul_tflops": max(found.values()),
        "block_weights": num_block_weights(config),
    }


def prepare_child(args: argparse.Namespace) -> None:
    """Caps the memory and takes flash attention away, as the flags say."""
    import torch

    if args.gpu_memory:
        from ksat.memory import parse_memory

        share = parse_memory(args.gpu_memory) / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(share)
    if args.profile == "sm70":
        from ksat import attention, language_model

        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        for module in (attention, language_model):
            module.choose_kernel = lambda device, dtype: "segments"


def report(row: Row) -> None:
    """Hands a row to the parent."""
    print(RESULT + json.dumps(row), flush=True)


def attempt(side: str, measure: Callable[[], Row]) -> None:
    """Reports the side's row; if it fails, the reason is the row."""
    import gc
    import traceback

    import torch

    try:
        row = measure()
    except Exception as error:  # a side that fails must not take the others with it
        traceback.print_exc(limit=-6)
        row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    report({"side": side} | row)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
