"""What is asked and answered over HTTP, in OpenAI's forms."""

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from starlette.exceptions import HTTPException

from megactx.runtime import Sampling
from megactx.runtime.text import encodable

from ..guard import Guard
from .engine import Closing, Engine, Full, Turn
from .keys import Holder, Keys
from .memory import Answered, Asked, Message

MOST = 4096  # tokens of an answer
LISTENING = 1.0  # seconds between two looks at whether the client is still there
ROLES = {"developer": "system", "system": "system", "assistant": "assistant"}  # all others are the user's
KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
SAYS = "chat.completion"


class Refused(Exception):
    """An answer that is an error.

    Args:
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers


class Gone(Exception):
    """The client has hung up."""


class _Form(BaseModel):
    model_config = ConfigDict(extra="ignore")


Words = Annotated[str, AfterValidator(encodable)]  # JSON may hold half characters
Stop = Annotated[Words, StringConstraints(min_length=1, max_length=200)]


class Text(_Form):
    """A part of a message."""

    type: Literal["text"]
    text: Words


class Said(_Form):
    """A message. ``tool_calls`` of an answer are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Words | list[Text] | None = None


class StreamOptions(_Form):
    """Whether the last piece counts tokens."""

    include_usage: bool = False


class Completion(_Form):
    """A request. What is not named here is ignored, ``tools`` among it: no answer calls one."""

    model: Words
    messages: list[Said] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=MOST)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    tools: Any = None


def build(engine: Engine, keys: Keys, name: str, tokens: int, sampling: Sampling, host: str) -> Guard:
    """The application, behind its guard.

    Args:
        engine: started.
        name: of the model.
        tokens: of an answer, where a request does not say.
        sampling: where a request does not say.
        host: that the server is bound to.
    """
    app, created = FastAPI(title="megactx", docs_url=None, redoc_url=None), int(time.time())
    model = {"id": name, "object": "model", "created": created, "owned_by": "megactx"}
    bearer = HTTPBearer(auto_error=False)

    def holder(found: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> Holder:
        known = keys.holder(found.credentials) if found else None
        if known is None:
            raise Refused(401, "This key is not known.", "invalid_api_key")
        return known

    Known = Annotated[Holder, Depends(holder)]

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"} | engine.state()

    @app.get("/v1/models")
    async def models(_: Known) -> dict:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str, _: Known) -> dict:
        _check_model(wanted, name)
        return model

    @app.post("/v1/chat/completions")
    async def completions(asked: Completion, known: Known, request: Request) -> Response:
        _check_model(asked.model, name)
        for what, bucket in (("requests", known.requests), ("tokens", known.tokens)):
            if wait := bucket.wait():
                raise Refused(
                    429, f"{bucket.rate:,} {what} a minute are allowed.", "rate_limit_exceeded", headers=_after(wait)
                )
        known.requests.take(1)
        events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: object) -> None:
            with suppress(RuntimeError):  # the loop has just been closed
                if isinstance(event, Answered):
                    loop.call_soon_threadsafe(known.tokens.take, event.read + event.written)
                loop.call_soon_threadsafe(events.put_nowait, event)

        turn = Turn(known.name, _asked(asked, tokens, sampling), tell)
        try:
            engine.submit(turn)
        except Full:
            after = _after(engine.state()["wait_p50"])
            raise Refused(429, "Too many requests wait.", "rate_limit_exceeded", headers=after) from None
        except Closing:
            raise _closing() from None
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        try:
            first = await _next(events, request)
            if asked.stream:
                pieces = _pieces(
                    first, events, turn, head, bool(asked.stream_options and asked.stream_options.include_usage)
                )
                return StreamingResponse(pieces, media_type="text/event-stream")
            said = []
            while isinstance(first, str):
                said.append(first)
                first = await _next(events, request)
        except Gone:
            turn.cancelled = True
            return Response(status_code=499)  # to nobody
        message = {"role": "assistant", "content": "".join(said), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(first)}
        return _Json(head | {"object": SAYS, "choices": [choice], "usage": _usage(first)})

    app.add_exception_handler(Refused, lambda _, error: error_response(error))
    app.add_exception_handler(RequestValidationError, lambda _, error: error_response(_invalid(error)))
    app.add_exception_handler(
        HTTPException,
        lambda _, error: error_response(Refused(error.status_code, str(error.detail), headers=error.headers)),
    )
    return Guard(app, host, refuse=lambda message, status: error_response(Refused(status, message)))


class _Json(Response):
    """Only ASCII: what a client sent may hold half characters."""

    media_type = "application/json"

    def render(self, content) -> bytes:
        return json.dumps(content).encode()


def error_response(error: Refused) -> Response:
    """An error in OpenAI's form."""
    kind = KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    body = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return _Json({"error": body}, error.status, error.headers)


def _check_model(wanted: str, name: str) -> None:
    if wanted != name:
        raise Refused(404, f"There is one model here, {name}.", "model_not_found", "model")


def _after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}


def _closing() -> Refused:
    return Refused(503, "The server is about to stop.", "unavailable", headers=_after(5))


def _invalid(error: RequestValidationError) -> Refused:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    return Refused(400, f"{where or 'body'}: {first['msg']}", param=where or None)


def _asked(asked: Completion, tokens: int, sampling: Sampling) -> Asked:
    """Raises Refused where nothing is asked."""
    messages = []
    for said in asked.messages:
        content = said.content if isinstance(said.content, str) else "\n".join(p.text for p in said.content or [])
        if content.strip():
            messages.append(Message(ROLES.get(said.role, "user"), content))
    if not messages or messages[-1].role != "user":
        raise Refused(400, "The last message is the one to be answered: a user's, with a text.", param="messages")
    own = {name: value for name in ("temperature", "top_p", "seed") if (value := getattr(asked, name)) is not None}
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    return Asked(
        messages,
        asked.max_completion_tokens or asked.max_tokens or tokens,
        Sampling(**{name: getattr(sampling, name) for name in sampling.__dataclass_fields__} | own),
        stop,
    )


async def _next(events: asyncio.Queue, request: Request) -> str | Answered:
    """The next of a turn.

    Raises:
        Refused: it has failed.
        Gone: nobody listens.
    """
    while True:
        try:
            event = await asyncio.wait_for(events.get(), LISTENING)
            break
        except TimeoutError:
            if await request.is_disconnected():
                raise Gone from None
    if isinstance(event, Exception):
        raise _closing() if isinstance(event, Closing) else Refused(500, str(event))
    return event


async def _pieces(event, events: asyncio.Queue, turn: Turn, head: dict, usage: bool) -> AsyncIterator[str]:
    head = head | {"object": f"{SAYS}.chunk"}

    def chunk(delta: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _sent(head | {"choices": [choice]} | ({"usage": None} if usage else {}))

    try:
        yield chunk({"role": "assistant", "content": ""})
        while isinstance(event, str):
            yield chunk({"content": event})
            event = await events.get()
        if isinstance(event, Exception):
            yield _sent(json.loads(error_response(Refused(500, str(event) or "The server is about to stop.")).body))
            return
        yield chunk({}, _reason(event))
        if usage:
            yield _sent(head | {"choices": [], "usage": _usage(event)})
        yield "data: [DONE]\n\n"
    finally:
        turn.cancelled = True  # a turn that is over takes no harm


def _sent(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _reason(done: Answered) -> str:
    return "length" if done.stopped in (None, "length") else "stop"


def _usage(done: Answered) -> dict:
    counts = {"prompt_tokens": done.read, "completion_tokens": done.written}
    return counts | {"total_tokens": done.read + done.written}
