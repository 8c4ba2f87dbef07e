"""LensNet sees the whole window, nothing of the padding, and says nothing of what may not be done."""

import pytest
import torch
from windows import VOCABULARY, WIDTH, K, gistnet, small_base, tree_of, window

from megactx.focus import moves
from megactx.focus.lensnet import QUESTIONS, LensNet, _alike, likeness, masked
from megactx.focus.mean_embeddings import window_mean_embeddings
from megactx.memory import MegaContextTree, WorkingContext


@pytest.fixture(scope="module")
def base():
    return small_base()


def lens(**settings) -> LensNet:
    torch.manual_seed(4)
    net = LensNet(WIDTH, K, num_heads=4, **settings)
    for last in (net.last, net.direct[-1]):  # they start at zero
        torch.nn.init.normal_(last.weight, std=0.1)
        torch.nn.init.normal_(last.bias, std=0.1)
    return net.eval()


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("layers", [2, 4])
@pytest.mark.parametrize("mode", ["plain", "damped", "learned"])
@torch.no_grad()
def test_the_value_of_an_old_entry_depends_on_the_newest_tokens(base, head, layers, mode):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (1, 150), generator=generator)
    other = ids.clone()
    other[:, -3:] = (other[:, -3:] + 1) % VOCABULARY
    net = lens(head=head, layers=layers, gaussian_rope=mode)
    first, second = (
        net.read(WorkingContext.recency(MegaContextTree.from_tokens(x, gistnet(base), base), 60)) for x in (ids, other)
    )
    changed = (first - second).abs().amax(-1)[0]
    assert changed[:-3].min() > 0, "an entry does not see the question"


@torch.no_grad()
def test_a_wide_window_without_padding_has_the_values_that_a_mask_gives_it(base, monkeypatch):
    context = WorkingContext.recency(tree_of(base, lengths=(150,)), 60)
    masks, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a: (masks.append(a[3]), attend(*a))[1]
    )
    with_mask = lens().read(context)
    monkeypatch.setattr("megactx.focus.lensnet.WIDE", 8)
    without = lens().read(context)
    assert [mask is None for mask in masks] == [False, False, True, True]
    torch.testing.assert_close(without, with_mask, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["plain", "damped"])
@torch.no_grad()
def test_the_last_block_works_for_wanted_columns_alone_and_their_values_stay(base, monkeypatch, mode):
    context, net, rows = WorkingContext.recency(tree_of(base, lengths=(150, 130)), 60), lens(gaussian_rope=mode), []
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a: (rows.append(a[0].shape[2]), attend(*a))[1]
    )
    legal = moves(context)
    wanted = (legal.expand | (legal.first >= 0)).any(0)
    everything, some = net.read(context), net.read(context, wanted=wanted)
    assert 0 < wanted.sum() < len(wanted) and rows == [len(wanted)] * 3 + [int(wanted.sum())]
    torch.testing.assert_close(some, torch.where(wanted[:, None], everything, 0.0), rtol=1e-5, atol=1e-6)
    rows.clear()
    net.score(context)
    assert rows == [len(wanted), int(wanted.sum())]


@torch.no_grad()
def test_the_padding_is_neither_read_nor_valued(base):
    context = window(tree_of(base))
    net, mask = lens(), context.mask
    assert not mask.all()
    arguments = context.lods(), context.ends()[:, None] - context.positions(), mask
    entries, mean_embeddings = context.to_tensor(), window_mean_embeddings(context)
    plain = net(entries, *arguments, mean_embeddings)
    filled, other = (torch.where(mask[..., None], x, torch.nan) for x in (entries, mean_embeddings))
    far = torch.where(mask, arguments[1], 7)
    torch.testing.assert_close(net(filled, arguments[0], far, mask, other), plain)
    assert (plain[~mask] == 0).all() and (plain[mask] != 0).all()
    for row, length in enumerate(context.lengths.tolist()):  # and each row is read on its own
        alone = net(*(t[row : row + 1, :length] for t in (entries, *arguments, mean_embeddings)))
        torch.testing.assert_close(alone[0], plain[row, :length], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_content_of_an_entry_is_the_mean_embedding_of_its_tokens(base):
    context = window(tree_of(base))
    found, tokens = window_mean_embeddings(context), context.tree.tokens.long()
    for row in (0, 1):
        for column in range(int(context.counts[row])):
            start, width = int(context.starts()[row, column]), int(context.widths()[row, column])
            mean = base.embed(tokens[row, start : start + width]).mean(0)
            torch.testing.assert_close(found[row, column], mean)
    assert (found[~context.mask] == 0).all()


@torch.no_grad()
def test_what_is_not_legal_has_no_value_and_siblings_share_one(base):
    context, net = window(tree_of(base)), lens()
    legal = moves(context, 8)
    values, scores = net.read(context), net.score(context, legal)
    assert (scores.v_down[context.lod == 0] == 0).all() and (scores.v_keep[legal.first < 0] == 0).all()
    torch.testing.assert_close(scores.v_down[legal.expand], values[..., 0][legal.expand])
    assert legal.leads.any()
    for row, column in legal.leads.nonzero().tolist():
        siblings = slice(column, column + K)
        mean = values[row, siblings, 1].mean()
        torch.testing.assert_close(scores.v_keep[row, siblings], mean.expand(K))
    nothing = ~legal.expand & (legal.first < 0)
    assert nothing.any() and (scores.score[nothing] == 0).all()
    assert scores.score.abs().max() <= 1 and (scores.price >= 0).all()


@torch.no_grad()
def test_at_the_price_the_edits_it_calls_for_fit_the_budget(base):
    context, net = window(tree_of(base)), lens()
    for slack in (0, 5, 40):
        context.budget = int(context.lengths.max()) + slack
        legal = moves(context, 8)
        scores = net.score(context, legal)
        wanted = ((scores.v_down > scores.price[:, None]) & legal.expand).sum(1)
        spared = ((scores.v_keep < scores.price[:, None]) & legal.leads).sum(1)
        assert ((K - 1) * (wanted - spared) <= context.budget - context.lengths).all()


def test_every_parameter_gets_a_gradient(base):
    context, net = window(tree_of(base)), lens(gaussian_rope="learned")
    net.train()
    scores = net.score(context, moves(context, 8))
    (scores.v_down.sum() + scores.v_keep.sum()).backward()
    for name, p in net.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_tau_is_the_running_spread_of_what_was_measured_and_is_in_the_checkpoint():
    net = lens()
    generator = torch.Generator().manual_seed(0)
    seen = [0.3 * torch.randn(500, generator=generator) for _ in range(20)]
    for values in seen:
        net.see(values)
    each = [(v - v.mean()).abs().mean() * (torch.pi / 2) ** 0.5 for v in seen]
    assert net.tau.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-4)
    assert net.tau.item() == pytest.approx(0.3, rel=0.05), "of a normal distribution it is the standard deviation"
    net.see(torch.ones(1))  # of one value there is no deviation
    other = LensNet(WIDTH, K, num_heads=4)
    other.load_state_dict(net.state_dict())
    assert other.tau == net.tau and other.updates == 20


def test_masked_values_of_a_window_without_siblings_are_zero():
    tree = tree_of(small_base(), (40, 40))
    context = WorkingContext.recency(tree, 45)
    legal = moves(context, protected=1000)
    assert not legal.leads.any()
    _, keep = masked(torch.ones(*context.lod.shape, 2), legal)
    assert (keep == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(layers=0), r"lensnet.layers=0 is not allowed: a whole number from 1 to 16"),
        (dict(num_heads=3), r"lensnet.num_heads=3 does not divide the base LM's width 32"),
        (dict(head="deep"), r"lensnet.head=deep is not known, allowed are linear, mlp"),
        (dict(dropout=1.0), r"lensnet.dropout=1.0 is not allowed"),
        (dict(gaussian_rope="wide"), r"gaussian_rope=wide is not known"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LensNet(WIDTH, K, **{"num_heads": 4} | settings)


@torch.no_grad()
def test_a_raw_block_is_judged_as_a_whole_by_its_likeness_and_its_left_neighbours_to_the_newest_entries(base):
    """Against loops over blocks; QUESTIONS are longer than these windows but for the first."""
    context = window(tree_of(base))
    mean_embeddings = window_mean_embeddings(context)
    special, like = _alike(mean_embeddings, context.lods(), context.mask, K)
    for row in (0, 1):
        length, blocks, begins, column = int(context.counts[row]), [], [], 0
        while column < length:
            raw = int(context.lod[row, column]) == 0
            size = 1
            while raw and size < K and column + size < length and context.lod[row, column + size] == 0:
                size += 1
            blocks.append(mean_embeddings[row, column : column + size].mean(0))
            begins.append((column, size, size / K if raw else 1.0))
            column += size
        weight = torch.tensor([w for *_, w in begins])[:, None] / sum(w for *_, w in begins)
        blocks = torch.stack(blocks)
        mean = (blocks * weight).sum(0)
        expected = []
        for n in QUESTIONS:
            question = (mean_embeddings[row, max(0, length - n) : length] - mean).sum(0)
            cosine = torch.cosine_similarity(blocks - mean, question[None], dim=-1)[:, None]
            cosine = cosine - (cosine * weight).sum(0)
            expected.append(cosine / (cosine.square() * weight).sum(0).sqrt())
        expected = torch.cat(expected, dim=1)
        for number, (first, size, _) in enumerate(begins):
            for place in range(first, first + size):
                torch.testing.assert_close(like[row, place, :3], expected[number], rtol=1e-3, atol=1e-3)
                before = expected[number - 1] if number else torch.zeros(3)
                torch.testing.assert_close(like[row, place, 3:], before, rtol=1e-3, atol=1e-3)
        assert torch.equal(likeness(context)[row, :length], like[row, :length].amax(-1))
    assert (like[~context.mask] == 0).all() and (special[~context.mask] == 0).all()
