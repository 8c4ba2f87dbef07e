"""The base LM says a block again from its gist: packed as in the obvious loop."""

import pytest
import torch
import torch.nn.functional as F

from megactx.gist import GistNet
from megactx.gist.loss import Context, build_losses
from megactx.lm.prefill import prefill

K, WIDTH, SETTINGS = 8, 64, {"reconstruction": {"weight": 1.0, "spans": 2, "request": "say it"}}


def context_of(base, **settings):
    torch.manual_seed(2)
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, num_heads=4, skip="none", **settings)
    ids = torch.randint(3, 97, (2, 60))
    batch = {"block_starts": torch.tensor([[16, 40, 8], [24, 8, 32]]), "lengths": torch.tensor([60, 60])}
    return Context(base, {"gistnet": net}, prefill(base, ids), batch, 8)


@pytest.mark.parametrize("settings", [{}, {"position": "centre"}, {"gaussian_rope": "damped"}])
def test_it_is_what_a_loop_over_blocks_gives(make_base, settings, words):
    base = make_base()
    base.tokenizer = words
    context = context_of(base, **settings)
    (loss,) = build_losses(SETTINGS, context.nets)
    value, numbers = loss(context)
    net, ids, found = context.nets["gistnet"], context.prefill.ids, []
    for b, n in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        start = int(context.batch["block_starts"][b, n])
        block = ids[b : b + 1, start : start + K]
        gist = net.encode_block(base.embed(block))[:, None]
        words = torch.cat([torch.tensor([[3, 4]]), block[:, :-1]], dim=1)
        rows = torch.cat([base.embed(ids[b : b + 1, :K]), gist, base.embed(words)], dim=1)
        places = [*range(K), start + net.offset, *range(start + K, start + K + words.shape[1])]
        sigma = torch.zeros(1, len(places))
        if net.sigma(1) is not None:
            sigma[:, K] = net.sigma(1)
        mask = torch.ones(1, 1, len(places), len(places), dtype=torch.bool).tril()
        hidden = base(rows, torch.tensor([places]), mask, sigma=sigma if net.sigma(1) is not None else None)
        nll = F.cross_entropy(base.logits(hidden[0, -K:]), block[0])
        full = F.cross_entropy(base.logits(context.prefill.hidden[b, start - 1 : start + K - 1]), block[0])
        found.append(nll - full)
    torch.testing.assert_close(value[0], torch.stack(found).mean(), rtol=1e-4, atol=1e-5)
    assert set(numbers) == {"reconstruction/loss", "reconstruction/dnll"}


def test_a_gist_learns_to_give_its_block_back_and_the_base_does_not_move(make_base, words):
    base = make_base()
    base.tokenizer = words
    context = context_of(base)
    net = context.nets["gistnet"]
    before = {name: p.clone() for name, p in base.named_parameters()}
    optimizer, (loss,), values = torch.optim.Adam(net.parameters(), 3e-3), build_losses(SETTINGS, context.nets), []
    for _ in range(30):
        context = Context(base, context.nets, context.prefill, context.batch, 8)  # gists are of these weights
        value = loss(context)[0].sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.05
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in base.named_parameters())


def test_what_it_cannot_do_is_refused_by_the_settings_name(make_base):
    context = context_of(make_base())
    with pytest.raises(ValueError, match="loss.reconstruction.request=''"):
        build_losses({"reconstruction": {"weight": 1.0, "request": ""}}, context.nets)
    (loss,) = build_losses(SETTINGS, context.nets)
    with pytest.raises(ValueError, match="loss.reconstruction.weight .* no tokenizer"):
        loss(context)
