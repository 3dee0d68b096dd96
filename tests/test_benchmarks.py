"""The benchmarks run on tiny shapes on the CPU and leave JSON and markdown; their parts compute what they say.

Where they are wrong about time, only a GPU can tell.
"""

import contextlib
import importlib
import io
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import build_checkpoint  # noqa: E402
import children  # noqa: E402
import engines  # noqa: E402
import measure  # noqa: E402
import score_speed  # noqa: E402

ALONE = "hf-bs1"  # in a process of its own, as all on a GPU; what Unsloth compiles takes minutes there, test_unsloth.py has it
SIDES = {
    "train_speed": "hf-bs4,ours",
    "score_speed": "hf-bs8,ours,orders-1,orders-5-shared,orders-5-apart",
    "memory_fit": "score,half,planned",
}
PROMPTS = ["--prompts", "5", "--median-tokens", "70"]
FLAGS = {"train_speed": PROMPTS, "score_speed": PROMPTS, "memory_fit": ["--tokens", "40,80"]}
SHARED = ["--size", "tiny", "--device", "cpu", "--seconds", "0"]
Runs = dict[str, dict[str, Any]]


def run_child_here(name: str, sides: Any, checkpoint: Path, args: Namespace, on_row: Any) -> None:
    """What children._run_child does, in this process: a new one takes 8 seconds to import its libraries."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        importlib.import_module(name).main([*sys.argv[1:], "--child", ",".join(sides), "--checkpoint", str(checkpoint)])
    for line in output.getvalue().splitlines():
        if line.startswith(measure.RESULT):
            on_row(json.loads(line.removeprefix(measure.RESULT)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The run that each script wrote, with its markdown under "text"; train_speed is called twice."""
    folder = tmp_path_factory.mktemp("benchmarks")
    found: Runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for name, sides in (("train_speed", ALONE), *SIDES.items()):
            flags = [
                *SHARED,
                *FLAGS[name],
                "--checkpoint",
                str(folder / "tiny"),
                "--out",
                str(folder),
                "--sides",
                sides,
            ]
            patch.setattr(sys, "argv", [f"benchmarks/{name}.py", *flags])
            importlib.import_module(name).main(flags)
            (found[name],) = json.loads((folder / f"{name}_cpu.json").read_text(encoding="utf-8"))["runs"]
            found[name]["text"] = (folder / f"{name}_cpu.md").read_text(encoding="utf-8")
            patch.setattr(children, "_run_child", run_child_here)  # but for the first
    return found


def rows_of(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows by side, none of which failed."""
    assert not [row for row in run["rows"] if "error" in row]
    return {row["side"]: row for row in run["rows"]}


def test_every_engine_trains_on_the_same_loss_and_gradient(runs: Runs) -> None:
    rows = rows_of(runs["train_speed"])
    assert list(rows) == [ALONE, *SIDES["train_speed"].split(",")]
    first = rows["hf-bs4"]
    for row in rows.values():
        assert row["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert row["gradient_norm"] == pytest.approx(first["gradient_norm"], rel=1e-3)
        assert row["adapter_dtype"] == "torch.float32"
    assert "differs" not in runs["train_speed"]["text"]


def test_every_engine_gives_the_same_scores(runs: Runs) -> None:
    rows = rows_of(runs["score_speed"])
    assert list(rows) == SIDES["score_speed"].split(",")
    assert rows["ours"]["loss"] == pytest.approx(rows["hf-bs8"]["loss"], rel=1e-4)
    assert rows["orders-5-shared"]["loss"] == pytest.approx(rows["orders-5-apart"]["loss"], rel=1e-4)
    assert "differs" not in runs["score_speed"]["text"]


def test_shared_orders_compute_the_prefix_once(runs: Runs) -> None:
    """5 questions of 70 shared tokens, each behind them 5 orders of 20; of so few tokens, two can begin alike."""
    rows = rows_of(runs["score_speed"])
    assert rows["orders-5-shared"]["computed_tokens"] == pytest.approx(5 * (70 + 5 * 20), rel=0.005)
    assert rows["orders-5-apart"]["computed_tokens"] == 5 * 5 * (70 + 20)
    assert rows["orders-1"]["computed_tokens"] == 5 * (70 + 20)


def test_every_pack_has_a_prediction_for_its_plan(runs: Runs) -> None:
    rows = rows_of(runs["memory_fit"])
    assert list(rows) == ["score-40", "score-80", "half-40", "half-80", "planned-40", "planned-80"]
    assert [row["kept_layers"] for row in rows.values()] == [0, 0, 1, 1, 2, 2]  # of 2; there is no limit on the CPU
    assert rows["score-40"]["predicted_gib"] < rows["half-40"]["predicted_gib"] < rows["half-80"]["predicted_gib"]
    assert rows["half-80"]["predicted_gib"] < rows["planned-80"]["predicted_gib"]


def test_results_say_where_they_come_from(runs: Runs) -> None:
    for name, run in runs.items():
        assert run["machine"]["card"] == "CPU" and run["machine"]["versions"]["torch"] == torch.__version__
        assert run["command"].startswith(f"python benchmarks/{name}.py --size tiny")
        assert run["command"] in run["text"] and run["commit"] in run["text"] and run["date"] in run["text"]
        for row in run["rows"]:
            assert f"| {row['side']} |" in run["text"]


def test_prompts_are_the_same_on_every_call_and_have_the_mix_of_lengths() -> None:
    prompts = measure.make_prompts(500, 152_064)
    assert prompts == measure.make_prompts(500, 152_064)
    lengths = sorted(len(prompt.token_ids) for prompt in prompts)
    assert lengths[0] >= 150 and lengths[-1] <= 2500
    assert lengths[250] == pytest.approx(700, rel=0.06)
    assert {prompt.answer for prompt in prompts} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("size", build_checkpoint.SIZES)
def test_block_weights_are_those_of_the_layers_matrices(size: str) -> None:
    from transformers import AutoModelForCausalLM

    config = build_checkpoint.make_config(size, 2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    assert measure.num_block_weights(config) == expected


def test_padded_batches() -> None:
    prompts = [measure.Prompt((7, 8, 9), 1), measure.Prompt((5,), 4)]
    (train,) = engines.padded_batches(prompts, 2, answers=True, device="cpu")
    assert train["input_ids"].tolist() == [[7, 8, 9, 17], [5, 20, 0, 0]]
    assert train["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert train["labels"].tolist() == [[-100, -100, -100, 17], [-100, 20, -100, -100]]
    (score,) = engines.padded_batches(prompts, 2, answers=False, device="cpu")
    assert score["input_ids"].tolist() == [[7, 8, 9], [0, 0, 5]]
    assert score["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


def test_packed_batches_keep_the_budget() -> None:
    prompts = [measure.Prompt((1,) * n, 0) for n in (2, 5, 3)]
    first, second = engines.packed_batches(prompts, 9, device="cpu")  # one answer each: 3, 6, 4 tokens
    assert first["packed_seq_lengths"].tolist() == [6, 3] and second["packed_seq_lengths"].tolist() == [4]
    assert first["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert first["labels"].tolist() == [[-100] * 5 + [16] + [-100] * 2 + [16]]


def test_rates_are_those_of_the_median_pass() -> None:
    row = measure.rates([2.0, 4.0, 3.0], tokens=600, questions=6)
    assert (row["tokens_per_s"], row["questions_per_s"]) == (200.0, 2.0)
    assert row["spread"] == pytest.approx(2 / 3)


def test_a_side_that_dies_is_a_row_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    script = 'print(\'RESULT {"side": "a", "loss": 1.5}\', flush=True)\nraise SystemExit(\'no memory left\')'
    (tmp_path / "benchmarks/dying.py").write_text(script)
    monkeypatch.setattr(children, "ROOT", tmp_path)
    rows: list[measure.Row] = []
    children._run_child("dying", ["a", "b"], tmp_path, Namespace(seconds=1.0), rows.append)
    assert rows == [{"side": "a", "loss": 1.5}, {"side": "b", "error": "exit status 1: no memory left"}]


def test_an_error_does_not_take_the_other_sides_along(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> measure.Row:
        raise ValueError("too long")

    measure.attempt("a", fails)
    measure.attempt("b", lambda: {"loss": 1.0})
    lines = [line.removeprefix(measure.RESULT) for line in capsys.readouterr().out.splitlines()]
    assert [json.loads(line) for line in lines] == [
        {"side": "a", "error": "ValueError: too long"},
        {"side": "b", "loss": 1.0},
    ]


def test_results_replace_a_side_and_keep_runs_with_other_settings(tmp_path: Path) -> None:
    machine = {"card": "Card X", "driver": None, "versions": {}, "matmul_tflops": 2.0, "block_weights": 10}
    row = {
        "tokens_per_s": 1e12,
        "questions_per_s": 1.0,
        "spread": 0.0,
        "pass_s": [1.0],
        "loss": 1.0,
        "flop_per_token": 1.0,
    }

    def write(size: str, side: str, **values: Any) -> list[dict[str, Any]]:
        args = Namespace(out=tmp_path, device="cpu", size=size)
        results = children.Results("score_speed", args, machine, score_speed.table)
        results.add({"side": side} | row | values)
        return json.loads((tmp_path / "score_speed_card-x.json").read_text())["runs"]  # type: ignore[no-any-return]

    write("7b", "ours")
    write("14b", "ours")
    write("7b", "hf-bs8", loss=2.0)
    other, mine = write("7b", "ours", spread=0.5)
    assert other["settings"]["size"] == "14b" and len(other["rows"]) == 1
    assert [(r["side"], r["spread"], r["share_of_matmul"]) for r in mine["rows"]] == [
        ("hf-bs8", 0.0, 0.5),
        ("ours", 0.5, 0.5),
    ]
    text = (tmp_path / "score_speed_card-x.md").read_text()
    assert text.count("differs") == 1 and text.count("## size") == 2
