"""What the scripts write: never over an input, never over each other, finished by the same command after a kill."""

import multiprocessing
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from test_files import write_killed_at
from tiny import base_folder, make_questions, read_rows, write_labels, write_questions

import compare
import ensemble
import inference
from ksat import retrieve
from ksat.errors import EXIT_BAD_INPUT, EXIT_DONE, InputError, exit_code
from ksat.files import lock
from ksat.predictions import Predictions, read_probs, write_probs

CPU = ["--device", "cpu"]
QUESTIONS = make_questions(6)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a test file, its answers and two members."""
    monkeypatch.chdir(tmp_path)
    write_questions(Path("data/test.csv"), QUESTIONS, labelled=False)
    write_questions(Path("data/gold.csv"), QUESTIONS)
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        masses = generator.random((6, 5))
        masses[np.arange(5) >= np.array([[q.num_choices] for q in QUESTIONS])] = np.nan
        probs = masses / np.nansum(masses, axis=1, keepdims=True)
        write_probs(Path(f"{name}.probs.csv"), Predictions(tuple(q.id for q in QUESTIONS), probs))
    return tmp_path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


INPUTS = {
    "inference": (inference, ["--base", "TINY", "--test", "data/test.csv", "--out", "data/test"]),
    "inference, answers": (
        inference,
        ["--base", "TINY", "--test", "data/test.csv", "--answers", "data/gold.csv", "--out", "data/gold"],
    ),
    "ensemble": (ensemble, ["a.probs.csv", "b.probs.csv", "--out", "a"]),
    "ensemble, ./": (ensemble, ["a.probs.csv", "b.probs.csv", "--out", "./a.probs.csv"]),
    "ensemble, test": (ensemble, ["a.probs.csv", "--test", "data/test.csv", "--out", "data/test"]),
    "ensemble, hard link": (ensemble, ["a.probs.csv", "b.probs.csv", "--out", "hard"]),
    "retrieve, corpus": (retrieve, ["--corpus", "c.jsonl", "--questions", "data/test.csv", "--out", "c.jsonl"]),
    "retrieve, questions": (
        retrieve,
        ["--corpus", "c.jsonl", "--questions", "data/test.csv", "--out", "data/../data/test.csv"],
    ),
}


@pytest.mark.parametrize("case", INPUTS)
def test_no_script_writes_over_what_it_reads(here: Path, case: str) -> None:
    script, flags = INPUTS[case]
    Path("hard.probs.csv").hardlink_to("a.probs.csv")
    Path("c.jsonl").write_text('{"text": "context"}\n')
    flags = [str(base_folder()) if flag == "TINY" else "./a" if flag == "a" else flag for flag in flags]
    flags = ["./hard" if flag == "hard" else flag for flag in flags]
    before = snapshot(here)
    with pytest.raises(InputError, match=r"is the input .* itself; choose another --out"):
        script.main([*flags, "--overwrite"])  # type: ignore[attr-defined]
    assert snapshot(here) == before


def test_another_file_of_the_user_is_not_replaced_even_if_asked(here: Path) -> None:
    """data/gold.csv is no input here, and has no report of ours beside it."""
    before = snapshot(here)
    with pytest.raises(
        InputError, match=r"gold.csv exists already, and without gold.probs.json it is no output of ours"
    ):
        ensemble.main(["a.probs.csv", "--out", "data/gold", "--overwrite"])
    assert snapshot(here) == before


def test_a_blend_is_finished_by_the_same_command_after_a_kill(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["a.probs.csv", "b.probs.csv", "--out"]
    ensemble.main([*flags, "whole"])
    names = ("probs.csv", "csv", "probs.json")
    whole = [Path(f"submissions/whole.{name}").read_bytes() for name in names]
    torn = 0
    for step in range(100):
        out = f"killed{step}"
        killed = write_killed_at(step, monkeypatch, lambda out=out: ensemble.main([*flags, out]))  # type: ignore[misc]
        found = [Path(f"submissions/{out}.{name}").exists() for name in names]
        torn += any(found) and not all(found)
        if killed:
            assert exit_code(lambda out=out: ensemble.main([*flags, out])) in (EXIT_DONE, EXIT_BAD_INPUT)  # type: ignore[misc]
        assert [Path(f"submissions/{out}.{name}").read_bytes() for name in names] == whole
        if not killed:
            break
    assert torn == 2  # between the three names
    assert not list(Path("submissions").glob(".*"))


def test_two_commands_on_one_output_are_not_at_work_at_once(here: Path) -> None:
    with lock(Path("submissions/x.probs.json"), "output"):
        for script, flags in (
            (ensemble, ["a.probs.csv"]),
            (inference, ["--base", str(base_folder()), "--test", "data/test.csv", *CPU]),
        ):
            with pytest.raises(InputError, match="x.probs.json: another process is at work on this output; wait for"):
                script.main([*flags, "--out", "x"])
    assert not Path("submissions").exists()
    ensemble.main(["a.probs.csv", "--out", "x"])


def test_commands_that_score_otherwise_have_other_names() -> None:
    variants = [
        "", "--choice-orders 5", "--choice-orders reverse", "--choice-orders random:5", "--debias pride", "--limit 3", "--test data/x.csv",
        "--test data/x.csv --limit 3", "--context-when all", "--context-when short:9", "--dtype float16",
    ]  # fmt: skip
    of_base = [
        "--shots 1", "--shots 1 --train data/y.csv", "--prompt p/z.txt", "--max-tokens 99", "--score-by text", "--quantization nf4",
    ]  # fmt: skip
    names = []
    for model, all_flags in (("--ckpt checkpoints/r", variants), ("--base o/r", [*variants, *of_base])):
        for flags in all_flags:
            args = inference.build_parser().parse_args([*model.split(), *flags.split()])
            names.append(inference._default_name(args, Path(args.test or "data/test.csv")))
    assert len(set(names)) == len(names), names
    assert names[:3] == ["r", "r-orders-5", "r-orders-reverse"]
    assert names[len(variants)] == "o-r-untuned"


def default_name(flags: str) -> str:
    args = inference.build_parser().parse_args(flags.split())
    return inference._default_name(args, Path(args.test or "data/test.csv"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("--base unsloth/Qwen3-8B", "--base Qwen/Qwen3-8B"),
        ("--base models/x", "--base others/x"),
        ("--ckpt checkpoints/r", "--ckpt elsewhere/r"),
        ("--ckpt r", "--ckpt elsewhere/r"),
        ("--ckpt r --test a/x.csv", "--ckpt r --test b/x.csv"),
        ("--ckpt r --test data/x.csv", "--ckpt r --test data/b/x.csv"),
        ("--ckpt r --kinds a/k.csv", "--ckpt r --kinds b/k.csv"),
        ("--base b --prompt a/p.txt", "--base b --prompt prompts/p.txt"),
        ("--base b --shots 2 --train a/p.csv", "--base b --shots 2 --train c/p.csv"),
    ],
)
def test_what_has_one_name_in_two_places_does_not_meet(here: Path, one: str, other: str) -> None:
    for folder in ("models/x", "others/x"):
        Path(folder).mkdir(parents=True)
    assert default_name(one) != default_name(other)


def test_what_lies_where_it_is_expected_has_no_hash_in_its_name(here: Path) -> None:
    """As the README's examples do. How it is computed is no other setting, nor is another way to the same place."""
    Path("mine").mkdir()
    engine = "--engine transformers --no-share-prefixes --device cpu"
    for flags, name in (
        ("--ckpt checkpoints/first", "first"),
        (f"--ckpt {here}/checkpoints/../checkpoints/first/ {engine}", "first"),
        ("--ckpt checkpoints/r --test data/sample_test.csv --kinds data/k.csv", "r-kinds-k-sample_test"),
        ("--ckpt checkpoints/r --kinds wording", "r-kinds-wording"),
        ("--base embedded", "embedded-untuned"),
        ("--base mine --prompt prompts/p.txt", "mine-untuned-p"),
        ("--base Qwen/Qwen3-14B --shots 2 --train data/t.csv", "Qwen-Qwen3-14B-untuned-2-shots-of-t"),
    ):
        assert default_name(flags) == name
    assert default_name("--ckpt elsewhere/r") == default_name(f"--ckpt {here}/elsewhere/r {engine}")
    assert re.fullmatch("r-[0-9a-f]{6}", default_name("--ckpt elsewhere/r"))
    assert re.fullmatch(
        "gone-untuned-[0-9a-f]{6}", default_name("--base ../gone")
    )  # its lack is told when it is loaded


@pytest.mark.parametrize("out", ["", "\u3164", "submissions/"])
def test_a_name_that_is_none_replaces_nothing(here: Path, out: str) -> None:
    """An empty one was taken for the default, and with --overwrite replaced what lay there."""
    Path("submissions").mkdir()
    for kind in ("probs.csv", "csv", "probs.json"):
        Path(f"submissions/{base_folder().name}-untuned-test.{kind}").write_text("mine")
    before = snapshot(here)
    with pytest.raises(InputError, match=r"^--out '.*': (expected a name|nothing of it shows)"):
        inference.main(["--base", str(base_folder()), "--test", "data/test.csv", *CPU, "--out", out, "--overwrite"])
    assert snapshot(here) == before


def test_the_folder_where_one_stands_has_its_name(here: Path) -> None:
    places = (".", "checkpoints/..", f"{here}/")
    assert {default_name(f"--base {place}") for place in places} == {f"{here.name}-untuned"}
    (name,) = {default_name(f"--ckpt {place}") for place in places}
    assert re.fullmatch(f"{re.escape(here.name)}-[0-9a-f]{{6}}", name)


def enter_log(number: int) -> None:
    sys.exit(exit_code(lambda: ensemble.main(["--log", f"s{number}.csv", "--public", f"0.{number}"])))


def test_eight_entries_at_once_are_eight_rows(here: Path) -> None:
    for number in range(1, 9):
        write_labels(Path(f"s{number}.csv"), ["a", "b"], [1, 1 + number % 5])
        Path(f"s{number}.csv").write_text(f"id,answer\na,1\nb{number},2\n")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=enter_log, args=(number,)) for number in range(1, 9)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [EXIT_DONE] * 8
    rows = read_rows(Path("submissions/log.csv"))
    assert sorted((row["file"], row["public"]) for row in rows) == [(f"s{n}.csv", f"0.{n}") for n in range(1, 9)]


def test_a_log_that_is_not_utf_8_is_told_and_kept(here: Path) -> None:
    Path("submissions").mkdir()
    log = "time,file,sha256,members,oof_accuracy,oof_macro_f1,public,private\n2026,가.csv,x,,,,,\n".encode("cp949")
    Path("submissions/log.csv").write_bytes(log)
    write_labels(Path("s.csv"), ["a"], [1])
    with pytest.raises(InputError, match=r"submissions/log.csv: not UTF-8"):
        ensemble.main(["--log", "s.csv"])
    assert Path("submissions/log.csv").read_bytes() == log


def test_the_largest_weights_are_weights(here: Path) -> None:
    for name, weights in (("huge", ["1e308", "1e308"]), ("tiny", ["1e-308", "1e-308"]), ("one", ["1", "1"])):
        ensemble.main(["a.probs.csv", "b.probs.csv", "--weights", *weights, "--out", name])
    one = read_probs("submissions/one.probs.csv").probs
    for name in ("huge", "tiny"):
        np.testing.assert_array_equal(read_probs(f"submissions/{name}.probs.csv").probs, one)


def test_a_comparison_is_not_replaced_unasked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["a.probs.csv", "b.probs.csv", "--answers", "data/gold.csv"]
    compare.main([*flags, "--out", "c"])
    before = snapshot(here)
    with pytest.raises(InputError, match="comparison.md exist already; choose another --out, or replace with --over"):
        compare.main([*flags, "--half", "2", "--out", "c"])
    assert snapshot(here) == before
    compare.main([*flags, "--half", "2", "--out", "c", "--overwrite"])
    assert {path.name for path in Path("comparisons/c").iterdir()} == {
        "comparison.csv", "comparison.md", "comparison.png"
    }  # fmt: skip
    assert snapshot(here) != before
    with pytest.raises(InputError, match="--overwrite needs --out NAME"):
        compare.main([*flags, "--overwrite"])
    # One run has no pairs: the files of the older ones are removed, but not the answers among them.
    Path("data/gold.csv").replace("comparisons/c/comparison.csv")
    before = snapshot(here)
    alone = ["a.probs.csv", "--out", "c", "--overwrite", "--answers"]
    with pytest.raises(InputError, match="--out: .*comparison.csv is the input .* itself; choose another --out"):
        compare.main([*alone, "comparisons/c/comparison.csv"])
    assert snapshot(here) == before
    Path("gold.csv").write_bytes(before["comparisons/c/comparison.csv"])
    compare.main([*alone, "gold.csv"])
    assert [path.name for path in Path("comparisons/c").iterdir()] == ["comparison.md"]
