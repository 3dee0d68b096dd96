"""The answer-only head against plain torch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from ksat import head as head_module
from ksat.head import Head

KINDS = {
    "plain": {"bias": None, "scale": 1.0, "softcap": None},
    "bias": {"bias": torch.linspace(-1, 1, 23).double(), "scale": 1.0, "softcap": None},
    "Cohere": {"bias": None, "scale": 0.25, "softcap": None},
    "Gemma 2": {"bias": None, "scale": 1.0, "softcap": 3.0},
}


def make(kind: str, dtype: Any = torch.float64) -> tuple[Head, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(23, 6, generator=generator, dtype=torch.float64).to(dtype)
    hidden = torch.randn(7, 6, generator=generator, dtype=torch.float64).to(dtype)
    return Head(weight, **KINDS[kind]), hidden.requires_grad_()  # type: ignore[arg-type]


def plain_logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("kind", KINDS)
def test_head_equals_plain_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "ROWS_AT_ONCE", 3)  # several chunks, the last one short
    head, hidden = make(kind)
    targets = torch.tensor([0, 22, 5, 5, 1, 9, 13])
    logits = plain_logits(head, hidden)
    torch.testing.assert_close(head.log_normalizer(hidden), logits.logsumexp(dim=-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head.target_logits(hidden, targets), logits[range(7), targets], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(head.log_normalizer, hidden)
    assert torch.autograd.gradcheck(lambda states: head.target_logits(states, targets), hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near(kind: str) -> None:
    """Sums in fp32 of products in bf16, whose 8 bits are 0.4 %; the gradient is a bf16 one, of the same value."""
    exact, states = make(kind)
    half, hidden = make(kind, torch.bfloat16)
    head = replace(half, bias=None if half.bias is None else half.bias.bfloat16())
    targets = torch.tensor([0, 22, 5, 5, 1, 9, 13])
    for found, expected in (
        (head.log_normalizer(hidden), exact.log_normalizer(states)),
        (head.target_logits(hidden, targets), exact.target_logits(states, targets)),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
        (gradient,) = torch.autograd.grad(found.sum(), hidden)
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(
            gradient.double(), torch.autograd.grad(expected.sum(), states)[0], rtol=0.03, atol=0.03
        )


def test_nothing_of_the_vocabulary_s_size_is_kept() -> None:
    head, hidden = make("Gemma 2")
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        head.log_normalizer(hidden)
        assert sizes == [7 * 6]
        head.target_logits(hidden[:2], torch.tensor([3, 4]))
    assert max(sizes[1:]) == 2 * 6
    with torch.no_grad():
        assert not head.log_normalizer(hidden).requires_grad
