"""The command line of the storm."""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    """Runs the parts and prints a table; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python tests/storm", description="Fuzzed inputs, damaged files, kills.")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="S", help="of every part's cases, this share (default: all)"
    )
    parser.add_argument("--gate", action="store_true", help="the few cases of each part that the gate runs")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone; a name's beginning is enough")
    parser.add_argument("--seed", type=int, metavar="N", help="case N of one part alone")
    parser.add_argument(
        "--go-on", action="store_true", help="keep what STEM.jsonl holds and run the cases that are missing there"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes at once (default: 2)")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "reports" / "storm",
        metavar="STEM",
        help="STEM.jsonl and STEM.md (default: reports/storm)",
    )
    args = parser.parse_args(argv)
    from storm.parts import run_storm

    return run_storm(
        args.only,
        scale=args.scale,
        gate=args.gate,
        seed=args.seed,
        go_on=args.go_on,
        num_workers=args.workers,
        out=args.out,
    )


if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
    sys.exit(main())
