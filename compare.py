"""Compare runs on the same labelled questions: what is significant, what survives the private board, which two to select.

    python compare.py submissions/a-oof.probs.csv submissions/b-oof.probs.csv --answers data/train.csv
    python compare.py a.probs.csv b.probs.csv c.probs.csv --answers data/train.csv --pick-two --out abc

Writes nothing but with --out: comparisons/NAME/ gets comparison.md, and of two or more runs comparison.csv and comparison.png.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ksat.errors import InputError, exit_code
from ksat.flags import KINDS_HELP, ArgumentParser, file_name, file_path, kinds_file, path_text, positive

if TYPE_CHECKING:
    from collections.abc import Callable

    from ksat.versus import Comparison

COMPARISONS = Path("comparisons")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=file_path,
        metavar="CSV",
        help="probability files of the same questions, out of fold or held out",
    )
    add(
        "--answers",
        type=file_path,
        required=True,
        metavar="CSV",
        help="labelled questions, or id,answer with --questions",
    )
    add("--questions", type=file_path, metavar="CSV", help="the questions, where --answers has labels alone")
    add("--kinds", type=file_name, metavar="FILE|wording", help=KINDS_HELP)
    add(
        "--half",
        type=positive,
        metavar="N",
        help="questions in one half of the leaderboard (default: half of those compared)",
    )
    add("--pick-two", action="store_true", help="name the two submissions to select for the end, and why")
    add("--out", type=path_text, metavar="NAME", help="write the comparison to comparisons/NAME/")
    add("--overwrite", action="store_true", help="replace the comparison of that name")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Compares, prints, and writes with --out."""
    args = build_parser().parse_args(argv)
    from ksat.files import claim_outputs, remove_all, require_name, require_no_input
    from ksat.versus import format_comparison

    if args.pick_two and len(args.runs) < 2:
        raise InputError("--pick-two: two are picked among at least two files; name more")
    if args.out is None and args.overwrite:
        raise InputError("--overwrite needs --out NAME: nothing is written without it")
    if args.out is None:
        found = _compare(args)
        print(format_comparison(found, pick=args.pick_two))
        return
    folder = COMPARISONS / require_name("--out", args.out)
    of_pairs, names = ("comparison.csv", "comparison.png"), ["comparison.md"]
    if len(args.runs) > 1:
        names = [*of_pairs, *names]
    paths = [folder / name for name in names]
    inputs = [*args.runs, args.answers, args.questions, kinds_file(args.kinds)]
    require_no_input([folder / name for name in of_pairs], inputs, "--out")  # of one run the older ones are removed
    with claim_outputs(paths, inputs=inputs, overwrite=args.overwrite, command=vars(args)) as outputs:
        found = _compare(args)
        text = format_comparison(found, pick=args.pick_two)
        stale = [folder / name for name in of_pairs if name not in names] if outputs.are_ours else []
        outputs.write(_writers(found, text), before_done=lambda: remove_all(stale))
    print(f"{text}\n\nwrote {', '.join(names)} in {folder}")


def _compare(args: argparse.Namespace) -> "Comparison":
    from ksat.provenance import require_held_out
    from ksat.versus import compare

    found = compare(args.runs, args.answers, args.questions, kinds=args.kinds, half=args.half)
    require_held_out(args.runs)
    return found


def _writers(found: "Comparison", text: str) -> "list[Callable[[Path], None]]":
    """What fills comparison.csv and comparison.png, where there are pairs, and comparison.md."""
    import pandas as pd

    from ksat.files import text_writer
    from ksat.versus import draw_comparison, pair_records

    markdown = text_writer(f"# {' / '.join(row.name for row in found.rows)}\n\n{text}\n")
    if not found.pairs:
        return [markdown]
    records = pd.DataFrame(pair_records(found))
    return [
        lambda path: records.to_csv(path, index=False),
        lambda path: draw_comparison(path, found),
        markdown,
    ]


if __name__ == "__main__":
    sys.exit(exit_code(main))
