"""A working context stands for every token exactly once, before and after every edit."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megactx.gist import GistNet
from megactx.memory import MegaContextTree, WorkingContext
from megactx.memory.cold_start import FINE, RAW, entries
from megactx.memory.invariants import violations

K = 4


@pytest.fixture
def tree(encoder, table):
    tokens = torch.randint(50, (3, 300), generator=torch.Generator().manual_seed(0))
    return MegaContextTree.from_tokens(tokens, encoder(K), table, torch.tensor([300, 170, 9]))


def raw(tree, budget: int, debug: bool = False) -> WorkingContext:
    """Nothing but tokens."""
    index = torch.arange(int(tree.lengths.max())).repeat(tree.rows, 1)
    index = torch.where(index < tree.lengths[:, None], index, 0)
    return WorkingContext(tree, torch.zeros_like(index), index, tree.lengths, budget, debug)


def rows(context) -> list[list[tuple[int, int]]]:
    return [
        list(zip(lod[:n], index[:n], strict=True))
        for lod, index, n in zip(context.lod.tolist(), context.index.tolist(), context.counts.tolist(), strict=True)
    ]


def test_the_embeddings_are_those_of_exactly_the_tokens_that_the_entries_stand_for():
    torch.manual_seed(0)
    net, table = GistNet(32, 0.05, block_size=K, num_heads=4, skip="none"), torch.nn.Embedding(50, 32)
    tokens = torch.randint(50, (2, 300))
    tree = MegaContextTree.from_tokens(tokens, net, table, torch.tensor([300, 211]))
    context = raw(tree, 300)
    context.collapse(1, torch.tensor([1, 2, 3, 20, 21, 22, 23]))
    context.collapse(2, 5)
    context.collapse(1, torch.tensor([40, 52 - 1]), row=1)
    read, starts, widths = context.to_tensor(), context.starts(), context.widths()
    assert read.shape == (2, int(context.counts.max()), 32)
    with torch.no_grad():
        for row, count in enumerate(context.counts.tolist()):
            covered = 0
            for at in range(count):
                start, width, lod = (int(t[row, at]) for t in (starts, widths, context.lods()))
                assert start == covered
                covered += width
                span = table(tokens[row, start : start + width])[None]
                plain = net.encode_lod(span, lod)[0] if lod else span[0, 0]
                torch.testing.assert_close(read[row, at], plain)
            assert covered == int(context.ends()[row]) == int(tree.lengths[row])
            assert not read[row, count:].any()
    assert sorted(set(context.lods()[0].tolist())) == [0, 1, 2]


def test_all_tokens_raw_are_the_plain_embeddings_at_the_plain_positions(tree, table):
    context = raw(tree, 300)
    assert torch.equal(context.to_tensor()[0], table(tree.tokens[0].long()))
    assert torch.equal(context.positions()[0], torch.arange(300))
    assert torch.equal(context.positions(limit=300), context.positions())
    assert context.lengths.tolist() == [300, 170, 9]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    k=st.sampled_from([2, 3, 4, 8, 32]),
    length=st.integers(0, 200_000),
    room=st.floats(0, 1),
)
def test_recency_keeps_every_invariant_and_the_budget_or_names_what_it_would_take(k, length, room):
    tree = Grid(k, length)
    budget = max(1, round(room**6 * 1.1 * length))
    try:
        lod, index, lengths = entries(tree, budget)
    except ValueError as error:
        least = int(str(error).split("at least ")[1].split()[0])
        assert least > budget and int(entries(tree, least)[2][0]) == least
        return
    width = k**lod
    start = index * width
    assert int(lengths[0]) == lod.shape[1] <= budget
    assert torch.equal(start[0], width[0].cumsum(0) - width[0]) and int(width.sum()) == length
    assert not ((lod > 0) & (index == 0)).any()
    newest = lod[0, start[0] >= length - RAW]
    if not newest.any() and length > RAW:  # the rule holds: then older text is never finer, but for the ramp of node 0
        free = start[0] >= k ** int(lod.max())
        assert (lod[0, free].diff() <= 0).all()


class Grid:
    """What the cold start looks at in a tree."""

    rows, device, compacted = 1, "cpu", 0

    def __init__(self, k: int, length: int):
        self.block_size, self.lengths = k, torch.tensor([length])
        self.depth = max(n for n in range(30) if k**n <= max(1, length))


def test_recency_follows_the_rule_where_the_budget_is_that_of_the_rule():
    def runs(length, budget):
        lod, index, _ = entries(Grid(32, length), budget)
        return [(n, int((lod == n).sum())) for n in lod[0].unique_consecutive().tolist()]

    assert runs(20, 20) == [(0, 20)]
    assert runs(4096, 4096) == [(0, 4096)]
    # The sink; 31 blocks for which no LOD2 can stand; LOD2; at least 2,048 tokens at LOD1; at least 256 raw.
    length = 40 * 1024
    lod, index, _ = entries(Grid(32, length), 32 + 31 + 36 + 88 + 256)
    width = 32 ** lod[0]
    assert [int((lod == n).sum()) for n in (0, 1, 2)] == [32 + 256, 31 + 88, 36]
    assert int(width[lod[0] == 0].sum()) == 32 + RAW and int(width[lod[0] == 1].sum()) == 31 * 32 + FINE + 768
    # Spare budget widens LOD0 first, a block for 31 entries, then LOD1.
    wider, _, lengths = entries(Grid(32, length), 32 + 31 + 36 + 88 + 256 + 31 * 7 + 3)
    assert int((wider == 0).sum()) == 32 + 256 + 32 * 7 and int(lengths[0]) == 32 + 31 + 36 + 88 + 256 + 31 * 7
    # A million tokens: coarser levels only where LOD2 does not fit.
    assert {n for n, _ in runs(1_000_000, 8192)} == {0, 1, 2} and {n for n, _ in runs(1_000_000, 700)} == {0, 1, 2, 3}


def test_recency_takes_rows_of_different_lengths(tree):
    context = WorkingContext.recency(tree, 200)
    assert (context.counts <= 200).all() and context.ends().tolist() == [300, 170, 9]
    assert rows(context)[2] == [(0, i) for i in range(9)]
    with pytest.raises(ValueError, match="budget=3 is too small: 300 tokens take at least"):
        WorkingContext.recency(tree, 3)


def test_ten_thousand_random_legal_edits_keep_the_invariants_and_do_what_they_say(encoder, table):
    rng, b, budget = random.Random(0), 16, 120
    tokens = torch.randint(50, (b, 3000))
    tree = MegaContextTree.from_tokens(tokens[:, :300], encoder(K), table)
    context = WorkingContext.recency(tree, budget)
    model, done, edits, kinds = rows(context), 300, 0, {}
    while edits < 10_000:
        expands, collapses = [], []
        for row, held in enumerate(model):
            gists = [i for i, (lod, _) in enumerate(held) if lod]
            sets = [i for i in range(len(held)) if whole(held, i)]
            if gists and len(held) + K - 1 <= budget and (rng.random() < 0.6 or not sets):
                expands.append((row, rng.choice(gists)))
            elif sets:
                collapses.append((row, rng.choice(sets)))
        if expands:
            for row, at in expands:
                lod, index = model[row][at]
                model[row][at : at + 1] = [(lod - 1, index * K + i) for i in range(K)]
            row, at = torch.tensor(expands).T
            context.expand(at, row)
        if collapses:
            parents = [(row, model[row][at][0] + 1, model[row][at][1] // K, at) for row, at in collapses]
            for row, lod, index, at in parents:
                model[row][at : at + K] = [(lod, index)]
            row, lod, index, _ = torch.tensor(parents).T
            context.collapse(lod, index, row)
        for name, count in (("expand", len(expands)), ("collapse", len(collapses))):
            kinds[name] = kinds.get(name, 0) + count
            edits += count
        if rng.random() < 0.3:
            at, count, lod, nodes = swap(rng, model[0], tree, budget)
            context.replace(at, count, torch.tensor(nodes), lod)
            model[0][at : at + count] = [(lod, i) for i in nodes]
            kinds["replace"], edits = kinds.get("replace", 0) + 1, edits + 1
        if done < 3000 and max(map(len, model)) + 3 <= budget and rng.random() < 0.2:
            tree.append(tokens[:, done : done + 3])
            done += 3
            context.append()
            for held in model:
                held += [(0, i) for i in range(done - 3, done)]
            kinds["append"], edits = kinds.get("append", 0) + b, edits + b
        assert not violations(context)
        assert rows(context) == model
    assert min(kinds.values()) > 100 and done > 400, (kinds, done)


def whole(held: list[tuple[int, int]], at: int) -> bool:
    """Whether the K children of a gist that may stand begin here."""
    lod, index = held[at]
    return index % K == 0 and index > 0 and held[at : at + K] == [(lod, index + i) for i in range(K)]


def swap(rng, held, tree, budget: int) -> tuple[int, int, int, list[int]]:
    """A random node that may stand, in place of all within its span; or one of its levels of children."""
    while True:
        lod = rng.randrange(1, 4)
        node = rng.randrange(1, max(2, int(tree.counts(lod)[0])))
        first, end = node * K**lod, (node + 1) * K**lod
        inside = [i for i, (n, at) in enumerate(held) if first <= at * K**n and (at + 1) * K**n <= end]
        if sum(K ** held[i][0] for i in inside) != K**lod:
            continue
        new = rng.randrange(0, lod + 1)
        nodes = [node * K ** (lod - new) + i for i in range(K ** (lod - new))]
        if len(held) - len(inside) + len(nodes) <= budget:
            return inside[0], len(inside), new, nodes


ILLEGAL = {
    "a token is expanded": (lambda c: c.expand(0), "is a token"),
    "an entry is expanded that is not there": (lambda c: c.expand(500), "entry 500 is not in row 0"),
    "an entry of the padding is expanded": (lambda c: c.expand(20, row=2), "entry 20 is not in row 2, which has 9"),
    "an entry is expanded twice": (lambda c: c.expand(torch.tensor([4, 4])), "named twice"),
    "one of two entries is a token": (lambda c: c.expand(torch.tensor([4, 1])), "is a token"),
    "a row that is not there": (lambda c: c.expand(4, row=3), "row=.3. is not allowed: 0 to 2"),
    "the sink is collapsed": (lambda c: c.collapse(1, 0), "holds block 0"),
    "a set is collapsed that is not all there": (lambda c: c.collapse(2, 3), "children .* are not all in row 0"),
    "what is a gist already is collapsed": (lambda c: c.collapse(1, 1), "are not all in row 0"),
    "what is coarser already is collapsed": (lambda c: c.collapse(1, 33), "are not all in row 0"),
    "a gist is collapsed that is not in the tree": (lambda c: c.collapse(1, 75), "not in the tree"),
    "a level that is not there": (lambda c: c.collapse(9, 1), "not in the tree"),
    "a negative level": (lambda c: c.collapse(-1, 1), "not in the tree"),
    "a token is collapsed into itself": (lambda c: c.collapse(0, 5), "lod=0 is not allowed"),
    "a protected gist": (lambda c: c.collapse(1, 6), "is protected"),
    "more tokens than the tree has": (lambda c: c.append(1), "has .0, 0, 0. more tokens"),
    "fewer than no tokens": (lambda c: c.append(-1), "append: count="),
    "another span": (lambda c: c.replace(4, 1, torch.tensor([2]), 1), "do not stand for the same tokens"),
    "a part of the span": (lambda c: c.replace(4, 1, torch.tensor([4, 5, 6]), 0), "do not stand for the same"),
    "a span and more": (lambda c: c.replace(4, 1, torch.arange(4, 9), 0), "do not stand for the same tokens"),
    "the right tokens in disorder": (lambda c: c.replace(4, 1, torch.tensor([4, 6, 5, 7]), 0), "do not stand"),
    "half a sibling set by its parent": (lambda c: c.replace(12, 2, torch.tensor([3]), 1), "do not stand"),
    "the sink by its gist": (lambda c: c.replace(0, 4, torch.tensor([0]), 1), "holds block 0"),
    "nothing is replaced": (lambda c: c.replace(4, 0, torch.tensor([1]), 1), "at least 1 of both"),
    "replaced by nothing": (lambda c: c.replace(4, 1, torch.tensor([]), 1), "at least 1 of both"),
    "entries beyond the end": (lambda c: c.replace(200, 90, torch.tensor([1]), 1), "is not in row 0"),
    "negative entries": (lambda c: c.replace(-1, 1, torch.tensor([1]), 1), "is not in row 0"),
    "a replaced row that is not there": (lambda c: c.replace(4, 1, torch.tensor([1]), 1, row=-1), "row="),
}


@pytest.mark.parametrize("what", ILLEGAL)
def test_an_illegal_edit_is_refused_and_changes_nothing(tree, what):
    context = raw(tree, 400)
    context.collapse(1, torch.tensor([1, 2, 32, 33, 34, 35]))
    context.collapse(2, 8)
    tree.protect(1, torch.tensor([[6], [6], [1]]))
    edit, message = ILLEGAL[what]
    before = context.lod.clone(), context.index.clone(), context.counts.clone()
    with pytest.raises(ValueError, match=message):
        edit(context)
    assert all(torch.equal(a, b) for a, b in zip(before, (context.lod, context.index, context.counts), strict=True))


def test_the_budget_is_never_exceeded(tree):
    context = raw(tree, 300)
    context.collapse(1, torch.tensor([1, 2]))
    context.budget = int(context.counts.max())
    before = context.lod.clone(), context.index.clone(), context.counts.clone()
    tree.append(torch.zeros(3, 1, dtype=torch.long))
    nodes = torch.arange(4, 8)
    for edit in (lambda: context.expand(4), lambda: context.replace(4, 1, nodes, 0), lambda: context.append()):
        with pytest.raises(ValueError, match="the budget is 294"):
            edit()
    assert all(torch.equal(a, b) for a, b in zip(before, (context.lod, context.index, context.counts), strict=True))
    context.collapse(1, 3)  # pays for
    context.expand(4)
    assert int(context.counts[0]) == 294


def test_expand_undoes_collapse_and_several_edits_are_one(tree):
    context, other = raw(tree, 300, debug=True), raw(tree, 300)
    blocks = torch.tensor([3, 9, 4])
    context.collapse(1, blocks, torch.tensor([0, 1, 0]))
    for row, block in ((0, 3), (1, 9), (0, 4)):
        other.collapse(1, block, row)
    assert rows(context) == rows(other)
    context.expand(torch.tensor([12, 36, 13]), torch.tensor([0, 1, 0]))
    assert rows(context) == rows(raw(tree, 300))


def test_append_takes_up_what_the_tree_has_more(tree):
    context = raw(tree, 310)
    tree.append(torch.ones(3, 6, dtype=torch.long), torch.tensor([6, 2, 0]))
    context.append(torch.tensor([1, 2, 0]))
    assert context.ends().tolist() == [301, 172, 9]
    context.append()
    assert rows(context) == rows(raw(tree, 310))


@pytest.mark.parametrize(
    ("lod", "index", "message"),
    [
        ([0, 0, 1], [0, 1, 1], "contiguity"),
        ([0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 1, 3], "contiguity"),
        ([0, 0, 0, 0, 1, 2], [0, 1, 2, 3, 1, 1], "contiguity"),
        ([0, 0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5, 1], "swaps"),
        ([1, 1], [0, 1], "tree: row 0 .* hold block 0"),
        ([0, 5], [0, 0], "levels that the tree has not"),
        ([0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], "budget: row 0 has more than 5 entries"),
    ],
)
def test_entries_that_break_an_invariant_are_refused_by_its_name(encoder, table, lod, index, message):
    tree = MegaContextTree.from_tokens(torch.zeros(1, 40, dtype=torch.long), encoder(K), table)
    budget = 5 if "budget" in message else 40
    with pytest.raises(ValueError, match=message):
        WorkingContext(tree, torch.tensor([lod]), torch.tensor([index]), torch.tensor([len(lod)]), budget)


@pytest.mark.parametrize("position", ["centre", "end"])
def test_a_gist_sits_where_its_gistnet_was_trained_to_sit(position):
    net, table = GistNet(32, 0.05, block_size=K, num_heads=4, position=position), torch.nn.Embedding(50, 32)
    tree = MegaContextTree.from_tokens(torch.zeros(1, 64, dtype=torch.long), net, table)
    context = raw(tree, 64)
    context.collapse(1, torch.tensor([1, 4, 5, 6, 7]))
    context.collapse(2, 1)
    assert context.positions()[0, 4] == 4 + (2 if position == "centre" else 3)
    assert context.positions()[0, 13] == 16 + (8 if position == "centre" else 15)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(length=st.integers(270, 1500), spare=st.integers(0, 600), budget=st.integers(290, 700))
def test_rebased_positions_keep_the_sink_and_the_newest_run_and_stay_in_order_within_the_range(
    encoder, table, length, spare, budget
):
    tokens = torch.zeros(2, length, dtype=torch.long)
    tree = MegaContextTree.from_tokens(tokens, encoder(K), table, torch.tensor([length, 100]))
    context = WorkingContext.recency(tree, budget)
    limit = int(context.counts.max()) + spare
    absolute, positions = context.positions(), context.positions(limit)
    assert torch.equal(positions[1], absolute[1])  # that row ends below the limit
    if length <= limit:
        assert torch.equal(positions, absolute)
        return
    count = int(context.counts[0])
    lod, at = context.lods()[0, :count], positions[0, :count]
    run = count - 1 - int(lod.nonzero().max())
    assert at[:K].tolist() == list(range(K)) and int(at[-1]) == limit - 1
    assert (at.diff() > 0).all() and (at[count - run :].diff() == 1).all()
    if spare > 300:
        assert (at <= absolute[0, :count]).all()
    with pytest.raises(ValueError, match=f"do not fit limit={count - 1}"):
        context.positions(count - 1)
