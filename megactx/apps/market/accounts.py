"""Who people are to the market: passwords, sessions, tokens, and the keys that their packages are signed by.

Passwords are kept as argon2id hashes, sessions and tokens (32 random bytes each) as sha256.
"""

import hashlib
import re
import secrets
import threading
import time

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

from .access import note
from .catalogue import statistics
from .database import Database, Refused, Row

ACCOUNT = re.compile(r"[a-z0-9][a-z0-9-]{1,31}")
SCOPES = ("read", "publish", "buy")
SESSION = 14 * 86_400  # seconds
HASHING = threading.Semaphore(2)  # argon2 takes 64 MiB each time


class Accounts:
    """Sign up, log in, and what an account says of itself."""

    def __init__(self, database: Database):
        self.database, self.hasher = database, PasswordHasher()
        self.absent = self.hasher.hash(secrets.token_hex(16))  # compared where there is no such account

    def sign_up(self, name: str, password: str) -> None:
        if not ACCOUNT.fullmatch(name):
            raise Refused(400, "A name is 2 to 32 small letters, digits and -, and begins with no -.")
        if not 10 <= len(password) <= 200:
            raise Refused(400, "A password has 10 to 200 characters.")
        with HASHING:
            hashed = self.hasher.hash(password.encode("utf-8", "surrogatepass"))
        with self.database.step() as db:
            if db.execute("SELECT 1 FROM account WHERE name=?", (name,)).fetchone():
                raise Refused(409, "This name is taken.")
            db.execute(
                "INSERT INTO account (name, password, created) VALUES (?, ?, ?)", (name, hashed, int(time.time()))
            )
            note(db, name, "sign up")

    def log_in(self, name: str, password: str) -> str:
        """-> the session's secret, for a cookie."""
        with self.database.look() as db:
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
        with self.database.step() as db:
            db.execute("DELETE FROM session WHERE ends < ?", (int(time.time()),))
            db.execute(
                "INSERT INTO session VALUES (?, ?, ?)", (_hashed(session), found["id"], int(time.time()) + SESSION)
            )
            note(db, name, "log in")
        return session

    def log_out(self, session: str) -> None:
        with self.database.step() as db:
            db.execute("DELETE FROM session WHERE hash=?", (_hashed(session),))

    def of_session(self, session: str) -> Row | None:
        """The account."""
        query = "SELECT account.* FROM account JOIN session ON session.account = account.id WHERE hash=? AND ends>?"
        with self.database.look() as db:
            return db.execute(query, (_hashed(session), int(time.time()))).fetchone()

    def of_token(self, token: str) -> tuple[Row, set[str]] | None:
        """The account, and what the token may."""
        query = "SELECT account.*, scopes FROM account JOIN token ON token.account = account.id WHERE hash=?"
        with self.database.look() as db:
            found = db.execute(query, (_hashed(token),)).fetchone()
        return found and (found, set(found["scopes"].split()))

    def new_token(self, account, label: str, scopes: list[str]) -> str:
        """-> the token, which is told this once."""
        if not scopes or not set(scopes) <= set(SCOPES):
            raise Refused(400, f"A token may some of: {', '.join(SCOPES)}.")
        token = f"mct-{secrets.token_urlsafe(32)}"
        with self.database.step() as db:
            if db.execute("SELECT COUNT(*) FROM token WHERE account=?", (account["id"],)).fetchone()[0] >= 50:
                raise Refused(400, "An account has 50 tokens at most; revoke some.")
            values = (_hashed(token), account["id"], label[:80], " ".join(sorted(set(scopes))), int(time.time()))
            db.execute("INSERT INTO token (hash, account, label, scopes, created) VALUES (?, ?, ?, ?, ?)", values)
            note(db, account["name"], "new token", f"{label[:80]} ({values[3]})")
        return token

    def revoke(self, account, token: int) -> None:
        with self.database.step() as db:
            if db.execute("DELETE FROM token WHERE id=? AND account=?", (token, account["id"])).rowcount:
                note(db, account["name"], "revoke token", str(token))

    def share(self, account, shares: bool) -> None:
        """Whether the account's downloads and uses are counted for authors."""
        with self.database.step() as db:
            db.execute("UPDATE account SET shares=? WHERE id=?", (int(shares), account["id"]))

    def signer(self, account, key: str, keep: bool) -> None:
        """Add or remove a public key that the account's packages may be signed by."""
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise Refused(400, "A public key has 64 hex digits.")
        with self.database.step() as db:
            if keep:
                db.execute("INSERT INTO signer VALUES (?, ?) ON CONFLICT DO NOTHING", (account["id"], key))
            else:
                db.execute("DELETE FROM signer WHERE account=? AND key=?", (account["id"], key))
            note(db, account["name"], "add key" if keep else "remove key", key)

    def make_moderator(self, name: str) -> None:
        with self.database.step() as db:
            if not db.execute("UPDATE account SET moderator=1 WHERE name=?", (name,)).rowcount:
                raise ValueError(f"{name}: there is no such account")
            note(db, "operator", "make moderator", name)

    def about(self, account) -> dict:
        """Tokens, keys, and packages of an account with their statistics."""
        with self.database.look() as db:
            own = (account["id"],)
            packages = db.execute("SELECT * FROM package WHERE owner=? ORDER BY name", own).fetchall()
            return {
                "tokens": db.execute("SELECT * FROM token WHERE account=? ORDER BY id", own).fetchall(),
                "keys": [key for (key,) in db.execute("SELECT key FROM signer WHERE account=? ORDER BY key", own)],
                "packages": [(row, statistics(db, row)) for row in packages],
            }


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
