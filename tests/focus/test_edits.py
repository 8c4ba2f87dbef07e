"""What may be changed in a window: found at once for all rows, equal to trying it out."""

import pytest
import torch

from megactx.focus import Edits, moves
from megactx.memory import MegaContextTree, WorkingContext

K = 4


class Mean:
    block_size, width = K, 2

    def encode_block(self, children):
        return children.mean(1)

    def offset_in(self, tokens):
        return tokens - 1


def tree(lengths=(150, 97), protected=None) -> MegaContextTree:
    torch.manual_seed(0)
    table = torch.nn.Embedding(20, 2).requires_grad_(False)
    ids = torch.randint(20, (len(lengths), max(lengths)))
    made = MegaContextTree.from_tokens(ids, Mean(), table, torch.tensor(lengths))
    if protected:
        made.protect(*protected)
    return made


def tried(context: WorkingContext, protected: int) -> set:
    """Every edit that the working context itself does not refuse, apart from its budget and the newest tokens."""
    out = set()
    for row, ends in enumerate(context.ends().tolist()):
        for lod in range(1, context.tree.depth + 1):
            for index in range(ends // K**lod + 1):
                for expand in (True, False):
                    copy = context.copy()
                    copy.budget = 10**6
                    edit = Edits(*(torch.tensor([n]) for n in (row, lod, index, expand)))
                    if not expand and (index + 1) * K**lod > ends - protected:
                        continue
                    try:
                        edit.apply(copy)
                    except ValueError:
                        continue
                    if (copy.lod.shape, copy.counts.tolist()) != (context.lod.shape, context.counts.tolist()):
                        out.add((row, lod, index, expand))
    return out


@pytest.mark.parametrize("protected", [None, (1, torch.tensor([[35], [22]]))])
@pytest.mark.parametrize("budget", [34, 60, 140])
@pytest.mark.parametrize("newest", [0, 9, 40])
def test_legal_edits_are_those_that_the_window_takes(budget, newest, protected):
    context = WorkingContext.recency(tree(protected=protected), budget)
    found = moves(context, newest)
    edits = found.edits(context)
    names = list(zip(*(t.tolist() for t in (edits.row, edits.lod, edits.index, edits.expand)), strict=True))
    assert len(set(names)) == len(names)
    assert set(names) == tried(context, newest)
    for row, column in (found.first >= 0).nonzero().tolist():
        first = found.first[row, column]
        assert 0 <= column - first < K and context.lod[row, column] == context.lod[row, first]


def test_edits_are_made_in_their_order_within_each_row_and_can_be_undone():
    context = WorkingContext.recency(tree(), 40, debug=True)
    before = context.copy()
    edits = moves(context, 8).edits(context)
    edits = edits[edits.expand][[0, 2]]
    context.budget = 60
    edits.apply(context)
    assert torch.equal(context.counts, before.counts + torch.bincount(edits.row, edits.cost(K), minlength=2).long())
    Edits(edits.row, edits.lod, edits.index, ~edits.expand).apply(context)
    assert torch.equal(context.lod, before.lod) and torch.equal(context.index, before.index)


def test_without_an_edit_nothing_happens():
    context = WorkingContext.recency(tree(), 40)
    before = context.lod.clone()
    edits = moves(context).edits(context)
    edits[:0].apply(context)
    assert torch.equal(context.lod, before)
