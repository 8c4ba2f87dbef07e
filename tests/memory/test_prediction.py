"""What foretells the next gist: its examples, its loss and its ranks."""

import pytest
import torch
import torch.nn.functional as F
from small_base import WIDTH, small

from megactx.gist import GistNet
from megactx.memory import MegaContextTree
from megactx.memory.prediction import Example, Readout, example_of, info_nce, ranks

K = 4


@pytest.fixture(scope="module")
def parts():
    base = small()
    torch.manual_seed(1)
    return base, GistNet(WIDTH, base.embedding_rms(), block_size=K, num_heads=4).eval()


def example(nodes: int, seed: int, second: int = 0) -> Example:
    generator = torch.Generator().manual_seed(seed)
    return Example(tuple(tuple(torch.randn(2, n, 16, generator=generator)) for n in (nodes, second)))


def test_an_example_has_the_state_at_the_end_of_each_node_and_the_gist_of_it(parts):
    base, net = parts
    ids = torch.randint(97, (2 * K**2 + K + 3,), generator=torch.Generator().manual_seed(0))
    found = example_of(base, net, ids, levels=2)
    hidden, tree = base(base.embed(ids[None]), None)[0], MegaContextTree.from_tokens(ids[None], net, base)
    for lod, count in ((1, 2 * K + 1), (2, 2)):
        states, gists = found.of(lod)
        assert len(states) == len(gists) == count, "a tail that is no whole node has no part in it"
        assert torch.equal(gists, tree.gists(lod)[0])
        for node in range(count):
            assert torch.allclose(states[node], hidden[(node + 1) * K**lod - 1], atol=1e-5)


def test_the_loss_is_that_of_a_loop_over_all_gists_of_all_texts():
    torch.manual_seed(0)
    readout, examples = Readout(16, "mlp"), [example(3, 1), example(1, 2), example(5, 3)]
    everything = [gist for one in (examples[0], examples[2]) for gist in one.of(1)[1]]
    losses = [[], []]
    for one in (examples[0], examples[2]):  # a text of one block has no next one, and is no candidate
        states, gists = one.of(1)
        for at in range(len(gists) - 1):
            for kind, predicted in enumerate((readout(states[at]), readout.from_newest(gists[at]))):
                like = [readout.scale[0, kind].exp() * F.cosine_similarity(predicted, g, dim=0) for g in everything]
                true = next(n for n, g in enumerate(everything) if torch.equal(g, gists[at + 1]))
                losses[kind].append(F.cross_entropy(torch.stack(like)[None], torch.tensor([true])))
    slow = torch.stack([torch.stack(own).mean() for own in losses])
    assert torch.allclose(info_nce(readout, examples), slow, rtol=1e-5)


def test_texts_without_a_second_node_of_a_level_cost_nothing_there_and_give_a_gradient_of_nothing():
    readout = Readout(16, levels=2)
    loss = info_nce(readout, [example(3, 1, 1), example(2, 2)], lod=2)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and not readout.scale.grad.any()


def test_the_readout_and_its_control_do_not_share_a_weight_and_the_control_does_not_see_states():
    torch.manual_seed(0)
    readout, one = Readout(16), example(4, 1)
    other = Example(((one.of(1)[0].roll(1, 0), one.of(1)[1]), one.levels[1]))
    (mine, control), (moved, same) = readout.both(one), readout.both(other)
    assert torch.equal(control, same) and not torch.allclose(mine, moved)
    assert torch.allclose(mine.norm(dim=-1), torch.ones(3))
    assert torch.allclose(readout(one.of(1)[0] * 7), readout(one.of(1)[0]), atol=1e-5), (
        "the length of a state says nothing"
    )


def test_a_rank_counts_the_candidates_that_are_as_near_and_ties_count_against_it():
    gists = torch.eye(4)[:3]
    others = torch.eye(4)[3:]
    predicted = torch.tensor([[0.0, 1.0, 0.0, 0.5], [0.9, 0.5, 0.4, 0.0]])
    assert ranks(predicted, gists, others).tolist() == [1, 3]
    assert ranks(torch.ones(2, 4), gists, others).tolist() == [4, 4], "what says nothing is last, not first"
    assert ranks(predicted * 9, gists * 3, others / 5).tolist() == [1, 3], "only directions count"


def test_a_head_or_level_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="prediction.levels=3"):
        Readout(16, levels=3)
    with pytest.raises(ValueError, match="prediction.head=deep"):
        Readout(16, "deep")
