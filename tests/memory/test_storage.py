"""What was saved comes back; what is not a whole tree of this base and GistNet is refused; a kill loses nothing."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megactx.gist import GistNet
from megactx.memory import MegaContextTree, storage
from megactx.memory import tree as tree_module

K = 4


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def everything(tree) -> list[torch.Tensor]:
    columns = [(level, column) for level in tree.levels for column in level.columns]
    return [tree.lengths, *[level.whole(column) for level, column in columns], *[first for _, first in tree.parts]]


def assert_same(one, other):
    assert [name for name, _ in one.parts] == [name for name, _ in other.parts] and one.max_level == other.max_level
    assert len(everything(one)) == len(everything(other))
    for a, b in zip(everything(one), everything(other), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.fixture
def tree(encoder, table):
    tree = MegaContextTree.from_tokens(ids(2, 300), encoder(K), table, torch.tensor([300, 120]), name="first")
    tree.merge(MegaContextTree.from_tokens(ids(2, 60, seed=1), encoder(K), table, name="second"))
    tree.protect(1, torch.tensor([[3], [4]]))
    tree.gather(1, torch.tensor([[1, 2], [3, 4]]))
    return tree


def manifest(folder: Path) -> dict:
    return json.loads((folder / storage.MANIFEST).read_text())


def shard(folder: Path, level: int = 1) -> Path:
    return next((folder / manifest(folder)["data"]).glob(f"level{level}-*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tree_comes_back_as_it_was_and_grows_on(encoder, table, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(tree_module, "TOKENS", 64)
    monkeypatch.setattr(tree_module, "NODES", 5)
    monkeypatch.setattr(storage, "SHARD", 700)
    tree = MegaContextTree.from_tokens(ids(2, 300), encoder(K), table, torch.tensor([300, 120]), dtype=dtype)
    tree.save(tmp_path / "tree")
    assert len(manifest(tmp_path / "tree")["shards"]) > 10
    monkeypatch.undo()  # pages keep the size that they were saved with
    loaded = MegaContextTree.load(tmp_path / "tree", encoder(K), table)
    assert_same(tree, loaded)
    for one in (tree, loaded):
        one.append(ids(2, 77, seed=2))
        one.gather(1, torch.tensor([[1], [2]]))
    for lod in range(1, tree.depth + 1):
        assert torch.equal(tree.gists(lod), loaded.gists(lod))
    assert torch.equal(tree.about(1, "access"), loaded.about(1, "access"))


def test_parts_protection_and_access_counts_are_kept_and_an_empty_tree_too(tree, encoder, table, tmp_path):
    for one in (tree, MegaContextTree(encoder(K), table, rows=3, max_level=2)):
        one.save(tmp_path / "tree")
        assert_same(one, MegaContextTree.load(tmp_path / "tree", encoder(K), table))


def test_reading_maps_the_files_and_writing_to_the_tree_leaves_them_alone(tree, encoder, table, tmp_path):
    tree.save(tmp_path)
    before = shard(tmp_path).read_bytes()
    loaded = MegaContextTree.load(tmp_path, encoder(K), table)
    assert shard(tmp_path).name in Path("/proc/self/maps").read_text()
    loaded.gather(1, torch.tensor([[5], [5]]))
    loaded.refresh(encoder(K, factor=3.0))
    assert shard(tmp_path).read_bytes() == before


def test_saving_again_replaces_the_tree_also_that_which_it_was_loaded_from(tree, encoder, table, tmp_path):
    tree.save(tmp_path)
    loaded = MegaContextTree.load(tmp_path, encoder(K), table)
    loaded.append(ids(2, 40))
    loaded.save(tmp_path)
    assert_same(loaded, MegaContextTree.load(tmp_path, encoder(K), table))
    assert sorted(path.name for path in tmp_path.iterdir()) == [manifest(tmp_path)["data"], "manifest.json"]


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


def truncate(folder):
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    path = shard(folder)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def link(folder):
    path = shard(folder)
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def link_data(folder):
    data = folder / manifest(folder)["data"]
    data.rename(folder.parent / "elsewhere")
    data.symlink_to(folder.parent / "elsewhere")


def change(**values):
    def edit(folder):
        (folder / storage.MANIFEST).write_text(json.dumps(manifest(folder) | values))

    return edit


def change_shard(**values):
    def edit(folder):
        content = manifest(folder)
        content["shards"][1] |= values
        (folder / storage.MANIFEST).write_text(json.dumps(content))

    return edit


def reshape(folder):
    """A shard of another shape, with a checksum that is right."""
    path, content = shard(folder), manifest(folder)
    tensors = load_file(path)
    tensors["gist.0"] = torch.zeros(2, 3, 4)
    save_file(tensors, path)
    content["shards"][1] |= {"bytes": path.stat().st_size, "sha256": storage._checksum(path)}
    (folder / storage.MANIFEST).write_text(json.dumps(content))


def pickled(folder):
    path, content = shard(folder), manifest(folder)
    torch.save({"gist.0": torch.zeros(2)}, path)
    content["shards"][1] |= {"bytes": path.stat().st_size, "sha256": storage._checksum(path)}
    (folder / storage.MANIFEST).write_text(json.dumps(content))


def foreign_ids(folder):
    path, content = shard(folder, 0), manifest(folder)
    tensors = load_file(path)
    tensors["token.0"] += 1000
    save_file(tensors, path)
    content["shards"][0] |= {"bytes": path.stat().st_size, "sha256": storage._checksum(path)}
    (folder / storage.MANIFEST).write_text(json.dumps(content))


DAMAGE = {
    "a shard is cut": (truncate, "truncated or damaged"),
    "a bit is flipped": (flip, "checksum"),
    "a shard is gone": (lambda folder: shard(folder).unlink(), "is missing"),
    "a shard is a link": (link, "symbolic link"),
    "the data folder is a link": (link_data, "symbolic link"),
    "a shard lies elsewhere": (change_shard(name="../../etc/passwd"), "file name '../../etc/passwd' is not allowed"),
    "a shard lies above": (change_shard(name=".."), "file name '..' is not allowed"),
    "the data lies elsewhere": (change(data="../other"), "file name '../other' is not allowed"),
    "a shape is another": (reshape, r"gist.0 is F32 \[2, 3, 4\], expected F32 \[2, 90, 4\]"),
    "a shard is a pickle": (pickled, "is damaged"),
    "ids that the base cannot embed": (foreign_ids, "the base LM embeds 0 to 49"),
    "more tokens than a page holds": (change(lengths=[10**12, 5]), "expected I32 .2, 32768."),
    "a shard is not named": (lambda folder: change(shards=manifest(folder)["shards"][:1])(folder), "1 are needed"),
    "a level too many": (change(lengths=[360, 9], max_level=1), "level 2 holds more than the lengths say"),
    "a negative length": (change(lengths=[-1, 5]), "no numbers of tokens"),
    "lengths are words": (change(lengths=["a", "b"]), "no numbers of tokens"),
    "no rows": (change(lengths=[]), "rows=0"),
    "a page of no size": (change(page_sizes=[0, 1, 1, 1, 1]), "is no size"),
    "an unknown dtype": (change(dtype="load"), "dtype 'load'"),
    "a key is gone": (lambda folder: (folder / storage.MANIFEST).write_text('{"format": 1}'), "is damaged"),
    "the manifest is cut": (lambda folder: (folder / storage.MANIFEST).write_text('{"format"'), "is damaged"),
    "the manifest is no object": (lambda folder: (folder / storage.MANIFEST).write_text("[]"), "is damaged"),
    "the manifest is gone": (lambda folder: (folder / storage.MANIFEST).unlink(), "no saved tree"),
    "the manifest is binary": (lambda folder: (folder / storage.MANIFEST).write_bytes(b"\xff\xfe"), "is damaged"),
    "a newer format": (change(format=2), "written by a newer program"),
    "another width": (change(width=8), "its width is 8, the GistNet's is 4"),
    "another block size": (change(block_size=32), "its block_size is 32, the GistNet's is 4"),
    "another base": (change(model="0123456789abcdef"), "another base LM"),
    "another GistNet": (change(versions=["0123456789abcdef"] * 2), "another GistNet"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_or_foreign_folder_is_refused_by_name(tree, encoder, table, tmp_path, what):
    damage, message = DAMAGE[what]
    folder = tmp_path / "tree"
    tree.save(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        MegaContextTree.load(folder, encoder(K), table)
    assert str(folder) in str(refused.value)


def test_a_folder_that_is_not_there_is_named(encoder, table, tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no saved tree"):
        MegaContextTree.load(tmp_path / "nowhere", encoder(K), table)
    assert not (tmp_path / "nowhere").exists()


class Stopped(BaseException):
    """Not an Exception: nothing may catch it and go on, as nothing can after a kill."""


@pytest.mark.parametrize("first", [True, False])
def test_a_stop_at_any_step_of_a_save_leaves_the_old_tree_or_the_new_one(encoder, table, tmp_path, monkeypatch, first):
    """Before every call that touches the disk."""
    old, new = (MegaContextTree.from_tokens(ids(1, 64, seed=seed), encoder(K), table) for seed in (0, 1))
    seen, step = set(), 0
    while True:
        folder = tmp_path / str(step)
        if not first:
            old.save(folder)
        calls = iter(range(10**6))

        def count(call, stop=step, calls=calls):
            def counted(*args, **settings):
                if next(calls) == stop:
                    raise Stopped
                return call(*args, **settings)

            return counted

        with monkeypatch.context() as patch:
            for owner, name in ((os, "fsync"), (Path, "mkdir"), (Path, "rename"), (Path, "replace")):
                patch.setattr(owner, name, count(getattr(owner, name)))
            patch.setattr(Path, "write_text", count(Path.write_text))
            patch.setattr("safetensors.torch.save_file", count(save_file))
            patch.setattr("shutil.rmtree", count(__import__("shutil").rmtree))
            try:
                new.save(folder)
                stopped = False
            except Stopped:
                stopped = True
        if not stopped:
            break
        try:
            loaded = MegaContextTree.load(folder, encoder(K), table)
            seen.add("new" if torch.equal(loaded.tokens, new.tokens) else "old")
            assert_same(loaded, new if torch.equal(loaded.tokens, new.tokens) else old)
        except ValueError:
            assert first
            seen.add("none")
        new.save(folder)  # and the next save clears up
        assert len(list(folder.iterdir())) == 2
        step += 1
    assert seen == ({"none", "new"} if first else {"old", "new"}) and step > 10


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
