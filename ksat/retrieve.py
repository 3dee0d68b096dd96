"""Look up background for every question: a competition CSV -> the same with a column `context`.

python -m ksat.retrieve --corpus wiki.jsonl --questions data/train.csv --out data/train_context.csv
python -m ksat.retrieve --corpus kowiki-latest-pages-articles.xml.bz2 --questions data/test.csv --out data/test_context.csv

The corpus is JSON lines with `title` and `text`, or a MediaWiki dump; it is cut into passages of about 400 characters. Of a
question's own passage nothing comes back: it would tell the model what stands in the prompt already.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ksat.bm25 import Index
from ksat.corpus import cut_passages, read_corpus
from ksat.errors import InputError, exit_code
from ksat.files import claim_outputs, csv_writer, require_no_input
from ksat.flags import KINDS_HELP, ArgumentParser, file_name, file_path, kinds_file, positive
from ksat.kinds import find_kind
from ksat.near_duplicates import are_near, letters_of
from ksat.questions import Question, read_csv_rows, read_questions
from ksat.tables import markdown_table

# Below this share of the question's weight nothing is found. It takes away what is worthless and no more: on tests/facts.jsonl
# the right text passes for 98 of 100 questions, and of the best texts where the right one is missing 57 of 100 are refused;
# among 8,056 other texts 100 and 9 (with passages of 290 characters 96 and 61). At 0.08 it was 93 and 87 (65 and 100).
FLOOR = 0.045
_NEXT_BEST = 0.5  # behind the best passage, one of less than half its score is about something else
_GRAM = 4  # characters; an edited word leaves the others' grams alone
OVERLAP = 0.5
SHORTEST_PASSAGE = 20  # letters and digits; a text that has fewer in common with a passage does not quote it
_CANDIDATES = 64  # passages looked at beyond those that are asked for


@dataclass(frozen=True, slots=True)
class Context:
    """What was found for a question.

    Attributes:
        text: the passages, best first, each behind its title; "" for nothing.
        score: of the best one, 0 to 1; 0 for nothing.
        num_own: better ones that were refused as the question's own passage.
    """

    text: str
    score: float
    num_own: int


def is_same_passage(passage: str, text: str) -> bool:
    """Whether a text and a passage are near-duplicates, or the text has the passage in it, or over half of either one's
    4-character pieces are the other's.

    Blanks, punctuation and case count nothing. A passage of fewer than 20 letters is never found: every text on its subject
    would have it. Of an excerpt are_near asks more: here half of one gives the passage away, as where a corpus cuts it in two.
    """
    whole, other = letters_of(passage), letters_of(text)
    if len(whole) < SHORTEST_PASSAGE:
        return False
    left, right = _grams(whole), _grams(other)
    has_half = whole in other or len(left & right) > OVERLAP * min(len(left), len(right))
    return has_half or are_near(*(Question("", each, "", (), None) for each in (passage, text)))


def _grams(letters: str) -> set[str]:
    return {letters[i : i + _GRAM] for i in range(len(letters) - _GRAM + 1)}


def find_context(index: Index, question: Question, *, top: int, max_characters: int) -> Context:
    """The best passages for a question that are neither its own nor each other again.

    Args:
        index: the corpus.
        question: whose passage is kept out.
        top: at most as many passages.
        max_characters: of all passages together; a first one that is longer is cut, later ones are left out.
    """
    scores = index.search(question)
    count = min(len(scores), top + _CANDIDATES)
    best = np.argpartition(-scores, count - 1)[:count]
    chosen: list[str] = []
    best_score, num_own, length = 0.0, 0, 0
    for at in sorted(best.tolist(), key=lambda at: (-scores[at], at)):
        passage = index.passages[at]
        if scores[at] < max(FLOOR, _NEXT_BEST * best_score) or len(chosen) == top:
            break
        if is_same_passage(question.passage, passage.text):
            num_own += 1
            continue
        text = f"{passage.title}: {passage.text}" if passage.title else passage.text
        text = text if chosen else text[:max_characters]
        if length + len(text) > max_characters or any(is_same_passage(text, other) for other in chosen):
            continue
        best_score = best_score or float(scores[at])
        chosen.append(text)
        length += len(text) + 1
    return Context("\n".join(chosen), best_score, num_own)


def context_writer(source: Path, contexts: Sequence[str]) -> Callable[[Path], None]:
    """Fills a file with the CSV again and a column `context`, every other cell as it was.

    Args:
        source: a competition CSV that read_questions takes.
        contexts: one a row.
    """
    header, *rows = read_csv_rows(source)
    rows = [[*row, text] for row, text in zip(rows, contexts, strict=True)]
    return csv_writer([*header, "context"], rows, quote_all=True)


def format_report(questions: Sequence[Question], contexts: Sequence[Context]) -> str:
    """A Markdown table of how many rows got what, by kind and over all.

    Args:
        questions: N of them.
        contexts: what was found for each.
    """
    kinds = [find_kind(question) for question in questions]
    rows = []
    for name in ("reading", "knowledge", "all"):
        group = [context for context, kind in zip(contexts, kinds, strict=True) if name in (kind, "all")]
        found = [context for context in group if context.text]
        mean_score = f"{np.mean([context.score for context in found]):.3f}" if found else "-"
        mean_length = f"{np.mean([len(context.text) for context in found]):.0f}" if found else "-"
        num_own = sum(context.num_own > 0 for context in group)
        rows.append([name, str(len(group)), str(len(found)), mean_score, mean_length, str(num_own)])
    header = ["kind", "rows", "with context", "mean score", "mean characters", "own passage refused"]
    return markdown_table(header, rows)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = ArgumentParser(__doc__, prog="python -m ksat.retrieve")
    add = parser.add_argument
    add(
        "--corpus",
        required=True,
        type=file_path,
        metavar="FILE",
        help="JSON lines, or a MediaWiki dump: .xml, .xml.bz2",
    )
    add(
        "--questions",
        required=True,
        type=file_path,
        metavar="CSV",
        help="the competition's file, with or without answers",
    )
    add("--kinds", type=file_name, metavar="FILE|wording", help=KINDS_HELP)
    add("--out", required=True, type=file_path, metavar="CSV", help="where to write it with its context")
    add("--top", type=positive, default=3, metavar="N", help="passages a question at most (default: 3)")
    add(
        "--max-characters",
        type=positive,
        default=1200,
        metavar="C",
        help="of a question's passages together; 1200 are some 700 tokens of the prompt (default: 1200)",
    )
    add("--overwrite", action="store_true", help="replace --out if it exists")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Fills the column and prints how many rows got what."""
    args = build_parser().parse_args(argv)
    inputs = [args.corpus, args.questions, kinds_file(args.kinds)]
    require_no_input([args.out], inputs, "--out")
    if args.out.is_file() and args.overwrite and "context" not in read_csv_rows(args.out)[0]:
        raise InputError(f"--out {args.out}: has no column 'context', so it is none of ours; take another name")
    with claim_outputs([args.out], inputs=inputs, overwrite=args.overwrite, command=vars(args)) as outputs:
        questions, contexts = _find_contexts(args)
        outputs.write([context_writer(args.questions, [context.text for context in contexts])])
    print(f"\n{format_report(questions, contexts)}\n\nwrote {args.out}: {len(questions)} rows")


def _find_contexts(args: argparse.Namespace) -> tuple[list[Question], list[Context]]:
    from tqdm import tqdm

    questions = read_questions(args.questions, kinds=args.kinds)
    if "context" in read_csv_rows(args.questions)[0]:
        raise InputError(f"--questions {args.questions}: has a column 'context' already; take the file without it")
    started = time.monotonic()
    articles = tqdm(read_corpus(args.corpus), desc="reading", unit=" articles", mininterval=1)
    index = Index(passage for article in articles for passage in cut_passages(article))
    print(f"{len(index.passages)} passages indexed in {time.monotonic() - started:.0f} s")
    limits = {"top": args.top, "max_characters": args.max_characters}
    contexts = [
        find_context(index, question, **limits) for question in tqdm(questions, desc="searching", mininterval=1)
    ]
    return questions, contexts


if __name__ == "__main__":
    sys.exit(exit_code(main))
