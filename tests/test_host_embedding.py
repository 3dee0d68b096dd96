"""An embedding in the machine's memory: the same results, out of a trainer's reach, and only where it frees something."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import base_folder, encode, make_questions

from ksat.devices import Device
from ksat.errors import InputError
from ksat.host_embedding import HostEmbedding
from ksat.models import LoadSettings, LoraSettings, choose_engine, load
from ksat.scoring import score_questions

CPU = Device("cpu", "test", (0, 0), 0.0)
H100 = Device("cuda", "H100", (9, 0), 79.0)


def load_tiny(base: str, *, offload: bool, nf4: bool = False) -> object:
    settings = LoadSettings(base, "transformers", CPU, "float32", nf4, 2048, offload_embedding=offload)
    return load(settings, lora=LoraSettings(4, 4.0, 0.0, True), seed=0)


@pytest.mark.parametrize("nf4", [False, True])
def test_scores_and_gradients_are_the_same(nf4: bool) -> None:
    from ksat.packing import build_pack

    questions = encode(make_questions(6), "label")
    scores, gradients = [], []
    for offload in (False, True):
        model = load_tiny(str(base_folder()), offload=offload, nf4=nf4)
        scores.append(score_questions(model, questions, pack_tokens=600))
        model.choice_scores(build_pack(questions, range(6)))[:, 0].sum().backward()
        gradients.append({name: p.grad for name, p in model.model.named_parameters() if p.grad is not None})
    np.testing.assert_array_equal(scores[0], scores[1])
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


def test_a_trainer_that_moves_the_model_leaves_it_where_it_is() -> None:
    model = load_tiny(str(base_folder()), offload=True)
    embedding = model.decoder.get_input_embeddings()
    assert isinstance(embedding, HostEmbedding)
    model.model.to("meta")
    assert embedding.weight.device.type == "cpu"
    assert {parameter.device.type for parameter in model.model.parameters()} == {"meta"}
    assert embedding(torch.tensor([[1, 2]])).shape == (1, 2, 32)
    assert not any("embed" in name for name, _ in model.model.named_parameters())


def test_a_tied_base_has_nothing_to_offload() -> None:
    with pytest.raises(
        InputError, match="its embedding is its head as well, so --offload-embedding would free nothing"
    ):
        load_tiny("embedded-small", offload=True)


def test_the_engine_is_transformers() -> None:
    assert choose_engine("auto", H100, offload_embedding=True) == "transformers"
    with pytest.raises(InputError, match="--engine unsloth"):
        choose_engine("unsloth", H100, offload_embedding=True)


def test_the_adapter_is_saved_without_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = load_tiny(str(base_folder()), offload=True)
    model.model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
