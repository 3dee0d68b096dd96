"""The journal of an interrupted inference: it goes on with the same settings, and takes nothing else for scores."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ksat import journal as journal_module
from ksat.errors import InputError
from ksat.journal import Journal

SETTINGS: dict[str, Any] = {"base": "b", "scale": 1.0, "template": {"user": "{question}"}, "tuple": (1, 2)}
SCORES = {f"q{i}": [i / 7, -1e-300, 3.0] for i in range(9)}


def write_journal(path: Path, *, part: int = 0) -> Journal:
    journal = Journal(path, SETTINGS, pack_tokens=300, part=part)
    for key, scores in SCORES.items():
        journal.add({key: scores})
    return journal


def test_the_same_settings_go_on_with_the_same_numbers_and_budget(tmp_path: Path) -> None:
    write_journal(tmp_path / "j")
    journal = Journal(tmp_path / "j", SETTINGS, pack_tokens=999)
    assert journal.scores == SCORES
    assert journal.pack_tokens == 300
    journal.add({"new": [0.5]})
    assert Journal(tmp_path / "j", SETTINGS, pack_tokens=1, part=3).scores == {**SCORES, "new": [0.5]}
    Journal.remove(tmp_path / "j")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["base", "scale", "template", "tuple", "another_one"])
def test_other_settings_neither_go_on_nor_drop_what_was_scored(tmp_path: Path, name: str) -> None:
    journal = write_journal(tmp_path / "j")
    before = journal.path.read_bytes()
    other = {**SETTINGS, name: "x"}
    with pytest.raises(InputError) as error:
        Journal(tmp_path / "j", other, pack_tokens=300)
    assert str(error.value) == (
        f"{journal.path}: an inference with other settings ({name.replace('_', ' ')}) was interrupted there; finish it with its own "
        "flags, choose another --out, or drop its scores with --overwrite"
    )
    assert journal.path.read_bytes() == before
    assert Journal(tmp_path / "j", other, pack_tokens=7, overwrite=True).scores == {}
    assert Journal(tmp_path / "j", other, pack_tokens=8).pack_tokens == 7


def test_an_empty_journal_of_other_settings_is_in_nobodys_way(tmp_path: Path) -> None:
    Journal(tmp_path / "j", SETTINGS, pack_tokens=300)
    assert Journal(tmp_path / "j", {**SETTINGS, "scale": 2.0}, pack_tokens=300).scores == {}


def test_a_line_that_a_kill_cut_is_scored_again_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_journal(tmp_path / "j").path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for end in (1, 2, last - 1, last, last + 1):
        (tmp_path / "j.0").write_bytes(whole[:-end])
        found = Journal(tmp_path / "j", SETTINGS, pack_tokens=1).scores
        assert found == dict(list(SCORES.items())[: 8 if end <= last else 7])
    (tmp_path / "j.0").write_bytes(whole[:10])
    assert Journal(tmp_path / "j", SETTINGS, pack_tokens=1).scores == {}
    assert capsys.readouterr().err == ""


def test_whatever_is_garbled_no_other_score_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes changed, taken out, put in, lines swapped or put together: each score that is read is one that was written."""
    whole = write_journal(tmp_path / "j").path.read_bytes()
    generator = random.Random(0)
    num_lost = 0
    for _ in range(120):
        garbled = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            at = generator.randrange(len(garbled))
            how = generator.randrange(4)
            if how == 0:
                garbled[at] = generator.choice(b'0123456789.-, \n[]{}"q\xff\x00')
            elif how == 1:
                del garbled[at : at + generator.randint(1, 40)]
            elif how == 2:
                garbled[at:at] = garbled[: generator.randint(1, 60)]
            else:
                garbled[at:at] = b"\n"
        (tmp_path / "j.0").write_bytes(garbled)
        found = Journal(tmp_path / "j", SETTINGS, pack_tokens=300)
        assert found.scores.items() <= SCORES.items()
        assert found.pack_tokens == 300
        num_lost += len(found.scores) < len(SCORES)
        Journal.remove(tmp_path / "j")
    assert num_lost > 60
    told = capsys.readouterr().err
    assert "lines are garbled; their questions are scored again" in told
    assert "j.0 is garbled: it is set aside as j.0.garbled, and its questions are scored again" in told


def test_a_garbled_first_line_sets_the_file_aside(tmp_path: Path) -> None:
    journal = write_journal(tmp_path / "j")
    garbled = b"x" + journal.path.read_bytes()
    journal.path.write_bytes(garbled)
    assert Journal(tmp_path / "j", SETTINGS, pack_tokens=300).scores == {}
    assert (tmp_path / "j.0.garbled").read_bytes() == garbled
    Journal.remove(tmp_path / "j")
    assert list(tmp_path.iterdir()) == []


def test_lines_of_another_journal_are_not_taken(tmp_path: Path) -> None:
    """The hash of a line holds the settings: a line that was copied from an inference with another base counts nothing."""
    write_journal(tmp_path / "j")
    other = Journal(tmp_path / "other", {**SETTINGS, "base": "c"}, pack_tokens=300)
    other.add({"q0": [9.0, 9.0, 9.0]})
    with (tmp_path / "j.0").open("a") as file:
        file.write(other.path.read_text().splitlines(keepends=True)[1])
    assert Journal(tmp_path / "j", SETTINGS, pack_tokens=300).scores == SCORES


def test_every_line_says_what_it_is(tmp_path: Path) -> None:
    first, *lines = write_journal(tmp_path / "j").path.read_text().splitlines()
    assert json.loads(first[17:]) == {"settings": {**SETTINGS, "tuple": [1, 2]}, "pack_tokens": 300}
    assert [json.loads(line[17:]) for line in lines] == [{key: scores} for key, scores in SCORES.items()]


def test_the_order_of_settings_says_nothing(tmp_path: Path) -> None:
    write_journal(tmp_path / "j")
    turned = dict(reversed(SETTINGS.items()))
    assert Journal(tmp_path / "j", turned, pack_tokens=300).scores == SCORES


def test_a_garbled_part_is_set_aside_by_its_own_process_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else another one would take a part away that its own process has begun anew."""
    path = tmp_path / ".x.probs.csv.partial"

    def parts() -> list[str]:
        return sorted(each.name.removeprefix(path.name) for each in tmp_path.iterdir())

    for part in range(4):
        write_journal(path, part=part).path.write_text("garbled\n")
    Journal(path, SETTINGS, pack_tokens=300, part=1, num_parts=3)
    assert parts() == [".0", ".1", ".1.garbled", ".2", ".3"]
    Journal(path, SETTINGS, pack_tokens=300, part=0, num_parts=3)  # also of those that have no process any more
    assert parts() == [".0", ".0.garbled", ".1", ".1.garbled", ".2", ".3.garbled"]
    Journal(path, SETTINGS, pack_tokens=300)
    assert ".2.garbled" in parts()
    write_journal(path, part=1).path.write_text("garbled\n")
    Journal(path, SETTINGS, pack_tokens=300)
    assert ".1" not in parts()
    monkeypatch.setattr(journal_module, "_parts", lambda _: [path.with_name(f"{path.name}.{n}") for n in (0, 7)])
    assert Journal(path, SETTINGS, pack_tokens=300).scores == {}


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = write_journal(tmp_path / "j")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError) as error:
        journal.add({"a": [1.0]})
    assert str(error.value) == (
        f"{journal.path}: can't be written (No space left on device); free space and run the same command again"
    )
