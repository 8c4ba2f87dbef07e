"""Sessions over several trees: a part is read where it lies, within its share, and may change while a session runs."""

import json
import shutil

import pytest
import torch
from range_server import serving

from megactx.memory import Composite, MegaContextTree, archive, curation, published
from megactx.memory.invariants import violations
from megactx.memory.publishing import publish
from megactx.runtime import Session, Wanted, part_files

K, BUDGET, LIMIT = 4, 240, 512
ROOM = dict(budget=BUDGET)


@pytest.fixture
def saved(models, ids, tmp_path):
    """name, tokens -> the folder of a tree of random tokens."""

    def make(name, tokens, seed=7):
        tree = MegaContextTree.from_tokens(ids(1, tokens, seed=seed), models.gistnet, models.base)
        tree.save(tmp_path / name)
        return tmp_path / name

    return make


def wanted(name, path, share=None):
    return Wanted(name, path, share)


def entries(context, place):
    """(lod, index) of a part's entries, in its own tree."""
    lod, index = context.tree.segments(context)[place]
    return [*zip(lod.tolist(), index.tolist(), strict=True)]


@torch.no_grad()
def test_a_session_over_a_part_reads_what_the_part_and_the_history_read_behind_each_other(
    models, controller, saved, ids
):
    history, part = ids(40, seed=1), ids(1, 60, seed=7)
    session = Session(controller("recency", **ROOM), parts=[wanted("notes", saved("notes", 60))])
    session.append(history)
    assert isinstance(session.context.tree, Composite) and session.length == 41
    assert (session.context.lod == 0).all() and session.context.counts.tolist() == [60 + 41]
    told = torch.cat([part[0], session.ids(0, 1), history])[None]
    expected = models.base.model(input_ids=told).logits[:, -1]
    torch.testing.assert_close(session.stream.logits(), expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(session.ids(1), history)


def within_shares(session):
    """The invariants, and how many entries each part and the session have."""
    context = session.stream.context
    assert not violations(context)
    sizes = [len(lod) for lod, _ in context.tree.segments(context)]
    assert all(size <= cap for size, cap in zip(sizes, context.tree.caps, strict=False))
    assert sizes[-1] <= BUDGET - context.tree.spent and context.tree.spent <= BUDGET // 2
    return sizes


def test_the_folder_of_a_part_may_be_a_string(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Wanted("notes", "saved") == Wanted("notes", tmp_path / "saved")
    assert Wanted("notes", "https://example.org/tree").path == "https://example.org/tree"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["focus", "recency"])
def test_every_refocus_keeps_each_part_within_its_share_and_the_session_its_half(controller, saved, ids, kind):
    events, sizes = [], []
    parts = [wanted("library", saved("library", 900, 3), 0.3), wanted("person", saved("person", 170, 4), 0.15)]
    session = Session(controller(kind, **ROOM), [events.append], parts)
    session.append(ids(500))
    for token in ids(24 * K, seed=2):
        session.stream.push(token[None])
        if session.stream.context is not None and not int(session.stream.counts[0]):
            sizes.append(within_shares(session))
    assert session.stream.logits().isfinite().all() and session.length == 1 + 500 + 24 * K
    assert len(events) > 22 and int(events[-1].tokens[0]) == session.length
    assert all(int(event.new[0]) == K for event in events[2:])
    if kind == "focus":  # each part is worked in, and swaps within its share
        edits = [event.edits for event in events if event.edits is not None]
        numbers = torch.cat([session.stream.seen.part_of(e.index * K**e.lod) for e in edits])
        assert {*numbers.tolist()} == {0, 1, 2}
        assert all(float(event.scores.price[0]) >= 0 for event in events if event.scores is not None)


def test_a_session_with_parts_goes_on_with_the_same_next_token_and_the_same_window(controller, saved, ids, tmp_path):
    made = controller(**ROOM)
    session = Session(made, parts=[wanted("library", saved("library", 900, 3)), wanted("person", saved("person", 170))])
    session.append(ids(300))
    expected, window = session.stream.logits(), session.context.copy()
    session.save(tmp_path / "talk")
    session.close()
    manifest = json.loads((tmp_path / "talk" / "session.json").read_text())
    assert manifest["format"] == 3 and [part["name"] for part in manifest["parts"]] == ["library", "person"]
    with Session.load(tmp_path / "talk", made) as there:
        assert there.stream.context is not None and torch.equal(there.stream.context.index, window.index)
        torch.testing.assert_close(there.stream.logits(), expected, atol=1e-5, rtol=1e-5)
        there.drop("library")
        there.drop("person")
        there.save()
    assert json.loads((tmp_path / "talk" / "session.json").read_text())["format"] == 2
    with Session.load(tmp_path / "talk", made) as there:
        assert there.parts == [] and there.context.tree is there.tree and there.length == 301


def test_a_part_that_is_gone_is_named_in_one_sentence_and_the_session_opens_without_it(controller, saved, tmp_path):
    made, place = controller(**ROOM), saved("library", 900)
    session = Session(made, parts=[wanted("library", place)])
    session.append("Some text, which becomes a few tokens.")
    session.save(tmp_path / "talk")
    session.close()
    shutil.rmtree(place)
    with pytest.raises(ValueError, match=r"talk: part library: .*library.*; --drop NAME opens the session without"):
        Session.load(tmp_path / "talk", made)
    with pytest.raises(ValueError, match="part other: the session has none of this name, there is library"):
        Session.load(tmp_path / "talk", made, without=["other"])
    with Session.load(tmp_path / "talk", made, without=["library"]) as there:
        assert there.parts == [] and "few tokens" in there.text()
    with Session.load(tmp_path / "talk", made, parts=[wanted("library", saved("elsewhere", 400))]) as there:
        assert there.parts[0].tree.lengths.tolist() == [400]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["focus", "recency"])
def test_a_part_swapped_under_a_running_session_is_seen_at_the_next_refocus(models, controller, saved, ids, kind):
    place, events = saved("notes", 200, 3), []
    parts = [wanted("notes", place), wanted("other", saved("other", 90))]
    session = Session(controller(kind, **ROOM), [events.append], parts)
    session.append(ids(150))
    session.stream.logits()
    old, other = entries(session.context, 0), entries(session.context, 1)
    saved("notes", 260, 8)  # another text, written by another process
    waiting = K - int(session.stream.counts[0])
    for token in ids(waiting - 1, seed=2):
        session.stream.push(token[None])
    assert int(session.stream.seen.lengths[0]) - int(session.tree.lengths[0]) == 200 + 90  # no refocus yet
    session.stream.push(ids(1, seed=5))
    session.stream.logits()
    context = session.stream.context
    assert not violations(context) and int(context.ends()[0]) == 260 + 90 + int(session.tree.lengths[0])
    assert entries(context, 0) != old and (kind == "focus" or entries(context, 1) == other)
    new = MegaContextTree.from_tokens(ids(1, 260, seed=8), models.gistnet, models.base)
    for at, (lod, index) in enumerate(entries(context, 0)):
        assert torch.equal(context.to_tensor()[0, at], new.gather(lod, torch.tensor([[index]]))[0, 0]) if lod else True
    assert int(events[-1].new[0]) == K


def test_a_part_that_grows_is_seen_with_its_new_tokens_and_what_is_pinned_stays(controller, models, saved, ids):
    place = saved("notes", 200, 3)
    session = Session(controller(**ROOM), parts=[wanted("notes", place, 0.3)])
    session.append(ids(50))
    version = session.parts[0].version
    tree = MegaContextTree.load(place, models.gistnet, models.base)
    tree.append(ids(1, 40, seed=9))
    tree.save(place)
    session.append(ids(K))
    assert session.context.ends().tolist() == [240 + 55] and session.parts[0].version != version
    session.pin("notes")
    tree.append(ids(1, 40, seed=10))
    tree.save(place)
    session.append(ids(K))
    assert session.context.ends().tolist() == [240 + 59] and session.parts[0].wanted.pinned == session.parts[0].version


def test_parts_come_and_go_while_a_session_runs_and_its_own_entries_stay(controller, saved, ids):
    session = Session(controller(**ROOM))
    session.append(ids(800))
    whole = session.context.copy()
    assert int(whole.counts[0]) > BUDGET // 2
    session.use(wanted("library", saved("library", 900, 3), 0.4))
    assert within_shares(session)[0] > 60
    session.use(wanted("person", saved("person", 40, 4)))
    sizes = within_shares(session)
    assert len(sizes) == 3 and 24 - K < sizes[1] <= 24
    own = entries(session.context, 2)
    session.drop("library")
    assert entries(session.context, 1) == own and [part.name for part in session.parts] == ["person"]
    with pytest.raises(ValueError, match="part library: there is no part of this name, there is person"):
        session.drop("library")
    session.drop("person")
    assert session.context.tree is session.tree and session.stream.logits().isfinite().all()
    for token in ids(20 * K, seed=2):
        session.stream.push(token[None])
    assert not violations(session.context)


def test_a_part_that_does_not_fit_leaves_all_as_it_was(controller, saved, ids, models):
    session = Session(controller(**ROOM), parts=[wanted("library", saved("library", 900, 3), 0.4)])
    session.append(ids(100))
    window = session.context.copy()
    for part, why in (
        (wanted("more", saved("more", 400), 0.2), r"shares of the parts \(library 0.4, more 0.2\)"),
        (wanted("none", saved("more", 400).parent / "none"), "part none: .*none"),
    ):
        with pytest.raises(ValueError, match=why):
            session.use(part)
    assert torch.equal(session.context.index, window.index) and [part.name for part in session.parts] == ["library"]
    with pytest.raises(ValueError, match="positions=absolute is not allowed with parts"):
        Session(controller(positions="absolute", **ROOM), parts=[wanted("library", saved("library", 900, 3))])
    with pytest.raises(ValueError, match="budget=160 is not allowed: the parts take 80 entries of it, and the session"):
        Session(controller(budget=160), parts=[wanted("library", saved("library", 900, 3), 0.5)])
    with pytest.raises(ValueError, match="megacontext=none has no working context that could show parts"):
        Session(controller("none"), parts=[wanted("library", saved("library", 900, 3))])
    with pytest.raises(ValueError, match="a history of 2 rows has none"):
        controller(**ROOM).stream(2).use([wanted("library", saved("library", 900, 3))])


def test_a_part_of_another_gistnet_is_refused(controller, make_models, ids, tmp_path):
    other = make_models(seed=1)
    MegaContextTree.from_tokens(ids(1, 60), other.gistnet, other.base).save(tmp_path / "other")
    with pytest.raises(ValueError, match="part other: .*another GistNet made it"):
        Session(controller(**ROOM), parts=[wanted("other", tmp_path / "other")])


def test_what_cannot_be_opened_any_more_is_read_on_as_it_was_and_told(controller, saved, ids):
    place = saved("notes", 200, 3)
    session = Session(controller(**ROOM), parts=[wanted("notes", place)])
    session.append(ids(50))
    shutil.rmtree(place)
    session.append(ids(K))
    assert session.context.ends().tolist() == [200 + 55] and "notes" in session.parts[0].note
    assert session.stream.logits().isfinite().all()


def test_the_name_the_path_and_the_share_of_a_part_stand_in_one_word(tmp_path):
    assert Wanted.parse(f"notes={tmp_path}:0.25") == Wanted("notes", tmp_path, 0.25)
    assert Wanted.parse(f"notes={tmp_path}/a:b") == Wanted("notes", tmp_path / "a:b")
    assert Wanted.parse("notes=here").path.is_absolute()
    for text in ("notes", "notes=", "=x", "a b=x", "notes=x:0.6", "notes=x:0"):
        with pytest.raises(ValueError, match="part.*is not allowed"):
            Wanted.parse(text)


@torch.no_grad()
def test_what_earns_its_entries_in_parts_is_read_within_their_shares_beside_the_newest_tokens(controller, saved, ids):
    parts = [wanted("library", saved("library", 900, 3), 0.1), wanted("person", saved("person", 170, 4), 0.2)]
    seen = []

    def check(event):
        stream = session.stream
        shown, count = stream.focus.shown(stream.context, stream.questions())
        numbers = stream.seen.part_of(shown.starts()[0])
        sizes = torch.bincount(numbers, minlength=3)
        assert int(sizes[0]) <= 24 and int(sizes[1]) <= 48 and int(shown.counts[0]) <= BUDGET
        first = shown.starts()[0] == stream.seen.sink
        assert first.any() and (shown.positions()[0].diff() > 0).all()
        seen.append(int(sizes[:2].sum()))

    session = Session(controller(earn=True, **ROOM), [check], parts)
    session.append(ids(140))
    assert session.append(ids(60, seed=1), score=True).isfinite().all()
    assert max(seen) > 0


@torch.no_grad()
def test_a_talk_that_has_just_begun_reads_of_a_part_what_earns_its_entries_and_all_of_itself(controller, saved, ids):
    """There is room, so nothing has to give way."""
    session = Session(controller(earn=True, **ROOM), parts=[wanted("library", saved("library", 900, 3), 0.4)])
    session.append(ids(5 * K))
    stream, read = session.stream, []
    for seed in range(8):
        stream.logits()
        shown, _ = stream.focus.shown(stream.context, stream.questions())
        numbers = stream.seen.part_of(shown.starts()[0])
        assert int(shown.counts[0]) <= BUDGET and int((numbers == 1).sum()) == int(stream.tree.lengths)
        read.append(int((numbers == 0).sum()))
        session.append(ids(K, seed=seed))
    assert max(read) > 0


def test_a_part_that_is_curated_under_a_running_session_shows_what_is_left(controller, saved, ids, monkeypatch):
    monkeypatch.setattr(archive, "RECENT", 0)
    place = saved("library", 300, 3)
    session = Session(controller("recency", **ROOM), parts=[wanted("library", place, 0.45)])
    session.append(ids(100))
    session.stream.logits()
    raw = [index for lod, index in entries(session.context, 0) if lod == 0]
    assert len(raw) > 2 * K
    actions = [{"start": 64, "stop": 300, "action": "compact", "floor": 1, "reason": "test", "bytes": 0}]
    curation.Curated(place).apply({"format": 1, "tokens": 300, "actions": actions})
    for token in ids(3 * K, seed=2):
        session.stream.push(token[None])
    assert session.stream.logits().isfinite().all() and not violations(session.stream.context)
    seen = session.stream.seen
    assert seen.compacted == (300 - 64) // K
    assert not [index for lod, index in entries(session.context, 0) if lod == 0 and index >= 64]
    inside = torch.tensor([64 // K - 1, 64 // K, 300 // K - 1])
    nothing = torch.zeros_like(inside)
    assert seen.openable(nothing, nothing + 1, inside).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="part library: of tokens 64 to 71 some were taken away"):
        session.parts[0].text(64, 72)


@pytest.fixture
def published_part(saved, tmp_path, monkeypatch):
    """A server, and the URL of a published tree of 300 tokens."""
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path / "cache"))
    published.kept.cache_clear()
    publish(saved("library", 300, 3), tmp_path / "www" / "library")
    with serving(tmp_path / "www") as server:
        yield server, f"{server.url}/library"
    published.kept.cache_clear()


def test_a_part_at_a_url_is_read_as_the_part_itself(models, controller, published_part, ids, tmp_path):
    server, url = published_part
    told = []
    for place in (tmp_path / "library", Wanted.parse(f"library={url}").path):
        session = Session(controller("focus", **ROOM), parts=[wanted("library", place, 0.4)])
        told.append([session.append(ids(100), score=True), *entries(session.context, 0)])
        session.stream.logits()
    assert torch.equal(told[0][0], told[1][0]) and told[0][1:] == told[1][1:]
    assert any(name.startswith("pages") for name, _ in server.asked)


def test_a_session_is_saved_with_a_part_at_a_url_and_sees_what_is_published_next(
    controller, published_part, ids, tmp_path, saved, monkeypatch
):
    server, url = published_part
    with Session(controller("recency", **ROOM), parts=[wanted("library", url, 0.4)]) as session:
        session.append(ids(60))
        session.save(tmp_path / "talk")
    with Session.load(tmp_path / "talk", controller("recency", **ROOM)) as session:
        (part,) = session.parts
        assert part.wanted.path == url and int(part.tree.lengths[0]) == 300
        publish(saved("library", 340, 4), tmp_path / "www" / "library")
        session.append(ids(K, seed=1))
        assert session.parts[0] is part  # the server is not asked at every refocus
        monkeypatch.setattr(part_files, "EVERY", 0.0)
        session.append(ids(K, seed=2))
        assert int(session.parts[0].tree.lengths[0]) == 340 and not violations(session.context)
        server.status = {"manifest.json": 500}
        session.append(ids(K, seed=3))
        assert "did not come over" in session.parts[0].note


def test_a_server_that_goes_away_is_told_and_the_session_goes_on_when_it_is_back(controller, published_part, ids):
    server, url = published_part
    session = Session(controller("recency", **ROOM), parts=[wanted("library", url, 0.4)])
    session.append(ids(20))
    session.stream.logits()
    tree = session.parts[0].tree
    tree.cache.file.kept, server.dies = None, 0  # neither on this disk nor there
    for level in tree.levels:  # nor in memory
        for page in level.pages:
            page.clear()
    with pytest.raises(published.Unreachable, match=f"{url}: pages-.* did not come over"):
        session.append(ids(K, seed=1))
        session.stream.logits()
    server.dies = None
    session.append(ids(K, seed=2))
    assert session.stream.logits().isfinite().all() and not violations(session.context)
    assert session.length == 1 + 20 + 2 * K


@pytest.mark.parametrize(
    ("text", "path", "share"),
    [
        ("a=http://host:8000", "http://host:8000", None),
        ("a=http://host:8000/tree:0.2", "http://host:8000/tree", 0.2),
        ("a=s3://bucket/tree/", "s3://bucket/tree", None),
        ("a=https://host/tree:.5", "https://host/tree", 0.5),
    ],
)
def test_a_part_may_be_a_url_with_a_port_and_a_share(text, path, share):
    found = Wanted.parse(text)
    assert (found.path, found.share) == (path, share)
