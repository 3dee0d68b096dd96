"""The known bases: counts are sums over shapes, shapes are what transformers builds, figures are the team's."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ksat.bases import KNOWN_BASES, KnownBase, find_base
from ksat.memory import ModelShape

TEN = KNOWN_BASES[:10]


def text_config(base: KnownBase) -> Any:
    """The config of a base's decoder; EXAONE 3, which transformers does not have, is Llama's decoder by other names."""
    shape = base.shape
    family = {"gemma3": "gemma3_text", "exaone": "llama"}.get(base.family, base.family)
    return AutoConfig.for_model(
        family,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.kv_dim * shape.num_heads // shape.q_dim,
        head_dim=shape.q_dim // shape.num_heads,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        **({"use_post_norm": True} if family == "hyperclovax" else {}),
    )


@pytest.mark.parametrize("base", KNOWN_BASES, ids=lambda base: base.name)
def test_a_count_is_the_sum_over_the_shape(base: KnownBase) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config(base))
    decoder = sum(parameter.numel() for parameter in model.parameters())
    assert decoder + base.num_vision_parameters == base.num_parameters
    # Norms and biases are left out of the shape's sums.
    assert base.shape.num_parameters == pytest.approx(decoder, rel=1e-3)


@pytest.mark.parametrize("base", KNOWN_BASES, ids=lambda base: base.name)
def test_a_shape_is_that_of_the_config(base: KnownBase) -> None:
    assert ModelShape.from_config(text_config(base)) == base.shape


def test_the_ten_come_first_with_what_the_team_reported() -> None:
    assert all(base.public is not None and base.private is not None for base in TEN)
    assert all(base.public is None for base in KNOWN_BASES[10:])
    best = max(TEN, key=lambda base: base.public or 0.0)
    assert (best.name, best.public, best.private) == ("unsloth/Qwen2.5-32B-Instruct-bnb-4bit", 0.7765, 0.7448)
    assert sum(base.kowiki for base in TEN) == 3
    assert sum(base.public or 0.0 for base in TEN) == pytest.approx(6.5783)  # of the mission's table
    assert sum(base.private or 0.0 for base in TEN) == pytest.approx(6.2482)


def test_bases_are_found_by_their_name_and_named_once() -> None:
    assert len({base.name for base in KNOWN_BASES}) == len(KNOWN_BASES)
    assert find_base("skt/A.X-4.0-Light") in KNOWN_BASES
    assert find_base("nobody/nothing") is None
