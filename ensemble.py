"""Blend probability files into one, and its submission; fit a blend on out-of-fold files; check or log a submission.

    python ensemble.py submissions/a.probs.csv submissions/b.probs.csv --out blend
    python ensemble.py submissions/a.probs.csv submissions/b.probs.csv --out blend --method hard --weights 2 1
    python ensemble.py submissions/a.probs.csv friend.csv --out blend --test data/test.csv --answers answers.csv
    python ensemble.py --fit submissions/a-oof.probs.csv submissions/b-oof.probs.csv --answers data/train.csv --out ab
    python ensemble.py --apply submissions/ab.blend.json submissions/a.probs.csv submissions/b.probs.csv --out ab
    python ensemble.py --check submissions/blend.csv --test data/test.csv
    python ensemble.py --log submissions/blend.csv --oof submissions/blend-oof.probs.csv --answers data/train.csv --public 0.78

Members are joined by id. A label-only CSV (`id,answer`) counts as 0.9 for its answer and needs --test. Writes
submissions/NAME.probs.csv, NAME.probs.json and submissions/NAME.csv; --fit writes submissions/NAME.blend.json and a picture.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksat.errors import InputError, exit_code
from ksat.flags import ArgumentParser, data_file, file_path, number, path_text, require_read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ksat.blend_fit import BlendFit
    from ksat.blending import Member
    from ksat.fitted_blend import FittedBlend
    from ksat.metrics import Metrics
    from ksat.predictions import FloatArray, Predictions
    from ksat.questions import Question

DEFAULT_TEST = Path("data/test.csv")
BY_HAND = "a blend by hand"
READ_BY = {
    "test": (BY_HAND, "--apply", "--fit", "--check"),
    "method": (BY_HAND,),
    "weights": (BY_HAND,),
    "margin": (BY_HAND, "--apply"),
    "fitted": ("--apply",),
    "overwrite": (BY_HAND, "--apply", "--fit"),
    "answers": (BY_HAND, "--apply", "--fit", "--log"),
    "oof": ("--log",),
    "public": ("--log",),
    "private": ("--log",),
}  # the jobs that read a flag; members and --out are asked for by name


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(__doc__)
    members = parser.add_argument_group("members")
    members.add_argument(
        "members", nargs="*", type=file_path, metavar="CSV", help="probability files, or id,answer files"
    )
    members.add_argument("--test", type=file_path, metavar="CSV", help="test questions: row order, number of choices")
    blend = parser.add_argument_group("blend")
    blend.add_argument(
        "--method",
        choices=["soft", "geometric", "hard"],
        help="weighted mean, weighted geometric mean, or votes (default: soft)",
    )
    blend.add_argument(
        "--weights", nargs="+", type=number, metavar="W", help="one positive weight a member, any scale; default: equal"
    )
    blend.add_argument(
        "--margin",
        type=number,
        metavar="M",
        help="where the blend's top two are less than M apart, take the member that is surest (default: 0, never)",
    )
    fit = parser.add_argument_group("fitted blends")
    fit.add_argument(
        "--fit",
        nargs="+",
        type=file_path,
        metavar="CSV",
        help="out-of-fold files: fits temperatures and weights to --answers in six ways, and says whether the best is worth it",
    )
    fit.add_argument(
        "--apply", type=file_path, metavar="JSON", help="blend the members, in --fit's order, as it recommends"
    )
    fit.add_argument(
        "--fitted", action="store_true", help="of --apply: the fitted weights even where equal ones are recommended"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out", type=path_text, metavar="NAME", help="name in submissions/, or a path without its ending"
    )
    output.add_argument("--overwrite", action="store_true", help="replace the output files if they exist")
    output.add_argument("--answers", type=file_path, metavar="CSV", help="gold answers: prints the metrics of all")
    check = parser.add_argument_group("before and after the upload")
    check.add_argument(
        "--check",
        type=file_path,
        metavar="CSV",
        help="validate this submission against --test (default: data/test.csv, else the samples)",
    )
    check.add_argument(
        "--log", type=file_path, metavar="CSV", help="enter this submission, or its scores, in submissions/log.csv"
    )
    check.add_argument(
        "--oof", type=file_path, metavar="CSV", help="of --log: out-of-fold file of the same blend; needs --answers"
    )
    check.add_argument("--public", type=number, metavar="S", help="of --log: what the leaderboard said, 0 to 1")
    check.add_argument("--private", type=number, metavar="S", help="of --log: what it said in the end, 0 to 1")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's own)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    _require_one_job(parser, args)
    args.method, args.margin = args.method or "soft", args.margin or 0.0
    if args.check:
        check(args.check, args.test)
    elif args.log:
        log(args)
    elif args.fit:
        run_fit(args)
    else:
        run_blend(args)


def _require_one_job(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Raises InputError unless the flags belong to one job."""
    jobs = [flag for flag in ("check", "log", "fit", "apply") if getattr(args, flag)]
    if len(jobs) > 1:
        raise InputError(f"--{jobs[0]} and --{jobs[1]} are two jobs; call ensemble.py for each")
    job = f"--{jobs[0]}" if jobs else BY_HAND
    if job in ("--check", "--log") and (args.members or args.out):
        raise InputError(f"{job} is about one submission; blend with another call (no members, no --out)")
    if job == "--fit" and (args.members or not args.out or not args.answers):
        raise InputError("--fit takes the out-of-fold files itself, and needs --answers and --out NAME")
    if job in (BY_HAND, "--apply") and not (args.members and args.out):
        raise InputError("give probability files and --out NAME, or --fit, --check or --log")
    require_read(parser, args, job, READ_BY)
    if job == "--log" and bool(args.oof) != bool(args.answers):
        raise InputError(
            "--oof needs --answers, the gold answers of its rows, and --log reads --answers for nothing else"
        )


def check(submission: Path, test_path: Path | None) -> None:
    """Prints one OK line for a valid submission; raises InputError for any other."""
    from ksat.predictions import check_submission
    from ksat.questions import MAX_CHOICES, read_questions

    if test_path is None:
        test_path, _ = data_file(None, "--test", DEFAULT_TEST)
        print(f"--test: {test_path} (default)")
    answers = list(check_submission(submission, read_questions(test_path)).values())
    counts = ", ".join(f"{number}: {answers.count(number)}" for number in range(1, MAX_CHOICES + 1))
    print(f"OK {submission}: {len(answers)} rows, ids and order as in {test_path}, answers in range ({counts})")


def log(args: argparse.Namespace) -> None:
    """Enters a submission or its scores, and prints the log."""
    from ksat.predictions import SUBMISSIONS, read_labels
    from ksat.provenance import require_held_out
    from ksat.submission_log import enter, log_table, read_log

    read_labels(args.log)  # nothing but a submission goes into the log
    scores: dict[str, float | None] = {"public": args.public, "private": args.private}
    if bad := [name for name, score in scores.items() if score is not None and not 0 <= score <= 1]:
        raise InputError(f"--{bad[0]} {scores[bad[0]]}: expected a share from 0 to 1, such as 0.7765")
    if args.oof:
        metrics = _metrics_of(args.oof, args.answers)
        require_held_out([args.oof])
        scores |= {"oof_accuracy": round(metrics.accuracy.value, 6), "oof_macro_f1": round(metrics.macro_f1.value, 6)}
    path = SUBMISSIONS / "log.csv"
    row, is_new = enter(path, args.log, scores)
    print(log_table(read_log(path)))
    print(f"\n{'entered' if is_new else 'completed'} {row.file} in {path}")


def _metrics_of(path: Path, answers_path: Path) -> "Metrics":
    from ksat.metrics import compute_metrics
    from ksat.predictions import align_answers, read_answers, read_probs

    predictions = read_probs(path)
    gold = align_answers(predictions, read_answers(answers_path), answers_path)
    return compute_metrics(predictions.probs, gold, list(predictions.ids))


def run_fit(args: argparse.Namespace) -> None:
    """Fits a blend on out-of-fold rows, says whether it is worth it, and writes submissions/NAME.blend.json and .png."""
    from ksat.blend_fit import format_fit, write_fit
    from ksat.files import claim_outputs
    from ksat.predictions import output_stem

    stem = output_stem(args.out)
    picture, target = (stem.with_name(f"{stem.name}.blend.{kind}") for kind in ("png", "json"))
    inputs = [*args.fit, args.answers, args.test]
    claim = claim_outputs([picture, target], inputs=inputs, overwrite=args.overwrite, command=vars(args))
    with claim as outputs:
        fit = _fit(args)
        write_fit(outputs, fit)
    print(f"{format_fit(fit)}\n\nwrote {target} and {picture}")


def _fit(args: argparse.Namespace) -> "BlendFit":
    from ksat.blend_fit import fit_members
    from ksat.blending import SMOOTHING, align_members, read_member
    from ksat.predictions import Predictions, align_answers, read_answers
    from ksat.provenance import require_distinct, require_held_out
    from ksat.questions import read_questions

    require_distinct(args.fit)
    require_held_out(args.fit)
    sizes = {question.id: question.num_choices for question in read_questions(args.test)} if args.test else None
    members = [read_member(path, sizes) for path in args.fit]
    for member in members:
        if member.label_only:
            print(f"{member.path}: answers alone, each taken for a probability of {1 - SMOOTHING:g}")
    first = members[0].predictions
    counts = dict(zip(first.ids, first.num_choices.tolist(), strict=True))
    tables = align_members(members, counts, args.fit[0])
    rows = Predictions(tuple(counts), tables[0])
    gold = align_answers(rows, read_answers(args.answers), args.answers)
    groups = _groups(rows.ids, args.answers, args.test)
    return fit_members(args.fit, tables, gold, groups)


def _groups(ids: "Sequence[str]", answers_path: Path, test_path: Path | None) -> list[str]:
    """(N,) what rows share that stand or fall together: passages where the questions are known, else single rows, with a word."""
    from ksat.near_duplicates import groups_by_id
    from ksat.predictions import is_competition_table
    from ksat.questions import read_questions, read_table

    source = answers_path if is_competition_table(read_table(answers_path)) else test_path
    if source is None:
        print(
            f"note: {answers_path} holds labels alone: folds and intervals take each row for itself, though rows of one passage stand or fall "
            "together; name the questions with --test",
            file=sys.stderr,
        )
    keys = groups_by_id(read_questions(source)) if source else {}
    return [keys.get(row_id, row_id) for row_id in ids]


def run_blend(args: argparse.Namespace) -> None:
    """Reads the members, writes their blend and prints how they agree; raises InputError before it writes anything."""
    from ksat.blend_fit import read_fit
    from ksat.blending import check_weights
    from ksat.files import claim_outputs
    from ksat.predictions import submission_paths, write_predictions
    from ksat.provenance import require_distinct

    paths = submission_paths(args.out)
    inputs = [*args.members, args.answers, args.test, args.apply]
    with claim_outputs(paths.all, inputs=inputs, overwrite=args.overwrite, command=vars(args)) as outputs:
        require_distinct(args.members)
        fitted = read_fit(args.apply, args.members, as_fitted=args.fitted) if args.apply else None
        shares = list(fitted.weights) if fitted else check_weights(args.weights, len(args.members))
        blended, said = _blend(args, fitted, shares)
        write_predictions(outputs, blended, _blend_report(args, fitted, shares))
    method = f"{args.apply.name}'s" if fitted else args.method
    print("\n".join(said.agreements))
    print(f"{method} blend of {len(args.members)}, {len(blended.ids)} rows: wrote {paths.probs} and {paths.submission}")
    if said.metrics:
        print(f"\n{said.metrics}")


@dataclass(frozen=True, slots=True)
class _Said:
    """What run_blend prints of a blend: how the members agree with it, and the metrics, "" without answers."""

    agreements: list[str]
    metrics: str


def _blend(
    args: argparse.Namespace, fitted: "FittedBlend | None", shares: "Sequence[float]"
) -> "tuple[Predictions, _Said]":
    from ksat.blending import SMOOTHING, agreement, align_members, blend, read_member
    from ksat.calibration import tempered
    from ksat.fitted_blend import apply_blend, margin_fallback
    from ksat.predictions import Predictions
    from ksat.questions import read_questions

    test = read_questions(args.test) if args.test else None
    counts = {question.id: question.num_choices for question in test} if test else None
    members = [read_member(path, counts) for path in args.members]
    first = members[0].predictions
    counts = counts or dict(zip(first.ids, first.num_choices.tolist(), strict=True))
    tables = align_members(members, counts, args.test or args.members[0])
    probs = apply_blend(fitted, tables) if fitted else blend(tables, shares, args.method)
    sure = [tempered(table, t) for table, t in zip(tables, fitted.temperatures, strict=True)] if fitted else tables
    blended = Predictions(tuple(counts), margin_fallback(sure, probs, args.margin))
    agreements = [
        f"{member.path}: weight {share:.3f}, agrees with the blend in {agreement(table, blended.probs):.1%} of the rows"
        + (f"; answers alone, each taken for a probability of {1 - SMOOTHING:g}" if member.label_only else "")
        for member, share, table in zip(members, shares, tables, strict=True)
    ]
    if args.margin:
        changed = 1 - agreement(probs, blended.probs)
        agreements.append(
            f"--margin {args.margin:g}: the surest member decides in close calls; {changed:.1%} of the answers change by it"
        )
        if fitted is None:
            agreements.append(
                "note: nothing tells how sure each member is right to be, so that one that is too sure decides too often: fit the "
                "members' temperatures with --fit, and give --margin to --apply"
            )
    return blended, _Said(
        agreements, metrics_report(members, tables, blended, args.answers, test) if args.answers else ""
    )


def _blend_report(
    args: argparse.Namespace, fitted: "FittedBlend | None", shares: "Sequence[float]"
) -> "dict[str, Any]":
    """What goes beside a blend: its members, how they were weighted and pooled."""
    from ksat.files import file_sha256

    rows = zip(args.members, shares, strict=True)
    return {
        "method": fitted.pool if fitted else args.method,
        "margin": args.margin,
        "members": [{"file": str(path), "sha256": file_sha256(path), "weight": share} for path, share in rows],
        "temperatures": list(fitted.temperatures) if fitted else None,
        "temperature": fitted.temperature if fitted else None,
    }


def metrics_report(
    members: "list[Member]",
    tables: "list[FloatArray]",
    blended: "Predictions",
    answers_path: Path,
    test: "list[Question] | None",
) -> str:
    """The table of every member and the blend on the gold answers, and what its intervals resample."""
    from dataclasses import replace

    from ksat.metrics import baseline_metrics, compute_metrics, format_table
    from ksat.near_duplicates import groups_by_id
    from ksat.predictions import align_answers, is_competition_table, read_answers
    from ksat.questions import read_questions, read_table

    gold = align_answers(blended, read_answers(answers_path), answers_path)
    questions = read_questions(answers_path) if is_competition_table(read_table(answers_path)) else test
    keys = groups_by_id(questions or [])
    groups = [keys.get(row_id, row_id) for row_id in blended.ids]
    rows = baseline_metrics(blended.num_choices, gold, groups)
    for member, table in zip(members, tables, strict=True):
        metrics = compute_metrics(table, gold, groups)
        rows.append((str(member.path), replace(metrics, log_loss=None) if member.label_only else metrics))
    rows.append(("blend", compute_metrics(blended.probs, gold, groups)))
    unit = f"{len(set(groups))} passages" if keys else "single rows (no passages in --answers; give --test for them)"
    return f"{format_table(rows)}\n\n95 % intervals resample {unit}."


if __name__ == "__main__":
    sys.exit(exit_code(main))
