"""Who sees, gets, sells and publishes what; and what a browser may."""

import json
import re
import time
import urllib.parse
from types import SimpleNamespace

import pytest
from markets import LIMITS, PASSWORD, asked

from megactx.apps.market import billing, package, pages
from megactx.apps.market.app import build
from megactx.apps.market.client import Client
from megactx.apps.market.store import TABLES
from megactx.apps.market.uploads import LARGEST
from megactx.apps.serving import Server

pytest_plugins = ["markets"]


class Visitor:
    """A browser without JavaScript: cookies, and the fields that a form has."""

    def __init__(self, market):
        self.market, self.cookies = market, {}

    def ask(self, method, path, body=None, **headers):
        if self.cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        found = asked(self.market, method, path, body, headers)
        for cookie in found.headers.get_all("set-cookie") or []:
            name, _, value = cookie.partition(";")[0].partition("=")
            self.cookies[name] = value
        return found

    def get(self, path):
        return self.ask("GET", path)

    def post(self, page, path, csrf=None, **fields):
        csrf = csrf if csrf is not None else re.search(r'name="csrf" value="([^"]*)"', self.get(page).text)[1]
        body = urllib.parse.urlencode(fields | {"csrf": csrf}, doseq=True)
        return self.ask("POST", path, body, **{"Content-Type": "application/x-www-form-urlencoded"})

    def enter(self, name, new=True):
        page = "/signup" if new else "/login"
        return self.post(page, page, name=name, password=PASSWORD)


def test_a_package_is_published_by_its_owner_with_a_key_of_the_account_and_a_new_number(market, packed):
    anna, ben = market.client("anna"), market.client("ben")
    anna.publish(packed(), "free", 0)
    for who, path, told in (
        (anna, packed(), "Version 1 is there; the next is 2"),
        (anna, packed(key="other", version=2), "no key of this account"),
        (ben, packed(version=2), "This name is taken"),
    ):
        with pytest.raises(ValueError, match=told):
            who.publish(path, "free", 0)
    assert [v["number"] for v in anna.ask("GET", "/api/packages/boats")["versions"]] == [1]
    assert not [*(market.store.folder / "uploads").iterdir()]


# Rights


def test_nobody_reads_a_private_package_of_another(market, packed):
    market.client("anna").publish(packed(), "private", 0)
    market.member("mod")
    market.store.accounts.make_moderator("mod")
    others = [market.client("ben"), market.client(None), market.client("mod")]
    for who in others:
        assert who.ask("GET", "/api/packages")["count"] == 0
        headers = {"Authorization": f"Bearer {who.token}"} if who.token else {}
        for path in ("", "/versions/1", "/versions/1/file", "/differences/1/1", "/statistics"):
            found = asked(market, "GET", f"/api/packages/boats{path}", headers=headers)
            assert found.status in (401, 404) and "Wren" not in found.text and "notes" not in found.text
        for path, body in (("buy", {}), ("opened", {"version": 1}), ("reports", {"reason": "x"})):
            sent = headers | {"Content-Type": "application/json"}
            found = asked(market, "POST", f"/api/packages/boats/{path}", json.dumps(body), sent)
            assert found.status in (401, 404, 409) or found.text == '{"counted":false}'
    visitor = Visitor(market)
    visitor.enter("ben", new=False)
    for path in ("/packages/boats", "/packages/boats/1", "/packages/boats/1/file", "/packages/nothing"):
        assert visitor.get(path).status == 404
    assert visitor.get("/packages/boats").text == visitor.get("/packages/nothing").text  # as if it were not there
    assert visitor.post("/account", "/packages/boats/access", access="free").status == 404
    assert visitor.post("/account", "/packages/boats/readers", reader="ben", add="").status == 404


def test_a_reader_of_a_private_package_gets_it_until_removed(market, packed, tmp_path):
    market.client("anna").publish(packed(), "private", 0)
    ben, anna = market.client("ben"), market.member("anna")
    market.store.catalogue.read_by(anna, "boats", "ben", True)
    assert ben.get("boats", tmp_path / "here").name == "boats"
    market.store.catalogue.read_by(anna, "boats", "ben", False)
    with pytest.raises(ValueError, match="no such package"):
        ben.get("boats", tmp_path / "there")


def test_a_paid_package_is_seen_by_all_and_got_by_who_has_paid(market, packed, tmp_path):
    market.client("anna").publish(packed(), "paid", 450)
    ben = market.client("ben")
    assert ben.ask("GET", "/api/packages/boats/versions/1")["card"]["samples"]
    with pytest.raises(ValueError, match="to be bought"):
        ben.get("boats", tmp_path / "here")
    with pytest.raises(ValueError, match="Nothing is sold here"):
        ben.ask("POST", "/api/packages/boats/buy")


def test_a_token_may_what_its_scopes_say_and_nothing_once_it_is_revoked(market, packed):
    reader, publisher = market.client("anna", "read"), market.client("anna", "publish")
    with pytest.raises(ValueError, match="may not publish"):
        reader.publish(packed(), "free", 0)
    publisher.publish(packed(), "free", 0)
    with pytest.raises(ValueError, match="may not read"):
        publisher.ask("GET", "/api/packages/boats")
    with pytest.raises(ValueError, match="may not buy"):
        reader.ask("POST", "/api/packages/boats/buy")
    anna = market.member("anna")
    for token in market.store.accounts.about(anna)["tokens"]:
        market.store.accounts.revoke(market.member("ben"), token["id"])  # not theirs
    assert reader.ask("GET", "/api/packages/boats")["name"] == "boats"
    for token in market.store.accounts.about(anna)["tokens"]:
        market.store.accounts.revoke(anna, token["id"])
    with pytest.raises(ValueError, match="not known"):
        reader.ask("GET", "/api/packages/boats")


def test_secrets_are_kept_as_hashes(market):
    session = market.store.accounts.log_in(market.member("anna")["name"], PASSWORD)
    token = market.store.accounts.new_token(market.member("anna"), "x", ["read"])
    with market.store.database.look() as db:
        tables = re.findall(r"CREATE TABLE (\w+)", TABLES)
        content = str([[*row] for table in tables for row in db.execute(f"SELECT * FROM {table}")])
    assert "$argon2id$" in content and len(tables) > 10
    assert PASSWORD not in content and token not in content and session not in content
    assert market.store.folder.stat().st_mode & 0o777 == 0o700


def test_uploads_are_their_owners_and_stay_within_what_was_said(market):
    anna, ben = market.client("anna"), market.client("ben")
    upload = anna.ask("POST", "/api/uploads", {"bytes": 10, "sha256": "0" * 64})["id"]
    for method, path, body in (("GET", "", None), ("PATCH", "?offset=0", b"x"), ("DELETE", "", None)):
        with pytest.raises(ValueError, match="no such upload"):
            ben.ask(method, f"/api/uploads/{upload}{path}", body)
    with pytest.raises(ValueError, match="0 bytes are there"):
        anna.ask("PATCH", f"/api/uploads/{upload}?offset=3", b"x")
    with pytest.raises(ValueError, match="more than was said"):
        anna.ask("PATCH", f"/api/uploads/{upload}?offset=0", b"x" * 11)
    anna.ask("PATCH", f"/api/uploads/{upload}?offset=0", b"x" * 10)
    with pytest.raises(ValueError, match="checksum is another"):
        anna.ask("POST", f"/api/uploads/{upload}/publish", {"access": "free"})
    with pytest.raises(ValueError, match="bytes"):
        anna.ask("POST", "/api/uploads", {"bytes": LARGEST + 1, "sha256": "0" * 64})


def test_who_asks_too_often_is_told_when_to_come_back(store):
    with Server(0) as server:
        server.start(build(store, server.host, limits=LIMITS | {"request": 3, "log in": 2}))
        there = SimpleNamespace(port=server.port)
        answers = [asked(there, "GET", "/api/packages") for _ in range(5)]
        assert [a.status for a in answers] == [200, 200, 200, 429, 429]
        assert int(answers[-1].headers["retry-after"]) >= 1
        wrong = {"Authorization": "Bearer mct-wrong"}
        statuses = [asked(there, "GET", "/api/packages", headers=wrong).status for _ in range(4)]
        assert statuses == [401, 401, 429, 429]


# Billing


@pytest.fixture
def selling(store, tmp_path):
    """A market and a billing service that answer each other."""
    secret = b"s" * 32
    with Server(0) as pay, Server(0) as server:
        receiver = billing.Receiver(server.address, secret, tmp_path / "receiver.json")
        sender = billing.Sender(store, pay.address, secret)
        server.start(build(store, server.host, sender, limits=LIMITS))
        yield SimpleNamespace(
            store=store,
            port=server.port,
            address=server.address,
            receiver=receiver,
            sender=sender,
            pay=pay,
            secret=secret,
        )
        sender.close() if sender.thread.is_alive() else None


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


def test_a_purchase_is_told_tried_again_and_settled_and_a_replay_is_refused(selling, packed, tmp_path, monkeypatch):
    store, hooks, post = selling.store, [], billing.post
    for name in ("anna", "ben"):
        store.accounts.sign_up(name, PASSWORD)
    anna, ben = (store.accounts.of_session(store.accounts.log_in(name, PASSWORD)) for name in ("anna", "ben"))
    Client(selling.address, store.accounts.new_token(anna, "", ["publish"])).publish(packed(), "paid", 450)
    client_ = Client(selling.address, store.accounts.new_token(ben, "", ["read", "buy"]))

    def kept(url, secret, who, body):
        hooks.append((who, billing.signed(secret, who, body), body))
        return 503 if len(hooks) == 1 else post(url, secret, who, body)

    monkeypatch.setattr(billing, "post", kept)
    monkeypatch.setattr(billing, "SLOWEST", 0)
    selling.pay.start(selling.receiver.app(selling.pay.host))
    selling.sender.start()
    assert client_.ask("POST", "/api/packages/boats/buy") == {"state": "pending"}
    until(lambda: client_.ask("POST", "/api/packages/boats/buy") == {"state": "paid"})
    assert client_.get("boats", tmp_path / "here").name == "boats"
    told = [body for who, _, body in hooks if who == "market"]
    assert len(told) >= 2 and len(set(told)) == 1 and json.loads(told[0])["cents"] == 450  # one event, tried again
    monkeypatch.setattr(billing, "post", post)

    def again(port, path, header, body):
        return asked(SimpleNamespace(port=port), "POST", path, body, {billing.HEADER: header})

    who, header, body = next(hook for hook in hooks if hook[0] == "market")
    taken = again(selling.pay.port, "/", header, body)  # its post was replaced by a failure, so it is new or replayed
    assert taken.status in (200, 403)
    assert again(selling.pay.port, "/", header, body).status == 403
    who, header, body = next(hook for hook in hooks if hook[0] == "billing")
    replayed = [again(selling.port, "/api/billing", header, body) for _ in range(2)][-1]
    assert replayed.status == 403 and "used already" in replayed.text
    assert store.purchases.hooks_due() == []
    store.catalogue.change(anna, "boats", "private", 0)  # who has paid keeps it
    assert client_.get("boats", tmp_path / "later").name == "boats"


def test_a_settlement_is_taken_only_with_a_right_new_signature_of_the_billing_service(selling):
    body = json.dumps({"event": "e", "purchase": "0" * 32, "state": "paid"}).encode()
    now = int(time.time())
    for header, told in (
        ("", "wrong"),
        (billing.signed(b"t" * 32, "billing", body), "wrong"),
        (billing.signed(selling.secret, "market", body), "wrong"),  # the market's own hook, reflected
        (billing.signed(selling.secret, "billing", body + b" "), "wrong"),
        (billing.signed(selling.secret, "billing", body, now - billing.WINDOW - 9), "too old"),
        (billing.signed(selling.secret, "billing", body, now + billing.WINDOW + 9), "too old"),
        (billing.signed(selling.secret, "billing", body), "no such purchase"),
        (billing.signed(selling.secret, "billing", body, now - 1), "no such purchase"),
        (billing.signed(selling.secret, "billing", body, now - 1), "used already"),
    ):
        found = asked(selling, "POST", "/api/billing", body, {billing.HEADER: header})
        assert found.status in (403, 404) and told in found.text


def test_a_hook_that_nobody_takes_waits_longer_each_time_and_is_given_up_in_the_end(store, packed, monkeypatch):
    for name in ("anna", "ben"):
        store.accounts.sign_up(name, PASSWORD)
    anna, ben = (store.accounts.of_session(store.accounts.log_in(name, PASSWORD)) for name in ("anna", "ben"))
    content = packed().read_bytes()
    upload = store.uploads.begin(anna, len(content), package.hashlib.sha256(content).hexdigest())
    store.uploads.add(anna, upload, 0, content)
    store.uploads.publish(anna, upload, "paid", 100)
    assert store.purchases.buy(ben, "boats") == "pending" and store.purchases.buy(ben, "boats") == "pending"
    sender = billing.Sender(store, "http://127.0.0.1:9/", b"s" * 32)
    monkeypatch.setattr(billing, "post", lambda *_: 0)
    waits = []
    for _ in range(billing.TRIES):
        with store.database.look() as db:
            (hook,) = db.execute("SELECT * FROM hook").fetchall()
        before = int(time.time())
        sender._send(hook)
        with store.database.look() as db:
            waits.append(db.execute("SELECT due FROM hook").fetchone()[0] - before)
    assert waits[0] in (2, 3) and waits == sorted(waits) and waits[-1] in (billing.SLOWEST, billing.SLOWEST + 1)
    with store.database.look() as db:
        assert [row["state"] for row in db.execute("SELECT * FROM hook")] == ["given up"]


# Statistics and moderation


def test_only_uses_of_accounts_that_allow_it_are_counted_and_only_the_author_sees_them(market, packed, tmp_path):
    anna, ben, cleo = market.client("anna"), market.client("ben"), market.client("cleo")
    anna.publish(packed(), "free", 0)
    market.store.accounts.share(market.member("ben"), True)
    for number, who in enumerate((ben, cleo, market.client(None))):
        who.get("boats", tmp_path / str(number))
    assert ben.ask("POST", "/api/packages/boats/opened", {"version": 1}) == {"counted": True}
    assert cleo.ask("POST", "/api/packages/boats/opened", {"version": 1}) == {"counted": False}
    counted = anna.ask("GET", "/api/packages/boats/statistics")
    assert [(c["what"], c["version"], c["count"]) for c in counted] == [("download", 1, 1), ("opened", 1, 1)]
    assert "ben" not in json.dumps(counted)
    with pytest.raises(ValueError, match="author's"):
        ben.ask("GET", "/api/packages/boats/statistics")


def test_a_package_that_was_taken_down_is_gone_for_all_and_comes_back(market, packed, tmp_path):
    anna, ben = market.client("anna"), market.client("ben")
    anna.publish(packed(), "free", 0)
    ben.ask("POST", "/api/packages/boats/reports", {"reason": "It is <i>mine</i>."})
    moderator = Visitor(market)
    moderator.enter("mod")
    assert moderator.get("/moderation").status == 403
    market.store.accounts.make_moderator("mod")
    assert "It is &lt;i&gt;mine&lt;/i&gt;." in moderator.get("/moderation").text
    taken = moderator.post("/moderation", "/moderation", name="boats", action="take down", reason="stolen")
    assert taken.status == 303
    with pytest.raises(ValueError, match="no such package"):
        ben.get("boats", tmp_path / "here")
    with pytest.raises(ValueError, match="taken down: stolen"):
        anna.get("boats", tmp_path / "here")
    assert market.client(None).ask("GET", "/api/packages")["count"] == 0
    page = moderator.get("/moderation").text
    assert "It is &lt;i&gt;mine" not in page and "take down" in page and "publish" in page  # the audit log
    moderator.post("/moderation", "/moderation", name="boats", action="put back", reason="a mistake")
    assert ben.get("boats", tmp_path / "here").name == "boats"
    intruder = Visitor(market)
    intruder.enter("ben", new=False)
    assert intruder.post("/account", "/moderation", name="boats", action="take down", reason="x").status == 403


# Pages


def test_a_form_without_the_visitors_own_mark_does_nothing(market):
    visitor, other = Visitor(market), Visitor(market)
    visitor.enter("anna")
    other.enter("ben")
    theirs = re.search(r'name="csrf" value="([^"]*)"', other.get("/account").text)[1]
    for csrf in ("", "0" * 64, theirs, "é"):
        assert visitor.post("/account", "/account/tokens", csrf, label="x", scope="read").status == 403
    assert market.store.accounts.about(market.member("anna"))["tokens"] == []
    cross = visitor.ask("POST", "/account/tokens", "", Origin="http://evil.example")
    assert cross.status == 403
    made = visitor.post("/account", "/account/tokens", label="x", scope=["read", "buy"])
    assert re.search(r'id="token">mct-', made.text)
    assert [t["scopes"] for t in market.store.accounts.about(market.member("anna"))["tokens"]] == ["buy read"]


def test_pages_set_strict_cookies_and_run_no_script(market, packed):
    market.client("anna").publish(packed(description="<script>alert(1)</script>"), "free", 0)
    visitor = Visitor(market)
    entered = visitor.enter("ben")
    cookies = entered.headers.get_all("set-cookie")
    assert all("HttpOnly" in c and "SameSite=strict" in c for c in cookies) and len(cookies) == 1
    page = visitor.get("/packages/boats")
    assert "&lt;script&gt;alert(1)" in page.text and "<script" not in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "form-action 'self'" in policy and "frame-ancestors 'none'" in policy
    assert asked(market, "GET", "/", headers={"Host": "evil.example"}).status == 403


def test_behind_a_proxy_the_market_answers_under_its_own_name_alone(store):
    with Server(0) as server:
        server.start(build(store, server.host, limits=LIMITS, public="https://market.example"))
        there = SimpleNamespace(port=server.port)
        own = {"Host": "market.example", "Origin": "https://market.example"}
        page = asked(there, "GET", "/login", headers=own)
        assert page.status == 200 and "Secure" in page.headers["set-cookie"]
        assert asked(there, "GET", "/login", headers=own | {"Origin": "https://evil.example"}).status == 403
        assert asked(there, "GET", "/login", headers={"Host": "evil.example"}).status == 403


def test_a_password_that_is_wrong_or_of_nobody_is_answered_alike(market):
    Visitor(market).enter("anna")
    answers = [Visitor(market).post("/login", "/login", name=n, password="wrong wrong") for n in ("anna", "nobody")]
    assert [a.status for a in answers] == [403, 403]
    assert all("Name or password is wrong." in a.text for a in answers)
    visitor = Visitor(market)
    visitor.enter("anna", new=False)
    session = visitor.cookies[pages.COOKIE]
    assert visitor.get("/account").status == 200
    visitor.post("/account", "/logout")
    visitor.cookies = {pages.COOKIE: session}
    assert visitor.get("/account").status == 303  # the session itself has ended
