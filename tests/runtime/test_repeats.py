"""What stood where the end of a text stood before is read: in sessions that earn, of text that goes on."""

from dataclasses import replace

import pytest
import torch

from megactx.data.user_turns import UserTurns
from megactx.memory import MegaContextTree, storage
from megactx.runtime import Controller, Settings
from megactx.runtime.repeats import LEAST, LONGEST, Repeats, longest_end

K, BUDGET = 4, 96
SMALL = dict(budget=BUDGET, limit=256, allocator={"protected": 8}, megacontext="recency", earn=True)


def slowly(text, newest):
    """The longest end, and the newest place behind it, token by token."""
    best = (0, 0)
    for place in range(1, len(text)):
        count = 0
        while count < min(LONGEST, len(newest), place) and text[place - 1 - count] == newest[-1 - count]:
            count += 1
        if count and count >= best[0]:
            best = (count, place)
    return best


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_end_is_found_at_its_newest_place(seed):
    draw = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 3 + seed % 4, (200,), generator=draw)
    newest = torch.cat([text, torch.randint(0, 3, (seed % 3,), generator=draw)])[-LONGEST:]
    assert longest_end(text, newest) == slowly(text.tolist(), newest.tolist())


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_text_that_has_hardly_begun_repeats_nothing(size):
    assert longest_end(torch.arange(size), torch.arange(size)) == (0, 0)


@pytest.fixture
def stream(models):
    return Controller(replace(models, lensnet=None), Settings(**SMALL)).stream()


def read(stream):
    """Tokens that are read raw."""
    stream.logits()
    return {*stream.shown.index[0][stream.shown.lod[0] == 0].tolist()}


def repeating(ids, length=LEAST, tokens=1201):
    """A text whose end stood at 400 before; some of it waits for its block."""
    text = ids(tokens)
    text[-length:] = text[400 - length : 400]
    if length < LONGEST:
        text[-length - 1] = (text[400 - length - 1] + 1) % 500 + 2
    return text


@pytest.mark.parametrize("length", [LEAST - 1, LEAST, 12, LONGEST])
def test_what_came_behind_the_end_of_a_text_before_is_read_again(stream, ids, length):
    text = repeating(ids, length)
    stream.append(text[None])
    found = {*range(400 // K * K, 400 // K * K + K)} <= read(stream)
    assert found == (length >= LEAST)
    if found:
        assert {*range(400 - K, 404)} <= read(stream) and stream.earned.tolist() == [2 * K]


def test_what_is_read_anyway_is_not_opened_and_no_place_is_lost(stream, ids):
    text = ids(1200)
    text[-LEAST:] = text[-20 : -20 + LEAST]
    stream.append(text[None])
    assert {*range(1200 - BUDGET + K, 1200)} <= read(stream) and stream.earned.tolist() == [0]


def test_what_a_user_has_asked_is_not_taken_for_text_that_comes_again(models, ids, monkeypatch):
    monkeypatch.setattr("megactx.runtime.stream.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4)))
    stream = Controller(replace(models, lensnet=None), Settings(**SMALL)).stream()
    text = repeating(ids, 12)
    text[600:602], text[602:604] = torch.tensor([1, 2]), torch.tensor([3, 4])
    stream.append(text[None])
    assert stream.questions().repeated[0][:1] == [400 // K]  # the turn is too far back: the text goes on
    text[1100:1102], text[1102:1104] = torch.tensor([1, 2]), torch.tensor([3, 4])
    stream = Controller(replace(models, lensnet=None), Settings(**SMALL)).stream()
    stream.append(text[None])
    assert stream.questions().repeated == [[]] and not {400, 401} & read(stream)


def test_rows_have_texts_of_their_own(models, ids):
    stream = Controller(replace(models, lensnet=None), Settings(**SMALL)).stream(2)
    text = torch.stack([repeating(ids), ids(1201, seed=5)])
    stream.append(text, torch.tensor([1201, 700]))
    first, second = stream.questions().repeated
    assert first[0] == 100 and not second


def test_a_tree_that_was_shortened_and_went_on_otherwise_is_read_anew(models, ids):
    tree = MegaContextTree(models.gistnet, models.base)
    text, other = repeating(ids, 12, 1200), ids(1200, seed=7)
    tree.append(text[None])
    repeats = Repeats(tree)
    assert repeats.blocks(0, text[-LONGEST:])[0] == 100
    storage.shorten(tree, 300)
    tree.append(other[None, :900])
    assert repeats.blocks(0, text[-LONGEST:]) == []
    again = torch.cat([text[:300], other[:900]])
    assert torch.equal(repeats._text(0)[0], again.int())
    for end in (532, 533, 534, 535):  # the next token is nearer to the block before or to the one behind
        assert repeats.blocks(0, again[end - LONGEST : end]) == [133, 132 if end < 534 else 134]


def test_a_session_that_was_saved_repeats_as_one_that_was_not(models, ids, tmp_path):
    from megactx.runtime import Session

    made = Controller(replace(models, lensnet=None), Settings(**SMALL))
    text = repeating(ids, 12)
    here = Session(made)
    here.append(text)
    expected = here.stream.logits()
    here.save(tmp_path / "talk")
    here.close()
    with Session.load(tmp_path / "talk", made) as there:
        torch.testing.assert_close(there.stream.logits(), expected)
        assert {400, 401, 402, 403} <= {*there.stream.shown.index[0].tolist()}
