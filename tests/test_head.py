"""The answer-only head against plain torch."""

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


def test_half_precision_is_near() -> None:
    exact, states = make("plain")
    head, hidden = make("plain", torch.bfloat16)
    found = head.log_normalizer(hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact.log_normalizer(states), rtol=0.02, atol=0.02)
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_nothing_of_the_vocabulary_s_size_is_kept() -> None:
    head, hidden = make("plain")
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        head.log_normalizer(hidden)
    assert sizes == [7 * 6]
    with torch.no_grad():
        assert not head.log_normalizer(hidden).requires_grad
