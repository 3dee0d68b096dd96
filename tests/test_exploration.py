"""explore.py on real (tiny) bases: every candidate in a process of its own, kept when it is done, a row when it fails."""

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from children_here import run_children_here
from PIL import Image
from tiny import base_folder, make_questions, read_probs, write_questions

import explore
import inference
from ksat import exploration
from ksat.errors import InputError, exit_code
from ksat.exploration import Candidate, parse_candidates
from ksat.files import file_sha256, write_json
from ksat.identity import identify_local
from ksat.questions import read_questions

ROOT = Path(__file__).parent.parent
CPU = ["--device", "cpu", "--engine", "transformers"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("explore")
    write_questions(folder / "valid.csv", make_questions(12, first=40))
    write_questions(folder / "train.csv", make_questions(8))
    (folder / "board.csv").write_text(f"base,public,private\n{base_folder('llama')},0.71,\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


def bases() -> str:
    return f"{base_folder()},{base_folder('llama')}:nf4,nobody/nothing"


def records(name: str) -> dict[str, dict[str, str]]:
    with Path(f"explorations/{name}/exploration.csv").open(encoding="utf-8", newline="") as file:
        return {row["base"]: row for row in csv.DictReader(file)}


def test_candidates_are_named_and_filed() -> None:
    assert parse_candidates("a/b, embedded:nf4 ,c:none") == [
        Candidate("a/b"),
        Candidate("embedded", "nf4"),
        Candidate("c", "none"),
    ]
    assert [c.slug for c in parse_candidates("a/b-1.5,embedded:nf4,/x/y z")] == ["a-b-1.5", "embedded-nf4", "x-y-z"]
    assert Candidate.parse("folder:8bit") == Candidate("folder:8bit")
    with pytest.raises(InputError, match="an empty name"):
        parse_candidates("a,,b")
    assert Candidate("모델/한글").slug == "모델-한글"
    for text in ("a/b,a/b", "a/b,a-b"):
        with pytest.raises(InputError, match="are the same, or would be written to the same files"):
            parse_candidates(text)


def test_scores_are_those_of_inference_and_done_ones_are_kept(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_children_here(monkeypatch)
    command = ["--score", "valid.csv", "--bases", bases(), "--leaderboard", "board.csv", *CPU]
    explore.main(command)
    out = capsys.readouterr().out
    folder = Path("explorations/valid")
    slug = Candidate(str(base_folder())).slug
    inference.main(["--base", str(base_folder()), "--test", "valid.csv", "--out", "out/alone", *CPU])
    assert (folder / f"{slug}.probs.csv").read_bytes() == Path("out/alone.probs.csv").read_bytes()
    found = records("valid")
    assert list(found) == [
        str(base_folder()),
        f"{base_folder('llama')}:nf4",
        "nobody/nothing",
        "uniform guess",
        "most frequent position",
    ]
    gold = {question.id: question.answer for question in make_questions(12, first=40)}
    probs = read_probs(Path("out/alone.probs.csv"))
    right = sum(max(range(len(p)), key=p.__getitem__) + 1 == gold[row_id] for row_id, p in probs.items())
    assert float(found[str(base_folder())]["accuracy_all"]) == pytest.approx(right / 12)
    assert float(found[str(base_folder())]["questions_per_second"]) > 0
    llama = found[f"{base_folder('llama')}:nf4"]
    assert (llama["public"], llama["private"]) == ("0.71", "")
    assert found["nobody/nothing"]["accuracy_all"] == ""
    assert "nobody/nothing: can't be loaded" in found["nobody/nothing"]["reason"]
    assert "nobody/nothing: not scored (--base nobody/nothing: can't be loaded" in out
    title, text = (folder / "exploration.md").read_text().split("\n\n", 1)
    assert title == "# 12 questions of valid.csv, untuned"
    assert text.strip() in out
    with Image.open(folder / "exploration.png") as picture:
        assert picture.size == (1350, 825)

    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.probs.csv")}
    log = (folder / f"{slug}.log").read_text()
    explore.main([*command[:-6], *CPU])  # without the leaderboard, which is none of a candidate's business
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.probs.csv")} == before
    assert (folder / f"{slug}.log").read_text() == log
    assert records("valid")[f"{base_folder('llama')}:nf4"]["public"] == ""

    write_questions(Path("valid.csv"), make_questions(11, first=40))  # another file of that name
    again = ["--score", "valid.csv", "--bases", str(base_folder()), *CPU]
    with pytest.raises(
        InputError, match="was scored there with other questions, .* choose another --out, or --overwrite"
    ):
        explore.main(again)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.probs.csv")} == before
    explore.main([*again, "--overwrite"])
    assert len(read_probs(folder / f"{slug}.probs.csv")) == 11


def test_a_file_of_kinds_divides_the_standings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds' rows are those of the file, whatever the questions' wording; another division scores nothing again."""
    run_children_here(monkeypatch)
    questions = make_questions(9, first=60)
    write_questions(Path("two-kinds.csv"), questions)
    command = ["--score", "two-kinds.csv", "--bases", str(base_folder()), *CPU]
    probs = Path(f"explorations/two-kinds/{Candidate(str(base_folder())).slug}.probs.csv")
    written = []
    for knowledge in (questions[:2], questions[5:]):
        kinds = {question.id: "knowledge" if question in knowledge else "reading" for question in questions}
        Path("kinds.csv").write_text("id,kind\n" + "".join(f"{row},{kind}\n" for row, kind in kinds.items()))
        explore.main([*command, "--kinds", "kinds.csv"])
        written.append(probs.stat().st_mtime_ns)
        found, p = records("two-kinds")[str(base_folder())], read_probs(probs)
        right = {q.id: max(range(len(p[q.id])), key=p[q.id].__getitem__) + 1 == q.answer for q in questions}
        for kind in ("reading", "knowledge"):
            rows = [right[row] for row in kinds if kinds[row] == kind]
            assert float(found[f"accuracy_{kind}"]) == pytest.approx(sum(rows) / len(rows))
    assert written[0] == written[1]


def test_another_base_in_the_same_folder_is_another_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = identify_local(str(tmp_path))
    assert identify_local(str(tmp_path)) == before
    (tmp_path / "config.json").write_text("{ }")
    assert identify_local(str(tmp_path)) != before
    assert identify_local("somebody/base") == {}  # no folder here


def test_killed_in_the_middle_it_goes_on(here: Path) -> None:
    """The child dies with its parent, and what it had scored counts."""
    write_questions(Path("long.csv"), make_questions(200, first=300))
    command = ["--score", "long.csv", "--bases", f"{base_folder('llama')},{base_folder()}", "--pack-tokens", "1", *CPU]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "explore.py"), *command], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    second = Path("explorations/long") / f".{Candidate(str(base_folder())).slug}.probs.csv.partial.0"
    deadline = time.monotonic() + 1200
    while not (second.exists() and len(second.read_text().splitlines()) > 5):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)
    scored = len(second.read_text().splitlines()) - 1
    time.sleep(0.5)
    assert len(second.read_text().splitlines()) - 1 == scored  # nobody goes on scoring
    assert 5 <= scored < 200
    first = Path("explorations/long") / f"{Candidate(str(base_folder('llama'))).slug}.probs.csv"
    before = first.stat().st_mtime_ns
    explore.main(command)
    assert first.stat().st_mtime_ns == before
    log = Path("explorations/long") / f"{Candidate(str(base_folder())).slug}.log"
    assert "prompts are scored already" in log.read_text()
    inference.main(
        ["--base", str(base_folder()), "--test", "long.csv", "--out", "out/long", "--pack-tokens", "1", *CPU]
    )
    found = Path("explorations/long") / f"{Candidate(str(base_folder())).slug}.probs.csv"
    assert found.read_bytes() == Path("out/long.probs.csv").read_bytes()


def test_each_base_is_trained_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_children_here(monkeypatch)
    # Texts of their own: all others follow one pattern, and are near-duplicates of what is trained on.
    texts = [" ".join(f"{chr(0xAC00 + 97 * i + 13 * k)}{k}" for k in range(30)) for i in range(6)]
    apart = [replace(q, passage=text) for q, text in zip(make_questions(6, first=40), texts, strict=True)]
    write_questions(Path("apart.csv"), apart)
    command = ["--score", "apart.csv", "--bases", str(base_folder()), "--finetune", "--train", "train.csv", *CPU]
    explore.main(command)
    slug = Candidate(str(base_folder())).slug
    run = Path(f"checkpoints/explore-apart-tuned@{slug}")
    assert (run / "run.json").exists()
    tuned = read_probs(Path(f"explorations/apart-tuned/{slug}.probs.csv"))
    inference.main(["--ckpt", str(run), "--test", "apart.csv", "--out", "out/tuned", *CPU])
    assert read_probs(Path("out/tuned.probs.csv")) == tuned
    # Scoring was interrupted: the trained run is not trained again.
    Path(f"explorations/apart-tuned/{slug}.done.json").unlink()
    before = (run / "run.json").stat().st_mtime_ns
    explore.main(command)
    assert (run / "run.json").stat().st_mtime_ns == before
    # Other questions are scored by the same run; other training data are another run, and an older one is never taken for it.
    write_questions(Path("apart.csv"), apart[:5])
    with pytest.raises(InputError, match="was scored there with other questions"):
        explore.main(command)
    candidate = Candidate(str(base_folder()))
    other = exploration.Settings(
        Path("apart.csv"), Path("explorations/apart-tuned"), tuple(CPU), None, Path("valid.csv"), "x"
    )
    with pytest.raises(InputError, match="was trained there with other questions"):
        exploration.require_same(candidate, other)
    assert run.exists()
    before = (run / "run.json").read_bytes()
    exploration.require_same(candidate, replace(other, overwrite=True))
    assert read_probs(Path(f"explorations/apart-tuned/{slug}.probs.csv")) == tuned
    assert exploration._finished_key(exploration._Paths(candidate, other)) is not None  # until there are others
    ran: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:  # the older run stays until the new one is complete
        patch.setattr(exploration, "run_script", lambda command, log: ran.append(command) or "stopped here")
        for _ in range(2):
            assert exploration.run_candidate(candidate, other).reason == "stopped here"
        assert (run / "run.json").read_bytes() == before
        exploration.require_same(candidate, other)  # the same command goes on
        patch.setattr(exploration, "run_script", lambda command, log: ran.append(command) or "")
        for _ in range(2):
            assert exploration._train(candidate, other, exploration._Paths(candidate, other)) == ""
    assert [command[3] for command in ran] == ["--overwrite"] * 3  # the fourth time it is trained


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--score", "valid.csv"], "--score needs --bases"),
        (["--score", "valid.csv", "--bases", "a", "--gpu", "t4"], "--gpu is for the fit table"),
        (["--score", "valid.csv", "--bases", "a", "--train", "train.csv"], "--train needs --finetune"),
        (["--score", "valid.csv", "--bases", "a", "--out", "a/b"], "--out 'a/b': expected a plain name"),
        (["--score", "valid.csv", "--bases", "a", "--out", ""], "--out '': expected a name"),
        (["--score", "valid.csv", "--bases", "b" * 201], "--bases 'b.*201 bytes long"),
        (["--score", "none.csv", "--bases", "a"], "none.csv: no such file"),
        (["--score", "test.csv", "--bases", "a"], "0 of 3 questions have an answer"),
        (
            ["--score", "train.csv", "--bases", "a", "--finetune", "--train", "train.csv"],
            "8 of the rows share their passage",
        ),
        (["--score", "valid.csv", "--bases", "a", "--leaderboard", "wrong.csv"], "has public '71'; expected a share"),
        (["--finetune"], "--finetune needs --score"),
        (["--overwrite"], "--overwrite needs --score"),
        (["--gpu", "t4", "--offload-embedding"], "--offload-embedding: the table names it where it helps"),
        (["--gpu", "t4", "--bases", "a", "--explain", "b"], "--explain BASE is about one base"),
        (["--gpu", "t4", "--bases", ","], "an empty name"),
        (["--gpu", "t4", "--gpu-memory", "16GiB"], "T4 16 GB has 14.6 GiB; give less, or leave --gpu out"),
        (["--gpu", "t4", "--engine", "unsloth"], "--engine needs --score CSV"),
        (["--gpu", "t4", "--trust-remote-code"], "--trust-remote-code: of known bases nothing is loaded"),
        (["--gpu", "t4", "--trust-remote-code", "--bases", "Qwen/Qwen3-8B"], "--trust-remote-code: of known bases"),
        (["--gpu", "t4", "--trust-remote-code", "--explain", "Qwen/Qwen3-8B"], "--trust-remote-code: of known bases"),
        (["--gpu", "t4", "--trust-remote-code", "--explain", "no/base"], "--explain no/base"),
        (["--gpu", "t4", "--no-share-prefixes"], "--no-share-prefixes needs --score CSV"),
        (
            ["--score", "valid.csv", "--bases", "a", "--leaderboard", "board.csv"],
            "is none of --bases; correct its name",
        ),
        (["--score", "valid.csv", "--bases", "a", "--answers", "beyond.csv"], "lie beyond their question's choices"),
    ],
)
def test_bad_flags_are_refused_before_any_work(here: Path, flags: list[str], match: str) -> None:
    write_questions(Path("test.csv"), make_questions(3), labelled=False)
    Path("wrong.csv").write_text("base,public,private\na,71,\n")
    rows = [f"{question.id},{5 if question.num_choices == 4 else 1}" for question in read_questions("valid.csv")]
    Path("beyond.csv").write_text("\n".join(["id,answer", *rows]) + "\n")
    with pytest.raises(InputError, match=match):
        explore.main(flags)
    assert not Path("explorations/a").exists()


def test_what_is_there_and_is_no_exploration_stays(here: Path) -> None:
    for name in ("exploration.csv", "exploration.md", "exploration.png"):
        path = Path("explorations") / name.replace(".", "-") / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        flags = ["--score", "valid.csv", "--bases", "nobody/nothing", "--out", path.parent.name, "--overwrite", *CPU]
        with pytest.raises(InputError, match=f"{name} exists and is of no exploration of ours"):
            explore.main(flags)
        assert path.read_text() == "mine"


def test_a_result_is_never_an_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploration, "run_script", lambda *_: "not run")
    board = Path("explorations/board/exploration.csv")
    board.parent.mkdir(parents=True)
    board.write_text("base,public,private\nnobody/nothing,0.5,\n")
    (board.parent / "a.scoring.json").write_text("{}")
    with pytest.raises(InputError, match="--out: .*exploration.csv is the input"):
        explore.main(
            ["--score", "valid.csv", "--bases", "nobody/nothing", "--out", "board", "--leaderboard", str(board), *CPU]
        )
    assert board.read_text().endswith(",0.5,\n")
    kinds = "".join(f"{question.id},reading\n" for question in read_questions("valid.csv"))
    board.write_text(f"id,kind\n{kinds}")
    with pytest.raises(InputError, match="--out: .*exploration.csv is the input"):
        explore.main(
            ["--score", "valid.csv", "--bases", "nobody/nothing", "--out", "board", "--kinds", str(board), *CPU]
        )
    assert board.read_text() == f"id,kind\n{kinds}"


def test_no_file_of_a_candidate_is_an_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exploration, "run_script", lambda *_: "not run")
    folder = Path("explorations/gold")
    folder.mkdir(parents=True)
    gold = "id,answer\n" + "".join(f"{question.id},1\n" for question in read_questions("valid.csv"))
    command = ["--score", "valid.csv", "--bases", "some/body,nobody/nothing", "--out", "gold", "--overwrite", *CPU]
    for ending in ("csv", "probs.csv", "probs.json", "done.json", "scoring.json", "training.json", "log"):
        path = folder / f"nobody-nothing.{ending}"
        path.write_text(gold)
        with pytest.raises(
            InputError, match=f"--out: .*nobody-nothing.{ending} is the input .* itself; choose another"
        ):
            explore.main([*command, "--answers", str(path)])
        assert path.read_text() == gold
        path.unlink()
    (folder / "some-body.log").mkdir()
    with pytest.raises(InputError, match="--out: .*some-body.log is a folder, where a file is to be written"):
        explore.main(command)


def test_overwrite_replaces_what_works_by_what_works(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and results stay until the new ones are complete; a kill in between never gives one's scores for the other's."""
    run_children_here(monkeypatch)
    write_questions(Path("once.csv"), make_questions(9, first=80))
    command = ["--score", "once.csv", "--bases", str(base_folder()), *CPU]
    other = [*command, "--limit", "6", "--overwrite"]
    folder, slug = Path("explorations/once"), Candidate(str(base_folder())).slug
    probs, really = folder / f"{slug}.probs.csv", exploration.run_script

    def look() -> dict[str, bytes]:
        passing = (f"{slug}.scoring.json", f"{slug}.log")
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in passing}

    def killed(*how: object) -> str:
        really(*how)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    explore.main(command)
    before = look()
    assert {"exploration.csv", "exploration.md", "exploration.png", f"{slug}.done.json"} < before.keys()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exploration, "run_script", lambda *_: "NaN in its weights")
        with pytest.raises(InputError, match="exploration.csv: stays as it is, for no base could be scored; mend"):
            explore.main(other)
        assert look() == before
        explore.main(command)  # nothing of it is scored again
        assert look() == before
        patch.setattr(exploration, "run_script", killed)
        with pytest.raises(KeyboardInterrupt):
            explore.main(other)
        assert len(read_probs(probs)) == 6
        assert {name: text for name, text in look().items() if slug not in name} == {
            name: text for name, text in before.items() if slug not in name
        }
        with pytest.raises(InputError, match="was scored there with other questions"):
            explore.main(command)
        patch.undo()
        explore.main(other)
        assert (len(read_probs(probs)), records("once")[str(base_folder())]["questions"]) == (6, "6")
        patch.setattr(exploration, "run_script", killed)
        with pytest.raises(KeyboardInterrupt):
            explore.main([*command, "--overwrite"])
    assert len(read_probs(probs)) == 9
    explore.main(other)
    assert len(read_probs(probs)) == 6

    probs.write_text(probs.read_text() + "\n")
    edited = look()
    with pytest.raises(InputError, match="probs.csv: is not as it was when it was scored; put it back, or --overwrite"):
        explore.main(other[:-1])
    assert look() == edited


def test_the_results_are_replaced_together(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk under the picture leaves the table and the text of before."""
    run_children_here(monkeypatch)
    write_questions(Path("together.csv"), make_questions(9, first=80))
    command = ["--score", "together.csv", "--bases", str(base_folder()), *CPU]
    explore.main(command)
    Path("know.csv").write_text(f"base,public,private\n{base_folder()},0.71,\n")
    results = [Path("explorations/together") / name for name in explore.RESULTS]
    before = [path.read_bytes() for path in results]

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ksat.picture.draw", full)
        with pytest.raises(InputError, match=r"exploration.png: can't be written \(No space left on device\)"):
            explore.main([*command, "--leaderboard", "know.csv"])
    assert [path.read_bytes() for path in results] == before
    assert not list(results[0].parent.glob(".*.tmp"))
    explore.main([*command, "--leaderboard", "know.csv"])
    assert records("together")[str(base_folder())]["public"] == "0.71"


def test_a_file_in_the_place_of_explorations_is_a_line(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("explorations").touch()
    flags = ["--score", str(here / "valid.csv"), "--bases", "nobody/nothing", *CPU]
    assert exit_code(lambda: explore.main(flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: explorations/valid: can't be locked (") and "choose another place" in line


def test_damaged_results_are_named(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = exploration.Settings(Path("valid.csv"), Path("explorations/damaged"), tuple(CPU))
    settings.folder.mkdir(parents=True)
    candidate = Candidate("nobody/nothing")
    paths = exploration._Paths(candidate, settings)
    key = exploration._score_key(candidate, settings, None)
    paths.probs.touch()
    write_json(paths.scoring, key)
    write_json(paths.done, {**key, "probs_sha256": file_sha256(paths.probs)})
    for report in ({"test_sha256": key["questions"]}, {"test_sha256": key["questions"], "peak_memory_gib": "much"}):
        write_json(paths.report, report)
        with pytest.raises(InputError, match=r"probs.json: peak_memory_gib is .* put it back, or choose another --out"):
            exploration.run_candidate(candidate, settings)
    write_json(paths.report, {})
    assert "changed while it was scored" in exploration.run_candidate(candidate, settings).reason


def test_the_fit_table_from_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explore.main(["--gpu", "v100-32gb"])
    out = capsys.readouterr().out
    assert "| -> unsloth/Qwen2.5-32B-Instruct-bnb-4bit " in out
    explore.main(["--gpu", "t4", "--explain", "Qwen/Qwen3-8B", "--rank", "16"])
    assert "parameters of rank 16" in capsys.readouterr().out
    explore.main(["--gpu", "h100", "--gpu-memory", "12GiB", "--bases", f"{base_folder()},Qwen/Qwen3-8B"])
    out = capsys.readouterr().out
    assert "H100 80 GB: 12.0 GiB, compute capability 9.0, bfloat16, 989 TFLOPS by its data sheet" in out
    assert "Qwen/Qwen3-8B is the largest of these bases that trains" in out
    assert f"{base_folder()} " in out
    assert "Qwen3-14B" not in out


def test_a_card_of_a_size_is_planned_for_without_a_gpu(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explore.main(["--gpu-memory", "12GiB"])
    out = capsys.readouterr().out
    assert out.startswith("a card of this size: 12.0 GiB, compute capability 8.0, bfloat16, ? TFLOPS")
    assert "| -> " in out


def test_without_a_gpu_a_network_or_a_whole_config(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line each, exit code 2."""
    cut = Path("cut")
    cut.mkdir()
    (cut / "config.json").write_text((base_folder() / "config.json").read_text()[:100])
    for flags, expected in (
        ([], "no GPU on this machine; name the card to plan for: --gpu 4060|"),
        (["--gpu", "t4", "--bases", "nobody/nothing"], "--bases nobody/nothing: can't be loaded ("),
        (["--gpu", "t4", "--bases", "cut"], "--bases cut: can't be loaded ("),
    ):
        assert exit_code(lambda flags=flags: explore.main(flags)) == 2  # type: ignore[misc]
        captured = capsys.readouterr()
        assert expected in captured.err
        assert len(captured.err.strip().splitlines()) == 1
        assert captured.out == ""


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, explore\ntry: explore.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--gpu" in done.stdout
