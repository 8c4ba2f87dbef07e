"""``--metrics PORT``: what ``telemetry`` measures, for a Prometheus on this machine to fetch.

The server is bound to 127.0.0.1, answers /metrics and nothing else, and says numbers only, never text of a history.
"""

from megactx.framework.extra import extra
from megactx.parts.models import Models

from .telemetry import Telemetry


class Prometheus:
    """A telemetry with a server of its own.

    Args:
        port: 0 takes any free one.
        models: see ``Telemetry``.

    Attributes:
        telemetry: the observer.
        address: where the numbers are.

    Raises:
        ValueError: the port is taken, or the extra ``apps`` is not installed.
    """

    def __init__(self, port: int, models: Models | None = None):
        with extra(f"--metrics={port}"):
            import prometheus_client
            from opentelemetry.exporter.prometheus import PrometheusMetricReader
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.resources import Resource
            from starlette.applications import Starlette
            from starlette.responses import Response
            from starlette.routing import Route

            from .guard import Guard
            from .serving import Server
        self._server = Server(port, option="--metrics")
        registry = prometheus_client.CollectorRegistry()  # its own: nothing of the process, and no second of a name
        reader = PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=registry)
        self._provider = MeterProvider([reader], Resource({"service.name": "megactx"}), shutdown_on_exit=False)
        self.telemetry = Telemetry(models, self._provider.get_meter("megactx"))
        self.address = f"{self._server.address}/metrics"

        def numbers(_) -> Response:
            return Response(
                prometheus_client.generate_latest(registry), media_type=prometheus_client.CONTENT_TYPE_LATEST
            )

        self._server.start(Guard(Starlette(routes=[Route("/metrics", numbers)]), self._server.host))

    def close(self) -> None:
        """Give the port free."""
        self._server.close()
        self._provider.shutdown()
