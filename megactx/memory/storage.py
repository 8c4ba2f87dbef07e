"""A tree on disk: safetensors shards per level and a small JSON manifest.

    FOLDER/manifest.json              the files of the tree, their checksums, the base LM and GistNet that they need
    FOLDER/data-1f0c.../level0-000.safetensors, level1-000.safetensors, ...

A save writes a new data folder beside the old one, flushes it, and only then replaces the manifest, by one rename. So a
kill at any moment leaves the old tree or the new one. The next save removes data that no manifest names. A shard whose
pages have not changed is not written again: the new folder has a second name (a hard link) for the same file. The
folder is locked meanwhile: two processes that save take turns, and nobody reads files that are being removed.

Reading maps the files into memory. A page that is not needed is not loaded. A page that changes is copied first.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from megactx.framework.files import PART, flush, replacing, writing

from . import build, encoding

FORMAT = 1
MANIFEST = "manifest.json"
OURS = re.compile(rf"data-[0-9a-f]{{16}}|{re.escape(PART)}.*")  # what a save that was killed may leave
SHARD = 2**20  # bytes. A shard holds whole pages, at least one. If one of them changes, the shard is written again.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64", "bool": "BOOL"}


@dataclass(frozen=True)
class Kept:
    """A shard on disk."""

    path: Path
    file: tuple  # changes when the file on disk does
    pages: tuple  # changes when the tree's pages do
    entry: dict  # in the manifest


def save(tree, folder: Path, remedy: str = "save the tree in another place") -> None:
    """Write ``tree`` into ``folder``, in place of the tree that may be there.

    Args:
        remedy: what a person may do where there is no room.

    Raises:
        ValueError: the folder holds something else, or nothing may be written there.
        RunFailed: the disk is full. The tree that was saved before is whole.
    """
    with writing(folder, remedy):
        _save(tree, folder, remedy)


def _save(tree, folder: Path, remedy: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        _read_manifest(folder)  # never in place of what is not a tree
    elif any(not OURS.fullmatch(path.name) for path in folder.iterdir()):
        raise ValueError(f"{folder} holds other files and no saved tree; choose an empty folder")
    with _locked(folder, fcntl.LOCK_EX):
        data = folder / f"data-{os.urandom(8).hex()}"
        try:
            data.mkdir()
            kept = dict(shard for lod in range(tree.depth + 1) for shard in _write_level(tree, lod, data))
            flush(data)
            content = json.dumps(_manifest(tree, data.name, [shard.entry for shard in kept.values()]), indent=1)
            with replacing(folder / MANIFEST, remedy) as part:
                part.write_text(content + "\n")
        except BaseException:
            if not names(folder / MANIFEST, data):
                shutil.rmtree(data, ignore_errors=True)
            raise
        tree.kept = kept
        for path in folder.iterdir():
            if OURS.fullmatch(path.name) and path != data and not path.is_symlink():
                shutil.rmtree(path)


def names(manifest: Path, data: Path) -> bool:
    """Whether a manifest is there and is of this data folder."""
    with suppress(OSError, ValueError):
        return json.loads(manifest.read_text(encoding="utf-8")).get("data") == data.name
    return False


def load(folder: Path, encoder, base, refresh: bool = False, device="cpu", keys=None):
    """Read a tree; see ``MegaContextTree.load``.

    Raises:
        ValueError: there is no tree; it is damaged, or has file names that lead elsewhere; a newer program made it; or
            it is for another base LM, width, block size or (without ``refresh``) GistNet. The message says which.
    """
    from .tree import MegaContextTree

    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no saved tree")
    with _locked(folder, fcntl.LOCK_SH):
        manifest = _read_manifest(folder)
        try:
            for what in ("block_size", "width"):
                if manifest[what] != getattr(encoder, what):
                    raise ValueError(f"its {what} is {manifest[what]}, the GistNet's is {getattr(encoder, what)}")
            model = encoding.identity_of_base(base)
            if model is not None and manifest["model"] is not None and model != manifest["model"]:
                raise ValueError(f"it belongs to another base LM: embeddings {manifest['model']}, not {model}")
            layers, there = encoding.identity_of_layers(base, encoder), manifest.get("layers")
            if None not in (layers, there) and layers != there:  # trees of earlier days do not say
                raise ValueError(f"it belongs to another base LM: layers {there}, not {layers}; its GistNet reads them")
            identity = encoding.identity(encoder)
            made_by = manifest["versions"][manifest["version"]]
            if made_by != identity and not refresh:
                raise ValueError(f"another GistNet made it: {made_by}, not {identity}. refresh=True encodes it again")
            if manifest["dtype"] not in (None, "float32", "float16", "bfloat16"):
                raise ValueError(f"gists of dtype {manifest['dtype']!r} are not known")
            dtype = None if manifest["dtype"] is None else getattr(torch, manifest["dtype"])
            lengths = _tokens(manifest["lengths"])
            tree = MegaContextTree(encoder, base, len(lengths), manifest["max_level"], dtype, device, keys=keys)
            tree.parts = [(str(name), _tokens(first)) for name, first in manifest["parts"]]
            tree.versions, tree.version = list(manifest["versions"]), manifest["version"]
            _read_levels(tree, folder, manifest, lengths)
            for page in tree.levels[0].pages:
                tree.check_ids(page["token"])
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{folder}: {MANIFEST} is damaged ({type(error).__name__}: {error})") from error
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    if made_by != identity:
        tree.refresh(encoder)
    if keys is not None and tree.depth and (manifest.get("keys") or {}).get("made_by") != encoding.identity(keys):
        build.make_keys(tree, *build.run(torch.zeros_like(tree.lengths), tree.counts(1)))
    return tree


def _manifest(tree, data: str, shards: list[dict]) -> dict:
    keys = {} if tree.keys is None else {"keys": {"size": tree.keys.size, "made_by": encoding.identity(tree.keys)}}
    return keys | {
        "format": FORMAT,
        "data": data,
        "block_size": tree.block_size,
        "width": tree.width,
        "dtype": None if tree.dtype is None else str(tree.dtype).removeprefix("torch."),
        "max_level": tree.max_level,
        "lengths": tree.lengths.tolist(),
        "page_sizes": [level.size for level in tree.levels],
        "model": encoding.identity_of_base(tree.base),
        "layers": encoding.identity_of_layers(tree.base, tree.encoder),
        "versions": tree.identities(),
        "version": tree.version,
        "parts": [[name, first.tolist()] for name, first in tree.parts],
        "shards": shards,
    }


def _write_level(tree, lod: int, folder: Path) -> Iterator[tuple[tuple[int, int], Kept]]:
    level, size, first = tree.levels[lod], 0, 0
    for number in range(len(level.pages)):
        size += level.used(number) * level.entry_bytes()
        if size >= SHARD or number == len(level.pages) - 1:
            yield (lod, first), _write_shard(tree, lod, first, number + 1, folder)
            size, first = 0, number + 1


def _write_shard(tree, lod: int, first: int, end: int, folder: Path) -> Kept:
    from safetensors.torch import save_file

    level, path = tree.levels[lod], folder / f"level{lod}-{first:06d}.safetensors"
    pages, before = _state_of(level, first, end), tree.kept.get((lod, first))
    if before is not None and before.pages == pages and _link(before, path):
        return Kept(path, _file(path), pages, before.entry)
    tensors = {
        f"{column}.{number}": tensor[:, : level.used(number)].cpu().contiguous()
        for number in range(first, end)
        for column, tensor in level.pages[number].items()
    }
    save_file(tensors, path)
    entry = {"name": path.name, "level": lod, "pages": [first, end]}
    return Kept(path, _file(path), pages, entry | {"bytes": path.stat().st_size, "sha256": _checksum(path)})


def _state_of(level, first: int, end: int) -> tuple:
    return first, end, level.used(end - 1), tuple(level.stamps[first:end])


def _link(shard: Kept, path: Path) -> bool:
    """A second name for a shard that is still the file that was written; -> whether it has one."""
    try:
        if _file(shard.path) == shard.file:
            os.link(shard.path, path)
            return True
    except OSError:  # it is gone, or the file system has no second names
        pass
    return False


def _file(path: Path) -> tuple:
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _read_manifest(folder: Path) -> dict:
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
    if version > FORMAT:
        raise ValueError(f"{folder}: format {version} was written by a newer program, this one reads up to {FORMAT}")
    return manifest


def _tokens(numbers: list[int]) -> torch.Tensor:
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise ValueError(f"{str(numbers)[:100]} are no numbers of tokens")
    return torch.tensor(numbers, dtype=torch.long)


def _read_levels(tree, folder: Path, manifest: dict, lengths: torch.Tensor) -> None:
    """Put the pages into the tree, after their shapes were compared with what the lengths say."""
    lod, counts, shards = 0, lengths, {}
    for shard in manifest["shards"]:
        shards.setdefault(shard["level"], []).append(shard)
    while True:
        if lod > tree.depth:
            tree.new_level()
        level, size = tree.levels[lod], manifest["page_sizes"][lod]
        if type(size) is not int or size < 1:
            raise ValueError(f"page size {size!r} of level {lod} is no size")
        level.size, level.lengths, number = size, counts.clone(), 0
        for shard in shards.pop(lod, []):
            first, end = shard["pages"]
            if first != number:
                raise ValueError(f"level {lod}: page {number} is missing")
            path = _trusted(folder, manifest["data"], shard)
            stored = _key_size(manifest) if lod == 1 else None
            _read_shard(path, level, first, end, stored)
            if (stored is None) == ("key" not in level.columns):
                tree.kept[lod, first] = Kept(path, _file(path), _state_of(level, first, end), shard)
            number = end
        if number != -(-int(counts.max()) // size):
            raise ValueError(f"level {lod}: {number} pages are there, {-(-int(counts.max()) // size)} are needed")
        lod, counts = lod + 1, counts // tree.block_size
        if not counts.any() or (tree.max_level is not None and lod > tree.max_level):
            break
    if shards:
        raise ValueError(f"level {min(shards)} holds more than the lengths say")


def _key_size(manifest: dict) -> int | None:
    """Numbers of a key as the tree was saved; ``None``: it has none."""
    if (keys := manifest.get("keys")) is None:
        return None
    if type(size := keys["size"]) is not int or not 0 < size < 2**16:
        raise ValueError(f"keys of {size!r} numbers are not known")
    return size


def _read_shard(path: Path, level, first: int, end: int, stored: int | None = None) -> None:
    """Put the pages of a shard into a level.

    Args:
        stored: numbers of a key in the shard. Keys of another size, or that the level has no place for, are not read;
            keys that are not there are 0.
    """
    from safetensors import SafetensorError, safe_open

    plain = {name: column for name, column in level.columns.items() if name != "key"}
    columns = level.columns if "key" in level.columns and level.columns["key"][0] == (stored,) else plain
    try:
        with safe_open(path, framework="pt") as file:
            there = {*plain, *([] if stored is None else ["key"])}
            names = {f"{column}.{number}" for column in there for number in range(first, end)}
            if set(file.keys()) != names:
                raise ValueError(f"{path.name} holds other tensors than the manifest says")
            for number in range(first, end):
                used = level.used(number)
                for column, (shape, dtype) in columns.items():
                    header = file.get_slice(f"{column}.{number}")
                    wanted = [level.rows, used, *shape], DTYPES[str(dtype).removeprefix("torch.")]
                    if (header.get_shape(), header.get_dtype()) != wanted:
                        raise ValueError(
                            f"{path.name}: {column}.{number} is {header.get_dtype()} {header.get_shape()}, expected"
                            f" {wanted[1]} {wanted[0]}"
                        )
                page = {column: file.get_tensor(f"{column}.{number}").to(level.device) for column in columns}
                for column in {*level.columns} - {*columns}:
                    shape, dtype = level.columns[column]
                    page[column] = torch.zeros(level.rows, used, *shape, dtype=dtype, device=level.device)
                level.put_page(page)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


def _trusted(folder: Path, data: str, shard: dict) -> Path:
    """The path of a shard, if it is a plain file of the folder with the size and content that the manifest says."""
    for name in (data, shard["name"]):
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"the file name {name!r} is not allowed")
    path = folder / data / shard["name"]
    if (folder / data).is_symlink() or path.is_symlink():
        raise ValueError(f"{data}/{path.name} is a symbolic link, which is not allowed")
    if not path.is_file():
        raise ValueError(f"{data}/{path.name} is missing")
    if path.stat().st_size != shard["bytes"]:
        raise ValueError(f"{path.name} is truncated or damaged: {path.stat().st_size} bytes, not {shard['bytes']}")
    if _checksum(path) != shard["sha256"]:
        raise ValueError(f"{path.name} is damaged: its checksum is not that of the manifest")
    return path


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path, kind: int) -> Iterator[None]:
    """Lock the folder itself. This needs no lock file, works in a read-only folder, and ends with the process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, kind)
        yield
    finally:
        os.close(handle)
