"""Scoring speed on a 4-bit base with its adapter: plain transformers + peft, Unsloth, ours; and what shared prefixes save.

    python benchmarks/score_speed.py --size 32b
    python benchmarks/score_speed.py --size 32b --sides orders-1,orders-5-shared,orders-5-apart
    python benchmarks/score_speed.py --size tiny --device cpu --prompts 6 --median-tokens 70 --seconds 2

orders-5: 5 orders of the choices of a question, 700 shared and 200 own tokens each at the default --median-tokens; orders-1:
one of them. passage-3: 3 questions on one passage, likewise. "shared" computes the prefix once, "apart" every time; both count
the tokens of all prompts. One pass scores everything once, the first one is the warm-up. See README.md.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import engines
import numpy as np
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

GROUPS = (
    ("hf-bs1", "hf-bs8"),
    ("unsloth-bs1", "unsloth-bs8"),
    ("ours", "orders-1", "orders-5-shared", "orders-5-apart", "passage-3-shared", "passage-3-apart"),
)
FORWARD = 2  # FLOP a token and weight
SAME_LOSS = 1e-2
Scores = Callable[[], Any]  # -> (n, 5) scores of the digits


def main(argv: list[str] | None = None) -> None:
    """Runs the sides and writes benchmarks/results/score_speed_<card>.json and .md."""
    parser = parser_for(__doc__, [side for group in GROUPS for side in group])
    add_prompt_flags(parser)
    parser.add_argument("--pack-tokens", type=int, default=8192, help="of ours")
    args = parser.parse_args(argv)
    if args.child:
        be_child(args, lambda sides: _measure(sides, args))
        return
    groups = [[side for side in group if side in args.sides] for group in GROUPS]
    run_sides("score_speed", args, [group for group in groups if group], table)


def _measure(sides: Sequence[str], args: argparse.Namespace) -> None:
    if sides[0].startswith("unsloth"):
        import unsloth  # before anything else imports transformers
    prepare_child(args)
    if sides[0].startswith("hf"):
        model = engines.load_plain(args.checkpoint, args)
        model.eval()
    elif sides[0].startswith("unsloth"):
        model = engines.load_unsloth(args.checkpoint, args)
        unsloth.FastLanguageModel.for_inference(model)
    else:
        model = engines.load_ours(args.checkpoint, args)
    for side in sides:
        attempt(side, lambda side=side: _score(side, model, args))


def _score(side: str, model: Any, args: argparse.Namespace) -> Row:
    """The row of one side."""
    config = make_config(args.size, args.layers)
    prompts = make_prompts(args.prompts, config.vocab_size, median=args.median_tokens)
    num_computed = None
    if side.startswith(("orders", "passage")):
        prompts = _behind_prefixes(args, config.vocab_size, int(side.split("-")[1]))
    if side.startswith(("hf", "unsloth")):
        score = _baseline(side, model, prompts, args)
    else:
        score, num_computed = _ours(side, model, prompts, args)
    scores, row = timed_passes(score, seconds=args.seconds, device=args.device)
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    flop = FORWARD * num_block_weights(config) * (num_computed or num_tokens) / num_tokens
    row |= rates(row["pass_s"], tokens=num_tokens, questions=len(prompts), flop_per_token=flop)
    return row | {"loss": _loss(scores, prompts), "computed_tokens": num_computed}


def _loss(scores: Any, prompts: Sequence[Prompt]) -> float:
    """Mean of -log p(answer), p the softmax over the digits."""
    table = np.asarray(scores, dtype=np.float64)
    log_probs = table - np.logaddexp.reduce(table, axis=1, keepdims=True)
    return -float(log_probs[np.arange(len(prompts)), [prompt.answer for prompt in prompts]].mean())


def _baseline(side: str, model: Any, prompts: list[Prompt], args: argparse.Namespace) -> Scores:
    """One prompt at a time with all its logits, or batches by length, padded on the left, with one row of logits."""
    import torch

    size = int(side.split("-bs")[1])
    order = engines.by_length(prompts) if size > 1 else list(range(len(prompts)))
    batches = engines.padded_batches([prompts[i] for i in order], size, answers=False, device=args.device)
    rows = {} if size == 1 else {"logits_to_keep": 1}
    digits = torch.tensor(DIGITS, device=args.device)

    def score() -> Any:
        found = []
        with torch.inference_mode(), engines.autocast(args):
            for batch in batches:
                found.append(model(**batch, **rows, use_cache=False).logits[:, -1, digits].float().cpu())
        table = torch.empty(len(prompts), len(DIGITS))
        table[torch.tensor(order)] = torch.cat(found)
        return table

    return score


def _behind_prefixes(args: argparse.Namespace, vocab_size: int, num_branches: int) -> list[Prompt]:
    """Prompts of which `num_branches` neighbours share their first 7 of 9 parts."""
    rng = np.random.default_rng(1)
    prefix, suffix = args.median_tokens, args.median_tokens * 2 // 7
    prompts = []
    for _ in range(args.prompts):
        shared = rng.integers(vocab_size // 4, vocab_size // 2, prefix).tolist()
        for _ in range(num_branches):
            own = rng.integers(vocab_size // 4, vocab_size // 2, suffix).tolist()
            prompts.append(Prompt((*shared, *own), int(rng.integers(0, 5))))
    return prompts


def _ours(side: str, model: Any, prompts: list[Prompt], args: argparse.Namespace) -> tuple[Scores, int]:
    """Our scoring as inference.py calls it, and the tokens that it computes."""
    from ksat.encoding import EncodedQuestion
    from ksat.packing import build_pack, plan_packs
    from ksat.scoring import score_questions

    digits, ones = tuple((digit,) for digit in DIGITS), (1.0,) * len(DIGITS)
    questions = [EncodedQuestion(str(i), p.token_ids, digits, ones, p.answer) for i, p in enumerate(prompts)]
    model.layout = "flat" if side.endswith("apart") else "tree"
    plan = plan_packs(questions, args.pack_tokens, layout=model.layout)
    num_computed = sum(build_pack(questions, rows, layout=model.layout).num_tokens for rows in plan)
    return lambda: score_questions(model, questions, pack_tokens=args.pack_tokens), num_computed


def table(run: Row) -> str:
    """The run as a markdown table; losses that are not those of the same prompts' first side are marked."""
    rows: list[Row] = run["rows"]
    done = {row["side"]: row for row in rows if "error" not in row}
    one_order = statistics.median(done["orders-1"]["pass_s"]) if "orders-1" in done else None
    expected: dict[str, float] = {}
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["side"], row["error"]])
            continue
        wanted = expected.setdefault(_prompts_of(row["side"]), row["loss"])
        loss = f"{row['loss']:.4f}" + ("" if abs(row["loss"] - wanted) <= SAME_LOSS * abs(wanted) else " **differs**")
        mix = _prompts_of(row["side"]) == "mix"
        faster = row["tokens_per_s"] / done["unsloth-bs8"]["tokens_per_s"] if mix and "unsloth-bs8" in done else None
        cost = statistics.median(row["pass_s"]) / one_order if one_order and not mix else None
        lines.append([*speed_columns(row), loss, number(faster, 2), number(cost, 2)])
    return markdown_table([*SPEED_HEAD, "loss", "x unsloth-bs8", "cost / orders-1"], lines) + (
        f"\n\nShare: computed tokens/s x 2 x {run['machine']['block_weights']:.4g} weights of the layers / matmul rate. Loss: mean "
        f"of -log p(answer), which must agree to {SAME_LOSS:g} between sides with the same prompts. Cost: time for all orders "
        "(or questions) of a question (or passage), one order being 1.\n"
    )


def _prompts_of(side: str) -> str:
    kind, *rest = side.split("-")
    return f"{kind}-{rest[0]}" if kind in ("orders", "passage") else "mix"


if __name__ == "__main__":
    main()
