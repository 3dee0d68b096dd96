"""Attention over segments against a dense masked softmax, and the bookkeeping of the GPU's kernel."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ksat.attention import AttentionPlan, attend, choose_kernel
from ksat.encoding import EncodedQuestion
from ksat.packing import Pack, build_pack, visible

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM = 4, 2, 8


@st.composite
def packs(draw: st.DrawFn) -> Pack:
    """Trees of a few tokens with many shared prefixes."""
    ids = st.lists(st.integers(1, 2), min_size=1, max_size=9).map(tuple)
    rows = draw(st.lists(st.tuples(ids, st.lists(ids, min_size=2, max_size=3)), min_size=1, max_size=4))
    questions = [
        EncodedQuestion(f"q{i}", prompt, tuple(choices), (1.0,) * len(choices), 0)
        for i, (prompt, choices) in enumerate(rows)
    ]
    return build_pack(questions, range(len(rows)))


def states(pack: Pack) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, pack.num_tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)


def dense(pack: Pack, q: Any, k: Any, v: Any, *, window: int | None, softcap: float | None) -> torch.Tensor:
    """The definition, by the pack's mask and position ids."""
    seen = visible(pack)
    if window is not None:
        seen &= pack.position_ids[:, None] - pack.position_ids[None, :] < window
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    scores = q @ k.transpose(2, 3) * DIM**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~torch.from_numpy(seen), -torch.inf).softmax(dim=-1)
    return (weights @ v).transpose(1, 2)


@given(packs(), st.sampled_from([None, 1, 3, 100]), st.sampled_from([None, 2.0]))
@settings(deadline=None, max_examples=60)
def test_segments_equal_the_dense_definition(pack: Pack, window: int | None, softcap: float | None) -> None:
    q, k, v = states(pack)
    plan = AttentionPlan(pack, CPU)
    found, _ = attend(None, q, k, v, None, attention_plan=plan, sliding_window=window, softcap=softcap)
    expected = dense(pack, q, k, v, window=window, softcap=softcap)
    assert plan.num_calls == 1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(packs(), st.sampled_from([None, 1, 3]))
@settings(deadline=None, max_examples=60)
def test_what_the_varlen_kernel_is_given_says_the_same(pack: Pack, window: int | None) -> None:
    """Flash attention's contract, spelt out: sequence i has queries cu_q[i]:cu_q[i+1] and keys cu_k[i]:cu_k[i+1], causal and
    windowed from the last key backwards."""
    q, k, v = (tensor.detach() for tensor in states(pack))
    shape = AttentionPlan(pack, CPU).varlen()
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    if shape["order"] is not None:
        k, v = k[:, :, shape["order"]], v[:, :, shape["order"]]
    found = torch.zeros_like(q)
    cu_q, cu_k = shape["cu_seq_q"].tolist(), shape["cu_seq_k"].tolist()
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        place = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        distance = place - torch.arange(k1 - k0)[None, :]
        hidden = (distance < 0) | (distance > (window - 1 if window else 10_000))
        scores = (q[:, :, q0:q1] @ k[:, :, k0:k1].transpose(2, 3) * DIM**-0.5).masked_fill(hidden, -torch.inf)
        found[:, :, q0:q1] = scores.softmax(dim=-1) @ v[:, :, k0:k1]
    expected = dense(pack, q, *(tensor.detach() for tensor in states(pack)[1:]), window=window, softcap=None)
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-9, atol=1e-9)
    assert shape["max_q"] == max(np.diff(cu_q))
    assert shape["max_k"] == max(np.diff(cu_k))


def test_the_plan_of_a_pack_by_hand() -> None:
    question = EncodedQuestion("q", (1, 2, 3), ((4, 5, 6), (7, 8)), (1.0, 1.0), 0)
    plan = AttentionPlan(build_pack([question], [0]), CPU)
    assert plan.spans == [((0, 3), [(0, 3)]), ((3, 5), [(0, 5)]), ((5, 6), [(0, 3), (5, 6)])]
    shape = plan.varlen()
    assert shape["cu_seq_q"].tolist() == [0, 3, 5, 6]
    assert shape["cu_seq_k"].tolist() == [0, 3, 8, 12]
    assert shape["order"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 5]
    assert (shape["max_q"], shape["max_k"]) == (3, 5)


def test_packs_that_share_nothing_gather_nothing() -> None:
    question = EncodedQuestion("q", (1, 2, 3), ((4,), (7,)), (1.0, 1.0), 0)
    assert AttentionPlan(build_pack([question], [0]), CPU).varlen()["order"] is None


@pytest.mark.parametrize("more", [{"dropout": 0.1}, {"s_aux": torch.zeros(4)}])
def test_what_is_not_served_is_an_error(more: dict[str, Any]) -> None:
    question = EncodedQuestion("q", (1, 2, 3), ((4,), (7,)), (1.0, 1.0), 0)
    pack = build_pack([question], [0])
    with pytest.raises(NotImplementedError, match="dropout or sinks"):
        attend(None, *states(pack), None, attention_plan=AttentionPlan(pack, CPU), **more)


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "kernel"),
    [
        ("cpu", torch.float32, (0, 0), "segments"),
        ("cuda", torch.float16, (7, 0), "segments"),
        ("cuda", torch.float32, (9, 0), "segments"),
        ("cuda", torch.bfloat16, (8, 0), "varlen"),
        ("cuda", torch.float16, (9, 0), "varlen"),
    ],
)
def test_kernels(monkeypatch: pytest.MonkeyPatch, device: str, dtype: Any, capability: Any, kernel: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert choose_kernel(torch.device(device), dtype) == kernel
