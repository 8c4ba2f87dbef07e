"""Pages that a server renders and that work without JavaScript. Every form is answered by a redirect.

A form carries an HMAC of the visitor's cookie: another site may make a browser send the cookie, and not know that.
"""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.datastructures import UploadFile
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, RedirectResponse, Response

from megactx.runtime.text import encodable

from ..guard import LARGEST
from . import billing, package
from .access import ACCESS
from .accounts import SCOPES, SESSION
from .catalogue import PAGE
from .database import Refused
from .store import Store

COOKIE, FORM = "megactx-market", "megactx-form"
HERE = Path(__file__).parent / "templates"
SHOWN = 200  # sources of a version on its page
NUMBER = 10**6

templates = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
templates.filters["day"] = lambda at: time.strftime("%Y-%m-%d", time.gmtime(at))
templates.filters["minute"] = lambda at: time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))
templates.filters["money"] = lambda cents: f"{cents / 100:.2f}"
templates.filters["size"] = lambda count: f"{count / 1e6:,.2f} MB"


def add(app: FastAPI, store: Store, sender, buckets, address: Callable[[Request], str], secure: bool) -> Callable:
    """Put the pages into the application.

    Args:
        sender: of hooks, or ``None``.
        buckets: the limits.
        address: whom a request is from.
        secure: cookies go over https only.

    Returns:
        (request, Refused, headers) -> the page that says so.
    """

    def mark(visitor: str) -> str:
        return hmac.new(store.secret, visitor.encode("utf-8", "replace"), hashlib.sha256).hexdigest()

    def cookie(response: Response, name: str, value: str, age: int) -> None:
        response.set_cookie(name, value, max_age=age, httponly=True, samesite="strict", secure=secure)

    def page(request: Request, template: str, status: int = 200, headers=None, **values) -> HTMLResponse:
        visitor, fresh = request.cookies.get(COOKIE) or request.cookies.get(FORM), secrets.token_urlsafe(16)
        account = store.accounts.of_session(request.cookies.get(COOKIE, ""))
        known = {
            "account": account,
            "csrf": mark(visitor or fresh),
            "message": "",
            "query": "",
            "sells": sender is not None,
        }
        response = HTMLResponse(templates.get_template(template).render(known | values), status, headers)
        if not visitor:
            cookie(response, FORM, fresh, SESSION)
        return response

    def refused(request: Request, error: Refused, headers) -> Response:
        if error.status == 401:
            return RedirectResponse("/login", 303)
        if error.status == 503:  # a page asks the database who looks at it
            return PlainTextResponse(error.message, 503, headers)
        return page(request, "error.html", error.status, headers, error=error)

    def visitor(request: Request):
        account = store.accounts.of_session(request.cookies.get(COOKIE, ""))
        buckets.take("request", account["name"] if account else address(request))
        return account

    Visitor = Annotated[object, Depends(visitor)]

    def member(account: Visitor):
        if account is None:
            raise Refused(401, "Log in first.")
        return account

    Member = Annotated[object, Depends(member)]

    async def form(request: Request) -> dict:
        """Raises Refused where the form is not one of this visitor's."""
        who = request.cookies.get(COOKIE) or request.cookies.get(FORM)
        found = {}
        async with request.form(max_files=1, max_fields=20, max_part_size=LARGEST) as given:
            for name, value in given.multi_items():
                if isinstance(value, UploadFile):
                    found[name] = await value.read()
                else:
                    try:
                        found.setdefault(name, encodable(value))
                    except ValueError:
                        raise Refused(400, f"{name} is no text.") from None
                    found.setdefault(f"{name} all", []).append(value)
        if not who or not hmac.compare_digest(
            mark(who).encode(), str(found.get("csrf", "")).encode("utf-8", "replace")
        ):
            raise Refused(403, "This form is not yours, or too old. Open it again.")
        return found

    Form = Annotated[dict, Depends(form)]

    def get(path: str):
        return app.get(path, include_in_schema=False, response_class=HTMLResponse)

    def post(path: str):
        return app.post(path, include_in_schema=False, response_class=HTMLResponse)

    @get("/style.css")
    def style() -> Response:
        return Response((HERE / "style.css").read_bytes(), media_type="text/css")

    @get("/")
    def search(request: Request, account: Visitor) -> Response:
        query, number = request.query_params.get("q", "")[:200], _number(request.query_params.get("page", "1"))
        found, count = store.catalogue.search(account, query, page=number)
        last = max(1, -(-count // PAGE))
        return page(request, "search.html", found=found, count=count, query=query, number=number, last=last)

    @get("/signup")
    def sign_up_form(request: Request, _: Visitor) -> Response:
        return page(request, "enter.html", new=True)

    @get("/login")
    def log_in_form(request: Request, _: Visitor) -> Response:
        return page(request, "enter.html", new=False)

    def entered(request: Request, given: dict, new: bool) -> Response:
        name, password = _text(given, "name"), _text(given, "password")
        buckets.take("sign up" if new else "log in", address(request))
        buckets.take("log in", f"account {name}")
        try:
            if new:
                store.accounts.sign_up(name, password)
            session = store.accounts.log_in(name, password)
        except Refused as error:
            return page(request, "enter.html", error.status, new=new, message=error.message)
        response = RedirectResponse("/account" if new else "/", 303)
        cookie(response, COOKIE, session, SESSION)
        return response

    @post("/signup")
    def sign_up(request: Request, given: Form) -> Response:
        return entered(request, given, True)

    @post("/login")
    def log_in(request: Request, given: Form) -> Response:
        return entered(request, given, False)

    @post("/logout")
    def log_out(request: Request, given: Form) -> Response:
        store.accounts.log_out(request.cookies.get(COOKIE, ""))
        response = RedirectResponse("/", 303)
        response.delete_cookie(COOKIE)
        return response

    def shown(request: Request, account, name: str, number: int | None) -> Response:
        _known_name(name)
        told = store.catalogue.package(account, name)
        numbers = [version["number"] for version in told["versions"]]
        number = number or numbers[0]
        version = store.catalogue.version(account, name, number)
        before = max((other for other in numbers if other < number), default=None)
        change = None
        if before is not None:
            old = store.catalogue.version(account, name, before)["card"]["sources"]
            change = package.differences(old, version["card"]["sources"])
        counted = store.catalogue.statistics(account, name) if "own" in told["may"] else []
        values = {"told": told, "version": version, "card": version["card"], "before": before, "change": change}
        return page(request, "package.html", **values, counted=counted, shown=SHOWN, access=ACCESS)

    @get("/packages/{name}")
    def newest(request: Request, account: Visitor, name: str) -> Response:
        return shown(request, account, name, None)

    @get("/packages/{name}/{number}")
    def one_version(request: Request, account: Visitor, name: str, number: str) -> Response:
        return shown(request, account, name, _number(number))

    @app.get("/packages/{name}/{number}/file", include_in_schema=False)
    def file(request: Request, account: Visitor, name: str, number: str) -> FileResponse:
        return sent(store, account, _known_name(name), _number(number), request)

    @post("/packages/{name}/buy")
    def buy(account: Member, name: str, given: Form) -> Response:
        bought(store, sender, account, _known_name(name))
        return RedirectResponse(f"/packages/{name}", 303)

    @post("/packages/{name}/report")
    def report(request: Request, account: Member, name: str, given: Form) -> Response:
        store.moderation.report(account, _known_name(name), _text(given, "reason"))
        return page(request, "done.html", message="Thank you. A moderator will look at it.", back=f"/packages/{name}")

    @post("/packages/{name}/access")
    def access(account: Member, name: str, given: Form) -> Response:
        store.catalogue.change(account, _known_name(name), _text(given, "access"), _cents(given))
        return RedirectResponse(f"/packages/{name}", 303)

    @post("/packages/{name}/readers")
    def readers(account: Member, name: str, given: Form) -> Response:
        store.catalogue.read_by(account, _known_name(name), _text(given, "reader"), "remove" not in given)
        return RedirectResponse(f"/packages/{name}", 303)

    @get("/publish")
    def publish_form(request: Request, _: Member) -> Response:
        return page(request, "publish.html", access=ACCESS, most=LARGEST - 4096)

    @post("/publish")
    def publish(account: Member, given: Form) -> Response:
        content = given.get("package")
        if not isinstance(content, bytes) or not content:
            raise Refused(400, "Choose the file of a package.")
        upload = store.uploads.begin(account, len(content), hashlib.sha256(content).hexdigest())
        try:
            store.uploads.add(account, upload, 0, content)
            name, _ = store.uploads.publish(account, upload, _text(given, "access"), _cents(given))
        except Refused:
            store.uploads.forget(account, upload)
            raise
        return RedirectResponse(f"/packages/{name}", 303)

    def account_page(request: Request, account, token: str = "") -> Response:
        return page(request, "account.html", token=token, scopes=SCOPES, **store.accounts.about(account))

    @get("/account")
    def of_account(request: Request, account: Member) -> Response:
        return account_page(request, account)

    @post("/account/tokens")
    def new_token(request: Request, account: Member, given: Form) -> Response:
        return account_page(
            request, account, store.accounts.new_token(account, _text(given, "label"), given.get("scope all", []))
        )

    @post("/account/revoke")
    def revoke(account: Member, given: Form) -> Response:
        store.accounts.revoke(account, _number(_text(given, "token"), 2**62))
        return RedirectResponse("/account", 303)

    @post("/account/share")
    def share(account: Member, given: Form) -> Response:
        store.accounts.share(account, "share" in given)
        return RedirectResponse("/account", 303)

    @post("/account/keys")
    def keys(account: Member, given: Form) -> Response:
        store.accounts.signer(account, _text(given, "key").strip(), "remove" not in given)
        return RedirectResponse("/account", 303)

    @get("/moderation")
    def moderation(request: Request, account: Member) -> Response:
        return page(request, "moderation.html", **store.moderation.overview(account))

    @post("/moderation")
    def moderate(account: Member, given: Form) -> Response:
        store.moderation.decide(account, _text(given, "name"), _text(given, "action"), _text(given, "reason"))
        return RedirectResponse("/moderation", 303)

    return refused


def sent(store: Store, account, name: str, number: int, request: Request) -> FileResponse:
    """The file of a version, or the range of it that is asked for; counted when it is begun."""
    path, sha256 = store.catalogue.file(account, name, number)
    if request.headers.get("range", "bytes=0-").replace(" ", "").startswith("bytes=0-"):
        request.app.state.metrics.downloads.inc()
        store.catalogue.use(account, name, number, "download")
    headers = {"etag": f'"{sha256}"'}
    return FileResponse(path, 200, headers, "application/x-tar", filename=f"{name}-{number}.tar")


def bought(store: Store, sender: billing.Sender | None, account, name: str) -> str:
    """The state of a purchase that is asked for."""
    if sender is None:
        raise Refused(409, "Nothing is sold here: the market was started without a billing service.")
    state = store.purchases.buy(account, name)
    sender.wake.set()
    return state


def _text(given: dict, name: str) -> str:
    found = given.get(name, "")
    return found if isinstance(found, str) else ""


def _number(text: str, most: int = NUMBER) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19 or not 1 <= int(text) <= most:
        raise Refused(404, "There is no such number.")
    return int(text)


def _cents(given: dict) -> int:
    text = _text(given, "price").strip() or "0"
    whole, _, rest = text.partition(".")
    if not (text.isascii() and whole.isdigit() and len(whole) < 9 and (not rest or rest.isdigit() and len(rest) <= 2)):
        raise Refused(400, "A price is a number such as 4.50.")
    return int(whole) * 100 + int(rest.ljust(2, "0") or 0)


def _known_name(name: str) -> str:
    if len(name) > 63:
        raise Refused(404, "There is no such package.")
    return name
