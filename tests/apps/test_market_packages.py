"""Packages: whole, signed and checked, and without what must not leave the house."""

import io
import json
import re
import sqlite3
import tarfile

import pytest
import torch
from markets import ABOUT, TEXT

from megactx.apps.market import pack as pack_module
from megactx.apps.market import package
from megactx.apps.market.package import differences, installed, key_of, public_of, unpack
from megactx.memory import MegaContextTree, storage
from megactx.memory.page_file import PageFile
from megactx.runtime import Wanted
from megactx.runtime.part_files import OpenPart

pytest_plugins = ["markets"]


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
