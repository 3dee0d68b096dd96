"""Whose probabilities a file holds, by the report beside it: which model of which run, and whether its rows were held out."""

import functools
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from ksat.errors import InputError, show
from ksat.files import file_sha256, read_json
from ksat.run_folders import CHECKPOINTS
from ksat.sealed import TEXT, or_none

# No flag of inference.py changes these for a run, and they make an untuned base the member that it is.
_SAME = ("score_by", "template", "shots")
# A refit may have others; but a file belongs to the member with which it shares most.
_ALIKE = ("context_when", "choice_orders", "debias", "max_tokens", "quantization")
# Settings of train.py that go into the reports.
_TRAINING = (
    "seed", "rank", "alpha", "lr", "epochs", "loss", "choice_orders", "questions_per_step", "leave_out_sha256", "valid_sha256",
)  # fmt: skip


def training_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a report keeps of a run's settings; nothing of a soup, whose rank is that of all its members together."""
    return {} if "soup" in settings else {name: settings[name] for name in _TRAINING if name in settings}


@dataclass(frozen=True, slots=True)
class Provenance:
    """What scored a file.

    Attributes:
        base: name; None where no report tells.
        runs: names of the runs; none of an untuned base.
        adapters: hashes of the adapters: of an out-of-fold file its folds', of a soup its members' too.
        traits: how it was asked and trained, by name, as far as the report tells.
    """

    base: str | None
    runs: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    traits: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "base": self.base,
            "runs": list(self.runs),
            "adapters": list(self.adapters),
            "traits": self.traits,
        }

    def conflict(self, other: "Provenance") -> str | None:
        """What makes them two models for certain: the name of a trait, or "base"; None where nothing does."""
        if self.base is None or other.base is None:
            return None
        if self.base != other.base or bool(self.adapters) != bool(other.adapters):
            return "base"
        return next((name for name in _SAME if name in self._differing(other)), None)

    def agrees_with(self, other: "Provenance") -> bool | None:
        """Whether both are of one model: None where it is not known, as of a run and its refit on all rows."""
        if self.base is None or other.base is None:
            return None
        if self.conflict(other):
            return False
        if not self.adapters:
            return True if self.shared(other) and not self._differing(other) else None
        return True if {*self.runs} & {*other.runs} or {*self.adapters} & {*other.adapters} else None

    def shared(self, other: "Provenance") -> set[str]:
        """Names of the traits that both reports tell."""
        return self.traits.keys() & other.traits.keys()

    def _differing(self, other: "Provenance") -> set[str]:
        return {name for name in self.shared(other) if self.traits[name] != other.traits[name]}

    def is_rather(self, other: "Provenance", member: "Provenance") -> bool:
        """Whether this is of the other member rather than of `member`: no evidence speaks against that, and some for it."""
        if self.base is None or other.base is None or other.conflict(self):
            return False
        if member.conflict(self):
            return True
        are_one, is_own = (each.agrees_with(self) is True for each in (other, member))
        if are_one != is_own:
            return are_one
        traits = self.shared(other) & self.shared(member)
        theirs, own = (len(self._differing(each) & traits) for each in (other, member))
        if theirs != own:
            return theirs < own and not self._is_named_rather(member, other)
        return self._is_named_rather(other, member)

    def _is_named_rather(self, other: "Provenance", member: "Provenance") -> bool:
        """Whether the run's name begins as those of the other do, and for longer: a-all as a-cv, not as b-cv."""
        (theirs, is_whole), (own, is_own_whole) = (
            max((_common_parts(run, name) for run in self.runs for name in each.runs), default=(0, False))
            for each in (other, member)
        )
        return theirs > own and (is_whole or not is_own_whole)


def _common_parts(run: str, name: str) -> tuple[int, bool]:
    """With how many parts in common two names of runs begin, and whether those are all of the second."""
    parts, own = (re.split("[-_.]", each) for each in (run, name))
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts, own, strict=False)))
    return common, common == len(own)


def provenance_from_dict(value: Any, path: Path | str) -> Provenance:
    """What to_dict wrote.

    Raises:
        InputError: it did not.
    """
    holds, _ = or_none(TEXT)
    if isinstance(value, dict):
        value = {"traits": {}, **value}  # earlier versions kept none
    if not (
        isinstance(value, dict)
        and set(value) == {"base", "runs", "adapters", "traits"}
        and isinstance(value["traits"], dict)
        and holds(value["base"])
        and all(isinstance(value[name], list) and all(map(TEXT[0], value[name])) for name in ("runs", "adapters"))
    ):
        raise InputError(f"{path}: 'members' do not say what they are of; fit the blend again")
    return Provenance(value["base"], tuple(value["runs"]), tuple(value["adapters"]), value["traits"])


def read_provenance(file: Path) -> Provenance:
    """Of a probability file, by NAME.probs.json beside NAME.probs.csv."""
    about = _report(file)
    base = about.get("base")
    if not isinstance(base, str):
        return Provenance(None)
    members = about.get("members")  # of an out-of-fold file
    told = [member for member in members if isinstance(member, dict)] if isinstance(members, list) else []
    runs = [about.get("run"), *(member.get("run") for member in told)]
    adapters = [about.get("adapter_sha256"), *(member.get("adapter_sha256") for member in told)]
    if isinstance(souped := about.get("soup_of"), list):
        adapters += souped
    named, hashes = (tuple(text for text in texts if isinstance(text, str)) for texts in (runs, adapters))
    return Provenance(base, named, hashes, _traits(about))


def _traits(about: Mapping[str, Any]) -> dict[str, Any]:
    training = about.get("training")
    found = {f"{name} of training": value for name, value in training.items()} if isinstance(training, dict) else {}
    if (trained_on := _hashes(about)) is not None:
        found["training data"] = sorted(trained_on)
    return found | {name: about[name] for name in (*_SAME, *_ALIKE) if name in about}


def _hashes(about: Mapping[str, Any]) -> dict[str, str] | None:
    """The files that a run was trained on by their hashes; None where the report does not tell."""
    data = about.get("data")
    if not isinstance(data, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and isinstance(entry.get("file"), str)
        for entry in data
    ):
        return None
    return {entry["sha256"]: entry["file"] for entry in data}


def _report(file: Path) -> dict[str, Any]:
    report = file.with_suffix(".json")
    return read_json(report) if report.exists() else {}


def require_distinct(files: Sequence[Path]) -> None:
    """Raises InputError if two members of a blend are one file, by its bytes."""
    by_bytes: dict[str, Path] = {}
    for file in files:
        first = by_bytes.setdefault(file_sha256(file), file)
        if first is not file:
            raise InputError(f"{file} is {first} again: a member counts once; leave one out")


def require_held_out(files: Sequence[Path]) -> None:
    """Sees to it by the reports that no file was scored by a run that was trained on its rows; warns where they do not tell.

    Of a blend its members are asked.

    Raises:
        InputError: one was.
    """
    for file in files:
        for scored in _scored(file):
            if warning := _in_sample(scored):
                print(
                    f"warning: {scored}{warning}; a file of rows that were trained on looks better than it is",
                    file=sys.stderr,
                )


def _scored(file: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """The files that a blend was made of, if they are still what they were; else the file itself."""
    members = _report(file).get("members")
    if not isinstance(members, list) or not members:
        return [file]
    found: list[Path] = []
    for member in members:
        path = _unchanged(member.get("file"), member.get("sha256")) if isinstance(member, dict) else None
        if path is None or path in (file, *above):
            return [file]
        found += _scored(path, (file, *above))
    return found


def _unchanged(file: Any, sha256: Any) -> Path | None:
    """The file that a report names, if it is there and still the same."""
    there = isinstance(file, str) and os.path.isfile(file) and file_sha256(Path(file)) == sha256
    return Path(file) if there else None


def _in_sample(file: Path) -> str:
    """What to warn of, "" if the rows were held out.

    Raises:
        InputError: they were not.
    """
    about, is_of_run = _report(file), file.name == "validation.probs.csv" and file.with_name("run.json").exists()
    if is_of_run or about.get("out_of_fold") is True or ("base" in about and about.get("adapter_sha256", "") is None):
        return ""  # an untuned base was trained on none of our rows
    data, test, test_sha256 = _hashes(about), about.get("test"), about.get("test_sha256")
    if data is None or not isinstance(test_sha256, str) or "base" not in about:
        return " has no report that says whether its rows were held out"
    remedy = "so that it looks better than it is; take out-of-fold rows: train.py --folds F --all writes them"
    if test_sha256 in data:
        raise InputError(f"{file} was scored by a run that was trained on {test}, {remedy}")
    if test_sha256 in _kept_out(about):
        return ""
    named = {str(test): _unchanged(test, test_sha256)} | {
        name: _unchanged(name, sha256) for sha256, name in data.items()
    }
    if gone := [name for name, path in named.items() if path is None]:
        return f": {gone[0]} is gone or was changed, so that nothing tells whether the rows were held out"
    num_rows, near, same = _trained_on((str(test), test_sha256), tuple(data.items()), frozenset(_held_out(about)))
    where = ", ".join(data.values())
    if 2 * len(same) > num_rows:
        raise InputError(
            f"{file} was scored by a run that was trained on most of its rows: {len(same)} of {num_rows} questions stand in {where} too (first: "
            f"id {same[0]!r}), {remedy}"
        )
    if not near:
        return ""
    return (
        f": {len(near)} of its {num_rows} rows (first: id {near[0]!r}) have their passage or a near-duplicate in {where}, that its run "
        f"was trained on, {len(same)} with the same question"
    )


@functools.lru_cache(maxsize=8)
def _trained_on(
    test: tuple[str, str], data: tuple[tuple[str, str], ...], held_out: frozenset[str]
) -> tuple[int, list[str], list[str]]:
    """How many rows a file has, and the ids of those whose passage, or question, was trained on; seconds, and the same for runs that
    were trained alike.

    Args:
        test: the file that was scored, and its hash.
        data: hashes and files that were trained on.
        held_out: ids of their rows that were not.
    """
    from ksat.near_duplicates import near_rows, same_questions
    from ksat.questions import read_questions

    rows = read_questions(test[0])
    trained = [row for _, name in data for row in read_questions(name) if row.id not in held_out]
    near = [rows[i].id for i in near_rows(rows, trained)]
    same = {row_id for row_id, _ in same_questions(rows, trained)} if near else set()
    return len(rows), near, [row.id for row in rows if row.id in same]


def _kept_out(about: Mapping[str, Any]) -> list[Any]:
    """Hashes of the files whose rows training left out, by --leave-out and --valid."""
    training = about.get("training")
    if not isinstance(training, dict):
        return []
    valid = training.get("valid_sha256")
    return [training.get("leave_out_sha256"), *(valid if isinstance(valid, list) else [])]


def _held_out(about: Mapping[str, Any]) -> set[str]:
    """Ids of the training files' rows that a run held out to validate on, if it is still there."""
    from ksat.predictions import read_probs

    folder = CHECKPOINTS / str(about.get("run"))
    own = folder / "run.json"
    if not os.path.isfile(own) or read_json(own).get("adapter_sha256") != about.get("adapter_sha256"):
        return set()
    validation = folder / "validation.probs.csv"
    return set(read_probs(validation).ids) if validation.exists() else set()


def require_order(fitted: Sequence[Provenance], fitted_files: Sequence[str], given_files: Sequence[Path]) -> None:
    """Sees to it that every file stands in the place of the member that is of its model, as far as the reports tell.

    Args:
        fitted: the members that a blend was fitted to.
        fitted_files: their files, for the message.
        given_files: as many files, to be blended.

    Raises:
        InputError: a file is of another model than the member in its place, or is more like a member in another place, or two
            files are of one model where the members are not.
    """
    given = [read_provenance(file) for file in given_files]
    in_order = f"give the files in the order of --fit: {', '.join(fitted_files)}"
    for place, (file, its) in enumerate(zip(given_files, given, strict=True)):
        member = fitted[place]
        where = f"--apply: {file} ({_name(its)}) stands in the place of {fitted_files[place]} ({_name(member)})"
        better = [i for i, other in enumerate(fitted) if its.is_rather(other, member)]
        if better:
            raise InputError(f"{where}; it goes with {fitted_files[better[0]]}: {in_order}")
        if (name := member.conflict(its)) == "base":
            raise InputError(f"{where}: {in_order}")
        if name:
            raise InputError(
                f"{where}, whose {name} is {show(member.traits[name], 60)}, not {show(its.traits[name], 60)}: {in_order}"
            )
        for i in range(place):
            are_two = None not in (member.base, fitted[i].base) and not member.agrees_with(fitted[i])
            if are_two and its.adapters and its.adapters == given[i].adapters:
                raise InputError(f"{where}, but {given_files[i]} is of the same adapter: {in_order}")
    if trusted := [str(given_files[place]) for place in range(len(given)) if not _is_settled(place, fitted, given)]:
        print(
            f"note: {', '.join(trusted)}: no report tells for certain which of --fit's members this is; the order is taken on trust",
            file=sys.stderr,
        )


def _is_settled(place: int, fitted: Sequence[Provenance], given: Sequence[Provenance]) -> bool:
    """Whether the reports tell that the file in a place is of the member there, and of no other one that waits for its file."""
    its, member = given[place], fitted[place]
    if member.agrees_with(its):
        return True
    waiting = [other for i, other in enumerate(fitted) if i != place and other.agrees_with(given[i]) is not True]
    return bool(member.shared(its)) and all(
        other.base is None or other.conflict(its) is not None or its.is_rather(member, other) for other in waiting
    )


def _name(its: Provenance) -> str:
    if its.base is None:
        return "of an unknown base"
    return f"{its.base}, {its.runs[0] if its.runs else 'fine-tuned' if its.adapters else 'untuned'}"
