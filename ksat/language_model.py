"""A base with its adapter behind one seam: a pack goes in, choice scores come out, differentiable."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ksat.attention import AttentionPlan, Kernel, choose_kernel
from ksat.errors import InputError
from ksat.head import read_head
from ksat.packing import IntArray, Layout, Pack, as_rows

if TYPE_CHECKING:
    import torch

Engine = Literal["unsloth", "transformers"]


class LanguageModel:
    """A causal language model, with or without an adapter.

    Attributes:
        model: the transformers or PEFT module.
        tokenizer: the base's own.
        engine: "unsloth" or "transformers".
        dtype: what it computes in.
        layout: how packs are to be built for it: "tree" (shared prefixes, our attention), "flat" (every sequence apart in
            one row; Unsloth's packed attention) or "rows" (padded rows, for layers that keep a state).
        autocasts: whether half precision comes from autocast, as Unsloth and PEFT's own LoRA want it.
        decoder: the layers without the head.
        layers: the decoder's.
        vocab_size: how many tokens the model has.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        engine: Engine,
        dtype: str,
        layout: Layout,
        autocasts: bool,
        is_run: bool = False,
    ) -> None:
        self.is_run = is_run
        self.model, self.tokenizer, self.engine, self.dtype, self.layout = model, tokenizer, engine, dtype, layout
        self.autocasts = autocasts and dtype in ("float16", "bfloat16")
        self.device = next(model.parameters()).device
        causal = model.get_base_model() if hasattr(model, "peft_config") else model
        self.decoder = causal.get_decoder()
        self.vocab_size: int = causal.config.get_text_config().vocab_size
        self.layers: list[Any] = list(self.decoder.layers)
        self.head = None if layout == "rows" else read_head(causal)

    def choice_scores(self, pack: Pack, *, over_vocabulary: bool = False) -> "torch.Tensor":
        """(n, K) log-likelihood of every choice divided by its divisor; -inf where the choice does not exist.

        At least fp32. Rows are in the pack's order, columns in the order of the row's choices. By label the log-likelihoods
        lack the normaliser over the vocabulary: it is the same for all choices of a question and cancels in their softmax.

        Args:
            pack: built for this model's layout.
            over_vocabulary: normalise by label as well.

        Raises:
            InputError: the tokenizer gives tokens that the model does not have.
        """
        import torch

        # A GPU would die of it without naming a cause. The tokenizer may have more: Gemma 3's has a picture's token.
        if (last := max(pack.token_ids.max(), pack.targets.max())) >= self.vocab_size:
            raise InputError(
                f"the base's tokenizer gives the token {last}, the model has {self.vocab_size}: their files are of two bases; fetch the "
                "base again"
            )
        positions, inverse = np.unique(pack.scored_positions, return_inverse=True)
        at, targets, owners = (torch.from_numpy(a).to(self.device) for a in (inverse, pack.targets, pack.owners))
        normalize = pack.normalized or over_vocabulary
        if self.head is None:
            logits = self._row_logits(pack, positions)  # (P, V)
            token_scores = logits[at, targets] - (logits.logsumexp(dim=-1)[at] if normalize else 0.0)  # (S,)
        else:
            hidden = self._hidden_states(pack, torch.from_numpy(positions).to(self.device))  # (P, h)
            token_scores = self.head.target_logits(hidden[at], targets)
            if normalize:
                token_scores = token_scores - self.head.log_normalizer(hidden)[at]
        divisors = torch.from_numpy(pack.divisors).to(token_scores)  # (n, K)
        sums = torch.zeros_like(divisors).flatten().index_add(0, owners, token_scores)
        return (sums.view_as(divisors) / divisors).masked_fill(divisors.isnan(), -torch.inf)

    @property
    def attention_kernel(self) -> Kernel:
        """Which kernel its packs' attention runs on."""
        import torch

        return choose_kernel(self.device, getattr(torch, self.dtype))

    @property
    def has_fused_norms(self) -> bool:
        """Whether a kernel library computes the norms, which keep less for the backward pass."""
        return any(module._get_name() == "LigerRMSNorm" for module in self.layers[0].modules())

    def keep_activations(self, num_kept: int) -> None:
        """Lets the last `num_kept` layers keep their activations for the backward pass; those before are recomputed.

        The last ones, because their activations are gone by the time the backward pass recomputes the first.
        """
        num_recomputed = len(self.layers) - num_kept
        for i, layer in enumerate(self.layers):
            layer.gradient_checkpointing = i < num_recomputed

    def first_overflow(self, pack: Pack) -> str | None:
        """Name of the first layer whose output over this pack is not finite; None if all are finite."""
        import torch

        broken: list[str] = []

        def look(name: str) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                if not broken and not bool(states.isfinite().all()):
                    broken.append(name)

            return hook

        handles = [layer.register_forward_hook(look(f"layer {i}")) for i, layer in enumerate(self.layers)]
        try:
            with torch.no_grad():
                self.choice_scores(pack)
        finally:
            for handle in handles:
                handle.remove()
        return broken[0] if broken else None

    @contextlib.contextmanager
    def autocast(self) -> Iterator[None]:
        """Half precision where it comes from autocast; nothing where the modules compute in it by themselves."""
        import torch

        dtype = getattr(torch, self.dtype) if self.autocasts else None
        with torch.autocast(self.device.type, dtype=dtype, enabled=self.autocasts):
            yield

    def _hidden_states(self, pack: Pack, positions: "torch.Tensor") -> "torch.Tensor":
        """(P, h) last hidden states of these positions of a pack."""
        import torch

        ids = torch.from_numpy(pack.token_ids)[None].to(self.device)
        position_ids = torch.from_numpy(pack.position_ids)[None].to(self.device)
        if self.engine == "unsloth":
            lengths = [segment.end - segment.start for segment in pack.segments]
            # On the CPU: Unsloth would have to wait for the GPU to read them.
            how: dict[str, Any] = {"packed_seq_lengths": torch.tensor(lengths, dtype=torch.int32)}
        else:
            how = {"attention_plan": AttentionPlan(pack, self.device)}
        with self.autocast():
            output = self.decoder(input_ids=ids, position_ids=position_ids, use_cache=False, **how)
        if "attention_plan" in how and how["attention_plan"].num_calls != len(self.layers):
            raise RuntimeError(
                f"{type(self.decoder).__name__}: {how['attention_plan'].num_calls} of {len(self.layers)} layers used the "
                "pack's attention; prompts would see each other"
            )
        return output.last_hidden_state[0, positions]  # type: ignore[no-any-return]

    def _row_logits(self, pack: Pack, positions: IntArray) -> "torch.Tensor":
        """(P, V) logits at least fp32 from plain right-padded rows through the model's own forward; needs no mask, since
        pads stand behind every real token."""
        import torch

        ids, place = as_rows(pack, pad_id=self.tokenizer.pad_token_id or 0)
        first = {int(position): i for i, position in reversed(list(enumerate(pack.scored_positions)))}
        rows, columns = torch.from_numpy(place[[first[int(p)] for p in positions]].T.copy()).to(self.device)  # (P,)
        kept, column_index = columns.unique(return_inverse=True)
        with self.autocast():
            logits = self.model(
                input_ids=torch.from_numpy(ids).to(self.device), logits_to_keep=kept, use_cache=False
            ).logits[rows, column_index]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))  # type: ignore[no-any-return]
