"""One process a side, one after the other; results as JSON and markdown after every row.

A benchmark is started once by a person, and once more by itself, with --child, for each group of sides. Only children touch
the GPU, so a side that dies or hangs costs nothing but itself.
"""

import argparse
import collections
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measure import RESULT, Row, dtype_name, measure_machine, report

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_LOAD = 240.0
# What makes two runs comparable; rows of another run stay beside those of this one.
SETTINGS = ("size", "layers", "prompts", "median_tokens", "rank", "gpu_memory", "profile", "device")


def run_sides(
    name: str, args: argparse.Namespace, groups: Sequence[Sequence[str]], table: Callable[[Row], str]
) -> None:
    """Builds the checkpoint, runs every group of sides in a process of its own, and writes the results after each row.

    Args:
        name: of the benchmark, whose script is benchmarks/<name>.py.
        args: from measure.parser_for.
        groups: the sides that share a process.
        table: the markdown table of one run.
    """
    with tempfile.TemporaryDirectory(prefix="ksat-benchmark-") as scratch:
        checkpoint = (args.checkpoint or Path(scratch) / args.size).resolve()
        if not (checkpoint / "config.json").exists():
            layers = ["--layers", str(args.layers)] if args.layers else []
            flags = ["--size", args.size, *layers, "--device", args.device, "--dtype", dtype_name(args)]
            subprocess.run(
                [sys.executable, str(ROOT / "benchmarks/build_checkpoint.py"), str(checkpoint), *flags], check=True
            )
        machine: list[Row] = []
        _run_child(name, ["machine"], checkpoint, args, machine.append)
        if "card" not in machine[0]:
            sys.exit(f"{name}: {machine[0]['error']}")
        results = Results(name, args, machine[0], table)
        for group in groups:
            _run_child(name, group, checkpoint, args, results.add)
    print(f"\n{results.markdown()}\nwritten to {results.path}.json and .md")


def be_child(args: argparse.Namespace, measure: Callable[[list[str]], None]) -> None:
    """The child's main: reports the machine, or lets `measure` report its sides."""
    sides = args.child.split(",")
    if sides == ["machine"]:
        report({"side": "machine"} | measure_machine(args))
        return
    measure(sides)


def _run_child(
    name: str, sides: Sequence[str], checkpoint: Path, args: argparse.Namespace, on_row: Callable[[Row], None]
) -> None:
    """Runs these sides in a new process; each gives a row, with the reason as "error" if it broke."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
        "UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    script = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *sys.argv[1:]]
    command = [*script, "--child", ",".join(sides), "--checkpoint", str(checkpoint)]
    limit, missing = SECONDS_TO_LOAD + 2 * args.seconds * len(sides), list(sides)
    tail: collections.deque[str] = collections.deque(maxlen=15)
    # Unsloth writes its compiled cache where it stands.
    with (
        tempfile.TemporaryDirectory(prefix="ksat-side-") as folder,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as child,
    ):
        timer = threading.Timer(limit, child.kill)
        timer.start()
        for line in child.stdout or ():
            if line.startswith(RESULT):
                row = json.loads(line[len(RESULT) :])
                missing.remove(row["side"])
                print(f"{row['side']}: {row.get('error') or _short(row)}", flush=True)
                on_row(row)
            elif line.strip():
                tail.append(line.rstrip())
        code = child.wait()
        in_time = timer.is_alive()
        timer.cancel()
    for side in missing:
        reason = f"exit status {code}: {tail[-1] if tail else ''}" if in_time else f"killed after {limit:.0f} s"
        print("\n".join(tail), f"\n{side}: {reason}", flush=True)
        on_row({"side": side, "error": reason[:250]})


def _short(row: Row) -> str:
    numbers = {key: round(value, 3) for key, value in row.items() if isinstance(value, float)}
    return ", ".join(f"{key} {value}" for key, value in numbers.items())


class Results:
    """The files <out>/<name>_<card>.json and .md: a list of runs, which differ in their settings; running a side again
    replaces its row.

    Attributes:
        path: without the ending.
        run: settings, command, date, commit, machine and rows of this call.
    """

    def __init__(self, name: str, args: argparse.Namespace, machine: Row, table: Callable[[Row], str]) -> None:
        out = args.out or (
            ROOT / "benchmarks/results" if args.device == "cuda" else Path(tempfile.mkdtemp(prefix="ksat-"))
        )
        out.mkdir(parents=True, exist_ok=True)
        card = re.sub(r"[^a-z0-9]+", "-", machine["card"].lower()).strip("-")
        self.name, self.path, self.table = name, out / f"{name}_{card}", table
        settings = {key: getattr(args, key) for key in SETTINGS if hasattr(args, key)}
        file = self.path.with_suffix(".json")
        runs = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []
        same = [run for run in runs if run["settings"] == settings]
        self.others = [run for run in runs if run["settings"] != settings]
        self.run: Row = {
            "settings": settings,
            "command": shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]]),
            "date": os.environ.get("BENCHMARK_DATE") or time.strftime("%Y-%m-%d"),
            "commit": os.environ.get("BENCHMARK_COMMIT") or _commit(),
            "machine": machine,
            "rows": same[0]["rows"] if same else [],
        }

    def add(self, row: Row) -> None:
        """Takes a row and writes both files, and <name>_<card>_profile.txt if the row has one."""
        if "profile" in row:
            self.path.with_name(f"{self.path.name}_profile.txt").write_text(row.pop("profile"), encoding="utf-8")
        row |= {"date": self.run["date"], "commit": self.run["commit"]}
        if row.get("flop_per_token"):
            tflops = self.run["machine"]["matmul_tflops"]
            row["share_of_matmul"] = row["tokens_per_s"] * row["flop_per_token"] / (tflops * 1e12)
        self.run["rows"] = [other for other in self.run["rows"] if other["side"] != row["side"]] + [row]
        text = json.dumps({"runs": [*self.others, self.run]}, indent=1)
        self.path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        """All runs of the file."""
        return f"# {self.name}\n" + "".join(f"\n{_run_text(run, self.table)}" for run in [*self.others, self.run])


def _run_text(run: Row, table: Callable[[Row], str]) -> str:
    machine, settings = run["machine"], run["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    chosen = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
    return (
        f"## {chosen}\n\n{machine['card']}{driver}; {versions}; ksat {run['commit']}; {run['date']}; measured matmul rate "
        f"{machine['matmul_tflops']:.3g} TFLOP/s.\n\n    {run['command']}\n\n{table(run)}\n"
    )


SPEED_HEAD = ("side", "tokens/s", "repeats", "spread", "questions/s", "share", "peak GiB", "reserved GiB")


def speed_columns(row: Row) -> list[str]:
    """The columns of SPEED_HEAD; empty where nothing was measured."""
    share, spread = row.get("share_of_matmul"), 100 * row["spread"]
    return [
        row["side"],
        number(row["tokens_per_s"], 0),
        str(len(row["pass_s"])),
        f"{spread:.1f} %",
        number(row["questions_per_s"], 2),
        "" if share is None else f"{100 * share:.0f} %",
        number(row.get("peak_gib"), 1),
        number(row.get("reserved_gib"), 1),
    ]


def number(value: float | None, digits: int) -> str:
    """The number with so many digits behind the point; empty for None."""
    return "" if value is None else f"{value:,.{digits}f}"


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A markdown table whose first column is text; short lines are filled up."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    filled = [[*line, *[""] * (len(head) - len(line))] for line in lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [list(head), rule, *filled])


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    changed = subprocess.run(
        [*git, "status", "--porcelain", "ksat"], capture_output=True, text=True, check=False
    ).stdout
    return f"{found} and changes" if found and changed.strip() else found or "unknown"
