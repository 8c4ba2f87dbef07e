"""Reports of packages, and what moderators make of them."""

import time

from .access import note, seen
from .database import Database, Refused


class Moderation:
    """Anybody with an account reports; a moderator decides."""

    def __init__(self, database: Database):
        self.database = database

    def report(self, account, name: str, reason: str) -> None:
        if not 1 <= len(reason.strip()) <= 2000:
            raise Refused(400, "A report has a reason of 1 to 2,000 characters.")
        with self.database.step() as db:
            row, _ = seen(db, account, name)
            mine = "SELECT COUNT(*) FROM report WHERE account=? AND state='open'"
            if db.execute(mine, (account["id"],)).fetchone()[0] >= 20:
                raise Refused(429, "20 of your reports wait already.", 3600)
            values = (row["id"], account["id"], reason.strip(), int(time.time()))
            db.execute(
                "INSERT INTO report (package, account, reason, state, created) VALUES (?, ?, ?, 'open', ?)", values
            )
            note(db, account["name"], "report", name)

    def overview(self, account) -> dict:
        """Reports that are open, what is down, and the newest of the audit log."""
        _check_moderator(account)
        with self.database.look() as db:
            query = """SELECT report.*, package.name, account.name AS reporter FROM report
                JOIN package ON package.id = report.package JOIN account ON account.id = report.account
                WHERE state='open' ORDER BY report.id LIMIT 200"""
            return {
                "reports": db.execute(query).fetchall(),
                "down": db.execute("SELECT name, down FROM package WHERE down != '' ORDER BY name").fetchall(),
                "audit": db.execute("SELECT * FROM audit ORDER BY id DESC LIMIT 200").fetchall(),
            }

    def decide(self, account, name: str, action: str, reason: str) -> None:
        """``take down`` with a reason, ``put back``, or ``dismiss`` the reports; all close what is open of it."""
        _check_moderator(account)
        if action not in ("take down", "put back", "dismiss") or action == "take down" and not reason.strip():
            raise Refused(400, "Take down with a reason, put back, or dismiss.")
        with self.database.step() as db:
            row = db.execute("SELECT * FROM package WHERE name=?", (name,)).fetchone()
            if row is None:
                raise Refused(404, "There is no such package.")
            if action != "dismiss":
                down = reason.strip()[:500] if action == "take down" else ""
                db.execute("UPDATE package SET down=? WHERE id=?", (down, row["id"]))
            db.execute("UPDATE report SET state=? WHERE package=? AND state='open'", (action, row["id"]))
            note(db, account["name"], action, f"{name} {reason.strip()[:500]}".strip())


def _check_moderator(account) -> None:
    if account is None or not account["moderator"]:
        raise Refused(403, "Only a moderator may do that.")
