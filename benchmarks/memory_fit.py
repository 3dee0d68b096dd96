"""Predicted against measured peak memory of one step of ours, over sizes, lengths of a pack and recompute plans.

    for size in 7b 14b 27b 32b; do python benchmarks/memory_fit.py --size $size --layers 16; done
    python benchmarks/memory_fit.py --size 32b --gpu-memory 31.7GiB --tokens 4096 --sides planned
    python benchmarks/memory_fit.py --size tiny --device cpu --tokens 64,128

none, half, all: training with so many layers that keep their activations; planned: with as many as ksat.memory allows; score:
no gradients. A pack is one prompt. Measured is torch.cuda.max_memory_allocated, with gradients and Adam's states alive in
training. Two of the training packs are probes, as at the start of train.py: they calibrate the second prediction. See README.md.
"""

import argparse
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import engines
from build_checkpoint import make_config
from children import be_child, markdown_table, number, run_sides
from measure import DIGITS, Row, attempt, parser_for, prepare_child

if TYPE_CHECKING:
    from ksat.encoding import EncodedQuestion
    from ksat.memory import MemoryPlan
    from ksat.packing import Pack

SIDES = ("score", "none", "half", "all", "planned")
TOLERANCE = (-0.03, 0.08)  # of (predicted - measured) / measured


def main(argv: list[str] | None = None) -> None:
    """Runs all packs and writes benchmarks/results/memory_fit_<card>.json and .md."""
    parser = parser_for(__doc__, SIDES)
    parser.add_argument("--tokens", default="512,1024,2048,4096", help="of a pack")
    args = parser.parse_args(argv)
    names = [f"{side}-{tokens}" for side in args.sides for tokens in args.tokens.split(",")]
    if args.child:
        be_child(args, lambda sides: _measure(sides, args))
    else:
        run_sides("memory_fit", args, [names], table)


def _measure(sides: Sequence[str], args: argparse.Namespace) -> None:
    """Scoring first, then training, whose optimizer stays."""
    prepare_child(args)
    model = engines.load_ours(args.checkpoint, args)
    questions = [_question(int(tokens), args) for tokens in args.tokens.split(",")]
    for training in (False, True):
        names = [name for name in sides if name.startswith("score") != training]
        if names:
            _measure_packs(model, names, questions, args, training=training)


def _measure_packs(
    model: Any, names: Sequence[str], questions: "list[EncodedQuestion]", args: argparse.Namespace, *, training: bool
) -> None:
    from ksat.packing import build_pack

    counted = calibrated = _plan(model, args, training=training)
    if training:
        model.model.train()
        _optimizer = engines.make_optimizer(model.model, args.device)  # its states are alive from here on
        calibrated = _calibrated(model, questions, args)
    for name in names:
        side, tokens = name.split("-")
        num_layers = len(model.layers)
        kept = {"score": 0, "none": 0, "half": num_layers // 2, "all": num_layers}
        num_kept = kept[side] if side in kept else calibrated.num_kept(int(tokens))
        row = next(i for i, question in enumerate(questions) if len(question.prompt_ids) == int(tokens))
        pack = build_pack(questions, [row], layout=model.layout)
        attempt(name, functools.partial(_peak, model, pack, num_kept, counted, calibrated, args))


def _question(num_tokens: int, args: argparse.Namespace) -> "EncodedQuestion":
    """A random prompt of so many tokens and five digits to choose from."""
    import numpy as np

    from ksat.encoding import EncodedQuestion

    vocab_size = make_config(args.size).vocab_size
    ids = np.random.default_rng(num_tokens).integers(vocab_size // 4, vocab_size // 2, num_tokens)
    digits = tuple((digit,) for digit in DIGITS)
    return EncodedQuestion(str(num_tokens), tuple(ids.tolist()), digits, (1.0,) * len(digits), 0)


def _plan(model: Any, args: argparse.Namespace, *, training: bool) -> "MemoryPlan":
    """The engine's plan; on the CPU, where it has none, one without a limit."""
    from ksat.memory import MemoryPlan, ModelShape, StepSettings
    from ksat.step_memory import memory_plan

    plan = memory_plan(model, rank=args.rank, training=training, over_vocabulary=False)
    if plan is None:
        plan = MemoryPlan(ModelShape.from_config(model.decoder.config), StepSettings(args.rank, training), float("inf"))
    if training:
        plan.settings = replace(plan.settings, adapter_bytes=16)  # Adam's states are in float32 here
    return plan


def _calibrated(model: Any, questions: "list[EncodedQuestion]", args: argparse.Namespace) -> "MemoryPlan":
    """The plan after the two probe packs with which train.py begins; on the CPU they can't be measured."""
    from ksat.step_memory import StepMemory, default_pack_tokens

    plan = _plan(model, args, training=True)
    if args.device == "cuda":
        budget = default_pack_tokens(plan, questions, model.layout)
        StepMemory(model, plan).calibrate(questions, budget, lambda pack: _step(model, pack))
    return plan


def _step(model: Any, pack: "Pack") -> None:
    """One forward pass, and a backward pass where gradients are on; gradients stay alive."""
    import torch

    scores = model.choice_scores(pack)
    if torch.is_grad_enabled():
        torch.nn.functional.cross_entropy(scores, torch.zeros_like(scores[:, 0]).long()).backward()
        model.model.zero_grad(set_to_none=False)


def _peak(
    model: Any,
    pack: "Pack",
    num_kept: int,
    counted: "MemoryPlan",
    calibrated: "MemoryPlan",
    args: argparse.Namespace,
) -> Row:
    """The row of one pack."""
    import torch

    model.keep_activations(num_kept)
    row: Row = {"tokens": pack.num_tokens, "kept_layers": num_kept, "layers": len(model.layers)}
    for column, plan in (("predicted_gib", counted), ("calibrated_gib", calibrated)):
        row[column] = plan.estimate(pack.num_tokens, num_kept).allocated / 2**30
    with torch.set_grad_enabled(counted.settings.training):
        _step(model, pack)  # kernels allocate workspaces when they first run
        if args.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        _step(model, pack)
    if args.device == "cuda":
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        for column in ("predicted", "calibrated"):
            row[f"{column}_error"] = row[f"{column}_gib"] / row["peak_gib"] - 1
    return row


def table(run: Row) -> str:
    """The run as a markdown table; errors outside of TOLERANCE are marked."""
    lines = []
    for row in run["rows"]:
        if "error" in row:
            lines.append([row["side"], row["error"]])
            continue
        layers = f"{row['kept_layers']} of {row['layers']}"
        columns = [row["side"], layers, number(row.get("peak_gib"), 2), number(row.get("reserved_gib"), 2)]
        for column in ("predicted", "calibrated"):
            columns += [number(row[f"{column}_gib"], 2), _percent(row.get(f"{column}_error"))]
        lines.append(columns)
    head = [
        "plan-tokens",
        "layers kept",
        "measured GiB",
        "reserved GiB",
        "predicted GiB",
        "error",
        "calibrated GiB",
        "error",
    ]
    low, high = (f"{100 * bound:+.0f} %" for bound in TOLERANCE)
    return markdown_table(head, lines) + f"\n\nErrors are marked outside of {low} to {high}.\n"


def _percent(error: float | None) -> str:
    if error is None:
        return ""
    text = f"{100 * error:+.1f} %"
    return text if TOLERANCE[0] <= error <= TOLERANCE[1] else f"**{text}**"


if __name__ == "__main__":
    main()
