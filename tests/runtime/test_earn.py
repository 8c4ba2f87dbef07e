"""Sessions that read the newest tokens unless something older has earned its entries."""

import argparse
import json
import shutil
from dataclasses import replace

import pytest
import torch

from megactx.apps import command_line
from megactx.data.user_turns import UserTurns
from megactx.focus.earned import newest_from
from megactx.focus.finding import FINDS, found_by_keys
from megactx.focus.keys import GOES_ON, KeyNet, Questions, best_below, search
from megactx.lm.masks import CAUSAL
from megactx.memory import MegaContextTree, archive
from megactx.memory.curation_settings import CurationSettings
from megactx.runtime import Controller, Models, Session, Settings, Wanted
from megactx.studies.length_policies import dropping

K, BUDGET, LIMIT = 4, 96, 512
SMALL = dict(budget=BUDGET, allocator={"protected": 8})


@torch.no_grad()
def test_without_an_estimate_a_session_costs_exactly_what_the_newest_tokens_cost(models, ids):
    blind = Models(models.base, models.gistnet, None, "blind")
    for positions, length in (("rebased", 300), ("rebased", 700), ("absolute", 300)):  # 700: past the limit
        history, scored = ids(length), ids(32, seed=1)
        stream = Controller(blind, Settings(BUDGET, "recency", positions, LIMIT, {"protected": 8}, True)).stream()
        stream.append(history[None])
        found = stream.append(scored[None], score=True)[0]
        expected = dropping(models.base, history, scored, BUDGET, K, positions)
        torch.testing.assert_close(found, expected.nll, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_what_is_read_stays_within_the_budget_and_the_base_and_the_map_keeps_all_of_the_history(controller, ids):
    events, stream = [], controller(earn=True).stream(2)

    def seen(event):
        events.append(event)
        stream.context.check()
        assert int(event.read.max()) <= BUDGET and stream.context.ends().tolist() == stream.tree.lengths.tolist()
        assert (event.earned <= BUDGET - K - 8).all() and (event.earned % K == 0).all()

    stream.observers.append(seen)
    assert stream.append(ids(2, 600), score=True)[:, 1:].isfinite().all()
    assert any(int(event.earned.max()) > 0 for event in events)
    questions = stream.questions()
    shown, _ = stream.focus.shown(stream.context, questions)
    places, behind = stream.rebase.close(shown)
    assert (places[:, 1:] > places[:, :-1]).all() and (behind + K <= LIMIT).all()


def test_a_session_that_earns_goes_on_with_the_same_next_token(controller, tmp_path, ids):
    made = controller(earn=True)
    here = Session(made)
    here.append(ids(500))
    expected = here.stream.logits()
    here.save(tmp_path / "here")
    here.close()
    with Session.load(tmp_path / "here", made) as there:
        torch.testing.assert_close(there.stream.logits(), expected, atol=1e-5, rtol=1e-5)


def test_a_session_from_before_the_setting_comes_back_with_its_window(controller, tmp_path, ids):
    here = Session(controller())
    here.append(ids(500))
    window = here.context.copy()
    here.save(tmp_path / "old")
    here.close()
    path = tmp_path / "old" / "session.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["earn"]
    path.write_text(json.dumps(manifest))
    with Session.load(tmp_path / "old", controller()) as there:
        assert torch.equal(there.stream.context.index, window.index)
    with Session.load(tmp_path / "old", controller(earn=True)) as there:
        assert there.stream.context is None  # put together anew


def test_whether_entries_must_be_earned_is_a_setting_that_is_off():
    assert Settings().earn is False and replace(Settings(), earn=True).earn


@pytest.fixture(scope="module")
def keyed(models):
    embeddings = models.base.model.get_input_embeddings().weight
    torch.manual_seed(0)
    keys = KeyNet(embeddings, 32).eval().requires_grad_(False)
    with torch.no_grad():
        keys.null.fill_(12.0)  # of 15: only what is nearly the same stands out
    return replace(models, keys=keys, lensnet=None)


def goes_on(ids):
    """Questions that nobody asked, one of each row."""
    rows = torch.arange(len(ids))
    there, asked = torch.ones_like(ids, dtype=torch.bool), torch.zeros(len(ids), dtype=torch.bool)
    return Questions(ids, there, rows, asked, [[] for _ in ids], [None for _ in ids])


def test_a_refocus_opens_the_one_block_below_the_coarsest_gist_that_the_newest_tokens_ask_for(keyed, ids, tmp_path):
    history = ids(1500)
    history[-K:] = history[400 : 400 + K]  # the question; beside it the newest tokens of the question are others
    made = Controller(keyed, Settings(**SMALL, megacontext="recency", earn=True, keys=4))
    stream = made.stream()
    stream.append(history[None])
    stream.logits()
    context, found = stream.context, search(stream.tree, history[None, -K:])
    assert int(found[0].argmax()) in (100, 374)  # K tokens in all: the block, and the question itself
    at = int((context.starts()[0] <= 400).nonzero().max())
    assert int(context.lod[0, at]) >= 2 and best_below(context, found)[0, at] > keyed.keys.null
    shown, count = stream.focus.shown(context, goes_on(history[None, -K:]))
    assert {400, 401, 402, 403} <= {*shown.index[0][shown.lod[0] == 0].tolist()} and int(count) >= K
    assert shown.counts.tolist() == [BUDGET] and shown.index[0, :K].tolist() == [*range(K)]
    nothing, count = stream.focus.shown(context, goes_on(ids(1, 64, seed=9)))
    assert int(count) == 0 and (nothing.lod == 0).all()
    likest = search(stream.tree, ids(1, 64, seed=9))[0]
    asked, count = stream.focus.shown(context, goes_on(ids(1, 64, seed=9))._replace(asked=torch.tensor([True])))
    assert int(count) == 4 * K and likest.max() < keyed.keys.null  # of what a user asks the likest blocks are read
    before = int(newest_from(context, BUDGET)) // K
    assert {int(likest[1:before].argmax()) + 1} <= {*(asked.index[0] // K).tolist()}


@pytest.mark.parametrize("told", [True, False])
def test_keys_are_asked_what_the_user_said_last_and_not_the_answer_so_far(keyed, ids, told, monkeypatch):
    signs = UserTurns((1, 2), (3, 4)) if told else UserTurns()
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: signs)
    made = Controller(keyed, Settings(**SMALL, megacontext="recency", earn=True, keys=4))
    stream, history = made.stream(), ids(1500)
    asked = history[400 : 400 + K].repeat(2)
    stream.append(torch.cat([history, torch.tensor([1, 2]), asked, torch.tensor([3, 4]), ids(41, seed=7)])[None])
    stream.logits()
    question, there, row, by_user, *_ = stream.questions()
    assert by_user.tolist() == [told] and not row.any()
    newest = [stream.newest(count)[0].tolist() for count in GOES_ON]
    said = [own[here].tolist() for own, here in zip(question, there, strict=True)]
    assert said == ([asked.tolist()] if told else newest)
    shown = stream.shown.index[0][stream.shown.lod[0] == 0]
    assert ({400, 401, 402, 403} <= {*shown.tolist()}) == told


def test_a_question_of_a_history_that_is_shorter_is_all_of_it(keyed, ids):
    made = Controller(keyed, Settings(**SMALL, megacontext="recency", earn=True, keys=4))
    stream = made.stream(2)
    stream.append(ids(2, 20), torch.tensor([20, 7]))
    question, there, row, *_ = stream.questions()
    assert row.tolist() == [0, 0, 1, 1] and there.sum(1).tolist() == [*GOES_ON, 7, 7]
    assert torch.equal(question[2, :7], ids(2, 20)[1, :7])


def test_a_session_without_keys_is_gone_on_with_keys_and_back(keyed, ids, tmp_path):
    plain = Settings(**SMALL, megacontext="recency", earn=True)
    with Session(Controller(keyed, plain)) as session:
        session.append(ids(300))
        session.save(tmp_path / "talk")
    with Session.load(tmp_path / "talk", Controller(keyed, replace(plain, keys=2))) as session:
        assert session.tree.levels[1].whole("key").shape == (1, 75, 32)
        session.append(ids(40))
        session.save()
    with Session.load(tmp_path / "talk", Controller(keyed, plain)) as session:
        assert session.length == 341 and "key" not in session.tree.levels[1].columns


def asking(keyed, ids, keys=24):
    """A session of 1,501 tokens."""
    session = Session(Controller(keyed, Settings(**SMALL, megacontext="recency", earn=True, keys=keys)))
    session.append(ids(1500))
    return session


def ask(session, block):
    """The newest tokens are those of a block, again and again."""
    session.append(session.ids(block * K, block * K + K).repeat(20), score=True)


def test_a_block_that_keys_bring_counts_as_opened_and_a_live_plan_leaves_it(keyed, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "RECENT", 200)
    session = asking(keyed, ids)
    session.save(tmp_path / "talk")
    assert not session.tree.levels[1].whole("opened").any()
    ask(session, 100)
    opened = session.tree.levels[1].whole("opened")[0].nonzero()[:, 0].tolist()
    assert 100 in opened and len(opened) < 12 and max(opened) < 360  # none that is merely new
    before = int(session.tree.levels[1].whole("opened")[0, 100])
    session.stream.hidden = None
    session.stream.logits()  # the same reading again
    assert int(session.tree.levels[1].whole("opened")[0, 100]) == before
    session.curate(CurationSettings(policies={"unread": {"behind": 0}}))
    assert session.curate_now() > 0
    floors = session.tree.levels[1].whole("floor")[0]
    assert not floors[opened].any() and floors[1:300].sum() > 250
    session.close()


def test_blocks_that_are_read_anyway_take_no_place_of_those_that_keys_find(keyed, ids):
    session = asking(keyed, ids, keys=2)
    told = torch.cat([session.ids(100 * K, 101 * K), session.ids(200 * K, 200 * K + 1)])
    session.append(told.repeat(16), score=True)  # its own blocks are as like it as block 100, or more
    context, newest = session.context, session.stream.newest(64)
    like = search(session.tree, newest)[0]
    before = int(newest_from(context, BUDGET)) // K
    assert like[before:].sort(descending=True).values[1] > like[100] > keyed.keys.null
    found = found_by_keys(context, goes_on(newest), 2, BUDGET, session.stream.focus.allocator.protected)[0]
    assert 100 in found and max(found) <= before
    shown = session.stream.shown
    assert {*range(100 * K, 101 * K)} <= {*shown.index[0][shown.lod[0] == 0].tolist()}
    session.close()


def test_without_keys_only_what_stands_where_the_text_stood_before_counts_as_opened(keyed, ids):
    session = asking(keyed, ids, keys=0)
    session.append(ids(100, seed=8), score=True)
    assert not session.tree.levels[1].whole("opened").any()
    ask(session, 100)
    assert {*session.tree.levels[1].whole("opened")[0].nonzero()[:, 0].tolist()} <= {99, 100, 101}


def test_keys_do_not_bring_the_block_behind_one_that_they_find_where_it_was_taken_away(
    keyed, ids, tmp_path, monkeypatch
):
    monkeypatch.setattr(archive, "RECENT", 200)
    session = asking(keyed, ids)
    session.save(tmp_path / "talk")
    action = {"start": 101 * K, "stop": 110 * K, "action": "compact", "floor": 1, "reason": "a test", "bytes": 0}
    session.stream.keeper.do([action])
    ask(session, 100)
    shown = session.stream.shown
    raw = {*shown.index[0][shown.lod[0] == 0].tolist()}
    assert {*range(100 * K, 101 * K)} <= raw and not raw & {*range(101 * K, 110 * K)}
    session.close()


@pytest.mark.parametrize(
    ("allocator", "told"),
    [
        ({"swap": 1}, "allocator.swap is not known, allowed are threshold, max_edits"),
        ({"threshold": "x"}, "allocator.threshold=x is not allowed"),
        ({"max_edits": 1}, "allocator.max_edits=1 is not allowed"),
    ],
)
def test_a_setting_of_the_allocator_is_refused_before_a_session_begins(allocator, told):
    with pytest.raises(ValueError, match=told):
        Settings(allocator=allocator)


@pytest.mark.parametrize(
    "newest, long, first", [(64, 0, 1442), (64, 60, 1502), (0, 0, 1500), (0, 60, 1500), (0, 61, 1503)]
)
def test_few_of_the_newest_tokens_are_read_beside_what_a_user_asks_for_while_the_answer_grows(
    newest, long, first, keyed, ids, monkeypatch
):
    """They are counted up to the end of what was asked, or from its beginning; without a question all that has room is
    read."""
    signs = UserTurns((1, 2), (3, 4))
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: signs)
    settings = Settings(**(SMALL | {"budget": 200}), megacontext="recency", earn=True, keys=6, newest=newest)
    stream = Controller(keyed, settings).stream()
    history = ids(1500)
    stream.append(history[None])
    stream.logits()
    assert int(stream.shown.counts) > 190
    asked = torch.cat([ids(long, seed=3), history[400 : 400 + K]])
    stream.append(torch.cat([torch.tensor([1, 2]), asked, torch.tensor([3, 4])])[None])
    widest = 0
    for token in ids(50, seed=5).tolist():
        stream.logits()
        raw = {*stream.shown.index[0][stream.shown.lod[0] == 0].tolist()}
        assert first == min(at for at in raw if {*range(at, stream.tree.lengths.item())} <= raw)
        assert {*range(K)} <= raw and (long or {*range(400, 400 + K)} <= raw)
        assert int(stream.shown.counts) == len(raw) <= K + 6 * K + int(stream.tree.lengths) - first
        widest = max(widest, int(stream.tree.lengths) - first)
        stream.push(torch.tensor([token]))
    assert widest >= newest + 50 - K


def test_a_found_block_that_reaches_into_the_question_is_read_once(keyed, ids, monkeypatch):
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4)))
    monkeypatch.setattr("megactx.runtime.focusing.found_by_keys", lambda *given: [[375, 100]])
    settings = Settings(**(SMALL | {"budget": 200}), megacontext="recency", earn=True, keys=6, newest=0)
    stream = Controller(keyed, settings).stream()
    stream.append(torch.cat([ids(1501), torch.tensor([1, 2]), ids(9, seed=3), torch.tensor([3, 4])])[None])
    stream.logits()
    assert stream.shown.index[0].tolist() == [*range(K), *range(400, 404), 1500, *range(1501, 1514)]


@torch.no_grad()
@pytest.mark.parametrize("positions", ["rebased", "absolute"])
def test_tokens_with_gaps_are_read_as_one_text(keyed, ids, positions, monkeypatch):
    """What is found stands right before the newest tokens, however far back it was, but for absolute positions."""
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4)))
    settings = Settings(**(SMALL | {"budget": 200}), megacontext="recency", earn=True, keys=6, positions=positions)
    stream = Controller(keyed, settings).stream()
    history, base = ids(300), keyed.base

    def read(text, place):
        place = torch.arange(len(text)) if positions == "rebased" else place
        return base.logits(base(base.embed(text)[None], place[None], CAUSAL)[:, -1]).float()

    stream.append(history[None])
    nobody = stream.logits(), stream.shown
    stream.append(torch.cat([torch.tensor([1, 2]), history[40 : 40 + K], torch.tensor([3, 4])])[None])
    for token in (7, 8, 9, 10, 11):
        told = stream.logits(), stream.shown
        kept = told[1].index[0][told[1].lod[0] == 0]
        assert {*range(40, 40 + K)} <= {*kept.tolist()} and 300 <= kept.max() and len(kept) < 210
        waits = stream.newest(int(stream.lengths))[0, int(stream.tree.lengths) :]
        text = torch.cat([stream.tree.tokens[0][kept].long(), waits])
        place = torch.cat([kept, kept.max() + 1 + torch.arange(len(waits))])
        torch.testing.assert_close(told[0], read(text, place), atol=1e-4, rtol=1e-4)
        stream.push(torch.tensor([token]))
    kept = nobody[1].index[0]  # of text that goes on, too
    assert int(kept[-1]) == 299 > len(kept)
    torch.testing.assert_close(nobody[0], read(history[kept], kept), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("newest", [None, 64, 0])
def test_the_first_question_of_a_talk_opens_a_block_of_a_part(keyed, ids, newest, tmp_path, monkeypatch):
    """There is room for it, though the talk has no tokens yet that could give way."""
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4)))
    told = ids(1, 900, seed=3)
    MegaContextTree.from_tokens(told, keyed.gistnet, keyed.base, keys=keyed.keys).save(tmp_path / "library")
    settings = Settings(**(SMALL | {"budget": 240}), megacontext="recency", earn=True, keys=6, newest=newest)
    parts = [Wanted("library", tmp_path / "library", 0.4)]
    with Session(Controller(keyed, settings), parts=parts) as session:
        session.append(torch.cat([torch.tensor([1, 2]), told[0, 400 : 400 + K], torch.tensor([3, 4])]))
        session.stream.logits()
        shown, seen = session.stream.shown, session.stream.seen
        raw = shown.index[0][shown.lod[0] == 0]
        own = raw[seen.part_of(raw) == 1]
        assert {*range(400, 400 + K)} <= {*raw[seen.part_of(raw) == 0].tolist()}
        assert (own - seen.sink).tolist() == [*range(session.length)] and int(shown.counts) == len(raw)


@pytest.mark.parametrize("told", [True, False])
def test_a_session_that_goes_on_in_the_middle_of_an_answer_reads_what_it_had_read(
    keyed, ids, told, tmp_path, monkeypatch
):
    """Question and answer are longer than what is looked at, so at one place the question is out of sight."""
    signs = UserTurns((1, 2), (3, 4)) if told else UserTurns()
    monkeypatch.setattr("megactx.data.user_turns.UserTurns.of", lambda tokenizer: signs)
    settings = Settings(**(SMALL | {"budget": 200}), megacontext="recency", earn=True, keys=6, newest=64)
    with Session(Controller(keyed, settings)) as session:
        session.append(torch.cat([ids(1500), torch.tensor([1, 2]), ids(200, seed=3), torch.tensor([3, 4])]))
        for count, token in enumerate(ids(64, seed=5).tolist()):
            expected = session.stream.logits()
            if count in (1, 3, 51, 52, 53, 54, 55, 61):
                session.save(tmp_path / "talk")
                shutil.copytree(tmp_path / "talk", tmp_path / f"copy{count}")
                with Session.load(tmp_path / f"copy{count}", Controller(keyed, settings)) as other:
                    torch.testing.assert_close(other.stream.logits(), expected, rtol=1e-4, atol=1e-4)
            session.stream.push(torch.tensor([token]))


def test_keys_need_a_net_and_a_window_that_is_earned(models):
    with pytest.raises(ValueError, match="newest=99 is not allowed without keys"):
        Settings(earn=True, newest=99)
    with pytest.raises(ValueError, match="newest=9 is not allowed: 0, the question alone, or at least 64"):
        Settings(earn=True, keys=4, newest=9)
    with pytest.raises(ValueError, match="keys=2 is not allowed without earn=true"):
        Settings(keys=2)
    with pytest.raises(
        ValueError, match="keys=2 is not allowed: there are no keys in small; megactx.studies.keys trains some"
    ):
        Controller(models, Settings(**SMALL, earn=True, keys=2))


def test_commands_ask_for_earned_windows_and_keys(keyed, monkeypatch):
    parser = argparse.ArgumentParser()
    command_line.add_models(parser)
    monkeypatch.setattr(command_line, "load_models", lambda path, setting: keyed)
    for given, earn, keys in (([], False, 0), (["--earn"], True, 0), (["--earn", "--keys", "3"], True, 3)):
        args = parser.parse_args(["--budget", "448", *given])
        args.megacontext = "recency"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(command_line, "quiet_libraries", lambda: None)
            settings = command_line.controller_of(args).settings
        assert (settings.earn, settings.keys) == (earn, keys)


def test_a_user_who_asks_is_shown_the_two_likest_places_however_much_has_room(keyed, ids):
    """What is alike confuses a base. A place is a block with those beside it, so the second is not beside the first."""
    session = asking(keyed, ids, keys=24)
    context, protected = session.context, session.stream.focus.allocator.protected
    for question in (session.ids(400, 404), ids(16, seed=9)):
        asked = goes_on(question[None])._replace(asked=torch.tensor([True]))
        (found,) = found_by_keys(context, asked, 24, BUDGET, protected)
        before = min(int(newest_from(context, BUDGET)) + 24 * K, 1501 // K * K - protected) // K
        like = search(session.tree, question[None])[0][:before].double()
        places: list[int] = []
        for block in like.argsort(descending=True).tolist():
            if len(places) < FINDS and all(abs(block - other) > 1 for other in places):
                places.append(block)
        assert {*found} == {at for block in places for at in (block - 1, block, block + 1) if at >= 0}
        assert found[:2] == [places[0], places[0] + 1] and FINDS == 2
    session.close()
