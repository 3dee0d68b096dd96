"""Encoded questions -> the score and the probability of every choice, in the order in which they came."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ksat import processes
from ksat.devices import peak_memory_gib
from ksat.encoding import EncodedQuestion
from ksat.errors import InputError
from ksat.language_model import LanguageModel
from ksat.packing import Pack, build_pack, plan_packs
from ksat.questions import MAX_CHOICES

FloatArray = NDArray[np.float64]


def progress_bar(label: str, num_questions: int, num_done: int) -> "tqdm[None]":
    """A bar on stderr with questions a second and the time left; in a log file a line every half minute."""
    pause = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=num_questions,
        initial=num_done,
        desc=label,
        unit="question",
        mininterval=pause,
        smoothing=0.1,
        disable=not processes.is_main(),
    )


def choice_probs(scores: FloatArray, scale: float) -> FloatArray:
    """(N, 5) softmax of scale * scores over each row's own choices; NaN stays NaN, rows sum to 1."""
    logits = scale * scores
    weights = np.exp(logits - np.nanmax(logits, axis=1, keepdims=True))
    return np.asarray(weights / np.nansum(weights, axis=1, keepdims=True))


def finite_remedy(dtype: str, *, is_run: bool = False) -> str:
    """What helps where the scores of a base, or of a run on the base that it was trained on, are not finite in this dtype."""
    wider = {"float16": "use --dtype bfloat16 or float32, or ", "bfloat16": "use --dtype float32, or "}.get(
        dtype, "use "
    )
    return f"{wider}another {'run' if is_run else 'base'}"


def score_questions(
    model: LanguageModel,
    questions: Sequence[EncodedQuestion],
    *,
    pack_tokens: int,
    done: Mapping[str, Sequence[float]] | None = None,
    on_scored: Callable[[dict[str, list[float]]], None] = lambda scores: None,
    progress: str = "scoring",
) -> FloatArray:
    """(N, 5) scores of all choices, in the order of `questions`; NaN where a choice does not exist.

    A score is the log-likelihood of the choice divided by its divisor (see LanguageModel.choice_scores), before any scale.
    Packs are longest first, so memory runs out at once or never. If it does, the pack is halved, and so are those that
    follow. Several processes share the packs; each gets the whole table.

    Args:
        model: scores packs; is put into evaluation mode and left there.
        questions: in any order, of any length.
        pack_tokens: budget of one forward pass, in tokens.
        done: scores by EncodedQuestion.key from an earlier, interrupted call.
        progress: label of the progress bar.
        on_scored: called after every forward pass with its scores by key.

    Raises:
        InputError: a score is not finite (the question is named), or one question alone does not fit the memory.
    """
    import torch

    model.model.eval()
    by_key = {key: list(scores) for key, scores in (done or {}).items()}
    waiting = processes.share(plan_packs(questions, pack_tokens, layout=model.layout))
    mine = [questions[row] for rows in waiting for row in rows]
    left = Counter(
        question.id for question in mine if question.key not in by_key
    )  # orders that a question still waits for
    num_mine = len({question.id for question in mine})
    with progress_bar(progress, num_mine, num_mine - len(left)) as bar:  # closed before an error's line
        while waiting:
            rows = waiting.pop(0)
            # A pack counts as done as a whole: the rest is packed as it was before the interruption, and scores the same.
            if all(questions[row].key in by_key for row in rows):
                continue
            pack = build_pack(questions, rows, layout=model.layout)
            try:
                # not inference_mode: what a model caches here would fail in a later backward pass
                with torch.no_grad():
                    scores = model.choice_scores(pack).double().cpu().numpy()
            except torch.OutOfMemoryError as error:
                waiting = _halved(questions, rows, waiting, error, is_run=model.is_run)
                torch.cuda.empty_cache()
                continue
            fresh = _finite_scores(model, questions, pack, scores)
            new = Counter(questions[row].id for row in rows if questions[row].key not in by_key)
            left -= new
            by_key.update(fresh)
            on_scored(fresh)
            bar.set_postfix({"memory": f"{peak_memory_gib():.1f} GiB"}, refresh=False)
            bar.update(sum(question not in left for question in new))
    by_key = processes.join(by_key)
    table = np.full((len(questions), MAX_CHOICES), np.nan)
    for n, question in enumerate(questions):
        table[n, : len(by_key[question.key])] = by_key[question.key]
    return table


def average_orders(questions: Sequence[EncodedQuestion], scores: FloatArray) -> FloatArray:
    """(N, 5) one row a question: the mean over its choice orders of the log-probability of every choice.

    Args:
        questions: the orders of a question stand behind each other, beginning with order 0.
        scores: (M, 5), one row an order, columns in the question's own order of choices.
    """
    shifted = scores - np.nanmax(scores, axis=1, keepdims=True)
    log_probs = shifted - np.log(np.nansum(np.exp(shifted), axis=1, keepdims=True))
    first = [row for row, question in enumerate(questions) if question.order == 0]
    counts = np.diff([*first, len(questions)])
    return np.asarray(np.add.reduceat(log_probs, first, axis=0) / counts[:, None])


def _halved(
    questions: Sequence[EncodedQuestion],
    rows: list[int],
    waiting: list[list[int]],
    error: Exception,
    *,
    is_run: bool = False,
) -> list[list[int]]:
    """The packs that are left, this one and every other that is as large cut in two."""
    if len(rows) == 1:
        question = questions[rows[0]]
        remedy = "use a GPU with more memory, or another run" if is_run else "lower --max-tokens, or use a smaller base"
        raise InputError(
            f"question {question.id!r}: out of memory with this question alone ({len(question.prompt_ids)} tokens); {remedy}"
        ) from error
    halves: list[list[int]] = []
    for pack in [rows, *waiting]:
        middle = (len(pack) + 1) // 2
        halves.extend(part for part in (pack[:middle], pack[middle:]) if part)
    return halves


def _finite_scores(
    model: LanguageModel, questions: Sequence[EncodedQuestion], pack: Pack, scores: FloatArray
) -> dict[str, list[float]]:
    result = {}
    for row, row_scores in zip(pack.rows, scores, strict=True):
        question = questions[row]
        own = row_scores[: len(question.continuations)]
        if not np.isfinite(own).all():
            raise InputError(
                f"question {question.id!r}: the model's score is not finite ({own.tolist()}, first in "
                f"{model.first_overflow(pack) or 'the head'}); {finite_remedy(model.dtype, is_run=model.is_run)}"
            )
        result[question.key] = own.tolist()
    return result
