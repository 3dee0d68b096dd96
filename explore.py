"""Which bases fit this GPU, and which one answers best.

python explore.py                                    # what fits this machine's GPU; needs no network
python explore.py --gpu-memory 16GiB                  # what fits a card of that size
python explore.py --gpu v100-32gb --explain unsloth/Qwen2.5-32B-Instruct-bnb-4bit
python explore.py --score data/valid.csv --bases unsloth/Qwen2.5-14B-bnb-4bit,Qwen/Qwen3-8B,skt/A.X-4.0-Light
python explore.py --score data/valid.csv --bases a,b --finetune --train data/train.csv
"""

import argparse
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ksat.devices import GPUS, Device, find_device
from ksat.errors import InputError, exit_code
from ksat.files import require_name
from ksat.flags import (
    KINDS_HELP,
    ArgumentParser,
    add_engine_flags,
    data_file,
    file_name,
    given_engine_flags,
    kinds_file,
    path_list,
    path_text,
    positive,
)

if TYPE_CHECKING:
    from ksat.bases import KnownBase
    from ksat.exploration import Settings
    from ksat.files import Outputs
    from ksat.questions import Question
    from ksat.standings import Judged, Row

EXPLORATIONS = Path("explorations")
RESULTS = ("exploration.csv", "exploration.png", "exploration.md")  # the last marks a whole set


def build_parser() -> argparse.ArgumentParser:
    """The command line: the fit table by default, a comparison of bases with --score."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("what fits").add_argument
    add("--gpu", choices=tuple(GPUS), help="the card to plan for (default: this machine's)")
    add("--rank", type=positive, metavar="R", help="of the LoRA (default: 64, as in train.py)")
    add("--explain", type=file_name, metavar="BASE", help="show the arithmetic behind a base's row")
    add(
        "--bases",
        type=path_list,
        metavar="A,B,...",
        help="only these: known ones, others by their config; with --score, also base:nf4 or base:none",
    )
    add = parser.add_argument_group("which answers best").add_argument
    add(
        "--score",
        type=file_name,
        metavar="CSV",
        help="labelled questions; each of --bases scores them, untuned, in a process of its own",
    )
    add("--answers", type=file_name, metavar="CSV", help="gold answers, if --score has none")
    add("--kinds", type=file_name, metavar="FILE|wording", help=KINDS_HELP)
    add("--limit", type=positive, metavar="N", help="score the first N questions")
    add("--finetune", action="store_true", help="train each base first, with train.py's defaults")
    add(
        "--train",
        type=file_name,
        metavar="CSV",
        help="what --finetune trains on (default: data/train.csv, else the samples)",
    )
    add(
        "--leaderboard",
        type=file_name,
        metavar="CSV",
        help="scores that you know, base,public,private: shown beside ours",
    )
    add("--out", type=path_text, metavar="NAME", help="explorations/NAME (default: the name of the --score file)")
    add("--overwrite", action="store_true", help="replace what was made of other questions, flags or versions there")
    add_engine_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Prints what fits, or scores and compares."""
    args = build_parser().parse_args(argv)
    if args.score:
        for name in ("gpu", "rank", "explain"):
            if getattr(args, name):
                raise InputError(f"--{name} is for the fit table; leave it out, or leave --score out")
        _score(args)
        return
    for name in ("answers", "kinds", "limit", "finetune", "train", "leaderboard", "out", "overwrite"):
        if getattr(args, name) not in (None, False):
            raise InputError(f"--{name} needs --score CSV: it is about scoring bases")
    _fit(args)


def _fit(args: argparse.Namespace) -> None:
    from ksat.bases import find_base
    from ksat.exploration import parse_candidates
    from ksat.fit import RANK, explain, find_fit, fit_all, fit_table

    if args.offload_embedding:
        raise InputError("--offload-embedding: the table names it where it helps; leave it out")
    unused = {"engine": "auto", "device": "auto", "dtype": "auto", "pack_tokens": None, "share_prefixes": True}
    for name, default in unused.items():
        if getattr(args, name) != default:
            raise InputError(
                f"--{'no-' if default is True else ''}{name.replace('_', '-')} needs --score CSV: the table of what fits does not depend on it"
            )
    if args.explain and args.bases:
        raise InputError("--explain BASE is about one base; leave --bases out")
    named = (
        [args.explain] if args.explain else [each.base for each in parse_candidates(args.bases)] if args.bases else []
    )
    if args.trust_remote_code and all(map(find_base, named)):
        raise InputError("--trust-remote-code: of known bases nothing is loaded for the table; leave it out")
    device, rank = _card(args), args.rank or RANK
    if args.explain:
        print(explain(_find_or_read(args.explain, "--explain", args), device, rank=rank))
        return
    if args.bases:
        bases = [_find_or_read(name, "--bases", args) for name in named]
        fits = [find_fit(base, device, rank=rank) for base in sorted(bases, key=lambda base: -base.num_parameters)]
    else:
        fits = fit_all(device, rank=rank)
    print(f"{_described(device)}\nQLoRA of rank {rank}; GiB at the peak, gaps between allocations included\n")
    print(fit_table(fits, device, rank=rank, named=bool(args.bases)))


def _card(args: argparse.Namespace) -> Device:
    device = GPUS[args.gpu] if args.gpu else find_device("auto")
    if not args.gpu_memory:
        if device.kind == "cpu":
            raise InputError(
                f"no GPU on this machine; name the card to plan for: --gpu {'|'.join(GPUS)}, or its --gpu-memory"
            )
        return device
    gib = args.gpu_memory / 2**30
    if gib <= device.memory_gib:
        return replace(device, memory_gib=gib)
    if args.gpu:
        raise InputError(
            f"--gpu-memory {gib:.1f}GiB: {device.name} has {device.memory_gib:.1f} GiB; give less, or leave --gpu out"
        )
    return Device("cuda", "a card of this size", (8, 0), gib)


def _described(device: Device) -> str:
    """The card in one line."""
    from ksat.models import choose_dtype

    major, minor = device.capability
    tflops = "?" if device.tflops is None else f"{device.tflops:g}"
    return (
        f"{device.name}: {device.memory_gib:.1f} GiB, compute capability {major}.{minor}, {choose_dtype('auto', device)}, {tflops} TFLOPS by "
        "its data sheet"
    )


def _find_or_read(name: str, flag: str, args: argparse.Namespace) -> "KnownBase":
    from ksat.bases import find_base, read_base

    return find_base(name) or read_base(name, flag=flag, trust_remote_code=args.trust_remote_code)


def _score(args: argparse.Namespace) -> None:
    from ksat.exploration import outputs_of, parse_candidates, require_same, run_candidate
    from ksat.files import Outputs, lock, require_no_input
    from ksat.predictions import read_answers
    from ksat.questions import read_questions
    from ksat.standings import judge, make_row, read_leaderboard

    if not args.bases:
        raise InputError("--score needs --bases A,B,...: the bases to compare")
    candidates, settings = parse_candidates(args.bases), _settings(args)
    questions = read_questions(settings.questions, kinds=args.kinds)[: args.limit]
    gold = {question.id: question.answer for question in questions if question.answer is not None}
    judged = judge(questions, read_answers(args.answers) if args.answers else gold)
    board = read_leaderboard(Path(args.leaderboard)) if args.leaderboard else {}
    if settings.train is not None:
        _require_apart(settings, questions)
    names = {name for candidate in candidates for name in (candidate.name, candidate.base)}
    if unknown := sorted(set(board) - names):
        raise InputError(
            f"--leaderboard {args.leaderboard}: {unknown[0]!r} is none of --bases; correct its name, or leave it out"
        )
    if settings.folder.exists() and not settings.folder.is_dir():
        raise InputError(f"{settings.folder} is a file; choose another --out")
    results = [settings.folder / name for name in RESULTS]
    of_candidates = [path for candidate in candidates for path in outputs_of(candidate, settings)]
    inputs = [args.score, args.answers, kinds_file(args.kinds), settings.train, args.leaderboard]
    require_no_input([*results, *of_candidates], inputs, "--out")
    with lock(settings.folder, "exploration"):
        found = [path for path in results if path.exists()]
        if found and not any(settings.folder.glob("*.*ing.json")):  # of scoring or training, the mark of a candidate
            raise InputError(
                f"{found[0]} exists and is of no exploration of ours; choose another --out, or move it away"
            )
        # No command of a name of its own: what a kill has left of a set is always finished, and replaced once there is another.
        outputs = Outputs(tuple(results), uuid.uuid4().hex)
        outputs.settle()
        for candidate in candidates:
            require_same(candidate, settings)
        rows = [make_row(run_candidate(candidate, settings), judged, board) for candidate in candidates]
        _report(args, settings, rows, judged, outputs)


def _settings(args: argparse.Namespace) -> "Settings":
    from ksat.exploration import Settings

    train = None
    if args.finetune:
        train, _ = data_file(args.train, "--train", Path("data/train.csv"))
    elif args.train:
        raise InputError("--train needs --finetune: untuned bases are not trained")
    name = args.out if args.out is not None else Path(args.score).stem + ("-tuned" if args.finetune else "")
    require_name("--out", name)
    flags, device = tuple(given_engine_flags(args)), find_device(args.device).name
    return Settings(Path(args.score), EXPLORATIONS / name, flags, args.limit, train, device, args.overwrite)


def _require_apart(settings: "Settings", questions: "list[Question]") -> None:
    """Raises InputError if a passage to score, or a near-duplicate of it, is trained on as well."""
    from ksat.errors import bad_rows
    from ksat.near_duplicates import near_rows
    from ksat.questions import read_questions

    assert settings.train is not None
    trained = read_questions(settings.train, labelled=True)
    if shared := [(questions[i].id, "") for i in near_rows(questions, trained)]:
        raise bad_rows(
            settings.questions,
            f"share their passage, or nearly, with {settings.train}",
            shared,
            "score questions that are not trained on",
        )


def _report(
    args: argparse.Namespace, settings: "Settings", rows: "list[Row]", judged: "Judged", outputs: "Outputs"
) -> None:
    """Prints the result and writes it as CSV, picture and Markdown; no picture, and over no earlier result, if no base was scored."""
    import pandas as pd

    from ksat.files import text_writer
    from ksat.metrics import count_positions
    from ksat.predictions import sizes_and_answers
    from ksat.questions import read_questions
    from ksat.standings import (
        baseline_rows,
        compare_pairs,
        pairs_table,
        ranking,
        recommend,
        standings_records,
        standings_table,
    )

    pairs, positions = compare_pairs(rows, judged), None
    if settings.train:
        positions = count_positions(*sizes_and_answers(read_questions(settings.train, labelled=True)))
    baselines = baseline_rows(judged, positions)
    parts = [standings_table(rows, baselines)]
    if pairs:
        parts.append(pairs_table(pairs))
    parts.append(recommend(rows, pairs, baselines))
    text = "\n\n".join(parts)
    print(f"\n{text}")
    records = pd.DataFrame(standings_records([*rows, *baselines]))
    title = f"{len(judged.questions)} questions of {settings.questions.name}, {'fine-tuned' if settings.train else 'untuned'}"
    table, picture, markdown = outputs.paths
    writers = {
        table: lambda path: records.to_csv(path, index=False),
        picture: lambda path: _draw(args, path, rows, baselines[0], title),
        markdown: text_writer(f"# {title}\n\n{text}\n"),
    }
    if not ranking(rows):
        if found := [path for path in outputs.paths if path.exists()]:
            raise InputError(
                f"{found[0]}: stays as it is, for no base could be scored; mend what is said of them above, and run the same command again"
            )
        del writers[picture]
    replace(outputs, paths=tuple(writers)).write(list(writers.values()))
    print(f"\nwrote {', '.join(path.name for path in writers)} in {settings.folder}")


def _draw(args: argparse.Namespace, path: Path, rows: "list[Row]", uniform: "Row", title: str) -> None:
    from ksat.picture import draw
    from ksat.standings import ranking

    device = find_device(args.device)
    limit = None if device.kind == "cpu" else min(device.memory_gib, (args.gpu_memory or 2**60) / 2**30)
    draw(
        path,
        ranking(rows),
        uniform=uniform.metrics["all"].accuracy.value,
        limit_gib=limit,
        memory="the process" if device.kind == "cpu" else device.name,
        title=title,
    )


if __name__ == "__main__":
    sys.exit(exit_code(main, "with --score the same command goes on with what is scored"))
