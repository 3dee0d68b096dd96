"""Which bases fit a GPU, before a gigabyte is downloaded: from their shapes and the memory model, without a network."""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

from ksat.bases import KNOWN_BASES, KnownBase, find_base, find_local_base
from ksat.devices import Device, machine_memory, measured_flops
from ksat.errors import InputError
from ksat.memory import GIB, NF4_BYTES, Calibration, MemoryEstimate, StepSettings, format_gib, kept_bytes, predict
from ksat.models import choose_dtype, is_embedded
from ksat.tables import markdown_table

RANK = 64  # of train.py by default
TOKENS = (1024, 2048, 4096)  # of a prompt, in the table
TYPICAL_TOKENS = 2048  # few prompts of the competition are longer
SEARCHED_TOKENS = range(128, 32768 + 1, 128)
ABOUT = 0.9  # of the parameters of the largest that trains: about as large
# Of a card's TFLOPS, counting 4 FLOP a weight and token: 2,200 tokens a second of the 32B with Unsloth on an H100, measured. The
# 250 that teams report for a V100 are 25 %.
SHARE_OF_TFLOPS = 0.28
LEGEND = """`?`: not all of the base's shape or licence was seen in a public source; --explain BASE says what.
public, private: accuracy on the two halves of a leaderboard, untuned, as a team reported it in 2024 (`-`: not tried)."""


def peak(
    base: KnownBase,
    device: Device,
    *,
    tokens: int,
    rank: int = RANK,
    training: bool = True,
    offload_embedding: bool = False,
    nf4: bool = True,
    dtype: str = "auto",
) -> MemoryEstimate:
    """Bytes at the peak of a step over one prompt, the least that can do: all layers recomputed on a GPU, none on a CPU.

    Args:
        base: whose shape.
        device: its compute capability decides dtype and attention kernel.
        tokens: of the prompt.
        rank: of the LoRA.
        training: forward, backward and Adam, in 8 bits on a GPU; False is scoring with a LoRA.
        offload_embedding: the embedding lies in the machine's memory.
        nf4: the layers' weights are in nf4.
        dtype: of --dtype.
    """
    on_cpu = device.kind == "cpu"
    settings = StepSettings(
        rank=rank,
        training=training,
        compute_bytes=4 if choose_dtype(dtype, device, base.name) == "float32" else 2,
        nf4=nf4,
        adapter_bytes=(16 if on_cpu else 10) if training else 4,
        elementwise="eager" if base.needs_rows else "fused" if on_cpu else "liger",
        attention="varlen" if device.capability >= (8, 0) else "segments",
        offload_embedding=offload_embedding,
    )
    # A vision tower lies there unused; that its linear layers are quantised as well is left out.
    tower = Calibration(kept_bytes(base.shape, settings), float(base.num_vision_parameters * settings.compute_bytes))
    num_kept = base.shape.num_layers if on_cpu and training else 0
    return predict(base.shape, settings, tokens=tokens, num_kept=num_kept, calibration=tower)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a base takes of a GPU, in GiB with gaps between allocations.

    Attributes:
        base: which.
        weights: of the weights alone, layers in nf4.
        training: peaks of a training step over one prompt of so many tokens.
        scoring: peak of scoring one prompt of 2,048 tokens.
        longest: tokens of the longest prompt that trains, to 128; 0 if none does.
        scores: whether scoring 2,048 tokens fits.
    """

    base: KnownBase
    weights: float
    training: dict[int, float]
    scoring: float
    longest: int
    scores: bool

    @property
    def trains(self) -> bool:
        """Whether prompts of the usual length train."""
        return self.longest >= TYPICAL_TOKENS

    @property
    def verdict(self) -> str:
        if self.longest >= max(TOKENS):
            return "trains"
        return f"trains to {self.longest:,}" if self.longest else "scores only" if self.scores else "too large"


def find_fit(base: KnownBase, device: Device, *, rank: int = RANK) -> Fit:
    """What this base takes of this GPU, and whether that is there."""
    training = {tokens: peak(base, device, tokens=tokens, rank=rank).needed / GIB for tokens in TOKENS}
    scoring = peak(base, device, tokens=TYPICAL_TOKENS, rank=rank, training=False)
    num_fitting = bisect.bisect(
        SEARCHED_TOKENS,
        device.memory_gib * GIB,
        key=lambda tokens: peak(base, device, tokens=tokens, rank=rank).needed,
    )
    return Fit(
        base=base,
        weights=(scoring.weights + scoring.embedding_and_head + scoring.extra) / GIB,
        training=training,
        scoring=scoring.needed / GIB,
        longest=SEARCHED_TOKENS[num_fitting - 1] if num_fitting else 0,
        scores=scoring.needed <= device.memory_gib * GIB,
    )


def fit_all(device: Device, *, rank: int = RANK) -> list[Fit]:
    """All known bases on this GPU, the largest first."""
    return [find_fit(base, device, rank=rank) for base in sorted(KNOWN_BASES, key=lambda base: -base.num_parameters)]


def recommended(fits: Sequence[Fit], *, named: bool = False) -> Fit | None:
    """What explore.py marks and train.py takes: of the bases that train at the usual length the largest, or, of those about as
    large, the one that the team reported best; None if none trains.

    Args:
        fits: of the bases to choose among.
        named: the user named them; else those with terms to accept or code to run are passed over.
    """
    usable = [fit for fit in fits if fit.trains and (named or not fit.base.caution)]
    largest = max((fit.base.num_parameters for fit in usable), default=0)
    near = [fit for fit in usable if fit.base.num_parameters >= ABOUT * largest]
    return max(near, key=lambda fit: (fit.base.private or 0.0, fit.base.num_parameters), default=None)


def passed_over(fits: Sequence[Fit], chosen: Fit | None) -> str:
    """The bases that would train, about as large as the chosen one or larger, and why they are not taken unasked; "" if none."""
    least = ABOUT * chosen.base.num_parameters if chosen else 0
    others = [fit.base for fit in fits if fit.trains and fit.base.caution and fit.base.num_parameters >= least]
    names = ", ".join(f"{base.name} ({base.caution})" for base in others)
    return f"not taken unasked, for their terms: {names}" if names else ""


def fit_table(fits: list[Fit], device: Device, *, rank: int = RANK, named: bool = False) -> str:
    """The table of the bases, `->` before the recommended one, and what that choice means below.

    Args:
        fits: the rows, the largest base first.
        device: the card.
        rank: of the LoRA.
        named: the user named these bases; else they are all known ones.
    """
    header = [
        "base",
        "verdict",
        "params",
        "weights",
        *(f"train {tokens:,}" for tokens in TOKENS),
        "longest",
        "score 2,048",
    ]
    header += ["public", "private"]
    marked = recommended(fits, named=named)
    rows = [
        [
            ("-> " if fit is marked else "   ") + fit.base.name + ("?" if fit.base.unverified else ""),
            fit.verdict,
            f"{fit.base.num_parameters / 1e9:.1f}B",
            f"{fit.weights:.1f}",
            *(f"{gib:.1f}" for gib in fit.training.values()),
            f"{fit.longest:,}" if fit.longest < max(SEARCHED_TOKENS) else f"> {fit.longest - 1:,}",
            f"{fit.scoring:.1f}",
            *("-" if accuracy is None else f"{accuracy:.4f}" for accuracy in (fit.base.public, fit.base.private)),
        ]
        for fit in fits
    ]
    return "\n\n".join([markdown_table(header, rows, num_texts=2), _summary(fits, marked, device, rank, named), LEGEND])


def _summary(fits: list[Fit], marked: Fit | None, device: Device, rank: int, named: bool) -> str:
    which = "these bases" if named else "the known bases"
    terms = "" if named else passed_over(fits, marked)
    if marked is None:
        smallest = fits[-1].base
        if terms:
            return (
                f"Of {which} that train at {TYPICAL_TOKENS:,} tokens on {device.name} none is free of terms; {terms}."
            )
        return (
            f"None of {which} trains at {TYPICAL_TOKENS:,} tokens in the {device.memory_gib:.1f} GiB of {device.name}; the smallest, "
            f"{smallest.name}, is {shortfall(smallest, device, rank=rank)}."
        )
    larger = [fit for fit in fits if fit.base.num_parameters > marked.base.num_parameters]
    near = any(fit.trains and (named or not fit.base.caution) for fit in larger)
    what = "about as large as the largest, and the best reported," if near else "the largest"
    lines = [f"{marked.base.name} is {what} of {which} that trains at {TYPICAL_TOKENS:,} tokens on {device.name}."]
    if not named:
        lines.append(f"train.py takes it here without --base{f'; {terms}' if terms else ''}.")
    if above := [fit for fit in larger if not fit.trains]:
        lines.append(f"The next, {above[-1].base.name}, is {shortfall(above[-1].base, device, rank=rank)}.")
        helped = next((fit.base for fit in above[:-1] if remedies(fit.base, device, rank=rank)), None)
        if helped is not None:
            lines.append(
                f"The largest that can be made to fit, {helped.name}, is {shortfall(helped, device, rank=rank)}."
            )
    tried = [fit for fit in fits if fit.trains and fit.base.private is not None]
    best = max(tried, key=lambda fit: fit.base.private or 0.0, default=None)
    if best is not None and best is not marked:
        lines.append(
            f"Of those that the team tried and that train here, {best.base.name} was best ({best.base.private:.4f} private)."
        )
    return "\n".join(lines)


def shortfall(base: KnownBase, device: Device, *, tokens: int = TYPICAL_TOKENS, rank: int = RANK) -> str:
    """ "short by 1.9 GiB at 2,048 tokens with rank 64; fits with --rank 8": how far it is from training, and what helps."""
    missing = peak(base, device, tokens=tokens, rank=rank).needed - device.memory_gib * GIB
    found = remedies(base, device, rank=rank)
    helps = f"fits with {' or '.join(found)}" if found else "no smaller rank or shorter prompt makes it fit"
    return f"short by {format_gib(missing)} at {tokens:,} tokens with rank {rank}; {helps}"


def remedies(base: KnownBase, device: Device, *, rank: int = RANK) -> list[str]:
    """Flags of train.py that make a base fit that does not at the usual length: single ones, else the gentlest of several;
    none if none do."""

    def fits(offload: bool, rank: int, tokens: int) -> bool:
        needed = peak(base, device, tokens=tokens, rank=rank, offload_embedding=offload).needed
        return needed <= device.memory_gib * GIB

    can_offload = not base.shape.tied
    found = ["--offload-embedding"] if can_offload and fits(True, rank, TYPICAL_TOKENS) else []
    found += [f"--rank {lower}" for lower in (16, 8) if lower < rank and fits(False, lower, TYPICAL_TOKENS)][:1]
    found += [f"--max-tokens {fewer}" for fewer in (1024, 512) if fits(False, rank, fewer)][:1]
    if found:
        return found
    together = [(True, 16, TYPICAL_TOKENS), (True, 8, TYPICAL_TOKENS), (False, 8, 1024), (True, 8, 1024)]
    for offload, lower, tokens in together:
        if (can_offload or not offload) and fits(offload, min(lower, rank), tokens):
            flags = ["--offload-embedding"] * offload + [f"--rank {lower}"] * (lower < rank)
            return [" ".join([*flags, *([f"--max-tokens {tokens}"] if tokens < TYPICAL_TOKENS else [])])]
    return []


def explain(base: KnownBase, device: Device, *, rank: int = RANK) -> str:
    """The arithmetic behind a base's row, part by part."""
    estimate = peak(base, device, tokens=TYPICAL_TOKENS, rank=rank)
    shape = base.shape
    what = {
        "weights": f"{shape.num_block_weights:,} weights of {shape.num_layers} layers in nf4, {NF4_BYTES:.3f} bytes each",
        "embedding_and_head": f"{shape.num_embedding_weights:,} weights, {'one matrix' if shape.tied else 'two matrices'}",
        "adapter": f"{shape.lora_parameters(rank):,} parameters of rank {rank}: weight, gradient, 8-bit Adam; 10 bytes each",
        "activations_recomputed": f"the input of every layer, {TYPICAL_TOKENS:,} tokens of width {shape.hidden:,}",
        "live_layer": "the layer at work, recomputed, and its gradients",
        "dequantized": "the largest matrix, dequantised",
        "attention": "scores of soft-capped attention",
        "extra": f"{base.num_vision_parameters:,} weights of the vision tower",
        "context": "CUDA context and workspaces",
    }
    lines = [
        f"{base.name} on {device.name}: one training step over a prompt of {TYPICAL_TOKENS:,} tokens, all layers recomputed"
    ]
    for field in fields(estimate):
        if value := getattr(estimate, field.name):
            lines.append(f"  {value / GIB:7.2f} GiB  {field.name.replace('_', ' ')}: {what[field.name]}")
    gaps = estimate.needed - estimate.total
    lines.append(f"  {gaps / GIB:7.2f} GiB  gaps between allocations, 5 %")
    lines.append(
        f"  {estimate.needed / GIB:7.2f} GiB  of {device.memory_gib:.2f} GiB: {find_fit(base, device, rank=rank).verdict}"
    )
    if base.unverified:
        lines.append(f"  not verified: {base.unverified}")
    return "\n".join(lines)


def choose_base(device: Device, *, samples: bool, rank: int = RANK) -> tuple[str, str]:
    """The base when none is named, the one that explore.py marks, and why in one sentence."""
    if samples:
        return "embedded", "the sample questions only show that everything works"
    if device.kind == "cpu":
        return "embedded", "there is no GPU; a 270M model is a stand-in, not a contender"
    fits = fit_all(device, rank=rank)
    chosen = recommended(fits)
    terms = f"; {found}" if (found := passed_over(fits, chosen)) else ""
    if chosen is None:
        needed = min(fit.training[TYPICAL_TOKENS] for fit in fits)
        why = f"{device.name} has {device.memory_gib:.1f} GiB; the smallest of the known bases needs {needed:.1f}"
        return "embedded", why + terms
    gib = chosen.training[TYPICAL_TOKENS]
    return (
        chosen.base.name,
        f"marked by explore.py: its training (about {gib:.1f} GiB with rank {rank}) fits {device.name}{terms}",
    )


def check_room(
    base: str,
    device: Device,
    *,
    rank: int,
    nf4: bool,
    dtype: str = "auto",
    tokens: int = TYPICAL_TOKENS,
    offload_embedding: bool = False,
    training: bool = True,
    flag: str = "--base",
) -> str:
    """A warning if a base takes more than the device has, "" if it fits, or if its size can't be told without a network.

    Args:
        base: which base.
        device: where it computes; on the CPU the machine's memory counts.
        rank: of the LoRA; 0 for none.
        nf4: the weights are quantised while loading.
        dtype: that is computed in.
        tokens: of a prompt.
        offload_embedding: the embedding lies in the machine's memory.
        training: False is scoring.
        flag: what named the base, for messages.

    Raises:
        InputError: the weights and the LoRA alone take more.
    """
    known = None if is_embedded(base) else find_base(base) or find_local_base(base)
    if known is None:
        return ""
    in_nf4 = nf4 or known.is_quantized
    there, where = device.memory_gib * GIB, device.name
    if device.kind == "cpu":
        there, where = machine_memory(), "this machine"

    step = partial(peak, known, device, tokens=tokens, rank=rank, training=training, nf4=in_nf4, dtype=dtype)
    estimate = step(offload_embedding=offload_embedding)
    least = estimate.fixed + estimate.context
    if training:
        helps = remedies(known, device, rank=rank) if device.kind == "cuda" else []
    else:
        can_offload = device.kind == "cuda" and not known.shape.tied and not offload_embedding
        helps = ["--offload-embedding"] if can_offload and step(offload_embedding=True).needed <= there else []
    is_run = rank > 0 and not training  # whose base and whose weights' form stay
    smaller = ["take a smaller base", *([] if in_nf4 else ["--quantization nf4"])]
    others = ["take a machine with more memory"] if is_run else smaller
    remedy = " or ".join([*others, *helps])
    if least > there:
        weights = f"weights and a LoRA of rank {rank}" if rank else "weights"
        raise InputError(
            f"{flag} {base}: its {weights} take {format_gib(least)} before the first prompt, {where} has {format_gib(there)}; {remedy}"
        )
    if estimate.needed <= there:
        return ""
    return (
        f"{base} takes about {format_gib(estimate.needed)} to {'train on' if training else 'score'} prompts of {tokens:,} tokens, {where} has "
        f"{format_gib(there)}: it will run out of memory, or swap; {remedy}"
    )


def cost(base: str, device: Device, *, num_characters: int) -> str:
    """About how many GiB come and how long training takes, in one line; rough, and says so.

    Args:
        base: which base.
        device: where it trains.
        num_characters: characters of all training questions, times the epochs.
    """
    tokens = 0.65 * num_characters
    if is_embedded(base):
        rate = 110.0 if device.kind == "cpu" else 20_000.0  # measured on 2 cores: 110
        return f"nothing to download; training about {max(1.0, tokens / rate / 60):.0f} minutes"
    known, is_here = find_base(base), Path(base).is_dir()
    if known is None:
        fetched = "nothing to download" if is_here else "it is downloaded unless it is in the Hugging Face cache"
        return f"size and time of this base are not known; {fetched}"
    stored = known.num_parameters * 2.0
    if known.is_quantized:
        stored -= known.shape.num_block_weights * (2 - NF4_BYTES)
    work = 4 * tokens * known.shape.num_block_weights  # FLOP: forward, and backward to the activations
    if device.kind == "cpu":
        how_long = f"training at least {work / measured_flops() / 3600:.1f} h, by a matmul measured on {device.name}"
    elif device.tflops is None:
        how_long = f"how long training takes on {device.name} is not known"
    else:
        how_long = f"training about {work / (SHARE_OF_TFLOPS * device.tflops * 1e12) / 3600:.1f} h (rough)"
    fetched = "nothing to download" if is_here else f"download {stored / GIB:.0f} GiB unless cached"
    return f"{fetched}; {how_long}"
