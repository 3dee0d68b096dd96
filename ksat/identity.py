"""Which base it is: a hub's revision, an embedded base's bytes or a folder's files. Read from the disk, never from the network."""

import hashlib
from pathlib import Path
from typing import Any

from ksat.embedded import EMBEDDED, embedded_path
from ksat.files import file_sha256

# What transformers reads of a base's folder.
_PATTERNS = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "chat_template*", "*.py", "adapter_config.json",  # which transformers puts on the base
)  # fmt: skip
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096


def identify_base(base: str) -> dict[str, str]:
    """What tells a base from another one of its name. Call it when the base is loaded: then a hub's files are in the cache.

    Args:
        base: hub name, local folder, or an embedded base.

    Returns:
        {"revision": a commit} of a hub's base, {"sha256": of its package's model file} of an embedded one, or the digest of each
        of a folder's files by name. A weights file counts by its size and 64 samples: 18 GB are not read for every scoring.
    """
    if base in EMBEDDED:
        return {"sha256": EMBEDDED[base].sha256}
    if not Path(base).is_dir():
        folder = local_folder(base)
        return {"revision": folder.name} if folder else {}
    digests = {}
    for path in _files(Path(base)):
        digests[path.name] = _sampled_sha256(path) if path.suffix == ".safetensors" else file_sha256(path)
    return digests


def identify_files(base: str) -> dict[str, Any]:
    """The same, with size and time of every file: what an interrupted scoring has to find again before it goes on."""
    folder = local_folder(base)
    found = [(path.name, path.stat()) for path in _files(folder)] if folder else []
    return {
        "base": identify_base(base),
        "files": [[name, status.st_size, status.st_mtime_ns] for name, status in found],
    }


def identify_local(base: str) -> dict[str, Any]:
    """identify_files of a local folder, {} of any other base: a hub's files are not there before they are loaded."""
    return identify_files(base) if base and Path(base).is_dir() else {}


def name_difference(known: dict[str, str], found: dict[str, str]) -> str:
    """In what a base differs from the known one, in a few words: "" if in nothing, or if nothing is known of one."""
    if not known or not found or known == found:
        return ""
    if {*known, *found} == {"revision"}:
        return f"revision {found['revision'][:12]}, not {known['revision'][:12]}"
    parts = []
    for name in sorted(known.keys() | found.keys()):
        if name not in found:
            parts.append(f"{name} is missing")
        elif name not in known:
            parts.append(f"{name} is new")
        elif known[name] != found[name]:
            parts.append(f"{name} differs")
    more = f" and {len(parts) - 3} more" if len(parts) > 3 else ""
    return ", ".join(parts[:3]) + more


def local_folder(base: str) -> Path | None:
    """Where the base's files lie; None for a hub's base that is not in the cache."""
    if base in EMBEDDED:
        return embedded_path(base)
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, "config.json")
    except HFValidationError:  # no name that a hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def _files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})


def _sampled_sha256(path: Path) -> str:
    """The digest of a file's size and of blocks spread evenly over it, first and last bytes included."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(_NUM_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * i // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
