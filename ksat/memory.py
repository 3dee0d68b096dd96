"""Bytes of one training or scoring step, predicted; which layers keep their activations, and how many tokens a pack holds.

The backward pass needs every layer's activations: kept since the forward pass, or recomputed from the layer's input at the
price of a second forward pass. One scored position a question allows small packs, so many layers can keep them. A
MemoryPlan decides that pack by pack: it predicts, two probe packs correct the prediction, an out-of-memory error lowers it.

It is assumed that the kept layers are the LAST ones. The first layer recomputed then finds their activations gone, so
keeping one layer costs what keeping none does.
"""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

GIB = 2**30
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, an 8-bit scale for 64 weights, an fp32 scale for 256 of those
CONTEXT_BYTES = int(0.75 * GIB)  # CUDA context and workspaces, which torch's own counters don't see
FRAGMENTATION = 0.05  # 4-6 % of what torch reserves lies in gaps
SANE = (0.5, 2.0)  # a measurement moves a constant no further than by these factors
LOWERED_BY = 0.08  # share of the memory for activations that is given up after an out-of-memory error
PACK_TOKENS = range(512, 16385, 512)
_UNITS = {"gib": 2**30, "mib": 2**20, "gb": 10**9, "mb": 10**6}

# What keeps how much: "eager", transformers' own modules; "liger", fused norms and SwiGLU; "fused", one function for the
# whole MLP, whose backward multiplies gate and up again.
Elementwise = Literal["eager", "liger", "fused"]
_MLP_KEPT = {"eager": 4, "liger": 3, "fused": 2}  # tensors of (T, intermediate)
_MLP_GRADIENTS = {"eager": 2, "liger": 1, "fused": 2}  # more of them while the MLP's backward runs


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the bytes of a decoder of plain attention and gated-MLP layers follow from.

    Attributes:
        hidden: width h of the residual stream.
        intermediate: width I of the MLP.
        num_layers: L.
        num_heads: of the queries.
        q_dim: num_heads * head_dim.
        kv_dim: key-value heads * head_dim.
        vocab: V.
        tied: whether embedding and head are one matrix.
        norm_width: width of all inputs of a layer's norms together; 2h, more where attention or MLP end in a norm of their
            own or queries and keys have norms.
        softcapped: attention scores are soft-capped (Gemma 2), which plain matmul and softmax compute.
    """

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    q_dim: int
    kv_dim: int
    vocab: int
    tied: bool
    norm_width: int
    softcapped: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "ModelShape":
        """The shape of a transformers configuration: Qwen 2 and 3, Llama, Mistral, Cohere, Gemma 2 and 3, EXAONE 4."""
        config = config.get_text_config()
        return cls.of(
            config.model_type,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @classmethod
    def of(
        cls,
        family: str,
        *,
        hidden: int,
        intermediate: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        vocab: int,
        tied: bool,
    ) -> "ModelShape":
        """The shape of a decoder of this family (its text config's model_type)."""
        q_dim, kv_dim = head_dim * num_heads, head_dim * num_kv_heads
        norms = 4 if family in ("gemma2", "gemma3_text", "hyperclovax") else 2
        qk_normed = family in ("qwen3", "gemma3_text", "exaone4")
        return cls(
            hidden=hidden,
            intermediate=intermediate,
            num_layers=num_layers,
            num_heads=num_heads,
            q_dim=q_dim,
            kv_dim=kv_dim,
            vocab=vocab,
            tied=tied,
            norm_width=norms * hidden + (q_dim + kv_dim if qk_normed else 0),
            softcapped=family == "gemma2",
        )

    @property
    def num_block_weights(self) -> int:
        """Weights of the linear modules of all layers."""
        attention = 2 * self.hidden * (self.q_dim + self.kv_dim)
        return self.num_layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def num_embedding_weights(self) -> int:
        """Weights of embedding and head."""
        return (1 if self.tied else 2) * self.vocab * self.hidden

    @property
    def num_parameters(self) -> int:
        """Weights of the model but for norms and biases, which are less than a thousandth."""
        return self.num_block_weights + self.num_embedding_weights

    def lora_parameters(self, rank: int) -> int:
        """Parameters of a LoRA of this rank on the seven linear modules of every layer."""
        attention = 2 * (self.hidden + self.q_dim) + 2 * (self.hidden + self.kv_dim)
        return rank * self.num_layers * (attention + 3 * (self.hidden + self.intermediate))


@dataclass(frozen=True, slots=True)
class StepSettings:
    """How a step computes, as far as its bytes depend on it.

    Attributes:
        rank: of the LoRA; 0 for none.
        training: forward and backward; False is scoring.
        compute_bytes: of an activation, and of a weight that is not quantised: 2 or 4.
        nf4: whether the layers' weights are in nf4 with double quantisation.
        adapter_bytes: a LoRA parameter. None: 16 in training (fp32 weight, gradient, two states of Adam; with 8-bit Adam it
            is 10) and 4 in scoring. Scoring in between two epochs has all of them alive.
        elementwise: who computes norms and SwiGLU.
        attention: the kernel, as ksat.attention names it; "segments" keeps key-value heads expanded and two outputs.
        offload_embedding: the embedding lies in the machine's memory (untied bases alone).
        vocab_rows: positions whose logits over the whole vocabulary are alive at a time; 0 when labels are scored by the
            choices' rows of the head alone.
    """

    rank: int
    training: bool = True
    compute_bytes: int = 2
    nf4: bool = True
    adapter_bytes: int | None = None
    elementwise: Elementwise = "liger"
    attention: Literal["varlen", "segments"] = "varlen"
    vocab_rows: int = 0
    offload_embedding: bool = False


@dataclass(frozen=True, slots=True)
class Calibration:
    """What two probe packs taught.

    Attributes:
        kept_bytes: of one token in one layer that keeps its activations.
        extra_bytes: what is there besides, whatever the pack; negative if there is less.
    """

    kept_bytes: float
    extra_bytes: float


@dataclass(frozen=True, slots=True)
class Probe:
    """A pack that was run, and torch.cuda.max_memory_allocated() after it (without the context), in bytes."""

    tokens: int
    num_kept: int
    peak_bytes: float
    longest: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes alive at the step's peak, by part.

    Attributes:
        weights: of the layers.
        embedding_and_head: never quantised.
        adapter: LoRA weights, in training with gradients and optimizer states.
        activations_recomputed: inputs of the layers that will be recomputed.
        activations_kept: all that the other layers keep.
        live_layer: what the layer at work adds.
        dequantized: the largest matrix, dequantised.
        head_rows: logits, and rows of the head.
        attention: scores, where no fused kernel serves.
        extra: found by the probes.
        context: outside of torch's counters.
    """

    weights: float
    embedding_and_head: float
    adapter: float
    activations_recomputed: float
    activations_kept: float
    live_layer: float
    dequantized: float
    head_rows: float
    attention: float
    extra: float
    context: float

    @property
    def fixed(self) -> float:
        """Bytes that are there whatever the pack, without the context."""
        return self.weights + self.embedding_and_head + self.adapter + self.dequantized + self.extra

    @property
    def allocated(self) -> float:
        """What torch.cuda.max_memory_allocated() should say."""
        activations = self.activations_recomputed + self.activations_kept + self.live_layer
        return self.fixed + activations + self.head_rows + self.attention

    @property
    def total(self) -> float:
        """What the GPU has to hold, but for gaps between allocations."""
        return self.allocated + self.context

    @property
    def needed(self) -> float:
        """What the GPU has to hold, gaps between allocations included."""
        return self.total * (1 + FRAGMENTATION)


def kept_bytes(shape: ModelShape, settings: StepSettings) -> float:
    """Bytes of one token in one layer that keeps all its backward pass needs.

    Inputs of the linear modules (2h of the norms', q of the attention's output, I of SwiGLU's product unless it is
    multiplied again), of the norms (transformers' own keep a copy in fp32), of attention and SwiGLU. For the 32B and
    varlen attention: 176 kB "fused", 231 kB "liger", 307 kB "eager". Not counted: keys and values that branches behind a
    shared prefix gather again, a few per cent ("segments": up to 15 % for five branches); probes with such packs see them.
    """
    attention = 5 * shape.q_dim if settings.attention == "segments" else 2 * (shape.q_dim + shape.kv_dim)
    wide = _MLP_KEPT[settings.elementwise] * shape.intermediate
    norm_bytes = 4 if settings.elementwise == "eager" else settings.compute_bytes
    return settings.compute_bytes * (2 * shape.hidden + attention + wide) + norm_bytes * shape.norm_width


def predict(
    shape: ModelShape,
    settings: StepSettings,
    *,
    tokens: int,
    num_kept: int,
    longest: int | None = None,
    scored_rows: int = 0,
    calibration: Calibration | None = None,
) -> MemoryEstimate:
    """Bytes at the peak of one step over one pack.

    In training that peak is at the beginning of the backward pass: all layers' inputs and the kept layers' activations are
    alive, and the last layer's MLP adds the gradients of its product (I) and of the residual stream. If no layer keeps its
    activations, the last one has just been recomputed. Three things differ from the usual formula, each because of the
    peaks measured on the 32B (tests/test_memory.py): the gradients of gate and up are written over gate and up (liger), so
    I and not 3I; one dequantised matrix is alive, not two; a recomputed layer's own input is counted once.

    Gradients count as alive, as they are from the second pack of a step on.

    Args:
        shape: of the base.
        settings: of the step.
        tokens: T of the pack, pads included.
        num_kept: layers that keep their activations, 0 to L; scoring keeps none.
        longest: tokens of the longest prompt; only soft-capped attention asks. None: T.
        scored_rows: answers * choices, whose rows of the head are gathered; 14 MiB for 200 rows of the 32B, and always
            less than the live layer, which is gone by then.
        calibration: replaces the counted constants.
    """
    known = calibration or Calibration(kept_bytes(shape, settings), 0.0)
    element = settings.compute_bytes
    adapter_bytes = settings.adapter_bytes if settings.adapter_bytes is not None else 16 if settings.training else 4
    recomputed, kept, live = _activation_bytes(shape, settings, num_kept, known.kept_bytes)
    return MemoryEstimate(
        weights=shape.num_block_weights * (NF4_BYTES if settings.nf4 else element),
        embedding_and_head=shape.num_embedding_weights * element * (0.5 if settings.offload_embedding else 1),
        adapter=shape.lora_parameters(settings.rank) * adapter_bytes,
        activations_recomputed=tokens * recomputed,
        activations_kept=tokens * kept,
        live_layer=tokens * live,
        dequantized=shape.hidden * shape.intermediate * (element + 4 / 64) * settings.nf4,  # with its scales in fp32
        head_rows=settings.vocab_rows * shape.vocab * 12 + scored_rows * shape.hidden * (element + 12),
        attention=_attention_bytes(shape, settings, tokens, num_kept, tokens if longest is None else longest),
        extra=known.extra_bytes,
        context=CONTEXT_BYTES,
    )


def _activation_bytes(
    shape: ModelShape, settings: StepSettings, num_kept: int, kept_per_layer: float
) -> tuple[float, float, float]:
    """Bytes a token of the recomputed layers, of the kept ones, and of the live one."""
    element, h = settings.compute_bytes, shape.hidden
    if not settings.training:  # gate, up and product; the residual stream, its normed copy and one on the way
        return 0.0, 0.0, 3.0 * element * (shape.intermediate + h)
    live = float(element * (_MLP_GRADIENTS[settings.elementwise] * shape.intermediate + 2 * h))
    if num_kept == 0:
        live += kept_per_layer - element * h
    return float(element * h * (shape.num_layers - num_kept)), kept_per_layer * num_kept, live


def _attention_bytes(shape: ModelShape, settings: StepSettings, tokens: int, num_kept: int, longest: int) -> float:
    """Bytes of plain attention's scores, 0 for fused kernels: 16 B a head, query and key of the sequence at work; a layer
    that keeps its activations keeps 8 of them (tanh, softmax in fp32, weights) for every sequence, T * longest at most."""
    if not shape.softcapped:
        return 0.0
    if not settings.training:
        return 16.0 * shape.num_heads * longest**2
    return 8.0 * shape.num_heads * longest * (longest + max(num_kept, 1) * tokens)


def calibrate(shape: ModelShape, settings: StepSettings, probes: Sequence[Probe]) -> Calibration:
    """The bytes that are there whatever the pack, and those of a kept token and layer, as two training packs measured them.

    Two peaks can tell two unknowns. What the inputs of recomputed layers and the live gradients take follows from shapes
    and is left as counted; what is uncertain is what lies there besides (biases, buffers, copies in other dtypes) and what
    kernels keep. A short pack with all layers recomputed shows mostly the first, a long pack with as many kept layers as
    the uncalibrated plan allows mostly the second; the more tokens * kept layers differ, the better.

    Both stay within half and twice of what was counted. If that holds one back, the other is such that neither probe is
    predicted too low.

    Args:
        shape: of the base.
        settings: of the step, training.
        probes: two.

    Raises:
        ValueError: not two probes, or settings of scoring.
    """
    if len(probes) != 2 or not settings.training:
        raise ValueError(f"calibration takes two training probes, not {len(probes)} ({settings.training=})")
    counted, nothing = kept_bytes(shape, settings), Calibration(0.0, 0.0)
    # peak = what is predicted without kept bytes + weight * kept bytes + extra, for each probe
    weights, rests = [], []
    for probe in probes:
        without = predict(
            shape, settings, tokens=probe.tokens, num_kept=probe.num_kept, longest=probe.longest, calibration=nothing
        )
        weights.append(max(probe.num_kept, 1) * probe.tokens)  # the live layer, at least
        rests.append(probe.peak_bytes - without.allocated)
    difference = weights[1] - weights[0]
    kept = _clamp((rests[1] - rests[0]) / difference, counted) if difference else counted
    extra = max(rest - weight * kept for rest, weight in zip(rests, weights, strict=True))
    return Calibration(kept, _clamp(without.fixed + extra, without.fixed) - without.fixed)


def _clamp(value: float, counted: float) -> float:
    return min(max(value, SANE[0] * counted), SANE[1] * counted)


class MemoryPlan:
    """How many layers keep their activations, pack by pack, on a GPU with so many bytes for this process.

    Attributes:
        shape: of the base.
        settings: of the step.
        limit: bytes the process may take, context included; `lower` lowers it.
        calibration: replaces the counted constants; None until probes ran.
    """

    def __init__(
        self, shape: ModelShape, settings: StepSettings, limit: float, calibration: Calibration | None = None
    ) -> None:
        self.shape, self.settings, self.limit, self.calibration = shape, settings, float(limit), calibration

    def estimate(self, tokens: int, num_kept: int, longest: int | None = None) -> MemoryEstimate:
        """Bytes of a pack with so many layers kept; see predict."""
        return predict(
            self.shape, self.settings, tokens=tokens, num_kept=num_kept, longest=longest, calibration=self.calibration
        )

    def fits(self, tokens: int, num_kept: int = 0, longest: int | None = None) -> bool:
        """Whether the pack, and the gaps between allocations, stay within the limit."""
        return self.estimate(tokens, num_kept, longest).needed <= self.limit

    def num_kept(self, tokens: int, longest: int | None = None) -> int:
        """The most layers that can keep their activations, 0 to L; 0 also where not even that fits, and in scoring."""
        most = self.shape.num_layers if self.settings.training else 0
        return next((k for k in range(most, 0, -1) if self.fits(tokens, k, longest)), 0)

    def predicted(self, tokens: int, longest: int | None = None) -> MemoryEstimate:
        """Bytes of this pack as it is planned."""
        return self.estimate(tokens, self.num_kept(tokens, longest), longest)

    def lower(self, tokens: int, longest: int | None = None) -> bool:
        """Whether to repeat this pack, which ran out of memory: from now on fewer layers keep their activations.

        The limit falls by LOWERED_BY of what activations may take, as often as it needs for this pack's plan to change. It
        falls once, and False comes back, if all layers of this pack were to be recomputed already.
        """
        before = self.num_kept(tokens, longest)
        estimate = self.estimate(tokens, 0, longest)
        floor = (estimate.fixed + estimate.context) * (1 + FRAGMENTATION)
        while True:
            self.limit -= LOWERED_BY * max(self.limit - floor, 0.0)
            if before == 0 or self.num_kept(tokens, longest) < before:
                return before > 0


def best_pack_tokens(plan: MemoryPlan, *, longest: int, dequant_tokens: float = 440.0) -> int:
    """The budget of a pack in tokens, at least the longest prompt's, that costs least time a token.

    A pass over a pack of T tokens costs T tokens of matmul and, once, dequantising all weights. With k of L layers kept
    there are 3 - k/L passes (forward, backward, recompute), so a token costs (3 - k/L) * (1 + d/T); in scoring, one pass.
    The longest prompt's length comes back where nothing fits: that pack has to be tried.

    Args:
        plan: what fits, and how many layers are kept.
        longest: tokens of the longest prompt.
        dequant_tokens: d, the tokens whose matmul takes as long as dequantising all weights, in each pass. The same for all
            sizes of a base. H100: 40 ms against 90 us a token of the 32B, 440; V100: 110 ms against 650 us, 170.
    """

    def time(tokens: int) -> float:
        passes = 3 - plan.num_kept(tokens, longest) / plan.shape.num_layers if plan.settings.training else 1
        return passes * (1 + dequant_tokens / tokens)

    budgets = [longest, *(tokens for tokens in PACK_TOKENS if tokens > longest)]
    return min((tokens for tokens in budgets if plan.fits(tokens, 0, longest)), key=time, default=longest)


def format_gib(num_bytes: float) -> str:
    """The bytes as "26.9 GiB"."""
    return f"{num_bytes / GIB:.1f} GiB"


def parse_memory(text: str) -> int:
    """An argparse type: the bytes of "31.7GiB", "31.7" (GiB), "32GB" (10^9) or "800MiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    unit = _UNITS.get(match[2] or "gib") if match else None
    num_bytes = float(match[1]) * unit if match and unit else 0.0
    if not 1 <= num_bytes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no size of memory; expected one such as 31.7GiB, 32GB or 800MiB")
    return int(num_bytes)
