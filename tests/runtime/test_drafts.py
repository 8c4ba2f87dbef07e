"""Drafts of a session save passes, and never change what it says."""

import sys
from dataclasses import replace
from functools import cache

import pytest
import torch

from megactx.memory.prediction import Readout
from megactx.runtime import Controller, Sampling, Session, Settings
from megactx.runtime.controller import decode
from megactx.runtime.drafts import MATCH, Lookup, Runs, drafter_of

K = 4
READING = [
    {},
    {"megacontext": "recency"},
    {"reuse": "approximate"},
    {"attention": "mega", "segment": 8, "mid": 16, "live": 8},
    {"attention": "mega", "segment": 8, "mid": 16, "live": 8, "overlap": 4},
]
# A penalty below 1: what was said is said again, so that kinds that look for it find a draft.
DRAWN = Sampling(temperature=0.8, top_k=20, repetition_penalty=0.6)


class Passes:
    """Counts the passes of a base LM."""

    def __init__(self, base, monkeypatch):
        self.count, real = 0, base.forward

        def counted(*args, **kwargs):
            self.count += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(base, "forward", counted)


@pytest.fixture(scope="module")
def controller(models):
    """kind -> a controller with a window of 96 entries; its models have a readout."""
    torch.manual_seed(2)
    known = replace(models, prediction=Readout(models.base.width).eval())

    def make(megacontext="focus", **settings):
        return Controller(known, Settings(budget=96, allocator={"protected": 8}, megacontext=megacontext, **settings))

    return make


def begun(controller, ids, drafts, length=70, **settings):
    """A stream behind text that comes back, so that there is something to look up."""
    stream = controller(drafts=drafts, **settings).stream()
    stream.append(ids(1, length // 2).repeat(1, 2))
    return stream


def said(stream, count, sampling=DRAWN):
    return [token for (token,) in decode(stream, count, sampling)]


@pytest.fixture(scope="module")
def without(controller, ids):
    """A reading's number, sampling -> what is said without drafts, and the stream behind it."""

    @cache
    def told(reading, sampling):
        stream = begun(controller, ids, "none", length=86, **READING[reading])
        return said(stream, 14 * K, sampling), stream

    return told


@pytest.mark.parametrize("reading", range(len(READING)), ids=lambda reading: str(READING[reading]))
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("kind", ["lookup", "nearest", "foretold"])
def test_a_session_with_drafts_says_what_it_says_without(controller, ids, without, reading, sampling, kind):
    expected, plain = without(reading, sampling)
    drafted, events = begun(controller, ids, kind, length=86, **READING[reading]), []
    drafted.observers.append(events.append)
    assert said(drafted, 14 * K, sampling) == expected
    assert sum(map(sum, [drafted.drafts, *(event.drafts for event in events)])), "there were drafts"
    torch.testing.assert_close(drafted.logits(), plain.logits(), atol=1e-4, rtol=0)
    assert torch.equal(drafted.lengths, plain.lengths) and drafted.refocuses == plain.refocuses


@pytest.fixture(scope="module")
def along(controller, ids):
    """A reading's number -> the logits without drafts in front of each token of three blocks, and behind them."""

    @cache
    def found(reading):
        stream, logits = begun(controller, ids, "none", **READING[reading]), []
        for token in ids(1, 3 * K, seed=1)[0]:
            logits.append(stream.logits())
            stream.push(token[None])
        return [*logits, stream.logits()]

    return found


@pytest.mark.parametrize("reading", range(len(READING)), ids=lambda reading: str(READING[reading]))
@pytest.mark.parametrize("right", range(K))
def test_what_of_a_draft_does_not_come_leaves_nothing_behind(controller, ids, along, reading, right):
    """A draft whose first tokens come, behind each number of tokens of a block; then the next block, as without it."""
    tokens, expected = ids(1, 3 * K, seed=1)[0], along(reading)
    for first in range(1, K):
        drafted = begun(controller, ids, "lookup", **READING[reading])
        drafted.logits()
        for token in tokens[:first]:
            drafted.push(token[None])
        draft = [int(t) if n < right else (int(t) + 1) % 512 for n, t in enumerate(tokens[first : first + K])]
        drafted.foresee(draft)
        assert len(drafted.ahead) == K - first, "a draft ends with its block"
        for place, token in enumerate(tokens[first:], first):
            torch.testing.assert_close(drafted.logits(), expected[place], atol=1e-4, rtol=0)
            drafted.push(token[None])
        assert not drafted.ahead
        torch.testing.assert_close(drafted.logits(), expected[-1], atol=1e-4, rtol=0)


def test_a_right_draft_saves_its_passes_and_is_counted(controller, ids, models, monkeypatch):
    tokens, events = ids(1, 2 * K, seed=1)[0].tolist(), []
    stream = begun(controller, ids, "lookup")
    stream.observers.append(events.append)
    stream.logits()
    passes = Passes(models.base, monkeypatch)
    stream.push(torch.tensor([tokens[0]]))
    stream.foresee(tokens[1:])
    for token in tokens[1:K]:
        stream.logits()
        stream.push(torch.tensor([token]))
    assert passes.count <= 2 < K, "one for the draft, and one for the window where the refocus changes it"
    stream.foresee([5, 5])
    assert not stream.ahead, "a draft is read along with a token, and never by itself"
    stream.push(torch.tensor([tokens[K]]))
    stream.foresee([tokens[K + 1], 5, 5])
    for token in tokens[K + 1 :]:
        stream.push(torch.tensor([token]))
    assert [event.drafts for event in events[-2:]] == [(K - 1, 0), (1, 2)]
    plain = begun(controller, ids, "none")
    plain.observers.append(events.append)
    said(plain, K)
    assert events[-1].drafts is None


def test_who_stops_listening_finds_the_history_as_far_as_it_was_told(controller, ids):
    plain, drafted = (begun(controller, ids, drafts) for drafts in ("none", "lookup"))
    for stream in (plain, drafted):
        listening = decode(stream, 30, Sampling())
        told = [next(listening)[0] for _ in range(5)]
        listening.close()
        assert int(stream.lengths[0]) == 70 + 5 and stream.newest(5)[0].tolist() == told
    more = [ids(1, 3, seed=2)] * 2
    for stream, tokens in zip((plain, drafted), more, strict=True):
        stream.append(tokens, score=True)
    torch.testing.assert_close(drafted.logits(), plain.logits(), atol=1e-4, rtol=0)


def test_a_session_is_saved_and_loaded_while_a_draft_is_read(controller, ids, tmp_path):
    made = controller(drafts="lookup")
    with Session(made) as session:
        session.append(ids(35).repeat(2))
        session.stream.logits()
        session.stream.push(torch.tensor([6]))
        session.stream.foresee([7, 8, 9])
        session.stream.push(torch.tensor([7]))
        assert session.stream.ahead
        session.save(tmp_path / "session")
        expected = said(session.stream, 12)
    with Session.load(tmp_path / "session", made) as loaded:
        assert said(loaded.stream, 12) == expected
    with Session.load(tmp_path / "session", controller()) as plain:
        assert said(plain.stream, 12) == expected


def test_the_first_tokens_of_a_history_may_be_drafted_too(controller):
    plain, drafted = (controller(drafts=drafts).stream() for drafts in ("none", "lookup"))
    for stream in (plain, drafted):
        for token in (2, 3):
            stream.push(torch.tensor([token]))
    drafted.foresee([4, 5, 6, 7, 8])
    assert len(drafted.ahead) == K - 2
    for token in (4, 9, 10, 11):
        for stream in (plain, drafted):
            stream.push(torch.tensor([token]))
        torch.testing.assert_close(drafted.logits(), plain.logits(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graphs": True}, "graphs=true is not allowed with drafts=lookup"),
        ({"megacontext": "none"}, "drafts=lookup is not allowed with megacontext=none"),
        ({"drafts": "any"}, "drafts=any is not"),
    ],
)
def test_what_drafts_do_not_go_with_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"drafts": "lookup"} | settings)


def test_drafts_are_of_one_text(controller):
    with pytest.raises(ValueError, match="drafts=lookup is not allowed for 2 texts at once, allowed is none"):
        controller(drafts="lookup").stream(2)


def test_a_readout_that_is_not_there_cannot_foretell(models):
    with pytest.raises(ValueError, match="drafts=foretold is not allowed: there is no readout in small"):
        Controller(models, Settings(budget=96, allocator={"protected": 8}, drafts="foretold"))


def test_drawn_tokens_are_distributed_as_the_base_says_by_chi_square(controller, ids):
    """Behind a text, and behind a token of the draft that was taken; the draft is likely, unlikely, or in between."""
    count, plain, token = 3000, begun(controller, ids, "none", length=72), torch.tensor([9])
    plain.push(token)
    share = (plain.logits()[0].double() / 0.7).softmax(-1)
    for place in (0, 200, -1):
        stream = begun(controller, ids, "lookup", length=72)
        first = int(share.argsort(descending=True)[place])
        stream.logits()
        stream.push(token)
        stream.foresee([first, 7])
        assert chi_square(stream, share, count), "where the draft begins"
        stream.push(torch.tensor([first]))
        assert len(stream.ahead) == 1
        alone = begun(controller, ids, "none", length=72)
        for pushed in (token, torch.tensor([first])):
            alone.push(pushed)
        assert chi_square(stream, (alone.logits()[0].double() / 0.7).softmax(-1), count), "behind its first token"


def chi_square(stream, share, count) -> bool:
    """Whether tokens that are drawn with many seeds are distributed so, but for about one case in 10,000."""
    rows = 100  # of one seed
    drawing = stream.logits().expand(rows, -1), torch.zeros(rows, 0, dtype=torch.long), stream.lengths.expand(rows)
    drawn = [Sampling(0.7, seed=seed).choose(*drawing) for seed in range(count // rows)]
    found = torch.bincount(torch.cat(drawn), minlength=len(share)).double()
    large = share * count >= 5
    seen, expected = (torch.cat([part[large], part[~large].sum()[None]]) for part in (found, share * count))
    chi, free = float(((seen - expected) ** 2 / expected).sum()), len(expected) - 1
    return chi < free + 4 * (2 * free) ** 0.5


def test_gists_find_a_block_that_comes_back(controller, ids):
    text = ids(13 * K, seed=5)
    text[11 * K : 12 * K] = text[2 * K : 3 * K]
    stream = controller(drafts="nearest").stream()
    stream.append(text[None, : 12 * K])
    stream.logits()
    drafter = drafter_of(stream)
    assert drafter.draft() == text[3 * K : 4 * K].tolist()
    stream.push(text[None, 3 * K])
    assert drafter.draft() == text[3 * K + 1 : 4 * K].tolist(), "in the middle of a block it is gone on with"


def test_the_newest_place_of_the_longest_end_is_what_is_looked_up():
    assert Runs([1, 2, 3, 9, 7, 1, 2, 4, 1, 2, 5]).behind([7, 1, 2]) == [4, 1, 2, 5]
    assert Runs([1, 2, 3, 9, 1, 2, 4]).behind([8, 1, 2]) == [4]
    assert Runs([1, 2, 8]).behind([8]) == [] and Runs([1]).behind([]) == []


def test_lookup_knows_every_run_by_its_newest_place(controller):
    tokens = torch.randint(0, 6, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    stream = controller().stream()
    stream.append(torch.tensor([tokens[:1]]))
    lookup = Lookup(stream)
    for end in range(1, len(tokens)):
        found, best = lookup.draft(), []
        lookup.took(tokens[end])
        for length in range(min(MATCH, end), 0, -1):
            places = [at for at in range(length, end) if tokens[at - length : at] == tokens[end - length : end]]
            if places and not best:
                best = tokens[places[-1] : min(end, places[-1] + 8)]
        assert found == best


@pytest.mark.parametrize("kind", ["nearest", "foretold"])
def test_blocks_are_drafted_where_refocuses_do_not_end_them(controller, ids, kind):
    """Text of no whole blocks was appended, so a refocus comes in the middle of a block."""
    text = ids(6 * K + 2, seed=3)
    stream = controller(drafts=kind).stream()
    stream.append(text[None])
    drafter, drafted, whole = drafter_of(stream), [], torch.cat([text, text[: 3 * K]]).tolist()
    for token in text[: 3 * K]:
        stream.logits()
        if draft := drafter.draft():
            drafted.append(draft)
            ends = range(K, len(whole), K)
            assert any(draft == whole[end - len(draft) : end] for end in ends), "text up to the end of a block"
        stream.push(token[None])
    assert drafted


@pytest.mark.parametrize("step", [41, pytest.param(11, marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [READING[1], READING[4]], ids=str)
def test_a_stop_at_any_moment_leaves_a_session_that_goes_on_as_if_it_had_read_all(controller, ids, settings, step):
    """A line of the runtime is where Ctrl-C comes, each in turn."""

    @cache
    def read(*tokens):
        """The logits behind text and tokens, and behind each of two more."""
        stream, logits = begun(controller, ids, "none", length=72, **settings), []
        for token in (*tokens, 5, 6):
            logits.append(stream.logits())
            stream.push(torch.tensor([token]))
        return [*logits, stream.logits()][-3:]

    class Stop:
        def __init__(self, line: int):
            self.left = line

        def __call__(self, frame, event, _):
            if "/megactx/runtime/" not in frame.f_code.co_filename:
                return None
            self.left -= event == "line"
            if self.left == 0:
                self.left, self.where = -1, (frame.f_code.co_filename, frame.f_lineno)
                raise KeyboardInterrupt
            return self

    stopped, line, before = 0, 1, sys.gettrace()
    while True:
        stream = begun(controller, ids, "lookup", length=72, **settings)
        stream.logits()
        stop = Stop(line)
        try:
            sys.settrace(stop)
            said(stream, 6, Sampling())
        except KeyboardInterrupt:
            stopped += 1
        finally:
            sys.settrace(before)
        if stop.left > 0:
            break
        count = int(stream.lengths[0]) - 72
        first, second, third = read(*stream.newest(count)[0][:count].tolist())
        for token, whole in ((5, first), (6, second)):
            torch.testing.assert_close(stream.logits(), whole, atol=1e-3, rtol=0, msg=str(stop.where))
            stream.push(torch.tensor([token]))
        torch.testing.assert_close(stream.logits(), third, atol=1e-3, rtol=0, msg=str(stop.where))
        line += step
    assert stopped > 20


@pytest.mark.parametrize("kind", ["lookup", "nearest", "foretold"])
def test_what_cannot_be_read_is_not_drafted_and_ends_no_answer(controller, ids, kind, monkeypatch):
    expected = said(begun(controller, ids, "none"), 3 * K, Sampling())
    stream = begun(controller, ids, kind)
    stream.logits()

    def damaged(*_, **__):
        raise ValueError("page 2 of level 0 is damaged")

    monkeypatch.setattr(stream, "newest", damaged)
    monkeypatch.setattr(stream.tree.levels[1], "span", damaged)
    if kind == "lookup":
        assert drafter_of(stream).draft() == []
    else:
        monkeypatch.undo()
        monkeypatch.setattr(stream.tree.levels[1], "span", damaged)
    assert said(stream, 3 * K, Sampling()) == expected
