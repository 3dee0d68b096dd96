"""Encoded questions -> packs: what one forward pass computes, without padding.

A pack is one row of tokens, laid out as a radix tree over its sequences: whatever prefix two of them share (the template's
head, a passage, the question before its permuted choices) is one segment, computed once. A sequence is a prompt and one
continuation but for its last token, which is scored and never read.
"""

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ksat.encoding import EncodedQuestion

IntArray = NDArray[np.int64]
# "tree" shares prefixes; "flat" puts every sequence apart into the row (Unsloth's packed attention); "rows" are to become
# padded rows, for layers that keep a state.
Layout = Literal["tree", "flat", "rows"]
CLEARLY_SHARED = 32  # tokens beyond the prefix of all prompts that make two questions neighbours in a pack


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start to end (exclusive) of a pack; they see the tokens of `parent` (a segment's index, -1 for none), of its
    ancestors, and their own, causally."""

    start: int
    end: int
    parent: int = -1


@dataclass(frozen=True, slots=True)
class Pack:
    """One forward pass.

    Attributes:
        rows: (n,) indices of its questions in the list that was packed.
        token_ids: (T,).
        position_ids: (T,) each token's place in its own sequence; a segment goes on from its parent.
        segments: in token order, parents first.
        scored_positions: (S,) tokens whose next token is scored.
        targets: (S,) that next token.
        owners: (S,) which choice it belongs to: index of the question in this pack * K + choice index.
        divisors: (n, K) numbers of characters (1 for labels); NaN where the choice does not exist.
        answer_indices: (n,) counted from 0, -1 where unknown.
        normalized: whether scores need the log-softmax over the vocabulary; by label it cancels between the choices.
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
    normalized: bool

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def ancestors(segments: Sequence[Segment], index: int) -> list[int]:
    """The segments that segment `index` sees beside itself, the root first."""
    chain = []
    while (index := segments[index].parent) >= 0:
        chain.append(index)
    return chain[::-1]


def sequences(question: EncodedQuestion) -> list[tuple[int, ...]]:
    """What the model has to read for a question: no sequence twice, and none that another one begins with."""
    whole = sorted({question.prompt_ids + branch[:-1] for branch in question.continuations})
    # In sorted order a sequence stands right before those that begin with it.
    return [a for a, b in zip(whole, [*whole[1:], ()], strict=True) if b[: len(a)] != a]


def _common_prefix(a: IntArray, b: IntArray) -> int:
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


@dataclass(slots=True)
class _Node:
    ids: IntArray
    children: "dict[int, _Node]" = field(default_factory=dict)
    start: int = 0


def _grow(all_sequences: Iterable[IntArray]) -> dict[int, _Node]:
    """The roots, by first token, of a radix tree over these sequences."""
    roots: dict[int, _Node] = {}
    for ids in all_sequences:
        level = roots
        while len(ids):
            node = level.get(int(ids[0]))
            if node is None:
                level[int(ids[0])] = _Node(ids)
                break
            shared = _common_prefix(node.ids, ids)
            if shared < len(node.ids):
                rest = _Node(node.ids[shared:], node.children)
                node.ids, node.children = node.ids[:shared], {int(rest.ids[0]): rest}
            level, ids = node.children, ids[shared:]
    return roots


def num_tree_tokens(questions: Iterable[EncodedQuestion]) -> int:
    """Tokens of the radix tree over all sequences of these questions."""
    ordered = [np.array(s) for s in sorted({s for q in questions for s in sequences(q)})]
    shared = sum(_common_prefix(a, b) for a, b in itertools.pairwise(ordered))
    return sum(map(len, ordered)) - shared


def plan_packs(
    questions: Sequence[EncodedQuestion],
    pack_tokens: int,
    *,
    batch: Sequence[int] | None = None,
    layout: Layout = "tree",
) -> list[list[int]]:
    """Which questions share a pack: lists of indices, the largest pack first, each under the token budget.

    A question that exceeds the budget alone gets a pack of its own. Questions that clearly share a prefix stay together as
    far as the budget allows; then best-fit decreasing, and the capacity is lowered as far as it costs no further pack, so
    that the last pack is not a crumb. The plan depends on the questions alone: a job that is started again makes the same.

    Args:
        questions: all encoded questions.
        pack_tokens: budget of one pack, in computed tokens (pads and repeated prompts count where they are computed).
        batch: the indices to pack; all by default.
        layout: how packs will be built.
    """
    indices = list(range(len(questions)) if batch is None else batch)
    if not indices:
        return []
    if layout == "rows":
        return _plan_rows(questions, pack_tokens, indices)
    head, groups = _groups(questions, pack_tokens, indices) if layout == "tree" else (0, _apart(questions, indices))
    sizes = [size for size, _ in groups]
    room = pack_tokens - head
    bins = _best_fit(sizes, room)
    low, high = max(max(sizes), -(-sum(sizes) // len(bins))), room
    while low < high:
        middle = (low + high) // 2
        fitted = _best_fit(sizes, middle)
        if len(fitted) <= len(bins):
            bins, high = fitted, middle
        else:
            low = middle + 1
    packs = sorted(bins, key=lambda members: (-sum(sizes[g] for g in members), members))
    return [[i for g in members for i in groups[g][1]] for members in packs]


def _apart(questions: Sequence[EncodedQuestion], indices: list[int]) -> list[tuple[int, list[int]]]:
    return [(sum(map(len, sequences(questions[i]))), [i]) for i in indices]


def _groups(
    questions: Sequence[EncodedQuestion], pack_tokens: int, indices: list[int]
) -> tuple[int, list[tuple[int, list[int]]]]:
    """Length of the prefix of all prompts, and the groups that share more: tokens beyond that prefix, and members."""
    ids = {i: np.array(questions[i].prompt_ids) for i in indices}
    own = {i: num_tree_tokens([questions[i]]) for i in set(indices)}
    order = sorted(indices, key=lambda i: (questions[i].prompt_ids, i))
    shared = [_common_prefix(ids[a], ids[b]) for a, b in itertools.pairwise(order)]
    head = min(shared) if shared else 0
    groups: list[tuple[int, list[int]]] = []
    for i, common in zip(order, [0, *shared], strict=True):
        size = own[i] - common  # at most: branches of neighbours may share more
        if groups and common >= head + CLEARLY_SHARED and head + groups[-1][0] + size <= pack_tokens:
            groups[-1] = (groups[-1][0] + size, [*groups[-1][1], i])
        else:
            groups.append((own[i] - head, [i]))
    return head, groups


def _best_fit(sizes: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each into the fullest bin that holds it; what exceeds the capacity gets a bin of its own."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room left and bin, ascending
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at = bisect.bisect_left(rooms, (sizes[item], -1))
        if at < len(rooms):
            room, target = rooms.pop(at)
        else:
            room, target = max(capacity, sizes[item]), len(bins)
            bins.append([])
        bins[target].append(item)
        bisect.insort(rooms, (room - sizes[item], target))
    return bins


def _plan_rows(questions: Sequence[EncodedQuestion], pack_tokens: int, indices: list[int]) -> list[list[int]]:
    """Neighbours by length, so that padded rows hold few pads."""
    shapes = {i: [len(s) for s in sequences(questions[i])] for i in indices}
    plan: list[list[int]] = []
    used = longest = 0
    for i in sorted(indices, key=lambda i: (-max(shapes[i]), i)):
        cost = len(shapes[i]) * (longest if plan else max(shapes[i]))  # the first of a pack is its longest
        if not plan or used + cost > pack_tokens:
            plan.append([])
            used, longest = 0, max(shapes[i])
            cost = len(shapes[i]) * longest
        plan[-1].append(i)
        used += cost
    return plan


def build_pack(questions: Sequence[EncodedQuestion], rows: Sequence[int], *, layout: Layout = "tree") -> Pack:
    """The pack of these rows of `questions`, in that order."""
    read = [sequences(questions[row]) for row in rows]
    own = [[np.array(s, dtype=np.int64) for s in question] for question in read]
    if layout == "tree":
        segments, token_ids, places = _lay_tree(own)
    else:
        segments, token_ids, places = _lay_flat(own)
    positions = np.zeros(len(token_ids), dtype=np.int64)
    for segment in segments:
        first = positions[segments[segment.parent].end - 1] + 1 if segment.parent >= 0 else 0
        positions[segment.start : segment.end] = np.arange(first, first + segment.end - segment.start)
    num_choices = max(len(questions[row].continuations) for row in rows)
    divisors = np.full((len(rows), num_choices), np.nan)
    scored: list[tuple[int, int, int]] = []  # position, target, owner
    for n, row in enumerate(rows):
        question = questions[row]
        divisors[n, : len(question.divisors)] = question.divisors
        for k, branch in enumerate(question.continuations):
            behind = question.prompt_ids + branch[:-1]
            place = next(p for s, p in zip(read[n], places[n], strict=True) if s[: len(behind)] == behind)
            first = len(question.prompt_ids) - 1
            scored.extend((int(place[first + j]), target, n * num_choices + k) for j, target in enumerate(branch))
    scored_positions, targets, owners = (np.array(column, dtype=np.int64) for column in zip(*scored, strict=True))
    answers = [questions[row].answer_index for row in rows]
    return Pack(
        rows=np.array(rows, dtype=np.int64),
        token_ids=token_ids,
        position_ids=positions,
        segments=segments,
        scored_positions=scored_positions,
        targets=targets,
        owners=owners,
        divisors=divisors,
        answer_indices=np.array([-1 if answer is None else answer for answer in answers], dtype=np.int64),
        normalized=any(len(b) > 1 for row in rows for b in questions[row].continuations)
        or bool((divisors[~np.isnan(divisors)] != 1).any()),
    )


def _lay_flat(own: list[list[IntArray]]) -> tuple[tuple[Segment, ...], IntArray, list[list[IntArray]]]:
    """Every sequence a segment without parent."""
    segments: list[Segment] = []
    places: list[list[IntArray]] = []
    end = 0
    for question in own:
        places.append([])
        for ids in question:
            segments.append(Segment(end, end + len(ids)))
            places[-1].append(np.arange(end, end + len(ids)))
            end += len(ids)
    return tuple(segments), np.concatenate([ids for question in own for ids in question]), places


def _lay_tree(own: list[list[IntArray]]) -> tuple[tuple[Segment, ...], IntArray, list[list[IntArray]]]:
    """The radix tree over all sequences: its segments, its tokens, and where each sequence's tokens lie."""
    roots = _grow(ids for question in own for ids in question)
    segments: list[Segment] = []
    parts: list[IntArray] = []
    end = 0
    stack = [(node, -1) for node in reversed(roots.values())]
    while stack:
        node, parent = stack.pop()
        node.start = end
        end += len(node.ids)
        segments.append(Segment(node.start, end, parent))
        parts.append(node.ids)
        stack.extend((child, len(segments) - 1) for child in reversed(node.children.values()))
    return tuple(segments), np.concatenate(parts), [[_walk(roots, ids) for ids in question] for question in own]


def _walk(roots: dict[int, _Node], ids: IntArray) -> IntArray:
    """Where the tokens of a sequence lie in the pack."""
    parts, level, left = [], roots, ids
    while len(left):
        node = level[int(left[0])]
        num = min(len(node.ids), len(left))
        parts.append(np.arange(node.start, node.start + num))
        level, left = node.children, left[num:]
    return np.concatenate(parts)


def visible(pack: Pack) -> NDArray[np.bool_]:
    """(T, T) True where the query (row) sees the key (column): the reference that attention kernels are tested against."""
    mask = np.zeros((pack.num_tokens, pack.num_tokens), dtype=bool)
    for i, segment in enumerate(pack.segments):
        own = slice(segment.start, segment.end)
        mask[own, own] = np.tri(segment.end - segment.start, dtype=bool)
        for ancestor in ancestors(pack.segments, i):
            mask[own, pack.segments[ancestor].start : pack.segments[ancestor].end] = True
    return mask


def as_rows(pack: Pack, pad_id: int) -> tuple[IntArray, IntArray]:
    """A pack of layout "rows" or "flat" as plain padded sequences.

    Returns:
        (B, L) token ids, padded on the right, one row a segment; and (S, 2) where each scored position of the pack lies in
        them, as (row, column).
    """
    lengths = [segment.end - segment.start for segment in pack.segments]
    ids = np.full((len(lengths), max(lengths)), pad_id, dtype=np.int64)
    for row, segment in enumerate(pack.segments):
        ids[row, : lengths[row]] = pack.token_ids[segment.start : segment.end]
    starts = np.array([segment.start for segment in pack.segments])
    rows = np.searchsorted(starts, pack.scored_positions, side="right") - 1
    return ids, np.stack([rows, pack.scored_positions - starts[rows]], axis=1)
