"""What packages there are: search them, get them, count their uses, change who may get them."""

import json
import re
import time
from pathlib import Path

from .access import check_terms, id_of, note, own, seen
from .database import Database, Refused

PAGE = 20  # packages of a page of the search


class Catalogue:
    """Of the packages in the market's folder; ``account`` is ``None`` where anybody asks."""

    def __init__(self, folder: Path, database: Database):
        self.folder, self.database = folder, database

    def search(self, account, words: str, model: str = "", page: int = 1) -> tuple[list[dict], int]:
        """Packages that the account may see and that have all words; -> those of a page, and how many there are."""
        asked, me = words.casefold().split()[:10], id_of(account)
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
        with self.database.look() as db:
            count = db.execute(f"SELECT COUNT(*) {query}", given).fetchone()[0]
            select = "SELECT package.name, account.name AS author, access, price, number, card, version.bytes"
            rows = db.execute(
                f"{select} {query} ORDER BY package.name LIMIT ? OFFSET ?", [*given, PAGE, (page - 1) * PAGE]
            )
            return [_listed(row) for row in rows], count

    def package(self, account, name: str) -> dict:
        """What is to be seen of a package: its versions, the newest first, and what the account may."""
        with self.database.look() as db:
            row, may = seen(db, account, name)
            versions = db.execute("SELECT * FROM version WHERE package=? ORDER BY number DESC", (row["id"],)).fetchall()
            author = db.execute("SELECT name FROM account WHERE id=?", (row["owner"],)).fetchone()[0]
            bought = db.execute(
                "SELECT state FROM purchase WHERE package=? AND account=?", (row["id"], id_of(account))
            ).fetchone()
            query = "SELECT name FROM account JOIN reader ON account = id WHERE package=? ORDER BY name"
            readers = [reader for (reader,) in db.execute(query, (row["id"],))] if "own" in may else []
        told = {"name": row["name"], "author": author, "access": row["access"], "price": row["price"]}
        told |= {"down": row["down"], "may": sorted(may), "bought": bought[0] if bought else None, "readers": readers}
        return told | {"versions": [_version(version) for version in versions]}

    def version(self, account, name: str, number: int) -> dict:
        """A version with its card."""
        with self.database.look() as db:
            row, _ = seen(db, account, name)
            found = db.execute("SELECT * FROM version WHERE package=? AND number=?", (row["id"], number)).fetchone()
        if found is None:
            raise Refused(404, "There is no such version.")
        return _version(found) | {"card": json.loads(found["card"])}

    def file(self, account, name: str, number: int) -> tuple[Path, str]:
        """The file of a version, for whoever may get it, and its checksum."""
        with self.database.look() as db:
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
        with self.database.step() as db:
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
        with self.database.look() as db:
            row, may = seen(db, account, name)
            if "own" not in may:
                raise Refused(403, "Statistics are its author's.")
            return statistics(db, row)

    def change(self, account, name: str, access: str, price: int) -> None:
        """Of an own package who may get it."""
        check_terms(access, price)
        with self.database.step() as db:
            row = own(db, account, name)
            db.execute("UPDATE package SET access=?, price=? WHERE id=?", (access, price, row["id"]))
            note(db, account["name"], "access", f"{name} {access} {price}")

    def read_by(self, account, name: str, reader: str, may: bool) -> None:
        """Of an own private package who else may read it."""
        with self.database.step() as db:
            row = own(db, account, name)
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


def statistics(db, row) -> list[dict]:
    """Of a package: version, day, what, count."""
    query = (
        "SELECT version, day, what, count FROM used WHERE package=? ORDER BY day DESC, version DESC, what LIMIT 1000"
    )
    return [dict(found) for found in db.execute(query, (row["id"],))]


def _version(row) -> dict:
    return {name: row[name] for name in ("number", "signer", "sha256", "bytes", "created")}


def _listed(row) -> dict:
    card = json.loads(row["card"])
    told = {name: row[name] for name in ("name", "author", "access", "price", "bytes")} | {"version": row["number"]}
    return told | {name: card[name] for name in ("licence", "description", "tokens", "model")}
