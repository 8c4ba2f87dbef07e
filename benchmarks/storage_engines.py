"""Which engine should keep the pages of a tree: the same pages, appends, saves and reads for each.

    python benchmarks/storage_engines.py [--pages 6000] [--folder DIR]

A page holds 64 gists of 576 numbers in fp16 (73,728 bytes); facts about them are a record of 576 bytes.

    append     all pages, in transactions of 256, to the disk; MB per second
    save       one page and its facts, and the facts of 40 other pages, in one transaction; wall ms and bytes written
    cold       one random page, after the system has dropped the files from its cache; ms
    warm       one random page, which the system holds; ms

    shards     a safetensors file per page, and a JSON manifest that is replaced by a rename
    lmdb       one environment (where ``lmdb`` is installed)
    sqlite-N   one database with pages of N bytes, write-ahead log
    file+sqlite  one file that is only appended to, and its page table in SQLite
"""

import argparse
import json
import os
import random
import shutil
import sqlite3
import statistics
import tempfile
import time
from pathlib import Path

from storage import drop, written  # benchmarks/storage.py

BODY, FACTS, OTHERS = 64 * 576 * 2, 576, 40


class Sqlite:
    def __init__(self, folder: Path, size: int):
        self.db = sqlite3.connect(folder / "pages.db", isolation_level=None)
        self.db.execute(f"PRAGMA page_size={size}")
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=FULL")
        for kind in ("body", "facts"):
            self.db.execute(f"CREATE TABLE {kind} (number INTEGER PRIMARY KEY, value BLOB)")

    def write(self, bodies: dict, facts: dict) -> None:
        self.db.execute("BEGIN IMMEDIATE")
        self.db.executemany("INSERT OR REPLACE INTO body VALUES (?, ?)", bodies.items())
        self.db.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())
        self.db.execute("COMMIT")

    def read(self, number: int) -> bytes:
        return self.db.execute("SELECT value FROM body WHERE number=?", (number,)).fetchone()[0]

    def settle(self) -> None:
        self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


class FileAndSqlite(Sqlite):
    def __init__(self, folder: Path):
        super().__init__(folder, 4096)
        self.file = os.open(folder / "pages.bin", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        self.end = 0

    def write(self, bodies: dict, facts: dict) -> None:
        places = {}
        for number, body in bodies.items():
            os.write(self.file, body)
            places[number] = f"{self.end} {len(body)}"
            self.end += len(body)
        os.fsync(self.file)
        super().write(places, facts)

    def read(self, number: int) -> bytes:
        place, size = super().read(number).split()
        return os.pread(self.file, int(size), int(place))


class Shards:
    def __init__(self, folder: Path):
        self.folder, self.names, self.count = folder, {}, 0

    def write(self, bodies: dict, facts: dict) -> None:
        header = json.dumps({"gist": {"dtype": "F16", "shape": [64, 576], "data_offsets": [0, BODY]}}).encode()
        for kind, records in (("body", bodies), ("facts", facts)):
            for number, value in records.items():
                self.count += 1
                name = f"{kind}-{self.count}.safetensors"
                with open(self.folder / name, "wb") as file:
                    file.write(len(header).to_bytes(8, "little") + header + value)
                    file.flush()
                    os.fsync(file.fileno())
                if old := self.names.get(f"{kind} {number}"):
                    os.unlink(self.folder / old)
                self.names[f"{kind} {number}"] = name
        with open(self.folder / "manifest.part", "w") as file:
            json.dump(self.names, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.folder / "manifest.part", self.folder / "manifest.json")

    def read(self, number: int) -> bytes:
        with open(self.folder / self.names[f"body {number}"], "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            json.loads(file.read(size))
            return file.read()

    def settle(self) -> None:
        pass


class Lmdb:
    def __init__(self, folder: Path):
        import lmdb

        self.env = lmdb.open(str(folder), map_size=2**36, max_dbs=2)
        self.body, self.facts = (self.env.open_db(name, integerkey=True) for name in (b"body", b"facts"))

    def write(self, bodies: dict, facts: dict) -> None:
        with self.env.begin(write=True) as step:
            for db, records in ((self.body, bodies), (self.facts, facts)):
                for number, value in records.items():
                    step.put(number.to_bytes(8, "little"), value, db=db)

    def read(self, number: int) -> bytes:
        with self.env.begin() as step:
            return step.get(number.to_bytes(8, "little"), db=self.body)

    def settle(self) -> None:
        self.env.sync(True)


ENGINES = {
    "shards": Shards,
    "lmdb": Lmdb,
    **{f"sqlite-{size}": (lambda folder, size=size: Sqlite(folder, size)) for size in (4096, 16384, 65536)},
    "file+sqlite": FileAndSqlite,
}


def timed(call, *arguments) -> float:
    began = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - began) * 1e3


def measured(engine, folder: Path, pages: int) -> dict:
    rng = random.Random(0)
    body = [rng.randbytes(BODY) for _ in range(16)]
    began, sizes = time.perf_counter(), range(0, pages, 256)
    for first in sizes:
        numbers = range(first, min(first + 256, pages))
        engine.write({n: body[n % 16] for n in numbers}, {n: bytes(FACTS) for n in numbers})
    engine.settle()
    append = pages * (BODY + FACTS) / 1e6 / (time.perf_counter() - began)
    saves, before = [], written()
    for step in range(30):
        others = {n: rng.randbytes(FACTS) for n in (pages, *rng.sample(range(pages), OTHERS))}
        saves.append(timed(engine.write, {pages: body[step % 16]}, others))
    engine.settle()
    per_save = (written() - before) / 30 / 1e6
    cold = []
    for _ in range(5):
        drop(folder)
        cold += [timed(engine.read, n) for n in rng.sample(range(pages), 40)]
    warm = [timed(engine.read, n) for n in [rng.randrange(64) for _ in range(500)]]
    return {
        "append MB/s": append,
        "save ms": statistics.median(saves),
        "save MB": per_save,
        "cold p50 ms": statistics.median(cold),
        "cold p99 ms": sorted(cold)[int(len(cold) * 0.99)],
        "warm p50 ms": statistics.median(warm),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pages", type=int, default=6000)
    parser.add_argument("--folder", type=Path, help="where the files are made and removed again")
    arguments = parser.parse_args()
    for name, make in ENGINES.items():
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            row = measured(make(folder), folder, arguments.pages)
            print(f"{name:12s}", "  ".join(f"{what} {value:8.3f}" for what, value in row.items()), flush=True)
        except ImportError as error:
            print(f"{name:12s} not measured: {error}")
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
