"""Which base fits which GPU: figures that were seen on cards, the table's rules, and what train.py takes by default."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import make_questions, make_run, write_questions

import inference
from ksat import fit as fit_module
from ksat.bases import KNOWN_BASES, find_base
from ksat.devices import GPUS, Device, tflops_of
from ksat.errors import InputError
from ksat.fit import (
    SEARCHED_TOKENS,
    check_room,
    choose_base,
    cost,
    explain,
    find_fit,
    fit_all,
    fit_table,
    passed_over,
    peak,
    recommended,
    shortfall,
)
from ksat.memory import GIB
from ksat.runs import read_run, write_run

BIG = "unsloth/Qwen2.5-32B-Instruct-bnb-4bit"
MIDDLE = "unsloth/Qwen2.5-14B-bnb-4bit"
CPU = Device("cpu", "2 CPU cores", (0, 0), 0.0)
V100, T4, H100, CARD_24 = GPUS["v100-32gb"], GPUS["t4"], GPUS["h100"], GPUS["4090"]
CARD_12, CARD_8 = Device("cuda", "RTX 4070 12 GB", (8, 9), 11.6), Device("cuda", "8 GB", (8, 9), 7.6)
SMALL = Device("cuda", "small", (8, 6), 2.5)


def base(name: str):  # type: ignore[no-untyped-def]
    known = find_base(name)
    assert known is not None
    return known


def test_the_32b_trains_at_2048_tokens_on_a_v100_as_it_did_in_reality() -> None:
    fit = find_fit(base(BIG), V100)
    assert fit.trains
    assert fit.verdict == "trains"
    assert fit.longest > 4096  # the field's winner trained 4,096 tokens at rank 64 there


def test_weights_are_those_that_were_measured_on_cards() -> None:
    """speed.md: the 32B in nf4 takes 17.6 GiB with embedding and head in half precision."""
    assert find_fit(base(BIG), H100).weights == pytest.approx(17.6, rel=0.02)


@pytest.mark.parametrize("known", KNOWN_BASES, ids=lambda known: known.name)
@pytest.mark.parametrize("device", [T4, V100, H100], ids=lambda device: device.name)
def test_a_row_agrees_with_itself(known, device: Device) -> None:  # type: ignore[no-untyped-def]
    fit = find_fit(known, device)
    assert fit.weights < fit.scoring < fit.training[2048] < fit.training[4096]
    assert fit.trains == (fit.training[2048] <= device.memory_gib)
    if fit.longest:
        assert peak(known, device, tokens=fit.longest).needed <= device.memory_gib * GIB
    if fit.longest < max(SEARCHED_TOKENS):
        assert peak(known, device, tokens=fit.longest + 128).needed > device.memory_gib * GIB
    expected = {"trains": fit.longest >= 4096, "scores only": fit.scores, "too large": not fit.scores}
    assert expected.get(fit.verdict, 0 < fit.longest < 4096)


def test_gemma_3_computes_in_float32_where_there_is_no_bfloat16() -> None:
    known = base("google/gemma-3-12b-it")
    assert find_fit(known, V100).weights > find_fit(known, H100).weights + 1.8  # embedding and tower at 4 bytes each
    assert find_fit(known, V100).training[2048] > find_fit(known, H100).training[2048]


def test_the_table_marks_the_largest_and_says_why_not_the_next() -> None:
    fits = fit_all(CARD_24)
    assert [fit.base.num_parameters for fit in fits] == sorted(
        (known.num_parameters for known in KNOWN_BASES), reverse=True
    )
    lines = fit_table(fits, CARD_24).splitlines()
    marked = [line for line in lines if line.startswith("| -> ")]
    largest = next(fit for fit in fits if fit.base.name == MIDDLE)
    assert len(marked) == 1
    assert largest.base.name in marked[0]
    assert (
        f"{largest.base.name} is the largest of the known bases that trains at 2,048 tokens on {CARD_24.name}." in lines
    )
    following = [fit for fit in fits if not fit.trains and fit.base.num_parameters > largest.base.num_parameters][-1]
    assert any(line.startswith(f"The next, {following.base.name}, is short by ") for line in lines)
    helped = next(line for line in lines if line.startswith("The largest that can be made to fit, "))
    assert f", {BIG}, is short by 3.5 GiB at 2,048 tokens with rank 64; fits with --rank 16." in helped
    assert any("was best (" in line for line in lines)


def test_a_table_without_a_base_that_fits() -> None:
    tiny = Device("cuda", "tiny", (8, 6), 1.0)
    text = fit_table(fit_all(tiny), tiny)
    assert "None of the known bases trains at 2,048 tokens in the 1.0 GiB of tiny; the smallest, " in text
    assert "->" not in text
    assert "too large" in text


def test_a_shortfall_names_only_what_helps() -> None:
    known = base(BIG)

    def card(gib: float) -> Device:
        return Device("cuda", "card", (8, 6), gib)

    needed = {rank: peak(known, card(0), tokens=2048, rank=rank).needed / GIB for rank in (64, 16, 8)}
    assert f"{needed[64]:.1f}" == "27.0"
    assert shortfall(known, card(needed[64] - 0.5)) == (
        "short by 0.5 GiB at 2,048 tokens with rank 64; fits with --offload-embedding or --rank 16 or --max-tokens 1024"
    )
    assert shortfall(known, card(needed[16] + 0.01)).endswith("; fits with --rank 16")
    assert shortfall(known, card(needed[16] - 0.01)).endswith("; fits with --rank 8")
    assert shortfall(known, card(needed[8] - 0.01)).endswith("; fits with --offload-embedding --rank 16")
    offloaded = {
        (rank, tokens): peak(known, card(0), tokens=tokens, rank=rank, offload_embedding=True).needed / GIB
        for rank in (16, 8)
        for tokens in (2048, 1024)
    }
    assert needed[16] - offloaded[16, 2048] == pytest.approx(152064 * 5120 * 2 * 1.05 / GIB)
    assert shortfall(known, card(offloaded[16, 2048] - 0.01)).endswith("; fits with --offload-embedding --rank 8")
    assert shortfall(known, card(offloaded[8, 2048] - 0.01)).endswith("--offload-embedding --rank 8 --max-tokens 1024")
    tied = base("google/gemma-3-12b-it")
    assert "--offload-embedding" not in shortfall(tied, card(find_fit(tied, T4).training[2048] - 0.5))
    assert shortfall(known, card(10)).endswith("; no smaller rank or shorter prompt makes it fit")


@pytest.mark.parametrize("known", KNOWN_BASES, ids=lambda known: known.name)
def test_the_explanation_adds_up(known) -> None:  # type: ignore[no-untyped-def]
    lines = explain(known, V100).splitlines()
    figures = [float(line.split()[0]) for line in lines if " GiB  " in line]
    assert sum(figures[:-1]) == pytest.approx(figures[-1], abs=0.06)
    assert f"of {V100.memory_gib:.2f} GiB: {find_fit(known, V100).verdict}" in lines[-1 - bool(known.unverified)]
    assert ("not verified" in lines[-1]) == bool(known.unverified)


@pytest.mark.parametrize(
    ("device", "samples", "name"),
    [
        (H100, False, BIG),
        (V100, False, BIG),
        (CARD_24, False, MIDDLE),
        (T4, False, "Qwen/Qwen3-14B"),
        (CARD_12, False, "yanolja/EEVE-Korean-Instruct-10.8B-v1.0"),
        (CARD_8, False, "Qwen/Qwen3-4B"),
        (SMALL, False, "embedded"),
        (CPU, False, "embedded"),
        (H100, True, "embedded"),
        (CPU, True, "embedded"),
    ],
)
def test_the_largest_that_is_free_is_taken_but_never_for_samples(device: Device, samples: bool, name: str) -> None:
    assert choose_base(device, samples=samples)[0] == name


@pytest.mark.parametrize("device", [*GPUS.values(), CARD_8, SMALL], ids=lambda device: device.name)
def test_train_takes_what_explore_marks(device: Device) -> None:
    found = re.search(r"^\| -> (\S+?)\?? ", fit_table(fit_all(device), device), re.MULTILINE)
    name, why = choose_base(device, samples=False)
    assert name == (found[1] if found else "embedded")
    known = find_base(name)
    assert known is None or (known.licence in ("Apache-2.0", "MIT") and not known.needs_remote_code)
    assert known is None or f"fits {device.name}" in why


def test_of_two_about_as_large_the_better_reported_is_taken() -> None:
    one = find_fit(base("Qwen/Qwen3-8B"), H100)

    def fit(name: str, num_parameters: int, private: float | None, licence: str = "MIT"):  # type: ignore[no-untyped-def]
        return replace(
            one, base=replace(one.base, name=name, num_parameters=num_parameters, private=private, licence=licence)
        )

    largest, near, far = fit("largest", 1000, None), fit("near", 900, 0.1), fit("far", 899, 0.9)
    assert recommended([largest, near, far]) is near
    assert recommended([largest, far]) is largest
    assert recommended([replace(largest, longest=1024), near, far]) is far
    assert recommended([]) is None
    terms = fit("terms", 1100, 0.5, "Llama 3")
    assert recommended([terms, near]) is near
    assert recommended([terms, near], named=True) is terms
    assert passed_over([terms, near, fit("small", 800, None, "Llama 3")], near) == (
        "not taken unasked, for their terms: terms (Llama 3)"
    )
    assert recommended([terms]) is None
    text = fit_table([terms], H100)
    assert (
        "->" not in text.splitlines()[2] and "none is free of terms; not taken unasked, for their terms: terms" in text
    )


def test_the_rank_asked_for_decides_what_is_taken() -> None:
    assert choose_base(CARD_24, samples=False, rank=16)[0] == BIG


def test_what_is_passed_over_is_said_by_both() -> None:
    words = "ot taken unasked, for their terms: naver-hyperclovax/HyperCLOVAX-SEED-Think-14B (HyperCLOVA X SEED)"
    assert words in choose_base(CARD_24, samples=False)[1]
    table = fit_table(fit_all(CARD_24), CARD_24)
    assert f"train.py takes it here without --base; n{words}" in table
    assert "`?`: not all of the base's shape or licence was seen" in table
    assert "public, private: accuracy on the two halves of a leaderboard, untuned" in table


def test_the_choice_of_a_base_is_explained() -> None:
    assert "the sample questions" in choose_base(H100, samples=True)[1]
    assert "there is no GPU" in choose_base(CPU, samples=False)[1]
    assert "its training (about 27.1 GiB with rank 64) fits V100 32 GB" in choose_base(V100, samples=False)[1]
    assert re.search(
        r"small has 2.5 GiB; the smallest of the known bases needs [\d.]+$", choose_base(SMALL, samples=False)[1]
    )


def test_cost() -> None:
    # 2,031 rows of about 1,100 characters, two epochs: the 2-3 h on a V100 that teams report, within a factor of two.
    assert (
        cost(BIG, V100, num_characters=2 * 2031 * 1100) == "download 18 GiB unless cached; training about 2.9 h (rough)"
    )
    assert "training about 0.4 h" in cost(BIG, H100, num_characters=2 * 2031 * 1100)
    assert cost(MIDDLE, H100, num_characters=1).startswith("download 9 GiB")
    assert cost("hungun/Qwen2.5-7B-Instruct-kowiki-qa", H100, num_characters=1).startswith("download 14 GiB")
    assert cost("embedded", CPU, num_characters=110 * 60 * 10) == "nothing to download; training about 6 minutes"
    assert cost("embedded", CPU, num_characters=1) == "nothing to download; training about 1 minutes"
    assert "not known" in cost("someone/else", V100, num_characters=1)


def test_a_folder_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one that is called as a known base is."""
    monkeypatch.chdir(tmp_path)
    assert cost(str(tmp_path), CPU, num_characters=1) == "size and time of this base are not known; nothing to download"
    assert cost("some/base", CPU, num_characters=1).endswith("it is downloaded unless it is in the Hugging Face cache")
    (tmp_path / BIG).mkdir(parents=True)
    assert cost(BIG, V100, num_characters=1).startswith("nothing to download; training about")


def test_no_figure_of_a_card_is_used_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "measured_flops", lambda: 50e9)
    shape = base(BIG).shape
    hours = 4 * 0.65 * 1_000_000 * shape.num_block_weights / 50e9 / 3600
    assert cost(BIG, CPU, num_characters=1_000_000).endswith(
        f"; training at least {hours:.1f} h, by a matmul measured on 2 CPU cores"
    )
    assert cost(BIG, SMALL, num_characters=1).endswith("; how long training takes on small is not known")


def test_a_matmul_is_measured() -> None:
    from ksat.devices import measured_flops

    assert 1e8 < measured_flops() < 1e15


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("Tesla T4", 65.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4070", None),
    ],
)
def test_a_driver_s_name_is_that_of_a_data_sheet_or_of_none(name: str, tflops: float | None) -> None:
    assert tflops_of(name) == tflops


def test_a_base_that_does_not_fit_is_refused_or_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "machine_memory", lambda: 24 * GIB)
    with pytest.raises(
        InputError, match=f"--base {BIG}: its weights and a LoRA of rank 64 take 3.* GiB .* this machine has 24.0 GiB; "
    ):
        check_room(BIG, CPU, rank=64, nf4=False)
    with pytest.raises(InputError, match=r"take 3\d.\d GiB .*; take a smaller base or --quantization nf4$"):
        check_room("Qwen/Qwen3-8B", CPU, rank=64, nf4=False)
    assert "to train on prompts of 2,048 tokens, this machine has 24.0 GiB" in check_room(
        "Qwen/Qwen3-8B", CPU, rank=64, nf4=True
    )
    assert check_room("Qwen/Qwen3-4B", CPU, rank=8, nf4=True, tokens=256) == ""
    assert check_room("Qwen/Qwen3-8B", CPU, rank=8, nf4=False, tokens=256, dtype="bfloat16") == ""
    assert check_room("embedded", CPU, rank=64, nf4=False) == ""
    with pytest.raises(InputError, match="T4 16 GB has 14.6 GiB; take a smaller base$"):
        check_room(BIG, T4, rank=64, nf4=True)
    with pytest.raises(InputError, match="RTX 4090 24 GB has 23.5 GiB; take a smaller base or --rank 16$"):
        check_room(BIG, CARD_24, rank=64, nf4=True)
    card = Device("cuda", "card", (8, 6), 26.5)
    assert check_room(BIG, card, rank=64, nf4=True).endswith(
        "card has 26.5 GiB: it will run out of memory, or swap; take a smaller base or --offload-embedding or --rank 16 or --max-tokens 1024"
    )
    assert check_room(BIG, CARD_24, rank=16, nf4=True) == check_room(BIG, V100, rank=64, nf4=True) == ""


def shaped(folder: Path, **changed: Any) -> str:
    """A folder with the configuration of an 8B model, and no weights."""
    sizes = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    folder.mkdir(exist_ok=True)
    fields = {"model_type": "llama", **sizes, "vocab_size": 128256, "tie_word_embeddings": False, **changed}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def test_scoring_asks_for_room_and_for_less_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "machine_memory", lambda: 24 * GIB)
    how: dict[str, Any] = {"nf4": False, "training": False}
    with pytest.raises(
        InputError,
        match=r"^--base Qwen/Qwen3-32B: its weights take 12\d.\d GiB before .*; take a smaller base or --quantization nf4$",
    ):
        check_room("Qwen/Qwen3-32B", CPU, rank=0, **how)
    with pytest.raises(
        InputError,
        match=r"^--ckpt a, base Qwen/Qwen3-32B: its weights and a LoRA of rank 8 take .*; take a machine with more memory$",
    ):
        check_room("Qwen/Qwen3-32B", CPU, rank=8, flag="--ckpt a, base", **how)
    assert check_room("Qwen/Qwen3-32B", CPU, rank=0, nf4=True, training=False) == ""
    with pytest.raises(InputError):
        check_room("Qwen/Qwen3-14B", T4, rank=0, **how)
    needed = peak(base(BIG), Device("cuda", "card", (8, 6), 0), tokens=2048, rank=0, training=False).needed / GIB
    card = Device("cuda", "card", (8, 6), needed - 0.1)
    assert check_room(BIG, card, rank=0, nf4=True, training=False).endswith(
        f"to score prompts of 2,048 tokens, card has {needed - 0.1:.1f} GiB: it will run out of memory, or swap; take a smaller base or --offload-embedding"
    )
    assert check_room(BIG, replace(card, memory_gib=needed + 0.1), rank=0, nf4=True, training=False) == ""


def test_bases_outside_the_list_are_asked_by_the_config_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "machine_memory", lambda: 24 * GIB)
    monkeypatch.setattr("ksat.models.look_for_hub", lambda base: pytest.fail("asks the network"))
    own = shaped(tmp_path / "own")
    for training in (True, False):
        with pytest.raises(InputError, match=r"own: its weights and a LoRA of rank 8 take 3\d.\d GiB before"):
            check_room(own, CPU, rank=8, nf4=False, training=training)
        assert check_room(own, CPU, rank=8, nf4=True, tokens=256, training=training) == ""
    assert check_room("someone/else", CPU, rank=8, nf4=False) == ""
    cached = lambda name, file: str(tmp_path / "own" / file)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.try_to_load_from_cache", cached)
        with pytest.raises(InputError, match="--base someone/else: its weights and a LoRA of rank 8 take"):
            check_room("someone/else", CPU, rank=8, nf4=False)


@pytest.mark.parametrize(
    "changed",
    [
        {"model_type": "lfm2"},  # some of its layers are smaller
        {"quantization_config": {"quant_method": "aqlm"}},  # 2 bits
        {"quantization_config": {"quant_method": "bitsandbytes"}},  # 4 bits, and 8 may be
        {"quantization_config": {}},
        {"num_key_value_heads": None},
        {"hidden_size": "4096"},
        {"text_config": None},
    ],
)
def test_what_may_fit_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]) -> None:
    monkeypatch.setattr(fit_module, "machine_memory", lambda: 16 * GIB)
    assert check_room(shaped(tmp_path / "own", **changed), CPU, rank=0, nf4=False, tokens=256, training=False) == ""
    with pytest.raises(InputError):
        check_room(shaped(tmp_path / "own"), CPU, rank=0, nf4=False, tokens=256, training=False)


def test_inference_refuses_before_it_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It went straight to loading, and the machine swapped or killed it."""
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run")
    monkeypatch.setattr("ksat.models.load", lambda *_, **__: pytest.fail("loads"))
    monkeypatch.setattr(fit_module, "machine_memory", lambda: 24 * GIB)
    score = ["--test", str(write_questions(tmp_path / "q.csv", make_questions(2))), "--device", "cpu", "--out", "out/x"]
    with pytest.raises(InputError, match="--base Qwen/Qwen3-32B: its weights take"):
        inference.main(["--base", "Qwen/Qwen3-32B", *score])
    write_run(run, replace(read_run(run), base=shaped(tmp_path / "own")))
    with pytest.raises(
        InputError, match="--ckpt run, base .*own: its weights and a LoRA of rank 4 take .*; take a machine with more"
    ):
        inference.main(["--ckpt", "run", *score])
    monkeypatch.setattr(fit_module, "machine_memory", lambda: 32 * GIB)
    with pytest.raises(pytest.fail.Exception, match="loads"):
        inference.main(["--ckpt", "run", *score])
    assert (
        "warning: " in (told := capsys.readouterr().err)
        and "to score prompts of 2,048 tokens, this machine has 32.0 GiB" in told
    )
