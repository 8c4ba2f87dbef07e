"""Gisting against the keys and values of AvgPool: the residual is 0 for AvgPool and 1 for a constant state."""

import json

import pytest
import torch
from small_base import small

from megactx.evaluation.table import Table
from megactx.gist.carrier import Compressor, KVSlots
from megactx.gist.carriers.avgpool import AvgPool
from megactx.lm.kv_hooks import keys_values
from megactx.studies.pooling_by_attention import main, mean_states, measure, squared_error, train, variants

K = 8


@pytest.fixture(scope="module")
def base():
    base = small()
    for p in base.parameters():
        p.data *= 2.5
    return base


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "ids": torch.randint(3, 97, (2, 64), generator=generator),
            "block_starts": torch.tensor([[8, 40, 24], [48, 8, 16]]),
        }
        for _ in range(10)
    ]


class Constant(Compressor):
    """One state for all blocks."""

    makes_vectors = False

    def __init__(self, means):
        super().__init__(K)
        self.means = means

    def compress(self, base, prefill, starts):
        states = [mean.expand(*starts.shape, -1) for mean in self.means]
        return KVSlots(keys_values(base.model.get_decoder(), states, starts + self.offset))


@torch.no_grad()
def test_avgpool_has_no_residual_and_a_constant_state_has_one(base, batches):
    means = mean_states(base, batches[:4], K)
    found = measure(base, {"avgpool": AvgPool(K), "constant": Constant(means)}, batches[4:6], means)
    torch.testing.assert_close(found["avgpool"], torch.zeros(4, 2))
    torch.testing.assert_close(found["constant"], torch.ones(4, 2))


@torch.no_grad()
def test_the_mean_state_is_that_of_the_blocks_tokens(base, batches):
    batch, states = batches[0], []
    embedded = base.embed(batch["ids"])
    for row, starts in enumerate(batch["block_starts"].tolist()):
        states += [embedded[row, start : start + K] for start in starts]
    torch.testing.assert_close(mean_states(base, [batch], K)[0], torch.cat(states).mean(0))


def test_the_squared_error_is_that_of_every_number():
    generator = torch.Generator().manual_seed(1)
    one, two = (
        KVSlots([tuple(torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2)) for _ in range(3)])
        for _ in range(2)
    )
    found = squared_error(one, two)
    for layer in range(3):
        for part in range(2):
            pairs = zip(one.layers[layer][part].flatten(), two.layers[layer][part].flatten(), strict=True)
            assert found[layer, part].item() == pytest.approx(sum((a - b).item() ** 2 for a, b in pairs), rel=1e-4)


@pytest.mark.slow
def test_every_option_that_makes_keys_is_there_and_a_lora_learns_while_the_base_stays(base, batches):
    torch.manual_seed(0)
    nets = variants(base, K)
    assert set(nets) == {"gisting", "gisting_shift", "gisting_separate", "gistpool"}
    before = {name: value.clone() for name, value in base.state_dict().items()}
    found = train(base, nets, batches[:1] * 12, batches[:1], steps=12, lr=1e-2)
    steps = found.pick(metric="residual").names("span")
    assert steps[0] == 0 and steps[-1] == 12
    for name in nets:
        values = [row["point"] for row in found.pick(metric="residual", carrier=name)]
        if name in ("gisting_separate", "gistpool"):  # the others have a single vector to learn
            assert values[-1] < 0.9 * values[0], name
        layers = [row["point"] for what in ("keys", "values") for row in found.pick(metric=what, carrier=name)]
        assert torch.tensor(layers).mean().item() == pytest.approx(values[-1])
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_the_command_writes_its_tables(base_folder, texts, tmp_path):
    settings = ["--base", str(base_folder), "--path", str(texts), "--only", "gistpool", "--out", str(tmp_path)]
    assert main([*settings, "--steps", "2", "--block-size", "8", "--tokens", "128"]) == 0
    table = Table(json.loads((tmp_path / "pooling_by_attention.json").read_text())["table"])
    assert table.pick(metric="residual").names("span")[-1] == 2
    assert table.pick(carrier="gistpool", metric="keys").names("span") == ["layer 1", "layer 2"]
    assert "gistpool" in (tmp_path / "pooling_by_attention.md").read_text()
    assert (tmp_path / "pooling_by_attention.csv").read_text().startswith("run,carrier,span,domain,metric")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps=0"),
        (["--lr", "0"], "--lr=0.0"),
        (["--only", "gistnet"], "it makes vectors"),
        (["--only", "gist"], "there is gisting, "),
        (["--base", "no/such/base"], "no/such/base"),
    ],
)
def test_mistakes_are_told_in_one_message(arguments, named, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1
