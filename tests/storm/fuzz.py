"""Fuzzed inputs: every reader and the doors behind it get odd files and flags.

An input passes if the door takes it, and what it read reads the same once it is written again; or if it is refused by one line.
Nothing that was on the disk before may change, and no input may take more than seconds or some GiB.
"""

import ast
import bz2
import csv
import faulthandler
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np

from . import odd
from .world import BASE, CPU, HELD_OUT, World

CPU_SECONDS = 20.0  # of one input
MEMORY = 4 * 2**30  # address space beyond what the process has before the first input
LONGEST_MESSAGE = 1000
_DEEP = ("a", "b", "c", "d", "e", "f")  # so that ../../x stays in the desk


class Fault(Exception):
    """A promise is broken."""


class Reached(BaseException):
    """All doors were passed: what would come now is the model's work."""


class TooSlow(BaseException):
    """An input took its seconds of the processor."""


@dataclass(frozen=True, slots=True)
class Door:
    """Something that takes what a user gives.

    Attributes:
        name: of the part.
        share: of 100,000 inputs, how many it gets.
        enter: makes an input and gives it to the door.
    """

    name: str
    share: int
    enter: "Callable[[Random, Desk], None]"


class Desk:
    """A worker's folder: a small competition whose files nobody may touch.

    Attributes:
        world: where the files come from.
        root: all that is watched.
        folder: the competition, some levels below.
    """

    def __init__(self, world: World, root: Path) -> None:
        self.world, self.root, self.folder = world, root, root.joinpath(*_DEEP)
        self.rebuild()

    def rebuild(self) -> None:
        os.chdir("/")
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(self.world.folder, self.folder)
        os.chdir(self.folder)
        self.listing = self.look()

    def look(self) -> dict[str, tuple[int, int, int]]:
        """Inode, size and time of every file, and every folder."""
        found: dict[str, tuple[int, int, int]] = {}
        for place, folders, files in os.walk(self.root):
            for name in folders:
                found[os.path.join(place, name)] = (0, 0, 0)
            for name in files:
                status = os.lstat(os.path.join(place, name))
                found[os.path.join(place, name)] = (status.st_ino, status.st_size, status.st_mtime_ns)
        return found

    def tidy(self) -> str:
        """Removes what an input has left; says what of the files before it is gone or changed."""
        os.chdir(self.folder) if self.folder.is_dir() else None
        found = self.look()
        lost = [name for name, entry in self.listing.items() if found.get(name) != entry]
        if lost:
            self.rebuild()
            return f"changed or gone: {', '.join(name.removeprefix(f'{self.folder}/') for name in lost[:3])}"
        for name in sorted(set(found) - set(self.listing), reverse=True):
            os.rmdir(name) if os.path.isdir(name) and not os.path.islink(name) else os.unlink(name)
        return ""

    def put(self, name: str, data: bytes) -> Path:
        """A new file of this input."""
        path = Path("input") / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path


def check(door: Door, seed: int, desk: Desk) -> str:
    """What is wrong with how a door takes its input number `seed`; "" for nothing."""
    rng, printed = Random(f"{door.name}-{seed}"), io.StringIO()
    fault = ""
    with _limits():
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(printed):
                door.enter(rng, desk)
        except Reached:
            pass
        except SystemExit as error:
            fault = "" if error.code == 0 else exit_fault(error.code, printed.getvalue())
        except Fault as error:
            fault = str(error)
        except (Exception, TooSlow) as error:
            fault = error_fault(error)
    return "; ".join(filter(None, [fault, desk.tidy()]))


def error_fault(error: BaseException) -> str:
    """ "" for an InputError whose message is fit to be read; else what was raised, and where in our code."""
    from ksat.errors import InputError

    if isinstance(error, InputError):  # whatever its text is, one readable line is made of it: test_errors
        return "" if str(error).strip() else "an error without a word"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/storm/" not in frame.filename]
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"
    return f"{type(error).__name__} in {place}: {str(error)[:150]!r}"


def message_fault(text: str) -> str:
    """What keeps a message from being one readable line."""
    if len(text) > LONGEST_MESSAGE:
        return f"a message of {len(text)} characters: {text[:120]!r}"
    if odd_ones := [c for c in text if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]:
        return f"a message with {odd_ones[0]!r}: {text[:120]!r}"
    return ""


def exit_fault(code: Any, printed: str) -> str:
    """What is wrong with how argparse said no: exit code 2, and one line."""
    lines = [line for line in printed.splitlines() if line.strip()]
    if code != 2:
        return f"exit code {code!r}"
    if len(lines) != 1:
        return f"a usage error of {len(lines)} lines: {printed[-120:]!r}"
    return message_fault(lines[0])


@contextmanager
def _limits() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    faulthandler.dump_traceback_later(30 * CPU_SECONDS, exit=True, file=sys.__stderr__)  # where no signal is heard
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()


def limit_memory() -> None:
    """Of this process: what it has, and some GiB more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def require(holds: bool, text: str) -> None:
    if not holds:
        raise Fault(text)


# Tables


@cache
def _questions() -> list[Any]:
    import tiny

    return list(tiny.make_questions(6))


def _table_of_questions(*, flat: bool) -> list[list[str]]:
    rows = [
        ["id", "paragraph", "question", "choices", "answer", "question_plus"]
        if flat
        else ["id", "paragraph", "problems", "question_plus"]
    ]
    for q in _questions():
        if flat:
            rows.append([q.id, q.passage, q.question, repr(list(q.choices)), str(q.answer), q.question_plus])
        else:
            problems = {"question": q.question, "choices": list(q.choices), "answer": q.answer}
            rows.append([q.id, q.passage, repr(problems), q.question_plus])
    return rows


_NEVER_SEEN = "\u034f\u115f\u1160\u17b4\u17b5\u2065\u2800\u3164\uffa0\ufffe\uffff"


def _is_visible(text: str) -> bool:
    """Letters, digits, marks and symbols that are no fillers; private use, as old Hangul has it; what Unicode may yet assign."""
    return any(
        (unicodedata.category(c)[0] not in "CZ" or unicodedata.category(c) in ("Co", "Cn")) and c not in _NEVER_SEEN
        for c in text
    )


def _bend_a_literal(rng: Random, rows: list[list[str]], *, flat: bool) -> bool:
    """Puts another question, choices or answer into a cell that is a Python literal still; returns whether a key is doubled."""
    row, at = rng.choice(rows[1:]), 3 if flat else 2
    value = odd.mutate_json(rng, ast.literal_eval(row[at]))
    row[at] = repr(value)
    keys = [key for key in value if isinstance(key, str)] if isinstance(value, dict) else []
    is_doubled = bool(keys) and rng.random() < 0.2
    if is_doubled:
        row[at] = f"{row[at][:-1]}, {rng.choice(keys)!r}: {odd.odd_value(rng, '1')!r}}}"
    return is_doubled


def _probs_table(rng: Random) -> list[list[str]]:
    rows = [["id", "answer", *(f"prob_{k}" for k in range(1, 6))]]
    for q in _questions():
        masses = np.array([rng.random() for _ in q.choices])
        probs = masses / masses.sum()
        rows.append([q.id, str(int(probs.argmax()) + 1), *map(repr, probs.tolist()), *[""] * (5 - len(probs))])
    return rows


def _labels_table(rng: Random) -> list[list[str]]:
    return [["id", "answer"], *([q.id, str(rng.randint(1, q.num_choices))] for q in _questions())]


def _mutated_csv(rng: Random, rows: list[list[str]]) -> bytes:
    table = odd.mutate_table(rng, rows) if rng.random() < 0.8 else rows
    data = odd.to_csv(rng, table)
    return odd.mutate_bytes(rng, data) if rng.random() < 0.3 else data


def _raw_ids(path: Path) -> list[str]:
    """The ids of a CSV as the csv module sees them."""
    return _raw_column(path, "id")


def _raw_column(path: Path, name: str) -> list[str]:
    csv.field_size_limit(2**31)
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    rows = [row for row in rows if len(row) > 1 or "".join(row).strip()]
    at = [each.strip() for each in rows[0]].index(name)
    return [row[at].strip() for row in rows[1:]]


def questions(rng: Random, desk: Desk, *, flat: bool = False) -> None:
    """A competition file: read, written again, retrieved for, put into a prompt and encoded."""
    import tiny

    from ksat.files import write_atomic
    from ksat.prompts import DEFAULT_TEMPLATES, build_messages
    from ksat.questions import passage_key, read_questions
    from ksat.retrieve import context_writer

    rows = _table_of_questions(flat=flat)
    is_doubled = rng.random() < 0.4 and _bend_a_literal(rng, rows, flat=flat)
    path = desk.put("q.csv", odd.to_csv(rng, rows) if is_doubled or rng.random() < 0.3 else _mutated_csv(rng, rows))
    found = read_questions(path, labelled=rng.random() < 0.3)
    require([q.id for q in found] == _raw_ids(path), "the ids are not those of the file, in its order")
    require(not is_doubled, "a key that stands there twice is taken")
    require(all(_is_visible(choice) for q in found for choice in q.choices), "a choice without a character to be seen")
    require(all(q.answer is None or 1 <= q.answer <= q.num_choices for q in found), "an answer out of range")
    plain = [replace(q, source="", context="") for q in found]
    again = read_questions(tiny.write_questions(Path("input/again.csv"), plain))
    require(again == plain, "questions that were written again read otherwise")
    if not any(q.context for q in found):
        with_context = Path("input/context.csv")
        write_atomic(with_context, context_writer(path, [f"c{i}" for i in range(len(found))]))
        back = read_questions(with_context)
        require([q.id for q in back] == [q.id for q in found], "retrieve.py's file has other ids")
        require(
            [q.context for q in back] == [f"c{i}" for i in range(len(found))], "retrieve.py's file has other contexts"
        )
    for question in found[:3]:
        passage_key(question)
        build_messages(DEFAULT_TEMPLATES["label"], question, "label")
        encoded = _encoder("text").encode(question)
        require(len(encoded.continuations) == question.num_choices, "not a continuation for every choice")


@cache
def _encoder(score_by: Any) -> Any:
    import tiny

    from ksat.encoding import Encoder
    from ksat.prompts import DEFAULT_TEMPLATES

    return Encoder(tiny.make_tokenizer(), DEFAULT_TEMPLATES[score_by], score_by, max_tokens=512)


def probs(rng: Random, desk: Desk) -> None:
    """A probability file: read, written again, and blended with itself."""
    from ksat.blending import METHODS, blend
    from ksat.predictions import predicted_answers, read_probs, write_probs

    path = desk.put("p.csv", _mutated_csv(rng, _probs_table(rng)))
    found = read_probs(path)
    require(list(found.ids) == _raw_ids(path), "the ids are not those of the file, in its order")
    require(bool((np.abs(np.nansum(found.probs, axis=1) - 1) <= 1e-6).all()), "probabilities that do not sum to 1")
    write_probs(Path("input/again.csv"), found)
    again = read_probs(Path("input/again.csv"))
    require(
        again.ids == found.ids and again.probs.tobytes() == found.probs.tobytes(), "written again they read otherwise"
    )
    for method in METHODS:
        blended = blend([found.probs, found.probs], [0.5, 0.5], method)
        require(
            bool((np.abs(np.nansum(blended, axis=1) - 1) <= 1e-6).all()), f"a {method} blend that does not sum to 1"
        )
        if method != "geometric":
            require(
                bool((predicted_answers(blended) == found.answers).all()),
                f"a {method} blend with itself answers otherwise",
            )


def labels(rng: Random, desk: Desk) -> None:
    """A file of answers: as labels, as gold answers, as a member of a blend."""
    from ksat.blending import read_member
    from ksat.predictions import read_answers, read_labels

    rows = rng.choice(
        (_labels_table(rng), _labels_table(rng), _labels_table(rng), _table_of_questions(flat=rng.random() < 0.5))
    )
    path = desk.put("l.csv", _mutated_csv(rng, rows))
    found = (read_labels if rng.random() < 0.5 else read_answers)(path)
    require(list(found) == _raw_ids(path), "the ids are not those of the file, in its order")
    require(set(found.values()) <= {1, 2, 3, 4, 5}, "an answer out of range")
    if len(rows[0]) == 2:
        cells = _raw_column(path, "answer")
        require(all(cell.strip() in set("12345") for cell in cells), f"cells {cells} are not all plain digits")
    read_member(path, {q.id: q.num_choices for q in _questions()})


def gold(rng: Random, desk: Desk) -> None:
    """Gold answers joined to predictions of other rows."""
    from ksat.predictions import align_answers, read_answers, read_probs

    table = _probs_table(rng)
    predictions = read_probs(desk.put("p.csv", odd.to_csv(Random(0), table)))
    path = desk.put("l.csv", _mutated_csv(rng, _labels_table(rng)))
    aligned = align_answers(predictions, read_answers(path), path)
    require(bool(((aligned >= 1) & (aligned <= predictions.num_choices)).all()), "an answer beyond the choices")


def submission(rng: Random, desk: Desk) -> None:
    """What ensemble.py --check takes is what a leaderboard takes."""
    from ksat.predictions import check_submission

    path = desk.put("s.csv", _mutated_csv(rng, _labels_table(rng)))
    check_submission(path, _questions())
    lines = path.read_bytes().decode("utf-8-sig").splitlines()
    require(
        [line.split(",")[0].strip('"') for line in lines if line.strip()][1:] == [q.id for q in _questions()],
        "other ids or another order",
    )
    cells = [line.split(",")[1].strip('"') for line in lines if line.strip()][1:]
    require(all(re.fullmatch("[1-5]", cell, re.ASCII) for cell in cells), f"cells {cells} are not all plain digits")


def leaderboard(rng: Random, desk: Desk) -> None:
    """Scores that the user entered for explore.py."""
    from ksat.standings import read_leaderboard

    rows = [["base", "public", "private"], ["a/b", "0.7", "0.65"], ["c", "", "1"], ["embedded", "0.1", ""]]
    board = read_leaderboard(desk.put("b.csv", _mutated_csv(rng, rows)))
    require(all(score is None or 0 <= score <= 1 for pair in board.values() for score in pair), "a score out of range")


def submission_log(rng: Random, desk: Desk) -> None:
    """The log of submissions, and an entry into it beside an odd report."""
    from ksat.submission_log import COLUMNS, enter, log_table, read_log

    rows = [list(COLUMNS), ["2026-01-01T00:00:00Z", "submissions/a.csv", "0" * 64, "1.000 a.probs.csv", "0.7", "0.6", "0.71", ""],
            ["2026-01-02T00:00:00Z", "submissions/b, c.csv", "1" * 64, "", "", "", "", "0.5"]]  # fmt: skip
    entered = desk.put("s.csv", odd.to_csv(Random(0), _labels_table(rng)))
    path = desk.put("log.csv", _mutated_csv(rng, rows) if rng.random() < 0.7 else odd.to_csv(Random(1), rows))
    if rng.random() < 0.5:
        report = json.loads(Path("submissions/old.probs.json").read_text())
        desk.put("s.probs.json", odd.to_json(rng, odd.mutate_json(rng, report)))
    before = read_log(path)
    row, is_new = enter(path, entered, {"public": 0.5})
    after = read_log(path)
    require(is_new and after == [*before, row], "the log has lost or changed a row")
    log_table(after)


# Texts


_PROMPT = "[system]\n지문을 읽으세요.\n[user]\n지문:\n{passage}\n\n{context}질문: {question}{question_plus}\n{labels}\n{choices}\n정답:\n"


def prompt(rng: Random, desk: Desk) -> None:
    """A prompt's wording, filled with questions."""
    from ksat.prompts import PromptTemplate, build_messages, read_template

    path = desk.put("prompt.txt", odd.to_bytes(rng, odd.mutate_text(rng, _PROMPT)))
    template = read_template(path, rng.choice(("label", "text")))
    require(PromptTemplate(**template.to_dict()) == template, "run.json would hold another wording")
    json.dumps(template.to_dict(), ensure_ascii=False).encode()
    for question in _questions()[:2]:
        build_messages(template, question, "label", shots=_questions()[2:3])


_ARTICLES = (
    {"title": "측우기", "text": "측우기는 비의 양을 재는 기구이다. 세종 때 만들었다.\n전국에 두었다."},
    {"text": "거북선. " * 90, "id": 3},
)
_DUMP = (
    "<mediawiki xmlns=\"http://www.mediawiki.org/xml/export-0.11/\"><page><title>측우기</title><ns>0</ns><revision><text>'''측우기'''는 [[비|비의 양]]을 재는 "
    '{{기구|이름={{a}}}}이다.<ref>책</ref>\n== 각주 ==\n*</text></revision></page><page><title>x</title><ns>0</ns><redirect title="y"/><revision><text>#넘겨주기 [[y]]'
    "</text></revision></page></mediawiki>"
)


def _read_all(path: Path) -> None:
    from ksat.corpus import cut_passages, read_corpus

    for article in read_corpus(path):
        passages = cut_passages(article)
        squeezed = ["".join(text.split()) for text in (article.text, "".join(passage.text for passage in passages))]
        require(squeezed[0] == squeezed[1], "an article's passages are not its text")
        require(all(len(passage.text) <= 1000 for passage in passages), "a passage of more than 1000 characters")
        (article.title + article.text).encode()


def corpus_lines(rng: Random, desk: Desk) -> None:
    """A corpus as JSON lines, also packed."""
    lines = b"".join(
        odd.to_json(rng, odd.mutate_json(rng, each) if rng.random() < 0.5 else each) + b"\n" for each in _ARTICLES
    )
    _read_all(desk.put(*_packed(rng, "c.jsonl", lines)))


def corpus_dump(rng: Random, desk: Desk) -> None:
    """A MediaWiki dump, also packed."""
    text = odd.mutate_text(rng, _DUMP) if rng.random() < 0.7 else _DUMP
    if rng.random() < 0.15:
        text = f'<?xml version="1.0" encoding="{rng.choice(("euc-kr", "utf-16", "latin-1", "utf-7", "x", "UTF-8", "idna"))}"?>{text}'
    _read_all(desk.put(*_packed(rng, "c.xml", odd.to_bytes(rng, text))))


def _packed(rng: Random, name: str, data: bytes) -> tuple[str, bytes]:
    if rng.random() < 0.7:
        return name, data
    packed = bz2.compress(data)
    return f"{name}.bz2", rng.choice((packed, packed + packed, odd.mutate_bytes(rng, packed), data))


def wikitext(rng: Random, desk: Desk) -> None:
    """The markup of a page."""
    from ksat.wikitext import to_plain_text

    text = re.search(r"<text>(.*?)</text>", _DUMP, re.DOTALL)
    assert text is not None
    markup = text[1]
    for _ in range(rng.randint(1, 5)):
        markup = odd.mutate_text(rng, markup)
    plain = to_plain_text(markup)
    require(len(plain) <= len(markup) + 10, "the plain text is longer than its markup")


# Files of our own


def _read_json(path: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def _with_seal(fields: dict[str, Any]) -> dict[str, Any]:
    """An object with the digest that ksat.sealed would give it."""
    from ksat.sealed import content_sha256

    content = {name: value for name, value in fields.items() if name != "sha256"}
    return {**content, "sha256": content_sha256(content)}


def _sealed_json(rng: Random, fields: dict[str, Any]) -> bytes:
    """A sealed file of ours with odd values; most have the digest that fits them, so that the rules behind it are met."""
    value = odd.mutate_json(rng, fields)
    if rng.random() < 0.8 and isinstance(value, dict):
        with suppress(ValueError, RecursionError):  # no JSON
            value = _with_seal(value)
    return odd.to_json(rng, value)


def run_json(rng: Random, desk: Desk) -> None:
    """run.json of a finished run."""
    from ksat.prompts import PromptTemplate
    from ksat.runs import read_run

    path = Path("input/run/run.json")
    shutil.copytree("checkpoints/first/adapter", "input/run/adapter")
    path.write_bytes(_sealed_json(rng, _read_json("checkpoints/first/run.json")))
    run = read_run(path.parent)
    PromptTemplate(**run.template)
    require(run.score_by in ("label", "text") and run.quantization in ("nf4", "none"), "an unknown value is taken")
    require(type(run.max_tokens) is int and run.max_tokens > 0, f"max_tokens {run.max_tokens!r} is taken")
    require(type(run.scale) in (int, float) and 0.01 <= run.scale <= 1000, f"scale {run.scale!r} is taken")
    require(type(run.settings.get("rank")) is int, f"rank {run.settings.get('rank')!r} is taken")


def adapter_config(rng: Random, desk: Desk) -> None:
    """adapter_config.json, as ksat.soup reads it."""
    from ksat.adapter_mean import mean_adapter, read_member, require_one_kind
    from ksat.files import file_sha256

    shutil.copytree("checkpoints/first", "input/run")
    value = odd.mutate_json(rng, _read_json("checkpoints/first/adapter/adapter_config.json"))
    config = Path("input/run/adapter/adapter_config.json")
    config.write_bytes(odd.to_json(rng, value))
    if rng.random() < 0.8:
        run = _read_json("input/run/run.json") | {"adapter_config_sha256": file_sha256(config)}
        Path("input/run/run.json").write_text(json.dumps(_with_seal(run)), encoding="utf-8")
    members = [read_member(Path("input/run")), read_member(Path("checkpoints/second"))]
    require_one_kind(members)
    mean_adapter(members, [0.5, 0.5])


def settings_json(rng: Random, desk: Desk) -> None:
    """settings.json of an interrupted run, as --resume reads it."""
    shutil.copytree("checkpoints/first", "checkpoints/stopped")
    Path("checkpoints/stopped/run.json").unlink()
    settings = _sealed_json(rng, _read_json("checkpoints/first/settings.json"))
    Path("checkpoints/stopped/settings.json").write_bytes(settings)
    _call("train", ["--run", "stopped", "--resume", *CPU])


def progress_json(rng: Random, desk: Desk) -> None:
    """progress.json of an interrupted run."""
    from ksat.run_folders import seal
    from ksat.validation import Validation

    control = _read_json("checkpoints/first/metrics.json")
    control.pop("peak_memory_gib", None)
    desk.put("progress.json", _sealed_json(rng, control))
    if rng.random() < 0.5:
        best = Path(f"input/epoch-{control['best_epoch']}")
        best.mkdir()
        seal(best)
    rows: list[Any] = list(_questions())
    known: dict[str, Any] = {
        "folder": Path("input"),
        "score_by": "label",
        "pack_tokens": 300,
        "patience": 2,
        "positions": {},
    }
    validation = Validation(mock.Mock(), rows, [_encoder("label").encode(row) for row in rows], **known)
    with mock.patch.object(Validation, "_scores", side_effect=Reached):
        validation.control()
    if not validation.has_stopped:
        require(validation.scale >= 1, f"scale {validation.scale!r} is taken")
    if validation.progress["epochs"]:
        require(validation.best_epoch >= 1, "a best epoch below 1")
        validation.warn()


def blend_json(rng: Random, desk: Desk) -> None:
    """A fitted blend, and what it makes of two members."""
    from ksat.blend_fit import read_fit
    from ksat.fitted_blend import apply_blend
    from ksat.predictions import read_probs

    path = desk.put("x.blend.json", odd.to_json(rng, odd.mutate_json(rng, _read_json("submissions/fitted.blend.json"))))
    members = [Path("a.probs.csv"), Path("b.probs.csv")]
    fitted = read_fit(path, members, as_fitted=rng.random() < 0.5)
    table = read_probs(desk.put("p.csv", odd.to_csv(Random(0), _probs_table(rng)))).probs
    blended = apply_blend(fitted, [table, table])
    require(bool((np.abs(np.nansum(blended, axis=1) - 1) <= 1e-6).all()), "a blend that does not sum to 1")


def journal(rng: Random, desk: Desk) -> None:
    """A journal that was garbled: what is taken of it is what was scored."""
    from ksat.journal import Journal

    path, settings = Path("input/.x.probs.csv.partial"), {"base": "b", "num_questions": 8}
    Path("input").mkdir()
    whole = Journal(path, settings, pack_tokens=300)
    scores = {f"q-{i}": [rng.uniform(-9, 0) for _ in range(4 + i % 2)] for i in range(8)}
    for start in range(0, 8, 2):
        whole.add({name: scores[name] for name in list(scores)[start : start + 2]})
    part = whole.path
    data = part.read_bytes()
    for _ in range(rng.randint(1, 3)):
        data = odd.mutate_bytes(rng, data)
    if rng.random() < 0.3:  # a digit for another digit: nothing but a hash can tell
        at = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
        if at:
            i = rng.choice(at)
            data = data[:i] + str(rng.randrange(10)).encode() + data[i + 1 :]
    part.write_bytes(data)
    found = Journal(path, settings, pack_tokens=200)
    other = [name for name, values in found.scores.items() if scores.get(name) != values]
    require(not other, f"a garbled journal was parsed into other scores of {other[:3]}")
    require(
        found.pack_tokens in ((200, 300) if not found.scores else (300,)), f"pack tokens {found.pack_tokens} were read"
    )


# Names, templates and flags


def ids(rng: Random, desk: Desk) -> None:
    """Odd ids through a question file, a probability file and a submission's check."""
    import tiny

    from ksat.predictions import Predictions, check_submission, read_probs, write_probs
    from ksat.questions import read_questions

    rows = [replace(q, id=odd.mutate_text(rng, q.id) if rng.random() < 0.5 else q.id) for q in _questions()]
    path = Path("input/q.csv")
    path.parent.mkdir()
    try:
        tiny.write_questions(path, rows)
    except (UnicodeEncodeError, csv.Error):
        return
    found = read_questions(path)
    probs = np.where(
        np.arange(5) < np.array([[q.num_choices] for q in found]),
        1 / np.array([[q.num_choices] for q in found]),
        np.nan,
    )
    predictions = Predictions(tuple(q.id for q in found), probs)
    write_probs(Path("input/p.csv"), predictions)
    require(read_probs(Path("input/p.csv")).ids == predictions.ids, "ids that were written read otherwise")
    with Path("input/s.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "answer"], *([q.id, "1"] for q in found)])
    require(
        list(check_submission(Path("input/s.csv"), found)) == list(predictions.ids), "a submission's ids read otherwise"
    )


_JINJA = (
    "{{ 'a' * 10**10 }}", "{{ raise_exception('no\nsystem') }}", "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "{{ messages[9] }}",
    "{{ messages.__class__.__base__ }}", "{{ cycler.__init__.__globals__.os }}", "{% if %}", "{{ 1 / 0 }}", "{{ x.y }}", "{% set s = 'a' %}{% for i in range(60) %}{% set s = s + s %}"
    "{% endfor %}{{ s }}", "{{ 2 ** 2 ** 40 }}", "{{ messages | length }}", "{{ messages[0].content[:3] }}", "{% include 'x' %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'x'.format() }}", "{{ '%99999999999d' % 1 }}", "{{ strftime_now('%Y') }}", "{{ messages | tojson }}", "{{ '\ud800' }}", "{% generation %}a{% endgeneration %}",
)  # fmt: skip


def chat_template(rng: Random, desk: Desk) -> None:
    """The chat template of a base, which its maker wrote."""
    import tiny

    from ksat.encoding import Encoder
    from ksat.prompts import DEFAULT_TEMPLATES

    template = tiny.CHAT_TEMPLATE
    for _ in range(rng.randint(1, 2)):
        at = rng.randint(0, len(template))
        template = (
            template[:at] + rng.choice(_JINJA) + template[at:] if rng.random() < 0.5 else odd.mutate_text(rng, template)
        )
    tokenizer = _tokenizer_to_bend()
    tokenizer.chat_template = template
    score_by: Any = rng.choice(("label", "text"))
    encoder = Encoder(tokenizer, DEFAULT_TEMPLATES[score_by], score_by, max_tokens=512)
    for question in _questions()[:2]:
        encoded = encoder.encode(question)
        require(len(encoded.prompt_ids) <= 512, f"a prompt of {len(encoded.prompt_ids)} tokens")


@cache
def _tokenizer_to_bend() -> Any:
    import copy

    import tiny

    return copy.deepcopy(tiny.make_tokenizer())


_VALID: dict[str, tuple[list[str], ...]] = {
    "train": (
        ["--base", BASE, *CPU, "--run", "new", "--epochs", "1", "--limit", "2"],
        ["--base", BASE, *CPU, "--run", "new", "--folds", "2", "--all"],
        ["--base", BASE, *CPU, "--run", "new", "--overwrite"],
        ["--data-report", "--train", HELD_OUT, "--oof", "submissions/first-oof.probs.csv"],
        ["--run", "first", "--resume"],
    ),
    "inference": (
        ["--ckpt", "checkpoints/first", *CPU, "--test", "data/test.csv", "--out", "new"],
        ["--base", BASE, *CPU, "--test", "data/test.csv", "--answers", "data/answers.csv", "--shots", "1", "--out", "new"],
        ["--ckpt", "checkpoints/second", *CPU, "--choice-orders", "2", "--limit", "3", "--out", "new", "--overwrite"],
    ),
    "ensemble": (
        ["submissions/first.probs.csv", "submissions/second.probs.csv", "--out", "new", "--weights", "1", "2"],
        ["submissions/first.probs.csv", "submissions/second.csv", "--out", "new", "--test", "data/test.csv", "--answers", "data/answers.csv"],
        ["--apply", "submissions/fitted.blend.json", "submissions/first.probs.csv", "submissions/second.probs.csv", "--out", "new"],
        ["--check", "submissions/first.csv", "--test", "data/test.csv"],
        ["--log", "submissions/first.csv", "--public", "0.5"],
    ),
    "compare": (["submissions/first-oof.probs.csv", "submissions/second-oof.probs.csv", "--answers", HELD_OUT],),
    "explore": (
        ["--gpu", "v100-32gb"], ["--gpu", "v100-32gb", "--explain", "Qwen/Qwen3-8B"], ["--gpu", "v100-32gb", "--bases", "Qwen/Qwen3-8B,bases/tiny"],
        ["--score", "data/train.csv", "--bases", BASE, "--out", "new", "--limit", "3"],
    ),
    "ksat.retrieve": (["--corpus", "input/c.jsonl", "--questions", "data/test.csv", "--out", "new.csv"],),
    "ksat.soup": (["checkpoints/first", "checkpoints/second", "--run", "new"], ["checkpoints/first", "checkpoints/second", "--run", "new", "--rank", "3", "--weights", "2", "1"]),
}  # fmt: skip


def flags(script: str) -> Callable[[Random, Desk], None]:
    """A script with odd flags, up to where its model would begin to work."""

    def enter(rng: Random, desk: Desk) -> None:
        import importlib

        desk.put("c.jsonl", "".join(json.dumps(each) + "\n" for each in _ARTICLES).encode())
        actions = [
            action for action in importlib.import_module(script).build_parser()._actions if action.dest != "help"
        ]
        argv = list(rng.choice(_VALID[script]))
        for _ in range(rng.randint(1, 3)):
            way, at = rng.randrange(4), rng.randint(0, len(argv))
            if way == 0 and at < len(argv):
                argv[at] = odd.mutate_text(rng, argv[at]) if rng.random() < 0.5 else odd.odd_text(rng)
            elif way == 1 and at < len(argv):
                argv.pop(at)
            elif way == 2 and at < len(argv):
                argv[at] = rng.choice(
                    (
                        "",
                        ".",
                        "..",
                        " ",
                        "data/test.csv",
                        "data/test",
                        "checkpoints",
                        "submissions",
                        "full.tmp",
                        "a\nb",
                        "./new",
                        "new/",
                        "가" * 90,
                    )
                )
            else:
                action = rng.choice(actions)
                values = (
                    []
                    if action.nargs == 0
                    else [str(rng.choice(list(action.choices))) if action.choices else odd.odd_text(rng)]
                )
                argv += [*(action.option_strings[:1]), *values]
        _call(script, [_as_argument(word) for word in argv])

    return enter


def _as_argument(word: str) -> str:
    """What an operating system can hand over, and nothing that leaves the desk: no absolute path."""
    text = os.fsdecode(word[:100_000].replace("\0", "").encode("utf-8", "surrogatepass"))
    return re.sub(r"(^|[=,])/+", r"\1", text)


def _call(script: str, argv: list[str]) -> None:
    """A script's main, with all that computes left out."""
    import importlib

    main = importlib.import_module(script).main
    with ExitStack() as stack:
        for name, how in {
            "ksat.models.load": {"side_effect": lambda *_, **more: model() if more.get("lora") else _reach()},
            "ksat.models.load_tokenizer": {"side_effect": Reached},
            "ksat.validation.Validation.control": {"side_effect": Reached},
            "ksat.retrieve.Index": {"side_effect": Reached},
            "ksat.crossval.run_script": {"return_value": "not run"},
            "ksat.exploration.run_script": {"return_value": "not run"},
        }.items():
            stack.enter_context(mock.patch(name, **how))
        main(argv)


def _reach() -> None:
    raise Reached


@cache
def model() -> Any:
    """A tiny model with a LoRA, loaded once, before anything is patched or limited: nothing is computed with it."""
    import tiny

    return tiny.load_base(Path(BASE), rank=8)


DOORS = (
    Door("fuzz-questions", 14_000, questions),
    Door("fuzz-flat-questions", 9_000, lambda rng, desk: questions(rng, desk, flat=True)),
    Door("fuzz-probabilities", 10_000, probs),
    Door("fuzz-labels", 7_000, labels),
    Door("fuzz-answers", 4_000, gold),
    Door("fuzz-submissions", 6_000, submission),
    Door("fuzz-leaderboard", 4_000, leaderboard),
    Door("fuzz-submission-log", 4_000, submission_log),
    Door("fuzz-prompts", 6_000, prompt),
    Door("fuzz-corpus-lines", 5_000, corpus_lines),
    Door("fuzz-corpus-dumps", 5_000, corpus_dump),
    Door("fuzz-wikitext", 5_000, wikitext),
    Door("fuzz-ids", 2_000, ids),
    Door("fuzz-run-json", 3_000, run_json),
    Door("fuzz-adapter-config", 1_000, adapter_config),
    Door("fuzz-settings-json", 1_000, settings_json),
    Door("fuzz-progress-json", 1_500, progress_json),
    Door("fuzz-blend-json", 3_000, blend_json),
    Door("fuzz-journals", 5_000, journal),
    Door("fuzz-chat-templates", 1_500, chat_template),
    Door("fuzz-flags-train", 600, flags("train")),
    Door("fuzz-flags-inference", 600, flags("inference")),
    Door("fuzz-flags-ensemble", 600, flags("ensemble")),
    Door("fuzz-flags-compare", 200, flags("compare")),
    Door("fuzz-flags-explore", 300, flags("explore")),
    Door("fuzz-flags-retrieve", 400, flags("ksat.retrieve")),
    Door("fuzz-flags-soup", 300, flags("ksat.soup")),
)
