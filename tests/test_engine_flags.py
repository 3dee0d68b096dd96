"""The engine's flags through the scripts: choice orders, the loss, shared prefixes, the memory cap."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import base_folder, load_base, make_questions, read_probs, write_questions

import inference
import train
from ksat.encoding import Encoder
from ksat.errors import InputError
from ksat.files import read_json
from ksat.language_model import LanguageModel
from ksat.orders import ChoiceOrders
from ksat.packing import build_pack
from ksat.prompts import DEFAULT_TEMPLATES
from ksat.questions import Question, read_questions

CPU = ["--device", "cpu", "--engine", "transformers"]
NAMED = Question("named", "글이다.", "옳은 것은?", ("가", "나", "①과 ②"), 2)  # its choices have to stay in order


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("flags")
    write_questions(folder / "train.csv", make_questions(12))
    write_questions(folder / "test.csv", [*make_questions(6, first=40), NAMED], labelled=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run_train(run: str, *flags: str) -> list[float]:
    """Trains a run and returns its losses."""
    shared = [
        "--train",
        "train.csv",
        "--rank",
        "4",
        "--lr",
        "0.01",
        "--questions-per-step",
        "4",
        "--valid-fraction",
        "0.25",
    ]
    patience = [] if "--valid-fraction" in flags else ["--patience", "9"]
    train.main(["--base", str(base_folder()), *shared, *CPU, *patience, "--run", run, *flags])
    log = [json.loads(line) for line in Path(f"checkpoints/{run}/log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in log if "loss" in entry]


def run_inference(out: str, *flags: str, base: str = "qwen2") -> dict[str, list[float]]:
    inference.main(["--base", str(base_folder(base)), "--test", "test.csv", *CPU, "--out", f"out/{out}", *flags])
    return read_probs(Path(f"out/{out}.probs.csv"))


def encoder(model: LanguageModel) -> Encoder:
    return Encoder(model.tokenizer, DEFAULT_TEMPLATES["label"], "label", max_tokens=4096)


@pytest.mark.parametrize("num_orders", [3, 9])
def test_orders_are_averaged_in_log_space(here: Path, num_orders: int) -> None:
    """Each order alone, its softmax over the question's choices; the mean of the logs, normalised. At most as many orders as
    choices; a question that names its choices keeps its order."""
    found = run_inference(f"orders-{num_orders}", "--choice-orders", str(num_orders))
    model = load_base(base_folder())
    for question in read_questions("test.csv"):
        orders = encoder(model).encode_orders(question, ChoiceOrders("cyclic", num_orders))
        assert len(orders) == (1 if question.id == "named" else min(num_orders, question.num_choices))
        logs = [model.choice_scores(build_pack(orders, [o])).log_softmax(dim=1)[0] for o in range(len(orders))]
        expected = (sum(logs) / len(logs)).softmax(dim=0).tolist()
        np.testing.assert_allclose(found[question.id], expected, atol=1e-5)
    assert read_json(Path(f"out/orders-{num_orders}.probs.json"))["choice_orders"] == min(num_orders, 5)
    assert max(np.abs(np.subtract(found[i], p)).max() for i, p in run_inference("one", "--overwrite").items()) > 0.01


@pytest.mark.parametrize("spec", ["reverse", "random:3"])
def test_other_orders_from_the_command_line(here: Path, spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_inference(f"orders-{spec[:6]}", "--choice-orders", spec)
    assert (
        "7 questions" not in capsys.readouterr().out.split(" were asked in several orders")[0]
    )  # one names its choices
    model = load_base(base_folder())
    question = read_questions("test.csv")[0]
    orders = encoder(model).encode_orders(question, ChoiceOrders.parse(spec))
    logs = [model.choice_scores(build_pack(orders, [o])).log_softmax(dim=1)[0] for o in range(len(orders))]
    np.testing.assert_allclose(found[question.id], (sum(logs) / len(logs)).softmax(dim=0).tolist(), atol=1e-5)
    stored = read_json(Path(f"out/orders-{spec[:6]}.probs.json"))
    assert (stored["choice_orders"], stored["positions"]["num_probed"]) == (spec, 6)


def test_pride_from_the_command_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of seven questions all but the one that names its choices are asked in all orders: their means, so no prior is left."""
    found = run_inference("pride", "--debias", "pride")
    assert "6 questions were asked in several orders; the answer depends on the order in " in capsys.readouterr().out
    orders = run_inference("orders-5", "--choice-orders", "5")
    priors = read_json(Path("out/pride.probs.json"))["priors"]
    assert {size: len(prior) for size, prior in priors.items()} == {"4": 4, "5": 5}
    for row_id in found:  # of the size of the one that names its choices no other is there to tell a prior
        np.testing.assert_allclose(found[row_id], orders[row_id], atol=1e-5)


@pytest.mark.parametrize("flags", [["--choice-orders", "2"], ["--score-by", "text"]])
def test_pride_is_for_one_order_of_labels(here: Path, flags: list[str]) -> None:
    with pytest.raises(InputError, match="--debias pride: it corrects digits in one order of the choices"):
        run_inference("refused-pride", "--debias", "pride", *flags)


@pytest.mark.parametrize("script", ["train", "inference"])
def test_orders_of_choices_that_the_prompt_does_not_list_are_refused(here: Path, script: str) -> None:
    flags = ("--choice-orders", "2", "--score-by", "text")
    with pytest.raises(InputError, match="--choice-orders 2: --score-by text lists no choices .* use --score-by label"):
        run_train("refused", *flags) if script == "train" else run_inference("refused", *flags)
    assert not Path("checkpoints/refused").exists()


def test_an_interrupted_inference_of_orders_goes_on_with_the_same_bits(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ksat.journal import Journal

    flags = ("--choice-orders", "3", "--pack-tokens", "400")
    run_inference("whole", *flags)
    add, calls = Journal.add, []

    def stop(self: Journal, scores: dict[str, list[float]]) -> None:
        add(self, scores)
        calls.append(len(scores))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            run_inference("stopped", *flags)
    run_inference("stopped", *flags)
    assert Path("out/stopped.probs.csv").read_bytes() == Path("out/whole.probs.csv").read_bytes()


def test_training_on_orders_counts_every_question_once(here: Path) -> None:
    """The first step's loss is the mean over its questions of the mean over their orders."""
    losses = run_train(
        "orders", "--choice-orders", "3", "--epochs", "1", "--questions-per-step", "100", "--valid-fraction", "0"
    )
    model = load_base(base_folder())
    means = []
    for question in read_questions("train.csv"):
        orders = encoder(model).encode_orders(question, ChoiceOrders("cyclic", 3))
        means.append(
            np.mean(
                [
                    -model.choice_scores(build_pack([o], [0])).log_softmax(dim=1)[0, o.answer_index].item()
                    for o in orders
                ]
            )
        )
    assert losses[0] == pytest.approx(np.mean(means), rel=1e-4)
    assert read_json(Path("checkpoints/orders/run.json"))["settings"]["choice_orders"] == 3


def test_loss_over_the_vocabulary_trains(here: Path) -> None:
    losses = run_train("vocab", "--loss", "vocab", "--epochs", "4")
    assert losses[-1] < 0.7 * losses[0]
    assert read_json(Path("checkpoints/vocab/run.json"))["settings"]["loss"] == "vocab"


@pytest.mark.parametrize("score_by", ["label", "text"])
def test_the_loss_curve_does_not_depend_on_the_budget(here: Path, score_by: str) -> None:
    curves = [
        run_train(f"{score_by}-{budget}", "--score-by", score_by, "--pack-tokens", str(budget), "--epochs", "2")
        for budget in (1, 400, 100_000)
    ]
    assert len(curves[0]) == 6
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], atol=1e-4)


def test_prompts_in_rows_of_their_own_score_the_same(here: Path) -> None:
    shared, apart = run_inference("shared"), run_inference("apart", "--no-share-prefixes")
    for row_id, probs in shared.items():
        np.testing.assert_allclose(apart[row_id], probs, atol=1e-5)


def test_a_family_that_can_t_share_says_so_and_works_apart(here: Path) -> None:
    with pytest.raises(InputError, match="prompts can't share prefixes here .* pass --no-share-prefixes"):
        run_inference("state", base="lfm2")
    found = run_inference("state", "--no-share-prefixes", base="lfm2")
    assert all(sum(probs) == pytest.approx(1) for probs in found.values())


def test_there_is_no_gpu_to_cap(here: Path) -> None:
    with pytest.raises(InputError, match="--gpu-memory: there is no GPU to cap; leave it out"):
        run_inference("capped", "--gpu-memory", "31.7GiB")
