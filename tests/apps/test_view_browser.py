"""The page of the view in a real browser: live, pointed at, on a narrow screen, and saved as a file."""

import io
import time

import numpy
import pytest
import torch
from browser import Browser, chromium
from PIL import Image

from megactx.apps.serving import Server
from megactx.apps.view.__main__ import main
from megactx.apps.view.app import build
from megactx.apps.view.export import page
from megactx.apps.view.player import Player
from megactx.memory import MegaContextTree
from megactx.runtime import Controller, Sampling, Session, Settings, Wanted

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="no Chromium is installed (Debian: apt-get install chromium)"),
]
TEXT = "def read(path):\n    return path.read_text()\n" * 12
EVIL = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"


@pytest.fixture
def browser(tmp_path):
    found = Browser(tmp_path / "profile")
    yield found
    found.close()


@pytest.fixture
def live(controller):
    """kind -> (player, address)."""
    opened = []

    def make(kind="focus", controller=controller):
        player = Player(Session(controller(kind)), Sampling()).start()
        server = Server(0)
        server.start(build(player, server.host, "secret", f"megactx-{server.port}"), ending=player.feed.close)
        opened.extend((player, server))
        return player, f"{server.address}/?token=secret"

    yield make
    for part in reversed(opened):
        part.close()


def colours(png: bytes) -> set[tuple]:
    return {tuple(row) for row in numpy.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)}


def test_a_session_is_seen_live_while_it_generates(browser, live, tmp_path):
    player, address = live()
    browser.open(address)
    browser.until("document.querySelector('#doing').textContent === 'idle'")
    assert "secret" not in browser.value("location.href")
    browser.value(f"document.querySelector('#say').value = {TEXT!r}")
    browser.value("document.querySelector('#tokens').value = 400")
    browser.value("document.querySelector('#go').click()")
    browser.until("document.querySelector('#doing').textContent === 'writing'")
    seen = []
    while not seen or browser.value("document.querySelector('#doing').textContent") == "writing":
        seen.append(browser.value("document.querySelector('#timeline-note').textContent"))
        time.sleep(0.1)
    assert len(set(seen)) > 3  # it moved while the session wrote
    browser.until("document.querySelector('#doing').textContent === 'idle'")
    browser.until(
        f"document.querySelector('#timeline-note').textContent.startsWith('refocus {player.session.stream.refocuses},')"
    )
    assert browser.value("document.querySelector('#written').textContent").startswith("def read(path)")
    assert browser.value("document.querySelectorAll('#written .out').length") == 1
    assert not browser.value("document.querySelector('#scored').hidden")
    assert browser.errors == []
    png = browser.screenshot(tmp_path / "live.png")
    assert {(0, 158, 115), (0, 114, 178)} <= colours(png)  # tokens and gists, in their colours


def test_text_behind_a_block_is_shown_on_hover_and_never_obeyed(browser, live, tmp_path):
    player, address = live()
    player.say(EVIL * 30, 0)
    player.wait()
    browser.open(address)
    browser.until("document.querySelector('#legend').children.length > 1")
    for selector, y in (("#timeline", 0.5), ("#window", 0.02), ("#scores", 0.5)):
        browser.point(selector, 0.5, y)
        browser.until(
            "!document.querySelector('#tip').hidden && document.querySelector('#tip-text').textContent.length"
        )
        assert "onerror" in browser.value("document.querySelector('#written').textContent")
        name = browser.value("document.querySelector('#tip-name').textContent")
        assert "token" in name and ("score" in name) == (selector == "#scores")
        browser.point("h1", 0.1, 0.5)
        browser.until("document.querySelector('#tip').hidden")
    assert browser.value("document.title") == "megactx view"
    assert browser.value("document.images.length") == 0 and browser.errors == []


def test_keys_step_through_entries_and_old_refocuses_can_be_looked_at(browser, live):
    player, address = live()
    player.say(TEXT, 60)
    player.wait()
    browser.open(address)
    browser.until("document.querySelector('#legend').children.length > 1")
    browser.value("document.querySelector('#window').focus()")
    for name in ("Home", "ArrowRight"):
        browser.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name)
    browser.until("document.querySelector('#tip-name').textContent.startsWith('token · token 1')")
    newest = browser.value("document.querySelector('#timeline-note').textContent")
    # In one go, as a hand does it: a redraw between the two would put the slider back.
    browser.value("let at = document.querySelector('#which'); at.value = 0; at.dispatchEvent(new Event('input'))")
    browser.until(f"document.querySelector('#timeline-note').textContent !== {newest!r}")
    browser.value("document.querySelector('#live').click()")
    browser.until(f"document.querySelector('#timeline-note').textContent === {newest!r}")


@pytest.mark.parametrize("kind", ["focus", "recency"])
def test_the_page_fits_a_narrow_window(browser, live, kind, tmp_path):
    player, address = live(kind)
    player.say(TEXT, 20)
    player.wait()
    browser.resize(360, 800)
    browser.open(address)
    browser.until("document.querySelector('#legend').children.length > 1")
    assert browser.value("document.documentElement.scrollWidth") <= 360
    assert browser.value("document.querySelector('#scored').hidden") == (kind == "recency")
    assert len(browser.screenshot(tmp_path / "narrow.png")) > 5000
    assert browser.errors == []


def test_a_stop_ends_the_writing(browser, live):
    player, address = live()
    browser.open(address)
    browser.until("document.querySelector('#doing').textContent === 'idle'")
    browser.value("document.querySelector('#tokens').value = 100000")
    browser.value("document.querySelector('#go').click()")
    browser.until("document.querySelector('#doing').textContent === 'writing' && frames.all.length > 2")
    browser.value("document.querySelector('#stop').click()")
    browser.until("document.querySelector('#doing').textContent === 'idle'")
    assert player.session.length < 100_000


def test_a_saved_replay_needs_no_server_and_no_network(browser, exported, tmp_path):
    path = tmp_path / "replay.html"
    arguments = ["--model", str(exported), "--budget", "400", "--tokens", "30", "--export", str(path)]
    assert main([EVIL + TEXT * 5, *arguments]) == 0
    browser.open(path.as_uri())
    browser.until("document.querySelector('#legend').children.length > 1")
    assert browser.value("document.querySelector('#form').hidden")
    browser.point("#window", 0.01, 0.02)
    browser.until("!document.querySelector('#tip').hidden")
    assert browser.value("document.querySelector('#tip-text').textContent").startswith("<")
    assert browser.value("document.title") == "megactx view" and browser.errors == []


def test_a_strip_shows_the_blocks_that_the_model_expects_live_and_in_a_replay(browser, live, foretelling, tmp_path):
    player, address = live(controller=foretelling)
    player.say(TEXT, 60)
    player.wait()
    (tmp_path / "replay.html").write_text(player.ask(lambda: page(player)).result())
    session, index = player.session, player.feed.frames[-1]["near"][0][0]
    for where in (address, (tmp_path / "replay.html").as_uri()):
        browser.open(where)
        browser.until("document.querySelector('#legend').children.length > 1 && timeline.known.marks.length === 8")
        strip = browser.value("(({ strips, foot }) => [strips.at(-1).top + strips.at(-1).tall, foot])(timeline.known)")
        size = browser.value(
            "[document.querySelector('#timeline').clientWidth, document.querySelector('#timeline').clientHeight]"
        )
        mark = browser.value("timeline.known.marks[0]")
        browser.point("#timeline", (mark["left"] + mark["right"]) / 2 / size[0], (strip[0] + strip[1] / 2) / size[1])
        browser.until("!document.querySelector('#tip').hidden")
        name = browser.value("document.querySelector('#tip-name').textContent")
        assert f"tokens {4 * index} to {4 * index + 3} · cosine " in name
        shown = browser.value("document.querySelector('#tip-text').textContent")
        assert shown == session.text(4 * index, 4 * index + 4) and browser.errors == []
    # The strongest mark is of the accent colour.
    assert {(11, 99, 165), (109, 183, 242)} & colours(browser.screenshot(tmp_path / "expects.png"))


def test_without_a_readout_there_is_no_strip_of_what_is_expected(browser, live):
    player, address = live()
    player.say(TEXT, 20)
    player.wait()
    browser.open(address)
    browser.until("document.querySelector('#legend').children.length > 1")
    assert browser.value("timeline.known.foot === 0 && timeline.known.marks.length === 0") and browser.errors == []


def test_each_part_has_a_lane_and_its_entries_tell_their_part(browser, models, tmp_path):
    ids = torch.randint(2, 512, (1, 700), generator=torch.Generator().manual_seed(0))
    for name, count in (("library", 700), ("person", 90)):
        MegaContextTree.from_tokens(ids[:, :count], models.gistnet, models.base).save(tmp_path / name)
    made = Controller(models, Settings(budget=240, allocator={"protected": 8}))
    parts = [Wanted("library", tmp_path / "library", 0.3), Wanted("person", tmp_path / "person", 0.1)]
    player = Player(Session(made, parts=parts), Sampling()).start()
    server = Server(0)
    try:
        server.start(build(player, server.host, "secret", f"megactx-{server.port}"), ending=player.feed.close)
        player.say(TEXT, 60)
        player.wait()
        browser.open(f"{server.address}/?token=secret")
        browser.until("document.querySelector('#legend').children.length > 1")
        browser.until("document.querySelector('#figures').textContent.includes('790 tokens of 2')")
        told = set()
        for selector, x, y in (
            ("#timeline", 0.5, 0.37),
            ("#timeline", 0.5, 0.68),
            ("#timeline", 0.5, 0.87),
            ("#window", 0.02, 0.02),
        ):
            browser.point(selector, x, y)
            browser.until("!document.querySelector('#tip').hidden")
            told.add(browser.value("document.querySelector('#tip-name').textContent").partition(" of ")[2] or "history")
            browser.point("h1", 0.1, 0.5)
            browser.until("document.querySelector('#tip').hidden")
        png = browser.screenshot(tmp_path / "parts.png")
        assert any(name.endswith("library") for name in told) and any(name.endswith("person") for name in told)
        assert any("library" not in name and "person" not in name for name in told), told
        assert {(0, 158, 115), (0, 114, 178)} <= colours(png) and browser.errors == []
        (tmp_path / "replay.html").write_text(player.ask(lambda: page(player)).result())
        browser.open((tmp_path / "replay.html").as_uri())
        browser.until("document.querySelector('#figures').textContent.includes('790 tokens of 2')")
        assert browser.errors == []
    finally:
        server.close()
        player.close()
