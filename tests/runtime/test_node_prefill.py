"""Under MegaAttention an edit reaches its segment and the live rows, and what is kept is what a fresh reading gives."""

import copy
from dataclasses import replace

import pytest
import torch
from test_incremental_prefill import change
from windows import BASES, VOCABULARY, K, small_base, tree_of, window

from megactx.focus import moves
from megactx.memory.pyramid import Attention
from megactx.runtime.node_prefill import NodePrefill

MEGA = Attention("mega", segment=16, mid=16, live=16)
OVERLAP = replace(MEGA, overlap=8)
BUDGET = 90


def assert_same(prefill: NodePrefill, fresh: NodePrefill):
    assert torch.allclose(prefill.pairs, fresh.pairs)
    for own, other in zip(prefill.rows, fresh.rows, strict=True):
        assert own.key.sort().values.equal(other.key.sort().values)
        left, right = own.key.argsort(), other.key.argsort()
        pairs = [(own.hidden, other.hidden)]
        for one, two in zip(own.cache.layers, other.cache.layers, strict=True):
            pairs += [(a[0][:, left], b[0][:, right]) for a, b in zip(one.buffers, two.buffers, strict=True)]
        for one, two in pairs:
            assert (one - two).abs().max() < 1e-4 * two.abs().max().clamp(min=1)


@pytest.mark.parametrize(
    ("kind", "changes", "attention"),
    [
        *((kind, 15, MEGA) for kind in BASES),
        ("llama", 15, OVERLAP),
        pytest.param("llama", 1000, MEGA, marks=pytest.mark.slow),
        pytest.param("llama", 1000, OVERLAP, marks=pytest.mark.slow),
    ],
)
def test_keys_and_values_after_many_edits_and_appends_are_those_of_a_fresh_reading(kind, changes, attention):
    base = small_base(kind)
    context = window(tree_of(base, gaussian_rope="damped"), budget=60, edits=0)
    context.budget = BUDGET
    prefill, generator, reused = NodePrefill(base, attention), torch.Generator().manual_seed(4), []
    for number in range(changes):
        context = change(context, generator)
        if int(context.ends().max()) > 480:  # the base has 512 positions: begin anew
            context = window(tree_of(base, gaussian_rope="damped"), budget=60, edits=0)
            context.budget = BUDGET
        last = prefill.read(context)
        reused.append(float(prefill.reused.sum() / prefill.lengths.sum()))
        if number > 25 and number % 9:
            continue
        fresh = NodePrefill(base, attention)
        assert (fresh.read(context) - last).abs().max() < 1e-4 * last.abs().max()
        assert_same(prefill, fresh)
    assert 0.3 < sum(reused) / len(reused) < 1


def test_a_reading_is_that_of_the_mask_in_one_pass():
    base = small_base()
    context = window(tree_of(base))
    hidden = MEGA.read(base, context)
    last = hidden[torch.arange(2), context.lengths - 1]
    assert torch.allclose(NodePrefill(base, MEGA).read(context), last, atol=1e-5)


@pytest.mark.parametrize("attention", [MEGA, OVERLAP])
def test_an_edit_far_back_costs_its_segment_and_the_live_rows(attention):
    """With strips also the next segment and the strip between."""
    base = small_base()
    tree = tree_of(base, lengths=(150,))
    context = window(tree, budget=90, edits=0)
    context.budget = 10**6
    prefill, passes = NodePrefill(base, attention), []
    prefill.read(context)
    base.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    prefill.read(context)
    assert passes == [] and torch.equal(prefill.reused, prefill.lengths)
    lods = context.lods()[0]
    entry = int((lods == 1).nonzero()[0])
    segment = int(context.starts()[0, entry]) // 16
    context = context.copy()
    context.expand(entry)
    prefill.read(context)
    mask = attention.pyramid(context).mask
    own = mask.segments()[0] // 16
    leaves = ~mask.summary[0] & ((own == segment) | (attention.overlap > 0) & (own == segment + 1))
    most = int((leaves | mask.is_live[0]).sum())
    assert passes and passes[0] <= most < int(prefill.lengths[0]) and passes[0] >= K


def test_new_tokens_are_read_behind_the_window_and_stay_read():
    base = small_base()
    tree = tree_of(base, lengths=(150,))
    context = window(tree, budget=90, edits=0)
    context.budget = 10**6
    prefill = NodePrefill(base, MEGA)
    prefill.read(context)
    ids = torch.randint(VOCABULARY, (1, 3))
    stepped = prefill.step(ids, 150 + torch.arange(3)[None])[0]
    assert torch.equal(prefill.hidden[0], stepped[-1])
    tree.append(ids)
    context = context.copy()
    context.append(3)
    passes = []
    base.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    last = prefill.read(context)
    made = passes.copy()
    whole = MEGA.read(base, context)[0]
    assert torch.allclose(last[0], whole[-1], atol=1e-4) and torch.allclose(stepped, whole[-3:], atol=1e-4)
    assert not made or made[0] < K * 5  # what became a block has a summary; what left the live region is settled


def test_other_adapters_are_noticed_and_other_attention_is_refused():
    from megactx.lm.adapters import adapt, adapters_of

    base = small_base()
    context = window(tree_of(base))
    prefill = NodePrefill(base, MEGA)
    before = prefill.read(context)
    adapt(base, 4, "all")
    for p in adapters_of(base).values():
        torch.nn.init.normal_(p)
    after = prefill.read(context)
    assert not torch.allclose(before, after) and torch.equal(after, NodePrefill(base, MEGA).read(context))
    with pytest.raises(ValueError, match="attention.kind=plain is not allowed"):
        NodePrefill(base, Attention("plain"))


def test_a_step_that_fails_in_a_layer_leaves_nothing_half_read():
    base = small_base()
    context = window(tree_of(base, lengths=(150,)))
    prefill = NodePrefill(base, MEGA)
    before = prefill.read(context)

    def stop(*args):
        raise KeyboardInterrupt

    hook = base.model.get_decoder().layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        prefill.step(torch.randint(VOCABULARY, (1, 3)), 150 + torch.arange(3)[None])
    hook.remove()
    assert torch.equal(prefill.read(context), before)


@pytest.mark.parametrize("attention", [MEGA, OVERLAP])
def test_nothing_is_read_again_while_a_window_only_grows_and_later_readings_are_exact(attention):
    """Blocks that were read token by token: only where the live region moves on, or after an edit, is there work."""
    base = small_base()
    tree = tree_of(base, lengths=(151,), gaussian_rope="damped")
    context = window(tree, budget=90, edits=0)
    context.budget = 10**6
    prefill, passes, idle = NodePrefill(base, attention), [], 0
    prefill.read(context)
    base.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
    generator = torch.Generator().manual_seed(5)
    for block in range(30):
        for _ in range(K):
            ids = torch.randint(VOCABULARY, (1, 1), generator=generator)
            prefill.step(ids, context.ends()[:, None])
            tree.append(ids)
            context = context.copy()
            context.append(1)
        passes.clear()
        if block % 7 == 6:
            context = change_of_one(context, generator)
        last = prefill.read(context)
        idle += not passes
        assert passes or torch.equal(prefill.reused, prefill.lengths)
        fresh = NodePrefill(base, attention)
        assert (fresh.read(context) - last).abs().max() < 1e-4 * last.abs().max()
        ids = torch.randint(VOCABULARY, (1, 2), generator=generator)
        after = [own.step(ids, context.ends()[:, None] + torch.arange(2)) for own in (copied(prefill, base), fresh)]
        assert (after[0] - after[1]).abs().max() < 1e-4 * after[1].abs().max()
    assert idle >= 15, "a segment of 16 tokens settles every fourth block"


def change_of_one(context, generator):
    legal = moves(context, 8).edits(context)
    context = context.copy()
    legal[torch.randint(len(legal), (1,), generator=generator)].apply(context)
    return context


def copied(prefill: NodePrefill, base) -> NodePrefill:
    """As it is now: what is read with it is not read by the other."""
    other = NodePrefill(base, prefill.attention)
    other.rows, other.stamp = copy.deepcopy(prefill.rows), prefill.stamp
    return other


def test_a_window_whose_gists_were_made_anew_is_read_again():
    base = small_base()
    tree = tree_of(base, lengths=(150,))
    context = window(tree, budget=60, edits=0)
    prefill = NodePrefill(base, MEGA)
    before = prefill.read(context)
    shown = context.index[context.lod == 1]
    tree.levels[1].write(torch.zeros_like(shown), shown, gist=2 * tree.gists(1)[0, shown])
    last, fresh = prefill.read(context), NodePrefill(base, MEGA).read(context)
    assert torch.allclose(last, fresh, atol=1e-4) and not torch.allclose(last, before, atol=1e-3)
