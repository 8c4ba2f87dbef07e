"""Packages on their way in: an upload grows by pieces, is checked whole, and becomes a version."""

import os
import secrets
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from megactx.framework.files import checksum

from . import package
from .access import check_terms, note
from .database import Database, Refused, Row

LARGEST, UPLOADS = 2**32, 4  # bytes of a package, and uploads of an account at a time
KEPT = 86_400  # seconds


class Uploads:
    """Of the market's folder; what is published lies there under its checksum."""

    def __init__(self, folder: Path, database: Database):
        self.folder, self.database = folder, database

    def begin(self, account, size: int, sha256: str) -> str:
        if not 0 < size <= LARGEST:
            raise Refused(413, f"A package has at most {LARGEST:,} bytes.")
        with self.database.step() as db:
            old = time.time() - KEPT
            for row in db.execute("SELECT id FROM upload WHERE created < ?", (int(old),)).fetchall():
                self._drop(db, row["id"])
            if db.execute("SELECT COUNT(*) FROM upload WHERE account=?", (account["id"],)).fetchone()[0] >= UPLOADS:
                raise Refused(429, f"{UPLOADS} uploads at a time; finish or delete one.", 60)
            upload = secrets.token_hex(16)
            (self.folder / "uploads" / upload).touch(mode=0o600)
            values = (upload, account["id"], size, sha256, int(time.time()))
            db.execute("INSERT INTO upload VALUES (?, ?, ?, ?, ?)", values)
        return upload

    def find(self, account, upload: str) -> tuple[Row, Path, int]:
        """Of an account's own: its row, its file, bytes that are there."""
        with self.database.look() as db:
            row = db.execute("SELECT * FROM upload WHERE id=? AND account=?", (upload, account["id"])).fetchone()
        if row is None:
            raise Refused(404, "There is no such upload.")
        path = self.folder / "uploads" / row["id"]
        try:
            return row, path, path.stat().st_size
        except FileNotFoundError:
            raise Refused(404, "There is no such upload.") from None

    def add(self, account, upload: str, offset: int, piece: bytes) -> int:
        """Write a piece behind what is there; -> bytes that are there now."""
        row, path, there = self.find(account, upload)
        if offset != there:
            raise Refused(409, f"{there} bytes are there; go on from there.")
        if there + len(piece) > row["bytes"]:
            raise Refused(413, "That is more than was said.")
        with path.open("r+b") as file:
            file.seek(offset)  # two who write the same piece write the same place
            file.write(piece)
        return offset + len(piece)

    def drop(self, account, upload: str) -> None:
        self.find(account, upload)
        with self.database.step() as db:
            self._drop(db, upload)

    def forget(self, account, upload: str) -> None:
        """The same, of what may be gone already."""
        with suppress(Refused):
            self.drop(account, upload)

    def _drop(self, db, upload: str) -> None:
        (self.folder / "uploads" / upload).unlink(missing_ok=True)
        db.execute("DELETE FROM upload WHERE id=?", (upload,))

    def publish(self, account, upload: str, access: str, price: int) -> tuple[str, int]:
        """An upload becomes a version; -> name and number."""
        row, path, there = self.find(account, upload)
        if there != row["bytes"]:
            raise Refused(409, f"{there} of {row['bytes']} bytes are there.")
        check_terms(access, price)
        if checksum(path) != row["sha256"]:
            self.drop(account, upload)
            raise Refused(400, "The upload is damaged: its checksum is another one. Upload it again.")
        with tempfile.TemporaryDirectory(prefix="check-", dir=self.folder / "uploads") as scratch:
            try:
                card, key = package.unpack(path, Path(scratch))
            except ValueError as error:
                self.drop(account, upload)
                message = str(error).replace(scratch, "the package")
                raise Refused(400, f"The package is not taken: {message}.") from error
        place = self.folder / "packages" / row["sha256"]
        with self.database.step() as db:
            self._enter(db, account, card, key, row, access, price)
            with suppress(FileNotFoundError):
                os.replace(path, place)
            self._drop(db, upload)
        return card.name, card.version

    def _enter(self, db, account, card, key: str, upload, access: str, price: int) -> None:
        keys = [k for (k,) in db.execute("SELECT key FROM signer WHERE account=?", (account["id"],))]
        if not keys:
            db.execute("INSERT INTO signer VALUES (?, ?)", (account["id"], key))
            note(db, account["name"], "add key", key)
        elif key not in keys:
            raise Refused(403, f"It is signed by {key}, which is no key of this account; add it on the account's page.")
        found = db.execute("SELECT * FROM package WHERE name=?", (card.name,)).fetchone()
        now = int(time.time())
        if found is None:
            values = (card.name, account["id"], access, price, now)
            db.execute("INSERT INTO package (name, owner, access, price, created) VALUES (?, ?, ?, ?, ?)", values)
            found = db.execute("SELECT * FROM package WHERE name=?", (card.name,)).fetchone()
        elif found["owner"] != account["id"]:
            raise Refused(409, "This name is taken.")
        newest = db.execute("SELECT MAX(number) FROM version WHERE package=?", (found["id"],)).fetchone()[0] or 0
        if card.version <= newest:
            raise Refused(409, f"Version {newest} is there; the next is {newest + 1}.")
        words = " ".join([card.name, card.description, card.licence, *(s.name for s in card.sources[:1000])]).casefold()
        words = words.replace("\0", " ")[:100_000]
        db.execute("UPDATE package SET access=?, price=?, words=? WHERE id=?", (access, price, words, found["id"]))
        values = (found["id"], card.version, card.model_dump_json(), key, upload["sha256"], upload["bytes"], now)
        db.execute("INSERT INTO version VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        note(db, account["name"], "publish", f"{card.name} {card.version} {access}")
