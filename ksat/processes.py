"""One process, or several under `accelerate launch` or torchrun: each computes its share, the first writes the files."""

import atexit
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def num_processes() -> int:
    """How many processes share the work."""
    # A scheduler may set WORLD_SIZE alone; a launcher sets both.
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def start(*, on_cpu: bool) -> None:
    """Connects the processes (gloo on the CPU, nccl on CUDA), gives each its GPU, and silences all but the first."""
    if num_processes() == 1:
        return
    from accelerate import PartialState

    # Who is done with scoring early waits for the others, which may take hours.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=1))
    import torch.distributed

    # Threads of gloo that are alive when a process ends would abort it, and the launcher would then kill the others.
    atexit.register(torch.distributed.destroy_process_group)
    if not on_cpu:
        torch.cuda.set_device(state.device)
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for as long as the process lives


def share(items: Sequence[Any]) -> list[Any]:
    """Every num_processes()-th item, beginning with this process's number: with packs, longest first, a fair share."""
    return list(items[rank() :: num_processes()])


def wait() -> None:
    """Returns when all processes have come here."""
    if num_processes() > 1:
        import torch.distributed

        torch.distributed.barrier()


def agree(value: Any) -> Any:
    """The first process's value, in all processes."""
    if num_processes() == 1:
        return value
    import torch.distributed

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def join(mine: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of all processes."""
    if num_processes() == 1:
        return dict(mine)
    import torch.distributed

    parts: list[Any] = [None] * num_processes()
    torch.distributed.all_gather_object(parts, dict(mine))
    return {key: value for part in parts for key, value in part.items()}


def add_up(tensors: "Sequence[torch.Tensor]") -> None:
    """Replaces each tensor by its sum over the processes."""
    if num_processes() > 1:
        import torch.distributed

        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
