"""``--metrics PORT``: what the market does, for a Prometheus on this machine: numbers only, never a name.

What is counted by the process begins at 0 with each start. What the database knows is asked at each scrape.
"""

import sqlite3
import time
from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from ..guard import Guard
from ..serving import Server
from .database import Refused
from .store import Store

NAME = "megactx_market"
HOOKS = ("waits", "delivered", "given up")
COUNTS = {  # name -> what, and how the database is asked
    "accounts": ("Accounts", "SELECT COUNT(*) FROM account"),
    "packages": ("Packages", "SELECT COUNT(*) FROM package"),
    "package_bytes": ("Bytes of all versions", "SELECT COALESCE(SUM(bytes), 0) FROM version"),
    "reports": ("Reports that wait for a moderator", "SELECT COUNT(*) FROM report WHERE state='open'"),
}
PUBLISHED = "SELECT COUNT(*) FROM version"  # none is ever removed
TRIED = "SELECT COALESCE(SUM(tries), 0) FROM hook"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """Counters of a market, and what its database knows.

    Attributes:
        downloads: files of versions that were begun, by anybody.
    """

    def __init__(self, store: Store):
        self.store, self.registry = store, CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter(f"{NAME}_requests", "Requests by the first digit of the answer", ["status"], **own)
        self.seconds = Histogram(f"{NAME}_request_seconds", "Until an answer began", buckets=SECONDS, **own)
        self.downloads = Counter(f"{NAME}_downloads", "Files of versions that were begun", **own)
        for digit in "2345":
            self.requests.labels(f"{digit}xx")  # a rate needs a zero to begin with
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """What the database knows; where it does not answer, that alone."""
        families = []
        try:
            with self.store.database.look() as db:
                for name, (what, query) in COUNTS.items():
                    families.append(GaugeMetricFamily(f"{NAME}_{name}", what, db.execute(query).fetchone()[0]))
                for name, what, query in (
                    ("published", "Versions that were published", PUBLISHED),
                    ("hook_tries", "Times that a hook was sent", TRIED),
                ):
                    families.append(CounterMetricFamily(f"{NAME}_{name}", what, db.execute(query).fetchone()[0]))
                states = dict([*row] for row in db.execute("SELECT state, COUNT(*) FROM hook GROUP BY state"))
            hooks = GaugeMetricFamily(f"{NAME}_hooks", "Hooks to the billing service", labels=["state"])
            for state in HOOKS:
                hooks.add_metric([state.replace(" ", "_")], states.get(state, 0))
            families.append(hooks)
        except (Refused, sqlite3.Error):
            families = []
        yield GaugeMetricFamily(f"{NAME}_database", "Whether the database answers", bool(families))
        yield from families

    def watching(self, app):
        """ASGI middleware that counts."""

        async def watched(scope, receive, send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            began, counted = time.perf_counter(), []

            def count(status: int) -> None:
                counted.append(status)
                self.requests.labels(f"{status // 100}xx").inc()

            async def told(message) -> None:
                if message["type"] == "http.response.start":  # before it is sent: who has the answer is counted
                    count(message["status"])
                    self.seconds.observe(time.perf_counter() - began)
                await send(message)

            try:
                await app(scope, receive, told)
            finally:
                if not counted:
                    count(500)

        return watched

    def serve(self, port: int) -> Server:
        """Answer in a thread, at 127.0.0.1.

        Raises:
            ValueError: the port is taken.
        """

        def numbers(_) -> Response:
            return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

        server = Server(port, option="--metrics")
        return server.start(Guard(Starlette(routes=[Route("/metrics", numbers)]), server.host))
