"""Windows on disk are the windows that were measured; what is drawn to learn from is legal and reproducible."""

import pytest
import torch
from windows import WIDTH, K, following, small_base, tree_of, window

from megactx.focus import moves
from megactx.focus.allocator import FocusAllocator
from megactx.focus.edit_labels import measure_values
from megactx.focus.label_files import load, save
from megactx.focus.lensnet import LensNet, masked
from megactx.focus.sampling import KINDS, draw, measured_share, some_per_row


@pytest.fixture(scope="module")
def base():
    return small_base()


def lens() -> LensNet:
    torch.manual_seed(4)
    net = LensNet(WIDTH, K, num_heads=4)
    torch.nn.init.normal_(net.last.weight, std=0.1)
    return net.eval()


@torch.no_grad()
def test_a_batch_from_disk_is_read_as_the_windows_themselves(base, tmp_path):
    context, ids = window(tree_of(base), edits=3), following(2, 4)
    edits = moves(context, 8).edits(context)
    values, _ = measure_values(base, context, edits, ids)
    paths = [tmp_path / f"{row}.safetensors" for row in (0, 1)]
    for row, path in enumerate(paths):
        save(path, context, row, moves(context, 8), edits, values)
    batch, net = load(paths, base), lens()
    assert torch.equal(batch.mask, context.mask) and torch.equal(batch.lods, context.lods())
    assert torch.equal(batch.legal.first, moves(context, 8).first)
    assert torch.equal(batch.legal.expand, moves(context, 8).expand)
    read = net(batch.embeddings, batch.lods, batch.distance, batch.mask, batch.mean_embeddings)
    torch.testing.assert_close(read, net.read(context), rtol=2e-2, atol=2e-3)  # gists are kept in bf16
    by_row = torch.argsort(edits.row, stable=True)
    torch.testing.assert_close(batch.labels, values[by_row])
    assert torch.equal(batch.row, edits.row[by_row]) and torch.equal(batch.expand, edits.expand[by_row])
    legal = moves(context, 8)
    v_down, v_keep = masked(read, legal)
    expected = torch.cat([v_down[legal.expand], v_keep[legal.leads]])[by_row]
    torch.testing.assert_close(batch.estimates(read, K), expected)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_windows_to_learn_from_keep_the_budget_and_are_a_function_of_the_generator(base, kind):
    tree = tree_of(base, (400, 330))  # beyond the newest 128 tokens there is something to choose

    def drawn(seed):
        generator = torch.Generator().manual_seed(seed)
        return draw(kind, tree, 240, generator, lens(), FocusAllocator())  # the constructor checks the invariants

    seen = set()
    for seed in range(6):
        context = drawn(seed)
        context.check()
        assert (context.counts <= 240).all()
        assert torch.equal(context.lod, drawn(seed).lod)
        seen.add(tuple(context.lod.flatten().tolist()))
    assert len(seen) > 2


def test_an_unknown_kind_of_window_is_refused(base):
    with pytest.raises(ValueError, match="kind chosen is not known, allowed are random, recency, policy"):
        draw("chosen", tree_of(base), 60, torch.Generator())


def test_a_share_of_edits_has_collapses_and_expands_of_every_row(base):
    context = window(tree_of(base))
    edits = moves(context, 8).edits(context)
    generator = torch.Generator().manual_seed(0)
    share = measured_share(edits, 6, generator)
    for row in (0, 1):
        own = share.expand[share.row == row]
        assert 0 < int((~own).sum()) <= 3 and 0 < int(own.sum()) <= 6
    names = list(zip(share.row.tolist(), share.lod.tolist(), share.index.tolist(), share.expand.tolist(), strict=True))
    assert len(set(names)) == len(names)
    assert len(some_per_row(edits, 10**6, generator)) == len(edits) and len(some_per_row(edits[:0], 3, generator)) == 0


def test_half_of_the_measured_edits_of_either_kind_are_those_that_promise_most(base):
    context = window(tree_of(base))
    edits = moves(context, 8).edits(context)
    promise = torch.rand(len(edits), generator=torch.Generator().manual_seed(1))
    promise[3] = torch.inf
    share = measured_share(edits, 4, torch.Generator().manual_seed(0), promise)

    def names(e):
        return set(zip(e.row.tolist(), e.lod.tolist(), e.index.tolist(), e.expand.tolist(), strict=True))

    assert len(names(share)) == len(share)
    for row in (0, 1):
        for expand in (False, True):
            own = ((edits.row == row) & (edits.expand == expand)).nonzero()[:, 0]
            if len(own):
                assert names(edits[own[promise[own].argmax()][None]]) <= names(share)
