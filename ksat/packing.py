"""Encoded questions -> packs: what one forward pass computes, without padding.

A pack is one row of tokens, laid out as a radix tree over its sequences: whatever prefix two of them share (the template's
head, a passage, the question before its permuted choices) is one segment, computed once. A sequence is a prompt and one
continuation but for its last token, which is scored and never read.
"""

import bisect
import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ksat.encoding import EncodedQuestion

IntArray = NDArray[np.int64]
# "tree" shares prefixes; "flat" puts every sequence apart into the row (Unsloth's packed attention); "rows" are to become
# padded rows, for layers that keep a state.
Layout = Literal["tree", "flat", "rows"]
CLEARLY_SHARED = 32  # tokens beyond the prefix of all that make two questions neighbours in a pack


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


def _leaves(sequences: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """In lexicographic order, none twice, and none that another one begins with: where a radix tree's leaves end."""
    ordered = sorted(set(sequences))
    # Those that begin with a sequence stand right behind it.
    return [a for a, b in itertools.pairwise(ordered) if b[: len(a)] != a] + ordered[-1:]


def _sequences(questions: Iterable[EncodedQuestion]) -> list[tuple[int, ...]]:
    """What the model reads for these questions."""
    return _leaves(q.prompt_ids + read for q in questions for read in _leaves(b[:-1] for b in q.continuations))


def _shared(ordered: Sequence[IntArray]) -> list[int]:
    """Tokens that each sequence shares with the one before it, 0 for the first.

    In lexicographic order no earlier one shares more, so the radix tree has the sum of the lengths less the sum of these.
    """
    shared = [0] if len(ordered) else []
    for a, b in itertools.pairwise(ordered):
        length = min(len(a), len(b))
        differs = a[:length] != b[:length]
        shared.append(int(differs.argmax()) if differs.any() else length)
    return shared


def _tree_tokens(leaves: Iterable[tuple[int, ...]]) -> int:
    ordered = [np.array(ids, dtype=np.int64) for ids in leaves]
    return sum(map(len, ordered)) - sum(_shared(ordered))


def num_tree_tokens(questions: Iterable[EncodedQuestion]) -> int:
    """Tokens of the radix tree over all sequences of these questions."""
    return _tree_tokens(_sequences(questions))


@dataclass(frozen=True, slots=True)
class _Order:
    """Questions in an order in which those that share a prefix are neighbours.

    Attributes:
        indices: (n,) of the questions.
        shared: (n,) tokens that each shares with the one before it.
        sums: (n + 1,) `sums[i]` is what the first i add to a tree: all tokens of each but for the shared ones.
    """

    indices: list[int]
    shared: IntArray
    sums: list[int]

    def tokens(self, first: int, last: int) -> int:
        """Of the tree over places first to last (exclusive)."""
        return self.sums[last] - self.sums[first] + int(self.shared[first])

    def tokens_of(self, places: list[int]) -> int:
        """Of the tree over these places, which ascend; two share what is shared all the way from one to the other."""
        shared = sum(int(self.shared[a + 1 : b + 1].min()) for a, b in itertools.pairwise(places))
        return sum(self.tokens(place, place + 1) for place in places) - shared


def _order(questions: Sequence[EncodedQuestion], indices: Iterable[int], layout: Layout) -> _Order:
    # Behind the prompts the continuations, so that the plan depends on the contents and not on the order of the list.
    order = sorted(indices, key=lambda i: (questions[i].prompt_ids, questions[i].continuations, i))
    if layout == "tree":
        own = [
            len(q.prompt_ids) + _tree_tokens(_leaves(b[:-1] for b in q.continuations))
            for q in (questions[i] for i in order)
        ]
        shared = _shared([np.array(questions[i].prompt_ids, dtype=np.int64) for i in order])
    else:
        own, shared = [sum(map(len, _sequences([questions[i]]))) for i in order], [0] * len(order)
    sums = itertools.accumulate((a - b for a, b in zip(own, shared, strict=True)), initial=0)
    return _Order(order, np.array(shared, dtype=np.int64), list(sums))


def plan_packs(
    questions: Sequence[EncodedQuestion],
    pack_tokens: int,
    *,
    batch: Sequence[int] | None = None,
    layout: Layout = "tree",
    multiple: int = 1,
) -> list[list[int]]:
    """Which questions share a pack: lists of indices, the largest pack first, each under the token budget.

    A question that exceeds the budget alone gets a pack of its own. Questions that clearly share a prefix stay together as
    far as the budget allows; the rest is best-fit decreasing. Then the capacity is lowered by bisection as far as it costs
    neither a further pack nor a further token, so that the last pack is not a crumb. The plan depends on the questions
    alone: a job that is started again makes the same.

    Args:
        questions: all encoded questions.
        pack_tokens: budget of one pack, in computed tokens (pads and repeated prompts count where they are computed).
        batch: the indices to pack, none twice; all by default.
        layout: how packs will be built.
        multiple: of which the number of packs is to be, so that so many processes have the same to do; a few tokens more
            that are shared no longer are taken for it. Not for "rows".
    """
    indices = range(len(questions)) if batch is None else batch
    if not len(indices):
        return []
    if layout == "rows":
        return _plan_rows(questions, pack_tokens, indices)
    order = _order(questions, indices, layout)
    bins = _split(order, 0, len(indices), pack_tokens, even=False)
    most = -(-len(bins) // multiple) * multiple
    may_cost = most > len(bins)
    alone = (order.tokens(place, place + 1) for place in range(len(indices)))
    low, high = max((tokens for tokens in alone if tokens <= pack_tokens), default=pack_tokens), pack_tokens + 1
    while low < high:
        middle = (low + high) // 2
        lower = _split(order, 0, len(indices), middle, even=True)
        if len(lower) <= most and (may_cost or sum(tokens for tokens, _ in lower) <= sum(tokens for tokens, _ in bins)):
            bins, high = lower, middle
        else:
            low = middle + 1
    packs = sorted((sorted(places) for _, places in bins), key=lambda places: (-order.tokens_of(places), places))
    return [[order.indices[place] for place in places] for places in packs]


def _split(order: _Order, first: int, last: int, capacity: int, *, even: bool) -> list[tuple[int, list[int]]]:
    """Places first to last (exclusive) in packs: tokens (at most) and places of each. One pack, if the capacity allows."""
    if last - first == 1 or order.tokens(first, last) <= capacity:
        return [(order.tokens(first, last), list(range(first, last)))]
    between = order.shared[first + 1 : last]
    head = int(between.min())  # shared by all of them, and computed once a pack
    cuts = [first, *(np.flatnonzero(between < head + CLEARLY_SHARED) + first + 1).tolist(), last]
    parts = [part for a, b in itertools.pairwise(cuts) for part in _split(order, a, b, capacity, even=even)]
    bins = _fit([tokens - head for tokens, _ in parts], capacity - head, even=even)
    return [
        (head + sum(parts[i][0] - head for i in members), [place for i in members for place in parts[i][1]])
        for members in bins
    ]


def _fit(sizes: list[int], capacity: int, *, even: bool) -> list[list[int]]:
    """Best-fit decreasing: each into the fullest bin that holds it; what exceeds the capacity gets a bin of its own.

    `even` puts each into the emptiest of as many bins instead, if that keeps the capacity.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room left (below 0 nothing fits) and bin, ascending
    largest_first = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    for item in largest_first:
        at = bisect.bisect_left(rooms, (sizes[item], -1))
        if at < len(rooms):
            room, target = rooms.pop(at)
        else:
            room, target = capacity, len(bins)
            bins.append([])
        bins[target].append(item)
        bisect.insort(rooms, (room - sizes[item], target))
    if even:
        spread: list[tuple[int, int, int, list[int]]] = [(0, 0, n, []) for n in range(len(bins))]
        for item in largest_first:
            used, num, n, members = spread[0]
            heapq.heapreplace(spread, (used + sizes[item], num + 1, n, [*members, item]))
        if all(used <= capacity or num == 1 for used, num, _, _ in spread):
            return [members for _, _, _, members in spread]
    return bins


def _plan_rows(questions: Sequence[EncodedQuestion], pack_tokens: int, indices: Iterable[int]) -> list[list[int]]:
    """Neighbours by length, so that padded rows hold few pads."""
    lengths = {i: [len(ids) for ids in _sequences([questions[i]])] for i in indices}
    plan: list[tuple[int, list[int]]] = []
    longest = 0
    for i in sorted(lengths, key=lambda i: (-max(lengths[i]), questions[i].prompt_ids, questions[i].continuations, i)):
        cost = len(lengths[i]) * longest  # the first of a pack is its longest
        if plan and plan[-1][0] + cost <= pack_tokens:
            plan[-1] = (plan[-1][0] + cost, [*plan[-1][1], i])
        else:
            longest = max(lengths[i])
            plan.append((len(lengths[i]) * longest, [i]))
    return [members for _, members in sorted(plan, key=lambda pack: -pack[0])]


def build_pack(questions: Sequence[EncodedQuestion], rows: Sequence[int], *, layout: Layout = "tree") -> Pack:
    """The pack of these rows of `questions`, in that order; its tokens lie in lexicographic order if they are a tree."""
    chosen = [questions[row] for row in rows]
    blocks = [_sequences(chosen)] if layout == "tree" else [_sequences([question]) for question in chosen]
    offsets = list(itertools.accumulate(map(len, blocks), initial=0))
    token_ids, position_ids, segments, places = _lay([ids for block in blocks for ids in block], layout)
    num_choices = max(len(question.continuations) for question in chosen)
    divisors = np.full((len(rows), num_choices), np.nan)
    scored: list[IntArray] = []
    owners: list[int] = []
    for n, question in enumerate(chosen):
        divisors[n, : len(question.divisors)] = question.divisors
        block = 0 if layout == "tree" else n
        first = len(question.prompt_ids) - 1
        for k, branch in enumerate(question.continuations):
            # The first sequence in order that begins with what is read of this choice.
            at = offsets[block] + bisect.bisect_left(blocks[block], question.prompt_ids + branch[:-1])
            scored.append(places[at][first : first + len(branch)])
            owners += [n * num_choices + k] * len(branch)
    by_label = all(len(branch) == 1 for question in chosen for branch in question.continuations)
    answers = [-1 if question.answer_index is None else question.answer_index for question in chosen]
    return Pack(
        rows=np.array(rows, dtype=np.int64),
        token_ids=token_ids,
        position_ids=position_ids,
        segments=segments,
        scored_positions=np.concatenate(scored),
        targets=np.array([t for q in chosen for branch in q.continuations for t in branch], dtype=np.int64),
        owners=np.array(owners, dtype=np.int64),
        divisors=divisors,
        answer_indices=np.array(answers, dtype=np.int64),
        normalized=not by_label or bool((divisors[~np.isnan(divisors)] != 1).any()),
    )


def _lay(
    sequences: Sequence[tuple[int, ...]], layout: Layout
) -> tuple[IntArray, IntArray, tuple[Segment, ...], list[IntArray]]:
    """Token ids, position ids and segments of these sequences, and where the tokens of each lie.

    A tree needs them as `_leaves` gives them: each is then laid out from where it leaves the one before it.
    """
    arrays = [np.array(ids, dtype=np.int64) for ids in sequences]
    shared = _shared(arrays) if layout == "tree" else [0] * len(arrays)
    places: list[IntArray] = []
    before: dict[int, int] = {}  # first token of a segment -> the token before it in its sequences, -1 for none
    end = 0
    for ids, common in zip(arrays, shared, strict=True):
        trunk = places[-1][:common] if common else np.zeros(0, dtype=np.int64)
        if common:
            before[int(trunk[-1]) + 1] = int(trunk[-1])  # here the one before it goes another way
        before[end] = int(trunk[-1]) if common else -1
        places.append(np.concatenate([trunk, np.arange(end, end + len(ids) - common)]))
        end += len(ids) - common
    starts = sorted(before)
    segments = tuple(
        Segment(start, stop, bisect.bisect_right(starts, before[start]) - 1)
        for start, stop in itertools.pairwise([*starts, end])
    )
    token_ids = np.concatenate([ids[common:] for ids, common in zip(arrays, shared, strict=True)])
    position_ids = np.concatenate([np.arange(c, len(ids)) for ids, c in zip(arrays, shared, strict=True)])
    return token_ids, position_ids, segments, places


def visible(pack: Pack) -> NDArray[np.bool_]:
    """(T, T) True where the query (row) sees the key (column): the reference that attention kernels are tested against."""
    mask = np.zeros((pack.num_tokens, pack.num_tokens), dtype=bool)
    for segment in pack.segments:
        own = slice(segment.start, segment.end)
        if segment.parent >= 0:  # what the parent's last token sees: all above
            mask[own] = mask[pack.segments[segment.parent].end - 1]
        mask[own, own] = np.tri(segment.end - segment.start, dtype=bool)
    return mask


def as_rows(pack: Pack, pad_id: int) -> tuple[IntArray, IntArray]:
    """A pack of layout "rows" (or "flat") as plain padded sequences.

    Returns:
        (B, L) token ids, padded on the right, one row a segment; and (S, 2) where each scored position of the pack lies in
        them, as (row, column).

    Raises:
        ValueError: the pack is a tree that shares prefixes; a row would lack its beginning.
    """
    if any(segment.parent >= 0 for segment in pack.segments):
        raise ValueError('this pack shares prefixes; build it with layout="rows"')
    starts = np.array([segment.start for segment in pack.segments])
    rows = np.repeat(np.arange(len(starts)), [segment.end - segment.start for segment in pack.segments])  # (T,)
    ids = np.full((len(starts), int(pack.position_ids.max()) + 1), pad_id, dtype=np.int64)
    ids[rows, pack.position_ids] = pack.token_ids
    at = pack.scored_positions
    return ids, np.stack([rows[at], pack.position_ids[at]], axis=1)
