"""Who may ask, whose memory that is, and how much.

    {"anna": {"sha256": "9f86d0...", "requests": 60, "tokens": 100000}}

A name is that of a memory. A key is 32 random bytes, so that its plain sha256 gives nothing away; the key itself is
nowhere. ``requests`` and ``tokens`` are a minute's; without them those of the command count.
"""

import hashlib
import json
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from megactx.framework import files

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # it names a folder
HASH = re.compile(r"[0-9a-f]{64}")
ALONE = "default"  # the memory where there is no file of keys


class Bucket:
    """So many a minute; what is not used is kept for a minute.

    Args:
        rate: a minute.
    """

    def __init__(self, rate: int):
        self.rate, self.left, self.at = rate, float(rate), time.monotonic()

    def wait(self) -> float:
        """Seconds until there is one; 0: now."""
        now = time.monotonic()
        self.left, self.at = min(float(self.rate), self.left + (now - self.at) * self.rate / 60), now
        return max(0.0, (1 - self.left) * 60 / self.rate)

    def take(self, count: int) -> None:
        """Of what is counted afterwards more may be taken than there is; the next wait is then longer."""
        self.left -= count


@dataclass
class Holder:
    """Of a key.

    Attributes:
        name: of the memory.
    """

    name: str
    requests: Bucket
    tokens: Bucket


class Keys:
    """All keys that are known.

    Args:
        hashes: name -> entry, as in the file.
        requests, tokens: a minute, of an entry that does not say.

    Raises:
        ValueError: an entry is none.
    """

    def __init__(self, hashes: dict[str, dict], requests: int, tokens: int):
        self.holders = {}
        for name, entry in hashes.items():
            limits = {what: entry.get(what, usual) for what, usual in (("requests", requests), ("tokens", tokens))}
            for what, value in limits.items():
                if type(value) is not int or value < 1:
                    raise ValueError(f"{name}: {what}={value!r} is not allowed: a whole number, at least 1")
            buckets = {what: Bucket(value) for what, value in limits.items()}
            self.holders[entry["sha256"]] = Holder(name, **buckets)
        if len(self.holders) < len(hashes):
            raise ValueError("two names have one key; each has its own")

    def holder(self, key: str) -> Holder | None:
        """Whose key that is."""
        return self.holders.get(_hashed(key))


def read(path: Path) -> dict[str, dict]:
    """A file of keys.

    Raises:
        ValueError: it is missing, empty, or no such file.
    """
    if not path.is_file():
        raise ValueError(f"--key-file={path}: there is no such file; --new-key NAME makes one")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wrong = [
            name for name, entry in found.items() if not NAME.fullmatch(name) or not HASH.fullmatch(entry["sha256"])
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"--key-file={path}: it is no file of keys ({type(error).__name__}: {error})") from error
    if wrong or not found:
        raise ValueError(f"--key-file={path}: {f'{wrong[0]!r} is no entry' if wrong else 'it holds no key'}")
    return found


def add(path: Path, name: str) -> str:
    """A new key for a name, in place of its old one; -> the key, which is told this once.

    Raises:
        ValueError: a name that is not allowed, or a file that cannot be written.
    """
    if not NAME.fullmatch(name):
        raise ValueError(f"--new-key={name} is not allowed: up to 64 letters, digits, - and _")
    there, key = read(path) if path.exists() else {}, generated()
    there[name] = there.get(name, {}) | {"sha256": _hashed(key)}
    files.write(path, json.dumps(there, indent=1) + "\n")
    return key


def alone(key: str) -> dict[str, dict]:
    """The entries of one key without a file."""
    return {ALONE: {"sha256": _hashed(key)}}


def generated() -> str:
    """A new key."""
    return f"mega-{secrets.token_urlsafe(32)}"


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
