"""A market for tests, and packages to put into it: a plugin, for several files need them."""

import http.client
import json
from types import SimpleNamespace

import pytest
import torch

from megactx.apps.market import accounts
from megactx.apps.market import app as market_app
from megactx.apps.market import pack as pack_module
from megactx.apps.market.app import build
from megactx.apps.market.client import Client
from megactx.apps.market.database import Refused
from megactx.apps.market.metrics import Metrics
from megactx.apps.market.package import key_of, public_of
from megactx.apps.market.store import Store
from megactx.apps.serving import Server
from megactx.memory import MegaContextTree

FAST = dict(time_cost=1, memory_cost=1024, parallelism=1)
PASSWORD = "correct horse"
TEXT = {"boats": "The boat is called Wren. It lies at Heddon Quay.\n", "birds": "A wren is a small brown bird.\n"}
ABOUT = dict(name="boats", version=1, licence="CC-BY-4.0", description="Boats & <b>birds</b>", provenance="own notes")
LIMITS = dict.fromkeys(market_app.LIMITS, 100_000)


@pytest.fixture(scope="session")
def tree_of(models):
    """(folder, texts by source) -> a saved tree with a part of each."""

    def make(folder, texts=TEXT):
        tree = None
        for name, text in texts.items():
            ids = torch.tensor([models.base.tokenizer.encode(text * 8, add_special_tokens=False)])
            ids = ids[:, : ids.shape[1] // 4 * 4]
            part = MegaContextTree.from_tokens(ids, models.gistnet, models.base, name=name)
            if tree is None:
                tree = part
            else:
                tree.merge(part)
        tree.save(folder)
        return tree

    return make


@pytest.fixture(scope="session")
def packed(tree_of, models, tmp_path_factory):
    """Settings of the card -> the file of a package; each is made once."""
    folder, made = tmp_path_factory.mktemp("packed"), {}

    def make(texts=None, key="own", **about):
        texts = texts or TEXT
        name = json.dumps([texts, key, about])
        if name not in made:
            place = folder / str(len(made))
            tree_of(place / "tree", texts)
            made[name] = place / "package.tar"
            signer = key_of(folder / f"{key}.pem")
            pack_module.pack(place / "tree", made[name], models.base.tokenizer, signer, ABOUT | about)
        return made[name]

    make.key = lambda name="own": public_of(key_of(folder / f"{name}.pem"))
    return make


@pytest.fixture
def store(tmp_path, monkeypatch, database):
    hasher = accounts.PasswordHasher
    monkeypatch.setattr(accounts, "PasswordHasher", lambda: hasher(**FAST))
    made = Store(tmp_path / "data", database)
    yield made
    made.close()


@pytest.fixture
def market(store):
    """A market that answers; ``member(name)`` signs somebody up, ``client(name, *scopes)`` is theirs."""
    with Server(0) as server:
        metrics = Metrics(store)
        server.start(build(store, server.host, limits=LIMITS, metrics=metrics))

        def member(name):
            session = None
            try:
                store.accounts.sign_up(name, PASSWORD)
            except Refused:
                pass
            session = store.accounts.log_in(name, PASSWORD)
            return store.accounts.of_session(session)

        def of(name, *scopes):
            if name is None:
                return Client(server.address)
            token = store.accounts.new_token(member(name), "test", list(scopes or accounts.SCOPES))
            return Client(server.address, token)

        told = dict(address=server.address, port=server.port, store=store, metrics=metrics)
        yield SimpleNamespace(member=member, client=of, **told)


def asked(market, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", market.port, timeout=30)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    found = SimpleNamespace(status=answer.status, headers=answer.headers, text=answer.read().decode("utf-8", "replace"))
    connection.close()
    return found
