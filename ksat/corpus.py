"""Articles to look things up in, and the passages they are cut into."""

import bz2
import math
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ksat.errors import InputError
from ksat.files import parse_json
from ksat.wikitext import to_plain_text

LONGEST = 500  # characters of a passage, but for a sentence that is longer
_AIM = 400
_SENTENCE_ENDS = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+|\n+")
_REDIRECT = re.compile(r"\s*#\s*(?:넘겨주기|redirect)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Article:
    """A text of a corpus, or a part of it; `title` is "" where it has none."""

    title: str
    text: str


def read_corpus(path: Path) -> Iterator[Article]:
    """The articles of a corpus, one at a time: a dump of a hundred million lines never lies in memory.

    Args:
        path: .xml or .xml.bz2 is a MediaWiki dump; all else is JSON lines with `text`, and `title` if there is one, as
            WikiExtractor writes them (.bz2 as well).

    Raises:
        InputError: while reading: no such file, cut, not of its format, or without a text.
    """
    if "\0" in str(path):
        raise InputError(f"--corpus {str(path)!r}: has a NUL in its name; check the path")
    is_dump = path.name.lower().endswith((".xml", ".xml.bz2"))
    found = False
    try:
        with _open(path) as file:
            for article in _read_dump(file, path) if is_dump else _read_lines(file, path):
                if article.text.strip():
                    found = True
                    yield article
    except FileNotFoundError as error:
        raise InputError(f"--corpus {path}: no such file; check the path") from error
    except IsADirectoryError as error:
        raise InputError(f"--corpus {path}: a folder where a file is expected; name the file in it") from error
    except EOFError as error:
        raise InputError(f"--corpus {path}: ends in the middle of its bz2 stream; copy or download it again") from error
    except ET.ParseError as error:
        raise InputError(
            f"--corpus {path}: cut, or not XML ({error}); expected a MediaWiki dump, pages-articles"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"--corpus {path}: not UTF-8 (byte {error.object[error.start]:#04x}); save it as UTF-8"
        ) from error
    except OSError as error:
        remedy = "check the path and its rights" if error.errno else "copy or download it again"  # bz2's have no number
        raise InputError(f"--corpus {path}: can't be read ({error.strerror or error}); {remedy}") from error
    if not found:
        expected = "a MediaWiki dump with articles" if is_dump else 'JSON lines such as {"title": "…", "text": "…"}'
        raise InputError(f"--corpus {path}: no text in it; expected {expected}")


def _open(path: Path) -> IO[bytes]:
    return bz2.open(path) if path.suffix.lower() == ".bz2" else path.open("rb")


def _read_lines(file: IO[bytes], path: Path) -> Iterator[Article]:
    for number, line in enumerate(file, start=1):
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        if not text:
            continue
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise InputError(
                f"--corpus {path}: line {number} is not JSON ({error}); expected one object a line"
            ) from error
        if not isinstance(fields, dict) or not isinstance(fields.get("text"), str):
            found = f"fields {', '.join(map(repr, fields))}" if isinstance(fields, dict) else type(fields).__name__
            raise InputError(
                f"--corpus {path}: line {number} has no text in a field 'text' ({found}); rename the field"
            )
        yield Article(clean(str(fields.get("title") or "")), clean(fields["text"]))


def _read_dump(file: IO[bytes], path: Path) -> Iterator[Article]:
    """Pages of the main namespace that are no redirects."""
    events = ET.iterparse(file, events=("start", "end"))
    try:
        _, root = next(events)
    except (LookupError, ValueError) as error:  # the parser knows no multi-byte encoding but UTF-8 and UTF-16
        raise InputError(
            f"--corpus {path}: its XML declares an encoding that can't be read ({error}); save it as UTF-8"
        ) from error
    for event, element in events:
        if event == "start" or element.tag.rpartition("}")[2] != "page":
            continue
        page = {child.tag.rpartition("}")[2]: child for child in element.iter()}
        markup = page["text"].text or "" if "text" in page else ""
        is_article = "ns" not in page or page["ns"].text == "0"
        if is_article and "redirect" not in page and not _REDIRECT.match(markup):
            title = page["title"].text or "" if "title" in page else ""
            yield Article(clean(title), clean(to_plain_text(markup)))
        root.clear()  # else the tree of the whole dump grows behind the reader


def clean(text: str) -> str:
    """The text composed (a Mac writes Hangul in pieces), without what no file or tokenizer takes: NUL, lone surrogates."""
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").replace("\0", "")
    return unicodedata.normalize("NFC", whole)


def cut_passages(article: Article) -> list[Article]:
    """The article in passages of like length, most of 300 to 500 characters, cut between sentences; a short one is whole.

    A sentence of more than 500 characters is cut anywhere.
    """
    whole = article.text.strip()
    if len(whole) <= LONGEST:
        return [Article(article.title, whole)]
    aim = len(whole) / math.ceil(len(whole) / _AIM)
    passages: list[str] = []
    current = ""
    for piece in _pieces(whole):
        if current and (len(current) >= aim or len(current) + len(piece) > LONGEST):
            passages.append(current)
            current = ""
        current += piece
    passages.append(current)
    return [Article(article.title, passage.strip()) for passage in passages if passage.strip()]


def _pieces(text: str) -> Iterator[str]:
    """Sentences with the blanks behind them, none longer than a passage."""
    start = 0
    for end in [*(match.end() for match in _SENTENCE_ENDS.finditer(text)), len(text)]:
        for at in range(start, end, LONGEST):
            yield text[at : min(at + LONGEST, end)]
        start = end
