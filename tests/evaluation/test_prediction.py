"""Ranks of foretold gists beside their controls, and entries that say what comes."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_base import WIDTH, small

from megactx.evaluation.prediction import AMONG, CONTROLS, NOTHING, READOUT, TRUE, Text, measure, provisional, report
from megactx.gist import GistNet
from megactx.memory.prediction import CONTROL, Example, Readout

K = 4


def texts(count: int, nodes: int) -> list[Text]:
    """Every state is the next gist, turned by one and the same rotation."""
    generator, found = torch.Generator().manual_seed(0), []
    for number in range(count):
        gists = torch.randn(nodes + 1, 16, generator=generator)
        found.append(Text(Example(((gists[1:].roll(3, 1), gists[:-1]),)), "code" if number % 2 else "narrative"))
    return found


def knowing() -> Readout:
    readout = Readout(16)
    readout.readouts[0].weight.data = torch.eye(16).roll(-3, 0)
    readout.readouts[0].bias.data.zero_()
    readout.total += torch.randn(1, 16, generator=torch.Generator().manual_seed(9))
    return readout


def test_a_readout_that_knows_what_comes_is_first_and_leads_every_control():
    table = measure(knowing(), texts(6, 90))
    assert table.point(carrier=READOUT, domain="overall", metric="top1") == 1
    assert table.point(carrier=READOUT, domain="overall", metric="rank") == 1
    for control in CONTROLS:
        lead = table.one(carrier=control, domain="overall", metric="lead")
        assert lead["low"] > 0.8 and lead["n"] == 6 * 89
        assert table.point(carrier=control, domain="overall", metric="mrr") < 0.1
    assert {row["domain"] for row in table} == {"overall", "code", "narrative"}
    assert table.point(metric="candidates") == AMONG, "filled up from two other texts of the domain"
    shown = report(table, "title", {}, 6).markdown()
    assert f"**{READOUT}**" in shown and CONTROL in shown


def test_a_text_is_filled_up_from_its_domain_alone_and_has_fewer_candidates_where_there_are_not_enough():
    table = measure(knowing(), texts(2, 20))
    assert table.point(metric="candidates") == 20


def test_one_block_has_no_next_one():
    assert measure(knowing(), texts(2, 1)) == []


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_an_entry_before_a_block_is_read_by_its_tokens_as_in_a_plain_pass(kind):
    base = small(kind)
    torch.manual_seed(1)
    net = GistNet(WIDTH, base.embedding_rms(), block_size=K, num_heads=4).eval()
    readout = Readout(WIDTH).eval()
    readout.total += 1.0
    ids = torch.randint(97, (5 * K + 2,), generator=torch.Generator().manual_seed(0))
    found = provisional(base, readout, net, ids)
    gists = net.encode_block(base.embed(ids[: 5 * K].view(5, K)))
    with torch.no_grad():
        for at in range(4):
            start = (at + 1) * K
            entry = F.normalize(gists[at + 1], dim=-1) * gists.norm(dim=-1).mean()
            rows = torch.cat(
                [base.embed(ids[None, :start])[0], entry[None], base.embed(ids[None, start : start + K - 1])[0]]
            )
            places = torch.tensor([*range(start), start - 1, *range(start, start + K - 1)])
            hidden = base(rows[None], places[None], torch.ones(len(rows), len(rows)).tril().bool()[None, None])[0]
            wanted = F.cross_entropy(base.logits(hidden[start + 1 :]), ids[start + 1 : start + K], reduction="none")
            assert torch.allclose(found[TRUE][at], wanted, atol=1e-4)
            plain = base(base.embed(ids[None]), None)[0, start : start + K - 1]
            wanted = F.cross_entropy(base.logits(plain), ids[start + 1 : start + K], reduction="none")
            assert torch.allclose(found[NOTHING][at], wanted, atol=1e-4)
    assert {*found} == {NOTHING, TRUE, READOUT, *CONTROLS[:2]} and not math.isnan(found[READOUT].sum())
