"""Folders of runs: locks, what takes whose place, kills at every step of it, and what is never deleted."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ksat.errors import InputError
from ksat.files import LockedError
from ksat.run_folders import (
    RunFolder,
    claim_fresh_run,
    claim_run,
    damaged_file,
    is_sealed,
    next_step,
    require_replaceable,
    seal,
    settle_run,
)
from ksat.sealed import read_sealed, write_sealed

ROOT = Path(__file__).parent.parent


class KilledError(BaseException):
    """Stands for kill -9 in process: nothing catches it."""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(folder: Path, text: str = "") -> Path:
    """A run in the making."""
    write_sealed(folder / "settings.json", {"base": "b", "text": text})
    (folder / "trainer/checkpoint-1").mkdir(parents=True)
    (folder / "trainer/checkpoint-1/optimizer.pt").write_text(text)
    (folder / "progress.json").write_text("{}")
    (folder / "epoch-1").mkdir()
    return folder


def finished(folder: Path, text: str) -> Path:
    """A run that is complete; what training needs lies there still."""
    started(folder, text)
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_model.safetensors").write_text(text)
    (folder / "run.json").write_text(json.dumps({"base": "b", "adapter": text}))
    return folder


def whole_run(folder: Path) -> str | None:
    """Which run lies there, None if none is whole."""
    run, adapter = folder / "run.json", folder / "adapter/adapter_model.safetensors"
    if not run.exists() or not adapter.exists():
        return None
    assert json.loads(run.read_text())["adapter"] == adapter.read_text()
    return adapter.read_text()


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_new_run_takes_the_place_when_it_is_complete_and_nothing_else_is_left() -> None:
    run = RunFolder(Path("checkpoints/r"))
    finished(run.place, "old")
    started(run.new)
    run.settle()
    assert whole_run(run.place) == "old"  # the new one is not complete
    assert run.making == run.new
    assert visible(run.place) == ["adapter", "run.json", "settings.json"]
    shutil.rmtree(run.new)
    finished(run.new, "new")
    run.settle()
    assert whole_run(run.place) == "new"
    assert visible(Path("checkpoints")) == ["r"]
    assert visible(run.place) == ["adapter", "run.json", "settings.json"]


def test_killed_at_any_change_of_the_disk_one_of_both_runs_is_whole_and_the_next_command_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every rename and every deletion in turn is the last thing that happens."""
    reached = []
    for last in range(40):
        shutil.rmtree("checkpoints", ignore_errors=True)
        run = RunFolder(Path("checkpoints/r"))
        finished(run.place, "old")
        finished(run.new, "new")
        (run.place / ".run.json.tmp").write_text("")
        calls: list[str] = []

        def counted(name: str, calls: list[str] = calls, last: int = last) -> Any:
            change = getattr(os, name)

            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(name)
                if len(calls) > last:
                    raise KilledError
                return change(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in ("replace", "rename", "unlink", "rmdir"):
                patch.setattr(os, name, counted(name))
            try:
                run.settle()
            except KilledError:
                pass
            else:
                break
        reached.append(calls[-1])
        assert {"old", "new"} & {whole_run(run.place), whole_run(run.new), whole_run(run.old)}
        settle_run(run.place)  # the next command
        assert whole_run(run.place) == "new", last
        assert visible(Path("checkpoints")) == ["r"]
        assert visible(run.place) == ["adapter", "run.json", "settings.json"]
    assert len(reached) > 15
    assert {"unlink", "rmdir"} <= set(reached)
    assert {"replace", "rename"} & set(reached)


def test_the_old_run_comes_back_if_the_new_one_is_gone() -> None:
    run = RunFolder(Path("checkpoints/r"))
    finished(run.old, "old")
    run.settle()
    assert whole_run(run.place) == "old"
    assert visible(Path("checkpoints")) == ["r"]


def test_what_was_cut_off_before_its_first_step_goes() -> None:
    run = RunFolder(Path("checkpoints/r"))
    finished(run.place, "old")
    (run.new / "adapter").mkdir(parents=True)
    (run.place / ".metrics.json.tmp").write_text("{")
    with claim_run("r") as claimed:
        assert claimed == run
        assert not run.new.exists()
        assert whole_run(run.place) == "old"
        assert visible(run.place) == ["adapter", "run.json", "settings.json"]


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", " a", "x" * 201, "가" * 70, "a\nb", ".hidden"])
def test_names_that_no_folder_can_have_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="^--run "), claim_run(name):
        pass
    assert not Path("checkpoints").exists()


def test_a_folder_of_somebody_is_never_deleted() -> None:
    """With notes in it, in place of a run, beside one, or where a run's leftovers would lie."""
    run = RunFolder(Path("checkpoints/r"))
    finished(run.place, "old")
    (run.place / "notes.md").write_text("mine")
    finished(run.new, "new")
    with pytest.raises(InputError, match="checkpoints/r: holds 'notes.md', which is not of a run"):
        settle_run(run.place)
    assert (run.place / "notes.md").read_text() == "mine"
    assert (whole_run(run.place), whole_run(run.new)) == ("old", "new")
    (run.place / "notes.md").unlink()
    settle_run(run.place)
    assert whole_run(run.place) == "new"

    for name, text in (("settings.json", '{"editor": 1}'), ("adapter", "only an adapter")):
        other = Path("checkpoints") / name.split(".")[0]
        other.mkdir()
        (other / name).write_text(text)
        with pytest.raises(InputError, match="is no run of ours, and is not replaced"):
            require_replaceable([other])
        assert (other / name).read_text() == text
    Path("checkpoints/file").write_text("x")
    with pytest.raises(InputError, match="checkpoints/file: is no folder of a run"):
        require_replaceable([Path("checkpoints/file")])


def test_a_damaged_run_can_be_replaced() -> None:
    run = RunFolder(Path("checkpoints/r"))
    finished(run.place, "old")
    (run.place / "run.json").write_text('{"base": ')
    assert require_replaceable([run.place]) == [run.place]
    finished(run.new, "new")
    settle_run(run.place)
    assert whole_run(run.place) == "new"


def test_a_link_is_replaced_and_what_it_names_stays() -> None:
    elsewhere = finished(Path("disk/r"), "old")
    Path("checkpoints").mkdir()
    Path("checkpoints/r").symlink_to(elsewhere.resolve())
    finished(RunFolder(Path("checkpoints/r")).new, "new")
    settle_run(Path("checkpoints/r"))
    assert whole_run(Path("checkpoints/r")) == "new"
    assert whole_run(elsewhere) == "old"
    assert visible(Path("checkpoints")) == ["r"]


@pytest.mark.parametrize("place", [".", "adapter/.."])
def test_a_run_is_settled_from_inside(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(finished(Path("checkpoints/r"), "old").resolve())
    shutil.copytree(run.place, run.old)
    monkeypatch.chdir("checkpoints/r")
    settle_run(Path(place))
    assert visible(run.place.parent) == ["r"]
    assert visible(run.place) == ["adapter", "run.json", "settings.json"]
    monkeypatch.chdir("/")
    settle_run(Path(place))  # the root has no place beside it


def test_two_processes_never_have_one_run_and_a_killed_one_lets_go() -> None:
    code = "import time\nfrom ksat.run_folders import claim_run\nwith claim_run('r'):\n  print('held', flush=True)\n  time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    finished(Path("checkpoints/.r.new"), "new")
    with pytest.raises(LockedError, match="checkpoints/r: another process is at work on this run"), claim_run("r"):
        pass
    settle_run(Path("checkpoints/r"))  # leaves it to the one at work
    assert not Path("checkpoints/r").exists()
    with claim_fresh_run("r") as fresh:
        assert fresh.place == Path("checkpoints/r-2")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claim_run("r") as run:
        assert whole_run(run.place) == "new"
    with claim_fresh_run("r") as fresh:
        assert fresh.place == Path("checkpoints/r-2")


def test_the_next_step_of_a_run_that_is_part_of_something_larger() -> None:
    place = Path("checkpoints/r")
    run = RunFolder(place)
    assert next_step(place, replaced=False) == "--overwrite"  # nothing is there
    started(place)
    assert next_step(place, replaced=False) == "--resume"
    assert next_step(place, replaced=True) == "--overwrite"  # it is of other settings
    started(run.new)
    assert next_step(place, replaced=True) == "--resume"
    (run.new / "settings.json").write_text('{"base": "b", "sha256": "0"}')
    assert next_step(place, replaced=True) == "--overwrite"  # damaged
    require_replaceable([place])
    assert not run.new.exists()
    shutil.rmtree(place)
    finished(place, "old")
    assert next_step(place, replaced=False) is None
    assert next_step(place, replaced=True) == "--overwrite"
    finished(run.new, "new")
    assert next_step(place, replaced=False) is None
    assert whole_run(place) == "new"


def test_a_seal_tells_any_change(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-1"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.pt", "deep/b.pt"):
        (folder / name).write_bytes(bytes(range(200)))
    assert not is_sealed(folder)
    seal(folder)
    assert is_sealed(folder)
    assert damaged_file(folder) is None
    content = (folder / "a.pt").read_bytes()
    for damaged in (content[:-1], content[:50] + b"\0" + content[51:], b""):
        (folder / "a.pt").write_bytes(damaged)
        assert damaged_file(folder) == "a.pt"
    (folder / "a.pt").write_bytes(content)
    assert damaged_file(folder) is None
    (folder / "deep/b.pt").unlink()
    assert damaged_file(folder) == "deep/b.pt"
    (folder / "complete").write_bytes(b"\xff")
    assert damaged_file(folder) == "complete"


def test_a_sealed_json_tells_any_change(tmp_path: Path) -> None:
    path, value = tmp_path / "settings.json", {"lr": 1e-4, "이름": [1, None, 0.1], "nested": {"b": 1, "a": 2}}
    write_sealed(path, value)
    assert read_sealed(path, None, "") == value
    text = path.read_text(encoding="utf-8")
    for damaged in (text.replace("0.0001", "0.0002"), text.replace("이름", "이룸"), text[: len(text) // 2], "{}"):
        assert damaged != text
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(InputError, match=r"settings.json: (edited or damaged|not JSON).*"):
            read_sealed(path, None, "start it anew")


def tree(folder: Path) -> dict[str, str | None]:
    """All that lies in a folder, locks aside, with what the files hold."""
    found = (path for path in folder.rglob("*") if path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in found}


@pytest.mark.parametrize("own", ["thesis.txt", "epoch-2-kept", ".cache.tmp", "trainer.old"])
def test_a_folder_with_anything_of_somebody_else_stays_as_it_is(own: str) -> None:
    """Also where its other names are those of a run that was killed when it was complete."""
    run = RunFolder(Path("checkpoints/r"))
    finished(run.place, "mine")
    (run.place / ".run.json.tmp").write_text("")
    (run.place / own).mkdir()
    (run.place / own / "text").write_text("mine")
    before = tree(Path("checkpoints"))
    with claim_run("r"):
        pass
    settle_run(run.place)
    next_step(run.place, replaced=False)
    with pytest.raises(InputError, match="which is not of a run"):
        require_replaceable([run.place])
    assert tree(Path("checkpoints")) == before


def test_a_run_json_of_another_tool_makes_no_run() -> None:
    place = started(Path("checkpoints/r"))
    (place / "settings.json").unlink()
    (place / "run.json").write_text('{"tool": 1}')
    before = tree(Path("checkpoints"))
    with claim_run("r"):
        pass
    assert tree(Path("checkpoints")) == before
    finished(Path("checkpoints/s"), "old")
    shutil.copytree(place, ".s.new")
    Path(".s.new").rename("checkpoints/.s.new")
    with pytest.raises(InputError, match=r"\.s\.new: is no run of ours"), claim_run("s"):
        pass
    assert whole_run(Path("checkpoints/s")) == "old"


def test_a_link_to_training_files_goes_and_what_it_names_stays() -> None:
    """Who moves them to a larger disk."""
    place = finished(Path("checkpoints/r"), "old")
    shutil.move(place / "trainer", "larger")
    (place / "trainer").symlink_to(Path("larger").resolve())
    settle_run(place)
    assert visible(place) == ["adapter", "run.json", "settings.json"]
    assert tree(Path("larger"))["checkpoint-1/optimizer.pt"] == "old"


def test_two_names_of_a_run_are_one_lock() -> None:
    finished(Path("checkpoints/r"), "old")
    Path("checkpoints/link").symlink_to("r")
    with claim_run("link"), pytest.raises(LockedError), claim_run("r"):
        pass


def test_an_epoch_that_was_written_to_its_end_gets_its_name() -> None:
    """A repeated epoch takes the first one's place: a kill between the two leaves the new one beside."""
    place = started(Path("checkpoints/r"))
    for epoch, name in ((1, ".epoch-1.tmp"), (2, ".epoch-2.tmp")):
        (place / name).mkdir()
        (place / name / "adapter.txt").write_text(f"new {epoch}")
        seal(place / name)
    (place / ".epoch-3.tmp").mkdir()
    with claim_run("r"):
        assert visible(place) == ["epoch-1", "epoch-2", "progress.json", "settings.json", "trainer"]
    assert damaged_file(place / "epoch-2") is None
    assert (place / "epoch-2/adapter.txt").read_text() == "new 2"
    assert not any((place / "epoch-1").iterdir())  # it was there


def test_either_all_runs_can_be_replaced_or_none_is_touched() -> None:
    places = [Path("checkpoints") / name for name in "abc"]
    started(RunFolder(finished(places[0], "old")).new)
    places[2].mkdir()
    (places[2] / "notes.md").write_text("mine")
    with pytest.raises(InputError, match="notes.md"):
        require_replaceable(places)
    assert RunFolder(places[0]).new.exists()
    (places[2] / "notes.md").unlink()
    assert require_replaceable(places) == [places[0]]
    assert not RunFolder(places[0]).new.exists()
