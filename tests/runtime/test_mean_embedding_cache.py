"""What entries are about is remembered, and is what it would be if it were worked out anew."""

import torch
from windows import small_base, tree_of, window

from megactx.focus import moves
from megactx.focus.mean_embeddings import window_mean_embeddings
from megactx.runtime.mean_embedding_cache import MeanEmbeddingCache


def test_what_is_remembered_is_what_would_be_worked_out(monkeypatch):
    tree = tree_of(small_base())
    context, own, generator = window(tree), MeanEmbeddingCache(), torch.Generator().manual_seed(0)
    for _ in range(20):
        assert torch.equal(own(context), window_mean_embeddings(context))
        legal = moves(context, 4).edits(context)
        legal[torch.randint(len(legal), (1,), generator=generator)].apply(context)
        tree.append(torch.randint(97, (2, 3)), torch.tensor([3, 1]))
        context.append()


def test_only_new_gists_are_worked_out(monkeypatch):
    import megactx.runtime.mean_embedding_cache as module

    context, own, asked = window(tree_of(small_base(), lengths=(150,)), edits=0), MeanEmbeddingCache(), []
    original = module.node_mean_embeddings

    def counted(tree, row, lod, index):
        asked.append(int((lod > 0).sum()))
        return original(tree, row, lod, index)

    monkeypatch.setattr(module, "node_mean_embeddings", counted)
    own(context)
    own(context)
    gist = int((context.lod[0] > 1).nonzero()[0])
    context.expand(gist)
    own(context)
    assert asked[1:] == [0, 4] and len(own.nodes) == int((context.lod > 0).sum())
