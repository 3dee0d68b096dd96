"""Averaged adapters: the mean of the updates, exactly or at a lower rank, as a run that inference takes."""

import errno
import importlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from damage import reseal
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import base_folder, make_questions, read_probs, write_questions

import inference
from ksat import soup
from ksat.adapter_mean import truncate
from ksat.devices import Device
from ksat.errors import InputError
from ksat.files import read_json
from ksat.models import LoadSettings, load
from ksat.run_folders import claim_run
from ksat.runs import read_run

ROWS = torch.tensor([[5, 9, 33, 120, 7, 64], [3, 200, 41, 8, 90, 11]])
SETTINGS = LoadSettings(
    str(base_folder()), "transformers", Device("cpu", "test", (0, 0), 0.0), "float32", False, 2048, share_prefixes=False
)


def make_run(name: str, **how: Any) -> Path:
    """A finished run in checkpoints/ of here."""
    return tiny.make_run(Path("checkpoints", name), **how)


def change_adapter(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> None:
    """Edits an adapter so that its run still verifies."""
    path = folder / "adapter/adapter_config.json"
    path.write_text(json.dumps(read_json(path) | config))
    if tensors is not None:
        save_file(tensors, folder / "adapter/adapter_model.safetensors")
    reseal(folder)


def updates(folder: Path) -> dict[str, np.ndarray]:
    """scaling * B @ A of every module in float64, from PEFT's definition."""
    config, tensors = (
        read_json(folder / "adapter/adapter_config.json"),
        load_file(folder / "adapter/adapter_model.safetensors"),
    )
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    modules = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    return {
        module: scaling
        * tensors[f"{module}.lora_B.weight"].double().numpy()
        @ tensors[f"{module}.lora_A.weight"].double().numpy()
        for module in modules
    }


def logits(adapter: Path | None = None, added: dict[str, np.ndarray] | None = None) -> torch.Tensor:
    """(2, 6, V) of the base with an adapter, or with updates added to its weights by hand."""
    model = load(SETTINGS, adapter=adapter).model
    with torch.no_grad():
        for module, update in (added or {}).items():
            weight = model.get_submodule(module.removeprefix("base_model.model.")).weight
            weight += torch.tensor(update, dtype=torch.float32)
        return model(input_ids=ROWS).logits


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("members", "weights"),
    [
        ([{"rank": 4, "rslora": True}, {"rank": 4, "rslora": True}], None),
        ([{"rank": 2, "alpha": 3.0, "rslora": True}, {"rank": 6, "alpha": 10.0, "rslora": False}], [3.0, 1.0]),
        ([{"rank": 2, "alpha": 4.0, "rslora": False}, {"rank": 3}, {"rank": 40, "alpha": 20.0}], [0.2, 0.5, 0.3]),
    ],
)
def test_the_exact_mean_scores_as_the_base_with_the_mean_update_added(
    members: list[dict[str, Any]], weights: list[float] | None
) -> None:
    folders = [make_run(f"m{i}", seed=i, **member) for i, member in enumerate(members)]
    flags = ["--weights", *map(str, weights)] if weights else []
    soup.main([*map(str, folders), "--run", "mean", *flags])
    shares = np.array(weights or [1.0] * len(folders)) / sum(weights or [1.0] * len(folders))
    each = [updates(folder) for folder in folders]
    mean = {
        module: sum(share * one[module] for share, one in zip(shares, each, strict=True)) for module in each[0]
    }  # exact, in float64
    by_soup, by_hand, base = logits(Path("checkpoints/mean/adapter")), logits(added=mean), logits()
    torch.testing.assert_close(by_soup, by_hand, atol=1e-5, rtol=1e-5)
    assert (by_hand - base).abs().max() > 0.1  # the updates do something
    config = read_json(Path("checkpoints/mean/adapter/adapter_config.json"))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (
        sum(member["rank"] for member in members),
        config["r"],
        False,
    )
    assert {tensor.dtype for tensor in load_file("checkpoints/mean/adapter/adapter_model.safetensors").values()} == {
        torch.float32
    }


def test_full_rank_is_the_exact_mean_and_a_lower_one_numpys_svd_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(make_run("a", rank=4)), str(make_run("b", rank=3, alpha=5.0, rslora=False, seed=1))]
    for name, flags in {"exact": [], "full": ["--rank", "7"], "low": ["--rank", "3"]}.items():
        soup.main([*folders, "--run", name, *flags])
    exact, full, low = (updates(Path("checkpoints", name)) for name in ("exact", "full", "low"))
    kept, whole, shares = 0.0, 0.0, []
    for module, update in exact.items():
        np.testing.assert_allclose(full[module], update, atol=1e-6)
        U, singular, Vh = np.linalg.svd(update, full_matrices=False)
        np.testing.assert_allclose(low[module], U[:, :3] * singular[:3] @ Vh[:3], atol=1e-6)
        kept, whole = kept + (singular[:3] ** 2).sum(), whole + (singular**2).sum()
        shares.append(math.sqrt((singular[:3] ** 2).sum() / (singular**2).sum()))
    settings = read_run(Path("checkpoints/low")).settings
    assert settings["rank"] == 3
    assert settings["norm_kept"] == pytest.approx(math.sqrt(kept / whole), abs=1e-6)
    assert settings["worst_norm_kept"] == pytest.approx(min(shares), abs=1e-6)
    assert settings["worst_module"] == list(exact)[int(np.argmin(shares))]
    told = f"rank 3 of 4+3, {math.sqrt(kept / whole):.1%} of the exact mean's Frobenius norm kept, {min(shares):.1%} in"
    assert told in capsys.readouterr().out
    with pytest.raises(InputError, match="--rank 8: the exact mean has rank 7 already; leave --rank out"):
        soup.main([*folders, "--run", "more", "--rank", "8"])


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.data())
def test_truncation_is_the_best_approximation_of_any_shape(
    num_out: int, num_in: int, inner: int, data: st.DataObject
) -> None:
    rank, seed = data.draw(st.integers(1, inner)), data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(inner, num_in, dtype=torch.float64, generator=generator)
    B = torch.randn(num_out, inner, dtype=torch.float64, generator=generator)
    low_A, low_B, (kept, whole) = truncate(A, B, rank)
    assert (low_A.shape, low_B.shape) == ((rank, num_in), (num_out, rank))  # PEFT wants this rank at every module
    singular = np.linalg.svd((B @ A).numpy(), compute_uv=False)
    lost = float((B @ A - low_B @ low_A).norm())
    assert lost == pytest.approx(math.sqrt((singular[rank:] ** 2).sum()), abs=1e-9)
    assert (kept, whole) == pytest.approx((float((low_B @ low_A).norm()), float((B @ A).norm())), abs=1e-9)


def test_a_run_twice_is_the_run_at_its_rank_and_inference_takes_it() -> None:
    folder = make_run("one", rank=4)
    test = write_questions(Path("test.csv"), make_questions(4))
    soup.main([str(folder), str(folder), "--run", "twice", "--rank", "4"])
    for run in ("one", "twice"):
        inference.main(["--ckpt", f"checkpoints/{run}", "--test", str(test), "--device", "cpu", "--out", run])
    one, twice = (read_probs(Path(f"submissions/{run}.probs.csv")) for run in ("one", "twice"))
    for row_id, probs in one.items():
        np.testing.assert_allclose(twice[row_id], probs, atol=1e-5)
    inference.main(["--base", str(base_folder()), "--test", str(test), "--device", "cpu", "--out", "base"])
    base = read_probs(Path("submissions/base.probs.csv"))
    assert max(np.abs(np.subtract(one[row_id], base[row_id])).max() for row_id in one) > 0.01


def test_run_json_tells_who_is_in_it_and_a_soup_of_a_soup_is_possible() -> None:
    a = make_run("a", scale=2.0)
    b = make_run("b", seed=1, scale=2.1, data=[{"file": "data/more.csv", "sha256": "2" * 64}])
    soup.main([str(a), str(b), "--run", "ab", "--weights", "3", "1"])
    run = read_run(Path("checkpoints/ab"))
    assert run.settings["soup"] == [
        {"run": str(a), "adapter_sha256": read_run(a).adapter_sha256, "weight": 0.75, "rank": 4},
        {"run": str(b), "adapter_sha256": read_run(b).adapter_sha256, "weight": 0.25, "rank": 4},
    ]
    assert (run.settings["rank"], run.settings["norm_kept"]) == (8, 1.0)
    assert [entry["file"] for entry in run.data] == ["data/train.csv", "data/more.csv"]
    assert run.scale == pytest.approx(2.05)
    soup.main(["checkpoints/ab", str(a), "--run", "aab"])
    mean, first, second = (updates(Path("checkpoints", name)) for name in ("aab", "a", "b"))
    for module in mean:
        np.testing.assert_allclose(mean[module], 0.875 * first[module] + 0.125 * second[module], atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": "other"}, "checkpoints/b: its base is 'other', that of checkpoints/a '.*ensemble.py"),
        ({"quantization": "nf4"}, "its quantization is 'nf4', that of checkpoints/a 'none'"),
        ({"score_by": "text"}, "its score_by is 'text'"),
        ({"template": {"system": "", "user": "{}"}}, "its template is"),
        ({"settings": {"rank": 4, "context_when": "all"}}, "its context_when is 'all', that of checkpoints/a 'none'"),
        ({"max_tokens": 512}, "its max_tokens is 512, that of checkpoints/a 2048"),
        (
            {"base_identity": {"config.json": "0" * 64}},
            r"checkpoints/a: was trained on another .* than checkpoints/b \(.*config.json differs",
        ),
        ({"scale": 1.11}, "scales differ: 1 in checkpoints/a, 1.11 in checkpoints/b; name the soup's with --scale S"),
    ],
)
def test_runs_that_can_not_be_averaged_are_refused(fields: dict[str, Any], message: str) -> None:
    a, b = make_run("a"), make_run("b", seed=1, **fields)
    with pytest.raises(InputError, match=message):
        soup.main([str(a), str(b), "--run", "mean"])
    assert not Path("checkpoints/mean").exists()
    if "scale" in fields:
        soup.main([str(a), str(b), "--run", "mean", "--scale", "1.2"])
        assert read_run(Path("checkpoints/mean")).scale == 1.2


def test_runs_that_tell_kinds_otherwise_are_refused_where_kinds_decide() -> None:
    """The first run's would decide which test rows get a context."""
    for rule in ("kind=reading", "all"):
        settings = {"rank": 4, "context_when": rule}
        a = make_run(f"a-{rule[:3]}", settings=settings | {"kinds": None, "choices_tell_kinds": True})
        b = make_run(f"b-{rule[:3]}", seed=1, settings=settings | {"kinds": "wording"})
        for runs in ((a, b), (b, a)):
            if rule == "all":
                soup.main([*map(str, runs), "--run", f"mean-{runs[0].name}"])
                continue
            with pytest.raises(InputError, match="its choices_tell_kinds is .*; only runs with the same can be"):
                soup.main([*map(str, runs), "--run", "mean"])
    c = make_run("c", settings={"rank": 4, "context_when": "kind=reading", "kinds": None, "choices_tell_kinds": False})
    soup.main(["checkpoints/b-kin", str(c), "--run", "both-by-wording"])
    assert read_run(Path("checkpoints/both-by-wording")).settings["choices_tell_kinds"] is False


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "checkpoints/b: its adapter is LORA with use_dora; expected a plain LoRA"),
        ({"peft_type": "LOHA"}, "its adapter is LOHA; expected a plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}, "bias": "all"}, "LORA with bias, rank_pattern"),
        ({"init_lora_weights": "pissa"}, "LORA with init_lora_weights"),
        ({"r": None}, "adapter_config.json: r is None, expected a whole number from 1; train the run again"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, expected a number above 0"),
        ({"use_rslora": None}, "use_rslora is None, expected true or false"),
        ({"r": 5}, "has ranks 4 and 4, adapter_config.json says 5"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(config: dict[str, Any], message: str) -> None:
    a, b = make_run("a"), make_run("b", seed=1)
    change_adapter(b, **config)
    with pytest.raises(InputError, match=message):
        soup.main([str(a), str(b), "--run", "mean"])


def test_other_modules_and_other_tensors_are_refused() -> None:
    a, b = make_run("a"), make_run("b", seed=1)
    tensors = load_file(b / "adapter/adapter_model.safetensors")
    change_adapter(b, {key: value for key, value in tensors.items() if "layers.1.mlp.up_proj" not in key})
    with pytest.raises(InputError, match=r"adapts other modules than checkpoints/a \(.*layers.1.mlp.up_proj first\)"):
        soup.main([str(a), str(b), "--run", "mean"])
    change_adapter(b, tensors | {"base_model.model.lm_head.weight": torch.ones(2)})
    with pytest.raises(InputError, match=r"holds base_model.model.lm_head.weight; expected lora_A and lora_B"):
        soup.main([str(a), str(b), "--run", "mean"])
    change_adapter(b, {key: value for key, value in tensors.items() if "layers.0.mlp.up_proj.lora_B" not in key})
    with pytest.raises(InputError, match="layers.0.mlp.up_proj has an A and no B"):
        soup.main([str(a), str(b), "--run", "mean"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    a, b = make_run("a"), make_run("b", seed=1)
    tensors = load_file(b / "adapter/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name][3, 1] = value
    change_adapter(b, tensors)
    with pytest.raises(InputError, match=f"checkpoints/b: {name} is not finite; its training broke down"):
        soup.main([str(a), str(b), "--run", "mean"])
    with pytest.raises(InputError, match=f"checkpoints/b/adapter: {name} is not finite; the training broke down"):
        logits(b / "adapter")


def test_huge_weights_are_no_zeros() -> None:
    a, b = str(make_run("a")), str(make_run("b", seed=1))
    soup.main([a, b, "--run", "equal"])
    soup.main([a, b, "--run", "huge", "--weights", "1e308", "1e308"])
    found = [load_file(f"checkpoints/{run}/adapter/adapter_model.safetensors") for run in ("equal", "huge")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(bool(tensor.any()) for name, tensor in found[1].items() if "lora_B" in name)


def test_a_run_that_is_replaced_while_it_is_read_is_neither_averaged_nor_scored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else it would be scored with the other one's prompt and scale, or be named as the other one."""
    a, b = make_run("a"), make_run("b", seed=1, scale=2.0)
    test = write_questions(Path("test.csv"), make_questions(4))

    def replaced(original: Any) -> Any:
        def call(*args: Any, **how: Any) -> Any:
            shutil.rmtree(a)
            shutil.copytree(b, a)
            return original(*args, **how)

        return call

    for module, name, main, flags in (
        ("ksat.soup", "mean_adapter", soup.main, [str(a), str(b), "--run", "mean", "--scale", "1"]),
        (
            "ksat.models",
            "load",
            inference.main,
            ["--ckpt", str(a), "--test", str(test), "--device", "cpu", "--out", "x"],
        ),
    ):
        shutil.rmtree(a)
        make_run("a")
        with monkeypatch.context() as patch:
            patch.setattr(f"{module}.{name}", replaced(getattr(importlib.import_module(module), name)))
            with pytest.raises(InputError, match="checkpoints/a: another run took its place while it was read"):
                main(flags)
    assert runs() == ["a", "b"]
    assert not list(Path("submissions").glob("x*"))


def test_bad_usage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(make_run("a")), str(make_run("b", seed=1))
    for argv, message in [
        ([a, "--run", "mean"], "1 run: a soup needs at least two"),
        ([a, b, "--run", "mean", "--weights", "1"], "--weights: 1 given for 2 members"),
        ([a, b, "--run", "a/b"], "--run 'a/b': expected a plain name"),
        ([a, b, "--run", "", "--overwrite"], "--run '': expected a name"),
        ([a, b, "--run", "b", "--overwrite"], "--run b: is one of the runs to average"),
        ([a, "checkpoints/none", "--run", "mean"], "checkpoints/none: no such folder"),
    ]:
        with pytest.raises(InputError, match=message):
            soup.main(argv)
    (Path(b) / "run.json").unlink()
    with pytest.raises(InputError, match=r"no run.json; expected checkpoints/<run>"):
        soup.main([a, b, "--run", "mean"])
    for flags in (["--weights", "1", "0"], ["--scale", "nan"], ["--scale", "1e9"], ["--rank", "0"]):
        with pytest.raises(SystemExit):
            soup.main([a, b, "--run", "mean", *flags])
    assert "0 is not a number above 0" in capsys.readouterr().err


def test_an_existing_run_is_replaced_only_when_asked_and_only_by_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = str(make_run("a")), str(make_run("b", seed=1))
    soup.main([a, b, "--run", "mean"])
    adapter = Path("checkpoints/mean/adapter/adapter_model.safetensors")
    before = adapter.read_bytes()
    with pytest.raises(InputError, match="--run mean: checkpoints/mean exists; take another name, or --overwrite"):
        soup.main([a, b, "--run", "mean"])

    def full_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        for name in ("mean", "new"):
            with pytest.raises(InputError, match="No space left on device"):
                soup.main([a, b, "--run", name, "--weights", "2", "1", "--overwrite"])
    assert adapter.read_bytes() == before
    assert runs() == ["a", "b", "mean"]
    (adapter.parent.parent / "notes.md").write_text("mine")
    with pytest.raises(InputError, match="checkpoints/mean: holds 'notes.md', which is not of a run"):
        soup.main([a, b, "--run", "mean", "--overwrite"])
    (adapter.parent.parent / "notes.md").unlink()
    with claim_run("mean"), pytest.raises(InputError, match="checkpoints/mean: another process is at work on this run"):
        soup.main([a, b, "--run", "mean", "--overwrite"])
    assert adapter.read_bytes() == before
    soup.main([a, b, "--run", "mean", "--weights", "2", "1", "--overwrite"])
    assert adapter.read_bytes() != before
    assert runs() == ["a", "b", "mean"]
    assert {path.name for path in Path("checkpoints/mean").iterdir()} == {"adapter", "run.json"}


def runs() -> list[str]:
    """All that lies in checkpoints/, but for locks."""
    return sorted(path.name for path in Path("checkpoints").iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("place", ["ksat.soup.write_run", "ksat.run_folders.RunFolder._take_place"])
def test_a_soup_that_was_killed_is_made_anew_and_the_old_one_is_there_until_then(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    class KilledError(BaseException):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    a, b = str(make_run("a")), str(make_run("b", seed=1))
    soup.main([a, b, "--run", "mean"])
    before = read_run(Path("checkpoints/mean"))
    flags = [a, b, "--run", "mean", "--weights", "2", "1", "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(place, kill)
        with pytest.raises(KilledError):
            soup.main(flags)
    is_complete = place.endswith("_take_place")  # then whoever reads it puts it in its place
    assert (read_run(Path("checkpoints/mean")) == before) != is_complete
    soup.main(flags)
    assert read_run(Path("checkpoints/mean")).settings["soup"][0]["weight"] == pytest.approx(2 / 3)
    assert runs() == ["a", "b", "mean"]


def test_members_that_were_never_trained_give_no_update() -> None:
    folders = []
    for name in ("a", "b"):
        folders.append(make_run(name))
        tensors = load_file(folders[-1] / "adapter/adapter_model.safetensors")
        change_adapter(folders[-1], {key: value * 0 if "lora_B" in key else value for key, value in tensors.items()})
    soup.main([*map(str, folders), "--run", "mean", "--rank", "2"])
    assert all((update == 0).all() for update in updates(Path("checkpoints/mean")).values())
    assert read_run(Path("checkpoints/mean")).settings["norm_kept"] == 1.0
    torch.testing.assert_close(logits(Path("checkpoints/mean/adapter")), logits())
