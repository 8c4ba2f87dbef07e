"""A tree is its tokens and the gists above them, whatever the pieces in which it was fed."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megactx.gist import GistNet
from megactx.memory import MegaContextTree, build

same = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def levels(tree) -> list[torch.Tensor]:
    """All that a tree says, without times and counts of access."""
    known = [tree.about(n, what) for n in range(1, tree.depth + 1) for what in ("version", "protected")]
    return [tree.tokens, tree.lengths, *[tree.gists(n) for n in range(1, tree.depth + 1)], *known]


def assert_same(one, other):
    assert one.depth == other.depth
    for a, b in zip(levels(one), levels(other), strict=True):
        assert torch.equal(a, b)


@st.composite
def cuts(draw):
    """(K, highest level, lengths of the rows, how many tokens of each row come at a time)."""
    k, depth = draw(st.sampled_from([(2, 5), (3, 4), (4, 3), (5, 3), (8, 2), (16, 2), (32, 1), (32, 2), (7, 3)]))
    most = min(1500, 2 * k**depth + k)
    lengths = draw(st.lists(st.integers(0, most), min_size=1, max_size=3))
    pieces, left = [], list(lengths)
    while any(left):
        piece = [draw(st.integers(0, min(n, max(lengths) // 2 + 1))) for n in left]
        if not any(piece):
            piece = left
        pieces.append(piece)
        left = [n - p for n, p in zip(left, piece, strict=True)]
    return k, depth, lengths, pieces


@same
@given(cut=cuts(), left=st.sampled_from([0, 0, 5]))
def test_building_at_once_equals_appending_in_any_pieces_bit_for_bit(encoder, table, cut, left):
    k, depth, lengths, pieces = cut
    tokens = ids(len(lengths), max(1, *lengths))
    net = encoder(k, places=True, left_context=left)
    whole = MegaContextTree.from_tokens(tokens, net, table, torch.tensor(lengths), max_level=depth)
    grown, done = MegaContextTree(net, table, len(lengths), max_level=depth), [0] * len(lengths)
    for piece in pieces:
        part = torch.zeros(len(lengths), max(piece), dtype=torch.long)
        for row, count in enumerate(piece):
            part[row, :count] = tokens[row, done[row] : done[row] + count]
            done[row] += count
        grown.append(part, torch.tensor(piece))
    assert_same(whole, grown)
    assert whole.lengths.tolist() == lengths
    for n in range(1, whole.depth + 1):
        assert whole.counts(n).tolist() == [length // k**n for length in lengths]
        assert whole.depth == max(n for n in range(depth + 1) if k**n <= max(lengths))


@pytest.mark.parametrize("position", ["centre", "end"])
def test_pieces_give_the_same_bits_with_a_real_gistnet_also_while_it_is_in_training_mode(position):
    torch.manual_seed(0)
    net = GistNet(32, 0.05, block_size=8, num_heads=4, skip="none", position=position, dropout=0.5).train()
    table, tokens = torch.nn.Embedding(50, 32), ids(2, 700)
    whole = MegaContextTree.from_tokens(tokens, net, table)
    grown = MegaContextTree(net, table, 2)
    for part in tokens.split(13, dim=1):
        grown.append(part)
    assert_same(whole, grown)
    assert whole.depth == 3 and net.training and not whole.gists(1).requires_grad


def test_pages_and_pieces_of_any_size_hold_the_same_tree(encoder, table, monkeypatch):
    from megactx.memory import tree as module

    tokens, lengths = ids(2, 2000), torch.tensor([2000, 1311])
    large = MegaContextTree.from_tokens(tokens, encoder(4, places=True), table, lengths)
    monkeypatch.setattr(module, "TOKENS", 100)
    monkeypatch.setattr(module, "NODES", 7)
    monkeypatch.setattr(build, "PIECE", 90)
    small = MegaContextTree.from_tokens(tokens, encoder(4, places=True), table, lengths)
    assert len(small.levels[0].pages) == 20
    assert_same(large, small)
    lod, index = torch.randint(5, (2, 60)), torch.randint(5, (2, 60))
    assert torch.equal(large.gather(lod, index), small.gather(lod, index))
    room = sum(column.nbytes for level in small.levels for page in level.pages for column in page.values())
    assert room <= 1.1 * small.bytes()


def test_a_node_is_the_gist_of_its_own_tokens():
    torch.manual_seed(0)
    net, table = GistNet(32, 0.05, block_size=4, num_heads=4, skip="none"), torch.nn.Embedding(50, 32)
    tokens = ids(2, 150)
    tree = MegaContextTree.from_tokens(tokens, net, table, torch.tensor([150, 70]))
    with torch.no_grad():
        for level in (1, 2, 3):
            for row, index in ((0, 0), (0, 1), (0, 150 // 4**level - 1), (1, 70 // 4**level - 1)):
                span = tokens[row, index * 4**level : (index + 1) * 4**level]
                plain = net.encode_lod(table(span)[None], level)[0]
                torch.testing.assert_close(tree.gists(level)[row, index], plain)


def test_left_context_is_what_lies_left_of_the_block_and_the_gists_left_of_the_children(encoder, table):
    net = encoder(4, left_context=6)
    tree = MegaContextTree.from_tokens(ids(1, 64), net, table)
    embedded, below = table(ids(1, 64))[0], tree.gists(1)[0]
    for nodes, level, left in ((embedded, 1, 6), (below, 2, 1)):
        for index in (0, 1, 3):
            window = nodes[max(0, index * 4 - left) : index * 4].sum(0) * 0.25
            plain = (nodes[index * 4 : index * 4 + 4] * torch.linspace(0.5, 1.5, 4)[:, None]).mean(0) + window
            torch.testing.assert_close(tree.gists(level)[0, index], plain)


def test_gather_gives_tokens_and_gists_of_any_levels_and_counts_gists_that_were_read(encoder, table):
    tree = MegaContextTree.from_tokens(ids(2, 100), encoder(4), table, torch.tensor([100, 40]))
    lod, index = torch.tensor([[0, 1, 2, 1], [0, 2, 1, 0]]), torch.tensor([[99, 24, 5, 24], [39, 1, 9, 0]])
    read = tree.gather(lod, index)
    for row in range(2):
        for at in range(4):
            n, i = int(lod[row, at]), int(index[row, at])
            plain = tree.gists(n)[row, i] if n else table(tree.tokens[row, i].long())
            assert torch.equal(read[row, at], plain)
    assert tree.about(1, "access")[0, 24] == 2 and tree.about(1, "access").sum() == 3
    assert torch.equal(tree.gather(1, torch.tensor([[3], [4]]))[:, 0], tree.gists(1)[[0, 1], [3, 4]])


def test_nodes_that_are_not_there_are_refused(encoder, table):
    tree = MegaContextTree.from_tokens(ids(2, 100), encoder(4), table, torch.tensor([100, 40]))
    index = torch.tensor([[1, 5], [0, 1]])
    for call, message in (
        (lambda: tree.gather(4, torch.tensor([[0], [0]])), "lod 4"),
        (lambda: tree.gather(1, torch.tensor([[-1], [0]])), "index -1"),
        (lambda: tree.gather(1, torch.tensor([0])), "index has shape"),
        (lambda: tree.gather(torch.tensor([[1]]), index), "lod has shape"),
        (lambda: tree.gists(4), "allowed are 1 to 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_ready_gists_are_taken_as_they_are(encoder, table):
    net, gists = encoder(4), torch.randn(2, 3, 4)
    tree = MegaContextTree.from_tokens(ids(2, 6), net, table)
    before = net.blocks
    tree.append(ids(2, 10, seed=1), torch.tensor([10, 3]), gists=gists)
    assert torch.equal(tree.gists(1)[0, 1:], gists[0]) and torch.equal(tree.gists(1)[1, 1], gists[1, 0])
    assert tree.counts(1).tolist() == [4, 2] and net.blocks - before == 16  # one batch, for the one node of level 2
    with pytest.raises(ValueError, match=r"expected \[2, 1, 4\]: one for each completed block"):
        tree.append(ids(2, 4), gists=gists)


def test_slice_keeps_what_lies_on_its_grid_and_equals_a_tree_of_these_tokens(encoder, table):
    for left in (0, 3):
        net = encoder(4, left_context=left)
        tokens = ids(2, 200)
        tree = MegaContextTree.from_tokens(tokens, net, table, torch.tensor([200, 90]))
        for start, stop in ((0, 200), (64, 150), (20, 60), (100, None)):
            before = net.blocks
            part = tree.slice(start, stop)
            if start == 64 and not left:
                assert net.blocks == before
            lengths = (torch.tensor([200, 90]).clamp(max=stop or 200) - start).clamp(min=0)
            assert_same(part, MegaContextTree.from_tokens(tokens[:, start:stop], net, table, lengths))
    for start, stop in ((3, 50), (-4, 50), (60, 40)):
        with pytest.raises(ValueError, match=f"start={start} is not allowed: a multiple of 4"):
            tree.slice(start, stop)


@pytest.mark.parametrize("left", [0, 3])
@pytest.mark.parametrize("lengths", [(64, 64), (20, 16), (128, 4), (0, 8)])
def test_merge_equals_a_tree_of_both_texts_and_knows_where_each_part_came_from(encoder, table, lengths, left):
    net, lengths = encoder(4, left_context=left), torch.tensor(lengths)
    first, second, other = ids(2, 128), ids(2, 90, seed=1), torch.tensor([90, 33])
    tree = MegaContextTree.from_tokens(first, net, table, lengths, name="old")
    added = MegaContextTree.from_tokens(second, net, table, other, name="new")
    before = net.blocks
    tree.merge(added)
    if lengths.tolist() == [64, 64] and not left:
        assert net.blocks - before <= 16  # level 3 only: all nodes of the second tree lie on the grid
    text = torch.zeros(2, int((lengths + other).max()), dtype=torch.long)
    for row, length in enumerate(lengths):
        text[row, :length] = first[row, :length]
        text[row, length : length + other[row]] = second[row, : other[row]]
    assert_same(tree, MegaContextTree.from_tokens(text, net, table, lengths + other))
    assert [name for name, _ in tree.parts] == ["old", "new"]


def test_merge_with_itself_doubles_a_tree(encoder, table):
    tree = MegaContextTree.from_tokens(ids(1, 32), encoder(4), table)
    tree.merge(tree)
    assert_same(tree, MegaContextTree.from_tokens(ids(1, 32).repeat(1, 2), encoder(4), table))


def test_merge_refuses_what_does_not_fit_and_changes_nothing(encoder, table):
    tree = MegaContextTree.from_tokens(ids(1, 30), encoder(4), table)
    other = MegaContextTree.from_tokens(ids(1, 8), encoder(4), table)
    with pytest.raises(ValueError, match=r"lengths \[30\], allowed are multiples of 4"):
        tree.merge(other)
    for foreign, message in (
        (MegaContextTree.from_tokens(ids(1, 8), encoder(8), table), "block_size 4, the second 8"),
        (MegaContextTree.from_tokens(ids(2, 8), encoder(4), table), "rows 1, the second 2"),
        (MegaContextTree.from_tokens(ids(1, 8), encoder(4), torch.nn.Embedding(50, 4)), "different base LMs"),
    ):
        with pytest.raises(ValueError, match=message):
            other.merge(foreign)
    assert tree.lengths.tolist() == [30] and other.lengths.tolist() == [8] and len(other.parts) == 1


@pytest.mark.parametrize("left", [0, 3, 9])
def test_a_tree_goes_on_with_parts_to_the_bits_of_a_tree_of_all_of_it(encoder, table, left):
    """The encoder's gists show a block's place in its batch, and the blocks of a part keep theirs."""
    net, tokens, size = encoder(4, places=True, left_context=left), ids(1, 1_000), 16 * 4**2
    tree = MegaContextTree.from_tokens(tokens[:, :301], net, table)
    for first in (size, 2 * size, 3 * size):
        part = MegaContextTree.from_tokens(tokens[:, first : first + size], net, table, max_level=2)
        before = net.blocks
        for stop in (first + 100, min(first + size, 1_000)):
            tree.go_on(part, first, max(stop, int(tree.lengths)))
        assert net.blocks - before <= 16 * (4 + 4 * (left > 0))  # batches of levels 3 and 4, and at the border
    assert_same(tree, MegaContextTree.from_tokens(tokens, net, table))
    assert len(tree.parts) == 1


def test_a_tree_refuses_to_go_on_with_what_does_not_fit_and_is_left_as_it_was(encoder, table):
    tree = MegaContextTree.from_tokens(ids(1, 40), encoder(4), table)
    other = MegaContextTree.from_tokens(ids(1, 60)[:, 16:], encoder(4), table)
    for first, stop, message in ((16, 61, "stop=61 is not allowed"), (16, 39, "stop=39"), (15, 50, "multiple of 4")):
        with pytest.raises(ValueError, match=message):
            tree.go_on(other, first, stop)
    with pytest.raises(ValueError, match="tokens 20 to 39 are others in the second tree"):
        tree.go_on(other, 20, 50)
    two = MegaContextTree.from_tokens(ids(2, 40), encoder(4), table)
    with pytest.raises(ValueError, match="2 rows, allowed is 1"):
        two.go_on(two, 0, 40)
    assert tree.lengths.tolist() == [40]
    tree.go_on(other, 16, 60)
    assert_same(tree, MegaContextTree.from_tokens(ids(1, 60), encoder(4), table))


@pytest.mark.parametrize("left", [0, 6])
@pytest.mark.parametrize("length", [1_000, 700, 1_300])
def test_the_tree_of_an_edited_text_has_the_bits_of_a_new_one_and_encodes_only_what_changed(
    encoder, table, left, length
):
    """The encoder's gists show a block's place in its batch, and so does nothing that is kept."""
    net, before = encoder(4, places=True, left_context=left), ids(2, 1_000)
    tree = MegaContextTree.from_tokens(before, net, table, lengths=torch.tensor([1_000, 810]))
    tree.protect(1, torch.tensor([[3], [3]]))
    text = torch.cat([before, ids(2, 300, seed=1)], dim=1)[:, :length].clone()
    text[0, [5, 401, 402]] = 7
    text[1, 640] = 9
    lengths = torch.tensor([length, length - 3])
    encoded = net.blocks
    edited = tree.edited(text, lengths)
    encoded = net.blocks - encoded
    assert_same(edited, MegaContextTree.from_tokens(text, net, table, lengths))
    assert not edited.about(1, "protected").any() and edited.about(1, "access").sum() == 0
    if length <= 1_000:
        assert encoded <= 16 * (6 + 3 * edited.depth + 2 * bool(left)), "changed blocks, and what stands above them"


def test_keys_of_an_edited_text_are_those_of_a_new_tree_and_made_for_changed_blocks_alone(encoder, table):
    asked = []

    class Count(torch.nn.Module):
        size = 16

        def encode(self, ids):
            asked.append(len(ids))
            return torch.nn.functional.one_hot(ids.long() % 16, 16).sum(1).half()

    net, tokens, keys = encoder(4), ids(1, 400), Count()
    tree = MegaContextTree.from_tokens(tokens, net, table, keys=keys)
    text = tokens.clone()
    text[0, 41] += 1
    asked.clear()
    edited = tree.edited(text)
    assert sum(asked) == 1
    assert torch.equal(edited.about(1, "key"), MegaContextTree.from_tokens(text, net, table, keys=keys).about(1, "key"))


def test_refresh_encodes_only_what_another_gistnet_made_bottom_up(encoder, table):
    old, new = encoder(4), encoder(4, factor=2.0)
    tokens = ids(1, 64)
    tree = MegaContextTree.from_tokens(tokens, old, table)
    tree.merge(MegaContextTree.from_tokens(tokens, new, table))
    # The second half's 21 nodes are of another version, and nothing above both of them is of one.
    assert tree.refresh(new) == 16 + 4 + 1
    assert_gists(tree, MegaContextTree.from_tokens(tokens.repeat(1, 2), new, table))
    assert tree.refresh(new) == 0
    assert tree.refresh(old) == 42
    tree.append(ids(1, 128))
    assert_gists(tree, MegaContextTree.from_tokens(torch.cat([tokens, tokens, ids(1, 128)], 1), old, table))
    with pytest.raises(ValueError, match="block_size=8, the tree's is 4"):
        tree.refresh(encoder(8))


def assert_gists(one, other):
    for n in range(1, one.depth + 1):
        assert torch.equal(one.gists(n), other.gists(n))


def test_a_node_above_nodes_of_two_gistnets_is_stale_until_it_is_refreshed(encoder, table):
    old, new = encoder(4), encoder(4, factor=2.0)
    tree = MegaContextTree.from_tokens(ids(1, 8), old, table)
    tree.merge(MegaContextTree.from_tokens(ids(1, 8), new, table))
    assert tree.refresh(old) == 3
    assert_gists(tree, MegaContextTree.from_tokens(ids(1, 8).repeat(1, 2), old, table))


def test_a_gistnet_that_was_trained_on_is_noticed(table):
    torch.manual_seed(0)
    net, table = GistNet(32, 0.05, block_size=4, num_heads=4, skip="none"), torch.nn.Embedding(50, 32)
    tree = MegaContextTree.from_tokens(ids(1, 64), net, table)
    assert tree.refresh(net) == 0
    torch.nn.init.normal_(net.gain)
    with pytest.raises(ValueError, match="refresh the tree first"):
        tree.append(ids(1, 4))
    assert tree.refresh(net) == 21
    assert_gists(tree, MegaContextTree.from_tokens(ids(1, 64), net, table))


def test_protection_reaches_all_levels_above_also_those_that_come_later(encoder, table):
    tree = MegaContextTree.from_tokens(ids(1, 64 - 4), encoder(4), table)
    tree.protect(1, torch.tensor([[5]]))
    tree.append(ids(1, 4))
    assert [tree.about(n, "protected")[0].nonzero().flatten().tolist() for n in (1, 2, 3)] == [[5], [1], [0]]
    lod, index = torch.tensor([0, 0, 1, 1, 1, 2, 2, 1, 9, 1]), torch.tensor([0, 63, 0, 5, 4, 1, 2, 16, 0, -1])
    usable = tree.usable(torch.zeros_like(lod), lod, index)
    assert usable.tolist() == [True, True, False, False, True, False, True, False, False, False]


def test_gists_are_stored_as_asked_and_read_as_the_base_reads(encoder, table):
    tree = MegaContextTree.from_tokens(ids(1, 64), encoder(4), table, dtype=torch.float16)
    assert tree.gists(1).dtype == torch.float16 and tree.tokens.dtype == torch.int32
    assert tree.gather(1, torch.tensor([[2]])).dtype == torch.float32
    facts_of_blocks = 16 * (1 + 4)  # floor, opened
    assert tree.bytes() == 64 * 4 + (16 + 4 + 1) * (4 * 2 + 4 + 4 + 8 + 1) + facts_of_blocks


def test_an_encoder_of_hidden_states_needs_a_base_lm_and_ready_gists(encoder, table):
    net = encoder(4)
    net.needs_hidden = True
    with pytest.raises(ValueError, match="no base LM"):
        MegaContextTree(net, table)
    base = torch.nn.Module()
    base.embed, base.model = table, None
    tree = MegaContextTree(net, base)
    with pytest.raises(ValueError, match="ready made"):
        tree.append(ids(1, 4))
    assert tree.lengths.tolist() == [0]
    tree.append(ids(1, 16), gists=torch.randn(1, 4, 4))
    assert tree.counts(2).tolist() == [1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tree: tree.append(ids(8)), r"tokens has shape \[8\], expected \[2, T\]"),
        (lambda tree: tree.append(ids(3, 8)), r"expected \[2, T\]"),
        (lambda tree: tree.append(ids(2, 8).float()), "dtype torch.float32"),
        (lambda tree: tree.append(ids(2, 8) + 45), "is not allowed, the base LM embeds 0 to 49"),
        (lambda tree: tree.append(ids(2, 8) - 60), "tokens: id -"),
        (lambda tree: tree.append(ids(2, 8), torch.tensor([9, 0])), r"lengths=\[9, 0\]"),
        (lambda tree: tree.append(ids(2, 8), torch.tensor([8])), r"lengths=\[8\]"),
        (lambda tree: MegaContextTree(tree.encoder, tree.base, max_level=0), "max_level=0"),
        (lambda tree: MegaContextTree(tree.encoder, tree.base, rows=0), "rows=0"),
    ],
)
def test_what_is_not_allowed_is_named_and_changes_nothing(encoder, table, call, message):
    tree = MegaContextTree.from_tokens(ids(2, 30), encoder(4), table)
    before = levels(tree)
    with pytest.raises(ValueError, match=message):
        call(tree)
    assert all(torch.equal(a, b) for a, b in zip(before, levels(tree), strict=True))


def test_an_encoder_that_does_not_fit_the_base_is_refused(encoder):
    with pytest.raises(ValueError, match="width 8, the encoder's width is 4"):
        MegaContextTree.from_tokens(ids(1, 8), encoder(4), torch.nn.Embedding(50, 8))
    with pytest.raises(ValueError, match="block_size=1"):
        MegaContextTree(encoder(1), torch.nn.Embedding(50, 4))


def test_an_empty_tree_and_a_tail_alone_have_no_gists(encoder, table):
    tree = MegaContextTree(encoder(4), table)
    assert tree.tokens.shape == (1, 0) and tree.depth == 0
    tree.append(ids(1, 3))
    tree.append(ids(1, 0))
    assert tree.depth == 0 and tree.refresh(encoder(4, factor=2.0)) == 0


def test_an_encoder_that_fails_on_the_way_leaves_the_tree_as_it_was(encoder, table, monkeypatch):
    monkeypatch.setattr(build, "PIECE", 40)
    net = encoder(4)
    tree = MegaContextTree.from_tokens(ids(2, 30), net, table)
    before, good = levels(tree), net.encode_block
    calls = iter(range(100))

    def failing(children):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return good(children)

    net.encode_block = failing
    with pytest.raises(KeyboardInterrupt):
        tree.append(ids(2, 300, seed=1))
    assert tree.depth == 2 and all(torch.equal(a, b) for a, b in zip(before, levels(tree), strict=True))
    del net.encode_block
    tree.append(ids(2, 300, seed=1))
    assert_same(tree, MegaContextTree.from_tokens(torch.cat([ids(2, 30), ids(2, 300, seed=1)], 1), net, table))
