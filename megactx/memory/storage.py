"""A tree on disk: its pages in one database, which is read by what is touched and written by what has changed.

    FOLDER/manifest.json                names the database that counts
    FOLDER/pages-1f0c....db             pages with their checksums, and what is said of the tree, see ``page_file``

Opening reads a few hundred bytes. A page is read, and its checksum compared, when it is first needed. A save writes the
pages that have changed, in one transaction: a kill, or a full disk, leaves the tree as it was before or as it is now.
A tree that did not come from this folder is written whole, into a database beside the old one, which then takes its
place by one rename. Others may read meanwhile: nodes that are there do not change, new ones come behind them.

A folder of shards, as earlier versions wrote it and ``interchange.export`` writes it, is read too; so is a published
tree, in a folder or at a URL, see ``published``.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from megactx.framework.files import PART, replacing, writing

from . import build, encoding, interchange, published
from .description import describe, described, key_size, tokens
from .disk_cache import DISK
from .page_cache import MEMORY, PageCache, packed
from .page_file import PARTS, PageFile
from .pages import SIGNALS
from .published import PublishedPages

FORMAT = 2
MANIFEST = interchange.MANIFEST
FILE = re.compile(r"pages-[0-9a-f]{16}\.db")
# What may lie there: databases and what SQLite puts beside them, shards of the format before, what a kill leaves.
OURS = re.compile(rf"{FILE.pattern}(-wal|-shm|-journal)?|data-[0-9a-f]{{16}}|{re.escape(PART)}.*")


def save(tree, folder: Path, remedy: str = "save the tree in another place") -> None:
    """Write ``tree`` into ``folder``, in place of the tree that may be there. From then on that is its home: the next
    save there writes what has changed since.

    Args:
        remedy: what a person may do where there is no room.

    Raises:
        ValueError: the folder holds something else, or nothing may be written there.
        RunFailed: the disk is full. The tree that was saved before is whole.
    """
    with writing(folder, remedy):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        folder.mkdir(parents=True, exist_ok=True)
        there = None
        if (folder / MANIFEST).exists():
            there = read_manifest(folder)  # never in place of what is not a tree
            if there["format"] == published.FORMAT:
                raise ValueError(f"{folder} holds a published tree, which is read only; choose another folder")
        elif any(not OURS.fullmatch(path.name) for path in folder.iterdir()):
            raise ValueError(f"{folder} holds other files and no saved tree; choose an empty folder")
        with _locked(folder, fcntl.LOCK_EX):
            if not (_at_home(tree, folder, there) and _save_changes(tree)):
                _save_whole(tree, folder, remedy)


def load(
    folder: Path | str,
    encoder,
    base,
    refresh: bool = False,
    device="cpu",
    keys=None,
    memory: int = MEMORY,
    length=None,
    disk: int = DISK,
    device_memory: int | None = None,
):
    """Open a tree; see ``MegaContextTree.load``.

    Args:
        folder: a string is the URL of a published tree.
        length: tokens that count, of a tree of one row; ``None``: all. What was saved behind them is forgotten.

    Raises:
        ValueError: there is no tree; it is damaged, or has file names that lead elsewhere; a newer program made it; or
            it is for another base LM, width, block size or (without ``refresh``) GistNet. The message says which.
    """
    here = isinstance(folder, Path)
    if here and not folder.is_dir():
        raise ValueError(f"{folder}: there is no saved tree")
    with _locked(folder, fcntl.LOCK_SH) if here else nullcontext():
        manifest = read_manifest(folder) if here else {"format": published.FORMAT}
        try:
            if manifest["format"] == interchange.FORMAT:
                about, file = manifest, None
                tree, identity = described(about, encoder, base, refresh, device, keys)
                interchange.read_levels(tree, folder, manifest)
                for page in tree.levels[0].pages:
                    tree.check_ids(page["token"])
            else:
                own = manifest["format"] == FORMAT
                file = PageFile(database(folder, manifest["data"])) if own else PublishedPages(folder, disk)
                about = file.about("tree")
                if about is None:
                    raise ValueError(f"{file.path.name} is damaged: it does not say what tree it holds")
                tree, identity = described(about, encoder, base, refresh, device, keys)
                tree.home, tree.read_only = (file, about["commit"]) if own else None, not own
                _attach(tree, file, about, memory, device_memory)
            if length is not None:
                shorten(tree, length)
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{folder}: {MANIFEST} is damaged ({type(error).__name__}: {error})") from error
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    if about["versions"][about["version"]] != identity:
        tree.refresh(encoder)
    if keys is not None and tree.depth and (about.get("keys") or {}).get("made_by") != encoding.identity(keys):
        if tree.compacted:
            raise ValueError(f"{folder}: no keys can be made of what was taken away; restore it first")
        if manifest["format"] == published.FORMAT:
            raise ValueError(f"{folder}: it was published without keys of this net; publish a tree that has them")
        build.make_keys(tree, *build.run(torch.zeros_like(tree.lengths), tree.counts(1)))
    return tree


def shorten(tree, length: int) -> None:
    """Forget what lies behind ``length`` tokens of a tree of one row.

    Raises:
        ValueError: it has fewer.
    """
    if length > int(tree.lengths.max()):
        raise ValueError(f"{int(tree.lengths.max())} tokens are there, {length} are needed")
    if length == int(tree.lengths.max()):
        return
    for lod in range(tree.depth, -1, -1):
        count = length // tree.block_size**lod
        if count == 0 and lod > 0:
            del tree.levels[lod]
            continue
        tree.levels[lod].shorten(torch.tensor([count]))
        if tree.cache is not None:
            tree.cache.forget(lod, len(tree.levels[lod].pages))


def read_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{folder}: there is no saved tree, {MANIFEST} is missing")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}: {MANIFEST} is damaged ({error})") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"{folder}: {MANIFEST} is damaged (format is {version!r})")
    if version > published.FORMAT:
        raise ValueError(
            f"{folder}: format {version} was written by a newer program, this one reads up to {published.FORMAT}"
        )
    return manifest


def tokens_of(folder: Path) -> int:
    """Tokens of a saved tree of one row, or of the longest of several, without its models.

    Raises:
        ValueError: there is none, or it has the format of an earlier version.
    """
    manifest = read_manifest(folder)
    if manifest["format"] != FORMAT:
        raise ValueError(f"{folder}: it has the format of an earlier version, or is published; open and save it once")
    file = PageFile(database(folder, manifest["data"]))
    about = file.about("tree") or {}
    file.close()
    return max(tokens(about.get("lengths")).tolist(), default=0)


def damaged(folder: Path) -> list[str]:
    """Read all pages of a saved or published tree, and name those that are damaged or missing."""
    manifest = read_manifest(folder)
    file = PublishedPages(folder) if manifest["format"] == published.FORMAT else None
    file = file or PageFile(database(folder, manifest["data"]))
    about, wrong = file.about("tree"), []
    for lod, size in enumerate(about["page_sizes"]):
        pages = -(-(max(about["lengths"]) // about["block_size"] ** lod) // size)
        wanted = [(part, number) for part in PARTS[: 1 if lod == 0 else 2] for number in range(pages)]
        wanted += [("key", number) for number in range(pages) if lod == 1 and about.get("keys")]
        wanted += [(SIGNALS, number) for number in file.numbers(lod, SIGNALS)]
        for part, number in wanted:
            try:
                file.get(lod, part, number)
            except ValueError as error:
                wrong.append(f"{folder}: page {number} of level {lod} ({part}): {error}")
    file.close()
    return wrong


def database(folder: Path, name) -> Path:
    if not isinstance(name, str) or not FILE.fullmatch(name):
        raise ValueError(f"the file name {name!r} is not allowed")
    path = folder / name
    for beside in (path, *(folder / f"{name}{end}" for end in ("-wal", "-shm", "-journal"))):
        if beside.is_symlink():
            raise ValueError(f"{beside.name} is a symbolic link, which is not allowed")
    if not path.is_file():
        raise ValueError(f"{name} is missing")
    return path


def _attach(tree, file: PageFile, about: dict, memory: int, device_memory: int | None) -> None:
    """The pages of a tree come from ``file`` from now on."""
    tree.cache = PageCache(file, tree.levels, memory, tree.check_ids, device_memory)
    pages = sum(-(-int(level.lengths.max()) // level.size) for level in tree.levels)
    if isinstance(file, PublishedPages) and pages > len(file.rows):  # who made it may be a stranger
        raise ValueError(f"its lengths need {pages:,} pages, {len(file.rows):,} are there")
    for lod, level in enumerate(tree.levels):
        level.source, level.lod, level.room = tree.cache, lod, int(level.lengths.max())
        level.pages = [{} for _ in range(-(-level.room // level.size))]
    if "key" not in tree.levels[min(1, tree.depth)].columns or key_size(about) == tree.keys.size:
        return
    level = tree.levels[1]  # keys are asked for, and none of this size are there
    for number, page in enumerate(level.pages):
        page["key"] = torch.zeros(
            level.rows, level.used(number), tree.keys.size, dtype=torch.float16, device=level.device
        )
        level.dirty.add(("key", number))


def _at_home(tree, folder: Path, manifest: dict | None) -> bool:
    """Whether the folder's database is the one that the tree was read from, or saved to, last."""
    home = tree.home[0].path if tree.home else None
    name = (manifest or {}).get("data")
    return home is not None and name == home.name and home.exists() and home.samefile(folder / name)


def _save_changes(tree) -> bool:
    """Write what has changed, in one transaction; -> False: another process wrote there since."""
    file, commit = tree.home
    with file.step():
        about = file.about("tree")
        if about is None or about["commit"] != commit:
            return False
        put_changes(tree, describe(tree) | {"epoch": about.get("epoch", 0)})
    written(tree)
    return True


def put_changes(tree, about: dict) -> None:
    """Within a transaction: the pages that have changed since, and what is said of the tree."""
    file, commit = tree.home
    file.put(_changed(tree), zipped=bool(about["compacted"]))
    for lod in range(len(file.about("tree")["page_sizes"])):
        there = len(tree.levels[lod].pages) if lod <= tree.depth else 0
        for part in PARTS if lod else PARTS[:1]:
            file.remove(lod, part, there if part != "key" or tree.keys is not None else 0)
    file.say("tree", about | {"commit": commit + 1, "epoch": about.get("epoch", 0)})


def written(tree) -> None:
    """The transaction was made."""
    file, commit = tree.home
    tree.home = (file, commit + 1)
    _settle(tree)


def grown(tree) -> dict:
    """What changes of a tree's description while it grows; the rest takes a look at all weights."""
    about = {"lengths": tree.lengths.tolist(), "page_sizes": [level.size for level in tree.levels]}
    return about | {"parts": [[name, first.tolist()] for name, first in tree.parts], "signals": tree.signals}


def _changed(tree) -> Iterator[tuple[int, str, int, bytes]]:
    for lod, level in enumerate(tree.levels):
        parts = level.parts()
        for part, number in sorted(level.dirty):
            if parts[part][0] in level.pages[number]:  # a page that could not be read did not change
                yield lod, part, number, packed(level, part, number)


def _save_whole(tree, folder: Path, remedy: str) -> None:
    path = folder / f"pages-{os.urandom(8).hex()}.db"
    try:
        file = PageFile(path, new=True)
        with file.step():
            pages = (
                (lod, part, number, packed(level, part, number))
                for lod, level in enumerate(tree.levels)
                for part in level.parts()
                for number in range(len(level.pages))
            )
            file.put(pages, zipped=bool(tree.compacted))
            _take_archive(tree, file)
            file.say("tree", describe(tree) | {"commit": 0, "epoch": 0})
        file.publish()
        with replacing(folder / MANIFEST, remedy) as part:
            part.write_text(json.dumps({"format": FORMAT, "data": path.name}, indent=1) + "\n")
    except BaseException:
        if not names(folder / MANIFEST, path.name):
            for beside in folder.glob(f"{path.name}*"):
                beside.unlink()
        raise
    tree.home = (file, 0)
    _settle(tree)
    for other in folder.iterdir():
        if OURS.fullmatch(other.name) and not other.name.startswith(path.name) and not other.is_symlink():
            shutil.rmtree(other) if other.is_dir() else other.unlink()


def _take_archive(tree, file: PageFile) -> None:
    """What was taken away from a tree, and the log of that, go with it to another place."""
    if tree.compacted and tree.cache is not None:
        for table, columns in (("archive", 6), ("log", 6)):
            rows = tree.cache.file.db.execute(f"SELECT * FROM {table}")
            file.db.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * columns)})", rows)


def names(manifest: Path, data: str) -> bool:
    """Whether a manifest is there and is of this data."""
    try:
        return json.loads(manifest.read_text(encoding="utf-8")).get("data") == data
    except (OSError, ValueError):
        return False


def _settle(tree) -> None:
    """All of the tree is on disk: pages may leave memory, and come back from there."""
    file = tree.home[0]
    if tree.cache is None:
        tree.cache = PageCache(file, tree.levels, check=tree.check_ids)
    elif tree.cache.file is not file:
        tree.cache.move(file)
    for lod, level in enumerate(tree.levels):
        level.source, level.lod = tree.cache, lod
    tree.cache.adopt()


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Lock the folder itself. This needs no lock file, works in a read-only folder, and ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, kind)
        yield
    finally:
        os.close(handle)
