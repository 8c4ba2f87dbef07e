"""What a question quotes word for word is read where it stands, and keys are not asked for it."""

from dataclasses import replace

import pytest
import torch

from megactx.data.user_turns import UserTurns
from megactx.focus.keys import KeyNet
from megactx.memory import MegaContextTree
from megactx.runtime import Controller, Settings
from megactx.runtime.quotes import LEAST, PLACES, WHOLE, Quote, longest_quote
from megactx.runtime.rare_tokens import NOTHING
from megactx.runtime.repeats import Repeats

K = 4
SMALL = dict(budget=240, limit=512, allocator={"protected": 8}, megacontext="recency", earn=True, keys=6)
ASKS, ENDS = torch.tensor([1, 2]), torch.tensor([3, 4])
NAME = torch.arange(300, 300 + 2 * LEAST)


def slowly(text, asked):
    """Every run of a question, the longest first, token by token."""
    stands = {}
    for length in range(len(asked), LEAST - 1, -1):
        for first in range(len(asked) - length + 1):
            run = asked[first : first + length]
            found = [at for at in range(len(text) - length + 1) if text[at : at + length] == run]
            parts = [run[at : at + LEAST] for at in range(length - LEAST + 1)]
            few = any(
                0 < sum(text[at : at + LEAST] == part for at in range(len(text) - LEAST + 1)) <= PLACES
                for part in parts
            )
            if few:
                stands.setdefault(length, set()).update(found)
    longest = max((length for length, starts in stands.items() if starts), default=0)
    return Quote(longest, sorted(stands[longest])) if 0 < longest <= WHOLE * len(asked) else None


@pytest.mark.parametrize("seed", range(60))
def test_the_longest_quote_is_found_at_all_its_places(seed):
    draw = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 2 + seed % 3, (150,), generator=draw)
    asked = torch.randint(0, 2 + seed % 3, (30,), generator=draw)
    begin = int(torch.randint(0, 18, (1,), generator=draw))
    for at in ((40,), (40, 90), (40, 60, 90))[seed % 3]:
        text[at : at + 12] = asked[begin : begin + 12]
    if seed % 4 == 0:
        text[torch.arange(150) % 17 == 0] = NOTHING
    assert longest_quote(text, asked) == slowly(text.tolist(), asked.tolist())


def test_what_says_nothing_is_no_quote():
    name, other = torch.arange(LEAST), torch.full((3 * LEAST,), 99)
    asked, between = torch.cat([name, other]), torch.full((5,), 77)
    once = torch.cat([between, name, between])
    assert longest_quote(once, asked) == Quote(LEAST, [5])
    assert longest_quote(torch.cat([once, once]), asked) == Quote(LEAST, [5, 5 + len(once)])
    assert longest_quote(torch.cat([once] * (PLACES + 1)), asked) is None  # a common phrase
    assert longest_quote(torch.cat([between, name[1:], between]), asked) is None  # short
    assert longest_quote(torch.cat([between, asked, between]), asked) is None  # asked before
    assert longest_quote(torch.cat([between, asked, once]), asked) is None
    for few in (between, between[:0]):
        assert longest_quote(few, asked) is None and longest_quote(once, few) is None


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4)))


def told(ids, *places, tokens=1200):
    """A text in which a name stands at some places."""
    text = ids(tokens)
    text[text >= 300] -= 250
    for at in places:
        text[at : at + len(NAME)] = NAME
    return text


def question(ids):
    """Three quarters of it the name."""
    return torch.cat([ASKS, ids(3, seed=8) % 200 + 5, NAME, ids(2, seed=9) % 200 + 5, ENDS])


def with_keys(models):
    net = KeyNet(models.base.model.get_input_embeddings().weight, 32).eval().requires_grad_(False)
    return replace(models, keys=net)


def old(stream, end):
    """Tokens that are read raw, behind the sink and before ``end``."""
    shown = stream.shown
    raw = shown.index[0][shown.lod[0] == 0].tolist()
    return [at for at in raw if K <= at < end]


@pytest.mark.parametrize("keys", [False, True])
def test_a_quote_and_what_stands_behind_it_are_read_and_nothing_else(models, ids, turns, keys):
    asks = {} if keys else {"keys": 0}
    if keys:
        models = with_keys(models)
    newest = {"newest": 0} if keys else {}
    stream = Controller(replace(models, lensnet=None), Settings(**(SMALL | asks | newest))).stream()
    text = told(ids, 402)
    stream.append(torch.cat([text, question(ids)])[None])
    stream.logits()
    # One token before it, it, as much behind it, and one more; in whole blocks.
    place = [*range(400, 436)]
    if keys:
        assert old(stream, 1200) == place and not len(stream.questions().ids)
    else:
        assert old(stream, 1200)[: len(place)] == place and old(stream, 1200)[len(place)] > 900


def test_a_quote_at_two_places_is_read_at_both_and_the_newest_comes_first(models, ids, turns):
    tree = MegaContextTree.from_tokens(told(ids, 402, 802)[None], models.gistnet, models.base)
    assert Repeats(tree).quoted(0, [7, *NAME.tolist(), 7, 7, 7], 0) == [*range(200, 209), *range(100, 109)]
    assert Repeats(tree).quoted(0, [7, *NAME.tolist(), 7, 7, 7], 790) == [*range(100, 103)]  # the text ends in it


def test_a_quote_right_before_the_question_is_read_as_far_as_it_goes(models, ids, turns):
    stream = Controller(replace(with_keys(models), lensnet=None), Settings(**SMALL, newest=0)).stream()
    text = told(ids, 1181, tokens=1201)
    stream.append(torch.cat([text, question(ids)])[None])
    stream.logits()
    assert old(stream, 1201) == [*range(1180, 1201)]


def test_a_question_that_was_asked_before_asks_its_keys(models, ids, turns):
    stream = Controller(replace(models, lensnet=None), Settings(**(SMALL | {"keys": 0}))).stream()
    stream.append(torch.cat([told(ids)[:600], question(ids), told(ids)[600:], question(ids)])[None])
    stream.logits()
    questions = stream.questions()
    assert questions.repeated == [[]] and len(questions.ids) == 1


def test_rows_quote_what_they_quote(models, ids, turns):
    stream = Controller(replace(models, lensnet=None), Settings(**(SMALL | {"keys": 0}))).stream(2)
    first, second = torch.cat([told(ids, 402), question(ids)]), torch.cat([told(ids), question(ids)])
    stream.append(torch.stack([first, second]))
    questions = stream.questions()
    assert [len(own) for own in questions.repeated] == [9, 0] and questions.row.tolist() == [1]
