"""What every small server of this room refuses before it answers, and the headers of what it answers (method 14).

Host       a name that an attacker's DNS may have turned to this machine (rebinding): 403
Origin     a page of another site: 403; there is no CORS, so no other site reads an answer either
token      who does not know the run's own, where there is one: 403
body       more than LARGEST bytes: 413
"""

import asyncio
import ipaddress
import secrets
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

LARGEST = 2**20  # bytes of a request's body
TOO_LARGE = f"At most {LARGEST:,} bytes."
SWALLOWED, PATIENCE = 8 * LARGEST, 1.0  # bytes, and seconds, of what is still on its way behind an answer
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware.

    Args:
        app: what answers.
        host: that the server is bound to. On a loopback address only loopback names are allowed as ``Host``, elsewhere
            also addresses in digits and ``host`` itself: a rebinding attack needs a name.
        token: of the run; ``/?token=...`` puts it into a cookie, which all other requests need. ``None``: none is.
        cookie: its name; cookies of one host are the same on all ports.
        refuse: (message, status) -> the answer that says so.
        headers: of every answer.
        public: https://NAME under which a proxy on this machine shows the server, if one does.
    """

    def __init__(
        self,
        app,
        host: str,
        token: str | None = None,
        cookie: str = "megactx",
        refuse=PlainTextResponse,
        headers: dict[str, str] = HEADERS,
        public: str | None = None,
    ):
        self.app, self.host, self.token, self.cookie, self.refuse = app, host, token, cookie, refuse
        self.headers, self.public = headers, public

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        body = _Body(receive)
        fresh = refusal is None and self.token is not None and scope["path"] == "/" and self._asked(scope)

        async def answer(message) -> None:
            if message["type"] == "http.response.start":
                extra = dict(self.headers)
                if fresh:
                    extra["set-cookie"] = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items())]
            last = message["type"] == "http.response.body" and not message.get("more_body")
            if not last or body.whole:
                return await send(message)
            # Closed with something unread, the connection is reset, and the client may never see the answer.
            await send(message | {"more_body": True})
            await body.swallow()
            await send({"type": "http.response.body"})

        if refusal is not None:
            return await refusal(scope, body, answer)
        await self.app(scope, body, answer)

    def _refusal(self, scope, headers: dict[str, str]) -> Response | None:
        name = headers.get("host", "")
        if not (self._known(name) or self._shown(name)):
            return self.refuse("This name is not one of this server's.", 403)
        own = self.public if self._shown(name) else f"http://{name}"
        if headers.get("origin", own) != own:
            return self.refuse("Another site may not ask here.", 403)
        if self.token is not None and not (self._kept(headers) or (scope["path"] == "/" and self._asked(scope))):
            return self.refuse("Open the address that the terminal shows, with its token.", 403)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 15 or int(length) > LARGEST:
            return self.refuse(TOO_LARGE, 413)
        return None

    def _shown(self, name: str) -> bool:
        return self.public is not None and f"https://{name.casefold()}" == self.public.casefold()

    def _known(self, host: str) -> bool:
        name = (host.rpartition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]).casefold()
        if name == "localhost":
            return True
        address, own = _address(name.strip("[]")), _address(self.host)
        if own is not None and own.is_loopback or self.host == "localhost":
            return address is not None and address.is_loopback
        return address is not None or name == self.host.casefold()

    def _asked(self, scope) -> bool:
        return self._same(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0])

    def _kept(self, headers: dict[str, str]) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return cookie is not None and self._same(cookie.value)

    def _same(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


class TooLarge(HTTPException):
    """A body without a true length that went on for too long."""

    def __init__(self):
        super().__init__(413, TOO_LARGE)


class _Body:
    """A request's body as it arrives.

    Attributes:
        whole: all of it was read, or nobody sends any more.
    """

    def __init__(self, receive):
        self.receive, self.total, self.whole = receive, 0, False

    async def __call__(self):
        message = await self._next()
        if self.total > LARGEST:
            raise TooLarge
        return message

    async def swallow(self) -> None:
        """Read what is on its way, and throw it away."""
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while not self.whole and self.total <= SWALLOWED:
                    await self._next()

    async def _next(self):
        message = await self.receive()
        self.total += len(message.get("body", b""))
        self.whole = not message.get("more_body")
        return message


def _address(name: str):
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
