"""Whose probabilities a file holds, by the report beside it: what a fitted blend must know of its members."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksat.errors import InputError
from ksat.files import named_twice, read_json
from ksat.sealed import TEXT, or_none


@dataclass(frozen=True, slots=True)
class Provenance:
    """What scored a file.

    Attributes:
        base: name; None where no report tells.
        runs: names of the runs; none of an untuned base.
        adapters: hashes of the adapters: of an out-of-fold file its folds', of a soup its members' too.
    """

    base: str | None
    runs: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"base": self.base, "runs": list(self.runs), "adapters": list(self.adapters)}

    def agrees_with(self, other: "Provenance") -> bool | None:
        """Whether both are of one model, as far as it is known: None where it is not."""
        if self.base is None or other.base is None:
            return None
        if self.base != other.base or bool(self.adapters) != bool(other.adapters):
            return False
        if not self.adapters or {*self.runs} & {*other.runs} or {*self.adapters} & {*other.adapters}:
            return True
        return None  # another run on the same base: perhaps this one, trained on all rows


def provenance_from_dict(value: Any, path: Path | str) -> Provenance:
    """What to_dict wrote.

    Raises:
        InputError: it did not.
    """
    holds, _ = or_none(TEXT)
    if not (
        isinstance(value, dict)
        and set(value) == {"base", "runs", "adapters"}
        and holds(value["base"])
        and all(isinstance(value[name], list) and all(map(TEXT[0], value[name])) for name in ("runs", "adapters"))
    ):
        raise InputError(f"{path}: 'members' do not say what they are of; fit the blend again")
    return Provenance(value["base"], tuple(value["runs"]), tuple(value["adapters"]))


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
    return Provenance(base, *(tuple(text for text in texts if isinstance(text, str)) for texts in (runs, adapters)))


def _report(file: Path) -> dict[str, Any]:
    report = file.with_suffix(".json")
    return read_json(report) if report.exists() else {}


def require_out_of_fold(files: Sequence[Path]) -> None:
    """Sees to it by the reports beside them that no member was trained on the rows that it scored; warns of those that tell nothing.

    Raises:
        InputError: one was, or a file is named twice.
    """
    if twice := named_twice(files):
        raise InputError(f"--fit: {twice[0]} is {twice[1]} again: a member counts once; leave one out")
    for file in files:
        about = _report(file)
        if about.get("out_of_fold") is True or (about.get("adapter_sha256", "") is None and "base" in about):
            continue  # an untuned base was trained on none of our rows
        trained_on = about.get("data")
        if not isinstance(trained_on, list):
            print(
                f"warning: {file} has no report that says whether its rows were held out: a blend fitted to rows that a member was trained "
                "on trusts it too much",
                file=sys.stderr,
            )
        elif about.get("test_sha256") in [entry.get("sha256") for entry in trained_on if isinstance(entry, dict)]:
            raise InputError(
                f"--fit: {file} was scored by a run that was trained on {about.get('test')}, so that it looks better than it is; take "
                "out-of-fold rows: train.py --folds F --all writes them"
            )


def require_order(fitted: Sequence[Provenance], fitted_files: Sequence[str], given_files: Sequence[Path]) -> None:
    """Sees to it that every file stands in the place of the member that is of its model, as far as the reports tell.

    Args:
        fitted: the members that a blend was fitted to.
        fitted_files: their files, for the message.
        given_files: as many files, to be blended.

    Raises:
        InputError: a file is of another base than the member in its place, or of the run of a member in another place.
    """
    given = [read_provenance(file) for file in given_files]
    for place, (file, its) in enumerate(zip(given_files, given, strict=True)):
        fits = [member.agrees_with(its) for member in fitted]
        if fits[place] is False or (fits[place] is None and True in fits):
            belongs = f"; it goes with {fitted_files[fits.index(True)]}" if True in fits else ""
            raise InputError(
                f"--apply: {file} ({_name(its)}) stands in the place of {fitted_files[place]} ({_name(fitted[place])}){belongs}: give the "
                f"files in the order of --fit: {', '.join(fitted_files)}"
            )
    unknown = [str(file) for file, its in zip(given_files, given, strict=True) if its.base is None]
    if unknown:
        print(
            f"note: {', '.join(unknown)}: no report tells what scored it; its place among --fit's files is taken on trust",
            file=sys.stderr,
        )


def _name(its: Provenance) -> str:
    if its.base is None:
        return "of an unknown base"
    return f"{its.base}, {its.runs[0] if its.runs else 'fine-tuned' if its.adapters else 'untuned'}"
