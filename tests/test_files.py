"""Sets of outputs: all or none, whoever is killed where; locked while in use; never in an input's place."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ksat.errors import InputError
from ksat.files import claim_outputs, lock, named_twice, remove_leftovers, require_name, text_writer

NAMES = ("x.a", "x.b", "x.json")


class KilledError(BaseException):
    """Stands for kill -9 in process: nothing catches it."""


def write_set(folder: Path, text: str, *, overwrite: bool = False, command: str = "one") -> None:
    with claim_outputs([folder / n for n in NAMES], inputs=[], overwrite=overwrite, command=command) as outputs:
        outputs.write([text_writer(f"{text} {name}") for name in NAMES])


def read_set(folder: Path) -> list[str | None]:
    return [(folder / name).read_text() if (folder / name).exists() else None for name in NAMES]


def whole(text: str) -> list[str | None]:
    return [f"{text} {name}" for name in NAMES]


def write_killed_at(
    step: int,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[], None],
    names: tuple[str, ...] = ("replace", "unlink"),
) -> bool:
    """Runs `write` and ends it before its step-th rename or removal; whether it came that far."""
    calls = []

    def counted(name: str) -> Callable[..., object]:
        real = getattr(Path, name)

        def call(self: Path, *args: object, **kwargs: object) -> object:
            calls.append(name)
            if len(calls) > step:  # nor does the cleaning up of `finally` run in a process that was killed
                raise KilledError
            return real(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(Path, name, counted(name))
        try:
            write()
        except KilledError:
            return True
    return False


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_set_is_finished_by_the_same_command_wherever_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    for step in range(100):
        folder = tmp_path / str(step)
        if overwrite:
            write_set(folder, "old", command="another")
        if not write_killed_at(step, monkeypatch, lambda folder=folder: write_set(folder, "new", overwrite=overwrite)):  # type: ignore[misc]
            break
        is_done = read_set(folder) == whole("new") and not (folder / ".x.json.writing").exists()
        if is_done and not overwrite:  # killed behind its work: nothing is left to be finished
            with pytest.raises(InputError, match="exist already"):
                write_set(folder, "new")
        else:
            write_set(folder, "new", overwrite=overwrite)
        assert read_set(folder) == whole("new")
        assert {path.name for path in folder.iterdir()} == set(NAMES)
    assert step > 6  # three files beside, a note, three names


def test_the_mark_never_stands_beside_files_that_are_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(100):
        folder = tmp_path / str(step)
        write_set(folder, "old")
        went_on = write_killed_at(step, monkeypatch, lambda folder=folder: write_set(folder, "new", overwrite=True))  # type: ignore[misc]
        found = read_set(folder)
        assert found in (whole("old"), whole("new")) or found[-1] is None
        if not went_on:
            break


def test_another_command_finds_a_whole_set_or_its_own_and_replaces_neither_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = set()
    for step in range(100):
        folder = tmp_path / str(step)
        if not write_killed_at(step, monkeypatch, lambda folder=folder: write_set(folder, "first")):  # type: ignore[misc]
            break
        try:
            write_set(folder, "second", command="two")
        except InputError:
            assert read_set(folder) == whole("first")  # what was killed between two renames got its names
            outcomes.add("first")
        else:
            assert read_set(folder) == whole("second")
            outcomes.add("second")
    assert outcomes == {"first", "second"}


def test_what_is_there_is_replaced_only_if_asked_and_only_if_it_is_ours(tmp_path: Path) -> None:
    write_set(tmp_path, "old")
    with pytest.raises(InputError, match=r"x.json exist already; choose another --out, or replace with --overwrite"):
        write_set(tmp_path, "new")
    write_set(tmp_path, "new", overwrite=True)
    assert read_set(tmp_path) == whole("new")
    (tmp_path / "x.json").unlink()  # without its mark it is anybody's
    with pytest.raises(InputError, match="without x.json it is no output of ours"):
        write_set(tmp_path, "newer", overwrite=True)
    assert read_set(tmp_path)[:2] == whole("new")[:2]


@pytest.mark.parametrize("how", ["same", "dots", "symlink", "hardlink", "folder link"])
def test_an_output_is_never_an_input(tmp_path: Path, how: str) -> None:
    (tmp_path / "sub").mkdir()
    source, output = tmp_path / "data.csv", tmp_path / "data.csv"
    source.write_text("precious")
    if how == "dots":
        output = tmp_path / "sub" / ".." / "data.csv"
    elif how == "symlink":
        output = tmp_path / "link.csv"
        output.symlink_to(source)
    elif how == "hardlink":
        output = tmp_path / "hard.csv"
        output.hardlink_to(source)
    elif how == "folder link":
        (tmp_path / "here").symlink_to(tmp_path)
        output = tmp_path / "here" / "data.csv"
    with (
        pytest.raises(InputError, match="--out: .* is the input .*data.csv itself; choose another --out"),
        claim_outputs([output], inputs=[None, source], overwrite=True, command="c"),
    ):
        pass
    assert source.read_text() == "precious"


def test_a_folder_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "x.b").mkdir()
    with pytest.raises(InputError, match=r"x.b is a folder, where a file is to be written"):
        write_set(tmp_path, "new", overwrite=True)


def hold(path: Path, ready: "multiprocessing.synchronize.Event") -> None:
    with lock(path, "output"):
        ready.set()
        signal.pause()


def count_alone(path: Path, times: int) -> None:
    for _ in range(times):
        with lock(path, "count", wait=60.0):
            number = int(path.read_text())
            path.write_text("")  # who comes in here finds no number
            path.write_text(str(number + 1))


def test_many_processes_are_never_in_at_once_though_the_lock_goes_each_time(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_alone, args=(tmp_path / "x", 100)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "x").read_text() == "400"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_lock_keeps_others_out_and_ends_with_a_killed_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "x", ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="another process is at work on this output; wait for it, or choose another"):
        write_locked(tmp_path / "x")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    write_locked(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []  # nor does the lock of the process that was killed stay


def write_locked(path: Path) -> None:
    with lock(path, "output"):
        pass


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("", "expected a name"),
        ("  ", "expected a name"),
        (" a", "expected a name"),
        ("a/b", "without slashes"),
        (".", "without a dot"),
        ("..", "without a dot"),
        (".hidden", "without a dot"),
        ("a\nb", "does not print"),
        ("a\0b", "does not print"),
        ("\ud800", "does not print"),
        ("가" * 67, "201 bytes long, expected at most 200"),
    ],
)
def test_names_that_are_none(name: str, match: str) -> None:
    with pytest.raises(InputError, match=f"--run .*{match}"):
        require_name("--run", name)
    assert require_name("--run", "가" * 66) == "가" * 66


def test_leftovers_go_and_nothing_else_does(tmp_path: Path) -> None:
    for name in (".a.json.tmp", "sub/.b.csv.tmp", "a.tmp", ".a.json", "tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"sub", "a.tmp", ".a.json", "tmp"}


def test_ctrl_c_between_two_renames_is_finished_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written stays beside, unlike after Ctrl-C while it is written."""
    replace = Path.replace
    for last in range(3):
        folder = tmp_path / str(last)
        write_set(folder, "old", command="another")
        calls: list[Path] = []

        def interrupted(self: Path, target: Path, last: int = last, calls: list[Path] = calls) -> Path:
            if self.name.startswith(".x.") and not self.name.endswith(".writing.tmp"):
                calls.append(self)
            if len(calls) > last:
                raise KeyboardInterrupt
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write_set(folder, "new", overwrite=True)
        with pytest.raises(InputError, match="exist already"):
            write_set(folder, "third", command="a third")
        assert read_set(folder) == whole("new")


def test_what_can_t_get_its_name_waits_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, "old")

    def refused(self: Path, target: Path) -> Path:
        if target.name == "x.b":
            raise PermissionError(1, "Operation not permitted")
        return replace(self, target)

    replace = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refused)
        with pytest.raises(InputError, match=r"x.json: what is written beside .* run the same command again"):
            write_set(tmp_path, "new", overwrite=True)
    write_set(tmp_path, "new", overwrite=True)
    assert read_set(tmp_path) == whole("new")


def test_a_set_that_can_t_be_written_names_the_file_that_can_t(tmp_path: Path) -> None:
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    write_set(tmp_path, "old")
    for i, name in enumerate(NAMES):
        writers = [text_writer("new")] * i + [full] + [text_writer("new")] * (2 - i)
        claim = claim_outputs([tmp_path / n for n in NAMES], inputs=[], overwrite=True, command="one")
        with claim as outputs, pytest.raises(InputError, match=rf"{name}: can't be written \(No space"):
            outputs.write(writers)
        assert read_set(tmp_path) == whole("old")
        assert {path.name for path in tmp_path.iterdir()} == set(NAMES)


def test_one_file_alone_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.csv"

    def write(text: str) -> None:
        with claim_outputs([path], inputs=[], overwrite=True, command=text) as outputs:
            outputs.write([text_writer(text)])

    write("old")
    step = 0
    while write_killed_at(step, monkeypatch, lambda: write("new")):
        assert path.read_text() in ("old", "new")
        step += 1
    assert step > 3
    assert path.read_text() == "new"


def test_links_in_a_circle_are_one_line(tmp_path: Path) -> None:
    circle = tmp_path / "circle.csv"
    circle.symlink_to(circle)
    for output, given in ((circle, tmp_path / "a.csv"), (tmp_path / "b.csv", circle)):
        with claim_outputs([output], inputs=[given], overwrite=False, command="one"):
            pass
    with (
        pytest.raises(InputError, match="is the input"),
        claim_outputs([circle], inputs=[circle], overwrite=True, command="one"),
    ):
        pass


def test_a_place_that_can_t_be_looked_at_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As somebody who is not root."""

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refused)
    with pytest.raises(InputError, match="can't be locked"), lock(tmp_path / "x", "output"):
        pass
    (tmp_path / "a").touch()
    (tmp_path / "b").touch()
    monkeypatch.setattr(Path, "samefile", refused)
    with (
        pytest.raises(InputError, match="--out: .*b can't be written"),
        claim_outputs([tmp_path / "b"], inputs=[tmp_path / "a"], overwrite=True, command="one"),
    ):
        pass


def test_a_file_is_known_again_under_another_name(tmp_path: Path) -> None:
    file, other, link, circle = (tmp_path / name for name in ("a.csv", "b.csv", "link.csv", "circle.csv"))
    link.symlink_to(file)
    circle.symlink_to(circle)
    assert named_twice([file, other, circle]) is None
    assert named_twice([file, other, link]) == (link, file)
    assert named_twice([circle, circle]) == (circle, circle)
