"""A token embedding that stays in the machine's memory: 1.45 GiB less on the GPU for a 32B, at the price of a copy a pack."""

from typing import Any

import torch
from torch.nn import functional

from ksat.errors import InputError


class HostEmbedding(torch.nn.Module):
    """Looks rows up on the CPU and sends them to the device of the ids.

    Its matrix is no parameter: neither `.to(device)` of a trainer nor an optimizer finds it.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self._rows = weight.detach().cpu()  # (V, h)

    @property
    def weight(self) -> torch.Tensor:
        """(V, h), on the CPU."""
        return self._rows

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(..., h) rows of ids (...), on the ids' device."""
        return functional.embedding(ids.cpu(), self._rows).to(ids.device)


def offload_embedding(model: Any, base: str) -> None:
    """Puts a HostEmbedding in the place of the embedding of a base's model.

    Raises:
        InputError: the embedding is the head as well, which computes on the GPU, or does more than look up rows.
    """
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is not None and head.weight is embedding.weight:
        raise InputError(
            f"--base {base}: its embedding is its head as well, so --offload-embedding would free nothing; leave it out"
        )
    if type(embedding) is not torch.nn.Embedding:
        raise InputError(f"--base {base}: --offload-embedding knows no {type(embedding).__name__}; leave it out")
    model.set_input_embeddings(HostEmbedding(embedding.weight))
