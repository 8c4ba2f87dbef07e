"""/health for a person or a watchdog, /metrics for a Prometheus on this machine: numbers only, and names of sources."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..guard import Guard
from ..serving import Server
from .follower import Follower

GAUGES = {
    "documents": "Documents in the part",
    "tokens": "Tokens of the part",
    "waiting": "Documents that are tried again",
    "dead": "Documents that are left out",
    "changed": "When the part last changed, seconds since 1970",
}
COUNTERS = ("added", "replaced", "removed", "failed")


def serve(follower: Follower, port: int) -> Server:
    """Answer in a thread.

    Raises:
        ValueError: the port is taken.
    """
    registry = CollectorRegistry()
    registry.register(_Collector(follower))

    def health(_) -> Response:
        state = follower.state()
        well = not any(told["error"] for told in state.values())
        return JSONResponse({"status": "ok" if well else "failing", "sources": state}, 200 if well else 503)

    def metrics(_) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    server = Server(port, option="port")
    return server.start(Guard(Starlette(routes=[Route("/health", health), Route("/metrics", metrics)]), server.host))


class _Collector:
    def __init__(self, follower: Follower):
        self.follower = follower

    def collect(self):
        state = self.follower.state()
        for name, what in GAUGES.items():
            family = GaugeMetricFamily(f"megactx_follow_{name}", what, labels=["source"])
            for source, told in state.items():
                family.add_metric([source], told[name])
            yield family
        failing = GaugeMetricFamily("megactx_follow_failing", "Whether the source cannot be read", labels=["source"])
        for source, told in state.items():
            failing.add_metric([source], told["error"] is not None)
        yield failing
        done = CounterMetricFamily("megactx_follow_changes", "Documents by what was done", labels=["source", "kind"])
        for source, told in state.items():
            for name in COUNTERS:
                done.add_metric([source, name], told[name])
        yield done
