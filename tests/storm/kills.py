"""Processes that are killed, and processes that meet: what is lost, what is left over, whose result stands there.

After a kill the same command is run to its end (of a training --resume, or what its error line says). Then every byte must be as
if nobody had killed anything, and what the command has nothing to do with must be as before, also right after the kill.
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from ksat.runs import read_run

from .forks import Command, Ended, Kill, Process, in_fork, run
from .world import BASE, CPU, HELD_OUT, OOF_FILES, OTHER_BASE, VALIDATED, World, differences, output_fault, snapshot

_TIMED = 3  # every third kill comes at a random moment, the others at one change of the disk after the other
_TRIES = 6


@dataclass(frozen=True, slots=True)
class Scenario:
    """A command that is killed.

    Attributes:
        name: for the report.
        command: what is run.
        whole: folders that it replaces: the old one or the new one stands there at every moment.
        recover: what a user runs after a kill, after the output of the call before ("" after the kill); None when it is done.
        num_kills: before it may end.
        starts_children: whether some kills take a child alone.
        before: called in the process before the script.
    """

    name: str
    command: Command
    whole: tuple[str, ...] = ()
    recover: "Callable[[Command, str], Command | None]" = field(default=lambda command, said: None if said else command)
    num_kills: int = 1
    starts_children: bool = False
    before: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """What a scenario leaves if nobody kills it, and what was there before."""

    old: Mapping[str, str]
    new: Mapping[str, str]
    num_changes: int
    seconds: float


def expect(scenario: Scenario, world: World) -> Expected:
    """Runs a scenario to its end.

    Raises:
        RuntimeError: it fails.
    """
    folder = world.copy(f"expected-{scenario.name}")
    old = snapshot(folder)
    ended = run(scenario.command, folder, before=scenario.before)
    if fault := output_fault(ended.output, ended.code):
        raise RuntimeError(f"{scenario.command} fails without a kill: {fault}\n{ended.output}")
    if ended.code != 0:
        raise RuntimeError(f"{scenario.command} ended with {ended.code}: {ended.output}")
    return Expected(old, snapshot(folder), ended.num_changes, ended.seconds)


def kill_case(scenario: Scenario, expected: Expected, world: World, name: str, number: int) -> str:
    """What goes wrong with kill number `number` of a scenario; "" for nothing."""
    rng = Random(f"{name}-{number}")
    folder = world.scratch / f"{name}-{number}"
    fault = _kill(scenario, expected, world, folder, rng, number)
    if not fault:
        fault = _recover(scenario, expected, folder)
    shutil.rmtree(folder, ignore_errors=True)
    return f"{scenario.name}: {fault}" if fault else ""


def _kill(scenario: Scenario, expected: Expected, world: World, folder: Path, rng: Random, number: int) -> str:
    """Kills the scenario's command once or more, and looks at what stands there."""
    for nth in range(scenario.num_kills):
        kill = choose_kill(scenario, expected, rng, number if nth == 0 else rng.randrange(10_000))
        for _ in range(_TRIES):
            if nth == 0:
                world.copy(folder.name)
            command = scenario.recover(scenario.command, "") if nth else scenario.command
            ended = run(command or scenario.command, folder, kill, scenario.before)
            if ended.was_killed or (kill.child_only and ended.num_changes >= kill.at) or nth:
                break
            kill = Kill(seconds=ended.seconds * rng.random() * 0.9)  # it ended first
        else:
            return f"it ended before each of {_TRIES} kills"
        told = f"{_words(kill)}: "
        if "Traceback" in ended.output:
            return told + output_fault(ended.output, 0)
        try:
            _read_replaced(scenario, folder)
        except RuntimeError:
            return f"{told}neither the old nor the new run can be read"
        if fault := look_after_kill(scenario, expected, snapshot(folder)):
            return told + fault
    return ""


def choose_kill(scenario: Scenario, expected: Expected, rng: Random, number: int) -> Kill:
    """Every third at a random moment; the others at changes of the disk, spread over all of them."""
    if number % _TIMED == 0:
        return Kill(seconds=expected.seconds * rng.random() * 0.95)
    nth = number - number // _TIMED - 1
    at = 1 + int(nth * 0.6180339887 * expected.num_changes) % max(1, expected.num_changes)
    cut = rng.choice((None, 0.0, rng.random()))
    return Kill(at=at, cut=cut, child_only=scenario.starts_children and number % 5 == 0)


def _words(kill: Kill) -> str:
    if kill.seconds is not None:
        return f"killed after {kill.seconds:.2f} s"
    cut = "" if kill.cut is None else f", the file cut to {kill.cut:.2f}"
    return f"{'child ' if kill.child_only else ''}killed at change {kill.at}{cut}"


def look_after_kill(scenario: Scenario, expected: Expected, found: Mapping[str, str]) -> str:
    """What is lost right after a kill: files that the command only adds to, or both the old and the new result."""
    for name, old in expected.old.items():
        kept = expected.new.get(name) == old
        if name not in found and (kept or not _within(name, scenario.whole)) and not _is_half_named(name, found):
            return f"gone after the kill: {name}"
        if (
            name in found
            and found[name] != old
            and (kept or found[name] != expected.new.get(name))
            and not _grows(name)
        ):
            return f"neither old nor new after the kill: {name}"
    for folder in scenario.whole:
        states = [
            [item for item in each.items() if _within(item[0], (folder,))] for each in (expected.old, expected.new)
        ]
        if not any(all(found.get(name) == entry for name, entry in state) for state in states):
            return f"neither the old nor the new {folder} is whole after the kill"
    return ""


def _read_replaced(scenario: Scenario, folder: Path) -> None:
    """Reads the runs that are replaced, as inference.py would: between two renames the old one lies beside its place."""

    def read() -> None:
        os.chdir(folder)
        for name in scenario.whole:
            read_run(Path(name))

    in_fork(read)


def _is_half_named(name: str, found: Mapping[str, str]) -> bool:
    """Whether it marks a set of outputs whose names were being given: the mark goes first and comes last, and a note lies there."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/.{file}.writing" in found


def _within(name: str, folders: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{folder}/") for folder in folders)


def _grows(name: str) -> bool:
    return name.endswith(".log")


def _recover(scenario: Scenario, expected: Expected, folder: Path) -> str:
    """Runs what a user would, until nothing more is to do, and compares all files."""
    said, ended, told = "", None, []
    while (command := scenario.recover(scenario.command, said)) is not None and len(told) < 4:
        ended = run(command, folder, before=scenario.before)
        if fault := output_fault(ended.output, ended.code):
            return f"{command}: {fault}"
        said = ended.output.strip() or "nothing"
        told.append(said.splitlines()[-1][:160])
    wrong = differences(snapshot(folder), expected.new)
    if ended is not None and ended.code != 0 and (wrong or not is_done(said)):
        return f"not finished by the same command: {told[-1]}" + (f"; {wrong[0]}" if wrong else "")
    return "; ".join(wrong[:3])


def is_done(said: str) -> bool:
    """Whether an error line says that the result is there already."""
    last = said.strip().splitlines()[-1]
    return last.startswith("error: ") and any(word in last for word in ("exist already", "exists", "is finished"))


def resume(command: Command, said: str) -> Command | None:
    """What a user runs after a training was killed: --resume, and else what the error line says."""
    if not said:
        return command.with_flags("--resume")
    last = said.splitlines()[-1]
    if "never started" in last or "no such" in last:
        return command
    if "--overwrite starts anew" in last:
        return command.with_flags("--overwrite")
    return None


def _save_after_every_step() -> None:
    from ksat import training

    training.SECONDS_BETWEEN_SAVES = -1.0


def inference_scenarios(world: World) -> list[Scenario]:
    return [
        Scenario("inference", world.score("first", "x")),
        Scenario("inference --overwrite", world.score("first", "second", "--overwrite")),
        Scenario("inference, killed twice", world.score("second", "x", "--choice-orders", "2"), num_kills=2),
    ]


def training_scenarios(world: World) -> list[Scenario]:
    three = ("--epochs", "3", *VALIDATED)
    return [
        Scenario("train", world.train("x", *three), recover=resume),
        Scenario(
            "train, saved after every step", world.train("x", *three), recover=resume, before=_save_after_every_step
        ),
        Scenario(
            "train, killed twice", world.train("x", *three), recover=resume, num_kills=2, before=_save_after_every_step
        ),
        Scenario(
            "train --overwrite",
            world.train("second", "--epochs", "1", *VALIDATED, "--overwrite"),
            whole=("checkpoints/second",),
        ),
    ]


def all_scenarios(world: World) -> list[Scenario]:
    return [Scenario("train --all", world.train("cv", "--epochs", "1", "--folds", "2", "--all"), starts_children=True)]


def explore_scenarios(world: World) -> list[Scenario]:
    flags = (
        "--score",
        "data/train.csv",
        "--bases",
        f"{BASE},{OTHER_BASE},{BASE}:none",
        "--out",
        "both",
        "--pack-tokens",
        "300",
        *CPU,
    )
    other = Command(
        "explore.py", ("--score", "data/train.csv", "--bases", f"{BASE},{OTHER_BASE}", "--out", "old", *CPU)
    )
    ended = run(other, world.folder)  # here, for no other campaign needs it
    if ended.code != 0:
        raise RuntimeError(f"{other} ended with {ended.code}: {ended.output}")
    anew = ("--limit", "9", "--pack-tokens", "300", "--overwrite")
    return [
        Scenario("explore --score", Command("explore.py", flags), starts_children=True),
        Scenario("explore --overwrite", other.with_flags(*anew), starts_children=True),
    ]


def soup_scenarios(world: World) -> list[Scenario]:
    runs = ("checkpoints/first", "checkpoints/second")
    return [
        Scenario("soup", Command("ksat.soup", (*runs, "--run", "x"))),
        Scenario(
            "soup --overwrite",
            Command("ksat.soup", (*runs, "--run", "old-soup", "--weights", "1", "2", "--overwrite")),
            whole=("checkpoints/old-soup",),
        ),
    ]


def ensemble_scenarios(world: World) -> list[Scenario]:
    members = ("submissions/first.probs.csv", "submissions/second.probs.csv")
    fit, turned = (("--fit", *files, "--answers", HELD_OUT) for files in (OOF_FILES, reversed(OOF_FILES)))
    return [
        Scenario("blend", Command("ensemble.py", (*members, "--out", "x"))),
        Scenario(
            "blend --overwrite",
            Command("ensemble.py", (*members, "--out", "second-blend", "--weights", "1", "2", "--overwrite")),
        ),
        Scenario("--fit", Command("ensemble.py", (*fit, "--out", "x"))),
        Scenario("--fit --overwrite", Command("ensemble.py", (*turned, "--out", "fitted", "--overwrite"))),
        Scenario("--log", Command("ensemble.py", ("--log", "submissions/second.csv", "--public", "0.5"))),
    ]


@dataclass(frozen=True, slots=True)
class Campaign:
    """Scenarios of one script, killed in turn.

    Attributes:
        number: of kills in full.
        gate: of kills in the gate.
        scenarios: what is killed.
    """

    number: int
    gate: int
    scenarios: Callable[[World], list[Scenario]]


CAMPAIGNS = {
    "kills-inference": Campaign(300, 3, inference_scenarios),
    "kills-training": Campaign(100, 2, training_scenarios),
    "kills-all-folds": Campaign(50, 1, all_scenarios),
    "kills-explore": Campaign(50, 1, explore_scenarios),
    "kills-soup": Campaign(50, 2, soup_scenarios),
    "kills-ensemble": Campaign(50, 5, ensemble_scenarios),
}


def prepare_campaign(name: str, world: World, cases: Sequence[int]) -> Callable[[int], str]:
    """Runs the scenarios of these cases to their ends, and returns what runs one kill of them by its number."""
    scenarios = CAMPAIGNS[name].scenarios(world)
    expected = {which: expect(scenarios[which], world) for which in sorted({case % len(scenarios) for case in cases})}

    def case(number: int) -> str:
        nth, which = divmod(number, len(scenarios))
        return kill_case(scenarios[which], expected[which], world, f"{name}-{which}", nth)

    return case


# Processes that meet


def _at_once(commands: list[Command], folder: Path, kills: list[Kill] | None = None) -> list[Ended]:
    """Starts all at the same time, and waits for all."""
    outputs = [folder.with_name(f"{folder.name}.output-{i}") for i in range(len(commands))]
    given = kills or [Kill()] * len(commands)
    processes = [
        Process(command, folder, output, kill) for command, output, kill in zip(commands, outputs, given, strict=True)
    ]
    return [process.wait() for process in processes]


def prepare_pairs_of(
    commands: tuple[Command, Command], world: World, name: str, again: Callable[[Path], list[Ended]]
) -> Callable[[int], str]:
    """Two commands with one name for their result: odd cases are killed and run again."""
    results = [expect(Scenario(f"{name}-{i}", command), world) for i, command in enumerate(commands)]
    seconds = min(result.seconds for result in results)

    def case(number: int) -> str:
        rng = Random(f"{name}-{number}")
        folder = world.copy(f"{name}-{number}")
        kills = [Kill(seconds=2 * seconds * (0.3 + 0.6 * rng.random())) for _ in commands] if number % 2 else None
        ended = _at_once(list(commands), folder, kills)
        faults = [output_fault(each.output, each.code) for each in ended if not each.was_killed]
        if number % 2:
            faults += [output_fault(each.output, each.code) for each in again(folder)]
        elif sorted(each.code for each in ended) != [0, 2]:
            faults.append(
                f"both at once ended with {[each.code for each in ended]}, one of them should have been refused"
            )
        wrong = min((differences(snapshot(folder), result.new) for result in results), key=len)
        shutil.rmtree(folder)
        return "; ".join(filter(None, [*faults[:2], *(f"the result is neither one's: {text}" for text in wrong[:2])]))

    return case


def prepare_inference_pairs(world: World) -> Callable[[int], str]:
    commands = (world.score("first", "x"), world.score("second", "x"))
    return prepare_pairs_of(
        commands, world, "pairs-inference", lambda folder: [run(command, folder) for command in commands]
    )


def prepare_training_pairs(world: World) -> Callable[[int], str]:
    three = ("--epochs", "3", *VALIDATED)
    commands = (world.train("x", *three), world.train("x", *three, "--seed", "1"))

    def again(folder: Path) -> list[Ended]:
        """Goes on with whatever lies there, and starts the first if nothing does."""
        told = [run(Command("train.py", ("--run", "x", *CPU, "--resume")), folder)]
        while (command := resume(commands[0], told[-1].output.strip())) is not None and len(told) < 4:
            told.append(run(command, folder))
        return told

    return prepare_pairs_of(commands, world, "pairs-training", again)


def prepare_log_pairs(world: World) -> Callable[[int], str]:
    """Eight entries into submissions/log.csv at once: whoever ends with 0 is in it."""

    def case(number: int) -> str:
        import csv

        rng = Random(f"pairs-log-{number}")
        folder = world.copy(f"pairs-log-{number}")
        lines = (folder / "submissions/first.csv").read_text(encoding="utf-8").splitlines()
        names = [f"submissions/s{i}.csv" for i in range(8)]
        for name in names:
            rows = [f"{line.split(',')[0]},{rng.randint(1, 4)}" for line in lines[1:]]
            (folder / name).write_text("\n".join([lines[0], *rows, ""]), encoding="utf-8")
        ended = _at_once([Command("ensemble.py", ("--log", name, "--public", "0.5")) for name in names], folder)
        faults = [fault for each in ended if (fault := output_fault(each.output, each.code))]
        log = folder / "submissions/log.csv"
        with log.open(encoding="utf-8", newline="") as file:
            entered = [row["file"] for row in csv.DictReader(file)]
        done = [name for name, each in zip(names, ended, strict=True) if each.code == 0]
        if sorted(entered) != sorted(done):
            faults.append(f"{len(done)} entries ended with 0, {len(entered)} are in the log")
        shutil.rmtree(folder)
        return "; ".join(faults[:2])

    return case


PAIRS = {
    "pairs-inference": (40, 2, prepare_inference_pairs),
    "pairs-training": (20, 1, prepare_training_pairs),
    "pairs-log": (20, 1, prepare_log_pairs),
}
