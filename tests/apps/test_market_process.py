"""The market as processes: the whole road in a real browser, and malformed requests by the hundred."""

import http.client
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from browser import Browser, chromium

from megactx.apps import chat
from megactx.apps.market import billing
from megactx.apps.market.__main__ import TOKEN, main
from megactx.apps.market.store import Store
from megactx.memory import MegaContextTree
from megactx.runtime import load_models

REPOSITORY = Path(__file__).parents[2]
PASSWORD = "correct horse"
MARKET = "megactx.apps.market"


@pytest.fixture
def start(tmp_path):
    """arguments -> a process of the command that prints its address; all are ended behind the test."""
    processes = []

    def make(*arguments):
        path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
        errors = (tmp_path / f"{len(processes)}.err").open("w")
        command = [sys.executable, "-m", MARKET, *map(str, arguments)]
        given = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, text=True)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, **given)
        processes.append(process)
        line = process.stdout.readline()
        process.address = re.match(r"http://\S+", line)[0]
        process.port = int(process.address.rpartition(":")[2])
        return process

    yield make
    for process in processes:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        process.stdout.close()
    assert "Traceback" not in "".join(path.read_text() for path in tmp_path.glob("*.err"))


@pytest.fixture
def at(database):
    """Options that say where the tables are."""
    return [] if database is None else ["--database", database]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """arguments -> (exit code, output) of the command, in this process: loading torch takes most of one's time."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, token=""):
        monkeypatch.setenv(TOKEN, token)
        capsys.readouterr()
        code = main([*map(str, arguments)])
        return code, "".join(capsys.readouterr())

    return run


@pytest.fixture
def talked(exported, monkeypatch, capsys):
    """Options, and what is typed -> what a chat says."""

    def talk(*options, told):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{told}/quit\n".encode())))
        capsys.readouterr()
        given = ["--model", str(exported), "--budget", "400", "--tokens", "8", *options]
        assert chat.main(given) == 0
        return capsys.readouterr().out

    return talk


@pytest.fixture
def own_models(exported):
    """As a command loads them."""
    return load_models(exported, "cpu")


@pytest.fixture
def tree(own_models, tmp_path):
    text = "The boat is called Wren. It lies at Heddon Quay.\n" * 60
    ids = torch.tensor([own_models.base.tokenizer.encode(text, add_special_tokens=False)])
    made = MegaContextTree.from_tokens(ids, own_models.gistnet, own_models.base, name="boats.md")
    made.save(tmp_path / "tree")
    return tmp_path / "tree"


class Proxy:
    """In front of a server: the first downloads break off after so many bytes of the answer. Keeps what is asked."""

    def __init__(self, port, most, breaks):
        self.port, self.most, self.breaks, self.asked = port, most, breaks, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.own = self.socket.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            try:
                there, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(there,), daemon=True).start()

    def _serve(self, there):
        with there, socket.create_connection(("127.0.0.1", self.port)) as server:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (piece := there.recv(2**16)):
                    return
                head += piece
            self.asked.append(head.decode("latin-1"))
            server.sendall(re.sub(rb"Host: [^\r]*", f"Host: 127.0.0.1:{self.port}".encode(), head))
            left = 2**40
            if b"/file " in head and self.breaks:
                self.breaks, left = self.breaks - 1, self.most
            while left > 0 and (piece := server.recv(min(left, 2**12))):
                there.sendall(piece)
                left -= len(piece)


@pytest.fixture
def browsers(tmp_path):
    opened = []

    def make(name):
        opened.append(Browser(tmp_path / f"profile-{name}"))
        opened[-1].call("Emulation.setScriptExecutionDisabled", value=True)  # of pages; ours still looks
        return opened[-1]

    yield make
    for browser in opened:
        browser.close()


class Person:
    """Somebody at a browser: fills forms and sends them as a hand would."""

    def __init__(self, browser, address):
        self.browser, self.address, self.moves = browser, address, 0

    def go(self, path):
        self.browser.open(f"{self.address}{path}")
        self.arrives(path)
        return self

    def arrives(self, path):
        wanted = json.dumps(f"{self.address}{path}")
        self.browser.until(f"location.href === {wanted} && document.readyState === 'complete'")

    def value(self, expression):
        return self.browser.value(expression)

    def text(self):
        return self.value("document.body.innerText")

    def fill(self, form, press="button", **fields):
        for name, value in fields.items():
            found = f"document.querySelector('{form} [name={name}]')"
            if isinstance(value, bool):
                self.value(f"{found}.checked = {json.dumps(value)}")
            else:
                self.value(f"{found}.value = {json.dumps(value)}")
        return self.press(f"{form} {press}")

    def choose(self, selector, path):
        root = self.browser.call("DOM.getDocument")["root"]["nodeId"]
        node = self.browser.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.browser.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def press(self, selector):
        self.value("document.documentElement.dataset.old = 1")
        self.value(f"document.querySelector({json.dumps(selector)}).click()")
        self.browser.until("!document.documentElement.dataset.old && document.readyState === 'complete'")
        return self

    def enter(self, name):
        self.go("/signup").fill("#enter", name=name, password=PASSWORD)
        self.arrives("/account")
        return self

    def token(self, *scopes):
        self.go("/account")
        for scope in scopes:
            self.value(f"document.querySelector('#new-token [value={scope}]').checked = true")
        self.press("#new-token button")
        return self.value("document.querySelector('#token').textContent")


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed (Debian: apt-get install chromium)")
def test_the_whole_road_from_an_author_to_a_reader_and_back_works_in_a_browser_without_scripts(
    start, command, browsers, tree, exported, own_models, tmp_path, at, talked
):
    secret = tmp_path / "secret"
    secret.write_text("s" * 40)
    with socket.create_server(("127.0.0.1", 0)) as free:
        pay_port = free.getsockname()[1]
    market = start(
        "serve", "data", "--port", 0, "--billing", f"http://127.0.0.1:{pay_port}/", "--billing-secret", secret, *at
    )
    hooks = Hooks(pay_port, secret, market.address, tmp_path)
    made = ["--name", "boats", "--licence", "CC-BY-4.0", "--description", "Where the boats lie", "--model", exported]
    code, told = command("pack", tree, "boats.tar", *made, "--key", "key.pem")
    assert code == 0, told

    anna = Person(browsers("anna"), market.address).enter("anna")
    anna.go("/publish").choose("#publish [name=package]", tmp_path / "boats.tar")
    anna.fill("#publish", access="paid", price="4.50")
    anna.arrives("/packages/boats")

    ben = Person(browsers("ben"), market.address).enter("ben")
    ben.fill("#share", share=True)
    ben.go("/").fill("[role=search]", q="boats LIE")
    ben.press(".packages a")
    ben.arrives("/packages/boats")
    seen = ben.text()
    assert (
        "boats.md" in seen
        and "CC-BY-4.0" in seen
        and "4.50" in seen
        and ben.value("document.querySelectorAll('.sample').length === 5 && !document.querySelector('#get')")
    )
    token = ben.token("read")
    code, told = command("get", "boats", "here", "--at", market.address, token=token)
    assert code == 2 and "to be bought" in told

    ben.go("/packages/boats").press("#buy button")
    ben.browser.until("!!document.querySelector('#get')")  # the page looks again by itself
    assert hooks.statuses[0] == 200 and hooks.replays == [403]  # the very same hook once more
    body, header = hooks.answered[0]
    replayed = asked(market.port, "POST", "/api/billing", body, {billing.HEADER: header})
    assert replayed.status == 403 and "used already" in replayed.text

    proxy = Proxy(market.port, 20_000, 2)
    code, told = command("get", "boats", "here", "--at", f"http://127.0.0.1:{proxy.own}", token=token)
    assert code == 0, told
    ranges = [int(r) for head in proxy.asked for r in re.findall(r"Range: bytes=(\d+)-", head)]
    assert len(ranges) == 3 and ranges[0] == 0 < ranges[1] < ranges[2]
    opened, own = (MegaContextTree.load(f, own_models.gistnet, own_models.base) for f in (tmp_path / "here", tree))
    assert torch.equal(opened.tokens, own.tokens) and torch.equal(opened.gists(2), own.gists(2))
    assert command("opened", "here", "--at", market.address, token=token) == (0, "counted\n")
    said = talked("--part", f"shop={tmp_path / 'here'}:0.3", told="Where does the boat lie?\n/parts\n/sources\n")
    assert re.search(r"^shop  \S*/here  .* entries, version .*, licence CC-BY-4.0$", said, re.MULTILINE), said
    assert re.search(r"^shop  boats.md:\d+  tokens \d", said, re.MULTILINE), said  # read in full

    ben.go("/packages/boats").fill("#report", reason="It says too much of quays.")
    anna.go("/packages/boats")
    rows = anna.value(
        "[...document.querySelectorAll('#statistics tr')].map(row => row.innerText.split('\\t').slice(1))"
    )
    assert rows[1:] == [["1", "download", "1"], ["1", "opened", "1"]]
    assert "ben" not in anna.value("document.querySelector('#statistics').innerText")

    mod = Person(browsers("mod"), market.address).enter("mod")
    assert command("moderator", "data", "mod", *at)[0] == 0
    assert "too much of quays" in mod.go("/moderation").text()
    mod.fill("#moderate", press="[value='take down']", name="boats", reason="reported")
    assert "boats: reported" in mod.text() and "Take down" not in mod.value(
        "document.querySelector('#audit').innerText"
    )
    assert "no such package" in ben.go("/packages/boats").text()
    assert "taken down: reported" in anna.go("/packages/boats").text()
    for who in (anna, ben, mod):
        assert not [e for e in who.browser.errors if "40" not in e]  # refusals that were asked for, and nothing else
    proxy.socket.close()
    hooks.close()


class Hooks:
    """The receiver, watched: each hook is posted to it once more just as it came."""

    def __init__(self, port, secret, market, folder):
        from megactx.apps.serving import Server

        self.statuses, self.replays, self.answered = [], [], []
        receiver = billing.Receiver(market, secret.read_bytes(), folder / "receiver.json")
        take = receiver.take

        def watched(header, body):
            found = take(header, body)
            self.statuses.append(found[0])
            self.replays.append(take(header, body)[0])
            return found

        def answer(body):
            self.answered.append((body, billing.signed(receiver.secret, "billing", body)))
            asked(int(market.rpartition(":")[2]), "POST", "/api/billing", *_hook(self.answered[-1]))

        receiver.take, receiver._answer = watched, answer  # what it sends is kept, to be sent once more
        self.server = Server(port)
        self.server.start(receiver.app(self.server.host))

    def close(self):
        self.server.close()


def _hook(answered):
    body, header = answered
    return body, {billing.HEADER: header}


def asked(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return SimpleNamespace(status=answer.status, text=answer.read().decode("utf-8", "replace"))
    finally:
        connection.close()


def nonsense(draw):
    """A request as no client sends it."""
    texts = [
        "",
        "0",
        "-1",
        "9" * 30,
        "%00",
        "%ff",
        "..%2f..%2fmarket.db",
        "boats",
        "a" * 3000,
        "'--",
        "%F0%9F%9B%B6",
        "%ed%a0%80",
    ]
    roots = [
        "/api/packages",
        "/api/uploads",
        "/packages",
        "/account",
        "/moderation",
        "/publish",
        "/login",
        "/",
        "/nothing",
    ]
    roots += [
        "/api/packages/boats/versions",
        "/api/packages/boats/differences/1",
        "/api/packages/boats",
        "/api/billing",
    ]
    ends = [
        "",
        "/file",
        "/buy",
        "/publish",
        "/opened",
        "/reports",
        "/tokens",
        "/revoke",
        "/access",
        "/readers",
        "/statistics",
    ]
    path = draw.choice(roots) + draw.choice(["", "/" + draw.choice(texts)]) + draw.choice(ends)
    query = draw.choice(["", "q", "page", "offset", "model"])
    path += f"?{query}={draw.choice(texts)}" if query else ""
    bodies = [
        None,
        b"",
        b"{",
        b"[]",
        b"null",
        b'"\\ud800"',
        b"[" * 5000,
        b'{"bytes": 1e400}',
        b"\xff\xfe",
        b"csrf=x&name=%ed%a0%80",
    ]
    bodies += [
        b'{"bytes": 9, "sha256": "' + b"0" * 64 + b'"}',
        b'{"reason": "\\ud800"}',
        b'{"version": 1.5}',
        b"--x\r\n\r\n",
    ]
    kinds = [
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "multipart/form-data; boundary=x",
    ]
    headers = {"Content-Type": draw.choice([*kinds, "text/plain", "\xff"])}
    if draw.random() < 0.3:
        headers["Range"] = draw.choice(["bytes=", "bytes=9-1", "bytes=-", "bytes=99999999999-", "bytes=0-1,3-4", "x"])
    if draw.random() < 0.3:
        headers[billing.HEADER] = draw.choice(["", "t=1,v1=" + "0" * 64, "t=" + "9" * 12 + ",v1=" + "0" * 64, "\xff"])
    if draw.random() < 0.3:
        headers["Cookie"] = draw.choice(["megactx-market=x", "megactx-form=x; megactx-market=\xff", "=;=", "a" * 4000])
    return draw.choice(["GET", "POST", "PATCH", "DELETE", "PUT", "HEAD"]), path, draw.choice(bodies), headers


@pytest.mark.slow
def test_malformed_requests_by_the_hundred_are_answered_as_mistakes(start, tmp_path, at, database):
    secret = tmp_path / "secret"
    secret.write_text("s" * 40)
    market = start("serve", "data", "--port", 0, "--billing", "http://127.0.0.1:9/", "--billing-secret", secret, *at)
    with closing(Store(tmp_path / "data", database)) as store:
        store.accounts.sign_up("anna", PASSWORD)
        account = store.accounts.of_session(store.accounts.log_in("anna", PASSWORD))
        token = store.accounts.new_token(account, "", ["read", "publish", "buy"])
    draw, statuses = random.Random(0), []
    for number in range(360):
        method, path, body, headers = nonsense(draw)
        if number % 3:
            headers["Authorization"] = draw.choice([f"Bearer {token}"] * 9 + ["Bearer \xff", "Bearer", "Basic x"])
        found = asked(market.port, method, path, body, headers)
        statuses.append(found.status)
        assert found.status < 500 and "Traceback" not in found.text, (method, path, body, headers, found.text[:500])
    assert {200, 400, 404, 405} <= {*statuses}
    assert asked(market.port, "GET", "/health").status == 200


@pytest.mark.long
def test_what_a_fuzzer_asks_of_the_schema_gives_no_error_of_the_server(start, tmp_path, at, database):
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error

    market = start("serve", "data", "--port", 0, *at)
    store = Store(tmp_path / "data", database)
    statuses = []
    right, wrong = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    quiet = settings(
        max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None
    )
    schema = schemathesis.openapi.from_url(f"{market.address}/openapi.json")
    for number, operation in enumerate(schema.get_all_operations()):
        store.accounts.sign_up(f"name-{number}", PASSWORD)  # each has limits of its own
        account = store.accounts.of_session(store.accounts.log_in(f"name-{number}", PASSWORD))
        headers = {"Authorization": f"Bearer {store.accounts.new_token(account, '', ['read', 'publish', 'buy'])}"}
        for mode in (right, wrong):

            @quiet
            @given(case=operation.ok().as_strategy(generation_mode=mode))
            def ask(case):
                response = case.call(headers=headers)  # noqa: B023  it is asked at once
                statuses.append(response.status_code)
                case.validate_response(response, checks=[not_a_server_error])
                assert "Traceback" not in response.text

            try:
                ask()
            except Exception as error:
                if type(error).__name__ not in ("SkipTest", "Unsatisfiable"):  # nothing of it can be wrong
                    raise
    store.close()
    assert len(statuses) > 100 and {200, 400, 404} <= {*statuses}
