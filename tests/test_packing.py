"""Packs: every question once, the budget kept, each token sees its own sequence and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksat.encoding import EncodedQuestion
from ksat.packing import Pack, Segment, as_rows, build_pack, num_pack_tokens, plan_packs, visible

TOKENS = st.integers(1, 30)  # few, so that unlike sequences share tokens; 0 is the padding


def encoded(
    row_id: str, prompt: list[int], continuations: list[list[int]], answer_index: int | None = None
) -> EncodedQuestion:
    return EncodedQuestion(
        id=row_id,
        prompt_ids=tuple(prompt),
        continuations=tuple(map(tuple, continuations)),
        divisors=tuple(float(len(c)) for c in continuations),
        answer_index=answer_index,
    )


@st.composite
def questions(draw: st.DrawFn, max_size: int = 8) -> list[EncodedQuestion]:
    prompts = st.lists(TOKENS, min_size=1, max_size=12)
    by_text = st.lists(st.lists(TOKENS, min_size=1, max_size=5), min_size=2, max_size=5)
    by_label = st.lists(st.lists(TOKENS, min_size=1, max_size=1), min_size=2, max_size=5)
    rows = draw(st.lists(st.tuples(prompts, by_text | by_label), min_size=1, max_size=max_size))
    return [encoded(f"q{i}", prompt, continuations, i % 2) for i, (prompt, continuations) in enumerate(rows)]


def seen_by(pack: Pack) -> list[list[int]]:
    """For every token the indices of the tokens that it sees, in the order of their position ids."""
    seen = [np.flatnonzero(row) for row in visible(pack)]
    return [indices[np.argsort(pack.position_ids[indices], kind="stable")].tolist() for indices in seen]


LABEL = encoded("label", [11, 12, 13], [[1], [2], [3], [4]], 2)
TEXT = encoded("text", [21, 22], [[5, 6, 7], [5], [8, 9]])


def test_a_pack_by_hand() -> None:
    pack = build_pack([LABEL, TEXT], [1, 0])
    assert pack.rows.tolist() == [1, 0]
    assert pack.token_ids.tolist() == [21, 22, 5, 6, 8, 11, 12, 13]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 2, 0, 1, 2]
    assert pack.segments == (Segment(0, 2), Segment(2, 4, 0), Segment(4, 5, 0), Segment(5, 8))
    assert pack.scored_positions.tolist() == [1, 2, 3, 1, 1, 4, 7, 7, 7, 7]
    assert pack.targets.tolist() == [5, 6, 7, 5, 8, 9, 1, 2, 3, 4]
    assert pack.owners.tolist() == [0, 0, 0, 1, 2, 2, 4, 5, 6, 7]
    np.testing.assert_array_equal(pack.divisors, [[3, 1, 2, np.nan], [1, 1, 1, 1]])
    assert pack.answer_indices.tolist() == [-1, 2]
    assert pack.num_tokens == 8 == num_pack_tokens(TEXT) + num_pack_tokens(LABEL)


def test_the_mask_of_a_pack_by_hand() -> None:
    expected = ["10000000", "11000000", "11100000", "00010000", "00011000", "00011100", "00011110", "00011001"]
    assert ["".join(map(str, row)) for row in visible(build_pack([LABEL, TEXT], [0, 1])).astype(int)] == expected


def test_rows_by_hand() -> None:
    pack = build_pack([LABEL, TEXT], [1, 0])
    ids, places = as_rows(pack, 0)
    assert ids.tolist() == [[21, 22, 5, 6], [21, 22, 8, 0], [11, 12, 13, 0]]
    assert places.tolist() == [[0, 1], [0, 2], [0, 3], [0, 1], [0, 1], [1, 2], [2, 2], [2, 2], [2, 2], [2, 2]]


def test_a_plan_by_hand() -> None:
    lengths = [3, 9, 4, 4, 20, 1]
    rows = [encoded(f"q{i}", [1] * length, [[1], [2]]) for i, length in enumerate(lengths)]
    # Longest first, ties in the given order; the one of 20 exceeds the budget alone.
    assert plan_packs(rows, 13) == [[4], [1, 2], [3, 0, 5]]
    assert plan_packs(rows, 13, batch=[5, 2]) == [[2, 5]]
    assert plan_packs(rows, 1000) == [[4, 1, 2, 3, 0, 5]]
    assert plan_packs([], 13) == plan_packs(rows, 13, batch=[]) == []


@settings(max_examples=50)
@given(rows=questions(), pack_tokens=st.integers(1, 60), data=st.data())
def test_every_question_is_in_one_pack_and_the_budget_is_kept(
    rows: list[EncodedQuestion], pack_tokens: int, data: st.DataObject
) -> None:
    batch = data.draw(st.none() | st.lists(st.integers(0, len(rows) - 1), unique=True))
    plan = plan_packs(rows, pack_tokens, batch=batch)
    assert sorted(i for pack in plan for i in pack) == sorted(range(len(rows)) if batch is None else batch)
    for indices in plan:
        num_tokens = build_pack(rows, indices).num_tokens
        assert num_tokens == sum(num_pack_tokens(rows[i]) for i in indices)
        assert num_tokens <= pack_tokens or len(indices) == 1
    lengths = [num_pack_tokens(rows[i]) for pack in plan for i in pack]
    assert lengths == sorted(lengths, reverse=True)


@settings(max_examples=50)
@given(rows=questions())
def test_every_token_sees_its_own_sequence_up_to_itself(rows: list[EncodedQuestion]) -> None:
    pack = build_pack(rows, range(len(rows)))
    # All sequences that there are, each choice's read tokens behind its question's prompt.
    prefixes = {
        tuple([*q.prompt_ids, *c[:-1]][:end])
        for q in rows
        for c in q.continuations
        for end in range(1, len(q.prompt_ids) + len(c))
    }
    for position, seen in enumerate(seen_by(pack)):
        assert seen[-1] == position
        assert pack.position_ids[seen].tolist() == list(range(len(seen)))  # positions go on, without gap or repeat
        assert tuple(pack.token_ids[seen].tolist()) in prefixes


@settings(max_examples=50)
@given(rows=questions())
def test_targets_and_owners_reproduce_every_continuation(rows: list[EncodedQuestion]) -> None:
    pack = build_pack(rows, range(len(rows)))
    width, all_seen = max(len(q.continuations) for q in rows), seen_by(pack)
    assert pack.divisors.shape == (len(rows), width)
    for n, question in enumerate(rows):
        for k in range(width):
            mine = np.flatnonzero(pack.owners == n * width + k)
            if k >= len(question.continuations):
                assert mine.size == 0
                assert np.isnan(pack.divisors[n, k])
                continue
            continuation = question.continuations[k]
            assert pack.targets[mine].tolist() == list(continuation)
            assert pack.divisors[n, k] == question.divisors[k]
            # Each target is scored behind exactly the prompt and what stands before it in its continuation.
            for j, i in enumerate(mine):
                seen = pack.token_ids[all_seen[pack.scored_positions[i]]].tolist()
                assert seen == [*question.prompt_ids, *continuation[:j]]


@settings(max_examples=50)
@given(rows=questions())
def test_rows_hold_the_same_sequences(rows: list[EncodedQuestion]) -> None:
    pack = build_pack(rows, range(len(rows)))
    ids, places = as_rows(pack, 0)
    assert len(places) == len(pack.scored_positions)
    all_seen = seen_by(pack)
    for i, (row, column) in enumerate(places):
        seen = all_seen[pack.scored_positions[i]]
        assert ids[row, : column + 1].tolist() == pack.token_ids[seen].tolist()
    # Nothing but the sequences' own tokens and padding on the right; no row is wholly padding or longer than needed.
    lengths = (ids != 0).sum(axis=1)
    assert all((row[:length] != 0).all() for row, length in zip(ids, lengths, strict=True))
    assert lengths.min() > 0
    assert lengths.max() == ids.shape[1]


@settings(max_examples=50)
@given(rows=questions(), data=st.data())
def test_the_order_of_the_list_does_not_matter(rows: list[EncodedQuestion], data: st.DataObject) -> None:
    """A question's own part of a pack is the same wherever it stands, and beside whatever else."""
    order = data.draw(st.permutations(range(len(rows))))
    pack = build_pack(rows, order)
    for n, i in enumerate(order):
        alone = build_pack(rows, [i])
        offset = sum(num_pack_tokens(rows[r]) for r in order[:n])
        own = slice(offset, offset + alone.num_tokens)
        assert pack.token_ids[own].tolist() == alone.token_ids.tolist()
        assert pack.position_ids[own].tolist() == alone.position_ids.tolist()
        np.testing.assert_array_equal(visible(pack)[own, own], visible(alone))
        assert not visible(pack)[own, : own.start].any()
        assert not visible(pack)[own, own.stop :].any()
        assert pack.answer_indices[n] == alone.answer_indices[0]
        mine = pack.owners // pack.divisors.shape[1] == n
        assert (pack.scored_positions[mine] - offset).tolist() == alone.scored_positions.tolist()
        assert pack.targets[mine].tolist() == alone.targets.tolist()
        assert (pack.owners[mine] % pack.divisors.shape[1]).tolist() == alone.owners.tolist()


@settings(max_examples=50)
@given(rows=questions(), pack_tokens=st.integers(1, 60))
def test_a_plan_that_is_made_again_is_the_same(rows: list[EncodedQuestion], pack_tokens: int) -> None:
    renamed = [replace(row, id=f"other {row.id}", answer_index=None) for row in rows]
    assert plan_packs(rows, pack_tokens) == plan_packs(renamed, pack_tokens)


@pytest.mark.parametrize("answer_index", [None, 0, 3])
def test_the_label_changes_nothing_but_the_label(answer_index: int | None) -> None:
    pack, unlabelled = (build_pack([replace(LABEL, answer_index=a)], [0]) for a in (answer_index, None))
    assert pack.answer_indices.tolist() == [-1 if answer_index is None else answer_index]
    for name in ("rows", "token_ids", "position_ids", "scored_positions", "targets", "owners", "divisors"):
        np.testing.assert_array_equal(getattr(pack, name), getattr(unlabelled, name))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 6), min_size=2, max_size=5)), max_size=12),
    st.integers(1, 200),
)
def test_padded_rows_keep_the_budget_pads_and_repeated_prompts_included(
    shapes: list[tuple[int, list[int]]], pack_tokens: int
) -> None:
    rows = [
        EncodedQuestion(
            str(i), tuple(range(length)), tuple(tuple(range(n)) for n in branches), (1.0,) * len(branches), 0
        )
        for i, (length, branches) in enumerate(shapes)
    ]
    plan = plan_packs(rows, pack_tokens, as_padded_rows=True)
    assert sorted(i for pack in plan for i in pack) == list(range(len(rows)))
    for pack in plan:
        ids, _ = as_rows(build_pack(rows, pack), pad_id=0)
        assert ids.size <= pack_tokens or len(pack) == 1
