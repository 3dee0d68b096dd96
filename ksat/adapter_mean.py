"""The LoRA updates of several runs, and their mean as one adapter.

What is averaged are the updates scaling * B @ A, not A and B, whose mean is none of the members' (model soups: Wortsman et
al. 2022, arXiv:2203.05482). The mean of updates of ranks r1, r2, ... has rank r1 + r2 + ...
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksat.errors import InputError
from ksat.files import read_json
from ksat.identity import name_difference
from ksat.runs import ADAPTER_FILE, ADAPTER_FOLDER, CONFIG_FILE, Run, read_run
from ksat.sealed import Rule, number, require_rules, whole

if TYPE_CHECKING:
    from torch import Tensor

_SAME_IN_ALL = ("base", "quantization", "score_by", "template", "max_tokens", "context_when", "choices_tell_kinds")
# Fields of PEFT's LoraConfig that do not change what an update is. Any other one that is on makes it something else than
# scaling * B @ A on the given base (DoRA, a bias, ranks by pattern, PiSSA's changed base), so it must be off.
_HARMLESS = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    ]
)

# What the update is computed from. PEFT writes them always.
_LORA_RULES: dict[str, Rule] = {
    "r": whole(1),
    "lora_alpha": number(lambda value: 0 < value < math.inf, "a number above 0"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
}


@dataclass(frozen=True, slots=True)
class Member:
    """A finished run with a plain LoRA.

    Attributes:
        folder: of the run.
        run: its run.json.
        config: its adapter_config.json.
        shapes: (out, in) of each adapted module, by the module's name in the file.
    """

    folder: Path
    run: Run
    config: dict[str, Any]
    shapes: dict[str, tuple[int, int]]

    @property
    def rank(self) -> int:
        return int(self.config["r"])

    @property
    def scaling(self) -> float:
        """The factor on B @ A, as PEFT computes it."""
        rank = math.sqrt(self.rank) if self.config["use_rslora"] else self.rank
        return float(self.config["lora_alpha"]) / rank


@dataclass(frozen=True, slots=True)
class Soup:
    """The mean of several adapters as one of scaling 1.

    Attributes:
        tensors: A (rank, in) and B (out, rank) of every module in float32, by PEFT's names.
        rank: of all modules.
        kept: share of the mean's Frobenius norm that is kept, over all modules; 1 for the exact mean.
        worst: the same of the module that keeps least, with its name.
    """

    tensors: "dict[str, Tensor]"
    rank: int
    kept: float
    worst: tuple[str, float]


def read_member(folder: Path) -> Member:
    """A run, verified as inference verifies it, and what its adapter's file says of its modules.

    Raises:
        InputError: not a finished run, or its adapter is no plain LoRA.
    """
    from safetensors import safe_open

    run = read_run(folder)
    config = read_json(folder / ADAPTER_FOLDER / CONFIG_FILE)
    path = folder / ADAPTER_FOLDER / ADAPTER_FILE
    others = sorted(name for name, value in config.items() if name not in _HARMLESS and value and value != "none")
    if config.get("init_lora_weights") not in (True, False, None, "gaussian"):
        others.append("init_lora_weights")
    if config.get("peft_type") != "LORA" or others:
        found = f"{config.get('peft_type')} with {', '.join(others)}" if others else config.get("peft_type")
        raise InputError(f"{folder}: its adapter is {found}; expected a plain LoRA, whose update is scaling * B @ A")
    require_rules(config, folder / ADAPTER_FOLDER / CONFIG_FILE, _LORA_RULES, "train the run again")
    shapes: dict[str, tuple[int, int]] = {}
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for name in sorted(name for name in names if name.endswith(".lora_A.weight")):
            module = name.removesuffix(".lora_A.weight")
            if f"{module}.lora_B.weight" not in names:
                raise InputError(f"{path}: {module} has an A and no B; train the run again")
            (rank_a, num_in), (num_out, rank_b) = (file.get_slice(key).get_shape() for key in _keys(module))
            if not rank_a == rank_b == config["r"]:
                raise InputError(
                    f"{path}: {module} has ranks {rank_a} and {rank_b}, adapter_config.json says {config['r']}"
                )
            shapes[module] = (num_out, num_in)
    if unknown := sorted(names - {key for module in shapes for key in _keys(module)}):
        raise InputError(f"{path}: holds {unknown[0]}; expected lora_A and lora_B of linear layers only")
    return Member(folder, run, config, shapes)


def _keys(module: str) -> tuple[str, str]:
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _setting(run: Run, name: str) -> Any:
    if name == "context_when":
        return run.context_rule.name
    if name == "choices_tell_kinds" and not run.context_rule.asks_kind:  # else kinds decide nothing
        return None
    return getattr(run, name)


def require_one_kind(members: Sequence[Member]) -> None:
    """Raises InputError unless the members' updates can be added: same base, weights, prompt and modules."""
    if len(members) < 2:
        raise InputError(f"{len(members)} run: a soup needs at least two; name more folders")
    first = members[0]
    for member in members[1:]:
        for name in _SAME_IN_ALL:
            here, there = (_setting(each.run, name) for each in (member, first))
            if here != there:
                raise InputError(
                    f"{member.folder}: its {name} is {here!r:.80}, that of {first.folder} {there!r:.80}; only runs with the same "
                    "can be averaged; blend their probabilities with ensemble.py"
                )
        if difference := first.run.base_identity and name_difference(member.run.base_identity, first.run.base_identity):
            raise InputError(
                f"{first.folder}: was trained on another {first.run.base} than {member.folder} ({difference}); only runs on the same base "
                "can be averaged; blend their probabilities with ensemble.py"
            )
        if member.shapes != first.shapes:
            differing = sorted(set(member.shapes.items()) ^ set(first.shapes.items()))
            raise InputError(
                f"{member.folder}: adapts other modules than {first.folder} ({differing[0][0]} first); blend their "
                "probabilities with ensemble.py"
            )


def mean_adapter(members: Sequence[Member], weights: Sequence[float], rank: int | None = None) -> Soup:
    """The weighted mean of the members' updates.

    Args:
        members: that fit together.
        weights: one of each, adding up to 1.
        rank: None keeps the mean exactly, in the sum of the ranks; else its best approximation of that rank in the
            Frobenius norm (Eckart and Young 1936).

    Raises:
        InputError: a rank above the sum of the ranks, or a member's weights that are not finite.
    """
    from safetensors import safe_open

    total = sum(member.rank for member in members)
    if rank is not None and rank > total:
        raise InputError(f"--rank {rank}: the exact mean has rank {total} already; leave --rank out to get it")
    tensors: dict[str, Tensor] = {}
    norms: dict[str, tuple[float, float]] = {}
    with contextlib.ExitStack() as stack:
        paths = [member.folder / ADAPTER_FOLDER / ADAPTER_FILE for member in members]
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        for module in members[0].shapes:
            factors = [
                (
                    _finite(file, _keys(module)[0], member),
                    weight * member.scaling * _finite(file, _keys(module)[1], member).double(),
                )
                for file, member, weight in zip(files, members, weights, strict=True)
            ]
            A, B, norms[module] = _join(factors, rank)
            tensors |= zip(_keys(module), (A.float().contiguous(), B.float().contiguous()), strict=True)
    shares = {module: kept / whole if whole else 1.0 for module, (kept, whole) in norms.items()}
    worst = min(shares, key=shares.__getitem__)
    kept, whole = (math.hypot(*(pair[i] for pair in norms.values())) for i in (0, 1))
    return Soup(tensors, rank or total, kept / whole if whole else 1.0, (worst, shares[worst]))


def _finite(file: Any, name: str, member: Member) -> "Tensor":
    """A tensor of a member's adapter."""
    tensor: Tensor = file.get_tensor(name)
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{member.folder}: {name} is not finite; its training broke down: leave the run out")
    return tensor


def _join(factors: "Sequence[tuple[Tensor, Tensor]]", rank: int | None) -> "tuple[Tensor, Tensor, tuple[float, float]]":
    """A (rank, in) and B (out, rank) of the sum of the B @ A, and the Frobenius norms kept and whole."""
    import torch

    A = torch.cat([a.double() for a, _ in factors])  # (R, in)
    B = torch.cat([b for _, b in factors], dim=1)  # (out, R)
    if rank is None:
        return A, B, (1.0, 1.0)
    return truncate(A, B, rank)


def truncate(A: "Tensor", B: "Tensor", rank: int) -> "tuple[Tensor, Tensor, tuple[float, float]]":
    """The best factors (rank, in) and (out, rank) of B @ A, and the Frobenius norms of their product and of B @ A.

    With B = Q1 R1 and A^T = Q2 R2, B @ A is Q1 (R1 R2^T) Q2^T: the small matrix in the middle has its singular values, and
    the full one, 566 MB at a 32B's widest layer, is never formed. Both factors get the root of the singular values.

    Args:
        A: (R, in).
        B: (out, R).
        rank: at most R; beyond the rank that the product can have, the factors are 0.
    """
    import torch

    left, left_core = torch.linalg.qr(B)  # (out, k), (k, R) with k = min(out, R)
    right, right_core = torch.linalg.qr(A.T)  # (in, m), (m, R) with m = min(in, R)
    U, singular, Vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    root = singular[:rank].sqrt()
    low_B, low_A = left @ (U[:, :rank] * root), (root[:, None] * Vh[:rank]) @ right.T
    missing = rank - len(root)
    low_A = torch.nn.functional.pad(low_A, (0, 0, 0, missing))
    low_B = torch.nn.functional.pad(low_B, (0, missing))
    return low_A, low_B, (float(singular[:rank].norm()), float(singular.norm()))
