"""Predicted bytes against those measured on an H100, against autograd's own graph, and by hand; the plan's promises."""

import argparse
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksat.memory import (
    CONTEXT_BYTES,
    GIB,
    Calibration,
    MemoryPlan,
    ModelShape,
    Probe,
    StepSettings,
    best_pack_tokens,
    calibrate,
    format_gib,
    kept_bytes,
    parse_memory,
    predict,
)

QWEN_32B = ModelShape(
    hidden=5120, intermediate=27648, num_layers=64, num_heads=40, q_dim=5120, kv_dim=1024, vocab=152064, tied=False,
    norm_width=10240,
)  # fmt: skip
# Any bytes on top of one another: the tiny shape of the tests by hand.
TINY = ModelShape(
    hidden=4, intermediate=8, num_layers=2, num_heads=2, q_dim=4, kv_dim=2, vocab=10, tied=True, norm_width=8
)
TRAINING, SCORING = StepSettings(rank=16), StepSettings(rank=16, training=False)
# The prototype's optimizer step frees the gradients before the next pack: fp32 weight and two states of Adam are left.
PROTOTYPE = StepSettings(rank=16, adapter_bytes=12)
EXPANDED = 2 * (4 * 5120 + 4 * 5120 + 3 * 27648)  # bytes it kept: it expanded key-value heads to query heads, 248 kB

tokens = st.integers(1, 16384)
layers = st.integers(0, 64)


def allocated_gib(settings: StepSettings, **pack: Any) -> float:
    return predict(QWEN_32B, settings, **pack).allocated / GIB


# Peaks of shared/docs/speed.md; tokens are those of the fullest pack that the length mix gave under 8,192, 4,096, 2,560.
@pytest.mark.parametrize(
    ("num_tokens", "num_kept", "measured"),
    [(8063, 0, 26.9), (4096, 32, 51.5), (2505, 64, 56.9), (1024, 0, 20.7), (2048, 0, 21.6)],
)
def test_training_peaks_measured_on_the_32b(num_tokens: int, num_kept: int, measured: float) -> None:
    kept = Calibration(EXPANDED, 0.0)
    assert allocated_gib(PROTOTYPE, tokens=num_tokens, num_kept=num_kept, calibration=kept) == pytest.approx(
        measured, rel=0.006
    )
    as_documented = Calibration(231e3, 0.0)
    assert allocated_gib(PROTOTYPE, tokens=num_tokens, num_kept=num_kept, calibration=as_documented) == pytest.approx(
        measured, rel=0.05
    )


def test_scoring_peak_measured_on_the_32b() -> None:
    # The states of Adam were alive: the same process had trained.
    assert allocated_gib(replace(SCORING, adapter_bytes=12), tokens=8063, num_kept=0) == pytest.approx(21.0, rel=0.01)


def test_parts_of_the_32b() -> None:
    estimate = predict(QWEN_32B, TRAINING, tokens=4096, num_kept=0)
    assert QWEN_32B.num_block_weights == pytest.approx(31.2e9, rel=1e-3)
    assert estimate.weights / GIB == pytest.approx(15.0, abs=0.01)
    assert estimate.embedding_and_head / GIB == pytest.approx(2 * 1.45, abs=0.01)
    assert QWEN_32B.lora_parameters(1) == pytest.approx(8.39e6, rel=1e-3)
    assert estimate.adapter == 16 * 16 * QWEN_32B.lora_parameters(1)
    assert estimate.head_rows == estimate.attention == estimate.extra == 0
    assert estimate.context == CONTEXT_BYTES == estimate.total - estimate.allocated


def test_kept_bytes_of_the_32b() -> None:
    assert (
        kept_bytes(QWEN_32B, StepSettings(16, elementwise="fused")) == 2 * (6 * 5120 + 2 * 1024 + 2 * 27648) == 176128
    )
    assert kept_bytes(QWEN_32B, StepSettings(16, elementwise="liger")) == 176128 + 2 * 27648
    assert kept_bytes(QWEN_32B, StepSettings(16, attention="segments")) == 231424 + 2 * (3 * 5120 - 2 * 1024)


def test_training_step_by_hand() -> None:
    settings = StepSettings(rank=3, vocab_rows=5)
    # a = 2 * (2h + 2(q + kv) + 3I + norms) = 2 * (8 + 12 + 24 + 8)
    assert kept_bytes(TINY, settings) == 104
    one = predict(TINY, settings, tokens=10, num_kept=1, scored_rows=7)
    assert one.weights == 2 * (2 * 4 * (4 + 2) + 3 * 4 * 8) * (0.5 + 1 / 64 + 1 / 4096)
    assert one.embedding_and_head == 10 * 4 * 2
    # q and o: 8 each; k and v: 6 each; gate, up, down: 12 each
    assert one.adapter == 16 * 3 * 2 * (2 * 8 + 2 * 6 + 3 * 12)
    assert one.activations_recomputed == 10 * 4 * 2
    assert one.activations_kept == 10 * 104
    assert one.live_layer == 10 * 2 * (8 + 2 * 4)
    assert one.dequantized == 4 * 8 * 2 + 4 * 8 / 64 * 4
    assert one.head_rows == 5 * 10 * 12 + 7 * 4 * 14
    none = predict(TINY, settings, tokens=10, num_kept=0, scored_rows=7)
    assert none.activations_recomputed == 2 * 10 * 4 * 2 and none.activations_kept == 0
    assert none.live_layer == one.live_layer + 10 * 104 - 10 * 4 * 2
    assert none.total == one.total  # the layer that was recomputed last keeps what a kept one does


def test_scoring_by_hand() -> None:
    estimate = predict(TINY, StepSettings(rank=3, training=False, nf4=False, compute_bytes=4), tokens=10, num_kept=0)
    assert estimate.weights == 288 * 4 and estimate.dequantized == 0
    assert estimate.adapter == 4 * 3 * 2 * 64
    assert estimate.activations_recomputed == estimate.activations_kept == 0
    assert estimate.live_layer == 10 * 4 * 3 * (8 + 4)


def test_soft_capped_scores_by_hand() -> None:
    shape = replace(TINY, softcapped=True)
    training, scoring = StepSettings(rank=3), StepSettings(rank=3, training=False)
    # two heads: 8 B a pair of the sequence at work, and 8 B a pair that a kept layer, or the recomputed one, keeps
    assert predict(shape, training, tokens=30, num_kept=2, longest=10).attention == 2 * (8 * 100 + 2 * 8 * 300)
    assert predict(shape, training, tokens=30, num_kept=0, longest=10).attention == 2 * (8 * 100 + 8 * 300)
    assert predict(shape, scoring, tokens=30, num_kept=0, longest=10).attention == 4 * 2 * 10 * 10 * 4
    assert predict(shape, scoring, tokens=30, num_kept=0).attention == 4 * 2 * 30 * 30 * 4


@given(tokens, tokens, layers, layers, st.integers(0, 128), st.integers(0, 128))
def test_more_of_anything_takes_no_less(t1: int, t2: int, k1: int, k2: int, r1: int, r2: int) -> None:
    (t1, t2), (k1, k2), (r1, r2) = sorted((t1, t2)), sorted((k1, k2)), sorted((r1, r2))
    less = predict(QWEN_32B, StepSettings(r1), tokens=t1, num_kept=k1)
    more = predict(QWEN_32B, StepSettings(r2), tokens=t2, num_kept=k2)
    assert less.total <= more.total + 1e-3
    if t1 < t2 or r1 < r2 or max(k1, 1) < k2:
        assert less.total < more.total
    scores = [predict(QWEN_32B, replace(SCORING, rank=r), tokens=t, num_kept=0).total for r, t in ((r1, t1), (r2, t2))]
    assert scores[0] <= scores[1] and scores[0] < less.total


# ---- the shape, from real configurations


def config(name: str, **values: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**values)


PUBLISHED = {
    7.615e9: {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
              "num_key_value_heads": 4, "vocab_size": 152064},
    14.77e9: {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
              "num_key_value_heads": 8, "vocab_size": 152064},
    32.76e9: {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
              "num_key_value_heads": 8, "vocab_size": 152064},
}  # fmt: skip


@pytest.mark.parametrize("parameters", PUBLISHED)
def test_qwen_2_5_has_its_published_parameters(parameters: float) -> None:
    shape = ModelShape.from_config(config("Qwen2Config", **PUBLISHED[parameters], tie_word_embeddings=False))
    assert shape.num_parameters == pytest.approx(parameters, rel=1e-3)


def test_shape_from_config_of_the_32b() -> None:
    assert ModelShape.from_config(config("Qwen2Config", **PUBLISHED[32.76e9], tie_word_embeddings=False)) == QWEN_32B


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "llama", "mistral", "cohere", "cohere2", "gemma2", "gemma3", "exaone4", "hyperclovax"]
)
def test_weights_of_every_family_are_those_of_the_model(family: str) -> None:
    import torch
    from tiny import make_config
    from transformers import AutoModelForCausalLM

    tiny = make_config(family, vocab_size=50)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny)
    blocks = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    shape = ModelShape.from_config(tiny)
    assert shape.num_block_weights == blocks
    assert shape.num_embedding_weights == sum(embeddings.values())
    assert shape.softcapped == (family == "gemma2")


def test_gemma_3_with_vision_is_read_as_its_text() -> None:
    shape = ModelShape.from_config(config("Gemma3Config", text_config={"hidden_size": 48, "head_dim": 16}))
    assert shape.hidden == 48 and shape.q_dim == 16 * shape.num_heads and shape.tied


# ---- what layers keep, by autograd's own account


def bytes_kept_by_the_second_layer(family: str, num_tokens: int, num_segments: int) -> float:
    """Bytes a token that autograd saves in a layer of our engine on the CPU: no fused norms, one attention call a segment."""
    import torch
    from peft import LoraConfig, get_peft_model
    from tiny import make_config
    from transformers import AutoModelForCausalLM

    from ksat import attention
    from ksat.attention import AttentionPlan
    from ksat.lora4bit import fuse_lora
    from ksat.packing import Segment

    attention.register()
    tiny = make_config(family, vocab_size=50, hidden_size=64)
    model = AutoModelForCausalLM.from_config(tiny, attn_implementation=attention.NAME).to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    assert fuse_lora(model) == 14
    decoder = model.get_base_model().get_decoder()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Any] = {}  # alive, so that no address is used twice

    def pack(tensor: Any) -> Any:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    marks = []
    decoder.layers[1].register_forward_pre_hook(lambda module, inputs: marks.append(len(saved)))
    decoder.layers[1].register_forward_hook(lambda module, inputs, output: marks.append(len(saved)))
    length = num_tokens // num_segments
    spans = tuple(Segment(start, start + length) for start in range(0, num_tokens, length))
    plan = AttentionPlan(type("Spans", (), {"segments": spans})(), torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder(
            inputs_embeds=torch.randn(1, num_tokens, 64, dtype=torch.bfloat16, requires_grad=True),
            position_ids=torch.arange(length).repeat(num_segments)[None], use_cache=False, attention_plan=plan,
        )  # fmt: skip
    new = [tensor for address, tensor in list(saved.items())[slice(*marks)] if address not in known]
    return sum(tensor.untyped_storage().nbytes() for tensor in new) / num_tokens


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "llama", "cohere", "cohere2", "gemma2", "gemma3", "exaone4", "hyperclovax"]
)
def test_kept_bytes_are_those_that_autograd_saves(family: str) -> None:
    from tiny import make_config

    shape = ModelShape.from_config(make_config(family, vocab_size=50, hidden_size=64))
    settings = StepSettings(rank=2, elementwise="eager", attention="segments")
    counted = kept_bytes(shape, settings)
    if shape.softcapped:
        both = (predict(shape, settings, tokens=256, num_kept=k, longest=64).attention for k in (1, 2))
        counted += -sum(sign * part for sign, part in zip((1, -1), both, strict=True)) / 256
    assert bytes_kept_by_the_second_layer(family, num_tokens=256, num_segments=4) == pytest.approx(counted, rel=0.05)


# ---- the plan


@given(tokens, st.floats(10 * GIB, 200 * GIB))
def test_num_kept_is_the_most_that_fits(num_tokens: int, limit: float) -> None:
    plan = MemoryPlan(QWEN_32B, TRAINING, limit)
    kept = plan.num_kept(num_tokens)
    if kept:
        assert plan.fits(num_tokens, kept) and plan.predicted(num_tokens).total * 1.05 <= limit
    else:
        assert not plan.fits(num_tokens, 1)
    if kept < QWEN_32B.num_layers:
        assert not plan.fits(num_tokens, kept + 1)
    assert plan.predicted(num_tokens) == plan.estimate(num_tokens, kept)


def test_scoring_keeps_no_layers() -> None:
    assert MemoryPlan(QWEN_32B, SCORING, 200 * GIB).num_kept(512) == 0


def test_more_memory_keeps_more_layers() -> None:
    kept = [MemoryPlan(QWEN_32B, TRAINING, gib * GIB).num_kept(4096) for gib in (20, 31.7, 40, 60, 79, 140)]
    assert kept == sorted(kept) and kept[0] == 0 and 0 < kept[2] < kept[3] < kept[4] < kept[5] == 64


@given(tokens, st.floats(10 * GIB, 200 * GIB), st.lists(tokens, max_size=4))
def test_lower_always_changes_the_plan_of_that_pack_and_raises_none(
    num_tokens: int, limit: float, others: list[int]
) -> None:
    plan = MemoryPlan(QWEN_32B, TRAINING, limit)
    for _ in range(65):
        before, old = plan.num_kept(num_tokens), plan.limit
        of_others = [plan.num_kept(other) for other in others]
        lowered = plan.lower(num_tokens)
        assert lowered == (before > 0) and plan.limit <= old
        assert plan.num_kept(num_tokens) < before or not lowered
        assert all(plan.num_kept(other) <= kept for other, kept in zip(others, of_others, strict=True))
        if not lowered:
            return
    pytest.fail("lower() did not come to an end")


def test_lower_gives_up_8_per_cent_of_the_memory_for_activations() -> None:
    plan = MemoryPlan(QWEN_32B, TRAINING, 60 * GIB)
    estimate = plan.estimate(4096, 0)
    floor = 1.05 * (estimate.fixed + estimate.context)
    assert plan.lower(4096)
    assert plan.limit == pytest.approx(floor + 0.92 * (60 * GIB - floor))


def test_lower_in_scoring_makes_the_next_budget_smaller() -> None:
    plan = MemoryPlan(QWEN_32B, SCORING, 21 * GIB)
    before = best_pack_tokens(plan, longest=600)
    assert not plan.lower(before)
    assert 600 < best_pack_tokens(plan, longest=600) < before


def tiny_plan() -> MemoryPlan:
    """Room for 4,096 tokens * kept layers: a token kept in a layer takes 1 MB, all else next to nothing."""
    settings, big = StepSettings(rank=0, nf4=False), Calibration(1e6, 0.0)
    limit = predict(TINY, settings, tokens=4096, num_kept=0, calibration=big).total * 1.05
    return MemoryPlan(TINY, settings, limit + 1e5, big)


def test_best_pack_tokens_by_hand() -> None:
    plan = tiny_plan()
    assert [plan.num_kept(t) for t in (512, 2048, 2049, 4096, 4608)] == [2, 2, 1, 1, 0]
    # 2,048 tokens, both layers kept: 2 passes * (1 + d/2048); 4,096, one kept: 2.5 * (1 + d/4096)
    assert best_pack_tokens(plan, longest=300, dequant_tokens=440) == 2048  # 2.43 against 2.77
    assert best_pack_tokens(plan, longest=300, dequant_tokens=4000) == 4096  # 5.91 against 4.94
    assert best_pack_tokens(plan, longest=2100, dequant_tokens=440) == 4096
    assert best_pack_tokens(plan, longest=5000, dequant_tokens=440) == 5000  # does not fit, and has to be tried


def test_best_pack_tokens_of_scoring_is_the_largest_that_fits() -> None:
    plan = MemoryPlan(QWEN_32B, SCORING, 21.5 * GIB)
    best = best_pack_tokens(plan, longest=600)
    assert plan.fits(best) and not plan.fits(best + 512) and best % 512 == 0
    assert best_pack_tokens(MemoryPlan(QWEN_32B, SCORING, 79 * GIB), longest=600) == 16384


# ---- calibration


def simulated_peak(num_tokens: int, num_kept: int, *, fixed: float, a: float) -> float:
    """A card that keeps `a` bytes a token and layer, a recomputed one 10 kB, and where the live layer takes 76 kB more."""
    kept = max(num_kept, 1)  # the recomputed layer, in turn
    return fixed + num_tokens * (10240 * (64 - kept) + 75776 + kept * a)


@given(st.floats(0.7, 1.5), st.floats(0.8, 1.3), st.integers(200, 1000), st.integers(2048, 8192))
def test_two_probes_find_what_a_card_keeps(more: float, fixed: float, short: int, long: int) -> None:
    true = {"fixed": 20.16 * GIB * fixed, "a": 231424 * more}
    kept = MemoryPlan(QWEN_32B, TRAINING, 79 * GIB).num_kept(long)
    probes = [Probe(t, k, simulated_peak(t, k, **true)) for t, k in ((short, 0), (long, kept))]
    found = calibrate(QWEN_32B, TRAINING, probes)
    assert found.kept_bytes == pytest.approx(true["a"], rel=1e-6)
    for num_tokens in (300, 1024, 4096, 16384):
        for num_kept in (0, 1, 20, 64):
            estimate = predict(QWEN_32B, TRAINING, tokens=num_tokens, num_kept=num_kept, calibration=found)
            assert estimate.allocated == pytest.approx(simulated_peak(num_tokens, num_kept, **true), rel=0.01)


@pytest.mark.parametrize("peaks", [(0.0, 0.0), (1e15, 1e15), (5e10, 1e9), (1e9, 5e12), (2e10, 2e10)])
def test_a_broken_measurement_moves_constants_by_a_factor_of_2_at_most(peaks: tuple[float, float]) -> None:
    found = calibrate(QWEN_32B, TRAINING, [Probe(500, 0, peaks[0]), Probe(4096, 40, peaks[1])])
    assert 231424 / 2 <= found.kept_bytes <= 2 * 231424
    counted = predict(QWEN_32B, TRAINING, tokens=1, num_kept=0).fixed
    fixed = predict(QWEN_32B, TRAINING, tokens=1, num_kept=0, calibration=found).fixed
    assert counted / 2 <= fixed * (1 + 1e-9) and fixed <= 2 * counted * (1 + 1e-9)


def test_no_probe_is_predicted_too_low_when_a_constant_is_held_back() -> None:
    probes = [Probe(500, 0, 24 * GIB), Probe(4096, 40, 30 * GIB)]  # as if layers kept next to nothing
    found = calibrate(QWEN_32B, TRAINING, probes)
    assert found.kept_bytes == 231424 / 2
    for probe in probes:
        estimate = predict(QWEN_32B, TRAINING, tokens=probe.tokens, num_kept=probe.num_kept, calibration=found)
        assert estimate.allocated >= probe.peak_bytes * (1 - 1e-9)


def test_probes_of_the_same_weight_leave_what_was_counted() -> None:
    peak = predict(QWEN_32B, TRAINING, tokens=1000, num_kept=0).allocated
    found = calibrate(QWEN_32B, TRAINING, [Probe(1000, 0, peak + 5), Probe(1000, 1, peak + 5)])
    assert found == Calibration(231424, pytest.approx(5, abs=1e-3))


def test_calibration_takes_two_training_probes() -> None:
    with pytest.raises(ValueError, match="two training probes, not 1"):
        calibrate(QWEN_32B, TRAINING, [Probe(500, 0, 2e10)])
    with pytest.raises(ValueError, match="settings.training=False"):
        calibrate(QWEN_32B, SCORING, [Probe(500, 0, 2e10), Probe(4096, 0, 3e10)])


# ---- sizes as text


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("31.7GiB", 34037615820), ("31.7 GiB", 34037615820), ("31.7", 34037615820), ("32GB", 32 * 10**9), ("32gb", 32 * 10**9),
     ("800MiB", 800 * 2**20), ("800 MB", 8 * 10**8), (" 1 ", 2**30), (".5GiB", 2**29), ("1e-0GiB", None), ("0", None),
     ("0.0GiB", None), ("-3GiB", None), ("", None), ("GiB", None), ("31,7GiB", None), ("12TB", None), ("nan", None),
     ("inf", None), ("3 2GiB", None), ("9" * 400, None)],
)  # fmt: skip
def test_parse_memory(text: str, num_bytes: int | None) -> None:
    if num_bytes is not None:
        assert parse_memory(text) == num_bytes
        return
    with pytest.raises(argparse.ArgumentTypeError, match="is no size of memory; expected one such as 31.7GiB"):
        parse_memory(text)


def test_format_gib() -> None:
    assert format_gib(26.94 * GIB) == "26.9 GiB"


def test_needs_no_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, ksat.memory; assert 'torch' not in sys.modules"], check=True)
