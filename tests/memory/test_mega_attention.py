"""Who sees whom under MegaAttention: every past token once, nothing from the future, and no edit beyond its segment."""

import pytest
import torch
from windows import BASES, K, small_base, tree_of, window

from megactx.lm.mega_attention import MegaMask, in_order
from megactx.memory import WorkingContext, passes, pyramid
from megactx.memory.pyramid import Attention, Pyramid

SIZES = dict(segment=16, mid=16, live=16)
OVERLAP = SIZES | dict(overlap=8)


@pytest.fixture(scope="module", params=BASES)
def base(request):
    return small_base(request.param)


@pytest.fixture(scope="module", params=BASES)
def double(request):
    """In fp64: a mask that is wrong in one place shows, and the rounding of a machine does not."""
    base = small_base(request.param)
    base.model.double()
    return base


def tokens_seen(mask: MegaMask, row: int, column: int) -> torch.Tensor:
    """How often a row of the pass sees each token, [end of the row]."""
    seen = mask.dense()[row, 0, column] & mask.there[row]
    counts = torch.zeros(int(mask.end[row][mask.there[row]].max()), dtype=torch.long)
    for c in seen.nonzero()[:, 0].tolist():
        if c != column or not mask.summary[row, c]:  # a summary sees itself besides
            counts[int(mask.start[row, c]) : int(mask.end[row, c])] += 1
    return counts


@pytest.mark.parametrize(
    "sizes",
    [
        SIZES,
        OVERLAP,
        dict(segment=4, mid=4, live=0),
        dict(segment=4, mid=4, live=0, overlap=4),
        dict(segment=64, mid=32, live=20),
        dict(segment=64, mid=32, live=20, overlap=12),
    ],
)
@pytest.mark.parametrize("seed", range(2))
def test_every_row_sees_every_token_before_it_through_exactly_one_entry(sizes, seed):
    base = small_base()
    mask = Pyramid.of(window(tree_of(base), edits=8, seed=seed), **sizes).mask
    for row in range(2):
        for column in range(int(mask.there[row].sum())):
            counts, start = tokens_seen(mask, row, column), int(mask.start[row, column])
            assert (counts[K:start] == 1).all(), (row, column)
            assert (counts[: min(K, start)] >= 1).all()  # the sink stands in tokens, and may be in a coarse gist too
            assert (counts[int(mask.end[row, column]) :] == 0).all()  # nothing that ends behind it


@pytest.mark.parametrize("block", [2, 3, 8, 13])
def test_ragged_tails_and_all_block_sizes_are_covered(block):
    segment, tokens = (block**2 if block < 8 else block), 3 * block**2 + block // 2 + 1
    starts = torch.arange(tokens)[None]
    summaries = [(i * block**n, block**n) for n in (1, 2, 3) for i in range(tokens // block**n)]
    start = torch.cat([starts, torch.tensor([[s for s, _ in summaries]])], 1)
    width = torch.cat([torch.ones_like(starts), torch.tensor([[w for _, w in summaries]])], 1)
    summary = torch.arange(start.shape[1])[None] >= tokens
    there = torch.ones_like(summary)
    order = in_order(start, width, summary, there)
    start, width, summary = (part.gather(1, order) for part in (start, width, summary))
    mask = MegaMask(start, width, summary, there, block, segment=segment, mid=block, live=block)
    step = max(1, start.shape[1] // 30)
    for column in range(0, start.shape[1], step):
        counts, begin = tokens_seen(mask, 0, column), int(start[0, column])
        assert (counts[block:begin] == 1).all() and (counts[begin + int(width[0, column]) :] == 0).all()


def test_where_everything_is_live_it_is_plain_attention_bit_for_bit(base):
    context = window(tree_of(base))
    plain = base.read(
        context.to_tensor(), context.positions(), context.lengths, context.tree.encoder.spread(context.lods())
    )
    assert torch.equal(Pyramid.of(context, segment=16, mid=16, live=10**6).read(base), plain)


@pytest.mark.parametrize("sizes", [SIZES, OVERLAP, dict(segment=4, mid=4, live=0, overlap=4), dict(SIZES, live=10**6)])
@pytest.mark.parametrize("summaries", [True, False])
def test_reading_in_passes_is_reading_under_the_whole_mask(double, sizes, summaries, monkeypatch):
    base = double
    context, attention = window(tree_of(base), edits=8), Attention("mega", summaries=summaries, **sizes)
    whole, taken, by_segments = attention.read(base, context), [], pyramid.by_segments
    monkeypatch.setattr(pyramid, "LONG", 1)
    monkeypatch.setattr(passes, "SIDE_BY_SIDE", 2000)  # several groups, of several segments
    monkeypatch.setattr(pyramid, "by_segments", lambda *given: (taken.append(given), by_segments(*given))[1])
    assert torch.equal(attention.read(base, context), whole) and not taken  # there may be a gradient to take
    with torch.no_grad():
        torch.testing.assert_close(attention.read(base, context), whole.detach(), atol=1e-10, rtol=1e-10)
    assert bool(taken) == (sizes["live"] < 10**6)


@pytest.mark.parametrize("wide", [1, 5, 16, 1000])
def test_a_sliding_window_in_passes_is_its_whole_mask(double, wide, monkeypatch):
    base = double
    context, attention = window(tree_of(base), edits=8), Attention("window", window=wide)
    whole, pairs = attention.read(base, context).detach(), attention.pairs(context)
    monkeypatch.setattr(pyramid, "LONG", 7)
    monkeypatch.setattr(passes, "ROWS", 7)
    with torch.no_grad():
        torch.testing.assert_close(attention.read(base, context), whole, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(attention.pairs(context), pairs)


@pytest.mark.parametrize("sizes", [SIZES, OVERLAP])
def test_the_share_of_pairs_is_that_of_the_whole_mask(sizes):
    context = window(tree_of(small_base()), edits=8)
    mask = Pyramid.of(context, **sizes).mask
    seen = (mask.dense()[:, 0] & mask.there[:, :, None]).sum((1, 2))
    count = context.counts
    torch.testing.assert_close(mask.pairs(), seen / (count * (count + 1) / 2))


def test_live_rows_see_leaves_alone_and_summaries_see_no_leaves_but_the_sink(base):
    mask = Pyramid.of(window(tree_of(base)), **SIZES).mask
    sees, live = mask.dense()[:, 0], mask.is_live
    leaf = mask.there & ~mask.summary
    before = torch.ones_like(sees).tril()
    assert torch.equal(sees[live], (before & leaf[:, None])[live]) and live.any(1).all()
    behind_sink = leaf & (mask.start >= K)
    assert not (sees & mask.summary[:, :, None] & behind_sink[:, None]).any()
    assert (~live & leaf).any(1).all() and mask.summary.any(1).all()


def states(base, pyramid: Pyramid, embeddings: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states behind every layer."""
    found, hooks = [], []
    for layer in base.model.get_decoder().layers:
        hooks.append(layer.register_forward_hook(lambda module, args, out: found.append(out)))
    base(embeddings, pyramid.positions(), pyramid.mask.dense())
    for hook in hooks:
        hook.remove()
    return [out[0] if isinstance(out, tuple) else out for out in found]


@pytest.mark.parametrize("overlap", [0, 8])
def test_what_changes_in_a_segment_moves_no_state_outside_of_it_and_of_the_live_rows(base, overlap):
    """With strips: outside of it, of the next segment, and of the strip between."""
    pyramid = Pyramid.of(window(tree_of(base, lengths=(150, 150))), **SIZES, overlap=overlap)
    mask, embeddings = pyramid.mask, pyramid.to_tensor()
    segments = torch.where(mask.summary, -1, mask.segments())
    settled, strip = mask.leaf & ~mask.is_live, mask.there & ~mask.leaf & ~mask.summary
    assert strip.any() == bool(overlap)
    tried = reached = 0
    for segment in segments[settled].unique().tolist():
        changed = settled & (segments == segment) & (mask.start >= K)
        if not changed.any():
            continue
        tried += 1
        # A strip shows the same nodes, or gists of what is finer there; both change with the segment that it ends.
        changed |= strip & (segments == segment + 16)
        noise = torch.where(changed[..., None], torch.randn_like(embeddings), embeddings)
        next_one = (segments == segment + 16) & (overlap > 0)
        same = mask.there & ~changed & ~mask.is_live & (segments != segment) & ~next_one
        reached += bool((settled & next_one).any())
        for before, after in zip(states(base, pyramid, embeddings), states(base, pyramid, noise), strict=True):
            assert (before - after)[same].abs().max() <= 1e-6
            assert (before - after)[mask.is_live].abs().max() > 1e-4
    assert tried > 2 and (reached > 1) == bool(overlap)


def test_a_settled_row_sees_the_tokens_before_its_segment_and_no_strip_sees_a_leaf(base):
    tree = tree_of(base, lengths=(150,))
    index = torch.arange(150)[None]
    mask = Pyramid.of(WorkingContext(tree, torch.zeros_like(index), index, [150], 150), **OVERLAP).mask
    sees, settled = mask.dense()[0, 0], mask.leaf[0] & ~mask.is_live[0]
    strip = mask.there[0] & ~mask.leaf[0] & ~mask.summary[0]
    for row in (settled & (mask.start[0] >= 16)).nonzero()[:, 0].tolist():
        at = int(mask.start[0, row])
        seen = sees[row] & (strip | mask.leaf[0]) & (mask.start[0] >= K)
        assert mask.start[0, seen].tolist() == list(range(at // 16 * 16 - 8, at + 1))
    assert not (sees[strip][:, mask.leaf[0] & (mask.start[0] >= K)]).any()
    assert int(strip.sum()) == 8 * (int(mask.live_from[0]) // 16 - 1)


def test_what_a_window_shows_elsewhere_changes_nothing_for_a_settled_leaf(base):
    """An opened gist changes its own segment and the live rows: the others see summaries, not the window."""
    tree = tree_of(base, lengths=(150,))
    one, other = WorkingContext.recency(tree, 60), WorkingContext.recency(tree, 60)
    other.budget = 10**6
    first = int((other.lods()[0] > 0).nonzero()[0])
    opened = other.starts()[0, first], other.starts()[0, first] + other.widths()[0, first]
    other.expand(first)
    hidden = []
    for context in (one, other):
        pyramid = Pyramid.of(context, **SIZES)
        mask, at = pyramid.mask, context.starts()[0]
        own = mask.borders()[2].gather(1, pyramid.leaves)[0]
        elsewhere = (own != int(opened[0]) // 16 * 16) & ((at < opened[0]) | (at >= opened[1]))
        kept = elsewhere & ~mask.is_live.gather(1, pyramid.leaves)[0]
        hidden.append(pyramid.read(base)[0, kept])
    # Both passes have their own number of columns, so sums are made in another order.
    assert len(hidden[0]) > 8 and (hidden[0] - hidden[1]).abs().max() < 1e-5 * hidden[0].abs().max()


@pytest.mark.parametrize("sizes", [SIZES, OVERLAP])
def test_the_dense_mask_is_what_flex_attention_makes_of_the_same_rule(sizes):
    from torch.nn.attention.flex_attention import create_mask

    mask = Pyramid.of(window(tree_of(small_base())), **sizes).mask
    n = mask.start.shape[1]
    assert torch.equal(create_mask(mask.rule(), 2, 1, n, n, device="cpu"), mask.dense())


def test_padding_is_seen_by_nobody_and_breaks_nothing(base):
    context = window(tree_of(base, lengths=(150, 40)))
    pyramid = Pyramid.of(context, **SIZES)
    there = pyramid.mask.there
    assert not (pyramid.mask.dense()[:, 0] & ~there[:, None] & ~torch.eye(there.shape[1], dtype=torch.bool)).any()
    alone = Pyramid.of(WorkingContext(*row_of(context, 1)), **SIZES)
    assert torch.allclose(pyramid.read(base)[1, : context.counts[1]], alone.read(base)[0], atol=1e-5)


def row_of(context, row: int):
    tree = context.tree
    tokens = tree.tokens[row : row + 1, : int(tree.lengths[row])]
    alone = type(tree).from_tokens(tokens, tree.encoder, tree.base)
    count = int(context.counts[row])
    return alone, context.lod[row : row + 1, :count], context.index[row : row + 1, :count], [count], 10**6


@pytest.mark.parametrize(
    ("name", "value"),
    [("segment", 6), ("mid", 0), ("live", -1), ("segment", 12), ("overlap", 6), ("overlap", 20), ("overlap", -4)],
)
def test_a_size_that_does_not_fit_the_grid_is_refused(name, value):
    with pytest.raises(ValueError, match=f"attention.{name}={value} is not allowed"):
        Pyramid.of(window(tree_of(small_base())), **(SIZES | {name: value}))


def test_fewer_pairs_are_seen():
    mask = Pyramid.of(window(tree_of(small_base()), budget=100, edits=10), **SIZES).mask
    slow = (mask.dense()[:, 0] & mask.there[:, :, None]).sum((1, 2))
    count = (mask.there & ~mask.summary).sum(1)
    assert torch.allclose(mask.pairs(), slow / (count * (count + 1) / 2))
