"""Where a model runs: this machine's GPU, or its processor."""

import os
import resource
from dataclasses import dataclass, replace
from typing import Literal

from ksat import processes
from ksat.errors import InputError
from ksat.memory import CONTEXT_BYTES


@dataclass(frozen=True, slots=True)
class Device:
    """Where the model runs.

    Attributes:
        kind: "cuda" or "cpu".
        name: as the driver calls it.
        capability: CUDA compute capability, (0, 0) on the CPU.
        memory_gib: memory of the card, 0 on the CPU.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    capability: tuple[int, int]
    memory_gib: float


# What torch says of these cards' memory, the lower figure where drivers differ.
GPUS = {
    "t4": Device("cuda", "T4 16 GB", (7, 5), 14.56),
    "3090": Device("cuda", "RTX 3090 24 GB", (8, 6), 23.56),
    "4090": Device("cuda", "RTX 4090 24 GB", (8, 9), 23.52),
    "v100-32gb": Device("cuda", "V100 32 GB", (7, 0), 31.73),
    "a100-40gb": Device("cuda", "A100 40 GB", (8, 0), 39.38),
    "a100-80gb": Device("cuda", "A100 80 GB", (8, 0), 79.14),
    "h100": Device("cuda", "H100 80 GB", (9, 0), 79.10),
    "h200": Device("cuda", "H200 141 GB", (9, 0), 139.71),
}


def find_device(asked: str) -> Device:
    """The device for --device auto|cuda|cpu.

    Raises:
        InputError: cuda was asked for and there is none.
    """
    import torch

    if asked != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        return Device("cuda", properties.name, capability, properties.total_memory / 2**30)
    if asked == "cuda":
        raise InputError(
            "--device cuda: torch sees no CUDA GPU; check nvidia-smi and the installed torch, or use --device cpu"
        )
    return Device("cpu", f"{os.cpu_count()} CPU cores", (0, 0), 0.0)


def open_device(asked: str, gpu_memory: int | None, *, offload_embedding: bool = False) -> Device:
    """The device for --device, ready for this process: connected with the others, capped to `gpu_memory` bytes if given.

    Raises:
        InputError: as find_device; or a cap without a GPU, or above what the GPU has; or no GPU to offload from.
    """
    device = find_device(asked)
    if offload_embedding and device.kind == "cpu":
        raise InputError("--offload-embedding: there is no GPU to free; leave it out")
    processes.start(on_cpu=device.kind == "cpu")
    if gpu_memory is None:
        return device
    if device.kind == "cpu":
        raise InputError("--gpu-memory: there is no GPU to cap; leave it out")
    if gpu_memory > device.memory_gib * 2**30:
        raise InputError(
            f"--gpu-memory {gpu_memory / 2**30:.1f}GiB: {device.name} has {device.memory_gib:.1f} GiB; give less, or leave it out"
        )
    import torch

    # The cap is for torch's own memory; the context takes its share of a card beside it.
    fraction = (gpu_memory - CONTEXT_BYTES) / (device.memory_gib * 2**30)
    torch.cuda.set_per_process_memory_fraction(max(0.0, fraction))
    return replace(device, memory_gib=gpu_memory / 2**30)


def peak_memory_gib() -> float:
    """Peak memory so far: the GPU's if one is in use, else this process's."""
    import torch

    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
