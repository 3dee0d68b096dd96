"""JSON files that guard their content: each holds the digest of its own fields, and every field has a rule."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ksat.errors import InputError
from ksat.files import read_json, write_json

Rule = tuple[Callable[[Any], bool], str]  # whether a value is one, and what is expected


def whole(low: int, high: float = math.inf) -> Rule:
    """A whole number within bounds, both included."""
    expected = f"a whole number from {low}" + (f" to {high}" if high < math.inf else "")
    return lambda value: type(value) is int and low <= value <= high, expected


def number(holds: Callable[[float], bool], expected: str) -> Rule:
    """A number for which `holds` is true."""
    return lambda value: type(value) in (int, float) and holds(value), expected


def one_of(*values: str) -> Rule:
    """One of these texts."""
    return lambda value: isinstance(value, str) and value in values, " or ".join(values)


def or_none(rule: Rule) -> Rule:
    """What the rule takes, or null."""
    return lambda value: value is None or rule[0](value), f"{rule[1]}, or null"


def _is_texts(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


TEXT: Rule = (lambda value: isinstance(value, str), "a text")
TEXTS: Rule = (_is_texts, "texts by name")
SHA256: Rule = (
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[0-9a-f]{64}", value)),
    "a sha256 of 64 hex digits",
)


def content_sha256(fields: Mapping[str, Any]) -> str:
    """The digest of fields as JSON, in whatever order they stand."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_sealed(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes a JSON object with the digest of its fields as a further one, "sha256"."""
    write_json(path, {**fields, "sha256": content_sha256(fields)})


def read_sealed(path: Path, rules: Mapping[str, Rule] | None, remedy: str) -> dict[str, Any]:
    """The fields that write_sealed wrote.

    Args:
        path: of the file.
        rules: one for every field; None asks for the digest alone.
        remedy: what to do about a file that is none.

    Raises:
        InputError: no such file, or anything in it was edited.
    """
    return open_sealed(read_json(path), path, rules, remedy)


def open_sealed(fields: Mapping[str, Any], path: Path, rules: Mapping[str, Rule] | None, remedy: str) -> dict[str, Any]:
    """The same for a file that is read already."""
    if rules is not None and (wrong := sorted({*rules, "sha256"} ^ set(fields))):
        raise InputError(
            f"{path}: fields missing or unknown: {', '.join(wrong)!r:.200}; it was edited, or is of another version: {remedy}"
        )
    content = {name: value for name, value in fields.items() if name != "sha256"}
    if fields.get("sha256") != content_sha256(content):
        raise InputError(f"{path}: edited or damaged, its content does not fit its own sha256; {remedy}")
    require_rules(content, path, rules or {}, remedy)
    return content


def require_rules(fields: Mapping[str, Any], path: Path, rules: Mapping[str, Rule], remedy: str) -> None:
    """Raises InputError for the first field that does not keep its rule; one that is missing is null."""
    for name, (holds, expected) in rules.items():
        if not holds(value := fields.get(name)):
            raise InputError(f"{path}: {name} is {value!r:.80}, expected {expected}; {remedy}")
