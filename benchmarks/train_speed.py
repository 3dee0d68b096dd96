"""Training speed of one LoRA step on a 4-bit base: plain transformers + peft, Unsloth at its default and at its best, ours.

    python benchmarks/train_speed.py --size 32b
    python benchmarks/train_speed.py --size 32b --gpu-memory 31.7GiB --sides unsloth-default,ours
    python benchmarks/train_speed.py --size 14b --profile sm70
    python benchmarks/train_speed.py --size tiny --device cpu --prompts 6 --median-tokens 70 --seconds 2

One pass is one optimizer step over all prompts: the loss is the mean over them of -log p(answer) over the vocabulary, AdamW
in float32 for every side. The first pass is the warm-up and gives the loss and the gradient's norm. See README.md.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import engines
from build_checkpoint import make_config
from children import SPEED_HEAD, be_child, markdown_table, number, run_sides, speed_columns
from measure import (
    DIGITS,
    Prompt,
    Row,
    add_prompt_flags,
    attempt,
    make_prompts,
    num_block_weights,
    parser_for,
    prepare_child,
    rates,
    timed_passes,
)

SIDES = ("hf-bs1", "hf-bs4", "unsloth-default", "unsloth-best", "ours", "ours-unsloth")
FORWARD_BACKWARD = 4  # FLOP a token and weight: 2 forward, 2 for the gradient of the activations; the weights have none
SAME_LOSS = 1e-3
COMPARED = ("unsloth-default", "unsloth-best")


def main(argv: list[str] | None = None) -> None:
    """Runs the sides and writes benchmarks/results/train_speed_<card>.json and .md."""
    parser = parser_for(__doc__, SIDES)
    add_prompt_flags(parser)
    parser.add_argument("--pack-tokens", type=int, help="of ours (default: what train.py takes)")
    parser.add_argument("--torch-profile", action="store_true", help="also writes the operators of one pass of ours")
    args = parser.parse_args(argv)
    if args.child:
        be_child(args, lambda sides: _measure(sides, args))
    else:
        run_sides("train_speed", args, [[side] for side in args.sides], table)


def _measure(sides: Sequence[str], args: argparse.Namespace) -> None:
    if any("unsloth" in side for side in sides):
        import unsloth  # noqa: F401  # before anything else imports transformers
    prepare_child(args)
    for side in sides:
        attempt(side, lambda side=side: _train(side, args))


@dataclass(slots=True)
class Side:
    """One engine, ready to train.

    Attributes:
        model: module with the trainable adapter.
        batches: of one pass.
        loss_of: a batch -> its part of the mean loss over all prompts, with its graph.
        notes: more columns of its row.
        begin: called once gradients and the optimizer's states are alive.
        lower: called when memory ran out; False if nothing can be done, else the pass is repeated.
    """

    model: Any
    batches: Sequence[Any]
    loss_of: Callable[[Any], Any]
    notes: Row = field(default_factory=dict)
    begin: Callable[[], None] = lambda: None
    lower: Callable[[], bool] = lambda: False


def _train(name: str, args: argparse.Namespace) -> Row:
    """The row of one side."""
    config = make_config(args.size, args.layers)
    prompts = make_prompts(args.prompts, config.vocab_size, median=args.median_tokens)
    side = _ours(name, prompts, args) if name.startswith("ours") else _baseline(name, prompts, args)
    side.model.train()
    one_pass = _optimizer_step(side, args)
    (loss, norm), row = timed_passes(one_pass, seconds=args.seconds, device=args.device)
    num_tokens, flop = sum(len(p.token_ids) for p in prompts), FORWARD_BACKWARD * num_block_weights(config)
    row |= rates(row["pass_s"], tokens=num_tokens, questions=len(prompts), flop_per_token=flop)
    row |= {"loss": loss, "gradient_norm": norm if math.isfinite(norm) else None, "batches": len(side.batches)}
    if args.torch_profile and name == "ours":
        row["profile"] = _profile(one_pass)
    adapter = next(parameter for parameter in side.model.parameters() if parameter.requires_grad)
    return row | side.notes | {"adapter_dtype": str(adapter.dtype)}


def _baseline(name: str, prompts: list[Prompt], args: argparse.Namespace) -> Side:
    import torch

    if name.startswith("hf"):
        model, size = engines.load_plain(args.checkpoint, args), int(name.removeprefix("hf-bs"))
        ordered = [prompts[i] for i in engines.by_length(prompts)] if size > 1 else prompts
        batches = engines.padded_batches(ordered, size, answers=True, device=args.device)
    else:
        is_best = name == "unsloth-best"
        model = engines.load_unsloth(args.checkpoint, args, keep_all=is_best)
        batches = engines.packed_batches(prompts, 4096 if is_best else 8192, device=args.device)
    num_prompts = torch.tensor(len(prompts), device=args.device)

    def loss_of(batch: Any) -> Any:
        with engines.autocast(args):
            return model(**batch, num_items_in_batch=num_prompts, use_cache=False).loss

    return Side(model, batches, loss_of)


def _ours(name: str, prompts: list[Prompt], args: argparse.Namespace) -> Side:
    """As train.py computes it, with its memory plan; the plan is told that Adam's states are in float32 here."""
    from ksat.encoding import EncodedQuestion
    from ksat.packing import Pack, build_pack, plan_packs
    from ksat.step_memory import StepMemory, default_pack_tokens, memory_plan

    model = engines.load_ours(args.checkpoint, args, "unsloth" if name == "ours-unsloth" else "transformers")
    # Nothing behind the prompt but the answer: what --loss vocab trains.
    questions = [EncodedQuestion(str(i), p.token_ids, ((DIGITS[p.answer],),), (1.0,), 0) for i, p in enumerate(prompts)]
    plan = memory_plan(model, rank=args.rank, training=True, over_vocabulary=True)
    if plan is not None:
        plan.settings = replace(plan.settings, adapter_bytes=16)
    pack_tokens = args.pack_tokens or default_pack_tokens(plan, questions, model.layout)
    memory = StepMemory(model, plan)
    packs = [
        build_pack(questions, rows, layout=model.layout)
        for rows in plan_packs(questions, pack_tokens, layout=model.layout)
    ]
    notes: Row = {"pack_tokens": pack_tokens, "kept_layers": {}, "predicted_gib": None}

    def loss_of(pack: Pack) -> Any:
        num_kept = memory.prepare(pack)
        notes["kept_layers"][pack.num_tokens] = num_kept
        if plan is not None:
            predicted = plan.estimate(pack.num_tokens, num_kept).allocated / 2**30
            notes["predicted_gib"] = max(notes["predicted_gib"] or 0.0, predicted)
        return -model.choice_scores(pack, over_vocabulary=True)[:, 0].sum() / len(questions)

    def probe(pack: Pack) -> None:
        (-model.choice_scores(pack, over_vocabulary=True).sum()).backward()
        model.model.zero_grad(set_to_none=False)  # gradients stay alive, as from the second pack of a step on

    return Side(
        model.model, packs, loss_of, notes, lambda: memory.calibrate(questions, pack_tokens, probe), memory.lower
    )


def _optimizer_step(side: Side, args: argparse.Namespace) -> Callable[[], tuple[float, float]]:
    """A function that trains on all batches once and returns the loss before, and the gradient's norm."""
    import torch

    optimizer = engines.make_optimizer(side.model, args.device)
    parameters = optimizer.param_groups[0]["params"]
    scaler = torch.amp.GradScaler(args.device, enabled=args.profile == "sm70" and args.device == "cuda")
    # Unsloth's loss computes its gradient in the forward pass, and asks here for the scale; nobody else reads it.
    side.model.get_base_model().accelerator_scaler = scaler if scaler.is_enabled() else None
    side.begin()
    optimizer.zero_grad(set_to_none=True)

    def backward() -> Any:
        total = torch.zeros((), device=args.device)
        for batch in side.batches:
            loss = side.loss_of(batch)
            scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def one_pass() -> tuple[float, float]:
        while True:
            try:
                total = backward()
                break
            except torch.OutOfMemoryError:
                if not side.lower():
                    raise
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return float(total), float(norm)

    return one_pass


def _profile(one_pass: Callable[[], Any]) -> str:
    """The 30 operators of one pass that take longest, as torch's profiler tells."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        one_pass()
    by = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=80))


def table(run: Row) -> str:
    """The run as a markdown table; losses that are not the first side's are marked."""
    rows: list[Row] = run["rows"]
    speed = {row["side"]: row["tokens_per_s"] for row in rows if "error" not in row}
    expected = next((row["loss"] for row in rows if "error" not in row), math.nan)
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["side"], row["error"]])
            continue
        same = abs(row["loss"] - expected) <= SAME_LOSS * abs(expected)
        factors = [number(row["tokens_per_s"] / speed[side], 2) if side in speed else "" for side in COMPARED]
        loss = f"{row['loss']:.4f}" + ("" if same else " **differs**")
        lines.append([*speed_columns(row), loss, number(row["gradient_norm"], 3), row["batches"], *factors])
    head = [*SPEED_HEAD, "first loss", "gradient norm", "batches", *(f"x {side}" for side in COMPARED)]
    return markdown_table(head, lines) + (
        f"\n\nShare: tokens/s x 4 x {run['machine']['block_weights']:.4g} weights of the layers / matmul rate. Losses are those "
        f"of the first pass and must agree to {SAME_LOSS:g}.\n"
    )


if __name__ == "__main__":
    main()
