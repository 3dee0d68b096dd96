"""The base that train.py takes on every card of explore.py, beside the one that explore.py marks there; no GPU, no network.

python benchmarks/default_bases.py
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ksat.devices import GPUS
from ksat.fit import choose_base, fit_all, fit_table
from ksat.tables import markdown_table


def main() -> None:
    """Prints the table, and fails if the two differ anywhere."""
    rows, differ = [], []
    for key, device in GPUS.items():
        taken, _ = choose_base(device, samples=False)
        found = re.search(r"^\| -> (\S+)", fit_table(fit_all(device), device), re.MULTILINE)
        marked = found[1].rstrip("?") if found else "none"
        rows.append([f"{key} ({device.memory_gib:.1f} GiB)", taken, marked])
        differ += [key] * (taken != marked)
    print(markdown_table(["card", "train.py without --base", "explore.py marks"], rows, num_texts=3))
    if differ:
        raise SystemExit(f"they differ on {', '.join(differ)}")


if __name__ == "__main__":
    main()
