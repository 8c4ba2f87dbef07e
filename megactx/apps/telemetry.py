"""What a session says of itself while it runs, in OpenTelemetry's terms; names and units are in docs/telemetry.md.

    session = Session(controller, observers=[Telemetry(controller.models)])

OpenTelemetry is imported when a ``Telemetry`` is made and not before. Without a meter provider that the program has set
its own no-op meter takes it all and keeps nothing. The commands set one up with ``--metrics PORT``, see ``prometheus``.
"""

from typing import TYPE_CHECKING

from megactx.framework.extra import extra
from megactx.runtime import Models, Refocused
from megactx.runtime.metrics import COUNTER, GAUGE, METRICS, Measured, Metric, measured, rope_scales

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # upper ends of the histograms


class Telemetry:
    """An observer that hands what is measured to OpenTelemetry.

    Args:
        models: of the session, for what does not change; ``None``: it is left out.
        meter: ``None``: that of the provider which the program has set, and nothing at all where it has set none.

    Raises:
        ValueError: there is no meter, and the extra ``apps`` is not installed.
    """

    def __init__(self, models: Models | None = None, meter: "Meter | None" = None):
        if meter is None:
            with extra("telemetry"):
                from opentelemetry.metrics import get_meter
            meter = get_meter("megactx")
        self._instruments = {name: _instrument(meter, name, metric) for name, metric in METRICS.items()}
        for value in rope_scales(models) if models is not None else ():
            self._keep(value)

    def __call__(self, event: Refocused) -> None:
        for value in measured(event):
            self._keep(value)

    def _keep(self, measured: Measured) -> None:
        name, value, attribute = measured
        metric = METRICS[name]
        attributes = {} if metric.attribute is None else {metric.attribute: attribute}
        getattr(self._instruments[name], {COUNTER: "add", GAUGE: "set"}.get(metric.kind, "record"))(value, attributes)


def _instrument(meter: "Meter", name: str, metric: Metric):
    if metric.kind == COUNTER:
        return meter.create_counter(name, metric.unit, metric.meaning)
    if metric.kind == GAUGE:
        return meter.create_gauge(name, metric.unit, metric.meaning)
    return meter.create_histogram(name, metric.unit, metric.meaning, explicit_bucket_boundaries_advisory=SECONDS)
