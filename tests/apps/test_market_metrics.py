"""The market's numbers: exact, for this machine alone, and all of them drawn and watched by their names."""

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from markets import asked

from megactx.apps.market import metrics as module
from megactx.apps.market.database import Refused

pytest_plugins = ["markets"]

TELEMETRY = Path(__file__).parents[2] / "docs" / "telemetry"
NAME = re.compile(r"megactx_market_[a-z_]+")


def scrape(server) -> dict[str, float]:
    """name with labels -> value, as Prometheus gets it."""
    with urllib.request.urlopen(f"{server.address}/metrics", timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    rows = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


@pytest.fixture
def watched(market):
    with market.metrics.serve(0) as server:
        yield server


def test_what_is_asked_published_downloaded_bought_and_reported_is_counted(market, packed, watched, tmp_path):
    before = scrape(watched)
    assert before["megactx_market_database"] == 1 and before["megactx_market_packages"] == 0
    assert before['megactx_market_requests_total{status="5xx"}'] == 0
    anna, ben = market.client("anna"), market.client("ben")
    anna.publish(packed(), "free", 0)
    anna.publish(packed(version=2), "free", 0)
    anna.publish(packed(name="birds"), "paid", 450)
    ben.get("boats", tmp_path / "here", 1)
    ben.ask("POST", "/api/packages/boats/reports", {"reason": "It is mine."})
    account = market.member("ben")
    market.store.purchases.buy(account, "birds")
    (hook,) = market.store.purchases.hooks_due()
    market.store.purchases.hook_tried(hook["id"], "waits", 0)
    assert asked(market, "GET", "/api/packages/boats/versions/1/file", headers={"Range": "bytes=9-"}).status == 206
    missing = asked(market, "GET", "/api/packages/nothing").status
    found = scrape(watched)
    counted = {name.removeprefix("megactx_market_"): value for name, value in found.items()}
    assert missing == 404 and counted['requests_total{status="4xx"}'] == 1
    assert (counted["accounts"], counted["packages"], counted["published_total"], counted["reports"]) == (2, 2, 3, 1)
    assert counted["downloads_total"] == 1  # the rest of a file is no download of its own
    assert counted["package_bytes"] == sum(p.stat().st_size for p in (market.store.folder / "packages").iterdir())
    assert counted['hooks{state="waits"}'] == 1 and counted["hook_tries_total"] == 1
    market.store.purchases.hook_tried(hook["id"], "given up", 0)
    found = scrape(watched)
    assert found['megactx_market_hooks{state="given_up"}'] == 1 and found['megactx_market_hooks{state="waits"}'] == 0
    answers = sum(value for name, value in found.items() if name.startswith("megactx_market_requests_total"))
    assert answers == found["megactx_market_request_seconds_count"] > 10


def test_a_failure_and_a_database_that_is_gone_are_counted_and_seen(market, watched, monkeypatch):
    def gone():
        raise Refused(503, "The database does not answer.")

    monkeypatch.setattr(market.store.database, "look", gone)
    assert asked(market, "GET", "/api/packages").status == 503
    found = scrape(watched)
    assert found["megactx_market_database"] == 0 and "megactx_market_packages" not in found
    assert found['megactx_market_requests_total{status="5xx"}'] == 1


def test_numbers_are_for_this_machine_and_not_on_the_pages(market, watched):
    assert asked(market, "GET", "/metrics").status == 404
    with pytest.raises(urllib.error.HTTPError, match="403"):
        request = urllib.request.Request(f"{watched.address}/metrics", headers={"Host": "evil.example"})
        urllib.request.urlopen(request, timeout=20)


def test_every_number_is_drawn_and_every_name_in_dashboard_and_rules_is_measured(market, watched):
    series = {name.partition("{")[0] for name in scrape(watched)}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in series if not name.endswith("_created")}
    dashboard = json.loads((TELEMETRY / "grafana-market.json").read_text())
    drawn = {n for panel in dashboard["panels"] for t in panel["targets"] for n in NAME.findall(t["expr"])}
    assert drawn <= series and {re.sub("_(bucket|sum|count)$", "", name) for name in drawn} == families
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    groups = yaml.safe_load((TELEMETRY / "alerts-services.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    watches = {name for rule in rules for name in NAME.findall(rule["expr"])}
    assert watches and watches <= series
    states = {state for rule in rules for state in re.findall(r'state="(\w+)"', rule["expr"])}
    assert states <= {state.replace(" ", "_") for state in module.HOOKS}
    for rule in rules:
        assert {"alert", "expr", "for", "labels", "annotations"} <= {*rule} and rule["annotations"]["summary"]


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool is installed (Debian: apt-get install prometheus)"
)
def test_promtool_takes_the_rules():
    files = [TELEMETRY / name for name in ("alerts.yml", "alerts-services.yml")]
    done = subprocess.run(["promtool", "check", "rules", *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
