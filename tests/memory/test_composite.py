"""A window over several trees keeps every invariant, and each node of it is the part's own."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactx.memory import Composite, MegaContextTree, WorkingContext
from megactx.memory.composite import Part, caps, cover, slots
from megactx.memory.invariants import violations

K = 4


@pytest.fixture
def make(encoder, table):
    """tokens, seed -> a tree of one row."""

    def tree(tokens, seed=0, **about):
        ids = torch.randint(50, (1, tokens), generator=torch.Generator().manual_seed(seed))
        made = MegaContextTree.from_tokens(ids, encoder(K), table)
        vars(made).update(about)
        return made

    return tree


@pytest.fixture
def composite(make):
    """Three trees; the tail of one part is no whole block."""
    parts = [Part("library", make(203, 1), 0, 0.25), Part("person", make(64, 2), 3, 0.1)]
    for part in parts:
        part.tree.read_only = True
    return Composite(make(130, 3), parts, 200)


def test_every_node_and_every_token_of_a_window_is_that_of_its_own_tree(composite, table):
    context = WorkingContext.recency(composite, 200, debug=True)
    read, place = context.to_tensor()[0], 0
    for tree, (lod, index) in zip(composite.trees, composite.segments(context), strict=True):
        for level, node in zip(lod.tolist(), index.tolist(), strict=True):
            own = tree.gists(level)[0, node] if level else table(tree.tokens[0, node].long())
            assert torch.equal(read[place], own)
            place += 1
    assert place == int(context.counts[0]) and int(context.ends()[0]) == 203 + 64 + 130 == int(composite.lengths[0])


def test_thousands_of_random_edits_keep_every_invariant_and_jump_only_at_the_borders_of_parts(composite):
    rng, context = random.Random(0), WorkingContext.recency(composite, 397)
    borders, total, kinds = {0, 203, 267}, 397, {True: 0, False: 0}
    for step in range(4000):
        lod, index = context.lod[0].tolist(), context.index[0].tolist()
        opens = [at for at, level in enumerate(lod) if level]
        sets = [at for at in range(len(lod) - K + 1) if _set(lod, index, at)]
        if expand := bool(opens) and (not sets or rng.random() < 0.5):
            context.expand(rng.choice(opens))
        else:
            at = rng.choice(sets)
            try:
                context.collapse(lod[at] + 1, index[at] // K)
            except ValueError as error:  # the sink, of the session alone
                assert "block 0" in str(error) and context.starts()[0, at] - composite.sink < K ** (lod[at] + 1)
                continue
        kinds[expand] += 1
        assert int(context.ends()[0]) == total
        starts, widths = context.starts()[0], context.widths()[0]
        ranks = torch.cat([torch.zeros(1, dtype=torch.long), widths.cumsum(0)])[:-1]
        jumps = (starts[1:] != starts[:-1] + widths[:-1]).nonzero().squeeze(1) + 1
        assert {*ranks[jumps].tolist()} <= borders
        if step % 50 == 0:
            assert not [what for what in violations(context) if "share" not in what]
    assert min(kinds.values()) > 1200


def _set(lod, index, at):
    return index[at] % K == 0 and all((lod[at + n], index[at + n]) == (lod[at], index[at] + n) for n in range(1, K))


def test_block_0_of_a_part_is_an_ordinary_block_and_that_of_the_session_stays_raw(composite):
    row, lod = torch.zeros(3, dtype=torch.long), torch.tensor([1, 1, 1])
    first = torch.tensor([base // K for base in composite.bases])
    assert composite.usable(row, lod, first).tolist() == [True, True, False]
    assert composite.usable(row, torch.zeros_like(lod), first * K).all()
    # What lies between parts, behind them, above them, is no node.
    between = torch.tensor([203 // K, composite.slot // K, composite.sink // K + 33])
    assert not composite.usable(row, lod, between).any()
    high = torch.tensor([3, 2**40, -1])
    assert composite.usable(torch.zeros(3).long(), torch.tensor([3, 1, 1]), high).tolist() == [False] * 3


def test_new_tokens_of_the_session_come_behind_all_parts(composite):
    context = WorkingContext.recency(composite, 200)
    context.budget = 300
    new = torch.randint(50, (1, 10))
    composite.own.append(new)
    context.append()
    assert not violations(context) and context.index[0, -10:].tolist() == [composite.sink + 130 + n for n in range(10)]
    assert torch.equal(context.to_tensor()[0, -10:], composite.base(new[0]))


def test_positions_count_through_all_parts_and_are_squeezed_below_the_limit(composite):
    context = WorkingContext.recency(composite, 200)
    raw = context.lod[0] == 0
    ranks = torch.cat([torch.zeros(1, dtype=torch.long), context.widths()[0].cumsum(0)[:-1]])
    assert torch.equal(context.positions()[0, raw], ranks[raw])
    for limit in (397, 250, 200):
        positions = context.positions(limit)[0]
        assert (positions.diff() > 0).all() and int(positions[0]) >= 0 and int(positions[-1]) == limit - 1


def test_reading_a_part_writes_nothing_and_who_would_is_refused(make, tmp_path):
    make(203, 1).save(tmp_path / "part")

    def there():  # without what SQLite's readers share
        return {path.name: path.read_bytes() for path in (tmp_path / "part").iterdir() if path.suffix != ".db-shm"}

    before = there()
    own = make(130, 3)
    part = MegaContextTree.load(tmp_path / "part", own.encoder, own.base, read_only=True)
    context = WorkingContext.recency(Composite(own, [Part("part", part, 0)], 200), 200)
    for _ in range(3):
        context.to_tensor()
    context.budget = 300
    context.expand(0)
    assert int(context.lod[0, 0]) < 3 and own.levels[1].whole("access").sum() > 0
    assert not any(level.dirty for level in part.levels)
    assert there() == before
    for change in (
        lambda: part.append(torch.zeros(1, 4).long()),
        lambda: part.protect(1, torch.tensor([[1]])),
        lambda: part.merge(own),
        lambda: part.refresh(own.encoder),
        lambda: part.save(tmp_path / "elsewhere"),
    ):
        with pytest.raises(ValueError, match="read only"):
            change()


def test_shares_are_at_most_half_and_what_nobody_names_is_divided_evenly(make):
    library, person, project = (make(400, seed) for seed in range(3))

    def of(*shares, budget=400):
        parts = [library, person, project]
        return caps([Part(str(n), parts[n], n, share) for n, share in enumerate(shares)], budget)

    assert of(0.25, 0.25) == [100, 100] and of(0.3, None, None) == [120, 40, 40] and of(None) == [200]
    assert of(None, budget=4000) == [400]  # no more entries than it has tokens
    with pytest.raises(ValueError, match=r"\(0 0.3, 1 0.3\) are not allowed: above 0, and at most 0.5 together"):
        of(0.3, 0.3)
    with pytest.raises(ValueError, match="part 1: 400 tokens take at least 4 entries, its share of budget=400 is 2"):
        of(0.3, 0.005)
    with pytest.raises(ValueError, match="part 1: .* is 0; give it more, drop another part"):
        of(0.5, None)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(tokens=st.integers(1, 900), room=st.floats(0, 1), seed=st.integers(0, 3))
def test_the_cold_start_of_a_part_stands_for_all_of_it_within_its_share(tokens, room, seed):
    tree = MegaContextTree.from_tokens(
        torch.randint(50, (1, tokens), generator=torch.Generator().manual_seed(seed)), _Flat(), _table()
    )
    part, least = Part("part", tree, 0), None
    least = len(cover(part, tokens, coarsest=True)[0])
    budget = max(least, round(room * tokens))
    lod, index = cover(part, budget)
    assert len(lod) <= budget and torch.equal(index * K**lod, (K**lod).cumsum(0) - K**lod)
    assert int((K**lod).sum()) == tokens and int(lod.max() - lod[: max(1, len(lod) - tokens % K)].min()) <= tree.depth
    assert budget - len(lod) < K or not lod.any()  # and what there is room for is open
    with pytest.raises(ValueError, match="is too small, its coarsest view has"):
        cover(part, least - 1)


class _Flat:
    block_size, width = K, 4

    def encode_block(self, children):
        return children.mean(1)

    def offset_in(self, tokens):
        return tokens // 2


def _table():
    torch.manual_seed(0)
    return torch.nn.Embedding(50, 4).requires_grad_(False)


def test_gists_of_a_closed_part_stand_at_their_coarsest_and_are_not_opened(make):
    preset, own = make(64, 1), make(130, 2)
    composite = Composite(own, [Part("preset", preset, 0, closed=True)], 200)
    context = WorkingContext.recency(composite, 200, debug=True)
    assert context.lod[0, :2].tolist() == [3, 0] and composite.caps == [1]
    context.budget = 300
    with pytest.raises(ValueError, match="what lies below entry 0 of row 0 was taken away"):
        context.expand(0)


def test_what_cannot_be_a_part_is_refused_by_name(make, encoder, table):
    own = make(130, 3)
    two = MegaContextTree.from_tokens(torch.zeros(2, 40).long(), encoder(K), table)
    with pytest.raises(ValueError, match="part pair: 2 rows"):
        Composite(own, [Part("pair", two, 0)], 200)
    with pytest.raises(ValueError, match="each name and slot once"):
        Composite(own, [Part("a", make(40), 0), Part("a", make(40), 1)], 200)
    with pytest.raises(ValueError, match="there are 32 parts at most"):
        Composite(own, [Part("a", make(40), 32)], 200)
    with pytest.raises(ValueError, match="a history of 2 rows has none"):
        Composite(two, [Part("a", make(40), 0)], 200)


@pytest.mark.parametrize("k", [2, 3, 4, 8, 16, 32, 64, 100, 1024])
def test_addresses_leave_room_for_parts_and_for_the_names_of_nodes(k):
    slot, own = slots(k)
    assert own % slot == 0 and own >= 32 * slot and own <= 2**37 and slot >= 2**20


def test_a_part_of_which_something_was_taken_away_shows_what_is_left(make, tmp_path):
    from megactx.memory import curation

    make(40_000, 1).save(tmp_path / "part")
    tree = curation.Curated(tmp_path / "part")
    plan = {"format": 1, "tokens": 40_000, "actions": [
        {"start": 64, "stop": 128, "action": "compact", "floor": 1, "reason": "test", "bytes": 0}
    ]}  # fmt: skip
    tree.apply(plan)
    own = make(130, 3)
    part = MegaContextTree.load(tmp_path / "part", own.encoder, own.base, read_only=True)
    composite = Composite(own, [Part("part", part, 0)], 100_000)
    assert composite.compacted == 16
    context = WorkingContext.recency(composite, 100_000, debug=True)
    gists = (context.lod[0] == 1).nonzero().squeeze(1)
    assert context.starts()[0, gists].tolist() == [*range(64, 128, K)]
    with pytest.raises(ValueError, match="was taken away"):
        context.expand(int(gists[0]))


def test_what_another_part_has_newer_stays_closed(make):
    part = Part("old", make(203, 1), 0, overruled=((10, 60), (100, 116)))
    lod, index = torch.tensor([1, 1, 1, 1, 2, 2, 1]), torch.tensor([2, 3, 14, 15, 1, 6, 25])
    assert part.within(lod, index).tolist() == [False, True, True, False, True, False, True]
    composite = Composite(make(130, 3), [part], 700)
    context = WorkingContext.recency(composite, 700, debug=True)
    gists = (context.lod[0] == 1).nonzero().squeeze(1)
    assert context.index[0, gists].tolist() == [*range(3, 15), *range(25, 29)] and (context.lod[0] <= 1).all()
    with pytest.raises(ValueError, match="was taken away"):
        context.expand(int(gists[0]))
    context.collapse(2, 1)
    assert not composite.openable(*(torch.tensor([n]) for n in (0, 2, 1))).any()


def test_what_is_open_is_read_on_where_another_tree_took_its_place_on_the_disk(make, tmp_path):
    tree, own = make(40_000, 1), make(130, 3)
    tree.save(tmp_path / "part")
    part = MegaContextTree.load(tmp_path / "part", own.encoder, own.base, read_only=True)
    make(500, 2).save(tmp_path / "part")  # whole, beside the old database, which is then removed
    context = WorkingContext.recency(Composite(own, [Part("part", part, 0)], 400), 400, debug=True)
    read = context.to_tensor()[0]  # the first look ahead is asked for here, by the file's name
    (lod, index), _ = context.tree.segments(context)
    for at, (level, node) in enumerate(zip(lod.tolist(), index.tolist(), strict=True)):
        assert torch.equal(read[at], tree.gists(level)[0, node] if level else tree.base(tree.tokens[0, node].long()))
    part.cache.close()
