"""What entries are about is remembered, and is what it would be if it were worked out anew."""

import torch
from windows import small_base, tree_of, window

from megactx.focus import moves
from megactx.focus.content import contents
from megactx.runtime.contents import Contents


def test_what_is_remembered_is_what_would_be_worked_out(monkeypatch):
    tree = tree_of(small_base())
    context, own, generator = window(tree), Contents(), torch.Generator().manual_seed(0)
    for _ in range(20):
        assert torch.equal(own(context), contents(context))
        legal = moves(context, 4).edits(context)
        legal[torch.randint(len(legal), (1,), generator=generator)].apply(context)
        tree.append(torch.randint(97, (2, 3)), torch.tensor([3, 1]))
        context.append()


def test_only_new_gists_are_worked_out(monkeypatch):
    import megactx.runtime.contents as module

    context, own, asked = window(tree_of(small_base(), lengths=(150,)), edits=0), Contents(), []
    original = module.node_contents

    def counted(tree, row, lod, index):
        asked.append(int((lod > 0).sum()))
        return original(tree, row, lod, index)

    monkeypatch.setattr(module, "node_contents", counted)
    own(context)
    own(context)
    gist = int((context.lod[0] > 1).nonzero()[0])
    context.expand(gist)
    own(context)
    assert asked[1:] == [0, 4] and len(own.nodes) == int((context.lod > 0).sum())
