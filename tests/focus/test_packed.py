"""All windows in one pass are each window on its own, and gradients reach the gists that a tree had stored."""

import pytest
import torch
from windows import VOCABULARY, K, gistnet, small_base

from megactx.focus.lensnet import LensNet
from megactx.focus.packed import Windows, accumulated, continuation_loss, encode_shown, unique_windows
from megactx.focus.window_variants import focus_losses, make_variants, same_rows
from megactx.lm.adapters import adapt, adapters_of
from megactx.lm.prefill import unread
from megactx.memory import WorkingContext

TOKENS, H, BUDGET = 260, 5, 170


def document() -> torch.Tensor:
    return torch.randint(VOCABULARY, (TOKENS + H,), generator=torch.Generator().manual_seed(5))


def parts(lora: bool = False, rows: tuple = (3, 9), **settings):
    """Base, GistNet, windows that differ, and what follows."""
    base = small_base()
    if lora:
        adapt(base, rank=4, layers="all")
        for p in adapters_of(base).values():
            p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) * 0.1
    net, ids = gistnet(base, **settings), document()
    trees = same_rows(net, base, unread(ids[None, :TOKENS]), *rows)
    torch.manual_seed(3)
    lens = LensNet(base.width, K, num_heads=4)
    variants = make_variants(trees, BUDGET, lens, {"protected": 8}, torch.Generator().manual_seed(0))
    return base, net, lens, variants, ids


def packed_loss(base, net, context: WorkingContext, ids, step: int, objective="delta_nll", recompute=False):
    """-> (sum of the losses of all windows, NLL [N, H])."""
    windows, targets = Windows.of(context), ids[TOKENS:]
    prefill = unread(ids[None, :TOKENS])
    with torch.no_grad():
        full = base(base.embed(ids[None, :-1]), None)[0, TOKENS - 1 :]
    gists = encode_shown(net, base, prefill, windows.nodes, recompute)

    def run(part, gists):
        loss, nll = continuation_loss(base, windows[part].read(base, gists, targets, net), full, targets, objective)
        return loss.sum(), nll

    places = [slice(start, start + step) for start in range(0, len(windows), step)]
    return accumulated(run, places, gists, [base, net])


def plain_losses(base, net, context: WorkingContext, ids) -> list[torch.Tensor]:
    """The obvious way: each window is put together entry by entry, and read by a plain forward of its own."""
    k, out = net.block_size, []
    for row, count in enumerate(context.counts.tolist()):
        vectors, positions, sigmas = [], [], []
        for lod, index in zip(context.lod[row, :count].tolist(), context.index[row, :count].tolist(), strict=True):
            tokens = base.embed(ids[index * k**lod : (index + 1) * k**lod][None])
            vectors.append(tokens[0, 0] if lod == 0 else net.encode_lod(tokens, lod)[0])
            positions.append(index if lod == 0 else index * k**lod + net.offset_in(k**lod))
            sigma = net.sigma(lod) if lod else None
            sigmas.append(torch.zeros(()) if sigma is None else sigma)
        vectors += list(base.embed(ids[TOKENS:-1][None])[0])
        positions += range(TOKENS, TOKENS + H - 1)
        sigmas += [torch.zeros(())] * (H - 1)
        x = torch.stack(vectors)[None]
        mask = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()[None, None]
        hidden = base(x, torch.tensor([positions]), mask, sigma=torch.stack(sigmas)[None])
        logits = base.logits(hidden[0, -H:])
        out.append(torch.nn.functional.cross_entropy(logits, ids[TOKENS:], reduction="none"))
    return out


def gradients(loss, *modules) -> list[torch.Tensor]:
    found = [p for module in modules for p in module.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, found, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("rope", ["plain", "learned"])
def test_one_packed_pass_is_one_plain_forward_per_window_gradients_too(lora, rope):
    base, net, _, variants, ids = parts(lora, gaussian_rope=rope)
    context = variants.context
    assert {1, 2} <= set(Windows.of(context).nodes) and len(set(context.counts.tolist())) > 1
    loss, nll = packed_loss(base, net, context, ids, step=2)
    slow = plain_losses(base, net, context, ids)
    torch.testing.assert_close(nll, torch.stack(slow).detach(), rtol=1e-5, atol=1e-5)
    mine, theirs = gradients(loss, net, base), gradients(torch.stack(slow).sum(), net, base)
    assert (len(mine) > len(list(net.parameters()))) == lora
    scale = max(float(g.abs().max()) for g in theirs)
    assert scale > 1e-3
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("objective", ["kl", "delta_nll"])
def test_windows_in_parts_give_the_gradients_of_all_at_once_and_so_do_recomputed_gists(objective):
    base, net, _, variants, ids = parts(lora=True)
    found = []
    for step, recompute in ((100, False), (1, False), (4, True)):
        loss, nll = packed_loss(base, net, variants.context, ids, step, objective, recompute)
        found.append((loss.detach(), nll, *gradients(3 * loss, net, base)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-9)


def test_a_base_that_trains_as_a_whole_has_the_gradients_of_a_plain_forward():
    base, net, _, variants, ids = parts(rows=(2, 4))
    reference = small_base()
    base.requires_grad_(True)
    windows, targets = Windows.of(variants.context), ids[TOKENS:]
    with torch.no_grad():
        full = reference(reference.embed(ids[None, :-1]), None)[0, TOKENS - 1 :]
    gists = encode_shown(net, base, unread(ids[None, :TOKENS]), windows.nodes, False)

    def run(part, gists):
        hidden = windows[part].read(base, gists, targets, net)
        loss, nll = continuation_loss(base, hidden, full, targets, "delta_nll", reference)
        return loss.sum(), nll

    loss, _ = accumulated(run, [slice(0, 2), slice(2, 4)], gists, [base, net])
    slow = torch.stack(plain_losses(base, net, variants.context, ids)).sum()
    for a, b in zip(gradients(loss, base), gradients(slow, base), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-7)


def test_under_autocast_a_pass_without_gradients_before_does_not_cut_those_of_the_gists():
    base, net, _, variants, ids = parts(lora=True)
    with torch.autocast("cpu", torch.bfloat16):
        same_rows(net, base, unread(ids[None, :TOKENS]), 1)  # leaves 16-bit copies of the weights, without a graph
        loss, _ = packed_loss(base, net, variants.context, ids, step=2)
    for p, g in zip(net.parameters(), gradients(loss, net), strict=True):
        assert g.abs().max() > 0 or p.abs().max() == 0 or p.shape == ()
    assert all(g.abs().max() > 0 for g in gradients(packed_loss(base, net, variants.context, ids, 2)[0], base))


def test_windows_that_are_alike_are_read_once():
    base, net, _, variants, ids = parts()
    context = variants.context
    first, kind = unique_windows(context)
    assert len(first) < len(kind) or len(first) == len(kind)
    rows = [
        tuple(zip(context.lod[r, :n].tolist(), context.index[r, :n].tolist(), strict=True))
        for r, n in enumerate(context.counts.tolist())
    ]
    assert len(first) == len(set(rows))
    assert all(rows[first[kind[r]]] == rows[r] for r in range(len(rows)))
    assert first.tolist() == sorted(first.tolist())


def test_the_first_variant_is_the_source_and_the_others_are_edits_of_it_within_the_budget():
    _, _, _, variants, _ = parts(rows=(3, 12))
    sources, context, each = variants.sources, variants.context, variants.each
    context.check()
    assert each == 4 and set(variants.edits.row.tolist()) == {r for r in range(12) if r % 4}
    assert torch.equal(
        sources.lod[0],
        torch.nn.functional.pad(WorkingContext.recency(sources.tree, BUDGET).lod[0], (0, sources.lod.shape[1]))[
            : sources.lod.shape[1]
        ],
    )
    for row in range(0, 12, 4):
        count = int(sources.counts[row // 4])
        assert context.counts[row] == count
        assert torch.equal(context.index[row, :count], sources.index[row // 4, :count])


@pytest.mark.slow
def test_lensnet_learns_the_variant_that_was_best_after_its_distance():
    _, _, lens, variants, _ = parts(rows=(2, 8))
    nll = torch.full((8,), 3.0)
    nll[2], nll[5], nll[6] = 2.0, 2.9, 2.8999
    optimizer = torch.optim.AdamW(lens.parameters(), lr=3e-3)
    for _ in range(200):
        losses = focus_losses(lens, variants, nll, weight=0.01, choice=0.1)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["choice"] < 0.5 and losses["huber"] < 0.02
    assert 0.5 < losses["gained"] < 0.6
    far = focus_losses(lens, variants, nll, weight=1e3, choice=0.1)
    assert far["gained"] == 0, "a distance that costs more than any gain leaves every source as it is"
