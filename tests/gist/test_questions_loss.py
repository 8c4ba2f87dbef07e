"""Answers behind gists: the batched loss is that of plain passes, one question at a time."""

import pytest
import torch
import torch.nn.functional as F

from megactx.gist import GistNet
from megactx.gist.loss import Context
from megactx.gist.losses.questions import Questions
from megactx.lm.masks import CAUSAL
from megactx.lm.prefill import prefill, unread

K, BEGIN = 8, 2


def made(base, count: int = 3, **settings):
    draw = torch.Generator().manual_seed(1)
    nets = {}
    for index in range(2):
        torch.manual_seed(index)
        net = GistNet(base.width, base.embedding_rms(), block_size=K, num_heads=4, **settings)
        for p in net.parameters():  # a fresh correction is 0
            p.data += 0.02 * torch.randn_like(p)
        nets[f"net {index}"] = net.eval()
    asked = torch.randint(3, 90, (count, 12), generator=draw)
    places = torch.tensor([[9, 10, 11], [8, 9, -1], [6, -1, -1]])[:count]
    for row, own in zip(asked, places, strict=True):
        row[own.max() + 1 :] = 0
    batch = {
        "contexts": torch.randint(3, 90, (count, BEGIN + 3 * K), generator=draw),
        "context_starts": BEGIN + torch.arange(0, 3 * K, K).expand(count, -1),
        "questions": asked,
        "answers": places,
        "ids": torch.randint(3, 90, (1, 40), generator=draw),
    }
    return nets, batch


def plain(base, net, batch, row: int) -> tuple[torch.Tensor, bool]:
    """One question in one pass of its own, without padding."""
    ids, starts = batch["contexts"][row][None], batch["context_starts"][row][None]
    read = prefill(base, ids, with_states=True) if net.needs_hidden else unread(ids)
    gists = net.compress(base, read, starts)
    places = batch["answers"][row][batch["answers"][row] >= 0]
    asked = batch["questions"][row][: places.max() + 1]
    embedded = base.embed(torch.cat([ids[0, :BEGIN], asked])[None])
    rows = torch.cat([embedded[:, :BEGIN], gists.vectors, embedded[:, BEGIN:]], dim=1)
    at = [*range(BEGIN), *(starts[0] + net.offset).tolist(), *(ids.shape[1] + torch.arange(len(asked))).tolist()]
    sigma = None
    if gists.sigma is not None:
        sigma = torch.tensor([[0.0] * BEGIN + [float(gists.sigma)] * 3 + [0.0] * len(asked)])
    logits = base.logits(base(rows, torch.tensor([at]), CAUSAL, sigma=sigma)[0, BEGIN + 3 - 1 : -1])
    said = logits[places]
    return F.cross_entropy(said, asked[places]), bool((said.argmax(-1) == asked[places]).all())


@pytest.mark.parametrize(
    "settings", [{}, {"position": "end"}, {"gaussian_rope": "damped"}, {"input": "hidden", "input_layer": 1}]
)
def test_the_loss_is_the_mean_over_answers_of_the_nll_of_a_token_behind_the_gists(settings, make_base):
    base = make_base()
    nets, batch = made(base, **settings)
    losses, numbers = Questions(1.0)(Context(base, nets, prefill(base, batch["ids"]), batch, 8))
    for n, (name, net) in enumerate(nets.items()):
        found = [plain(base, net, batch, row) for row in range(3)]
        torch.testing.assert_close(losses[n], torch.stack([nll for nll, _ in found]).mean(), rtol=1e-4, atol=1e-5)
        right = numbers["questions/right" if n == 0 else f"questions/{name}/right"]
        assert right == sum(told for _, told in found) / 3
    assert numbers["questions/loss"] == losses[0]


def test_padding_behind_an_answer_changes_nothing(make_base):
    base = make_base()
    nets, batch = made(base)
    one, _ = Questions(1.0)(Context(base, nets, prefill(base, batch["ids"]), batch, 8))
    changed = batch | {
        "questions": F.pad(batch["questions"], (0, 4), value=5),
        "answers": F.pad(batch["answers"], (0, 2), value=-1),
    }
    two, _ = Questions(1.0)(Context(base, nets, prefill(base, batch["ids"]), changed, 8))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_an_answer_that_the_gists_decide_is_learned(make_base):
    """Two contexts differ in one token, which is asked for: the gists alone say which it is."""
    base = make_base()
    nets, batch = made(base, count=2)
    net = {"net 0": nets["net 0"].train()}
    batch["contexts"][1] = batch["contexts"][0]
    batch["questions"][:], batch["answers"] = batch["questions"][0].clone(), torch.tensor([[11], [11]])
    batch["contexts"][:, BEGIN + K + 3] = batch["questions"][:, 11] = torch.tensor([40, 60])
    optimizer = torch.optim.Adam(net["net 0"].parameters(), lr=1e-2)
    read, losses = prefill(base, batch["ids"]), []
    for _ in range(100):
        values, numbers = Questions(1.0)(Context(base, net, read, batch, 8))
        optimizer.zero_grad()
        values.sum().backward()
        optimizer.step()
        losses.append(values.item())
    swapped = batch | {"contexts": batch["contexts"].flip(0)}
    other, _ = Questions(1.0)(Context(base, net, read, swapped, 8))
    assert numbers["questions/right"] == 1 and losses[-1] < losses[0] - 1 and other > losses[-1] + 1
