"""What focus is worth: rules find what they look for, and the numbers say who was better."""

import math

import pytest
import torch

from megactx.evaluation.focus import FULL, GISTS, LENS, ORACLE, RANDOM, RECENCY, SURPRISE, FocusScores
from megactx.evaluation.focus_report import focus_report, summarise_focus
from megactx.evaluation.planted import NEEDED, PlantedScores, in_detail, summarise_planted
from megactx.evaluation.policies.bm25 import Bm25, bm25
from megactx.lm import BaseLM
from megactx.memory import MegaContextTree, WorkingContext


class Words:
    """A tokenizer of which every id is a word."""

    def decode(self, ids):
        return " ".join(f"word{i}" for i in ids)


def test_bm25_finds_the_block_that_has_the_rare_words_of_the_newest_tokens():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 5000, (40 * 8,), generator=generator)
    ids[7 * 8 : 7 * 8 + 3] = torch.tensor([91, 92, 93])
    ids[-3:] = torch.tensor([91, 92, 93])
    found = bm25(Words(), ids, 40, 8)
    assert found[:24].argmax() == 7, "of the blocks before the question"
    assert found.shape == (40,)


def test_bm25_of_no_blocks_is_empty():
    tokenizer = BaseLM.from_pretrained("asset:tiny-base").tokenizer
    assert bm25(tokenizer, torch.arange(20), 0, 32).shape == (0,)


def test_bm25_finds_a_block_by_a_single_digit():
    class Digits:
        def decode(self, ids):
            return " ".join("7" if i == 7 else "word" for i in ids)

    ids = torch.zeros(320, dtype=torch.long)
    ids[[43, 319]] = 7  # in block 5, and asked for behind the last block
    found = bm25(Digits(), ids, 39, 8)
    assert found.argmax() == 5


def test_bm25_of_blocks_without_words_is_zero():
    class Silent(Words):
        def decode(self, ids):
            return "  "

    assert (bm25(Silent(), torch.arange(64), 8, 8) == 0).all()


def test_a_block_is_in_detail_where_all_of_its_tokens_stand_raw():
    class Mean:
        block_size, width = 4, 2

        def encode_block(self, children):
            return children.mean(1)

        def offset_in(self, tokens):
            return tokens - 1

    table = torch.nn.Embedding(9, 2).requires_grad_(False)
    context = WorkingContext.recency(MegaContextTree.from_tokens(torch.randint(9, (1, 400)), Mean(), table), 330)
    first = next(int(i) for i, lod in zip(context.index[0], context.lod[0], strict=True) if lod == 1)
    assert in_detail(context, [0]) and not in_detail(context, [first]) and not in_detail(context, [0, first])


def scores(lens: float, documents: int = 40, free: int = 9) -> FocusScores:
    generator = torch.Generator().manual_seed(0)
    full = 2 + torch.rand(documents, generator=generator)
    worse = {FULL: 0.0, GISTS: 1.0, RECENCY: 0.8, RANDOM: 0.7, SURPRISE: 0.6, Bm25.title: 0.3, LENS: lens}
    noise = {name: 0.05 * torch.randn(documents, generator=generator) * (extra > 0) for name, extra in worse.items()}
    nll = {name: (full + extra + noise[name]).tolist() for name, extra in worse.items()}
    nll[ORACLE] = (full[:5] + 0.1).tolist()
    out = FocusScores(list(range(documents)), ["code"] * documents)
    out.nll["0.25"], out.free["0.25"] = nll, [free] * documents
    out.telemetry["0.25"] = {"swap_rate": [0.1, 0.2], "residency": [math.nan, 4.0]}
    out.estimated, out.measured = [torch.arange(5.0)], [torch.tensor([0.0, 1.0, 2.0, 4.0, 3.0])]
    return out


def test_a_lensnet_that_is_better_on_every_document_is_said_to_be_and_its_regret_is_stated():
    numbers = summarise_focus(scores(lens=0.4), 32)
    budget = numbers["budgets"]["0.25"]
    assert budget["verdict"] == "LensNet is better than recency, random and most surprising"
    assert budget["rows"][Bm25.title]["lens_less"]["low"] > 0, "BM25 was better, and the table hides it"
    assert budget["rows"][LENS]["of_gap"] == pytest.approx(0.6, abs=0.05)
    assert budget["regret"]["point"] == pytest.approx(0.3, abs=0.06) and budget["rows"][ORACLE]["documents"] == 5
    assert budget["telemetry"] == {"swap_rate": pytest.approx(0.15), "residency": 4.0}
    assert numbers["rank_correlation"] == pytest.approx(0.9)


def test_a_lensnet_that_is_no_better_is_not_said_to_be_and_few_choices_are_not_claimed():
    numbers = summarise_focus(scores(lens=0.7), 32)
    assert "not shown to be better than random blocks, most surprising" in numbers["budgets"]["0.25"]["verdict"]
    numbers = summarise_focus(scores(lens=0.4, free=3), 32)
    assert numbers["budgets"]["0.25"]["verdict"] == "Not claimed"
    assert any("fewer than 4 blocks" in note for note in numbers["notes"])


def test_only_cases_that_the_base_can_use_count_as_planted_facts(tmp_path, capsys):
    planted = PlantedScores(kind=["copy", "copy", "passage"])
    planted.nll = {GISTS: [4.0, 4.0, 4.0], NEEDED: [1.0, 3.9, 2.0], LENS: [1.5, 4.0, 4.0]}
    planted.found = {GISTS: [False] * 3, NEEDED: [True] * 3, LENS: [True, True, False]}
    found = summarise_planted(planted)
    assert {kind: (part["cases"], part["usable"]) for kind, part in found["kinds"].items()} == {
        "overall": (3, 2),
        "copy": (2, 1),
        "passage": (1, 1),
    }
    assert found["kinds"]["overall"]["rows"][LENS]["found"] == 0.5
    assert found["kinds"]["copy"]["rows"][LENS]["found"] == 1.0
    numbers = summarise_focus(scores(lens=0.4), 32) | {"planted": found | {"budget": 0.25, "tokens": 2048}}
    report = focus_report(numbers)
    report.show()
    report.write(tmp_path / "report", numbers)
    text = (tmp_path / "report.md").read_text()
    assert "copy (1 of 2)" in text and "the base can use 2 cases, fewer than 200" in text
    assert "LensNet is better than" in capsys.readouterr().out and (tmp_path / "report.png").exists()
