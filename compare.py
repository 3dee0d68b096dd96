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
from ksat.flags import ArgumentParser, file_path, path_text, positive

if TYPE_CHECKING:
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
    add(
        "--half",
        type=positive,
        metavar="N",
        help="questions in one half of the leaderboard (default: half of those compared)",
    )
    add("--pick-two", action="store_true", help="name the two submissions to select for the end, and why")
    add("--out", type=path_text, metavar="NAME", help="write the comparison to comparisons/NAME/")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Compares, prints, and writes with --out."""
    args = build_parser().parse_args(argv)
    if args.out is not None and ("/" in args.out or args.out in ("", ".", "..")):
        raise InputError(f"--out {args.out!r}: expected a name; the folder is comparisons/<name>")
    from ksat.versus import compare, format_comparison

    if args.pick_two and len(args.runs) < 2:
        raise InputError("--pick-two: two are picked among at least two files; name more")
    found = compare(args.runs, args.answers, args.questions, half=args.half)
    text = format_comparison(found, pick=args.pick_two)
    print(text)
    if args.out:
        _write(COMPARISONS / args.out, found, text)


def _write(folder: Path, found: "Comparison", text: str) -> None:
    import pandas as pd

    from ksat.files import write_atomic, write_text
    from ksat.versus import draw_comparison, pair_records

    write_text(folder / "comparison.md", f"# {' / '.join(row.name for row in found.rows)}\n\n{text}\n")
    written = "comparison.md"
    if found.pairs:
        records = pd.DataFrame(pair_records(found))
        write_atomic(folder / "comparison.csv", lambda beside: records.to_csv(beside, index=False))
        draw_comparison(folder / "comparison.png", found)
        written = "comparison.md, comparison.csv and comparison.png"
    print(f"\nwrote {written} in {folder}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
