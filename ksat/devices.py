"""Where a model runs: this machine's GPU, or its processor."""

import math
import os
import re
import resource
import time
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
        tflops: half-precision matmuls with fp32 accumulation by the card's data sheet, dense; None where not known.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    capability: tuple[int, int]
    memory_gib: float
    tflops: float | None = None


# Memory is what torch says of the card, the lower figure where drivers differ; those of the A10, P100, 4060, 4070
# and 5060 Ti are not from a log that was seen. TFLOPS are NVIDIA's data sheets' and white papers', None where neither was at hand.
GPUS = {
    "4060": Device("cuda", "RTX 4060 8 GB", (8, 9), 7.6),
    "3060-12gb": Device("cuda", "RTX 3060 12 GB", (8, 6), 11.6),
    "4070": Device("cuda", "RTX 4070 12 GB", (8, 9), 11.6),
    "t4": Device("cuda", "T4 16 GB", (7, 5), 14.56, 65.0),
    "5060ti-16gb": Device("cuda", "RTX 5060 Ti 16 GB", (12, 0), 15.4),
    "4060ti-16gb": Device("cuda", "RTX 4060 Ti 16 GB", (8, 9), 15.57),
    "p100": Device("cuda", "P100 16 GB", (6, 0), 15.88, 18.7),
    "a10": Device("cuda", "A10 24 GB", (8, 6), 21.9, 125.0),
    "l4": Device("cuda", "L4 24 GB", (8, 9), 22.16, 121.0),
    "4090": Device("cuda", "RTX 4090 24 GB", (8, 9), 23.52, 165.2),
    "3090": Device("cuda", "RTX 3090 24 GB", (8, 6), 23.56, 71.0),
    "5090": Device("cuda", "RTX 5090 32 GB", (12, 0), 31.34, 209.5),
    "v100-32gb": Device("cuda", "V100 32 GB", (7, 0), 31.73, 125.0),
    "a100-40gb": Device("cuda", "A100 40 GB", (8, 0), 39.38, 312.0),
    "l40s": Device("cuda", "L40S 48 GB", (8, 9), 44.39, 362.0),
    "a6000": Device("cuda", "RTX A6000 48 GB", (8, 6), 44.42, 154.8),
    "a100-80gb": Device("cuda", "A100 80 GB", (8, 0), 79.14, 312.0),
    "h100": Device("cuda", "H100 80 GB", (9, 0), 79.10, 989.0),
    "pro-6000": Device("cuda", "RTX PRO 6000 96 GB", (12, 0), 94.97),
    "h200": Device("cuda", "H200 141 GB", (9, 0), 139.71, 989.0),
}


def tflops_of(name: str) -> float | None:
    """TFLOPS of the card that the driver calls so, None unless GPUS has just that model: a 4070 is no 4070 Ti."""
    for gpu in GPUS.values():
        model = gpu.name.rsplit(" ", 2)[0]
        if re.search(rf"\b{model}\b(?! (?:Ti|SUPER|Laptop|D|PCIe|NVL)\b)", name):
            return gpu.tflops
    return None


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def measured_flops() -> float:
    """Floating-point operations a second of fp32 matmuls on this machine's processor, the best of three short ones."""
    import torch

    size, best = 1024, math.inf
    matrix = torch.ones(size, size)
    for _ in range(3):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def find_device(asked: str) -> Device:
    """The device for --device auto|cuda|cpu.

    Raises:
        InputError: cuda was asked for and there is none.
    """
    import torch

    if asked != "cpu" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        capability = (properties.major, properties.minor)
        return Device("cuda", properties.name, capability, properties.total_memory / 2**30, tflops_of(properties.name))
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
