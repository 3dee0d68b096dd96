"""Scoring on the CPU with the embedded model: questions a second against lm-evaluation-harness, and what choice orders cost.

    pip install -r benchmarks/requirements.txt
    python benchmarks/score_cpu.py

By text: our engine and lm-evaluation-harness's HFLM at several batch sizes score the same token ids; their log-likelihoods
must be equal. By label: 5 orders of every question's choices against one, beside the tokens that either computes. Each
engine has a process of its own with the same number of threads, every side is warmed up, and repeats go through all sides
in turn. Tokenising is nobody's time. Writes benchmarks/results/score_cpu.json and .md.
"""

import argparse
import functools
import importlib.util
import multiprocessing
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from ksat.encoding import EncodedQuestion, Encoder
from ksat.errors import InputError, exit_code
from ksat.files import write_json, write_text
from ksat.flags import positive
from ksat.orders import ChoiceOrders
from ksat.prompts import DEFAULT_TEMPLATES, ScoreBy
from ksat.questions import read_questions
from ksat.runs import library_versions

ROOT = Path(__file__).parent.parent
BASE = "embedded"
MAX_TOKENS = 4096
HARNESS_BATCHES = (1, 4, 8)
NUM_ORDERS = 5
TOLERANCE = 1e-3  # of a choice's summed log-likelihood, fp32
OURS, ONE_ORDER, ALL_ORDERS = "ours, text", "ours, label, 1 order", f"ours, label, {NUM_ORDERS} orders"


@dataclass(frozen=True, slots=True)
class Scored:
    """One pass over all questions.

    Attributes:
        seconds: that it took.
        others: share of the machine's CPU time that other processes took meanwhile; above 0.05 the pass says little.
        num_tokens: that went through the model, pads included.
        scores: of each question's choices, log-likelihoods.
    """

    seconds: float
    others: float
    num_tokens: int
    scores: list[list[float]]


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `run` returns, its seconds, and the share of the machine's CPU time that other processes took meanwhile."""
    import psutil

    def busy() -> float:
        return float(sum(psutil.cpu_times()[:3]))  # user, nice, system, of all cores

    before, own, started = busy(), time.process_time(), time.perf_counter()
    result = run()
    seconds = time.perf_counter() - started
    others = busy() - before - (time.process_time() - own)
    return result, seconds, max(0.0, others / seconds / (os.cpu_count() or 1))


@functools.cache
def _our_model(num_threads: int) -> Any:
    import torch

    from ksat import models
    from ksat.devices import find_device

    torch.set_num_threads(num_threads)
    device = find_device("cpu")
    return models.load(models.LoadSettings(BASE, "transformers", device, "float32", False, MAX_TOKENS))


def encode(test: Path, limit: int | None, score_by: ScoreBy, num_orders: int) -> list[EncodedQuestion]:
    """Every question in up to `num_orders` orders of its choices, as inference.py encodes them."""
    from ksat.models import load_tokenizer

    encoder = Encoder(load_tokenizer(BASE), DEFAULT_TEMPLATES[score_by], score_by, max_tokens=MAX_TOKENS)
    questions = read_questions(test)[:limit]
    return [
        order for question in questions for order in encoder.encode_orders(question, ChoiceOrders("cyclic", num_orders))
    ]


def score_ours(encoded: Sequence[EncodedQuestion], num_threads: int) -> Scored:
    """One pass of our engine with the packs that inference.py would take; scores are undivided log-likelihoods."""
    from ksat.packing import build_pack, plan_packs
    from ksat.scoring import score_questions
    from ksat.step_memory import CPU_PACK_TOKENS

    model = _our_model(num_threads)
    scores, seconds, others = timed(lambda: score_questions(model, encoded, pack_tokens=CPU_PACK_TOKENS))
    plan = plan_packs(encoded, CPU_PACK_TOKENS, layout=model.layout)
    num_tokens = sum(build_pack(encoded, rows, layout=model.layout).num_tokens for rows in plan)
    sums = [(row[: len(q.divisors)] * q.divisors).tolist() for row, q in zip(scores, encoded, strict=True)]
    return Scored(seconds, others, num_tokens, sums)


@functools.cache
def _harness_model(num_threads: int) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ksat.embedded import embedded_path

    torch.set_num_threads(num_threads)
    path = embedded_path(BASE)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def score_harness(encoded: Sequence[EncodedQuestion], num_threads: int, batch_size: int) -> Scored:
    """One pass of lm-evaluation-harness over the same token ids: one request a choice, as its multiple-choice tasks do."""
    import logging

    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,unused-ignore]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of being handed a loaded model
    model, tokenizer = _harness_model(num_threads)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    requests = [
        ((question.id, str(k)), list(question.prompt_ids), list(continuation))
        for question in encoded
        for k, continuation in enumerate(question.continuations)
    ]
    shapes: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].numel()))
    answers, seconds, others = timed(lambda: harness._loglikelihood_tokens(requests, disable_tqdm=True))
    hook.remove()
    sums = iter(answers)
    scores = [[next(sums)[0] for _ in question.continuations] for question in encoded]
    return Scored(seconds, others, sum(shapes), scores)


@dataclass(frozen=True, slots=True)
class Side:
    """A row of the table: what it scores, and one pass of it in its own process."""

    name: str
    encoded: Sequence[EncodedQuestion]
    run: Callable[[Sequence[EncodedQuestion]], Scored]

    @property
    def num_questions(self) -> int:
        return len({question.id for question in self.encoded})


def measure(sides: Sequence[Side], repeats: int) -> dict[str, list[Scored]]:
    """`repeats` passes of every side, in turn; before them three questions each, not counted."""
    for side in reversed(sides):
        side.run(side.encoded[:3])
    passes: dict[str, list[Scored]] = {side.name: [] for side in sides}
    for i in range(repeats):
        for side in sides:
            scored = side.run(side.encoded)
            passes[side.name].append(scored)
            print(f"repeat {i + 1}: {side.name}: {scored.seconds:.1f} s, others {scored.others:.0%}", file=sys.stderr)
    return passes


def largest_difference(passes: dict[str, list[Scored]]) -> float:
    """Between our log-likelihood of a choice and lm-evaluation-harness's, over all choices, batch sizes and repeats."""
    ours = np.concatenate(passes[OURS][0].scores)
    others = [scored for name, runs in passes.items() if name.startswith("lm-eval") for scored in runs]
    return max(float(np.abs(np.concatenate(scored.scores) - ours).max()) for scored in others)


def summarise(sides: Sequence[Side], passes: dict[str, list[Scored]]) -> dict[str, Any]:
    """Medians over the repeats, and the four figures that are asked for."""
    rows: list[dict[str, Any]] = []
    for side in sides:
        seconds = [scored.seconds for scored in passes[side.name]]
        rows.append(
            {
                "side": side.name, "num_questions": side.num_questions, "num_tokens": passes[side.name][0].num_tokens,
                "seconds": seconds, "others": [scored.others for scored in passes[side.name]],
                "questions_per_second": side.num_questions / statistics.median(seconds),
            }
        )  # fmt: skip
    by_name = {row["side"]: row for row in rows}
    best = max(row["questions_per_second"] for row in rows if row["side"].startswith("lm-eval"))
    one, orders = by_name[ONE_ORDER], by_name[ALL_ORDERS]
    time_ratio = statistics.median(orders["seconds"]) / statistics.median(one["seconds"])
    token_ratio = orders["num_tokens"] / one["num_tokens"]
    figures = {
        "text_speedup": by_name[OURS]["questions_per_second"] / best,
        "orders_time_ratio": time_ratio,
        "orders_token_ratio": token_ratio,
        "orders_time_over_tokens": time_ratio / token_ratio,
        "largest_difference": largest_difference(passes),
    }
    return {"sides": rows, **figures}


def markdown(report: dict[str, Any]) -> str:
    """The report as a page: where it ran, the table, the figures beside what they must reach."""
    lines = [
        f"# Scoring on the CPU, embedded model ({report['date']})", "",
        f"{report['cpu']}, {report['num_threads']} threads; {', '.join(f'{k} {v}' for k, v in report['versions'].items())}; "
        f"commit {report['commit']}.",
        f"Command: `{report['command']}`. Medians of {report['repeats']} repeats, [least, most]; of the CPU time of others the most.", "",
        "| side | questions | tokens computed | seconds | questions/s | CPU time of others |",
        "| --- | --: | --: | --: | --: | --: |",
    ]  # fmt: skip
    for row in report["sides"]:
        seconds, num = row["seconds"], row["num_questions"]
        lines.append(
            f"| {row['side']} | {num} | {row['num_tokens']:,} | {statistics.median(seconds):.1f} [{min(seconds):.1f}, {max(seconds):.1f}] "
            f"| {num / statistics.median(seconds):.2f} [{num / max(seconds):.2f}, {num / min(seconds):.2f}] | {max(row['others']):.0%} |"
        )
    lines += [
        "", "| figure | measured | must reach |", "| --- | --: | --: |",
        f"| by text, questions/s, ours / the best lm-eval | {report['text_speedup']:.2f} | >= 1.5 |",
        f"| largest difference of a choice's log-likelihood | {report['largest_difference']:.1e} | <= {TOLERANCE:.0e} |",
        f"| by label, {NUM_ORDERS} orders / 1 order, seconds | {report['orders_time_ratio']:.2f} | <= 2.5 |",
        f"| by label, {NUM_ORDERS} orders / 1 order, tokens computed | {report['orders_token_ratio']:.2f} | |",
        f"| seconds over tokens | {report['orders_time_over_tokens']:.2f} | <= 1.2 |", "",
    ]  # fmt: skip
    return "\n".join(lines)


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the numbers besides the code: machine, versions, commit, command, load."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    git = functools.partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=True)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    changed = git(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip()
    return {
        "date": date.today().isoformat(), "cpu": f"{cpu}, {os.cpu_count()} cores", "num_threads": args.threads,
        "versions": {**library_versions(), "lm_eval": metadata.version("lm_eval")},
        "commit": commit + (" with uncommitted changes" if changed else ""),
        "command": shlex.join(["python", "benchmarks/score_cpu.py", *sys.argv[1:]]), "repeats": args.repeats,
    }  # fmt: skip


def main() -> None:
    """Measures all sides, writes the report, and fails if the log-likelihoods differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", default=ROOT / "data/sample_test.csv", type=Path, metavar="CSV")
    parser.add_argument("--limit", type=positive, metavar="N", help="take the first N questions (default: all)")
    parser.add_argument(
        "--text-limit", type=positive, default=30, metavar="N",
        help="and the first N of these by text: lm-eval needs about 3 s a question on 2 cores (default: 30)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=3, metavar="N")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), metavar="N", help="(default: all cores)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/score_cpu", metavar="STEM")
    args = parser.parse_args()
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("lm_eval is not installed; run: pip install -r benchmarks/requirements.txt")
    os.environ["TQDM_DISABLE"] = "1"
    report = environment(args)

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as ours, ProcessPoolExecutor(1, mp_context=spawn) as harness:

        def in_ours(encoded: Sequence[EncodedQuestion]) -> Scored:
            return ours.submit(score_ours, encoded, args.threads).result()

        def in_harness(batch_size: int) -> Callable[[Sequence[EncodedQuestion]], Scored]:
            return lambda encoded: harness.submit(score_harness, encoded, args.threads, batch_size).result()

        texts = ours.submit(encode, args.test, min(args.text_limit, args.limit or args.text_limit), "text", 1).result()
        one, orders = (ours.submit(encode, args.test, args.limit, "label", n).result() for n in (1, NUM_ORDERS))
        sides = [Side(f"lm-eval, text, batch {n}", texts, in_harness(n)) for n in HARNESS_BATCHES]
        sides += [Side(OURS, texts, in_ours), Side(ONE_ORDER, one, in_ours), Side(ALL_ORDERS, orders, in_ours)]
        report |= summarise(sides, measure(sides, args.repeats))
    write_json(args.out.with_suffix(".json"), report)
    page = markdown(report)
    write_text(args.out.with_suffix(".md"), page)
    print(page)
    if not report["largest_difference"] <= TOLERANCE:
        raise RuntimeError(f"log-likelihoods differ by {report['largest_difference']:.1e}, allowed {TOLERANCE:.0e}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
