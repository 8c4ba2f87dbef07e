"""Hooks between the market and whoever takes the money: signed, with a window against replays, tried again until told.

    market  -- POST URL           {"event", "type": "purchase", "purchase", "package", "account", "cents"} -->  billing
    market  <-- POST /api/billing {"event", "purchase", "state": "paid" or "refused"}                      --  billing

    Megactx-Signature: t=SECONDS,v1=HEX       HMAC-SHA256 of "WHO.SECONDS.BODY"; WHO is the sender, market or billing

A signature is taken once, and within WINDOW seconds. A hook that is sent again has the same event and a new signature,
and is answered as before.
"""

import hashlib
import hmac
import json
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from megactx.framework.files import replacing

from ..guard import Guard
from .client import NoRedirect
from .store import Store

HEADER, WINDOW = "megactx-signature", 300
FORM = re.compile(r"t=([0-9]{1,12}),v1=([0-9a-f]{64})")
TRIES, SLOWEST = 40, 600  # of a hook, and seconds between two of them
PATIENCE = 10.0  # seconds for an answer


def secret_of(path: Path) -> bytes:
    """The secret that both sides have.

    Raises:
        ValueError: there is none of 32 characters.
    """
    try:
        found = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read ({error.strerror})") from error
    if len(found) < 32:
        raise ValueError(f"{path}: a secret has at least 32 characters; openssl rand -hex 32 makes one")
    return found


def signed(secret: bytes, who: str, body: bytes, at: int | None = None) -> str:
    """The header of a hook."""
    at = int(time.time()) if at is None else at
    return f"t={at},v1={hmac.new(secret, f'{who}.{at}.'.encode() + body, hashlib.sha256).hexdigest()}"


def refusal(secret: bytes, who: str, header: str, body: bytes, fresh: Callable[[str, int], bool]) -> str | None:
    """Why a hook is not taken; ``None``: it is.

    Args:
        fresh: (mark, window) -> whether the mark is seen for the first time.
    """
    found = FORM.fullmatch(header)
    if found is None or not hmac.compare_digest(signed(secret, who, body, int(found[1])), header):
        return "The signature is wrong."
    if abs(time.time() - int(found[1])) > WINDOW:
        return "The signature is too old."
    return None if fresh(found[2], WINDOW) else "This signature was used already."


def post(url: str, secret: bytes, who: str, body: bytes) -> int:
    """Send a hook; -> the status of the answer, 0 where there is none."""
    headers = {"content-type": "application/json", HEADER: signed(secret, who, body)}
    request = urllib.request.Request(url, body, headers, method="POST")
    try:
        with _plain.open(request, timeout=PATIENCE) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


_plain = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect)


class Sender:
    """Sends what waits, in a thread of its own.

    Args:
        url: of the billing service.
    """

    def __init__(self, store: Store, url: str, secret: bytes):
        self.store, self.url, self.secret = store, url, secret
        self.wake, self.ended = threading.Event(), False
        self.thread = threading.Thread(target=self._run, name="billing", daemon=True)

    def start(self) -> "Sender":
        self.thread.start()
        return self

    def close(self) -> None:
        self.ended = True
        self.wake.set()
        self.thread.join(PATIENCE + 1)

    def _run(self) -> None:
        while not self.ended:
            self.wake.clear()
            try:
                for hook in self.store.purchases.hooks_due():
                    if not self.ended:
                        self._send(hook)
            except Exception as error:  # a disk that is full for a while; purchases wait meanwhile
                print(f"megactx: billing: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            self.wake.wait(1.0)

    def _send(self, hook) -> None:
        status = post(self.url, self.secret, "market", hook["body"].encode())
        tries = hook["tries"] + 1
        state = "delivered" if 200 <= status < 300 else "waits" if tries < TRIES else "given up"
        self.store.purchases.hook_tried(hook["id"], state, int(time.time()) + min(SLOWEST, 2 ** min(tries, 10)))


class Receiver:
    """A billing service for trying out and for the tests: whoever asks has paid.

    Args:
        market: its address.
        path: where it keeps which events it knows.
    """

    def __init__(self, market: str, secret: bytes, path: Path):
        self.market, self.secret, self.path = market, secret, path
        self.known = json.loads(path.read_text()) if path.exists() else {"events": {}, "seen": {}}
        self.lock = threading.Lock()

    def app(self, host: str) -> Guard:
        app = FastAPI(openapi_url=None)

        @app.post("/")
        async def hook(request: Request) -> JSONResponse:
            body = await request.body()
            status, told = self.take(request.headers.get(HEADER, ""), body)
            return JSONResponse({"message": told}, status)

        return Guard(app, host)

    def take(self, header: str, body: bytes) -> tuple[int, str]:
        """A hook; -> status and what is said."""
        with self.lock:
            if wrong := refusal(self.secret, "market", header, body, self._fresh):
                return 403, wrong
            told = json.loads(body)
            if told["event"] not in self.known["events"]:
                self.known["events"][told["event"]] = "paid"
            state = self.known["events"][told["event"]]
            with replacing(self.path) as part:
                part.write_text(json.dumps(self.known))
        answer = json.dumps({"event": told["event"], "purchase": told["purchase"], "state": state}).encode()
        threading.Thread(target=self._answer, args=(answer,), daemon=True).start()
        return 200, "taken"

    def _answer(self, body: bytes) -> None:
        for tries in range(TRIES):
            if 200 <= post(f"{self.market}/api/billing", self.secret, "billing", body) < 300:
                return
            time.sleep(min(SLOWEST, 2**tries))

    def _fresh(self, mark: str, window: int) -> bool:
        now = time.time()
        self.known["seen"] = {m: at for m, at in self.known["seen"].items() if at > now - 2 * window}
        first = mark not in self.known["seen"]
        self.known["seen"][mark] = now
        return first
