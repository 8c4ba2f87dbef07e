"""What one vector can hold: found by fitting, checked by decoding."""

import pytest
import torch

from megactx.evaluation.capacity import capacity
from megactx.lm import BaseLM
from megactx.lm.masks import CAUSAL

VOCAB, BEGIN = 23, 1


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config = {"model_type": "llama", "vocab_size": VOCAB, "max_position_embeddings": 64, **sizes}
    base = BaseLM.from_config(config | {"num_key_value_heads": 2}).freeze()
    for p in base.parameters():  # random weights as they come hardly depend on what they read
        p.mul_(2)
    return base


@pytest.fixture(scope="module")
def passages():
    return torch.randint(0, VOCAB, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def found(base, passages):
    return capacity(base, passages, BEGIN, block=8, patience=60)


def test_a_vector_gives_back_by_greedy_decoding_exactly_the_tokens_that_it_is_said_to_hold(base, passages, found):
    assert found.exact.max() > 1
    for vector, ids, length in zip(found.vectors, passages, found.exact.tolist(), strict=True):
        rows, said = torch.cat([base.embed(torch.tensor([[BEGIN]])), vector[None, None]], dim=1), []
        for _ in range(length):
            hidden = base(rows, torch.arange(rows.shape[1])[None], CAUSAL)
            said.append(int(base.logits(hidden[0, -1]).argmax()))
            rows = torch.cat([rows, base.embed(torch.tensor([[said[-1]]]))], dim=1)
        assert said == ids[:length].tolist()


def test_passages_do_not_depend_on_each_other(base, passages, found):
    torch.manual_seed(5)
    alone = capacity(base, passages[:1], BEGIN, block=8, patience=60)
    assert alone.exact[0] == found.exact[0]


def test_the_share_of_a_block_is_more_than_chance_and_the_base_is_left_alone(base, found):
    assert found.block.shape == (3,) and found.block.mean() > 3 / VOCAB
    assert all(p.grad is None for p in base.parameters())


def test_a_passage_that_is_known_whole_ends_it(base, passages):
    assert capacity(base, passages[:, :1], BEGIN, block=1, patience=200).exact.tolist() == [1, 1, 1]


def test_passages_shorter_than_a_block_are_refused(base, passages):
    with pytest.raises(ValueError, match="passages have 12 tokens, allowed is block=32"):
        capacity(base, passages, BEGIN)
