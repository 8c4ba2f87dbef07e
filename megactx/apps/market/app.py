"""What is asked and answered over HTTP: JSON under /api, with tokens; pages for browsers beside it, see ``pages``."""

import math
import threading
from collections import OrderedDict
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Query, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from megactx.runtime.text import encodable

from .. import guard
from ..serve.keys import Bucket
from . import billing, package, pages
from .access import DEAREST
from .database import Refused
from .metrics import Metrics
from .store import Store
from .uploads import LARGEST

LIMITS = {"request": 600, "log in": 10, "sign up": 10}  # a minute, of an account or address
KNOWN = 10_000  # accounts and addresses whose limits are remembered
CSP = guard.HEADERS["content-security-policy"].replace("form-action 'none'", "form-action 'self'")
# A browser tells no Origin of a form where no referrer is allowed.
HEADERS = guard.HEADERS | {"content-security-policy": CSP, "referrer-policy": "same-origin"}

Name = Annotated[str, InPath(pattern=f"^{package.NAME}$")]
Number = Annotated[int, InPath(ge=1, le=10**6)]
Words = Annotated[str, AfterValidator(encodable)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Upload(_Form):
    """What will come."""

    bytes: int = Field(ge=1, le=LARGEST)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Publish(_Form):
    """Of a package that was uploaded: who may get it, and the price in cents."""

    access: Literal["private", "free", "paid"] = "private"
    price: int = Field(0, ge=0, le=DEAREST)


class Use(_Form):
    """An installed version was opened."""

    version: int = Field(ge=1, le=10**6)


class Report(_Form):
    """What is wrong with a package."""

    reason: Words = Field(min_length=1, max_length=2000)


class Settlement(_Form):
    """What the billing service says of a purchase."""

    event: str = Field(max_length=64)
    purchase: str = Field(pattern="^[0-9a-f]{32}$")
    state: Literal["paid", "refused"]


class Limits:
    """Buckets by (what, who).

    Args:
        rates: a minute.
    """

    def __init__(self, rates: dict[str, int]):
        self.rates, self.buckets, self.lock = rates, OrderedDict(), threading.Lock()

    def take(self, what: str, who: str) -> None:
        """One of them.

        Raises:
            Refused: 429.
        """
        with self.lock:
            bucket = self.buckets.pop((what, who), None) or Bucket(self.rates[what])
            self.buckets[what, who] = bucket
            if len(self.buckets) > KNOWN:
                self.buckets.popitem(last=False)
            if wait := bucket.wait():
                raise Refused(429, f"{self.rates[what]} a minute are allowed.", wait)
            bucket.take(1)


class Who:
    """Whoever asks.

    Attributes:
        account: ``None``: nobody who is known.
        scopes: of the token.
    """

    def __init__(self, account=None, scopes: frozenset = frozenset()):
        self.account, self.scopes = account, scopes

    def may(self, scope: str) -> "Who":
        """Raises Refused where the token may not."""
        if self.account is None:
            raise Refused(401, "That needs a token.")
        if scope not in self.scopes:
            raise Refused(403, f"The token may not {scope}.")
        return self


def build(
    store: Store,
    host: str,
    sender: billing.Sender | None = None,
    limits: dict[str, int] = LIMITS,
    public: str | None = None,
    metrics: Metrics | None = None,
):
    """The application, behind its guard.

    Args:
        sender: of hooks; ``None``: nothing can be bought.
        limits: see ``LIMITS``.
        public: https://NAME under which a proxy on this machine shows the market.
        metrics: that count what is asked; ``None``: nobody looks at them.
    """
    app = FastAPI(title="megactx market", docs_url=None, redoc_url=None)
    buckets, bearer = Limits(dict(limits)), HTTPBearer(auto_error=False)
    app.state.metrics = metrics = metrics or Metrics(store)

    def address(request: Request) -> str:
        told = request.headers.get("x-forwarded-for", "").rpartition(",")[2].strip() if public else ""
        return told or (request.client.host if request.client else "")

    def known(request: Request, found: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> Who:
        told = store.accounts.of_token(found.credentials) if found else None
        if found and told is None:
            buckets.take("log in", address(request))
            raise Refused(401, "This token is not known.")
        buckets.take("request", told[0]["name"] if told else address(request))
        return Who(told[0], frozenset(told[1])) if told else Who()

    Known = Annotated[Who, Depends(known)]

    def reads(who: Known) -> Who:
        return who if who.account is None else who.may("read")

    Reads = Annotated[Who, Depends(reads)]

    @app.get("/health")
    def health() -> dict:
        with store.database.look() as db:
            waits = db.execute("SELECT COUNT(*) FROM hook WHERE state='waits'").fetchone()[0]
            return {
                "status": "ok",
                "hooks": waits,
                "packages": db.execute("SELECT COUNT(*) FROM package").fetchone()[0],
            }

    @app.get("/api/packages")
    def search(
        who: Reads,
        q: Annotated[str, Query(max_length=200)] = "",
        model: Annotated[str, Query(max_length=64)] = "",
        page: Annotated[int, Query(ge=1, le=10**6)] = 1,
    ) -> dict:
        found, count = store.catalogue.search(who.account, q, model, page)
        return {"count": count, "packages": found}

    @app.get("/api/packages/{name}")
    def one_package(name: Name, who: Reads) -> dict:
        return store.catalogue.package(who.account, name)

    @app.get("/api/packages/{name}/versions/{number}")
    def version(name: Name, number: Number, who: Reads) -> dict:
        return store.catalogue.version(who.account, name, number)

    @app.get("/api/packages/{name}/differences/{old}/{new}")
    def differences(name: Name, old: Number, new: Number, who: Reads) -> dict:
        before, after = (store.catalogue.version(who.account, name, number)["card"]["sources"] for number in (old, new))
        return package.differences(before, after)

    @app.get("/api/packages/{name}/versions/{number}/file", response_class=FileResponse)
    def file(name: Name, number: Number, who: Reads, request: Request) -> FileResponse:
        return pages.sent(store, who.account, name, number, request)

    @app.post("/api/uploads", status_code=201)
    def begin(asked: Upload, who: Known) -> dict:
        return {"id": store.uploads.begin(who.may("publish").account, asked.bytes, asked.sha256), "received": 0}

    @app.get("/api/uploads/{upload}")
    def received(upload: str, who: Known) -> dict:
        row, _, there = store.uploads.find(who.may("publish").account, upload)
        return {"id": upload, "bytes": row["bytes"], "received": there}

    @app.patch(
        "/api/uploads/{upload}",
        openapi_extra=_takes("application/octet-stream", {"type": "string", "format": "binary"}),
    )
    def more(
        upload: str, offset: Annotated[int, Query(ge=0, le=LARGEST)], who: Known, body: Annotated[bytes, Depends(_body)]
    ) -> dict:
        return {"received": store.uploads.add(who.may("publish").account, upload, offset, body)}

    @app.delete("/api/uploads/{upload}")
    def drop(upload: str, who: Known) -> dict:
        store.uploads.drop(who.may("publish").account, upload)
        return {"status": "gone"}

    @app.post("/api/uploads/{upload}/publish", status_code=201)
    def publish(upload: str, asked: Publish, who: Known) -> dict:
        name, number = store.uploads.publish(who.may("publish").account, upload, asked.access, asked.price)
        return {"name": name, "version": number}

    @app.post("/api/packages/{name}/buy")
    def buy(name: Name, who: Known) -> dict:
        return {"state": pages.bought(store, sender, who.may("buy").account, name)}

    @app.post("/api/packages/{name}/opened")
    def opened(name: Name, asked: Use, who: Known) -> dict:
        return {"counted": store.catalogue.use(who.may("read").account, name, asked.version, "opened")}

    @app.get("/api/packages/{name}/statistics")
    def counted(name: Name, who: Known) -> list[dict]:
        return store.catalogue.statistics(who.may("publish").account, name)

    @app.post("/api/packages/{name}/reports", status_code=201)
    def report(name: Name, asked: Report, who: Known) -> dict:
        store.moderation.report(who.may("read").account, name, asked.reason)
        return {"status": "reported"}

    @app.post("/api/billing", openapi_extra=_takes("application/json", Settlement.model_json_schema()))
    def settled(request: Request, body: Annotated[bytes, Depends(_body)]) -> dict:
        if sender is None:
            raise Refused(404, "Nothing is sold here.")
        if wrong := billing.refusal(
            sender.secret, "billing", request.headers.get(billing.HEADER, ""), body, store.purchases.fresh
        ):
            raise Refused(403, wrong)
        try:
            told = Settlement.model_validate_json(body)
        except ValueError as error:
            raise Refused(400, "That is no settlement.") from error
        store.purchases.settle(told.purchase, told.state)
        return {"status": told.state}

    shown = pages.add(app, store, sender, buckets, address, secure=public is not None)

    def refuse(request: Request, error: Refused):
        headers = {"retry-after": str(max(1, math.ceil(error.after)))} if error.status in (429, 503) else {}
        if request.url.path.startswith("/api/") or request.url.path == "/health":
            return JSONResponse({"error": error.message}, error.status, headers)
        return shown(request, error, headers)

    app.add_exception_handler(Refused, refuse)
    app.add_exception_handler(
        RequestValidationError, lambda request, error: refuse(request, Refused(400, _first(error)))
    )
    app.add_exception_handler(
        HTTPException, lambda request, error: refuse(request, Refused(error.status_code, str(error.detail)))
    )
    return metrics.watching(guard.Guard(app, host, refuse=_refuse, headers=HEADERS, public=public))


def _takes(kind: str, schema: dict) -> dict:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


async def _body(request: Request) -> bytes:
    return await request.body()


def _refuse(message: str, status: int) -> JSONResponse:
    return JSONResponse({"error": message}, status)


def _first(error: RequestValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'][1:]) or 'body'}: {first['msg']}"
