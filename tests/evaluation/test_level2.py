"""Gists of gists in reports and validations: beside the gists they are made of, their mean, and nothing."""

import json

import pytest
import torch
from plain_forward import VOCABULARY, WIDTH, document, plain_nll, tiny_base

from megactx.evaluation.passages import measure_level
from megactx.evaluation.report import report_of
from megactx.evaluation.scores import BlockScores
from megactx.evaluation.summary import summarise
from megactx.evaluation.validation import ValidationMetrics
from megactx.gist import GistNet

K, H = 4, 6
SPAN = K * K


@pytest.fixture(scope="module")
def base():
    return tiny_base()


def net(base, **settings) -> GistNet:
    torch.manual_seed(1)
    return GistNet(WIDTH, base.embedding_rms(), block_size=K, num_heads=4, skip="none", **settings).eval()


def documents(lengths=(60, 45)) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    return [document(ids, [K], ["code", "narrative"][i % 2], i) for i, ids in enumerate(texts)]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"position": "centre"}, {"levels": 2}])
def test_the_gists_below_and_their_mean_cost_what_plain_forwards_with_them_cost(base, settings):
    gistnet = net(base, **settings)
    scores = measure_level(base, {"gistnet": gistnet}, documents(), H)
    assert len(scores) == 3
    for row, (text, s) in enumerate(zip(scores.document.tolist(), scores.start.tolist(), strict=True)):
        ids = documents()[text]["ids"][0]
        below = torch.stack([gistnet.encode_block(base.embed(ids[None, a : a + K]))[0] for a in range(s, s + SPAN, K)])
        mean = plain_nll(base, ids, s, SPAN, H, below.mean(dim=0), gistnet.offset_in(SPAN))
        torch.testing.assert_close(scores.carriers["mean of its gists (raw)"][row], mean, rtol=1e-4, atol=1e-4)
        after = torch.arange(s + SPAN, s + SPAN + H)
        at = torch.arange(s, s + SPAN, K) + gistnet.offset_in(K)
        positions = torch.cat([torch.arange(s), at, after[:-1]])[None]
        order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
        for name, gists in (("its 4 gists", below), ("its 4 gists, shuffled", below[order])):
            x = torch.cat([base.embed(ids[None, :s]), gists[None], base.embed(ids[None, after[:-1]])], dim=1)
            logits = base.logits(base.read(x, positions, torch.tensor([x.shape[1]])))[0, -H:]
            nll = torch.nn.functional.cross_entropy(logits, ids[after], reduction="none")
            torch.testing.assert_close(scores.carriers[name][row], nll, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_where_positions_are_wide_every_gist_has_the_width_of_its_own_level(base):
    plain, wide = (
        measure_level(base, {"gistnet": net(base, gaussian_rope=mode)}, documents(), H) for mode in ("plain", "damped")
    )
    same = {name for name, nll in plain.carriers.items() if torch.allclose(nll, wide.carriers[name], atol=1e-5)}
    assert same == {"last token"}
    torch.testing.assert_close([plain.drop, plain.full], [wide.drop, wide.full])
    off = "gistnet at points"  # what the width itself is worth: the same gists, read without it
    assert set(wide.carriers) - set(plain.carriers) == {off}
    torch.testing.assert_close(wide.carriers[off], plain.carriers["gistnet"])


def test_a_validation_has_the_figures_of_gists_of_gists_overall_and_per_domain(base):
    gistnet, metrics = net(base), ValidationMetrics(H, WIDTH, level2=True)
    for batch in documents((60, 45, 17)):  # the last one is too short for a span
        metrics.update(base, gistnet, batch)
    got = metrics.compute()
    scores = measure_level(base, {"gistnet": gistnet}, documents(), H, with_controls=False)
    dnll = (scores.carriers["gistnet"] - scores.full).double().mean(dim=1)
    assert got["level2/blocks"] == 3
    assert got["level2/dnll"].item() == pytest.approx(dnll.mean().item())
    assert got["level2/narrative/dnll"].item() == pytest.approx(dnll[2].item())
    assert {"level2/recovery", "level2/kl", "dnll", "diversity"} <= set(got)


def test_the_report_has_the_gists_below_the_better_mean_and_a_verdict_against_each(tmp_path):
    torch.manual_seed(0)
    full, size = torch.rand(40, H), (40, H)
    carriers = {
        "gistnet": full + 0.2,
        "last token": full + 0.8,
        "mean of its gists (raw)": full + 0.7 + 0.01 * torch.rand(size),
        "mean of its gists (rescaled)": full + 0.6 + 0.01 * torch.rand(size),
        "its 32 gists": full + 0.1,
    }
    kl = {name: torch.rand(size) for name in [*carriers, "drop"]}
    level2 = BlockScores(
        full=full,
        drop=full + 1,
        carriers=carriers,
        kl=kl,
        agree={name: torch.ones(size, dtype=torch.bool) for name in kl},
        domain=["code"] * 40,
        document=torch.arange(40) // 2,
        start=torch.arange(40) * 32,
    )
    first = BlockScores(full, full + 1, {"gistnet": full + 0.1}, {}, {}, ["code"] * 40, level2.document, level2.start)
    numbers = summarise(first, level2=level2)
    rows = numbers["level2"]["rows"]
    assert rows["mean of its gists"]["quoted"] == "mean of its gists (rescaled)"
    assert rows["its 32 gists"]["recovery"] == pytest.approx(0.9) and rows["gistnet"]["recovery"] == pytest.approx(0.8)
    against = numbers["level2"]["against"]
    assert against["mean of its gists"]["all"]["verdict"] == "above"
    assert against["its 32 gists"]["all"]["verdict"] == "below"
    report_of(numbers).write(tmp_path / "report", numbers)
    assert json.loads((tmp_path / "report.json").read_text())["level2"]["rows"]["dropped"]["recovery"] == 0
    text = report_of(numbers).markdown()
    assert "level 2: gistnet" in text and "  - its 32 gists" in text
    assert "(* the better of 2 forms of mean of its gists)" in text
