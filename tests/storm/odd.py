"""Odd inputs out of good ones: bytes flipped and cut, tables and JSON values bent, and texts that readers stumble over."""

import copy
import csv
import io
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

ODD_TEXTS = (
    "", " ", "\0", "\x07", "\x1b[31m", "\x1f", "\x7f", "\x85", "\ud800", "\udfff", "\ud83d", "\ufeff", "\ufffe", "\u202e", "\u2066", "\u200b",
    "\u200d", "\u2060", "\u2028", "\u2029", "\xa0", "\u3000", "\u115f", "\u3164", "e\u0301", "가", "ㅎㅏㄴ", "👨‍👩‍👧",
    "\r", "\n", "\r\n", "\n\n", "\t", '"', '""', "'", "'''", "\\", "\\ud800", "\\x00", "\\N{BULLET}", ",", ";", "|", "#", "=1+1", "%s%n", "$(true)",
    "nan", "NaN", "inf", "-inf", "Infinity", "1e999", "1e-400", "-0.0", "0x10", "1_0", "1.", ".5", "٣", "１", "①", "01", "3.0", "-1", "0", "6", "2",
    "1e308", "1e19", "9" * 20, "None", "True", "null", "true", "1j", "1+1", "b'a'", "f'{1}'", "...", "{}", "[]", "()", "{1: 2}", "[[]]", "{'a'}",
    "__import__('os').system('true')", "{'question': 'q', 'choices': ['a', 'b'], 'answer': 1}", "['a', 'a']", "['a', 'b', 'a']",
    "{passage}", "{choices}", "{question.id}", "{0}", "{{", "}}", "{% if %}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ raise_exception('a\nb') }}",
    "{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}{% endfor %}", "<|im_end|>", "<|im_start|>", "</s>", "[user]", "[system]",
    "<page>", "</page>", "]]>", "<!--", "&amp;", "&#0;", "&#xD800;", "<!ENTITY a 'b'>", "{|", "|}", "[[", "]]", "<ref", "#REDIRECT [[x]]",
    "..", ".", "/", "~", "a/b", "../up", "/dev/null", "/proc/self/mem", "con", "x" * 300, "-", "--", "--out", "@file", "prob_1", "prob_6", "id", "answer",
)  # fmt: skip
# Large ones are rare: a hundred thousand inputs are to be read.
HUGE_TEXTS = ("9" * 400, "9" * 5000, "-" + "9" * 5000, "1" + "0" * 4400, "[" * 500, "[" * 100_000, "{'a':" * 3000, "(" * 250, "-" * 5000, "{{" * 2000,
              "x" * 131_073, "가" * 140_000, '"' * 9999, "\n" * 20_000, "<a>" * 20_000, "[[" * 5000, "{|" * 3000, "\u200b" * 3000)  # fmt: skip
ODD_NUMBERS = (
    0,
    -1,
    1,
    2,
    6,
    1e9,
    -1e9,
    1e308,
    1e-320,
    0.5,
    10**30,
    -(10**400),
    float("nan"),
    float("inf"),
    float("-inf"),
)
ODD_VALUES: tuple[Any, ...] = (None, True, False, [], {}, [[]], {"": ""}, [None], *ODD_NUMBERS)

Random = random.Random


def odd_text(rng: Random) -> str:
    """A text that some reader may stumble over, alone or several behind each other."""
    if rng.random() < 0.03:
        return rng.choice(HUGE_TEXTS)
    return "".join(rng.choice(ODD_TEXTS) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def mutate_text(rng: Random, text: str) -> str:
    """The text with something odd in it, or something of it gone or doubled."""
    at, end = sorted(rng.randint(0, len(text)) for _ in range(2))
    ways: tuple[Callable[[], str], ...] = (
        lambda: text[:at] + odd_text(rng) + text[at:],
        lambda: text[:at] + odd_text(rng) + text[end:],
        lambda: odd_text(rng),
        lambda: text[:at] + text[end:],
        lambda: text[:end] + text[at:],
        lambda: text[:at] + chr(rng.choice((rng.randrange(128), rng.randrange(0x11000)))) + text[at + 1 :],
    )
    return rng.choice(ways)()


def mutate_bytes(rng: Random, data: bytes) -> bytes:
    """The bytes with one to four of them flipped, cut out, doubled or put in."""
    for _ in range(rng.randint(1, 4)):
        at, end = sorted(rng.randint(0, len(data)) for _ in range(2))
        near = min(len(data), at + rng.randint(1, 8))
        way = rng.randrange(8)
        if way == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif way == 1:
            data = data[:at] + data[near:]
        elif way == 2:
            data = data[:at]
        elif way == 3:
            data = data[:at] + rng.randbytes(rng.randint(1, 6)) + data[at:]
        elif way == 4:
            data = data[:at] + odd_text(rng).encode("utf-8", "surrogatepass") + data[at:]
        elif way == 5:
            data = data[:end] + data[at:]
        elif way == 6:
            data = data[:at] + odd_text(rng).encode("utf-8", "surrogatepass") + data[near:]
        else:
            data = data[:at] + bytes([rng.randrange(256)]) * rng.randint(1, 4) + data[near:]
    return data


def mutate_table(rng: Random, rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """A table, header first, with some cells, rows or columns changed."""
    table = [list(row) for row in rows]
    for _ in range(rng.randint(1, 3)):
        way = rng.randrange(10)
        row = rng.choice(table) if way < 6 or len(table) < 2 else rng.choice(table[1:])
        if way < 5 and row:
            at = rng.randrange(len(row))
            row[at] = mutate_text(rng, row[at]) if rng.random() < 0.7 else rng.choice(rng.choice(table) or [""])
        elif way == 5:
            row.insert(rng.randint(0, len(row)), odd_text(rng)) if rng.random() < 0.5 else row and row.pop()
        elif way == 6:
            table.insert(rng.randint(1, len(table)), list(row))
        elif way == 7 and len(table) > 1:
            table.remove(row)
        elif way == 8:
            shuffled = table[1:]
            rng.shuffle(shuffled)
            table[1:] = shuffled
        else:
            _mutate_column(rng, table)
    return table


def _mutate_column(rng: Random, table: list[list[str]]) -> None:
    """Doubles, drops, adds or renames a column, in every row."""
    at = rng.randrange(max(1, len(table[0])))
    way = rng.randrange(4)
    for i, row in enumerate(table):
        if at >= len(row):
            continue
        if way == 0:
            row.insert(at, row[at])
        elif way == 1:
            row.pop(at)
        elif way == 2:
            row.append(
                odd_text(rng) if i else rng.choice(("answer", "context", "source", "prob_6", "question_plus", "x", ""))
            )
        elif i == 0:
            row[at] = mutate_text(rng, row[at])


def to_csv(rng: Random, table: Sequence[Sequence[str]]) -> bytes:
    """The table as somebody's program may have written it: line ends, quoting, a byte-order mark, an encoding."""
    buffer = io.StringIO(newline="")
    writer = csv.writer(
        buffer,
        lineterminator=rng.choice(("\n", "\n", "\r\n", "\r")),
        quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
        delimiter=rng.choice((",", ",", ",", ",", ",", ",", ";", "\t")),
    )
    writer.writerows(table)
    text = buffer.getvalue()
    if rng.random() < 0.1:
        lines = text.splitlines(keepends=True)
        text = "".join(line.rstrip("\r\n") + rng.choice(("\n", "\r\n", "\r", "\n\n")) for line in lines)
    return to_bytes(rng, text)


def to_bytes(rng: Random, text: str) -> bytes:
    """UTF-8 mostly, sometimes with a byte-order mark or in another encoding, sometimes with bytes changed."""
    encoding = rng.choice(("utf-8",) * 16 + ("utf-8-sig", "utf-8-sig", "utf-16", "cp949", "latin-1"))
    errors = "surrogatepass" if encoding.startswith("utf") else "replace"
    data = text.encode(encoding, errors)
    return mutate_bytes(rng, data) if rng.random() < 0.25 else data


def mutate_json(rng: Random, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced, dropped, doubled or bent."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        holder, key = _somewhere(rng, value)
        if holder is None:
            return odd_value(rng, value)
        way = rng.randrange(6)
        if way == 0:
            holder.pop(key)
        elif way == 1 and isinstance(holder, dict):
            holder[odd_text(rng)] = holder[key]
        elif way == 1:
            holder.append(holder[key])
        elif way == 2:
            other, other_key = _somewhere(rng, value)
            holder[key] = copy.deepcopy(other[other_key]) if other else None
        else:
            holder[key] = odd_value(rng, holder[key])
    return value


def odd_value(rng: Random, value: Any) -> Any:
    """Something else in the place of a JSON value: near to it, or of another type."""
    if rng.random() < 0.4:
        return copy.deepcopy(rng.choice(ODD_VALUES))  # what is put into one must not come back with the next
    if isinstance(value, bool) or value is None:
        return rng.choice((True, False, None, 0, 1, "true"))
    if isinstance(value, int | float):
        as_float = float(value) if abs(value) < 2**1000 else -0.0  # a larger one has no float
        return rng.choice((value + 1, -value, value * 2, str(value), as_float, *ODD_NUMBERS))
    if isinstance(value, str):
        return mutate_text(rng, value)
    if isinstance(value, list):
        return rng.choice((value[:-1], [*value, *value], {}, "", value[::-1]))
    return odd_text(rng)


def _somewhere(rng: Random, value: Any) -> tuple[Any, Any]:
    """A list or dict inside a value (or it itself) and one of its keys; (None, None) if there is none."""
    places: list[tuple[Any, Any]] = []

    def walk(found: Any) -> None:
        keys = list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
        for key in keys:
            places.append((found, key))
            walk(found[key])

    walk(value)
    return rng.choice(places) if places else (None, None)


def to_json(rng: Random, value: Any) -> bytes:
    """JSON text of a value, sometimes with doubled keys, deep nesting or bytes changed."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.3, indent=rng.choice((None, 1)))
    if rng.random() < 0.05:
        text = rng.choice(
            (
                "[" * 100_000,
                '{"a":' * 50_000,
                '{"a": ' + "9" * 5000 + "}",
                text + text,
                f"[{text}]",
                text.replace("{", '{"base": 1, ', 1),
            )
        )
    return to_bytes(rng, text)
