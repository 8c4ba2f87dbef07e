"""The view's server over real connections: what it answers, and whom it refuses."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from megactx.apps import serving
from megactx.apps.guard import LARGEST, Guard
from megactx.apps.serving import Server
from megactx.apps.view.app import build
from megactx.apps.view.player import Player
from megactx.runtime import Sampling, Session
from megactx.runtime.settings import Settings

TEXT = "def read(path):\n    return path.read_text()\n" * 12
COOKIE = {"Cookie": "own=secret"}


@pytest.fixture(scope="module")
def served(make_models):
    """(player, port) of a session that has read a text."""
    from megactx.runtime import Controller

    settings = Settings(budget=96, allocator={"protected": 8})
    player = Player(Session(Controller(make_models(), settings)), Sampling()).start()
    player.say(TEXT, 0)
    player.wait()
    with Server(0) as server:
        server.start(build(player, server.host, "secret", "own"), ending=player.feed.close)
        yield player, server.port
    player.close()


def ask(port, path, method="GET", headers=COOKIE, body=None):
    """-> status, headers, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read().decode()


def test_the_address_of_the_terminal_opens_the_page_and_gives_the_cookie(served):
    _, port = served
    status, headers, page = ask(port, "/?token=secret", headers={})
    assert status == 200 and page.startswith("<!doctype html>")
    assert headers["Set-Cookie"] == "own=secret; Path=/; HttpOnly; SameSite=Strict"
    assert "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    assert ask(port, "/")[0] == 200
    for name in ("style.css", "data.js", "draw.js", "main.js", "icon.svg"):
        assert f"/page/{name}" in page and ask(port, f"/page/{name}")[0] == 200


@pytest.mark.parametrize("path", ["/", "/?token=wrong", "/about?token=secret", "/events", "/text?lod=0&index=0"])
def test_nothing_is_shown_without_the_token(served, path):
    for headers in ({}, {"Cookie": "own=wrong"}, {"Cookie": "own"}, {"Cookie": "other=secret"}):
        status, found, body = ask(served[1], path, headers=headers)
        assert status == 403 and "read_text" not in body and "Set-Cookie" not in found


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1.evil.example", "10.1.2.3", "", "[::1"]
)
def test_a_rebound_name_is_refused(served, host):
    assert ask(served[1], "/", headers={"Host": host.format(port=served[1])} | COOKIE)[0] in (400, 403)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:{port}", "LOCALHOST:9", "[::1]:9", "127.0.0.1:{port}"])
def test_names_of_this_machine_are_known_on_any_port_as_through_a_tunnel(served, host):
    assert ask(served[1], "/", headers={"Host": host.format(port=served[1])} | COOKIE)[0] == 200


def test_bound_to_all_addresses_names_are_still_refused():
    guard = Guard(None, "0.0.0.0")
    assert guard._known("192.168.1.7:8765") and guard._known("localhost") and not guard._known("evil.example")
    assert Guard(None, "box.lan")._known("box.lan:8765")


def test_other_sites_may_neither_ask_nor_read(served):
    port = served[1]
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1:1"):
        assert ask(port, "/stop", "POST", COOKIE | {"Origin": origin})[0] == 403
        assert ask(port, "/about", headers=COOKIE | {"Origin": origin})[0] == 403
    status, headers, _ = ask(port, "/about", headers=COOKIE | {"Origin": f"http://127.0.0.1:{port}"})
    assert status == 200 and not [name for name in headers if name.lower().startswith("access-control")]
    assert ask(port, "/about", "OPTIONS")[0] == 405


def test_text_is_given_by_node_and_what_is_none_is_refused(served):
    player, port = served
    status, headers, body = ask(port, "/text?lod=1&index=2")
    assert status == 200 and headers["Content-Type"].startswith("application/json")
    assert json.loads(body)["text"] == player.session.text(8, 12)
    for query in ("", "lod=1", "lod=-1&index=0", "lod=x&index=0", "lod=1&index=99999999", f"lod=1&index={'9' * 5000}"):
        assert ask(port, f"/text?{query}")[0] == 400
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/index.html", "/page/app.py", "/etc/passwd"):
        assert ask(port, path)[0] == 404


def test_events_begin_with_what_has_been_and_go_on_behind_what_a_browser_knows(served):
    player, port = served
    for known in (0, player.feed.count - 1):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/events", headers=COOKIE | {"Last-Event-ID": str(known)})
        answer = connection.getresponse()
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lines = [answer.readline().decode() for _ in range(4 * (player.feed.count - known) + 2)]
        assert [int(x[4:]) for x in lines if x.startswith("id: ")] == [*range(known + 1, player.feed.count + 1)]
        assert lines[-2] == "event: state\n"
        connection.close()


def test_say_writes_and_refuses_what_is_no_request_of_the_page(served):
    player, port = served
    kind, before = {"Content-Type": "application/json"}, player.session.length
    wrong = [b"", b"[]", b"{", b"\xff", b'{"text": 1, "tokens": 1}', b'{"text": "a", "tokens": true}', b"[" * 10**5]
    wrong += [b'{"text": "a", "tokens": -1}', b'{"text": "a", "tokens": 1e3}', b'{"text": "\\ud800", "tokens": 1}']
    for body in wrong:
        assert ask(port, "/say", "POST", COOKIE | kind, body)[0] == 400, body
    good = b'{"text": "", "tokens": 3}'
    assert ask(port, "/say", "POST", COOKIE | {"Content-Type": "text/plain"}, good)[0] == 415
    assert ask(port, "/say", headers=COOKIE)[0] == 405
    player.wait()
    assert player.session.length == before
    assert ask(port, "/say", "POST", COOKIE | kind, good)[0] == 200
    player.wait()
    assert player.session.length == before + 3


def test_large_requests_are_refused_with_and_without_a_length(served):
    port, kind = served[1], {"Content-Type": "application/json"}
    with socket.create_connection(("127.0.0.1", port), 20) as raw:
        head = "POST /say HTTP/1.1\r\nHost: localhost\r\nCookie: own=secret"
        raw.sendall(f"{head}\r\nContent-Length: {LARGEST + 1}\r\n\r\n".encode())
        assert b" 413 " in raw.recv(100)
    pieces = (b"x" * 2**16 for _ in range(LARGEST // 2**16 + 1))
    assert ask(port, "/say", "POST", COOKIE | kind, pieces)[0] == 413
    with socket.create_connection(("127.0.0.1", port), 20) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2**17)
        assert b" 400 " in raw.recv(100)


def test_a_replay_can_be_saved_from_the_page(served):
    status, headers, html = ask(served[1], "/replay.html")
    assert status == 200 and "attachment" in headers["Content-Disposition"] and 'id="replay"' in html


def test_the_page_is_package_data_and_loads_nothing_from_elsewhere():
    folder = files("megactx.apps.view") / "page"
    for path in folder.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text
        assert len(text.splitlines()) <= 300


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_ctrl_c_and_sigterm_save_the_session(number, code, exported, tmp_path):
    arguments = ["--model", str(exported), "--budget", "400", "--port", "0", "--session", str(tmp_path / "kept")]
    running = subprocess.Popen(
        [sys.executable, "-m", "megactx.apps.view", TEXT, "--tokens", "20", *arguments],
        cwd=Path(serving.__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = running.stdout.readline()
    assert line.startswith("Look at http://127.0.0.1:") and "/?token=" in line
    address = line.split()[2].removeprefix("http://127.0.0.1:")
    port, _, query = address.partition("/")
    status, headers, _ = ask(int(port), f"/{query}", headers={})
    cookie = {"Cookie": headers["Set-Cookie"].partition(";")[0]}
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=60)
    connection.request("GET", "/events", headers=cookie)  # stays open, and must not hold up the end
    answer = connection.getresponse()
    while "idle" not in (found := answer.readline().decode()) or '"out"' not in found:
        pass
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code and "Traceback" not in errors and status == 200
    assert json.loads((tmp_path / "kept" / "session.json").read_text())["tokens"] > 200


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: 127", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nab"]
)
def test_a_connection_that_never_finishes_its_request_is_closed(monkeypatch, sent):
    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass

    monkeypatch.setattr(serving, "RECEIVES", 0.3)
    with serving.Server(0).start(app) as server, socket.create_connection(("127.0.0.1", server.port), 5) as own:
        own.sendall(sent)
        try:
            assert own.recv(100) == b""  # closed, without an answer
        except ConnectionResetError:
            pass
