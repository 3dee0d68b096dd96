"""Background in the prompt: who gets it, what is cut first, and what a run hands on to inference."""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import base_folder, make_questions, make_run, make_tokenizer, read_probs

import inference
import train
from ksat.context import ContextRule, take_context
from ksat.encoding import Encoder
from ksat.errors import InputError
from ksat.files import read_json
from ksat.orders import ALL_ORDERS
from ksat.prompts import DEFAULT_TEMPLATES
from ksat.questions import Question, read_questions

LABEL = DEFAULT_TEMPLATES["label"].user
CPU = ["--device", "cpu", "--engine", "transformers"]
READING = replace(
    make_questions(1)[0], id="r", question="윗글의 내용과 일치하는 것은?", passage="가" * 400, context="배경 하나"
)
KNOWLEDGE = replace(READING, id="k", question="밑줄 친 왕의 업적으로 옳은 것은?", passage="나" * 90, context="배경 둘")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("all", "rk"), ("none", ""), ("kind=reading", "r"), ("kind=knowledge", "k"), ("short:91", "k"), ("short:90", "")],
)
def test_rules(rule: str, expected: str) -> None:
    found = ContextRule.parse(rule).apply([READING, KNOWLEDGE])
    assert "".join(question.id for question in found if question.context) == expected
    assert [replace(question, context="") for question in found] == [
        replace(q, context="") for q in (READING, KNOWLEDGE)
    ]


@pytest.mark.parametrize("text", ["some", "short", "short:", "short:0", "short:x", "kind=", "kind=other", ""])
def test_bad_rules(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected all, none, kind=knowledge"):
        ContextRule.parse(text)


def test_who_got_what_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    take_context([READING, replace(KNOWLEDGE, context="")], ContextRule("all"), LABEL, "a.csv")
    assert capsys.readouterr().out == (
        "context: 1 of 2 questions of a.csv get theirs, 5 characters on average (all picks 2)\n"
    )
    take_context([READING, KNOWLEDGE], ContextRule("none"), LABEL, "a.csv")
    assert "2 questions of a.csv have one, and none gets it" in capsys.readouterr().out
    take_context([replace(READING, context="")], ContextRule("none"), LABEL, "a.csv")
    assert capsys.readouterr().out == ""


def test_a_rule_without_a_column_or_a_place_is_refused() -> None:
    bare = [replace(READING, context="")]
    with pytest.raises(InputError, match="none of the 1 questions of a.csv .* python -m ksat.retrieve fills it"):
        take_context(bare, ContextRule("all"), LABEL, "a.csv")
    with pytest.raises(InputError, match=r"the prompt's wording has no field \{context\}"):
        take_context([READING], ContextRule("all"), "{choices}", "a.csv")


def test_the_context_is_cut_before_the_passage_and_alike_in_all_orders() -> None:
    question = replace(make_questions(1)[0], context="아주 먼 옛날의 일이다. " * 20, passage="사람들이 모였다. " * 20)

    def encode(max_tokens: int) -> list[object]:
        encoder = Encoder(make_tokenizer(), DEFAULT_TEMPLATES["label"], "label", max_tokens=max_tokens)
        return encoder.encode_orders(question, ALL_ORDERS)

    whole = encode(100_000)
    bare = Encoder(make_tokenizer(), DEFAULT_TEMPLATES["label"], "label", max_tokens=100_000).encode(
        replace(question, context="")
    )
    length = max(len(order.prompt_ids) for order in whole)
    assert {order.num_cut_context for order in whole} == {0}
    for limit in (length - 1, (length + len(bare.prompt_ids)) // 2):
        cut = encode(limit)
        assert len({order.num_cut_context for order in cut}) == 1
        assert 0 < cut[0].num_cut_context < len(question.context)
        assert cut[0].num_cut_characters == 0
        assert max(len(order.prompt_ids) for order in cut) <= limit
    none_left = encode(len(bare.prompt_ids) - 5)[0]
    assert none_left.num_cut_context == len(question.context)
    assert none_left.num_cut_characters > 0


def write(path: str, questions: list[Question]) -> None:
    import csv

    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "paragraph", "problems", "question_plus", "context"])
        for row in questions:
            problems = {"question": row.question, "choices": list(row.choices), "answer": row.answer}
            writer.writerow([row.id, row.passage, repr(problems), row.question_plus, row.context])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name, first in (("train.csv", 0), ("test.csv", 40)):
        write(
            name, [replace(q, context=f"배경 {q.id}: 모두 {i}번") for i, q in enumerate(make_questions(8, first=first))]
        )
    yield tmp_path


def test_kinds_decide_only_who_gets_a_context(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that does not say how they were told may score other rows with a context than it was trained with, and says so."""
    asks = {"rank": 4, "context_when": "kind=knowledge"}
    make_run(Path("checkpoints/before"), settings=asks)
    make_run(Path("checkpoints/wording"), settings=asks | {"kinds": "wording"})
    make_run(Path("checkpoints/now"), settings=asks | {"kinds": None, "choices_tell_kinds": False})
    make_run(Path("checkpoints/told"), settings=asks | {"kinds": "kinds.csv", "choices_tell_kinds": False})
    for name in ("before", "wording", "now", "told"):
        with pytest.raises(InputError, match="missing.csv: no such file"):  # as late as the answers
            inference.main(
                [
                    "--ckpt",
                    f"checkpoints/{name}",
                    "--test",
                    "test.csv",
                    "--answers",
                    "missing.csv",
                    "--out",
                    "out/x",
                    *CPU,
                ]
            )
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
        expected = {
            "before": "checkpoints/before does not say whether the number of choices told kinds in its training",
            "told": "kinds.csv told the kinds of the rows that checkpoints/told was trained on, and is not carried over; --kinds FILE",
        }
        assert len(warnings) == (name in expected)
        assert expected.get(name, "") in "".join(warnings)
    for flags in ([], ["--context-when", "all"]):
        with pytest.raises(
            InputError, match="--kinds: here kinds decide only who gets a context; add --context-when kind="
        ):
            inference.main(
                [
                    "--base",
                    str(base_folder()),
                    "--test",
                    "test.csv",
                    "--kinds",
                    "wording",
                    "--out",
                    "out/x",
                    *flags,
                    *CPU,
                ]
            )


def test_a_run_hands_its_rule_on(here: Path) -> None:
    assert read_questions("test.csv")[1].context == f"배경 {read_questions('test.csv')[1].id}: 모두 1번"
    train.main(
        [
            "--base",
            str(base_folder()),
            "--train",
            "train.csv",
            "--run",
            "c",
            "--context-when",
            "kind=knowledge",
            "--kinds",
            "wording",
            "--epochs",
            "1",
            "--rank",
            "4",
            *CPU,
        ]
    )
    assert read_json(Path("checkpoints/c/run.json"))["settings"]["context_when"] == "kind=knowledge"
    inference.main(["--ckpt", "checkpoints/c", "--test", "test.csv", "--out", "out/with", *CPU])
    inference.main(
        ["--ckpt", "checkpoints/c", "--test", "test.csv", "--out", "out/without", "--context-when", "none", *CPU]
    )
    assert [read_json(Path(f"out/{name}.probs.json"))["context_when"] for name in ("with", "without")] == [
        "kind=knowledge",
        "none",
    ]
    assert {read_json(Path(f"out/{name}.probs.json"))["kinds"] for name in ("with", "without")} == {"wording"}
    told, untold = read_probs(Path("out/with.probs.csv")), read_probs(Path("out/without.probs.csv"))
    assert max(abs(a - b) for row_id in told for a, b in zip(told[row_id], untold[row_id], strict=True)) > 0.01
    write("test.csv", make_questions(4, first=40))
    with pytest.raises(InputError, match="--context-when kind=knowledge: none of the 4 questions of test.csv"):
        inference.main(["--ckpt", "checkpoints/c", "--test", "test.csv", "--out", "out/bare", *CPU])


def counted(num_rows: int, sentence: str) -> list[Question]:
    """As many rows of four choices as of five; the wording calls half of the former knowledge, and all others reading."""
    return [
        Question(
            f"{sentence[0]}{size}-{i}",
            f"{sentence} {i}번 세어 보았다. " * 8,
            "이 조약이 맺어진 시기의 모습은?" if size == 4 and i % 2 else "윗글의 내용과 일치하는 것은?",
            tuple("가나다라마"[:size]),
            1,
            context="배경",
        )
        for i in range(num_rows)
        for size in (4, 5)
    ]


def test_a_small_test_file_has_the_kinds_of_the_training_rows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cut test file can't say whether the number of choices tells kinds: it went by the wording, without a word."""
    write("train.csv", counted(100, "어느 마을에 오래된 느티나무가 있었다."))
    write("small.csv", counted(4, "바닷가 언덕 위로 등대 불빛이 지나갔다."))
    carried = (
        "kinds: in the run's training the number of choices {} them, so {} of 8 questions of small.csv are of another kind than by this "
        "file alone\ncontext: {} of 8 questions of small.csv get theirs"
    )
    flags = [
        "--base",
        str(base_folder()),
        "--train",
        "train.csv",
        "--valid",
        "small.csv",
        "--valid-fraction",
        "0",
        "--limit",
        "2",
    ]
    train.main([*flags, "--run", "c", "--context-when", "kind=knowledge", "--epochs", "1", "--rank", "4", *CPU])
    assert carried.format("tells", 2, 4) in capsys.readouterr().out
    settings = read_json(Path("checkpoints/c/run.json"))["settings"]
    assert settings["choices_tell_kinds"] is True
    score = ["--test", "small.csv", *CPU]
    inference.main(["--ckpt", "checkpoints/c", *score, "--out", "out/c"])
    assert carried.format("tells", 2, 4) in capsys.readouterr().out
    assert read_json(Path("out/c.probs.json"))["choices_tell_kinds"] is True
    inference.main(["--ckpt", "checkpoints/c", *score, "--out", "out/wording", "--kinds", "wording"])
    told = capsys.readouterr()
    assert "kinds: " not in told.out
    assert "context: 2 of 8 questions of small.csv get theirs" in told.out
    assert "warning" not in told.err


def test_a_large_test_file_has_the_kinds_of_the_training_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = counted(100, "어느 마을에 오래된 느티나무가 있었다.")
    hinted = [replace(row, kind_hint="knowledge" if row.num_choices == 4 else "reading") for row in rows]
    rule = ContextRule("kind=knowledge")
    assert sum(bool(row.context) for row in take_context(hinted, rule, LABEL, "a.csv")) == 100
    assert "kinds:" not in capsys.readouterr().out
    assert sum(bool(row.context) for row in take_context(hinted, rule, LABEL, "a.csv", False)) == 50
    assert "does not tell them, so 50 of 200 questions of a.csv are of another kind" in capsys.readouterr().out
    assert sum(bool(row.context) for row in take_context(hinted, rule, LABEL, "a.csv", True)) == 100
    assert len(take_context(hinted, ContextRule("all"), LABEL, "a.csv", False)) == 200
    assert "kinds:" not in capsys.readouterr().out  # where kinds decide nothing
