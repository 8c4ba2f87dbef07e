"""Blocks that share rare tokens with the end of a text are read: in sessions that earn, of text that goes on."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from megactx.data.user_turns import UserTurns
from megactx.memory import MegaContextTree
from megactx.runtime import Controller, Session, Settings, Wanted
from megactx.runtime.rare_tokens import ASKS, NOTHING, places, shares
from megactx.runtime.repeats import Repeats
from megactx.runtime.trial import BEFORE, TRIED, Trial

K, BUDGET = 4, 96
SMALL = dict(budget=BUDGET, limit=256, allocator={"protected": 8}, megacontext="recency", earn=True)


def slowly(blocks, asked):
    """BM25, token by token."""
    counts, n = [Counter(block) for block in blocks], len(blocks)

    def rarity(having):
        return math.log(1 + (n - having + 0.5) / (having + 0.5))

    out = []
    for own in counts:
        each = [
            rarity(sum(token in other for other in counts)) * own[token] * 2.5 / (own[token] + 1.5)
            for token in {*asked} - {NOTHING}
            if token in own
        ]
        out.append(sum(each) / rarity(1))
    return out


@pytest.mark.parametrize("seed", range(12))
def test_what_blocks_share_is_their_bm25_in_tokens_that_one_block_alone_has(seed):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(-1, 3 + 20 * seed, (1 + 3 * seed, 8), generator=generator, dtype=torch.int32)
    asked = torch.randint(-1, 9 + 30 * seed, (ASKS,), generator=generator)  # some are larger than any that is there
    expected = slowly(blocks.tolist(), asked.tolist())
    torch.testing.assert_close(shares(blocks, asked), torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_places_share_enough_and_the_second_must_share_more():
    blocks = torch.arange(100, 100 + 50 * 8).view(50, 8)
    for count in (0, 3, 4, 6, 8):
        asked = torch.cat([blocks[7, :count], blocks[30, :5], torch.arange(10)])
        assert places(blocks, asked) == [30 if count < 5 else 7]
    assert places(blocks, torch.cat([blocks[7, :6], blocks[30, :7]])) == [30, 7]
    assert (
        places(blocks, blocks[7, :2]) == places(blocks[:0], blocks[7]) == places(blocks, torch.tensor([NOTHING])) == []
    )


@pytest.fixture
def sharing(ids):
    """A text whose end has three tokens of the block at 400, in another order, which stand nowhere else."""
    text = ids(1200)
    text[text == 500] = 499
    text[(text > 479) & (text < 483)] = 479
    text[400:404] = torch.tensor([480, 481, 482, 500])
    text[-9], text[-5], text[-1] = 482, 480, 481
    return text


@pytest.fixture(autouse=True)
def every_place_pays(monkeypatch):
    monkeypatch.setattr("megactx.runtime.trial.PAYS", -math.inf)


def raw(stream):
    stream.logits()
    return {*stream.shown.index[0][stream.shown.lod[0] == 0].tolist()}


def test_a_block_that_shares_rare_tokens_with_the_end_is_read_with_those_beside_it(models, sharing):
    stream = Controller(replace(models, lensnet=None), Settings(**SMALL)).stream()
    stream.append(sharing[None])
    assert stream.questions().repeated == [[100, 101, 99]]
    assert {*range(396, 408)} <= raw(stream) and stream.earned.tolist() == [3 * K]
    sharing[402] = 483  # two tokens are too few
    stream = Controller(replace(models, lensnet=None), Settings(**SMALL)).stream()
    stream.append(sharing[None])
    assert stream.questions().repeated == [[]] and not {*range(396, 408)} & raw(stream)


def test_what_a_user_asks_is_looked_for_by_keys_and_not_by_its_tokens(models, sharing, monkeypatch):
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4)))
    sharing[1100:1102], sharing[1102:1104] = torch.tensor([1, 2]), torch.tensor([3, 4])
    stream = Controller(replace(models, lensnet=None), Settings(**SMALL)).stream()
    stream.append(sharing[None])
    assert stream.questions().repeated == [[]]


def nll(models, ids):
    logits = models.base.model(ids.long()[None]).logits[0, -TRIED - 1 : -1].log_softmax(-1)
    return -logits.gather(1, ids[-TRIED:, None].long()).mean().item()


@torch.no_grad()
@pytest.mark.parametrize("budget", [96, 400])
def test_a_place_is_read_if_it_makes_what_came_last_likelier(models, sharing, budget, monkeypatch):
    """As the base itself says of the same ids. In a small window there are fewer tokens before these."""
    newest = sharing[-min(budget - 4 * K, BEFORE + TRIED) :]
    alone, place = (torch.cat([sharing[:K], old, newest]) for old in (sharing[:0], sharing[396:408]))
    gain = nll(models, alone) - nll(models, place)
    assert abs(gain) > 1e-4
    for least, read in ((gain - 1e-5, [[100, 101, 99]]), (gain + 1e-5, [[]])):
        monkeypatch.setattr("megactx.runtime.trial.PAYS", least)
        settings = Settings(**SMALL | {"budget": budget, "limit": 512})
        stream = Controller(replace(models, lensnet=None), settings).stream()
        stream.append(sharing[None])
        assert stream.questions().repeated == read


@torch.no_grad()
def test_each_place_is_tried_by_itself(models, sharing):
    sink, newest, places = sharing[:K], sharing[-300:], sharing[400:480].split(8)
    own = [nll(models, torch.cat([sink, place, newest[-BEFORE - TRIED :]])) for place in places]
    gains = [nll(models, torch.cat([sink, newest[-BEFORE - TRIED :]])) - value for value in own]
    trial, middle = Trial(models.base), sorted(gains)[4:6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megactx.runtime.trial.PAYS", sum(middle) / 2)
        assert trial.paying(sink, places, newest) == [gain > sum(middle) / 2 for gain in gains]


@pytest.mark.parametrize("looked", [400, 403, 799])
def test_only_known_whole_blocks_before_the_newest_tokens_are_places(models, sharing, looked, monkeypatch):
    tree = MegaContextTree.from_tokens(sharing[None], models.gistnet, models.base)
    assert Repeats(tree).sharing(0, 92) == [[100, 101, 99]]
    assert Repeats(tree).sharing(0, 1200 - 404) == [[100, 101, 99]]
    assert Repeats(tree).sharing(0, 1200 - 403) == Repeats(tree).sharing(0, 5000) == []
    monkeypatch.setattr("megactx.runtime.repeats.LOOKED", looked)
    assert Repeats(tree).sharing(0, 92) == []
    monkeypatch.setattr("megactx.runtime.repeats.LOOKED", 800)
    assert Repeats(tree).sharing(0, 92) == [[100, 101, 99]]


def test_of_a_text_behind_a_part_its_own_blocks_are_read(models, ids, sharing, tmp_path):
    MegaContextTree.from_tokens(ids(1, 300, seed=9), models.gistnet, models.base).save(tmp_path / "library")
    made = Controller(replace(models, lensnet=None), Settings(**SMALL | {"budget": 200}))
    with Session(made, parts=[Wanted("library", tmp_path / "library", 0.3)]) as session:
        session.append(sharing)
        stream = session.stream
        own = torch.tensor([*range(396, 408)]) + stream.seen.sink
        assert {*own.tolist()} <= raw(stream)


def test_a_session_goes_on_with_the_same_next_token(models, sharing, tmp_path):
    made = Controller(replace(models, lensnet=None), Settings(**SMALL))
    with Session(made) as here:
        here.append(sharing)
        expected, shown = here.stream.logits(), here.stream.shown.index
        here.save(tmp_path / "talk")
    with Session.load(tmp_path / "talk", made) as there:
        torch.testing.assert_close(there.stream.logits(), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(there.stream.shown.index, shown)
