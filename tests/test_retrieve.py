"""Background for questions: planted answers are found, a question's own passage is not, and the file stays as it was.

facts.jsonl is the corpus: short texts of facts in our own words, most of them with a question whose answer stands in them.
"""

import builtins
import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import make_questions, read_rows, write_questions

from ksat import retrieve
from ksat.bm25 import Index
from ksat.corpus import Article, cut_passages, read_corpus
from ksat.errors import EXIT_BAD_INPUT, InputError, exit_code
from ksat.questions import Question
from ksat.retrieve import find_context, is_same_passage

FACTS = Path(__file__).with_name("facts.jsonl")
ROWS = [json.loads(line) for line in FACTS.read_text(encoding="utf-8").splitlines()]
PLANTED = [(row, row["ask"]) for row in ROWS if "ask" in row]
LIMITS: dict[str, Any] = {"top": 5, "max_characters": 10_000}
OTHER = Question("other", "", "주식 시장에서 반도체 기업의 배당금은?", ("백 달러", "천 달러"), 1)
OWN = (
    "강감찬은 물러가는 거란의 군대를 귀주에서 크게 무찔렀다. 세 번째 침입에서 살아 돌아간 적은 몇천 명뿐이었고, 그 뒤로 거란은 고려를 넘보지 못했다. "
    "나라에서는 도읍 둘레에 성을 쌓고, 북쪽 국경을 따라 긴 성을 쌓아 여진과 거란의 침입에 대비하였다."
)


def as_question(ask: dict[str, Any]) -> Question:
    return Question("q", ask["passage"], ask["question"], tuple(ask["choices"]), ask["answer"])


@pytest.fixture(scope="module")
def index() -> Index:
    return Index(passage for article in read_corpus(FACTS) for passage in cut_passages(article))


def test_planted_answers_are_in_the_top_five(index: Index) -> None:
    assert len(ROWS) >= 60
    assert len(PLANTED) >= 40
    missed = [
        row["title"] for row, ask in PLANTED if row["text"] not in find_context(index, as_question(ask), **LIMITS).text
    ]
    assert len(missed) <= 0.05 * len(PLANTED), missed


def test_the_right_text_is_first_though_questions_do_not_quote_it(index: Index) -> None:
    assert not [row["title"] for row, ask in PLANTED if is_same_passage(ask["passage"], row["text"])]
    first = [find_context(index, as_question(ask), top=1, max_characters=999).text for _, ask in PLANTED]
    right = [text == f"{row['title']}: {row['text']}" for text, (row, _) in zip(first, PLANTED, strict=True)]
    assert np.mean(right) >= 0.9


def test_a_long_passage_does_not_drown_the_question(index: Index) -> None:
    """Rows of other passages' words stand before the hint, as they do in reading questions."""
    others = " ".join(row["text"] for row in ROWS if "ask" not in row)
    ranks = []
    for row, ask in PLANTED:
        scores = index.search(as_question({**ask, "passage": f"{others} {ask['passage']}"}))
        scores[[i for i, other in enumerate(ROWS) if "ask" not in other]] = 0  # as own passages
        ranks.append(int((scores > scores[ROWS.index(row)]).sum()))
    assert np.mean(np.array(ranks) < 5) >= 0.95
    assert np.mean(np.array(ranks) == 0) >= 0.75


def test_scores_are_shares_and_a_question_of_another_world_gets_nothing(index: Index) -> None:
    for _, ask in PLANTED[:10]:
        scores = index.search(as_question(ask))
        assert scores.shape == (len(ROWS),)
        assert 0 < scores.max() < 1
        assert scores.min() >= 0
    assert find_context(index, OTHER, **LIMITS) == retrieve.Context("", 0.0, 0)
    assert not index.search(Question("e", "", "?!", ("…", "—"), None)).any()


def test_a_name_that_stands_alone_is_found_as_it_is_in_a_sentence(index: Index) -> None:
    assert "결작" in index.words("결작")  # Kiwi reads two words there
    assert "옳/V" not in index.words("다음 설명으로 옳은 것은?")


@pytest.mark.parametrize(
    "text",
    [
        OWN,
        OWN.replace(" ", "  ").replace(".", ". "),
        f"고려의 싸움. {OWN} 이 밖에도 여러 싸움이 있었다.",
        OWN[: len(OWN) // 2],  # a piece of it
        OWN.replace("거란", "요나라").replace("크게 무찔렀다", "물리쳤다"),
    ],
)
def test_the_own_passage_never_comes_back(text: str) -> None:
    corpus = [Article("귀주", text), *(Article(row["title"], row["text"]) for row in ROWS)]
    question = Question("q", OWN, "위 전투를 이끈 장수는?", ("강감찬", "서희"), 1)
    index = Index(corpus)
    assert index.search(question).argmax() == 0  # it would be first
    found = find_context(index, question, **LIMITS)
    assert found.num_own == 1
    assert text not in found.text
    assert "1019년 강감찬이" in found.text  # another text on the same battle


def test_a_near_duplicate_is_no_background() -> None:
    """What folds and intervals take for one passage (a third of the words changed) came back as background for itself."""
    others = " ".join(row["text"] for row in ROWS if "거란" not in row["text"]).split()
    words = OWN.split()
    for first in range(3):
        copy = " ".join(others[i] if i % 3 == first else word for i, word in enumerate(words))
        assert is_same_passage(OWN, copy)
        assert is_same_passage(copy, OWN)
        question = Question("q", OWN, "위 전투를 이끈 장수는?", ("강감찬", "서희"), 1)
        found = find_context(
            Index([Article("", copy), *(Article(row["title"], row["text"]) for row in ROWS)]), question, **LIMITS
        )
        assert found.num_own == 1
        assert copy not in found.text
    assert not any(is_same_passage(OWN, row["text"]) for row in ROWS)  # another text on the same battle is among them


def test_passages_are_the_same_by_their_letters() -> None:
    assert is_same_passage(OWN, OWN)
    assert not is_same_passage(OWN, "강감찬은 고려의 장수이다.")
    assert not is_same_passage("강감찬은", OWN)  # a mention, not a passage
    assert not is_same_passage("", "")
    row = ROWS[0]["text"]
    assert is_same_passage(row, f"{row} {ROWS[1]['text']} {ROWS[2]['text']} {ROWS[3]['text']}")
    assert not is_same_passage(row, ROWS[1]["text"])


def test_limits_hold_and_a_text_comes_once() -> None:
    row, ask = PLANTED[0]
    again = Article("다시", row["text"].replace(",", " "))
    index = Index([Article(row["title"], row["text"]), again, *(Article(r["title"], r["text"]) for r in ROWS[1:])])
    question = as_question(ask)
    whole = find_context(index, question, top=5, max_characters=10_000).text
    assert whole.count(row["text"][:20]) == 1
    assert find_context(index, question, top=5, max_characters=50).text == whole[:50]
    assert len(find_context(index, question, top=2, max_characters=10_000).text.split("\n")) == 2


def run(folder: Path, *flags: str) -> None:
    retrieve.main(
        ["--corpus", str(FACTS), "--questions", str(folder / "q.csv"), "--out", str(folder / "out.csv"), *flags]
    )


def test_the_user_s_kinds_are_those_of_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_questions(
        tmp_path / "q.csv", [replace(as_question(ask), id=f"q{i}") for i, (_, ask) in enumerate(PLANTED[:4])]
    )
    (tmp_path / "kinds.csv").write_text("id,kind\nq0,reading\nq1,reading\nq2,reading\nq3,knowledge\n")
    run(tmp_path, "--kinds", str(tmp_path / "kinds.csv"))
    rows = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [row[2] for row in rows if row[1:2] and row[1] in ("reading", "knowledge")] in (["3", "1"], ["1", "3"])


def test_every_cell_stays_as_it_was_and_the_report_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asks = [as_question(ask) for _, ask in PLANTED[:4]]
    questions = [replace(question, id=f"q{i}") for i, question in enumerate(asks)] + [OTHER]
    write_questions(tmp_path / "q.csv", questions)
    rows = read_rows(tmp_path / "q.csv")
    names = ["", *rows[0], "note"]
    with (tmp_path / "q.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(names)
        writer.writerows([[str(i), *row.values(), 'a\rb,"c"\r\n\u00a0 NA'] for i, row in enumerate(rows)])
    run(tmp_path)
    with (tmp_path / "q.csv").open(encoding="utf-8-sig", newline="") as file:
        before = list(csv.reader(file))
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as file:
        after = list(csv.reader(file))
    assert [row[:-1] for row in after] == before
    assert after[0][-1] == "context"
    assert [bool(row[-1]) for row in after[1:]] == [True] * 4 + [False]
    assert after[1][-1].startswith("훈민정음: 1443년에")
    told = capsys.readouterr().out
    assert f"{len(ROWS)} passages indexed in" in told
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("| all")]
    assert cells[0][1:3] == ["5", "4"]
    assert cells[0][5] == "0"
    assert [question.id for question in retrieve.read_questions(tmp_path / "out.csv")] == [
        "q0",
        "q1",
        "q2",
        "q3",
        "other",
    ]


def test_outputs_are_not_replaced_unasked_and_bad_input_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_questions(tmp_path / "q.csv", make_questions(2))
    before = (tmp_path / "q.csv").read_bytes()
    (tmp_path / "out.csv").write_text("old")
    with pytest.raises(InputError, match="out.csv: has no column 'context', so it is none of ours"):
        run(tmp_path, "--overwrite")
    (tmp_path / "out.csv").write_text("context")
    with pytest.raises(InputError, match="out.csv exists already; choose another --out, or replace with --overwrite"):
        run(tmp_path)
    with pytest.raises(InputError, match="--out: .*q.csv is the input .*q.csv itself"):
        run(tmp_path, "--out", str(tmp_path / "q.csv"), "--overwrite")
    (tmp_path / "bad.jsonl").write_text('{"title": "a"}')
    with pytest.raises(InputError, match="line 1 has no text in a field 'text'"):  # through Kiwi's threads
        run(tmp_path, "--corpus", str(tmp_path / "bad.jsonl"), "--overwrite")
    assert (tmp_path / "out.csv").read_text() == "context"

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(InputError, match="No space left on device"):
            run(tmp_path, "--overwrite")
    assert (tmp_path / "out.csv").read_text() == "context"
    run(tmp_path, "--overwrite")
    (tmp_path / "out.csv").replace(tmp_path / "q.csv")
    with pytest.raises(InputError, match="has a column 'context' already"):
        run(tmp_path)
    assert (tmp_path / "q.csv").read_bytes() != before


@pytest.mark.parametrize("package", ["bm25s", "kiwipiepy"])
def test_missing_packages_are_told_with_the_line_that_installs_them(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_questions(tmp_path / "q.csv", make_questions(2))
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == package:
            raise ImportError(name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert exit_code(lambda: run(tmp_path)) == EXIT_BAD_INPUT
    assert f"not installed ({package}): pip install bm25s==0.3.16 kiwipiepy==0.24.1" in capsys.readouterr().err
