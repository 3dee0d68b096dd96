"""The known bases: counts are sums over shapes, shapes are what transformers builds, figures are the team's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import base_folder
from transformers import AutoConfig, AutoModelForCausalLM

from ksat.bases import KNOWN_BASES, KnownBase, find_base, find_local_base, read_base
from ksat.errors import InputError
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


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"model_type": "qwen3_moe", "num_experts": 8}, "a mixture of experts"),
        ({"model_type": "starcoder2"}, "a decoder without gated MLPs"),
        ({"num_hidden_layers": -3}, "a size below 1|can't be loaded"),
        ({"num_attention_heads": 0}, "lacks what a shape is made of|can't be loaded"),
        ({"hidden_size": "a"}, "can't be loaded"),
    ],
)
def test_configs_of_which_no_shape_follows(tmp_path: Path, changed: dict[str, Any], match: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(json.loads((base_folder() / "config.json").read_text()) | changed))
    with pytest.raises(InputError, match=match):
        read_base(str(tmp_path))


def test_bases_are_found_by_their_name_and_named_once() -> None:
    assert len({base.name for base in KNOWN_BASES}) == len(KNOWN_BASES)
    assert find_base("skt/A.X-4.0-Light") in KNOWN_BASES
    assert find_base("nobody/nothing") is None


@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "llama", "mistral", "cohere", "cohere2", "gemma2", "gemma3_text", "exaone4"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_config_s_file_tells_what_transformers_reads_of_it(tmp_path: Path, family: str, tied: bool) -> None:
    """Families leave out what is their own default."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    AutoConfig.for_model(family, **sizes, vocab_size=500, tie_word_embeddings=tied).save_pretrained(tmp_path)
    found, read = find_local_base(str(tmp_path)), read_base(str(tmp_path))
    assert found is not None
    assert found.num_parameters <= read.num_parameters
    assert (found.shape.num_block_weights, found.is_quantized) == (read.shape.num_block_weights, False)
