"""What one publishes another gets: nothing is lost by a broken line, and nothing damaged is installed."""

import pytest
from markets import TEXT

from megactx.apps.market import __main__ as command
from megactx.apps.market import client
from megactx.apps.market.client import Client
from megactx.apps.market.package import installed
from megactx.framework.errors import RunFailed
from megactx.memory import MegaContextTree

pytest_plugins = ["markets"]


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
