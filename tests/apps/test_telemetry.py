"""What a session says of itself: off by default, exact, fetched as Prometheus does, drawn and watched by its names."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megactx.apps import generate, serving
from megactx.apps.prometheus import Prometheus
from megactx.apps.telemetry import Telemetry
from megactx.focus.allocator import RESIDENCY, SWAP_RATE, SWAP_RATE_ALARM, UTILISATION
from megactx.memory.prediction import Readout
from megactx.runtime import Models, Session
from megactx.runtime.metrics import METRICS, bins, measured

REPOSITORY = Path(__file__).parents[2]
DASHBOARD, ALERTS = (REPOSITORY / "docs" / "telemetry" / name for name in ("grafana.json", "alerts.yml"))
PAGE = (REPOSITORY / "docs" / "telemetry.md").read_text(encoding="utf-8")
TEXT = "def read(path):\n    return path.read_text()\n" * 10
NAME = re.compile(r"megactx_[a-z_]+")


@pytest.fixture(scope="module")
def learned(make_models):
    """Models that say all there is to say: with a readout, and a GistNet that has learned how wide positions are."""
    models = make_models(gaussian_rope="learned")
    return replace(models, prediction=Readout(models.base.width).requires_grad_(False))


@pytest.fixture
def told(controller):
    """The events of a session that appended, decoded and refocused."""
    events = []
    session = Session(controller(), [events.append])
    session.append(TEXT)
    for _ in session.generate(40):
        pass
    return session, events


@pytest.fixture(scope="module")
def scraped(learned, tmp_path_factory):
    """What Prometheus gets of such a session that was saved and goes on: (events, text)."""
    from megactx.runtime import Controller, Settings

    prometheus, events, folder = Prometheus(0, learned), [], tmp_path_factory.mktemp("saved") / "session"
    mega = dict(attention="mega", segment=16, mid=16, live=16)
    controller = Controller(learned, Settings(budget=96, allocator={"protected": 8}, drafts="lookup", **mega))
    with Session(controller) as session:
        session.append(TEXT)
        session.save(folder)
    session = Session.load(folder, controller, [prometheus.telemetry, events.append])
    session.append(TEXT, score=True)
    for _ in session.generate(12):
        pass
    with urllib.request.urlopen(prometheus.address, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    yield events, text
    session.close()
    prometheus.close()


def values(text):
    """name with labels -> value."""
    rows = [line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in rows}


def families(text):
    return {*re.findall(r"^# TYPE (\S+) ", text, re.MULTILINE)}


def series(text):
    """Names as queries use them: those of histograms have endings."""
    return {name.partition("{")[0] for name in values(text)}


@pytest.mark.slow
def test_a_session_that_nobody_watches_imports_no_opentelemetry():
    program = (
        "import sys, megactx.apps.telemetry, megactx.apps.chat, megactx.apps.view.__main__\n"
        "from megactx.runtime import Controller, Session, Settings, load_models\n"
        "session = Session(Controller(load_models(), Settings(budget=512)))\n"
        "session.append('def read(path): ' * 200, score=True)\n"
        "assert session.stream.refocuses > 3\n"
        "found = [name for name in sys.modules if name.split('.')[0] in ('opentelemetry', 'prometheus_client')]\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)


def test_nothing_is_kept_where_no_provider_was_set(told):
    telemetry = Telemetry()
    for event in told[1]:
        telemetry(event)
    assert {type(instrument).__module__ for instrument in telemetry._instruments.values()} <= {
        "opentelemetry.metrics._internal.instrument"
    }


def test_what_is_measured_is_what_happened(told):
    session, events = told
    found = [list(measured(event)) for event in events]
    everything = [value for row in found for value in row]
    total = {}
    for name, value, attribute in everything:
        total[name, attribute] = total.get((name, attribute), 0) + value
        assert (attribute is None) == (METRICS[name].attribute is None) and value == value
    decoded = total["megactx.tokens", "decoded"]
    assert 37 <= decoded <= 41 and total["megactx.tokens", "appended"] + decoded == int(session.tree.lengths[0])
    assert total["megactx.refocuses", None] == len(events) == session.stream.refocuses
    edits = [event.edits for event in events if event.edits is not None]
    assert total["megactx.edits", "expand"] == sum(int(e.expand.sum()) for e in edits) > 0
    assert total["megactx.edits", "room"] == sum(len(e.room) for e in events if e.room is not None)
    scored = sum(len(event.scored[0].lod) for event in events if event.scores is not None)
    assert sum(total["megactx.lens.scores", name] for name in bins()) == scored
    last, tree = {(name, attribute): value for name, value, attribute in found[-1]}, session.tree
    assert last["megactx.tree.depth", None] == tree.depth
    for lod in range(1, tree.depth + 1):
        assert last["megactx.tree.nodes", str(lod)] == int(tree.counts(lod)[0])
    entries = sum(value for (name, _), value in last.items() if name == "megactx.window.entries")
    assert entries == len(events[-1].after[0].lod) and last["megactx.window.utilisation", None] == entries / 96
    assert last["megactx.compression", None] == int(tree.lengths[0]) / entries
    read = [event for event in events if event.reused is not None]
    assert total["megactx.kv.entries", "kept"] == sum(int(event.reused.sum()) for event in read)


def test_prometheus_fetches_every_metric_with_its_labels(scraped):
    events, text = scraped
    found = values(text)
    assert len(families(text)) == len(METRICS)
    assert found["megactx_refocuses_total"] == len(events)
    assert found['megactx_edits_total{kind="expand"}'] == sum(int(e.edits.expand.sum()) for e in events if e.edits)
    assert found["megactx_window_utilisation"] == pytest.approx(events[-1].utilisation[0])
    assert found["megactx_swap_rate"] == pytest.approx(float(events[-1].telemetry.swap_rate[0]))
    assert found['megactx_rope_scale{lod="1"}'] == 1
    ranks = [event.foretold.rank[0] for event in events if event.foretold.rank.isfinite().all()]
    for place, by in enumerate(("readout", "map")):
        assert found[f'megactx_prediction_rank{{by="{by}"}}'] == pytest.approx(float(ranks[-1][place]))
    tiers = [(name, event.pages[0].tiers[name]) for event in events for name in ("memory", "disk")]
    for name in ("memory", "disk"):
        uses = sum(tier.uses for own, tier in tiers if own == name)
        assert found[f'megactx_pages_uses_total{{tier="{name}"}}'] == uses > 0
    reads = sum(tier.reads for own, tier in tiers if own == "disk")
    assert found['megactx_pages_read_duration_seconds_count{tier="disk"}'] == reads > 0
    assert found['megactx_pages_size_bytes{tier="memory"}'] == tiers[-2][1].bytes > 0
    for place, state in enumerate(("taken", "vain")):
        assert found[f'megactx_drafts_total{{state="{state}"}}'] == sum(event.drafts[place] for event in events)
    assert sum(sum(event.drafts) for event in events) > 0
    for part in ("gist", "score", "allocate", "read"):
        count = found[f'megactx_refocus_duration_seconds_count{{part="{part}"}}']
        assert count == sum(part in event.seconds for event in events)
    assert "path.read_text" not in text


def test_the_server_of_numbers_refuses_rebound_names_and_has_nothing_else(scraped, learned):
    prometheus = Prometheus(0, learned)  # a second one in a process has its own numbers
    try:
        for path, headers, status in (("/metrics", {"Host": "evil.example"}, 403), ("/", {}, 404)):
            address = prometheus.address.removesuffix("/metrics") + path
            with pytest.raises(urllib.error.HTTPError, match=str(status)):
                urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20)
        with urllib.request.urlopen(prometheus.address, timeout=20) as answer:
            assert "megactx_refocuses_total" not in answer.read().decode()
    finally:
        prometheus.close()


def test_the_server_of_numbers_closes_a_request_that_does_not_arrive_in_time(monkeypatch, learned):
    monkeypatch.setattr(serving, "RECEIVES", 0.3, raising=False)
    prometheus = Prometheus(0, learned)
    port = int(re.search(r":(\d+)/", prometheus.address)[1])
    try:
        held = [socket.create_connection(("127.0.0.1", port), 5) for _ in range(serving.CONNECTIONS)]
        for own in held:
            own.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127")
        for own in held:
            with contextlib.suppress(ConnectionResetError), own:
                assert own.recv(100) == b""  # closed, without an answer
        with urllib.request.urlopen(prometheus.address, timeout=20) as answer:
            assert answer.status == 200
    finally:
        prometheus.close()


def test_every_name_in_the_dashboard_and_the_rules_is_measured(scraped):
    known = series(scraped[1])
    dashboard, rules = json.loads(DASHBOARD.read_text()), yaml.safe_load(ALERTS.read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    rules = [rule for group in rules["groups"] for rule in group["rules"]]
    drawn = {name for query in queries for name in NAME.findall(query)}
    watched = {name for rule in rules for name in NAME.findall(rule["expr"])}
    assert drawn <= known and watched <= known, (drawn | watched) - known
    assert {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name in drawn} == families(
        scraped[1]
    )  # and nothing is measured that nobody sees
    labels = {*re.findall(r'(\w+)=~?"', " ".join(queries)), *re.findall(r"by \(([^)]*)\)", " ".join(queries))}
    wanted = {label.strip() for group in labels for label in group.split(",")}
    assert wanted <= {"le", *(metric.attribute for metric in METRICS.values() if metric.attribute)}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for rule in rules:
        assert {"alert", "expr", "for", "labels", "annotations"} <= {*rule} and rule["annotations"]["summary"]


def test_the_rules_watch_the_healthy_ranges_of_the_allocator():
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    limits = {rule["alert"]: float(re.search(r"[<>] ([\d.]+)", rule["expr"])[1]) for rule in rules}
    assert limits["MegactxSwapRateHigh"] == SWAP_RATE_ALARM
    assert (limits["MegactxSwapRateAboveHealthy"], limits["MegactxSwapRateBelowHealthy"]) == SWAP_RATE[::-1]
    assert limits["MegactxResidencyShort"] == RESIDENCY
    assert (limits["MegactxUtilisationLow"], limits["MegactxOverBudget"]) == UTILISATION


def test_a_rule_watches_whether_the_readout_is_above_its_control():
    rules = {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}
    rule = rules["MegactxPredictionSaysNothing"]
    mean = 'avg_over_time(megactx_prediction_rank{{by="{}"}}[1h])'
    assert f"{mean.format('readout')} - ignoring(by) {mean.format('map')} < 0" in rule["expr"]
    assert rule["labels"] == {"severity": "info"}


def test_the_page_names_every_metric_with_its_unit_and_its_name_in_prometheus(scraped):
    rows = {
        row[0]: row
        for line in PAGE.splitlines()
        if line.startswith("| `megactx.")
        for row in [[cell.strip().strip("`") for cell in line.strip("|").split("|")]]
    }
    assert {*rows} == {*METRICS}
    names = families(scraped[1])
    for name, (_, prometheus, kind, unit, label, _) in rows.items():
        metric = METRICS[name]
        assert prometheus in names and (kind, unit) == (metric.kind, metric.unit)
        assert label == (metric.attribute or "")


def test_a_command_serves_metrics_where_asked_and_refuses_what_it_cannot(exported, capsys):
    own = ["--model", str(exported), "--budget", "400", "--tokens", "5"]
    assert generate.main([TEXT, *own, "--metrics", "0"]) == 0
    assert re.search(r"metrics: http://127\.0\.0\.1:\d+/metrics", capsys.readouterr().err)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert generate.main([TEXT, *own, "--metrics", str(taken.getsockname()[1])]) == 2
    assert "is in use by another program; --metrics 0" in capsys.readouterr().err
    assert generate.main([TEXT, *own, "--metrics", "70000"]) == 2
    assert capsys.readouterr().err.startswith("megactx: --metrics=70000 is not allowed")
    assert generate.main([TEXT, *own, "--metrics", "0", "--megacontext", "none"]) == 2
    assert "no working context to measure" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["opentelemetry.exporter.prometheus", "opentelemetry.sdk.metrics"])
def test_without_the_extra_a_command_says_what_to_install(monkeypatch, exported, capsys, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert generate.main([TEXT, "--model", str(exported), "--budget", "400", "--metrics", "0"]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert "--metrics=0: pip install 'megactx[apps]' first" in told[-1] and "Traceback" not in " ".join(told)


def test_without_the_extra_an_observer_of_ones_own_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.metrics", None)
    with pytest.raises(ValueError, match=r"pip install 'megactx\[apps\]'"):
        Telemetry(Models(None))
