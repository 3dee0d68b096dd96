"""Fused LoRA equals PEFT's own forward and gradients, keeps nothing but its input, and leaves to PEFT what it does not serve."""

import copy
from collections.abc import Iterator
from typing import Any

import bitsandbytes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import FAMILIES, base_folder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ksat.lora4bit import fuse_lora

IDS = torch.arange(3, 43).view(2, 20)

# All LoRA layers of these are served; models.load puts none on a vision tower.
TEXT_FAMILIES = [family for family in FAMILIES if family != "gemma3-vision"]


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def make_layer(kind: str = "plain", *, with_bias: bool = True, num_in: int = 32, num_out: int = 48, **lora: Any) -> Any:
    """A PEFT model around one linear layer of kind plain, nf4 or fp4, with a random LoRA of rank 4 (scaling 2)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(num_in, num_out, bias=with_bias))
    if kind != "plain":
        weights = model.state_dict()
        model[0] = bitsandbytes.nn.Linear4bit(num_in, num_out, with_bias, torch.float32, quant_type=kind)
        model.load_state_dict(weights)
        model.to("cpu")  # quantises
        model[0].support_avx512bf16_for_cpu = False  # it would repack the weights in evaluation
        model.is_loaded_in_4bit = True  # where PEFT looks
    return randomized(get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["0"]} | lora)))


def make_model(family: str, *, nf4: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    options: dict[str, Any] = {"dtype": dtype}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    base = AutoModelForCausalLM.from_pretrained(base_folder(family), **options)
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return randomized(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")))


def randomized(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def outputs_and_grads(model: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """y and the gradients of x and of all trainable parameters, for a loss in which no two outputs weigh the same."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = model(x) if x.is_floating_point() else model(input_ids=x).logits
    torch.autograd.backward(y, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **grads} | ({"x": x.grad} if x.grad is not None else {})


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Same keys and dtypes; the largest difference relative to the tensor's largest value."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert value.abs().max() > 0, key
        assert (actual[key].double() - value.double()).abs().max() <= tolerance * value.double().abs().max(), key


def lora_layers(model: Any) -> int:
    return sum(hasattr(module, "lora_A") for module in model.modules())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "nf4", "fp4"])
def test_layer_equals_peft(kind: str, bias: bool) -> None:
    model, x = make_layer(kind, with_bias=bias), torch.randn(2, 5, 32)
    expected = outputs_and_grads(model, x)
    assert set(expected) == {"y", "x"} | {f"base_model.model.0.lora_{k}.default.weight" for k in "AB"}
    assert fuse_lora(model) == 1
    assert "_FusedLora" in str(model(x).grad_fn.next_functions)
    assert_equal(outputs_and_grads(model, x), expected, 1e-6)


@given(st.lists(st.integers(0, 4), max_size=3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_layer_equals_its_formula(shape: list[int], num_in: int, num_out: int, rank: int, bias: bool) -> None:
    model = make_layer(num_in=num_in, num_out=num_out, with_bias=bias, r=rank).double()
    assert fuse_lora(model) == 1
    base, (A, B) = model.base_model.model[0].base_layer, [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(*shape, num_in, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.linear(x, base.weight, base.bias) + 8 / rank * (x @ A.t() @ B.t())
    actual = model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (x, A, B), weights),
        torch.autograd.grad(expected, (x, A, B), weights),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_model_equals_peft_in_float64(family: str) -> None:
    model = make_model(family).double()
    expected = outputs_and_grads(model, IDS)
    assert fuse_lora(model) == lora_layers(model) >= 14 - 3 * (family == "lfm2")
    assert_equal(outputs_and_grads(model, IDS), expected, 1e-12)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_model_equals_peft_in_nf4(family: str) -> None:
    model = make_model(family, nf4=True)
    expected = outputs_and_grads(model, IDS)
    assert fuse_lora(model) == lora_layers(model)
    assert_equal(outputs_and_grads(model, IDS), expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_float32_result(dtype: torch.dtype) -> None:
    model, x = make_layer("nf4"), torch.randn(64, 32).to(dtype)
    assert fuse_lora(model) == 1
    expected = outputs_and_grads(model, x.float())
    actual = outputs_and_grads(model, x)
    assert actual["y"].dtype == actual["x"].dtype == dtype
    assert_equal(actual, expected | {k: expected[k].to(dtype) for k in "xy"}, 4 * torch.finfo(dtype).eps)


def test_autocast_computes_and_returns_its_dtype() -> None:
    model, x = make_layer(), torch.randn(64, 32, requires_grad=True)
    fuse_lora(model)
    expected = outputs_and_grads(model, x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = outputs_and_grads(model, x)  # the backward in autocast too, which torch advises against
        assert model(x.double()).dtype == torch.float64  # as torch's own linear
    assert actual["x"].dtype == torch.float32
    assert_equal(actual, expected | {"x": expected["x"].float()}, 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
    assert x.grad is not None and torch.equal(x.grad, actual["x"])
    grad = torch.randn(64, 48)
    expected_grad = torch.autograd.grad(model(x), x, grad)
    y = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.autograd.grad(y, x, grad)[0], expected_grad[0])


class Computed(TorchDispatchMode):
    """Records the name and the outputs of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.operations.append((str(func), tuple(result.shape), result.dtype))
        return result

    def count(self, name: str) -> int:
        return sum(name in operation for operation, _, _ in self.operations)


def test_keeps_its_input_alone() -> None:
    model, x = make_layer("nf4"), torch.randn(2, 50, 32, dtype=torch.bfloat16, requires_grad=True)
    fuse_lora(model)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x)
    trainable = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    assert sorted(t.shape for t in kept) == [(2, 50, 32), (4, 32), (48, 4)]
    assert {t.data_ptr() for t in kept} == trainable | {x.data_ptr()}


def test_no_activation_becomes_float32() -> None:
    model, x = make_layer("nf4"), torch.randn(100, 32, dtype=torch.bfloat16, requires_grad=True)
    with Computed() as peft:
        model(x).sum().backward()
    fuse_lora(model)
    with Computed() as fused:
        model(x).sum().backward()

    def in_float32(computed: Computed) -> int:
        return sum(shape[:1] == (100,) and dtype == torch.float32 for _, shape, dtype in computed.operations)

    assert in_float32(fused) == 0 < in_float32(peft)
    assert fused.count("mm") == 9  # 3 forward; backward x A, its product with g, g B, its products with x and A, g W


def test_without_a_gradient_for_x_the_weight_is_dequantised_once() -> None:
    model, x = make_layer("nf4"), torch.randn(10, 32)
    fuse_lora(model)
    for needs_x, times in ((False, 1), (True, 2)):
        with Computed() as computed:
            model(x.detach().requires_grad_(needs_x)).sum().backward()
        assert computed.count("dequantize_4bit") == times


def test_gradients_go_to_those_who_want_them() -> None:
    model, x = make_layer(), torch.randn(10, 32)
    fuse_lora(model)
    expected = outputs_and_grads(model, x)
    name_A, name_B = (f"base_model.model.0.lora_{k}.default.weight" for k in "AB")
    model.get_parameter(name_A).requires_grad_(False)
    actual = outputs_and_grads(model, x)
    assert set(actual) == {"y", "x", name_B}
    assert_equal(actual, {k: expected[k] for k in ("y", "x", name_B)}, 0.0)
    with torch.no_grad():
        assert torch.equal(model(x), expected["y"]) and model(x).grad_fn is None
    x.requires_grad_()
    for _ in range(2):  # gradients add up, and the output may be changed in place
        model(x).mul_(2.0).backward(torch.linspace(-1, 1, 480).view(10, 48))
    torch.testing.assert_close(x.grad, 4 * expected["x"])
    first, *_ = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to 4-bit")
def test_switches_of_peft_work(kind: str) -> None:
    model, x = make_layer(kind), torch.randn(10, 32)
    plain = copy.deepcopy(model)
    fuse_lora(model)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(x), plain(x)) and torch.equal(model(x), model.base_model.model[0].base_layer(x))
    assert not torch.equal(model(x), model.base_model.model[0].base_layer(x))
    for each in (model, plain):
        each.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
        each.set_adapter("other")
        nn.init.ones_(each.base_model.model[0].lora_B["other"].weight)
        nn.init.ones_(each.base_model.model[0].lora_A["other"].weight)
    torch.testing.assert_close(model(x), plain(x))
    for each in (model, plain):
        each.base_model.set_adapter(["default", "other"])  # two at once are PEFT's
    assert torch.equal(model(x), plain(x))
    for each in (model, plain):
        each.set_adapter("default")
    names = ["default"] * 4 + ["__base__"] * 6
    assert torch.equal(model.eval()(x, adapter_names=names), plain.eval()(x, adapter_names=names))
    for each in (model, plain):
        each.merge_adapter()
    assert torch.equal(model(x), plain(x)) and fuse_lora(copy.deepcopy(model)) == 0
    for each in (model, plain):
        each.unmerge_adapter()
    torch.testing.assert_close(model(x), plain(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@pytest.mark.parametrize(
    "lora",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"init_lora_weights": "mica"},
    ],
)
def test_leaves_to_peft_what_it_does_not_serve(lora: dict[str, Any]) -> None:
    model, x = make_layer(**lora), torch.randn(10, 32)
    assert fuse_lora(model) == 0
    assert "_FusedLora" not in str(model(x).grad_fn.next_functions)


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_other_bases_are_left_to_peft() -> None:
    assert fuse_lora(get_peft_model(nn.Sequential(Doubling(8, 4)), LoraConfig(target_modules=["0"]))) == 0
    model = make_layer()
    model.base_model.model[0].base_layer.weight.requires_grad_()
    assert fuse_lora(model) == 0
    embedding = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 4))
    assert fuse_lora(get_peft_model(embedding, LoraConfig(r=2, target_modules=["0", "1"]))) == 1
    assert fuse_lora(nn.Linear(3, 3)) == 0


@pytest.mark.parametrize("nf4", [False, True])
def test_recomputing_changes_no_bit(nf4: bool) -> None:
    model = make_model("qwen2", nf4=nf4)
    fuse_lora(model)
    expected = outputs_and_grads(model, IDS)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_equal(outputs_and_grads(model, IDS), expected, 0.0)
    layer, x = make_layer(), torch.randn(10, 32)
    fuse_lora(layer)
    expected = outputs_and_grads(layer, x)
    once_more = nn.Module()
    once_more.base_model = layer.base_model
    once_more.forward = lambda x: checkpoint(layer, x, use_reentrant=False)
    assert_equal(outputs_and_grads(once_more, x), expected, 0.0)


def test_saved_adapter_is_an_ordinary_one(tmp_path: Any) -> None:
    model = make_model("qwen2").eval()
    fuse_lora(model)
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder("qwen2")), tmp_path)
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
