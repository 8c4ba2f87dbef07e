"""Keys find the few places where the answer may stand; what reads them again says which are opened."""

from dataclasses import replace

import pytest
import torch

from megactx.data.user_turns import UserTurns
from megactx.focus.earned import newest_from
from megactx.focus.finding import ALIKE, LOOKS, Seen, found_by_keys, looked_at, told_last
from megactx.focus.keys import KeyNet, Questions, search
from megactx.focus.sentence_keys import SentenceKeys
from megactx.memory import MegaContextTree
from megactx.runtime import Controller, Session, Settings, Wanted

K, BUDGET = 4, 240
SMALL = dict(budget=BUDGET, allocator={"protected": 8}, megacontext="recency", earn=True, keys=6)
ASKS, ENDS = torch.tensor([1, 2]), torch.tensor([3, 4])


class Reads(KeyNet):
    """A text is as like a question as many of its tokens stand in it, in their order from any place."""

    looks_again = True

    def alike(self, texts, questions):
        return torch.tensor([max(_common(text, question) for question in questions) for text in texts.tolist()])

    def words(self, ids):
        return {*ids}


def _common(text, question):
    question = question.tolist()
    shifted = ((at, question[max(0, at) :]) for at in range(-len(text) + 1, len(question)))
    return float(max(sum(a == b for a, b in zip(text[max(0, -at) :], rest, strict=False)) for at, rest in shifted))


@pytest.fixture
def reading(models):
    torch.manual_seed(0)
    keys = Reads(models.base.model.get_input_embeddings().weight, 32).eval().requires_grad_(False)
    return replace(models, keys=keys, lensnet=None)


def asked(*questions):
    """Of each row one, by its user."""
    ids = torch.stack(questions)
    rows, there = torch.arange(len(ids)), torch.ones_like(ids, dtype=torch.bool)
    return Questions(ids, there, rows, torch.ones(len(ids), dtype=torch.bool), [[] for _ in ids], [None for _ in ids])


@torch.no_grad()
def test_of_the_places_that_keys_find_those_are_opened_of_which_a_piece_is_likest(reading, ids):
    stream = Controller(reading, Settings(**SMALL)).stream(2)
    stream.append(ids(2, 1501))
    stream.logits()
    context, protected = stream.context, stream.focus.allocator.protected
    other = twice = 0
    for seed in range(10):
        questions = ids(2, 16, seed=seed)
        found = found_by_keys(context, asked(*questions), 6, BUDGET, protected)
        before = min(int(newest_from(context, BUDGET)[0]) + 6 * K, 1501 // K * K - protected) // K
        for row, question in enumerate(questions):
            like = search(stream.tree, questions)[row, :before]
            places = []
            for block in like.argsort(descending=True).tolist():
                if len(places) < looked_at(before) and all(abs(block - one) > 1 for one in places):
                    places.append(block)
            around = {at for block in places for at in (block - 1, block, block + 1) if 0 <= at < before}
            best, begins = {}, {}
            for block in sorted(around):
                for start in range(block * K, block * K + K):
                    if (start + 2) // K in around:
                        middle = (start + 1) // K
                        value = _common(stream.tree.tokens[row, start : start + 3].tolist(), question)
                        if value > best.get(middle, -1.0):
                            best[middle], begins[middle] = value, start
            first, *rest = sorted(best, key=best.get, reverse=True)
            apart = []
            for block in rest:
                if all(abs(block - one) > 1 for one in [first, *apart]):
                    apart.append(block)
            own = {*question.tolist()} & {*stream.tree.tokens[row, begins[first] : begins[first] + 3].tolist()}
            for block in apart[1:]:
                own -= {*stream.tree.tokens[row, begins[block] : begins[block] + 3].tolist()}
            again = own and apart[0] > first and best[apart[0]] >= ALIKE
            opened = [first, apart[0]] if again else [first]
            twice += len(opened) == 2
            around = ((max(0, begins[block] - 1), begins[block] + 4) for block in opened)  # a token on either side
            reach = {token // K for first, stop in around for token in range(first, stop)}
            assert {*found[row]} == reach and len(found[row]) == len(reach)
            assert found[row][0] == opened[0]
            other += opened[0] != places[0]
    assert 0 < twice < 20
    assert other > 10  # or the keys alone would have said it


@pytest.mark.parametrize("part", [False, True])
def test_a_session_opens_the_place_that_its_keys_had_put_fifth(reading, ids, part, tmp_path, monkeypatch):
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4)))
    told = ids(1, 900, seed=3)
    question = told[0, 402:405]
    likest = [20, 40, 60, 80, 101, 120, 140, 160]  # blocks 100 and 101 hold it, or with BOS before them block 101

    def find(tree, *question):
        like = torch.full((1, int(tree.counts(1))), -9.0)
        if like.shape[1] > 160:
            like[0, likest] = torch.linspace(9, 2, len(likest))
        return like

    monkeypatch.setattr("megactx.focus.finding.search", find)
    parts = []
    if part:
        MegaContextTree.from_tokens(told, reading.gistnet, reading.base, keys=reading.keys).save(tmp_path / "library")
        parts = [Wanted("library", tmp_path / "library", 0.4)]
    with Session(Controller(reading, Settings(**SMALL)), parts=parts) as session:
        if not part:
            session.append(told[0])
        session.append(torch.cat([ASKS, question, ENDS]))
        session.stream.logits()
        shown, seen = session.stream.shown, session.stream.seen
        raw = shown.index[0][shown.lod[0] == 0]
        old = raw[seen.part_of(raw) == 0] if part else raw[raw < 900]
        first = 402 if part else 403
        assert {*range(first, first + 3)} <= {*old.tolist()} and (part or session.ids(403, 406).equal(question))


def test_the_more_blocks_there_are_the_more_places_are_read_again():
    """Of four thousand tokens eight, of a million sixteen times as many."""
    assert [looked_at(count) for count in (1, 128, 130, 512, 2048, 2**15)] == [8, 8, 8, 16, 32, 128]


def seen(**likeness):
    """Of blocks b0, b1, ... how like they are, or with their words."""
    each = {int(name[1:]): value if isinstance(value, tuple) else (value, "") for name, value in likeness.items()}
    return {block: Seen(like, block * K, {*words.split()}) for block, (like, words) in each.items()}


def test_what_is_told_again_counts_as_it_was_told_last():
    """The next likest place is opened if it stands later, and the first has a word of the question that no other has:
    then it is what was asked for, and not something else that is nearly as like."""
    asked, first = {"number", "car"}, (0.6, "number car")
    assert told_last(seen(b9=first, b20=0.55, b30=0.52), asked) == [9, 20]
    assert told_last(seen(b9=first, b20=ALIKE, b30=(0.4, "number")), asked) == [9, 20]
    assert told_last(seen(b9=first, b20=(0.55, "number car")), asked) == [9, 20]  # told again in the same words
    assert told_last(seen(b9=first, b10=0.59, b20=0.55), asked) == [9, 20]  # what is beside it is the same place
    assert told_last(seen(b9=first, b20=ALIKE - 1e-9), asked) == [9]
    assert told_last(seen(b9=first, b5=0.55, b20=0.54), asked) == [9]  # told before
    assert told_last(seen(b9=first, b20=0.55, b30=(0.1, "number car")), asked) == [9]  # any text has that word
    assert told_last(seen(b9=(0.9, "number truck"), b20=0.55, b30=(0.5, "number")), asked) == [9]
    assert told_last(seen(b3=0.2), asked) == [3] and told_last({}, asked) == []


def test_where_there_are_two_places_the_less_like_one_is_not_opened_either(reading, ids):
    stream = Controller(reading, Settings(**(SMALL | {"budget": 96}))).stream()
    stream.append(ids(1, 100))
    stream.logits()
    question = stream.tree.tokens[0, :K].long()
    assert found_by_keys(stream.context, asked(question), 1, 96, 8) == [[0]]  # of blocks 0, 1, 2


def test_keys_that_read_nothing_again_keep_their_own_order(reading, ids):
    keys = KeyNet(reading.base.model.get_input_embeddings().weight, 32).eval().requires_grad_(False)
    stream = Controller(replace(reading, keys=keys), Settings(**SMALL)).stream()
    stream.append(ids(1, 1501))
    stream.logits()
    question = ids(16, seed=7)
    found = found_by_keys(stream.context, asked(question), 6, BUDGET, 8)[0]
    like = search(stream.tree, question[None])[0]
    before = min(int(newest_from(stream.context, BUDGET)[0]) + 6 * K, 1501 // K * K - 8) // K
    assert found[0] == int(like[:before].argmax())


def test_a_fact_in_the_block_in_which_the_question_begins_is_found_too(reading, ids, monkeypatch):
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4)))
    monkeypatch.setattr("megactx.focus.finding.search", lambda tree, *question: _likest(tree, 150))
    told = ids(603)
    stream = Controller(reading, Settings(**SMALL, newest=0)).stream()
    stream.append(torch.cat([told, ASKS, told[600:603], ENDS])[None])
    stream.logits()
    assert stream.shown.index[0].tolist() == [*range(K), *range(596, 610)]  # the piece begins at 600, and reaches back


def test_the_block_in_which_the_question_begins_takes_the_place_of_no_other(reading, ids, monkeypatch):
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4)))
    likest = [150, 20, 40, 60, 80, 100, 120, 130, 140]
    assert len(likest) == LOOKS + 1
    monkeypatch.setattr("megactx.focus.finding.search", lambda tree, *question: _likest(tree, *likest))
    told = ids(603)
    stream = Controller(reading, Settings(**SMALL, newest=0)).stream()
    stream.append(torch.cat([told, ASKS, told[561:564], ENDS])[None])
    stream.logits()
    assert stream.shown.index[0].tolist() == [*range(K), *range(560, 568), *range(603, 610)]


def _likest(tree, *blocks):
    like = torch.full((1, int(tree.counts(1))), -9.0)
    like[0, blocks] = torch.arange(9.0, 9.0 - len(blocks), -1)
    return like


def test_keys_of_no_blocks_are_none(reading):
    for keys in (SentenceKeys(None, None, 32, width=8), reading.keys):
        assert keys.encode(torch.zeros(0, K, dtype=torch.long)).shape == (0, 32)
