"""The command that measures carriers over several horizons of the same blocks."""

import csv
import json

import pytest

from megactx.evaluation.bootstrap import recovery_intervals
from megactx.evaluation.measure import measure
from megactx.studies.horizons import COST, FIRSTS, main, summarise
from megactx.studies.trained import held_out, load

SIZES = ["--horizons", "8", "16", "--tokens", "128", "--blocks", "6"]


def test_a_shorter_horizon_is_the_same_blocks_measured_over_fewer_tokens(trained_runs, texts):
    run = load(trained_runs[:1])[0]
    batches = held_out(run.base, str(texts), 8, 16, 128, 6)
    table = summarise(measure(run.base, run.nets, batches, 16), [16, 8])
    assert [span for span in table.names("span") if span.startswith("H = 8")] == ["H = 8, h >= 1", "H = 8, h >= 4"]
    short = measure(run.base, run.nets, batches, 8)
    for first in FIRSTS:
        own = table.pick(span=f"H = 8, h >= {first}")
        for name, value in recovery_intervals(short, ["gistnet", "last token"], first).items():
            point = own.point(metric="recovery", carrier=name)
            assert point == pytest.approx(value.point, abs=1e-4, nan_ok=True)
        cost = (short.drop - short.full)[:, first:].mean().item()
        assert own.point(metric=COST) == pytest.approx(cost, abs=1e-5)


def test_the_command_writes_tables_and_names_the_runs(trained_runs, texts, capsys):
    assert main([*map(str, trained_runs), "--path", str(texts), *SIZES]) == 0
    assert "H = 16" in capsys.readouterr().out
    text = (trained_runs[0] / "horizons.md").read_text()
    assert "prose: gistnet" in text and "code: blockmean_linear" in text and "cost of a dropped block" in text
    numbers = json.loads((trained_runs[0] / "horizons.json").read_text())
    assert numbers["subject"] == "prose: gistnet"
    with (trained_runs[0] / "horizons.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["span"] for row in rows} == {f"H = {horizon}, h >= {first}" for horizon in (8, 16) for first in FIRSTS}
    carriers = {row["carrier"] for row in rows} - {""}
    assert len(rows) == 2 * 2 * (2 * len(carriers) - 1 + 1), "recovery, the difference to the first, and a cost"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--horizons", "4"], "--horizons=[4]"),
        (["--horizons", "8", "8"], "--horizons=[8, 8]"),
        (["--blocks", "0"], "--blocks=0"),
        (["--horizons", "128", "--tokens", "128"], "--tokens=128"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(given, named, trained_runs, capsys):
    assert main([str(trained_runs[0]), *given]) == 2
    assert named in capsys.readouterr().err
