"""Tiny random models with a real tokenizer, and a tiny competition: the whole pipeline in seconds.

Two layers, random weights drawn with initializer_range=0.3 (with the usual 0.02 a LoRA can't overfit them), saved in the
Hugging Face layout, so that `--base FOLDER` takes them. Everything lies in one folder that goes when the tests end.
"""

import csv
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would ask the hub fails at once

import torch

from ksat.files import csv_writer, write_atomic
from ksat.orders import ChoiceOrders
from ksat.prompts import DEFAULT_TEMPLATES
from ksat.questions import Question

torch.set_num_threads(1)  # two threads are slower on models of this size, and much slower on a busy machine
FAMILIES = (
    "qwen2",
    "qwen3",
    "llama",
    "cohere",
    "cohere2",
    "gemma2",
    "gemma3",
    "exaone4",
    "mistral",
    "lfm2",
    "hyperclovax",
    "gemma3-vision",
)
WINDOW = 16  # tokens a sliding-window layer sees: fewer than any prompt here has
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SUBJECTS = ("세종", "정조", "장영실", "이순신", "허난설헌", "김홍도", "신사임당", "정약용")
_PLACES = ("한양", "수원", "강릉", "통영", "전주")
_THINGS = ("측우기", "거북선", "씨름도", "거중기", "초충도")
_SCRATCH = tempfile.TemporaryDirectory(prefix="ksat-tiny-")


def make_questions(num_questions: int, *, first: int = 0, share_passages: bool = True) -> list[Question]:
    """Labelled questions of four and five choices, of which every fourth shares its neighbour's passage.

    Args:
        num_questions: how many.
        first: number of the first; other numbers give other ids and passages.
        share_passages: False gives each its own passage.
    """
    rows = []
    for i in range(first, first + num_questions):
        about = i - 1 if share_passages and i % 4 == 3 else i
        who, where = _SUBJECTS[about % 8], _PLACES[about % 5]
        passage = f"{who}은(는) {1400 + about}년에 {where}에서 {{새것}}을 만들었다." + " 사람들이 모였다." * (about % 3)
        choices = tuple(f"{_THINGS[(i + k) % 5]}" for k in range(4 + i % 2))
        plus = f"가. {where}의 기록 {i}" if i % 5 == 0 else ""
        rows.append(
            Question(
                f"q-{7 * i % 1000:03}",
                passage,
                f"{who}이(가) 만든 것은? ({i})",
                choices,
                1 + i * 3 % len(choices),
                plus,
            )
        )
    return rows


def write_questions(path: Path, questions: Iterable[Question], *, labelled: bool = True) -> Path:
    """Writes a competition CSV and returns its path; without labels the answer is '' as in the competition's test."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "paragraph", "problems", "question_plus"])
        for row in questions:
            answer = row.answer if labelled else ""
            problems = {"question": row.question, "choices": list(row.choices), "answer": answer}
            writer.writerow([row.id, row.passage, repr(problems), row.question_plus])
    return path


def write_labels(path: Path, ids: Sequence[str], answers: Iterable[int]) -> Path:
    """Writes `id,answer`, a submission or gold answers, and returns its path."""
    write_atomic(path, csv_writer(("id", "answer"), [(i, int(answer)) for i, answer in zip(ids, answers, strict=True)]))
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV as dicts of text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_probs(path: Path) -> dict[str, list[float]]:
    """Probabilities by id, as many as the row has choices."""
    return {row["id"]: [float(row[f"prob_{k}"]) for k in range(1, 6) if row[f"prob_{k}"]] for row in read_rows(path)}


@cache
def make_tokenizer(*, chat: bool = True) -> Any:
    """A byte-level BPE tokenizer of about 500 tokens, as Qwen's is one of 151,000; with or without a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    texts = [template.system + template.user.replace("{context}", "") for template in DEFAULT_TEMPLATES.values()]
    for row in make_questions(16):
        texts += [row.passage, row.question]  # not the choices: each is to be several tokens
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def make_config(family: str, *, vocab_size: int, hidden_size: int = 32) -> Any:
    """A two-layer configuration of a family; sliding windows are smaller than the prompts."""
    import transformers

    shared: dict[str, Any] = {
        "vocab_size": vocab_size, "hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
    }  # fmt: skip
    sliding = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    gemma = {"head_dim": 8, "query_pre_attn_scalar": 8, **sliding}
    families: dict[str, tuple[str, dict[str, Any]]] = {
        "qwen2": ("Qwen2Config", {}),
        "qwen3": ("Qwen3Config", {"head_dim": 8}),
        "llama": ("LlamaConfig", {}),
        "mistral": ("MistralConfig", {"sliding_window": WINDOW}),  # every layer slides
        "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
        "cohere": ("CohereConfig", {"logit_scale": 0.25}),
        "cohere2": ("Cohere2Config", {"logit_scale": 0.25, **sliding}),
        "gemma2": ("Gemma2Config", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 10.0, **gemma}),
        "gemma3": ("Gemma3TextConfig", gemma),
        "exaone4": ("Exaone4Config", {"sliding_window_pattern": 2, **sliding}),
        "hyperclovax": (
            "HyperCLOVAXConfig",
            {
                "logits_scaling": 0.25,
                "attention_multiplier": 0.3,
                "residual_multiplier": 0.7,
                "embedding_multiplier": 2.0,
                "use_post_norm": True,
            },
        ),
    }
    if family == "gemma3-vision":  # as Gemma 3 of 4B and more comes from the hub, with a tower that is never used
        tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.Gemma3Config(
            text_config={**shared, **gemma},
            vision_config={**tower, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
            tie_word_embeddings=False,
        )
    name, own = families[family]
    return getattr(transformers, name)(**shared | own)


@cache
def base_folder(family: str = "qwen2", *, chat: bool = True, hidden_size: int = 32) -> Path:
    """The folder of a tiny random base with its tokenizer, the same weights on every call."""
    from transformers import AutoModelForCausalLM

    folder = Path(_SCRATCH.name) / f"tiny-{family}-{hidden_size}{'' if chat else '-plain'}"
    tokenizer = make_tokenizer(chat=chat)
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = make_config(family, vocab_size=len(tokenizer), hidden_size=hidden_size)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    torch.random.set_rng_state(state)
    tokenizer.save_pretrained(folder)
    return folder


def load_base(
    folder: Path,
    *,
    dtype: str = "float32",
    nf4: bool = False,
    engine: Any = "transformers",
    rank: int = 0,
    seed: int = 0,
    share_prefixes: bool = True,
) -> Any:
    """The LanguageModel of a folder on the CPU, with a fresh LoRA of this rank if it is above 0."""
    from ksat.devices import Device
    from ksat.models import LoadSettings, LoraSettings, load

    device = Device("cpu", "test", (0, 0), 0.0)
    settings = LoadSettings(str(folder), engine, device, dtype, nf4, 2048, share_prefixes=share_prefixes)
    return load(settings, lora=LoraSettings(rank, 2.0 * rank**0.5, 0.0, True) if rank else None, seed=seed)


def encode(questions: Sequence[Question], score_by: Any, *, chat: bool = True) -> list[Any]:
    """Encoded questions, with the default wording and the tiny tokenizer."""
    from ksat.encoding import Encoder

    encoder = Encoder(make_tokenizer(chat=chat), DEFAULT_TEMPLATES[score_by], score_by, max_tokens=2048)
    return [encoder.encode(question) for question in questions]


def encode_orders(questions: Sequence[Question], num_orders: int) -> list[Any]:
    """The same by label, every order of a question behind the other."""
    from ksat.encoding import Encoder

    encoder = Encoder(make_tokenizer(), DEFAULT_TEMPLATES["label"], "label", max_tokens=2048)
    return [
        order for question in questions for order in encoder.encode_orders(question, ChoiceOrders("cyclic", num_orders))
    ]


def make_run(
    folder: Path,
    *,
    on: Path | None = None,
    rank: int = 4,
    alpha: float = 8.0,
    rslora: bool = True,
    seed: int = 0,
    **fields: Any,
) -> Path:
    """A finished run, whose adapter has random A and B, without the minutes of a training.

    Args:
        folder: where to.
        on: the base (default: base_folder()).
        rank: of the adapter, as alpha and rslora.
        seed: of the adapter.
        fields: of run.json that are to be other ones.
    """
    from ksat.devices import Device
    from ksat.files import file_sha256
    from ksat.identity import identify_base
    from ksat.models import LoadSettings, LoraSettings, load
    from ksat.runs import Run, write_run

    base = on or base_folder()
    settings = LoadSettings(str(base), "transformers", Device("cpu", "test", (0, 0), 0.0), "float32", False, 2048)
    model = load(settings, lora=LoraSettings(rank, alpha, 0.0, rslora), seed=seed).model
    torch.manual_seed(100 + seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder / "adapter")
    run = Run(
        base=str(base), base_identity=identify_base(str(base)), score_by="label", template=DEFAULT_TEMPLATES["label"].to_dict(),
        max_tokens=2048, scale=1.0, quantization="none", adapter_sha256=file_sha256(folder / "adapter/adapter_model.safetensors"),
        adapter_config_sha256=file_sha256(folder / "adapter/adapter_config.json"), settings={"rank": rank},
        data=[{"file": "data/train.csv", "sha256": "1" * 64}], versions={},
    )  # fmt: skip
    write_run(folder, replace(run, **fields))
    return folder
