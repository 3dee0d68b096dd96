"""Blend probability files into one, and its submission; or check a submission.

    python ensemble.py submissions/a.probs.csv submissions/b.probs.csv --out blend
    python ensemble.py submissions/a.probs.csv submissions/b.probs.csv --out blend --method hard --weights 2 1
    python ensemble.py submissions/a.probs.csv friend.csv --out blend --test data/test.csv --answers answers.csv
    python ensemble.py --check submissions/blend.csv --test data/test.csv

Members are joined by id. A label-only CSV (`id,answer`) counts as 0.9 for its answer and needs --test. Writes
submissions/NAME.probs.csv and submissions/NAME.csv.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ksat.errors import InputError, exit_code
from ksat.flags import data_file

if TYPE_CHECKING:
    from ksat.blending import Member
    from ksat.predictions import FloatArray, Predictions
    from ksat.questions import Question

DEFAULT_TEST = Path("data/test.csv")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    members = parser.add_argument_group("members")
    members.add_argument("members", nargs="*", type=Path, metavar="CSV", help="probability files, or id,answer files")
    members.add_argument("--test", type=Path, metavar="CSV", help="test questions: row order, number of choices")
    blend = parser.add_argument_group("blend")
    blend.add_argument("--method", choices=["soft", "geometric", "hard"], default="soft", help="default: soft")
    blend.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one positive weight a member, any scale; default: equal"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", metavar="NAME", help="name in submissions/, or a path without its ending")
    output.add_argument("--overwrite", action="store_true", help="replace the two output files if they exist")
    output.add_argument("--answers", type=Path, metavar="CSV", help="gold answers: prints the metrics of all")
    check = parser.add_argument_group("check")
    check.add_argument(
        "--check",
        type=Path,
        metavar="CSV",
        help="validate this submission against --test (default: data/test.csv, else the samples)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs the command line `argv` (default: the process's own)."""
    args = build_parser().parse_args(argv)
    if args.check:
        if args.members or args.out:
            raise InputError("--check validates one submission; blend with another call (no members, no --out)")
        check(args.check, args.test)
    elif not args.members or not args.out:
        raise InputError("give probability files and --out NAME, or --check FILE")
    else:
        run_blend(
            args.members,
            out=args.out,
            method=args.method,
            weights=args.weights,
            answers_path=args.answers,
            test_path=args.test,
            overwrite=args.overwrite,
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


def run_blend(
    paths: list[Path],
    *,
    out: str,
    method: str,
    weights: list[float] | None,
    answers_path: Path | None,
    test_path: Path | None,
    overwrite: bool,
) -> None:
    """Reads the members, writes their blend and prints how they agree; raises InputError before it writes anything."""
    from ksat.blending import agreement, align_members, blend, check_weights, read_member
    from ksat.predictions import Predictions, output_paths, write_predictions
    from ksat.questions import read_questions

    outputs = output_paths(out, overwrite)
    targets = [path.resolve() for path in outputs]
    if taken := [path for path in [*paths, answers_path, test_path] if path and path.resolve() in targets]:
        raise InputError(f"--out {out!r} would replace the input {taken[0]}; choose another --out")
    shares = check_weights(weights, len(paths))
    test = read_questions(test_path) if test_path else None
    counts = {question.id: question.num_choices for question in test} if test else None
    members = [read_member(path, counts) for path in paths]
    first = members[0].predictions
    counts = counts or dict(zip(first.ids, first.num_choices.tolist(), strict=True))
    tables = align_members(members, counts, test_path or paths[0])
    blended = Predictions(tuple(counts), blend(tables, shares, method))
    report = metrics_report(members, tables, blended, answers_path, test) if answers_path else ""
    write_predictions(outputs, blended)

    for path, share, table in zip(paths, shares, tables, strict=True):
        print(f"{path}: weight {share:.3f}, agrees with the blend in {agreement(table, blended.probs):.1%} of the rows")
    print(f"{method} blend of {len(paths)}, {len(blended.ids)} rows: wrote {outputs[0]} and {outputs[1]}")
    if report:
        print(f"\n{report}")


def metrics_report(
    members: "list[Member]",
    tables: "list[FloatArray]",
    blended: "Predictions",
    answers_path: Path,
    test: "list[Question] | None",
) -> str:
    """The table of every member and the blend on the gold answers, and what its intervals resample."""
    from dataclasses import replace

    from ksat.metrics import compute_metrics, format_table, random_baseline
    from ksat.predictions import align_answers, is_competition_table, read_answers
    from ksat.questions import passage_key, read_questions, read_table

    gold = align_answers(blended, read_answers(answers_path), answers_path)
    questions = read_questions(answers_path) if is_competition_table(read_table(answers_path)) else test
    keys = {question.id: passage_key(question) for question in questions or []}
    groups = [keys.get(row_id, row_id) for row_id in blended.ids]
    rows = [("uniform guess", random_baseline(blended.num_choices, gold))]
    for member, table in zip(members, tables, strict=True):
        metrics = compute_metrics(table, gold, groups)
        rows.append((str(member.path), replace(metrics, log_loss=None) if member.label_only else metrics))
    rows.append(("blend", compute_metrics(blended.probs, gold, groups)))
    unit = f"{len(set(groups))} passages" if keys else "single rows (no passages in --answers; give --test for them)"
    return f"{format_table(rows)}\n\n95 % intervals resample {unit}."


if __name__ == "__main__":
    sys.exit(exit_code(main))
