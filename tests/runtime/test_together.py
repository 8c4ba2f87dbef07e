"""Many sessions, one pass: each says what it says alone."""

import pytest
import torch

from megactx.runtime import Sampling
from megactx.runtime.controller import decode
from megactx.runtime.together import read_together

K = 4
LENGTHS = (3, 41, 90, 200)


def begun(controller, ids, lazy: bool, **settings):
    """Streams behind histories of several lengths."""
    made = controller(**settings)
    streams = [made.stream() for _ in LENGTHS]
    for n, (stream, length) in enumerate(zip(streams, LENGTHS, strict=True)):
        stream.append(ids(1, length, seed=n))
        stream.lazy = lazy
    return streams


def alone(stream, count, sampling):
    return [token for (token,) in decode(stream, count, sampling)]


def in_turn(streams, count, sampling):
    """A token of each in a round; -> (tokens of each, how many were read together)."""
    running, said, together = [decode(stream, count, sampling) for stream in streams], [[] for _ in streams], 0
    for _ in range(count):
        together += read_together(streams)
        for one, tokens in zip(running, said, strict=True):
            tokens += next(one)
    return said, together


@pytest.mark.parametrize("kind", ["focus", "recency"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=20, repetition_penalty=1.2)])
def test_sessions_that_are_read_together_say_what_each_says_alone(controller, ids, kind, sampling):
    count = 11 * K
    expected = [alone(stream, count, sampling) for stream in begun(controller, ids, False, megacontext=kind)]
    said, together = in_turn(begun(controller, ids, True, megacontext=kind), count, sampling)
    assert said == expected
    # All but what a refocus reads with the window, and the first token, which stands behind what was appended.
    assert together >= len(LENGTHS) * (count - count // K - 2)


@pytest.mark.parametrize("settings", [{}, {"megacontext": "recency", "earn": True, "recall": True}])
def test_sessions_with_drafts_are_read_together_too(controller, ids, settings):
    count = 11 * K
    expected = [alone(stream, count, Sampling()) for stream in begun(controller, ids, False, **settings)]
    said, together = in_turn(begun(controller, ids, True, drafts="lookup", **settings), count, Sampling())
    assert said == expected and together > 0


@torch.no_grad()
def test_a_pass_for_many_gives_each_its_own_hidden_state_and_keys(controller, ids):
    one, many = begun(controller, ids, False), begun(controller, ids, True)
    for stream in (*one, *many):
        stream.logits()
        stream.push(torch.tensor([7]))
    assert [stream.unread for stream in many] == [1, 1, 1, 1] and read_together(many) == 4
    assert [stream.unread for stream in many] == [0, 0, 0, 0] and read_together(many) == 0
    for a, b in zip(one, many, strict=True):
        torch.testing.assert_close(a.logits(), b.logits(), atol=1e-4, rtol=0)
        assert a.prefill.cache.get_seq_length() == b.prefill.cache.get_seq_length()
        for x, y in zip(a.prefill.cache.layers, b.prefill.cache.layers, strict=True):
            torch.testing.assert_close(x.keys, y.keys, atol=1e-5, rtol=0)
            torch.testing.assert_close(x.values, y.values, atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_was_put_off_is_read_by_whoever_asks_and_counts_before(controller, ids):
    eager, lazy = begun(controller, ids, False)[2], begun(controller, ids, True)[2]
    for stream in (eager, lazy):
        stream.logits()
        for token in (5, 9, 6):  # more than one is put off
            stream.push(torch.tensor([token]))
    assert torch.equal(eager.lengths, lazy.lengths) and torch.equal(eager.newest(5), lazy.newest(5))
    torch.testing.assert_close(eager.logits(), lazy.logits(), atol=1e-4, rtol=0)
    lazy.push(torch.tensor([3])), eager.push(torch.tensor([3]))
    more = ids(1, 30, seed=9)
    scored = [stream.append(more, score=True) for stream in (eager, lazy)]
    torch.testing.assert_close(*scored, atol=1e-4, rtol=0)
    assert torch.equal(eager.context.index, lazy.context.index)


@torch.no_grad()
def test_a_pass_that_fails_leaves_every_session_to_read_by_itself(controller, ids, monkeypatch):
    expected = [alone(stream, 2 * K, Sampling()) for stream in begun(controller, ids, False)]
    streams, failed = begun(controller, ids, True), []
    running, said = [decode(stream, 2 * K, Sampling()) for stream in streams], [[] for _ in streams]
    decoder = streams[0].base.model.get_decoder()
    for turn in range(2 * K):
        if turn == 2:  # in the middle: some layers have the new column already
            hook = decoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                read_together(streams)
            failed.append(turn)
            hook.remove()
        elif turn % 2:
            read_together(streams)
        for one, tokens in zip(running, said, strict=True):
            tokens += next(one)
    assert said == expected and failed == [2]


@torch.no_grad()
def test_streams_that_cannot_be_read_together_are_left_alone(controller, ids):
    eager, lazy = begun(controller, ids, False)[1:3], begun(controller, ids, True)[1:3]
    plain = controller("none").stream()
    for streams in (eager, lazy):
        for stream in streams:
            stream.logits()
        streams[0].push(torch.tensor([4]), torch.tensor([False]))  # a column that is not there
        for stream in streams:
            stream.push(torch.tensor([7]))
    assert read_together([lazy[1], lazy[1], lazy[0], plain]) == 0  # one alone, though it is named twice
    for a, b in zip(eager, lazy, strict=True):
        torch.testing.assert_close(a.logits(), b.logits(), atol=1e-4, rtol=0)
