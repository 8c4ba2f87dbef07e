"""Write a saved tree as a folder that a web server or an object store can give out; see ``published``.

A page is copied as it lies in the tree's database, with its checksum. No model is needed.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megactx.framework.files import replacing, sync, writing

from . import storage
from .page_file import PageFile, checked
from .published import FORMAT, MAGIC, MANIFEST, NOTES, PAGES, ROW, TABLE, sha256

OURS = re.compile(r"table-([0-9a-f]{16})\.bin|notes-([0-9a-f]{16})\.json|pages-([0-9a-f]{16})-[0-9]{3,}\.bin")
SHARD = 2**26  # bytes of a file of pages


def publish(folder: Path, target: Path, notes: dict | None = None) -> int:
    """Write the pages of a saved tree as a folder that a server can give out; -> bytes of them.

    Args:
        folder: of the tree. Others may write there meanwhile.
        notes: plain JSON for who opens it, such as what its tokens are from.

    Raises:
        ValueError: there is no tree, a page of it is damaged, or ``target`` holds something else.
        RunFailed: the disk is full. What was published there before is whole.
    """
    storage.tokens_of(folder)  # refuses what is no tree of today's format
    manifest = storage.read_manifest(folder)
    remedy = "publish into another folder"
    with writing(target, remedy):
        target.mkdir(parents=True, exist_ok=True)
        before = storage.read_manifest(target) if (target / MANIFEST).exists() else {"format": FORMAT}
        others = [path for path in target.iterdir() if path.name != MANIFEST and not OURS.fullmatch(path.name)]
        if others or before["format"] != FORMAT:
            raise ValueError(f"{target} holds other files than a published tree; choose an empty folder")
        data = os.urandom(8).hex()
        file = PageFile(storage.database(folder, manifest["data"]))
        try:
            with file.reading():
                about = file.about("tree")
                if about is None:
                    raise ValueError(f"{file.path.name} is damaged: it does not say what tree it holds")
                table = b"".join(_write_pages(file.rows(), target, data))
            content = MAGIC + table
            (target / TABLE.format(data)).write_bytes(content)
            noted = json.dumps(notes or {}).encode()
            (target / NOTES.format(data)).write_bytes(noted)
            said = {"format": FORMAT, "data": data, "pages": len(table) // ROW.itemsize, "tree": about}
            said |= {"table": sha256(content), "notes": [len(noted), sha256(noted)]}
            for path in target.glob(f"*{data}*"):
                sync(path)
            with replacing(target / MANIFEST, remedy) as part:
                part.write_text(json.dumps(said, indent=1) + "\n")
        except BaseException:
            for path in target.glob(f"*{data}*"):
                path.unlink()
            raise
        finally:
            file.close()
        for path in target.iterdir():  # who reads the one before goes on with it
            found = OURS.fullmatch(path.name)
            if found and not {data, before.get("data")} & {*found.groups()}:
                path.unlink()
    rows = np.frombuffer(table, ROW)
    return int(rows["size"].sum())


def _write_pages(rows, target: Path, data: str) -> Iterator[bytes]:
    """Write pages into shards; -> their rows of the table."""
    shard, at, out = 0, 0, None
    try:
        for own, value, checksum, zipped in rows:
            checked(own, value, checksum, 0)
            if out is None or at + len(value) > SHARD and at:
                if out is not None:
                    out.close()
                    shard += 1
                out, at = (target / PAGES.format(data, shard)).open("wb"), 0
            out.write(value)
            yield np.array([(own, at, len(value), shard, zipped, checksum)], ROW).tobytes()
            at += len(value)
    finally:
        rows.close()
        if out is not None:
            out.close()
