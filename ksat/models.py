"""Bases: which one to take, and loading it with its adapter behind one seam.

`load` gives a LanguageModel; no other room knows which engine is inside. Heavy imports happen in functions: unsloth must
be imported before transformers, and --help must not wait for either.
"""

import contextlib
import logging
import os
import resource
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ksat.embedded import EMBEDDED, embedded_path
from ksat.errors import InputError
from ksat.packing import Pack, as_rows, visible

if TYPE_CHECKING:
    import torch

Engine = Literal["unsloth", "transformers"]
SEVEN_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A base of the team's table. Sizes in GiB, from its parameter count (nf4: 0.516 bytes each, head and embedding fp16)."""

    name: str
    download_gib: float
    training_gib: float  # peak of a QLoRA step at 2,048 tokens
    relative_cost: float  # floating point operations a token, the 32B as 1


# Largest first; the training peak of the 32B was measured on an H100 (20.6-24.2 GiB up to 2,048 tokens), the others scaled by parameters.
BY_SIZE = (
    KnownBase("unsloth/Qwen2.5-32B-Instruct-bnb-4bit", 18.0, 24.2, 1.0),
    KnownBase("unsloth/Qwen2.5-14B-bnb-4bit", 9.7, 13.5, 0.42),
    KnownBase("hungun/Qwen2.5-7B-Instruct-kowiki-qa", 14.2, 8.5, 0.21),
)


@dataclass(frozen=True, slots=True)
class Device:
    """Where the model runs.

    Attributes:
        kind: "cuda" or "cpu".
        name: as the driver calls it.
        capability: CUDA compute capability, (0, 0) on the CPU.
        memory_gib: memory of the card, 0 on the CPU.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A LoRA as PEFT knows it; the update is scaled by alpha / sqrt(rank) with rslora, alpha / rank without."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_device(asked: str) -> Device:
    """The device for --device auto|cuda|cpu.

    Raises:
        InputError: cuda was asked for and there is none.
    """
    import torch

    if asked != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        return Device("cuda", properties.name, capability, properties.total_memory / 2**30)
    if asked == "cuda":
        raise InputError(
            "--device cuda: torch sees no CUDA GPU; check nvidia-smi and the installed torch, or use --device cpu"
        )
    return Device("cpu", f"{os.cpu_count()} CPU cores", (0, 0), 0.0)


def choose_dtype(asked: str, device: Device, base: str = "") -> str:
    """ "float32", "float16" or "bfloat16" for --dtype.

    By capability: torch.cuda.is_bf16_supported() also says True where bf16 is emulated. Gemma 3 overflows float16 (the
    embedded one's hidden states reach 104,000, float16 ends at 65,504), so it gets float32 where there is no bf16.
    """
    if asked != "auto":
        return asked
    if device.kind == "cpu":
        return "float32"  # half precision is some 100 times slower there
    if device.capability >= (8, 0):
        return "bfloat16"
    return "float32" if is_embedded(base) or "gemma-3" in base.lower() else "float16"


def choose_engine(asked: str, device: Device, dtype: str = "auto") -> Engine:
    """The engine for --engine auto|unsloth|transformers; auto is Unsloth on CUDA, until a benchmark of ours says otherwise.

    Raises:
        InputError: unsloth was asked for and is not installed, or not able to train in this dtype.
    """
    import importlib.util

    installed = importlib.util.find_spec("unsloth") is not None
    if asked == "unsloth" and not installed:
        raise InputError("--engine unsloth: the package is not installed; run make setup, or use --engine transformers")
    full_precision = device.kind == "cuda" and dtype == "float32"
    if asked == "unsloth" and full_precision:
        raise InputError("--engine unsloth: on CUDA it trains float32 in half precision; use --engine transformers")
    if asked == "unsloth" or (asked == "auto" and device.kind == "cuda" and installed and not full_precision):
        return "unsloth"
    return "transformers"


def choose_base(device: Device, *, samples: bool) -> tuple[str, str]:
    """The base when none is named, and why in one sentence."""
    if samples:
        return "embedded", "the sample questions only show that everything works"
    if device.kind == "cpu":
        return "embedded", "there is no GPU; a 270M model is a stand-in, not a contender"
    for known in BY_SIZE:
        if known.training_gib <= 0.95 * device.memory_gib:
            return (
                known.name,
                f"the largest known base whose training (about {known.training_gib} GiB) fits {device.name}",
            )
    return (
        "embedded",
        f"{device.name} has {device.memory_gib:.1f} GiB; the smallest known base needs {BY_SIZE[-1].training_gib}",
    )


def cost(base: str, device: Device, *, num_characters: int) -> str:
    """About how many GiB come and how long training takes, in one line; rough, and says so.

    Args:
        base: which base.
        device: where it trains.
        num_characters: characters of all training questions, times the epochs.
    """
    tokens = 0.65 * num_characters
    if is_embedded(base):
        rate = 110.0 if device.kind == "cpu" else 20_000.0  # measured on 2 cores: 110
        return f"nothing to download; training about {max(1.0, tokens / rate / 60):.0f} minutes"
    known = next((known for known in BY_SIZE if known.name == base), None)
    if known is None:
        return "size and time of this base are not known; it is downloaded unless it is in the Hugging Face cache"
    # Tokens a second of the 32B with Unsloth: measured on an H100, reported by teams for a V100, between them guessed.
    rate = 2200.0 if device.capability >= (9, 0) else 900.0 if device.capability >= (8, 0) else 250.0
    hours = tokens * known.relative_cost / rate / 3600
    return f"download {known.download_gib:.0f} GiB unless cached; training about {hours:.1f} h (rough)"


def is_embedded(base: str) -> bool:
    return base in EMBEDDED


def default_quantization(base: str, device: Device) -> str:
    """ "nf4" where weights fill a GPU; embedded bases are small enough for full precision."""
    return "nf4" if device.kind == "cuda" and not is_embedded(base) else "none"


def peak_memory_gib() -> float:
    """Peak memory so far: the GPU's if there is one, else this process's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def import_engine(engine: Engine) -> None:
    """Imports unsloth first if it is the engine: it patches transformers, peft and trl while they load."""
    # A library that phones home during an exam is a surprise; users can set these themselves.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Its warning that a CPU kernel of a hub is missing concerns nobody here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if engine == "unsloth":
        import unsloth  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: F401


class LanguageModel:
    """A causal language model, with or without an adapter: a pack goes in, choice scores come out, differentiable.

    Attributes:
        model: the transformers or PEFT module.
        tokenizer: the base's own.
        engine: "unsloth" or "transformers".
        dtype: what it computes in; "float32" means no autocast.
        shares_prefixes: a prompt is computed once for all its choices; else each goes as a padded row of its own.
    """

    def __init__(self, model: Any, tokenizer: Any, *, engine: Engine, dtype: str) -> None:
        self.model, self.tokenizer, self.engine, self.dtype = model, tokenizer, engine, dtype
        self.device = next(model.parameters()).device
        text_config = model.config.get_text_config()
        layer_types = set(getattr(text_config, "layer_types", None) or [])
        # Without layer types (Mistral, Phi 3) every layer slides if there is a window.
        self._window: int | None = (
            getattr(text_config, "sliding_window", None)
            if not layer_types or "sliding_attention" in layer_types
            else None
        )
        self._all_slide = not layer_types
        # A layer that keeps a state or sees chunks (LFM2, Llama 4) can't branch: its choices go as rows of their own.
        self.shares_prefixes = engine == "transformers" and layer_types <= {"full_attention", "sliding_attention"}
        _keep_nf4_unpacked(model)

    def choice_scores(self, pack: Pack) -> "torch.Tensor":
        """(n, K) log-likelihood of every choice divided by its divisor; -inf where the choice does not exist.

        At least fp32. Rows are in the pack's order, columns in the order of the row's choices.
        """
        import torch

        positions, inverse = np.unique(pack.scored_positions, return_inverse=True)
        with self.autocast():
            logits = self._shared_logits(pack, positions) if self.shares_prefixes else self._row_logits(pack, positions)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (P, V)
        at, targets, owners = (torch.from_numpy(a).to(logits.device) for a in (inverse, pack.targets, pack.owners))
        token_scores = logits[at, targets] - logits.logsumexp(dim=-1)[at]  # (S,)
        divisors = torch.from_numpy(pack.divisors).to(logits)  # (n, K)
        sums = torch.zeros(divisors.numel(), dtype=logits.dtype, device=logits.device).index_add(
            0, owners, token_scores
        )
        return (sums.view_as(divisors) / divisors).masked_fill(divisors.isnan(), -torch.inf)

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Half precision for the layers where the base is half precision; adapters stay fp32."""
        import torch

        half = self.dtype in ("float16", "bfloat16")
        with torch.autocast(self.device.type, dtype=getattr(torch, self.dtype) if half else None, enabled=half):
            yield

    def _shared_logits(self, pack: Pack, positions: np.ndarray[Any, np.dtype[np.int64]]) -> "torch.Tensor":
        """(P, V) logits of these positions of a pack, each prompt computed once, behind a block mask."""
        import torch

        seen = visible(pack)
        attention_mask: Any = self._additive(seen)
        if self._window is not None:
            near = self._additive(seen & (pack.position_ids[:, None] - pack.position_ids[None, :] < self._window))
            attention_mask = near if self._all_slide else {"full_attention": attention_mask, "sliding_attention": near}
        output = self.model(
            input_ids=torch.from_numpy(pack.token_ids)[None].to(self.device),
            position_ids=torch.from_numpy(pack.position_ids)[None].to(self.device),
            attention_mask=attention_mask,
            logits_to_keep=torch.from_numpy(positions).to(self.device),
            use_cache=False,
        )
        return output.logits[0]  # type: ignore[no-any-return]

    def _additive(self, mask: np.ndarray[Any, np.dtype[np.bool_]]) -> "torch.Tensor":
        """(1, 1, T, T): 0 where a token is seen, the lowest number where not; serves SDPA and eager attention alike."""
        import torch

        dtype = (
            torch.get_autocast_dtype(self.device.type)
            if torch.is_autocast_enabled(self.device.type)
            else self.model.dtype
        )
        hidden = torch.from_numpy(~mask).to(self.device)[None, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill(hidden, torch.finfo(dtype).min)

    def _row_logits(self, pack: Pack, positions: np.ndarray[Any, np.dtype[np.int64]]) -> "torch.Tensor":
        """(P, V) the same logits from plain right-padded rows: Unsloth's attention is causal and knows no shared prefix.

        Pads stand behind every real token, so no mask is needed.
        """
        import torch

        ids, place = as_rows(pack, pad_id=self.tokenizer.pad_token_id or 0)
        first = {int(position): i for i, position in reversed(list(enumerate(pack.scored_positions)))}
        rows, columns = torch.from_numpy(place[[first[int(p)] for p in positions]].T.copy()).to(
            self.device
        )  # (P,) each
        kept, column_index = columns.unique(return_inverse=True)
        # Unsloth's fast forward then returns hidden states in the place of logits; transformers' own ignores it.
        os.environ["UNSLOTH_RETURN_HIDDEN_STATES"] = "1"
        try:
            output = self.model(
                input_ids=torch.from_numpy(ids).to(self.device), logits_to_keep=kept, use_cache=False
            ).logits
        finally:
            del os.environ["UNSLOTH_RETURN_HIDDEN_STATES"]
        if output.shape[-1] != self.model.config.get_text_config().hidden_size:
            return output[rows, column_index]  # type: ignore[no-any-return]
        from unsloth.models.llama import apply_logit_transforms, resolve_logit_scaling

        hidden = output[rows, columns if output.shape[1] == ids.shape[1] else column_index]
        head = self.model.get_output_embeddings()
        return apply_logit_transforms(head(hidden.to(head.weight.dtype)), *resolve_logit_scaling(self.model.config))  # type: ignore[no-any-return]


def _keep_nf4_unpacked(model: Any) -> None:
    """Stops bitsandbytes from repacking nf4 weights in evaluation on CPUs with AVX512-BF16: backward passes that follow
    would read the repacked bytes and be wrong without a word."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How to load a base.

    Attributes:
        base: hub name, local folder, or an embedded base.
        engine: which engine.
        device: where to.
        dtype: "float32", "float16" or "bfloat16".
        nf4: quantise to 4 bits while loading (a checkpoint that is quantised already stays as it is).
        max_tokens: the longest sequence, in tokens.
        trust_remote_code: run Python code of the base's repository.
    """

    base: str
    engine: Engine
    device: Device
    dtype: str
    nf4: bool
    max_tokens: int
    trust_remote_code: bool = False


def base_path(base: str) -> str:
    """What from_pretrained takes: the cache folder of an embedded base, else the name itself."""
    return str(embedded_path(base)) if is_embedded(base) else base


@contextlib.contextmanager
def _clear_load_errors(base: str) -> Iterator[None]:
    """Turns what the libraries raise for an unknown, unreachable or unsupported base into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        text = _first_line(error)
        if "trust_remote_code" in str(error):
            text = "it brings its own Python code; read it, then pass --trust-remote-code if you want to run it"
        raise InputError(
            f"--base {base}: can't be loaded ({text}); expected a hub name, a local folder or 'embedded'"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def load_tokenizer(base: str, *, trust_remote_code: bool = False) -> Any:
    """The base's tokenizer.

    Raises:
        InputError: unknown or unreachable base.
    """
    from transformers import AutoTokenizer

    path = base_path(base)
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise InputError(f"--base {base}: the folder has no config.json; expected a model in the Hugging Face layout")
    with _clear_load_errors(base):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        if not tokenizer("1", add_special_tokens=False).input_ids:  # transformers makes up an empty one
            raise ValueError("it has no tokenizer files")
        return tokenizer


def load(
    settings: LoadSettings, *, lora: LoraSettings | None = None, adapter: Path | None = None, seed: int = 0
) -> LanguageModel:
    """A base, bare, with a fresh LoRA to train, or with a trained adapter to score with.

    Args:
        settings: what and how.
        lora: adds a fresh LoRA on all linear modules.
        adapter: folder of a PEFT adapter to put on the base.
        seed: of the fresh LoRA's weights.

    Raises:
        InputError: the base can't be found or loaded, or the adapter is not one for it.
    """
    import_engine(settings.engine)
    tokenizer = load_tokenizer(settings.base, trust_remote_code=settings.trust_remote_code)
    with _clear_load_errors(settings.base):
        model = _load_unsloth(settings) if settings.engine == "unsloth" else _load_transformers(settings)
        if lora is not None:
            model = _add_lora(model, lora, settings, seed)
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, adapter)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(
                f"{adapter}: does not fit --base {settings.base} ({_first_line(error)}); is the base the one it was trained on?"
            ) from error
    model.eval()
    return LanguageModel(model, tokenizer, engine=settings.engine, dtype=settings.dtype)


def _load_transformers(settings: LoadSettings) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    path, dtype = base_path(settings.base), getattr(torch, settings.dtype)
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    text_config = config.get_text_config()
    options: dict[str, Any] = {}
    if settings.nf4 and getattr(config, "quantization_config", None) is None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=dtype,
        device_map={"": settings.device.kind},
        trust_remote_code=settings.trust_remote_code,
        use_safetensors=True,
        # SDPA has no soft-capping (Gemma 2): it would be left out without a word.
        attn_implementation="eager" if getattr(text_config, "attn_logit_softcapping", None) else "sdpa",
        **options,
    )
    _compute_nf4_in(model, dtype)
    return model


def _compute_nf4_in(model: Any, dtype: Any) -> None:
    """Makes a checkpoint that was quantised by others compute in `dtype`: it keeps the one it was saved with, bf16 mostly,
    which is emulated on a V100 and is not the float32 that a CPU run promises."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
            module.weight.quant_state.dtype = dtype  # type: ignore[attr-defined]


def _load_unsloth(settings: LoadSettings) -> Any:
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        base_path(settings.base),
        # It cuts what is longer: the limit is the prompt's, and a choice's text stands behind it.
        max_seq_length=settings.max_tokens + 1024,
        dtype=getattr(torch, settings.dtype),
        # With False it would strip -bnb-4bit from the name and load the sibling.
        load_in_4bit=settings.nf4 or settings.base.endswith("-bnb-4bit"),
        trust_remote_code=settings.trust_remote_code,
        # Without it a name such as Qwen/Qwen2.5-7B-Instruct loads another repository, quantised by Unsloth.
        use_exact_model_name=True,
    )
    return model


def _add_lora(model: Any, lora: LoraSettings, settings: LoadSettings, seed: int) -> Any:
    import torch

    on_cuda = settings.device.kind == "cuda"
    shared: dict[str, Any] = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "use_rslora": lora.rslora,
    }
    torch.manual_seed(seed)
    if settings.engine == "unsloth":
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model,
            target_modules=SEVEN_LINEAR,
            use_gradient_checkpointing="unsloth" if on_cuda else False,
            random_state=seed,
            **shared,
        )
    from peft import LoraConfig, get_peft_model

    if on_cuda:
        # Not peft's prepare_model_for_kbit_training: it casts embedding and head to fp32, 2.9 GiB more on the 32B.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **shared))
