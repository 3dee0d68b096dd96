"""Score every choice of every question: competition CSV -> submissions/<name>.probs.csv and <name>.csv.

python inference.py --ckpt checkpoints/first
python inference.py --base unsloth/Qwen2.5-32B-Instruct-bnb-4bit --shots 2 --out untuned
python inference.py --ckpt checkpoints/first --test data/sample_test.csv --answers data/sample_test_answers.csv
"""

import argparse
import contextlib
import hashlib
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksat.context import NO_CONTEXT, ContextRule
from ksat.errors import InputError, exit_code
from ksat.flags import (
    KINDS_HELP,
    ArgumentParser,
    add_engine_flags,
    data_file,
    file_name,
    kinds_file,
    not_negative,
    path_text,
    positive,
    require_label,
)
from ksat.kinds import WORDING
from ksat.orders import ONE_ORDER, ChoiceOrders

if TYPE_CHECKING:
    from ksat.devices import Device
    from ksat.predictions import IntArray, Predictions
    from ksat.questions import Question
    from ksat.runs import Run


def build_parser() -> argparse.ArgumentParser:
    """The command line. What a checkpoint knows is inherited from it; a flag that contradicts it is refused."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", type=file_name, metavar="FOLDER", help="a run of train.py, checkpoints/<run>")
    add(
        "--base",
        type=file_name,
        metavar="BASE",
        help="an untuned base instead: hub name, folder, embedded or embedded-small",
    )
    add(
        "--score-by",
        choices=("label", "text"),
        help="score a choice's digit or its text (default: the run's; label; embedded bases: text)",
    )
    add(
        "--quantization",
        choices=("nf4", "none"),
        help="of the weights while loading (default: the run's; nf4 on CUDA, none for embedded bases and on the CPU)",
    )
    add("--prompt", type=file_name, metavar="FILE", help="replaces the prompt's wording, for untuned bases")
    add(
        "--context-when",
        type=ContextRule.parse,
        metavar="RULE",
        help="who gets its text of the column 'context' into the prompt: all, kind=knowledge, kind=reading, short:N (passages "
        "under N characters) or none (default: the run's; none)",
    )
    add(
        "--max-tokens",
        type=positive,
        metavar="TOKENS",
        help="a prompt's limit; longer ones lose the middle of the passage (default: the run's; 4096)",
    )
    add(
        "--shots",
        type=not_negative,
        default=0,
        metavar="N",
        help="put N training questions before each, for untuned bases (default: 0)",
    )
    add(
        "--train",
        type=file_name,
        metavar="CSV",
        help="where the shots come from (default: data/train.csv, else the samples)",
    )
    add(
        "--choice-orders",
        type=ChoiceOrders.parse,
        default=ONE_ORDER,
        metavar="K|reverse|random:K",
        help="score several orders of every question's choices and average their log-probabilities: K rotations, the row's own "
        "and its reverse, or K random ones; label only; costs the choices, not the passage, as often (default: 1)",
    )
    add(
        "--debias",
        choices=("pride",),
        help="ask a twentieth of the questions in all orders, and divide the digits' prior that they show out of the others; "
        "label only",
    )
    add = parser.add_argument_group("data").add_argument
    add("--test", type=file_name, metavar="CSV", help="questions to score (default: data/test.csv, else the samples)")
    add(
        "--answers", type=file_name, metavar="CSV", help="gold answers, to print metrics; not needed if --test has them"
    )
    add("--kinds", type=file_name, metavar="FILE|wording", help=KINDS_HELP)
    add("--limit", type=positive, metavar="N", help="score the first N questions")
    add(
        "--out",
        type=path_text,
        metavar="NAME",
        help="submissions/NAME, or a path's stem (default: the run's or the base's name, and what else is asked for)",
    )
    add("--overwrite", action="store_true", help="replace the output if it exists")
    add_engine_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Scores one test file with one model."""
    args = build_parser().parse_args(argv)
    from ksat import processes
    from ksat.context import take_context
    from ksat.devices import open_device
    from ksat.files import claim_outputs, file_sha256
    from ksat.journal import Journal
    from ksat.predictions import submission_paths, write_predictions
    from ksat.questions import read_questions

    test, _ = data_file(args.test, "--test", Path("data/test.csv"))
    device = open_device(args.device, args.gpu_memory, offload_embedding=args.offload_embedding)
    run = _read_run(args)
    shots = _shots(args)
    setup = _setup(args, device, run)
    rule = ContextRule(setup["context_when"])
    if args.kinds and not rule.asks_kind:
        raise InputError(
            "--kinds: here kinds decide only who gets a context; add --context-when kind=..., or leave it out"
        )
    require_label(args.choice_orders, setup["score_by"])
    questions = read_questions(test, kinds=setup["kinds"])[: args.limit]
    args.choice_orders = args.choice_orders.at_most(questions)
    if shots:
        setup["shots"] = args.shots = _shots_at_most(args.shots, *shots, questions)
    if args.debias and (setup["score_by"] != "label" or args.choice_orders.count > 1):
        raise InputError(
            "--debias pride: it corrects digits in one order of the choices; leave out --choice-orders, and score by label"
        )
    paths = submission_paths(_default_name(args, test) if args.out is None else args.out)
    kinds = kinds_file(setup["kinds"])
    setup["kinds_sha256"] = file_sha256(kinds) if kinds else None
    inputs = [test, args.answers, args.train, args.prompt, kinds]
    claim = claim_outputs(paths.all, inputs=inputs, overwrite=args.overwrite, command=vars(args))
    with claim if processes.is_main() else contextlib.nullcontext() as outputs:
        wording = setup["template"]["user"]
        questions = take_context(questions, rule, wording, str(test), setup["choices_tell_kinds"])
        gold = _gold(args, test, questions)
        predictions, report = _score(args, setup, run, device, test, questions, paths.probs, gold, shots)
        if outputs is not None:
            journal = _journal_path(paths.probs)
            write_predictions(outputs, predictions, report, before_done=lambda: Journal.remove(journal))
            print(f"wrote {paths.probs} and {paths.submission}: {len(predictions.ids)} questions")
    if gold is not None:
        _print_metrics(predictions, questions, gold, run, shots)


def _gold(args: argparse.Namespace, test: Path, questions: "list[Question]") -> "IntArray | None":
    """(N,) the gold answers, None where they are not all known; read before hours of scoring, not after them.

    Raises:
        InputError: --answers does not cover the questions, or fits other ones.
    """
    import numpy as np

    from ksat.predictions import Predictions, align_answers, read_answers
    from ksat.questions import MAX_CHOICES

    labelled = {question.id: question.answer for question in questions if question.answer is not None}
    if not args.answers and len(labelled) < len(questions):
        return None
    counts = np.array([[question.num_choices] for question in questions])
    uniform = np.where(np.arange(MAX_CHOICES) < counts, 1 / counts, np.nan)
    gold = read_answers(args.answers) if args.answers else labelled
    return align_answers(Predictions(tuple(question.id for question in questions), uniform), gold, args.answers or test)


def _read_run(args: argparse.Namespace) -> "Run | None":
    """The run to score with, None for an untuned base."""
    from ksat.runs import read_run

    if not (args.ckpt or args.base):
        raise InputError("name what to score with: --ckpt checkpoints/<run>, or --base for an untuned base")
    return read_run(Path(args.ckpt)) if args.ckpt else None


def _setup(args: argparse.Namespace, device: "Device", run: "Run | None") -> dict[str, Any]:
    """What is scored with what: inherited from the run, or from the flags for an untuned base.

    Raises:
        InputError: a flag that contradicts run.json.
    """
    from ksat.models import default_quantization, is_embedded
    from ksat.prompts import DEFAULT_TEMPLATES, read_template

    if run is None:
        score_by: Any = args.score_by or ("text" if is_embedded(args.base) else "label")
        template = read_template(args.prompt, score_by) if args.prompt else DEFAULT_TEMPLATES[score_by]
        return {
            "base": args.base, "score_by": score_by, "template": template.to_dict(), "max_tokens": args.max_tokens or 4096, "scale": 1.0,
            "quantization": args.quantization or default_quantization(args.base, device), "adapter_sha256": None, "base_identity": {}, "data": [], "shots": args.shots,
            "rank": 0, "context_when": (args.context_when or NO_CONTEXT).name, "kinds": args.kinds, "choices_tell_kinds": None,
        }  # fmt: skip
    for name in ("base", "score_by", "max_tokens", "quantization"):
        given, inherited = getattr(args, name), getattr(run, name)
        if given is not None and given != inherited:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag} {given}: {args.ckpt}/run.json says {inherited}; leave {flag} out, or train another run"
            )
    print(
        f"{args.ckpt}: base {run.base}, scored by {run.score_by}, scale {run.scale:.3g}, prompts up to {run.max_tokens} tokens, weights {run.quantization}"
    )
    names = (
        "base",
        "base_identity",
        "score_by",
        "template",
        "max_tokens",
        "scale",
        "quantization",
        "adapter_sha256",
        "data",
    )
    # A run may be asked without its context, or with another rule: that is how its worth is found.
    rule = args.context_when or run.context_rule
    inherited = run.settings.get("kinds")
    if rule.asks_kind and not args.kinds:
        if run.choices_tell_kinds is None:
            print(
                f"warning: {args.ckpt} does not say whether the number of choices told kinds in its training, so --context-when {rule.name} may "
                "take other rows; --kinds wording goes by the wording alone",
                file=sys.stderr,
            )
        if kinds_file(inherited):
            print(
                f"warning: {inherited} told the kinds of the rows that {args.ckpt} was trained on, and is not carried over; --kinds FILE tells "
                "those of --test",
                file=sys.stderr,
            )
    return {name: getattr(run, name) for name in names} | {
        "shots": 0,
        "rank": run.settings["rank"],
        "context_when": rule.name,
        "kinds": args.kinds or (WORDING if inherited == WORDING else None),
        "choices_tell_kinds": False if args.kinds == WORDING else run.choices_tell_kinds,
    }


def _default_name(args: argparse.Namespace, test: Path) -> str:
    """The run's or the base's name, and whatever else was asked for: two commands that score otherwise do not meet."""
    from ksat.hub import is_hub_name

    # A hub's owner tells as much as its name; ../NAME that is not there is no hub's, and "." has a name too.
    is_hub = not args.ckpt and is_hub_name(args.base) and not re.search(r"(^|/)\.", args.base)
    model = args.base if is_hub else os.path.basename(os.path.abspath(args.ckpt or args.base))
    asked = [
        not args.ckpt and "untuned",
        args.score_by and not args.ckpt and f"by-{args.score_by}",
        args.quantization and not args.ckpt and f"weights-{args.quantization}",
        args.prompt and Path(args.prompt).stem,
        args.max_tokens and not args.ckpt and f"{args.max_tokens}-tokens",
        args.context_when and f"context-{args.context_when.name}",
        args.kinds and f"kinds-{Path(args.kinds).stem}",
        args.shots and f"{args.shots}-shots",
        args.shots and args.train and f"of-{Path(args.train).stem}",
        args.choice_orders.count > 1 and f"orders-{args.choice_orders.name}",
        args.debias,
        args.limit and f"first-{args.limit}",
        args.dtype != "auto" and args.dtype,
        args.test and test.stem,
    ]
    # Two files of one name elsewhere would meet: a hash of where they lie tells them apart.
    expected = [
        (args.ckpt, "checkpoints"),
        (None if is_hub else args.base, ""),
        (args.prompt, "prompts"),
        (kinds_file(args.kinds), "data"),
        (args.train, "data"),
        (args.test, "data"),
    ]
    given = [(os.path.relpath(path), folder) for path, folder in expected if path]
    if elsewhere := [path for path, folder in given if os.path.dirname(path) != folder]:
        asked.append(hashlib.sha256("\n".join(elsewhere).encode()).hexdigest()[:6])
    return re.sub(r"[^\w.-]+", "-", "-".join([model, *(str(part) for part in asked if part)]))


def _score(
    args: argparse.Namespace,
    setup: dict[str, Any],
    run: "Run | None",
    device: "Device",
    test: Path,
    questions: "list[Question]",
    probs_path: Path,
    gold: "IntArray | None",
    shots: "tuple[Path, list[Question]] | None",
) -> "tuple[Predictions, dict[str, Any]]":
    """Probabilities in the test file's order, and the report that goes beside them; resumes from a partial file."""
    from ksat import models, processes
    from ksat.devices import peak_memory_gib
    from ksat.encoding import Encoder
    from ksat.files import file_sha256
    from ksat.fit import TYPICAL_TOKENS, check_room
    from ksat.identity import identify_files, name_difference
    from ksat.journal import Journal
    from ksat.orders import ALL_ORDERS
    from ksat.position_bias import debias, estimate_priors, probed_rows, report_orders
    from ksat.predictions import Predictions
    from ksat.prompts import PromptTemplate
    from ksat.provenance import training_of
    from ksat.runs import library_versions, require_same_run, soup_members
    from ksat.scoring import average_orders, choice_probs, score_questions
    from ksat.step_memory import scoring_pack_tokens

    dtype = models.choose_dtype(args.dtype, device, setup["base"])
    engine = models.choose_engine(
        args.engine,
        device,
        dtype,
        setup["base"],
        shares=setup["score_by"] == "text" or args.choice_orders.count > 1 or bool(args.debias),
        offload_embedding=args.offload_embedding,
    )
    report: dict[str, Any] = {
        **setup, "test": str(test), "test_sha256": file_sha256(test), "num_questions": len(questions), "engine": engine, "dtype": dtype,
        "device": device.name, "versions": library_versions(), "choice_orders": args.choice_orders.name, "debias": args.debias,
    }  # fmt: skip
    pool: list[Question] = []
    if shots:
        source, pool = shots
        report |= {"shots_from": str(source), "shots_sha256": file_sha256(source)}
    nf4, flag = setup["quantization"] == "nf4", f"--ckpt {args.ckpt}, base" if args.ckpt else "--base"
    warning = check_room(
        setup["base"],
        device,
        rank=setup["rank"],
        nf4=nf4,
        dtype=dtype,
        tokens=min(TYPICAL_TOKENS, setup["max_tokens"]),
        offload_embedding=args.offload_embedding,
        training=False,
        flag=flag,
    )
    if warning and processes.is_main():
        print(f"warning: {warning}", file=sys.stderr)
    settings = models.LoadSettings(
        setup["base"],
        engine,
        device,
        dtype,
        nf4,
        setup["max_tokens"],
        args.trust_remote_code,
        args.share_prefixes,
        args.offload_embedding,
        flag,
    )
    model = models.load(settings, adapter=Path(args.ckpt) / "adapter" if args.ckpt else None)
    if run is not None:
        require_same_run(Path(args.ckpt), run)
    base_files = identify_files(setup["base"])  # of what was just loaded
    report["base_identity"] = base_files["base"]
    if (difference := name_difference(setup["base_identity"], report["base_identity"])) and processes.is_main():
        print(
            f"warning: --base {setup['base']} is not the one that {args.ckpt} was trained on ({difference}): these are scores of another "
            "model; put that base back to get the run's own",
            file=sys.stderr,
        )
    encoder = Encoder(
        model.tokenizer,
        PromptTemplate(**setup["template"]),
        setup["score_by"],
        max_tokens=setup["max_tokens"],
        shots=pool,
        num_shots=setup["shots"],
    )
    probed = probed_rows(questions) if args.debias else set()
    encoded = [
        order
        for row, question in enumerate(questions)
        for order in encoder.encode_orders(question, ALL_ORDERS if row in probed else args.choice_orders)
    ]
    # Agreed, since free memory differs from card to card and all processes have to plan the same packs.
    pack_tokens = processes.agree(
        args.pack_tokens
        or scoring_pack_tokens(model, encoded, rank=setup["rank"], over_vocabulary=setup["score_by"] == "text")
    )
    report["layout"] = model.layout
    # The first thing that is written.
    key = report | {"base_files": base_files}
    journal = Journal(
        _journal_path(probs_path), key, pack_tokens=pack_tokens, part=processes.rank(), num_parts=processes.num_processes(),
        overwrite=args.overwrite,
    )  # fmt: skip
    report["pack_tokens"] = args.pack_tokens or processes.agree(journal.pack_tokens)
    report |= {
        "run": Path(args.ckpt).resolve().name if args.ckpt else None,
        "soup_of": soup_members(run) if run else [],
        "training": training_of(run.settings) if run else {},
        "num_cut": sum(e.num_cut_characters > 0 for e in encoded),
        "num_cut_context": sum(e.num_cut_context > 0 for e in encoded),
        "num_dropped_shots": sum(e.num_dropped_shots for e in encoded),
    }
    if report["num_cut"] or report["num_cut_context"] or report["num_dropped_shots"]:
        print(
            f"to keep to --max-tokens {report['num_cut']} prompts lose the middle of their passage, {report['num_cut_context']} the end of "
            f"their context; {report['num_dropped_shots']} shots are left out, for that or because they are of the question's own passage"
        )
    if journal.scores:
        print(f"resuming: {len(journal.scores)} of {len(encoded)} prompts are scored already", file=sys.stderr)
    num_waiting = len({order.id for order in encoded if order.key not in journal.scores})
    started = time.monotonic()
    scores = score_questions(
        model, encoded, pack_tokens=report["pack_tokens"], done=journal.scores, on_scored=journal.add
    )
    seconds = time.monotonic() - started  # of this call; an interrupted one before it does not count
    report["questions_per_second"] = round(num_waiting / seconds, 3) if num_waiting else None
    report["peak_memory_gib"] = round(peak_memory_gib(), 2)
    asked = scores
    if args.debias:
        priors = estimate_priors(encoded, scores)
        report["priors"] = {size: [round(float(share), 4) for share in prior] for size, prior in sorted(priors.items())}
        scores = debias(encoded, scores, priors)
    probs = choice_probs(average_orders(encoded, scores) if len(encoded) > len(questions) else scores, setup["scale"])
    if len(encoded) > len(questions) and processes.is_main():
        positions = report_orders(encoded, asked, probs, gold)
        report["positions"] = positions.to_dict()
        print(f"\n{positions.format()}\n")
    return Predictions(tuple(question.id for question in questions), probs), report


def _journal_path(probs_path: Path) -> Path:
    return probs_path.with_name(f".{probs_path.name}.partial")


def _shots(args: argparse.Namespace) -> "tuple[Path, list[Question]] | None":
    """The file of the shots, and its labelled questions in a fixed random order: each test question takes the first that
    may stand before it; None without shots.

    Raises:
        InputError: --train without --shots, shots for a run.
    """
    import random

    from ksat.questions import read_questions

    if args.ckpt and (args.prompt or args.shots):
        raise InputError(
            f"--prompt and --shots are for untuned bases; {args.ckpt} was trained with its own prompt: leave them out"
        )
    if not args.shots:
        if args.train:
            raise InputError("--train is where shots come from; give --shots N with --base, or leave it out")
        return None
    source, _ = data_file(args.train, "--train", Path("data/train.csv"))
    pool = NO_CONTEXT.apply(read_questions(source, labelled=True))
    random.Random(0).shuffle(pool)
    return source, pool


def _shots_at_most(asked: int, source: Path, pool: "list[Question]", questions: "list[Question]") -> int:
    """--shots, or as many as any question can get where that is fewer, which is said: what is recorded is what was done."""
    from ksat.encoding import usable_shots

    most = 0
    for question in questions:  # the first one decides, unless the pool is hardly larger than what is asked for
        most = max(most, len(usable_shots(question, pool, asked)))
        if most == asked:
            return asked
    print(
        f"--shots {asked}: of the {len(pool)} questions in {source} at most {most} may stand before another one, none before its own "
        f"passage; --shots {most} is taken"
    )
    return most


def _print_metrics(
    predictions: "Predictions",
    questions: "list[Question]",
    gold: "IntArray",
    run: "Run | None",
    shots: "tuple[Path, list[Question]] | None",
) -> None:
    from ksat.metrics import baseline_metrics, compute_metrics, count_positions, format_table
    from ksat.near_duplicates import passage_groups
    from ksat.predictions import sizes_and_answers

    groups = passage_groups(questions)
    positions = run.settings.get("answer_positions") if run else None  # a soup's training rows are not known
    if shots:
        positions = count_positions(*sizes_and_answers(shots[1]))
    rows = baseline_metrics(predictions.num_choices, gold, groups, positions)
    print(format_table([*rows, ("this model", compute_metrics(predictions.probs, gold, groups))]))


if __name__ == "__main__":
    sys.exit(exit_code(main, "the same command goes on with what is scored"))
