"""A window of several trees, judged part by part."""

import pytest
import torch

from megactx.focus import FocusAllocator, LensNet, moves
from megactx.focus.by_part import PartRows, of_window
from megactx.focus.lensnet import _blockwise
from megactx.focus.mean_embeddings import window_mean_embeddings
from megactx.gist import GistNet
from megactx.memory import Composite, MegaContextTree, WorkingContext
from megactx.memory.composite import Part
from megactx.memory.invariants import violations

K, BUDGET = 4, 200


@pytest.fixture
def context():
    """Parts of 203 and 64 tokens beside a history of 130: the first ends within a block."""
    torch.manual_seed(0)
    net, table = GistNet(32, 0.05, block_size=K, num_heads=4, skip="none"), torch.nn.Embedding(50, 32)
    trees = [MegaContextTree.from_tokens(torch.randint(50, (1, n)), net, table) for n in (203, 64, 130)]
    parts = [Part("a", trees[0], 0, 0.3), Part("b", trees[1], 1, 0.1)]
    return WorkingContext.recency(Composite(trees[2], parts, BUDGET), BUDGET, debug=True)


def test_rows_hold_the_entries_of_each_tree_and_give_values_back_to_where_they_stood(context):
    rows, values = PartRows(context), torch.rand(1, context.lod.shape[1])
    sizes = [len(lod) for lod, _ in context.tree.segments(context)]
    assert rows.counts.tolist() == [sizes[2], sizes[0], sizes[1]] and rows.budget.tolist() == [120, 60, 20]
    assert torch.equal(rows.back(rows.of(values)), values)
    for row, place in enumerate((2, 0, 1)):
        assert torch.equal(rows.lod[row, : sizes[place]], context.tree.segments(context)[place][0])
    legal = moves(context, 8)
    again = rows.moves(legal)
    assert torch.equal(rows.back(again.leads.long()).bool(), legal.leads)
    assert torch.equal(again.first, moves(rows, 8).first) and torch.equal(again.expand, moves(rows, 8).expand)


@pytest.mark.parametrize("seed", range(8))
def test_edits_of_random_scores_keep_every_part_within_its_share_and_swap_within_it(context, seed):
    generator = torch.Generator().manual_seed(seed)
    allocator = FocusAllocator(threshold=0.1, max_edits=16, cooldown=0, protected=8)
    for _ in range(6):
        rows = PartRows(context)
        scores = torch.rand(1, context.lod.shape[1], generator=generator) * 2 - 1
        before = {number: len(lod) for number, (lod, _) in enumerate(context.tree.segments(context))}
        edits = allocator.propose(rows, rows.of(scores), torch.full((3,), 0.1))
        of_window(edits).apply(context)
        assert not violations(context)
        for row, place in enumerate((2, 0, 1)):
            own = edits[edits.row == row]
            gained = int(own.cost(K).sum())
            assert len(context.tree.segments(context)[place][0]) == before[place] + gained <= int(rows.budget[row])
    assert len(edits)


def test_lensnet_takes_no_block_for_one_that_crosses_the_border_of_a_part(context):
    means, borders = window_mean_embeddings(context), context.borders()
    assert borders[0].nonzero().squeeze(1).tolist()[0] == 0 and int(borders.sum()) == 3
    blocks, begin = _blockwise(means, context.lods(), context.mask, K, borders)
    starts, rank = context.starts()[0], torch.arange(context.lod.shape[1])
    raw = context.lod[0] == 0
    first = starts // K * K  # address of each raw token's block
    for at in raw.nonzero().squeeze(1).tolist():
        same = raw & (first == first[at])
        assert int(begin[0, at]) == int(rank[same].min())
        torch.testing.assert_close(blocks[0, at], means[0, same].mean(0))


def test_scores_of_lensnet_have_a_price_for_the_history_and_for_each_part(context):
    torch.manual_seed(1)
    lens = LensNet(32, K, layers=1, num_heads=4).eval()
    torch.nn.init.normal_(lens.last.weight, std=0.05)
    with torch.no_grad():
        scores = lens.score(context, moves(context, 8), margin=0.001)
    assert scores.price.shape == (3,) and scores.score.shape == context.lod.shape
    legal = moves(context, 8)
    assert not scores.score[~(legal.expand | (legal.first >= 0))].any() and scores.score.any()
