"""The page's server: the page itself, what happens as server-sent events, texts on demand, and two buttons."""

import asyncio
import json
import re
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ..guard import Guard
from . import frames
from .export import page
from .player import MOST, Busy, Player

PAGE = Path(__file__).parent / "page"
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = {path.name: path for path in sorted(PAGE.iterdir()) if path.suffix in KINDS}
PATIENCE = 20.0  # seconds that a question may wait: one piece of a text is read meanwhile


def build(player: Player, host: str, token: str | None, cookie: str = "megactx") -> Guard:
    """The application, behind its guard.

    Args:
        player: started.
        host, token, cookie: see ``Guard``.
    """

    async def index(_: Request) -> Response:
        return HTMLResponse((PAGE / "index.html").read_text(encoding="utf-8"))

    async def file(request: Request) -> Response:
        path = FILES.get(request.path_params["name"])
        if path is None:
            raise HTTPException(404)
        return Response(path.read_bytes(), media_type=KINDS[path.suffix])

    async def about(_: Request) -> Response:
        return JSONResponse(frames.about(player.session) | {"live": True, "most": MOST})

    async def events(request: Request) -> Response:
        seen = request.headers.get("last-event-id", "")
        after = int(seen) if re.fullmatch(r"\d{1,15}", seen) else 0
        return StreamingResponse(player.feed.follow(after), media_type="text/event-stream")

    async def text(request: Request) -> Response:
        lod, index = (_whole(request.query_params.get(name, ""), name) for name in ("lod", "index"))
        return JSONResponse(await _answer(player, lambda: frames.text(player.session, lod, index)))

    async def say(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise HTTPException(415, "JSON is expected")
        try:
            asked = json.loads(await request.body())
            content, tokens = asked["text"], asked["tokens"]
            if not isinstance(content, str) or type(tokens) is not int or not 0 <= tokens <= MOST:
                raise ValueError(f"tokens={tokens!r} is not allowed: a text and 0 to {MOST:,} tokens are expected")
            player.say(content, tokens)
        except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise HTTPException(400, "an object with text and tokens is expected") from error
        return JSONResponse({})

    async def stop(_: Request) -> Response:
        player.stop()
        return JSONResponse({})

    async def replay(_: Request) -> Response:
        content = await _answer(player, lambda: page(player))
        return HTMLResponse(content, headers={"content-disposition": 'attachment; filename="replay.html"'})

    routes = [
        Route("/", index),
        Route("/page/{name}", file),
        Route("/about", about),
        Route("/events", events),
        Route("/text", text),
        Route("/replay.html", replay),
        Route("/say", say, methods=["POST"]),
        Route("/stop", stop, methods=["POST"]),
    ]
    handlers = {
        ValueError: lambda _, error: PlainTextResponse(str(error), 400),
        Busy: lambda *_: PlainTextResponse("The session is at work; stop it first.", 409),
        TimeoutError: lambda *_: PlainTextResponse("The session is at work; try again.", 503),
    }
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host, token, cookie)


async def _answer(player: Player, question):
    return await asyncio.wait_for(asyncio.wrap_future(player.ask(question)), PATIENCE)


def _whole(value: str, name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", value):
        raise ValueError(f"{name}={value[:40]!r} is not allowed: a whole number")
    return int(value)
