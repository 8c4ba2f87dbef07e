"""Sessions with attention=mega: what is kept is what a fresh reading gives, whatever happens to window and history."""

import pytest
import torch
from small_sessions import K

from megactx.focus import moves
from megactx.lm.adapters import adapt, adapters_of, switched_off
from megactx.memory.pyramid import Bend
from megactx.runtime import Controller, Sampling, Session, Settings
from megactx.runtime.controller import decode
from megactx.runtime.metrics import measured
from megactx.runtime.node_prefill import NodePrefill
from megactx.runtime.together import read_together

MEGA = dict(attention="mega", segment=16, mid=16, live=16)
LIMIT = 512  # positions of the base


def fresh(stream) -> torch.Tensor:
    """What a reader that has read nothing makes of a stream -> [B, D]."""
    reader, count = NodePrefill(stream.base, stream.settings.mega), int(stream.counts.max())
    ends, moved = stream.context.ends(), stream.rebase.moved
    reader.read(stream.context, [None if each is None else Bend(*each) for each in moved])
    if count:
        behind = [
            int(end) if each is None else each[0] + int(end) - each[1] for end, each in zip(ends, moved, strict=True)
        ]
        positions = torch.tensor(behind)[:, None] + torch.arange(count)
        reader.step(stream.waiting[:, :count], positions, torch.arange(count) < stream.counts[:, None])
    return reader.hidden


def assert_fresh(stream):
    stream.logits()
    expected = fresh(stream)
    assert (stream.hidden - expected).abs().max() < 1e-4 * expected.abs().max()


def edit(stream, generator) -> None:
    """A random legal edit of the window."""
    context = stream.window().copy()
    legal = moves(context, 8).edits(context)
    room = (context.budget - context.counts)[legal.row] >= K
    legal = legal[~legal.expand | room]
    if len(legal):
        legal[torch.randint(len(legal), (1,), generator=generator)].apply(context)
        stream.context, stream.hidden = context, None


@pytest.mark.parametrize(
    ("rows", "overlap", "changes"),
    [
        (1, 0, 36),
        (1, 8, 36),
        pytest.param(2, 8, 60, marks=pytest.mark.slow),
        *(pytest.param(1, overlap, 1000, marks=pytest.mark.long) for overlap in (0, 8)),
    ],
)
def test_after_many_edits_and_tokens_a_session_is_where_a_fresh_reading_is(controller, ids, rows, overlap, changes):
    stream = controller(**MEGA, overlap=overlap, budget=112).stream(rows)
    stream.append(ids(rows, 380))
    generator, kept, read, moved = torch.Generator().manual_seed(3), 0, 0, 0
    for number in range(changes):
        for token in ids(7, rows, seed=number):
            stream.push(token)
        edit(stream, generator)
        stream.logits()
        kept, read = kept + int(stream.prefill.reused.sum()), read + int(stream.prefill.lengths.sum())
        moved += any(stream.rebase.moved)
        if number % 7 == 0 or number == changes - 1:
            assert_fresh(stream)
    assert int(stream.lengths[0]) > LIMIT and 0 < moved < changes and 0.3 < kept / read < 1


def test_rows_of_different_lengths_take_their_own_tokens(controller, ids):
    stream = controller(**MEGA).stream(2)
    stream.append(ids(2, 200), torch.tensor([200, 90]))
    for number, token in enumerate(ids(40, 2)):
        stream.push(token, torch.tensor([True, number % 3 > 0]))
    assert_fresh(stream)
    assert stream.lengths.tolist() == [240, 116]


def test_while_all_is_live_it_writes_what_plain_attention_writes(controller, ids):
    prompt = ids(1, 30)
    plain, mega = (controller(**s).stream() for s in ({}, MEGA | {"live": 10**6}))
    for stream in (plain, mega):
        stream.append(prompt)
    found = [torch.tensor(list(decode(s, 150, Sampling()))).T for s in (plain, mega)]
    assert torch.equal(*found) and plain.refocuses == mega.refocuses > 10


def test_a_scored_text_has_the_nll_of_tokens_that_are_pushed(controller, ids):
    text = ids(1, 130)
    scored, pushed = (controller(**MEGA).stream() for _ in range(2))
    nll, found = scored.append(text, score=True)[0], []
    for token in text[0]:
        if int(pushed.lengths[0]):
            found.append(-pushed.logits().log_softmax(1)[0, token])
        pushed.push(token[None])
    assert torch.allclose(nll[1:], torch.stack(found), atol=1e-4)


@pytest.mark.parametrize("long", [False, True])
def test_a_session_that_is_saved_and_loaded_goes_on_with_the_same_tokens(controller, ids, tmp_path, long):
    own = controller(**MEGA, overlap=8)
    session = Session(own)
    session.append(ids(600 if long else 150))
    [*session.generate(43)]
    session.save(tmp_path / "saved")
    session.close()
    expected = [piece.token for piece in session.generate(60)]
    assert bool(session.stream.rebase.moved[0]) == long
    with Session.load(tmp_path / "saved", own) as resumed:
        assert isinstance(resumed.stream.prefill, NodePrefill)
        assert [piece.token for piece in resumed.generate(60)] == expected


def test_a_window_comes_back_under_the_other_attention_too(controller, ids, tmp_path):
    session = Session(controller())
    session.append(ids(300))
    [*session.generate(20)]
    session.save(tmp_path / "saved")
    session.close()
    with Session.load(tmp_path / "saved", controller(**MEGA)) as resumed:
        assert torch.equal(resumed.context.lod, session.context.lod)
        assert torch.equal(resumed.context.index, session.context.index)
        resumed.stream.logits()
        assert_fresh(resumed.stream)


def test_adapters_that_are_switched_are_noticed(make_models, ids):
    models = make_models()
    adapt(models.base, rank=4, layers="all")
    for parameter in adapters_of(models.base).values():
        torch.nn.init.normal_(parameter, std=0.3)
    stream = Controller(models, Settings(budget=96, allocator={"protected": 8}, **MEGA)).stream()
    stream.append(ids(1, 200))
    for token in ids(5, 1):
        stream.push(token)
    on = stream.logits()
    with switched_off(models.base):
        off = stream.logits()
        assert_fresh(stream)
    assert not torch.allclose(on, off)
    assert torch.allclose(stream.logits(), on, atol=1e-4)


def test_sessions_are_read_together_with_those_of_their_own_kind(controller, ids):
    streams = [controller(**MEGA).stream() for _ in range(3)]
    streams.append(controller().stream())
    for number, stream in enumerate(streams):
        stream.append(ids(1, 200 + number, seed=number))
        stream.logits()
        stream.lazy = True
    for token in ids(2 * K, 1):
        for stream in streams:
            stream.push(token)
        assert read_together(streams) in (0, 2, 3)  # 0 where a refocus came
        for stream in streams[:3]:
            assert_fresh(stream)


def test_its_telemetry_says_how_many_pairs_are_seen_and_how_many_columns_were_kept(controller, ids):
    events = []
    stream = controller(**MEGA).stream(observers=[events.append])
    stream.append(ids(1, 300))
    for token in ids(4 * K, 1):
        stream.push(token)
    values = [{(m.name, m.attribute): m.value for m in measured(event)} for event in events[1:]]
    mask = stream.settings.mega.pyramid(stream.context).mask
    seen, count = int(mask.dense()[0, 0, ~mask.summary[0]].sum()), int(mask.leaf.sum())
    assert values[-1]["megactx.attention.pairs", None] == pytest.approx(seen / (count * (count + 1) / 2), abs=1e-6)
    assert all(value["megactx.kv.entries", "kept"] > 0 for value in values[1:])
    plain = []
    other = controller().stream(observers=[plain.append])
    other.append(ids(1, 300))
    other.logits()
    assert all(event.pairs is None for event in plain)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"earn": True}, "earn=true is not allowed with attention=mega"),
        ({"graphs": True}, "graphs=true is not allowed with attention=mega"),
        ({"megacontext": "none"}, "attention=mega is not allowed with megacontext=none"),
        ({"segment": 6}, "attention.segment=6 is not allowed"),
        ({"overlap": 20}, "attention.overlap=20 is not allowed"),
        ({"attention": "window"}, "attention=window is not allowed"),
    ],
)
def test_what_does_not_go_with_it_is_refused(controller, settings, said):
    with pytest.raises(ValueError, match=said):
        controller(**MEGA | settings)


def test_parts_are_refused(controller, tmp_path, ids):
    session = Session(controller(**MEGA))
    session.append(ids(100))
    session.save(tmp_path / "saved")
    session.close()
    from megactx.runtime import Wanted

    with pytest.raises(ValueError, match="attention=mega is not allowed with parts"):
        session.use(Wanted("other", str(tmp_path / "saved")))


def test_beyond_the_range_a_place_depends_on_its_address_alone_and_never_goes_back():
    bend, address = Bend(384, 1001), torch.arange(1100)
    places = bend(address, K)
    assert torch.equal(places[:K], torch.arange(K).float()) and (places.diff() > 0).all()
    assert places[1001] == 384 and torch.equal(places[-291:].diff(), torch.ones(290))
    some = torch.tensor([3, 40, 700, 1099])
    assert torch.equal(bend(some, K), places[some])
