"""A tree as safetensors and a manifest: it comes back as it was; what is not a whole tree of ours is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_trees import K, assert_same, ids

from megactx.framework.files import checksum
from megactx.memory import MegaContextTree, interchange
from megactx.memory import tree as tree_module


def manifest(folder: Path) -> dict:
    return json.loads((folder / interchange.MANIFEST).read_text())


def shard(folder: Path, level: int = 1) -> Path:
    return next((folder / manifest(folder)["data"]).glob(f"level{level}-*"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tree_comes_back_as_it_was_and_grows_on(encoder, table, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(tree_module, "TOKENS", 64)
    monkeypatch.setattr(tree_module, "NODES", 5)
    monkeypatch.setattr(interchange, "SHARD", 700)
    tree = MegaContextTree.from_tokens(ids(2, 300), encoder(K), table, torch.tensor([300, 120]), dtype=dtype)
    tree.export(tmp_path / "tree")
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
        one.export(tmp_path / f"{one.rows}")
        assert_same(one, MegaContextTree.load(tmp_path / f"{one.rows}", encoder(K), table))


def test_reading_maps_the_files_and_writing_to_the_tree_leaves_them_alone(tree, encoder, table, tmp_path):
    tree.export(tmp_path)
    before = shard(tmp_path).read_bytes()
    loaded = MegaContextTree.load(tmp_path, encoder(K), table)
    assert shard(tmp_path).name in Path("/proc/self/maps").read_text()
    loaded.gather(1, torch.tensor([[5], [5]]))
    loaded.refresh(encoder(K, factor=3.0))
    assert shard(tmp_path).read_bytes() == before


def test_a_folder_with_other_things_is_not_touched(tree, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="is not an empty folder"):
            tree.export(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]


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
        (folder / interchange.MANIFEST).write_text(json.dumps(manifest(folder) | values))

    return edit


def change_shard(**values):
    def edit(folder):
        content = manifest(folder)
        content["shards"][1] |= values
        (folder / interchange.MANIFEST).write_text(json.dumps(content))

    return edit


def reshape(folder):
    """A shard of another shape, with a checksum that is right."""
    path, content = shard(folder), manifest(folder)
    tensors = load_file(path)
    tensors["gist.0"] = torch.zeros(2, 3, 4)
    save_file(tensors, path)
    content["shards"][1] |= {"bytes": path.stat().st_size, "sha256": checksum(path)}
    (folder / interchange.MANIFEST).write_text(json.dumps(content))


def pickled(folder):
    path, content = shard(folder), manifest(folder)
    torch.save({"gist.0": torch.zeros(2)}, path)
    content["shards"][1] |= {"bytes": path.stat().st_size, "sha256": checksum(path)}
    (folder / interchange.MANIFEST).write_text(json.dumps(content))


def foreign_ids(folder):
    path, content = shard(folder, 0), manifest(folder)
    tensors = load_file(path)
    tensors["token.0"] += 1000
    save_file(tensors, path)
    content["shards"][0] |= {"bytes": path.stat().st_size, "sha256": checksum(path)}
    (folder / interchange.MANIFEST).write_text(json.dumps(content))


DAMAGE = {
    "a shard is cut": (truncate, "truncated or damaged"),
    "a bit is flipped": (flip, "checksum"),
    "a shard is gone": (lambda folder: shard(folder).unlink(), "is missing"),
    "a shard is a link": (link, "symbolic link"),
    "the data folder is a link": (link_data, "symbolic link"),
    "a shard lies elsewhere": (change_shard(name="../../etc/passwd"), "file name '../../etc/passwd' is not allowed"),
    "a shard lies above": (change_shard(name=".."), "file name '..' is not allowed"),
    "the data lies elsewhere": (change(data="../other"), "file name '../other' is not allowed"),
    "a shape is another": (reshape, r"gist.0 is F32 \[2, 3, 4\], expected F32 \[2, 64, 4\]"),
    "a shard is a pickle": (pickled, "is damaged"),
    "ids that the base cannot embed": (foreign_ids, "the base LM embeds 0 to 49"),
    "more tokens than a page holds": (change(lengths=[1000, 5]), "expected I32 .2, 1000."),
    "a shard is not named": (
        lambda folder: change(shards=manifest(folder)["shards"][:1])(folder),
        "pages are there, . are needed",
    ),
    "a level too many": (change(lengths=[360, 9], max_level=1), "level 2 holds more than the lengths say"),
    "a negative length": (change(lengths=[-1, 5]), "no numbers of tokens"),
    "lengths are words": (change(lengths=["a", "b"]), "no numbers of tokens"),
    "no rows": (change(lengths=[]), "rows=0"),
    "a page of no size": (change(page_sizes=[0, 1, 1, 1, 1]), "is no size"),
    "an unknown dtype": (change(dtype="load"), "dtype 'load'"),
    "a key is gone": (lambda folder: (folder / interchange.MANIFEST).write_text('{"format": 1}'), "is damaged"),
    "the manifest is cut": (lambda folder: (folder / interchange.MANIFEST).write_text('{"format"'), "is damaged"),
    "the manifest is no object": (lambda folder: (folder / interchange.MANIFEST).write_text("[]"), "is damaged"),
    "the manifest is gone": (lambda folder: (folder / interchange.MANIFEST).unlink(), "no saved tree"),
    "the manifest is binary": (lambda folder: (folder / interchange.MANIFEST).write_bytes(b"\xff\xfe"), "is damaged"),
    "a newer format": (change(format=4), "written by a newer program"),
    "another width": (change(width=8), "its width is 8, the GistNet's is 4"),
    "another block size": (change(block_size=32), "its block_size is 32, the GistNet's is 4"),
    "another base": (change(model="0123456789abcdef"), "another base LM"),
    "another GistNet": (change(versions=["0123456789abcdef"] * 2), "another GistNet"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_or_foreign_folder_is_refused_by_name(tree, encoder, table, tmp_path, what):
    damage, message = DAMAGE[what]
    folder = tmp_path / "tree"
    tree.export(folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        MegaContextTree.load(folder, encoder(K), table)
    assert str(folder) in str(refused.value)


def test_a_folder_that_is_not_there_is_named(encoder, table, tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no saved tree"):
        MegaContextTree.load(tmp_path / "nowhere", encoder(K), table)
    assert not (tmp_path / "nowhere").exists()
