"""Purchases, and the hooks that tell the billing service of them."""

import json
import secrets
import time

from .access import note, seen
from .database import Database, Refused, Row


class Purchases:
    """A purchase is pending until the billing service has settled it."""

    def __init__(self, database: Database):
        self.database = database

    def buy(self, account, name: str) -> str:
        """-> the state of the purchase; a new one is told to the billing service."""
        with self.database.step() as db:
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
        with self.database.step() as db:
            row = db.execute("SELECT * FROM purchase WHERE id=?", (purchase,)).fetchone()
            if row is None:
                raise Refused(404, "There is no such purchase.")
            if row["state"] != state:
                db.execute("UPDATE purchase SET state=? WHERE id=?", (state, purchase))
                note(db, "billing", state, purchase)

    def fresh(self, mark: str, window: int) -> bool:
        """Whether a signature comes for the first time within a window of seconds; it is then remembered."""
        with self.database.step() as db:
            db.execute("DELETE FROM seen WHERE at < ?", (int(time.time()) - 2 * window,))
            values = (mark, int(time.time()))
            return db.execute("INSERT INTO seen VALUES (?, ?) ON CONFLICT DO NOTHING", values).rowcount == 1

    def hooks_due(self) -> list[Row]:
        with self.database.look() as db:
            query = "SELECT * FROM hook WHERE state='waits' AND due <= ? ORDER BY due LIMIT 20"
            return db.execute(query, (int(time.time()),)).fetchall()

    def hook_tried(self, hook: str, state: str, due: int) -> None:
        with self.database.step() as db:
            db.execute("UPDATE hook SET tries=tries+1, state=?, due=? WHERE id=?", (state, due, hook))
            if state != "waits":
                note(db, "billing", f"hook {state}", hook)
