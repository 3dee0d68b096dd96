"""Bases: which one is taken, and what can't be loaded."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import base_folder, encode, load_base, make_config, make_questions, make_run, make_tokenizer

from ksat.devices import Device, find_device
from ksat.encoding import EncodedQuestion
from ksat.errors import InputError
from ksat.language_model import LanguageModel
from ksat.models import LoadSettings, choose_dtype, choose_engine, default_quantization, load
from ksat.packing import build_pack

CPU = Device("cpu", "2 CPU cores", (0, 0), 0.0)
P100 = Device("cuda", "Tesla P100", (6, 0), 15.9)
V100 = Device("cuda", "Tesla V100", (7, 0), 31.7)
T4 = Device("cuda", "Tesla T4", (7, 5), 14.6)
H100 = Device("cuda", "H100", (9, 0), 79.2)
SMALL = Device("cuda", "small", (8, 6), 5.8)


@pytest.mark.parametrize(
    ("asked", "device", "dtype"),
    [
        ("auto", CPU, "float32"),
        ("auto", V100, "float16"),
        ("auto", T4, "float16"),
        ("auto", SMALL, "bfloat16"),
        ("auto", H100, "bfloat16"),
        ("float32", H100, "float32"),
        ("float16", V100, "float16"),
    ],
)
def test_dtype_follows_from_the_capability_unless_it_is_given(asked: str, device: Device, dtype: str) -> None:
    assert choose_dtype(asked, device) == dtype


def test_bfloat16_where_there_is_none() -> None:
    with pytest.raises(InputError, match="--dtype bfloat16: .* has none; use --dtype float16"):
        choose_dtype("bfloat16", V100)


@pytest.mark.parametrize(
    ("asked", "device", "installed", "engine"),
    [
        ("auto", H100, True, "unsloth"),
        ("auto", H100, False, "transformers"),
        ("auto", CPU, True, "transformers"),
        ("unsloth", CPU, True, "unsloth"),
        ("transformers", H100, True, "transformers"),
        ("auto", V100, True, "unsloth"),
        ("auto", P100, True, "transformers"),
        ("unsloth", P100, True, "unsloth"),
    ],
)
def test_engine(monkeypatch: pytest.MonkeyPatch, asked: str, device: Device, installed: bool, engine: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert choose_engine(asked, device) == engine


@pytest.mark.parametrize(
    "base", ["LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct", "unsloth/gemma-2-27b-it-bnb-4bit", "google/gemma-3-12b-it"]
)
def test_families_that_unsloth_would_mix_go_to_transformers(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_engine("auto", H100, base=base) == "transformers"


def test_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--engine unsloth: the package is not installed; run make setup"):
        choose_engine("unsloth", H100)


def test_weights_are_quantised_where_they_fill_a_gpu() -> None:
    assert default_quantization("unsloth/Qwen2.5-32B-Instruct-bnb-4bit", V100) == "nf4"
    assert default_quantization("embedded", V100) == "none"
    assert default_quantization("any", CPU) == "none"


def test_cuda_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device cuda: torch sees no CUDA GPU; check nvidia-smi"):
        find_device("cuda")
    assert find_device("auto").kind == find_device("cpu").kind == "cpu"


def copy_of_base(folder: Path) -> Path:
    return Path(shutil.copytree(base_folder(), folder / "base"))


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:100])


def odd_config(folder: Path) -> None:
    """Fields that make transformers divide by zero."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "exaone4", "sliding_window": None, "layer_types": None}
    path.write_text(json.dumps(config))


def other_weights(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "qwen3", "head_dim": 8}))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def pickled_weights(folder: Path) -> None:
    no_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def unknown_family(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"qwen2"', '"nobody-knows"'))


def own_code(folder: Path) -> None:
    """As EXAONE 3.0 comes: a family of its own, whose Python code lies beside the weights."""
    unknown_family(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("{", '{"auto_map": {"AutoConfig": "own.Config"},', 1))
    (folder / "own.py").write_text("open('ran', 'w').write('')\n")


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def odd_tokenizer(folder: Path) -> None:
    """Read when the tokenizer is used first."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "none"}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (no_config, r"the folder has no config.json; expected a model in the Hugging Face layout"),
        (cut_config, r"can't be loaded \(.*config.json.* is not a valid JSON file"),
        (odd_config, r"can't be loaded \(its files: ZeroDivisionError: "),
        (other_weights, r"can't be loaded \(its weights lack 4 of the model's tensors, .*k_norm.weight first"),
        (no_weights, r"can't be loaded \(.*no file named model.safetensors"),
        (cut_weights, r"can't be loaded \(its files: SafetensorError: Error while deserializing header"),
        (pickled_weights, r"can't be loaded \(.*model.safetensors"),
        (unknown_family, r"can't be loaded \(.*nobody-knows"),
        (own_code, r"can't be loaded \(it brings its own Python code; read it, then pass --trust-remote-code"),
        (odd_tokenizer, r"can't be loaded \(its files: TypeError: "),
        (no_tokenizer, r"can't be loaded \(it has no tokenizer files\)"),
    ],
)
def test_bases_that_can_t_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, match: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copy_of_base(tmp_path)
    damage(folder)
    with pytest.raises(InputError, match=match) as caught:
        load_base(folder)
    assert str(caught.value).startswith(f"--base {folder}: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_out_of_memory_while_loading_does_not_blame_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **how: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(
        InputError,
        match=r"^--base .* out of memory while loading it \(CUDA.*\); take a smaller base or --quantization nf4 or give it more",
    ):
        load_base(base_folder())
    with pytest.raises(InputError, match=r"; take a smaller base or give it more memory"):
        load_base(base_folder(), nf4=True)
    of_run = LoadSettings(str(base_folder()), "transformers", CPU, "float32", False, 2048, flag="--ckpt r, base")
    with pytest.raises(InputError, match=r"^--ckpt r, base .*; give it more memory \(--gpu-memory, a larger GPU\)$"):
        load(of_run)


def test_a_bug_while_the_lora_is_made_is_not_blamed_on_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr("peft.get_peft_model", broken)
    with pytest.raises(KeyError, match="ours"):
        load_base(base_folder(), rank=4)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no module"), NotImplementedError("Unsloth cannot find any torch accelerator\nat all"), SystemExit("no GPU"),
        None,  # another version
    ],
)  # fmt: skip
def test_unsloth_that_can_t_be_imported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    (tmp_path / "unsloth.py").write_text(f"raise {error!r}" if error else "FastModel = None")
    error = error or ImportError("cannot import name 'FastLanguageModel' from 'unsloth'")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    with pytest.raises(
        InputError, match="engine unsloth: .* can't be imported .*, or use --engine transformers"
    ) as told:
        load_base(base_folder(), engine="unsloth")
    assert f"({type(error).__name__}: {str(error).splitlines()[0]}" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda name, tensor: {} if "layers.1" in name else {name: tensor}, "14 of the adapter's 14 tensors, .*layers.1.* is missing"),
        (lambda name, tensor: {name: tensor, name.replace("layers.0", "layers.2"): tensor}, "14 of .* 42 .*layers.2.* has no place in it"),
        (lambda name, tensor: {name: tensor[:-1] if "q_proj.lora_B" in name else tensor}, "RuntimeError: Error.s. in loading state_dict"),
    ],
)  # fmt: skip
def test_an_adapter_with_other_tensors_is_refused(tmp_path: Path, change: Any, match: str) -> None:
    """peft warns of missing ones, says nothing of further ones, and scores."""
    folder = make_run(tmp_path / "r") / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {key: value.clone() for name, tensor in tensors.items() for key, value in change(name, tensor).items()}
    save_file(changed, folder / "adapter_model.safetensors")
    settings = LoadSettings(str(base_folder()), "transformers", CPU, "float32", False, 2048)
    with pytest.raises(
        InputError, match=f"{folder}: does not fit --base .* \\(.*({match}).*is the base the one"
    ) as told:
        load(settings, adapter=folder)
    assert "\n" not in str(told.value)


def test_unknown_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"--base nowhere/nothing: can't be loaded .*expected a hub name, a local folder"
    ):
        load_base(Path("nowhere/nothing"))


def packed_scores(model: LanguageModel, questions: Sequence[EncodedQuestion]) -> list[list[float]]:
    with torch.no_grad():
        scores = model.choice_scores(build_pack(questions, range(len(questions)))).tolist()
    return [row[: len(q.continuations)] for row, q in zip(scores, questions, strict=True)]


def test_choices_that_do_not_exist_are_minus_infinity() -> None:
    model = load_base(base_folder())
    questions = encode(make_questions(2), "label")  # four and five choices
    with torch.no_grad():
        scores = model.choice_scores(build_pack(questions, [0, 1]))
    assert scores.shape == (2, 5)
    assert scores.isneginf().tolist() == [[False] * 4 + [True], [False] * 5]


def test_a_tokenizer_with_more_tokens_than_the_model_is_named(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_config(make_config("qwen2", vocab_size=300)).save_pretrained(tmp_path)
    model = load_base(tmp_path)
    for score_by in ("text", "label"):
        with pytest.raises(InputError, match=r"gives the token \d+, the model has 300: .* fetch the base again"):
            packed_scores(model, encode(make_questions(2), score_by))


def gradients(model: LanguageModel, questions: Sequence[EncodedQuestion]) -> dict[str, torch.Tensor]:
    """Of the first question's first score, through the adapter; LoRA's B is moved off 0, so that A has one too."""
    model.model.train()
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    model.model.zero_grad()
    model.choice_scores(build_pack(questions, [0]))[0, 0].backward()  # type: ignore[no-untyped-call]
    return {name: p.grad for name, p in model.model.named_parameters() if p.grad is not None}


def test_nf4_gradients_are_those_of_the_same_weights_in_full_precision() -> None:
    from bitsandbytes.functional import dequantize_4bit

    questions = encode(make_questions(2), "label")
    four_bit = load_base(base_folder(hidden_size=64), nf4=True, rank=4)
    full = load_base(base_folder(hidden_size=64), rank=4)
    num_quantised = 0
    for name, module in full.model.named_modules():
        quantised = four_bit.model.get_submodule(name)
        if name.endswith("base_layer"):
            weight = dequantize_4bit(quantised.weight.data, quantised.weight.quant_state)
            module.weight.data.copy_(weight)
            num_quantised += 1
    assert num_quantised == 14
    expected = gradients(full, questions)
    assert len(expected) == 28
    for name, found in gradients(four_bit, questions).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max().item())


def test_nf4_gradients_are_the_same_after_an_evaluation() -> None:
    """On CPUs with AVX512-BF16 bitsandbytes repacks the weights in evaluation; a backward pass then reads nonsense."""
    questions = encode(make_questions(4), "label")
    expected = gradients(load_base(base_folder(hidden_size=64), nf4=True, rank=4), questions)
    model = load_base(base_folder(hidden_size=64), nf4=True, rank=4)
    before = packed_scores(model, questions)
    found = gradients(model, questions)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name
    assert before == packed_scores(load_base(base_folder(hidden_size=64), nf4=True), questions)
    repacking = [getattr(module, "support_avx512bf16_for_cpu", False) for module in model.model.modules()]
    assert not any(repacking)


def test_a_fresh_lora_changes_nothing_and_follows_its_seed() -> None:
    questions = encode(make_questions(2), "label")
    bare, one, same, other = (
        load_base(base_folder(), rank=rank, seed=seed) for rank, seed in ((0, 0), (4, 1), (4, 1), (4, 2))
    )
    assert packed_scores(one, questions) == packed_scores(bare, questions)
    weights = [dict(model.model.named_parameters()) for model in (one, same, other)]
    first = next(name for name in weights[0] if "lora_A" in name)
    assert torch.equal(weights[0][first], weights[1][first])
    assert not torch.equal(weights[0][first], weights[2][first])


def test_a_lora_is_on_all_linear_layers_but_the_head_in_fp32() -> None:
    for nf4 in (False, True):
        model = load_base(base_folder(hidden_size=64), nf4=nf4, rank=4)
        trained = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
        assert len(trained) == 2 * 7 * 2  # A and B, seven modules, two layers
        assert all(parameter.dtype == torch.float32 for parameter in trained.values())
        assert not any("lm_head" in name for name in trained)


def test_gemma_3_gets_float32_where_there_is_no_bfloat16() -> None:
    v100 = Device("cuda", "V100", (7, 0), 32.0)
    assert choose_dtype("auto", v100, "embedded") == "float32"
    assert choose_dtype("auto", v100, "google/gemma-3-12b-it") == "float32"
    assert choose_dtype("auto", v100, "unsloth/Qwen2.5-32B-Instruct-bnb-4bit") == "float16"
    assert choose_dtype("auto", H100, "embedded") == "bfloat16"


def test_float32_on_cuda_is_for_the_transformers_engine() -> None:
    assert choose_engine("auto", H100, "float32") == "transformers"
    with pytest.raises(InputError, match="on CUDA it trains float32 in half precision; use --engine transformers"):
        choose_engine("unsloth", H100, "float32")


def test_a_checkpoint_quantised_by_others_computes_in_our_dtype(tmp_path: Path) -> None:
    """Saved with bf16 compute, as hub checkpoints are; a CPU run promises float32."""

    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        base_folder(hidden_size=64), quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded = load_base(tmp_path)
    layers = [module for module in loaded.model.modules() if isinstance(module, Linear4bit)]
    assert layers
    loaded.choice_scores(build_pack(encode(make_questions(2), "label"), [0, 1]))
    assert (
        {layer.compute_dtype for layer in layers}
        == {layer.weight.quant_state.dtype for layer in layers}
        == {torch.float32}
    )
