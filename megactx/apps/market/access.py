"""Who may do what with a package, and the audit log of what was done."""

import time

from .database import Refused, Row

ACCESS = ("private", "free", "paid")
DEAREST = 10**7  # cents


def seen(db, account, name: str) -> tuple[Row, set[str]]:
    """A package, and what an account (``None``: anybody) may: own, get. The one place that decides.

    Raises:
        Refused: 404, as if it were not there, of what the account may not see.
    """
    row = db.execute("SELECT * FROM package WHERE name=?", (name,)).fetchone()
    may, me = set(), id_of(account)
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


def own(db, account, name: str) -> Row:
    """A package of the account's own; raises Refused where it is somebody else's."""
    row, may = seen(db, account, name)
    if "own" not in may:
        raise Refused(403, "Only its author may do that.")
    return row


def id_of(account) -> int:
    """-1, which no account has, of anybody."""
    return -1 if account is None else account["id"]


def check_terms(access: str, price: int) -> None:
    """Raises Refused where who may get a package, or its price, is not allowed."""
    if access not in ACCESS or not (1 <= price <= DEAREST if access == "paid" else price == 0):
        raise Refused(400, f"access is {', '.join(ACCESS)}; price is in cents, 0 of what is not paid.")


def note(db, account: str, action: str, what: str = "") -> None:
    """A line of the audit log."""
    values = (int(time.time()), account, action, what)
    db.execute("INSERT INTO audit (at, account, action, what) VALUES (?, ?, ?, ?)", values)
