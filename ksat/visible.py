"""What of a text can be seen, for names, ids and choices that look like nothing or like one another."""

import functools
import re
import unicodedata

_UNSEEN = ("Cc", "Cf", "Cs", "Zs", "Zl", "Zp")
# What no font shows, though Unicode counts it among letters, marks and symbols (fillers of Hangul, joiners, selectors, empty
# Braille), and what is no character for good.
_FILLERS = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2065\u2800\u3164\ufdd0-\ufdef\ufe00-\ufe0f\uffa0\ufff0-\ufff8"
    r"\U000e0000-\U000e0fff" + "".join(f"\\U{plane:04x}fffe\\U{plane:04x}ffff" for plane in range(17)) + "]"
)


def is_visible(text: str) -> bool:
    """Whether anything of it shows: no blanks, control and format characters alone. Private use is seen in old Hangul."""
    return any(map(_shows, text))


def looks(text: str) -> str:
    """Equal for texts that look the same: composed, without what does not show; blanks and line breaks stay."""
    if not text.isprintable() or _FILLERS.search(text):  # nearly every text has nothing of the kind
        text = "".join(c for c in text if c.isspace() or _shows(c))
    return unicodedata.normalize("NFC", text)


@functools.cache
def _shows(character: str) -> bool:
    return unicodedata.category(character) not in _UNSEEN and not _FILLERS.match(character)
