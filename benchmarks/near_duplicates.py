"""Which near-duplicates ksat.near_duplicates finds, which passages it takes for one, and what it costs.

python benchmarks/near_duplicates.py FILE.csv ...                # planted copies, groups of different passages, the validation split
python benchmarks/near_duplicates.py --sizes 10000 20000         # seconds and memory of so many made passages
python benchmarks/near_duplicates.py --patterns 2000 4000        # the same, of one pattern with other names
"""

import argparse
import random
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from ksat.folds import split_validation
from ksat.near_duplicates import are_near, near_rows, passage_groups
from ksat.questions import Question, passage_key, read_questions
from ksat.retrieve import is_same_passage

PLANTED, SEED = 150, 0
SEEDS, VALID = range(5), 0.1  # of the split
COPIED = 0.3  # the share of words that every tenth passage's copy has changed
SHARES = (0.1, 0.2, 0.3, 0.35, 0.4, 0.5)


def main() -> None:
    """Prints what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--sizes", nargs="*", type=int, default=[])
    parser.add_argument("--patterns", nargs="*", type=int, default=[])
    args = parser.parse_args()
    for path in args.files:
        _planted(path)
        _split(path)
    for name, sizes, make in (("made passages", args.sizes, _made), ("of one pattern", args.patterns, _pattern)):
        for size in sizes:
            rows = make(size)
            start = time.process_time()
            groups = len(set(passage_groups(rows)))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{size:,} {name}: {time.process_time() - start:.1f} s of one core, peak {peak:.2f} GiB, {groups:,} groups",
                flush=True,
            )


def _planted(path: Path) -> None:
    firsts = {passage_key(question): question for question in reversed(read_questions(path)) if question.passage}
    rows = list(firsts.values())
    start = time.process_time()
    members = defaultdict(list)
    for row, group in zip(rows, passage_groups(rows), strict=True):
        members[group].append(row.id)
    print(f"\n{path.name}: {len(rows):,} passages, {time.process_time() - start:.1f} s of one core")
    print(f"taken for one: {[ids for ids in members.values() if len(ids) > 1]}")
    words = [word for row in rows for word in row.passage.split(" ")]
    for share in SHARES:
        rng = random.Random(SEED)
        sources = rng.sample(rows, min(PLANTED, len(rows)))
        copies = [replace(row, id=f"copy {row.id}", passage=_edited(row.passage, share, words, rng)) for row in sources]
        everything = [*rows, *copies]
        group_of = dict(zip((row.id for row in everything), passage_groups(everything), strict=True))
        missed = sum(group_of[row.id] != group_of[f"copy {row.id}"] for row in sources)
        background = sum(
            not is_same_passage(row.passage, copy.passage) for row, copy in zip(sources, copies, strict=True)
        )
        rng = random.Random(SEED)
        halves = [
            replace(row, passage=_edited(row.passage[: len(row.passage) // 2], share, words, rng)) for row in sources
        ]
        lost = sum(not are_near(row, half) for row, half in zip(sources, halves, strict=True))
        print(
            f"{share:.0%} of the words changed: {missed} of {len(sources)} missed, {background} taken for background by ksat.retrieve; {lost} "
            "of the first halves missed",
            flush=True,
        )


def _split(path: Path) -> None:
    """Validation rows with a near-duplicate among the training rows, by exact passages, as the split once was, and now.

    Of the file as it is the notion that now splits counts them; of a file with planted copies the copies themselves do, found or not.
    """
    rows = read_questions(path)
    rng = random.Random(SEED)
    words = [word for row in rows for word in row.passage.split(" ")]
    copied = rng.sample([row for row in rows if row.passage], len(rows) // 10)
    copies = [replace(row, id=f"copy {row.id}", passage=_edited(row.passage, COPIED, words, rng)) for row in copied]
    twins = {row.id: copy.id for row, copy in zip(copied, copies, strict=True)}
    twins |= {copy: row for row, copy in twins.items()}
    for name, questions in (("as it is", rows), (f"{len(copies)} edited copies added", [*rows, *copies])):
        group_of = passage_groups(questions)
        for by, groups in (("exact passages", [passage_key(row) for row in questions]), ("passage groups", group_of)):
            counts = []
            for seed in SEEDS:
                split = split_validation(questions, VALID, seed=seed, groups=groups)
                training, held_out = ([questions[i] for i in part] for part in split)
                ids = {row.id for row in training}
                there = sum(twins.get(row.id) in ids for row in held_out)
                counts.append(
                    f"{len(near_rows(held_out, training)) if questions is rows else there} of {len(held_out)}"
                )
            print(
                f"validation rows with a near-duplicate in training, {name}, by {by}: {', '.join(counts)}", flush=True
            )


def _edited(text: str, share: float, words: Sequence[str], rng: random.Random) -> str:
    """The text with a share of its words replaced by words of other passages."""
    own = text.split(" ")
    for place in rng.sample(range(len(own)), max(1, round(len(own) * share))):
        own[place] = rng.choice(words)
    return " ".join(own)


def _made(size: int) -> list[Question]:
    """Passages of 80 words, drawn from 20,000 as words of a language are (Zipf); every tenth has an edited copy."""
    rng = random.Random(SEED)
    words = [
        "".join(chr(rng.randrange(0xAC00, 0xAC00 + 1500)) for _ in range(rng.randint(2, 5))) for _ in range(20_000)
    ]
    weights = [1 / (n + 10) for n in range(len(words))]
    texts = [" ".join(rng.choices(words, weights, k=80)) for _ in range(size * 10 // 11)]
    texts += [_edited(texts[10 * i % (size * 10 // 11)], 0.3, words, rng) for i in range(size - len(texts))]
    return _rows(texts)


def _pattern(size: int) -> list[Question]:
    """One text of 60 words about other names."""
    rng = random.Random(SEED)
    frame = " ".join("".join(chr(rng.randrange(0xAC00, 0xAC00 + 1500)) for _ in range(3)) for _ in range(50))
    names = ["".join(chr(rng.randrange(0xAC00, 0xAC00 + 1500)) for _ in range(4)) for _ in range(10 * size)]
    return _rows([f"{frame} {' '.join(names[10 * i : 10 * i + 10])}" for i in range(size)])


def _rows(texts: Sequence[str]) -> list[Question]:
    return [Question(str(i), text, "?", ("a", "b"), 1) for i, text in enumerate(texts)]


if __name__ == "__main__":
    main()
