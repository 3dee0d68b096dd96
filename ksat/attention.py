"""Attention over the segments of a pack: every token sees its ancestors in the radix tree and its own segment, causally.

Registered with transformers' attention interface as "ksat"; the plan of a pack travels to every layer as the keyword
`attention_plan`. One kernel per kind of device:

- "varlen": variable-length flash attention, one call a layer (CUDA from compute capability 8.0, half precision);
- "segments": one memory-efficient SDPA call a segment, lower-right causal behind its ancestors (older cards, float32, CPU).
  On CUDA the backend is pinned, so that falling back to the math kernel is an error and not a surprise of memory;
- plain matmul and softmax a segment where scores are soft-capped (Gemma 2), which no fused kernel of torch serves.
"""

import contextlib
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ksat.errors import InputError
from ksat.packing import Pack, ancestors

Kernel = Literal["varlen", "segments"]
NAME = "ksat"
# Model types whose packs are tested to equal separate prompts. Their attention goes through transformers' interface and
# depends on nothing but positions, a window and a soft cap.
SERVED = frozenset(
    ("qwen2", "qwen3", "llama", "mistral", "cohere", "cohere2", "gemma2", "gemma3_text", "exaone4", "hyperclovax")
)


# Those whose sequences Unsloth's packed attention keeps apart. Gemma 2's see each other there without flash-attn (measured:
# log-probabilities 8 apart), without a word; HyperCLOVA X was not tried.
SERVED_BY_UNSLOTH = SERVED - {"gemma2", "hyperclovax"}


def require_served(base: str, config: Any) -> None:
    """Raises InputError unless packs of this family may share prefixes."""
    others = _layer_types(config) - {"full_attention", "sliding_attention"}
    if config.model_type in SERVED and not others:
        return
    reason = (
        f"its layers {sorted(others)} keep a state" if others else f"model type {config.model_type!r} is not tested"
    )
    raise InputError(
        f"--base {base}: prompts can't share prefixes here ({reason}; served: {', '.join(sorted(SERVED))}); pass "
        "--no-share-prefixes, which computes every prompt in a row of its own"
    )


def require_served_by_unsloth(base: str, config: Any) -> None:
    """Raises InputError unless Unsloth keeps the sequences of a pack of this family apart."""
    if config.model_type not in SERVED_BY_UNSLOTH or _layer_types(config) - {"full_attention", "sliding_attention"}:
        raise InputError(
            f"--base {base}: Unsloth does not keep the prompts of a pack apart for model type {config.model_type!r} (served: "
            f"{', '.join(sorted(SERVED_BY_UNSLOTH))}); use --engine transformers"
        )


def _layer_types(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or [])


def choose_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel for a device and the dtype of queries and keys."""
    half = dtype in (torch.float16, torch.bfloat16)
    return (
        "varlen"
        if device.type == "cuda" and half and torch.cuda.get_device_capability(device) >= (8, 0)
        else "segments"
    )


class AttentionPlan:
    """Where the tokens of one pack look: built once a pack, read by every layer.

    Attributes:
        spans: for each segment its queries (start, end) and the spans of keys it sees, root first, its own last.
        num_calls: layers that used the plan; LanguageModel checks that every layer did.
    """

    def __init__(self, pack: Pack, device: torch.device) -> None:
        self.device = device
        self.num_calls = 0
        self.spans: list[tuple[tuple[int, int], list[tuple[int, int]]]] = []
        for i, segment in enumerate(pack.segments):
            chain = [pack.segments[a] for a in (*ancestors(pack.segments, i), i)]
            self.spans.append(((segment.start, segment.end), _joined([(s.start, s.end) for s in chain])))
        self._masks: dict[tuple[int, int, int | None], torch.Tensor] = {}
        self._varlen: dict[str, Any] | None = None

    def mask(self, num_queries: int, num_keys: int, window: int | None) -> torch.Tensor:
        """(queries, keys) True where seen: the queries are the last of the keys' positions, behind a window if there is one."""
        key = (num_queries, num_keys, window)
        if key not in self._masks:
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=self.device)
            seen = ones.tril(num_keys - num_queries)
            if window is not None:
                seen &= ones.triu(num_keys - num_queries - window + 1)
            self._masks[key] = seen
        return self._masks[key]

    def varlen(self) -> dict[str, Any]:
        """What the varlen kernel takes: cumulative lengths of queries and keys, and the keys' order (None: as they are)."""
        if self._varlen is None:
            query_lengths = [end - start for (start, end), _ in self.spans]
            key_lengths = [sum(end - start for start, end in keys) for _, keys in self.spans]
            order = None
            if key_lengths != query_lengths:
                every = np.concatenate([np.arange(start, end) for _, keys in self.spans for start, end in keys])
                order = torch.from_numpy(every).to(self.device)
            self._varlen = {
                "cu_seq_q": self._cumulative(query_lengths),
                "cu_seq_k": self._cumulative(key_lengths),
                "max_q": max(query_lengths),
                "max_k": max(key_lengths),
                "order": order,
            }
        return self._varlen

    def _cumulative(self, lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32, device=self.device)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same spans, neighbours that touch made one: fewer copies."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_plan: AttentionPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention output (1, T, H, D) of one layer over one pack, in the signature of transformers' attention interface.

    Args:
        module: the attention layer.
        query: (1, H, T, D).
        key: (1, Hkv, T, D).
        value: (1, Hkv, T, D).
        attention_mask: not used; the plan says who sees whom.
        attention_plan: of this pack.
        scaling: of the scores; 1 / sqrt(D) if None.
        dropout: must be 0, as it is in all bases.
        sliding_window: keys a query sees, itself included; None sees all.
        softcap: scores become softcap * tanh(scores / softcap); None leaves them.
        **kwargs: what else a family hands on.

    Raises:
        NotImplementedError: attention dropout or attention sinks, which no served family has.
    """
    if dropout or kwargs.get("s_aux") is not None:
        raise NotImplementedError(f"{type(module).__name__}: attention dropout or sinks are not served by packs")
    attention_plan.num_calls += 1
    if softcap is None and choose_kernel(query.device, query.dtype) == "varlen":
        return _varlen(query, key, value, attention_plan, scaling, sliding_window), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # enable_gqa can fall back to the math kernel without a word
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outputs = []
    with _pinned(query.device):
        for (start, end), spans in attention_plan.spans:
            part = (query[:, :, start:end], _gather(key, spans), _gather(value, spans))
            if softcap is None:
                outputs.append(_efficient(*part, attention_plan, scale, sliding_window))
            else:
                outputs.append(_softcapped(*part, attention_plan, scale, sliding_window, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _pinned(device: torch.device) -> Any:
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]) if device.type == "cuda" else contextlib.nullcontext()


def _gather(states: torch.Tensor, spans: list[tuple[int, int]]) -> torch.Tensor:
    """(1, H, K, D) the states of these spans; a view if there is only one."""
    parts = [states[:, :, start:end] for start, end in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    shape = plan.varlen()
    q, k, v = (states[0].transpose(0, 1).contiguous() for states in (query, key, value))  # (T, H, D)
    if shape["order"] is not None:
        k, v = k[shape["order"]], v[shape["order"]]
    # Flash attention aligns causality and window with the last key: a segment's queries stand behind its ancestors.
    output: Any = varlen_attn(
        q, k, v, shape["cu_seq_q"], shape["cu_seq_k"], shape["max_q"], shape["max_k"], scale=scale,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return output[None]  # type: ignore[no-any-return]


def _efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    mask: Any = None
    if window is not None and num_keys > window:
        mask = plan.mask(num_queries, num_keys, window)
    elif 1 < num_queries < num_keys:  # one query, the last, sees every key
        on_cuda = query.device.type == "cuda"
        mask = causal_lower_right(num_queries, num_keys) if on_cuda else plan.mask(num_queries, num_keys, None)
    is_causal = mask is None and num_queries == num_keys
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale)


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    softcap: float,
) -> torch.Tensor:
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scale / softcap))
    hidden = ~plan.mask(query.shape[2], key.shape[2], window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(
        dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    return weights.to(query.dtype) @ value


def register() -> None:
    """Makes the attention known to transformers under NAME."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
