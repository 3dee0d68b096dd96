"""A fitted blend: its file, what it makes of its members' probabilities, and the fall-back where it is unsure."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ksat.blending import blend
from ksat.calibration import tempered
from ksat.errors import InputError
from ksat.predictions import FloatArray

Pool = Literal["linear", "log"]
POOLS = {"linear": "soft", "log": "geometric"}  # the method of ksat.blending.blend
FORMAT = 2
TEMPERATURE_RANGE = (0.001, 100.0)  # of ksat.calibration.fit_temperature
_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class FittedBlend:
    """A blend of M members, in their order: each at its temperature, then pooled, then the pool at its own.

    A mean of calibrated members is less sure than it is right to be, the more the less they have in common (Ranjan and Gneiting
    2010, https://doi.org/10.1111/j.1467-9868.2009.00726.x): the last temperature mends that, and is below 1 mostly.

    Attributes:
        temperatures: (M,) above 0; above 1 the member was too sure.
        weights: (M,) at least 0, summing to 1.
        pool: "linear", the weighted mean, or "log", the weighted geometric mean renormalised.
        temperature: of the pool.
        log_loss: nats a question on the rows that it was fitted to, which flatters it.
    """

    temperatures: tuple[float, ...]
    weights: tuple[float, ...]
    pool: Pool
    temperature: float
    log_loss: float

    def to_dict(self, files: Sequence[str]) -> dict[str, Any]:
        """For JSON, with each member's file name, in order.

        Raises:
            ValueError: not as many names as members.
        """
        rows = zip(files, self.temperatures, self.weights, strict=True)
        members = [{"file": file, "temperature": t, "weight": weight} for file, t, weight in rows]
        about = {"format": FORMAT, "pool": self.pool, "temperature": self.temperature, "log_loss": self.log_loss}
        return {**about, "members": members}


def from_dict(value: dict[str, Any], path: Path | str) -> tuple[FittedBlend, tuple[str, ...]]:
    """The blend and its members' file names that to_dict wrote.

    Args:
        value: from ksat.files.read_json.
        path: where it comes from, for the message.

    Raises:
        InputError: a field is missing, unknown, or not what to_dict writes.
    """
    if type(value.get("format")) is not int or value["format"] != FORMAT:
        raise InputError(
            f"{path}: format {value.get('format')!r:.80}, expected {FORMAT}; fit the blend with this version"
        )
    _require_fields(value, {"format", "pool", "temperature", "log_loss", "members"}, path)
    members = value["members"]
    if not isinstance(members, list) or not members or not all(isinstance(member, dict) for member in members):
        raise InputError(f"{path}: 'members' must be a list of objects, one a file; fit the blend again")
    for member in members:
        _require_fields(member, {"file", "temperature", "weight"}, path)
    numbers = [
        value["log_loss"],
        value["temperature"],
        *(member[name] for member in members for name in ("temperature", "weight")),
    ]
    if bad := [number for number in numbers if not _is_number(number)]:
        raise InputError(f"{path}: {bad[0]!r} where a finite number is expected; fit the blend again")
    temperatures, weights = ([float(member[name]) for member in members] for name in ("temperature", "weight"))
    low, high = TEMPERATURE_RANGE
    rules = [
        (value["log_loss"] >= 0, f"log_loss {value['log_loss']!r}, expected at least 0"),
        (value["pool"] in ("linear", "log"), f"pool {value['pool']!r}, expected linear or log"),
        (all(isinstance(member["file"], str) for member in members), "a member's 'file' is not a text"),
        *(
            (low <= t <= high, f"temperature {t!r}, expected {low:g} to {high:g}")
            for t in (*temperatures, float(value["temperature"]))
        ),
        (min(weights) >= 0, f"weight {min(weights)!r}, expected at least 0"),
        (abs(math.fsum(weights) - 1) <= _SUM_TOLERANCE, f"weights sum to {math.fsum(weights)!r}, expected 1"),
    ]
    if broken := [text for holds, text in rules if not holds]:
        raise InputError(f"{path}: {broken[0]}; the file was edited: fit the blend again")
    pooled, log_loss = float(value["temperature"]), float(value["log_loss"])
    fitted = FittedBlend(tuple(temperatures), tuple(weights), value["pool"], pooled, log_loss)
    return fitted, tuple(member["file"] for member in members)


def _require_fields(value: dict[str, Any], names: set[str], path: Path | str) -> None:
    if wrong := sorted(names ^ set(value)):
        raise InputError(f"{path}: fields missing or unknown: {', '.join(wrong)}; fit the blend again")


def _is_number(value: Any) -> bool:
    # Not math.isfinite, which fails for whole numbers that no float reaches.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def apply_blend(fitted: FittedBlend, tables: Sequence[FloatArray]) -> FloatArray:
    """(N, 5) the blend of (N, 5) tables in the order of its members, NaN where a choice does not exist.

    Raises:
        ValueError: not as many tables as members.
    """
    scaled = [tempered(table, t) for table, t in zip(tables, fitted.temperatures, strict=True)]
    return tempered(blend(scaled, fitted.weights, POOLS[fitted.pool]), fitted.temperature)


def margin_fallback(tables: Sequence[FloatArray], blended: FloatArray, margin: float) -> FloatArray:
    """(N, 5) the blend; where its top two differ by less than `margin`, the row of the member with the widest margin.

    Args:
        tables: (N, 5) of each member, at its temperature, or the one that is too sure always wins; of equals the first.
        blended: (N, 5) rows as in the tables.
        margin: 0 to 1; 0 changes nothing.

    Raises:
        InputError: margin outside 0 to 1.
    """
    if not 0 <= margin <= 1:
        raise InputError(f"margin {margin}: a difference of two probabilities lies in 0 to 1; give one such as 0.05")
    surest = np.argmax(np.stack([_margins(table) for table in tables]), axis=0)
    chosen = np.stack(tables)[surest, np.arange(len(blended))]
    return np.where((_margins(blended) < margin)[:, None], chosen, blended)


def _margins(table: FloatArray) -> FloatArray:
    """(N,) by how much the most probable choice leads the second."""
    ordered = np.sort(np.where(np.isnan(table), -1.0, table), axis=1)
    return np.asarray(ordered[:, -1] - ordered[:, -2])
