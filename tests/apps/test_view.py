"""What a refocus is for the page, how it gets there, and what a replay is as a file."""

import asyncio
import json
import re
import socket
import threading

import pytest
import torch
from PIL import Image

from megactx.apps.view import frames
from megactx.apps.view.__main__ import main
from megactx.apps.view.feed import KEPT, Feed
from megactx.apps.view.player import Busy, Player
from megactx.memory import MegaContextTree
from megactx.runtime import Sampling, Session, Wanted

TEXT = "def read(path):\n    return path.read_text()\n" * 12
EVIL = "</script><script>alert(1)</script>\u202e\x1b[31m"


@pytest.fixture
def player(controller):
    found = Player(Session(controller()), Sampling()).start()
    yield found
    found.close()


@pytest.fixture
def own(exported, tmp_path):
    """kind of file -> arguments of an export."""
    return lambda kind: ["--model", str(exported), "--budget", "400", "--export", str(tmp_path / f"replay{kind}")]


def entries(runs):
    return torch.tensor([lod for lod, count in runs for _ in range(count)])


def test_a_frame_is_what_the_observer_was_told(controller):
    events = []
    session = Session(controller(), [events.append])
    session.append(TEXT, score=True)
    assert len(events) > 10 and any(len(event.edits) for event in events if event.edits is not None)
    for event in events:
        found = json.loads(json.dumps(frames.frame(event), allow_nan=False))
        assert entries(found["window"]).equal(event.after[0].lod)
        assert found["tokens"] == int(event.tokens[0]) and found["budget"] == 96
        if event.scores is None:
            assert "scores" not in found and found["edits"] == []
            continue
        assert entries(found["scored"]).equal(event.scored[0].lod)
        assert found["scores"] == pytest.approx(event.step().score.tolist(), abs=0.0051)
        kept = event.step().edits
        assert found["edits"] == [[int(e), n, i] for e, n, i in zip(kept.expand, kept.lod, kept.index, strict=True)]


def test_a_frame_has_the_blocks_that_are_near_to_what_is_expected_where_there_is_a_readout(
    foretelling, controller, tmp_path
):
    told = []
    session = Session(
        foretelling(budget=240), [lambda event: told.append((event.foretold.near(), frames.frame(event)))]
    )
    session.append(TEXT)
    for _ in session.generate(12):
        pass
    assert frames.about(session)["expects"] and len(told[-1][0]) == 8
    for near, frame in told:
        assert json.loads(json.dumps(frame))["near"] == [[index, pytest.approx(c, abs=6e-4)] for index, c in near]
    MegaContextTree.from_tokens(torch.arange(2, 302)[None], session.tree.encoder, session.tree.base).save(tmp_path)
    session.use(Wanted("library", tmp_path, 0.3))
    for _ in session.generate(12):
        pass
    near, frame = told[-1]
    first = frame["lanes"][-1][1] // 4
    assert first > 0 and [index for index, _ in frame["near"]] == [first + index for index, _ in near]
    index = near[0][0]
    assert frames.text(session, 1, first + index)["text"] == session.text(4 * index, 4 * index + 4)
    plain = Session(controller(), [lambda event: told.append(frames.frame(event))])
    plain.append(TEXT, score=True)
    assert "near" not in told[-1] and not frames.about(plain)["expects"]


def test_the_text_of_a_node_is_its_beginning_and_its_end_without_controls(controller):
    session = Session(controller())
    session.append(TEXT * 10 + EVIL)
    assert frames.text(session, 1, 3) == {"text": session.text(12, 16), "rest": ""}
    long = frames.text(session, 4, 1)
    assert long == {"text": session.text(256, 416), "rest": session.text(464, 512)}
    last = (session.length - 1) // 4
    assert not {"\u202e", "\x1b"} & {*"".join(frames.text(session, 1, n)["text"] for n in range(last - 9, last + 1))}
    for lod, index in ((1, 10**6), (-1, 0), (10**9, 0), (0, -1)):
        with pytest.raises(ValueError, match="is not in this history"):
            frames.text(session, lod, index)


def followed(feed, after=0):
    async def read():
        return [part async for part in feed.follow(after)]

    return asyncio.run(asyncio.wait_for(read(), 10))


def test_a_feed_gives_what_is_kept_then_what_comes_and_forgets_the_oldest():
    feed = Feed()
    for number in range(KEPT + 5):
        feed.publish({"number": number})
    later = threading.Timer(0.2, lambda: (feed.publish({"number": "late"}), feed.tell(doing="idle"), feed.close()))
    later.start()
    parts = followed(feed)
    seen = [json.loads(part.split("data: ")[1])["number"] for part in parts if part.startswith("event: frame")]
    assert seen == [*range(5, KEPT + 5), "late"] and '"doing": "idle"' in parts[-1]
    ids = [int(re.search(r"id: (\d+)", part)[1]) for part in parts if part.startswith("event: frame")]
    assert [part for part in followed(feed, ids[-2]) if "frame" in part] == [p for p in parts if "late" in p]
    assert len([part for part in followed(feed, 10**9) if "frame" in part]) == KEPT  # it knew another run


def test_a_player_writes_answers_meanwhile_and_refuses_two_at_once(player):
    player.say(TEXT, 5000)
    with pytest.raises(Busy):
        player.say("more", 1)
    while player.feed.state.get("doing") != "writing":
        player.ask(lambda: None).result(30)
    assert player.ask(lambda: frames.text(player.session, 1, 0)).result(30)["text"]
    player.stop()
    player.wait()
    state = player.feed.state
    assert state["doing"] == "idle" and state["tokens"] == player.session.length < 5000
    assert [kind for kind, _ in state["written"]] == ["in", "out"] and state["written"][0][1] == TEXT
    assert player.feed.count == player.session.stream.refocuses


def test_what_fails_is_shown_and_the_next_thing_works(player, monkeypatch):
    monkeypatch.setattr(player.session, "generate", lambda *_: 1 / 0)
    player.say(TEXT, 5)
    player.wait()
    assert "ZeroDivisionError" in player.feed.state["error"] and player.feed.state["doing"] == "idle"
    monkeypatch.undo()
    player.say("", 5)
    player.wait()
    assert player.feed.state["error"] is None


def test_a_session_that_is_gone_on_with_shows_its_window_and_its_newest_text(controller, tmp_path):
    with Session(controller()) as session:
        session.append(TEXT)
        session.save(tmp_path / "kept")
    with Session.load(tmp_path / "kept", controller()) as session:
        player = Player(session, Sampling()).start()
        player.wait()
        (found,) = player.feed.frames
        assert entries(found["window"]).equal(session.context.lod[0]) and player.feed.state["written"][0][0] == "in"
        player.close()
        assert session.observers == []


def test_a_replay_is_one_file_with_everything_inside_and_no_markup_of_the_text(own, tmp_path, capsys):
    assert main([EVIL + TEXT * 3, "--tokens", "40", *own(".html")]) == 0
    html = (tmp_path / "replay.html").read_text()
    (inside,) = re.findall(r'<script type="application/json" id="replay">(.*?)</script>', html, re.DOTALL)
    data = json.loads(inside)
    assert len(data["frames"]) > 3 and "".join(data["texts"]).startswith("</script><script>alert(1)")
    assert "<script>alert" not in html and "/page/" not in html and "Content-Security-Policy" in html
    assert not re.findall(r"(?:src|href)=", re.sub(r'href="/replay.html"', "", html))
    assert f"{len(data['frames'])} refocuses" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["png", "gif"])
@pytest.mark.slow
def test_a_replay_as_a_picture(own, tmp_path, kind):
    assert main([TEXT * 3, "--tokens", "33", *own(f".{kind}")]) == 0
    assert Image.open(tmp_path / f"replay.{kind}").format.lower() == kind


def test_mistakes_are_one_message_and_exit_code_2(own, exported, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = {
            ("--port", port): f"--port={port} is in use",
            ("--port", "70000"): "--port=70000 is not allowed: 0",
            ("--host", "203.0.113.9"): "is no address of this machine",
            ("--megacontext", "none"): "no working context to look at",
            ("--tokens", "1000000"): "at most 100,000",
            ("--export", "replay.mp4"): "ends in .html, .png, .gif",
            ("--export", str(tmp_path / "no" / "x.html")): "the folder is not there",
            ("--file", "/nowhere.txt"): "there is no such file",
            ("a", "--file", "b"): "not both",
        }
        for arguments, message in cases.items():
            assert main([*arguments, "--model", str(exported), "--budget", "400"]) == 2, arguments
            found = capsys.readouterr().err
            assert message in found and "Traceback" not in found, found
    assert main([TEXT, "--megacontext", "recency", "--tokens", "2", *own(".png")]) == 2
    assert ".html shows it" in capsys.readouterr().err
