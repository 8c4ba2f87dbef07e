"""Every file of losses through every check; a new one is tested as it is."""

import pytest
import torch

from megactx.framework.config.search_path import compose
from megactx.gist import GistNet, losses
from megactx.gist.loss import Context, build_losses
from megactx.gist.parts import names
from megactx.lm.prefill import prefill

K, LENGTH = 8, 240
SIZES = {"contrastive": {"margin": 2.0}}  # gists of random nets are far apart
SIZES |= {"history": {"segment": 16, "recency": 16}, "recall": {"recency": 16}, "reconstruction": {"spans": 2}}
BATCH = {
    "block_starts": [[16, 40, 80], [24, 56, 96]],
    "span_starts": [[64], [128]],
    "segments": [[160], [128]],
    "copied_blocks": [[48], [64]],
    "lengths": [LENGTH, LENGTH],
    "contexts": [[2, *range(3, 27)], [2, *range(40, 64)]],  # a token that begins, and three blocks
    "context_starts": [[1, 9, 17]] * 2,
    "questions": [[70, 71, 72, 30, 0], [70, 71, 73, 74, 50]],
    "answers": [[3, -1], [3, 4]],
}


@pytest.fixture
def base(make_base, words):
    made = make_base()
    made.tokenizer = words
    return made


def made(base, name: str, count: int = 2):
    """-> the loss, and its value and numbers for some nets on one batch."""
    nets = {}
    for index in range(count):
        torch.manual_seed(index)
        net = GistNet(base.width, base.embedding_rms(), block_size=K, num_heads=4)
        for p in net.parameters():  # a fresh correction is 0
            p.data += 0.02 * torch.randn_like(p)
        nets[f"net {index}"] = net
    ids = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    batch = {key: torch.tensor(value) for key, value in BATCH.items()}
    (loss,) = build_losses({name: {"weight": 1.0} | SIZES.get(name, {})}, nets)
    assert {*loss.needs} <= batch.keys(), f"{name} needs {loss.needs}: say here what they are in this test"
    return loss, nets, *loss(Context(base, nets, prefill(base, ids), batch, K))


@pytest.mark.parametrize("name", names(losses))
def test_a_loss_is_a_number_per_net_that_it_trains_whose_gradient_reaches_that_net_alone(name, base):
    before = {key: value.clone() for key, value in base.state_dict().items()}
    loss, nets, values, numbers = made(base, name)
    assert values.shape in ((2,), (1,)) and values.isfinite().all() and loss.name == name
    for index, (other, net) in enumerate(nets.items()):
        net.zero_grad()
        if index < len(values):
            values[index].backward(retain_graph=True)
            assert sum(p.grad.abs().sum() for p in net.parameters() if p.grad is not None) > 0, other
        for own in nets.values():
            assert own is net or all(p.grad is None or not p.grad.any() for p in own.parameters())
            own.zero_grad()
    assert numbers and not any(getattr(value, "requires_grad", False) for value in numbers.values())
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())
    assert not any(p.grad is not None for p in base.parameters())


@pytest.mark.parametrize("name", names(losses))
def test_what_a_loss_says_of_a_net_does_not_depend_on_who_learns_beside_it(name, base):
    _, _, both, _ = made(base, name)
    _, _, alone, _ = made(base, name, count=1)
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", names(losses))
def test_a_weight_of_0_leaves_a_loss_out_and_a_negative_one_is_refused(name, base):
    nets = {"gistnet": GistNet(base.width, base.embedding_rms(), block_size=K, num_heads=4)}
    with pytest.raises(ValueError, match="all weights are 0"):
        build_losses({name: {"weight": 0.0}}, nets)
    beside = {"block": {"weight": 1.0}} | {name: {"weight": 0.0}} if name != "block" else {"recall": {"weight": 1.0}}
    assert all(loss.weight == (loss.name != name) for loss in build_losses(beside, nets))
    with pytest.raises(ValueError, match=f"loss.{name}.weight=-1|{name}.weight=-1"):
        build_losses({name: {"weight": -1.0}}, nets)


@pytest.mark.parametrize("name", names(losses))
def test_a_loss_is_an_option_of_the_group_and_can_stand_beside_those_that_are_there(name):
    assert name in compose(["experiment=demo", f"loss=[{name}]"]).loss
    assert "weight" in compose(["experiment=demo"]).loss.block
