"""Loading a base with its adapter behind one seam, and in which precision and engine.

`load` gives a LanguageModel; no other room knows which engine is inside. Heavy imports happen in functions: unsloth must
be imported before transformers, and --help must not wait for either.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ksat.bases import find_base
from ksat.devices import Device
from ksat.embedded import EMBEDDED, embedded_path
from ksat.errors import InputError
from ksat.hub import did_you_mean, look_for_hub
from ksat.language_model import Engine, LanguageModel
from ksat.packing import Layout
from ksat.runs import ADAPTER_FILE

SEVEN_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """A LoRA as PEFT knows it; the update is scaled by alpha / sqrt(rank) with rslora, alpha / rank without."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose_dtype(asked: str, device: Device, base: str = "") -> str:
    """ "float32", "float16" or "bfloat16" for --dtype.

    By capability: torch.cuda.is_bf16_supported() also says True where bf16 is emulated. Gemma 3 overflows float16 (the
    embedded one's hidden states reach 104,000, float16 ends at 65,504), so it gets float32 where there is no bf16.

    Raises:
        InputError: bfloat16 on a GPU that has none.
    """
    if asked == "bfloat16" and device.kind == "cuda" and device.capability < (8, 0):
        raise InputError(f"--dtype bfloat16: {device.name} has none; use --dtype float16")
    if asked != "auto":
        return asked
    if device.kind == "cpu":
        return "float32"  # half precision is some 100 times slower there
    if device.capability >= (8, 0):
        return "bfloat16"
    return "float32" if is_embedded(base) or "gemma-3" in base.lower() else "float16"


def choose_engine(
    asked: str,
    device: Device,
    dtype: str = "auto",
    base: str = "",
    *,
    shares: bool = False,
    offload_embedding: bool = False,
) -> Engine:
    """The engine for --engine auto|unsloth|transformers.

    auto is Unsloth on CUDA, until a benchmark of ours says otherwise, but where it would compute a prompt again for every
    choice or order of choices (2.65 times the tokens at five orders of 700 + 200), and but for families whose prompts it does
    not keep apart in a pack, or may not: Gemma 2 and 3, and known bases that need rows of their own. Cards before compute capability
    7.0 (P100) get transformers too: Triton, in which Unsloth's kernels are written, serves none of them, and Unsloth's own
    requirements begin there.

    Args:
        asked: the flag.
        device: where.
        dtype: what the model computes in.
        base: which base.
        offload_embedding: whether the embedding stays in the machine's memory, which is the transformers engine's.
        shares: whether a question is several sequences behind one prefix: scored by text, or in several choice orders.

    Raises:
        InputError: unsloth was asked for and is not installed, or not able to train in this dtype.
    """
    import importlib.util

    installed = importlib.util.find_spec("unsloth") is not None
    if asked == "unsloth" and not installed:
        raise InputError("--engine unsloth: the package is not installed; run make setup, or use --engine transformers")
    full_precision = device.kind == "cuda" and dtype == "float32"
    if asked == "unsloth" and offload_embedding:
        raise InputError("--engine unsloth does not offload the embedding; use --engine transformers, or leave it out")
    if asked == "unsloth" and full_precision:
        raise InputError("--engine unsloth: on CUDA it trains float32 in half precision; use --engine transformers")
    served = device.kind == "cuda" and installed and not full_precision and not shares and not offload_embedding
    served = served and device.capability >= (7, 0)
    served = served and not re.search("gemma-[23]", base.lower()) and not _needs_rows(base)
    return "unsloth" if asked == "unsloth" or (asked == "auto" and served) else "transformers"


def is_embedded(base: str) -> bool:
    return base in EMBEDDED


def _needs_rows(base: str) -> bool:
    """Whether it is a known base of a family that is not tested in packs."""
    known = find_base(base)
    return known is not None and known.needs_rows


def default_quantization(base: str, device: Device) -> str:
    """ "nf4" where weights fill a GPU; embedded bases are small enough for full precision."""
    return "nf4" if device.kind == "cuda" and not is_embedded(base) else "none"


def import_engine(engine: Engine) -> None:
    """Imports unsloth first if it is the engine: it patches transformers, peft and trl while they load.

    Raises:
        InputError: unsloth is installed, and its import fails.
    """
    # A library that phones home during an exam is a surprise; users can set these themselves.
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Its warning that a CPU kernel of a hub is missing concerns nobody here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if engine != "unsloth":
        return
    try:
        from unsloth import FastLanguageModel  # type: ignore[import-not-found,import-untyped,unused-ignore] # noqa: F401
    # It looks at the machine and at other packages, and raises whatever it meets there.
    except (Exception, SystemExit) as error:
        raise InputError(
            f"engine unsloth: the package is installed and can't be imported ({type(error).__name__}: {_first_line(error)}); mend that, "
            "or use --engine transformers"
        ) from error


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
        share_prefixes: compute what prompts of a pack have in common once (transformers engine); not for a known base whose
            family is not tested so.
        offload_embedding: keep the embedding in the machine's memory (transformers engine).
        flag: what named the base, for messages.
    """

    base: str
    engine: Engine
    device: Device
    dtype: str
    nf4: bool
    max_tokens: int
    trust_remote_code: bool = False
    share_prefixes: bool = True
    offload_embedding: bool = False
    flag: str = "--base"


def base_path(base: str) -> str:
    """What from_pretrained takes: the cache folder of an embedded base, else the name itself."""
    return str(embedded_path(base)) if is_embedded(base) else base


@contextlib.contextmanager
def _clear_memory_errors(settings: LoadSettings) -> Iterator[None]:
    """Turns a GPU that is full into one line."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        # A run has its base and its weights.
        own = (
            ["take a smaller base", *([] if settings.nf4 else ["--quantization nf4"])]
            if settings.flag == "--base"
            else []
        )
        raise InputError(
            f"{settings.flag} {settings.base}: out of memory while loading it ({_first_line(error)}); "
            f"{' or '.join([*own, 'give it more memory (--gpu-memory, a larger GPU)'])}"
        ) from error


@contextlib.contextmanager
def _clear_load_errors(base: str, flag: str) -> Iterator[None]:
    """Turns what a library's from_pretrained raises for an unknown, unreachable, damaged or unsupported base into one line.

    Nothing else may stand in it: fields that are missing or of another type make the libraries raise whatever comes of that,
    and in our own code the same errors are bugs.
    """
    import torch

    silent = "" if is_embedded(base) else look_for_hub(base)
    try:
        yield
    except torch.OutOfMemoryError:  # says nothing of the base
        raise
    except Exception as error:
        text = _first_line(error)
        if "trust_remote_code" in str(error):
            text = "it brings its own Python code; read it, then pass --trust-remote-code if you want to run it"
        elif silent:
            text = f"{silent}; from the cache: {text}"
        elif not isinstance(error, (OSError, ValueError)):  # those two the libraries write for users
            text = f"its files: {type(error).__name__}: {text}"
        raise _unloadable(base, text, flag) from error


def _unloadable(base: str, text: str, flag: str) -> InputError:
    return InputError(
        f"{flag} {base}: can't be loaded ({text}); {did_you_mean(base)}expected a hub name, a local folder or 'embedded'"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def load_config(base: str, *, flag: str = "--base", trust_remote_code: bool = False) -> Any:
    """The base's transformers config; `flag` named the base, for messages.

    Raises:
        InputError: unknown or unreachable base, or a config that can't be read.
    """
    from transformers import AutoConfig

    with _clear_load_errors(base, flag):
        return AutoConfig.from_pretrained(base_path(base), trust_remote_code=trust_remote_code)


def load_tokenizer(base: str, *, flag: str = "--base", trust_remote_code: bool = False) -> Any:
    """The base's tokenizer; `flag` named the base, for messages.

    Raises:
        InputError: unknown or unreachable base.
    """
    from transformers import AutoTokenizer

    path = base_path(base)
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise InputError(f"{flag} {base}: the folder has no config.json; expected a model in the Hugging Face layout")
    with _clear_load_errors(base, flag):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        ids = tokenizer("1", add_special_tokens=False).input_ids  # reads the rest of its settings
    if not ids:  # transformers makes up an empty one
        raise _unloadable(base, "it has no tokenizer files", flag)
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
    from ksat.host_embedding import offload_embedding

    settings = replace(settings, share_prefixes=settings.share_prefixes and not _needs_rows(settings.base))
    tokenizer = load_tokenizer(settings.base, flag=settings.flag, trust_remote_code=settings.trust_remote_code)
    with _clear_memory_errors(settings):
        model = _load_unsloth(settings) if settings.engine == "unsloth" else _load_transformers(settings)
        if settings.offload_embedding:
            offload_embedding(model, settings.base)
        if lora is not None:
            model = _add_lora(model, lora, settings, seed)
        if adapter is not None:
            model = _put_adapter(model, adapter, settings.base)
    _keep_nf4_unpacked(model)
    autocasts = settings.engine == "unsloth" or not _fuse(model, settings)
    model.eval()
    return LanguageModel(
        model, tokenizer, engine=settings.engine, dtype=settings.dtype, layout=_layout(settings), autocasts=autocasts,
        is_run=adapter is not None,
    )  # fmt: skip


def _put_adapter(model: Any, adapter: Path, base: str) -> Any:
    """The model with a trained adapter on it.

    peft warns of tensors that are missing and takes no notice of further ones: a base with fewer or more layers than the one that
    the adapter was trained on would be scored with a part of it.

    Raises:
        InputError: the adapter's tensors are not exactly those that it has on this base, or one is not finite.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    misfit = f"{adapter}: does not fit --base {base} (%s); is the base the one it was trained on?"
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
        with safe_open(adapter / ADAPTER_FILE, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except torch.OutOfMemoryError:
        raise
    except (
        Exception
    ) as error:  # its fields and its shapes meet those of another base in peft's code, as in _clear_load_errors
        raise InputError(misfit % f"{type(error).__name__}: {_first_line(error)}") from error
    # Not "auto", which would ask the hub whether the vocabulary was resized; it never is.
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        first = f"{wrong[0]} {'is missing' if wrong[0] not in found else 'has no place in it' if wrong[0] not in wanted else 'has another shape'}"
        raise InputError(misfit % f"{len(wrong)} of the adapter's {len(found)} tensors, {first}")
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise InputError(
            f"{adapter}: {broken[0]} is not finite; the training broke down: train again with a lower --lr"
        )
    return adapted


def _fuse(model: Any, settings: LoadSettings) -> bool:
    """Puts faster functions in the place of the modules' own; False if some adapter had to be left to PEFT (dropout), whose
    half precision comes from autocast."""
    from ksat.lora4bit import fuse_gated_mlps, fuse_lora

    is_served = settings.share_prefixes  # only these families' layers are tested
    has_liger = is_served and settings.device.kind == "cuda" and settings.device.capability >= (8, 0)
    product = _apply_liger(model, settings) if has_liger else None
    num_lora = sum(hasattr(module, "lora_A") for module in model.modules())
    if num_lora == 0:
        return True
    num_fused = fuse_lora(model)
    if is_served:
        fuse_gated_mlps(model, product)
    return num_fused == num_lora


def _apply_liger(model: Any, settings: LoadSettings) -> Any:
    """Liger's kernels for norms and rotary positions, where it serves the family; returns its product of a gated MLP."""
    from importlib.util import find_spec

    if find_spec("liger_kernel") is None or settings.dtype == "float32":
        return None
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    causal = model.get_base_model() if hasattr(model, "peft_config") else model
    text_config = causal.config.get_text_config()
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(text_config.model_type)
    # A family of several towers (Gemma 3 with vision) keeps its own modules.
    if apply is None or text_config is not causal.config:
        return None
    activation = getattr(text_config, "hidden_activation", None) or text_config.hidden_act
    gelu = activation == "gelu_pytorch_tanh"
    apply(
        rope=True, rms_norm=True, cross_entropy=False, fused_linear_cross_entropy=False, model=causal,
        **{"geglu" if "gemma" in text_config.model_type else "swiglu": False},
    )  # fmt: skip
    return LigerGELUMulFunction.apply if gelu else LigerSiLUMulFunction.apply if activation == "silu" else None


def _layout(settings: LoadSettings) -> Layout:
    if settings.engine == "unsloth":
        return "flat"
    return "tree" if settings.share_prefixes else "rows"


def _load_transformers(settings: LoadSettings) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from ksat import attention

    path, dtype = base_path(settings.base), getattr(torch, settings.dtype)
    config = load_config(settings.base, flag=settings.flag, trust_remote_code=settings.trust_remote_code)
    text_config = config.get_text_config()
    if settings.share_prefixes:
        attention.require_served(settings.base, text_config)
        attention.register()
        implementation = attention.NAME
    else:
        # SDPA has no soft-capping (Gemma 2): it would be left out without a word.
        implementation = "eager" if getattr(text_config, "attn_logit_softcapping", None) else "sdpa"
    options: dict[str, Any] = {}
    if settings.nf4 and getattr(config, "quantization_config", None) is None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    with _clear_load_errors(settings.base, settings.flag):
        found: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            # By number: weights are read in threads, to whom "cuda" is the first card in every process.
            device_map={"": torch.cuda.current_device() if settings.device.kind == "cuda" else "cpu"},
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            attn_implementation=implementation,
            output_loading_info=True,
            **options,
        )
    model, loaded = found
    if missing := sorted(loaded["missing_keys"]):  # transformers draws them at random and goes on
        raise _unloadable(
            settings.base, f"its weights lack {len(missing)} of the model's tensors, {missing[0]} first", settings.flag
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

    from ksat.attention import require_served_by_unsloth

    config = load_config(settings.base, flag=settings.flag, trust_remote_code=settings.trust_remote_code)
    require_served_by_unsloth(settings.base, config.get_text_config())
    if settings.device.kind == "cuda":
        # For families without a fast forward of Unsloth's; only its own trainer would call this.
        from unsloth.utils.hf_packed_attention import enable_hf_packed_attention

        enable_hf_packed_attention()
    with _clear_load_errors(settings.base, settings.flag):
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
            # By default it replaces torch's checkpoint by one that offloads, and what replaced it dies once it is put back.
            use_gradient_checkpointing=False,
        )
    return model


def _add_lora(model: Any, lora: LoraSettings, settings: LoadSettings, seed: int) -> Any:
    import torch

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

        adapted = FastLanguageModel.get_peft_model(
            model, target_modules=SEVEN_LINEAR, use_gradient_checkpointing=True, random_state=seed, **shared
        )
        from torch.utils.checkpoint import checkpoint  # behind get_peft_model, which may have replaced it

        # Not "unsloth", which offloads to the CPU and takes buffers of the GPU when it sees room: the plan could not hold.
        function = partial(checkpoint, use_reentrant=False, preserve_rng_state=lora.dropout > 0)
        for layer in adapted.get_base_model().get_decoder().layers:
            layer._gradient_checkpointing_func = function
        return adapted
    from peft import LoraConfig, get_peft_model

    # Not peft's prepare_model_for_kbit_training: it casts embedding and head to fp32, 2.9 GiB more on the 32B.
    # A vision tower's layers never run; an adapter there would be ballast in every file.
    decoder = set(model.get_decoder().modules())
    outside = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module not in decoder
    ]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", exclude_modules=outside or None, **shared)
    adapted = get_peft_model(model, config)
    # Which layers recompute is decided pack by pack: LanguageModel.keep_activations. Enabled behind get_peft_model, which
    # would otherwise have gradients flow into the embedding.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted
