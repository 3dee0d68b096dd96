"""The answer-only head: hidden states of the scored positions -> logits of the targets, without (T, vocabulary) logits."""

from dataclasses import dataclass
from typing import Any

import torch

ROWS_AT_ONCE = 128  # positions whose (rows, vocabulary) logits are alive at a time: 128 * 152,064 * 4 B = 74 MiB


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen output layer and what its family does to the logits.

    Attributes:
        weight: (V, h).
        bias: (V,) or None.
        scale: factor on the logits (Cohere's logit_scale, HyperCLOVA X's logits_scaling), 1 for most.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2), None for most.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def target_logits(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(S,) at least fp32: the logit of target s (S,) at hidden state s (S, h); only these rows of the head are read."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logits = (hidden.to(dtype) * self.weight[targets].to(dtype)).sum(dim=-1)
        if self.bias is not None:
            logits = logits + self.bias[targets].to(dtype)
        return self._transformed(logits)

    def log_normalizer(self, hidden: torch.Tensor) -> torch.Tensor:
        """(P,) at least fp32: log of the sum over the vocabulary of exp(logit), at hidden states (P, h)."""
        return _LogNormalizer.apply(hidden, self)  # type: ignore[no-any-return,no-untyped-call]

    def _transformed(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * self.scale if self.scale != 1 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, V) before the family's transformation, at least fp32."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _LogNormalizer(torch.autograd.Function):
    """log-sum-exp over the vocabulary. The head is frozen, so the only gradient is softmax(logits) @ weight (P, h): it is
    computed in the forward pass while the logits are there, and nothing of the vocabulary's size is kept."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Head) -> torch.Tensor:
        sums, slopes = [], []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in torch.split(hidden, ROWS_AT_ONCE):
                logits = head._transformed(head._logits(rows))  # (rows, V)
                sums.append(logits.logsumexp(dim=-1))
                if ctx.needs_input_grad[0]:
                    weights = logits.sub(sums[-1][:, None]).exp_()
                    if head.softcap is not None:
                        weights *= 1 - (logits / head.softcap) ** 2
                    slopes.append((weights.to(head.weight.dtype) @ head.weight) * head.scale)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes).to(hidden.dtype))
        return torch.cat(sums)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grads[0][:, None]).to(slopes.dtype), None


# Families whose head is a plain matmul, or one with a scale or a soft cap under these names of the configuration. Others
# go through the model's own forward.
def read_head(model: Any) -> Head:
    """The output layer of a transformers causal language model of a served family."""
    config = model.config.get_text_config()
    layer = model.get_output_embeddings()
    scale = {"cohere": "logit_scale", "cohere2": "logit_scale", "hyperclovax": "logits_scaling"}.get(config.model_type)
    softcap = config.final_logit_softcapping if config.model_type in ("gemma2", "gemma3_text") else None
    return Head(layer.weight, layer.bias, float(getattr(config, scale)) if scale else 1.0, softcap)
