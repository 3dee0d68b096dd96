"""Damaged checkpoints and journals: refused by one line, or the same scores to the last bit; never other scores."""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from damage import BASE_FILES, RUN_FILES, damage_file

from . import odd
from .forks import Kill, run
from .kills import Scenario, expect
from .world import BASE, World, differences, output_fault, snapshot

NUM_CHECKPOINTS, NUM_JOURNALS = 1000, 200
RUN = "checkpoints/first"


def damage(rng: Random, folder: Path) -> str:
    """Damages one file of the run or, every third time, of its base; says which and how."""
    names = (
        [f"{BASE}/{name}" for name in BASE_FILES] if rng.random() < 0.33 else [f"{RUN}/{name}" for name in RUN_FILES]
    )
    path = folder / rng.choice([name for name in names if (folder / name).exists()])
    return f"{path.relative_to(folder)}: {damage_file(path, rng).partition(': ')[2]}"


def prepare_checkpoints(world: World) -> Callable[[int], str]:
    """Scores with an undamaged run, and returns what damages one and scores."""
    command = world.score("first", "x", "--limit", "6")
    expected = expect(Scenario("damage", command), world)

    def case(number: int) -> str:
        rng = Random(f"damage-checkpoints-{number}")
        folder = world.copy(f"damage-{number}")
        what = damage(rng, folder)
        before = snapshot(folder)
        ended = run(command, folder)
        found = snapshot(folder)
        fault = output_fault(ended.output, ended.code)
        if not fault and ended.code == 0:
            other = [
                name
                for name in ("submissions/x.probs.csv", "submissions/x.csv")
                if found.get(name) != expected.new[name]
            ]
            named = BASE in what and "warning: --base" in ended.output  # another base is named, not refused
            fault = "other scores, exit 0, and no word of it" if other and not named else ""
        elif not fault and (wrong := differences(found, before)):
            fault = f"refused, but {wrong[0]}"
        shutil.rmtree(folder)
        return f"{what}: {fault}" if fault else ""

    return case


def prepare_journals(world: World) -> Callable[[int], str]:
    """Interrupts an inference, and returns what garbles its journal and goes on."""
    command = world.score("first", "x")
    expected = expect(Scenario("journal", command), world)
    for at in range(expected.num_changes // 2, 0, -1):  # from where its scores are on the disk and its result is not
        killed = world.copy("journal-killed")
        run(command, killed, Kill(at=at))
        journals = list((killed / "submissions").glob(".x.probs.csv.partial.*"))
        if journals and not (killed / "submissions/x.csv").exists() and len(journals[0].read_text().splitlines()) > 2:
            break
    else:
        raise RuntimeError("no kill leaves a journal of two scored packs")

    def case(number: int) -> str:
        rng = Random(f"damage-journals-{number}")
        folder = world.scratch / f"journal-{number}"
        shutil.copytree(killed, folder)
        journal = next((folder / "submissions").glob(".x.probs.csv.partial.*"))
        journal.write_bytes(odd.mutate_bytes(rng, journal.read_bytes()))
        ended = run(command, folder)
        faults = [output_fault(ended.output, ended.code), *differences(snapshot(folder), expected.new)[:2]]
        shutil.rmtree(folder)
        return "; ".join(filter(None, faults))

    return case
