"""On a CUDA GPU: a small random 4-bit Qwen2 is trained and scored by both engines, in bf16 and in fp16."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import base_folder, make_questions, read_probs, write_questions

from ksat.runs import read_json

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
