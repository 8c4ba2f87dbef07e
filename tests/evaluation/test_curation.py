"""What collapsing a block costs: as a plain loop finds it, kept with the tree, and gone on with after a stop."""

import pytest
import torch

from megactx.evaluation import curation as evaluation
from megactx.gist import GistNet
from megactx.lm import BaseLM
from megactx.lm.masks import CAUSAL
from megactx.memory import MegaContextTree
from megactx.memory.curation import Curated

K = 4


@pytest.fixture(scope="module")
def models(base_folder):
    base = BaseLM.from_pretrained(str(base_folder), "float32").freeze()
    torch.manual_seed(0)
    return base, GistNet(base.width, base.embedding_rms(), block_size=K, num_heads=4).eval().requires_grad_(False)


@pytest.fixture
def folder(models, tmp_path):
    base, gistnet = models
    tokens = torch.randint(2, 512, (1, 600), generator=torch.Generator().manual_seed(1))
    MegaContextTree.from_tokens(tokens, gistnet, base).save(tmp_path / "tree")
    return tmp_path / "tree"


def plain(tree, base, gistnet, number):
    """The same by two whole passes."""
    before, tokens = evaluation.BEFORE * K, tree.levels[0].whole("token")[0].long()
    text = torch.cat([tokens[:1], tokens[number * K - before + 1 : (number + 1 + evaluation.FOLLOWING) * K]])
    gist = tree.levels[1].whole("gist")[0, number]

    def nll(vectors, positions, targets, rows):
        hidden = base(vectors[None], torch.tensor(positions)[None], CAUSAL)
        logits = base.logits(hidden[0, rows]).float()
        return torch.nn.functional.cross_entropy(logits, targets).item()

    everything = base.embed(text[None])[0]
    places = [*range(len(text))]
    own = nll(everything, places, text[before : before + K], slice(before - 1, before + K - 1))
    full = nll(everything, places, text[before + K :], slice(before + K - 1, len(text) - 1))
    short = torch.cat([everything[:before], gist[None], everything[before + K :]])
    at = [*places[:before], before + gistnet.offset_in(K), *places[before + K :]]
    return nll(short, at, text[before + K :], slice(before, before + K)) - full, own


@torch.no_grad()
def test_a_measured_block_costs_what_two_plain_passes_say(models, folder):
    tree = Curated(folder)
    numbers = evaluation.sample(tree, 5, seed=0)
    evaluation.measure(tree, *models, numbers)
    again = Curated(folder)
    assert set((~again.dnll.isnan()).nonzero()[:, 0].tolist()) == set(numbers.tolist())
    for number in numbers.tolist():
        dnll, own = plain(again, *models, number)
        assert float(again.dnll[number]) == pytest.approx(dnll, abs=1e-4)
        assert float(again.nll[number]) == pytest.approx(own, abs=1e-4)


def test_a_sample_goes_on_where_it_was_stopped_and_a_larger_one_holds_it(models, folder, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 4)
    wanted = evaluation.sample(Curated(folder), 12, seed=3)

    def stopped(batches):
        yield next(iter(batches))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.measure(Curated(folder), *models, wanted, stopped)
    left = evaluation.sample(Curated(folder), 12, seed=3)
    assert torch.equal(left, wanted[4:])
    evaluation.measure(Curated(folder), *models, left)
    assert len(evaluation.sample(Curated(folder), 12, seed=3)) == 0
    assert len(evaluation.sample(Curated(folder), 20, seed=3)) == 8
    assert not torch.equal(evaluation.sample(Curated(folder), 12, seed=4).sort().values, wanted.sort().values)


def test_blocks_whose_neighbours_were_taken_away_are_not_measured(models, folder, monkeypatch):
    from megactx.memory import archive

    monkeypatch.setattr(archive, "RECENT", 0)
    tree = Curated(folder)
    tree.apply(
        {
            "format": 1,
            "tokens": 600,
            "actions": [{"start": 200, "stop": 400, "action": "compact", "floor": 1, "reason": "test", "bytes": 0}],
        }
    )
    chosen = evaluation.sample(Curated(folder), 1000, seed=0)
    first = evaluation.BEFORE
    allowed = [*range(first, 49), *range(100 + first, 149)]
    assert sorted(chosen.tolist()) == allowed
