"""Writes a checkpoint with random weights in the exact shape of a real base, quantised to nf4 with double quantisation.

    python benchmarks/build_checkpoint.py OUT --size 32b [--layers 16]

In the file layout of unsloth/*-bnb-4bit, so that every engine reads the same weights. Time and memory do not depend on the
values of weights, so two quantised tensors a shape are enough: they take turns in the layers. The tokenizer is a stand-in
of 258 bytes and signs, because loaders ask for one; the benchmarks work with token ids.
"""

import argparse
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

QWEN = {
    "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "use_sliding_window": False,
    "bos_token_id": 151643, "eos_token_id": 151645, "pad_token_id": 151643,
}  # fmt: skip
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "7b": ("Qwen2Config", QWEN | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}),
    "14b": ("Qwen2Config", QWEN | {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8}),
    "32b": ("Qwen2Config", QWEN | {
        "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40, "num_key_value_heads": 8}),
    "27b": ("Gemma2Config", {
        "vocab_size": 256000, "hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144, "sliding_window": 4096,
        "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "tiny": ("Qwen2Config", QWEN | {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 256}),
}  # fmt: skip
LAYERS_PER_FILE = 8


def main(argv: list[str] | None = None) -> None:
    """Builds one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, default="32b")
    parser.add_argument("--layers", type=int, help="layers (default: all of the real base)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args(argv)
    build(args.out, args.size, num_layers=args.layers, device=args.device, dtype=args.dtype)


def make_config(size: str, num_layers: int | None = None) -> Any:
    """The transformers configuration of a size, shortened to `num_layers` if given."""
    import transformers

    name, values = SIZES[size]
    shortened = {"num_hidden_layers": num_layers} if num_layers else {}
    return getattr(transformers, name)(**values | shortened)


def build(folder: Path, size: str, *, num_layers: int | None, device: str, dtype: str) -> None:
    """Writes the checkpoint; the same call writes the same weights on the same device.

    Args:
        folder: is created; config.json comes last and marks it as complete.
        size: one of SIZES.
        num_layers: fewer layers than the real base has, None for all.
        device: where to quantise, "cuda" or "cpu".
        dtype: of what is not quantised, and of the computation.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = make_config(size, num_layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    made: dict[Any, dict[str, Any]] = {}
    weight_map: dict[str, str] = {}
    groups = itertools.groupby(model.named_parameters(), key=lambda item: (_layer(item[0]) or 0) // LAYERS_PER_FILE)
    for number, (_, group) in enumerate(groups, 1):
        tensors: dict[str, Any] = {}
        for name, parameter in group:
            tensors |= _tensors(name, tuple(parameter.shape), made, device, dtype)
        file_name = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    _write_json(
        folder / "model.safetensors.index.json", {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    )
    _make_tokenizer().save_pretrained(folder)
    settings = config.to_dict() | {"architectures": [type(model).__name__], "dtype": dtype}
    _write_json(folder / "config.json", settings | {"quantization_config": _quantization(dtype)})
    seconds = time.monotonic() - start
    print(
        f"built {size}, {config.num_hidden_layers} layers, {num_bytes / 2**30:.2f} GiB in {seconds:.0f} s", flush=True
    )


def _layer(name: str) -> int | None:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _tensors(
    name: str, shape: tuple[int, ...], made: dict[Any, dict[str, Any]], device: str, dtype: str
) -> dict[str, Any]:
    """What the checkpoint holds for one parameter, by full name; `made` collects the quantised tensors."""
    import torch

    torch_dtype, layer = getattr(torch, dtype), _layer(name)
    if len(shape) == 1:  # the weight of a norm, or a bias
        return {name: torch.full(shape, float(name.endswith("norm.weight")), dtype=torch_dtype)}
    if layer is None:
        return {name: (torch.randn(shape, dtype=torch_dtype, device=device) * 0.02).cpu()}
    key = (shape, layer % 2)
    if key not in made:
        made[key] = _quantized(shape, device, torch_dtype)
    stem = name.removesuffix("weight")
    return {stem + part: tensor.clone() for part, tensor in made[key].items()}


def _quantized(shape: tuple[int, ...], device: str, dtype: Any) -> dict[str, Any]:
    """A random nf4 weight of this shape as bitsandbytes stores it."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    rows, columns = shape
    linear = Linear4bit(columns, rows, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
    weight = torch.randn(shape, dtype=dtype, device=device) * 0.02
    linear.weight = Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear)
    return {name: tensor.detach().cpu() for name, tensor in linear.to(device).state_dict().items()}


def _quantization(dtype: str) -> dict[str, Any]:
    return {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "_load_in_4bit": True, "_load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8", "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None, "llm_int8_threshold": 6.0,
    }  # fmt: skip


def _make_tokenizer() -> Any:
    """A byte-level tokenizer that merges nothing."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
