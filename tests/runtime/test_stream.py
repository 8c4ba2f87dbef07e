"""Histories that go on: past the trained range, within the budget, whole whatever happens."""

import pytest
import torch
import torch.nn.functional as F

from megactx.focus import moves
from megactx.runtime import Controller, Sampling, Settings
from megactx.runtime.controller import decode
from megactx.runtime.focusing import Known

K, PROTECTED, LIMIT = 4, 8, 512


def greedy(stream, count):
    """-> [B, count]"""
    return torch.tensor(list(decode(stream, count, Sampling()))).T


def plain_nll(base, ids):
    """ids [1, T] -> [T - 1], by the model itself."""
    logits = base.model(input_ids=ids).logits[0, :-1].float()
    return F.cross_entropy(logits, ids[0, 1:], reduction="none")


def test_with_focus_off_decoding_equals_the_plain_model_while_the_history_fits(models, controller, ids):
    prompt, base = ids(1, 40), models.base
    expected = base.model.generate(input_ids=prompt, max_new_tokens=50, do_sample=False, pad_token_id=1)[0, 40:]
    for kind in ("recency", "none"):
        assert torch.equal(controller(kind).generate(prompt, 50)[0], expected), kind


@pytest.mark.parametrize("every", [3, 50])  # more blocks than the reserve has room for
def test_edits_come_every_so_many_blocks_and_where_room_is_made_and_between_nothing_is_read_again(
    controller, ids, every
):
    events = []
    stream = controller(edit_every=every).stream(observers=[events.append])
    stream.append(ids(1, 300))
    stream.logits()
    events.clear()
    since = stream.since
    for token in ids(1, 40 * K, seed=1)[0]:
        stream.push(token[None])
    due = []
    for event in events:
        since += 1
        due.append(since >= every or event.room is not None)
        since = 0 if due[-1] else since
    assert [event.scores is not None for event in events] == due and (10 if every == 3 else 3) < sum(due) < 30
    assert sum(event.room is not None for event in events) > 3
    assert sum(len(event.edits) for event in events if event.edits is not None) > 0
    for event, edited in zip(events, due, strict=True):
        assert edited or torch.equal(event.reused, event.read)


def test_with_focus_off_the_embedded_model_decodes_as_it_does_alone():
    from megactx.runtime import load_models

    models = load_models(device="cpu")
    prompt = torch.tensor([[0, *models.base.tokenizer("def read(path):\n    with open(", verbose=False)["input_ids"]]])
    expected = models.base.model.generate(input_ids=prompt, max_new_tokens=70, do_sample=False)
    found = Controller(models, Settings(budget=512, megacontext="recency")).generate(prompt, 70)[0]
    assert torch.equal(found, expected[0, prompt.shape[1] :])


@torch.no_grad()
def test_without_megacontext_the_logits_are_those_of_the_plain_model_bit_for_bit(models, controller, ids):
    stream, prompt = controller("none").stream(2), ids(2, 30)
    stream.append(prompt)
    for _ in range(5):
        assert torch.equal(stream.logits(), models.base.model(input_ids=stream.tokens).logits[:, -1]) or torch.allclose(
            stream.logits(), models.base.model(input_ids=stream.tokens).logits[:, -1], atol=1e-5
        )
        stream.push(stream.logits().argmax(-1))
    whole = controller("none").stream(2)
    whole.append(prompt)
    assert torch.equal(whole.logits(), models.base.model(input_ids=prompt).logits[:, -1])


@torch.no_grad()
def test_without_megacontext_a_history_beyond_the_base_is_refused(controller, ids):
    stream = controller("none").stream()
    stream.append(ids(1, LIMIT))
    with pytest.raises(ValueError, match=f"{LIMIT + 1} tokens, megacontext=none takes at most {LIMIT}"):
        stream.push(torch.tensor([5]))
    with pytest.raises(ValueError, match="rows of one length"):
        controller("none").stream(2).append(ids(2, 5), torch.tensor([5, 3]))


@torch.no_grad()
def test_scores_of_known_tokens_are_those_of_the_plain_model_while_they_fit(models, controller, ids):
    tokens = ids(1, 60)
    expected = plain_nll(models.base, tokens)
    for kind in ("recency", "focus", "none"):
        stream = controller(kind).stream()
        parts = [stream.append(part, score=True)[0] for part in tokens.split([1, 2, 30, 27], dim=1)]
        found = torch.cat(parts)
        assert found[0].isnan() and torch.allclose(found[1:], expected, atol=1e-4), kind


def test_scored_or_pushed_or_appended_tokens_leave_the_same_history_and_logits(controller, ids):
    tokens, logits = ids(1, 50), []
    for how in ("scored", "pushed", "appended"):
        stream = controller("recency").stream()
        if how == "pushed":
            for token in tokens[0]:
                stream.push(token[None])
        else:
            stream.append(tokens, score=how == "scored")
        assert int(stream.lengths) == 50
        logits.append(stream.logits())
    assert torch.allclose(logits[0], logits[1], atol=1e-4) and torch.allclose(logits[0], logits[2], atol=1e-4)


LONG = [(kind, positions) for kind in ("recency", "focus") for positions in ("rebased", "absolute")]


@pytest.mark.parametrize(
    ("kind", "positions", "tokens"),
    [pytest.param("focus", "rebased", 560, marks=pytest.mark.slow), ("recency", "absolute", 560)]
    + [pytest.param(*pair, 1200, marks=pytest.mark.long) for pair in LONG],
)
def test_past_the_trained_range_every_window_keeps_its_invariants(controller, ids, kind, positions, tokens):
    events, stream = [], controller(kind, positions=positions).stream()

    def seen(event):
        events.append(event)
        context = stream.context
        context.check()
        assert int(context.counts[0]) <= 96 and context.ends().tolist() == stream.tree.lengths.tolist()
        assert (context.lod[0, -PROTECTED:] == 0).all() and context.lod[0, :K].tolist() == [0] * K
        places, behind = stream.rebase.place(context)
        assert (places[0, 1:] > places[0, :-1]).all()
        assert positions == "absolute" or int(behind) + K <= LIMIT

    stream.observers.append(seen)
    history = ids(1, tokens)
    nll = stream.append(history, score=True)
    assert nll[0, 1:].isfinite().all() and torch.equal(stream.tree.tokens.long(), history)
    assert len(events) == tokens // K and events[-1].tokens.tolist() == [tokens]
    largest = stream.prefill.bytes()
    assert largest < 2 * 96 * (2 * 2 * 32 + 40) * 4  # keys and values of 2 layers; embeddings and so on
    reuse = sum(event.reuse for event in events) / len(events)
    assert 0.1 < reuse < 1
    if kind == "focus":
        assert sum(len(event.edits) for event in events if event.edits is not None) > 10
        assert any(event.room is not None for event in events) and not any(e.started for e in events[1:])
        rates = torch.tensor([float(e.telemetry.swap_rate[0]) for e in events if e.telemetry is not None])
        assert rates.max() <= 4 * K / 60 and rates.mean() < 0.25
    utilisation = torch.tensor([event.utilisation[0] for event in events[40:]])
    assert utilisation.min() > 0.6 and utilisation.mean() > 0.8


def test_the_tree_of_a_stream_is_the_tree_of_its_tokens(controller, ids):
    stream, tokens = controller().stream(), ids(1, 300)
    stream.append(tokens[:, :100], score=True)
    stream.append(tokens[:, 100:150])
    stream.append(tokens[:, 150:])
    expected = controller().build_tree(tokens)
    for lod in range(1, expected.depth + 1):
        assert torch.equal(stream.tree.gists(lod), expected.gists(lod))


def test_a_batch_decodes_as_each_of_its_rows_alone(controller, ids):
    prompts = ids(3, 480)
    for kind, lengths in (("recency", [480, 37, 5]), ("focus", [480, 130, 97])):
        lengths = torch.tensor(lengths)
        together = controller(kind).generate(prompts, 18, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = controller(kind).generate(prompts[row : row + 1, :length], 18)[0]
            assert torch.equal(together[row], alone), (kind, row)


def test_a_row_ends_with_a_stop_token_and_the_others_go_on(controller, ids):
    prompts = ids(2, 30)
    free = controller("recency").generate(prompts, 30)
    stop = int(free[0][6])
    first = free[0].tolist().index(stop)
    found = controller("recency").generate(prompts, 30, stop=[stop])
    assert torch.equal(found[0], free[0][: first + 1])
    other = free[1].tolist()
    assert found[1].tolist() == (other[: other.index(stop) + 1] if stop in other else other)


class Refusal(BaseException):
    """As Ctrl-C: nothing catches it on the way."""


@pytest.mark.parametrize(
    "where", ["base", "tree", *(pytest.param(one, marks=pytest.mark.slow) for one in ("lensnet", "allocator", "room"))]
)
def test_a_stop_in_the_middle_of_a_refocus_loses_nothing(models, controller, ids, monkeypatch, where):
    stream, tokens = controller().stream(), ids(1, 400)
    stream.append(tokens[:, :240])
    stream.append(tokens[:, 240:301], score=True)

    def stopped(*arguments, **settings):
        raise Refusal

    part, name = {
        "lensnet": (stream.focus.lensnet, "forward"),
        "allocator": (stream.focus.allocator, "refocus"),
        "room": (stream.focus, "take"),
        "base": (stream.prefill, "_pass"),
        "tree": (stream.tree, "append"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(part, name, stopped)
        with pytest.raises(Refusal):
            stream.append(tokens[:, 301:350], score=True)
    taken = int(stream.lengths)
    assert 301 <= taken <= 304
    stream.append(tokens[:, taken:350], score=True)
    assert torch.equal(stream.newest(350), tokens[:, :350])
    stream.context.check()
    fresh = controller().stream(tree=stream.tree)
    fresh.restore(stream.context.copy())
    fresh.rebase.moved = stream.rebase.moved
    fresh.waiting, fresh.counts = stream.waiting, stream.counts
    assert torch.allclose(stream.logits(), fresh.logits(), atol=1e-4)


def test_a_lensnet_that_says_nan_is_refused_and_nothing_is_lost(models, controller, ids, monkeypatch):
    stream = controller().stream()
    stream.append(ids(1, 100))
    broken = lambda *arguments: torch.full((1, arguments[1].shape[1], 2), torch.nan)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(models.lensnet, "forward", broken)
        with pytest.raises(ValueError, match="lensnet: its values are NaN"):
            stream.append(ids(1, 30, seed=1))
    assert int(stream.lengths) == 130 and stream.logits().isfinite().all()


def test_tokens_that_the_base_cannot_embed_are_refused_before_anything_is_taken(controller, ids):
    stream = controller().stream()
    with pytest.raises(ValueError, match="a row has no token yet"):
        stream.logits()
    stream.append(ids(1, 10))
    for score in (True, False):
        with pytest.raises(ValueError, match="id 512 is not allowed"):
            stream.append(torch.tensor([[3, 512]]), score=score)
    with pytest.raises(ValueError, match=r"tokens have shape \[2, 3\]"):
        stream.append(ids(2, 3))
    with pytest.raises(ValueError, match="a row has no token yet"):
        controller().stream(2).append(ids(2, 3), torch.tensor([3, 0]))
    assert int(stream.lengths) == 10


def test_an_event_tells_what_a_refocus_did(controller, ids):
    events = []
    stream = controller().stream(observers=[events.append])
    stream.append(ids(1, 280))
    stream.append(ids(1, 120, seed=1), score=True)
    for event, after in zip(events[2:], events[3:], strict=False):
        assert torch.equal(event.after[0].lod, after.before[0].lod) and after.number == event.number + 1
    event = next(e for e in events[2:] if e.room is not None and len(e.edits))
    assert {"decode", "gist", "room", "score", "allocate", "read"} <= {*event.seconds}
    assert min(event.seconds.values()) >= 0 and event.scores.score.shape[1] == len(event.scored[0].lod)
    step = event.step()
    assert step.after is event.after[0] and len(step.edits) == len(event.edits)
    changed = sum(K - 1 if e else 1 - K for e in event.edits.expand.tolist())
    assert len(event.after[0].lod) - len(event.scored[0].lod) == changed
    assert len(event.scored[0].lod) - len(event.before[0].lod) == K - (K - 1) * len(event.room)


def test_a_long_append_starts_the_window_anew_and_a_short_one_does_not(controller, ids):
    events = []
    stream = controller().stream(observers=[events.append])
    stream.append(ids(1, 1000))
    assert events == [] and stream.window().ends().tolist() == [1000]
    assert [event.started.tolist() for event in events] == [[True]]
    stream.append(ids(1, 30))
    assert not any(event.started for event in events[1:]) and stream.context.ends().tolist() == [1030]
    assert [int(event.new) for event in events[1:]] == [12, 12, 6]  # a reserve at a time


def test_the_verbs_of_the_controller_work_one_by_one(controller, ids):
    own = controller()
    tree = own.build_tree(ids(2, 500), torch.tensor([500, 200]))
    context = own.assemble(tree)
    assert (context.counts <= 96 - 12).all() and context.ends().tolist() == [500, 200]
    edits = own.refocus(context)
    context.check()
    assert edits is not None and controller("recency").refocus(context) is None
    with pytest.raises(ValueError, match="megacontext=none has no tree"):
        controller("none").build_tree(ids(1, 5))


def test_a_window_without_a_lensnet_falls_back_to_recency_and_says_so(models):
    from megactx.runtime import Models

    own = Controller(Models(models.base, models.gistnet), Settings(budget=96, allocator={"protected": 8}))
    assert "no LensNet" in own.notes[0] and own.stream().focus.lensnet is None
    with pytest.raises(ValueError, match="there is no GistNet"):
        Controller(Models(models.base), Settings(budget=96))


def test_settings_that_cannot_work_are_refused_by_name(models, controller):
    with pytest.raises(ValueError, match="budget=40 is not allowed: at least 87 entries"):
        controller(budget=40)
    with pytest.raises(ValueError, match="budget=510 is not allowed: at most 504"):
        controller(budget=510)
    controller(budget=510, positions="absolute")
    for wrong in (dict(megacontext="on"), dict(positions="relative"), dict(budget=0), dict(limit=0)):
        (name,) = wrong
        with pytest.raises(ValueError, match=f"{name}="):
            Settings(**wrong)
    with pytest.raises(ValueError, match="max_tokens=-1"):
        controller().generate(torch.tensor([[3]]), -1)


def test_the_least_budget_holds_the_coarsest_view_of_any_history(models, ids):
    settings = Settings(budget=87, megacontext="recency", allocator={"protected": 8})
    stream = Controller(models, settings).stream()
    sizes, history = [], ids(1, 3000)
    for part in history.split(500, dim=1):
        stream.append(part)
        sizes.append(int(stream.window().counts))
        assert (stream.context.lod[0, -PROTECTED:] == 0).all()
    assert max(sizes) <= 87


@pytest.fixture
def plain(models):
    """-> a controller of the base LM alone, whose window drops."""
    from megactx.runtime import Models

    def make(budget=160, **settings):
        return Controller(Models(models.base), Settings(budget=budget, megacontext="recency", **settings))

    return make


@torch.no_grad()
def test_recency_without_a_gistnet_is_the_plain_model_until_it_drops(models, plain, ids):
    own, tokens = plain(), ids(1, 150)
    assert "dropped, not compressed" in own.notes[0] and "at most 160" in own.notes[0]
    stream = own.stream()
    found = torch.cat([stream.append(part, score=True)[0] for part in tokens.split([1, 49, 100], dim=1)])
    assert torch.allclose(found[1:], plain_nll(models.base, tokens), atol=1e-4)
    assert torch.allclose(stream.logits(), models.base.model(input_ids=tokens).logits[:, -1], atol=1e-4)


@torch.no_grad()
def test_recency_without_a_gistnet_keeps_the_sink_and_the_newest_past_all_positions(models, plain, ids):
    stream, tokens = plain().stream(), ids(1, 3 * LIMIT)
    stream.append(tokens)  # what is dropped at once is not read
    seen = torch.cat([tokens[:, :32], tokens[:, -(160 - 20 - 32) :]], dim=1)
    assert torch.allclose(stream.logits(), models.base.model(input_ids=seen).logits[:, -1], atol=1e-4)
    for token in ids(45, seed=1):
        stream.push(token[None])
        assert stream.cache.get_seq_length() <= 160
        seen = torch.cat([seen, token[None, None]], dim=1)
        if seen.shape[1] > 160:
            seen = torch.cat([seen[:, :32], seen[:, -1 - (160 - 20 - 32) :]], dim=1)
        assert torch.allclose(stream.logits(), models.base.model(input_ids=seen).logits[:, -1], atol=1e-4)
    assert stream.lengths.tolist() == [3 * LIMIT + 45]
    assert torch.equal(stream.tokens[:, : 3 * LIMIT], tokens)


@torch.no_grad()
def test_recency_without_a_gistnet_scores_as_it_decodes(plain, ids):
    tokens = ids(1, 400)
    scored, pushed = plain().stream(), plain().stream()
    found = scored.append(tokens, score=True)[0]
    for place, token in enumerate(tokens[0]):
        if place:
            assert found[place].isclose(-pushed.logits().log_softmax(1)[0, token], atol=1e-4), place
        pushed.push(token[None])


def test_recency_without_a_gistnet_refuses_what_it_cannot_do(models, plain, ids, tmp_path):
    from megactx.runtime import Models, Session

    own = plain(budget=4096)
    assert own.settings.budget == LIMIT and f"at most {LIMIT}" in own.notes[0]
    with pytest.raises(ValueError, match="budget=100 is not allowed: at least 128"):
        plain(budget=100)
    with pytest.raises(ValueError, match="positions=absolute is not allowed without a GistNet"):
        plain(positions="absolute")
    with pytest.raises(ValueError, match="recency without a GistNet has no tree"):
        own.build_tree(ids(1, 5))
    with pytest.raises(ValueError, match="recency without a GistNet keeps no tree"):
        Session(own).save(tmp_path / "session")
    with pytest.raises(ValueError, match="megacontext=recency drops old text instead"):
        Controller(Models(models.base), Settings())


def test_text_that_the_window_does_not_follow_makes_no_window_before_it_is_needed(models, controller, ids):
    events, text = [], ids(1, 300)
    pieces, whole = controller().stream(observers=[events.append]), controller().stream()
    for piece in text.split(50, dim=1):
        pieces.append(piece, follow=False)
    assert not events and pieces.context is None
    whole.append(text)
    assert torch.equal(pieces.tree.tokens, whole.tree.tokens) and torch.equal(pieces.tree.gists(2), whole.tree.gists(2))
    assert torch.equal(pieces.logits(), whole.logits()) and len(events) > 0


def test_decoding_at_fixed_shapes_gives_the_same_tokens_windows_and_states(controller, ids):
    prompt = ids(1, 300)
    plain, graph = (controller(graphs=graphs) for graphs in (False, True))
    assert torch.equal(plain.generate(prompt, 40)[0], graph.generate(prompt, 40)[0])
    streams = [own.stream() for own in (plain, graph)]
    for stream in streams:
        stream.append(prompt)
    for token in ids(1, 3 * K + 1, seed=2)[0]:
        for stream in streams:
            stream.push(token[None])
        torch.testing.assert_close(streams[1].logits(), streams[0].logits(), rtol=1e-4, atol=1e-4)
    assert streams[1].prefill.graph is not None and streams[0].prefill.graph is None
    assert torch.equal(streams[0].context.lod, streams[1].context.lod)


def test_lensnet_is_asked_once_a_refocus_and_by_the_newest_tokens(models, controller, ids, monkeypatch):
    stream, asked = controller().stream(), []
    stream.append(ids(1, 400))
    stream.logits()
    score = type(models.lensnet).score

    def counted(net, context, *arguments):
        asked.append((stream.refocuses, int(context.ends()[0]), len(context.lod[0])))
        return score(net, context, *arguments)

    monkeypatch.setattr(type(models.lensnet), "score", counted)
    events = []
    stream.observers.append(events.append)
    for token in ids(1, 16 * K, seed=2)[0]:
        stream.push(token[None])
    assert len({number for number, *_ in asked}) == len(asked) == len(events) and any(
        e.room is not None for e in events
    )
    assert [end for _, end, _ in asked] == [int(event.tokens[0]) for event in events]


def test_where_room_was_made_what_lensnet_said_before_holds_on(models, controller, ids):
    stream = controller().stream()
    stream.append(ids(1, 400))
    focus, context = stream.focus, stream.window().copy()
    context.budget = 10**6
    legal = moves(context, 8)
    scores = focus.score(context, legal)
    known, before = Known.of(context, legal, scores), context.copy()
    leads = legal.leads[0].nonzero()[:, 0]
    kept, gone = int(leads[0]), int(leads[-1])
    lod, index = int(context.lod[0, gone]) + 1, int(context.index[0, gone]) // K
    context.collapse(lod, index)
    now, down, keep = known.holds_for(context, moves(context, 8))
    for column in range(int(context.counts[0])):
        name = (int(context.lod[0, column]), int(context.index[0, column]))
        old = [n for n in range(int(before.counts[0])) if (int(before.lod[0, n]), int(before.index[0, n])) == name]
        if name == (lod, index):
            assert now.expand[0, column] and down[0, column] == scores.v_keep[0, gone]
        elif legal.expand[0, old[0]]:
            assert now.expand[0, column] and down[0, column] == scores.v_down[0, old[0]]
        elif legal.first[0, old[0]] >= 0 and name[0] == int(before.lod[0, kept]):
            assert now.first[0, column] >= 0 and keep[0, column] == scores.v_keep[0, old[0]]
