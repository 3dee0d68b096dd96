"""What fine-tuning gains on real questions: untuned base, the same with its scale fitted, fine-tune; paired.

    python benchmarks/real_data.py --train hellaswag_train.csv --test hellaswag_test.csv --run kobest-800 --limit 800 --epochs 1

Both files are labelled competition CSVs. Flags that this script does not know go to train.py. Files of an earlier call are
kept and used, so an interrupted benchmark goes on.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from ksat.files import read_json
from ksat.metrics import (
    baseline_metrics,
    compute_metrics,
    format_difference,
    format_table,
    paired_difference,
    scaled_probs,
)
from ksat.near_duplicates import passage_groups
from ksat.predictions import align_answers, read_answers, read_probs
from ksat.questions import read_questions


def main() -> None:
    """Runs what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--base", default="embedded")
    args, training_flags = parser.parse_known_args()
    untuned, checkpoint = f"{args.run}-untuned", Path("checkpoints") / args.run
    if not (checkpoint / "run.json").exists():
        _call("train.py", "--train", args.train, "--base", args.base, "--run", args.run, *training_flags)
    for name, model in ((args.run, ["--ckpt", str(checkpoint)]), (untuned, ["--base", args.base])):
        if not Path(f"submissions/{name}.csv").exists():
            _call("inference.py", *model, "--test", args.test, "--out", name)

    groups = passage_groups(read_questions(args.test, labelled=True))
    raw, tuned = (read_probs(f"submissions/{name}.probs.csv") for name in (untuned, args.run))
    gold = align_answers(raw, read_answers(args.test), args.test)
    scale = read_json(checkpoint / "metrics.json")["fitted_scale"]
    fitted = scaled_probs(raw.probs, scale)
    names = ("untuned base", f"untuned base, scale {scale:.2f} from validation", "fine-tuned")
    positions = read_json(checkpoint / "run.json")["settings"]["answer_positions"]
    rows = baseline_metrics(raw.num_choices, gold, groups, positions)
    rows += [
        (n, compute_metrics(p, gold, groups)) for n, p in zip(names, (raw.probs, fitted, tuned.probs), strict=True)
    ]
    print(format_table(rows))
    print("\nDifference to the fitted untuned base, same questions, 95 % intervals:")
    print(format_difference("fine-tuned", paired_difference(tuned.probs, fitted, np.asarray(gold), groups)))


def _call(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True)


if __name__ == "__main__":
    main()
