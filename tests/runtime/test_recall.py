"""What followed the end of a history wherever it stood before is mixed into what the base LM says comes next."""

import math
from dataclasses import replace

import pytest
import torch

from megactx.memory import MegaContextTree
from megactx.runtime import Controller, Session, Settings
from megactx.runtime.rare_tokens import NOTHING
from megactx.runtime.recall import continuations, mixed_nll, share
from megactx.runtime.repeats import LONGEST

SMALL = dict(budget=96, limit=256, allocator={"protected": 8}, megacontext="recency", earn=True)


def slowly(text):
    """The share and the tokens behind the last 1, 2, ... tokens wherever they stood, token by token."""
    out = []
    for length in range(1, LONGEST + 1):
        end = text[len(text) - length :]
        places = [place for place in range(length, len(text)) if text[place - length : place] == end]
        tokens = [text[place] for place in places if text[place] != NOTHING]
        if len(end) == length and NOTHING not in end and tokens:
            out.append((share(length), tokens))
    return out


def distribution(logits, text):
    """Of the next token, [V]."""
    out = logits.double().softmax(-1)
    for part, found in slowly(text.tolist()):
        out = (1 - part) * out + part * torch.bincount(torch.tensor(found), minlength=len(out)) / len(found)
    return out


@pytest.mark.parametrize("seed", range(30))
def test_what_followed_each_number_of_last_tokens_counts_wherever_they_stood(seed, monkeypatch):
    monkeypatch.setattr("megactx.runtime.repeats.PIECE", 1 + 7 * seed)
    text = torch.randint(0, 2 + seed % 5, (200,), generator=torch.Generator().manual_seed(seed))
    if seed % 3 == 0:
        text[torch.arange(200) % 9 == 0] = NOTHING
    if seed % 2:
        text[-40:] = text[50:90].clone()
    assert [(part, tokens.tolist()) for part, tokens in continuations(text)] == slowly(text.tolist())


def test_the_longer_an_end_the_more_counts_what_followed_it():
    assert [share(length) for length in (1, 2, 8, LONGEST - 1, LONGEST)] == [0.02, 0.06, 0.06, 0.06, 0.6]
    text, before = torch.arange(100), 0.0
    for length in (1, 2, 8, LONGEST, LONGEST + 8):
        found = [*continuations(torch.cat([text, text[50 - length : 50]]))]
        assert len(found) == min(length, LONGEST) and all(tokens.tolist() == [50] for _, tokens in found)
        whole = 1 - math.prod(1 - part for part, _ in found)
        assert whole > before or length > LONGEST
        before = whole
    assert not [*continuations(text)] and not [*continuations(text[:1])] and not [*continuations(text[:0])]


def test_a_token_that_the_base_had_not_expected_costs_what_its_share_says():
    text = torch.tensor([5, 6, 7, 8, 9, 5, 6, 7, 8])
    nll = torch.tensor([20.0])
    left = 0.98 * 0.94**2  # 7, 6 7 and 5 6 7 stood there, then 8
    assert mixed_nll(nll, text).item() == pytest.approx(-math.log(1 - left), abs=1e-5)
    assert mixed_nll(nll, torch.cat([text[:-1], torch.tensor([1])])).item() == pytest.approx(20 - math.log(left))
    assert mixed_nll(nll, text, within=3).item() == 20  # what tells is too far back
    assert mixed_nll(torch.tensor([torch.nan, 20.0]), text)[0].isnan()


def told(ids):
    """A text with repeats of several lengths."""
    text = ids(1100)
    for length, place in ((2, 820), (5, 860), (9, 905), (20, 960), (40, 1030)):
        text[place : place + length + 3] = text[300 + place // 10 : 303 + length + place // 10].clone()
    return text


@pytest.mark.parametrize("behind", [0, 3])
def test_a_session_that_recalls_scores_and_tells_the_same_mixture(models, ids, behind):
    models, text = replace(models, lensnet=None), told(ids)
    plain, recalls = (Controller(models, Settings(**SMALL, recall=on)).stream() for on in (False, True))
    begin = 800 + behind
    for stream in (plain, recalls):
        stream.append(text[None, :begin])
    nll = recalls.append(text[None, begin:], score=True)[0]
    for at in range(begin, 1100):
        expected = distribution(plain.logits()[0], text[:at])
        assert nll[at - begin].item() == pytest.approx(-math.log(expected[text[at]]), abs=2e-4)
        plain.push(text[at : at + 1])
    stepwise = Controller(models, Settings(**SMALL, recall=True)).stream()
    stepwise.append(text[None, :1000])
    other = Controller(models, Settings(**SMALL)).stream()
    other.append(text[None, :1000])
    for at in range(1000, 1080):
        expected = distribution(other.logits()[0], text[:at])
        assert torch.allclose(stepwise.logits()[0].exp().double(), expected, atol=1e-6)
        for stream in (stepwise, other):
            stream.push(text[at : at + 1])


def test_recalling_costs_nothing_where_nothing_came_before_and_changes_no_window(models, ids):
    models = replace(models, lensnet=None)
    for text in (torch.arange(400) + 5, told(ids)):
        streams = [Controller(models, Settings(**SMALL, recall=on)).stream() for on in (False, True)]
        for stream in streams:
            stream.append(text[None])
        first, second = (stream.logits() for stream in streams)
        assert streams[0].shown.index.equal(streams[1].shown.index)
        if len(text) == 400:
            assert torch.allclose(first.log_softmax(-1), second, atol=1e-6)


def test_rows_recall_their_own_texts_and_no_more_of_them_than_there_is(models, ids):
    models = replace(models, lensnet=None)
    text = torch.stack([told(ids), ids(1100, seed=5)])
    lengths = torch.tensor([1090, 830])
    both = Controller(models, Settings(**SMALL, recall=True)).stream(2)
    both.append(text[:, :800])
    nll = both.append(text[:, 800:], lengths - 800, score=True)
    for row, length in enumerate(lengths.tolist()):
        one = Controller(models, Settings(**SMALL, recall=True)).stream()
        one.append(text[row : row + 1, :800])
        alone = one.append(text[row : row + 1, 800:length], score=True)[0]
        assert torch.allclose(nll[row, : length - 800], alone, atol=2e-4)
        assert nll[row, length - 800 :].isnan().all()
    assert torch.isfinite(both.logits()).all()


def test_what_was_taken_away_is_not_recalled(models, ids):
    text = told(ids)
    tree = MegaContextTree.from_tokens(text[None, :800], models.gistnet, models.base)
    stream = Controller(replace(models, lensnet=None), Settings(**SMALL, recall=True)).stream(tree=tree)
    before = stream.recall.repeats.text(0)
    gone = torch.full_like(before, NOTHING)
    stream.recall.repeats.known[0] = (gone, 800, tree.compacted)
    stream.append(text[None, 800:840])
    assert torch.isfinite(stream.logits()).all()


def test_a_session_that_is_resumed_recalls_the_same(models, ids, tmp_path):
    models, text = replace(models, lensnet=None), told(ids)
    controller = Controller(models, Settings(**SMALL, recall=True))
    with Session(controller) as session:
        session.append(text[:1001])
        session.save(tmp_path / "session")
        kept = session.append(text[1001:1060], score=True)
    with Session.load(tmp_path / "session", controller) as session:
        assert torch.allclose(session.append(text[1001:1060], score=True), kept, atol=2e-4)


def test_recalling_needs_a_session_that_earns():
    with pytest.raises(ValueError, match="recall=true is not allowed without earn=true"):
        Settings(recall=True)
