"""What the market knows, in one database, with the packages as files beside it.

    DATA/market.db            accounts, tokens, packages, purchases, hooks that wait, reports, audit log
    DATA/database             instead of it: the mark of the tables in PostgreSQL that belong to this folder
    DATA/packages/SHA256      packages as they were uploaded
    DATA/uploads/ID           what is on its way
    DATA/secret               of the forms; made at the first start

Passwords are kept as argon2id hashes, sessions and tokens (32 random bytes each) as sha256.
"""

import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from megactx.framework.files import checksum, replacing

from . import package
from .database import PostgreSQL, Refused, Row, SQLite

TABLES = """
CREATE TABLE account (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, password TEXT NOT NULL,
    moderator INTEGER NOT NULL DEFAULT 0, shares INTEGER NOT NULL DEFAULT 0, created INTEGER NOT NULL);
CREATE TABLE session (hash TEXT PRIMARY KEY, account INTEGER NOT NULL REFERENCES account, ends INTEGER NOT NULL);
CREATE TABLE token (id INTEGER PRIMARY KEY, hash TEXT UNIQUE NOT NULL, account INTEGER NOT NULL REFERENCES account,
    label TEXT NOT NULL, scopes TEXT NOT NULL, created INTEGER NOT NULL);
CREATE TABLE signer (account INTEGER NOT NULL REFERENCES account, key TEXT NOT NULL, PRIMARY KEY (account, key));
CREATE TABLE package (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, owner INTEGER NOT NULL REFERENCES account,
    access TEXT NOT NULL, price INTEGER NOT NULL, down TEXT NOT NULL DEFAULT '', words TEXT NOT NULL DEFAULT '',
    created INTEGER NOT NULL);
CREATE TABLE version (package INTEGER NOT NULL REFERENCES package, number INTEGER NOT NULL, card TEXT NOT NULL,
    signer TEXT NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, created INTEGER NOT NULL,
    PRIMARY KEY (package, number));
CREATE TABLE reader (package INTEGER NOT NULL REFERENCES package, account INTEGER NOT NULL REFERENCES account,
    PRIMARY KEY (package, account));
CREATE TABLE upload (id TEXT PRIMARY KEY, account INTEGER NOT NULL REFERENCES account, bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL, created INTEGER NOT NULL);
CREATE TABLE purchase (id TEXT PRIMARY KEY, package INTEGER NOT NULL REFERENCES package,
    account INTEGER NOT NULL REFERENCES account, price INTEGER NOT NULL, state TEXT NOT NULL, created INTEGER NOT NULL,
    UNIQUE (package, account));
CREATE TABLE hook (id TEXT PRIMARY KEY, body TEXT NOT NULL, due INTEGER NOT NULL, tries INTEGER NOT NULL,
    state TEXT NOT NULL);
CREATE TABLE seen (mark TEXT PRIMARY KEY, at INTEGER NOT NULL);
CREATE TABLE used (package INTEGER NOT NULL REFERENCES package, version INTEGER NOT NULL, what TEXT NOT NULL,
    day TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (package, version, what, day));
CREATE TABLE report (id INTEGER PRIMARY KEY, package INTEGER NOT NULL REFERENCES package,
    account INTEGER NOT NULL REFERENCES account, reason TEXT NOT NULL, state TEXT NOT NULL, created INTEGER NOT NULL);
CREATE TABLE audit (id INTEGER PRIMARY KEY, at INTEGER NOT NULL, account TEXT NOT NULL, action TEXT NOT NULL,
    what TEXT NOT NULL);
"""
ACCOUNT = re.compile(r"[a-z0-9][a-z0-9-]{1,31}")
SCOPES = ("read", "publish", "buy")
ACCESS = ("private", "free", "paid")
USES = ("download", "opened")
SESSION, UPLOAD = 14 * 86_400, 86_400  # seconds
LARGEST, UPLOADS = 2**32, 4  # bytes of a package, and uploads of an account at a time
PAGE = 20  # packages of a page of the search
DEAREST = 10**7  # cents
HASHING = threading.Semaphore(2)  # argon2 takes 64 MiB each time


class Store:
    """The market's folder; each step is a transaction.

    Args:
        database: ``None``: SQLite's in the folder; else the address of PostgreSQL's.

    Raises:
        ValueError: the folder or the database holds something else, or was written by a newer program.
    """

    def __init__(self, folder: Path, database: str | None = None):
        self.folder, self.hasher = folder, PasswordHasher()
        if folder.exists() and not folder.is_dir() or folder.is_dir() and not known(folder) and [*folder.iterdir()]:
            raise ValueError(f"{folder} holds something else and no market; choose an empty folder")
        if (database is not None) != (folder / "database").exists() and known(folder):
            told = "name it with --database" if database is None else "leave --database away"
            raise ValueError(f"{folder} has its tables elsewhere; {told}")
        server = PostgreSQL(database) if database is not None else None  # before anything is written
        for place in ("packages", "uploads"):
            (folder / place).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        if not (folder / "secret").exists():
            _write(folder / "secret", secrets.token_hex(32))
        self.secret = (folder / "secret").read_text().encode()
        if server is None:
            self.database = SQLite(self.path, TABLES)
        else:
            self.database = server
            self._pair(server)
        self.step, self.look = self.database.step, self.database.look
        self.absent = self.hasher.hash(secrets.token_hex(16))  # compared where there is no such account

    def _pair(self, server: PostgreSQL) -> None:
        """The folder and the tables know each other by a mark that both have."""
        path = self.folder / "database"
        if new := not path.exists():
            _write(path, secrets.token_hex(16))
        try:
            server.prepare(TABLES, path.read_text(), fresh=not [*(self.folder / "packages").iterdir()])
        except BaseException:
            server.close()
            if new:
                path.unlink()
            raise

    @property
    def path(self) -> Path:
        return self.folder / "market.db"

    def close(self) -> None:
        """Give connections back."""
        self.database.close()

    def backup(self, target: Path) -> None:
        """A copy of all, while the market serves. Packages never change, so they are copied behind the database."""
        if target.exists() and (not target.is_dir() or [*target.iterdir()]):
            raise ValueError(f"{target} is not an empty folder")
        with replacing(target) as part:
            part.mkdir(parents=True)
            part.chmod(0o700)
            self.database.copy(part)
            for name in ("secret", "database"):
                if (self.folder / name).exists():
                    shutil.copy(self.folder / name, part / name)
            shutil.copytree(self.folder / "packages", part / "packages")

    # Accounts

    def sign_up(self, name: str, password: str) -> None:
        if not ACCOUNT.fullmatch(name):
            raise Refused(400, "A name is 2 to 32 small letters, digits and -, and begins with no -.")
        if not 10 <= len(password) <= 200:
            raise Refused(400, "A password has 10 to 200 characters.")
        with HASHING:
            hashed = self.hasher.hash(password.encode("utf-8", "surrogatepass"))
        with self.step() as db:
            if db.execute("SELECT 1 FROM account WHERE name=?", (name,)).fetchone():
                raise Refused(409, "This name is taken.")
            db.execute(
                "INSERT INTO account (name, password, created) VALUES (?, ?, ?)", (name, hashed, int(time.time()))
            )
            note(db, name, "sign up")

    def log_in(self, name: str, password: str) -> str:
        """-> the session's secret, for a cookie."""
        with self.look() as db:
            found = db.execute("SELECT * FROM account WHERE name=?", (name,)).fetchone()
        with HASHING:
            try:
                right = self.hasher.verify(
                    found["password"] if found else self.absent, password[:200].encode("utf-8", "surrogatepass")
                )
            except (Argon2Error, InvalidHashError):
                right = False
        if not (found and right):
            raise Refused(403, "Name or password is wrong.")
        session = secrets.token_urlsafe(32)
        with self.step() as db:
            db.execute("DELETE FROM session WHERE ends < ?", (int(time.time()),))
            db.execute(
                "INSERT INTO session VALUES (?, ?, ?)", (_hashed(session), found["id"], int(time.time()) + SESSION)
            )
            note(db, name, "log in")
        return session

    def log_out(self, session: str) -> None:
        with self.step() as db:
            db.execute("DELETE FROM session WHERE hash=?", (_hashed(session),))

    def of_session(self, session: str) -> Row | None:
        """The account."""
        query = "SELECT account.* FROM account JOIN session ON session.account = account.id WHERE hash=? AND ends>?"
        with self.look() as db:
            return db.execute(query, (_hashed(session), int(time.time()))).fetchone()

    def of_token(self, token: str) -> tuple[Row, set[str]] | None:
        """The account, and what the token may."""
        query = "SELECT account.*, scopes FROM account JOIN token ON token.account = account.id WHERE hash=?"
        with self.look() as db:
            found = db.execute(query, (_hashed(token),)).fetchone()
        return found and (found, set(found["scopes"].split()))

    def new_token(self, account, label: str, scopes: list[str]) -> str:
        """-> the token, which is told this once."""
        if not scopes or not set(scopes) <= set(SCOPES):
            raise Refused(400, f"A token may some of: {', '.join(SCOPES)}.")
        token = f"mct-{secrets.token_urlsafe(32)}"
        with self.step() as db:
            if db.execute("SELECT COUNT(*) FROM token WHERE account=?", (account["id"],)).fetchone()[0] >= 50:
                raise Refused(400, "An account has 50 tokens at most; revoke some.")
            values = (_hashed(token), account["id"], label[:80], " ".join(sorted(set(scopes))), int(time.time()))
            db.execute("INSERT INTO token (hash, account, label, scopes, created) VALUES (?, ?, ?, ?, ?)", values)
            note(db, account["name"], "new token", f"{label[:80]} ({values[3]})")
        return token

    def revoke(self, account, token: int) -> None:
        with self.step() as db:
            if db.execute("DELETE FROM token WHERE id=? AND account=?", (token, account["id"])).rowcount:
                note(db, account["name"], "revoke token", str(token))

    def share(self, account, shares: bool) -> None:
        """Whether the account's downloads and uses are counted for authors."""
        with self.step() as db:
            db.execute("UPDATE account SET shares=? WHERE id=?", (int(shares), account["id"]))

    def signer(self, account, key: str, keep: bool) -> None:
        """Add or remove a public key that the account's packages may be signed by."""
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise Refused(400, "A public key has 64 hex digits.")
        with self.step() as db:
            if keep:
                db.execute("INSERT INTO signer VALUES (?, ?) ON CONFLICT DO NOTHING", (account["id"], key))
            else:
                db.execute("DELETE FROM signer WHERE account=? AND key=?", (account["id"], key))
            note(db, account["name"], "add key" if keep else "remove key", key)

    def make_moderator(self, name: str) -> None:
        with self.step() as db:
            if not db.execute("UPDATE account SET moderator=1 WHERE name=?", (name,)).rowcount:
                raise ValueError(f"{name}: there is no such account")
            note(db, "operator", "make moderator", name)

    def of_account(self, account) -> dict:
        """Tokens, keys, and packages of an account with their statistics."""
        with self.look() as db:
            own = (account["id"],)
            packages = db.execute("SELECT * FROM package WHERE owner=? ORDER BY name", own).fetchall()
            return {
                "tokens": db.execute("SELECT * FROM token WHERE account=? ORDER BY id", own).fetchall(),
                "keys": [key for (key,) in db.execute("SELECT key FROM signer WHERE account=? ORDER BY key", own)],
                "packages": [(row, statistics(db, row)) for row in packages],
            }

    # Uploads

    def begin_upload(self, account, size: int, sha256: str) -> str:
        if not 0 < size <= LARGEST:
            raise Refused(413, f"A package has at most {LARGEST:,} bytes.")
        with self.step() as db:
            old = time.time() - UPLOAD
            for row in db.execute("SELECT id FROM upload WHERE created < ?", (int(old),)).fetchall():
                self._drop(db, row["id"])
            if db.execute("SELECT COUNT(*) FROM upload WHERE account=?", (account["id"],)).fetchone()[0] >= UPLOADS:
                raise Refused(429, f"{UPLOADS} uploads at a time; finish or delete one.", 60)
            upload = secrets.token_hex(16)
            (self.folder / "uploads" / upload).touch(mode=0o600)
            values = (upload, account["id"], size, sha256, int(time.time()))
            db.execute("INSERT INTO upload VALUES (?, ?, ?, ?, ?)", values)
        return upload

    def upload(self, account, upload: str) -> tuple[Row, Path, int]:
        """Of an account's own: its row, its file, bytes that are there."""
        with self.look() as db:
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
        row, path, there = self.upload(account, upload)
        if offset != there:
            raise Refused(409, f"{there} bytes are there; go on from there.")
        if there + len(piece) > row["bytes"]:
            raise Refused(413, "That is more than was said.")
        with path.open("r+b") as file:
            file.seek(offset)  # two who write the same piece write the same place
            file.write(piece)
        return offset + len(piece)

    def drop(self, account, upload: str) -> None:
        self.upload(account, upload)
        with self.step() as db:
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
        row, path, there = self.upload(account, upload)
        if there != row["bytes"]:
            raise Refused(409, f"{there} of {row['bytes']} bytes are there.")
        _check_terms(access, price)
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
        with self.step() as db:
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

    # The catalogue

    def search(self, account, words: str, model: str = "", page: int = 1) -> tuple[list[dict], int]:
        """Packages that the account may see and that have all words; -> those of a page, and how many there are."""
        asked, me = words.casefold().split()[:10], _id(account)
        where = ["package.down='' AND (access!='private' OR owner=? OR reader.account IS NOT NULL)"]
        where += ["words LIKE ? ESCAPE '!'"] * len(asked)
        given = [me, me, *("%" + re.sub("([!%_])", r"!\1", word) + "%" for word in asked)]
        if model:
            where.append(f"? IN ({self.database.embeddings}, {self.database.gistnet})")
            given.append(model)
        query = f"""FROM package JOIN account ON account.id = owner
            JOIN version ON version.package = package.id
                AND number = (SELECT MAX(number) FROM version WHERE package = package.id)
            LEFT JOIN reader ON reader.package = package.id AND reader.account = ? WHERE {" AND ".join(where)}"""
        with self.look() as db:
            count = db.execute(f"SELECT COUNT(*) {query}", given).fetchone()[0]
            select = "SELECT package.name, account.name AS author, access, price, number, card, version.bytes"
            rows = db.execute(
                f"{select} {query} ORDER BY package.name LIMIT ? OFFSET ?", [*given, PAGE, (page - 1) * PAGE]
            )
            return [_listed(row) for row in rows], count

    def package(self, account, name: str) -> dict:
        """What is to be seen of a package: its versions, the newest first, and what the account may."""
        with self.look() as db:
            row, may = seen(db, account, name)
            versions = db.execute("SELECT * FROM version WHERE package=? ORDER BY number DESC", (row["id"],)).fetchall()
            author = db.execute("SELECT name FROM account WHERE id=?", (row["owner"],)).fetchone()[0]
            bought = db.execute(
                "SELECT state FROM purchase WHERE package=? AND account=?", (row["id"], _id(account))
            ).fetchone()
            query = "SELECT name FROM account JOIN reader ON account = id WHERE package=? ORDER BY name"
            readers = [reader for (reader,) in db.execute(query, (row["id"],))] if "own" in may else []
        told = {"name": row["name"], "author": author, "access": row["access"], "price": row["price"]}
        told |= {"down": row["down"], "may": sorted(may), "bought": bought[0] if bought else None, "readers": readers}
        return told | {"versions": [_version(version) for version in versions]}

    def version(self, account, name: str, number: int) -> dict:
        """A version with its card."""
        with self.look() as db:
            row, _ = seen(db, account, name)
            found = db.execute("SELECT * FROM version WHERE package=? AND number=?", (row["id"], number)).fetchone()
        if found is None:
            raise Refused(404, "There is no such version.")
        return _version(found) | {"card": json.loads(found["card"])}

    def file(self, account, name: str, number: int) -> tuple[Path, str]:
        """The file of a version, for whoever may get it, and its checksum."""
        with self.look() as db:
            row, may = seen(db, account, name)
            if row["down"]:
                raise Refused(410, f"It was taken down: {row['down']}.")
            if "get" not in may:
                raise Refused(402, "It is to be bought first.")
        found = self.version(account, name, number)
        return self.folder / "packages" / found["sha256"], found["sha256"]

    def use(self, account, name: str, number: int, what: str) -> bool:
        """Count a download or a use for the author, if the account has allowed it; by day, without a name."""
        if account is None or not account["shares"]:
            return False
        with self.step() as db:
            row, may = seen(db, account, name)
            exists = db.execute("SELECT 1 FROM version WHERE package=? AND number=?", (row["id"], number)).fetchone()
            if "get" not in may or exists is None:
                raise Refused(404, "There is no such version.")
            day = time.strftime("%Y-%m-%d", time.gmtime())
            db.execute(
                "INSERT INTO used VALUES (?, ?, ?, ?, 1) ON CONFLICT (package, version, what, day)"
                " DO UPDATE SET count = used.count + 1",
                (row["id"], number, what, day),
            )
        return True

    def statistics(self, account, name: str) -> list[dict]:
        """What was counted, for the author."""
        with self.look() as db:
            row, may = seen(db, account, name)
            if "own" not in may:
                raise Refused(403, "Statistics are its author's.")
            return statistics(db, row)

    def change(self, account, name: str, access: str, price: int) -> None:
        """Of an own package who may get it."""
        _check_terms(access, price)
        with self.step() as db:
            row = _own(db, account, name)
            db.execute("UPDATE package SET access=?, price=? WHERE id=?", (access, price, row["id"]))
            note(db, account["name"], "access", f"{name} {access} {price}")

    def read_by(self, account, name: str, reader: str, may: bool) -> None:
        """Of an own private package who else may read it."""
        with self.step() as db:
            row = _own(db, account, name)
            found = db.execute("SELECT id FROM account WHERE name=?", (reader,)).fetchone()
            if found is None:
                raise Refused(404, "There is no such account.")
            change = (
                "INSERT INTO reader VALUES (?, ?) ON CONFLICT DO NOTHING"
                if may
                else "DELETE FROM reader WHERE package=? AND account=?"
            )
            db.execute(change, (row["id"], found["id"]))
            note(db, account["name"], "reader" if may else "no reader", f"{name} {reader}")

    # Purchases and hooks

    def buy(self, account, name: str) -> str:
        """-> the state of the purchase; a new one is told to the billing service."""
        with self.step() as db:
            row, may = seen(db, account, name)
            if row["down"] or row["access"] != "paid" or "own" in may:
                raise Refused(409, "It is not to be bought.")
            where = (row["id"], account["id"])
            found = db.execute("SELECT * FROM purchase WHERE package=? AND account=?", where).fetchone()
            if found is not None and found["state"] != "refused":
                return found["state"]
            db.execute("DELETE FROM purchase WHERE package=? AND account=?", where)
            purchase, now = secrets.token_hex(16), int(time.time())
            values = (purchase, *where, row["price"], "pending", now)
            db.execute("INSERT INTO purchase VALUES (?, ?, ?, ?, ?, ?)", values)
            told = {"event": secrets.token_hex(16), "type": "purchase", "purchase": purchase, "package": name}
            told |= {"account": account["name"], "cents": row["price"]}
            db.execute("INSERT INTO hook VALUES (?, ?, ?, 0, 'waits')", (told["event"], json.dumps(told), now))
            note(db, account["name"], "buy", f"{name} {row['price']} cents")
        return "pending"

    def settle(self, purchase: str, state: str) -> None:
        """What the billing service says; the same again changes nothing."""
        with self.step() as db:
            row = db.execute("SELECT * FROM purchase WHERE id=?", (purchase,)).fetchone()
            if row is None:
                raise Refused(404, "There is no such purchase.")
            if row["state"] != state:
                db.execute("UPDATE purchase SET state=? WHERE id=?", (state, purchase))
                note(db, "billing", state, purchase)

    def fresh(self, mark: str, window: int) -> bool:
        """Whether a signature comes for the first time within a window of seconds; it is then remembered."""
        with self.step() as db:
            db.execute("DELETE FROM seen WHERE at < ?", (int(time.time()) - 2 * window,))
            values = (mark, int(time.time()))
            return db.execute("INSERT INTO seen VALUES (?, ?) ON CONFLICT DO NOTHING", values).rowcount == 1

    def hooks_due(self) -> list[Row]:
        with self.look() as db:
            query = "SELECT * FROM hook WHERE state='waits' AND due <= ? ORDER BY due LIMIT 20"
            return db.execute(query, (int(time.time()),)).fetchall()

    def hook_tried(self, hook: str, state: str, due: int) -> None:
        with self.step() as db:
            db.execute("UPDATE hook SET tries=tries+1, state=?, due=? WHERE id=?", (state, due, hook))
            if state != "waits":
                note(db, "billing", f"hook {state}", hook)

    # Moderation

    def report(self, account, name: str, reason: str) -> None:
        if not 1 <= len(reason.strip()) <= 2000:
            raise Refused(400, "A report has a reason of 1 to 2,000 characters.")
        with self.step() as db:
            row, _ = seen(db, account, name)
            mine = "SELECT COUNT(*) FROM report WHERE account=? AND state='open'"
            if db.execute(mine, (account["id"],)).fetchone()[0] >= 20:
                raise Refused(429, "20 of your reports wait already.", 3600)
            values = (row["id"], account["id"], reason.strip(), int(time.time()))
            db.execute(
                "INSERT INTO report (package, account, reason, state, created) VALUES (?, ?, ?, 'open', ?)", values
            )
            note(db, account["name"], "report", name)

    def moderation(self, account) -> dict:
        """Reports that are open, what is down, and the newest of the audit log."""
        _moderates(account)
        with self.look() as db:
            query = """SELECT report.*, package.name, account.name AS reporter FROM report
                JOIN package ON package.id = report.package JOIN account ON account.id = report.account
                WHERE state='open' ORDER BY report.id LIMIT 200"""
            return {
                "reports": db.execute(query).fetchall(),
                "down": db.execute("SELECT name, down FROM package WHERE down != '' ORDER BY name").fetchall(),
                "audit": db.execute("SELECT * FROM audit ORDER BY id DESC LIMIT 200").fetchall(),
            }

    def moderate(self, account, name: str, action: str, reason: str) -> None:
        """``take down`` with a reason, ``put back``, or ``dismiss`` the reports; all close what is open of it."""
        _moderates(account)
        if action not in ("take down", "put back", "dismiss") or action == "take down" and not reason.strip():
            raise Refused(400, "Take down with a reason, put back, or dismiss.")
        with self.step() as db:
            row = db.execute("SELECT * FROM package WHERE name=?", (name,)).fetchone()
            if row is None:
                raise Refused(404, "There is no such package.")
            if action != "dismiss":
                down = reason.strip()[:500] if action == "take down" else ""
                db.execute("UPDATE package SET down=? WHERE id=?", (down, row["id"]))
            db.execute("UPDATE report SET state=? WHERE package=? AND state='open'", (action, row["id"]))
            note(db, account["name"], action, f"{name} {reason.strip()[:500]}".strip())


def known(folder: Path) -> bool:
    """Whether a folder is a market's."""
    return (folder / "market.db").exists() or (folder / "database").exists()


def seen(db, account, name: str) -> tuple[Row, set[str]]:
    """A package, and what an account (``None``: anybody) may: own, get. The one place that decides.

    Raises:
        Refused: 404, as if it were not there, of what the account may not see.
    """
    row = db.execute("SELECT * FROM package WHERE name=?", (name,)).fetchone()
    may, me = set(), _id(account)
    if row is not None and row["owner"] == me:
        may = {"own", "get"}
    elif row is not None:
        reads = db.execute("SELECT 1 FROM reader WHERE package=? AND account=?", (row["id"], me)).fetchone()
        paid = db.execute(
            "SELECT 1 FROM purchase WHERE package=? AND account=? AND state='paid'", (row["id"], me)
        ).fetchone()
        # Who has paid keeps it, whatever the author makes of it later.
        if row["access"] == "free" or paid or (row["access"] == "private" and reads):
            may = {"get"}
        moderates = account is not None and account["moderator"]
        if (row["access"] == "private" and not may) or (row["down"] and not moderates):
            row = None
    if row is None:
        raise Refused(404, "There is no such package.")
    return row, may - {"get"} if row["down"] else may


def statistics(db, row) -> list[dict]:
    """Of a package: version, day, what, count."""
    query = (
        "SELECT version, day, what, count FROM used WHERE package=? ORDER BY day DESC, version DESC, what LIMIT 1000"
    )
    return [dict(found) for found in db.execute(query, (row["id"],))]


def note(db, account: str, action: str, what: str = "") -> None:
    """A line of the audit log."""
    values = (int(time.time()), account, action, what)
    db.execute("INSERT INTO audit (at, account, action, what) VALUES (?, ?, ?, ?)", values)


def _own(db, account, name: str) -> Row:
    row, may = seen(db, account, name)
    if "own" not in may:
        raise Refused(403, "Only its author may do that.")
    return row


def _check_terms(access: str, price: int) -> None:
    if access not in ACCESS or not (1 <= price <= DEAREST if access == "paid" else price == 0):
        raise Refused(400, f"access is {', '.join(ACCESS)}; price is in cents, 0 of what is not paid.")


def _moderates(account) -> None:
    if account is None or not account["moderator"]:
        raise Refused(403, "Only a moderator may do that.")


def _id(account) -> int:
    return -1 if account is None else account["id"]


def _version(row) -> dict:
    return {name: row[name] for name in ("number", "signer", "sha256", "bytes", "created")}


def _listed(row) -> dict:
    card = json.loads(row["card"])
    told = {name: row[name] for name in ("name", "author", "access", "price", "bytes")} | {"version": row["number"]}
    return told | {name: card[name] for name in ("licence", "description", "tokens", "model")}


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text)


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
