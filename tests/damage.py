"""Damage to the files of a run or a base, each kind a function of the file and a random generator; and what hides it again.

Every function changes a file in place and says in a few words what it did.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ksat.files import file_sha256, read_json
from ksat.runs import ADAPTER_FILE, ADAPTER_FOLDER, CONFIG_FILE, Run, read_run, write_run

Damage = Callable[[Path, random.Random], str]
RUN_FILES = ("run.json", f"{ADAPTER_FOLDER}/{CONFIG_FILE}", f"{ADAPTER_FOLDER}/{ADAPTER_FILE}")
BASE_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors")
# What a JSON value is replaced by: other types, bounds and beyond, what looks like another setting.
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 999, 10**9, 10**30, 0.5, -0.5, 1e-9, 1e9, 1e308, "", " ", "x", "none", "nf4", "label", "text",
    "0", [], [1], ["x"], {}, {"x": 1}, "가\n나", "../../etc", "a" * 5000,
)  # fmt: skip


def flip_bits(path: Path, rng: random.Random) -> str:
    """One to eight bits."""
    content = bytearray(path.read_bytes())
    places = [rng.randrange(8 * len(content)) for _ in range(rng.choice((1, 1, 2, 8)))]
    for place in places:
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)
    return f"bits {places} flipped"


def cut_end(path: Path, rng: random.Random) -> str:
    """What a full disk or a broken copy leaves."""
    size = rng.randrange(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    return f"cut to {size} bytes"


def cut_middle(path: Path, rng: random.Random) -> str:
    """A piece is gone, the end is there."""
    content = path.read_bytes()
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((1, 2, 8, 100, 4096)))
    path.write_bytes(content[:start] + content[end:])
    return f"bytes {start} to {end} cut out"


def append_bytes(path: Path, rng: random.Random) -> str:
    """Bytes behind the end."""
    more = rng.choice((b"\n", b"\0", b"{}", b"x" * 100, rng.randbytes(9)))
    path.write_bytes(path.read_bytes() + more)
    return f"{more!r} appended"


def zero_block(path: Path, rng: random.Random) -> str:
    """A block of zeros, as some file systems leave it after a power cut."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.choice((4, 64, 512, 4096)))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)
    return f"bytes {start} to {end} zeroed"


def swap_file(path: Path, rng: random.Random) -> str:
    """The content of another file of the same folder."""
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other.name != path.name)
    if not others:
        return append_bytes(path, rng)
    other = rng.choice(others)
    path.write_bytes(other.read_bytes())
    return f"replaced by {other.name}"


def remove_file(path: Path, _: random.Random) -> str:
    """The file is gone."""
    path.unlink()
    return "removed"


def edit_value(path: Path, rng: random.Random) -> str:
    """One value of a JSON file, at any depth, is another one, or is gone, or stands beside a new one."""
    value = json.loads(path.read_text(encoding="utf-8"))
    node, name = rng.choice(list(_places(value)))
    kind = rng.choice(("odd", "odd", "odd", "near", "gone", "new"))
    old = node[name]
    if kind == "gone":
        del node[name]
    elif kind == "new":
        node["new" if isinstance(node, dict) else slice(0, 0)] = (
            rng.choice(ODD_VALUES[:8]) if isinstance(node, dict) else [1]
        )
    elif kind == "near" and type(old) in (int, float):
        node[name] = old * rng.choice((2, 0.5, 10)) + rng.choice((0, 1))
    elif kind == "near" and isinstance(old, bool):
        node[name] = not old
    else:
        node[name] = rng.choice(ODD_VALUES)
    path.write_text(json.dumps(value), encoding="utf-8")
    return (
        f"{name!r}: {kind}, {str(old)[:60]!r} became {str(node[name])[:60] if kind not in ('gone', 'new') else kind!r}"
    )


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value; of long lists the first few."""
    if isinstance(value, dict):
        here = [(value, key) for key in value]
    elif isinstance(value, list):
        here = [(value, i) for i in range(min(len(value), 4))]
    else:
        return []
    return here + [place for container, key in here for place in _places(container[key])]


def edit_header(path: Path, rng: random.Random) -> str:
    """One value of a safetensors file's header, whose length stays right."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = path.with_name(".header.json")
    header.write_bytes(content[8 : 8 + size])
    said = edit_value(header, rng)
    edited = header.read_bytes()
    header.unlink()
    path.write_bytes(len(edited).to_bytes(8, "little") + edited + content[8 + size :])
    return f"header {said}"


ANY_FILE: tuple[Damage, ...] = (flip_bits, cut_end, cut_middle, append_bytes, zero_block, swap_file, remove_file)


def damages_of(path: Path) -> tuple[Damage, ...]:
    """What can be done to a file, edits of its kind more often than the rest."""
    edits: dict[str, Damage] = {".json": edit_value, ".safetensors": edit_header}
    own = edits.get(path.suffix)
    return ANY_FILE + (own,) * 4 if own else ANY_FILE


def damage_file(path: Path, rng: random.Random) -> str:
    """Damages a file in some way and says how."""
    before = path.read_bytes()
    while True:
        said = rng.choice(damages_of(path))(path, rng)
        if not path.exists() or path.read_bytes() != before:
            return f"{path.name}: {said}"


def reseal(folder: Path, **fields: Any) -> None:
    """Makes an edited run look whole again: other fields in run.json, and all its digests right."""
    adapter = folder / ADAPTER_FOLDER / ADAPTER_FILE
    hashes = {
        "adapter_sha256": file_sha256(adapter),
        "adapter_config_sha256": file_sha256(adapter.with_name(CONFIG_FILE)),
    }
    content = read_json(folder / "run.json")
    run = Run(**{name: content[name] for name in Run.__slots__})
    write_run(folder, replace(run, **{**hashes, **fields}))
    read_run(folder)
