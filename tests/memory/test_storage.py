"""What was saved comes back; what is not a whole tree of this base and GistNet is refused; a kill loses nothing."""

import json
import os
import random
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import torch
from whole_trees import K, assert_same, everything, ids

from megactx.framework.errors import RunFailed
from megactx.gist import GistNet
from megactx.memory import MegaContextTree, storage
from megactx.memory import tree as tree_module


def manifest(folder: Path) -> dict:
    return json.loads((folder / storage.MANIFEST).read_text())


def database(folder: Path) -> Path:
    return folder / manifest(folder)["data"]


def about(folder: Path, **values) -> dict:
    """What the database says of the tree; ``values`` are written into it."""
    db = sqlite3.connect(database(folder), isolation_level=None)
    content = json.loads(db.execute("SELECT value FROM about WHERE name='tree'").fetchone()[0]) | values
    db.execute("UPDATE about SET value=? WHERE name='tree'", (json.dumps(content),))
    db.close()
    return content


@pytest.fixture
def small_pages(monkeypatch):
    monkeypatch.setattr(tree_module, "TOKENS", 64)
    monkeypatch.setattr(tree_module, "NODES", 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory", [0, 2**20])
def test_a_tree_comes_back_as_it_was_and_grows_on(encoder, table, tmp_path, dtype, memory, small_pages):
    tree = MegaContextTree.from_tokens(ids(2, 300), encoder(K), table, torch.tensor([300, 120]), dtype=dtype)
    tree.save(tmp_path / "tree")
    loaded = MegaContextTree.load(tmp_path / "tree", encoder(K), table, memory=memory)
    assert_same(tree, loaded)
    for seed in (2, 3):
        for one in (tree, loaded):
            one.append(ids(2, 77, seed=seed))
            one.gather(1, torch.tensor([[1], [2]]))
        loaded.save(tmp_path / "tree")
        again = MegaContextTree.load(tmp_path / "tree", encoder(K), table, memory=memory)
        for lod in range(1, tree.depth + 1):
            assert torch.equal(tree.gists(lod), loaded.gists(lod)) and torch.equal(tree.gists(lod), again.gists(lod))
        assert torch.equal(tree.about(1, "access"), again.about(1, "access"))


def test_parts_protection_and_access_counts_are_kept_and_an_empty_tree_too(tree, encoder, table, tmp_path):
    for one in (tree, MegaContextTree(encoder(K), table, rows=3, max_level=2)):
        one.save(tmp_path / "tree")
        assert_same(one, MegaContextTree.load(tmp_path / "tree", encoder(K), table))


def test_opening_reads_no_page_and_looking_reads_those_that_are_needed(encoder, table, tmp_path, small_pages):
    MegaContextTree.from_tokens(ids(1, 1000), encoder(K), table).save(tmp_path)
    loaded = MegaContextTree.load(tmp_path, encoder(K), table)
    assert loaded.cache.counts["miss"] == 0 and loaded.lengths.tolist() == [1000]
    loaded.levels[1].read("gist", torch.tensor([0, 0]), torch.tensor([7, 8]))
    assert loaded.cache.counts["miss"] == 1
    assert sum(len(page) for level in loaded.levels for page in level.pages) == 3  # gist, version, time of one page


def test_pages_leave_memory_by_the_least_recent_use_and_what_has_changed_stays(encoder, table, tmp_path, small_pages):
    whole = MegaContextTree.from_tokens(ids(1, 4000), encoder(K), table)
    whole.save(tmp_path)
    page = 5 * (4 * 4 + 8 + 4)
    loaded = MegaContextTree.load(tmp_path, encoder(K), table, memory=4 * page)
    level, row = loaded.levels[1], torch.tensor([0])

    def there():
        return [n for n, page in enumerate(level.pages) if "gist" in page]

    for number in (0, 1, 2, 3, 0, 4):
        level.read("gist", row, torch.tensor([5 * number]))
    assert there() == [0, 2, 3, 4] and loaded.cache.counts["evicted"] == 1
    level.write(row, torch.tensor([10]), gist=torch.ones(1, 4))
    for number in range(20, 40):
        level.read("gist", row, torch.tensor([5 * number]))
    assert 2 in there() and len(there()) == 4
    assert torch.equal(level.read("gist", row, torch.tensor([10])), torch.ones(1, 4))
    loaded.save(tmp_path)
    for number in range(20, 40):
        level.read("gist", row, torch.tensor([5 * number]))
    assert 2 not in there()
    assert torch.equal(level.read("gist", row, torch.tensor([10])), torch.ones(1, 4))


def test_the_pages_of_the_window_stay_and_those_of_its_children_come_ahead(encoder, table, tmp_path, small_pages):
    MegaContextTree.from_tokens(ids(1, 4000), encoder(K), table).save(tmp_path)
    loaded = MegaContextTree.load(tmp_path, encoder(K), table)
    loaded.embeddings(torch.zeros(2, dtype=torch.long), torch.tensor([2, 3]), torch.tensor([20, 30]))
    loaded.cache.worker.shutdown()  # it has done what it was asked for
    loaded.cache.ahead(())
    assert "gist" in loaded.levels[1].pages[80 // 5] and "gist" in loaded.levels[2].pages[120 // 5]
    before = loaded.cache.counts["miss"]
    loaded.levels[1].read("gist", torch.tensor([0]), torch.tensor([81]))
    assert loaded.cache.counts["miss"] == before and loaded.cache.counts["ahead"] >= 1
    loaded.cache.budget = 0
    for level in loaded.levels:
        level.whole([*level.columns][0])
    for n, page in ((2, 4), (3, 6)):
        assert "gist" in loaded.levels[n].pages[page]  # although there is no room
    assert "gist" not in loaded.levels[1].pages[80 // 5]


def test_a_save_writes_what_has_changed_and_a_tree_from_elsewhere_whole(encoder, table, tmp_path, small_pages):
    tree = MegaContextTree.from_tokens(ids(1, 1000), encoder(K), table)
    tree.save(tmp_path / "one")
    first = database(tmp_path / "one")
    tree.append(ids(1, 4))
    tree.save(tmp_path / "one")
    assert database(tmp_path / "one") == first and about(tmp_path / "one")["commit"] == 1
    tree.save(tmp_path / "other")
    tree.append(ids(1, 4))
    tree.save(tmp_path / "one")  # it lives elsewhere now
    assert database(tmp_path / "one") != first
    assert_same(tree, MegaContextTree.load(tmp_path / "one", encoder(K), table))


def test_two_that_write_do_not_mix_their_pages(encoder, table, tmp_path, small_pages):
    MegaContextTree.from_tokens(ids(1, 1000), encoder(K), table).save(tmp_path)
    one, other = (MegaContextTree.load(tmp_path, encoder(K), table, memory=0) for _ in range(2))
    one.append(ids(1, 200, seed=1))
    one.save(tmp_path)
    other.append(ids(1, 100, seed=2))
    other.save(tmp_path)  # it did not know of the other's pages: all of it is written
    assert_same(other, MegaContextTree.load(tmp_path, encoder(K), table))
    one.append(ids(1, 4))
    one.save(tmp_path)
    assert_same(one, MegaContextTree.load(tmp_path, encoder(K), table))


def test_readers_go_on_while_a_writer_saves(encoder, table, tmp_path, small_pages):
    tree = MegaContextTree.from_tokens(ids(1, 1000), encoder(K), table)
    tree.save(tmp_path)
    readers = [MegaContextTree.load(tmp_path, encoder(K), table, memory=0) for _ in range(3)]
    before = [tree.gists(n).clone() for n in range(1, tree.depth + 1)]
    for step in range(6):
        tree.append(ids(1, 30, seed=step))
        if step == 3:
            tree.refresh(encoder(K, factor=3.0))  # a new database: who reads the old one goes on with that
        tree.save(tmp_path)
        for reader in readers:
            assert all(torch.equal(reader.gists(n), gists) for n, gists in enumerate(before, start=1))
            assert reader.lengths.tolist() == [1000]


def test_a_damaged_page_is_named_and_the_rest_can_be_read(encoder, table, tmp_path, small_pages):
    tree = MegaContextTree.from_tokens(ids(1, 1000), encoder(K), table)
    tree.save(tmp_path)
    db = sqlite3.connect(database(tmp_path), isolation_level=None)
    flip = "UPDATE page SET value=CAST(substr(value, 1, 50) || x'ff' || substr(value, 52) AS BLOB) WHERE id=?"
    cut = "UPDATE page SET value=substr(value, 1, 50) WHERE id=?"
    other = "UPDATE page SET (value, checksum) = (SELECT value, checksum FROM page WHERE id=?1 + 1) WHERE id=?1"
    gone = "DELETE FROM page WHERE id=?"
    for number, change in enumerate((flip, cut, other, gone), start=3):
        db.execute(change, ((1 << 56) + number,))
    db.close()
    loaded = MegaContextTree.load(tmp_path, encoder(K), table)
    for number in range(50):
        if 3 <= number <= 6:
            gists = f"gists of level 1 {5 * number} to {5 * number + 4}"
            with pytest.raises(ValueError, match=f"{tmp_path}.*page {number} of level 1 .body of {gists}.*can be read"):
                loaded.gather(1, torch.tensor([[5 * number]]))
        else:
            row, index = torch.tensor([0]), torch.tensor([5 * number])
            assert torch.equal(loaded.levels[1].read("gist", row, index), tree.levels[1].read("gist", row, index))
    assert len(loaded.cache.damaged) == 4 and len(storage.damaged(tmp_path)) == 4
    nodes = torch.arange(60)  # of level 2: no window opens those whose children are damaged
    opens = loaded.openable(torch.zeros_like(nodes), torch.full_like(nodes, 2), nodes)
    assert nodes[~opens].tolist() == [*range(15 // K, 35 // K + 1)]
    loaded.append(ids(1, 40))
    loaded.save(tmp_path)  # what is whole is saved
    assert MegaContextTree.load(tmp_path, encoder(K), table).lengths.tolist() == [1040]


def elsewhere(end: str):
    def link(folder):
        path = folder / f"{manifest(folder)['data']}{end}"
        if path.exists():
            path.rename(folder.parent / "elsewhere")
        path.symlink_to(folder.parent / "elsewhere")

    return link


def change(**values):
    return lambda folder: about(folder, **values)


def named(text: str):
    return lambda folder: (folder / storage.MANIFEST).write_text(text)


DAMAGE = {
    "the database is gone": (lambda folder: database(folder).unlink(), "is missing"),
    "the database is a link": (elsewhere(""), "symbolic link"),
    "its log is a link": (elsewhere("-wal"), "symbolic link"),
    "the database is cut": (lambda folder: os.truncate(database(folder), 100), "is damaged"),
    "the database is none": (lambda folder: database(folder).write_bytes(b"x" * 9000), "is damaged"),
    "the data lies elsewhere": (named('{"format": 2, "data": "../pages"}'), "file name '../pages' is not allowed"),
    "ids that the base cannot embed": (None, "the base LM embeds 0 to 49"),
    "more tokens than pages": (change(lengths=[400, 5]), "are needed|is missing"),
    "a negative length": (change(lengths=[-1, 5]), "no numbers of tokens"),
    "lengths are words": (change(lengths=["a", "b"]), "no numbers of tokens"),
    "no rows": (change(lengths=[]), "rows=0"),
    "a page of no size": (change(page_sizes=[0, 1, 1, 1, 1]), "is no size"),
    "an unknown dtype": (change(dtype="load"), "dtype 'load'"),
    "a key is gone": (named('{"format": 2}'), "is damaged"),
    "the manifest is cut": (named('{"format"'), "is damaged"),
    "the manifest is no object": (named("[]"), "is damaged"),
    "the manifest is gone": (lambda folder: (folder / storage.MANIFEST).unlink(), "no saved tree"),
    "a newer format": (named('{"format": 4}'), "written by a newer program"),
    "another width": (change(width=8), "its width is 8, the GistNet's is 4"),
    "another block size": (change(block_size=32), "its block_size is 32, the GistNet's is 4"),
    "another base": (change(model="0123456789abcdef"), "another base LM"),
    "another GistNet": (change(versions=["0123456789abcdef"] * 2), "another GistNet"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_or_foreign_folder_is_refused_by_name(tree, encoder, table, tmp_path, what):
    damage, message = DAMAGE[what]
    folder = tmp_path / "tree"
    if damage is None:
        tree.levels[0].write(torch.tensor([0]), torch.tensor([3]), token=torch.tensor([1000]))
    tree.save(folder)
    tree.cache.file.close()
    if damage is not None:
        damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        assert MegaContextTree.load(folder, encoder(K), table).tokens is not None
    assert str(folder) in str(refused.value)


def test_a_disk_that_fills_leaves_the_tree_as_it_was(encoder, table, tmp_path, disk):
    folder = disk("260k") / "tree"
    tree = MegaContextTree.from_tokens(ids(1, 3000), encoder(K), table)
    tree.save(folder)
    before = MegaContextTree.load(folder, encoder(K), table)
    everything(before)
    tree.append(ids(1, 20_000))
    for _ in range(3):
        with pytest.raises(RunFailed, match="disk is full"):
            tree.save(folder)
        assert_same(before, MegaContextTree.load(folder, encoder(K), table))
    with pytest.raises(RunFailed, match="disk is full"):
        MegaContextTree.from_tokens(ids(1, 20_000), encoder(K), table).save(folder)
    assert_same(before, MegaContextTree.load(folder, encoder(K), table))
    tree.save(tmp_path / "elsewhere")
    assert_same(tree, MegaContextTree.load(tmp_path / "elsewhere", encoder(K), table))


def killed_at(step: int, folder: Path, encoder, table, token: int) -> bool:
    """A process that appends and saves, killed at a step of SQLite's own machine; -> whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            tree, left = MegaContextTree.load(folder, encoder(K), table), [step]
            tree.append(torch.full((1, 50), token))

            def count():
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            tree.home[0].db.set_progress_handler(count, 1)
            tree.save(folder)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), "the writer failed by itself"
    return code != 0


def test_a_save_that_is_killed_at_any_step_is_done_or_not_done(encoder, table, tmp_path, small_pages):
    tree = MegaContextTree.from_tokens(ids(1, 400), encoder(K), table)
    tree.save(tmp_path / "tree")
    tree.cache.file.close()
    seen, kills = set(), 0
    for number, step in enumerate([*range(0, 60, 6), *range(60, 900, 60)]):
        folder = tmp_path / f"{number}"
        shutil.copytree(tmp_path / "tree", folder)
        kills += killed_at(step, folder, encoder, table, number)
        loaded = MegaContextTree.load(folder, encoder(K), table)
        wanted = MegaContextTree.from_tokens(ids(1, 400), encoder(K), table)
        if loaded.lengths.tolist() == [450]:
            wanted.append(torch.full((1, 50), number))
        seen.add(loaded.lengths.item())
        assert torch.equal(loaded.tokens, wanted.tokens) and torch.equal(loaded.gists(1), wanted.gists(1))
        assert not storage.damaged(folder)
    assert kills >= 15 and seen == {400, 450}


def test_saving_again_replaces_the_tree_also_that_which_it_was_loaded_from(tree, encoder, table, tmp_path):
    tree.save(tmp_path)
    loaded = MegaContextTree.load(tmp_path, encoder(K), table)
    loaded.append(ids(2, 40))
    loaded.save(tmp_path)
    assert_same(loaded, MegaContextTree.load(tmp_path, encoder(K), table))
    beside = {"", "-wal", "-shm"}  # SQLite's, while a tree is open
    there = {path.name for path in tmp_path.iterdir()}
    assert there <= {f"{manifest(tmp_path)['data']}{end}" for end in beside} | {"manifest.json"}


def test_a_folder_with_other_things_is_not_touched(tree, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files and no saved tree"):
        tree.save(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "an extension"}')
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        tree.save(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        tree.save(tmp_path / "notes.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "notes.txt"]


def test_another_gistnet_is_refused_or_encodes_again(tmp_path):
    torch.manual_seed(0)
    table = torch.nn.Embedding(50, 32)
    old, new = (GistNet(32, 0.05, block_size=K, num_heads=4, skip="none") for _ in range(2))
    MegaContextTree.from_tokens(ids(1, 100), old, table).save(tmp_path)
    with pytest.raises(ValueError, match="another GistNet made it"):
        MegaContextTree.load(tmp_path, new, table)
    loaded = MegaContextTree.load(tmp_path, new, table, refresh=True)
    assert loaded.refresh(new) == 0
    assert torch.equal(loaded.gists(2), MegaContextTree.from_tokens(ids(1, 100), new, table).gists(2))
    ends = GistNet(32, 0.05, block_size=K, num_heads=4, skip="none", position="centre")
    ends.load_state_dict(old.state_dict())
    with pytest.raises(ValueError, match="another GistNet made it"):  # the same weights, at another position
        MegaContextTree.load(tmp_path, ends, table)


def test_the_same_base_lm_is_known_in_another_precision(base_folder, tmp_path):
    from megactx.lm import BaseLM

    full, half = BaseLM.from_pretrained(base_folder), BaseLM.from_pretrained(base_folder, "bfloat16")
    net = GistNet(full.width, full.embedding_rms(), block_size=K, num_heads=4)
    MegaContextTree.from_tokens(ids(1, 100), net, full).save(tmp_path)
    loaded = MegaContextTree.load(tmp_path, net, half)
    assert loaded.gather(1, torch.tensor([[2]])).dtype == torch.bfloat16
    full.model.get_input_embeddings().weight.data[7] += 1
    with pytest.raises(ValueError, match="belongs to another base LM"):
        MegaContextTree.load(tmp_path, net, full)
    with pytest.raises(ValueError, match="the base LM embeds 0 to 511"):
        MegaContextTree.from_tokens(ids(1, 8) + 500, net, half)


def test_a_folder_that_is_not_there_is_named(encoder, table, tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no saved tree"):
        MegaContextTree.load(tmp_path / "nowhere", encoder(K), table)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("memory", [0, 2**20])
def test_a_folder_of_shards_opens_and_is_converted_by_its_next_save(tree, encoder, table, tmp_path, memory):
    tree.export(tmp_path / "tree")
    loaded = MegaContextTree.load(tmp_path / "tree", encoder(K), table, memory=memory)
    loaded.append(ids(2, 10))
    loaded.save(tmp_path / "tree")
    assert manifest(tmp_path / "tree")["format"] == 2 and not list((tmp_path / "tree").rglob("*.safetensors"))
    assert_same(loaded, MegaContextTree.load(tmp_path / "tree", encoder(K), table, memory=memory))


def test_a_tree_can_be_read_where_nobody_may_write(tree, encoder, table, tmp_path, monkeypatch):
    tree.save(tmp_path / "tree")
    tree.cache.file.close()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert MegaContextTree.load(tmp_path / "tree", encoder(K), table).tokens.shape == (2, 360)
    assert sorted(path.suffix for path in (tmp_path / "tree").iterdir()) == [".db", ".json"]


def kill_writer(folder: Path, encoder, table, wait: float, generation: int) -> int:
    """A process that saves one tree after the other, killed after ``wait`` seconds; -> a tree that loads."""
    child = os.fork()
    if child == 0:
        try:
            while True:
                generation += 1
                tokens = torch.full((1, 300), generation % 50)
                tree = MegaContextTree.from_tokens(tokens, encoder(K), table, name=f"{generation}")
                tree.save(folder)
        finally:
            os._exit(1)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the writer failed by itself"
    loaded = MegaContextTree.load(folder, encoder(K), table)
    generation = int(loaded.parts[0][0])
    tokens = torch.full((1, 300), generation % 50)
    assert_same(loaded, MegaContextTree.from_tokens(tokens, encoder(K), table, name=f"{generation}"))
    return generation


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.long)])
def test_a_writer_that_is_killed_at_any_moment_leaves_a_tree(encoder, table, tmp_path, kills, monkeypatch):
    monkeypatch.setattr("time.time", lambda: 0.0)  # the time of a gist is all that may differ between two trees
    rng, generation, done = random.Random(0), 0, 0
    began = time.perf_counter()
    MegaContextTree.from_tokens(torch.zeros(1, 300).long(), encoder(K), table, name="0").save(tmp_path)
    usual = time.perf_counter() - began
    while done < kills or generation == 0:
        generation = kill_writer(tmp_path, encoder, table, rng.uniform(0.2, 3) * usual, generation)
        done += 1
