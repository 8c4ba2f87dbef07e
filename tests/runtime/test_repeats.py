"""What stood where the end of a text stood before is read: in sessions that earn, of text that goes on."""

from dataclasses import replace

import pytest
import torch

from megactx.data.user_turns import UserTurns
from megactx.memory import MegaContextTree, archive, storage
from megactx.runtime import Controller, Session, Settings
from megactx.runtime.repeats import LEAST, LONGEST, NOTHING, Repeats, longest_end

K, BUDGET = 4, 96
SMALL = dict(budget=BUDGET, limit=256, allocator={"protected": 8}, megacontext="recency", earn=True)


@pytest.fixture(autouse=True)
def nothing_rare(monkeypatch):
    """Tests of rare tokens are elsewhere."""
    monkeypatch.setattr("megactx.runtime.rare_tokens.LEAST", ())


def slowly(text):
    """The longest end, and the newest place behind it, token by token."""
    best = (0, 0)
    for place in range(1, len(text)):
        count = 0
        while count < min(LONGEST, place) and text[place - 1 - count] == text[-1 - count] != NOTHING:
            count += 1
        if count and count >= best[0]:
            best = (count, place)
    return best


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_end_is_found_at_its_newest_place(seed, monkeypatch):
    monkeypatch.setattr("megactx.runtime.repeats.PIECE", 1 + 7 * seed)
    text = torch.randint(0, 2 + seed % 5, (200,), generator=torch.Generator().manual_seed(seed))
    if seed % 3 == 0:
        text[torch.arange(200) % 9 == 0] = NOTHING
    assert longest_end(text) == slowly(text.tolist())
    assert longest_end(torch.ones(100, dtype=torch.long)) == (LONGEST, 99)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_text_that_has_hardly_begun_repeats_nothing(size):
    assert longest_end(torch.arange(size)) == (0, 0)


@pytest.fixture
def stream(models):
    return Controller(replace(models, lensnet=None), Settings(**SMALL)).stream()


def read(stream):
    """Tokens that are read raw."""
    stream.logits()
    return {*stream.shown.index[0][stream.shown.lod[0] == 0].tolist()}


def repeating(ids, length=LEAST, tokens=1200):
    """A text whose end stood at 400 before."""
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
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4)))
    stream = Controller(replace(models, lensnet=None), Settings(**SMALL)).stream()
    text = repeating(ids, LEAST + 2)  # shorter than a quote
    text[600:602], text[602:604] = torch.tensor([1, 2]), torch.tensor([3, 4])
    stream.append(text[None])
    assert stream.questions().repeated[0][:1] == [400 // K]  # the turn is too far back: the text goes on
    text[1100:1102], text[1102:1104] = torch.tensor([1, 2]), torch.tensor([3, 4])
    stream = Controller(replace(models, lensnet=None), Settings(**SMALL)).stream()
    stream.append(text[None])
    assert stream.questions().repeated == [[]] and not {400, 401} & read(stream)


def test_rows_have_texts_of_their_own(models, ids):
    stream = Controller(replace(models, lensnet=None), Settings(**SMALL)).stream(2)
    text = torch.stack([repeating(ids), ids(1200, seed=5)])
    stream.append(text, torch.tensor([1200, 700]))
    first, second = stream.questions().repeated
    assert first[0] == 100 and not second


def test_places_lie_beside_the_block_to_which_the_next_token_is_nearer(models, ids):
    for end in (532, 533, 534, 535):
        text = ids(1200)
        text[-LONGEST:] = text[end - LONGEST : end].clone()
        tree = MegaContextTree.from_tokens(text[None], models.gistnet, models.base)
        assert Repeats(tree).blocks(0) == [133, 132 if end < 534 else 134]


def test_a_tree_that_was_shortened_is_read_anew(models, ids):
    tree, text = MegaContextTree(models.gistnet, models.base), repeating(ids, 12)
    tree.append(text[None])
    repeats = Repeats(tree)
    assert repeats.blocks(0)[0] == 100
    storage.shorten(tree, 300)
    assert repeats.blocks(0) == []
    tree.append(ids(900, seed=7)[None])
    assert torch.equal(repeats._text(0)[0], torch.cat([text[:300], ids(900, seed=7)]).int())


def test_what_was_taken_away_stands_nowhere_and_comes_back_with_what_is_restored(models, ids, tmp_path, monkeypatch):
    """A session that goes on from a folder finds what one does that has been there all the time."""
    monkeypatch.setattr(archive, "RECENT", 200)
    made = Controller(replace(models, lensnet=None), Settings(**SMALL))
    text = repeating(ids, 12)
    text[700 - 12 : 700] = text[400 - 12 : 400]  # the newest place
    with Session(made) as here:
        here.append(text)
        assert here.stream.questions().repeated == [[175, 174]]
        here.save(tmp_path / "talk")
        action = {"start": 600, "stop": 800, "action": "compact", "floor": 1, "reason": "a test", "bytes": 0}
        here.stream.keeper.do([action])
        assert here.stream.questions().repeated == [[100, 99]]
        here.save(tmp_path / "talk")
    with Session.load(tmp_path / "talk", made) as there:
        assert there.stream.questions().repeated == [[100, 99]]
        there.stream.keeper.restore(600, 800)
        assert there.stream.questions().repeated == [[175, 174]]


def test_a_damaged_page_is_a_place_where_nothing_stood(models, ids, monkeypatch):
    tree = MegaContextTree(models.gistnet, models.base)
    level = tree.levels[0]
    size, read = level.size, type(level).span
    text = ids(2 * size)
    text[-12:] = text[size + 100 - 12 : size + 100] = ids(12, seed=3)
    tree.append(text[None])

    def damaged(self, column, start, stop, rows=slice(None)):
        if self is level and start < size:
            raise ValueError("page 0 of level 0 is damaged")
        return read(self, column, start, stop, rows)

    monkeypatch.setattr(type(level), "span", damaged)
    repeats = Repeats(tree)
    assert repeats.blocks(0)[0] == (size + 100) // K
    known, end = repeats._text(0)
    assert (known[:size] == NOTHING).all() and torch.equal(known[size:], text[size:].int()) and end == 2 * size


def test_a_session_that_goes_on_in_the_middle_of_a_block_reads_the_same_as_one_that_was_never_saved(
    models, ids, tmp_path
):
    made = Controller(replace(models, lensnet=None), Settings(**SMALL))
    text = repeating(ids, 12)
    more = text[400:403]  # what waits goes on as it did before
    with Session(made) as here:
        here.append(text)
        here.append(more, score=True)
        expected, shown = here.stream.logits(), here.stream.shown.index
        here.save(tmp_path / "talk")
    with Session.load(tmp_path / "talk", made) as there:
        torch.testing.assert_close(there.stream.logits(), expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(there.stream.shown.index, shown) and {400, 401, 402, 403} <= {*shown[0].tolist()}
