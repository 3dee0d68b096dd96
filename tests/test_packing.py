"""Packs: every question once, the budget kept, shared prefixes computed once, each token sees its own sequence alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksat.encoding import EncodedQuestion
from ksat.packing import Layout, Pack, Segment, ancestors, as_rows, build_pack, num_tree_tokens, plan_packs, visible

# Few, so that unlike sequences share tokens, and two long enough to be clearly shared; 0 is the padding.
PIECES = ([1], [2], [3], [4, 5], list(range(100, 125)), list(range(200, 240)))
LABELS = ((1,), (2,), (3,), (4,))
LAYOUTS: tuple[Layout, ...] = ("tree", "flat", "rows")
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def encoded(
    row_id: str, prompt: Sequence[int], continuations: Sequence[Sequence[int]] = LABELS, answer_index: int | None = None
) -> EncodedQuestion:
    return EncodedQuestion(
        id=row_id,
        prompt_ids=tuple(prompt),
        continuations=tuple(map(tuple, continuations)),
        divisors=tuple(float(len(c)) for c in continuations),
        answer_index=answer_index,
    )


@st.composite
def questions(draw: st.DrawFn, *, by_text: bool | None = None, max_size: int = 8) -> list[EncodedQuestion]:
    """Questions by label, by text, or (None) of both kinds."""
    prompts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(
        lambda pieces: [t for piece in pieces for t in piece]
    )
    texts = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=2, max_size=5)
    labels = st.integers(2, 4).map(lambda num: [[k] for k in range(1, num + 1)])
    branches = texts | labels if by_text is None else texts if by_text else labels
    rows = draw(st.lists(st.tuples(prompts, branches), min_size=1, max_size=max_size))
    return [encoded(f"q{i}", prompt, branches, i % 2) for i, (prompt, branches) in enumerate(rows)]


def read(rows: Sequence[EncodedQuestion]) -> list[tuple[int, ...]]:
    """The different sequences of these questions, those that another one begins with included."""
    return sorted({q.prompt_ids + branch[:-1] for q in rows for branch in q.continuations})


def chain(pack: Pack, position: int) -> list[int]:
    """The tokens from the root to this one, itself included, by the segments alone."""
    at = next(i for i, segment in enumerate(pack.segments) if segment.start <= position < segment.end)
    above = [pack.segments[i] for i in ancestors(pack.segments, at)]
    return [
        *(t for segment in above for t in range(segment.start, segment.end)),
        *range(pack.segments[at].start, position + 1),
    ]


LABEL = encoded("label", [11, 12, 13], answer_index=2)
TEXT = encoded("text", [21, 22], [[5, 6, 7], [5], [8, 9]])


def test_a_tree_by_hand() -> None:
    pack = build_pack([LABEL, TEXT], [1, 0])
    assert pack.rows.tolist() == [1, 0]
    assert pack.token_ids.tolist() == [11, 12, 13, 21, 22, 5, 6, 8]
    assert pack.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 2]
    assert pack.segments == (Segment(0, 3), Segment(3, 5), Segment(5, 7, 1), Segment(7, 8, 1))
    assert pack.scored_positions.tolist() == [4, 5, 6, 4, 4, 7, 2, 2, 2, 2]
    assert pack.targets.tolist() == [5, 6, 7, 5, 8, 9, 1, 2, 3, 4]
    assert pack.owners.tolist() == [0, 0, 0, 1, 2, 2, 4, 5, 6, 7]
    np.testing.assert_array_equal(pack.divisors, [[3, 1, 2, np.nan], [1, 1, 1, 1]])
    assert pack.answer_indices.tolist() == [-1, 2]
    assert pack.num_tokens == 8 == num_tree_tokens([LABEL, TEXT])


def test_the_mask_of_a_tree_by_hand() -> None:
    expected = ["10000000", "11000000", "11100000", "00010000", "00011000", "00011100", "00011110", "00011001"]
    assert ["".join(map(str, row)) for row in visible(build_pack([LABEL, TEXT], [0, 1])).astype(int)] == expected


def test_a_chain_of_segments_by_hand() -> None:
    """Each leaves the longest one token later than the one before."""
    rows = [encoded(str(n), [*range(1, n + 1), 90]) for n in range(1, 5)]
    pack = build_pack(rows, range(4))
    assert pack.token_ids.tolist() == [1, 2, 3, 4, 90, 90, 90, 90]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 2, 1]
    assert pack.segments == (
        Segment(0, 1), Segment(1, 2, 0), Segment(2, 3, 1), Segment(3, 5, 2), Segment(5, 6, 2), Segment(6, 7, 1), Segment(7, 8, 0)
    )  # fmt: skip
    assert [ancestors(pack.segments, i) for i in range(7)] == [[], [0], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1], [0]]
    assert pack.scored_positions[::4].tolist() == [7, 6, 5, 4]
    assert np.flatnonzero(visible(pack)[5]).tolist() == [0, 1, 2, 5]


def test_a_thousand_segments_deep() -> None:
    rows = [encoded(str(n), [*range(1, n + 1), 9999]) for n in range(1, 1001)]
    pack = build_pack(rows, range(1000))
    assert pack.num_tokens == 2000
    assert len(ancestors(pack.segments, 999)) == 999
    assert visible(pack)[pack.scored_positions[-1]].sum() == 1001


def test_equal_prompts_share_a_node_and_both_are_scored() -> None:
    pack = build_pack([LABEL, replace(LABEL, id="again", answer_index=0)], [0, 1])
    assert pack.token_ids.tolist() == [11, 12, 13]
    assert pack.segments == (Segment(0, 3),)
    assert pack.scored_positions.tolist() == [2] * 8
    assert pack.owners.tolist() == list(range(8))
    assert pack.answer_indices.tolist() == [2, 0]


def test_a_prompt_that_another_begins_with_is_scored_inside_its_segment() -> None:
    pack = build_pack([encoded("long", [11, 12, 13, 14]), LABEL], [0, 1])
    assert pack.segments == (Segment(0, 4),)
    assert pack.scored_positions.tolist() == [3] * 4 + [2] * 4


def test_choice_orders_cost_the_shared_tokens_once() -> None:
    """Six tokens before the choices, then four of every order, of which the first differ."""
    orders = [encoded("q", [*range(11, 17), *rest]) for rest in ([1, 2, 3, 9], [2, 3, 1, 9], [3, 1, 2, 9])]
    pack = build_pack(orders, range(3))
    assert pack.num_tokens == 6 + 3 * 4
    assert pack.segments == (Segment(0, 6), Segment(6, 10, 0), Segment(10, 14, 0), Segment(14, 18, 0))
    assert pack.position_ids.tolist() == [*range(6), *[6, 7, 8, 9] * 3]
    assert pack.scored_positions[::4].tolist() == [9, 13, 17]
    assert build_pack(orders, range(3), layout="flat").num_tokens == 30


def test_flat_and_rows_by_hand() -> None:
    pack = build_pack([LABEL, TEXT], [1, 0], layout="flat")
    assert pack.token_ids.tolist() == [21, 22, 5, 6, 21, 22, 8, 11, 12, 13]
    assert pack.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2]
    assert pack.segments == (Segment(0, 4), Segment(4, 7), Segment(7, 10))
    assert pack.scored_positions.tolist() == [1, 2, 3, 1, 5, 6, 9, 9, 9, 9]
    assert pack.owners.tolist() == [0, 0, 0, 1, 2, 2, 4, 5, 6, 7]
    ids, places = as_rows(build_pack([LABEL, TEXT], [1, 0], layout="rows"), 0)
    assert ids.tolist() == [[21, 22, 5, 6], [21, 22, 8, 0], [11, 12, 13, 0]]
    assert places.tolist() == [[0, 1], [0, 2], [0, 3], [0, 1], [1, 1], [1, 2], [2, 2], [2, 2], [2, 2], [2, 2]]


def test_flat_repeats_equal_prompts() -> None:
    pack = build_pack([LABEL, LABEL], [0, 1], layout="flat")
    assert pack.token_ids.tolist() == [11, 12, 13] * 2
    assert pack.scored_positions.tolist() == [2] * 4 + [5] * 4


def test_a_tree_is_not_taken_for_rows() -> None:
    with pytest.raises(ValueError, match='shares prefixes; build it with layout="rows"'):
        as_rows(build_pack([TEXT], [0]), 0)


@pytest.mark.parametrize(
    ("rows", "normalized"),
    [([LABEL], False), ([LABEL, TEXT], True), ([TEXT], True), ([replace(LABEL, divisors=(1.0, 1.0, 2.0, 1.0))], True)],
)
def test_only_labels_do_without_the_normaliser(rows: list[EncodedQuestion], normalized: bool) -> None:
    assert build_pack(rows, range(len(rows))).normalized is normalized


HEAD = [1] * 10


def test_a_plan_of_trees_by_hand() -> None:
    rows = [
        encoded("same passage", HEAD + [2] * 40 + [3] * 10),
        encoded("same passage", HEAD + [2] * 40 + [4] * 10),
        encoded("middle", HEAD + [5] * 30),
        encoded("short", HEAD + [6] * 20),
        encoded("over the budget alone", HEAD + [7] * 95),
    ]
    # Beyond the head 95, 60, 30 and 20 tokens. Best fit would be 60 + 30 and a crumb of 20; 60 and 50 need no more packs.
    plan = plan_packs(rows, 100)
    assert plan == [[4], [0, 1], [2, 3]]
    assert [build_pack(rows, members).num_tokens for members in plan] == [105, 70, 60]
    assert plan_packs(rows, 100, batch=[3, 1]) == [[1, 3]]
    assert plan_packs(rows, 1000) == [[0, 1, 2, 3, 4]]
    # Two of one passage together cost 70 tokens: with a budget of 69 they part.
    assert plan_packs(rows, 69, batch=[0, 1]) == [[0], [1]]
    assert plan_packs(rows, 70, batch=[0, 1]) == [[0, 1]]


@every_layout
def test_nothing_to_plan(layout: Layout) -> None:
    assert plan_packs([], 13, layout=layout) == plan_packs([LABEL], 13, batch=[], layout=layout) == []


def test_plans_that_share_nothing_by_hand() -> None:
    rows = [encoded(f"q{i}", [1] * length) for i, length in enumerate([3, 9, 4, 4, 20, 1])]
    assert plan_packs(rows, 13, layout="flat") == [[4], [0, 2, 3], [5, 1]]  # 20, 3 + 4 + 4 and 1 + 9 tokens
    assert plan_packs(rows, 13, layout="rows") == [[4], [2, 3, 0], [1], [5]]  # 1 x 20, 3 x 4, 1 x 9 and 1 x 1


def test_a_slightly_shared_beginning_binds_nothing() -> None:
    """Kept together, the two that share ten tokens would cost a third pack."""
    rows = [
        encoded(str(n), ids) for n, ids in enumerate(([1] * 10 + [2] * 30, [1] * 10 + [3] * 30, [4] * 60, [5] * 60))
    ]
    assert plan_packs(rows, 100) == [[0, 2], [1, 3]]


def test_equal_prompts_and_one_that_another_begins_with_are_planned_as_they_are_computed() -> None:
    """40 tokens of prompt once, and 2 + 2 of two texts each; the longer prompt adds its 5 and 2 + 2."""
    prompt, texts = [1] * 40, ([7, 7, 7], [8, 8, 8])
    rows = [
        encoded("a", prompt, texts),
        encoded("b", prompt, ([9, 9, 9], [6, 6, 6])),
        encoded("c", [*prompt, *[2] * 5], texts),
    ]
    assert num_tree_tokens(rows) == 57
    others = [encoded(name, [place] * 57) for place, name in enumerate("de", start=3)]
    assert plan_packs([*rows, *others], 57) == [[0, 1, 2], [3], [4]]
    assert plan_packs([*rows, *others], 56) == [[3], [4], [2], [0, 1]]  # 57, 57, 49 and 48


def test_packs_that_fill_the_budget_are_not_evened_out_beyond_it() -> None:
    """3 + 3 and 2 + 2 + 2; always into the emptier of two would end with 3 + 2 + 2."""
    rows = [encoded(str(n), [n] * length) for n, length in enumerate([3, 3, 2, 2, 2], start=1)]
    assert plan_packs(rows, 6, layout="flat") == [[0, 1], [2, 3, 4]]


def test_packs_are_not_evened_out_where_a_passage_would_be_computed_twice() -> None:
    """180 and 30 tokens; 140 and 150 would be as many packs, but 80 more tokens."""
    rows = [encoded(str(n), [1] * 80 + [n] * 20) for n in range(2, 7)]
    assert plan_packs([*rows, encoded("other", [9] * 30)], 200) == [[0, 1, 2, 3, 4], [5]]


def test_groups_over_the_budget_come_apart_where_they_share_least() -> None:
    """All but one share a long beginning, and there again two and two a passage."""
    shots, odd = HEAD + [2] * 100, encoded("odd", HEAD + [3] * 5)
    rows = [encoded("q", [*shots, *[passage] * 50, question]) for question in (8, 9) for passage in (4, 5)]
    # Two of one passage: 110 + 50 + 2 tokens; a third would bring 51 more. The odd one adds its own five.
    assert plan_packs([*rows, odd], 170) == [[0, 2, 4], [1, 3]]


def test_what_exceeds_the_budget_shares_its_pack_with_nothing() -> None:
    """Not even with a question that adds no token to it."""
    rows = [encoded("whole", [1, 1, 2]), encoded("its beginning", [1, 1])]
    assert plan_packs(rows, 1) == [[0], [1]]


@pytest.mark.parametrize("num_questions", [7, 10, 100, 101])
@pytest.mark.parametrize("layout", ["tree", "flat"])
@pytest.mark.parametrize("beginnings", [1, 2])
def test_the_last_pack_is_no_crumb(num_questions: int, layout: Layout, beginnings: int) -> None:
    """Equal questions of 60 tokens, of which 40 are shared by all, or by every second."""
    rows = [encoded(str(n), [9 + n % beginnings] * 40 + [100 + n] + [1] * 19) for n in range(num_questions)]
    plan = plan_packs(rows, 200, layout=layout)
    sizes = [build_pack(rows, members, layout=layout).num_tokens for members in plan]
    assert max(sizes) <= 200
    assert min(sizes) >= max(sizes) / 2
    per_pack = (200 - 40) // 20 if layout == "tree" else 200 // 60
    assert len(plan) <= -(-num_questions // per_pack) + (beginnings - 1)


@every_layout
@given(rows=questions(), pack_tokens=st.integers(1, 300), data=st.data())
def test_every_question_is_in_one_pack_and_the_budget_is_kept(
    layout: Layout, rows: list[EncodedQuestion], pack_tokens: int, data: st.DataObject
) -> None:
    batch = data.draw(st.none() | st.lists(st.integers(0, len(rows) - 1), unique=True))
    plan = plan_packs(rows, pack_tokens, batch=batch, layout=layout)
    assert sorted(i for pack in plan for i in pack) == sorted(range(len(rows)) if batch is None else batch)
    for members in plan:
        pack = build_pack(rows, members, layout=layout)
        computed = as_rows(pack, 0)[0].size if layout == "rows" else pack.num_tokens
        assert computed <= pack_tokens or len(members) == 1


@given(
    rows=questions(),
    pack_tokens=st.integers(1, 300),
    multiple=st.integers(1, 4),
    layout=st.sampled_from(["tree", "flat"]),
)
def test_a_plan_for_several_processes(
    rows: list[EncodedQuestion], pack_tokens: int, multiple: int, layout: Layout
) -> None:
    """No more packs than fill the last round, the budget kept, every question once; one process changes nothing."""
    alone = plan_packs(rows, pack_tokens, layout=layout)
    plan = plan_packs(rows, pack_tokens, layout=layout, multiple=multiple)
    assert len(alone) <= len(plan) or multiple == 1
    assert len(plan) <= -(-len(alone) // multiple) * multiple
    assert sorted(row for members in plan for row in members) == list(range(len(rows)))
    for members in plan:
        tokens = build_pack(rows, members, layout=layout).num_tokens
        assert tokens <= pack_tokens or len(members) == 1
    assert plan_packs(rows, pack_tokens, layout=layout, multiple=1) == alone


def test_two_processes_get_the_same_to_do() -> None:
    """Sixteen questions that would fit one pack: two of about half of it, not one for the first process alone."""
    rows = [encoded(str(n), tuple(range(100 * n, 100 * n + 30 + 3 * n))) for n in range(16)]
    assert len(plan_packs(rows, 100_000)) == 1
    sizes = [build_pack(rows, members).num_tokens for members in plan_packs(rows, 100_000, multiple=2)]
    assert len(sizes) == 2
    assert max(sizes) <= 1.05 * sum(sizes) / 2


@every_layout
@given(rows=questions(by_text=False), pack_tokens=st.integers(1, 300))
def test_the_largest_pack_comes_first(layout: Layout, rows: list[EncodedQuestion], pack_tokens: int) -> None:
    packs = [build_pack(rows, members, layout=layout) for members in plan_packs(rows, pack_tokens, layout=layout)]
    sizes = [as_rows(pack, 0)[0].size if layout == "rows" else pack.num_tokens for pack in packs]
    assert sizes == sorted(sizes, reverse=True)


@every_layout
@given(rows=questions(), pack_tokens=st.integers(1, 300), data=st.data())
def test_a_plan_depends_on_the_contents_alone(
    layout: Layout, rows: list[EncodedQuestion], pack_tokens: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    other = [replace(rows[i], id=f"other {i}", answer_index=None) for i in order]
    contents = [
        [[(q[i].prompt_ids, q[i].continuations) for i in pack] for pack in plan_packs(q, pack_tokens, layout=layout)]
        for q in (rows, other)
    ]
    assert contents[0] == contents[1]


@every_layout
@given(rows=questions())
def test_each_score_stands_behind_its_prompt_and_what_was_read_of_its_choice(
    layout: Layout, rows: list[EncodedQuestion]
) -> None:
    pack = build_pack(rows, range(len(rows)), layout=layout)
    width = max(len(q.continuations) for q in rows)
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
            for j, i in enumerate(mine):
                seen = chain(pack, int(pack.scored_positions[i]))
                assert pack.token_ids[seen].tolist() == [*question.prompt_ids, *continuation[:j]]
                assert pack.position_ids[seen].tolist() == list(range(len(seen)))


@every_layout
@given(rows=questions())
def test_every_token_sees_its_own_sequence_up_to_itself(layout: Layout, rows: list[EncodedQuestion]) -> None:
    pack = build_pack(rows, range(len(rows)), layout=layout)
    prefixes = {sequence[:end] for sequence in read(rows) for end in range(1, len(sequence) + 1)}
    mask = visible(pack)
    assert [segment.start for segment in pack.segments] == [0, *(segment.end for segment in pack.segments[:-1])]
    assert pack.segments[-1].end == pack.num_tokens == len(pack.position_ids)
    for position in range(pack.num_tokens):
        seen = chain(pack, position)
        assert np.flatnonzero(mask[position]).tolist() == sorted(seen)
        assert pack.position_ids[seen].tolist() == list(range(len(seen)))
        assert tuple(pack.token_ids[seen].tolist()) in prefixes


@given(rows=questions())
def test_a_tree_computes_every_prefix_once(rows: list[EncodedQuestion]) -> None:
    tree, flat = (build_pack(rows, range(len(rows)), layout=layout) for layout in ("tree", "flat"))
    prefixes = {sequence[:end] for sequence in read(rows) for end in range(1, len(sequence) + 1)}
    assert tree.num_tokens == num_tree_tokens(rows) == len(prefixes) <= flat.num_tokens
    # Radix: siblings begin differently, and a segment ends nowhere but at a branch or at the end of a sequence.
    assert len(tree.segments) <= 2 * len(read(rows)) - 1
    begins = [(segment.parent, int(tree.token_ids[segment.start])) for segment in tree.segments]
    assert len(set(begins)) == len(begins)
    parents = [segment.parent for segment in tree.segments]
    assert all(parent < i for i, parent in enumerate(parents))
    assert all(parents.count(i) != 1 for i in range(len(parents)))


@given(rows=questions(), data=st.data())
def test_a_tree_is_the_same_in_any_order_of_its_rows(rows: list[EncodedQuestion], data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    one, other = build_pack(rows, range(len(rows))), build_pack(rows, order)
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.segments == other.segments
    for n, i in enumerate(order):
        assert other.answer_indices[n] == one.answer_indices[i]
        for name in ("scored_positions", "targets"):
            mine = (getattr(p, name)[p.owners // p.divisors.shape[1] == row] for p, row in ((one, i), (other, n)))
            np.testing.assert_array_equal(*mine)


@given(rows=questions())
def test_rows_hold_the_same_sequences(rows: list[EncodedQuestion]) -> None:
    pack = build_pack(rows, range(len(rows)), layout="rows")
    ids, places = as_rows(pack, 0)
    assert len(ids) == len(pack.segments)
    assert len(places) == len(pack.scored_positions)
    for (row, column), position in zip(places, pack.scored_positions, strict=True):
        assert ids[row, : column + 1].tolist() == pack.token_ids[chain(pack, int(position))].tolist()
    # Nothing but the sequences' own tokens and padding on the right; no row is wholly padding or longer than needed.
    lengths = (ids != 0).sum(axis=1)
    assert all((row[:length] != 0).all() for row, length in zip(ids, lengths, strict=True))
    assert lengths.tolist() == [segment.end - segment.start for segment in pack.segments]
    assert lengths.max() == ids.shape[1]


@pytest.mark.parametrize("answer_index", [None, 0, 3])
def test_the_label_changes_nothing_but_the_label(answer_index: int | None) -> None:
    pack, unlabelled = (build_pack([replace(LABEL, answer_index=a)], [0]) for a in (answer_index, None))
    assert pack.answer_indices.tolist() == [-1 if answer_index is None else answer_index]
    for name in ("rows", "token_ids", "position_ids", "scored_positions", "targets", "owners", "divisors"):
        np.testing.assert_array_equal(getattr(pack, name), getattr(unlabelled, name))
