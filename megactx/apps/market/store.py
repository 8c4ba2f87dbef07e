"""What the market knows, in one database, with the packages as files beside it.

DATA/market.db            accounts, tokens, packages, purchases, hooks that wait, reports, audit log
DATA/database             instead of it: the mark of the tables in PostgreSQL that belong to this folder
DATA/packages/SHA256      packages as they were uploaded
DATA/uploads/ID           what is on its way
DATA/secret               of the forms; made at the first start
"""

import secrets
import shutil
from pathlib import Path

from megactx.framework.files import replacing

from .accounts import Accounts
from .catalogue import Catalogue
from .database import PostgreSQL, SQLite
from .moderation import Moderation
from .purchases import Purchases
from .uploads import Uploads

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


class Store:
    """The market's folder, and by a name of its own each thing that is done with it; each step is a transaction.

    Args:
        database: ``None``: SQLite's in the folder; else the address of PostgreSQL's.

    Raises:
        ValueError: the folder or the database holds something else, or was written by a newer program.
    """

    def __init__(self, folder: Path, database: str | None = None):
        self.folder = folder
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
        self.accounts, self.uploads = Accounts(self.database), Uploads(folder, self.database)
        self.catalogue, self.purchases = Catalogue(folder, self.database), Purchases(self.database)
        self.moderation = Moderation(self.database)

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


def known(folder: Path) -> bool:
    """Whether a folder is a market's."""
    return (folder / "market.db").exists() or (folder / "database").exists()


def _write(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text)
