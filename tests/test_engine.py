"""Exactness of the engine, family by family: packs with shared prefixes equal separate prompts through the plain model,
in log-probabilities and in every LoRA gradient."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import FAMILIES, WINDOW, base_folder, encode, encode_orders, load_base, make_config, make_questions
from torch.overrides import TorchFunctionMode

from ksat.attention import SERVED
from ksat.encoding import EncodedQuestion, Encoder
from ksat.errors import InputError
from ksat.packing import build_pack, plan_packs
from ksat.prompts import DEFAULT_TEMPLATES
from ksat.training import as_completion, choice_losses


class InDouble(TorchFunctionMode):
    """Keeps float64 where the models' code steps down to float32 (norms, softmax): else 1e-9 could not be asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float or (func is torch.Tensor.to and torch.float32 in args[1:]):
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    with InDouble():
        yield


SHARING = [family for family in FAMILIES if family != "lfm2"]
TOLERANCE = {"float64": 1e-9, "float32": 1e-4}


def with_adapter(family: str, dtype: str, *, nf4: bool = False, share_prefixes: bool = True) -> Any:
    """A tiny model whose LoRA does something: B is drawn at random, the same on every call."""
    model = load_base(base_folder(family), dtype=dtype, nf4=nf4, rank=4, share_prefixes=share_prefixes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.model.named_parameters()):
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
        if "lora_B" in name:
            parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
    model.model.zero_grad()
    return found


def plain_log_likelihoods(model: Any, question: EncodedQuestion) -> torch.Tensor:
    """(K,) by the model's own forward, every choice in a sequence of its own: no pack, no head, no attention of ours."""
    scores = []
    for branch, divisor in zip(question.continuations, question.divisors, strict=True):
        ids = torch.tensor([question.prompt_ids + branch])
        logits = model.model(input_ids=ids, logits_to_keep=len(branch) + 1, use_cache=False).logits[0, :-1]
        scores.append(logits.log_softmax(dim=-1)[torch.arange(len(branch)), torch.tensor(branch)].sum() / divisor)
    return torch.stack(scores)


def plain_step(family: str, dtype: str, questions: Sequence[EncodedQuestion], nf4: bool) -> tuple[list[Any], Any]:
    """Log-likelihoods and LoRA gradients of separate prompts: stock attention, PEFT's own LoRA."""
    from ksat import lora4bit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora4bit, "fuse_lora", lambda model: 0)
        model = with_adapter(family, dtype, nf4=nf4, share_prefixes=False)
    scores = []
    for question in questions:
        scores.append(plain_log_likelihoods(model, question))
        answer = torch.tensor([question.answer_index])
        (choice_losses(scores[-1][None], answer, 2.0).sum() / len(questions)).backward()
    return [row.detach().numpy() for row in scores], gradients(model)


def packed_step(
    model: Any, questions: Sequence[EncodedQuestion], pack_tokens: int, layout: Any = "tree"
) -> tuple[list[Any], Any]:
    """The same from packs."""
    scores: list[Any] = [None] * len(questions)
    for rows in plan_packs(questions, pack_tokens, layout=layout):
        pack = build_pack(questions, rows, layout=layout)
        result = model.choice_scores(pack, over_vocabulary=True)
        (choice_losses(result, torch.from_numpy(pack.answer_indices), 2.0).sum() / len(questions)).backward()
        for n, row in enumerate(rows):
            scores[row] = result[n, : len(questions[row].continuations)].detach().numpy()
    return scores, gradients(model)


def assert_same(one: tuple[list[Any], Any], other: tuple[list[Any], Any], tolerance: float) -> None:
    for left, right in zip(one[0], other[0], strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(other[1][name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("score_by", ["label", "text"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("family", SHARING)
def test_shared_prefixes_equal_separate_prompts(family: str, dtype: str, score_by: str) -> None:
    questions = encode(make_questions(8), score_by)
    assert all(len(question.prompt_ids) > 2 * WINDOW for question in questions)
    packed = with_adapter(family, dtype)
    assert packed.layout == "tree"
    reference = plain_step(family, dtype, questions, nf4=False)
    for pack_tokens in (100_000, 400, 1):
        assert_same(reference, packed_step(packed, questions, pack_tokens), TOLERANCE[dtype])


@pytest.mark.parametrize("family", SHARING)
def test_shared_equals_flat(family: str) -> None:
    questions = encode(make_questions(8), "text")
    model = with_adapter(family, "float64")
    assert_same(packed_step(model, questions, 600), packed_step(model, questions, 600, "flat"), 1e-9)


@pytest.mark.parametrize("family", SHARING)
def test_packs_of_an_nf4_base(family: str) -> None:
    questions = encode(make_questions(6), "label")
    packed = with_adapter(family, "float32", nf4=True)
    assert_same(plain_step(family, "float32", questions, nf4=True), packed_step(packed, questions, 500), 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_separate_prompts(family: str) -> None:
    questions = encode(make_questions(6), "text")
    rows = with_adapter(family, "float64", share_prefixes=False)
    assert rows.layout == "rows"
    assert_same(plain_step(family, "float64", questions, nf4=False), packed_step(rows, questions, 500, "rows"), 1e-9)


def test_a_vision_tower_gets_no_lora() -> None:
    names = [name for name, _ in with_adapter("gemma3-vision", "float32").model.named_parameters() if "lora_" in name]
    assert len(names) == 2 * 7 * 2
    assert all(".language_model.layers." in name for name in names)


@pytest.mark.parametrize("family", SHARING)
def test_recompute_changes_no_bit(family: str) -> None:
    questions = encode(make_questions(6), "text")
    model = with_adapter(family, "float32")
    model.model.train()
    results = []
    for num_kept in (2, 1, 0):
        model.keep_activations(num_kept)
        assert [layer.gradient_checkpointing for layer in model.layers] == [i < 2 - num_kept for i in range(2)]
        results.append(packed_step(model, questions, 500))
    for other in results[1:]:
        assert_same(results[0], other, 0.0)


def saved_bytes(model: Any, pack: Any) -> int:
    """Bytes that the forward pass of a pack keeps for its backward pass."""
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        scores = model.choice_scores(pack)
    del scores
    return sum(sizes.values())


def test_a_recomputed_layer_keeps_little() -> None:
    questions = encode(make_questions(6), "label")
    model = with_adapter("qwen2", "float32")
    model.model.train()
    pack = build_pack(questions, range(6))
    kept = []
    for num_kept in (0, 1, 2):
        model.keep_activations(num_kept)
        kept.append(saved_bytes(model, pack))
    hidden_bytes = pack.num_tokens * 32 * 4
    assert kept[1] - kept[0] > 4 * hidden_bytes
    assert kept[2] - kept[1] > 4 * hidden_bytes


@pytest.mark.parametrize("family", SHARING)
def test_choice_orders_shared_equal_orders_apart(family: str) -> None:
    questions = encode_orders(make_questions(4), 4)
    model = with_adapter(family, "float64")
    apart = [packed_step(model, [question], 10_000)[0][0] for question in questions]
    together, _ = packed_step(model, questions, 10_000)
    for left, right in zip(apart, together, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-9)
    shared, flat = (build_pack(questions, range(len(questions)), layout=layout) for layout in ("tree", "flat"))
    assert shared.num_tokens < 0.7 * flat.num_tokens


@pytest.mark.parametrize("score_by", ["label", "text"])
def test_vocab_loss_is_the_cross_entropy_over_the_vocabulary(score_by: str) -> None:
    """As TRL computes it: labels are -100 but for the answer's tokens, the mean over them."""
    question = encode(make_questions(1), score_by)[0]
    model = with_adapter("qwen2", "float64")
    plain = with_adapter("qwen2", "float64", share_prefixes=False)
    answer = question.continuations[question.answer_index]
    ids = torch.tensor([question.prompt_ids + answer])
    labels = torch.full_like(ids, -100)
    labels[0, len(question.prompt_ids) :] = torch.tensor(answer)
    expected = plain.model(input_ids=ids, labels=labels).loss
    got = -model.choice_scores(build_pack([as_completion(question)], [0]), over_vocabulary=True)[0, 0]
    assert got.item() == pytest.approx(expected.item(), abs=1e-9)


def test_by_label_the_normaliser_cancels() -> None:
    questions = encode(make_questions(5), "label")
    model = with_adapter("gemma2", "float64")
    pack = build_pack(questions, range(5))
    assert not pack.normalized
    bare, whole = model.choice_scores(pack), model.choice_scores(pack, over_vocabulary=True)
    torch.testing.assert_close(bare.softmax(dim=1), whole.softmax(dim=1), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(bare[:, 0], whole[:, 0])


def test_a_family_that_keeps_a_state_is_refused_with_its_fallback() -> None:
    with pytest.raises(InputError, match="tiny-lfm2.*can't share prefixes.*conv.*--no-share-prefixes"):
        load_base(base_folder("lfm2"))


def test_every_served_family_is_tested() -> None:
    tested = {load_base(base_folder(family)).decoder.config.model_type for family in SHARING}
    assert tested == set(SERVED)


def test_the_layer_that_overflows_is_named() -> None:
    questions = encode(make_questions(2), "label")
    model = with_adapter("qwen2", "float32")
    pack = build_pack(questions, range(2))
    assert model.first_overflow(pack) is None
    with torch.no_grad():
        model.layers[1].mlp.down_proj.base_layer.weight.fill_(float("inf"))
    assert model.first_overflow(pack) == "layer 1"


REAL_TOKENIZERS = {
    "qwen2": "qwen2_5",
    "qwen3": "qwen3",
    "llama": "llama3_1",
    "cohere": "command_r_plus",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
}


@pytest.mark.parametrize("family", REAL_TOKENIZERS)
def test_shared_prefixes_with_the_family_s_own_tokenizer(
    family: str, tokenizer_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its chat template, its BOS, its way to cut a choice into tokens, and its vocabulary's size."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(REAL_TOKENIZERS[family]))
    config = make_config(family, vocab_size=len(tokenizer), hidden_size=16)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, plain = (
        load_base(tmp_path, dtype="float64", share_prefixes=share_prefixes) for share_prefixes in (True, False)
    )
    for score_by in ("label", "text"):
        encoder = Encoder(tokenizer, DEFAULT_TEMPLATES[score_by], score_by, max_tokens=2048)
        questions = [encoder.encode(question) for question in make_questions(2)]
        pack = build_pack(questions, range(2))
        assert pack.num_tokens < build_pack(questions, range(2), layout="flat").num_tokens
        with torch.no_grad():
            found = model.choice_scores(pack, over_vocabulary=True).numpy()
            for n, question in enumerate(questions):
                expected = plain_log_likelihoods(plain, question).numpy()
                np.testing.assert_allclose(found[n, : len(expected)], expected, rtol=1e-9, atol=1e-9)
