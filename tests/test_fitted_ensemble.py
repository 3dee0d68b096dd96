"""ensemble.py --fit, --apply and --log, from the command line to the files."""

import json
from pathlib import Path

import numpy as np
import pytest

import ensemble
from ksat.errors import InputError
from ksat.files import read_json
from ksat.predictions import FloatArray, Predictions, read_probs, write_probs
from ksat.provenance import provenance_from_dict, read_provenance, require_out_of_fold
from ksat.submission_log import read_log

NUM_ROWS = 240
ECHOES = ("echo-a", "echo-b", "echo-c")


def soft(scores: FloatArray) -> FloatArray:
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Out-of-fold files of a model that knows something, its equal, and a poor one under three names; two rows a passage."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    answers = generator.integers(0, 5, NUM_ROWS)
    lines = ["id,paragraph,problems,question_plus"]
    for row, answer in enumerate(answers):
        problems = {"question": "무엇인가?", "choices": list("abcde"), "answer": int(answer) + 1}
        lines.append(f'r{row},passage {row // 2},"{problems}",')
    (tmp_path / "gold.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ids = tuple(f"r{row}" for row in range(NUM_ROWS))
    poor = generator.normal(size=(NUM_ROWS, 5)) + 0.7 * np.eye(5)[answers]
    for name in ("good", "twin", *ECHOES):
        noise = generator.normal(size=(NUM_ROWS, 5))
        scores = poor + 0.1 * noise if name in ECHOES else noise + 1.5 * np.eye(5)[answers]
        write_probs(tmp_path / f"{name}-oof.probs.csv", Predictions(ids, soft(scores)))
        write_probs(tmp_path / f"{name}.probs.csv", Predictions(ids[:20], soft(generator.normal(size=(20, 5)))))
    return tmp_path


def fit(*members: str, out: str = "ab", flags: tuple[str, ...] = ()) -> dict[str, object]:
    files = [f"{name}-oof.probs.csv" for name in members]
    ensemble.main(["--fit", *files, "--answers", "gold.csv", "--out", out, *flags])
    return read_json(Path(f"submissions/{out}.blend.json"))


def test_a_poor_member_under_three_names_counts_once_and_that_is_worth_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = ("good", *ECHOES)
    found = fit(*members)
    out = capsys.readouterr().out
    assert found["recommended"] == "fitted"
    assert "verdict: worth it; --apply takes the fitted weights" in out
    assert "| equal weights " in out
    names = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert names[2:5] == ["uniform guess", "most frequent position", "good-oof.probs.csv"]
    assert out.count("| fitted, ") == 7  # six ways, and the calibration of the best
    assert f"best of 6 on rows not fitted to: {found['gain']['method']}; minus equal weights, less what choosing" in out
    assert f"{found['gain']['changed_answers']} of 240 answers change" in out
    weights = [member["weight"] for member in found["fitted"]["members"]]
    assert weights[0] > 0.4
    assert Path("submissions/ab.blend.png").stat().st_size > 10_000
    files = [f"{name}.probs.csv" for name in members]
    ensemble.main(["--apply", "submissions/ab.blend.json", *files, "--out", "t"])
    tables = [read_probs(folder / file).probs for file in files]
    fitted = found["fitted"]
    expected = np.zeros((20, 5))
    for table, member in zip(tables, fitted["members"], strict=True):
        cooled = table ** (1 / member["temperature"])
        cooled /= cooled.sum(axis=1, keepdims=True)
        expected += member["weight"] * (cooled if fitted["pool"] == "linear" else np.log(cooled))
    expected = (expected if fitted["pool"] == "linear" else np.exp(expected)) ** (1 / fitted["temperature"])
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(read_probs(folder / "submissions/t.probs.csv").probs, expected, atol=1e-9)
    report = read_json(folder / "submissions/t.probs.json")
    assert [member["file"] for member in report["members"]] == files
    assert [member["weight"] for member in report["members"]] == weights


def test_equal_members_get_equal_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = fit("good", "twin")
    assert found["recommended"] == "equal"
    assert "take equal weights; --apply takes equal weights, at the fitted temperatures" in capsys.readouterr().out
    assert [member["weight"] for member in found["equal"]["members"]] == [0.5, 0.5]
    apply = ["--apply", "submissions/ab.blend.json", "good.probs.csv", "twin.probs.csv"]
    ensemble.main([*apply, "--out", "recommended"])
    ensemble.main([*apply, "--out", "as-fitted", "--fitted"])
    said = capsys.readouterr().out
    assert "equal weights, for good-oof.probs.csv, twin-oof.probs.csv in this order" in said
    assert "fitted weights, for " in said
    one, other = (read_probs(folder / f"submissions/{name}.probs.csv").probs for name in ("recommended", "as-fitted"))
    assert np.abs(one - other).max() > 0


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (("--method", "geometric"), "--method is for a blend by hand; --fit takes none"),
        (("--margin", "0.1"), "--margin is for a blend; --fit takes none"),
    ],
)
def test_what_fit_refuses(folder: Path, flags: tuple[str, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        fit("good", "twin", flags=flags)
    assert not (folder / "submissions").exists()


def test_members_that_were_trained_on_their_rows_are_refused_and_unknown_ones_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = {name: folder / f"{name}-oof.probs.json" for name in ("good", "twin")}
    trained = [{"file": "gold.csv", "sha256": "1" * 64}]
    reports["twin"].write_text('{"base": "b", "adapter_sha256": null, "data": []}')  # untuned
    for about, is_named in (
        ({"out_of_fold": True, "data": trained}, False),
        ({"base": "b", "adapter_sha256": "2" * 64, "data": trained, "test_sha256": "3" * 64}, False),
        ({"base": "b", "adapter_sha256": "2" * 64}, True),
        ({"members": []}, True),
        (None, True),
    ):
        reports["good"].write_text(json.dumps(about)) if about else reports["good"].unlink()
        require_out_of_fold([Path("good-oof.probs.csv"), Path("twin-oof.probs.csv")])
        told = capsys.readouterr().err
        assert told.startswith("warning: good-oof.probs.csv has no report that says") == is_named
        assert len(told.splitlines()) == is_named
    about = {"base": "b", "adapter_sha256": "2" * 64, "data": trained, "test": "gold.csv", "test_sha256": "1" * 64}
    reports["good"].write_text(json.dumps(about))
    with pytest.raises(
        InputError, match="good-oof.probs.csv was scored by a run that was trained on gold.csv, so that it looks"
    ):
        fit("good", "twin")
    (folder / "linked-oof.probs.csv").symlink_to("twin-oof.probs.csv")
    with pytest.raises(InputError, match="linked-oof.probs.csv is twin-oof.probs.csv again: a member counts once"):
        fit("twin", "linked")


def test_labels_alone_are_folded_by_rows_and_that_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"r{i},1" for i in range(NUM_ROWS)]
    (folder / "labels.csv").write_text("\n".join(["id,answer", *rows]) + "\n")
    for answers, test, is_said in (
        ("gold.csv", None, False),
        ("labels.csv", None, True),
        ("labels.csv", "gold.csv", False),
    ):
        ids = tuple(f"r{i}" for i in range(NUM_ROWS))
        groups = ensemble._groups(ids, Path(answers), Path(test) if test else None)
        assert len(set(groups)) == (NUM_ROWS if is_said else NUM_ROWS // 2)
        assert (
            "holds labels alone: folds and intervals take each row for itself" in capsys.readouterr().err
        ) == is_said


def test_what_apply_refuses(folder: Path) -> None:
    fit("good", "twin", out="ab")
    path = folder / "submissions/ab.blend.json"
    with pytest.raises(
        InputError, match=r"fitted to 2 members \(good-oof.probs.csv, twin-oof.probs.csv\), 1 are given"
    ):
        ensemble.main(["--apply", str(path), "good.probs.csv", "--out", "t"])
    with pytest.raises(InputError, match="exist already; choose another --out, or replace with --overwrite"):
        fit("good", "twin")
    value = json.loads(path.read_text())
    for changed in (
        value | {"recommended": "best"},
        {"fitted": {}},
        value | {"equal": 1, "recommended": "equal"},
        value | {"members": [1, 2]},
        value | {"members": [member | {"runs": "ab"} for member in value["members"]]},
        value | {"members": []},
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match="fit the blend again"):
            ensemble.main(["--apply", str(path), "good.probs.csv", "twin.probs.csv", "--out", "t"])
    assert not (folder / "submissions/t.csv").exists()


OF_FOLDS = {"out_of_fold": True, "run": "r", "base": "b", "members": [{"run": "r-fold0", "adapter_sha256": "1"}]}


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ({}, OF_FOLDS, None),  # no report
        ({"base": "b", "adapter_sha256": None}, {"base": "b", "adapter_sha256": None}, True),
        ({"base": "c", "adapter_sha256": None}, {"base": "b", "adapter_sha256": None}, False),
        ({"base": "b", "adapter_sha256": None}, OF_FOLDS, False),  # untuned
        ({"base": "c", "adapter_sha256": "1", "run": "r"}, OF_FOLDS, False),
        ({"base": "b", "adapter_sha256": "1", "run": "moved"}, OF_FOLDS, True),  # a fold
        ({"base": "b", "adapter_sha256": "2", "run": "r"}, OF_FOLDS, True),  # trained on all rows under the same name
        ({"base": "b", "adapter_sha256": "2", "run": "mean", "soup_of": ["1"]}, OF_FOLDS, True),
        ({"base": "b", "adapter_sha256": "2", "run": "s"}, OF_FOLDS, None),
        ({"base": ["b"], "run": 1, "members": 2}, OF_FOLDS, None),
    ],
)
def test_whether_two_files_are_of_one_model(folder: Path, one: object, other: object, agree: bool | None) -> None:
    found = []
    for name, about in (("one", one), ("other", other)):
        (folder / f"{name}.probs.json").write_text(json.dumps(about))
        found.append(read_provenance(folder / f"{name}.probs.csv"))
        assert provenance_from_dict(found[-1].to_dict(), "x.json") == found[-1]
    assert found[0].agrees_with(found[1]) is found[1].agrees_with(found[0]) is agree


def test_apply_takes_each_member_in_its_place_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tell(name: str, **about: object) -> None:
        (folder / f"{name}.probs.json").write_text(json.dumps(about))

    tell("good-oof", **OF_FOLDS)
    tell("twin-oof", **OF_FOLDS | {"run": "s", "members": [{"run": "s-fold0", "adapter_sha256": "2"}]})
    tell("echo-a-oof", base="c", adapter_sha256=None)
    fit("good", "twin", "echo-a")
    capsys.readouterr()
    apply = ["--apply", "submissions/ab.blend.json", "--out", "t"]
    files = ["good.probs.csv", "twin.probs.csv", "echo-a.probs.csv"]
    ensemble.main([*apply, *files])
    assert "note: good.probs.csv, twin.probs.csv, echo-a.probs.csv: no report tells what" in capsys.readouterr().err
    tell("good", base="b", adapter_sha256="1", run="r-fold0")
    tell("twin", base="b", adapter_sha256="3", run="s")
    tell("echo-a", base="c", adapter_sha256=None)
    ensemble.main([*apply, *files, "--overwrite"])
    assert not capsys.readouterr().err
    before = (folder / "submissions/t.probs.csv").read_bytes()
    same_base = r"twin.probs.csv \(b, s\) stands in the place of good-oof.probs.csv \(b, r\); it goes with twin-oof.probs.csv: give"
    other_base = (
        r"echo-a.probs.csv \(c, untuned\) stands in the place of good-oof.probs.csv \(b, r\); it goes with echo-a-oof"
    )
    for order, match in (([1, 0, 2], same_base), ([2, 1, 0], other_base)):
        with pytest.raises(InputError, match=match):
            ensemble.main([*apply, *(files[i] for i in order), "--overwrite"])
    tell("good", base="d", adapter_sha256="1", run="r")
    with pytest.raises(
        InputError, match=r"good.probs.csv \(d, r\) stands in the place of good-oof.probs.csv \(b, r\): give the"
    ):
        ensemble.main([*apply, *files, "--overwrite"])
    tell("good", base="b", adapter_sha256="9", run="of-all-rows")  # known to nobody: the same base may stand there
    ensemble.main([*apply, *files, "--overwrite"])
    assert (folder / "submissions/t.probs.csv").read_bytes() == before


def test_the_surest_member_decides_in_close_calls(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = ["good.probs.csv", "twin.probs.csv"]
    ensemble.main([*members, "--out", "plain"])
    ensemble.main([*members, "--out", "sure", "--margin", "1"])
    said = capsys.readouterr().out
    assert "--margin 1: the surest member decides in close calls; " in said
    assert "note: nothing tells how sure each member is right to be" in said
    tables = [read_probs(folder / member).probs for member in members]
    ordered = [np.sort(table, axis=1) for table in tables]
    surest = np.argmax([table[:, -1] - table[:, -2] for table in ordered], axis=0)
    expected = np.where(surest[:, None] == 0, tables[0], tables[1])
    np.testing.assert_allclose(read_probs(folder / "submissions/sure.probs.csv").probs, expected, atol=1e-12)


def test_a_submission_is_logged_with_its_out_of_fold_score(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensemble.main(["good.probs.csv", "twin.probs.csv", "--out", "b", "--weights", "3", "1"])
    log = ["--log", "submissions/b.csv"]
    ensemble.main([*log, "--oof", "good-oof.probs.csv", "--answers", "gold.csv"])
    ensemble.main([*log, "--public", "0.75"])
    assert "completed submissions/b.csv in submissions/log.csv" in capsys.readouterr().out
    (row,) = read_log(Path("submissions/log.csv"))
    assert row.members == "0.750 good.probs.csv + 0.250 twin.probs.csv"
    gold = [
        int(line.split("'answer': ")[1].split("}")[0]) for line in (folder / "gold.csv").read_text().splitlines()[1:]
    ]
    answers = read_probs(folder / "good-oof.probs.csv").answers
    assert row.oof_accuracy == pytest.approx(np.mean(answers == gold), abs=1e-6)
    assert row.public == 0.75
    with pytest.raises(InputError, match="do not spend a submission on them"):
        ensemble.main(log)
