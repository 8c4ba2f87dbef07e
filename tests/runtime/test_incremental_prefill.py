"""What is kept of a reading is what a fresh one would compute; what changed is computed, and nothing else."""

import pytest
import torch
from windows import BASES, following, small_base, tree_of, window

from megactx.focus import moves
from megactx.memory import WorkingContext
from megactx.runtime.incremental_prefill import IncrementalPrefill
from megactx.runtime.position_rebase import PositionRebase

LIMIT, BUDGET = 512, 90


def read(prefill: IncrementalPrefill, context, rebase=None):
    rebase = rebase or PositionRebase("absolute", LIMIT, BUDGET, 4)
    positions, behind = rebase.place(context)
    sigma = context.tree.encoder.spread(context.lods())
    return prefill.read(context.to_tensor(), positions, context.lengths, sigma), behind


def assert_same(prefill: IncrementalPrefill, fresh: IncrementalPrefill, context):
    assert (prefill.hidden - fresh.hidden).abs().max() < 1e-4 * fresh.hidden.abs().max().clamp(min=1)
    for own, other in zip(prefill.cache.layers, fresh.cache.layers, strict=True):
        for row, count in enumerate(context.counts.tolist()):
            for one, two in ((own.keys, other.keys), (own.values, other.values)):
                assert (one[row, :, :count] - two[row, :, :count]).abs().max() < 1e-4 * two.abs().max().clamp(min=1)


def change(context: WorkingContext, generator) -> WorkingContext:
    """A legal edit of a row, or new tokens in all of them."""
    context = context.copy()
    legal = moves(context, 4).edits(context)
    room = (context.budget - context.counts)[legal.row] >= context.tree.block_size
    legal = legal[~legal.expand | room]
    tokens = torch.randint(5, (len(context.counts),), generator=generator)
    if torch.rand((), generator=generator) < 0.4 and (context.counts + tokens <= context.budget).all():
        tree = context.tree
        tree.append(torch.randint(97, (len(tokens), 4), generator=generator), tokens)
        context.append(tokens)
    elif len(legal):
        legal[torch.randint(len(legal), (1,), generator=generator)].apply(context)
    return context


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("positions", ["absolute", "rebased"])
@pytest.mark.parametrize("changes", [30, pytest.param(500, marks=pytest.mark.long)])
def test_keys_and_values_after_many_edits_and_appends_are_those_of_a_fresh_prefill(kind, positions, changes):
    base = small_base(kind)
    context = window(tree_of(base, gaussian_rope="damped"), budget=60, edits=0)
    context.budget = BUDGET
    prefill, generator, reused = IncrementalPrefill(base), torch.Generator().manual_seed(4), []
    rebase = PositionRebase(positions, 160, BUDGET, 8)  # rebased: the rows are longer than that soon
    for number in range(changes):
        context = change(context, generator)
        read(prefill, context, rebase)
        reused.append(float(prefill.reused.sum() / prefill.lengths.sum()))
        if number >= 30 and number % 9 and number < changes - 30:
            continue  # what is kept stays kept until an edit before it: a fault is seen at one of the next readings
        fresh = IncrementalPrefill(base)
        places, _ = rebase.place(context)
        fresh.read(context.to_tensor(), places, context.lengths, context.tree.encoder.spread(context.lods()))
        assert_same(prefill, fresh, context)
    assert 0.05 < sum(reused) / len(reused) < 1


def test_a_reading_equals_that_of_the_base_lm():
    base = small_base()
    context = window(tree_of(base))
    hidden, _ = read(IncrementalPrefill(base), context)
    expected = base.read(context.to_tensor(), context.positions(), context.lengths)
    last = expected[torch.arange(2), context.lengths - 1]
    assert torch.allclose(hidden, last, atol=1e-5)


def test_an_edit_keeps_exactly_the_entries_before_it():
    base = small_base()
    context = window(tree_of(base, lengths=(150,)), edits=0)
    prefill, passes = IncrementalPrefill(base), []
    read(prefill, context)
    prefill.base.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    entry = int((context.lod[0] > 0).nonzero()[3])
    context.expand(entry)
    read(prefill, context)
    assert passes == [int(context.counts[0]) - entry]
    assert prefill.reused.tolist() == [entry] and prefill.lengths.tolist() == context.counts.tolist()


def test_nothing_is_computed_where_nothing_changed_nor_where_what_was_decoded_becomes_part_of_the_window():
    base = small_base()
    tree = tree_of(base, lengths=(150, 97))
    context = window(tree, edits=0)
    prefill, new = IncrementalPrefill(base), following(2, 3)
    _, behind = read(prefill, context)
    for n in range(3):
        prefill.step(new[:, n : n + 1], behind[:, None] + n)
    passes = []
    handle = prefill.base.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    tree.append(new)
    context.append(3)
    hidden, _ = read(prefill, context)
    read(prefill, context)
    handle.remove()
    assert passes == [] and torch.equal(prefill.reused, context.counts)
    fresh = IncrementalPrefill(base)
    read(fresh, context)
    assert_same(prefill, fresh, context)
    assert torch.equal(hidden, prefill.hidden)


def test_rows_that_stop_at_different_times_are_read_as_if_each_were_alone():
    base = small_base()
    tree = tree_of(base, lengths=(150, 97))
    context = window(tree, edits=0)
    prefill, new = IncrementalPrefill(base), following(2, 4)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    _, behind = read(prefill, context)
    for n in range(4):
        prefill.step(new[:, n : n + 1], behind[:, None] + n, mask[:, n : n + 1])
    tree.append(new, mask.sum(1))
    context.append(mask.sum(1))
    fresh = IncrementalPrefill(base)
    read(fresh, context)
    assert torch.allclose(prefill.hidden, fresh.hidden, atol=1e-5)
    read(prefill, context)  # the columns of the rows are brought together
    assert_same(prefill, fresh, context)
    assert prefill.reused.tolist() == context.counts.tolist()


@pytest.mark.parametrize("what", ["position", "spread", "embedding"])
def test_a_change_of_position_spread_or_embedding_alone_makes_an_entry_dirty(what):
    base = small_base()
    context = window(tree_of(base, lengths=(150,)), edits=0)
    embeddings, positions = context.to_tensor(), context.positions()
    sigma = torch.zeros_like(positions, dtype=torch.float)
    prefill = IncrementalPrefill(base)
    prefill.read(embeddings, positions, context.lengths, sigma)
    if what == "position":
        positions = positions.clone()
        positions[:, 20:] += 1
    elif what == "spread":
        sigma[:, 20] = 2.0
    else:
        embeddings = embeddings.clone()
        embeddings[:, 20, 5] += 1e-3
    prefill.read(embeddings, positions, context.lengths, sigma)
    assert prefill.reused.tolist() == [20]
    fresh = IncrementalPrefill(base)
    fresh.read(embeddings, positions, context.lengths, sigma)
    assert_same(prefill, fresh, context)


def test_a_reading_that_was_interrupted_is_made_anew(monkeypatch):
    base = small_base()
    context = window(tree_of(base, lengths=(150,)), edits=0)
    prefill, calls = IncrementalPrefill(base), []
    read(prefill, context)

    def stopped(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hooks = [layer.register_forward_hook(stopped) for layer in base.model.model.layers]
    context.expand(int((context.lod[0] > 0).nonzero()[0]))
    with pytest.raises(KeyboardInterrupt):
        read(prefill, context)
    for hook in hooks:
        hook.remove()
    read(prefill, context)
    fresh = IncrementalPrefill(base)
    read(fresh, context)
    assert_same(prefill, fresh, context)


def test_memory_does_not_grow_with_what_was_read_and_cut_off():
    base = small_base()
    context = window(tree_of(base, lengths=(150,)), edits=0)
    prefill, new = IncrementalPrefill(base), following(1, 8)
    sizes = set()
    for _ in range(20):
        _, behind = read(prefill, context)
        for n in range(8):
            prefill.step(new[:, n : n + 1], behind[:, None] + n)
        sizes.add(prefill.cache.bytes())
    assert len(sizes) == 1


@pytest.mark.parametrize("kind", BASES)
def test_tokens_at_fixed_shapes_are_those_of_passes_that_grow(kind):
    base = small_base(kind)
    context = window(tree_of(base))
    plain, graph = IncrementalPrefill(base), IncrementalPrefill(base, graphs=True)
    # Rows of one length: else a row has columns that are not there, and the usual way is taken.
    rows, lengths, places = context.to_tensor()[:, :40], torch.full_like(context.lengths, 40), torch.arange(40)
    places = places.expand(len(lengths), -1)
    generator = torch.Generator().manual_seed(0)
    for again in range(2):  # the second window is another one: its buffers, and the graph, are used again
        rows = rows.roll(again, dims=1)
        for prefill in (plain, graph):
            prefill.read(rows, places, lengths)
        for index in range(50):  # beyond the 64 columns that the buffers begin with
            ids = torch.randint(97, (len(lengths), 1), generator=generator)
            wanted, found = (p.step(ids, torch.full_like(ids, 40 + index)) for p in (plain, graph))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert graph.graph is not None and plain.graph is None
        for own, other in zip(graph.cache.layers, plain.cache.layers, strict=True):
            torch.testing.assert_close(own.keys, other.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(own.values, other.values, rtol=1e-4, atol=1e-4)
    (two,) = {p.step(ids.expand(-1, 2), torch.full_like(ids, 90).expand(-1, 2)).shape[1] for p in (plain, graph)}
    assert two == 2, "several tokens at once are read as ever, behind those that were read one by one"
