"""Encoded questions -> packs: what one forward pass computes, without padding.

A pack is one row of tokens. Each question's prompt is a segment; where choices are scored by text, each choice is a
branch: a segment that sees its question's prompt and itself, so the prompt is computed once for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ksat.encoding import EncodedQuestion

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start to end (exclusive) of a pack; they see the tokens of `parent` (a segment's index, -1 for none) and
    their own, causally."""

    start: int
    end: int
    parent: int = -1


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass.

    Attributes:
        rows: (n,) indices of its questions in the list that was packed.
        token_ids: (T,).
        position_ids: (T,) each token's place in its own sequence; a branch goes on from its prompt.
        segments: in token order.
        scored_positions: (S,) tokens whose next token is scored.
        targets: (S,) that next token.
        owners: (S,) which choice it belongs to: index of the question in this pack * K + choice index.
        divisors: (n, K) numbers of characters (1 for labels); NaN where the choice does not exist.
        answer_indices: (n,) counted from 0, -1 where unknown.
    """

    rows: IntArray
    token_ids: IntArray
    position_ids: IntArray
    segments: tuple[Segment, ...]
    scored_positions: IntArray
    targets: IntArray
    owners: IntArray
    divisors: NDArray[np.float64]
    answer_indices: IntArray

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def num_pack_tokens(question: EncodedQuestion) -> int:
    """Tokens a question takes in a pack; the last token of a continuation is scored but never read."""
    return len(question.prompt_ids) + sum(len(branch) - 1 for branch in question.continuations)


def plan_packs(
    questions: Sequence[EncodedQuestion],
    pack_tokens: int,
    *,
    batch: Sequence[int] | None = None,
    as_padded_rows: bool = False,
) -> list[list[int]]:
    """Which questions share a pack: lists of indices, longest first, each under the token budget.

    A question that is longer than the budget gets a pack of its own. The plan depends on lengths and order alone, so an
    interrupted job that is started again makes the same packs.

    Args:
        questions: all encoded questions.
        pack_tokens: budget of one pack, in tokens.
        batch: the indices to pack; all by default.
        as_padded_rows: budget for what `as_rows` makes of a pack, pads and repeated prompts included.
    """
    indices = range(len(questions)) if batch is None else batch
    shapes = {i: _padded_shape(questions[i]) if as_padded_rows else (1, num_pack_tokens(questions[i])) for i in indices}
    plan: list[list[int]] = []
    used = longest = 0
    for i in sorted(shapes, key=lambda i: (-shapes[i][1], i)):
        num_rows, length = shapes[i]
        cost = num_rows * (longest if plan and as_padded_rows else length)  # the first of a pack is its longest
        if not plan or used + cost > pack_tokens:
            plan.append([])
            used, longest, cost = 0, length, num_rows * length
        plan[-1].append(i)
        used += cost
    return plan


def _padded_shape(question: EncodedQuestion) -> tuple[int, int]:
    """How many rows a question takes where no prefix is shared, and the length of the longest."""
    branches = {len(branch) - 1 for branch in question.continuations}
    num_rows = sum(len(branch) > 1 for branch in question.continuations) or 1
    return num_rows, len(question.prompt_ids) + max(branches)


def build_pack(questions: Sequence[EncodedQuestion], rows: Sequence[int]) -> Pack:
    """The pack of these rows of `questions`, in that order."""
    tokens: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    scored: list[tuple[int, int, int]] = []  # position, target, owner
    num_choices = max(len(questions[row].continuations) for row in rows)
    divisors = np.full((len(rows), num_choices), np.nan)

    def add_segment(ids: Sequence[int], first_position: int, parent: int) -> int:
        segments.append(Segment(len(tokens), len(tokens) + len(ids), parent))
        tokens.extend(ids)
        positions.extend(range(first_position, first_position + len(ids)))
        return len(segments) - 1

    for n, row in enumerate(rows):
        question = questions[row]
        divisors[n, : len(question.divisors)] = question.divisors
        prompt = add_segment(question.prompt_ids, 0, -1)
        answer_position = len(tokens) - 1
        for k, branch in enumerate(question.continuations):
            owner = n * num_choices + k
            scored.append((answer_position, branch[0], owner))
            if len(branch) > 1:
                start = segments[add_segment(branch[:-1], len(question.prompt_ids), prompt)].start
                scored.extend((start + j, target, owner) for j, target in enumerate(branch[1:]))
    scored_positions, targets, owners = (np.array(column, dtype=np.int64) for column in zip(*scored, strict=True))
    return Pack(
        rows=np.array(rows, dtype=np.int64),
        token_ids=np.array(tokens, dtype=np.int64),
        position_ids=np.array(positions, dtype=np.int64),
        segments=tuple(segments),
        scored_positions=scored_positions,
        targets=targets,
        owners=owners,
        divisors=divisors,
        answer_indices=np.array(
            [-1 if questions[r].answer_index is None else questions[r].answer_index for r in rows], dtype=np.int64
        ),
    )


def visible(pack: Pack) -> NDArray[np.bool_]:
    """(T, T) True where the query (row) sees the key (column): the block mask of a pack."""
    mask = np.zeros((pack.num_tokens, pack.num_tokens), dtype=bool)
    for segment in pack.segments:
        own = slice(segment.start, segment.end)
        mask[own, own] = np.tri(segment.end - segment.start, dtype=bool)
        if segment.parent >= 0:
            parent = pack.segments[segment.parent]
            mask[own, parent.start : parent.end] = True
    return mask


def as_rows(pack: Pack, pad_id: int) -> tuple[IntArray, IntArray]:
    """The same pack as plain padded sequences, for an engine that can't share a prefix.

    Returns:
        (B, L) token ids, padded on the right, one row for every segment that ends a sequence; and (S, 2) where each
        scored position of the pack lies in them, as (row, column).
    """
    parents = {segment.parent for segment in pack.segments}
    leaves = [i for i in range(len(pack.segments)) if i not in parents]
    sequences: list[IntArray] = []
    place: dict[int, tuple[int, int]] = {}
    for row, i in enumerate(leaves):
        leaf = pack.segments[i]
        chain = ([pack.segments[leaf.parent]] if leaf.parent >= 0 else []) + [leaf]
        sequence = np.concatenate([np.arange(segment.start, segment.end) for segment in chain])
        for column, position in enumerate(sequence):
            place.setdefault(int(position), (row, column))
        sequences.append(pack.token_ids[sequence])
    ids = np.full((len(sequences), max(map(len, sequences))), pad_id, dtype=np.int64)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = tokens
    return ids, np.array([place[int(position)] for position in pack.scored_positions], dtype=np.int64)
