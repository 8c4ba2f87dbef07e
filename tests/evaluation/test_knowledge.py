"""The NLL of each value behind a window: the one cached pass against one plain pass per value."""

import pytest
import torch

from megactx.evaluation.knowledge import ckri, read_values, value_nll
from megactx.lm import BaseLM
from megactx.lm.masks import CAUSAL


@pytest.fixture(scope="module")
def base(base_folder):
    return BaseLM.from_pretrained(str(base_folder), "float32").freeze()


@pytest.mark.parametrize("values", [[[5], [9]], [[5, 6, 7], [9], [8, 4]]])
def test_one_reading_of_the_window_gives_what_a_plain_pass_per_value_gives(base, values):
    window = torch.randint(2, 500, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    found = value_nll(base, window, values)
    for value, nll in zip(values, found, strict=True):
        ids = torch.tensor([[*window, *value]])
        with torch.no_grad():
            told = base.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        plain = -told[torch.arange(len(told)), ids[0, 1:]][-len(value) :].sum()
        torch.testing.assert_close(nll, plain, rtol=1e-4, atol=1e-4)


def test_what_greedy_decoding_says_behind_a_window_with_gaps_is_known(base):
    draw = torch.Generator().manual_seed(0)
    rows = base.embed(torch.randint(2, 500, (1, 20), generator=draw)) + 0.1 * torch.randn(1, 20, 32, generator=draw)
    positions = torch.cat([torch.arange(10), torch.arange(30, 40)])[None]
    said, read, places = [], rows, positions
    with torch.no_grad():
        for _ in range(3):
            said.append(int(base.logits(base(read, places, CAUSAL)[0, -1]).argmax()))
            read = torch.cat([read, base.embed(torch.tensor([said[-1:]]))], dim=1)
            places = torch.cat([places, places[:, -1:] + 1], dim=1)
    wrong = [*said[:2], said[2] + 1]
    nll, greedy = read_values(base, rows, positions, [wrong, said, said[:1]])
    assert greedy.tolist() == [False, True, True] and nll[2] < nll[1] < nll[0]
    with pytest.raises(ValueError, match="a window of 513 tokens is not allowed"):
        read_values(base, rows, positions + 470, [said])


def test_a_window_that_the_base_does_not_take_is_refused(base):
    with pytest.raises(ValueError, match="a window of 513 tokens is not allowed: the base LM takes 512 positions"):
        value_nll(base, [3] * 511, [[1, 2]])


def test_ckri_is_the_relative_loss_of_what_is_dropped():
    assert ckri([1.0, 3.0], [2.0, 8.0]) == pytest.approx(1.5)
