"""Fine-tune a LoRA on a base: competition CSV -> checkpoints/<run>/.

python train.py                                      # data/train.csv; the base follows from the GPU
python train.py --run first --base unsloth/Qwen2.5-32B-Instruct-bnb-4bit --epochs 2
python train.py --run first --resume                 # goes on after an interruption
python train.py --run all --valid-fraction 0         # refits on every row
python train.py --valid other.csv                    # and shows after every epoch what training does to rows of another kind
python train.py --data-report                        # what is in the data; with --oof, labels that may be wrong
python train.py --run cv --folds 5 --all             # five folds, and their out-of-fold probabilities as one file
accelerate launch --num_processes 2 train.py         # the same run on two GPUs
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksat.context import ContextRule
from ksat.errors import InputError, exit_code
from ksat.files import require_name
from ksat.flags import (
    KINDS_HELP,
    ArgumentParser,
    add_engine_flags,
    data_file,
    file_name,
    kinds_file,
    not_negative,
    number,
    positive,
    require_label,
    require_read,
)
from ksat.orders import ChoiceOrders
from ksat.run_folders import (
    CHECKPOINTS,
    SEAL,
    RunFolder,
    claim_fresh_run,
    claim_run,
    remove_run,
    require_run,
)

if TYPE_CHECKING:
    from ksat.devices import Device
    from ksat.encoding import EncodedQuestion, Encoder
    from ksat.folds import Folds
    from ksat.questions import Question
    from ksat.validation import Validation

REPORTS = Path("reports")
SCALE_ROWS = 256  # training rows that a scale is fitted on; docs/architecture.md says how far off it is
DEFAULT_TEST = Path("data/test.csv")
DEFAULTS: dict[str, Any] = {
    "valid_fraction": 0.1, "max_tokens": 4096, "prompt": None, "limit": None, "seed": 0, "report_to": "none", "rank": 64, "alpha": None,
    "dropout": 0.0, "rslora": True, "epochs": 2, "lr": 5e-5, "schedule": "cosine", "warmup": 0.05, "weight_decay": 0.01,
    "questions_per_step": 16, "patience": 1, "score_by": "label", "loss": "choices", "choice_orders": 1, "folds": None, "fold": None, "context_when": "none",
    "leave_out": None, "kinds": None, "valid": None,
}  # fmt: skip
# A 270M base needs larger steps; it can't bind a choice to its digit, so its choices are scored by their text.
EMBEDDED_DEFAULTS: dict[str, Any] = {"rank": 16, "lr": 3e-4, "questions_per_step": 8, "score_by": "text"}
# The jobs that read a flag; what does not stand here is for training.
_BOTH = ("training", "--data-report")
READ_BY: dict[str, tuple[str, ...]] = {
    "train": _BOTH, "max_tokens": _BOTH, "prompt": _BOTH, "kinds": _BOTH, "limit": _BOTH, "overwrite": _BOTH, "base": _BOTH,
    "score_by": _BOTH, "trust_remote_code": _BOTH, "data_report": ("--data-report",), "against": ("--data-report",),
    "oof": ("--data-report",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rows:
    """The questions of a run.

    Attributes:
        train: to train on.
        valid: held out of the first file.
        elsewhere: held out of other files, by the file's name; they choose nothing.
        scale: to fit a scale on where the rows of `valid` may not: by folds, the first file's, the same for every fold.
        folds: of the first file, if it is cut into folds.
    """

    train: "list[Question]"
    valid: "list[Question]"
    elsewhere: "dict[str, list[Question]]"
    scale: "list[Question]"
    folds: "Folds | None"


def build_parser() -> argparse.ArgumentParser:
    """The command line. No default stands here: with --resume it is the run's, else it depends on the base."""
    parser = ArgumentParser(__doc__, allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add(
        "--train",
        nargs="+",
        type=file_name,
        metavar="CSV",
        help="labelled CSVs; the first, which should be like the test, chooses the epoch (default: data/train.csv, else the samples)",
    )
    add(
        "--valid-fraction",
        type=number,
        metavar="F",
        help="share of the first file to validate on, 0 to 0.5, and of each other at most as many rows; 0 trains on every row (default: 0.1)",
    )
    add(
        "--valid",
        nargs="+",
        type=file_name,
        metavar="CSV",
        help="labelled CSVs of other kinds: what training does to them is shown after every epoch, and chooses nothing; training rows "
        "that are near to one of theirs are left out",
    )
    add(
        "--max-tokens",
        type=positive,
        metavar="TOKENS",
        help="a prompt's limit; longer ones lose the middle of the passage (default: 4096)",
    )
    add("--prompt", type=file_name, metavar="FILE", help="replaces the prompt's wording, see docs/prompts.md")
    add(
        "--context-when",
        type=ContextRule.parse,
        metavar="RULE",
        help="who gets its text of the column 'context' into the prompt: all, kind=knowledge, kind=reading, short:N (passages "
        "under N characters) or none (default: none)",
    )
    add("--kinds", type=file_name, metavar="FILE|wording", help=KINDS_HELP)
    add(
        "--limit",
        type=positive,
        metavar="N",
        help="train and validate on N questions each, with --folds on the first N altogether, to try things out",
    )
    add(
        "--leave-out",
        type=file_name,
        metavar="CSV",
        help="train on no row that stands in this file as well, such as data/test.csv, by its passage or a near-duplicate of it, "
        "without a passage by question and choices; validation and folds stay as they are",
    )
    add = parser.add_argument_group("folds").add_argument
    add(
        "--folds",
        type=positive,
        metavar="F",
        help="cut the first file into F folds of whole passages, near-duplicates together; the same ones for every base",
    )
    add("--fold", type=not_negative, metavar="K", help="hold out fold K, 0 to F - 1, and train on the others")
    add("--all", action="store_true", help="train all F folds as <run>-fold<K>; goes on where it was stopped")
    add = parser.add_argument_group("data report").add_argument
    add("--data-report", action="store_true", help="train nothing: say what is in the data, and write it to reports/")
    add(
        "--against",
        type=file_name,
        metavar="CSV",
        help="of the report: compare with this file as well (default: data/test.csv if it is there)",
    )
    add(
        "--oof",
        type=file_name,
        metavar="CSV",
        help="of the report: out-of-fold probabilities of --all; lists labels that may be wrong",
    )
    add = parser.add_argument_group("run").add_argument
    add("--run", metavar="NAME", help="folder in checkpoints/ (default: a fresh name from base and settings)")
    add("--resume", action="store_true", help="go on with --run after an interruption")
    add("--overwrite", action="store_true", help="replace --run, or the report, if it exists")
    add(
        "--seed",
        type=not_negative,
        metavar="N",
        help="of the split, the fresh LoRA and the order of the questions (default: 0)",
    )
    add("--report-to", metavar="LOGGER", help="log to wandb, tensorboard, ... as well (default: none)")
    add = parser.add_argument_group("base").add_argument
    add(
        "--base",
        type=file_name,
        metavar="BASE",
        help="hub name, folder, embedded or embedded-small (default: the base that explore.py marks for this GPU; embedded without one)",
    )
    add(
        "--score-by",
        choices=("label", "text"),
        help="score a choice's digit or its text (default: label; embedded bases: text)",
    )
    add(
        "--quantization",
        choices=("nf4", "none"),
        help="of the weights while loading (default: nf4 on CUDA, none for embedded bases and on the CPU)",
    )
    add(
        "--loss",
        choices=("choices", "vocab"),
        help="softmax over the row's own choices, or the answer's cross-entropy over the vocabulary (default: choices)",
    )
    add(
        "--choice-orders",
        type=positive,
        metavar="K",
        help="train on K orders of every question's choices, rotated; label only; costs the choices, not the passage, K times "
        "(default: 1)",
    )
    add = parser.add_argument_group("LoRA and optimizer").add_argument
    add(
        "--rank",
        type=positive,
        metavar="R",
        help="of the LoRA on all linear modules; takes memory in proportion (default: 64; embedded: 16)",
    )
    add(
        "--alpha",
        type=number,
        metavar="A",
        help="the update is scaled by A/sqrt(R), without rsLoRA by A/R (default: the A that makes it 2)",
    )
    add("--dropout", type=number, metavar="P", help="of the LoRA's inputs, 0 to 1 (default: 0)")
    add("--rslora", action=argparse.BooleanOptionalAction, help="rank-stabilised scaling (default: on)")
    add("--epochs", type=positive, metavar="N", help="passes over the training rows (default: 2)")
    add("--lr", type=number, metavar="RATE", help="peak learning rate (default: 5e-5; embedded: 3e-4)")
    add("--schedule", choices=("cosine", "linear", "constant"), help="of the rate after warm-up (default: cosine)")
    add("--warmup", type=number, metavar="F", help="share of the steps in which the rate rises, 0 to 1 (default: 0.05)")
    add("--weight-decay", type=number, metavar="W", help="of AdamW (default: 0.01)")
    add(
        "--questions-per-step",
        type=positive,
        metavar="N",
        help="in one optimizer step, however packed (default: 16; embedded: 8)",
    )
    add(
        "--patience",
        type=positive,
        metavar="N",
        help="stop after N epochs without a better validation log loss (default: 1)",
    )
    add_engine_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Trains one run, from the CSV to run.json."""
    parser = build_parser()
    args = parser.parse_args(argv)
    read_by = dict.fromkeys(vars(args), ("training",)) | READ_BY
    require_read(parser, args, "--data-report" if args.data_report else "training", read_by)
    if args.run is not None:
        require_name("--run", args.run)
    _check_held_out_flags(args)
    if args.data_report:
        _report_data(args, _training_files(args, {})[0])
        return
    if args.all:
        _train_all_folds(args, sys.argv[1:] if argv is None else argv, _training_files(args, {})[0])
        return
    with contextlib.ExitStack() as held:
        _train_run(args, held)


def _train_run(args: argparse.Namespace, held: contextlib.ExitStack) -> None:
    """Trains one run; `held` keeps its lock, from before anything of it is read until it is complete."""
    from ksat import processes
    from ksat.context import take_context
    from ksat.devices import open_device
    from ksat.metrics import count_positions
    from ksat.predictions import sizes_and_answers
    from ksat.questions import read_questions

    run = held.enter_context(claim_run(args.run)) if args.run and processes.is_main() else None
    folder = _choose_folder(args, run) if run else None
    stored = _stored_settings(args)
    files, are_samples = _training_files(args, stored)
    kinds = args.kinds or stored.get("kinds")
    tables = [(path, read_questions(path, labelled=True, kinds=kinds)) for path in files]
    # The file whose rows choose the epoch says so for all that the run reads.
    tell = any(row.kind_hint for row in tables[0][1])
    device = open_device(args.device, args.gpu_memory, offload_embedding=args.offload_embedding)
    settings = _resolve(args, stored, files, device, are_samples, [row for _, rows in tables for row in rows], tell)
    rule = ContextRule(settings["context_when"])
    wording = settings["template"]["user"]
    tables = [(path, take_context(rows, rule, wording, str(path), tell)) for path, rows in tables]
    others = [(path, read_questions(path, labelled=True, kinds=kinds)) for path in map(Path, settings["valid"] or [])]
    others = [(path, take_context(rows, rule, wording, str(path), tell)) for path, rows in others]
    rows = _split(tables, others, settings)
    settings["answer_positions"] = count_positions(*sizes_and_answers(rows.train))
    if run is None and processes.is_main():
        run = held.enter_context(claim_fresh_run(_default_name(settings)))
        folder = run.place
    built: Path = processes.agree(folder)
    _announce(settings, device, rows, args.offload_embedding)
    validation = _train(built, settings, args, device, rows)
    if run is not None:
        validation.warn()
        _finish(built, settings, validation)
        run.settle()
        print(
            f"wrote {run.place}: adapter of epoch {validation.best_epoch}; score with: python inference.py --ckpt {run.place}"
        )


def _train(
    folder: Path,
    settings: dict[str, Any],
    args: argparse.Namespace,
    device: "Device",
    rows: Rows,
) -> "Validation":
    from ksat import processes
    from ksat.encoding import Encoder
    from ksat.folds import write_folds
    from ksat.models import LoadSettings, LoraSettings, import_engine, load
    from ksat.prompts import PromptTemplate
    from ksat.runs import write_settings

    import_engine(settings["engine"])  # before the trainer's libraries
    from ksat.step_memory import StepMemory, default_pack_tokens, memory_plan
    from ksat.training import TrainSettings, check_logger, train
    from ksat.validation import HeldOut, Validation

    check_logger(settings["report_to"])
    nf4 = settings["quantization"] == "nf4"
    load_settings = LoadSettings(
        settings["base"],
        settings["engine"],
        device,
        settings["dtype"],
        nf4,
        settings["max_tokens"],
        args.trust_remote_code,
        args.share_prefixes,
        args.offload_embedding,
    )
    lora = LoraSettings(settings["rank"], settings["alpha"], settings["dropout"], settings["rslora"])
    model = load(load_settings, lora=lora, seed=settings["seed"])
    _require_same_base(settings)
    encoder = Encoder(
        model.tokenizer, PromptTemplate(**settings["template"]), settings["score_by"], max_tokens=settings["max_tokens"]
    )
    orders = ChoiceOrders("cyclic", settings["choice_orders"])
    train_set = [order for row in rows.train for order in encoder.encode_orders(row, orders)]
    valid_set = [encoder.encode(row) for row in rows.valid]
    elsewhere = [HeldOut(name, own, [encoder.encode(row) for row in own]) for name, own in rows.elsewhere.items()]
    _show_example(encoder, train_set)
    over_vocabulary = settings["score_by"] == "text" or settings["loss"] == "vocab"
    plan = memory_plan(model, rank=settings["rank"], training=True, over_vocabulary=over_vocabulary)
    # Agreed, since free memory differs from card to card and all processes have to plan the same packs.
    settings["pack_tokens"] = processes.agree(
        settings["pack_tokens"] or default_pack_tokens(plan, train_set, model.layout)
    )

    if processes.is_main():
        if not args.resume and folder.exists():  # one in the making that is started anew, now that this one loads
            remove_run(folder)
        write_settings(folder, settings)
        if rows.folds is not None:
            write_folds(folder / "folds.csv", rows.folds)
    processes.wait()  # no process may see what an overwritten run has left

    validation = Validation(
        model,
        rows.valid,
        valid_set,
        folder=folder,
        score_by=settings["score_by"],
        pack_tokens=settings["pack_tokens"],
        patience=settings["patience"],
        positions=settings["answer_positions"],
        chooses=settings["folds"] is None,
        scale_set=lambda: [encoder.encode(row) for row in rows.scale],
        elsewhere=elsewhere,
    )
    validation.control()
    names = (
        "epochs",
        "lr",
        "questions_per_step",
        "pack_tokens",
        "schedule",
        "warmup",
        "weight_decay",
        "seed",
        "report_to",
        "loss",
    )
    loop = TrainSettings(**{name: settings[name] for name in names}, scale=validation.scale)
    if not validation.has_stopped:
        train(
            model,
            train_set,
            loop,
            folder=folder / "trainer",
            after_epoch=validation.after_epoch,
            on_save=validation.keep_in,
            go_on_from=validation.go_on_from,
            memory=StepMemory(model, plan),
        )
    return validation


def _check_held_out_flags(args: argparse.Namespace) -> None:
    """Raises InputError for flags of what is held out that do not go together."""
    if args.folds is None and (args.fold is not None or args.all):
        raise InputError("--fold and --all need --folds F: into how many folds the file is cut")
    if args.valid_fraction == 0 and args.patience is not None:
        raise InputError("--patience: with --valid-fraction 0 no row is held out to stop by; leave it out")
    if args.folds is None:
        return
    if args.folds < 2:
        raise InputError(f"--folds {args.folds}: expected at least 2")
    if args.all == (args.fold is not None):
        raise InputError("--folds: name one fold with --fold K, or train all of them with --all")
    if args.fold is not None and args.fold >= args.folds:
        raise InputError(f"--fold {args.fold}: expected 0 to {args.folds - 1} with --folds {args.folds}")
    if args.valid_fraction is not None or args.patience is not None:
        raise InputError(
            "--folds holds out one fold, and held-out rows choose no epoch: leave --valid-fraction and --patience out"
        )
    if args.all and (not args.run or args.resume):
        raise InputError("--all needs --run NAME, and goes on by itself: leave --resume out")
    if args.all and "WORLD_SIZE" in os.environ:
        raise InputError(
            "--all starts processes of its own; under accelerate launch train the folds one by one with --fold K"
        )


def _train_all_folds(args: argparse.Namespace, argv: Sequence[str], files: list[Path]) -> None:
    """Trains every fold and writes submissions/<run>-oof.probs.csv."""
    from ksat.crossval import CrossValidation, cross_validate
    from ksat.files import file_sha256
    from ksat.identity import identify_local

    require_name("--run", f"{args.run}-fold{args.folds - 1}")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--run")
    for flag in ("--all", "--overwrite"):
        own.add_argument(flag, action="store_true")
    flags = own.parse_known_args(argv)[1]
    own.add_argument("--pack-tokens")  # may be lowered when memory ran out, as for a single run
    read = [
        *files,
        *(Path(file) for file in (args.prompt, args.leave_out, *(args.valid or [])) if file),
        *filter(None, [kinds_file(args.kinds)]),
    ]
    key = {
        "flags": own.parse_known_args(argv)[1],
        "files": {str(path): file_sha256(path) for path in read},
        "base": identify_local(args.base or ""),
    }
    plan = CrossValidation(args.run, args.folds, tuple(flags), key, CHECKPOINTS)
    cross_validate(plan, files[0], limit=args.limit, overwrite=args.overwrite, kinds=args.kinds)


def _report_data(args: argparse.Namespace, files: list[Path]) -> None:
    """Prints and writes what is in the data."""
    from ksat.data_report import write_report
    from ksat.encoding import Encoder
    from ksat.models import is_embedded, load_tokenizer
    from ksat.prompts import DEFAULT_TEMPLATES, ScoreBy, read_template

    base = args.base or "embedded"
    score_by: ScoreBy = args.score_by or ("text" if is_embedded(base) else "label")
    template = read_template(args.prompt, score_by) if args.prompt else DEFAULT_TEMPLATES[score_by]
    tokenizer = load_tokenizer(base, trust_remote_code=args.trust_remote_code)
    encoder = Encoder(tokenizer, template, score_by, max_tokens=args.max_tokens or DEFAULTS["max_tokens"])
    test = Path(args.against) if args.against else DEFAULT_TEST if DEFAULT_TEST.exists() else None
    oof = Path(args.oof) if args.oof else None
    limits = {"limit": args.limit, "overwrite": args.overwrite}
    write_report(REPORTS, files, encoder, base, test=test, oof=oof, prompt=args.prompt, kinds=args.kinds, **limits)


def _stored_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the run that --resume goes on with, {} for a new run."""
    if not args.resume:
        return {}
    from ksat.runs import read_settings

    if not args.run or args.overwrite:
        raise InputError("--resume: name the interrupted run with --run, and leave --overwrite out")
    run = RunFolder(CHECKPOINTS / args.run)
    if (run.making / "run.json").exists():
        raise InputError(f"--resume: {run.place} is finished; score with python inference.py --ckpt {run.place}")
    if not (run.making / "settings.json").exists():
        started = ", ".join(sorted(p.parent.name for p in CHECKPOINTS.glob("[!.]*/settings.json"))) or "none"
        raise InputError(f"--resume: {run.place} was never started; runs there: {started}")
    return read_settings(run.making)


def _training_files(args: argparse.Namespace, stored: dict[str, Any]) -> tuple[list[Path], bool]:
    if stored and not args.train:
        args.train = [entry["file"] for entry in stored["data"]]
    first, is_sample = data_file(args.train[0] if args.train else None, "--train", Path("data/train.csv"))
    return [first, *map(Path, (args.train or [])[1:])], is_sample


def _resolve(
    args: argparse.Namespace,
    stored: dict[str, Any],
    files: list[Path],
    device: "Device",
    are_samples: bool,
    rows: "list[Question]",
    choices_tell: bool,
) -> dict[str, Any]:
    """Every setting of the run: what was given, else the resumed run's, else the default for its base.

    Raises:
        InputError: a flag contradicts the run that is resumed.
    """
    from ksat.files import file_sha256
    from ksat.fit import choose_base
    from ksat.models import choose_dtype, choose_engine, default_quantization, is_embedded
    from ksat.prompts import DEFAULT_TEMPLATES, read_template

    settings: dict[str, Any] = {"base": args.base or stored.get("base")}
    if settings["base"] is None:
        settings["base"], why = choose_base(device, samples=are_samples, rank=args.rank or DEFAULTS["rank"])
        print(f"base: {settings['base']}, {why}")
    small = is_embedded(settings["base"])
    defaults = DEFAULTS | (EMBEDDED_DEFAULTS if small else {})
    defaults["quantization"] = default_quantization(settings["base"], device)
    for name, default in defaults.items():
        given = getattr(args, name)
        settings[name] = given if given is not None else stored.get(name, default)
    if args.context_when is not None:
        settings["context_when"] = args.context_when.name
    if args.kinds and not settings["folds"] and not ContextRule(settings["context_when"]).asks_kind:
        raise InputError(
            "--kinds: in training kinds decide only how folds are cut and who gets a context; add --folds F or --context-when kind=..., "
            "or leave it out"
        )
    kinds = kinds_file(settings["kinds"])
    settings["kinds_sha256"] = file_sha256(kinds) if kinds else None
    settings["choices_tell_kinds"] = choices_tell
    settings["folds_sha256"] = stored.get("folds_sha256")  # known once the folds are cut
    settings["leave_out_sha256"] = file_sha256(Path(settings["leave_out"])) if settings["leave_out"] else None
    settings["valid_sha256"] = [file_sha256(Path(file)) for file in settings["valid"] or []]
    settings["base_identity"] = stored.get("base_identity")  # known once the base is loaded
    settings["answer_positions"] = stored.get("answer_positions")  # known once the rows are split
    if settings["folds"]:
        settings["valid_fraction"] = 0.0
    if settings["alpha"] is None:
        settings["alpha"] = 2.0 * (settings["rank"] ** 0.5 if settings["rslora"] else settings["rank"])
    score_by = settings["score_by"]
    orders = ChoiceOrders("cyclic", settings["choice_orders"])
    require_label(orders, score_by)
    settings["choice_orders"] = orders.at_most(rows).count
    template = read_template(settings["prompt"], score_by) if settings["prompt"] else DEFAULT_TEMPLATES[score_by]
    settings["template"] = template.to_dict()
    settings["data"] = [{"file": str(path), "sha256": file_sha256(path)} for path in files]
    # How it is computed is part of the run as well: a resumed run goes on with it, to the same bits.
    asked = {
        name: stored.get(name, "auto") if getattr(args, name) == "auto" else getattr(args, name)
        for name in ("dtype", "engine")
    }
    settings["dtype"] = choose_dtype(asked["dtype"], device, settings["base"])
    shares = settings["score_by"] == "text" or settings["choice_orders"] > 1
    settings["engine"] = choose_engine(
        asked["engine"],
        device,
        settings["dtype"],
        settings["base"],
        shares=shares,
        offload_embedding=args.offload_embedding,
    )
    settings["pack_tokens"] = args.pack_tokens or stored.get(
        "pack_tokens"
    )  # None: from the free memory, once it is known
    _check_ranges(settings)
    for name in stored:
        if name == "pack_tokens":  # which may be lowered when memory ran out
            continue
        if settings.get(name) != stored[name]:
            raise InputError(
                f"--resume: {name.replace('_', '-')} is {settings.get(name)!r}, the interrupted run has {stored[name]!r}; "
                "leave the flag out, or start another --run"
            )
    return settings


def _check_ranges(settings: dict[str, Any]) -> None:
    from ksat.runs import SETTING_RULES

    for name in ("rank", "lr", "dropout", "warmup", "weight_decay", "alpha", "seed", "valid_fraction"):
        holds, expected = SETTING_RULES[name]
        if not holds(settings[name]):
            raise InputError(f"--{name.replace('_', '-')} {settings[name]}: expected {expected}")


def _require_same_base(settings: dict[str, Any]) -> None:
    """Notes in the settings which base was loaded.

    Raises:
        InputError: it is not the one that the resumed run was started on.
    """
    from ksat.identity import identify_base, name_difference

    found = identify_base(settings["base"])
    if difference := name_difference(settings["base_identity"] or {}, found):
        raise InputError(
            f"--resume: --base {settings['base']} is not the one that the run was started on ({difference}); put that one back, or start "
            "another --run"
        )
    settings["base_identity"] = found


def _split(
    tables: "list[tuple[Path, list[Question]]]", others: "list[tuple[Path, list[Question]]]", settings: dict[str, Any]
) -> Rows:
    """What is trained on and what is held out, noting the folds' hash in the settings.

    Args:
        tables: of --train. Of the first, whose held-out rows choose the epoch, a share is held out, or a fold; of each other
            at most as many rows.
        others: of --valid.
        settings: of the run.
    """
    from ksat.errors import bad_rows
    from ksat.folds import split_validation
    from ksat.near_duplicates import near_rows
    from ksat.questions import read_questions

    (_, first), *added = tables
    seen: set[str] = set()
    for path, rows in [*tables, *others]:
        if doubled := [(question.id, "") for question in rows if question.id in seen]:
            remedy = f"put a prefix before the ids of one file, such as {f'{path.stem}-{doubled[0][0]}'!r}"
            raise bad_rows(path, "have an id that another file of --train or --valid has", doubled, remedy)
        seen |= {question.id for question in rows}
    limit, folds = settings["limit"], None
    if settings["folds"]:
        first = first[:limit]
        folds, (train_index, valid_index) = _hold_out_fold(first, settings)
    else:
        train_index, valid_index = split_validation(first, settings["valid_fraction"], seed=settings["seed"])
    train, valid = ([first[i] for i in index] for index in (train_index, valid_index))
    elsewhere = _hold_out_of_others(first, added, len(valid), settings)
    held_out = valid + [row for rows in elsewhere.values() for row in rows]
    extra = [row for _, rows in added for row in rows]
    near = set(near_rows(extra, held_out))  # those that are held out are among them
    if num_left_out := len(near) - sum(map(len, elsewhere.values())):
        print(f"{num_left_out} rows of other files have a passage too near to a held-out one and are left out")
    train += [row for i, row in enumerate(extra) if i not in near]
    for path, rows in others:
        train = _leave_out(train, rows, f"--valid {path}")
        elsewhere[str(path)] = rows
    if settings["leave_out"]:
        train = _leave_out(train, read_questions(settings["leave_out"]), f"--leave-out {settings['leave_out']}")
    if folds is None:
        train, valid = train[:limit], valid[:limit]
    scale = sorted(first if folds else train, key=lambda row: hashlib.sha256(row.id.encode()).digest())[:SCALE_ROWS]
    return Rows(train, valid, {name: rows[:limit] for name, rows in elsewhere.items()}, scale, folds)


def _hold_out_of_others(
    first: "list[Question]", added: "list[tuple[Path, list[Question]]]", most: int, settings: dict[str, Any]
) -> "dict[str, list[Question]]":
    """Of every further training file the rows to look at, `most` at most: of passages that the first file does not have."""
    from ksat.folds import assign_folds, fold_rows, split_validation
    from ksat.near_duplicates import near_rows, passage_groups

    num_folds, found = settings["folds"], {}
    for path, rows in added if most else []:
        near = set(near_rows(rows, first))
        own = [row for i, row in enumerate(rows) if i not in near]
        groups = passage_groups(own)
        if len(set(groups)) >= (num_folds or 2):
            if num_folds:
                held_out = fold_rows(assign_folds(own, num_folds), settings["fold"])[1]
            else:
                held_out = split_validation(own, settings["valid_fraction"], seed=settings["seed"], groups=groups)[1]
            found[str(path)] = [own[i] for i in held_out][:most]
    return found


def _leave_out(train_rows: "list[Question]", rows: "list[Question]", flag: str) -> "list[Question]":
    """The training rows that do not stand among those of a file, saying how many do.

    Raises:
        InputError: none is left.
    """
    from ksat.near_duplicates import near_rows

    near = set(near_rows(train_rows, rows))
    if len(near) == len(train_rows):
        raise InputError(f"{flag}: all {len(near)} training rows stand there as well; none is left to train on")
    first = f" (first: id {train_rows[min(near)].id!r})" if near else ""
    print(f"{flag}: {len(near)} of {len(train_rows)} training rows stand there as well and are left out{first}")
    return [row for i, row in enumerate(train_rows) if i not in near]


def _hold_out_fold(first: "list[Question]", settings: dict[str, Any]) -> "tuple[Folds, tuple[list[int], list[int]]]":
    """All folds, and the indices to train on and those that are held out; notes the assignment's hash in the settings."""
    from ksat.folds import assign_folds, fold_rows

    folds = assign_folds(first, settings["folds"])
    if settings["folds_sha256"] not in (None, folds.sha256):
        raise InputError("--resume: the folds are cut otherwise than when the run was started; start another --run")
    settings["folds_sha256"] = folds.sha256
    return folds, fold_rows(folds, settings["fold"])


def _default_name(settings: dict[str, Any]) -> str:
    base = os.path.basename(os.path.abspath(settings["base"]))  # "." has a name too
    return f"{base}-{settings['score_by']}-r{settings['rank']}-lr{settings['lr']:g}-e{settings['epochs']}-s{settings['seed']}"


def _choose_folder(args: argparse.Namespace, run: RunFolder) -> Path:
    """Where a named run is trained: where it was begun, in its place, or beside what --overwrite replaces.

    Raises:
        InputError: there is something without --resume or --overwrite, or what is to be replaced is no run.
    """
    if args.resume:
        return run.making
    if args.overwrite:
        if run.is_taken:
            require_run(run.place)
        return run.new if run.is_taken or run.new.exists() else run.place
    if run.is_taken or run.new.exists():
        remedy = (
            "choose another --run or --overwrite"
            if (run.making / "run.json").exists()
            else "--resume goes on, --overwrite starts anew"
        )
        raise InputError(f"--run {args.run}: {run.place} exists; {remedy}")
    return run.place


def _announce(
    settings: dict[str, Any],
    device: "Device",
    rows: Rows,
    offload_embedding: bool,
) -> None:
    """Says what is about to happen, and about how long it takes, before anything is downloaded.

    Raises:
        InputError: the base's weights do not fit this machine.
    """
    from ksat.fit import TYPICAL_TOKENS, check_room, cost

    print(
        f"device: {device.name}; engine {settings['engine']}, {settings['dtype']}, weights {settings['quantization']}"
    )
    others = "".join(f", {len(own)} of {name} to look at" for name, own in rows.elsewhere.items())
    print(
        f"questions: {len(rows.train)} to train on, {len(rows.valid)} to validate on{others}, scored by {settings['score_by']}"
    )
    print(
        f"LoRA: rank {settings['rank']}, alpha {settings['alpha']:g}, rsLoRA {'on' if settings['rslora'] else 'off'}; lr {settings['lr']:g} "
        f"{settings['schedule']}, {settings['epochs']} epochs, {settings['questions_per_step']} questions a step"
    )
    characters = sum(
        len(q.passage) + len(q.question) + len(q.question_plus) + sum(map(len, q.choices)) + 80 for q in rows.train
    )
    print(f"cost: {cost(settings['base'], device, num_characters=characters * settings['epochs'])}", flush=True)
    warning = check_room(
        settings["base"],
        device,
        rank=settings["rank"],
        nf4=settings["quantization"] == "nf4",
        dtype=settings["dtype"],
        tokens=min(TYPICAL_TOKENS, settings["max_tokens"]),
        offload_embedding=offload_embedding,
    )
    if warning:
        print(f"warning: {warning}", file=sys.stderr)


def _show_example(encoder: "Encoder", encoded: "list[EncodedQuestion]") -> None:
    """Prints the first training prompt, decoded from its ids, with what is supervised in ⟦⟧; and what was cut."""
    example = encoded[0]
    decode = encoder.tokenizer.decode
    answer = example.answer_index or 0
    print(
        f"\n--- {example.id}: {len(example.prompt_ids)} tokens; ⟦the right choice⟧, against which the others compete ---"
    )
    print(f"{decode(list(example.prompt_ids))}⟦{decode(list(example.continuations[answer]))}⟧")
    print(
        "--- others: "
        + " ".join(f"⟦{decode(list(ids))}⟧" for i, ids in enumerate(example.continuations) if i != answer)
    )
    if cut := [e for e in encoded if e.num_cut_characters]:
        print(
            f"{len(cut)} of {len(encoded)} prompts exceed --max-tokens {encoder.max_tokens} and lose the middle of their passage"
        )


def _finish(folder: Path, settings: dict[str, Any], validation: "Validation") -> None:
    """Puts the best epoch's adapter in its place and writes run.json last; RunFolder.settle does what is left then."""
    from ksat.devices import peak_memory_gib
    from ksat.files import file_sha256, write_json
    from ksat.runs import ADAPTER_FILE, ADAPTER_FOLDER, CONFIG_FILE, Run, library_versions, write_run

    adapter = folder / ADAPTER_FOLDER
    _copy_results(folder, adapter, best=folder / f"epoch-{validation.best_epoch}", base=settings["base"])
    write_json(folder / "metrics.json", validation.progress | {"peak_memory_gib": round(peak_memory_gib(), 2)})
    run = Run(
        base=settings["base"],
        base_identity=settings["base_identity"],
        score_by=settings["score_by"],
        template=settings["template"],
        max_tokens=settings["max_tokens"],
        scale=validation.scale,
        quantization=settings["quantization"],
        adapter_sha256=file_sha256(adapter / ADAPTER_FILE),
        adapter_config_sha256=file_sha256(adapter / CONFIG_FILE),
        settings=settings | {"best_epoch": validation.best_epoch},
        data=settings["data"],
        versions=library_versions(),
    )
    write_run(folder, run)


def _copy_results(folder: Path, adapter: Path, *, best: Path, base: str) -> None:
    """Copies what training has left: the best epoch's adapter and validation probabilities, the log."""
    from ksat.children import how_to_go_on
    from ksat.files import read_json, write_json

    try:
        shutil.rmtree(adapter, ignore_errors=True)
        shutil.copytree(best, adapter, ignore=shutil.ignore_patterns(SEAL))
        if (adapter / "validation.probs.csv").exists():
            (adapter / "validation.probs.csv").replace(folder / "validation.probs.csv")
        if (log := folder / "trainer" / "log.jsonl").exists():
            shutil.copy(log, folder / "log.jsonl")
    except OSError as error:
        raise InputError(f"{folder}: can't be written ({error}); free space, then {how_to_go_on()}") from error
    config = read_json(adapter / "adapter_config.json")
    write_json(adapter / "adapter_config.json", config | {"base_model_name_or_path": base})


if __name__ == "__main__":
    sys.exit(exit_code(main, "a run goes on with --run NAME --resume, --all with the same command without --overwrite"))
