"""MediaWiki markup to plain text: well enough to search in and to read, not to render."""

import html
import re
from collections.abc import Callable

_COMMENTS = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
# Tags whose content is no prose, closed by themselves or by an end tag; one that is never closed loses only its own tag.
_CONTENT = re.compile(
    r"<(ref|math|gallery|timeline|syntaxhighlight|source|score|chem|imagemap|templatestyles)\b[^<>]*?(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TAGS = re.compile(r"</?[a-zA-Z][^<>]*>")
_TEMPLATES = re.compile(r"\{\{[^{}]*\}\}")  # the innermost ones
_TABLES = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)  # the innermost ones
_LINKS = re.compile(r"\[\[([^\[\]]*)\]\]")  # the innermost ones: a picture's caption has links of its own
# Pictures, categories and the same article in other languages.
_NOT_SHOWN = re.compile(r"\s*(?:파일|그림|분류|file|image|category|[a-z]{2,3}(?:-[a-z]+)*)\s*:", re.IGNORECASE)
_URLS = re.compile(r"\[(?:https?:)?//[^\s\[\]]+\s*([^\[\]]*)\]")
_END_SECTIONS = re.compile(
    r"^==[ \t]*(?:각주|주석|출처|참고 ?문헌|외부 ?링크|바깥 ?고리|같이 ?보기|더 ?보기)[ \t]*==.*",
    re.MULTILINE | re.DOTALL,
)
_HEADINGS = re.compile(r"^=+[^\n]*?=+[ \t]*$", re.MULTILINE)
_LINE_STARTS = re.compile(r"^[*#:;]+[ \t]*", re.MULTILINE)
_EMPTY_BRACKETS = re.compile(r"[ \t]*[(（][\s,;:·/~?]*[)）]")
_BRACKET_STARTS = re.compile(r"([(（])[\s,;:·/]+")
_BLANKS = re.compile(r"[ \t\xa0\u3000]+")
_DEPTH = 12  # templates in templates: more are a broken page


def to_plain_text(markup: str) -> str:
    """The prose of a page, a paragraph a line: without templates, tables, references, pictures, headings, and what stands
    behind the text (references, further reading, links)."""
    text = _CONTENT.sub("", _COMMENTS.sub("", markup))
    text = _until_stable(text, lambda text: _TEMPLATES.sub("", text))
    text = _until_stable(text, lambda text: _TABLES.sub("", text))
    text = _until_stable(text, lambda text: _LINKS.sub(_shown, text))
    text = _END_SECTIONS.sub("", text)
    text = _HEADINGS.sub("", text)
    text = _URLS.sub(r"\1", _TAGS.sub("", text))
    text = re.sub(r"'{2,5}|__[^\W_]+__", "", text)
    text = html.unescape(_LINE_STARTS.sub("", text))
    # Of a name in another script that stood in a template.
    text = _BRACKET_STARTS.sub(r"\1", _EMPTY_BRACKETS.sub("", text))
    lines = (_BLANKS.sub(" ", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _until_stable(text: str, shorten: Callable[[str], str]) -> str:
    """The text once nothing that is nested is left."""
    for _ in range(_DEPTH):
        shorter = shorten(text)
        if shorter == text:
            break
        text = shorter
    return text


def _shown(link: re.Match[str]) -> str:
    target, _, label = link[1].partition("|")
    if _NOT_SHOWN.match(target):
        return ""
    return label.rpartition("|")[2] or target.removeprefix(":").partition("#")[0]
