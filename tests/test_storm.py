"""A small part of the storm (tests/storm) for the gate, and that its oracles bite."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from storm import fuzz, odd
from storm.forks import Command, in_workers, read_kept
from storm.kills import Expected, Scenario, look_after_kill, resume
from storm.parts import all_parts, run_storm
from storm.world import differences, digest, output_fault

from ksat.errors import InputError

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_gates_part_of_the_storm_finds_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/storm"), "--gate", "--out", str(tmp_path / "storm")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "failures" in (tmp_path / "storm.md").read_text(encoding="utf-8")


def test_the_storm_has_the_numbers_that_are_promised() -> None:
    numbers = {part.name: part.number for part in all_parts()}
    assert sum(number for name, number in numbers.items() if name.startswith("fuzz-")) == 100_000
    assert numbers["damage-checkpoints"] == 1000
    assert [numbers[f"kills-{name}"] for name in ("inference", "training", "all-folds", "explore", "soup", "ensemble")] == [
        300, 100, 50, 50, 50, 50,
    ]  # fmt: skip


def test_what_the_workers_found_is_kept_also_of_one_that_died_and_under_a_line_that_a_kill_has_cut(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "storm.jsonl"
    kept.write_text('{"part": "p", "case": 7, "fault": "", "seconds": 1.0}\n{"part": "p", "ca')

    def job(case: int) -> str:
        if case == 2:
            os._exit(3)
        return "odd" if case % 2 else ""

    in_workers("q", range(5), job, 2, kept)
    found = {(entry["part"], entry["case"]): entry["fault"] for entry in read_kept(kept)}
    died = "the process that ran it died: 3"
    assert found == {("p", 7): "", ("q", 0): "", ("q", 1): "odd", ("q", 2): died, ("q", 3): "odd", ("q", 4): ""}


def test_hours_of_results_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "storm.jsonl").write_text("hours\n")
    storm = {"scale": 1.0, "gate": False, "seed": None, "go_on": False, "num_workers": 1, "out": tmp_path / "storm"}
    assert run_storm(["fuzz-wikitext"], **storm) == 2
    assert "storm.jsonl exists; --go-on keeps its cases, --out takes another name" in capsys.readouterr().out
    assert (tmp_path / "storm.jsonl").read_text() == "hours\n"


def test_a_case_follows_from_its_seed() -> None:
    rows = [["id", "answer"], ["a", "1"], ["b", "2"]]
    made = [odd.to_csv(rng, odd.mutate_table(rng, rows)) for rng in (Random("x-17"), Random("x-17"), Random("x-18"))]
    assert made[0] == made[1] != made[2]


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (InputError("data/x.csv: no such file; check the path"), ""),
        (KeyError("answer"), "KeyError"),
        (fuzz.TooSlow(), "TooSlow"),
    ],
)
def test_an_input_is_refused_by_one_readable_line_or_it_is_a_fault(error: BaseException, fault: str) -> None:
    assert fuzz.error_fault(error).startswith(fault)
    assert bool(fuzz.error_fault(error)) == bool(fault)


def test_a_line_that_is_no_readable_one_is_a_fault() -> None:
    assert not fuzz.message_fault("error: a" + "b" * 992)
    for text in ("a\nb", "a\ud800", "a\x1b[31m", "a\u2028b", "a" * 1001):
        assert fuzz.message_fault(text)


def test_a_usage_error_is_one_line() -> None:
    assert not fuzz.exit_fault(2, "error: no such flag; see python train.py --help\n")
    assert fuzz.exit_fault(2, "usage: train.py\nerror: no such flag\n")
    assert fuzz.exit_fault(1, "error\n")


def test_what_a_script_printed_is_judged() -> None:
    assert not output_fault("wrote x\n", 0)
    assert not output_fault("error: x: no such file\n", 2)
    assert output_fault("error: x\nmore\n", 2)
    assert output_fault("Traceback (most recent call last):\n ...\nKeyError: 'a'\n", 1) == "a traceback: KeyError: 'a'"
    assert output_fault("", 1)


def test_files_are_compared_without_what_differs_from_run_to_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text('{"peak_memory_gib": 1.5, "epochs": [{"epoch": 1}]}')
    before = digest(path)
    path.write_text('{"peak_memory_gib": 2.5, "epochs": [{"epoch": 1}]}')
    assert digest(path) == before
    path.write_text('{"peak_memory_gib": 2.5, "epochs": [{"epoch": 2}]}')
    assert digest(path) != before
    assert differences({"a": "1", "b": "2"}, {"a": "1", "c": "2"}) == ["missing: c", "left over: b"]
    assert differences({"a": "1"}, {"a": "2"}) == ["differs: a (1)"]


def test_what_is_lost_right_after_a_kill_is_seen() -> None:
    old = {"notes.txt": "n", "checkpoints/r/run.json": "old", "checkpoints/r/adapter": "old"}
    new = {"notes.txt": "n", "checkpoints/r/run.json": "new", "checkpoints/r/adapter": "new"}
    scenario = Scenario("s", Command("train.py", ()), whole=("checkpoints/r",))
    expected = Expected(old, new, 1, 1.0)
    assert look_after_kill(scenario, expected, old) == look_after_kill(scenario, expected, new) == ""
    assert "gone" in look_after_kill(scenario, expected, {k: v for k, v in old.items() if k != "notes.txt"})
    assert "neither" in look_after_kill(scenario, expected, {**old, "notes.txt": "x"})
    assert "whole" in look_after_kill(scenario, expected, {**old, "checkpoints/r/adapter": "new"})
    assert "whole" in look_after_kill(scenario, expected, {"notes.txt": "n"})
    assert not look_after_kill(scenario, expected, {**new, "checkpoints/r/progress.json": "not yet removed"})
    plain = replace(scenario, whole=())
    assert not look_after_kill(plain, expected, {**old, "checkpoints/r/adapter": "new"})


def test_after_a_kill_of_a_training_the_user_does_what_the_line_says() -> None:
    command = Command("train.py", ("--run", "x"))
    assert resume(command, "") == command.with_flags("--resume")
    assert resume(command, "error: --resume: checkpoints/x was never started; runs there: none") == command
    assert resume(
        command, "error: --run x: checkpoints/x exists; --resume goes on, --overwrite starts anew"
    ) == command.with_flags("--overwrite")
    assert resume(command, "wrote checkpoints/x") is None
