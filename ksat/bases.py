"""The known bases: the ten of the team's table on a V100, and newer ones that people try on the same cards.

Shapes were read in public copies of their configs; parameter counts are sums over those shapes (tests build each on
transformers' classes). What could not be seen in a public source is marked `unverified`. docs/bases.md names the sources.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ksat.errors import InputError
from ksat.memory import ModelShape

FREE_LICENCES = ("Apache-2.0", "MIT")  # nothing to accept, any use; all others have terms of their own


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base, and what it needs.

    Attributes:
        name: repository on the hub.
        family: model_type of its config.
        shape: of its decoder.
        num_parameters: all of them, as stored; those of a vision tower included.
        licence: of the weights, as far as known.
        is_quantized: whether the repository holds nf4 weights; others are quantised while loading.
        kowiki: whether Korean Wikipedia went into it, by its name and the team's word; no card says so.
        public: accuracy that the team reported on the public half, untuned, 2024; None for those that it did not try.
        private: on the private half.
        has_system_role: whether its chat template takes a system turn.
        needs_remote_code: whether its repository's Python code is its only source.
        needs_rows: whether prompts can't share prefixes (--no-share-prefixes), because the family is not tested.
        num_vision_parameters: of a vision tower that loads with it and is never used.
        unverified: what no public source shows, in words; empty if all was seen.
    """

    name: str
    family: str
    shape: ModelShape
    num_parameters: int
    licence: str
    is_quantized: bool = False
    kowiki: bool = False
    public: float | None = None
    private: float | None = None
    has_system_role: bool = True
    needs_remote_code: bool = False
    needs_rows: bool = False
    num_vision_parameters: int = 0
    unverified: str = ""

    @property
    def caution(self) -> str:
        """Why it is not taken unasked, in words; "" if nothing stands against it."""
        code = ["remote code"] if self.needs_remote_code else []
        return ", ".join([*code, *([] if self.licence in FREE_LICENCES else [self.licence])])


def _shape(
    family: str, hidden: int, intermediate: int, num_layers: int, heads: int, kv_heads: int, vocab: int, *,
    head_dim: int = 128, tied: bool = False,
) -> ModelShape:  # fmt: skip
    return ModelShape.of(
        family, hidden=hidden, intermediate=intermediate, num_layers=num_layers, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, vocab=vocab, tied=tied,
    )  # fmt: skip


_QWEN2_5_7B = _shape("qwen2", 3584, 18944, 28, 28, 4, 152064)
_LLAMA_3_8B = _shape("llama", 4096, 14336, 32, 32, 8, 128256)
_GEMMA_TERMS, _APACHE = "Gemma terms", "Apache-2.0"
_PARENT = "its own config and licence; those of {} are taken".format

KNOWN_BASES = (
    KnownBase(
        "hungun/Qwen2.5-7B-Instruct-kowiki-qa", "qwen2", _QWEN2_5_7B, 7_615_616_512, _APACHE, kowiki=True, public=0.7396,
        private=0.7126, unverified=_PARENT("Qwen2.5-7B-Instruct"),
    ),
    KnownBase(
        "beomi/Qwen2.5-7B-Instruct-kowiki-qa-context", "qwen2", _QWEN2_5_7B, 7_615_616_512, _APACHE, kowiki=True,
        public=0.6797, private=0.6368, unverified=_PARENT("Qwen2.5-7B-Instruct"),
    ),
    KnownBase(
        "LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct", "exaone", _shape("exaone", 4096, 14336, 32, 32, 8, 102400), 7_818_448_896,
        "EXAONE 1.1 NC", public=0.6544, private=0.6184, needs_remote_code=True, needs_rows=True,
    ),
    KnownBase(
        "CohereForAI/aya-expanse-8b", "cohere", _shape("cohere", 4096, 14336, 32, 32, 8, 256000, tied=True), 8_028_033_024,
        "CC-BY-NC-4.0", public=0.5899, private=0.5632,
    ),
    KnownBase(
        "Saxo/Linkbricks-Horizon-AI-Korean-llama-3.1-sft-dpo-8B", "llama", _LLAMA_3_8B, 8_030_261_248, "Llama 3.1",
        public=0.5945, private=0.5517, unverified=_PARENT("Llama 3.1 8B"),
    ),
    KnownBase(
        "lcw99/llama-3-10b-wiki-240709-f", "llama", _shape("llama", 4096, 14336, 40, 32, 8, 128256), 9_775_157_248,
        "Llama 3", kowiki=True, public=0.5760, private=0.5379,
        unverified='its config: 40 layers of Llama 3 8B\'s are a guess from "10b"',
    ),
    KnownBase(
        "yanolja/EEVE-Korean-Instruct-10.8B-v1.0", "llama", _shape("llama", 4096, 14336, 48, 32, 8, 40960), 10_804_924_416,
        _APACHE, public=0.6705, private=0.6391, unverified="its vocabulary, 40,960; the count fits",
    ),
    KnownBase(
        "unsloth/gemma-2-27b-it-bnb-4bit", "gemma2", _shape("gemma2", 4608, 36864, 46, 32, 16, 256000, tied=True),
        27_227_128_320, _GEMMA_TERMS, is_quantized=True, public=0.6083, private=0.5816, has_system_role=False,
    ),
    KnownBase(
        "unsloth/Qwen2.5-14B-bnb-4bit", "qwen2", _shape("qwen2", 5120, 13824, 48, 40, 8, 152064), 14_770_033_664, _APACHE,
        is_quantized=True, public=0.6889, private=0.6621,
    ),
    KnownBase(
        "unsloth/Qwen2.5-32B-Instruct-bnb-4bit", "qwen2", _shape("qwen2", 5120, 27648, 64, 40, 8, 152064), 32_763_876_352,
        _APACHE, is_quantized=True, public=0.7765, private=0.7448,
    ),
    KnownBase(
        "Qwen/Qwen3-4B", "qwen3", _shape("qwen3", 2560, 9728, 36, 32, 8, 151936, tied=True), 4_022_468_096, _APACHE,
    ),
    KnownBase("Qwen/Qwen3-8B", "qwen3", _shape("qwen3", 4096, 12288, 36, 32, 8, 151936), 8_190_735_360, _APACHE),
    KnownBase(
        "Qwen/Qwen3-14B", "qwen3", _shape("qwen3", 5120, 17408, 40, 40, 8, 151936), 14_768_307_200, _APACHE,
        unverified="its licence",
    ),
    KnownBase("Qwen/Qwen3-32B", "qwen3", _shape("qwen3", 5120, 25600, 64, 64, 8, 151936), 32_762_123_264, _APACHE),
    KnownBase(
        "LGAI-EXAONE/EXAONE-4.0-1.2B", "exaone4",
        _shape("exaone4", 2048, 4096, 30, 32, 8, 102400, head_dim=64, tied=True), 1_279_391_488, "EXAONE 1.2 NC",
    ),
    KnownBase(
        "LGAI-EXAONE/EXAONE-4.0-32B", "exaone4", _shape("exaone4", 5120, 27392, 64, 40, 8, 102400), 32_003_216_384,
        "EXAONE 1.2 NC",
    ),
    KnownBase(
        "google/gemma-3-4b-it", "gemma3", _shape("gemma3_text", 2560, 10240, 34, 8, 4, 262208, head_dim=256, tied=True),
        4_300_079_472, _GEMMA_TERMS, num_vision_parameters=419_816_304,
    ),
    KnownBase(
        "google/gemma-3-12b-it", "gemma3", _shape("gemma3_text", 3840, 15360, 48, 16, 8, 262208, head_dim=256, tied=True),
        12_187_325_040, _GEMMA_TERMS, num_vision_parameters=421_290_864,
    ),
    KnownBase(
        "google/gemma-3-27b-it", "gemma3", _shape("gemma3_text", 5376, 21504, 62, 32, 16, 262208, tied=True), 27_432_406_640,
        _GEMMA_TERMS, num_vision_parameters=423_060_336,
    ),
    KnownBase(
        "kakaocorp/kanana-1.5-8b-instruct-2505", "llama", _LLAMA_3_8B, 8_030_261_248, _APACHE,
        unverified="its config; the shape of Llama 3.1 8B is taken",
    ),
    KnownBase("skt/A.X-4.0-Light", "qwen2", _shape("qwen2", 3584, 18944, 28, 28, 4, 102400), 7_259_624_960, _APACHE),
    KnownBase(
        "skt/A.X-3.1-Light", "llama", _shape("llama", 4096, 10880, 32, 32, 32, 102400), 7_264_800_768, _APACHE,
        unverified="its heads and vocabulary; the count fits",
    ),
    KnownBase(
        "K-intelligence/Midm-2.0-Base-Instruct", "llama", _shape("llama", 4096, 14336, 48, 32, 8, 131384), 11_545_677_824,
        "MIT",
    ),
    KnownBase(
        "K-intelligence/Midm-2.0-Mini-Instruct", "llama", _shape("llama", 1792, 4608, 48, 32, 8, 131392, tied=True),
        2_305_517_312, "MIT",
    ),
    KnownBase(
        "naver-hyperclovax/HyperCLOVAX-SEED-Text-Instruct-1.5B", "llama",
        _shape("llama", 2048, 7168, 24, 16, 8, 110592, tied=True), 1_585_547_264, "HyperCLOVA X SEED",
        unverified="its width and MLP",
    ),
    KnownBase(
        "naver-hyperclovax/HyperCLOVAX-SEED-Think-14B", "hyperclovax", _shape("hyperclovax", 6144, 14336, 38, 48, 8, 110592),
        14_748_112_896, "HyperCLOVA X SEED", unverified="all but layers, width and count",
    ),
)  # fmt: skip


_UNGATED = frozenset(
    ["phi", "starcoder2", "gpt_neox", "gptj", "falcon", "opt", "bloom", "codegen", "nemotron", "persimmon"]
)


def find_base(name: str) -> KnownBase | None:
    """The known base of this name, None if there is none."""
    return next((base for base in KNOWN_BASES if base.name == name), None)


def read_base(name: str, *, flag: str = "--bases", trust_remote_code: bool = False) -> KnownBase:
    """A base that is not known, by its config: a local folder, or the hub's; `flag` named it, for messages.

    Raises:
        InputError: no such base, no network, a config that is cut, or a family that is none of decoders with gated MLPs.
    """
    from ksat.attention import SERVED  # torch takes seconds to import
    from ksat.models import load_config

    config = load_config(name, flag=flag, trust_remote_code=trust_remote_code)
    text_config = config.get_text_config()
    experts = [n for n in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(text_config, n, None)]
    if experts or text_config.model_type in _UNGATED:
        what = "a mixture of experts" if experts else "a decoder without gated MLPs"
        raise InputError(
            f"{flag} {name}: {what} ({text_config.model_type}), whose size is not counted; expected gated MLPs"
        )
    try:
        shape = _checked_shape(config)
    except _NO_SHAPE as error:
        raise InputError(
            f"{flag} {name}: its config (model type {text_config.model_type!r}) lacks what a shape is made of ({error}); expected "
            "a decoder with gated MLPs"
        ) from error
    quantization = getattr(config, "quantization_config", None) or {}
    return KnownBase(
        name, config.model_type, shape, shape.num_parameters, "not known", is_quantized=bool(quantization),
        needs_rows=text_config.model_type not in SERVED,
    )  # fmt: skip


_NO_SHAPE = (AttributeError, TypeError, ValueError, ArithmeticError)


def _checked_shape(config: Any) -> ModelShape:
    """The shape of a configuration; raises one of _NO_SHAPE if it has none."""
    shape = ModelShape.from_config(config)
    if min(shape.hidden, shape.intermediate, shape.num_layers, shape.kv_dim, shape.vocab) < 1:
        raise ValueError("a size below 1")
    return shape


def find_local_base(name: str) -> KnownBase | None:
    """A base that is not known, by the config.json that lies on this machine: in its folder, or in the hub's cache. None where there is
    none, and where it may take fewer bytes than are counted: families that are not tested, quantisation other than bitsandbytes'.

    The file itself is read, for Unsloth has to be imported before transformers.
    """
    from ksat.attention import SERVED  # torch takes seconds to import
    from ksat.files import read_json
    from ksat.identity import local_folder

    folder = local_folder(name)
    try:
        fields = read_json(folder / "config.json") if folder else {}
        # Where it is not said, embedding and head count as one matrix.
        text = SimpleNamespace(**{"tie_word_embeddings": True, **fields, **fields.get("text_config", {})})
        text.get_text_config = lambda: text
        quantization = getattr(text, "quantization_config", None)
        if text.model_type not in SERVED or (
            quantization is not None and quantization["quant_method"] != "bitsandbytes"
        ):
            return None
        shape = _checked_shape(text)
    except (InputError, KeyError, *_NO_SHAPE):  # loading it says what is wrong
        return None
    return KnownBase(
        name, text.model_type, shape, shape.num_parameters, "not known", is_quantized=quantization is not None
    )
