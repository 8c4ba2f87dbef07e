"""A tree at a URL: read by the page, whole and checked, kept on this disk; and what a person is told where it fails."""

import json
import sqlite3

import pytest
import torch
from range_server import serving
from whole_trees import K, assert_same, everything, ids

from megactx.memory import MegaContextTree, published, storage
from megactx.memory import tree as tree_module
from megactx.memory.disk_cache import DiskCache
from megactx.memory.published import PublishedPages, Unreachable
from megactx.memory.publishing import publish

ROW = torch.tensor([0])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has a cache of its own on the disk."""
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tree_module, "TOKENS", 64)
    monkeypatch.setattr(tree_module, "NODES", 5)
    published.kept.cache_clear()
    yield
    published.kept.cache_clear()


@pytest.fixture
def saved(encoder, table, tmp_path):
    tree = MegaContextTree.from_tokens(ids(1, 2000), encoder(K), table)
    tree.save(tmp_path / "tree")
    return tree


@pytest.fixture
def server(saved, tmp_path):
    publish(tmp_path / "tree", tmp_path / "www" / "library", {"from": "here"})
    with serving(tmp_path / "www") as server:
        yield server


@pytest.fixture
def opened(server, encoder, table):
    def load(**settings):
        return MegaContextTree.load(f"{server.url}/library", encoder(K), table, **settings)

    return load


def test_a_tree_at_a_url_is_the_tree_that_was_published(saved, opened, tmp_path, encoder, table):
    assert_same(saved, opened())
    assert_same(saved, opened(memory=0))  # from this disk
    assert_same(saved, MegaContextTree.load(tmp_path / "www" / "library", encoder(K), table))  # a folder is a place too
    assert storage.damaged(tmp_path / "www" / "library") == []


def test_opening_fetches_the_page_table_and_a_read_fetches_a_range(saved, opened, server):
    tree = opened()
    assert [name.partition("-")[0] for name, _ in server.asked] == ["manifest.json", "table"]
    found = tree.levels[1].read("gist", ROW, torch.tensor([7]))
    assert torch.equal(found, saved.levels[1].read("gist", ROW, torch.tensor([7])))
    ((name, asked),) = server.pages()
    low, high = map(int, asked.removeprefix("bytes=").split("-"))
    assert high - low < published.LEAST + 1000


def test_a_page_is_fetched_once_and_then_found_in_memory_and_on_this_disk(opened, server):
    first, index = opened(), torch.tensor([7])
    for _ in range(3):
        first.levels[1].read("gist", ROW, index)
    assert {name: tier.uses for name, tier in first.cache.tiers.items()} == {"memory": 2, "disk": 0, "remote": 1}
    second, before = opened(), len(server.pages())
    second.levels[1].read("gist", ROW, index)
    second.levels[1].read("gist", ROW, torch.tensor([12]))  # the page behind came with it
    assert {name: tier.uses for name, tier in second.cache.tiers.items()} == {"memory": 0, "disk": 2, "remote": 0}
    assert len(server.pages()) == before


def test_the_metrics_tell_each_tier_apart(opened, server):
    tree = opened(memory=3000)
    everything(tree)
    everything(tree)
    said = tree.cache.metrics()
    uses = {name: said[name]["uses"] for name in ("memory", "disk", "remote")}
    assert all(uses.values())
    assert said["memory"]["hit_rate"] == uses["memory"] / sum(uses.values())
    assert said["disk"]["hit_rate"] == uses["disk"] / (uses["disk"] + uses["remote"])
    assert said["remote"]["hit_rate"] == 1.0
    assert 0 < said["remote"]["p50"] <= said["remote"]["p99"] < 5 and said["memory"]["p50"] is None
    assert said["memory"]["bytes"] <= 3000 and said["memory"]["evicted"] > 0
    assert said["disk"]["bytes"] <= said["remote"]["bytes"] == tree.cache.file.size()


def test_the_cache_on_the_disk_stays_in_its_budget_and_the_oldest_page_leaves(saved, opened, server, tmp_path):
    budget = PublishedPages(tmp_path / "www" / "library").size() // 2
    tree = opened(disk=budget)
    assert_same(saved, tree)
    said = tree.cache.metrics()["disk"]
    assert 0 < said["bytes"] <= budget and said["evicted"] > 0
    cache = DiskCache(tmp_path / "small.db", budget=250)
    for page in (1, 2):
        cache.put("tree", [(page, bytes(100))])
    assert cache.get("tree", 1) == bytes(100)
    cache.put("tree", [(3, bytes(100))])
    assert (
        cache.get("tree", 2) is None
        and cache.get("tree", 1) is not None
        and cache.bytes("tree") == 200
        and cache.evicted["tree"] == 1
    )


def test_without_a_cache_on_the_disk_every_page_is_one_request(opened, server):
    tree = opened(disk=0)
    for index in (2, 7, 12):
        tree.levels[1].read("gist", ROW, torch.tensor([index]))
    assert len(server.pages()) == 3


def test_what_a_window_may_open_next_is_fetched_ahead(opened, server):
    tree = opened()
    tree.embeddings(torch.zeros(2, dtype=torch.long), torch.tensor([2, 3]), torch.tensor([20, 3]))
    tree.cache.worker.shutdown()
    tree.cache.ahead(())
    asked, before = len(server.pages()), tree.cache.counts["miss"]
    tree.levels[1].read("gist", ROW, torch.tensor([81]))
    assert tree.cache.counts["miss"] == before and len(server.pages()) == asked
    assert tree.cache.metrics()["ahead"]["precision"] > 0


def test_nothing_can_be_changed_in_a_tree_at_a_url(opened, tmp_path, saved):
    tree = opened()
    for change in (lambda: tree.append(ids(1, 4)), lambda: tree.save(tmp_path / "other")):
        with pytest.raises(ValueError, match="read only"):
            change()
    with pytest.raises(ValueError, match="holds a published tree"):
        saved.save(tmp_path / "www" / "library")


def test_a_damaged_page_is_named_and_the_rest_can_be_read(saved, opened, tmp_path, server):
    (shard,) = (tmp_path / "www" / "library").glob("pages-*")
    (rows, place) = row_of(tmp_path / "www" / "library", 1, "body", 4)
    content = bytearray(shard.read_bytes())
    content[int(rows[place]["offset"]) + 3] ^= 1
    shard.write_bytes(content)
    tree = opened()
    with pytest.raises(
        ValueError, match=r"library: page 4 of level 1 \(body of gists of level 1 20 to 24.: .*checksum"
    ):
        tree.levels[1].read("gist", ROW, torch.tensor([21]))
    for index in (0, 19, 25, 499):
        one = torch.tensor([index])
        assert torch.equal(tree.levels[1].read("gist", ROW, one), saved.levels[1].read("gist", ROW, one))
    assert len(tree.cache.damaged) == 1
    assert [line for line in storage.damaged(tmp_path / "www" / "library") if "page 4 of level 1" in line]


def row_of(folder, lod, part, number):
    from megactx.memory.page_file import page_id

    pages = PublishedPages(folder)
    return pages.rows, pages.ids.tolist().index(page_id(lod, part, number))


def test_a_shard_that_is_cut_damages_its_last_pages_only(saved, opened, tmp_path, server):
    (shard,) = (tmp_path / "www" / "library").glob("pages-*")
    rows, place = row_of(tmp_path / "www" / "library", 4, "body", 0)
    with shard.open("r+b") as file:
        file.truncate(int(rows[place]["offset"]))
    tree = opened()
    with pytest.raises(ValueError, match="page 0 of level 4 .*is damaged"):
        tree.gists(4)
    assert torch.equal(tree.gists(1), saved.gists(1))


def test_a_page_that_spoiled_on_this_disk_is_fetched_again(saved, opened, server, tmp_path):
    opened().levels[1].read("gist", ROW, torch.tensor([7]))
    db = sqlite3.connect(tmp_path / "cache" / "published.db", isolation_level=None)
    db.execute("UPDATE page SET value=zeroblob(size)")
    tree = opened()
    assert_same(saved, tree)
    db.close()
    published.kept.cache_clear()
    (tmp_path / "cache" / "published.db").write_bytes(b"x" * 9000)
    assert_same(saved, opened())


def test_a_server_that_goes_away_is_named_and_what_came_before_can_be_read(saved, opened, server):
    tree, one = opened(), torch.tensor([7])
    tree.levels[1].read("gist", ROW, one)
    server.dies = 0
    with pytest.raises(Unreachable, match=f"{server.url}/library: pages-.* did not come over"):
        tree.levels[0].read("token", ROW, torch.tensor([1999]))
    assert not tree.cache.damaged
    assert torch.equal(tree.levels[1].read("gist", ROW, one), saved.levels[1].read("gist", ROW, one))
    server.dies = None
    assert_same(saved, tree)


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [
        ("ranges", False, "the server sends whole files where a range of bytes was asked for"),
        ("status", {"manifest.json": 404}, "there is no published tree, manifest.json is missing"),
        ("status", {"manifest.json": 403}, "manifest.json may not be read .403."),
        ("status", {"table": 404}, "there is no published tree, table-.* is missing"),
        ("status", {"manifest.json": 500}, "manifest.json did not come over"),
    ],
)
def test_what_cannot_be_opened_is_told_in_one_sentence(opened, server, what, value, message):
    setattr(server, what, value)
    with pytest.raises(ValueError, match=message) as refused:
        opened()
    assert server.url in str(refused.value) and "\n" not in str(refused.value)


def test_a_page_that_may_not_be_read_may_be_asked_for_again(saved, opened, server):
    tree = opened()
    server.status = {"pages": 403}
    with pytest.raises(Unreachable, match="may not be read"):
        tree.gists(1)
    server.status = {}
    assert torch.equal(tree.gists(1), saved.gists(1))


def test_a_server_that_is_not_there_is_told_in_one_sentence(encoder, table, server):
    with pytest.raises(ValueError, match="did not come over"):
        MegaContextTree.load("http://127.0.0.1:9/tree", encoder(K), table)


@pytest.mark.parametrize(
    "url", ["ftp://host/tree", "file:///tree", "http://me:secret@host/tree", "http://host/tree?key=1", "http://a b/c"]
)
def test_a_url_that_is_not_allowed_is_refused(encoder, table, url):
    with pytest.raises(ValueError, match="is not allowed: a published tree is at"):
        MegaContextTree.load(url, encoder(K), table)


def test_a_page_table_or_manifest_of_a_stranger_is_refused(opened, tmp_path, server):
    folder = tmp_path / "www" / "library"
    whole = (folder / "manifest.json").read_text()
    for change, message in (
        (lambda said: said.pop("table"), "is damaged"),
        (lambda said: said.update(data="../other"), "is damaged"),
        (lambda said: said.update(format=2), "is none of a published tree"),
        (lambda said: said.update(pages=said["pages"] - 1), "page table .* is damaged"),
        (lambda said: said["tree"].update(lengths=[4000]), "pages, .* are there"),
    ):
        said = json.loads(whole)
        change(said)
        (folder / "manifest.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match=message):
            opened()


def test_who_reads_a_publication_goes_on_with_it_when_the_next_one_comes(saved, opened, server, tmp_path):
    reader = opened()
    before = saved.gists(1)
    saved.append(ids(1, 100, seed=5))
    saved.save(tmp_path / "tree")
    publish(tmp_path / "tree", tmp_path / "www" / "library")
    assert torch.equal(reader.gists(1), before)
    assert_same(saved, opened())
    publish(tmp_path / "tree", tmp_path / "www" / "library")
    names = {path.name.split("-")[1][:16] for path in (tmp_path / "www" / "library").glob("table-*")}
    assert len(names) == 2


def test_a_damaged_tree_or_another_folder_is_not_published(saved, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        publish(tmp_path / "tree", tmp_path / "mine")
    saved.home[0].db.execute("UPDATE page SET checksum=zeroblob(16)")
    with pytest.raises(ValueError, match="is damaged"):
        publish(tmp_path / "tree", tmp_path / "www")
    assert not [*(tmp_path / "www").iterdir()]


def test_notes_come_with_a_publication(server, tmp_path):
    assert PublishedPages(f"{server.url}/library").notes() == {"from": "here"}
    (notes,) = (tmp_path / "www" / "library").glob("notes-*")
    notes.write_text('{"from": "afar"}')
    with pytest.raises(ValueError, match="is damaged"):
        PublishedPages(f"{server.url}/library").notes()


@pytest.fixture(scope="module")
def bucket():
    """The address of an S3-like server with a bucket ``trees``."""
    import boto3
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ):
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="trees")
        yield client
        server.stop()


def test_a_tree_in_an_object_store_is_the_tree_that_was_published(saved, bucket, tmp_path, encoder, table):
    publish(tmp_path / "tree", tmp_path / "www")
    for path in (tmp_path / "www").iterdir():
        bucket.upload_file(str(path), "trees", f"library/{path.name}")
    tree = MegaContextTree.load("s3://trees/library", encoder(K), table)
    assert_same(saved, tree)
    uses = {name: tier.uses for name, tier in tree.cache.tiers.items()}
    assert uses["remote"] > 0 and uses["disk"] > 0
    with pytest.raises(ValueError, match="s3://trees/nothing: .*no published tree, manifest.json is missing"):
        MegaContextTree.load("s3://trees/nothing", encoder(K), table)
    (shard,) = (tmp_path / "www").glob("pages-*")
    bucket.delete_object(Bucket="trees", Key=f"library/{shard.name}")
    assert_same(saved, MegaContextTree.load("s3://trees/library", encoder(K), table))  # all of it is on this disk
    with pytest.raises(ValueError, match="it is missing: pages-.* if it was published anew, open it again"):
        MegaContextTree.load("s3://trees/library", encoder(K), table, disk=0).gists(1)
