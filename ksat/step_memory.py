"""The memory plan at work: which layers of a model recompute for this pack, what was predicted, and what it took."""

from collections.abc import Sequence
from typing import Any

import torch

from ksat.encoding import EncodedQuestion
from ksat.errors import InputError
from ksat.head import ROWS_AT_ONCE
from ksat.host_embedding import HostEmbedding
from ksat.language_model import LanguageModel
from ksat.memory import (
    CONTEXT_BYTES,
    GIB,
    Elementwise,
    MemoryPlan,
    ModelShape,
    Probe,
    StepSettings,
    best_pack_tokens,
    calibrate,
    format_gib,
)
from ksat.packing import Layout, Pack, as_rows, build_pack, plan_packs

CPU_PACK_TOKENS = 2048  # measured: 512 is 5-15 % slower on the embedded base, 4,096 no faster
DEQUANT_TOKENS = {True: 440.0, False: 170.0}  # by compute capability from 8.0; see memory.best_pack_tokens


def memory_plan(model: LanguageModel, *, rank: int, training: bool, over_vocabulary: bool) -> MemoryPlan | None:
    """The plan for a model on its GPU, as far as this process may fill it; None on the CPU, where nothing is planned.

    Args:
        model: as loaded.
        rank: of its LoRA, 0 for none.
        training: forward and backward, or scoring.
        over_vocabulary: whether scores take logits over the vocabulary: by text, or in a loss over it.
    """
    if model.device.type != "cuda":
        return None
    # All of it without the context, which the driver has taken already; others may share the GPU.
    total = torch.cuda.get_device_properties(model.device).total_memory
    capped = torch.cuda.get_per_process_memory_fraction(model.device) * total
    limit = min(capped, torch.cuda.mem_get_info(model.device)[0] + torch.cuda.memory_reserved(model.device))
    settings = StepSettings(
        rank=rank,
        training=training,
        compute_bytes=torch.finfo(getattr(torch, model.dtype)).bits // 8,
        nf4=any(type(module).__name__ == "Linear4bit" for module in model.layers[0].modules()),
        adapter_bytes=10 if training else 4,
        elementwise=_elementwise(model),
        attention=model.attention_kernel,
        vocab_rows=ROWS_AT_ONCE if over_vocabulary else 0,
        offload_embedding=isinstance(model.decoder.get_input_embeddings(), HostEmbedding),
    )
    return MemoryPlan(ModelShape.from_config(model.decoder.config), settings, limit + CONTEXT_BYTES)


def _elementwise(model: LanguageModel) -> Elementwise:
    if model.engine == "transformers" and model.autocasts:
        return "eager"
    # With norms of transformers' own, "fused" would be too little and "liger" is a little too much; so it is with Unsloth,
    # whose kernels multiply gate and up again too but compute under autocast.
    return "fused" if model.has_fused_norms and model.engine == "transformers" else "liger"


def default_pack_tokens(plan: MemoryPlan | None, questions: Sequence[EncodedQuestion], layout: Layout) -> int:
    """The budget of a pack for --pack-tokens by default: what costs least time a token and fits."""
    if plan is None:
        return CPU_PACK_TOKENS
    longest = max(_num_tokens(build_pack(questions, [row], layout=layout), layout) for row in range(len(questions)))
    is_new = torch.cuda.get_device_capability() >= (8, 0)
    return best_pack_tokens(plan, longest=longest, dequant_tokens=DEQUANT_TOKENS[is_new])


def _num_tokens(pack: Pack, layout: Layout) -> int:
    """What the pack computes, pads included."""
    return as_rows(pack, pad_id=0)[0].size if layout == "rows" else pack.num_tokens


class StepMemory:
    """Sets, pack by pack, which layers recompute, and notes predicted and measured peaks.

    Args:
        model: whose layers are set.
        plan: None keeps the activations of all layers.
    """

    def __init__(self, model: LanguageModel, plan: MemoryPlan | None = None) -> None:
        self.model, self.plan = model, plan
        self._tokens = self._longest = 0
        self._predicted = 0.0

    def prepare(self, pack: Pack) -> int:
        """Sets the layers for this pack; returns how many keep their activations."""
        self._tokens, self._longest = _num_tokens(pack, self.model.layout), int(pack.position_ids.max()) + 1
        num_kept = len(self.model.layers)
        if self.plan is not None:
            num_kept = self.plan.num_kept(self._tokens, self._longest)
            estimate = self.plan.estimate(self._tokens, num_kept, self._longest)
            self._predicted = max(self._predicted, estimate.allocated)
        self.model.keep_activations(num_kept)
        return num_kept

    def lower(self) -> bool:
        """Lowers the plan after the pack at hand ran out of memory; False if there is nothing left to lower."""
        return self.plan is not None and self.plan.lower(self._tokens, self._longest)

    def to_dict(self) -> dict[str, float]:
        """Predicted and measured peak in GiB since the last call; empty without a plan."""
        if self.plan is None:
            return {}
        peaks = {"predicted_gib": self._predicted / GIB, "peak_gib": measured_peak() / GIB}
        self._predicted = 0.0
        torch.cuda.reset_peak_memory_stats()
        return {name: round(value, 2) for name, value in peaks.items()}

    def calibrate(self, questions: Sequence[EncodedQuestion], pack_tokens: int, backward: Any) -> None:
        """Runs two probe packs, a short one with all layers recomputed and a full one as it is planned, corrects the plan by
        their peaks, and prints them beside the predictions. Changes no weight.

        Args:
            questions: to make the packs of.
            pack_tokens: budget of the full one.
            backward: called with a pack; runs its forward and backward pass and clears the gradients.

        Raises:
            InputError: one question alone does not fit.
        """
        if self.plan is None:
            return
        shortest = min(range(len(questions)), key=lambda row: len(questions[row].prompt_ids))
        largest = plan_packs(questions, pack_tokens, layout=self.model.layout)[0]
        probes = [
            self._probe(questions, [shortest], backward, recompute_all=True),
            self._probe(questions, largest, backward, recompute_all=False),
        ]
        self.plan.calibration = calibrate(self.plan.shape, self.plan.settings, probes)
        # The log is to tell of steps, as the corrected plan predicts them.
        self._predicted = 0.0
        torch.cuda.reset_peak_memory_stats()

    def _probe(
        self, questions: Sequence[EncodedQuestion], rows: list[int], backward: Any, *, recompute_all: bool
    ) -> Probe:
        """The peak of a pack of these questions, of fewer if they don't fit with all layers recomputed."""
        assert self.plan is not None
        while True:
            pack = build_pack(questions, rows, layout=self.model.layout)
            num_kept = self.prepare(pack)
            if recompute_all:
                self.model.keep_activations(num_kept := 0)
            predicted = self.plan.estimate(self._tokens, num_kept, self._longest).allocated
            torch.cuda.reset_peak_memory_stats()
            try:
                backward(pack)
                break
            except torch.OutOfMemoryError as error:
                if recompute_all or not self.lower():
                    if len(rows) == 1:
                        raise out_of_memory(questions[rows[0]]) from error
                    rows = rows[: len(rows) // 2]
            torch.cuda.empty_cache()
        peak = measured_peak()
        print(
            f"memory: {self._tokens} tokens, {num_kept} of {len(self.model.layers)} layers kept: predicted "
            f"{format_gib(predicted)}, measured {format_gib(peak)}"
        )
        return Probe(self._tokens, num_kept, peak, self._longest)


def out_of_memory(question: EncodedQuestion) -> InputError:
    """What to tell a user whose GPU can't train this question, alone and with all layers recomputed."""
    return InputError(
        f"question {question.id!r}: out of memory with this question alone ({len(question.prompt_ids)} tokens); start another "
        "--run with a lower --max-tokens or --rank, or with a smaller base"
    )


def measured_peak() -> int:
    """Bytes that torch had allocated on the GPU at most since the peak was last reset."""
    return torch.cuda.max_memory_allocated()


def scoring_pack_tokens(
    model: LanguageModel, questions: Sequence[EncodedQuestion], *, rank: int, over_vocabulary: bool
) -> int:
    """The budget of a pack for scoring by default: the largest that the free memory holds."""
    plan = memory_plan(model, rank=rank, training=False, over_vocabulary=over_vocabulary)
    return default_pack_tokens(plan, questions, model.layout)
