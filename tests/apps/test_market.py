"""Packages and the market: whole, signed and checked; seen and got by those who may; nothing lost by a broken line."""

import contextlib
import io
import json
import re
import sqlite3
import subprocess
import tarfile
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import postgres
import psycopg
import pytest
import torch
from markets import ABOUT, LIMITS, PASSWORD, TEXT, asked

from megactx.apps.market import __main__ as command
from megactx.apps.market import billing, client, package, pages
from megactx.apps.market import pack as pack_module
from megactx.apps.market.app import build
from megactx.apps.market.client import Client
from megactx.apps.market.database import Refused
from megactx.apps.market.package import differences, installed, key_of, public_of, unpack
from megactx.apps.market.store import TABLES, Store
from megactx.apps.market.uploads import LARGEST, UPLOADS
from megactx.apps.serving import Server
from megactx.framework.errors import RunFailed
from megactx.memory import MegaContextTree, storage
from megactx.memory.page_file import PageFile
from megactx.runtime import Wanted
from megactx.runtime.part_files import OpenPart

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


# Packages


def test_an_installed_package_opens_as_the_tree_that_was_packed(packed, models, tmp_path, tree_of):
    place = tmp_path / "here"
    place.mkdir()
    card, key = unpack(packed(), place)
    tree = MegaContextTree.load(place, models.gistnet, models.base)
    own = tree_of(tmp_path / "own")
    assert torch.equal(tree.tokens, own.tokens) and torch.equal(tree.gists(1), own.gists(1))
    assert [s.name for s in card.sources] == ["boats", "birds"] and card.tokens == int(own.lengths[0])
    assert key == packed.key() and installed(place) == (card, key)
    shown = [models.base.tokenizer.decode(own.tokens[0, s.start : s.start + 4].tolist()) for s in card.samples]
    assert [s.text for s in card.samples] == shown and len({s.start for s in card.samples}) == package.SAMPLES


def test_an_installed_package_is_a_part_of_a_session_with_its_licence_and_its_sources(packed, models, tmp_path):
    place = tmp_path / "here"
    place.mkdir()
    card, _ = unpack(packed({"boats": TEXT["boats"], "bi\n\x1b[2Jrds": TEXT["birds"]}), place)
    part = OpenPart(Wanted("shop", place), models)
    birds = card.sources[1].start
    assert part.licence == "CC-BY-4.0"
    assert (
        str(part.origin(0)) == "boats:1" and part.origin(birds).file == "bi rds"
    )  # a stranger's name stays in its line
    assert part.origin(birds - 1).file == "boats" and part.origin(card.tokens - 1).line > 1
    part.close()
    (place / package.CARD).write_text("{}")  # changed by hand: a part still
    part = OpenPart(Wanted("shop", place), models)
    assert part.licence == "" and part.origin(0) is None
    part.close()


def test_what_curation_took_away_does_not_leave_the_house(tree_of, models, tmp_path):
    tree_of(tmp_path / "tree")
    file = PageFile(storage.database(tmp_path / "tree", storage.read_manifest(tmp_path / "tree")["data"]))
    file.db.execute("INSERT INTO archive VALUES (0, 4, 1, 0, x'736563726574', x'00')")
    file.db.execute("INSERT INTO log (time, action, start, stop, reason) VALUES (0, 'compact', 0, 4, 'a reason')")
    file.say("note", "mine")
    file.close()
    out = tmp_path / "package.tar"
    pack_module.pack(tmp_path / "tree", out, models.base.tokenizer, key_of(tmp_path / "key"), ABOUT)
    content = out.read_bytes()
    assert (
        b"a reason" not in content and b"mine" not in content and b"736563" not in content and b"secret" not in content
    )


@pytest.mark.parametrize(
    "secret",
    [
        "AKIAQYLPMN5HHHFPZAM2",
        "-----BEGIN RSA PRIVATE KEY-----",
        "ghp_" + "a1B2" * 9,
        "https://bob:hunter22@example.org/",
    ],
)
def test_a_tree_that_holds_a_secret_is_not_packed_until_its_mark_is_allowed(secret, tree_of, models, tmp_path):
    tree_of(tmp_path / "tree", {"notes": f"Nothing here.\nkey {secret} end\n"})
    given = (tmp_path / "tree", tmp_path / "out.tar", models.base.tokenizer, key_of(tmp_path / "key"), ABOUT)
    with pytest.raises(ValueError, match="may hold secrets: .* in .*mark") as told:
        pack_module.pack(*given)
    assert secret not in str(told.value) and not (tmp_path / "out.tar").exists()
    marks = set()
    while marks != (marks := marks | {*re.findall(r"mark ([0-9a-f]{12})", str(told.value))}):
        try:
            pack_module.pack(*given, allowed=marks)
            break
        except ValueError as error:
            told.value = error
    assert (tmp_path / "out.tar").exists()


def test_a_secret_that_two_pieces_cut_is_found(tree_of, models, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "PIECE", 8)
    tree_of(tmp_path / "tree", {"notes": "one two key AKIAQYLPMN5HHHFPZAM2 end\n"})
    with pytest.raises(ValueError, match="AWS Access Key"):
        given = models.base.tokenizer, key_of(tmp_path / "key"), ABOUT
        pack_module.pack(tmp_path / "tree", tmp_path / "out.tar", *given)


def test_a_key_is_for_its_owner_alone_and_stays(tmp_path):
    key = key_of(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert public_of(key_of(tmp_path / "key")) == public_of(key)
    (tmp_path / "key").write_text("nothing")
    with pytest.raises(ValueError, match="it is no key"):
        key_of(tmp_path / "key")


def rewritten(path, out, change, key=None):
    """A package with its members changed: ``change``: of name -> bytes; with a key it is signed anew."""
    with tarfile.open(path) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    members = change(members)
    if key is not None:
        signature = key.sign(members[package.CARD]).hex()
        members[package.SIGNATURE] = json.dumps({"key": public_of(key), "signature": signature}).encode()
    with tarfile.open(out, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out


def with_card(change):
    def changed(members):
        card = json.loads(members[package.CARD])
        change(card)
        return members | {package.CARD: json.dumps(card).encode()}

    return changed


def test_whatever_is_changed_behind_the_signature_is_refused(packed, tmp_path):
    def flipped(name):
        return lambda members: (
            members | {name: members[name][:-9] + bytes([members[name][-9] ^ 1]) + members[name][-8:]}
        )

    with tarfile.open(packed()) as tar:
        names = tar.getnames()
    for number, name in enumerate(names):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(ValueError):
            unpack(rewritten(packed(), tmp_path / "bad.tar", flipped(name)), place)
    (tmp_path / "card").mkdir()
    changed = with_card(lambda card: card.update(licence="MIT"))
    with pytest.raises(ValueError, match="changed after it was signed"):
        unpack(rewritten(packed(), tmp_path / "bad.tar", changed), tmp_path / "card")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (with_card(lambda card: card.update(licence="Free Beer")), "no SPDX licence"),
        (with_card(lambda card: card.update(licence="mit")), "usual form"),
        (with_card(lambda card: card["model"].update(embeddings="0" * 16)), "another model"),
        (with_card(lambda card: card.update(tokens=card["tokens"] + 4)), "sources do not follow"),
        (with_card(lambda card: card["files"][0].update(name="../../x")), "files.0.name"),
        (with_card(lambda card: card.update(code="import os")), "code"),
        (lambda members: members | {"run.py": b"import os"}, "more than its card says"),
    ],
    ids=["licence", "form", "model", "sources", "path", "field", "code"],
)
def test_a_signed_package_that_is_not_what_it_says_is_refused(change, told, packed, tmp_path):
    (tmp_path / "place").mkdir()
    bad = rewritten(packed(), tmp_path / "bad.tar", change, key_of(tmp_path / "key"))
    with pytest.raises(ValueError, match=told):
        unpack(bad, tmp_path / "place")


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("CREATE TRIGGER t AFTER INSERT ON page BEGIN DELETE FROM page; END", "other tables"),
        ("CREATE VIEW v AS SELECT * FROM page", "other tables"),
        ("INSERT INTO archive VALUES (0, 4, 1, 0, x'00', x'00')", "taken away"),
        ("INSERT INTO about VALUES ('more', '1')", "says more"),
        ("DELETE FROM page WHERE id = (SELECT MIN(id) FROM page)", "pages of body"),
        ("UPDATE page SET value = zeroblob(length(value)) WHERE id = 0", "damaged"),
        ("UPDATE about SET value = '[1]'", "damaged"),
        ("UPDATE about SET value = replace(value, '\"page_sizes\": [', '\"page_sizes\": [0, ')", "no sizes"),
    ],
)
def test_a_database_that_is_more_or_less_than_a_tree_is_refused(statement, told, packed, tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "again").mkdir()
    card, _ = unpack(packed(), tmp_path / "place")
    database = tmp_path / "place" / card.files[1].name
    db = sqlite3.connect(database)
    db.execute(statement)
    db.commit()
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    content = database.read_bytes()

    def changed(members):
        def file(card_):
            card_["files"][1].update(bytes=len(content), sha256=package.hashlib.sha256(content).hexdigest())

        return with_card(file)(members) | {card.files[1].name: content}

    bad = rewritten(packed(), tmp_path / "bad.tar", changed, key_of(tmp_path / "key"))
    with pytest.raises(ValueError, match=told):
        unpack(bad, tmp_path / "again")


def test_a_zipped_page_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    import zlib

    from megactx.memory import page_file

    monkeypatch.setattr(page_file, "LARGEST", 1000)
    file = PageFile(tmp_path / "pages.db", new=True)
    file.put([(0, "body", 0, b"0" * 900), (0, "body", 1, b"0" * 5000)], zipped=True)
    assert file.get(0, "body", 0) == b"0" * 900
    with pytest.raises(ValueError, match="larger than 1,000 bytes"):
        file.get(0, "body", 1)
    value = zlib.compress(b"0" * 900)[:-6]
    own = page_file.page_id(0, "body", 2)
    file.db.execute("INSERT INTO page VALUES (?, ?, ?, 1)", (own, value, page_file._checksum(own, value)))
    with pytest.raises(ValueError, match="damaged"):
        file.get(0, "body", 2)


def test_differences_name_the_sources_that_came_went_and_changed():
    def sources(**hashes):
        return [{"name": name, "sha256": value} for name, value in hashes.items()]

    old, new = sources(a="1", b="2", c="3"), sources(b="2", c="4", d="5")
    assert differences(old, new) == {"came": ["d"], "went": ["a"], "changed": ["c"]}


# The road by the command's client


def test_what_one_publishes_another_finds_previews_and_gets(market, packed, models, tmp_path):
    anna = market.client("anna")
    assert anna.publish(packed(), "free", 0) == {"name": "boats", "version": 1}
    texts = {"boats": TEXT["boats"] * 2, "ships": "A ship is not a boat.\n"}
    assert anna.publish(packed(texts, version=2), "free", 0)["version"] == 2
    nobody = market.client(None)
    assert [p["name"] for p in nobody.ask("GET", "/api/packages", q="Boats CC-BY")["packages"]] == ["boats"]
    assert nobody.ask("GET", "/api/packages", q="aeroplane")["count"] == 0
    identity = nobody.ask("GET", "/api/packages/boats/versions/1")["card"]["model"]["embeddings"]
    assert nobody.ask("GET", "/api/packages", model=identity)["count"] == 1
    assert nobody.ask("GET", "/api/packages", model="f" * 16)["count"] == 0
    change = nobody.ask("GET", "/api/packages/boats/differences/1/2")
    assert change == {"came": ["ships"], "went": ["birds"], "changed": ["boats"]}
    card = nobody.get("boats", tmp_path / "here", 1)
    assert card.version == 1
    assert nobody.get("boats", tmp_path / "here").version == 2  # in place of the first
    tree = MegaContextTree.load(tmp_path / "here", models.gistnet, models.base)
    assert int(tree.lengths[0]) == nobody.ask("GET", "/api/packages/boats/versions/2")["card"]["tokens"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_download_goes_on_where_the_line_broke(market, packed, tmp_path, monkeypatch):
    market.client("anna").publish(packed(), "free", 0)
    asks, opened = [], Client._open

    class Broken:
        def __init__(self, answer, most):
            self.answer, self.left, self.status = answer, most, answer.status

        def read1(self, count):
            if self.left <= 0:
                raise ConnectionResetError("broken")
            piece = self.answer.read1(min(count, self.left))
            self.left -= len(piece)
            return piece

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.answer.close()

    def breaking(self, method, path, body, query, headers=None):
        answer = opened(self, method, path, body, query, headers)
        if path.endswith("/file"):
            asks.append((headers["Range"], answer.status))
            return Broken(answer, 9000) if len(asks) < 4 else answer
        return answer

    monkeypatch.setattr(Client, "_open", breaking)
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    assert market.client(None).get("boats", tmp_path / "here").name == "boats"
    assert asks == [(f"bytes={n * 9000}-", 206) for n in range(4)]


def test_a_download_that_breaks_too_often_is_kept_and_goes_on_with_the_next_command(
    market, packed, tmp_path, monkeypatch
):
    market.client("anna").publish(packed(), "free", 0)
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    download, whole = Client._download, packed().stat().st_size

    def half(self, path, part, size):
        part.write_bytes(packed().read_bytes()[: size // 2])
        raise RunFailed("broke off")

    monkeypatch.setattr(Client, "_download", half)
    with pytest.raises(RunFailed):
        market.client(None).get("boats", tmp_path / "here")
    assert not (tmp_path / "here").exists()
    monkeypatch.setattr(Client, "_download", download)
    seen = []
    again = Client(market.address, saw=lambda done, of: seen.append(done))
    again.get("boats", tmp_path / "here")
    assert seen[0] == whole // 2 and seen[-1] == whole


def test_an_upload_goes_on_where_the_line_broke(market, packed, monkeypatch):
    opened, broken = Client._open, []

    def breaking(self, method, path, body, query, headers=None):
        answer = opened(self, method, path, body, query, headers)
        if method == "PATCH" and len(broken) < 2:  # it came, and the answer did not
            broken.append(query["offset"])
            answer.close()
            raise ConnectionResetError("broken")
        return answer

    monkeypatch.setattr(Client, "_open", breaking)
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(client, "PIECE", 10_000)
    assert market.client("anna").publish(packed(), "free", 0)["version"] == 1
    assert broken == [0, 10_000]
    stored = next((market.store.folder / "packages").iterdir())
    assert stored.read_bytes() == packed().read_bytes() and not [*(market.store.folder / "uploads").iterdir()]


def test_what_comes_damaged_or_signed_by_another_is_not_installed(market, packed, tmp_path):
    anna = market.client("anna")
    anna.publish(packed(), "free", 0)
    nobody = market.client(None)
    with pytest.raises(ValueError, match="signed by"):
        nobody.get("boats", tmp_path / "here", signer="0" * 64)
    nobody.get("boats", tmp_path / "here", signer=packed.key())
    market.store.accounts.signer(market.member("anna"), packed.key("other"), True)
    anna.publish(packed(key="other", version=2), "free", 0)
    with pytest.raises(ValueError, match="signed by"):
        nobody.get("boats", tmp_path / "here")  # another key than that of the version which is there
    assert installed(tmp_path / "here")[0].version == 1
    for stored in (market.store.folder / "packages").iterdir():
        content = bytearray(stored.read_bytes())
        content[5000] ^= 1
        stored.write_bytes(content)
    with pytest.raises(ValueError, match="came damaged"):
        nobody.get("boats", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "here"]


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


# Operation and command


def restored(folder, database, request):
    """A market that stands on a copy."""
    if database is None:
        return Store(folder)
    new = request.getfixturevalue("cluster").new()
    restore = [postgres.binaries() / "pg_restore", "--no-owner", f"--dbname={new}", folder / "market.dump"]
    subprocess.run(restore, check=True)
    return Store(folder, new)


def test_a_backup_that_is_put_back_serves_all_of_it(market, packed, tmp_path, database, request):
    anna = market.client("anna")
    anna.publish(packed(), "free", 0)
    market.store.backup(tmp_path / "copy")
    anna.publish(packed(version=2), "free", 0)
    with Server(0) as server, contextlib.closing(restored(tmp_path / "copy", database, request)) as found:
        server.start(build(found, server.host, limits=LIMITS))
        again = Client(server.address, anna.token)
        assert again.get("boats", tmp_path / "here").version == 1
    with pytest.raises(ValueError, match="not an empty folder"):
        market.store.backup(tmp_path / "copy")


def test_a_folder_of_another_program_or_a_newer_one_is_no_market(tmp_path, store, database):
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "file").touch()
    with pytest.raises(ValueError, match="something else"):
        Store(tmp_path / "else", database)
    with contextlib.closing(sqlite3.connect(store.path)) if database is None else store.database.step() as db:
        db.execute("PRAGMA user_version=9" if database is None else "UPDATE about SET format=9")
    with pytest.raises(ValueError, match="newer program"):
        Store(store.folder, database)


@pytest.mark.slow
def test_tables_in_postgresql_belong_to_one_folder_and_to_nothing_else(tmp_path, cluster, store, database):
    if database is None:
        with pytest.raises(ValueError, match="leave --database away"):
            Store(store.folder, cluster.new())
        return
    with pytest.raises(ValueError, match="name it with --database"):
        Store(store.folder)
    with pytest.raises(ValueError, match="belongs to another folder"):
        Store(tmp_path / "other", database)
    assert not (tmp_path / "other" / "database").exists()
    (store.folder / "packages" / ("0" * 64)).touch()
    with pytest.raises(ValueError, match="it is empty and the folder is not"):
        Store(store.folder, cluster.new())
    with pytest.raises(ValueError, match="its encoding is SQL_ASCII"):
        Store(tmp_path / "third", cluster.new("--encoding=SQL_ASCII", "--locale=C", "--template=template0"))
    taken = cluster.new()
    with psycopg.connect(taken) as db:
        db.execute("CREATE TABLE about (x INTEGER)")
    with pytest.raises(ValueError, match="holds something else"):
        Store(tmp_path / "fourth", taken)
    with pytest.raises(ValueError, match=r"--database: it cannot be opened \(.*nothing"):
        Store(tmp_path / "fresh", f"postgresql://market@/nothing?host={cluster.folder}")
    assert not (tmp_path / "fresh").exists()


@pytest.mark.slow
def test_a_postgresql_that_is_gone_is_told_and_one_that_is_back_answers(market, database, cluster, monkeypatch):
    if database is None:
        pytest.skip("SQLite is no server")
    market.member("anna")
    cluster.stop()
    try:
        market.store.database.pool.timeout = 0.5
        found = asked(market, "GET", "/api/packages")
        assert found.status == 503 and "does not answer" in found.text and found.headers["retry-after"] == "5"
        assert asked(market, "GET", "/").status == 503
    finally:
        cluster.start()
    market.store.database.pool.timeout = 20
    assert asked(market, "GET", "/api/packages").status == 200
    assert market.member("anna")["name"] == "anna"


def test_steps_of_many_threads_wait_for_each_other(store):
    store.accounts.sign_up("anna", PASSWORD)
    account = store.accounts.of_session(store.accounts.log_in("anna", PASSWORD))
    with ThreadPoolExecutor(8) as pool:
        marks = [*pool.map(lambda _: store.purchases.fresh("mark", 300), range(16))]
        uploads = [*pool.map(lambda _: begun(store, account), range(8))]
    assert marks.count(True) == 1
    assert sum(upload is not None for upload in uploads) == UPLOADS  # each counted those before it


def begun(store, account):
    try:
        return store.uploads.begin(account, 10, "0" * 64)
    except Refused:
        return None


@pytest.mark.parametrize("asked_for", ["a\0b", "100%", "a_b", "a!b", "%"])
def test_signs_that_a_database_reads_otherwise_are_searched_as_they_are(asked_for, market, packed):
    anna = market.client("anna")
    anna.publish(packed(description="a!b and a_b at 100% of a\0b"), "free", 0)
    anna.publish(packed(name="birds", description="axb at 100 parts"), "free", 0)
    found = asked(market, "GET", f"/api/packages?{urllib.parse.urlencode({'q': asked_for})}")
    if "\0" in asked_for:
        assert found.status in (200, 400)
    else:
        assert [p["name"] for p in json.loads(found.text)["packages"]] == ["boats"]


def test_the_command_publishes_finds_shows_and_gets(market, tree_of, exported, tmp_path, monkeypatch, capsys):
    tree_of(tmp_path / "tree")
    monkeypatch.setenv(command.TOKEN, market.client("anna").token)
    at = ["--at", market.address]
    made = ["--name", "boats", "--licence", "cc-by-4.0", "--model", str(exported), "--key", str(tmp_path / "key")]
    assert command.main(["publish", str(tmp_path / "tree"), *made, "--access", "free", *at]) == 0
    assert command.main(["publish", str(tmp_path / "tree"), *made, "--access", "free", *at]) == 0  # the next version
    assert command.main(["pack", str(tmp_path / "tree"), str(tmp_path / "p.tar"), *made, "--version", "3"]) == 0
    assert command.main(["publish", str(tmp_path / "p.tar"), "--access", "free", *at]) == 0
    capsys.readouterr()
    assert command.main(["search", "boats", *at]) == 0
    assert "boats 3  by anna, CC-BY-4.0" in capsys.readouterr().out
    assert command.main(["show", "boats", *at]) == 0
    shown = capsys.readouterr().out
    assert "birds" in shown and "  | It li" in shown and "since 2 came: nothing" in shown
    assert command.main(["get", "boats", str(tmp_path / "here"), *at]) == 0
    assert installed(tmp_path / "here")[0].version == 3
    assert command.main(["opened", str(tmp_path / "here"), *at]) == 0
    assert "not counted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["get", "nothing", "HERE"], 2, "There is no such package."),
        (["get", "../x", "HERE"], 2, "no name of a package"),
        (["get", "boats", "HERE", "--at", "http://127.0.0.1:9"], 3, "cannot be reached"),
        (["search", "--at", "ftp://x"], 2, "--at=ftp://x is not allowed"),
        (["search", "--at", "http://example.org"], 2, "use https"),
        (["opened", "HERE"], 2, "no package is installed there"),
        (["publish", "HERE"], 2, "--name and --licence"),
        (["publish", "HERE", "--name", "boats", "--licence", "Free Beer"], 2, "no SPDX licence"),
        (["backup", "HERE", "THERE"], 2, "there is no market"),
        (["serve", "DATA", "--billing", "http://x"], 2, "belong together"),
        (["serve", "DATA", "--public", "x"], 2, "--public=x is not allowed"),
        (["serve", "ELSE", "--database", "postgresql://market@127.0.0.1:9/x"], 2, "--database: it cannot be opened"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(arguments, code, told, market, exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(command.TOKEN, market.client("anna").token)
    monkeypatch.setattr(client.time, "sleep", lambda seconds: None)
    arguments = [str(tmp_path / a.lower()) if a.isupper() else a for a in arguments]
    if arguments[0] in ("get", "search", "opened", "publish") and "--at" not in arguments:
        arguments += ["--at", market.address]
    if arguments[0] == "publish":
        arguments += ["--model", str(exported), "--key", str(tmp_path / "key")]
    assert command.main(arguments) == code
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error and error.count("\n") == 1


def test_what_a_stranger_wrote_does_not_move_the_terminal():
    assert command._line("a\x1b[2Jb\nc\u202ed") == "a [2Jb c d"
