"""All parts of the storm, how many cases each has, and the table that comes of them."""

import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from . import damaged, forks, fuzz, kills
from .world import World, make_world

Case = Callable[[int], str]


@dataclass(frozen=True, slots=True)
class Part:
    """Cases of one kind.

    Attributes:
        name: as --only takes it.
        number: of cases in full.
        gate: of cases in the gate.
        prepare: called with the numbers of the cases; returns what runs a case by its number and says what went wrong, "" for nothing.
    """

    name: str
    number: int
    gate: int
    prepare: Callable[[World, Sequence[int]], Case]


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a part: its cases so far, their seconds added up, and faults by the number of the case."""

    part: str
    number: int
    seconds: float
    faults: dict[int, str]


def all_parts() -> list[Part]:
    """The parts, quick ones first."""
    parts = [Part(door.name, door.share, min(300, door.share // 20), partial(_fuzz, door)) for door in fuzz.DOORS]
    parts.append(
        Part("damage-checkpoints", damaged.NUM_CHECKPOINTS, 10, lambda world, _: damaged.prepare_checkpoints(world))
    )
    parts.append(Part("damage-journals", damaged.NUM_JOURNALS, 10, lambda world, _: damaged.prepare_journals(world)))
    for name, campaign in kills.CAMPAIGNS.items():
        parts.append(Part(name, campaign.number, campaign.gate, partial(kills.prepare_campaign, name)))
    return parts + [
        Part(name, number, gate, lambda world, _, prepare=prepare: prepare(world))
        for name, (number, gate, prepare) in kills.PAIRS.items()
    ]


def _fuzz(door: fuzz.Door, world: World, _: Sequence[int]) -> Case:
    @cache
    def desk(process: int) -> fuzz.Desk:
        """Each worker's own, made with its first input."""
        made = fuzz.Desk(world, world.scratch / f"desk-{process}")
        if door.name in ("fuzz-settings-json", "fuzz-flags-train"):
            fuzz.model()
        fuzz.limit_memory()
        return made

    return lambda number: fuzz.check(door, number, desk(os.getpid()))


def run_storm(
    only: Sequence[str] | None,
    *,
    scale: float,
    gate: bool,
    seed: int | None,
    go_on: bool,
    num_workers: int,
    out: Path,
) -> int:
    """Runs parts, prints what went wrong and a table, and writes both; 1 if something did.

    Args:
        only: beginnings of the parts' names; None for all.
        scale: share of every part's cases; each has at least one.
        gate: the few cases of the gate instead.
        seed: one case alone.
        go_on: keep what an earlier call has written to `out`, and run only the cases that are missing there.
        num_workers: processes at once.
        out: path of the results without an ending.
    """
    parts = [part for part in all_parts() if not only or any(part.name.startswith(name) for name in only)]
    if not parts:
        print(f"no such part; there are {', '.join(part.name for part in all_parts())}")
        return 2
    if not go_on and seed is None and out.with_suffix(".jsonl").exists():
        print(f"{out.with_suffix('.jsonl')} exists; --go-on keeps its cases, --out takes another name")
        return 2
    forks.prepare()
    with tempfile.TemporaryDirectory(prefix="ksat-storm-") as scratch:
        world = make_world(Path(scratch))
        kept = out.with_suffix(".jsonl") if seed is None else Path(scratch, "seed.jsonl")
        kept.parent.mkdir(parents=True, exist_ok=True)
        for part in parts:
            number = part.gate if gate else max(1, round(part.number * scale))
            ended = {entry["case"] for entry in forks.read_kept(kept) if entry["part"] == part.name}
            cases = [case for case in (range(number) if seed is None else [seed]) if case not in ended]
            if cases:
                forks.in_workers(part.name, cases, part.prepare(world, cases), min(num_workers, len(cases)), kept)
            print(say(_result(part.name, forks.read_kept(kept))), flush=True)
        entries = forks.read_kept(kept)
    results = [result for part in all_parts() if (result := _result(part.name, entries)).number]
    text = table(results)
    print(f"\n{text}")
    if seed is None:
        out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    return int(any(result.faults for result in results))


def _result(part: str, entries: Sequence[dict[str, Any]]) -> Result:
    mine = sorted((e for e in entries if e["part"] == part), key=lambda entry: entry["case"])
    return Result(part, len(mine), sum(e["seconds"] for e in mine), {e["case"]: e["fault"] for e in mine if e["fault"]})


def kind(fault: str) -> str:
    """A fault without what differs from case to case: numbers, names in quotes, seconds."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\(.*?\)|[\d.]+", "…", fault)[:160]


def say(result: Result) -> str:
    """A part in a line, and its faults by kind, each with a case that shows it."""
    lines = [f"{result.part}: {result.number} cases, {len(result.faults)} failures, {result.seconds:.0f} s"]
    kinds = Counter(kind(fault) for fault in result.faults.values())
    for name, count in kinds.most_common(12):
        seed, fault = next((n, text) for n, text in result.faults.items() if kind(text) == name)
        lines.append(f"  {count} times (--only {result.part} --seed {seed}): {fault[:400]!r}")
    return "\n".join(lines)


def table(results: Sequence[Result]) -> str:
    """Markdown: part, cases, failures; the fuzzed inputs of all doors together in the last rows."""
    lines = ["| part | cases | failures | minutes |", "|---|---:|---:|---:|"]
    groups = {
        "all fuzzed inputs": "fuzz-",
        "all damaged files": "damage-",
        "all kills": "kills-",
        "all meetings": "pairs-",
    }
    rows = [(result.part, [result]) for result in results]
    rows += [
        (f"**{name}**", [each for each in results if each.part.startswith(start)]) for name, start in groups.items()
    ]
    for name, some in rows:
        if some:
            number, failures, seconds = (
                sum(column) for column in zip(*((r.number, len(r.faults), r.seconds) for r in some), strict=True)
            )
            lines.append(f"| {name} | {number:,} | {failures:,} | {seconds / 60:.1f} |")
    return "\n".join(lines)
