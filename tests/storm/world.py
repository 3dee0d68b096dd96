"""A small competition with finished runs, submissions and files of the user, and how two states of it are compared."""

import csv
import hashlib
import io
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksat.errors import LONGEST_LINE

from .forks import Command, in_fork, run

BASE, OTHER_BASE = "bases/tiny", "bases/other"  # tiny random ones, in the competition's folder
LORA = ("--rank", "8", "--lr", "0.01", "--questions-per-step", "4", "--warmup", "0")
CPU = ("--device", "cpu", "--engine", "transformers")
HELD_OUT = "data/held.csv"  # labelled, and nobody's training rows
OOF_FILES = ("submissions/first-oof.probs.csv", "submissions/second-oof.probs.csv")
VALIDATED = ("--valid-fraction", "0.25", "--patience", "9")
# What differs from run to run without being a result.
_VOLATILE = re.compile(r"second|/s$|memory|gib|runtime|^time$", re.IGNORECASE)
# Of the user; nothing may touch them. Some are named nearly as our own leftovers are.
KEPT = {
    "notes.txt": "mine\n", "checkpoints/thesis/chapter.txt": "not a run\n", "checkpoints/readme.md": "# runs\n", "submissions/mine.csv": "id,answer\nx,1\n",
    "submissions/full.tmp": "mine\n", "checkpoints/first.old": "mine\n", "submissions/.gitignore": "*\n", "checkpoints/.gitignore": "*\n",
    "explorations/notes.md": "mine\n", "comparisons/notes.md": "mine\n", "data/notes.tmp": "mine\n",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class World:
    """Where everything lies.

    Attributes:
        folder: the competition, which every case copies.
        scratch: for those copies.
    """

    folder: Path
    scratch: Path

    def copy(self, name: str) -> Path:
        """A fresh copy of the competition."""
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return folder

    def train(self, run_name: str, *flags: str) -> Command:
        """train.py on the tiny base."""
        return Command("train.py", ("--base", BASE, *LORA, *CPU, "--run", run_name, *flags))

    def score(self, run_name: str, out: str, *flags: str) -> Command:
        """inference.py with a run, in packs so small that there are several."""
        given = ("--ckpt", f"checkpoints/{run_name}", "--pack-tokens", "300", *CPU, "--out", out)
        return Command("inference.py", (*given, *flags))


def make_world(scratch: Path) -> World:
    """Trains, scores and blends in `scratch`, by the real scripts."""
    import tiny

    world = World(scratch / "world", scratch)
    for name, family in ((BASE, "qwen2"), (OTHER_BASE, "llama")):
        in_fork(lambda folder=world.folder / name, family=family: shutil.copytree(tiny.base_folder(family), folder))
    data = world.folder / "data"
    tiny.write_questions(data / "train.csv", tiny.make_questions(16))
    tiny.write_questions(world.folder / HELD_OUT, tiny.make_questions(16, first=80))
    tiny.write_questions(data / "test.csv", tiny.make_questions(12, first=40), labelled=False)
    tiny.write_questions(data / "answers.csv", tiny.make_questions(12, first=40))
    for name, text in KEPT.items():
        path = world.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    commands = [
        *(
            world.train(name, "--epochs", "2", "--seed", str(seed), *VALIDATED)
            for seed, name in enumerate(("first", "second"))
        ),
        *(world.score(name, name) for name in ("first", "second")),
        *(world.score(name, f"{name}-oof", "--test", HELD_OUT) for name in ("first", "second")),
        Command("ensemble.py", (*OOF_FILES, "--out", "old", "--answers", HELD_OUT, "--margin", "0.1")),
        Command("ensemble.py", (*OOF_FILES, "--out", "second-blend")),
        Command("ksat.soup", ("checkpoints/first", "checkpoints/second", "--run", "old-soup")),
        Command("ensemble.py", ("--fit", *OOF_FILES, "--answers", HELD_OUT, "--out", "fitted")),
        Command("compare.py", (*OOF_FILES, "--answers", HELD_OUT, "--out", "both", "--pick-two")),
    ]
    for command in commands:
        ended = run(command, world.folder)
        if ended.code != 0:
            raise RuntimeError(f"{command} ended with {ended.code}: {ended.output}")
    return world


def snapshot(folder: Path) -> dict[str, str]:
    """Every file of a folder by its name, as a digest of what counts in it; locks are left out."""
    files = (path for path in folder.rglob("*") if not path.is_dir() or not any(path.iterdir()))
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: digest(path) for name, path in sorted(names.items()) if not re.search(r"\.lock$", name)}


def digest(path: Path) -> str:
    """Of a file's bytes; without what tells seconds, memory or the time of day, and of pictures and logs that they are whole."""
    if path.is_dir():
        return "an empty folder"
    data = path.read_bytes()
    try:
        if path.suffix == ".json":
            data = json.dumps(_lasting(json.loads(data)), sort_keys=True).encode()
        elif path.suffix == ".jsonl":
            data = json.dumps([_lasting(json.loads(line)) for line in data.decode().splitlines()]).encode()
        elif path.name == "log.csv" or path.name == "exploration.csv":
            data = repr(_lasting_columns(list(csv.reader(io.StringIO(data.decode()))))).encode()
        elif path.name == "exploration.md":
            rows = [
                [cell.strip() for cell in line.split("|")]
                for line in data.decode().splitlines()
                if line.startswith("|")
            ]
            data = repr(_lasting_columns(rows)).encode()
        elif path.suffix == ".png":
            return _picture(path)
        elif path.suffix == ".log":
            return "a log with a traceback" if b"Traceback" in data else "a log"
    except (ValueError, IndexError, SyntaxError):
        return f"damaged: {hashlib.sha256(data).hexdigest()}"
    return hashlib.sha256(data).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lasting(part) for key, part in value.items() if not _VOLATILE.search(key)}
    return [_lasting(part) for part in value] if isinstance(value, list) else value


def _lasting_columns(rows: list[list[str]]) -> list[list[str]]:
    lasting = [i for i, name in enumerate(rows[0]) if not _VOLATILE.search(name)]
    return [[row[i] for i in lasting if i < len(row)] for row in rows]


def _picture(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
        return f"a picture of {image.size[0]}x{image.size[1]}"


def differences(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """What is missing, left over or other, in words."""
    told = [f"missing: {name}" for name in expected if name not in found]
    told += [f"left over: {name}" for name in found if name not in expected]
    return told + [
        f"differs: {name} ({found[name][:24]})"
        for name in expected
        if found.get(name, expected[name]) != expected[name]
    ]


def output_fault(output: str, code: int) -> str:
    """What is wrong with what a script printed: a traceback, or an error that is no line of its own of at most 1,000 characters."""
    if "Traceback" in output:
        return f"a traceback: {output[output.index('Traceback') :].strip().splitlines()[-1][:200]}"
    last = output.rstrip("\n").rsplit("\n", 1)[-1]
    if code in (0, 130) or (code == 2 and last.startswith("error: ") and len(last) <= LONGEST_LINE):
        return ""
    return f"ended with {code}: {output[-200:]!r}"
