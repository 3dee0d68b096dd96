"""ensemble.py --fit, --apply and --log, from the command line to the files."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ensemble
from ksat.errors import InputError
from ksat.files import file_sha256, read_json
from ksat.predictions import FloatArray, Predictions, read_probs, write_probs
from ksat.provenance import provenance_from_dict, read_provenance, require_held_out, require_order
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
        (("--method", "geometric"), "--method is for a blend by hand; --fit does not read it: leave it out"),
        (("--margin", "0.1"), "--margin is for a blend by hand and --apply; --fit does not read it"),
    ],
)
def test_what_fit_refuses(folder: Path, flags: tuple[str, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        fit("good", "twin", flags=flags)
    assert not (folder / "submissions").exists()


def write_rows(path: Path, numbers: Iterable[int], question: str = "번은?") -> str:
    """A labelled file with questions by number, two a passage; returns its hash."""
    lines = ["id,paragraph,problems,question_plus"]
    for row in numbers:
        problems = {"question": f"{row}{question}", "choices": list("abcde"), "answer": row % 5 + 1}
        lines.append(f'{path.stem}{row},passage {"abcdefghij"[row // 20]} {row // 2 * 7919},"{problems}",')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file_sha256(path)


def tell(file: str, **about: object) -> None:
    Path(file).with_suffix(".json").write_text(json.dumps(about))


TUNED = {"base": "b", "run": "r", "adapter_sha256": "2" * 64}


def test_members_that_were_trained_on_their_rows_are_refused_and_unknown_ones_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, twin = "good-oof.probs.csv", "twin-oof.probs.csv"
    data = [{"file": "gold.csv", "sha256": "1" * 64}]
    tell(twin, base="b", adapter_sha256=None, data=[])  # untuned
    no_report = "good-oof.probs.csv has no report that says whether its rows were held out; a file of rows that"
    for about, warning in (
        ({"out_of_fold": True, "data": data}, ""),
        (TUNED, no_report),
        ({"members": []}, no_report),
        ({}, no_report),
        (TUNED | {"data": data, "test": "gone.csv", "test_sha256": "3"}, "good-oof.probs.csv: gone.csv is gone or was"),
        (
            TUNED | {"data": data, "test": "gold.csv", "test_sha256": file_sha256(folder / "gold.csv")},
            "good-oof.probs.csv: gold.csv is gone or was changed, so that nothing tells whether the rows were held out",
        ),
    ):
        tell(good, **about)
        require_held_out([Path(good), Path(twin)])
        told = capsys.readouterr().err
        assert told.startswith(f"warning: {warning}") if warning else not told
        assert len(told.splitlines()) == bool(warning)
    tell(good, **TUNED, data=data, test="gold.csv", test_sha256="1" * 64)
    with pytest.raises(
        InputError, match="good-oof.probs.csv was scored by a run that was trained on gold.csv, so that it looks"
    ):
        fit("good", "twin")


def test_a_file_with_rows_that_were_trained_on_is_in_sample_whatever_its_bytes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hashes = {
        f"{name}.csv": write_rows(folder / f"{name}.csv", rows)
        for name, rows in (
            ("train", range(100)),
            ("more", range(120)),  # a superset
            ("reversed", reversed(range(100))),
            ("other", range(120, 160)),
            ("few", range(96, 160)),
            ("half", range(60, 140)),
        )
    }
    file = "good.probs.csv"

    def check(trained: str, scored: str, **about: object) -> str:
        data = [{"file": trained, "sha256": hashes[trained]}]
        tell(file, **TUNED, data=data, test=scored, test_sha256=hashes[scored], **about)
        require_held_out([Path(file)])
        return capsys.readouterr().err

    for trained, scored in (("train.csv", "reversed.csv"), ("more.csv", "train.csv")):
        with pytest.raises(InputError, match=r"trained on most of its rows: 100 of 100 questions stand in"):
            check(trained, scored)
    assert not check("train.csv", "other.csv")
    assert not check("train.csv", "other.csv", soup_of=["1", "2"])
    assert "warning: good.probs.csv: 4 of its 64 rows (first: id 'few96') have their passage" in check(
        "train.csv", "few.csv"
    )
    assert "that its run was trained on, 40 with the same question; " in check("train.csv", "half.csv")
    hashes["asked.csv"] = write_rows(folder / "asked.csv", range(40), question="다른 물음")  # on the same passages
    told = check("train.csv", "asked.csv")
    assert "40 of its 40 rows" in told and "0 with the same question" in told
    # Rows that training left out by --leave-out or --valid.
    assert not check("train.csv", "half.csv", training={"leave_out_sha256": hashes["half.csv"], "valid_sha256": []})
    assert not check("train.csv", "half.csv", training={"leave_out_sha256": None, "valid_sha256": [hashes["half.csv"]]})


def test_rows_that_a_run_held_out_to_validate_on_are_held_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = write_rows(folder / "train.csv", range(100))
    (folder / "held.csv").write_text(
        "".join((folder / "train.csv").read_text().splitlines(True)[i] for i in (0, *range(91, 101)))
    )
    run = folder / "checkpoints/r"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"adapter_sha256": "2" * 64}))
    held_out = Predictions(tuple(f"train{i}" for i in range(90, 100)), np.full((10, 5), 0.2))
    write_probs(run / "validation.probs.csv", held_out)
    data, scored = [{"file": "train.csv", "sha256": trained}], file_sha256(folder / "held.csv")
    tell("good.probs.csv", **TUNED, data=data, test="held.csv", test_sha256=scored)
    require_held_out([Path("good.probs.csv"), run / "validation.probs.csv"])
    assert not capsys.readouterr().err
    (run / "run.json").write_text(json.dumps({"adapter_sha256": "3" * 64}))  # another run of that name
    with pytest.raises(InputError, match="10 of 10 questions"):
        require_held_out([Path("good.probs.csv")])


def test_of_a_blend_its_members_are_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("good", "twin"):
        tell(f"{name}-oof.probs.csv", base="b", out_of_fold=True, run=name)
    ensemble.main(["good-oof.probs.csv", "twin-oof.probs.csv", "--out", "ab-oof"])
    blend = Path("submissions/ab-oof.probs.csv")
    require_held_out([blend])
    assert not capsys.readouterr().err
    tell("twin-oof.probs.csv", **TUNED, data=[{"file": "x.csv", "sha256": "1"}], test="x.csv", test_sha256="1")
    with pytest.raises(InputError, match=r"twin-oof.probs.csv was scored by a run that was trained on x.csv"):
        require_held_out([blend])
    tell("submissions/ab-oof.probs.csv", members=[{"file": str(blend), "sha256": file_sha256(blend)}])  # edited: no end
    require_held_out([blend])
    assert "warning: submissions/ab-oof.probs.csv has no report that says" in capsys.readouterr().err
    tell("submissions/ab-oof.probs.csv", members=[{"file": "good.probs.csv", "sha256": "of another"}])
    require_held_out([blend])
    assert "warning: submissions/ab-oof.probs.csv has no report that says" in capsys.readouterr().err


def test_a_member_counts_once(folder: Path) -> None:
    (folder / "linked-oof.probs.csv").symlink_to("twin-oof.probs.csv")
    (folder / "copied-oof.probs.csv").write_bytes((folder / "twin-oof.probs.csv").read_bytes())
    for name in ("linked", "copied"):
        match = f"{name}-oof.probs.csv is twin-oof.probs.csv again: a member counts once; leave one out"
        with pytest.raises(InputError, match=match):
            fit("good", "twin", name)
        with pytest.raises(InputError, match=match):
            ensemble.main(["twin-oof.probs.csv", f"{name}-oof.probs.csv", "--out", "t"])
    fit("good", "twin")
    with pytest.raises(InputError, match=r"good.probs.csv is good.probs.csv again"):
        ensemble.main(["--apply", "submissions/ab.blend.json", "good.probs.csv", "good.probs.csv", "--out", "t"])
    assert not (folder / "submissions/t.csv").exists()


def test_a_member_of_bare_answers_is_fitted_where_the_test_tells_its_choices(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was told to give --test, although that was given."""
    twin = read_probs("twin-oof.probs.csv")
    rows = [f"{row_id},{answer}" for row_id, answer in zip(twin.ids, twin.answers, strict=True)]
    Path("bare-oof.probs.csv").write_text("\n".join(["id,answer", *rows]) + "\n")
    with pytest.raises(InputError, match="labels only, which do not tell the number of choices; give --test CSV"):
        fit("good", "bare")
    fit("good", "bare", flags=("--test", "gold.csv"))
    assert "bare-oof.probs.csv: answers alone, each taken for a probability of 0.9" in capsys.readouterr().out


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
        value | {"members": [member | {"traits": []} for member in value["members"]]},
        value | {"members": []},
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(InputError, match="fit the blend again"):
            ensemble.main(["--apply", str(path), "good.probs.csv", "twin.probs.csv", "--out", "t"])
    assert not (folder / "submissions/t.csv").exists()


OF_FOLDS = {"out_of_fold": True, "run": "r", "base": "b", "members": [{"run": "r-fold0", "adapter_sha256": "1"}]}

UNTUNED = {"base": "b", "adapter_sha256": None, "template": {"user": "p"}, "shots": 0, "choice_orders": "cyclic:1"}


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        ({}, OF_FOLDS, None),  # no report
        ({"base": "b", "adapter_sha256": None}, {"base": "b", "adapter_sha256": None}, None),
        (UNTUNED, UNTUNED, True),
        (UNTUNED, UNTUNED | {"choice_orders": "cyclic:5"}, None),
        (UNTUNED, UNTUNED | {"shots": 5}, False),
        (UNTUNED, UNTUNED | {"template": {"user": "q"}}, False),
        ({"base": "c", "adapter_sha256": None}, {"base": "b", "adapter_sha256": None}, False),
        ({"base": "b", "adapter_sha256": None}, OF_FOLDS, False),  # untuned
        ({"base": "c", "adapter_sha256": "1", "run": "r"}, OF_FOLDS, False),
        ({"base": "b", "adapter_sha256": "1", "run": "moved"}, OF_FOLDS, True),  # a fold
        ({"base": "b", "adapter_sha256": "2", "run": "r"}, OF_FOLDS, True),  # trained on all rows under the same name
        ({"base": "b", "adapter_sha256": "2", "run": "mean", "soup_of": ["1"]}, OF_FOLDS, True),
        ({"base": "b", "adapter_sha256": "2", "run": "s"}, OF_FOLDS, None),
        ({"base": "b", "adapter_sha256": "2", "run": "r", "score_by": "text"}, OF_FOLDS | {"score_by": "label"}, False),
        ({"base": "b", "adapter_sha256": "2", "run": "s", "score_by": "text"}, OF_FOLDS | {"score_by": "text"}, None),
        ({"base": ["b"], "run": 1, "members": 2}, OF_FOLDS, None),
    ],
)
def test_whether_two_files_are_of_one_model(folder: Path, one: object, other: object, agree: bool | None) -> None:
    found = []
    for name, about in (("one", one), ("other", other)):
        (folder / f"{name}.probs.json").write_text(json.dumps(about))
        found.append(read_provenance(folder / f"{name}.probs.csv"))
        assert provenance_from_dict(found[-1].to_dict(), "x.json") == found[-1]
    earlier = {name: value for name, value in found[0].to_dict().items() if name != "traits"}  # a blend.json of before
    assert provenance_from_dict(earlier, "x.json") == replace(found[0], traits={})
    assert found[0].agrees_with(found[1]) is found[1].agrees_with(found[0]) is agree


def test_apply_takes_each_member_in_its_place_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell("good-oof.probs.csv", **OF_FOLDS)
    tell("twin-oof.probs.csv", **OF_FOLDS | {"run": "s", "members": [{"run": "s-fold0", "adapter_sha256": "2"}]})
    tell("echo-a-oof.probs.csv", **UNTUNED | {"base": "c"})
    fit("good", "twin", "echo-a")
    capsys.readouterr()
    apply = ["--apply", "submissions/ab.blend.json", "--out", "t"]
    files = ["good.probs.csv", "twin.probs.csv", "echo-a.probs.csv"]
    ensemble.main([*apply, *files])
    assert (
        "note: good.probs.csv, twin.probs.csv, echo-a.probs.csv: no report tells for certain which of --fit's"
        in capsys.readouterr().err
    )
    tell("good.probs.csv", base="b", adapter_sha256="1", run="r-fold0")
    tell("twin.probs.csv", base="b", adapter_sha256="3", run="s")
    tell("echo-a.probs.csv", **UNTUNED | {"base": "c"})
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
    tell("good.probs.csv", base="d", adapter_sha256="1", run="r")
    with pytest.raises(
        InputError, match=r"good.probs.csv \(d, r\) stands in the place of good-oof.probs.csv \(b, r\): give the"
    ):
        ensemble.main([*apply, *files, "--overwrite"])
    tell(
        "good.probs.csv", base="b", adapter_sha256="9", run="of-all-rows"
    )  # known to nobody: the same base may stand there
    ensemble.main([*apply, *files, "--overwrite"])
    assert "note: good.probs.csv: no report tells for certain which" in capsys.readouterr().err
    assert (folder / "submissions/t.probs.csv").read_bytes() == before


def of_folds(run: str, **about: object) -> dict[str, object]:
    """The report of --all, of this version with what `about` tells of its training and asking."""
    return {
        "out_of_fold": True,
        "base": "b",
        "run": run,
        "members": [{"run": f"{run}-fold0", "adapter_sha256": run}],
        **about,
    }


def refit(run: str, **about: object) -> dict[str, object]:
    """The report of a run on all rows."""
    return {"base": "b", "run": run, "adapter_sha256": f"of {run}", **about}


def asked(**training: object) -> dict[str, object]:
    return {
        "score_by": "label",
        "template": {"user": "p"},
        "shots": 0,
        "choice_orders": "cyclic:1",
        "training": training,
    }


IS_NOTED, IS_SETTLED = True, False
SEEDS = asked(seed=0, rank=64), asked(seed=1, rank=64)
BY_TEXT = asked(seed=0, rank=64) | {"score_by": "text"}


@pytest.mark.parametrize(
    ("fitted", "given", "is_noted"),
    [
        # Of earlier versions: the names of the runs are all there is.
        ([of_folds("a"), of_folds("w")], [refit("a-all"), refit("w-all")], IS_NOTED),
        ([of_folds("a-cv"), of_folds("b-cv")], [refit("a"), refit("b-all")], IS_NOTED),
        ([of_folds("a"), of_folds("a-big")], [refit("a-all"), refit("a-big-all")], IS_NOTED),
        # Of this version: how they were asked and trained.
        ([of_folds("x", **SEEDS[0]), of_folds("y", **SEEDS[1])], [refit("p", **SEEDS[0]), refit("q", **SEEDS[1])], IS_SETTLED),
        ([of_folds("x", **SEEDS[0]), of_folds("y", **BY_TEXT)], [refit("p", **SEEDS[0]), refit("q", **BY_TEXT)], IS_SETTLED),
        # An untuned base with two prompts, and with and without shots.
        (
            [UNTUNED, UNTUNED | {"template": {"user": "q"}}],
            [UNTUNED, UNTUNED | {"template": {"user": "q"}}],
            IS_SETTLED,
        ),
        ([UNTUNED, UNTUNED | {"shots": 5}], [UNTUNED, UNTUNED | {"shots": 5}], IS_SETTLED),
        # One run, asked in two ways.
        (
            [refit("a", **SEEDS[0]), refit("a", **SEEDS[0] | {"choice_orders": "cyclic:5"})],
            [refit("a", **SEEDS[0]), refit("a", **SEEDS[0] | {"choice_orders": "cyclic:5"})],
            IS_SETTLED,
        ),
        # Soups of the folds, one of them with another rank.
        (
            [of_folds("a", **SEEDS[0]), of_folds("b", **SEEDS[1])],
            [refit("mean", **SEEDS[0] | {"training": {}}, soup_of=["a"]), refit("b-soup", soup_of=["b", "b1"])],
            IS_SETTLED,
        ),
    ],
)  # fmt: skip
def test_a_swapped_order_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], fitted: list[Any], given: list[Any], is_noted: bool
) -> None:
    for name, oof, test in zip(("good", "twin"), fitted, given, strict=True):
        tell(f"{name}-oof.probs.csv", **oof)
        tell(f"{name}.probs.csv", **test)
    members = [read_provenance(Path(f"{name}-oof.probs.csv")) for name in ("good", "twin")]
    names, files = ["good-oof.probs.csv", "twin-oof.probs.csv"], [Path("good.probs.csv"), Path("twin.probs.csv")]
    require_order(members, names, files)
    told = capsys.readouterr().err
    assert bool(told) == is_noted
    assert len(told.splitlines()) == is_noted
    with pytest.raises(InputError, match=r"--apply: \w+.probs.csv \(b, [\w-]+\) stands in the place of"):
        require_order(members, names, files[::-1])


def test_a_foreign_or_doubled_model_is_refused_and_a_likely_one_passes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def order(*given: dict[str, object]) -> str:
        files = [Path(f"{name}.probs.csv") for name in ("good", "twin")]
        for file, about in zip(files, given, strict=True):
            tell(str(file), **about)
        require_order(members, ["A", "B"], files)
        return capsys.readouterr().err

    members = []
    for name, about in (("good", of_folds("x", **SEEDS[0])), ("twin", of_folds("y", **SEEDS[1]))):
        tell(f"{name}-oof.probs.csv", **about)
        members.append(read_provenance(Path(f"{name}-oof.probs.csv")))
    first, second = refit("p", **SEEDS[0]), refit("q", **SEEDS[1])
    with pytest.raises(
        InputError, match=r"in the place of B \(b, y\), whose score_by is 'label', not 'text': give the files in"
    ):
        order(first, refit("z", **BY_TEXT))
    with pytest.raises(InputError, match=r"twin.probs.csv \(b, p\) stands in the place of B \(b, y\); it goes with A"):
        order(first, first)
    no_seed = refit("p", **asked(rank=64))
    with pytest.raises(
        InputError, match=r"twin.probs.csv .* but good.probs.csv is of the same adapter: give the files"
    ):
        order(no_seed, no_seed)
    # Neither asks in another way nor is trained for longer than another member: it may stand there.
    assert not order(first | {"choice_orders": "cyclic:5"}, second | {"choice_orders": "cyclic:5"})
    assert not order(first, of_folds("y", **SEEDS[1]))
    assert not order(first, second | {"training": {"seed": 1, "rank": 32}})
    assert "note: good.probs.csv: no report tells for certain" in order(no_seed, second)


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
    tell("twin-oof.probs.csv", **TUNED, data=[{"file": "gold.csv", "sha256": "1"}], test="gold.csv", test_sha256="1")
    with pytest.raises(InputError, match="twin-oof.probs.csv was scored by a run that was trained on gold.csv"):
        ensemble.main([*log, "--oof", "twin-oof.probs.csv", "--answers", "gold.csv"])
    assert read_log(Path("submissions/log.csv")) == [row]
