"""ensemble.py, from the command line to the files."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import write_labels

import ensemble
from ksat import predictions
from ksat.errors import InputError
from ksat.predictions import Predictions, read_labels, read_probs, write_probs

ROOT = Path(__file__).resolve().parent.parent
NAN = float("nan")
IDS = ("q3", "q1", "q4", "q2")  # the test's order; q1 and q3 share a passage
COUNTS = {"q1": 4, "q2": 5, "q3": 4, "q4": 2}
GOLD = {"q1": 4, "q2": 5, "q3": 1, "q4": 2}


def probs_row(row_id: str, answer: int, prob: float) -> list[float]:
    count = COUNTS[row_id]
    row = [(1 - prob) / (count - 1)] * count + [NAN] * (5 - count)
    row[answer - 1] = prob
    return row


def write_member(path: Path, ids: tuple[str, ...], answers: dict[str, int], prob: float) -> None:
    rows = [probs_row(row_id, answers[row_id], prob) for row_id in ids]
    write_probs(path, Predictions(ids, np.array(rows)))


def write_questions(path: Path, labelled: bool) -> None:
    lines = ["id,paragraph,problems,question_plus"]
    for row_id in IDS:
        answer = GOLD[row_id] if labelled else "''"
        choices = [f"c{number}" for number in range(COUNTS[row_id])]
        passage = "shared" if row_id in ("q1", "q3") else row_id
        lines.append(f"{row_id},{passage},\"{{'question': 'q', 'choices': {choices}, 'answer': {answer}}}\",")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two members (rows in different orders), a label-only one, a test and gold answers."""
    monkeypatch.chdir(tmp_path)
    write_questions(tmp_path / "test.csv", labelled=False)
    write_questions(tmp_path / "gold.csv", labelled=True)
    write_member(tmp_path / "a.probs.csv", ("q1", "q2", "q3", "q4"), GOLD, 0.6)
    write_member(tmp_path / "b.probs.csv", ("q4", "q3", "q2", "q1"), {**GOLD, "q1": 1, "q2": 1}, 0.9)
    write_labels(tmp_path / "labels.csv", list(GOLD), list(GOLD.values()))
    return tmp_path


def test_two_files_become_one_submission(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensemble.main(["a.probs.csv", "b.probs.csv", "--out", "blend", "--test", "test.csv"])
    blended = read_probs(folder / "submissions" / "blend.probs.csv")
    assert blended.ids == IDS
    assert blended.answers.tolist() == [1, 1, 2, 1]
    np.testing.assert_allclose(blended.probs[1], [(0.4 / 3 + 0.9) / 2, 0.25 / 3, 0.25 / 3, (0.6 + 0.1 / 3) / 2, NAN])
    assert list(read_labels(folder / "submissions" / "blend.csv").items()) == list(
        zip(IDS, blended.answers.tolist(), strict=True)
    )
    written = sorted(path.name for path in (folder / "submissions").iterdir())
    assert written == ["blend.csv", "blend.probs.csv", "blend.probs.json"]
    output = capsys.readouterr().out
    assert "a.probs.csv: weight 0.500, agrees with the blend in 50.0% of the rows" in output
    assert "b.probs.csv: weight 0.500, agrees with the blend in 100.0% of the rows" in output
    assert "wrote submissions/blend.probs.csv and submissions/blend.csv" in output


def test_mistake_10_ensemble_never_joins_by_row(folder: Path) -> None:
    """Each member's rows stand in another order; joined by row, the sure wrong rows would meet other questions."""
    ensemble.main(["a.probs.csv", "b.probs.csv", "--out", "x/one"])
    one = read_probs(folder / "x" / "one.probs.csv")
    assert one.ids == ("q1", "q2", "q3", "q4")  # without --test, the first member's order
    for seed in range(5):
        order = tuple(np.random.default_rng(seed).permutation(np.array(IDS)).tolist())
        write_member(folder / "b.probs.csv", order, {**GOLD, "q1": 1, "q2": 1}, 0.9)
        ensemble.main(["b.probs.csv", "a.probs.csv", "--out", "x/two", "--overwrite"])
        two = read_probs(folder / "x" / "two.probs.csv")
        assert two.ids == order
        np.testing.assert_array_equal(two.probs[[order.index(row_id) for row_id in one.ids]], one.probs)


def test_mistake_11_the_ensemble_reads_what_is_written(folder: Path) -> None:
    """A blend is itself a member: the probability columns are always there."""
    ensemble.main(["a.probs.csv", "b.probs.csv", "--out", "one"])
    ensemble.main(["submissions/one.probs.csv", "a.probs.csv", "--out", "two"])
    assert read_probs(folder / "submissions" / "two.probs.csv").ids == ("q1", "q2", "q3", "q4")


@pytest.mark.parametrize("method", ["soft", "geometric", "hard"])
def test_weights_and_methods(folder: Path, method: str) -> None:
    ensemble.main(["a.probs.csv", "b.probs.csv", "--out", "w", "--method", method, "--weights", "99", "1"])
    assert read_probs(folder / "submissions" / "w.probs.csv").answers.tolist() == list(GOLD.values())


def test_one_member_is_fine(folder: Path) -> None:
    ensemble.main(["a.probs.csv", "--out", "one.csv"])
    assert read_labels(folder / "submissions" / "one.csv") == GOLD


def test_label_only_members_take_part(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensemble.main(["labels.csv", "b.probs.csv", "--out", "l", "--weights", "2", "1", "--test", "test.csv"])
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("labels.csv: weight 0.667")
    assert told[0].endswith("; answers alone, each taken for a probability of 0.9")
    assert told[1].endswith("of the rows")
    blended = read_probs(folder / "submissions" / "l.probs.csv")
    assert blended.ids == IDS
    assert blended.answers.tolist() == [GOLD[row_id] for row_id in IDS]


def test_metrics_with_passages_from_the_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensemble.main(
        ["a.probs.csv", "b.probs.csv", "labels.csv", "--out", "m", "--test", "test.csv", "--answers", "gold.csv"]
    )
    output = capsys.readouterr().out
    lines = {line.split("|")[1].strip(): line for line in output.splitlines() if line.startswith("|")}
    assert list(lines)[2:] == ["uniform guess", "a.probs.csv", "b.probs.csv", "labels.csv", "blend"]
    assert " 0.300 |" in lines["uniform guess"]  # (1/4 + 1/5 + 1/4 + 1/2) / 4
    assert "1.000 [" in lines["a.probs.csv"] and "0.500 [" in lines["b.probs.csv"]
    assert lines["labels.csv"].rstrip().endswith("- |")  # labels have no log loss of their own
    assert "95 % intervals resample 3 passages." in output


def test_metrics_name_the_most_frequent_position(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted out of fold on the answers at hand: nine of ten are 1, and the best member is no better than that."""
    ids = [f"r{row}" for row in range(40)]
    write_labels(folder / "skewed.csv", ids, [1 + (row % 10 == 0) for row in range(40)])
    write_probs(folder / "ones.csv", Predictions(tuple(ids), np.tile([0.6, 0.1, 0.1, 0.1, 0.1], (40, 1))))
    ensemble.main(["ones.csv", "--out", "m", "--answers", "skewed.csv"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "uniform guess",
        "most frequent position",
        "ones.csv",
        "blend",
    ]
    assert all("0.900 [" in line for line in lines[3:])


def test_metrics_with_passages_from_the_test_or_single_rows(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensemble.main(["a.probs.csv", "--out", "m", "--test", "test.csv", "--answers", "labels.csv"])
    assert "95 % intervals resample 3 passages." in capsys.readouterr().out
    ensemble.main(["a.probs.csv", "--out", "m", "--answers", "labels.csv", "--overwrite"])
    assert "95 % intervals resample single rows (no passages in --answers; give --test for them)." in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ("", "give probability files and --out NAME, or --fit, --check or --log"),
        ("a.probs.csv", "give probability files and --out NAME, or --fit, --check or --log"),
        ("--out x", "give probability files and --out NAME, or --fit, --check or --log"),
        ("a.probs.csv --check labels.csv", "--check is about one submission; blend with another call"),
        ("a.probs.csv none.csv --out x", "none.csv: no such file"),
        ("a.probs.csv --out x --margin 2", "margin 2.0: a difference of two probabilities lies in 0 to 1"),
        ("--fit a.probs.csv --out x", "--fit takes the out-of-fold files itself, and needs --answers and --out NAME"),
        (
            "--fit a.probs.csv b.probs.csv --out x --answers gold.csv --method hard",
            "--method is for a blend by hand; --fit does not read it",
        ),
        ("--fit a.probs.csv b.probs.csv --out x --answers gold.csv --weights 1 1", "--weights is for a blend by hand"),
        ("--fit a.probs.csv b.probs.csv --out x --answers gold.csv", "3 passages for 5 folds"),
        ("--apply none.json a.probs.csv --out x", "none.json: no such file"),
        ("a.probs.csv --out x --fitted", "--fitted is for --apply; a blend by hand does not read it: leave it out"),
        ("a.probs.csv --out x --public 0.5", "--public is for --log; a blend by hand does not read it"),
        ("--check labels.csv --margin 0.1", "--margin is for a blend by hand and --apply; --check does not read it"),
        ("--check labels.csv --answers nowhere.csv", "--answers is for .* and --log; --check does not read it"),
        ("--check labels.csv --method hard", "--method is for a blend by hand; --check does not read it"),
        (
            "--check labels.csv --overwrite",
            "--overwrite is for a blend by hand and --apply and --fit; --check does not",
        ),
        ("--log labels.csv --margin 0.1", "--margin is for a blend by hand and --apply; --log does not read it"),
        ("--log labels.csv --method soft", "--method is for a blend by hand; --log does not read it"),
        ("--log labels.csv --overwrite", "--overwrite is for .*; --log does not read it"),
        ("--log labels.csv --test nix.csv", "--test is for .*; --log does not read it"),
        ("--log labels.csv --answers nowhere.csv", "--log reads --answers for nothing else"),
        (
            "--apply x.json a.probs.csv --out x --method hard",
            "--method is for a blend by hand; --apply does not read it",
        ),
        ("--log labels.csv --public 77.65", "--public 77.65: expected a share from 0 to 1, such as 0.7765"),
        ("--log labels.csv --oof a.probs.csv", "--oof needs --answers"),
        ("--log a.probs.csv", "a.probs.csv: a probability file where only `id,answer` is expected"),
        ("--log labels.csv --check labels.csv", "--check and --log are two jobs"),
        ("a.probs.csv b.probs.csv --out x --weights 1", "--weights: 1 given for 2 members"),
        ("a.probs.csv b.probs.csv --out x --weights 1 0", "--weights 0.0: must be positive"),
        ("a.probs.csv labels.csv --out x", "labels.csv: labels only, which do not tell the number of choices"),
        ("a.probs.csv --out x --answers b.probs.csv", "b.probs.csv: a probability file; its 'answer' is a prediction"),
        ("a.probs.csv --out x --answers test.csv", "test.csv: 4 of the rows have no answer"),
        ("a.probs.csv --out ./a --overwrite", "--out: a.probs.csv is the input a.probs.csv itself"),
        ("a.probs.csv --out ./gold --overwrite --answers gold.csv", "--out: gold.csv is the input gold.csv itself"),
        (
            "--check labels.csv",
            "data/test.csv: no such file, and no data/sample_test.csv either; name the file with --test",
        ),
        ("--check labels.csv --test test.csv", "labels.csv: 4 of the rows are not in the test's order"),
    ],
)
def test_bad_usage_writes_nothing(folder: Path, command: str, match: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=match):
        ensemble.main(command.split())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_members_of_other_questions_are_refused(folder: Path) -> None:
    write_member(folder / "few.probs.csv", ("q1", "q2", "q3"), GOLD, 0.6)
    with pytest.raises(InputError, match=r"few.probs.csv: 1 of the rows of a.probs.csv are missing \(id 'q4'\)"):
        ensemble.main(["a.probs.csv", "few.probs.csv", "--out", "x"])
    with pytest.raises(InputError, match=r"a.probs.csv: 1 of the rows are not in few.probs.csv \(id 'q4'\)"):
        ensemble.main(["few.probs.csv", "a.probs.csv", "--out", "x"])
    with pytest.raises(InputError, match=r"few.probs.csv: 1 of the rows of test.csv are missing \(id 'q4'\)"):
        ensemble.main(["few.probs.csv", "--out", "x", "--test", "test.csv"])
    two = np.array([[0.5, 0.5, NAN, NAN, NAN]] * 4)
    write_probs(folder / "two.probs.csv", Predictions(("q1", "q2", "q3", "q4"), two))
    with pytest.raises(
        InputError, match=r"two.probs.csv: 3 of the rows have another number .* \(first id 'q1': 2 against 4"
    ):
        ensemble.main(["a.probs.csv", "two.probs.csv", "--out", "x"])
    assert not (folder / "submissions").exists()


def test_existing_output_is_refused_before_any_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "submissions").mkdir()
    (folder / "submissions" / "x.csv").write_text("old")

    def read_nothing(path: Path) -> None:
        raise AssertionError(f"{path} was read")

    with monkeypatch.context() as patch:
        patch.setattr(predictions, "read_table", read_nothing)
        with pytest.raises(InputError, match="submissions/x.csv exists already; choose another --out, or replace with"):
            ensemble.main(["a.probs.csv", "none.csv", "--out", "x"])
    with pytest.raises(InputError, match="x.csv exists already, and without x.probs.json it is no output of ours"):
        ensemble.main(["a.probs.csv", "--out", "x", "--overwrite"])
    assert (folder / "submissions" / "x.csv").read_text() == "old"
    for _ in range(2):
        ensemble.main(["a.probs.csv", "--out", "y", "--overwrite"])
    assert read_labels(folder / "submissions" / "y.csv") == GOLD


def test_check_prints_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensemble.main(["a.probs.csv", "--out", "x", "--test", "test.csv"])
    capsys.readouterr()
    ensemble.main(["--check", "submissions/x.csv", "--test", "test.csv"])
    assert capsys.readouterr().out == (
        "OK submissions/x.csv: 4 rows, ids and order as in test.csv, answers in range (1: 1, 2: 1, 3: 0, 4: 1, 5: 1)\n"
    )
    (folder / "data").mkdir()
    (folder / "test.csv").rename(folder / "data" / "test.csv")
    ensemble.main(["--check", "submissions/x.csv"])
    assert capsys.readouterr().out.startswith("--test: data/test.csv (default)\nOK submissions/x.csv: 4 rows")


def test_the_process_exits_2_with_one_line(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "ensemble.py"), "a.probs.csv", "none.csv", "--out", "x"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: none.csv: no such file; check the path\n"


def test_help_shows_the_usage_and_needs_no_heavy_import() -> None:
    code = "import sys, ensemble; ensemble.build_parser().format_help(); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not {"numpy", "pandas", "sklearn", "torch"} & set(result.stdout.split())
    help_text = subprocess.run(
        [sys.executable, "ensemble.py", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout
    assert "python ensemble.py --check submissions/blend.csv --test data/test.csv" in help_text


def test_a_blend_with_metrics_imports_no_torch(folder: Path) -> None:
    arguments = ["a.probs.csv", "b.probs.csv", "--out", "x", "--test", "test.csv", "--answers", "gold.csv"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import ensemble; ensemble.main({arguments})"
    code += "; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    modules = set(result.stdout.splitlines()[-1].split())
    assert "pandas" in modules
    assert not {"torch", "transformers"} & modules
