"""The whole way on our own sample questions, with the embedded base, without a GPU: what `make demo` runs.

    python demo.py

Fine-tunes two members (full precision, nf4), scores the sample test with them and with three controls, blends the two,
checks the submission, and prints one table. It calls the three scripts as a user would.
"""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from ksat.errors import InputError, exit_code
from ksat.flags import ArgumentParser

TRAIN, TEST, ANSWERS = "data/sample_train.csv", "data/sample_test.csv", "data/sample_test_answers.csv"
# 64 questions keep the demo under ten minutes on two cores: a question takes about 2 s to train on and 0.7 s to score.
TRAINING = [
    "--train",
    TRAIN,
    "--base",
    "embedded",
    "--limit",
    "64",
    "--epochs",
    "1",
    "--valid-fraction",
    "0.2",
    "--overwrite",
]
SCORING = ["--test", TEST, "--overwrite"]
CONTROL = ["--base", "embedded", *SCORING]
STEPS = [
    ["train.py", "--run", "demo-fp32", *TRAINING],
    ["train.py", "--run", "demo-nf4", "--quantization", "nf4", "--seed", "1", *TRAINING],
    ["inference.py", *CONTROL, "--prompt", "prompts/choices-only.txt", "--out", "demo-choices-only"],
    ["inference.py", *CONTROL, "--out", "demo-untuned"],
    ["inference.py", "--ckpt", "checkpoints/demo-fp32", *SCORING, "--out", "demo-fp32"],
    ["inference.py", "--ckpt", "checkpoints/demo-nf4", *SCORING, "--out", "demo-nf4"],
    [
        "ensemble.py",
        "submissions/demo-fp32.probs.csv",
        "submissions/demo-nf4.probs.csv",
        "--out",
        "demo",
        "--test",
        TEST,
        "--overwrite",
    ],
    ["ensemble.py", "--check", "submissions/demo.csv", "--test", TEST],
]


def main() -> None:
    """Runs the steps, then prints the table."""
    ArgumentParser(__doc__).parse_args()
    start = time.monotonic()
    for step in STEPS:
        print(f"\n$ python {shlex.join(step)}", flush=True)
        if subprocess.run([sys.executable, *step], check=False).returncode:
            raise InputError(f"{step[0]} failed; its message stands above")
    print(_table())
    print(f"The file to upload: submissions/demo.csv. All of this took {(time.monotonic() - start) / 60:.1f} minutes.")


def _table() -> str:
    """All rows on the sample test, and paired differences to the untuned base with its scale fitted."""
    import numpy as np

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

    groups = passage_groups(read_questions(TEST))
    files = {
        name: read_probs(f"submissions/demo{name}.probs.csv")
        for name in ("-choices-only", "-untuned", "-fp32", "-nf4", "")
    }
    untuned = files["-untuned"]
    answers = align_answers(untuned, read_answers(ANSWERS), ANSWERS)
    scale = read_json(Path("checkpoints/demo-fp32/metrics.json"))["fitted_scale"]
    fitted = scaled_probs(untuned.probs, scale)
    tuned = {
        "fine-tuned, full precision": files["-fp32"].probs,
        "fine-tuned, nf4": files["-nf4"].probs,
        "blend of the two": files[""].probs,
    }
    positions = read_json(Path("checkpoints/demo-fp32/run.json"))["settings"]["answer_positions"]
    probs = {
        "choices without passage and question": files["-choices-only"].probs,
        "untuned base": untuned.probs,
        f"untuned base, scale {scale:.2f} from validation": fitted,
        **tuned,
    }
    rows = baseline_metrics(untuned.num_choices, answers, groups, positions)
    rows += [(name, compute_metrics(table, answers, groups)) for name, table in probs.items()]
    lines = [
        f"\nSample test, {len(answers)} questions, 95 % intervals:\n",
        format_table(rows),
        "\nDifference to the fitted untuned base, same questions:",
    ]
    lines += [
        format_difference(name, paired_difference(table, fitted, answers, groups)) for name, table in tuned.items()
    ]
    chance = float(np.mean(1 / untuned.num_choices))
    low = dict(rows)["choices without passage and question"].accuracy.low
    verdict = (
        "within its interval of chance"
        if low is not None and low <= chance
        else "above chance: the samples give themselves away"
    )
    lines.append(f"\nThe choices alone are {verdict}.")
    lines.append(
        "A 270M model is a stand-in: it shows that everything works, not what a 32B reaches. An interval that holds 0 shows no gain."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
