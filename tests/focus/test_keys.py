"""Keys of blocks: kept by a tree, searched as a whole, shown by what stands above them."""

from types import SimpleNamespace

import pytest
import torch
from small_windows import K, Mean, window

from megactx.data.user_turns import UserTurns
from megactx.focus.keys import GOES_ON, LOOK, QUESTION, KeyNet, best_below, questions_of, search
from megactx.memory import MegaContextTree, WorkingContext

SIZE, VOCABULARY = 16, 50


@pytest.fixture
def net():
    torch.manual_seed(0)
    return KeyNet(torch.randn(VOCABULARY, 32), SIZE).eval().requires_grad_(False)


def other_net():
    torch.manual_seed(1)
    return KeyNet(torch.randn(VOCABULARY, 32), SIZE).eval().requires_grad_(False)


TABLE = torch.nn.Embedding(VOCABULARY, 2).requires_grad_(False)


def tree_with(keys, tokens, lengths=None):
    return MegaContextTree.from_tokens(tokens, Mean(), TABLE, lengths, keys=keys)


def tokens_of(rows, count, seed=0):
    return torch.randint(VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))


def test_every_block_has_the_key_of_its_tokens_in_two_bytes_a_number_however_the_text_was_cut(net):
    tokens = tokens_of(2, 300)
    tree = tree_with(net, tokens, torch.tensor([300, 211]))
    expected = net.encode(tokens[0].view(-1, K))
    assert torch.equal(tree.levels[1].whole("key")[0], expected) and expected.dtype == torch.float16
    assert tree.levels[1].bytes("key") == 2 * 75 * SIZE * 2
    pieces = MegaContextTree(Mean(), TABLE, keys=net)
    for part in tokens[:1].split([3, 90, 1, 206], dim=1):
        pieces.append(part)
    torch.testing.assert_close(pieces.levels[1].whole("key")[0], expected)
    ready = MegaContextTree(Mean(), TABLE, keys=net)
    ready.append(tokens[:1], gists=tree.gists(1)[:1])
    assert torch.equal(ready.levels[1].whole("key")[0], expected)


def test_a_tree_without_keys_has_no_column_of_them(net):
    tree = tree_with(None, tokens_of(1, 64))
    assert "key" not in tree.levels[1].columns
    with pytest.raises(ValueError, match="this tree has none"):
        search(tree, tokens_of(1, 4))


@pytest.mark.parametrize("saved", ["with", "without", "other"])
@pytest.mark.parametrize("read", ["with", "without"])
def test_a_saved_tree_is_read_with_the_keys_that_are_asked_for(net, tmp_path, saved, read):
    tokens = tokens_of(1, 300)
    tree = tree_with({"with": net, "without": None, "other": other_net()}[saved], tokens)
    tree.save(tmp_path / "tree")
    again = MegaContextTree.load(tmp_path / "tree", Mean(), TABLE, keys=net if read == "with" else None)
    assert torch.equal(again.tokens, tree.tokens) and torch.equal(again.gists(1), tree.gists(1))
    assert ("key" in again.levels[1].columns) == (read == "with")
    if read == "with":
        assert torch.equal(again.levels[1].whole("key")[0], net.encode(tokens[0].view(-1, K)))
    again.append(tokens_of(1, 40, seed=1))
    again.save(tmp_path / "tree")
    last = MegaContextTree.load(tmp_path / "tree", Mean(), TABLE, keys=again.keys)
    assert last.lengths.tolist() == [340]
    assert bool(again.cache.file.numbers(1, "key")) == (read == "with")
    assert ("keys" in again.cache.file.about("tree")) == (read == "with")


def test_cut_and_merged_trees_have_their_keys(net):
    tokens = tokens_of(1, 320)
    for keys in (None, net):
        tree = tree_with(keys, tokens)
        part = tree_with(net, tokens[:, :160])
        part.merge(tree.slice(160))
        assert torch.equal(part.levels[1].whole("key")[0], net.encode(tokens[0].view(-1, K)))
    assert torch.equal(tree.slice(32).levels[1].whole("key"), tree.levels[1].whole("key")[:, 8:])


def test_a_block_is_found_by_its_own_words_among_all_blocks_of_a_tree(net):
    tokens = tokens_of(2, 400)
    tree = tree_with(net, tokens, torch.tensor([400, 320]))
    found = search(tree, tokens[:, 36 * K : 37 * K])
    assert found.shape == (2, 100) and found.argmax(1).tolist() == [36, 36]
    assert (found[1, 80:] == -torch.inf).all() and found.amax(1).allclose(net.scale.expand(2), atol=0.05)


def test_a_coarse_entry_shows_the_best_key_below_it_and_a_token_that_of_its_block(net):
    tree = tree_with(net, tokens_of(2, 300), torch.tensor([300, 211]))
    context = window(tree, 4)
    found = search(tree, tokens_of(2, 8, seed=5))
    best = best_below(context, found)
    starts, widths = context.starts(), context.widths()
    for row in range(2):
        for column in range(context.lod.shape[1]):
            below = found[row, int(starts[row, column]) // K : -(-int(starts[row, column] + widths[row, column]) // K)]
            there = column < int(context.counts[row]) and len(below) and below.isfinite().any()
            assert float(best[row, column]) == (float(below.max()) if there else -torch.inf), (row, column)


def test_keys_of_a_text_too_short_for_a_block_are_none(net):
    tree = tree_with(net, tokens_of(1, 3))
    assert search(tree, tokens_of(1, 3)).shape == (1, 0)
    context = WorkingContext(tree, torch.zeros(1, 3), torch.arange(3)[None], torch.tensor([3]), 8)
    assert (best_below(context, search(tree, tokens_of(1, 3))) == -torch.inf).all()


def test_questions_are_what_the_user_said_last_or_a_few_of_the_newest_tokens_where_that_is_too_far_back():
    turns, opening, closing = UserTurns((1, 2), (3, 4)), [1, 2], [3, 4]
    asked, answer, old = [*range(10, 30)], [*range(40, 60)], [9] * 100
    assert questions_of([*old, *opening, *asked, *closing, *answer], turns) == ([asked], 22, 2 + 20 + 22)
    long = [*range(100, 300)]
    assert questions_of([*old, *opening, *long, *closing], turns) == ([long[-QUESTION:]], 2, QUESTION + 2)
    gone = [*old, *opening, *asked, *closing, *[7] * (LOOK - 4), *range(60, 64)]
    assert questions_of(gone, turns) == ([], None, None)  # nobody asks
    assert questions_of(gone, UserTurns())[0] == [gone[-count:] for count in GOES_ON]
    assert questions_of([*old, *opening, *asked, *closing], UserTurns())[0][1][-6:] == [*asked[-4:], *closing]
    assert questions_of([5, 6], UserTurns())[0] == [[5, 6]] * len(GOES_ON)


def test_of_a_long_turn_the_question_is_the_last_line_where_that_is_long_enough():
    turns = UserTurns((1, 2), (3, 4), SimpleNamespace(decode=lambda ids: ".\n" if ids == [5] else "a"))
    old, asked = [*range(100, 200)], [*range(10, 30)]
    assert questions_of([1, 2, *old, 5, *asked, 5, 3, 4], turns) == ([[*asked, 5]], 2, 21 + 2)
    assert questions_of([1, 2, *old, 5, *asked, 5, 11, 12, 3, 4], turns)[0] == [
        [*asked, 5, 11, 12]
    ]  # no line by itself
    assert questions_of([1, 2, *old, *asked, 3, 4], turns)[0] == [[*old, *asked][-QUESTION:]]
    short = [10, 11, 5, *range(12, 30)]
    assert questions_of([9, 9, 1, 2, *short, 3, 4], turns)[0] == [short]  # all of it may be the question


def test_of_several_questions_of_a_row_a_block_is_as_like_as_to_the_one_that_it_is_most_like(net):
    tree = tree_with(net, tokens_of(2, 80))
    ids, row = tokens_of(5, 8, seed=3), torch.tensor([0, 1, 0, 1, 1])
    found = search(tree, ids, row=row)
    assert (search(tree, ids[:0], row=row[:0]) == -torch.inf).all() and search(tree, ids[:0], row=row[:0]).shape == (
        2,
        20,
    )
    assert (search(tree, ids[:1], row=row[:1])[1] == -torch.inf).all()
    for at in range(2):
        own = torch.stack([search(tree, one[None].expand(2, -1))[at] for one in ids[row == at]])
        torch.testing.assert_close(found[at], own.amax(0))
