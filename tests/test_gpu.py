"""On a CUDA GPU: a small random 4-bit Qwen2 is trained and scored by both engines, in bf16 and in fp16; each attention kernel
and the memory plan against what the CPU says."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import base_folder, encode, load_base, make_questions, read_probs, write_questions

from ksat import attention
from ksat.devices import Device
from ksat.files import read_json
from ksat.models import LoadSettings, LoraSettings, load
from ksat.packing import build_pack
from ksat.step_memory import StepMemory, default_pack_tokens, measured_peak, memory_plan

ROOT = Path(__file__).parent.parent

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def run_calls(folder: Path, calls: list[tuple[str, list[str]]]) -> None:
    """Runs mains in a process of its own: unsloth patches what it finds, and CUDA memory goes back."""
    code = "import inference, train\n" + "\n".join(f"{script}.main({flags!r})" for script, flags in calls)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "UNSLOTH_DISABLE_STATISTICS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("engine", ["unsloth", "transformers"])
def test_train_and_score_on_cuda(tmp_path: Path, engine: str, dtype: str) -> None:
    """The adapter learns, and both ways of scoring it, here and on the CPU in fp32, agree as far as half precision does."""
    if dtype == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("bf16 is emulated below compute capability 8.0")
    if engine == "unsloth" and importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    write_questions(tmp_path / "train.csv", make_questions(16))
    write_questions(tmp_path / "test.csv", make_questions(8, first=40), labelled=False)
    how = ["--device", "cuda", "--engine", engine, "--dtype", dtype]
    lora = ["--rank", "8", "--lr", "0.005", "--epochs", "2", "--questions-per-step", "4", "--valid-fraction", "0.25"]
    base = ["--base", str(base_folder(hidden_size=128))]
    score = ["--ckpt", "checkpoints/r", "--test", "test.csv", "--out"]
    run_calls(
        tmp_path,
        [
            ("train", [*base, *how, *lora, "--train", "train.csv", "--run", "r", "--patience", "9"]),
            ("inference", [*score, "out/gpu", *how]),
        ],
    )
    run_calls(tmp_path, [("inference", [*score, "out/cpu", "--device", "cpu", "--engine", "transformers"])])
    stored, metrics = (read_json(tmp_path / "checkpoints/r" / name) for name in ("run.json", "metrics.json"))
    assert stored["quantization"] == "nf4"
    assert (stored["settings"]["engine"], stored["settings"]["dtype"]) == (engine, dtype)
    assert all(np.isfinite(entry["log_loss"]["value"]) for entry in metrics["epochs"])
    assert metrics["epochs"][-1]["log_loss"]["value"] != metrics["control"]["log_loss"]["value"]
    on_gpu, on_cpu = read_probs(tmp_path / "out/gpu.probs.csv"), read_probs(tmp_path / "out/cpu.probs.csv")
    assert on_gpu.keys() == on_cpu.keys()
    for row_id, probs in on_gpu.items():
        np.testing.assert_allclose(probs, on_cpu[row_id], atol=0.15, err_msg=row_id)  # random weights of 0.3 are rough


def card() -> Device:
    properties = torch.cuda.get_device_properties(0)
    return Device("cuda", properties.name, (properties.major, properties.minor), properties.total_memory / 2**30)


def on_gpu(family: str, dtype: str, *, nf4: bool = False) -> Any:
    settings = LoadSettings(str(base_folder(family, hidden_size=128)), "transformers", card(), dtype, nf4, 2048)
    return load(settings, lora=LoraSettings(8, 5.0, 0.0, True))


@pytest.mark.parametrize("kernel", ["varlen", "segments"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3", "exaone4"])
def test_packs_on_cuda_equal_the_cpu(family: str, dtype: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared prefixes, windows, soft caps, Liger's kernels: the scores and the gradients of float32 on the CPU, as far as
    the dtype goes."""
    capability = torch.cuda.get_device_capability()
    if (kernel == "varlen" or dtype == "bfloat16") and (capability < (8, 0) or dtype == "float32"):
        pytest.skip("neither is there")
    monkeypatch.setattr(
        attention, "choose_kernel", lambda device, dtype: kernel if device.type == "cuda" else "segments"
    )
    questions = encode(make_questions(8), "text")
    pack = build_pack(questions, range(8))
    found = []
    for load_model in (
        lambda: load_base(base_folder(family, hidden_size=128), rank=8),
        lambda: on_gpu(family, dtype),
    ):
        each = load_model()
        # Liger's kernels replace classes and functions of transformers' module, for CPU models too.
        modeling = sys.modules[type(each.decoder).__module__]
        for name in [name for name in vars(modeling) if name == "apply_rotary_pos_emb" or name.endswith("RMSNorm")]:
            monkeypatch.setattr(modeling, name, getattr(modeling, name))
        for name, parameter in each.model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                generator = torch.Generator().manual_seed(len(name))
                parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        each.model.train()
        scores = each.choice_scores(pack)
        scores[scores.isfinite()].sum().backward()
        gradient = torch.cat([p.grad.flatten().cpu() for p in each.model.parameters() if p.grad is not None])
        found.append((scores.detach().cpu(), gradient))
    tolerance = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}[dtype]
    finite = found[0][0].isfinite()
    torch.testing.assert_close(found[1][0][finite], found[0][0][finite], rtol=tolerance, atol=tolerance)
    cosine = torch.nn.functional.cosine_similarity(found[0][1], found[1][1], dim=0)
    assert cosine > 1 - tolerance


def test_the_memory_plan_on_cuda() -> None:
    """More kept layers take more memory; after two probes the prediction is near; the model is tiny, so the constants of
    kernels and buffers weigh most, and benchmarks/memory_fit.py is the measure."""
    model = on_gpu("qwen2", "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16", nf4=True)
    plan = memory_plan(model, rank=8, training=True, over_vocabulary=False)
    assert plan is not None
    questions = encode(make_questions(40), "label")
    memory = StepMemory(model, plan)
    assert default_pack_tokens(plan, questions, model.layout) >= max(len(question.prompt_ids) for question in questions)
    model.model.train()
    pack = build_pack(questions, range(40))
    peaks = []
    for num_kept in (0, 1, 2):
        model.keep_activations(num_kept)
        torch.cuda.reset_peak_memory_stats()
        scores = model.choice_scores(pack)
        scores[scores.isfinite()].sum().backward()
        peaks.append(measured_peak())
        model.model.zero_grad()
    assert peaks[2] > peaks[0]
    assert memory.prepare(pack) == 2  # a tiny model has room for all
    assert memory.to_dict().keys() == {"predicted_gib", "peak_gib"}
