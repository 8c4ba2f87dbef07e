"""A small web server of our own: a port that is taken is told at once, and it can run beside the model.

with Server(app, port=8765) as server:      # in a thread; ``server.run()`` instead stays until Ctrl-C
    print(server.address)
"""

import errno
import socket
import threading
from collections.abc import Callable

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from megactx.framework.command_line import Ended
from megactx.framework.errors import DONE

from .command_line import HOST

PORTS = range(0, 2**16)
STARTS = 10.0  # seconds that a server may need to start
CONNECTIONS = 64  # at a time, where nothing else is said; more are told to come back
RECEIVES = 10.0  # seconds that a request may take to arrive, headers and body


class Server:
    """Bound when it is made, so that a mistake shows before models are loaded.

    Args:
        port: 0 takes any free one.
        host: an address of this machine.
        option: how a person has set the port, for messages.

    Raises:
        ValueError: the port is no port, or taken, or not ours to take; there is no such address.
    """

    def __init__(self, port: int, host: str = HOST, option: str = "--port"):
        if port not in PORTS:
            raise ValueError(f"{option}={port} is not allowed: 0 (any free one) to {PORTS[-1]}")
        self.socket = _bound(host, port, option)
        self.host, self.port = host, self.socket.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """For a browser on this machine."""
        name = HOST if self.host in ("0.0.0.0", "::", "") else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}"

    def run(self, app, ending: Callable[[], None] = lambda: None, connections: int = CONNECTIONS) -> None:
        """Answer until Ctrl-C or SIGTERM, raised as KeyboardInterrupt or ``Ended`` behind the last answer.

        Args:
            ending: called when the end begins, to end answers that would go on for ever.
            connections: at a time, at most.
        """
        self._server = _Ending(
            ending,
            uvicorn.Config(
                app,
                http=_InTime,
                ws="none",
                lifespan="off",
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=connections,
                h11_max_incomplete_event_size=16 * 2**10,  # bytes of a request's line and headers
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
            ),
        )
        self._server.run(sockets=[self.socket])

    def start(self, app, ending: Callable[[], None] = lambda: None) -> "Server":
        """The same in a thread, which ends with the process."""
        self._thread = threading.Thread(target=self.run, args=(app, ending), name="server", daemon=True)
        self._thread.start()
        began = threading.Event()
        for _ in range(int(STARTS / 0.01)):
            if self._server is not None and self._server.started:
                return self
            began.wait(0.01)
        raise RuntimeError("the server did not start")

    def close(self) -> None:
        """Stop answering, and give the port free."""
        if self._server is not None:
            self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(5)
        self.socket.close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()
        if isinstance(error, Ended):  # a server that was told to end has done all that it is there for
            raise SystemExit(DONE)


class _InTime(H11Protocol):
    """A connection whose request does not arrive in time is closed: it would hold its place for ever."""

    _late = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._late = self.loop.call_later(RECEIVES, transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._late is None:
            self._late = self.loop.call_later(RECEIVES, self.transport.abort)
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._in_time()

    def connection_lost(self, exc) -> None:
        self._in_time()
        super().connection_lost(exc)

    def _in_time(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class _Ending(uvicorn.Server):
    def __init__(self, ending: Callable[[], None], config: uvicorn.Config):
        super().__init__(config)
        self.ending = ending

    async def shutdown(self, sockets=None) -> None:
        self.ending()
        await super().shutdown(sockets)


def _bound(host: str, port: int, option: str) -> socket.socket:
    try:
        kind, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"--host={host}: there is no such address") from error
    found = socket.socket(kind, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of a server that has just ended
        found.bind(where)
        found.listen(128)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"{option}={port} is in use by another program; {option} 0 takes any free one") from error
        if error.errno == errno.EACCES:
            raise ValueError(f"{option}={port} may not be used by this user; take one from 1024 on") from error
        raise ValueError(f"--host={host} is no address of this machine ({error.strerror})") from error
    return found
