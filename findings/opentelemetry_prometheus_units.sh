#!/usr/bin/env bash
# opentelemetry-exporter-prometheus 0.66b2: the unit becomes a part of the exported name, but not as the specification says.
#
# A gauge with unit "1" is exported without _ratio. The specification of OpenTelemetry for Prometheus adds it. "%" becomes
# _percent and "ms" becomes _milliseconds, so a dashboard must ask for names that no line of the program holds.
# Seen: share, load_percent, wait_milliseconds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check opentelemetry-sdk==1.45.2 opentelemetry-exporter-prometheus==0.66b2
"$folder/venv/bin/python" - <<'PYTHON'
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import REGISTRY, generate_latest

meter = MeterProvider(metric_readers=[PrometheusMetricReader()]).get_meter("m")
for name, unit in (("share", "1"), ("load", "%"), ("wait", "ms")):
    meter.create_gauge(name, unit=unit).set(0.5)
text = generate_latest(REGISTRY).decode()
names = sorted({line.split("{")[0].split()[0] for line in text.splitlines() if line.startswith(("share", "load", "wait"))})
print(names)
assert names == ["load_percent", "share", "wait_milliseconds"], names
PYTHON
