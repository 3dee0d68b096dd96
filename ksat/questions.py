"""Question, and every CSV dialect in which the competition's questions are passed around."""

import ast
import csv
import functools
import hashlib
import io
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from ksat.errors import InputError, bad_rows, error_line, show
from ksat.files import read_text
from ksat.kinds import KINDS, WORDING, Kind, choices_tell_kinds, kind_by_choices
from ksat.visible import is_visible, looks

MIN_CHOICES, MAX_CHOICES = 2, 5
csv.field_size_limit(2**31 - 1)  # of characters in a cell; Python's own is 131,072, and a long passage is no fault
_BLANKS = re.compile(r"[ \t\xa0\u3000]+")


@dataclass(frozen=True, slots=True)
class Question:
    """One row of a competition file. `answer` counts from 1, as in every file, and is None where the row has none; `source`,
    `context` and `kind` are the columns of that name, "" where the file has none; `kind_hint` is what the number of choices says
    where it tells the source of the file's rows. ksat.kinds.find_kind weighs them."""

    id: str
    passage: str
    question: str
    choices: tuple[str, ...]
    answer: int | None
    question_plus: str = ""
    source: str = ""
    context: str = ""
    kind: Kind | Literal[""] = ""
    kind_hint: Kind | Literal[""] = ""

    @property
    def num_choices(self) -> int:
        return len(self.choices)

    @property
    def answer_index(self) -> int:
        """The answer counted from 0; only for labelled questions."""
        if self.answer is None:
            raise ValueError(f"question {self.id!r} has no answer")
        return self.answer - 1


class _RowError(ValueError):
    """A row breaks a rule; collected over the file, so that one message counts all of them."""

    def __init__(self, rule: str, found: str, remedy: str) -> None:
        super().__init__(rule)
        self.rule, self.found, self.remedy = rule, found, remedy


def read_table(path: Path | str) -> pd.DataFrame:
    """A CSV file as text cells, exactly as written (no NaN, no guessed types).

    Raises:
        InputError: see read_csv_rows; or a header without rows.
    """
    header, *rows = read_csv_rows(Path(path))
    if not rows:
        raise InputError(f"{path}: a header but no rows; expected at least one row")
    return pd.DataFrame(rows, columns=header, dtype=str)


def read_csv_rows(path: Path) -> list[list[str]]:
    """The rows of a CSV file, the header first; blank lines are left out.

    Not by pandas: it ends a cell at a NUL, renames the second of two columns of one name, fills a short row with '' and, where the
    first rows are longer than the header, shifts every column.

    Raises:
        InputError: no such file, empty, not UTF-8, not a CSV table, a column that stands there twice, or a row longer or shorter
            than the header.
    """
    lines = io.StringIO(read_text(path), newline="")
    try:
        rows = [row for row in csv.reader(lines, strict=True) if len(row) > 1 or "".join(row).strip()]
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV table ({error}); check the quoting") from error
    if not rows:
        raise InputError(f"{path}: the file is empty; expected a header and at least one row")
    header = rows[0]
    if twins := _twins([name for name in header if name]):
        found = f"column {twins[0]!r} twice" if twins[0] == twins[1] else f"columns {twins[0]!r} and {twins[1]!r}"
        raise InputError(f"{path}: the header has the {found}; take one out, or rename it")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise InputError(
                f"{path}: data row {i} has {len(row)} fields, the header has {len(header)}; check the quoting"
            )
    return rows


def _twins(names: Sequence[Any]) -> tuple[Any, Any] | None:
    """The first two names of columns or keys that a reader takes for one: of 'answer' and ' Answer' only one would be read."""
    seen: dict[Any, Any] = {}
    for name in names:
        if (folded := _fold(name)) in seen:
            return seen[folded], name
        seen[folded] = name
    return None


def _fold(name: Any) -> Any:
    """Equal for names that are the same but for blanks around them, case and what does not show."""
    return looks(name).strip().casefold() if isinstance(name, str) else name


def require_columns(table: pd.DataFrame, path: Path | str, columns: Sequence[str]) -> None:
    """Raises InputError, naming what is there, unless the table has all these columns."""
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise InputError(
            f"{path}: no column {', '.join(map(repr, missing))}; found {', '.join(map(repr, table.columns))}; "
            f"expected {', '.join(columns)}"
        )


def require_unique_ids(ids: Sequence[str], path: Path | str) -> None:
    """Raises InputError if an id is empty, shows nothing, or stands twice: those that look the same are one."""
    if marked := [(value, "") for value in ids if re.search(r"[\x00-\x1f\x7f]", value)]:
        raise bad_rows(path, "have an id with a control character", marked, "take it out")
    if empty := [f"data row {i + 1}" for i, value in enumerate(ids) if not is_visible(value)]:
        raise InputError(
            f"{path}: {len(empty)} of the rows have an empty id (first: {empty[0]}); every row needs its own id"
        )
    above: dict[str, str] = {}
    repeated: dict[str, str] = {}
    for value in ids:
        if (first := above.get(look := looks(value))) is not None:
            repeated.setdefault(value, "" if first == value else f"looks like {first!a}")
        above.setdefault(look, value)
    if repeated:
        raise bad_rows(path, "repeat an id that stands above", list(repeated.items()), "keep one of each")


def read_questions(path: Path | str, *, labelled: bool = False, kinds: str | None = None) -> list[Question]:
    """The questions of a competition CSV, in file order.

    Accepts a byte-order mark, `problems` as a dict literal or flattened columns (question, choices, answer),
    question_plus in its column, inside `problems`, or in both, extra columns, no-break and doubled blanks (made one). Choices that are
    equal, at least to the eye, are named on stderr: the competition's own files have equal ones.

    Args:
        path: the CSV file.
        labelled: True refuses rows without an answer.
        kinds: of `--kinds`: a CSV id,kind that comes before the file's columns, or "wording", which refuses the hint of the number
            of choices.

    Raises:
        InputError: anything in the file is not as expected; nothing is skipped or repaired in silence.
    """
    table = read_table(path)
    table = table.loc[:, [bool(name) for name in table.columns]]  # a spreadsheet's commas at the ends of its lines
    flat = "problems" not in table.columns and not {"choices", "question"}.isdisjoint(table.columns)
    if flat and "choices" not in table.columns:
        raise InputError(
            f"{path}: no column 'choices'; found {', '.join(map(repr, table.columns))}; {_FORMS['choices']}: write each row's choices there "
            "in their order"
        )
    if "paragraph" not in table.columns and {"problems", "choices"} & set(table.columns):
        raise InputError(
            f"{path}: no column 'paragraph'; found {', '.join(map(repr, table.columns))}; give the column of the passages that name, or "
            "add an empty one where there are none"
        )
    require_columns(
        table, path, ["id", "paragraph", "question", "choices"] if flat else ["id", "paragraph", "problems"]
    )
    ids = [value.strip() for value in table["id"]]
    require_unique_ids(ids, path)
    cells = set(map(_optional, table.get("kind", []))) - {""}
    if cells and not cells & set(KINDS):
        _warn(f"{path}: its column 'kind' says neither reading nor knowledge anywhere, and is not used")
        table = table.drop(columns="kind")
    parse: Callable[[dict[str, str]], dict[str, object]] = _parse_flat if flat else _parse_problems
    form = _FORMS["choices" if flat else "problems"]
    questions: list[Question] = []
    errors: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row_id, row in zip(ids, table.to_dict("records"), strict=True):
        try:
            question = _question(row_id, row, parse(row), form)
            if labelled and question.answer is None:
                raise _RowError("have no answer", "", "training and metrics need labelled rows")
            questions.append(question)
        except _RowError as error:
            errors.setdefault((error.rule, error.remedy), []).append((row_id, error.found))
    if errors:
        (rule, remedy), bad = next(iter(errors.items()))
        others = sum(map(len, errors.values())) - len(bad)
        raise bad_rows(path, rule, bad, remedy + (f"; {others} more rows break other rules" if others else ""))
    if near := [name for name in table.columns if name not in _OPTIONAL and _fold(name) in _OPTIONAL]:
        _warn(f"{path}: its column {near[0]!r} is not read; {_fold(near[0])!r} would be")
    if equal := [
        (question.id, "" if len(set(question.choices)) < question.num_choices else "only to the eye")
        for question in questions
        if len(set(map(looks, question.choices))) < question.num_choices
    ]:
        _warn(
            str(bad_rows(path, "have choices that are equal", equal, "they are kept as they stand; is one mistyped?"))
        )
    if kinds not in (None, WORDING):
        told = _read_kinds(Path(kinds))
        if not any(question.id in told for question in questions):
            _warn(f"{kinds}: tells the kind of none of the {len(questions)} questions of {path}; is it to other ids?")
        questions = [replace(question, kind=told.get(question.id, question.kind)) for question in questions]
    if kinds != WORDING and choices_tell_kinds(questions):
        questions = [replace(question, kind_hint=kind_by_choices(question)) for question in questions]
    return questions


def _read_kinds(path: Path) -> dict[str, Kind]:
    """The kinds in a CSV id,kind, by id."""
    table = read_table(path)
    require_columns(table, path, ["id", "kind"])
    ids = [value.strip() for value in table["id"]]
    require_unique_ids(ids, path)
    found: dict[str, Kind] = {}
    bad = []
    for row_id, cell in zip(ids, table["kind"], strict=True):
        try:
            if kind := _kind(cell):
                found[row_id] = kind
        except _RowError as error:
            bad.append((row_id, error))
    if bad:
        raise bad_rows(path, bad[0][1].rule, [(row_id, error.found) for row_id, error in bad], bad[0][1].remedy)
    return found


@functools.cache
def _warn(line: str) -> None:
    """Once, although several parts of a script read the same file."""
    print(error_line(line, "warning: "), file=sys.stderr)


def _literal(text: str, column: str) -> object:
    """ast.literal_eval of a cell: literals only, so a call in a cell never runs.

    Of a key that stands twice in a dict Python would take the last and say nothing.
    """
    source = text.strip()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of '\\(' and the like, which stay as they are
            tree = ast.parse(source, mode="eval")
        value = ast.literal_eval(_NoNames().visit(tree))
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        arrays = "; of a numpy array write its .tolist()" if "array(" in source else ""
        raise _RowError(
            f"have a {column!r} that is not a Python literal", show(text[:60]), _FORMS[column] + arrays
        ) from error
    keys = tree.body.keys if isinstance(tree.body, ast.Dict) else []
    if twins := _twins([key.value for key in keys if isinstance(key, ast.Constant)]):
        found = show(twins[0]) if twins[0] == twins[1] else f"{show(twins[0])} and {show(twins[1])}"
        raise _RowError(f"have a key twice in {column!r}", found, "keep one of each")
    texts = [each for each in ast.walk(tree) if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    if joined := [
        found for each in texts if not _ONE_TEXT.fullmatch(found := ast.get_source_segment(source, each) or "")
    ]:
        raise _RowError(
            f"have two texts without a comma between them in {column!r}",
            show(joined[0]),
            "put the comma there; a list that numpy printed has none: write its .tolist()",
        )
    return value


# Python joins 'a' 'b' to one text: where a comma is missing, two choices become one.
_ONE_TEXT = re.compile(r"""[a-zA-Z]{0,2}("{3}.*"{3}|'{3}.*'{3}|"(\\.|[^"\\])*"|'(\\.|[^'\\])*')""", re.DOTALL)


class _NoNames(ast.NodeTransformer):
    """JSON's null and the nan that pandas prints stand for nothing; true and false are Python's."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        known = {"null": None, "nan": None, "NaN": None, "true": True, "false": False}
        return ast.copy_location(ast.Constant(known[node.id]), node) if node.id in known else node


_OPTIONAL = ("answer", "question_plus", "source", "context", "kind")  # columns
_KEYS = ("question", "choices", "answer", "question_plus")  # of 'problems'
_FORMS = {
    "problems": "'problems' must hold {'question': str, 'choices': [2 to 5 str], 'answer': int or ''}",
    "choices": "'choices' must hold a list of 2 to 5 texts, such as ['하나', '둘']",
}


def _parse_problems(row: dict[str, str]) -> dict[str, object]:
    problems = _literal(row["problems"], "problems")
    if not isinstance(problems, dict):
        raise _RowError("have a 'problems' that is not a dict", type(problems).__name__, _FORMS["problems"])
    for key in ("question", "choices"):
        if key not in problems:
            raise _RowError(f"have no {key!r} in 'problems'", f"keys {show(list(problems))}", _FORMS["problems"])
    if near := [key for key in problems if key not in _KEYS and _fold(key) in _KEYS]:
        raise _RowError("have a key in 'problems' that is not read", show(near[0]), f"write {_fold(near[0])!r}")
    in_column, in_dict = _number(row.get("answer", "")), problems.get("answer")
    if in_column != "" and in_dict not in (None, "", in_column):
        found = f"column {show(in_column)}, problems {show(in_dict)}"
        raise _RowError("have two different answers", found, "keep the right one in both places, or in one")
    return {**problems, "answer": in_column if in_dict in (None, "") else in_dict}


def _parse_flat(row: dict[str, str]) -> dict[str, object]:
    """Flattened columns."""
    answer = _number(row.get("answer", ""))
    return {"question": row["question"], "choices": _literal(row["choices"], "choices"), "answer": answer}


def _number(cell: str) -> object:
    """An answer's cell, "" where there is none; its digits (also '3.0', as pandas writes it) become an int.

    Others stay text and are refused: '٣', '１', '01' and '+1' are digits to int(), and no answer that anybody writes on purpose.
    """
    text = _optional(cell)
    match = re.fullmatch(r"(0|[1-9][0-9]?)(\.0+)?", text)
    return int(match[1]) if match else text


def _question(row_id: str, row: dict[str, str], fields: dict[str, object], form: str) -> Question:
    choices, question = fields["choices"], fields["question"]
    if not isinstance(question, str):
        raise _RowError("have a question that is not text", type(question).__name__, form)
    if question.strip() and not is_visible(question):
        raise _RowError("have a question of which nothing shows", f"{question[:20]!a}", "write it, or leave it empty")
    if not isinstance(choices, (list, tuple)) or not choices:
        raise _RowError("have no choices", "", form)
    if not MIN_CHOICES <= len(choices) <= MAX_CHOICES:
        raise _RowError("have a wrong number of choices", str(len(choices)), f"expected {MIN_CHOICES} to {MAX_CHOICES}")
    if not all(isinstance(choice, str) and is_visible(choice) for choice in choices):
        raise _RowError("have a choice that is empty or not text", show(list(choices)), form)
    found = Question(
        id=row_id,
        passage=_optional(row["paragraph"]),
        question=_clean(question),
        choices=tuple(_clean(choice) for choice in choices),
        answer=_answer(fields.get("answer", ""), len(choices)),
        question_plus=_question_plus(row.get("question_plus", ""), fields.get("question_plus")),
        source=_optional(row.get("source", "")),
        context=_optional(row.get("context", "")),
        kind=_kind(row.get("kind", "")),
    )
    _require_text(found)
    return found


def _require_text(question: Question) -> None:
    """Raises _RowError for half of a surrogate pair: a literal can say '\\ud800', and no tokenizer or file takes it."""
    for text in (question.question, *question.choices, question.question_plus):
        if match := re.search("[\ud800-\udfff]", text):
            found = f"{match[0]!r} in {show(text[max(0, match.start() - 20) :][:40])}"
            raise _RowError("have half of a character (a lone surrogate)", found, "write the character itself")


def _answer(value: object, num_choices: int) -> int | None:
    if value is None or value == "":
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise _RowError(
            "have an answer of the wrong type", show(value), "expected an integer, or '' where there is none"
        )
    if not 1 <= value <= num_choices:
        raise _RowError(
            "have an answer out of range", show(value), "answers count from 1 to the row's number of choices"
        )
    return value


def _kind(cell: str) -> Kind | Literal[""]:
    text = _optional(cell)
    for kind in ("", *KINDS):
        if text == kind:
            return kind
    raise _RowError(
        "have a kind that is neither", show(text), "write reading, knowledge or nothing into the column 'kind'"
    )


def _question_plus(column: str, key: object) -> str:
    if key is not None and not isinstance(key, str):
        raise _RowError(
            "have a question_plus that is not text", type(key).__name__, "write it as text, or leave it out"
        )
    in_column, in_dict = map(_optional, (column, key or ""))
    if in_column and in_dict and in_column != in_dict:
        at = next(i for i, pair in enumerate(zip_longest(in_column, in_dict)) if len(set(pair)) > 1)
        column, key = (text[max(0, at - 10) :][:40] for text in (in_column, in_dict))
        found = f"they differ at character {at + 1}: column {column!r}, problems {key!r}"
        raise _RowError("have two different question_plus", found, "keep the right one in both places, or in one")
    return in_column or in_dict


def is_missing(cell: str) -> bool:
    """Whether a cell holds nothing: empty, or what str() and the like make of a missing value."""
    return not _optional(cell)


def _optional(cell: str) -> str:
    """The text of a cell that may be missing; of the choices and the question "None" is a text like any other."""
    text = _clean(cell)
    return "" if text.lower() in ("nan", "none", "null") else text


def _clean(text: str) -> str:
    return _BLANKS.sub(" ", text.replace("\r\n", "\n")).strip()


def passage_key(question: Question) -> str:
    """What rows of one passage have in common, and rows without one that ask the same, in whatever order of choices; blanks aside."""
    texts = [question.passage]
    if not "".join(question.passage.split()):
        texts += [question.question, question.question_plus, *sorted(question.choices)]
    return hashlib.sha256("\0".join("".join(text.split()) for text in texts).encode()).hexdigest()
