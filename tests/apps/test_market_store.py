"""The tables of a market: put back, in PostgreSQL, asked by many at once."""

import contextlib
import json
import sqlite3
import subprocess
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import postgres
import psycopg
import pytest
from markets import LIMITS, PASSWORD, asked

from megactx.apps.market.app import build
from megactx.apps.market.client import Client
from megactx.apps.market.database import Refused
from megactx.apps.market.store import Store
from megactx.apps.market.uploads import UPLOADS
from megactx.apps.serving import Server

pytest_plugins = ["markets"]


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
