"""What the command does at another's market: pieces that go on after a break, and nothing that is not checked."""

import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from megactx.framework.errors import FULL, RunFailed
from megactx.framework.files import checksum, replacing, writing

from . import package
from .package import Card

PIECE = 2**19  # bytes of an upload that are sent at once
TRIES = 6  # in a row without a byte
PATIENCE = 60.0  # seconds for an answer
BROKEN = (OSError, HTTPException)
LOCAL = re.compile(r"http://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?")


class Failed(Exception):
    """The market answers with an error."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Client:
    """Of one market.

    Args:
        address: https, or http of this machine.
        token: ``None``: what anybody may.
        saw: called with bytes that are done, and all there are.

    Raises:
        ValueError: no such address.
    """

    def __init__(self, address: str, token: str | None = None, saw: Callable[[int, int], None] = lambda done, of: None):
        self.address, self.token, self.saw = address.rstrip("/"), token, saw
        if not re.fullmatch(r"https?://[^/\s]+", self.address):
            raise ValueError(f"--at={address} is not allowed: https://NAME or http://NAME:PORT")
        if token and not (self.address.startswith("https://") or LOCAL.fullmatch(self.address)):
            raise ValueError(f"--at={address}: a token is not sent over http to another machine; use https")
        if token and not token.isascii():
            raise ValueError("the token is none")

    def ask(self, method: str, path: str, body=None, **query) -> dict | list:
        """An answer as JSON; ``body``: bytes, or what is sent as JSON.

        Raises:
            ValueError: the market says no; the message is its own.
            RunFailed: it cannot be reached, or failed.
        """
        for wait in (1, 2, 4, None):
            try:
                with self._open(method, path, body, query) as answer:
                    return json.load(answer)
            except Failed as error:
                if error.status == 429 and wait is not None and method != "DELETE":
                    time.sleep(wait)
                    continue
                raise (RunFailed if error.status >= 500 else ValueError)(f"{self.address}: {error}") from error
            except (*BROKEN, ValueError) as error:
                if method == "GET" and wait is not None:
                    time.sleep(wait / 4)
                    continue
                raise RunFailed(f"{self.address} cannot be reached ({_reason(error)})") from error

    def publish(self, path: Path, access: str, price: int) -> dict:
        """Upload a package and publish it; -> name and version. What breaks off goes on where it was."""
        size = path.stat().st_size
        upload = self.ask("POST", "/api/uploads", {"bytes": size, "sha256": checksum(path)})["id"]
        try:
            self._upload(path, upload, size)
            return self.ask("POST", f"/api/uploads/{upload}/publish", {"access": access, "price": price})
        except ValueError:
            try:
                self.ask("DELETE", f"/api/uploads/{upload}")
            except (ValueError, RunFailed):
                pass  # it is gone, or goes in a day
            raise

    def _upload(self, path: Path, upload: str, size: int) -> None:
        done, tries = 0, 0
        with path.open("rb") as file:
            while done < size:
                file.seek(done)
                try:
                    with self._open("PATCH", f"/api/uploads/{upload}", file.read(PIECE), {"offset": done}) as answer:
                        done, tries = json.load(answer)["received"], 0
                except (Failed, *BROKEN, ValueError) as error:
                    tries += 1
                    if (
                        tries > TRIES
                        or isinstance(error, Failed)
                        and error.status not in (409, 429, 500, 502, 503, 504)
                    ):
                        kind = ValueError if isinstance(error, Failed) and error.status < 500 else RunFailed
                        raise kind(
                            f"{self.address}: the upload broke off at {done:,} bytes ({_reason(error)})"
                        ) from error
                    time.sleep(2**tries / 8)
                    done = self.ask("GET", f"/api/uploads/{upload}")["received"]
                self.saw(done, size)

    def get(self, name: str, folder: Path, number: int | None = None, signer: str | None = None) -> Card:
        """Download a version, check it, and put it in place of an earlier one that is there.

        Args:
            number: ``None``: the newest.
            signer: that must have signed it; ``None``: whoever signed what is there, else anybody.

        Raises:
            ValueError: it may not be had, is damaged, or was signed by another; the folder holds other things.
            RunFailed: the connection broke too often, or the disk is full. What came is kept for the next time.
        """
        if not re.fullmatch(package.NAME, name):
            raise ValueError(f"{name} is no name of a package")
        if folder.exists() and (not folder.is_dir() or [*folder.iterdir()]):
            before, trusted = package.installed(folder)
            if before.name != name:
                raise ValueError(f"{folder} holds the package {before.name}; choose another folder")
            signer = signer or trusted
        if number is None:
            number = self.ask("GET", f"/api/packages/{name}")["versions"][0]["number"]
        about = self.ask("GET", f"/api/packages/{name}/versions/{number}")
        sha256, size = str(about["sha256"]), int(about["bytes"])
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            raise RunFailed(f"{self.address}: its answer makes no sense")
        part = folder.with_name(f".{folder.name}-{sha256[:16]}.part")
        with writing(part, "name a folder on another disk"):
            part.parent.mkdir(parents=True, exist_ok=True)
            self._download(f"/api/packages/{name}/versions/{number}/file", part, size)
            if checksum(part) != sha256:
                part.unlink()
                raise ValueError(f"{name} {number} came damaged: its checksum is another one. Get it again")
        try:
            with replacing(folder, "name a folder on another disk") as place:
                place.mkdir(parents=True)
                try:
                    card, key = package.unpack(part, place)
                except ValueError as error:
                    raise ValueError(f"{name} {number} is not installed: {error}") from error
                if (card.name, card.version) != (name, number):
                    raise ValueError(f"{name} {number} is not installed: it is {card.name} {card.version}")
                if signer is not None and key != signer:
                    raise ValueError(f"{name} {number} is not installed: it is signed by {key}, not by {signer}")
        except ValueError:
            part.unlink()
            raise
        part.unlink()
        return card

    def _download(self, path: str, part: Path, size: int) -> None:
        tries = 0
        while True:
            done = part.stat().st_size if part.exists() else 0
            if done > size:
                part.unlink()
                continue
            self.saw(done, size)
            if done == size:
                return
            try:
                with self._open("GET", path, None, {}, {"Range": f"bytes={done}-"}) as answer, part.open("ab") as out:
                    if answer.status == 200 and done:  # a server that gives no ranges
                        out.truncate(0)
                        done = 0
                    while piece := answer.read1(2**18):
                        tries, done = 0, done + len(piece)
                        if done > size:
                            raise RunFailed(f"{self.address}: more comes than was said")
                        out.write(piece)
                        self.saw(done, size)
                if done < size:
                    raise ConnectionError("it was closed")
            except Failed as error:
                if error.status not in (429, 500, 502, 503, 504) or tries == TRIES:
                    raise (RunFailed if error.status >= 500 else ValueError)(f"{self.address}: {error}") from error
                tries += 1
                time.sleep(2**tries / 8)
            except BROKEN as error:
                if getattr(error, "filename", None) is not None or getattr(error, "errno", None) in FULL:
                    raise
                tries += 1
                if tries > TRIES:
                    raise RunFailed(
                        f"{self.address}: the download broke off at {done:,} of {size:,} bytes ({_reason(error)}); the"
                        " same command goes on from there"
                    ) from error
                time.sleep(2**tries / 8)

    def _open(self, method: str, path: str, body, query: dict, headers: dict | None = None):
        asked = f"{self.address}{path}{'?' + urllib.parse.urlencode(query) if query else ''}"
        headers = dict(headers or {})
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        if isinstance(body, bytes):
            headers["Content-Type"] = "application/octet-stream"
        elif body is not None:
            body, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(asked, body, headers, method=method)
        try:
            return _opener.open(request, timeout=PATIENCE)
        except urllib.error.HTTPError as error:
            with error:
                try:
                    message = str(json.loads(error.read(2**16))["error"])
                except (*BROKEN, ValueError, KeyError, TypeError):
                    message = f"it answers {error.code}"
            raise Failed(error.code, message) from error


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token and a signature are for the one who was named."""

    def redirect_request(self, *_):
        return None


_opener = urllib.request.build_opener(NoRedirect)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "reason", error)) or type(error).__name__
