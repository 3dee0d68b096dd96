"""The engines under test: plain transformers + peft, Unsloth, and ours, each with the same adapter; and the baselines' batches."""

import argparse
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import DIGITS, Prompt, dtype_name

SEVEN_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_TOKENS = 4096


def load_plain(checkpoint: Path, args: argparse.Namespace) -> Any:
    """transformers + peft as most teams run it: SDPA, every layer recomputed in training."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype_name(args)), device_map={"": args.device}, attn_implementation="sdpa"
    )
    model.config.use_cache = False
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=SEVEN_LINEAR,
    )
    model = get_peft_model(model, lora)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seed_adapter(model)
    return model


def load_unsloth(checkpoint: Path, args: argparse.Namespace, *, keep_all: bool = False) -> Any:
    """Unsloth's model with its LoRA kernels.

    Args:
        checkpoint: folder of the base.
        args: of the benchmark.
        keep_all: checkpoint_skip_layers="max", no layer is recomputed. Unsloth has no such flag on the CPU: left out there.
    """
    import unsloth  # noqa: I001  # first, it patches the others
    import torch

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(checkpoint), max_seq_length=MAX_TOKENS, dtype=getattr(torch, dtype_name(args)), load_in_4bit=True
    )
    skip = {"checkpoint_skip_layers": "max"} if keep_all and args.device == "cuda" else {}
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=args.rank, lora_alpha=2 * args.rank, lora_dropout=0, bias="none", target_modules=SEVEN_LINEAR,
        use_gradient_checkpointing="unsloth", random_state=0, **skip,
    )  # fmt: skip
    seed_adapter(model)
    return model


def load_ours(checkpoint: Path, args: argparse.Namespace, engine: Any = "transformers") -> Any:
    """Our LanguageModel."""
    from ksat.devices import find_device
    from ksat.models import LoadSettings, LoraSettings, load

    settings = LoadSettings(str(checkpoint), engine, find_device(args.device), dtype_name(args), True, MAX_TOKENS)
    model = load(settings, lora=LoraSettings(args.rank, 2.0 * args.rank, 0.0, False))
    seed_adapter(model.model)
    return model


def seed_adapter(model: Any) -> None:
    """Gives a fresh LoRA the same random weights in every engine. B is not 0, so that the loss depends on both matrices."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = name[name.index("layers.") :]
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            scale = 0.01 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def make_optimizer(model: Any, device: str) -> Any:
    """AdamW in float32 over the adapter, with its states and all gradients alive."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0, fused=device == "cuda")
    optimizer.step()  # gradients are 0: nothing changes
    return optimizer


def autocast(args: argparse.Namespace) -> Any:
    """Half precision as a trainer gives it to plain peft and to Unsloth."""
    import torch

    dtype = getattr(torch, dtype_name(args))
    return torch.autocast(args.device, dtype=dtype, enabled=dtype != torch.float32)


def padded_batches(prompts: Sequence[Prompt], size: int, *, answers: bool, device: str) -> list[dict[str, Any]]:
    """input_ids, attention_mask and, with `answers`, labels.

    Args:
        prompts: all of a pass, in this order.
        size: prompts in a batch.
        answers: append the answer digit, the only label, and pad on the right, as in training; else pad on the left.
        device: where to.
    """
    import torch

    batches = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        rows = [(*p.token_ids, DIGITS[p.answer]) if answers else p.token_ids for p in part]
        shape = (len(rows), max(map(len, rows)))
        batch = {"input_ids": torch.zeros(shape).long(), "attention_mask": torch.zeros(shape).long()}
        if answers:
            batch["labels"] = torch.full(shape, -100)
        for i, row in enumerate(rows):
            at = slice(0, len(row)) if answers else slice(shape[1] - len(row), None)
            batch["input_ids"][i, at], batch["attention_mask"][i, at] = torch.tensor(row), 1
            if answers:
                batch["labels"][i, len(row) - 1] = row[-1]
        batches.append({key: value.to(device) for key, value in batch.items()})
    return batches


def by_length(prompts: Sequence[Prompt]) -> list[int]:
    """The indices, longest prompt first, so that little is padded."""
    return sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids))


def packed_batches(prompts: Sequence[Prompt], budget: int, *, device: str) -> list[dict[str, Any]]:
    """One row a batch in Unsloth's packed form, answers appended, first-fit decreasing under a budget in tokens."""
    import torch

    bins: list[list[tuple[int, ...]]] = []
    for i in by_length(prompts):
        _put(bins, (*prompts[i].token_ids, DIGITS[prompts[i].answer]), budget)
    batches = []
    for rows in bins:
        labels = [label for row in rows for label in [-100] * (len(row) - 1) + [row[-1]]]
        batch = {
            "input_ids": torch.tensor([[token for row in rows for token in row]]),
            "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
            "labels": torch.tensor([labels]),
            "packed_seq_lengths": torch.tensor([len(row) for row in rows], dtype=torch.int32),
        }
        batches.append({key: value.to(device) for key, value in batch.items()})
    return batches


def _put(bins: list[list[tuple[int, ...]]], row: tuple[int, ...], budget: int) -> None:
    for rows in bins:
        if sum(map(len, rows)) + len(row) <= budget:
            rows.append(row)
            return
    bins.append([row])
