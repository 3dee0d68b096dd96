"""What is in the data: counts, lengths in tokens, what is cut, near-duplicates, and labels that may be wrong."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd

from ksat.calibration import fit_temperature, tempered
from ksat.encoding import Encoder
from ksat.errors import InputError, bad_rows
from ksat.files import claim_outputs, text_writer
from ksat.flags import kinds_file
from ksat.kinds import find_kind
from ksat.metrics import count_positions
from ksat.near_duplicates import near_duplicate_pairs, same_questions
from ksat.predictions import Predictions, read_probs, sizes_and_answers
from ksat.provenance import require_held_out
from ksat.questions import Question, passage_key, read_questions
from ksat.tables import markdown_table

SUSPICIOUS = 0.05  # out-of-fold probability of the given answer
SKEWED = 0.01  # p-value of a position that is right too often, for a file
SHOWN = 10  # rows of a list; the CSV has all


@dataclass(frozen=True, slots=True)
class Suspect:
    """A label that the models which did not see it think unlikely.

    Attributes:
        id: of the question.
        answer: as given, counted from 1.
        prob: out-of-fold probability of that answer, tempered.
        predicted: what the models answer instead.
        prob_predicted: its probability.
    """

    id: str
    answer: int
    prob: float
    predicted: int
    prob_predicted: float


def find_suspects(predictions: Predictions, questions: Mapping[str, Question]) -> tuple[list[Suspect], float]:
    """Rows whose given answer has a tempered out-of-fold probability under 0.05, the least likely first; and the temperature.

    Tempered on the same rows, so that a model that is too sure does not make suspects of the labels that it gets wrong.
    """
    answers = np.array([questions[row_id].answer_index + 1 for row_id in predictions.ids], dtype=np.int64)
    temperature = fit_temperature(predictions.probs, answers)
    probs = tempered(predictions.probs, temperature)
    rows = zip(predictions.ids, probs, answers.tolist(), predictions.answers.tolist(), strict=True)
    found = [
        Suspect(row_id, answer, float(row[answer - 1]), predicted, float(row[predicted - 1]))
        for row_id, row, answer, predicted in rows
        if row[answer - 1] < SUSPICIOUS
    ]
    return sorted(found, key=lambda suspect: (suspect.prob, suspect.id)), temperature


def report(files: Sequence[tuple[Path, Sequence[Question]]], encoder: Encoder, base: str) -> tuple[str, pd.DataFrame]:
    """Markdown: every file's counts and lengths, near-duplicates inside each and between every two; and those as a table.

    Args:
        files: what is trained on, external files, the test; in that order.
        encoder: of the base whose tokens are counted.
        base: its name.
    """
    names = [path.name for path, _ in files]
    parts = ["# What is in the data", _counts(names, [rows for _, rows in files])]
    parts += [
        text for path, rows in files for text in (_kinds_text(path.name, rows), _skew_text(path.name, rows)) if text
    ]
    parts.append(f"## Lengths\nTokens of whole prompts by the tokenizer of {base}, limit {encoder.max_tokens:,}.\n")
    parts.append(_lengths(names, [rows for _, rows in files], encoder))
    parts.append(
        "## Near-duplicates\nPassages that are the same but for a third of their words, or one an excerpt of the other. The CSV has all; "
        "`--leave-out` trains on no row that stands in another file.\n"
    )
    text, table = _duplicates(files)
    return "\n".join([*parts, text]), table


def _counts(names: Sequence[str], files: Sequence[Sequence[Question]]) -> str:
    def count(rows: Sequence[Question], size: int, answer: int) -> int:
        return sum(question.num_choices == size and question.answer == answer for question in rows)

    sizes = sorted({question.num_choices for rows in files for question in rows})
    lines = [
        ["questions", *(f"{len(rows):,}" for rows in files)],
        ["passages", *(f"{len({passage_key(question) for question in rows}):,}" for rows in files)],
        ["questions that stand there twice", *(f"{_num_doubled(rows):,}" for rows in files)],
        ["with <보기>", *(f"{sum(bool(question.question_plus) for question in rows):,}" for rows in files)],
        ["with a context", *(f"{sum(bool(question.context) for question in rows):,}" for rows in files)],
    ]
    kinds = [Counter(find_kind(question) for question in rows) for rows in files]
    lines += [[kind, *(f"{counter[kind]:,}" for counter in kinds)] for kind in ("reading", "knowledge")]
    lines += [
        [f"{size} choices", *(f"{sum(question.num_choices == size for question in rows):,}" for rows in files)]
        for size in sizes
    ]
    answers = [
        [
            f"{size} choices, answer {answer}",
            *(f"{count(rows, size, answer):,}" if any(question.answer for question in rows) else "-" for rows in files),
        ]
        for size in sizes
        for answer in range(1, size + 1)
    ]
    return f"\n{markdown_table(['', *names], lines + answers)}\n"


def _kinds_text(name: str, rows: Sequence[Question]) -> str:
    """Says where the number of choices decides who counts as reading."""
    if not any(question.kind_hint for question in rows):
        return ""
    return (
        f"{name}: where no column tells, four choices count as knowledge (KMMLU, MMMLU) and five, with a passage, as reading (college entrance exam, "
        "KLUE), as in the competition's files; --kinds wording goes by the wording instead.\n"
    )


def _skew_text(name: str, rows: Sequence[Question]) -> str:
    """Names the positions that are right in clearly more rows than chance, for a model may learn them and read nothing.

    An exact binomial test of every position, corrected (Bonferroni) for the positions of all numbers of choices.
    """
    from scipy.stats import binomtest

    counts = count_positions(*sizes_and_answers(rows))
    num_tests = sum(map(len, counts.values()))
    found = [
        f"answer {place} is right in {right / sum(places):.3f} of the {sum(places):,} rows of {size} choices"
        for size, places in counts.items()
        for place, right in enumerate(places, start=1)
        if binomtest(right, sum(places), 1 / int(size), alternative="greater").pvalue * num_tests < SKEWED
    ]
    if not found:
        return ""
    return (
        f"**{name}: {'; '.join(found)}**, more than chance. A model may learn the place and not the content: train with "
        "--choice-orders K, K the number of choices, so that every place is right as often.\n"
    )


def _num_doubled(rows: Sequence[Question]) -> int:
    """Rows whose passage, question and choices another row above has, in whatever order of choices."""
    return len(rows) - len(
        {(passage_key(row), row.question, row.question_plus, frozenset(row.choices)) for row in rows}
    )


def _lengths(names: Sequence[str], files: Sequence[Sequence[Question]], encoder: Encoder) -> str:
    header = ["", "median", "95 %", "99 %", "longest", "cut", "characters of passage, median", "longest"]
    body = []
    for name, rows in zip(names, files, strict=True):
        encoded = [encoder.encode(question) for question in rows]
        tokens = np.array([len(one.prompt_ids) for one in encoded])
        characters = np.array([len(question.passage) for question in rows])
        cuts = sum(one.num_cut_characters > 0 for one in encoded)
        figures = [*np.percentile(tokens, [50, 95, 99]), tokens.max(), cuts, np.median(characters), characters.max()]
        body.append([name, *(f"{figure:,.0f}" for figure in figures)])
    return f"{markdown_table(header, body)}\n"


def _duplicates(files: Sequence[tuple[Path, Sequence[Question]]]) -> tuple[str, pd.DataFrame]:
    """What the report says of duplicates inside each file and between every two, and all of them as a table."""
    lines, found = [], []
    for i, (path, rows) in enumerate(files):
        for other_path, other_rows in files[i:]:
            inside = other_path == path
            pairs = near_duplicate_pairs(rows, None if inside else other_rows)
            questions = [] if inside else same_questions(rows, other_rows)
            where = f"inside {path.name}" if inside else f"{path.name} and {other_path.name}"
            touched = _num_touched(
                {pair.id_b for pair in pairs} | ({p.id_a for p in pairs} if inside else set()), other_rows
            )
            lines.append([where, f"{len(pairs):,}", f"{touched:,}", "-" if inside else f"{len(questions):,}"])
            found += [("passage", path, pair.id_a, other_path, pair.id_b, round(pair.similarity, 3)) for pair in pairs]
            found += [("question", path, id_a, other_path, id_b, 1.0) for id_a, id_b in questions]
    table = pd.DataFrame(found, columns=["same", "file_a", "id_a", "file_b", "id_b", "similarity"])
    header = ["", "pairs of passages", "rows of the second file on them", "pairs of the same question"]
    text = f"{markdown_table(header, lines)}\n"
    for same, title in (
        ("passage", "The same passage"),
        ("question", "The same question: words and choices, on such a passage"),
    ):
        if best := sorted((row for row in found if row[0] == same), key=lambda row: -row[5])[:SHOWN]:
            shown = [
                [f"{a.name}: {id_a}", f"{b.name}: {id_b}", f"{similarity:.2f}"]
                for _, a, id_a, b, id_b, similarity in best
            ]
            text += f"\n{title}, the first {len(shown)}:\n\n{markdown_table(['id', 'id', 'similarity'], shown, num_texts=2)}\n"
    return text, table


def _num_touched(ids: set[str], rows: Sequence[Question]) -> int:
    """How many rows stand on the passages of these."""
    keys = {passage_key(row) for row in rows if row.id in ids}
    return sum(passage_key(row) in keys for row in rows)


def suspects_text(
    suspects: Sequence[Suspect], temperature: float, num_questions: int, questions: Mapping[str, Question]
) -> str:
    """Markdown: the least likely labels, with the beginning of their questions; a reader decides."""
    head = (
        f"## Labels to look at\n{len(suspects)} of {num_questions} given answers have an out-of-fold probability under {SUSPICIOUS} "
        f"(at temperature {temperature:.2f}, fitted to these rows; above 1 the models were too sure). "
        "A model that is often wrong names many that are right: read before you change one.\n"
    )
    body = [
        [s.id, questions[s.id].question[:40], f"{s.answer} ({s.prob:.3f})", f"{s.predicted} ({s.prob_predicted:.3f})"]
        for s in suspects[:SHOWN]
    ]
    return f"{head}\n{markdown_table(['id', 'question', 'given', 'predicted'], body, num_texts=2)}\n" if body else head


def write_report(
    folder: Path,
    files: Sequence[Path],
    encoder: Encoder,
    base: str,
    *,
    test: Path | None,
    oof: Path | None,
    prompt: str | None,
    kinds: str | None,
    limit: int | None,
    overwrite: bool,
) -> None:
    """Prints the report and writes it as folder/<first file>.md, all duplicates as a CSV; with `oof` also the suspicious labels.

    Args:
        folder: where to.
        files: labelled CSVs; labels are looked at in the first.
        encoder: of the base whose tokens are counted.
        base: its name.
        test: questions to compare with, without labels.
        oof: out-of-fold probabilities of the first file.
        prompt: file of the encoder's wording, if it has one.
        kinds: of read_questions.
        limit: the first so many rows of each file alone.
        overwrite: replace a report that is there.

    Raises:
        InputError: a file can't be read, a report is there, or suspicious labels which this one does not replace, or `oof` has rows that
            are no labelled ones of the first file.
    """
    report_path = folder / f"{files[0].stem}.md"
    suspects_path = folder / f"{files[0].stem}-suspicious.csv"
    duplicates_path = folder / f"{files[0].stem}-duplicates.csv"
    paths = [*([] if oof is None else [suspects_path]), duplicates_path, report_path]
    command = (files, base, test, oof, prompt, kinds, limit)
    with claim_outputs(
        paths,
        inputs=[*files, test, oof, prompt, kinds_file(kinds)],
        overwrite=overwrite,
        command=command,
        flag="--train file",
    ) as outputs:
        if oof is None and suspects_path.exists():  # it may hold a reader's remarks, and is not of this report
            raise InputError(
                f"{suspects_path}: is of a report with --oof, and this one is without; give --oof, or move the file away"
            )
        tables = [(path, read_questions(path, kinds=kinds)[:limit]) for path in [*files, *([test] if test else [])]]
        text, duplicates = report(tables, encoder, base)
        writers = [_table_writer(duplicates)]
        if oof is not None:
            suspects, told = _suspects(oof, files[0], tables[0][1])
            text += told
            writers.insert(0, _table_writer(suspects))
        outputs.write([*writers, text_writer(text)])
    print(f"{text}\nwrote {' and '.join(map(str, reversed(paths)))}")


def _table_writer(table: pd.DataFrame) -> Callable[[Path], None]:
    return lambda path: table.to_csv(path, index=False)


def _suspects(oof: Path, file: Path, rows: Sequence[Question]) -> tuple[pd.DataFrame, str]:
    """The suspicious labels of a file as a table, and what the report says of them."""
    questions = {question.id: question for question in rows if question.answer is not None}
    predictions = read_probs(oof)
    if unknown := [(row_id, "") for row_id in predictions.ids if row_id not in questions]:
        raise bad_rows(oof, f"are no labelled rows of {file}", unknown, "give the file that the folds were cut from")
    require_held_out([oof])
    suspects, temperature = find_suspects(predictions, questions)
    table = pd.DataFrame([asdict(suspect) for suspect in suspects], columns=[f.name for f in fields(Suspect)])
    return table, f"\n{suspects_text(suspects, temperature, len(predictions.ids), questions)}"
