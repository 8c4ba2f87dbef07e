"""A tree as a folder of safetensors shards and a small JSON manifest: what other programs can read.

    FOLDER/manifest.json              the files of the tree, their checksums, the base LM and GistNet that they need
    FOLDER/data-1f0c.../level0-000.safetensors, level1-000.safetensors, ...

Earlier versions kept their trees so. Reading maps the files into memory, after all of them were hashed. ``storage`` is
what trees live in.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from megactx.framework.files import checksum, replacing

from .description import describe, key_size
from .pages import SIGNAL_COLUMNS

FORMAT = 1
MANIFEST = "manifest.json"
YOUNGER = ("floor", "opened", *SIGNAL_COLUMNS)  # columns that the format does not have; they are 0
SHARD = 2**20  # bytes. A shard holds whole pages, at least one. If one of them changes, the shard is written again.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64", "bool": "BOOL"}


def export(tree, folder: Path, remedy: str = "write the tree to another place") -> None:
    """Write ``tree`` into a folder that is not there yet, or is empty.

    Raises:
        ValueError: the folder holds something, or nothing may be written there.
        RunFailed: the disk is full.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; {remedy}")
    if tree.compacted:
        raise ValueError("export: something was taken away from this tree, and shards cannot say so; restore it first")
    with replacing(folder, remedy) as part:
        data = part / f"data-{os.urandom(8).hex()}"
        data.mkdir(parents=True)
        shards = [shard for lod in range(tree.depth + 1) for shard in _write_level(tree, lod, data)]
        content = json.dumps(describe(tree) | {"format": FORMAT, "data": data.name, "shards": shards}, indent=1)
        (part / MANIFEST).write_text(content + "\n")


def _write_level(tree, lod: int, folder: Path) -> Iterator[dict]:
    level, size, first = tree.levels[lod], 0, 0
    for number in range(len(level.pages)):
        size += level.used(number) * level.entry_bytes()
        if size >= SHARD or number == len(level.pages) - 1:
            yield _write_shard(level, lod, first, number + 1, folder)
            size, first = 0, number + 1


def _write_shard(level, lod: int, first: int, end: int, folder: Path) -> dict:
    from safetensors.torch import save_file

    path = folder / f"level{lod}-{first:06d}.safetensors"
    tensors = {
        f"{column}.{number}": level.column(number, column)[:, : level.used(number)].cpu().contiguous()
        for number in range(first, end)
        for column in level.columns
        if column not in YOUNGER
    }
    save_file(tensors, path)
    about = {"name": path.name, "level": lod, "pages": [first, end]}
    return about | {"bytes": path.stat().st_size, "sha256": checksum(path)}


def read_levels(tree, folder: Path, manifest: dict) -> None:
    """Put the pages into a tree, after their shapes were compared with what its lengths say.

    Raises:
        ValueError: a file is damaged, missing, or leads elsewhere.
    """
    shards = {}
    for shard in manifest["shards"]:
        shards.setdefault(shard["level"], []).append(shard)
    for lod, level in enumerate(tree.levels):
        number, needed = 0, -(-int(level.lengths.max()) // level.size)
        for shard in shards.pop(lod, []):
            first, end = shard["pages"]
            if first != number:
                raise ValueError(f"level {lod}: page {number} is missing")
            path = _trusted(folder, manifest["data"], shard)
            _read_shard(path, level, first, end, key_size(manifest) if lod == 1 else None)
            number = end
        if number != needed:
            raise ValueError(f"level {lod}: {number} pages are there, {needed} are needed")
    if shards:
        raise ValueError(f"level {min(shards)} holds more than the lengths say")


def _read_shard(path: Path, level, first: int, end: int, stored: int | None = None) -> None:
    """Put the pages of a shard into a level.

    Args:
        stored: numbers of a key in the shard. Keys of another size, or that the level has no place for, are not read;
            keys that are not there are 0.
    """
    from safetensors import SafetensorError, safe_open

    columns = {name: column for name, column in level.columns.items() if name not in YOUNGER}
    plain = {name: column for name, column in columns.items() if name != "key"}
    columns = columns if "key" in columns and columns["key"][0] == (stored,) else plain
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
    if checksum(path) != shard["sha256"]:
        raise ValueError(f"{path.name} is damaged: its checksum is not that of the manifest")
    return path
