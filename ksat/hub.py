"""The model hub: whether it answers, asked once, and which known base a name that is not found may have meant."""

import difflib
import os
import re
import threading
from functools import cache
from pathlib import Path

from ksat.bases import KNOWN_BASES

SECONDS = 6.0  # for an answer; a name server that is silent counts too


def is_hub_name(base: str) -> bool:
    """Whether it is a repository's name rather than a folder."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) is not None and not Path(base).exists()


def look_for_hub(base: str) -> str:
    """Why the hub can't be asked for this base, "" if it can or need not be; then only what is cached is loaded."""
    return _why_unreachable() if is_hub_name(base) else ""


@cache
def _why_unreachable() -> str:
    """huggingface_hub tries a connection that is refused, or a name that has no address, six times for every file, with 23 seconds
    of pauses, and no setting of it says otherwise. So the hub is asked once here, and not again in this process if it is silent.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return ""
    found = [f"no answer within {SECONDS:.0f} seconds"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            found[0] = ""
        except Exception as error:  # of the HTTP library, whichever it is
            found[0] = str(error) or type(error).__name__

    asking = threading.Thread(target=ask, daemon=True)  # a look-up of a name takes no time limit
    asking.start()
    asking.join(SECONDS)
    if not (why := found[0]):
        return ""
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that look there
    return f"the hub, {constants.ENDPOINT}, can't be reached: {why}"


def did_you_mean(base: str) -> str:
    """ "did you mean A or B? " for a hub name that begins or is spelt nearly as those of known bases, else ""."""
    last = base.rpartition("/")[2].lower()
    names = {known.name: known.name.rpartition("/")[2].lower() for known in KNOWN_BASES}
    if not last or base in names or not is_hub_name(base):
        return ""
    near = difflib.get_close_matches(last, names.values(), n=2, cutoff=0.75)
    meant = [name for name, tail in names.items() if tail.startswith(last)] or [
        name for tail in near for name in names if names[name] == tail
    ]
    return f"did you mean {' or '.join(meant[:3])}? " if meant else ""
